"""Priors over the parameters of a net, for :func:`bnn.bayesian`.

A prior is an object that draws one parameter by ``pyro.sample(name, law)``, ``name`` being its name in the net.
``Normal``, ``FanIn`` (the default), ``Laplace``, ``StudentT`` and ``Mixture`` have independent entries, ``Correlated``
has not; ``HierarchicalScale`` and ``Horseshoe`` learn their scale; ``Flat`` says nothing and ``Fixed`` all.

The gains of layers that normalise (group, layer, batch norm) multiply what they get: their priors are centred at 1, all
others at 0.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from bnn.correlated_priors import Correlated as Correlated
from bnn.independent_priors import FanIn as FanIn
from bnn.independent_priors import Laplace as Laplace
from bnn.independent_priors import Mixture as Mixture
from bnn.independent_priors import Normal as Normal
from bnn.independent_priors import StudentT as StudentT
from bnn.net_parameters import Parameter
from bnn.prior_rules import NetPrior, Predicate
from bnn.prior_rules import Prior as Prior
from bnn.scale_priors import HierarchicalScale as HierarchicalScale
from bnn.scale_priors import Horseshoe as Horseshoe


@dataclass(frozen=True)
class Flat(Prior):
    """The improper prior of density one everywhere: the posterior is the normalised likelihood, if that can be.

    Nothing can be drawn from it: Pyro's ``Predictive`` tries to, and fails, even where it is given draws. And the
    posterior of a net that can fit its data perfectly, or whose parameters are not identified, does not exist: for a
    few parameters at most.
    """

    def law(self, parameter: Parameter) -> Any:
        """``ImproperUniform`` over the parameter's shape."""
        support = constraints.independent(constraints.real, len(parameter.shape))
        return dist.ImproperUniform(support, torch.Size(), parameter.shape)

    def sample(self, parameter: Parameter) -> Tensor | None:
        """The value, in the net's precision and on its device: Pyro's law has none of its own."""
        value: Tensor = pyro.sample(parameter.name, self.law(parameter))
        return value.to(parameter.value)


@dataclass(frozen=True)
class Fixed(Prior):
    """The parameter keeps the value that it has in the net: no site, no prior.

    :param train: make it a ``pyro.param`` of the parameter's name, which starts at that value and is trained by SVI. As
        always in Pyro, two models with a ``pyro.param`` of one name share it until ``pyro.clear_param_store()``.
    """

    train: bool = False
    latent = False

    def law(self, parameter: Parameter) -> Any:
        """:raises NotImplementedError: always: it has no distribution."""
        raise NotImplementedError(f"parameter {parameter.name!r} is kept at its value ({self}) and has no prior.")

    def sample(self, parameter: Parameter) -> Tensor | None:
        """None, or the trained value."""
        if not self.train:
            return None
        value: Tensor = pyro.param(parameter.name, lambda: parameter.value.clone())
        if value.shape != parameter.shape:
            raise ValueError(
                f"the param store already holds {parameter.name!r} with shape {tuple(value.shape)}, but the net's has "
                f"shape {tuple(parameter.shape)}: another model's? Call pyro.clear_param_store() between the models."
            )
        return value

    def check(self, parameter: Parameter) -> None:
        """Anything can be kept; only real numbers can be trained."""
        if self.train:
            super().check(parameter)


@dataclass(frozen=True)
class LastLayer(NetPrior):
    """What :func:`last_layer` returns: :func:`bnn.bayesian` makes rules for its net out of it."""

    prior: Prior = field(default_factory=FanIn)

    def rules(self, net: nn.Module) -> list[tuple[Predicate, Prior]]:
        """One rule for the layer that comes last in the net, ``Fixed()`` for what is left."""
        layers = [m for m in net.modules() if next(m.parameters(recurse=False), None) is not None]
        rules: list[tuple[Predicate, Prior]] = [(lambda module, name: module is layers[-1], self.prior)]
        return rules + [("*", Fixed())] * (len(layers) > 1)


def last_layer(prior: Prior | None = None) -> LastLayer:
    """Bayesian in the last layer only: ``bnn.bayesian(net, prior=bnn.priors.last_layer(), ...)``.

    The last layer is the module with parameters that the net registered last; all others keep the values that they have
    in the net, and should have been trained. For another layer give a mapping, ``{"head.*": prior, "*": Fixed()}``.

    :param prior: prior of the last layer, :class:`FanIn` by default.
    :raises ValueError: if it is no prior.
    """
    prior = FanIn() if prior is None else prior
    if not isinstance(prior, Prior):
        raise ValueError(f"last_layer was given {prior!r}; give a prior, such as bnn.priors.Normal(1.0).")
    return LastLayer(prior)
