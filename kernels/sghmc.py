"""Tempered stochastic gradient Hamiltonian Monte Carlo.

    dz = M⁻¹ r dt,   dr = −∇U dt − C M⁻¹ r dt + √(2 C T) dW          stationary law exp(−U/T) · N(r; 0, T M)

Chen, Fox and Guestrin (2014), "Stochastic gradient Hamiltonian Monte Carlo", ICML, equation 9, at temperature T. The
noise variance is 2CTh: a factor T in front of the noise, as some slides have it, samples at temperature T².

One step of each integrator, with c = exp(−hC/M), ξ ~ N(0, I) and one gradient ∇Û:

    symplectic_euler   r ← (1 − hC/M) r − h ∇Û(z) + √(2hCT) ξ;   z ← z + h r/M
    bbaoa              r ← r − h ∇Û(z);   z ← z + h/2 r/M;   r ← c r + √(MT(1 − c²)) ξ;   z ← z + h/2 r/M
    baoab              B A O A B:  B is r ← r − h/2 ∇Û,  A is z ← z + h/2 r/M,  O as above
    obabo              O B A B O:  O over h/2, B over h/2, A over h

Leimkuhler and Matthews (2013), "Rational construction of stochastic numerical methods for molecular sampling", AMRX.
Wenzel et al. (2020), "How good is the Bayes posterior in deep neural networks really?", ICML, use symplectic_euler.

Bias on U = ½ k z², ω² = k/M: bbaoa and baoab give Var z = T/k exactly; obabo T/(k(1 − h²ω²/4)); symplectic_euler
T(1 − hγ/2) / (k(1 − hγ/2 − h²ω²/4)) with γ = C/M. Minibatch noise of variance V adds hV/(2C) to T.
Cost: one gradient a step.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation
from bnn.kernels._bias import BiasModel, ExpectedBias, check_tolerance, constant_temperature
from bnn.kernels._coordinates import Number
from bnn.kernels._momentum import MomentumKernel
from bnn.kernels._warmup import StepRule
from bnn.kernels.preconditioners import Preconditioner
from bnn.kernels.schedules import Schedule, value_at

Integrator = Literal["bbaoa", "symplectic_euler", "baoab", "obabo"]


class SGHMCState(NamedTuple):
    """State of SGHMC: position, momentum and the gradient kept between steps, each ``(chains, dim)``.

    The integrators that need no gradient from the step before keep an empty one, ``(chains, 0)``.
    """

    position: Tensor
    momentum: Tensor
    grad: Tensor


def init(position: Tensor, momentum: Tensor, grad: Tensor | None = None) -> SGHMCState:
    """The state at a starting position with a momentum drawn from N(0, T M)."""
    return SGHMCState(position, momentum, position[:, :0].clone() if grad is None else grad)


class Coefficients(NamedTuple):
    """Numbers of one step, each of shape () or (dim,)."""

    step_size: Tensor  # h
    velocity: Tensor  # h / M
    decay: Tensor  # c, or 1 − hC/M
    noise_scale: Tensor  # standard deviation of the noise in r


def symplectic_euler(
    state: SGHMCState, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], k: Coefficients
) -> tuple[SGHMCState, Evaluation]:
    """Momentum first, then position with the new momentum."""
    energy, grad = energy_and_grad(state.position)
    momentum = state.momentum * k.decay - grad * k.step_size + noise[0] * k.noise_scale
    position = state.position + momentum * k.velocity
    return SGHMCState(position, momentum, state.grad), Evaluation(state.position, energy, grad)


def bbaoa(
    state: SGHMCState, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], k: Coefficients
) -> tuple[SGHMCState, Evaluation]:
    """BAOAB started half a kick later, so that one gradient serves both of its B moves."""
    energy, grad = energy_and_grad(state.position)
    half = k.velocity * 0.5
    momentum = state.momentum - grad * k.step_size
    position = state.position + momentum * half
    momentum = momentum * k.decay + noise[0] * k.noise_scale
    position = position + momentum * half
    return SGHMCState(position, momentum, state.grad), Evaluation(state.position, energy, grad)


def baoab(
    state: SGHMCState, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], k: Coefficients
) -> tuple[SGHMCState, Evaluation]:
    """Kick, drift, fluctuate, drift, kick; the closing kick's gradient opens the next step."""
    half_step, half = k.step_size * 0.5, k.velocity * 0.5
    momentum = state.momentum - state.grad * half_step
    position = state.position + momentum * half
    momentum = momentum * k.decay + noise[0] * k.noise_scale
    position = position + momentum * half
    energy, grad = energy_and_grad(position)
    momentum = momentum - grad * half_step
    return SGHMCState(position, momentum, grad), Evaluation(position, energy, grad)


