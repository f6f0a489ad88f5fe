"""Constant-step SGD: its exact finite-step laws, the steps of Mandt et al., averages of AR(1) chains, its reports."""

from itertools import product

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov
from scipy.optimize import minimize_scalar

import bnn
from bnn.kernels import MCMC, SVRG, Constant, ConstantSGD
from bnn.kernels._gradient_noise import GradientNoise, longest_step, pair
from bnn.kernels._metric import Scaling, Triangular
from support import targets
from support.checks import assert_covariance, assert_mean, assert_variance

N = 131_072
float64 = torch.float64
DESIGN = torch.tensor([[1.0, 0.6, 0.0], [0.0, 0.8, -0.3], [0.2, 0.0, 0.5]], dtype=float64)
SPREAD = torch.tensor([[12.0, 0.0, 0.0], [4.0, 9.0, 0.0], [-3.0, 2.0, 15.0]], dtype=float64)
ROWS = torch.tensor(list(product([1.0, -1.0], repeat=3)), dtype=float64) @ SPREAD.T


def repeated(y):
    """Correlated linear regression, y_i ~ N(Xz, 1) with one design X for all rows: the noise has the same V everywhere.

    The rows are all signs of three independent directions, so that any sum of the noise has negative excess kurtosis.
    """
    z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=y.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(y), subsample_size=2) as index:
        pyro.sample("y", dist.Normal((DESIGN @ z).expand(2, 3), 1.0).to_event(1), obs=y[index])


X = DESIGN.numpy()
H = np.eye(3) + len(ROWS) * X.T @ X
V = len(ROWS) ** 2 / 2 * X.T @ np.cov(ROWS.numpy().T, bias=True) @ X


def law(h, preconditioner, steps=None):
    """Covariance of z ← z − h P (H z + e), e ~ V: stationary, or after ``steps`` from z = 0."""
    drift = h * (preconditioner if np.ndim(preconditioner) == 2 else np.diag(np.broadcast_to(preconditioner, 3)))
    factor, noise = np.eye(3) - drift @ H, drift @ V @ drift.T
    if steps is None:
        return solve_discrete_lyapunov(factor, noise)
    covariance = np.zeros((3, 3))
    for _ in range(steps):
        covariance = factor @ covariance @ factor.T + noise
    return covariance


def kl(covariance):
    """From N(0, Σ) to the posterior N(0, H⁻¹)."""
    return 0.5 * (np.trace(H @ covariance) - 3 - np.linalg.slogdet(H @ covariance)[1])


def chains(model, start, *args, draws=1, warmup=0, **settings):
    kernel = ConstantSGD(model, compile="fx", **settings)
    kernel.num_chains, kernel.initial_params = N, start
    with targets.starts_unchecked():
        kernel.setup(warmup, *args)
    for _ in range(draws):
        kernel.advance()
    return kernel


START = {"z": torch.zeros(N, 3, dtype=float64)}
GIVEN = [0.7, torch.tensor([0.5, 1.0, 2.0], dtype=float64)]


@pytest.mark.parametrize("preconditioner", GIVEN, ids=["number", "vector"])
def test_the_law_while_it_relaxes_and_when_it_has(preconditioner):
    """Three steps from 0, and twenty: hH up to 0.8, where the step is far from infinitesimal."""
    h = 0.8 / np.linalg.eigvalsh(H)[-1] / float(torch.as_tensor(preconditioner).max())
    p = np.asarray(preconditioner)
    for steps in (3, 20):
        kernel = chains(repeated, START, ROWS, step_size=h, preconditioner=preconditioner, steps_per_sample=steps)
        assert_covariance(list("abc"), kernel.position.numpy(), law(h, p, steps))
    stationary, matrix = law(h, p), np.diag(np.broadcast_to(p, 3))
    np.testing.assert_allclose(law(h, p, 3000), stationary, rtol=1e-9)
    left = matrix @ H @ stationary + stationary @ H @ matrix - h * matrix @ H @ stationary @ H @ matrix
    np.testing.assert_allclose(left, h * matrix @ V @ matrix, rtol=1e-9)  # METHODS' form of the same equation


LEARNED = [(None, 0.2), ("diagonal", 1.0), ("full", 0.2), (GIVEN[1], 1.0)]


