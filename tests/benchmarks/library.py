"""The rows of the library: its kernels in every tier, with and without statistics, many chains, whole runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from nets import Case
from timing import Competitor, repeat

from bnn.kernels import MCMC, SGHMC, SGLD

# Tells "auto" that the run is long enough to repay a compilation.
LONG_RUN = 10**7


class Kernels:
    """Sets kernels up on one case, and notes how long that took."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.seconds: list[tuple[str, float]] = []

    def make(self, kind: type, tier: str, steps_per_sample: int) -> Any:
        """A kernel before ``setup``."""
        step_size = self.case.step_size
        if kind is SGHMC:  # momentum decay 0.9
            settings = {"step_size": step_size**0.5, "friction": 0.1 / step_size**0.5}
        else:
            settings = {"step_size": step_size}
        return kind(self.case.model(), **settings, compile=tier, steps_per_sample=steps_per_sample)

    def ready(self, kind: type, tier: str, steps_per_sample: int = 1, chains: int = 1, note: str = "") -> Any:
        """A kernel after ``setup``, whose time is listed under ``note``."""
        kernel = self.make(kind, tier, steps_per_sample)
        kernel.num_chains, kernel.num_samples = chains, LONG_RUN
        start = time.perf_counter()
        kernel.setup(0, *self.case.data)
        if note:
            self.seconds.append((note, time.perf_counter() - start))
        return kernel


def bare(kernel: Any, steps: int = 1) -> Competitor:
    """Steps of a kernel that is set up with ``steps_per_sample > 1``, without what a draw adds to them.

    These are the calls that ``advance`` makes between two draws, programs of several steps included. The one place
    in the benchmark that knows how a kernel keeps its programs.
    """
    run = kernel._run
    unrolled = steps > 1 and run.unrolled == steps
    each = steps if unrolled else 1

    def loop(units: int) -> None:
        with torch.no_grad():
            for _ in range(units * steps // each):
                run.call(each, observed=unrolled)

    return Competitor(loop, steps=steps, note=next(iter(run._programs.values())).tier)


def drawn(kernel: Any) -> Competitor:
    """Whole draws, with their statistics."""
    return Competitor(repeat(kernel.advance), steps=kernel.steps_per_sample)


class _ClockedSGLD(SGLD):
    """Notes when ``setup`` is done."""

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        super().setup(warmup_steps, *args, **kwargs)
        self.ready_at = time.process_time()


def whole_run(kernels: Kernels, tier: str, steps: int, with_setup: bool = False) -> Callable[[int], float]:
    """A clock for ``MCMC.run`` of a number of draws, ``steps`` steps each."""

    def clock(draws: int) -> float:
        kernel = kernels.make(_ClockedSGLD, tier, steps)
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=0, disable_progbar=True)
        start = time.process_time()
        mcmc.run(*kernels.case.data)
        return time.process_time() - (start if with_setup else kernel.ready_at)

    return clock


def rows_of(kernels: Kernels, tiers: Sequence[str], quick: bool = False) -> dict[str, Competitor]:
    """The rows of SGLD and SGHMC; chains and whole runs for the small net only. ``quick`` compiles less."""
    small = kernels.case.name == "S"
    rows: dict[str, Competitor] = {}
    for tier in tiers:
        compiled = tier != "fx"
        if tier != "auto":
            note = f"setup, {tier}, {'nothing cached' if compiled else 'first in the process'}"
            kernels.ready(SGLD, tier, note=note)
            kernels.ready(SGLD, tier, note=f"setup, {tier}, again")
        for kind in (SGLD,) if quick and compiled else (SGLD, SGHMC):
            name = f"{kind.__name__} {tier}"
            ten = kernels.ready(kind, tier, 10, note=f"setup, {name}, 10 steps a draw")
            rows[f"{name}, bare"] = bare(ten)
            if not (quick and compiled):
                rows[f"{name}, with statistics"] = drawn(kernels.ready(kind, tier))
            if small:
                rows[f"{name}, 10 steps a draw"] = drawn(ten)
                rows[f"{name}, 10 bare steps"] = bare(ten, 10)
        if small and not (quick and compiled):
            rows[f"SGLD {tier}, 16 chains, bare"] = bare(kernels.ready(SGLD, tier, 2, chains=16))
    rows["SGLD handlers, with statistics"] = drawn(kernels.ready(SGLD, "handlers"))
    if small:
        tier = rows[f"SGLD {tiers[-1]}, 10 bare steps"].note
        draws = 100 if quick else 2000 if tier == "inductor" else 500
        rows["MCMC.run, 10 steps a draw, setup apart"] = Competitor(
            clock=whole_run(kernels, tier, 10), steps=10, units=draws, note=tier
        )
        for choice in ("auto", "fx"):
            rows[f"MCMC.run of 300 steps, {choice}, setup included"] = Competitor(
                clock=whole_run(kernels, choice, 1, with_setup=True), units=300
            )
    return rows
