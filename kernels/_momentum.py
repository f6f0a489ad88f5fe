"""What kernels with a momentum share: mass, friction, and momenta of the law N(0, T M)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.kernels._base import StochasticGradientKernel
from bnn.kernels._coordinates import Number
from bnn.kernels.preconditioners import Preconditioner, preconditioner_of
from bnn.kernels.schedules import Schedule, check_setting, value_at

# Heat of the momenta, in units of T, that noisy gradients may give them without their being drawn afresh in warm-up.
HOT = 1.5


class MomentumKernel(StochasticGradientKernel):
    """A kernel whose state has a field ``momentum`` and whose last coefficient is M⁻¹.

    :param model: a Pyro model.
    :param step_size: time step h.
    :param friction: C, per unit of velocity.
    :param mass: M: a number, a dict of numbers per site, or a vector; or a rule by which it is learnt in warm-up, and
        then ``friction`` is a rate, C/M.
    :param temperature: T.
    :param options: those of :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for settings that are negative, not finite, or of a wrong shape.
    """

    friction_may_be_none = False  # for kernels that can draw the momentum afresh

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: Any,
        friction: Any,
        mass: float | Mapping[str, Any] | Tensor | str | Preconditioner = 1.0,
        temperature: float | Schedule = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, step_size=step_size, temperature=temperature, **options)
        if friction is not None or not self.friction_may_be_none:
            check_setting("friction", friction)
        self.metric = preconditioner_of("mass", mass)
        self.friction, self.mass = friction, mass if self.metric is None else 1.0

    def settings(self) -> dict[str, float | Schedule]:
        """The settings that may follow a schedule."""
        own = {} if self.friction is None else {"friction": self.friction}
        return {**super().settings(), **own}

    def fresh_momentum(self, like: Tensor) -> Tensor:
        """A draw from N(0, T M)."""
        scale = torch.as_tensor(np.sqrt(self._mass() * value_at(self.temperature, 0))).to(like)
        return torch.randn_like(like) * scale

    def momentum_of(self, state: Any, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Momentum and inverse mass."""
        return state.momentum, coefficients[-1]

    def adapt(self, stats: Tensor) -> None:
        """Learn from a draw of warm-up; momenta far hotter than a draw from N(0, T M) are drawn afresh.

        A chain that falls into the posterior turns its potential energy into heat, which friction takes out over times
        of order M/C: too long at the short steps of a fall.
        """
        super().adapt(stats)
        temperature = value_at(self.temperature, 0)
        if self._warmup is None or temperature == 0.0:
            return
        run = self._running
        momentum, dim = run.state.momentum, self.potential.dim
        weight = torch.as_tensor(1.0 / (temperature * self._mass())).to(momentum)
        hot = (momentum.square() * weight).sum(-1, keepdim=True) > HOT * dim + 2.0 * math.sqrt(10.0 * dim) + 20.0
        if hot.any():
            run.state = run.state._replace(momentum=torch.where(hot, self.fresh_momentum(momentum), momentum))

    def _friction(self, step: int) -> float:
        return value_at(self.friction, step)

    def _mass(self) -> Number:
        return self.per_coordinate("mass", self.mass)
