"""Gaussian with independent entries in a Kronecker eigenbasis (noisy EK-FAC; Bae, Zhang and Grosse 2018).

    W = M + Q_S (s ∘ E) Q_Aᵀ,   E_ij ~ N(0, 1),

Q_S and Q_A are the eigenvectors of the running second moments S of the output gradients and A of the inputs of the
layer (George et al. 2018). In that basis every entry has its own precision 1/s², trained by the natural gradient

    1/s² ← (1−ρ) / s² + ρ (E_q[Σ_n (Q_Sᵀ G_n Q_A)²] / λ + D'),        D' = the prior's precision in the basis,

and the mean by M ← M + α Q_S (s² ∘ Q_Sᵀ (∇_M L / λ) Q_A) Q_Aᵀ. For linear regression with any output noise the basis
diagonalises the posterior's precision S ⊗ A + I/η, and the fixed point is the exact posterior. When the basis turns,
precisions go to the diagonal of the turned precision.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bnn.distributions import EigenNormal
from bnn.guides._base import NaturalGuide
from bnn.guides._blocks import Curvature, Factors, LatentSite, Params
from bnn.guides._kronecker import eigh
from bnn.guides.matrix_normal import Layout


class EigenBlock(Layout):
    """A Gaussian in an eigenbasis over one weight and its bias."""

    family = "eigen"
    parameters = {"loc": "loc", "eigen_scale": "scale"}
    buffers = ("row_basis", "col_basis", "row_moment", "col_moment")

    def init(self, values: Mapping[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Any]]:
        """Location, scales, bases that turn nothing, and empty second moments."""
        loc = self.join(values).contiguous()
        spread = self.join({s.name: torch.full_like(values[s.name], scale * s.scale) for s in self.sites})
        kind: dict[str, Any] = {"dtype": loc.dtype, "device": loc.device}
        return {
            "loc": (loc, constraints.independent(constraints.real, 2)),
            "eigen_scale": (spread.contiguous(), constraints.independent(constraints.positive, 2)),
            "row_basis": (torch.eye(self.rows, **kind), None),
            "col_basis": (torch.eye(self.cols, **kind), None),
            "row_moment": (torch.zeros(self.rows, self.rows, **kind), None),
            "col_moment": (torch.zeros(self.cols, self.cols, **kind), None),
        }

    def factors(self, params: Params, noise: Tensor, names: Sequence[str]) -> Factors:
        """R = Q_S, σ = s, C = Q_A."""
        return Factors(params["row_basis"], params["eigen_scale"], params["col_basis"], noise)

    def spread(self, params: Params, noise: Tensor) -> Tensor:
        """Q_S (s ∘ ε) Q_Aᵀ."""
        return params["row_basis"] @ (params["eigen_scale"] * noise) @ params["col_basis"].mT

    def whiten(self, params: Params, gradient: Tensor) -> Tensor:
        """S ∘ (Q_Sᵀ g Q_A)."""
        return params["eigen_scale"] * (params["row_basis"].mT @ gradient @ params["col_basis"])

    def log_det(self, params: Params) -> Tensor:
        """Σ log s."""
        return params["eigen_scale"].log().sum()

    def variance(self, params: Params) -> Tensor:
        """(Q_S ∘ Q_S) s² (Q_A ∘ Q_A)ᵀ."""
        rows, cols = params["row_basis"].square(), params["col_basis"].square()
        return rows @ params["eigen_scale"].square() @ cols.mT

    def targets(self, params: Params, curvature: Curvature) -> dict[str, Tensor]:
        """Precisions asked for, relative to the present ones; and the second moments of inputs and output gradients."""
        rows, cols = params["row_basis"], params["col_basis"]
        precision = rows.square().mT @ self.join(curvature.precisions(self.sites)) @ cols.square()
        gradients = self.gradients_per_datum(curvature)
        moments = {}
        if gradients is not None:
            inputs, outputs = gradients.second_moments()
            moments = {"row_moment": outputs, "col_moment": inputs}
            precision = precision + curvature.weight * gradients.transformed(cols, rows).squares()
        return {"eigen_scale": precision * params["eigen_scale"].square(), **moments}

    def reparametrized_targets(self, noise: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """1 − (g̃ + ε) ε."""
        return {"eigen_scale": 1.0 - (plain + noise) * noise}

    def damped(self, params: Params, whitened: Tensor, damping: float) -> Tensor:
        """The covariance is diagonal in this basis."""
        return whitened / (1.0 + damping * params["eigen_scale"].square())

    def scale_gradients(self, params: Params, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """D log s = −½ ρ (target − 1)."""
        return {"eigen_scale": 0.5 * (targets["eigen_scale"] - 1.0)}

    def refresh(self, params: Params, leaves: Mapping[str, Tensor], rate: float, targets: Mapping[str, Tensor]) -> None:
        """Take new second moments in, and turn to their eigenvectors; in place."""
        if "row_moment" not in targets:
            return
        turned = {}
        for side in ("row", "col"):
            moment = params[f"{side}_moment"]
            fresh = targets[f"{side}_moment"]
            first = not bool(moment.any())
            moment.copy_(fresh if first else torch.lerp(moment, fresh, rate))
            basis = eigh(moment)[1]
            turned[side] = (basis.mT @ params[f"{side}_basis"]).square()
            params[f"{side}_basis"].copy_(basis)
        precision = turned["row"] @ params["eigen_scale"].detach() ** -2 @ turned["col"].mT
        leaves["eigen_scale"].copy_(-0.5 * precision.log())

    def sample(self, params: Params, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """The law itself for a weight alone; through an auxiliary site where a bias shares it."""
        loc, scale, rows, cols = (params[name] for name in ("loc", "eigen_scale", "row_basis", "col_basis"))
        if self.transposed and not self.has_bias:
            loc, scale, rows, cols = loc.mT, scale.mT, cols, rows
        law: Any = EigenNormal(loc, rows, cols, scale)
        weight = self.sites[0]
        if not self.has_bias:
            if len(weight.shape) != 2:
                reshape = dist.transforms.ReshapeTransform(law.event_shape, weight.shape)
                law = dist.TransformedDistribution(law, [reshape])
            return {weight.name: pyro.sample(weight.name, law)}
        joint = pyro.sample("+".join(self.names), law, infer={"is_auxiliary": True})
        result = {}
        for site in self.sites:
            value = self.split(joint)[site.name]
            event_dim = len(site.shape)
            result[site.name] = pyro.sample(site.name, dist.Delta(value, event_dim=event_dim))
        return result


class AutoEigenNormal(NaturalGuide):
    """A Gaussian in a Kronecker eigenbasis for every weight matrix and its bias; factorized for all other sites.

    For as many parameters as a factorized Gaussian has, it knows the correlations that a layer's inputs and outputs
    impose. Parameters: ``locs`` and ``eigen_scales`` by the weight's name, ``loc`` and ``scale`` for the factorized
    rest; the bases are buffers, refreshed by :class:`~bnn.guides.TraceNaturalGradient_ELBO` every ``inverses_every``
    steps.

    :param model: a Pyro model.
    :param family: as for :class:`~bnn.guides.AutoMatrixNormal`.
    :param init_loc_fn: as for :class:`~bnn.guides.AutoFactorizedNormal`.
    :param init_scale: start of the standard deviations, relative to those of Normal priors.
    :param create_plates: as for Pyro's guides.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from bnn.guides import AutoEigenNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
    >>> def model(x, y):
    ...     weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.).to_event(2))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("obs", dist.Normal(x @ weight.T, 0.1).to_event(1), obs=y)
    >>> guide = AutoEigenNormal(model)
    >>> svi = SVI(model, guide, NaturalGradientDescent(), TraceNaturalGradient_ELBO())
    >>> x = torch.randn(100, 3)
    >>> losses = [svi.step(x, x[:, :2]) for _ in range(1000)]
    >>> guide.median()["weight"].round(decimals=1).abs()
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """

    def default_family(self, site: LatentSite) -> str:
        """An eigenbasis where there is a matrix."""
        return "eigen" if self.is_matrix(site) else "factorized"
