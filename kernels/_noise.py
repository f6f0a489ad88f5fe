"""Standard normal numbers for the steps, from the generator that is fastest for them.

On a CPU PyTorch draws a number in 3.4 ns in single precision, which nothing at hand beats, and in 17 ns in double,
where NumPy's ziggurat on SFC64 takes 7.5 (``tests/benchmarks/noise.py``): the noise of large nets in double precision
is NumPy's, from a generator that PyTorch's seeds.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

# Coordinates from which on a generator of one's own pays.
LARGE = 1 << 16


class Noise:
    """A source of noise; part of what a run is resumed from."""

    def __init__(self) -> None:
        self._generator: np.random.Generator | None = None

    @staticmethod
    def serves(values: Tensor) -> bool:
        """Whether a tensor ``(..., dim)`` is filled faster from here than by its own ``normal_``."""
        return values.dtype == torch.float64 and values.device.type == "cpu" and values.shape[-1] >= LARGE

    def fill(self, values: Tensor) -> None:
        """Fill a contiguous tensor in double precision with independent draws from N(0, 1).

        >>> _ = torch.manual_seed(0)
        >>> values = torch.empty(1, 100_000, dtype=torch.float64)
        >>> Noise().fill(values)
        >>> bool(values.std() > 0.99)
        True
        """
        if self._generator is None:
            seed = int(torch.randint(2**63 - 1, ()))
            self._generator = np.random.Generator(np.random.SFC64(seed))
        self._generator.standard_normal(out=values.numpy())
