"""Temperature scaling: stationary, consistent, invariant as its definition says, and never scored on its own rows."""

import math
import pickle

import numpy as np
import pyro
import pytest
import torch
from scipy import stats
from scipy.special import log_softmax, logsumexp, softmax

from bnn import calibrated_nll, fit_temperature
from bnn import temperature_scaling as module
from support.checks import ALPHA

PROTOCOLS = ["after", "before"]


def ensemble(members, rows, classes=5, temperature=1.0, seed=0, spread=1.0):
    """Logits of members that disagree, and labels drawn from their mean at a temperature before averaging."""
    generator = np.random.default_rng(seed)
    logits = 2.0 * generator.standard_normal((rows, classes)) + spread * generator.standard_normal(
        (members, rows, classes)
    )
    p = softmax(logits / temperature, -1).mean(0)
    return logits, (generator.random((rows, 1)) > p.cumsum(-1)[:, :-1]).sum(-1)


def nll(logits, labels, inverse, protocol):
    """In torch and by the definition: softmax(log mean p / τ), or the mean of softmax(logits / τ)."""
    logits = torch.tensor(logits)
    if protocol == "after":
        p = (logits.softmax(-1).mean(0).log() * inverse).softmax(-1)
    else:
        p = (logits * inverse).softmax(-1).mean(0)
    return -p[torch.arange(len(labels)), torch.tensor(labels)].log().mean()


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("members", [1, 4])
def test_the_gradient_is_zero_at_the_fitted_temperature(members, protocol):
    logits, labels = ensemble(members, 400, temperature=1.7)
    tau = fit_temperature(logits, labels, protocol=protocol).temperature

    def slope(at):
        inverse = torch.tensor(1.0 / at, dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(nll(logits, labels, inverse, protocol), inverse)
        return float(grad)

    assert abs(slope(tau)) < 1e-6
    assert slope(1.01 * tau) < -1e-3 and slope(0.99 * tau) > 1e-3


@pytest.mark.parametrize("truth", [0.5, 1.0, 3.0])
def test_the_temperature_of_synthetic_logits_is_found(truth):
    """The maximum-likelihood estimate of 1/τ, asymptotically normal with its Fisher information, of 50,000 rows."""
    logits, labels = ensemble(1, 50_000, temperature=truth, seed=1)
    found = 1.0 / fit_temperature(logits, labels).temperature
    p = softmax(logits[0] * found, -1)
    information = ((p * logits[0] ** 2).sum(-1) - (p * logits[0]).sum(-1) ** 2).sum()
    assert abs(found - 1.0 / truth) * math.sqrt(information) < stats.norm.isf(ALPHA / 2)
    assert 1.0 / math.sqrt(information) < 0.01 / truth


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_scaling_is_its_definition(protocol):
    logits, labels = ensemble(3, 50)
    scaling = fit_temperature(logits[:, :25], labels[:25], protocol=protocol)
    other = logits[:, 25:]
    tau = scaling.temperature
    mean = logsumexp(log_softmax(other, -1), 0) - math.log(3)
    expected = log_softmax(mean / tau, -1) if protocol == "after" else np.log(softmax(other / tau, -1).mean(0))
    found = scaling(torch.tensor(other))
    assert found.dtype == torch.float64
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-10)
    assert nll(other, labels[25:], 1 / tau, protocol) == pytest.approx(
        -found.numpy()[np.arange(25), labels[25:]].mean(), rel=1e-10
    )


def test_one_member_has_one_protocol():
    logits, labels = ensemble(1, 200)
    after, before = (fit_temperature(logits, labels, protocol=protocol) for protocol in PROTOCOLS)
    assert after.temperature == before.temperature
    other = ensemble(1, 30, seed=2)[0]
    torch.testing.assert_close(after(other), before(other), rtol=1e-14, atol=0.0)
    assert fit_temperature(logits[0], labels).temperature == after.temperature


