"""What the families of a guide have in common: a block of latent sites with one Gaussian, and its algebra.

A block whitens: with v = loc + C(ε) for a linear map C of standard normal ε, a gradient g in the space of v becomes
g̃ = Cᵀ g, and the natural direction of the mean is Σ g = C g̃. A block's methods are pure functions of tensors, so
that a whole step can be recorded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import biject_to

from bnn.layers import Use
from bnn.per_datum import Block as Data
from bnn.per_datum import Place

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class LatentSite:
    """A latent site of the model as the guide needs it, without the model's data.

    :ivar name: its name.
    :ivar support: the constraint on its value.
    :ivar shape: shape of its unconstrained value.
    :ivar event_dim: event dimensions of its value in the model.
    :ivar frames: the plates around it.
    :ivar scale: standard deviation of its prior in unconstrained space if that is known, else 1.
    """

    name: str
    support: Any
    shape: torch.Size
    event_dim: int
    frames: tuple[Any, ...]
    scale: float

    @property
    def is_real(self) -> bool:
        """Whether its unconstrained value is its value."""
        probe = torch.full(self.shape, 0.3)
        value = biject_to(self.support)(probe)
        return value.shape == probe.shape and bool((value == probe).all())

    @property
    def unconstrained_event_dim(self) -> int:
        """Event dimensions of its unconstrained value."""
        return self.event_dim + len(self.shape) - len(biject_to(self.support).forward_shape(self.shape))


@dataclass
class Factors:
    """W − M = R (σ ∘ E) Cᵀ; None is the unit matrix, or 1. R and C may be lower triangular.

    :ivar covariance: C Cᵀ, where it is at hand.
    """

    rows: Tensor | None
    scale: Tensor | None
    columns: Tensor | None
    noise: Tensor
    triangular: bool = False
    covariance: Tensor | None = None


@dataclass
class Curvature:
    """What a block needs to know about the curvature of minus the log-likelihood, and of minus the log prior.

    :ivar uses: the recognised uses of the captured sites.
    :ivar env: values of the graph's nodes.
    :ivar grads: per probe, gradients at the outputs of the uses.
    :ivar universal: per probe, gradient of a sampled-label log-likelihood with respect to the sites without capture.
    :ivar precision: diagonal of the prior's curvature, per site, unconstrained; one number where all are
        equal, and the same tensor for sites of the same number.
    :ivar weight: what the likelihood's curvature is multiplied with: 1 / kl_weight.
    """

    uses: Mapping[str, Sequence[tuple[Use, Data]]]
    env: Mapping[Any, Any]
    grads: Sequence[Mapping[Any, Tensor]]
    universal: Sequence[Mapping[str, Tensor]]
    precision: Mapping[str, Tensor]
    weight: float

    def precisions(self, sites: Sequence[LatentSite]) -> dict[str, Tensor]:
        """The diagonal of each site in its own shape."""
        return {site.name: self.precision[site.name].expand(site.shape) for site in sites}


class Block(ABC):
    """Latent sites that share one Gaussian.

    :ivar sites: the sites.
    :ivar parameters: name of each parameter -> kind of its geometry, see :class:`bnn.guides.NaturalGradientDescent`.
    :ivar buffers: names of tensors that are no parameters.
    """

    family = ""
    parameters: dict[str, str] = {}
    buffers: tuple[str, ...] = ()

    def __init__(self, sites: Sequence[LatentSite]) -> None:
        self.sites = list(sites)

    @property
    def names(self) -> list[str]:
        """Names of the sites."""
        return [site.name for site in self.sites]

    @property
    def key(self) -> str:
        """The block's name: that of its first site."""
        return self.sites[0].name

    @property
    def numel(self) -> int:
        """Number of latent numbers."""
        return sum(site.shape.numel() for site in self.sites)

    def numel_of(self, name: str) -> int:
        """Number of latent numbers of one site."""
        return next(site.shape.numel() for site in self.sites if site.name == name)

    # ---- layout

    @abstractmethod
    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """Unconstrained values of the sites in the block's own shape."""

    @abstractmethod
    def split(self, value: Tensor) -> dict[str, Tensor]:
        """The inverse of :meth:`join`."""

    def matrix_of(self, names: Sequence[str]) -> tuple[dict[str, Place], tuple[int, int]]:
        """Where the entries of ``names`` stand in a matrix of (outputs, inputs), and its shape."""
        raise NotImplementedError

    def factors(self, params: Params, noise: Tensor, names: Sequence[str]) -> Factors:
        """The noise of ``names`` in that matrix: R (σ ∘ E) Cᵀ."""
        raise NotImplementedError

    # ---- the Gaussian

    @abstractmethod
    def init(self, values: Mapping[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Any]]:
        """Start of each parameter (a tensor and its constraint) at ``values``, standard deviation relative to prior."""

    @abstractmethod
    def spread(self, params: Params, noise: Tensor) -> Tensor:
        """C(ε): what is added to the location."""

    @abstractmethod
    def whiten(self, params: Params, gradient: Tensor) -> Tensor:
        """Cᵀ(g)."""

    @abstractmethod
    def log_det(self, params: Params) -> Tensor:
        """Log |det C|."""

    @abstractmethod
    def variance(self, params: Params) -> Tensor:
        """Variance of each entry, in the block's shape."""

    def total_variances(self, params: Params) -> dict[str, Tensor]:
        """Sum of the variances of each site's entries."""
        return {name: value.sum() for name, value in self.split(self.variance(params)).items()}

    # ---- its natural gradient

    @abstractmethod
    def targets(self, params: Params, curvature: Curvature) -> dict[str, Tensor]:
        """What :meth:`finished` makes the relative precisions of, after a mean over steps."""

    def finished(self, params: Params, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Precision that the data and the prior ask for, relative to the present one, per parameter of the scale.

        All are 1, or the unit matrix, at the fixed point.
        """
        return {name: means[name] for name in self.parameters if name in means}

    @abstractmethod
    def scale_gradients(self, params: Params, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Minus the natural gradient of each scale parameter in its unconstrained coordinates."""

    @abstractmethod
    def reparametrized_targets(self, noise: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """The same from the whitened gradient g̃ at one draw: E[I − (g̃ + ε) εᵀ] is the whitened mean Hessian."""

    def factored_targets(self, curvature: Curvature) -> dict[str, Tensor]:
        """What ``damping="factored"`` asks to be averaged."""
        raise NotImplementedError

    def damped(self, params: Params, whitened: Tensor, damping: float) -> Tensor:
        """(I + δ CᵀC)⁻¹ g̃: the whitened direction with δ added to the precision."""
        return whitened / (1.0 + damping * self.variance(params))

    # ---- its place in Pyro

    @abstractmethod
    def sample(self, params: Params, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """``pyro.sample`` statements for the sites."""

    def moments(self, params: Params) -> dict[str, tuple[Tensor, Tensor]]:
        """Location and standard deviation of each entry, per site, unconstrained."""
        loc, sd = self.split(params["loc"]), self.split(self.variance(params).sqrt())
        return {name: (loc[name], sd[name]) for name in self.names}
