"""``step_size="auto"`` without a Metropolis test: the bias in variance is the one that was allowed."""

from dataclasses import replace

import numpy as np
import pyro
import pytest
import torch

import bnn
from bnn.kernels import MCMC, SGHMC, SGLD, Constant, CyclicalSGHMC, CyclicalSGLD, MaSDE, NormAdjustedSGHMC
from bnn.kernels._bias import BiasModel, minibatches_per_epoch
from bnn.kernels._run import Run
from support import laws, targets
from support.cases import LAWS, Law
from support.laws import Setting

TOLERANCE = 0.05
CURVATURE, NOISE, FRICTION, TEMPERATURE = 4.0, 40.0, 3.0, 0.7
SETTING = Setting(CURVATURE, 0.0, TEMPERATURE, friction=FRICTION, mass=2.5)
SPECTRUM = torch.logspace(0, 2, 30, dtype=torch.float64)


def model_of(law: Law, s: Setting) -> BiasModel:
    if law.momentum_variance is None:
        return BiasModel(1, 1 / s.mass, 1 / (s.mass * s.temperature), s.temperature)
    damping = s.friction / s.mass if law.name == "symplectic_euler" else 0.0
    return BiasModel(2, 1 / s.mass, 1 / (s.friction * s.temperature), s.temperature, damping)


@pytest.mark.parametrize("noise", [0.0, NOISE])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_exact_bias_is_below_the_tolerance(law, noise):
    """By the exact stationary law of each discretisation, at the step size chosen for its curvature and noise."""
    model = model_of(law, SETTING)
    curvature, variance = CURVATURE * model.curvature_weight, noise * model.noise_weight
    h = model.step_size(TOLERANCE, curvature, variance)
    exact = laws.stationary(law.step(replace(SETTING, step_size=h, noise=noise)))[0, 0]
    bias = exact * CURVATURE / TEMPERATURE - 1.0
    assert -1e-9 <= bias < 1.15 * TOLERANCE
    if noise and not model.damping:
        assert bias > 0.75 * TOLERANCE, "shorter steps than were asked for"
    if law.name in ("sgld", "obabo"):
        assert bias == pytest.approx(TOLERANCE, rel=0.06)


@pytest.mark.parametrize("epoch", [2, 5, 40])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_exact_bias_in_shuffled_epochs_is_below_the_tolerance(law, epoch):
    """By the exact law of each discretisation under noise that sums to zero over an epoch."""
    model = replace(model_of(law, SETTING), epoch=epoch)
    noise = 100 * NOISE
    curvature, variance = CURVATURE * model.curvature_weight, noise * model.noise_weight
    h = model.step_size(TOLERANCE, curvature, variance)
    assert h > 1.01 * replace(model, epoch=None).step_size(TOLERANCE, curvature, variance)
    exact = laws.stationary_in_epochs(law.step(replace(SETTING, step_size=h)), noise, epoch)[0, 0]
    bias = exact * CURVATURE / TEMPERATURE - 1.0
    assert 0.5 * TOLERANCE < bias < 1.15 * TOLERANCE


def test_minibatches_per_epoch():
    """The longest of the plates'; unknown for independent rows, loaders and random models."""

    rows = torch.zeros(targets.NUM_ROWS, dtype=torch.float64)

    def epoch_of(model=targets.noisy_gaussian, args=(rows, 1.0), **options):
        kernel = SGLD(model, step_size=0.1, compile="fx", **options)
        with targets.starts_unchecked():
            kernel.setup(0, *args)
        return minibatches_per_epoch(kernel._running)

    assert epoch_of() == targets.NUM_ROWS // targets.BATCH_SIZE
    assert epoch_of(replacement=True) is None
    assert epoch_of(targets.gaussian, (SPECTRUM,)) is None


def chosen(kernel, start: torch.Tensor, *args, warmup: int = 40, chains: int | None = None):
    """The kernel after its warm-up from ``start``, with its step size."""
    kernel.num_chains, kernel.initial_params = chains, {"z": start}
    with targets.starts_unchecked():
        kernel.setup(warmup, *args)
        for _ in range(warmup):
            kernel.advance()
    return kernel, kernel.step_size_at(0)


