"""Pointwise log-likelihood, predictions and data of every kind of model, against Pyro's handlers and closed forms."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bnn import over_draws, pointwise
from bnn.structure import draw_or_feasible, is_observation, is_plate
from support.checks import assert_mean, assert_variance
from support.models import MODELS, Row, data

ALL = {"observed_data": True, "constant_data": True, "log_likelihood": True, "posterior_predictive": True}
SERVED = [row for row in MODELS if not row.is_random and row.name not in ("batch_norm_training", "prior_only")]


def prior_draws(model: Callable[..., Any], args: Any, kwargs: Any, count: int) -> dict[str, Tensor]:
    """Values of the latent sites: draws from the prior, ones at flat priors."""
    draws = []
    for _ in range(count):
        with torch.no_grad():
            trace = poutine.trace(InitMessenger(draw_or_feasible)(model)).get_trace(*args, **kwargs)
        latents = {name: site["value"] for name, site in trace.iter_stochastic_nodes() if not is_plate(site)}
        draws.append(latents)
    return {name: torch.stack([draw[name] for draw in draws]) for name in draws[0]}


def by_handlers(
    model: Callable[..., Any], args: Any, kwargs: Any, draw: Mapping[str, Tensor]
) -> dict[str, dict[tuple[int, ...], float]]:
    """Site -> place -> unscaled log density, from minibatches that begin at every row."""
    first = poutine.trace(poutine.condition(model, draw)).get_trace(*args, **kwargs)
    plates = {
        name: (site["fn"].size, site["fn"].subsample_size or site["fn"].size)
        for name, site in first.nodes.items()
        if site["type"] == "sample" and is_plate(site)
    }
    small = {name: (size, batch) for name, (size, batch) in plates.items() if batch < size}
    result: dict[str, dict[tuple[int, ...], float]] = {}
    for starts in itertools.product(*(range(size) for size, _ in small.values())):
        rows = {n: (torch.arange(b) + s) % size for s, (n, (size, b)) in zip(starts, small.items(), strict=True)}
        trace = poutine.trace(poutine.condition(model, {**draw, **rows})).get_trace(*args, **kwargs)
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or name in draw or name in plates or not is_observation(site):
                continue
            log_prob = scale_and_mask(site["fn"].log_prob(site["value"]), 1.0, site["mask"])
            inside = {frame.dim: frame.name for frame in site["cond_indep_stack"] if frame.dim is not None}
            for place in itertools.product(*(range(n) for n in log_prob.shape)):
                dims = [i - log_prob.dim() for i in range(log_prob.dim())]
                names = [inside.get(dim) for dim in dims]
                full = tuple(int(rows[n][p]) if n in rows else p for n, p in zip(names, place, strict=True))
                result.setdefault(name, {})[full] = log_prob[place].item()
    return result


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
def test_log_likelihood_equals_the_handlers(row: Row) -> None:
    torch.set_default_dtype(torch.float64)
    model, args, kwargs = row.build()
    draws = prior_draws(model, args, kwargs, 3)
    groups = pointwise.evaluate(model, args, kwargs, draws, ALL)
    found = groups.values["log_likelihood"]
    with torch.no_grad():
        for i in range(3):
            expected = by_handlers(model, args, kwargs, {name: value[i] for name, value in draws.items()})
            assert set(expected) == set(found)
            for name, places in expected.items():
                assert found[name][i].numel() == len(places)
                for place, log_prob in places.items():
                    assert found[name][i][place].item() == pytest.approx(log_prob, rel=1e-9, abs=1e-9), (name, place)
    for name, predicted in groups.values["posterior_predictive"].items():
        observed = groups.values["observed_data"][name]
        assert predicted.shape == (3, *observed.shape)
        assert observed.shape[: found[name].dim() - 1] == found[name].shape[1:]
        assert not torch.equal(predicted[0], observed)


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """One entry per run of the model."""
    result: list[bool] = []
    read = pointwise.read

    def counted(*given: Any) -> Any:
        result.append(True)
        return read(*given)

    monkeypatch.setattr(pointwise, "read", counted)
    return result


@pytest.mark.parametrize("row", SERVED, ids=lambda row: row.name)
def test_draws_are_vectorized_wherever_vmap_can(row: Row, runs: list[bool]) -> None:
    looped = ("batch_norm_training", "control_flow", "item_of_latent", "custom_function", "conv_net")
    model, args, kwargs = row.build()
    draws = prior_draws(model, args, kwargs, 100)
    pointwise.evaluate(model, args, kwargs, draws, {"log_likelihood": True})
    assert (len(runs) >= 100) == (row.name in looped), len(runs)


def regression(y: Tensor, batch_size: int | None = None) -> None:
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=y[rows])


def closed_form(means: Tensor, y: Tensor) -> Tensor:
    return -0.5 * ((y - means[:, None]) / 0.5) ** 2 - torch.log(torch.tensor(0.5)) - 0.9189385332046727


@pytest.mark.parametrize("batch_size", [None, 1, 3, 5, 12], ids=str)
@pytest.mark.parametrize("largest", [1, 40, 1 << 22])
def test_log_likelihood_in_closed_form_whatever_the_chunks(
    batch_size: int | None, largest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(over_draws, "LARGEST_TENSOR", largest)
    y, means = data()[1], torch.randn(17)
    wanted = {"log_likelihood": True, "observed_data": True}
    values = pointwise.evaluate(regression, (y, batch_size), {}, {"mean": means}, wanted).values
    torch.testing.assert_close(values["log_likelihood"]["obs"], closed_form(means, y))
    torch.testing.assert_close(values["observed_data"]["obs"], y)


@pytest.mark.parametrize("shape", ["plate", "full plate and scale", "no plate and scale"])
@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_of_a_loader_correspond(shape: str, shuffle: bool) -> None:
    x, y = data(14)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=shuffle)

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        if shape == "plate":
            with pyro.plate("data", 14, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(x @ weight, 0.5), obs=y)
        elif shape == "full plate and scale":
            with poutine.scale(scale=14 / len(x)), pyro.plate("data", len(x)):
                pyro.sample("obs", dist.Normal(x @ weight, 0.5), obs=y)
        else:
            with poutine.scale(scale=14 / len(x)):
                pyro.sample("obs", dist.Normal(x @ weight, 0.5), obs=y)

    weights = torch.randn(6, 3)
    values = pointwise.evaluate(model, (), {}, {"weight": weights}, ALL, batches=loader).values
    inputs, observed = values["constant_data"]["x"], values["observed_data"]["obs"]
    assert set(values["constant_data"]) == {"x"}
    assert sorted(observed.tolist()) == sorted(y.tolist())
    torch.testing.assert_close(observed, y[(inputs[:, None] == x).all(-1).int().argmax(-1)])
    expected = dist.Normal(weights @ inputs.T, 0.5).log_prob(observed)
    torch.testing.assert_close(values["log_likelihood"]["obs"], expected)
    assert values["posterior_predictive"]["obs"].shape == (6, 14)


def test_a_sum_over_a_batch_is_refused() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with poutine.scale(scale=12 / len(y)):
            pyro.sample("obs", dist.Normal(mean.expand(len(y)), 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="'obs' changes from batch to batch"):
        pointwise.evaluate(model, (), {}, {"mean": torch.zeros(2)}, ALL, batches=data()[1].split(4))


@pytest.mark.parametrize("batch_size", [None, 2], ids=str)
def test_predictions_have_the_moments_of_the_predictive_law(batch_size: int | None) -> None:
    torch.set_default_dtype(torch.float64)
    count, y = 100_000, torch.tensor([1.0, 3.0, 2.0])
    means = 0.7 + 0.3 * torch.randn(count)
    wanted = {"posterior_predictive": True}
    values = pointwise.evaluate(regression, (y, batch_size), {}, {"mean": means}, wanted).values
    predicted = values["posterior_predictive"]["obs"]
    variance = 0.3**2 + 0.5**2
    for row in range(3):
        assert_mean(f"row {row}", predicted[:, row].numpy(), 0.7, variance)
        assert_variance(f"row {row}", (predicted[:, row] - 0.7).numpy(), variance)
    noise = predicted - means[:, None]
    assert_variance("difference of rows", (noise[:, 0] - noise[:, 2]).numpy(), 2 * 0.5**2)


NOISES = {
    "Categorical": (lambda z: dist.Categorical(logits=z * torch.arange(3.0)), torch.tensor(1)),
    "Bernoulli": (lambda z: dist.Bernoulli(logits=z), torch.tensor(1.0)),
    "Poisson": (lambda z: dist.Poisson(z.exp()), torch.tensor(1.0)),
    "Gamma": (lambda z: dist.Gamma(2.0 + z.exp(), 1.0), torch.tensor(1.0)),
    "StudentT": (lambda z: dist.StudentT(5.0, z, 1.0), torch.tensor(1.0)),
    "Binomial": (lambda z: dist.Binomial(5, logits=z), torch.tensor(1.0)),
    "NegativeBinomial": (lambda z: dist.NegativeBinomial(5, logits=z), torch.tensor(1.0)),
    "LogNormal": (lambda z: dist.LogNormal(z, 0.5), torch.tensor(1.0)),
    "HalfNormal": (lambda z: dist.HalfNormal(z.exp()), torch.tensor(1.0)),
    "Laplace": (lambda z: dist.Laplace(z, 1.0), torch.tensor(1.0)),
    "Uniform": (lambda z: dist.Uniform(z, z + 1.0), torch.tensor(0.5)),
    "OneHotCategorical": (lambda z: dist.OneHotCategorical(logits=z * torch.arange(3.0)), torch.eye(3)[1]),
    "MultivariateNormal": (lambda z: dist.MultivariateNormal(z * torch.ones(2), torch.eye(2)), torch.zeros(2)),
    "Mixture": (
        lambda z: dist.MixtureSameFamily(dist.Categorical(torch.ones(2)), dist.Normal(z + torch.arange(2.0), 1.0)),
        torch.tensor(0.5),
    ),
    "Dirichlet": (lambda z: dist.Dirichlet(torch.ones(3) + z.exp()), torch.ones(3) / 3),
}


@pytest.mark.parametrize("name", NOISES)
def test_predictions_of_any_law_differ_by_draw_and_row(name: str, runs: list[bool]) -> None:
    law, one = NOISES[name]

    def model(y: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 40):
            pyro.sample("obs", law(z), obs=y)

    y = one.expand(40, *one.shape)
    values = pointwise.evaluate(model, (y,), {}, {"z": torch.zeros(250)}, {"posterior_predictive": True}).values
    predicted = values["posterior_predictive"]["obs"].double()
    assert predicted.shape == (250, *y.shape)
    assert (len(runs) >= 250) == (name in ("Binomial", "NegativeBinomial", "Dirichlet")), len(runs)
    assert len(predicted.unique(dim=0)) == 250
    assert len(predicted.unique(dim=1).unbind(1)) == 40
    law_at_zero = law(torch.tensor(0.0))
    expected, variance = (
        (torch.ones(()), torch.tensor(2 / 3)) if name == "Categorical" else (law_at_zero.mean, law_at_zero.variance)
    )
    error = 5 * (variance / 10_000).sqrt()  # of the mean of 10,000 numbers
    assert ((predicted.mean((0, 1)) - expected).abs() < error).all()
    assert torch.allclose(predicted.flatten(0, 1).var(0), variance.double(), rtol=0.15)


def test_a_second_observation_follows_the_first_drawn() -> None:
    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        first = pyro.sample("first", dist.Normal(mean, 0.01), obs=torch.tensor(50.0))
        pyro.sample("second", dist.Normal(first, 0.01), obs=torch.tensor(51.0))

    wanted = {"posterior_predictive": True}
    values = pointwise.evaluate(model, (), {}, {"mean": torch.zeros(5)}, wanted).values["posterior_predictive"]
    assert (values["second"].abs() < 1).all() and not torch.equal(values["first"], values["second"])


def test_noise_of_the_model_is_fresh_for_each_draw() -> None:
    (row,) = [row for row in MODELS if row.name == "dropout"]
    model, args, kwargs = row.build()
    draws = {
        name: value[:1].expand(20, *value.shape[1:]) for name, value in prior_draws(model, args, kwargs, 1).items()
    }
    values = pointwise.evaluate(model, args, kwargs, draws, {"log_likelihood": True}).values
    assert len(values["log_likelihood"]["obs"].unique(dim=0)) == 20


def test_the_meter_sees_the_largest_tensor_and_convolutions() -> None:
    meter = over_draws.Meter()
    with meter:
        torch.nn.functional.conv2d(torch.ones(1, 1, 5, 5), torch.ones(7, 1, 3, 3)).sum()
    assert meter.largest == 7 * 9 and meter.convolves
