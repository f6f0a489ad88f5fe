"""Eigenvalues of symmetric operators: those of dense matrices, and quadratures that are exact up to their degree."""

import math

import numpy as np
import pyro
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator

from bnn import spectral_density, top_eigenvalues


def symmetric(dim, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    values = np.linspace(-3.0, 10.0, dim) ** 3
    return basis @ np.diag(values) @ basis.T, values


@pytest.mark.parametrize("dim", [30, 300], ids=["dense", "Lanczos"])
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_top_eigenvalues(dim, by):
    matrix, values = symmetric(dim)
    matrix, values = (-matrix, -values) if by == "magnitude" else (matrix, values)
    found = top_eigenvalues(aslinearoperator(matrix), 3, by=by, tolerance=1e-10)
    order = np.argsort(-np.abs(values) if by == "magnitude" else -values)[:3]
    np.testing.assert_allclose(found.values, values[order], rtol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1.0)
    np.testing.assert_allclose(
        found.residuals,
        np.linalg.norm(found.vectors @ matrix - found.values[:, None] * found.vectors, axis=1),
        atol=1e-9,
    )


def test_eigenvalues_follow_the_seed():
    matrix, _ = symmetric(300)
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append(top_eigenvalues(aslinearoperator(matrix), 2).vectors)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_quadrature_is_exact_up_to_its_degree(steps):
    """For each probe v: Σ w λᵏ = vᵀCᵏv / d for k ≤ 2 steps − 1, and not for the next power."""
    matrix, _ = symmetric(40)
    matrix = matrix / 500.0
    pyro.set_rng_seed(1)
    found = spectral_density(aslinearoperator(matrix), probes=3, steps=steps)
    pyro.set_rng_seed(1)
    v = (torch.randint(2, (40, 3)).numpy() * 2.0 - 1.0).T / math.sqrt(40)

    def forms(power):
        return np.einsum("pi,ij,pj->p", v, np.linalg.matrix_power(matrix, power), v)

    for power in range(2 * steps):
        np.testing.assert_allclose((found.weights * found.nodes**power).sum(1), forms(power), rtol=1e-9, atol=1e-12)
    beyond = (found.weights * found.nodes ** (2 * steps)).sum(1)
    assert (np.abs(beyond / forms(2 * steps) - 1.0) > 1e-8).all()


def test_moments_are_without_bias():
    """vᵀCv of random signs has mean tr C and variance 2 Σ_{i≠j} C_ij², which falls with the number of probes."""
    matrix, values = symmetric(50)
    probes = 20_000
    found, error = spectral_density(aslinearoperator(matrix), probes=probes, steps=1).moment(1)
    sd = math.sqrt(2 * (np.square(matrix).sum() - np.square(np.diag(matrix)).sum())) / 50
    assert abs(found - values.mean()) < 4.9 * sd / math.sqrt(probes)  # ALPHA = 1e-6
    assert error == pytest.approx(sd / math.sqrt(probes), rel=0.05)


def test_a_full_run_has_the_spectrum_itself():
    """As many steps as eigenvalues, of which one is met twice: the nodes are they, and a probe's weights sum to one."""
    values = np.array([-2.0, 0.5, 0.5, 1.0, 7.0])
    found = spectral_density(aslinearoperator(np.diag(values)), probes=50, steps=9)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        np.testing.assert_allclose(np.sort(nodes[weights > 1e-12]), [-2.0, 0.5, 1.0, 7.0], atol=1e-10)
    np.testing.assert_allclose(found.weights.sum(1), 1.0)
    grid = np.linspace(-5.0, 10.0, 3001)
    density = found.density(grid, width=0.1)
    assert np.trapezoid(density, grid) == pytest.approx(1.0, rel=1e-6)
    inside = (grid > 0.0) & (grid < 0.75)
    assert np.trapezoid(density[inside], grid[inside]) == pytest.approx(0.4, abs=0.01)
    assert np.isfinite(found.density(grid)).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda op: top_eigenvalues(op, 40), "count is 40, but the operator has 39"),
        (lambda op: top_eigenvalues(op, 0), "count is 0"),
        (lambda op: top_eigenvalues(op, by="size"), "by is 'size'; give 'value'"),
        (lambda op: top_eigenvalues(op, tolerance=0.0), "tolerance is 0.0"),
        (lambda op: spectral_density(op, probes=0), "probes is 0"),
        (lambda op: spectral_density(op, steps=1.5), "steps is 1.5"),
        (lambda op: spectral_density(op, steps=3).density([0.0], -1.0), "width is"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        given(aslinearoperator(symmetric(39)[0]))
