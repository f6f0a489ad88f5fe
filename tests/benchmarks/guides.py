"""Time one step of variational inference with the guides against Pyro's AutoNormal, ivon-opt, K-FAC of curvlinops,
SGD and Adam.

    python tests/benchmarks/guides.py [--quick] [--cases S M C] [--csv results/guides.csv]

All competitors of a case run interleaved, on one thread and one core, in processor time. The ratios are the result.
"10/20" stands for statistics every 10 and inverses every 20 steps. The exit status is 0 whatever the ratios are. Peers
that are not installed are left out (tests/oracles/requirements.txt has them).
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import pyro  # noqa: E402
import torch  # noqa: E402
from nets import CASES, Case  # noqa: E402
from pyro.infer import SVI, Trace_ELBO  # noqa: E402
from pyro.infer.autoguide import AutoDelta, AutoNormal  # noqa: E402
from tables import show, write  # noqa: E402
from timing import Competitor, Times, interleave, keep_heap, repeat  # noqa: E402
from training import Step, curvlinops, ivon, plain  # noqa: E402

from bnn.guides import (  # noqa: E402
    IVON,
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoIVON,
    AutoMatrixNormal,
    NaturalGradientDescent,
    TraceEnsemble_ELBO,
    TraceNaturalGradient_ELBO,
)

INTERVALS: dict[str, Any] = {"statistics_every": 10, "inverses_every": 20}
PEERS: dict[str, tuple[str, Callable[[Case], Step]]] = {
    "IVON of ivon-opt": ("ivon", ivon),
    "K-FAC of curvlinops, 10/20": ("curvlinops", curvlinops),
}
SGD, PYRO = "SGD, torch.nn and torch.optim", "AutoNormal with Adam, Trace_ELBO"

# Case -> (row, reference, at most).
BARS = {
    "S": [("factorized", PYRO, 0.15), ("matrix normal, 10/20", PYRO, 0.25)],
    "M": [("factorized, 10/20", PYRO, 0.5), ("matrix normal, local, 10/20", SGD, 3.5), ("K-FAC, 10/20", SGD, 2.0)],
    "C": [("matrix normal, 10/20", SGD, 1.5)],
}


def rows(case: Case, peers: Mapping[str, Callable[[Case], Step]]) -> dict[str, Competitor]:
    """All competitors; rates so small that nothing moves away from where it starts."""

    def ours(guide: type, **settings: Any) -> Callable[[], float]:
        model = case.model()
        made = guide(model) if guide is AutoDelta else guide(model, init_scale=1e-3)
        elbo = TraceNaturalGradient_ELBO(**settings)
        svi = SVI(model, made, NaturalGradientDescent(lr=1e-3, precision_lr=1e-3), elbo)
        return lambda: svi.step(*case.data)

    model = case.model()
    stock = SVI(model, AutoNormal(model, init_scale=1e-3), pyro.optim.Adam({"lr": 1e-5}), Trace_ELBO())
    own = case.model()
    guide = AutoIVON(own, num_data=case.rows, hess_init=1e3)
    improved = SVI(own, guide, IVON(lr=1e-5), TraceEnsemble_ELBO())
    steps: dict[str, Step] = {
        SGD: plain(case, torch.optim.SGD),
        "Adam, torch.nn and torch.optim": plain(case, torch.optim.Adam),
        PYRO: lambda: stock.step(*case.data),
        **{name: build(case) for name, build in peers.items()},
        "IVON": lambda: improved.step(*case.data),
        "factorized": ours(AutoFactorizedNormal),
        "factorized, 10/20": ours(AutoFactorizedNormal, **INTERVALS),
        "matrix normal, 10/20": ours(AutoMatrixNormal, **INTERVALS),
        "matrix normal, shared, 10/20": ours(AutoMatrixNormal, noise="shared", **INTERVALS),
        "matrix normal, local, 10/20": ours(AutoMatrixNormal, noise="local", **INTERVALS),
        "noisy K-FAC, 10/20": ours(AutoMatrixNormal, damping="factored", **INTERVALS),
        "eigenbasis, 10/20": ours(AutoEigenNormal, **INTERVALS),
        "K-FAC, 10/20": ours(AutoDelta, **INTERVALS),
    }
    if case.name == "S":
        steps["matrix normal"] = ours(AutoMatrixNormal)
    return {name: Competitor(in_intervals(step)) for name, step in steps.items()}


def in_intervals(step: Callable[[], Any]) -> Callable[[int], None]:
    """Twenty steps as one unit of work, so that every round holds whole intervals."""
    return repeat(lambda: [step() for _ in range(20)])


def table(times: Mapping[str, Times]) -> list[dict[str, Any]]:
    """Microseconds a step with their quartiles, and the ratios."""
    result: list[dict[str, Any]] = []
    for name, measured in times.items():
        low, high = (quartile / 20 for quartile in measured.quartiles)
        row = {"method": name, "us a step": measured.median / 20, "from": low, "to": high}
        result.append(row | {"of SGD": measured.ratio(times[SGD]), "of AutoNormal": measured.ratio(times[PYRO])})
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, S only")
    parser.add_argument("--cases", nargs="+", choices=list(BARS), default=list(BARS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--csv", type=Path, help="write all rows to this file, too")
    parser.add_argument("--keep-heap", action="store_true", help="keep glibc from returning freed memory, for everyone")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=True)  # several guides of one name
    heap = "kept by mallopt" if options.keep_heap and keep_heap() else "at glibc's defaults"
    peers = {}
    for name, (package, build) in PEERS.items():
        if importlib.util.find_spec(package):
            peers[name] = build
        else:
            print(f"{package} is not installed: its row is left out.", file=sys.stderr)
    print(f"PyTorch {torch.__version__}, one thread; the heap is {heap}.")
    start, found = time.perf_counter(), []
    for name in ["S"] if options.quick else options.cases:
        pyro.set_rng_seed(20)
        rounds, chunk = (3, 0.02) if options.quick else (options.rounds, 0.2)
        times = interleave(rows(CASES[name], peers), rounds, chunk)
        rows_of = table(times)
        print(f"\n### {name}: {CASES[name].title}\n")
        show(rows_of, digits=4)
        for row, reference, limit in BARS[name]:
            ratio = times[row].ratio(times[reference])
            verdict = "met" if ratio <= limit else "**not met**"
            print(f"\n{row}: {ratio:.2f} of {reference} (bar {limit:.2f}): {verdict}")
        found += [{"case": name, **row} for row in rows_of]
    if options.csv:
        write(found, options.csv)
    print(f"\n{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
