"""All data, chunk by chunk: for energies and gradients that no minibatch noise may disturb."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Sized
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from bnn import checks
from bnn.checks import leading_size, rows_in
from bnn.log_joint import quiet_handlers
from bnn.minibatch import TensorLeaves, arguments_of
from bnn.structure import Plate

if TYPE_CHECKING:
    from bnn.potential import Potential


def over_all_data(
    potential: Potential, position: Tensor, traced: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Sums over all chunks of what ``traced`` gives for each, every one leading with the chains.

    :param traced: :func:`traced_chunk` or :func:`traced_chunk_and_grad`.
    :raises NotImplementedError: with ``batches=`` if the model has not one subsampled plate, so that one batch's
        share of the data is not known.
    :raises ValueError: if a pass through ``batches`` has another number of rows than the plate.
    """
    checks.position(position, potential.dim)
    checks.batches_have_one_plate(potential.plates, potential.batches)
    position = position.detach().to(potential.dtype).contiguous()
    totals: tuple[Tensor, ...] = ()
    for inputs in chunks(potential.plates.values(), potential.batches, potential.dtype, potential.device):
        tensors = [position, *inputs]
        program = potential.kept_program(
            (traced.__name__, *(tuple(t.shape) for t in tensors)),
            partial(traced, potential),
            tensors,
            [True, *[False] * len(inputs)],
        )
        parts = program(*tensors)
        totals = tuple(a + b for a, b in zip(totals, parts, strict=True)) if totals else parts
    return totals


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
            if plates and rows_seen > max(plate.size for plate in plates):  # an endless loader, for instance
                break
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
    one = _share(potential, inputs)
    if not potential.is_recorded or len(position) == 1:
        with quiet_handlers(), torch.no_grad():
            return (torch.stack([one(z) for z in position]),)
    return (torch.func.vmap(one, randomness="different")(position),)


def traced_chunk_and_grad(potential: Potential, position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """One chunk's share of the energy ``(chains,)`` and of its gradient ``(chains, dim)``, written for recording."""
    one = _share(potential, inputs)
    if not potential.is_recorded:
        return tuple(map(torch.stack, zip(*(_eager_energy_and_grad(one, z) for z in position), strict=True)))
    differentiate = torch.func.grad_and_value(one)
    if len(position) == 1:
        with quiet_handlers():
            grad, energy = differentiate(position[0])
        return energy.unsqueeze(0), grad.unsqueeze(0)
    grad, energy = torch.func.vmap(differentiate, randomness="different")(position)
    return energy, grad


def _eager_energy_and_grad(energy_of: Callable[[Tensor], Tensor], z: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad(), quiet_handlers():
        z = z.detach().requires_grad_()
        energy = energy_of(z)
        (grad,) = torch.autograd.grad(energy, z)
    return energy.detach(), grad


def _share(potential: Potential, inputs: tuple[Tensor, ...]) -> Callable[[Tensor], Tensor]:
    """A chunk's share of one chain's energy, as a function of its position."""
    names = list(potential.plates)
    first = dict(zip(names, inputs, strict=False))
    weights = dict(zip(names, inputs[len(names) :], strict=False))
    rows, args, kwargs = potential.arguments_of_chunk(inputs[2 * len(names) :])
    return lambda z: -potential.log_joint.weighted(z, rows, weights, first, args, kwargs)


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
