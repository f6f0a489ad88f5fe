"""Forces between the members of an ensemble.

Repulsive ensembles (D'Angelo and Fortuin 2021, "Repulsive deep ensembles are Bayesian", eq. 9 and 13) follow

    dz_i/dt = −∇U(z_i) − ∇_{z_i} log Σ_j k(f_i, f_j),        f_j fixed,

where f = z (weight space) or the net's outputs at some inputs (function space): the second term is minus the score of
a kernel density estimate of the members' own law. Stein variational gradient descent (Liu and Wang 2016, eq. 8):

    dz_i/dt = 1/K Σ_j [ −k(z_j, z_i) ∇U(z_j) + ∇_{z_j} k(z_j, z_i) ].

A kernel k is a function of two sets of points, ``(n, d)`` and ``(m, d)``, that gives ``(n, m)`` numbers. With a
Gaussian kernel and few members in many dimensions, the members are apart, but not draws from the posterior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.models import BayesianNet

Kernel = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class GaussianKernel:
    """k(a, b) = exp(−|a − b|² / (2 h²)).

    :ivar bandwidth: h; None for h² = median² / (2 log(n + 1)) with the median distance between different points.
    """

    bandwidth: float | None = None

    def __post_init__(self) -> None:
        if self.bandwidth is not None and not self.bandwidth > 0:
            raise ValueError(f"bandwidth is {self.bandwidth}; give a positive number, or None for the median's.")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """The numbers k(a_i, b_j)."""
        squares = (a[:, None] - b[None, :]).square().sum(-1)
        if self.bandwidth is not None:
            return (-0.5 * squares / self.bandwidth**2).exp()
        apart = squares.detach()[~torch.eye(*squares.shape, dtype=torch.bool, device=squares.device)]
        if not apart.numel() or not apart.max() > 0:
            return (-0.5 * squares).exp()
        variance = apart.median().clamp_min(torch.finfo(a.dtype).tiny) / (2 * math.log(len(b) + 1))
        return (-0.5 * squares / variance).exp()


class Repulsion(ABC):
    """What :class:`~bnn.guides.TraceEnsemble_ELBO` does to the gradients of the members' energies.

    :param kernel: k; by default a Gaussian one with the median's bandwidth.
    """

    def __init__(self, kernel: Kernel | None = None) -> None:
        self.kernel = GaussianKernel() if kernel is None else kernel

    @abstractmethod
    def __call__(self, guide: Any, positions: Tensor, gradients: Tensor) -> Tensor:
        """The gradients that the optimizer gets, ``(members, dim)``."""


class WeightRepulsion(Repulsion):
    """Repulsion in the space of all unconstrained latent numbers.

    :param kernel: k; by default a Gaussian one with the median's bandwidth.
    """

    def features(self, guide: Any, positions: Tensor) -> Tensor:
        """What the kernel sees of the members, ``(members, features)``."""
        del guide
        return positions

    def __call__(self, guide: Any, positions: Tensor, gradients: Tensor) -> Tensor:
        """∇U(z_i) + ∇_{z_i} log Σ_j k(f_i, f_j)."""
        with torch.enable_grad():
            leaves = positions.detach().requires_grad_()
            features = self.features(guide, leaves)
            crowding = self.kernel(features, features.detach()).sum(1).log().sum()
            (force,) = torch.autograd.grad(crowding, leaves)
        return gradients + force


class FunctionRepulsion(WeightRepulsion):
    """Repulsion in the space of the net's outputs, for models of :func:`bnn.bayesian`.

    The energies stay those of the weights: the repulsion alone is in function space.

    :param points: inputs at which members are to differ, as the net takes them: beyond the data, for instance.
    :param kernel: k; by default a Gaussian one with the median's bandwidth.
    """

    def __init__(self, points: Tensor, kernel: Kernel | None = None) -> None:
        super().__init__(kernel)
        self.points = points

    def features(self, guide: Any, positions: Tensor) -> Tensor:
        """The net's outputs at the points.

        :raises ValueError: for a model without a net.
        """
        if not isinstance(guide.model, BayesianNet):
            raise ValueError(
                f"FunctionRepulsion needs the outputs of a net, as models of bnn.bayesian have; the model is "
                f"{type(guide.model).__name__}: use WeightRepulsion."
            )

        def outputs(position: Tensor) -> Tensor:
            return guide.model.outputs(guide.constrain(position), [self.points]).reshape(-1)

        return torch.func.vmap(outputs)(positions)


class SteinRepulsion(Repulsion):
    """Stein variational gradient descent: attraction by all members' gradients, and repulsion.

    It needs no model that broadcasts over particles, as ``pyro.infer.SVGD`` does.

    :param kernel: k; by default a Gaussian one with the median's bandwidth.
    """

    def __call__(self, guide: Any, positions: Tensor, gradients: Tensor) -> Tensor:
        """1/K Σ_j [k(z_j, z_i) ∇U(z_j) − ∇_{z_j} k(z_j, z_i)]."""
        del guide
        with torch.enable_grad():
            fixed = positions.detach()
            leaves = fixed.clone().requires_grad_()
            gram = self.kernel(leaves, fixed)
            # A joint gradient would add up over i: one row of the Gram matrix at a time, all at once.
            rows = torch.eye(len(fixed), dtype=gram.dtype, device=gram.device)
            (slopes,) = torch.autograd.grad(
                gram, leaves, rows[:, None, :].expand(-1, len(fixed), -1), is_grads_batched=True
            )
        return (gram.detach().mT @ gradients - slopes.sum(1)) / len(fixed)
