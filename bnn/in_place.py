"""Large results of a recorded graph, written into memory that is there already.

Recording writes every operation out of place. For a net of millions of weights each result is then a vector as long as
the net, fresh from the operating system, which fills it with zeros page by page: more time than the arithmetic. Here an
elementwise operation writes over an operand that nobody reads afterwards, and products that only become parts of one
flat vector are written into that vector. No value changes, not by a rounding. For the tier that runs op by op.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from bnn.peephole import shape_of

aten = torch.ops.aten

# Below this many numbers memory is reused by the allocator, and a plan saves nothing.
SMALLEST = 1 << 16

# Elementwise operations, whose result may overwrite any operand of its shape.
_ELEMENTWISE = {
    aten.add.Tensor: aten.add.out,
    aten.sub.Tensor: aten.sub.out,
    aten.mul.Tensor: aten.mul.out,
    aten.div.Tensor: aten.div.out,
    aten.addcmul.default: aten.addcmul.out,
    aten.addcdiv.default: aten.addcdiv.out,
    aten.pow.Tensor_Scalar: aten.pow.Tensor_Scalar_out,
    aten.clamp_min.default: aten.clamp_min.out,
    aten.clamp_max.default: aten.clamp_max.out,
    aten.where.self: aten.where.self_out,
    **{
        getattr(aten, name).default: getattr(aten, name).out
        for name in ("neg", "exp", "expm1", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "relu", "square")
        if hasattr(getattr(aten, name), "out")
    },
}
_PRODUCTS: dict[Any, Any] = {
    aten.mm.default: aten.mm.out,
    aten.bmm.default: aten.bmm.out,
    aten.addmm.default: aten.addmm.out,
}


def reuse_memory(graph_module: GraphModule) -> None:
    """Rewrite the graph so; inputs and constants are never written to. Dead code must be gone before."""
    _fill_flat_vectors(graph_module)
    nodes = list(graph_module.graph.nodes)
    order = {node: place for place, node in enumerate(nodes)}
    roots: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    for node in nodes:
        roots[node] = root = _root(node, roots)
        last[root] = max(last.get(root, 0), *(order[user] for user in node.users), order[node])
    for node in nodes:
        target = _ELEMENTWISE.get(node.target)
        if target is None or not _is_large(node) or "out" in node.kwargs:
            continue
        for operand in node.all_input_nodes:
            root = roots[operand]
            if last[root] == order[node] and _may_hold(operand, node, root) and _apart(operand, node, roots):
                node.target, node.kwargs = target, {**node.kwargs, "out": operand}
                break
    graph_module.recompile()


def _fill_flat_vectors(graph_module: GraphModule) -> None:
    """``cat`` of flattened products: each product is written to its place in the vector."""
    graph: Graph = graph_module.graph
    for node in list(graph.nodes):
        if node.target is not aten.cat.default or not _is_large(node) or node.kwargs:
            continue
        pieces = node.args[0]
        shape = shape_of(node) or ()
        dim = (node.args[1] if len(node.args) > 1 else 0) % len(shape)
        if any(size != 1 for size in shape[:dim]):
            continue
        products = [_product_of(piece) for piece in pieces]
        sizes = [math.prod(shape_of(piece) or ()) for piece in pieces]
        if 2 * sum(size for size, product in zip(sizes, products, strict=True) if product is not None) < sum(sizes):
            continue
        value = node.meta["val"]
        first = min((p for p in products if p is not None), key=list(graph.nodes).index)
        with graph.inserting_before(first):
            flat = graph.call_function(aten.empty.memory_format, ([value.numel()],))
            flat.kwargs = {"dtype": value.dtype, "device": value.device}
            flat.meta["val"] = value.reshape(-1)
        written = []
        offset = 0
        for piece, product, size in zip(pieces, products, sizes, strict=True):
            with graph.inserting_before(node if product is None else product):
                target = piece if product is None else product
                place = graph.call_function(aten.slice.Tensor, (flat, 0, offset, offset + size))
                place = graph.call_function(aten.view.default, (place, list(shape_of(target) or ())))
                if product is None:
                    written.append(graph.call_function(aten.copy_.default, (place, piece)))
                else:
                    product.target, product.kwargs = _PRODUCTS[product.target], {**product.kwargs, "out": place}
                    written.append(product)
            offset += size
        with graph.inserting_before(node):
            filled = graph.call_function(_filled, (flat, *written))
            filled.meta["val"] = flat.meta["val"]
            whole = graph.call_function(aten.view.default, (filled, list(shape)))
            whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        graph.erase_node(node)
    graph.eliminate_dead_code()


def _filled(flat: torch.Tensor, *parts: torch.Tensor) -> torch.Tensor:
    """``flat``, when its parts are written."""
    del parts
    return flat


def _product_of(piece: Any) -> Node | None:
    """The product that a piece of a ``cat`` is and that nothing else needs."""
    node = piece
    while isinstance(node, Node) and node.target in (aten.view.default, aten._unsafe_view.default):
        if len(node.users) != 1:
            return None
        node = node.args[0]
    is_product = isinstance(node, Node) and node.target in _PRODUCTS and "out" not in node.kwargs
    return node if is_product and len(node.users) == 1 and node.meta["val"].is_contiguous() else None


def _is_large(node: Node) -> bool:
    return shape_of(node) is not None and node.meta["val"].numel() >= SMALLEST


def _root(node: Node, roots: dict[Node, Node]) -> Node:
    """The node whose memory ``node`` shows: itself if it has its own, or if it came from outside."""
    if node.op != "call_function" or not node.all_input_nodes:
        return node
    if isinstance(out := node.kwargs.get("out"), Node):
        return roots[out]
    shares = node.target in (operator.getitem, _filled, aten._unsafe_view.default)
    if isinstance(node.target, torch._ops.OpOverload):
        shares |= any(result.alias_info is not None for result in node.target._schema.returns)
    return roots[node.all_input_nodes[0]] if shares else node


def _may_hold(operand: Node, node: Node, root: Node) -> bool:
    """Whether the graph made the operand's memory, and it has the form of the result."""
    if root.op != "call_function" or not isinstance(root.target, torch._ops.OpOverload):
        return False
    if shape_of(operand) != shape_of(node) or shape_of(root) is None:
        return False
    mine, result, whole = operand.meta["val"], node.meta["val"], root.meta["val"]
    return (
        (mine.dtype, mine.device, mine.numel()) == (result.dtype, result.device, whole.numel())
        and mine.is_contiguous()
        and result.is_contiguous()
    )


def _apart(operand: Node, node: Node, roots: dict[Node, Node]) -> bool:
    """Whether no other operand shows the same memory in another way."""
    others = [other for other in node.all_input_nodes if other is not operand]
    return all(roots[other] is not roots[operand] for other in others)


def write_back(graph_module: GraphModule) -> GraphModule:
    """A recorded graph whose outputs are written over its inputs, one by one, and are these."""
    graph, inputs = graph_module.graph, [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    output = next(node for node in graph.nodes if node.op == "output")
    with graph.inserting_before(output):
        for node, made in zip(inputs, output.args[0], strict=True):
            graph.call_function(aten.copy_.default, (node, made))
    output.args = (tuple(inputs),)
    graph_module.recompile()
    return graph_module
