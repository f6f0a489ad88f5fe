"""Control variates: unbiased, without noise at the anchor, the exact laws that follow, anchors renewed on time."""

from dataclasses import replace
from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn import Potential, full_data
from bnn.kernels import SGHMC, SGLD, SVRG, ControlVariate, PolynomialDecay
from bnn.kernels._run import UNROLLED_STEPS
from bnn.kernels.variance_reduction import Anchor, reduced
from support import laws, targets
from support.cases import LAWS
from support.checks import assert_covariance, assert_mean
from support.laws import Setting

float64 = torch.float64
DATA = targets.regression_data(float64)
MODE = {"weight": torch.tensor([1.0, -1.0, 0.5]), "a_scale": torch.tensor(0.3)}
N = 131_072


def every_batch(size: int, batch_size: int) -> torch.Tensor:
    """All minibatches drawn with replacement, each as likely as the others."""
    return torch.tensor(list(product(range(size), repeat=batch_size)))


# ---- the gradient


def small_regression(x, y):
    """`targets.regression` on minibatches of two, with a prior that is not Gaussian."""
    weight = pyro.sample("weight", dist.StudentT(3.0, torch.zeros(x.shape[1], dtype=x.dtype), 1.0).to_event(1))
    scale = pyro.sample("a_scale", dist.LogNormal(torch.zeros((), dtype=x.dtype), 0.5))
    with pyro.plate("rows", len(x), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(x[index] @ weight, scale), obs=y[index])


