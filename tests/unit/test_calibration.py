"""Reliability: the band and the p-value have their level; rejection: exact expectations."""

import itertools

import numpy as np
import pyro
import pytest
import torch
from matplotlib import pyplot as plt
from scipy import stats

from bnn import accuracy_rejection, reliability
from support.checks import ALPHA

LARGEST_Z = stats.norm.isf(ALPHA / 2)


def predictions(generator, rows, classes=3, sharpness=1.5):
    logits = sharpness * generator.standard_normal((rows, classes))
    return np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)


def labels_from(generator, p):
    return (generator.random((len(p), 1)) > p.cumsum(-1)[:, :-1]).sum(-1)


def test_a_diagram_by_hand():
    p = np.array([0.1, 0.3, 0.3, 0.8, 0.8, 0.8, 1.0])
    found = reliability(p, [0, 0, 1, 1, 0, 1, 1], bins=4)
    assert found.count.tolist() == [1, 2, 4]
    np.testing.assert_allclose(found.left, [0.0, 0.25, 0.75])
    np.testing.assert_allclose(found.right, [0.25, 0.5, 1.0])
    np.testing.assert_allclose(found.confidence, [0.1, 0.3, 0.85])
    np.testing.assert_allclose(found.accuracy, [0.0, 0.5, 0.75])
    assert found.ece == pytest.approx((0.1 + 2 * 0.2 + 4 * 0.1) / 7, rel=1e-12)


def test_edges_belong_to_the_bin_above():
    found = reliability([0.0, 0.5, 0.25, 1.0], [0, 1, 1, 1], bins=4)
    assert found.left.tolist() == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("rows", [20, 200])
def test_the_band_is_that_of_coin_tosses(rows):
    """With equal probabilities the quantiles are those of the binomial law: within the noise of 9,999 resamples."""
    found = reliability(np.full(rows, 0.7), np.ones(rows), resamples=9999, band_level=0.9)
    law = stats.binom(rows, 0.7)
    for end, tail in ((found.low[0], 0.05), (found.high[0], 0.95)):
        end = round(end * rows)
        below, up_to = law.cdf(end - 1), law.cdf(end)
        noise = LARGEST_Z * np.sqrt(0.05 * 0.95 / 9999)
        assert below - noise < tail < up_to + noise


def test_false_alarms():
    """1,000 data sets drawn from the predictions themselves: outside each bin's band, and p ≤ 0.05, in at most 5 %.

    The predictions differ inside a bin, and so the counts are Poisson-binomial.
    """
    generator = np.random.default_rng(1)
    p = predictions(generator, 120)
    outside, small = 0, 0
    for _ in range(1000):
        found = reliability(p, labels_from(generator, p), bins=5, resamples=99)
        outside = outside + ((found.accuracy < found.low) | (found.accuracy > found.high))
        small += found.p_value <= 0.05
    for count in [*outside, small]:
        assert stats.binomtest(int(count), 1000, 0.05, alternative="greater").pvalue > ALPHA
    assert (outside[found.count > 20] > 10).all()
    assert stats.binomtest(int(small), 1000, 0.05).pvalue > ALPHA  # ECE hardly ties: near 5 % from below as well


def test_the_p_value_is_uniform():
    generator = np.random.default_rng(2)
    p = predictions(generator, 80)
    ranks = [round(100 * reliability(p, labels_from(generator, p), resamples=99).p_value) for _ in range(1000)]
    assert stats.chisquare(np.histogram(ranks, np.linspace(0.5, 100.5, 11))[0]).pvalue > ALPHA


def test_expected_ece_is_the_expectation():
    """Three rows, two bins, all eight outcomes by their probabilities."""
    p = np.array([0.3, 0.4, 0.9])
    eces, weights = [], []
    for outcome in itertools.product([0.0, 1.0], repeat=3):
        hits = np.array(outcome)
        eces.append((abs(hits[:2].sum() - 0.7) + abs(hits[2] - 0.9)) / 3)
        weights.append(np.where(hits == 1, p, 1 - p).prod())
    mean = np.dot(weights, eces)
    sd = np.sqrt(np.dot(weights, np.square(eces)) - mean**2)
    found = reliability(p, [0, 1, 1], bins=2, resamples=20_000)
    assert abs(found.expected_ece - mean) < LARGEST_Z * sd / np.sqrt(20_000)
    exact = np.dot(weights, np.array(eces) >= found.ece - 1e-12)
    assert abs(found.p_value - exact) < LARGEST_Z * np.sqrt(exact * (1 - exact) / 20_000) + 1e-4


