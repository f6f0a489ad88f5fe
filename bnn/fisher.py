"""Probes: numbers per datum whose gradients' outer products add up to the curvature of the log-likelihood.

    Σ_k Σ_n ∇s_kn ∇s_knᵀ  =  or estimates  Σ_n Jᵀ_n F_n J_n,

where J is the derivative of the likelihood's parameters and F their Fisher information (Martens 2020, JMLR 21).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions.util import scale_and_mask
from torch import Tensor

from bnn.structure import base_of

CURVATURES = ("sampled", "ggn", "empirical", "reparametrization")


@dataclass
class Probes:
    """Probes of one observed site.

    :ivar values: tensors in the shape of the site's log density.
    :ivar shared: whether probe k of several sites may be added up (independent labels) or not.
    """

    values: list[Tensor]
    shared: bool


def probes_of(fn: Any, value: Tensor, curvature: str, label_samples: int = 1) -> Probes | str:
    """The probes of an observed site, or in words why there are none.

    * ``"sampled"``: log p(y | x, w) at labels y drawn from p(y | x, w): an unbiased estimate of the Fisher information,
      which for canonical links is the Gauss-Newton matrix.
    * ``"ggn"``: no label noise: one probe per output, exact for the location of a Normal, Student-t or multivariate
      Normal, for Bernoulli, Categorical and Poisson.
    * ``"empirical"``: the observed labels, as in the noisy Adam of Zhang et al. (2018). Biased, even for linear
      regression.
    * ``"outputs"``: no curvature, but what the net gives: locations, the logit of a Bernoulli law, log probabilities of
      classes. Their gradients are the Jacobian of a linearised predictive.

    :param fn: the likelihood.
    :param value: the observed labels.
    :param curvature: one of these.
    :param label_samples: draws of the labels, for ``"sampled"``.
    """
    if curvature == "empirical":
        return Probes([fn.log_prob(value)], shared=True)
    if curvature == "ggn":
        return _one_per_output(fn, _EXACT, "curvature='ggn' knows {known}, not {given}; use curvature='sampled'")
    if curvature == "outputs":
        return _one_per_output(fn, _OUTPUTS, "the outputs of {known} are known, not those of {given}")
    probes = []
    for _ in range(label_samples):
        try:
            with torch.no_grad():
                labels = _labels(fn).detach()
        except NotImplementedError:
            return f"labels cannot be drawn from {type(base_of(fn)).__name__}"
        probes.append(fn.log_prob(labels) / label_samples**0.5)
    return Probes(probes, shared=True)


def _labels(fn: Any) -> Tensor:
    base = base_of(fn)
    if isinstance(base, dist.OneHotCategorical):  # its own draw reads values, which cannot be recorded
        index = dist.Categorical(logits=base.logits).sample().unsqueeze(-1)
        return (index == torch.arange(base.event_shape[0], device=index.device)).to(base.logits.dtype)
    labels: Tensor = fn.sample()
    return labels


def whole_batch_probes(fn: Any, value: Tensor, curvature: str, probes: Probes) -> list[Tensor]:
    """Probes for sites whose gradients per datum are not captured: only that of the sum over the batch is known.

    Drawn labels have gradients of mean zero, so that the square of their sum estimates the sum of squares; observed
    ones get random signs. ``"ggn"`` takes drawn labels here, which also know the curvature in the likelihood's scale.
    """
    if curvature == "sampled":
        return probes.values
    if curvature == "ggn":
        drawn = probes_of(fn, value, "sampled")
        if isinstance(drawn, Probes):
            return drawn.values
    signs = [torch.randint_like(probe.detach(), 2) * 2.0 - 1.0 for probe in probes.values]
    return [sign * probe for sign, probe in zip(signs, probes.values, strict=True)]


def _one_per_output(fn: Any, known: Mapping[type, Callable[[Any], list[Tensor]]], otherwise: str) -> Probes | str:
    base = base_of(fn)
    for family, probes in known.items():
        if isinstance(base, family):
            values = [probe for whole in probes(base) for probe in _per_datum(_masked(whole, fn, base), fn)]
            return Probes(values, shared=False)
    names = ", ".join(sorted(family.__name__ for family in known))
    return otherwise.format(known=names, given=type(base).__name__)


def _per_datum(whole: Tensor, fn: Any) -> list[Tensor]:
    """One probe per output: ``whole`` has the shape of the base distribution's log density."""
    shape = fn.batch_shape + whole.shape[len(fn.batch_shape) :]
    flat = whole.expand(shape).reshape(*fn.batch_shape, -1)
    return list(flat.unbind(-1))


def _masked(whole: Tensor, fn: Any, base: Any) -> Tensor:
    """``whole`` without what the masks inside ``fn`` leave out; a mask of events covers all their entries."""
    while fn is not base:
        if isinstance(fn, dist.MaskedDistribution):
            mask, inside = fn._mask, len(base.batch_shape) - len(fn.base_dist.batch_shape)
            whole = scale_and_mask(whole, mask=mask[(..., *[None] * inside)] if isinstance(mask, Tensor) else mask)
        fn = fn.base_dist
    return whole


def _normal(base: Any) -> list[Tensor]:
    return [base.loc / base.scale.detach()]


def _student(base: Any) -> list[Tensor]:
    df = base.df.detach()
    return [base.loc * ((df + 1) / (df + 3)).sqrt() / base.scale.detach()]


def _multivariate_normal(base: Any) -> list[Tensor]:
    whitened = torch.linalg.solve_triangular(base.scale_tril.detach(), base.loc.unsqueeze(-1), upper=False)
    return list(whitened.squeeze(-1).unbind(-1))


def _bernoulli(base: Any) -> list[Tensor]:
    p = base.probs.detach()
    return [base.logits * (p * (1 - p)).sqrt()]


def _categorical(base: Any) -> list[Tensor]:
    weighted = base.logits * base.probs.detach().sqrt()
    return list(weighted.unbind(-1))


def _poisson(base: Any) -> list[Tensor]:
    return [base.rate / base.rate.detach().sqrt()]


_EXACT: dict[type, Callable[[Any], list[Tensor]]] = {
    dist.Normal: _normal,
    dist.StudentT: _student,
    dist.MultivariateNormal: _multivariate_normal,
    dist.Bernoulli: _bernoulli,
    dist.Categorical: _categorical,
    dist.OneHotCategorical: _categorical,
    dist.Poisson: _poisson,
}

_OUTPUTS: dict[type, Callable[[Any], list[Tensor]]] = {
    dist.Normal: lambda base: [base.loc],
    dist.StudentT: lambda base: [base.loc],
    dist.MultivariateNormal: lambda base: list(base.loc.unbind(-1)),
    dist.Bernoulli: lambda base: [base.logits],
    dist.Categorical: lambda base: list(base.logits.unbind(-1)),
    dist.OneHotCategorical: lambda base: list(base.logits.unbind(-1)),
}
