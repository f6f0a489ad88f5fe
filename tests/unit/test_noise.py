"""The noise of large nets in double precision is standard normal, follows the seed, and goes on where a run stopped."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from bnn.kernels import SGLD
from bnn.kernels._noise import LARGE, Noise
from bnn.kernels._run_state import restore, state_of

DIM = LARGE + 1001


def drawn(shape, source=None):
    values = torch.full(shape, math.nan, dtype=torch.float64)
    (source or Noise()).fill(values)
    return values


def model():
    pyro.sample("z", dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1))


def kernel(**settings):
    made = SGLD(model, step_size=0.1, compile="fx", **settings)
    made.num_chains, made.num_samples = 2, 9
    made.initial_params = {"z": torch.zeros(2, DIM, dtype=torch.float64)}
    made.setup(0)
    return made


def test_numbers_are_standard_normal_and_independent():
    """Scores are standard normal: beyond 5.5 with probability 4e-8 each, 3e-7 in all; the p-value's bound is 1e-6."""
    torch.manual_seed(1)
    source = Noise()
    x, y = drawn((2, 1 << 20), source=source).numpy()
    later = drawn((1, 1 << 20), source=source)[0].numpy()
    root = math.sqrt(len(x))
    scores = {
        "mean": x.mean() * root,
        "variance": (np.mean(x**2) - 1.0) * root / math.sqrt(2.0),
        "skewness": np.mean(x**3) * root / math.sqrt(15.0),
        "kurtosis": (np.mean(x**4) - 3.0) * root / math.sqrt(96.0),
        "neighbours": np.mean(x[1:] * x[:-1]) * root,
        "neighbours' squares": np.mean((x[1:] ** 2 - 1.0) * (x[:-1] ** 2 - 1.0)) * root / 2.0,
        "chains": np.mean(x * y) * root,
        "steps": np.mean(x * later) * root,
    }
    assert all(abs(score) < 5.5 for score in scores.values()), scores
    assert stats.kstest(x, "norm").pvalue > 1e-6


@pytest.mark.parametrize(
    ("dim", "dtype", "own"), [(LARGE, torch.float32, 0), (LARGE - 1, torch.float64, 0), (LARGE, torch.float64, 1)]
)
def test_only_large_nets_in_double_precision_have_a_generator_of_their_own(dim, dtype, own):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dim, dtype=dtype), 1.0).to_event(1))

    made = SGLD(model, step_size=0.1, compile="fx")
    made.setup(0)
    made.advance()
    assert (made._running.source._generator is not None) == bool(own)


def test_the_seed_fixes_the_numbers_and_sources_differ():
    pyro.set_rng_seed(3)
    first, second = drawn((1, DIM)), drawn((1, DIM))
    pyro.set_rng_seed(3)
    assert torch.equal(drawn((1, DIM)), first)
    score = (first * second).mean() * math.sqrt(DIM)  # standard normal: beyond 5 with probability 6e-7
    assert abs(score) < 5
    pyro.set_rng_seed(4)
    assert not torch.equal(drawn((1, DIM)), first)


def test_a_run_goes_on_bit_for_bit():
    pyro.set_rng_seed(5)
    whole = kernel()
    for _ in range(2):
        whole.advance()
    saved = state_of(whole)
    for _ in range(2):
        whole.advance()
    pyro.set_rng_seed(6)
    resumed = kernel()
    resumed.advance()  # has a generator of its own, which must go
    restore(resumed, saved)
    for _ in range(2):
        resumed.advance()
    assert torch.equal(resumed.position, whole.position)


def test_the_law_of_the_chain():
    """From 0, n steps of SGLD on N(0, 1) give 2h Σ (1 − h)^{2k}; the score is beyond 5 with probability 6e-7."""
    pyro.set_rng_seed(7)
    made = kernel(steps_per_sample=7)
    made.advance()
    exact = 0.2 * sum(0.9 ** (2 * k) for k in range(7))
    for chain in made.position:
        assert abs(chain.square().mean() / exact - 1.0) < 5 * math.sqrt(2 / DIM)
