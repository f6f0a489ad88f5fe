"""Scores of a posterior on held-out data: the closed forms of a mixture over draws."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import bnn

SLOPES = torch.tensor([0.5, 1.0, 1.5])
X, Y = torch.tensor([1.0, 2.0, -1.0, 0.3]), torch.tensor([1.2, 1.5, -0.5, 0.0])


def regression(x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        law = dist.Normal(slope * x, 0.5)
        pyro.sample("y", law if mask is None else law.mask(mask), obs=y)


def classes(x: Tensor, y: Tensor | None = None) -> None:
    slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Categorical(logits=slope * x[:, None] * torch.arange(3.0)), obs=y)


@pytest.mark.parametrize("slopes", [SLOPES, SLOPES[:1]], ids=["three draws", "one"])
def test_regression(slopes: Tensor) -> None:
    pyro.set_rng_seed(0)
    found = bnn.score({"slope": slopes}, X, Y, model=regression)
    densities = dist.Normal(slopes[:, None] * X, 0.5).log_prob(Y)
    nll = -(densities.logsumexp(0) - math.log(len(slopes))).mean()
    assert found["nll"].value == pytest.approx(nll.item(), rel=1e-5)
    rmse = (slopes.mean() * X - Y).square().mean().sqrt()
    assert found["rmse"].value == pytest.approx(rmse.item(), rel=1e-5)
    assert found["width_0.9"].value > 1.0  # samples with noise, also of a single draw


def test_classes() -> None:
    labels = torch.tensor([2, 1, 0, 2])
    found = bnn.score({"slope": SLOPES}, X, labels, model=classes)
    probabilities = torch.softmax(SLOPES[:, None, None] * X[:, None] * torch.arange(3.0), -1).mean(0)
    nll = -probabilities[torch.arange(4), labels].log().mean()
    assert found["nll"].value == pytest.approx(nll.item(), rel=1e-5)
    assert found["accuracy"].value == (probabilities.argmax(-1) == labels).double().mean()


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="no targets to score"):
        bnn.score({"slope": SLOPES}, X, model=regression)
    with pytest.raises(ValueError, match="'y' is masked in 1 rows: score the rows that are not"):
        bnn.score({"slope": SLOPES}, X, Y, torch.tensor([True, True, False, True]), model=regression)