@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_largest_curvature_is_found(scale):
    """Full batches: h = 2·tol/(k P) for SGLD, 2√(tol M/k) for SGHMC, k the largest weighted by P or 1/M."""
    curvature = SPECTRUM * scale
    start = torch.randn(5, 30, dtype=torch.float64) / curvature.sqrt()
    options = {"step_size": "auto", "compile": "fx"}
    weight = torch.linspace(2.0, 0.5, 30, dtype=torch.float64)
    largest = float((curvature * weight).max())
    kernel = SGLD(targets.gaussian, preconditioner=weight, **options)
    assert chosen(kernel, start, curvature, chains=5)[1] == pytest.approx(2 * TOLERANCE / largest, rel=0.03)
    kernel = SGHMC(targets.gaussian, friction=scale**0.5, mass=1 / weight, **options)
    found = chosen(kernel, start, curvature, chains=5)[1]
    assert found == pytest.approx(2 * (TOLERANCE / largest) ** 0.5, rel=0.03)
    kernel = SGLD(targets.gaussian, preconditioner=weight, bias_tolerance=0.2, **options)
    assert chosen(kernel, start, curvature, chains=5)[1] == pytest.approx(0.4 / largest, rel=0.03)


@pytest.mark.parametrize("law", [law for law in LAWS if law.name != "obabo"], ids=lambda law: law.name)
def test_noise_is_found(law):
    """The step size of the true noise V, within four standard errors of a variance from 4,000 chains and ten probes."""
    options = law.settings(replace(SETTING, step_size=0.1))
    del options["step_size"]
    kernel = law.kernel(targets.noisy_gaussian, step_size="auto", compile="fx", replacement=True, **options)
    start = torch.randn(4000, dtype=torch.float64) * (TEMPERATURE / CURVATURE) ** 0.5
    rows = targets.rows_for(NOISE, CURVATURE)
    h = chosen(kernel, start, rows, CURVATURE, warmup=20, chains=4000)[1]
    model = model_of(law, SETTING)
    wanted = model.step_size(TOLERANCE, CURVATURE * model.curvature_weight, NOISE * model.noise_weight)
    assert h == pytest.approx(wanted, rel=4 * (2 / 160_000) ** 0.5)


@pytest.mark.parametrize(
    "build",
    [pytest.param(SGLD, marks=pytest.mark.slow), lambda *a, **o: SGHMC(*a, friction=20.0, **o)],
    ids=["sgld", "sghmc"],
)
def test_chains_arrive_from_far_away(build):
    """Minibatches of regression, whose noise far from the posterior is 10⁴ times that in it."""
    torch.manual_seed(0)
    x = torch.randn(400, 3, dtype=torch.float64)
    y = x @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + torch.randn(400, dtype=torch.float64)

    def model(x, y):
        w = pyro.sample("w", pyro.distributions.Normal(torch.zeros(3, dtype=x.dtype), 100.0).to_event(1))
        with pyro.plate("rows", len(x), subsample_size=40) as index:
            pyro.sample("y", pyro.distributions.Normal(x[index] @ w, 1.0), obs=y[index])

    pyro.set_rng_seed(0)
    kernel = build(model, step_size="auto", compile="fx", steps_per_sample=20)
    initial = {"w": 100.0 * torch.randn(8, 3, dtype=torch.float64)}
    mcmc = MCMC(kernel, num_samples=500, warmup_steps=400, num_chains=8, initial_params=initial, disable_progbar=True)
    mcmc.run(x, y)
    precision = x.T @ x + torch.eye(3, dtype=x.dtype) * 1e-4
    mean = torch.linalg.solve(precision, x.T @ y)
    off = (mcmc.get_samples()["w"].mean(0) - mean) * precision.diag().sqrt()
    assert off.abs().max() < 0.5, "the chains are still on their way"
    # The step is the one for the noise in the posterior, not for that on the way.
    curvature = torch.linalg.eigvalsh(precision)
    scores = x * (y - x @ mean)[:, None]
    noise = float((400**2 / 40) * torch.linalg.eigvalsh(scores.T.cov())[-1])
    model = (
        BiasModel(1, 1.0, 1.0, 1.0, epoch=10) if isinstance(kernel, SGLD) else BiasModel(2, 1.0, 1 / 20, 1.0, epoch=10)
    )
    wanted = model.step_size(TOLERANCE, float(curvature[-1]), noise * model.noise_weight)
    assert kernel.step_size_at(0) == pytest.approx(wanted, rel=0.25)