def obabo(
    state: SGHMCState, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], k: Coefficients
) -> tuple[SGHMCState, Evaluation]:
    """Fluctuate, leapfrog, fluctuate; the one splitting that admits an exact Metropolis test."""
    half_step = k.step_size * 0.5
    momentum = state.momentum * k.decay + noise[0] * k.noise_scale - state.grad * half_step
    position = state.position + momentum * k.velocity
    energy, grad = energy_and_grad(position)
    momentum = (momentum - grad * half_step) * k.decay + noise[1] * k.noise_scale
    return SGHMCState(position, momentum, grad), Evaluation(position, energy, grad)


def fluctuation(
    integrator: str,
    h: Number,
    friction: Number,
    mass: Number,
    temperature: float,
    gradient_variance: Number = 0.0,
    fresh: Number | None = None,
) -> tuple[Number, Number]:
    """The momentum's decay in a step, or in each half of one of obabo, and the variance of the noise that joins it.

    :param gradient_variance: h²V, which is taken from the noise.
    :param fresh: variance of a momentum that is drawn afresh in this step.
    """
    if integrator == "symplectic_euler":
        decay = 1.0 - h * friction / mass
        variance = 2.0 * h * friction * temperature - gradient_variance
        return (decay, variance) if fresh is None else (0.0 * decay, variance + decay**2 * fresh)
    interval, share = (0.5 * h, 0.5) if integrator == "obabo" else (h, 1.0)
    decay = np.exp(-interval * friction / mass)
    if fresh is not None:
        return 0.0 * decay, fresh
    return decay, mass * temperature * (1.0 - decay**2) - share * decay**2 * gradient_variance


INTEGRATORS = {"bbaoa": bbaoa, "symplectic_euler": symplectic_euler, "baoab": baoab, "obabo": obabo}
KEEPS_GRADIENT = ("baoab", "obabo")


