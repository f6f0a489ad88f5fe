"""What a run cost: seconds and gradients."""

from __future__ import annotations

import time
from typing import Any

from bnn.kernels._base import StochasticGradientKernel


class Clock:
    """Adds up the seconds of draws and the gradients that they took."""

    def __init__(self, facts: dict[str, Any], kernel: StochasticGradientKernel) -> None:
        self.facts, self.kernel = facts, kernel
        self.each = kernel.gradients_per_step * (kernel.num_chains or 1)
        self.steps, self.now = kernel.steps_done, time.perf_counter()

    def tick(self, warmup: bool) -> None:
        """One draw is done."""
        steps, now = self.kernel.steps_done, time.perf_counter()
        self.facts["warmup_time" if warmup else "sampling_time"] += now - self.now
        self.facts["gradient_evaluations"] += 0 if warmup else (steps - self.steps) * self.each
        self.steps, self.now = steps, now
