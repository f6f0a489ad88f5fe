"""Where targets lie among the draws of their predictive: interval coverage and the probability integral transform.

If a target and its S draws come from the same law, independently, its rank among them is uniform on 0, ..., S. Two
statements follow that are exact for any S and any law:

- it lies between the k-th smallest and the k-th largest draw with probability (S + 1 - 2k)/(S + 1), without ties;
- with L draws below it, E equal to it, and V uniform on (0, 1),

      u = (L + (E + 1) V)/(S + 1)

  is uniform on (0, 1), also for counts and other discrete targets: the randomised transform (Smith 1985; Czado,
  Gneiting and Held 2009, Biometrics).

The bands are of counts of independent rows. Rows of one posterior share what it does not know of the weights, so where
that outweighs the noise they miss together, and more often leave the bands than these say.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats

from bnn.extras import library
from bnn.predictive_arrays import fractions, samples_and_targets, whole_number


def central_interval(samples: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Two of the draws ``(draws, ...)`` as ends of an interval, and the probability that it has: ``level`` or more.

    :raises ValueError: if so few draws have no such interval.
    """
    draws = len(samples)
    below = math.floor((1.0 - level) / 2.0 * (draws + 1) + 1e-9)
    if below < 1:
        raise ValueError(
            f"an interval of level {level:g} needs at least {math.ceil(2.0 / (1.0 - level) - 1e-6) - 1} draws; there "
            f"are {draws}: draw more from the predictive, several for each draw of the weights."
        )
    ordered = np.partition(samples, (below - 1, draws - below), axis=0)
    return ordered[below - 1], ordered[draws - below], 1.0 - 2.0 * below / (draws + 1)


def binomial_band(count: int, probability: np.ndarray | float, level: float) -> tuple[np.ndarray, np.ndarray]:
    """Smallest and largest number of successes in a central region of at least ``level``."""
    tail = (1.0 - level) / 2.0
    law = stats.binom(count, probability)
    return np.asarray(law.ppf(tail)), np.asarray(law.ppf(1.0 - tail))


@dataclass(frozen=True)
class Coverage:
    """How often targets lie in their central intervals.

    :ivar levels: the levels asked for.
    :ivar expected: the probabilities that the intervals between two draws really have, ``(levels,)``.
    :ivar covered: part of the rows covered, ``(levels, ...)``, with the targets' trailing dimensions.
    :ivar low: lower end of the band in which it lies by chance if the predictive is right, ``(levels,)``.
    :ivar high: upper end.
    :ivar band_level: probability of the band, of each level by itself.
    """

    levels: tuple[float, ...]
    expected: np.ndarray
    covered: np.ndarray
    low: np.ndarray
    high: np.ndarray
    band_level: float

    def plot(self, axes: Any = None) -> Any:
        """Plot how much coverage exceeds the level, with its band: below zero intervals are too narrow.

        :param axes: of Matplotlib; new ones by default.
        :return: the axes.
        :raises ImportError: without Matplotlib.
        """
        axes = library("matplotlib.pyplot").subplots(layout="constrained")[1] if axes is None else axes
        order = np.argsort(self.expected)
        x = self.expected[order]
        low, high = self.low[order] - x, self.high[order] - x
        axes.fill_between(x, low, high, color="C0", alpha=0.2, linewidth=0, label=_band_label(self.band_level))
        axes.axhline(0.0, color="grey", linewidth=0.8)
        excess = self.covered[order].reshape(len(x), -1) - x[:, None]
        for column, label in enumerate(_labels(excess.shape[1])):
            axes.plot(x, excess[:, column], "o-", color=f"C{column + 1}", markersize=4, linewidth=1.2, label=label)
        axes.set(xlim=(0, 1), xlabel="level of the interval", ylabel="part of targets inside, minus level")
        legend_below(axes)
        return axes


def coverage(
    samples: Any,
    targets: Any,
    levels: float | Sequence[float] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    *,
    band_level: float = 0.95,
) -> Coverage:
    """How often the central intervals of a predictive hold the target, with the band that chance allows.

    The ends of an interval are draws, so that its probability is known exactly: ``expected``, at least the level asked
    for. Counts and other discrete targets tie with the ends and are covered more often: use :func:`pit` for them.

    :param samples: draws from the posterior predictive, noise included, ``(draws, rows, ...)``.
    :param targets: ``(rows, ...)``.
    :param levels: probabilities of central intervals; level q needs 2/(1 - q) - 1 draws or more.
    :param band_level: probability of the band.
    :raises ValueError: if something does not fit: shapes, NaN, too few draws for a level.

    >>> import torch
    >>> from bnn import coverage
    >>> _ = torch.manual_seed(0)
    >>> found = coverage(torch.randn(99, 1000), torch.randn(1000), levels=(0.5, 0.9))
    >>> found.expected.round(6).tolist(), found.low.tolist(), found.high.tolist()
    ([0.5, 0.9], [0.469, 0.881], [0.531, 0.918])
    >>> bool(((found.low <= found.covered) & (found.covered <= found.high)).all())
    True
    """
    x, y = samples_and_targets(samples, targets)
    (band,) = fractions("band_level", band_level)
    asked = fractions("levels", levels)
    covered, expected = [], []
    for level in asked:
        bottom, top, probability = central_interval(x, level)
        covered.append(((bottom <= y) & (y <= top)).mean(0))
        expected.append(probability)
    low, high = binomial_band(len(y), np.array(expected), band)
    return Coverage(tuple(asked), np.array(expected), np.array(covered), low / len(y), high / len(y), band)


