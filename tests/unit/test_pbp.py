"""Probabilistic backpropagation: moments and updates against enumeration, quadrature and conjugate cases."""

import itertools
import math

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import integrate, special, stats

import bnn
from bnn.guides import AutoPBP, TraceEnsemble_ELBO
from bnn.guides.pbp import linear_moments, moved_gamma, moved_normal, relu_moments
from support.checks import ALPHA
from support.nets import numbers

pytestmark = pytest.mark.usefixtures("double")


def test_linear_moments_are_exact_for_independent_entries():
    """All sign combinations of two-point laws: mean ± sd, equally likely."""
    means, sds = numbers(8, seed=1), numbers(8, seed=2).abs()
    weight, bias, inputs = (slice(0, 4), slice(4, 6), slice(6, 8))
    outcomes = []
    for signs in itertools.product([-1.0, 1.0], repeat=8):
        value = means + sds * torch.tensor(signs)
        outcomes.append(value[weight].reshape(2, 2) @ value[inputs] + value[bias])
    outcomes = torch.stack(outcomes)
    found = linear_moments(
        (means[weight].reshape(2, 2), sds[weight].square().reshape(2, 2)),
        (means[bias], sds[bias].square()),
        (means[inputs], sds[inputs].square()),
    )
    torch.testing.assert_close(found[0], outcomes.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], outcomes.var(0, correction=0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("mean", [-3.0, -0.5, 0.0, 1.3, 4.0])
@pytest.mark.parametrize("sd", [0.3, 1.0, 2.5])
def test_relu_moments_are_those_of_a_rectified_gaussian(mean, sd):
    first, second = (
        integrate.quad(lambda a, k=k: a**k * stats.norm.pdf(a, mean, sd), 0, max(0, mean) + 12 * sd, epsabs=1e-14)[0]
        for k in (1, 2)
    )
    found = relu_moments(torch.tensor(mean), torch.tensor(sd**2))
    assert float(found[0]) == pytest.approx(first, rel=1e-7, abs=1e-12)
    assert float(found[1]) == pytest.approx(second - first**2, rel=1e-7, abs=1e-12)


def test_the_update_of_a_normal_has_the_moments_of_the_product():
    """For the factor Φ(w), whose log normalizer is log Φ(m / √(1 + v))."""
    mean, variance = torch.tensor(0.4, requires_grad=True), torch.tensor(1.7, requires_grad=True)
    log_z = torch.special.log_ndtr(mean / (1 + variance).sqrt())
    found = moved_normal(mean.detach(), variance.detach(), *torch.autograd.grad(log_z, [mean, variance]))

    def moment(k):
        return integrate.quad(lambda w: w**k * special.ndtr(w) * stats.norm.pdf(w, 0.4, math.sqrt(1.7)), -15, 15)[0]

    first = moment(1) / moment(0)
    assert float(found[0]) == pytest.approx(first, rel=1e-9)
    assert float(found[1]) == pytest.approx(moment(2) / moment(0) - first**2, rel=1e-8)


def test_an_update_without_a_positive_variance_is_left_out():
    mean, variance = torch.tensor([1.0, 1.0]), torch.tensor([2.0, 2.0])
    found = moved_normal(mean, variance, torch.tensor([0.1, 9.0]), torch.tensor([0.0, 0.0]))
    assert found[0].tolist() == [1.2, 1.0] and found[1].tolist() == pytest.approx([2.0 - 4 * 0.01, 2.0])


def test_the_update_of_a_gamma_is_exact_where_the_posterior_is_a_gamma():
    """A Gaussian residual r with precision τ: Gamma(a + ½, b + ½ r²); log Z is that of a Student t."""
    shape, rate, residual = 3.0, 2.0, 1.4

    def log_z(a):
        return stats.t.logpdf(residual, 2 * a, scale=math.sqrt(rate / a))

    found = moved_gamma(shape, rate, log_z)
    assert found == pytest.approx((shape + 0.5, rate + 0.5 * residual**2), rel=1e-9)


def test_a_datum_far_off_leaves_the_noise_with_a_mean():
    """The shape that the moments ask for may fall below 1, where the mean of 1/τ is infinite: then nothing moves."""

    def log_z(a, residual=62.0, spread=0.6):
        total = spread + 1.0 / (a - 1)
        return -0.5 * math.log(2 * math.pi * total) - 0.5 * residual**2 / total

    ratios = [math.exp(log_z(a + 1) - log_z(a)) for a in (6.0, 7.0)]
    assert 1 / (ratios[1] / ratios[0] * 7 / 6 - 1) < 1  # what equation 12 gives
    assert moved_gamma(6.0, 1.0, log_z) == (6.0, 1.0)
    guide = AutoPBP(linear_model(bnn.likelihoods.Gaussian(precision=dist.Gamma(6.0, 1.0))))
    for _ in range(3):
        guide.assimilate(torch.eye(3), 60.0 * torch.ones(3))
    assert guide.gamma[0] > 1 and guide.mean.isfinite().all() and (guide.variance > 0).all()


def linear_model(noise, prior=1.3):
    net = torch.nn.Linear(3, 1, bias=False)
    return bnn.bayesian(torch.nn.Sequential(net), prior=bnn.priors.Normal(prior), likelihood=noise)


def test_rows_that_see_one_weight_each_give_the_exact_posterior():
    """Precision n_j / σ² + 1/s² and its mean; the sum of log Z is the log evidence."""
    x = torch.eye(3)[torch.tensor([0, 1, 1, 2, 2, 2])]
    y, sigma, prior = numbers(6, seed=3), 0.7, 1.3
    guide = AutoPBP(linear_model(bnn.likelihoods.Gaussian(sigma), prior))
    loss = guide.assimilate(x, y)
    precision = x.sum(0) / sigma**2 + prior**-2
    torch.testing.assert_close(guide.variance, 1 / precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(guide.mean, x.T @ y / sigma**2 / precision, rtol=1e-10, atol=1e-12)
    evidence = stats.multivariate_normal.logpdf(
        y.numpy(), np.zeros(6), sigma**2 * np.eye(6) + prior**2 * (x @ x.T).numpy()
    )
    assert loss == pytest.approx(-evidence, rel=1e-10)
    assert torch.equal(guide.median()["0.weight"], guide.mean[None])
    drawn = guide.draws(100_000)["0.weight"].reshape(-1, 3)
    z = (drawn - guide.mean).square().mean(0) * precision - 1
    assert z.abs().max() < 6 * math.sqrt(2 / 100_000)


def test_log_z_is_that_of_a_net_with_propagated_moments():
    """By hand, through one hidden layer of ReLUs."""
    net = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
    model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.5))
    x, y = numbers(1, 2, seed=3), torch.tensor([0.3])
    guide = AutoPBP(model)
    guide(x, y)
    parts = [
        (site.unflatten(guide.mean).clone(), site.unflatten(guide.variance).clone())
        for site in guide.structure.sites.values()
    ]
    (w1, v1), (b1, s1), (w2, v2), (b2, s2) = parts
    mean, variance = w1 @ x[0] + b1, v1 @ x[0].square() + s1
    above = torch.special.ndtr(mean / variance.sqrt())
    density = (-0.5 * mean.square() / variance).exp() / math.sqrt(2 * math.pi)
    first = mean * above + variance.sqrt() * density
    second = (mean.square() + variance) * above + mean * variance.sqrt() * density
    hidden = second - first.square()
    output = (w2 @ first + b2).squeeze()
    spread = (v2 @ first.square() + v2 @ hidden + w2.square() @ hidden + s2).squeeze()
    wanted = dist.Normal(output, (spread + 0.25).sqrt()).log_prob(y[0])
    assert guide.assimilate(x, y) == pytest.approx(-float(wanted), rel=1e-10)


