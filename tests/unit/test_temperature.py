"""The temperature that a run asked for, beside the one that it had."""

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from bnn import to_arviz
from bnn.kernels import AMAGOLD, MCMC, SGHMC
from bnn.temperature import (
    describe_temperatures,
    effective_draws,
    kinetic_region,
    measure,
    verdict,
    worst_site,
    wrong_temperature,
)
from support import targets
from support.cases import KERNELS
from support.checks import ALPHA


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(("dim", "draws"), [(1, 4), (10, 30), (1000, 5)])
def test_kinetic_region_has_its_level(dim, draws, temperature):
    """Of 20,000 runs of independent momenta N(0, T), one percent lies outside the 99 % region."""
    generator = np.random.default_rng(1)
    means = temperature * generator.chisquare(dim * draws, 20_000) / (dim * draws)
    low, high = kinetic_region(temperature, dim, draws)
    for outside in ((means < low).sum(), (means > high).sum()):
        assert stats.binomtest(int(outside), 20_000, 0.005).pvalue > ALPHA


def test_kinetic_region_scales():
    low, high = kinetic_region(1.0, 50, 4)
    assert kinetic_region(0.3, 50, 4) == pytest.approx((0.3 * low, 0.3 * high))
    assert kinetic_region(1.0, 10, 20) == pytest.approx((low, high))
    wide = kinetic_region(1.0, 50, 4, level=0.9999)
    assert wide[0] < low < 1 < high < wide[1]
    assert kinetic_region(0.0, 50, 4) == (0.0, 0.0)


def test_false_alarms_of_a_run():
    """400 runs of an exactly sampled Gaussian, each with its own effective number of draws: near 1 % outside.

    The number of alarms is compared with the 1 % of the region and the estimator's own error in it: at most 5 %.
    """
    generator = np.random.default_rng(2)
    alarms = {"kinetic_temperature": 0, "configurational_temperature": 0}
    for _ in range(400):
        chains = np.zeros((2, 150, 20))
        chains[:, 0] = generator.standard_normal((2, 20))
        for step in range(1, 150):  # momenta that forget at a rate of 0.3 a draw
            chains[:, step] = 0.7 * chains[:, step - 1] + np.sqrt(1 - 0.49) * generator.standard_normal((2, 20))
        temperature = np.mean(chains**2, -1)
        for name in alarms:
            m = measure({name: temperature, "temperature": np.ones((2, 150))}, name, dim=20)
            alarms[name] += not m.low <= m.mean <= m.high
    assert all(count <= 20 for count in alarms.values()), alarms


def test_effective_draws():
    generator = np.random.default_rng(3)
    independent = generator.standard_normal((4, 500))
    assert effective_draws(independent) == pytest.approx(2000, rel=0.25)
    slow = np.repeat(independent[:, :50], 10, axis=1)
    assert effective_draws(slow) < 500
    assert effective_draws(np.ones((3, 10))) == 3.0
    assert effective_draws(independent[:, :2]) == 4.0


def test_chains_that_diverged_do_not_count():
    values = np.array([[1.0, 1.1, 0.9, 1.0], [2.0, 1e30, 1e30, 1e30]])
    diverging = np.array([[False] * 4, [False, True, True, True]])
    given = {"kinetic_temperature": values, "temperature": np.ones((2, 4)), "diverging": diverging}
    assert measure(given, "kinetic_temperature", dim=10).mean == pytest.approx(1.0)
    assert measure({**given, "diverging": np.ones_like(diverging)}, "kinetic_temperature", dim=10).mean > 1e29


