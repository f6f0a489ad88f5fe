"""Norm balance: the two sides of each identity are equal in mean at any step size, and the errors are what they say."""

from types import SimpleNamespace

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt
from scipy import stats

from bnn import norm_balance, plot_norm_balance, to_arviz
from bnn.kernels import MCMC, SGHMC, SGLD, CyclicalSGHMC, NormAdjustedSGHMC
from support.checks import ALPHA

INTEGRATORS = ["symplectic_euler", "bbaoa", "baoab", "obabo"]
NORMS = ["squared_norm", "position_momentum", "momentum_squared_norm"]
LARGEST_Z = stats.norm.isf(ALPHA / 2)
DATA = torch.arange(4.0, dtype=torch.float64)


def two_sites(y):
    """Not Gaussian, with minibatch noise."""
    zero = torch.zeros((), dtype=torch.float64)
    z = pyro.sample("z", dist.Normal(zero, 1.0).expand([5]).to_event(1))
    w = pyro.sample("w", dist.Normal(zero, 2.0).expand([3]).to_event(1))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.StudentT(5.0, z.sum() + w.sum(), 1.0), obs=y[rows])


def ran(kernel, draws, chains, warmup=0, start=None, seed=1):
    pyro.set_rng_seed(seed)
    initial = None
    if start is not None:
        initial = {n: torch.full((chains, d), start, dtype=torch.float64) for n, d in {"z": 5, "w": 3}.items()}
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, initial_params=initial, disable_progbar=True)
    mcmc.run(DATA)
    return mcmc


