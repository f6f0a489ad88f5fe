"""Time one step of the samplers against hand-written loops, Pyro's handlers and, with --jax, blackjax.

    python tests/benchmarks/steps.py [--quick] [--cases S M C] [--jax] [--markdown FILE]

All competitors of a case run interleaved, on one thread and one core; compilations are cold. The ratios are the
result, the microseconds only the way there. The exit status is 0 whatever the ratios are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from by_hand import loops, pyro_handlers  # noqa: E402
from library import Kernels, bare, rows_of  # noqa: E402
from nets import CASES, Case  # noqa: E402
from timing import Competitor, Times, fastest, interleave, keep_heap, one_core, repeat  # noqa: E402

from bnn.kernels import SGLD  # noqa: E402

BLACKJAX = "blackjax SGLD, jax.jit and lax.scan"
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
        Bar(auto, loop, {"S": 0.25, "M": 0.95, "C": 1.0}[case.name], "best loop"),
        Bar(auto, ("SGLD fx, bare", "SGLD inductor, bare"), 1.05, "the faster tier"),
        Bar("SGHMC auto, bare", (auto,), 1.15, "SGLD"),
        Bar(auto, (BLACKJAX,), 1.0, "blackjax"),
    ]
    if case.name == "S":
        ten, short = "SGLD auto, 10 steps a draw", "MCMC.run of 300 steps, {}, setup included"
        result += [
            Bar(auto, HANDLERS, 0.08, "handlers"),
            Bar(ten, loop, 0.15, "best loop"),
            Bar(ten, (BLACKJAX,), 1.0, "blackjax"),
            Bar("SGLD fx, bare", loop, 0.3, "best loop"),
            Bar("SGHMC auto, 10 steps a draw", (ten,), 1.15, "SGLD"),
            Bar("SGLD auto, 16 chains, bare", (auto,), 3.0, "one chain"),
            Bar("MCMC.run, 10 steps a draw, setup apart", ("SGLD auto, 10 bare steps",), 1.5, "bare steps"),
            Bar(short.format("auto"), (short.format("fx"),), 1.1, "fx"),
        ]
    return result


@contextlib.contextmanager
def blackjax(case: Case, keep: bool) -> Iterator[tuple[Competitor, float]]:
    """SGLD of blackjax in a process on the same core, and the seconds of its compilation."""
    command = [sys.executable, str(Path(__file__).with_name("jax_steps.py")), case.name]
    with one_core():  # which the worker inherits
        worker = subprocess.Popen(
            command + ["--keep-heap"] * keep, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    assert worker.stdin is not None and worker.stdout is not None
    questions, answers = worker.stdin, worker.stdout

    def clock(units: int) -> float:
        questions.write(f"{units}\n")
        return float(answers.readline())

    try:
        steps, seconds = answers.readline().split()
        yield Competitor(clock=clock, steps=int(steps)), float(seconds)
    finally:
        questions.close()
        worker.wait()


def measure(case: Case, options: argparse.Namespace) -> str:
    """One case as a section in Markdown."""
    differentiated, decayed = loops(case)
    kernels = Kernels(case)
    if options.quick and case.name != "S":  # only that it runs
        name, step = next(iter(differentiated.items()))
        rows = {name: Competitor(repeat(step)), "SGLD fx, bare": bare(kernels.ready(SGLD, "fx", 2, note="setup, fx"))}
    else:
        rows = {name: Competitor(repeat(step)) for name, step in {**differentiated, **decayed}.items()}
        rows[HANDLERS[0]] = Competitor(repeat(pyro_handlers(case)))
        rows |= rows_of(kernels, options.tiers, options.quick)
    with contextlib.ExitStack() as stack:
        if options.jax:
            rows[BLACKJAX], seconds = stack.enter_context(blackjax(case, options.keep_heap))
            kernels.seconds.append(("blackjax, first call", seconds))
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
    references = {"best loop": loop_names[0], "best with weight decay": loop_names[1], "blackjax": [BLACKJAX]}
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
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--jax", action="store_true", help="also blackjax, if it is installed")
    parser.add_argument("--keep-heap", action="store_true", help="keep glibc from returning freed memory, for everyone")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()
    options.rounds, options.chunk = (3, 0.02) if options.quick else (11, 0.15)
    if options.jax and not (importlib.util.find_spec("jax") and importlib.util.find_spec("blackjax")):
        print("jax or blackjax is not installed: that row is left out.", file=sys.stderr)
        options.jax = False
    options.tiers = ["fx", "inductor", "auto"] if has_compiler() else ["fx"]
    if options.quick:
        options.tiers = options.tiers[::2]
    torch.set_num_threads(1)
    heap = "kept by mallopt" if options.keep_heap and keep_heap() else "at glibc's defaults"
    start = time.perf_counter()
    sections = [f"PyTorch {torch.__version__}, one thread; the heap is {heap}, for all alike."]
    print(sections[0] + "\n")
    with tempfile.TemporaryDirectory() as folder:  # inductor's cache, so that compilations are cold
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        for name in options.cases:
            sections.append(measure(CASES[name], options))
            print(sections[-1], flush=True)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.markdown:
        options.markdown.write_text("\n".join(sections))


if __name__ == "__main__":
    main()
