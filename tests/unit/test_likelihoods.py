"""Likelihoods of a net's outputs: the densities written out by hand, masks and weights as sums."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import special, stats
from torch import Tensor

import bnn
from bnn.likelihoods import (
    Bernoulli,
    Categorical,
    Gaussian,
    HeteroscedasticGaussian,
    NegativeBinomial,
    Poisson,
    StudentT,
)
from bnn.pointwise import evaluate
from support.checks import ALPHA
from support.nets import numbers
from support.plain_nets import model_of_outputs

ROWS = 12


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


def softplus(z: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, z)


def negative_binomial(y: np.ndarray, f: np.ndarray, concentration: float) -> np.ndarray:
    """Of mean exp(f)."""
    return stats.nbinom.logpmf(y, concentration, concentration / (concentration + np.exp(f)))


HALF_CAUCHY = dist.HalfCauchy(torch.tensor(1.0, dtype=torch.float64))
GAMMA = dist.Gamma(torch.tensor(6.0, dtype=torch.float64), torch.tensor(5.0, dtype=torch.float64))
SCALES = torch.tensor([0.1, 0.2, 1.0], dtype=torch.float64)
PER_OUTPUT = dist.LogNormal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1)


@dataclass(frozen=True)
class Case:
    """A likelihood, and its log density per number by SciPy, of targets y, outputs f and the learned noise v."""

    name: str
    likelihood: Any
    log_density: Callable[..., np.ndarray]
    outputs: tuple[int, ...] = (1,)
    targets: str = "real"
    learned: str | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row's targets."""
        if self.targets == "classes":
            return self.outputs[:-1]
        half = isinstance(self.likelihood, HeteroscedasticGaussian)
        shape = (*self.outputs[:-1], self.outputs[-1] // 2) if half else self.outputs
        return () if shape == (1,) else shape

    def y(self) -> Tensor:
        real = numbers(ROWS, *self.shape, seed=8)
        if self.targets == "classes":
            return torch.arange(real.numel()).reshape(real.shape) % self.outputs[-1]
        return {"real": real, "binary": (real > 0).to(real), "counts": (3 * real.abs()).floor()}[self.targets]

    def f(self) -> Tensor:
        return numbers(ROWS, *self.outputs, seed=9)


def gaussian(y: np.ndarray, f: np.ndarray, sd: Any) -> np.ndarray:
    return stats.norm.logpdf(y, f, sd)


def heteroscedastic(y: np.ndarray, f: np.ndarray, v: Any) -> np.ndarray:
    half = f.shape[-1] // 2
    mean, raw = f[..., :half].reshape(y.shape), f[..., half:].reshape(y.shape)
    return stats.norm.logpdf(y, mean, 1e-3 + softplus(raw))


def bernoulli(y: np.ndarray, f: np.ndarray, v: Any) -> np.ndarray:
    return y * special.log_expit(f) + (1 - y) * special.log_expit(-f)


def categorical(y: np.ndarray, f: np.ndarray, v: Any) -> np.ndarray:
    return np.take_along_axis(special.log_softmax(f, -1), y[..., None], -1)[..., 0]


CASES = [
    Case("gaussian", Gaussian(0.3), lambda y, f, v: gaussian(y, f, 0.3)),
    Case("gaussian_default", Gaussian(), lambda y, f, v: gaussian(y, f, 0.1)),
    Case("gaussian_learned", Gaussian(HALF_CAUCHY), gaussian, learned="scale"),
    Case("gaussian_precision", Gaussian(precision=GAMMA), lambda y, f, v: gaussian(y, f, v**-0.5), learned="precision"),
    Case("gaussian_known_precision", Gaussian(precision=4.0), lambda y, f, v: gaussian(y, f, 0.5)),
    Case("gaussian_3", Gaussian(0.3), lambda y, f, v: gaussian(y, f, 0.3), (3,)),
    Case("gaussian_image", Gaussian(0.3), lambda y, f, v: gaussian(y, f, 0.3), (2, 3)),
    Case("gaussian_per_output", Gaussian(SCALES), lambda y, f, v: gaussian(y, f, [0.1, 0.2, 1]),
         (3,)),
    Case("gaussian_learned_3", Gaussian(PER_OUTPUT), gaussian, (3,), learned="scale"),
    Case("heteroscedastic", HeteroscedasticGaussian(), heteroscedastic, (2,)),
    Case("heteroscedastic_3", HeteroscedasticGaussian(), heteroscedastic, (6,)),
    Case("student", StudentT(5.0, 0.3), lambda y, f, v: stats.t.logpdf(y, 5.0, f, 0.3)),
    Case("student_learned_3", StudentT(5.0, HALF_CAUCHY), lambda y, f, v: stats.t.logpdf(y, 5.0, f, v), (3,),
         learned="scale"),
    Case("categorical", Categorical(), categorical, (4,), "classes"),
    Case("categorical_sequence", Categorical(), categorical, (5, 4), "classes"),
    Case("bernoulli", Bernoulli(), bernoulli, (1,), "binary"),
    Case("bernoulli_3", Bernoulli(), bernoulli, (3,), "binary"),
    Case("poisson", Poisson(), lambda y, f, v: stats.poisson.logpmf(y, np.exp(f)), (1,), "counts"),
    Case("poisson_3", Poisson(), lambda y, f, v: stats.poisson.logpmf(y, np.exp(f)), (3,), "counts"),
    Case("negative_binomial", NegativeBinomial(2.5), lambda y, f, v: negative_binomial(y, f, 2.5), (1,), "counts"),
    Case("negative_binomial_learned", NegativeBinomial(GAMMA), negative_binomial, (3,), "counts", "concentration"),
]  # fmt: skip
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def noise_of(case: Case) -> dict[str, Tensor]:
    if case.learned is None:
        return {}
    per_output = getattr(case.likelihood, case.learned).event_shape
    return {case.learned: torch.tensor([0.4, 0.9, 1.3]) if per_output else torch.tensor(0.8)}


def densities(case: Case, y: Tensor, f: Tensor) -> np.ndarray:
    """Of each number of the targets."""
    values = f.numpy()
    if case.targets != "classes" and not isinstance(case.likelihood, HeteroscedasticGaussian):
        values = values.reshape(y.shape)
    noise = next(iter(noise_of(case).values()), torch.zeros(())).numpy()
    return case.log_density(y.numpy(), values, noise)


def log_likelihood(model: Any, case: Case, *args: Any) -> Tensor:
    """Log density of the site y at a shift of zero and the case's noise."""
    values = {"shift": torch.zeros(()), **noise_of(case)}
    trace = poutine.trace(poutine.condition(model, values)).get_trace(*args)
    trace.compute_log_prob()
    return trace.nodes["y"]["log_prob"]


@each_case
def test_log_joint_is_the_one_by_hand(case: Case) -> None:
    y, f = case.y(), case.f()
    values = {"shift": torch.tensor(0.0), **noise_of(case)}
    trace = poutine.trace(poutine.condition(model_of_outputs(case.likelihood), values)).get_trace(f, y)
    expected = densities(case, y, f).sum() + stats.norm.logpdf(0.0)
    if case.learned:
        expected += float(getattr(case.likelihood, case.learned).log_prob(values[case.learned]))
    assert abs(float(trace.log_prob_sum()) - expected) <= 1e-12 * (1 + abs(expected))
    rows = densities(case, y, f).reshape(ROWS, -1).sum(-1)
    found = log_likelihood(model_of_outputs(case.likelihood), case, f, y).numpy()
    assert np.allclose(found, rows, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.outputs == (1,)], ids=lambda case: case.name)
