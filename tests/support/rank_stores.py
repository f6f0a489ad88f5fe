"""Runs on a store by several ranks, cut short, killed and resumed: ``python rank_stores.py FOLDER STEP...``.

Started by ``test_ranks_store.py`` with torchrun's environment variables.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import pyro
import torch
import torch.distributed
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import Store
from bnn.kernels import MCMC, SGHMC, Kronecker, _stored_run
from bnn.ranks import Ranks
from support import stored
from support.rank_checks import X, Y, message, net, net_of_given_rows

FOLDER = Path(sys.argv[1]) if __name__ == "__main__" else Path()
DRAWS, WARMUP = 12, 6


def report(name, **found):
    print(json.dumps({"name": name, "rank": Ranks().rank, **found}), flush=True)


def digest(mcmc):
    """Of all draws and statistics, bit for bit, and of what is said of the chains."""
    found = hashlib.sha1(str(mcmc.diagnostics()["divergences"]).encode())
    for tensors in (mcmc.get_samples(group_by_chain=True), mcmc.sample_stats):
        for name in sorted(tensors):
            found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def run(ranks, path, *, case="rows", every=3, seed=5, **options):
    """A run on the store at a path below the folder."""
    pyro.set_rng_seed(seed)
    settings = {"step_size": 0.02, "friction": 5.0, "compile": "handlers"}
    kwargs: dict = {"size": 12}
    args = (X, Y)
    if case == "loader":  # whose order and position are each rank's own
        own = Ranks()
        mine = slice(own.rank * 12 // own.size, (own.rank + 1) * 12 // own.size)
        generator = torch.Generator().manual_seed(own.rank)
        batches = DataLoader(TensorDataset(X[:12][mine], Y[:12][mine]), 2, shuffle=True, generator=generator)
        kernel, args, kwargs = SGHMC(net_of_given_rows, **settings, batches=batches), (), {}
    elif case == "labels":  # which each rank draws for its own rows
        kernel = SGHMC(net, **{**settings, "compile": "fx"}, mass=Kronecker())
    else:
        kernel = SGHMC(net, **settings)
    warmup = 24 if case == "labels" else WARMUP
    options = {"num_samples": DRAWS, "warmup_steps": warmup, "num_chains": 3, "disable_progbar": True, **options}
    store = None if path is None else Store(FOLDER / path, checkpoint_draws=every)
    mcmc = MCMC(kernel, ranks=ranks, store=store, resume=path is not None, **options)
    mcmc.run(*args, **kwargs)
    return mcmc


def cut(*arguments, after, **options):
    """The same, which an error of the hook ends."""
    try:
        run(*arguments, hook_fn=stored.cut_after(after), **options)
    except stored.Cut:
        torch.distributed.barrier()
        return
    raise AssertionError("it came to its end")


def committed(path):
    """Chains and draws that readers see."""
    return list(bnn.to_arviz(FOLDER / path)["posterior"]["w0"].shape[:2])


def chains():
    """Cut on each rank at another draw, and resumed; the same in a store and in memory."""
    own = Ranks().rank
    for method in ("vectorized", "sequential"):
        whole = run("chains", f"{method} whole", chain_method=method)
        cut("chains", f"{method} cut", after=WARMUP + (5 if own else 9), chain_method=method)
        seen = committed(f"{method} cut")
        torch.distributed.barrier()
        again = run("chains", f"{method} cut", seed=99, chain_method=method)
        report(
            method,
            seen=seen,
            whole=digest(whole),
            again=digest(again),
            memory=digest(run("chains", None, chain_method=method)),
            committed=committed(f"{method} cut"),
            gradients=[one.run_facts["gradient_evaluations"] for one in (whole, again)],
            in_store=int(bnn.to_arviz(FOLDER / f"{method} cut")["sample_stats"].attrs["gradient_evaluations"]),
            predicted=list(bnn.predict(FOLDER / f"{method} cut", X, Y, model=net, draws=True).draws.shape),
            after=float(torch.rand(())),
        )
    cut("chains", "left", after=WARMUP + (5 if own else 9))  # for another number of ranks


def data():
    """All ranks at the same draw; minibatches of all rows, then of a loader of each rank's own."""
    cases = ("rows", "loader") if "QUICK" in os.environ else ("rows", "loader", "labels")
    for case in cases:
        whole = run("data", f"{case} whole", case=case)
        for after in (4, WARMUP + 7):
            cut("data", f"{case} cut", case=case, after=after)
        again = run("data", f"{case} cut", case=case, seed=99)
        memory = run("data", None, case=case)
        shown = committed(f"{case} cut")
        report(case, whole=digest(whole), again=digest(again), memory=digest(memory), committed=shown)


def behind():
    """As after a kill between the writes of two ranks: rank 1 has not got the last checkpoint yet, or none at all."""
    found = {}
    for case in ("one", "all"):
        cut("data", f"behind {case}", after=WARMUP + 7)
        last = FOLDER / f"behind {case}" / "checkpoints" / "writer-1"
        if Ranks().rank == 1:
            os.replace(last.with_suffix(".before"), last)
            if case == "all":
                last.unlink()
        torch.distributed.barrier()
        found[case] = digest(run("data", f"behind {case}", seed=99 if case == "one" else 5))
    report("behind", **found)


def stop():
    """Ctrl-C on one rank: all stop at the same draw, and none is lost."""

    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 6) and Ranks().rank == 1:
            signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
    mcmc = run("data", "stopped", every=None, hook_fn=hook)
    report("stop", draws=mcmc.num_samples, committed=committed("stopped"), again=digest(run("data", "stopped")))


def refused():
    """What cannot be gone on with is said on every rank."""
    report("exists", message=message(lambda: MCMC(
        SGHMC(net, step_size=0.1, friction=1.0), 3, ranks="data", store=FOLDER / "stopped"
    ).run(X, Y)))  # fmt: skip
    report("other", message=message(lambda: run("chains", "stopped")))
    report("no place", message=message(lambda: run("chains", "stopped/zarr.json/x")))


def killed():
    """Rank 1 ends itself by SIGKILL at a draw; the others say so."""

    def hook(kernel, params, stage, i):
        if (stage, i) == ("Sample", 7) and Ranks().rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    found = message(lambda: run("data", "killed", hook_fn=hook))
    report("killed", message=found, committed=committed("killed"))
    os._exit(0)


def resumed():
    """After :func:`killed`."""
    report("resumed", again=digest(run("data", "killed", seed=99)))


def elastic():
    """One attempt under ``torchrun --max-restarts``; the test kills a process of it at some moment."""
    mode, name = os.environ["MODE"], os.environ["NAME"]
    attempt, rank = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"]
    (FOLDER / f"pid {name} {attempt} {rank}").write_text(str(os.getpid()))
    slow = {} if name == "whole" else {"hook_fn": lambda *_: time.sleep(0.02)}
    mcmc = run(mode, name, num_samples=300, warmup_steps=30, num_chains=Ranks().size + 1, every=5, **slow)
    (FOLDER / f"digest {name} {rank}").write_text(digest(mcmc))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    _stored_run.BLOCK_DRAWS = 5
    if "TIMEOUT" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=float(os.environ["TIMEOUT"])))
    for step in sys.argv[2:]:
        globals()[step]()
    torch.distributed.destroy_process_group()
