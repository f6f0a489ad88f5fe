"""Gradients whose products are computed in less than single precision, while all else stays as it is.

Products of matrices, convolutions and their gradients take numbers rounded to bfloat16 (8 bits) or, on CUDA devices, to
TF32 (11 bits) and add them up in float32. Parameters, momenta, sums over the data, priors, log densities and what a
kernel does with the gradient keep the model's own precision. A product's relative error is about 2⁻⁹ or 2⁻¹² per
number: a perturbation of the energy that depends on the position alone, not noise that a small step would average out.

A Metropolis test needs differences of energies to a fraction of one, which such products do not give where the energy
is in the thousands: kernels with a test refuse them, and energies of all data never use them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bnn.tiers import Program, choose

PRECISIONS = ("full", "tf32", "bfloat16")

aten = torch.ops.aten
_PLAIN = {aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default}
# Sum of an array and a product, and the product by itself.
_ADDED: dict[Any, Callable[..., Tensor]] = {
    aten.addmm.default: torch.mm,
    aten.baddbmm.default: torch.bmm,
    aten.addmv.default: torch.mv,
}


def check_precision(precision: Any) -> None:
    """:raises ValueError: if ``precision`` is none of :data:`PRECISIONS`."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision={precision!r} is unknown: choose one of {', '.join(map(repr, PRECISIONS))}.")


def check_device(precision: str, device: torch.device) -> None:
    """:raises ValueError: if the device has no products of this precision."""
    if precision == "tf32" and device.type != "cuda":
        raise ValueError(
            f"precision='tf32' is of CUDA devices, and the model is on {device.type}: move it there, or take "
            "'bfloat16' or 'full'."
        )


class RoundedProducts(TorchDispatchMode):
    """Products inside take their numbers in bfloat16, and give the precision that they were asked in."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PLAIN and _is_wide(args[0]):
            return func(*map(_rounded, args)).to(args[0].dtype)
        if func in _ADDED and _is_wide(args[1]):
            product = _ADDED[func](_rounded(args[1]), _rounded(args[2])).to(args[1].dtype)
            return torch.add(args[0] * kwargs.get("beta", 1), product, alpha=kwargs.get("alpha", 1))
        if func is aten.convolution.default and _is_wide(args[0]):
            x, weight, bias, *rest = args
            result = func(_rounded(x), _rounded(weight), None, *rest).to(x.dtype)
            return result if bias is None else result + bias.reshape(-1, *(1,) * (result.dim() - 2))
        if func is aten.convolution_backward.default and _is_wide(args[0]):
            grad, x, weight, *rest, wanted = args
            parts = func(*map(_rounded, (grad, x, weight)), *rest, [*wanted[:2], False])
            bias = grad.sum([0, *range(2, grad.dim())]) if wanted[2] else None
            return *(None if part is None else part.to(grad.dtype) for part in parts[:2]), bias
        return func(*args, **kwargs)


def _is_wide(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float32, torch.float64)


def _rounded(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16)


def rounding(precision: str) -> contextlib.AbstractContextManager[Any]:
    """Around what is recorded, or run by handlers: an energy and its gradient."""
    return RoundedProducts() if precision == "bfloat16" else contextlib.nullcontext()


@contextlib.contextmanager
def tf32_products() -> Iterator[None]:
    """Products of matrices on CUDA devices round to TF32 inside; convolutions do by PyTorch's own default."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def choose_in(precision: str, *arguments: Any) -> Program:
    """:func:`bnn.tiers.choose` for a program of this precision."""
    found = running(choose, precision)(*arguments)
    return Program(running(found.call, precision), found.tier)


def running(call: Callable[..., Any], precision: str) -> Callable[..., Any]:
    """A program that runs, and was compiled, in this precision."""
    return tf32_products()(call) if precision == "tf32" else call