def test_targets_of_one_output_may_have_a_dimension_of_one(case: Case) -> None:
    y, f, model, mask = case.y(), case.f(), model_of_outputs(case.likelihood), torch.arange(ROWS) % 3 > 0
    expected = log_likelihood(model, case, f, y)
    assert torch.equal(log_likelihood(model, case, f, y.unsqueeze(-1)), expected)
    assert torch.equal(log_likelihood(model, case, f.squeeze(-1), y), expected)
    masked = log_likelihood(model, case, f, y[:, None], mask[:, None])
    assert torch.equal(masked, torch.where(mask, expected, torch.zeros(())))


@each_case
def test_masks_leave_out(case: Case) -> None:
    """Whatever stands where the mask is False, NaN included: the sum over the rest, and finite gradients."""
    y, f = case.y(), case.f()
    of_rows, of_numbers = torch.arange(ROWS) % 3 > 0, numbers(*y.shape, seed=10) > -0.5
    model = model_of_outputs(case.likelihood)
    for mask in (of_rows, of_numbers):
        entries = mask.reshape(-1, *[1] * (y.dim() - 1)).expand(y.shape) if mask.shape != y.shape else mask
        expected = np.where(entries, densities(case, y, f), 0.0).reshape(ROWS, -1).sum(-1)
        hidden = torch.where(entries, y, torch.full((), -7 if case.targets == "classes" else math.nan).to(y))
        assert np.allclose(log_likelihood(model, case, f, hidden, mask), expected, rtol=1e-12, atol=1e-12)
        shift = torch.zeros((), requires_grad=True)
        values = {"shift": shift, **noise_of(case)}
        poutine.trace(poutine.condition(model, values)).get_trace(f, hidden, mask).log_prob_sum().backward()
        assert torch.isfinite(shift.grad)


