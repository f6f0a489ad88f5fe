"""Damped inverses of Kronecker factors, and what happens where they are singular.

    A ⊗ S + γ I  ≈  (A + π √γ I) ⊗ (S + √γ/π I),        π² = (tr A / dim A) / (tr S / dim S)

(Martens and Grosse 2015, section 6.3). A is the second moment of a layer's inputs, S that of the gradients at its
outputs, on the scale of the sum over all data; γ is what the prior and the damping add.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

# A singular factor's damping is raised tenfold, this often at most.
RAISES = 6

Found = TypeVar("Found")


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, if need be in double precision.

    In single precision LAPACK gives up on some wide matrices of low rank, as second moments of few data are, or returns
    NaN.

    :raises RuntimeError: if it does so in double precision, too.
    """
    for dtype in (matrix.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(matrix.to(dtype))
        except torch.linalg.LinAlgError:
            continue
        if torch.isfinite(vectors.sum()):
            return values.to(matrix.dtype), vectors.to(matrix.dtype)
    raise RuntimeError(
        f"a second moment of shape {tuple(matrix.shape)} has no eigenvectors, in double precision either: look for "
        "NaN and very large numbers in the data, and lower the learning rate."
    )


def damped(inputs: Tensor, outputs: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """A + π √γ I and S + √γ/π I."""
    means = [float(moment.diagonal().mean().clamp_min(1e-30)) for moment in (inputs, outputs)]
    ratio, root = min(max((means[0] / means[1]) ** 0.5, 1e-6), 1e6), damping**0.5
    results = []
    for moment, size in ((inputs, ratio * root), (outputs, root / ratio)):
        result = moment.clone()
        result.diagonal().add_(size)
        results.append(result)
    return results[0], results[1]


def factor_of(matrix: Tensor) -> Tensor | None:
    """The Cholesky factor of a positive definite matrix; None if it is singular to working precision."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed) or not bool(torch.isfinite(factor.diagonal()).all()):
        return None
    smallest, largest = float(factor.diagonal().min()) ** 2, float(matrix.diagonal().max())
    return factor if smallest > 10 * torch.finfo(matrix.dtype).eps * largest else None


def inverses(inputs: Tensor, outputs: Tensor, damping: float) -> tuple[Tensor, Tensor] | None:
    """(A + π √γ I)⁻¹ and (S + √γ/π I)⁻¹; None if one of them is singular."""
    results = []
    for matrix in damped(inputs, outputs, damping):
        factor = factor_of(matrix)
        if factor is None:
            return None
        results.append(torch.cholesky_inverse(factor))
    return results[0], results[1]


def precision_of(squares: Tensor, damping: float) -> Tensor | None:
    """A diagonal plus γ; None if it is singular."""
    result = squares + damping
    singular = float(result.min()) <= 10 * torch.finfo(result.dtype).eps * float(result.max())
    return None if singular else result


class Damping:
    """Finds the smallest damping, from the one that is asked for upwards, under which nothing is singular.

    :ivar raised: names of the sites that needed more than was asked for; a warning is given once.
    """

    def __init__(self) -> None:
        self.raised: set[str] = set()

    def __call__(
        self, names: Sequence[str], damping: float, unit: float, attempt: Callable[[float], Found | None]
    ) -> Found:
        """The result of the first attempt that is not None.

        :param names: the sites, for messages.
        :param damping: γ as it is asked for.
        :param unit: the mean of the curvature to be damped.
        :param attempt: what is done with γ.
        :raises RuntimeError: if all attempts give None.
        """
        found = attempt(damping)
        if found is not None:
            return found
        start = max(damping, 1e-6 * unit)
        for power in range(RAISES + 1):
            size = start * 10.0**power
            if size == damping:
                continue
            found = attempt(size)
            if found is not None:
                self._warn(names, damping, size)
                return found
        raise RuntimeError(
            f"the curvature at sites {list(names)} is singular, even with a damping of {start * 10.0**RAISES:.3g} in "
            f"place of {damping:.3g}: their scale or the data's is wrong, or the prior is flat where the data say "
            "nothing. Give extrinsic_damping=, a positive number, or a prior with a scale."
        )

    def _warn(self, names: Sequence[str], damping: float, size: float) -> None:
        if not self.raised:
            warnings.warn(
                f"the curvature at sites {list(names)} is singular with a damping of {damping:.3g}: {size:.3g} is "
                "used. Give extrinsic_damping= to choose it yourself.",
                RuntimeWarning,
                stacklevel=6,
            )
        self.raised.update(names)
