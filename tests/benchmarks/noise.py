"""What a standard normal number costs, by every generator at hand, and what a whole step would gain by it.

    python tests/benchmarks/noise.py [--quick] [--sizes 480000 10000000] [--csv FILE]

Each generator fills a tensor that is there already, on one thread; nanoseconds of the processor per number, the least
and the median of some rounds in which all take turns. Quality, of 2^22 numbers: the p-value of
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
from concurrent.futures import ThreadPoolExecutor
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
from bnn.noise import Noise, Shapes  # noqa: E402

OURS = "bnn.noise, compiled"
Fill = Callable[[Tensor], object]


def by_numpy(kind: Any) -> Fill:
    """NumPy's ziggurat into the tensor's own memory."""
    generator = np.random.Generator(kind(20))

    def fill(out: Tensor) -> None:
        values = out.numpy()
        generator.standard_normal(out=values, dtype=values.dtype)

    return fill


def by_library(dtype: torch.dtype) -> Fill:
    """The library's own compiled loop, in its own memory."""
    noise = Noise(dtype, torch.device("cpu"), "inductor")
    return lambda out: noise.draw((tuple(out.shape),))[0]


def generators(dtype: torch.dtype, quick: bool) -> dict[str, Fill]:
    rows: dict[str, Fill] = {
        "torch, normal_": lambda out: out.normal_(),
        "NumPy, SFC64": by_numpy(np.random.SFC64),
        "NumPy, PCG64DXSM": by_numpy(np.random.PCG64DXSM),
        "NumPy, Philox": by_numpy(np.random.Philox),
    }
    if dtype == torch.float32:
        if has_compiler() and not quick:
            rows["inductor's randn"] = torch.compile(lambda out: torch.randn_like(out))
    if has_compiler():
        rows[OURS] = by_library(dtype)
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


def stepping(dtype: torch.dtype, noise: Any = None) -> Callable[[], object]:
    """A bare step of SGLD on M in the fx tier, with noise of its own or of another source."""
    case = CASES["M"]
    torch.set_default_dtype(dtype)
    try:
        kernel = SGLD(case.model(), step_size=case.step_size, compile="fx", steps_per_sample=2)
        kernel.num_chains, kernel.num_samples = 1, 10
        x, y = case.data
        kernel.setup(0, x.to(dtype), y)
    finally:
        torch.set_default_dtype(torch.float32)
    run = kernel._running
    run.noise = run.noise if noise is None else noise
    return lambda: run.call(1, observed=False)


def seconds_of_step(dtype: torch.dtype) -> float:
    """Least seconds of the processor for a bare step of SGLD on M, noise and all."""
    step = stepping(dtype)
    with torch.no_grad():
        return min(taken(step) for _ in range(30))


class Ahead:
    """PyTorch's generator on a thread of its own: it fills the memory of the next step while this one computes."""

    def __init__(self) -> None:
        self.generator, self.worker = torch.Generator().manual_seed(0), ThreadPoolExecutor(1)
        self.buffers: list[list[Tensor]] = []
        self.filled: Any = None

    def fill(self) -> list[Tensor]:
        tensors = self.buffers[0]
        self.buffers.reverse()
        for tensor in tensors:
            tensor.normal_(generator=self.generator)
        return tensors

    def draw(self, shapes: Shapes) -> list[Tensor]:
        if self.filled is None:
            self.buffers = [[torch.empty(shape, dtype=torch.float32) for shape in shapes] for _ in range(2)]
            self.filled = self.worker.submit(self.fill)
        tensors: list[Tensor] = self.filled.result()
        self.filled = self.worker.submit(self.fill)
        return tensors


class Without:
    """No noise: what a step takes besides."""

    def draw(self, shapes: Shapes) -> list[Tensor]:
        return [torch.zeros(1).expand(shape) for shape in shapes]


def overlap(rounds: int, quick: bool) -> list[dict[str, Any]]:
    """Milliseconds on the clock of a step of SGLD on M, its noise drawn before it, beside it or by the library."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        steps = {"PyTorch, before the step": stepping(torch.float32)}
        steps["PyTorch, beside the step"] = stepping(torch.float32, Ahead())
        if has_compiler():
            steps[OURS] = stepping(torch.float32, Noise(torch.float32, torch.device("cpu"), "inductor"))
        steps["none"] = stepping(torch.float32, Without())
        times: dict[str, list[float]] = {name: [] for name in steps}
        with torch.no_grad():
            for number in range(rounds + 1):
                for name, step in steps.items():
                    step()
                    start = time.perf_counter()
                    for _ in range(2 if quick else 20):
                        step()
                    if number:
                        times[name].append(1e3 * (time.perf_counter() - start) / (2 if quick else 20))
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times["PyTorch, before the step"], strict=True))
            rows.append({"threads": threads, "noise": name, "ms": statistics.median(values), "ratio": ratio})
    torch.set_num_threads(1)
    return rows


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
    print("\nA step of SGLD on M in single precision, on the clock of a machine that has two cores to spare:\n")
    show(overlap(options.rounds, options.quick))


if __name__ == "__main__":
    main()
