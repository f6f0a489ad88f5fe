"""Gradient-guided Monte Carlo: underdamped Langevin dynamics with a Metropolis test, exact at any step size.

    dz = M⁻¹ r dt,   dr = −∇U dt − C M⁻¹ r dt + √(2CT) dW         stationary law exp(−U/T) · N(r; 0, T M)

One proposal, with t = hL, c = exp(−tC/M), ξ ~ N(0, I) and L gradients ∇U of all data:

    r ← c r + √(TM(1 − c²)) ξ
    L times   r ← r − h/2 ∇U(z);   z ← z + h r/M;   r ← r − h/2 ∇U(z)
    with probability min(1, exp(−ΔH/T)), H = U + ½ rᵀM⁻¹r, stay there; else go back, with −r

Garriga-Alonso and Fortuin (2021), "Exact Langevin dynamics with stochastic gradients", AABI, arXiv 2102.01691, for
L = 1: the splitting OBABO, the two O moves that meet joined in one. Horowitz (1991), "A generalized guided Monte Carlo
algorithm", Physics Letters B, for any L. Without memory of the momentum, c = 0, it is Hamiltonian Monte Carlo.

Bias: none, in exact arithmetic. ΔU is a difference of energies: where U exceeds about 10⁶, use float64.
Cost: one gradient a step; the energies come with the gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation
from bnn.kernels._coordinates import Number
from bnn.kernels._corrected import CorrectedKernel, acceptance, settling_acceptance
from bnn.kernels.schedules import value_at


class GGMCState(NamedTuple):
    """Where a chain is in its proposal, and where the proposal started; columns are chains' own.

    Position, momentum and gradient are ``(chains, dim)``, energy and acceptance ``(chains, 1)``. Proposals of one step
    keep no start between steps: ``(chains, 0)``.
    """

    position: Tensor
    momentum: Tensor
    grad: Tensor
    energy: Tensor
    acceptance: Tensor
    start_position: Tensor
    start_momentum: Tensor
    start_grad: Tensor
    start_energy: Tensor


class Coefficients(NamedTuple):
    """Numbers of one step, each of shape () or (dim,)."""

    half_step: Tensor  # h / 2
    velocity: Tensor  # h / M
    decay: Tensor  # c in the first step of a proposal, else 1
    noise_scale: Tensor  # √(TM(1 − c²)) there, else 0
    inverse_temperature: Tensor  # 1 / T
    is_first: Tensor  # 1 in the first step of a proposal, else 0
    is_last: Tensor  # 1 in the last, else 0
    is_settling: Tensor  # 1 early in warm-up, else 0
    inverse_mass: Tensor  # 1 / M


def init(position: Tensor, momentum: Tensor, energy: Tensor, grad: Tensor, num_steps: int) -> GGMCState:
    """The state between two proposals."""
    energy = energy.unsqueeze(-1)
    start = (position, momentum, grad, energy)
    kept = [part.clone() if num_steps > 1 else part[:, :0].clone() for part in start]
    return GGMCState(*start, torch.ones_like(energy), *kept)


def update(
    state: GGMCState, energy_and_grad: EnergyAndGrad, noise: Tensor, uniform: Tensor, k: Coefficients, num_steps: int
) -> tuple[GGMCState, Evaluation]:
    """One leapfrog step; the momentum's refreshment before the first, the test after the last."""
    position, old_grad = state.position, state.grad
    momentum = state.momentum * k.decay + noise * k.noise_scale
    start: tuple[Tensor, ...] = (position, momentum, old_grad, state.energy)
    if num_steps > 1:
        first = k.is_first > 0
        kept = (state.start_position, state.start_momentum, state.start_grad, state.start_energy)
        start = tuple(torch.where(first, new, old) for new, old in zip(start, kept, strict=True))
    momentum = momentum - old_grad * k.half_step
    position = position + momentum * k.velocity
    energy, grad = energy_and_grad(position)
    momentum, energy = momentum - grad * k.half_step, energy.unsqueeze(-1)
    start_position, start_momentum, start_grad, start_energy = start
    kinetic = ((momentum - start_momentum) * (momentum + start_momentum) * k.inverse_mass).sum(-1, keepdim=True)
    excess = (energy - start_energy + 0.5 * kinetic) * k.inverse_temperature
    fall = (start_energy - energy) * k.inverse_temperature
    probability = torch.where(k.is_settling > 0, settling_acceptance(excess, fall), acceptance(excess))
    stays = uniform < probability
    if num_steps > 1:
        last = k.is_last > 0
        stays, probability = stays | ~last, torch.where(last, probability, state.acceptance)
    position = torch.where(stays, position, start_position)
    momentum = torch.where(stays, momentum, -start_momentum)
    grad = torch.where(stays, grad, start_grad)
    energy = torch.where(stays, energy, start_energy)
    remembered = start if num_steps > 1 else tuple(state[5:])
    return GGMCState(position, momentum, grad, energy, probability, *remembered), Evaluation(
        position, energy[:, 0], grad
    )


