"""The parameters of an ``AutoDelta``, as optimizers move them, and where their gradients are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bnn.guides.natural_gradient_descent import NATURAL, Natural


class PointLeaves:
    """One unconstrained leaf per site, and for each a buffer that becomes its ``.grad``.

    :param guide: the guide.
    :ivar buffers: site -> minus the update at rate 1, in memory that stays.
    """

    def __init__(self, guide: AutoDelta) -> None:
        self._guide = guide
        self._first: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._checked = False
        self.names: dict[str, str] = {}
        self.leaves: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with poutine.block(), poutine.trace() as capture:
            self._guide(*args, **kwargs)
        nodes: Any = capture.trace.nodes
        prefix = f"{self._guide._pyro_name}." if self._guide._pyro_name else ""
        sites = [name for name, node in nodes.items() if node["type"] == "sample" and not node["is_observed"]]
        self.names = {name: prefix + name for name in sites if prefix + name in nodes}
        self._first = None
        self.leaves = {name: nodes[full]["value"].unconstrained() for name, full in self.names.items()}
        self.buffers = {name: torch.zeros(leaf.shape).to(leaf) for name, leaf in self.leaves.items()}

    def current(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Site -> leaf. They are read by running the guide at first, and if the parameter store was loaded or cleared.

        :raises ValueError: if the optimizer does not follow the gradient.
        """
        store = dict(pyro.get_param_store().named_parameters())
        if not self.leaves or any(store.get(self.names[name], leaf) is not leaf for name, leaf in self.leaves.items()):
            self._read(args, kwargs)
        self._check_optimizer()
        return self.leaves

    def check(self, sites: Iterable[str]) -> None:
        """:raises ValueError: if the model has other sites."""
        missing, extra = sorted(set(self.leaves) - set(sites)), [name for name in sites if name not in self.leaves]
        if missing or extra:
            raise ValueError(
                f"guide and model differ in their latent sites: only the guide has {missing}, only the model {extra}. "
                "Make the guide from the model that SVI gets, and make a new one when the model's sites change."
            )

    def steps_per_unit(self) -> int:
        """Steps that make up a rate of one; 1 where the rate is not known."""
        natural = getattr(next(iter(self.leaves.values())), NATURAL, None)
        rate = None if natural is None else natural.rate
        return 1 if rate is None else int(1.0 / max(rate, 1e-9)) or 1

    def write(self) -> None:
        """Buffers into ``.grad``, marked for :class:`bnn.guides.NaturalGradientDescent`."""
        for name, leaf in self.leaves.items():
            leaf.grad = self.buffers[name]
            if getattr(leaf, NATURAL, None) is None:
                setattr(leaf, NATURAL, Natural("loc"))
        if not self._checked and self._first is None:
            self._first = [(leaf, leaf.detach().clone(), self.buffers[n].clone()) for n, leaf in self.leaves.items()]

    def _check_optimizer(self) -> None:
        """:raises ValueError: if the first step was not along the gradient, as Adam's is not."""
        if self._first is None:
            return
        first, self._first, self._checked = self._first, None, True
        for leaf, before, grad in first:
            step = before - leaf.detach()
            sizes = step.norm() * grad.norm()
            if step.norm() <= 1e4 * torch.finfo(step.dtype).eps * before.norm():
                continue  # what is left of the step after rounding has no direction
            if sizes > 0 and leaf.numel() > 1 and (step * grad).sum() < 0.99 * sizes:
                self._checked = False
                raise ValueError(
                    "the optimizer does not step along the natural gradient that it is given: it rescales every entry, "
                    "as Adam does, which undoes it. Use bnn.guides.NaturalGradientDescent (or pyro.optim.SGD); for "
                    "Adam, use pyro.infer.Trace_ELBO in place of TraceNaturalGradient_ELBO."
                )

    def tell(self, others: Iterable[Tensor]) -> None:
        """A ``param`` statement for each tensor that an optimizer is to move."""
        statement = pyro.poutine.runtime.effectful(type="param")(lambda handle: handle)
        for name, leaf in self.leaves.items():
            statement(_Handle(leaf), name=self.names[name])
        for leaf in others:
            statement(_Handle(leaf), name=f"parameter_{id(leaf)}")


class _Handle:
    """What ``SVI`` asks a parameter for."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf

    def unconstrained(self) -> Tensor:
        return self.leaf
