"""What ``bnn.kernels.MCMC`` does beyond a kernel's contract: chains, interrupts, batches, reports, Pyro's kernels."""

import time

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import NUTS
from torch.utils.data import DataLoader, TensorDataset

from bnn.kernels import MCMC, SGHMC, SGLD
from support import targets

DATA = targets.regression_data()


def sghmc(model=targets.regression, **options) -> SGHMC:
    return SGHMC(model, **{"step_size": 5e-3, "friction": 5.0, "compile": "fx", **options})


def mcmc_of(kernel, *args, **kwargs) -> MCMC:
    return MCMC(kernel, *args, disable_progbar=True, **kwargs)


def flat() -> None:
    """Two sites in an order that is not alphabetical."""
    pyro.sample("b", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("a", dist.Normal(torch.zeros(3), 1.0).to_event(1))


def test_sequential_chains_are_those_of_a_fresh_runner():
    """One after another: the first chain is a run of one chain from the same seed, the others differ."""
    pyro.set_rng_seed(1)
    three = mcmc_of(sghmc(), 4, num_chains=3, chain_method="sequential")
    three.run(*DATA)
    pyro.set_rng_seed(1)
    one = mcmc_of(sghmc(), 4, chain_method="sequential")
    one.run(*DATA)
    draws = three.get_samples(group_by_chain=True)["weight"]
    assert torch.equal(draws[0], one.get_samples()["weight"])
    assert (draws[1] != draws[2]).all() and (draws[0] != draws[1]).all()
    assert three.sample_stats["energy"].shape == (3, 4)
    assert three.diagnostics()["divergences"] == {f"chain {i}": [] for i in range(3)}


def test_sequential_chains_start_where_they_are_told():
    initial = {"weight": torch.arange(6.0).reshape(2, 3), "a_scale": torch.tensor([-1.0, 1.0])}
    kernel = sghmc(step_size=1e-9, temperature=0.0)
    mcmc = mcmc_of(kernel, 2, 0, initial_params=initial, num_chains=2, chain_method="sequential")
    mcmc.run(*DATA)
    torch.testing.assert_close(
        mcmc.get_samples(group_by_chain=True)["weight"][:, 0], initial["weight"], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("order", [["b", "a"], ["a", "b"], ["a"]])
@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_saved_sites_in_any_order(order, method):
    """Pyro's own runner mixes the values of sites that are not named in alphabetical order."""
    initial = {"b": torch.full((2, 2), 5.0), "a": torch.tensor([[-1.0, -2.0, -3.0]] * 2)}
    kernel = sghmc(flat, step_size=1e-9, temperature=0.0)
    mcmc = mcmc_of(kernel, 2, 0, initial_params=initial, num_chains=2, save_params=order, chain_method=method)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)
    assert set(draws) == set(order)
    for name in order:
        torch.testing.assert_close(draws[name][:, 0], initial[name], atol=1e-5, rtol=0)
    assert mcmc._dim == 5  # the temperatures are those of all sites


def test_hook_sees_every_chain():
    seen = []

    def hook(kernel, params, stage, i):
        seen.append((stage, i, params["weight"].shape))

    mcmc_of(sghmc(), 2, 1, num_chains=3, hook_fn=hook).run(*DATA)
    assert seen == [("Warmup", 0, (3, 3)), ("Sample", 0, (3, 3)), ("Sample", 1, (3, 3))]


class Interrupt:
    """A hook that raises KeyboardInterrupt at one of its calls."""

    def __init__(self, at: int) -> None:
        self.calls, self.at = 0, at

    def __call__(self, *args) -> None:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt


def test_an_interrupt_keeps_the_draws_and_a_new_run_is_whole():
    mcmc = mcmc_of(sghmc(), 10, 3, num_chains=2, hook_fn=Interrupt(at=3 + 4))
    with pytest.warns(RuntimeWarning, match="interrupted: 4 of 10 draws are kept"):
        mcmc.run(*DATA)
    assert mcmc.get_samples(group_by_chain=True)["weight"].shape == (2, 4, 3)
    assert mcmc.sample_stats["energy"].shape == (2, 4)
    assert mcmc.num_samples == 4
    mcmc.run(*DATA)
    assert mcmc.get_samples(group_by_chain=True)["weight"].shape == (2, 10, 3)


@pytest.mark.parametrize("at", [8 + 2, 8 + 6], ids=["in_warmup", "after_warmup"])
def test_an_interrupt_keeps_finished_sequential_chains(at):
    """Eight calls a chain: the second of three is cut short."""
    mcmc = mcmc_of(sghmc(), 5, 3, num_chains=3, hook_fn=Interrupt(at), chain_method="sequential")
    with pytest.warns(RuntimeWarning, match="interrupted: 1 of 3 chains are complete"):
        mcmc.run(*DATA)
    assert mcmc.get_samples(group_by_chain=True)["weight"].shape == (1, 5, 3)
    mcmc.run(*DATA)
    assert mcmc.get_samples(group_by_chain=True)["weight"].shape == (3, 5, 3)


def test_an_interrupt_in_warmup_is_an_interrupt():
    mcmc = mcmc_of(sghmc(), 5, 3, hook_fn=Interrupt(at=2))
    with pytest.raises(KeyboardInterrupt):
        mcmc.run(*DATA)
    with pytest.raises(RuntimeError, match=r"no draws yet: call run"):
        mcmc.get_samples()


def test_run_twice_starts_again():
    mcmc = mcmc_of(sghmc(), 5, num_chains=2)
    runs = []
    for _ in range(2):
        pyro.set_rng_seed(4)
        mcmc.run(*DATA)
        runs.append(mcmc.get_samples()["weight"])
    assert torch.equal(*runs)


@pytest.mark.parametrize("ask", ["get_samples", "diagnostics", "summary"])
def test_nothing_to_tell_before_run(ask):
    mcmc = mcmc_of(sghmc(), 5)
    with pytest.raises(RuntimeError, match=r"no draws yet: call run\(\.\.\.\) first"):
        getattr(mcmc, ask)()
    with pytest.raises(RuntimeError, match="no draws yet"):
        _ = mcmc.sample_stats


def net(x, y):
    """A regression net of 41 weights."""
    inner = pyro.sample("inner", dist.Normal(torch.zeros(3, 8), 1.0).to_event(2))
    outer = pyro.sample("outer", dist.Normal(torch.zeros(8), 1.0).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=8) as index:
        pyro.sample("y", dist.Normal(torch.tanh(x[index] @ inner) @ outer, 0.3), obs=y[index])


def test_many_chains_of_a_net():
    mcmc = mcmc_of(sghmc(net), 6, 2, num_chains=64)
    mcmc.run(*DATA)
    draws = mcmc.get_samples(group_by_chain=True)
    assert draws["inner"].shape == (64, 6, 3, 8)
    assert len(torch.unique(draws["outer"][:, -1, 0])) == 64
    assert list(mcmc.diagnostics()["divergences"]) == [f"chain {i}" for i in range(64)]


def test_chains_keep_their_labels_in_arviz():
    """Twelve chains, each at its own number; "chain 10" sorts before "chain 2"."""
    if not hasattr(az, "from_pyro"):
        pytest.skip("ArviZ 1.x has no from_pyro")
    initial = {"b": torch.arange(12.0)[:, None].expand(12, 2), "a": torch.zeros(12, 3)}
    mcmc = mcmc_of(sghmc(flat, step_size=1e-9, temperature=0.0), 13, 0, initial_params=initial, num_chains=12)
    mcmc.run()
    b = az.from_pyro(mcmc, log_likelihood=False).posterior["b"].values[:, 0, 0]
    assert b.round().tolist() == list(range(12))


def rows_of(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("rows", 32, subsample_size=len(x)):
        pyro.sample("y", dist.Normal(x @ weight, 0.3), obs=y)


BATCHES = {
    "loader": lambda: DataLoader(TensorDataset(*DATA), batch_size=8, shuffle=True),
    "list": lambda: list(zip(DATA[0].split(8), DATA[1].split(8), strict=True)),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches(kind):
    """The least-squares solution is found from batches of eight rows, by each chain."""
    kernel = sghmc(rows_of, batches=BATCHES[kind](), step_size=0.01, friction=10.0)
    mcmc = mcmc_of(kernel, 300, 100, num_chains=4)
    mcmc.run()
    x, y = DATA
    expected = torch.linalg.solve(x.T @ x / 0.09 + torch.eye(3), x.T @ y / 0.09)
    mean = mcmc.get_samples(group_by_chain=True)["weight"].mean(1)
    torch.testing.assert_close(mean, expected.expand(4, 3), atol=0.1, rtol=0)


def augmented(x, y):
    """Noise that the model draws itself."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("y", dist.Normal((x + 0.1 * torch.randn_like(x)) @ weight, 0.3).to_event(1), obs=y)


def test_noise_in_the_model_is_fresh_for_every_step_and_chain():
    start = {"weight": torch.tensor([[1.0, -1.0, 0.5]]).expand(3, 3)}
    mcmc = mcmc_of(SGLD(augmented, step_size=1e-12, temperature=0.0, compile="fx"), 5, 0, start, num_chains=3)
    mcmc.run(*DATA)
    assert len(mcmc.sample_stats["energy"].unique()) == 15


def test_minibatches_differ_between_steps_and_chains():
    start = {"weight": torch.zeros(3, 3), "a_scale": torch.zeros(3)}
    mcmc = mcmc_of(sghmc(step_size=1e-9, temperature=0.0), 4, 0, start, num_chains=3)
    mcmc.run(*DATA)
    assert len(mcmc.sample_stats["gradient_norm"].unique()) == 12


@pytest.mark.parametrize("num_chains", [1, 2])
def test_pyros_nuts_runs(num_chains, monkeypatch):
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 1)
    pyro.set_rng_seed(0)
    mcmc = mcmc_of(NUTS(flat), 60, 40, num_chains=num_chains)
    mcmc.run()
    draws = mcmc.get_samples(group_by_chain=True)["a"]
    assert draws.shape == (num_chains, 60, 3)
    assert draws.std() == pytest.approx(1.0, abs=0.5)
    assert list(mcmc.diagnostics()["divergences"]) == [f"chain {i}" for i in range(num_chains)]
    mcmc.summary()
    if hasattr(az, "from_pyro"):
        assert az.from_pyro(mcmc, log_likelihood=False).posterior["a"].shape == (num_chains, 60, 3)
    mcmc.run()


def test_progress_bar_shows_energy_temperature_and_step_size(capsys, monkeypatch):
    ticks = iter(range(1_000_000))
    monkeypatch.setattr("bnn.kernels.mcmc.time.monotonic", lambda: float(next(ticks)))
    MCMC(sghmc(), 10, 2).run(*DATA)
    shown = capsys.readouterr().err
    for word in ("Warmup", "Sample", "energy", "temperature", "step size=5.00e-03", "12/12"):
        assert word in shown


def test_summary(capsys):
    mcmc = mcmc_of(sghmc(temperature=0.5), 20, 5, num_chains=2)
    mcmc.run(*DATA)
    mcmc.summary()
    text = capsys.readouterr().out
    for word in (
        "a_scale",
        "weight[0]",
        "r_hat",
        "Temperature: asked 0.5; kinetic",
        "configurational",
        "divergences: 0",
    ):
        assert word in text


def test_diagnostics_of_a_large_net_cost_nothing(capsys):
    def large():
        pyro.sample("small", dist.Normal(0.0, 1.0))
        pyro.sample("weight", dist.Normal(torch.zeros(200_000), 1.0).to_event(1))

    mcmc = mcmc_of(SGLD(large, step_size=0.1, compile="fx"), 20, 0, num_chains=2)
    mcmc.run()
    start = time.perf_counter()
    diagnostics = mcmc.diagnostics()
    mcmc.summary()
    assert time.perf_counter() - start < 5.0  # by Pyro's own: 200,000 effective sample sizes, about ten seconds
    assert "small" in diagnostics and "weight" not in diagnostics
    assert "weight: 200000 numbers, not listed" in capsys.readouterr().out


@pytest.mark.parametrize("num_samples", [1, 3])
def test_few_draws_are_reported_too(num_samples):
    """Pyro's own diagnostics need four."""
    mcmc = mcmc_of(sghmc(), num_samples, 0, num_chains=2)
    mcmc.run(*DATA)
    assert set(mcmc.diagnostics()) >= {"divergences", "temperature asked"}
    mcmc.summary()
