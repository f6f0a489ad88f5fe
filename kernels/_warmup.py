"""What corrected kernels find out in warm-up and keep after it: a step size, and the mass of each coordinate.

Dual averaging moves log h until the mean acceptance is the one asked for (Hoffman and Gelman 2014, "The No-U-Turn
sampler", JMLR 15, section 3.2). Masses are inverse variances of the positions in windows that double, as in Stan: the
first 75 draws and the last 50 are for the step size alone. All chains of a run share both.
"""

from __future__ import annotations

import math

import numpy as np
from pyro.ops.dual_averaging import DualAveraging
from pyro.ops.welford import WelfordCovariance
from torch import Tensor

from bnn.kernels._coordinates import Number

# Draws at the start, in the first window and at the end of a warm-up that is long enough; and the least of one at all.
START, WINDOW, END, LEAST = 75, 25, 50, 20


def window_ends(draws: int) -> list[int]:
    """The draws of warm-up, counted from 1, after which masses are set anew.

    >>> window_ends(1000)
    [100, 150, 250, 450, 950]
    >>> window_ends(100)
    [90]
    """
    if draws < LEAST:
        return []
    if START + WINDOW + END > draws:
        return [draws - int(0.1 * draws)]
    ends, size, at = [], WINDOW, START
    while at < draws - END:
        at = at + size if at + 3 * size <= draws - END else draws - END
        ends.append(at)
        size *= 2
    return ends


class Warmup:
    """The state of one warm-up.

    :param draws: how many draws it has.
    :param step_size: where the step size starts.
    :param adapts_step_size: whether it is found here.
    :param adapts_mass: whether masses are found here.
    :param target: the mean acceptance asked for.
    :ivar step_size: the step size to use.
    :ivar mass: the mass of each coordinate to use, None before the first window is over.
    """

    def __init__(self, draws: int, step_size: float, adapts_step_size: bool, adapts_mass: bool, target: float) -> None:
        self.draws, self.step_size, self.target = draws, step_size, target
        self.adapts_step_size = adapts_step_size
        self.mass: Number | None = None
        self._ends = window_ends(draws) if adapts_mass else []
        self._first = 0 if START + WINDOW + END > draws else START
        self._averaging = DualAveraging(prox_center=math.log(10.0 * step_size))
        self._welford = WelfordCovariance(diagonal=True)
        self._draw = 0

    def __call__(self, acceptance: float, position: Tensor) -> bool:
        """Learn from one draw of all chains; whether something changed.

        :param acceptance: mean acceptance probability.
        :param position: ``(chains, dim)``.
        """
        if self._draw >= self.draws:
            return False
        self._draw += 1
        changed = self.adapts_step_size
        if self.adapts_step_size:
            self._averaging.step(self.target - acceptance)
            newest, average = self._averaging.get_state()
            self.step_size = math.exp(average if self._draw == self.draws else newest)
        if self._ends and self._draw > self._first:
            for one in position.double().cpu():
                self._welford.update(one)
            if self._draw == self._ends[0]:
                self._ends.pop(0)
                self.mass = 1.0 / np.asarray(self._welford.get_covariance())
                self._welford.reset()
                if self.adapts_step_size:
                    self._averaging.prox_center = math.log(10.0 * self.step_size)
                    self._averaging.reset()
                changed = True
        return changed
