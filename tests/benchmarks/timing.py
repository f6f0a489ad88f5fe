"""Interleaved timing: every competitor runs in every round, in shuffled order, on one core.

A slow spell of the machine then meets all competitors alike. Times are the processor's, so that what else runs on the
core is not counted; medians over rounds with quartiles. Ratios are medians of the ratios within a round.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Competitor:
    """One contender.

    :ivar loop: ``loop(n)`` does n units of work.
    :ivar steps: steps of the sampler in one unit, by which times are divided.
    :ivar clock: for work in another process, or only part of which counts: ``clock(n)`` gives the seconds itself.
    :ivar units: units of work in a round; as many as fill the round's time by default.
    :ivar note: what the table says beside the name.
    """

    loop: Callable[[int], None] | None = None
    steps: int = 1
    clock: Callable[[int], float] | None = None
    units: int | None = None
    note: str = ""

    def seconds(self, units: int) -> float:
        if self.clock is not None:
            return self.clock(units)
        assert self.loop is not None
        start = time.process_time()
        self.loop(units)
        return time.process_time() - start


@dataclass(frozen=True)
class Times:
    """Microseconds per step of one competitor in each round."""

    rounds: list[float]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def quartiles(self) -> tuple[float, float]:
        low, _, high = statistics.quantiles(self.rounds, n=4, method="inclusive")
        return low, high

    def ratio(self, other: Times) -> float:
        """Median over rounds of this time over the other's in the same round."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def fastest(times: Mapping[str, Times], names: Iterable[str]) -> str | None:
    """The name with the smallest median among those that were timed."""
    return min((name for name in names if name in times), key=lambda name: times[name].median, default=None)


def repeat(function: Callable[[], object]) -> Callable[[int], None]:
    """A loop that calls ``function`` n times."""

    def loop(units: int) -> None:
        for _ in range(units):
            function()

    return loop


def interleave(competitors: Mapping[str, Competitor], rounds: int, chunk: float) -> dict[str, Times]:
    """Time all competitors against each other.

    :param competitors: name -> competitor.
    :param rounds: rounds in which each of them runs once.
    :param chunk: seconds that one of them runs in a round, about.
    """
    order = random.Random(20)
    measured: dict[str, list[float]] = {name: [] for name in competitors}
    with one_core():
        units = {name: _units(competitor, chunk) for name, competitor in competitors.items()}
        gc.collect()
        gc.disable()
        try:
            for _ in range(rounds):
                for name in order.sample(list(competitors), len(competitors)):
                    competitor = competitors[name]
                    seconds = competitor.seconds(units[name])
                    measured[name].append(1e6 * seconds / (units[name] * competitor.steps))
                gc.collect()
        finally:
            gc.enable()
    return {name: Times(values) for name, values in measured.items()}


def _units(competitor: Competitor, chunk: float) -> int:
    """Units of work that last about ``chunk`` seconds; warms the competitor up."""
    if competitor.units is not None:
        competitor.seconds(competitor.units)
        return competitor.units
    competitor.seconds(1)
    units = 1
    while (seconds := competitor.seconds(units)) < chunk / 4:
        units *= 2
    return max(1, round(units * chunk / seconds))


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Keep this process on one core, where the system allows it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def keep_heap() -> bool:
    """Let glibc keep what a step frees, for all competitors of this process; whether that could be set.

    By default glibc hands freed blocks above a threshold between 128 KiB and 32 MiB, which follows the process's
    history, back to the kernel, and every step then pays for the page faults. The library does not do this.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    mmap_threshold, trim_threshold = -3, -1
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, (1 << 31) - 1))
