"""Gaussians whose precision is a curvature plus a prior's: diagonal, diagonal in a Kronecker eigenbasis, and dense.

    Λ = κ H + D:     H = diag h;     (Q_r ⊗ Q_c) diag(e) (Q_r ⊗ Q_c)ᵀ with D = τ I;     any symmetric H

κ weighs the curvature of the likelihood; D is the curvature of minus the log prior.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from bnn.distributions import EigenNormal
from bnn.guides._blocks import LatentSite
from bnn.guides.factorized_normal import FactorizedBlock, delta_at

Prior = Mapping[str, Tensor]


class LaplaceBlock(nn.Module):
    """Sites that share a Gaussian.

    :param sites: the sites, whose entries are laid end to end.
    """

    def __init__(self, sites: Sequence[LatentSite]) -> None:
        super().__init__()
        self.sites = list(sites)

    @property
    def names(self) -> list[str]:
        """The sites' names."""
        return [site.name for site in self.sites]

    @property
    def numel(self) -> int:
        """Latent numbers."""
        return sum(site.shape.numel() for site in self.sites)

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The sites' entries end to end."""
        return torch.cat([values[site.name].reshape(-1) for site in self.sites])

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """The inverse; ``flat`` may have leading dimensions."""
        pieces = flat.split([site.shape.numel() for site in self.sites], -1)
        return {s.name: p.reshape(flat.shape[:-1] + s.shape) for s, p in zip(self.sites, pieces, strict=True)}

    @abstractmethod
    def log_det(self, prior: Prior, weight: Tensor | float) -> Tensor:
        """Log |κ H + D|; NaN where that is not positive definite.

        :param prior: D: site -> one number, or one per entry.
        :param weight: κ.
        """

    @abstractmethod
    def settle(self, prior: Prior, weight: float) -> None:
        """Take κ H + D for the precision.

        :raises RuntimeError: if it is not positive definite.
        """

    @abstractmethod
    def spread(self, noise: Tensor) -> Tensor:
        """Deviations with covariance Λ⁻¹ from standard normal numbers ``(..., numel)``."""

    @abstractmethod
    def variance(self) -> Tensor:
        """Diagonal of Λ⁻¹."""

    @abstractmethod
    def whiten(self, jacobian: Tensor) -> Tensor:
        """J (..., numel) as J̃ with J̃ J̃ᵀ = J Λ⁻¹ Jᵀ."""

    @abstractmethod
    def sample(self, loc: Mapping[str, Tensor], plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """``pyro.sample`` statements for the sites, around the unconstrained ``loc``."""

    def covariance(self) -> Tensor:
        """Λ⁻¹, dense."""
        factor = self.whiten(torch.eye(self.numel, dtype=self.like.dtype, device=self.like.device))
        return factor @ factor.mT

    @property
    def like(self) -> Tensor:
        """A tensor of the block's precision and device."""
        return next(self.buffers())

    def _prior(self, prior: Prior) -> Tensor:
        return torch.cat([prior[site.name].reshape(-1).expand(site.shape.numel()) for site in self.sites])

    def _not_positive(self, smallest: Tensor, what: str) -> RuntimeError:
        return RuntimeError(
            f"the posterior precision of sites {self.names} is not positive definite: {what} {float(smallest):.3g}. "
            "Where the prior is flat, the data must determine every direction: give the sites a Normal prior. Else "
            "train to a mode of the log joint, or take curvature='ggn', which is never negative."
        )


def _is_positive(curvature: Tensor, precision: Tensor, prior: Tensor) -> bool:
    """Whether all are; what rounding leaves of a zero does not count."""
    rounding = 10 * torch.finfo(curvature.dtype).eps * curvature.abs().max()
    return bool((precision > torch.where(prior > 0, 0.0, rounding)).all())


class DiagonalBlock(LaplaceBlock):
    """Independent entries.

    :param sites: the sites.
    :param curvature: h, end to end.
    """

    def __init__(self, sites: Sequence[LatentSite], curvature: Tensor) -> None:
        super().__init__(sites)
        self.register_buffer("curvature", curvature)
        self.register_buffer("sd", torch.full_like(curvature, torch.nan))

    curvature: Tensor
    sd: Tensor

    def log_det(self, prior: Prior, weight: Tensor | float) -> Tensor:
        """Σ log(κ h + d)."""
        return (weight * self.curvature + self._prior(prior)).log().sum()

    def settle(self, prior: Prior, weight: float) -> None:
        """Its inverse root."""
        own = self._prior(prior)
        precision = weight * self.curvature + own
        if not _is_positive(weight * self.curvature, precision, own):
            raise self._not_positive(precision.min(), "its smallest entry is")
        self.sd = precision.rsqrt()

    def spread(self, noise: Tensor) -> Tensor:
        """σ ε."""
        return self.sd * noise

    def variance(self) -> Tensor:
        """σ²."""
        return self.sd.square()

    def whiten(self, jacobian: Tensor) -> Tensor:
        """J σ."""
        return jacobian * self.sd

    def sample(self, loc: Mapping[str, Tensor], plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """Normals at the sites."""
        return FactorizedBlock(self.sites).sample({"loc": self.join(loc), "scale": self.sd}, plates)


class EigenBlock(LaplaceBlock):
    """One real site as a matrix (outputs, inputs), diagonal in a Kronecker basis.

    :param site: the site.
    :param row_basis: Q_r.
    :param col_basis: Q_c.
    :param curvature: e (rows, columns).
    :param transposed: whether the site's own shape is (inputs, outputs).
    """

    def __init__(
        self, site: LatentSite, row_basis: Tensor, col_basis: Tensor, curvature: Tensor, transposed: bool
    ) -> None:
        super().__init__([site])
        self.transposed = transposed
        for name, tensor in {"row_basis": row_basis, "col_basis": col_basis, "curvature": curvature}.items():
            self.register_buffer(name, tensor)
        self.register_buffer("sd", torch.full_like(curvature, torch.nan))

    row_basis: Tensor
    col_basis: Tensor
    curvature: Tensor
    sd: Tensor

    def _matrix(self, flat: Tensor) -> Tensor:
        rows, cols = self.curvature.shape
        if self.transposed:
            return flat.unflatten(-1, (cols, rows)).mT
        return flat.unflatten(-1, (rows, cols))

    def _flat(self, matrix: Tensor) -> Tensor:
        return (matrix.mT if self.transposed else matrix).flatten(-2)

    def log_det(self, prior: Prior, weight: Tensor | float) -> Tensor:
        """Σ log(κ e + τ)."""
        return (weight * self.curvature + prior[self.names[0]].mean()).log().sum()

    def settle(self, prior: Prior, weight: float) -> None:
        """Its inverse root in the basis; a prior that differs by entry counts by its mean."""
        own = prior[self.names[0]].mean()
        precision = weight * self.curvature + own
        if not _is_positive(weight * self.curvature, precision, own):
            raise self._not_positive(precision.min(), "its smallest eigenvalue is")
        self.sd = precision.rsqrt()

    def spread(self, noise: Tensor) -> Tensor:
        """Q_r (σ ∘ E) Q_cᵀ."""
        return self._flat(self.row_basis @ (self.sd * self._matrix(noise)) @ self.col_basis.mT)

    def variance(self) -> Tensor:
        """(Q_r ∘ Q_r) σ² (Q_c ∘ Q_c)ᵀ."""
        return self._flat(self.row_basis.square() @ self.sd.square() @ self.col_basis.square().mT)

    def whiten(self, jacobian: Tensor) -> Tensor:
        """σ ∘ Q_rᵀ J Q_c."""
        return (self.sd * (self.row_basis.mT @ self._matrix(jacobian) @ self.col_basis)).flatten(-2)

    def sample(self, loc: Mapping[str, Tensor], plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """A matrix law at the site itself."""
        (site,) = self.sites
        matrix = self._matrix(loc[site.name].reshape(-1))
        law = EigenNormal(matrix, self.row_basis, self.col_basis, self.sd)
        if self.transposed:
            law = EigenNormal(matrix.mT, self.col_basis, self.row_basis, self.sd.mT)
        if law.event_shape != site.shape:
            law = dist.TransformedDistribution(law, [dist.transforms.ReshapeTransform(law.event_shape, site.shape)])
        return {site.name: pyro.sample(site.name, law)}


class DenseBlock(LaplaceBlock):
    """All covariances.

    :param sites: the sites.
    :param curvature: H.
    :param prior_hessian: Hessian of minus the log prior, or None where that is diagonal.
    """

    def __init__(self, sites: Sequence[LatentSite], curvature: Tensor, prior_hessian: Tensor | None = None) -> None:
        super().__init__(sites)
        if prior_hessian is not None:
            prior_hessian = prior_hessian - prior_hessian.diagonal().diag()
            prior_hessian = prior_hessian if bool((prior_hessian != 0).any()) else None
        self.register_buffer("curvature", curvature)
        self.register_buffer("off_diagonal", prior_hessian)
        self.register_buffer("scale_tril", torch.full_like(curvature, torch.nan))

    curvature: Tensor
    off_diagonal: Tensor | None
    scale_tril: Tensor

    def _precision(self, prior: Prior, weight: Tensor | float) -> Tensor:
        result = weight * self.curvature + self._prior(prior).diag()
        return result if self.off_diagonal is None else result + self.off_diagonal

    def log_det(self, prior: Prior, weight: Tensor | float) -> Tensor:
        """Twice the sum of the logarithms of the Cholesky factor's diagonal."""
        factor, failed = torch.linalg.cholesky_ex(self._precision(prior, weight))
        return factor.diagonal().log().sum() * (torch.nan if int(failed) else 2.0)

    def settle(self, prior: Prior, weight: float) -> None:
        """The lower triangular factor of the covariance."""
        precision = self._precision(prior, weight)
        factor, failed = torch.linalg.cholesky_ex(precision.flip(0, 1))
        if int(failed):
            raise self._not_positive(torch.linalg.eigvalsh(precision)[0], "its smallest eigenvalue is")
        unit = torch.eye(len(precision), dtype=precision.dtype, device=precision.device)
        # Λ = U Uᵀ with U upper triangular, so that U⁻ᵀ is lower triangular.
        self.scale_tril = torch.linalg.solve_triangular(factor.flip(0, 1), unit, upper=True).mT.contiguous()

    def spread(self, noise: Tensor) -> Tensor:
        """L ε."""
        return noise @ self.scale_tril.mT

    def variance(self) -> Tensor:
        """Squared norms of L's rows."""
        return self.scale_tril.square().sum(-1)

    def whiten(self, jacobian: Tensor) -> Tensor:
        """J L."""
        return jacobian @ self.scale_tril

    def sample(self, loc: Mapping[str, Tensor], plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """One multivariate Normal at an auxiliary site, and Deltas at the sites."""
        name = "_".join(["laplace", self.names[0].replace(".", "_")])
        law = dist.MultivariateNormal(self.join(loc), scale_tril=self.scale_tril)
        values = self.split(pyro.sample(name, law, infer={"is_auxiliary": True}))
        result = {}
        for site in self.sites:
            with ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                result[site.name] = delta_at(site, values[site.name])
        return result
