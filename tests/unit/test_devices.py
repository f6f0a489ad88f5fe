"""A model's tensors decide where everything runs, and what runs elsewhere than on the CPU draws the same numbers.

The other device is a pretence (`support/other_device.py`): tensors of the CPU that refuse to meet any other. What it
cannot show stands in tests marked ``cuda``.
"""

from dataclasses import replace

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI
from pyro.nn import PyroModule, PyroSample
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn import randomness
from bnn.guides import AutoMatrixNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
from bnn.kernels import MCMC, SGHMC, SGLD
from bnn.randomness import kept_randomness, random_state, set_random_state
from support import targets
from support.cases import KERNELS
from support.nets import data
from support.other_device import OtherTensor, crossings, other_device
from support.posteriors import POSTERIORS

CPU = torch.device("cpu")
# Kernels of a mass or step size per coordinate that is sent anew at every step or proposal, or 32 steps ahead.
SENT = {"sgld_cycles", "cyclical_sgld", "cyclical_sghmc", "amagold_fresh", "sghmc_mass"}
QUICK = {"sgld", "sghmc_obabo", "ggmc", "sghmc_mass"}
CASES = [pytest.param(c, id=c.name, marks=[] if c.name in QUICK else pytest.mark.slow) for c in KERNELS]
pytestmark = pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning")
GUIDES = [
    pytest.param(case, id=case.name, marks=[] if case.name == "laplace_kronecker" else pytest.mark.slow)
    for case in POSTERIORS
    if case.name in ("ensemble", "swag", "dropout", "ivon", "laplace_kronecker")
]


def both(run):
    """``run(device)`` on the CPU and on the other device, from the same seed: lists of tensors that must be equal."""
    pyro.set_rng_seed(1)
    wanted = run(CPU)
    pyro.clear_param_store()
    with other_device() as device:
        pyro.set_rng_seed(1)
        found = run(device)
        found = [value.cpu() for value in found]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def net_model(device, batch_size=8, **options):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).to(device)
    noise = dist.HalfNormal(1.0)  # on the CPU, whatever the net is on
    return bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(noise), batch_size=batch_size, **options)


def net_data(device):
    x, y = data(20)
    return x.to(device), y.unsqueeze(-1).to(device)


def ran(kernel, *args, draws=4, **options):
    mcmc = MCMC(kernel, num_samples=draws, num_chains=2, disable_progbar=True, **options)
    mcmc.run(*args)
    return mcmc


def samples(mcmc):
    return [value for _, value in sorted(mcmc.get_samples().items())]


# ---- the pretence itself


def test_the_other_device_refuses_the_cpu():
    with other_device() as device:
        x = torch.ones(3, device=device)
        with pytest.raises(RuntimeError, match="same device.*aten.add"):
            x + torch.ones(3)
        with pytest.raises(RuntimeError, match="same device.*aten.mm"):
            torch.ones(1, 3, device=device) @ torch.ones(3, 1)
        with pytest.raises(TypeError, match="use .cpu"):
            x.numpy()
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, device=device, generator=torch.Generator())
        with crossings() as counts:
            value = (x + torch.tensor(1.0)).sum().item()
            x[torch.tensor([0])].cpu()
            torch.tensor([1.0], device=device)
        assert value == 6.0 and counts == {"number": 1, "read": 1, "index": 1, "from": 1, "to": 1}
    assert x.device.type == "meta" and isinstance(x, OtherTensor)


# ---- everything runs where the model's tensors are


@pytest.mark.parametrize("case", CASES)
def test_kernels_draw_what_they_draw_on_the_cpu_and_nothing_crosses(case):
    """A draw costs one number read from the device, to see that it is finite; a step costs nothing."""

    def run(device):
        kernel = case.build(targets.regression, compile="fx", steps_per_sample=2)
        kernel.num_chains = 2
        kernel.setup(0, *(part.to(device) for part in targets.regression_data()))
        for _ in range(2):
            kernel.advance()
        with crossings() as counts:
            for _ in range(10):
                kernel.advance()
        if device != CPU:
            assert (counts.pop("to", 0) > 0) == (case.name in SENT)
            assert counts == {"read": 10}
        assert kernel.position.device == device
        return [kernel.position]

    both(run)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"mass": "auto"}, {"mass": "dense"}, {}], ids=["auto", "dense", "step size"])
