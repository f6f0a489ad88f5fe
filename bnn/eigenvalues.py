"""Eigenvalues of curvature: the largest ones, and the density of all.

    largest     C v = λ v by scipy's implicitly restarted Lanczos
    density     Σ_i δ(λ − λ_i) / d ≈ mean over random probes of Gauss quadratures by Lanczos

The quadrature is that of Golub and Meurant (2010) and Ubaru, Chen and Saad (2017, SIMAX 38): without bias for
polynomials of degree 2 · steps − 1. What eigenvalues say about flatness, and what not: :mod:`bnn.sharpness`.

Cost: 10 to 100 products with the operator for a few eigenvalues, probes · steps for a density.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import LinearOperator, eigsh

from bnn.predictive_arrays import whole_number

# Up to this size a matrix is built and decomposed as a whole.
SMALL = 100


class Eigenpairs(NamedTuple):
    """Eigenvalues, largest first.

    :ivar values: ``(count,)``.
    :ivar vectors: flat unit vectors, ``(count, dim)``; ``potential.unflatten`` cuts them into sites.
    :ivar residuals: |C v − λ v| of each: λ is that close to an eigenvalue.
    """

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray


def top_eigenvalues(
    operator: LinearOperator, count: int = 1, *, by: str = "value", tolerance: float = 1e-4
) -> Eigenpairs:
    """The largest eigenvalues of a symmetric operator, by scipy's implicitly restarted Lanczos.

    :param operator: a :class:`bnn.CurvatureOperator`, or any symmetric operator of scipy's.
    :param count: how many.
    :param by: ``"value"``, or ``"magnitude"`` for the largest ``|λ|``.
    :param tolerance: relative; of a float32 model below 1e-5 may not be reached.
    :raises ValueError: for more eigenvalues than there are coordinates, or another setting.
    :raises scipy.sparse.linalg.ArpackNoConvergence: if the tolerance is not reached.

    >>> from bnn import top_eigenvalues
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> import numpy as np
    >>> top_eigenvalues(aslinearoperator(np.diag([1., -5., 3.])), 2).values
    array([3., 1.])
    """
    dim, count = operator.shape[0], whole_number("count", count, 1)
    if by not in ("value", "magnitude"):
        raise ValueError(f"by is {by!r}; give 'value' or 'magnitude'.")
    if count > dim:
        raise ValueError(f"count is {count}, but the operator has {dim} coordinates.")
    if not tolerance > 0.0:
        raise ValueError(f"tolerance is {tolerance!r}; give a positive number.")
    if dim <= SMALL or count >= dim - 1:
        matrix = operator @ np.eye(dim)
        values, vectors = np.linalg.eigh(0.5 * (matrix + matrix.T))
    else:
        start = torch.randn(dim, dtype=torch.float64).numpy()
        values, vectors = eigsh(
            operator,
            count,
            which="LA" if by == "value" else "LM",
            v0=start,
            tol=tolerance,
            ncv=min(dim, 2 * count + 20),
        )
    order = np.argsort(-(values if by == "value" else np.abs(values)))[:count]
    values, vectors = values[order], vectors[:, order]
    residuals = np.linalg.norm(operator @ vectors - values * vectors, axis=0)
    return Eigenpairs(values, vectors.T, residuals)


@dataclass(frozen=True)
class SpectralDensity:
    """A density of eigenvalues as point masses, one row per probe; each row sums to one.

    :ivar nodes: where they stand, ``(probes, steps)``.
    :ivar weights: their masses, ``(probes, steps)``; those of a probe that needed fewer steps end in zeros.
    :ivar dim: number of eigenvalues.
    """

    nodes: np.ndarray
    weights: np.ndarray
    dim: int

    def moment(self, power: int) -> tuple[float, float]:
        """The mean of λ^power over all eigenvalues, and its standard error; no bias for powers up to 2 · steps − 1.

        Times ``dim`` this is the trace for 1, and the squared Frobenius norm for 2.
        """
        each = (self.weights * self.nodes**power).sum(1)
        error = each.std(ddof=1) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        return float(each.mean()), float(error)

    def density(self, grid: Any, width: float | None = None) -> np.ndarray:
        """The density on a grid of eigenvalues, each mass smoothed to a Gaussian.

        :param grid: eigenvalues at which it is wanted.
        :param width: standard deviation of the Gaussians, by default a hundredth of the span of the nodes.
        :raises ValueError: for a width that is not positive.
        """
        if width is None:
            width = 0.01 * float(np.ptp(self.nodes[self.weights > 0.0])) or 1.0
        if not width > 0.0:
            raise ValueError(f"width is {width!r}; give a positive number.")
        distance = (np.asarray(grid, dtype=float)[:, None, None] - self.nodes) / width
        kernel = np.exp(-0.5 * distance**2) / (width * math.sqrt(2.0 * math.pi))
        return np.asarray((kernel * self.weights).sum(-1).mean(-1))


def spectral_density(operator: LinearOperator, *, probes: int = 8, steps: int = 40) -> SpectralDensity:
    """The density of all eigenvalues, by stochastic Lanczos quadrature with full reorthogonalisation.

    :param operator: a :class:`bnn.CurvatureOperator`, or any symmetric operator of scipy's.
    :param probes: number of random vectors of signs; errors fall as one over its root, and over that of the dimension.
    :param steps: of Lanczos; more resolve the edges of the spectrum better.
    :raises ValueError: for numbers that are not whole and positive.

    >>> from bnn import spectral_density
    >>> from scipy.sparse.linalg import aslinearoperator
    >>> import numpy as np
    >>> found = spectral_density(aslinearoperator(np.diag([1., 2., 3., 4.])))
    >>> [round(found.moment(power)[0], 6) for power in (1, 2)]  # means of λ and λ²
    [2.5, 7.5]
    """
    dim, probes = operator.shape[0], whole_number("probes", probes, 1)
    steps = min(whole_number("steps", steps, 1), dim)
    start = torch.randint(2, (dim, probes)).numpy() * 2.0 - 1.0
    nodes, weights = np.zeros((2, probes, steps))
    for probe, (diagonal, off) in enumerate(_lanczos(operator, start / math.sqrt(dim), steps)):
        values, vectors = eigh_tridiagonal(diagonal, off)
        nodes[probe, : len(values)], weights[probe, : len(values)] = values, vectors[0] ** 2
    return SpectralDensity(nodes, weights, dim)


def _lanczos(operator: LinearOperator, start: np.ndarray, steps: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Diagonals of the tridiagonal matrix of each column of ``start`` ``(dim, probes)``, which have unit length."""
    basis = [start]
    alphas, betas = [], []
    for _ in range(steps):
        product = operator @ basis[-1]
        alphas.append((product * basis[-1]).sum(0))
        known = np.stack(basis)
        for _ in range(2):  # twice is enough
            product = product - np.einsum("kdp,kp->dp", known, np.einsum("kdp,dp->kp", known, product))
        betas.append(np.linalg.norm(product, axis=0))
        basis.append(product / np.maximum(betas[-1], 1e-300))
    diagonals, offs = np.stack(alphas), np.stack(betas)
    size = np.abs(diagonals).max(0) + offs.max(0)
    # Where a probe's Krylov space ends, what follows is rounding.
    ends = [int((np.append(offs[:-1, p], 0.0) <= 1e-10 * size[p]).argmax()) + 1 for p in range(start.shape[1])]
    return [(diagonals[:end, p], offs[: end - 1, p]) for p, end in enumerate(ends)]
