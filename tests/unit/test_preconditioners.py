"""Metrics: the exact law in any of them, and what is learnt of each kind."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy.linalg import solve_discrete_lyapunov

from bnn import Potential
from bnn.kernels import (
    AMAGOLD,
    GGMC,
    MCMC,
    SGHMC,
    SGLD,
    SGNHT,
    DrawCovariance,
    DrawVariances,
    Kronecker,
    LayerWise,
    Preconditioner,
    RMSprop,
)
from bnn.kernels._corrected import CorrectedKernel
from bnn.kernels._metric import Identity, Metric, Scaling, Triangular
from bnn.kernels.preconditioners import Learner
from support import targets
from support.checks import assert_covariance

N = 131_072
PRECISION = torch.tensor([[4.0, 1.5, 0.0], [1.5, 2.0, -0.6], [0.0, -0.6, 1.0]], dtype=torch.float64)
SCALE = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
FACTOR = torch.tensor([[0.7, 0.0, 0.0], [-0.4, 1.2, 0.0], [0.3, 0.5, 0.9]], dtype=torch.float64)
METRICS = {"scaling": Scaling(SCALE), "triangular": Triangular(FACTOR)}


def correlated(precision: torch.Tensor) -> None:
    pyro.sample("z", dist.MultivariateNormal(torch.zeros(3, dtype=torch.float64), precision_matrix=precision))


class Fixed(Preconditioner):
    """A metric that is known."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric

    def learner(self, potential):
        return _FixedLearner(self.metric, potential)


class _FixedLearner(Learner):
    def __init__(self, metric: Metric, potential: Potential) -> None:
        super().__init__(potential)
        self.metric = metric

    def start(self):
        return self.metric

    def observe(self, position, grad):
        pass

    def estimate(self):
        return self.metric


def matrix(metric: Metric) -> np.ndarray:
    return metric.forward(torch.eye(3, dtype=torch.float64), metric.tensors).T.numpy()


@pytest.mark.parametrize("metric", [Identity(), *METRICS.values()], ids=["identity", *METRICS])
def test_maps_are_what_they_say(metric):
    u, g = torch.randn(2, 5, 3, dtype=torch.float64)
    z = metric.forward(u, metric.tensors)
    torch.testing.assert_close(z, u @ torch.tensor(matrix(metric)).T)
    torch.testing.assert_close((z * g).sum(-1), (u * metric.pull_back(g, metric.tensors)).sum(-1))
    torch.testing.assert_close(metric.inverse(z), u)
    if metric.tensors:
        torch.testing.assert_close(torch.tensor(matrix(metric.scaled(3.0))), 3.0 * torch.tensor(matrix(metric)))


def advanced(kernel, steps: int, chains: int = N, start: torch.Tensor | None = None):
    """The kernel ``steps`` steps after z = 0, past a warm-up in which nothing is learnt."""
    kernel.num_chains, kernel.steps_per_sample = chains, steps
    start = torch.zeros(chains, 3, dtype=torch.float64) if start is None else start
    kernel.initial_params = {"z": start}
    with targets.starts_unchecked():
        kernel.setup(20, PRECISION)
        kernel.advance()
    return kernel


