"""Matrix-variate Gaussian: a layer's weight matrix with one covariance among its outputs and one among its inputs.

    W = M + U E Vᵀ,   E_ij ~ N(0, 1),        Cov(W_ij, W_kl) = (U Uᵀ)_ik (V Vᵀ)_jl,

with lower triangular U (outputs) and V (inputs). A bias that is added to the same products is the matrix's first column
(homogeneous coordinate). With G_n the gradient of datum n's log-likelihood, G̃_n = Uᵀ G_n V, prior precisions D, and
⟨A⟩ for E_q[Σ_n A] / λ, the exact natural gradient of the family is

    M ← M + α U g̃ Vᵀ,              g̃ = Uᵀ (∇_M L / λ) V,
    (V Vᵀ)⁻¹ ← V⁻ᵀ [(1−ρ) I + ρ R_V] V⁻¹,      R_V = (⟨G̃ᵀG̃⟩ + Vᵀ diag_j(Σ_i (UUᵀ)_ii D_ij) V) / rows,
    (U Uᵀ)⁻¹ ← U⁻ᵀ [(1−ρ) I + ρ R_U / c] U⁻¹,  R_U = (⟨G̃G̃ᵀ⟩ + Uᵀ diag_i(Σ_j D_ij (VVᵀ)_jj) U) / cols,

with c = tr R_V / cols.

The common scale of the two precisions is free; dividing by c leaves it to the inputs' factor. For a layer these need
only its inputs and output gradients. Zhang et al. (2018) use other, damped factors (``damping="factored"``), whose
fixed point is not the family's optimum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from bnn.distributions import MatrixNormal
from bnn.guides._base import NaturalGuide
from bnn.guides._blocks import Block, Curvature, Factors, LatentSite, Params
from bnn.guides._triangular import lower_times_lower, squared_norms, times_lower, times_upper, weighted_gram
from bnn.per_datum import PerDatum, Place, per_datum
from bnn.recording import untraced


class Layout(Block):
    """A weight, and perhaps its bias, as one matrix (outputs, [1 +] inputs).

    :param sites: the weight and, if any, the bias.
    :param rows: number of outputs.
    :param transposed: whether the weight's first dimension is the inputs'.
    """

    def __init__(self, sites: Sequence[LatentSite], rows: int, transposed: bool = False) -> None:
        super().__init__(sites)
        self.rows, self.transposed, self.has_bias = rows, transposed, len(sites) > 1
        self.cols = self.numel // rows

    def join(self, values: Mapping[str, Tensor]) -> Tensor:
        """The matrix, the bias in its first column."""
        weight = values[self.sites[0].name]
        weight = weight.reshape(-1, self.rows).T if self.transposed else weight.reshape(self.rows, -1)
        if not self.has_bias:
            return weight
        return torch.cat([values[self.sites[1].name].reshape(-1, 1), weight], 1)

    def split(self, value: Tensor) -> dict[str, Tensor]:
        """Values of weight and bias, laid out as the recorded model expects; ``value`` may have leading dimensions."""
        lead = value.shape[:-2]
        weight = value[..., 1:] if self.has_bias else value
        weight = weight.mT if self.transposed else weight
        result = {self.sites[0].name: weight.reshape(lead + self.sites[0].shape).contiguous()}
        if self.has_bias:
            result[self.sites[1].name] = value[..., 0].reshape(lead + self.sites[1].shape).contiguous()
        return result

    def places(self) -> dict[str, Place]:
        """Where each site's entries stand in the matrix."""
        with untraced():
            numbers = torch.arange(self.rows * self.cols).reshape(self.rows, self.cols)
            return {
                name: Place((value // self.cols).reshape(-1), (value % self.cols).reshape(-1))
                for name, value in self.split(numbers).items()
            }

    def matrix_of(self, names: Sequence[str]) -> tuple[dict[str, Place], tuple[int, int]]:
        """The block's own matrix."""
        return self.places(), (self.rows, self.cols)

    def gradients_per_datum(self, curvature: Curvature) -> PerDatum | None:
        """Those of all probes together; with the universal estimate, of the whole likelihood as one datum."""
        pieces: list[tuple[Tensor, Tensor]] = []
        for grads, universal in zip(curvature.grads, curvature.universal, strict=True):
            if grads and all(name in curvature.uses for name in self.names):
                uses = {id(use): (use, data) for name in self.names for use, data in curvature.uses[name]}
                shape = (self.rows, self.cols)
                found = per_datum(list(uses.values()), self.places(), shape, curvature.env, grads)
                assert found is not None, f"the uses of {self.names} mix rows and columns"
                pieces.extend(found.pieces)
            elif all(name in universal for name in self.names):
                gradient = self.join(universal)
                pieces.append(
                    (gradient[None], torch.eye(self.rows, dtype=gradient.dtype, device=gradient.device)[None])
                )
        return PerDatum(pieces) if pieces else None


class MatrixBlock(Layout):
    """A matrix normal over one weight and its bias."""

    family = "matrix"
    parameters = {"loc": "loc", "row_scale_tril": "tril", "col_scale_tril": "tril"}

    def init(self, values: Mapping[str, Tensor], scale: float) -> dict[str, tuple[Tensor, Any]]:
        """Location and two multiples of the unit matrix."""
        loc = self.join(values)
        spread = self.join({s.name: torch.full_like(values[s.name], scale * s.scale) for s in self.sites})
        kind: dict[str, Any] = {"dtype": loc.dtype, "device": loc.device}
        return {
            "loc": (loc.contiguous(), constraints.independent(constraints.real, 2)),
            "row_scale_tril": (torch.eye(self.rows, **kind), constraints.lower_cholesky),
            "col_scale_tril": (spread.mean(0).diag(), constraints.lower_cholesky),
        }

    def factors(self, params: Params, noise: Tensor, names: Sequence[str]) -> Factors:
        """R = U, C = V."""
        covariance = params.get("col_covariance")
        return Factors(params["row_scale_tril"], None, params["col_scale_tril"], noise, True, covariance)

    def spread(self, params: Params, noise: Tensor) -> Tensor:
        """U ε Vᵀ."""
        if noise.dim() > 2:
            return params["row_scale_tril"] @ noise @ params["col_scale_tril"].mT
        return times_upper(times_upper(noise, params["col_scale_tril"]).mT, params["row_scale_tril"]).mT

    def whiten(self, params: Params, gradient: Tensor) -> Tensor:
        """Uᵀ g V."""
        return times_lower(times_lower(gradient, params["col_scale_tril"]).mT, params["row_scale_tril"]).mT

    def log_det(self, params: Params) -> Tensor:
        """Of the linear map ε → U ε Vᵀ."""
        logs = [params[name].diagonal().log().sum() for name in ("row_scale_tril", "col_scale_tril")]
        return self.cols * logs[0] + self.rows * logs[1]

    def variance(self, params: Params) -> Tensor:
        """(UUᵀ)_ii (VVᵀ)_jj."""
        rows, cols = _variances(params)
        return rows[:, None] * cols

    def total_variances(self, params: Params) -> dict[str, Tensor]:
        """Without the matrix of all variances."""
        rows, cols = _variances(params)
        parts = [cols[1:].sum(), cols[0]] if self.has_bias else [cols.sum()]
        return {name: rows.sum() * part for name, part in zip(self.names, parts, strict=True)}

    def targets(self, params: Params, curvature: Curvature) -> dict[str, Tensor]:
        """⟨G̃G̃ᵀ⟩ and ⟨G̃ᵀG̃⟩, and the prior's precisions: one number where they are equal."""
        gradients = self.gradients_per_datum(curvature)
        precision = {"precision": self._joined_precision(curvature)}
        if gradients is None:
            return precision
        gradients = gradients.transformed(params["col_scale_tril"], params["row_scale_tril"], times_lower)
        grams = {"row_gram": gradients.row_gram(), "col_gram": gradients.column_gram()}
        return {**precision, **{name: curvature.weight * gram for name, gram in grams.items()}}

    def _joined_precision(self, curvature: Curvature) -> Tensor:
        parts = [curvature.precision[name] for name in self.names]
        same = all(part.dim() == 0 and part is parts[0] for part in parts)
        return parts[0] if same else self.join(curvature.precisions(self.sites))

    def finished(self, params: Params, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """R_U / c and R_V."""
        if "precision" not in means:
            return super().finished(params, means)
        rows, cols, precision = params["row_scale_tril"], params["col_scale_tril"], means["precision"]
        if precision.dim():
            by_col, by_row = squared_norms(rows) @ precision, precision @ squared_norms(cols)
        else:
            by_col = (precision * squared_norms(rows).sum()).expand(self.cols)
            by_row = (precision * squared_norms(cols).sum()).expand(self.rows)
        for_cols, for_rows = weighted_gram(cols, by_col), weighted_gram(rows, by_row)
        if "row_gram" in means:
            for_rows, for_cols = for_rows.add_(means["row_gram"]), for_cols.add_(means["col_gram"])
        common = for_cols.diagonal().mean() / self.rows
        return {"row_scale_tril": for_rows.div_(self.cols * common), "col_scale_tril": for_cols.div_(self.rows)}

    def reparametrized_targets(self, noise: Tensor, plain: Tensor) -> dict[str, Tensor]:
        """R_V and, in place of R_U / c, which a noisy c would spoil, its expansion I + R_U − c I."""
        total = plain + noise
        rows, cols = (torch.eye(n, dtype=noise.dtype, device=noise.device) for n in (self.rows, self.cols))
        for_cols = cols - 0.5 * (total.mT @ noise + noise.mT @ total) / self.rows
        for_rows = rows - 0.5 * (total @ noise.mT + noise @ total.mT) / self.cols
        common = for_cols.diagonal().mean()
        return {"row_scale_tril": for_rows + (1.0 - common) * rows, "col_scale_tril": for_cols}

    def factored_targets(self, curvature: Curvature) -> dict[str, Tensor]:
        """Second moments of inputs and output gradients (Zhang et al. 2018, Algorithm 2), and the prior's precision."""
        gradients = self.gradients_per_datum(curvature)
        prior = self._joined_precision(curvature).mean()
        if gradients is None:
            zero = [torch.zeros(n, n, dtype=prior.dtype, device=prior.device) for n in (self.rows, self.cols)]
            return {"row_moment": zero[0], "col_moment": zero[1], "prior": prior}
        inputs, outputs = gradients.second_moments()
        return {"row_moment": curvature.weight * outputs, "col_moment": inputs, "prior": prior}

    def set_factored(self, leaves: Mapping[str, Tensor], row_moment: Tensor, col_moment: Tensor, prior: Tensor) -> None:
        """Set the factors to those of (A + π √γ I) ⊗ (S + √γ/π I), γ the prior's precision; in place.

        π = √((tr A / dim A) / (tr S / dim S)). This damps more than A ⊗ S + γ I: the posterior is too narrow.
        """
        means = [moment.diagonal().mean().clamp_min(1e-30) for moment in (col_moment, row_moment)]
        pi, root = (means[0] / means[1]).sqrt().clamp(1e-6, 1e6), prior.clamp_min(1e-12).sqrt()
        for name, moment, damping in (
            ("col_scale_tril", col_moment, pi * root),
            ("row_scale_tril", row_moment, root / pi),
        ):
            unit = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
            factor = torch.linalg.cholesky((moment + damping * unit).flip(0, 1)).mT.flip(0, 1)
            scale = torch.linalg.solve_triangular(factor, unit, upper=False)
            leaves[name].copy_(scale.tril(-1) + torch.diag_embed(scale.diagonal().log()))

    def damped(self, params: Params, whitened: Tensor, damping: float) -> Tensor:
        """In the eigenbases of UᵀU and VᵀV."""
        rows, cols = params["row_scale_tril"], params["col_scale_tril"]
        (values_r, basis_r), (values_c, basis_c) = torch.linalg.eigh(rows.mT @ rows), torch.linalg.eigh(cols.mT @ cols)
        inner = basis_r.mT @ whitened @ basis_c
        return basis_r @ (inner / (1.0 + damping * values_r[:, None] * values_c)) @ basis_c.mT

    def scale_gradients(self, params: Params, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """DU = −ρ U φ(R − I), in coordinates where the diagonal is a logarithm; φ halves the diagonal."""
        result = {}
        for name, target in targets.items():
            half = target.tril(-1)
            half.diagonal().copy_(0.5 * (target.diagonal() - 1.0))
            change = lower_times_lower(params[name], half)
            change.diagonal().div_(params[name].diagonal())
            result[name] = change
        return result

    def sample(self, params: Params, plates: Mapping[str, Any]) -> dict[str, Tensor]:
        """A multivariate Normal for the bias, and a matrix normal for the weight given the bias."""
        loc, rows, cols = params["loc"], params["row_scale_tril"], params["col_scale_tril"]
        weight, result = self.sites[0], {}
        if self.has_bias:
            bias = self.sites[1]
            law = dist.MultivariateNormal(loc[:, 0], scale_tril=rows * cols[0, 0])
            value = pyro.sample(bias.name, law)
            result[bias.name] = value
            loc = loc[:, 1:] + (value - loc[:, 0]).unsqueeze(-1) * (cols[1:, 0] / cols[0, 0])
            cols = cols[1:, 1:]
        law = MatrixNormal(loc.mT, cols, rows) if self.transposed else MatrixNormal(loc, rows, cols)
        if len(weight.shape) != 2:
            shape = law.event_shape
            law = dist.TransformedDistribution(law, [dist.transforms.ReshapeTransform(shape, weight.shape)])
        result[weight.name] = pyro.sample(weight.name, law)
        return result


def _variances(params: Params) -> tuple[Tensor, Tensor]:
    """Diagonals of U Uᵀ and V Vᵀ."""
    if "row_covariance" in params:
        return params["row_covariance"].diagonal(), params["col_covariance"].diagonal()
    return squared_norms(params["row_scale_tril"]), squared_norms(params["col_scale_tril"])


class AutoMatrixNormal(NaturalGuide):
    """A matrix-variate Gaussian for every weight matrix, together with its bias; factorized for all other sites.

    Weights of convolutions are matrices (channels out, channels in times kernel). Which bias belongs to which weight is
    read off the recorded model. Parameters: ``locs``, ``row_scale_trils`` and ``col_scale_trils`` by the weight's name
    (outputs by inputs, a bias in the first column), ``loc`` and ``scale`` for the factorized rest.

    :param model: a Pyro model.
    :param family: a function of a site's name and shape that gives its family, ``"matrix"``, ``"eigen"`` or
        ``"factorized"``, or None for the default: a matrix where the site has two or more dimensions.
    :param init_loc_fn: as for :class:`~bnn.guides.AutoFactorizedNormal`.
    :param init_scale: start of the standard deviations, relative to those of Normal priors.
    :param create_plates: as for Pyro's guides.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> from bnn.guides import AutoMatrixNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
    >>> def model(x, y):
    ...     weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.).to_event(2))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("obs", dist.Normal(x @ weight.T, 0.1).to_event(1), obs=y)
    >>> guide = AutoMatrixNormal(model)
    >>> svi = SVI(model, guide, NaturalGradientDescent(), TraceNaturalGradient_ELBO())
    >>> x = torch.randn(100, 3)
    >>> losses = [svi.step(x, x[:, :2]) for _ in range(1000)]
    >>> guide.median()["weight"].round(decimals=1).abs()
    tensor([[1., 0., 0.],
            [0., 1., 0.]])
    """

    def default_family(self, site: LatentSite) -> str:
        """A matrix where there is one."""
        return "matrix" if self.is_matrix(site) else "factorized"
