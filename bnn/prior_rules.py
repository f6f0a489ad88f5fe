"""What a prior over the parameters of a net is, and which parameter gets which."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from typing import Any

import pyro
from torch import Tensor, nn

from bnn.net_parameters import Parameter

Predicate = str | Callable[[nn.Module, str], bool]


class Prior:
    """Draws a parameter of a net. A subclass gives its :meth:`law`, or :meth:`sample` if it takes several sites."""

    latent = True  # whether it makes the parameter random

    def law(self, parameter: Parameter) -> Any:
        """The distribution of the parameter."""
        raise NotImplementedError

    def sample(self, parameter: Parameter) -> Tensor | None:
        """The parameter's value by ``pyro.sample``; None keeps the value of the net."""
        value: Tensor = pyro.sample(parameter.name, self.law(parameter))
        return value

    def check(self, parameter: Parameter) -> None:
        """:raises ValueError: if the prior does not suit the parameter."""
        if not parameter.value.is_floating_point():
            raise ValueError(
                f"parameter {parameter.name!r} of the net is {parameter.value.dtype}, and only real numbers can have a "
                "prior: register it as a buffer, or give it bnn.priors.Fixed()."
            )


def check_positive(prior: Any, *names: str) -> None:
    """:raises ValueError: unless these settings are finite numbers above zero."""
    for name in names or [f.name for f in fields(prior)]:
        value = getattr(prior, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
            raise ValueError(f"{type(prior).__name__}: {name} is {value!r}; give a finite number above 0.")


class NetPrior:
    """Rules that are known once the net is."""

    def rules(self, net: nn.Module) -> list[tuple[Predicate, Prior]]:
        """The rules for ``net``, in the order in which they are asked."""
        raise NotImplementedError


def priors_of(net: nn.Module, parameters: Sequence[Parameter], prior: Any) -> dict[str, Prior]:
    """The prior of each parameter: of the first rule that matches one of its names.

    :param net: a net.
    :param parameters: its parameters.
    :param prior: one prior; a mapping from patterns of names to priors; or a sequence of (pattern or function of module
        and name, prior).
    :raises ValueError: if a parameter gets none, or a rule has no effect.
    """
    names = ", ".join(repr(p.name) for p in parameters)
    rules = _rules(prior.rules(net) if isinstance(prior, NetPrior) else prior)
    result: dict[str, Prior] = {}
    matches: list[list[str]] = [[] for _ in rules]
    for parameter in parameters:
        for number, (predicate, one) in enumerate(rules):
            if _matches(predicate, parameter):
                matches[number].append(parameter.name)
                result.setdefault(parameter.name, one)
    taken: set[str] = set()
    for (predicate, _), matched in zip(rules, matches, strict=True):
        shown = repr(predicate) if isinstance(predicate, str) else f"the predicate {predicate}"
        if not matched:
            raise ValueError(f"{shown} in prior= matches no parameter of the net. Its parameters are {names}.")
        if taken.issuperset(matched):
            raise ValueError(
                f"{shown} in prior= has no effect, since rules before it match all that it matches "
                f"({', '.join(map(repr, matched))}): the first match counts, so put it before them."
            )
        taken.update(matched)
    missing = [p.name for p in parameters if p.name not in result]
    if missing:
        raise ValueError(
            f"prior= says nothing of {', '.join(map(repr, missing))}: end it with a rule for all the rest, such as "
            "'*': bnn.priors.FanIn(), or Fixed() to keep the net's values."
        )
    return result


def _rules(prior: Any) -> list[tuple[Predicate, Prior]]:
    if isinstance(prior, Prior):
        return [("*", prior)]
    rules = list(prior.items()) if isinstance(prior, Mapping) else prior
    if not isinstance(rules, (list, tuple)):
        raise ValueError(
            f"prior is {_shown(prior)}; give a prior of bnn.priors, such as bnn.priors.Normal(1.0), a mapping "
            "{'pattern of names': prior}, or a list of (pattern or function of module and name, prior)."
        )
    for rule in rules:
        pair = isinstance(rule, (list, tuple)) and len(rule) == 2
        if not (pair and (isinstance(rule[0], str) or callable(rule[0])) and isinstance(rule[1], Prior)):
            raise ValueError(
                f"prior holds {_shown(rule)}; wanted is a pattern of parameter names or a function of module and name, "
                "and a prior of bnn.priors, such as ('*.weight', bnn.priors.Normal(1.0))."
            )
    return list(rules)


def _shown(value: Any) -> str:
    return f"{value!r:.80}"


def _matches(predicate: Predicate, parameter: Parameter) -> bool:
    places = ((parameter.module, parameter.name), *parameter.others)
    if isinstance(predicate, str):
        return any(fnmatchcase(name, predicate) for _, name in places)
    return any(bool(predicate(module, name)) for module, name in places)
