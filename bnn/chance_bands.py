"""Bands in which a statistic of data lies by chance alone, and how plots show them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from scipy import stats


def binomial_band(count: int, probability: np.ndarray | float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest number of successes in a central region of at least ``level``."""
    tail = (1.0 - level) / 2.0
    law = stats.binom(count, probability)
    return np.asarray(law.ppf(tail)), np.asarray(law.ppf(1.0 - tail))


def band_of_draws(drawn: np.ndarray, level: float, what: str, remedy: str) -> tuple[np.ndarray, np.ndarray]:
    """Two of the R values that chance alone drew, ``(R, ...)``, between which another lies with ``level`` or more.

    Exact for any R: where all R + 1 are exchangeable, one is below the k-th smallest of the others with probability
    k/(R + 1) at most.

    :param what: the name of what was drawn, for the error.
    :param remedy: what to do if it is too little.
    :raises ValueError: if R is too small for the level.
    """
    number = len(drawn)
    rank = math.floor((1.0 - level) / 2.0 * (number + 1) + 1e-9)
    if rank < 1:
        raise ValueError(
            f"{number} {what} are too few for a band of level {level:g}, which needs at least "
            f"{math.ceil(2.0 / (1.0 - level) - 1e-6) - 1}: {remedy}"
        )
    ordered = np.partition(drawn, (rank - 1, number - rank), axis=0)
    return ordered[rank - 1], ordered[number - rank]


def chance_of(statistic: np.ndarray | float, drawn: np.ndarray) -> np.ndarray:
    """p-value (1 + #{drawn ≥ statistic})/(R + 1), never too small for any R; ``drawn`` is ``(R, ...)``."""
    return np.asarray((1 + (drawn >= np.asarray(statistic) - 1e-12).sum(0)) / (len(drawn) + 1))


def band_label(level: float) -> str:
    """For the legend."""
    return f"{100 * level:g} % if calibrated"


def output_labels(outputs: int) -> list[str | None]:
    """For the legend, which holds no more than six outputs."""
    if outputs == 1:
        return ["observed"]
    return [f"output {column}" if outputs <= 6 else None for column in range(outputs)]


def legend_below(axes: Any) -> None:
    """A legend under the axes, where it hides nothing."""
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
