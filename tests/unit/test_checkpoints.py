"""A checkpoint of variational training: what goes on from it is the uninterrupted training, bit for bit."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoDelta, AutoNormal
from torch.distributions import constraints
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.checkpoints import FORMAT, read, write_at_once
from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    NaturalGradientOptimizer,
    TraceNaturalGradient_ELBO,
)
from support.nets import BayesianMLP, data

pytestmark = [
    pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction:UserWarning"),
    pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout:UserWarning"),
]
HALF = 10


def mlp():
    return BayesianMLP(12, 4)


def two_layers(x, y):
    """Wide enough for thin directions."""
    w0 = pyro.sample("w0", dist.Normal(torch.zeros(16, 3), 1.0).to_event(2))
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(16, 16), 0.3).to_event(2))
    w2 = pyro.sample("w2", dist.Normal(torch.zeros(1, 16), 0.3).to_event(2))
    with pyro.plate("data", 12, subsample_size=4) as rows:
        out = F.linear(torch.tanh(F.linear(torch.tanh(F.linear(x[rows], w0)), w1)), w2)
        pyro.sample("obs", dist.Normal(out.squeeze(-1), 0.5), obs=y[rows])


def own_guide(x, y):
    del x, y
    for name, shape in {"w0": (16, 3), "w1": (16, 16), "w2": (1, 16)}.items():
        loc = pyro.param(f"{name}_loc", torch.zeros(shape))
        scale = pyro.param(f"{name}_scale", torch.full(shape, 0.1), constraints.positive)
        pyro.sample(name, dist.Normal(loc, scale).to_event(2))


def schedule(gamma=0.9):
    options = {"optimizer": NaturalGradientOptimizer, "optim_args": {"lr": 0.2}, "gamma": gamma}
    return pyro.optim.ExponentialLR(options)


def steps():
    return pyro.optim.MultiStepLR({"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "milestones": [7, 13]})


def adam():
    return pyro.optim.Adam({"lr": 0.02})


natural = TraceNaturalGradient_ELBO
kfac = partial(natural, "ggn", extrinsic_damping=0.1, inverses_every=5)
CASES = {
    "factorized": (mlp, AutoFactorizedNormal, NaturalGradientDescent, natural),
    "matrix": (
        mlp,
        AutoMatrixNormal,
        partial(NaturalGradientDescent, momentum=0.5),
        partial(natural, inverses_every=4, check_every=5),
    ),
    "matrix_schedule": (mlp, AutoMatrixNormal, schedule, natural),
    "matrix_factored": (mlp, AutoMatrixNormal, NaturalGradientDescent, partial(natural, damping="factored")),
    "matrix_thin": (
        lambda: two_layers,
        AutoMatrixNormal,
        NaturalGradientDescent,
        partial(natural, noise="local", inverses_every=4),
    ),
    "matrix_hessian": (mlp, AutoMatrixNormal, NaturalGradientDescent, partial(natural, "reparametrization")),
    "eigen": (mlp, AutoEigenNormal, NaturalGradientDescent, partial(natural, inverses_every=4)),
    "kfac": (lambda: two_layers, AutoDelta, NaturalGradientDescent, kfac),
    "kfac_adaptive": (
        lambda: two_layers,
        AutoDelta,
        partial(NaturalGradientDescent, lr=1.0),
        partial(kfac, adaptive_damping=True, rescale=True, rescale_momentum=True, block_tridiagonal=True),
    ),
    "matrix_backprop": (mlp, AutoMatrixNormal, lambda: pyro.optim.ClippedAdam({"lr": 0.02, "lrd": 0.9}), Trace_ELBO),
    "eigen_mean_field": (mlp, AutoEigenNormal, adam, TraceMeanField_ELBO),
    "pyro": (mlp, AutoNormal, steps, Trace_ELBO),
    "function": (lambda: two_layers, lambda model: own_guide, adam, Trace_ELBO),
}


def training(case):
    """A new model, guide, optimizer and ELBO, as a new process would make them."""
    pyro.clear_param_store()
    make_model, make_guide, make_optimizer, make_loss = CASES[case]
    model = make_model()
    return SVI(model, make_guide(model), make_optimizer(), make_loss())


def advance(svi, count, args):
    losses = []
    for _ in range(count):
        losses.append(svi.step(*args))
        if isinstance(svi.optim, pyro.optim.PyroOptim) and hasattr(svi.optim, "step"):
            svi.optim.step()
    return losses


def parameters():
    return {name: value.detach().clone() for name, value in pyro.get_param_store().named_parameters()}


QUICK = ("matrix", "matrix_schedule", "eigen", "kfac_adaptive", "function")
each_case = pytest.mark.parametrize(
    "case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)


@each_case
def test_training_goes_on_bit_for_bit(case, tmp_path):
    args, path = data(), tmp_path / "svi.pt"
    pyro.set_rng_seed(1)
    svi = training(case)
    advance(svi, HALF, args)
    bnn.checkpoint(svi, path, notes={"epoch": 3, "losses": [0.5]})
    losses, wanted = advance(svi, HALF, args), parameters()

    pyro.set_rng_seed(99)
    svi = training(case)
    assert bnn.restore(svi, path, model_args=args) == {"epoch": 3, "losses": [0.5]}
    assert advance(svi, HALF, args) == losses
    found = parameters()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_before_the_first_step_and_again_and_again(tmp_path):
    args, path = data(), tmp_path / "svi.pt"
    svi = training("matrix")
    svi.guide(*args)
    bnn.checkpoint(svi, path)
    losses = advance(svi, 2, args)
    again = []
    for _ in range(2):
        svi = training("matrix")
        bnn.restore(svi, path, model_args=args)
        again += advance(svi, 1, args)
        bnn.checkpoint(svi, path)
    assert again == losses and os.listdir(tmp_path) == ["svi.pt"]


def loader_training():
    pyro.clear_param_store()

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("data", 13, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((x @ weight.T).squeeze(-1), 0.5), obs=y)

    return SVI(model, AutoMatrixNormal(model), NaturalGradientDescent(), TraceNaturalGradient_ELBO())


def test_minibatches_of_a_loader(tmp_path):
    """The loader's generator goes on too; its last batch is smaller, so that there are two recordings."""
    path, svi, generator = tmp_path / "svi.pt", loader_training(), torch.Generator().manual_seed(3)

    def epochs(count):
        loader = DataLoader(TensorDataset(*data(13)), batch_size=4, shuffle=True, generator=generator)
        return [svi.step(*batch) for _ in range(count) for batch in loader]

    epochs(2)
    bnn.checkpoint(svi, path, generators=[generator])
    losses = epochs(2)
    generator, svi = torch.Generator().manual_seed(77), loader_training()
    bnn.restore(svi, path, model_args=data(4), generators=[generator])
    assert epochs(2) == losses
    with pytest.raises(ValueError, match="holds 1 generators, 0 are given"):
        bnn.restore(svi, path, model_args=data(4))


