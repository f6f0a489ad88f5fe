"""``step_size="auto"`` for kernels without a Metropolis test: the largest step whose bias in variance is small enough.

A step of size h changes the variance along a direction of curvature k, and gradient noise of variance V, by about

    λ (h/2)^p + ν h/2        of its size

    SGLD     p = 1    λ = kP       ν = VP/T        exactly (1 + νh/2)/(1 − λh/2) − 1 on a Gaussian
    SGHMC    p = 2    λ = k/M      ν = V/(CT)      obabo has this bias on a Gaussian, symplectic_euler
                                                   1/(1 − hC/2M) times that; bbaoa and baoab have none

Shuffled epochs of m minibatches take no noise from one to the next, since all rows together have none: what is slow
beside an epoch does not see it. Noise in an epoch has the spectrum V(1 − |Dₘ|²/m²), Dₘ Dirichlet's kernel and V half
the variance of a difference in it, which is at most V(m² − 1)θ²/12 at the frequency θ per step. So the second term is

    ν h/2 · min(1, hλ (m² − 1)/3m)  for SGLD,      ν h/2 · min(1, h²λ (m² − 1)/12)  for SGHMC

λ is the largest over directions, by power iteration on differences of minibatch gradients; ν the largest of the
coordinates and of the steepest direction. Both are means over the chains, measured some forty times in warm-up. Far
from the posterior gradients are far noisier than in it, and steps as short as that asks for would never get there; so
until the last draw of warm-up ν is taken relative to the temperature at which the chains still are: that of the momenta
or ‖∇U‖² / tr ∇²U, the higher. While these are ten times T, in the first half of warm-up, and in its first 75 draws
SGHMC draws its momentum afresh at every step, as a fall would else go on with the momentum that it gave. Where there is
a momentum, its measured temperature has the last word.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from bnn.full_data import minibatches_in_all
from bnn.kernels._coordinates import Number
from bnn.kernels._gradient_noise import Array, GradientNoise, Steepest, pair
from bnn.kernels._metric import Scaling
from bnn.kernels._run import Run
from bnn.kernels._warmup import StepRule
from bnn.kernels.schedules import Schedule
from bnn.temperature import effective_draws

# How often curvature and noise are measured in warm-up, with how many steps of the iteration and pairs of minibatches.
PROBES, ITERATIONS, FIRST_ITERATIONS, PAIRS = 40, 3, 20, 4

# Measurements that are remembered; least factor by which the momenta's temperature shortens steps.
REMEMBERED, LEAST_FACTOR = 10, 0.25

# How many times T the gradients' or momenta's temperature may be before the chains count as still falling.
HOT = 10.0

# The largest hC/2M of symplectic_euler.
LARGEST_DAMPING = 0.1


@dataclass(frozen=True)
class BiasModel:
    """What a kernel's bias depends on, in the coordinates that it moves in.

    :ivar order: p.
    :ivar curvature_weight: P, or M⁻¹.
    :ivar noise_weight: P/T, or 1/(CT); infinite without friction.
    :ivar temperature: T.
    :ivar damping: C/M where the integrator heats the momenta, though not the positions, to T/(1 − hC/2M); else 0.
    :ivar epoch: m, minibatches in a shuffled epoch; None if they are independent of one another.
    """

    order: int
    curvature_weight: Number
    noise_weight: Number
    temperature: float
    damping: float = 0.0
    epoch: int | None = None

    def bias(self, step_size: float, curvature: float, noise: float) -> tuple[float, float]:
        """The relative bias in variance: of the discretisation, and of the gradient noise."""
        seen = 1.0
        if self.epoch is not None:
            per_step = (self.epoch - 1 / self.epoch) / 3 if self.order == 1 else (self.epoch**2 - 1) / 12
            seen = min(1.0, curvature * step_size**self.order * per_step)
        return curvature * (0.5 * step_size) ** self.order, noise * 0.5 * step_size * seen

    def step_size(self, tolerance: float, curvature: float, noise: float) -> float:
        """The step size at which both together are ``tolerance``.

        >>> model = BiasModel(2, 1.0, 1.0, 1.0)
        >>> round(sum(model.bias(model.step_size(0.05, 3.0, 7.0), 3.0, 7.0)), 12)
        0.05
        """
        if self.order == 1:
            free = 2.0 * tolerance / (curvature + noise)
        else:
            free = 4.0 * tolerance / (noise + math.sqrt(noise**2 + 4.0 * curvature * tolerance))
        if self.epoch is not None and noise:
            most = 2.0 * (tolerance / curvature) ** (1 / self.order)
            free = brentq(lambda h: sum(self.bias(h, curvature, noise)) - tolerance, 0.999 * free, 1.001 * most)
        return min(free, 2.0 * LARGEST_DAMPING / self.damping) if self.damping else free

    def heat(self, step_size: float) -> float:
        """By how much of T the momenta are hotter than the positions."""
        x = min(0.5 * step_size * self.damping, 0.9)
        return x / (1.0 - x)


def check_tolerance(bias_tolerance: float) -> None:
    """:raises ValueError: for a tolerance that is not small and positive."""
    if not 0.0 < bias_tolerance <= 0.5:
        raise ValueError(
            f"bias_tolerance is {bias_tolerance!r}; give a share of the variance, above 0 and at most 0.5."
        )


def constant_temperature(temperature: float | Schedule) -> float:
    """The temperature that step_size="auto" is for.

    :raises ValueError: for a schedule, or 0.
    """
    if isinstance(temperature, Schedule) or temperature == 0:
        raise ValueError(
            f"temperature is {temperature}, and step_size='auto' bounds the bias in variance at one temperature above "
            "0: give a number for one of them."
        )
    return float(temperature)


def minibatches_per_epoch(run: Run) -> int | None:
    """M, if the noise of minibatches comes of shuffled epochs alone; of several plates', the longest."""
    potential = run.potential
    if run.kernel.replacement or potential.is_random or potential.batches is not None or not potential.plates:
        return None
    return max(minibatches_in_all([plate]) for plate in potential.plates.values())


