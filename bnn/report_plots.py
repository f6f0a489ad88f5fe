"""The plots of a report: small panels, each an SVG that takes its ink from the page, so that it is legible on white and
on black, at the width of a phone and on paper.

The numbers in them are ArviZ's. They are drawn on Matplotlib's figures without pyplot, whose state is the user's: the
plots of ArviZ 0.x and 1.x differ in signature and in look, and those of 1.x open pyplot's figures.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import Any

import numpy as np
from scipy.stats import rankdata

from bnn.draw_blocks import evenly
from bnn.extras import library
from bnn.norm_identities import NORMS, draw_residual, draw_sums, norm_balance
from bnn.report_data import Convergence, RunData, autocorrelation, quiet
from bnn.run_statistics import RunStatistics
from bnn.temperature import LABELS

# Stand for what the page colours: ink, faint lines, the ground.
INK, FAINT, GROUND = "#010203", "#010204", "#010205"

# Legible on white and on black: contrast of at least 3 with both.
COLOURS = ["#3f86c6", "#cf7420", "#449a55", "#c75353", "#8f70c9", "#8d7355", "#c264a0", "#5f8f99"]

STYLE = {
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.prop_cycle": f"cycler('color', {COLOURS})",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.labelsize": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "axes.formatter.use_mathtext": False,
    "axes.formatter.limits": (-4, 5),
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.1,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}

# Chains and draws in a plot: more cannot be told apart.
MOST_CHAINS, MOST_POINTS, MOST_LAGS = 8, 400, 100


@dataclass(frozen=True)
class Panel:
    """A plot with its words.

    :ivar title: what it shows.
    :ivar svg: the drawing.
    :ivar caption: how to read it.
    """

    title: str
    svg: str
    caption: str = ""


def panel(title: str, draw: Callable[[Any], None], x: str, y: str, caption: str = "", *, tall: bool = False) -> Panel:
    """Draw on axes of a figure of its own.

    :param draw: called with the axes.
    :param x: label of the horizontal axis.
    :param y: label of the vertical axis.
    :param caption: how to read it.
    :param tall: with room for a longer legend.
    """
    return Panel(title, drawing(title, draw, x, y, tall), caption)


def drawing(title: str, draw: Callable[[Any], None], x: str, y: str, tall: bool) -> str:
    """The SVG of a panel."""
    matplotlib, new_figure = library("matplotlib"), library("matplotlib.figure").Figure
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": title}), quiet():
        figure = new_figure(figsize=(3.8, 2.9 if tall else 2.4), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        axes.set(title="", xlabel=x, ylabel=y)
        if axes.get_legend():
            axes.get_legend().remove()
        axes.locator_params(axis="x", nbins=6)
        labels = axes.get_legend_handles_labels()[1]
        if labels:
            columns = 1 if max(map(len, labels)) > 25 else 2
            figure.legend(loc="outside upper left", ncols=columns, handlelength=1.4)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return _inline(file.getvalue(), title)


def _inline(svg: str, title: str) -> str:
    """The drawing as a part of a page: no names of other files, nothing global, colours of the page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style.*?</style>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'<text id="[^"]*"', "<text", svg)
    svg = svg.replace("xlink:href", "href")
    size = re.search(r'viewBox="[^"]*"', svg)
    label = escape(title, quote=True)
    svg = f'<svg {size.group() if size else ""} role="img" aria-label="{label}">{svg[svg.index(">") + 1 :]}'
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    for stand_in, name in {INK: "ink", FAINT: "faint", GROUND: "ground", "#000000": "ink"}.items():
        svg = svg.replace(stand_in, f"var(--{name})")
    return svg


def _thinned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of at most ``MOST_POINTS`` draws, and the draws of ``MOST_CHAINS`` chains there."""
    kept = evenly(values.shape[1], MOST_POINTS)
    return kept, values[:MOST_CHAINS, kept]


def trace(label: str, values: np.ndarray) -> Panel:
    """Draws over time, a line for each chain."""

    def draw(axes: Any) -> None:
        where, lines = _thinned(values)
        for line in lines:
            axes.plot(where, line, linewidth=0.7, alpha=0.8)

    return panel(f"Trace of {label}", draw, "draw", "")


def ranks(label: str, values: np.ndarray) -> Panel:
    """Distribution function of each chain's ranks among all draws, less the uniform one (Säilynoja et al. 2022)."""

    def draw(axes: Any) -> None:
        rank = rankdata(values, method="average").reshape(values.shape) / values.size
        levels = np.linspace(0.0, 1.0, 101)
        for chain in rank[:MOST_CHAINS]:
            below = np.searchsorted(np.sort(chain), levels, side="right") / len(chain)
            axes.plot(100.0 * levels, below - levels, linewidth=0.9, alpha=0.9)
        axes.axhline(0.0, color=INK, linewidth=0.8, linestyle="--")
        reach = max(0.1, np.abs(axes.get_ylim()).max())
        axes.set_ylim(-reach, reach)

    return panel(f"Ranks of {label}", draw, "rank among all draws (%)", "")