SCRIPT = """
import sys, torch, bnn
sys.path.insert(0, sys.argv[1])
from test_checkpoints import advance, data, training
svi = training("matrix")
bnn.restore(svi, sys.argv[2], model_args=data())
bnn.checkpoint(svi, sys.argv[3])
print(*map(float.hex, advance(svi, 3, data())))
"""


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[key], second[key]) for key in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


@pytest.mark.slow
def test_in_a_new_process(tmp_path):
    """All of the state is the same. The losses too, but for a last bit that once differed on a loaded machine.

    Why is not known; it was not seen again. Ruled out by trial: where memory lies (a matrix-vector product of MKL does
    depend on it, but only below 16 bytes, and PyTorch's tensors begin at multiples of 64), the order of hashes, and
    products and factorizations again and again under load. Another number of threads does change bits, of sums and
    factorizations of some hundred rows.
    """
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    svi = training("matrix")
    advance(svi, HALF, data())
    bnn.checkpoint(svi, first)
    losses = advance(svi, 3, data())
    here = Path(__file__).parent
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(here), str(first), str(second)]
    environment = {**os.environ, "PYTHONPATH": str(here.parent)}
    child = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=tmp_path)
    assert same(read(first), read(second))
    assert [float.fromhex(word) for word in child.stdout.split()] == pytest.approx(losses, rel=1e-6)


# ---- what cannot be restored