def test_predictions_too_sure_are_seen():
    generator = np.random.default_rng(3)
    p = predictions(generator, 1000)
    sharp = p**3 / (p**3).sum(-1, keepdims=True)
    found = reliability(sharp, labels_from(generator, p))
    assert found.p_value == 0.001 and found.ece > 5 * found.expected_ece
    assert (found.accuracy < found.low).sum() > 3
    assert str(found) == f"ECE {found.ece:.3g}; by chance alone {found.expected_ece:.3g} (p = 0.001)"


def test_bins_of_equal_mass():
    generator = np.random.default_rng(4)
    found = reliability(predictions(generator, 150), generator.integers(0, 3, 150), equal_mass=True)
    assert found.count.tolist() == [10] * 15
    assert (found.left <= found.confidence).all() and (found.confidence <= found.right).all()
    assert found.ece == pytest.approx((found.count * abs(found.accuracy - found.confidence)).sum() / 150)
    tied = reliability(np.repeat([0.2, 0.9, 1.0], [5, 30, 65]), np.ones(100), equal_mass=True, bins=4)
    assert tied.count.sum() == 100
    same = reliability(np.full(7, 1.0), np.ones(7), equal_mass=True)
    assert same.count.tolist() == [7] and same.ece == 0.0 and same.p_value == 1.0


def test_the_event_and_the_most_probable_class():
    """Of two classes with the first always the likelier, both are the same diagram."""
    generator = np.random.default_rng(5)
    p, y = generator.uniform(0.5, 1.0, 90), generator.integers(0, 2, 90)
    pyro.set_rng_seed(1)
    top = reliability(np.stack([p, 1 - p], -1), y)
    pyro.set_rng_seed(1)
    event = reliability(torch.tensor(p), torch.tensor(y == 0))
    for name in ("count", "accuracy", "low", "high", "p_value", "expected_ece"):
        np.testing.assert_array_equal(getattr(top, name), getattr(event, name), err_msg=name)


def test_what_rows_share_is_in_the_band_of_draws():
    """One unknown frequency for 100 rows, Beta(2, 2) in the posterior: 500 data sets that the model itself draws.

    Given the draws, false alarms in at most 5 %, up to what 400 draws leave open; given their mean, in most of them.
    """
    generator = np.random.default_rng(10)
    alarms = {"draws": 0, "mean": 0, "p of draws": 0, "p of mean": 0}
    for _ in range(500):
        frequency = generator.beta(2, 2, 400)
        p = np.broadcast_to(np.stack([1 - frequency, frequency], -1)[:, None], (400, 100, 2))
        y = generator.random(100) < generator.beta(2, 2)
        for name, given in (("draws", p), ("mean", p.mean(0))):
            found = reliability(given, y, resamples=199)
            alarms[name] += int(not found.low <= found.accuracy <= found.high)
            alarms[f"p of {name}"] += found.p_value <= 0.05
    for name in ("draws", "p of draws"):
        assert stats.binomtest(int(alarms[name]), 500, 0.05).pvalue > ALPHA
    assert alarms["mean"] > 250 and alarms["p of mean"] > 250


def test_draws_that_agree_are_their_mean():
    generator = np.random.default_rng(11)
    p, y = predictions(generator, 50), generator.integers(0, 3, 50)
    pyro.set_rng_seed(1)
    expected = reliability(p, y)
    pyro.set_rng_seed(1)
    found = reliability(torch.tensor(p)[None], y)
    np.testing.assert_array_equal(found.high, expected.high)
    assert reliability(np.stack([p, p]), y).ece == expected.ece
    with pytest.raises(ValueError, match="probabilities sums to 0.5 in row 1, 0, not to one"):
        reliability([[[0.5, 0.5]], [[0.5, 0.0]]], [0])


