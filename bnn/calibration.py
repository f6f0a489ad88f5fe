"""Whether predicted probabilities are frequencies: the reliability diagram, with the band that chance alone allows.

In a bin b of the confidences c with n_b rows, of which a part a_b is right,

    ECE = Σ_b (n_b/n) |a_b - c̄_b|

Guo et al. (2017), ICML; DeGroot and Fienberg (1983). ECE is not zero for a right predictive, as a_b is a mean of n_b
coin tosses: it falls as n^-½, grows with the bins, and says nothing without that size. So labels are drawn again from
the predicted probabilities, the rows kept (consistency resampling, Bröcker and Smith 2007, Weather and Forecasting,
with the forecasts held fixed): from R such data sets come the band of each a_b, a Poisson-binomial quantile by Monte
Carlo, the mean of ECE under calibration, and the part of them whose ECE is at least the observed one,

    p = (1 + #{ECE* ≥ ECE})/(R + 1)

which is exact: for a right predictive P(p ≤ α) ≤ α. Cost: R·n random numbers.

Rows of one posterior share what it does not know of the weights, and miss together more often than coins do. Given the
probabilities of each draw, every data set is drawn from those of one draw, and the band holds that too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from bnn.chance_bands import band_label, band_of_draws, chance_of, legend_below
from bnn.extras import library
from bnn.predictive_arrays import (
    class_labels,
    event_probabilities,
    float_array,
    fractions,
    probabilities_and_labels,
    probability_rows,
    whole_number,
)

# Numbers drawn at once.
CHUNK = 5_000_000


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: one entry for each bin that has rows.

    :ivar left: lower edges of the bins.
    :ivar right: upper edges.
    :ivar count: rows in each.
    :ivar confidence: their mean predicted probability.
    :ivar accuracy: the part of them that was right, or in which the event occurred.
    :ivar low: lower end of the band in which that part lies by chance if the probabilities are right.
    :ivar high: upper end.
    :ivar band_level: probability of the band, of each bin by itself.
    :ivar ece: expected calibration error.
    :ivar expected_ece: its mean by chance, if the probabilities are right.
    :ivar p_value: probability of an ECE so large or larger by chance.
    """

    left: np.ndarray
    right: np.ndarray
    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray
    low: np.ndarray
    high: np.ndarray
    band_level: float
    ece: float
    expected_ece: float
    p_value: float

    def __str__(self) -> str:
        return f"ECE {self.ece:.3g}; by chance alone {self.expected_ece:.3g} (p = {self.p_value:.2g})"

    def plot(self, axes: Any = None) -> Any:
        """Plot accuracy over confidence with the bands of calibration, and the share of rows in each bin.

        :param axes: of Matplotlib; new ones by default.
        :return: the axes.
        :raises ImportError: without Matplotlib.
        """
        axes = library("matplotlib.pyplot").subplots(layout="constrained")[1] if axes is None else axes
        middle, width = (self.left + self.right) / 2.0, self.right - self.left
        share = axes.twinx()
        share.bar(middle, self.count / self.count.sum(), 0.9 * width, color="grey", alpha=0.25, linewidth=0)
        share.set(ylim=(-0.02, 1.02), ylabel="share of rows (bars)")
        axes.set_zorder(share.get_zorder() + 1)
        axes.patch.set_visible(False)
        axes.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
        band = band_label(self.band_level)
        axes.vlines(self.confidence, self.low, self.high, color="C0", alpha=0.35, linewidth=6, label=band)
        outside = (self.accuracy < self.low) | (self.accuracy > self.high)
        for which, marker, color, label in ((~outside, "o", "black", "inside"), (outside, "D", "C3", "outside")):
            if which.any():
                axes.plot(self.confidence[which], self.accuracy[which], marker, color=color, markersize=4, label=label)
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted probability", ylabel="observed frequency")
        axes.set_title(str(self), fontsize="medium")
        legend_below(axes)
        return axes


