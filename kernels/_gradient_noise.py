"""What warm-up measures of minibatch gradients where the chains stand: their noise, and the steepest curvature."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bnn.kernels._metric import Metric
from bnn.kernels._run import Run
from bnn.sgd_as_inference import Array as Array
from bnn.sgd_as_inference import GradientNoise as GradientNoise

# Length of the differences that curvature is measured by, in standard deviations along their direction.
DIFFERENCE = 0.1

# Iterations for a longest step, those at their end that count, and the chains that are looked at.
ITERATIONS, COUNTED, CHAINS = 40, 20, 8


def pair(run: Run) -> tuple[Tensor, Tensor]:
    """Gradients of two independent minibatches where the chains that still move stand, in their coordinates."""
    moving = ~run.stopped
    first, second = (run.metric.pull_back(run.gradient(), run.metric.tensors)[moving] for _ in range(2))
    return first, second


class Steepest:
    """The direction in which each chain's potential bends most, by power iteration on fresh minibatches.

    :param run: whose chains.
    :param root: L; what is iterated is Lᵀ Ĥ L, with Ĥ the curvature of a minibatch in the chains' coordinates.
    :param temperature: T, for the length of the differences.
    :param chains: how many of the chains are looked at; None for all.
    :ivar direction: unit vectors ``(chains, dim)``.
    """

    def __init__(self, run: Run, root: Metric, temperature: float, chains: int | None = None) -> None:
        self.root, self.temperature, self._few = root, temperature, slice(chains)
        position = run.position[self._few]
        self.direction = torch.nn.functional.normalize(torch.randn_like(position), dim=-1)
        self._length = torch.full_like(position[:, :1], 1e-3)

    def times(self, run: Run, direction: Tensor) -> Tensor:
        """Lᵀ Ĥ L ``direction``, by the difference of two gradients of one minibatch."""
        inputs = [tensor[self._few] for tensor in run.stream.next(1)[0]]
        position, metric = run.position[self._few], run.metric
        move = metric.forward(self.root.forward(direction, self.root.tensors), metric.tensors) * self._length
        change = run.gradient(position + move, inputs) - run.gradient(position - move, inputs)
        change = metric.pull_back(change, metric.tensors)
        return self.root.pull_back(change, self.root.tensors) / (2.0 * self._length)

    def iterate(self, run: Run) -> tuple[Tensor, Tensor]:
        """One iteration from the direction v: vᵀ Lᵀ Ĥ L v, and the square of the length of Lᵀ Ĥ L v, ``(chains,)``."""
        product = self.times(run, self.direction)
        along, size = (product * self.direction).sum(-1), torch.linalg.vector_norm(product, dim=-1, keepdim=True)
        self.direction = torch.where(size > 0, product / size.clamp_min(1e-30), self.direction)
        self._length = DIFFERENCE * (self.temperature / size.clamp_min(1e-12)).sqrt().clamp(max=1e3)
        return along, size[:, 0].square()


def longest_step(run: Run, root: Metric, temperature: float) -> float:
    """Half the largest h at which z ← z − h L Lᵀ ∇Û(z) still is stable in mean square about where the chains stand.

    Along the steepest direction v of Lᵀ Ĥ L that is h < 2 E[vᵀ Lᵀ Ĥ L v] / E|Lᵀ Ĥ L v|²: 2/λ where all minibatches have
    the same curvature.
    """
    steepest = Steepest(run, root, temperature, CHAINS)
    found = [steepest.iterate(run) for _ in range(ITERATIONS)][-COUNTED:]
    along, squared = (torch.stack(values).double().mean(0) for values in zip(*found, strict=True))
    limit = float((along.abs() / squared).min())
    return limit if np.isfinite(limit) and limit > 0 else float("inf")
