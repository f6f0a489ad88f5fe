"""Chains and data over ranks: seconds a step on one process and on several, and what an all-reduce takes.

    python tests/benchmarks/ranks.py [--quick] [--ranks 2] [--steps 200] [--rounds 3]

The net has 784-H-10 units on minibatches of 512 of 4,000 made-up images; every process has one thread. "Chains": the
same number of chains on one process and shared out, seconds of sampling. "Data": one chain, whose minibatch is shared
out. "Guide": a step of AutoMatrixNormal, statistics and inverses included. An all-reduce of so many bytes by itself
gives latency and bandwidth for the model in the docstring of bnn/ranks.py. Milliseconds by the clock and, where other
work disturbs it, of processor time, of the slowest rank; the gain is that in processor time.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
import torch.distributed  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from pyro.infer import SVI  # noqa: E402

from bnn.guides import AutoMatrixNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO  # noqa: E402
from bnn.kernels import MCMC, SGHMC  # noqa: E402
from bnn.ranks import Ranks  # noqa: E402

ROWS, BATCH, CHAINS = 4000, 512, 4
HIDDEN = (20, 200)


def problem(hidden: int):
    """A model and its data."""

    def model(x, y):
        w0 = pyro.sample("w0", dist.Normal(torch.zeros(hidden, 784), 1 / 28).to_event(2))
        w1 = pyro.sample("w1", dist.Normal(torch.zeros(10, hidden), 0.2).to_event(2))
        with pyro.plate("data", ROWS, subsample_size=BATCH) as rows:
            pyro.sample("y", dist.Categorical(logits=F.linear(torch.relu(F.linear(x[rows], w0)), w1)), obs=y[rows])

    generator = torch.Generator().manual_seed(0)
    return model, torch.randn(ROWS, 784, generator=generator), torch.randint(10, (ROWS,), generator=generator)


def now() -> tuple[float, float]:
    """The clock's and this process's seconds."""
    return time.perf_counter(), time.process_time()


def since(start: tuple[float, float], count: int) -> list[float]:
    """The same for each of so many steps since then."""
    return [(b - a) / count for a, b in zip(start, now(), strict=True)]


def sampling(ranks: str | None, hidden: int, chains: int, steps: int) -> list[float]:
    """Seconds a step."""
    model, x, y = problem(hidden)
    kernel = SGHMC(model, step_size=1e-3, friction=10.0, steps_per_sample=10, compile="fx")
    draws, times = max(steps // 10, 2), []
    mcmc = MCMC(
        kernel, draws, 1, num_chains=chains, disable_progbar=True, ranks=ranks, save_params=["w1"],
        hook_fn=lambda kernel, params, stage, i: times.append(now()),
    )  # fmt: skip
    pyro.set_rng_seed(0)
    mcmc.run(x, y)
    return [(b - a) / (10 * (draws - 1)) for a, b in zip(times[1], times[-1], strict=True)]


def training(ranks: str | None, hidden: int, steps: int) -> list[float]:
    """Seconds a step."""
    model, x, y = problem(hidden)
    pyro.clear_param_store()
    svi = SVI(model, AutoMatrixNormal(model), NaturalGradientDescent(), TraceNaturalGradient_ELBO(ranks=ranks))
    svi.step(x, y)
    svi.step(x, y)
    start = now()
    for _ in range(steps):
        svi.step(x, y)
    return since(start, steps)


def all_reduce(numbers: int, count: int) -> list[float]:
    """Seconds of the mean over ranks of so many numbers."""
    ranks, value = Ranks(), torch.zeros(numbers)
    ranks.mean([value])
    start = now()
    for _ in range(count):
        ranks.mean([value])
    return since(start, count)


def measure(what: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """All of one kind, on one process or on this rank."""
    alone, found = "RANK" not in os.environ, {}
    for hidden in options.hidden:
        if what == "chains":
            found[f"H={hidden}"] = sampling(None if alone else "chains", hidden, CHAINS, options.steps)
        elif what == "data":
            found[f"H={hidden}"] = sampling(None if alone else "data", hidden, 1, options.steps)
        else:
            found[f"H={hidden}"] = training(None if alone else "data", hidden, max(options.steps // 10, 2))
    if not alone and what == "data":
        found |= {f"{4 * n} bytes": all_reduce(n, max(options.steps, 10)) for n in (1, 16_000, 160_000, 1_600_000)}
    return found


def ranks_of(count: int, what: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """The measurements of ``count`` processes; those of the slowest."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, __file__, "--one", what, "--steps", str(options.steps)]
    command += ["--hidden", *map(str, options.hidden)]
    several = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    children = []
    for rank in range(count):
        own = {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        children.append(subprocess.Popen(command, env={**os.environ, **own}, stdout=subprocess.PIPE, text=True))
    results = [json.loads(child.communicate()[0].splitlines()[-1]) for child in children]
    return {name: list(map(max, zip(*(r[name] for r in results), strict=True))) for name in results[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, nargs="+", default=HIDDEN)
    parser.add_argument("--quick", action="store_true", help="20 steps, one round, the small net: to see that it runs")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(measure(options.one, options)))
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    if options.quick:
        options.steps, options.rounds, options.hidden = 20, 1, HIDDEN[:1]
    print(f"| what | case | one process, ms | its processor ms | {options.ranks} ranks, ms | processor ms | gain |")
    print("|---|---|---:|---:|---:|---:|---:|")
    for what in ("chains", "data", "guide"):
        rounds = [[ranks_of(count, what, options) for count in (1, options.ranks)] for _ in range(options.rounds)]
        for name in rounds[0][1]:
            times = [
                [statistics.median(pair[k].get(name, [0, 0])[j] for pair in rounds) for j in (0, 1)] for k in (0, 1)
            ]
            cells = " | ".join(f"{1e3 * t:.3g}" if t else "" for pair in times for t in pair)
            gain = times[0][1] / times[1][1]
            print(
                f"| {what if gain else 'all-reduce'} | {name} | {cells} | {f'{gain:.2f}' if gain else ''} |", flush=True
            )


if __name__ == "__main__":
    main()
