"""How the cost of a step grows with parameters, rows of a minibatch, and chains, beside that of its arithmetic.

    python tests/benchmarks/scaling.py [--quick] [--along parameters batch chains] [--csv FILE]

The net has two equal hidden layers. One thread; milliseconds of the processor per step, the least of some rounds, in
which all rows of a size take turns. `products` is the arithmetic that no step can be without: the three matrix products
of each layer (forward, gradient of the weights, gradient of the inputs, which the first layer does not need), by
themselves, in PyTorch, at the same sizes. `noise` is one standard normal number per parameter, by `normal_`. `over` is
a row's time over that of the products, for kernels of products and noise. `slope` is d log(time) / d log(size) from the
size before, beside that of the products. MiB: how far memory grows over two steps.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import pyro  # noqa: E402
import torch  # noqa: E402
from memory import resident, settle  # noqa: E402
from nets import Case, perceptron  # noqa: E402
from pyro.infer import SVI  # noqa: E402
from pyro.infer.autoguide import AutoDelta  # noqa: E402
from tables import show  # noqa: E402

from bnn.guides import (  # noqa: E402
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    TraceNaturalGradient_ELBO,
)
from bnn.kernels import SGHMC, SGLD  # noqa: E402

SIZES = {
    "parameters": [100, 1_000, 10_000, 100_000, 1_000_000, 10_000_000],
    "batch": [8, 32, 128, 512, 2048],
    "chains": [1, 4, 16, 64],
}
QUICK = {"parameters": [100, 1_000], "batch": [8], "chains": [4]}
# The net along whose rows of a minibatch and chains is gone.
PARAMETERS = {"batch": 100_000, "chains": 1_000}
# Factors of widths above a thousand take seconds a step.
LARGEST_MATRIX_NORMAL = 1_000_000
INTERVALS: dict[str, Any] = {"statistics_every": 10, "inverses_every": 20}
Step = Callable[[], Any]


def kernel(kind: type, case: Case, chains: int, **settings: Any) -> Step:
    """Bare steps: what lies between two draws."""
    made = kind(case.model(), **settings, compile="fx", steps_per_sample=2)
    made.num_chains, made.num_samples = chains, 10
    made.setup(0, *case.data)

    def step() -> None:
        with torch.no_grad():
            made._run.call(1, observed=False)

    return step


def guide(kind: type, case: Case) -> Step:
    """Steps of SVI."""
    model = case.model()
    made = kind(model) if kind is AutoDelta else kind(model, init_scale=1e-3)
    optimizer = NaturalGradientDescent(lr=1e-3, precision_lr=1e-3)
    svi = SVI(model, made, optimizer, TraceNaturalGradient_ELBO(**INTERVALS))
    return lambda: svi.step(*case.data)


def products(case: Case, chains: int) -> tuple[Step, float]:
    """The matrix products of a gradient, and their multiplications and additions."""
    weights = [torch.randn(shape) for shape in case.shapes[::2]]
    rows = [torch.randn(case.batch, shape[1]) for shape in case.shapes[::2]]
    grads = [torch.randn(case.batch, shape[0]) for shape in case.shapes[::2]]
    held = [
        (torch.empty_like(g), torch.empty_like(w), torch.empty_like(r))
        for g, w, r in zip(grads, weights, rows, strict=True)
    ]

    def step() -> None:
        for _ in range(chains):
            for layer, (w, r, g, (out, own, back)) in enumerate(zip(weights, rows, grads, held, strict=True)):
                torch.mm(r, w.t(), out=out)
                torch.mm(g.t(), r, out=own)
                if layer:
                    torch.mm(g, w, out=back)

    count = sum(2.0 * case.batch * w.numel() * (3 if layer else 2) for layer, w in enumerate(weights))
    return step, count * chains


def contenders(case: Case, chains: int, along: str) -> dict[str, Step]:
    size = sum(case.sizes)
    rows: dict[str, Step] = {
        "SGLD": kernel(SGLD, case, chains, step_size=1e-10),
        "SGHMC": kernel(SGHMC, case, chains, step_size=1e-6, friction=1.0),
    }
    if along != "chains":
        rows["factorized, 10/20"] = guide(AutoFactorizedNormal, case)
        if size <= LARGEST_MATRIX_NORMAL * 1.1:
            rows["matrix normal, 10/20"] = guide(AutoMatrixNormal, case)
            rows["K-FAC, 10/20"] = guide(AutoDelta, case)
    return rows


def timed(rows: dict[str, Step], seconds: float, rounds: int) -> dict[str, float]:
    """Least milliseconds of a step; guides in whole intervals of twenty."""
    units: dict[str, int] = {}
    for name, step in rows.items():
        each = 20 if "10/20" in name else 1
        for _ in range(2 if each == 1 else 21):
            step()
        start = time.process_time()
        for _ in range(each):
            step()
        once = max((time.process_time() - start) / each, 1e-6)
        units[name] = max(1, round(seconds / once / each)) * each
    best = dict.fromkeys(rows, math.inf)
    for _ in range(rounds):
        for name, step in rows.items():
            start = time.process_time()
            for _ in range(units[name]):
                step()
            best[name] = min(best[name], 1e3 * (time.process_time() - start) / units[name])
    return best


def measure(along: str, size: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    pyro.clear_param_store()
    parameters = size if along == "parameters" else 1_000 if options.quick else PARAMETERS[along]
    case = perceptron(parameters, batch=size if along == "batch" else 32, rows=4096)
    chains = size if along == "chains" else 1
    count = sum(case.sizes)
    bare, operations = products(case, chains)
    noise = torch.empty(chains, count)
    grown, steps = {}, {}
    for name, step in contenders(case, chains, along).items():
        settle()
        _, now = resident()
        step()
        step()
        high, _ = resident()
        grown[name], steps[name] = (high - now) / 2**20, step
    times = timed({"products": bare, "noise": noise.normal_, **steps}, options.seconds, options.rounds)
    rows = []
    for name, milliseconds in times.items():
        least = times["products"] + (times["noise"] if name in ("SGLD", "SGHMC") else 0.0)
        own = name in ("products", "noise")
        rows.append(
            {
                "along": along,
                "size": count if along == "parameters" else size,
                "what": name,
                "ms": milliseconds,
                "over": None if own else milliseconds / least,
                "Gflop/s": operations / milliseconds / 1e6 if name == "products" else None,
                "MiB": grown.get(name),
            }
        )
        print(rows[-1], file=sys.stderr, flush=True)
    return rows


def with_slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each row with its slope from the size before, and that of the bare products."""
    times = {(row["along"], row["what"], row["size"]): row["ms"] for row in rows}

    def slope(along: str, what: str, size: int) -> float | None:
        before = max((s for a, w, s in times if (a, w) == (along, what) and s < size), default=None)
        if before is None:
            return None
        return math.log(times[along, what, size] / times[along, what, before]) / math.log(size / before)

    for row in rows:
        row["slope"] = slope(row["along"], row["what"], row["size"])
        row["of the products"] = slope(row["along"], "products", row["size"])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes each: to see that it runs")
    parser.add_argument("--along", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--sizes", nargs="+", type=int, help="in place of all")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    options.seconds, options.rounds = (0.01, 1) if options.quick else (0.1, options.rounds)
    torch.set_num_threads(1)
    pyro.set_rng_seed(20)
    pyro.settings.set(module_local_params=True)  # several guides of one name
    sizes = QUICK if options.quick else SIZES
    rows = [
        row
        for along in options.along
        for size in options.sizes or sizes[along]
        for row in measure(along, size, options)
    ]
    show(with_slopes(rows), options.csv)


if __name__ == "__main__":
    main()
