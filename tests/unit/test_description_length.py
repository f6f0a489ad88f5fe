"""The ELBO as a code length: the evidence under the exact posterior, closed forms, and what has no length."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal
from scipy import stats

import bnn
from bnn import description_length, kl_to_prior
from bnn.guides import AutoEnsemble, AutoFactorizedNormal, AutoIVON, AutoMatrixNormal, Laplace
from support.checks import ALPHA

N, NOISE = 12, 0.7


def model(y):
    mean = pyro.sample("mean", dist.Normal(0.3, 2.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(mean, NOISE), obs=y)


def normal_guide(loc, scale):
    def guide(y):
        pyro.sample("mean", dist.Normal(loc, scale))

    guide.model = model
    return guide


def posterior(y):
    precision = 0.25 + N / NOISE**2
    return float((0.3 / 4 + y.sum() / NOISE**2) / precision), precision**-0.5


@pytest.fixture
def y():
    torch.set_default_dtype(torch.float64)
    return 1.0 + torch.randn(N)


def test_the_exact_posterior_costs_the_evidence(y):
    """Whatever the draw: −log p(D), of a Normal of covariance 4 + noise; in nats, bits, per weight and per target."""
    found = description_length(normal_guide(*posterior(y)), y, num_draws=1500)
    evidence = stats.multivariate_normal(np.full(N, 0.3), 4.0 + NOISE**2 * np.eye(N)).logpdf(y.numpy())
    # With the KL in closed form what is left varies; with its own draws it does not.
    assert abs(found.total.value + evidence) < 5.0 * found.total.error  # ALPHA = 6e-7
    assert found.total.error < 0.02 * abs(evidence)
    assert found.total_bits == found.total.value / math.log(2)
    assert found.bits_per_target == pytest.approx(found.total_bits / N)
    assert found.bits_per_weight == found.kl_bits
    assert (found.num_weights, found.num_targets, found.kl.error) == (1, N, 0.0)


def test_bits_back(y):
    """Draw by draw: log q − log p of the weights, less what the targets say, is the evidence itself."""
    loc, scale = posterior(y)

    def auto(y):
        u = pyro.sample("u", dist.Normal(loc / 2, scale / 2), infer={"is_auxiliary": True})
        pyro.sample("mean", dist.Delta(2 * u, log_density=torch.tensor(-math.log(2.0))))

    auto.model = model
    found = description_length(auto, y, num_draws=20)
    evidence = stats.multivariate_normal(np.full(N, 0.3), 4.0 + NOISE**2 * np.eye(N)).logpdf(y.numpy())
    assert found.total.value == pytest.approx(-evidence, rel=1e-9)
    assert found.total.error == 0.0 and found.kl.error > 0.0 and found.data.error > 0.0


def test_the_gap_to_the_evidence_is_the_divergence_from_the_posterior(y):
    loc, scale = posterior(y)
    found = description_length(normal_guide(loc + 2 * scale, 3 * scale), y, num_draws=2500)
    evidence = stats.multivariate_normal(np.full(N, 0.3), 4.0 + NOISE**2 * np.eye(N)).logpdf(y.numpy())
    gap = 0.5 * (9.0 + 4.0 - 1.0) - math.log(3.0)
    assert abs(found.total.value + evidence - gap) < 5.0 * found.total.error and found.total.error < 0.05 * gap


@pytest.mark.parametrize(
    ("guide_type", "bias"),
    [
        (AutoFactorizedNormal, True),
        (AutoMatrixNormal, False),
        pytest.param(AutoFactorizedNormal, False, marks=pytest.mark.slow),
        pytest.param(AutoMatrixNormal, True, marks=pytest.mark.slow),
    ],
)
def test_closed_forms_of_our_guides(guide_type, bias):
    """The KL of the whole net against draws of log q − log p, which is what the guides of Pyro's get.

    A matrix normal over weights and biases together has none.
    """
    net = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=bias), torch.nn.Tanh(), torch.nn.Linear(3, 2, bias=bias))
    net_model = bnn.bayesian(net, likelihood=bnn.likelihoods.Categorical())
    x, labels = torch.randn(20, 2), torch.arange(20) % 2
    guide = guide_type(net_model, init_scale=0.2)
    exact = kl_to_prior(guide, x, labels)
    assert (exact.error == 0.0) == (guide_type is AutoFactorizedNormal or not bias)
    draws = 500
    logs = []
    for _ in range(draws):
        drawn = pyro.poutine.trace(guide).get_trace(x, labels)
        trace = pyro.poutine.trace(pyro.poutine.replay(net_model, drawn)).get_trace(x, labels)
        priors = [
            trace.nodes[name]["fn"].log_prob(trace.nodes[name]["value"]).sum() for name in guide.median(x, labels)
        ]
        logs.append(float((drawn.log_prob_sum() - sum(priors)).detach()))
    error = np.std(logs, ddof=1) / math.sqrt(draws)
    assert abs(np.mean(logs) - exact.value) < 5.0 * math.hypot(error, exact.error) and error < 0.02 * exact.value
    found = description_length(guide, x, labels, num_draws=10)
    assert found.num_weights == (17 if bias else 12) and found.num_targets == 20
    assert found.kl == exact or exact.error


def test_pyros_guides_have_estimates(y):
    """AutoNormal draws an auxiliary site and moves it: no closed form is seen, the mean is the same."""
    guide = AutoNormal(model, init_scale=0.3)
    Trace_ELBO().loss(model, guide, y)
    loc = float(guide.median()["mean"])
    expected = math.log(2.0 / 0.3) + (0.09 + (loc - 0.3) ** 2) / 8.0 - 0.5
    found = kl_to_prior(guide, y, num_draws=1500)
    assert 0.0 < found.error < 0.03 and abs(found.value - expected) < 5.0 * found.error


def test_an_estimate_is_none_however_little_it_varies(y):
    """Of a large KL its draws differ by a millionth: that is no closed form."""

    def far(y):
        u = pyro.sample("u", dist.Normal(5e5, 0.5), infer={"is_auxiliary": True})
        pyro.sample("mean", dist.Delta(2 * u, log_density=torch.tensor(-math.log(2.0))))

    far.model = model
    found = kl_to_prior(far, y, num_draws=20)
    assert 0.0 < found.error < 1e-5 * found.value


def hierarchy(y):
    scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
    pyro.sample("z", dist.Normal(torch.zeros(3), scale).to_event(1))


def hierarchy_guide(loc):
    def guide(y):
        pyro.sample("scale", dist.LogNormal(loc, 0.3))
        pyro.sample("z", dist.Normal(torch.ones(3), 0.5).to_event(1))

    guide.model = hierarchy
    return guide


def test_a_hierarchy_is_averaged_over_its_scales():
    guide = hierarchy_guide(0.2)
    found = kl_to_prior(guide, None, num_draws=3000)
    # E log s = 0.2 and E s⁻² = exp(−0.4 + 2 · 0.09)
    outer = math.log(0.5 / 0.3) + (0.09 + 0.04) / 0.5 - 0.5
    inner = 3 * (0.2 - math.log(0.5) + 1.25 * math.exp(-0.22) / 2 - 0.5)
    assert found.error > 0.0 and abs(found.value - outer - inner) < 5.0 * found.error


def test_minibatches_count_all_data(y):
    def subsampled(y):
        mean = pyro.sample("mean", dist.Normal(0.3, 2.0))
        with pyro.plate("data", len(y), subsample_size=4) as rows:
            pyro.sample("y", dist.Normal(mean, NOISE), obs=y[rows])

    guide = normal_guide(*posterior(y))
    full = description_length(guide, y, num_draws=1500)
    guide.model = subsampled
    found = description_length(guide, y, num_draws=2500)
    assert found.num_targets == N
    assert abs(found.data.value - full.data.value) < 5.0 * math.hypot(found.data.error, full.data.error)


def test_what_is_refused(y):
    with pytest.raises(ValueError, match="guide AutoDelta gives 1 latent numbers as points: the description length of"):
        description_length(AutoDelta(model), y)
    with pytest.raises(ValueError, match="guide function does not know its model"):
        kl_to_prior(lambda y: None, y)
    with pytest.raises(ValueError, match="num_draws is 1; give a whole number of at least 2"):
        description_length(normal_guide(0.0, 1.0), y, num_draws=1)
    with pytest.raises(ValueError, match="the model observes nothing"):
        description_length(hierarchy_guide(0.0), y)

    def outside(y):
        pyro.sample("mean", dist.Uniform(0.0, 1.0))

    guide = normal_guide(0.0, 1.0)
    guide.model = outside
    with pytest.raises(ValueError, match="the code length is not finite: KL inf"):
        kl_to_prior(guide, y)


def two_sites(y):
    """Of three numbers, one of them constrained to the unit interval; a simplex counts one number less than it has."""
    scale = pyro.sample("scale", dist.Beta(2.0, 2.0))
    parts = pyro.sample("parts", dist.Dirichlet(torch.ones(3)))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(parts[0], scale), obs=y)


def test_guides_with_some_points_are_refused(y):
    """A finite sum of their densities is no code length."""
    mode = {"scale": torch.tensor(0.5), "parts": torch.tensor([0.2, 0.3, 0.5])}
    with pytest.warns(RuntimeWarning, match="not a mode"):
        part = Laplace(two_sites, "full", sites=["scale"], point=mode).fit(y)
        whole = Laplace(two_sites, "full", point=mode, curvature="hessian").fit(y)
    for guide, count in ((part, 2), (AutoEnsemble(two_sites, 2), 3), (AutoIVON(two_sites, num_data=N), 3)):
        with pytest.raises(ValueError, match=f"guide {type(guide).__name__} gives {count} latent numbers as points"):
            kl_to_prior(guide, y, num_draws=2)
    for guide in (whole, AutoNormal(two_sites), AutoMultivariateNormal(two_sites), AutoFactorizedNormal(two_sites)):
        assert math.isfinite(kl_to_prior(guide, y, num_draws=2).value)


def test_alpha():
    assert 2 * stats.norm.sf(5.0) < ALPHA
