"""A store of draws: what it costs while sampling, how long resuming takes, and the memory of a run.

    python tests/benchmarks/store.py [--quick] [--rounds 5]

Each measurement is a process of its own, on one thread for the chain. Overhead: seconds of sampling of SGHMC on the net
M of `nets.py` with a store over seconds without, in pairs of one round, from the first draw to the last: of the clock,
of the processor in the chain's thread, and of the processor in all threads, the background writer's too.
Memory: by how much the peak of a process grew over a run of 10^6 parameters by 200 draws, 0.8 GB, beside
`pyro.infer.MCMC` with the same kernel and with the draws in memory; and over a report and other figures of that store.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

os.environ["OMP_NUM_THREADS"] = "1"

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
from nets import CASES  # noqa: E402
from pyro.infer import MCMC as PyroMCMC  # noqa: E402

import bnn  # noqa: E402
from bnn import Store  # noqa: E402
from bnn.kernels import MCMC, SGHMC, SGLD  # noqa: E402

CLOCKS = ("seconds", "seconds of the chain's thread", "seconds of all threads")


def million() -> None:
    """A target of 10^6 coordinates whose gradient costs next to nothing."""
    pyro.sample("z", dist.Normal(torch.zeros(1_000_000), 1.0).to_event(1))


def net(draws: int, store: Store | None, resume: bool = False) -> dict[str, float]:
    """SGHMC on M with ten steps a draw."""
    case, seen = CASES["M"], []
    kernel = SGHMC(case.model(), step_size=case.step_size, friction=1.0, steps_per_sample=10, compile="fx")

    def hook(*_: object) -> None:
        seen.append((time.perf_counter(), time.thread_time(), time.process_time()))

    mcmc = MCMC(kernel, draws, 1, store=store, resume=resume, disable_progbar=True, hook_fn=hook)
    start = time.perf_counter()
    mcmc.run(*case.data)
    found = {"whole": time.perf_counter() - start}
    if seen:
        found |= {name: last - first for name, first, last in zip(CLOCKS, seen[1], seen[-1], strict=True)}
    return found


def memory(who: str, draws: int, folder: str) -> dict[str, float]:
    """Growth of the peak of memory in MiB."""
    pyro.set_rng_seed(0)
    kernel = SGLD(million, step_size=1e-3, compile="fx")
    for count in (5, draws):  # a small run first
        settings = {"num_samples": count, "warmup_steps": 1, "disable_progbar": True}
        if who == "pyro.infer.MCMC":
            mcmc = PyroMCMC(kernel, **settings)
        else:
            mcmc = MCMC(kernel, **settings, store=f"{folder}/{count}" if who == "store" else None)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        mcmc.run()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MiB": (peak - before) / 1024, "peak": peak / 1024, "cpu": time.process_time() - start}


READERS = {
    "bnn.report(path)": lambda path: bnn.report(path, f"{path}.html"),
    "bnn.efficiency(path)": bnn.efficiency,
    "bnn.equipartition(path)": bnn.equipartition,
}


def reading(what: str, draws: int, folder: str) -> dict[str, float]:
    """The same of what reads a store of 10^6 coordinates by so many draws."""
    for count in (5, draws):
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        READERS[what](f"{folder}/{count}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"MiB": (peak - before) / 1024, "peak": peak / 1024, "cpu": time.process_time() - start}


def measure(what: str, draws: int, folder: str) -> dict[str, float]:
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    if what == "memory only":
        return net(draws, None)
    if what == "on a store":
        return net(draws, Store(f"{folder}/m"))
    if what == "resumed":
        net(draws, Store(f"{folder}/m"))
        return net(draws, Store(f"{folder}/m"), resume=True)
    return reading(what, draws, folder) if what in READERS else memory(what, draws, folder)


def child(what: str, draws: int, kept: str | None = None) -> dict[str, float]:
    folder = kept or tempfile.mkdtemp()
    try:
        command = [sys.executable, "-W", "ignore", __file__, "--one", what, str(draws), folder]
        result: dict[str, float] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return result
    finally:
        if kept is None:
            shutil.rmtree(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=100, help="of the net M; of the million, twice as many")
    parser.add_argument("--quick", action="store_true", help="5 draws, one round: to see that it runs")
    parser.add_argument("--one", nargs=3, metavar=("WHAT", "DRAWS", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        what, draws, folder = options.one
        print(json.dumps(measure(what, int(draws), folder)))
        return
    if options.quick:
        options.draws, options.rounds = 5, 1
    ratios: dict[str, list[float]] = {name: [] for name in CLOCKS}
    for _ in range(options.rounds):
        plain, kept = child("memory only", options.draws), child("on a store", options.draws)
        for name, values in ratios.items():
            values.append(kept[name] / plain[name])
    print("| M, ten steps a draw | with a store / without | rounds |\n|---|---:|---|")
    for name, values in ratios.items():
        print(f"| {name} | {statistics.median(values):.3f} | {', '.join(f'{v:.3f}' for v in sorted(values))} |")
    resumed = child("resumed", options.draws)
    print(f"\nResuming at the end of {options.draws} draws of M: {resumed['whole']:.2f} s.\n")
    print("| 10^6 parameters | draws | growth of the peak, MiB | peak, MiB | CPU s |\n|---|---:|---:|---:|---:|")
    for who in ("pyro.infer.MCMC", "draws in memory", "store"):
        for draws in (2 * options.draws, 4 * options.draws) if who == "store" else (2 * options.draws,):
            found = child(who, draws)
            print(f"| {who} | {draws} | {found['MiB']:.0f} | {found['peak']:.0f} | {found['cpu']:.1f} |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        draws = 2 * options.draws
        child("store", draws, folder)
        for who in READERS:
            found = child(who, draws, folder)
            print(f"| {who} | {draws} | {found['MiB']:.0f} | {found['peak']:.0f} | {found['cpu']:.1f} |", flush=True)


if __name__ == "__main__":
    main()
