"""Draws from a guide, in the form of a finished run: what :func:`bnn.to_arviz` asks for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor


def model_of(guide: Any) -> Callable[..., Any]:
    """The guide's model.

    Some of Pyro's guides keep it under the handler that gives sites their start. This would also give a start to what
    is predicted, in place of a draw: it is taken off.
    """
    handled = getattr(guide.model, "func", None)  # a partial of (handler, model)
    arguments = getattr(handled, "args", ())
    model: Callable[..., Any] = guide.model
    return arguments[1] if len(arguments) > 1 and isinstance(arguments[0], InitMessenger) else model


class GuideRun:
    """One chain of independent draws from a guide.

    :param guide: an automatic guide of Pyro's or of :mod:`bnn.guides`, with its ``model``.
    :param args: arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param num_samples: number of draws.
    """

    def __init__(self, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_samples: int) -> None:
        if not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples is {num_samples!r}; give the number of draws from the guide, at least 1.")
        self.kernel = SimpleNamespace(model=model_of(guide), guide=guide)
        self._args, self._kwargs = args, dict(kwargs)
        with torch.no_grad():
            if hasattr(guide, "draws"):
                if not guide.is_set_up:
                    poutine.block(guide)(*args, **kwargs)
                self._draws: dict[str, Tensor] = guide.draws(num_samples)
            else:
                self._draws = _one_by_one(guide, args, kwargs, num_samples)

    def get_samples(self, group_by_chain: bool = False) -> dict[str, Tensor]:
        """Site -> draws, with a leading chain dimension of one on request."""
        return {name: value[None] if group_by_chain else value for name, value in self._draws.items()}


def _one_by_one(guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], num_samples: int) -> dict[str, Tensor]:
    found: dict[str, list[Tensor]] = {}
    for _ in range(num_samples):
        trace = poutine.trace(poutine.block(guide, expose_types=["sample"])).get_trace(*args, **kwargs)
        for name, site in trace.iter_stochastic_nodes():
            if not site["infer"].get("is_auxiliary"):
                found.setdefault(name, []).append(site["value"].detach())
    if not found:
        raise ValueError(
            f"the guide {type(guide).__name__} draws no latent sites: call it, or SVI.step, on the data first."
        )
    return {name: torch.stack(values) for name, values in found.items()}
