"""Probes add up to the Fisher information: exactly for ``"ggn"``, on average for ``"sampled"``; other squares do not.

Exact is Σ_n J_nᵀ F_n J_n with J by ``torch.func.jacrev`` and F written down for each likelihood.
"""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.func import jacrev

from bnn.curvature import Capture
from bnn.fisher import probes_of
from bnn.model_graph import ModelGraph
from support.nets import normal_prior, numbers
from support.spellings import LIKELIHOODS, ROWS, mlp, net, observe, third

DRAWS = 4000  # of the labels

# Standard errors. With 630 entries and nearly normal averages, a check raises one false alarm in some thousands.
UNBIASED, BIASED = 5.0, 10.0


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def of_classes(f):
    p = f.softmax(-1)
    return torch.diag_embed(p) - p[..., :, None] * p[..., None, :]


def kept(mask):
    return torch.diag_embed(mask.expand(ROWS, 2) / 0.7**2)


# Fisher information (ROWS, k, k) with respect to the outputs f (ROWS, k); the second derivative of minus the expected
# log density.
INFORMATION = {
    "Normal": lambda f: kept(torch.ones(())),
    "StudentT": lambda f: kept(torch.ones(())) * (4 + 1) / (4 + 3),
    "MultivariateNormal": lambda f: torch.linalg.inv(torch.eye(2) + 0.5).expand(ROWS, 2, 2),
    "Bernoulli": lambda f: torch.diag_embed(f.sigmoid() * (-f).sigmoid()),
    "Poisson": lambda f: torch.diag_embed(f.exp()),
    "Categorical": of_classes,
    "OneHotCategorical": of_classes,
    "two Categoricals": lambda f: of_classes(f) + of_classes(-f),
    "masked data": lambda f: kept(third(ROWS)[:, None]),
    "masked entries": lambda f: kept(third(ROWS, 2)),
}
SHAPES = {"W": (5, 4), "b": (5,), "V": (2, 5)}
X = numbers(ROWS, 4, seed=12).double()
THETA = numbers(35, seed=13).double() / 2


def outputs(theta, x=X):
    W, b, V = (part.reshape(shape) for part, shape in zip(theta.split([20, 5, 10]), SHAPES.values(), strict=True))
    return mlp(x, W, b, V)


def exact(name, scale=1.0):
    """Σ_n s_n J_nᵀ F_n J_n."""
    jacobian = jacrev(outputs)(THETA)
    information = INFORMATION[name](outputs(THETA)) * torch.as_tensor(scale).expand(ROWS)[:, None, None]
    return torch.einsum("nkp,nkl,nlq->pq", jacobian, information, jacobian)


def gradients(name, curvature, labels=None, label_samples=1):
    """Gradients of the probes (draws, probes, ROWS, 35) by the chain rule, for independent draws of the labels."""
    draws = 1 if curvature == "ggn" else DRAWS
    f = outputs(THETA).expand(draws, ROWS, 2).clone().requires_grad_()
    result = []
    for probe in probes_of(LIKELIHOODS[name](f), labels, curvature, label_samples).values:
        assert probe.shape == (draws, ROWS)
        result += torch.autograd.grad(probe.sum(), [f], retain_graph=True)
    return torch.einsum("dsnk,nkp->dsnp", torch.stack(result, 1), jacrev(outputs)(THETA))


def largest_z(estimates, wanted):
    """How many standard errors the mean of ``estimates`` (draws, p, p) is away from ``wanted``, at most."""
    error = estimates.std(0) / len(estimates) ** 0.5
    return float(((estimates.mean(0) - wanted).abs() / error.clamp_min(1e-12 * wanted.abs().max())).max())


def close(got, wanted):
    assert got.shape == wanted.shape
    assert (got - wanted).norm() <= 1e-10 * wanted.norm(), float((got - wanted).norm() / wanted.norm())


def test_every_likelihood_of_the_table_is_here():
    assert INFORMATION.keys() == LIKELIHOODS.keys()


@pytest.mark.parametrize("name", INFORMATION)
def test_gauss_newton_probes_add_up_to_the_fisher_information(name):
    (G,) = gradients(name, "ggn")
    close(torch.einsum("snp,snq->pq", G, G), exact(name))


@pytest.mark.parametrize("name", INFORMATION)
def test_sampled_labels_average_to_the_fisher_information(name):
    G = gradients(name, "sampled")
    assert largest_z(torch.einsum("dsnp,dsnq->dpq", G, G), exact(name)) < UNBIASED


def test_more_draws_per_datum_have_the_same_mean_and_a_smaller_error():
    one, four = (gradients("Categorical", "sampled", label_samples=count) for count in (1, 4))
    one, four = (torch.einsum("dsnp,dsnq->dpq", G, G) for G in (one, four))
    assert largest_z(four, exact("Categorical")) < UNBIASED
    ratio = one.var(0).sum() / four.var(0).sum()
    assert 3.5 < ratio < 4.5


def test_the_sum_over_a_batch_has_the_right_square_only_on_average_over_labels():
    """Scores of different data are uncorrelated: without observed labels, the cross terms vanish on average."""
    G = gradients("Bernoulli", "sampled").sum(2)
    assert largest_z(torch.einsum("dsp,dsq->dpq", G, G), exact("Bernoulli")) < UNBIASED


def test_observed_labels_are_biased_even_for_linear_regression():
    """Where the mean is still off by one standard deviation of the noise, the curvature doubles."""
    labels = torch.normal(outputs(THETA).expand(DRAWS, ROWS, 2) + 0.7, 0.7)
    G = gradients("Normal", "empirical", labels)
    squares = torch.einsum("dsnp,dsnq->dpq", G, G)
    assert largest_z(squares, exact("Normal")) > BIASED
    ratio = squares.mean(0).diagonal().sum() / exact("Normal").diagonal().sum()
    assert 1.5 < ratio < 3


