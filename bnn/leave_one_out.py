"""LOO and WAIC by ArviZ, read out in words.

elpd = Σ_n log p(y_n | the other rows), by Pareto-smoothed importance sampling from the draws of one run (Vehtari,
Gelman and Gabry 2017, Statistics and Computing; Vehtari et al. 2024, JMLR 25(72)). The shape k of the largest weights
of a row says whether its term can be believed, of S draws:

    k ≤ min(1 - 1/log₁₀S, 0.7)   good
    k ≤ 0.7                      good with more draws: 10^(1/(1 - k)) of them
    k ≤ 1                        bad: biased, and the more draws needed are out of reach
    k > 1                        very bad: the weights have no mean

Both estimate how well the *posterior* predicts. Draws at another temperature than 1, from a guide, or from a kernel
that does not sample the posterior are not reweighted into it, and the report says so.

This file needs neither torch nor Pyro.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn.arviz_data import assemble

FEWEST_DRAWS = 25
# Relative efficiency is measured on this many rows, evenly spaced.
ROWS_FOR_EFFICIENCY = 200
# Above this variance of a row's log density WAIC is not to be believed (Vehtari, Gelman and Gabry 2017).
LARGEST_VARIANCE = 0.4


@dataclass(frozen=True)
class LOOReport:
    """LOO and WAIC with what is to be made of them.

    :ivar elpd: expected log predictive density of LOO, in nats, summed over rows.
    :ivar error: its standard error over rows.
    :ivar p_loo: effective number of parameters.
    :ivar good_k: largest k that is good with this number of draws.
    :ivar pareto_k: ``(rows,)``, NaN where a row has no weights since no draw changes its density.
    :ivar counts: how many rows are ``"good"``, ``"good with more draws"``, ``"bad"``, ``"very bad"``.
    :ivar lines: all of it in words.
    """

    elpd: float
    error: float
    p_loo: float
    good_k: float
    pareto_k: np.ndarray
    counts: Mapping[str, int]
    lines: tuple[str, ...]

    def __str__(self) -> str:
        return "\n".join(self.lines)


def loo_report(idata: Any, *, var_name: str | None = None) -> LOOReport:
    """LOO, WAIC and Pareto k of a run in words: what they are, whether to believe them, and what to do if not.

    WAIC is left out under ArviZ 1.x, which has it no longer.

    :param idata: data of ArviZ with the group ``log_likelihood``, as ``bnn.to_arviz`` gives them.
    :param var_name: the observed site, if there are several.
    :raises ValueError: without the group, for fewer than 25 draws, for densities that are NaN or infinite, for several
        sites without ``var_name``; under ArviZ 1.x, for a chain that stood still.

    >>> import numpy as np
    >>> from bnn import loo_report
    >>> from bnn.arviz_data import assemble
    >>> theta = np.random.default_rng(0).normal(0.0, 0.1, (4, 500, 1))
    >>> y = np.linspace(-2.0, 2.0, 100)
    >>> report = loo_report(assemble({"log_likelihood": {"y": -0.5 * (y - theta) ** 2 - 0.919}}))
    >>> print(report.lines[1])
    Pareto k: good in all 100 rows (k <= 0.697).
    """
    densities, attrs = _log_likelihood(idata, var_name)
    rows = densities.shape[-1]
    varies = np.ptp(densities.reshape(-1, rows), axis=0) > 0
    if not varies.any():
        raise ValueError("log_likelihood is the same in all draws: there is nothing to reweight.")
    found = _loo(densities[..., varies])
    k = np.full(rows, math.nan)
    k[varies] = found["k"]
    counts = _counts(k[varies], found["good_k"])
    draws = densities.shape[0] * densities.shape[1]
    lines = [
        f"LOO of {varies.sum()} rows from {draws} draws: elpd = {found['elpd']:.6g} +- {found['error']:.2g} "
        f"({found['elpd'] / varies.sum():.4g} per row), p_loo = {found['p_loo']:.3g}.",
        *_k_in_words(k, counts, found["good_k"], draws),
        *_waic_in_words(densities[..., varies], found["elpd"]),
        *_what_was_drawn(attrs),
    ]
    if not varies.all():
        lines.insert(1, f"{(~varies).sum()} rows that no draw changes (masked ones, for instance) are left out.")
    return LOOReport(found["elpd"], found["error"], found["p_loo"], found["good_k"], k, counts, tuple(lines))


def _log_likelihood(idata: Any, var_name: str | None) -> tuple[np.ndarray, Mapping[str, Any]]:
    """Log densities ``(chain, draw, rows)``, and the attributes of the posterior."""
    try:
        group = idata["log_likelihood"]
        names = [str(name) for name in group.data_vars]
    except (KeyError, TypeError, AttributeError, IndexError):
        raise ValueError(
            f"idata is {type(idata).__name__} without a group log_likelihood; give bnn.to_arviz(run), or "
            "bnn.to_arviz(run, log_likelihood=True) where it was left out."
        ) from None
    if var_name is None and len(names) != 1:
        raise ValueError(f"log_likelihood has the sites {names}; say which by var_name=.")
    if var_name is not None and var_name not in names:
        raise ValueError(f"var_name is {var_name!r}; log_likelihood has the sites {names}.")
    values = group[var_name or names[0]].transpose("chain", "draw", ...).values.astype(float)
    values = values.reshape(*values.shape[:2], -1)
    if values.shape[0] * values.shape[1] < FEWEST_DRAWS:
        raise ValueError(f"log_likelihood has {values.shape[0] * values.shape[1]} draws; LOO needs {FEWEST_DRAWS}.")
    bad = ~np.isfinite(values)
    if bad.any():
        row = int(bad.any((0, 1)).argmax())
        raise ValueError(
            f"log_likelihood is NaN or infinite in {int(bad.sum())} of {bad.size} places, first in row {row}: leave "
            "out the chains that diverged, or a row that a draw thinks impossible."
        )
    try:
        return values, idata["posterior"].attrs
    except KeyError:
        return values, {}


def _loo(densities: np.ndarray) -> dict[str, Any]:
    """ArviZ's LOO under one set of names: those of 0.x and of 1.x differ."""
    import arviz

    data = assemble({"log_likelihood": {"y": densities}, "posterior": {"y": densities[..., 0]}})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Estimated shape parameter", category=UserWarning)
        warnings.filterwarnings("ignore", message="The point-wise LOO is the same", category=UserWarning)
        efficiency = _relative_efficiency(densities)
        try:
            found = arviz.loo(data, pointwise=True, var_name="y", reff=efficiency, **_log_scale(arviz))
        except ValueError as error:  # ArviZ 1.x refuses where the smallest densities of a row are all equal
            raise ValueError(
                f"ArviZ cannot smooth the weights of some row ({error}): many draws repeat one density, as those of a "
                "chain that stood still or diverged. Leave such chains out."
            ) from error
    old = not hasattr(found, "elpd")
    return {
        "elpd": float(found["elpd_loo"] if old else found.elpd),
        "error": float(found["se"]),
        "p_loo": float(found["p_loo"] if old else found.p),
        "good_k": float(found["good_k"]),
        "k": np.asarray(found["pareto_k"], dtype=float).ravel(),
    }


