"""All data, chunk by chunk: for energies and gradients that no minibatch noise may disturb."""

from __future__ import annotations

import functools
import itertools
import math
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
    potential: Potential,
    position: Tensor,
    traced: Callable[..., tuple[Tensor, ...]],
    calls: int = 0,
    *,
    along: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Sums over all chunks of what ``traced`` gives for each, every one leading with the chains.

    :param traced: :func:`traced_chunk`, :func:`traced_chunk_and_grad` or, with ``along``,
        :func:`traced_chunk_hessian_product`.
    :param calls: how often this will be asked for, as far as is known: decides whether compiling pays.
    :param along: directions ``(chains, dim)``.
    :raises NotImplementedError: with ``batches=`` if the model has not one subsampled plate, so that one batch's
        share of the data is not known.
    :raises ValueError: if a pass through ``batches`` has another number of rows than the plate.
    """
    checks.position(position, potential.dim)
    checks.batches_have_one_plate(potential.plates, potential.batches)
    share = potential.share
    if share is not None and potential.batches is not None:
        raise NotImplementedError(
            "the energy of all data is not known with batches= and ranks='data', where each rank sees its own rows: "
            "pass the data as arguments of run(), with pyro.plate('data', N, subsample_size=B) in the model."
        )
    leading = [t.detach().to(potential.dtype).contiguous() for t in (position, along) if t is not None]
    totals: tuple[Tensor, ...] = ()
    if potential.batches is None:
        given: Iterable[list[Tensor]] = potential.chunks
        if share is not None and potential.plates:
            given = itertools.islice(given, share.ranks.rank, None, share.ranks.size)
    else:
        given = chunks_of_batches(potential.plates.values(), potential.batches, potential.dtype, potential.device)
    for inputs in given:
        tensors = [*leading, *inputs]
        program = potential.kept_program(
            (traced.__name__, *(tuple(t.shape) for t in tensors)),
            partial(traced, potential),
            tensors,
            [*[True] * len(leading), *[False] * len(inputs)],
            calls * minibatches_in_all(potential.plates.values()),
            precision="full",
        )
        parts = program(*tensors)
        totals = tuple(a + b for a, b in zip(totals, parts, strict=True)) if totals else parts
    if share is None:
        return totals
    return tuple(share.ranks.sum(totals) if potential.plates else share.mean(totals))


class Chunks:
    """Inputs of :func:`traced_chunk` that together cover all rows of some plates once: their product.

    Each holds, in this order: for each plate a flag that is one in the plate's first chunk; for each plate a weight per
    row, zero for rows that only fill up the last chunk; the plates' rows.

    >>> [[values.tolist() for values in chunk] for chunk in Chunks([Plate("data", 3, 2)])]
    [[1.0, [1.0, 1.0], [0, 1]], [0.0, [1.0, 0.0], [2, 2]]]
    """

    def __init__(
        self, plates: Iterable[Plate], dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
    ) -> None:
        self.plates, self.dtype, self.device = tuple(plates), dtype, device

    @functools.cached_property
    def _pieces(self) -> list[list[tuple[Tensor, Tensor, Tensor]]]:
        """Flag, weights and rows of each plate's chunks; made at the first use, and kept."""
        pieces = []
        for plate in self.plates:
            rows = torch.arange(-(-plate.size // plate.batch_size) * plate.batch_size, device=self.device)
            weights = (rows < plate.size).to(self.dtype).split(plate.batch_size)
            rows = rows.clamp(max=plate.size - 1)
            first = torch.tensor([1.0] + [0.0] * (len(weights) - 1), dtype=self.dtype, device=self.device)
            pieces.append(list(zip(first, weights, rows.split(plate.batch_size), strict=True)))
        return pieces

    def __iter__(self) -> Iterator[list[Tensor]]:
        """One chunk after another."""
        for corner in itertools.product(*self._pieces):
            yield [part for parts in zip(*corner, strict=True) for part in parts]


def minibatches_in_all(plates: Iterable[Plate]) -> int:
    """Minibatch gradients that a pass over all data costs.

    >>> minibatches_in_all([Plate("data", 10, 4)])
    3
    """
    return math.prod(math.ceil(plate.size / plate.batch_size) for plate in plates)


def chunks_of_batches(
    plates: Collection[Plate], batches: Iterable[Any], dtype: torch.dtype, device: torch.device
) -> Iterator[list[Tensor]]:
    """The same for one pass through ``batches``: each chunk ends in the tensors of a batch.

    :raises ValueError: if the pass has another number of rows than the plate.
    """
    one, rows_seen = torch.ones((), dtype=dtype, device=device), 0
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
            *TensorLeaves.tensors((args, kwargs), device),
        ]
    for plate in plates:
        if plate.size != rows_seen:
            raise ValueError(
                f"a pass through batches= gave {rows_seen} rows, but plate {plate.name!r} has {plate.size}: the "
                "energy of all data needs each row once."
            )


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


def traced_chunk_hessian_product(
    potential: Potential, position: Tensor, along: Tensor, *inputs: Tensor
) -> tuple[Tensor, ...]:
    """One chunk's share of the Hessian times a direction, ``(chains, dim)``, written for recording."""
    one = _share(potential, inputs)
    if not potential.is_recorded:
        return (torch.stack([_eager_product(one, z, v) for z, v in zip(position, along, strict=True)]),)

    def product(z: Tensor, v: Tensor) -> Tensor:
        return torch.func.grad(lambda z: (torch.func.grad(one)(z) * v).sum())(z)

    if len(position) == 1:
        with quiet_handlers():
            return (product(position[0], along[0]).unsqueeze(0),)
    return (torch.func.vmap(product, randomness="different")(position, along),)


def _eager_product(energy_of: Callable[[Tensor], Tensor], z: Tensor, v: Tensor) -> Tensor:
    with torch.enable_grad(), quiet_handlers():
        z = z.detach().requires_grad_()
        (grad,) = torch.autograd.grad(energy_of(z), z, create_graph=True)
        (product,) = torch.autograd.grad(grad, z, v, materialize_grads=True)
    return product.detach()


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
    return DataLoader(
        batches.dataset,
        batches.batch_size,
        sampler=batches.sampler,
        collate_fn=batches.collate_fn,
        generator=batches.generator,
    )
