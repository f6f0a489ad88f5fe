"""What holds along every trajectory, without expectations."""

import math

import pyro
import pytest
import torch

from bnn.kernels import MCMC, SGHMC, SGLD, learning_rate_and_momentum, step_size_and_friction
from support import targets

INTEGRATORS = ["bbaoa", "symplectic_euler", "baoab", "obabo"]
LEARNING_RATE, DECAY = 0.5, 0.8


def logistic_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] + 0.5 * torch.randn(20, generator=generator, dtype=torch.float64) > 0).long()


def potential_energy(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The potential of `targets.logistic_regression` up to a constant, by hand."""
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, y.double(), reduction="sum")
    return loss + 0.5 * weight.square().sum()


def gradient(weight: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    weight = weight.detach().requires_grad_()
    return torch.autograd.grad(potential_energy(weight, x, y), weight)[0]


def trajectory(kernel, steps: int, start: torch.Tensor, *data: torch.Tensor) -> torch.Tensor:
    kernel.initial_params = {"weight": start}
    kernel.setup(0, *data)
    points = [start]
    for _ in range(steps):
        kernel.advance()
        points.append(kernel.position[0].clone())
    return torch.stack(points)


START = torch.tensor([2.0, -1.0, 0.5, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_cold_limit_is_gradient_descent_with_momentum(integrator):
    """At T = 0, z' − z = β (z − z₋) − (ℓ/N) ∇U(z) with the (ℓ, β) of the conversion helper, for every integrator."""
    x, y = logistic_data()
    h, friction = step_size_and_friction(LEARNING_RATE, DECAY, len(x), integrator)
    kernel = SGHMC(
        targets.logistic_regression,
        step_size=h,
        friction=friction,
        temperature=0.0,
        integrator=integrator,
        compile="fx",
    )
    points = trajectory(kernel, 40, START, x, y)
    for before, here, after in zip(points[:-2], points[1:-1], points[2:], strict=True):
        expected = DECAY * (here - before) - LEARNING_RATE / len(x) * gradient(here, x, y)
        torch.testing.assert_close(after - here, expected, rtol=1e-8, atol=1e-12)
    assert (points[-1] - points[0]).norm() > 1.0  # it went somewhere


@pytest.mark.parametrize("integrator", ["bbaoa", "symplectic_euler"])
def test_cold_limit_is_the_trajectory_of_torchs_sgd(integrator):
    """Point for point, where the first step uses the whole gradient; the loss is the mean, U/N."""
    x, y = logistic_data()
    h, friction = step_size_and_friction(LEARNING_RATE, DECAY, len(x), integrator)
    kernel = SGHMC(
        targets.logistic_regression,
        step_size=h,
        friction=friction,
        temperature=0.0,
        integrator=integrator,
        compile="fx",
    )
    points = trajectory(kernel, 60, START, x, y)
    weight = torch.nn.Parameter(START.clone())
    optimizer = torch.optim.SGD([weight], lr=LEARNING_RATE, momentum=DECAY)
    for point in points[1:]:
        optimizer.zero_grad()
        (potential_energy(weight, x, y) / len(x)).backward()
        optimizer.step()
        torch.testing.assert_close(point, weight.detach(), rtol=1e-9, atol=1e-12)


def test_cold_limit_of_sgld_is_gradient_descent():
    x, y = logistic_data()
    points = trajectory(
        SGLD(targets.logistic_regression, step_size=0.05, temperature=0.0, compile="fx"), 40, START, x, y
    )
    for here, after in zip(points[:-1], points[1:], strict=True):
        torch.testing.assert_close(after, here - 0.05 * gradient(here, x, y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_conversion_there_and_back(integrator):
    for learning_rate, decay, num_data in [(0.1, 0.9, 1000), (1e-3, 0.99, 60_000), (0.5, 0.3, 7)]:
        h, friction = step_size_and_friction(learning_rate, decay, num_data, integrator)
        back = learning_rate_and_momentum(h, friction, num_data, integrator)
        assert back == pytest.approx((learning_rate, decay), rel=1e-12)


def test_conversion_without_momentum():
    """β = 0 is SGLD with step h²; the splittings' exp(−hC) cannot be 0."""
    h, friction = step_size_and_friction(0.1, 0.0, 10, "symplectic_euler")
    assert (h, h * friction) == pytest.approx((0.1, 1.0))
    with pytest.raises(ValueError, match=r"momentum_decay=0.*\(0, 1\)"):
        step_size_and_friction(0.1, 0.0, 10)


@pytest.mark.parametrize(
    "arguments", [(0.0, 0.9, 10), (0.1, 1.0, 10), (0.1, -0.1, 10), (0.1, 0.9, 0), (math.nan, 0.9, 10)]
)
def test_conversion_refuses(arguments):
    with pytest.raises(ValueError, match="learning_rate=.*give"):
        step_size_and_friction(*arguments)


@pytest.mark.parametrize("arguments", [(0.0, 1.0, 10), (0.1, -1.0, 10), (0.1, 1.0, 0), (math.nan, 1.0, 10)])
def test_conversion_back_refuses(arguments):
    with pytest.raises(ValueError, match="step_size=.*give"):
        learning_rate_and_momentum(*arguments)


@pytest.mark.parametrize("mass", [1.0, 2.5])
def test_norm_identity(mass):
    """Symplectic Euler, z' = z + h r'/M: |z'|² − |z|² = 2h z'ᵀr'/M − h² |r'|²/M² at every step, from the statistics."""
    x, y = logistic_data()
    h = 0.1
    kernel = SGHMC(
        targets.logistic_regression,
        step_size=h,
        friction=1.0,
        mass=mass,
        integrator="symplectic_euler",
        compile="fx",
    )
    mcmc = MCMC(kernel, num_samples=50, warmup_steps=0, num_chains=3, disable_progbar=True)
    mcmc.run(x, y)
    stats = mcmc.sample_stats
    change = stats["squared_norm"].diff(dim=1)
    drift = 2 * h * stats["position_momentum"] / mass - h**2 * stats["momentum_squared_norm"] / mass**2
    assert change.abs().max() > 0.01
    torch.testing.assert_close(change, drift[:, 1:], rtol=1e-9, atol=1e-10)


def test_statistics_are_those_of_the_draws():
    """Energy and gradient at the point where the step evaluated them, norm at the draw."""
    x, y = logistic_data()
    kernel = SGLD(targets.logistic_regression, step_size=0.02, compile="fx")
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=3, num_chains=2, disable_progbar=True)
    mcmc.run(x, y)
    draws, stats = mcmc.get_samples(group_by_chain=True)["weight"], mcmc.sample_stats
    torch.testing.assert_close(stats["squared_norm"], draws.square().sum(-1))
    for chain in range(2):
        for draw in range(1, 20):
            point = draws[chain, draw - 1]
            grad = gradient(point, x, y)
            energy = potential_energy(point, x, y) + 0.5 * 4 * math.log(2 * math.pi)
            torch.testing.assert_close(stats["energy"][chain, draw], energy)
            torch.testing.assert_close(stats["gradient_norm"][chain, draw], grad.norm())
            torch.testing.assert_close(stats["configurational_temperature"][chain, draw], point @ grad / 4)


@pytest.mark.parametrize("steps", [2, 12])
def test_a_draw_is_several_steps(steps):
    """``steps_per_sample`` draws every so many points of the same chain."""
    x, y = logistic_data()

    def run(steps_per_sample: int, num_samples: int) -> torch.Tensor:
        pyro.set_rng_seed(7)
        kernel = SGHMC(
            targets.logistic_regression,
            step_size=0.1,
            friction=1.0,
            steps_per_sample=steps_per_sample,
            compile="fx",
        )
        initial = {"weight": START}
        mcmc = MCMC(kernel, num_samples, warmup_steps=0, initial_params=initial, disable_progbar=True)
        mcmc.run(x, y)
        return mcmc.get_samples()["weight"]

    torch.testing.assert_close(run(steps, 5), run(1, 5 * steps)[steps - 1 :: steps])
