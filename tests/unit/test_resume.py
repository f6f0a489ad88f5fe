"""A run that is cut and resumed is, bit for bit, the run that was not: every kernel, every learner, every loader."""

import os
import random
import signal
import time
import zlib
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import Store
from bnn.kernels import (
    GGMC,
    SGHMC,
    SGLD,
    ConstantSGD,
    ControlVariate,
    CosineCycles,
    Kronecker,
    LayerWise,
    MaSDE,
    RMSprop,
)
from support import stored, targets
from support.cases import KERNELS

DATA = targets.regression_data()
TIER = "handlers"  # what is saved does not depend on it, and nothing has to be recorded
pytestmark = pytest.mark.filterwarnings("ignore:.*of 12 draws are kept:RuntimeWarning")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Several blocks in a run, of which checkpoints fall inside."""
    monkeypatch.setattr("bnn.kernels._stored_run.BLOCK_DRAWS", 5)


def on_batches(x, y):
    """`targets.regression` on batches of a loader."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 32, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ weight, 0.5), obs=y)


def store(path, **options) -> Store:
    return Store(path, **{"checkpoint_draws": 4, **options})


def assert_resumes(build, folder, data=DATA, cuts=(), **options):
    """Cut in warm-up after a draw, then while sampling in the midst of one."""
    warmup = options.get("warmup_steps", 8)
    whole = stored.run(build(), folder / "whole.zarr", data, **options)
    path = folder / "cut.zarr"
    after, inside = cuts or (warmup // 2, warmup // 2 + 8)
    with pytest.raises(stored.Cut):
        stored.run(build(), store(path), data, hook_fn=stored.cut_after(after), **options)
    with pytest.raises(stored.Cut):
        stored.run(stored.cut_inside(build(), inside), store(path), data, seed=99, resume=True, **options)
    stored.assert_same(whole, stored.run(build(), store(path), data, seed=99, resume=True, **options))


@pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)
def test_every_kernel(case, tmp_path):
    pick = random.Random(zlib.crc32(case.name.encode()))
    after = pick.randint(1, 8)
    cuts = after, pick.randint(9 - after, 19 - after)
    assert_resumes(partial(case.build, targets.regression, compile=TIER), tmp_path, cuts=cuts)


slow = pytest.mark.slow
LEARNERS = {
    "step": lambda: SGHMC(targets.regression, step_size="auto", friction=5.0, compile=TIER),
    "draws": lambda: SGHMC(targets.regression, step_size=1e-2, friction=5.0, mass="auto", compile=TIER),
    "dense": lambda: GGMC(targets.full_regression, friction=1.0, mass="dense", compile=TIER),
    "rms": lambda: SGLD(targets.regression, step_size="auto", preconditioner=RMSprop(), compile=TIER),
    "layers": lambda: SGHMC(targets.regression, step_size="auto", friction=5.0, mass=LayerWise(), compile=TIER),
    "noise": lambda: ConstantSGD(targets.regression, step_size="auto", preconditioner="diagonal", compile=TIER),
    "schedule": lambda: SGLD(targets.regression, step_size=CosineCycles(1e-4, cycle_length=7), compile=TIER),
    "anchor": lambda: SGLD(
        targets.regression,
        step_size=1e-4,
        variance_reduction=ControlVariate({"weight": torch.zeros(3), "a_scale": torch.tensor(1.0)}),
        compile=TIER,
    ),
    "recipe": lambda: MaSDE(targets.regression, step_size=1e-4, diffusion=torch.ones_like, compile=TIER),
    "recorded": lambda: SGHMC(targets.regression, step_size="auto", friction=5.0, mass="auto", compile="fx"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=slow if n in ("step", "rms", "noise", "recorded") else ()) for n in LEARNERS]
)
def test_what_is_learnt_in_warm_up(name, tmp_path):
    """The first cut is in the midst of what is learnt."""
    assert_resumes(LEARNERS[name], tmp_path, warmup_steps=24)


