"""Runs on a store that are cut short, and what must be the same of a run that was cut and one that was not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import torch

from bnn import Store
from bnn.kernels import MCMC


class Cut(Exception):
    """Ends a run where a test asks for it."""


def cut_after(draws: int) -> Callable[..., None]:
    """A hook that ends the run after so many draws of this process, warm-up included."""
    seen = 0

    def hook(*args: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == draws:
            raise Cut

    return hook


def cut_inside(kernel: Any, draw: int) -> Any:
    """``kernel``, which ends the run in the midst of a draw, with its work half done, as a kill may."""
    cls, seen = type(kernel), 0

    def take(self: Any, run: Any) -> Any:
        nonlocal seen
        seen += 1
        stats = cls.take(self, run)
        if seen == draw:
            raise Cut
        return stats

    kernel.__class__ = type(cls.__name__, (cls,), {"take": take})
    return kernel


def run(kernel: Any, store: Store | Path, data: tuple[Any, ...], *, seed: int = 7, **options: Any) -> MCMC:
    """A run of 12 draws after 8, of two chains, on a store."""
    pyro.set_rng_seed(seed)
    options = {"num_samples": 12, "warmup_steps": 8, "num_chains": 2, "disable_progbar": True, **options}
    mcmc = MCMC(kernel, store=store, **options)
    mcmc.run(*data)
    return mcmc


def assert_same(one: MCMC, other: MCMC) -> None:
    """Every draw, every statistic, bit for bit; and what is said of the chains at the end."""
    assert str(one._diagnostics) == str(other._diagnostics)
    for left, right in (
        (one.get_samples(group_by_chain=True), other.get_samples(group_by_chain=True)),
        (dict(one.sample_stats), dict(other.sample_stats)),
    ):
        assert left.keys() == right.keys()
        for name, value in left.items():
            assert value.dtype == right[name].dtype and torch.equal(value, right[name]), name
