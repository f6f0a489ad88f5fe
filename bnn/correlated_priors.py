"""Priors under which the entries of a weight array are correlated: matrix normals.

    W = scale · A E Bᵀ,    AAᵀ = row covariance,    BBᵀ = column covariance,    E_ij ~ N(0, 1)

For the filters of a convolution the columns are the positions of the filter, with the exponential kernel
exp(-distance / length_scale), and the rows all pairs of output and input channel, independent: Fortuin et al. (2022),
"Bayesian neural network priors revisited", ICLR.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.transforms import ReshapeTransform

from bnn.distributions import MatrixNormal
from bnn.independent_priors import FanIn
from bnn.net_parameters import Parameter
from bnn.prior_rules import Prior, check_positive


@functools.cache
def _exponential_factor(positions: tuple[int, ...], length_scale: float) -> Tensor:
    """Cholesky factor of exp(-distance / length_scale) between the positions of a filter."""
    axes = [torch.arange(n, dtype=torch.float64) for n in positions]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(positions))
    return torch.linalg.cholesky((-torch.cdist(points, points) / length_scale).exp())


@dataclass(frozen=True, eq=False)
class Correlated(Prior):
    """A matrix normal prior: neighbouring entries of a convolution's filters, or rows and columns as you say.

    Without covariances, filters of a convolution are smooth over ``length_scale`` positions, with the variances of
    ``FanIn(scale)``; other arrays have no neighbours and get ``FanIn(scale)`` itself. With covariances, an array of
    shape ``(n_0, n_1, ...)`` is a matrix of n_0 rows and n_1 · n_2 · ... columns, and the covariance that is left out
    is the identity.

    :param scale: multiplies all standard deviations.
    :param length_scale: distance, in positions of the filter, over which the correlation falls by e.
    :param row_covariance: ``(rows, rows)``, symmetric and positive definite.
    :param column_covariance: ``(columns, columns)``, the same.
    :raises ValueError: unless the numbers are positive and the covariances symmetric and positive definite.

    >>> import bnn, torch
    >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.Flatten())
    >>> model = bnn.bayesian(net, prior=bnn.priors.Correlated(length_scale=2.0), likelihood=bnn.likelihoods.Gaussian())
    >>> model.law("0.weight").sample().shape
    torch.Size([1, 1, 3, 3])
    """

    scale: float = 1.0
    length_scale: float = 1.0
    row_covariance: Tensor | None = field(default=None, repr=False)
    column_covariance: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_positive(self, "scale", "length_scale")
        for name in ("row_covariance", "column_covariance"):
            covariance = getattr(self, name)
            object.__setattr__(self, f"_{name}_factor", None if covariance is None else _factor(name, covariance))

    def check(self, parameter: Parameter) -> None:
        """:raises ValueError: besides, if a covariance has another size than the parameter's rows or columns."""
        super().check(parameter)
        for name, size in zip(("row_covariance", "column_covariance"), self._sides(parameter), strict=True):
            covariance = getattr(self, name)
            if covariance is not None and (parameter.value.dim() < 2 or len(covariance) != size):
                raise ValueError(
                    f"Correlated: {name} has shape {tuple(covariance.shape)}, but parameter {parameter.name!r} of "
                    f"shape {tuple(parameter.shape)} "
                    + (f"wants ({size}, {size})." if parameter.value.dim() > 1 else "is no matrix.")
                    + " Give it to the parameters that it fits, {'pattern': Correlated(...), '*': FanIn()}."
                )

    @property
    def _given(self) -> bool:
        return self.row_covariance is not None or self.column_covariance is not None

    def _sides(self, parameter: Parameter) -> tuple[int, int]:
        """Rows and columns of the array as a matrix."""
        shape, leading = parameter.shape, 1 if self._given else 2
        return shape[:leading].numel(), shape[leading:].numel()

    def law(self, parameter: Parameter) -> Any:
        """The matrix normal, in the parameter's shape."""
        if not (self._given or parameter.is_convolution):
            return FanIn(self.scale).law(parameter)
        rows, columns = self._sides(parameter)
        value = parameter.value

        def factor(side: str, size: int) -> Tensor:
            given = getattr(self, f"_{side}_covariance_factor")
            return torch.eye(size, dtype=value.dtype, device=value.device) if given is None else given.to(value)

        row_factor, column_factor = factor("row", rows), factor("column", columns)
        if self._given:
            row_factor = self.scale * row_factor
        else:
            column_factor = _exponential_factor(tuple(parameter.shape[2:]), self.length_scale).to(value)
            row_factor = self.scale / math.sqrt(parameter.fan_in or 1.0) * row_factor
        law = MatrixNormal(value.new_zeros(rows, columns), row_factor, column_factor)
        if value.dim() == 2:
            return law
        return dist.TransformedDistribution(law, ReshapeTransform(torch.Size((rows, columns)), parameter.shape))


def _factor(name: str, covariance: Any) -> Tensor:
    square = isinstance(covariance, Tensor) and covariance.dim() == 2 and covariance.shape[0] == covariance.shape[1]
    if not square:
        shown = tuple(covariance.shape) if isinstance(covariance, Tensor) else type(covariance).__name__
        raise ValueError(f"Correlated: {name} is {shown}; give a square matrix, a tensor (n, n).")
    covariance = covariance.double()
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if failed or not torch.allclose(covariance, covariance.mT) or not torch.isfinite(factor).all():
        raise ValueError(f"Correlated: {name} is not symmetric and positive definite, and so is no covariance.")
    return factor
