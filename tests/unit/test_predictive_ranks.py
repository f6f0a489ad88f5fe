"""Coverage and the probability integral transform: exact for any number of draws, with bands of their stated level."""

import numpy as np
import pyro
import pytest
import torch
from matplotlib import pyplot as plt
from scipy import stats

from bnn import coverage, pit
from bnn.chance_bands import band_of_draws, chance_of
from bnn.predictive_ranks import _distance_from_uniform, central_interval
from support.checks import ALPHA


@pytest.mark.parametrize("draws", [19, 39, 50])
def test_coverage_of_every_rank_is_what_is_expected(draws):
    """One row for each of the S + 1 equally likely ranks: the part covered is the probability, exactly."""
    ranks = np.arange(draws + 1) + 0.5
    samples = np.arange(1.0, draws + 1)[:, None] * np.ones(draws + 1)
    samples = samples[np.random.default_rng(1).permutation(draws)]
    found = coverage(samples, ranks, levels=(0.5, 0.8, 0.9), independent_rows=True)
    np.testing.assert_allclose(found.covered, found.expected, rtol=1e-12)
    assert (found.expected >= np.array(found.levels) - 1e-12).all()
    assert (found.expected < np.array(found.levels) + 2 / (draws + 1)).all()


def test_covered_is_inside_the_interval():
    """Ends included, ties and several outputs too; in chunks of rows as in one."""
    generator = np.random.default_rng(9)
    samples, targets = generator.poisson(3.0, (60, 40, 2)), generator.poisson(3.0, (40, 2))
    found = coverage(samples, targets, (0.3, 0.8))
    for number, level in enumerate((0.3, 0.8)):
        low, high = central_interval(samples, level)
        np.testing.assert_allclose(found.covered[number], ((low <= targets) & (targets <= high)).mean(0))


def test_levels_that_need_more_draws():
    samples, targets = np.zeros((18, 3)), np.zeros(3)
    with pytest.raises(ValueError, match="level 0.9 needs at least 19 draws; there are 18: draw more"):
        coverage(samples, targets, 0.9)
    assert coverage(np.zeros((19, 3)), targets, 0.9, independent_rows=True).expected == pytest.approx(0.9)
    with pytest.raises(ValueError, match="level 0.95 needs at least 39 draws"):
        coverage(np.zeros((38, 3)), targets, 0.95)
    assert coverage(np.zeros((39, 3)), targets, 0.95).expected == pytest.approx(0.95)
    for function in (coverage, pit):
        with pytest.raises(
            ValueError,
            match="38 draws are too few for a band of level 0.95, which needs at least 39: .*independent_rows",
        ):
            function(np.zeros((38, 3)), targets)


def test_a_band_of_draws_is_exact():
    """A value at each of the R + 1 places among R others: one of twenty below the band of 0.9, one above."""
    drawn = np.random.default_rng(10).permutation(np.arange(19.0))
    low, high = band_of_draws(drawn, 0.9, "draws", "")
    places = np.arange(20) - 0.5
    assert (places < low).sum() == (places > high).sum() == 1
    assert [float(chance_of(place, drawn)) for place in places] == pytest.approx(np.arange(20, 0, -1) / 20)


@pytest.mark.parametrize("independent", [True, False], ids=["binomial", "of draws"])
@pytest.mark.parametrize("law", [stats.norm(), stats.lognorm(1.5)], ids=["normal", "lognormal"])
def test_false_alarms_of_coverage(law, independent):
    """250 right predictives: outside the band at each level in at most 5 %, and not never."""
    generator = np.random.default_rng(2)
    outside = np.zeros(3, dtype=int)
    for _ in range(250):
        samples, targets = law.rvs((39, 80), random_state=generator), law.rvs(80, random_state=generator)
        found = coverage(samples, targets, (0.3, 0.5, 0.8), independent_rows=independent)
        outside += (found.covered < found.low) | (found.covered > found.high)
    for count in outside:
        assert stats.binomtest(int(count), 250, 0.05, alternative="greater").pvalue > ALPHA
        assert count > 2


