"""What Pyro's runners ask of a kernel, and ours of any kernel: one table, every row under every runner."""

import copy
import json
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import arviz as az
import pyro
import pytest
import torch
from pyro.infer import MCMC as PyroMCMC
from pyro.infer.mcmc import StreamingMCMC

from bnn.kernels import GGMC, MCMC, SGHMC, SGLD
from support import targets
from support.cases import KERNELS

DATA = targets.regression_data()


@pytest.fixture(autouse=True)
def one_processor(monkeypatch):
    """Pyro's own runner forks processes where processors are free; here its chains are to run one after another."""
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 1)


def stock(kernel: Any, *args: Any, **kwargs: Any) -> PyroMCMC:
    return PyroMCMC(kernel, *args, disable_progbar=True, **kwargs)


def ours(chain_method: str) -> Callable[..., MCMC]:
    def build(kernel: Any, *args: Any, **kwargs: Any) -> MCMC:
        return MCMC(kernel, *args, disable_progbar=True, chain_method=chain_method, **kwargs)

    return build


OFTEN = (SGLD, SGHMC, GGMC)  # the others run under Pyro's runner in the slow suite
RUNNERS = {"pyro": stock, "vectorized": ours("vectorized")}
every_kernel = pytest.mark.parametrize("case", KERNELS, ids=lambda case: case.name)


def _rows() -> Iterator[Any]:
    """Every kernel under every runner; under Pyro's, which moves chain after chain, a row of some by default."""
    classes = set()
    for case in KERNELS:
        for name, runner in RUNNERS.items():
            is_further = name == "pyro" and (case.kernel in classes or case.kernel not in OFTEN)
            yield pytest.param(case, runner, id=f"{case.name}-{name}", marks=[pytest.mark.slow] if is_further else [])
        classes.add(case.kernel)


every_kernel_and_runner = pytest.mark.parametrize(("case", "runner"), list(_rows()))


def same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


def assert_arviz_reads(mcmc: PyroMCMC) -> None:
    """``arviz.from_pyro``, which ArviZ has up to 0.23."""
    if hasattr(az, "from_pyro"):
        idata = az.from_pyro(mcmc, log_likelihood=False)
        assert not idata.sample_stats["diverging"].values.any()
        for name, value in mcmc.get_samples(group_by_chain=True).items():
            assert (idata.posterior[name].values == value.numpy()).all()


@every_kernel_and_runner
def test_draws(case, runner):
    """Shapes, precision, constrained values; the same seed and an unpickled kernel give the same bits; ArviZ."""
    data, kernel, results = targets.regression_data(torch.float64), case.build(targets.regression), []
    for one in (kernel, pickle.loads(pickle.dumps(kernel))):
        pyro.set_rng_seed(5)
        mcmc = runner(one, 5, warmup_steps=2, num_chains=2)
        mcmc.run(*data)
        results.append(mcmc.get_samples(group_by_chain=True))
    draws = results[0]
    assert same_bits(*results)
    assert {name: value.shape for name, value in draws.items()} == {"weight": (2, 5, 3), "a_scale": (2, 5)}
    assert all(value.dtype == torch.float64 and not value.requires_grad for value in draws.values())
    assert (draws["a_scale"] > 0).all()
    moved = draws["weight"].diff(dim=1).abs().amin(-1) > 0
    assert moved.float().mean() > 0.5 if case.kernel.metropolised else moved.all()  # some proposals are refused
    assert (draws["weight"][0] != draws["weight"][1]).all()
    assert_arviz_reads(mcmc)
    pickle.loads(pickle.dumps(kernel))  # after a run, too


@every_kernel_and_runner
def test_each_chain_starts_where_it_is_told(case, runner):
    """A step that moves by next to nothing from far-apart starts; the positive site is given unconstrained."""
    initial = {
        "weight": torch.arange(6.0).reshape(2, 3),
        "a_scale": torch.tensor([-1.0, 1.0]),
    }
    kernel = case.build(targets.regression, step_size=1e-9, temperature=1e-9)
    mcmc = runner(kernel, 2, warmup_steps=0, num_chains=2, initial_params=initial)
    mcmc.run(*DATA)
    first = {name: value[:, 0] for name, value in mcmc.get_samples(group_by_chain=True).items()}
    torch.testing.assert_close(first["weight"], initial["weight"], atol=1e-4, rtol=0)
    torch.testing.assert_close(first["a_scale"], initial["a_scale"].exp(), atol=1e-4, rtol=0)


@every_kernel_and_runner
def test_hook_logging_and_copies_in_mid_run(case, runner):
    """The hook sees every step; at each one the kernel logs JSON, and can be copied and pickled."""
    seen = []

    def hook(kernel, params, stage, i):
        assert json.loads(json.dumps(kernel.logging())).keys() == {"step size", "energy", "temperature"}
        assert set(params) == {"weight", "a_scale"}
        copied = [copy.deepcopy(kernel), pickle.loads(pickle.dumps(kernel))]
        for one in copied:  # a copy is a kernel that has not been set up
            with pytest.raises(RuntimeError, match="not set up"):
                one.diagnostics()
        seen.append((stage, i))

    kernel = case.build(targets.regression)
    runner(kernel, 3, warmup_steps=2, hook_fn=hook).run(*DATA)
    stages = [("warmup" if "arm" in stage else "sample", i) for stage, i in seen]
    assert stages == [("warmup", 0), ("warmup", 1), ("sample", 0), ("sample", 1), ("sample", 2)]


