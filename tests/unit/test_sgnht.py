"""Thermostats: the balance that holds exactly at any step size, and gradient noise that leaves T alone."""

import numpy as np
import pytest
import torch

from bnn.kernels import SGHMC, SGNHT
from support import targets
from support.checks import assert_mean, assert_variance

N = 131_072
CURVATURE, MASS, FRICTION = 4.0, 2.5, 3.0


def per_coordinate(h: float, temperature: float, steps: int, **settings):
    """N independent coordinates, each with its own thermostat, without gradient noise."""
    curvature = torch.full((N,), CURVATURE, dtype=torch.float64)
    kernel = SGNHT(
        targets.gaussian, step_size=h, friction=FRICTION, mass=MASS, temperature=temperature, compile="fx",
        thermostat="per_coordinate", steps_per_sample=steps, **settings,
    )  # fmt: skip
    kernel.initial_params = {"z": torch.zeros_like(curvature)}
    return advanced(kernel, curvature)


def under_noise(kernel_class, h: float, temperature: float, noise: float, steps: int, **settings):
    """N chains of one coordinate whose gradients have noise of the given variance."""
    kernel = kernel_class(
        targets.noisy_gaussian, step_size=h, friction=FRICTION, mass=MASS, temperature=temperature, compile="fx",
        replacement=True, steps_per_sample=steps, **settings,
    )  # fmt: skip
    kernel.num_chains, kernel.initial_params = N, {"z": torch.zeros(N, dtype=torch.float64)}
    with targets.starts_unchecked():
        return advanced(kernel, targets.rows_for(noise, CURVATURE), CURVATURE)


def advanced(kernel, *args):
    kernel.setup(0, *args)
    kernel.advance()
    return kernel._running.state


def assert_balance(state, h: float, temperature: float, noise: float = 0.0) -> None:
    """E[(r − h(kz + e))²] + E[r²] = 2TM: what keeps the mean of ζ where it is, exact at any h."""
    kicked = state.momentum - h * CURVATURE * state.position
    total = (kicked.square() + state.momentum.square()).flatten().numpy() + h**2 * noise
    assert_mean("the drive of the thermostat", total, 2 * temperature * MASS, float(total.var()))


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize("h", [0.1, 0.5])
def test_the_momenta_that_drive_the_thermostat_are_at_the_temperature(h, temperature):
    state = per_coordinate(h, temperature, int(40 / h))
    assert_balance(state, h, temperature)


@pytest.mark.parametrize("temperature", [pytest.param(1.0, marks=pytest.mark.slow), 0.1])
def test_without_noise_the_law_is_the_targets(temperature):
    """exp(−U/T) · N(0, TM) · N(0, 1/μ): at h = 0.05 the bias, of order h², is below 0.1 %."""
    state = per_coordinate(0.05, temperature, 800, thermostat_mass=2.0)
    assert_variance("position", state.position.numpy(), temperature / CURVATURE, alpha=1e-9)
    assert_variance("momentum", state.momentum.numpy(), temperature * MASS, alpha=1e-9)
    assert_variance("thermostat", state.thermostat.numpy(), 1 / 2.0, alpha=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("thermostat", ["scalar", "per_coordinate"])
def test_noise_that_doubles_the_temperature_of_sghmc_is_absorbed(thermostat):
    h, temperature = 0.05, 0.5
    noise = 2 * temperature * FRICTION / h
    plain = under_noise(SGHMC, h, temperature, noise, 300)
    assert float(plain.position.var()) == pytest.approx(2 * temperature / CURVATURE, rel=0.05)
    state = under_noise(SGNHT, h, temperature, noise, 600, thermostat=thermostat)
    assert_balance(state, h, temperature, noise)
    assert float(state.position.var()) == pytest.approx(temperature / CURVATURE, rel=0.03)
    assert float(state.thermostat.mean()) == pytest.approx(h * noise / (2 * MASS * temperature), rel=0.05)


def test_scalar_thermostat_takes_the_mean_over_coordinates():
    """One step from given numbers, by hand."""
    h, friction, mass, temperature, mu = 0.3, 0.7, np.array([1.0, 2.0]), 0.8, 1.5
    kernel = SGNHT(
        targets.gaussian, step_size=h, friction=friction, mass=torch.tensor(mass), temperature=temperature,
        thermostat_mass=mu, compile="fx",
    )  # fmt: skip
    curvature = torch.tensor([1.0, 3.0], dtype=torch.float64)
    kernel.initial_params = {"z": torch.tensor([0.5, -1.0], dtype=torch.float64)}
    kernel.setup(0, curvature)
    z, r = kernel._running.state.position[0].numpy(), kernel._running.state.momentum[0].numpy()
    zeta = 0.0
    torch.manual_seed(5)
    noise = torch.empty(1, 1, 2, dtype=torch.float64).normal_().numpy()[0, 0]
    torch.manual_seed(5)
    kernel.advance()
    r = r - h * curvature.numpy() * z
    z = z + h / 2 * r / mass
    zeta += h / 2 * (np.mean(r**2 / mass) - temperature) / (mu * temperature)
    kappa = friction / mass + zeta
    r = np.exp(-h * kappa) * r + np.sqrt(friction * temperature * (1 - np.exp(-2 * h * kappa)) / kappa) * noise
    zeta += h / 2 * (np.mean(r**2 / mass) - temperature) / (mu * temperature)
    z = z + h / 2 * r / mass
    state = kernel._running.state
    np.testing.assert_allclose(state.position[0], z, rtol=1e-12)
    np.testing.assert_allclose(state.momentum[0], r, rtol=1e-12)
    np.testing.assert_allclose(state.thermostat[0], [zeta], rtol=1e-12)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"thermostat": "each"}, "thermostat 'each' is unknown"),
        ({"thermostat_mass": 0.0}, "thermostat_mass is 0"),
        ({"temperature": 0.0}, "use SGHMC"),
        ({"friction": -1.0}, "friction is -1"),
        ({"mass": 0.0}, "mass holds 0"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        kernel = SGNHT(targets.gaussian, **{"step_size": 0.1, "friction": 1.0, "compile": "fx", **settings})
        kernel.setup(0, torch.ones(3))