def reliability(
    probabilities: Any,
    labels: Any,
    *,
    bins: int = 15,
    equal_mass: bool = False,
    band_level: float = 0.95,
    resamples: int = 999,
) -> Reliability:
    """Reliability diagram of the most probable class, or of one event, and how much of it is chance.

    :param probabilities: of each draw, ``(draws, rows, classes)``, or averaged over draws, ``(rows, classes)``, with
        rows taken as independent: the largest mean of each row is compared with how often that class is right. Or
        ``(rows,)``: the probability of one event, with labels 0 and 1; so ``probabilities[:, k], labels == k`` is the
        diagram of class k.
    :param labels: ``(rows,)``, whole numbers.
    :param bins: number of bins.
    :param equal_mass: bins with equal numbers of rows, where most rows would be in one of equal width.
    :param band_level: probability of the band.
    :param resamples: number of data sets drawn; from the global generator of torch (Pyro's seed).
    :raises ValueError: if something does not fit: shapes, sums, range, NaN, too few resamples for the band.

    >>> import torch
    >>> from bnn import reliability
    >>> _ = torch.manual_seed(0)
    >>> p = torch.rand(2000)
    >>> right, sharp = torch.rand(2000) < p, torch.rand(2000) < 0.5 * p
    >>> bool(reliability(p, right).p_value > 0.05), reliability(p, sharp).p_value
    (True, 0.001)
    """
    confidence, hits, each = _confidence_and_hits(probabilities, labels)
    bins, resamples = whole_number("bins", bins, 1), whole_number("resamples", resamples, 1)
    (band,) = fractions("band_level", band_level)
    edges, where = _bins(confidence, bins, equal_mass)
    count = np.bincount(where, minlength=len(edges) - 1)
    kept = count > 0
    predicted = np.bincount(where, confidence, minlength=len(count))[kept]
    observed = np.bincount(where, hits, minlength=len(count))[kept]
    order = np.argsort(where, kind="stable")
    drawn = _drawn_hits(each[:, order], count[kept], resamples)
    ece = float(np.abs(observed - predicted).sum() / len(hits))
    by_chance = np.abs(drawn - predicted).sum(-1) / len(hits)
    low, high = band_of_draws(drawn, band, "resamples", "give more, or a lower band_level.")
    count = count[kept]
    return Reliability(
        left=edges[:-1][kept],
        right=edges[1:][kept],
        count=count,
        confidence=predicted / count,
        accuracy=observed / count,
        low=low / count,
        high=high / count,
        band_level=band,
        ece=ece,
        expected_ece=float(by_chance.mean()),
        p_value=float(chance_of(ece, by_chance)),
    )


def _confidence_and_hits(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Confidence and hits ``(rows,)``, and each draw's probability of a hit ``(draws or 1, rows)``."""
    given = float_array("probabilities", probabilities)
    if given.ndim == 1:
        p = event_probabilities("probabilities", probabilities)
        return p, class_labels(labels, len(p), 2).astype(float), p[None]
    if given.ndim == 3:
        given = probability_rows("probabilities", probabilities, draws=True)
        p = given.mean(0)
        y = class_labels(labels, *p.shape)
    else:
        p, y = probabilities_and_labels(probabilities, labels)
        given = p[None]
    best = p.argmax(-1)
    return p.max(-1), (best == y).astype(float), given[:, np.arange(len(p)), best]


def _bins(confidence: np.ndarray, bins: int, equal_mass: bool) -> tuple[np.ndarray, np.ndarray]:
    """Edges, and the bin of each row: closed on the left as torchmetrics', with 1 in the last."""
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64).numpy()
    if equal_mass:
        inner = np.quantile(confidence, edges[1:-1])
        edges = np.unique([confidence.min(), *inner, max(confidence.max(), np.nextafter(confidence.min(), 2.0))])
    where = np.searchsorted(edges, confidence, side="right") - 1
    return edges, np.minimum(where, len(edges) - 2)


