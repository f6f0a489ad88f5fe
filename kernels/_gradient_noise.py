"""What warm-up measures of minibatch gradients: the covariance V of their noise, and how long a step stays stable."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.potential import Potential

# Iterations of the power method, those at its end that count, and the chains that it looks at.
ITERATIONS, COUNTED, CHAINS = 40, 20, 8

Array = np.ndarray[Any, np.dtype[np.float64]]


class GradientNoise:
    """V, from pairs of independent minibatch gradients at one place: ½ E[(g − g')(g − g')ᵀ].

    :param dense: whether V is a matrix, in place of its diagonal.
    :ivar pairs: how many have been seen.
    """

    def __init__(self, dense: bool) -> None:
        self.dense, self.pairs = dense, 0
        self._total: Tensor | None = None

    def add(self, potential: Potential, position: Tensor) -> None:
        """One pair for each chain, where it stands."""
        first, second = (potential.energy_and_grad(position)[1] for _ in range(2))
        difference = (first - second).double()
        share = 0.5 * (difference.T @ difference if self.dense else difference.square().sum(0))
        if torch.isfinite(share).all():  # a chain that leaves the finite numbers is stopped elsewhere
            self._total = share if self._total is None else self._total + share
            self.pairs += len(position)

    @property
    def covariance(self) -> Array:
        """V as ``(dim, dim)``, or its diagonal ``(dim,)``; with :attr:`pairs` degrees of freedom."""
        if self._total is None:
            raise ValueError("the minibatch gradients are not finite where the chains start: give other starts.")
        result: Array = (self._total / self.pairs).cpu().numpy()
        return result


def inverse_covariance(noise: GradientNoise) -> Array | None:
    """V⁻¹, unbiased for Gaussian noise, as a matrix or a diagonal; None for a V that is singular or hardly known.

    Of n degrees of freedom and size d the estimate of V⁻¹ is n / (n − d − 1) times too large; a diagonal has d = 1.
    """
    covariance, freedom = noise.covariance, noise.pairs
    size = len(covariance) if noise.dense else 1
    spectrum = np.linalg.eigvalsh(covariance) if noise.dense else covariance
    if freedom < 2 * size + 2 or not spectrum.min() > 1e-12 * spectrum.max():
        return None
    inverse: Array = np.asarray(np.linalg.inv(covariance) if noise.dense else 1.0 / covariance, dtype=np.float64)
    return inverse * ((freedom - size - 1) / freedom)


def longest_step(potential: Potential, position: Tensor, preconditioner: Array | np.float64 | float) -> float:
    """Half the largest h at which z ← z − h P ∇Û(z) still is stable in mean square about ``position``.

    Along the steepest direction v that is h < 2 E[vᵀPĤv] / E[|PĤv|²], Ĥ the curvature of a minibatch, found by the
    power method on differences of gradients of one minibatch: 2/λ where all minibatches have the same curvature.

    :param preconditioner: P, a number, its diagonal, or a matrix.
    """
    position = position[:CHAINS]
    matrix = torch.as_tensor(preconditioner).to(position)
    scale = float(position.abs().max().clamp_min(1.0)) * torch.finfo(position.dtype).eps ** (1 / 3)
    stream = potential.stream(len(position))
    direction = torch.randn_like(position)
    along, squared = [], []
    for _ in range(ITERATIONS):
        direction = direction / torch.linalg.vector_norm(direction, dim=-1, keepdim=True)
        (inputs,) = stream.next(1)
        ahead, behind = (
            potential.traced_energy_and_grad(position + sign * scale * direction, inputs)[1] for sign in (1, -1)
        )
        bend = (ahead - behind) / (2.0 * scale)
        bend = bend @ matrix if matrix.dim() == 2 else bend * matrix
        along.append((direction * bend).sum(-1))
        squared.append(bend.square().sum(-1))
        direction = bend
    slope, size = (torch.stack(values[-COUNTED:]).double().mean(0) for values in (along, squared))
    limit = float((slope.abs() / size).min())
    return limit if np.isfinite(limit) and limit > 0 else float("inf")
