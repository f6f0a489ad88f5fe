"""Steps and preconditioners that make the noise of minibatch gradients heat chains to the temperature asked for.

The rule of :mod:`bnn.kernels.constant_sgd`: V, the covariance of the minibatch gradient, is measured on pairs of
minibatches, 64 at the start, then one per chain and draw of warm-up, anew from each eighth, quarter and half of it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bnn.kernels._coordinates import Number
from bnn.kernels._gradient_noise import Array, GradientNoise, longest_step, pair
from bnn.kernels._metric import Scaling, Triangular
from bnn.kernels._run import Run
from bnn.kernels._warmup import StepRule

# Pairs of gradients from which V is estimated at the start.
FIRST_PAIRS = 64


class NoiseMatch(StepRule):
    """h and P of z ← z − h P ∇Û(z), by the V that warm-up measures.

    :param step_size: a given h, or None for 2Td / tr(PV), but never more than half the longest stable one.
    :param given: P, or None for V⁻¹ times the mean of V_kk.
    :param dense: whether that is a matrix, in place of a diagonal of V_kk⁻¹.
    :param temperature: T.
    :param dim: coordinates of the model.
    :ivar preconditioner: P: a number, its diagonal, or a matrix; of one shape throughout a run.
    """

    def __init__(
        self, step_size: float | None, given: Number | None, *, dense: bool, temperature: float, dim: int
    ) -> None:
        self.finds, self.step_size = step_size is None, 1.0 if step_size is None else step_size
        self.given, self.dense, self.temperature = given, dense, temperature
        self.preconditioner: Number = (np.eye(dim) if dense else np.ones(dim)) if given is None else given
        self._noise = GradientNoise(dense)
        self._variances: Array = np.ones(dim)
        self._is_learnt = False

    @property
    def heat(self) -> Array:
        """The temperature in effect of each coordinate, h P_k V_kk / 2: what the minibatches' noise makes it.

        Under a learnt P V_kk stands for its mean over all, which is what the expectation of P_k V_kk comes to.
        """
        if self._is_learnt:
            return 0.5 * self.step_size * np.full_like(self._variances, self._variances.mean())
        given = 1.0 if self.given is None else self.given
        return np.asarray(0.5 * self.step_size * given * self._variances)

    def start(self, run: Run, metric_is_unknown: bool) -> None:
        """Look at where the chains start."""
        del metric_is_unknown
        for _ in range(-(-FIRST_PAIRS // run.chains)):
            self._noise.add(*pair(run))
        self._take_in(run, is_last=False)

    def observe(self, run: Run, stats: Tensor, draw: int, draws: int) -> None:
        """Measure V at this draw of warm-up; at the ends of its parts, set step and preconditioner by it."""
        del stats
        self._noise.add(*pair(run))
        if draw in {draws // part for part in (8, 4, 2, 1)}:
            self._take_in(run, is_last=draw == draws)

    def restart(self, run: Run) -> None:
        """Nothing: it has a metric of its own, P."""

    def report(self) -> str | None:
        """The step size, and the temperature in effect that is expected of it; None for one that was given."""
        if not self.finds:
            return None
        return f"step_size {self.step_size:.3g}, for a temperature of {float(self.heat.mean()):.3g} in effect"

    def _take_in(self, run: Run, is_last: bool) -> None:
        """Use the V that was measured, and begin to measure it anew."""
        noise, self._noise = self._noise, GradientNoise(self.dense)
        self._variances = np.diagonal(noise.covariance) if self.dense else noise.covariance
        if not self._variances.mean() > 0.0:
            raise ValueError(
                "the gradients of different minibatches are the same: without noise constant-step SGD ends at the "
                "posterior's mode. Write pyro.plate(..., subsample_size=B), or use SGLD, SGHMC or GGMC."
            )
        if self.given is None:
            self._learn(run, noise, is_last)
        if self.finds:
            given = torch.as_tensor(self.preconditioner).to(run.position)
            root = Triangular(torch.linalg.cholesky(given)) if given.dim() == 2 else Scaling(given.sqrt())
            best = self.temperature * self.step_size / float(self.heat.mean())
            self.step_size = min(best, longest_step(run, root, self.temperature))

    def _learn(self, run: Run, noise: GradientNoise, is_last: bool) -> None:
        inverse = noise.inverse()
        if inverse is not None:
            self.preconditioner, self._is_learnt = self._variances.mean() * inverse, True
        elif is_last:
            least = int(self._variances.argmin())
            sites = run.potential.sites.items()
            site = next(name for name, site in sites if site.slice.start <= least < site.slice.stop)
            raise ValueError(
                f"preconditioner={'full' if self.dense else 'diagonal'!r} is V⁻¹, and V, the covariance of the "
                f"minibatch gradient, is singular: its least variance is {self._variances[least]:.3g}, at site "
                f"{site!r}. Give preconditioner as numbers, or use SGLD."
            )