def _log_scale(arviz: Any) -> dict[str, str]:
    """ArviZ 0.x has three scales and a default that users may change."""
    return {"scale": "log"} if hasattr(arviz, "waic") else {}


def _relative_efficiency(densities: np.ndarray) -> float:
    """Effective number of draws by their number, of the likelihoods of some rows.

    ArviZ would take those of the weights, which in a net mix worse than anything it predicts.
    """
    from arviz import ess

    chosen = np.unique(np.linspace(0, densities.shape[-1] - 1, ROWS_FOR_EFFICIENCY).astype(int))
    part = densities[..., chosen]
    likelihood = np.exp(part - part.max((0, 1)))
    sizes = [float(np.asarray(ess(likelihood[..., i], method="mean"))) for i in range(len(chosen))]
    return float(np.mean(sizes) / (densities.shape[0] * densities.shape[1]))


def _counts(k: np.ndarray, good_k: float) -> dict[str, int]:
    return {
        "good": int((k <= good_k).sum()),
        "good with more draws": int(((k > good_k) & (k <= 0.7)).sum()),
        "bad": int(((k > max(good_k, 0.7)) & (k <= 1.0)).sum()),
        "very bad": int((~(k <= 1.0)).sum()),
    }


def _k_in_words(k: np.ndarray, counts: Mapping[str, int], good_k: float, draws: int) -> Iterator[str]:
    rows = sum(counts.values())
    if counts["good"] == rows:
        yield f"Pareto k: good in all {rows} rows (k <= {good_k:.3g})."
        return
    limits = {
        "good": f"k <= {good_k:.3g}",
        "good with more draws": f"{good_k:.3g} < k <= 0.7",
        "bad": "0.7 < k <= 1",
        "very bad": "k > 1",
    }
    parts = [f"{count} {words} ({limits[words]})" for words, count in counts.items() if count]
    yield f"Pareto k of {rows} rows: {', '.join(parts)}."
    middle = k[(k > good_k) & (k <= 0.7)]
    if len(middle):
        needed = 10.0 ** (1.0 / (1.0 - float(middle.max())))
        yield f"{len(middle)} of them need more draws: some {needed:.0f}, there are {draws}."
    wrong = counts["bad"] + counts["very bad"]
    if not wrong:
        return
    order = np.argsort(-np.where(np.isnan(k), -math.inf, k), kind="stable")[: min(wrong, 5)]
    worst = ", ".join(f"{row} (k = {k[row]:.2g})" for row in order)
    yield (
        f"elpd is not to be believed for {wrong} rows, and is likely too high: the posterior without such a row is too "
        f"far from the one with it. The worst rows: {worst}. Look at them; score held-out rows or fit again by K-fold "
        "cross-validation in place of LOO; a likelihood with heavier tails or a stronger prior lets single rows weigh "
        "less. (Moment matching is not offered: more draws do not mend these.)"
    )


