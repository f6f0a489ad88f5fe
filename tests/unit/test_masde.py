"""The general recipe: the named kernels are special cases of it, and state-dependent fields keep their law."""

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from bnn.kernels import MCMC, SGLD, MaSDE
from bnn.kernels.masde import drift
from support import targets
from support.checks import ALPHA, assert_covariance
from support.laws import Setting

N = 100_000


def hamiltonian(friction: float):
    """D and Q of SGHMC with unit mass."""

    def diffusion(x: torch.Tensor) -> torch.Tensor:
        half = len(x) // 2
        return torch.cat([x.new_zeros(half), x.new_full((half,), friction)])

    def curl(x: torch.Tensor) -> torch.Tensor:
        unit = torch.eye(len(x) // 2, dtype=x.dtype)
        return torch.cat([torch.cat([0 * unit, -unit], 1), torch.cat([unit, 0 * unit], 1)])

    return diffusion, curl


def test_sgld_is_a_special_case_bit_for_bit_up_to_rounding():
    draws = []
    for kernel in (
        SGLD(targets.gaussian, step_size=0.1, temperature=0.5, compile="fx"),
        MaSDE(targets.gaussian, step_size=0.1, temperature=0.5, compile="fx", diffusion=torch.ones_like),
    ):
        torch.manual_seed(0)
        mcmc = MCMC(kernel, num_samples=20, num_chains=3, disable_progbar=True)
        mcmc.run(torch.tensor([1.0, 4.0]))
        draws.append(mcmc.get_samples()["z"])
    torch.testing.assert_close(*draws)


@pytest.mark.slow
def test_sghmc_has_the_exact_law_of_its_euler_scheme():
    """Both updates from the old state: with c = 1 − hC and H = h²k, hotter than T by O(h)."""
    temperature = 0.3
    s = Setting(4.0, 0.1, temperature, friction=3.0)
    diffusion, curl = hamiltonian(s.friction)
    kernel = MaSDE(
        targets.noisy_gaussian, step_size=s.step_size, diffusion=diffusion, curl=curl, auxiliary=lambda dim: dim,
        temperature=temperature, compile="fx", steps_per_sample=30,
    )  # fmt: skip
    kernel.num_chains, kernel.initial_params = N, {"z": torch.zeros(N, dtype=torch.float64)}
    with targets.starts_unchecked():
        kernel.setup(0, targets.rows_for(0.0, s.curvature), s.curvature)
        kernel.advance()
    c, H = 1 - s.step_size * s.friction, s.step_size**2 * s.curvature
    momentum = 2 * (1 - c) * temperature / (1 - c**2 - H * (1 + 3 * c + H) / 2)
    step = np.array([[1, s.step_size], [-s.step_size * s.curvature, c]])
    covariances = [np.zeros((2, 2))]
    for _ in range(200):
        fresh = np.diag([0, 2 * s.step_size * s.friction * temperature])
        covariances.append(step @ covariances[-1] @ step.T + fresh)
    assert covariances[-1][1, 1] == pytest.approx(momentum, rel=1e-9)
    state = kernel._running.state
    sample = np.stack([state.position.flatten().numpy(), state.auxiliary.flatten().numpy()], 1)
    assert_covariance(["position", "momentum"], sample, covariances[30])


def test_sgnht_is_a_special_case():
    """The drift of Ding et al. (2014) at random points, Γ included; T scales as the recipe says."""
    d, noise, temperature = 3, 0.7, 0.6

    def diffusion(x):
        return torch.cat([x.new_zeros(d), x.new_full((d,), noise), x.new_zeros(1)])

    def curl(x):
        unit, zero, r = torch.eye(d, dtype=x.dtype), torch.zeros(d, d, dtype=x.dtype), x[d : 2 * d, None] / d
        rows = [[zero, -unit, 0 * r], [unit, zero, r], [0 * r.mT, -r.mT, x.new_zeros(1, 1)]]
        return torch.cat([torch.cat(row, 1) for row in rows])

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        x, force = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (2 * d + 1, d))
        r, xi = x[d : 2 * d], x[-1]
        grad = torch.cat([force, r, d * (xi - noise)[None]])
        expected = torch.cat([r, -force - xi * r, (r @ r / d - temperature)[None]])
        torch.testing.assert_close(drift(x, grad, diffusion, curl, temperature), expected)


def student(like: torch.Tensor) -> None:
    pyro.sample("z", dist.StudentT(torch.tensor(5.0, dtype=like.dtype), 0.0, 1.0))


@pytest.mark.parametrize("as_matrix", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_diffusion_that_depends_on_the_position_keeps_the_law(as_matrix, monkeypatch):
    """From exact draws of Student's t: with Γ they stay in it; without, they visibly do not."""
    n, nu = 100_000, 5.0
    start = torch.tensor(stats.t(nu).rvs(n, random_state=3))

    def field(z: torch.Tensor) -> torch.Tensor:
        scale = (1 + z.square() / nu).sqrt()
        return scale.diag() if as_matrix else scale

    def p_value() -> float:
        torch.manual_seed(4)
        kernel = MaSDE(student, step_size=2e-3, diffusion=field, compile="fx", steps_per_sample=400)
        kernel.num_chains, kernel.initial_params = n, {"z": start}
        with targets.starts_unchecked():
            kernel.setup(0, torch.ones(1, dtype=torch.float64))
            kernel.advance()
        return float(stats.kstest(kernel.position.flatten().numpy(), stats.t(nu).cdf).pvalue)

    assert p_value() > ALPHA
    monkeypatch.setattr("bnn.kernels.masde.varies", lambda field, x: False)
    assert p_value() < 1e-9


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"diffusion": 1.0}, "diffusion is float"),
        ({"diffusion": lambda x: x.new_ones(2)}, r"diffusion gives shape \(2,\); give \(3,\)"),
        ({"diffusion": lambda x: -torch.ones_like(x)}, "eigenvalue -1"),
        ({"curl": lambda x: torch.eye(3)}, "not antisymmetric"),
        ({"curl": lambda x: torch.zeros(2, 2)}, r"curl gives shape \(2, 2\)"),
        ({"auxiliary": -1}, "auxiliary is -1"),
    ],
)
def test_bad_fields(settings, message):
    with pytest.raises(ValueError, match=message):
        kernel = MaSDE(targets.gaussian, **{"step_size": 0.1, "diffusion": torch.ones_like, **settings}, compile="fx")
        kernel.setup(0, torch.ones(3))
