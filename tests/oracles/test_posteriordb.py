"""Reference posteriors of posteriordb: means within 0.1 standard deviations, standard deviations within 10 %.

    python -m pytest -m slow tests/oracles/test_posteriordb.py --posteriordb FOLDER

The reference draws are 10,000. Ours have an effective size of 1,500 or more, so that a mean strays by 0.1 for one
quantity in 10,000.
"""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bnn import Potential
from bnn.kernels import MCMC
from support import posteriordb
from support.posteriordb import POSTERIORS, ROWS

CHAINS, WARMUP, DRAWS = 16, 500, 1000


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def folder(request) -> Path:
    given = request.config.getoption("--posteriordb")
    if given is None:
        pytest.skip("no reference posteriors: give their folder with --posteriordb, or in POSTERIORDB")
    assert Path(given).is_dir(), f"--posteriordb {given} is not a folder"
    return Path(given)


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("name", POSTERIORS)
def test_means_and_deviations_of_the_reference(name, row, folder):
    posterior = posteriordb.load(folder, name)
    mcmc = MCMC(
        ROWS[row].build(posterior.model), num_samples=DRAWS, warmup_steps=WARMUP, num_chains=CHAINS,
        disable_progbar=True,
    )  # fmt: skip
    mcmc.run(*posterior.data)
    draws = posterior.quantities_of(mcmc.get_samples(group_by_chain=True)).flatten(0, 1).numpy()
    means, deviations = posterior.errors(draws)
    assert np.abs(means).max() < 0.1, dict(zip(posterior.names, means.round(3), strict=True))
    assert np.abs(deviations).max() < 0.1, dict(zip(posterior.names, deviations.round(3), strict=True))


def test_flat_priors_add_nothing():
    """U = n log σ + Σ (y − xβ)² / 2σ² + ½ n log 2π, and −log σ for the logarithm of σ, far out as well."""
    x, y = torch.randn(9, 2), torch.randn(9)
    potential = Potential(posteriordb.mesquite, y, x)
    assert potential.is_recorded and potential.dtype == torch.float64
    for beta, log_scale in ((torch.zeros(2), 0.0), (torch.tensor([1e4, -3e5]), 7.0)):
        position = torch.cat([beta, torch.tensor([log_scale])]).unsqueeze(0)
        squares = float((y - x @ beta).square().sum())
        expected = (9 - 1) * log_scale + squares / (2 * math.exp(2 * log_scale)) + 4.5 * math.log(2 * math.pi)
        assert float(potential.energy_and_grad(position)[0]) == pytest.approx(expected, rel=1e-12)
