"""Scores: closed forms, exact expectations by enumeration, and standard errors that are what they say."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from scipy import stats

from bnn import classification_scores, gaussian_scores, regression_scores, reliability
from bnn.scoring import mean_score
from support.checks import ALPHA

LARGEST_Z = stats.norm.isf(ALPHA / 2)
GENERATOR = np.random.default_rng


def softmax_rows(generator, rows, classes, sharpness=2.0):
    logits = sharpness * generator.standard_normal((rows, classes))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def normal_crps(mean, sd, y):
    z = (y - mean) / sd
    return sd * (z * (2 * stats.norm.cdf(z) - 1) + 2 * stats.norm.pdf(z) - 1 / math.sqrt(math.pi))


def test_scores_of_two_rows_by_hand():
    scores = classification_scores([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]], [0, 1], bins=10)
    assert scores["nll"].value == pytest.approx(-(math.log(0.5) + math.log(0.2)) / 2, rel=1e-14)
    brier = [0.25 + 0.09 + 0.04, 0.01 + 0.64 + 0.49]
    assert scores["brier"].value == pytest.approx(np.mean(brier), rel=1e-14)
    assert scores["brier"].error == pytest.approx(abs(brier[0] - brier[1]) / 2, rel=1e-12)
    assert scores["accuracy"] == pytest.approx((0.5, 0.5))
    assert scores["ece"].value == pytest.approx((0.5 + 0.7) / 2, rel=1e-14)


def test_ece_is_zero_where_frequencies_are_the_confidences():
    p = np.array([[0.75, 0.25]] * 4 + [[0.4, 0.6]] * 5)
    y = np.array([0, 0, 0, 1] + [1, 1, 1, 0, 0])
    assert classification_scores(p, y)["ece"].value == pytest.approx(0.0, abs=1e-15)


def test_confidence_one_shares_the_last_bin():
    """In one bin: |1.95 - 1| / 2. In a bin of its own, as torchmetrics has it: (1 + 0.05) / 2."""
    p = np.array([[1.0, 0.0], [0.95, 0.05]])
    assert classification_scores(p, [1, 0])["ece"].value == pytest.approx(0.475, rel=1e-12)


@pytest.mark.parametrize("bins", [1, 7, 15])
@pytest.mark.parametrize("classes", [2, 10])
def test_ece_is_that_of_the_reliability_diagram(classes, bins):
    generator = GENERATOR(1)
    p, y = softmax_rows(generator, 500, classes), generator.integers(0, classes, 500)
    p[:3] = np.eye(classes)[:1]
    ece = classification_scores(p, y, bins=bins)["ece"].value
    assert ece == pytest.approx(reliability(p, y, bins=bins, resamples=40).ece, rel=1e-12)


def test_the_error_of_ece():
    """Where no gap is chance: of 400 data sets of 500 rows, the variance of ECE over the mean of its squared errors."""
    generator = GENERATOR(2)
    found = []
    for _ in range(400):
        confidence = generator.choice([0.55, 0.75, 0.95], 500, p=[0.2, 0.3, 0.5])
        right = generator.random(500) < confidence - np.where(confidence > 0.9, 0.7, -0.2)
        found.append(classification_scores(np.stack([confidence, 1 - confidence], -1), np.where(right, 0, 1))["ece"])
    values, errors = np.array(found).T
    ratio = values.var(ddof=1) / np.mean(errors**2)
    assert stats.chi2.ppf(ALPHA / 2, 399) < 399 * ratio < stats.chi2.isf(ALPHA / 2, 399)
    assert stats.chi2.isf(ALPHA / 2, 399) / 399 < 1.4


def test_nll_of_draws_is_minus_the_log_of_the_mean_likelihood():
    generator = GENERATOR(3)
    log_likelihood = generator.normal(-1.0, 2.0, (2, 5, 7))
    expected = -np.log(np.exp(log_likelihood).mean((0, 1)))
    p = np.full((7, 2), 0.5)
    for given in (log_likelihood, log_likelihood.reshape(10, 7), torch.tensor(log_likelihood)):
        nll = classification_scores(p, [0] * 7, log_likelihood=given)["nll"]
        assert nll.value == pytest.approx(expected.mean(), rel=1e-12)
        assert nll.error == pytest.approx(expected.std(ddof=1) / math.sqrt(7), rel=1e-12)
        assert regression_scores(np.zeros((30, 7)), np.zeros(7), log_likelihood=given)["nll"] == nll
    far = regression_scores(np.zeros((30, 7)), np.zeros(7), log_likelihood=log_likelihood - 2000.0)["nll"]
    assert far.value == pytest.approx(expected.mean() + 2000.0, rel=1e-12)


def test_a_label_of_probability_zero_has_infinite_nll():
    scores = classification_scores([[1.0, 0.0], [0.5, 0.5]], [1, 0])
    assert scores["nll"] == (math.inf, math.inf)
    assert scores["brier"].value == pytest.approx((2.0 + 0.5) / 2)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_crps_is_unbiased_exactly(size):
    """Over all ensembles of a law with three values, weighted by their probabilities: the score of that law."""
    values, law, target = np.array([0.0, 2.0, 5.0]), np.array([0.2, 0.5, 0.3]), 1.0
    pairs = np.abs(values[:, None] - values)
    exact = law @ np.abs(values - target) - 0.5 * law @ pairs @ law
    ensembles = np.array(list(itertools.product(range(3), repeat=size)))
    weights = law[ensembles].prod(-1)
    found = [
        regression_scores(values[e][:, None], [target], levels=0.3)["crps"].value for e in ensembles
    ]  # fmt: skip
    assert weights @ found == pytest.approx(exact, rel=1e-12)


def test_crps_by_hand():
    """|x - y| is 4/3 on average, |x - x'| of different ones 2."""
    assert regression_scores([[0.0], [2.0], [3.0]], [1.0], levels=0.5)["crps"].value == pytest.approx(1 / 3, rel=1e-12)


