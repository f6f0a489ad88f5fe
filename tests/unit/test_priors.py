"""Priors over nets: each is the law that it says, in the model too, and every rule finds its parameter or says so."""

import copy
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from scipy import stats
from torch import Tensor, nn

import bnn
from bnn import priors
from bnn.likelihoods import Gaussian
from bnn.net_parameters import parameters_of
from support.checks import ALPHA, variance_p_value


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


class Filters(nn.Module):
    """A convolution, a norm with gains, and a linear layer of one output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(self.conv(x)).tanh().flatten(1))
        return result


def images(rows: int = 5) -> tuple[Tensor, Tensor]:
    return torch.randn(rows, 2, 4, 4), torch.randn(rows)


FAN_IN = {"conv.weight": 18, "out.weight": 16}


def center(name: str) -> float:
    return 1.0 if name == "norm.weight" else 0.0


def normal(name: str, loc: float, scale: Any, shape: tuple[int, ...]) -> Tensor:
    return pyro.sample(name, dist.Normal(torch.full(shape, loc), scale).to_event(len(shape)))


# ---- by hand: a prior's site statements, for a parameter of this name and shape


def by_fan_in(name: str, shape: tuple[int, ...], scale: float = 1.0) -> Tensor:
    sd = scale / math.sqrt(FAN_IN[name]) if name in FAN_IN else (0.5 if name == "norm.weight" else 2.0)
    return normal(name, center(name), sd, shape)


def laplace(name: str, shape: tuple[int, ...]) -> Tensor:
    return pyro.sample(name, dist.Laplace(torch.full(shape, center(name)), 0.7).to_event(len(shape)))


def student(name: str, shape: tuple[int, ...]) -> Tensor:
    return pyro.sample(name, dist.StudentT(3.0, torch.full(shape, center(name)), 0.7).to_event(len(shape)))


class TwoNormals(dist.TorchDistribution):
    """The mixture's density, written out."""

    arg_constraints = {}
    support = dist.constraints.real

    def __init__(self, loc: Tensor) -> None:
        self.loc = loc
        super().__init__(loc.shape)

    def log_prob(self, value: Tensor) -> Tensor:
        z = value - self.loc
        first = 0.25 * torch.exp(-0.5 * (z / 2) ** 2) / 2
        second = 0.75 * torch.exp(-0.5 * (z / 0.1) ** 2) / 0.1
        return (first + second).log() - 0.5 * math.log(2 * math.pi)


def mixture(name: str, shape: tuple[int, ...]) -> Tensor:
    return pyro.sample(name, TwoNormals(torch.full(shape, center(name))).to_event(len(shape)))


def centred(name: str, shape: tuple[int, ...]) -> Tensor:
    tau = pyro.sample(f"{name}_scale", dist.LogNormal(torch.tensor(2.0).log(), 0.5))
    return normal(name, center(name), tau / math.sqrt(FAN_IN.get(name, 1)), shape)


def not_centred(name: str, shape: tuple[int, ...]) -> Tensor:
    tau = pyro.sample(f"{name}_scale", dist.LogNormal(torch.tensor(2.0).log(), 0.5))
    standard = normal(f"{name}_standard", 0.0, 1.0, shape)
    return center(name) + tau / math.sqrt(FAN_IN.get(name, 1)) * standard


def horseshoe(name: str, shape: tuple[int, ...]) -> Tensor:
    tau = pyro.sample(f"{name}_scale", dist.HalfCauchy(torch.tensor(0.2)))
    local = pyro.sample(f"{name}_local_scale", dist.HalfCauchy(torch.ones(shape)).to_event(len(shape)))
    return center(name) + tau * local * normal(f"{name}_standard", 0.0, 1.0, shape)


POSITIONS = np.stack(np.meshgrid(range(3), range(3), indexing="ij"), -1).reshape(9, 2)
SMOOTH = torch.tensor(np.exp(-np.linalg.norm(POSITIONS[:, None] - POSITIONS[None], axis=-1) / 2.0))


def smooth(name: str, shape: tuple[int, ...]) -> Tensor:
    if name != "conv.weight":
        sd = 1 / 4 if name == "out.weight" else (0.5 if name == "norm.weight" else 1.0)
        return normal(name, center(name), sd, shape)
    flat = dist.MultivariateNormal(torch.zeros(4, 2, 9), SMOOTH / 18).to_event(2)
    return pyro.sample(name, dist.TransformedDistribution(flat, _reshape((4, 2, 9), shape)))


