"""Noise added to the outputs of layers in place of their weights.

A block's noise is W − M = R (σ ∘ E) Cᵀ with E_ij ~ N(0, 1): R = U, C = V for a matrix normal, eigenvectors for an
eigenbasis, nothing for a factorized Gaussian. A layer's output for the inputs a is then a Mᵀ plus, with ã = a C,

    "shared"    ã (σ ∘ E)ᵀ Rᵀ                          the same weights for all data, by associativity;
    "flipout"   ((ã ∘ s_n) (σ ∘ E)ᵀ ∘ r_n) Rᵀ          signs s, r for every datum (Wen et al. 2018). They flip the noise
                                                       where its entries are independent, not the weights;
    "local"     (√(ã² (σ²)ᵀ) ∘ ζ_n) Rᵀ                 fresh noise for every output (Kingma et al. 2015).

All give each datum the same law of its outputs. "local" draws the places of a datum (time steps, pixels) independently,
which is another law, so where there are several it becomes "flipout".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnn.guides._blocks import Block, Factors
from bnn.guides._triangular import times_lower, times_upper
from bnn.layers import Use
from bnn.per_datum import Arrangement, Place, with_constant
from bnn.per_datum import Block as Data

NOISES = ("weights", "shared", "flipout", "local")


@dataclass
class Layer:
    """One use of a block's weights.

    :ivar weight: its place in the block's matrix.
    :ivar bias: that of the bias, if it is in the same matrix.
    :ivar shape: the matrix's shape.
    :ivar flipped: whether the block's matrix has inputs for rows, so that it is taken the other way round.
    """

    use: Use
    data: Data
    weight: Arrangement
    bias: Arrangement | None
    shape: tuple[int, int]
    flipped: bool

    def rows_of_output(self) -> int:
        """How many rows the use has: data times places."""
        return self.use.node.meta["val"].numel() // len(self.weight.rows)

    @property
    def is_local(self) -> bool:
        """Whether every datum meets the weight in one place, so that its outputs can have noise of their own."""
        return self.rows_of_output() == self.data.count

    def inputs(self, env: Mapping[Node, Any], dtype: torch.dtype) -> Tensor:
        """Rows in the columns of the block's matrix."""
        a = self.use.inputs(env).to(dtype)
        a = a if self.weight.factor == 1.0 else a * self.weight.factor
        return with_constant(a, self.weight.columns, self.shape[1], self.bias)

    def outputs(self, rows: Tensor) -> Tensor:
        """Rows of the block's matrix in the shape of the layer's output."""
        assert self.use.unrows is not None
        whole = self.weight.rows == list(range(rows.shape[1]))
        return self.use.unrows(rows if whole else rows[:, torch.tensor(self.weight.rows, device=rows.device)])


def layers_of(block: Block, names: Sequence[str], uses: Mapping[str, Sequence[tuple[Use, Data]]]) -> list[Layer] | None:
    """The layers that ``names`` of a block are used in, or None if noise cannot be added to their outputs."""
    found = {id(use): (use, data) for name in names for use, data in uses.get(name, ())}
    if not found or any(name not in uses for name in names):
        return None
    places, shape = block.matrix_of(names)
    for flipped in (False, True):
        if flipped:
            places, shape = {n: Place(p.columns, p.rows) for n, p in places.items()}, (shape[1], shape[0])
        layers = [_layer(use, data, places, shape, flipped) for use, data in found.values()]
        nodes = [use.node for use, _ in found.values()]
        if all(layer is not None for layer in layers) and len(set(nodes)) == len(nodes):
            return layers  # type: ignore[return-value]
    return None


def _layer(use: Use, data: Data, places: Mapping[str, Place], shape: tuple[int, int], flipped: bool) -> Layer | None:
    try:
        weight, bias = Arrangement.of(use.weight, places), Arrangement.of(use.bias, places)
    except ValueError:
        return None
    if weight is None or use.unrows is None or not weight.outputs_are_rows:
        return None
    if bias is not None and (not bias.outputs_are_rows or bias.rows != weight.rows):
        return None
    return Layer(use, data, weight, bias, shape, flipped)