def test_chunks_do_not_change_the_law(monkeypatch):
    """A chunk of one data set at a time draws the same numbers in the same order."""
    generator = np.random.default_rng(6)
    p, y = predictions(generator, 40), generator.integers(0, 3, 40)
    pyro.set_rng_seed(1)
    whole = reliability(p, y)
    monkeypatch.setattr("bnn.calibration.CHUNK", 1)
    pyro.set_rng_seed(1)
    np.testing.assert_array_equal(reliability(p, y).high, whole.high)


def test_too_few_resamples_for_the_band():
    with pytest.raises(ValueError, match="38 resamples are too few for a band of level 0.95, which needs at least 39"):
        reliability([0.3], [0], resamples=38)
    assert reliability([0.3], [0], resamples=39).low == 0.0


def test_rejection_with_ties_is_the_mean_over_their_orders():
    p = np.array([[0.6, 0.4], [0.8, 0.2], [0.2, 0.8], [0.8, 0.2], [0.7, 0.3]])
    y = np.array([0, 0, 0, 1, 0])  # right, right, wrong, wrong, right; the second to fourth tie
    curves = []
    for order in itertools.permutations([1, 2, 3]):
        hits = (p.argmax(-1) == y)[[*order, 4, 0]]
        curves.append(hits.cumsum() / np.arange(1, 6))
    found = accuracy_rejection(p, y)
    np.testing.assert_allclose(found.accuracy, np.mean(curves, 0)[::-1], rtol=1e-12)
    np.testing.assert_allclose(found.rejected, [0.0, 0.2, 0.4, 0.6, 0.8], atol=1e-12)
    assert found.area == pytest.approx(np.mean(curves), rel=1e-12)


def test_areas_of_the_best_and_of_no_uncertainty():
    generator = np.random.default_rng(7)
    p = predictions(generator, 60)
    y = labels_from(generator, p)
    wrong = (p.argmax(-1) != y).astype(float)
    best, none = accuracy_rejection(p, y, by=wrong), accuracy_rejection(p, y, by=np.zeros(60))
    assert best.area == pytest.approx(best.best_area, rel=1e-12)
    assert none.area == pytest.approx(none.random_area, rel=1e-12)
    np.testing.assert_allclose(none.accuracy, 1 - wrong.mean(), rtol=1e-12)
    by_confidence = accuracy_rejection(p, y)
    assert none.area < by_confidence.area < best.area
    assert accuracy_rejection(p, y, by=wrong - 1.0).area == best.area
    assert accuracy_rejection(p, y, by=-wrong).area < none.area


def test_uncertainties():
    generator = np.random.default_rng(8)
    p = np.concatenate([predictions(generator, 30), [[1.0, 0.0, 0.0]]])
    y = generator.integers(0, 3, 31)
    entropy = stats.entropy(p, axis=-1)
    np.testing.assert_array_equal(
        accuracy_rejection(p, y, by="entropy").accuracy, accuracy_rejection(p, y, by=entropy).accuracy
    )
    np.testing.assert_array_equal(
        accuracy_rejection(p, y).accuracy, accuracy_rejection(p, y, by=torch.tensor(1 - p.max(-1))).accuracy
    )


def test_plots_show_the_numbers():
    generator = np.random.default_rng(9)
    p = predictions(generator, 300)
    sharp = p**3 / (p**3).sum(-1, keepdims=True)
    y = labels_from(generator, p)
    found = reliability(sharp, y)
    given = plt.figure().subplots()
    assert found.plot(given) is given
    drawn = {line.get_label(): line.get_xydata() for line in given.lines}
    points = np.concatenate([drawn["inside"], drawn["outside"]])
    expected = np.stack([found.confidence, found.accuracy], -1)
    np.testing.assert_allclose(points[points[:, 0].argsort()], expected[expected[:, 0].argsort()])
    outside = (found.accuracy < found.low) | (found.accuracy > found.high)
    assert len(drawn["outside"]) == outside.sum() > 0
    assert given.get_title() == str(found)
    rejection = accuracy_rejection(sharp, y)
    curves = {line.get_label().split(" (")[0]: line.get_ydata() for line in rejection.plot().lines}
    np.testing.assert_array_equal(curves["least certain first"], rejection.accuracy)
    best = accuracy_rejection(sharp, y, by=(sharp.argmax(-1) != y))
    np.testing.assert_allclose(curves["wrong ones first"], best.accuracy)
    plt.close("all")
