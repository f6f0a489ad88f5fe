"""A chain that leaves the finite numbers stops, keeps its draws and says why; the others go on as if nothing were."""

import warnings

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn.kernels import MCMC, SGHMC, SGLD


def model() -> None:
    """A quartic well: gradient steps from far out overshoot without bound."""
    pyro.sample("calm", dist.Normal(0.0, 1.0))
    steep = pyro.sample("steep", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.factor("quartic", -0.25 * steep.pow(4).sum())


def fuse() -> None:
    """A potential that is linear until ``z`` passes 1 and infinite from there on."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.factor("fuse", torch.where(z > 1.0, torch.log(1.0 - z), z))


def starts(*steep: float) -> dict[str, torch.Tensor]:
    return {"calm": torch.zeros(len(steep)), "steep": torch.tensor(steep)[:, None].expand(-1, 2).clone()}


def kernels():
    return [
        pytest.param(lambda: SGLD(model, step_size=0.1, compile="fx"), id="sgld"),
        pytest.param(lambda: SGHMC(model, step_size=0.3, friction=1.0, compile="fx"), id="bbaoa"),
        pytest.param(
            lambda: SGHMC(model, step_size=0.3, friction=1.0, integrator="obabo", compile="fx"),
            id="obabo",
        ),
        pytest.param(lambda: SGLD(model, step_size=0.1, steps_per_sample=3, compile="fx"), id="several_steps"),
    ]


def run(build, initial, method="vectorized", num_samples=8, warmup=0, **options) -> MCMC:
    pyro.set_rng_seed(2)
    chains = len(initial["calm"])
    mcmc = MCMC(build(), num_samples, warmup, initial, chains, chain_method=method, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize("build", kernels())
def test_one_chain_stops_and_the_others_go_on(build):
    """Bit for bit what they are beside a chain that does not diverge."""
    calm = run(build, starts(0.5, 0.2, -0.5))
    with pytest.warns(RuntimeWarning) as caught:
        mcmc = run(build, starts(0.5, 1e4, -0.5))
    warning = caught[0]
    message = str(warning.message)
    for words in ("chain 1 ", "step ", "'steep'", "smaller step_size", "diverging"):
        assert words in message
    draws, expected = mcmc.get_samples(group_by_chain=True), calm.get_samples(group_by_chain=True)
    for name in draws:
        assert torch.isfinite(draws[name]).all()
        assert torch.equal(draws[name][[0, 2]], expected[name][[0, 2]])
    diverging = mcmc.sample_stats["diverging"]
    assert not diverging[[0, 2]].any()
    first = int(diverging[1].int().argmax())
    assert diverging[1, first:].all() and not diverging[1, :first].any() and diverging[1].any()
    assert mcmc.diagnostics()["divergences"] == {"chain 0": [], "chain 1": list(range(first, 8)), "chain 2": []}
    stopped = draws["steep"][1, first:]
    assert (stopped == stopped[0]).all()
    if first:
        assert torch.equal(draws["steep"][1, first], draws["steep"][1, first - 1])
        assert (draws["steep"][1, :first].diff(dim=0) != 0).all()
    if hasattr(az, "from_pyro"):
        idata = az.from_pyro(mcmc, log_likelihood=False)
        assert (idata.sample_stats["diverging"].values == diverging.numpy()).all()
    for value in mcmc.sample_stats.values():
        assert torch.isfinite(value[[0, 2]].double()).all()


def test_the_draws_before_are_kept():
    """Downhill at a steady speed, z reaches 1 at a known step and is stopped there."""
    kernel = SGLD(fuse, step_size=0.1, temperature=0.0, compile="fx")
    initial = {"z": torch.tensor([0.05, -5.0])}
    mcmc = MCMC(kernel, 14, 2, initial_params=initial, num_chains=2, disable_progbar=True)
    with pytest.warns(
        RuntimeWarning, match=r"chain 0 .*step 11 at site 'z' .of largest values, up to 3.*Its 8 draws so far are kept"
    ):
        mcmc.run()
    z = mcmc.get_samples(group_by_chain=True)["z"]
    torch.testing.assert_close(z[0, :8], 0.05 + 0.1 * torch.arange(3.0, 11.0))
    torch.testing.assert_close(z[1], -5.0 + 0.1 * torch.arange(3.0, 17.0))
    assert mcmc.sample_stats["diverging"][0].tolist() == [False] * 8 + [True] * 6


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_all_chains_stop_in_warmup(method):
    build = lambda: SGLD(model, step_size=0.1, compile="fx")  # noqa: E731
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(RuntimeError, match="all chains left the finite numbers before.*smaller step_size"):
            run(build, starts(1e4, -1e4), method, warmup=20)


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_one_chain_stops_in_warmup(method):
    build = lambda: SGLD(model, step_size=0.1, compile="fx")  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"chain \d left the finite numbers.*Its 0 draws so far"):
        mcmc = run(build, starts(1e4, 0.5), method, warmup=20)
    assert mcmc.sample_stats["diverging"].tolist() == [[True] * 8, [False] * 8]
    draws = mcmc.get_samples(group_by_chain=True)["steep"]
    assert draws.shape == (2, 8, 2) and torch.isfinite(draws).all()
    assert (draws[1].diff(dim=0) != 0).all()


def test_all_chains_stop_after_some_draws():
    kernel = SGLD(fuse, step_size=0.1, temperature=0.0, compile="fx")
    initial = {"z": torch.tensor([0.05, 0.25])}
    mcmc = MCMC(kernel, 14, 2, initial_params=initial, num_chains=2, disable_progbar=True)
    with pytest.warns(RuntimeWarning) as caught:
        mcmc.run()
    messages = [str(w.message) for w in caught]
    assert any("all chains stopped" in m and "of 14 draws are kept" in m for m in messages)
    assert mcmc.num_samples == 9
    assert mcmc.sample_stats["diverging"].sum(1).tolist() == [1, 3]
    torch.testing.assert_close(mcmc.get_samples(group_by_chain=True)["z"][1, :6], 0.25 + 0.1 * torch.arange(3.0, 9.0))


def test_under_pyros_runner():
    from pyro.infer import MCMC as PyroMCMC

    kernel = SGLD(fuse, step_size=0.1, temperature=0.0, compile="fx")
    mcmc = PyroMCMC(kernel, 14, 2, initial_params={"z": torch.tensor(0.05)}, disable_progbar=True)
    with pytest.warns(RuntimeWarning, match="chain 0 left the finite numbers by step 11"):
        mcmc.run()
    assert mcmc.diagnostics()["divergences"] == {"chain 0": list(range(8, 14))}
    torch.testing.assert_close(mcmc.get_samples()["z"][:8], 0.05 + 0.1 * torch.arange(3.0, 11.0))


def test_temperature_is_reported_without_the_stopped_draws(capsys):
    build = lambda: SGLD(model, step_size=0.1, compile="fx")  # noqa: E731
    with pytest.warns(RuntimeWarning):
        mcmc = run(build, starts(1e4, 0.5), num_samples=50, warmup=10)
    mcmc.summary()
    text = capsys.readouterr().out
    assert "divergences: 50" in text
    measured = float(text.split("configurational ")[1].split()[0])
    assert 0.1 < measured < 5.0
