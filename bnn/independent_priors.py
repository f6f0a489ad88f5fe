"""Priors with independent entries and fixed scales."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from torch.distributions import constraints

from bnn.net_parameters import Parameter
from bnn.prior_rules import Prior, check_positive


@dataclass(frozen=True)
class Normal(Prior):
    """Independent Normal entries: the same standard deviation whatever the width of a layer.

    :param scale: standard deviation.
    :raises ValueError: unless it is positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self)

    def law(self, parameter: Parameter) -> Any:
        """N(center, scale²) for each entry."""
        return parameter.site_of(dist.Normal(parameter.full(parameter.center), parameter.full(self.scale)))


@dataclass(frozen=True)
class FanIn(Prior):
    """Independent Normal entries, weights with standard deviation ``scale / √fan_in``: the default.

    Outputs of a layer then have a variance that does not depend on its width, so that the functions that the net draws
    have a limit in wide nets (Neal 1996, "Bayesian learning for neural networks", section 2.1).

    :param scale: standard deviation of a layer's output for inputs of mean square one.
    :param bias_scale: standard deviation of biases.
    :param gain_scale: standard deviation about 1 of the gains of layers that normalise.
    :raises ValueError: unless all are positive.

    >>> import bnn, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(100, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
    >>> model = bnn.bayesian(net, prior=bnn.priors.FanIn(), likelihood=bnn.likelihoods.Gaussian(0.1))
    >>> model.law("0.weight").stddev[0, 0]
    tensor(0.1000)
    """

    scale: float = 1.0
    bias_scale: float = 1.0
    gain_scale: float = 0.5

    def __post_init__(self) -> None:
        check_positive(self)

    def scale_of(self, parameter: Parameter) -> float:
        """The standard deviation of the parameter's entries."""
        if parameter.is_gain:
            return self.gain_scale
        return self.bias_scale if parameter.fan_in is None else self.scale / math.sqrt(parameter.fan_in)

    def law(self, parameter: Parameter) -> Any:
        """N(center, scale²/fan_in) for each entry."""
        return Normal(self.scale_of(parameter)).law(parameter)


@dataclass(frozen=True)
class Laplace(Prior):
    """Independent Laplace entries, density ``exp(-|w - center| / scale) / (2 scale)``.

    :param scale: the mean absolute deviation; the standard deviation is √2 times it.
    :raises ValueError: unless it is positive.
    """

    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self)

    def law(self, parameter: Parameter) -> Any:
        """Laplace(center, scale) for each entry."""
        return parameter.site_of(dist.Laplace(parameter.full(parameter.center), parameter.full(self.scale)))


@dataclass(frozen=True)
class StudentT(Prior):
    """Independent Student-t entries: tails as heavy as ``df`` is small.

    :param df: degrees of freedom; the variance is ``scale² df / (df - 2)`` above 2, else infinite.
    :param scale: width.
    :raises ValueError: unless both are positive.
    """

    df: float = 3.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_positive(self)

    def law(self, parameter: Parameter) -> Any:
        """Student's t about center for each entry."""
        df, loc, scale = (parameter.full(v) for v in (self.df, parameter.center, self.scale))
        return parameter.site_of(dist.StudentT(df, loc, scale))


class NormalMixture(dist.MixtureSameFamily):
    """A mixture of Normals whose support says that it is the real line, so that samplers need not transform it."""

    support = constraints.real


@dataclass(frozen=True)
class Mixture(Prior):
    """Independent entries ``pi N(center, scale_1²) + (1 - pi) N(center, scale_2²)``: a few large weights, many small.

    Blundell et al. (2015), "Weight uncertainty in neural networks", ICML, equation 7.

    :param pi: share of the first component, between 0 and 1.
    :param scale_1: standard deviation of the first component.
    :param scale_2: standard deviation of the second.
    :raises ValueError: unless the scales are positive and pi is inside (0, 1).
    """

    pi: float = 0.5
    scale_1: float = 1.0
    scale_2: float = 0.1

    def __post_init__(self) -> None:
        check_positive(self)
        if self.pi >= 1:
            raise ValueError(f"Mixture: pi is {self.pi!r}; give the share of the first component, between 0 and 1.")

    def law(self, parameter: Parameter) -> Any:
        """The mixture for each entry."""
        like = parameter.value
        weights = torch.tensor([self.pi, 1 - self.pi], dtype=like.dtype, device=like.device)
        scales = torch.tensor([self.scale_1, self.scale_2], dtype=like.dtype, device=like.device)
        components = dist.Normal(parameter.full(parameter.center), scales)
        return parameter.site_of(NormalMixture(dist.Categorical(weights), components))
