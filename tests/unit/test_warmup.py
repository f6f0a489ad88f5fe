"""What corrected kernels learn in warm-up, and that it leaves their law alone."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import init_to_uniform, init_to_value
from scipy import stats

from bnn.kernels import AMAGOLD, GGMC, MCMC, SGHMC
from bnn.kernels._warmup import window_ends
from support import targets
from support.checks import ALPHA, assert_variance

N = 100_000
SCALES = torch.logspace(-2, 2, 20, dtype=torch.float64)


def scaled(scales: torch.Tensor) -> None:
    """Independent Normals whose scales differ by four orders of magnitude."""
    pyro.sample("z", dist.Normal(torch.zeros_like(scales), scales).to_event(1))


def student(like: torch.Tensor) -> None:
    pyro.sample("z", dist.StudentT(torch.tensor(5.0, dtype=like.dtype), 0.0, 1.0))


@pytest.mark.parametrize("target", [0.6, 0.9])
@pytest.mark.parametrize("kernel", [GGMC, pytest.param(AMAGOLD, marks=pytest.mark.slow)])
def test_step_size_for_an_acceptance_and_the_exact_law(kernel, target):
    """From exact draws, through 150 draws of warm-up, to exact draws: adapting to the mean of all chains is exact."""
    one = kernel(student, friction=1.0, num_steps=3, target_acceptance=target, compile="fx")
    one.num_chains, one.initial_params = N, {"z": torch.tensor(stats.t(5).rvs(N, random_state=3))}
    with targets.starts_unchecked():
        one.setup(150, torch.ones(1, dtype=torch.float64))
        for _ in range(150):
            one.advance()
        step = one.step_size_at(0)
        found = []
        for _ in range(5):
            one.advance()
            found.append(float(one._running.state.acceptance.mean()))
    assert np.mean(found) == pytest.approx(target, abs=0.03)
    assert one.step_size_at(0) == step, "it changed after warm-up"
    assert stats.kstest(one.position.flatten().numpy(), stats.t(5).cdf).pvalue > ALPHA


@pytest.mark.parametrize(
    "kernel, settings",
    [
        (GGMC, {"friction": None, "num_steps": 3}),
        (GGMC, {"friction": 0.5}),
        (AMAGOLD, {"friction": 0.5, "num_steps": 5}),
    ],
    ids=["hmc", "ggmc", "amagold"],
)
def test_masses_are_inverse_variances(kernel, settings):
    one = kernel(scaled, mass="auto", compile="fx", **settings)
    mcmc = MCMC(one, num_samples=600, warmup_steps=450, num_chains=4, disable_progbar=True)
    mcmc.run(SCALES)
    assert (one._warmup.metric.tensors[0] / SCALES).log().abs().max() < 0.5
    assert float(mcmc.sample_stats["acceptance_rate"].mean()) == pytest.approx(0.8, abs=0.15)
    spread = mcmc.get_samples()["z"].std(0) / SCALES
    assert spread.min() > 0.7 and spread.max() < 1.3
    assert float(mcmc.sample_stats["step_size"][0, 0]) == one.step_size_at(0) != 0.1


def test_momenta_keep_their_law_when_masses_change():
    one = GGMC(scaled, friction=0.0, step_size=1e-4, mass="auto", compile="fx")
    one.num_chains, one.initial_params = 2000, {"z": torch.randn(2000, 20, dtype=torch.float64) * SCALES}
    with targets.starts_unchecked():
        one.setup(20, SCALES)
        for _ in range(20):
            one.advance()
        assert one._running.state.momentum.var(0).sub(1).abs().max() < 0.2
        assert (one.position.var(0).sqrt() / SCALES - 1).abs().max() < 0.1, "the positions moved with the metric"
        assert (one._running.metric.tensors[0] / SCALES - 1).abs().max() < 0.1


@pytest.mark.parametrize("mass", ["auto", "dense"])
def test_nothing_is_learnt_after_warm_up_or_from_another_run(mass):
    one = GGMC(scaled, friction=0.5, mass=mass, compile="fx")
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(1)
        one.num_chains, one.initial_params = 1, None
        one.setup(60, SCALES)
        found = []
        for draw in range(80):
            one.advance()
            if draw >= 59:
                found.append((one.step_size_at(0), *one._running.metric.tensors))
        assert all(step == found[0][0] and metric is found[0][1] for step, metric in found)
        draws.append(one.position)
    assert torch.equal(*draws)


def test_momenta_far_too_hot_are_drawn_afresh():
    """In warm-up, those of the chains that are; in law N(0, T M), while the others keep theirs."""
    one = SGHMC(targets.gaussian, step_size="auto", friction=1.0, mass=2.0, temperature=0.5, compile="fx")
    one.num_chains, one.initial_params = 9000, {"z": torch.zeros(9000, 40, dtype=torch.float64)}
    with targets.starts_unchecked():
        one.setup(20, torch.ones(40, dtype=torch.float64))
    run, hot = one._running, torch.arange(9000) % 3 == 0
    stats = one.advance()
    before = one.fresh_momentum(run.position)
    before[hot] *= 4.0
    run.state = run.state._replace(momentum=before)
    one.adapt(stats)
    after = run.state.momentum
    assert torch.equal(after[~hot], before[~hot]) and not (after[hot] == before[hot]).any()
    assert_variance("momentum", after[hot].numpy().ravel(), 0.5 * 2.0)


def test_far_from_the_posterior_sghmc_keeps_no_momentum():
    """Where gradients are ten times hotter than T, after the first 75 draws and up to the middle of warm-up."""
    curvature = torch.ones(5, dtype=torch.float64)
    one = SGHMC(targets.gaussian, step_size="auto", friction=1.0, compile="fx")
    one.num_chains, one.initial_params = 4, {"z": torch.randn(4, 5, dtype=torch.float64)}
    one.setup(400, curvature)
    run, kept = one._running, []
    for draw in range(1, 401):
        one.advance()
        if draw in (100, 250):
            run.place(run.position + 1e3)
        kept.append(float(run.numbers_at(0)[2]) > 0.0)  # exp(−hC/M) of the momentum, 0 where it is drawn afresh
    assert not any(kept[:74]) and all(kept[74:109])  # measured after every tenth draw
    assert not any(kept[109:112]), "on the way down"
    assert any(kept[112:199]), "there"
    assert all(kept[199:]), "from the middle of warm-up on"


@pytest.mark.parametrize(
    "draws, ends", [(10, []), (100, [90]), (150, [100]), (1000, [100, 150, 250, 450, 950]), (200, [100, 150])]
)
def test_windows_double_and_leave_the_end_to_the_step_size(draws, ends):
    assert window_ends(draws) == ends


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"step_size": "fast"}, "step_size is 'fast'"),
        ({"mass": "heavy"}, "mass is 'heavy'; give a number, a dict of numbers per site, a vector, 'auto', 'dense'"),
        ({"target_acceptance": 1.0}, "target_acceptance is 1.0"),
        ({"step_size": "auto"}, r"give warmup_steps, some hundreds \(it is 0; at least 20\)"),
        ({"mass": "auto"}, "give warmup_steps"),
    ],
)
@pytest.mark.parametrize("kernel", [GGMC, AMAGOLD])
def test_bad_settings(kernel, settings, message):
    with pytest.raises(ValueError, match=message):
        one = kernel(scaled, friction=1.0, compile="fx", **{"step_size": 0.1, **settings})
        one.setup(0, SCALES)  # as Pyro does to look at a kernel
        one.advance()


@pytest.mark.slow
def test_chains_in_processes_of_their_own():
    """Where Pyro's runner sets up a kernel that it will not run, without a warm-up."""
    x, y = targets.regression_data()
    kernel = SGHMC(targets.regression, step_size="auto", friction=1.0, mass="auto", compile="fx")
    mcmc = MCMC(kernel, 20, warmup_steps=40, num_chains=2, chain_method="parallel", disable_progbar=True)
    mcmc.run(x, y)
    chosen = mcmc.diagnostics()["warm-up chose"]
    assert set(chosen) == {"chain 0", "chain 1"} and chosen["chain 0"] != chosen["chain 1"]