@pytest.mark.parametrize("temperature", [1.0, 0.2])
def test_measured_temperatures_of_a_run(temperature):
    """A Gaussian of 200 coordinates: both temperatures in their region (99 %, one seed), neither at another's."""
    pyro.set_rng_seed(1)
    kernel = SGHMC(
        targets.gaussian, step_size=0.2, friction=2.0, temperature=temperature, steps_per_sample=5, compile="fx"
    )
    mcmc = MCMC(kernel, 100, 40, num_chains=4, disable_progbar=True)
    mcmc.run(torch.ones(200, dtype=torch.float64))
    given = {name: value.numpy() for name, value in mcmc.sample_stats.items()}
    for name in ("kinetic_temperature", "configurational_temperature"):
        m = measure(given, name, dim=200)
        assert m.low < m.mean < m.high
        assert m.mean == pytest.approx(temperature, rel=0.05)
        assert (m.high - m.low) < 0.1 * temperature
        wrong = measure({**given, "temperature": 1.2 * given["temperature"]}, name, dim=200)
        assert not wrong.low < wrong.mean < wrong.high


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_every_run_tells_both_temperatures(case, capsys):
    mcmc = MCMC(case.build(targets.regression), 8, 2, num_chains=2, disable_progbar=True)
    mcmc.run(*targets.regression_data())
    asked = mcmc.sample_stats["temperature"][0, 0].item()
    mcmc.summary()
    text = capsys.readouterr().out
    assert f"Temperature: asked {asked:.4g}" in text
    assert ("configurational" in text) == case.kernel.evaluates_at_draws
    assert ("kinetic" in text) == case.has_momentum
    diagnostics = mcmc.diagnostics()
    assert diagnostics["temperature asked"] == {"chain 0": asked, "chain 1": asked}
    name = "configurational_temperature" if case.kernel.evaluates_at_draws else "kinetic_temperature"
    means = mcmc.sample_stats[name].double().mean(1).tolist()
    assert list(diagnostics[name.replace("_", " ")].values()) == pytest.approx(means)


def test_description():
    given = {"temperature": np.full((2, 10), 0.5), "kinetic_temperature": np.full((2, 10), 0.4)}
    text = describe_temperatures(given, dim=1000)
    low, high = kinetic_region(0.5, 1000, 2)  # statistics that never change count as one draw a chain
    assert text.startswith("Temperature: asked 0.5; kinetic 0.4 +- ")
    assert f"(99 % region [{low:.4g}, {high:.4g}])" in text
    assert "configurational" not in text


def temperatures(kinetic: float, configurational: float, **extra: float) -> dict[str, np.ndarray]:
    """Statistics of 4 chains of 400 independent draws of 50 coordinates about the given means."""
    random = np.random.default_rng(0)
    means = {"kinetic_temperature": kinetic, "configurational_temperature": configurational}
    drawn = {name: mean * random.chisquare(50, (4, 400)) / 50 for name, mean in means.items()}
    return {"temperature": np.ones((4, 400)), **drawn, **{name: np.full((4, 400), v) for name, v in extra.items()}}


def per_site(momenta: list[float], positions: list[float], size: int = 50) -> dict[str, np.ndarray]:
    """As :func:`temperatures`, of sites of ``size`` coordinates each, and of all of them."""
    random = np.random.default_rng(1)
    result = {"temperature": np.ones((4, 400))}
    for kind, means in {"kinetic_temperature": momenta, "configurational_temperature": positions}.items():
        result[f"site_{kind}"] = np.array(means) * random.chisquare(size, (4, 400, len(means))) / size
        result[kind] = result[f"site_{kind}"].mean(-1)
    return result


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (per_site([1.0, 1.0, 1.0], [1.0, 1.0, 1.0]), None),
        (per_site([1.0, 1.04, 0.96], [1.0, 1.0, 1.0]), None),  # within the tolerance
        (per_site([0.65, 1.4, 1.0], [1.0, 1.0, 1.0]), "site 'b' at 1.397"),  # as asked in the mean
        (per_site([1.0, 1.0, 1.0], [1.2, 1.0, 0.6]), "site 'c' at 0.599"),
        (per_site([1.0, 1.0, 1.5], [1.0, 1.0, 1.2]), "site 'c' at 1.487"),
    ],
)
def test_verdict_names_the_worst_site(given, said):
    sites = dict.fromkeys("abc", 50)
    text = verdict(given, dim=150, sites=sites)
    if said is None:
        assert text.endswith("as asked.") and worst_site(given, sites) is None
    else:
        assert said in text and ("(momenta): " in text or "(positions): " in text)
    cold = {**given, "temperature": np.zeros((4, 400))}
    assert worst_site(cold, sites) is None


