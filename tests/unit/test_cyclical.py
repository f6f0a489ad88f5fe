"""The cyclical kernels: stages, labels, and what they refuse."""

import math

import numpy as np
import pytest
import torch

from bnn.kernels import MCMC, SGLD, CyclicalSGHMC, CyclicalSGLD
from support import laws, targets
from support.checks import assert_covariance, assert_variance
from support.laws import Setting

N = 131_072
CYCLE, EXPLORATION, PEAK = 10, 0.6, 0.1


def stepped(kernel, steps: int) -> np.ndarray:
    """State of N independent coordinates of curvature 4 after some steps of the run, from z = 0."""
    curvature = torch.full((N,), 4.0, dtype=torch.float64)
    kernel.initial_params = {"z": torch.zeros_like(curvature)}
    kernel.setup(0, curvature)
    kernel._running.take_steps(steps)
    return np.stack([part.flatten().numpy() for part in kernel._running.state[:2] if part.numel()], 1)


def at(step: int, temperature: float, before: float = 0.0) -> Setting:
    """Zhang et al.'s equation 1, and the temperature of the stage."""
    within = step % CYCLE
    step_size = PEAK * 0.5 * (math.cos(math.pi * within / CYCLE) + 1)
    return Setting(4.0, step_size, temperature if within >= EXPLORATION * CYCLE else before, friction=3.0)


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sgld_follows_the_two_stages_exactly(temperature):
    options = {"step_size": PEAK, "cycle_length": CYCLE, "exploration": EXPLORATION, "temperature": temperature}
    sample = stepped(CyclicalSGLD(targets.gaussian, compile="fx", **options), 19)
    covariance = np.zeros((3, 3))
    for step in range(19):
        covariance = laws.propagate(covariance, laws.sgld(at(step, temperature)))
    assert_variance("position", sample[:, 0], covariance[0, 0])


def test_exploration_may_have_a_temperature_of_its_own():
    options = {"step_size": PEAK, "cycle_length": CYCLE, "exploration": EXPLORATION, "exploration_temperature": 2.0}
    sample = stepped(CyclicalSGLD(targets.gaussian, compile="fx", **options), 19)
    covariance = np.zeros((3, 3))
    for step in range(19):
        covariance = laws.propagate(covariance, laws.sgld(at(step, 1.0, before=2.0)))
    assert_variance("position", sample[:, 0], covariance[0, 0])


@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_sghmc_follows_the_two_stages_exactly(temperature):
    options = {"step_size": PEAK, "cycle_length": CYCLE, "exploration": EXPLORATION, "temperature": temperature}
    sample = stepped(CyclicalSGHMC(targets.gaussian, friction=3.0, compile="fx", **options), 19)
    covariance = np.diag([0.0, 0.0, 0.0])  # exploration starts without momentum
    for step in range(19):
        covariance = laws.propagate(covariance, laws.bbaoa(at(step, temperature)))
    assert_covariance(["position", "momentum"], sample, covariance[:2, :2])


@pytest.mark.parametrize("kernel", [CyclicalSGLD, CyclicalSGHMC])
@pytest.mark.parametrize("steps_per_sample", [1, 3, 7])
def test_draws_come_from_sampling_stages_and_know_their_cycle(kernel, steps_per_sample):
    friction = {"friction": 3.0} if kernel is CyclicalSGHMC else {}
    one = kernel(
        targets.gaussian, step_size=0.01, cycle_length=CYCLE, exploration=EXPLORATION, compile="fx",
        steps_per_sample=steps_per_sample, **friction,
    )  # fmt: skip
    mcmc = MCMC(one, num_samples=12, warmup_steps=2, num_chains=2, disable_progbar=True)
    mcmc.run(torch.ones(3))
    stats = {name: value[0].numpy() for name, value in mcmc.sample_stats.items()}
    assert (stats["cycle_position"] >= EXPLORATION).all() and (stats["temperature"] == 1.0).all()
    steps = np.rint((stats["cycle"] + stats["cycle_position"]) * CYCLE).astype(int)
    assert (np.diff(steps) >= steps_per_sample).all()
    sampling = [s for s in range(1000) if s % CYCLE >= EXPLORATION * CYCLE]
    expected, last = [], -1
    while len(expected) < 14:
        last = next(s for s in sampling if s >= last + steps_per_sample)
        expected.append(last)
    assert steps.tolist() == expected[2:]
    np.testing.assert_allclose(stats["step_size"], [0.005 * (math.cos(math.pi * (s % 10) / 10) + 1) for s in steps])


def test_without_exploration_it_is_sgld_under_the_schedule():
    runs = []
    for cyclical in (True, False):
        torch.manual_seed(1)
        kernel = CyclicalSGLD(targets.gaussian, step_size=0.1, cycle_length=8, exploration=0.0, compile="fx")
        if not cyclical:
            kernel = SGLD(targets.gaussian, step_size=kernel.step_size, compile="fx")
        mcmc = MCMC(kernel, num_samples=20, num_chains=2, disable_progbar=True)
        mcmc.run(torch.ones(4))
        runs.append(mcmc.get_samples()["z"])
    assert torch.equal(*runs)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"cycle_length": 1}, "cycle_length is 1"),
        ({"exploration": 1.0}, "exploration is 1.0"),
        ({"exploration": 0.95}, "leaves a step to sample at"),
        ({"step_size": 0.0}, "step_size is 0"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"exploration_temperature": -1.0}, "exploration_temperature is -1"),
        ({"cycle_length": 1000}, "without a second cycle"),
    ],
)
@pytest.mark.parametrize("kernel", [CyclicalSGLD, CyclicalSGHMC])
def test_bad_settings(kernel, settings, message):
    friction = {"friction": 3.0} if kernel is CyclicalSGHMC else {}
    with pytest.raises(ValueError, match=message):
        one = kernel(targets.gaussian, compile="fx", **{"step_size": 0.1, "cycle_length": 10, **friction, **settings})
        MCMC(one, num_samples=20, disable_progbar=True).run(torch.ones(2))
