"""Products with lower triangular matrices, in blocks that skip their zeros: PyTorch has none on the CPU.

The first two can be recorded; the others write into the memory of their results and are for tensors without gradients.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Factors of at least this many rows are multiplied in PARTS blocks.
LARGE, PARTS = 256, 4


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    starts = [size * part // PARTS for part in range(PARTS + 1)]
    yield from zip(starts, starts[1:], strict=False)


def times_lower(x: Tensor, factor: Tensor) -> Tensor:
    """X L."""
    if len(factor) < LARGE:
        return x @ factor
    return torch.cat([x[:, low:] @ factor[low:, low:high] for low, high in _blocks(len(factor))], 1)


def times_upper(x: Tensor, factor: Tensor) -> Tensor:
    """X Lᵀ."""
    if len(factor) < LARGE:
        return x @ factor.mT
    return torch.cat([x[:, :high] @ factor[low:high, :high].mT for low, high in _blocks(len(factor))], 1)


def lower_times_lower(first: Tensor, second: Tensor) -> Tensor:
    """K L, both lower triangular."""
    if len(first) < LARGE:
        return first @ second
    result = torch.zeros_like(first)
    for low, high in _blocks(len(first)):
        for left, right in _blocks(len(first)):
            if left <= low:
                torch.mm(first[low:high, left:high], second[left:high, left:right], out=result[low:high, left:right])
    return result


def covariance_of(factor: Tensor) -> Tensor:
    """L Lᵀ."""
    if len(factor) < LARGE:
        return factor @ factor.mT
    result = torch.empty_like(factor)
    for low, high in _blocks(len(factor)):
        for left, right in _blocks(len(factor)):
            if left <= low:
                torch.mm(factor[low:high, :right], factor[left:right, :right].mT, out=result[low:high, left:right])
                result[left:right, low:high] = result[low:high, left:right].mT
    return result


def weighted_gram(factor: Tensor, weights: Tensor) -> Tensor:
    """Lᵀ diag(w) L."""
    weighted = factor * weights[:, None]
    if len(factor) < LARGE:
        return factor.mT @ weighted
    result = torch.empty_like(factor)
    for low, high in _blocks(len(factor)):
        for left, right in _blocks(len(factor)):
            if left <= low:
                torch.mm(factor[low:, low:high].mT, weighted[low:, left:right], out=result[low:high, left:right])
                result[left:right, low:high] = result[low:high, left:right].mT
    return result


def divide_lower(x: Tensor, factor: Tensor) -> None:
    """X ← X L⁻¹ for lower triangular X and L; in place."""
    if len(factor) < LARGE:
        x.copy_(torch.linalg.solve_triangular(factor, x, upper=False, left=False).tril_())
        return
    for low, high in reversed(list(_blocks(len(factor)))):
        x[high:, low:high].addmm_(x[high:, high:], factor[high:, low:high], alpha=-1)
        part = torch.linalg.solve_triangular(factor[low:high, low:high], x[low:, low:high], upper=False, left=False)
        part[: high - low].tril_()
        x[low:, low:high] = part


def squared_norms(matrix: Tensor) -> Tensor:
    """Squared lengths of the rows, without a matrix of squares."""
    return torch.linalg.vector_norm(matrix, dim=-1).square()