def test_warm_up_learns_the_same(options):
    def run(device):
        kernel = SGHMC(net_model(device), step_size="auto", friction=3.0, compile="fx", **options)
        return samples(ran(kernel, *net_data(device), warmup_steps=60))

    both(run)


@pytest.mark.parametrize("method", ["vectorized", "sequential"])
def test_handlers_and_chains(method):
    def run(device):
        kernel = SGLD(net_model(device), step_size=1e-4, compile="handlers")
        return samples(ran(kernel, *net_data(device), chain_method=method))

    both(run)


@pytest.mark.slow
def test_a_loaders_batches_are_sent_to_the_net():
    def run(device):
        x, y = net_data(CPU)
        loader = DataLoader(TensorDataset(x, y), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))
        kernel = SGLD(net_model(device, None, num_data=20), step_size=1e-4, compile="fx", batches=loader)
        mcmc = ran(kernel)
        potential = bnn.Potential(net_model(device, None, num_data=20), batches=loader)
        return [*samples(mcmc), potential.full_energy(torch.zeros(1, potential.dim, device=device))]

    both(run)


@pytest.mark.parametrize("case", GUIDES)
def test_guides_and_their_predictions(case, monkeypatch):
    def run(device):
        monkeypatch.setattr("support.posteriors.net_data", lambda: net_data(device))
        guide = replace(case, model=lambda batch_size: net_model(device, batch_size)).fitted(steps=3)
        found = bnn.predict(guide, net_data(device)[0], num_samples=4)
        bnn.to_arviz(guide, model_args=net_data(device), num_samples=6)
        return [*guide.median().values(), found.mean.to(device)]

    both(run)


@pytest.mark.parametrize(
    "curvature", ["ggn", *(pytest.param(c, marks=pytest.mark.slow) for c in ("sampled", "empirical"))]
)
def test_natural_gradients(curvature):
    def run(device):
        model = net_model(device)
        guide = AutoMatrixNormal(model)
        svi = SVI(model, guide, NaturalGradientDescent(), TraceNaturalGradient_ELBO(curvature))
        losses = [svi.step(*net_data(device)) for _ in range(4)]
        return [*guide.median().values(), torch.tensor(losses, device=device)]

    both(run)


@pytest.mark.slow
def test_training_goes_on_from_a_checkpoint(tmp_path):
    """Files are read onto the CPU; running means and momenta go back to where the parameters are."""

    def run(device):
        model, path = net_model(device), tmp_path / f"{device.type}.pt"
        guide = AutoMatrixNormal(model)
        svi = SVI(model, guide, NaturalGradientDescent(momentum=0.5), TraceNaturalGradient_ELBO())
        for _ in range(2):
            svi.step(*net_data(device))
        bnn.checkpoint(svi, path)
        wanted = [svi.step(*net_data(device)) for _ in range(2)]
        bnn.restore(svi, path)
        assert [svi.step(*net_data(device)) for _ in range(2)] == wanted
        return [torch.tensor(wanted, device=device)]

    both(run)


@pytest.mark.slow
def test_a_run_from_start_to_report(tmp_path):
    """Kept, resumed, summarised, converted; and predictions from draws that are on the CPU by then."""

    def run(device):
        path, model = tmp_path / f"{device.type}.zarr", net_model(device)
        for draws, resume in ((4, False), (8, True)):
            kernel = SGHMC(model, step_size=1e-3, friction=3.0, compile="fx")
            mcmc = ran(kernel, *net_data(device), draws=draws, store=path, resume=resume)
        x, y = net_data(device)
        idata = bnn.to_arviz(mcmc, function_space=True, posterior_predictive=True)
        bnn.summary(mcmc)
        bnn.equipartition(mcmc)
        bnn.score(mcmc, x, y)
        means = [bnn.predict(one, x, model=model).mean for one in (mcmc, idata, path)]
        for mean in means[1:]:
            torch.testing.assert_close(mean, means[0])
        return [means[0].to(device), *samples(mcmc)]

    both(run)


# ---- what is where