def _drawn_hits(each: np.ndarray, count: np.ndarray, resamples: int) -> np.ndarray:
    """How many rows of each bin are right in data sets drawn from one draw's probabilities, ``(resamples, bins)``.

    :param each: probability of a hit under each draw, ``(draws, rows)``; rows in the order of bins.
    """
    p = torch.from_numpy(each)
    draws, rows = p.shape
    starts = np.concatenate([[0], np.cumsum(count)[:-1]])
    size = max(1, CHUNK // rows)
    parts = []
    for first in range(0, resamples, size):
        number = min(size, resamples - first)
        chosen = p[torch.randint(draws, (number,))] if draws > 1 else p
        hits = torch.rand(number, rows, dtype=torch.float64) < chosen
        parts.append(np.add.reduceat(hits.numpy().astype(np.int64), starts, axis=1))
    return np.concatenate(parts)


@dataclass(frozen=True)
class AccuracyRejection:
    """Accuracy of the rows that are kept when the least certain ones are left to somebody else.

    :ivar rejected: part of the rows rejected, rising from 0, ``(rows,)``.
    :ivar accuracy: accuracy of those kept.
    :ivar area: mean accuracy over all parts rejected.
    :ivar best_area: that of a rejection that knows which rows are wrong.
    :ivar random_area: that of a rejection by chance, the plain accuracy.
    """

    rejected: np.ndarray
    accuracy: np.ndarray
    area: float
    best_area: float
    random_area: float

    def plot(self, axes: Any = None) -> Any:
        """Plot accuracy over the part rejected.

        :param axes: of Matplotlib; new ones by default.
        :return: the axes.
        :raises ImportError: without Matplotlib.
        """
        axes = library("matplotlib.pyplot").subplots(layout="constrained")[1] if axes is None else axes
        rows = len(self.rejected)
        wrong = round((1.0 - self.random_area) * rows)
        best = np.minimum(1.0, (rows - wrong) / np.arange(rows, 0, -1))
        axes.plot(self.rejected, best, ":", color="grey", label=f"wrong ones first (area {self.best_area:.3f})")
        axes.axhline(self.random_area, color="grey", linewidth=0.8, label=f"by chance (area {self.random_area:.3f})")
        axes.plot(self.rejected, self.accuracy, color="C0", label=f"least certain first (area {self.area:.3f})")
        axes.set(xlim=(0, 1), xlabel="part rejected", ylabel="accuracy of the rest")
        axes.legend(fontsize="small", loc="lower right")
        return axes


def accuracy_rejection(probabilities: Any, labels: Any, *, by: Any = "confidence") -> AccuracyRejection:
    """How accuracy rises as the least certain rows are rejected: whether the uncertainty knows what it does not know.

    Rows of equal uncertainty are rejected in random order; the accuracies are their expectation.

    :param probabilities: ``(rows, classes)``, averaged over draws.
    :param labels: ``(rows,)``, whole numbers.
    :param by: ``"confidence"`` (the largest probability), ``"entropy"``, or an uncertainty for each row, ``(rows,)``,
        such as the mutual information.
    :raises ValueError: if something does not fit: shapes, sums, range, NaN.

    >>> from bnn import accuracy_rejection
    >>> found = accuracy_rejection([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]], [0, 1, 1, 1])
    >>> found.accuracy.tolist(), found.area, found.random_area
    ([0.75, 1.0, 1.0, 1.0], 0.9375, 0.75)
    """
    p, y = probabilities_and_labels(probabilities, labels)
    hits = (p.argmax(-1) == y).astype(float)
    kept = np.arange(1, len(y) + 1)
    accuracy = np.cumsum(_expected_hits(hits, _uncertainty(p, by))) / kept
    best = np.minimum(1.0, hits.sum() / kept)
    return AccuracyRejection(
        rejected=1.0 - kept[::-1] / len(y),
        accuracy=accuracy[::-1],
        area=float(accuracy.mean()),
        best_area=float(best.mean()),
        random_area=float(hits.mean()),
    )


def _uncertainty(p: np.ndarray, by: Any) -> np.ndarray:
    if isinstance(by, str):
        if by == "confidence":
            return -p.max(-1)
        if by == "entropy":
            return np.asarray(-np.where(p > 0, p * np.log(np.where(p > 0, p, 1.0)), 0.0).sum(-1))
        raise ValueError(f"by is {by!r}; give 'confidence', 'entropy', or an array with an uncertainty for each row.")
    given = float_array("by", by)
    if given.shape != (len(p),):
        raise ValueError(f"by has shape {given.shape}; wanted is ({len(p)},), an uncertainty for each row.")
    return given


def _expected_hits(hits: np.ndarray, uncertainty: np.ndarray) -> np.ndarray:
    """Hits from the most certain row on; among rows of equal uncertainty, their mean."""
    _, group, sizes = np.unique(uncertainty, return_inverse=True, return_counts=True)
    means = np.bincount(group, hits) / sizes
    return np.repeat(means, sizes)