def test_a_step_with_a_fresh_momentum_is_one_of_langevin():
    """While chains fall SGHMC takes Langevin steps of h²/2 with P = 1/M: friction has no part in their bias."""
    start = torch.randn(4000, dtype=torch.float64) * (TEMPERATURE / CURVATURE) ** 0.5
    kernel = SGHMC(
        targets.noisy_gaussian, step_size="auto", friction=1e-3, mass=2.5, temperature=TEMPERATURE, compile="fx",
        replacement=True,
    )  # fmt: skip
    kernel.num_chains, kernel.initial_params = 4000, {"z": start}
    with targets.starts_unchecked():
        kernel.setup(200, targets.rows_for(NOISE, CURVATURE), CURVATURE)
    langevin = BiasModel(1, 1 / 2.5, 1 / (2.5 * TEMPERATURE), TEMPERATURE)
    wanted = langevin.step_size(TOLERANCE, CURVATURE / 2.5, NOISE / (2.5 * TEMPERATURE))
    assert kernel.step_size_at(0) ** 2 / 2 == pytest.approx(wanted, rel=4 * (2 / 16_000) ** 0.5)


def test_one_chain_that_starts_in_a_steep_place_comes_down():
    """A noise scale of 0.003 for data of 1: gradients and their noise are 10⁵ times those of the other chains."""
    torch.manual_seed(0)
    y = torch.randn(400, dtype=torch.float64)

    def model(y):
        scale = pyro.sample("scale", pyro.distributions.HalfNormal(torch.tensor(1.0, dtype=y.dtype)))
        with pyro.plate("rows", len(y), subsample_size=40) as index:
            pyro.sample("y", pyro.distributions.Normal(0.0, scale), obs=y[index])

    pyro.set_rng_seed(0)
    kernel = SGHMC(model, step_size="auto", friction=20.0, compile="fx", steps_per_sample=20)
    initial = {"scale": torch.tensor([0.003] + [1.0] * 7, dtype=torch.float64).log()}
    hot = []
    mcmc = MCMC(
        kernel, num_samples=400, warmup_steps=200, num_chains=8, initial_params=initial, disable_progbar=True,
        hook_fn=lambda kernel, params, stage, i: hot.append(kernel._warmup.step_rule.is_hot),
    )  # fmt: skip
    mcmc.run(y)
    assert hot[0] and not any(hot[100:])
    error = float(y.square().mean().sqrt()) / (2 * len(y)) ** 0.5  # a standard deviation of the posterior
    off = (mcmc.get_samples(group_by_chain=True)["scale"].mean(1) - y.square().mean().sqrt()) / error
    assert off.abs().max() < 0.5, "a chain is still on its way"


def test_hot_momenta_shorten_the_step():
    """A noise that the measurement is made to miss shows in the momenta."""
    rows = targets.rows_for(NOISE, CURVATURE)
    start = torch.randn(10_000, dtype=torch.float64) * (TEMPERATURE / CURVATURE) ** 0.5

    def build(noise):
        kernel = SGHMC(
            targets.noisy_gaussian, step_size="auto", friction=FRICTION, mass=2.5, temperature=TEMPERATURE,
            compile="fx", replacement=True, steps_per_sample=10,
        )  # fmt: skip
        rule = kernel.step_rule
        kernel.step_rule = lambda: _patched(rule(), noise)
        return chosen(kernel, start, rows, CURVATURE, warmup=160, chains=10_000)[1]

    model = model_of(next(law for law in LAWS if law.name == "bbaoa"), SETTING)
    true = NOISE * model.noise_weight
    assert build(true) == pytest.approx(model.step_size(TOLERANCE, CURVATURE / 2.5, true), rel=0.05)
    longer = model.step_size(TOLERANCE, CURVATURE / 2.5, true / 3)
    law = laws.stationary(laws.bbaoa(replace(SETTING, step_size=longer, noise=NOISE)))
    excess = law[1, 1] / (2.5 * TEMPERATURE) - 1.0
    assert excess > 2 * TOLERANCE
    assert build(true / 3) == pytest.approx(longer * TOLERANCE / excess, rel=0.1)


