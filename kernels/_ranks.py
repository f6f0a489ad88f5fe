"""A run on several processes: which chains a rank moves, its random numbers, and all draws in one place at the end.

See :mod:`bnn.ranks` for how to start one and what it costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

from bnn.kernels._base import StochasticGradientKernel
from bnn.ranks import Ranks
from bnn.store_progress import costs_together

SHARED = ("chains", "data")

# Draws between comparisons of the ranks' states.
CHECK_EVERY = 100

T = TypeVar("T")


@dataclass
class RankDraws:
    """The draws of a group of chains, wherever they were drawn; their values unless they are in a store."""

    count: int
    interrupted: bool
    diagnostics: list[dict[str, Any]]
    values: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, tuple[slice, torch.Size]] = field(default_factory=dict)


class Sharing:
    """What the runner asks in the course of a run; this one is for a process by itself.

    A run consists of parts, each of them a group of chains that move together and what one process writes of it.

    :ivar name: what the ranks share out.
    :ivar rank: the number of this process.
    :ivar writes: whether this process writes the draws of the chains that it moves.
    :ivar for_kernel: what the kernel's potential gets: the ranks, if they share rows out.
    :ivar parts: the chains of each part, known after :meth:`start`.
    """

    name = "None"
    rank = 0
    writes = True
    for_kernel: Ranks | None = None
    parts: list[range]

    def start(self, groups: Sequence[range], known: Mapping[str, Any]) -> list[tuple[int, range]]:
        """The parts of this process, each with its number.

        :param groups: of chains that move together in a single process.
        :param known: the attributes of the store that is resumed; empty without one.
        """
        del known
        self.parts = list(groups)
        return list(enumerate(groups))

    @property
    def attributes(self) -> dict[str, Any]:
        """What a store must know for another process to go on."""
        return {"parts": [[part.start, part.stop] for part in self.parts]}

    def before(self, group: range) -> None:
        """A group of chains is about to be set up."""

    def after_draw(self, kernel: StochasticGradientKernel, draw: int) -> None:
        """A draw is done."""

    def first(self, function: Callable[[], T]) -> T:
        """The value of a function on one rank, for all: what changes the disk, or depends on it."""
        return function()

    def of_all(self, value: T) -> list[T]:
        """A value of each rank that moves the same chains."""
        return [value]

    def agree(self, due: bool, busy: bool, signal: int) -> tuple[bool, int]:
        """Whether a checkpoint is made now, and which signal ends the run; the same on ranks that move the same chains.

        :param due: whether this rank wants one.
        :param busy: whether its last one is not on disk yet.
        :param signal: the number of a signal that it got, or 0.
        """
        del busy
        return due, signal

    def state(self) -> Any:
        """What a checkpoint keeps of this rank's own."""

    def restore(self, state: Any) -> None:
        """Go on from :meth:`state`."""

    def gather(self, finished: list[Any], facts: dict[str, Any]) -> list[Any]:
        """The draws of all groups of all ranks."""
        del facts
        return finished


class _OverRanks(Sharing):
    def __init__(self) -> None:
        self.ranks = Ranks()
        self.rank = self.ranks.rank

    def first(self, function: Callable[[], T]) -> T:
        """Done by rank 0, while the others wait. What it raises, all raise."""
        found: Any = None
        if self.rank == 0:
            try:
                found = function()
            except Exception as error:
                self.ranks.gather(error, "begin")
                raise
        found = self.ranks.gather(found, "begin")[0]
        if isinstance(found, Exception):
            raise found
        result: T = found
        return result


