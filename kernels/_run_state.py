"""What a run goes on from, beside random numbers, as bytes: a fresh run of the same kernel continues another."""

from __future__ import annotations

from typing import Any

from bnn.kernels._base import StochasticGradientKernel
from bnn.saved_state import dumps, loads

# Attributes of a Run that change while it runs. What is not here, a new setup makes again: programs, data, shapes.
CHANGING = (
    "state", "metric", "anchoring", "stream", "_numbers", "_phases", "step", "draws", "last_stats", "stopped",
    "any_stopped", "stopped_at", "record",
)  # fmt: skip


def state_of(kernel: StochasticGradientKernel) -> bytes:
    """The state of a kernel's run, between two draws."""
    run = kernel._running
    state = {
        "run": {name: getattr(run, name) for name in CHANGING},
        "noise": run.noise.state(),
        "kernel": {name: getattr(kernel, name) for name in kernel.changing},
    }
    return dumps(state, _made_anew(kernel))


def restore(kernel: StochasticGradientKernel, state: bytes) -> None:
    """Go on from :func:`state_of`: of a kernel that was just set up for the same model and data."""
    run = kernel._running
    found = loads(state, _made_anew(kernel), run.potential.device)
    vars(run).update(found["run"])
    vars(kernel).update(found["kernel"])
    run.noise.load_state(found["noise"])
    run.params = None


def _made_anew(kernel: StochasticGradientKernel) -> dict[str, Any]:
    """What ``setup`` makes out of model and data, and the settings: no part of a state."""
    run = kernel._running
    learner = None if kernel._warmup is None else kernel._warmup.learner
    return {
        "kernel": kernel,
        "run": run,
        "potential": run.potential,
        "sites": run.potential.sites,
        "share": run.potential.share,
        "ranks": kernel.ranks,
        "batches": kernel.batches,
        "variance_reduction": kernel.variance_reduction,
        **({} if learner is None else learner.made_anew()),
    }
