"""The exact law of a sampler on U = ½ k z² with gradient noise of variance V, as a linear recursion.

A step is a list of elementary moves of x = (z, r, e), e the noise of the gradient last evaluated. Each move is
x ← A x + N(0, Q), so that the covariance obeys Σ ← A Σ Aᵀ + Q at every step, whether stationary or not. The moves are
written down from the algorithms' definitions, in no way from the code under test.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.linalg import solve_discrete_lyapunov

Move = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Setting:
    """A target and a sampler's settings: curvature k, step h, friction C, mass M, temperature T, noise V."""

    curvature: float
    step_size: float
    temperature: float
    friction: float = 1.0
    mass: float = 1.0
    noise: float = 0.0
    removed: float = 0.0  # the V that the sampler is told to correct for

    @property
    def decay(self) -> float:
        """c = exp(−hC/M)."""
        return float(np.exp(-self.step_size * self.friction / self.mass))


def gradient(s: Setting) -> Move:
    """A fresh gradient: e ~ N(0, V)."""
    return np.diag([1.0, 1.0, 0.0]), np.diag([0.0, 0.0, s.noise])


def kick(s: Setting, share: float = 1.0) -> Move:
    """r ← r − share · h (k z + e)."""
    move = np.eye(3)
    move[1, [0, 2]] = -share * s.step_size * np.array([s.curvature, 1.0])
    return move, np.zeros((3, 3))


def drift(s: Setting, share: float = 1.0) -> Move:
    """z ← z + share · h r / M."""
    move = np.eye(3)
    move[0, 1] = share * s.step_size / s.mass
    return move, np.zeros((3, 3))


def fluctuate(factor: float, variance: float) -> Move:
    """r ← factor · r + N(0, variance)."""
    return np.diag([1.0, factor, 1.0]), np.diag([0.0, variance, 0.0])


def sgld(s: Setting) -> list[Move]:
    """z ← z − h P (k z + e) + N(0, 2hTP), with ``mass`` for 1/P."""
    preconditioner = 1.0 / s.mass
    move = np.diag([1.0, 0.0, 1.0])  # there is no momentum
    move[0] -= s.step_size * preconditioner * np.array([s.curvature, 0.0, 1.0])
    return [gradient(s), (move, np.diag([2 * s.step_size * s.temperature * preconditioner, 0.0, 0.0]))]


def symplectic_euler(s: Setting, resample: bool = False) -> list[Move]:
    """Momentum first; noise of variance 2hCT, less the minibatch noise that is known."""
    variance = 2 * s.step_size * s.friction * s.temperature - s.step_size**2 * s.removed
    step = [gradient(s), fluctuate(1 - s.step_size * s.friction / s.mass, variance), kick(s), drift(s)]
    return [renew(s), *step] if resample else step


def ornstein_uhlenbeck(s: Setting, share: float = 1.0, resample: bool = False) -> Move:
    """The exact flow of dr = −(C/M) r dt + √(2CT) dW over share · h, less the share of the known minibatch noise."""
    factor = 0.0 if resample else s.decay**share
    removed = share * factor**2 * s.step_size**2 * s.removed
    return fluctuate(factor, s.mass * s.temperature * (1 - factor**2) - removed)


def renew(s: Setting) -> Move:
    """r ~ N(0, T M)."""
    return fluctuate(0.0, s.mass * s.temperature)


def bbaoa(s: Setting, resample: bool = False) -> list[Move]:
    """Both kicks together, half a drift, friction and noise, half a drift."""
    return [gradient(s), kick(s), drift(s, 0.5), ornstein_uhlenbeck(s, resample=resample), drift(s, 0.5)]


def baoab(s: Setting, resample: bool = False) -> list[Move]:
    """Half a kick with the gradient of the step before, and half a kick with a fresh one at the end."""
    middle = [drift(s, 0.5), ornstein_uhlenbeck(s, resample=resample), drift(s, 0.5)]
    return [kick(s, 0.5), *middle, gradient(s), kick(s, 0.5)]


def obabo(s: Setting, resample: bool = False) -> list[Move]:
    """Friction and noise over half a step about a leapfrog step."""
    outer = ornstein_uhlenbeck(s, 0.5, resample)
    return [outer, kick(s, 0.5), drift(s), gradient(s), kick(s, 0.5), outer]


Step = Callable[..., list[Move]]


def start(s: Setting) -> np.ndarray:
    """Covariance where the tests start: z = 0, r ~ N(0, T M), one gradient evaluated."""
    return np.diag([0.0, s.mass * s.temperature, s.noise])


def propagate(covariance: np.ndarray, moves: Sequence[Move]) -> np.ndarray:
    """The covariance after some moves."""
    for move, noise in moves:
        covariance = move @ covariance @ move.T + noise
    return covariance


def stationary(moves: Sequence[Move]) -> np.ndarray:
    """The covariance that a step leaves as it is."""
    matrix, noise = np.eye(3), propagate(np.zeros((3, 3)), moves)
    for move, _ in moves:
        matrix = move @ matrix
    return solve_discrete_lyapunov(matrix, noise)


def steps_to_stationarity(moves: Sequence[Move], times: float = 20.0) -> int:
    """Steps in which the slowest direction of the covariance relaxes by exp(−times)."""
    matrix = np.eye(3)
    for move, _ in moves:
        matrix = move @ matrix
    radius = max(abs(np.linalg.eigvals(matrix)))
    assert radius < 1, "the step is not stable"
    return int(np.ceil(times / (-2 * np.log(radius))))


def stationary_in_epochs(moves: Sequence[Move], noise: float, epoch: int) -> np.ndarray:
    """The stationary covariance, on average over an epoch, of a step whose gradients' noise sums to zero over epochs.

    The noises in an epoch have covariance V (I − 11ᵀ/m): those of minibatches of shuffled rows, with V the rows'
    finite-population variance.

    :param moves: a step without noise in its gradient.
    :param noise: V.
    :param epoch: m.
    """
    matrix, injected = np.eye(3), propagate(np.zeros((3, 3)), moves)
    entry = np.zeros((3, 1))
    for move, _ in moves:
        matrix, entry = move @ matrix, move @ entry
        if move[2, 2] == 0:  # where the gradient is evaluated
            entry[2] = 1.0
    powers = [np.linalg.matrix_power(matrix, lag) for lag in range(2 * epoch)]
    joint = noise * (np.eye(epoch) - 1.0 / epoch)

    def after(start: np.ndarray, count: int) -> np.ndarray:
        """The covariance ``count`` steps into an epoch, from that at its start."""
        gains = np.hstack([powers[count - 1 - step] @ entry for step in range(count)])
        result = powers[count] @ start @ powers[count].T + gains @ joint[:count, :count] @ gains.T
        return result + sum(powers[lag] @ injected @ powers[lag].T for lag in range(count))

    start = solve_discrete_lyapunov(powers[epoch], after(np.zeros((3, 3)), epoch))
    return np.mean([after(start, count) for count in range(1, epoch + 1)], axis=0)
