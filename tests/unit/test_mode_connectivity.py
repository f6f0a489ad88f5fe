"""Curves between modes: the best ones of a quadratic, gradients without bias, and copies of a net in another order."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import bnn
from bnn import Curve, Potential, align_hidden_units, connect_modes, curve_profile, hidden_units
from bnn.mode_connectivity import curve_gradient, random_times

float64 = torch.float64
HESSIAN = torch.tensor([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]], dtype=float64)
CENTER = torch.tensor([0.5, -1.0, 2.0], dtype=float64)
ENDS = torch.tensor([[1.0, 2.0, -1.0], [-2.0, 0.5, 3.0]], dtype=float64)


def quadratic(rows, size):
    """U = ½ (z − c)ᵀH(z − c) + Σ_i aᵢᵀz, of vectors aᵢ that add up to zero: minibatches have noise, all data none."""
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=float64), 1.0).to_event(1).mask(False))
    pyro.factor("well", -0.5 * (z - CENTER) @ HESSIAN @ (z - CENTER))
    with pyro.plate("rows", len(rows), subsample_size=size) as index:
        pyro.factor("noise", -rows[index] @ z)


@functools.cache
def bowl(size=10):
    rows = torch.randn(10, 3, dtype=float64, generator=torch.Generator().manual_seed(0))
    return Potential(quadratic, rows - rows.mean(0), size)


def best(kind, bends=1):
    """The points of the best curve, by the normal equations of ∫ w wᵀ dt, with 40 Gauss nodes for each piece."""
    curve = Curve(kind, torch.zeros(bends + 2, 3, dtype=float64), bowl())
    times, weights = quadrature(bends + 1 if kind == "polygon" else 1)
    w = curve.weights(times)
    gram = (w * weights[:, None]).T @ w
    ends = ENDS - CENTER
    inner = -torch.linalg.solve(gram[1:-1, 1:-1], gram[1:-1][:, [0, -1]] @ ends)
    return torch.cat([ENDS[:1], inner + CENTER, ENDS[1:]])


def quadrature(pieces):
    nodes, weights = (torch.tensor(a) for a in np.polynomial.legendre.leggauss(40))
    starts = torch.arange(pieces, dtype=float64)
    return ((starts[:, None] + (nodes + 1) / 2) / pieces).flatten(), (weights / 2 / pieces).repeat(pieces)


def test_the_best_curves_of_a_quadratic():
    """By hand: θ − c = −¾ (z₁ + z₂ − 2c) of a Bezier curve, −¼ of a polygon of one bend; whatever H."""
    total = ENDS.sum(0) - 2 * CENTER
    torch.testing.assert_close(best("bezier")[1] - CENTER, -0.75 * total)
    torch.testing.assert_close(best("polygon")[1] - CENTER, -0.25 * total)


@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("polygon", 1), ("polygon", 3)])
def test_the_gradient_vanishes_at_the_best_curve(kind, bends):
    """Integrated over all times to rounding; nowhere else; and it is the derivative of the mean energy."""
    times, weights = quadrature(bends + 1 if kind == "polygon" else 1)

    def mean_gradient(curve):
        return sum(float(w) * curve_gradient(curve, t[None]) for t, w in zip(times, weights, strict=True))

    assert mean_gradient(Curve(kind, best(kind, bends), bowl())).abs().max() < 1e-12
    points = best(kind, bends) + 0.1
    points[[0, -1]] = ENDS
    found = mean_gradient(Curve(kind, points, bowl()))
    inner = points[1:-1].clone().requires_grad_()
    whole = Curve(kind, torch.cat([ENDS[:1], inner, ENDS[1:]]), bowl())
    away = whole.position(times) - CENTER
    energy = (weights * 0.5 * ((away @ HESSIAN) * away).sum(-1)).sum()
    (expected,) = torch.autograd.grad(energy, inner)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", ["bezier", "polygon"])
def test_the_gradient_has_no_bias(kind):
    """Random times and minibatches at once: means of 6000 gradients against the integral, within 5 errors."""
    bends = 1 if kind == "bezier" else 2
    points = torch.cat([ENDS[:1], torch.ones(bends, 3, dtype=float64), ENDS[1:]])
    curve = Curve(kind, points, bowl(2))
    found = torch.stack([curve_gradient(curve, random_times(4, like=points)) for _ in range(6000)])
    whole, (times, weights) = Curve(kind, points, bowl()), quadrature(bends + 1 if kind == "polygon" else 1)
    expected = sum(float(w) * curve_gradient(whole, t[None]) for t, w in zip(times, weights, strict=True))
    off = (found.mean(0) - expected) / (found.std(0) / math.sqrt(len(found)))
    assert off.abs().max() < 5.0  # at most six numbers: a false alarm once in 3 · 10⁵


def test_times_lie_in_equal_parts():
    times = torch.stack([random_times(5, like=CENTER) for _ in range(2000)])
    assert (torch.floor(times * 5) == torch.arange(5)).all()
    inside = times * 5 - torch.arange(5)
    assert (inside.mean(0) - 0.5).abs().max() < 5.0 * math.sqrt(1 / 12 / 2000)


@pytest.mark.parametrize(("kind", "bends"), [("bezier", 1), ("polygon", 1), ("polygon", 2)])
def test_training_finds_the_best_curve(kind, bends):
    """Its mean energy comes within a hundredth of the straight line's excess over the best one."""
    curve = connect_modes(bowl(5), *ENDS, kind=kind, bends=bends, steps=800, learning_rate=0.1)
    torch.testing.assert_close(curve.points[[0, -1]], ENDS)
    times, weights = quadrature(12)

    def mean_energy(points, kind=kind):
        return float((weights * bowl().full_energy(Curve(kind, points, bowl()).position(times))).sum())

    lowest, line = mean_energy(best(kind, bends)), mean_energy(ENDS, "line")
    assert lowest - 1e-9 <= mean_energy(curve.points) < lowest + 0.01 * (line - lowest)


