"""Laplace's approximation as a guide of Pyro's, on any model."""

import copy
import io
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy import stats

import bnn
from bnn.guides import Laplace, NaturalGradientDescent, TraceNaturalGradient_ELBO
from bnn.guides._all_data import Reading, Recorded, chunks_of
from support.nets import BayesianMLP, ConvNet, GRUClassifier, data, labels, numbers
from support.point_estimates import Net
from support.spellings import SPELLINGS

STRUCTURES = ["diagonal", "kronecker", "eigenbasis", "full"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)
anywhere = pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning")
ALPHA = 1e-6


def delta(model, *args):
    guide = AutoDelta(model)
    guide(*args)
    return guide


MLP = BayesianMLP(12, 5)


# ---- a guide


@anywhere
@each_structure
def test_a_guide_for_everything(structure):
    """Predictions, ArviZ, an ELBO, Predictive: all of a net with minibatches, learned noise and biases."""
    posterior = Laplace(delta(MLP, *data()), structure).fit(*data())
    loss = SVI(MLP, posterior, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=3)).evaluate_loss(*data())
    assert torch.tensor(loss).isfinite()
    drawn = Predictive(MLP, guide=posterior, num_samples=3)(*data())
    assert drawn["sigma"].shape == (3,) or drawn["sigma"].shape == (3, 1)
    assert (drawn["sigma"] > 0).all()
    prediction = bnn.predict(posterior, *data(), num_samples=5)
    assert prediction.mean.shape == (12,) and prediction.epistemic.min() > 0
    idata = bnn.to_arviz(posterior, model_args=data(), num_samples=4)
    assert idata["posterior"]["out.weight"].shape == (1, 4, 1, 5)
    low, high = posterior.quantiles([0.1, 0.9])["hidden.weight"]
    median = posterior.median()["hidden.weight"]
    torch.testing.assert_close(0.5 * (low + high), median)
    assert not list(posterior.parameters())


@anywhere
@each_structure
def test_draws_have_the_law_of_the_blocks(structure):
    posterior = Laplace(delta(MLP, *data()), structure).fit(*data())
    draws, count = posterior.draws(2000), 2000
    median = posterior.median()
    for block in posterior.blocks:
        parts = []
        for name in block.names:
            value, centre = draws[name], median[name]
            parts.append(((value / centre).log() if name == "sigma" else value - centre).reshape(count, -1))
        deviation = torch.cat(parts, -1)
        squares = (deviation.double() @ torch.linalg.inv(block.covariance().double()) * deviation.double()).sum(-1)
        p = stats.kstest(squares.numpy(), stats.chi2(block.numel).cdf).pvalue
        assert p > ALPHA, (structure, block.names, p)


@anywhere
@each_structure
def test_saved_and_copied(structure):
    posterior = Laplace(delta(MLP, *data()), structure).fit(*data())
    before = posterior.log_marginal_likelihood()
    saved, copied = pickle.loads(pickle.dumps(posterior)), copy.deepcopy(posterior)
    file = io.BytesIO()
    torch.save(posterior.state_dict(), file)
    file.seek(0)
    other = Laplace(delta(MLP, *data()), structure).fit(data()[0], data()[1] + 1)
    other.load_state_dict(torch.load(file))
    for again in (saved, copied, other):
        pyro.set_rng_seed(3)
        expected = posterior.draws(2)
        pyro.set_rng_seed(3)
        found = again.draws(2)
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        again(*data())
    torch.testing.assert_close(saved.log_marginal_likelihood(), before)
    assert posterior.model is MLP and copied.model is MLP


def test_map_by_kfac_and_laplace_with_no_warning():
    """A mode found by the natural-gradient ELBO counts as one; far from it the gradient's norm is told."""
    net = Net((3, 4, 2))
    x, y = data()[0], numbers(12, 2)
    guide = AutoDelta(net)
    svi = SVI(net, guide, NaturalGradientDescent(lr=0.5), TraceNaturalGradient_ELBO("ggn"))
    svi.step(x, y)
    with pytest.warns(RuntimeWarning, match=r"not a mode: the gradient of the log joint has norm \d"):
        Laplace(guide).fit(x, y)
    for _ in range(300):
        svi.step(x, y)
    Laplace(guide).fit(x, y)


