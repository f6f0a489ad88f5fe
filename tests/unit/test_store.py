"""What a store refuses, repairs and shows; resuming bit for bit is in ``test_resume.py``."""

import errno
import json
import os
import resource
import signal
import threading
from pathlib import Path

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray
from pyro.infer import NUTS

import bnn
from bnn import Store, reports
from bnn.draw_store import DrawStore
from bnn.kernels import MCMC, SGHMC
from bnn.store_writer import StoreError
from support import stored, targets

DATA = targets.regression_data()
pytestmark = pytest.mark.filterwarnings("ignore:.*of 12 draws are kept:RuntimeWarning")


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr("bnn.kernels._stored_run.BLOCK_DRAWS", 5)


def kernel(model=targets.regression, **options) -> SGHMC:
    return SGHMC(model, **{"step_size": 5e-3, "friction": 5.0, "compile": "handlers", **options})


def ran(path, **options) -> MCMC:
    return stored.run(options.pop("kernel", None) or kernel(), path, options.pop("data", DATA), **options)


def cut(path, after: int, every: int | None = None, **options) -> None:
    with pytest.raises(stored.Cut):
        ran(Store(path, checkpoint_draws=every), hook_fn=stored.cut_after(after), **options)


# ---- what readers see


def test_arviz_and_xarray_open_it(tmp_path):
    mcmc = ran(tmp_path / "a")
    draws = mcmc.get_samples(group_by_chain=True)
    tree = xarray.open_datatree(tmp_path / "a", engine="zarr", chunks=None)
    for data in (bnn.to_arviz(tmp_path / "a"), bnn.to_arviz(mcmc, log_likelihood=False), tree):
        assert dict(data["posterior"].sizes) == {"chain": 2, "draw": 12, "weight_dim_0": 3}
        for name, value in draws.items():
            assert np.array_equal(data["posterior"][name].values, value.numpy())
        assert np.array_equal(data["sample_stats"]["energy"].values, mcmc.sample_stats["energy"].numpy())
    lazy = bnn.to_arviz(tmp_path / "a", thin=5)
    assert not lazy["posterior"]["weight"].variable._in_memory
    assert lazy["posterior"]["draw"].values.tolist() == [0, 5, 10] and lazy["posterior"].attrs["thin"] == 5
    assert lazy["posterior"].attrs["kernel"] == "SGHMC" and lazy["sample_stats"].attrs["site_name"] == [
        "weight",
        "a_scale",
    ]
    assert np.array_equal(lazy["sample_stats"]["lp"], -lazy["sample_stats"]["energy"])
    assert az.summary(bnn.to_arviz(tmp_path / "a"), kind="stats").shape[0] == 4


def net(x, y=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    scale = pyro.sample("a_scale", dist.LogNormal(torch.zeros(()), 0.5))
    with pyro.plate("rows", len(x)):
        pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def test_predictions_summary_scores_and_report(tmp_path):
    path = tmp_path / "a"
    mcmc = ran(path, kernel=kernel(net, steps_per_sample=2))
    x, y = DATA
    for ours, whole in zip((path, mcmc), (mcmc, path), strict=True):
        one, other = bnn.predict(ours, x, model=net, draws=True), bnn.predict(whole, x, model=net, draws=True)
        assert torch.equal(one.draws, other.draws) and torch.equal(one.sd, other.sd)
    assert bnn.predict(path, x, model=net, num_samples=6).num_draws == 6
    assert bnn.summary(path, x, model=net).table.shape[0] > 0
    assert bnn.efficiency(path)["ess_bulk"].shape == (2,)
    assert "The run" in bnn.report(path, tmp_path / "report.html").read_text(encoding="utf-8")
    assert reports.main([str(path), "-o", str(tmp_path / "again.html")]) == 0
    with pytest.raises(ValueError, match="give model="):
        bnn.predict(path, x)
    with pytest.raises(ValueError, match="knows neither model nor data"):
        bnn.to_arviz(path, log_likelihood=True)


def test_only_what_is_committed_is_seen_while_it_is_written(tmp_path):
    path, seen = tmp_path / "a", []

    def look(kernel, params, stage, i):
        try:
            data = bnn.to_arviz(path)
        except RuntimeError as error:
            assert "no draws" in str(error)
            seen.append(0)
        else:
            assert np.isfinite(data["posterior"]["weight"].values).all()
            assert data["sample_stats"].sizes["draw"] == data["posterior"].sizes["draw"]
            seen.append(data["posterior"].sizes["draw"])

    mcmc = ran(Store(path, checkpoint_draws=4), hook_fn=look)
    assert seen == sorted(seen) and seen[0] == 0 and 0 < seen[-1] < 12
    whole = mcmc.get_samples(group_by_chain=True)["weight"]
    assert np.array_equal(bnn.to_arviz(path)["posterior"]["weight"].values, whole.numpy())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compression", [None, 3])
def test_precision_and_compression(dtype, compression, tmp_path):
    """The draws are rounded to the nearest on disk; the chains are not touched."""
    whole = ran(tmp_path / "whole").get_samples()
    found = ran(Store(tmp_path / "a", dtype=dtype, compression=compression)).get_samples()
    for name, value in whole.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value.to(getattr(torch, dtype)).float())


