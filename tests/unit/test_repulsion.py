"""Forces between the members of an ensemble, against their formulas and their points of rest."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.optim import SGD

import bnn
from bnn.guides import AutoEnsemble, FunctionRepulsion, GaussianKernel, SteinRepulsion, WeightRepulsion
from support.conjugate import exact, linear, regression_data, trained
from support.nets import numbers

pytestmark = pytest.mark.usefixtures("double")


def test_repulsion_is_minus_the_score_of_a_kernel_density_estimate():
    """Against the explicit formula: Σ_j ∇k / Σ_j k with ∇_{a} k(a, b) = −k (a − b) / h²."""
    positions, gradients, width = numbers(5, 3, seed=8), numbers(5, 3, seed=9), 0.8
    found = WeightRepulsion(GaussianKernel(width))(None, positions, gradients)
    z = positions.numpy()
    gram = np.exp(-((z[:, None] - z[None]) ** 2).sum(-1) / (2 * width**2))
    slopes = -gram[..., None] * (z[:, None] - z[None]) / width**2
    np.testing.assert_allclose(found.numpy(), gradients.numpy() + slopes.sum(1) / gram.sum(1)[:, None], rtol=1e-12)


def test_function_space_repulsion_is_the_chain_rule_through_the_net():
    net = torch.nn.Linear(2, 1, bias=False)
    model, points = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), numbers(4, 2, seed=1)
    guide = AutoEnsemble(model, 3)
    guide(numbers(6, 2, seed=2), numbers(6, 1, seed=3))
    z, width = numbers(3, 2, seed=5), 1.1
    found = FunctionRepulsion(points, GaussianKernel(width))(guide, z, torch.zeros(3, 2)).numpy()
    f, jacobian = (z @ points.T).numpy(), points.numpy()
    gram = np.exp(-((f[:, None] - f[None]) ** 2).sum(-1) / (2 * width**2))
    slopes = -gram[..., None] * (f[:, None] - f[None]) / width**2
    np.testing.assert_allclose(found, slopes.sum(1) / gram.sum(1)[:, None] @ jacobian, rtol=1e-10)


def test_two_repulsive_members_rest_where_attraction_and_repulsion_are_equal():
    """On N(0, 1): ±a with a² = −(h²/2) log(c / (1 − c)), c = h²/2 < 1/2."""

    def unit():
        pyro.sample("z", dist.Normal(0.0, 1.0))

    width, guide = 0.9, AutoEnsemble(unit, 2, init_loc_fn="prior")
    trained(unit, guide, (), 800, SGD({"lr": 0.1}), repulsion=WeightRepulsion(GaussianKernel(width)))
    c = width**2 / 2
    wanted = math.sqrt(-(width**2) / 2 * math.log(c / (1 - c)))
    torch.testing.assert_close(
        guide.positions.detach().flatten().sort().values, torch.tensor([-wanted, wanted]), rtol=1e-8, atol=1e-8
    )


def linear_kernel(a, b):
    return a @ b.T + 1.0


def test_stein_with_a_linear_kernel_has_the_exact_mean_and_covariance():
    """Of a Gaussian target (Liu and Wang 2018, "Stein variational gradient descent as moment matching")."""
    x, y = regression_data()
    precision, mean = exact(x, y)
    guide = AutoEnsemble(linear, 7, init_loc_fn="prior")
    trained(linear, guide, (x, y), 2500, SGD({"lr": 0.02}), repulsion=SteinRepulsion(linear_kernel))
    z = guide.positions.detach()
    torch.testing.assert_close(z.mean(0), mean, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close((z - mean).T @ (z - mean) / len(z), torch.linalg.inv(precision), rtol=1e-7, atol=1e-7)


def test_stein_is_the_formula():
    z, gradients, width = numbers(4, 2, seed=8), numbers(4, 2, seed=9), 1.3
    found = SteinRepulsion(GaussianKernel(width))(None, z, gradients).numpy()
    z, gradients = z.numpy(), gradients.numpy()
    wanted = np.zeros_like(z)
    for i in range(4):
        for j in range(4):
            k = np.exp(-((z[j] - z[i]) ** 2).sum() / (2 * width**2))
            wanted[i] += (k * gradients[j] + k * (z[j] - z[i]) / width**2) / 4
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_the_medians_bandwidth():
    a = numbers(6, 2, seed=3)
    apart = torch.pdist(a).square()
    variance = float(apart.repeat(2).median()) / (2 * math.log(7))
    wanted = (-0.5 * (a[:, None] - a[None]).square().sum(-1) / variance).exp()
    torch.testing.assert_close(GaussianKernel()(a, a), wanted)
    assert torch.equal(GaussianKernel()(torch.zeros(2, 2), torch.zeros(2, 2)), torch.ones(2, 2))
