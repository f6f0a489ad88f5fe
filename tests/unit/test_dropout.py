"""Dropout over weights: the law of the masks, and the loss in closed form."""

import itertools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from scipy import stats

from bnn.guides import AutoDropout, TraceEnsemble_ELBO
from support.checks import ALPHA
from support.nets import BayesianMLP, data, numbers

NOISE, PRIOR, RATE = 0.7, 1.3, 0.3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def linear(x, y):
    """With two outputs: a mask drops columns of the weight."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), PRIOR).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(2), PRIOR).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(F.linear(x, weight, bias), NOISE).to_event(1), obs=y)


def args():
    return numbers(12, 3, seed=3), numbers(12, 2, seed=4)


def ready(rate=RATE, **settings):
    guide = AutoDropout(linear, rate, **settings)
    guide(*args())
    guide.loc.data[:] = numbers(8, seed=5)
    return guide


def energy(weight, bias):
    """U, up to a constant."""
    x, y = args()
    residuals = y - F.linear(x, weight, bias)
    penalty = weight.square().sum() + bias.square().sum()
    return 0.5 * residuals.square().sum() / NOISE**2 + 0.5 * penalty / PRIOR**2


def constants():
    return 24 * math.log(NOISE * math.sqrt(2 * math.pi)) + 8 * math.log(PRIOR * math.sqrt(2 * math.pi))


def enumerated(function):
    """Values of a function of the mask over all masks, and their probabilities."""
    masks = [torch.tensor(bits, dtype=torch.float64) for bits in itertools.product([0.0, 1.0], repeat=3)]
    weights = torch.tensor([math.prod(1 - RATE if bit else RATE for bit in mask.tolist()) for mask in masks])
    return torch.stack([function(mask / (1 - RATE)) for mask in masks]), weights


def test_masks_drop_whole_units_independently():
    """Each pattern of dropped columns as often as its probability says; kept columns are M / (1 − p)."""
    guide, count = ready(), 100_000
    drawn = guide.draws(count)
    loc = guide.mean()
    kept = drawn["weight"][:, 0] != 0
    torch.testing.assert_close(drawn["weight"], loc["weight"] * kept[:, None] / (1 - RATE))
    assert torch.equal(drawn["bias"], loc["bias"].expand(count, 2))
    pattern = (kept.long() * torch.tensor([4, 2, 1])).sum(1).bincount(minlength=8).numpy()
    _, weights = enumerated(lambda mask: mask.sum())
    assert stats.chisquare(pattern, weights.numpy() * count).pvalue > ALPHA


@pytest.mark.parametrize("name", ["Trace", "vectorized"])
def test_the_loss_is_the_mean_energy_in_closed_form(name):
    """E U(M ζ) = U(M) + ½ p/(1−p) Σ_j |M_j|² (Σ_i x_ij² / σ² + 1/s²), the last Gal's penalty."""
    guide, (x, y) = ready(), args()
    weight, bias = guide.mean()["weight"], guide.mean()["bias"]
    values, weights = enumerated(lambda mask: energy(weight * mask, bias))
    per_unit = weight.square().sum(0) * (x.square().sum(0) / NOISE**2 + 1 / PRIOR**2)
    wanted = energy(weight, bias) + 0.5 * RATE / (1 - RATE) * per_unit.sum()
    assert float(weights @ values) == pytest.approx(float(wanted), rel=1e-12)
    count = 1000 if name == "Trace" else 100_000
    if name == "Trace":
        found = np.mean([Trace_ELBO().loss(linear, guide, x, y) for _ in range(count)])
    else:
        found = TraceEnsemble_ELBO(num_particles=count).loss(linear, guide, x, y)
    sd = float((weights @ (values - wanted).square()).sqrt())
    z = (found - constants() - float(wanted)) / (sd / math.sqrt(count))
    assert abs(z) < stats.norm.isf(ALPHA / 2), z


@pytest.mark.parametrize("masks", [1, 5])
def test_the_gradients_variance_falls_as_one_over_the_masks(masks):
    """Mean and covariance of the gradient of M over all masks; the latter over their number."""
    guide, (x, y) = ready(), args()
    loc = {name: value.clone() for name, value in guide.mean().items()}

    def gradient(mask):
        leaf = loc["weight"].clone().requires_grad_()
        (found,) = torch.autograd.grad(energy(leaf * mask, loc["bias"]), leaf)
        return found.flatten()

    values, weights = enumerated(gradient)
    mean = weights @ values
    variance = weights @ (values - mean).square()
    kurtosis = weights @ (values - mean) ** 4 / variance**2
    loss, found = TraceEnsemble_ELBO(num_particles=masks), []
    for _ in range(1500):
        guide.loc.grad = None
        loss.loss_and_grads(linear, guide, x, y)
        found.append(guide.loc.grad[guide.structure.sites["weight"].slice].clone())
    found, count = torch.stack(found), 1500
    z = (found.mean(0) - mean) / (variance / masks / count).sqrt()
    assert z.abs().max() < stats.norm.isf(ALPHA / 12)
    excess = (kurtosis - 3) / masks + 3  # of the mean of so many masks
    ratio = (found - mean).square().mean(0) / (variance / masks)
    assert ((ratio - 1).abs() < stats.norm.isf(ALPHA / 12) * ((excess - 1) / count).sqrt()).all(), ratio


def test_units_say_what_is_dropped():
    guide = ready(units=lambda name, shape: 0 if name == "bias" else None)
    drawn = guide.draws(50)
    assert (drawn["bias"] == 0).any() and torch.equal(drawn["weight"][0], guide.mean()["weight"])
    pyro.clear_param_store()
    guide = AutoDropout(BayesianMLP(12, None))
    guide(*data())
    assert guide.unit_dims == {"hidden.weight": 1, "out.weight": 1}


def test_medians_of_entries():
    for rate, factor in ((0.3, 1 / 0.7), (0.6, 0.0)):
        guide = ready(rate)
        loc, median = guide.mean(), guide.median()
        torch.testing.assert_close(median["weight"], factor * loc["weight"])
        torch.testing.assert_close(guide.draws(1001)["weight"].quantile(0.5, 0), median["weight"])
        assert torch.equal(median["bias"], loc["bias"])
        pyro.clear_param_store()


BAD = {
    "rate": (lambda: AutoDropout(linear, 1.0), "rate is 1.0; give the probability"),
    "no units": (lambda: ready(units=lambda name, shape: None), "has units to drop: give units="),
    "dimension": (lambda: ready(units=lambda name, shape: 2), "units gives dimension 2 for site 'weight'"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_in_words(name):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()
