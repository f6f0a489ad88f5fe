"""What passes between an ELBO and ``SVI`` besides gradients: parameters, rates, whether the gradient is followed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pyro
import torch
from torch import Tensor

from bnn.guides.natural_gradient_descent import NATURAL, Natural


class _Handle:
    """What ``SVI`` asks a parameter for."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf

    def unconstrained(self) -> Tensor:
        return self.leaf


def tell(named: Iterable[tuple[str, Tensor]], others: Iterable[Tensor] = ()) -> None:
    """A ``param`` statement for each tensor that an optimizer is to move, without computing constrained values."""
    statement = pyro.poutine.runtime.effectful(type="param")(lambda handle: handle)
    for name, leaf in named:
        statement(_Handle(leaf), name=name)
    for leaf in others:
        statement(_Handle(leaf), name=f"parameter_{id(leaf)}")


def rate_of(leaf: Tensor) -> float | None:
    """The rate of the last step; None where the optimizer has not left it."""
    natural = getattr(leaf, NATURAL, None)
    return None if natural is None else natural.rate


def set_rate(leaf: Tensor, rate: float | None) -> None:
    """As if the optimizer had left that rate."""
    if rate is not None:
        natural = Natural("loc")
        natural.rate = rate
        setattr(leaf, NATURAL, natural)


def steps_per_unit(leaf: Tensor) -> int:
    """Steps that make up a rate of one; 1 where the optimizer has not left its rate."""
    rate = rate_of(leaf)
    return 1 if rate is None else int(1.0 / max(rate, 1e-9)) or 1


def is_followed(leaf: Tensor) -> bool:
    """Whether the optimizer has shown by its last step that it reads more than gradients."""
    return rate_of(leaf) is not None


class OptimizerCheck:
    """Whether the first step of an optimizer was along the gradient that it was given.

    :param done: whether that is known, of a training that goes on.
    """

    def __init__(self, done: bool = False) -> None:
        self._first: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._checked = done

    def remember(self, leaves: Iterable[Any]) -> None:
        """At the first step, where each parameter stands and where its gradient points."""
        if not self._checked and self._first is None:
            self._first = [(leaf, leaf.detach().clone(), leaf.grad.clone()) for leaf in leaves]

    def __call__(self) -> None:
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
