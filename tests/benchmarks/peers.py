"""Other libraries' SGLD and SGHMC on the nets of the benchmark, and loops by hand that a compiler or vmap made fast."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from by_hand import DECAY, Step, flat_grad, pyro_handlers
from library import Kernels
from nets import Case
from timing import Competitor, one_core, repeat
from torch import Tensor

from bnn.kernels import SGHMC, SGLD

JAX = ("blackjax", "numpyro")
OURS = "pyro-bnn"
KINDS = {"SGLD": SGLD, "SGHMC": SGHMC}


def step_size_of(case: Case, kernel: str) -> float:
    """SGHMC moves by the square of its time step."""
    return case.step_size if kernel == "SGLD" else case.step_size**0.5


def loop(case: Case, kernel: str, chains: int, compiled: bool) -> Step:
    """``grad`` of the energy on flat vectors, under ``vmap`` for many chains, and under ``torch.compile``."""
    z = torch.from_numpy(case.start.copy()).expand(chains, -1).clone()
    r, noise = torch.randn_like(z), torch.empty_like(z)
    h, (x, y) = step_size_of(case, kernel), case.data

    def energy(z: Tensor, rows: Tensor) -> Tensor:
        weights = [piece.view(shape) for piece, shape in zip(z.split(case.sizes), case.shapes, strict=True)]
        return case.misfit(weights, x[rows], y[rows]) + 0.5 * (z @ z)

    gradient = torch.func.grad(energy)

    def update(z: Tensor, r: Tensor, rows: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        grad = torch.func.vmap(gradient)(z, rows) if chains > 1 else gradient(z[0], rows[0])[None]
        if kernel == "SGLD":
            return z - h * grad + (2 * h) ** 0.5 * noise, r
        r = (1 - DECAY) * r - h * grad + (2 * DECAY) ** 0.5 * noise
        return z + h * r, r

    if compiled:
        torch.compiler.reset()  # what it learnt of another case would make numbers of this one variables
        update = torch.compile(update)

    def step() -> None:
        nonlocal z, r
        with torch.no_grad():
            z, r = update(z, r, torch.randint(case.rows, (chains, case.batch)), noise.normal_())

    return step


def posteriors(case: Case, kernel: str, chains: int) -> Step:
    """A transform of ``posteriors`` on a dict of weights; many chains under ``vmap``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import posteriors
    x, y = case.data

    def log_posterior(w: dict[str, Tensor], rows: Tensor) -> tuple[Tensor, Tensor]:
        prior = sum(0.5 * piece.square().sum() for piece in w.values())
        return -case.misfit(list(w.values()), x[rows], y[rows]) - prior, torch.tensor([])

    h = step_size_of(case, kernel)
    settings = {"lr": h} if kernel == "SGLD" else {"lr": h, "alpha": DECAY / h}
    transform = getattr(posteriors.sgmcmc, kernel.lower()).build(log_posterior, **settings)
    pieces = torch.from_numpy(case.start).split(case.sizes)
    shapes = zip(case.sites, pieces, case.shapes, strict=True)
    w = {site: piece.reshape(shape).expand(chains, *shape).clone() for site, piece, shape in shapes}
    if chains > 1:
        state = torch.vmap(transform.init, randomness="different")(w)
        update = torch.vmap(transform.update, randomness="different")
    else:
        state, update = transform.init({site: piece[0] for site, piece in w.items()}), transform.update

    def step() -> None:
        nonlocal state
        rows = torch.randint(case.rows, (chains, case.batch))
        state, _ = update(state, rows if chains > 1 else rows[0])

    return step


@contextlib.contextmanager
def by_chains(
    case: Case, kernel: str, chains: int, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Competitor], dict[str, float]]]:
    """All contenders at so many chains, and the seconds of each one's first call."""
    rows: dict[str, Competitor] = {}
    seconds: dict[str, float] = {}

    def add(name: str, build: Callable[[], Step], steps: int = 1) -> None:
        start = time.perf_counter()
        step = build()
        step()
        rows[name], seconds[name] = Competitor(repeat(step), steps=steps), time.perf_counter() - start

    kernels = Kernels(case)
    add(OURS, lambda: kernels.ready(KINDS[kernel], options.tiers[-1], 10, chains).advance, steps=10)
    if chains == 1:
        add("loop by hand, backward()", lambda: flat_grad(case, friction=None if kernel == "SGLD" else DECAY))
    add("loop by hand, torch.func", lambda: loop(case, kernel, chains, compiled=False))
    if options.tiers[-1] != "fx" and not options.quick:
        add("loop by hand, torch.compile", lambda: loop(case, kernel, chains, compiled=True))
    if chains == 1 and kernel == "SGLD":
        add("Pyro's handlers by hand", lambda: pyro_handlers(case))
    if "posteriors" in options.peers:
        add("posteriors", lambda: posteriors(case, kernel, chains))
    with contextlib.ExitStack() as stack:
        libraries = [name for name in JAX if name in options.peers]
        if libraries:
            worker = stack.enter_context(jax_worker(case, options.keep_heap))
        for name in libraries:
            rows[name], seconds[name] = worker.competitor(name, kernel, chains)
        yield rows, seconds


class JaxWorker:
    """``jax_steps.py`` in a process on the same core."""

    def __init__(self, worker: subprocess.Popen[str]) -> None:
        self.worker = worker

    def ask(self, *words: object) -> str:
        assert self.worker.stdin is not None and self.worker.stdout is not None
        if words:
            self.worker.stdin.write(" ".join(map(str, words)) + "\n")
        answer = self.worker.stdout.readline()
        if not answer:
            raise RuntimeError("the JAX worker died: its message stands above.")
        return answer

    def competitor(self, library: str, kernel: str, chains: int) -> tuple[Competitor, float]:
        """One sampler, and the seconds of its first call."""
        steps, seconds = self.ask("build", library, kernel, chains).split()

        def clock(units: int) -> float:
            return float(self.ask("run", library, kernel, chains, units))

        return Competitor(clock=clock, steps=int(steps)), float(seconds)


@contextlib.contextmanager
def jax_worker(case: Case, keep_heap: bool) -> Iterator[JaxWorker]:
    command = [sys.executable, str(Path(__file__).with_name("jax_steps.py")), case.name]
    with one_core():  # which the worker inherits
        worker = subprocess.Popen(
            command + ["--keep-heap"] * keep_heap, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
    assert worker.stdin is not None
    try:
        yield JaxWorker(worker)
    finally:
        worker.stdin.close()
        worker.wait()


def installed() -> list[str]:
    """Which of the peers can be imported; the others are named on the standard error."""
    needs = {"posteriors": ["posteriors"], "blackjax": ["jax", "blackjax"], "numpyro": ["jax", "numpyro"]}
    found = [name for name, modules in needs.items() if all(map(importlib.util.find_spec, modules))]
    for name in needs:
        if name not in found:
            print(f"{name} is not installed: its rows are left out.", file=sys.stderr)
    return found
