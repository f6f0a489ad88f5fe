"""Stochastic gradient descent as a sampler: the law it settles in, and its temperature.

    v ← μ v − h P (H z + e),   z ← z + v,      e ~ (0, V), V the covariance of the minibatch gradient

on U = ½ zᵀHz. Without momentum the stationary covariance Σ is exactly that of

    P H Σ + Σ H P − h P H Σ H P = h P V P                 (here by the discrete Lyapunov equation)
    P H Σ + Σ H P = h P V P                               in the limit of small steps

(Mandt, Hoffman and Blei 2017, JMLR 18, equation 13). Their loss is a mean over N data and their noise that of one
datum, C/B: with h = ε/N and V = N² C/B theirs is ΣH' + H'Σ = (ε/B) C for H' = H/N. With momentum h becomes h/(1 − μ)
in the limit. By P = 1 the mean energy is that of a temperature

    T = tr(HΣ)/d = h tr(V)/2d / (1 − μ),      in general h tr(PV)/2d / (1 − μ),

1 for the posterior. One number says it all only where PV is a multiple of 1: else each direction has its own, uᵀVu h/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.linalg import solve_continuous_lyapunov, solve_discrete_lyapunov
from torch import Tensor

from bnn.curvature_operators import position_of
from bnn.potential import Potential
from bnn.predictive_arrays import finite_array, whole_number
from bnn.scoring import Score, mean_score

Array = np.ndarray[Any, np.dtype[np.float64]]


class GradientNoise:
    """V, the covariance of a minibatch gradient, from pairs of them at one place: ½ E[(g − g')(g − g')ᵀ].

    :param dense: whether V is a matrix, in place of its diagonal.
    :ivar pairs: how many have been seen.

    >>> noise = GradientNoise()
    >>> noise.add(torch.tensor([[1., 0.], [3., 1.]]), torch.tensor([[-1., 0.], [1., 1.]]))
    >>> noise.covariance
    array([2., 0.])
    """

    def __init__(self, dense: bool = False) -> None:
        self.dense, self.pairs = dense, 0
        self._total: Tensor | None = None

    def add(self, first: Tensor, second: Tensor) -> None:
        """Gradients ``(pairs, dim)``, and others at the same places."""
        difference = (first - second).double()
        share = 0.5 * (difference.T @ difference if self.dense else difference.square().sum(0))
        if torch.isfinite(share).all():  # a chain that leaves the finite numbers is stopped elsewhere
            self._total = share if self._total is None else self._total + share
            self.pairs += len(difference)

    @property
    def covariance(self) -> Array:
        """V as ``(dim, dim)``, or its diagonal ``(dim,)``; with :attr:`pairs` degrees of freedom.

        :raises ValueError: before the first pair of finite gradients.
        """
        if self._total is None:
            raise ValueError("the minibatch gradients are not finite where the chains start: give other starts.")
        result: Array = (self._total / self.pairs).cpu().numpy()
        return result

    def inverse(self) -> Array | None:
        """V⁻¹, unbiased for Gaussian noise, as a matrix or a diagonal; None for a V that is singular or hardly known.

        Of n degrees of freedom and size d the estimate of V⁻¹ is n / (n − d − 1) times too large; a diagonal has d = 1.
        """
        covariance, freedom = self.covariance, self.pairs
        size = len(covariance) if self.dense else 1
        spectrum = np.linalg.eigvalsh(covariance) if self.dense else covariance
        if freedom < 2 * size + 2 or not spectrum.min() > 1e-12 * spectrum.max():
            return None
        inverse: Array = np.asarray(np.linalg.inv(covariance) if self.dense else 1.0 / covariance, dtype=np.float64)
        return inverse * ((freedom - size - 1) / freedom)


def sgd_covariance(
    hessian: Any,
    noise: Any,
    step_size: float,
    *,
    preconditioner: Any = 1.0,
    momentum: float = 0.0,
    limit: bool = False,
) -> np.ndarray:
    """The stationary covariance of constant-step SGD on a quadratic, exact at any step size that is stable.

    :param hessian: H, ``(dim, dim)``, of the summed energy.
    :param noise: V, the covariance of the minibatch gradient: ``(dim, dim)``, or its diagonal.
    :param step_size: h on the summed energy: a learning rate on the mean loss, divided by N.
    :param preconditioner: P: a number, a diagonal, or a positive definite matrix.
    :param momentum: μ, of the heavy ball; not dampened.
    :param limit: whether to take the limit of small steps, Mandt's equation.
    :raises ValueError: if the shapes do not fit, or SGD does not settle: H is not positive definite, h too large.

    >>> from bnn import sgd_covariance
    >>> sgd_covariance([[2.0]], [[10.0]], 0.1).round(4), sgd_covariance([[2.0]], [[10.0]], 0.1, limit=True)
    (array([[0.2778]]), array([[0.25]]))
    """
    h_matrix, v_matrix = _square("hessian", hessian), finite_array("noise", noise)
    dim = len(h_matrix)
    v_matrix, p_matrix = (
        _matrix(name, value, dim)
        for name, value in (("noise", v_matrix), ("preconditioner", finite_array("preconditioner", preconditioner)))
    )
    if not 0.0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size!r}; give a positive number.")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum is {momentum!r}; give a number from 0 to below 1.")
    drift, kick = step_size * p_matrix @ h_matrix, step_size**2 * p_matrix @ v_matrix @ p_matrix.T
    if limit:
        _settles(np.exp(-np.linalg.eigvals(drift).real).max(), step_size)
        found = solve_continuous_lyapunov(drift, kick) / (1.0 - momentum)
    else:
        one = np.eye(dim)
        step = np.block([[one - drift, momentum * one], [-drift, momentum * one]])
        _settles(np.abs(np.linalg.eigvals(step)).max(), step_size)
        found = solve_discrete_lyapunov(step, np.block([[kick, kick], [kick, kick]]))[:dim, :dim]
    return np.asarray(0.5 * (found + found.T))


@dataclass(frozen=True)
class SGDTemperature:
    """The temperature at which constant-step SGD samples, as far as its noise is that of a quadratic about a mode.

    :ivar temperature: h tr(PV) / 2d / (1 − μ), with its standard error over pairs of minibatches: 1 for the posterior.
    :ivar per_site: the same of each site's coordinates; where they differ no step size gives all the same.
    :ivar best_step_size: the h with temperature 1: the optimal one of Mandt et al. (theorem 1), for this P and μ.
    :ivar noise: the diagonal of V, ``(dim,)``.
    """

    temperature: Score
    per_site: dict[str, float]
    best_step_size: float
    noise: np.ndarray


def sgd_temperature(
    potential: Potential,
    at: Mapping[str, Tensor] | Tensor,
    step_size: float,
    *,
    preconditioner: Any = 1.0,
    momentum: float = 0.0,
    num_pairs: int = 64,
) -> SGDTemperature:
    """The temperature of constant-step SGD, from the noise of minibatch gradients measured at a position.

    :param potential: of a model with minibatches; its own are taken, with or without replacement.
    :param at: where: near a mode; as for :class:`bnn.CurvatureOperator`.
    :param step_size: h on the summed energy: a learning rate on the mean loss, divided by N.
    :param preconditioner: P: a number, or a diagonal ``(dim,)``.
    :param momentum: μ.
    :param num_pairs: pairs of independent minibatches.
    :raises ValueError: for a model without minibatches, or a setting out of range.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import Potential, sgd_temperature
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=10) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> potential = Potential(model, torch.randn(100), replacement=True)
    >>> found = sgd_temperature(potential, {"mean": torch.tensor(0.)}, step_size=0.002)  # V = 100² / 10
    >>> abs(found.temperature.value - 1.0) < 4 * found.temperature.error
    True
    """
    num_pairs = whole_number("num_pairs", num_pairs, 2)
    if not 0.0 < step_size < math.inf:
        raise ValueError(f"step_size is {step_size!r}; give a positive number.")
    if not 0.0 <= momentum < 1.0:
        raise ValueError(f"momentum is {momentum!r}; give a number from 0 to below 1.")
    scale = finite_array("preconditioner", preconditioner)
    if scale.shape not in ((), (potential.dim,)) or not (scale > 0.0).all():
        raise ValueError(f"preconditioner has shape {scale.shape}; give a positive number, or {potential.dim} of them.")
    noise, each = GradientNoise(), []
    where = position_of(potential, at).expand(2, -1)
    stream = potential.stream(2)  # two streams of minibatches: over one of shuffled epochs their noise would cancel
    for _ in range(num_pairs):
        first, second = potential.gradient_on(where, stream.next(1)[0])
        noise.add(first[None], second[None])
        each.append(0.5 * (first - second).double().square().cpu().numpy() * scale)
    variances = noise.covariance
    if not variances.mean() > 0.0:
        raise ValueError(
            "the gradients of different minibatches are the same: without noise SGD ends at the mode. Write "
            "pyro.plate(..., subsample_size=B)."
        )
    heat = 0.5 * step_size / (1.0 - momentum)
    temperature = mean_score(heat * np.stack(each).mean(1))
    per_site = {name: float(heat * (scale * variances)[s.slice].mean()) for name, s in potential.sites.items()}
    return SGDTemperature(temperature, per_site, step_size / temperature.value, variances)


def _square(name: str, value: Any) -> np.ndarray:
    array = finite_array(name, value)
    if array.ndim != 2 or array.shape[0] != array.shape[1] or not np.allclose(array, array.T):
        raise ValueError(f"{name} has shape {array.shape}; give a symmetric matrix.")
    return array


def _matrix(name: str, value: np.ndarray, dim: int) -> np.ndarray:
    if value.shape in ((), (dim,)):
        return np.diag(np.broadcast_to(value, dim))
    if value.shape != (dim, dim):
        raise ValueError(f"{name} has shape {value.shape}; wanted is ({dim}, {dim}), or its diagonal.")
    return _square(name, value)


def _settles(radius: float, step_size: float) -> None:
    if not radius < 1.0:
        raise ValueError(
            f"SGD does not settle: a step multiplies one direction by {radius:.4g}. H and P must be positive definite, "
            f"and step_size, {step_size:.4g}, below 2 (1 + momentum) / the largest eigenvalue of PH."
        )