@pytest.fixture
def saved(tmp_path):
    svi = training("factorized")
    svi.step(*data())
    bnn.checkpoint(svi, tmp_path / "svi.pt")
    return tmp_path / "svi.pt"


def other(guide=AutoFactorizedNormal, optimizer=NaturalGradientDescent, loss=natural, model=None):
    pyro.clear_param_store()
    model = mlp() if model is None else model
    return SVI(model, guide(model), optimizer(), loss())


@pytest.mark.parametrize(
    ("svi", "message"),
    [
        (lambda: other(guide=AutoMatrixNormal), "whose guide is AutoFactorizedNormal, but this SVI's is AutoMatrix"),
        (lambda: other(loss=Trace_ELBO), "whose loss is TraceNaturalGradient_ELBO, but this SVI's is Trace_ELBO"),
        (lambda: other(optimizer=adam), "whose optimizer is NaturalGradientDescent of NaturalGradientOptimizer, but"),
        (lambda: other(model=two_layers), r"is \(27,\), torch.float32 in .*, but \(320,\), torch.float32 here"),
    ],
)
def test_another_training_is_refused(saved, svi, message):
    with pytest.raises(ValueError, match=message):
        bnn.restore(svi(), saved, model_args=data())


def test_other_parameters_are_refused(saved):
    svi = other()
    pyro.param("left over", torch.zeros(2))
    with pytest.raises(
        ValueError, match=r"differ in their parameters: only the file has \[\], only the SVI \['left over"
    ):
        bnn.restore(svi, saved, model_args=data())


def test_a_guide_that_is_not_set_up_needs_arguments(saved):
    with pytest.raises(ValueError, match="the guide is not set up: give the arguments of svi.step as model_args"):
        bnn.restore(other(), saved)


@pytest.mark.parametrize("damage", ["truncated", "empty", "changed", "text"])
def test_damaged_files_are_refused(saved, damage):
    content = bytearray(saved.read_bytes())
    if damage == "changed":  # one bit of a tensor
        place = content.index(b"data/0") + 80
        content[place] ^= 1
    cut = {"truncated": content[: len(content) // 2], "empty": b"", "changed": content, "text": b"loss 3.4"}[damage]
    saved.write_bytes(cut)
    with pytest.raises(ValueError, match="is damaged or no checkpoint: .* take another copy, or start anew"):
        bnn.restore(other(), saved, model_args=data())


def test_other_files_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no checkpoint at"):
        bnn.restore(other(), tmp_path / "none.pt")
    state = read(saved)
    write_at_once(saved, {**state, "format": FORMAT + 1})
    with pytest.raises(
        ValueError, match=f"is of format {FORMAT + 1}, and this version of pyro-bnn reads up to {FORMAT}"
    ):
        bnn.restore(other(), saved)
    torch.save(torch.zeros(3), saved)
    with pytest.raises(ValueError, match="is a file of PyTorch but no checkpoint"):
        bnn.restore(other(), saved)


def test_a_file_that_runs_code_is_not_read(saved):
    """Neither is any other type than plain data."""
    torch.save({"format": FORMAT, "made of": os.path.join}, saved)
    with pytest.raises(ValueError, match="is damaged or no checkpoint"):
        bnn.restore(other(), saved)


def test_what_cannot_be_written(saved, tmp_path):
    svi, before = other(), saved.read_bytes()
    with pytest.raises(RuntimeError, match=r"checkpoint\['notes'\]\['net'\] is Linear, which cannot be kept"):
        bnn.checkpoint(svi, saved, notes={"net": torch.nn.Linear(1, 1)})
    with pytest.raises(OSError, match="could not be written: .* One that was there before is untouched"):
        bnn.checkpoint(svi, tmp_path / "no folder" / "svi.pt")
    assert saved.read_bytes() == before


def test_a_parameter_without_a_name_is_refused(tmp_path):
    net = torch.nn.Linear(3, 1)

    def model(x, y):
        scale = pyro.sample("scale", dist.Normal(torch.zeros(1, 3), 1.0).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((net(x) + x @ scale.T).squeeze(-1), 0.5), obs=y)

    svi = other(model=model)
    svi.step(*data())
    with pytest.raises(RuntimeError, match="moves a parameter of shape .* that has no name: .* pyro.module"):
        bnn.checkpoint(svi, tmp_path / "svi.pt")
