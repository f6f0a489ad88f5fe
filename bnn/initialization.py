"""Where chains start."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from pyro.infer.autoguide import initialization as pyro_initialization
from torch import Tensor
from torch.distributions import biject_to

from bnn.log_joint import quiet_handlers
from bnn.structure import draw_or_feasible

if TYPE_CHECKING:
    from bnn.potential import Potential

# How often a start is drawn, per chain, until its energy and gradient are finite.
TRIES = 100

# Draws whose median a bounded number starts at.
MEDIAN_OF = 15

# And how far out, in unconstrained space, it may be: beyond, most draws are zeros but for rounding.
FARTHEST = 20.0

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
    prior starts with outputs of order one, instead of saturated. Numbers on part of the real line, such as a noise's
    scale, start at the median of 15 draws: a single one may be so near the end of the support, a scale of 0.005, that
    a chain needs steps a hundred times shorter than the others to come away from it. Chains still start apart from
    one another.
    """
    fn = site["fn"]
    if _is_bounded(fn) and type(fn).__name__ != "ImproperUniform":
        with torch.no_grad():
            median = torch.as_tensor(fn.sample((MEDIAN_OF,)).median(0).values)
        if (biject_to(fn.support).inv(median).abs() < FARTHEST).all():
            return median
    value = init_to_prior(site)
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


def _base_transform(fn: Any) -> Any:
    transform = biject_to(fn.support)
    while hasattr(transform, "base_transform"):
        transform = transform.base_transform
    return transform


def _is_real(fn: Any) -> bool:
    return _base_transform(fn) is torch.distributions.transforms.identity_transform


def _is_bounded(fn: Any) -> bool:
    """Whether the support is, number by number, a part of the real line."""
    return not fn.support.is_discrete and _base_transform(fn).domain.event_dim == 0 and not _is_real(fn)


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


def _finite(init: Strategy, site: Any) -> Tensor:
    """The init function's value; a prior draw where it has none, as the mean of a half-Cauchy or of a flat prior."""
    try:
        value = init(site)
    except NotImplementedError:
        return init_to_prior(site)
    return value if value is None or torch.isfinite(value).all() else init_to_prior(site)


def find_starts(potential: Potential, num_chains: int, init: Strategy) -> Tensor:
    """Positions ``(num_chains, dim)`` at which energy and gradient are finite.

    :param init: gives the value of a site, as Pyro's init functions do.
    :raises ValueError: if too few are found in 100 tries per chain.
    """
    starts: list[Tensor] = []
    for _ in range(TRIES * num_chains):
        with torch.no_grad(), quiet_handlers(), poutine.block():
            model = pyro_initialization.InitMessenger(partial(_finite, init))(potential.model)
            trace = poutine.trace(model).get_trace(*potential.args, **potential.kwargs)
        nodes: Any = trace.nodes
        values = {name: nodes[name]["value"].detach().unsqueeze(0) for name in potential.sites}
        position = potential.from_values(values)
        energy, grad = potential.gradient_by_chain(position)
        if torch.isfinite(energy).all() and torch.isfinite(grad).all():
            starts.append(position)
        if len(starts) == num_chains:
            return torch.cat(starts)
    raise ValueError(
        f"found {len(starts)} of {num_chains} starts with finite energy and gradient in {TRIES * num_chains} tries: "
        "check the data's scale and the likelihood, or give starting values (initial_params=, or "
        "init_strategy=init_to_value(...))."
    )
