"""Normal laws of matrices whose covariance is a Kronecker product, or diagonal in a Kronecker product of bases.

Each is an affine map of a matrix of independent standard normals, W = loc + L(E). With it everything else is known:

    log p(W) = -½‖L⁻¹(W - loc)‖² - log|det L| - ½ n log 2π,    n = rows · cols
    entropy  = log|det L| + ½ n (1 + log 2π)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import Independent, Normal, constraints, register_kl


class _Orthogonal(constraints.Constraint):
    """Square matrices with QᵀQ = I, tested on one fixed vector, QᵀQv = v: O(n²) where the whole product is O(n³)."""

    event_dim = 2

    def check(self, value: Tensor) -> Tensor:
        probe = torch.arange(1, value.shape[-1] + 1, dtype=value.dtype, device=value.device).cos().unsqueeze(-1)
        error = (value.mT @ (value @ probe) - probe).square().sum((-2, -1)).sqrt()
        return error <= math.sqrt(torch.finfo(value.dtype).eps) * probe.square().sum().sqrt()


def _solve(scale_tril: Tensor, right: Tensor) -> Tensor:
    """L⁻¹X. One factor for many X is solved as one system: torch would copy the factor for each."""
    if scale_tril.dim() > 2:
        return torch.linalg.solve_triangular(scale_tril, right, upper=False)
    columns = right.movedim(-2, 0)
    solution = torch.linalg.solve_triangular(scale_tril, columns.reshape(columns.shape[0], -1), upper=False)
    return solution.reshape(columns.shape).movedim(0, -2)


def _squared_norm(matrix: Tensor) -> Tensor:
    return matrix.square().sum((-2, -1))


class _MatrixLaw(TorchDistribution):
    """W = loc + L(E). A subclass gives L, its inverse and its determinant; ``loc`` alone is broadcast to the batch."""

    has_rsample = True
    support = constraints.independent(constraints.real, 2)
    _axes: ClassVar[dict[str, str]]
    loc: Tensor

    def __init__(self, arguments: dict[str, Tensor], validate_args: bool | None) -> None:
        batch_shape, event_shape = self._shapes(arguments)
        for name, value in arguments.items():
            setattr(self, name, value)
        self.loc = self.loc.expand(batch_shape + event_shape)
        super().__init__(batch_shape, event_shape, validate_args=validate_args)

    def _shapes(self, arguments: dict[str, Tensor]) -> tuple[torch.Size, torch.Size]:
        event_shape = arguments["loc"].shape[-2:]
        sizes = dict(zip(("rows", "cols"), event_shape, strict=False))
        wanted = {name: tuple(map(sizes.get, axes.split(", "))) for name, axes in self._axes.items()}
        try:
            if any(value.shape[-2:] != wanted[name] for name, value in arguments.items()):
                raise RuntimeError
            return torch.broadcast_shapes(*(value.shape[:-2] for value in arguments.values())), event_shape
        except RuntimeError:
            given = ", ".join(f"{name} {tuple(value.shape)}" for name, value in arguments.items())
            shapes = ", ".join(f"{name} (..., {axes})" for name, axes in self._axes.items())
            raise ValueError(
                f"{type(self).__name__} was given {given}; wanted are {shapes}, whose leading dimensions broadcast."
            ) from None

    def expand(self, batch_shape: Sequence[int], _instance: Any = None) -> Self:
        """The same law with ``loc`` broadcast to ``batch_shape``; the other arguments stay as they are."""
        new = self._get_checked_instance(type(self), _instance)
        for name in self._axes:
            setattr(new, name, getattr(self, name))
        new.loc = self.loc.expand(torch.Size(batch_shape) + self.event_shape)
        super(_MatrixLaw, new).__init__(torch.Size(batch_shape), self.event_shape, validate_args=False)
        new._validate_args = self._validate_args
        return new

    def _scale(self, noise: Tensor) -> Tensor:
        """L(E)."""
        raise NotImplementedError

    def _whiten(self, deviation: Tensor) -> Tensor:
        """L⁻¹(W - loc)."""
        raise NotImplementedError

    def _log_determinant(self) -> Tensor:
        """log|det L|, of a shape that broadcasts to the batch's."""
        raise NotImplementedError

    @property
    def mean(self) -> Tensor:
        """``loc``."""
        return self.loc

    mode = mean

    def rsample(self, sample_shape: Sequence[int] = ()) -> Tensor:
        """Draws ``(*sample_shape, *batch_shape, rows, cols)``, differentiable in every argument of the law."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return self.loc + self._scale(torch.randn(shape, dtype=self.loc.dtype, device=self.loc.device))

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``value`` ``(..., rows, cols)``."""
        if self._validate_args:
            self._validate_sample(value)
        half_log_two_pi = 0.5 * self.event_shape.numel() * math.log(2 * math.pi)
        return -0.5 * _squared_norm(self._whiten(value - self.loc)) - self._log_determinant() - half_log_two_pi

    def entropy(self) -> Tensor:
        """Differential entropy, of shape ``batch_shape``."""
        standard = 0.5 * self.event_shape.numel() * (1 + math.log(2 * math.pi))
        return (self._log_determinant() + standard).expand(self.batch_shape)