@pytest.mark.parametrize("compile", ["fx", "handlers"])
def test_the_mean_over_all_minibatches_is_the_full_gradient(compile):
    """Of energy and gradient, the prior's part included, to rounding; and they agree with Pyro's on all data."""
    data = tuple(t[:5] for t in DATA)
    potential = Potential(small_regression, *data, compile=compile)
    whole = Potential(targets.full_regression, *data)  # another prior, but the same data
    position, place = (torch.tensor([[0.3, -0.2, 0.9, -0.5]], dtype=float64), torch.full((1, 4), 0.4, dtype=float64))
    anchor = Anchor(place, *potential.full_energy_and_grad(place))
    batches = every_batch(5, 2)
    energies, grads = [], []
    for rows in batches:
        energy, grad = reduced(lambda z, rows=rows: potential.traced_energy_and_grad(z, [rows[None]]), anchor)(position)
        energies.append(energy)
        grads.append(grad)
    energy, grad = potential.full_energy_and_grad(position)
    torch.testing.assert_close(torch.stack(energies).mean(0), energy, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(torch.stack(grads).mean(0), grad, rtol=1e-12, atol=1e-11)
    assert torch.stack(grads).std(0).min() > 1.0
    z = position[0].clone().requires_grad_()
    normal, student = (prior.log_prob(z[:3]).sum() for prior in (dist.Normal(0.0, 1.0), dist.StudentT(3.0, 0.0, 1.0)))
    (change,) = torch.autograd.grad(normal - student, z)
    torch.testing.assert_close(grad, whole.energy_and_grad(position)[1] + change, rtol=1e-10, atol=1e-10)


def test_there_is_no_noise_at_the_anchor_and_the_prior_never_adds_any():
    potential = Potential(small_regression, *(t[:5] for t in DATA))
    place = torch.full((25, 4), 0.4, dtype=float64)
    anchor = Anchor(place, *potential.full_energy_and_grad(place))
    batches = [every_batch(5, 2)]

    def evaluate(position):
        return reduced(lambda z: potential.traced_energy_and_grad(z, batches), anchor)(position)

    energy, grad = evaluate(place)
    torch.testing.assert_close(energy, anchor.energy, rtol=1e-13, atol=1e-12)
    torch.testing.assert_close(grad, anchor.grad, rtol=1e-13, atol=1e-12)
    # Off the anchor the noise is the likelihood's alone, and of the order of the distance.
    near, far = (evaluate(place + shift)[1].std(0) for shift in (1e-4, 2e-4))
    torch.testing.assert_close(far, 2 * near, rtol=1e-2, atol=0)


@pytest.mark.parametrize("compile", ["fx", "handlers"])
def test_the_full_gradient_is_that_of_the_full_energy(compile):
    potential = Potential(small_regression, *(t[:5] for t in DATA), compile=compile)  # the last chunk is filled up
    position = torch.tensor([[0.3, -0.2, 0.9, -0.5], [0.1, 0.7, -0.4, 0.2]], dtype=float64)
    energy, grad = potential.full_energy_and_grad(position)
    torch.testing.assert_close(energy, potential.full_energy(position), rtol=1e-12, atol=0)
    for i, step in enumerate(1e-5 * torch.eye(4, dtype=float64)):
        slope = (potential.full_energy(position + step) - potential.full_energy(position - step)) / 2e-5
        torch.testing.assert_close(grad[:, i], slope, rtol=1e-6, atol=1e-6)
    one = potential.full_energy_and_grad(position[:1])
    torch.testing.assert_close(one, (energy[:1], grad[:1]), rtol=1e-12, atol=1e-12)


def test_the_full_gradient_of_a_loader():
    model = targets.regression
    rows = torch.arange(32).split(8)
    batches = [tuple(t[index] for t in DATA) for index in rows]

    def of_batch(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        scale = pyro.sample("a_scale", dist.LogNormal(torch.zeros((), dtype=x.dtype), 0.5))
        with pyro.plate("rows", 32, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)

    position = torch.tensor([[0.3, -0.2, 0.9, -0.5]], dtype=float64)
    given = Potential(of_batch, batches=batches).full_energy_and_grad(position)
    torch.testing.assert_close(given, Potential(model, *DATA).full_energy_and_grad(position), rtol=1e-12, atol=1e-12)


# ---- laws


def setting_of(law) -> Setting:
    omega = 2.0
    s = Setting(4.0, 0.5 / (4.0 if law.momentum_variance is None else omega), 0.7, friction=1.5 * omega)
    return replace(s, noise=20 * s.friction / s.step_size)  # would heat to more than ten times the temperature


def noisy_chains(law, s, steps, reduction, **options):
    kernel = law.kernel(
        targets.noisy_gaussian, compile="fx", replacement=True, variance_reduction=reduction, steps_per_sample=steps,
        **law.settings(s), **options,
    )  # fmt: skip
    kernel.num_chains, kernel.initial_params = N, {"z": torch.zeros(N, dtype=float64)}
    with targets.starts_unchecked():
        kernel.setup(0, targets.rows_for(s.noise, s.curvature), s.curvature)
    kernel.advance()
    return kernel


FIXED, MOVED = ControlVariate({"z": torch.tensor(0.7)}), SVRG(every=4)
REDUCED = list(zip(LAWS, [MOVED, FIXED, MOVED, MOVED, FIXED], strict=True)) + [(LAWS[0], FIXED)]


@pytest.mark.parametrize(("law", "reduction"), REDUCED, ids=lambda one: getattr(one, "name", type(one).__name__))
def test_where_the_curvature_is_the_same_in_all_rows_the_law_is_that_without_noise(law, reduction):
    """Rows y with likelihood N(y; z, s²): the finite-step law from z = 0, exactly, though minibatches are noisy."""
    s = setting_of(law)
    quiet = replace(s, noise=0.0)
    covariance = laws.start(quiet)
    for _ in range(10):
        covariance = laws.propagate(covariance, law.step(quiet))
    kernel = noisy_chains(law, s, 10, reduction)
    state = kernel._running.state
    sample = np.stack([t.flatten().numpy() for t in state[:2] if t.numel()], 1)
    names = ["position", "momentum"][: sample.shape[1]]
    assert_covariance(names, sample, covariance[: len(names), : len(names)])
    run, place = kernel._running, torch.linspace(-1, 1, N, dtype=float64).unsqueeze(-1)
    (inputs,) = run.stream.next(1)  # nor does the energy have noise
    exact = kernel.potential.full_energy(place)
    torch.testing.assert_close(run._energy_and_grad(place, inputs, (), run._anchor)[0], exact, rtol=1e-9, atol=1e-9)


def linear(x, y):
    """Regression through the origin on minibatches of one row, curvatures of rows far apart."""
    slope = pyro.sample("slope", dist.Normal(torch.zeros((), dtype=x.dtype), 1.0))
    with pyro.plate("rows", len(x), subsample_size=1) as index:
        pyro.sample("y", dist.Normal(x[index] * slope, 1.0), obs=y[index])


X, Y = torch.tensor([0.2, 1.0, 1.8], dtype=float64), torch.tensor([3.0, -1.0, 2.0], dtype=float64)


def second_moments(h: float, steps: int, anchor: float | None) -> tuple[float, float]:
    """Mean and variance of SGLD on `linear` from 0 after ``steps``: z ← (1 − hĤ) z + hĉ + √(2h) ξ, rows equally likely.

    With an anchor a the gradient is Ĥ (z − a) + ∇U(a), so that ĉ = Ĥ a − ∇U(a).
    """
    curvature = 1.0 + 3.0 * X.numpy() ** 2
    pull = 3.0 * (X * Y).numpy()
    if anchor is not None:
        pull = curvature * anchor - (curvature.mean() * anchor - pull.mean())
    mean, square = 0.0, 0.0
    for _ in range(steps):
        factor = 1 - h * curvature
        square = np.mean(factor**2 * square + 2 * factor * h * pull * mean + h**2 * pull**2) + 2 * h
        mean = np.mean(factor * mean + h * pull)
    return mean, square - mean**2


def test_sgld_on_a_linear_regression():
    """The exact mean and variance with noise that depends on the position, with and without control variates.

    The draws are not quite Gaussian: moments are tested by their own spread.
    """
    h, steps, anchor = 0.08, 15, 0.5
    found = {}
    for given, reduction in ((None, None), (anchor, ControlVariate({"slope": torch.tensor(anchor)}))):
        mean, variance = second_moments(h, steps, given)
        kernel = SGLD(
            linear, step_size=h, compile="fx", replacement=True, variance_reduction=reduction, steps_per_sample=steps
        )
        kernel.num_chains, kernel.initial_params = N, {"slope": torch.zeros(N, dtype=float64)}
        with targets.starts_unchecked():
            kernel.setup(0, X, Y)
        kernel.advance()
        z = kernel.position.flatten().numpy()
        assert_mean("slope", z, mean, variance)
        assert_mean("square", (z - mean) ** 2, variance, float(((z - mean) ** 2).var()))
        found[given] = variance
    posterior = 1 / (1 + float((X**2).sum()))
    assert found[None] > 2.0 * posterior
    assert abs(found[anchor] - posterior) < 0.5 * abs(found[None] - posterior)


# ---- anchors are renewed on time


def by_hand(start, draws, every, step_size, potential):
    """SGLD with control variates, step by step, on given pairs of minibatch and noise."""
    z = start
    for step, (batch, noise) in enumerate(draws):
        if step % every == 0:
            anchor, full = z, potential.full_energy_and_grad(z)[1]
        there = potential.traced_energy_and_grad(anchor, batch)[1]
        grad = potential.traced_energy_and_grad(z, batch)[1] + (full - there)
        h = step_size.value_at(step)
        z = z + grad * -h + noise * np.sqrt(2 * h)
    return z


@pytest.mark.parametrize(("compile", "every"), [("handlers", 3), ("handlers", 1), ("fx", 5), ("fx", None)])
def test_svrg_is_the_loop_by_hand(compile, every):
    """Two chains over steps that do not divide by ``every``: with Pyro's handlers bit for bit."""
    step_size = PolynomialDecay(1e-3, delay=5.0, power=0.5)
    kernel = SGLD(
        targets.regression, step_size=step_size, compile=compile, variance_reduction=SVRG(every), steps_per_sample=7
    )

    kernel.num_chains = 2
    kernel.initial_params = {"weight": torch.randn(2, 3, dtype=float64), "a_scale": torch.zeros(2, dtype=float64)}
    kernel.setup(0, *DATA)
    run, start, draws = kernel._running, kernel.position, []
    next_batches = run.stream.next
    run.stream.next = lambda steps: draws.append([next_batches(steps)[0]]) or draws[-1]
    draw = run.noise.draw
    run.noise.draw = lambda shapes: (noise := draw(shapes), draws[-1].append(noise[0].clone()))[0]
    for _ in range(2):
        kernel.advance()
    found, expected = kernel.position, by_hand(start, draws, every or 4, step_size, kernel.potential)
    assert len(draws) == 14
    if compile == "handlers":
        assert torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    assert (found - start).abs().min() > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 4, 10, 15])
