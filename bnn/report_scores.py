"""Calibration, scores and leave-one-out of a report, by :mod:`bnn.calibration`, :mod:`bnn.predictive_ranks`,
:mod:`bnn.scoring` and :mod:`bnn.leave_one_out`.

Random numbers that calibration needs come from a generator of its own, so that a page is the same each time and the
user's generators stay where they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnn.leave_one_out import loo_report
from bnn.report_data import RunData
from bnn.report_findings import CAUTION, NOTE, Finding
from bnn.report_plots import Panel, panel
from bnn.report_predictive import Predicted
from bnn.report_sections import Section, Table, number

# Above this many numbers of log-likelihood LOO takes minutes.
LARGEST_LOO = 10_000_000

# Outputs of a regression that are looked at one by one; of more, all are put together.
MOST_OUTPUTS = 4

# Pareto k above this is shown as this.
LARGEST_K = 1.5

# A p-value below this is put in words.
P_VALUE = 0.01

WORDS = {
    "nll": "negative log-likelihood", "brier": "Brier score", "accuracy": "accuracy",
    "ece": "expected calibration error", "rmse": "RMSE of the mean", "mae": "MAE of the median", "crps": "CRPS",
    "coverage_0.5": "inside their 50 % interval", "width_0.5": "width of 50 % intervals",
    "coverage_0.9": "inside their 90 % interval", "width_0.9": "width of 90 % intervals",
}  # fmt: skip


@dataclass
class Judged:
    """A section with what it gives to say at the top of the page.

    :ivar section: None if it cannot be made.
    :ivar findings: for the top of the page.
    :ivar left_out: what could not be made, and how to get it.
    :ivar tiles: label and figure.
    """

    section: Section | None = None
    findings: list[Finding] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    tiles: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def own_generator() -> Iterator[None]:
    """Torch's global generator from a fixed seed, put back afterwards."""
    import torch

    from bnn.randomness import kept_randomness

    with kept_randomness():
        torch.manual_seed(0)
        yield


def of_calibration(found: Predicted) -> Judged:
    """Scores and calibration of predictions, on held-out data if these are."""
    if found.truth.ndim == 0 or len(found.truth) < 2:
        return Judged()
    whose = f"On {found.whose}."
    if not found.held_out:
        whose += " The net has seen these: held-out data would fare worse."
    judged = Judged(Section(f"Calibration of {found.site}", [whose]))
    try:
        with own_generator():
            (_classes if found.probabilities is not None else _regression)(found, judged)
    except ImportError as error:
        judged.left_out.append(
            (f"Calibration of {found.site}: {error.name} is not installed.", 'pip install "pyro-bnn[report]"')
        )
        judged.section = None
    except ValueError as error:
        judged.left_out.append((f"Calibration of {found.site}: {error}", "give predictions that fit their targets"))
        judged.section = None
    return judged


def _classes(found: Predicted, judged: Judged) -> None:
    from bnn.calibration import accuracy_rejection, reliability
    from bnn.scoring import classification_scores

    assert judged.section is not None and found.probabilities is not None
    p, labels = found.probabilities, found.truth.astype(np.int64)
    p = p / p.sum(-1, keepdims=True)
    scores = classification_scores(p, labels)
    note = ""
    scores.pop("ece")  # the diagram's says how much of it is chance
    if found.of_draws is None:
        scores.pop("nll")
        note = (
            "Probabilities are how often each class was drawn; values of the function give them exactly, and the NLL."
        )
    judged.section.tables.append(_table(scores, note))
    each = None if found.of_draws is None else found.of_draws.astype(float)
    diagram = reliability(p if each is None else each / each.sum(-1, keepdims=True), labels)
    judged.section.panels += [
        panel(
            "Reliability",
            diagram.plot,
            "predicted probability",
            "observed frequency",
            _plus_minus(f"{diagram}."),
            tall=True,
        ),
        panel(
            "Accuracy after rejection",
            accuracy_rejection(p, labels).plot,
            "part rejected, least certain first",
            "accuracy of the rest",
            tall=True,
        ),
    ]
    judged.tiles.append((f"accuracy on {_data(found)}", f"{100 * scores['accuracy'].value:.3g} %"))
    if diagram.p_value < P_VALUE:
        bold = float((diagram.count * (diagram.confidence - diagram.accuracy)).sum()) > 0
        judged.findings.append(
            Finding(
                CAUTION if found.held_out else NOTE,
                "Probabilities are too bold" if bold else "Probabilities are too timid",
                _plus_minus(f"On {found.whose}, {diagram}.") + " The most probable class is right "
                + ("less" if bold else "more") + " often than its probability says.",
                "Fit a temperature on data kept apart (bnn.fit_temperature), or look at the prior's scale."
                if found.held_out else "Judge on held-out data: give predictions= and predictions_constant_data=.",
            )
        )  # fmt: skip


