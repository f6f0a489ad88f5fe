"""A corrected kernel on a model with minibatches sums them up: its chain is that of the model on all data at once."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from bnn.kernels import GGMC, MCMC, LayerWise

N, CHAINS = 21, 3
X = torch.randn(N, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
Y = X @ torch.tensor([1.0, -1.0, 0.5], dtype=torch.float64) + 0.3 * X[:, 0].sin()
START = {"weight": 0.3 * torch.ones(CHAINS, 3, dtype=torch.float64), "scale": torch.tensor([0.1, -0.2, 0.0])}
KINDS = [
    {"friction": 2.0},
    {"friction": 2.0, "num_steps": 3, "mass": {"scale": 2.0}, "steps_per_sample": 2},
    {"friction": None, "num_steps": 4},
]


def regression(x, y, batch_size=None):
    """With ``batch_size`` rows are drawn, of data that are all here or are a batch."""
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=x.dtype), 0.5))
    with pyro.plate("rows", N, subsample_size=batch_size) as rows:
        x, y = (x[rows], y[rows]) if len(x) == N else (x, y)
        pyro.sample("y", dist.Normal(x @ weight, scale), obs=y)


def of_batch(x, y):
    regression(x, y, len(x))


def set_up(kernel, start, *args, warmup=0):
    """With the seed set after the setup, which draws rows of its own, and momenta from that seed."""
    pyro.set_rng_seed(0)
    kernel.num_chains, kernel.initial_params = len(next(iter(start.values()))), start
    kernel.setup(warmup, *args)
    torch.manual_seed(5)
    run = kernel._running
    run.state = run.state._replace(momentum=kernel.fresh_momentum(run.state.position))


def drawn(kernel, *args, draws=12, warmup=0, start=START):
    """Draws and their statistics."""
    set_up(kernel, start, *args, warmup=warmup)
    rows, stats = [], []
    for _ in range(warmup + draws):
        stats.append(kernel.advance())
        rows.append(kernel.position.clone())
    return torch.stack(rows), torch.stack(stats)


def assert_same(one, other):
    for here, there in zip(one, other, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_size", [8, 7, 20], ids=["last of 5", "even", "last of 1"])
@pytest.mark.parametrize("settings", KINDS, ids=str)
def test_the_chain_is_that_of_all_data_at_once(settings, batch_size):
    build = {"step_size": 0.06, "compile": "fx", **settings}
    whole = drawn(GGMC(regression, **build), X, Y)
    assert 0.3 < whole[1][..., -1].mean() < 0.999  # some are refused
    assert_same(drawn(GGMC(regression, **build), X, Y, batch_size), whole)


def test_without_a_recording():
    build = {"step_size": 0.06, "friction": 2.0, "num_steps": 2}
    whole = drawn(GGMC(regression, compile="fx", **build), X, Y, draws=6)
    assert_same(drawn(GGMC(regression, compile="handlers", **build), X, Y, 8, draws=6), whole)


@pytest.mark.parametrize("make", ["list", "shuffled", "drop_last"])
def test_a_pass_through_batches(make):
    build = {"step_size": 0.06, "friction": 2.0, "num_steps": 3, "compile": "fx"}
    data = TensorDataset(X, Y)
    batches = {
        "list": list(zip(X.split(8), Y.split(8), strict=True)),
        "shuffled": DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(1)),
        "drop_last": DataLoader(data, 8, drop_last=True, generator=torch.Generator().manual_seed(1)),
    }[make]
    whole = drawn(GGMC(regression, **build), X, Y)
    assert_same(drawn(GGMC(of_batch, batches=batches, **build)), whole)


def two_plates(y, rows=None, columns=None):
    """Rows and columns are drawn: their chunks are the product of both."""
    row = pyro.sample("row", dist.Normal(torch.zeros(7, dtype=y.dtype), 1.0).to_event(1))
    column = pyro.sample("column", dist.Normal(torch.zeros(5, dtype=y.dtype), 1.0).to_event(1))
    with pyro.plate("columns", 5, subsample_size=columns, dim=-1) as j:
        with pyro.plate("rows", 7, subsample_size=rows, dim=-2) as i:
            pyro.sample("y", dist.Normal(row[i].unsqueeze(-1) + column[j], 0.5), obs=y[i][:, j])


def test_chunks_of_two_plates():
    y = X.flatten()[:35].reshape(7, 5)
    start = {"row": torch.ones(1, 7).double(), "column": torch.ones(1, 5).double()}
    found = []
    for sizes in ((None, None), (3, 2), (7, 2)):
        kernel = GGMC(two_plates, step_size=0.1, friction=1.0, compile="fx")
        found.append(drawn(kernel, y, *sizes, draws=5, start=start))
    assert_same(found[1], found[0])
    assert_same(found[2], found[0])


@pytest.mark.parametrize("mass", ["auto", LayerWise()], ids=["draws", "gradients"])
def test_what_warm_up_finds_is_the_same(mass):
    build = {"step_size": "auto", "friction": 1.0, "num_steps": 2, "mass": mass, "compile": "fx"}
    kernels = [GGMC(regression, **build) for _ in range(2)]
    whole = drawn(kernels[0], X, Y, warmup=30, draws=3)
    chunks = drawn(kernels[1], X, Y, 8, warmup=30, draws=3)
    for here, there in zip(chunks, whole, strict=True):
        torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-6)
    assert kernels[0].warmup_report == kernels[1].warmup_report


def test_no_more_rows_than_a_minibatch_are_seen_at_once_and_each_gradient_counts():
    seen = set()

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("rows", N, subsample_size=8) as rows:
            seen.add(len(rows))
            pyro.sample("y", dist.Normal(x[rows] @ weight, 1.0), obs=y[rows])

    kernel = GGMC(model, step_size=0.1, friction=1.0, num_steps=2, compile="fx")
    mcmc = MCMC(kernel, num_samples=5, warmup_steps=5, num_chains=2, disable_progbar=True)
    mcmc.run(X, Y)
    assert seen == {8}
    assert mcmc.run_facts["gradient_evaluations"] == 5 * 2 * 2 * 3


class Augmented(TensorDataset):
    """Data with noise of their own in each pass."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(3, dtype=x.dtype), y


def test_data_that_differ_from_pass_to_pass_are_refused():
    kernel = GGMC(of_batch, batches=DataLoader(Augmented(X, Y), 8), step_size=0.1, friction=1.0, compile="fx")
    with pytest.raises(ValueError, match="two passes through batches= gave energies .* leave augmentation out"):
        kernel.setup(0)