class ChainsOverRanks(_OverRanks):
    """Neighbouring chains on each rank; chains that move together draw from a seed of their own."""

    name = "chains"

    def start(self, groups: Sequence[range], known: Mapping[str, Any]) -> list[tuple[int, range]]:
        """A rank's part of the chains, in groups as wide as those given, or as those of the store."""
        rank, size, self.chains = self.rank, self.ranks.size, groups[-1].stop
        if self.chains < size:
            raise ValueError(f"{self.chains} chains cannot be shared out over {size} ranks: give num_chains >= {size}.")
        if known:
            self.seed = int(known["seed of all chains"])
            self.parts = [range(*part) for part in known["parts"]]
        else:
            self.seed = self.ranks.common_seed()
            cuts = [self.chains * one // size for one in range(size + 1)]
            whole = [range(*ends) for ends in zip(cuts, cuts[1:], strict=False)]
            self.parts = whole if len(groups) == 1 else list(groups)
        count = len(self.parts)
        if count < size:
            raise ValueError(
                f"the chains in the store move in {count} groups, as the run was begun on {count} ranks, and there are "
                f"{size} ranks now: start at most {count} (torchrun --nproc-per-node={count})."
            )
        if known or len(groups) == 1:
            own = range(count * rank // size, count * (rank + 1) // size)
        else:
            own = range(self.chains * rank // size, self.chains * (rank + 1) // size)
        return [(number, self.parts[number]) for number in own]

    @property
    def attributes(self) -> dict[str, Any]:
        """With the seed."""
        return {**super().attributes, "seed of all chains": self.seed}

    def before(self, group: range) -> None:
        """Random numbers that depend on the run's seed and on the number of the group's first chain."""
        Ranks.seed(self.seed, group.start)

    def gather(self, finished: list[Any], facts: dict[str, Any]) -> list[Any]:
        """Every rank gets the draws of all."""
        Ranks.seed(self.seed, self.chains)  # from here on, all draw alike again
        held = [getattr(d, "values", None) is not None for d in finished]
        metas = [
            (d.count, d.interrupted, d.diagnostics, *((d.places, list(d.stats)) if has else ()))
            for d, has in zip(finished, held, strict=True)
        ]
        everywhere = self.ranks.gather((metas, facts), "gather the chains of all ranks")
        tensors = [t for d, has in zip(finished, held, strict=True) if has for t in (d.values, *d.stats.values())]
        found = []
        for (groups, _), sent in zip(everywhere, self.ranks.gather_tensors(tensors), strict=True):
            feed = iter(sent)
            for count, interrupted, diagnostics, *of_values in groups:
                draws = RankDraws(count, interrupted, diagnostics)
                if of_values:
                    draws.places, names = of_values
                    draws.values = next(feed)
                    draws.stats = {name: next(feed) for name in names}
                found.append(draws)
        facts.update(costs_together(own for _, own in everywhere))
        return found


class DataOverRanks(_OverRanks):
    """Every rank moves all chains, on its rows, with the gradients of all. Rank 0 writes their draws."""

    name = "data"

    def __init__(self) -> None:
        super().__init__()
        self.for_kernel = self.ranks
        self.writes = self.rank == 0

    def start(self, groups: Sequence[range], known: Mapping[str, Any]) -> list[tuple[int, range]]:
        """All, with the random numbers of rank 0."""
        self.ranks.same_randomness()
        size = self.ranks.size
        self.parts = [group for group in groups for _ in range(size)]
        if known and len(known["parts"]) != len(self.parts):
            raise ValueError(
                f"the run in the store shares rows out over {len(known['parts']) // len(groups)} ranks, and there are "
                f"{size} ranks now: start as many as then, each of which goes on with its own rows."
            )
        return [(number * size + self.rank, group) for number, group in enumerate(groups)]

    def after_draw(self, kernel: StochasticGradientKernel, draw: int) -> None:
        """Compare the states of all ranks."""
        if draw % CHECK_EVERY == 0:
            self.ranks.check_same([kernel.position], "the states of the chains")

    def of_all(self, value: T) -> list[T]:
        """Of each rank."""
        return self.ranks.gather(value, "compare checkpoints")

    def agree(self, due: bool, busy: bool, signal: int) -> tuple[bool, int]:
        """All at the same draw, and none before that of each rank before is on disk: they keep two."""
        largest = self.ranks.largest([int(due), int(busy), signal], "agree on a checkpoint")
        return bool(largest[0]) and not largest[1], largest[2]

    def state(self) -> Any:
        """The generator of this rank's own."""
        return self.ranks.own_state

    def restore(self, state: Any) -> None:
        """Go on with it."""
        self.ranks.own_state = state

    def gather(self, finished: list[Any], facts: dict[str, Any]) -> list[Any]:
        """The same on all ranks; from a store when all have written."""
        if getattr(finished[0], "values", None) is None:
            self.of_all(None)
        return super().gather(finished, facts)


def sharing_of(ranks: str | None, ours: bool, chain_method: str) -> Sharing:
    """What ``MCMC(ranks=...)`` asks for.

    :raises ValueError: for a word that is none of these, or ``chain_method="parallel"``.
    :raises NotImplementedError: for a kernel of Pyro's.
    """
    if ranks is None:
        return Sharing()
    if ranks not in SHARED:
        raise ValueError(f"ranks={ranks!r} is unknown: give 'chains', 'data' or None.")
    if chain_method == "parallel":
        raise ValueError("chain_method='parallel' starts processes of its own: use 'vectorized' with ranks=.")
    if not ours:
        raise NotImplementedError("ranks= is for the kernels of bnn.kernels: leave it out for those of Pyro.")
    return ChainsOverRanks() if ranks == "chains" else DataOverRanks()
