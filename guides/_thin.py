"""The natural direction of a large matrix from the thin factors of its gradient.

The gradient of a minibatch is gᵀ a, of rank at most the number of its rows. Preconditioning g and a, rather than their
product, makes Σ ∇ = (g U Uᵀ)ᵀ (a V Vᵀ) cheap; the prior's part of the gradient is not thin, but changes slowly, and its
direction is computed anew only every few steps.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnn.guides._blocks import Block, Params
from bnn.guides._perturbed import Layer
from bnn.guides._triangular import covariance_of
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


class Covariances:
    """U Uᵀ and V Vᵀ of blocks with thin directions, computed anew where the factors have been."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, Tensor, dict[str, Tensor]]] = {}

    def __call__(self, params: Sequence[Params], numbers: Container[int]) -> list[Params]:
        """The parameters of all blocks, with the covariances of those in ``numbers``."""
        return [{**p, **self._of(k, p)} if k in numbers else p for k, p in enumerate(params)]

    def _of(self, number: int, params: Params) -> dict[str, Tensor]:
        rows, cols = params["row_scale_tril"], params["col_scale_tril"]
        known = self._known.get(number)
        if known is None or known[0] is not rows or known[1] is not cols:
            found = {"row_covariance": covariance_of(rows), "col_covariance": covariance_of(cols)}
            self._known[number] = known = rows, cols, found
        return known[2]


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

    :param params: its parameters and covariances.
    :param layers: all uses of its sites.
    :param env: values of the graph's nodes.
    :param grads: gradients of the log-likelihood at the outputs of the uses.
    :param weight: λ.
    :param prior_gradient: gradient of the log prior; None if what follows is known.
    :param known: Σ times it, and its decrement. The whole decrement is then bounded by (√ + √)².
    """
    rows, cols = params["row_covariance"], params["col_covariance"]
    outputs = [layer.use.rows(grads[layer.use.node], env) for layer in layers]
    a = _stacked([layer.inputs(env, g.dtype) for layer, g in zip(layers, outputs, strict=True)])
    g = _stacked([placed(g, layer.weight.rows, len(rows)) for layer, g in zip(layers, outputs, strict=True)])
    g = g if weight == 1.0 else g / weight
    of_a, of_g = a @ cols, g @ rows
    decrement = ((of_a @ a.mT) * (of_g @ g.mT)).sum()
    if known is not None:
        prior, size = known
        return Thin(torch.addmm(prior, of_g.mT, of_a), (decrement.sqrt() + size.sqrt()).square(), prior, size)
    assert prior_gradient is not None
    prior = rows @ prior_gradient @ cols
    size = (prior_gradient * prior).sum()
    direction = of_g.mT @ of_a
    whole = decrement + size + 2.0 * (prior_gradient * direction).sum()
    return Thin(direction + prior, whole.clamp_min(0.0), prior, size)


def _stacked(rows: Sequence[Tensor]) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))
