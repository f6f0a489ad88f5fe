"""PAC-Bayes certificates: the inverse of kl, the order of the bounds, how often they fail, and what makes them void."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from scipy import stats
from scipy.special import gammaln, logsumexp, rel_entr, xlogy
from torch import nn

import bnn
from bnn import kl_inverse, pac_bayes_bounds, risk_certificate
from bnn.guides import AutoFactorizedNormal
from support.checks import ALPHA


def kl(q, p):
    return rel_entr(q, p) + rel_entr(1 - q, 1 - p)


@pytest.mark.parametrize("risk", [0.0, 1e-6, 0.01, 0.3, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("budget", [0.0, 1e-8, 0.01, 0.5, 3.0, 1e3, math.inf])
def test_the_inverse_of_kl(risk, budget):
    """It is at least the risk, spends the budget to rounding, and is 1 − exp(−c) at risk zero."""
    p = kl_inverse(risk, budget)
    assert risk <= p <= 1.0
    if p < 1.0 - 1e-9:
        assert kl(risk, p) == pytest.approx(budget, rel=1e-6, abs=1e-15)
    else:
        assert risk == 1.0 or kl(risk, 1.0 - 1e-9) < budget
    if risk == 0.0:
        assert p == pytest.approx(-math.expm1(-budget), rel=1e-9, abs=1e-15)


def test_the_inverse_of_kl_against_bisection():
    for risk, budget in np.random.default_rng(0).uniform([0, 0], [1, 0.7], (50, 2)):
        low, high = risk, 1.0
        for _ in range(200):
            middle = 0.5 * (low + high)
            low, high = (middle, high) if kl(risk, middle) <= budget else (low, middle)
        assert kl_inverse(risk, budget) == pytest.approx(low, rel=1e-10)


def test_known_values():
    """n = 10,000, δ = 0.05, KL = 100, R̂ = 0.02: c = (100 + log 4000)/10⁴ by hand."""
    bounds = pac_bayes_bounds(0.02, 100.0, 10_000, delta=0.05)
    c = (100.0 + math.log(4000.0)) / 10_000
    assert bounds.f_classic == pytest.approx(0.02 + math.sqrt(c / 2))
    assert bounds.f_quad == pytest.approx((math.sqrt(0.02 + c / 2) + math.sqrt(c / 2)) ** 2)
    assert kl(0.02, bounds.inverted) == pytest.approx(c)
    assert (bounds.empirical, bounds.kl, bounds.num_data, bounds.confidence) == (0.02, 100.0, 10_000, 0.95)


@pytest.mark.parametrize("risk", [0.0, 0.02, 0.4])
@pytest.mark.parametrize("divergence", [0.0, 50.0, 5000.0])
def test_the_order_of_the_bounds(risk, divergence):
    """The inverse is the tightest; f_quad is the minimum of f_lambda; which beats f_classic below a quarter."""
    bounds = pac_bayes_bounds(risk, divergence, 5000)
    assert bounds.inverted <= min(bounds.f_quad, bounds.f_classic) + 1e-12
    assert bounds.f_lambda == pytest.approx(bounds.f_quad, rel=1e-10)
    c = (divergence + math.log(2 * math.sqrt(5000) / 0.025)) / 5000
    for lam in np.linspace(0.01, 1.99, 300):
        assert bounds.f_lambda <= risk / (1 - lam / 2) + c / (lam * (1 - lam / 2)) + 1e-12
    assert (bounds.f_quad < bounds.f_classic) == (bounds.f_quad < 0.25)


def test_the_constant_of_maurer():
    """Σ_k Binomial(k | n, k/n), which the proof needs, is at most 2√n: for n from 1 to 400."""
    for n in range(1, 401):
        k = np.arange(n + 1)
        log_terms = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + xlogy(k, k / n) + xlogy(n - k, 1 - k / n)
        assert logsumexp(log_terms) <= math.log(2 * math.sqrt(n)) + 1e-12


def test_draws_are_bounded_first():
    draws = [0.0, 0.1, 0.2, 0.1] * 25
    bounds = pac_bayes_bounds(draws, 30.0, 1000, delta=0.02, delta_draws=0.03)
    assert bounds.empirical == pytest.approx(kl_inverse(0.1, math.log(2 / 0.03) / 100))
    assert bounds.confidence == pytest.approx(0.95)
    assert bounds.inverted == pytest.approx(pac_bayes_bounds(bounds.empirical, 30.0, 1000, delta=0.02).inverted)


def test_how_often_the_draws_mislead():
    """The mean of m coin tosses bounded by kl⁻¹ lies below the truth with probability δ' at most; exactly computed."""
    for truth in (0.01, 0.2, 0.5):
        for m in (20, 200):
            k = np.arange(m + 1)
            fails = np.array([kl_inverse(i / m, math.log(2 / 0.05) / m) < truth for i in k])
            assert stats.binom.pmf(k, m, truth)[fails].sum() <= 0.05


