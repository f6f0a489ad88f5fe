"""What a kernel finds out in warm-up and keeps after it: a step size, and the metric of its coordinates.

Metrics are learnt in windows that double, as in Stan: the first 75 draws and the last 50 are for the step size alone.
All chains of a run share both.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from pyro.ops.dual_averaging import DualAveraging
from torch import Tensor

if TYPE_CHECKING:
    from bnn.kernels._metric import Metric
    from bnn.kernels._run import Run
    from bnn.kernels.preconditioners import Learner

# Draws at the start, in the first window and at the end of a warm-up that is long enough; and the least of one at all.
START, WINDOW, END, LEAST = 75, 25, 50, 20

# Minibatches for a first estimate.
FIRST_LOOKS = 10

# What is kept per draw of a chain's mean acceptance lately, and the least that it counts as.
MEMORY, FLOOR = 0.8, 0.01


def window_ends(draws: int) -> list[int]:
    """The draws of warm-up, counted from 1, after which the metric is set anew.

    >>> window_ends(1000)
    [100, 150, 250, 450, 950]
    >>> window_ends(100)
    [90]
    """
    if draws < LEAST:
        return []
    if START + WINDOW + END > draws:
        return [draws - int(0.1 * draws)]
    ends, size, at = [], WINDOW, START
    while at < draws - END:
        at = at + size if at + 3 * size <= draws - END else draws - END
        ends.append(at)
        size *= 2
    return ends


def falling_draws(draws: int) -> int:
    """The draws of warm-up in which chains may still be falling towards the posterior.

    >>> falling_draws(1000), falling_draws(100)
    (75, 50)
    """
    return draws // 2 if START + WINDOW + END > draws else START


class StepRule(ABC):
    """How a step size is found.

    :ivar step_size: the one to use now.
    :ivar is_hot: whether the chains are known to be far from the posterior.
    """

    step_size: float
    is_hot = False

    def start(self, run: Run, metric_is_unknown: bool) -> None:
        """Look at where the chains start."""
        del run, metric_is_unknown

    def is_falling(self, draw: int, draws: int) -> bool:
        """Whether the chains may still be on their way down to the posterior after ``draw`` of ``draws``."""
        return draw < falling_draws(draws) or (self.is_hot and 2 * draw < draws)

    @abstractmethod
    def observe(self, run: Run, stats: Tensor, draw: int, draws: int) -> None:
        """Learn from a draw of warm-up, the ``draw``-th of ``draws``, counted from 1."""

    @abstractmethod
    def restart(self, run: Run) -> None:
        """Begin again, since the metric has changed."""

    @abstractmethod
    def report(self) -> str | None:
        """What was chosen, and what is expected of it; None if nothing was."""


class TargetAcceptance(StepRule):
    """Dual averaging of log h towards a mean acceptance (Hoffman and Gelman 2014, "The No-U-Turn sampler", JMLR 15).

    At first, and with a metric to learn until that is done, it is the harmonic mean of the chains' late acceptances:
    the step becomes short enough for the chain with the hardest start, which a plain mean would leave behind.

    :param step_size: where it starts.
    :param target: the mean acceptance asked for.
    :param learns_metric: whether a metric is learnt, too.
    """

    def __init__(self, step_size: float, target: float, learns_metric: bool = False) -> None:
        self.step_size, self.target, self.learns_metric = step_size, target, learns_metric
        self._averaging = DualAveraging(prox_center=math.log(10.0 * step_size))
        self._lately: Tensor | None = None  # acceptance of each chain

    def observe(self, run: Run, stats: Tensor, draw: int, draws: int) -> None:
        """Learn from a draw's acceptances."""
        rates = stats[:, run.stat_names.index("acceptance_rate")]
        mean = float(rates.mean())
        is_early = draw <= falling_draws(draws) or (self.learns_metric and draw <= window_ends(draws)[-1])
        if is_early:
            before = self._lately
            if before is None or len(before) != len(rates):  # a chain was stopped
                before = torch.full_like(rates, self.target)
            self._lately = MEMORY * before + (1.0 - MEMORY) * rates
            mean = 1.0 / float((1.0 / self._lately.clamp_min(FLOOR)).mean())
        self._averaging.step(self.target - mean)
        newest, average = self._averaging.get_state()
        self.step_size = math.exp(average if draw == draws else newest)

    def restart(self, run: Run) -> None:
        """Begin again from the present step size."""
        del run
        self._averaging.prox_center = math.log(self.step_size)
        self._averaging.reset()

    def report(self) -> str:
        """The step size and the acceptance that it was chosen for."""
        return f"step_size {self.step_size:.3g}, for a mean acceptance of {self.target:.2g}"


class Warmup:
    """The state of one warm-up.

    :param draws: how many draws it has.
    :param step_rule: what finds the step size, None for a given one.
    :param learner: what learns the metric, None for a given one.
    :ivar metric: the last metric that was learnt.
    """

    def __init__(self, draws: int, step_rule: StepRule | None, learner: Learner | None) -> None:
        self.draws, self.step_rule, self.learner = draws, step_rule, learner
        self._ends = window_ends(draws) if learner is not None else []
        self._first = 0 if START + WINDOW + END > draws else START
        self._draw = 0
        self.metric: Metric | None = None

    @property
    def is_falling(self) -> bool:
        """Whether the chains may still be on their way down to the posterior."""
        if self.step_rule is None:
            return self._draw < falling_draws(self.draws)
        return self.step_rule.is_falling(self._draw, self.draws)

    def start(self, run: Run) -> None:
        """Look at where the chains start."""
        if self.learner is not None and self.learner.knows_at_once:
            for _ in range(FIRST_LOOKS):
                self._observe(run)
            self.metric = self.learner.estimate()
            run.change_metric(self.metric)
        if self.step_rule is not None:
            self.step_rule.start(run, self.learner is not None and not self.learner.knows_at_once)
        run.forget_numbers()

    def _observe(self, run: Run) -> None:
        assert self.learner is not None
        moving = ~run.stopped
        self.learner.observe(run.position[moving], run.gradient()[moving] if self.learner.needs_gradient else None)

    def __call__(self, run: Run, stats: Tensor) -> None:
        """Learn from one draw of all chains, but those that were stopped.

        :param stats: its statistics ``(chains, names)``.
        """
        if self._draw >= self.draws:
            return
        self._draw += 1
        if self.step_rule is not None:
            self.step_rule.observe(run, stats[~run.stopped], self._draw, self.draws)
            run.forget_numbers()
        if self.learner is None or not self._ends or self._draw <= self._first:
            return
        self._observe(run)
        if self._draw == self._ends[0]:
            self._ends.pop(0)
            self.metric = self.learner.estimate()
            run.change_metric(self.metric)
            if self.step_rule is not None:
                self.step_rule.restart(run)
                run.forget_numbers()