class SGHMC(MomentumKernel):
    """Stochastic gradient Hamiltonian Monte Carlo (Chen et al. 2014), targeting exp(−U/T).

    The kernel to start with. To come from a learning rate and a momentum decay, see
    :func:`~bnn.kernels.step_size_and_friction`.

    :param model: a Pyro model; ``pyro.plate(..., subsample_size=B)`` in it makes the minibatches.
    :param step_size: time step h, stable below 2 / √(largest curvature of U / M); or ``"auto"``: the largest of an
        expected bias in variance below ``bias_tolerance``, found in warm-up (:mod:`bnn.kernels._bias`).
    :param friction: C, per unit of velocity. The momentum forgets at the rate C/M; M times the frequency of the
        slowest direction is a good value.
    :param temperature: T; 1 samples the posterior, whatever the data size.
    :param mass: M: a number, a dict of numbers per site, or a vector of ``dim`` values; or how it is learnt in warm-up:
        ``"auto"``, ``"dense"`` or a :class:`~bnn.kernels.Preconditioner`, and then ``friction`` is a rate, C/M.
    :param integrator: ``"bbaoa"`` (exact variance on a Gaussian), ``"symplectic_euler"``, ``"baoab"``, ``"obabo"``.
    :param gradient_noise: V, the variance of the minibatch gradient ∇Û per coordinate (number, dict or vector); the
        injected noise is reduced by h²V, to first order in h. Chen et al.'s B̂ is hV/2.
    :param momentum_resampling: draw the momentum afresh from N(0, T M) every so many steps; None for never.
    :param bias_tolerance: for ``step_size="auto"``.
    :param options: ``steps_per_sample``, ``batches``, ``compile``, ``replacement`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for settings that are negative, not finite, of a wrong shape, or a ``gradient_noise`` larger
        than the friction can absorb.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGHMC
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=10) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> mcmc = MCMC(SGHMC(model, step_size=0.02, friction=10.), num_samples=200, num_chains=8, disable_progbar=True)
    >>> mcmc.run(torch.full((100,), 2.))
    >>> bool((mcmc.get_samples()["mean"].mean() - 200 / 101).abs() < 0.1)
    True
    """

    balances_norms = True

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Schedule | Literal["auto"],
        friction: float | Schedule,
        temperature: float | Schedule = 1.0,
        mass: float | Mapping[str, Any] | Tensor | Literal["auto", "dense"] | Preconditioner = 1.0,
        integrator: Integrator = "bbaoa",
        gradient_noise: float | Mapping[str, Any] | Tensor = 0.0,
        momentum_resampling: int | None = None,
        bias_tolerance: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(model, step_size=step_size, friction=friction, mass=mass, temperature=temperature, **options)
        if integrator not in INTEGRATORS:
            raise ValueError(
                f"integrator {integrator!r} is unknown: choose one of {', '.join(map(repr, INTEGRATORS))}."
            )
        every = momentum_resampling
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"momentum_resampling is {momentum_resampling!r}; give a number of steps >= 1, or None.")
        check_tolerance(bias_tolerance)
        self.integrator, self.bias_tolerance = integrator, bias_tolerance
        self.gradient_noise, self.momentum_resampling = gradient_noise, momentum_resampling
        self.noises_per_step = 2 if integrator == "obabo" else 1

    def is_constant(self) -> bool:
        """Whether the coefficients are the same at every step: not where some steps resample the momentum."""
        return super().is_constant() and self.momentum_resampling in (None, 1)

    def phase(self, step: int) -> Hashable:
        """Whether the momentum is resampled, if nothing else changes."""
        if self.momentum_resampling is None or not super().is_constant():
            return None
        return step % self.momentum_resampling == 0

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> SGHMCState:
        """Momentum drawn from N(0, T M)."""
        momentum = self.fresh_momentum(position)
        grad = energy_and_grad(position)[1] if self.integrator in KEEPS_GRADIENT else None
        return init(position, momentum, grad)

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """h, h/M, the momentum's decay and the noise's standard deviation, then M⁻¹ for the statistics."""
        h, temperature = self.step_size_at(step), value_at(self.temperature, step)
        friction, mass = self._friction(step), self._mass()
        resample = self.momentum_resampling is not None and step % self.momentum_resampling == 0
        if self.adapts_step_size and self._warmup is not None and self._warmup.is_falling:
            resample = True  # a fall from far away would go on, for long, with the momentum that it gave
        gradient_variance = h**2 * self._gradient_noise()
        fresh = self._fresh_variance(step) if resample else None
        decay, variance = fluctuation(self.integrator, h, friction, mass, temperature, gradient_variance, fresh)
        if np.less(variance, 0.0).any():
            raise ValueError(
                f"gradient_noise asks to remove more noise (h²V up to {np.max(gradient_variance):.3g}) than the "
                f"friction of {friction:.3g} injects in a step of {h:.3g}: raise friction, or lower step_size or "
                "gradient_noise."
            )
        return h, h / mass, decay, np.sqrt(variance), 1.0 / mass

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[SGHMCState, Evaluation]:
        """One step of the chosen integrator."""
        return INTEGRATORS[self.integrator](state, energy_and_grad, noise, Coefficients(*coefficients[:4]))

    def step_rule(self) -> StepRule:
        """The step size of a bounded bias."""
        temperature = constant_temperature(self.temperature)
        if isinstance(self.friction, Schedule) or self.friction == 0:
            raise ValueError(
                f"friction is {self.friction}, and step_size='auto' needs a number > 0: without friction, noisy "
                "gradients heat the chain without end."
            )
        if np.any(self._gradient_noise()):
            raise ValueError(
                "step_size='auto' measures the noise of the gradients and chooses a step for it: leave gradient_noise "
                "out, or give step_size as a number."
            )
        weight = 1.0 / (self._friction(0) * temperature)
        damping = float(np.max(self._friction(0) / self._mass())) if self.integrator == "symplectic_euler" else 0.0
        model = BiasModel(2, 1.0 / self._mass(), weight, temperature, damping)
        refreshed = BiasModel(1, 1.0 / self._mass(), 1.0 / (self._mass() * temperature), temperature)
        return ExpectedBias(model, self.bias_tolerance, self.step_size_at(0), refreshed)

    def _fresh_variance(self, step: int) -> Number:
        """Variance of a momentum that is drawn afresh: T M."""
        return self._mass() * value_at(self.temperature, step)

    def _gradient_noise(self) -> Number:
        return self.per_coordinate("gradient_noise", self.gradient_noise, default=0.0, positive=False)
