"""Settings that change along a run: every kernel setting is a ``float | Schedule``."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Real


class Schedule(ABC):
    """A setting as a function of the step number, which counts from 0 and includes warm-up."""

    @abstractmethod
    def value_at(self, step: int) -> float:
        """The setting at ``step``."""

    has_cycles = False

    def cycle_position(self, step: int) -> float:
        """How far into its cycle ``step`` lies, in [0, 1); 0 for a schedule without cycles."""
        del step
        return 0.0

    def cycle(self, step: int) -> int:
        """The number of the cycle that ``step`` lies in, from 0."""
        del step
        return 0


@dataclass(frozen=True)
class Constant(Schedule):
    """The same value at every step.

    >>> Constant(0.1).value_at(7)
    0.1
    """

    value: float

    def value_at(self, step: int) -> float:
        """The constant."""
        del step
        return self.value


@dataclass(frozen=True)
class PolynomialDecay(Schedule):
    """``initial · (1 + step / delay)^(−power)``, the decay a(b + t)^(−c) of Welling and Teh (2011), ICML, section 3.

    SGLD then converges to the posterior for ``1/2 < power <= 1``: the step sizes' sum diverges, that of their squares
    does not.

    :param initial: value at step 0, their a·b^(−c).
    :param delay: their b, in steps: the value has halved after ``(2^(1/power) − 1) · delay`` steps.
    :param power: their c.

    >>> PolynomialDecay(0.1, delay=10.0, power=1.0).value_at(10)
    0.05
    """

    initial: float
    delay: float = 1.0
    power: float = 0.55

    def __post_init__(self) -> None:
        """:raises ValueError: for a negative power or a delay that is not positive."""
        if not self.delay > 0 or not self.power >= 0:
            raise ValueError(f"PolynomialDecay wants delay > 0 and power >= 0; got {self.delay} and {self.power}.")

    def value_at(self, step: int) -> float:
        """The value at ``step``."""
        return self.initial * (1.0 + step / self.delay) ** -self.power


@dataclass(frozen=True)
class CosineCycles(Schedule):
    """``floor + (peak − floor) · ½ (cos(π s / L) + 1)`` with s the step within a cycle of L steps.

    Zhang et al. (2020), "Cyclical stochastic gradient MCMC for Bayesian deep learning", ICLR, equation 1, with
    ``floor=0``.

    :param peak: value at the start of each cycle.
    :param cycle_length: steps per cycle L.
    :param floor: value that the end of a cycle approaches.
    :param hold: share of the cycle, at its end, that stays at the floor; the cosine takes the rest.

    >>> CosineCycles(0.1, cycle_length=4).value_at(6)
    0.05
    """

    peak: float
    cycle_length: int
    floor: float = 0.0
    hold: float = 0.0
    has_cycles = True

    def __post_init__(self) -> None:
        """:raises ValueError: for a cycle of less than one step, or a share outside [0, 1)."""
        if self.cycle_length < 1:
            raise ValueError(f"CosineCycles wants cycle_length >= 1 step; got {self.cycle_length}.")
        if not 0.0 <= self.hold < 1.0:
            raise ValueError(f"CosineCycles wants a share 0 <= hold < 1 of the cycle; got {self.hold}.")

    def value_at(self, step: int) -> float:
        """The value at ``step``."""
        progress = min(self.cycle_position(step) / (1.0 - self.hold), 1.0)
        return self.floor + (self.peak - self.floor) * 0.5 * (math.cos(math.pi * progress) + 1.0)

    def cycle(self, step: int) -> int:
        """The number of the cycle that ``step`` lies in, from 0."""
        return step // self.cycle_length

    def cycle_position(self, step: int) -> float:
        """How far into its cycle ``step`` lies, in [0, 1)."""
        return (step % self.cycle_length) / self.cycle_length


def value_at(setting: float | Schedule, step: int) -> float:
    """The value of a setting at a step."""
    return setting.value_at(step) if isinstance(setting, Schedule) else float(setting)


def cycle_position(setting: float | Schedule, step: int) -> float:
    """Where in its cycle a setting stands, 0 for a plain number."""
    return setting.cycle_position(step) if isinstance(setting, Schedule) else 0.0


def check_setting(name: str, setting: float | Schedule, *, minimum: float = 0.0, strict: bool = False) -> None:
    """Check a number, or a schedule at its first steps.

    :raises ValueError: if it is not a finite number above ``minimum`` (``strict``: not equal to it either).
    """
    wanted = f"a finite number {'>' if strict else '>='} {minimum:g}, or a Schedule of such"
    if not isinstance(setting, (Real, Schedule)) or isinstance(setting, bool):
        raise ValueError(f"{name} is {setting!r}; give {wanted}.")
    value = value_at(setting, 0)
    if not math.isfinite(value) or value < minimum or (strict and value == minimum):
        raise ValueError(f"{name} is {value!r}; give {wanted}.")