def test_crps_of_normal_samples_is_the_closed_form():
    generator = GENERATOR(4)
    mean, sd, y = generator.normal(size=4000), np.exp(generator.normal(size=4000)), generator.normal(size=4000)
    samples = mean + sd * generator.standard_normal((50, 4000))
    exact = normal_crps(mean, sd, y)
    import scoringrules

    errors = scoringrules.crps_ensemble(y, samples, m_axis=0, estimator="fair") - exact
    value = regression_scores(samples, y)["crps"].value
    assert value - exact.mean() == pytest.approx(errors.mean(), abs=1e-12)
    assert abs(value - exact.mean()) < LARGEST_Z * errors.std() / math.sqrt(4000)
    assert errors.std() / math.sqrt(4000) < 0.01 * exact.mean()


def test_gaussian_scores_are_closed_forms():
    generator = GENERATOR(5)
    mean, sd, y = generator.normal(size=(3, 40, 2))
    sd = np.exp(sd)
    scores = gaussian_scores(mean, sd, y, levels=(0.5, 0.9))
    assert scores["crps"].value == pytest.approx(normal_crps(mean, sd, y).mean(), rel=1e-12)
    assert scores["nll"].value == pytest.approx(-stats.norm.logpdf(y, mean, sd).sum(1).mean(), rel=1e-12)
    assert scores["rmse"].value == pytest.approx(math.sqrt(np.mean((mean - y) ** 2)), rel=1e-12)
    assert scores["mae"].value == pytest.approx(np.mean(np.abs(mean - y)), rel=1e-12)
    for level in (0.5, 0.9):
        low, high = stats.norm.interval(level, mean, sd)
        assert scores[f"coverage_{level}"].value == pytest.approx(np.mean((low <= y) & (y <= high)))
        assert scores[f"width_{level}"].value == pytest.approx(np.mean(high - low), rel=1e-9)
    one = gaussian_scores(mean, 2.0, y)
    assert one["crps"].value == pytest.approx(normal_crps(mean, 2.0, y).mean(), rel=1e-12)
    assert one["width_0.9"].error == pytest.approx(0.0, abs=1e-12)


