"""Priors over nets: each is the law that it says, in the model and in its draws."""

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
from support.checks import ALPHA, variance_p_value
from support.plain_nets import Filters, images


@pytest.fixture(autouse=True)
def double() -> None:
    torch.set_default_dtype(torch.float64)


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
