"""What makes compiled steps of small nets fast leaves their values alone: loops, tanh, memory kept between calls."""

import pytest
import torch

from bnn import one_kernel
from bnn.loop_rewrites import expand_small_products, expand_tanh
from bnn.recording import record, run_inductor

X = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))


def test_tanh_to_three_units_in_the_last_place():
    """At numbers of every size, signs, zeros, infinities and NaN."""
    sizes = torch.logspace(-30, 2, 200_001)
    x = torch.cat([sizes, -sizes, torch.linspace(-10, 10, 200_001), torch.tensor([0.0, -0.0, 1e38, -1e38])])
    graph = record(lambda x: (x.tanh(),), [x])
    expand_tanh(graph)
    assert not any(node.target is torch.ops.aten.tanh.default for node in graph.graph.nodes)
    (found,), wanted = graph(x), x.double().tanh()
    units = (found.double() - wanted).abs() / torch.finfo(torch.float32).eps / wanted.abs().clamp_min(1e-37)
    assert units.max() < 3
    ends = torch.tensor([float("inf"), -float("inf"), float("nan")]).expand(len(x) // 3, 3).reshape(-1)
    ends = torch.cat([ends, x[: len(x) - len(ends)]])
    torch.testing.assert_close(graph(ends)[0][:3], torch.tensor([1.0, -1.0, float("nan")]), equal_nan=True)


def test_tanh_of_double_precision_stays():
    graph = record(lambda x: (x.tanh(),), [torch.zeros(3, dtype=torch.float64)])
    expand_tanh(graph)
    assert any(node.target is torch.ops.aten.tanh.default for node in graph.graph.nodes)


@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("shape", [(32, 8, 50), (50, 32, 8), (32, 50, 1), (1, 32, 50), (20, 1, 30), (4, 3, 2)])
def test_products_in_every_orientation(batch, shape):
    """Of stored, computed and transposed factors."""
    rows, inner, columns = shape
    left, right = torch.randn(*batch, inner, rows).double(), torch.randn(*batch, columns, inner).double()

    def function(left, right):
        plain = left.mT.contiguous() @ right.mT
        return plain, left.mT @ (right * 2).mT, (left.exp().mT @ right.mT.contiguous()).reshape(-1)

    graph = record(function, [left, right])
    expand_small_products(graph, largest=10**6)
    assert not any("mm" in str(node.target) for node in graph.graph.nodes)
    for got, wanted in zip(graph(left, right), function(left, right), strict=True):
        assert got.stride() == wanted.stride()
        torch.testing.assert_close(got, wanted)


def step(z, noise, rows):
    """A step of a net: gather, product, tanh, a result in two shapes, and an input handed through."""
    hidden = (X[rows] @ z.reshape(8, 5)).tanh()
    return z + noise * hidden.sum(), hidden.sum(0), rows


def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(40, generator=generator), torch.randn(40, generator=generator), torch.arange(seed, seed + 6)


@pytest.fixture(scope="module")
def compiled():
    """The program of ``step``, and whether it calls its kernel directly."""
    seen, original = [], one_kernel.one_kernel

    def noted(*args):
        seen.append(original(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.recording.one_kernel", noted)
        program = run_inductor(record(step, inputs(0)), inputs(0))
    return program, seen[0]


def test_one_kernel_is_called_directly(compiled):
    assert compiled[1] is not None


def test_results_are_of_this_calls_inputs_and_stay(compiled):
    """The memory is kept between calls, but what a call returned is the caller's."""
    program, _ = compiled
    kept = [program(*inputs(seed)) for seed in range(4)]
    for seed, found in enumerate(kept):
        for got, wanted in zip(found, step(*inputs(seed)), strict=True):
            torch.testing.assert_close(got, wanted)


def test_inputs_that_were_one_tensor_are_several():
    """As minibatches of several steps in one program, which are recorded with the same example."""
    z, x, y = torch.randn(3, 5)
    program = run_inductor(record(lambda z, a, b: (z + a.sin() - b.exp(),), [z, x, x]), [z, x, x])
    torch.testing.assert_close(program(z, x, y)[0], z + x.sin() - y.exp())


def test_inputs_of_other_strides():
    """As data that a user transposed: the strides of the example are written into what is compiled."""
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    program = run_inductor(record(lambda a, b: (a.sin() * b + b.sum(1, keepdim=True),), [x, y]), [x, y])
    turned, sliced = torch.randn(4, 3).T, torch.randn(3, 8)[:, ::2]
    torch.testing.assert_close(program(turned, sliced)[0], turned.sin() * sliced + sliced.sum(1, keepdim=True))


def test_a_call_on_its_own_results(compiled):
    program, _ = compiled
    z, noise, rows = inputs(2)
    wanted = z
    for _ in range(3):
        z, wanted = program(z, noise, rows)[0], step(wanted, noise, rows)[0]
    torch.testing.assert_close(z, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: (x @ x, x.exp()),  # a product of the matrix library
        lambda x: (x + torch.randn(200, 200),),  # random numbers
        lambda x: (x.T, x * 2),  # a view of an input
    ],
)
def test_what_is_more_than_a_kernel_keeps_its_wrapper(function):
    x, seen = torch.randn(200, 200), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bnn.recording.one_kernel", lambda *args: seen.append(one_kernel.one_kernel(*args)))
        program = run_inductor(record(function, [x]), [x])
    assert seen == [None]
    y = torch.randn(200, 200)
    torch.manual_seed(3)
    found = program(y)
    assert len(found) == len(function(y)) and all(part.shape == (200, 200) for part in found)
    assert not torch.equal(found[0], program(x)[0])
