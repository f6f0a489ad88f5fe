"""Products in bfloat16 change a gradient by their rounding alone, and nothing else of a chain."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import bnn
from bnn import Potential, precision
from bnn.kernels import AMAGOLD, GGMC, MCMC, SGHMC, SGLD
from bnn.precision import RoundedProducts, running
from bnn.tiers import Program
from support.nets import data, labels, numbers

ALPHA = 1e-6
ROUNDING = 2.0**-9  # largest relative error of a number in bfloat16


def net_model(batch_size=6):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    return bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.3), batch_size=batch_size)


def net_data():
    x, y = data(12)
    return x, y.unsqueeze(-1)


def images_model(images, classes):
    def weight(name, *shape):
        law = dist.Normal(torch.zeros(shape), 1.0 / math.prod(shape[1:]) ** 0.5)
        return pyro.sample(name, law.to_event(len(shape)))

    weights = weight("conv", 4, 2, 3, 3), pyro.sample("bias", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    with pyro.plate("data", len(images), subsample_size=5) as rows:
        hidden = F.conv2d(images[rows], *weights, stride=2).tanh().flatten(1)
        pyro.sample("obs", dist.Categorical(logits=hidden @ OUT), obs=classes[rows])


OUT = numbers(36, 3, seed=9) / 6


CASES = {
    "net": (net_model(), net_data()),
    "convolution": (images_model, (numbers(10, 2, 7, 7), labels(10))),
}


@pytest.mark.parametrize("compile", ["fx", "handlers", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize("name", CASES)
def test_gradients_differ_by_rounding(name, chains, compile):
    model, args = CASES[name]
    full, rounded = (Potential(model, *args, compile=compile, precision=p) for p in ("full", "bfloat16"))
    assert rounded.is_recorded == (compile != "handlers")
    position = full.initial(chains)
    inputs = full.stream(chains).next(1)[0]
    (energy, grad), (other, other_grad) = (p.evaluate(position, inputs) for p in (full, rounded))
    assert other.dtype == other_grad.dtype == torch.float32
    difference = (other_grad - grad).norm(dim=1) / grad.norm(dim=1)
    # A few products one after another; and not none, so that something was rounded.
    assert (difference < 12 * ROUNDING).all() and (difference > ROUNDING / 50).all(), difference
    assert ((other - energy).abs() < 12 * ROUNDING * energy.abs()).all()
    # Energies of all data are not rounded.
    assert torch.equal(full.full_energy(position), rounded.full_energy(position))


def test_what_is_rounded_and_what_is_not():
    """Each product equals that of the rounded numbers, summed in float32, to the rounding of its result."""
    a, b, c = numbers(5, 300, seed=1), numbers(300, 4, seed=2), numbers(5, 4, seed=3)
    low = [t.bfloat16().double() for t in (a, b)]
    with RoundedProducts():
        found = {
            "mm": a @ b,
            "bmm": torch.bmm(a.expand(2, 5, 300), b.expand(2, 300, 4))[1],
            "addmm": torch.addmm(1000.0 + c, a, b, beta=2, alpha=0.5),
            "sum": (a * a).sum() + a.exp().mean(),
            "double": a.double() @ b.double(),
            "integers": torch.ones(2, 2, dtype=torch.long) @ torch.ones(2, 2, dtype=torch.long),
        }
    exact = low[0] @ low[1]
    bound = 2.0**-8 * exact.abs() + 1e-4  # of a result that is rounded too
    for name in ("mm", "bmm", "double"):
        assert ((found[name].double() - exact).abs() <= bound).all(), name
    # The summand keeps its 24 bits: a thousand in bfloat16 would be wrong by up to four.
    assert ((found["addmm"].double() - 0.5 * exact - 2 * (1000 + c.double())).abs() <= 0.5 * bound + 1e-3).all()
    assert torch.equal(found["sum"], (a * a).sum() + a.exp().mean())
    assert found["double"].dtype == torch.float64 and found["integers"].dtype == torch.long


def test_state_keeps_its_precision_and_the_run_says_so():
    kernel = SGHMC(net_model(), step_size=1e-3, friction=5.0, precision="bfloat16", compile="fx")
    mcmc = MCMC(kernel, num_samples=3, num_chains=2, disable_progbar=True)
    mcmc.run(*net_data())
    assert all(value.dtype == torch.float32 for value in mcmc.get_samples().values())
    assert mcmc.sample_stats["energy"].dtype == torch.float32
    assert bnn.to_arviz(mcmc)["posterior"].attrs["precision"] == "bfloat16"
    # A step moves less than bfloat16 could tell: a state that was rounded would stand still.
    kernel = SGLD(net_model(), step_size=1e-9, precision="bfloat16", compile="fx")
    kernel.setup(0, *net_data())
    before = kernel.position.clone()
    kernel.advance()
    assert (kernel.position != before).float().mean() > 0.9 and (kernel.position - before).abs().max() < 1e-3


def test_law_of_a_conjugate_gaussian():
    """Linear regression: bbaoa's variance is exact, and rounded data move it by 2⁻⁷ in part at most.

    Rounded numbers are x(1 + e), |e| ≤ 2⁻⁹, so that products of two of them are wrong by 2⁻⁸ in part, and the posterior
    precision I + XᵀX / s², here close to a multiple of I, by no more. Chance adds √(2/chains) times a normal quantile,
    5 %: the test sees that nothing worse than rounding happens to a chain; how exact gradients are is tested above.
    """
    chains, noise = 20_000, 0.5
    x = torch.linalg.qr(numbers(40, 3, seed=4).double())[0].float() * 3.0
    y = x @ torch.tensor([0.3, -0.2, 0.5]) + noise * numbers(40, seed=5)

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
        with pyro.plate("data", 40):
            pyro.sample("obs", dist.Normal(F.linear(x, weight.unsqueeze(0)).squeeze(-1), noise), obs=y)

    kernel = SGHMC(model, step_size=0.1, friction=6.0, precision="bfloat16", compile="fx", steps_per_sample=60)
    kernel.num_chains = chains
    kernel.initial_params = {"weight": torch.zeros(chains, 3)}
    kernel.setup(0, x, y)
    kernel.advance()
    z = kernel.position.double()
    covariance = torch.linalg.inv(torch.eye(3).double() + x.double().T @ x.double() / noise**2)
    variance = z.var(0, correction=0)
    chance = stats.norm.isf(ALPHA / 6) * math.sqrt(2 / chains)
    error = variance / covariance.diagonal() - 1
    assert (error.abs() < 2.0**-7 + chance).all(), error
    # The mean is that of rounded data: off by no more than some rounding errors of the data's pull.
    mean = covariance @ (x.double().T @ y.double()) / noise**2
    deviation = covariance.diagonal().sqrt()
    chance = stats.norm.isf(ALPHA / 6) / math.sqrt(chains)
    assert ((z.mean(0) - mean).abs() < 2.0**-7 * mean.abs().max() + chance * deviation).all()


@pytest.mark.parametrize("kernel", [GGMC, AMAGOLD])
def test_kernels_with_a_test_refuse(kernel):
    with pytest.raises(ValueError, match="precision is 'bfloat16'; a Metropolis test needs differences of energies"):
        kernel(net_model(), step_size=0.01, friction=1.0, precision="bfloat16")


def test_bad_precision():
    with pytest.raises(ValueError, match="precision='half' is unknown: choose one of 'full', 'tf32', 'bfloat16'"):
        SGLD(net_model(), step_size=0.01, precision="half")
    with pytest.raises(ValueError, match="precision='half' is unknown"):
        Potential(net_model(), *net_data(), precision="half")
    with pytest.raises(ValueError, match="'tf32' is of CUDA devices, and the model is on cpu: move it there, or take"):
        Potential(net_model(), *net_data(), precision="tf32")


def test_tf32_is_set_while_a_program_runs():
    seen = []

    def program():
        seen.append(torch.get_float32_matmul_precision())
        if len(seen) == 2:
            raise ZeroDivisionError

    before = torch.get_float32_matmul_precision()
    call = running(program, "tf32")
    call()
    with pytest.raises(ZeroDivisionError):
        call()
    assert seen == ["high", "high"] and torch.get_float32_matmul_precision() == before == "highest"
    assert running(program, "full") is program and precision.PRECISIONS


def test_tf32_is_for_gradients_alone(monkeypatch):
    seen, choose = [], precision.choose

    def noting(*arguments):
        found = choose(*arguments)

        def call(*tensors):
            seen.append(torch.get_float32_matmul_precision())
            return found.call(*tensors)

        return Program(call, found.tier)

    monkeypatch.setattr(precision, "choose", noting)
    potential = Potential(net_model(), *net_data(), compile="fx")
    position = potential.initial(1)
    potential.precision, potential._programs = "tf32", {}
    potential.energy_and_grad(position)
    assert seen == ["high"]
    potential.full_energy(position)
    assert set(seen[1:]) == {"highest"}


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ["tf32", "bfloat16"])
def test_gradients_on_cuda_differ_by_rounding(kind):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1)).cuda()
    model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.3))
    args = [part.cuda() for part in net_data()]
    full, rounded = (Potential(model, *args, compile="fx", precision=p) for p in ("full", kind))
    position = full.initial(3)
    grad, other = (p.evaluate(position, [])[1] for p in (full, rounded))
    assert other.dtype == torch.float32
    assert ((other - grad).norm(dim=1) < 12 * ROUNDING * grad.norm(dim=1)).all()
