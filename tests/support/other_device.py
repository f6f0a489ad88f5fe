"""A second device that is none: its tensors hold numbers on the CPU, and refuse to meet those of the CPU.

It goes by the name of ``meta``, the one device besides the CPU that every build of PyTorch knows. What runs on it runs
as on a CUDA device: tensors made without ``device=`` lie on the CPU, an operation on both raises, ``.numpy()`` is
refused, random numbers of a CPU generator cannot be drawn there. Its own random numbers are the CPU's, in the same
order, so that a run on it must equal one on the CPU bit for bit. What it cannot show is what CUDA's kernels compute.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.fx.experimental import proxy_tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("meta")
aten = torch.ops.aten

# Operations that wait for the device, because they hand numbers to Python or need them for a shape.
READS = {aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default, aten.unique_dim.default}
READS |= {aten._unique2.default, aten.masked_select.default, aten.is_nonzero.default, aten.repeat_interleave.Tensor}
# Index arrays may lie on the CPU; a CUDA device then copies them.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}
MOVES = {aten._to_copy.default, aten.copy_.default}
# Where not even a single number may come from the CPU.
STRICT = {aten.cat.default, aten.stack.default, aten.mm.default, aten.dot.default, aten.gather.default}

# What crossed between the devices since `crossings` was entered: "to", "from", "index" and "number" (a tensor without
# dimensions from the CPU), and "read".
counts: Counter[str] = Counter()


class OtherTensor(Tensor):
    """A tensor of the other device."""

    inner: Tensor
    is_meta = False  # type: ignore[assignment]  # it has numbers

    @staticmethod
    def __new__(cls, inner: Tensor) -> OtherTensor:
        result: OtherTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            layout=inner.layout, device=DEVICE,
        )  # fmt: skip
        result.inner = inner
        return result

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OtherTensor({self.inner})"

    def __format__(self, spec: str) -> str:
        return format(self.inner, spec)

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        counts["read"] += 1
        return self.inner.tolist()

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert a tensor of the other device to numpy: use .cpu() first")

    def __array__(self, dtype: Any = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = OtherTensor(self.inner.detach().clone())
            made = torch.nn.Parameter(copied, self.requires_grad) if isinstance(self, torch.nn.Parameter) else copied
            memo[id(self)] = made.requires_grad_(self.requires_grad)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> Any:
        parts = self.inner.detach(), self.dtype, str(DEVICE), self.requires_grad
        return torch._utils._rebuild_device_tensor_from_cpu_tensor, parts

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = any(isinstance(t, OtherTensor) for t in tensors)
    there = [t for t in tensors if not isinstance(t, OtherTensor)]
    device = kwargs.get("device")
    result_is_here = here if device is None else torch.device(device).type == DEVICE.type
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if result_is_here and kwargs.get("generator") is not None:
        raise RuntimeError(f"Expected a '{DEVICE.type}' device type for generator but found 'cpu' ({func})")
    if func is aten.copy_.default:
        result_is_here = isinstance(args[0], OtherTensor)
        crosses = result_is_here != isinstance(args[1], OtherTensor)
    else:
        crosses = func is aten._to_copy.default and result_is_here != here
    if crosses:
        counts["to" if result_is_here else "from"] += 1
    elif here and there and func not in MOVES:
        numbers_only = all(t.dim() == 0 for t in there) and func not in STRICT
        indices_only = func in INDEXED and isinstance(args[0], OtherTensor)
        if not (numbers_only or indices_only):
            shapes = [tuple(t.shape) for t in there]
            raise RuntimeError(
                "Expected all tensors to be on the same device, but found at least two devices: "
                f"{func} was given tensors of shapes {shapes} on the CPU"
            )
        counts["number" if numbers_only else "index"] += 1
    if here and func in READS:
        counts["read"] += 1
    known = {id(t.inner): t for t in tensors if isinstance(t, OtherTensor)}
    args, kwargs = pytree.tree_map_only(OtherTensor, lambda t: t.inner, (args, kwargs))
    found = func(*args, **kwargs)
    if not result_is_here:
        return found
    return pytree.tree_map_only(Tensor, lambda t: known[id(t)] if id(t) in known else OtherTensor(t), found)


class _Factories(TorchDispatchMode):
    """Makes tensors of the other device, below a recording's own mode, which then sees them made."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE  # type: ignore[attr-defined]
    shape_env = None

    @classmethod
    def is_infra_mode(cls) -> bool:
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromNumbers(TorchFunctionMode):
    """Python numbers reach the other device by way of the CPU; PyTorch would leave out those of a ``meta`` tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.quantile, Tensor.quantile) and isinstance(args[0], OtherTensor):
            return OtherTensor(torch.quantile(args[0].inner.detach(), *args[1:], **kwargs))  # looks for the name meta
        if func in (torch.tensor, torch.as_tensor, Tensor.new_tensor):
            device = kwargs.pop("device", None)
            if device is None and func is Tensor.new_tensor:
                device = args[0].device
            if func is torch.as_tensor and isinstance(args[0], Tensor):
                kwargs |= {} if device is None else {"device": device}
            elif device is not None and torch.device(device).type == DEVICE.type:
                return func(*args, **kwargs, device="cpu").to(DEVICE)
            elif device is not None:
                kwargs["device"] = device
        return func(*args, **kwargs)


@contextmanager
def other_device() -> Iterator[torch.device]:
    """Inside, the other device exists."""
    recorded = (*proxy_tensor.HANDLED_TYPES, OtherTensor)  # else constants of this type would go unrecorded
    with patch.object(proxy_tensor, "HANDLED_TYPES", recorded), _Factories(), _FromNumbers():
        yield DEVICE


@contextmanager
def crossings() -> Iterator[Counter[str]]:
    """Count what crosses between the devices inside."""
    counts.clear()
    yield counts
