"""Pyro models whose potentials are known by formula. Coordinates, or chains, are independent draws of one law."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bnn import Potential

float64 = torch.float64

# Rows of data and of a minibatch in `noisy_gaussian`.
NUM_ROWS, BATCH_SIZE = 4, 2


def gaussian(curvature: Tensor) -> None:
    """U = Σ ½ k_i z_i², one independent chain per coordinate."""
    pyro.sample("z", dist.Normal(torch.zeros_like(curvature), curvature**-0.5).to_event(1))


def two_gaussians(curvature: Tensor) -> None:
    """``gaussian`` at two sites, "left" and "right", the second with four times the curvature."""
    pyro.sample("left", dist.Normal(torch.zeros_like(curvature), curvature**-0.5).to_event(1))
    pyro.sample("right", dist.Normal(torch.zeros_like(curvature), (4 * curvature) ** -0.5).to_event(1))


def noisy_gaussian(rows: Tensor, curvature: float, scale_up: bool = True) -> None:
    """U = ½ k z² with minibatch noise, one scalar per chain; see :func:`rows_for`.

    Half of the curvature is the prior's, half the likelihood's. ``scale_up=False`` drops the factor N/B.
    """
    size = len(rows)
    z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=float64), (curvature / 2) ** -0.5))
    with pyro.plate("rows", size, subsample_size=BATCH_SIZE) as index:
        with poutine.scale(scale=1.0 if scale_up else BATCH_SIZE / size):
            pyro.sample("y", dist.Normal(z, (2 * size / curvature) ** 0.5), obs=rows[index])


def rows_for(noise: float, curvature: float) -> Tensor:
    """Data of `noisy_gaussian` for which independent minibatch rows give ∇Û = k z + noise of variance ``noise``.

    A row y = ±a adds (z − y)/s² to the gradient, with s² = 2N/k, and B rows drawn with replacement are scaled by N/B:
    the noise is (N/B) Σ_b y_b/s², of variance (N²/B) a²/s⁴ = a² k²/(4B), the same at every z. It is binomial, with
    negative excess kurtosis, so that a χ² test of the chain's variance has fewer false alarms than for a Gaussian.
    """
    amplitude = 2 * math.sqrt(BATCH_SIZE * noise) / curvature
    return amplitude * torch.tensor([1.0, -1.0] * (NUM_ROWS // 2), dtype=float64)


@contextmanager
def starts_unchecked() -> Iterator[None]:
    """Leave out the check of starting points, which evaluates one chain after another: here are 100,000."""
    with patch.object(Potential, "check_start", lambda self, position: position):
        yield


def quartic(like: Tensor) -> None:
    """U = Σ ¼ z_i⁴: E[z⁴] = T and Var[z⁴] = 4T² at temperature T."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), like.shape))
    pyro.factor("quartic", -0.25 * z.pow(4).sum())


def logistic_regression(x: Tensor, y: Tensor) -> None:
    """A potential that is not Gaussian, over all data."""
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    with pyro.plate("rows", len(x)):
        logits = torch.stack([torch.zeros_like(x[:, 0]), x @ weight], -1)
        pyro.sample("y", dist.Categorical(logits=logits), obs=y)


def regression(x: Tensor, y: Tensor) -> None:
    """Linear regression on minibatches with a positive site: what the runner's contract is checked on."""
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    scale = pyro.sample("a_scale", dist.LogNormal(x.new_zeros(()), 0.5))
    with pyro.plate("rows", len(x), subsample_size=8) as index:
        pyro.sample("y", dist.Normal(x[index] @ weight, scale), obs=y[index])


def full_regression(x: Tensor, y: Tensor) -> None:
    """The same on all data."""
    weight = pyro.sample("weight", dist.Normal(x.new_zeros(x.shape[1]), 1.0).to_event(1))
    scale = pyro.sample("a_scale", dist.LogNormal(x.new_zeros(()), 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def regression_data(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Data of `regression`: 32 rows, 3 columns."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(32, 3, generator=generator, dtype=float64)
    y = x @ torch.tensor([1.0, -1.0, 0.5], dtype=float64) + 0.3 * torch.randn(32, generator=generator, dtype=float64)
    return x.to(dtype), y.to(dtype)
