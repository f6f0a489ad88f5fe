"""All data, chunk by chunk: for energies that no minibatch noise may disturb."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Sized
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnn.checks import leading_size, rows_in
from bnn.log_joint import quiet_handlers
from bnn.minibatch import TensorLeaves, arguments_of
from bnn.structure import Plate

if TYPE_CHECKING:
    from bnn.potential import Potential


def chunks(
    plates: Collection[Plate], batches: Iterable[Any] | None, dtype: torch.dtype, device: torch.device
) -> Iterator[list[Tensor]]:
    """Inputs of :func:`traced_chunk` that together cover all data once.

    Each chunk holds, in this order: for each plate a flag that is one in the plate's first chunk; for each plate a
    weight per row, zero for rows that only fill up the last chunk; the plates' rows, or the tensors of a batch.

    :raises ValueError: if a pass through ``batches`` has another number of rows than the plate.
    """
    one = torch.ones((), dtype=dtype, device=device)
    if batches is not None:
        rows_seen = 0
        for number, item in enumerate(_with_last_batch(batches)):
            args, kwargs = arguments_of(item)
            size = leading_size(args, kwargs)
            rows_seen += size
            weights = torch.ones(size, dtype=dtype, device=device)
            yield [
                *[one * (number == 0)] * len(plates),
                *[weights] * len(plates),
                *TensorLeaves.tensors((args, kwargs)),
            ]
        for plate in plates:
            if plate.size != rows_seen:
                raise ValueError(
                    f"a pass through batches= gave {rows_seen} rows, but plate {plate.name!r} has {plate.size}: the "
                    "energy of all data needs each row once."
                )
        return
    for corner in itertools.product(*(range(0, plate.size, plate.batch_size) for plate in plates)):
        first, row_weights, rows = [], [], []
        for start, plate in zip(corner, plates, strict=True):
            index = torch.arange(start, start + plate.batch_size, device=device)
            first.append(one * (start == 0))
            row_weights.append((index < plate.size).to(dtype))
            rows.append(index.clamp(max=plate.size - 1))
        yield [*first, *row_weights, *rows]


def traced_chunk(potential: Potential, position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """One chunk's share of the energy ``(chains,)``, written for recording."""
    names = list(potential.plates)
    first = dict(zip(names, inputs, strict=False))
    weights = dict(zip(names, inputs[len(names) :], strict=False))
    rows, args, kwargs = potential.arguments_of_chunk(inputs[2 * len(names) :])

    def one(z: Tensor) -> Tensor:
        return -potential.log_joint.weighted(z, rows, weights, first, args, kwargs)

    if not potential.is_recorded or len(position) == 1:
        with quiet_handlers(), torch.no_grad():
            return (torch.stack([one(z) for z in position]),)
    return (torch.func.vmap(one, randomness="different")(position),)


def mean_rows(batches: Iterable[Any]) -> float | None:
    """Mean number of rows of a batch over one pass, None if it cannot be told without the pass."""
    rows = rows_in(batches)
    if rows is None or not isinstance(batches, Sized):
        return None
    if isinstance(batches, DataLoader) and batches.drop_last:
        return float(batches.batch_size or 0)
    return rows / len(batches)


def _with_last_batch(batches: Iterable[Any]) -> Iterable[Any]:
    """The same data with the last, smaller batch that a loader may leave out."""
    if not (isinstance(batches, DataLoader) and batches.drop_last):
        return batches
    return DataLoader(batches.dataset, batches.batch_size, sampler=batches.sampler, collate_fn=batches.collate_fn)
