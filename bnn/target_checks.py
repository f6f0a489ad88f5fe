"""Checks of a likelihood's settings and of the targets that it is given.

The values of targets are read once for each tensor, and not at all where they cannot be: inside a recording that runs
over many chains.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from bnn.recording import has_values, untraced
from bnn.structure import ModelError


@dataclass(frozen=True)
class Range:
    """What targets may be.

    :ivar words: in words, after "wants".
    :ivar inside: which entries are.
    :ivar whole: whether floating-point numbers are refused.
    """

    words: str
    inside: Callable[[Tensor], Tensor]
    integers: bool = False


def real_targets() -> Range:
    """Finite numbers."""
    return Range("finite numbers", torch.isfinite)


def class_targets(classes: int) -> Range:
    """Classes by number."""
    return Range(
        f"whole numbers from 0 to {classes - 1}, since the net returns {classes} logits",
        lambda y: (y >= 0) & (y < classes),
        integers=True,
    )


def zero_or_one() -> Range:
    """Two values."""
    return Range("0 or 1", lambda y: (y == 0) | (y == 1))


def counts() -> Range:
    """Whole numbers from zero, in whatever precision."""
    return Range("whole numbers of at least 0", lambda y: (y >= 0) & (y == y.floor()) if _is_real(y) else y >= 0)


def _is_real(y: Tensor) -> bool:
    return y.is_floating_point()


def check_setting(likelihood: Any, name: str, *, learnable: bool = True) -> None:
    """:raises ValueError: unless a setting is a positive number, a tensor of them, or a distribution over them."""
    value = getattr(likelihood, name)
    where = f"{type(likelihood).__name__}: {name}"
    if learnable and isinstance(value, torch.distributions.Distribution):
        if value.batch_shape or len(value.event_shape) > 1:
            raise ValueError(
                f"{where} is a distribution of batch shape {tuple(value.batch_shape)} and event shape "
                f"{tuple(value.event_shape)}; give one number, or one per output by .expand([K]).to_event(1)."
            )
        least = constraints.positive
        support = getattr(value.support, "base_constraint", value.support)
        if support not in (least, constraints.nonnegative) and not _inside_positive(support):
            raise ValueError(
                f"{where} is a {type(value).__name__}, whose support {value.support} is not that of positive numbers: "
                "give, for instance, HalfCauchy, LogNormal or Gamma."
            )
        return
    known = "a number above 0" + (", a tensor with one per output, or a distribution over it" if learnable else "")
    is_tensor = learnable and isinstance(value, Tensor) and value.dim() < 2 and value.is_floating_point()
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_tensor or is_number) or not bool(
        ((torch.as_tensor(value) > 0) & (torch.as_tensor(value) < math.inf)).all()
    ):
        raise ValueError(f"{where} is {value!r}; give {known}.")


def _inside_positive(support: Any) -> bool:
    return getattr(support, "lower_bound", -1.0) >= 0.0


def check_outputs(name: str, outputs: torch.Size, per_target: int | None) -> None:
    """:raises ValueError: if a net's outputs cannot be the parameters of a likelihood."""
    if per_target == 2 and (len(outputs) < 2 or outputs[-1] % 2):
        raise ModelError(
            f"{name} takes two numbers per target, mean and noise, but the net returns {tuple(outputs)}: give its last "
            "layer an even number of outputs, two for one target."
        )
    if per_target is None and (len(outputs) < 2 or outputs[-1] < 2):
        raise ModelError(
            f"{name} takes one logit per class in the last dimension, but the net returns {tuple(outputs)}: give its "
            "last layer as many outputs as there are classes, or use Bernoulli for two classes with one output."
        )


def check_shape(name: str, y: Tensor, mask: Tensor | None, wanted: torch.Size, outputs: torch.Size) -> None:
    """:raises ValueError: unless targets and mask have the shape that a net's outputs ask for."""
    if not isinstance(y, Tensor):
        raise ModelError(f"y is {type(y).__name__}; give a tensor of targets, as by torch.as_tensor(y).")
    fits = y.dim() > 0 and (y.shape[1:] == wanted or (not wanted and y.shape[1:] == (1,) and outputs[1:] in ((), (1,))))
    if not fits:
        hint = ""
        if name == "Categorical" and y.shape[1:] == outputs[1:]:
            hint = " One-hot targets become class numbers by y.argmax(-1)."
        elif y.shape[1:] == (1,):
            hint = " Drop the last dimension: y.squeeze(-1)."
        raise ModelError(
            f"y has shape {tuple(y.shape)}, but {name} on a net that returns {tuple(outputs)} wants targets "
            f"{_rows(wanted)}.{hint}"
        )
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        shown = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise ModelError(f"mask is {shown}; give a tensor of torch.bool, True where the target counts.")
    if mask.shape not in (y.shape[:1], y.shape, y.shape[:1] + wanted):
        raise ModelError(
            f"mask has shape {tuple(mask.shape)}; give {_rows(torch.Size())} with one entry per row, or y's shape "
            f"{tuple(y.shape)}."
        )


def _rows(shape: torch.Size) -> str:
    return "(" + ", ".join(["N", *map(str, shape)]) + ("," if not shape else "") + ")"


def check_values(name: str, y: Tensor, mask: Tensor | None, allowed: Range) -> None:
    """:raises ValueError: if targets that count are of the wrong kind, NaN, infinite or out of range."""
    if y.is_complex() or (allowed.integers and (_is_real(y) or y.dtype == torch.bool)):
        raise ModelError(f"y is {y.dtype}; {name} wants {allowed.words}" + (": y.long()." if allowed.integers else "."))
    if not has_values(y) or (mask is not None and not has_values(mask)):
        return
    with untraced(), torch.no_grad():
        counted = torch.ones_like(y, dtype=torch.bool)
        if mask is not None:
            counted = as_entries(mask, y).expand(y.shape)
        if _is_real(y):
            bad = counted & ~torch.isfinite(y)
            if bad.any():
                raise ModelError(
                    f"y holds {int(bad.sum())} values that are NaN or infinite, first in row {_first(bad)}: remove "
                    "these rows, or leave them out of the likelihood by mask=, a tensor of torch.bool."
                )
        bad = counted & ~allowed.inside(y)
        if bad.any():
            example = y[bad][0].item()
            raise ModelError(f"y holds {example:g} in row {_first(bad)}; {name} wants {allowed.words}.")


def as_entries(mask: Tensor, y: Tensor) -> Tensor:
    """A mask of rows, or of entries, in a shape that broadcasts with ``y``."""
    return mask.reshape(-1, *[1] * (y.dim() - 1)) if mask.dim() == 1 else mask.reshape(y.shape)


def _first(bad: Tensor) -> int:
    return int(bad.reshape(len(bad), -1).any(-1).nonzero()[0])