class Perturbation:
    """Adds the noise of blocks to the outputs of their layers while a model's graph is replayed.

    :param kind: one of :data:`NOISES` but ``"weights"``.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._layers: dict[Node, list[tuple[Layer, Callable[[Layer, Tensor], Tensor]]]] = {}

    def add(self, layers: Sequence[Layer], factors: Factors) -> None:
        """Noise for the layers of one block."""
        if layers[0].flipped:
            scale = None if factors.scale is None else factors.scale.mT
            factors = Factors(factors.columns, scale, factors.rows, factors.noise.mT, factors.triangular)
        noise = self._shared(factors) if self.kind == "shared" else self._per_datum(factors)
        for layer in layers:
            self._layers.setdefault(layer.use.node, []).append((layer, noise))

    def __call__(self, node: Node, value: Any, env: Mapping[Node, Any]) -> Any:
        """The value of ``node``, with noise if it is a layer's output."""
        for layer, noise in self._layers.get(node, ()):
            value = value + layer.outputs(noise(layer, layer.inputs(env, value.dtype)))
        return value

    def _shared(self, factors: Factors) -> Callable[[Layer, Tensor], Tensor]:
        scaled = factors.noise if factors.scale is None else factors.scale * factors.noise

        def noise(layer: Layer, a: Tensor) -> Tensor:
            return _output(_input(a, factors) @ scaled.mT, factors)

        return noise

    def _per_datum(self, factors: Factors) -> Callable[[Layer, Tensor], Tensor]:
        scaled = factors.noise if factors.scale is None else factors.scale * factors.noise
        signs: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

        def noise(layer: Layer, a: Tensor) -> Tensor:
            data = layer.data
            if self.kind == "local" and layer.is_local:
                fresh = torch.randn(len(a), len(scaled), dtype=a.dtype, device=a.device)
                if factors.scale is None:  # one variance for all outputs of a datum
                    return _squared_norms(a, factors).clamp_min(1e-30).sqrt() * _output(fresh, factors)
                variance = _input(a, factors).square() @ factors.scale.square().mT
                return _output(variance.clamp_min(1e-30).sqrt() * fresh, factors)
            inner, key = _input(a, factors), (data.start, data.count)
            if key not in signs:  # a datum keeps its signs in every place and use
                signs[key] = _signs(data.count, scaled.shape[1], a), _signs(data.count, scaled.shape[0], a)
            of_inputs, of_outputs = (_by_row(sign, data, len(a)) for sign in signs[key])
            return _output(((inner * of_inputs) @ scaled.mT) * of_outputs, factors)

        return noise


def _signs(rows: int, columns: int, like: Tensor) -> Tensor:
    return torch.randint(2, (rows, columns), dtype=like.dtype, device=like.device) * 2.0 - 1.0


def _by_row(signs: Tensor, data: Data, rows: int) -> Tensor:
    """Signs of the datum of each row."""
    if rows == data.count:
        return signs
    outer = rows // (data.count * data.inner)
    return signs[None, :, None].expand(outer, -1, data.inner, -1).reshape(rows, -1)


def _input(a: Tensor, factors: Factors) -> Tensor:
    """A C."""
    if factors.columns is None:
        return a
    return times_lower(a, factors.columns) if factors.triangular else a @ factors.columns


def _squared_norms(a: Tensor, factors: Factors) -> Tensor:
    """‖a C‖² for each row."""
    if factors.covariance is None:
        return _input(a, factors).square().sum(-1, keepdim=True)
    fixed = a.detach()
    # aᵀΣa with its gradient 2Σa, for which Σ need not be multiplied again.
    return ((2.0 * a - fixed) * (fixed @ factors.covariance)).sum(-1, keepdim=True)


def _output(rows: Tensor, factors: Factors) -> Tensor:
    """Rows Rᵀ."""
    if factors.rows is None:
        return rows
    return times_upper(rows, factors.rows) if factors.triangular else rows @ factors.rows.mT
