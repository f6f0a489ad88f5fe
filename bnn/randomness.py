"""The random generators that Pyro seeds: PyTorch's on the CPU and on every CUDA device, NumPy's and Python's."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def kept_randomness() -> Iterator[None]:
    """Put PyTorch's generators back afterwards, those of CUDA devices too: what was drawn inside leaves no trace."""
    # A device that nothing has run on yet has drawn nothing; asking for its state would start it.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def random_state() -> dict[str, Any]:
    """The state of all generators; tensors, tuples and numbers only."""
    kind, keys, *rest = np.random.get_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest),
        "python": random.getstate(),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Go back to a :func:`random_state`, whose tensors may lie on any device by now."""
    torch.set_rng_state(state["torch"].cpu())
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), *rest))
    random.setstate(state["python"])
    cuda, count = [one.cpu() for one in state["cuda"]], torch.cuda.device_count()
    if len(cuda) != count:
        warnings.warn(
            f"the random numbers of {len(cuda)} CUDA devices were kept, and there are {count} here: what is drawn on "
            "such a device goes on with other random numbers than it would have. All else goes on as it was.",
            RuntimeWarning,
            stacklevel=3,
        )
    for device, one in enumerate(cuda[:count]):
        torch.cuda.set_rng_state(one, device)