def test_the_square_of_the_batch_mean_is_biased():
    """N times the square of the mean over N data is N times too small."""
    G = gradients("Normal", "sampled").mean(2)
    squares = ROWS * torch.einsum("dsp,dsq->dpq", G, G)
    assert largest_z(squares, exact("Normal")) > BIASED
    assert largest_z(squares * ROWS, exact("Normal")) < UNBIASED


def test_labels_do_not_carry_gradients():
    """A reparametrised draw y = f + noise would cancel f in log p(y | f)."""
    f = torch.randn(ROWS, 2, requires_grad=True)
    probe = probes_of(LIKELIHOODS["Normal"](f), None, "sampled").values[0]
    (gradient,) = torch.autograd.grad(probe.sum(), [f])
    assert (gradient != 0).all()


class Unknown(dist.Normal):
    def sample(self, sample_shape=()):
        raise NotImplementedError


def test_likelihoods_without_probes_are_named():
    assert "Laplace" in probes_of(dist.Laplace(0.0, 1.0), torch.zeros(()), "ggn")
    assert "Unknown" in probes_of(Unknown(0.0, 1.0).expand([3]).to_event(1), torch.zeros(3), "sampled")


# ---- the whole way, through the recorded model


def curvature_of(spelling, curvature, values, args):
    """Σ over probes and data of the captured gradients' outer products, over all sites; one matrix for each draw."""
    graph = ModelGraph(spelling.model, args, {}, curvature=curvature)
    rows = [torch.arange(plate.batch_size) for plate in graph.plates]
    inputs = graph.inputs((args, {}), rows)
    capture = Capture(graph, inputs, graph.parameters)
    assert capture.uses.keys() == values.keys()
    values = {name: value.detach().requires_grad_() for name, value in values.items()}
    nodes, keep = capture.nodes(list(values)), capture.sources(list(values))
    terms, env = graph(values, inputs, graph.parameters, wanted=lambda key: key[0] == "probe", keep=keep)
    total = 0.0
    for probe in terms.probes:
        grads = torch.autograd.grad(
            sum(value.sum() for value in probe.values()), [env[node] for node in nodes], retain_graph=True
        )
        grads, parts = dict(zip(nodes, grads, strict=True)), []
        for site, value in values.items():
            whole = torch.zeros(len(args[0]), value.numel())
            for use, block in capture.uses[site]:
                g = block.by_datum(use.rows(grads[use.node], env))
                if use.weight is not None and use.weight.site == site:
                    one = torch.einsum("nlr,nlc->nrc", g, block.by_datum(use.inputs(env).detach()))
                    whole.index_add_(1, use.weight.index.reshape(-1), one.flatten(1))
                if use.bias is not None and use.bias.site == site:
                    whole.index_add_(1, use.bias.index, g.sum(1))
            parts.append(whole)
        G = torch.cat(parts, 1).reshape(-1, ROWS, 35)
        total = total + torch.einsum("dnp,dnq->dpq", G, G)
    return total


def values():
    parts = THETA.split([20, 5, 10])
    return {site: part.reshape(shape) for (site, shape), part in zip(SHAPES.items(), parts, strict=True)}


@pytest.mark.parametrize(
    "around, scale",
    [
        (lambda: poutine.scale(scale=1.0), 5.0),
        (lambda: poutine.scale(scale=3.0), 15.0),
        (lambda: poutine.scale(scale=torch.arange(1.0, ROWS + 1)), 5 * torch.arange(1.0, ROWS + 1)),
        (lambda: poutine.mask(mask=torch.arange(ROWS) % 2 == 0), 5 * (torch.arange(ROWS) % 2 == 0)),
    ],
    ids=["plate", "number", "tensor", "mask"],
)
@pytest.mark.parametrize("name", ["Normal", "Categorical"])
def test_plates_scales_and_masks_count(name, around, scale):
    """A plate that shows a fifth of its rows counts them five times, and so does their curvature."""
    spelling = net("", mlp, likelihood=name, around=around, **SHAPES)
    (found,) = curvature_of(spelling, "ggn", values(), [X])
    close(found, exact(name, scale))


@pytest.mark.parametrize("name", ["Bernoulli", "OneHotCategorical"])
def test_recorded_labels_are_drawn_anew_for_every_datum(name):
    """Many copies of the rows in one batch are as many draws."""
    spelling = net("", mlp, likelihood=name, **SHAPES)
    found = curvature_of(spelling, "sampled", values(), [X.repeat(DRAWS, 1)])
    assert found.shape == (DRAWS, 35, 35)
    assert largest_z(found, exact(name, 5.0)) < UNBIASED


@pytest.mark.parametrize("curvature", ["ggn", "sampled"])
def test_a_location_that_depends_on_no_site_has_no_curvature(curvature):
    """Only the scale is learned: its gradients are seen with sampled labels, and not by the Gauss-Newton matrix."""

    def model(x):
        w = pyro.sample("w", normal_prior(4))
        with pyro.plate("data", len(x)):
            observe("y", dist.Normal(0.0, (x @ w).exp()))

    graph = ModelGraph(model, [X], {}, curvature=curvature)
    capture = Capture(graph, graph.inputs(([X], {}), []), graph.parameters)
    if curvature == "ggn":
        assert "zero" in capture.unrecognised["w"]
    else:
        assert capture.uses.keys() == {"w"}
