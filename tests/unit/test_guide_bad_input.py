"""Mistakes with guides are refused in words that say what was given, what is wanted and what to do."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI
from pyro.infer.autoguide import AutoNormal

from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    NaturalGradientOptimizer,
    TraceNaturalGradient_ELBO,
)
from support.nets import data, normal_prior

GUIDES = [AutoFactorizedNormal, AutoMatrixNormal, AutoEigenNormal]


def regression(x, y, batch_size=None):
    weight = pyro.sample("weight", normal_prior(2, 3))
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Normal((x[rows] @ weight.T).sum(-1), 1.0), obs=y[rows])


def step(model=regression, guide=AutoMatrixNormal, optimizer=None, args=None, times=1, **settings):
    guide = guide(model) if isinstance(guide, type) else guide
    svi = SVI(model, guide, optimizer or NaturalGradientDescent(), TraceNaturalGradient_ELBO(**settings))
    return [svi.step(*(data() if args is None else args)) for _ in range(times)]


def observed_only(x, y):
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x.sum(-1), 1.0), obs=y)


def discrete(x, y):
    kind = pyro.sample("kind", dist.Bernoulli(0.5))
    weight = pyro.sample("weight", normal_prior(3))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight + kind, 1.0), obs=y)


def local_latent(x, y):
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        effect = pyro.sample("effect", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(effect, 1.0), obs=y[rows])


def positive_weight(x, y):
    weight = pyro.sample("weight", dist.LogNormal(torch.zeros(2, 3), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x @ weight.T).sum(-1), 1.0), obs=y)


def weight_in_plates(x, y):
    with pyro.plate("out", 2, dim=-2), pyro.plate("in", 3, dim=-1):
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x @ weight.T).sum(-1), 1.0), obs=y)


class Unlabelled(dist.Normal):
    """A likelihood that can be scored but not sampled."""

    def sample(self, *args, **kwargs):
        raise NotImplementedError

    rsample = sample


def unlabelled(x, y):
    weight = pyro.sample("weight", normal_prior(3))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", Unlabelled(x @ weight, 1.0), obs=y)


def laplace(x, y):
    weight = pyro.sample("weight", normal_prior(3))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Laplace(x @ weight, 1.0), obs=y)


def two_weights(x, y):
    pyro.sample("more", dist.Normal(0.0, 1.0))
    regression(x, y)


def made_for(model):
    guide = AutoMatrixNormal(model)
    guide(*data())
    return guide


def not_finite():
    x, y = data()
    y[3] = math.nan
    return x, y


def family(kind):
    return lambda name, shape: kind


@dataclass(frozen=True)
class Mistake:
    """What the user does, and the type and the words of the error."""

    name: str
    act: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def setting(name, value, *words, error=ValueError):
    act = lambda: TraceNaturalGradient_ELBO(**{name: value})  # noqa: E731
    return Mistake(f"{name}={value}", act, error, (name, str(value), *words))


def rate(name, value):
    words = (name, str(value), "below 1" if name == "momentum" else "from 0 to 1")
    return Mistake(f"{name}={value}", lambda: NaturalGradientDescent(**{name: value}), ValueError, words)


MISTAKES = [
    # settings of the ELBO
    setting("curvature", "hessian", "sampled", "ggn", "empirical", "reparametrization"),
    setting("damping", "pi", "exact", "factored"),
    setting("compile", "jit"),
    setting("kl_weight", 0.0, "positive", "1 is the posterior"),
    setting("kl_weight", -1.0, "positive"),
    setting("kl_weight", math.nan, "positive"),
    setting("extrinsic_damping", -0.1, "0 or a positive"),
    setting("extrinsic_damping", math.nan, "0 or a positive"),
    setting("label_samples", 0, "at least 1"),
    setting("statistics_every", 0, "at least 1"),
    setting("inverses_every", 0, "multiple"),
    setting("curvature_rate", 0.0, "running mean"),
    setting("trust_region", 0.0, "None"),
    Mistake(
        "intervals",
        lambda: TraceNaturalGradient_ELBO(statistics_every=2, inverses_every=5),
        ValueError,
        ("inverses_every is 5", "statistics_every 2", "multiple"),
    ),
    Mistake(
        "factored without factors",
        lambda: TraceNaturalGradient_ELBO("reparametrization", damping="factored"),
        ValueError,
        ("factored", "sampled"),
    ),
    # rates
    *(rate(name, value) for name in ("lr", "precision_lr", "other_lr") for value in (-0.1, 1.5, math.nan)),
    rate("momentum", 1.0),
    rate("momentum", -0.5),
    Mistake(
        "optimizer's rate",
        lambda: NaturalGradientOptimizer([torch.zeros(2)], lr=2.0),
        ValueError,
        ("lr is 2.0", "dimensionless"),
    ),
    # guide, model and optimizer together
    *(
        Mistake(
            f"Adam under {guide.__name__}",
            lambda guide=guide: step(guide=guide, optimizer=pyro.optim.Adam({"lr": 0.01}), times=3),
            ValueError,
            ("optimizer", "Adam", "NaturalGradientDescent", "Trace_ELBO"),
        )
        for guide in GUIDES
    ),
    Mistake(
        "Pyro's guide",
        lambda: step(guide=AutoNormal(regression)),
        ValueError,
        ("AutoNormal", "AutoMatrixNormal", "Trace_ELBO"),
    ),
    Mistake("a function as guide", lambda: step(guide=lambda x, y: None), ValueError, ("function", "AutoMatrixNormal")),
    Mistake(
        "guide of another model",
        lambda: step(guide=made_for(two_weights)),
        ValueError,
        ("only the guide has ['more']", "Make the guide from the model"),
    ),
    Mistake(
        "guide of another net",
        lambda: step(guide=made_for(laplace)),
        ValueError,
        ("'weight'", "(3,)", "(2, 3)", "guide"),
    ),
    # the guide itself
    *(
        Mistake(f"init_scale {value}", lambda v=value: AutoMatrixNormal(regression, init_scale=v), ValueError, words)
        for value, words in [(0.0, ("init_scale is 0.0", "0.1")), (-1.0, ("-1.0",)), (math.nan, ("nan",))]
    ),
    Mistake("no model", lambda: AutoFactorizedNormal(None), ValueError, ("NoneType", "Pyro model")),
    Mistake(
        "start",
        lambda: AutoFactorizedNormal(regression, init_loc_fn="zero"),
        ValueError,
        ("'zero'", "'prior'", "autoguide.initialization"),
    ),
    Mistake(
        "unknown family",
        lambda: AutoMatrixNormal(regression, family=family("lowrank"))(*data()),
        ValueError,
        ("'lowrank'", "'weight'", "'matrix'", "'eigen'", "'factorized'"),
    ),
    Mistake(
        "matrix on positive numbers",
        lambda: AutoMatrixNormal(positive_weight, family=family("matrix"))(*data()),
        ValueError,
        ("'matrix'", "'weight'", "support", "'factorized'"),
    ),
    Mistake(
        "matrix in plates",
        lambda: AutoMatrixNormal(weight_in_plates, family=family("eigen"))(*data()),
        ValueError,
        ("'eigen'", "'weight'", "'out'", "to_event"),
    ),
    Mistake("median too early", lambda: AutoMatrixNormal(regression).median(), RuntimeError, ("median", "first")),
    Mistake("quantiles too early", lambda: AutoEigenNormal(regression).quantiles([0.5]), RuntimeError, ("first",)),
    # models
    Mistake("nothing latent", lambda: step(observed_only), ValueError, ("no latent", "pyro.sample")),
    Mistake("discrete", lambda: step(discrete), NotImplementedError, ("'kind'", "Bernoulli", "discrete")),
    Mistake(
        "latent per row",
        lambda: step(local_latent, AutoFactorizedNormal),
        NotImplementedError,
        ("'effect'", "'data'", "before the plate"),
    ),
    Mistake(
        "labels that cannot be drawn",
        lambda: step(unlabelled),
        ValueError,
        ("'obs'", "Unlabelled", "'empirical'", "'reparametrization'"),
    ),
    Mistake(
        "ggn of an unknown likelihood",
        lambda: step(laplace, curvature="ggn"),
        ValueError,
        ("'obs'", "Laplace", "Normal", "'sampled'"),
    ),
    # data
    Mistake("NaN in the data", lambda: step(args=not_finite()), ValueError, ("'obs'", "1 values", "NaN")),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistakes_are_named(mistake):
    with pytest.raises(mistake.error) as caught:
        mistake.act()
    missing = [word for word in mistake.words if word not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("guide_class", GUIDES, ids=[guide.__name__ for guide in GUIDES])
@pytest.mark.parametrize("place", ["inputs", "labels"])
def test_a_loss_that_is_not_finite_leaves_the_parameters(guide_class, place):
    """After good steps, one bad batch raises, names the step, and changes nothing; good steps then go on."""
    x, y = data()
    guide = guide_class(regression)
    svi = SVI(regression, guide, NaturalGradientDescent(momentum=0.9), TraceNaturalGradient_ELBO())
    for _ in range(3):
        svi.step(x, y)
    before = {name: value.clone() for name, value in guide.state_dict().items()}
    bad_x, bad_y = x.clone(), y.clone()
    (bad_x if place == "inputs" else bad_y)[2] = math.nan
    with pytest.raises(RuntimeError, match="at step 3 .*last finite values.*NaN"):
        svi.step(bad_x, bad_y)
    for name, value in guide.state_dict().items():
        if name.split("_")[0] not in ("row", "col"):  # bases and second moments, of earlier good steps
            assert torch.equal(value, before[name]), name
    assert math.isfinite(svi.step(x, y))
    assert all(value.isfinite().all() for value in guide.state_dict().values())


def test_labels_that_cannot_be_drawn_train_by_other_curvatures():
    for curvature in ("empirical", "reparametrization"):
        assert all(map(math.isfinite, step(unlabelled, AutoFactorizedNormal(unlabelled), times=3, curvature=curvature)))
