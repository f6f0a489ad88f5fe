"""Laplace's approximation where it is exact, and against dense linear algebra written out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoLaplaceApproximation, init_to_value

import bnn
from bnn.guides import Laplace
from support.nets import data, labels, numbers
from support.point_estimates import Net, flat_of, gauss_newton
from support.regression import Regression, kron

pytestmark = pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning")
STRUCTURES = ["diagonal", "kronecker", "eigenbasis", "full"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def in_matrix(problem, flat):
    """Entries of weight and bias end to end, as those of the matrix (outputs, [bias,] inputs)."""
    numel = math.prod(problem.shape)
    weight = torch.as_tensor(flat[:numel]).reshape(problem.shape)
    weight = weight.T if problem.spelling == "transposed" else weight.reshape(problem.outputs, -1)
    return (torch.cat([flat[numel:, None], weight], 1) if problem.bias else weight).flatten()


def at_mode(problem, structure, **settings):
    """The approximation at the exact posterior mean, and the order of its latents in the problem's matrix."""
    mean, precision = problem.posterior()
    numel = math.prod(problem.shape)
    order = in_matrix(problem, torch.arange(numel + problem.outputs * problem.bias))
    flat = torch.empty_like(mean)
    flat[order] = mean
    point = {"weight": flat[:numel].reshape(problem.shape)} | ({"bias": flat[numel:]} if problem.bias else {})
    return Laplace(problem, structure, point=point, **settings), order, precision


def dense(posterior):
    """Covariance of all latents end to end."""
    return torch.block_diag(*(block.covariance() for block in posterior.blocks))


REGRESSIONS = [
    Regression("plain"),
    Regression("one output", outputs=1, bias=False),
    Regression("transposed", spelling="transposed", noise="apart", bias_scale=0.3),
    Regression("convolution", spelling="conv"),
    Regression("correlated noise", noise="correlated"),
]
each_regression = pytest.mark.parametrize("problem", REGRESSIONS, ids=lambda problem: problem.name)


# ---- linear regression: the posterior itself


@each_regression
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_full_is_the_exact_posterior_of_linear_regression(problem, curvature):
    posterior, order, precision = at_mode(problem, "full", curvature=curvature)
    with pytest.warns(None) if False else torch.enable_grad():
        posterior.fit(*problem.args)
    found = dense(posterior)[order[:, None], order]
    torch.testing.assert_close(found @ precision, torch.eye(len(precision)), rtol=0, atol=1e-9)
    evidence = posterior.log_marginal_likelihood()
    assert float(evidence) == pytest.approx(problem.log_evidence(), abs=1e-8)


@each_regression
@each_structure
def test_blocks_of_linear_regression(problem, structure):
    """Diagonal: that of the exact precision. Kronecker and eigenbasis: its blocks, where inputs are the same for all."""
    posterior, order, precision = at_mode(problem, structure)
    posterior.fit(*problem.args)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    expected = precision[back[:, None], back]
    numel = math.prod(problem.shape)
    if structure == "diagonal":
        expected = expected.diagonal().diag()
    elif structure != "full":
        expected = torch.block_diag(expected[:numel, :numel], expected[numel:, numel:])
    torch.testing.assert_close(torch.linalg.inv(dense(posterior)), expected, rtol=1e-8, atol=1e-8)


@each_structure
def test_minibatches_and_loaders_give_the_sums_of_all_data(structure):
    """12 rows in windows of 5, and in batches of 7 and 5."""
    problem = Regression("plain", outputs=2)
    posterior, *_ = at_mode(problem, structure)
    whole = dense(posterior.fit(*problem.args))
    evidence = posterior.log_marginal_likelihood()

    def windowed(x, y):
        return problem(x, y, 5)

    def loaded(x, y):
        with pyro.poutine.scale(scale=1.0):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(problem.shape), 0.8).to_event(2))
            bias = pyro.sample("bias", dist.Normal(torch.zeros(2), 0.8).to_event(1))
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("obs", problem.likelihood(F.linear(x, weight, bias)), obs=y)

    x, y = problem.args
    point = posterior.median()
    by_windows = Laplace(windowed, structure, point=point).fit(x, y)
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    by_batches = Laplace(loaded, structure, point=point).fit(batches=batches)
    for other in (by_windows, by_batches):
        torch.testing.assert_close(dense(other), whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other.log_marginal_likelihood(), evidence, rtol=1e-10, atol=0)


@pytest.mark.parametrize("bias_scale", [0.8, 0.3])
def test_linearised_predictive_of_a_linear_model_is_exact(bias_scale):
    problem = Regression("predicted", outputs=2, bias_scale=bias_scale)
    posterior, *_ = at_mode(problem, "full")
    posterior.fit(*problem.args)
    x = numbers(5, 4, seed=8)
    mean, precision = problem.posterior()
    operator = kron(torch.eye(2), torch.cat([torch.ones(5, 1), x], 1))  # outputs, rows
    covariance = (operator @ torch.linalg.inv(precision) @ operator.T).reshape(2, 5, 2, 5)

    def predicted(x):
        return problem(x, torch.zeros(len(x), 2))

    new = Laplace(predicted, "full", point=posterior.median())
    for name in ("_points", "_blocks", "_sites", "_evidence"):
        setattr(new, name, getattr(posterior, name))
    outputs = posterior.outputs(x, torch.zeros(5, 2))["obs"]
    torch.testing.assert_close(outputs.mean, (operator @ mean).reshape(2, 5).T)
    torch.testing.assert_close(outputs.covariance, torch.einsum("onpn->nop", covariance))
    prediction = posterior.linearised(x, torch.zeros(5, 2))
    variance = torch.einsum("onon->no", covariance)
    torch.testing.assert_close(prediction.epistemic, variance.sqrt())
    torch.testing.assert_close(prediction.sd, (variance + problem.covariance.diagonal()).sqrt())
