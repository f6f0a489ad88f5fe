"""Settings that make no sense are refused, before any sampling, with what was given, what is wanted, what to do."""

import math

import numpy as np
import pytest
import torch

from bnn.kernels import MCMC, SGHMC, SGLD, Constant
from support import targets

DATA = targets.regression_data()
NAN, INF = math.nan, math.inf


def sgld(**options) -> SGLD:
    return SGLD(targets.regression, **{"step_size": 1e-4, "compile": "fx", **options})


def sghmc(**options) -> SGHMC:
    return SGHMC(targets.regression, **{"step_size": 1e-3, "friction": 5.0, "compile": "fx", **options})


@pytest.mark.parametrize("build", [sgld, sghmc])
@pytest.mark.parametrize("value", [0, -0.1, NAN, INF, -INF, "0.1", None, True, torch.ones(2)])
def test_step_size(build, value):
    with pytest.raises(ValueError, match=r"step_size is .*; give a finite number > 0, or a Schedule"):
        build(step_size=value)


@pytest.mark.parametrize("build", [sgld, sghmc])
@pytest.mark.parametrize("value", [-1.0, NAN, INF, Constant(-1.0), "hot"])
def test_temperature(build, value):
    with pytest.raises(ValueError, match=r"temperature is .*; give a finite number >= 0, or a Schedule"):
        build(temperature=value)


@pytest.mark.parametrize("value", [-1.0, NAN, INF, None])
def test_friction(value):
    with pytest.raises(ValueError, match=r"friction is .*; give a finite number >= 0, or a Schedule"):
        sghmc(friction=value)


@pytest.mark.parametrize("number", [np.float32(0.01), np.float64(0.01), 1])
def test_numbers_of_other_libraries_are_numbers(number):
    kernel = sghmc(step_size=number, friction=number, temperature=number)
    assert kernel.coefficients is not None and float(kernel.step_size) == pytest.approx(float(number))


SETTINGS = [
    pytest.param(sghmc, "mass", id="mass"),
    pytest.param(sgld, "preconditioner", id="preconditioner"),
    pytest.param(sghmc, "gradient_noise", id="gradient_noise"),
]
PER_COORDINATE = [
    (-1.0, r"holds -1; give finite values >=? ?0"),
    (NAN, r"holds nan; give finite values"),
    ({"weight": -2.0}, r"holds -2; give finite values"),
    ({"weight": torch.tensor([1.0, INF, 1.0])}, r"holds inf; give finite values"),
    ({"wieght": 1.0}, r"names sites \['wieght'\]; the model's latent sites are \['weight', 'a_scale'\]"),
    ({"weight": torch.ones(2)}, r"of site 'weight' has shape \(2,\); give a number or \(3,\)"),
    (torch.ones(5), r"has shape \(5,\); give a number, a dict of numbers per site, or a vector of 4 values"),
    (torch.ones(4, 1), r"has shape \(4, 1\); give"),
    ("heavy", r"is 'heavy'; give a number, a dict"),
]


@pytest.mark.parametrize(("value", "message"), PER_COORDINATE)
@pytest.mark.parametrize(("build", "name"), SETTINGS)
def test_settings_per_coordinate(build, name, value, message):
    with pytest.raises(ValueError, match=f"{name} {message}"):
        build(**{name: value}).setup(0, *DATA)


@pytest.mark.parametrize(("build", "name"), SETTINGS[:2])
@pytest.mark.parametrize("value", [0.0, {"weight": 0.0}])
def test_mass_is_positive(build, name, value):
    with pytest.raises(ValueError, match=rf"{name} holds 0; give finite values > 0"):
        build(**{name: value}).setup(0, *DATA)


def test_gradient_noise_may_vanish_at_some_sites():
    """And does, at the sites that a dict leaves out."""
    kernel = sghmc(gradient_noise={"weight": torch.tensor([0.0, 1.0, 2.0])})
    kernel.setup(0, *DATA)
    assert kernel._gradient_noise().tolist() == [0.0, 1.0, 2.0, 0.0]


