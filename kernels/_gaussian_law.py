"""The stationary law of SGHMC's steps on a Gaussian, exactly, when some of them draw the momentum afresh.

On U = ½ k z² a step is a linear map with Gaussian noise, and so are n of them. Both are read off the integrator itself:
what it does to unit vectors of its state, and to unit noise.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.linalg import solve_discrete_lyapunov

from bnn.kernels.sghmc import INTEGRATORS, KEEPS_GRADIENT, Coefficients, SGHMCState, fluctuation

Matrix = np.ndarray[Any, np.dtype[np.float64]]


class Move(NamedTuple):
    """A linear map, and the covariance of the noise that it adds."""

    matrix: Matrix
    noise: Matrix


class Settings(NamedTuple):
    """Of SGHMC's steps on U = ½ k z²."""

    integrator: str
    curvature: float
    step_size: float
    friction: float
    mass: float
    temperature: float


def stationary_variance(s: Settings, fresh: float, before: int, after: int) -> float:
    """Variance of z at the end of a cycle: ``before`` steps, one that draws the momentum afresh, and ``after`` steps.

    :param fresh: variance of a momentum that is drawn afresh.
    :returns: infinity if the steps are not stable.
    """
    plain = step(s, None)
    cycle = then(then(repeated(plain, before), step(s, fresh)), repeated(plain, after))
    if max(abs(np.linalg.eigvals(cycle.matrix))) >= 1.0:
        return math.inf
    return float(solve_discrete_lyapunov(*cycle)[0, 0])


def step(s: Settings, fresh: float | None) -> Move:
    """One step; ``fresh`` is the variance of a momentum that it draws afresh."""
    decay, variance = fluctuation(s.integrator, s.step_size, s.friction, s.mass, s.temperature, fresh=fresh)
    numbers = torch.tensor([s.step_size, s.step_size / s.mass, decay, math.sqrt(variance)], dtype=torch.float64)
    size = 3 if s.integrator in KEEPS_GRADIENT else 2  # position, momentum, and the gradient of the step before
    state, noise = torch.eye(5, dtype=torch.float64).unsqueeze(-1).split([3, 2], 1)
    after, _ = INTEGRATORS[s.integrator](
        SGHMCState(*state.unbind(1)), lambda z: (z, s.curvature * z), noise.unbind(1), Coefficients(*numbers)
    )
    columns = torch.cat(after[:size], -1).numpy()
    return Move(columns[:size].T, columns[3:].T @ columns[3:])


def then(first: Move, second: Move) -> Move:
    """One after the other."""
    return Move(second.matrix @ first.matrix, second.matrix @ first.noise @ second.matrix.T + second.noise)


def repeated(move: Move, times: int) -> Move:
    """``move`` so many times, by doubling."""
    if times < 2:
        size = len(move.matrix)
        return move if times else Move(np.eye(size), np.zeros((size, size)))
    half = repeated(then(move, move), times // 2)
    return then(half, move) if times % 2 else half
