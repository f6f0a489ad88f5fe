"""Simulation-based calibration (Talts et al. 2018): among posterior draws given y ~ p(y | w), w has a uniform rank.

Each chain is a replicate with its own w and data. It starts at a draw from the prior that knows nothing of them.
"""

import numpy as np
import pytest
import torch
from scipy import stats

from bnn.kernels import AMAGOLD, GGMC, SGHMC
from support.joint import UNMOVABLE, Joint, joints, start, values_of

# The probability that one test fails although the kernel is exact, but for what is left of correlation between draws.
ALPHA = 1e-5
REPLICATES, DRAWS, BINS = 2000, 31, 16
WARMUP = 60

KERNELS = {
    "ggmc": (GGMC, None, {"friction": 1.5, "num_steps": 1, "steps_per_sample": 32}),
    "hmc": (GGMC, None, {"friction": None, "num_steps": 8, "steps_per_sample": 4}),
    "amagold": (AMAGOLD, 4, {"friction": 1.5, "num_steps": 4, "steps_per_sample": 12}),
}
STEP_SIZES = {
    "linear": {"ggmc": 0.08, "hmc": 0.08, "amagold": 0.06},
    "logistic": {"ggmc": 0.9, "hmc": 0.5, "amagold": 0.2},
}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def build(name: str, joint: Joint, **options):
    kernel, batch_size, settings = KERNELS[name]
    h = STEP_SIZES[joint.name][name]
    model = joint.with_data_as_site(batch_size)
    return kernel(model, step_size=h, mass={"data": UNMOVABLE}, compile="fx", **settings, **options)


def quantities(joint: Joint, values, data) -> torch.Tensor:
    """What is ranked, ``(replicates, quantities)``: every latent, and the log-likelihood, which sees the data."""
    latents = [values[n].reshape(len(data), -1) for n in sorted(values) if n != "data"]
    return torch.cat([*latents, joint.log_likelihood(joint.x, values, data).unsqueeze(-1)], -1)


def smallest_p_value(kernel, joint: Joint) -> tuple[float, int]:
    """Of the χ² tests of the quantities' ranks, and how many these are."""
    truth = joint.draw(REPLICATES)
    data = truth["data"]
    start(kernel, joint, {**joint.prior(REPLICATES), "data": data}, WARMUP)
    with torch.no_grad():
        for _ in range(WARMUP):
            kernel.advance()
        true = quantities(joint, truth, data)
        ranks = torch.zeros_like(true, dtype=torch.long)
        for _ in range(DRAWS):
            kernel.advance()
            ranks += quantities(joint, values_of(kernel), data) < true
    bins = (ranks * BINS // (DRAWS + 1)).numpy()
    p_values = [stats.chisquare(np.bincount(column, minlength=BINS)).pvalue for column in bins.T]
    return float(min(p_values)), len(p_values)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["linear", "logistic"])
@pytest.mark.parametrize("name", KERNELS)
def test_ranks_are_uniform(name, model):
    joint = joints()[model]
    p_value, count = smallest_p_value(build(name, joint), joint)
    assert p_value > ALPHA / count


@pytest.mark.slow
@pytest.mark.parametrize("name", KERNELS)
def test_another_temperature_is_noticed(name):
    joint = joints()["logistic"]
    p_value, count = smallest_p_value(build(name, joint, temperature=1.3), joint)
    assert p_value < (ALPHA / count) ** 2


@pytest.mark.slow
def test_no_metropolis_test_is_noticed():
    joint, (_, _, settings) = joints()["logistic"], KERNELS["ggmc"]
    settings = {**settings, "step_size": STEP_SIZES["logistic"]["ggmc"]}
    del settings["num_steps"]
    mass = {"data": UNMOVABLE}
    kernel = SGHMC(joint.with_data_as_site(), integrator="obabo", mass=mass, compile="fx", **settings)
    p_value, count = smallest_p_value(kernel, joint)
    assert p_value < (ALPHA / count) ** 2