ROWS = torch.tensor([[2.0, 0.6, 0.0, 0.1], [0.6, 1.0, 0.0, 0.0], [0.0, 0.0, 3.0, -0.4], [0.1, 0.0, -0.4, 1.0]]).double()
COLUMNS = torch.eye(18, dtype=torch.float64) + 0.5


def dense(name: str, shape: tuple[int, ...]) -> Tensor:
    if name != "conv.weight":
        return normal(name, center(name), 1.5, shape)
    law = dist.MultivariateNormal(torch.zeros(72), 0.25 * torch.kron(ROWS, COLUMNS))
    return pyro.sample(name, dist.TransformedDistribution(law, _reshape((72,), shape)))


def _reshape(first: tuple[int, ...], second: tuple[int, ...]) -> Any:
    return torch.distributions.transforms.ReshapeTransform(torch.Size(first), torch.Size(second))


def flat(name: str, shape: tuple[int, ...]) -> Tensor:
    support = dist.constraints.independent(dist.constraints.real, len(shape))
    return pyro.sample(name, dist.ImproperUniform(support, (), shape))


@dataclass(frozen=True)
class Case:
    name: str
    prior: Any
    by_hand: Callable[..., Tensor]


CASES = [
    Case("normal", priors.Normal(0.7), lambda n, s: normal(n, center(n), 0.7, s)),
    Case("fan_in", priors.FanIn(0.8, bias_scale=2.0), lambda n, s: by_fan_in(n, s, 0.8)),
    Case("laplace", priors.Laplace(0.7), laplace),
    Case("student", priors.StudentT(3.0, 0.7), student),
    Case("mixture", priors.Mixture(0.25, 2.0, 0.1), mixture),
    Case("hierarchical", priors.HierarchicalScale(2.0, log_sd=0.5), centred),
    Case("hierarchical_not_centred", priors.HierarchicalScale(2.0, log_sd=0.5, centred=False), not_centred),
    Case("horseshoe", priors.Horseshoe(0.2), horseshoe),
    Case("smooth_filters", priors.Correlated(length_scale=2.0), smooth),
    Case(
        "given_covariances",
        {
            "conv.weight": priors.Correlated(0.5, row_covariance=ROWS, column_covariance=COLUMNS),
            "*": priors.Normal(1.5),
        },
        dense,
    ),
    Case("flat", priors.Flat(), flat),
    Case(
        "rules",
        [
            (lambda module, name: isinstance(module, nn.Conv2d), priors.Laplace(0.7)),
            ("*.bias", priors.Normal(2.0)),
            ("*", priors.FanIn()),
        ],
        lambda n, s: (
            laplace(n, s) if n.startswith("conv") else by_fan_in(n, s) if "weight" in n else normal(n, 0.0, 2.0, s)
        ),
    ),
]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def hand_written(net: nn.Module, by_hand: Callable[..., Tensor]) -> Callable[..., Any]:
    def model(x: Tensor, y: Tensor) -> None:
        values = {name: by_hand(name, tuple(p.shape)) for name, p in net.named_parameters()}
        with pyro.plate("data", len(x)):
            mean = torch.func.functional_call(net, values, (x,)).squeeze(-1)
            pyro.sample("y", dist.Normal(mean, 0.3), obs=y)

    return model


def log_joint(model: Callable[..., Any], values: dict[str, Tensor], *args: Any) -> Tensor:
    return poutine.trace(poutine.condition(model, values)).get_trace(*args).log_prob_sum()


def latents(model: Any, *args: Any) -> dict[str, Tensor]:
    """Values of all latent sites, such as a chain may visit."""
    potential = bnn.Potential(model, *args, compile="handlers")
    values = potential.constrain(0.5 * torch.randn(potential.dim, dtype=torch.float64))
    return {name: value.to(torch.float64) for name, value in values.items()}


@each_case
def test_log_joint_is_the_hand_written_models(case: Case) -> None:
    net, args = Filters(), images()
    model = bnn.bayesian(net, prior=case.prior, likelihood=Gaussian(0.3))
    for _ in range(3):
        values = latents(model, *args)
        expected = log_joint(hand_written(net, case.by_hand), values, *args)
        assert abs(log_joint(model, values, *args) - expected) <= 1e-12 * (1 + abs(expected))


