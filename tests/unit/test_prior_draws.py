"""The functions that a prior draws, as ArviZ's data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import bnn
from bnn.likelihoods import Gaussian
from bnn.priors import FanIn, Flat
from support.checks import ALPHA, variance_p_value
from support.plain_nets import MLP, TWO_INPUTS


def test_a_linear_net_has_its_exact_variance() -> None:
    """Var y = |x|² / 2 + 1 + 0.09."""
    x = torch.tensor([[1.0, 2.0], [-1.0, 0.5]])
    model = bnn.bayesian(nn.Linear(2, 1), likelihood=Gaussian(0.3), batch_size=1)
    data = bnn.prior_predictive(model, x, num_samples=1000)
    draws = data.prior_predictive["y"].values
    assert draws.shape == (1, 1000, 2)
    for row, variance in enumerate((x.square().sum(-1) / 2 + 1.09).tolist()):
        assert variance_p_value(draws[..., row], variance) > ALPHA
    assert data.prior["weight"].sizes["draw"] == 1000 and set(data.prior.data_vars) == {"weight", "bias"}
    assert np.array_equal(data.constant_data["x"].values, x.numpy())


def test_models_written_by_hand() -> None:
    def regression(x: Tensor, y: Tensor | None = None) -> None:
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        noise = pyro.sample("noise", dist.HalfNormal(1.0))
        pyro.deterministic("twice", 2 * slope)
        with pyro.plate("data", len(x)):
            pyro.sample("level", dist.Normal(slope * x, noise), obs=y)
        pyro.factor("factor", -slope.square())

    data = bnn.prior_predictive(regression, torch.randn(5), 7)
    assert set(data.prior.data_vars) == {"slope", "noise", "twice"}
    assert set(data.prior_predictive.data_vars) == {"level"}
    assert data.prior_predictive["level"].shape == (1, 7, 5)
    named = bnn.prior_predictive(regression, torch.randn(5), 7, observed=["noise", "level"])
    assert set(named.prior_predictive.data_vars) == {"noise", "level"}


def test_several_inputs_and_the_seed() -> None:
    x, _ = TWO_INPUTS.data()
    found = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        found.append(bnn.prior_predictive(TWO_INPUTS.model(), x, 3))
    first, second = found
    assert set(first.constant_data.data_vars) == {"x_0", "x_1"}
    assert np.array_equal(first.prior_predictive["y"], second.prior_predictive["y"])


def without_y(x: Tensor) -> None:
    pyro.sample("w", dist.Normal(0.0, 1.0))


def minibatch(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 5, subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(w * x[rows], 1.0), obs=None if y is None else y[rows])


X, Y = torch.zeros(5, 2), torch.zeros(5)
MISTAKES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "no model": (lambda: bnn.prior_predictive(FanIn(), X), ("model is FanIn", "a Pyro model")),  # type: ignore[arg-type]
    "no draws": (lambda: bnn.prior_predictive(MLP.model(), X, 0), ("num_samples is 0", "at least 1")),
    "improper": (
        lambda: bnn.prior_predictive(MLP.model(prior=Flat()), X),
        ("'0.weight' (ImproperUniform)", "improper"),
    ),
    "never observed": (lambda: bnn.prior_predictive(without_y, X), ("second argument", "observed=", "['w']")),
    "part of the rows": (
        lambda: bnn.prior_predictive(minibatch, Y),
        ("'data' draws 2 of 5 rows", "subsample_size=None"),
    ),
    "unknown site": (
        lambda: bnn.prior_predictive(MLP.model(), X, observed=["z"]),
        ("observed names ['z']", "'2.weight', 'y'"),
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_words(name: str) -> None:
    act, words = MISTAKES[name]
    with pytest.raises(ValueError) as caught:
        act()
    for word in words:
        assert word in str(caught.value), str(caught.value)
