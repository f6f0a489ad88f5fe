"""Targets are checked once, where they can be, and refused in words that say what to do."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import Tensor

import bnn
from bnn import likelihoods, target_checks
from bnn.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from support.nets import numbers
from support.plain_nets import ROWS, model_of_outputs

HALF_CAUCHY, GAMMA = dist.HalfCauchy(1.0), dist.Gamma(6.0, 5.0)


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def test_targets_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    original = likelihoods.check_values
    monkeypatch.setattr(likelihoods, "check_values", lambda *args: (reads.append(1), original(*args)))
    model, x, y = model_of_outputs(Gaussian(0.3)), numbers(ROWS, 1), numbers(ROWS)
    for _ in range(3):
        model(x, y)
    assert len(reads) == 1
    y[3] = 1.0  # a write
    model(x, y)
    assert len(reads) == 2
    model(x, y.clone())
    assert len(reads) == 3
    for _ in range(2):
        for mask in (torch.ones(ROWS, dtype=torch.bool), torch.zeros(ROWS, dtype=torch.bool)):
            model(x, y, mask)
    assert len(reads) == 7
    y[3] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        model(x, y)
    with torch.inference_mode():
        model(x, torch.zeros(ROWS))
    copy.deepcopy(model)(x, torch.zeros(ROWS))


def test_targets_are_not_read_where_they_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inside a vectorized recording over a loader's batches, whose values are stand-ins."""
    read = []
    original = target_checks.has_values
    monkeypatch.setattr(target_checks, "has_values", lambda y: read.append(original(y)) or read[-1])
    x, y = numbers(ROWS, 4), torch.arange(ROWS) % 4
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=6)
    potential = bnn.Potential(model_of_outputs(Categorical(), num_data=ROWS), batches=batches, compile="fx")
    potential.energy_and_grad(torch.zeros(3, 1))
    assert potential.is_recorded and potential.vectorizes() and False in read


def check(likelihood: Any, outputs: tuple[int, ...], y: Any, mask: Any = None) -> Callable[[], Any]:
    return lambda: likelihood.check(outputs, y, mask)


def real(*shape: int) -> Tensor:
    return torch.zeros(shape)


def whole(*values: int) -> Tensor:
    return torch.tensor(values)