@every_kernel
def test_the_protocol_by_hand(case):
    """The calls of PYRO's runners, in their order: setup(0) for the transforms, steps, cleanup twice."""
    kernel = case.build(targets.regression)
    assert kernel.initial_params == {}
    kernel.setup(0, *DATA)
    assert set(kernel.transforms) == {"a_scale"}
    assert kernel.transforms["a_scale"].inv(torch.tensor(-3.0)) > 0
    params = kernel.initial_params
    for _ in range(3):
        params = kernel.sample(params)
        kernel.logging()
    assert {name: value.shape for name, value in params.items()} == {"weight": (3,), "a_scale": ()}
    diagnostics = kernel.diagnostics()
    assert diagnostics["divergences"] == []
    assert diagnostics["temperature asked"] in (0.5, 1.0)
    assert ("kinetic temperature" in diagnostics) == case.has_momentum
    assert ("configurational temperature" in diagnostics) == case.kernel.evaluates_at_draws
    assert kernel.gradients_per_step == case.gradients_per_step
    assert kernel.noises_per_step == case.draws_noise_per_step
    far = {"weight": torch.tensor([5.0, 6.0, 7.0]), "a_scale": torch.tensor(2.0)}
    after = kernel.sample(far)  # values that are not its own are where the next step starts
    torch.testing.assert_close(after, far, atol=0.5, rtol=0)
    kernel.cleanup()
    kernel.cleanup()
    with pytest.raises(RuntimeError, match=r"not set up.*MCMC"):
        kernel.sample(params)


@every_kernel
def test_streaming(case):
    mcmc = StreamingMCMC(case.build(targets.regression), 6, warmup_steps=2, disable_progbar=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pyro's R-hat of six draws
        mcmc.run(*DATA)
        statistics = mcmc.get_statistics(group_by_chain=True)
    assert (statistics[0, "a_scale"]["mean"] > 0).all()
    assert set(statistics) == {(chain, name) for chain in (0,) for name in ("weight", "a_scale")}


@every_kernel
def test_statistics_per_draw(case):
    mcmc = ours("vectorized")(case.build(targets.regression), 7, warmup_steps=3, num_chains=2)
    mcmc.run(*DATA)
    stats = dict(mcmc.sample_stats)
    expected = {"energy", "gradient_norm", "squared_norm", "step_size", "temperature", "diverging", "step", "time"}
    if case.kernel.evaluates_at_draws:
        expected |= {"configurational_temperature"}
    if case.has_momentum:
        expected |= {"kinetic_temperature", "momentum_squared_norm", "position_momentum"}
        expected |= set() if case.settings["friction"] is None else {"friction"}
    if case.cycles:
        expected |= {"cycle_position", "cycle"}
    if case.kernel.balances_norms:
        expected |= {"momentum_gradient"}
        norms = ("squared_norm", "position_momentum", "momentum_squared_norm") if "mass" not in case.settings else ()
        expected |= {f"{norm}_{rate}" for norm in norms for rate in ("rate", "sde_rate")}
    per_site = {f"site_{name}" for name in expected if name.endswith("_temperature")}
    assert set(stats) == expected | per_site | case.extra_stats
    assert all(stats.pop(name).shape == (2, 7, 2) for name in per_site)
    assert all(value.shape == (2, 7) and torch.isfinite(value.double()).all() for value in stats.values())
    if case.name == "sgld_cycles":  # draws 3 to 9 of a cycle of 5 steps
        assert stats["cycle_position"][0].tolist() == pytest.approx([0.6, 0.8, 0.0, 0.2, 0.4, 0.6, 0.8])
        assert stats["cycle"][0].tolist() == [0, 0, 1, 1, 1, 1, 1]


@pytest.mark.slow
@every_kernel
def test_spawned_chains(case):
    """One process per chain: each starts where it is told, unlike under Pyro's own sampler."""
    initial = {"weight": torch.arange(6.0).reshape(2, 3), "a_scale": torch.tensor([-1.0, 1.0])}
    kernel = case.build(targets.regression, step_size=1e-9, temperature=1e-9)
    mcmc = ours("parallel")(kernel, 3, warmup_steps=1, num_chains=2, initial_params=initial)
    mcmc.run(*DATA)
    first = {name: value[:, 0] for name, value in mcmc.get_samples(group_by_chain=True).items()}
    torch.testing.assert_close(first["weight"], initial["weight"], atol=1e-4, rtol=0)
    torch.testing.assert_close(first["a_scale"], initial["a_scale"].exp(), atol=1e-4, rtol=0)
    assert mcmc.diagnostics()["divergences"] == {"chain 0": [], "chain 1": []}
    mcmc.summary()
