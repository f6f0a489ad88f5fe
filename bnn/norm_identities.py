"""Where the norms of position and momentum come from: the two sides of each Fokker–Planck identity.

Of SGHMC with mass m and friction C at temperature T,

    d/dt E|z|²  = 2 E[zᵀr/m]
    d/dt E[zᵀr] = E[|r|²/m] − E[zᵀ(∇U + C r/m)]
    d/dt E|r|²  = −2 E[rᵀ(∇U + C r/m)] + 2 T C d

On the left stands what was measured of the norms, on the right what moves them. A kernel takes finite steps and noisy
gradients, and so these hold up to O(h). :mod:`bnn.kernels` gives for each draw the rates of the steps that it really
takes, with which both sides are equal in mean at any step size. With a draw at every step (``steps_per_sample=1``) the
first is equal path by path (but for the integrator obabo), and the others up to a martingale, also far from
equilibrium; with fewer draws, a draw's rates stand for those of the steps between, which is right in equilibrium.
Momenta that are drawn afresh count in the steps that have a draw.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnn.run_statistics import RunStatistics, statistics_of
from bnn.temperature import effective_draws

NORMS = {"squared_norm": "|z|²", "position_momentum": "zᵀr", "momentum_squared_norm": "|r|²"}

FEWEST_DRAWS = 3


def norm_balance(run: Any) -> Any:
    """Both sides of the three identities over a run, as a Dataset of xarray along ``norm``.

    ``change`` is the left side: what the norm changed between the first draw and the last, per unit of time. ``rate``
    is the right side for the steps that were taken, a mean over draws. ``residual`` is their difference and ``error``
    its Monte Carlo standard error, by batches of draws: more than some three errors are no chance. Then the chains are
    not in equilibrium, or something between the draws moves them (momenta drawn afresh at another temperature).
    ``sde_rate`` is the right side of the differential equation: what it lacks of ``rate`` is the work of the finite
    step and of minibatch noise. Intervals in which a cyclical kernel explored do not count.

    :param run: a finished run of ``bnn.kernels.MCMC`` with an SGHMC kernel, or ``bnn.to_arviz`` of one.
    :raises ValueError: for fewer than three draws, or a kernel or masses for which the rates are not known.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import norm_balance
    >>> from bnn.kernels import MCMC, SGHMC
    >>> def model():
    ...     pyro.sample("z", dist.Normal(torch.zeros(10), 1.).to_event(1))
    >>> mcmc = MCMC(SGHMC(model, step_size=0.1, friction=1.), num_samples=100, num_chains=4, disable_progbar=True)
    >>> mcmc.run()
    >>> balance = norm_balance(mcmc)
    >>> bool(abs(balance.residual.sel(norm="squared_norm")) < 1e-3), list(balance.data_vars)
    (True, ['change', 'rate', 'residual', 'error', 'sde_rate'])
    """
    import xarray

    statistics = statistics_of(run)
    columns: dict[str, list[float]] = {"change": [], "rate": [], "residual": [], "error": [], "sde_rate": []}
    for norm in NORMS:
        span, change, rate, sde_rate = _intervals(statistics, norm)
        total = span.sum()
        columns["change"].append(float(change.sum(1).mean() / total))
        columns["rate"].append(float((rate * span).sum(1).mean() / total))
        columns["residual"].append(columns["change"][-1] - columns["rate"][-1])
        columns["error"].append(_error(change - rate * span, span))
        columns["sde_rate"].append(float((sde_rate * span).sum(1).mean() / total))
    return xarray.Dataset({name: ("norm", values) for name, values in columns.items()}, {"norm": list(NORMS)})


def _intervals(statistics: RunStatistics, norm: str) -> tuple[np.ndarray, ...]:
    """Of the intervals between draws: their lengths ``(n,)``; change, rate and rate of the SDE, ``(chains, n)``."""
    names = (norm, f"{norm}_rate", f"{norm}_sde_rate")
    if any(name not in statistics.stats for name in names):
        raise ValueError(
            "the rates of norms are known for SGHMC, NormAdjustedSGHMC and CyclicalSGHMC with one number for the mass; "
            "this run has another kernel, masses that differ between coordinates, or learnt ones."
        )
    values, rate, sde_rate, step, time = statistics.need(*names, "step", "time")
    if values.shape[1] < FEWEST_DRAWS:
        raise ValueError(f"the run has {values.shape[1]} draws; a balance needs at least {FEWEST_DRAWS}.")
    steps = np.diff(step[0])
    kept = steps <= np.median(steps)
    span = np.diff(time[0])[kept]
    return span, np.diff(values, axis=1)[:, kept], rate[:, 1:][:, kept], sde_rate[:, 1:][:, kept]


def _error(residual: np.ndarray, span: np.ndarray) -> float:
    """Standard error of the mean residual per time, from √n batches of intervals of each chain."""
    edges = np.linspace(0, len(span), int(np.sqrt(len(span))) + 1).astype(int)[:-1]
    batches = np.add.reduceat(residual, edges, axis=1) / np.add.reduceat(span, edges)
    if batches.size < 2:
        return float("nan")
    return float(batches.std(ddof=1) / np.sqrt(effective_draws(batches)))


def plot_norm_balance(run: Any) -> Any:
    """Plot the three norms over time, both sides of each identity as they add up, and their difference.

    The residual's band is two standard errors wide on each side, growing as the root of time.

    :param run: as for :func:`norm_balance`.
    :return: the figure, of Matplotlib.
    :raises ValueError: as :func:`norm_balance`.

    >>> from bnn import plot_norm_balance
    >>> import matplotlib
    >>> matplotlib.use("agg")
    >>> import pyro.distributions as dist, pyro
    >>> from bnn.kernels import MCMC, SGHMC
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> mcmc = MCMC(SGHMC(model, step_size=0.1, friction=1.), num_samples=50, num_chains=2, disable_progbar=True)
    >>> mcmc.run()
    >>> len(plot_norm_balance(mcmc).axes)
    9
    """
    import matplotlib.pyplot as plt

    statistics = statistics_of(run)
    balance = norm_balance(run)
    time = statistics.need("time")[0][0]
    figure, axes = plt.subplots(3, 3, figsize=(12, 7.5), sharex=True, layout="constrained")
    for column, (norm, label) in enumerate(NORMS.items()):
        top, middle, bottom = axes[:, column]
        values = statistics.need(norm)[0]
        top.plot(time, values.T, color="C0", alpha=max(0.1, 1.0 / len(values)), linewidth=0.7)
        top.plot(time, values.mean(0), color="black", linewidth=1.0, label="mean over chains")
        top.set_title(label)
        draw_sums(middle, statistics, norm)
        draw_residual(bottom, statistics, norm, float(balance.error.sel(norm=norm)))
        bottom.set_xlabel("time (sum of step sizes)")
    for row, words in enumerate(("norm", "sum of changes", "residual")):
        axes[row, 0].set_ylabel(words)
        axes[row, 0].legend(fontsize="small")
    return figure


def draw_sums(axes: Any, statistics: RunStatistics, norm: str) -> None:
    """Both sides of the identity of ``norm`` as they add up over time, and the right side of the SDE."""
    time = statistics.need("time")[0][0]
    span, change, rate, sde_rate = _intervals(statistics, norm)
    elapsed = time[0] + np.cumsum(span)
    axes.plot(elapsed, np.cumsum((sde_rate * span).mean(0)), "C2:", linewidth=1.0, label="right side of the SDE")
    right = np.cumsum((rate * span).mean(0))
    axes.plot(elapsed, right, "C1", linewidth=2.5, alpha=0.6, label="right side of the steps")
    axes.plot(elapsed, np.cumsum(change.mean(0)), "black", linewidth=0.9, label="left side: change")


def draw_residual(axes: Any, statistics: RunStatistics, norm: str, error: float) -> None:
    """The difference of both sides as it adds up, in a band of two standard errors."""
    time = statistics.need("time")[0][0]
    span, change, rate, _ = _intervals(statistics, norm)
    elapsed = time[0] + np.cumsum(span)
    band = 2.0 * error * np.sqrt(np.cumsum(span) * span.sum())
    axes.fill_between(elapsed, -band, band, color="C0", alpha=0.2, linewidth=0, label="2 standard errors")
    axes.plot(elapsed, np.cumsum((change - rate * span).mean(0)), "black", linewidth=0.9, label="residual")
    axes.axhline(0.0, color="grey", linewidth=0.5)
