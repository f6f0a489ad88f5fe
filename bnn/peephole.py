"""Small rewrites that make a recorded graph cheap to run op by op.

Recording leaves behind what autograd, broadcasting and constant distribution parameters write out in full: products
with ones, sums with arrays of zeros, chains of scalings. At one to four microseconds an operation these cost more
than the arithmetic of a small net. Every rewrite keeps the value up to rounding.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.reshape.default)
VIEWS = {
    operator.getitem,
    aten.split_with_sizes.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.t.default,
    aten.transpose.int,
    aten.unsqueeze.default,
    aten.squeeze.dim,
}
_ADDS = (aten.add.Tensor, aten.sub.Tensor)
# Inputs up to this size are copied so that their views need not be made anew.
LARGEST_COPIED = 1 << 16

_ARITHMETIC = {
    aten.mul.Scalar: aten.mul.Tensor,
    aten.div.Scalar: aten.div.Tensor,
    aten.add.Scalar: aten.add.Tensor,
    aten.sub.Scalar: aten.sub.Tensor,
}


def peephole(graph_module: GraphModule) -> None:
    """Apply all rewrites in place until none applies."""
    _shrink_uniform_constants(graph_module)
    for _ in range(8):
        before = len(graph_module.graph.nodes)
        _numbers_to_constants(graph_module)
        _merge_scalings(graph_module)
        _drop_identities(graph_module)
        _share_equal_nodes(graph_module)
        graph_module.graph.eliminate_dead_code()
        if len(graph_module.graph.nodes) == before:
            break
    _cheaper_calls(graph_module)
    _fuse_multiply_add(graph_module)
    _gather_rows(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()


def is_random(node: Node) -> bool:
    """Whether the node draws random numbers."""
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags


def shape_of(node: Any) -> tuple[int, ...] | None:
    """Shape of the node's value, None if it is not a tensor."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def constant_node(graph_module: GraphModule, before: Node, value: torch.Tensor) -> Node:
    """A new constant of the program, placed before ``before``."""
    number = len(list(graph_module.buffers()))
    while hasattr(graph_module, f"_constant_{number}"):
        number += 1
    graph_module.register_buffer(f"_constant_{number}", value)
    graph: Graph = graph_module.graph
    with graph.inserting_before(before):
        node = graph.get_attr(f"_constant_{number}")
    node.meta["val"] = value
    return node


def replace(graph_module: GraphModule, node: Node, replacement: Node) -> None:
    """Use one node for another, which goes."""
    node.replace_all_uses_with(replacement)
    graph_module.graph.erase_node(node)


def _constant(graph_module: GraphModule, node: Any) -> torch.Tensor | None:
    if isinstance(node, Node) and node.op == "get_attr":
        value = getattr(graph_module, str(node.target))
        return value.detach() if isinstance(value, torch.Tensor) else None
    return None


def _scalar(graph_module: GraphModule, node: Any) -> torch.Tensor | None:
    value = _constant(graph_module, node)
    return value if value is not None and value.dim() == 0 and value.is_floating_point() else None


def _shrink_uniform_constants(graph_module: GraphModule) -> None:
    """An array of equal numbers becomes one number where broadcasting gives the same result."""
    for node in list(graph_module.graph.nodes):
        spread = node.target is aten.expand.default  # of a constant that is too large to be folded
        value = _constant(graph_module, node.args[0] if spread else node)
        if value is None or not value.numel() or not value.is_floating_point():
            continue
        if value.dim() == 0 and not spread:
            continue
        if not (value == value.reshape(-1)[0]).all():
            continue
        for user in list(node.users):
            if user.target not in (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor):
                continue
            others = [a for a in user.args if a is not node]
            if len(others) == 1 and shape_of(others[0]) == shape_of(user):
                small = constant_node(graph_module, user, value.reshape(-1)[0].clone())
                user.replace_input_with(node, small)


