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
Cost: one gradient of all data a step; the energies come with the gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation
from bnn.kernels._coordinates import Number
from bnn.kernels._corrected import CorrectedKernel, chances
from bnn.kernels._run import Run
from bnn.kernels.schedules import value_at


class GGMCState(NamedTuple):
    """Position, momentum, gradient ``(chains, dim)``; energy, and acceptance of the last proposal ``(chains, 1)``."""

    position: Tensor
    momentum: Tensor
    grad: Tensor
    energy: Tensor
    acceptance: Tensor


class Coefficients(NamedTuple):
    """Numbers of one proposal, each of shape () or (dim,)."""

    half_step: Tensor  # h / 2
    velocity: Tensor  # h / M
    decay: Tensor  # c
    noise_scale: Tensor  # √(TM(1 − c²))
    slack: Tensor  # 0, or negative early in warm-up: see bnn.kernels._corrected
    inverse_temperature: Tensor  # 1 / T
    inverse_mass: Tensor  # 1 / M


def init(position: Tensor, momentum: Tensor, energy: Tensor, grad: Tensor) -> GGMCState:
    """The state between two proposals."""
    energy = energy.unsqueeze(-1)
    return GGMCState(position, momentum, grad, energy, torch.ones_like(energy))


def refresh(state: GGMCState, noise: Tensor, k: Coefficients) -> GGMCState:
    """A proposal's start."""
    return state._replace(momentum=state.momentum * k.decay + noise * k.noise_scale)


def leapfrog(state: GGMCState, energy_and_grad: EnergyAndGrad, k: Coefficients) -> tuple[GGMCState, Evaluation]:
    """One of its steps; the energy in the state is still that of the start."""
    momentum = state.momentum - state.grad * k.half_step
    position = state.position + momentum * k.velocity
    energy, grad = energy_and_grad(position)
    moved = state._replace(position=position, momentum=momentum - grad * k.half_step, grad=grad)
    return moved, Evaluation(position, energy, grad)


def test(before: GGMCState, after: GGMCState, energy: Tensor, uniform: Tensor, k: Coefficients) -> GGMCState:
    """The Metropolis test at its end: ``after``, or ``before`` with the momentum turned round."""
    change = (before.momentum - after.momentum) * (before.momentum + after.momentum) * k.inverse_mass
    kinetic = 0.5 * change.sum(-1, keepdim=True)
    probability = chances(before.energy, energy, kinetic, k.slack, k.inverse_temperature)
    stays = uniform < probability
    position = torch.where(stays, after.position, before.position)
    momentum = torch.where(stays, after.momentum, -before.momentum)
    grad = torch.where(stays, after.grad, before.grad)
    return GGMCState(position, momentum, grad, torch.where(stays, energy, before.energy), probability)


class GGMC(CorrectedKernel):
    """Gradient-guided Monte Carlo (Garriga-Alonso and Fortuin 2021): corrected SGHMC on all data, exact at any step.

    Hamiltonian Monte Carlo is ``friction=None`` with some ``num_steps``. Data that do not fit at once are summed over
    in chunks: the minibatches of ``pyro.plate(..., subsample_size=B)``, or of ``batches=``. For steps on a minibatch
    each, see :class:`~bnn.kernels.AMAGOLD`.

    :param model: a Pyro model; each gradient is of all rows of its plates.
    :param step_size: time step h; acceptance in ``sample_stats`` says whether it is too long. ``"auto"`` finds the one
        of mean acceptance ``target_acceptance`` (0.8) in warm-up.
    :param friction: C, per unit of velocity; None draws the momentum afresh for every proposal.
    :param num_steps: L, leapfrog steps per proposal.
    :param temperature: T > 0; 1 samples the posterior.
    :param mass: M: a number, a dict of numbers per site, or a vector of ``dim`` values; or how it is learnt in warm-up:
        ``"auto"``, ``"dense"`` or a :class:`~bnn.kernels.Preconditioner`, and then ``friction`` is a rate, C/M.
    :param options: ``steps_per_sample`` (proposals per draw), ``batches``, ``compile`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for settings out of range, a model whose energy is random, or batches that are not the same data
        in every pass.
    :raises NotImplementedError: for several ``batches`` unless the model has one subsampled plate.

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

    needs_all_data = True

    def __init__(self, model: Callable[..., Any], **settings: Any) -> None:
        super().__init__(model, **settings)
        self.tests_in_steps = self.num_steps == 1
        self.observes_energy = not self.tests_in_steps
        self.noises_per_step = int(self.tests_in_steps)

    def check_plan(self, draws: int | None) -> None:
        """:raises ValueError: for a model whose energy is random, or batches that differ from pass to pass."""
        super().check_plan(draws)
        if self.batches is None:
            return
        run = self._running
        energy, again = run.state.energy[:, 0], run.full_energy(run.state.position)
        if not torch.allclose(energy, again, rtol=torch.finfo(energy.dtype).eps ** 0.5):
            raise ValueError(
                f"two passes through batches= gave energies {energy.tolist()} and {again.tolist()} at one place, and a "
                "Metropolis test needs the same data in each: leave augmentation out of the loader, or use SGHMC."
            )

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> GGMCState:
        """Momentum drawn from N(0, T M)."""
        energy, grad = energy_and_grad(position)
        return init(position, self.fresh_momentum(position), energy, grad)

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The numbers of :class:`Coefficients`."""
        del step
        h, temperature, mass = self.step_size_at(0), value_at(self.temperature, 0), self._mass()
        decay = 0.0 if self.friction is None else np.exp(-h * self.num_steps * self.friction / mass)
        noise_scale = np.sqrt(temperature * mass * (1.0 - decay**2))
        return 0.5 * h, h / mass, decay, noise_scale, self.slack, 1.0 / temperature, 1.0 / mass

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[GGMCState, Evaluation]:
        """A leapfrog step, which is a whole proposal where ``num_steps`` is 1."""
        k = Coefficients(*coefficients)
        before = refresh(state, noise[0], k) if self.tests_in_steps else state
        moved, evaluation = leapfrog(before, energy_and_grad, k)
        if not self.tests_in_steps:
            return moved, evaluation
        energy = evaluation.energy.unsqueeze(-1)
        state = test(before, moved, energy, torch.rand_like(energy), k)
        return state, Evaluation(state.position, state.energy[:, 0], state.grad)

    def start(self, run: Run) -> GGMCState:
        """Where the chains are, with the momentum refreshed."""
        return refresh(run.state, torch.randn_like(run.state.position), Coefficients(*run.numbers_at(0)))

    def decide(
        self, run: Run, ends: Sequence[Any], uniform: Tensor, tested: Sequence[Tensor], map_and_numbers: Any
    ) -> tuple[GGMCState, Tensor]:
        """:func:`test`, and the statistics of the state that follows."""
        (before, after), (energy,), (to_model, numbers) = ends, tested, map_and_numbers
        state = test(before, after, energy, uniform, Coefficients(*numbers))
        evaluation = Evaluation(state.position, state.energy[:, 0], state.grad)
        return state, run.statistics.row(before, state, evaluation, to_model(state.position), numbers)
