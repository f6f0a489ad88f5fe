"""Laplace's approximation as a guide of Pyro's, on nets; and what it refuses."""

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLaplaceApproximation, AutoNormal
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
        deviation = torch.cat([_unconstrained(draws[n]) - _unconstrained(median[n]) for n in block.names], -1)
        squares = (deviation.double() @ torch.linalg.inv(block.covariance().double()) * deviation.double()).sum(-1)
        p = stats.kstest(squares.numpy(), stats.chi2(block.numel).cdf).pvalue
        assert p > ALPHA, (structure, block.names, p)
    assert count


def _unconstrained(value):
    positive = value.dim() < 2 and bool((value > 0).all())
    return (value.log() if positive else value).reshape(len(value) if value.dim() else 1, -1)


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


@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_gradients_per_datum_of_layers_are_autograds(spelling):
    """The Gauss-Newton matrix of all sites from what layers capture, against one backward pass per datum."""
    torch.set_default_dtype(torch.float64)
    args = spelling.arguments()
    recorded = Recorded(spelling.model, args, {}, "ggn")
    sites = recorded.graph.structure.sites
    point = {name: 0.5 * numbers(*site.shape, seed=len(name)) for name, site in sites.items()}
    (chunk,) = chunks_of(lambda a, k: recorded, args, {}, None)
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


# ---- what is refused


def regression(x, y=None, batch_size=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", 12, subsample_size=batch_size) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ weight, noise), obs=None if y is None else y[rows])


def counts(x, y=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Poisson((x @ weight).exp()), obs=y)


def gamma(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Gamma(2.0, (x @ weight).exp()), obs=y.exp())


def discrete(x, y):
    pyro.sample("kind", dist.Bernoulli(0.5))
    regression(x, y)


def local(x, y):
    regression(x, y)
    with pyro.plate("rows", 12, subsample_size=3):
        pyro.sample("own", dist.Normal(0.0, 1.0))


def flat(x, y):
    weight = pyro.sample("weight", dist.ImproperUniform(dist.constraints.real_vector, (), (3,)))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal((x * torch.tensor([1.0, 1.0, 0.0])) @ weight, 1.0), obs=y)


def factor(x, y):
    regression(x, y, 5)
    pyro.factor("penalty", torch.tensor(-1.0))


def heteroscedastic(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, (x @ weight).exp()), obs=y)


def wide(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(40000), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(weight.sum(), 1.0), obs=y)


X, Y = data()
POINT = {"weight": torch.tensor([0.5, 0.2, -0.1]), "noise": torch.tensor(0.5)}


def at(model=regression, structure="full", args=(X, Y), **settings):
    names = {"point": {name: POINT[name] for name in POINT}, **settings}
    return Laplace(model, structure, **names).fit(*args)


@dataclass(frozen=True)
class Mistake:
    name: str
    make: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...] = field(default=())


