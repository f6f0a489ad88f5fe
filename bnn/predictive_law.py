"""What a distribution says in closed form: its mean and variance, or the log probabilities of its classes."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bnn.structure import base_of

CLASSES = {"Categorical", "OneHotCategorical", "OneHotCategoricalStraightThrough", "Bernoulli"}


def has_classes(fn: Any) -> bool:
    """Whether it is a law over classes."""
    return type(base_of(fn)).__name__ in CLASSES


def closed_form(fn: Any) -> dict[str, Tensor]:
    """``log_probability``, with a last dimension of classes, or ``mean`` and ``variance``, of the shape of a value.

    A Bernoulli law has the two classes 0 and 1. Empty for a law without moments in closed form.
    """
    if has_classes(fn):
        return {"log_probability": _log_probabilities(fn)}
    try:
        mean, variance = _moments(fn)
    except (NotImplementedError, AttributeError):
        return {}
    return {"mean": mean.expand(fn.shape()), "variance": variance.expand(fn.shape())}


def _log_probabilities(fn: Any) -> Tensor:
    base = base_of(fn)
    if type(base).__name__ == "Bernoulli":
        return F.logsigmoid(torch.stack([-base.logits, base.logits], -1)).expand(*fn.shape(), 2)
    logits = F.log_softmax(base.logits, -1)
    return logits.expand((*fn.shape(), logits.shape[-1]) if type(base).__name__ == "Categorical" else fn.shape())


def _moments(fn: Any) -> tuple[Tensor, Tensor]:
    base = base_of(fn)
    if type(base).__name__ == "StudentT":  # torch writes into its result through a mask, which vmap refuses
        nan, inf = torch.full_like(base.df, torch.nan), torch.full_like(base.df, torch.inf)
        variance = torch.where(base.df > 2, base.scale.square() * base.df / (base.df - 2), inf)
        return torch.where(base.df > 1, base.loc, nan), torch.where(base.df > 1, variance, nan)
    return fn.mean, fn.variance
