"""Norm-adjusting SGHMC: its exact finite-step law under any momentum scale, and the temperature that this implies."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.linalg import expm

from bnn.kernels import MCMC, SGHMC, Constant, CosineCycles, NormAdjustedSGHMC, implied_temperature
from support import laws, targets
from support.checks import assert_covariance, assert_variance
from support.laws import Setting

N = 131_072
INTEGRATORS = {
    "bbaoa": laws.bbaoa,
    "baoab": laws.baoab,
    "symplectic_euler": laws.symplectic_euler,
    "obabo": laws.obabo,
}
# M and C as given, then the α and γ that make the kernel's mass and friction.
MASS, FRICTION, ALPHA, GAMMA, CURVATURE = 2.5, 4.0, 3.0, 0.5, 4.0


def setting(temperature: float = 0.7, step_size: float = 0.4) -> Setting:
    return Setting(CURVATURE, step_size, temperature, friction=GAMMA * FRICTION, mass=ALPHA * MASS)


def run(s: Setting, steps: int, **options) -> np.ndarray:
    """Positions and momenta of N independent coordinates after some steps from z = 0."""
    curvature = torch.full((N,), s.curvature, dtype=torch.float64)
    kernel = NormAdjustedSGHMC(
        targets.gaussian, step_size=s.step_size, temperature=s.temperature, mass=MASS, friction=FRICTION, alpha=ALPHA,
        gamma=GAMMA, compile="fx", **options,
    )  # fmt: skip
    kernel.num_chains, kernel.initial_params = None, {"z": torch.zeros_like(curvature)}
    kernel.setup(0, curvature)
    for _ in range(steps):
        kernel.advance()
    return np.stack([part.flatten().numpy() for part in kernel._running.state[:2]], 1)


def moves(s: Setting, integrator: str, scale: float, resample: bool) -> list[laws.Move]:
    """A step; where momenta are drawn afresh, from N(0, scale · M)."""
    if not resample:
        return INTEGRATORS[integrator](s)
    fresh = laws.fluctuate(0.0, scale * MASS)
    if integrator == "symplectic_euler":
        return [fresh, *INTEGRATORS[integrator](s)]
    if integrator == "obabo":
        return [fresh, laws.kick(s, 0.5), laws.drift(s), laws.gradient(s), laws.kick(s, 0.5), fresh]
    middle = [laws.drift(s, 0.5), fresh, laws.drift(s, 0.5)]
    if integrator == "bbaoa":
        return [laws.gradient(s), laws.kick(s), *middle]
    return [laws.kick(s, 0.5), *middle, laws.gradient(s), laws.kick(s, 0.5)]


@pytest.mark.filterwarnings("ignore:momentum_scale is")
@pytest.mark.parametrize("scale", ["auto", 0.01, 5.0])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_exact_law_under_any_momentum_scale(integrator, scale):
    s, every, steps = setting(), 4, 22
    covariance = laws.start(s)
    beta = ALPHA * s.temperature if scale == "auto" else scale
    for step in range(steps):
        covariance = laws.propagate(covariance, moves(s, integrator, beta, step % every == 0))
    sample = run(s, steps, integrator=integrator, momentum_scale=scale, resample_every=every)
    assert_covariance(["position", "momentum"], sample, covariance[:2, :2])


def test_auto_keeps_the_target_and_is_alpha_times_the_temperature():
    s = setting()
    sample = run(s, 400, resample_every=7)
    assert_variance("position", sample[:, 0], s.temperature / s.curvature)
    torch.manual_seed(3)
    auto = run(s, 9, resample_every=2)
    torch.manual_seed(3)
    np.testing.assert_array_equal(run(s, 9, resample_every=2, momentum_scale=ALPHA * s.temperature), auto)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_implied_temperature_is_that_of_the_steps(integrator):
    """In the stationary law of the steps, at each number of steps since the momentum was drawn afresh."""
    s, every, scale = setting(step_size=0.6), 5, 0.3
    covariance, variances = laws.start(s), []
    for step in range(80 * every):
        covariance = laws.propagate(covariance, moves(s, integrator, scale, step % every == 0))
        variances.append(covariance[0, 0])
    settings = {
        "step_size": s.step_size, "friction": FRICTION, "mass": MASS, "alpha": ALPHA, "gamma": GAMMA,
        "momentum_scale": scale, "temperature": s.temperature, "resample_every": every, "integrator": integrator,
    }  # fmt: skip
    found = [implied_temperature(CURVATURE, steps_since=since, **settings) for since in range(every)]
    np.testing.assert_allclose(found, CURVATURE * np.array(variances[-every:]), rtol=1e-9)
    assert implied_temperature(CURVATURE, **settings) == found[-1]
    assert np.ptp(found) > 0.01 * found[0]
    assert implied_temperature(CURVATURE, **{**settings, "step_size": 9.0}) == math.inf


@pytest.mark.filterwarnings("ignore:momentum_scale is")
def test_each_draw_says_what_is_implied_at_its_step():
    s, steps = setting(), 3
    kernel = NormAdjustedSGHMC(
        targets.gaussian, step_size=s.step_size, temperature=s.temperature, mass=MASS, friction=FRICTION, alpha=ALPHA,
        gamma=GAMMA, momentum_scale=0.3, resample_every=4, steps_per_sample=steps, compile="fx",
    )  # fmt: skip
    kernel.setup(0, torch.full((50,), s.curvature, dtype=torch.float64))
    for _ in range(5):
        kernel.advance()
    expected = [
        implied_temperature(
            s.curvature, step_size=s.step_size, friction=FRICTION, mass=MASS, alpha=ALPHA, gamma=GAMMA,
            momentum_scale=0.3, temperature=s.temperature, resample_every=4, steps_since=(steps * draw - 1) % 4,
        )
        for draw in range(1, 6)
    ]  # fmt: skip
    np.testing.assert_allclose(kernel.sample_stats()["implied_temperature"][0], expected, rtol=1e-12)


def test_published_setting_is_a_cold_posterior():
    """A momentum scale of 0.001 at α = 3 samples T near 0.08, not 1; in ten steps less: the formula is of tiny ones."""
    m, published = 3.0, {"friction": 0.5, "alpha": 3.0, "momentum_scale": 1e-3}
    flow = expm(0.7 * np.array([[0.0, 1 / m], [-1.0, -0.5 / m]]))
    limit = 1.0 - (1.0 - 1e-3 / 3.0) * m * flow[0, 1] ** 2 / (1.0 - flow[0, 0] ** 2)
    assert limit == pytest.approx(0.0760, abs=1e-4)
    for integrator in INTEGRATORS:
        errors = [
            implied_temperature(1.0, step_size=0.7 / n, resample_every=n, integrator=integrator, **published) - limit
            for n in (400, 800)
        ]
        assert abs(errors[0]) < 0.01 * limit and errors[0] / errors[1] == pytest.approx(2.0, abs=0.05)
    assert implied_temperature(1.0, step_size=0.07, resample_every=10, **published) == pytest.approx(0.065, abs=1e-4)
    nearly_none = implied_temperature(2.0, step_size=0.004, friction=1e-3, momentum_scale=1e-3, resample_every=100)
    assert nearly_none == pytest.approx(0.0013, abs=5e-5)


def test_implied_temperature_lies_between_the_two_thermostats():
    common = {"step_size": 0.01, "momentum_scale": 0.3, "alpha": 1.5, "temperature": 1.0}
    for curvature in (0.1, 1.0, 30.0):
        slow = implied_temperature(curvature, friction=1e-9, resample_every=30, **common)
        assert slow == pytest.approx(0.3 / 1.5, rel=1e-4)
        found = [implied_temperature(curvature, friction=5.0, resample_every=n, **common) for n in (1, 2, 100, 5_000)]
        assert found[0] == pytest.approx(0.2, rel=1e-9), "friction never acts"
        assert found == sorted(found) and found[-1] <= 1.0 + 1e-9
    assert implied_temperature(2.0, friction=1.0, resample_every=9, **{**common, "momentum_scale": 1.5}) == (
        pytest.approx(1.0, abs=1e-12)
    )
    with pytest.raises(ValueError, match="curvature is -1"):
        implied_temperature(-1.0, friction=1.0, resample_every=9, **common)


def test_another_scale_is_announced_and_stands_in_the_report():
    curvature = torch.ones(200)
    kernel = NormAdjustedSGHMC(
        targets.gaussian, step_size=0.07, friction=0.5, alpha=3.0, momentum_scale=0.001, resample_every=10,
        steps_per_sample=10, compile="fx",
    )  # fmt: skip
    mcmc = MCMC(kernel, num_samples=200, warmup_steps=200, num_chains=2, disable_progbar=True)
    with pytest.warns(RuntimeWarning) as caught:
        mcmc.run(curvature)
    messages = " ".join(str(one.message) for one in caught)
    assert "only alpha * temperature = 3 keeps the target" in messages and "0.065 in place of 1" in messages
    assert "momentum_scale draws them at another" in messages
    np.testing.assert_allclose(mcmc.sample_stats["implied_temperature"], 0.065, atol=1e-4)
    assert "implies 0.06499" in mcmc.temperature_report()


def test_cycles_give_draws_only_at_their_target():
    schedule = CosineCycles(12.0, cycle_length=20, floor=2.0, hold=0.5)
    kernel = NormAdjustedSGHMC(
        targets.gaussian, step_size=0.05, friction=1.0, alpha=2.0, momentum_scale=schedule, resample_every=5,
        compile="fx",
    )  # fmt: skip
    mcmc = MCMC(kernel, num_samples=25, warmup_steps=0, num_chains=2, disable_progbar=True)
    mcmc.run(torch.ones(3))
    stats = mcmc.sample_stats
    assert (stats["momentum_scale"] == 2.0).all()
    assert stats["cycle"][0].tolist() == [0] * 10 + [1] * 10 + [2] * 5
    np.testing.assert_allclose(stats["cycle_position"][0, :10], np.arange(10, 20) / 20)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": 0.0}, "alpha is 0"),
        ({"gamma": -1.0}, "gamma is -1"),
        ({"momentum_scale": -0.1}, "momentum_scale is -0.1"),
        ({"momentum_scale": "cold"}, "or 'auto'"),
        ({"mass": 0.0}, "mass holds 0"),
        ({"resample_every": 0}, "momentum_resampling is 0"),
        ({"momentum_resampling": 3}, "resample_every"),
        ({"momentum_scale": CosineCycles(3.0, 10, floor=0.5)}, "never comes to alpha \\* temperature = 1"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        kernel = NormAdjustedSGHMC(targets.gaussian, **{"step_size": 0.1, "friction": 1.0, "compile": "fx", **settings})
        kernel.setup(0, torch.ones(3))


def test_without_factors_it_is_plain_sghmc():
    runs = []
    for kernel in (NormAdjustedSGHMC, SGHMC):
        torch.manual_seed(0)
        name = "resample_every" if kernel is NormAdjustedSGHMC else "momentum_resampling"
        one = kernel(
            targets.gaussian, step_size=0.1, friction=1.0, temperature=Constant(0.5), compile="fx", **{name: 3}
        )
        mcmc = MCMC(one, num_samples=20, num_chains=3, disable_progbar=True)
        mcmc.run(torch.ones(4))
        runs.append(mcmc.get_samples()["z"])
    assert torch.equal(*runs)
    assert math.isclose(replace(setting(), mass=2.0).decay, math.exp(-0.4 * GAMMA * FRICTION / 2.0))
