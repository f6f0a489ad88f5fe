"""Equipartition among sites, and effective sample sizes by their cost."""

import math
from types import SimpleNamespace

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import MCMC as PyroMCMC
from pyro.infer import NUTS
from scipy import stats

from bnn import Potential, efficiency, equipartition, to_arviz
from bnn.kernels import GGMC, MCMC, SGHMC, SGLD
from support.checks import ALPHA

SHAPES = [(4, 3), (5, 4), (1, 5)]
SCALES = [1.0, 0.7, 1.5]


def homogeneous(x, y):
    """A net of three ReLU layers without biases."""
    out = x
    for number, (shape, scale) in enumerate(zip(SHAPES, SCALES, strict=True)):
        prior = dist.Normal(torch.zeros(shape, dtype=x.dtype), scale).to_event(2)
        out = F.linear(out, pyro.sample(f"layer{number}", prior))
        out = torch.relu(out) if number < 2 else out
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(out.squeeze(-1), 0.5), obs=y)


def net_data():
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    return x, x[:, 0].relu() - 0.5 * x[:, 1]


def test_layers_of_a_homogeneous_net_share_one_virial():
    """zₗᵀ∇ₗL is the same number for every layer, at every position."""
    potential = Potential(homogeneous, *net_data(), compile="fx")
    z = torch.randn(7, potential.dim, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    grad = potential.energy_and_grad(z)[1]
    virials = []
    for site in potential.sites.values():
        own, scale = z[:, site.slice], site.normal[1]
        virials.append((own * (grad[:, site.slice] - own / scale**2)).sum(-1))
    assert abs(virials[0]).min() > 0.1
    for virial in virials[1:]:
        torch.testing.assert_close(virial, virials[0], rtol=1e-9, atol=1e-9)


def test_layers_of_a_homogeneous_net_have_one_excess():
    """In mean, over 100 exact chains: the excess is far from zero, and differs between no two layers."""
    pyro.set_rng_seed(1)
    kernel = GGMC(homogeneous, step_size=0.05, friction=None, num_steps=10, compile="fx")
    mcmc = MCMC(kernel, 40, 150, num_chains=100, disable_progbar=True)
    mcmc.run(*net_data())
    found = equipartition(mcmc)
    assert (found.size == [12, 20, 5]).all()
    draws = mcmc.get_samples(group_by_chain=True)
    excess = []  # of each chain, which are independent
    for number, scale in enumerate(SCALES):
        norms = (draws[f"layer{number}"].numpy() / scale) ** 2
        excess.append(norms.sum((2, 3)).mean(1) - norms[0, 0].size)
    np.testing.assert_allclose(found.norm_excess, np.mean(excess, 1))
    assert abs(stats.ttest_1samp(excess[0], 0.0).pvalue) < ALPHA
    for other in excess[1:]:
        assert stats.ttest_rel(excess[0], other).pvalue > ALPHA
    for kind in ("kinetic_temperature", "configurational_temperature"):
        assert (abs(found[kind] - 1) < 6 * found[f"{kind}_error"]).all()
    errors = np.std(excess, axis=1) / 10
    assert ((found.norm_excess_error > 0.4 * errors) & (found.norm_excess_error < 2.5 * errors)).all()


def direction_only(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(6, dtype=x.dtype), 2.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ (weight / weight.norm()), 0.5), obs=y)