def steep_regression(x: torch.Tensor, y: torch.Tensor) -> None:
    """Coefficients as correlated as inputs far from zero make them, and a noise that has to be found."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros(2, dtype=x.dtype), 100.0).to_event(1))
    scale = pyro.sample("scale", dist.HalfCauchy(torch.tensor(2.5, dtype=x.dtype)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ slope, scale), obs=y)


@pytest.mark.parametrize(
    ("kernel", "settings"),
    [
        (GGMC, {"friction": None, "num_steps": 8}),
        (GGMC, {"friction": 1.0, "num_steps": 2}),
        pytest.param(AMAGOLD, {"friction": 1.0}, marks=pytest.mark.slow),
        pytest.param(SGHMC, {"friction": 1.0, "step_size": "auto", "steps_per_sample": 50}, marks=pytest.mark.slow),
    ],
    ids=["hmc", "ggmc", "amagold", "sghmc"],
)
def test_no_chain_is_left_behind(kernel, settings):
    """From 10⁵ or more above the posterior's energy, where chains would have step sizes of their own."""
    torch.manual_seed(0)
    x = torch.stack([torch.ones(200), 100 + 15 * torch.randn(200)], 1).double()
    y = x @ torch.tensor([25.0, 0.6], dtype=torch.float64) + 18 * torch.randn(200, dtype=torch.float64)
    pyro.set_rng_seed(0)
    narrow = init_to_value(values={"slope": torch.zeros(2).double(), "scale": torch.tensor(0.3).double()})
    start = narrow if kernel is SGHMC else init_to_uniform
    one = kernel(steep_regression, mass="auto", compile="fx", init_strategy=start, **settings)
    mcmc = MCMC(one, num_samples=200, warmup_steps=400, num_chains=8, disable_progbar=True)
    mcmc.run(x, y)
    draws = mcmc.get_samples(group_by_chain=True)
    fitted = torch.stack([draws["slope"] @ x.mean(0), draws["scale"]], -1)
    least = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    residual = float((y - x @ least).std())
    error = residual / 200**0.5 * torch.tensor([1.0, 0.5**0.5], dtype=torch.float64)
    off = (fitted.mean(1) - torch.tensor([float(y.mean()), residual], dtype=torch.float64)) / error
    assert off.abs().max() < 2.5, "a chain has not arrived"
