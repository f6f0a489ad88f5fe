"""Predictions beside what was observed, on held-out data where there are any."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn.draw_blocks import evenly
from bnn.report_data import RunData
from bnn.report_plots import INK, Panel, panel

# Whole numbers of more values than this are counts, not classes.
MOST_CLASSES = 100

# So many rows and draws are compared, evenly spaced.
MOST_ROWS, MOST_DRAWS = 2000, 500

# Draws and rows that are drawn one by one, and the interval that is shown.
SHOWN_ROWS, LEVEL = 300, 0.9

# By so many standard errors a frequency may differ from the probability that it was drawn with.
AGREEMENT = 6.0


@dataclass(frozen=True)
class Predicted:
    """Predictions for one observed site.

    :ivar site: its name.
    :ivar truth: what was observed, ``(rows, ...)``.
    :ivar samples: draws of the prediction, ``(draws, rows, ...)``; None if only probabilities are known.
    :ivar probabilities: of the classes, averaged over the posterior, ``(rows, classes)``; None for a regression.
    :ivar of_draws: probabilities under each draw, ``(draws, rows, classes)``; None where those above are how often each
        class was drawn.
    :ivar held_out: whether the data are not those of the fit.
    :ivar rows: how many rows there are in all.
    """

    site: str
    truth: np.ndarray
    samples: np.ndarray | None
    probabilities: np.ndarray | None
    of_draws: np.ndarray | None
    held_out: bool
    rows: int

    @property
    def whose(self) -> str:
        """In words: which data these are."""
        kind = "held-out" if self.held_out else "training"
        return f"{self.rows:,} rows of {kind} data"


def predicted(data: RunData) -> Iterator[Predicted]:
    """Predictions for each observed site: on held-out targets where given, else on the data of the fit."""
    new, targets = data.groups.get("predictions", {}), data.groups.get("predictions_constant_data", {})
    fitted, observed = data.groups.get("posterior_predictive", {}), data.groups.get("observed_data", {})
    held_out = [str(name) for name in new if name in targets]
    for site in dict.fromkeys([*held_out, *map(str, observed)]):
        is_new = site in held_out
        truth = np.asarray((targets if is_new else observed)[site].values)
        source = new if is_new else fitted
        samples = _flat(source[site]) if site in source else None
        if samples is not None and samples.shape[1:] != truth.shape:
            samples = None
        kinds = {str(v.attrs.get("kind")) for v in data.functions.values() if str(v.attrs["function_of"]) == site}
        classes = _are_classes(truth, samples, kinds)
        if not truth.size or truth.dtype.kind not in "fiub" or not np.isfinite(truth).all():
            continue
        probabilities, of_draws = _probabilities(data, site, truth, samples) if classes else (None, None)
        if samples is None and probabilities is None:
            continue
        rows = evenly(len(truth), MOST_ROWS) if truth.ndim else ...
        yield Predicted(
            site,
            truth[rows],
            None if samples is None else samples[evenly(len(samples), MOST_DRAWS)][:, rows],
            None if probabilities is None else probabilities[rows],
            None if of_draws is None else of_draws[evenly(len(of_draws), MOST_DRAWS)][:, rows],
            is_new,
            len(truth) if truth.ndim else 1,
        )


def _flat(variable: Any) -> np.ndarray:
    """Draws of all chains, ``(draws, ...)``."""
    others = [dim for dim in variable.dims if dim not in ("chain", "draw")]
    values = np.asarray(variable.transpose("chain", "draw", *others).values)
    return values.reshape(-1, *values.shape[2:])


def _are_classes(truth: np.ndarray, samples: np.ndarray | None, kinds: set[str]) -> bool:
    """Told by the kind of the function where one is given, else by the values: few whole numbers from 0."""
    if "probability" in kinds:
        return True
    if "mean" in kinds:
        return False
    values = np.unique(truth if samples is None else np.concatenate([truth.ravel(), np.unique(samples)]))
    if truth.ndim != 1 or not np.array_equal(values, np.round(values)) or values.min() < 0:
        return False
    if truth.dtype.kind == "f":
        return bool(values.max() <= 1)
    return bool(values.max() < MOST_CLASSES and len(values) == values.max() + 1 and len(values) < len(truth))


def _probabilities(
    data: RunData, site: str, truth: np.ndarray, samples: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Probabilities of the classes, those of the function if they are of these rows, and those of each draw.

    Else it is how often each class was drawn.
    Labels are drawn from the probabilities one by one, so that frequencies of N draws lie within a few √(p(1−p)/N) of
    their mean, however the chains mix; a function of other rows fails that.
    """
    if truth.ndim != 1:
        return None, None
    frequencies = None
    if samples is not None:
        count = int(max(truth.max(), samples.max())) + 1
        frequencies = np.stack([(samples == label).mean(0) for label in range(max(2, count))], -1)
    for variable in data.functions.values():
        if str(variable.attrs["function_of"]) != site or str(variable.attrs.get("kind")) != "probability":
            continue
        each = _flat(variable)
        each = np.stack([1.0 - each, each], -1) if each.ndim == 2 else each
        mean = each.mean(0, dtype=float)
        if mean.ndim != 2 or len(mean) != len(truth) or truth.max() >= mean.shape[1]:
            continue
        if frequencies is None:
            return mean, each
        width = max(mean.shape[1], frequencies.shape[1])
        padded = np.pad(mean, ((0, 0), (0, width - mean.shape[1])))
        seen = np.pad(frequencies, ((0, 0), (0, width - frequencies.shape[1])))
        error = np.sqrt(padded * (1.0 - padded) / len(samples)) + 1.0 / len(samples)  # type: ignore[arg-type]
        if (np.abs(seen - padded) <= AGREEMENT * error).all():
            return mean, each
    return frequencies, None