def test_norm_of_a_scale_invariant_layer():
    """|z|²/(ηT) is χ² of d degrees of freedom, whatever the data say of the direction: 1,500 chains, one draw each."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(30, 6, generator=generator, dtype=torch.float64)
    pyro.set_rng_seed(2)
    kernel = GGMC(direction_only, step_size=0.15, friction=None, num_steps=8, temperature=0.5, compile="fx")
    mcmc = MCMC(kernel, 1, 60, num_chains=1500, disable_progbar=True)
    mcmc.run(x, x[:, 0])
    norms = mcmc.get_samples()["weight"].square().sum(-1).numpy() / (4.0 * 0.5)
    assert stats.kstest(norms, stats.chi2(6).cdf).pvalue > ALPHA
    assert mcmc.sample_stats["acceptance_rate"].mean() > 0.5


def two_priors():
    pyro.sample("a", dist.Normal(torch.ones(4), 2.0).to_event(1))
    pyro.sample("b", dist.Gamma(2.0, 1.0))


def ran(kernel, draws=20, chains=3, **options):
    pyro.set_rng_seed(0)
    mcmc = MCMC(kernel, draws, 5, num_chains=chains, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


def test_equipartition_of_a_run(tmp_path):
    """The excess by its definition; none where the prior is not Normal; a stored run gives the same."""
    mcmc = ran(SGHMC(two_priors, step_size=0.1, friction=1.0, temperature=0.5, compile="fx"))
    found = equipartition(mcmc)
    scaled = (mcmc.get_samples()["a"].double().numpy() - 1.0) / 2.0
    assert found.norm_excess[0] == pytest.approx((scaled**2).sum(-1).mean() - 4 * 0.5)
    assert np.isnan(found.norm_excess[1]) and np.isnan(found.norm_excess_error[1])
    means = mcmc.sample_stats["site_configurational_temperature"].double().mean((0, 1))
    np.testing.assert_allclose(found.configurational_temperature, means, rtol=1e-5)
    data = to_arviz(mcmc)
    data.to_netcdf(str(tmp_path / "run.nc"))
    for kept in (data, az.from_netcdf(str(tmp_path / "run.nc"))):
        assert equipartition(kept).equals(found)
        assert efficiency(kept).equals(efficiency(mcmc))


def test_equipartition_leaves_out_what_is_not_known():
    found = equipartition(ran(SGLD(two_priors, step_size=0.1, compile="fx"), save_params=["b"]))
    assert "kinetic_temperature" not in found and np.isnan(found.norm_excess).all()
    nuts = PyroMCMC(NUTS(two_priors), num_samples=4, warmup_steps=2, disable_progbar=True)
    nuts.run()
    with pytest.raises(ValueError, match="run is MCMC; give a finished run of bnn.kernels.MCMC"):
        equipartition(nuts)
    ours = MCMC(NUTS(two_priors), num_samples=4, warmup_steps=2, disable_progbar=True)
    ours.run()
    with pytest.raises(ValueError, match="sites of the run are not known"):
        equipartition(ours)
    with pytest.raises(ValueError, match="did not count its gradients"):
        efficiency(ours)


@pytest.mark.parametrize("chain_method", ["vectorized", "sequential"])
def test_efficiency(chain_method, capsys):
    """Gradients are counted, not those of warm-up; sizes are ArviZ's; seconds add up to no more than the run's."""
    kernel = SGHMC(two_priors, step_size=0.3, friction=1.0, steps_per_sample=4, compile="fx")
    mcmc = ran(kernel, draws=30, chains=3, chain_method=chain_method)
    found = efficiency(mcmc)
    assert found.attrs["gradient_evaluations"] == 30 * 4 * 3
    assert all(found.attrs[f"{part}_time"] > 0 for part in ("setup", "warmup", "sampling"))
    a = mcmc.get_samples(group_by_chain=True)["a"].double().numpy()
    smallest = min(float(az.ess(a[..., i])) for i in range(4))
    assert found.ess_bulk[0] == pytest.approx(smallest)
    np.testing.assert_allclose(found.ess_per_1000_gradients, found.ess_bulk / 0.36)
    np.testing.assert_allclose(found.ess_per_second * found.attrs["sampling_time"], found.ess_bulk)
    mcmc.summary()
    text = capsys.readouterr().out
    worst = found.site.values[np.argmin(found.ess_bulk.values)]
    assert f"Bulk ESS: {float(found.ess_bulk.min()):.3g} at least (site {str(worst)!r}), " in text
    assert "per 1,000 gradients" in text and "sampling" in text


def test_efficiency_of_a_large_site_and_of_few_draws(capsys):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(1000), 1.0).to_event(1))

    mcmc = ran(SGLD(model, step_size=0.1, compile="fx"), draws=10)
    z = mcmc.get_samples(group_by_chain=True)["z"].double().numpy()
    least = min(float(az.ess(z[..., i])) for i in np.linspace(0, 999, 200).astype(int))
    assert math.isclose(float(efficiency(mcmc).ess_bulk[0]), least)
    few = ran(SGLD(model, step_size=0.1, compile="fx"), draws=3)
    with pytest.raises(ValueError, match="fewer than four draws"):
        efficiency(few)
    few.summary()
    assert "Time: setup" in capsys.readouterr().out


def test_run_facts_need_a_run():
    mcmc = MCMC(SGLD(two_priors, step_size=0.1), 4, disable_progbar=True)
    with pytest.raises(RuntimeError, match=r"call run\(...\) first"):
        equipartition(mcmc)
    unknown = SimpleNamespace(run_facts={}, sample_stats={}, get_samples=lambda group_by_chain: {})
    with pytest.raises(ValueError, match="not known"):
        equipartition(unknown)