@pytest.mark.parametrize("steps", [2, 60])
@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_law_of_sgld(metric, steps):
    """Σ ← (I − hPK) Σ (I − hPK)ᵀ + 2hTP with P = LLᵀ."""
    h, temperature = 0.2, 0.7
    kernel = SGLD(correlated, step_size=h, temperature=temperature, preconditioner=Fixed(metric), compile="fx")
    p = matrix(metric) @ matrix(metric).T
    move, covariance = np.eye(3) - h * p @ PRECISION.numpy(), np.zeros((3, 3))
    for _ in range(steps):
        covariance = move @ covariance @ move.T + 2 * h * temperature * p
    found = advanced(kernel, steps).position.numpy()
    assert_covariance(["x", "y", "z"], found, covariance)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_law_of_sghmc(metric):
    """symplectic_euler of mass M = (LLᵀ)⁻¹ and friction γM: r ← (1 − hγ) r − hKz + N(0, 2hγTM); z ← z + hM⁻¹r."""
    h, rate, temperature, steps = 0.3, 1.5, 0.7, 80
    kernel = SGHMC(
        correlated, step_size=h, friction=rate, temperature=temperature, mass=Fixed(metric),
        integrator="symplectic_euler", compile="fx",
    )  # fmt: skip
    inverse_mass = matrix(metric) @ matrix(metric).T
    mass, k, eye = np.linalg.inv(inverse_mass), PRECISION.numpy(), np.eye(3)
    kick = np.block([[eye, np.zeros((3, 3))], [-h * k, (1 - h * rate) * eye]])
    drift = np.block([[eye, h * inverse_mass], [np.zeros((3, 3)), eye]])
    noise = np.zeros((6, 6))
    noise[3:, 3:] = 2 * h * rate * temperature * mass
    stationary = solve_discrete_lyapunov(drift @ kick, drift @ noise @ drift.T)
    kernel = advanced(kernel, steps)
    assert_covariance(["x", "y", "z"], kernel.position.numpy(), stationary[:3, :3])
    whitened = kernel._running.state.momentum.numpy()
    factor = matrix(metric)
    assert_covariance(["r_x", "r_y", "r_z"], whitened, factor.T @ stationary[3:, 3:] @ factor)


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
@pytest.mark.parametrize(
    "build",
    [
        lambda **o: GGMC(correlated, step_size=0.6, friction=1.0, num_steps=2, **o),
        lambda **o: AMAGOLD(correlated, step_size=0.4, friction=1.0, num_steps=2, **o),
    ],
    ids=["ggmc", "amagold"],
)
def test_corrected_kernels_stay_exact(build, metric, monkeypatch):
    """From exact draws to exact draws."""
    monkeypatch.setattr(CorrectedKernel, "settling_draws", 0)
    covariance = torch.linalg.inv(PRECISION)
    start = torch.randn(N, 3, dtype=torch.float64) @ torch.linalg.cholesky(covariance).mT
    kernel = build(mass=Fixed(metric), compile="fx")
    kernel.num_chains, kernel.initial_params = N, {"z": start}
    with targets.starts_unchecked():
        kernel.setup(20, PRECISION)
        for _ in range(10):
            kernel.advance()
    assert_covariance(["x", "y", "z"], kernel.position.numpy(), covariance.numpy())
    assert (kernel.position - start).abs().mean() > 0.1


def learnt(rule, steps: int = 20, chains: int = 4000):
    """What a rule learns of exact draws that hardly move: the metric, and the root mean squares of gradients."""
    covariance = torch.linalg.inv(PRECISION)
    start = torch.randn(chains, 3, dtype=torch.float64) @ torch.linalg.cholesky(covariance).mT
    kernel = SGLD(correlated, step_size=1e-8, preconditioner=rule, compile="fx")
    kernel.num_chains, kernel.initial_params = chains, {"z": start}
    with targets.starts_unchecked():
        kernel.setup(steps, PRECISION)
        for _ in range(steps):
            kernel.advance()
    assert torch.allclose(kernel.position, start, atol=1e-2), "the positions moved with the metric"
    return torch.tensor(matrix(kernel._running.metric)), (start @ PRECISION).square().mean(0).sqrt()


def test_variances():
    found, _ = learnt(DrawVariances())
    torch.testing.assert_close(found @ found.mT, torch.linalg.inv(PRECISION).diag().diag(), rtol=0.1, atol=1e-12)


def test_covariance():
    found, _ = learnt(DrawCovariance())
    torch.testing.assert_close(found @ found.mT, torch.linalg.inv(PRECISION), rtol=0.1, atol=0.03)
    assert (found.triu(1) == 0).all()


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_rmsprop(damping):
    found, root = learnt(RMSprop(damping=damping))
    wanted = 1 / (damping * root.mean() + root)
    torch.testing.assert_close((found @ found.mT).diag(), wanted / wanted.max(), rtol=1e-3, atol=0)


def two_layers(scale: torch.Tensor) -> None:
    pyro.sample("a", dist.Normal(torch.zeros(2, dtype=torch.float64), scale[:2]).to_event(1))
    pyro.sample("b", dist.Normal(torch.zeros(3, dtype=torch.float64), scale[2:]).to_event(1))