def test_values_too_large_for_float16(tmp_path):
    def model():
        pyro.sample("z", dist.Normal(1e6, 1.0))

    with pytest.raises(StoreError, match=r"'z', up to 1e\+06, are too large for dtype='float16'.*use 'float32'"):
        ran(
            Store(tmp_path / "a", dtype="float16"),
            kernel=kernel(model),
            data=(),
            initial_params={"z": torch.full((2,), 1e6)},
        )


def test_site_names_with_slashes(tmp_path):
    def model():
        pyro.sample("net/z", dist.Normal(0.0, 1.0))

    mcmc = ran(tmp_path / "a", kernel=kernel(model), data=())
    assert list(mcmc.get_samples()) == ["net/z"]
    assert list(bnn.to_arviz(tmp_path / "a")["posterior"].data_vars) == ["net.z"]


# ---- ends of a run


def test_after_its_end_it_returns_at_once_or_goes_on(tmp_path):
    whole = ran(tmp_path / "whole", num_samples=20)
    first = ran(tmp_path / "a")
    again = ran(tmp_path / "a", resume=True, hook_fn=lambda *_: pytest.fail("drew"))
    stored.assert_same(first, again)
    assert first.run_facts["gradient_evaluations"] == again.run_facts["gradient_evaluations"]
    stored.assert_same(whole, ran(tmp_path / "a", resume=True, num_samples=20))
    with pytest.raises(ValueError, match="holds 20 draws of each chain already, and num_samples is 12"):
        ran(tmp_path / "a", resume=True)


def test_the_length_of_warm_up_is_remembered(tmp_path):
    cut(tmp_path / "a", 9, warmup_steps=None)
    ran(tmp_path / "a", resume=True, warmup_steps=None, num_samples=15)
    assert bnn.to_arviz(tmp_path / "a")["posterior"].attrs["tuning_steps"] == 12


def test_resume_without_a_store_starts(tmp_path):
    stored.assert_same(ran(tmp_path / "a"), ran(tmp_path / "b", resume=True))


def test_ctrl_c_keeps_all_draws(tmp_path, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background may ignore it
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    whole = ran(tmp_path / "whole")

    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 6):
            signal.raise_signal(signal.SIGINT)

    with pytest.warns(RuntimeWarning, match="interrupted: 7 of 12 draws are kept"):
        mcmc = ran(tmp_path / "a", hook_fn=hook)
    assert mcmc.get_samples(group_by_chain=True)["weight"].shape == (2, 7, 3)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stored.assert_same(whole, ran(tmp_path / "a", resume=True))


