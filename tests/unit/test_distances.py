"""Agreement, total variation and Wasserstein distance: exact values and the axioms."""

import numpy as np
import pytest
import torch

from bnn import agreement, total_variation, wasserstein

P = np.array([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.1, 0.8], [1.0, 0.0, 0.0]])
Q = np.array([[0.1, 0.6, 0.3], [0.1, 0.5, 0.4], [0.3, 0.1, 0.6], [0.0, 0.0, 1.0]])


def test_by_hand():
    assert agreement(P, Q) == 0.5
    assert total_variation(P, Q) == pytest.approx((0.5 + 0.1 + 0.2 + 1.0) / 4, rel=1e-12)


def test_total_variation_is_the_largest_difference_of_an_event():
    events = np.array(np.meshgrid(*[[0, 1]] * 3)).reshape(3, -1)
    largest = (P @ events - Q @ events).max(-1)
    assert total_variation(P, Q) == pytest.approx(largest.mean(), rel=1e-12)


def test_axioms():
    generator = np.random.default_rng(1)
    p, q, r = generator.dirichlet(np.ones(5), (3, 40))
    assert agreement(p, p) == 1.0 and total_variation(p, p) == 0.0
    assert agreement(p, q) == agreement(q, p)
    assert total_variation(p, q) == pytest.approx(total_variation(q, p), rel=1e-14)
    assert total_variation(p, r) <= total_variation(p, q) + total_variation(q, r)
    order = generator.permutation(5)
    assert agreement(p[:, order], q[:, order]) == agreement(p, q)
    assert total_variation(p[:, order], q[:, order]) == pytest.approx(total_variation(p, q))
    assert total_variation(torch.tensor(p), q) == total_variation(p, torch.tensor(q, requires_grad=True))


def test_wasserstein_by_hand():
    """A shift by c is at distance c, a stretch of {-1, 1} by s at s - 1; a point against two, their mean distance."""
    generator = np.random.default_rng(2)
    x = generator.normal(size=(30, 4, 2))
    shift = np.arange(8.0).reshape(4, 2) - 3
    np.testing.assert_allclose(wasserstein(x, x[generator.permutation(30)] + shift), np.abs(shift), atol=1e-12)
    np.testing.assert_allclose(wasserstein([[-1.0], [1.0]], [[-3.0], [3.0]]), [2.0])
    np.testing.assert_allclose(wasserstein([[0.0]], torch.tensor([[-1.0], [3.0]])), [2.0])
    assert wasserstein(x, x).shape == (4, 2)


@pytest.mark.parametrize("function", [agreement, total_variation])
def test_shapes_that_differ(function):
    with pytest.raises(ValueError, match=r"p has shape \(4, 3\) and q \(3, 3\); give probabilities of the same rows"):
        function(P, Q[:3])
    with pytest.raises(ValueError, match=r"q has shape \(3,\); give probabilities \(rows, classes\)"):
        function(P, Q[0])
    with pytest.raises(ValueError, match="p sums to 2 in row 0, not to one"):
        function(np.ones((4, 2)), Q)


def test_samples_that_differ():
    with pytest.raises(ValueError, match=r"p has shape \(5, 3\) and q \(5, 4\); wanted are \(draws, rows, ...\)"):
        wasserstein(np.zeros((5, 3)), np.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"p has shape \(5,\)"):
        wasserstein(np.zeros(5), np.zeros(5))
