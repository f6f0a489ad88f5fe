"""Corrected kernels are exact at any step size: chains that start in the law stay in it where others leave it."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import HMC
from scipy import integrate, stats

from bnn.kernels import AMAGOLD, GGMC, MCMC, SGHMC, Constant
from bnn.kernels._corrected import chances
from support import targets
from support.checks import ALPHA, assert_variance

N = 100_000


def quartic(like: torch.Tensor) -> None:
    """U = ¼ z⁴, one scalar per chain."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.factor("quartic", -0.25 * z.to(like).pow(4))


def quartic_law(temperature: float):
    """|z|⁴ / 4T is Gamma(¼)."""
    return lambda z: 0.5 + 0.5 * np.sign(z) * stats.gamma.cdf(np.abs(z) ** 4 / (4 * temperature), 0.25)


def exact_start(temperature: float) -> torch.Tensor:
    random = np.random.default_rng(2)
    size = (4 * temperature * random.gamma(0.25, size=N)) ** 0.25
    return torch.tensor(size * random.choice([-1.0, 1.0], size=N))


def stepped(kernel, start: torch.Tensor, draws: int, *args):
    torch.manual_seed(7)
    kernel.num_chains, kernel.initial_params = N, {"z": start}
    with targets.starts_unchecked():
        kernel.setup(0, *args)
        for _ in range(draws):
            kernel.advance()
    return kernel._running


def p_value(position: torch.Tensor, law) -> float:
    return float(stats.kstest(position.flatten().numpy(), law).pvalue)


PROPOSALS = [
    {"friction": 0.7, "num_steps": 1},
    {"friction": 0.7, "num_steps": 3, "mass": 2.0},
    {"friction": None, "num_steps": 4},
    {"friction": 0.0, "num_steps": 2},
]


@pytest.mark.parametrize("temperature", [1.0, 0.2])
@pytest.mark.parametrize("settings", PROPOSALS, ids=str)
@pytest.mark.parametrize("kernel", [GGMC, AMAGOLD])
def test_exact_at_a_large_step(kernel, settings, temperature):
    like, h = torch.ones(1, dtype=torch.float64), 0.9 * settings.get("mass", 1.0) ** 0.5 / temperature**0.25
    one = kernel(quartic, step_size=h, temperature=temperature, compile="fx", **settings)
    run = stepped(one, exact_start(temperature), 12, like)
    assert p_value(run.state.position, quartic_law(temperature)) > ALPHA
    assert_variance("momentum", run.state.momentum.numpy(), temperature * settings.get("mass", 1.0))
    accepted = float(run.state.acceptance.mean())
    assert 0.3 < accepted < 0.95  # the test has something to refuse


def rounded(like: torch.Tensor) -> None:
    """U = 4 √(1 + z²), whose curvature stays below 4: stable, and biased, for a step up to 1."""
    z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real, (), ()))
    pyro.factor("rounded", -4.0 * (1.0 + z.to(like).square()).sqrt())


def rounded_law():
    """The distribution function and N exact draws, by quadrature."""
    z = np.linspace(-12, 12, 200_001)
    mass = integrate.cumulative_trapezoid(np.exp(4 - 4 * np.sqrt(1 + z**2)), z, initial=0.0)
    mass /= mass[-1]
    start = np.interp(np.random.default_rng(2).uniform(size=N), mass, z)
    return lambda x: np.interp(x, z, mass), torch.tensor(start)


def test_without_the_test_the_law_is_visibly_another():
    like, (law, start) = torch.ones(1, dtype=torch.float64), rounded_law()
    for integrator in ("obabo", "bbaoa"):
        kernel = SGHMC(rounded, step_size=0.9, friction=2.0, integrator=integrator, compile="fx")
        assert p_value(stepped(kernel, start, 30, like).state.position, law) < 1e-12
    for corrected in (GGMC, AMAGOLD):
        kernel = corrected(rounded, step_size=0.9, friction=2.0, num_steps=2, compile="fx")
        assert p_value(stepped(kernel, start, 30, like).state.position, law) > ALPHA


