"""Stochastic gradient Langevin dynamics.

    dz = −P ∇U(z) dt + √(2 T P) dW                               stationary law exp(−U/T)

    z ← z − h P ∇Û(z) + √(2 h T P) ξ,   ξ ~ N(0, I)

Welling and Teh (2011), "Bayesian learning via stochastic gradient Langevin dynamics", ICML, equation 4; their ε is
our 2h, P = I. Û is the minibatch estimate of U.

Bias: O(h). On U = ½ k z² with P = 1 the variance is exactly (T + hV/2) / (k (1 − hk/2)), V the variance of ∇Û.
Cost: one gradient a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation, StochasticGradientKernel
from bnn.kernels._coordinates import Number
from bnn.kernels.schedules import Schedule, value_at


class SGLDState(NamedTuple):
    """State of SGLD: the position ``(chains, dim)``."""

    position: Tensor


def init(position: Tensor) -> SGLDState:
    """The state at a starting position."""
    return SGLDState(position)


def update(
    state: SGLDState, energy_and_grad: EnergyAndGrad, noise: Tensor, *, drift: Tensor, noise_scale: Tensor
) -> tuple[SGLDState, Evaluation]:
    """One step: ``z + drift · ∇Û(z) + noise_scale · ξ`` with drift −hP and noise scale √(2hTP)."""
    energy, grad = energy_and_grad(state.position)
    position = state.position + grad * drift + noise * noise_scale
    return SGLDState(position), Evaluation(state.position, energy, grad)


class SGLD(StochasticGradientKernel):
    """Stochastic gradient Langevin dynamics (Welling and Teh 2011), targeting exp(−U/T).

    The simplest sampler for minibatches. :class:`~bnn.kernels.SGHMC` costs the same per step, and moves faster and
    with less bias wherever the posterior is not round.

    :param model: a Pyro model; ``pyro.plate(..., subsample_size=B)`` in it makes the minibatches.
    :param step_size: time step h; half of Welling and Teh's ε. Stable below 2 / (largest curvature of U).
    :param temperature: T; 1 samples the posterior, whatever the data size.
    :param preconditioner: P, fixed: a number, a dict of numbers per site, or a vector of ``dim`` values.
    :param options: ``steps_per_sample``, ``batches``, ``compile``, ``replacement`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for settings that are negative, not finite, or of a wrong shape.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGLD
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=10) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> mcmc = MCMC(SGLD(model, step_size=1e-3), num_samples=200, num_chains=8, disable_progbar=True)
    >>> mcmc.run(torch.full((100,), 2.))
    >>> bool((mcmc.get_samples()["mean"].mean() - 200 / 101).abs() < 0.1)
    True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Schedule,
        temperature: float | Schedule = 1.0,
        preconditioner: float | Mapping[str, Any] | Tensor | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, step_size=step_size, temperature=temperature, **options)
        self.preconditioner = preconditioner

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> SGLDState:
        """The state at a starting position."""
        del energy_and_grad
        return init(position)

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The drift −hP and the noise scale √(2hTP)."""
        h, temperature = value_at(self.step_size, step), value_at(self.temperature, step)
        preconditioner = self.per_coordinate(
            "preconditioner", 1.0 if self.preconditioner is None else self.preconditioner
        )
        return -h * preconditioner, np.sqrt(2.0 * h * temperature * preconditioner)

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[SGLDState, Evaluation]:
        """One step of :func:`update`."""
        drift, noise_scale = coefficients
        return update(state, energy_and_grad, noise[0], drift=drift, noise_scale=noise_scale)
