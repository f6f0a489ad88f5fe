"""Large matrix products by oneDNN, where PyTorch's own are slow.

PyTorch's products in single precision come from MKL, which takes AVX2 instructions on processors that are not Intel's,
whatever else they have: half the speed that AVX-512 gives on a recent EPYC. PyTorch carries another library for
convolutions and linear layers, oneDNN, which takes what is there. It is asked through the operation that inductor has
for linear layers, x Wᵀ + b; a call costs 10 µs more, so that only large products go there, and only on a machine that
takes a third longer without.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, library
from torch.fx import GraphModule, Node

from bnn.peephole import shape_of
from bnn.timings import Timings

aten = torch.ops.aten

# From which on the detour pays: floating-point operations, terms of each sum, rows and columns of the result.
LEAST_WORK, LEAST_TERMS, LEAST_SIDE = 8_000_000, 48, 4

# How much longer MKL must take: twice on an EPYC with AVX-512, not at all on Intel's processors.
WORTHWHILE = 1.3


def product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The product of two matrices, plus a vector to each row; single precision."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise.default(_dense(a), _dense(b).t(), bias, "none", [], "")
    return result


def _dense(matrix: Tensor) -> Tensor:
    """The matrix without gaps: for a part of another one oneDNN has a loop that takes a thousand times as long."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` for matrices, by whichever library is faster; of leaves that want gradients by PyTorch's."""
    wants_grad = torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)
    if not wants_grad and _is_large(a, b) and is_faster():
        return product(a, b)
    return a @ b


def product_into(a: Tensor, b: Tensor, bias: Tensor | None = None, *, out: Tensor) -> Tensor:
    """The same, written to memory that is there."""
    return out.copy_(product(a, b, bias))


if not hasattr(torch.ops.bnn, "product"):  # it stays where a module is loaded again
    library.define("bnn::product", "(Tensor a, Tensor b, Tensor? bias) -> Tensor")
    library.impl("bnn::product", "cpu", product)
    library.register_fake("bnn::product", lambda a, b, bias: a.new_empty(a.shape[0], b.shape[1]))


def use_onednn(graph_module: GraphModule, compiled: bool) -> None:
    """Have oneDNN compute the large products of a recorded graph.

    :param compiled: whether inductor compiles the graph, and needs an operation that is registered.
    """
    for node in graph_module.graph.nodes:
        factors = _factors(node)
        if factors is None or not is_faster():
            continue
        a, b, bias = factors
        node.args, out = (a, b, bias), node.kwargs.get("out")
        node.target = torch.ops.bnn.product.default if compiled else product
        if out is not None:
            node.target, node.kwargs = product_into, {"out": out}
    graph_module.recompile()


def _factors(node: Node) -> tuple[Node, Node, Node | None] | None:
    """A large product's two matrices and what is added to each row; None for anything else."""
    if node.target in (aten.mm.default, aten.mm.out):
        a, b, bias = *node.args[:2], None
    elif node.target in (aten.addmm.default, aten.addmm.out):
        bias, a, b = node.args[:3]
    else:
        return None
    if set(node.kwargs) - {"out"} or not (isinstance(a, Node) and isinstance(b, Node)):
        return None
    if shape_of(a) is None or shape_of(b) is None or not _is_large(a.meta["val"], b.meta["val"]):
        return None
    if bias is None:
        return a, b, None
    return (a, b, bias) if isinstance(bias, Node) and shape_of(bias) == (b.meta["val"].shape[1],) else None


def _is_large(a: Tensor, b: Tensor) -> bool:
    """Whether the product is worth a call of oneDNN, which knows single precision."""
    if not (a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"):
        return False
    (rows, terms), columns = a.shape, b.shape[1]
    return 2 * rows * terms * columns >= LEAST_WORK and terms >= LEAST_TERMS and min(rows, columns) >= LEAST_SIDE


@functools.cache
def is_faster() -> bool:
    """Whether oneDNN is that much faster than PyTorch's products here; timed once on a machine."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    timings = Timings(f"products-{torch.__version__}-{torch.get_num_threads()}")
    for name, function in (("plain", torch.mm), ("onednn", product)):
        if name not in timings.seconds:
            timings.store(name, _seconds(function))
    return timings.seconds["plain"] > WORTHWHILE * timings.seconds["onednn"]


def _seconds(function: Callable[..., Any], size: int = 384) -> float:
    """The least of some calls."""
    a, b, times = torch.ones(size, size), torch.ones(size, size), []
    with torch.no_grad():
        for _ in range(10):
            start = time.perf_counter()
            function(a, b)
            times.append(time.perf_counter() - start)
    return min(times)