def _patched(rule, noise):
    rule._gradient_noise = lambda pairs, weight, direction, noise_weight: torch.tensor([noise])
    return rule


def test_what_was_chosen_is_said(capsys):
    kernel = SGHMC(targets.gaussian, step_size="auto", friction=5.0, compile="fx")
    mcmc = MCMC(kernel, num_samples=50, warmup_steps=30, num_chains=2)
    mcmc.run(SPECTRUM)
    said = "Warm-up chose step_size 0.0447, for an expected bias in variance of 5 % (discretisation 5 %, gradient noise"
    assert said in "".join(capsys.readouterr())
    mcmc.summary()
    assert said in capsys.readouterr().out
    assert mcmc.diagnostics()["warm-up chose"]["chain 1"].startswith("step_size 0.0447")
    idata = bnn.to_arviz(mcmc)
    assert idata.posterior.attrs["warmup_chose"].startswith("step_size 0.0447")
    np.testing.assert_array_equal(np.unique(idata.sample_stats["step_size"]), [kernel.step_size_at(0)])


def test_nothing_changes_after_warm_up_and_runs_repeat():
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        kernel = SGLD(targets.regression, step_size="auto", preconditioner="auto", compile="fx")
        mcmc = MCMC(kernel, num_samples=20, warmup_steps=60, num_chains=2, disable_progbar=True)
        mcmc.run(*targets.regression_data())
        draws.append(mcmc.get_samples()["weight"])
        assert len(mcmc.sample_stats["step_size"].unique()) == 1
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SGLD(targets.gaussian, step_size="auto", bias_tolerance=0.0), "bias_tolerance is 0.0; give a share"),
        (lambda: SGLD(targets.gaussian, step_size="auto", temperature=0.0), "temperature is 0.0, and step_size='auto'"),
        (
            lambda: SGHMC(targets.gaussian, step_size="auto", friction=1.0, temperature=Constant(1.0)),
            r"temperature is Constant\(value=1.0\), and step_size='auto' bounds",
        ),
        (
            lambda: SGHMC(targets.gaussian, step_size="auto", friction=0.0),
            "friction is 0.0, and step_size='auto' needs",
        ),
        (lambda: SGHMC(targets.gaussian, step_size="auto", friction=Constant(1.0)), "friction is Constant"),
        (
            lambda: SGHMC(targets.gaussian, step_size="auto", friction=1.0, gradient_noise=2.0),
            "measures the noise of the gradients .*: leave gradient_noise out",
        ),
        (lambda: MaSDE(targets.gaussian, step_size="auto", diffusion=torch.ones_like), "MaSDE knows no rule"),
        (lambda: CyclicalSGLD(targets.gaussian, step_size="auto", cycle_length=5), "step_size is 'auto'; give a"),
        (
            lambda: CyclicalSGHMC(targets.gaussian, step_size="auto", friction=1.0, cycle_length=5),
            "step_size is 'auto'",
        ),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build().setup(30, SPECTRUM)


def test_norm_adjusted_counts_its_own_mass_and_friction():
    start = torch.randn(5, 30, dtype=torch.float64) / SPECTRUM.sqrt()
    kernel = NormAdjustedSGHMC(
        targets.gaussian, step_size="auto", friction=5.0, alpha=4.0, resample_every=7, compile="fx"
    )
    assert chosen(kernel, start, SPECTRUM, chains=5)[1] == pytest.approx(2 * (TOLERANCE / 25) ** 0.5, rel=0.03)


def test_what_cannot_be_measured_is_said(monkeypatch):
    monkeypatch.setattr(Run, "gradient", lambda self, *args: torch.full_like(self.position, torch.nan))
    kernel = SGLD(targets.gaussian, step_size="auto", compile="fx")
    kernel.setup(20, SPECTRUM)
    assert kernel.warmup_report == "step_size 0.1, for want of finite gradients to find another by"