@anywhere
@pytest.mark.parametrize("link", ["sampled", "probit"])
def test_linearised_probabilities(link):
    """Two classes, as Categorical and as Bernoulli, are one law; the probit is the quadrature's to two digits."""
    x = data()[0]
    y = labels(12, 2)

    def weighed(x, y=None, bernoulli=False):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            logit = x @ weight
            two = torch.stack([torch.zeros_like(logit), logit], -1)
            law = dist.Bernoulli(logits=logit) if bernoulli else dist.Categorical(logits=two)
            pyro.sample("y", law, obs=y if y is None or not bernoulli else y.to(x.dtype))

    point, found = {"weight": numbers(3)}, []
    for bernoulli in (False, True):
        posterior = Laplace(weighed, "full", point=point).fit(x, y, bernoulli=bernoulli)
        outputs = posterior.outputs(x, bernoulli=bernoulli)["y"]
        pyro.set_rng_seed(0)
        found.append(posterior.linearised(x, link=link, num_samples=20_000, bernoulli=bernoulli).probabilities[:, 1])
    variance = outputs.covariance[:, 0, 0]
    nodes, weights = torch.tensor(stats.norm.ppf((torch.arange(2000) + 0.5) / 2000)), 1 / 2000
    drawn = outputs.mean[:, :1] + variance.sqrt()[:, None] * nodes
    exact = (drawn.sigmoid() * weights).sum(-1).to(x.dtype)
    tolerance = 0.02 if link == "probit" else 6 * 0.5 / 20_000**0.5
    for one in found:
        assert (one - exact).abs().max() < tolerance
    if link == "probit":
        torch.testing.assert_close(found[0], found[1])
        torch.testing.assert_close(found[1], (outputs.mean[:, 0] / (1 + torch.pi / 8 * variance).sqrt()).sigmoid())


# ---- any model


NETS = {
    "convolutions": (ConvNet, lambda: (numbers(7, 1, 14, 14), labels(7))),
    "recurrent": (GRUClassifier, lambda: (numbers(9, 5, 3), labels(9))),
}


@anywhere
@pytest.mark.parametrize("name", NETS)
@each_structure
def test_nets_with_minibatches(name, structure):
    """Seven or nine rows in windows of three or four."""
    made, arguments = NETS[name]
    model, args = made(), arguments()
    posterior = Laplace(delta(model, *args), structure).fit(*args)
    assert torch.isfinite(posterior.log_marginal_likelihood())
    assert bnn.predict(posterior, *args, num_samples=3).probabilities.shape == (len(args[1]), 3)


SOME = set(range(2, len(SPELLINGS), 12))
EACH = [pytest.param(s, id=s.name, marks=() if k in SOME else pytest.mark.slow) for k, s in enumerate(SPELLINGS)]


@pytest.mark.parametrize("spelling", EACH)
def test_gradients_per_datum_of_layers_are_autograds(spelling):
    """The Gauss-Newton matrix of all sites from what layers capture, against one backward pass per datum."""
    torch.set_default_dtype(torch.float64)
    args = spelling.arguments()
    recorded = Recorded(spelling.model, args, {}, "ggn")
    sites = recorded.graph.structure.sites
    point = {name: 0.5 * numbers(1, *site.shape, seed=len(name))[0] for name, site in sites.items()}
    chunk = next(chunks_of(lambda a, k: recorded, args, {}, None))
    reading = Reading(chunk, point)
    captured = [name for name in sites if reading.capture.by_entry([name])]
    if not captured:
        pytest.skip("no site is captured by entry")

    def matrix():
        return sum(rows.T @ rows for probe in reading.probes for rows in reading.jacobian_rows(probe, captured))

    found = matrix()
    reading.capture = None
    expected = matrix()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10 * float(expected.abs().max()))