@pytest.mark.parametrize("resampling", [None, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("integrator", INTEGRATORS)
def test_balance_of_a_long_step_far_from_equilibrium(integrator, resampling):
    """400 chains that fall from afar: |z|² to rounding, the others within their errors; not so by the SDE."""
    kernel = SGHMC(
        two_sites, step_size=0.3, friction=1.5, mass=2.0, temperature=0.7, integrator=integrator,
        momentum_resampling=resampling, compile="fx",
    )  # fmt: skip
    balance = norm_balance(ran(kernel, 30, 400, start=2.0))
    z = (balance.residual / balance.error).sel(norm=NORMS)
    if integrator == "obabo":
        assert abs(z[0]) < LARGEST_Z
    else:
        assert abs(balance.residual.sel(norm="squared_norm")) < 1e-12
    assert (abs(z[1:]) < LARGEST_Z).all(), z
    assert (balance.error < 0.02 * 2 * 0.7 * 1.5 * 8).all()  # small beside 2TCd, which friction and noise exchange
    lacks = abs(balance.change - balance.sde_rate) / balance.error
    assert lacks.max() > 2 * LARGEST_Z


@pytest.mark.parametrize("integrator", ["bbaoa", "obabo"])
def test_balance_of_draws_with_steps_between(integrator):
    """In equilibrium a draw stands for the steps since the last one."""
    kernel = SGHMC(
        two_sites, step_size=0.3, friction=1.5, integrator=integrator, steps_per_sample=3, compile="fx"
    )  # fmt: skip
    balance = norm_balance(ran(kernel, 40, 200, warmup=60))
    assert (abs(balance.residual / balance.error) < LARGEST_Z).all()
    assert (balance.error < 0.02 * 2 * 1.5 * 8).all()  # small beside 2TCd, which friction and noise exchange


def test_momenta_drawn_too_cold_are_seen():
    """Between the draws momenta are drawn at a hundredth of αT: the noise heats them, and nothing balances."""
    settings = {"step_size": 0.2, "friction": 1.0, "resample_every": 5, "steps_per_sample": 5, "compile": "fx"}
    with pytest.warns(RuntimeWarning, match="only alpha"):
        cold = norm_balance(ran(NormAdjustedSGHMC(two_sites, momentum_scale=0.01, **settings), 40, 200, warmup=20))
    found = cold.sel(norm="momentum_squared_norm")
    assert found.residual < -10 * found.error and found.rate > 0


def test_the_error_is_one_standard_deviation():
    """Of 100 runs of four chains, the residual in units of its error: a mean square near one, at most twice."""
    kernel = SGHMC(two_sites, step_size=0.3, friction=1.5, compile="fx")
    mcmc = ran(kernel, 60, 400, warmup=20)
    scores = []
    for first in range(0, 400, 4):
        part = {name: values[first : first + 4] for name, values in mcmc.sample_stats.items()}
        one = SimpleNamespace(
            run_facts=mcmc.run_facts, sample_stats=part, get_samples=lambda group_by_chain: {}
        )  # fmt: skip
        balance = norm_balance(one)
        scores.append((balance.residual / balance.error).values[1:])
    square = np.square(scores).mean(0)
    assert ((square > 0.6) & (square < 2.0)).all(), square


def test_intervals_of_exploration_do_not_count():
    kernel = CyclicalSGHMC(two_sites, step_size=0.3, friction=1.5, cycle_length=20, exploration=0.5, compile="fx")
    mcmc = ran(kernel, 40, 200)
    balance = norm_balance(mcmc)
    assert abs(balance.residual.sel(norm="squared_norm")) < 1e-12
    assert (abs((balance.residual / balance.error)[1:]) < LARGEST_Z).all()
    time, sizes = mcmc.sample_stats["time"][0], mcmc.sample_stats["step_size"][0]
    steps = mcmc.sample_stats["step"][0]
    follows = steps.diff() == 1
    torch.testing.assert_close(time.diff()[follows], sizes[1:][follows])
    assert time[0] == pytest.approx(sum(kernel.step_size.value_at(step) for step in range(int(steps[0]) + 1)))


def test_chains_that_diverged_do_not_count():
    mcmc = ran(SGHMC(two_sites, step_size=0.3, friction=1.5, compile="fx"), 20, 6)
    expected = norm_balance(mcmc)
    broken = {name: torch.cat([values, values[:1]]) for name, values in mcmc.sample_stats.items()}
    broken["squared_norm"][-1] = torch.inf
    broken["diverging"][-1, 5:] = True
    one = SimpleNamespace(run_facts=mcmc.run_facts, sample_stats=broken, get_samples=lambda group_by_chain: {})
    assert norm_balance(one).equals(expected)


def test_a_stored_run_gives_the_same(tmp_path):
    mcmc = ran(SGHMC(two_sites, step_size=0.3, friction=1.5, compile="fx"), 20, 3)
    data = to_arviz(mcmc)
    assert data.sample_stats.site_kinetic_temperature.dims == ("chain", "draw", "site")
    data.to_netcdf(str(tmp_path / "run.nc"))
    stored = az.from_netcdf(str(tmp_path / "run.nc"))
    for kept in (data, stored):
        assert norm_balance(kept).equals(norm_balance(mcmc))


def test_plot():
    mcmc = ran(SGHMC(two_sites, step_size=0.3, friction=1.5, compile="fx"), 30, 3)
    figure = plot_norm_balance(mcmc)
    top, middle, bottom = (figure.axes[row * 3 + 1] for row in range(3))
    assert top.get_title() == "zᵀr" and len(top.lines) == 4
    left, right = middle.lines[2].get_ydata(), middle.lines[1].get_ydata()
    np.testing.assert_allclose(bottom.lines[0].get_ydata(), left - right)
    balance = norm_balance(mcmc).sel(norm="position_momentum")
    span = float(mcmc.sample_stats["time"][0, -1] - mcmc.sample_stats["time"][0, 0])
    np.testing.assert_allclose([left[-1], right[-1]], [balance.change * span, balance.rate * span])
    plt.close(figure)


@pytest.mark.parametrize(
    ("kernel", "draws", "message"),
    [
        (SGLD(two_sites, step_size=0.01, compile="fx"), 5, "rates of norms are known for SGHMC"),
        (SGHMC(two_sites, step_size=0.1, friction=1.0, mass={"z": 2.0}, compile="fx"), 5, "differ between coordinates"),
        (SGHMC(two_sites, step_size=0.1, friction=1.0, compile="fx"), 2, "2 draws; a balance needs at least 3"),
    ],
)
def test_runs_without_a_balance(kernel, draws, message):
    mcmc = ran(kernel, draws, 2)
    for call in (norm_balance, plot_norm_balance):
        with pytest.raises(ValueError, match=message):
            call(mcmc)


def test_what_is_no_run():
    with pytest.raises(ValueError, match="run is dict; give a finished run"):
        norm_balance({})
