"""Time one step of SGLD and SGHMC against loops by hand, Pyro's handlers, posteriors, blackjax and NumPyro's densities.

    python tests/benchmarks/steps.py [--quick] [--cases S M C T R] [--csv results/steps.csv] [--markdown FILE]

Two tables a case: the library's tiers and options beside loops by hand, one chain; and all libraries at 1, 4, 16 and 64
chains. The competitors of a table run interleaved, on one thread and one core, in processor time; compilations are
cold, and stand apart in seconds of the wall clock. The ratios are the result, the microseconds only the way there. The
exit status is 0 whatever the ratios are. Peers that are not installed are left out; JAX's have a process of their own.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from by_hand import loops, pyro_handlers  # noqa: E402
from library import Kernels, bare, rows_of  # noqa: E402
from nets import CASES, USUAL, Case  # noqa: E402
from peers import KINDS, OURS, by_chains, installed  # noqa: E402
from tables import show  # noqa: E402
from timing import Competitor, Times, fastest, interleave, keep_heap, repeat  # noqa: E402
from torch._inductor.utils import fresh_cache  # noqa: E402

from bnn.kernels import SGLD  # noqa: E402

HANDLERS = ("Pyro's handlers, by hand", "SGLD handlers, with statistics")


@dataclass(frozen=True)
class Bar:
    """``row`` takes at most ``limit`` times what the fastest of ``references`` takes."""

    row: str
    references: Sequence[str]
    limit: float
    words: str

    def verdict(self, times: Mapping[str, Times]) -> str:
        """The measured ratio and whether it is met; empty if one side was not measured."""
        reference = fastest(times, self.references)
        if self.row not in times or reference is None:
            return ""
        ratio = times[self.row].ratio(times[reference])
        return f"{ratio:.2f} of {self.words} (bar {self.limit:.2f}): {'met' if ratio <= self.limit else '**not met**'}"


def bars(case: Case, loop: Sequence[str]) -> list[Bar]:
    """What this case must reach; ``loop`` names the loops that differentiate the prior."""
    auto = "SGLD auto, bare"
    result = [
        Bar(auto, loop, {"S": 0.25, "M": 0.95}.get(case.name, 1.0), "best loop"),
        *([Bar("SGLD fx, bare", loop, 1.0, "best loop")] if case.name == "R" else []),
        Bar(auto, ("SGLD fx, bare", "SGLD inductor, bare"), 1.05, "the faster tier"),
        Bar("SGHMC auto, bare", (auto,), 1.15, "SGLD"),
    ]
    if case.name == "S":
        ten, short = "SGLD auto, 10 steps a draw", "MCMC.run of 300 steps, {}, setup included"
        result += [
            Bar(auto, HANDLERS, 0.08, "handlers"),
            Bar(ten, loop, 0.15, "best loop"),
            Bar("SGLD fx, bare", loop, 0.3, "best loop"),
            Bar("SGHMC auto, 10 steps a draw", (ten,), 1.15, "SGLD"),
            Bar("SGLD auto, 16 chains, bare", (auto,), 3.0, "one chain"),
            Bar("MCMC.run, 10 steps a draw, setup apart", ("SGLD auto, 10 bare steps",), 1.5, "bare steps"),
            Bar(short.format("auto"), (short.format("fx"),), 1.1, "fx"),
        ]
    return result


def measure(case: Case, options: argparse.Namespace) -> str:
    """The library's own table of one case, in Markdown."""
    differentiated, decayed = loops(case)
    kernels = Kernels(case)
    if options.quick and case.name != "S":  # only that it runs
        name, step = next(iter(differentiated.items()))
        rows = {name: Competitor(repeat(step)), "SGLD fx, bare": bare(kernels.ready(SGLD, "fx", 2, note="setup, fx"))}
    else:
        rows = {name: Competitor(repeat(step)) for name, step in {**differentiated, **decayed}.items()}
        if case.name == "R":  # a step lasts longer than a run of the others, and so does its compilation
            rows["SGLD fx, bare"] = bare(kernels.ready(SGLD, "fx", 2, note="setup, fx"))
        else:
            rows[HANDLERS[0]] = Competitor(repeat(pyro_handlers(case)))
            rows |= rows_of(kernels, options.tiers, options.quick)
    times = interleave(rows, options.rounds, options.chunk)
    return section(case, rows, times, (list(differentiated), list(decayed)), kernels.seconds)


