"""Which rows a minibatch holds, and in what order.

Two sources serve the potential: ``RowStream`` draws row numbers for the plates of a model, ``ArgumentStream`` walks
through a loader of argument tuples. Every chain has its own stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.devices import sent
from bnn.loader_walk import Walk, generators_of

# Minibatches that are cut at once.
BLOCK = 32

Arguments = tuple[tuple[Any, ...], dict[str, Any]]


class RowStream:
    """Row numbers of one plate, for several chains.

    Without replacement (default), each chain runs through random permutations of all rows laid end to end, so that
    over ``batch_size / gcd(size, batch_size)`` epochs every row is used equally often, whether or not the batch
    divides the data. With replacement, every row of every batch is an independent uniform draw.

    :param size: number of rows N.
    :param batch_size: rows per minibatch B.
    :param num_chains: number of independent streams K.
    :param replacement: draw independently instead of by shuffled epochs.
    :param device: where the row numbers are used.

    >>> rows = RowStream(6, 3, num_chains=2)
    >>> batches = rows.next(2)          # two minibatches for each of two chains
    >>> batches.shape
    torch.Size([2, 2, 3])
    >>> sorted(batches[:, 0].flatten().tolist())
    [0, 1, 2, 3, 4, 5]
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        num_chains: int = 1,
        *,
        replacement: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self.size, self.batch_size, self.num_chains = size, batch_size, num_chains
        self.replacement, self.device = replacement, device
        self._order = torch.empty(num_chains, 0, dtype=torch.long, device=device)
        self._ready: list[Tensor] = []

    def next(self, steps: int = 1) -> Tensor:
        """The next ``steps`` minibatches: row numbers of shape ``(steps, chains, batch_size)``."""
        return torch.stack([self.next_batch() for _ in range(steps)])

    def next_batch(self) -> Tensor:
        """The next minibatch: row numbers of shape ``(chains, batch_size)``."""
        if not self._ready:
            self._refill()
        return self._ready.pop()

    def state(self) -> dict[str, Tensor]:
        """The rows that are due next, for a checkpoint."""
        ready = torch.stack(self._ready) if self._ready else self._order.new_empty(0)
        return {"order": self._order.clone(), "ready": ready}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on where the stream stood whose :meth:`state` this is."""
        self._order = state["order"].to(self.device)
        self._ready = list(state["ready"].to(self.device).unbind(0))

    def _refill(self) -> None:
        """Cut the next block of minibatches: many at once, since each small operation costs like a layer."""
        count = BLOCK * self.batch_size
        if self.replacement:
            block = torch.randint(self.size, (BLOCK, self.num_chains, self.batch_size), device=self.device)
        else:
            while self._order.shape[1] < count:
                orders = [torch.randperm(self.size, device=self.device) for _ in range(self.num_chains)]
                self._order = torch.cat([self._order, torch.stack(orders)], 1)
            block, self._order = self._order[:, :count], self._order[:, count:]
            block = block.reshape(self.num_chains, BLOCK, self.batch_size).transpose(0, 1).contiguous()
        self._ready = list(block.unbind(0))[::-1]


class ArgumentStream:
    """Minibatches out of an iterable of model arguments, for several chains.

    Each chain walks through the iterable on its own, again and again. A ``torch.utils.data.DataLoader`` with
    ``shuffle=True`` gives every chain its own order. Items may be tuples or lists (positional arguments), dicts
    (keyword arguments) or single tensors.

    :param batches: any iterable that can be iterated again; not a generator.
    :param num_chains: number of independent walks.
    :raises ValueError: if it can be iterated only once, or is empty.
    """

    def __init__(self, batches: Iterable[Any], num_chains: int = 1) -> None:
        self.batches, self.num_chains = batches, num_chains
        self._walks = [Walk(batches) for _ in range(num_chains)]

    def next(self) -> list[Arguments]:
        """The next minibatch of every chain, as ``(args, kwargs)``."""
        return [arguments_of(walk.next()) for walk in self._walks]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "generators": [one.get_state() for one in generators_of(self.batches)]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = state.pop("generators")
        vars(self).update(state)
        for generator, known in zip(generators_of(self.batches), own, strict=True):
            generator.set_state(known)


def arguments_of(item: Any) -> Arguments:
    """An item of a loader as positional and keyword arguments of the model."""
    if isinstance(item, Mapping):
        return (), dict(item)
    if isinstance(item, (tuple, list)):
        return tuple(item), {}
    return (item,), {}


class TensorLeaves:
    """Splits model arguments into their tensors and all else, and puts them together again.

    :param arguments: example arguments.
    """

    def __init__(self, arguments: Arguments) -> None:
        leaves, self.spec = pytree.tree_flatten(arguments)
        self.others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]

    @staticmethod
    def tensors(arguments: Arguments, device: torch.device | str | None = None) -> list[Tensor]:
        """The tensors among the arguments, in a fixed order; sent to ``device``, if one is given."""
        arguments = arguments if device is None else sent(arguments, torch.device(device))
        return [leaf.detach() for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]

    def arguments(self, tensors: Iterable[Tensor]) -> Arguments:
        """The arguments with ``tensors`` in their places."""
        rest = iter(tensors)
        leaves = [
            next(rest) if is_tensor else other for is_tensor, other in zip(self.is_tensor, self.others, strict=True)
        ]
        result: Arguments = pytree.tree_unflatten(leaves, self.spec)
        return result


class Stream:
    """Minibatches for several chains: what the recorded programs of a potential take as inputs.

    :param plates: ``(size, batch_size)`` of each plate whose rows are drawn.
    :param batches: an iterable of model arguments, or None.
    :param num_chains: number of chains; each has its own order.
    :param replacement: draw rows independently instead of by shuffled epochs.
    :param device: where the rows are used: row numbers are made there, batches sent there.
    """

    def __init__(
        self,
        plates: Iterable[tuple[int, int]],
        batches: Iterable[Any] | None,
        num_chains: int,
        *,
        replacement: bool = False,
        device: torch.device | str = "cpu",
    ) -> None:
        self._rows = [RowStream(n, b, num_chains, replacement=replacement, device=device) for n, b in plates]
        self._arguments = None if batches is None else ArgumentStream(batches, num_chains)
        self._device = device

    def rows_state(self) -> list[dict[str, Tensor]]:
        """The position of each plate's rows, for a checkpoint."""
        return [rows.state() for rows in self._rows]

    def load_rows_state(self, states: Iterable[Mapping[str, Tensor]]) -> None:
        """Go on where the rows of another stream stood."""
        for rows, state in zip(self._rows, states, strict=True):
            rows.load_state(state)

    def next(self, steps: int = 1) -> list[list[Tensor]]:
        """For each of ``steps`` steps the program's minibatch inputs, each leading with the chain dimension."""
        result = [[stream.next_batch() for stream in self._rows] for _ in range(steps)]
        if self._arguments is not None:
            for inputs in result:
                chains = [TensorLeaves.tensors(arguments, self._device) for arguments in self._arguments.next()]
                if len({tuple(leaf.shape for leaf in leaves) for leaves in chains}) > 1:
                    raise ValueError(
                        "batches= gives batches of different shapes to different chains at one step: use batches of "
                        "one size (drop_last=True), or run one chain at a time."
                    )
                inputs.extend(torch.stack(leaf) for leaf in zip(*chains, strict=True))
        return result