SMALL = [case.prior for case in CASES if isinstance(case.prior, priors.Prior)]
SMALL.append({"0.weight": priors.Correlated(row_covariance=ROWS[:2, :2]), "*": priors.FanIn()})


@pytest.mark.parametrize("prior", SMALL, ids=repr)
def test_recorded_gradient_is_the_handlers(prior: Any) -> None:
    net = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten())
    model = bnn.bayesian(net, prior=prior, likelihood=Gaussian(0.3), batch_size=3)
    potential = bnn.Potential(model, torch.randn(5, 1, 3), torch.randn(5, 2), compile="fx")
    assert potential.is_recorded
    position = 0.5 * torch.randn(1, potential.dim)
    (inputs,) = potential.stream(1).next(1)
    energy, grad = potential.traced_energy_and_grad(position, inputs)
    expected, expected_grad, _ = potential.handlers_energy_and_grad(position[0], [t[0] for t in inputs])
    assert torch.allclose(energy, expected, rtol=1e-10)
    assert torch.allclose(grad[0], expected_grad, rtol=1e-9, atol=1e-10)


@each_case
def test_pickled_and_copied_model_is_the_same(case: Case) -> None:
    if case.name == "rules":
        pytest.skip("predicates are used up when the model is made: the others show that the model pickles")
    args = images()
    model = bnn.bayesian(Filters(), prior=case.prior, likelihood=Gaussian(0.3))
    values = latents(model, *args)
    expected = log_joint(model, values, *args)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(log_joint(other, values, *args), expected)
        assert other.parameters[0].module is other.net.conv


# ---- draws


def drawn(prior: Any, draws: int = 200) -> dict[str, np.ndarray]:
    """Values of each parameter ``(draws, *shape)``, and of the sites besides."""
    model = bnn.bayesian(Filters(), prior=prior, likelihood=Gaussian(0.3))
    traces = [poutine.trace(model).get_trace(images(2)[0]) for _ in range(draws)]
    names = [n for n, site in traces[0].nodes.items() if site["type"] == "sample" and n not in ("y", "data")]
    return {name: torch.stack([trace.nodes[name]["value"] for trace in traces]).numpy() for name in names}


def about_center(values: dict[str, np.ndarray], name: str) -> np.ndarray:
    return values[name].ravel() - center(name)


NAMES = ("conv.weight", "conv.bias", "norm.weight", "norm.bias", "out.weight", "out.bias")


def test_draws_have_the_variance_that_is_said() -> None:
    values = drawn(priors.FanIn(0.8, bias_scale=2.0))
    for name in NAMES:
        sd = 0.8 / math.sqrt(FAN_IN[name]) if name in FAN_IN else 0.5 if name == "norm.weight" else 2.0
        assert variance_p_value(about_center(values, name), sd**2) > ALPHA / len(NAMES), name


LAWS: list[tuple[Any, Callable[[np.ndarray], np.ndarray]]] = [
    (priors.Normal(0.7), stats.norm(0, 0.7).cdf),
    (priors.Laplace(0.7), stats.laplace(0, 0.7).cdf),
    (priors.StudentT(3.0, 0.7), stats.t(3.0, 0, 0.7).cdf),
    (priors.Mixture(0.25, 2.0, 0.1), lambda z: 0.25 * stats.norm(0, 2).cdf(z) + 0.75 * stats.norm(0, 0.1).cdf(z)),
]


@pytest.mark.parametrize(("prior", "cdf"), LAWS, ids=[repr(prior) for prior, _ in LAWS])
def test_draws_have_the_law_that_is_said(prior: Any, cdf: Callable[[np.ndarray], np.ndarray]) -> None:
    values = drawn(prior)
    for name in NAMES:
        p_value = stats.kstest(about_center(values, name), cdf).pvalue
        assert p_value > ALPHA / len(NAMES), f"{name}: p = {p_value:.1e}"


@pytest.mark.parametrize("is_centred", [True, False])
def test_draws_of_a_learned_scale(is_centred: bool) -> None:
    values = drawn(priors.HierarchicalScale(2.0, log_sd=0.5, centred=is_centred))
    for name in NAMES:
        scale = values[f"{name}_scale"]
        assert stats.kstest(np.log(scale), stats.norm(math.log(2.0), 0.5).cdf).pvalue > ALPHA
        deviation = (values[name] - center(name)) * math.sqrt(FAN_IN.get(name, 1))
        assert variance_p_value(deviation / scale.reshape(-1, *[1] * (deviation.ndim - 1)), 1.0) > ALPHA


