"""Factorized Gaussian: every latent number has its own mean and variance.

    q(w) = Π_j N(w_j; μ_j, σ_j²),        Λ_j = 1/σ_j²

Natural gradient of L = E_q[log p(D|w)] − λ KL(q‖p) (Khan and Nielsen 2018; Zhang et al. 2018, Algorithm 1, noisy Adam):

    μ ← μ + α Λ⁻¹ ∇_μ L / λ,        Λ ← Λ + ρ (Λ̂ − Λ),        Λ̂_j = E_q[Σ_n (∂_j log p(y_n|w))²] / λ + 1/η_j.

Squares are per datum, never of the minibatch's mean, which would lose a factor of about the batch size; and there is no
square root. The fixed point for linear regression has the exact mean and precision diag(Λ*).

VOGN (Khan et al. 2018, "Fast and scalable Bayesian deep learning by weight-perturbation in Adam") is this guide under
``TraceNaturalGradient_ELBO("empirical", stick_the_landing=False, trust_region=None)`` and
``NaturalGradientDescent(lr=α, precision_lr=ρ)``: squares of the observed gradients, at the draw. Here the mean moves by
the covariance before the step, in the paper by that after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.util import sum_rightmost
from torch import Tensor
from torch.distributions import biject_to, constraints

from bnn.guides._base import NaturalGuide
from bnn.guides._blocks import Block, Curvature, Factors, LatentSite, Params
from bnn.per_datum import Place, squares_per_datum
from bnn.recording import untraced


class FactorizedBlock(Block):
    """All factorized sites of a guide in one flat vector."""

    family = "factorized"
    parameters = {"loc": "loc", "scale": "scale"}

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """One flat vector."""
        pieces = [values[site.name].reshape(-1) for site in self.sites]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Values of the sites; ``value`` may have leading dimensions."""
        pieces = value.split([site.shape.numel() for site in self.sites], -1)
        lead = value.shape[:-1]
        return {site.name: p.reshape(lead + site.shape) for site, p in zip(self.sites, pieces, strict=True)}

    def init(self, values: Mapping[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Any]]:
        """Location and scale."""
        scales = {site.name: torch.full_like(values[site.name], scale * site.scale) for site in self.sites}
        return {"loc": (self.join(values), constraints.real), "scale": (self.join(scales), constraints.positive)}

    def matrix_of(self, names: Sequence[str]) -> tuple[dict[str, Place], tuple[int, int]]:
        """One site as a matrix of its first dimension by all others."""
        (site,) = (site for site in self.sites if site.name == names[0])
        rows, cols = _matrix_shape(site)
        with untraced():
            numbers = torch.arange(rows * cols)
        return {site.name: Place(numbers // cols, numbers % cols)}, (rows, cols)

    def factors(self, params: Params, noise: Tensor, names: Sequence[str]) -> Factors:
        """σ alone."""
        (site,) = (site for site in self.sites if site.name == names[0])
        shape = _matrix_shape(site)
        scale, own = (self.split(t)[site.name].reshape(shape) for t in (params["scale"], noise))
        return Factors(None, scale, None, own)

    def spread(self, params: Params, noise: Tensor) -> Tensor:
        """σ ε."""
        return params["scale"] * noise

    def whiten(self, params: Params, gradient: Tensor) -> Tensor:
        """σ g."""
        return params["scale"] * gradient

    def log_det(self, params: Params) -> Tensor:
        """Σ log σ."""
        return params["scale"].log().sum()

    def variance(self, params: Params) -> Tensor:
        """σ²."""
        return params["scale"].square()

    def targets(self, params: Params, curvature: Curvature) -> dict[str, Tensor]:
        """Λ̂ σ²."""
        squares: dict[str, Tensor] = {}
        priors = curvature.precisions(self.sites)
        for site in self.sites:
            total: Tensor | None = None
            if site.name in curvature.uses:
                uses, numel = curvature.uses[site.name], site.shape.numel()
                for grads in filter(None, curvature.grads):
                    one = squares_per_datum(uses, site.name, numel, curvature.env, grads)
                    total = one if total is None else total + one
            else:
                for gradients in curvature.universal:
                    if site.name in gradients:
                        one = gradients[site.name].square().reshape(-1)
                        total = one if total is None else total + one
            prior = priors[site.name].reshape(-1)
            squares[site.name] = prior if total is None else total * curvature.weight + prior
        return {"scale": self.join(squares) * params["scale"].square()}

    def reparametrized_targets(self, noise: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """1 − (g̃ + ε) ε."""
        return {"scale": 1.0 - (plain + noise) * noise}

    def scale_gradients(self, params: Params, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """D log σ = −½ ρ (Λ̂ σ² − 1)."""
        return {"scale": 0.5 * (targets["scale"] - 1.0)}

    def sample(self, params: Params, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """Normals at the sites; through an auxiliary site and a Delta where the site is constrained."""
        locs, scales = self.split(params["loc"]), self.split(params["scale"])
        result = {}
        for site in self.sites:
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                law = dist.Normal(locs[site.name], scales[site.name])
                if site.is_real:
                    result[site.name] = pyro.sample(site.name, law.to_event(site.event_dim))
                else:
                    result[site.name] = _through_transform(site, law)
        return result


def _matrix_shape(site: LatentSite) -> tuple[int, int]:
    rows = site.shape[0] if site.shape else 1
    return rows, site.shape.numel() // max(rows, 1)


def _through_transform(site: LatentSite, law: Any) -> Tensor:
    latent = pyro.sample(
        site.name + "_unconstrained", law.to_event(site.unconstrained_event_dim), infer={"is_auxiliary": True}
    )
    return delta_at(site, latent)


def delta_at(site: LatentSite, latent: Tensor, density: Tensor | float = 0.0) -> Tensor:
    """Sample the site at an unconstrained value, with the density that the change of variables brings.

    :param site: the site.
    :param latent: the value.
    :param density: a log density of the whole site besides.
    """
    transform = biject_to(site.support)
    value = transform(latent)
    log_density = transform.inv.log_abs_det_jacobian(value, latent)
    log_density = sum_rightmost(log_density, log_density.dim() - value.dim() + site.event_dim)
    log_density = log_density + density / log_density.numel()
    result: Tensor = pyro.sample(site.name, dist.Delta(value, log_density=log_density, event_dim=site.event_dim))
    return result


class AutoFactorizedNormal(NaturalGuide):
    """A factorized Gaussian over all latent sites, in unconstrained space.

    With :class:`~bnn.guides.TraceNaturalGradient_ELBO` and :class:`~bnn.guides.NaturalGradientDescent` it is trained by
    natural gradients (noisy Adam without the square root, or VOGN); with Pyro's ``Trace_ELBO`` and optimizers it is
    Bayes by Backprop. Parameters: ``loc`` and ``scale``, flat vectors over all sites in the order of the model.

    :param model: a Pyro model.
    :param init_loc_fn: where the locations start: a name of :func:`bnn.initialization.strategy_of` or one of Pyro's
        ``init_to_*`` functions.
    :param init_scale: start of the standard deviations, relative to those of Normal priors.
    :param create_plates: as for Pyro's guides.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from bnn.guides import AutoFactorizedNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
    >>> def model(x, y):
    ...     weight = pyro.sample("weight", dist.Normal(torch.zeros(2), 1.).to_event(1))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("obs", dist.Normal(x @ weight, 1.), obs=y)
    >>> guide = AutoFactorizedNormal(model)
    >>> svi = SVI(model, guide, NaturalGradientDescent(lr=1.0, precision_lr=1.0), TraceNaturalGradient_ELBO("ggn"))
    >>> x = torch.eye(2)
    >>> losses = [svi.step(x, torch.tensor([2., 4.])) for _ in range(9)]
    >>> guide.median()["weight"].round(decimals=3)  # x is orthogonal: the exact posterior is N([1, 2], ½)
    tensor([1., 2.])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        init_loc_fn: Any = "auto",
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, init_scale=init_scale, create_plates=create_plates)

    def default_family(self, site: LatentSite) -> str:
        """Factorized."""
        return "factorized"