@pytest.mark.parametrize(("given", "temperature"), LEARNED, ids=["one", "diagonal", "full", "vector"])
def test_warm_up_finds_the_step_that_the_theorems_state(given, temperature):
    """h = 2Td / tr(PV), hP_kk = 2T / V_kk, hP = 2T V⁻¹ within four standard errors of V, then the law of that step."""
    kernel = chains(
        repeated, START, ROWS, preconditioner=given, temperature=temperature, draws=3, warmup=2, steps_per_sample=4
    )
    drift = kernel.step_size_at(0) * np.asarray(kernel._rule.preconditioner)
    error = 4 * np.sqrt(2 / N)  # of a variance of Gaussian noise, from half of 2 draws; of less kurtosis, less
    if isinstance(given, str):
        best = 2 * temperature * (1 / np.diag(V) if given == "diagonal" else np.linalg.inv(V))
        np.testing.assert_allclose(drift, best, rtol=2 * error, atol=2 * error * np.abs(best).min())
    else:
        p = np.ones(3) if given is None else given.numpy()
        assert kernel.step_size_at(0) == pytest.approx(2 * temperature * 3 / (p * np.diag(V)).sum(), rel=error)
        best = kernel.step_size_at(0) * np.diag(p)
        # The best of all steps, in continuous time, where Σ is in proportion to h.
        one = solve_continuous_lyapunov(np.diag(p) @ H, np.diag(p) @ V @ np.diag(p))
        found = minimize_scalar(lambda log_h: kl(np.exp(log_h) * one / temperature), bracket=(-12, -2))
        assert np.exp(found.x) == pytest.approx(kernel.step_size_at(0), rel=error)
    heat = kernel.step_size_at(0) * np.broadcast_to(np.ones(3) if given is None or isinstance(given, str) else given, 3)
    heat = 0.5 * heat * (np.diag(V) if not isinstance(given, str) else np.diag(V).mean())
    np.testing.assert_allclose(kernel.noise_temperature(), heat, rtol=error)
    assert kernel.noise_temperature().mean() == pytest.approx(temperature, rel=1e-9)
    assert kernel.sample_stats()["noise_temperature"].mean().item() == pytest.approx(temperature, rel=1e-9)
    kernel._run.state = kernel._run.state._replace(position=torch.zeros(N, 3, dtype=float64))
    kernel.advance()
    drift = drift if np.ndim(drift) == 2 else np.diag(np.broadcast_to(drift, 3))
    assert_covariance(list("abc"), kernel.position.numpy(), law(1.0, drift, 4))


def test_how_near_the_posterior_each_of_them_is():
    """The exact discrete laws: V⁻¹ is the posterior but for O(h), and the scalar optimum beats its neighbours."""
    full = 2 * np.linalg.inv(V)
    gap = [np.linalg.norm(law(s, full) / s - np.linalg.inv(H)) for s in (1.0, 0.5)]
    assert 1.9 < gap[0] / gap[1] < 2.1, "of first order in h"
    assert gap[0] < 0.1 * np.linalg.norm(np.linalg.inv(H))
    best = 6 / np.trace(V)
    assert kl(law(1.0, full)) < 0.01 < kl(law(best, 1.0)) < min(kl(law(0.8 * best, 1.0)), kl(law(1.25 * best, 1.0)))
    independent = np.diag(np.diag(V))  # theorem 3 is exact for such noise, whatever H
    drift = 2 / np.diag(V)
    np.testing.assert_allclose(
        solve_continuous_lyapunov(np.diag(drift) @ H, np.diag(drift) @ independent @ np.diag(drift)), np.linalg.inv(H)
    )


# ---- noise that depends on the position


def uneven(x, y):
    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=x.dtype), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=2) as index:
        pyro.sample("y", dist.Normal(x[index] @ z, 1.0), obs=y[index])


def test_a_regression_whose_noise_depends_on_the_position():
    """z ← (I − hĤ) z + hĉ over all 16 minibatches: exact first and second moments, tested by their own spread."""
    x = torch.tensor([[1.0, 0.5], [-0.4, 1.2], [0.3, 0.3], [1.5, -1.0]], dtype=float64)
    y, h, steps = torch.tensor([3.0, -2.0, 1.0, 0.5], dtype=float64), 0.05, 40
    pairs = [(x[list(b)].numpy(), y[list(b)].numpy()) for b in product(range(4), repeat=2)]
    factors = [np.eye(2) - h * (np.eye(2) + 2 * a.T @ a) for a, _ in pairs]
    pulls = [h * 2 * a.T @ b for a, b in pairs]
    mean, second = np.zeros(2), np.zeros((2, 2))
    for _ in range(steps):
        moved = [
            f @ second @ f.T + np.outer(f @ mean, c) + np.outer(c, f @ mean) + np.outer(c, c)
            for f, c in zip(factors, pulls, strict=True)
        ]
        mean = np.mean([f @ mean + c for f, c in zip(factors, pulls, strict=True)], 0)
        second = np.mean(moved, 0)
    start = {"z": torch.zeros(N, 2, dtype=float64)}
    z = chains(uneven, start, x, y, step_size=h, steps_per_sample=steps).position.numpy()
    for i, j in ((0, 0), (0, 1), (1, 1)):
        product_of = z[:, i] * z[:, j]
        assert_mean(f"z{i} z{j}", product_of, second[i, j], float(product_of.var()))
    for i in (0, 1):
        assert_mean(f"z{i}", z[:, i], mean[i], second[i, i] - mean[i] ** 2)


