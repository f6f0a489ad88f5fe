"""The law that constant-step SGD settles in: by hand, in its limit, simulated; and its temperature as measured."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov

from bnn import Potential, sgd_covariance, sgd_temperature
from support.checks import assert_covariance

H = np.array([[2.0, 0.5, 0.0], [0.5, 1.0, -0.3], [0.0, -0.3, 0.5]])
V = np.array([[3.0, 1.0, 0.5], [1.0, 2.0, 0.0], [0.5, 0.0, 1.0]])
P = np.array([[1.0, 0.2, 0.0], [0.2, 0.5, 0.0], [0.0, 0.0, 2.0]])


@pytest.mark.parametrize("p", [1.0, np.array([1.0, 0.5, 2.0]), P], ids=["number", "diagonal", "matrix"])
@pytest.mark.parametrize("h", [0.001, 0.3])
def test_the_equations(p, h):
    """PHΣ + ΣHP − hPHΣHP = hPVP, and without the last term on the left in the limit."""
    full = p if np.ndim(p) == 2 else np.diag(np.broadcast_to(p, 3))
    right = h * full @ V @ full
    found = sgd_covariance(H, V, h, preconditioner=p)
    ph = full @ H
    np.testing.assert_allclose(ph @ found + found @ ph.T - h * ph @ found @ ph.T, right, rtol=1e-9, atol=1e-12)
    limit = sgd_covariance(H, V, h, preconditioner=p, limit=True)
    np.testing.assert_allclose(ph @ limit + limit @ ph.T, right, rtol=1e-9, atol=1e-12)


def test_the_limit_is_mandts_equation():
    """In their units: a mean loss of Hessian H/N, noise C/B, rate ε; ours are h = ε/N, V = N²C/B. And Σ/Σ_limit → 1."""
    data, batch, rate = 500, 10, 0.01
    c = V / 7.0
    theirs = solve_continuous_lyapunov(H, rate / batch * c)
    ours = sgd_covariance(data * H, data**2 / batch * c, rate / data, limit=True)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10)
    gaps = []
    for h in (1e-2, 1e-3):
        exact, limit = sgd_covariance(H, V, h), sgd_covariance(H, V, h, limit=True)
        gaps.append(np.abs(exact / limit - 1.0).max())
    assert gaps[0] / gaps[1] == pytest.approx(10.0, rel=0.05)  # first order


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_momentum_in_one_dimension(momentum):
    """hV(1+μ) / (2k(1−μ)(1+μ−hk/2)), and in the limit the same as without, of h/(1−μ)."""
    k, v, h = 2.0, 3.0, 0.2
    expected = h * v * (1 + momentum) / (2 * k * (1 - momentum) * (1 + momentum - h * k / 2))
    assert sgd_covariance([[k]], [[v]], h, momentum=momentum) == pytest.approx(expected, rel=1e-10)
    limit = sgd_covariance([[k]], [[v]], h, momentum=momentum, limit=True)
    assert limit == pytest.approx(h / (1 - momentum) * v / (2 * k), rel=1e-10)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_simulated_chains_have_the_law(momentum):
    """131,072 chains of steps that are large, after 120 of them: a covariance whose alarm is false once in 10⁶."""
    h, count = 0.5, 131_072
    torch.manual_seed(0)
    noise = torch.linalg.cholesky(torch.tensor(V))
    z = torch.zeros(count, 3, dtype=torch.float64)
    v = torch.zeros_like(z)
    drift, hessian = h * torch.tensor(P), torch.tensor(H)
    for _ in range(120):
        v = momentum * v - (z @ hessian + torch.randn_like(z) @ noise.T) @ drift.T
        z = z + v
    law = sgd_covariance(H, V, h, preconditioner=P, momentum=momentum)
    one, step = np.eye(3), h * P @ H
    radius = np.abs(np.linalg.eigvals(np.block([[one - step, momentum * one], [-step, momentum * one]]))).max()
    assert radius**240 < 1e-6  # what the start has left in a variance
    assert_covariance(["z0", "z1", "z2"], z.numpy(), law)
    limit = sgd_covariance(H, V, h, preconditioner=P, momentum=momentum, limit=True)
    assert np.abs(law / limit - 1.0).max() > 0.05  # the test can tell the two apart


DATA = 3.0 * torch.randn(40, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def means(y, size):
    """Two means of 40 rows; the energy's minibatch gradient is −(N/B) Σ (y − z)."""
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=torch.float64), 1.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=size) as index:
        pyro.sample("y", dist.Normal(z, 1.0).to_event(1), obs=y[index])


