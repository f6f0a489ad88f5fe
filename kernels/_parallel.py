"""Chains in processes of their own, by Pyro's runner."""

from __future__ import annotations

import copy
from typing import Any

from pyro.infer.mcmc.api import _MultiSampler


class ParallelSampler(_MultiSampler):
    """Pyro's process-per-chain sampler, except that each chain keeps its own starting point.

    Pyro hands one kernel object to all workers, so that the last chain's initial values overwrite the others'.
    """

    def init_workers(self, *args: Any, **kwargs: Any) -> None:
        super().init_workers(*args, **kwargs)
        for process, chain in zip(self.workers, range(self.num_chains), strict=True):
            worker = process._target.__self__
            worker.kernel = copy.deepcopy(self.kernel)
            if self.initial_params is not None:
                worker.kernel.initial_params = {name: value[chain] for name, value in self.initial_params.items()}
