"""Coverage and the probability integral transform: exact for any number of draws, with bands of their stated level."""

import numpy as np
import pyro
import pytest
import torch
from matplotlib import pyplot as plt
from scipy import stats

from bnn import coverage, pit
from support.checks import ALPHA


@pytest.mark.parametrize("draws", [19, 39, 50])
def test_coverage_of_every_rank_is_what_is_expected(draws):
    """One row for each of the S + 1 equally likely ranks: the part covered is the probability, exactly."""
    ranks = np.arange(draws + 1) + 0.5
    samples = np.arange(1.0, draws + 1)[:, None] * np.ones(draws + 1)
    found = coverage(samples[np.random.default_rng(1).permutation(draws)], ranks, levels=(0.5, 0.8, 0.9))
    np.testing.assert_allclose(found.covered, found.expected, rtol=1e-12)
    assert (found.expected >= np.array(found.levels) - 1e-12).all()
    assert (found.expected < np.array(found.levels) + 2 / (draws + 1)).all()


def test_levels_that_need_more_draws():
    samples, targets = np.zeros((18, 3)), np.zeros(3)
    with pytest.raises(ValueError, match="level 0.9 needs at least 19 draws; there are 18: draw more"):
        coverage(samples, targets, 0.9)
    assert coverage(np.zeros((19, 3)), targets, 0.9).expected == pytest.approx(0.9)
    with pytest.raises(ValueError, match="level 0.95 needs at least 39 draws"):
        coverage(np.zeros((38, 3)), targets, 0.95)
    assert coverage(np.zeros((39, 3)), targets, 0.95).expected == pytest.approx(0.95)


@pytest.mark.parametrize("law", [stats.norm(), stats.t(2), stats.lognorm(1.5)], ids=["normal", "student", "lognormal"])
def test_false_alarms_of_coverage(law):
    """500 right predictives: outside the band at each level in at most 5 %, and not never."""
    generator = np.random.default_rng(2)
    outside = np.zeros(3)
    for _ in range(500):
        found = coverage(
            law.rvs((19, 80), random_state=generator), law.rvs(80, random_state=generator), (0.3, 0.5, 0.8)
        )
        outside += (found.covered < found.low) | (found.covered > found.high)
    for count in outside.astype(int):
        assert stats.binomtest(count, 500, 0.05, alternative="greater").pvalue > ALPHA
        assert count > 5


def test_the_band_of_coverage_is_binomial():
    found = coverage(np.random.default_rng(3).normal(size=(99, 200)), np.zeros(200), 0.9, band_level=0.8)
    inside = stats.binom(200, 0.9).cdf(200 * found.high) - stats.binom(200, 0.9).cdf(200 * found.low - 1)
    assert 0.8 <= inside < 0.88 and (found.low < 0.9) & (0.9 < found.high)


@pytest.mark.parametrize("draws", [1, 4, 30])
@pytest.mark.parametrize(
    "law", [stats.norm(), stats.poisson(1.5), stats.bernoulli(0.3)], ids=["normal", "poisson", "bernoulli"]
)
def test_ranks_are_uniform(law, draws):
    """Of continuous and of discrete targets, for any number of draws: 100,000 rows against the uniform law."""
    generator = np.random.default_rng(4)
    values = pit(law.rvs((draws, 100_000), random_state=generator), law.rvs(100_000, random_state=generator)).values
    assert stats.kstest(values, "uniform").pvalue > ALPHA
    counts = np.histogram(values, 4 * (draws + 1), (0, 1))[0]
    assert stats.chisquare(counts).pvalue > ALPHA


def test_a_rank_lies_in_its_step():
    samples = np.array([1.0, 2.0, 2.0, 5.0])[:, None] * np.ones(5)
    values = pit(samples, np.array([0.0, 1.0, 2.0, 3.0, 9.0])).values * 5
    assert (values >= [0, 0, 1, 3, 4]).all() and (values <= [1, 2, 4, 4, 5]).all()


def test_p_values_of_right_and_wrong_predictives():
    generator = np.random.default_rng(5)
    targets = generator.normal(size=2000)
    for scale, shift, right in [(1.0, 0.0, True), (0.7, 0.0, False), (1.0, 0.3, False)]:
        found = pit(shift + scale * generator.normal(size=(50, 2000)), targets)
        assert (found.p_value > ALPHA) == right
        assert found.p_value == stats.kstest(found.values, "uniform").pvalue


def test_false_alarms_of_the_histogram():
    generator = np.random.default_rng(6)
    outside = np.zeros(5, dtype=int)
    for _ in range(500):
        found = pit(generator.normal(size=(9, 60)), generator.normal(size=60), bins=5)
        assert found.counts.sum() == 60
        outside += (found.counts < found.low) | (found.counts > found.high)
    for count in outside:
        assert stats.binomtest(int(count), 500, 0.05, alternative="greater").pvalue > ALPHA
        assert count > 5


def test_each_output_by_itself():
    generator = np.random.default_rng(7)
    samples, targets = generator.normal(size=(49, 300, 2)), generator.normal(size=(300, 2)) * [1.0, 2.0]
    found, ranks = coverage(samples, targets, (0.5, 0.9)), pit(samples, targets)
    assert found.covered.shape == (2, 2) and ranks.values.shape == (300, 2)
    assert ranks.counts.shape == (10, 2) and ranks.p_value.shape == (2,)
    for output in range(2):
        alone = coverage(samples[..., output], targets[:, output], (0.5, 0.9))
        np.testing.assert_array_equal(found.covered[:, output], alone.covered)
    assert ranks.p_value[0] > 1e-3 > ranks.p_value[1]


def test_ranks_follow_the_seed():
    samples, targets = np.zeros((3, 10)), np.zeros(10)
    values = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        values.append(pit(torch.tensor(samples), targets).values)
    np.testing.assert_array_equal(values[0], values[1])
    assert (values[0] != values[2]).all()


def test_plots_show_the_numbers():
    generator = np.random.default_rng(8)
    found = coverage(generator.normal(size=(99, 300)), generator.normal(size=300))
    axes = found.plot()
    line = next(line for line in axes.lines if line.get_label() == "observed")
    np.testing.assert_allclose(line.get_ydata(), found.covered - found.expected)
    ranks = pit(generator.normal(size=(99, 300, 2)), generator.normal(size=(300, 2)))
    given = plt.figure().subplots()
    assert ranks.plot(given) is given
    np.testing.assert_array_equal(given.patches[-1].get_data().values, ranks.counts[:, 1])
    assert [text.get_text() for text in given.get_legend().get_texts()][1:] == ["output 0", "output 1"]
    many = pit(np.zeros((3, 5, 9)), np.zeros((5, 9))).plot()
    assert len(many.get_legend().get_texts()) == 1
    plt.close("all")
