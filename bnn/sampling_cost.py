"""Effective sample size by what it cost: per gradient evaluation and per second of sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

from bnn.draw_blocks import evenly, numbers_at
from bnn.run_statistics import statistics_of

# Of a larger site, this many evenly spaced numbers are looked at.
LARGEST_SITE = 200


def efficiency(run: Any) -> Any:
    """The smallest bulk effective sample size of each site, plain, per 1,000 gradients and per second.

    A Dataset of xarray along ``site``. Gradients are those of single chains on a minibatch, and seconds those of
    sampling; setup (recording and compiling) and warm-up stand in the attributes. Of sites of more than 200 numbers
    200 are looked at, evenly spaced.

    :param run: a finished run of ``bnn.kernels.MCMC`` with one of its kernels, ``bnn.to_arviz`` of one, or the path of
        a store, of which a block of draws is read at a time.
    :raises ValueError: for another run, or one of fewer than four draws.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import efficiency
    >>> from bnn.kernels import MCMC, SGHMC
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> kernel = SGHMC(model, step_size=0.2, friction=1., steps_per_sample=5)
    >>> mcmc = MCMC(kernel, num_samples=100, num_chains=4, disable_progbar=True)
    >>> mcmc.run()
    >>> found = efficiency(mcmc)
    >>> list(found.data_vars), found.attrs["gradient_evaluations"]
    (['ess_bulk', 'ess_per_1000_gradients', 'ess_per_second'], 2000)
    """
    import xarray

    statistics = statistics_of(run)
    if not statistics.facts.get("gradient_evaluations"):
        raise ValueError("the run did not count its gradients: efficiency is for the kernels of bnn.kernels.")
    if next(iter(statistics.draws.values())).shape[1] < 4:
        raise ValueError("the run has fewer than four draws; an effective sample size needs at least four.")
    names = list(statistics.draws)
    sizes = np.array([_smallest(draws) for draws in statistics.draws.values()])
    gradients, seconds = statistics.facts["gradient_evaluations"], statistics.facts["sampling_time"]
    columns = {
        "ess_bulk": sizes,
        "ess_per_1000_gradients": 1000.0 * sizes / gradients,
        "ess_per_second": sizes / seconds,
    }
    kept = ("gradient_evaluations", "setup_time", "warmup_time", "sampling_time")
    return xarray.Dataset(
        {name: ("site", values) for name, values in columns.items()},
        {"site": names},
        {name: statistics.facts[name] for name in kept},
    )


def _smallest(draws: Any) -> float:
    from arviz import ess

    values = numbers_at(draws, evenly(int(np.prod(draws.shape[2:])), LARGEST_SITE))
    return float(min(np.asarray(ess(values[..., place], method="bulk")) for place in range(values.shape[-1])))


def describe_efficiency(run: Any) -> str:
    """One line: the smallest effective sample size, what it cost, and the seconds of each part of the run."""
    facts = statistics_of(run).facts
    spent = ", ".join(f"{part} {facts[f'{part}_time']:.2g} s" for part in ("setup", "warmup", "sampling"))
    try:
        found = efficiency(run)
    except ValueError:
        return f"Time: {spent}"
    worst = found.isel(site=int(np.argmin(found.ess_bulk.values)))
    return (
        f"Bulk ESS: {float(worst.ess_bulk):.3g} at least (site {str(worst.site.values)!r}), "
        f"{float(worst.ess_per_1000_gradients):.3g} per 1,000 gradients, {float(worst.ess_per_second):.3g} per second "
        f"of sampling ({spent})"
    )
