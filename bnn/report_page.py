"""A page about a posterior: what ran, whether it may be believed, what it predicts, and what to do about it.

One file of HTML without scripts, fonts or links to other places; plots are drawings inside it.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnn.extras import library
from bnn.report_data import RunData, quiet, read
from bnn.report_findings import conclusion, findings, worst_of
from bnn.report_plots import of_chains, of_energy
from bnn.report_predictive import Predicted, of_predictions, predicted
from bnn.report_scores import of_calibration, of_loo
from bnn.report_sections import (
    Section,
    number,
    of_functions,
    of_norm_balance,
    of_run,
    of_sites,
    of_temperature_section,
    rhat_text,
)

TEMPLATES = Path(__file__).with_name("templates")


CHAINS = (
    "The values that mixed worst, a colour for each chain. Ranks: the share of a chain's draws up to each rank among "
    "all draws, less what it would be if chains agreed, so lines near 0 agree."
)


def report(idata: Any, path: str | os.PathLike[str] = "report.html", *, title: str = "Posterior report") -> Path:
    """Write a page about a posterior: one HTML file that needs nothing else, to read, print or send.

    It says what ran, the temperature asked for and measured, whether predictions and sites have converged, shows a few
    chains, the norm balance, a predictive check and calibration where the data allow, and puts every warning in words
    with what to do next. Groups that are lacking are named with how to get them. Neither the data nor Matplotlib's
    settings are changed.

    Calibration is on held-out data if ``predictions`` and ``predictions_constant_data`` both hold the observed site
    (its draws, and the true targets), else on the data of the fit.

    :param idata: ArviZ data of either line: what :func:`bnn.to_arviz` makes of a run or a guide, or made elsewhere; or
        the path of a store of draws.
    :param path: where to write.
    :param title: the page's title.
    :return: ``path``.
    :raises ValueError: if ``idata`` is not ArviZ data with draws of a posterior.
    :raises ImportError: without Matplotlib or Jinja2, which ``pyro-bnn[report]`` brings.
    :raises OSError: if ``path`` cannot be written.

    >>> import pyro, torch, pyro.distributions as dist, tempfile, bnn
    >>> from bnn.kernels import MCMC, SGHMC
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> mcmc = MCMC(SGHMC(model, step_size=0.2, friction=1.), num_samples=100, num_chains=4, disable_progbar=True)
    >>> mcmc.run()
    >>> page = bnn.report(bnn.to_arviz(mcmc), tempfile.mkdtemp() + "/report.html")
    >>> "The run" in page.read_text(encoding="utf-8")
    True
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; give the name of a file, such as {path / 'report.html'}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist; make it, or give another path.")
    page = render(idata, title)
    path.write_text(page, encoding="utf-8")
    return path


def render(idata: Any, title: str = "Posterior report") -> str:
    """The page as text.

    :param idata: as for :func:`report`.
    :param title: the page's title.
    """
    data = read(idata)
    library("matplotlib")
    jinja2 = library("jinja2")
    with quiet():
        predictions = list(predicted(data))
        judged = [*map(of_calibration, predictions), of_loo(data)]
        found = findings(data, [finding for one in judged for finding in one.findings])
        sections = [section for section in _sections(data, predictions) if section is not None]
        sections += [one.section for one in judged if one.section is not None]
        left_out = [*_left_out(data, predictions), *(entry for one in judged for entry in one.left_out)]
    level, verdict = conclusion(found, data)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    page: str = environment.get_template("report.html.jinja").render(
        title=title,
        subtitle=_subtitle(data),
        level=level,
        verdict=verdict,
        tiles=[*_tiles(data), *(tile for one in judged for tile in one.tiles)],
        findings=found,
        sections=sections,
        left_out=left_out,
        date=datetime.date.today().isoformat(),
        version=_version(),
    )
    return page


def _subtitle(data: RunData) -> str:
    if data.is_guide:
        return f"{data.attrs['guide']}, {data.chains * data.draws:,} draws"
    who = str(data.attrs.get("kernel", data.attrs.get("inference_library", "")))
    size = f"{data.chains} chain{'s' * (data.chains > 1)} of {data.draws:,} draws"
    return f"{who}, {size}" if who else size


def _sections(data: RunData, predictions: Sequence[Predicted]) -> Iterator[Section | None]:
    yield of_run(data)
    yield of_temperature_section(data)
    yield of_functions(data)
    yield of_sites(data)
    chains = of_chains(data)
    if chains:
        yield Section("Chains", [CHAINS], panels=chains)
    energy = of_energy(data.statistics, data.is_ours)
    if energy:
        yield Section("Energy", panels=energy)
    yield of_norm_balance(data)
    for one in predictions:
        panels = of_predictions(one)
        if panels:
            yield Section(f"Predictive check of {one.site}", [f"On {one.whose}."], panels=panels)


def _tiles(data: RunData) -> Iterator[tuple[str, str]]:
    """The few figures that a reader looks for first."""
    rhat, ess = worst_of(data.judged)
    what = "predictions" if data.functions else "sites"
    if np.isfinite(rhat):
        yield f"worst R-hat of {what}", rhat_text(rhat)
    if np.isfinite(ess):
        yield f"lowest ESS of {what}, bulk or tail", f"{ess:,.0f}"
    stats = data.statistics.stats
    for name, label in (("configurational_temperature", "positions"), ("kinetic_temperature", "momenta")):
        if name in stats and "temperature" in stats:
            mean = float(np.mean(np.asarray(stats[name], dtype=float)[data.statistics.whole_chains]))
            asked = float(np.mean(np.asarray(stats["temperature"], dtype=float)))
            if np.isfinite(mean):
                yield f"temperature of {label}, {number(asked)} asked", number(mean)
            break
    if "diverging" in stats:
        yield "draws that diverged", f"{int(np.sum(stats['diverging'])):,}"


LEFT_OUT = {
    "sample_stats": ("energy, temperature and divergences", "bnn.to_arviz of a run of bnn.kernels.MCMC"),
    "log_likelihood": ("leave-one-out cross-validation", "bnn.to_arviz(run, log_likelihood=True)"),
}


def _left_out(data: RunData, predictions: Sequence[Predicted]) -> Iterator[tuple[str, str]]:
    """What the data do not allow, and how to get it."""
    for group, (what, how) in LEFT_OUT.items():
        if group not in data.groups and not (data.is_guide and group == "sample_stats"):
            yield f"{what[0].upper()}{what[1:]}: the data have no group {group}.", how
    if not data.functions:
        yield (
            "Convergence of predictions: the posterior has no values of the function.",
            ("bnn.to_arviz(run, function_space=True)"),
        )
    if not predictions:
        yield (
            "Predictive check and calibration: there are no predictions with targets.",
            (
                "bnn.to_arviz(run, posterior_predictive=True), or predictions= and predictions_constant_data= with the "
                "observed site in both"
            ),
        )
    elif not any(one.held_out for one in predictions):
        yield (
            "Calibration on held-out data: the predictions are of the data of the fit.",
            ("bnn.to_arviz(run, predictions={site: draws}, predictions_constant_data={site: targets})"),
        )


def _version() -> str:
    try:
        return f"pyro-bnn {importlib.metadata.version('pyro-bnn')}"
    except importlib.metadata.PackageNotFoundError:
        return "pyro-bnn"