def autocorrelations(label: str, values: np.ndarray) -> Panel:
    """Autocorrelation of each chain."""

    def draw(axes: Any) -> None:
        lags = min(MOST_LAGS, values.shape[1] // 2)
        for chain in autocorrelation(values[:MOST_CHAINS])[:, :lags]:
            axes.plot(chain, linewidth=0.9, alpha=0.8)
        axes.axhline(0.0, color=FAINT, linewidth=0.8)
        axes.set_ylim(top=1.02)

    return panel(f"Autocorrelation of {label}", draw, "lag (draws)", "")


def chosen(data: RunData, most: int = 3) -> list[tuple[str, np.ndarray]]:
    """The numbers to look at: the worst of the functions and of the single numbers; else the worst of all."""
    singles = [found for found in data.of_sites if found.size == 1]
    pools: list[tuple[list[Convergence], int]] = [(data.of_functions, most - 1), (singles, most)]
    if not data.functions:
        pools = [(singles, most), ([found for found in data.of_sites if found.size > 1], most)]
    result: list[tuple[str, np.ndarray]] = []
    for pool, share in pools:
        places = sorted(
            ((found, place) for found in pool for place in found.worst(share)),
            key=lambda pair: -np.nan_to_num(pair[0].rhat[pair[1]]),
        )
        for found, place in places[: min(share, most - len(result))]:
            result.append((found.labels[place], found.draws[..., place]))
    return result


def of_chains(data: RunData) -> list[Panel]:
    """Trace, ranks and autocorrelation of a few numbers; none of draws that are independent or too few."""
    if data.is_guide or data.draws < 10:
        return []
    result = []
    for label, values in chosen(data):
        if np.isfinite(values).all() and np.ptp(values) > 0:
            result += [trace(label, values), *([ranks(label, values)] if data.chains > 1 else [])]
            result.append(autocorrelations(label, values))
    return result


def of_energy(statistics: RunStatistics, is_ours: bool) -> list[Panel]:
    """Energy over time and per chain; for a Hamiltonian sampler its changes beside it."""
    energy = statistics.stats.get("energy")
    if energy is None or np.ndim(energy) != 2 or np.shape(energy)[1] < 10 or not np.isfinite(energy).all():
        return []
    energy = np.asarray(energy, dtype=float)

    def per_chain(axes: Any) -> None:
        edges = np.histogram_bin_edges(energy, bins=30)
        for chain in energy[:MOST_CHAINS]:
            axes.stairs(np.histogram(chain, edges, density=True)[0], edges, linewidth=1.0, alpha=0.85)

    def transitions(axes: Any) -> None:
        change = np.diff(energy)
        centred = energy - energy.mean()
        edges = np.histogram_bin_edges(np.concatenate([centred.ravel(), change.ravel()]), bins=40)
        for values, label in ((centred, "energy, less its mean"), (change, "change from draw to draw")):
            axes.hist(values.ravel(), edges, density=True, alpha=0.5, label=label)

    if not is_ours:
        caption = "Changes much narrower than the energies mean that the chain explores them slowly."
        return [
            trace("energy", energy),
            panel("Energy and its changes", transitions, "energy", "density", caption),
        ]
    caption = "Of a minibatch where the model draws minibatches. Chains whose energies differ have not mixed."
    return [trace("energy", energy), panel("Energy of each chain", per_chain, "energy", "density", caption)]


def of_temperature(statistics: RunStatistics) -> list[Panel]:
    """Measured temperatures, as means up to each draw."""
    measured = {name: label for name, label in LABELS.items() if name in statistics.stats}
    if "temperature" not in statistics.stats or not measured:
        return []

    def draw(axes: Any) -> None:
        whole = statistics.whole_chains
        asked = np.asarray(statistics.stats["temperature"], dtype=float)[whole].mean(0)
        steps = np.arange(1, len(asked) + 1)
        axes.plot(steps, np.cumsum(asked) / steps, color=INK, linewidth=0.9, linestyle="--", label="asked")
        for name, label in measured.items():
            mean = np.asarray(statistics.stats[name], dtype=float)[whole].mean(0)
            axes.plot(steps, np.cumsum(mean) / steps, label=label)

    return [panel("Temperature, mean up to each draw", draw, "draw", "temperature")]


def of_norms(data: RunData) -> tuple[Any, list[Panel]]:
    """The balance of norms and its plots; nothing where it is not known."""
    try:
        with quiet():
            balance = norm_balance(data.source)
    except ValueError:
        return None, []
    sums, residuals = [], []
    for norm, label in NORMS.items():
        both = partial(draw_sums, statistics=data.statistics, norm=norm)
        sums.append(panel(f"Both sides of {label}", both, "time", "sum of changes"))
        error = float(balance.error.sel(norm=norm))
        if np.isfinite(error):
            difference = partial(draw_residual, statistics=data.statistics, norm=norm, error=error)
            residuals.append(panel(f"Residual of {label}", difference, "time", ""))
    return balance, sums + residuals
