"""AMAGOLD: stochastic gradient Hamiltonian Monte Carlo with one Metropolis test for many minibatch steps.

    dz = M⁻¹ r dt,   dr = −∇U dt − C M⁻¹ r dt + √(2CT) dW         stationary law exp(−U/T) · N(r; 0, T M)

One proposal from (z₀, r₀), with x = hC/(2M), ξ ~ N(0, I), a fresh minibatch gradient ∇Û in each of L steps, and ρ = 0
at first:

    z ← z + h/2 r/M
    r' ← ((1 − x) r − h ∇Û(z) + √(4xTM) ξ) / (1 + x);   ρ ← ρ + h/2 ∇Û(z)ᵀM⁻¹(r + r');   r ← r'
    z ← z + h/2 r/M
    at the end, with probability min(1, exp((U(z₀) − U(z) + ρ)/T)), stay there; else go back, to (z₀, −r₀)

Zhang, Cooper and De Sa (2020), "AMAGOLD: amortized Metropolis adjustment for efficient stochastic gradient MCMC",
AISTATS, Algorithm 2 (their εβ is x). The chain is skew-reversible: run backwards with the momentum turned round, each
minibatch gradient is met at the same place. The code published with it leaves the prior out of U in the test; here it
is in.

Bias: none, whatever the minibatches, if these are drawn independently. Noisy gradients cost acceptance, not exactness.
Cost: one minibatch gradient a step, and one energy of all data per proposal.
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


class AMAGOLDState(NamedTuple):
    """Position and momentum ``(chains, dim)``; ρ, energy of all data at the start, acceptance ``(chains, 1)``."""

    position: Tensor
    momentum: Tensor
    work: Tensor
    energy: Tensor
    acceptance: Tensor


class Coefficients(NamedTuple):
    """Numbers of one step, each of shape () or (dim,)."""

    half_velocity: Tensor  # h / (2M)
    kept: Tensor  # (1 − x) / (1 + x)
    kick: Tensor  # h / (1 + x)
    noise_scale: Tensor  # √(4xTM) / (1 + x)
    slack: Tensor  # 0, or negative early in warm-up: see bnn.kernels._corrected
    inverse_temperature: Tensor  # 1 / T
    inverse_mass: Tensor  # 1 / M


def init(position: Tensor, momentum: Tensor, energy: Tensor) -> AMAGOLDState:
    """The state between two proposals."""
    energy = energy.unsqueeze(-1)
    return AMAGOLDState(position, momentum, torch.zeros_like(energy), energy, torch.ones_like(energy))


def update(
    state: AMAGOLDState, energy_and_grad: EnergyAndGrad, noise: Tensor, k: Coefficients
) -> tuple[AMAGOLDState, Evaluation]:
    """One step of a proposal."""
    position = state.position + state.momentum * k.half_velocity
    energy, grad = energy_and_grad(position)
    momentum = state.momentum * k.kept - grad * k.kick + noise * k.noise_scale
    work = state.work + (grad * (state.momentum + momentum) * k.half_velocity).sum(-1, keepdim=True)
    moved = AMAGOLDState(position + momentum * k.half_velocity, momentum, work, state.energy, state.acceptance)
    return moved, Evaluation(position, energy, grad)


def test(
    before: AMAGOLDState, after: AMAGOLDState, energy: Tensor, uniform: Tensor, k: Coefficients
) -> tuple[AMAGOLDState, Tensor]:
    """The Metropolis test of a whole proposal: the state that follows, and which chains stay ``(chains, 1)``."""
    probability = chances(before.energy, energy, after.work, k.slack, k.inverse_temperature)
    stays = uniform < probability
    position = torch.where(stays, after.position, before.position)
    momentum = torch.where(stays, after.momentum, -before.momentum)
    energy = torch.where(stays, energy, before.energy)
    return AMAGOLDState(position, momentum, torch.zeros_like(energy), energy, probability), stays


class AMAGOLD(CorrectedKernel):
    """Amortised Metropolis-adjusted SGHMC on minibatches (Zhang et al. 2020): exact at any step size.

    :param model: a Pyro model; ``pyro.plate(..., subsample_size=B)`` in it makes the minibatches.
    :param step_size: time step h; acceptance in ``sample_stats`` says whether it is too long. ``"auto"`` finds the one
        of mean acceptance ``target_acceptance`` (0.8) in warm-up.
    :param friction: C, per unit of velocity; None draws the momentum afresh for every proposal.
    :param num_steps: L, minibatch steps per proposal.
    :param temperature: T > 0; 1 samples the posterior.
    :param mass: M: a number, a dict of numbers per site, or a vector of ``dim`` values; or how it is learnt in warm-up:
        ``"auto"``, ``"dense"`` or a :class:`~bnn.kernels.Preconditioner`, and then ``friction`` is a rate, C/M.
    :param options: ``steps_per_sample`` (proposals per draw), ``compile`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for settings out of range, ``batches=``, or a model whose energy is random.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import AMAGOLD, MCMC
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=50) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> kernel = AMAGOLD(model, step_size=0.03, friction=5., num_steps=5)
    >>> mcmc = MCMC(kernel, num_samples=500, num_chains=8, disable_progbar=True)
    >>> mcmc.run(torch.full((100,), 2.))
    >>> bool((mcmc.get_samples()["mean"].mean() - 200 / 101).abs() < 0.02)
    True
    """

    evaluates_at_draws = False  # but half a step before one that the test may still refuse

    def __init__(self, model: Callable[..., Any], *, num_steps: int = 10, **settings: Any) -> None:
        if settings.get("batches") is not None:
            raise ValueError(
                "batches= fixes the order of the minibatches, and AMAGOLD's test needs each order to be as likely as "
                "its reverse: pass all data to run(), and subsample in the model's plate; or use GGMC."
            )
        if not settings.get("replacement", True):
            raise ValueError("replacement=False: AMAGOLD's test needs minibatches that are drawn independently.")
        super().__init__(model, num_steps=num_steps, **settings)

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> AMAGOLDState:
        """Momentum drawn from N(0, T M), and the energy of all data."""
        del energy_and_grad
        return init(position, self.fresh_momentum(position), self._running.full_energy(position))

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The numbers of :class:`Coefficients`."""
        del step
        h, temperature, mass = self.step_size_at(0), value_at(self.temperature, 0), self._mass()
        x = 0.5 * h * (self.friction or 0.0) / mass
        noise_scale = np.sqrt(4.0 * x * temperature * mass) / (1.0 + x)
        moves = 0.5 * h / mass, (1.0 - x) / (1.0 + x), h / (1.0 + x), noise_scale
        return *moves, self.slack, 1.0 / temperature, 1.0 / mass

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[AMAGOLDState, Evaluation]:
        """One step of :func:`update`."""
        return update(state, energy_and_grad, noise[0], Coefficients(*coefficients))

    def start(self, run: Run) -> AMAGOLDState:
        """Where the chains are; without friction, with a momentum drawn afresh."""
        state: AMAGOLDState = run.state
        return state if self.friction is not None else state._replace(momentum=self.fresh_momentum(state.position))

    def tested(self, run: Run, observed: Tensor, known: Tensor | None) -> list[Tensor]:
        """The energy of all data at the end, and the statistics of the last step and of the start."""
        known = torch.nan_to_num(observed) if known is None else known  # nothing is known before the first proposal
        return [run.full_energy(run.state.position).unsqueeze(-1), observed, known]

    def decide(
        self, run: Run, ends: Sequence[Any], uniform: Tensor, tested: Sequence[Tensor], map_and_numbers: Any
    ) -> tuple[AMAGOLDState, Tensor]:
        """:func:`test`, and the statistics with what is said of a state said anew."""
        (energy, stats, known), (to_model, numbers) = tested, map_and_numbers
        before, after = ends
        state, stays = test(before, after, energy, uniform, Coefficients(*numbers))
        stats = torch.where(stays, stats, known)
        return state, run.statistics.with_state(stats, state, to_model(state.position), numbers)
