"""Linear maps z = L u between the coordinates that a kernel moves in and those of the model.

A kernel of unit mass in u is the kernel of mass (L Lᵀ)⁻¹ in z: its gradients are Lᵀ∇U(z), its momenta r̃ = Lᵀr have the
law N(0, T) whatever L is, and SGLD in u is SGLD with the preconditioner P = L Lᵀ. So one map serves every kernel, and
nothing needs to be remapped when it changes but the position.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor


class Metric(ABC):
    """A map z = L u of flat positions ``(chains, dim)``.

    :ivar tensors: what a recorded program needs of it, as inputs: a map that changes needs no new recording.
    """

    tensors: tuple[Tensor, ...]

    @abstractmethod
    def forward(self, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """L u."""

    @abstractmethod
    def pull_back(self, grad: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Lᵀ ∇U: the gradient in u of a gradient in z."""

    @abstractmethod
    def inverse(self, z: Tensor) -> Tensor:
        """L⁻¹ z."""

    @abstractmethod
    def scaled(self, factor: float) -> Metric:
        """The map ``factor`` · L."""


class Identity(Metric):
    """u is z."""

    tensors = ()

    def forward(self, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """U itself."""
        del tensors
        return u

    def pull_back(self, grad: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """The gradient itself."""
        del tensors
        return grad

    def inverse(self, z: Tensor) -> Tensor:
        """Z itself."""
        return z

    def scaled(self, factor: float) -> Metric:
        """:raises NotImplementedError: it has no tensors to scale."""
        raise NotImplementedError("the identity is not scaled: start from a Scaling.")


class Scaling(Metric):
    """One scale per coordinate: L = diag(s).

    :param scale: s, ``(dim,)``, positive.
    """

    def __init__(self, scale: Tensor) -> None:
        self.tensors = (scale,)

    def forward(self, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """S u."""
        return u * tensors[0]

    def pull_back(self, grad: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """S ∇U."""
        return grad * tensors[0]

    def inverse(self, z: Tensor) -> Tensor:
        """Z / s."""
        return z / self.tensors[0]

    def scaled(self, factor: float) -> Metric:
        """Scales ``factor`` · s."""
        return Scaling(self.tensors[0] * factor)


class Triangular(Metric):
    """A dense map: L lower triangular.

    :param factor: L, ``(dim, dim)``.
    """

    def __init__(self, factor: Tensor) -> None:
        self.tensors = (factor,)

    def forward(self, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """L u."""
        return u @ tensors[0].mT

    def pull_back(self, grad: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Lᵀ ∇U."""
        return grad @ tensors[0]

    def inverse(self, z: Tensor) -> Tensor:
        """L⁻¹ z."""
        return torch.linalg.solve_triangular(self.tensors[0], z.mT, upper=False).mT

    def scaled(self, factor: float) -> Metric:
        """A factor ``factor`` · L."""
        return Triangular(self.tensors[0] * factor)