@pytest.mark.parametrize("replacement", [True, False])
def test_the_noise_that_is_measured(replacement):
    """Sampling theory: N²S²/B with replacement, N(N−B)S²/B without (S² over N−1); a mean of 4000 squares."""
    size, pairs, h = 8, 4000, 0.01
    potential = Potential(means, DATA, size, replacement=replacement)
    found = sgd_temperature(potential, {"z": torch.ones(2)}, h, num_pairs=pairs)
    variance = DATA.var(0, unbiased=not replacement).numpy()
    expected = 40 * (40 if replacement else 40 - size) / size * variance
    # The error of a mean of squares of differences, which are near Gaussian: at most √(2/pairs), in all directions.
    np.testing.assert_allclose(found.noise, expected, rtol=5.0 * math.sqrt(2.0 / pairs))
    target = 0.5 * h * expected.mean()
    assert abs(found.temperature.value - target) < 5.0 * found.temperature.error < 0.2 * target
    assert found.per_site == {"z": pytest.approx(found.temperature.value)}
    assert found.best_step_size == pytest.approx(h / found.temperature.value)


def test_the_temperature_is_that_of_the_covariance():
    """tr(HΣ)/d in the limit, also with P and momentum; at the best step it is one."""
    potential = Potential(means, DATA, 8, replacement=True)
    p, mu, h = np.array([0.5, 2.0]), 0.7, 0.003
    pyro.set_rng_seed(0)
    found = sgd_temperature(potential, torch.zeros(2), h, preconditioner=p, momentum=mu, num_pairs=30)
    law = sgd_covariance(np.diag([41.0, 41.0]), found.noise, h, preconditioner=p, momentum=mu, limit=True)
    assert np.trace(41.0 * law) / 2 == pytest.approx(found.temperature.value, rel=1e-10)
    pyro.set_rng_seed(0)
    potential = Potential(means, DATA, 8, replacement=True)
    pyro.set_rng_seed(0)
    at_best = sgd_temperature(
        potential, torch.zeros(2), found.best_step_size, preconditioner=p,
        momentum=mu, num_pairs=30,
    )  # fmt: skip
    assert at_best.temperature.value == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: sgd_covariance(np.ones((2, 3)), V, 0.1), r"hessian has shape \(2, 3\); give a symmetric matrix"),
        (lambda: sgd_covariance([[1.0, 2.0], [0.0, 1.0]], 1.0, 0.1), "give a symmetric matrix"),
        (lambda: sgd_covariance(H, np.ones(2), 0.1), r"noise has shape \(2,\); wanted is \(3, 3\), or its diagonal"),
        (lambda: sgd_covariance(H, V, 0.1, preconditioner=np.ones((2, 2))), r"preconditioner has shape \(2, 2\)"),
        (lambda: sgd_covariance(H * math.nan, V, 0.1), "hessian holds NaN"),
        (lambda: sgd_covariance(H, V, 0.0), "step_size is 0.0; give a positive number"),
        (lambda: sgd_covariance(H, V, 0.1, momentum=1.0), "momentum is 1.0; give a number from 0 to below 1"),
        (lambda: sgd_covariance(H, V, 1.0), "SGD does not settle: a step multiplies one direction by"),
        (lambda: sgd_covariance(-H, V, 0.1, limit=True), "SGD does not settle"),
        (lambda: sgd_temperature(Potential(means, DATA, 8), torch.zeros(2), -1.0), "step_size is -1.0"),
        (lambda: sgd_temperature(Potential(means, DATA, 8), torch.zeros(2), 1.0, momentum=-0.1), "momentum is -0.1"),
        (lambda: sgd_temperature(Potential(means, DATA, 8), torch.zeros(2), 1.0, num_pairs=1), "num_pairs is 1"),
        (
            lambda: sgd_temperature(Potential(means, DATA, 8), torch.zeros(2), 1.0, preconditioner=[1.0, -1.0]),
            "give a positive number, or 2 of them",
        ),
        (lambda: sgd_temperature(Potential(means, DATA, 40), torch.zeros(2), 1.0), "minibatches are the same"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        given()