def test_draws_of_the_horseshoe() -> None:
    values = drawn(priors.Horseshoe(0.2))
    for name in NAMES:
        scale = values[f"{name}_scale"].reshape(-1, *[1] * (values[name].ndim - 1))
        local = values[f"{name}_local_scale"]
        for half_cauchy, width in ((scale, 0.2), (local, 1.0)):
            assert stats.kstest(half_cauchy.ravel(), stats.halfcauchy(0, width).cdf).pvalue > ALPHA
        assert stats.kstest(((values[name] - center(name)) / (scale * local)).ravel(), "norm").pvalue > ALPHA


@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("smooth_filters", "given_covariances")])
def test_draws_have_the_covariance_that_is_said(case: Case) -> None:
    covariance = (
        torch.kron(torch.eye(8), SMOOTH / 18) if case.name == "smooth_filters" else torch.kron(ROWS, COLUMNS) / 4
    )
    draws = drawn(case.prior)["conv.weight"].reshape(-1, 72)
    white = np.linalg.solve(np.linalg.cholesky(covariance.numpy()), draws.T)
    assert variance_p_value(white, 1.0) > ALPHA
    for lag in (1, 2, 9, 18):  # sums of neighbours have variance 2 if they are uncorrelated
        assert variance_p_value(white[lag:][:: lag + 1] + white[:-lag][:: lag + 1], 2.0) > ALPHA


# ---- what a parameter is


def facts(net: nn.Module) -> dict[str, tuple[float | None, bool]]:
    return {p.name: (p.fan_in, p.is_gain) for p in parameters_of(net)}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(7, 4)
        self.hidden = nn.Linear(4, 4)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.out(self.hidden(self.words(tokens).mean(1)).tanh())
        return result


def test_fan_in_counts_the_inputs_that_are_added_up() -> None:
    assert facts(nn.Conv2d(4, 6, (3, 2), groups=2)) == {"weight": (12, False), "bias": (None, False)}
    assert facts(nn.ConvTranspose2d(4, 6, 4, stride=2, groups=2))["weight"] == (2 * 16 / 4, False)
    assert facts(nn.Bilinear(3, 4, 2))["weight"] == (12, False)
    assert facts(nn.Embedding(7, 4))["weight"] == (1, False)
    assert facts(nn.GRU(3, 5))["weight_ih_l0"] == (3, False)
    assert facts(nn.MultiheadAttention(4, 2))["in_proj_weight"] == (4, False)
    assert facts(nn.LayerNorm([2, 3])) == {"weight": (None, True), "bias": (None, False)}
    assert facts(nn.RMSNorm(3)) == {"weight": (None, True)}
    assert facts(Tied())["words.weight"] == (1, False)


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
            Tied(), prior=[(pattern, priors.Laplace()), ("*", priors.Normal())], likelihood=Categorical()
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


def Categorical() -> Any:
    return bnn.likelihoods.Categorical()


@pytest.mark.parametrize(
    ("net", "likelihood", "names"),
    [
        (Filters, Gaussian, {"out.weight", "out.bias"}),
        (lambda: nn.Linear(16, 1), Gaussian, {"weight", "bias"}),
        (Tied, Categorical, {"words.weight"}),
    ],
    ids=["net", "one layer", "tied"],
)
def test_last_layer_samples_the_last_layer_alone(net: Any, likelihood: Any, names: set[str]) -> None:
    net = net()
    model = bnn.bayesian(net, prior=priors.last_layer(priors.Normal(0.3)), likelihood=likelihood())
    x = torch.zeros(2, 3, dtype=torch.long) if isinstance(net, Tied) else torch.randn(2, 2, 4, 4)
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
        lambda: build({"out.weight": priors.Correlated(column_covariance=ROWS), "*": priors.FanIn()}),
        ("(4, 4)", "'out.weight' of shape (1, 16)", "(16, 16)"),
    ),
    "covariance of a vector": (
        lambda: build(priors.Correlated(row_covariance=ROWS), nn.Linear(3, 4)),
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


def test_whole_numbers_may_be_kept() -> None:
    model = bnn.bayesian(Counter(), prior={"count": priors.Fixed(), "*": priors.FanIn()}, likelihood=Gaussian())
    assert model(torch.randn(3, 16)).shape == (3,)