def test_several_steps_in_one_program_stop_at_a_new_anchor(every):
    """At T = 0 with a minibatch of its own for each step: the path of single steps; plain gradients first."""
    positions = {}
    for tier in ("fx", "inductor"):
        pyro.set_rng_seed(4)
        kernel = SGHMC(
            targets.regression, step_size=5e-3, friction=5.0, temperature=0.0, compile=tier,
            steps_per_sample=UNROLLED_STEPS + 2, variance_reduction=SVRG(every) if every else None,
        )  # fmt: skip
        kernel.num_chains = 2
        kernel.initial_params = {"weight": torch.ones(2, 3), "a_scale": torch.zeros(2)}
        kernel.setup(0, *DATA)
        pyro.set_rng_seed(5)
        for _ in range(2):  # 24 steps: the minibatches were drawn in advance, before any noise
            kernel.advance()
        assert kernel._running.unrolled == (
            UNROLLED_STEPS if tier == "inductor" and (every or 10) >= UNROLLED_STEPS else 0
        )
        assert kernel.steps_done == 2 * (UNROLLED_STEPS + 2)
        positions[tier] = kernel.position
    torch.testing.assert_close(positions["inductor"], positions["fx"], rtol=1e-9, atol=1e-12)


def test_program_of_several_steps_is_used_only_between_anchors(monkeypatch):
    """Which steps are taken together, without compiling anything."""
    kernel = SGLD(
        targets.regression, step_size=1e-4, compile="handlers", variance_reduction=SVRG(15), steps_per_sample=30
    )
    kernel.setup(0, *DATA)
    run, calls, moves = kernel._running, [], []
    run.unrolled = UNROLLED_STEPS
    call, move = run.call, run.anchoring._move
    monkeypatch.setattr(
        run, "call", lambda steps, observed=True: calls.append((run.step, steps)) or call(steps, observed)
    )
    monkeypatch.setattr(run.anchoring, "_move", lambda place, step: moves.append(step) or move(place, step))
    for _ in range(2):
        kernel.advance()
    together = [step for step, steps in calls if steps > 1]
    assert together == [0, 15, 30, 45]  # not at 10, which would run over an anchor
    assert sum(steps for _, steps in calls) == 60
    assert moves == [15, 30, 45]