MISTAKES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    # settings
    "scale and precision": (lambda: Gaussian(0.1, 1.0), ("both scale and precision", "give one")),
    "scale of zero": (lambda: Gaussian(0.0), ("Gaussian: scale is 0.0", "above 0", "distribution")),
    "precision of text": (lambda: Gaussian(precision="high"), ("Gaussian: precision is 'high'",)),
    "scales of zero": (lambda: StudentT(4.0, torch.tensor([1.0, 0.0])), ("StudentT: scale is tensor",)),
    "learned df": (lambda: StudentT(GAMMA), ("StudentT: df is Gamma", "number above 0")),
    "min_scale": (lambda: HeteroscedasticGaussian(-1.0), ("HeteroscedasticGaussian: min_scale is -1.0",)),
    "concentration": (lambda: NegativeBinomial(math.inf), ("NegativeBinomial: concentration is inf",)),
    "negative scales": (
        lambda: Gaussian(dist.Normal(0.0, 1.0)),
        ("scale is a Normal, whose support Real()", "HalfCauchy"),
    ),
    "a prior per row": (
        lambda: Gaussian(dist.HalfCauchy(torch.ones(3))),
        ("batch shape (3,)", ".expand([K]).to_event(1)"),
    ),
    "weight of zero": (lambda: Categorical([1.0, 0.0]), ("class_weights is [1.0, 0.0]", "above 0 for each class")),
    "noise that is not given": (lambda: Gaussian(HALF_CAUCHY).law(real(3)), ("learns its scale", "{'scale': ...}")),
    # nets
    "odd outputs": (check(HeteroscedasticGaussian(), (5, 3), real(5)), ("(5, 3)", "even number of outputs")),
    "one number": (check(HeteroscedasticGaussian(), (5,), real(5)), ("(5,)", "even number of outputs")),
    "one class": (check(Categorical(), (5, 1), whole(0, 0)), ("(5, 1)", "one logit per class", "Bernoulli")),
    "no classes": (check(Categorical(), (5,), whole(0, 0)), ("(5,)", "as many outputs as there are classes")),
    "weights of other classes": (
        check(Categorical([1.0, 2.0]), (5, 3), whole(0, 1)),
        ("class_weights has 2 numbers", "3 logits"),
    ),
    "weights of sequences": (
        check(Categorical([1.0, 2.0]), (5, 4, 2), torch.zeros(5, 4, dtype=torch.long)),
        ("class_weights count rows", "(5, 4, 2)"),
    ),
    # shapes
    "no tensor": (check(Gaussian(), (5, 1), [1.0]), ("y is list", "torch.as_tensor(y)")),
    "too few outputs": (check(Gaussian(), (5, 1), real(7, 2)), ("(7, 2)", "(5, 1)", "targets (N,)")),
    "too many outputs": (check(Gaussian(), (5, 2), real(7)), ("(7,)", "(5, 2)", "targets (N, 2)")),
    "a number": (check(Gaussian(), (5, 1), torch.tensor(1.0)), ("()", "targets (N,)")),
    "one of two": (check(HeteroscedasticGaussian(), (5, 2), real(7, 2)), ("(7, 2)", "targets (N,)")),
    "one-hot": (check(Categorical(), (5, 3), real(7, 3)), ("(7, 3)", "targets (N,)", "y.argmax(-1)")),
    "column of classes": (
        check(Categorical(), (5, 3), torch.zeros(7, 1, dtype=torch.long)),
        ("(7, 1)", "targets (N,)", "y.squeeze(-1)"),
    ),
    "mask of numbers": (check(Gaussian(), (5, 1), real(7), real(7)), ("mask is torch.float32", "torch.bool")),
    "mask of another shape": (
        check(Gaussian(), (5, 2), real(7, 2), torch.ones(6, dtype=torch.bool)),
        ("mask has shape (6,)", "(7, 2)"),
    ),
    # kinds and values
    "NaN": (check(Gaussian(), (5, 1), torch.tensor([0.0, math.nan])), ("1 values", "NaN", "row 1", "mask=")),
    "infinity": (check(StudentT(), (5, 2), torch.full((2, 2), math.inf)), ("4 values", "infinite", "row 0")),
    "complex numbers": (check(Gaussian(), (5, 1), torch.zeros(3) * 1j), ("complex64", "finite numbers")),
    "real classes": (check(Categorical(), (5, 3), real(7)), ("torch.float32", "0 to 2", "y.long()")),
    "class too high": (check(Categorical(), (5, 3), whole(0, 1, 3)), ("holds 3 in row 2", "0 to 2", "3 logits")),
    "class below zero": (check(Categorical(), (5, 3), whole(0, -1)), ("holds -1 in row 1", "0 to 2")),
    "neither 0 nor 1": (check(Bernoulli(), (5, 1), torch.tensor([1.0, 0.5])), ("holds 0.5 in row 1", "wants 0 or 1")),
    "classes from one": (check(Bernoulli(), (5, 1), whole(1, 2)), ("holds 2 in row 1", "0 or 1")),
    "negative count": (check(Poisson(), (5, 1), whole(1, -2)), ("holds -2 in row 1", "at least 0")),
    "part of a count": (check(NegativeBinomial(), (5, 1), torch.tensor([0.5])), ("holds 0.5", "whole numbers")),
    "count not a number": (check(Poisson(), (5, 1), torch.tensor([math.nan])), ("NaN", "mask=")),
    "unmasked": (
        check(Gaussian(), (5, 1), torch.tensor([math.nan, math.nan]), torch.tensor([False, True])),
        ("1 values", "row 1"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_words(name: str) -> None:
    act, words = MISTAKES[name]
    with pytest.raises(ValueError) as caught:
        act()
    for word in words:
        assert word in str(caught.value), str(caught.value)


GOOD = {
    "boolean labels": check(Bernoulli(), (5, 1), torch.tensor([True, False])),
    "integer labels": check(Bernoulli(), (5, 3), torch.ones(4, 3, dtype=torch.uint8)),
    "whole counts": check(Poisson(), (5, 1), whole(0, 4)),
    "small integers": check(Categorical(), (5, 3), torch.tensor([0, 2], dtype=torch.uint8)),
    "integers as real targets": check(Gaussian(), (5, 1), whole(0, 4)),
    "float32 targets": check(Gaussian(), (5, 1), torch.zeros(3, dtype=torch.float32)),
    "NaN under the mask": check(Gaussian(), (5, 1), torch.tensor([math.nan]), torch.tensor([False])),
    "no values": check(Gaussian(), (5, 1), torch.zeros(3, device="meta")),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_not_refused(name: str) -> None:
    GOOD[name]()


@pytest.mark.parametrize("y", [torch.tensor([True, False]), torch.tensor([1, 0]), torch.tensor([1.0, 0.0]).float()])
def test_targets_are_brought_to_the_precision_of_the_net(y: Tensor) -> None:
    trace = poutine.trace(model_of_outputs(Bernoulli())).get_trace(torch.zeros(2, 1), y)
    assert trace.nodes["y"]["value"].dtype == torch.float64
    assert poutine.trace(model_of_outputs(Categorical())).get_trace(torch.zeros(2, 3), y.int()).nodes["y"][
        "value"
    ].dtype == (torch.long)