def test_curves_pass_through_their_points():
    points = torch.cat([ENDS[:1], torch.ones(2, 3, dtype=float64), ENDS[1:]])
    polygon = Curve("polygon", points, bowl())
    torch.testing.assert_close(polygon.position([0, 1 / 3, 2 / 3, 1]), points)
    torch.testing.assert_close(polygon.position(1 / 6)[0], 0.5 * (points[0] + points[1]))
    bezier = Curve("bezier", points[[0, 1, 3]], bowl())
    torch.testing.assert_close(bezier.position([0, 0.5, 1]), torch.stack([ENDS[0], (ENDS.sum(0) + 2) / 4, ENDS[1]]))
    line = connect_modes(bowl(), *ENDS, kind="line")
    torch.testing.assert_close(line.position([0, 0.25, 1])[1], 0.75 * ENDS[0] + 0.25 * ENDS[1])
    for curve in (polygon, bezier, line):
        torch.testing.assert_close(curve.weights(torch.rand(50, dtype=float64)).sum(-1), torch.ones(50, dtype=float64))
    assert curve.values([0.0, 0.5])["z"].shape == (2, 3)


# ---- hidden units


@functools.cache
def classes(hidden=(7, 5), bias=True):
    layers, width = [], 2
    for units in hidden:
        layers, width = [*layers, nn.Linear(width, units, bias=bias), nn.Tanh()], units
    net = nn.Sequential(*layers, nn.Linear(width, 3, bias=bias)).double()
    model = bnn.bayesian(net, likelihood=bnn.likelihoods.Categorical())
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 2, dtype=float64, generator=generator), torch.arange(40) % 3
    return Potential(model, x, y), x, y


def renumbered(values, units, seed=5):
    generator, result = torch.Generator().manual_seed(seed), dict(values)
    for group in units:
        order = torch.randperm(result[group[0][0]].shape[group[0][1]], generator=generator)
        for site, dim in group:
            result[site] = result[site].index_select(dim, order)
    return result


