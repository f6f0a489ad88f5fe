"""Bytes per parameter: how far the memory of a process grows over a run of each kernel and guide.

    python tests/benchmarks/memory.py [--quick] [--parameters 1000000 10000000] [--only NAME ...] [--csv FILE]

Each row is a process of its own, on one thread. It first does the same on a small net, so that every module is loaded,
then makes the data of the large one; from there on the growth of its resident memory is counted: the highest point of
setup (for guides the first step, which sets up), the highest point of three draws of two steps each (for guides, of
three more steps), and what is held at the end, when all that can be freed was handed back. `vectors` is the highest
point of the draws in vectors of single precision as long as the parameters.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402
from nets import Case, perceptron  # noqa: E402
from pyro.infer import SVI, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoDelta, AutoNormal  # noqa: E402
from tables import show  # noqa: E402

from bnn import guides  # noqa: E402
from bnn import kernels as k  # noqa: E402

SMALL = 2_000  # parameters of the net that loads the modules
Start = Callable[[Case], Callable[[], Any]]  # makes what runs, and gives what makes it go on

# A step size and a friction with which nothing goes anywhere.
SLOW: dict[str, Any] = {"step_size": 1e-6, "friction": 1.0}


def kernel(kind: type, *, masses: bool = False, **settings: Any) -> Start:
    """Draws of a kernel, two steps each."""

    def start(case: Case) -> Callable[[], Any]:
        own = {"mass": torch.ones(sum(case.sizes))} if masses else {}
        made = kind(case.model(), **{"compile": "fx", "steps_per_sample": 2, **settings, **own})
        made.num_chains, made.num_samples = 1, 3
        made.setup(0, *case.data)
        return made.advance

    return start


def guide(kind: type, optimizer: Callable[[], Any], elbo: Callable[[], Any], **settings: Any) -> Start:
    """Steps of SVI; SWAG collects each."""

    def start(case: Case) -> Callable[[], Any]:
        model = case.model()
        own = {"num_data": case.rows} if kind is guides.AutoIVON else {}
        made = kind(model, **settings, **own)
        svi = SVI(model, made, optimizer(), elbo())
        svi.step(*case.data)

        def step() -> None:
            svi.step(*case.data)
            if isinstance(made, guides.AutoSWAG):
                made.collect()

        return step

    return start


def adam() -> Any:
    return pyro.optim.Adam({"lr": 1e-6})


def sgd() -> Any:
    return pyro.optim.SGD({"lr": 1e-12})


NATURAL = (guides.NaturalGradientDescent, guides.TraceNaturalGradient_ELBO)
CYCLES = k.CosineCycles(1e-6, 6)
ROWS: dict[str, Start] = {
    "SGLD": kernel(k.SGLD, step_size=1e-10),
    "SGHMC": kernel(k.SGHMC, **SLOW),
    "SGHMC, masses": kernel(k.SGHMC, masses=True, **SLOW),
    "SGHMC, obabo": kernel(k.SGHMC, integrator="obabo", **SLOW),
    "norm-adjusted": kernel(k.NormAdjustedSGHMC, resample_every=2, **SLOW),
    "SGNHT": kernel(k.SGNHT, **SLOW),
    "SGNHT, per coordinate": kernel(k.SGNHT, thermostat="per_coordinate", **SLOW),
    "cyclical SGLD": kernel(k.CyclicalSGLD, step_size=1e-10, cycle_length=6),
    "cyclical SGHMC": kernel(k.CyclicalSGHMC, cycle_length=6, **SLOW),
    "GGMC": kernel(k.GGMC, **SLOW),
    "AMAGOLD": kernel(k.AMAGOLD, num_steps=2, **SLOW),
    "MaSDE, diagonal": kernel(k.MaSDE, step_size=1e-10, diffusion=torch.ones_like),
    "ConstantSGD": kernel(k.ConstantSGD, step_size=1e-10),
    "SGLD, inductor": kernel(k.SGLD, step_size=1e-10, compile="inductor"),
    "SGHMC, inductor": kernel(k.SGHMC, **SLOW, compile="inductor"),
    "AutoNormal, Adam (Pyro)": guide(AutoNormal, adam, Trace_ELBO, init_scale=1e-3),
    "AutoFactorizedNormal": guide(guides.AutoFactorizedNormal, *NATURAL, init_scale=1e-3),
    "AutoMatrixNormal": guide(guides.AutoMatrixNormal, *NATURAL, init_scale=1e-3),
    "AutoEigenNormal": guide(guides.AutoEigenNormal, *NATURAL, init_scale=1e-3),
    "K-FAC": guide(AutoDelta, *NATURAL),
    "AutoSWAG, rank 3": guide(guides.AutoSWAG, sgd, guides.TraceEnsemble_ELBO, rank=3),
    "AutoEnsemble, 1 member, Adam": guide(guides.AutoEnsemble, adam, guides.TraceEnsemble_ELBO, members=1),
    "AutoEnsemble, 4 members, Adam": guide(guides.AutoEnsemble, adam, guides.TraceEnsemble_ELBO, members=4),
    "AutoRankOne, 1 member, Adam": guide(guides.AutoRankOne, adam, guides.TraceEnsemble_ELBO),
    "AutoDropout, 8 masks, Adam": guide(guides.AutoDropout, adam, guides.TraceDropout_ELBO),
    "AutoIVON": guide(guides.AutoIVON, guides.IVON, guides.TraceEnsemble_ELBO),
}


def resident() -> tuple[int, int]:
    """Highest and present resident memory of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    high, now = (int(re.findall(rf"{name}:\s+(\d+) kB", status)[0]) for name in ("VmHWM", "VmRSS"))
    return 1024 * high, 1024 * now