# ---- averages


@pytest.mark.parametrize(("warmup", "draws"), [(0, 4), (2, 5)])
def test_the_average_has_the_variance_of_an_ar1_mean(warmup, draws):
    """Positions z ← φz + he from 0 with φ = 1 − hk; the mean of the n after warm-up, by a recursion of (z, sum)."""
    k, h, noise, steps = 4.0, 0.1, 30.0, 3
    kernel = chains(
        targets.noisy_gaussian, {"z": torch.zeros(N, dtype=float64)}, targets.rows_for(noise, k), k,
        draws=warmup + draws, warmup=warmup, step_size=h, average=True, steps_per_sample=steps,
    )  # fmt: skip
    phi, covariance = 1 - h * k, np.zeros((2, 2))
    for step in range(steps * (warmup + draws)):
        if step == steps * warmup:
            covariance[1], covariance[:, 1] = 0.0, 0.0
        move = np.array([[phi, 0.0], [phi, 1.0]])
        covariance = move @ covariance @ move.T + h**2 * noise * np.ones((2, 2))
    n = steps * draws
    if not warmup:  # the closed form: each e counts (1 − φ^m) / (1 − φ) times, m the steps that follow it
        weights = (1 - phi ** np.arange(1, n + 1)) / (1 - phi)
        assert covariance[1, 1] == pytest.approx(h**2 * noise * np.square(weights).sum(), rel=1e-12)
    assert_variance("average", kernel.averaged()["z"].numpy(), covariance[1, 1] / n**2)
    assert_variance("position", kernel.position.numpy(), covariance[0, 0])


def test_averages_are_reported_and_not_kept_unless_asked():
    pyro.set_rng_seed(1)
    data = targets.regression_data(float64)
    kernel = ConstantSGD(targets.regression, step_size=1e-4, average=True, compile="fx")
    seen = []
    mcmc = MCMC(
        kernel, 6, 3, num_chains=2, disable_progbar=True,
        hook_fn=lambda kernel, params, stage, i: seen.append(params["weight"]) if stage == "Sample" else None,
    )  # fmt: skip
    mcmc.run(*data)
    average = mcmc.diagnostics()["average"]
    torch.testing.assert_close(average["chain 1"]["weight"], torch.stack(seen).mean(0)[1])
    assert average["chain 0"]["a_scale"] > 0
    kernel = ConstantSGD(targets.regression, step_size=1e-4, compile="fx")
    kernel.setup(0, *data)
    kernel.advance()
    assert kernel._running.state.origin.numel() == 0 and "average" not in kernel.chain_diagnostics()[0]
    with pytest.raises(RuntimeError, match="there is no average: give average=True"):
        kernel.averaged()


# ---- what warm-up measures


@pytest.mark.parametrize("dense", [False, True])
def test_the_noise_of_a_minibatch_and_its_inverse(dense):
    """From pairs of 20 each, 4,000 times: V and V⁻¹ without bias."""
    covariances, inverses = [], []
    random = torch.Generator().manual_seed(0)
    root = torch.linalg.cholesky(torch.from_numpy(V))
    for _ in range(4_000):
        noise = GradientNoise(dense)
        # Gaussian gradients, for which the inverse's correction is exact.
        noise.add(*(torch.randn(2, 20, 3, generator=random, dtype=float64) @ root.T))
        covariances.append(noise.covariance)
        inverses.append(noise.inverse())
    for found, exact in ((covariances, V), (inverses, np.linalg.inv(V) if dense else 1 / np.diag(V))):
        exact = exact if np.ndim(exact) == (2 if dense else 1) else np.diag(exact)
        error = np.std(found, 0) / np.sqrt(len(found))
        assert (np.abs(np.mean(found, 0) - exact) < 5 * error).all()
    noise, run = GradientNoise(dense), set_up(chains=20)._running
    for _ in range(2_000):
        noise.add(*pair(run))
    exact = V if dense else np.diag(V)
    scale = np.sqrt(np.outer(np.diag(V), np.diag(V))) if dense else exact
    assert (np.abs(noise.covariance - exact) < 5 * np.sqrt(2 / noise.pairs) * scale).all()


@pytest.mark.parametrize("preconditioner", [np.float64(1.0), np.array([0.5, 1.0, 2.0]), np.linalg.inv(V) * 1e4])
def test_the_longest_step(preconditioner):
    """Half of 2 / λ where all minibatches have one curvature, λ the largest eigenvalue of PH."""
    matrix = preconditioner if preconditioner.ndim == 2 else np.diag(np.broadcast_to(preconditioner, 3))
    pyro.set_rng_seed(0)
    given = torch.as_tensor(preconditioner)
    root = Triangular(torch.linalg.cholesky(given)) if given.dim() == 2 else Scaling(given.sqrt())
    found = longest_step(set_up(chains=4)._running, root, 1.0)
    assert found == pytest.approx(1 / np.linalg.eigvals(matrix @ H).real.max(), rel=1e-3)


