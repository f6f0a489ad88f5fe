"""Tests of the tests: kernels that are wrong in a known way must fail the checks of ``test_laws.py``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from bnn.kernels import SGHMC, SGLD
from support import laws, targets
from support.cases import LAWS, Law
from support.checks import assert_covariance
from support.laws import Setting

N = 131_072
LAW_OF = {law.name: law for law in LAWS}


class ScaledNoise(SGLD):
    """Noise times ``factor``: √½ is half the noise variance, T a temperature squared, 1/√T a forgotten one."""

    factor = 1.0

    def coefficients(self, step):
        drift, noise = super().coefficients(step)
        return drift, noise * self.factor


class ScaledDrift(SGLD):
    def coefficients(self, step):
        drift, noise = super().coefficients(step)
        return 0.5 * drift, noise


class ScaledMomentumNoise(SGHMC):
    factor = 1.0

    def coefficients(self, step):
        h, velocity, decay, noise, inverse_mass = super().coefficients(step)
        return h, velocity, decay, noise * self.factor, inverse_mass


class WrongPairing(SGHMC):
    """Symplectic Euler with the noise of the exact flow, √(MT(1 − c²)), which belongs to the splittings."""

    def coefficients(self, step):
        h, velocity, decay, _, inverse_mass = super().coefficients(step)
        noise = np.sqrt(self.temperature / inverse_mass * (1 - decay**2))
        return h, velocity, decay, noise, inverse_mass


class WrongPairingOfSplitting(SGHMC):
    """A splitting with symplectic Euler's noise, √(2hCT)."""

    def coefficients(self, step):
        h, velocity, decay, _, inverse_mass = super().coefficients(step)
        return h, velocity, decay, np.sqrt(2 * h * self.friction * self.temperature), inverse_mass


class HalfVelocity(SGHMC):
    """The drift halved: z moves by h/2 r/M."""

    def coefficients(self, step):
        h, velocity, *rest = super().coefficients(step)
        return h, 0.5 * velocity, *rest


class HalfForce(SGHMC):
    """The gradient halved."""

    def update(self, state, energy_and_grad, noise, coefficients):
        def halved(z):
            energy, grad = energy_and_grad(z)
            return energy, 0.5 * grad

        return super().update(state, halved, noise, coefficients)


class MassForgotten(SGHMC):
    """r/M written as r."""

    def coefficients(self, step):
        h, _, *rest = super().coefficients(step)
        return h, h, *rest


class GradientNoiseAdded(SGHMC):
    """The known minibatch noise added to the injected noise instead of taken off."""

    def coefficients(self, step):
        h, velocity, decay, noise, inverse_mass = super().coefficients(step)
        return h, velocity, decay, np.sqrt(noise**2 + 2 * h**2 * self.gradient_noise), inverse_mass


def with_factor(base: type, factor: Callable[[float], float]) -> Callable[[float], type]:
    """A subclass of ``base`` whose noise is scaled by a function of the temperature."""
    return lambda temperature: type(base.__name__, (base,), {"factor": factor(temperature)})


def always(cls: type) -> Callable[[float], type]:
    return lambda temperature: cls


@dataclass(frozen=True)
class Broken:
    name: str
    law: str
    kernel: Callable[[float], type]


HALF, FIVE_PERCENT = math.sqrt(0.5), math.sqrt(0.95)
SGHMC_LAWS = ["symplectic_euler", "bbaoa", "baoab", "obabo"]
BROKEN = [
    Broken("half_noise", "sgld", with_factor(ScaledNoise, lambda t: HALF)),
    Broken("five_percent_less_noise", "sgld", with_factor(ScaledNoise, lambda t: FIVE_PERCENT)),
    Broken("temperature_forgotten", "sgld", with_factor(ScaledNoise, lambda t: t**-0.5)),
    Broken("temperature_squared", "sgld", with_factor(ScaledNoise, lambda t: t**0.5)),
    Broken("drift_halved", "sgld", always(ScaledDrift)),
    *(Broken("half_noise", law, with_factor(ScaledMomentumNoise, lambda t: HALF)) for law in SGHMC_LAWS),
    *(Broken("temperature_forgotten", law, with_factor(ScaledMomentumNoise, lambda t: t**-0.5)) for law in SGHMC_LAWS),
    *(Broken("temperature_squared", law, with_factor(ScaledMomentumNoise, lambda t: t**0.5)) for law in SGHMC_LAWS),
    *(Broken("drift_halved", law, always(HalfVelocity)) for law in SGHMC_LAWS),
    *(Broken("gradient_halved", law, always(HalfForce)) for law in SGHMC_LAWS),
    *(Broken("mass_forgotten", law, always(MassForgotten)) for law in SGHMC_LAWS),
    Broken("wrong_pairing", "symplectic_euler", always(WrongPairing)),
    Broken("wrong_pairing", "bbaoa", always(WrongPairingOfSplitting)),
    Broken("wrong_pairing", "baoab", always(WrongPairingOfSplitting)),
]


