"""Standard normal numbers for the steps, at the speed of memory.

Four words of 32 bits make one generator, Doty-Humphrey's SFC32 (of PractRand; sums and shifts only):

    w = a + b + k,   k ← k + 1,   a ← b ⊕ (b ≫ 9),   b ← c + (c ≪ 3),   c ← (c ⋘ 21) + w,

and two of its outputs two normal numbers, by Box and Muller (1958): with u and v uniform,

    √(−2 log u) cos 2πv   and   √(−2 log u) sin 2πv.

Compiled, many generators side by side fill the processor's vector units: 1 ns a number in single precision, where
PyTorch takes 2.8 and is the fastest otherwise, and 2.3 in double, where PyTorch takes 16 and NumPy 8
(``tests/benchmarks/noise.py``). The loop is the same for every model, so that it is compiled once on a machine; it runs
on as many threads as the rest of the step, and its numbers do not depend on how many. Where nothing is compiled,
PyTorch's generator is used, and for large nets in double precision NumPy's SFC64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.in_place import write_back
from bnn.recording import record
from bnn.tiers import Program, choose

# Generators side by side, and numbers that each makes in a call: an even number.
LANES, ROUNDS = 4096, 8
BLOCK = LANES * ROUNDS

# Blocks that are filled at once, at most, where one step needs less than a block's numbers.
MOST_BLOCKS = 16

# Seconds that PyTorch's generator must take before the compilation, five to ten seconds when cold, can repay itself.
SECONDS_TO_REPAY = 5.0

# Numbers below which it never takes so long: then nothing is recorded or timed.
FEWEST = 10**8

# Numbers from which on NumPy's generator pays in double precision.
LARGE = 1 << 16

Words = tuple[Tensor, Tensor, Tensor, Tensor]
Shapes = tuple[tuple[int, ...], ...]


def sfc32(a: Tensor, b: Tensor, c: Tensor, k: Tensor) -> tuple[Tensor, Words]:
    """One output of each generator, and what it goes on from; ``int32``, modulo 2³²."""
    word = a + b + k
    return word, (b ^ ((b >> 9) & 0x7FFFFF), c + (c << 3), ((c << 21) | ((c >> 11) & 0x1FFFFF)) + word, k + 1)


def normal_numbers(block: Tensor, *words: Tensor) -> tuple[Tensor, ...]:
    """``ROUNDS`` normal numbers of each generator, ``(ROUNDS, LANES)``, and what the generators go on from.

    ``block`` says the precision, and is not read. In double precision a uniform number takes two words: it has 63 bits.
    """
    state: Any = words

    def next_word() -> Tensor:
        nonlocal state
        word, state = sfc32(*state)
        return word

    def below() -> Tensor | float:
        """What follows the first 32 bits, in their units: between 0 and 1, without both."""
        if block.dtype == torch.float32:
            return 0.5
        return next_word().to(block.dtype) * 2.0**-32 + (0.5 + 2.0**-33)

    rows: list[Tensor] = []
    for _ in range(ROUNDS // 2):
        u = ((next_word() & 0x7FFFFFFF).to(block.dtype) + below()) * 2.0**-31  # in (0, 1]
        angle = (next_word().to(block.dtype) + below()) * (math.pi * 2.0**-31)
        radius = (-2.0 * u.log()).sqrt()
        rows += [radius * angle.cos(), radius * angle.sin()]
    return (torch.stack(rows), *state)


def start(seed: np.random.SeedSequence) -> Words:
    """Generators at independent points of their sequences: 96 random bits each, as its author seeds it."""
    bits = seed.generate_state(3 * LANES, np.uint32).view(np.int32).reshape(3, LANES)
    a, b, c = torch.from_numpy(bits.copy()).unbind(0)
    state: Words = (a, b, c, torch.ones(LANES, dtype=torch.int32))
    for _ in range(12):  # until every bit depends on all others
        _, state = sfc32(*state)
    return (state[0].clone(), state[1].clone(), state[2].clone(), state[3].clone())


@dataclass
class _Buffer:
    """Numbers that are there, as the parts that are still to be handed out."""

    numbers: Tensor
    parts: list[tuple[Tensor, ...]]
    next: int


class Noise:
    """A source of noise; part of what a run is resumed from.

    :param dtype: of the numbers.
    :param device: where they are wanted.
    :param compile: the tier, see :mod:`bnn.tiers`; ``"auto"`` compiles where that repays itself.
    :param numbers: about how many will be drawn.
    :param decided: what ``"auto"`` was decided to be, see :func:`bnn.tiers.choose`.
    :raises RuntimeError: if ``compile="inductor"`` and inductor cannot compile.

    >>> _ = torch.manual_seed(0)
    >>> noise = Noise(torch.float32, torch.device("cpu"))
    >>> first, second = noise.draw(((4, 1000), (4, 20)))
    >>> first.shape, second.shape
    (torch.Size([4, 1000]), torch.Size([4, 20]))
    """

    def __init__(
        self,
        dtype: torch.dtype,
        device: torch.device,
        compile: str = "fx",
        numbers: int = 0,
        decided: dict[str, str] | None = None,
    ) -> None:
        self.dtype, self.device = dtype, device
        self.program: Program | None = None
        self._words: Words | None = None
        self._generator: np.random.Generator | None = None
        self._buffers: dict[Shapes, _Buffer] = {}
        worth = compile == "inductor" or (compile == "auto" and numbers >= FEWEST)
        if worth and device.type == "cpu" and dtype in (torch.float32, torch.float64):
            example = [torch.empty(ROUNDS, LANES, dtype=dtype), *start(np.random.SeedSequence(0))]
            graph = write_back(record(normal_numbers, example))
            calls = numbers // BLOCK
            program = choose(
                graph, example, compile, calls, decided, plain=_by_torch, seconds_to_repay=SECONDS_TO_REPAY
            )
            self.program = program if program.tier == "inductor" else None

    @property
    def is_compiled(self) -> bool:
        """Whether numbers come from the compiled loop."""
        return self.program is not None

    def draw(self, shapes: Shapes) -> tuple[Tensor, ...]:
        """Independent draws from N(0, 1), in memory that stays theirs until the next draw of these shapes.

        :param shapes: of the tensors that are wanted together.
        """
        buffer = self._buffers.get(shapes)
        if buffer is None:
            buffer = self._buffers[shapes] = self._empty(shapes)
        if buffer.next == len(buffer.parts):
            self._fill(buffer.numbers)
            buffer.next = 0
        buffer.next += 1
        return buffer.parts[buffer.next - 1]

    def _empty(self, shapes: Shapes) -> _Buffer:
        sizes = [math.prod(shape) for shape in shapes]
        if self.program is None:
            numbers, starts = torch.empty(sum(sizes), dtype=self.dtype, device=self.device), [0]
        else:
            sizes = [-(-size // 16) * 16 for size in sizes]  # each begins where a vector register may
            blocks = _blocks(sum(sizes))
            numbers = torch.empty(blocks * BLOCK, dtype=self.dtype)
            starts = list(range(0, len(numbers) - sum(sizes) + 1, sum(sizes)))
        parts = [_views(numbers, begin, sizes, shapes) for begin in starts]
        return _Buffer(numbers, parts, next=len(parts))

    def _fill(self, numbers: Tensor) -> None:
        if self.program is not None:
            if self._words is None:
                self._words = start(np.random.SeedSequence(int(torch.randint(2**63 - 1, ()))))
            for block in numbers.view(-1, ROUNDS, LANES).unbind(0):
                self.program(block, *self._words)
        elif self.dtype == torch.float64 and self.device.type == "cpu" and len(numbers) >= LARGE:
            if self._generator is None:
                self._generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))
            self._generator.standard_normal(out=numbers.numpy())
        else:
            numbers.normal_()

    # ---- checkpoints

    def state(self) -> dict[str, Any]:
        """What to go on from, in plain data: the generators, and numbers that are there and that nobody has seen."""
        ahead = []
        for shapes, buffer in self._buffers.items():
            if buffer.next < len(buffer.parts):
                begin = buffer.parts[buffer.next][0].storage_offset()
                ahead.append((shapes, buffer.next, begin, buffer.numbers[begin:].clone()))
        generator = None if self._generator is None else self._generator.bit_generator.state
        return {
            "words": None if self._words is None else [word.clone() for word in self._words],
            "numpy": None if generator is None else [int(number) for number in generator["state"]["state"]],
            "ahead": ahead,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from another source's :meth:`state`."""
        words, numpy, self._buffers = state["words"], state["numpy"], {}
        self._words = None if words is None else tuple(word.clone() for word in words)
        self._generator = None
        if numpy is not None:
            self._generator = np.random.Generator(np.random.SFC64())
            kept = self._generator.bit_generator.state
            self._generator.bit_generator.state = {**kept, "state": {"state": np.array(numpy, dtype=np.uint64)}}
        for shapes, number, begin, rest in state["ahead"]:
            shapes = tuple(tuple(shape) for shape in shapes)
            buffer = self._buffers[shapes] = self._empty(shapes)
            if buffer.numbers[begin:].shape == rest.shape:  # else it was made by other means, and is drawn anew
                buffer.numbers[begin:] = rest
                buffer.next = number


def _by_torch(block: Tensor, *words: Tensor) -> tuple[Tensor, ...]:
    return block.normal_(), *words


def _blocks(numbers: int) -> int:
    """How many blocks to fill at once, so that few of their numbers are left over."""
    least = -(-numbers // BLOCK)

    def cost(blocks: int) -> tuple[float, int]:
        made = blocks * BLOCK
        return round(made / (made // numbers * numbers), 1), blocks

    return min(range(least, max(least, MOST_BLOCKS) + 1), key=cost)


def _views(numbers: Tensor, begin: int, sizes: Sequence[int], shapes: Shapes) -> tuple[Tensor, ...]:
    views = []
    for size, shape in zip(sizes, shapes, strict=True):
        views.append(numbers[begin : begin + math.prod(shape)].view(shape))
        begin += size
    return tuple(views)