class GGMC(CorrectedKernel):
    """Gradient-guided Monte Carlo (Garriga-Alonso and Fortuin 2021): corrected SGHMC on all data, exact at any step.

    Hamiltonian Monte Carlo is ``friction=None`` with some ``num_steps``. For minibatches, see
    :class:`~bnn.kernels.AMAGOLD`.

    :param model: a Pyro model without subsampling.
    :param step_size: time step h; acceptance in ``sample_stats`` says whether it is too long. ``"auto"`` finds the one
        of mean acceptance ``target_acceptance`` (0.8) in warm-up.
    :param friction: C, per unit of velocity; None draws the momentum afresh for every proposal.
    :param num_steps: L, leapfrog steps per proposal.
    :param temperature: T > 0; 1 samples the posterior.
    :param mass: M: a number, a dict of numbers per site, or a vector of ``dim`` values; or how it is learnt in warm-up:
        ``"auto"``, ``"dense"`` or a :class:`~bnn.kernels.Preconditioner`, and then ``friction`` is a rate, C/M.
    :param options: ``steps_per_sample`` (proposals per draw), ``compile`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for settings out of range, or a model whose energy is random.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import GGMC, MCMC
    >>> def model():
    ...     pyro.sample("z", dist.StudentT(4., torch.zeros(20), 1.).to_event(1))
    >>> pyro.set_rng_seed(0)
    >>> mcmc = MCMC(GGMC(model, step_size=0.8, friction=1.), num_samples=2000, num_chains=4, disable_progbar=True)
    >>> mcmc.run()
    >>> bool((mcmc.get_samples()["z"].var() - 2).abs() < 0.2), bool(mcmc.sample_stats["acceptance_rate"].mean() > 0.7)
    (True, True)
    """

    def check_plan(self, draws: int | None) -> None:
        """:raises ValueError: for a model that subsamples, or draws random numbers of its own."""
        super().check_plan(draws)
        if self.potential.plates:
            raise ValueError(
                f"the model subsamples at plates {list(self.potential.plates)}, and GGMC's Metropolis test is for "
                "gradients of all data: leave subsample_size out of the model, or use AMAGOLD, which corrects for it."
            )

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> GGMCState:
        """Momentum drawn from N(0, T M)."""
        energy, grad = energy_and_grad(position)
        return init(position, self.fresh_momentum(position), energy, grad, self.num_steps)

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The numbers of :class:`Coefficients`."""
        h, temperature, mass, place = (
            self.step_size_at(0),
            value_at(self.temperature, 0),
            self._mass(),
            step % self.num_steps,
        )
        decay = 0.0 if self.friction is None else np.exp(-h * self.num_steps * self.friction / mass)
        scale = np.sqrt(temperature * mass * (1.0 - decay**2))
        decay, scale = (decay, scale) if place == 0 else (0.0 * decay + 1.0, 0.0 * scale)
        flags = float(place == 0), float(place == self.num_steps - 1), float(self.is_settling(step))
        return 0.5 * h, h / mass, decay, scale, 1.0 / temperature, *flags, 1.0 / mass

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[GGMCState, Evaluation]:
        """One step of :func:`update`."""
        uniform = torch.rand_like(state.energy)
        return update(state, energy_and_grad, noise[0], uniform, Coefficients(*coefficients), self.num_steps)