def section(
    case: Case,
    rows: Mapping[str, Competitor],
    times: Mapping[str, Times],
    loop_names: tuple[Sequence[str], Sequence[str]],
    seconds: Sequence[tuple[str, float]],
) -> str:
    """Tables of ratios and of setup times."""
    references = {"best loop": loop_names[0], "best with weight decay": loop_names[1]}
    columns = {words: times[name] for words, names in references.items() if (name := fastest(times, names))}
    verdicts: dict[str, list[str]] = {}
    for bar in bars(case, loop_names[0]):
        if verdict := bar.verdict(times):
            verdicts.setdefault(bar.row, []).append(verdict)
    lines = [f"### {case.name}: {case.title}", ""]
    lines.append("| one step of | µs (quartiles) | " + " | ".join(f"/ {words}" for words in columns) + " | bars |")
    lines.append("|---|---:|" + "---:|" * len(columns) + "---|")
    for name, time_ in times.items():
        label = f"{name} ({rows[name].note})" if rows[name].note and rows[name].note not in name else name
        low, high = time_.quartiles
        ratios = " | ".join(f"{time_.ratio(reference):.3f}" for reference in columns.values())
        cells = [label, f"{time_.median:.1f} ({low:.1f}, {high:.1f})", ratios, "; ".join(verdicts.get(name, []))]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| once per run | seconds |", "|---|---:|"]
    lines += [f"| {name} | {value:.2f} |" for name, value in seconds]
    return "\n".join(lines) + "\n"


def compare(case: Case, options: argparse.Namespace) -> list[dict[str, Any]]:
    """All libraries by their chains, as rows of a table."""
    table: list[dict[str, Any]] = []
    for kernel in options.kernels:
        for chains in options.chains:
            with fresh_cache(), by_chains(case, kernel, chains, options) as (rows, seconds):
                times = interleave(rows, options.rounds, options.chunk)
            for name, time_ in times.items():
                low, high = time_.quartiles
                row = {"case": case.name, "kernel": kernel, "chains": chains, "contender": name, "us": time_.median}
                row |= {"low": low, "high": high, "of ours": time_.ratio(times[OURS]), "first call, s": seconds[name]}
                table.append(row)
                print(f"{kernel}, {chains} chains, {name}: {time_.median:.1f} us", file=sys.stderr, flush=True)
    return table


def has_compiler() -> bool:
    """Whether inductor can compile a program here."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(get_cpp_compiler())
    except InvalidCxxCompiler:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="under a minute: few rounds, M and C only that they run")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(USUAL))
    parser.add_argument("--tables", nargs="+", choices=["own", "libraries"], default=["own", "libraries"])
    parser.add_argument("--kernels", nargs="+", choices=list(KINDS), default=list(KINDS), help="of the second table")
    parser.add_argument("--chains", nargs="+", type=int, default=[1, 4, 16, 64], help="of the table with all libraries")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--csv", type=Path, help="write the table with all libraries to this file, too")
    parser.add_argument("--keep-heap", action="store_true", help="keep glibc from returning freed memory, for everyone")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()
    options.rounds, options.chunk = (3, 0.02) if options.quick else (options.rounds, 0.15)
    options.peers = [] if options.quick else installed()
    options.tiers = ["fx", "inductor", "auto"] if has_compiler() else ["fx"]
    if options.quick:
        options.tiers, options.chains, options.kernels = options.tiers[::2], options.chains[:1], options.kernels[:1]
    torch.set_num_threads(1)
    heap = "kept by mallopt" if options.keep_heap and keep_heap() else "at glibc's defaults"
    start = time.perf_counter()
    sections = [f"PyTorch {torch.__version__}, one thread; the heap is {heap}, for all alike."]
    print(sections[0] + "\n")
    for name in options.cases if "own" in options.tables else ():
        with fresh_cache():  # of inductor, so that compilations are cold
            sections.append(measure(CASES[name], options))
        print(sections[-1], flush=True)
    if "libraries" in options.tables:
        cases = options.cases[:1] if options.quick else options.cases
        show([row for name in cases for row in compare(CASES[name], options)], options.csv, digits=4)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.markdown:
        options.markdown.write_text("\n".join(sections))


if __name__ == "__main__":
    main()