def _regression(found: Predicted, judged: Judged) -> None:
    from bnn.predictive_ranks import coverage, pit
    from bnn.scoring import regression_scores

    assert judged.section is not None and found.samples is not None
    samples, truth = found.samples.astype(float), found.truth.astype(float)
    if truth.size > MOST_OUTPUTS * len(truth):
        samples, truth = samples.reshape(len(samples), -1), truth.ravel()
    scores = regression_scores(samples, truth)
    judged.section.tables.append(_table(scores))
    ranks = pit(samples, truth)
    caption = "A hump: predictions are too wide. A U: too narrow. A slope: biased."
    judged.section.panels.append(
        panel("Where targets lie in their predictive", ranks.plot, "rank of the target", "rows", caption)
    )
    if found.truth.dtype.kind == "f":  # whole numbers tie with the ends of an interval
        judged.section.panels.append(
            panel(
                "Coverage of intervals",
                coverage(samples, truth).plot,
                "level of the interval",
                "part inside, less level",
                "Below zero, intervals are too narrow.",
            )
        )
    judged.tiles.append((f"RMSE on {_data(found)}", number(scores["rmse"].value)))
    p_value = float(np.min(ranks.p_value)) * np.size(ranks.p_value)
    if p_value < P_VALUE:
        spread = float(np.var(ranks.values))
        shape = "too narrow" if spread > 1.1 / 12 else "too wide" if spread < 0.9 / 12 else "off centre or skewed"
        judged.findings.append(
            Finding(
                CAUTION if found.held_out else NOTE,
                f"Predictions of {found.site} are not calibrated",
                f"On {found.whose}, targets do not lie evenly in their predictive (p = {p_value:.2g}); on the whole it "
                f"is {shape}.",
                "Look at the law of the noise (its scale, its tails, whether it varies with the input) and at the "
                "prior's scale."
                if found.held_out
                else "Look at the law of the noise, and judge on held-out data: give predictions= and "
                "predictions_constant_data=.",
            )
        )


def _data(found: Predicted) -> str:
    return "held-out data" if found.held_out else "training data"


def _table(scores: dict[str, Any], note: str = "") -> Table:
    rows = []
    for name, score in scores.items():
        as_share = name in ("accuracy", "ece") or name.startswith("coverage")
        factor, unit = (100.0, " %") if as_share else (1.0, "")
        rows.append(
            [WORDS[name], f"{number(factor * score.value)}{unit}", f"± {number(factor * score.error, 2)}{unit}"]
        )
    return Table(["score", "mean over rows", "standard error"], rows, note)


def of_loo(data: RunData) -> Judged:
    """LOO and WAIC of each observed site, in words."""
    judged = Judged()
    group = data.groups.get("log_likelihood")
    if group is None:
        return judged
    section = Section("Leave-one-out")
    names = [str(name) for name in group.data_vars]
    for name in names:
        call = "bnn.loo_report(idata" + (f", var_name={name!r})" if len(names) > 1 else ")")
        if group[name].size > LARGEST_LOO:
            judged.left_out.append((f"LOO of {name}: {group[name].size:.1e} numbers would take long.", call))
            continue
        try:
            found = loo_report(data.source, var_name=name)
        except ValueError as error:
            judged.left_out.append((f"LOO of {name}: {error}", f"see to that, then {call}"))
            continue
        section.text += [_plus_minus(line) for line in found.lines]
        wrong = found.counts["bad"] + found.counts["very bad"]
        if wrong:
            judged.findings.append(
                Finding(
                    CAUTION,
                    "LOO cannot be believed for some rows",
                    f"Pareto k of {name} exceeds 0.7 in {wrong:,} of {sum(found.counts.values()):,} rows.",
                    "Score held-out rows, or use K-fold cross-validation; look at these rows, which weigh much.",
                )
            )
        section.panels.append(_pareto(name, found.pareto_k, found.good_k))
    judged.section = section if section.text else None
    return judged


def _pareto(name: str, k: np.ndarray, good: float) -> Panel:
    largest = max(0.8, min(LARGEST_K, float(np.nanmax(k)))) + 0.05

    def draw(axes: Any) -> None:
        axes.plot(np.arange(len(k)), np.minimum(k, LARGEST_K), "o", markersize=2.0, alpha=0.7)
        axes.axhline(good, color="C1", linewidth=1.0, linestyle="--", label=f"good up to {good:.2g}")
        axes.set_ylim(min(-0.1, float(np.nanmin(k)) - 0.05), largest)

    beyond = int((k > LARGEST_K).sum())
    caption = f"{beyond} rows above {LARGEST_K:g} are shown there." if beyond else ""
    return panel(f"Pareto k of {name}", draw, "row", "", caption)


def _plus_minus(text: str) -> str:
    """Signs as they are printed, not typed."""
    text = text.replace("+-", "±").replace("<=", "≤")
    return re.sub(r"(?<![\w.])-(?=\d)", "−", text)