def settle() -> None:
    """Free what can be freed, and count the highest point from here on."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def measure(name: str, parameters: int) -> dict[str, float]:
    torch.set_num_threads(1)
    pyro.set_rng_seed(0)
    warm = ROWS[name](perceptron(SMALL, rows=128))
    warm()
    del warm
    pyro.clear_param_store()
    case = perceptron(parameters, rows=128)
    _ = case.data
    settle()
    _, before = resident()
    go_on = ROWS[name](case)
    setup, _ = resident()
    settle()
    go_on()
    started = time.process_time()
    go_on()
    seconds = time.process_time() - started
    go_on()
    peak, _ = resident()
    settle()
    _, held = resident()
    count = sum(case.sizes)
    found = {"setup": setup, "running": peak, "held": held}
    return {"parameters": count, **{key: (value - before) / count for key, value in found.items()}, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three rows at 10^5 parameters: to see that it runs")
    parser.add_argument("--parameters", nargs="+", type=int, default=[1_000_000, 10_000_000])
    parser.add_argument("--only", nargs="+", choices=list(ROWS), metavar="NAME")
    parser.add_argument("--csv", type=Path, help="write the table to this file, too")
    parser.add_argument("--one", nargs=2, metavar=("NAME", "PARAMETERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        name, parameters = options.one
        print(json.dumps(measure(name, int(parameters))))
        return
    if not np.lib.stride_tricks or not Path("/proc/self/clear_refs").exists():
        print(
            "resident memory is read from /proc, which this system does not have: nothing is measured.", file=sys.stderr
        )
        return
    names, sizes = options.only or list(ROWS), options.parameters
    if options.quick:
        names, sizes = ["SGLD", "SGHMC", "AutoFactorizedNormal"], [100_000]
    rows = []
    for size in sizes:
        for name in names:
            command = [sys.executable, "-W", "ignore", __file__, "--one", name, str(size)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"{name} at {size} parameters failed: left out.", file=sys.stderr)
                continue
            found = json.loads(done.stdout)
            rows.append({"what": name, **found, "vectors": found["running"] / 4})
            print(rows[-1], file=sys.stderr, flush=True)
    show(rows, options.csv)


if __name__ == "__main__":
    main()
