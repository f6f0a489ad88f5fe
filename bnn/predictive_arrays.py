"""What the scores and diagnostics of predictions are given: tensors or arrays, checked, as float64 arrays of NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

# By how much a row of probabilities may miss 1: rounding of a float32 softmax over many classes, or of half precision.
SUM_TOLERANCE = 1e-4
HALF_SUM_TOLERANCE = 2e-2


def float_array(name: str, value: Any) -> np.ndarray:
    """``value`` as a float64 array; a tensor may lie on any device and need gradients.

    :raises ValueError: if it is no array of numbers, is empty, or holds NaN.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = value.double().numpy() if not value.is_complex() else value.numpy()
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} has parts of different lengths; give one tensor or array.") from None
    if array.dtype.kind not in "fiub":
        raise ValueError(f"{name} has dtype {array.dtype}; give a tensor or array of real numbers.")
    if not array.size:
        raise ValueError(f"{name} has shape {array.shape} and is empty; give at least one row.")
    array = array.astype(float)
    bad = np.isnan(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} holds NaN, {int(bad.sum())} of {array.size} numbers, first at index {first}: find the draw or row "
            "that they come from, or leave it out."
        )
    return array


def finite_array(name: str, value: Any) -> np.ndarray:
    """As :func:`float_array`, for numbers that must be finite.

    :raises ValueError: also for an infinite number.
    """
    array = float_array(name, value)
    bad = ~np.isfinite(array)
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise ValueError(
            f"{name} holds infinite numbers, {int(bad.sum())} of {array.size}, first at index {first}: a chain has "
            "diverged, or a prediction overflowed; leave those draws out."
        )
    return array


def probability_rows(name: str, value: Any, draws: bool = False) -> np.ndarray:
    """Probabilities ``(rows, classes)``, or ``(draws, rows, classes)``.

    :param draws: whether there are draws.
    :raises ValueError: for another shape, numbers outside [0, 1], or rows that do not sum to one.
    """
    half = str(getattr(value, "dtype", "")).endswith("float16")  # float16 and bfloat16
    array = float_array(name, value)
    if array.ndim != 2 + draws or array.shape[-1] < 2:
        averaged = " Average over the draws first: probabilities.mean(0)." if array.ndim == 3 else ""
        columns = " For two classes stack [1 - p, p]." if array.ndim == 1 else ""
        raise ValueError(
            f"{name} has shape {array.shape}; give probabilities (rows, classes) of two classes or more."
            + averaged
            + columns
        )
    _inside_unit_interval(name, array)
    sums = array.sum(-1)
    off = np.abs(sums - 1.0)
    if off.max() > (HALF_SUM_TOLERANCE if half else SUM_TOLERANCE):
        worst = np.unravel_index(off.argmax(), off.shape)
        row = ", ".join(str(int(index)) for index in worst)
        raise ValueError(
            f"{name} sums to {sums[worst]:.6g} in row {row}, not to one: give probabilities, the softmax of logits, "
            "averaged over the draws."
        )
    return np.minimum(array, 1.0)


def event_probabilities(name: str, value: Any) -> np.ndarray:
    """Probabilities of one event, ``(rows,)``.

    :raises ValueError: for another shape, or numbers outside [0, 1].
    """
    array = float_array(name, value)
    if array.ndim != 1:
        raise ValueError(f"{name} has shape {array.shape}; give the probabilities of one event, (rows,).")
    _inside_unit_interval(name, array)
    return np.minimum(array, 1.0)


def _inside_unit_interval(name: str, array: np.ndarray) -> None:
    if array.min() < 0.0 or array.max() > 1.0 + SUM_TOLERANCE:
        worst = array.min() if array.min() < 0.0 else array.max()
        raise ValueError(
            f"{name} holds {worst:.6g}, outside [0, 1]: give probabilities; of logits take softmax(-1) first."
        )


def class_labels(labels: Any, rows: int, classes: int) -> np.ndarray:
    """Labels ``(rows,)`` as whole numbers from 0 to classes - 1.

    :raises ValueError: for another shape, fractions, or labels out of range.
    """
    array = float_array("labels", labels)
    if array.shape != (rows,):
        hint = ""
        if array.shape == (rows, classes):
            hint = " Of one-hot labels take argmax(-1)."
        elif array.size == rows:
            hint = " Flatten them."
        raise ValueError(f"labels have shape {array.shape}; wanted is ({rows},), one label for each row.{hint}")
    whole = array.round()
    if (whole != array).any() or whole.min() < 0 or whole.max() >= classes:
        bad = array[(whole != array) | (whole < 0) | (whole >= classes)][0]
        raise ValueError(
            f"labels hold {bad:.6g}; wanted are whole numbers from 0 to {classes - 1}, one of the {classes} classes."
        )
    return whole.astype(int)


def probabilities_and_labels(probabilities: Any, labels: Any) -> tuple[np.ndarray, np.ndarray]:
    """Checked probabilities ``(rows, classes)`` and labels ``(rows,)``.

    :raises ValueError: as :func:`probability_rows` and :func:`class_labels`.
    """
    p = probability_rows("probabilities", probabilities)
    return p, class_labels(labels, *p.shape)


def samples_and_targets(samples: Any, targets: Any, fewest: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """Predictive samples ``(draws, rows, ...)`` and targets ``(rows, ...)``, both finite.

    :param fewest: number of draws needed.
    :raises ValueError: if the shapes do not fit each other, or there are too few draws.
    """
    x, y = finite_array("samples", samples), finite_array("targets", targets)
    if y.ndim < 1 or x.shape[1:] != y.shape:
        hint = ""
        if x.ndim == y.ndim + 2 and x.shape[2:] == y.shape:
            hint = " Flatten (chain, draw) of the samples into one dimension."
        elif x.ndim == y.ndim + 1 and x.shape[:-1] == y.shape:
            hint = " The draws come first."
        elif x[0].size == y.size:
            hint = " Give both the same trailing dimensions."
        raise ValueError(
            f"samples have shape {x.shape} and targets {y.shape}; wanted are (draws, rows, ...) and (rows, ...).{hint}"
        )
    if len(x) < fewest:
        raise ValueError(f"samples have {len(x)} draws; at least {fewest} are needed.")
    return x, y


def log_likelihood_rows(log_likelihood: Any, rows: int) -> np.ndarray:
    """Pointwise log-likelihoods ``(draws, rows)`` or ``(chain, draw, rows)``, as ``(draws, rows)``.

    :raises ValueError: for another shape, or plus infinity.
    """
    array = float_array("log_likelihood", log_likelihood)
    if array.ndim not in (2, 3) or array.shape[-1] != rows:
        raise ValueError(
            f"log_likelihood has shape {array.shape}; wanted is (draws, {rows}) or (chain, draw, {rows}): the log "
            "density of each row's targets under each draw."
        )
    if np.isposinf(array).any():
        raise ValueError("log_likelihood holds plus infinity: a predictive sd is zero; give it a positive one.")
    return array.reshape(-1, rows)


def fractions(name: str, values: float | Sequence[float]) -> list[float]:
    """Numbers strictly between zero and one.

    :raises ValueError: for others, or none.
    """
    found = [float(value) for value in np.atleast_1d(np.asarray(values, dtype=float))]
    if not found or not all(0.0 < value < 1.0 for value in found):
        raise ValueError(f"{name} is {values!r}; give numbers between 0 and 1, as in 0.9 or (0.5, 0.9).")
    return found


def whole_number(name: str, value: Any, least: int) -> int:
    """A whole number of at least ``least``.

    :raises ValueError: for another.
    """
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}.")
    return int(value)
