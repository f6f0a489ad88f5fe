"""What scores refuse: one row per mistake, with the words that say what was given, what is wanted and what to do."""

import numpy as np
import pytest
import torch

from bnn import (
    accuracy_rejection,
    classification_scores,
    coverage,
    gaussian_scores,
    pit,
    regression_scores,
    reliability,
    total_variation,
)
from bnn.extras import library
from bnn.predictive_arrays import probability_rows

P = np.array([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
Y = np.array([0, 1, 0])
X = np.random.default_rng(0).normal(size=(40, 3))
T = np.zeros(3)

CLASSES = {
    "logits": (lambda f: f(np.array([[-1.0, 2.0]]), [0]), r"holds -1, outside \[0, 1\]: give probabilities; of logits"),
    "percent": (lambda f: f([[20.0, 80.0]], [0]), r"holds 80, outside \[0, 1\]"),
    "sums": (lambda f: f([[0.5, 0.5], [0.5, 0.4]], [0, 0]), "sums to 0.9 in row 1, not to one: give probabilities"),
    "one class": (lambda f: f([[1.0]], [0]), r"shape \(1, 1\); give probabilities \(rows, classes\) of two classes"),
    "NaN": (lambda f: f([[0.5, np.nan]], [0]), r"probabilities holds NaN, 1 of 2 numbers, first at index \(0, 1\)"),
    "empty": (lambda f: f(np.zeros((0, 2)), []), r"probabilities has shape \(0, 2\) and is empty; give at least one"),
    "ragged": (lambda f: f([[0.5, 0.5], [1.0]], Y), "probabilities has parts of different lengths"),
    "words": (lambda f: f([["a", "b"]], [0]), "probabilities has dtype <U1; give a tensor or array of real numbers"),
    "complex": (lambda f: f(torch.tensor([[0.5j, 0.5]]), [0]), "probabilities has dtype complex"),
    "fewer labels": (lambda f: f(P, [0, 1]), r"labels have shape \(2,\); wanted is \(3,\), one label for each row."),
    "one-hot": (lambda f: f(P, np.eye(2)[Y]), r"labels have shape \(3, 2\).*Of one-hot labels take argmax"),
    "column": (lambda f: f(P, Y[:, None]), r"labels have shape \(3, 1\).*Flatten them"),
    "label too large": (lambda f: f(P, [0, 1, 2]), "labels hold 2; wanted are whole numbers from 0 to 1"),
    "negative label": (lambda f: f(P, [0, -1, 1]), "labels hold -1; wanted"),
    "fraction": (lambda f: f(P, [0, 0.5, 1]), "labels hold 0.5; wanted"),
    "infinite label": (lambda f: f(P, [0, np.inf, 1]), "labels hold inf; wanted"),
}

REGRESSION = {
    "draws last": (lambda f: f(X.T, T), r"samples have shape \(3, 40\) and targets \(3,\); .* The draws come first"),
    "chains": (lambda f: f(X.reshape(4, 10, 3), T), r"shape \(4, 10, 3\).* Flatten \(chain, draw\)"),
    "column": (lambda f: f(X, T[:, None]), "Give both the same trailing dimensions"),
    "other rows": (lambda f: f(X, np.zeros(4)), r"targets \(4,\); wanted are \(draws, rows, ...\) and \(rows, ...\).$"),
    "scalar": (lambda f: f(np.zeros(40), 0.0), r"targets \(\); wanted"),
    "NaN": (lambda f: f(X, [0.0, np.nan, 0.0]), r"targets holds NaN, 1 of 3 numbers, first at index \(1,\)"),
    "NaN sample": (lambda f: f(np.where(X == X[3, 1], np.nan, X), T), r"samples holds NaN.* first at index \(3, 1\)"),
    "infinite": (
        lambda f: f(np.where(X == X[3, 1], np.inf, X), T),
        r"samples holds infinite numbers, 1 of 120, first at index \(3, 1\): a chain has diverged",
    ),
    "empty": (lambda f: f(np.zeros((40, 0)), np.zeros(0)), "is empty"),
}

OWN = {
    "chains": (lambda: reliability(np.full((2, 2, 3, 2), 0.5), Y), r"shape \(2, 2, 3, 2\)"),
    "draws": (lambda: classification_scores(np.full((4, 3, 2), 0.5), Y), r"shape \(4, 3, 2\).*Average over the draws"),
    "draws to reject": (lambda: accuracy_rejection(np.full((4, 3, 2), 0.5), Y), "Average over the draws first"),
    "event out of range": (lambda: reliability([0.5, 1.5], [0, 1]), r"probabilities holds 1.5, outside \[0, 1\]"),
    "event labels": (lambda: reliability([0.5, 0.6], [0, 2]), "labels hold 2; wanted are whole numbers from 0 to 1"),
    "no column for two classes": (lambda: classification_scores([0.2, 0.8], [0, 1]), r"For two classes stack \[1 - p"),
    "bins": (lambda: reliability(P, Y, bins=0), "bins is 0; give a whole number of at least 1"),
    "bins of ece": (lambda: classification_scores(P, Y, bins=2.5), "bins is 2.5; give a whole number"),
    "bins of pit": (lambda: pit(X, T, bins=True), "bins is True; give a whole number"),
    "resamples": (lambda: reliability(P, Y, resamples=-3), "resamples is -3; give a whole number"),
    "band": (lambda: reliability(P, Y, band_level=95), "band_level is 95; give numbers between 0 and 1"),
    "band of coverage": (lambda: coverage(X, T, band_level=1.0), "band_level is 1.0; give numbers"),
    "band of pit": (lambda: pit(X, T, band_level=0.0), "band_level is 0.0; give numbers"),
    "levels": (lambda: coverage(X, T, (0.5, 1.0)), r"levels is \(0.5, 1.0\); give numbers between 0 and 1"),
    "no levels": (lambda: regression_scores(X, T, levels=()), r"levels is \(\); give numbers"),
    "one draw": (lambda: regression_scores(X[:1], T), "samples have 1 draws; at least 2 are needed"),
    "mean": (lambda: regression_scores(X, T, mean=X), r"mean has shape \(40, 3\); wanted is that of the targets, \(3,"),
    "log-likelihood": (
        lambda: regression_scores(X, T, log_likelihood=np.zeros((3, 40))),
        r"log_likelihood has shape \(3, 40\); wanted is \(draws, 3\) or \(chain, draw, 3\)",
    ),
    "log-likelihood of classes": (
        lambda: classification_scores(P, Y, log_likelihood=np.zeros(3)),
        r"log_likelihood has shape \(3,\)",
    ),
    "infinite density": (
        lambda: regression_scores(X, T, log_likelihood=np.full((5, 3), np.inf)),
        "plus infinity: a predictive sd is zero",
    ),
    "sd": (lambda: gaussian_scores(T, 0.0, T), "sd holds 0; it must be positive"),
    "shape of sd": (lambda: gaussian_scores(T, [1.0, 2.0], T), r"shapes \(3,\), \(2,\) and \(3,\); wanted are equal"),
    "by": (lambda: accuracy_rejection(P, Y, by="variance"), "by is 'variance'; give 'confidence', 'entropy', or an"),
    "uncertainties": (lambda: accuracy_rejection(P, Y, by=P), r"by has shape \(3, 2\); wanted is \(3,\)"),
    "NaN uncertainty": (lambda: accuracy_rejection(P, Y, by=[0, np.nan, 1]), "by holds NaN"),
}


@pytest.mark.parametrize("function", [classification_scores, reliability, accuracy_rejection])
@pytest.mark.parametrize("mistake", CLASSES)
def test_classes(mistake, function):
    act, words = CLASSES[mistake]
    with pytest.raises(ValueError, match=words):
        act(function)


@pytest.mark.parametrize("function", [regression_scores, coverage, pit])
@pytest.mark.parametrize("mistake", REGRESSION)
def test_regression(mistake, function):
    act, words = REGRESSION[mistake]
    with pytest.raises(ValueError, match=words):
        act(function)


@pytest.mark.parametrize("mistake", OWN)
def test_settings(mistake):
    act, words = OWN[mistake]
    with pytest.raises(ValueError, match=words):
        act()


def test_rounding_is_no_mistake():
    """A float32 softmax over many classes, averaged over draws, and half precision."""
    torch.manual_seed(0)
    p = (20 * torch.randn(50, 40, 1000)).softmax(-1).mean(0)
    assert total_variation(p, p.double()) == 0.0
    assert total_variation(p.bfloat16(), p) < 0.01
    over = np.array([[1.0 + 1e-7, 0.0]], dtype=np.float32)
    assert probability_rows("p", over).max() == 1.0


def test_what_is_given_stays_as_it_is():
    p, x = P.copy(), X.copy()
    reliability(p, Y), classification_scores(p, Y), regression_scores(x, T), coverage(x, T), pit(x, T)
    np.testing.assert_array_equal(p, P)
    np.testing.assert_array_equal(x, X)


def test_a_library_that_breaks_is_not_called_missing(monkeypatch, tmp_path):
    (tmp_path / "broken_library.py").write_text("import no_such_module_at_all\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        library("broken_library")
    with pytest.raises(ImportError, match=r'this needs no_such_library: pip install "pyro-bnn\[store\]"'):
        library("no_such_library.part", "store")
