"""Draws of a variable some at a time, so that what is on a disk need not fit in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

# Numbers that are read at once: a block of a store in single precision.
NUMBERS_AT_ONCE = 1 << 22


def blocks(variable: Any) -> Iterator[np.ndarray]:
    """The values of a variable, ``(chains, draws, numbers)``, some draws at a time; at least one of all chains.

    :param variable: a DataArray, or an array ``(chains, draws, ...)``; what is on a disk is read as it is yielded.

    >>> [block.shape for block in blocks(np.zeros((2, 5, 3, 4)))]
    [(2, 5, 12)]
    """
    if hasattr(variable, "dims"):
        variable = variable.transpose("chain", "draw", ...)
    chains, draws, *shape = variable.shape
    size = int(np.prod(shape))
    at_once = max(1, NUMBERS_AT_ONCE // max(1, chains * size))
    for start in range(0, draws, at_once):
        values = np.asarray(variable[:, start : start + at_once])
        yield values.reshape(chains, values.shape[1], size)


def numbers_at(variable: Any, places: np.ndarray) -> np.ndarray:
    """Some numbers of a variable, ``(chains, draws, places)``; see :func:`blocks`."""
    return np.concatenate([block[..., places].astype(float) for block in blocks(variable)], 1)


def evenly(count: int, most: int) -> np.ndarray:
    """At most ``most`` of ``count`` places, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int))
