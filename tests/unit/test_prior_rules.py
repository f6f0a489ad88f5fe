"""Which parameter of a net gets which prior, what priors know of parameters, and what is refused in words."""

import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch import nn

import bnn
from bnn import priors
from bnn.likelihoods import Categorical, Gaussian
from bnn.net_parameters import parameters_of
from support.plain_nets import Filters, Words, images

FOUR = torch.eye(4) + 0.2


def facts(net: nn.Module) -> dict[str, tuple[float | None, bool]]:
    return {p.name: (p.fan_in, p.is_gain) for p in parameters_of(net)}


def test_fan_in_counts_the_inputs_that_are_added_up() -> None:
    assert facts(nn.Conv2d(4, 6, (3, 2), groups=2)) == {"weight": (12, False), "bias": (None, False)}
    assert facts(nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2))["weight"] == (2 * 16 / 4, False)
    assert facts(nn.Bilinear(3, 4, 2))["weight"] == (12, False)
    assert facts(nn.Embedding(7, 4))["weight"] == (1, False)
    assert facts(nn.GRU(3, 5))["weight_ih_l0"] == (3, False)
    assert facts(nn.MultiheadAttention(4, 2))["in_proj_weight"] == (4, False)
    assert facts(nn.LayerNorm([2, 3])) == {"weight": (None, True), "bias": (None, False)}
    assert facts(nn.RMSNorm(3)) == {"weight": (None, True)}
    assert facts(Words())["words.weight"] == (1, False)


def test_variance_of_a_transposed_convolution_is_its_scale() -> None:
    """Averaged over the places of the output, away from its border."""
    net = nn.ConvTranspose1d(30, 1, 4, stride=2, bias=False)
    model = bnn.bayesian(nn.Sequential(net, nn.Flatten()), likelihood=Gaussian(0.1))
    x = torch.randn(1, 30, 40)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    law = model.law("0.weight")
    outputs = torch.stack(
        [torch.func.functional_call(net, {"weight": law.sample()}, (x,))[0, 0, 4:-4] for _ in range(500)]
    )
    assert abs(outputs.square().mean() - 1) < 0.05


# ---- rules


def test_a_rule_sees_every_name_of_a_tied_parameter() -> None:
    for pattern in ("words.*", "out.weight", lambda module, name: name.startswith("out")):
        model = bnn.bayesian(
            Words(), prior=[(pattern, priors.Laplace()), ("*", priors.Normal())], likelihood=Categorical()
        )
        assert {n: type(p).__name__ for n, p in model.priors.items()} == {
            "words.weight": "Laplace",
            "hidden.weight": "Normal",
            "hidden.bias": "Normal",
        }


def test_a_predicate_sees_the_modules_of_the_given_net() -> None:
    net = Filters()
    rules = [(lambda module, name: module is net.out, priors.Laplace()), ("*", priors.Fixed())]
    model = bnn.bayesian(net, prior=rules, likelihood=Gaussian())
    assert [n for n, p in model.priors.items() if isinstance(p, priors.Laplace)] == ["out.weight", "out.bias"]


@pytest.mark.parametrize(
    ("net", "likelihood", "names"),
    [
        (Filters, Gaussian, {"out.weight", "out.bias"}),
        (lambda: nn.Linear(16, 1), Gaussian, {"weight", "bias"}),
        (Words, Categorical, {"words.weight"}),
    ],
    ids=["net", "one layer", "tied"],
)
def test_last_layer_samples_the_last_layer_alone(net: Any, likelihood: Any, names: set[str]) -> None:
    net = net()
    model = bnn.bayesian(net, prior=priors.last_layer(priors.Normal(0.3)), likelihood=likelihood())
    x = torch.zeros(2, 3, dtype=torch.long) if isinstance(net, Words) else torch.randn(2, 2, 4, 4)
    x = torch.randn(2, 16) if isinstance(net, nn.Linear) else x
    trace = poutine.trace(model).get_trace(x)
    assert {n for n in trace.stochastic_nodes if n not in ("y", "data")} == names
    outputs = torch.func.functional_call(net, {n: trace.nodes[n]["value"] for n in names}, (x,))
    assert torch.equal(model.outputs({n: trace.nodes[n]["value"] for n in names}, [x]), outputs.detach())


def test_fixed_and_trained_parameters() -> None:
    net, (x, y) = Filters(), images(30)
    rules = {"conv.*": priors.Fixed(), "norm.*": priors.Fixed(train=True), "*": priors.FanIn()}
    model = bnn.bayesian(net, prior=rules, likelihood=Gaussian(0.3))
    guide = pyro.infer.autoguide.AutoNormal(model)
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), pyro.infer.Trace_ELBO())
    assert set(poutine.trace(model).get_trace(x, y).param_nodes) == {"norm.weight", "norm.bias"}
    before = {name: value.clone() for name, value in net.state_dict().items()}
    first = np.mean([svi.evaluate_loss(x, y) for _ in range(20)])
    for _ in range(100):
        svi.step(x, y)
    assert np.mean([svi.evaluate_loss(x, y) for _ in range(20)]) < first
    store = pyro.get_param_store()
    trained = {name: store[name].detach().clone() for name in ("norm.weight", "norm.bias")}
    assert all((trained[name] - before[name]).abs().max() > 0.05 for name in trained)
    assert "conv.weight" not in store
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
        if name.startswith("conv"):
            assert torch.equal(model.net.state_dict()[name], before[name])
    other = pickle.loads(pickle.dumps(model))  # in a process with another store
    pyro.clear_param_store()
    nodes = poutine.trace(other).get_trace(x).nodes
    assert all(torch.equal(nodes[name]["value"], trained[name]) for name in trained)


