"""What the diagnostics read: the statistics of a finished run, in memory or as ArviZ keeps them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn.store import variable_of


@dataclass(frozen=True)
class SiteFacts:
    """A latent site.

    :ivar size: number of its unconstrained coordinates.
    :ivar loc: mean of its prior, NaN if that is not an iid Normal of fixed numbers.
    :ivar scale: its standard deviation, or NaN.
    """

    size: int
    loc: float = np.nan
    scale: float = np.nan


@dataclass(frozen=True)
class RunStatistics:
    """Statistics of a run.

    :ivar stats: name -> ``(chains, draws)``, or ``(chains, draws, sites)`` for those per site.
    :ivar facts: what is known of the run as a whole: sites, seconds, gradient evaluations.
    :ivar draws: draws per site, ``(chains, draws, ...)``: arrays, or what is read from a file when it is sliced.
    """

    stats: Mapping[str, np.ndarray]
    facts: Mapping[str, Any]
    draws: Mapping[str, Any]

    @property
    def sites(self) -> dict[str, SiteFacts]:
        """Name -> facts, in the order of the model; empty where they are not known."""
        columns = [np.atleast_1d(self.facts.get(f"site_{name}", [])) for name in ("name", "size", "loc", "scale")]
        return {
            str(name): SiteFacts(int(size), float(loc), float(scale))
            for name, size, loc, scale in zip(*columns, strict=True)
        }

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        return sum(site.size for site in self.sites.values())

    @property
    def whole_chains(self) -> np.ndarray:
        """Which chains count: those that did not diverge, or all if all did."""
        diverging = np.asarray(self.stats.get("diverging", np.zeros((1, 1))), dtype=bool).any(-1)
        return np.asarray(diverging if diverging.all() else ~diverging)

    def need(self, *names: str) -> list[np.ndarray]:
        """Statistics of the chains that count.

        :raises ValueError: if one of them was not measured.
        """
        missing = [name for name in names if name not in self.stats]
        if missing:
            raise ValueError(
                f"the run has no statistics {missing}: they are measured for the kernels of bnn.kernels that have them."
            )
        return [np.asarray(self.stats[name], dtype=float)[self.whole_chains] for name in names]


def statistics_of(run: Any) -> RunStatistics:
    """The statistics of a run of ``bnn.kernels.MCMC``, of what ``bnn.to_arviz`` made of one, or of a store by its path.

    :raises ValueError: for anything else.
    """
    if isinstance(run, (str, os.PathLike)):
        from bnn.stored_draws import as_arviz

        run = as_arviz(run)
    facts = getattr(run, "run_facts", None)
    if facts is not None:
        stats = {name: value.numpy() for name, value in run.sample_stats.items()}
        store = getattr(run, "store", None)
        if store is not None:
            from bnn.stored_draws import StoredGroup

            return RunStatistics(stats, facts, StoredGroup(store.path, "posterior").arrays)
        draws = {name: value.cpu().numpy() for name, value in run.get_samples(group_by_chain=True).items()}
        return RunStatistics(stats, facts, draws)
    try:
        stats, draws = run["sample_stats"], run["posterior"]
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"run is {type(run).__name__}; give a finished run of bnn.kernels.MCMC, or what bnn.to_arviz made of one, "
            "with its groups posterior and sample_stats."
        ) from None
    # A store writes site names without slashes.
    names = {variable_of(str(site)): str(site) for site in np.atleast_1d(stats.attrs.get("site_name", []))}
    return RunStatistics(
        {str(name): stats[name].values for name in stats.data_vars},
        stats.attrs,
        {names.get(str(name), str(name)): draws[name] for name in draws.data_vars},
    )


def site_facts(sites: Mapping[str, Any]) -> dict[str, Any]:
    """Names, sizes and Normal priors of a model's latent sites, as lists.

    :param sites: those of a potential.
    """
    normals = [(np.nan, np.nan) if site.normal is None else site.normal for site in sites.values()]
    return {
        "site_name": list(sites),
        "site_size": [site.slice.stop - site.slice.start for site in sites.values()],
        "site_loc": [float(loc) for loc, _ in normals],
        "site_scale": [float(scale) for _, scale in normals],
    }