def test_the_kronecker_metric(tmp_path):
    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(2, 3), 1.0).to_event(2))
        with pyro.plate("rows", len(x), subsample_size=8) as index:
            pyro.sample("y", dist.Normal(x[index] @ weight.mT, 0.5).to_event(1), obs=y[index])

    x, y = DATA
    data = x, torch.stack([y, -y], 1)
    kernel = partial(SGHMC, model, step_size=1e-3, friction=5.0, mass=Kronecker(), compile=TIER)
    assert_resumes(kernel, tmp_path, data, warmup_steps=24)


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
@pytest.mark.parametrize("thinning", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_chain_methods_and_thinning(method, thinning, tmp_path):
    def build():
        return SGHMC(targets.regression, step_size=5e-3, friction=5.0, compile=TIER)

    options = {"chain_method": method, "num_chains": 3}
    whole = stored.run(build(), store(tmp_path / "whole", thinning=thinning), DATA, **options)
    for cut in (5, 18, 30, 47):
        path = tmp_path / f"cut{cut}"
        if method == "vectorized" and cut > 20:
            continue
        with pytest.raises(stored.Cut):
            stored.run(build(), store(path, thinning=thinning), DATA, hook_fn=stored.cut_after(cut), **options)
        again = stored.run(build(), store(path, thinning=thinning), DATA, seed=1, resume=True, **options)
        stored.assert_same(whole, again)
    assert again.get_samples(group_by_chain=True)["weight"].shape == (3, -(-12 // thinning), 3)


class Augmented(TensorDataset):
    """Items with noise from PyTorch's global generator."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn_like(x), y


LOADERS = {
    "list": lambda x, y: [(x[i : i + 8], y[i : i + 8]) for i in range(0, len(x), 8)],
    "shuffled": lambda x, y: DataLoader(TensorDataset(x, y), 8, shuffle=True),
    "generator": lambda x, y: DataLoader(
        TensorDataset(x, y), 8, shuffle=True, generator=torch.Generator().manual_seed(4)
    ),
    "augmented": lambda x, y: DataLoader(Augmented(x, y), 8, shuffle=True),
}


@pytest.mark.parametrize("name", LOADERS)
def test_loaders(name, tmp_path):
    x, y = DATA

    def build():
        loader = LOADERS[name](x, y)
        return SGHMC(on_batches, step_size=5e-3, friction=5.0, batches=loader, compile=TIER)

    assert_resumes(build, tmp_path, data=())


def test_a_loader_of_no_fixed_order_is_said_to_be_inexact(tmp_path):
    class Fickle:
        """Another order of rows each time: one minibatch is the same as before once in 10^11."""

        def __iter__(self):
            rows = random.SystemRandom().sample(range(len(DATA[0])), len(DATA[0]))
            yield from ((DATA[0][rows[i : i + 8]], DATA[1][rows[i : i + 8]]) for i in range(0, len(rows), 8))

        def __len__(self):
            return len(DATA[0]) // 8

    def build():
        return SGHMC(on_batches, step_size=5e-3, friction=5.0, batches=Fickle(), compile=TIER)

    with pytest.raises(stored.Cut):
        stored.run(build(), tmp_path / "a", (), hook_fn=stored.cut_after(10))
    with pytest.warns(RuntimeWarning, match="gave other minibatches than before the interruption"):
        mcmc = stored.run(build(), tmp_path / "a", (), resume=True)
    assert mcmc.get_samples(group_by_chain=True)["weight"].shape == (2, 12, 3)


def test_what_a_killed_writer_left_unfinished_is_removed(tmp_path):
    """A chunk is written under another name first, in which a kill may leave it: beside chunks and deeper."""

    def go(path, **options):
        kernel = SGHMC(targets.regression, step_size=5e-3, friction=5.0, compile=TIER)
        return stored.run(kernel, store(path), DATA, **options)

    whole = go(tmp_path / "whole")
    with pytest.raises(stored.Cut):
        go(tmp_path / "cut", hook_fn=stored.cut_after(15))
    chunks = [file for file in (tmp_path / "cut").rglob("c/*/**/0") if file.is_file()]
    left = [file.with_name("0.0123456789abcdef.partial") for file in chunks]
    for file in left:
        file.write_bytes(b"torn")
    assert len({len(file.parts) for file in left}) > 1
    stored.assert_same(whole, go(tmp_path / "cut", resume=True))
    assert not any(file.exists() for file in left)


@pytest.mark.slow
def test_fifty_kills(tmp_path):
    """SIGKILL at 50 random moments of one run, in set-up, warm-up and sampling: no draw is lost, doubled or changed."""

    def go(path, every=None, **options):
        kernel = SGHMC(targets.regression, step_size=5e-3, friction=5.0, mass="auto", compile=TIER)
        options = {"warmup_steps": 30, "num_samples": 4000, **options}
        return stored.run(kernel, store(path, checkpoint_draws=every), DATA, resume=True, **options)

    whole = go(tmp_path / "whole")  # and what children would have to import is imported
    pick, kills, seen = random.Random(0), 0, np.empty((2, 0, 3), dtype=np.float32)
    while kills < 50:
        if (child := os.fork()) == 0:
            try:
                go(tmp_path / "cut", 5, hook_fn=lambda *_: time.sleep(0.02))
            finally:
                os._exit(1)
        time.sleep(pick.uniform(0.0, 2.5))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "it ended by itself"
        kills += 1
        try:
            found = bnn.to_arviz(tmp_path / "cut")["posterior"]["weight"].values
        except (RuntimeError, ValueError):  # not yet
            assert not seen.size
            continue
        assert np.array_equal(found[:, : seen.shape[1]], seen)
        seen = found
    assert seen.size  # so that some came while sampling
    mcmc = go(tmp_path / "cut")
    stored.assert_same(whole, mcmc)
    assert np.array_equal(mcmc.get_samples(group_by_chain=True)["weight"][:, : seen.shape[1]].numpy(), seen)
