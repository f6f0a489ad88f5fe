"""The memory of a run on a store, and of what reads one: a block of draws, however many there are."""

import shutil
import subprocess
import sys
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn.kernels import SGHMC
from support import stored, targets


def ran(path, model=targets.regression, data=None, **options):
    kernel = SGHMC(model, step_size=5e-3, friction=5.0, compile="handlers")
    return stored.run(kernel, path, targets.regression_data() if data is None else data, **options)


def test_memory_does_not_grow_with_the_draws(tmp_path, monkeypatch):
    """Rows of statistics in memory stay those of one block."""
    monkeypatch.setattr("bnn.kernels._stored_draws.ROWS", 5)
    sizes = []

    def hook(kernel, params, stage, i):
        sizes.append(kernel._running.record._rows)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ran(tmp_path / "a", num_samples=60, hook_fn=hook)
    assert max(sizes) <= 5 + 1


READER = """
import resource, sys, tempfile
import torch, bnn
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
read = {
    "report": lambda path: bnn.report(path, tempfile.mkdtemp() + "/report.html"),
    "efficiency": bnn.efficiency,
    "equipartition": bnn.equipartition,
}[sys.argv[1]]
read(sys.argv[2])
before = peak()
read(sys.argv[3])
print(peak() - before)
"""


@pytest.mark.slow
def test_reports_of_a_store_larger_than_what_they_may_take(tmp_path):
    """10^6 parameters by 200 draws are 763 MiB; a block is 16 MiB, its figures are in double precision."""
    for name, size in (("small", 3), ("large", 1_000_000)):

        def model(size=size):
            pyro.sample("z", dist.Normal(torch.zeros(size), 1.0).to_event(1))

        ran(tmp_path / name, model, (), num_samples=200, warmup_steps=1, num_chains=1)
    for what in ("report", "efficiency", "equipartition"):
        command = [sys.executable, "-W", "ignore", "-c", READER, what, str(tmp_path / "small"), str(tmp_path / "large")]
        grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        assert grown < 300, (what, grown)
    shutil.rmtree(tmp_path / "large")
