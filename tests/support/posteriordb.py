"""Posteriors with reference draws from posteriordb (Magnusson et al.) as Pyro models, and the kernels tried on them.

A folder holds ``<data>.json`` and ``<data>-<model>.npz`` with ``draws`` (chains, draws, quantities) and ``names``. Flat
priors are improper. Values are float64: call ``torch.set_default_dtype(torch.float64)`` first, since a flat prior has
no precision of its own.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from bnn.kernels import AMAGOLD, GGMC, SGHMC, SGLD


@dataclass(frozen=True)
class Posterior:
    """A posterior and the reference draws of its quantities.

    :ivar model: the Pyro model; its arguments are ``data``.
    :ivar names: the quantities.
    :ivar reference: their independent draws, ``(draws, quantities)``.
    :ivar quantities_of: the same out of samples of the model's sites that lead with ``(chains, draws)``.
    """

    name: str
    model: Callable[..., None]
    data: tuple[Tensor, ...]
    names: list[str]
    reference: np.ndarray
    quantities_of: Callable[[Mapping[str, Tensor]], Tensor]

    def errors(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Errors of means, in standard deviations, and of standard deviations, as a part of them; draws first."""
        mean, sd = self.reference.mean(0), self.reference.std(0)
        return (draws.mean(0) - mean) / sd, draws.std(0) / sd - 1.0


def ar_k(y: Tensor, lags: Tensor) -> None:
    """Autoregression on ``lags`` ``(T - K, K)``, the latest first."""
    alpha = pyro.sample("alpha", dist.Normal(0.0, 10.0))
    beta = pyro.sample("beta", dist.Normal(torch.zeros(lags.shape[1]), 10.0).to_event(1))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("times", len(y)):
        pyro.sample("y", dist.Normal(alpha + lags @ beta, sigma), obs=y)


def eight_schools(y: Tensor, sigma: Tensor) -> None:
    """Effects of eight schools, θ = μ + τ z."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(mu + tau * z, sigma), obs=y)


def kidscore(y: Tensor, x: Tensor) -> None:
    """Regression with flat coefficients and a half-Cauchy scale."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]))
    sigma = pyro.sample("sigma", dist.HalfCauchy(2.5))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def mesquite(y: Tensor, x: Tensor) -> None:
    """Regression with flat coefficients and a flat scale."""
    beta = pyro.sample("beta", dist.ImproperUniform(constraints.real_vector, (), x.shape[1:]))
    sigma = pyro.sample("sigma", dist.ImproperUniform(constraints.positive, (), ()))
    with pyro.plate("rows", len(y)):
        pyro.sample("y", dist.Normal(x @ beta, sigma), obs=y)


def _ar_k_data(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    y, order = torch.tensor(given["y"]), given["K"]
    return y[order:], torch.stack([y[order - lag : len(y) - lag] for lag in range(1, order + 1)], -1)


def _eight_schools_data(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    return torch.tensor(given["y"]) * 1.0, torch.tensor(given["sigma"]) * 1.0


def _kidscore_data(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    iq = torch.tensor(given["mom_iq"])
    return torch.tensor(given["kid_score"]) * 1.0, torch.stack([torch.ones_like(iq), iq], -1)


def _mesquite_data(given: Mapping[str, Any]) -> tuple[Tensor, ...]:
    logs = ["diam1", "diam2", "canopy_height", "total_height", "density"]
    columns = [torch.tensor(given[name]).log() for name in logs] + [torch.tensor(given["group"]) * 1.0]
    return torch.tensor(given["weight"]).log(), torch.stack([torch.ones_like(columns[0]), *columns], -1)


def _in_order(*names: str) -> Callable[[Mapping[str, Tensor]], Tensor]:
    def quantities(samples: Mapping[str, Tensor]) -> Tensor:
        return torch.cat([s if s.dim() == 3 else s.unsqueeze(-1) for s in (samples[name] for name in names)], -1)

    return quantities


def _eight_schools_quantities(samples: Mapping[str, Tensor]) -> Tensor:
    mu, tau = (samples[name].unsqueeze(-1) for name in ("mu", "tau"))
    return torch.cat([mu + tau * samples["z"], mu, tau], -1)


# File of the reference draws, without its ending -> model, its data out of the file's, what is compared.
POSTERIORS = {
    "arK-arK": (ar_k, _ar_k_data, _in_order("alpha", "beta", "sigma")),
    "eight_schools-eight_schools_noncentered": (eight_schools, _eight_schools_data, _eight_schools_quantities),
    "kidiq-kidscore_momiq": (kidscore, _kidscore_data, _in_order("beta", "sigma")),
    "mesquite-logmesquite": (mesquite, _mesquite_data, _in_order("beta", "sigma")),
}


def load(folder: Path, name: str) -> Posterior:
    """One of POSTERIORS, from the files in ``folder``."""
    model, data_of, quantities_of = POSTERIORS[name]
    given = json.loads((folder / f"{name.split('-')[0]}.json").read_text(encoding="utf-8"))
    with np.load(folder / f"{name}.npz") as file:
        draws, names = file["draws"], [str(one) for one in file["names"]]
    return Posterior(name, model, data_of(given), names, draws.reshape(-1, draws.shape[-1]), quantities_of)


@dataclass(frozen=True)
class Row:
    """A kernel as it is tried: defaults with an adapted step size and adapted masses, so that friction is a rate.

    :ivar is_exact: whether only the number of draws stands between its draws and the posterior.
    """

    kernel: type
    settings: dict[str, Any]
    is_exact: bool = True

    def build(self, model: Callable[..., None]) -> Any:
        metric = "preconditioner" if self.kernel is SGLD else "mass"
        return self.kernel(model, **{"step_size": "auto", metric: "auto", **self.settings})


ROWS = {
    "GGMC": Row(GGMC, {"friction": 1.0, "steps_per_sample": 10}),
    "HMC": Row(GGMC, {"friction": None, "num_steps": 10}),
    "AMAGOLD": Row(AMAGOLD, {"friction": 1.0}),
    "SGHMC": Row(SGHMC, {"friction": 1.0, "steps_per_sample": 50}, is_exact=False),
    "SGLD": Row(SGLD, {"preconditioner": "dense", "steps_per_sample": 50}, is_exact=False),
}