@dataclass(frozen=True)
class ProbabilityIntegralTransform:
    """Ranks of targets among the draws of their predictive, on (0, 1).

    :ivar values: ``(rows, ...)``, uniform if the predictive is right.
    :ivar edges: of the histogram's bins.
    :ivar counts: rows in each bin, ``(bins, ...)``.
    :ivar low: lower end of the band in which a count lies by chance if the predictive is right.
    :ivar high: upper end.
    :ivar band_level: probability of the band, of each bin by itself.
    :ivar p_value: of the test of Kolmogorov and Smirnov for uniformity, one for each output.
    """

    values: np.ndarray
    edges: np.ndarray
    counts: np.ndarray
    low: float
    high: float
    band_level: float
    p_value: np.ndarray

    def plot(self, axes: Any = None) -> Any:
        """Plot the histogram with its band.

        A hump in the middle says that the predictive is too wide, a U that it is too narrow, a slope that it is biased.

        :param axes: of Matplotlib; new ones by default.
        :return: the axes.
        :raises ImportError: without Matplotlib.
        """
        axes = library("matplotlib.pyplot").subplots(layout="constrained")[1] if axes is None else axes
        axes.axhspan(self.low, self.high, color="C0", alpha=0.2, linewidth=0, label=_band_label(self.band_level))
        axes.axhline(len(self.values) / len(self.counts), color="grey", linewidth=0.8)
        lines = self.counts.reshape(len(self.counts), -1)
        for column, label in enumerate(_labels(lines.shape[1])):
            axes.stairs(
                lines[:, column], self.edges, baseline=None, color=f"C{column + 1}", linewidth=1.5, label=label
            )  # fmt: skip
        axes.set(xlim=(0, 1), xlabel="rank of the target in its predictive", ylabel="rows")
        axes.set_ylim(0, 1.1 * max(lines.max(), self.high))
        legend_below(axes)
        return axes


def pit(samples: Any, targets: Any, *, bins: int = 10, band_level: float = 0.95) -> ProbabilityIntegralTransform:
    """The probability integral transform: where each target lies in its predictive, from 0 to 1.

    Ranks are randomised inside their step, and inside ties, from the global generator of torch (Pyro's seed): exactly
    uniform for a right predictive, of continuous and of discrete targets.

    :param samples: draws from the posterior predictive, noise included, ``(draws, rows, ...)``.
    :param targets: ``(rows, ...)``.
    :param bins: of the histogram.
    :param band_level: probability of the band.
    :raises ValueError: if something does not fit: shapes, NaN.

    >>> import torch
    >>> from bnn import pit
    >>> _ = torch.manual_seed(0)
    >>> right = pit(torch.randn(100, 1000), torch.randn(1000))
    >>> narrow = pit(0.5 * torch.randn(100, 1000), torch.randn(1000))
    >>> bool(right.p_value > 0.01), bool(narrow.p_value > 0.01)
    (True, False)
    >>> right.low, right.high
    (82.0, 119.0)
    """
    x, y = samples_and_targets(samples, targets, fewest=1)
    bins = whole_number("bins", bins, 1)
    (band,) = fractions("band_level", band_level)
    inside = torch.rand(y.shape, dtype=torch.float64).numpy()
    values = ((x < y).sum(0) + ((x == y).sum(0) + 1) * inside) / (len(x) + 1)
    columns = values.reshape(len(y), -1).T
    edges = np.linspace(0.0, 1.0, bins + 1)
    counts = np.stack([np.histogram(column, edges)[0] for column in columns], axis=-1)
    low, high = binomial_band(len(y), 1.0 / bins, band)
    p_values = np.array([stats.kstest(column, "uniform").pvalue for column in columns])
    return ProbabilityIntegralTransform(
        values, edges, counts.reshape(bins, *y.shape[1:]), float(low), float(high), band, p_values.reshape(y.shape[1:])
    )


def _band_label(level: float) -> str:
    return f"{100 * level:g} % if calibrated"


def _labels(outputs: int) -> list[str | None]:
    """For the legend, which holds no more than six outputs."""
    if outputs == 1:
        return ["observed"]
    return [f"output {column}" if outputs <= 6 else None for column in range(outputs)]


def legend_below(axes: Any) -> None:
    """A legend under the axes, where it hides nothing."""
    axes.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)
