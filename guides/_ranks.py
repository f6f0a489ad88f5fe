"""What a guide's training asks of other processes besides means: see :mod:`bnn.ranks`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from bnn.guides._blocks import Block
from bnn.ranks import Ranks

# Steps between comparisons of the ranks' parameters.
CHECK_EVERY = 100


def agree(ranks: Ranks, count: int, tensors: Sequence[Tensor]) -> None:
    """At the first step take over the parameters of rank 0; now and then, compare.

    :raises bnn.ranks.RankError: if they differ.
    """
    if count == 0:
        ranks.same_randomness()
        ranks.spread(tensors, [0] * len(tensors), "share the parameters of rank 0")
    elif count % CHECK_EVERY == 0:
        ranks.check_same(tensors, "the parameters of the guide")


def owners_of(ranks: Ranks | None, blocks: Sequence[Block]) -> list[int]:
    """The rank that decomposes each block's factors: by the cubes of their sizes."""
    if ranks is None:
        return [0] * len(blocks)
    return ranks.owners([float(getattr(b, "rows", 0)) ** 3 + float(getattr(b, "cols", 0)) ** 3 for b in blocks])