def test_a_start_from_outside_is_a_new_anchor():
    kernel = SGLD(targets.regression, step_size=1e-4, compile="fx", variance_reduction=SVRG(100))
    kernel.setup(0, *DATA)
    far = {"weight": torch.tensor([5.0, 6.0, 7.0], dtype=float64), "a_scale": torch.tensor(2.0, dtype=float64)}
    kernel.sample(far)
    assert kernel._running.anchoring.anchor.position.tolist() == [[5.0, 6.0, 7.0, 2.0]]


@pytest.mark.parametrize("reduction", [ControlVariate(MODE), SVRG(7)], ids=["fixed", "svrg"])
def test_in_the_coordinates_of_a_learnt_metric(reduction):
    """The anchor is a place of the model's, whatever coordinates warm-up has the chains move in: no noise there."""
    pyro.set_rng_seed(0)
    kernel = SGLD(
        targets.regression, step_size=1e-3, preconditioner="dense", compile="handlers", variance_reduction=reduction
    )
    kernel.num_chains = 2
    kernel.setup(40, *DATA)
    for _ in range(44):
        kernel.advance()
    run = kernel._running
    tensors, anchor = run.metric.tensors, run.anchoring.anchor
    assert tensors
    if isinstance(reduction, ControlVariate):
        torch.testing.assert_close(kernel.potential.constrain(anchor.position)["weight"][1], MODE["weight"].double())
    (inputs,) = run.stream.next(1)
    energy, grad = run._energy_and_grad(run.metric.inverse(anchor.position), inputs, tensors, anchor)
    full_energy, full_grad = kernel.potential.full_energy_and_grad(anchor.position)
    torch.testing.assert_close(energy, full_energy)
    torch.testing.assert_close(grad, run.metric.pull_back(full_grad, tensors), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(run.gradient(anchor.position), full_grad, rtol=1e-9, atol=1e-9)


# ---- cost


@pytest.mark.parametrize(
    ("reduction", "cost"),
    [(None, 1), (ControlVariate(MODE), 2), (SVRG(), 3), (SVRG(16), 2.25)],
    ids=["none", "fixed", "svrg", "svrg_16"],
)
def test_gradients_per_step(reduction, cost, monkeypatch):
    """Counted: four minibatches are the data."""
    kernel = SGLD(targets.regression, step_size=1e-4, compile="handlers", variance_reduction=reduction)
    kernel.setup(0, *DATA)
    assert kernel.gradients_per_step == cost
    count = []
    for module in (type(kernel.potential), full_data):
        original = module._eager_energy_and_grad
        monkeypatch.setattr(module, "_eager_energy_and_grad", lambda *a, f=original: count.append(len(a)) or f(*a))
    for _ in range(17):  # the anchor of step 0 was set at the start
        kernel.advance()
    passes = 0 if reduction is None or cost == 2 else 16 // kernel._running.anchoring.every
    assert len(count) == 17 * (1 if reduction is None else 2) + 4 * passes


# ---- step_size="auto"


def svrg_moments(h, steps, every, start=None, first=0):
    """Second moments of (z, a) about the posterior's mean on `linear`, after steps ``first`` to ``first + steps``.

    z ← z − h (Ĥ (z − a) + H a) + √(2h) ξ, with a ← z before every step whose number ``every`` divides.
    """
    rows = 1.0 + 3.0 * X.numpy() ** 2
    moves = [np.array([[1.0 - h * row, h * (row - rows.mean())], [0.0, 1.0]]) for row in rows]
    second = np.zeros((2, 2)) if start is None else start
    renewed = np.array([[1.0, 0.0], [1.0, 0.0]])
    for step in range(first, first + steps):
        second = renewed @ second @ renewed.T if step % every == 0 else second
        second = np.mean([move @ second @ move.T for move in moves], 0) + np.diag([2.0 * h, 0.0])
    return second


@pytest.mark.slow
@pytest.mark.parametrize("every", [2, 7])
def test_svrg_with_a_step_size_that_is_found(every):
    """The law of the step that warm-up chose, whose bias is what was allowed; the noise counted is that of SVRG."""
    mean, curvature = float((X * Y).sum() / (1 + (X**2).sum())), float(1 + (X**2).sum())
    start = mean + torch.randn(N, dtype=float64, generator=torch.Generator().manual_seed(2)) / curvature**0.5
    steps = []
    for chains, reduction in ((2000, None), (N, SVRG(every))):
        kernel = SGLD(
            linear, step_size="auto", compile="fx", replacement=True, variance_reduction=reduction, steps_per_sample=3
        )
        kernel.num_chains, kernel.initial_params = chains, {"slope": start[:chains]}
        pyro.set_rng_seed(1)
        with targets.starts_unchecked():
            kernel.setup(20, X, Y)
        for _ in range(20):
            kernel.advance()
        steps.append(kernel.step_size_at(0))
    plain, h = steps
    assert h > 3 * plain
    run = kernel._running
    run.place(torch.full((N, 1), mean, dtype=float64))
    first = run.step
    for _ in range(8):
        kernel.advance()
    z, variance = kernel.position.flatten().numpy(), svrg_moments(h, 24, every, first=first)[0, 0]
    assert_mean("slope", z, mean, variance)
    assert_mean("square", (z - mean) ** 2, variance, float(((z - mean) ** 2).var()))
    stationary = svrg_moments(h, 400 * every, every)
    variances = [svrg_moments(h, step, every, stationary)[0, 0] for step in range(1, every + 1)]
    assert np.mean(variances) * curvature == pytest.approx(1.05, abs=0.005)