@pytest.mark.parametrize("settings", [{"friction": 3.0, "num_steps": 1}, {"friction": None, "num_steps": 3}], ids=str)
def test_amagold_is_exact_under_minibatch_noise(settings):
    """Noise that nearly doubles the variance of SGHMC's draws."""
    curvature, h = 4.0, 0.3
    noise = 2 * 3.0 / h
    rows = targets.rows_for(noise, curvature)
    start = torch.randn(N, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / curvature**0.5
    plain = SGHMC(targets.noisy_gaussian, step_size=h, friction=3.0, replacement=True, compile="fx")
    assert float(stepped(plain, start, 30, rows, curvature).state.position.var()) > 1.5 / curvature
    kernel = AMAGOLD(targets.noisy_gaussian, step_size=h, compile="fx", **settings)
    run = stepped(kernel, start, 20, rows, curvature)
    assert_variance("position", run.state.position.numpy(), 1 / curvature)
    assert_variance("momentum", run.state.momentum.numpy(), 1.0)
    assert 0.2 < float(run.state.acceptance.mean()) < 0.9


@pytest.mark.parametrize("kernel, settings", [(GGMC, {}), (AMAGOLD, {})], ids=["ggmc", "amagold"])
def test_acceptance_tends_to_one(kernel, settings):
    like = torch.ones(1, dtype=torch.float64)
    for h, worst in ((0.1, 1e-2), (0.01, 1e-4)):
        run = stepped(kernel(quartic, step_size=h, friction=1.0, num_steps=3, compile="fx"), exact_start(1.0), 1, like)
        assert 1.0 - float(run.state.acceptance.mean()) < worst


@pytest.mark.parametrize("slack", [0.0, -0.1])
def test_chances(slack):
    """min(1, exp(−ΔH/T)), early in warm-up 1 where ΔH is below a tenth of the fall of U; 0 for what is not finite."""
    fall = torch.tensor([[3.0], [-3.0], [0.0], [40.0], [40.0], [-40.0], [np.nan], [-np.inf]], dtype=torch.float64)
    gain = torch.tensor([[-0.5], [-0.05], [0.7], [-3.9], [-4.1], [-4.1], [np.nan], [-np.inf]], dtype=torch.float64)
    start, inverse_temperature = torch.full_like(fall, 7.0), torch.tensor(2.0).double()
    change = torch.nan_to_num(gain - fall)
    found = chances(start, start - fall, change, torch.tensor(slack).double(), inverse_temperature).flatten()
    expected = np.exp(np.minimum([-1.0, -0.1, 0.0, -7.8, -8.2, -8.2, -np.inf, -np.inf], 0.0))
    expected[3] = 1.0 if slack else expected[3]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("kernel, adapts, last", [(GGMC, False, 10), (AMAGOLD, False, 10), (GGMC, True, 10)])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_test_holds_from_the_middle_of_warm_up(kernel, adapts, last, num_steps):
    step_size = "auto" if adapts else 0.1
    one = kernel(targets.gaussian, step_size=step_size, friction=1.0, num_steps=num_steps, compile="fx")
    one.setup(20, torch.ones(3))
    slack = []
    for _ in range(22):
        one.advance()
        slack.append(float(one._running.numbers_at(0)[-3]))
    assert slack == pytest.approx([-0.1] * (last - 1) + [0.0] * (23 - last))


def test_refused_proposals_come_back_with_the_momentum_turned_round():
    like = torch.ones(1, dtype=torch.float64)
    for kernel in (GGMC, AMAGOLD):
        one = kernel(quartic, step_size=5.0, friction=0.0, num_steps=3, compile="fx")
        start = exact_start(1.0).float()
        run = stepped(one, start, 0, like)
        momentum = run.state.momentum.clone()
        one.advance()
        refused = (run.state.acceptance < 1e-12).flatten()
        assert refused.float().mean() > 0.1
        assert torch.equal(run.state.position.flatten()[refused], start[refused])
        torch.testing.assert_close(run.state.momentum[refused], -momentum[refused])
        stats_row = dict(zip(run.stat_names, run.last_stats.unbind(-1), strict=True))
        torch.testing.assert_close(stats_row["energy"].float()[refused], 0.25 * start[refused] ** 4)


def test_hmc_is_pyros():
    """The same trajectory from the same momentum: leapfrog, energies and the test's ratio."""
    x, y = targets.regression_data(torch.float64)
    h, steps = 0.05, 4
    kernel = GGMC(targets.full_regression, step_size=h, friction=None, num_steps=steps, compile="fx")
    kernel.num_chains = 1
    kernel.initial_params = {"weight": torch.tensor([[0.3, -0.2, 0.1]]), "a_scale": torch.tensor([0.2])}
    kernel.setup(0, x, y)
    run = kernel._running
    start = run.potential.unflatten(run.state.position)
    torch.manual_seed(11)
    noise = torch.empty(1, 1, run.potential.dim, dtype=torch.float64).normal_()[0, 0]
    pyros = HMC(targets.full_regression, step_size=h, num_steps=steps, adapt_step_size=False, adapt_mass_matrix=False)
    pyros.setup(0, x, y)
    names = list(run.potential.sites)
    momenta = {n: v[0] for n, v in run.potential.unflatten(noise.unsqueeze(0)).items()}
    from pyro.ops.integrator import velocity_verlet

    z, r, _, energy = velocity_verlet(
        {n: start[n][0].clone() for n in names}, momenta, pyros.potential_fn, lambda r: dict(r), h, steps
    )
    torch.manual_seed(11)
    kernel.advance()
    after = run.potential.unflatten(run.state.position)
    before = pyros.potential_fn({n: start[n][0] for n in names})
    kinetic = [0.5 * sum(v.square().sum() for v in one.values()) for one in (momenta, r)]
    expected = torch.exp(before + kinetic[0] - energy - kinetic[1]).clamp(max=1.0)
    torch.testing.assert_close(run.state.acceptance[0, 0], expected.detach(), rtol=1e-9, atol=1e-12)
    for name in names:
        torch.testing.assert_close(after[name][0], z[name].detach(), rtol=1e-9, atol=1e-12)


def test_a_proposal_that_leaves_the_finite_numbers_is_refused():
    """U = ¼ z⁴ overflows in float32 far out: the chains go on from where they were."""
    kernel = GGMC(quartic, step_size=50.0, friction=1.0, num_steps=3, compile="fx")
    mcmc = MCMC(kernel, num_samples=20, warmup_steps=0, num_chains=4, disable_progbar=True)
    mcmc.run(torch.ones(1))
    assert torch.isfinite(mcmc.get_samples()["z"]).all()
    assert not mcmc.sample_stats["diverging"].any() and (mcmc.sample_stats["acceptance_rate"] < 0.5).any()


@pytest.mark.parametrize("kernel", [GGMC, AMAGOLD])
def test_chains_from_far_away_arrive_in_warm_up(kernel):
    """Thirty standard deviations out the test would refuse nearly all: it holds in the second half of warm-up."""
    y = torch.full((100,), 2.0)

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    one = kernel(model, step_size=0.03, friction=5.0, num_steps=5, compile="fx")
    start = {"mean": torch.tensor([-1.0, 5.0])}
    mcmc = MCMC(one, num_samples=400, warmup_steps=100, num_chains=2, initial_params=start, disable_progbar=True)
    mcmc.run(y)
    draws = mcmc.get_samples(group_by_chain=True)["mean"]
    assert ((draws.mean(1) - 200 / 101).abs() < 0.05).all()
    assert (draws.diff(dim=1) == 0).any()  # refusals, after warm-up


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"num_steps": 0}, "num_steps is 0"),
        ({"step_size": Constant(0.1)}, "step_size is a Schedule"),
        ({"friction": Constant(0.1)}, "friction is a Schedule"),
        ({"temperature": 0.0}, "temperature is 0"),
        ({"mass": -1.0}, "mass holds -1"),
    ],
)
@pytest.mark.parametrize("kernel", [GGMC, AMAGOLD])
def test_bad_settings(kernel, settings, message):
    with pytest.raises(ValueError, match=message):
        one = kernel(targets.gaussian, **{"step_size": 0.1, "friction": 1.0, "compile": "fx", **settings})
        one.setup(0, torch.ones(3))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"replacement": False}, "drawn independently"),
        ({"batches": [(torch.ones(3),)]}, "batches= fixes the order"),
    ],
)
def test_minibatches_in_an_order_of_their_own_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        AMAGOLD(targets.gaussian, step_size=0.1, friction=1.0, **settings)


def test_models_that_have_no_energy_to_test():
    def noisy(x):
        z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        pyro.factor("noise", torch.nn.functional.dropout(z * x, 0.5).sum())

    for kernel in (GGMC, AMAGOLD):
        with pytest.raises(ValueError, match="random numbers of its own"):
            kernel(noisy, step_size=0.1, friction=1.0, compile="fx").setup(0, torch.ones(3))
