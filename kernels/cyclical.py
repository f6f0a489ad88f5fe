"""Cyclical stochastic gradient MCMC: large steps that find modes, then small ones that sample them.

    h_s = h₀ · ½ (cos(π s / L) + 1),    s the step within a cycle of L steps
    s < βL    exploration: no noise, T = 0          s >= βL    sampling: T as asked; draws are kept

for the steps of :mod:`bnn.kernels.sgld` or :mod:`bnn.kernels.sghmc`. Every cycle starts where the last one ended (a
warm restart). Zhang, Li, Zhang, Chen and Wilson (2020), "Cyclical stochastic gradient MCMC for Bayesian deep
learning", ICLR, equation 1 and Algorithm 1. The code published with it scales its noise by 1/50000 by default, which
samples exp(−U/T) at T = 2e-5: a mode, in effect. Here T is what it says.

Bias: that of the steps, at their size in the sampling stage. Modes are weighed by how often exploration ends in them,
not by their mass. Cost: one gradient a step, 1/(1 − β) of them per step that may give a draw.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bnn.kernels._base import StochasticGradientKernel
from bnn.kernels.schedules import CosineCycles, Schedule, check_setting, value_at
from bnn.kernels.sghmc import SGHMC
from bnn.kernels.sgld import SGLD


@dataclass(frozen=True)
class SamplingStage(Schedule):
    """A temperature in the sampling stage of each cycle, and another before it.

    :param temperature: T.
    :param cycle_length: steps per cycle L.
    :param exploration: share β of the cycle that explores.
    :param before: the temperature in the exploration stage.

    >>> [SamplingStage(1.0, cycle_length=4, exploration=0.5).value_at(step) for step in range(4)]
    [0.0, 0.0, 1.0, 1.0]
    """

    temperature: float | Schedule
    cycle_length: int
    exploration: float
    before: float = 0.0
    has_cycles = True

    def samples(self, step: int) -> bool:
        """Whether ``step`` lies in a sampling stage."""
        return step % self.cycle_length >= self.exploration * self.cycle_length

    def value_at(self, step: int) -> float:
        """The temperature at ``step``."""
        return value_at(self.temperature, step) if self.samples(step) else self.before

    def cycle_position(self, step: int) -> float:
        """How far into its cycle ``step`` lies, in [0, 1)."""
        return (step % self.cycle_length) / self.cycle_length

    def cycle(self, step: int) -> int:
        """The number of the cycle that ``step`` lies in, from 0."""
        return step // self.cycle_length


class _Cyclical(StochasticGradientKernel):
    """The two stages, for a kernel further down the order of bases."""

    stage: SamplingStage

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float,
        cycle_length: int,
        exploration: float = 0.8,
        exploration_temperature: float = 0.0,
        temperature: float | Schedule = 1.0,
        **options: Any,
    ) -> None:
        if isinstance(step_size, Schedule):
            raise ValueError("step_size is a Schedule; give the number that every cycle starts with.")
        check_setting("step_size", step_size, strict=True)
        check_setting("temperature", temperature)
        check_setting("exploration_temperature", exploration_temperature)
        if not isinstance(cycle_length, int) or isinstance(cycle_length, bool) or cycle_length < 2:
            raise ValueError(f"cycle_length is {cycle_length!r}; give a whole number of at least 2 steps.")
        if not 0.0 <= exploration < 1.0 or exploration * cycle_length > cycle_length - 1:
            raise ValueError(
                f"exploration is {exploration!r} of cycles of {cycle_length} steps; give a share from 0 to below 1 "
                "that leaves a step to sample at."
            )
        self.stage = SamplingStage(temperature, cycle_length, exploration, float(exploration_temperature))
        steps = CosineCycles(step_size, cycle_length)
        super().__init__(model, step_size=steps, temperature=self.stage, **options)

    def steps_to_draw(self, step: int) -> int:
        """As many steps as it takes until one of a sampling stage."""
        count, length = self.steps_per_sample, self.stage.cycle_length
        last = step + count - 1
        if self.stage.samples(last):
            return count
        return count + next(k for k in range(length) if self.stage.samples(last + k))

    def planned_steps(self, draws: int) -> int:
        """About how many steps so many draws take, exploration included."""
        return int(draws * self.steps_per_sample / (1.0 - self.stage.exploration))

    def check_plan(self, draws: int | None) -> None:
        """:raises ValueError: if the run ends within its first cycle."""
        super().check_plan(draws)
        if draws is None:
            return
        step = -1
        for _ in range(draws):
            step += self.steps_to_draw(step + 1)
            if step >= self.stage.cycle_length:
                return
        raise ValueError(
            f"a run of {draws} draws takes {step + 1} steps, and a cycle {self.stage.cycle_length}: without a second "
            "cycle nothing is cyclical. Lower cycle_length, or raise num_samples or steps_per_sample."
        )


class CyclicalSGLD(_Cyclical, SGLD):
    """Cyclical SGLD (Zhang et al. 2020): each cycle explores without noise, then samples exp(−U/T).

    ``sample_stats`` labels each draw with its cycle and its place in it.

    :param model: a Pyro model.
    :param step_size: h₀, the step size that each cycle starts with.
    :param cycle_length: steps per cycle L.
    :param exploration: share β of each cycle that explores and gives no draws.
    :param exploration_temperature: T of the exploration stages: 0 in the paper, where minibatch noise is what explores.
    :param temperature: T of the sampling stages; 1 is the posterior.
    :param options: ``preconditioner`` and those of every kernel; see :class:`~bnn.kernels.SGLD`.
    :raises ValueError: for settings out of range, or a run that ends within its first cycle.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, CyclicalSGLD
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> pyro.set_rng_seed(0)
    >>> kernel = CyclicalSGLD(model, step_size=0.1, cycle_length=50)
    >>> mcmc = MCMC(kernel, num_samples=40, warmup_steps=0, disable_progbar=True)
    >>> mcmc.run()
    >>> mcmc.sample_stats["cycle"].unique()
    tensor([0, 1, 2, 3])
    """


class CyclicalSGHMC(_Cyclical, SGHMC):
    """Cyclical SGHMC (Zhang et al. 2020): each cycle explores without noise, then samples exp(−U/T).

    ``sample_stats`` labels each draw with its cycle and its place in it.

    :param model: a Pyro model.
    :param step_size: h₀, the step size that each cycle starts with.
    :param friction: C, as of :class:`~bnn.kernels.SGHMC`.
    :param cycle_length: steps per cycle L.
    :param exploration: share β of each cycle that explores and gives no draws.
    :param exploration_temperature: T of the exploration stages: 0 in the paper, where minibatch noise is what explores.
    :param temperature: T of the sampling stages; 1 is the posterior.
    :param options: ``mass``, ``integrator`` and the others of :class:`~bnn.kernels.SGHMC`.
    :raises ValueError: for settings out of range, or a run that ends within its first cycle.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, CyclicalSGHMC
    >>> def model():
    ...     pyro.sample("z", dist.Normal(0., 1.))
    >>> pyro.set_rng_seed(0)
    >>> kernel = CyclicalSGHMC(model, step_size=0.5, friction=1., cycle_length=50)
    >>> mcmc = MCMC(kernel, num_samples=40, warmup_steps=0, disable_progbar=True)
    >>> mcmc.run()
    >>> mcmc.sample_stats["cycle_position"].min() >= 0.8
    tensor(True)
    """
