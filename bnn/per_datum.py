"""Gradients per datum of the log-likelihood, from what passes through a model's layers.

One backward pass gives the gradients g at the outputs of all layers; with the layers' inputs a, datum n has
G_n = Σ_l g_nl a_nlᵀ over the places l at which it meets the weight (time steps, locations of a convolution, repeated
use). Everything a natural gradient needs is a sum over n of products of these, and is computed from a and g (Martens
and Grosse 2015; for convolutions, Grosse and Martens 2016).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnn.layers import Tag, Use
from bnn.recording import untraced

# Largest number of elements of the gradients per datum that are formed at once.
LARGEST_GRADIENTS = 1 << 25


@dataclass(frozen=True)
class Block:
    """``count`` data of one kind; a row r of a layer belongs to datum ``(r // inner) % count``."""

    start: int
    count: int
    inner: int = 1

    def units(self, rows: int) -> Tensor:
        """The datum of each row."""
        return self.start + torch.arange(rows) // self.inner % self.count

    def by_datum(self, x: Tensor) -> Tensor:
        """Rows ``(rows, k)`` as ``(data, places, k)``."""
        if len(x) == self.count:
            return x.unsqueeze(1)
        parts = x.reshape(-1, self.count, self.inner, x.shape[-1])
        return parts.transpose(0, 1).reshape(self.count, -1, x.shape[-1])


class PerDatum:
    """The gradients G_n = Σ_l g_nl a_nlᵀ of all data n, kept as their thin factors where these are smaller.

    :param pieces: ``(a, g)`` of shapes (data, places, columns) and (data, places, rows); one pair per kind of data.
    :param formed: gradients themselves, of shape (data, rows, columns), for other kinds of data.
    """

    def __init__(self, pieces: Sequence[tuple[Tensor, Tensor]], formed: Sequence[Tensor] = ()) -> None:
        self.pieces, self.formed = list(pieces), list(formed)

    def transformed(
        self, columns: Tensor | None, rows: Tensor | None, times: Callable[[Tensor, Tensor], Tensor] = torch.matmul
    ) -> PerDatum:
        """The gradients ``rowsᵀ G_n columns``; ``times`` multiplies a matrix with either.

        Where there are many places, they are summed over first.
        """

        def moved(x: Tensor, by: Tensor | None) -> Tensor:
            return x if by is None else times(x.flatten(0, 1), by).unflatten(0, x.shape[:2])

        small = [_many_places(a, g) and a.shape[2] * g.shape[2] * len(a) <= LARGEST_GRADIENTS for a, g in self.pieces]
        both = list(zip(self.pieces, small, strict=True))
        formed = [*self.formed, *(g.mT @ a for (a, g), is_small in both if is_small)]
        return PerDatum(
            [(moved(a, columns), moved(g, rows)) for (a, g), is_small in both if not is_small],
            [moved(moved(G, columns).mT, rows).mT for G in formed],
        )

    def total(self) -> Tensor:
        """Σ_n G_n."""
        parts = [*(g.flatten(0, 1).T @ a.flatten(0, 1) for a, g in self.pieces), *(G.sum(0) for G in self.formed)]
        return torch.as_tensor(sum(parts))

    def column_gram(self) -> Tensor:
        """Σ_n G_nᵀ G_n."""
        rows = [G.flatten(0, 1) for G in self.formed]
        return torch.as_tensor(sum([*(self._gram(a, g) for a, g in self.pieces), *(G.T @ G for G in rows)]))

    def row_gram(self) -> Tensor:
        """Σ_n G_n G_nᵀ."""
        rows = [G.mT.flatten(0, 1) for G in self.formed]
        return torch.as_tensor(sum([*(self._gram(g, a) for a, g in self.pieces), *(G.T @ G for G in rows)]))

    def squares(self) -> Tensor:
        """Σ_n G_n ∘ G_n."""
        parts = [G.square().sum(0) for G in self.formed]
        for a, g in self.pieces:
            if a.shape[1] == 1:
                parts.append(g[:, 0].square().T @ a[:, 0].square())
            else:
                parts.extend((gc.mT @ ac).square().sum(0) for ac, gc in _chunks(a, g))
        return torch.as_tensor(sum(parts))

    def second_moments(self) -> tuple[Tensor, Tensor]:
        """Kronecker factors: mean of a aᵀ over all rows, and its counterpart of g, summed, so that A ⊗ S ≈ Σ_n.

        For a layer with several places per datum these are the factors of Grosse and Martens (2016): places count as
        independent and alike.
        """
        inputs = joined([a.flatten(0, 1) for a, _ in self.pieces])
        outputs = joined([g.flatten(0, 1) for _, g in self.pieces])
        return inputs.T @ inputs / len(inputs), outputs.T @ outputs

    @staticmethod
    def _gram(a: Tensor, g: Tensor) -> Tensor:
        """Σ_n of (g_nᵀ a_n)ᵀ (g_nᵀ a_n)."""
        if a.shape[1] == 1:
            return (a[:, 0] * g[:, 0].square().sum(-1, keepdim=True)).T @ a[:, 0]
        parts = []
        for ac, gc in _chunks(a, g):
            if not _many_places(a, g):  # through the places' products of g
                parts.append(ac.reshape(-1, a.shape[2]).T @ ((gc @ gc.mT) @ ac).reshape(-1, a.shape[2]))
            else:
                gradients = (gc.mT @ ac).reshape(-1, a.shape[2])
                parts.append(gradients.T @ gradients)
        return torch.as_tensor(sum(parts))


def _many_places(a: Tensor, g: Tensor) -> bool:
    """Whether a gradient is smaller than the products of its places."""
    return a.shape[1] ** 2 > a.shape[2] * g.shape[2]


def _chunks(a: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    size = max(1, LARGEST_GRADIENTS // (a.shape[2] * g.shape[2]))
    yield from zip(a.split(size), g.split(size), strict=True)


@dataclass
class Place:
    """Where the entries of a site stand in a matrix: site's flat index -> row and column."""

    rows: Tensor
    columns: Tensor


def per_datum(
    uses: Sequence[tuple[Use, Block]],
    places: Mapping[str, Place],
    shape: tuple[int, int],
    env: Mapping[Node, Any],
    grads: Mapping[Node, Tensor],
) -> PerDatum:
    """The gradients per datum with respect to a matrix that holds one site, or a weight and its bias.

    A use that mixes rows and columns of the matrix costs as much as the gradients themselves.

    :param uses: all uses of these sites.
    :param places: site -> where its entries stand in the matrix.
    :param shape: the matrix's shape.
    :param env: values of the graph's nodes.
    :param grads: gradients at the outputs of the uses.
    """
    pieces: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
    for use, block in uses:
        rows = use.rows(grads[use.node], env)
        inputs = use.inputs(env).to(rows.dtype)
        try:
            parts = [(block.by_datum(a), block.by_datum(g)) for a, g in _parts(use, places, shape, inputs, rows)]
        except ValueError:
            parts = [_one_by_one(use, block, places, shape, inputs, rows)]
        pieces.setdefault((block.start, block.count), []).extend(parts)
    return PerDatum([(joined([a for a, _ in p], 1), joined([g for _, g in p], 1)) for p in pieces.values()])


def joined(parts: Sequence[Tensor], dim: int = 0) -> Tensor:
    """``torch.cat`` that copies nothing where there is one part."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


@dataclass
class Arrangement:
    """Where one use's entries stand in the matrix: whether its outputs are rows there, and which rows and columns."""

    outputs_are_rows: bool
    rows: list[int]
    columns: list[int]
    factor: float

    @staticmethod
    def of(tag: Tag | None, places: Mapping[str, Place]) -> Arrangement | None:
        """None if the use is of none of the matrix's sites.

        :raises ValueError: if it mixes rows and columns.
        """
        if tag is None or tag.site not in places:
            return None
        with untraced():
            row, column = places[tag.site].rows[tag.index], places[tag.site].columns[tag.index]
            if row.dim() == 1:
                row, column = row[:, None], column[:, None]
            if (row == row[:, :1]).all() and (column == column[:1]).all():
                return Arrangement(True, row[:, 0].tolist(), column[0].tolist(), tag.factor)
            if (row == row[:1]).all() and (column == column[:, :1]).all():
                return Arrangement(False, row[0].tolist(), column[:, 0].tolist(), tag.factor)
        raise ValueError(f"a use of {tag.site!r} mixes rows and columns")


def _parts(
    use: Use, places: Mapping[str, Place], shape: tuple[int, int], inputs: Tensor, rows: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """(a, g) pairs, in the columns and rows of the matrix, that make up one use's gradient."""
    weight, bias = Arrangement.of(use.weight, places), Arrangement.of(use.bias, places)
    parts: list[tuple[Tensor, Tensor]] = []
    if weight is not None:
        a = inputs if weight.factor == 1.0 else inputs * weight.factor
        if weight.outputs_are_rows:
            partner = bias if bias is not None and bias.outputs_are_rows and bias.rows == weight.rows else None
            a = with_constant(a, weight.columns, shape[1], partner)
            bias = bias if partner is None else None
            parts.append((a, placed(rows, weight.rows, shape[0])))
        else:
            parts.append((placed(rows, weight.columns, shape[1]), placed(a, weight.rows, shape[0])))
    if bias is not None:
        constant = rows.new_full((len(rows), 1), bias.factor)
        if bias.outputs_are_rows:
            parts.append((placed(constant, bias.columns, shape[1]), placed(rows, bias.rows, shape[0])))
        else:
            parts.append((placed(rows, bias.columns, shape[1]), placed(constant, bias.rows, shape[0])))
    return parts


def _one_by_one(
    use: Use, block: Block, places: Mapping[str, Place], shape: tuple[int, int], inputs: Tensor, rows: Tensor
) -> tuple[Tensor, Tensor]:
    """(a, g) of a use that mixes rows and columns: the rows of the gradients, against unit vectors."""
    gradients = rows.new_zeros(block.count, shape[0] * shape[1])
    for tag, is_weight in ((use.weight, True), (use.bias, False)):
        if tag is not None and tag.site in places:
            g = block.by_datum(rows) * tag.factor
            one = (g.mT @ block.by_datum(inputs)).flatten(1) if is_weight else g.sum(1)
            with untraced():
                place = places[tag.site]
                index = (place.rows * shape[1] + place.columns)[tag.index.reshape(-1)].to(rows.device)
            gradients = gradients.index_add(1, index, one)
    units = torch.eye(shape[0], dtype=rows.dtype, device=rows.device)
    return gradients.reshape(block.count, *shape), units.expand(block.count, -1, -1)


def placed(x: Tensor, positions: Sequence[int], size: int) -> Tensor:
    """``x`` (rows, k) as columns ``positions`` of a matrix (rows, size) of zeros; repeated positions add up."""
    first, count = positions[0], len(positions)
    if list(positions) == list(range(first, first + count)):
        return x if count == size else torch.nn.functional.pad(x, (first, size - first - count))
    return x.new_zeros(len(x), size).index_add(1, torch.tensor(positions, device=x.device), x)


def with_constant(a: Tensor, positions: Sequence[int], size: int, bias: Arrangement | None) -> Tensor:
    """:func:`placed`, with the input of a bias, which is constant, in its column."""
    if bias is None:
        return placed(a, positions, size)
    column, constant = bias.columns[0], a.new_full((len(a), 1), bias.factor)
    if column == 0 and list(positions) == list(range(1, size)):
        return torch.cat([constant, a], 1)
    a = placed(a, positions, size)
    return torch.cat([a[:, :column], constant, a[:, column + 1 :]], 1)


def squares_per_datum(
    uses: Sequence[tuple[Use, Block]],
    site: str,
    numel: int,
    env: Mapping[Node, Any],
    grads: Mapping[Node, Tensor],
) -> Tensor:
    """Σ_n (∂ℓ_n/∂w_j)² for every entry j of a site, flat.

    :param uses: all uses of the site.
    :param site: its name.
    :param numel: its number of entries.
    :param env: values of the graph's nodes.
    :param grads: gradients at the outputs of the uses.
    """
    parts = [part for use, block in uses for part in _parts_of(use, block, site, env, grads)]
    if _apart([index for index, *_ in parts]):
        total = parts[0][1].new_zeros(numel)
        for index, rows, inputs, _ in parts:
            squares = rows.sum(1).square().sum(0) if inputs is None else PerDatum([(inputs, rows)]).squares()
            if _in_order(index, numel):
                return squares.reshape(-1)
            total = total.index_add(0, index.reshape(-1).to(total.device), squares.reshape(-1))
        return total
    return torch.as_tensor(sum(gradient.square().sum(0) for gradient in _formed(parts, numel).values()))


def gradients_per_datum(
    uses: Sequence[tuple[Use, Block]],
    site: str,
    numel: int,
    env: Mapping[Node, Any],
    grads: Mapping[Node, Tensor],
    rows: slice = slice(None),
) -> dict[int, Tensor]:
    """∂ℓ_n/∂w for every datum n: number of the first datum of a kind -> (data, entries of the site).

    :param uses: all uses of the site.
    :param site: its name.
    :param numel: its number of entries.
    :param env: values of the graph's nodes.
    :param grads: gradients at the outputs of the uses.
    :param rows: which data of each kind.
    """
    parts = []
    for use, block in uses:
        for index, g, a, _ in _parts_of(use, block, site, env, grads):
            parts.append((index, g[rows], a if a is None else a[rows], block))
    return _formed(parts, numel)


def _formed(parts: Sequence[tuple[Tensor, Tensor, Tensor | None, Block]], numel: int) -> dict[int, Tensor]:
    gradients: dict[int, Tensor] = {}
    for index, rows, inputs, block in parts:
        one = rows.sum(1) if inputs is None else (rows.mT @ inputs).reshape(len(rows), -1)
        present = gradients.get(block.start, one.new_zeros(len(one), numel))
        gradients[block.start] = present.index_add(1, index.reshape(-1).to(one.device), one)
    return gradients


def _parts_of(
    use: Use, block: Block, site: str, env: Mapping[Node, Any], grads: Mapping[Node, Tensor]
) -> list[tuple[Tensor, Tensor, Tensor | None, Block]]:
    """(entries, output gradients, inputs or None for a bias, data) of one use."""
    rows = use.rows(grads[use.node], env)
    result: list[tuple[Tensor, Tensor, Tensor | None, Block]] = []
    for tag, is_bias in ((use.weight, False), (use.bias, True)):
        if not isinstance(tag, Tag) or tag.site != site:
            continue
        g = block.by_datum(rows if tag.factor == 1.0 else rows * tag.factor)
        inputs = None if is_bias else block.by_datum(use.inputs(env).to(rows.dtype))
        result.append((tag.index, g, inputs, block))
    return result


def _apart(indices: Sequence[Tensor]) -> bool:
    """Whether no entry of the site appears twice."""
    with untraced():
        entries = torch.cat([index.reshape(-1) for index in indices])
        return len(entries.unique()) == len(entries)


def _in_order(index: Tensor, numel: int) -> bool:
    with untraced():
        return index.numel() == numel and torch.equal(index.reshape(-1), torch.arange(numel))