def _waic_in_words(densities: np.ndarray, elpd_loo: float) -> Iterator[str]:
    import arviz

    if not hasattr(arviz, "waic"):
        return
    data = assemble({"log_likelihood": {"y": densities}})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="For one or more samples", category=UserWarning)
        warnings.filterwarnings("ignore", message="The point-wise WAIC is the same", category=UserWarning)
        found = arviz.waic(data, pointwise=True, var_name="y", scale="log")
    doubtful = int((densities.var((0, 1)) > LARGEST_VARIANCE).sum())
    doubt = (
        f" In {doubtful} rows the variance of the log density exceeds {LARGEST_VARIANCE}: believe LOO instead."
        if doubtful
        else ""
    )
    yield (
        f"WAIC: elpd = {found['elpd_waic']:.6g} +- {found['se']:.2g}, p_waic = {found['p_waic']:.3g}, "
        f"{found['elpd_waic'] - elpd_loo:+.2g} from LOO.{doubt}"
    )


def _what_was_drawn(attrs: Mapping[str, Any]) -> Iterator[str]:
    """Why the draws may not be those that LOO asks for."""
    temperature = attrs.get("temperature", 1.0)
    if isinstance(temperature, str) or not math.isclose(float(temperature), 1.0):
        said = temperature if isinstance(temperature, str) else f"{float(temperature):.4g}"
        yield (
            f"The chains ran at temperature {said}, not 1: LOO and WAIC then do not estimate how well these draws "
            "predict. Score held-out rows, with bnn.classification_scores or bnn.regression_scores."
        )
    if "guide" in attrs:
        yield (
            f"The draws are from a guide, {attrs['guide']}: LOO and WAIC take them for the posterior, and are as wrong "
            "as the guide is. Score held-out rows beside them."
        )
    if "caveat" in attrs:
        yield f"Of the draws: {attrs['caveat']}"