@pytest.mark.parametrize("integrator", ["bbaoa", "symplectic_euler", "baoab", "obabo"])
def test_more_gradient_noise_than_friction_takes_up(integrator):
    kernel = sghmc(gradient_noise=2.2 * 5.0 / 1e-3, integrator=integrator)
    with pytest.raises(ValueError, match=r"gradient_noise asks to remove more noise .*friction of 5 .*raise friction"):
        kernel.setup(0, *DATA)
    sghmc(gradient_noise=1.8 * 5.0 / 1e-3, integrator=integrator).setup(0, *DATA)


def test_integrator():
    with pytest.raises(ValueError, match="integrator 'leapfrog' is unknown: choose one of 'bbaoa', 'symplectic_euler'"):
        sghmc(integrator="leapfrog")


@pytest.mark.parametrize("value", [0, -1, 1.5, "3", True])
def test_steps_per_sample(value):
    with pytest.raises(ValueError, match="steps_per_sample is .*; give a whole number of at least 1"):
        sgld(steps_per_sample=value)


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_momentum_resampling(value):
    with pytest.raises(ValueError, match="momentum_resampling is .*; give a number of steps >= 1, or None"):
        sghmc(momentum_resampling=value)


def test_compile():
    with pytest.raises(ValueError, match="compile='jit' is not a tier: choose one of 'auto', 'inductor', 'fx'"):
        sgld(compile="jit")


def test_init_strategy():
    with pytest.raises(ValueError, match="init strategy 'zeros' is unknown: choose one of 'auto', 'prior'"):
        sgld(init_strategy="zeros")


def test_model():
    with pytest.raises(ValueError, match="model is int; give a Pyro model, a callable"):
        SGLD(3, step_size=0.1)


@pytest.mark.parametrize("name", ["num_samples", "num_chains"])
@pytest.mark.parametrize("value", [0, -3, 2.5, True, "4"])
def test_counts(name, value):
    with pytest.raises(ValueError, match=rf"{name} is .*; give a whole number of at least 1"):
        MCMC(sgld(), **{"num_samples": 10, name: value})


@pytest.mark.parametrize("value", [-1, 0.5])
def test_warmup_steps(value):
    with pytest.raises(ValueError, match="warmup_steps is .*; give a whole number of at least 0"):
        MCMC(sgld(), 10, warmup_steps=value)


def test_chain_method():
    with pytest.raises(ValueError, match="chain_method='threads' is unknown: choose one of 'vectorized', 'sequential'"):
        MCMC(sgld(), 10, chain_method="threads")


def run(**options) -> None:
    MCMC(sgld(), 3, disable_progbar=True, **options).run(*DATA)


def test_save_params():
    with pytest.raises(ValueError, match=r"save_params names \['wieght'\]; the model's latent sites are \['weight'"):
        run(save_params=["wieght", "a_scale"])


def initial(chains: int, **values) -> dict[str, torch.Tensor]:
    return {"weight": torch.zeros(chains, 3), "a_scale": torch.zeros(chains), **values}


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (initial(3), "chain|batch"),
        (initial(2, weight=torch.zeros(2, 4)), r"'weight' have shape \(2, 4\); wanted is \(chains, 3\)"),
        ({"weight": torch.zeros(2, 3)}, r"missing \['a_scale'\]"),
        (initial(2, b_scale=torch.zeros(2)), r"unknown \['b_scale'\]"),
        (initial(2, a_scale=torch.tensor([0.0, NAN])), "NaN or infinite at site 'a_scale'"),
        (initial(2, a_scale=torch.tensor([0.0, -200.0])), r"not finite at the initial values of chains \[1\]"),
    ],
    ids=["chains", "shape", "missing", "unknown", "nan", "infinite_energy"],
)
def test_initial_params(params, message):
    with pytest.raises(ValueError, match=message):
        run(num_chains=2, initial_params=params)


def test_a_kernel_that_is_not_set_up():
    with pytest.raises(RuntimeError, match=r"not set up: run it through MCMC\(kernel, \.\.\.\)\.run"):
        sgld().logging()