def test_layer_wise():
    """Independent Normals of scale s have E[g²] = 1/s²: masses are its root mean over a site, the smallest one."""
    scale = torch.tensor([0.1, 0.2, 1.0, 2.0, 3.0], dtype=torch.float64)
    start = {"a": torch.randn(4000, 2, dtype=torch.float64) * scale[:2]}
    start["b"] = torch.randn(4000, 3, dtype=torch.float64) * scale[2:]
    kernel = SGHMC(two_layers, step_size=1e-8, friction=1.0, mass=LayerWise(), compile="fx")
    kernel.num_chains, kernel.initial_params = 4000, start
    with targets.starts_unchecked():
        kernel.setup(20, scale)
        for _ in range(20):
            kernel.advance()
    found = kernel._running.metric.tensors[0].square()
    a, b = (scale[:2] ** -2).mean().sqrt(), (scale[2:] ** -2).mean().sqrt()
    torch.testing.assert_close(found, torch.stack([b / a, b / a, *[torch.ones_like(a)] * 3]), rtol=0.05, atol=0)


@pytest.mark.parametrize("rule", ["auto", "dense", RMSprop(), LayerWise()], ids=["auto", "dense", "rmsprop", "layers"])
@pytest.mark.parametrize(
    "build",
    [
        lambda m, rule: SGLD(m, step_size="auto", preconditioner=rule, compile="fx", steps_per_sample=5),
        pytest.param(
            lambda m, rule: SGHMC(m, step_size="auto", friction=1.0, mass=rule, compile="fx", steps_per_sample=10),
            marks=pytest.mark.slow,
        ),
        lambda m, rule: SGNHT(m, step_size=0.01, friction=1.0, mass=rule, compile="fx", thermostat="per_coordinate"),
    ],
    ids=["sgld", "sghmc", "sgnht"],
)
def test_minibatches(build, rule):
    """Every rule under every kind of kernel; draws are of the model's own coordinates, and the rest is frozen."""
    pyro.set_rng_seed(0)
    kernel = build(targets.regression, rule)
    mcmc = MCMC(kernel, num_samples=300, warmup_steps=200, num_chains=3, disable_progbar=True)
    x, y = targets.regression_data()
    mcmc.run(x, y)
    draws = mcmc.get_samples()
    assert (draws["weight"].mean(0) - torch.linalg.lstsq(x, y[:, None]).solution[:, 0]).abs().max() < 0.5
    assert len(mcmc.sample_stats["step_size"].unique()) == 1
    squares = draws["weight"].square().sum(-1) + draws["a_scale"].log().square()
    torch.testing.assert_close(mcmc.sample_stats["squared_norm"].flatten(), squares, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: RMSprop(decay=1.0), "decay is 1.0; give a number from 0 to below 1"),
        (lambda: RMSprop(damping=-1.0), "damping is -1.0; give a finite number >= 0"),
        (lambda: LayerWise(decay=-0.1), "decay is -0.1"),
        (lambda: SGHMC(correlated, step_size=0.1, friction=1.0, mass="diagonal"), "mass is 'diagonal'; give a number"),
        (lambda: SGLD(correlated, step_size=0.1, preconditioner="full"), "preconditioner is 'full'; give a number"),
        (
            lambda: SGLD(correlated, step_size=0.1, preconditioner="auto").setup(10, PRECISION),
            r"give warmup_steps, some hundreds \(it is 10; at least 20\)",
        ),
        (
            lambda: SGLD(targets.gaussian, step_size=0.1, preconditioner="dense").setup(20, torch.ones(3000)),
            "a dense metric for 3000 coordinates would hold 9.0e\\+06 numbers",
        ),
    ],
)
def test_bad_settings(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def multivariate(x: torch.Tensor, y: torch.Tensor, size: int | None = None) -> None:
    """Two outputs of one layer with a bias, noise of different size, and a wide prior."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3, dtype=x.dtype), 100.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(2, dtype=x.dtype), 0.5).to_event(1))
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        scale = torch.tensor([0.5, 2.0], dtype=x.dtype)
        pyro.sample("y", dist.Normal(x[rows] @ weight.mT + bias, scale).to_event(1), obs=y[rows])


@pytest.mark.parametrize("size", [None, 50])
def test_kronecker(size):
    """A layer with Gaussian outputs has the curvature XᵀX ⊗ diag(1/σ²), to which K-FAC's factors are exact."""
    torch.manual_seed(0)
    x = torch.randn(400, 3, dtype=torch.float64) @ torch.tensor(matrix(METRICS["triangular"]))
    y = torch.randn(400, 2, dtype=torch.float64)
    kernel = SGLD(multivariate, step_size=1e-9, preconditioner=Kronecker(damping=0.0), compile="fx")
    kernel.num_chains = 4
    kernel.setup(100, x, y, size)
    for _ in range(100):
        kernel.advance()
    metric = kernel._running.metric
    factor = metric.forward(torch.eye(8, dtype=torch.float64), metric.tensors).mT
    u = torch.randn(5, 8, dtype=torch.float64)
    torch.testing.assert_close(metric.inverse(metric.forward(u, metric.tensors)), u)
    torch.testing.assert_close(metric.pull_back(u, metric.tensors), u @ factor)
    sites = kernel.potential.sites
    weight, bias = factor[sites["weight"].slice], factor[sites["bias"].slice]
    precision = torch.tensor([4.0, 0.25], dtype=torch.float64)
    wanted = torch.linalg.inv(torch.kron(precision.diag(), x.mT @ x))
    ratio = torch.linalg.eigvals(torch.linalg.solve(wanted, (weight @ weight.mT)[:, :]))
    low, high = (0.9, 1.1) if size is None else (0.8, 1.25)
    relative = ratio.real[ratio.real > 1e-9]
    assert len(relative) == 6 and relative.min() > low and relative.max() < high
    torch.testing.assert_close((bias @ bias.mT).diag(), 1 / (400 * precision + 4.0), rtol=0.25, atol=0)


def test_kronecker_makes_a_hard_problem_easy():
    """Inputs of condition number 10⁴: in the metric all directions have unit variance, and one step size serves all."""
    pyro.set_rng_seed(0)
    x = torch.randn(200, 3, dtype=torch.float64) * torch.tensor([10.0, 1.0, 0.1], dtype=torch.float64)
    y = torch.randn(200, 2, dtype=torch.float64)
    kernel = SGHMC(multivariate, step_size="auto", friction=1.0, mass=Kronecker(), compile="fx", steps_per_sample=3)
    mcmc = MCMC(kernel, num_samples=1500, warmup_steps=300, num_chains=4, disable_progbar=True)
    mcmc.run(x, y)
    found = mcmc.get_samples()["weight"].var(0)
    wanted = torch.outer(torch.tensor([0.25, 4.0], dtype=x.dtype), torch.linalg.inv(x.mT @ x).diag())
    assert (found / wanted - 1).abs().max() < 0.25


def unrecordable(x: torch.Tensor, y: torch.Tensor) -> None:
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=x.dtype), 1.0))
    pyro.sample("y", dist.Normal(0.0, scale if scale > 1 else 2 * scale).expand([len(x)]).to_event(1), obs=x[:, 0])


@pytest.mark.filterwarnings("ignore:the model cannot be recorded")
def test_kronecker_refuses():
    x, y = torch.randn(40, 3, dtype=torch.float64), torch.randn(40, 2, dtype=torch.float64)
    with pytest.raises(ValueError, match="damping is -1.0; give a finite number >= 0"):
        Kronecker(damping=-1.0)
    with pytest.raises(ValueError, match="Kronecker\\(\\) needs a model that can be recorded: .* Use RMSprop\\(\\)"):
        SGLD(unrecordable, step_size=0.1, preconditioner=Kronecker()).setup(20, x, y)
    loader = [(x[:20], y[:20]), (x[20:], y[20:])]

    def streamed(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2, 3, dtype=x.dtype), 1.0).to_event(2))
        with pyro.plate("data", 40, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ w.mT, 1.0).to_event(1), obs=y)

    with pytest.raises(ValueError, match="Kronecker\\(\\) needs all data as arguments of run"):
        SGLD(streamed, step_size=0.1, preconditioner=Kronecker(), batches=loader).setup(20)
