"""Equipartition: how temperature and squared norm are shared out among the sites of a model.

    E[rₗᵀM⁻¹rₗ] = E[zₗᵀ∇ₗU] = dₗ T                              for each site l of dₗ numbers
    E|zₗ − μ|²/η − dₗ T = −E[(zₗ − μ)ᵀ∇ₗL]                      under the prior N(μ, η), with U = L + |zₗ − μ|²/2η + …

The second follows from the first. Where L does not change with the scale of a layer, its right side is zero, and
|zₗ|²/(ηT) is χ² of dₗ degrees of freedom. In a net of homogeneous layers (ReLU, no biases) zₗᵀ∇ₗL is the same number
for every layer, and so is the excess.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bnn.draw_blocks import blocks
from bnn.run_statistics import RunStatistics, statistics_of
from bnn.temperature import LABELS, effective_draws


def equipartition(run: Any) -> Any:
    """Temperatures and excess of the norm per site, as a Dataset of xarray along ``site``.

    ``kinetic_temperature`` and ``configurational_temperature`` should be T for every site, where the kernel measures
    them; ``norm_excess`` is the mean of |z − μ|²/η − dT where the prior of a site is Normal with fixed numbers, NaN
    elsewhere: below zero where the likelihood pulls weights in, above where it pushes them out, and equal for all
    layers of a homogeneous net. Each comes with its Monte Carlo standard error, ``..._error``.

    :param run: a finished run of ``bnn.kernels.MCMC`` with one of its kernels, or ``bnn.to_arviz`` of one.
    :raises ValueError: for another run, or where the sites are not known.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import equipartition
    >>> from bnn.kernels import MCMC, SGHMC
    >>> def model():
    ...     pyro.sample("a", dist.Normal(torch.zeros(50), 1.).to_event(1))
    ...     pyro.sample("b", dist.Normal(torch.ones(80), 2.).to_event(1))
    >>> pyro.set_rng_seed(0)
    >>> mcmc = MCMC(SGHMC(model, step_size=0.3, friction=1.), num_samples=500, num_chains=4, disable_progbar=True)
    >>> mcmc.run()
    >>> found = equipartition(mcmc)
    >>> found.site.values.tolist(), bool((abs(found.norm_excess) < 5 * found.norm_excess_error).all())
    (['a', 'b'], True)
    """
    import xarray

    statistics = statistics_of(run)
    if not statistics.sites:
        raise ValueError("the sites of the run are not known: it is not one of the kernels of bnn.kernels.")
    columns: dict[str, list[float]] = {"size": [float(site.size) for site in statistics.sites.values()]}
    for kind in LABELS:
        if f"site_{kind}" in statistics.stats:
            values = statistics.need(f"site_{kind}")[0]
            _add(columns, kind, [values[..., column] for column in range(values.shape[-1])])
    _add(columns, "norm_excess", [_excess(statistics, name) for name in statistics.sites])
    return xarray.Dataset(
        {name: ("site", values) for name, values in columns.items()}, {"site": list(statistics.sites)}
    )


def _add(columns: dict[str, list[float]], name: str, values: list[np.ndarray]) -> None:
    columns[name] = [float(one.mean()) for one in values]
    columns[f"{name}_error"] = [
        float(one.std() / np.sqrt(effective_draws(one))) if np.isfinite(one).all() else np.nan for one in values
    ]


def _excess(statistics: RunStatistics, name: str) -> np.ndarray:
    """|z − μ|²/η − dT of each draw, NaN where it is not known."""
    site = statistics.sites[name]
    temperature = statistics.need("temperature")[0]
    if name not in statistics.draws or np.isnan(site.scale):
        return np.full_like(temperature, np.nan)
    whole = statistics.whole_chains
    scaled = ((block[whole].astype(float) - site.loc) / site.scale for block in blocks(statistics.draws[name]))
    return np.concatenate([np.square(one).sum(-1) for one in scaled], 1) - site.size * temperature