def test_members_that_disagree_have_two():
    """Labels at temperature 2 before averaging: that one is found, and the other is another."""
    logits, labels = ensemble(5, 5000, spread=3.0, temperature=2.0)
    after, before = (fit_temperature(logits, labels, protocol=protocol).temperature for protocol in PROTOCOLS)
    assert before == pytest.approx(2.0, rel=0.1)
    assert abs(math.log(after / before)) > 0.2


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_invariances(protocol):
    """Shifts of a row's logits, orders of members, rows and classes change nothing; copies of a member neither."""
    logits, labels = ensemble(3, 300)
    generator = np.random.default_rng(3)
    tau = fit_temperature(logits, labels, protocol=protocol).temperature
    rows, classes = generator.permutation(300), generator.permutation(5)
    variants = [
        (logits + generator.normal(size=(3, 300, 1)), labels),
        (log_softmax(logits, -1), labels),
        (logits[[2, 0, 1]], labels),
        (logits[:, rows], labels[rows]),
        (logits[..., classes], classes.argsort()[labels]),
        (np.concatenate([logits, logits]), labels),
        (np.concatenate([logits, logits], 1), np.concatenate([labels, labels])),
    ]
    for given, y in variants:
        assert fit_temperature(given, y, protocol=protocol).temperature == pytest.approx(tau, rel=1e-6)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_logits_times_a_factor_have_the_temperature_times_it(factor):
    logits, labels = ensemble(3, 300)
    before = fit_temperature(logits, labels, protocol="before").temperature
    assert fit_temperature(factor * logits, labels, protocol="before").temperature == pytest.approx(
        factor * before, rel=1e-6
    )
    average = logsumexp(log_softmax(logits, -1), 0) - math.log(3)
    after = fit_temperature(average, labels).temperature
    assert fit_temperature(factor * average, labels).temperature == pytest.approx(factor * after, rel=1e-6)
    assert fit_temperature(logits, labels).temperature == pytest.approx(after, rel=1e-6)


def test_after_averaging_keeps_the_most_probable_class():
    logits, labels = ensemble(4, 300, temperature=2.0)
    scaling = fit_temperature(logits[:, :150], labels[:150])
    p = softmax(logits[:, 150:], -1).mean(0)
    np.testing.assert_array_equal(scaling(logits[:, 150:]).argmax(-1), p.argmax(-1))


@pytest.mark.parametrize(
    ("gaps", "lower"),
    [
        ([[-2.0, -8.0], [58.0, 27.0]], 2.56),
        ([[-1.0, -5.0], [-49.0, -73.0]], 83.1),
        ([[9.0, 6.0], [-38.0, -122.0]], 56.4),
    ],
    ids=["the colder one", "the hotter one", "one that a search without a grid misses"],
)
def test_the_lower_of_two_minima(gaps, lower):
    """Before averaging the NLL of two members, of which one is many times as sure, has two minima."""
    logits = np.stack([gaps, np.zeros((2, 2))], -1)
    tau = fit_temperature(logits, [0, 1], protocol="before").temperature
    assert tau == pytest.approx(lower, rel=0.02)  # which of the two; how well, below
    values = [float(nll(logits, [0, 1], math.exp(-x), "before")) for x in np.linspace(-4.6, 4.6, 300)]
    minima = [i for i in range(1, 299) if values[i] < min(values[i - 1], values[i + 1])]
    assert len(minima) == 2
    assert nll(logits, [0, 1], 1 / tau, "before") <= min(values)


def test_impossible_classes_stay_impossible():
    """Two of three rows of probability 0.9 are right: they shall have 2/3, and 9^(1/τ) = 2."""
    with np.errstate(divide="ignore"):
        given = np.log([[0.9, 0.1, 0.0]] * 3)
    scaling = fit_temperature(given, [0, 0, 1])
    assert scaling.temperature == pytest.approx(math.log(9) / math.log(2), rel=1e-6)
    np.testing.assert_allclose(scaling(given[:1]).exp(), [[2 / 3, 1 / 3, 0.0]], rtol=1e-6)
    with pytest.raises(ValueError, match="the label of row 1 has probability zero under every member"):
        fit_temperature(given, [0, 2, 1])


def test_rows_that_teach_nothing():
    logits = 10.0 * np.eye(4)
    with pytest.warns(RuntimeWarning, match="still falls at temperature 0.01: sharper is always better"):
        assert fit_temperature(logits, np.arange(4)).temperature == pytest.approx(0.01)
    with pytest.warns(RuntimeWarning, match="still falls at temperature 100: a guess does better"):
        assert fit_temperature(logits, (np.arange(4) + 1) % 4).temperature == pytest.approx(100.0)