def test_false_alarms_of_sites():
    """300 runs of 20 sites of four coordinates: all of them inside in 99 % of the runs, by Bonferroni.

    An alarm a run for each site by itself would come in 18 % of them; the estimate of the effective number of draws
    may add some to the 1 %: at most 4 %.
    """
    generator, alarms = np.random.default_rng(4), 0
    sites = {str(number): 4 for number in range(20)}
    for _ in range(300):
        values = generator.chisquare(4, (2, 100, 20)) / 4
        given = {"temperature": np.ones((2, 100)), "site_kinetic_temperature": values}
        alarms += worst_site(given, sites, tolerance=0.0) is not None
    assert alarms <= 12


def three_sites():
    for name, size in {"a": 3, "b": 1, "c": 6}.items():
        pyro.sample(name, dist.StudentT(5.0, torch.zeros(size, dtype=torch.float64), 1.0).to_event(1))


SIZES = {"a": 3, "b": 1, "c": 6}


@pytest.mark.parametrize("matrix", [50_000, 0], ids=["one product", "slices"])
@pytest.mark.parametrize("mass", [2.0, {"a": 2.0, "b": 0.5}], ids=["one mass", "masses"])
def test_temperatures_per_site_are_those_of_the_state(monkeypatch, mass, matrix):
    """Recomputed from the momenta and, by autograd, from the gradient where the step ended; and they add up."""
    monkeypatch.setattr("bnn.kernels._draw_statistics.LARGEST_MATRIX", matrix)
    seen = []

    def hook(kernel, params, stage, i):
        seen.append((kernel._running.state.momentum.clone(), {n: v.clone() for n, v in params.items()}))

    kernel = SGHMC(three_sites, step_size=0.2, friction=1.0, mass=mass, integrator="baoab", compile="fx")
    mcmc = MCMC(kernel, 4, 0, num_chains=3, hook_fn=hook, disable_progbar=True)
    mcmc.run()
    stats = mcmc.sample_stats
    masses = mass if isinstance(mass, dict) else dict.fromkeys(SIZES, mass)
    start = 0
    for number, (name, size) in enumerate(SIZES.items()):
        for draw, (momentum, params) in enumerate(seen):
            own = momentum[:, start : start + size].square().mean(-1) / masses.get(name, 1.0)
            torch.testing.assert_close(stats["site_kinetic_temperature"][:, draw, number], own)
            z = params[name].requires_grad_()
            energy = -dist.StudentT(5.0, torch.zeros(size, dtype=torch.float64), 1.0).log_prob(z).sum()
            virial = (z * torch.autograd.grad(energy, z)[0]).mean(-1).detach()
            torch.testing.assert_close(stats["site_configurational_temperature"][:, draw, number], virial)
        start += size
    weights = torch.tensor(list(SIZES.values()), dtype=torch.float64) / start
    for kind in ("kinetic_temperature", "configurational_temperature"):
        torch.testing.assert_close((stats[f"site_{kind}"] * weights).sum(-1), stats[kind])
    momenta = torch.stack([momentum for momentum, _ in seen], 1)
    torch.testing.assert_close(stats["momentum_squared_norm"], momenta.square().sum(-1))


def test_sites_of_a_kernel_that_refuses():
    """AMAGOLD's draw is not where its last step ended: its statistics are those of the state that was kept."""
    seen = []
    kernel = AMAGOLD(three_sites, step_size=0.9, friction=0.5, num_steps=2, mass={"a": 2.0}, compile="fx")
    mcmc = MCMC(
        kernel, 12, 0, num_chains=3, disable_progbar=True,
        hook_fn=lambda kernel, params, stage, i: seen.append(kernel._running.state.momentum.clone()),
    )  # fmt: skip
    mcmc.run()
    assert (mcmc.sample_stats["acceptance_rate"] < 1).any()
    own = torch.stack([momentum[:, :3].square().mean(-1) / 2.0 for momentum in seen], 1)
    torch.testing.assert_close(mcmc.sample_stats["site_kinetic_temperature"][..., 0], own)
    assert "site_configurational_temperature" not in mcmc.sample_stats


@pytest.mark.parametrize(("count", "known"), [(1, True), (3, True), (4, False)])
def test_models_of_one_and_of_many_sites(monkeypatch, count, known):
    monkeypatch.setattr("bnn.kernels._draw_statistics.MOST_SITES", 3)

    def model():
        for number in range(count):
            pyro.sample(f"z{number}", dist.Normal(0.0, 1.0))

    mcmc = MCMC(SGHMC(model, step_size=0.2, friction=1.0, compile="fx"), 5, 0, disable_progbar=True)
    mcmc.run()
    stats = mcmc.sample_stats
    assert ("site_kinetic_temperature" in stats) == known
    if known:
        torch.testing.assert_close(stats["site_kinetic_temperature"].mean(-1), stats["kinetic_temperature"])
    assert mcmc.temperature_verdict().startswith("asked T = 1")


