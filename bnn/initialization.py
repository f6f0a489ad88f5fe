"""Where chains start."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide import initialization as pyro_initialization
from torch import Tensor
from torch.distributions import biject_to

from bnn.log_joint import draw_or_feasible

Strategy = Callable[[Any], Tensor]


def init_to_prior(site: Any) -> Tensor:
    """A draw from the site's prior; for a flat prior, a uniform draw on (-1/2, 1/2) in unconstrained space."""
    fn = site["fn"]
    if type(fn).__name__ == "ImproperUniform":
        transform = biject_to(fn.support)
        shape = transform.inverse_shape(fn.batch_shape + fn.event_shape)
        return transform(torch.rand(shape) - 0.5)
    return draw_or_feasible(site)


def init_to_fan_in(site: Any) -> Tensor:
    """A draw from the prior, except that weight arrays start no wider than 1/sqrt(fan).

    An array of at least two dimensions on real support, of shape ``(n_0, n_1, ...)``, is shrunk about its prior mean
    to a standard deviation of at most ``1 / sqrt(max(n_0, n_1 · n_2 · ...))``: a deep net under a standard normal
    prior starts with outputs of order one, instead of saturated. Chains still start apart from one another.
    """
    value = init_to_prior(site)
    fn = site["fn"]
    if value.dim() < 2 or not _is_real(fn):
        return value
    try:
        mean, scale = fn.mean, fn.variance.sqrt()
        if not (torch.isfinite(mean).all() and torch.isfinite(scale).all()):
            return value
    except (NotImplementedError, AttributeError):
        return value
    fan = max(value.shape[0], math.prod(value.shape[1:]))
    shrink = (1.0 / (math.sqrt(fan) * scale)).clamp(max=1.0)
    return mean + (value - mean) * shrink


def _is_real(fn: Any) -> bool:
    transform = biject_to(fn.support)
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    return transform is torch.distributions.transforms.identity_transform


_BY_NAME: dict[str, Strategy] = {
    "auto": init_to_fan_in,
    "prior": init_to_prior,
    "median": pyro_initialization.init_to_median,
    "mean": pyro_initialization.init_to_mean,
    "uniform": pyro_initialization.init_to_uniform,
    "feasible": pyro_initialization.init_to_feasible,
}


def strategy_of(strategy: str | Strategy) -> Strategy:
    """The init function of that name; functions, such as Pyro's ``init_to_*``, are passed through.

    :raises ValueError: for an unknown name.
    """
    if callable(strategy):
        return strategy
    if strategy not in _BY_NAME:
        raise ValueError(
            f"init strategy {strategy!r} is unknown: choose one of {', '.join(map(repr, _BY_NAME))}, or pass a "
            "function of pyro.infer.autoguide.initialization."
        )
    return _BY_NAME[strategy]
