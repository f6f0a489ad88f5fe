"""Reusing memory changes no bit of any result, no input, and leaves a step of a large net two new vectors."""

import random

import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn import in_place
from bnn.kernels import GGMC, SGHMC, SGLD
from bnn.recording import record, run_fx
from support.allocations import Allocations

SHAPE = (4, 6)
OPERATIONS = {
    "add": lambda a, b, c: a + b,
    "add scaled": lambda a, b, c: torch.add(a, b, alpha=2),
    "subtract": lambda a, b, c: a - b.exp(),
    "product": lambda a, b, c: a * b,
    "square": lambda a, b, c: a * a,
    "multiply-add": lambda a, b, c: a + b * c,
    "multiply-subtract": lambda a, b, c: a - b * c,
    "scaled": lambda a, b, c: a * 0.3,
    "tanh": lambda a, b, c: a.tanh(),
    "where": lambda a, b, c: torch.where(a > 0, b, c),
    "transposed": lambda a, b, c: a * b.reshape(6, 4).t(),
    "views": lambda a, b, c: a.view(24)[3:9] + b,
    "row": lambda a, b, c: a * b[1],
    "overlap": lambda a, b, c: torch.cat([a[1:] + a[:-1], b[:1]]),
    "flat": lambda a, b, c: torch.cat([(a.t() @ b)[:2].reshape(1, -1), (c[:2] @ c.t()).view(1, 8), a[:1, :4]], 1).view(
        SHAPE
    ),
    "flat products": lambda a, b, c: torch.cat([(a[:2] @ b.t()).view(1, 8), (c @ b.t()).view(1, 16)], 1).view(SHAPE),
    "in place": lambda a, b, c: (a * 1.5).add_(b).mul_(c),
    "sum": lambda a, b, c: a - b.sum(0, keepdim=True),
}


def program(seed):
    """A random function of two matrices, whose numbers stay small."""
    draw = random.Random(seed)
    lines = [(draw.choice(list(OPERATIONS)), [draw.random() for _ in range(3)]) for _ in range(12)]
    kept = [draw.random() for _ in range(2)]

    def function(x, y):
        pool = [x, y]
        for name, places in lines:
            # Mostly from the end of the pool: values that are read once and die are what memory is reused of.
            chosen = [pool[-1 - int(len(pool) * place**3)] for place in places]
            value = OPERATIONS[name](*chosen)
            pool.append(value if name in ("tanh", "scaled") else value.tanh())
        return pool[-1], *(pool[int(len(pool) * place)] * 2.0 for place in kept)

    return function


@pytest.fixture
def everything(monkeypatch):
    """Memory of every size is reused."""
    monkeypatch.setattr(in_place, "SMALLEST", 1)


@pytest.mark.parametrize("first", range(0, 80, 10))
def test_no_result_and_no_input_changes(first, monkeypatch):
    reused = 0
    for seed in range(first, first + 10):
        generator = torch.Generator().manual_seed(seed)
        inputs = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in range(2)]
        before = [x.clone() for x in inputs]
        graph = record(program(seed), inputs)
        monkeypatch.setattr(in_place, "SMALLEST", 1 << 60)
        plain = run_fx(graph)
        with Allocations(1) as without:
            wanted = plain(*inputs)
        monkeypatch.setattr(in_place, "SMALLEST", 1)
        reusing = run_fx(graph)
        with Allocations(1) as made:
            found = reusing(*inputs)
        again = reusing(*inputs)
        for one, other, same in zip(found, wanted, again, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)
            torch.testing.assert_close(one, same, rtol=0, atol=0)
        torch.testing.assert_close(inputs, before, rtol=0, atol=0)
        reused += made.fresh < without.fresh
    assert reused > 5


def net(width):
    """A perceptron with two weights."""
    x = torch.randn(8, width)

    def model():
        one = pyro.sample("one", dist.Normal(torch.zeros(width, width), 1.0).to_event(2))
        two = pyro.sample("two", dist.Normal(torch.zeros(width, width), 1.0).to_event(2))
        with pyro.plate("data", 8):
            pyro.sample("obs", dist.Normal((torch.tanh(x @ one) @ two).sum(-1), 1.0), obs=torch.zeros(8))

    return model


@pytest.mark.parametrize(
    ("kernel", "vectors"),
    [
        # New position: the gradient's memory is written over.
        (lambda model: SGLD(model, step_size=1e-6, compile="fx", steps_per_sample=2), 1),
        # New position and, in the gradient's memory, new momentum.
        (lambda model: SGHMC(model, step_size=1e-6, friction=1.0, compile="fx", steps_per_sample=2), 2),
        (lambda model: GGMC(model, step_size=1e-6, friction=1.0, num_steps=2, compile="fx"), 3),
    ],
)
def test_a_step_makes_its_new_state_alone(kernel, vectors, everything):
    pyro.set_rng_seed(0)
    made = kernel(net(40))
    made.num_samples = 5
    made.setup(0)
    made._running.call(1, observed=False)  # makes the memory for noise
    with torch.no_grad(), Allocations(1600) as counted:
        made._running.call(1, observed=False)
    assert counted.fresh == vectors


@pytest.mark.parametrize("friction", [1.0, 3.0])
def test_chains_are_the_same_bit_for_bit(friction, monkeypatch):
    found = []
    for smallest in (1, 1 << 60):
        monkeypatch.setattr(in_place, "SMALLEST", smallest)
        pyro.set_rng_seed(0)
        torch.manual_seed(0)
        made = SGHMC(net(10), step_size=1e-3, friction=friction, compile="fx", steps_per_sample=3)
        made.num_chains, made.num_samples = 2, 5
        made.setup(0)
        stats = [made.advance() for _ in range(5)]
        found.append((made.position, *stats))
    torch.testing.assert_close(*found, rtol=0, atol=0)