@pytest.mark.parametrize("hidden", [(30,), (7, 5), (20, 20, 20)])
@pytest.mark.parametrize("bias", [True, False])
def test_a_renumbered_copy_is_found_to_be_the_same(hidden, bias):
    """Bit for bit; between the copies lies a barrier, and after alignment none."""
    potential, *_ = classes(hidden, bias)
    z = torch.randn(potential.dim, dtype=float64)
    values = {name: value[0] for name, value in potential.constrain(z[None]).items()}
    copy = renumbered(values, hidden_units(potential.model.net))
    assert any((copy[name] != values[name]).any() for name in values)
    aligned = align_hidden_units(potential, values, copy)
    for name in values:
        assert torch.equal(aligned[name], values[name])
    before = curve_profile(connect_modes(potential, values, copy, kind="line"), num_points=5)
    after = curve_profile(connect_modes(potential, values, aligned, kind="line"), num_points=5)
    assert abs(before.rise.values[1:-1]).max() > 1.0
    np.testing.assert_allclose(after.rise, 0.0, atol=1e-9)
    np.testing.assert_allclose(after.energy, before.energy[0], rtol=1e-12)


def test_alignment_of_other_nets_is_the_best_of_one_hidden_layer():
    """Against all 120 permutations; the energy is that of the second net, and it lies nearer to the first."""
    from itertools import permutations

    potential, *_ = classes((5,))
    units = hidden_units(potential.model.net)
    first, second = torch.randn(2, potential.dim, dtype=float64)
    aligned = potential.unconstrain({k: v[None] for k, v in align_hidden_units(potential, first, second).items()})[0]
    distances = []
    values = {name: value[0] for name, value in potential.constrain(second[None]).items()}
    for order in permutations(range(5)):
        other = {**values, **{s: values[s].index_select(d, torch.tensor(order)) for s, d in units[0]}}
        distances.append(float((potential.unconstrain({k: v[None] for k, v in other.items()})[0] - first).norm()))
    assert float((aligned - first).norm()) == pytest.approx(min(distances), rel=1e-12)
    torch.testing.assert_close(potential.full_energy(aligned[None]), potential.full_energy(second[None]))


def test_units_by_hand():
    """A functional model whose weights stand (inputs, outputs)."""

    def model(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(1, 4, dtype=float64), 1.0).to_event(2))
        b = pyro.sample("b", dist.Normal(torch.zeros(4, dtype=float64), 1.0).to_event(1))
        v = pyro.sample("v", dist.Normal(torch.zeros(4, dtype=float64), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(torch.tanh(x @ w + b) @ v, 0.1), obs=y)

    potential = Potential(model, torch.randn(9, 1, dtype=float64), torch.randn(9, dtype=float64))
    units = [[("w", 1), ("b", 0), ("v", 0)]]
    values = {name: value[0] for name, value in potential.constrain(torch.randn(1, 12, dtype=float64)).items()}
    aligned = align_hidden_units(potential, values, renumbered(values, units), units=units)
    assert all(torch.equal(aligned[name], values[name]) for name in values)
    with pytest.raises(ValueError, match="renumbering the units changes the energy from .* units= does not name all"):
        align_hidden_units(potential, values, renumbered(values, units), units=[[("w", 1), ("b", 0)]])
    with pytest.raises(ValueError, match="not made by bnn.bayesian: give units="):
        align_hidden_units(potential, values, values)
    with pytest.raises(ValueError, match="units= name dimension 1 of site 'b'"):
        align_hidden_units(potential, values, values, units=[[("b", 1)]])
    with pytest.raises(ValueError, match="have different numbers of units"):
        align_hidden_units(potential, values, values, units=[[("b", 0), ("w", 0)]])


def test_nets_whose_units_are_not_known():
    with pytest.raises(ValueError, match=r"known of an nn.Sequential of nn.Linear and elementwise functions only"):
        hidden_units(nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2)))
    assert hidden_units(nn.Sequential(nn.Linear(2, 2))) == []


# ---- profiles


