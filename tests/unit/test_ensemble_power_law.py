"""Power laws of ensembles: found exactly where they hold, with errors that are what they say; and how to split."""

import math

import numpy as np
import pyro
import pytest
import torch
from scipy import stats

from bnn import PowerLaw, calibrated_nll, ensemble_nll, fit_power_law, memory_split
from support.checks import ALPHA

SIZES = np.array([1, 2, 3, 5, 8, 16, 40])


@pytest.mark.parametrize("c", [-1.0, 0.0, 0.7])
@pytest.mark.parametrize("b", [0.01, 5.0])
@pytest.mark.parametrize("a", [-0.15, -0.5, -1.0, -3.0])
@pytest.mark.parametrize("errors", [None, 0.1 / SIZES])
def test_a_law_is_found_exactly(c, b, a, errors):
    law = fit_power_law(SIZES, c + b * SIZES**a, errors)
    assert (law.c, law.b, law.a) == (
        pytest.approx(c, abs=1e-6 * b),
        pytest.approx(b, rel=1e-6),
        pytest.approx(a, rel=1e-6),
    )
    np.testing.assert_allclose(law([100, 1000]), c + b * np.array([100.0, 1000.0]) ** a, atol=1e-6 * b)


def test_three_sizes_are_met_exactly_and_have_no_errors():
    law = fit_power_law([1, 2, 4], [0.8, 0.65, 0.575])
    np.testing.assert_allclose([law.c, law.b, law.a], [0.5, 0.3, -1.0], rtol=1e-8)
    assert np.isinf(law.covariance).all()


def test_errors_are_what_they_say():
    """500 noisy laws: (found − true)ᵀ Σ⁻¹ (found − true) is χ² with three degrees of freedom, for small noise."""
    generator = np.random.default_rng(0)
    truth, sd = np.array([0.5, 0.4, -0.8]), 1e-4 * np.sqrt(SIZES)
    squares, outside = [], []
    for _ in range(500):
        law = fit_power_law(SIZES, truth[0] + truth[1] * SIZES ** truth[2] + sd * generator.normal(size=len(SIZES)), sd)
        off = np.array([law.c, law.b, law.a]) - truth
        squares.append(off @ np.linalg.solve(law.covariance, off))
        outside.append((float(law(100)) - (truth[0] + truth[1] * 100 ** truth[2])) / float(law.error(100)))
    for sample, freedom in ((np.array(squares), 3), (np.square(outside), 1)):
        total = sample.sum()
        p = 2 * min(stats.chi2.cdf(total, 500 * freedom), stats.chi2.sf(total, 500 * freedom))
        assert p > ALPHA, (freedom, sample.mean())


def test_errors_from_the_scatter():
    """Without errors the residuals give them, as of t with n − 3 degrees of freedom: mean of t² is (n−3)/(n−5)."""
    generator = np.random.default_rng(1)
    n = np.arange(1, 41)
    found = []
    for _ in range(300):
        law = fit_power_law(n, 0.5 + 0.4 / n + 1e-4 * generator.normal(size=40))
        found.append((law.c - 0.5) ** 2 / law.covariance[0, 0])
    mean, variance = 37 / 35, 3 * 37**2 / (35 * 33) - (37 / 35) ** 2
    assert abs(np.mean(found) - mean) < 5.0 * math.sqrt(variance / 300)


def members(number=24, rows=600, classes=4):
    """Nets that see the truth through noise of their own."""
    generator = np.random.default_rng(3)
    truth = 2.0 * generator.normal(size=(rows, classes))
    p = np.exp(truth) / np.exp(truth).sum(-1, keepdims=True)
    labels = (generator.random((rows, 1)) > p.cumsum(-1)[:, :-1]).sum(-1)
    return truth + 1.5 * generator.normal(size=(number, rows, classes)), labels


