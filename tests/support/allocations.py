"""How much memory operations ask for."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class Allocations(TorchDispatchMode):
    """Counts results of at least so many numbers that stand in memory of their own, not in that of an operand."""

    def __init__(self, smallest: int) -> None:
        super().__init__()
        self.smallest, self.fresh = smallest, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operands = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = {operand.untyped_storage().data_ptr() for operand in operands}
        if isinstance(result, torch.Tensor) and result.numel() >= self.smallest:
            self.fresh += result.untyped_storage().data_ptr() not in known
        return result
