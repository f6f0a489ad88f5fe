"""The natural direction of a large matrix from the thin factors of its gradient.

The gradient of a minibatch is gᵀ a, of rank at most the number of its rows. Preconditioning g and a, rather than their
product, makes Σ ∇ = (g U Uᵀ)ᵀ (a V Vᵀ) cheap; the prior's part of the gradient is not thin, but changes slowly, and its
direction is computed anew only every few steps. Triangular factors are multiplied in blocks that skip their zeros.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnn.guides._blocks import Block, Params
from bnn.guides._perturbed import Layer
from bnn.layers import Use
from bnn.per_datum import Block as Data
from bnn.per_datum import per_datum

# Triangular factors of at least this many rows are multiplied in PARTS blocks of rows.
LARGE, PARTS = 256, 4


@dataclass
class Thin:
    """A direction that needs no further preconditioning.

    :ivar direction: Σ ∇.
    :ivar decrement: ∇ᵀ Σ ∇.
    :ivar prior: the prior's part of the direction, to be used again.
    """

    direction: Tensor
    decrement: Tensor
    prior: Tensor


def is_thin(block: Block, layers: Sequence[Layer]) -> bool:
    """Whether thin factors are the cheaper way for a block."""
    if block.family != "matrix":
        return False
    rows, cols = layers[0].shape
    places = sum(layer.rows_of_output() for layer in layers)
    return places * (rows**2 + cols**2) < rows * cols * (rows + cols)


def thin_direction(
    block: Block,
    params: Params,
    uses: list[tuple[Use, Data]],
    env: Mapping[Node, Any],
    grads: Mapping[Node, Tensor],
    weight: float,
    prior_gradient: Tensor,
    prior_direction: Tensor | None,
) -> Thin:
    """The natural direction of a matrix normal's location.

    :param block: the block.
    :param params: its parameters.
    :param uses: all uses of its sites.
    :param env: values of the graph's nodes.
    :param grads: gradients of the log-likelihood at the outputs of the uses.
    :param weight: λ.
    :param prior_gradient: gradient of the log prior.
    :param prior_direction: Σ times it, if it is known.
    """
    rows, cols = params["row_scale_tril"], params["col_scale_tril"]
    places, shape = block.matrix_of(block.names)
    found = per_datum(uses, places, shape, env, grads)
    assert found is not None
    a = torch.cat([piece.flatten(0, 1) for piece, _ in found.pieces])
    g = torch.cat([piece.flatten(0, 1) for _, piece in found.pieces]) / weight
    a, g = times_lower(a, cols), times_lower(g, rows)
    decrement = ((a @ a.mT) * (g @ g.mT)).sum()
    direction = times_upper(g, rows).mT @ times_upper(a, cols)
    if prior_direction is None:
        prior_direction = (rows @ (rows.mT @ prior_gradient @ cols)) @ cols.mT
    decrement = decrement + (prior_gradient * (2.0 * direction + prior_direction)).sum()
    return Thin(direction + prior_direction, decrement.clamp_min(0.0), prior_direction)


def times_lower(x: Tensor, factor: Tensor) -> Tensor:
    """X L for a lower triangular L."""
    size = len(factor)
    if size < LARGE:
        return x @ factor
    starts = [size * part // PARTS for part in range(PARTS + 1)]
    return torch.cat([x[:, low:] @ factor[low:, low:high] for low, high in zip(starts, starts[1:], strict=False)], 1)


def times_upper(x: Tensor, factor: Tensor) -> Tensor:
    """X Lᵀ for a lower triangular L."""
    size = len(factor)
    if size < LARGE:
        return x @ factor.mT
    starts = [size * part // PARTS for part in range(PARTS + 1)]
    return torch.cat(
        [x[:, :high] @ factor[low:high, :high].mT for low, high in zip(starts, starts[1:], strict=False)], 1
    )
