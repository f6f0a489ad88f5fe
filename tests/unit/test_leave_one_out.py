"""LOO in words: ArviZ's numbers, exact leave-one-out where it is known, and a verdict for each kind of Pareto k."""

import math

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoDiagonalNormal
from scipy import stats

from bnn import loo_report, to_arviz
from bnn.arviz_data import assemble
from bnn.kernels import MCMC, SGLD, ConstantSGD
from bnn.leave_one_out import _counts, _relative_efficiency
from support.checks import ALPHA


def data_of(densities, **attrs):
    """ArviZ's data of log densities ``(chain, draw, rows)``."""
    return assemble(
        {"log_likelihood": {"y": densities}, "posterior": {"z": densities[..., 0]}}, attrs={"posterior": attrs}
    )


def with_shapes(shapes, draws=1000, seed=0):
    """Rows whose importance weights exp(-log density) are the quantiles of Pareto laws with these shapes, shuffled."""
    generator = np.random.default_rng(seed)
    exponential = -np.log1p(-(np.arange(draws) + 0.5) / draws)
    rows = [-shape * generator.permutation(exponential) for shape in shapes]
    return np.stack(rows, -1).reshape(4, draws // 4, -1)


def test_the_numbers_are_those_of_arviz():
    densities = np.random.default_rng(1).normal(-1.0, 0.5, (4, 500, 30))
    data = data_of(densities)
    report = loo_report(data)
    expected = az.loo(data, pointwise=True, reff=1.0)  # independent draws
    assert report.elpd == pytest.approx(expected["elpd_loo"], rel=1e-3)
    assert report.error == pytest.approx(expected["se"], rel=0.02)
    assert report.p_loo == pytest.approx(expected["p_loo"], rel=0.02)
    assert report.good_k == expected["good_k"]
    assert report.pareto_k.shape == (30,)
    assert f"{az.waic(data)['elpd_waic']:.6g}" in str(report)


def test_the_scale_of_arviz_does_not_matter():
    data = data_of(np.random.default_rng(1).normal(-1.0, 0.5, (4, 100, 30)))
    expected = loo_report(data)
    with az.rc_context({"stats.ic_scale": "deviance", "stats.ic_pointwise": False}):
        assert loo_report(data).lines == expected.lines


def test_elpd_is_exact_leave_one_out():
    """Normal data with known variance: the exact predictive of each row given the others, by 40 runs of 2,000 draws."""
    generator = np.random.default_rng(2)
    y = generator.normal(0.5, 1.0, 25)
    others = 1.0 + 24  # precision of the posterior without a row, under the prior N(0, 1)
    exact = stats.norm.logpdf(y, (y.sum() - y) / others, math.sqrt(1 + 1 / others)).sum()
    found = []
    for _ in range(40):
        z = generator.normal(y.sum() / 26, 1 / math.sqrt(26), (4, 500, 1))
        found.append(loo_report(data_of(stats.norm.logpdf(y, z))).elpd)
    t = (np.mean(found) - exact) / (np.std(found, ddof=1) / math.sqrt(40))
    assert abs(t) < stats.t(39).isf(ALPHA / 2)
    assert np.std(found) < 0.1


def test_every_kind_of_k_in_words():
    """1,000 draws: good up to 1 - 1/log10(1000) = 2/3; the fitted shapes are a little below those of the law."""
    report = loo_report(data_of(with_shapes([0.2, 0.5, 0.72, 0.85, 0.85, 1.5])))
    assert report.good_k == pytest.approx(2 / 3)
    assert report.counts == {"good": 2, "good with more draws": 1, "bad": 2, "very bad": 1}
    words = str(report)
    assert (
        "Pareto k of 6 rows: 2 good (k <= 0.667), 1 good with more draws (0.667 < k <= 0.7), 2 bad (0.7 < k <= 1), "
        "1 very bad (k > 1)." in words
    )
    k = report.pareto_k
    assert f"1 of them need more draws: some {10 ** (1 / (1 - k[2])):.0f}, there are 1000." in words
    assert "not to be believed for 3 rows, and is likely too high" in words
    assert f"The worst rows: 5 (k = {k[5]:.2g}), " in words
    assert "K-fold" in words and "held-out rows" in words


def test_where_one_kind_ends_and_the_next_begins():
    k = np.array([-0.2, 0.6, 0.66, 0.67, 0.7, 0.71, 1.0, 1.01, np.inf, np.nan])
    assert list(_counts(k, 2 / 3).values()) == [3, 2, 2, 3]
    assert list(_counts(k, 0.7).values()) == [5, 0, 2, 3]


def test_good_in_all_rows():
    report = loo_report(data_of(with_shapes([0.1, 0.3, 0.5], draws=4000)))
    assert report.counts == {"good": 3, "good with more draws": 0, "bad": 0, "very bad": 0}
    assert report.lines[1] == "Pareto k: good in all 3 rows (k <= 0.7)."
    assert "believed" not in str(report)


def test_a_k_that_more_draws_mend():
    """The same law is good with ten times the draws."""
    few, many = (loo_report(data_of(with_shapes([0.72, 0.1], draws=draws))) for draws in (1000, 20_000))
    assert few.counts["good with more draws"] == 1 and "believed" not in str(few)
    assert many.good_k == 0.7
    assert few.good_k < few.pareto_k[0] <= 0.7
    assert loo_report(data_of(with_shapes([0.65, 0.1], draws=400))).counts["good with more draws"] == 1
    assert loo_report(data_of(with_shapes([0.65, 0.1], draws=20_000))).counts["good"] == 2


def test_waic_where_it_fails():
    densities = np.random.default_rng(3).normal(-1.0, [0.1, 0.1, 1.0], (4, 500, 3))
    assert "In 1 rows the variance of the log density exceeds 0.4: believe LOO instead." in str(
        loo_report(data_of(densities))
    )
    assert "believe LOO" not in str(loo_report(data_of(densities[..., :2])))


def test_masked_rows_are_left_out():
    densities = np.random.default_rng(4).normal(-1.0, 0.3, (4, 500, 6))
    masked = np.insert(densities, [2, 5], 0.0, axis=-1)
    report, expected = loo_report(data_of(masked)), loo_report(data_of(densities))
    assert report.elpd == expected.elpd and report.counts == expected.counts
    assert np.flatnonzero(np.isnan(report.pareto_k)).tolist() == [2, 6]
    assert report.lines[1] == "2 rows that no draw changes (masked ones, for instance) are left out."


def test_the_worst_rows_have_the_numbers_of_the_data():
    """Rows of several dimensions are counted in their flattened order, left-out ones included."""
    densities = with_shapes([0.2, 1.5, 0.3, 0.2]).reshape(4, 250, 2, 2)
    report = loo_report(data_of(np.insert(densities.reshape(4, 250, 4), 0, 0.0, axis=-1)))
    assert np.nanargmax(report.pareto_k) == 2
    assert "The worst rows: 2 (k" in str(report)
    assert "The worst rows: 1 (k" in str(loo_report(data_of(densities)))


@pytest.mark.parametrize("temperature", [0.1, "PolynomialDecay(...)"])
def test_another_temperature(temperature):
    report = loo_report(data_of(with_shapes([0.2, 0.3]), temperature=temperature))
    assert f"at temperature {temperature}, not 1: LOO and WAIC then do not estimate" in report.lines[-1]
    assert "temperature" not in str(loo_report(data_of(with_shapes([0.2, 0.3]), temperature=1.0)))


def normal_mean(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def test_a_run_at_another_temperature_a_guide_and_a_caveat():
    y = torch.linspace(-1, 1, 10)
    cold = MCMC(SGLD(normal_mean, step_size=0.01, temperature=0.5), 60, num_chains=2, disable_progbar=True)
    cold.run(y)
    assert "at temperature 0.5, not 1" in str(loo_report(to_arviz(cold)))
    guide = AutoDiagonalNormal(normal_mean)
    guide(y)
    assert "from a guide, AutoDiagonalNormal: LOO" in str(loo_report(to_arviz(guide, model_args=(y,), num_samples=50)))
    report = loo_report(data_of(with_shapes([0.2, 0.3]), caveat=ConstantSGD.caveat))
    assert ConstantSGD.caveat in report.lines[-1]


def test_efficiency_is_that_of_the_likelihoods():
    """Draws repeated ten times: a relative efficiency of a tenth makes a longer tail, of sticky draws only."""
    independent = np.random.default_rng(5).normal(-1.0, 0.3, (4, 100, 20))
    assert _relative_efficiency(independent) == pytest.approx(1.0, rel=0.15)
    assert _relative_efficiency(np.repeat(independent, 10, axis=1)) == pytest.approx(0.1, rel=0.3)
    assert _relative_efficiency(independent - 3000.0) == pytest.approx(_relative_efficiency(independent))


@pytest.mark.parametrize(
    ("idata", "words"),
    [
        (lambda: np.zeros(3), "idata is ndarray without a group log_likelihood; give bnn.to_arviz"),
        (lambda: assemble({"posterior": {"z": np.zeros((2, 30))}}), "without a group log_likelihood"),
        (lambda: data_of(np.random.default_rng(0).normal(size=(2, 12, 3))), "has 24 draws; LOO needs 25"),
        (lambda: data_of(np.full((2, 30, 3), np.nan)), "NaN or infinite in 180 of 180 places, first in row 0"),
        (
            lambda: data_of(np.where(np.arange(3) == 2, -np.inf, np.zeros((2, 30, 3)))),
            "NaN or infinite in 60 of 180 places, first in row 2: leave out the chains that diverged",
        ),
        (lambda: data_of(np.zeros((2, 30, 3))), "the same in all draws"),
    ],
)
def test_what_is_refused(idata, words):
    with pytest.raises(ValueError, match=words):
        loo_report(idata())


def test_several_sites():
    densities = with_shapes([0.2, 0.3])
    data = assemble({"log_likelihood": {"y": densities, "x": densities[..., :1]}})
    with pytest.raises(ValueError, match=r"has the sites \['y', 'x'\]; say which by var_name="):
        loo_report(data)
    with pytest.raises(ValueError, match=r"var_name is 'z'; log_likelihood has the sites \['y', 'x'\]"):
        loo_report(data, var_name="z")
    assert loo_report(data, var_name="x").counts["good"] == 1
