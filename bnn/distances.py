"""How far two predictive distributions are apart: the metrics of the 2021 competition on approximate inference.

    agreement = mean_n 1[argmax p_n = argmax q_n]        total variation = mean_n ½ Σ_k |p_nk - q_nk|

and for regression the Wasserstein distance of order 1 between two samples of each row, ∫|F(x) - G(x)| dx. The
competition calls it W2, but its code computes this one (Izmailov et al. 2021, ICML; Wilson et al. 2022, PMLR 176).

All three are symmetric, and 1, 0 and 0 for equal distributions. Two samples of S draws from one law are not at distance
zero: compare with the distance between two halves of the reference.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnn.predictive_arrays import finite_array, probability_rows


def agreement(p: Any, q: Any) -> float:
    """The part of rows in which two predictive distributions have the same most probable class.

    Of classes of equal probability the first counts.

    :param p: probabilities ``(rows, classes)``, averaged over draws.
    :param q: those of the reference, such as a long run of HMC; same shape.
    :raises ValueError: if something does not fit: shapes, sums, range, NaN.

    >>> from bnn import agreement
    >>> agreement([[0.9, 0.1], [0.6, 0.4]], [[0.7, 0.3], [0.4, 0.6]])
    0.5
    """
    first, second = _two(p, q)
    return float((first.argmax(-1) == second.argmax(-1)).mean())


def total_variation(p: Any, q: Any) -> float:
    """Mean over rows of the total variation distance, from 0 to 1: the largest difference in any event's probability.

    :param p: probabilities ``(rows, classes)``, averaged over draws.
    :param q: those of the reference, same shape.
    :raises ValueError: if something does not fit: shapes, sums, range, NaN.

    >>> from bnn import total_variation
    >>> round(total_variation([[0.9, 0.1], [0.6, 0.4]], [[0.7, 0.3], [0.4, 0.6]]), 6)
    0.2
    """
    first, second = _two(p, q)
    return float(0.5 * np.abs(first - second).sum(-1).mean())


def _two(p: Any, q: Any) -> tuple[np.ndarray, np.ndarray]:
    first, second = probability_rows("p", p), probability_rows("q", q)
    if first.shape != second.shape:
        raise ValueError(
            f"p has shape {first.shape} and q {second.shape}; give probabilities of the same rows and classes."
        )
    return first, second


def wasserstein(p: Any, q: Any) -> np.ndarray:
    """The Wasserstein distance of order 1 between two samples, of each row (and output) by itself, in its units.

    :param p: draws from a predictive, ``(draws, rows, ...)``.
    :param q: draws from the reference, ``(draws, rows, ...)``; their number may differ.
    :return: ``(rows, ...)``.
    :raises ValueError: if something does not fit: shapes, NaN.

    >>> from bnn import wasserstein
    >>> wasserstein([[0.0, 1.0], [1.0, 3.0]], [[0.5, 5.0], [1.5, 5.0]]).tolist()
    [0.5, 3.0]
    """
    from scipy.stats import wasserstein_distance

    first, second = finite_array("p", p), finite_array("q", q)
    if first.ndim < 2 or first.shape[1:] != second.shape[1:]:
        raise ValueError(
            f"p has shape {first.shape} and q {second.shape}; wanted are (draws, rows, ...) of the same rows."
        )
    columns = zip(first.reshape(len(first), -1).T, second.reshape(len(second), -1).T, strict=True)
    return np.array([wasserstein_distance(a, b) for a, b in columns]).reshape(first.shape[1:])
