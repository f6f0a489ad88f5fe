"""Choose how a recorded program runs: as generated Python (``fx``) or compiled (``inductor``).

``auto`` times both on this machine and keeps the faster, but compiles only where the run is long enough to repay it.
The timings are kept beside inductor's own cache, so that the same run chooses the same tier again and a seed fixes
its result bit for bit. Compiled runs draw their noise from generators of their own (:mod:`bnn.noise`), which PyTorch's
seeds: the tiers give other numbers of the same law.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch.fx import GraphModule

from bnn.cuda_graphs import captured
from bnn.randomness import kept_randomness
from bnn.recording import run_fx, run_inductor
from bnn.timings import Timings

TIERS = ("auto", "inductor", "fx", "cuda_graph", "handlers")

# Seconds that a run must last in the fx tier before a compilation, about ten seconds when cold, can repay itself.
SECONDS_TO_REPAY = 25.0


class Program:
    """A callable program and the name of the tier that runs it."""

    __slots__ = ("call", "tier")

    def __init__(self, call: Callable[..., tuple[torch.Tensor, ...]], tier: str) -> None:
        self.call, self.tier = call, tier

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Run the program."""
        return self.call(*inputs)


def over_chains(program: Program, per_chain: Sequence[bool]) -> Program:
    """``program``, written for one chain, run for one chain after another.

    :param per_chain: which inputs lead with the chain dimension; its results all do.
    """

    def loop(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        chains = next(len(t) for t, flag in zip(tensors, per_chain, strict=True) if flag)
        if chains == 1:
            return program(*tensors)
        results: tuple[torch.Tensor, ...] = ()
        for chain in range(chains):
            results = _put(results, program(*one_chain(tensors, per_chain, chain)), chain, chains)
        return results

    return Program(loop, program.tier)


def _put(
    results: tuple[torch.Tensor, ...], parts: Sequence[torch.Tensor], chain: int, chains: int
) -> tuple[torch.Tensor, ...]:
    """The results of all chains, with those of one in their place: so that no two chains' lie about besides."""
    results = results or tuple(part.new_empty((chains, *part.shape[1:])) for part in parts)
    for result, part in zip(results, parts, strict=True):
        result[chain : chain + 1] = part
    return results


def one_chain(tensors: Sequence[torch.Tensor], per_chain: Sequence[bool], chain: int = 0) -> list[torch.Tensor]:
    """The inputs of one chain, which keep a chain dimension of one."""
    return [t[chain : chain + 1] if flag else t for t, flag in zip(tensors, per_chain, strict=True)]


def check_tier(compile: str) -> None:
    """:raises ValueError: if ``compile`` names no tier."""
    if compile not in TIERS:
        raise ValueError(f"compile={compile!r} is not a tier: choose one of {', '.join(map(repr, TIERS))}.")


def choose(
    graph_module: GraphModule,
    inputs: Sequence[torch.Tensor],
    compile: str = "auto",
    calls: int = 0,
    decided: dict[str, str] | None = None,
    *,
    plain: Callable[..., tuple[torch.Tensor, ...]] | None = None,
    seconds_to_repay: float = SECONDS_TO_REPAY,
) -> Program:
    """The recorded program in the tier that is asked for, or the faster one.

    :param graph_module: the recording.
    :param inputs: example inputs; must be left unchanged by the program.
    :param compile: ``"fx"``, ``"inductor"``, ``"cuda_graph"`` (:mod:`bnn.cuda_graphs`), or ``"auto"`` to take the
        faster of the first two where that repays its compilation.
    :param calls: how often the program will run, as far as is known.
    :param decided: what ``"auto"`` was decided to be, of programs by their hash: is kept to, and added to.
    :param plain: what does the same without a compilation, if not the recording op by op.
    :param seconds_to_repay: what it must take in all before ``"auto"`` compiles.
    :raises RuntimeError: if ``compile="inductor"`` and inductor cannot compile, or what is to be a CUDA graph cannot.
    :raises ValueError: if ``compile="cuda_graph"`` and there are tensors elsewhere than on a CUDA device.
    """
    if compile == "auto" and calls > 0 and decided is not None:
        key = _hash_of(graph_module, inputs)
        if key not in decided:
            program = choose(graph_module, inputs, compile, calls, plain=plain, seconds_to_repay=seconds_to_repay)
            decided[key] = program.tier
            return program
        compile = decided[key]
    if compile == "inductor":
        return Program(run_inductor(graph_module, inputs), "inductor")
    if compile == "cuda_graph":
        with kept_randomness():
            return Program(captured(run_fx(graph_module), inputs), "cuda_graph")
    program = Program(plain or run_fx(graph_module), "fx")
    if compile == "fx" or calls <= 0:
        return program
    memory = Timings(f"tier-{_hash_of(graph_module, inputs)}")
    if "fx" not in memory.seconds:
        memory.store("fx", _seconds(program, inputs))
    if calls * memory.seconds["fx"] < seconds_to_repay:
        return program
    if memory.seconds.get("inductor", 0.0) > memory.seconds["fx"]:
        return program
    try:
        compiled = Program(run_inductor(graph_module, inputs), "inductor")
    except RuntimeError:
        memory.store("inductor", float("inf"))
        return program
    if "inductor" not in memory.seconds:
        memory.store("inductor", _seconds(compiled, inputs))
    faster = memory.seconds["inductor"] <= memory.seconds["fx"]
    return compiled if faster else program


def _seconds(program: Program, inputs: Sequence[torch.Tensor], budget: float = 0.2) -> float:
    """Median seconds of one call. A program that draws random numbers leaves the generator as it was."""
    with kept_randomness():
        times: list[float] = []
        program(*inputs)
        _wait_for(inputs[0].device)
        end = time.perf_counter() + budget
        while len(times) < 5 or (time.perf_counter() < end and len(times) < 200):
            start = time.perf_counter()
            program(*inputs)
            _wait_for(inputs[0].device)
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait_for(device: torch.device) -> None:
    """Until the device has done what it was given: a call returns before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _hash_of(graph_module: GraphModule, inputs: Sequence[torch.Tensor]) -> str:
    described = [
        graph_module.code,
        str([(tuple(t.shape), str(t.dtype), str(t.device)) for t in inputs]),
        str([(name, tuple(b.shape)) for name, b in graph_module.named_buffers()]),
        torch.__version__,
        str(torch.get_num_threads()),
        torch.get_float32_matmul_precision(),
        *sorted({torch.cuda.get_device_name(t.device) for t in inputs if t.is_cuda}),
    ]
    return hashlib.sha256("\n".join(described).encode()).hexdigest()[:32]