# ---- certificates of many small experiments


def experiment(generator, n=40, dim=30, draws=50, prior_from=0, sd=0.3):
    """Coin tosses as labels, of which a Gaussian posterior over linear classifiers learns n by heart.

    Whatever the weights, their risk on fresh rows is ½. ``prior_from`` rows, the first, have trained the prior too.
    """
    x, y = generator.normal(size=(n, dim)), generator.choice([-1.0, 1.0], n)
    mean = 3.0 * x.T @ np.linalg.solve(x @ x.T + np.eye(n), y)
    center = (
        3.0 * x[:prior_from].T @ np.linalg.solve(x[:prior_from] @ x[:prior_from].T + np.eye(prior_from), y[:prior_from])
    )
    divergence = float(np.square(mean - center).sum() / (2 * sd**2))  # prior N(center, sd²)
    weights = mean + sd * generator.normal(size=(draws, dim))
    wrong = (weights @ x.T) * y < 0
    return wrong, divergence


def test_a_certificate_holds_as_often_as_it_says():
    """400 data sets of coin tosses: a bound below ½ is wrong, and may be so with probability δ + δ' in each."""
    generator = np.random.default_rng(0)
    failures = trained = 0
    for _ in range(400):
        wrong, divergence = experiment(generator)
        bounds = pac_bayes_bounds(wrong.mean(1), divergence, 40, delta=0.05, delta_draws=0.05)
        failures += bounds.inverted < 0.5
        trained += wrong.mean() < 0.3
    assert trained > 390  # it did learn them
    assert failures <= stats.binom.isf(ALPHA, 400, 0.1)


def test_what_a_prior_that_has_seen_the_rows_does():
    """With such a prior the KL vanishes and the same formula certifies nonsense, nearly always: hence the refusal."""
    generator = np.random.default_rng(1)
    bounds = []
    for _ in range(50):
        wrong, divergence = experiment(generator, n=100, dim=120, prior_from=100, sd=0.05)
        bounds.append(pac_bayes_bounds(wrong.mean(1), divergence, 100, delta=0.05, delta_draws=0.05).inverted)
    assert np.mean(np.array(bounds) < 0.5) > 0.9


def test_a_prior_from_other_rows_is_honest():
    """From the first 20 rows, the bound over the last 20: it holds as often as it says."""
    generator = np.random.default_rng(2)
    failures = 0
    for _ in range(400):
        wrong, divergence = experiment(generator, prior_from=20)
        bounds = pac_bayes_bounds(wrong[:, 20:].mean(1), divergence, 20, delta=0.05, delta_draws=0.05)
        failures += bounds.inverted < 0.5
    assert failures <= stats.binom.isf(ALPHA, 400, 0.1)


# ---- of a guide


def classifier(scale=0.05, loc=0.0, likelihood=None):
    """A linear classifier whose guide has a given scale, 300 rows and their labels."""
    net = nn.Sequential(nn.Linear(2, 2, bias=False))
    likelihood = likelihood or bnn.likelihoods.Categorical()
    model = bnn.bayesian(net, prior=bnn.priors.Normal(1.0), likelihood=likelihood)
    x = torch.randn(300, 2)
    guide = AutoFactorizedNormal(model, init_scale=scale)
    return guide, x, (x[:, 0] > 0).long()


def test_a_certificate_of_a_guide():
    """Its KL is the closed form, its risks those of the draws, on the rows that the prior has not seen."""
    guide, x, y = classifier()
    found = risk_certificate(guide, x, y, prior_rows=range(100), num_draws=120, delta=0.03, delta_draws=0.02)
    median = guide.median(x, y)["0.weight"].detach()
    expected = 0.5 * (4 * 0.05**2 + float(median.square().sum()) - 4) - 4 * math.log(0.05)
    assert found.kl == pytest.approx(expected, rel=1e-5)
    assert (found.num_data, found.confidence) == (200, pytest.approx(0.95))
    pyro.set_rng_seed(5)
    found = risk_certificate(guide, x, y, prior_rows=range(100), num_draws=120)
    pyro.set_rng_seed(5)
    bnn.kl_to_prior(guide, x, y)
    weights = guide.draws(120)["0.weight"].detach()
    risks = ((x[100:] @ weights.mT).argmax(-1) != y[100:]).double().mean(-1)
    assert found.empirical == pytest.approx(kl_inverse(float(risks.mean()), math.log(2 / 0.01) / 120))