def _numbers_to_constants(graph_module: GraphModule) -> None:
    """``x * 2.0`` with a Python number takes thrice the time of a product with a 0-dimensional tensor."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or shape_of(node) is None or node.kwargs:
            continue
        result = node.meta["val"]
        if not result.is_floating_point() or not node.args or not isinstance(node.args[0], Node):
            continue
        same_dtype = shape_of(node.args[0]) is not None and node.args[0].meta["val"].dtype == result.dtype
        if not same_dtype:
            continue
        target, number = None, None
        if node.target is aten.neg.default:
            target, number = aten.mul.Tensor, -1.0
        elif len(node.args) == 2 and isinstance(node.args[1], (int, float)):
            target, number = _ARITHMETIC.get(node.target, node.target), float(node.args[1])
        elif len(node.args) == 2 and node.target is aten.div.Tensor:
            value = _scalar(graph_module, node.args[1])
            number, target = (None if value is None else float(value)), aten.div.Tensor
        if number is None or target not in (aten.mul.Tensor, aten.div.Tensor, aten.add.Tensor, aten.sub.Tensor):
            continue
        if target is aten.div.Tensor:
            if number == 0.0:
                continue
            target, number = aten.mul.Tensor, 1.0 / number
        if target is aten.sub.Tensor:
            target, number = aten.add.Tensor, -number
        constant = constant_node(graph_module, node, torch.tensor(number, dtype=result.dtype, device=result.device))
        node.target, node.args = target, (node.args[0], constant)


def _merge_scalings(graph_module: GraphModule) -> None:
    """``(x * a) * b`` with constants a, b becomes ``x * (a b)``."""
    for node in list(graph_module.graph.nodes):
        if node.target is not aten.mul.Tensor:
            continue
        outer = _split_scaling(graph_module, node)
        if outer is None:
            continue
        inner_node, b = outer
        if not (isinstance(inner_node, Node) and inner_node.target is aten.mul.Tensor):
            continue
        inner = _split_scaling(graph_module, inner_node)
        if inner is None or inner_node.meta["val"].dtype != node.meta["val"].dtype:
            continue
        x, a = inner
        product = constant_node(graph_module, node, (a.double() * b.double()).to(node.meta["val"].dtype))
        node.args = (x, product)


def _split_scaling(graph_module: GraphModule, node: Node) -> tuple[Any, torch.Tensor] | None:
    left, right = node.args
    value = _scalar(graph_module, right)
    if value is not None:
        return left, value
    value = _scalar(graph_module, left)
    return None if value is None else (right, value)


def _drop_identities(graph_module: GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and not node.kwargs:
            replacement = _identity_of(graph_module, node)
            if replacement is not None and shape_of(replacement) == shape_of(node):
                replace(graph_module, node, replacement)


def _identity_of(graph_module: GraphModule, node: Node) -> Node | None:
    """The node that ``node`` merely repeats, if there is one."""
    target, args = node.target, node.args
    first = args[0] if args and isinstance(args[0], Node) else None
    if first is None or None in (shape_of(first), shape_of(node)):
        return None
    if first.meta["val"].dtype != node.meta["val"].dtype:
        return None
    if target is aten.t.default and first.target is aten.t.default:
        return first.args[0] if isinstance(first.args[0], Node) else None
    if target in _VIEWS:
        if target is not aten.expand.default and first.target in (aten.view.default, aten._unsafe_view.default):
            node.args = (first.args[0], *args[1:])  # a view of a view is a view
            first = first.args[0]  # type: ignore[assignment]
        return first
    if target is aten.pow.Tensor_Scalar and args[1] == 1:
        return first
    if target is aten.mul.Tensor or target in _ADDS:
        neutral = 1.0 if target is aten.mul.Tensor else 0.0
        value = _scalar(graph_module, args[1])
        if value is not None and float(value) == neutral:
            return first
        value = _scalar(graph_module, first)
        if value is not None and float(value) == neutral and target is not aten.sub.Tensor:
            return args[1] if isinstance(args[1], Node) else None
    return None


def _share_equal_nodes(graph_module: GraphModule) -> None:
    seen: dict[Any, Node] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or is_random(node):
            continue
        if node.target._schema.is_mutable:
            continue
        try:
            first = seen.setdefault((node.target, _hashable(node.args), _hashable(node.kwargs)), node)
        except TypeError:
            continue
        if first is not node:
            replace(graph_module, node, first)


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(v) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v)) for k, v in sorted(value.items()))
    return (type(value), value)


def _fuse_multiply_add(graph_module: GraphModule) -> None:
    """``a + b * c`` and ``a - b * c`` become one ``addcmul``."""
    for node in list(graph_module.graph.nodes):
        if node.target not in _ADDS or node.kwargs or len(node.args) != 2 or shape_of(node) is None:
            continue
        total, product = node.args
        sign = -1 if node.target is aten.sub.Tensor else 1
        if total is product:
            continue
        if not _is_single_product(product):
            if sign == -1 or not _is_single_product(total):
                continue
            total, product = product, total
        factors = product.args
        operands = (total, *factors)
        if not all(isinstance(o, Node) and shape_of(o) is not None for o in operands):
            continue
        result = node.meta["val"]
        if {o.meta["val"].dtype for o in operands} != {result.dtype} or not result.is_floating_point():
            continue
        constant = _scalar(graph_module, factors[1])
        if sign == -1 and constant is not None:
            operands = (total, factors[0], constant_node(graph_module, node, -constant))
            sign = 1
        with graph_module.graph.inserting_before(node):
            fused = graph_module.graph.call_function(aten.addcmul.default, operands, {} if sign == 1 else {"value": -1})
        fused.meta = dict(node.meta)
        replace(graph_module, node, fused)
        graph_module.graph.erase_node(product)


def _is_single_product(node: Any) -> bool:
    return isinstance(node, Node) and node.target is aten.mul.Tensor and len(node.users) == 1


def _cheaper_calls(graph_module: GraphModule) -> None:
    """Squares, outer products and column sums by the operation that starts fastest."""
    graph = graph_module.graph
    for node in list(graph.nodes):
        shapes = [shape_of(argument) for argument in node.args] if node.op == "call_function" else []
        if node.target is aten.pow.Tensor_Scalar and node.args[1] == 2 and node.meta["val"].is_floating_point():
            node.target, node.args = aten.mul.Tensor, (node.args[0], node.args[0])
        elif node.target in (aten.mm.default, aten.bmm.default) and (shapes[0] or (0,))[-1] == 1:
            node.target = aten.mul.Tensor
        elif node.target is aten.sum.dim_IntList and node.args[1:] == ([0], True) and len(shapes[0] or ()) == 2:
            value = node.meta["val"]
            if value.is_floating_point() and not node.kwargs:
                ones = torch.ones(1, (shapes[0] or (0,))[0], dtype=value.dtype, device=value.device)
                node.target, node.args = aten.mm.default, (constant_node(graph_module, node, ones), node.args[0])


def hoist_views(graph_module: GraphModule) -> list[tuple[int, torch.Tensor]]:
    """Take the views of an input out of the program: they are made once, of a buffer that the input is copied into.

    A flat position is split and reshaped into a net's weights at every step, which costs as much as its layers; one
    small copy is cheaper.

    :returns: the inputs' numbers and their buffers, to be filled before each call.
    """
    hoisted = []
    outputs = next(node for node in graph_module.graph.nodes if node.op == "output").all_input_nodes
    for number, root in enumerate([node for node in graph_module.graph.nodes if node.op == "placeholder"]):
        value = root.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.numel() > LARGEST_COPIED or not value.is_contiguous():
            continue
        buffer = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        views: dict[Node, Any] = {root: buffer}
        for node in graph_module.graph.nodes:
            if node.op == "call_function" and node.target in VIEWS and node.args[0] in views:
                views[node] = node.target(views[node.args[0]], *node.args[1:], **node.kwargs)
        del views[root]
        if len(views) < 4 or any(node in views for node in outputs):
            continue
        for node, view in views.items():
            if isinstance(view, torch.Tensor) and any(user not in views for user in node.users):
                constant = constant_node(graph_module, node, view)
                node.replace_all_uses_with(constant, lambda user: user not in views)  # noqa: B023
        hoisted.append((number, buffer))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return hoisted


def _gather_rows(graph_module: GraphModule) -> None:
    """``x[rows]`` with one vector of rows is an ``index_select``, at half the cost of general indexing."""
    for node in graph_module.graph.nodes:
        if node.target is aten.index.Tensor and len(node.args[1]) == 1:
            (rows,) = node.args[1]
            if isinstance(rows, Node) and len(shape_of(rows) or ()) == 1 and rows.meta["val"].dtype == torch.long:
                node.target, node.args = aten.index_select.default, (node.args[0], 0, rows)