@each_case
def test_recording_is_the_handlers(case: Case) -> None:
    """On minibatches with a mask, for several chains."""
    y, f, model = case.y(), case.f(), model_of_outputs(case.likelihood, batch_size=5)
    potential = bnn.Potential(model, f, y, torch.arange(ROWS) % 3 > 0, compile="fx")
    assert potential.is_recorded and potential.vectorizes()
    position = 0.5 * torch.randn(2, potential.dim)
    (inputs,) = potential.stream(2).next(1)
    energy, grad = potential.traced_energy_and_grad(position, inputs)
    for chain in range(2):
        expected = potential.handlers_energy_and_grad(position[chain], [t[chain] for t in inputs])
        assert torch.allclose(energy[chain], expected[0], rtol=1e-10)
        assert torch.allclose(grad[chain], expected[1], rtol=1e-9, atol=1e-10)


@each_case
def test_predictions_are_pyros_own(case: Case) -> None:
    """Mean, variance and draws of the targets, by the distribution that Pyro would use."""
    draws, f = 4000, case.f()
    law = case.likelihood.law(f, noise_of(case))
    assert law.batch_shape == (ROWS,) and law.event_shape == case.shape
    samples = law.sample((draws,)).reshape(draws, ROWS, -1)
    if case.targets == "classes":
        samples = (samples[..., None] == torch.arange(case.outputs[-1])).to(f)
        mean = f.softmax(-1).reshape(1, ROWS, -1, case.outputs[-1])
        variance = mean * (1 - mean)
    else:
        mean, variance = (v.reshape(1, ROWS, -1) for v in (law.mean, law.variance))
    z = (samples.mean(0) - mean[0]) / (variance[0] / draws).sqrt()
    assert 2 * stats.norm.sf(z.abs().max()) * z.numel() > ALPHA
    model = pickle.loads(pickle.dumps(model_of_outputs(case.likelihood)))
    values = {"shift": torch.zeros(()), **noise_of(case)}
    drawn = poutine.trace(poutine.condition(model, values)).get_trace(f).nodes["y"]["value"]
    assert drawn.shape == (ROWS, *case.shape)


@pytest.mark.parametrize("batch_size", [None, 5])
def test_class_weights_make_the_weighted_sum(batch_size: int | None) -> None:
    case = CASES[[case.name for case in CASES].index("categorical")]
    weights, y, f = np.array([1.0, 0.5, 2.0, 3.0]), case.y(), case.f()
    terms = weights[y.numpy()] * densities(case, y, f)
    model = model_of_outputs(Categorical(weights.tolist()), batch_size=batch_size)
    mask = torch.arange(ROWS) % 3 > 0
    for args, expected in (((f, y), terms), ((f, y, mask), np.where(mask, terms, 0.0))):
        potential = bnn.Potential(model, *args, compile="fx")
        assert potential.is_recorded
        energy = float(potential.full_energy(torch.zeros(1, 1))) + stats.norm.logpdf(0.0)
        assert abs(energy + expected.sum()) <= 1e-12 * (1 + abs(energy))
    if batch_size is None:
        run = {"shift": torch.zeros(3)}
        groups = evaluate(model, (f, y), {}, run, {"log_likelihood": True})
        assert np.allclose(groups.values["log_likelihood"]["y"][0], densities(case, y, f))  # of the targets, unweighted
    trace = poutine.trace(poutine.condition(model, {"shift": torch.zeros(())})).get_trace(f)
    assert trace.nodes["y"]["scale"] == 1.0  # predictions know of no weights