def test_the_cross_entropy_is_clamped():
    guide, x, y = classifier()
    guide(x, y)
    pyro.set_rng_seed(5)
    found = risk_certificate(guide, x, y, prior_rows=[], loss="cross_entropy", least_probability=0.2, num_draws=60)
    pyro.set_rng_seed(5)
    bnn.kl_to_prior(guide, x, y)
    logits = x @ guide.draws(60)["0.weight"].detach().mT
    p = logits.softmax(-1).gather(-1, y.expand(60, -1)[..., None])
    risk = float((p.clamp_min(0.2).log() / math.log(0.2)).mean())
    assert found.empirical == pytest.approx(kl_inverse(risk, math.log(2 / 0.01) / 60), rel=1e-5)
    assert found.num_data == 300


def test_a_bernoulli_site_serves_too():
    net = nn.Sequential(nn.Linear(2, 1))
    model = bnn.bayesian(net, likelihood=bnn.likelihoods.Bernoulli())
    x = torch.randn(60, 2)
    found = risk_certificate(
        AutoFactorizedNormal(model, init_scale=0.1), x, (x[:, :1] > 0).float(), prior_rows=[], num_draws=20
    )
    assert 0.0 < found.inverted <= 1.0


def learned_scale(x, y=None):
    scale = pyro.sample("scale", dist.HalfNormal(1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(2), scale).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def real_targets(x, y=None):
    w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ w, 1.0), obs=None if y is None else y.to(x))


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"prior_rows": range(100), "bound_rows": range(99, 300)}, ValueError, "1 rows, 99 for instance, are both in"),
        ({"prior_rows": range(300)}, ValueError, "no rows are left for the bound"),
        ({"prior_rows": [300]}, ValueError, "prior_rows run from 300 to 300, but the rows from 0 to 299"),
        ({"prior_rows": [], "bound_rows": [0, 0, 1]}, ValueError, "bound_rows hold a row twice"),
        ({"prior_rows": [0.5]}, ValueError, "prior_rows are not whole numbers"),
        ({"prior_rows": [True] * 300}, ValueError, "prior_rows are not whole numbers"),
        ({"prior_rows": [], "loss": "hinge"}, ValueError, "loss is 'hinge'; give 'zero_one' or 'cross_entropy'"),
        ({"prior_rows": [], "least_probability": 0.0}, ValueError, "least_probability is 0.0"),
        ({"prior_rows": [], "num_draws": 0}, ValueError, "num_draws is 0"),
        ({"prior_rows": [], "delta": 1.0}, ValueError, "delta is 1.0; give a probability"),
    ],
)
def test_what_is_refused(settings, error, words):
    guide, x, y = classifier()
    with pytest.raises(error, match=words):
        risk_certificate(guide, x, y, **{"num_draws": 5, **settings})


def test_guides_that_cannot_be_certified():
    _, x, y = classifier()
    for model in (learned_scale, real_targets):  # a hierarchy; a guide whose sites are not its Normals
        with pytest.raises(NotImplementedError, match="is not known in closed form, and an estimate certifies nothing"):
            risk_certificate(AutoNormal(model), x, y.float(), prior_rows=[])
    with pytest.raises(ValueError, match="certificates are for classification"):
        risk_certificate(AutoFactorizedNormal(real_targets), x, y.float(), prior_rows=[])


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: pac_bayes_bounds(2.3, 1.0, 10), r"risk holds 2.3: the bounds hold for losses in \[0, 1\] only"),
        (lambda: pac_bayes_bounds([0.5, -0.1], 1.0, 10), "risk holds -0.1: the bounds hold"),
        (lambda: pac_bayes_bounds([0.5, math.nan], 1.0, 10), "risk holds NaN"),
        (lambda: pac_bayes_bounds([[0.5]], 1.0, 10), r"risk has shape \(1, 1\); give one number"),
        (lambda: pac_bayes_bounds(0.5, -1.0, 10), "kl is -1.0; give a finite KL"),
        (lambda: pac_bayes_bounds(0.5, math.inf, 10), "kl is inf"),
        (lambda: pac_bayes_bounds(0.5, math.nan, 10), "kl is nan"),
        (lambda: pac_bayes_bounds(0.5, 1.0, 0), "num_data is 0"),
        (lambda: pac_bayes_bounds(0.5, 1.0, 10, delta=0.0), "delta is 0.0"),
        (lambda: pac_bayes_bounds([0.5], 1.0, 10, delta_draws=2.0), "delta_draws is 2.0"),
        (lambda: kl_inverse(1.5, 0.1), r"risk is 1.5; give the mean of losses in \[0, 1\]"),
        (lambda: kl_inverse(0.5, -0.1), "budget is -0.1"),
        (lambda: kl_inverse(0.5, math.nan), "budget is nan"),
    ],
)
def test_numbers_that_are_refused(given, words):
    with pytest.raises(ValueError, match=words):
        given()