def sharing(generator, draws, rows, noise=1.0):
    """A weight that all rows share, unknown to the posterior, and noise: data and draws of the same law."""
    whole = generator.normal(size=(draws + 1, 1)) + noise * generator.normal(size=(draws + 1, rows))
    return whole[1:], whole[0]


def test_what_rows_share_is_in_the_bands_of_draws():
    """250 data sets that the model itself draws: at most 5 % of false alarms by the draws, most by coins."""
    generator = np.random.default_rng(11)
    alarms = np.zeros((2, 3), dtype=int)
    for _ in range(250):
        samples, targets = sharing(generator, 39, 200)
        for number, independent in enumerate((False, True)):
            found = coverage(samples, targets, 0.5, independent_rows=independent)
            ranks = pit(samples, targets, bins=4, independent_rows=independent)
            alarms[number] += [
                ((found.covered < found.low) | (found.covered > found.high)).item(),
                ((ranks.counts < ranks.low) | (ranks.counts > ranks.high))[0],
                ranks.p_value <= 0.05,
            ]
    for count in alarms[0]:
        assert stats.binomtest(int(count), 250, 0.05, alternative="greater").pvalue > ALPHA
    assert (alarms[0] > 2).all() and (alarms[1] > 125).all()


def test_the_binomial_band():
    found = coverage(
        np.random.default_rng(3).normal(size=(99, 200)), np.zeros(200), 0.9, band_level=0.8, independent_rows=True
    )
    inside = stats.binom(200, 0.9).cdf(200 * found.high) - stats.binom(200, 0.9).cdf(200 * found.low - 1)
    assert 0.8 <= inside < 0.88 and (found.low < 0.9) & (0.9 < found.high)


@pytest.mark.parametrize("draws", [1, 4, 30])
@pytest.mark.parametrize(
    "law", [stats.norm(), stats.poisson(1.5), stats.bernoulli(0.3)], ids=["normal", "poisson", "bernoulli"]
)
def test_ranks_are_uniform(law, draws):
    """Of continuous and of discrete targets, for any number of draws: 100,000 rows against the uniform law."""
    generator = np.random.default_rng(4)
    samples, targets = law.rvs((draws, 100_000), random_state=generator), law.rvs(100_000, random_state=generator)
    values = pit(samples, targets, independent_rows=True).values
    assert stats.kstest(values, "uniform").pvalue > ALPHA
    counts = np.histogram(values, 4 * (draws + 1), (0, 1))[0]
    assert stats.chisquare(counts).pvalue > ALPHA


def test_a_rank_lies_in_its_step():
    samples = np.array([1.0, 2.0, 2.0, 5.0])[:, None] * np.ones(5)
    values = pit(samples, np.array([0.0, 1.0, 2.0, 3.0, 9.0]), independent_rows=True).values * 5
    assert (values >= [0, 0, 1, 3, 4]).all() and (values <= [1, 2, 4, 4, 5]).all()


@pytest.mark.parametrize("independent", [True, False], ids=["Kolmogorov", "of draws"])
def test_p_values_of_right_and_wrong_predictives(independent):
    generator = np.random.default_rng(5)
    targets = generator.normal(size=2000)
    for scale, shift, right in [(1.0, 0.0, True), (0.7, 0.0, False), (1.0, 0.3, False)]:
        samples = shift + scale * generator.normal(size=(99, 2000))
        found = pit(samples, targets, independent_rows=independent)
        if independent:
            assert found.p_value == stats.kstest(found.values, "uniform").pvalue
            assert (found.p_value > ALPHA) == right
        else:
            assert found.p_value >= 0.02 if right else found.p_value == 0.01


