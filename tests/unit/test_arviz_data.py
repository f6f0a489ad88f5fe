"""``to_arviz`` on real runs: what it reads of the runners and kernels, and what ArviZ makes of it."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS, Predictive, config_enumerate
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from bnn import pointwise, to_arviz
from bnn.kernels import MCMC, SGHMC, SGLD, CosineCycles, PolynomialDecay
from support.models import conv_net, data, pyro_module_mlp


def line(x: Tensor, y: Tensor, batch_size: int | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ weight, sigma), obs=y[rows])


def ran(kernel: Any, *args: Any, chains: int = 2, draws: int = 20, runner: Any = MCMC, **kwargs: Any) -> Any:
    mcmc = runner(kernel, num_samples=draws, warmup_steps=5, num_chains=chains, disable_progbar=True, **kwargs)
    mcmc.run(*args)
    return mcmc


def given(model: Any, draws: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
    """A run that drew ``draws``, ``(chains, draws, *shape)``."""
    kernel = SimpleNamespace(model=model, batches=None, temperature=1.0)
    return SimpleNamespace(get_samples=lambda group_by_chain: draws, kernel=kernel, _args=args, _kwargs=kwargs)


def log_likelihood_of_line(posterior: Any, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    mean = np.einsum("cdi,ni->cdn", posterior.weight.values, x)
    sigma = posterior.sigma.values[..., None]
    return -0.5 * ((y - mean) / sigma) ** 2 - np.log(sigma) - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("batch_size", [None, 5], ids=["full", "minibatch"])
def test_every_group_of_a_run(batch_size: int | None) -> None:
    x, y = data()
    mcmc = ran(SGHMC(line, step_size=0.02, friction=1.0, temperature=0.5), x, y, batch_size)
    result = to_arviz(
        mcmc, posterior_predictive=True, dims={"obs": ["row"], "weight": ["feature"], "x": ["row", "feature"]}
    )
    assert set(result.groups()) == {
        "posterior", "sample_stats", "observed_data", "constant_data", "log_likelihood", "posterior_predictive",
    }  # fmt: skip
    np.testing.assert_array_equal(result.posterior.weight, mcmc.get_samples(group_by_chain=True)["weight"])
    assert (result.posterior.sigma > 0).all()
    assert result.posterior.weight.dims == ("chain", "draw", "feature")
    assert set(result.sample_stats) == {"lp", *mcmc.sample_stats}
    assert {"energy", "kinetic_temperature", "configurational_temperature", "step_size", "diverging"} <= set(
        result.sample_stats
    )
    np.testing.assert_array_equal(result.sample_stats.lp, -mcmc.sample_stats["energy"].numpy())
    assert result.sample_stats.diverging.dtype == bool
    np.testing.assert_array_equal(result.observed_data.obs, y)
    assert set(result.constant_data) == {"x"}
    np.testing.assert_array_equal(result.constant_data.x, x)
    assert result.log_likelihood.obs.dims == result.posterior_predictive.obs.dims == ("chain", "draw", "row")
    expected = log_likelihood_of_line(result.posterior, x.numpy(), y.numpy())
    np.testing.assert_allclose(result.log_likelihood.obs, expected, rtol=1e-4, atol=1e-4)
    attrs = result.posterior.attrs
    assert (attrs["inference_library"], attrs["kernel"], attrs["temperature"]) == ("pyro-bnn", "SGHMC", 0.5)
    assert attrs["inference_library_version"] and attrs["tuning_steps"] == 5


@pytest.mark.parametrize("chain_method", ["vectorized", pytest.param("sequential", marks=pytest.mark.slow)])
def test_net_runs_through_arviz(chain_method: str, tmp_path: Any) -> None:
    model, args, _ = pyro_module_mlp()
    mcmc = ran(SGLD(model, step_size=1e-3), *args, chains=3, draws=40, chain_method=chain_method)
    result = to_arviz(mcmc, posterior_predictive=True)
    assert result.log_likelihood.obs.shape == (3, 40, 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # twelve rows and short chains: ArviZ doubts the estimates
        assert np.isfinite(az.loo(result).elpd_loo) and np.isfinite(az.waic(result).elpd_waic)
        assert az.loo(result, pointwise=True).loo_i.shape == (12,)
        assert len(az.summary(result, var_names=["sigma"])) == 1
        assert az.bfmi(result).shape == (3,)
        assert (
            len(az.r2_score(result.observed_data.obs.values, result.posterior_predictive.obs.values.reshape(120, 12)))
            == 2
        )
        assert set(az.compare({"a": result, "b": result}).index) == {"a", "b"}
    result.to_netcdf(str(tmp_path / "run.nc"))
    back = az.from_netcdf(str(tmp_path / "run.nc"))
    assert back.groups() == result.groups()
    for group in result.groups():
        for name in result[group]:
            np.testing.assert_array_equal(back[group][name], result[group][name])
    assert back.posterior.attrs["kernel"] == "SGLD"


def test_leave_one_out_is_the_exact_one_of_a_conjugate_model() -> None:
    generator = torch.Generator().manual_seed(3)
    y = 1 + torch.randn(30, generator=generator, dtype=torch.float64)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("data", len(y), subsample_size=7) as rows:
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y[rows])

    def law(values: Tensor) -> tuple[Tensor, float]:
        variance = 1 / (1 / 4 + len(values))
        return values.sum() * variance, variance

    center, variance = law(y)
    draws = center + math.sqrt(variance) * torch.randn(4, 5_000, generator=generator, dtype=torch.float64)
    exact = 0.0
    for i in range(30):
        rest, width = law(torch.cat([y[:i], y[i + 1 :]]))
        exact += dist.Normal(rest, math.sqrt(1 + width)).log_prob(y[i]).item()
    result = to_arviz(given(model, {"mean": draws}, y))
    assert az.loo(result).elpd_loo == pytest.approx(exact, abs=0.02)  # elpd of all draws' mean: 1 nat above
    assert az.waic(result).elpd_waic == pytest.approx(exact, abs=0.05)


def test_classification_log_likelihood() -> None:
    def model(x: Tensor, labels: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 4), 1.0).to_event(2))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("label", dist.Categorical(logits=x[rows] @ weight), obs=labels[rows])

    x, labels = data()[0], torch.arange(12) % 4
    weight = torch.randn(2, 6, 3, 4)
    result = to_arviz(given(model, {"weight": weight}, x, labels), posterior_predictive=True)
    expected = (x @ weight).log_softmax(-1).gather(-1, labels.expand(2, 6, 12)[..., None])[..., 0]
    np.testing.assert_allclose(result.log_likelihood.label, expected, rtol=1e-5, atol=1e-6)
    assert result.observed_data.label.dtype == result.posterior_predictive.label.dtype == np.int64
    assert set(np.unique(result.posterior_predictive.label)) == {0, 1, 2, 3}


def test_convolutional_net() -> None:
    model, args, _ = conv_net()
    result = to_arviz(ran(SGLD(model, step_size=1e-4), *args, draws=3))
    assert result.log_likelihood.obs.shape == (2, 3, 6)
    assert result.constant_data.images.shape == (6, 1, 14, 14)


@pytest.mark.parametrize("own_batches", [True, False], ids=["the run's", "given"])
def test_batches_of_a_shuffled_loader(own_batches: bool) -> None:
    x, y = data(14)
    loader = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)

    class Net(PyroModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = PyroModule[nn.Linear](3, 1)
            self.layer.weight = PyroSample(dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
            self.layer.bias = PyroSample(dist.Normal(torch.zeros(1), 1.0).to_event(1))

        def forward(self, x: Tensor, y: Tensor) -> None:
            mean = self.layer(x).squeeze(-1)
            with pyro.plate("data", 14, subsample_size=len(x)):
                pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)

    if own_batches:
        result = to_arviz(ran(SGLD(Net(), step_size=1e-3, batches=loader)))
    else:
        result = to_arviz(ran(SGLD(Net(), step_size=1e-3), x, y), batches=loader)
    inputs, observed = result.constant_data.x.values, result.observed_data.obs.values
    assert sorted(observed) == sorted(y.tolist())
    weight, bias = result.posterior["layer.weight"].values, result.posterior["layer.bias"].values
    mean = np.einsum("cdi,ni->cdn", weight[:, :, 0], inputs) + bias
    expected = -0.5 * ((observed - mean) / 0.5) ** 2 - math.log(0.5) - 0.5 * math.log(2 * math.pi)
    np.testing.assert_allclose(result.log_likelihood.obs, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("runner", [MCMC, PyroMCMC])
def test_nuts(runner: Any) -> None:
    x, y = data()
    mcmc = ran(NUTS(line), x, y, chains=1, draws=30, runner=runner)
    result = to_arviz(mcmc)
    assert set(result.sample_stats) == {"diverging"}
    expected = log_likelihood_of_line(result.posterior, x.numpy(), y.numpy())
    np.testing.assert_allclose(result.log_likelihood.obs, expected, rtol=1e-4, atol=1e-4)
    attrs = result.posterior.attrs
    assert (attrs["inference_library"], attrs["kernel"]) == ("pyro", "NUTS") and "temperature" not in attrs


def test_stochastic_gradient_kernel_under_the_runner_of_pyro() -> None:
    result = to_arviz(ran(SGLD(line, step_size=1e-4), *data(), 5, runner=PyroMCMC))
    assert result.posterior.weight.shape == (2, 20, 3)
    assert set(result.sample_stats) == {"diverging"}
    assert result.log_likelihood.obs.shape == (2, 20, 12)


def test_divergence_in_the_third_of_twelve_chains() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("wall", -z.square().exp())

    starts = {"z": torch.zeros(12)}
    starts["z"][2] = 9.0  # where the wall is so steep that one step leaves the finite numbers
    with pytest.warns(RuntimeWarning, match="chain 2 left the finite numbers"):
        mcmc = ran(SGLD(model, step_size=1e-3), chains=12, initial_params=starts)
    diverging = to_arviz(mcmc).sample_stats.diverging
    assert diverging.any("draw").values.tolist() == [chain == 2 for chain in range(12)]


def test_chains_of_the_runner_of_pyro_beyond_ten() -> None:
    mcmc = ran(NUTS(lambda: pyro.sample("z", dist.Normal(0.0, 1.0))), chains=1, draws=12, runner=PyroMCMC)
    mcmc._samples = {"z": mcmc._samples["z"].expand(12, 12)}
    mcmc._diagnostics = [{"divergences": [chain] if chain in (2, 10) else []} for chain in range(12)]
    result = to_arviz(mcmc)
    np.testing.assert_array_equal(np.argwhere(result.sample_stats.diverging.values), [[2, 2], [10, 10]])
    assert set(result.groups()) == {"posterior", "sample_stats"}  # nothing is observed


def test_predictive_of_pyro_is_accepted() -> None:
    x, y = data()
    mcmc = ran(SGLD(line, step_size=0.01), x, y)
    predictive = Predictive(line_without_data, mcmc.get_samples())(x[:4])
    prior = Predictive(line_without_data, num_samples=7)(x)
    result = to_arviz(mcmc, predictions={"obs": predictive["obs"]}, prior=prior, pred_dims={"obs": ["new"]})
    assert dict(result.predictions.obs.sizes) == {"chain": 2, "draw": 20, "new": 4}
    np.testing.assert_array_equal(result.predictions.obs[1, 3], predictive["obs"][23])
    assert result.prior_predictive.obs.shape == (1, 7, 12)
    assert result.prior.weight.shape[:2] == (1, 7)


def line_without_data(x: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight, sigma))


def test_sites_that_pyro_stored_in_a_higher_precision() -> None:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, sigma), obs=y)

    draws = {"weight": torch.zeros(1, 4, 3).double(), "sigma": torch.ones(1, 4).double()}
    assert to_arviz(given(model, draws, *data())).log_likelihood.obs.shape == (1, 4, 12)


def test_thin() -> None:
    mcmc = ran(SGLD(line, step_size=0.01), *data())
    thinned, whole = to_arviz(mcmc, thin=3), to_arviz(mcmc)
    for group in ("posterior", "sample_stats", "log_likelihood"):
        for name, values in whole[group].items():
            np.testing.assert_array_equal(thinned[group][name], values[:, ::3])
    assert thinned.posterior.attrs["thin"] == 3


@pytest.mark.parametrize("group", ["observed_data", "constant_data", "log_likelihood", "posterior_predictive"])
def test_groups_can_be_left_out_and_given(group: str) -> None:
    run = given(line, {"weight": torch.randn(2, 3, 3), "sigma": torch.rand(2, 3) + 0.5}, *data())
    assert group not in to_arviz(run, **{group: False}).groups()
    shape = (5,) if group.endswith("data") else (2, 3, 5)
    values = np.arange(math.prod(shape)).reshape(shape)
    result = to_arviz(run, **{group: {"mine": values}})
    assert set(result[group]) == {"mine"}
    np.testing.assert_array_equal(result[group].mine, values)


def test_a_large_group_is_left_out_with_a_warning_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "LARGEST_GROUP", 50)
    run = given(line, {"weight": torch.randn(2, 3, 3), "sigma": torch.rand(2, 3) + 0.5}, *data(), 5)
    with pytest.warns(RuntimeWarning) as record:
        result = to_arviz(run)
    assert [str(w.message) for w in record] == [
        "log_likelihood is left out: it would hold 7.2e+01 numbers. "
        "Have it made by log_likelihood=True, of fewer draws by thin=."
    ]
    assert record[0].filename == __file__
    assert set(result.groups()) == {"posterior", "observed_data", "constant_data"}
    assert to_arviz(run, log_likelihood=True).log_likelihood.obs.shape == (2, 3, 12)
    assert to_arviz(run, thin=2).log_likelihood.obs.shape == (2, 2, 12)


def test_size_is_counted_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pointwise, "LARGEST_GROUP", 80)

    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 12, subsample_size=len(y)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    run = given(model, {"mean": torch.zeros(1, 10)})
    with pytest.warns(RuntimeWarning, match="log_likelihood is left out: it would hold 1.2e"):
        to_arviz(run, batches=data()[1].split(4))


def test_draws_without_all_latent_sites_have_no_log_likelihood() -> None:
    mcmc = ran(SGLD(line, step_size=0.01), *data(), save_params=["weight"])
    with pytest.warns(RuntimeWarning, match=r"log_likelihood is left out: the draws lack the latent sites \['sigma'\]"):
        result = to_arviz(mcmc)
    assert set(result.groups()) == {"posterior", "sample_stats", "observed_data", "constant_data"}
    with pytest.raises(ValueError, match=r"log_likelihood needs all latent sites.*\['sigma'\]"):
        to_arviz(mcmc, log_likelihood=True)


def test_enumerated_sites_have_no_log_likelihood() -> None:
    @config_enumerate
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 3.0).to_event(1))
        with pyro.plate("data", len(y)):
            which = pyro.sample("which", dist.Bernoulli(0.5))
            pyro.sample("obs", dist.Normal(loc[which.long()], 1.0), obs=y)

    mcmc = ran(NUTS(model, max_plate_nesting=1), data()[1], chains=1, draws=4)
    with pytest.warns(RuntimeWarning, match=r"lack the latent sites \['which'\]"):
        result = to_arviz(mcmc)
    np.testing.assert_array_equal(result.observed_data.obs, data()[1])


def test_a_model_that_fails_when_run_again_costs_its_groups_only() -> None:
    def model() -> None:
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise OSError("the file is gone")

    run = given(model, {"z": torch.zeros(1, 5)})
    with pytest.warns(RuntimeWarning, match="log_likelihood.* left out.*OSError: the file is gone"):
        assert to_arviz(run).groups() == ["posterior"]
    with pytest.raises(OSError, match="the file is gone"):
        to_arviz(run, log_likelihood=True)


def test_a_model_that_cannot_be_recorded_warns_once_in_all() -> None:
    def model(y: Tensor) -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean if mean > 0 else 2 * mean, 1.0), obs=y)

    with pytest.warns(RuntimeWarning, match="recorded"):
        mcmc = ran(SGLD(model, step_size=0.01), data()[1])
    assert to_arviz(mcmc).log_likelihood.obs.shape == (2, 20, 12)  # any warning is an error here


def test_arguments_are_named_by_the_parameters_of_the_model() -> None:
    def model(x: Tensor, *more: Tensor, scale: float, **others: Tensor) -> None:
        z = pyro.sample("z", dist.Normal(0.0, scale))
        with pyro.plate("data", 3):
            pyro.sample("obs", dist.Normal(z, 1.0), obs=others["y"])

    y = torch.arange(3.0)
    run = given(model, {"z": torch.zeros(1, 5)}, torch.ones(2), y + 1, y + 2, scale=1.0, y=y, w=torch.tensor(4.0))
    constant = to_arviz(run).constant_data
    assert {name: values.values.ravel().tolist() for name, values in constant.items()} == {
        "x": [1, 1], "more_0": [1, 2, 3], "more_1": [2, 3, 4], "w": [4],
    }  # fmt: skip


def test_temperature_schedules_and_half_precision_can_be_stored(tmp_path: Any) -> None:
    mcmc = ran(SGLD(line, step_size=CosineCycles(0.01, 10), temperature=PolynomialDecay(1.0)), *data())
    mcmc._samples = {name: value.bfloat16() for name, value in mcmc._samples.items()}
    result = to_arviz(mcmc, log_likelihood=False)
    assert result.posterior.weight.dtype == np.float32
    assert result.posterior.attrs["temperature"] == str(PolynomialDecay(1.0))
    result.to_netcdf(str(tmp_path / "run.nc"))
    back = az.from_netcdf(str(tmp_path / "run.nc"))
    np.testing.assert_array_equal(back.sample_stats.temperature, mcmc.sample_stats["temperature"])
