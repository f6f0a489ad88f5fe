"""A program as a CUDA graph: static inputs and outputs are copied, so that no call changes what another returned."""

import contextlib

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bnn import Potential, cuda_graphs
from bnn.kernels import SGLD
from bnn.recording import record, run_fx
from bnn.tiers import choose
from support.nets import numbers

X, Y = numbers(4, 3, seed=1), numbers(4, 3, seed=2)


def function(x, y):
    return (x @ y.T).tanh(), (x * y).sum(0)


class Replayed(TorchDispatchMode):
    """Stands in for a CUDA graph: notes operations, and repeats them on the same tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        for func, args, kwargs, out in self.calls:
            out.copy_(func(*args, **kwargs))


class Elsewhere(torch.Tensor):
    """A tensor of the CPU that says it is on a CUDA device."""

    @property
    def device(self):
        return torch.device("cuda", 0)


@pytest.fixture
def graphs(monkeypatch):
    """Replays in place of CUDA's, on the CPU; the inputs say that they are elsewhere."""

    class Stream:
        def wait_stream(self, other):
            pass

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Replayed)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: graph)
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for name in ("stream", "device"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: contextlib.nullcontext())
    return lambda *tensors: [tensor.clone().as_subclass(Elsewhere) for tensor in tensors]


def test_calls_compute_the_function_and_keep_apart(graphs):
    runs, recorded = [], run_fx(record(function, [X, Y]))

    def program(*inputs):
        runs.append(1)
        return recorded(*(part.as_subclass(torch.Tensor) for part in inputs))

    call = cuda_graphs.captured(program, graphs(X, Y))
    assert len(runs) == cuda_graphs.WARMUP_RUNS + 1
    first = call(X, Y)
    kept = [part.clone() for part in first]
    second = call(Y, X + 1)
    for got, wanted in zip([*first, *second], [*function(X, Y), *function(Y, X + 1)], strict=True):
        torch.testing.assert_close(torch.as_tensor(got), wanted)
    for got, before in zip(first, kept, strict=True):
        assert torch.equal(got, before)
    assert len(runs) == cuda_graphs.WARMUP_RUNS + 1  # replays, not runs
    again = call(X, Y)
    assert all(torch.equal(a, b) for a, b in zip(again, first, strict=True))


def test_what_cannot_be_captured(graphs):
    with pytest.raises(RuntimeError, match="cannot be captured as a CUDA graph.*Use compile='inductor' or 'fx'"):
        cuda_graphs.captured(lambda x: (x * float(x.sum()),), graphs(X))


def test_needs_a_cuda_device():
    wanted = "compile='cuda_graph' needs a model and data on a CUDA device, and there are tensors on cpu: move"
    with pytest.raises(ValueError, match=wanted):
        choose(record(function, [X, Y]), [X, Y], "cuda_graph")

    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(mean, 1.0), obs=y)

    with pytest.raises(ValueError, match=wanted):
        SGLD(model, step_size=0.1, compile="cuda_graph").setup(0, torch.ones(3))


@pytest.mark.cuda
def test_a_chain_on_cuda_is_that_of_the_plain_program():
    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(x.new_zeros(3), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=2, device=x.device) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ weight, 1.0), obs=y[rows, 0])

    drawn = []
    for compile in ("fx", "cuda_graph"):
        kernel = SGLD(model, step_size=0.01, compile=compile)
        torch.manual_seed(3)
        kernel.num_chains = 2
        kernel.setup(0, X.cuda(), Y.cuda())
        torch.manual_seed(4)
        for _ in range(20):
            kernel.advance()
        drawn.append(kernel.position)
    torch.testing.assert_close(*drawn)
    assert Potential(model, X.cuda(), Y.cuda(), compile="cuda_graph").device.type == "cuda"
