"""Where the draws of a group of chains go while they are made: to memory here, to a store in ``_stored_draws``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from bnn.kernels._base import StochasticGradientKernel
from bnn.structure import Site

STOPPED_IN_WARMUP = (
    "all chains left the finite numbers before their first draw: use a smaller step_size, standardise the data, or "
    "give better initial_params."
)


class Draws(ABC):
    """Takes in draws.

    :param kernel: whose draws, set up.
    :param chains: how many chains it moves.
    :param save: names of the sites that are kept; all by default.
    :raises ValueError: for a site that the model does not have.
    :ivar done: draws that were made, those of warm-up included.
    :ivar count: draws that were kept.
    :ivar moving: whether the chains are on their way to the next draw.
    :ivar interrupted: whether the user stopped the run.
    :ivar diagnostics: of each chain, when the draws are :meth:`finish`-ed.
    """

    diagnostics: list[dict[str, Any]]

    def __init__(self, kernel: StochasticGradientKernel, chains: int, save: Sequence[str] | None) -> None:
        sites = kernel.potential.sites
        unknown = sorted(set(save or ()) - set(sites))
        if unknown:
            raise ValueError(f"save_params names {unknown}; the model's latent sites are {list(sites)}.")
        self.kernel, self.chains = kernel, chains
        self.sites: list[Site] = [sites[name] for name in (save if save is not None else sites)]
        self.done = self.count = 0
        self.moving = self.interrupted = False

    @abstractmethod
    def add(self, position: Tensor) -> None:
        """Keep a draw: a flat position ``(chains, dim)``."""

    def pause(self) -> None:
        """Called between draws, of warm-up too."""
        return

    def stop(self) -> None:
        """Called when an error or an interrupt ends the run."""
        return

    def signals(self) -> AbstractContextManager[None]:
        """Around the draws: what Ctrl-C does."""
        return nullcontext()

    def finish(self) -> None:
        """Called after the last draw, before the kernel forgets the run."""
        self.diagnostics = self.kernel.chain_diagnostics()
        for entry in self.diagnostics:  # an interrupt may fall between a step and its draw
            entry["divergences"] = [draw for draw in entry["divergences"] if draw < self.count]


class DrawsInMemory(Draws):
    """Draws in one array that is allocated before the run.

    :ivar values: flat positions ``(chains, draws, numbers)``.
    :ivar places: site -> its place in them and its shape.
    :ivar stats: statistics per draw, when finished.
    """

    stats: dict[str, Tensor]

    def __init__(
        self, kernel: StochasticGradientKernel, chains: int, num_samples: int, save: Sequence[str] | None
    ) -> None:
        super().__init__(kernel, chains, save)
        self.places: dict[str, tuple[slice, torch.Size]] = {}
        offset = 0
        for site in self.sites:
            size = site.shape.numel()
            self.places[site.name] = slice(offset, offset + size), site.shape
            offset += size
        self.pieces = None if save is None else [site.slice for site in self.sites]
        potential = kernel.potential
        self.values = torch.empty(chains, num_samples, offset, dtype=potential.dtype, device=potential.device)

    def add(self, position: Tensor) -> None:
        """Keep a draw."""
        if self.pieces is not None:
            position = torch.cat([position[:, piece] for piece in self.pieces], -1)
        self.values[:, self.count] = position
        self.count += 1

    def finish(self) -> None:
        """Keep the statistics."""
        super().finish()
        self.stats = self.kernel.sample_stats()


def gathered(
    finished: Sequence[DrawsInMemory], count: int, transforms: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draws in the model's own space and statistics of all chains together, name -> ``(chains, draws, ...)``.

    :param count: draws of each chain that are kept.
    :param transforms: from the model's space to flat positions.
    """
    values = [draws.values[:, :count] for draws in finished]
    z = torch.cat(values) if len(values) > 1 else values[0]
    samples = {}
    for name, (place, shape) in finished[0].places.items():
        value = z[..., place].reshape(*z.shape[:2], *shape)
        samples[name] = transforms[name].inv(value) if name in transforms else value
    stats = [draws.stats for draws in finished]
    return samples, {name: torch.cat([s[name][:, :count] for s in stats]) for name in stats[0]}