# ---- the check: would the model give data like these


def of_predictions(found: Predicted) -> list[Panel]:
    """Data beside draws of data, and each row beside its prediction."""
    if found.probabilities is not None:
        return [_class_frequencies(found)]
    if found.samples is None:
        return []
    return [_distribution(found), _intervals(found)]


def _distribution(found: Predicted) -> Panel:
    samples, truth = np.asarray(found.samples, dtype=float), found.truth.astype(float)
    samples = samples.reshape(len(samples), -1)

    def draw(axes: Any) -> None:
        low, high = np.quantile(np.concatenate([truth.ravel(), samples[:: max(1, len(samples) // 50)].ravel()]), [0, 1])
        edges = np.linspace(low, high, 31)
        drawn = np.stack([np.histogram(one, edges)[0] for one in samples]) / truth.size
        lower, middle, upper = np.quantile(drawn, [(1 - LEVEL) / 2, 0.5, (1 + LEVEL) / 2], axis=0)
        axes.stairs(upper, edges, baseline=lower, fill=True, alpha=0.35, label="drawn, 90 %")
        axes.stairs(middle, edges, color="C0", linewidth=1.0, label="drawn, median")
        axes.stairs(np.histogram(truth, edges)[0] / truth.size, edges, color=INK, linewidth=1.2, label="observed")

    return panel(
        f"Distribution of {found.site}", draw, found.site, "share of rows", "Observed data should lie in the band."
    )


def _intervals(found: Predicted) -> Panel:
    samples, truth = np.asarray(found.samples, dtype=float), found.truth.astype(float).ravel()
    samples = samples.reshape(len(samples), -1)
    inside = _inside(samples, truth)

    def draw(axes: Any) -> None:
        shown = evenly(len(truth), SHOWN_ROWS)
        mean = samples[:, shown].mean(0)
        low, high = np.quantile(samples[:, shown], [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
        axes.vlines(mean, low, high, color="C0", alpha=0.25, linewidth=1.0, label="90 % interval")
        axes.plot(mean, truth[shown], "o", color="C1", markersize=2.4, alpha=0.9, label="observed")
        ends = [mean.min(), mean.max()]
        axes.plot(ends, ends, color=INK, linewidth=0.8, linestyle="--")

    caption = f"{100 * inside:.3g} % of the observed values lie in their 90 % interval."
    return panel(f"{found.site}, observed against predicted", draw, "predicted mean", "observed", caption)


def _inside(samples: np.ndarray, truth: np.ndarray) -> float:
    low, high = np.quantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return float(((truth >= low) & (truth <= high)).mean())


def _class_frequencies(found: Predicted) -> Panel:
    assert found.probabilities is not None
    probabilities, truth = found.probabilities, found.truth.astype(int)
    classes = np.arange(probabilities.shape[1])

    def draw(axes: Any) -> None:
        # Given the averaged probabilities, rows are drawn one by one.
        expected = probabilities.mean(0)
        error = np.sqrt((probabilities * (1.0 - probabilities)).sum(0)) / len(truth)
        axes.bar(classes, expected, width=0.7, alpha=0.45, label="predicted")
        axes.errorbar(classes, expected, 2.0 * error, fmt="none", ecolor="C0", linewidth=1.2)
        axes.plot(
            classes, np.bincount(truth, minlength=len(classes)) / len(truth), "o", color=INK, markersize=3.5,
            label="observed",
        )  # fmt: skip
        if len(classes) <= 12:
            axes.set_xticks(classes)

    return panel(
        f"Classes of {found.site}", draw, "class", "share of rows", "Lines: 2 standard errors of so many rows."
    )
