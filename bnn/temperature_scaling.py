"""Temperature scaling: one number that sharpens or softens predicted classes, fitted on held-out rows.

Of an ensemble or posterior with member (or draw) probabilities p_m, the two protocols of the field:

    after averaging     p_τ = softmax(log p̄ / τ),            p̄ = mean_m p_m
    before averaging    p_τ = mean_m softmax(log p_m / τ)

τ > 1 softens. Members' logits serve as well as log probabilities. For one member both are the scaling of Guo et al.
(2017), ICML. τ minimises the NLL of held-out rows: after averaging a convex problem in 1/τ, before it one that may have
several minima, so that the search starts from a grid.

This τ scales predictions; the temperature T of a posterior is another thing.

The NLL of the rows on which τ was fitted flatters it. The field's number for comparisons is the calibrated NLL: τ is
fitted on half of the test rows and scored on the other, both ways, over five random splits (Ashukha et al. 2020, ICLR;
Lobacheva et al. 2020, NeurIPS, whose two protocols these are).
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import optimize
from scipy.special import log_softmax, logsumexp

from bnn.predictive_arrays import class_labels, float_array, whole_number
from bnn.scoring import Score, mean_score

COLDEST, HOTTEST = 0.01, 100.0
GRID = 33


@dataclass(frozen=True)
class TemperatureScaling:
    """A fitted temperature, to be applied to other rows.

    :ivar temperature: τ.
    :ivar protocol: ``"after"`` or ``"before"`` averaging.
    """

    temperature: float
    protocol: str
    _fitted_on: str | None = field(default=None, repr=False, compare=False)

    def __call__(self, log_probabilities: Any) -> torch.Tensor:
        """Scaled log probabilities ``(rows, classes)``, in float64.

        :param log_probabilities: ``(members, rows, classes)``, or ``(rows, classes)`` of one member or an average.
        :raises ValueError: if something does not fit: shape, NaN.
        """
        given = _members(log_probabilities)
        if self._fitted_on is not None and self._fitted_on == _fingerprint(given):
            warnings.warn(
                "these are the rows on which the temperature was fitted: scores of them flatter it. Score other rows, "
                "or use bnn.calibrated_nll, which splits them.",
                RuntimeWarning,
                stacklevel=2,
            )
        members = _before_scaling(given, self.protocol)
        scaled = logsumexp(log_softmax(members / self.temperature, axis=-1), axis=0) - math.log(len(members))
        return torch.from_numpy(scaled)


def fit_temperature(log_probabilities: Any, labels: Any, *, protocol: str = "after") -> TemperatureScaling:
    """The temperature with the smallest NLL on held-out rows, within 0.01 to 100.

    Fit on rows that neither trained the net nor will be scored: hold out a part of the training data, or use
    :func:`bnn.calibrated_nll`, which splits the test rows itself.

    :param log_probabilities: log probabilities or logits of held-out rows, ``(members, rows, classes)``, or
        ``(rows, classes)`` of one member or (log probabilities only, for ``protocol="after"``) an average.
    :param labels: ``(rows,)``, whole numbers.
    :param protocol: ``"after"`` or ``"before"`` averaging.
    :raises ValueError: if something does not fit: shape, NaN, a label to which every member gives probability zero.

    >>> import torch
    >>> from bnn import fit_temperature
    >>> _ = torch.manual_seed(0)
    >>> logits = 3.0 * torch.randn(3000, 10)
    >>> labels = torch.distributions.Categorical(logits=logits / 2.0).sample()  # logits twice too sharp
    >>> scaling = fit_temperature(logits[:2000], labels[:2000])
    >>> abs(scaling.temperature - 2.0) < 0.15
    True
    >>> scaling(logits[2000:]).exp().shape
    torch.Size([1000, 10])
    """
    given, y = _members_and_labels(log_probabilities, labels)
    return TemperatureScaling(_best_temperature(given, y, _checked(protocol)), protocol, _fingerprint(given))


class CalibratedNLL(NamedTuple):
    """The NLL after temperature scaling, cross-validated.

    :ivar score: its mean and standard error over rows.
    :ivar temperatures: those fitted, ``(repeats, folds)``.
    """

    score: Score
    temperatures: np.ndarray


def calibrated_nll(
    log_probabilities: Any, labels: Any, *, protocol: str = "after", folds: int = 2, repeats: int = 5
) -> CalibratedNLL:
    """The NLL of test rows with a temperature fitted on other test rows: no row is scored by one that saw it.

    :param log_probabilities: as for :func:`bnn.fit_temperature`, of the test rows.
    :param labels: ``(rows,)``, whole numbers.
    :param protocol: ``"after"`` or ``"before"`` averaging.
    :param folds: parts into which the rows are split; τ is fitted on all but one and scored on that.
    :param repeats: number of random splits, drawn from the global generator of torch (Pyro's seed).
    :raises ValueError: if something does not fit: shape, NaN, fewer rows than folds.

    >>> import torch
    >>> from bnn import calibrated_nll
    >>> _ = torch.manual_seed(0)
    >>> logits = 3.0 * torch.randn(2000, 10)
    >>> labels = torch.distributions.Categorical(logits=logits / 2.0).sample()
    >>> found = calibrated_nll(logits, labels)
    >>> found.temperatures.shape, bool(found.score.value < torch.nn.functional.cross_entropy(logits, labels))
    ((5, 2), True)
    """
    given, y = _members_and_labels(log_probabilities, labels)
    folds, repeats = whole_number("folds", folds, 2), whole_number("repeats", repeats, 1)
    rows = len(y)
    if rows < folds:
        raise ValueError(f"there are {rows} rows for {folds} folds; give at least as many rows.")
    given = _before_scaling(given, _checked(protocol))  # averages once
    losses, temperatures = np.zeros((repeats, rows)), np.zeros((repeats, folds))
    for repeat in range(repeats):
        order = torch.randperm(rows).numpy()
        for fold in range(folds):
            scored = order[fold::folds]
            fitted = np.setdiff1d(order, scored)
            tau = _best_temperature(given[:, fitted], y[fitted], protocol)
            losses[repeat, scored] = _losses(given[:, scored], y[scored], protocol)(1.0 / tau)
            temperatures[repeat, fold] = tau
    return CalibratedNLL(mean_score(losses.mean(0)), temperatures)


def _members_and_labels(log_probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    given = _members(log_probabilities)
    y = class_labels(labels, *given.shape[1:])
    impossible = np.isneginf(given[:, np.arange(len(y)), y]).all(0)
    if impossible.any():
        raise ValueError(
            f"the label of row {int(impossible.argmax())} has probability zero under every member: the NLL is infinite "
            "at any temperature. Give logits, or log_softmax in place of the log of a rounded softmax."
        )
    return given, y


def _members(log_probabilities: Any) -> np.ndarray:
    """Normalised log probabilities ``(members, rows, classes)``."""
    array = float_array("log_probabilities", log_probabilities)
    if array.ndim not in (2, 3) or array.shape[-1] < 2:
        raise ValueError(
            f"log_probabilities have shape {array.shape}; wanted is (members, rows, classes) or (rows, classes)."
        )
    if np.isposinf(array).any() or np.isneginf(array).all(-1).any():
        raise ValueError("log_probabilities hold plus infinity, or minus infinity for all classes of a row.")
    if array.min() >= 0.0 and np.allclose(array.sum(-1), 1.0, atol=1e-3):
        raise ValueError("log_probabilities hold probabilities; give their logarithm, or logits.")
    return np.asarray(log_softmax(array.reshape(-1, *array.shape[-2:]), axis=-1))


def _checked(protocol: str) -> str:
    if protocol not in ("after", "before"):
        raise ValueError(f"protocol is {protocol!r}; give 'after' or 'before' (averaging).")
    return protocol


def _before_scaling(given: np.ndarray, protocol: str) -> np.ndarray:
    """What is divided by the temperature, ``(members or 1, rows, classes)``."""
    if protocol == "before":
        return given
    return np.asarray(logsumexp(given, axis=0, keepdims=True) - math.log(len(given)))


def _losses(given: np.ndarray, y: np.ndarray, protocol: str) -> Callable[[float], np.ndarray]:
    """NLL of each row as a function of the inverse temperature."""
    given = _before_scaling(given, protocol)
    given = given - given.max(-1, keepdims=True)
    label, count = given[:, np.arange(len(y)), y], math.log(len(given))
    return lambda inverse: count - logsumexp(inverse * label - np.log(np.exp(inverse * given).sum(-1)), axis=0)


def _best_temperature(given: np.ndarray, y: np.ndarray, protocol: str) -> float:
    losses = _losses(given, y, protocol)

    def nll(log_temperature: float) -> float:
        return float(losses(math.exp(-log_temperature)).mean())

    grid = np.linspace(math.log(COLDEST), math.log(HOTTEST), GRID)
    best = int(np.argmin([nll(point) for point in grid]))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, GRID - 1)])
    found = optimize.minimize_scalar(nll, bounds=bounds, method="bounded", options={"xatol": 1e-10})
    if best in (0, GRID - 1) and found.fun >= nll(grid[best]):
        _warn_at_end(best == 0)
        return math.exp(grid[best])
    return math.exp(float(found.x))


def _warn_at_end(cold: bool) -> None:
    warnings.warn(
        f"the NLL of the held-out rows still falls at temperature {COLDEST if cold else HOTTEST:g}: "
        + (
            "sharper is always better, as where every row is classified rightly; hold out more rows."
            if cold
            else "a guess does better, as where rows and labels do not correspond; check them."
        ),
        RuntimeWarning,
        stacklevel=4,
    )


def _fingerprint(given: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(given).data).hexdigest()
