"""Each kernel samples exactly the law that its discretisation has on a Gaussian, at finite step size.

All checks go through the kernel's own recorded step. They fail without cause once in 1/ALPHA times each.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bnn.kernels import SGHMC, SGLD, PolynomialDecay
from support import laws, targets
from support.cases import LAWS, MOMENTUM_LAWS, Law
from support.checks import assert_covariance, assert_mean, assert_variance
from support.laws import Setting

N = 131_072  # independent coordinates or chains: a standard error of 0.4 % in a variance
STEPS = [0.1, 0.5]
TEMPERATURES = [1.0, 0.1]
CURVATURE = 4.0  # nowhere one, so that T/k, Tk and T differ


def setting_of(law: Law, stiffness: float, temperature: float, **options) -> Setting:
    """h·k/M = ``stiffness`` for a kernel without momentum, h·ω = ``stiffness`` with; friction near critical."""
    mass = options.pop("mass", 1.0)
    omega = math.sqrt(CURVATURE / mass)
    step_size = stiffness * mass / CURVATURE if law.momentum_variance is None else stiffness / omega
    return Setting(CURVATURE, step_size, temperature, friction=1.5 * omega * mass, mass=mass, **options)


def advanced(kernel, steps: int, start: torch.Tensor, *args, chains: int | None = None):
    """The kernel after ``steps`` draws from ``start``."""
    kernel.num_chains = chains
    kernel.initial_params = {"z": start}
    kernel.setup(0, *args)
    for _ in range(steps):
        kernel.advance()
    return kernel


def moments(kernel) -> np.ndarray:
    """Position and, where there is one, momentum of all coordinates: ``(N, 1 or 2)``."""
    state = kernel._running.state
    return np.stack([t.flatten().numpy() for t in state[:2] if t.numel()], 1)


def run_gaussian(law: Law, s: Setting, steps: int, **options):
    curvature = torch.full((N,), s.curvature, dtype=torch.float64)
    kernel = law.kernel(targets.gaussian, compile="fx", **law.settings(s), **options)
    return advanced(kernel, steps, torch.zeros_like(curvature), curvature)


def run_noisy(law: Law, s: Setting, steps: int):
    kernel = law.kernel(targets.noisy_gaussian, compile="fx", replacement=True, **law.settings(s))
    rows = targets.rows_for(s.noise, s.curvature)
    with targets.starts_unchecked():
        return advanced(kernel, steps, torch.zeros(N, dtype=torch.float64), rows, s.curvature, chains=N)


def assert_law(kernel, covariance: np.ndarray) -> None:
    sample = moments(kernel)
    names = ["position", "momentum"][: sample.shape[1]]
    assert_covariance(names, sample, covariance[: len(names), : len(names)])


def settled(law: Law, s: Setting) -> tuple[int, np.ndarray]:
    """Twenty relaxation times in steps, and the exact covariance after as many from z = 0, r ~ N(0, TM)."""
    moves = law.step(s)
    steps = laws.steps_to_stationarity(moves)
    covariance = laws.start(s)
    for _ in range(steps):
        covariance = laws.propagate(covariance, moves)
    return steps, covariance


@pytest.mark.parametrize("noise", [0.0, 30.0])
@pytest.mark.parametrize("mass", [1.0, 2.5])
@pytest.mark.parametrize("stiffness", STEPS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_closed_form_is_the_recursions(law, stiffness, mass, noise):
    s = setting_of(law, stiffness, 0.7, mass=mass, noise=noise if law.holds_with_noise else 0.0)
    stationary = laws.stationary(law.step(s))
    np.testing.assert_allclose(stationary[0, 0], law.position_variance(s), rtol=1e-10)
    if law.momentum_variance is not None:
        np.testing.assert_allclose(stationary[1, 1], law.momentum_variance(s), rtol=1e-10)
        np.testing.assert_allclose(stationary[0, 1], law.covariance(s), rtol=1e-10, atol=1e-12)
    _, reached = settled(law, s)
    np.testing.assert_allclose(reached, stationary, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("stiffness", STEPS)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_stationary_law(law, stiffness, temperature):
    s = setting_of(law, stiffness, temperature)
    steps, _ = settled(law, s)
    kernel = run_gaussian(law, s, steps)
    sample = moments(kernel)
    assert_variance("position", sample[:, 0], law.position_variance(s))
    if law.momentum_variance is not None:
        assert_law(
            kernel,
            np.array(
                [[law.position_variance(s), law.covariance(s)], [law.covariance(s), law.momentum_variance(s)]],
            ),
        )


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_law_while_it_relaxes(law):
    """Three steps from z = 0, where the law is far from stationary; three steps make one draw."""
    s = setting_of(law, 0.5, 0.7, mass=2.5)
    covariance = laws.start(s)
    for _ in range(6):
        covariance = laws.propagate(covariance, law.step(s))
    assert_law(run_gaussian(law, s, 2, steps_per_sample=3), covariance)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_minibatch_noise(law, temperature):
    """The exact law with minibatch noise, of a variance that doubles the temperature."""
    s = setting_of(law, 0.5, temperature)
    s = replace(s, noise=2 * temperature * s.friction / s.step_size)
    steps, covariance = settled(law, s)
    kernel = run_noisy(law, s, steps)
    assert_law(kernel, covariance)
    if law.holds_with_noise:
        assert_variance("position", moments(kernel)[:, 0], law.position_variance(s))


@pytest.mark.parametrize("law", MOMENTUM_LAWS, ids=lambda law: law.name)
def test_minibatch_noise_raises_the_temperature_by_hV_over_2C(law):
    """To first order in h for every integrator: at hω = 0.01 within 2 %, where the noise alone adds 50 %."""
    s = setting_of(law, 0.01, 1.0, mass=2.5)
    s = replace(s, noise=s.friction / s.step_size)
    variance = laws.stationary(law.step(s))[0, 0]
    assert variance == pytest.approx(1.5 / s.curvature, rel=0.02)


@pytest.mark.parametrize("law", MOMENTUM_LAWS, ids=lambda law: law.name)
def test_known_gradient_noise_is_taken_out(law):
    s = setting_of(law, 0.5, 1.0, mass=2.5)
    noise = 0.8 * s.friction / s.step_size
    s = replace(s, noise=noise, removed=noise)
    steps, covariance = settled(law, s)
    assert_law(run_noisy(law, s, steps), covariance)


@pytest.mark.parametrize("law", MOMENTUM_LAWS, ids=lambda law: law.name)
def test_known_gradient_noise_is_taken_out_to_first_order(law):
    """The oracle of the test above: 40 % of excess temperature, corrected to 2 % at hω = 0.02."""
    s = setting_of(law, 0.02, 1.0)
    noise = 0.8 * s.friction / s.step_size
    assert laws.stationary(law.step(replace(s, noise=noise)))[0, 0] * s.curvature == pytest.approx(1.4, abs=0.03)
    corrected = laws.stationary(law.step(replace(s, noise=noise, removed=noise)))
    assert corrected[0, 0] * s.curvature == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("law", MOMENTUM_LAWS, ids=lambda law: law.name)
def test_momentum_resampling(law, every):
    """Step 0, and every so many steps, start from (or, in a splitting, pass through) a fresh momentum."""
    s = setting_of(law, 0.5, 0.7, mass=2.5)
    covariance, steps = laws.start(s), 20 * every
    for step in range(steps):
        covariance = laws.propagate(covariance, law.step(s, resample=step % every == 0))
    assert_law(run_gaussian(law, s, steps, momentum_resampling=every), covariance)


@pytest.mark.parametrize(
    "law", [law for law in MOMENTUM_LAWS if law.name != "symplectic_euler"], ids=lambda law: law.name
)
def test_momentum_resampling_leaves_the_splittings_alone(law):
    s = setting_of(law, 0.5, 0.7, mass=2.5)
    stationary = laws.stationary(law.step(s))
    np.testing.assert_allclose(laws.propagate(stationary, law.step(s, resample=True)), stationary, atol=1e-12)


def test_preconditioner_keeps_the_target():
    law = LAWS[0]
    for mass in (0.5, 4.0):
        s = setting_of(law, 0.5, 0.7, mass=mass)
        steps, _ = settled(law, s)
        assert_variance("position", moments(run_gaussian(law, s, steps))[:, 0], law.position_variance(s))


@pytest.mark.parametrize("as_vector", [False, True], ids=["per_site", "vector"])
@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_mass_per_site(law, as_vector):
    """Two sites whose mass (for SGLD, 1/preconditioner) is in proportion to their curvature: one law in h·ω."""
    name, inverse = ("mass", False) if law.momentum_variance is not None else ("preconditioner", True)
    left = setting_of(law, 0.5, 0.7, mass=1.0)
    right = replace(left, curvature=16.0, mass=4.0)
    values = [1 / s.mass if inverse else s.mass for s in (left, right)]
    given = torch.tensor(values).repeat_interleave(N) if as_vector else {"left": values[0], "right": values[1]}
    kernel = law.kernel(targets.two_gaussians, compile="fx", **{**law.settings(left), name: given})
    steps = laws.steps_to_stationarity(law.step(left))
    curvature = torch.full((N,), CURVATURE, dtype=torch.float64)
    kernel.initial_params = {site: torch.zeros_like(curvature) for site in ("left", "right")}
    kernel.setup(0, curvature)
    for _ in range(steps):
        kernel.advance()
    sample = moments(kernel)
    for s, half in ((left, sample[:N]), (right, sample[N:])):
        covariance = laws.start(s)
        for _ in range(steps):
            covariance = laws.propagate(covariance, law.step(s))
        names = ["position", "momentum"][: half.shape[1]]
        assert_covariance(names, half, covariance[: len(names), : len(names)])


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.name)
def test_schedules_are_followed_step_by_step(law):
    """A step size that shrinks and a temperature that falls: the exact law after twelve steps."""
    s = setting_of(law, 0.5, 2.0)
    step_size = PolynomialDecay(s.step_size, delay=4.0, power=0.7)
    temperature = PolynomialDecay(s.temperature, delay=2.0, power=1.0)
    curvature = torch.full((N,), s.curvature, dtype=torch.float64)
    options = {**law.settings(s), "step_size": step_size, "temperature": temperature}
    kernel = law.kernel(targets.gaussian, compile="fx", steps_per_sample=2, **options)
    advanced(kernel, 6, torch.zeros_like(curvature), curvature)
    covariance = laws.start(s)
    for step in range(12):
        now = replace(s, step_size=step_size.value_at(step), temperature=temperature.value_at(step))
        covariance = laws.propagate(covariance, law.step(now))
    assert_law(kernel, covariance)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_virial_and_equipartition_off_the_gaussian(temperature):
    """U = ¼ z⁴: E[z ∇U] = E[r²]/M = T. The bias of bbaoa at this step is below 0.1 %, the standard error 0.6 %."""
    like = torch.zeros(N, dtype=torch.float64)
    omega = temperature**0.25
    kernel = SGHMC(targets.quartic, step_size=0.1 / omega, friction=2.0 * omega, temperature=temperature, compile="fx")
    advanced(kernel, 200, like, like)
    position, momentum = moments(kernel).T
    assert_mean("z ∇U", position**4, temperature, 4 * temperature**2)
    assert_variance("momentum", momentum, temperature)
    stats = dict(zip(kernel._running.stat_names, kernel._running.last_stats[0].tolist(), strict=True))
    assert stats["kinetic_temperature"] == pytest.approx(temperature, rel=0.03)
    assert stats["configurational_temperature"] == pytest.approx(temperature, rel=0.03)


def test_the_wrong_temperature_is_a_different_law():
    """The check resolves 5 % in the temperature."""
    s = setting_of(LAWS[0], 0.5, 1.0)
    kernel = run_gaussian(LAWS[0], s, 20)
    with pytest.raises(AssertionError, match="the variance is"):
        assert_variance("position", moments(kernel)[:, 0], LAWS[0].position_variance(replace(s, temperature=1.05)))
    assert LAWS[0].kernel is SGLD