def setting_of(law: Law, temperature: float) -> Setting:
    mass = 1.0 if law.momentum_variance is None else 2.5
    curvature = 4.0
    omega = math.sqrt(curvature / mass)
    h = 0.1 / curvature if law.momentum_variance is None else 0.1 / omega
    return Setting(curvature, h, temperature, friction=1.5 * omega * mass, mass=mass)


def check(law: Law, kernel_class: type, s: Setting) -> None:
    """What ``test_laws.py`` does, with another class in the kernel's place."""
    curvature = torch.full((N,), s.curvature, dtype=torch.float64)
    kernel = kernel_class(targets.gaussian, compile="fx", **law.settings(s))
    kernel.initial_params = {"z": torch.zeros_like(curvature)}
    kernel.setup(0, curvature)
    moves = law.step(s)
    steps = laws.steps_to_stationarity(moves, times=8.0)
    covariance = laws.start(s)
    for _ in range(steps):
        kernel.advance()
        covariance = laws.propagate(covariance, moves)
    state = [t.flatten().numpy() for t in kernel._running.state[:2] if t.numel()]
    names = ["position", "momentum"][: len(state)]
    assert_covariance(names, np.stack(state, 1), covariance[: len(names), : len(names)])


@pytest.mark.parametrize("broken", BROKEN, ids=lambda b: f"{b.law}-{b.name}")
def test_broken_kernels_fail(broken):
    law, temperature = LAW_OF[broken.law], 0.1
    with pytest.raises(AssertionError, match="the variance is"):
        check(law, broken.kernel(temperature), setting_of(law, temperature))


@pytest.mark.parametrize("base", [ScaledNoise, ScaledMomentumNoise])
def test_the_machinery_passes_with_nothing_broken(base):
    law = LAW_OF["sgld" if base is ScaledNoise else "bbaoa"]
    check(law, base, setting_of(law, 0.1))


def noisy_position(kernel_class: type, law: Law, s: Setting, scale_up: bool = True) -> tuple[np.ndarray, float]:
    """Positions of N chains after eight relaxation times with minibatch noise, and the exact variance."""
    kernel = kernel_class(targets.noisy_gaussian, compile="fx", replacement=True, **law.settings(s))
    kernel.num_chains = N
    kernel.initial_params = {"z": torch.zeros(N, dtype=torch.float64)}
    with targets.starts_unchecked():
        kernel.setup(0, targets.rows_for(s.noise, s.curvature), s.curvature, scale_up)
    covariance, moves = laws.start(s), law.step(s)
    for _ in range(laws.steps_to_stationarity(moves, times=8.0)):
        kernel.advance()
        covariance = laws.propagate(covariance, moves)
    return kernel.position.numpy(), float(covariance[0, 0])


@pytest.mark.parametrize("name", ["sgld", "bbaoa"])
def test_dropping_the_scale_of_a_minibatch_fails(name):
    """A likelihood that counts B rows in place of N: less curvature and less noise."""
    law = LAW_OF[name]
    s = replace(setting_of(law, 1.0), step_size=0.2)
    s = replace(s, noise=2 * s.friction / s.step_size)
    position, variance = noisy_position(law.kernel, law, s)
    assert_covariance(["position"], position, np.array([[variance]]))
    position, variance = noisy_position(law.kernel, law, s, scale_up=False)
    with pytest.raises(AssertionError, match="the variance is"):
        assert_covariance(["position"], position, np.array([[variance]]))


def test_gradient_noise_with_the_wrong_sign_fails():
    law = LAW_OF["bbaoa"]
    s = replace(setting_of(law, 1.0), step_size=0.2)
    noise = 0.5 * s.friction / s.step_size
    s = replace(s, noise=noise, removed=noise)
    position, variance = noisy_position(GradientNoiseAdded, law, s)
    with pytest.raises(AssertionError, match="the variance is"):
        assert_covariance(["position"], position, np.array([[variance]]))
