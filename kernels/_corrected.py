"""What kernels with a Metropolis test share: trajectories of several steps, and what is refused for them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from bnn.kernels._momentum import MomentumKernel
from bnn.kernels._warmup import StepRule, TargetAcceptance, falling_draws
from bnn.kernels.preconditioners import Preconditioner
from bnn.kernels.schedules import Schedule, check_setting

# The error of a trajectory, as a part of the energy that it loses, at which it is still taken early in warm-up.
LARGEST_PART = 0.1


class CorrectedKernel(MomentumKernel):
    """Proposals of ``num_steps`` steps each, accepted or refused by the energy of all data.

    Early in warm-up (its first half, or 75 draws where the step size is found) a proposal that lowers the energy is
    taken untested if the error of its trajectory is a small part of the fall.

    :param model: a Pyro model.
    :param step_size: time step h; ``"auto"`` finds the one of mean acceptance ``target_acceptance`` in warm-up.
    :param friction: C, per unit of velocity; None draws the momentum afresh for every proposal. With ``mass="auto"`` it
        is a rate, C/M.
    :param num_steps: steps per proposal; a draw is ``steps_per_sample`` proposals.
    :param temperature: T > 0.
    :param mass: M: a number, a dict of numbers per site, or a vector; ``"auto"`` takes the inverse variances of the
        draws of warm-up.
    :param target_acceptance: for ``step_size="auto"``.
    :param options: those of :class:`~bnn.kernels._base.StochasticGradientKernel`; minibatches are always drawn with
        replacement, since their order must be as likely as its reverse.
    :raises ValueError: for settings out of range, or ``batches=``.
    """

    metropolised = True
    friction_may_be_none = True

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Literal["auto"] = "auto",
        friction: float | None,
        num_steps: int = 1,
        temperature: float = 1.0,
        mass: float | Mapping[str, Any] | Tensor | Literal["auto", "dense"] | Preconditioner = 1.0,
        target_acceptance: float = 0.8,
        **options: Any,
    ) -> None:
        if not 0.0 < target_acceptance < 1.0:
            raise ValueError(f"target_acceptance is {target_acceptance}; give a probability between 0 and 1.")
        for name, value in {"step_size": step_size, "temperature": temperature, "friction": friction}.items():
            if isinstance(value, Schedule):
                raise ValueError(f"{name} is a Schedule; a Metropolis test needs the same number at every step.")
        check_setting("temperature", temperature, strict=True)
        if options.get("batches") is not None:
            raise ValueError(
                "batches= fixes the order of the minibatches, and a Metropolis test needs each order to be as likely "
                "as its reverse: pass all data to run(), and subsample in the model's plate."
            )
        if not options.setdefault("replacement", True):
            raise ValueError("replacement=False: a Metropolis test needs minibatches that are drawn independently.")
        super().__init__(model, step_size=step_size, friction=friction, mass=mass, temperature=temperature, **options)
        if not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1:
            raise ValueError(f"num_steps is {num_steps!r}; give a whole number of at least 1.")
        self.num_steps, self.target_acceptance = num_steps, target_acceptance

    def check_plan(self, draws: int | None) -> None:
        """:raises ValueError: for a model whose energy is random."""
        super().check_plan(draws)
        if self.potential.is_random:
            raise ValueError(
                "the model draws random numbers of its own (dropout?), so that its energy is not a function of the "
                "position, and a Metropolis test has nothing to test: switch them off, or use SGHMC."
            )

    def step_rule(self) -> StepRule:
        """The step size of mean acceptance ``target_acceptance``."""
        return TargetAcceptance(self.step_size_at(0), self.target_acceptance, self.metric is not None)

    def steps_to_draw(self, step: int) -> int:
        """All steps of ``steps_per_sample`` proposals."""
        del step
        return self.num_steps * self.steps_per_sample

    def is_settling(self, step: int) -> bool:
        """Whether ``step`` lies so early in warm-up that proposals far down are taken untested.

        On the way down from a far start the test would refuse nearly all of them, and a chain would stand still.
        """
        draws = self._running.warmup_steps
        return step < (falling_draws(draws) if self.adapts_step_size else draws / 2) * self.steps_to_draw(0)

    def planned_steps(self, draws: int) -> int:
        """Steps of so many draws."""
        return draws * self.steps_to_draw(0)

    def is_constant(self) -> bool:
        """Whether all steps are alike: only where each is a proposal, and none is of warm-up."""
        return self.num_steps == 1 and not self._running.warmup_steps

    def phase(self, step: int) -> Hashable:
        """The place in a proposal, and whether it is one of warm-up."""
        return step % self.num_steps, self.is_settling(step)

    def extra_stats(self, state: Any) -> dict[str, Tensor]:
        """Acceptance probability of the last proposal."""
        return {"acceptance_rate": state.acceptance.squeeze(-1)}


def acceptance(excess: Tensor) -> Tensor:
    """min(1, exp(−excess)), 0 for a proposal that left the finite numbers; ``(chains, 1)``."""
    return torch.nan_to_num(torch.exp(-excess.clamp_min(0.0)), nan=0.0)


def settling_acceptance(excess: Tensor, fall: Tensor) -> Tensor:
    """The same, 1 for a proposal whose energy falls, in units of T, by much more than the error of its trajectory."""
    return torch.where((fall > 0.0) & (excess < LARGEST_PART * fall), 1.0, acceptance(excess))
