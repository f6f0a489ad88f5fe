"""Predictions followed over draws: what is identified in a net, in ArviZ's form and in the summary."""

from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import ExpTransform
from torch import Tensor

import bnn
from bnn.kernels import MCMC, SGLD

X = torch.linspace(-1.0, 1.0, 10)


def slope_model(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", 10, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y)


def four_classes(f: Tensor) -> Any:
    return dist.Categorical(logits=f.unsqueeze(-1) * torch.arange(4.0))


def two_classes(f: Tensor) -> Any:
    return dist.Bernoulli(logits=3 * f)


def run_of(*args: Tensor, batches: Any = None) -> MCMC:
    pyro.set_rng_seed(0)
    mcmc = MCMC(SGLD(slope_model, step_size=0.01, batches=batches), num_samples=6, num_chains=2, disable_progbar=True)
    mcmc.run(*args)
    return mcmc


def model_of(law: Any) -> Any:
    def model(x: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", law(torch.tanh(x @ weight)))

    return model


def mirrored(count: int = 300) -> dict[str, Tensor]:
    """Draws of one function, its two hidden units swapped and mirrored from chain to chain."""
    pyro.set_rng_seed(2)
    first, second = torch.tensor([3.0, -1.0]), torch.tensor([1.0, 2.0])
    chains = []
    for flip, order in [(1, [0, 1]), (-1, [0, 1]), (1, [1, 0]), (-1, [1, 0])]:
        noise = [0.02 * torch.randn(count, 2) for _ in range(2)]
        chains.append([flip * (first + noise[0])[:, order], flip * (second + noise[1])[:, order]])
    return {"first": torch.cat([c[0] for c in chains]), "second": torch.cat([c[1] for c in chains])}


def tanh_net(x: Tensor, y: Tensor | None = None) -> None:
    first, second = (pyro.sample(name, dist.Normal(0.0, 1.0).expand([2]).to_event(1)) for name in ("first", "second"))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((torch.tanh(x[:, None] * first) * second).sum(-1), 0.1), obs=y)


def mirrored_data() -> Any:
    return bnn.arviz_data.assemble({"posterior": {k: v.reshape(4, 300, 2).numpy() for k, v in mirrored().items()}})


def test_chains_in_mirrored_copies_agree_in_function_space_only() -> None:
    data, x = mirrored_data(), torch.linspace(0.2, 1.0, 9)
    predicted = bnn.function_space(data, x, model=tanh_net)
    by_hand = (torch.tanh(x[:, None] * mirrored()["first"][:, None]) * mirrored()["second"][:, None]).sum(-1)
    np.testing.assert_allclose(predicted["posterior"]["y_mean"].values.reshape(1200, 9), by_hand, atol=1e-5)
    assert predicted["posterior"]["y_mean"].attrs == {"function_of": "y", "kind": "mean"}
    assert float(az.rhat(data)["first"].min()) > 1.5
    assert float(az.rhat(predicted)["y_mean"].max()) < 1.03


def test_the_summary_shows_predictions_first_and_weights_on_request() -> None:
    data, x = mirrored_data(), torch.linspace(0.2, 1.0, 9)
    found = bnn.summary(data, x, rows=2, model=tanh_net)
    rhats = np.asarray(az.rhat(bnn.function_space(data, x, model=tanh_net))["y_mean"])
    worst = sorted(np.argsort(-rhats)[:2])
    sites = [f"{site}[{i}]" for site in ("first", "second") for i in range(2)]
    assert list(found.table.index) == [f"y_mean[{row}]" for row in worst] + sites
    assert "identified only up to permutations" in found.note and "the 2 of 9 rows with the largest R-hat" in found.note
    assert found.note in str(found) and found.note in found._repr_html_()


def test_large_sites_are_left_out_of_the_summary_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bnn.in_function_space, "SMALL_SITE", 1)
    data, x = mirrored_data(), torch.linspace(0.2, 1.0, 9)
    assert len(bnn.summary(data, x, model=tanh_net).table) == 5
    assert "weights=True" in bnn.summary(data, x, model=tanh_net).note
    assert len(bnn.summary(data, x, model=tanh_net, weights=True).table) == 9


def test_class_probabilities_have_a_dimension_of_classes() -> None:
    draws = {"weight": torch.randn(12, 2)}
    x = torch.randn(5, 2)
    predicted = bnn.function_space(draws, x, model=model_of(four_classes))["posterior"]["y_probability"]
    assert predicted.dims == ("chain", "draw", "y_row", "y_class")
    np.testing.assert_allclose(predicted.sum("y_class"), 1.0, rtol=1e-5)
    one = bnn.function_space(draws, x, model=model_of(two_classes))["posterior"]["y_probability"]
    np.testing.assert_allclose(one[0], torch.sigmoid(3 * torch.tanh(draws["weight"] @ x.T)), rtol=1e-5)


@pytest.mark.parametrize("loaded", [False, True], ids=["run's data", "loader"])
def test_to_arviz_with_functions_of_the_data(loaded: bool) -> None:
    batches = [(X[i : i + 4], 2 * X[i : i + 4]) for i in (0, 4, 8)]
    run = run_of(batches=batches) if loaded else run_of(X, 2 * X)
    data = bnn.to_arviz(run, function_space=True, thin=2)
    slopes = run.get_samples(group_by_chain=True)["slope"][:, ::2]
    np.testing.assert_allclose(data["posterior"]["y_mean"], slopes[..., None] * X, rtol=1e-5)
    assert data["posterior"]["y_mean"].attrs == {"function_of": "y", "kind": "mean"}


def test_a_law_without_a_mean_has_no_function() -> None:
    model = model_of(lambda f: dist.TransformedDistribution(dist.Normal(f, 0.2), ExpTransform()))
    with pytest.raises(ValueError, match="'y' has no mean in closed form to follow"):
        bnn.function_space({"weight": torch.zeros(4, 2)}, torch.zeros(3, 2), model=model)
    with pytest.raises(ValueError, match="rows is 0"):
        bnn.summary({"weight": torch.zeros(4, 2)}, torch.zeros(3, 2), rows=0, model=model)


def test_of_a_row_with_several_outputs_the_summary_shows_the_worst() -> None:
    pyro.set_rng_seed(0)
    draws = {"weight": 0.3 * torch.randn(4, 50, 2) + torch.tensor([0.0, 0.2, 0.4, 0.6])[:, None, None]}
    data = bnn.arviz_data.assemble({"posterior": {name: value.numpy() for name, value in draws.items()}})
    x, model = torch.randn(6, 2), model_of(four_classes)
    rhats = np.asarray(az.rhat(bnn.function_space(data, x, model=model))["y_probability"])
    rows = np.sort(np.argsort(-rhats.max(1))[:2])
    found = bnn.summary(data, x, rows=2, model=model).table.index[:2]
    assert list(found) == [f"y_probability[{row}, {rhats[row].argmax()}]" for row in rows]
