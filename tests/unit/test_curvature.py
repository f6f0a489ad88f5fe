"""Gradients per datum, captured in a recorded model, are autograd's, for every spelling of a layer; or are refused."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import bnn.layers
from bnn.curvature import Capture
from bnn.model_graph import ModelGraph
from bnn.per_datum import Block, PerDatum, Place, per_datum, squares_per_datum
from bnn.recording import record
from support.nets import numbers
from support.spellings import SPELLINGS, net

EXACT = 1e-10  # relative; for float64


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


class Run:
    """A recorded model, its capture, and one differentiable run of it at other values than the capture was tried on."""

    def __init__(self, spelling, curvature, args=None, values=None):
        self.spelling, args = spelling, spelling.arguments() if args is None else args
        self.graph = ModelGraph(spelling.model, args, {}, curvature=curvature)
        assert self.graph.graph is not None, self.graph.cause
        rows = [torch.randperm(plate.size)[: plate.batch_size] for plate in self.graph.plates]
        self.inputs = self.graph.inputs((args, {}), rows)
        self.capture = Capture(self.graph, self.inputs, self.graph.parameters)
        if values is None:
            values = {k: v + 0.1 * torch.randn_like(v) for k, v in self.graph.values_at_recording.items()}
        self.evaluate(values)

    def evaluate(self, values):
        self.values = {name: value.detach().requires_grad_() for name, value in values.items()}
        keep = self.capture.sources(list(self.capture.uses))
        self.terms, self.env = self.graph(
            self.values, self.inputs, self.graph.parameters, wanted=lambda key: key[0] == "probe", keep=keep
        )

    def data(self, site):
        """The data of a site, told apart by plates and not by the capture: a list of (observed site, entry) each."""
        found = {}
        for name, observed in self.graph.observed.items():
            for entry in product(*map(range, observed.shape)):
                plates = {plate: entry[dim] for plate, (dim, _) in observed.plates.items()}
                coarse = self.spelling.datum.get(site)
                plates = {coarse: plates[coarse]} if coarse in plates else plates
                found.setdefault(tuple(sorted(plates.items())) or (name, entry), []).append((name, entry))
        return list(found.values())

    def expected(self, probe, site):
        """Gradients of a probe's data with respect to a site, (data, *shape), by one backward pass each."""
        value, result = self.values[site], []
        for entries in self.data(site):
            total = sum((probe[name][entry] for name, entry in entries if name in probe), 0.0 * value.sum())
            result += torch.autograd.grad(total, [value], retain_graph=True)
        return torch.stack(result)

    def grads(self, probe, sites):
        nodes = self.capture.nodes(sites)
        total, outputs = sum(value.sum() for value in probe.values()), [self.env[node] for node in nodes]
        grads = torch.autograd.grad(total, outputs, retain_graph=True, materialize_grads=True)
        return dict(zip(nodes, grads, strict=True))

    def per_datum(self, site, probes=None):
        """The site as a matrix, its first dimension the rows; a vector as one row."""
        shape, uses = self.values[site].shape, self.capture.uses[site]
        shape = (shape[0], shape[1:].numel()) if len(shape) > 1 else (1, shape.numel())
        index = torch.arange(shape[0] * shape[1])
        places = {site: Place(index // shape[1], index % shape[1])}
        probes = self.terms.probes if probes is None else probes
        found = [per_datum(uses, places, shape, self.env, self.grads(probe, [site])) for probe in probes]
        return PerDatum([piece for one in found for piece in one.pieces])

    def dense(self, site, probe):
        """The captured gradients (data, rows, columns), in the order of :meth:`data`."""
        found = self.per_datum(site, [probe])
        starts = dict.fromkeys((block.start, block.count) for _, block in self.capture.uses[site])
        whole = torch.zeros(len(self.data(site)), found.pieces[0][1].shape[2], found.pieces[0][0].shape[2])
        for (start, count), (a, g) in zip(starts, found.pieces, strict=True):
            whole[start : start + count] = torch.einsum("nlr,nlc->nrc", g, a)
        return whole


def close(got, wanted):
    assert got.shape == wanted.shape
    assert (got - wanted).norm() <= EXACT * wanted.norm(), float((got - wanted).norm() / wanted.norm())


def by_name(name):
    return next(spelling for spelling in SPELLINGS if spelling.name == name)


@pytest.mark.parametrize("curvature", ["sampled", "ggn"])
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda spelling: spelling.name)
def test_captured_gradients_are_autograds(spelling, curvature):
    run = Run(spelling, curvature)
    refused = run.capture.unrecognised | dict.fromkeys(run.capture.unused, "unused")
    assert refused.keys() == spelling.refused.keys(), refused
    assert all(words in refused[site] for site, words in spelling.refused.items()), refused
    assert run.capture.uses.keys() == run.values.keys() - refused.keys()
    for site, probe in product(run.capture.uses, run.terms.probes):
        dense, found = run.dense(site, probe), run.per_datum(site, [probe])
        close(dense, run.expected(probe, site).reshape(dense.shape))
        close(found.total(), dense.sum(0))
        close(found.column_gram(), torch.einsum("nrc,nrd->cd", dense, dense))
        close(found.row_gram(), torch.einsum("nrc,nsc->rs", dense, dense))
        close(found.squares(), dense.square().sum(0))
        grads = run.grads(probe, [site])
        squares = squares_per_datum(run.capture.uses[site], site, dense[0].numel(), run.env, grads)
        close(squares, dense.square().sum(0).reshape(-1))
    errors = run.capture.disagreement(run.values, run.inputs, run.graph.parameters, list(run.capture.uses))
    assert all(error < 1e-8 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["conv2d", "(L, N, d)", "attention, batch first", "masked rows", "E[tokens]"])
def test_single_precision(name):
    torch.set_default_dtype(torch.float32)
    run = Run(by_name(name), "sampled")
    assert not run.capture.unrecognised
    errors = run.capture.disagreement(run.values, run.inputs, run.graph.parameters, list(run.values))
    assert all(error < 1e-5 for error in errors.values()), errors


@pytest.mark.parametrize("name", ["conv2d, groups", "positions", "embedding", "sliced vector"])
def test_sums_can_be_recorded(name):
    """As a step of a guide records them, at other values than those it is recorded at."""
    run = Run(by_name(name), "ggn")

    def sums(*tensors):
        run.evaluate(dict(zip(names, tensors, strict=True)))
        return tuple(run.per_datum(site).column_gram() for site in names)

    names, values = list(run.values), list(run.values.values())
    recorded = record(sums, [torch.ones_like(value) for value in values])
    for got, wanted in zip(recorded(*values), sums(*values), strict=True):
        close(got, wanted)


@pytest.mark.parametrize("weight, bias", [("W", "b"), ("V", "c")])
@pytest.mark.parametrize("turned", [False, True], ids=["as it is", "transposed"])
def test_a_weight_and_its_bias_in_one_matrix(weight, bias, turned):
    """The bias in the first column, or the first row, as guides lay them out."""
    shapes = {"W": (5, 4), "b": (5,), "V": (2, 5), "c": (2,)}
    scaled = net("", lambda x, W, b, V, c: F.linear(F.linear(x, W / 2, 3 * b).tanh(), V / 2, 3 * c), **shapes)
    run = Run(scaled, "ggn")
    rows, columns = shapes[weight][0], shapes[weight][1] + 1
    where = torch.arange(rows * columns).reshape(rows, columns)
    across, along = where // columns, where % columns
    if turned:
        across, along, rows, columns = along, across, columns, rows
    places = {
        site: Place(across[part].reshape(-1), along[part].reshape(-1))
        for site, part in ((weight, (slice(None), slice(1, None))), (bias, (slice(None), 0)))
    }
    uses = list({id(use): (use, block) for site in places for use, block in run.capture.uses[site]}.values())
    for probe in run.terms.probes:
        found = per_datum(uses, places, (rows, columns), run.env, run.grads(probe, list(places)))
        ((a, g),) = found.pieces
        assert turned or a.shape[1] == 1, "the bias is an input that is always 1"
        dense = torch.einsum("nlr,nlc->nrc", g, a)
        joined = torch.cat([run.expected(probe, bias)[..., None], run.expected(probe, weight)], 2)
        close(dense, joined.mT if turned else joined)


@pytest.mark.parametrize("places, columns, rows", [(1, 3, 2), (2, 4, 3), (7, 3, 2), (5, 1, 1)])
@pytest.mark.parametrize("largest", [1, 1 << 25], ids=["one datum at a time", "at once"])
def test_sums_are_those_of_the_gradients(places, columns, rows, largest, monkeypatch):
    monkeypatch.setattr("bnn.per_datum.LARGEST_GRADIENTS", largest)
    pieces = [(torch.randn(n, places, columns), torch.randn(n, places, rows)) for n in (4, 3)]
    one = PerDatum(pieces)
    right, left = torch.randn(columns, 5), torch.randn(rows, 2)
    for found, transform in (
        (one, lambda G: G),
        (one.transformed(right, None), lambda G: G @ right),
        (one.transformed(None, left), lambda G: left.T @ G),
        (one.transformed(right, left), lambda G: left.T @ G @ right),
    ):
        G = torch.cat([transform(g.mT @ a) for a, g in pieces])
        close(found.total(), G.sum(0))
        close(found.column_gram(), (G.mT @ G).sum(0))
        close(found.row_gram(), (G @ G.mT).sum(0))
        close(found.squares(), G.square().sum(0))


# ---- Kronecker factors


def kronecker_and_exact(run, site):
    inputs, outputs = run.per_datum(site).second_moments()
    vectors = torch.cat([run.dense(site, probe).flatten(1) for probe in run.terms.probes])
    return torch.kron(outputs, inputs), vectors.T @ vectors


def test_kronecker_factors_of_a_linear_layer_with_gaussian_output_are_exact():
    close(*kronecker_and_exact(Run(net("", lambda x, W: x @ W.T, W=(3, 4)), "ggn"), "W"))


@pytest.mark.parametrize("site", ["W", "V"])
def test_kronecker_factors_of_one_datum_are_exact(site):
    spelling = by_name("Bernoulli")
    close(*kronecker_and_exact(Run(spelling, "sampled", [spelling.arguments()[0][:1]]), site))


def test_kronecker_factors_are_not_exact_in_general():
    kronecker, exact = kronecker_and_exact(Run(by_name("Bernoulli"), "ggn"), "W")
    assert (kronecker - exact).norm() > 0.01 * exact.norm()


def test_a_convolution_with_one_location_is_linear():
    images = numbers(6, 2, 3, 4, seed=9)
    conv = net("", lambda x, W, b: F.conv2d(x, W, b).flatten(1), W=(3, 2, 3, 4), b=(3,))
    linear = net("", lambda x, W, b: F.linear(x.flatten(1), W.flatten(1), b), W=(3, 2, 3, 4), b=(3,))
    first = Run(conv, "ggn", [images])
    second = Run(linear, "ggn", [images], values=first.values)
    for got, wanted in zip(*(run.per_datum("W").second_moments() for run in (first, second)), strict=True):
        close(got, wanted)


# ---- the self-check


def as_if_places_came_first(self, x):
    return x.reshape(-1, self.count, x.shape[-1]).transpose(0, 1)


def as_if_places_came_last(self, x):
    return x.reshape(self.count, -1, x.shape[-1])


def of_the_next_datum(self, x, by_datum=Block.by_datum):
    return by_datum(self, x).roll(1, 0)


@pytest.mark.parametrize(
    "name, site, fault",
    [
        ("(N, L, d)", "W", as_if_places_came_first),
        ("(N, L, d)", "b", as_if_places_came_first),
        ("(L, N, d)", "W", as_if_places_came_last),
        ("recurrent", "V", of_the_next_datum),
        ("F.linear", "b", of_the_next_datum),
    ],
)
def test_rows_given_to_the_wrong_datum_show(name, site, fault, monkeypatch):
    """Although the gradient of the whole batch is still right."""
    run = Run(by_name(name), "ggn")
    monkeypatch.setattr(Block, "by_datum", fault)
    for probe in run.terms.probes:
        whole = sum(g.flatten(0, 1).T @ a.flatten(0, 1) for a, g in run.per_datum(site, [probe]).pieces)
        close(whole, run.expected(probe, site).sum(0).reshape(whole.shape))
    error = run.capture.disagreement(run.values, run.inputs, run.graph.parameters, [site])[site]
    assert error > 0.01
    again = Capture(run.graph, run.inputs, run.graph.parameters)
    assert site not in again.uses and "differs from autograd" in again.unrecognised[site]


def test_a_wrong_layout_of_the_data_fits_no_gradients(monkeypatch):
    monkeypatch.setattr(
        Block, "units", lambda self, rows: self.start + (torch.arange(rows) // self.inner + 1) % self.count
    )
    capture = Run(by_name("(N, L, d)"), "ggn").capture
    assert not capture.uses and set(capture.unrecognised) == {"W", "b", "V"}


@pytest.mark.parametrize(
    "fault",
    [
        lambda x, kernel, stride, padding, dilation: (x.mT, kernel[::-1], stride[::-1], padding[::-1], dilation[::-1]),
        lambda x, kernel, stride, padding, dilation: (x.roll(1, 2), kernel, stride, padding, dilation),
        lambda x, kernel, stride, padding, dilation: (x.flip(0), kernel, stride, padding, dilation),
        lambda x, kernel, stride, padding, dilation: (x.flip(1), kernel, stride, padding, dilation),
        lambda x, kernel, stride, padding, dilation: (x[..., :4, :4], kernel, [1, 1], padding, dilation),
    ],
    ids=["turned", "shifted", "other image", "other channel", "other stride"],
)
def test_wrong_patches_of_an_image_show(fault, monkeypatch):
    """The bias, which has no patches, stays captured."""
    right = bnn.layers.patches
    stride_two = net(
        "", lambda x, W, b, V: F.linear(F.conv2d(x, W, b, stride=2).tanh().flatten(1), V), (6, 6),
        W=(3, 2, 2, 2), b=(3,), V=(2, 27),
    )  # fmt: skip
    run = Run(stride_two, "ggn")
    assert set(run.capture.uses) == {"W", "b", "V"}
    monkeypatch.setattr(bnn.layers, "patches", lambda *args: right(*fault(*args)))
    error = run.capture.disagreement(run.values, run.inputs, run.graph.parameters, ["W"])["W"]
    assert error > 0.01
    again = Capture(run.graph, run.inputs, run.graph.parameters)
    assert set(again.uses) == {"b", "V"} and "differs from autograd" in again.unrecognised["W"]


@pytest.mark.parametrize("name", ["embedding", "gain", "attention, batch first", "weights in plates"])
def test_wrong_inputs_or_outputs_of_a_use_show(name):
    run = Run(by_name(name), "sampled")
    for site, uses in run.capture.uses.items():
        for use, _ in uses:
            for attribute in ("inputs", "rows") if use.weight is not None and use.weight.site == site else ("rows",):
                right = getattr(use, attribute)
                setattr(use, attribute, lambda *args, right=right: right(*args).flip(0))
                error = run.capture.disagreement(run.values, run.inputs, run.graph.parameters, [site])[site]
                setattr(use, attribute, right)
                assert error > 0.01, (site, attribute)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_wrong_entries_of_a_site_show(part):
    run = Run(by_name("sliced vector"), "ggn")
    tag = getattr(run.capture.uses["theta"][0][0], part)
    for index, factor in ((tag.index.flip(0), 1.0), (tag.index, 1.01)):
        right, tag.index, tag.factor = tag.index, index, factor
        assert run.capture.disagreement(run.values, run.inputs, run.graph.parameters, ["theta"])["theta"] > 1e-5
        tag.index, tag.factor = right, 1.0


def test_the_self_check_leaves_the_random_numbers_alone():
    run = Run(by_name("dropout"), "sampled")
    state = torch.get_rng_state()
    run.capture.disagreement(run.values, run.inputs, run.graph.parameters, ["W"])
    Capture(run.graph, run.inputs, run.graph.parameters)
    assert torch.equal(state, torch.get_rng_state())


# ---- any net, any spelling


LAYERS = {
    "F.linear": F.linear,
    "@": lambda x, W, b: x @ W.T if b is None else x @ W.T + b,
    "W @ x.T": lambda x, W, b: (W @ x.T).T if b is None else b + (W @ x.T).T,
    "einsum": lambda x, W, b: torch.einsum("oi,ni->no", W, x) if b is None else torch.einsum("oi,ni->no", W, x) + b,
    "conv": lambda x, W, b: F.conv1d(x[..., None], W[..., None], b).squeeze(-1),
}


@settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.generate],  # a failure costs no minutes of shrinking
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    spelled=st.sampled_from([name for name in LAYERS if name != "F.linear"]),
    rows=st.integers(1, 7),
    widths=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    biased=st.booleans(),
)
def test_equal_nets_have_equal_sums(spelled, rows, widths, biased):
    shapes = {}
    for k, (inputs, outputs) in enumerate(zip(widths, widths[1:], strict=False)):
        shapes |= {f"W{k}": (outputs, inputs)} | ({f"b{k}": (outputs,)} if biased else {})

    def mean_by(layer):
        def mean(x, **weights):
            for k in range(len(widths) - 1):
                x = layer(x.tanh(), weights[f"W{k}"], weights.get(f"b{k}"))
            return x

        return mean

    x = numbers(rows, widths[0], seed=10)
    values = {site: numbers(*shape, seed=11) for site, shape in shapes.items()}
    runs = [Run(net(name, mean_by(LAYERS[name]), **shapes), "ggn", [x], values) for name in ("F.linear", spelled)]
    for site in shapes:
        first, second = (run.per_datum(site) for run in runs)
        close(second.column_gram(), first.column_gram())
        close(second.row_gram(), first.row_gram())
        close(second.squares(), first.squares())
