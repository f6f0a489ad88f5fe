"""Priors whose scale is learned: a scale for a whole layer, or one for every weight besides.

    HierarchicalScale    w_ij = c + s τ z_ij           log τ ~ N(log scale, log_sd²)
    Horseshoe            w_ij = c + τ λ_ij z_ij        τ ~ HalfCauchy(scale), λ_ij ~ HalfCauchy(1)

with z_ij ~ N(0, 1), c the prior's centre (1 for the gain of a layer that normalises, else 0) and s = 1/√fan_in for
weights, 1 for biases and gains.

A prior of this kind may be sampled in two forms. Centred, w itself is the site and its standard deviation depends on
τ: good when the data say what w is, or when so many weights share τ that they pin it down. Not centred, z is the site:
good when the data say little of each w. With a fixed step size the centred form has a second trouble, a funnel: where
τ is small, the curvature 1/τ² exceeds what the step can follow.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

from bnn.net_parameters import Parameter
from bnn.prior_rules import Prior, check_positive


def _not_centred(parameter: Parameter, scale: Tensor) -> Tensor:
    standard = parameter.site_of(dist.Normal(parameter.full(0.0), parameter.full(1.0)))
    value = parameter.center + scale * pyro.sample(f"{parameter.name}_standard", standard)
    result: Tensor = pyro.deterministic(parameter.name, value, event_dim=len(parameter.shape))
    return result


@dataclass(frozen=True)
class HierarchicalScale(Prior):
    """Normal entries whose common standard deviation, one for each parameter array, is learned with them.

    The scale is the site ``"0.weight_scale"``, relative to 1/√fan_in for weights, with a log-normal prior: a Normal in
    the unconstrained space, where samplers and guides move.

    Centred by default: the weight matrix is then a site that the guides of :mod:`bnn.guides` recognise as a layer, and
    its many entries hold the scale away from the funnel. Otherwise the site is ``"0.weight_standard"``, and
    ``"0.weight"`` a deterministic one: the form that usually mixes better where data are
    few.

    :param scale: prior median of the scale.
    :param log_sd: prior standard deviation of its logarithm.
    :param centred: in which form it is sampled.
    :raises ValueError: unless the numbers are positive.
    """

    scale: float = 1.0
    log_sd: float = 1.0
    centred: bool = True

    def __post_init__(self) -> None:
        check_positive(self, "scale", "log_sd")

    def law(self, parameter: Parameter) -> Any:
        """Of the scale: log-normal."""
        return dist.LogNormal(parameter.full(self.scale).log(), parameter.full(self.log_sd))

    def sample(self, parameter: Parameter) -> Tensor:
        """The parameter, after its scale."""
        scale = pyro.sample(f"{parameter.name}_scale", self.law(parameter))
        if parameter.fan_in is not None:
            scale = scale * parameter.fan_in**-0.5
        if not self.centred:
            return _not_centred(parameter, scale)
        entries = parameter.site_of(dist.Normal(parameter.full(parameter.center), scale))
        value: Tensor = pyro.sample(parameter.name, entries)
        return value


@dataclass(frozen=True)
class Horseshoe(Prior):
    """Most entries close to the centre, some far from it: a scale for each entry, and one that all of them share.

    Carvalho, Polson and Scott (2010), "The horseshoe estimator for sparse signals", Biometrika 97, 465-480; for nets
    Ghosh, Yao and Doshi-Velez (2018), "Structured variational learning of Bayesian neural networks with horseshoe
    priors", ICML. Not centred: the sites are ``"0.weight_scale"`` (τ), ``"0.weight_local_scale"`` (λ) and
    ``"0.weight_standard"`` (z), and ``"0.weight"`` is deterministic. Half-Cauchy scales take values over many orders of
    magnitude: expect slow chains.

    :param scale: of τ's half-Cauchy prior, about the share of entries that you expect to be far from the centre.
    :raises ValueError: unless it is positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self)

    def law(self, parameter: Parameter) -> Any:
        """Of τ: half-Cauchy."""
        return dist.HalfCauchy(parameter.full(self.scale))

    def sample(self, parameter: Parameter) -> Tensor:
        """The parameter, after its scales."""
        scale = pyro.sample(f"{parameter.name}_scale", self.law(parameter))
        local = pyro.sample(f"{parameter.name}_local_scale", parameter.site_of(dist.HalfCauchy(parameter.full(1.0))))
        return _not_centred(parameter, scale * local)
