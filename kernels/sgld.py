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
from typing import Any, Literal, NamedTuple

import numpy as np
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation, StochasticGradientKernel
from bnn.kernels._bias import BiasModel, ExpectedBias, check_tolerance, constant_temperature
from bnn.kernels._coordinates import Number
from bnn.kernels._warmup import StepRule
from bnn.kernels.preconditioners import Preconditioner, preconditioner_of
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
    :param step_size: time step h; half of Welling and Teh's ε. Stable below 2 / (largest curvature of U). ``"auto"``
        takes the largest of an expected bias in variance below ``bias_tolerance``, found in warm-up
        (:mod:`bnn.kernels._bias`).
    :param temperature: T; 1 samples the posterior, whatever the data size.
    :param preconditioner: P: a number, a dict of numbers per site, or a vector of ``dim`` values; or how it is learnt
        in warm-up: ``"auto"``, ``"dense"`` or a :class:`~bnn.kernels.Preconditioner`.
    :param bias_tolerance: for ``step_size="auto"``.
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
        step_size: float | Schedule | Literal["auto"],
        temperature: float | Schedule = 1.0,
        preconditioner: float | Mapping[str, Any] | Tensor | Literal["auto", "dense"] | Preconditioner = 1.0,
        bias_tolerance: float = 0.05,
        **options: Any,
    ) -> None:
        super().__init__(model, step_size=step_size, temperature=temperature, **options)
        check_tolerance(bias_tolerance)
        self.metric = preconditioner_of("preconditioner", preconditioner)
        self.preconditioner = preconditioner if self.metric is None else 1.0
        self.bias_tolerance = bias_tolerance

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> SGLDState:
        """The state at a starting position."""
        del energy_and_grad
        return init(position)

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The drift −hP and the noise scale √(2hTP)."""
        h, temperature = self.step_size_at(step), value_at(self.temperature, step)
        preconditioner = self._preconditioner()
        return -h * preconditioner, np.sqrt(2.0 * h * temperature * preconditioner)

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[SGLDState, Evaluation]:
        """One step of :func:`update`."""
        drift, noise_scale = coefficients
        return update(state, energy_and_grad, noise[0], drift=drift, noise_scale=noise_scale)

    def step_rule(self) -> StepRule:
        """The step size of a bounded bias."""
        temperature, preconditioner = constant_temperature(self.temperature), self._preconditioner()
        model = BiasModel(1, preconditioner, preconditioner / temperature, temperature)
        return ExpectedBias(model, self.bias_tolerance, self.step_size_at(0))

    def _preconditioner(self) -> Number:
        return self.per_coordinate("preconditioner", self.preconditioner)