def test_applied_to_the_rows_that_it_was_fitted_on():
    logits, labels = ensemble(2, 40)
    scaling = fit_temperature(logits, labels)
    with pytest.warns(RuntimeWarning, match="rows on which the temperature was fitted"):
        scaling(torch.tensor(logits))
    scaling(logits[:, :39])
    again = pickle.loads(pickle.dumps(scaling))
    assert again == scaling
    with pytest.warns(RuntimeWarning, match="flatter it"):
        again(logits)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_calibrated_nll_scores_no_row_by_a_temperature_that_saw_it(protocol, monkeypatch):
    """Rows are told apart by their number, which stands in the last class: each is fitted without and scored once."""
    rows, fitted_on = 21, []
    fit, losses_of = module._best_temperature, module._losses

    def numbers(given):
        return np.round(1000 * np.exp(given[0, :, 2])).astype(int)

    def spy(given, y, how):
        fitted_on.append(numbers(given))
        assert how == protocol
        return fit(given, y, how)

    p = np.stack([np.full(rows, 0.5), 0.5 - np.arange(1, rows + 1) / 1000, np.arange(1, rows + 1) / 1000], -1)
    labels = np.arange(rows) % 2
    monkeypatch.setattr(module, "_best_temperature", spy)
    found = calibrated_nll(np.log(p), labels, protocol=protocol, folds=3, repeats=4)
    monkeypatch.undo()
    assert found.temperatures.shape == (4, 3) and len(fitted_on) == 12
    everyone, total = set(range(1, rows + 1)), np.zeros(rows)
    for repeat in range(4):
        held_out = [everyone - set(fitted_on[3 * repeat + fold]) for fold in range(3)]
        assert sorted(number for part in held_out for number in part) == sorted(everyone)
        for fold, part in enumerate(held_out):
            chosen = np.array(sorted(part)) - 1
            total[chosen] += losses_of(np.log(p)[None, chosen], labels[chosen], protocol)(
                1 / found.temperatures[repeat, fold]
            )
    assert found.score.value == pytest.approx(total.mean() / 4, rel=1e-12)
    assert found.score.error == pytest.approx((total / 4).std(ddof=1) / math.sqrt(rows), rel=1e-12)


@pytest.mark.filterwarnings("ignore:the NLL of the held-out rows still falls")
def test_calibrated_nll_is_that_of_labels_that_the_rows_cannot_tell():
    """Labels by coin tosses: the fit on the scored rows themselves would be below the truth, the held-out one above."""
    pyro.set_rng_seed(2)
    generator = np.random.default_rng(4)
    scored, flattering = [], []
    for _ in range(25):
        logits, labels = generator.normal(size=(12, 2)) * 3, generator.integers(0, 2, 12)
        scored.append(calibrated_nll(logits, labels, repeats=2, folds=4).score.value)
        tau = fit_temperature(logits, labels).temperature
        flattering.append(float(nll(logits[None], labels, 1 / tau, "after")))
    assert np.mean(flattering) < math.log(2) < np.mean(scored)


def test_the_splits_follow_the_seed():
    logits, labels = ensemble(2, 60)
    found = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        found.append(calibrated_nll(logits, labels).temperatures)
    np.testing.assert_array_equal(found[0], found[1])
    assert (found[0] != found[2]).all()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: fit_temperature(np.zeros(3), [0]), r"shape \(3,\); wanted is \(members, rows, classes\)"),
        (lambda: fit_temperature(np.zeros((3, 2)), [0, 1]), r"labels have shape \(2,\); wanted is \(3,\)"),
        (lambda: fit_temperature(np.zeros((2, 2)), [0, 1], protocol="during"), "protocol is 'during'; give 'after'"),
        (lambda: calibrated_nll(np.zeros((4, 2)), [0, 1] * 2, protocol="x"), "protocol is 'x'"),
        (lambda: fit_temperature([[math.inf, 0.0]], [0]), "hold plus infinity"),
        (lambda: fit_temperature([[-math.inf, -math.inf]], [0]), "minus infinity for all classes"),
        (lambda: fit_temperature([[0.3, 0.7]], [0]), "hold probabilities; give their logarithm, or logits"),
        (lambda: fit_temperature([[math.nan, 0.7]], [0]), "log_probabilities holds NaN"),
        (lambda: calibrated_nll(np.zeros((3, 2)), [0, 1, 0], folds=1), "folds is 1; give a whole number of at least 2"),
        (lambda: calibrated_nll(np.zeros((3, 2)), [0, 1, 0], repeats=0), "repeats is 0"),
        (lambda: calibrated_nll(np.zeros((3, 2)), [0, 1, 0], folds=4), "3 rows for 4 folds"),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        given()
