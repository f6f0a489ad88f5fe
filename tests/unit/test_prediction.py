"""Posterior predictive: exact moments and probabilities of the mixture over draws, in whatever chunks and form."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions.transforms import ExpTransform
from pyro.infer import NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from pyro.optim import Adam
from scipy import stats
from torch import Tensor

import bnn
from bnn import predictive_chunks
from bnn.guides import AutoMatrixNormal
from bnn.kernels import MCMC, SGLD
from bnn.over_draws import Meter
from support.checks import assert_mean, assert_variance

ROWS, DRAWS = 23, 7

LAWS: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda f: dist.Normal(f, 0.5 + f.square()),
    "two outputs": lambda f: dist.Normal(torch.stack([f, -f], -1), 0.3).to_event(1),
    "masked": lambda f: dist.Normal(f, 0.3).mask(f > 0),
    "StudentT": lambda f: dist.StudentT(5.0, f, f.exp()),
    "LogNormal": lambda f: dist.LogNormal(f, 0.3),
    "Gamma": lambda f: dist.Gamma(f.exp(), 2.0),
    "Poisson": lambda f: dist.Poisson(f.exp()),
    "NegativeBinomial": lambda f: dist.NegativeBinomial(3.0, logits=f),
    "MultivariateNormal": lambda f: dist.MultivariateNormal(torch.stack([f, -f], -1), torch.eye(2)),
    "Mixture": lambda f: dist.MixtureSameFamily(
        dist.Categorical(torch.tensor([0.3, 0.7])), dist.Normal(f.unsqueeze(-1) + torch.arange(2.0), 0.4)
    ),
    "Bernoulli": lambda f: dist.Bernoulli(logits=3 * f),
    "Categorical": lambda f: dist.Categorical(logits=f.unsqueeze(-1) * torch.arange(4.0)),
    "OneHotCategorical": lambda f: dist.OneHotCategorical(logits=f.unsqueeze(-1) * torch.arange(4.0)),
    "Categorical sequence": lambda f: dist.Categorical(logits=f[:, None, None] * torch.arange(6.0).view(2, 3)).to_event(
        1
    ),
}
CLASSES = ("Bernoulli", "Categorical", "OneHotCategorical", "Categorical sequence")


def model_of(law: Callable[[Tensor], Any], batch_size: int | None = None, centred: bool = False) -> Callable[..., Any]:
    def model(x: Tensor, y: Tensor | None = None) -> None:
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
            part = x[rows]
            f = torch.tanh((part - part.mean(0) if centred else part) @ weight)
            pyro.sample("y", law(f), obs=None if y is None else y[rows])

    return model


@pytest.fixture
def given() -> tuple[Tensor, dict[str, Tensor]]:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(3)
    return torch.randn(ROWS, 2), {"weight": torch.randn(DRAWS, 2)}


def laws_by_hand(law: Callable[[Tensor], Any], x: Tensor, weights: Tensor, centred: bool = False) -> list[Any]:
    x = x - x.mean(0) if centred else x
    return [law(torch.tanh(x @ weight)) for weight in weights]


def base(fn: Any) -> Any:
    return base(fn.base_dist) if type(fn).__name__ in ("Independent", "MaskedDistribution") else fn


def probabilities(fn: Any) -> Tensor:
    probs = base(fn).probs
    return torch.stack([1 - probs, probs], -1) if "Bernoulli" in type(base(fn)).__name__ else probs


@pytest.mark.parametrize("batch_size", [None, 5], ids=str)
@pytest.mark.parametrize("memory", [2.0**29, 3000.0])
@pytest.mark.parametrize("name", LAWS)
def test_moments_and_probabilities_are_those_of_the_mixture(
    name: str, memory: float, batch_size: int | None, given: tuple[Tensor, dict[str, Tensor]]
) -> None:
    x, draws = given
    found = bnn.predict(draws, x, model=model_of(LAWS[name], batch_size), memory=memory, draws=True)
    laws = laws_by_hand(LAWS[name], x, draws["weight"])
    if name in CLASSES:
        probs = torch.stack([probabilities(law) for law in laws])
        torch.testing.assert_close(found.draws, probs)
        torch.testing.assert_close(found.probabilities, probs.mean(0))
        entropy = -(probs.mean(0) * probs.mean(0).log()).sum(-1)
        expected = -(probs * probs.log()).sum(-1).mean(0)
        torch.testing.assert_close(found.entropy, entropy)
        torch.testing.assert_close(found.expected_entropy, expected)
        torch.testing.assert_close(found.mutual_information, entropy - expected)
        assert torch.equal(found.labels, probs.mean(0).argmax(-1))
    if name not in CLASSES or name == "Bernoulli":
        means, variances = (torch.stack([getattr(law, part) for law in laws]) for part in ("mean", "variance"))
        torch.testing.assert_close(found.mean, means.mean(0))
        second_moment = (variances + means.square()).mean(0)
        torch.testing.assert_close(found.sd, (second_moment - means.mean(0).square()).sqrt())
        torch.testing.assert_close(found.aleatoric, variances.mean(0).sqrt())
        torch.testing.assert_close(found.epistemic, means.std(0, correction=0))


def test_logits_are_averaged_only_on_request(given: tuple[Tensor, dict[str, Tensor]]) -> None:
    x, draws = given
    model = model_of(LAWS["Categorical"])
    logits = torch.stack([base(law).logits for law in laws_by_hand(LAWS["Categorical"], x, draws["weight"])])
    found = bnn.predict(draws, x, model=model, average="logits")
    torch.testing.assert_close(found.probabilities, logits.mean(0).softmax(-1))
    assert not torch.allclose(found.probabilities, bnn.predict(draws, x, model=model).probabilities)


def test_rows_that_influence_each_other_are_not_torn_apart(
    given: tuple[Tensor, dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, draws = given
    model = model_of(LAWS["Normal"], centred=True)
    means = torch.stack([law.mean for law in laws_by_hand(LAWS["Normal"], x, draws["weight"], centred=True)])
    with pytest.warns(RuntimeWarning, match="rows influence each other.*all 23 are predicted at once"):
        found = bnn.predict(draws, x, model=model, memory=500.0)
    torch.testing.assert_close(found.mean, means.mean(0))
    monkeypatch.setattr(predictive_chunks, "ROWS_AT_ONCE", 4)  # no warning where memory is enough
    torch.testing.assert_close(bnn.predict(draws, x, model=model).mean, means.mean(0))


@pytest.mark.parametrize("rows", [1, 2, 255, 256, 257, 3000])
def test_any_number_of_rows(rows: int) -> None:
    draws = {"weight": torch.randn(3, 2)}
    x = torch.randn(rows, 2)
    found = bnn.predict(draws, x, model=model_of(LAWS["Normal"]))
    expected = torch.tanh(x @ draws["weight"].T).mean(1)
    torch.testing.assert_close(found.mean, expected)


def test_nothing_held_is_larger_than_the_bound() -> None:
    def model(x: Tensor) -> None:
        first = pyro.sample("first", dist.Normal(0.0, 1.0).expand([2, 50]).to_event(2))
        second = pyro.sample("second", dist.Normal(0.0, 1.0).expand([50]).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ first) @ second, 0.1))

    draws = {"first": torch.randn(200, 2, 50), "second": torch.randn(200, 50)}
    memory, meter = 1e6, Meter()
    with meter:
        found = bnn.predict(draws, torch.randn(4000, 2), model=model, memory=memory)
    assert found.mean.shape == (4000,)
    assert 4 * meter.largest < memory / 4 < 4 * 200 * 4000, meter.largest


def test_quantiles_and_samples_are_of_the_predictive_law() -> None:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(8)
    count, levels = 100_000, (0.05, 0.5, 0.9)

    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x), subsample_size=2):
            pyro.sample("y", dist.Normal(mean, 0.5))

    means = 0.7 + 0.3 * torch.randn(count)
    found = bnn.predict({"mean": means}, torch.zeros(3), model=model, quantiles=levels, samples=True)
    law = stats.norm(0.7, math.hypot(0.3, 0.5))
    for row in range(3):
        assert_mean(f"row {row}", found.samples[:, row].numpy(), 0.7, law.var())
        assert_variance(f"row {row}", (found.samples[:, row] - 0.7).numpy(), law.var())
        for level, quantile in zip(levels, found.quantiles[:, row], strict=True):
            order = level * count  # the level below an empirical quantile is a Beta variable
            assert 1e-5 < stats.beta(order, count - order).cdf(law.cdf(quantile)) < 1 - 1e-5
    noise = found.samples - means[:, None]
    assert_variance("rows differ", (noise[:, 0] - noise[:, 1]).numpy(), 2 * 0.5**2)
    np.testing.assert_allclose(found.quantiles.numpy(), np.quantile(found.samples.numpy(), levels, axis=0))


def test_a_law_without_moments_is_sampled() -> None:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(8)
    model = model_of(lambda f: dist.TransformedDistribution(dist.Normal(0.0 * f, 0.2), ExpTransform()))
    found = bnn.predict({"weight": torch.zeros(1000, 2)}, torch.zeros(40, 2), model=model)
    law = stats.lognorm(0.2)
    assert found.epistemic is None and found.draws is None
    error = math.sqrt(law.var() / 40_000)
    assert abs(found.mean.mean().item() - law.mean()) < 5 * error
    assert found.sd.square().mean().sqrt().item() == pytest.approx(law.std(), rel=0.03)


def test_a_law_without_a_mean_is_announced(given: tuple[Tensor, dict[str, Tensor]]) -> None:
    x, draws = given
    with pytest.warns(RuntimeWarning, match="'y' has no mean in some rows, which are NaN: ask for quantiles"):
        found = bnn.predict(draws, x, model=model_of(lambda f: dist.StudentT(1.0, f, 1.0)))
    assert found.mean.isnan().all()
    assert bnn.predict(draws, x, model=model_of(lambda f: dist.StudentT(2.0, f, 1.0))).sd.isinf().all()


def test_several_sites_and_one_that_follows_another() -> None:
    def model(x: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            first = pyro.sample("first", dist.Normal(mean + 10.0, 0.1))
            pyro.sample("second", dist.Normal(2 * first, 0.1))

    draws, x = {"mean": torch.zeros(50)}, torch.zeros(4)
    found = bnn.predict(draws, x, model=model)
    assert set(found) == {"first", "second"}
    assert found["second"].mean.sub(20.0).abs().max() < 0.3 and found["second"].epistemic.max() < 0.5
    assert bnn.predict(draws, x, model=model, sites=["first"]).name == "first"


# ---- forms of a posterior


def regression(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.1))
    with pyro.plate("data", len(x), subsample_size=5) as rows:
        pyro.sample("y", dist.Normal(slope * x[rows], scale), obs=None if y is None else y[rows])


DATA = torch.linspace(-1.0, 1.0, 10), torch.linspace(-2.0, 2.0, 10)


@pytest.fixture(scope="module")
def run() -> MCMC:
    pyro.set_rng_seed(0)
    mcmc = MCMC(SGLD(regression, step_size=0.01), num_samples=20, num_chains=3, warmup_steps=5, disable_progbar=True)
    mcmc.run(*DATA)
    return mcmc


def test_every_form_of_the_same_draws_predicts_the_same(run: MCMC) -> None:
    x = torch.linspace(0.0, 3.0, 7)
    expected = bnn.predict(run, x)
    draws = run.get_samples()
    torch.testing.assert_close(expected.mean, (draws["slope"][:, None] * x).mean(0))
    torch.testing.assert_close(expected.aleatoric, draws["scale"].square().mean().sqrt().expand(7))
    idata = bnn.to_arviz(run, function_space=True)
    ensemble = [{name: value[i] for name, value in draws.items()} for i in range(60)]
    for form in (draws, idata, ensemble, {name: value.numpy() for name, value in draws.items()}):
        found = bnn.predict(form, x, model=regression)
        torch.testing.assert_close(found.mean, expected.mean)
        torch.testing.assert_close(found.sd, expected.sd)


def test_without_arguments_the_run_predicts_its_own_data(run: MCMC) -> None:
    torch.testing.assert_close(bnn.predict(run).mean, bnn.predict(run, DATA[0]).mean)
    torch.testing.assert_close(bnn.predict(run, *DATA).mean, bnn.predict(run, DATA[0]).mean)  # targets change nothing


def test_fewer_draws_are_evenly_spaced(run: MCMC) -> None:
    found = bnn.predict(run, DATA[0], num_samples=9, draws=True)
    slopes = run.get_samples(group_by_chain=True)["slope"][:, [0, 10, 19]].flatten()
    assert found.num_draws == 9
    torch.testing.assert_close(found.draws, slopes[:, None] * DATA[0])


def test_a_run_of_pyros_nuts() -> None:
    pyro.set_rng_seed(0)
    mcmc = pyro.infer.MCMC(
        NUTS(model_of(LAWS["Normal"])), num_samples=10, warmup_steps=5, disable_progbar=True, num_chains=1
    )
    x = torch.randn(6, 2)
    mcmc.run(x, torch.zeros(6))
    expected = torch.tanh(x @ mcmc.get_samples()["weight"].T).mean(1)
    torch.testing.assert_close(bnn.predict(mcmc, x).mean, expected)


@pytest.mark.parametrize("guide_type", [AutoNormal, AutoMatrixNormal])
def test_a_guide_predicts_by_its_law(guide_type: Any) -> None:
    pyro.clear_param_store()
    pyro.set_rng_seed(1)
    guide = guide_type(model_of(lambda f: dist.Normal(torch.atanh(f), 0.5)))
    x, y = torch.randn(6, 2), torch.randn(6)
    svi = SVI(guide.model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(x, y)
    count = 4000
    found = bnn.predict(guide, x, num_samples=count, draws=True)
    with torch.no_grad():
        centre = x @ guide.median(x)["weight"]
    error = found.epistemic / math.sqrt(count)
    assert ((found.mean - centre).abs() < 5 * error + 1e-6).all()
    assert found.num_draws == count and len(found.draws.unique(dim=0)) == count


@pytest.mark.parametrize("guide_type", [AutoNormal, AutoDelta])
def test_samples_under_a_guide_of_pyros_are_drawn(guide_type: Any) -> None:
    """Such a guide keeps its model under a handler that gives every site a start, the predicted one too."""
    guide, x = guide_type(regression), torch.zeros(10)
    guide(x, x)
    samples = bnn.predict(guide, x, samples=True, num_samples=50).samples
    assert samples is not None and samples.std(0).min() > 0


def test_a_prediction_pickles_and_prints(run: MCMC) -> None:
    found = bnn.predict(run, DATA[0])
    assert torch.equal(pickle.loads(pickle.dumps(found)).mean, found.mean)
    assert repr(found).startswith("Prediction('y', 60 draws, {'mean': (10,)")


# ---- bad input


def without_default(x: Tensor, y: Tensor) -> None:
    regression(x, y)


def needs_targets(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)) as rows:
        pyro.sample("y", dist.Normal(slope * x, 1.0), obs=y[rows])  # type: ignore[index]


SLOPE = {"slope": torch.randn(4), "scale": torch.ones(4)}
BAD: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], str]] = {
    "no posterior": (3, (DATA[0],), {}, "posterior is int; give a finished run, a guide"),
    "no model": (SLOPE, (DATA[0],), {}, "does not know its model: give model="),
    "no draws": ({}, (DATA[0],), {"model": regression}, "holds no draws"),
    "empty": ({"slope": torch.zeros(0)}, (DATA[0],), {"model": regression}, "its sites are empty"),
    "unequal": (
        {"slope": torch.zeros(3), "scale": torch.ones(2)}, (DATA[0],), {"model": regression}, "different numbers",
    ),
    "not finite": (
        {"slope": torch.tensor([0.0, math.nan]), "scale": torch.ones(2)}, (DATA[0],), {"model": regression},
        "1 of 2 draws of site 'slope' are not finite",
    ),
    "members differ": (
        [{"slope": torch.zeros(())}, {"scale": torch.ones(())}], (DATA[0],), {"model": regression}, "different sites",
    ),
    "lacks a latent": (
        {"slope": torch.zeros(3)}, (DATA[0],), {"model": regression}, r"lack the latent sites \['scale'\]",
    ),
    "no arguments": (SLOPE, (), {"model": regression}, "give the model's arguments"),
    "targets required": (SLOPE, (DATA[0],), {"model": without_default}, r"missing a required argument: 'y'.*y=None"),
    "targets indexed": (SLOPE, (DATA[0],), {"model": needs_targets}, r"could not be run.*obs=None if y is None"),
    "unknown site": (SLOPE, (DATA[0],), {"model": regression, "sites": ["z"]}, r"no site \['z'\].*\['y'\]"),
    "levels": (SLOPE, (DATA[0],), {"model": regression, "quantiles": (0.0, 1.0)}, "levels between 0 and 1"),
    "average": (SLOPE, (DATA[0],), {"model": regression, "average": "odds"}, "'probabilities'"),
    "memory": (SLOPE, (DATA[0],), {"model": regression, "memory": 0}, "give the bytes"),
    "num_samples": (SLOPE, (DATA[0],), {"model": regression, "num_samples": 0}, "num_samples is 0"),
    "nothing to predict": (
        {**SLOPE, "y": torch.zeros(4, 10)}, (DATA[0],), {"model": regression}, "no site to predict",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    posterior, args, settings, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        bnn.predict(posterior, *args, **settings)


def test_a_run_that_kept_some_sites_cannot_predict() -> None:
    mcmc = MCMC(SGLD(regression, step_size=0.01), num_samples=5, disable_progbar=True, save_params=["slope"])
    with pytest.raises(RuntimeError, match="there are no draws yet"):
        bnn.predict(mcmc, DATA[0])
    mcmc.run(*DATA)
    with pytest.raises(ValueError, match=r"lack the latent sites \['scale'\].*save_params=None"):
        bnn.predict(mcmc, DATA[0])


def test_classes_are_only_for_sites_that_have_them(run: MCMC) -> None:
    with pytest.raises(ValueError, match="'y' has no classes"):
        _ = bnn.predict(run, DATA[0]).labels
