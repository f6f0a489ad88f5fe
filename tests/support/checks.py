"""Checks of laws, each with a known false-alarm rate."""

from itertools import combinations

import numpy as np
from scipy import stats

# The probability that a check of this file fails although the law holds. Seeds are fixed and samples never redrawn.
ALPHA = 1e-6


def variance_p_value(sample: np.ndarray, variance: float) -> float:
    """Two-sided p-value of independent draws from N(0, variance), by Σx²/variance ~ χ²_n."""
    statistic, freedom = float(np.square(sample).sum()) / variance, np.size(sample)
    return float(2 * min(stats.chi2.cdf(statistic, freedom), stats.chi2.sf(statistic, freedom)))


def assert_variance(name: str, sample: np.ndarray, variance: float, alpha: float = ALPHA) -> None:
    """Fail, once in 1/alpha times without cause, unless ``sample`` are independent draws from N(0, variance)."""
    sample = np.asarray(sample, dtype=float).ravel()
    assert sample.size >= 100_000, "too few draws for a sharp check"
    p_value = variance_p_value(sample, variance)
    ratio = float(np.mean(sample**2)) / variance
    assert p_value > alpha, f"{name}: the variance is {ratio:.5f} times the law's {variance:.6g} (p = {p_value:.1e})"


def assert_covariance(names: list[str], sample: np.ndarray, covariance: np.ndarray, alpha: float = ALPHA) -> None:
    """Fail unless the rows of ``sample`` ``(n, k)`` are independent draws from N(0, covariance).

    Each coordinate is checked by its variance, each pair by the variances of the sum and difference of the two in
    units of their standard deviations. The false alarms of all of them together stay below ``alpha``.
    """
    scale = np.sqrt(np.diag(covariance))
    unit = np.asarray(sample, dtype=float) / scale
    pairs = list(combinations(range(len(names)), 2))
    alpha = alpha / (len(names) + 2 * len(pairs))
    for i, name in enumerate(names):
        assert_variance(name, unit[:, i] * scale[i], float(covariance[i, i]), alpha)
    for i, j in pairs:
        correlation = float(covariance[i, j] / (scale[i] * scale[j]))
        for sign in (1, -1):
            label = f"{names[i]} {'+' if sign > 0 else '-'} {names[j]}"
            assert_variance(label, unit[:, i] + sign * unit[:, j], 2 * (1 + sign * correlation), alpha)


def assert_mean(name: str, sample: np.ndarray, mean: float, variance: float, alpha: float = ALPHA) -> None:
    """Fail unless the mean of independent draws with known mean and variance is near it, by the central limit."""
    sample = np.asarray(sample, dtype=float).ravel()
    assert sample.size >= 100_000, "too few draws for the normal approximation"
    z = (sample.mean() - mean) / np.sqrt(variance / sample.size)
    assert abs(z) < stats.norm.isf(alpha / 2), f"{name}: the mean is {sample.mean():.5f}, not {mean:.5f} ({z:.1f} s.e.)"
