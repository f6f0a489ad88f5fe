"""The block-tridiagonal inverse of K-FAC (Martens and Grosse 2015, "Optimizing neural networks with Kronecker-factored
approximate curvature", ICML, arXiv 1503.05671, section 4.3), for a chain of layers.

F̃ holds the Kronecker blocks F̃_ij = A_ij ⊗ S_ij of all pairs of layers: A_ij is the moment of their inputs, S_ij that of
the gradients at their outputs. F̂ agrees with F̃ on the diagonal and beside it, and its inverse is zero elsewhere:

    F̂⁻¹ = Ξᵀ Λ Ξ,      Ξ = I with −Ψ_i beside the diagonal,      Λ = diag(Σ_1⁻¹, …, Σ_{l−1}⁻¹, F̃_ll⁻¹),
    Ψ_i = F̃_{i,i+1} F̃_{i+1,i+1}⁻¹ = (A_{i,i+1} A_{i+1,i+1}⁻¹) ⊗ (S_{i,i+1} S_{i+1,i+1}⁻¹),
    Σ_i = F̃_ii − Ψ_i F̃_{i+1,i+1} Ψ_iᵀ = A_ii ⊗ S_ii − C_i ⊗ D_i.

With A = L Lᵀ and L⁻¹ C L⁻ᵀ = E diag(s) Eᵀ, likewise for S and D, and K = L⁻ᵀ E,

    Σ⁻¹ = (K_A ⊗ K_S) diag(1 − s_A s_S)⁻¹ (K_A ⊗ K_S)ᵀ        (their appendix B).

Diagonal blocks are damped as in :mod:`bnn.guides._kronecker`. The cost of a step is that of ten dense products per
layer; of an update, two eigendecompositions per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.guides._kronecker import damped, factor_of


@dataclass
class Moments:
    """Moments of the inputs, or of the output gradients, of a chain of layers.

    :ivar own: one square matrix per layer.
    :ivar cross: between each layer and its successor, (own dimension, the successor's).
    """

    own: list[Tensor]
    cross: list[Tensor]


@dataclass
class _Regression:
    """A layer given its successor: Ψ and Σ⁻¹."""

    inputs: Tensor
    outputs: Tensor
    of_inputs: Tensor
    of_outputs: Tensor
    scale: Tensor


class BlockTridiagonal:
    """F̂⁻¹ of one chain.

    :param regressions: of every layer but the last on its successor.
    :param last: inverses of the last layer's factors.
    """

    def __init__(self, regressions: Sequence[_Regression], last: tuple[Tensor, Tensor]) -> None:
        self._regressions, self._last = list(regressions), last

    @staticmethod
    def of(inputs: Moments, outputs: Moments, dampings: Sequence[float]) -> BlockTridiagonal | None:
        """From the moments and a damping γ per layer; None if it is singular."""
        pairs = [damped(a, s, g) for a, s, g in zip(inputs.own, outputs.own, dampings, strict=True)]
        factors: list[tuple[Tensor, Tensor]] = []
        for a, s in pairs:
            factor_a, factor_s = factor_of(a), factor_of(s)
            if factor_a is None or factor_s is None:
                return None
            factors.append((factor_a, factor_s))
        regressions = []
        for i, (cross_a, cross_s) in enumerate(zip(inputs.cross, outputs.cross, strict=True)):
            psi_a, k_a, s_a = _conditional(factors[i][0], factors[i + 1][0], cross_a)
            psi_s, k_s, s_s = _conditional(factors[i][1], factors[i + 1][1], cross_s)
            rest = 1.0 - s_s[:, None] * s_a
            if not float(rest.min()) > 10 * torch.finfo(rest.dtype).eps:
                return None
            regressions.append(_Regression(psi_a, psi_s, k_a, k_s, 1.0 / rest))
        last = (torch.cholesky_inverse(factors[-1][0]), torch.cholesky_inverse(factors[-1][1]))
        return BlockTridiagonal(regressions, last)

    def state(self) -> dict[str, Any]:
        """Its tensors, for a checkpoint."""
        own = [(r.inputs, r.outputs, r.of_inputs, r.of_outputs, r.scale) for r in self._regressions]
        return {"regressions": own, "last": self._last}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> BlockTridiagonal:
        """The inverse whose :meth:`state` this is."""
        return BlockTridiagonal([_Regression(*tensors) for tensors in state["regressions"]], tuple(state["last"]))

    def __call__(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """F̂⁻¹ times the matrices (outputs, inputs) of all layers."""
        parts = []
        for regression, gradient, successor in zip(self._regressions, gradients, gradients[1:], strict=False):
            r = regression
            inner = gradient - r.outputs @ successor @ r.inputs.mT
            parts.append(r.of_outputs @ ((r.of_outputs.mT @ inner @ r.of_inputs) * r.scale) @ r.of_inputs.mT)
        parts.append(self._last[1] @ gradients[-1] @ self._last[0])
        results = parts[:1]
        for regression, before, part in zip(self._regressions, parts, parts[1:], strict=False):
            results.append(part - regression.outputs.mT @ before @ regression.inputs)
        return results


def _conditional(own: Tensor, successor: Tensor, cross: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One factor of Ψ, K and s, from the Cholesky factors of the diagonal blocks."""
    psi = torch.cholesky_solve(cross.mT, successor).mT
    half = torch.linalg.solve_triangular(successor, cross.mT, upper=False)  # C = halfᵀ half
    inner = torch.linalg.solve_triangular(own, half.mT, upper=False)
    values, vectors = torch.linalg.eigh(inner @ inner.mT)
    return psi, torch.linalg.solve_triangular(own.mT, vectors, upper=True), values.clamp_min(0.0)
