"""Stochastic gradient descent with a constant step as an approximate sampler.

    z ← z − h P ∇Û(z)                          no noise but that of the minibatches, of covariance V

Mandt, Hoffman and Blei (2017), "Stochastic gradient descent as approximate Bayesian inference", JMLR 18, theorems 1 to
3. Their loss is a mean over N data; ours is a sum, so that V is N² times theirs and h their ε/N.

On U = ½ zᵀHz with V the same everywhere the stationary covariance Σ is that of

    P H Σ + Σ H P − h P H Σ H P = h P V P

Nearest to the posterior H⁻¹ in the sense of KL(Σ | H⁻¹), to first order in h: h = 2d / tr(PV) for given P;
hP = diag(2 / V_kk) among diagonals, if V is one (otherwise the best is another, not far off, though theorem 3 does not
say so); hP = 2V⁻¹ of all, for which Σ = H⁻¹ + O(h). At temperature T: T times as much.

Bias: Σ = H⁻¹ + O(h) holds for V = 2P⁻¹/h only: P = 1 needs V the same in all directions, a diagonal P a diagonal V.
Nor may V change over the posterior's width, or the noise be far from Gaussian over one relaxation time.
Cost: one gradient a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation, StochasticGradientKernel
from bnn.kernels._coordinates import Number
from bnn.kernels._gradient_noise import Array
from bnn.kernels._noise_match import NoiseMatch
from bnn.kernels.schedules import Schedule, check_setting, value_at

# Coordinates that a full preconditioner may have: its step costs dim² operations.
LARGEST_DENSE = 1_000


class ConstantSGDState(NamedTuple):
    """Position ``(chains, dim)``; where averaging began, and the sum of departures from there, or empty ones."""

    position: Tensor
    origin: Tensor
    departure: Tensor


def init(position: Tensor, average: bool) -> ConstantSGDState:
    """The state at a starting position."""
    origin = position.clone() if average else position[:, :0].clone()
    return ConstantSGDState(position, origin, torch.zeros_like(origin))


def update(
    state: ConstantSGDState, energy_and_grad: EnergyAndGrad, *, drift: Tensor
) -> tuple[ConstantSGDState, Evaluation]:
    """One step: ``z + drift · ∇Û(z)`` with drift −hP, a matrix or a diagonal."""
    energy, grad = energy_and_grad(state.position)
    position = state.position + (grad @ drift if drift.dim() == 2 else grad * drift)
    departure = state.departure + (position - state.origin if state.origin.shape[-1] else 0.0)
    return ConstantSGDState(position, state.origin, departure), Evaluation(state.position, energy, grad)


class ConstantSGD(StochasticGradientKernel):
    """Stochastic gradient descent with a constant step, as a sampler (Mandt et al. 2017).

    Cheap, and not the posterior unless this is Gaussian and the minibatches' noise is as assumed; ``summary()`` says so
    after every run. Where it matters, use :class:`~bnn.kernels.SGLD` or :class:`~bnn.kernels.SGHMC`.

    V, the covariance of the minibatch gradient, is measured on pairs of minibatches at the chains' positions: 64 pairs
    at the start, then one per chain and draw of warm-up, anew from each eighth, quarter and half of it. What the second
    half gives is kept for the run. The chains' temperature in effect, h tr(PV) / 2d, is ``noise_temperature`` in
    ``sample_stats``, and per coordinate in ``diagnostics()``: 1 at the best step for the posterior.

    :param model: a Pyro model with minibatches, ``pyro.plate(..., subsample_size=B)``.
    :param step_size: h; ``"auto"`` takes 2Td / tr(PV) in warm-up, but never more than half the longest stable step.
    :param preconditioner: P: a number, a dict of numbers per site, or a vector of ``dim`` values; ``"diagonal"`` takes
        V_kk⁻¹ and ``"full"`` V⁻¹ (up to 1,000 coordinates), times the mean of V_kk.
    :param average: keep the mean of all positions after warm-up (Polyak and Ruppert), in ``diagnostics()``.
    :param temperature: T of the law exp(−U/T) that ``step_size="auto"`` aims at, and that reports compare with.
    :param options: ``steps_per_sample``, ``batches``, ``compile`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`. Minibatches are drawn with replacement: over shuffled
        epochs their noise would cancel. A loader in ``batches`` should do the same.
    :raises ValueError: for settings out of range, a schedule, a model without minibatches, or a warm-up too short.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, ConstantSGD
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=10) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> kernel = ConstantSGD(model, steps_per_sample=10)
    >>> mcmc = MCMC(kernel, num_samples=200, num_chains=8, disable_progbar=True)
    >>> mcmc.run(2. + torch.linspace(-1.7, 1.7, 100))
    >>> bool((mcmc.get_samples()["mean"].std() / (1 / 101) ** 0.5 - 1).abs() < 0.15)
    True
    """

    noises_per_step = 0
    changing = ("_warmup", "_averaged_from")
    caveat = (
        "constant-step SGD has no noise but its minibatches': these are draws from the posterior only so far as it is "
        "Gaussian and their gradients' noise Gaussian, the same all over it, and {condition}. Compare with SGLD or "
        "SGHMC"
    )

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Literal["auto"] = "auto",
        preconditioner: float | Mapping[str, Any] | Tensor | Literal["diagonal", "full"] | None = None,
        average: bool = False,
        temperature: float = 1.0,
        **options: Any,
    ) -> None:
        if isinstance(step_size, str) and step_size != "auto":
            raise ValueError(f"step_size is {step_size!r}; give a number, or 'auto'.")
        for name, value in {"step_size": step_size, "temperature": temperature}.items():
            if isinstance(value, Schedule):
                raise ValueError(f"{name} is a Schedule; constant-step SGD takes a number.")
        check_setting("temperature", temperature, strict=True)
        self.learned = preconditioner if isinstance(preconditioner, str) else None
        if self.learned not in (None, "diagonal", "full"):
            raise ValueError(f"preconditioner is {preconditioner!r}; give 'diagonal', 'full', numbers or None.")
        if not options.setdefault("replacement", True):
            raise ValueError(
                "replacement=False: over shuffled epochs the noise of the minibatches cancels, and it is all that "
                "constant-step SGD samples by: leave replacement out."
            )
        if options.get("variance_reduction") is not None:
            raise ValueError("variance_reduction takes away the noise that constant-step SGD samples by: use SGLD.")
        super().__init__(model, step_size=step_size, temperature=temperature, **options)
        self.finds_step_size, self.adapts_step_size = self.adapts_step_size, True  # V is measured either way
        self.preconditioner, self.average = preconditioner, average
        noise = "of covariance proportional to P⁻¹" if preconditioner is not None else "the same in all directions"
        noise = {"diagonal": "independent between coordinates", "full": "of any covariance"}.get(
            self.learned or "", noise
        )
        self.caveat = type(self).caveat.format(condition=noise)
        self._averaged_from = 0

    # ---- warm-up

    def step_rule(self) -> NoiseMatch:
        """Step and preconditioner by the noise that warm-up measures.

        :raises ValueError: for a model of too many coordinates for a full preconditioner.
        """
        dim, given = self.potential.dim, 1.0 if self.preconditioner is None else self.preconditioner
        if self.learned == "full" and dim > LARGEST_DENSE:
            raise ValueError(
                f"preconditioner='full' is a matrix, and the model has {dim} coordinates, more than {LARGEST_DENSE}: "
                "use preconditioner='diagonal'."
            )
        return NoiseMatch(
            None if self.finds_step_size else value_at(self.step_size, 0),
            None if self.learned else self.per_coordinate("preconditioner", given),
            dense=self.learned == "full",
            temperature=value_at(self.temperature, 0),
            dim=dim,
        )

    @property
    def _rule(self) -> NoiseMatch:
        assert self._warmup is not None and isinstance(self._warmup.step_rule, NoiseMatch)
        return self._warmup.step_rule

    def check_warmup(self, draws: int) -> None:
        """:raises ValueError: for a warm-up too short to measure the noise in."""
        run, dim = self._running, self.potential.dim
        if (self.finds_step_size or self.learned is not None) and not draws:
            raise ValueError(
                "step_size='auto' and preconditioner='diagonal' or 'full' are found in warm-up: give warmup_steps, "
                "some hundreds."
            )
        pairs, needed = run.chains * (draws - draws // 2), 2 * dim + 2
        if self.learned == "full" and pairs < needed:
            raise ValueError(
                f"preconditioner='full' of {dim} coordinates needs {needed} pairs of gradients, one per chain in each "
                f"draw of the second half of warm-up, which has {pairs}: raise warmup_steps to "
                f"{2 * -(-needed // run.chains)}, or use preconditioner='diagonal'."
            )

    def adapt(self, stats: Tensor) -> None:
        """Learn from a draw of warm-up; averages begin after it."""
        super().adapt(stats)
        run = self._running
        self._averaged_from, run.state = run.step, init(run.state.position, self.average)

    # ---- the step

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> ConstantSGDState:
        """The state at a starting position."""
        del energy_and_grad
        self._averaged_from = self._running.step
        return init(position, self.average)

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """The drift −hP."""
        del step
        return (-self._rule.step_size * self._rule.preconditioner,)

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[ConstantSGDState, Evaluation]:
        """One step of :func:`update`."""
        del noise
        return update(state, energy_and_grad, drift=coefficients[0])

    # ---- reports

    def noise_temperature(self) -> Array:
        """The temperature in effect of each coordinate, h P_k V_kk / 2: what the minibatches' noise makes it."""
        return self._rule.heat

    def stats_at(self, step: int) -> dict[str, float]:
        """The mean over coordinates of the temperature in effect."""
        return {**super().stats_at(step), "noise_temperature": float(self.noise_temperature().mean())}

    def averaged(self) -> dict[str, Tensor]:
        """Mean unconstrained position of all steps since warm-up, in the model's space: site -> ``(chains, ...)``.

        :raises RuntimeError: with ``average=False``, or before the first step.
        """
        steps = self._running.step - self._averaged_from
        if not self.average or not steps:
            raise RuntimeError("there is no average: give average=True, and take a step after warm-up.")
        state = self._running.state
        return self.potential.constrain(state.origin + state.departure / steps)

    def chain_diagnostics(self) -> list[dict[str, Any]]:
        """Those of every kernel, and per site the temperature in effect and the averaged iterate."""
        run = self._running
        temperature = torch.from_numpy(self.noise_temperature())
        entries = super().chain_diagnostics()
        for chain, entry in enumerate(entries):
            entry["noise temperature"] = self.potential.unflatten(temperature)
            if self.average and run.step > self._averaged_from:
                entry["average"] = {name: value[chain] for name, value in self.averaged().items()}
        return entries
