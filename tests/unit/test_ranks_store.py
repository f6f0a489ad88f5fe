"""Several ranks on one store: cut short, killed and resumed, bit for bit the run that was not."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bnn
from bnn.kernels import _stored_run
from bnn.kernels._ranks import ChainsOverRanks, DataOverRanks
from bnn.store_progress import cost_of_all, seen
from support import rank_stores
from support.rank_processes import ranks_of

SCRIPT = Path(rank_stores.__file__)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("stores")


# What needs the processes of ``two`` takes half a minute on each worker: slow.
with_two_ranks = pytest.mark.slow


@pytest.fixture(scope="module")
def two(folder):
    steps = ("chains", "data", "behind", "stop", "refused", "killed")  # the last ends the ranks
    return ranks_of(SCRIPT, 2, str(folder), *steps, dying={1}, QUICK="1", OMP_NUM_THREADS="1")


@with_two_ranks
@pytest.mark.parametrize("name", ["vectorized", "sequential"])
def test_chains_over_ranks_resume(two, name):
    """Each rank was cut at another draw; the store ends as that of the whole run, and as memory does."""
    first, second = (two[name][rank] for rank in (0, 1))
    assert first == second
    assert first["again"] == first["whole"] == first["memory"]
    assert first["seen"] == ([3, 5] if name == "vectorized" else [1, 9])  # as far as the slowest rank has come
    assert first["committed"] == [3, 12] and first["predicted"] == [3 * 12, 13]
    assert first["gradients"] == [3 * 12, 3 * 12] and first["in_store"] == 3 * 12


@with_two_ranks
@pytest.mark.parametrize("name", ["rows", "loader"])
def test_data_over_ranks_resume(two, name):
    first, second = (two[name][rank] for rank in (0, 1))
    assert first == second and first["committed"] == [3, 12]
    assert first["again"] == first["whole"] == first["memory"]


@with_two_ranks
def test_ranks_go_on_from_what_all_of_them_have(two):
    whole = two["rows"][0]["whole"]
    assert two["behind"] == {rank: {"one": whole, "all": whole} for rank in (0, 1)}


def test_no_rank_is_two_checkpoints_ahead():
    """Of two that each keeps, one must be common: the next waits until the last is on disk everywhere."""
    sharing = object.__new__(DataOverRanks)
    sharing.ranks = SimpleNamespace(largest=lambda numbers, what: numbers)
    assert sharing.agree(True, False, 2) == (True, 2) and sharing.agree(True, True, 2) == (False, 2)
    assert sharing.agree(False, False, 0) == (False, 0)


def test_several_ranks_need_locks(alone, monkeypatch):
    monkeypatch.setattr("bnn.draw_store.fcntl", None)
    with pytest.raises(NotImplementedError, match="several ranks cannot write one store on this system, which has no"):
        rank_stores.run("chains", "unlocked", num_chains=1)


@with_two_ranks
def test_an_interrupt_of_one_rank_stops_all_at_one_draw(two):
    first, second = (two["stop"][rank] for rank in (0, 1))
    assert first == second and first["committed"] == [3, first["draws"]] and 7 <= first["draws"] < 12
    assert first["again"] == two["rows"][0]["whole"]


MESSAGES = {
    "exists": "ValueError: {}/stopped exists: give resume=True",
    "other": "ValueError: {}/stopped holds a run of other settings: ranks was data and is chains.",
    "no place": "StoreError: no store can be made at {}/stopped/zarr.json/x",
}


@with_two_ranks
@pytest.mark.parametrize("name", MESSAGES)
def test_what_is_refused_is_refused_on_every_rank(two, folder, name):
    for rank in (0, 1):
        assert two[name][rank]["message"].startswith(MESSAGES[name].format(folder)), two[name][rank]


@with_two_ranks
def test_a_killed_rank_ends_the_others_and_the_run_goes_on(two, folder):
    found = two["killed"][0]
    assert found["message"].startswith("RankError: rank 0 of 2 could not")
    assert "Another rank has ended or hangs" in found["message"] and "--max-restarts" in found["message"]
    assert found["committed"][0] == 3 and 0 < found["committed"][1] < 9
    again = ranks_of(SCRIPT, 2, str(folder), "resumed", OMP_NUM_THREADS="1")["resumed"]
    assert again[0] == again[1] == {"again": two["rows"][0]["whole"]}


@pytest.fixture
def alone(monkeypatch, folder):
    """One rank in this process."""
    monkeypatch.setattr(rank_stores, "FOLDER", folder)
    monkeypatch.setattr(_stored_run, "BLOCK_DRAWS", 5)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@with_two_ranks
def test_fewer_ranks_go_on_with_the_chains(two, alone, folder):
    mcmc = rank_stores.run("chains", "left", seed=99)
    assert rank_stores.digest(mcmc) == two["vectorized"][0]["whole"]
    assert mcmc.run_facts["gradient_evaluations"] == 3 * 12
    assert (
        rank_stores.digest(rank_stores.run("chains", "sequential cut", chain_method="sequential"))
        == (two["sequential"][0]["whole"])
    )


@with_two_ranks
def test_other_numbers_of_ranks_that_cannot_go_on(two, alone):
    with pytest.raises(ValueError, match="shares rows out over 2 ranks, and there are 1 ranks now: start as many"):
        rank_stores.run("data", "rows cut")
    sharing = object.__new__(ChainsOverRanks)
    sharing.ranks, sharing.rank = SimpleNamespace(size=3), 0
    known = {"parts": [[0, 1], [1, 3]], "seed of all chains": 1}
    with pytest.raises(ValueError, match="in 2 groups, as the run was begun on 2 ranks, and there are 3 ranks now"):
        sharing.start([range(3)], known)


def test_what_readers_see():
    progress = {"0": {"draws": 9}, "1": {"draws": 7}, "2": {"draws": 9}}
    every = {"parts": [[0, 2], [2, 4]], "progress": progress}
    assert seen({**every, "in_turn": False}, 9) == (4, 7)
    assert seen({"parts": [[0, 2]] * 4, "progress": progress, "in_turn": False}, 9) == (2, 0)  # one has none yet
    chains = {"parts": [[0, 1], [1, 2], [2, 3]], "in_turn": True}
    assert seen({**chains, "progress": progress}, 9) == (1, 9)
    assert seen({**chains, "progress": {"0": {"draws": 4}}}, 9) == (1, 4)
    assert seen({**chains, "progress": {**progress, "1": {"draws": 9}}}, 9) == (3, 9)
    cost = {"setup_time": 1.0, "warmup_time": 0.0, "sampling_time": 2.0, "gradient_evaluations": 5}
    entries = [{"draws": 3, "process": process, **cost} for process in (0, 0, 1)] + [{"draws": 3}]
    assert cost_of_all(entries) == {
        "setup_time": 2.0, "warmup_time": 0.0, "sampling_time": 4.0, "gradient_evaluations": 15
    }  # fmt: skip


@pytest.mark.slow
def test_three_ranks_with_labels_of_their_own(tmp_path):
    found = ranks_of(SCRIPT, 3, str(tmp_path), "chains", "data", "behind", OMP_NUM_THREADS="1")
    for name in ("vectorized", "sequential", "rows", "loader", "labels"):
        entries = list(found[name].values())
        assert len(entries) == 3 and all(entry == entries[0] for entry in entries)
        assert entries[0]["again"] == entries[0]["whole"] == entries[0]["memory"], name
    assert {value for entry in found["behind"].values() for value in entry.values()} == {found["rows"][0]["whole"]}


# ---- torchrun


def torchrun(folder, count, mode, name, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    environment = {"PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1", "MODE": mode, "NAME": name}
    return subprocess.Popen(
        [*command, f"--max-restarts={restarts}", str(SCRIPT), str(folder), "elastic"],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def committed(path):
    """Draws that readers see."""
    try:
        return bnn.to_arviz(path)["posterior"].sizes["draw"]
    except (RuntimeError, ValueError):  # nothing yet
        return 0


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "count"), [("chains", 2), ("data", 2), ("chains", 3), ("data", 3)])
def test_torchrun_restarts_what_is_killed(mode, count, tmp_path):
    """A rank is killed by SIGKILL at random moments of several attempts; the last attempt ends as the whole run."""
    whole = torchrun(tmp_path, count, mode, "whole")
    output = whole.communicate(timeout=300)[0]
    assert whole.returncode == 0, output[-3000:]
    kills, pick = 5, random.Random(count)
    run = torchrun(tmp_path, count, mode, "killed", kills)
    reached = [0]

    def until(reason, found):
        deadline = time.monotonic() + 200
        while not found():
            assert time.monotonic() < deadline and run.poll() is None, reason
            time.sleep(0.02)

    for attempt in range(kills):
        rank = pick.randrange(count)
        file = tmp_path / f"pid killed {attempt} {rank}"
        until(f"attempt {attempt} did not begin", lambda file=file: file.exists() and file.read_text())
        if attempt >= 2:  # the first come in set-up and warm-up, or wherever
            until("no draw is added", lambda: committed(tmp_path / "killed") > reached[-1])
        time.sleep(pick.uniform(0.0, 1.0))
        reached.append(committed(tmp_path / "killed"))
        os.kill(int(file.read_text()), signal.SIGKILL)
    output = run.communicate(timeout=300)[0]
    assert run.returncode == 0, output[-3000:]
    assert reached == sorted(reached) and 0 < reached[-1] < 300, reached  # what was committed stays
    digests = {
        (tmp_path / f"digest {name} {rank}").read_text() for name in ("whole", "killed") for rank in range(count)
    }
    assert len(digests) == 1
