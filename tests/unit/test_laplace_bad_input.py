"""What Laplace's approximation refuses, and in which words."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoNormal

import bnn
from bnn.guides import Laplace
from support.nets import data
from support.point_estimates import Net


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


def tails(x, y):
    """Far out, a Student-t likelihood curves upwards."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 10.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.StudentT(2.0, x @ weight, 0.1), obs=y)


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
    Mistake(
        "discrete", lambda: at(discrete, point={**POINT, "kind": torch.tensor(1.0)}), NotImplementedError, ("kind",)
    ),
    Mistake("local", lambda: at(local, point={**POINT, "own": torch.zeros(3)}), NotImplementedError, ("own",)),
    Mistake("flat directions", lambda: at(flat), RuntimeError, ("weight", "not positive definite", "flat")),
    Mistake(
        "negative Hessian",
        lambda: at(tails, curvature="hessian"),
        RuntimeError,
        ("not positive definite", "eigenvalue"),
    ),
    Mistake(
        "negative diagonal",
        lambda: at(tails, structure="diagonal", curvature="hessian"),
        RuntimeError,
        ("not positive definite", "entry"),
    ),
    Mistake("too many", lambda: at(wide, point={"weight": torch.zeros(40000)}), ValueError, ("40000", "GiB")),
    Mistake("likelihood", lambda: at(gamma), ValueError, ("Gamma", "'sampled'")),
    Mistake("scale and location", lambda: at(heteroscedastic), ValueError, ("weight", "'sampled'")),
    Mistake("factor with minibatches", lambda: at(factor), NotImplementedError, ("'penalty'", "subsample_size")),
    Mistake(
        "both ways", lambda: Laplace(regression, point=POINT).fit(X, Y, batches=[(X, Y)]), ValueError, ("batches=",)
    ),
    Mistake(
        "batches without a plate",
        lambda: Laplace(counts, point=POINT).fit(batches=[(X, Y.exp().round())] * 2),
        ValueError,
        ("2 batches", "subsample_size", "num_data="),
    ),
    Mistake("too few rows", lambda: _loader([(X[:5], Y[:5])]), ValueError, ("5 rows", "12")),
    Mistake("before fit", lambda: Laplace(regression, point=POINT)(X, Y), RuntimeError, ("fit(x, y)",)),
    Mistake("draws before fit", lambda: Laplace(regression, point=POINT).draws(3), RuntimeError, ("fit(x, y)",)),
    Mistake(
        "evidence before fit",
        lambda: Laplace(regression, point=POINT).log_marginal_likelihood(),
        RuntimeError,
        ("fit(x, y)",),
    ),
    Mistake(
        "predict before fit", lambda: bnn.predict(Laplace(regression, point=POINT), X), RuntimeError, ("fit(x, y)",)
    ),
    Mistake("pickled before fit", lambda: _pickled().fit(X, Y), RuntimeError, ("pickled", "anew")),
    Mistake(
        "precision of another site",
        lambda: at().log_marginal_likelihood(prior_precision={"noise": 1.0}),
        ValueError,
        ("'noise'", "['weight']"),
    ),
    Mistake(
        "negative precision", lambda: at().log_marginal_likelihood(prior_precision=-1.0), ValueError, ("-1", "positive")
    ),
    Mistake(
        "precision's shape",
        lambda: at().log_marginal_likelihood(prior_precision={"weight": torch.ones(2)}),
        ValueError,
        ("(2,)", "3 entries"),
    ),
    Mistake(
        "no Normal prior",
        lambda: at(sites=["noise"]).log_marginal_likelihood(prior_precision=1.0),
        ValueError,
        ("noise",),
    ),
    Mistake("noise inside", lambda: at().log_marginal_likelihood(noise=1.0), ValueError, ("noise", "integrates")),
    Mistake("noise of counts", lambda: _counted().log_marginal_likelihood(noise=1.0), ValueError, ("Poisson",)),
    Mistake(
        "noise of zero",
        lambda: at(sites=["weight"]).log_marginal_likelihood(noise=0.0),
        ValueError,
        ("0.0", "positive"),
    ),
    Mistake(
        "noise, empirical",
        lambda: at(curvature="empirical", sites=["weight"]).log_marginal_likelihood(noise=1.0),
        ValueError,
        ("empirical", "'ggn'"),
    ),
    Mistake("prior's word", lambda: at().optimize_marginal_likelihood("layer"), ValueError, ("'layer'", "'site'")),
    Mistake("nothing to choose", lambda: at().optimize_marginal_likelihood(None), ValueError, ("nothing",)),
    Mistake(
        "noise is a number", lambda: _fixed_noise().optimize_marginal_likelihood(noise=True), ValueError, ("number",)
    ),
    Mistake("link", lambda: at().linearised(X, link="laplace"), ValueError, ("'laplace'", "'probit'")),
    Mistake("no draws", lambda: at().linearised(X, num_samples=0), ValueError, ("0",)),
    Mistake("linearised counts", lambda: _counted().linearised(X), NotImplementedError, ("Poisson", "bnn.predict")),
    Mistake(
        "minibatches at prediction", lambda: at(args=(X, Y, 5)).linearised(X, Y, 5), NotImplementedError, ("data",)
    ),
]


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


@pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes_are_told(mistake):
    with pytest.raises(mistake.error) as caught:
        mistake.make()
    for word in mistake.words:
        assert word in str(caught.value), str(caught.value)