def test_p_values_of_draws_are_uniform():
    """Of 1,000 data sets whose rows share a weight: the p-value takes each of its twenty values equally often."""
    generator = np.random.default_rng(12)
    found = [pit(*sharing(generator, 19, 10), band_level=0.5).p_value * 20 for _ in range(1000)]
    assert stats.chisquare(np.bincount(np.round(found).astype(int), minlength=21)[1:]).pvalue > ALPHA


def test_the_distance_is_that_of_kolmogorov():
    u = np.random.default_rng(13).random((3, 50, 2))
    expected = [[stats.kstest(u[i, :, j], "uniform").statistic for j in range(2)] for i in range(3)]
    np.testing.assert_allclose(_distance_from_uniform(u), expected, rtol=1e-12)


@pytest.mark.parametrize("independent", [True, False], ids=["binomial", "of draws"])
def test_false_alarms_of_the_histogram(independent):
    generator = np.random.default_rng(6)
    outside = np.zeros(5, dtype=int)
    for _ in range(250):
        samples, targets = generator.normal(size=(39, 60)), generator.normal(size=60)
        found = pit(samples, targets, bins=5, independent_rows=independent)
        assert found.counts.sum() == 60
        outside += (found.counts < found.low) | (found.counts > found.high)
    for count in outside:
        assert stats.binomtest(int(count), 250, 0.05, alternative="greater").pvalue > ALPHA
        assert count > 2


@pytest.mark.parametrize("independent", [True, False])
def test_each_output_by_itself(independent):
    generator = np.random.default_rng(7)
    samples, targets = generator.normal(size=(199, 300, 2)), generator.normal(size=(300, 2)) * [1.0, 2.0]
    found = coverage(samples, targets, (0.5, 0.9), independent_rows=independent)
    ranks = pit(samples, targets, independent_rows=independent)
    assert found.covered.shape == found.low.shape == (2, 2) and ranks.values.shape == (300, 2)
    assert ranks.counts.shape == ranks.high.shape == (10, 2) and ranks.p_value.shape == (2,)
    for output in range(2):
        alone = coverage(samples[..., output], targets[:, output], (0.5, 0.9), independent_rows=independent)
        for name in ("covered", "low", "high"):
            np.testing.assert_array_equal(getattr(found, name)[:, output], getattr(alone, name))
    assert ranks.p_value[0] > 0.005 >= ranks.p_value[1]


def test_chunks_change_nothing(monkeypatch):
    generator = np.random.default_rng(14)
    samples, targets = generator.normal(size=(50, 30, 2)), generator.normal(size=(30, 2))
    whole = coverage(samples, targets)
    monkeypatch.setattr("bnn.predictive_ranks.CHUNK", 700)  # seven rows
    parts = coverage(samples, targets)
    np.testing.assert_allclose(parts.covered, whole.covered)
    np.testing.assert_allclose(parts.high, whole.high)
    assert stats.kstest(pit(samples, targets).values.ravel(), "uniform").pvalue > ALPHA


def test_ranks_follow_the_seed():
    samples, targets = np.zeros((39, 10)), np.zeros(10)
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
    band = axes.collections[0].get_paths()[0].get_extents()
    assert band.ymin == pytest.approx((found.low - found.expected).min())
    ranks = pit(generator.normal(size=(99, 300, 2)), generator.normal(size=(300, 2)))
    given = plt.figure().subplots()
    assert ranks.plot(given) is given
    band, line = given.patches[-2:]
    np.testing.assert_array_equal(line.get_data().values, ranks.counts[:, 1])
    np.testing.assert_array_equal(band.get_data().values, ranks.high[:, 1])
    np.testing.assert_array_equal(band.get_data().baseline, ranks.low[:, 1])
    assert [text.get_text() for text in given.get_legend().get_texts()][1:] == ["output 0", "output 1"]
    many = pit(np.zeros((39, 5, 9)), np.zeros((5, 9))).plot()
    assert len(many.get_legend().get_texts()) == 1
    plt.close("all")