def test_the_outputs_of_one_hidden_layer_have_exact_moments():
    """Against draws of the weights: given the input, units of one layer are independent."""
    net, count = torch.nn.Sequential(torch.nn.Linear(2, 5), torch.nn.ReLU(), torch.nn.Linear(5, 1)), 400_000
    guide, x = AutoPBP(bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.5))), numbers(4, 2, seed=3)
    guide(x, numbers(4, seed=4))
    guide.mean += numbers(len(guide.mean), seed=5)
    mean, variance = (float(moment) for moment in guide._output(guide.mean, guide.variance, x[0]))
    drawn = guide.draws(count)
    hidden = torch.relu(drawn["0.weight"] @ x[0] + drawn["0.bias"])
    outputs = (hidden * drawn["2.weight"].squeeze(1)).sum(-1) + drawn["2.bias"].squeeze(-1)
    for found, wanted in ((outputs, mean), ((outputs - mean).square(), variance)):
        z = (float(found.mean()) - wanted) / (float(found.std()) / math.sqrt(count))
        assert abs(z) < stats.norm.isf(ALPHA / 4), (z, wanted)


def test_a_learned_noise_and_its_draws():
    """The precision's Gamma takes half a datum's worth of shape from each row that says much about it."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 10), torch.nn.ReLU(), torch.nn.Linear(10, 1))
    model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(precision=dist.Gamma(6.0, 6.0)))
    x = torch.linspace(-1, 1, 60).unsqueeze(-1)
    y = x + 0.2 * numbers(60, 1, seed=2)
    guide = AutoPBP(model)
    losses = [guide.assimilate(x, y) for _ in range(4)]
    assert losses[-1] < losses[0]
    shape, rate = guide.gamma.tolist()
    assert shape > 6.0 and rate > 0
    drawn = guide.draws(50_000)["precision"]
    z = (drawn.mean() - shape / rate) / (math.sqrt(shape) / rate / math.sqrt(50_000))
    assert abs(float(z)) < 5
    below = float((drawn < guide.median()["precision"]).double().mean())
    assert abs(below - 0.5) < 5 * 0.5 / math.sqrt(50_000)
    found = bnn.predict(guide, x, num_samples=200)
    assert found.mean.isfinite().all() and (found.sd > 0).all()


def gaussian(*layers, noise=None, prior=None):
    likelihood = bnn.likelihoods.Gaussian(0.1) if noise is None else noise
    return bnn.bayesian(torch.nn.Sequential(*layers), prior=prior, likelihood=likelihood)


BAD = {
    "model": (lambda: AutoPBP(lambda x: x), "whose net is torch.nn.Sequential of Linear and ReLU"),
    "relu first": (lambda: AutoPBP(gaussian(torch.nn.ReLU(), torch.nn.Linear(1, 1))), "and ReLU, Linear first"),
    "features": (
        lambda: AutoPBP(linear_model(bnn.likelihoods.Gaussian(0.5))).assimilate(numbers(4, 2), numbers(4)),
        r"x has shape \(4, 2\) and y \(4,\); give \(rows, 3\) and",
    ),
    "rows": (
        lambda: AutoPBP(linear_model(bnn.likelihoods.Gaussian(0.5))).assimilate(numbers(4, 3), numbers(5)),
        r"x has shape \(4, 3\) and y \(5,\)",
    ),
    "nan": (
        lambda: AutoPBP(linear_model(bnn.likelihoods.Gaussian(0.5))).assimilate(numbers(2, 3), numbers(2) * math.nan),
        "argument 1 of the model holds 2 values that are NaN",
    ),
    "loss": (
        lambda: TraceEnsemble_ELBO().loss(
            None, AutoPBP(linear_model(bnn.likelihoods.Gaussian(0.5))), numbers(2, 3), numbers(2, 1)
        ),
        r"trained by guide.assimilate\(x, y\), not by SVI",
    ),
    "tanh": (lambda: AutoPBP(gaussian(torch.nn.Linear(1, 1), torch.nn.Tanh())), "of Linear and ReLU"),
    "outputs": (lambda: AutoPBP(gaussian(torch.nn.Linear(1, 2))), "AutoPBP needs one output"),
    "noise": (
        lambda: AutoPBP(gaussian(torch.nn.Linear(1, 1), noise=bnn.likelihoods.Gaussian(dist.HalfNormal(1.0)))),
        "Gaussian noise of a given scale, or precision",
    ),
    "infinite": (
        lambda: AutoPBP(
            gaussian(torch.nn.Linear(1, 1), noise=bnn.likelihoods.Gaussian(precision=dist.Gamma(1.0, 1.0)))
        ),
        "with a > 1, not Gaussian",
    ),
    "prior": (
        lambda: AutoPBP(gaussian(torch.nn.Linear(1, 1), prior=bnn.priors.Laplace(1.0)))(numbers(3, 1), numbers(3, 1)),
        "needs Normal priors of fixed numbers",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_in_words(name):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()


def test_a_row_without_a_finite_likelihood_stops():
    guide = AutoPBP(linear_model(bnn.likelihoods.Gaussian(0.5)))
    guide(torch.eye(3), torch.zeros(3))
    with pytest.raises(RuntimeError, match="standardize inputs and targets"):
        guide.assimilate(torch.eye(3) * 1e200, torch.ones(3))
