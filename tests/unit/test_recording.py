"""A recorded program computes what the function computes, in each tier, and says why where it cannot be recorded."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensorMode

from bnn.loop_rewrites import expand_small_products, turn_narrow_products
from bnn.recording import (
    RecordingError,
    draws_random_numbers,
    has_convolution,
    record,
    record_forward,
    run_fx,
    run_inductor,
    used_inputs,
)

WEIGHTS = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(3, 4)
ROWS = torch.tensor([2, 0])


def gradient(function):
    """Value and gradient, the way that energies are recorded."""

    def both(x, *rest):
        grad, value = torch.func.grad_and_value(function)(x, *rest)
        return value, grad

    return both


def _products(x, weights):
    return torch.tanh(x @ weights).sum() + F.linear(x, weights.T, weights[0]).square().mean()


# Functions that leave behind what each rewrite looks for.
FUNCTIONS = {
    "constants": lambda x: (x * torch.ones(5, 3) + torch.zeros(5, 3) - 0.5).sum() * 2.0 / 4.0,
    "scalings": lambda x: (-(((x * 2.0) * 3.0) / 7.0)).square().sum(),
    "multiply-add": lambda x: (x + x * x.exp() - x * 0.25).sum() + (3.0 - x * x).sum(),
    "products": lambda x: _products(x, WEIGHTS.to(x.dtype)),
    "views": lambda x: x.reshape(15).view(3, 5).t().t().reshape(-1)[2:7].sum() * x.T.sum(),
    "repeats": lambda x: (x.exp() + x.exp()).sum() + (x.exp() * x.exp()).sum(),
    "gather": lambda x: x[ROWS].pow(2).sum() + x[:, ROWS].pow(1).sum() + x[ROWS, ROWS].sum(),
    "in place": lambda x: (x * 1.0).add_(x).mul_(2.0).sum(),
    "integers": lambda x: (x * torch.arange(3)).sum() + (torch.arange(5) // 2).sum(),
    "normal": lambda x: torch.distributions.Normal(torch.zeros(5, 3), 2 * torch.ones(5, 3)).log_prob(x).sum(),
    "where": lambda x: torch.where(x > 0, x, x * 0.1).sum() + x.clamp(min=-0.2).logsumexp(-1).sum(),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_fx_computes_the_function(name, dtype):
    function = gradient(FUNCTIONS[name])
    generator = torch.Generator().manual_seed(1)
    first, second = torch.randn(2, 5, 3, generator=generator, dtype=dtype)
    program = run_fx(record(function, [first]))
    for x in (first, second):
        for got, wanted in zip(program(x), function(x), strict=True):
            assert got.dtype == wanted.dtype
            torch.testing.assert_close(got, wanted)


def test_inductor_computes_the_function():
    def function(x, y):
        return tuple(part for f in FUNCTIONS.values() for part in gradient(f)(x * y))

    x, y = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    program = run_inductor(record(function, [x, y]), [x, y])
    for got, wanted in zip(program(y, x), function(y, x), strict=True):
        torch.testing.assert_close(got, wanted)


def test_small_products_are_expanded():
    batched = torch.randn(2, 4, 3, dtype=torch.float64)

    def function(x):
        return torch.addmm(WEIGHTS[0], x, WEIGHTS), torch.bmm(batched, x.expand(2, 5, 3).mT), x.t() @ x

    x = torch.randn(5, 3, dtype=torch.float64)
    graph = record(function, [x])
    expand_small_products(graph)
    assert not any("mm" in str(node.target) for node in graph.graph.nodes)
    for got, wanted in zip(graph(x), function(x), strict=True):
        torch.testing.assert_close(got, wanted)
    for together, left in {119: 3, 120: 0}.items():  # the second product has 120 multiplications
        graph = record(function, [x])
        expand_small_products(graph, largest=10, together=together)
        assert sum("mm" in str(node.target) for node in graph.graph.nodes) == left


def test_the_prior_of_a_normal_leaves_one_addition():
    """No product with ones, no array of zeros: the gradient of a standard normal energy is the position itself."""
    energy = gradient(lambda z: -torch.distributions.Normal(torch.zeros(7), torch.ones(7)).log_prob(z).sum())
    graph = record(lambda z: energy(z)[1:], [torch.randn(7)])
    program = run_fx(graph)
    z = torch.randn(7)
    torch.testing.assert_close(program(z)[0], z, rtol=0, atol=0)


def test_random_numbers_are_fresh_and_never_folded():
    graph = record(lambda x: (x + torch.randn(1000),), [torch.zeros(1000)])
    assert draws_random_numbers(graph)
    program = run_fx(graph)
    first, second = (program(torch.zeros(1000))[0] for _ in range(2))
    assert (first != second).all()
    torch.manual_seed(3)
    (third,) = program(torch.zeros(1000))
    torch.manual_seed(3)
    torch.testing.assert_close(third, torch.randn(1000), rtol=0, atol=0)


def test_control_flow_on_a_value_is_refused():
    with pytest.raises(RecordingError):
        record(lambda x: (x * 2,) if x.sum() > 0 else (x,), [torch.ones(3)])
    with pytest.raises(RecordingError):
        record(lambda x: (x * x.sum().item(),), [torch.ones(3)])


def test_writing_to_a_tensor_that_stays_is_refused():
    norm = nn.BatchNorm1d(3)
    with pytest.raises(RecordingError, match="running mean"):
        record(lambda x: (norm(x).detach(),), [torch.randn(5, 3)])


def test_facts_about_a_program():
    graph = record(lambda x, y: (F.conv1d(x, torch.ones(1, 1, 2)),), [torch.randn(1, 1, 5), torch.randn(2)])
    assert has_convolution(graph) and not draws_random_numbers(graph)
    assert used_inputs(graph) == [True, False]


def test_distributions_built_with_checks_are_recorded():
    prior = torch.distributions.Normal(0.0, 1.0, validate_args=True).expand([3])
    graph = record(lambda z: (prior.log_prob(z),), [torch.randn(3)])
    z = torch.randn(3)
    torch.testing.assert_close(run_fx(graph)(z)[0], prior.log_prob(z))
    with pytest.raises(ValueError):  # the checks are back
        prior.log_prob(torch.tensor([float("nan"), 0.0, 0.0]))


def test_narrow_batched_products_are_turned():
    """The result and its memory layout stay: a view of it must still be one."""

    def function(d, x):
        return (torch.bmm(d.mT, x).view(3, 40),)

    d, x = torch.randn(3, 7, 10, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    graph = record(function, [d, x])
    turn_narrow_products(graph)
    products = [node for node in graph.graph.nodes if "bmm" in str(node.target)]
    assert [tuple(node.meta["val"].shape) for node in products] == [(3, 4, 10)]
    torch.testing.assert_close(graph(d, x), function(d, x))
    torch.testing.assert_close(run_fx(record(function, [d, x]))(d, x), function(d, x))


def test_views_of_the_position_are_of_this_calls_position():
    """The buffer behind the views is filled at each call, and never returned."""

    def function(z):
        a, b, c = z.split([3, 4, 5], -1)
        return z * 2, a.view(3).sum() * b + c.view(5).prod(), b.t()

    program = run_fx(record(function, [torch.randn(1, 12)]))
    first, second = torch.randn(1, 12), torch.randn(1, 12)
    kept = program(first)
    program(second)
    for got, wanted in zip(kept, function(first), strict=True):
        torch.testing.assert_close(got, wanted)


def test_a_product_added_to_itself_is_not_fused_away() -> None:
    def doubled(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        product = x * x.exp()
        return (product + product,)

    x = torch.randn(5)
    torch.testing.assert_close(run_fx(record(doubled, [x]))(x)[0], doubled(x)[0])


@pytest.mark.parametrize("recorded", [record, lambda *a: record_forward(*a)[0]], ids=["record", "record_forward"])
def test_one_tensor_given_twice_is_two_inputs(recorded):
    """Ten steps are recorded with one example minibatch: each must use its own when they run."""
    example = torch.ones(2)
    program = recorded(lambda a, b: (a - 2.0 * b,), [example, example])
    assert program(torch.full((2,), 5.0), torch.full((2,), 3.0))[0].tolist() == [-1.0, -1.0]


def test_a_recording_makes_few_modes_for_shapes(monkeypatch):
    """``make_fx`` by itself makes one for every node, and that was a third of a recording's time."""
    made, init = [], FakeTensorMode.__init__
    monkeypatch.setattr(
        FakeTensorMode, "__init__", lambda self, **options: (made.append(self), init(self, **options))[1]
    )
    record(lambda a: (sum(a * k for k in range(1, 21)),), [torch.randn(3)])
    assert len(made) == 1
