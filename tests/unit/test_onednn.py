"""Large products go to oneDNN where that is faster, whatever their strides, and are the same."""

import importlib.util

import pytest
import torch
from torch.fx import GraphModule

from bnn import onednn, timings
from bnn.onednn import matmul, product, product_into, use_onednn
from bnn.recording import record, run_fx, run_inductor

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch has no oneDNN here")
TARGETS = {"fx": product, "inductor": torch.ops.bnn.product.default}


@pytest.fixture
def faster(monkeypatch):
    monkeypatch.setattr(onednn, "is_faster", lambda: True)


def matrix(rows, columns, layout, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if layout == "transposed":
        return torch.randn(columns, rows, generator=generator).t()
    if layout == "part":
        return torch.randn(rows, columns + 5, generator=generator)[:, 3:-2]
    if layout == "transposed part":
        return torch.randn(columns, rows + 5, generator=generator)[:, 3:-2].t()
    if layout == "expanded":
        return torch.randn(1, columns, generator=generator).expand(rows, columns)
    return torch.randn(rows, columns, generator=generator)


LAYOUTS = ["contiguous", "transposed", "part", "transposed part", "expanded"]


@pytest.mark.parametrize("one", LAYOUTS)
@pytest.mark.parametrize("two", LAYOUTS)
def test_products_of_all_layouts(one, two):
    """Sums of 130 products of standard normal numbers: rounding stays below 130 times that of the largest."""
    a, b, bias = matrix(70, 130, one), matrix(130, 90, two, seed=1), torch.randn(90)
    exact = a.double() @ b.double()
    torch.testing.assert_close(product(a, b).double(), exact, rtol=0, atol=2e-4)
    torch.testing.assert_close(product(a, b, bias).double(), exact + bias, rtol=0, atol=2e-4)
    out = torch.empty(70, 90)
    assert product_into(a, b, out=out) is out
    torch.testing.assert_close(out.double(), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_layout_takes_oneDNNs_slow_loop(layout):
    """Which takes seconds for this product, in place of a millisecond."""
    import time

    a, b = matrix(200, 700, "contiguous"), matrix(700, 200, layout)
    product(a, b)
    start = time.process_time()
    product(a, b)
    assert time.process_time() - start < 0.1


@pytest.mark.usefixtures("faster")
def test_a_product_that_wants_gradients_has_them():
    a, b = torch.randn(200, 300, requires_grad=True), torch.randn(300, 250)
    with torch.no_grad():
        plain = matmul(a, b)
    found = matmul(a, b)
    assert found.requires_grad and not plain.requires_grad
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)
    (grad,) = torch.autograd.grad(found.sum(), a)
    torch.testing.assert_close(grad, b.sum(1).expand(200, 300))


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("size", "dtype", "ours"), [(300, torch.float32, 1), (100, torch.float32, 0), (300, torch.float64, 0)]
)
def test_which_products_go_to_oneDNN(size, dtype, ours, monkeypatch):
    asked = []
    monkeypatch.setattr(onednn, "product", lambda a, b: asked.append(1) or a @ b)
    matmul(torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype))
    assert len(asked) == ours


def step(x, w, v):
    """Products as in a step: with a bias, transposed, small, and parts of a long vector."""
    inner = torch.addmm(v, x, w.t()).tanh()
    return inner, torch.cat([(inner.t() @ x).reshape(-1), v]), inner[:4] @ w


INPUTS = (torch.randn(200, 300), torch.randn(250, 300), torch.randn(250))


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize("tier", ["fx", "inductor"])
def test_programs_compute_the_same(tier, monkeypatch):
    counted = []
    monkeypatch.setattr(onednn, "_dense", lambda matrix, own=onednn._dense: counted.append(1) or own(matrix))
    graph = record(step, INPUTS)
    program = run_fx(graph) if tier == "fx" else run_inductor(graph, INPUTS)
    counted.clear()
    found = program(*INPUTS)
    assert len(counted) == 4  # two factors of two large products; the third one is small
    expected = step(*(tensor.double() for tensor in INPUTS))
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-4)


def test_the_module_can_be_loaded_again():
    before = torch.ops.bnn.product.default
    again = importlib.util.module_from_spec(onednn.__spec__)
    onednn.__spec__.loader.exec_module(again)
    a = torch.randn(5, 4)
    assert torch.ops.bnn.product.default is before
    torch.testing.assert_close(before(a, a.t(), None), a @ a.t())


def targets(function, inputs, compiled=False):
    graph = record(function, inputs)
    use_onednn(graph, compiled=compiled)
    assert isinstance(graph, GraphModule)
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.usefixtures("faster")
@pytest.mark.parametrize(
    ("function", "inputs"),
    [
        (lambda a, b: (a @ b,), (torch.randn(100, 100), torch.randn(100, 100))),  # small
        (lambda a, b: (a @ b,), (torch.randn(900, 20), torch.randn(20, 900))),  # few terms a number
        (lambda a, b: (a @ b,), (torch.randn(70_000, 64), torch.randn(64, 1))),  # hardly a matrix
        (lambda a, b: (a @ b,), (torch.randn(300, 300).double(), torch.randn(300, 300).double())),
        (lambda a, b: (torch.addmm(a, a, b),), (torch.randn(300, 300), torch.randn(300, 300))),  # no vector is added
        (lambda a, b: (torch.addmm(a[0], a, b, beta=2.0),), (torch.randn(300, 300), torch.randn(300, 300))),
    ],
)
def test_what_stays_with_pytorch(function, inputs):
    assert not set(TARGETS.values()) & set(targets(function, inputs))


@pytest.mark.parametrize(("plain", "other", "expected"), [(2.0, 1.0, True), (1.2, 1.0, False), (1.0, 3.0, False)])
def test_only_where_it_is_a_third_faster(plain, other, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(timings, "cache_folder", lambda: tmp_path)
    onednn.is_faster.cache_clear()
    times = {torch.mm: plain, product: other}
    monkeypatch.setattr(onednn, "_seconds", times.__getitem__)
    assert onednn.is_faster() is expected
    found = targets(lambda a, b: (a @ b,), (torch.randn(300, 300), torch.randn(300, 300)), compiled=True)
    assert (TARGETS["inductor"] in found) is expected
    onednn.is_faster.cache_clear()
    monkeypatch.setattr(onednn, "_seconds", None)  # what was decided once stays
    assert onednn.is_faster() is expected
    onednn.is_faster.cache_clear()