def test_a_profile_has_the_scores_of_each_net():
    """By the net itself at three points; the barrier is the largest rise above the line between the ends."""
    potential, x, y = classes()
    ends = torch.randn(2, potential.dim, dtype=float64)
    curve = connect_modes(potential, *ends, steps=20)
    profile = curve_profile(curve, x, targets=y, num_points=3)
    for i, values in enumerate(curve.position([0, 0.5, 1])):
        logits = torch.func.functional_call(potential.model.net, potential.constrain(values), (x,))
        assert profile.nll[i] == pytest.approx(float(nn.functional.cross_entropy(logits, y)))
        assert profile.accuracy[i] == pytest.approx(float((logits.argmax(-1) == y).double().mean()))
        assert profile.energy[i] == pytest.approx(float(potential.full_energy(values[None])))
    energy = profile.energy.values
    rise = energy - np.linspace(energy[0], energy[-1], 3)
    np.testing.assert_allclose(profile.rise, rise, atol=1e-9)
    assert profile.attrs["barrier"] == pytest.approx(max(rise.max(), 0.0), abs=1e-9)


def test_profiles_of_regression_and_of_two_classes():
    net = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x, y = torch.linspace(-1, 1, 12, dtype=float64)[:, None], torch.randn(12, 1, dtype=float64)
    for likelihood, targets in ((bnn.likelihoods.Gaussian(0.3), y), (bnn.likelihoods.Bernoulli(), (y > 0).double())):
        potential = Potential(bnn.bayesian(net, likelihood=likelihood), x, targets)
        curve = connect_modes(potential, *torch.randn(2, potential.dim, dtype=float64), kind="line")
        profile = curve_profile(curve, x, targets=targets, num_points=3)
        outputs = torch.func.functional_call(net, potential.constrain(curve.position(0.5)[0]), (x,))
        if "rmse" in profile:
            assert profile.rmse[1] == pytest.approx(float((outputs - targets).square().mean().sqrt()))
        else:
            loss = nn.functional.binary_cross_entropy_with_logits(outputs, targets)
            assert profile.nll[1] == pytest.approx(float(loss))
        with pytest.raises(ValueError, match=r"targets have shape \(3, 1\); wanted is \(12"):
            curve_profile(curve, x, targets=targets[:3])


def spike(x):
    pyro.factor("root", pyro.sample("z", dist.Normal(0.0, 1.0).expand([3]).to_event(1)).abs().sqrt().sum())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (lambda: connect_modes(bowl(), *ENDS, kind="spline"), "kind is 'spline'; give one of 'bezier', 'polygon'"),
        (lambda: connect_modes(bowl(), *ENDS, bends=2), "bends is 2, but a quadratic Bezier curve has one"),
        (lambda: connect_modes(bowl(), *ENDS, kind="polygon", bends=0), "bends is 0"),
        (lambda: connect_modes(bowl(), *ENDS, steps=0), "steps is 0"),
        (lambda: connect_modes(bowl(), *ENDS, points_per_step=0), "points_per_step is 0"),
        (lambda: connect_modes(bowl(), *ENDS, learning_rate=-1.0), "learning_rate is -1.0"),
        (lambda: connect_modes(bowl(), ENDS[0, :2], ENDS[1]), r"the position has shape \(2,\)"),
        (lambda: connect_modes(bowl(), ENDS[0] / 0, ENDS[1]), "the position holds numbers that are not finite"),
        (lambda: connect_modes(bowl(), *ENDS, kind="line").position(1.5), "the times of a curve run from 0 to 1"),
        (lambda: curve_profile(connect_modes(bowl(), *ENDS, kind="line"), num_points=2), "num_points is 2"),
        (lambda: curve_profile(connect_modes(bowl(), *ENDS, kind="line"), 3.0), "give both arguments of the model and"),
        (
            lambda: connect_modes(Potential(spike, 0), torch.zeros(3), torch.zeros(3)),
            "the gradient is not finite at step 0 of the curve: lower learning_rate",
        ),
    ],
)
def test_what_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        given()
