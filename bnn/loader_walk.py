"""One chain's way through a loader, pass after pass, which can be taken again to where it stood.

A walk is saved as the state of the random generators when its present pass began and the number of batches since. To
resume, the loader is set off from that state and as many batches are drawn and dropped: the order is the same where it
is decided at the beginning of a pass or by generators that nothing else draws from, as in a ``DataLoader``. The last of
the batches is compared with what it was.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.randomness import random_state, set_random_state


class Walk:
    """Walks through ``batches`` again and again.

    :param batches: any iterable that can be iterated again; not a generator.
    :raises ValueError: if it can be iterated only once; from :meth:`next`, if it is empty.
    """

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches
        self._open()
        if self._items is batches:
            raise ValueError(
                "batches= must be iterable again and again, like a list or a torch DataLoader; "
                f"{type(batches).__name__} is used up after one pass. Wrap it in list(...) if it fits in memory."
            )

    def _open(self) -> None:
        self._taken, self._last = 0, None
        self._states: dict[str, Any] = {"open": _states(self.batches)}
        self._items = iter(self.batches)

    def next(self) -> Any:
        """The next item.

        :raises ValueError: if there is none.
        """
        for _ in range(2):
            if not self._taken:
                self._states["first"] = _states(self.batches)
            self._states["latest"] = torch.get_rng_state()
            try:
                self._last = next(self._items)
                self._taken += 1
                return self._last
            except StopIteration:
                self._open()
        raise ValueError("batches= is empty: it must yield at least one tuple of model arguments.")

    def __getstate__(self) -> dict[str, Any]:
        return {
            "batches": self.batches,
            "_taken": self._taken,
            "_states": self._states,
            "_last": None if self._last is None else _checksum(self._last),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        now, last = _states(self.batches), None
        _set_states(self.batches, self._states["open"])
        self._items = iter(self.batches)
        for number in range(self._taken):
            if number == 0:
                _set_states(self.batches, self._states["first"])
            if number == self._taken - 1:
                torch.set_rng_state(self._states["latest"])  # for what augments data
            last = next(self._items, None)
        _set_states(self.batches, now)
        if self._taken and _checksum(last) != state["_last"]:
            warnings.warn(
                "batches= gave other minibatches than before the interruption, so the run goes on with minibatches in "
                "a new order: as valid, but not bit for bit what it would have been. Loaders whose order is fixed by "
                "the seed at the beginning of a pass, as in a DataLoader, can be taken up exactly.",
                RuntimeWarning,
                stacklevel=2,
            )
        self._last = last


def generators_of(batches: Any) -> list[torch.Generator]:
    """The random generators that a loader and its samplers hold."""
    loader_sampler = getattr(batches, "batch_sampler", None)
    holders = [batches, getattr(batches, "sampler", None), loader_sampler, getattr(loader_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _states(batches: Any) -> tuple[dict[str, Any], list[Tensor]]:
    return random_state(), [one.get_state() for one in generators_of(batches)]


def _set_states(batches: Any, states: tuple[dict[str, Any], list[Tensor]]) -> None:
    set_random_state(states[0])
    for generator, known in zip(generators_of(batches), states[1], strict=True):
        generator.set_state(known)


def _checksum(item: Any) -> int:
    """Of the tensors in an item."""
    result = 0
    for leaf in pytree.tree_leaves(item):
        if isinstance(leaf, Tensor) and leaf.numel():
            data = leaf.detach().cpu().contiguous().view(-1).view(torch.uint8)
            result = zlib.crc32(data.numpy().data, result)
    return result
