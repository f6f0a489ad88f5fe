"""Scores of a posterior predictive on data that it has not seen, each with its standard error over rows.

Of classes, with p the probabilities averaged over draws and y the label of a row:

    nll = -log p_y        brier = Σ_k (p_k - 1[k = y])²        accuracy = 1[y = argmax p]

and the expected calibration error of the largest probability in 15 bins of equal width (Guo et al. 2017, ICML). Of
regression, with x the S samples of a row:

    nll = -log (1/S) Σ_s p(y | draw s)        crps = E|x - y| - ½ E|x - x'|

nll, brier (0 to 2, Brier 1950) and crps are strictly proper: the true law minimises each in expectation (Gneiting and
Raftery 2007, JASA). All fall as predictions improve, but for accuracy and coverage.

The second expectation of crps runs over pairs of different samples, S(S-1) of them: the fair estimator (Ferro 2014),
without bias whatever S if draws are independent, in the form of probability-weighted moments, which costs a sort. Over
all S² pairs it would exceed the score of the predictive by E|x - x'|/2S, and favour whoever drew more. Draws that
follow each other closely in a chain make the fair one too large likewise: thin them.

The standard error is that of the mean over rows as a sample from a population of rows, the predictive being given; it
does not hold how much another posterior sample or data set would change it. The NLL of S draws is too large on average,
by half the relative variance of its mean over draws: of the order 1/S.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import logsumexp

from bnn.extras import library
from bnn.predictive_arrays import (
    finite_array,
    fractions,
    log_likelihood_rows,
    probabilities_and_labels,
    samples_and_targets,
    whole_number,
)
from bnn.predictive_ranks import central_interval


class Score(NamedTuple):
    """A mean over rows.

    :ivar value: the score.
    :ivar error: its standard error over rows; NaN for one row.
    """

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4g} +- {self.error:.1g}"


def mean_score(values: np.ndarray) -> Score:
    """Mean of a score of each row, ``(rows,)``, with its standard error."""
    if not np.isfinite(values).all():
        return Score(float(values.mean()), math.inf)
    error = values.std(ddof=1) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return Score(float(values.mean()), float(error))


def classification_scores(
    probabilities: Any, labels: Any, *, log_likelihood: Any = None, bins: int = 15
) -> dict[str, Score]:
    """``nll``, ``brier``, ``accuracy`` and ``ece`` of predicted classes.

    A label of probability zero makes the NLL infinite. The error of ``ece`` holds where the gaps of most bins are no
    chance; where all may be, see the band of :func:`bnn.reliability`, which also gives the ECE that chance alone makes.

    :param probabilities: ``(rows, classes)``, averaged over draws.
    :param labels: ``(rows,)``, whole numbers.
    :param log_likelihood: log probability of each label under each draw, ``(draws, rows)`` or ``(chain, draw, rows)``;
        gives an NLL that rounding of the probabilities does not bound.
    :param bins: number of bins of equal width for ``ece``.
    :raises ValueError: if something does not fit: shapes, sums, range, NaN.
    :raises ImportError: without torchmetrics and scoringrules, ``pip install "pyro-bnn[report]"``.

    >>> from bnn import classification_scores
    >>> scores = classification_scores([[0.8, 0.2], [0.4, 0.6], [0.7, 0.3]], [0, 1, 1])
    >>> {name: round(score.value, 3) for name, score in scores.items()}
    {'nll': 0.646, 'brier': 0.46, 'accuracy': 0.667, 'ece': 0.433}
    >>> print(scores["nll"])
    0.646 +- 0.3
    """
    p, y = probabilities_and_labels(probabilities, labels)
    bins = whole_number("bins", bins, 1)
    metrics, rules = library("torchmetrics.functional.classification"), library("scoringrules")
    rows, classes = p.shape
    if log_likelihood is None:
        with np.errstate(divide="ignore"):
            nll = -np.log(p[np.arange(rows), y])
    else:
        nll = _negative_log_mean(log_likelihood_rows(log_likelihood, rows))
    brier = rules.brier_score(np.eye(classes)[y], p).sum(-1)
    accuracy = float(
        metrics.multiclass_accuracy(torch.from_numpy(p), torch.from_numpy(y), classes, average="micro")
    )  # fmt: skip
    spread = math.sqrt(accuracy * (1.0 - accuracy) / (rows - 1)) if rows > 1 else math.nan
    return {
        "nll": mean_score(nll),
        "brier": mean_score(brier),
        "accuracy": Score(accuracy, spread),
        "ece": _calibration_error(metrics, p.max(-1), p.argmax(-1) == y, bins),
    }


def _calibration_error(metrics: Any, confidence: np.ndarray, correct: np.ndarray, bins: int) -> Score:
    """ECE by torchmetrics, with the error of Σ_b |Σ_{i∈b} (correct - confidence)| / n for fixed signs of the bins."""
    # torchmetrics gives confidence 1 a bin of its own; it belongs into the last one.
    confidence = np.minimum(confidence, np.nextafter(1.0, 0.0))
    preds, target = torch.from_numpy(confidence), torch.from_numpy(correct.astype(int))
    value = float(metrics.binary_calibration_error(preds, target, n_bins=bins))
    edges = torch.linspace(0, 1, bins + 1, dtype=preds.dtype)
    where = (torch.bucketize(preds, edges, right=True) - 1).numpy()
    signs = np.sign(np.bincount(where, correct - confidence, minlength=bins))
    return Score(value, mean_score(signs[where] * (correct - confidence)).error)


def regression_scores(
    samples: Any,
    targets: Any,
    *,
    mean: Any = None,
    log_likelihood: Any = None,
    levels: float | Sequence[float] = (0.5, 0.9),
) -> dict[str, Score]:
    """``rmse``, ``mae``, ``crps``, ``nll`` if its log-likelihood is given, and coverage and width of intervals.

    ``rmse`` is that of the predictive mean, ``mae`` that of the predictive median: each is what its score asks for.
    ``coverage_0.9`` is the part of rows whose target lies in the central interval of level 0.9 (:func:`bnn.coverage`
    says how far chance moves it), ``width_0.9`` that interval's mean width. With several outputs a row's score is the
    mean over them.

    :param samples: draws from the posterior predictive, noise included, ``(draws, rows, ...)``.
    :param targets: ``(rows, ...)``.
    :param mean: predictive mean ``(rows, ...)`` where it is known better than by the samples' mean.
    :param log_likelihood: log density of each row's targets under each draw, ``(draws, rows)`` or
        ``(chain, draw, rows)``.
    :param levels: probabilities of central intervals.
    :raises ValueError: if something does not fit: shapes, NaN, too few draws for a level.
    :raises ImportError: without scoringrules, ``pip install "pyro-bnn[report]"``.

    >>> import torch
    >>> from bnn import regression_scores
    >>> _ = torch.manual_seed(0)
    >>> scores = regression_scores(torch.randn(500, 1000), torch.randn(1000))
    >>> list(scores)
    ['rmse', 'mae', 'crps', 'coverage_0.5', 'width_0.5', 'coverage_0.9', 'width_0.9']
    >>> abs(scores["crps"].value - 0.564) < 4 * scores["crps"].error  # 1/√π of a standard normal
    True
    """
    x, y = samples_and_targets(samples, targets)
    rules = library("scoringrules")
    centre = x.mean(0) if mean is None else finite_array("mean", mean)
    if centre.shape != y.shape:
        raise ValueError(f"mean has shape {centre.shape}; wanted is that of the targets, {y.shape}.")
    scores = {
        "rmse": _root(mean_score(_per_row((centre - y) ** 2))),
        "mae": mean_score(_per_row(np.abs(np.median(x, 0) - y))),
        "crps": mean_score(_per_row(rules.crps_ensemble(y, x, m_axis=0, estimator="pwm", backend="numpy"))),
    }
    if log_likelihood is not None:
        scores["nll"] = mean_score(_negative_log_mean(log_likelihood_rows(log_likelihood, len(y))))
    for level in fractions("levels", levels):
        low, high = central_interval(x, level)
        scores[f"coverage_{level:g}"] = mean_score(_per_row((low <= y) & (y <= high)))
        scores[f"width_{level:g}"] = mean_score(_per_row(high - low))
    return scores


def gaussian_scores(
    mean: Any, sd: Any, targets: Any, *, levels: float | Sequence[float] = (0.5, 0.9)
) -> dict[str, Score]:
    """The scores of :func:`regression_scores` for a predictive that is Normal, in closed form.

    With several outputs, taken as independent, ``nll`` is the sum over them, and the others their mean.

    :param mean: ``(rows, ...)``.
    :param sd: its standard deviation, noise included, ``(rows, ...)`` or one number.
    :param targets: ``(rows, ...)``.
    :param levels: probabilities of central intervals.
    :raises ValueError: if something does not fit: shapes, NaN, an sd that is not positive.
    :raises ImportError: without scoringrules, ``pip install "pyro-bnn[report]"``.

    >>> from bnn import gaussian_scores
    >>> scores = gaussian_scores([0.0, 1.0], 1.0, [0.0, 2.0], levels=0.9)
    >>> {name: round(score.value, 3) for name, score in scores.items()}
    {'rmse': 0.707, 'mae': 0.5, 'crps': 0.418, 'nll': 1.169, 'coverage_0.9': 1.0, 'width_0.9': 3.29}
    """
    centre, scale, y = finite_array("mean", mean), finite_array("sd", sd), finite_array("targets", targets)
    if centre.shape != y.shape or y.ndim < 1 or scale.shape not in ((), y.shape):
        raise ValueError(
            f"mean, sd and targets have shapes {centre.shape}, {scale.shape} and {y.shape}; wanted are equal ones, "
            "(rows, ...), or one number for sd."
        )
    if scale.min() <= 0.0:
        raise ValueError(f"sd holds {scale.min():.6g}; it must be positive.")
    rules = library("scoringrules")
    scores = {
        "rmse": _root(mean_score(_per_row((centre - y) ** 2))),
        "mae": mean_score(_per_row(np.abs(centre - y))),
        "crps": mean_score(_per_row(rules.crps_normal(y, centre, scale, backend="numpy"))),
        "nll": mean_score(_per_row(rules.logs_normal(y, centre, scale, backend="numpy"), np.sum)),
    }
    for level in fractions("levels", levels):
        half = float(torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64))) * scale
        scores[f"coverage_{level:g}"] = mean_score(_per_row(np.abs(y - centre) <= half))
        scores[f"width_{level:g}"] = mean_score(_per_row(np.broadcast_to(2.0 * half, y.shape)))
    return scores


def _per_row(values: np.ndarray, over: Any = np.mean) -> np.ndarray:
    """Of ``(rows, ...)``: one number for each row, the mean over outputs or what ``over`` says."""
    return np.asarray(over(np.asarray(values, dtype=float).reshape(len(values), -1), axis=1))


def _root(score: Score) -> Score:
    """Square root of a mean, its error by the delta method."""
    root = math.sqrt(score.value)
    return Score(root, score.error / (2.0 * root) if root else score.error)


def _negative_log_mean(log_likelihood: np.ndarray) -> np.ndarray:
    """Of ``(draws, rows)``: -log of the mean likelihood over draws, ``(rows,)``."""
    return np.asarray(math.log(len(log_likelihood)) - logsumexp(log_likelihood, axis=0))