# ---- mistakes


def build(prior: Any, net: nn.Module | None = None) -> None:
    bnn.bayesian(net or Filters(), prior=prior, likelihood=Gaussian())


def wrong_param() -> None:
    model = bnn.bayesian(
        nn.Linear(3, 1), prior={"weight": priors.Fixed(train=True), "*": priors.FanIn()}, likelihood=Gaussian()
    )
    pyro.param("weight", torch.zeros(1, 2))
    model(torch.randn(4, 3))


class Counter(nn.Linear):
    def __init__(self) -> None:
        super().__init__(16, 1)
        self.count = nn.Parameter(torch.zeros(1, dtype=torch.long), requires_grad=False)


LISTED = "'conv.weight', 'conv.bias', 'norm.weight', 'norm.bias', 'out.weight', 'out.bias'"
MISTAKES: dict[str, tuple[Callable[[], Any], tuple[str, ...]]] = {
    "scale of zero": (lambda: priors.Normal(0.0), ("Normal: scale is 0.0", "above 0")),
    "scale of text": (lambda: priors.Laplace("1"), ("Laplace: scale is '1'", "finite number")),  # type: ignore[arg-type]
    "NaN": (lambda: priors.StudentT(math.nan), ("StudentT: df is nan",)),
    "infinity": (lambda: priors.FanIn(bias_scale=math.inf), ("FanIn: bias_scale is inf",)),
    "share": (lambda: priors.Mixture(1.5), ("Mixture: pi is 1.5", "between 0 and 1")),
    "share of one": (lambda: priors.Mixture(1), ("Mixture: pi is 1", "between 0 and 1")),
    "log_sd": (lambda: priors.HierarchicalScale(log_sd=0), ("HierarchicalScale: log_sd is 0",)),
    "horseshoe": (lambda: priors.Horseshoe(-1.0), ("Horseshoe: scale is -1.0",)),
    "no matrix": (lambda: priors.Correlated(row_covariance=[[1.0]]), ("row_covariance is list", "square")),  # type: ignore[arg-type]
    "not square": (lambda: priors.Correlated(row_covariance=torch.ones(2, 3)), ("row_covariance is (2, 3)", "square")),
    "indefinite": (
        lambda: priors.Correlated(column_covariance=torch.tensor([[1.0, 2.0], [2.0, 1.0]])),
        ("column_covariance", "positive definite"),
    ),
    "asymmetric": (
        lambda: priors.Correlated(column_covariance=torch.tensor([[1.0, 0.5], [0.0, 1.0]])),
        ("column_covariance", "symmetric"),
    ),
    "covariance of another size": (
        lambda: build({"out.weight": priors.Correlated(column_covariance=FOUR), "*": priors.FanIn()}),
        ("(4, 4)", "'out.weight' of shape (1, 16)", "(16, 16)"),
    ),
    "covariance of a vector": (
        lambda: build(priors.Correlated(row_covariance=FOUR), nn.Linear(3, 4)),
        ("'bias' of shape (4,)", "is no matrix", "{'pattern'"),
    ),
    "no prior": (lambda: build(1.0), ("prior is 1.0", "bnn.priors.Normal(1.0)")),
    "prior class": (lambda: build(priors.Normal), ("prior is <class", "bnn.priors.Normal(1.0)")),
    "no pair": (lambda: build(["*.weight"]), ("prior holds '*.weight'", "('*.weight', bnn.priors.Normal(1.0))")),
    "distribution": (lambda: build({"*": dist.Normal(0.0, 1.0)}), ("prior holds ('*', Normal", "bnn.priors")),
    "unknown name": (
        lambda: build({"head.*": priors.Normal(), "*": priors.FanIn()}),
        ("'head.*'", "no parameter", LISTED),
    ),
    "predicate without effect": (
        lambda: build([(lambda module, name: False, priors.Normal()), ("*", priors.FanIn())]),
        ("the predicate <function", "no parameter", LISTED),
    ),
    "too late": (lambda: build({"*": priors.FanIn(), "*.bias": priors.Normal()}), ("'*.bias'", "no effect", "before")),
    "left out": (
        lambda: build({"*.weight": priors.FanIn()}),
        ("'conv.bias', 'norm.bias', 'out.bias'", "'*'", "Fixed()"),
    ),
    "last layer of text": (lambda: priors.last_layer("normal"), ("last_layer was given 'normal'",)),  # type: ignore[arg-type]
    "whole numbers": (lambda: build(priors.Normal(), Counter()), ("'count'", "torch.int64", "Fixed()")),
    "trained whole numbers": (
        lambda: build({"count": priors.Fixed(train=True), "*": priors.FanIn()}, Counter()),
        ("'count'", "torch.int64"),
    ),
    "another model's parameter": (wrong_param, ("'weight' with shape (1, 2)", "(1, 3)", "clear_param_store")),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_refused_in_words(name: str) -> None:
    act, words = MISTAKES[name]
    with pytest.raises(ValueError) as caught:
        act()
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_what_is_kept_has_no_law() -> None:
    model = bnn.bayesian(Filters(), prior=priors.last_layer(), likelihood=Gaussian())
    with pytest.raises(NotImplementedError, match=r"'conv.bias' is kept at its value \(Fixed\(train=False\)\)"):
        model.law("conv.bias")


def test_whole_numbers_may_be_kept() -> None:
    model = bnn.bayesian(Counter(), prior={"count": priors.Fixed(), "*": priors.FanIn()}, likelihood=Gaussian())
    assert model(torch.randn(3, 16)).shape == (3,)
