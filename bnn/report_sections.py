"""The sections of a report, as the template takes them: tables, panels, sentences. What does not apply is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnn.draw_blocks import evenly, numbers_at
from bnn.norm_identities import NORMS
from bnn.per_site import equipartition
from bnn.report_data import Convergence, RunData, quiet
from bnn.report_findings import RHAT, temperature_verdict
from bnn.report_plots import Panel, of_norms, of_temperature
from bnn.temperature import LABELS, measure

# Sites of which a mean and a spread are shown are read in at most so many numbers; rows of a table.
LARGEST_SITE, MOST_SITES, WORST = 2000, 60, 5


@dataclass(frozen=True)
class Table:
    """Rows of text under headings.

    :ivar head: the headings; the first column names the row.
    :ivar rows: the cells.
    :ivar note: a sentence below.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


@dataclass
class Section:
    """A part of the page.

    :ivar title: its heading.
    :ivar text: sentences before the rest.
    :ivar facts: names and values.
    :ivar tables: after them.
    :ivar panels: after them.
    """

    title: str
    text: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    panels: list[Panel] = field(default_factory=list)

    @property
    def name(self) -> str:
        """For links."""
        return self.title.lower().replace(" ", "-")


def number(value: Any, digits: int = 3) -> str:
    """Three digits, thousands apart, a dash for what is not known."""
    value = float(value)
    if not np.isfinite(value):
        return "–" if np.isnan(value) else ("∞" if value > 0 else "−∞")
    whole = abs(value) >= 10**digits or value == int(value)
    text = f"{value:,.0f}" if whole and abs(value) < 1e7 else f"{value:.{digits}g}"
    return text.replace("-", "−")


def rhat_text(value: float) -> str:
    """An R-hat with three decimals."""
    if not np.isfinite(value):
        return "–"
    return f"{value:.3f}" if value < 2 else number(value)


def seconds(value: float) -> str:
    """A duration."""
    if value < 60:
        return f"{value:.2g} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shape_text(variable: Any) -> str:
    """A shape, without chains and draws."""
    shape = [str(variable.sizes[dim]) for dim in variable.dims if dim not in ("chain", "draw")]
    return " × ".join(shape) if shape else "scalar"


# ---- what ran


