"""Linear regressions whose posteriors are known, and points that descend their energy."""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI
from torch import Tensor

from bnn.guides import TraceEnsemble_ELBO
from support.nets import numbers

NOISE, PRIOR = 0.7, 1.3


def linear(x: Tensor, y: Tensor, batch_size: int | None = None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), PRIOR).to_event(1))
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ weight, NOISE), obs=y[rows])


def regression_data(rows: int = 12) -> tuple[Tensor, Tensor]:
    return numbers(rows, 3, seed=3), numbers(rows, seed=4)


def exact(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Precision and mean of the posterior."""
    precision = x.T @ x / NOISE**2 + torch.eye(3) / PRIOR**2
    return precision, torch.linalg.solve(precision, x.T @ y / NOISE**2)


def two_outputs(x: Tensor, y: Tensor) -> None:
    """A layer of three inputs and two outputs, with a bias."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), PRIOR).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(2), PRIOR).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(F.linear(x, weight, bias), NOISE).to_event(1), obs=y)


def two_output_data(rows: int = 12) -> tuple[Tensor, Tensor]:
    return numbers(rows, 3, seed=3), numbers(rows, 2, seed=4)


def two_output_constants(rows: int = 12) -> float:
    """What the energy of ``two_outputs`` has besides squares."""
    root = math.sqrt(2 * math.pi)
    return 2 * rows * math.log(NOISE * root) + 8 * math.log(PRIOR * root)


def trained(model: Any, guide: Any, args: Any, steps: int, optimizer: Any, **settings: Any) -> list[float]:
    """The losses of so many steps."""
    svi = SVI(model, guide, optimizer, TraceEnsemble_ELBO(**settings))
    return [svi.step(*args) for _ in range(steps)]
