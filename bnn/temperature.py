"""The temperature that a run asked for, beside the one that it had.

Kinetic: rᵀM⁻¹r / d, whose expectation is T; over K independent draws d·K times it is T·χ²_{dK}.
Configurational: zᵀ∇U(z) / d, whose expectation is T for any confining U (the virial theorem).

Both hold for each site by itself, and for d numbers of it: its momenta are independent of the others, and zₗᵀ∇ₗU
integrates by parts.

Leimkuhler and Matthews (2015), "Molecular dynamics", section 6.1.5; Wenzel et al. (2020), ICML, appendix I.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from scipy import stats


class MeasuredTemperature(NamedTuple):
    """A temperature measured over a run.

    :ivar mean: its mean over chains and draws.
    :ivar error: Monte Carlo standard error of the mean.
    :ivar low: lower end of the region in which the mean of an unbiased run lies with 99 % probability.
    :ivar high: upper end of that region.
    """

    mean: float
    error: float
    low: float
    high: float


def kinetic_region(temperature: float, dim: int, draws: float, level: float = 0.99) -> tuple[float, float]:
    """The central region of the mean kinetic temperature of ``draws`` independent momenta: T·χ²_{dK}/(dK).

    >>> low, high = kinetic_region(1.0, dim=100, draws=10)
    >>> round(low, 3), round(high, 3)
    (0.889, 1.119)
    """
    freedom = max(dim * draws, 1e-12)
    tail = (1.0 - level) / 2.0
    low, high = stats.chi2.ppf([tail, 1.0 - tail], freedom) / freedom
    return float(temperature * low), float(temperature * high)


def effective_draws(values: np.ndarray) -> float:
    """Effective number of draws in a statistic ``(chains, draws)``, by Pyro's and ArviZ's estimator of Geyer."""
    from arviz import ess

    chains, draws = values.shape
    if draws < 4 or not np.ptp(values) > 0:
        return float(chains)
    return float(np.clip(np.asarray(ess(np.asarray(values, dtype=float), method="mean")), 1.0, chains * draws))


def measure(sample_stats: Mapping[str, Any], name: str, dim: int, level: float = 0.99) -> MeasuredTemperature:
    """Mean of the statistic ``name`` with its error and the region expected at the temperature asked for.

    Chains that diverged are left out, unless all did.

    :param sample_stats: statistics ``(chains, draws)``; must hold ``name`` and ``temperature``.
    :param name: ``"kinetic_temperature"`` or ``"configurational_temperature"``.
    :param dim: number of coordinates d.
    """
    values = np.asarray(sample_stats[name], dtype=float)
    whole = ~np.asarray(sample_stats.get("diverging", np.zeros_like(values)), dtype=bool).any(-1)
    values = values[whole] if whole.any() else values
    asked = float(np.mean(np.asarray(sample_stats["temperature"], dtype=float)))
    draws = effective_draws(values)
    error = float(values.std() / np.sqrt(draws))
    if name == "kinetic_temperature":
        low, high = kinetic_region(asked, dim, draws, level)
    else:  # approximately normal about T with the measured spread
        width = float(stats.norm.ppf(0.5 + level / 2.0)) * error
        low, high = asked - width, asked + width
    return MeasuredTemperature(float(values.mean()), error, low, high)


def wrong_temperature(sample_stats: Mapping[str, Any], dim: int, tolerance: float = 0.2) -> str | None:
    """What to say of a run whose momenta were not at the temperature asked for; None if they were.

    The kinetic temperature settles within a few times 1/friction, long before the positions do: where it is off by
    more than ``tolerance``, and by more than chance allows, the draws are not from the law asked for.
    """
    if "kinetic_temperature" not in sample_stats:
        return None
    asked = float(np.mean(np.asarray(sample_stats["temperature"], dtype=float)))
    mean = float(np.mean(np.asarray(sample_stats["kinetic_temperature"], dtype=float)))
    if asked == 0.0 or abs(mean - asked) <= tolerance * asked:  # the usual case needs no effective sample size
        return None
    m = measure(sample_stats, "kinetic_temperature", dim, level=0.9999)
    if m.low <= m.mean <= m.high or abs(m.mean - asked) <= tolerance * asked:
        return None
    remedy = (
        "minibatch noise (or a long step of the symplectic_euler integrator) heats them: use a smaller step_size, "
        "larger minibatches, or more friction"
        if m.mean > asked
        else "they have not settled, or the step is long for the baoab integrator: use more warm-up, more friction, or "
        "a smaller step_size"
    )
    if "implied_temperature" in sample_stats:
        implied = np.asarray(sample_stats["implied_temperature"], dtype=float)
        if not np.allclose(implied, asked, rtol=tolerance):
            remedy = "momentum_scale draws them at another: leave it 'auto'"
    return f"the chains ran at kinetic temperature {m.mean:.3g}, not at the {asked:.3g} asked for; {remedy}."


LABELS = {"configurational_temperature": "positions", "kinetic_temperature": "momenta"}


def verdict(
    sample_stats: Mapping[str, Any], dim: int, tolerance: float = 0.05, sites: Mapping[str, int] | None = None
) -> str:
    """In words: whether the law that was measured is the one that was asked for, and if not, what likely is the cause.

    A measured temperature counts as the one asked for if it lies within ``tolerance`` of it or inside its 99 % region;
    those of sites, inside the region that all of them share with 99 %. The site that is farthest off is named.

    :param sites: name -> number of coordinates, in the order of the statistics per site.

    >>> stats = {"temperature": np.ones((1, 9)), "kinetic_temperature": np.ones((1, 9))}
    >>> verdict(stats, dim=100)
    'asked T = 1, measured 1 +- 0 (momenta): as asked.'
    """
    asked = float(np.mean(np.asarray(sample_stats["temperature"], dtype=float)))
    found = {label: measure(sample_stats, name, dim) for name, label in LABELS.items() if name in sample_stats}
    said = ", ".join(f"{_to_its_error(m)} ({label})" for label, m in found.items())
    off = {label: m for label, m in found.items() if not _is_near(m, asked, tolerance)}
    worst = worst_site(sample_stats, sites or {}, tolerance)
    if worst is not None:
        name, label, m = worst
        off.setdefault(label, m)
        said += f", site {name!r} at {_to_its_error(m)} ({label})"
    heat = float(np.mean(np.asarray(sample_stats.get("noise_temperature", asked), dtype=float)))
    if "noise_temperature" in sample_stats:
        said = ", ".join([*([said] if said else []), f"{heat:.3g} (minibatch noise)"])
    if not off and np.isclose(heat, asked, rtol=tolerance):
        return f"asked T = {asked:.3g}, measured {said}: as asked."
    return f"asked T = {asked:.3g}, but measured {said}: {_cause(sample_stats, asked, off)}."


def _to_its_error(m: MeasuredTemperature) -> str:
    """The mean to the first digit of its error."""
    if not 0.0 < m.error < 1.0:
        return f"{m.mean:.3g} +- {m.error:.1g}"
    return f"{m.mean:.{min(6, -math.floor(math.log10(m.error)))}f} +- {m.error:.1g}"


def _is_near(m: MeasuredTemperature, asked: float, tolerance: float) -> bool:
    return m.low <= m.mean <= m.high or abs(m.mean - asked) <= tolerance * asked


def worst_site(
    sample_stats: Mapping[str, Any], sites: Mapping[str, int], tolerance: float = 0.05
) -> tuple[str, str, MeasuredTemperature] | None:
    """The site farthest from the temperature asked for, ``"momenta"`` or ``"positions"``, and what was measured there.

    None if all sites are where an unbiased run has all of them with 99 % (Bonferroni), or within ``tolerance``.
    """
    asked = float(np.mean(np.asarray(sample_stats["temperature"], dtype=float)))
    found: list[tuple[float, str, str, MeasuredTemperature]] = []
    if len(sites) < 2 or asked == 0.0:
        return None
    for kind, label in LABELS.items():
        if f"site_{kind}" not in sample_stats:
            continue
        values = np.asarray(sample_stats[f"site_{kind}"], dtype=float)
        for column, (name, size) in enumerate(sites.items()):
            m = measure({**sample_stats, kind: values[..., column]}, kind, size, level=1.0 - 0.01 / len(sites))
            if not _is_near(m, asked, tolerance):
                found.append((abs(m.mean - asked), name, label, m))
    return max(found, key=lambda one: one[0])[1:] if found else None


def _cause(sample_stats: Mapping[str, Any], asked: float, off: Mapping[str, MeasuredTemperature]) -> str:
    if not np.allclose(np.asarray(sample_stats.get("noise_temperature", asked), dtype=float), asked, rtol=0.05):
        return (
            "only the noise of the minibatches heats the chains; use step_size='auto', or other minibatches where that "
            "already is the longest stable step"
        )
    implied = np.asarray(sample_stats.get("implied_temperature", asked), dtype=float)
    if not np.allclose(implied, asked, rtol=0.05):
        return "momentum_scale draws momenta at another temperature; leave it 'auto'"
    if "momenta" in off:
        if off["momenta"].mean > asked:
            return (
                "noise of the minibatch gradients heats the chains, or a long step of symplectic_euler the momenta "
                "alone; smaller step_size or larger minibatches"
            )
        return (
            "the momenta have not settled, or the step is long for baoab, whose momenta are then too cold and "
            "positions right; more warm-up or friction, or a smaller step_size"
        )
    if off["positions"].mean > asked:
        return (
            "the step_size is too large for the steepest directions, or the chains still descend; halve it and compare"
        )
    return "the chains have not spread yet; more warm-up or a larger step_size"


def describe_temperatures(sample_stats: Mapping[str, Any], dim: int) -> str:
    """One line: the temperature asked for, the measured ones, and where they should lie."""
    asked = float(np.mean(np.asarray(sample_stats["temperature"], dtype=float)))
    parts = [f"Temperature: asked {asked:.4g}"]
    for name in ("kinetic_temperature", "configurational_temperature"):
        if name in sample_stats:
            m = measure(sample_stats, name, dim)
            label = name.split("_")[0]
            parts.append(f"{label} {m.mean:.4g} +- {m.error:.2g} (99 % region [{m.low:.4g}, {m.high:.4g}])")
    if "noise_temperature" in sample_stats:
        heat = float(np.mean(np.asarray(sample_stats["noise_temperature"], dtype=float)))
        parts.append(f"{heat:.4g} by the noise of the minibatches")
    if "implied_temperature" in sample_stats:
        implied = float(np.mean(np.asarray(sample_stats["implied_temperature"], dtype=float)))
        parts.append(f"momentum_scale implies {implied:.4g} where only the prior holds")
    return "; ".join(parts)
