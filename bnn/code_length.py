"""How many bits a posterior costs, and how many the data under it: the ELBO read as a code length.

    −ELBO = KL(q | p) + E_q[−log p(D | z)],      in bits: divided by log 2

is the expected length of a message that sends the targets D to somebody who has the inputs and the model: weights drawn
from q, coded by the prior at some fine precision, then the targets by the likelihood. The choice of the draw carries
information of its own, which the receiver gets back, so that weights cost KL(q | p) only, however fine the precision
(Hinton and van Camp 1993, COLT; bits back). The least −ELBO is −log p(D), the code length of the model itself.

Real targets are coded to a resolution r at −log r each besides, the same under every posterior. A point estimate has no
such length: at infinite precision its weights cost infinitely many bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pyro import poutine
from pyro.distributions import Delta
from torch import Tensor
from torch.distributions import biject_to, kl_divergence

from bnn.log_joint import quiet_handlers
from bnn.predictive_arrays import whole_number
from bnn.scoring import Score
from bnn.structure import base_of, is_observation, is_plate


@dataclass(frozen=True)
class DescriptionLength:
    """A code length, with Monte Carlo standard errors over draws from the guide.

    :ivar kl: of the weights, nats; its error is zero where it is known in closed form.
    :ivar data: of the targets given the weights, nats.
    :ivar total: of both, nats: −ELBO.
    :ivar num_weights: how many numbers the latent sites hold.
    :ivar num_targets: how many numbers the observed sites hold.
    """

    kl: Score
    data: Score
    total: Score
    num_weights: int
    num_targets: int

    @property
    def kl_bits(self) -> float:
        """Bits of the weights."""
        return self.kl.value / math.log(2.0)

    @property
    def total_bits(self) -> float:
        """Bits of the message."""
        return self.total.value / math.log(2.0)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the weights, for each of them: what precision the data give them."""
        return self.kl_bits / self.num_weights

    @property
    def bits_per_target(self) -> float:
        """Bits of the message for each target; for labels of K classes below log2 K if the net has learnt anything."""
        return self.total_bits / self.num_targets


def description_length(guide: Any, *args: Any, num_draws: int = 100, **kwargs: Any) -> DescriptionLength:
    """The code length of data under a guide.

    :param guide: a guide with its ``model``: ours, or an automatic one of Pyro's.
    :param args: arguments of the model: the data.
    :param num_draws: draws from the guide; of a model with minibatches each takes a fresh one.
    :param kwargs: keyword arguments of the model.
    :raises ValueError: for a guide without a density over all sites, such as a point estimate, an ensemble or a Laplace
        approximation of the last layer only; and where the model observes nothing.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import description_length
    >>> from bnn.guides import AutoFactorizedNormal
    >>> def model(y):
    ...     bias = pyro.sample("bias", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Bernoulli(logits=bias), obs=y)
    >>> pyro.set_rng_seed(0)
    >>> found = description_length(AutoFactorizedNormal(model, init_scale=0.1), torch.ones(50))
    >>> found.num_weights, found.num_targets, found.kl.error, found.total_bits > found.kl_bits > 0
    (1, 50, 0.0, True)
    """
    draws = [_draw(guide, args, kwargs) for _ in range(whole_number("num_draws", num_draws, 2))]
    if not draws[0].num_targets:
        raise ValueError("the model observes nothing when called so: give it the data, targets included.")
    kl, data = (np.array([getattr(draw, name) for draw in draws]) for name in ("kl", "data"))
    return DescriptionLength(
        _mean(kl), _mean(data), _mean(kl + data, rounding=1e-5), draws[0].num_weights, draws[0].num_targets
    )  # fmt: skip