def of_run(data: RunData) -> Section:
    """The sampler, what it cost, and the model."""
    attrs, facts = data.attrs, data.statistics.facts
    section = Section("The run")
    add = section.facts.append
    if data.is_guide:
        add(("Guide", str(attrs["guide"])))
        add(("Draws", f"{data.chains * data.draws:,} independent ones"))
    else:
        if "kernel" in attrs:
            add(("Sampler", str(attrs["kernel"])))
        add(("Draws", f"{data.chains} chain{'s' * (data.chains > 1)} of {data.draws:,}"))
    if "tuning_steps" in attrs:
        add(("Warm-up", f"{int(attrs['tuning_steps']):,} draws per chain"))
    if int(attrs.get("thin", 1)) > 1:
        add(("Kept", f"one draw in {int(attrs['thin'])}"))
    if "temperature" in attrs:
        asked = attrs["temperature"]
        add(("Temperature asked for", number(asked) if isinstance(asked, (int, float)) else str(asked)))
    if "warmup_chose" in attrs:
        add(("Warm-up chose", str(attrs["warmup_chose"])))
    times = [
        (part, float(facts[f"{part}_time"])) for part in ("setup", "warmup", "sampling") if f"{part}_time" in facts
    ]
    if not times and "sampling_time" in attrs:  # as PyMC and others keep it
        times = [("sampling", float(attrs["sampling_time"]))]
    if times:
        words = {"setup": "setup", "warmup": "warm-up", "sampling": "sampling"}
        parts = ", ".join(f"{words[part]} {seconds(spent)}" for part, spent in times)
        add(("Time", f"{seconds(sum(spent for _, spent in times))} ({parts})" if len(times) > 1 else parts))
    if facts.get("gradient_evaluations"):
        add(("Gradients", f"{int(facts['gradient_evaluations']):,} while sampling"))
    if "inference_library" in attrs:
        add(("Library", f"{attrs['inference_library']} {attrs.get('inference_library_version', '')}".strip()))
    if "created_at" in attrs:
        add(("Made", str(attrs["created_at"])[:16].replace("T", " ")))
    numbers = sum(variable.size // (data.chains * data.draws) for variable in data.sites.values())
    if data.sites:
        add(("Model", f"{len(data.sites)} site{'s' * (len(data.sites) > 1)}, {numbers:,} numbers"))
    for group, label in (("observed_data", "Observed"), ("predictions_constant_data", "Held out")):
        variables = data.groups.get(group, {})
        shapes = [f"{name} ({shape_text(variables[name])})" for name in variables if variables[name].size]
        if shapes:
            add((label, ", ".join(shapes[:6]) + (", …" if len(shapes) > 6 else "")))
    return section


def of_temperature_section(data: RunData) -> Section | None:
    """Asked and measured."""
    said = temperature_verdict(data)
    if said is None:
        return None
    stats, dim = data.statistics.stats, data.statistics.dim
    section = Section("Temperature", [f"{said[0].upper()}{said[1:]}"])
    rows = []
    for name, label in LABELS.items():
        if name in stats:
            with quiet():
                m = measure(stats, name, dim)
            rows.append([label, number(m.mean, 4), number(m.error, 1), f"{number(m.low, 4)} to {number(m.high, 4)}"])
    if rows:
        section.tables.append(Table(["measured on", "temperature", "error", "99 % region if as asked"], rows))
    section.panels = of_temperature(data.statistics)
    return section


# ---- convergence


def of_functions(data: RunData) -> Section | None:
    """What the net predicts: R-hat, effective sample sizes, Monte Carlo error."""
    if not data.functions:
        return None
    section = Section("Predictions")
    section.text.append(
        "Predictions come first because weights are identified only up to permutation and sign of hidden units: chains "
        "that predict alike agree, whatever their weights."
    )
    for found in data.of_functions:
        variable = data.functions[found.name]
        kind = {"mean": "mean", "probability": "class probabilities"}.get(str(variable.attrs.get("kind")), "function")
        looked = "" if len(found.labels) == found.size else f"; {len(found.labels)} of {found.size:,} values looked at"
        if data.is_guide:
            share = number(100.0 / np.sqrt(data.chains * data.draws))  # of independent draws
            what = f"{kind} of {variable.attrs['function_of']} ({shape_text(variable)})"
            section.facts.append((found.name, f"{what}; Monte Carlo error of its means {share} % of the sd"))
            continue
        section.tables.append(_quantiles(found, f"{kind} of {variable.attrs['function_of']}{looked}"))
    worst = _worst(data.of_functions)
    if worst is not None and not data.is_guide:
        section.tables.append(worst)
    return section


def _quantiles(found: Convergence, what: str) -> Table:
    """Quantiles over the values that were looked at, from the middle to the worst."""

    def row(label: str, values: np.ndarray, text: Any, high_is_bad: bool = True) -> list[str]:
        values = values[np.isfinite(values)]
        if not values.size:
            return [label, "–", "–", "–"]
        levels = [0.5, 0.95, 1.0] if high_is_bad else [0.5, 0.05, 0.0]
        return [label, *(text(value) for value in np.quantile(values, levels))]

    share = 100 * found.mcse / np.where(found.sd > 0, found.sd, np.nan)
    return Table(
        [found.name, "median", "95 % are better", "worst"],
        [
            row("R-hat", found.rhat, rhat_text),
            row("bulk ESS", found.ess_bulk, lambda v: f"{v:,.0f}", False),
            row("tail ESS", found.ess_tail, lambda v: f"{v:,.0f}", False),
            row("error of the mean, % of sd", share, number),
        ],
        f"{what[0].upper()}{what[1:]}.",
    )


def _worst(convergence: Sequence[Convergence]) -> Table | None:
    places = sorted(
        ((found, place) for found in convergence for place in found.worst(WORST)),
        key=lambda pair: -np.nan_to_num(pair[0].rhat[pair[1]]),
    )[:WORST]
    rows = [
        [
            found.labels[place],
            rhat_text(found.rhat[place]),
            f"{found.ess_bulk[place]:,.0f}",
            f"{found.ess_tail[place]:,.0f}",
            f"{number(found.draws[..., place].mean())} ± {number(found.sd[place])}",
        ]
        for found, place in places
    ]
    return Table(["worst values", "R-hat", "bulk ESS", "tail ESS", "mean ± sd"], rows) if rows else None


def of_sites(data: RunData) -> Section | None:
    """Each site in one row."""
    if not data.sites:
        return None
    section = Section("Sites")
    if data.functions and not data.is_guide:
        section.text.append("R-hat of weights may be large though predictions agree; single numbers should have mixed.")
    known = data.statistics.sites
    temperatures = _temperatures(data)
    head = ["site", "shape", "mean |value|", "mean sd"]
    has_prior = any(np.isfinite(site.scale) for site in known.values())
    if has_prior:
        head.append("prior sd")
    judged = not data.is_guide and any(np.isfinite(found.ess_bulk).any() for found in data.of_sites)
    if judged:
        head += ["R-hat > 1.01", "worst R-hat", "lowest ESS"]
    head += [f"T of {label}" for label in temperatures]
    rows = []
    for found in data.of_sites[:MOST_SITES]:
        size, sd = _size_and_sd(data.sites[found.name])
        row = [found.name, shape_text(data.sites[found.name]), number(size), number(sd)]
        if has_prior:
            row.append(number(known[found.name].scale) if found.name in known else "–")
        if judged:
            finite = found.rhat[np.isfinite(found.rhat)]
            row.append(f"{100 * (finite > RHAT).mean():.0f} %" if finite.size else "–")
            row.append(rhat_text(finite.max()) if finite.size else "–")
            ess = found.ess_bulk[np.isfinite(found.ess_bulk)]
            row.append(f"{ess.min():,.0f}" if ess.size else "–")
        row += [values.get(found.name, "–") for values in temperatures.values()]
        rows.append(row)
    note = ""
    if judged and any(len(found.labels) < found.size for found in data.of_sites):
        note = "R-hat and bulk ESS are of evenly spaced numbers of larger sites."
    if len(data.of_sites) > MOST_SITES:
        note += f" {len(data.of_sites) - MOST_SITES} more sites are not listed."
    section.tables.append(Table(head, rows, note.strip()))
    return section


def _size_and_sd(variable: Any) -> tuple[float, float]:
    size = variable.size // (variable.sizes["chain"] * variable.sizes["draw"])
    values = numbers_at(variable, evenly(size, LARGEST_SITE))
    values = values.reshape(-1, values.shape[-1])
    with quiet():
        return float(np.abs(values).mean()), float(values.std(0).mean())


def _temperatures(data: RunData) -> dict[str, dict[str, str]]:
    """``momenta`` and ``positions``: site -> its temperature with error."""
    if not data.statistics.sites:
        return {}
    with quiet():
        found = equipartition(data.source)
    result = {}
    for kind, label in LABELS.items():
        if kind in found:
            means, errors = found[kind].values, found[f"{kind}_error"].values
            texts = [f"{number(mean)} ± {number(error, 1)}" for mean, error in zip(means, errors, strict=True)]
            result[label] = dict(zip(map(str, found.site.values), texts, strict=True))
    return result


def of_norm_balance(data: RunData) -> Section | None:
    """What moves the norms."""
    balance, panels = of_norms(data)
    if balance is None or not np.isfinite(balance.residual.values).all():
        return None
    rows = []
    for norm, label in NORMS.items():
        one = balance.sel(norm=norm)
        errors = float(one.residual / one.error) if float(one.error) > 0 else np.nan
        sides = [number(one[name]) for name in ("change", "rate", "residual")]
        rows.append([label, *sides, number(one.error, 2), number(errors, 2)])
    text = (
        "Rates of change of the squared norm of positions, of their product with momenta, and of the squared norm of "
        "momenta: what was measured, and what the steps should have done. In equilibrium both sides agree."
    )
    head = ["norm", "measured", "by the steps", "residual", "error", "residual / error"]
    return Section("Norm balance", [text], tables=[Table(head, rows)], panels=panels)