class ExpectedBias(StepRule):
    """The state of one search.

    :param model: how bias depends on the step size.
    :param tolerance: the relative bias in variance that is let pass.
    :param step_size: where it starts.
    :param refreshed: the same of the Langevin step h²/2 that a step with a fresh momentum is; None without momenta.
    """

    def __init__(
        self, model: BiasModel, tolerance: float, step_size: float, refreshed: BiasModel | None = None
    ) -> None:
        self.model, self.tolerance, self.step_size, self.refreshed = model, tolerance, step_size, refreshed
        self._measured: float | None = None
        self.is_hot = True
        self._is_falling = True
        self._forget()

    def _forget(self) -> None:
        self._curvatures: deque[float] = deque(maxlen=REMEMBERED)
        self._noises: deque[Array] = deque(maxlen=REMEMBERED)
        self._heat: list[tuple[float, float]] = []
        self._steepest: Steepest | None = None

    def start(self, run: Run, metric_is_unknown: bool) -> None:
        """Look at where the chains start, and take the steepest direction for unit in a metric still to be learnt.

        A friction that is a rate in units of the metric would be none against noisy gradients in units far too large.
        """
        epoch = minibatches_per_epoch(run)
        self.model = replace(self.model, epoch=epoch)
        if self.refreshed is not None:
            self.refreshed = replace(self.refreshed, epoch=epoch)
        self._probe(run, FIRST_ITERATIONS)
        if metric_is_unknown and run.is_noisy and self._curvatures:
            run.change_metric(run.metric.scaled(self._curvatures[-1] ** -0.5))
            self.restart(run)

    def restart(self, run: Run) -> None:
        """Begin again in the new coordinates."""
        self._forget()
        self._probe(run, FIRST_ITERATIONS)
        for _ in range(REMEMBERED // 2):
            self._probe(run, ITERATIONS)

    def observe(self, run: Run, stats: Tensor, draw: int, draws: int) -> None:
        """Measure now and then, and compare with the momenta's temperature at the end."""
        if "kinetic_temperature" in run.stat_names and len(stats) and not self._is_falling:
            kinetic = float(stats[:, run.stat_names.index("kinetic_temperature")].mean())
            excess = kinetic / self.model.temperature - 1.0 - self.model.heat(self.step_size)
            self._heat.append((excess, self.step_size))
        self._is_falling = self.is_falling(draw, draws)
        if draw == draws or draw % max(1, draws // PROBES) == 0:
            self._probe(run, ITERATIONS)
        if draw == draws and self._curvatures:
            self.step_size = self.model.step_size(self.tolerance, *self._means())
            self._correct()

    def report(self) -> str:
        """The step size and the bias expected of it."""
        if not self._curvatures:
            return f"step_size {self.step_size:.3g}, for want of finite gradients to find another by"
        discretisation, heating = self.model.bias(self.step_size, *self._means())
        text = (
            f"step_size {self.step_size:.3g}, for an expected bias in variance of "
            f"{100 * (discretisation + heating):.2g} % (discretisation {100 * discretisation:.2g} %, gradient noise "
            f"{100 * heating:.2g} %)"
        )
        return text if self._measured is None else f"{text}; the momenta were {100 * self._measured:+.2g} % off"

    def _means(self) -> tuple[float, float]:
        """Curvature and noise over the measurements that are remembered."""
        noise = float(np.mean(self._noises, axis=0).max()) if self._noises else 0.0
        return float(np.mean(self._curvatures)), noise

    def _correct(self) -> None:
        """Shorten the step where the momenta are hotter, beyond chance, than the tolerance allows at it."""
        alike = [0.5 < step_size / self.step_size < 2.0 for _, step_size in self._heat]
        since = max([draw + 1 for draw, is_alike in enumerate(alike) if not is_alike], default=0)
        recent = np.array(self._heat[max(since, len(self._heat) // 2) :])
        if len(recent) < 8:
            return
        per_step = recent[:, 0] / recent[:, 1]
        mean, draws = float(per_step.mean()), effective_draws(per_step[None])
        if mean - 3.0 * float(per_step.std()) / math.sqrt(draws) > self.tolerance / self.step_size:
            self.step_size *= max(self.tolerance / (mean * self.step_size), LEAST_FACTOR)
        self._measured = mean * self.step_size

    def _probe(self, run: Run, iterations: int) -> None:
        moving = ~run.stopped
        weight = torch.as_tensor(np.sqrt(self.model.curvature_weight)).to(run.position)
        if self._steepest is None:
            self._steepest = Steepest(run, Scaling(weight), self.model.temperature)
        curvature = [self._steepest.iterate(run)[0] for _ in range(iterations)][-1][moving].abs().clamp_min(1e-12)
        if not len(curvature) or not torch.isfinite(curvature).all():
            return
        pairs = [[grad * weight for grad in pair(run)] for _ in range(PAIRS if run.is_noisy else 1)]
        random = torch.nn.functional.normalize(torch.randn_like(run.position), dim=-1)
        trace = float((random * self._steepest.times(run, random)).sum(-1)[moving].abs().mean())
        products = torch.stack([(first * second).sum(-1) for first, second in pairs])
        if not torch.isfinite(products).all():
            return
        self._curvatures.append(float(curvature.mean()))
        # No more than is sure: the chains may differ by orders of magnitude, so its error is that within chains.
        spread = 2.0 * float(products.var(0).sum() / PAIRS) ** 0.5 / products.shape[1] if run.is_noisy else 0.0
        hotter = (float(products.mean()) - spread) / max(trace * random.shape[-1] * self.model.temperature, 1e-30)
        hotter = max([1.0, hotter, *(1.0 + heat for heat, _ in self._heat[-1:])])
        self.is_hot = hotter > HOT
        curvatures, direction = float(np.mean(self._curvatures)), self._steepest.direction[moving]
        if run.is_noisy:
            self._noises.append(self._gradient_noise(pairs, weight, direction, self.model.noise_weight))
        if self.refreshed is not None and self._is_falling:
            noise = 0.0
            if run.is_noisy:
                noise = self._gradient_noise(pairs, weight, direction, self.refreshed.noise_weight).max() / hotter
            self.step_size = math.sqrt(2.0 * self.refreshed.step_size(self.tolerance, curvatures, noise))
        else:
            noise = float(self._noises[-1].max()) / hotter if self._noises else 0.0
            self.step_size = self.model.step_size(self.tolerance, curvatures, noise)

    def _gradient_noise(
        self, pairs: Sequence[Sequence[Tensor]], weight: Tensor, direction: Tensor, noise_weight: Number
    ) -> Array:
        """Variances of minibatch gradients, weighted: those of the coordinates and, last, of the steepest direction."""
        scale = torch.as_tensor(np.sqrt(noise_weight)).to(weight) / weight
        along = torch.nn.functional.normalize(direction / scale, dim=-1)
        noise = GradientNoise()
        for one in pairs:
            first, second = (torch.cat([g, (g * along).sum(-1, keepdim=True)], -1) for g in (g * scale for g in one))
            noise.add(first, second)
        return noise.covariance
