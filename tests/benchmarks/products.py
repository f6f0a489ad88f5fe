"""What a matrix product costs by PyTorch's own library and by oneDNN, on one thread.

    python tests/benchmarks/products.py [--quick] [--csv FILE]

Microseconds, the least of some calls in which the two take turns, and 10^9 operations a second. "transposed" says which
of the factors (m x k and k x n) are: in a step of training both, none and one are. See `bnn/onednn.py`, which takes
oneDNN for products of 8 million operations or more where it is faster by a third.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from tables import show  # noqa: E402
from torch import Tensor  # noqa: E402

from bnn.onednn import is_faster, product  # noqa: E402

# Of S, of T, of M, of factors of K-FAC on M, and of a net of 10^7 parameters.
SIZES = [
    (32, 8, 50), (512, 64, 64), (512, 64, 192), (64, 512, 256), (128, 400, 10), (128, 400, 400), (128, 784, 400),
    (400, 128, 784), (128, 785, 785), (400, 785, 785), (32, 784, 2789), (2789, 32, 784),
]  # fmt: skip


def factor(rows: int, columns: int, transposed: bool) -> Tensor:
    return torch.randn(columns, rows).t() if transposed else torch.randn(rows, columns)


def measure(m: int, k: int, n: int, transposed: str, rounds: int) -> dict[str, Any]:
    a, b = factor(m, k, "first" in transposed), factor(k, n, "second" in transposed)
    times: dict[str, list[float]] = {"PyTorch": [], "oneDNN": []}
    for number in range(rounds + 2):
        for name, function in (("PyTorch", torch.mm), ("oneDNN", product)):
            start = time.perf_counter()
            function(a, b)
            if number > 1:
                times[name].append(1e6 * (time.perf_counter() - start))
    one, two = (min(values) for values in times.values())
    work = 2e-3 * m * k * n
    return {
        "m, k, n": f"{m}, {k}, {n}", "transposed": transposed, "PyTorch, us": one, "oneDNN, us": two,
        "ratio": one / two, "PyTorch, G/s": work / one, "oneDNN, G/s": work / two,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two sizes, few rounds")
    parser.add_argument("--csv", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes, rounds = (SIZES[:2], 3) if options.quick else (SIZES, 30)
    kinds = ("none", "first", "second", "first and second")
    with torch.no_grad():
        show([measure(*size, kind, rounds) for size in sizes for kind in kinds], options.csv)
    print(f"\nLarge products of this library go to {'oneDNN' if is_faster() else 'PyTorch'} here.")


if __name__ == "__main__":
    main()
