"""In-place operations of a recorded graph, written out of place."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import GraphModule, Node

from bnn.peephole import is_random

aten = torch.ops.aten


def out_of_place(graph_module: GraphModule) -> None:
    """Turn ``x.op_(y)`` on a tensor that the graph itself made, as recurrent layers write, into ``x.op(y)``."""
    order = {node: place for place, node in enumerate(graph_module.graph.nodes)}
    for node in list(graph_module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if not node.target._schema.is_mutable or is_random(node):
            continue
        name = node.target._schema.name.removeprefix("aten::")
        target = _functional(node.target._schema, getattr(aten, name.removesuffix("_"), None))
        names = _names_of_memory(node.args[0])
        if not name.endswith("_") or target is None or not names:
            continue
        with graph_module.graph.inserting_before(node):
            result = graph_module.graph.call_function(target, node.args, node.kwargs)
        result.meta = dict(node.meta)
        for other in names:
            later = [user for user in other.users if order.get(user, -1) > order[node]]
            other.replace_all_uses_with(result, later.__contains__)
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)


def _functional(schema: Any, packet: Any) -> Any:
    """The overload of ``packet`` with the arguments of an in-place operation; None if there is none."""
    types = [str(argument.type) for argument in schema.arguments]
    for overload in packet.overloads() if packet is not None else ():
        found = getattr(packet, overload)
        if not found._schema.is_mutable and [str(argument.type) for argument in found._schema.arguments] == types:
            return found
    return None


def _names_of_memory(node: Any) -> list[Node]:
    """The nodes that stand for a tensor made in the graph; none if it came from outside or has views."""
    names = [node]
    while is_random(names[-1]) and names[-1].target._schema.is_mutable:
        names.append(names[-1].args[0])
    root = names[-1].args[0] if names[-1].target is operator.getitem else names[-1]
    made_here = root.op == "call_function" and not _is_view(root) and not root.target._schema.is_mutable
    return names if made_here and not any(_is_view(user) for name in names for user in name.users) else []


def _is_view(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is not operator.getitem
    schema = node.target._schema
    return not schema.is_mutable and any(result.alias_info is not None for result in schema.returns)