def test_too_little_noise_for_the_temperature(capsys):
    """Rows that hardly differ: the step stays where it is stable, the report says what temperature that makes."""
    pyro.set_rng_seed(0)
    mcmc = MCMC(ConstantSGD(repeated, compile="fx"), 50, 16, num_chains=4, disable_progbar=True)
    mcmc.run(0.02 * ROWS)
    heat = mcmc.sample_stats["noise_temperature"].mean().item()
    assert mcmc.kernel.step_size_at(0) == pytest.approx(1 / np.linalg.eigvalsh(H)[-1], rel=1e-3)
    assert heat == pytest.approx(mcmc.kernel.step_size_at(0) * 0.02**2 * np.trace(V) / 6, rel=0.5) and heat < 0.1
    assert "only the noise of the minibatches heats the chains" in mcmc.temperature_verdict()
    mcmc.summary()
    assert f"{heat:.4g} by the noise of the minibatches" in capsys.readouterr().out


# ---- reports and refusals


def test_every_report_says_that_it_is_not_the_posterior(capsys):
    pyro.set_rng_seed(0)
    mcmc = MCMC(ConstantSGD(repeated, preconditioner="diagonal", compile="fx"), 40, 40, num_chains=4)
    mcmc._disable_progbar = True
    mcmc.run(ROWS)
    said = mcmc.temperature_verdict()
    assert "draws from the posterior only so far as it is Gaussian" in said
    assert "independent between coordinates" in said and "(minibatch noise)" in said
    mcmc.summary()
    assert said in capsys.readouterr().out
    assert bnn.to_arviz(mcmc, log_likelihood=False).posterior.attrs["caveat"] == mcmc.kernel.caveat
    assert mcmc.diagnostics()["noise temperature"]["chain 0"]["z"].shape == (3,)


BAD = [
    ({"step_size": "large"}, "step_size is 'large'; give a number, or 'auto'"),
    ({"step_size": Constant(0.1)}, "step_size is a Schedule; constant-step SGD takes a number"),
    ({"temperature": Constant(0.1)}, "temperature is a Schedule; constant-step SGD takes a number"),
    ({"temperature": 0.0}, "temperature is 0.0; give a finite number > 0"),
    ({"preconditioner": "dense"}, "preconditioner is 'dense'; give 'diagonal', 'full', numbers or None"),
    ({"replacement": False}, "replacement=False: over shuffled epochs the noise of the minibatches cancels"),
    ({"variance_reduction": SVRG()}, "variance_reduction takes away the noise .* use SGLD"),
]


@pytest.mark.parametrize(("settings", "message"), BAD, ids=[m[:30] for _, m in BAD])
def test_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ConstantSGD(repeated, **settings)


def constant_coordinate(y):
    pyro.sample("idle", dist.Normal(torch.zeros((), dtype=y.dtype), 1.0))
    repeated(y)


def set_up(model=repeated, warmup=8, chains=2, data=ROWS, draws=0, **settings):
    kernel = ConstantSGD(model, **{"compile": "fx", **settings})
    kernel.num_chains = chains
    kernel.setup(warmup, data)
    for _ in range(draws):
        kernel.advance()
    return kernel


def test_what_cannot_be_sampled(monkeypatch):
    def whole(y):
        z = pyro.sample("z", dist.Normal(torch.zeros(3, dtype=y.dtype), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((DESIGN @ z).expand(len(y), 3), 1.0).to_event(2), obs=y)

    with pytest.raises(ValueError, match=r"without noise .* ends at the posterior's mode\. Write pyro.plate.* or use"):
        set_up(whole)
    with pytest.raises(ValueError, match=r"are found in warm-up: give warmup_steps, some hundreds"):
        set_up(warmup=0, draws=1)
    with pytest.raises(ValueError, match=r"needs 8 pairs of gradients.*which has 6: raise warmup_steps to 8"):
        set_up(warmup=6, preconditioner="full")
    with pytest.raises(ValueError, match=r"V, the .* singular: its least variance is 0, at site 'idle'\. Give"):
        set_up(constant_coordinate, draws=8, preconditioner="diagonal")
    with pytest.raises(ValueError, match="minibatch gradients are not finite where the chains start"):
        GradientNoise(False).covariance  # noqa: B018
    monkeypatch.setattr("bnn.kernels.constant_sgd.LARGEST_DENSE", 2)
    with pytest.raises(
        ValueError, match="is a matrix, and the model has 3 coordinates, more than 2: use precond.*'dia"
    ):
        set_up(preconditioner="full")
