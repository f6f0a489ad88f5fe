"""Ten steps recorded in one program are ten steps: the same path without noise, the exact law with it."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn.kernels import SGHMC, SGLD, PolynomialDecay
from bnn.kernels._run import LARGEST_UNROLLED, UNROLLED_STEPS
from support import targets
from support.checks import assert_variance

STEPS = UNROLLED_STEPS + 2  # one program of ten steps and two single ones make a draw


def after(kernel, draws, curvature, start):
    kernel.initial_params = {"z": start}
    kernel.setup(0, curvature)
    for _ in range(draws):
        kernel.advance()
    return kernel


@pytest.mark.parametrize("build", [SGLD, lambda model, **options: SGHMC(model, friction=2.0, **options)])
def test_the_path_under_a_schedule(build):
    """At T = 0 the path is that of single steps, each at its own step size."""
    curvature = torch.linspace(0.5, 2.0, 6, dtype=torch.float64)
    start = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)
    step_size = PolynomialDecay(0.3, delay=3.0, power=0.8)
    positions = {}
    for tier in ("fx", "inductor"):
        kernel = build(targets.gaussian, step_size=step_size, temperature=0.0, steps_per_sample=STEPS, compile=tier)
        kernel = after(kernel, 4, curvature, start)
        assert kernel._running.unrolled == (UNROLLED_STEPS if tier == "inductor" else 0)
        assert kernel.steps_done == 4 * STEPS
        positions[tier] = kernel.position
    torch.testing.assert_close(positions["inductor"], positions["fx"], rtol=1e-10, atol=1e-14)
    assert (positions["fx"][0] - start).abs().min() > 0.05


@pytest.mark.parametrize("kernel", [SGLD, lambda model, **options: SGHMC(model, friction=2.0, **options)])
def test_each_step_has_a_minibatch_of_its_own(kernel):
    """At T = 0 the path is that of single steps on the same minibatches, of one row each."""
    generator = torch.Generator().manual_seed(3)
    x, y = torch.randn(40, 2, generator=generator), torch.randn(40, generator=generator)

    def model(x, y):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=1) as rows:
            pyro.sample("y", dist.Normal(x[rows] @ z, 1.0), obs=y[rows])

    positions = {}
    for tier in ("fx", "inductor"):
        pyro.set_rng_seed(4)
        moving = kernel(model, step_size=1e-3, temperature=0.0, steps_per_sample=STEPS, compile=tier)
        moving.initial_params = {"z": torch.zeros(2)}
        moving.setup(0, x, y)
        pyro.set_rng_seed(5)
        for _ in range(2):  # 24 of 40 rows: their order was drawn in advance, before any noise
            moving.advance()
        assert moving._running.unrolled == (UNROLLED_STEPS if tier == "inductor" else 0)
        positions[tier] = moving.position
    torch.testing.assert_close(positions["inductor"], positions["fx"], rtol=1e-4, atol=1e-6)


def test_the_law():
    """Var z = T / (k (1 − hk/2)), each step with noise of its own. Draws are 12 steps apart: correlation 0.5^12."""
    k, h, temperature = 4.0, 0.125, 0.3
    curvature = torch.full((LARGEST_UNROLLED,), k, dtype=torch.float64)
    kernel = SGLD(targets.gaussian, step_size=h, temperature=temperature, steps_per_sample=STEPS, compile="inductor")
    kernel = after(kernel, 8, curvature, torch.zeros_like(curvature))
    assert kernel._running.unrolled == UNROLLED_STEPS
    draws = []
    for _ in range(6):
        kernel.advance()
        draws.append(kernel.position[0])
    assert_variance("position", torch.cat(draws).numpy(), temperature / (k * (1 - h * k / 2)))