def test_data_elsewhere_than_the_net():
    x, y = net_data(CPU)
    with other_device() as device:
        model = net_model(device)
        with pytest.raises(
            ValueError, match=r"x is on cpu, the net's parameters on meta: move one of them, x.to\('meta"
        ):
            bnn.Potential(model, x, y)
        with pytest.raises(ValueError, match=r"x is on meta, y on cpu: move one of them, y.to\(x.device\)"):
            bnn.Potential(model, x.to(device), y)
        with pytest.raises(ValueError, match="y is on meta|x is on meta, the net's parameters on cpu"):
            bnn.Potential(net_model(CPU), x.to(device), y)
        mixed = nn.Sequential(nn.Linear(3, 4).to(device), nn.Linear(4, 1))
        with pytest.raises(ValueError, match="parameters on meta and cpu|on several devices"):
            bnn.Potential(bnn.bayesian(mixed, likelihood=bnn.likelihoods.Gaussian(0.1)), x.to(device), y.to(device))


class WithBuffer(PyroModule):
    """A model that standardises by a buffer."""

    def __init__(self, device, dtype=torch.float32):
        super().__init__()
        self.register_buffer("center", torch.full((3,), 0.5, device=device, dtype=dtype))
        zeros = torch.zeros(3, device=device, dtype=dtype)
        self.weight = PyroSample(dist.Normal(zeros, 1.0).to_event(1))

    def forward(self, x, y):
        mean = (x - self.center) @ self.weight
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("obs", dist.Normal(mean[rows], 0.5), obs=y[rows, 0])


def test_any_models_data_elsewhere():
    x, y = net_data(CPU)
    with other_device() as device:
        with pytest.raises(
            ValueError, match="on several devices: argument 0, argument 1 on cpu; buffer 'center' on meta"
        ):
            bnn.Potential(WithBuffer(device), x, y)


def test_sites_on_several_devices():
    def model():
        pyro.sample("first", dist.Normal(torch.zeros(2, device=device), 1.0).to_event(1))
        pyro.sample("second", dist.Normal(torch.zeros(2), 1.0).to_event(1))

    with other_device() as device:
        with pytest.raises(ValueError, match=r"prior of site 'second' is on cpu, .* other sites are on meta: make its"):
            bnn.Potential(model)
    from bnn.devices import common_device

    with pytest.raises(ValueError, match=r"several devices \('a' on cuda:0, 'b' on cuda:1\): put all"):
        common_device({"a": torch.device("cuda", 0), "b": torch.device("cuda", 1), "c": CPU})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_follows_the_model_and_buffers_move_with_it(dtype):
    def run(device):
        x, y = (part.to(dtype) for part in net_data(device))
        potential = bnn.Potential(WithBuffer(device, dtype), x, y)
        assert potential.is_recorded and potential.dtype == dtype
        energy, grad = potential.energy_and_grad(torch.full((2, 3), 0.1, device=device, dtype=dtype))
        assert energy.dtype == grad.dtype == dtype
        return [energy, grad]

    both(run)


# ---- random generators


class FakeCuda:
    """Two CUDA devices whose generators are tensors."""

    def __init__(self, monkeypatch, count=2):
        self.states = [torch.full((2,), number, dtype=torch.uint8) for number in range(count)]
        for name, value in {
            "is_available": lambda: count > 0,
            "is_initialized": lambda: count > 0,
            "device_count": lambda: count,
            "get_rng_state_all": lambda: [state.clone() for state in self.states],
            "get_rng_state": lambda device: self.states[int(device)].clone(),
            "set_rng_state": lambda state, device: self.states.__setitem__(int(device), state.clone()),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_generators_of_all_devices_are_put_back(monkeypatch):
    cuda = FakeCuda(monkeypatch)
    before = torch.get_rng_state()
    with kept_randomness():
        torch.rand(3)
        cuda.states[1] += 7
    assert torch.equal(torch.get_rng_state(), before)
    assert [state.tolist() for state in cuda.states] == [[0, 0], [1, 1]]
    state = random_state()
    torch.rand(3), cuda.states[0].add_(9)
    set_random_state(state)
    assert torch.equal(torch.get_rng_state(), before) and cuda.states[0].tolist() == [0, 0]


def test_other_devices_than_were_kept(monkeypatch):
    state = {**random_state(), "cuda": [torch.zeros(2, dtype=torch.uint8)]}
    with pytest.warns(RuntimeWarning, match="of 1 CUDA devices were kept, and there are 0 here"):
        set_random_state(state)
    cuda = FakeCuda(monkeypatch, 1)
    cuda.states[0] += 5
    with pytest.warns(RuntimeWarning, match="of 2 CUDA devices were kept, and there are 1 here"):
        set_random_state({**state, "cuda": state["cuda"] * 2})
    assert cuda.states[0].tolist() == [0, 0] and randomness