MISTAKES = [
    Mistake("a model alone", lambda: Laplace(regression), ValueError, ("function", "AutoDelta", "point=")),
    Mistake("no guide", lambda: Laplace(3, point=POINT), ValueError, ("int",)),
    Mistake("structure", lambda: at(structure="blocks"), ValueError, ("'blocks'", "'kronecker'")),
    Mistake("curvature", lambda: at(curvature="fisher"), ValueError, ("'fisher'", "'ggn'")),
    Mistake("label_samples", lambda: at(label_samples=0), ValueError, ("0", "1 or more")),
    Mistake("Kronecker Hessian", lambda: at(structure="kronecker", curvature="hessian"), ValueError, ("'full'",)),
    Mistake("unknown site", lambda: at(sites=["wieght"]), ValueError, ("wieght", "weight")),
    Mistake("a word for sites", lambda: at(sites="weight"), ValueError, ("'weight'", "'last layer'")),
    Mistake("point lacks a site", lambda: at(point={"weight": POINT["weight"]}), ValueError, ("noise",)),
    Mistake("point's shape", lambda: at(point={**POINT, "weight": torch.zeros(4)}), ValueError, ("'weight'", "(4,)")),
    Mistake("NaN", lambda: at(point={**POINT, "weight": torch.full((3,), torch.nan)}), ValueError, ("finite",)),
    Mistake("guide without a median", lambda: Laplace(_laplace()).fit(X, Y), ValueError, ("no median", "point=")),
    Mistake("discrete", lambda: at(discrete, point={**POINT, "kind": torch.tensor(1.0)}), NotImplementedError, ("kind",)),
    Mistake("local", lambda: at(local, point={**POINT, "own": torch.zeros(3)}), NotImplementedError, ("own",)),
    Mistake("flat directions", lambda: at(flat), RuntimeError, ("weight", "not positive definite", "flat")),
    Mistake("negative Hessian", lambda: at(curvature="hessian", point={**POINT, "noise": torch.tensor(9.0)}), RuntimeError,
            ("not positive definite", "eigenvalue")),
    Mistake("negative diagonal", lambda: at(structure="diagonal", curvature="hessian", point={**POINT, "noise":
            torch.tensor(9.0)}), RuntimeError, ("not positive definite", "entry")),
    Mistake("too many", lambda: at(wide, point={"weight": torch.zeros(40000)}), ValueError, ("40000", "GiB")),
    Mistake("likelihood", lambda: at(gamma), ValueError, ("Gamma", "'sampled'")),
    Mistake("scale and location", lambda: at(heteroscedastic), ValueError, ("weight", "'sampled'")),
    Mistake("factor with minibatches", lambda: at(factor), NotImplementedError, ("'penalty'", "subsample_size")),
    Mistake("both ways", lambda: Laplace(regression, point=POINT).fit(X, Y, batches=[(X, Y)]), ValueError, ("batches=",)),
    Mistake("batches without a plate", lambda: Laplace(counts, point=POINT).fit(batches=[(X, Y.exp().round())] * 2), ValueError,
            ("2 batches", "subsample_size", "num_data=")),
    Mistake("too few rows", lambda: _loader([(X[:5], Y[:5])]), ValueError, ("5 rows", "12")),
    Mistake("before fit", lambda: Laplace(regression, point=POINT)(X, Y), RuntimeError, ("fit(x, y)",)),
    Mistake("draws before fit", lambda: Laplace(regression, point=POINT).draws(3), RuntimeError, ("fit(x, y)",)),
    Mistake("evidence before fit", lambda: Laplace(regression, point=POINT).log_marginal_likelihood(), RuntimeError, ("fit(x, y)",)),
    Mistake("predict before fit", lambda: bnn.predict(Laplace(regression, point=POINT), X), RuntimeError, ("fit(x, y)",)),
    Mistake("pickled before fit", lambda: _pickled().fit(X, Y), RuntimeError, ("pickled", "anew")),
    Mistake("precision of another site", lambda: at().log_marginal_likelihood(prior_precision={"noise": 1.0}), ValueError,
            ("'noise'", "['weight']")),
    Mistake("negative precision", lambda: at().log_marginal_likelihood(prior_precision=-1.0), ValueError, ("-1", "positive")),
    Mistake("precision's shape", lambda: at().log_marginal_likelihood(prior_precision={"weight": torch.ones(2)}), ValueError,
            ("(2,)", "3 entries")),
    Mistake("no Normal prior", lambda: at(sites=["noise"]).log_marginal_likelihood(prior_precision=1.0), ValueError, ("noise",)),
    Mistake("noise inside", lambda: at().log_marginal_likelihood(noise=1.0), ValueError, ("noise", "integrates")),
    Mistake("noise of counts", lambda: _counted().log_marginal_likelihood(noise=1.0), ValueError, ("Poisson",)),
    Mistake("noise of zero", lambda: at(sites=["weight"]).log_marginal_likelihood(noise=0.0), ValueError, ("0.0", "positive")),
    Mistake("noise, empirical", lambda: at(curvature="empirical", sites=["weight"]).log_marginal_likelihood(noise=1.0), ValueError,
            ("empirical", "'ggn'")),
    Mistake("prior's word", lambda: at().optimize_marginal_likelihood("layer"), ValueError, ("'layer'", "'site'")),
    Mistake("nothing to choose", lambda: at().optimize_marginal_likelihood(None), ValueError, ("nothing",)),
    Mistake("noise is a number", lambda: _fixed_noise().optimize_marginal_likelihood(noise=True), ValueError, ("number",)),
    Mistake("link", lambda: at().linearised(X, link="laplace"), ValueError, ("'laplace'", "'probit'")),
    Mistake("no draws", lambda: at().linearised(X, num_samples=0), ValueError, ("0",)),
    Mistake("linearised counts", lambda: _counted().linearised(X), NotImplementedError, ("Poisson", "bnn.predict")),
    Mistake("minibatches at prediction", lambda: at(args=(X, Y, 5)).linearised(X, Y, 5), NotImplementedError, ("data",)),
]  # fmt: skip


def _laplace():
    return AutoLaplaceApproximation(regression)


def _loader(batches):
    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

    return Laplace(model, point=POINT).fit(batches=batches)


def _pickled():
    return pickle.loads(pickle.dumps(Laplace(AutoNormal(regression))))


def _counted():
    return at(counts, args=(X, Y.exp().round()))


def _fixed_noise():
    net = Net((3, 2, 1))
    return Laplace(net, point=net.start()).fit(X, Y.unsqueeze(-1))


@anywhere
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes_are_told(mistake):
    with pytest.raises(mistake.error) as caught:
        mistake.make()
    for word in mistake.words:
        assert word in str(caught.value), str(caught.value)
