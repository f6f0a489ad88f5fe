"""What every stochastic-gradient kernel shares: Pyro's kernel contract, the recorded step, and statistics per draw.

An algorithm adds its state, ``init``, ``update`` and the coefficients of its update; see ``kernels/sgld.py``.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from bnn.initialization import Strategy, strategy_of
from bnn.potential import Potential
from bnn.tiers import Program, check_tier
from bnn.kernels.schedules import Schedule, check_setting, cycle_position, value_at

EnergyAndGrad = Callable[[Tensor], tuple[Tensor, Tensor]]

# Steps recorded in one program, and the largest state (chains times dim) for which that is worth its compilation.
UNROLLED_STEPS = 10
LARGEST_UNROLLED = 20_000


class Evaluation(NamedTuple):
    """Where an update evaluated the gradient last: position ``(chains, dim)``, energy ``(chains,)``, gradient."""

    position: Tensor
    energy: Tensor
    grad: Tensor


class StochasticGradientKernel(MCMCKernel):
    """Base of the kernels: runs under ``pyro.infer.MCMC`` and, many chains at once, under ``bnn.kernels.MCMC``.

    :param model: a Pyro model.
    :param step_size: time step h of the kernel's stochastic differential equation.
    :param temperature: T of the target exp(−U/T); 1 is the posterior.
    :param steps_per_sample: steps of the kernel per draw that the runner sees.
    :param batches: an iterable of argument tuples (a ``DataLoader``) in place of the arguments of ``run``.
    :param compile: how the recorded step runs: ``"auto"``, ``"inductor"``, ``"fx"`` or ``"handlers"``.
    :param replacement: draw minibatch rows independently, instead of by shuffled epochs.
    :param init_strategy: ``"auto"``, ``"prior"`` or a function of ``pyro.infer.autoguide.initialization``.
    """

    # Facts about an algorithm, for reports and tests.
    gradients_per_step = 1
    noises_per_step = 1
    metropolised = False

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Schedule,
        temperature: float | Schedule = 1.0,
        steps_per_sample: int = 1,
        batches: Iterable[Any] | None = None,
        compile: str = "auto",
        replacement: bool = False,
        init_strategy: str | Strategy = "auto",
    ) -> None:
        if not callable(model):
            raise ValueError(f"model is {type(model).__name__}; give a Pyro model, a callable.")
        check_setting("step_size", step_size, strict=not isinstance(step_size, Schedule))
        check_setting("temperature", temperature)
        if not isinstance(steps_per_sample, int) or steps_per_sample < 1:
            raise ValueError(f"steps_per_sample is {steps_per_sample!r}; give a whole number of at least 1.")
        check_tier(compile)
        strategy_of(init_strategy)
        self.model = model
        self.step_size, self.temperature, self.steps_per_sample = step_size, temperature, steps_per_sample
        self.batches, self.compile, self.replacement = batches, compile, replacement
        self.init_strategy = init_strategy
        self.transforms: dict[str, Any] | None = None
        self.num_chains: int | None = None  # set by a runner that moves several chains at once
        self.num_samples: int | None = None  # set by a runner that knows it: decides whether compiling pays
        self._initial_params: Mapping[str, Tensor] | None = None
        self._run: _Run | None = None

    # ---- what an algorithm supplies

    @abstractmethod
    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> tuple[Tensor, ...]:
        """The state at a starting position: a named tuple of tensors ``(chains, dim)``, the position first."""

    @abstractmethod
    def coefficients(self, step: int) -> tuple[Tensor, ...]:
        """The numbers of the update at ``step``: tensors of shape () or (dim,), in float64."""

    @abstractmethod
    def update(
        self,
        state: Any,
        energy_and_grad: EnergyAndGrad,
        noise: Sequence[Tensor],
        coefficients: Sequence[Tensor],
    ) -> tuple[tuple[Tensor, ...], Evaluation]:
        """One step of the algorithm, in operations of PyTorch only, so that it can be recorded."""

    def settings(self) -> dict[str, float | Schedule]:
        """The settings that may follow a schedule."""
        return {"step_size": self.step_size, "temperature": self.temperature}

    def momentum_of(self, state: Any) -> tuple[Tensor, Tensor] | None:
        """Momentum and inverse mass, None for an algorithm without."""
        del state
        return None

    @property
    def potential(self) -> Potential:
        """The recorded potential of the current run.

        :raises RuntimeError: before ``setup``.
        """
        return self._running.potential

    @property
    def _running(self) -> _Run:
        if self._run is None:
            raise RuntimeError("the kernel is not set up: run it through MCMC(kernel, ...).run(...), or call setup().")
        return self._run

    # ---- Pyro's contract

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Record the model and place the chains; called by the runner before each run."""
        chains = self.num_chains or 1
        potential = Potential(
            self.model, *args, batches=self.batches, compile=self.compile, replacement=self.replacement, **kwargs
        )
        self._run = run = _Run(potential, chains, warmup_steps)
        if self._initial_params is None:
            position = potential.initial(chains, self.init_strategy)
        else:
            params = {n: torch.as_tensor(v) for n, v in self._initial_params.items()}
            if self.num_chains is None:
                params = {n: v.unsqueeze(0) for n, v in params.items()}
            position = potential.check_start(potential.flatten(params))
            if len(position) != chains:
                raise ValueError(f"initial_params are for {len(position)} chains, but there are {chains}.")
        self._initial_params = None
        self.transforms = {n: s.transform.inv for n, s in potential.sites.items() if s.transform is not None}
        (inputs,) = run.stream.next(1)
        run.constant = not any(isinstance(value, Schedule) for value in self.settings().values())
        self._cast_coefficients(0)
        run.state = self.init(position, lambda z: potential.traced_energy_and_grad(z, inputs))
        draws = self.num_samples if self.num_samples is not None else warmup_steps
        run.planned_steps = (warmup_steps + draws) * self.steps_per_sample
        self._prepare(inputs)

    def sample(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``steps_per_sample`` steps from ``params``, unconstrained values per site."""
        run = self._running
        if params is not run.params:
            self._adopt(params)
        self.advance()
        return self.initial_params

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Unconstrained values per site: what was given before ``setup``, where the chains stand after it."""
        run = self._run
        if run is None:
            return dict(self._initial_params or {})
        if run.params is None:
            params = run.potential.unflatten(self.position)
            run.params = params if self.num_chains is not None else {n: v[0] for n, v in params.items()}
        return run.params

    @initial_params.setter
    def initial_params(self, params: Mapping[str, Tensor] | None) -> None:
        self._initial_params = params
        self._run = None

    def logging(self) -> dict[str, Any]:
        """What the progress bar shows."""
        run = self._running
        step = max(run.step - 1, 0)
        shown = {"step size": f"{value_at(self.step_size, step):.2e}"}
        if run.last_stats is not None:
            stats = dict(zip(self.stat_names, run.last_stats.mean(-1).tolist(), strict=True))
            shown["energy"] = f"{stats['energy']:.3e}"
            name = "kinetic_temperature" if "kinetic_temperature" in stats else "configurational_temperature"
            shown["temperature"] = f"{stats[name]:.2f}"
        return shown

    def diagnostics(self) -> dict[str, Any]:
        """Of the draws after warm-up (one chain): diverging draws, asked and measured temperature."""
        return self.chain_diagnostics()[0]

    def cleanup(self) -> None:
        """Forget the run: data, programs and chains. Safe to call again."""
        self._run = None
        self._initial_params = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_run": None}

    # ---- for runners that move several chains

    @property
    def position(self) -> Tensor:
        """Where the chains stand, ``(chains, dim)``, unconstrained."""
        return self._running.state[0]

    @property
    def stat_names(self) -> list[str]:
        """Names of the rows of :meth:`advance`'s statistics."""
        names = ["energy", "configurational_temperature", "gradient_norm", "squared_norm"]
        if self.momentum_of(self._running.state) is not None:
            names += ["kinetic_temperature", "momentum_squared_norm", "position_momentum"]
        return names

    @property
    def any_stopped(self) -> bool:
        """Whether a chain has left the finite numbers."""
        return self._running.any_stopped

    @property
    def steps_done(self) -> int:
        """Steps taken since ``setup``."""
        return self._running.step

    @property
    def all_stopped(self) -> bool:
        """Whether no chain is left that can move."""
        return bool(self._running.stopped.all())

    def advance(self) -> Tensor:
        """``steps_per_sample`` steps of all chains; statistics ``(len(stat_names), chains)`` of the last."""
        run = self._running
        before, last = run.state, run.last_stats
        left = self.steps_per_sample
        while left:
            if run.many is not None and left >= UNROLLED_STEPS:
                stats = self._call(run.many, UNROLLED_STEPS)
                left -= UNROLLED_STEPS
            else:
                stats = self._call(run.one, 1)
                left -= 1
        run.params = None
        if run.any_stopped or not math.isfinite(stats.sum().item()):
            stats = self._stop_chains(before, last, stats)
        run.last_stats = stats
        run.draws += 1
        if run.draws > run.warmup_steps:
            run.record(stats)
        return stats

    def chain_diagnostics(self) -> list[dict[str, Any]]:
        """Pyro's diagnostics of each chain, from the draws after warm-up."""
        run = self._running
        table = run.table()
        asked = value_at(self.temperature, max(run.step - 1, 0))
        result = []
        for chain in range(run.chains):
            start = run.stopped_at[chain]
            diverging = [] if start is None else list(range(max(start - run.warmup_steps, 0), len(table)))
            entry: dict[str, Any] = {"divergences": diverging, "temperature asked": asked}
            for name in ("kinetic_temperature", "configurational_temperature"):
                if name in self.stat_names and len(table):
                    row = self.stat_names.index(name)
                    entry[name.replace("_", " ")] = float(table[:, row, chain].double().mean())
            result.append(entry)
        return result

    def sample_stats(self) -> dict[str, Tensor]:
        """Statistics of the draws after warm-up: name -> ``(chains, draws)``."""
        run = self._running
        table = run.table()
        draws = len(table)
        stats = {name: table[:, row].T.contiguous() for row, name in enumerate(self.stat_names)}
        steps = [(run.warmup_steps + draw + 1) * self.steps_per_sample - 1 for draw in range(draws)]
        for name, setting in self.settings().items():
            values = torch.tensor([value_at(setting, step) for step in steps], dtype=torch.float64)
            stats[name] = values.expand(run.chains, draws).contiguous()
        if isinstance(self.step_size, Schedule):
            cycle = [cycle_position(self.step_size, step) for step in steps]
            if any(cycle):
                stats["cycle_position"] = torch.tensor(cycle, dtype=torch.float64).expand(run.chains, draws).contiguous()
        stats["diverging"] = torch.zeros(run.chains, draws, dtype=torch.bool)
        for chain, entry in enumerate(self.chain_diagnostics()):
            stats["diverging"][chain, entry["divergences"]] = True
        return stats

    # ---- the recorded step

    def _prepare(self, inputs: list[Tensor]) -> None:
        run = self._running
        run.one = self._build(1, inputs)
        small = run.chains * run.potential.dim <= LARGEST_UNROLLED
        if self.steps_per_sample >= UNROLLED_STEPS and small and getattr(run.one, "tier", "") == "inductor":
            run.many = self._build(UNROLLED_STEPS, inputs)

    def _build(self, steps: int, inputs: list[Tensor]) -> Program:
        run = self._running
        fields, count = type(run.state), len(run.state)
        noises, num_inputs = self.noises_per_step, len(inputs)
        coefficients = len(self._cast_coefficients(0))

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            state: Any = fields(*tensors[:count])
            rest = tensors[count:]
            noise, rest = rest[: steps * noises], rest[steps * noises :]
            batches, rest = rest[: steps * num_inputs], rest[steps * num_inputs :]
            for step in range(steps):
                batch = batches[step * num_inputs : (step + 1) * num_inputs]
                numbers = rest if run.constant else rest[step * coefficients : (step + 1) * coefficients]
                state, evaluation = self.update(
                    state,
                    lambda z, batch=batch: run.potential.traced_energy_and_grad(z, batch),  # type: ignore[misc]
                    noise[step * noises : (step + 1) * noises],
                    numbers,
                )
            return (*state, self._stats(state, evaluation))

        noise = torch.zeros(steps * noises, run.chains, run.potential.dim, dtype=run.potential.dtype)
        noise = noise.to(run.potential.device)
        run.noise[steps] = (noise, noise.unbind(0))
        numbers = [c for s in range(1 if run.constant else steps) for c in self._cast_coefficients(s)]
        example = [*run.state, *noise.unbind(0), *(inputs * steps), *numbers]
        per_chain = [True] * (len(example) - len(numbers)) + [False] * len(numbers)
        # The statistics lead with their own dimension; the loop over chains concatenates along the first.
        return run.potential.program(
            lambda *t: _stats_last(function(*t)), example, per_chain, run.planned_steps // steps
        )

    def _call(self, program: Program, steps: int) -> Tensor:
        run = self._running
        buffer, noise = run.noise[steps]
        buffer.normal_()
        batches = [tensor for inputs in run.stream.next(steps) for tensor in inputs]
        if run.constant:
            numbers: Sequence[Tensor] = self._cast_coefficients(0)
        else:
            numbers = [c for s in range(steps) for c in self._cast_coefficients(run.step + s)]
        *state, stats = program(*run.state, *noise, *batches, *numbers)
        run.state = type(run.state)(*state)
        run.step += steps
        return stats.T

    def _cast_coefficients(self, step: int) -> tuple[Tensor, ...]:
        run = self._running
        if run.constant and run.numbers is not None:
            return run.numbers
        potential = run.potential
        run.numbers = tuple(c.to(potential.dtype).to(potential.device) for c in self.coefficients(step))
        return run.numbers

    def _stats(self, state: Any, evaluation: Evaluation) -> Tensor:
        position, energy, grad = evaluation
        dim = position.shape[-1]
        rows = [
            energy,
            (position * grad).sum(-1) / dim,
            torch.linalg.vector_norm(grad, dim=-1),
            torch.linalg.vector_norm(state[0], dim=-1).square(),
        ]
        moving = self.momentum_of(state)
        if moving is not None:
            momentum, inverse_mass = moving
            norm = torch.linalg.vector_norm(momentum, dim=-1).square()
            kinetic = norm * inverse_mass if inverse_mass.dim() == 0 else (momentum.square() * inverse_mass).sum(-1)
            rows += [kinetic / dim, norm, (state[0] * momentum).sum(-1)]
        return torch.stack(rows)

    def per_coordinate(self, name: str, value: Any) -> Tensor:
        """A setting given as a number, per site (dict) or per coordinate (vector), as a tensor () or (dim,).

        :raises ValueError: if it is not positive and finite, or of a wrong shape.
        """
        potential = self.potential
        if isinstance(value, Mapping):
            unknown = sorted(set(value) - set(potential.sites))
            if unknown:
                raise ValueError(f"{name} names sites {unknown}; the model's latent sites are {list(potential.sites)}.")
            result = torch.ones(potential.dim, dtype=torch.float64)
            for site, number in value.items():
                place = potential.sites[site].slice
                number = torch.as_tensor(number, dtype=torch.float64)
                if number.dim() and number.numel() != place.stop - place.start:
                    raise ValueError(
                        f"{name} of site {site!r} has shape {tuple(number.shape)}; give a number or "
                        f"{tuple(potential.sites[site].shape)}."
                    )
                result[place] = number.reshape(-1) if number.dim() else number
        else:
            result = torch.as_tensor(value, dtype=torch.float64)
            if result.dim() and result.shape != (potential.dim,):
                raise ValueError(
                    f"{name} has shape {tuple(result.shape)}; give a number, a dict of numbers per site, or a vector "
                    f"of {potential.dim} values."
                )
        if not (torch.isfinite(result).all() and (result > 0).all()):
            raise ValueError(f"{name} holds values that are not positive and finite; give values > 0.")
        return result

    # ---- chains that leave the finite numbers

    def _stop_chains(self, before: Any, last: Tensor | None, stats: Tensor) -> Tensor:
        run = self._running
        bad = ~torch.isfinite(stats).all(0) | ~torch.isfinite(run.state[0]).all(-1)
        for chain in (bad & ~run.stopped).nonzero().flatten().tolist():
            run.stopped_at[chain] = run.draws
            site = run.potential.site_at(run.state[0][chain : chain + 1]) or "the energy"
            step_size = value_at(self.step_size, max(run.step - 1, 0))
            kept = max(run.draws - run.warmup_steps, 0)
            warnings.warn(
                f"chain {chain} left the finite numbers by step {run.step}, first at {site!r}, and was stopped. Its "
                f"{kept} draws so far are kept; those after repeat its last finite state and are marked diverging. "
                f"Use a smaller step_size (it was {step_size:.3g}), or standardise the data.",
                RuntimeWarning,
                stacklevel=4,
            )
        run.stopped |= bad
        run.any_stopped = bool(run.stopped.any())
        keep = run.stopped.unsqueeze(-1)
        run.state = type(before)(*(torch.where(keep, old, new) for old, new in zip(before, run.state, strict=True)))
        return stats if last is None else torch.where(run.stopped, last, stats)

    def _adopt(self, params: Mapping[str, Tensor]) -> None:
        """Continue from values that did not come from this kernel."""
        run = self._running
        given = dict(params) if self.num_chains is not None else {n: v.unsqueeze(0) for n, v in params.items()}
        current = run.potential.unflatten(self.position)
        if all(given[n].data_ptr() == current[n].data_ptr() for n in current if n in given) and len(given) == len(current):
            return
        position = run.potential.check_start(run.potential.flatten(given))
        (inputs,) = run.stream.next(1)
        run.state = self.init(position, lambda z: run.potential.traced_energy_and_grad(z, inputs))


def _stats_last(outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (*outputs[:-1], outputs[-1].T)


class _Run:
    """All that belongs to one run of a kernel and is not part of its settings."""

    def __init__(self, potential: Potential, chains: int, warmup_steps: int) -> None:
        self.potential, self.chains, self.warmup_steps = potential, chains, warmup_steps
        self.stream = potential.stream(chains)
        self.state: Any = None
        self.params: dict[str, Tensor] | None = None
        self.constant = True
        self.numbers: tuple[Tensor, ...] | None = None
        self.one: Program = _not_built
        self.many: Program | None = None
        self.noise: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}
        self.planned_steps = 0
        self.step = 0
        self.draws = 0
        self.last_stats: Tensor | None = None
        self.stopped = torch.zeros(chains, dtype=torch.bool, device=potential.device)
        self.any_stopped = False
        self.stopped_at: list[int | None] = [None] * chains
        self._table: Tensor | None = None
        self._rows = 0

    def record(self, stats: Tensor) -> None:
        """Append one draw's statistics."""
        if self._table is None:
            self._table = stats.new_empty(64, *stats.shape)
        elif self._rows == len(self._table):
            self._table = torch.cat([self._table, torch.empty_like(self._table)])
        self._table[self._rows] = stats
        self._rows += 1

    def table(self) -> Tensor:
        """Statistics ``(draws, names, chains)``."""
        return torch.empty(0, 0, self.chains) if self._table is None else self._table[: self._rows].cpu()


def _not_built(*tensors: Tensor) -> tuple[Tensor, ...]:
    raise RuntimeError("the kernel's step is recorded in setup(), which has not run.")
