"""Products with lower triangular matrices, in blocks that skip their zeros: PyTorch has none on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Factors of at least this many rows are multiplied in PARTS blocks.
LARGE, PARTS = 256, 4


def _blocks(size: int) -> Iterator[tuple[int, int]]:
    parts = PARTS if size >= LARGE else 1
    starts = [size * part // parts for part in range(parts + 1)]
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


def weighted_gram(factor: Tensor, weights: Tensor) -> Tensor:
    """Lᵀ diag(w) L."""
    weighted = factor * weights[:, None]
    if len(factor) < LARGE:
        return factor.mT @ weighted
    rows = []
    for low, high in _blocks(len(factor)):  # the lower triangle; what is above follows
        part = factor[low:, low:high].mT @ weighted[low:, :high]
        rows.append(torch.nn.functional.pad(part, (0, len(factor) - high)))
    lower = torch.cat(rows).tril()
    return lower + lower.tril(-1).mT


def squared_norms(matrix: Tensor) -> Tensor:
    """Squared lengths of the rows, without a matrix of squares."""
    return torch.linalg.vector_norm(matrix, dim=-1).square()
