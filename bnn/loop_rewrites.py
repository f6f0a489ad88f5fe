"""Rewrites of a recorded graph for a compiler that fuses operations into loops over vectors of numbers.

What counts there is other than in :mod:`bnn.peephole`: not the number of operations, but how the loops run.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from bnn.peephole import VIEWS, replace, shape_of

aten = torch.ops.aten

# Numbers in a vector of the processor, at most.
VECTOR = 16

# Coefficients of tanh x = x + x³ P(x²) on |x| < 0.6: relative error 3e-9.
TANH = (-0.33333298, 0.133319241, -0.0537838299, 0.0207959703, -0.00589515637)

_PRODUCTS = (aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default)
_TRANSPOSES = (aten.t.default, aten.transpose.int)
_CONTIGUOUS: dict[str, Any] = {"memory_format": torch.contiguous_format}


def expand_small_products(graph_module: GraphModule, largest: int = 20_000, together: int = 100_000) -> None:
    """Write small matrix products as sums of products, which a compiler fuses with their neighbours.

    A call of the processor's matrix library costs a few microseconds; below ``largest`` multiplications the compiled
    loop is faster, if it runs along rows of the result that are long enough for vectors of the processor, over factors
    that are computed once and lie in memory. Where all products have at most ``together``, none is left for the
    library, and the whole program is one loop nest (:mod:`bnn.one_kernel`). For the compiled tier on a CPU only.
    """
    graph = graph_module.graph
    sizes = {node: _multiplications(node) for node in graph.nodes if node.target in _PRODUCTS}
    bound = together if max(sizes.values(), default=0) <= together else largest
    for node, multiplications in sizes.items():
        if not 0 < multiplications <= bound or not node.meta["val"].is_floating_point():
            continue
        bias, left, right = node.args if len(node.args) == 3 else (None, *node.args)
        if bias is not None and node.kwargs:
            continue
        rows, columns = shape_of(left)[-2], shape_of(right)[-1]  # type: ignore[index]
        with graph.inserting_before(node):
            turned = columns < VECTOR <= rows
            if turned:
                left, right = _transposed(graph, right), _transposed(graph, left)
                rows, columns = columns, rows
            if columns > 1:
                left = _in_memory(graph, left, in_rows=False)
            if rows > 1:
                right = _in_memory(graph, right)
            wide = graph.call_function(aten.unsqueeze.default, (left, -1))
            tall = graph.call_function(aten.unsqueeze.default, (right, -3))
            product = graph.call_function(aten.mul.Tensor, (wide, tall))
            result = graph.call_function(aten.sum.dim_IntList, (product, [-2]))
            if turned:
                result = graph.call_function(aten.transpose.int, (result, -2, -1))
                result = graph.call_function(aten.clone.default, (result,), _CONTIGUOUS)
            if bias is not None:
                result = graph.call_function(aten.add.Tensor, (result, bias))
        result.meta = dict(node.meta)
        replace(graph_module, node, result)
    graph.eliminate_dead_code()
    graph_module.recompile()


def _multiplications(product: Node) -> int:
    left, right = (shape_of(factor) for factor in product.args[-2:])
    return 0 if left is None or right is None else math.prod(left) * right[-1]


def _in_memory(graph: Graph, node: Any, in_rows: bool = True) -> Node:
    """``node`` in memory, if need be row by row, rather than computed anew wherever it is read."""
    value = node.meta["val"]
    if _is_stored(node) and (not in_rows or value.stride(-1) == 1):
        return node
    if not in_rows and node.target in _TRANSPOSES:
        return _transposed(graph, _in_memory(graph, _transposed(graph, node), in_rows=False))
    if not value.is_contiguous() or node.target in VIEWS:
        node = graph.call_function(aten.clone.default, (node,), _CONTIGUOUS)
        value = value.contiguous()
    # Of what is computed a compiler can only give strides once it is in memory.
    result = graph.call_function(aten.as_strided.default, (node, list(value.shape), list(value.stride())))
    result.meta["val"] = value
    return result


def _is_stored(node: Node) -> bool:
    """Whether a compiler has the node in memory anyway: an input, a product by the library, or a view of one."""
    while node.target in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node.op != "call_function" or node.target in (aten.as_strided.default, aten.mm.default, aten.bmm.default)


def expand_tanh(graph_module: GraphModule) -> None:
    """Write tanh of single precision by an exponential: the vector library's own takes four times as long.

    1 − 2 / (1 + e²ˣ), but below 0.6, where that loses relative precision, x + x³ P(x²) with P of least relative error.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.tanh.default or node.meta["val"].dtype != torch.float32:
            continue
        x = node.args[0]
        with graph.inserting_before(node):
            power = graph.call_function(aten.exp.default, (graph.call_function(aten.add.Tensor, (x, x)),))
            below = graph.call_function(aten.reciprocal.default, (graph.call_function(aten.add.Tensor, (power, 1.0)),))
            far = graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (below, -2.0)), 1.0))
            square = graph.call_function(aten.mul.Tensor, (x, x))
            series = graph.call_function(aten.mul.Tensor, (square, TANH[-1]))
            for coefficient in TANH[-2::-1]:
                series = graph.call_function(aten.add.Tensor, (series, coefficient))
                series = graph.call_function(aten.mul.Tensor, (series, square))
            near = graph.call_function(aten.add.Tensor, (graph.call_function(aten.mul.Tensor, (series, x)), x))
            is_near = graph.call_function(aten.lt.Scalar, (square, 0.36))
            result = graph.call_function(aten.where.self, (is_near, near, far))
        result.meta = dict(node.meta)
        replace(graph_module, node, result)
    graph_module.recompile()


def turn_narrow_products(graph_module: GraphModule, narrow: int = 16) -> None:
    """Compute batched products of few columns as the transpose of products of few rows.

    The gradient of a thin weight for many chains, ``dᵀ x`` with a handful of inputs, runs three times slower in the
    processor's matrix library than ``(xᵀ d)ᵀ`` with its copy.
    """
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.bmm.default:
            continue
        rows, columns = (shape_of(node) or (0, 0, 0))[1:]
        if not 1 < columns < min(narrow, rows):
            continue
        with graph.inserting_before(node):
            left, right = (_transposed(graph, factor) for factor in node.args)
            product = graph.call_function(aten.bmm.default, (right, left))
            product.meta["val"] = node.meta["val"].mT
            result = graph.call_function(aten.clone.default, (_transposed(graph, product),))
            result.kwargs = {"memory_format": torch.contiguous_format}
        result.meta = dict(node.meta)
        replace(graph_module, node, result)
    graph_module.recompile()


def _transposed(graph: Graph, node: Any) -> Node:
    """The transpose of a matrix or of each of a batch."""
    if node.target is aten.t.default and isinstance(node.args[0], Node):
        return node.args[0]
    dim = node.meta["val"].dim()
    if node.target is aten.transpose.int and {place % dim for place in node.args[1:]} == {dim - 2, dim - 1}:
        return node.args[0]
    result = graph.call_function(aten.transpose.int, (node, dim - 2, dim - 1))
    result.meta["val"] = node.meta["val"].mT
    return result
