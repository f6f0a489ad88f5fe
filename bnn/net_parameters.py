"""The parameters of a net, as priors see them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, eq=False)
class Parameter:
    """One parameter of a net, as a prior sees it.

    :ivar name: its name in the net, ``"0.weight"``, and of its site.
    :ivar value: its value in the net.
    :ivar module: the module that it belongs to.
    :ivar others: its other names, and modules, where it is tied.
    """

    name: str
    value: Tensor
    module: nn.Module
    others: tuple[tuple[nn.Module, str], ...] = ()

    @property
    def shape(self) -> torch.Size:
        """Its shape."""
        return self.value.shape

    @property
    def is_gain(self) -> bool:
        """Whether it multiplies the output of a layer that normalises, and therefore belongs near one."""
        return self._normalises and self.name.rpartition(".")[2] in ("weight", "gain", "gamma", "scale")

    @property
    def _normalises(self) -> bool:
        return isinstance(self.module, _NORMS) or "norm" in type(self.module).__name__.lower()

    @property
    def is_convolution(self) -> bool:
        """Whether it holds the filters of a convolution ``(outputs, inputs, *positions)``."""
        return isinstance(self.module, (*_CONVOLUTIONS, *_TRANSPOSED)) and self.value.dim() > 2

    @property
    def center(self) -> float:
        """Where a prior belongs: 1 for a gain, else 0."""
        return 1.0 if self.is_gain else 0.0

    @property
    def fan_in(self) -> float | None:
        """How many inputs one output adds up, None for a bias or gain.

        A row of an embedding is looked up, not added up: 1. A transposed convolution adds up, on average, its inputs
        times the positions of its filter over its stride.
        """
        if self.value.dim() < 2 or self._normalises:
            return None
        if isinstance(self.module, (nn.Embedding, nn.EmbeddingBag)):
            return 1.0
        if isinstance(self.module, _TRANSPOSED):
            inputs = self.shape[0] / self.module.groups
            return inputs * self.shape[2:].numel() / math.prod(self.module.stride)
        return float(self.shape[1:].numel())

    def full(self, number: float) -> Tensor:
        """A tensor without dimensions, in the parameter's precision and on its device."""
        return torch.full((), number, dtype=self.value.dtype, device=self.value.device)

    def site_of(self, law: Any) -> Any:
        """``law`` of one entry as the law of the parameter, with independent entries."""
        return law.expand(self.shape).to_event(len(self.shape))


def parameters_of(net: nn.Module) -> list[Parameter]:
    """The parameters of a net; one that is tied appears once, under its first name.

    :raises ValueError: if there is none, or one that a lazy module has not made yet.
    """
    found: dict[int, list[tuple[nn.Module, str, Tensor]]] = {}
    for prefix, module in net.named_modules(remove_duplicate=False):
        for local, value in module.named_parameters(recurse=False, remove_duplicate=False):
            name = f"{prefix}.{local}" if prefix else local
            if is_lazy(value):
                raise ValueError(
                    f"parameter {name!r} of the net has no shape yet: call the net once on a batch of x, then give it "
                    "to bnn.bayesian."
                )
            found.setdefault(id(value), []).append((module, name, value))
    if not found:
        raise ValueError(f"the net ({type(net).__name__}) has no parameters: there is nothing to give a prior to.")
    first = dict(net.named_parameters())
    result = []
    for name, value in first.items():
        places = found[id(value)]
        module = next(m for m, n, _ in places if n == name)
        others = tuple((m, n) for m, n, _ in places if n != name)
        result.append(Parameter(name, value.detach(), module, others))
    return result