def test_ensembles_of_each_size():
    """All members have one group, which is the calibrated NLL itself; of one member there are as many as nets."""
    logits, labels = members()
    pyro.set_rng_seed(1)
    found = ensemble_nll(logits, labels, [24], repeats=3)
    pyro.set_rng_seed(1)
    order = torch.randperm(24).numpy()
    assert found[24] == calibrated_nll(logits[order], labels, repeats=3).score
    singles = ensemble_nll(logits, labels, [1], repeats=1)[1]
    each = [calibrated_nll(logits[i : i + 1], labels, repeats=1).score.value for i in range(24)]
    assert singles.value == pytest.approx(np.mean(each), rel=2e-3)  # other splits of the rows
    found = ensemble_nll(logits, labels, [1, 2, 4, 8, 12, 24], repeats=1)
    values = [score.value for score in found.values()]
    assert (np.diff(values) < 0).all()


def test_the_best_split_is_the_lowest_of_all():
    """Against all widths by hand; a law of widths themselves too; and more members for more parameters."""
    widths = np.array([4, 8, 16, 32, 64])

    def nll(width, n):
        return 0.4 + 1.2 * width**-0.7 + 0.5 * width**-0.3 * n**-0.9

    laws = {int(w): fit_power_law(SIZES, nll(w, SIZES)) for w in widths}
    sizes = {int(w): 30.0 * w + w**2 for w in widths}
    counts = []
    for budget in np.geomspace(200, 1e6, 30):
        split = memory_split(laws, sizes, budget)
        fitting = [w for w in sizes if sizes[w] <= budget]
        best = min(fitting, key=lambda w: nll(w, budget // sizes[w]))
        assert (split.width, split.members) == (best, budget // sizes[best])
        assert split.nll.value == pytest.approx(nll(best, split.members), abs=1e-6)
        assert list(split.table) == fitting
        counts.append(split.members)
    assert counts[-1] > counts[0]
    exact = memory_split({8: lambda n: 1.0 / n}, lambda width: 100.0, 300.0)
    assert exact.members == 3 and math.isnan(exact.nll.error)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: fit_power_law([1, 2], [1.0, 0.5]), "give three different positive ones or more"),
        (lambda: fit_power_law([1, 1, 2, 2], [1.0, 1.0, 0.5, 0.5]), "give three different positive"),
        (lambda: fit_power_law([0, 1, 2], [1.0, 1.0, 0.5]), "give three different positive"),
        (lambda: fit_power_law([1, 2, 3], [1.0, 0.5]), r"sizes have shape \(3,\) and values \(2,\)"),
        (lambda: fit_power_law([1, 2, 3], [1.0, math.nan, 0.5]), "values holds NaN"),
        (lambda: fit_power_law([1, 2, 3], [0.5, 0.7, 0.9]), "the values do not fall with size"),
        (
            lambda: fit_power_law([1, 2, 3], [1.0, 0.7, 0.6], [0.1, 0.0, 0.1]),
            "give one positive number for each of the 3",
        ),
        (lambda: ensemble_nll(np.zeros((4, 2)), [0, 1, 0, 1], [1]), r"shape \(4, 2\); wanted is \(members, rows"),
        (lambda: ensemble_nll(np.zeros((2, 4, 2)), [0, 1, 0, 1], [3]), "sizes hold 3, but there are 2 members"),
        (lambda: ensemble_nll(np.zeros((2, 4, 2)), [0, 1, 0, 1], [0]), "each of sizes is 0"),
        (lambda: memory_split({}, len, 10.0), "laws are empty"),
        (lambda: memory_split({3: PowerLaw(0.0, 1.0, -1.0, np.eye(3))}, lambda w: 5.0, 4.0), "no net fits into 4"),
        (lambda: memory_split({3: PowerLaw(0.0, 1.0, -1.0, np.eye(3))}, {3: 0.0}, 4.0), "width 3 has 0.0 parameters"),
        (lambda: memory_split({3: PowerLaw(0.0, 1.0, -1.0, np.eye(3))}, {3: 1.0}, -4.0), "budget is -4.0"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        given()
