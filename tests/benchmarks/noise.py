"""What a standard normal number costs, by every generator at hand, and what a whole step would gain by it.

    python tests/benchmarks/noise.py [--quick] [--sizes 480000 10000000] [--csv FILE]

Each generator fills a tensor that is there already, on one thread; nanoseconds of the processor per number, the least
and the median of some rounds in which all take turns. Box-Muller is by PyTorch's vectorized operations in blocks that
fit the cache, on SFC64's bits; with `compiled` inductor makes one loop of it. Quality, of 2^22 numbers: the p-value of
Kolmogorov and Smirnov's test, and the largest of five scores that are standard normal if the numbers are (mean,
variance, skewness, kurtosis, correlation of neighbours): beyond 3.7 one good generator in a thousand. `step` is the
change of a whole step of SGLD on M of `nets.py` in that precision, were its noise drawn so.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from nets import CASES  # noqa: E402
from scipy import stats  # noqa: E402
from steps import has_compiler  # noqa: E402
from tables import show  # noqa: E402
from torch import Tensor  # noqa: E402

from bnn.kernels import SGLD  # noqa: E402

BLOCK = 1 << 16
Fill = Callable[[Tensor], object]


def by_numpy(kind: Any) -> Fill:
    """NumPy's ziggurat into the tensor's own memory."""
    generator = np.random.Generator(kind(20))

    def fill(out: Tensor) -> None:
        values = out.numpy()
        generator.standard_normal(out=values, dtype=values.dtype)

    return fill


def box_muller(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Two normal numbers out of two words of 32 bits."""
    uniform = bits.to(torch.float32) * 2.0**-32  # from -1/2 to 1/2
    first, second = uniform.chunk(2)
    radius = torch.sqrt(-2.0 * torch.log(first.abs() * 2.0 + 2.0**-33))
    angle = second * (2.0 * math.pi)
    return radius * torch.cos(angle), radius * torch.sin(angle)


def by_box_muller(compiled: bool) -> Fill:
    generator = np.random.Generator(np.random.SFC64(20))
    pairs = torch.compile(box_muller) if compiled else box_muller

    def fill(out: Tensor) -> None:
        for start in range(0, out.numel(), BLOCK):
            part = out[start : start + BLOCK]
            words = generator.integers(0, 2**64, size=BLOCK // 2, dtype=np.uint64, endpoint=False)
            found = torch.cat(pairs(torch.from_numpy(words.view(np.int32))))
            part.copy_(found[: len(part)])

    return fill


def generators(dtype: torch.dtype, quick: bool) -> dict[str, Fill]:
    rows: dict[str, Fill] = {
        "torch, normal_": lambda out: out.normal_(),
        "NumPy, SFC64": by_numpy(np.random.SFC64),
        "NumPy, PCG64DXSM": by_numpy(np.random.PCG64DXSM),
        "NumPy, Philox": by_numpy(np.random.Philox),
    }
    if dtype == torch.float32:
        rows["Box-Muller on SFC64"] = by_box_muller(compiled=False)
        if has_compiler() and not quick:
            rows["Box-Muller on SFC64, compiled"] = by_box_muller(compiled=True)
            randn = torch.compile(lambda out: torch.randn_like(out))
            rows["inductor's randn"] = randn
    return rows


def quality(fill: Fill, dtype: torch.dtype, count: int) -> tuple[float, float]:
    """The p-value, and the largest score; of the generators that fill, not of those that only return."""
    out = torch.full((count,), math.nan, dtype=dtype)
    made = fill(out)
    x = (made if isinstance(made, Tensor) else out).double().numpy()
    scores = [
        x.mean() * math.sqrt(count),
        (np.mean(x**2) - 1.0) * math.sqrt(count / 2),
        np.mean(x**3) * math.sqrt(count / 15),
        (np.mean(x**4) - 3.0) * math.sqrt(count / 96),
        np.mean(x[1:] * x[:-1]) * math.sqrt(count),
    ]
    return float(stats.kstest(x, "norm").pvalue), float(np.abs(scores).max())


def seconds_of_step(dtype: torch.dtype) -> float:
    """Least seconds of a bare step of SGLD on M, noise and all."""
    case = CASES["M"]
    torch.set_default_dtype(dtype)
    try:
        kernel = SGLD(case.model(), step_size=case.step_size, compile="fx", steps_per_sample=2)
        kernel.num_chains, kernel.num_samples = 1, 10
        x, y = case.data
        kernel.setup(0, x.to(dtype), y)
        with torch.no_grad():
            return min(taken(lambda: kernel._run.call(1, observed=False)) for _ in range(30))
    finally:
        torch.set_default_dtype(torch.float32)


def taken(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def measure(dtype: torch.dtype, size: int, step: float, options: argparse.Namespace) -> list[dict[str, Any]]:
    out, fills = torch.empty(size, dtype=dtype), generators(dtype, options.quick)
    times: dict[str, list[float]] = {name: [] for name in fills}
    calls = max(1, (1 << 20) // size)
    for number in range(options.rounds + 1):
        for name, fill in fills.items():
            found = taken(lambda fill=fill: [fill(out) for _ in range(calls)]) / calls  # type: ignore[misc]
            if number:  # the first one warms up
                times[name].append(found)
    rows, plain = [], min(times["torch, normal_"]) / size
    dim = sum(CASES["M"].sizes)
    for name, values in times.items():
        p_value, score = quality(fills[name], dtype, options.count)
        each = min(values) / size
        rows.append(
            {
                "numbers": size,
                "precision": str(dtype).removeprefix("torch."),
                "generator": name,
                "ns": 1e9 * each,
                "median": 1e9 * statistics.median(values) / size,
                "KS p": p_value,
                "worst score": score,
                "step": f"{(each - plain) * dim / step:+.1%}",
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few rounds of few numbers, nothing compiled")
    parser.add_argument("--sizes", nargs="+", type=int, default=[480_000, 10_000_000])
    parser.add_argument("--csv", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    options.rounds, options.count = (1, 1 << 16) if options.quick else (7, 1 << 22)
    sizes = [50_000] if options.quick else options.sizes
    torch.set_num_threads(1)
    torch.manual_seed(20)
    rows = []
    for dtype in (torch.float32, torch.float64):
        step = seconds_of_step(dtype)
        for size in sizes:
            rows += measure(dtype, size, step, options)
        print(f"A step of SGLD on M in {dtype}: {1e3 * step:.2f} ms.\n", flush=True)
    show(rows, options.csv)


if __name__ == "__main__":
    main()