class MatrixNormal(_MatrixLaw):
    """Matrix normal law W = loc + A E Bᵀ with E_ij ~ N(0, 1) independent, A = row_scale_tril, B = col_scale_tril.

    Cov(W_ij, W_kl) = (AAᵀ)_ik (BBᵀ)_jl, hence Cov(vec W) = AAᵀ ⊗ BBᵀ for vec that stacks the rows, as
    ``torch.flatten`` does. The rows × cols entries cost two Cholesky factors, and neither a draw nor the density forms
    the product.

    Source: Dawid (1981), "Some matrix-variate distribution theory: notational considerations and a Bayesian
    application", Biometrika 68, 265-274.

    The Kullback-Leibler divergences to another matrix normal, and to ``Normal(...).to_event(2)``, are exact.

    :param loc: mean ``(..., rows, cols)``.
    :param row_scale_tril: A ``(..., rows, rows)``, lower triangular with a positive diagonal.
    :param col_scale_tril: B ``(..., cols, cols)``, the same.
    :param validate_args: check the values of the arguments and of what is scored; by default as in Pyro.

    >>> import torch
    >>> law = MatrixNormal(torch.zeros(3, 2), torch.eye(3), 2.0 * torch.eye(2))
    >>> law.variance
    tensor([[4., 4.],
            [4., 4.],
            [4., 4.]])
    >>> law.rsample((5,)).shape, law.log_prob(torch.zeros(5, 3, 2)).shape, law.mT.event_shape
    (torch.Size([5, 3, 2]), torch.Size([5]), torch.Size([2, 3]))
    >>> import pyro.distributions as dist
    >>> torch.distributions.kl_divergence(law, dist.Normal(torch.zeros(3, 2), 2.0).to_event(2))
    tensor(0.)
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "row_scale_tril": constraints.lower_cholesky,
        "col_scale_tril": constraints.lower_cholesky,
    }
    _axes = {"loc": "rows, cols", "row_scale_tril": "rows, rows", "col_scale_tril": "cols, cols"}
    row_scale_tril: Tensor
    col_scale_tril: Tensor

    def __init__(
        self, loc: Tensor, row_scale_tril: Tensor, col_scale_tril: Tensor, validate_args: bool | None = None
    ) -> None:
        arguments = {"loc": loc, "row_scale_tril": row_scale_tril, "col_scale_tril": col_scale_tril}
        super().__init__(arguments, validate_args)

    @property
    def mT(self) -> MatrixNormal:
        """The law of Wᵀ."""
        return MatrixNormal(self.loc.mT, self.col_scale_tril, self.row_scale_tril, self._validate_args)

    @property
    def row_covariance(self) -> Tensor:
        """AAᵀ ``(*batch_shape, rows, rows)``."""
        covariance = self.row_scale_tril @ self.row_scale_tril.mT
        return covariance.expand(self.batch_shape + covariance.shape[-2:])

    @property
    def column_covariance(self) -> Tensor:
        """BBᵀ ``(*batch_shape, cols, cols)``."""
        covariance = self.col_scale_tril @ self.col_scale_tril.mT
        return covariance.expand(self.batch_shape + covariance.shape[-2:])

    @property
    def variance(self) -> Tensor:
        """(AAᵀ)_ii (BBᵀ)_jj ``(*batch_shape, rows, cols)``."""
        rows = self.row_scale_tril.square().sum(-1)
        columns = self.col_scale_tril.square().sum(-1)
        return (rows.unsqueeze(-1) * columns.unsqueeze(-2)).expand(self.loc.shape)

    def _scale(self, noise: Tensor) -> Tensor:
        return self.row_scale_tril @ noise @ self.col_scale_tril.mT

    def _whiten(self, deviation: Tensor) -> Tensor:
        return _solve(self.col_scale_tril, _solve(self.row_scale_tril, deviation).mT).mT

    def _log_determinant(self) -> Tensor:
        rows, columns = self.event_shape
        log_row = self.row_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        log_column = self.col_scale_tril.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return columns * log_row + rows * log_column


class EigenNormal(_MatrixLaw):
    """Normal law W = loc + Q_r (scale ∘ E) Q_cᵀ with E_ij ~ N(0, 1) independent: diagonal in the basis Q_r ⊗ Q_c.

    Cov(vec W) = (Q_r ⊗ Q_c) diag(vec scale²) (Q_r ⊗ Q_c)ᵀ for vec that stacks the rows. A :class:`MatrixNormal` is
    the case in which scale² is the outer product of the eigenvalues of its two covariances; here each of the
    rows × cols scales is free.

    Source: George et al. (2018), "Fast approximate natural gradient descent in a Kronecker-factored eigenbasis",
    NeurIPS, for the basis; Bae, Zhang and Grosse (2018), "Eigenvalue corrected noisy natural gradient",
    arXiv:1811.12565, for the law.

    The Kullback-Leibler divergence to ``Normal(...).to_event(2)`` is exact.

    :param loc: mean ``(..., rows, cols)``.
    :param row_basis: orthogonal Q_r ``(..., rows, rows)``, whose columns are the basis.
    :param col_basis: orthogonal Q_c ``(..., cols, cols)``.
    :param scale: positive standard deviations in that basis ``(..., rows, cols)``.
    :param validate_args: check the values of the arguments and of what is scored; by default as in Pyro.

    >>> import torch
    >>> swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    >>> law = EigenNormal(torch.zeros(2, 3), swap, torch.eye(3), torch.tensor([[1.0, 1.0, 1.0], [2.0, 2.0, 3.0]]))
    >>> law.stddev
    tensor([[2., 2., 3.],
            [1., 1., 1.]])
    >>> law.rsample((5,)).shape, law.log_prob(torch.zeros(5, 2, 3)).shape
    (torch.Size([5, 2, 3]), torch.Size([5]))
    """

    arg_constraints = {
        "loc": constraints.independent(constraints.real, 2),
        "row_basis": _Orthogonal(),
        "col_basis": _Orthogonal(),
        "scale": constraints.independent(constraints.positive, 2),
    }
    _axes = {"loc": "rows, cols", "row_basis": "rows, rows", "col_basis": "cols, cols", "scale": "rows, cols"}
    row_basis: Tensor
    col_basis: Tensor
    scale: Tensor

    def __init__(
        self, loc: Tensor, row_basis: Tensor, col_basis: Tensor, scale: Tensor, validate_args: bool | None = None
    ) -> None:
        arguments = {"loc": loc, "row_basis": row_basis, "col_basis": col_basis, "scale": scale}
        super().__init__(arguments, validate_args)

    @property
    def variance(self) -> Tensor:
        """(Q_r ∘ Q_r) scale² (Q_c ∘ Q_c)ᵀ ``(*batch_shape, rows, cols)``."""
        return (self.row_basis.square() @ self.scale.square() @ self.col_basis.square().mT).expand(self.loc.shape)

    def _scale(self, noise: Tensor) -> Tensor:
        return self.row_basis @ (self.scale * noise) @ self.col_basis.mT

    def _whiten(self, deviation: Tensor) -> Tensor:
        return self.row_basis.mT @ deviation @ self.col_basis / self.scale

    def _log_determinant(self) -> Tensor:
        return self.scale.log().sum((-2, -1))


def _same_event_shape(p: torch.distributions.Distribution, q: torch.distributions.Distribution) -> None:
    if p.event_shape != q.event_shape:
        raise ValueError(
            f"The Kullback-Leibler divergence wants two laws of matrices of one shape; given were "
            f"{type(p).__name__} of {tuple(p.event_shape)} and {type(q).__name__} of {tuple(q.event_shape)}."
        )


@register_kl(MatrixNormal, MatrixNormal)
def _kl_matrix_normal(p: MatrixNormal, q: MatrixNormal) -> Tensor:
    """½(‖A_q⁻¹A_p‖² ‖B_q⁻¹B_p‖² + ‖A_q⁻¹(loc_p - loc_q)B_q⁻ᵀ‖² - n) + log|det L_q| - log|det L_p|."""
    _same_event_shape(p, q)
    rows = _squared_norm(_solve(q.row_scale_tril, p.row_scale_tril))
    columns = _squared_norm(_solve(q.col_scale_tril, p.col_scale_tril))
    quadratic = rows * columns + _squared_norm(q._whiten(p.loc - q.loc))
    return 0.5 * (quadratic - p.event_shape.numel()) + q._log_determinant() - p._log_determinant()


@register_kl(_MatrixLaw, Independent)
def _kl_independent_normal(p: _MatrixLaw, q: Independent) -> Tensor:
    """Σ_ij ½((Var W_ij + (loc_ij - m_ij)²)/s_ij² - 1) + log s_ij, less log|det L|; q = N(m, s²) in each entry."""
    if not (isinstance(q.base_dist, Normal) and q.reinterpreted_batch_ndims == 2):
        raise NotImplementedError(f"{type(p).__name__} against {q}: only Normal(...).to_event(2) has a closed form.")
    _same_event_shape(p, q)
    loc, scale = q.base_dist.loc, q.base_dist.scale
    ratio = (p.variance + (p.loc - loc).square()) / scale.square()
    return (0.5 * (ratio - 1) + scale.log()).sum((-2, -1)) - p._log_determinant()
