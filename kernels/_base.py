"""What every stochastic-gradient kernel shares: Pyro's kernel contract, the recorded step, and statistics per draw.

An algorithm adds its state, ``init``, ``update`` and the coefficients of its update; see ``kernels/sgld.py``.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from bnn.initialization import Strategy, strategy_of
from bnn.kernels._algorithm import EnergyAndGrad, Evaluation
from bnn.kernels._coordinates import Number, spread
from bnn.kernels._run import Run
from bnn.kernels._warmup import LEAST, StepRule, Warmup
from bnn.kernels.preconditioners import Preconditioner
from bnn.kernels.schedules import Schedule, check_setting, value_at
from bnn.kernels.variance_reduction import VarianceReduction, check_reduction
from bnn.potential import Potential
from bnn.precision import check_precision
from bnn.ranks import Ranks
from bnn.tiers import check_tier

# Where step_size="auto" starts before anything is known.
FIRST_STEP = 0.1


class StochasticGradientKernel(MCMCKernel):
    """Base of the kernels: runs under ``pyro.infer.MCMC`` and, many chains at once, under ``bnn.kernels.MCMC``.

    :param model: a Pyro model.
    :param step_size: time step h of the kernel's stochastic differential equation; ``"auto"`` finds it in warm-up.
    :param temperature: T of the target exp(−U/T); 1 is the posterior.
    :param steps_per_sample: steps of the kernel per draw that the runner sees.
    :param batches: an iterable of argument tuples (a ``DataLoader``) in place of the arguments of ``run``.
    :param compile: how the recorded step runs: ``"auto"``, ``"inductor"``, ``"fx"``, ``"cuda_graph"`` or
        ``"handlers"``.
    :param replacement: draw minibatch rows independently, instead of by shuffled epochs.
    :param init_strategy: ``"auto"``, ``"prior"`` or a function of ``pyro.infer.autoguide.initialization``.
    :param variance_reduction: :class:`~bnn.kernels.ControlVariate` or :class:`~bnn.kernels.SVRG`, less noise in the
        minibatch gradients at two of them a step.
    :param precision: of the products inside gradients: ``"full"``, ``"bfloat16"`` or ``"tf32"``; chains keep the
        model's own precision. See :mod:`bnn.precision`.
    """

    # Facts about an algorithm, for reports and tests.
    gradients_per_step: float = 1  # of minibatches; known when the model is, if passes over all data are among them
    noises_per_step = 1
    metropolised = False
    balances_norms = False  # whether the rates at which norms change are known: bnn/norm_identities.py
    caveat = ""  # what a reader of the draws must know, for summary() and ArviZ
    evaluates_at_draws = True  # whether the last gradient of a step is met at a place with the law of the draws
    observes_energy = False  # whether the last step to a draw gives its energy alone, and ``take`` the statistics
    needs_all_data = False  # whether gradients are of all data, summed over minibatches if the model has these
    metric: Preconditioner | None = None  # how the metric is learnt in warm-up, if it is
    changing: tuple[str, ...] = ("_warmup",)  # attributes that change in a run: part of what it is resumed from

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: Any,  # a number, a schedule or "auto"
        temperature: float | Schedule = 1.0,
        steps_per_sample: int = 1,
        batches: Iterable[Any] | None = None,
        compile: str = "auto",
        replacement: bool = False,
        init_strategy: str | Strategy = "auto",
        variance_reduction: VarianceReduction | None = None,
        precision: str = "full",
    ) -> None:
        if not callable(model):
            raise ValueError(f"model is {type(model).__name__}; give a Pyro model, a callable.")
        self.adapts_step_size = isinstance(step_size, str) and step_size == "auto"
        if self.adapts_step_size and type(self).step_rule is StochasticGradientKernel.step_rule:
            raise ValueError(f"{type(self).__name__} knows no rule for step_size='auto': give a number.")
        self.step_size: float | Schedule = FIRST_STEP if self.adapts_step_size else step_size
        check_setting("step_size", self.step_size, strict=not isinstance(step_size, Schedule))
        check_setting("temperature", temperature)
        if not isinstance(steps_per_sample, int) or isinstance(steps_per_sample, bool) or steps_per_sample < 1:
            raise ValueError(f"steps_per_sample is {steps_per_sample!r}; give a whole number of at least 1.")
        check_tier(compile)
        strategy_of(init_strategy)
        check_reduction(variance_reduction, self.metropolised)
        check_precision(precision)
        self.variance_reduction, self.precision = variance_reduction, precision
        self.model = model
        self.temperature, self.steps_per_sample = temperature, steps_per_sample
        self.batches, self.compile, self.replacement = batches, compile, replacement
        self.init_strategy = init_strategy
        self.transforms: dict[str, Any] | None = None
        self.num_chains: int | None = None  # set by a runner that moves several chains at once
        self.ranks: Ranks | None = None  # set by a runner that shares the rows of minibatches out
        self.num_samples: int | None = None  # set by a runner that knows it: decides whether compiling pays
        self._initial_params: Mapping[str, Tensor] | None = None
        self._run: Run | None = None
        self._warmup: Warmup | None = None
        self._decided: dict[str, str] = {}  # tiers of a run that is resumed

    # ---- what an algorithm supplies

    @abstractmethod
    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> tuple[Tensor, ...]:
        """The state at a starting position: a named tuple of tensors ``(chains, dim)``, the position first."""

    @abstractmethod
    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The numbers of the update at ``step``, of shape () or (dim,).

        In NumPy: under a schedule they are worked out at every step, at a tenth of what scalars cost in PyTorch.
        """

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
        step_size = self.step_size_at(0) if self.adapts_step_size else self.step_size
        return {"step_size": step_size, "temperature": self.temperature}

    def step_rule(self) -> StepRule:
        """How ``step_size="auto"`` finds it; an algorithm that has a rule overrides this."""
        raise NotImplementedError

    def step_size_at(self, step: int) -> float:
        """H at ``step``: by the schedule, or as warm-up has found it so far."""
        rule = None if self._warmup is None else self._warmup.step_rule
        return value_at(self.step_size, step) if rule is None else rule.step_size

    def phase(self, step: int) -> Hashable:
        """Steps of one phase have the same coefficients; None where that is not known."""
        del step
        return None

    def planned_steps(self, draws: int) -> int:
        """About how many steps so many draws take."""
        return draws * self.steps_per_sample

    def stats_at(self, step: int) -> dict[str, float]:
        """What else is known of a step without running it, for ``sample_stats``."""
        del step
        return {}

    def check_plan(self, draws: int | None) -> None:
        """Refuse settings that do not suit the model, or a run of so many draws; called when the model is known.

        :param draws: all draws, of warm-up too; None where the runner does not say.
        :raises ValueError: saying what to change.
        """
        del draws

    def check_warmup(self, draws: int) -> None:
        """Refuse a warm-up of so many draws, if it is too short for what is to be found in it.

        Called by ``setup``; for none at all before the first draw, since Pyro sets kernels up to look at them.

        :raises ValueError: saying what to change.
        """
        least = LEAST if self.metric is not None or self.adapts_step_size else 0
        if draws < least:
            raise ValueError(
                "step sizes and metrics ('auto', 'dense', ...) are found in warm-up: give warmup_steps, some hundreds "
                f"(it is {draws}; at least {least})."
            )

    def is_constant(self) -> bool:
        """Whether :meth:`coefficients` are the same at every step."""
        return not any(isinstance(value, Schedule) for value in self.settings().values())

    def steps_to_draw(self, step: int) -> int:
        """Steps from ``step`` to the next draw: more than ``steps_per_sample`` where draws are not due all the time."""
        del step
        return self.steps_per_sample

    def steps_at_once(self, step: int) -> int:
        """Steps from ``step`` that nothing comes between: those to the next draw, unless ``take`` does otherwise."""
        return self.steps_to_draw(step)

    def momentum_of(self, state: Any, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Momentum and inverse mass, None for an algorithm without."""
        del state, coefficients
        return None

    def adapt(self, stats: Tensor) -> None:
        """Learn from a draw of warm-up, given its statistics ``(chains, names)``."""
        if self._warmup is not None:
            self._warmup(self._running, stats)

    def take(self, run: Run) -> Tensor:
        """The steps to the next draw; statistics ``(chains, names)`` of the last."""
        return run.take_steps(self.steps_to_draw(run.step))

    def extra_stats(self, state: Any) -> dict[str, Tensor]:
        """Statistics ``(chains,)`` of an algorithm's own, recorded with the step."""
        del state
        return {}

    @property
    def potential(self) -> Potential:
        """The recorded potential of the current run.

        :raises RuntimeError: before ``setup``.
        """
        return self._running.potential

    @property
    def _running(self) -> Run:
        if self._run is None:
            raise RuntimeError("the kernel is not set up: run it through MCMC(kernel, ...).run(...), or call setup().")
        return self._run

    # ---- Pyro's contract

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Record the model and place the chains; called by the runner before each run."""
        chains = self.num_chains or 1
        potential = Potential(
            self.model, *args, batches=self.batches, compile=self.compile, replacement=self.replacement,
            precision=self.precision, ranks=self.ranks, **kwargs,
        )  # fmt: skip
        potential.decided.update(self._decided)
        self._run = run = Run(self, potential, chains, warmup_steps)
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
        learner = None if self.metric is None else self.metric.learner(potential)
        if learner is not None:
            run.metric = learner.start()
        self._warmup = None
        if self.adapts_step_size or learner is not None:
            self._warmup = Warmup(warmup_steps, self.step_rule() if self.adapts_step_size else None, learner)
        run.constant = self.is_constant()
        run.numbers_at(0)
        draws = self.num_samples if self.num_samples is not None else warmup_steps
        run.planned_steps = self.planned_steps(warmup_steps + draws)
        inputs = run.place(position)
        if run.anchoring is not None:
            self.gradients_per_step = type(self).gradients_per_step * run.anchoring.gradients_per_step
        elif run.in_chunks:
            self.gradients_per_step = potential.minibatches_in_all
        self.check_plan(None if self.num_samples is None else warmup_steps + draws)
        if warmup_steps:
            self.check_warmup(warmup_steps)
        if self._warmup is not None:
            self._warmup.start(run)
        run.prepare(inputs)

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
        shown = {"step size": f"{value_at(self.settings()['step_size'], step):.2e}"}
        if run.last_stats is not None:
            stats = dict(zip(run.stat_names, run.last_stats.mean(0).tolist(), strict=True))
            shown["energy"] = f"{stats['energy']:.3e}"
            name = "kinetic_temperature" if "kinetic_temperature" in stats else "configurational_temperature"
            shown["temperature"] = f"{stats[name]:.2f}"
        return shown

    @property
    def warmup_report(self) -> str | None:
        """What the last warm-up chose for a step size, and what is expected of it; None where it was given."""
        rule = None if self._warmup is None else self._warmup.step_rule
        return None if rule is None else rule.report()

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
        return self._running.position

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

    @torch.no_grad()
    def advance(self) -> Tensor:
        """``steps_per_sample`` steps of all chains; statistics ``(chains, len(stat_names))`` of the last."""
        run = self._running
        if not run.draws and not run.warmup_steps:
            self.check_warmup(0)
        before, last = run.state, run.last_stats
        stats = self.take(run)
        run.params = None
        if run.any_stopped or not math.isfinite(stats.sum().item()):
            stats = run.stop_chains(before, last, stats)
        run.last_stats = stats
        run.draws += 1
        if run.draws > run.warmup_steps:
            run.record.add(stats, run.step - 1)
        else:
            self.adapt(stats)
        return stats

    def chain_diagnostics(self) -> list[dict[str, Any]]:
        """Pyro's diagnostics of each chain, from the draws after warm-up."""
        found = {} if self.warmup_report is None else {"warm-up chose": self.warmup_report}
        return [{**entry, **found} for entry in self._running.record.diagnostics()]

    def sample_stats(self) -> dict[str, Tensor]:
        """Statistics of the draws after warm-up: name -> ``(chains, draws)``."""
        return self._running.record.arrays()

    def per_coordinate(self, name: str, value: Any, *, default: float = 1.0, positive: bool = True) -> Number:
        """A setting given as a number, per site (dict) or per coordinate (vector), of shape () or (dim,).

        :param default: for the sites that a dict leaves out.
        :param positive: whether zero is refused.
        :raises ValueError: if it is negative (``positive``: or zero), not finite, or of a wrong shape.
        """
        known = self._running.coordinates
        if name not in known:
            known[name] = spread(self.potential.sites, name, value, default, positive)
        return known[name]

    def _adopt(self, params: Mapping[str, Tensor]) -> None:
        """Continue from values that did not come from this kernel."""
        run = self._running
        current = self.initial_params
        if len(params) == len(current) and all(
            name in params and params[name].data_ptr() == value.data_ptr() for name, value in current.items()
        ):
            return
        given = dict(params) if self.num_chains is not None else {n: v.unsqueeze(0) for n, v in params.items()}
        run.place(run.potential.check_start(run.potential.flatten(given)))
