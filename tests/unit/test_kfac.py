"""K-FAC on AutoDelta is what dense linear algebra says: Newton steps, Kronecker blocks, inverses, quadratic models."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch.distributions import constraints

from bnn.guides import NaturalGradientDescent
from bnn.guides._kfac_blocks import PointSettings
from bnn.guides._kronecker import damped, eigh
from bnn.guides._point import Point
from bnn.guides._quadratic import minimizer
from bnn.guides.block_tridiagonal import BlockTridiagonal, Moments
from bnn.guides.kfac import ADAPT_EVERY, DECAY, adapted
from support.nets import labels, numbers
from support.point_estimates import (
    REAL,
    Net,
    Objective,
    Turned,
    flat_of,
    gauss_newton,
    gradient,
    guide_at,
    matrix,
    step_of,
)
from support.regression import Regression, kron


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


# ---- exact steps


@pytest.mark.parametrize(("spelling", "noise"), [("linear", "correlated"), ("transposed", "equal"), ("conv", "equal")])
def test_one_step_is_newtons(spelling, noise):
    problem = Regression("flat", spelling=spelling, noise=noise)
    flat = {
        "weight": dist.ImproperUniform(constraints.independent(REAL, len(problem.shape)), (), problem.shape),
        "bias": dist.ImproperUniform(constraints.independent(REAL, 1), (), (problem.outputs,)),
    }

    def model(x, y):
        class Flat(pyro.poutine.messenger.Messenger):
            def _pyro_sample(self, msg):
                msg["fn"] = flat.get(msg["name"], msg["fn"])

        with Flat():
            problem(x, y)

    start = {"weight": numbers(*problem.shape), "bias": numbers(problem.outputs)}
    guide = guide_at(model, start)
    SVI(model, guide, NaturalGradientDescent(1.0), Objective()).step(*problem.args)
    wanted = torch.linalg.lstsq(problem.design, problem.args[1]).solution.T
    weight = guide.weight.detach()
    weight = weight.T if spelling == "transposed" else weight.reshape(problem.outputs, -1)
    found = torch.cat([guide.bias.detach()[:, None], weight], 1)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)


def test_one_step_is_the_map_where_damping_is_exact():
    problem = Regression("one-input-matrix", outputs=1, bias=False)  # whitened inputs, so that A is the unit matrix
    x, y = problem.args
    x = torch.linalg.qr(x)[0] * math.sqrt(len(x))

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 4), 0.8).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight.T, 0.5).to_event(1), obs=y)

    # A = I and S a number: (1 + π√γ)(s + √γ/π) = (√s + √γ)², which is not s + γ, so the rate makes up for it
    update, _ = step_of(model, {"weight": torch.zeros(1, 4)}, (x, y))
    s, gamma = len(x) / 0.25, 0.8**-2
    wanted = torch.linalg.solve(x.T @ x / 0.25 + gamma * torch.eye(4), (x.T @ y / 0.25)).T
    ratio = (s + gamma) / (math.sqrt(s) + math.sqrt(gamma)) ** 2
    torch.testing.assert_close(update["weight"], wanted * ratio, rtol=1e-10, atol=0)


def test_blocks_of_a_deep_linear_net_are_exact():
    net = Net((4, 3, 3, 2), activation=lambda x: x)
    x, y = numbers(9, 4), numbers(9, 2)
    values = net.start()
    exact, sizes = gauss_newton(net, values, x)
    point = Point(net, (x, y), {}, PointSettings("ggn"))
    found = point.estimate(values, point.minibatch((x, y), {}), True, True)
    start = 0
    for number, size in enumerate(sizes):
        block = kron(found["output_moment", number], found["input_moment", number])
        torch.testing.assert_close(block, exact[start : start + size, start : start + size])
        start += size


def test_empirical_fisher_of_one_datum_is_exact():
    net = Net((4, 3, 2), classes=True)
    x, y = numbers(1, 4), labels(1, 2)
    values = net.start()
    flat = {name: value.clone().requires_grad_() for name, value in values.items()}
    likelihood = -F.cross_entropy(net.flat_net(flat, x), y, reduction="sum")
    grads = dict(zip(flat, torch.autograd.grad(likelihood, list(flat.values())), strict=True))
    point = Point(net, (x, y), {}, PointSettings("empirical"))
    found = point.estimate(values, point.minibatch((x, y), {}), True, True)
    for number in range(2):
        g = matrix(grads, number).flatten()
        block = kron(found["output_moment", number], found["input_moment", number])
        torch.testing.assert_close(block, torch.outer(g, g))


WIDE = Net((20, 15, 12), scale=0.6, classes=True)  # with four data its gradients are thin
CASES = {
    "fat": (Net((4, 3, 2), scale=0.6, classes=True), 9),
    "thin": (WIDE, 4),
    "thin-without-bias": (Net((20, 15, 12), scale=0.6, classes=True, bias=False), 4),
    "regression": (Net((5, 3, 2), scale=2.0), 11),
}


@pytest.mark.parametrize(
    ("case", "damping", "kl_weight"),
    [("fat", 0.0, 1.0), ("thin", 2.5, 0.3), ("thin-without-bias", 0.0, 1.0), ("regression", 2.5, 0.3)],
)
def test_the_step_solves_with_the_damped_kronecker_products(case, damping, kl_weight):
    net, rows = CASES[case]
    x = numbers(rows, net.sizes[0])
    y = labels(rows, net.sizes[-1]) if net.classes else numbers(rows, net.sizes[-1])
    values = net.start()
    curvature = "empirical" if net.classes else "ggn"
    update, objective = step_of(net, values, (x, y), curvature=curvature, damping=damping, kl_weight=kl_weight)
    (point,) = objective.estimate._points.values()
    assert bool(point.sites.thin) == case.startswith("thin")
    found = point.estimate(values, point.minibatch((x, y), {}), True, True)
    grads = gradient(net, values, (x, y))
    prior = {name: value / net.scale**2 for name, value in values.items()}
    for number in range(len(net.sizes) - 1):
        a, s = found["input_moment", number], found["output_moment", number]
        gamma = kl_weight * net.scale**-2 + damping
        pi = math.sqrt(float((a.trace() / len(a)) / (s.trace() / len(s))))
        a, s = a + pi * math.sqrt(gamma) * torch.eye(len(a)), s + math.sqrt(gamma) / pi * torch.eye(len(s))
        g = matrix(grads, number) + (kl_weight - 1) * matrix(prior, number)
        wanted = torch.linalg.solve(kron(s, a), -g.flatten())
        torch.testing.assert_close(matrix(update, number).flatten(), wanted, rtol=1e-9, atol=1e-11)


def test_moments_are_those_of_a_backward_pass():
    net, rows = CASES["fat"]
    x, y = numbers(rows, 4), labels(rows, 2)
    values = net.start()
    point = Point(net, (x, y), {}, PointSettings("ggn"))
    found = point.estimate(values, point.minibatch((x, y), {}), True, True)
    hidden = torch.tanh(F.linear(x, values["w0"], values["b0"]))
    p = F.linear(hidden, values["w1"], values["b1"]).softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    ones = torch.ones(rows, 1)
    for number, a in enumerate((torch.cat([ones, x], 1), torch.cat([ones, hidden], 1))):
        torch.testing.assert_close(found["input_moment", number], a.T @ a / rows)
    torch.testing.assert_close(found["output_moment", 1], h.sum(0))
    back = torch.einsum("nh,oh->nho", 1 - hidden**2, values["w1"])
    torch.testing.assert_close(found["output_moment", 0], torch.einsum("nho,nop,nkp->hk", back, h, back))


def test_running_means_are_bias_corrected():
    net = Net((4, 3, 2), classes=True)
    batches = [(numbers(9, 4, seed=s), labels(9, 2)) for s in (3, 4, 5)]
    values, rate = net.start(), 0.2
    guide, objective = guide_at(net, values), Objective(curvature_rate=rate)
    for batch in batches:
        objective.loss_and_grads(net, guide, *batch)
    moments = [torch.cat([torch.ones(9, 1), x], 1) for x, _ in batches]
    weights = [rate * (1 - rate) ** k for k in (2, 1, 0)]
    wanted = sum(w * a.T @ a / 9 for w, a in zip(weights, moments, strict=True)) / sum(weights)
    torch.testing.assert_close(objective.estimate._means["input_moment", 0], wanted)


# ---- invariance


def test_the_undamped_step_does_not_depend_on_the_coordinates_of_activations():
    x, y = numbers(40, 3), numbers(40, 2, seed=9)
    inputs, before, after = (torch.eye(3) + 0.4 * numbers(3, 3, seed=seed) for seed in (11, 13, 14))
    plain, turned = Net((3, 3, 2), scale=None), Turned((3, 3, 2), scale=None, turns=(before, after))
    values, x_turned = plain.start(), x @ inputs + 0.5
    w0 = torch.linalg.solve(before.T, values["w0"]) @ torch.linalg.inv(inputs).T
    w1 = values["w1"] @ torch.linalg.inv(after).T
    b0, b1 = torch.linalg.solve(before.T, values["b0"]) - 0.5 * w0.sum(1), values["b1"] - w1.sum(1)
    start = {"w0": w0, "b0": b0, "w1": w1, "b1": b1}
    torch.testing.assert_close(turned.flat_net(start, x_turned), plain.flat_net(values, x))
    first, _ = step_of(plain, values, (x, y))
    second, _ = step_of(turned, start, (x_turned, y))
    moved = plain.flat_net({n: v + first[n] for n, v in values.items()}, x)
    moved_turned = turned.flat_net({n: v + second[n] for n, v in start.items()}, x_turned)
    assert (moved - plain.flat_net(values, x)).abs().max() > 0.1
    torch.testing.assert_close(moved_turned, moved, rtol=1e-7, atol=1e-8)


# ---- the block-tridiagonal inverse


def chain_of(points=30, inputs=(4, 3, 3), outputs=(3, 2, 3)):
    """Moments of three layers whose data hang together, and dampings."""
    a = numbers(points, sum(inputs), seed=21) @ (torch.eye(sum(inputs)) + 0.3 * numbers(sum(inputs), sum(inputs)))
    g = numbers(points, sum(outputs), seed=22) @ (torch.eye(sum(outputs)) + 0.3 * numbers(sum(outputs), sum(outputs)))
    parts_a, parts_g = a.split(inputs, 1), g.split(outputs, 1)
    return (
        Moments([p.T @ p / points for p in parts_a], [p.T @ q / points for p, q in itertools.pairwise(parts_a)]),
        Moments([p.T @ p for p in parts_g], [p.T @ q for p, q in itertools.pairwise(parts_g)]),
        [0.5, 2.0, 1.0],
    )


def dense_inverse(chain, inputs, outputs):
    sizes = [len(a) * len(s) for a, s in zip(inputs.own, outputs.own, strict=True)]
    columns = []
    for column in torch.eye(sum(sizes)):
        parts = [
            part.reshape(len(s), len(a))
            for part, a, s in zip(column.split(sizes), inputs.own, outputs.own, strict=True)
        ]
        columns.append(torch.cat([p.reshape(-1) for p in chain(parts)]))
    return torch.stack(columns, 1), sizes


@pytest.mark.parametrize("dampings", [None, [0.0, 0.0, 0.0]])
def test_block_tridiagonal_inverse_is_that_of_the_matrix_it_defines(dampings):
    inputs, outputs, own = chain_of()
    dampings = dampings or own
    chain = BlockTridiagonal.of(inputs, outputs, dampings)
    inverse, sizes = dense_inverse(chain, inputs, outputs)
    matrix = torch.linalg.inv(inverse)
    torch.testing.assert_close(inverse, inverse.T, rtol=0, atol=1e-10 * float(inverse.abs().max()))
    blocks = [row.split(sizes, 1) for row in matrix.split(sizes)]
    for i in range(3):
        a, s = damped(inputs.own[i], outputs.own[i], dampings[i])
        torch.testing.assert_close(blocks[i][i], kron(s, a), rtol=1e-8, atol=1e-8)
        if i < 2:
            torch.testing.assert_close(blocks[i][i + 1], kron(outputs.cross[i], inputs.cross[i]), rtol=1e-8, atol=1e-8)
    far = inverse.split(sizes)[0].split(sizes, 1)[2]
    assert far.abs().max() < 1e-12 * inverse.abs().max() and blocks[0][2].abs().max() > 1e-3
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_block_tridiagonal_step_of_a_net():
    net = Net((4, 3, 3, 2), scale=0.7, classes=True)
    x, y = numbers(12, 4), labels(12, 2)
    values = net.start()
    update, objective = step_of(net, values, (x, y), block_tridiagonal=True, damping=1.5)
    (point,) = objective.estimate._points.values()
    assert point.sites.chains == [[0, 1, 2]]
    found = point.estimate(values, point.minibatch((x, y), {}), True, True)
    exact, sizes = gauss_newton(net, values, x)
    hidden = [x]
    for i in range(2):
        hidden.append(torch.tanh(F.linear(hidden[-1], values[f"w{i}"], values[f"b{i}"])))
    bars = [torch.cat([torch.ones(12, 1), h], 1) for h in hidden]
    for i in range(2):
        torch.testing.assert_close(found["input_cross", i], bars[i].T @ bars[i + 1] / 12)
    # the last layer's cross moment of output gradients, from p(1 − p) and the derivative of tanh
    p = F.linear(hidden[2], values["w2"], values["b2"]).softmax(-1)
    h = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    back = torch.einsum("nh,oh->nho", 1 - hidden[2] ** 2, values["w2"])
    torch.testing.assert_close(found["output_cross", 1], torch.einsum("nho,nop->hp", back, h))
    moments = [
        Moments([found[f"{k}_moment", i] for i in range(3)], [found[f"{k}_cross", i] for i in range(2)])
        for k in ("input", "output")
    ]
    inverse, _ = dense_inverse(BlockTridiagonal.of(*moments, [net.scale**-2 + 1.5] * 3), *moments)
    wanted = -inverse @ flat_of(gradient(net, values, (x, y)), net)
    torch.testing.assert_close(flat_of(update, net), wanted, rtol=1e-9, atol=1e-11)


# ---- the quadratic model


def test_rescaled_steps_minimise_the_quadratic_model():
    net = Net((4, 3, 2), scale=0.7, classes=True)
    x, y = numbers(12, 4), labels(12, 2)
    guide, damping, rate = guide_at(net, net.start()), 0.8, 1.0  # so that statistics are each step's own
    objective = Objective(rescale=True, momentum=True, damping=damping, curvature_rate=rate)
    svi, values, previous = SVI(net, guide, NaturalGradientDescent(1.0), objective), net.start(), None
    plain, point = Objective(damping=damping, curvature_rate=rate), guide_at(net, values)
    plain.loss_and_grads(net, point, x, y)
    for _ in range(3):
        leaves = plain.estimate._leaves.leaves
        for name, value in values.items():
            leaves[name].data.copy_(value)
        plain.loss_and_grads(net, point, x, y)
        direction = flat_of({name: -leaf.grad for name, leaf in leaves.items()}, net)
        g = flat_of(gradient(net, values, (x, y)), net)
        curvature = gauss_newton(net, values, x)[0] + (net.scale**-2 + damping) * torch.eye(len(g))
        basis = torch.stack([direction] + ([previous] if previous is not None else []), 1)
        wanted = basis @ torch.linalg.solve(basis.T @ curvature @ basis, -basis.T @ g)
        svi.step(x, y)
        after = {name: leaf.detach().clone() for name, leaf in objective.estimate._leaves.leaves.items()}
        previous = flat_of(after, net) - flat_of(values, net)
        torch.testing.assert_close(previous, wanted, rtol=1e-7, atol=1e-10)
        values = after


def test_minimizer_of_parallel_directions_takes_one():
    slopes, curvature = torch.tensor([-2.0, -4.0]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    assert minimizer(slopes, curvature) == [2.0, 0.0]
    assert minimizer(slopes[:1], torch.zeros(1, 1)) == [1.0]


def test_damping_follows_the_rule():
    ratios = [1.0, 0.9, 0.5, 0.1, -3.0, math.nan, 0.75, 0.25, 2.0]
    powers = [1, 2, 2, 1, 0, -1, -1, -1, 0]
    damping = 3.0
    for ratio, power in zip(ratios, powers, strict=True):
        damping = adapted(damping, ratio)
        assert damping == pytest.approx(3.0 * DECAY**power)
    assert pytest.approx(0.95**5) == DECAY


def test_adaptive_damping_compares_the_loss_with_the_model(monkeypatch):
    problem = Regression("one")  # quadratic, with an exact F: the ratio is 1 but for the damping in the model
    guide, objective = AutoDelta(problem), Objective(damping=1.0, adaptive_damping=True)
    svi = SVI(problem, guide, NaturalGradientDescent(0.1), objective)
    for _ in range(ADAPT_EVERY):
        svi.step(*problem.args)
    estimate = objective.estimate
    point, batch, before, loss = estimate._last
    assert loss == pytest.approx(Trace_ELBO().loss(problem, guide_at(problem, before), *problem.args))
    assert estimate.damping == 1.0
    moved = {n: guide_leaf.detach() - before[n] for n, guide_leaf in estimate._leaves.leaves.items()}
    slopes, curvature = point.quadratic(before, batch, [moved])
    change = Trace_ELBO().loss(problem, guide, *problem.args) - loss
    assert change == pytest.approx(float(slopes[0] + 0.5 * curvature[0, 0]), rel=1e-8)
    svi.step(*problem.args)
    assert estimate.damping == DECAY and estimate._last is None
    monkeypatch.setattr(Point, "value", lambda *_: math.inf)
    for _ in range(ADAPT_EVERY):
        svi.step(*problem.args)
    assert estimate.damping == 1.0


@pytest.mark.parametrize("returns", ["nothing", "nan"])
def test_eigenvectors_where_single_precision_gives_up(returns, monkeypatch):
    """LAPACK did so on finite second moments of 32 data and 2,789 units, and not in double precision."""
    whole = torch.linalg.eigh

    def gives_up(matrix):
        if matrix.dtype == torch.float64:
            return whole(matrix)
        if returns == "nan":
            return torch.full((len(matrix),), torch.nan), torch.full_like(matrix, torch.nan)
        raise torch.linalg.LinAlgError("the algorithm failed to converge")

    monkeypatch.setattr(torch.linalg, "eigh", gives_up)
    few = torch.randn(3, 5, dtype=torch.float32)
    values, vectors = eigh(few.mT @ few)
    assert values.dtype == vectors.dtype == torch.float32
    torch.testing.assert_close((vectors * values) @ vectors.mT, few.mT @ few)
    with pytest.raises(RuntimeError, match=r"shape \(2, 2\) has no eigenvectors"):
        eigh(torch.full((2, 2), torch.nan, dtype=torch.float64))
