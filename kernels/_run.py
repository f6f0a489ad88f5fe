"""One run of a kernel: its recorded step, its chains' state, and their statistics."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.kernels._algorithm import Algorithm, EnergyAndGrad
from bnn.kernels._coordinates import Number
from bnn.kernels._draw_statistics import DrawStatistics
from bnn.kernels._metric import Identity, Metric
from bnn.kernels._record import Record
from bnn.kernels.schedules import value_at
from bnn.kernels.variance_reduction import Anchor, Anchoring, reduced
from bnn.minibatch import Stream
from bnn.noise import Noise
from bnn.potential import Potential
from bnn.tiers import Program

# Steps recorded in one program, and the largest state (chains times dim) for which that is worth its compilation.
UNROLLED_STEPS = 10
LARGEST_UNROLLED = 20_000

# Steps whose scheduled coefficients are worked out at once.
SCHEDULED_AHEAD = 32


class Run:
    """All that belongs to one run of a kernel and is not part of its settings.

    :param kernel: the algorithm.
    :param potential: the recorded model.
    :param chains: number of chains.
    :param warmup_steps: draws that are not recorded.
    """

    def __init__(self, kernel: Algorithm, potential: Potential, chains: int, warmup_steps: int) -> None:
        self.kernel = kernel
        self.potential, self.chains, self.warmup_steps = potential, chains, warmup_steps
        # Gradients of all data as sums over the model's minibatches; one that takes all data at once has none to sum.
        self.in_chunks = kernel.needs_all_data and (bool(potential.plates) or potential.batches is not None)
        self.stream = Stream([], None, chains) if self.in_chunks else potential.stream(chains)
        self.metric: Metric = Identity()
        reduction = kernel.variance_reduction
        self.anchoring = None if reduction is None else Anchoring(reduction, potential)
        self.state: Any = None
        self.params: dict[str, Tensor] | None = None
        self.constant = True
        self._numbers: dict[int, tuple[Tensor, ...]] = {}
        self._phases: dict[Hashable, tuple[Tensor, ...]] = {}
        self.coordinates: dict[str, Number] = {}  # settings per coordinate, worked out once
        self.unrolled = 0  # steps of the program that records several, 0 without one
        self._programs: dict[Any, Program] = {}
        self.noise = Noise(potential.dtype, potential.device)
        self.planned_steps = 0
        self.step = 0
        self.draws = 0
        self.last_stats: Tensor | None = None
        self.stopped = torch.zeros(chains, dtype=torch.bool, device=potential.device)
        self.any_stopped = False
        self.stopped_at: list[int | None] = [None] * chains
        self._statistics: DrawStatistics | None = None
        self.record = Record(self)

    # ---- the chains' coordinates, and the model's

    @property
    def position(self) -> Tensor:
        """Where the chains stand in the model's coordinates, ``(chains, dim)``."""
        return self.metric.forward(self.state[0], self.metric.tensors)

    def place(self, position: Tensor) -> list[Tensor]:
        """Start the chains at a position of the model's coordinates; the minibatches that were used."""
        (inputs,) = self.stream.next(1)
        tensors = self.metric.tensors
        if self.anchoring is not None:
            self.anchoring.start(position, self.step, lambda z: self._evaluate(z, inputs))
        self.state = self.kernel.init(
            self.metric.inverse(position), lambda u: self._energy_and_grad(u, inputs, tensors, self._anchor)
        )
        return inputs

    def change_metric(self, metric: Metric) -> None:
        """Go on in other coordinates from where the chains stand: momenta have the same law in all of them."""
        position, old = self.position, self.state
        self.metric = metric
        self.place(position)
        kept = {name: getattr(old, name) for name in ("momentum", "thermostat") if hasattr(old, name)}
        self.state = self.state._replace(**kept)

    def gradient(self, position: Tensor | None = None, inputs: Sequence[Tensor] | None = None) -> Tensor:
        """∇Û in the model's coordinates: at ``position`` or where the chains stand, on given minibatches or others."""
        inputs = self.stream.next(1)[0] if inputs is None else inputs

        def evaluate(z: Tensor) -> tuple[Tensor, Tensor]:
            if self.in_chunks:
                return self._evaluate(z, inputs)
            return z.new_zeros(len(z)), self.potential.gradient_on(z, inputs)

        return self._reduced(evaluate, self._anchor)(self.position if position is None else position)[1]

    @property
    def is_noisy(self) -> bool:
        """Whether two gradients at one place differ: minibatches, or random numbers of the model's own."""
        return bool(self.potential.plates) or self.potential.batches is not None or self.potential.is_random

    def full_energy(self, u: Tensor) -> Tensor:
        """Energy of all data at a position of the chains' coordinates, ``(chains,)``."""
        calls = self.planned_steps // self.kernel.steps_at_once(0)
        return self.potential.full_energy(self.metric.forward(u, self.metric.tensors), calls)

    def _evaluate(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Û and ∇Û in the model's coordinates, on given minibatches; or U and ∇U."""
        if self.in_chunks:
            return self.potential.full_energy_and_grad(position, self.planned_steps)
        if self.potential.share is not None:
            return self.potential.evaluate(position, inputs)
        return self.potential.traced_energy_and_grad(position, inputs)

    def _energy_and_grad(
        self, u: Tensor, inputs: Sequence[Tensor], tensors: Sequence[Tensor], anchor: Sequence[Tensor] = ()
    ) -> tuple[Tensor, Tensor]:
        evaluate = self._reduced(lambda z: self._evaluate(z, inputs), anchor)
        energy, grad = evaluate(self.metric.forward(u, tensors))
        return energy, self.metric.pull_back(grad, tensors)

    @property
    def _anchor(self) -> tuple[Tensor, ...]:
        """The anchor of the control variates, in the model's coordinates; nothing without them."""
        return () if self.anchoring is None or self.anchoring.anchor is None else self.anchoring.anchor

    @staticmethod
    def _reduced(energy_and_grad: EnergyAndGrad, anchor: Sequence[Tensor]) -> EnergyAndGrad:
        return reduced(energy_and_grad, Anchor(*anchor)) if anchor else energy_and_grad

    # ---- statistics

    @property
    def statistics(self) -> DrawStatistics:
        """What is measured of each draw."""
        if self._statistics is None:
            numbers = self.numbers_at(self.step)
            self._statistics = DrawStatistics(self.kernel, self.potential.sites, self.state, numbers)
        return self._statistics

    @property
    def stat_names(self) -> list[str]:
        """Names of the columns of :meth:`advance`'s statistics."""
        return self.statistics.names

    # ---- the recorded step

    def prepare(self, inputs: list[Tensor]) -> None:
        """Record the step, so that what cannot work fails before any sampling."""
        _ = self.statistics  # its constants are no part of a recording
        self.noise = self._source()
        steps = self.kernel.steps_at_once(0)
        times = self.planned_steps // steps
        even = self.potential.batches is None  # a loader's last batch may be smaller
        small = self.chains * self.potential.dim <= LARGEST_UNROLLED
        tier = ""
        if steps > 1:
            tier = self._program(1, False, inputs, self.planned_steps - times).tier
        if self.anchoring is not None and self.anchoring.steps_left(0, steps) < UNROLLED_STEPS:
            small = False  # no program of several steps may run over a new anchor
        if steps >= UNROLLED_STEPS and small and even and tier == "inductor":
            self.unrolled = UNROLLED_STEPS
            self._program(UNROLLED_STEPS, True, inputs * UNROLLED_STEPS, times * (steps // UNROLLED_STEPS))
        if not self.unrolled or steps % UNROLLED_STEPS:
            self._program(1, True, inputs, times)

    def _source(self) -> Noise:
        """The noise of the steps."""
        potential, compile = self.potential, self.potential.compile
        if not self.kernel.noises_per_step or (potential.share is not None and compile == "auto"):
            compile = "fx"  # ranks that share the data draw the same numbers, and each has a clock of its own
        numbers = self.planned_steps * self.kernel.noises_per_step * self.chains * potential.dim
        return Noise(potential.dtype, potential.device, compile, numbers, potential.decided)

    def noise_shapes(self, steps: int) -> tuple[tuple[int, int], ...]:
        """Of the noise that so many steps take."""
        return ((self.chains, self.potential.dim),) * (steps * self.kernel.noises_per_step)

    def take_steps(self, count: int) -> Tensor:
        """``count`` steps of all chains; statistics ``(chains, names)`` of the last, or its energy."""
        stats: tuple[Tensor, ...] = ()
        while count:
            left = count if self.anchoring is None else self.anchoring.steps_left(self.step, count)
            steps = self.unrolled if self.unrolled and left >= self.unrolled else 1
            stats = self.call(steps, observed=steps > 1 or count == 1)
            count -= steps
        return stats[0]

    def call(self, steps: int, observed: bool = True) -> tuple[Tensor, ...]:
        """One call of the program of ``steps`` steps; what it returns besides the state."""
        if self.anchoring is not None:
            self.anchoring.before(self.step, self.position)
        batches = [tensor for inputs in self.stream.next(steps) for tensor in inputs]
        program = self._program(steps, observed, batches)
        noise = self.noise.draw(self.noise_shapes(steps))
        if self.constant:
            numbers: Sequence[Tensor] = self.numbers_at(0)
        else:
            numbers = [c for s in range(steps) for c in self.numbers_at(self.step + s)]
        outputs = program(*self.state, *noise, *batches, *self._anchor, *numbers, *self.metric.tensors)
        fields = len(self.state)
        self.state = type(self.state)(*outputs[:fields])
        self.step += steps
        return tuple(outputs[fields:])

    def _program(self, steps: int, observed: bool, batches: Sequence[Tensor], calls: int = 0) -> Program:
        """The recorded steps; shapes are part of a recording, so a loader's smaller last batch has one of its own."""
        key: Any = (steps, observed)
        if self.potential.batches is not None:
            key = (*key, *(tensor.shape for tensor in batches))
        program = self._programs.get(key)
        if program is None:
            program = self._programs[key] = self._build(steps, observed, batches, calls)
        return program

    def _build(self, steps: int, observed: bool, inputs: Sequence[Tensor], calls: int) -> Program:
        fields, count = type(self.state), len(self.state)
        noises, num_inputs = self.kernel.noises_per_step, len(inputs) // steps
        coefficients, maps, anchored = len(self.numbers_at(0)), len(self.metric.tensors), len(self._anchor)

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            state: Any = fields(*tensors[:count])
            end = len(tensors) - maps
            rest, metric = tensors[count:end], tensors[end:]
            noise, rest = rest[: steps * noises], rest[steps * noises :]
            batches, rest = rest[: steps * num_inputs], rest[steps * num_inputs :]
            anchor, rest = rest[:anchored], rest[anchored:]
            for step in range(steps):
                batch = batches[step * num_inputs : (step + 1) * num_inputs]
                numbers = rest if self.constant else rest[step * coefficients : (step + 1) * coefficients]
                before = state
                state, evaluation = self.kernel.update(
                    state,
                    lambda u, batch=batch: self._energy_and_grad(u, batch, metric, anchor),  # type: ignore[misc]
                    noise[step * noises : (step + 1) * noises],
                    numbers,
                )
            if not observed:
                return tuple(state)
            if self.kernel.observes_energy:
                return (*state, evaluation.energy.unsqueeze(-1))
            position = self.metric.forward(state[0], metric)
            return (*state, self.statistics.row(before, state, evaluation, position, numbers))

        like = self.potential
        noise = [torch.zeros(shape, dtype=like.dtype, device=like.device) for shape in self.noise_shapes(steps)]
        numbers = [c for s in range(1 if self.constant else steps) for c in self.numbers_at(s)]
        numbers += self.metric.tensors
        if self.in_chunks or self.potential.share is not None:
            return Program(function, "chunks")  # whose gradient is many calls of a recorded program, or many ranks'
        example = [*self.state, *noise, *inputs, *self._anchor, *numbers]
        per_chain = [True] * (len(example) - len(numbers)) + [False] * len(numbers)
        return self.potential.program(function, example, per_chain, calls)

    def program(
        self,
        name: str,
        function: Callable[..., tuple[Tensor, ...]],
        per_chain: Sequence[Tensor],
        shared: Sequence[Tensor],
        calls: int,
    ) -> Program:
        """A program of the kernel's own, beside the step, recorded at its first use.

        :param per_chain: its first inputs, which lead with the chains.
        :param shared: the rest of them.
        :param calls: about how often it will run.
        """
        if name not in self._programs:
            flags = [True] * len(per_chain) + [False] * len(shared)
            self._programs[name] = self.potential.program(function, [*per_chain, *shared], flags, calls)
        return self._programs[name]

    def forget_numbers(self) -> None:
        """Have the coefficients worked out anew."""
        self._numbers, self._phases = {}, {}

    def numbers_at(self, step: int) -> tuple[Tensor, ...]:
        """The kernel's coefficients in the precision and on the device of the chains."""
        if self.constant:
            step = 0
        elif (phase := self.kernel.phase(step)) is not None:
            if phase not in self._phases:
                self._phases[phase] = self._numbers_from(step, 1)[step]
            return self._phases[phase]
        if step not in self._numbers:
            self._numbers = self._numbers_from(step, 1 if self.constant else SCHEDULED_AHEAD)
        return self._numbers[step]

    def _numbers_from(self, start: int, count: int) -> dict[int, tuple[Tensor, ...]]:
        """Coefficients of ``count`` steps: one array of numbers costs as much as each of them by itself."""
        dtype, device = self.potential.dtype, self.potential.device
        values = [self.kernel.coefficients(start)]
        if any(isinstance(value, np.ndarray) for value in values[0]):  # per coordinate: too large to keep ahead
            return {start: tuple(torch.as_tensor(value, dtype=dtype, device=device) for value in values[0])}
        values += [self.kernel.coefficients(step) for step in range(start + 1, start + count)]
        rows = torch.tensor(values, dtype=dtype, device=device).unbind(0)
        return {start + number: row.unbind(0) for number, row in enumerate(rows)}

    # ---- chains that leave the finite numbers

    def _site_of(self, chain: int) -> str:
        """Where a chain left the finite numbers: the first such site or, with a position still finite, the largest."""
        for part in self.state:
            if part.shape[-1] and (name := self.potential.site_at(part[chain : chain + 1])):
                return f"site {name!r}"
        place = int(self.state[0][chain].abs().argmax())
        name = next(n for n, s in self.potential.sites.items() if s.slice.start <= place < s.slice.stop)
        return f"site {name!r} (of largest values, up to {self.state[0][chain, place].item():.3g})"

    def stop_chains(self, before: Any, last: Tensor | None, stats: Tensor) -> Tensor:
        """Put chains that are not finite back to ``before``, for good, and say so."""
        bad = ~torch.isfinite(stats).all(-1) | ~torch.isfinite(self.state[0]).all(-1)
        for chain in (bad & ~self.stopped).nonzero().flatten().tolist():
            self.stopped_at[chain] = self.draws
            site = self._site_of(chain)
            step_size = value_at(self.kernel.settings()["step_size"], max(self.step - 1, 0))
            kept = max(self.draws - self.warmup_steps, 0)
            warnings.warn(
                f"chain {chain} left the finite numbers by step {self.step} at {site}, and was stopped. Its "
                f"{kept} draws so far are kept; those after repeat its last finite state and are marked diverging. "
                f"Use a smaller step_size (it was {step_size:.3g}), or standardise the data.",
                RuntimeWarning,
                stacklevel=4,
            )
        self.stopped |= bad
        self.any_stopped = bool(self.stopped.any())
        keep = self.stopped.unsqueeze(-1)
        self.state = type(before)(*(torch.where(keep, old, new) for old, new in zip(before, self.state, strict=True)))
        return stats if last is None else torch.where(keep, last, stats)
