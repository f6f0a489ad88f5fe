"""Stochastic gradient Nosé–Hoover thermostats: SGHMC that finds out how much noise its gradients have.

    dz = M⁻¹ r dt,   dr = −∇U dt − (C M⁻¹ + ζ) r dt + √(2CT) dW,   dζ = (rᵀM⁻¹r / d − T) / (μT) dt

Stationary law exp(−U/T) · N(r; 0, TM) · N(ζ; 0, 1/(dμ)). Unknown gradient noise of one variance for all coordinates,
which heats SGHMC, only moves the mean of ζ: the thermostat raises the friction until the momenta are at T. With a
thermostat per coordinate, dζ_i = (r_i²/M_i − T) / (μT) dt, each coordinate finds its own.

Ding, Fang, Babbush, Chen, Skeel and Neven (2014), "Bayesian sampling using stochastic gradient thermostats", NeurIPS;
their ξ is C/M + ζ. One step, with κ = C/M + ζ, c = exp(−hκ), ξ ~ N(0, I) and one gradient ∇Û, is the splitting of
Leimkuhler and Shang (2016), "Adaptive thermostats for noisy gradient systems", SIAM J. Sci. Comput., with its two
kicks together:

    r ← r − h ∇Û(z);   z ← z + h/2 r/M;   ζ ← ζ + h/2 (rᵀM⁻¹r/d − T)/(μT);
    r ← c r + √(CT (1 − c²)/κ) ξ;   ζ ← ζ + h/2 (rᵀM⁻¹r/d − T)/(μT);   z ← z + h/2 r/M

Bias: O(h²) with exact gradients. In stationarity the two momenta that drive ζ have the temperature T exactly in the
mean, at any h and whatever the noise. Noise that differs between coordinates is averaged by the scalar thermostat.
Cost: one gradient a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation
from bnn.kernels._coordinates import Number
from bnn.kernels._momentum import MomentumKernel
from bnn.kernels.preconditioners import Preconditioner
from bnn.kernels.schedules import Schedule, check_setting, value_at

THERMOSTATS = ("scalar", "per_coordinate")


class SGNHTState(NamedTuple):
    """Position and momentum ``(chains, dim)``, and the thermostats ζ ``(chains, 1)`` or ``(chains, dim)``."""

    position: Tensor
    momentum: Tensor
    thermostat: Tensor


def init(position: Tensor, momentum: Tensor, per_coordinate: bool) -> SGNHTState:
    """The state at a starting position with a momentum drawn from N(0, T M): ζ = 0."""
    return SGNHTState(position, momentum, torch.zeros_like(position if per_coordinate else position[:, :1]))


class Coefficients(NamedTuple):
    """Numbers of one step, each of shape () or (dim,)."""

    step_size: Tensor  # h
    rate: Tensor  # C / M
    noise: Tensor  # C T
    temperature: Tensor  # T
    gain: Tensor  # h / (2 μ T)
    inverse_mass: Tensor  # 1 / M


def update(
    state: SGNHTState, energy_and_grad: EnergyAndGrad, noise: Tensor, k: Coefficients
) -> tuple[SGNHTState, Evaluation]:
    """One step of the splitting."""
    energy, grad = energy_and_grad(state.position)
    half = k.step_size * 0.5 * k.inverse_mass
    momentum = state.momentum - grad * k.step_size
    position = state.position + momentum * half
    thermostat = state.thermostat + _excess(momentum, state.thermostat, k)
    friction = thermostat + k.rate
    decay = torch.exp(friction * -k.step_size)
    momentum = momentum * decay + noise * (k.noise * _mean_decay(friction, k.step_size)).sqrt()
    thermostat = thermostat + _excess(momentum, thermostat, k)
    position = position + momentum * half
    return SGNHTState(position, momentum, thermostat), Evaluation(state.position, energy, grad)


def _excess(momentum: Tensor, thermostat: Tensor, k: Coefficients) -> Tensor:
    """h/2 (r²/M − T)/(μT), for the mean over coordinates or for each."""
    kinetic = momentum.square() * k.inverse_mass
    if thermostat.shape != momentum.shape:
        kinetic = kinetic.mean(-1, keepdim=True)
    return (kinetic - k.temperature) * k.gain


def _mean_decay(friction: Tensor, step_size: Tensor) -> Tensor:
    """(1 − exp(−2hκ)) / κ, for κ of any sign, 2h at zero."""
    twice = friction * (step_size * 2.0)
    small = twice.abs() < 1e-4
    exact = -torch.expm1(-twice) / torch.where(small, 1.0, friction)
    return torch.where(small, step_size * (2.0 - twice), exact)


class SGNHT(MomentumKernel):
    """Stochastic gradient Nosé–Hoover thermostat (Ding et al. 2014), targeting exp(−U/T) under unknown gradient noise.

    As :class:`~bnn.kernels.SGHMC`, with a friction that adapts itself. ``sample_stats`` hold the mean of ζ: what it
    adds to C/M is what the gradient noise of variance V asks for, hV/(2MT).

    :param model: a Pyro model; ``pyro.plate(..., subsample_size=B)`` in it makes the minibatches.
    :param step_size: time step h.
    :param friction: C, per unit of velocity: the friction and noise that the chain has by itself.
    :param temperature: T; 1 samples the posterior. Above 0: the thermostat has nothing to hold on to at 0.
    :param mass: M: a number, a dict of numbers per site, or a vector of ``dim`` values; or how it is learnt in warm-up:
        ``"auto"``, ``"dense"`` or a :class:`~bnn.kernels.Preconditioner`, and then ``friction`` is a rate, C/M.
    :param thermostat: ``"scalar"``, one for all coordinates, or ``"per_coordinate"``.
    :param thermostat_mass: μ, how slowly ζ moves, in units of time squared.
    :param options: ``steps_per_sample``, ``batches``, ``compile``, ``replacement`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for settings that are negative, not finite, or of a wrong shape.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGNHT
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=10) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> mcmc = MCMC(SGNHT(model, step_size=0.02, friction=10.), num_samples=200, num_chains=8, disable_progbar=True)
    >>> mcmc.run(torch.full((100,), 2.))
    >>> bool((mcmc.get_samples()["mean"].mean() - 200 / 101).abs() < 0.1)
    True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Schedule,
        friction: float | Schedule,
        temperature: float | Schedule = 1.0,
        mass: float | Mapping[str, Any] | Tensor | Literal["auto", "dense"] | Preconditioner = 1.0,
        thermostat: Literal["scalar", "per_coordinate"] = "scalar",
        thermostat_mass: float = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, step_size=step_size, friction=friction, mass=mass, temperature=temperature, **options)
        check_setting("thermostat_mass", thermostat_mass, strict=True)
        if thermostat not in THERMOSTATS:
            raise ValueError(
                f"thermostat {thermostat!r} is unknown: choose one of {', '.join(map(repr, THERMOSTATS))}."
            )
        if value_at(temperature, 0) == 0.0:
            raise ValueError("temperature is 0, where a thermostat has nothing to hold on to: use SGHMC.")
        self.thermostat, self.thermostat_mass = thermostat, thermostat_mass

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> SGNHTState:
        """Momentum drawn from N(0, T M), thermostats at zero."""
        del energy_and_grad
        return init(position, self.fresh_momentum(position), self.thermostat == "per_coordinate")

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The numbers of :class:`Coefficients`."""
        h, temperature = value_at(self.step_size, step), value_at(self.temperature, step)
        friction, mass = value_at(self.friction, step), self._mass()
        gain = 0.5 * h / (self.thermostat_mass * temperature)
        return h, friction / mass, friction * temperature, temperature, gain, 1.0 / mass

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[SGNHTState, Evaluation]:
        """One step of :func:`update`."""
        return update(state, energy_and_grad, noise[0], Coefficients(*coefficients))

    def extra_stats(self, state: Any) -> dict[str, Tensor]:
        """Mean of the thermostats."""
        return {"thermostat": state.thermostat.mean(-1)}