def test_point_errors_of_samples():
    """The mean for the squared error, the median for the absolute one; the error of a root by the delta method."""
    samples = np.array([[0.0, 1.0], [0.0, 1.0], [6.0, 1.0]])
    scores = regression_scores(samples, [3.0, 4.0], levels=0.5)
    assert scores["rmse"].value == pytest.approx(math.sqrt((1.0 + 9.0) / 2))
    assert scores["rmse"].error == pytest.approx(4.0 / (2 * math.sqrt(5.0)))
    assert scores["mae"] == pytest.approx((3.0, 0.0))
    known = regression_scores(samples, [3.0, 4.0], mean=torch.tensor([3.0, 2.0]), levels=0.5)
    assert known["rmse"].value == pytest.approx(math.sqrt(2.0))
    assert known["mae"] == scores["mae"]


def test_intervals_of_samples():
    samples = np.arange(1.0, 20.0)[:, None] * np.ones(4)
    scores = regression_scores(samples, [1.0, 0.9, 19.0, 25.0], levels=(0.5, 0.9))
    assert scores["coverage_0.9"].value == 0.5 and scores["width_0.9"] == (18.0, 0.0)
    assert scores["width_0.5"].value == 10.0


def test_several_outputs_are_one_row():
    """The same target twice is no more evidence: neither values nor errors change."""
    generator = GENERATOR(6)
    samples, y = generator.normal(size=(30, 50)), generator.normal(size=50)
    one, two = regression_scores(samples, y), regression_scores(np.stack([samples] * 2, -1), np.stack([y] * 2, -1))
    for name, score in one.items():
        assert two[name] == pytest.approx(score, rel=1e-12), name


@pytest.mark.parametrize("rows", [5, 200])
def test_the_error_is_that_of_the_mean(rows):
    """(mean - truth)/error is Student's t: of 2,000 data sets the squares add up as F says."""
    values = GENERATOR(7).normal(3.0, 2.0, (2000, rows))
    scores = np.array([mean_score(one) for one in values])
    t = (scores[:, 0] - 3.0) / scores[:, 1]
    assert stats.kstest(t, stats.t(rows - 1).cdf).pvalue > ALPHA


def test_one_row_has_no_error():
    scores = {**classification_scores([[0.7, 0.3]], [0]), **regression_scores(np.arange(20.0)[:, None], [1.0])}
    assert all(math.isnan(score.error) and math.isfinite(score.value) for score in scores.values())


def test_tensors_and_arrays_alike():
    generator = GENERATOR(8)
    p, y = softmax_rows(generator, 60, 4), generator.integers(0, 4, 60)
    expected = classification_scores(p, y)
    assert classification_scores(torch.tensor(p, requires_grad=True), torch.tensor(y)) == expected
    assert classification_scores(p.tolist(), y.astype(float).tolist()) == expected
    half = classification_scores(torch.tensor(p).bfloat16(), torch.tensor(y, dtype=torch.uint8))
    assert half["brier"].value == pytest.approx(expected["brier"].value, rel=0.01)
    samples, targets = generator.normal(size=(40, 30)), generator.normal(size=30)
    assert regression_scores(torch.tensor(samples), torch.tensor(targets)) == regression_scores(samples, targets)


@pytest.mark.parametrize("missing", ["scoringrules", "torchmetrics"])
def test_a_missing_library_is_named_with_the_extra(missing, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf'needs {missing}: pip install "pyro-bnn\[report\]"'):
        classification_scores([[0.5, 0.5]], [0])
