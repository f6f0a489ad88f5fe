"""The natural direction of a large matrix from the thin factors of its gradient.

The gradient of a minibatch is gᵀ a, of rank at most the number of its rows. Preconditioning g and a, rather than their
product, makes Σ ∇ = (g U Uᵀ)ᵀ (a V Vᵀ) cheap; the prior's part of the gradient is not thin, but changes slowly, and its
direction is computed anew only every few steps.
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
from bnn.guides._triangular import times_lower, times_upper
from bnn.per_datum import placed


@dataclass
class Thin:
    """A direction that needs no further preconditioning.

    :ivar direction: Σ ∇.
    :ivar decrement: ∇ᵀ Σ ∇.
    :ivar prior: the prior's part of the direction, to be used again.
    :ivar prior_decrement: its own ∇ᵀ Σ ∇.
    """

    direction: Tensor
    decrement: Tensor
    prior: Tensor
    prior_decrement: Tensor


def is_thin(block: Block, layers: Sequence[Layer]) -> bool:
    """Whether thin factors are the cheaper way for a block."""
    if block.family != "matrix" or layers[0].flipped:
        return False
    rows, cols = layers[0].shape
    places = sum(layer.rows_of_output() for layer in layers)
    return places * (rows**2 + cols**2) < rows * cols * (rows + cols)


def thin_direction(
    params: Params,
    layers: Sequence[Layer],
    env: Mapping[Node, Any],
    grads: Mapping[Node, Tensor],
    weight: float,
    prior_gradient: Tensor | None,
    known: tuple[Tensor, Tensor] | None,
) -> Thin:
    """The natural direction of a matrix normal's location.

    :param params: its parameters.
    :param layers: all uses of its sites.
    :param env: values of the graph's nodes.
    :param grads: gradients of the log-likelihood at the outputs of the uses.
    :param weight: λ.
    :param prior_gradient: gradient of the log prior; None if what follows is known.
    :param known: Σ times it, and its decrement. The whole decrement is then bounded by (√ + √)².
    """
    rows, cols = params["row_scale_tril"], params["col_scale_tril"]
    outputs = [layer.use.rows(grads[layer.use.node], env) for layer in layers]
    a = _stacked([layer.inputs(env, g.dtype) for layer, g in zip(layers, outputs, strict=True)])
    g = _stacked([placed(g, layer.weight.rows, len(rows)) for layer, g in zip(layers, outputs, strict=True)])
    a, g = times_lower(a, cols), times_lower(g if weight == 1.0 else g / weight, rows)
    decrement = ((a @ a.mT) * (g @ g.mT)).sum()
    g, a = times_upper(g, rows), times_upper(a, cols)
    if known is not None:
        prior, size = known
        return Thin(torch.addmm(prior, g.mT, a), (decrement.sqrt() + size.sqrt()).square(), prior, size)
    assert prior_gradient is not None
    direction = g.mT @ a
    whitened = times_lower(times_lower(prior_gradient, cols).mT, rows)
    size = whitened.square().sum()
    prior = times_upper(times_upper(whitened, rows).mT, cols)
    whole = decrement + size + 2.0 * (prior_gradient * direction).sum()
    return Thin(direction + prior, whole.clamp_min(0.0), prior, size)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
