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

from bnn.guides import (
    AutoDropout,
    AutoEnsemble,
    TraceDropout_ELBO,
    TraceEnsemble_ELBO,
    WeightRepulsion,
    explicit_regularizer,
)
from support.checks import ALPHA
from support.conjugate import NOISE, PRIOR, two_output_constants, two_output_data, two_outputs
from support.nets import BayesianMLP, data, numbers

pytestmark = pytest.mark.usefixtures("double")

RATE = 0.3


def ready(rate=RATE, **settings):
    guide = AutoDropout(two_outputs, rate, **settings)
    guide(*two_output_data())
    guide.loc.data[:] = numbers(8, seed=5)
    return guide


def energy(weight, bias):
    """U, up to a constant."""
    x, y = two_output_data()
    residuals = y - F.linear(x, weight, bias)
    penalty = weight.square().sum() + bias.square().sum()
    return 0.5 * residuals.square().sum() / NOISE**2 + 0.5 * penalty / PRIOR**2


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
    guide, (x, y) = ready(), two_output_data()
    weight, bias = guide.mean()["weight"], guide.mean()["bias"]
    values, weights = enumerated(lambda mask: energy(weight * mask, bias))
    per_unit = weight.square().sum(0) * (x.square().sum(0) / NOISE**2 + 1 / PRIOR**2)
    wanted = energy(weight, bias) + 0.5 * RATE / (1 - RATE) * per_unit.sum()
    assert float(weights @ values) == pytest.approx(float(wanted), rel=1e-12)
    count = 1000 if name == "Trace" else 100_000
    if name == "Trace":
        found = np.mean([Trace_ELBO().loss(two_outputs, guide, x, y) for _ in range(count)])
    else:
        found = TraceEnsemble_ELBO(num_particles=count).loss(two_outputs, guide, x, y)
    sd = float((weights @ (values - wanted).square()).sqrt())
    z = (found - two_output_constants() - float(wanted)) / (sd / math.sqrt(count))
    assert abs(z) < stats.norm.isf(ALPHA / 2), z


