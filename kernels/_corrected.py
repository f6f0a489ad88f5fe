"""What kernels with a Metropolis test share: trajectories of several steps, and what is refused for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from bnn.kernels._momentum import MomentumKernel
from bnn.kernels._run import Run
from bnn.kernels._warmup import StepRule, TargetAcceptance, falling_draws
from bnn.kernels.preconditioners import Preconditioner
from bnn.kernels.schedules import Schedule, check_setting

# The largest ΔH of a proposal, as a part of the energy that it loses, at which it is taken early in warm-up.
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
    :param options: those of :class:`~bnn.kernels._base.StochasticGradientKernel`; minibatches of their own steps are
        drawn with replacement, since their order must be as likely as its reverse.
    :raises ValueError: for settings out of range.
    """

    metropolised = True
    friction_may_be_none = True
    tests_in_steps = False  # whether the test is part of the recorded step, which is a proposal then

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
        if options.get("precision", "full") != "full":
            raise ValueError(
                f"precision is {options['precision']!r}; a Metropolis test needs differences of energies to a fraction "
                "of one, which rounded products do not give: leave it out, or use SGHMC."
            )
        options.setdefault("replacement", True)
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

    @property
    def settling_draws(self) -> int:
        """Draws at the start of warm-up in which proposals far down are taken untested.

        On the way down from a far start the test would refuse nearly all of them, and a chain would stand still.
        """
        draws = self._running.warmup_steps
        return falling_draws(draws) if self.adapts_step_size else draws // 2

    @property
    def slack(self) -> float:
        """The largest ΔH that is taken untested, as a part of ΔU: 0 in the end."""
        return -LARGEST_PART if self._running.draws < self.settling_draws else 0.0

    def adapt(self, stats: Tensor) -> None:
        """Learn from a draw of warm-up."""
        super().adapt(stats)
        if self._running.draws == self.settling_draws:
            self._running.forget_numbers()

    def steps_at_once(self, step: int) -> int:
        """Those of a proposal, if its test is apart."""
        return self.steps_to_draw(step) if self.tests_in_steps else self.num_steps

    def take(self, run: Run) -> Tensor:
        """``steps_per_sample`` proposals; statistics of the last."""
        if self.tests_in_steps:
            return super().take(run)
        stats = run.last_stats
        for _ in range(self.steps_per_sample):
            stats = self._propose(run, stats)
        assert stats is not None
        return stats

    def start(self, run: Run) -> Any:
        """The state that a proposal of several steps starts from."""
        raise NotImplementedError

    def tested(self, run: Run, observed: Tensor, known: Tensor | None) -> list[Tensor]:
        """What the test needs besides the states at both ends of a proposal, leading with the chains.

        :param observed: what was kept of its last step.
        :param known: statistics of where it started; None if there are none yet.
        """
        del run, known
        return [observed]

    def decide(
        self, run: Run, ends: Sequence[Any], uniform: Tensor, tested: Sequence[Tensor], map_and_numbers: Any
    ) -> tuple[Any, Tensor]:
        """The state that follows a proposal and its statistics ``(chains, names)``, written for recording.

        :param ends: the states where it starts and ends.
        :param tested: what :meth:`tested` gave.
        :param map_and_numbers: from the chains' positions to the model's, and the coefficients.
        """
        raise NotImplementedError

    def _propose(self, run: Run, known: Tensor | None) -> Tensor:
        run.state = before = self.start(run)
        tested = self.tested(run, run.take_steps(self.num_steps), known)
        numbers, fields, count = run.numbers_at(0), type(before), len(before)

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            ends = [fields(*tensors[place : place + count]) for place in (0, count)]
            uniform, rest = tensors[2 * count], tensors[2 * count + 1 :]
            given, rest = rest[: len(tested)], rest[len(tested) :]
            shared, metric = rest[: len(numbers)], rest[len(numbers) :]
            state, stats = self.decide(run, ends, uniform, given, (lambda u: run.metric.forward(u, metric), shared))
            return (*state, stats)

        given = [*before, *run.state, torch.rand_like(before.energy), *tested]
        shared = [*numbers, *run.metric.tensors]
        *state, stats = run.program("test", function, given, shared, run.planned_steps // self.num_steps)(
            *given, *shared
        )
        run.state = fields(*state)
        return stats

    def planned_steps(self, draws: int) -> int:
        """Steps of so many draws."""
        return draws * self.steps_to_draw(0)

    def extra_stats(self, state: Any) -> dict[str, Tensor]:
        """Acceptance probability of the last proposal."""
        return {"acceptance_rate": state.acceptance.squeeze(-1)}


def chances(start: Tensor, end: Tensor, change: Tensor, slack: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Acceptance probabilities min(1, exp(−ΔH/T)) ``(chains, 1)``, 0 for a proposal that left the finite numbers.

    1, too, for a proposal whose ΔH is less than ``slack`` · ΔU.

    :param start: energy U where the proposal starts, ``(chains, 1)``.
    :param end: where it ends.
    :param change: ΔU − ΔH.
    :param slack: 0, or negative early in warm-up.
    """
    fall = start - end
    gain = fall + change
    untested = gain >= (fall * slack).clamp_max(0.0)
    return torch.nan_to_num(torch.exp(torch.where(untested, torch.zeros_like(gain), gain) * inverse_temperature))
