"""What a report reads: the groups of ArviZ data of either line, and what a few chosen numbers say of convergence.

Weights of a net are identified only up to permutations and signs of its units; the function is not touched by them.
So variables of the posterior with the attribute ``function_of`` (the net's outputs, or its probabilities) come first,
and of larger variables evenly spaced numbers are looked at. R-hat, effective sample size and Monte Carlo error are
ArviZ's: rank-normalised split R-hat, bulk and tail ESS (Vehtari et al. 2021, Bayesian Analysis).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from bnn.draw_blocks import evenly, numbers_at
from bnn.run_statistics import RunStatistics, statistics_of

# So many numbers of a function are looked at, of all sites together, and the fewest of one site.
FUNCTION_VALUES, SITE_VALUES, FEWEST_OF_SITE = 400, 800, 10

# Split R-hat needs two halves of two draws each.
FEWEST_DRAWS = 4


@dataclass(frozen=True)
class Convergence:
    """Diagnostics of some numbers of a variable, NaN where they cannot be known.

    :ivar name: of the variable.
    :ivar size: how many numbers it has.
    :ivar labels: of the numbers that were looked at.
    :ivar draws: their draws, ``(chains, draws, numbers)``.
    :ivar rhat: rank-normalised split R-hat.
    :ivar ess_bulk: bulk effective sample size.
    :ivar ess_tail: tail effective sample size.
    :ivar mcse: Monte Carlo standard error of the mean.
    """

    name: str
    size: int
    labels: list[str]
    draws: np.ndarray
    rhat: np.ndarray
    ess_bulk: np.ndarray
    ess_tail: np.ndarray
    mcse: np.ndarray

    @property
    def sd(self) -> np.ndarray:
        """Standard deviation of each number over all draws."""
        return np.asarray(self.draws.std((0, 1)))

    def worst(self, count: int) -> list[int]:
        """Places of the largest R-hat, or of the fewest effective draws where that is not known."""
        by = -self.rhat if np.isfinite(self.rhat).any() else self.ess_bulk
        order = np.argsort(np.where(np.isfinite(by), by, np.inf), kind="stable")
        return [int(place) for place in order[:count] if np.isfinite(by[place])]


@dataclass(frozen=True)
class RunData:
    """The groups of ArviZ data, as Datasets of xarray.

    :ivar source: what they were taken from; nothing here changes it.
    :ivar groups: name -> Dataset.
    """

    source: Any
    groups: Mapping[str, Any]

    @property
    def attrs(self) -> Mapping[str, Any]:
        """What is known of the posterior: library, kernel or guide, temperature."""
        return self.groups["posterior"].attrs

    @cached_property
    def statistics(self) -> RunStatistics:
        """Statistics per draw and facts of the run; empty where there are none."""
        return statistics_of(self.source) if "sample_stats" in self.groups else RunStatistics({}, {}, {})

    @property
    def is_guide(self) -> bool:
        """Whether the draws are independent ones from a guide."""
        return "guide" in self.attrs

    @property
    def is_ours(self) -> bool:
        """Whether the run is one of ``bnn.kernels`` or ``bnn.guides``."""
        return str(self.attrs.get("inference_library", "")) == "pyro-bnn"

    @property
    def chains(self) -> int:
        """Number of chains."""
        return int(self.groups["posterior"].sizes["chain"])

    @property
    def draws(self) -> int:
        """Draws per chain."""
        return int(self.groups["posterior"].sizes["draw"])

    @cached_property
    def functions(self) -> dict[str, Any]:
        """Variables that are values of the function: name -> DataArray."""
        return {name: v for name, v in self._numeric() if "function_of" in v.attrs}

    @cached_property
    def sites(self) -> dict[str, Any]:
        """The other variables of the posterior."""
        return {name: v for name, v in self._numeric() if "function_of" not in v.attrs}

    def _numeric(self) -> Iterator[tuple[str, Any]]:
        for name, variable in self.groups["posterior"].data_vars.items():
            if np.issubdtype(variable.dtype, np.number) or variable.dtype == bool:
                if variable.size and {"chain", "draw"} <= set(variable.dims):
                    yield str(name), variable

    @cached_property
    def of_functions(self) -> list[Convergence]:
        """Diagnostics of each function."""
        most = FUNCTION_VALUES // max(1, len(self.functions))
        return [self._convergence(name, variable, most) for name, variable in self.functions.items()]

    @cached_property
    def of_sites(self) -> list[Convergence]:
        """Diagnostics of each site."""
        most = max(FEWEST_OF_SITE, SITE_VALUES // max(1, len(self.sites)))
        return [self._convergence(name, variable, most) for name, variable in self.sites.items()]

    @property
    def judged(self) -> list[Convergence]:
        """Diagnostics of what the run is judged by: its functions, or all sites where there are none."""
        return self.of_functions or self.of_sites

    def _convergence(self, name: str, variable: Any, most: int) -> Convergence:
        others = [dim for dim in variable.dims if dim not in ("chain", "draw")]
        variable = variable.transpose("chain", "draw", *others)
        shape = variable.shape[2:]
        size = int(np.prod(shape))
        if str(variable.attrs.get("kind")) == "probability" and len(shape) > 1:
            places = _liveliest_class(variable, most)
        else:
            places = evenly(size, most)
        values = numbers_at(variable, places)
        labels = [_label(name, variable, others, np.unravel_index(place, shape) if shape else ()) for place in places]
        return Convergence(name, size, labels, values, *self._diagnose(values))

    def _diagnose(self, values: np.ndarray) -> list[np.ndarray]:
        """R-hat, bulk ESS, tail ESS and error of the mean."""
        unknown = np.full(values.shape[-1], np.nan)
        if self.is_guide:
            count = self.chains * self.draws
            return [unknown, unknown, unknown, values.std((0, 1)) / np.sqrt(count)]
        if self.draws < FEWEST_DRAWS:
            return [unknown] * 4
        halves = values
        if self.chains == 1:  # ArviZ gives no R-hat of one chain: its halves stand for two
            half = self.draws // 2
            halves = np.stack([values[0, :half], values[0, -half:]])
        from arviz import ess, mcse, rhat

        with quiet():
            rhats = rhat(_dataset(halves))["value"].values if halves.shape[1] >= FEWEST_DRAWS else unknown
            found = _dataset(values)
            bulk, tail = (ess(found, method=method)["value"].values for method in ("bulk", "tail"))
            return [np.asarray(v, dtype=float) for v in (rhats, bulk, tail, mcse(found)["value"].values)]


def read(idata: Any) -> RunData:
    """The groups of ArviZ data: an ``InferenceData``, or a ``DataTree``; or of the store at a path.

    :raises ValueError: for anything else, or without draws of a posterior.
    """
    if isinstance(idata, (str, os.PathLike)):
        from bnn.stored_draws import as_arviz

        idata = as_arviz(idata)
    if callable(getattr(idata, "groups", None)) and hasattr(idata, "to_netcdf"):
        groups = {name: idata[name] for name in idata.groups()}
    elif hasattr(idata, "children") and hasattr(idata, "to_dataset"):
        groups = {str(name): node.to_dataset() for name, node in idata.children.items()}
    else:
        raise ValueError(
            f"idata is {type(idata).__name__}; give ArviZ data: what bnn.to_arviz makes of a run or a guide, or "
            "arviz.from_netcdf of a file."
        )
    if "posterior" not in groups:
        raise ValueError(
            f"the data have no group posterior, only {sorted(groups)}; a report needs the draws. bnn.to_arviz(run) "
            "makes the group."
        )
    if not {"chain", "draw"} <= set(groups["posterior"].sizes):
        raise ValueError(
            f"the posterior has the dimensions {sorted(map(str, groups['posterior'].sizes))}; a report needs chain "
            "and draw."
        )
    if not all(groups["posterior"].sizes[dim] for dim in ("chain", "draw")):
        raise ValueError("the posterior has no draws.")
    data = RunData(idata, {name: group for name, group in groups.items() if len(group.data_vars)})
    if "posterior" not in data.groups or not (data.sites or data.functions):
        raise ValueError("the posterior has no variable of numbers with the dimensions chain and draw.")
    return data


def autocorrelation(values: np.ndarray) -> np.ndarray:
    """Autocorrelation of each chain, ``(chains, lags)``, by ArviZ."""
    try:
        from arviz import autocorr
    except ImportError:  # ArviZ 1.x
        from arviz_stats.base import array_stats

        return np.asarray(array_stats.autocorr(values, axis=-1))
    return np.asarray(autocorr(values, axis=-1))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of ArviZ: the report says these things in its own words."""
    logger = logging.getLogger("arviz")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _dataset(values: np.ndarray) -> Any:
    import xarray

    return xarray.Dataset({"value": (("chain", "draw", "place"), values)})


def _liveliest_class(variable: Any, most: int) -> np.ndarray:
    """Of evenly spaced rows, the place of the class whose probability varies most."""
    *rows, classes = variable.shape[2:]
    count = int(np.prod(rows))
    places = evenly(count, most)
    values = numbers_at(variable, (places[:, None] * classes + np.arange(classes)).ravel())
    values = values.reshape(-1, len(places), classes)
    return np.asarray(places * classes + values.std(0).argmax(-1))


def _label(name: str, variable: Any, dims: list[Any], place: Any) -> str:
    """``y_mean[17]``, with coordinates where the variable has them."""
    if not dims:
        return name
    parts = [str(variable[dim].values[int(i)]) for dim, i in zip(dims, place, strict=True)]
    return f"{name}[{', '.join(parts)}]"
