"""Constants of a recorded graph: evaluated once, on the device of all else, and passed to the program as inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

from bnn.peephole import constant_node, is_random, replace, shape_of

aten = torch.ops.aten

# Constants above this many elements are recomputed rather than stored in the program.
LARGEST_FOLDED_CONSTANT = 1 << 20


class Lifted:
    """A program whose constants are passed as inputs: attribute look-ups on a module cost more than a small op."""

    def __init__(self, call: Callable[..., Any], constants: list[torch.Tensor], graph_module: GraphModule) -> None:
        self.call, self.constants, self.graph_module = call, constants, graph_module

    def __call__(self, *inputs: torch.Tensor) -> Any:
        """Call it with the inputs alone."""
        return self.call(*inputs, *self.constants)


def send_numbers(graph_module: GraphModule, device: torch.device) -> None:
    """Put numbers that a model holds on the CPU where all else is: each would be sent there at every call."""
    for name, value in list(graph_module.named_buffers()):
        if value.dim() == 0 and value.device != device:
            setattr(graph_module, name, value.to(device))


def fold_constants(graph_module: GraphModule) -> None:
    """Evaluate once what depends on no input."""
    graph = graph_module.graph
    constants: dict[Node, torch.Tensor] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr":
            constants[node] = getattr(graph_module, node.target)
            continue
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or is_random(node):
            continue
        if node.target in (aten.ones_like.default, aten.zeros_like.default) and shape_of(node) is not None:
            like, fill = node.meta["val"], float(node.target is aten.ones_like.default)
            value = torch.full(like.shape, fill, dtype=like.dtype, device=like.device)
        elif all(i in constants for i in node.all_input_nodes):
            arguments = torch.fx.map_arg(node.args, lambda n: constants[n])
            keywords = torch.fx.map_arg(node.kwargs, lambda n: constants[n])
            with torch.no_grad():
                value = node.target(*arguments, **keywords)
        else:
            continue
        if not isinstance(value, torch.Tensor) or value.numel() > LARGEST_FOLDED_CONSTANT:
            continue
        folded = constant_node(graph_module, node, value)
        constants[folded] = value
        replace(graph_module, node, folded)
    graph.eliminate_dead_code()


def lift_constants(graph_module: GraphModule) -> Lifted:
    """The graph's program with its constants behind its inputs."""
    graph = graph_module.graph
    constants: list[torch.Tensor] = []
    last = [node for node in graph.nodes if node.op == "placeholder"][-1]
    lifted: dict[str, Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr":
            continue
        if node.target not in lifted:
            value = getattr(graph_module, node.target)
            with graph.inserting_after(last):
                last = graph.placeholder(f"constant_{len(constants)}")
            last.meta["val"] = value
            constants.append(value.detach())
            lifted[node.target] = last
        replace(graph_module, node, lifted[node.target])
    for name in lifted:  # a compiler would make inputs of these, too
        delattr(graph_module, name)
    graph.eliminate_dead_code()
    graph_module.recompile()
    return Lifted(graph_module.forward, constants, graph_module)
