"""Posterior predictive of many draws: bnn.predict beside pyro.infer.Predictive, seconds and memory.

    python tests/benchmarks/prediction.py [--quick] [--cases S M C] [--draws 1000] [--rounds 3]

Each measurement is a process of its own, on one thread: seconds of processor time, and by how much the peak of its
memory grew. `bnn.predict` gives mean, sd and their parts, or probabilities and entropies; `Predictive` one sample of y
for each draw. Draws are iid, a twentieth of the prior's scale.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time

os.environ["OMP_NUM_THREADS"] = "1"

import pyro  # noqa: E402
import pyro.distributions as dist  # noqa: E402
import torch  # noqa: E402
from nets import CASES, SIGMA  # noqa: E402
from pyro.infer import Predictive  # noqa: E402

import bnn  # noqa: E402

ROWS = {"S": (100, 10_000), "M": (100, 10_000), "C": (100,)}


def problem(case_name: str, draws: int, rows: int):
    """A Pyro model of the net, draws of its weights, inputs."""
    case = CASES[case_name]

    def model(x, y=None):
        weights = [
            pyro.sample(site, dist.Normal(0.0, 1.0).expand(shape).to_event(len(shape)))
            for site, shape in zip(case.sites, case.shapes, strict=True)
        ]
        with pyro.plate("data", len(x)):
            out = case.forward(weights, x)
            law = dist.Normal(out.squeeze(-1), SIGMA) if case_name == "S" else dist.Categorical(logits=out)
            pyro.sample("y", law, obs=y)

    torch.manual_seed(0)
    values = {s: 0.05 * torch.randn(draws, *shape) for s, shape in zip(case.sites, case.shapes, strict=True)}
    inputs = torch.from_numpy(case.arrays[0])
    return model, values, inputs.repeat(-(-rows // len(inputs)), *[1] * (inputs.dim() - 1))[:rows]


def measure(who: str, case: str, draws: int, rows: int) -> dict[str, float]:
    """Seconds of processor time and growth of the peak of memory, in MiB, of one call after a small one."""
    torch.set_num_threads(1)
    model, values, x = problem(case, draws, rows)
    few = {name: value[:2] for name, value in values.items()}
    if who == "bnn.predict":
        bnn.predict(few, x[:2], model=model)
    else:
        Predictive(model, few)(x[:2])
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    if who == "bnn.predict":
        bnn.predict(values, x, model=model)
    else:
        Predictive(model, values)(x)
    seconds = time.process_time() - start
    return {"seconds": seconds, "MiB": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(ROWS), default=["S", "M"])
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="20 draws, one round, 100 rows: to see that it runs")
    parser.add_argument("--one", nargs=4, metavar=("WHO", "CASE", "DRAWS", "ROWS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        who, case, draws, rows = options.one
        print(json.dumps(measure(who, case, int(draws), int(rows))))
        return
    if options.quick:
        options.draws, options.rounds = 20, 1
    print("| net | draws | rows | bnn.predict, s | MiB | Predictive, s | MiB | Predictive / bnn.predict |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for case in options.cases:
        for rows in ROWS[case][:1] if options.quick else ROWS[case]:
            found: dict[str, list[dict[str, float]]] = {"bnn.predict": [], "Predictive": []}
            for _ in range(options.rounds):
                for who, results in found.items():
                    command = [sys.executable, __file__, "--one", who, case, str(options.draws), str(rows)]
                    results.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
            ours, theirs = found.values()
            ratio = statistics.median(b["seconds"] / a["seconds"] for a, b in zip(ours, theirs, strict=True))
            cells = [
                f"{statistics.median(r[key] for r in results):.3g}"
                for results in (ours, theirs)
                for key in ("seconds", "MiB")
            ]
            print(f"| {case} | {options.draws} | {rows} | {' | '.join(cells)} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
