"""Norm-adjusting stochastic gradient Hamiltonian Monte Carlo.

    dz = (αM)⁻¹ r dt,   dr = −∇U dt − γC (αM)⁻¹ r dt + √(2γCT) dW,
    every n steps   r ~ N(0, β M)

SGHMC with mass αM and friction γC, whose momentum is drawn afresh at a scale β of its own. Without that the stationary
law is exp(−U/T) · N(r; 0, αTM), for every α and γ; drawing r ~ N(0, βM) keeps it if and only if β = αT. Any other β is
a second thermostat, at temperature T_r = β/α. On U = ½ k z² in the limit of small steps, with τ = nh between
resamplings and E = exp(τ [[0, 1/m], [−k, −g/m]]), m = αM, g = γC, the position has just after one the variance

    v* = T/k − (T − T_r) m E₁₂² / (1 − E₁₁²)

so that a small β is a cold posterior: with α = 3, β = 0.001, γC = 0.5, τ = 0.7 and k = 1 it samples T = 0.08, not 1.
That of the steps themselves, ten of which make it 0.065, is what :func:`implied_temperature` gives.

Steps and integrators are those of :mod:`bnn.kernels.sghmc`. Two things that are said of this sampler do not hold: the
noise is √T · √(2C) dW (with T · √(2C) dW it samples T²), and α leaves the positions' law alone except through the bias
of the discretisation. Cost: one gradient a step.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import numpy as np
from torch import Tensor

from bnn.kernels._coordinates import Number
from bnn.kernels._gaussian_law import Settings, stationary_variance
from bnn.kernels.preconditioners import Preconditioner
from bnn.kernels.schedules import Schedule, check_setting, value_at
from bnn.kernels.sghmc import SGHMC

# How near the momentum scale must be to αT for draws to be kept, and for how long it may stay away.
TOLERANCE, LONGEST_CYCLE = 1e-6, 1_000_000


@cache
def implied_temperature(
    curvature: float,
    *,
    step_size: float,
    friction: float,
    momentum_scale: float,
    resample_every: int,
    mass: float = 1.0,
    alpha: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
    integrator: str = "bbaoa",
    steps_since: int = -1,
) -> float:
    """The temperature at which a direction of curvature k is sampled when momenta are drawn from N(0, βM).

    k times the variance of z in the stationary law of the steps, on U = ½ k z² without minibatch noise: exact. It lies
    near T where friction forgets the momentum between resamplings, near β/α where it does not.

    :param curvature: k, the second derivative of U.
    :param integrator: that of the kernel.
    :param steps_since: steps since the last one that drew the momentum afresh, at which draws are taken; −1 is the last
        before the next.
    :returns: infinity for steps that are not stable.
    :raises ValueError: for a curvature that is not positive.

    >>> settings = {"friction": 0.5, "momentum_scale": 0.001, "alpha": 3.0}
    >>> round(implied_temperature(1.0, step_size=0.07, resample_every=10, **settings), 4)
    0.065
    >>> round(implied_temperature(1.0, step_size=0.00007, resample_every=10_000, **settings), 4)  # small steps: v*
    0.076
    """
    if not curvature > 0:
        raise ValueError(f"curvature is {curvature}; give a positive number.")

    fresh, since = momentum_scale * mass, steps_since % resample_every
    settings = Settings(integrator, curvature, step_size, gamma * friction, alpha * mass, temperature)
    return curvature * stationary_variance(settings, fresh, resample_every - 1 - since, since)


class NormAdjustedSGHMC(SGHMC):
    """SGHMC whose mass, friction and momentum resampling are scaled by α, γ and β.

    The target is exp(−U/T) where ``momentum_scale="auto"``. Another β is allowed and announced, with the temperature
    that it implies; that temperature stands in ``sample_stats`` and in the report. A schedule that comes back to αT,
    such as ``CosineCycles(10., 500, floor=1., hold=0.5)``, explores with large momenta, and draws are kept only while
    it is there.

    :param model: a Pyro model.
    :param step_size: time step h.
    :param friction: C, per unit of velocity.
    :param mass: M: a number, a dict of numbers per site, or a vector.
    :param alpha: α > 0, factor of the mass.
    :param gamma: γ >= 0, factor of the friction.
    :param momentum_scale: β >= 0, or a schedule of it; ``"auto"`` is αT, the only one that keeps the target.
    :param resample_every: steps between resamplings.
    :param temperature: T.
    :param options: ``integrator``, ``gradient_noise`` and those of every kernel; see :class:`~bnn.kernels.SGHMC`.
    :raises ValueError: for α <= 0, γ < 0, β < 0, or a schedule of β that never comes to αT.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, NormAdjustedSGHMC
    >>> def model():
    ...     pyro.sample("z", dist.Normal(torch.zeros(50), 1.).to_event(1))
    >>> pyro.set_rng_seed(0)
    >>> kernel = NormAdjustedSGHMC(model, step_size=0.2, friction=1., alpha=3., resample_every=10, steps_per_sample=5)
    >>> mcmc = MCMC(kernel, num_samples=500, num_chains=4, disable_progbar=True)
    >>> mcmc.run()
    >>> bool((mcmc.get_samples()["z"].var() - 1).abs() < 0.1)
    True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Schedule | Literal["auto"],
        friction: float | Schedule,
        mass: float | Mapping[str, Any] | Tensor | Literal["auto", "dense"] | Preconditioner = 1.0,
        alpha: float = 1.0,
        gamma: float = 1.0,
        momentum_scale: float | Schedule | Literal["auto"] = "auto",
        resample_every: int = 100,
        temperature: float | Schedule = 1.0,
        **options: Any,
    ) -> None:
        check_setting("alpha", alpha, strict=True)
        check_setting("gamma", gamma)
        if isinstance(momentum_scale, str) and momentum_scale != "auto":
            raise ValueError(f"momentum_scale is {momentum_scale!r}; give a number >= 0, a Schedule, or 'auto' for αT.")
        if "momentum_resampling" in options:
            raise ValueError("momentum_resampling is called resample_every here.")
        super().__init__(
            model, step_size=step_size, friction=friction, mass=mass, temperature=temperature,
            momentum_resampling=resample_every, **options,
        )  # fmt: skip
        if not isinstance(momentum_scale, str):
            check_setting("momentum_scale", momentum_scale)
        self.alpha, self.gamma, self.resample_every = float(alpha), float(gamma), resample_every
        self.momentum_scale = momentum_scale
        self._collects_at_target = isinstance(momentum_scale, Schedule) and momentum_scale.has_cycles

    def settings(self) -> dict[str, float | Schedule]:
        """The settings that may follow a schedule, β among them where it is not αT by itself."""
        own = {} if isinstance(self.momentum_scale, str) else {"momentum_scale": self.momentum_scale}
        return {**super().settings(), **own}

    def stats_at(self, step: int) -> dict[str, float]:
        """The temperature that β implies for a direction of the smallest curvature of a fixed prior."""
        if isinstance(self.momentum_scale, str):
            return {}
        return {"implied_temperature": self._implied(step, step % self.resample_every)}

    def check_plan(self, draws: int | None) -> None:
        """Announce what another β than αT does."""
        super().check_plan(draws)
        if self._collects_at_target:
            self.steps_to_draw(0)
        elif not isinstance(self.momentum_scale, str) and not self._on_target(0):
            asked, scale = value_at(self.temperature, 0), value_at(self.momentum_scale, 0)
            implied = self._implied(0, self.steps_per_sample - 1)
            warnings.warn(
                f"momentum_scale is {scale:.4g}, but only alpha * temperature = {self.alpha * asked:.4g} keeps the "
                f"target: momenta are drawn at temperature {scale / self.alpha:.3g}, and a direction that only the "
                f"prior holds is sampled at {implied:.3g} in place of {asked:.3g}. For the posterior leave "
                "momentum_scale='auto'.",
                RuntimeWarning,
                stacklevel=3,
            )

    def steps_to_draw(self, step: int) -> int:
        """As many steps as it takes until momenta were last drawn at αT."""
        count = self.steps_per_sample
        if not self._collects_at_target:
            return count
        for count in range(self.steps_per_sample, self.steps_per_sample + LONGEST_CYCLE):
            last = step + count - 1
            if self._on_target(last - last % self.resample_every) and self._on_target(last):
                return count
        raise ValueError(
            f"momentum_scale never comes to alpha * temperature = {self.alpha * value_at(self.temperature, step):.4g}, "
            "where draws are kept: give the schedule that value for a floor, and hold it there."
        )

    def _on_target(self, step: int) -> bool:
        if isinstance(self.momentum_scale, str):
            return True
        wanted = self.alpha * value_at(self.temperature, step)
        return math.isclose(value_at(self.momentum_scale, step), wanted, rel_tol=TOLERANCE, abs_tol=1e-300)

    def _implied(self, step: int, steps_since: int) -> float:
        assert not isinstance(self.momentum_scale, str)
        deviations = [site.normal[1] for site in self.potential.sites.values() if site.normal is not None]
        return implied_temperature(
            max(deviations, default=1.0) ** -2, step_size=self.step_size_at(step),
            friction=value_at(self.friction, step), momentum_scale=value_at(self.momentum_scale, step),
            resample_every=self.resample_every, mass=float(np.mean(super()._mass())), alpha=self.alpha,
            gamma=self.gamma, temperature=value_at(self.temperature, step), integrator=self.integrator,
            steps_since=steps_since,
        )  # fmt: skip

    def _fresh_variance(self, step: int) -> Number:
        """β M."""
        if isinstance(self.momentum_scale, str):
            return super()._fresh_variance(step)
        return value_at(self.momentum_scale, step) * super()._mass()

    def _mass(self) -> Number:
        """α M."""
        return self.alpha * super()._mass()

    def _friction(self, step: int) -> float:
        """γ C."""
        return self.gamma * super()._friction(step)
