"""What a run asks of the kernel that it belongs to, and what passes between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from bnn.kernels._coordinates import Number
from bnn.kernels.schedules import Schedule
from bnn.kernels.variance_reduction import VarianceReduction

EnergyAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]


class Evaluation(NamedTuple):
    """Where an update evaluated the gradient last: position ``(chains, dim)``, energy ``(chains,)``, gradient."""

    position: Tensor
    energy: Tensor
    grad: Tensor


class Algorithm(Protocol):
    """What a run asks of the kernel that it belongs to."""

    temperature: float | Schedule
    noises_per_step: int
    evaluates_at_draws: bool
    observes_energy: bool
    needs_all_data: bool
    replacement: bool
    balances_norms: bool
    variance_reduction: VarianceReduction | None

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> tuple[Tensor, ...]:
        """The state at a starting position."""

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """Numbers of the update."""

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[tuple[Tensor, ...], Evaluation]:
        """One step."""

    def settings(self) -> dict[str, float | Schedule]:
        """The settings that may follow a schedule."""

    def phase(self, step: int) -> Hashable:
        """What steps with the same coefficients have in common, or None."""

    def steps_to_draw(self, step: int) -> int:
        """Steps to the next draw."""

    def steps_at_once(self, step: int) -> int:
        """Steps that nothing comes between."""

    def extra_stats(self, state: Any) -> dict[str, Tensor]:
        """Statistics of its own."""

    def stats_at(self, step: int) -> dict[str, float]:
        """What else is known of a step."""

    def momentum_of(self, state: Any, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Momentum and inverse mass."""
