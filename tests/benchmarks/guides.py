"""Time one step of variational inference with the guides against Pyro's AutoNormal with Adam and against plain SGD.

    python tests/benchmarks/guides.py [--quick] [--cases S M C] [--keep-heap] [--markdown FILE]

All competitors of a case run interleaved, on one thread and one core. The ratios are the result. "10/20" stands for
statistics every 10 and inverses every 20 steps. The exit status is 0 whatever the ratios are.
"""

from __future__ import annotations

import argparse
import os
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
from timing import Competitor, Times, interleave, keep_heap, repeat  # noqa: E402

from bnn.guides import (  # noqa: E402
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    TraceNaturalGradient_ELBO,
)

INTERVALS: dict[str, Any] = {"statistics_every": 10, "inverses_every": 20}
SGD, PYRO = "SGD, torch.nn and torch.optim", "AutoNormal with Adam, Trace_ELBO"

# Case -> (row, reference, at most).
BARS = {
    "S": [("factorized", PYRO, 0.15), ("matrix normal, 10/20", PYRO, 0.25)],
    "M": [("factorized, 10/20", PYRO, 0.5), ("matrix normal, local, 10/20", SGD, 3.5), ("K-FAC, 10/20", SGD, 2.0)],
    "C": [("matrix normal, 10/20", SGD, 1.5)],
}


def rows(case: Case) -> dict[str, Competitor]:
    """All competitors; rates so small that nothing moves away from where it starts."""

    def ours(guide: type, **settings: Any) -> Callable[[], float]:
        model = case.model()
        made = guide(model) if guide is AutoDelta else guide(model, init_scale=1e-3)
        elbo = TraceNaturalGradient_ELBO(**settings)
        svi = SVI(model, made, NaturalGradientDescent(lr=1e-3, precision_lr=1e-3), elbo)
        return lambda: svi.step(*case.data)

    model = case.model()
    stock = SVI(model, AutoNormal(model, init_scale=1e-3), pyro.optim.Adam({"lr": 1e-5}), Trace_ELBO())
    steps: dict[str, Callable[[], Any]] = {
        SGD: sgd(case),
        PYRO: lambda: stock.step(*case.data),
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


def sgd(case: Case) -> Callable[[], None]:
    """Plain training of the same net on minibatches."""
    weights = [
        torch.nn.Parameter(piece.reshape(shape).clone())
        for piece, shape in zip(torch.from_numpy(case.start).split(case.sizes), case.shapes, strict=True)
    ]
    optimizer = torch.optim.SGD(weights, lr=1e-9)
    x, y = case.data

    def step() -> None:
        batch = torch.randint(case.rows, (case.batch,))
        optimizer.zero_grad()
        case.misfit(weights, x[batch], y[batch]).backward()
        optimizer.step()

    return step


def table(case: Case, times: Mapping[str, Times]) -> str:
    lines = [f"### {case.name}: {case.title}", "", "| | µs a step | of SGD | of AutoNormal |", "|---|---|---|---|"]
    for name, measured in times.items():
        ratios = [measured.ratio(times[reference]) for reference in (SGD, PYRO)]
        lines.append(f"| {name} | {measured.median / 20:.0f} | {ratios[0]:.2f} | {ratios[1]:.2f} |")
    for row, reference, limit in BARS[case.name]:
        ratio = times[row].ratio(times[reference])
        verdict = "met" if ratio <= limit else "**not met**"
        lines.append(f"\n{row}: {ratio:.2f} of {reference} (bar {limit:.2f}): {verdict}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds, S only")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--keep-heap", action="store_true", help="keep glibc from returning freed memory, for everyone")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=True)  # several guides of one name
    heap = "kept by mallopt" if options.keep_heap and keep_heap() else "at glibc's defaults"
    start, sections = time.perf_counter(), [f"PyTorch {torch.__version__}, one thread; the heap is {heap}."]
    for name in ["S"] if options.quick else options.cases:
        pyro.set_rng_seed(20)
        rounds, chunk = (3, 0.02) if options.quick else (9, 0.2)
        sections.append(table(CASES[name], interleave(rows(CASES[name]), rounds, chunk)))
        print(sections[-1], flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.markdown:
        options.markdown.write_text("\n".join(sections))


if __name__ == "__main__":
    main()
