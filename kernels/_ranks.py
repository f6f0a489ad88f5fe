"""A run on several processes: which chains a rank moves, its random numbers, and all draws in one place at the end.

See :mod:`bnn.ranks` for how to start one and what it costs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.kernels._base import StochasticGradientKernel
from bnn.ranks import Ranks

SHARED = ("chains", "data")

# Draws between comparisons of the ranks' states.
CHECK_EVERY = 100


@dataclass
class RankDraws:
    """The draws of a group of chains, wherever they were drawn."""

    values: Tensor
    stats: dict[str, Tensor]
    diagnostics: list[dict[str, Any]]
    places: dict[str, tuple[slice, torch.Size]]
    count: int
    interrupted: bool


class Sharing:
    """What the runner asks in the course of a run; this one is for a process by itself.

    :ivar is_first: whether this process is the one that shows progress.
    :ivar for_kernel: what the kernel's potential gets: the ranks, if they share rows out.
    """

    is_first = True
    for_kernel: Ranks | None = None

    def start(self, groups: Sequence[range]) -> list[range]:
        """The groups of chains that this process moves, out of all."""
        return list(groups)

    def before(self, group: range) -> None:
        """A group of chains is about to be set up."""

    def after_draw(self, kernel: StochasticGradientKernel, draw: int) -> None:
        """A draw is done."""

    def gather(self, finished: list[Any], facts: dict[str, Any]) -> list[Any]:
        """The draws of all groups of all ranks."""
        del facts
        return finished


class _OverRanks(Sharing):
    def __init__(self) -> None:
        self.ranks = Ranks()
        self.is_first = self.ranks.rank == 0


class ChainsOverRanks(_OverRanks):
    """Neighbouring chains on each rank; chains that move together draw from a seed of their own."""

    def start(self, groups: Sequence[range]) -> list[range]:
        """A rank's part of the chains, in groups as wide as those given."""
        rank, size, chains = self.ranks.rank, self.ranks.size, groups[-1].stop
        if chains < size:
            raise ValueError(f"{chains} chains cannot be shared out over {size} ranks: give num_chains >= {size}.")
        self.seed, self.chains = self.ranks.common_seed(), chains
        own = range(chains * rank // size, chains * (rank + 1) // size)
        return [own] if len(groups) == 1 else [range(chain, chain + 1) for chain in own]

    def before(self, group: range) -> None:
        """Random numbers that depend on the run's seed and on the number of the group's first chain."""
        Ranks.seed(self.seed, group.start)

    def gather(self, finished: list[Any], facts: dict[str, Any]) -> list[Any]:
        """Every rank gets the draws of all."""
        Ranks.seed(self.seed, self.chains)  # from here on, all draw alike again
        metas = [(d.count, d.interrupted, d.diagnostics, d.places, list(d.stats)) for d in finished]
        everywhere = self.ranks.gather((metas, facts), "gather the chains of all ranks")
        tensors = [t for d in finished for t in (d.values, *d.stats.values())]
        found = []
        for (groups, _), sent in zip(everywhere, self.ranks.gather_tensors(tensors), strict=True):
            feed = iter(sent)
            for count, interrupted, diagnostics, places, names in groups:
                values = next(feed)
                stats = {name: next(feed) for name in names}
                found.append(RankDraws(values, stats, diagnostics, places, count, interrupted))
        for name in ("setup_time", "warmup_time", "sampling_time"):
            facts[name] = max(own[name] for _, own in everywhere)
        facts["gradient_evaluations"] = sum(own["gradient_evaluations"] for _, own in everywhere)
        return found


class DataOverRanks(_OverRanks):
    """Every rank moves all chains, on its rows, with the gradients of all."""

    def __init__(self) -> None:
        super().__init__()
        self.for_kernel = self.ranks

    def start(self, groups: Sequence[range]) -> list[range]:
        """All, with the random numbers of rank 0."""
        self.ranks.same_randomness()
        return list(groups)

    def after_draw(self, kernel: StochasticGradientKernel, draw: int) -> None:
        """Compare the states of all ranks."""
        if draw % CHECK_EVERY == 0:
            self.ranks.check_same([kernel.position], "the states of the chains")


def sharing_of(ranks: str | None, ours: bool, chain_method: str, has_store: bool = False) -> Sharing:
    """What ``MCMC(ranks=...)`` asks for.

    :raises ValueError: for a word that is none of these, or ``chain_method="parallel"``.
    :raises NotImplementedError: for a kernel of Pyro's, or with a store.
    """
    if ranks is None:
        return Sharing()
    if ranks not in SHARED:
        raise ValueError(f"ranks={ranks!r} is unknown: give 'chains', 'data' or None.")
    if chain_method == "parallel":
        raise ValueError("chain_method='parallel' starts processes of its own: use 'vectorized' with ranks=.")
    if not ours:
        raise NotImplementedError("ranks= is for the kernels of bnn.kernels: leave it out for those of Pyro.")
    if has_store:
        raise NotImplementedError(
            "store= is not served with ranks= yet: run each rank's chains by themselves, store=f'run-{rank}.zarr' and "
            "resume=True without ranks=, and join them with arviz.concat; or leave store= out."
        )
    return ChainsOverRanks() if ranks == "chains" else DataOverRanks()