SETTINGS = {
    "one mask": (1, 1.0, None, 1.0),
    "five masks": (5, 1.0, None, 0.2),
    "knocked in": (4, 1.0, 1.0, 1.0),
    "noise alone": (1, 0.0, 0.6, 0.6),
    "half": (2, 0.5, 0.3, 0.3),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_mean_and_variance_of_the_gradient(name):
    """Mean ∇[U + e (E U(Mζ) − U)] and variance v C, by enumeration of all masks; of k masks plainly C / k."""
    masks, explicit, noise, share = SETTINGS[name]
    guide, (x, y) = ready(), two_output_data()
    loc = {name: value.clone() for name, value in guide.mean().items()}

    def gradient(mask):
        leaf = loc["weight"].clone().requires_grad_()
        (found,) = torch.autograd.grad(energy(leaf * mask, loc["bias"]), leaf)
        return found.flatten()

    values, weights = enumerated(gradient)
    variance = share * (weights @ (values - weights @ values).square())
    mean = (1 - explicit) * gradient(torch.ones(3)) + explicit * (weights @ values)
    losses = [TraceDropout_ELBO(masks, explicit=explicit, noise=noise)]
    losses += [TraceEnsemble_ELBO(num_particles=masks)] * (noise is None)
    for loss in losses:
        found, count = [], 1200
        for _ in range(count):
            guide.loc.grad = None
            loss.loss_and_grads(two_outputs, guide, x, y)
            found.append(guide.loc.grad[guide.structure.sites["weight"].slice].clone())
        found = torch.stack(found)
        z = (found.mean(0) - mean) / (variance / count).sqrt()
        assert z.abs().max() < stats.norm.isf(ALPHA / 12), z
        squares = (found - mean).square()
        z = (squares.mean(0) - variance) / (squares.std(0) / math.sqrt(count))
        assert z.abs().max() < stats.norm.isf(ALPHA / 12), z


def test_the_loss_without_noise_and_mask_is_the_energy():
    guide, (x, y) = ready(), two_output_data()
    found = TraceDropout_ELBO(3, explicit=0.0, noise=2.0).loss(two_outputs, guide, x, y)
    assert found - two_output_constants() == pytest.approx(
        float(energy(guide.mean()["weight"], guide.mean()["bias"])), rel=1e-12
    )


def test_the_explicit_regularizer_of_linear_regression():
    """R = ½ p/(1−p) Σ_j |M_j|² Σ_i x_ij² / σ², which is E U(Mζ) − U(M) without the prior's part; and its gradient."""
    guide, (x, y) = ready(), two_output_data()
    weight = guide.mean()["weight"]
    scale = 0.5 * RATE / (1 - RATE) * x.square().sum(0) / NOISE**2
    found = explicit_regularizer(guide, x, y)
    assert float(found.detach()) == pytest.approx(float((scale * weight.square()).sum()), rel=1e-10)
    (gradient,) = torch.autograd.grad(found, guide.loc)
    torch.testing.assert_close(gradient[guide.structure.sites["weight"].slice].reshape(2, 3), 2 * scale * weight)


def test_the_explicit_regularizer_of_a_classifier():
    """½ p/(1−p) Σ_i Σ_j x_ij² M_jᵀ (diag(π_i) − π_i π_iᵀ) M_j, with the class probabilities π."""
    x, y = numbers(6, 3, seed=3), torch.arange(6) % 4

    def classifier(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Categorical(logits=F.linear(x, weight)), obs=y)

    guide = AutoDropout(classifier, RATE)
    guide(x, y)
    weight = guide.mean()["weight"]
    p = F.linear(x, weight).softmax(-1)
    fisher = torch.diag_embed(p) - p[:, :, None] * p[:, None]
    wanted = 0.5 * RATE / (1 - RATE) * torch.einsum("ij,kj,ikl,lj->", x.square(), weight, fisher, weight)
    assert float(explicit_regularizer(guide, x, y).detach()) == pytest.approx(float(wanted), rel=1e-10)


def test_the_explicit_regularizer_of_a_net_is_the_sum_over_its_layers():
    """Against Jacobians with respect to the layers' inputs, by hand."""
    x, y = data()
    net = BayesianMLP(12, None)
    guide = AutoDropout(net, RATE)
    guide(x, y)
    values = guide.mean()
    w1, b1, w2 = values["hidden.weight"], values["hidden.bias"], values["out.weight"]
    hidden = torch.tanh(x @ w1.T + b1)
    of_inputs = ((1 - hidden.square())[:, :, None] * w1).mul(w2[0][:, None]).sum(1)
    total = (of_inputs * x).square().sum() + (w2 * hidden).square().sum()
    wanted = 0.5 * RATE / (1 - RATE) * total / values["sigma"] ** 2
    assert float(explicit_regularizer(guide, x, y).detach()) == pytest.approx(float(wanted), rel=1e-8)


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
    "rate": (lambda: AutoDropout(two_outputs, 1.0), "rate is 1.0; give the probability"),
    "no units": (lambda: ready(units=lambda name, shape: None), "has units to drop: give units="),
    "masks": (lambda: TraceDropout_ELBO(0), "masks is 0; give the number of masks"),
    "explicit": (lambda: TraceDropout_ELBO(explicit=1.5), "explicit is 1.5; give a weight from 0"),
    "noise": (lambda: TraceDropout_ELBO(2, noise=0.1), "with explicit=1.0 and 2 masks it is at least 0.5"),
    "guide": (
        lambda: TraceDropout_ELBO().loss(two_outputs, AutoEnsemble(two_outputs), *two_output_data()),
        "is for AutoDropout",
    ),
    "repulsion": (
        lambda: TraceEnsemble_ELBO(repulsion=WeightRepulsion()).loss(two_outputs, ready(), *two_output_data()),
        "keeps members of an ensemble apart",
    ),
    "dimension": (lambda: ready(units=lambda name, shape: 2), "units gives dimension 2 for site 'weight'"),
}


def test_no_gauss_newton_matrix():
    def gamma(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Gamma(2.0, F.linear(x, weight).exp().squeeze(-1)), obs=y)

    with pytest.raises(NotImplementedError, match="not Gamma"):
        explicit_regularizer(AutoDropout(gamma), numbers(5, 3), numbers(5).exp())


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_in_words(name):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()
