"""Settings that change along a run."""

import copy
import math
import pickle

import pyro
import pytest

from bnn.kernels import MCMC, SGHMC, SGLD, Constant, CosineCycles, PolynomialDecay, Schedule
from bnn.kernels.schedules import check_setting, cycle_position, value_at
from support import targets

SCHEDULES = [Constant(0.1), PolynomialDecay(0.1, delay=10.0, power=0.55), CosineCycles(0.1, 4, floor=0.02)]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: type(s).__name__)
def test_schedules_are_values(schedule):
    for other in (pickle.loads(pickle.dumps(schedule)), copy.deepcopy(schedule)):
        assert other == schedule and hash(other) == hash(schedule)
        assert [other.value_at(t) for t in range(9)] == [schedule.value_at(t) for t in range(9)]
    with pytest.raises(AttributeError):
        schedule.initial = 1.0


def test_constant():
    assert [Constant(0.3).value_at(t) for t in (0, 10**6)] == [0.3, 0.3]


def test_polynomial_decay_is_welling_and_tehs():
    """a (b + t)^(−c) with a = initial · b^c."""
    initial, b, c = 0.2, 7.0, 0.6
    for t in (0, 1, 13, 10_000):
        assert PolynomialDecay(initial, b, c).value_at(t) == pytest.approx(initial * b**c * (b + t) ** -c)


def test_cosine_cycles_are_zhangs():
    """α₀/2 (cos(π mod(k − 1, L)/L) + 1) with k counting from 1."""
    schedule = CosineCycles(0.5, cycle_length=6)
    for k in range(1, 20):
        assert schedule.value_at(k - 1) == pytest.approx(0.25 * (math.cos(math.pi * ((k - 1) % 6) / 6) + 1))
    assert [schedule.cycle_position(t) for t in (0, 3, 6, 9)] == [0.0, 0.5, 0.0, 0.5]
    floored = CosineCycles(0.5, 6, floor=0.1)
    values = [floored.value_at(t) for t in range(12)]
    assert max(values) == values[0] == values[6] == 0.5 and 0.1 < min(values) < 0.15


def test_numbers_are_constant_schedules():
    assert value_at(0.25, 99) == 0.25 and cycle_position(0.25, 99) == 0.0
    assert cycle_position(PolynomialDecay(0.1), 3) == 0.0


@pytest.mark.parametrize(
    "schedule", [lambda: PolynomialDecay(0.1, delay=0.0), lambda: PolynomialDecay(0.1, power=-1.0)]
)
def test_polynomial_decay_refuses(schedule):
    with pytest.raises(ValueError, match="delay > 0 and power >= 0; got"):
        schedule()


def test_cosine_cycles_refuse():
    with pytest.raises(ValueError, match="cycle_length >= 1 step; got 0"):
        CosineCycles(0.1, 0)


class Half(Schedule):
    """A user's own."""

    def value_at(self, step):
        return 0.5 if step else 1.0


@pytest.mark.parametrize("setting", [0.1, 1, Constant(0.1), Half()])
def test_check_setting_accepts(setting):
    check_setting("step_size", setting, strict=True)


@pytest.mark.parametrize("setting", [Constant(-1.0), Constant(math.nan), PolynomialDecay(math.inf)])
def test_check_setting_looks_into_schedules(setting):
    with pytest.raises(ValueError, match=r"temperature is .*give a finite number >= 0, or a Schedule"):
        check_setting("temperature", setting)


def test_statistics_tell_each_draws_settings():
    """The values at the last of the steps that make a draw, warm-up counted."""
    step_size, friction = PolynomialDecay(1e-3, delay=5.0), CosineCycles(8.0, 5, floor=2.0)
    kernel = SGHMC(targets.regression, step_size=step_size, friction=friction, steps_per_sample=3, compile="fx")
    mcmc = MCMC(kernel, 4, 2, num_chains=2, disable_progbar=True)
    mcmc.run(*targets.regression_data())
    steps = [8, 11, 14, 17]
    for chain in range(2):
        assert mcmc.sample_stats["step_size"][chain].tolist() == [step_size.value_at(t) for t in steps]
        assert mcmc.sample_stats["friction"][chain].tolist() == [friction.value_at(t) for t in steps]
        assert mcmc.sample_stats["temperature"][chain].tolist() == [1.0] * 4


def test_a_constant_schedule_is_the_number():
    draws = []
    for step_size in (1e-4, Constant(1e-4)):
        kernel = SGLD(targets.regression, step_size=step_size, compile="fx")
        pyro.set_rng_seed(1)
        mcmc = MCMC(kernel, 5, 0, disable_progbar=True)
        mcmc.run(*targets.regression_data())
        draws.append(mcmc.get_samples()["weight"])
    assert (draws[0] == draws[1]).all()