def kl_to_prior(guide: Any, *args: Any, num_draws: int = 100, **kwargs: Any) -> Score:
    """KL(q | p) from a guide to its model's prior in nats; its error is zero where it is known in closed form.

    That is so of a guide that draws every site by itself from a law whose KL to the prior torch knows, such as
    ``AutoFactorizedNormal`` under Normal priors of fixed numbers. Elsewhere it is a mean over draws.

    :param guide: as of :func:`description_length`.
    :param args: arguments of the model.
    :param num_draws: draws from the guide, where there is no closed form.
    :param kwargs: keyword arguments of the model.
    :raises ValueError: for a guide without a density over all sites.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import kl_to_prior
    >>> def model():
    ...     pyro.sample("z", dist.Normal(torch.zeros(3), 2.).to_event(1))
    >>> def guide():
    ...     pyro.sample("z", dist.Normal(torch.zeros(3), 1.).to_event(1))
    >>> guide.model = model
    >>> print(kl_to_prior(guide))  # 3 (log 2 + ½/4 − ½)
    0.9544 +- 0
    """
    return _mean(np.array([_draw(guide, args, kwargs).kl for _ in range(whole_number("num_draws", num_draws, 2))]))


def _mean(values: np.ndarray, rounding: float = 0.0) -> Score:
    """Mean and standard error; zero for numbers that are the same, up to relative rounding."""
    if np.ptp(values) <= rounding * abs(values).max():
        return Score(float(values.mean()), 0.0)
    return Score(float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))))


@dataclass(frozen=True)
class _Draw:
    kl: float
    data: float
    num_weights: int
    num_targets: int


def _draw(guide: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Draw:
    """One draw's share of the code length: closed forms where there are some, log densities elsewhere."""
    model = getattr(guide, "model", None)
    if model is None:
        raise ValueError(f"the guide {type(guide).__name__} does not know its model: give one with a `model`.")
    with torch.no_grad(), quiet_handlers(), poutine.block():
        drawn = poutine.trace(guide).get_trace(*args, **kwargs)
        trace = poutine.trace(poutine.replay(model, drawn)).get_trace(*args, **kwargs)
        drawn.compute_log_prob()
        trace.compute_log_prob()
    guided = {name: node for name, node in drawn.nodes.items() if node["type"] == "sample" and not is_plate(node)}
    _check_density(type(guide).__name__, guided, trace.nodes)
    kl = data = 0.0
    weights = targets = 0
    closed: set[str] = set()
    for name, node in trace.nodes.items():
        if node["type"] != "sample" or is_plate(node):
            continue
        if name in guided:
            weights += node["value"].numel()
            exact = _closed_form(guided[name], node)
            closed |= {name} if exact is not None else set()
            kl += -float(node["log_prob_sum"]) if exact is None else exact
        else:
            data -= float(node["log_prob_sum"])
            targets += round(float(node["scale"]) * node["value"].numel()) if is_observation(node) else 0
    kl += sum(float(node["log_prob_sum"]) for name, node in guided.items() if name not in closed)
    if not math.isfinite(kl + data):
        raise ValueError(f"the code length is not finite: KL {kl:.4g}, data {data:.4g} nats.")
    return _Draw(kl, data, weights, targets)


def _check_density(guide: str, guided: Mapping[str, Any], nodes: Mapping[str, Any]) -> None:
    """:raises ValueError: if the guide has Deltas that no auxiliary sites of so many numbers stand behind."""
    deltas = [name for name, node in guided.items() if isinstance(base_of(node["fn"]), Delta) and name in nodes]
    shapes = {name: biject_to(nodes[name]["fn"].support).inverse_shape(nodes[name]["value"].shape) for name in deltas}
    behind = sum(node["value"].numel() for node in guided.values() if node["infer"].get("is_auxiliary"))
    points = sum(math.prod(shape) for shape in shapes.values()) - behind
    if points > 0:
        raise ValueError(
            f"the guide {guide} gives {points} latent numbers as points: the description length of its weights is "
            "infinite, or, where the points are random, not known. Give a guide with a density over all sites, such as "
            "AutoFactorizedNormal, AutoMatrixNormal, or Laplace with sites=None."
        )


def _closed_form(guided: Any, node: Any) -> float | None:
    """KL of one site, None where torch knows none."""
    if guided["infer"].get("is_auxiliary") or isinstance(base_of(guided["fn"]), Delta) or node["mask"] is not None:
        return None
    try:
        with torch.no_grad():
            kl: Tensor = kl_divergence(guided["fn"], node["fn"])
    except (NotImplementedError, ValueError):
        return None
    return float((node["scale"] * kl).sum())
