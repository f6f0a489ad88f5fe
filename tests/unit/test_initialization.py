"""Where chains start: site by site."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from bnn import Potential
from bnn.initialization import init_to_fan_in, init_to_prior, strategy_of
from support.nets import normal_prior


def site(fn: Any) -> dict[str, Any]:
    return {"fn": fn, "name": "site"}


def draws(init: Any, fn: Any, count: int = 2000) -> torch.Tensor:
    return torch.stack([init(site(fn)) for _ in range(count)])


@pytest.mark.parametrize("shape", [(4, 9), (30, 4, 2, 2)], ids=str)
def test_weight_arrays_start_no_wider_than_their_fan_allows(shape: tuple[int, ...]) -> None:
    """Standard deviation 1/sqrt(fan) about the prior mean: Kolmogorov-Smirnov, false alarms at 1e-6."""
    fan = max(shape[0], math.prod(shape[1:]))
    fn = dist.Normal(torch.full(shape, 2.0), 3.0).to_event(len(shape))
    standard = (draws(init_to_fan_in, fn, 100).double() - 2.0) * math.sqrt(fan)
    assert stats.kstest(standard.flatten().numpy(), "norm").pvalue > 1e-6


def test_a_narrow_prior_stays_as_it_is() -> None:
    fn = dist.Normal(torch.zeros(4, 9), 0.01).to_event(2)
    standard = draws(init_to_fan_in, fn, 100).double() / 0.01
    assert stats.kstest(standard.flatten().numpy(), "norm").pvalue > 1e-6


@pytest.mark.parametrize(
    "fn",
    [
        normal_prior(5),
        dist.Cauchy(torch.zeros(3, 4), 1.0).to_event(2),
        dist.LKJCholesky(3, 1.0),
        dist.Dirichlet(torch.ones(3)),
    ],
    ids=["vector", "without variance", "cholesky factor", "simplex"],
)
def test_all_else_starts_at_a_prior_draw(fn: Any) -> None:
    pyro.set_rng_seed(2)
    expected = init_to_prior(site(fn))
    pyro.set_rng_seed(2)
    assert torch.equal(init_to_fan_in(site(fn)), expected)
    pyro.set_rng_seed(2)
    assert torch.equal(expected, fn.sample())


@pytest.mark.parametrize(
    ("fn", "law"),
    [
        (dist.HalfCauchy(torch.ones(3, 4)).to_event(2), stats.halfcauchy()),
        (dist.Gamma(torch.full((12,), 2.0), 1.0).to_event(1), stats.gamma(2.0)),
        (dist.Uniform(torch.full((12,), 3.0), 5.0), stats.uniform(3.0, 2.0)),
    ],
    ids=["half-cauchy", "gamma", "interval"],
)
def test_bounded_numbers_start_at_the_median_of_fifteen_draws(fn: Any, law: Any) -> None:
    """The median of 15 uniforms is Beta(8, 8): Kolmogorov-Smirnov, false alarms at 1e-6."""
    ranks = law.cdf(draws(init_to_fan_in, fn, 200).double().numpy().ravel())
    assert stats.kstest(ranks, stats.beta(8, 8).cdf).pvalue > 1e-6


def test_flat_priors_start_near_the_middle_of_their_support() -> None:
    fn = dist.ImproperUniform(dist.constraints.positive, (), (2,))
    logs = draws(init_to_prior, fn, 500).log().double()
    assert stats.kstest(logs.flatten().numpy(), stats.uniform(-0.5, 1.0).cdf).pvalue > 1e-6


def test_strategies_by_name_and_as_functions() -> None:
    assert strategy_of("auto") is init_to_fan_in
    assert strategy_of(init_to_prior) is init_to_prior
    with pytest.raises(ValueError, match="'prior'"):
        strategy_of("laplace")


def test_starts_with_infinite_energy_are_drawn_again() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("half", torch.where(z > 0.0, 0.0, -torch.inf))

    starts = Potential(model, compile="fx").initial(20, "prior")
    assert (starts > 0).all() and len(starts.unique()) == 20
