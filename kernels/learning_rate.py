"""From the parametrisation of deep learning, learning rate and momentum decay, to SGHMC's step size and friction."""

from __future__ import annotations

import math

from bnn.kernels.sghmc import Integrator


def step_size_and_friction(
    learning_rate: float, momentum_decay: float, num_data: int, integrator: Integrator = "bbaoa"
) -> tuple[float, float]:
    """``step_size`` and ``friction`` (unit mass) that move like SGD with this learning rate and momentum.

    The learning rate ℓ belongs to the mean loss U/N, the decay β to the heavy-ball momentum; Wenzel et al. (2020):

        symplectic_euler   h = √(ℓ/N),              C = (1 − β)/h
        splittings         h = √(2ℓ/(N(1 + β))),    C = −log(β)/h

    :raises ValueError: unless learning_rate > 0, num_data >= 1 and momentum_decay lies in [0, 1), (0, 1) for the
        splittings.

    >>> h, friction = step_size_and_friction(0.1, 0.9, num_data=1000, integrator="symplectic_euler")
    >>> round(h, 6), round(friction, 6)
    (0.01, 10.0)
    """
    lowest_open = integrator != "symplectic_euler"
    if (
        not learning_rate > 0
        or not num_data >= 1
        or not 0 <= momentum_decay < 1
        or (lowest_open and momentum_decay == 0)
    ):
        raise ValueError(
            f"got learning_rate={learning_rate}, momentum_decay={momentum_decay}, num_data={num_data}; give "
            "learning_rate > 0, num_data >= 1 and a momentum_decay in (0, 1)."
        )
    if integrator == "symplectic_euler":
        h = math.sqrt(learning_rate / num_data)
        return h, (1.0 - momentum_decay) / h
    h = math.sqrt(2.0 * learning_rate / (num_data * (1.0 + momentum_decay)))
    return h, -math.log(momentum_decay) / h


def learning_rate_and_momentum(
    step_size: float, friction: float, num_data: int, integrator: Integrator = "bbaoa"
) -> tuple[float, float]:
    """Learning rate of the mean loss and momentum decay of a ``step_size`` and ``friction``: the inverse of
    :func:`step_size_and_friction`.

    >>> learning_rate, decay = learning_rate_and_momentum(0.01, 10.0, num_data=1000, integrator="symplectic_euler")
    >>> round(learning_rate, 6), round(decay, 6)
    (0.1, 0.9)
    """
    if not step_size > 0 or not friction >= 0 or not num_data >= 1:
        raise ValueError(
            f"got step_size={step_size}, friction={friction}, num_data={num_data}; give step_size > 0, friction >= 0 "
            "and num_data >= 1."
        )
    if integrator == "symplectic_euler":
        return step_size**2 * num_data, 1.0 - step_size * friction
    decay = math.exp(-step_size * friction)
    return step_size**2 * num_data * (1.0 + decay) / 2.0, decay
