"""Draws from the prior and what they predict: a prior over weights is understood by the functions that it draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.infer import Predictive
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bnn.arviz_data import assemble
from bnn.randomness import kept_randomness
from bnn.structure import base_of, is_observation, is_plate


def prior_predictive(
    model: Callable[..., Any], x: Any, num_samples: int = 200, *, observed: Sequence[str] | None = None
) -> Any:
    """Draw latents from their prior and targets given them, as ArviZ's data.

    Works for the models of :func:`bnn.bayesian` and for any Pyro model of the form ``model(x, y=None)`` that draws what
    it would observe when ``y`` is left out. The draws are independent: one chain.

    :param model: a Pyro model.
    :param x: its inputs.
    :param num_samples: number of draws.
    :param observed: names of the sites that ``y`` would observe. By default they are found by running the model on a
        draw of its own.
    :returns: groups ``prior``, ``prior_predictive`` and ``constant_data``.
    :raises ValueError: for an improper prior, which cannot be drawn from, or if no site takes ``y``.

    >>> import bnn, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1))
    >>> data = bnn.prior_predictive(model, torch.linspace(-1, 1, 30).unsqueeze(-1))
    >>> data.prior_predictive["y"].shape
    (1, 200, 30)
    """
    if not callable(model):
        raise ValueError(f"model is {type(model).__name__}; give a Pyro model: a function or PyroModule to call.")
    if not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1:
        raise ValueError(f"num_samples is {num_samples!r}; give a whole number of at least 1.")
    with torch.no_grad(), kept_randomness(), poutine.block():
        values = _drawn(model, x)
        names = _observed(model, x, values) if observed is None else set(observed)
    unknown = names - set(values)
    if unknown:
        raise ValueError(f"observed names {sorted(unknown)}, but the sites that the model draws are {sorted(values)}.")
    with torch.no_grad(), poutine.block():
        draws = Predictive(model, num_samples=num_samples)(x)
    groups: dict[str, dict[str, np.ndarray]] = {"prior": {}, "prior_predictive": {}, "constant_data": {}}
    for name in values:
        value = draws[name]
        groups["prior_predictive" if name in names else "prior"][name] = value.detach().cpu().numpy()[None]
    parts = {"x": x} if isinstance(x, Tensor) else {f"x_{i}": part for i, part in enumerate(x)}
    groups["constant_data"] = {name: part.detach().cpu().numpy() for name, part in parts.items()}
    return assemble(groups)


def _drawn(model: Callable[..., Any], x: Any) -> dict[str, Tensor]:
    """One draw of everything that the model draws without ``y``."""
    with _Draws(), poutine.trace() as trace:
        model(x)
    nodes: Any = trace.trace.nodes.items()
    return {
        name: site["value"]
        for name, site in nodes
        if site["type"] == "sample"
        and not is_plate(site)
        and (not site["is_observed"] or site["infer"].get("_deterministic"))
    }


def _observed(model: Callable[..., Any], x: Any, values: Mapping[str, Tensor]) -> set[str]:
    """The sites among ``values`` that a model observes when it is given one of them as ``y``, the last first."""
    for value in reversed(list(values.values())):
        try:
            nodes: Any = poutine.trace(model).get_trace(x, value).nodes
        except (ValueError, RuntimeError, IndexError, TypeError):  # not what the model takes for y
            continue
        names = {name for name, site in nodes.items() if site["type"] == "sample" and is_observation(site)}
        if names & set(values):
            return names & set(values)
    raise ValueError(
        "no site of the model observes its second argument, or none that is drawn without it: write model(x, y=None) "
        f"with pyro.sample(..., obs=y), or name the sites by observed=, of {sorted(values)}."
    )


class _Draws(Messenger):
    """Refuses what cannot be drawn."""

    def _pyro_sample(self, msg: Any) -> None:
        name, fn = msg["name"], msg["fn"]
        if is_plate(msg):
            if msg["value"] is None and fn.subsample_size is not None and fn.subsample_size < fn.size:
                raise ValueError(
                    f"plate {name!r} draws {fn.subsample_size} of {fn.size} rows although there is no y: make it whole "
                    "then, with subsample_size=None, so that every draw is about the same rows."
                )
            return
        if msg["is_observed"] or msg["value"] is not None:
            return
        try:
            msg["value"], msg["done"] = fn(), True
        except NotImplementedError:
            raise ValueError(
                f"the prior of site {name!r} ({type(base_of(fn)).__name__}) cannot be drawn from, as it is improper: "
                "give it a proper prior to look at what it predicts."
            ) from None