def test_sigterm_makes_a_checkpoint_and_ends_the_process(tmp_path):
    if (child := os.fork()) == 0:

        def hook(kernel, params, stage, i):
            if (stage, i) == ("Sample", 6):
                os.kill(os.getpid(), signal.SIGTERM)

        ran(tmp_path / "a", hook_fn=hook)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert bnn.to_arviz(tmp_path / "a")["posterior"].sizes["draw"] == 7
    stored.assert_same(ran(tmp_path / "whole"), ran(tmp_path / "a", resume=True))


# ---- what is refused


def test_nothing_is_overwritten(tmp_path):
    ran(tmp_path / "a")
    with pytest.raises(ValueError, match="exists: give resume=True to go on with it, or another path"):
        ran(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is no store of draws"):
        ran(tmp_path / "b", resume=True)
    with pytest.raises(ValueError, match="holds no draws that"):
        bnn.to_arviz(tmp_path / "b")
    with pytest.raises(RuntimeError, match="no draws in .* yet"):
        cut(tmp_path / "c", 3)
        bnn.predict(tmp_path / "c", DATA[0], model=net)


OTHERS = {
    "step size": (lambda: {"kernel": kernel(step_size=4e-3)}, r"step_size was 0\.005 and is 0\.004"),
    "kernel": (lambda: {"kernel": kernel(integrator="obabo")}, "integrator was 'bbaoa' and is 'obabo'"),
    "chains": (lambda: {"num_chains": 3}, "num_chains was 2 and is 3"),
    "warm-up": (lambda: {"warmup_steps": 9}, "warmup_steps was 8 and is 9"),
    "method": (lambda: {"chain_method": "sequential"}, "chain_method was vectorized and is sequential"),
    "rows": (lambda: {"data": tuple(d[:24] for d in DATA)}, r"argument \[0\]\[0\] was float32 \(32, 3\)"),
    "data": (lambda: {"data": (DATA[0], DATA[1] + 1)}, r"another model or other data.*argument \[0\]\[1\]"),
    "sites": (lambda: {"data": (DATA[0][:, :2], DATA[1])}, r"site 'weight' was \(3,\).* and is \(2,\)"),
    "model": (lambda: {"kernel": kernel(net)}, "plate 'rows' was 8 of 32 rows and is absent"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_is_refused(name, tmp_path):
    cut(tmp_path / "a", 12)
    other, words = OTHERS[name]
    with pytest.raises(ValueError, match=words):
        ran(tmp_path / "a", resume=True, **other())
    ran(tmp_path / "a", resume=True)  # and nothing is spoilt


def test_a_newer_version_is_refused(tmp_path):
    cut(tmp_path / "a", 12)
    file = tmp_path / "a" / "zarr.json"
    root = json.loads(file.read_text())
    root["attributes"]["pyro_bnn_store"] += 1
    file.write_text(json.dumps(root))
    for read in (lambda: ran(tmp_path / "a", resume=True), lambda: bnn.to_arviz(tmp_path / "a")):
        with pytest.raises(RuntimeError, match="written by a newer version of pyro-bnn .format 2, known up to 1"):
            read()


def test_other_versions_are_said(tmp_path):
    cut(tmp_path / "a", 12)
    file = tmp_path / "a" / "zarr.json"
    file.write_text(file.read_text().replace(torch.__version__, "1.0"))
    with pytest.warns(RuntimeWarning, match="torch was 1.0 and is .* perhaps not bit for bit"):
        ran(tmp_path / "a", resume=True)


def test_two_runs_on_one_store(tmp_path):
    def hook(inner, params, stage, i):
        if (stage, i) == ("Sample", 3):
            with pytest.raises(RuntimeError, match="another run is writing"):
                ran(tmp_path / "a", resume=True)

    ran(tmp_path / "a", hook_fn=hook)


def test_settings_of_the_store():
    for name, value in (("thinning", 0), ("checkpoint_draws", 1.5), ("compression", 10), ("dtype", "int8")):
        with pytest.raises(ValueError, match=name):
            Store("a", **{name: value})
    with pytest.raises(ValueError, match="checkpoint_every is 0"):
        Store("a", checkpoint_every=0)
    with pytest.raises(ValueError, match="give the path of a folder"):
        Store(3)
    with pytest.raises(ValueError, match="needs a store to resume"):
        MCMC(kernel(), 3, resume=True)
    for options in ({"kernel": NUTS(net)}, {"kernel": kernel(), "chain_method": "parallel"}):
        with pytest.raises(NotImplementedError, match="'vectorized' or 'sequential'"):
            MCMC(num_samples=3, store="a", num_chains=2, **options)


def test_one_after_another_cannot_be_prolonged(tmp_path):
    ran(tmp_path / "a", chain_method="sequential")
    with pytest.raises(ValueError, match="num_samples was 12 and is 13: of chains that run one after another"):
        ran(tmp_path / "a", chain_method="sequential", num_samples=13, resume=True)


# ---- disks


def test_a_full_disk(tmp_path, monkeypatch):
    """What was committed before stays, and the run can be resumed when there is room."""
    whole, write = ran(tmp_path / "whole"), DrawStore.write

    def full(self, group, values, chain, draw):
        if draw >= 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, group, values, chain, draw)

    with monkeypatch.context() as patch:
        patch.setattr(DrawStore, "write", full)
        with pytest.raises(StoreError, match="No space left.*committed before is kept: make room.*resume=True"):
            ran(Store(tmp_path / "a", checkpoint_draws=1))
    assert threading.active_count() == 1 or not [t for t in threading.enumerate() if t.name == "bnn-store"]
    assert bnn.to_arviz(tmp_path / "a")["posterior"].sizes["draw"] == 5
    stored.assert_same(whole, ran(tmp_path / "a", resume=True))


def test_files_that_may_not_grow(tmp_path):
    """A limit of the operating system on the size of files, which checkpoints meet first."""
    cut(tmp_path / "a", 12)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
    try:
        with pytest.raises(StoreError, match="File too large.*see to the disk"):
            ran(Store(tmp_path / "a", checkpoint_draws=1), resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    stored.assert_same(ran(tmp_path / "whole"), ran(tmp_path / "a", resume=True))


def test_a_read_only_disk(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(StoreError, match="no store can be made at .*Read-only file system"):
        ran(tmp_path / "a")


def chunk(path, name="weight", number=0) -> Path:
    return path / "posterior" / name / "c" / "1" / str(number) / "0"


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def garble(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 16
    file.write_bytes(data)


DAMAGES = {"truncated": truncate, "garbled": garble, "missing": Path.unlink}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_chunk(name, tmp_path):
    """One after the checkpoint before the last is drawn again; for an older one there is nothing to go on from."""
    whole = ran(tmp_path / "whole")
    path = tmp_path / "a"
    cut(path, 8 + 8, every=8 + 5)  # checkpoints at 5 draws and at 8, in the second block
    DAMAGES[name](chunk(path, number=1))
    if name != "missing":
        with pytest.raises(RuntimeError, match="cannot be read in posterior/weight"):
            bnn.predict(path, DATA[0], model=net)
    with pytest.warns(RuntimeWarning, match="chain 1 from number 5 on are damaged or missing in posterior/w.*at 5"):
        stored.assert_same(whole, ran(path, resume=True))
    DAMAGES[name](chunk(path))
    with pytest.raises(RuntimeError, match="chain 1 from number 0 on .* no checkpoint is left before that"):
        ran(path, resume=True)


@pytest.mark.parametrize("name", ["truncated", "garbled"])
def test_a_damaged_checkpoint(name, tmp_path):
    whole = ran(tmp_path / "whole")
    path = tmp_path / "a"
    cut(path, 8 + 8, every=8 + 5)
    DAMAGES[name](path / "checkpoints" / "writer-0")
    with pytest.warns(RuntimeWarning, match="last checkpoint cannot be read .*truncated or damaged.*at 5 draws"):
        stored.assert_same(whole, ran(path, resume=True))
    for file in (path / "checkpoints").glob("writer-0*"):
        garble(file)
    with pytest.raises(RuntimeError, match="cannot be resumed: its last checkpoint cannot be read"):
        ran(path, resume=True)
    assert bnn.to_arviz(path)["posterior"].sizes["draw"] == 12