@pytest.mark.parametrize("taken", [False, True])
def test_sites_in_arviz(taken):
    mcmc = MCMC(SGHMC(three_sites, step_size=0.2, friction=1.0, compile="fx"), 8, 0, num_chains=2, disable_progbar=True)
    mcmc.run()
    data = to_arviz(mcmc, dims={"a": ["site"]}, coords={"site": [7, 8, 9]}) if taken else to_arviz(mcmc)
    found = data["sample_stats"]["site_kinetic_temperature"]
    assert found.dims == ("chain", "draw", "latent_site" if taken else "site")
    assert found[found.dims[2]].values.tolist() == ["a", "b", "c"]
    np.testing.assert_array_equal(found, mcmc.sample_stats["site_kinetic_temperature"])
    if taken:
        assert data["posterior"]["a"].coords["site"].values.tolist() == [7, 8, 9]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (temperatures(1.0, 1.0), "as asked."),
        (temperatures(1.0, 1.0, noise_temperature=1.03), "1.03 (minibatch noise): as asked."),
        (temperatures(1.0, 1.0, noise_temperature=0.3), "only the noise of the minibatches heats the chains"),
        (temperatures(1.03, 0.97), "as asked."),
        (temperatures(1.3, 1.3), "noise of the minibatch gradients heats the chains"),
        (temperatures(0.7, 0.9), "the momenta have not settled"),
        (temperatures(0.7, 1.0), "or the step is long for baoab, whose momenta are then too cold and positions right"),
        (temperatures(1.3, 1.0), "or a long step of symplectic_euler the momenta alone"),
        (temperatures(1.0, 1.4), "step_size is too large for the steepest directions"),
        (temperatures(1.0, 0.6), "have not spread yet"),
        (temperatures(0.19, 0.06, implied_temperature=0.076), "momentum_scale draws momenta at another temperature"),
    ],
)
def test_verdict_names_the_cause(given, said):
    text = verdict(given, dim=50)
    assert text.startswith("asked T = 1, ") and said in text
    assert ("measured" in text) and ("but" in text) == (not said.endswith("as asked."))


def one_mean(y):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0).expand([20]).to_event(1))
    with pyro.plate("data", len(y), subsample_size=1) as rows:
        pyro.sample("y", dist.Normal(mean, 1.0).to_event(1), obs=y[rows])


@pytest.mark.parametrize(("step_size", "friction", "heated"), [(0.01, 5.0, True), (0.001, 50.0, False)])
def test_a_run_at_another_temperature_warns(step_size, friction, heated):
    """One row of a hundred heats the momenta by hV/(2C), V = 100²: to eleven, and by a tenth."""
    y = torch.randn(100, 20, generator=torch.Generator().manual_seed(1))
    kernel = SGHMC(one_mean, step_size=step_size, friction=friction, steps_per_sample=50, compile="fx")
    mcmc = MCMC(kernel, 100, 100, num_chains=4, disable_progbar=True)
    if heated:
        with pytest.warns(RuntimeWarning, match=r"kinetic temperature 1\d.*, not at the 1 asked for; minibatch noise"):
            mcmc.run(y)
    else:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mcmc.run(y)


def test_wrong_temperature_is_more_than_chance():
    """Off by a half in one draw of three coordinates is chance, in a thousand draws it is not."""
    generator = np.random.default_rng(2)
    values = 0.5 * generator.chisquare(3, size=(4, 1000)) / 3
    asked = np.ones_like(values)
    given = {"kinetic_temperature": values, "temperature": asked}
    assert "have not settled" in wrong_temperature(given, dim=3)
    assert wrong_temperature({n: v[:1, :1] for n, v in given.items()}, dim=3) is None
    assert wrong_temperature({**given, "temperature": 0.5 * asked}, dim=3) is None
    assert wrong_temperature({**given, "temperature": 0.0 * asked}, dim=3) is None
    assert wrong_temperature({"temperature": asked}, dim=3) is None
