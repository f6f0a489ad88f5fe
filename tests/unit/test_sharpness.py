"""Curvature of recorded potentials: against dense matrices, exact quadratures, and what rescaling leaves alone."""

import functools
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from scipy.sparse.linalg import aslinearoperator
from torch import nn

import bnn
from bnn import CurvatureOperator, Potential, box_sharpness, spectral_density, top_eigenvalues
from support.checks import ALPHA

ROWS, CLASSES = 13, 3


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


@functools.cache
def classification(batch_size=None, activation=nn.Tanh, bias=True, prior=None, rows=ROWS):
    """A potential of a 2-6-3 net, its net, inputs, labels and a position."""
    net = nn.Sequential(nn.Linear(2, 6, bias=bias), activation(), nn.Linear(6, CLASSES, bias=bias))
    model = bnn.bayesian(net, prior=prior, likelihood=bnn.likelihoods.Categorical(), batch_size=batch_size)
    generator = torch.Generator().manual_seed(2)
    x, y = torch.randn(rows, 2, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)
    potential = Potential(model, x, y)
    return potential, net, x, y, torch.randn(potential.dim, generator=generator)


def outputs(potential, net, x):
    return lambda z: torch.func.functional_call(net, potential.constrain(z), (x,))


def dense(potential, net, x, y, z, matrix):
    """The data's part of a matrix by autograd, without anything of the library."""
    f = outputs(potential, net, x)
    if matrix == "hessian":
        loss = nn.functional.cross_entropy
        return torch.autograd.functional.hessian(lambda z: loss(f(z), y, reduction="sum"), z).numpy()
    jacobian, p = torch.func.jacrev(f)(z), f(z).softmax(-1)
    if matrix == "ggn":
        information = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        return torch.einsum("nka,nkl,nlb->ab", jacobian, information, jacobian).numpy()
    rows = torch.func.jacrev(lambda z: f(z).log_softmax(-1)[torch.arange(ROWS), y])(z)
    return (rows.T @ rows).numpy()


@pytest.mark.parametrize("batch_size", [None, 4, 5], ids=["all", "4 of 13", "5 of 13"])
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical_fisher"])
def test_matrices_are_those_of_autograd(matrix, batch_size):
    """To rounding, whatever the minibatch; the prior N(0, s²) adds 1/s² on the diagonal."""
    potential, net, x, y, z = classification(batch_size)
    expected = dense(potential, net, x, y, z, matrix)
    found = CurvatureOperator(potential, z, matrix=matrix, prior=False).to_dense()
    np.testing.assert_allclose(found, expected, atol=1e-12)
    prior = np.concatenate([[1.0 / potential.model.law(n).stddev.flatten()[0] ** 2] * s.shape.numel()
                            for n, s in potential.sites.items()])  # fmt: skip
    found = CurvatureOperator(potential, z, matrix=matrix).to_dense()
    np.testing.assert_allclose(found, expected + np.diag(prior), atol=1e-12)


def test_drawn_labels_give_the_gauss_newton_matrix_in_mean():
    """vᵀFv of R draws of the labels is a mean of R n independent numbers of known variance; and stays as drawn."""
    draws, rows = 3, 500
    potential, net, x, y, z = classification(150, rows=rows)
    v = torch.randn(potential.dim)
    operator = CurvatureOperator(potential, z, matrix="fisher", prior=False, label_samples=draws)
    found = v.numpy() @ (operator @ v.numpy())
    assert found == v.numpy() @ (operator @ v.numpy())
    f = outputs(potential, net, x)
    p = f(z).softmax(-1)
    slopes = torch.func.jacrev(lambda z: f(z).log_softmax(-1))(z) @ v  # (rows, classes)
    mean = (p * slopes**2).sum(-1)
    variance = (p * slopes**4).sum(-1) - mean**2
    ggn = CurvatureOperator(potential, z, matrix="ggn", prior=False)
    assert float(mean.sum()) == pytest.approx(v.numpy() @ (ggn @ v.numpy()))
    error = math.sqrt(float(variance.sum()) / draws)
    assert abs(found - float(mean.sum())) < 5.0 * error and error < 0.1 * found  # ALPHA = 6e-7


def test_each_draw_of_the_labels_is_another():
    """Two draws are not one twice."""
    potential, *_, z = classification(4)
    found = []
    for label_samples in (1, 2):
        pyro.set_rng_seed(1)
        operator = CurvatureOperator(potential, z, matrix="fisher", prior=False, label_samples=label_samples)
        found.append(operator.to_dense())
    assert np.abs(found[0] - found[1]).max() > 0.01


def regression(y, size):
    """A mean and a learned scale; the scale's coordinate is its logarithm."""
    mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
    scale = pyro.sample("scale", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=size) as rows:
        pyro.sample("y", dist.Normal(mean, scale), obs=y[rows])


@pytest.mark.parametrize("compile", ["auto", "handlers"])
def test_constrained_sites_and_models_that_are_not_recorded(compile):
    """In z = (mean, log scale): the Hessian by hand, prior and Jacobian included."""
    y, (mean, scale) = torch.randn(20) + 1.0, (0.7, 1.3)
    potential = Potential(regression, y, 3, compile=compile)
    at = {"mean": torch.tensor(mean), "scale": torch.tensor(scale)}
    r = (y - mean).numpy()
    expected = np.array([[20.0, 2 * r.sum()], [2 * r.sum(), 2 * (r**2).sum()]]) / scale**2
    np.testing.assert_allclose(CurvatureOperator(potential, at, prior=False).to_dense(), expected, rtol=1e-10)
    prior = np.diag([0.25, 1.0])  # −log LogNormal(s) − log s is ½ (log s)²
    np.testing.assert_allclose(CurvatureOperator(potential, at).to_dense(), expected + prior, rtol=1e-10)
    ggn = CurvatureOperator(potential, at, matrix="ggn").to_dense()
    np.testing.assert_allclose(ggn, np.diag([20 / scale**2, 0.0]) + prior, rtol=1e-10, atol=1e-12)


def proportion(y):
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Bernoulli(p), obs=y)


@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_the_jacobian_belongs_to_the_prior(matrix):
    """In z = logit p the data have the curvature n p(1−p), and the prior with its Jacobian, p²(1−p)³, 5 p(1−p)."""
    potential, p = Potential(proportion, torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0])), 0.3
    for prior, count in ((True, 11), (False, 6)):
        operator = CurvatureOperator(potential, {"p": torch.tensor(p)}, matrix=matrix, prior=prior)
        assert operator.to_dense() == pytest.approx(count * p * (1 - p), rel=1e-10)


def test_drawn_labels_know_the_scale():
    """Sums of n terms (ε/s)², of variance 2/s⁴, and (ε² − 1)², of mean 2 and variance 56."""
    n, at = 20_000, {"mean": torch.tensor(0.7), "scale": torch.tensor(1.3)}
    potential = Potential(regression, torch.randn(n), 9000)
    fisher = CurvatureOperator(potential, at, matrix="fisher", prior=False).to_dense()
    for found, mean, variance in [(fisher[0, 0], 1 / 1.3**2, 2 / 1.3**4), (fisher[1, 1], 2.0, 56.0)]:
        assert abs(found - n * mean) < 5.0 * math.sqrt(n * variance)


def test_flat_priors_have_no_curvature():
    potential, *_, z = classification(prior=bnn.priors.Flat())
    with_prior, without = (CurvatureOperator(potential, z, prior=flag).to_dense() for flag in (True, False))
    np.testing.assert_allclose(with_prior, without, atol=1e-12)


def test_at_the_values_of_a_guide():
    potential, _, x, y, _ = classification()
    guide = AutoDelta(potential.model)
    Trace_ELBO().loss(potential.model, guide, x, y)
    operator = CurvatureOperator(potential, guide.median())
    flat = potential.unconstrain({k: v.detach()[None] for k, v in guide.median().items()})[0]
    torch.testing.assert_close(operator.position, flat)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_curvlinops_agrees():
    """The peer's matrices of a plain net and its cross-entropy, in its own order of the parameters."""
    curvlinops = pytest.importorskip("curvlinops")
    potential, net, x, y, z = classification()
    for name, value in potential.constrain(z).items():
        net.get_parameter(name).data = value
    parameters = dict(net.named_parameters())
    ours = list(potential.sites)
    assert ours == list(parameters)
    for matrix, peer in (("hessian", curvlinops.HessianLinearOperator), ("ggn", curvlinops.GGNLinearOperator)):
        loss = nn.CrossEntropyLoss(reduction="sum")
        expected = peer(net, loss, list(parameters.values()), [(x, y)]) @ torch.eye(potential.dim)
        found = CurvatureOperator(potential, z, matrix=matrix, prior=False).to_dense()
        np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-12)


# ---- eigenvalues


def symmetric(dim, seed=0):
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(dim, dim)))
    values = np.linspace(-3.0, 10.0, dim) ** 3
    return basis @ np.diag(values) @ basis.T, values


@pytest.mark.parametrize("dim", [30, 300], ids=["dense", "Lanczos"])
@pytest.mark.parametrize("by", ["value", "magnitude"])
def test_top_eigenvalues(dim, by):
    matrix, values = symmetric(dim)
    matrix, values = (-matrix, -values) if by == "magnitude" else (matrix, values)
    found = top_eigenvalues(aslinearoperator(matrix), 3, by=by, tolerance=1e-10)
    order = np.argsort(-np.abs(values) if by == "magnitude" else -values)[:3]
    np.testing.assert_allclose(found.values, values[order], rtol=1e-8)
    np.testing.assert_allclose(np.linalg.norm(found.vectors, axis=1), 1.0)
    np.testing.assert_allclose(
        found.residuals,
        np.linalg.norm(found.vectors @ matrix - found.values[:, None] * found.vectors, axis=1),
        atol=1e-9,
    )


def test_top_eigenvalues_of_a_net():
    potential, net, x, y, z = classification()
    expected = np.linalg.eigvalsh(dense(potential, net, x, y, z, "hessian"))[::-1][:4]
    found = top_eigenvalues(CurvatureOperator(potential, z, prior=False), 4)
    np.testing.assert_allclose(found.values, expected, rtol=1e-10)


def test_eigenvalues_follow_the_seed():
    matrix, _ = symmetric(300)
    found = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        found.append(top_eigenvalues(aslinearoperator(matrix), 2).vectors)
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize("steps", [1, 3, 6])
def test_quadrature_is_exact_up_to_its_degree(steps):
    """For each probe v: Σ w λᵏ = vᵀCᵏv / d for k ≤ 2 steps − 1, and not for the next power."""
    matrix, _ = symmetric(40)
    matrix = matrix / 500.0
    pyro.set_rng_seed(1)
    found = spectral_density(aslinearoperator(matrix), probes=3, steps=steps)
    pyro.set_rng_seed(1)
    v = (torch.randint(2, (40, 3)).numpy() * 2.0 - 1.0).T / math.sqrt(40)

    def forms(power):
        return np.einsum("pi,ij,pj->p", v, np.linalg.matrix_power(matrix, power), v)

    for power in range(2 * steps):
        np.testing.assert_allclose((found.weights * found.nodes**power).sum(1), forms(power), rtol=1e-9, atol=1e-12)
    beyond = (found.weights * found.nodes ** (2 * steps)).sum(1)
    assert (np.abs(beyond / forms(2 * steps) - 1.0) > 1e-8).all()


def test_moments_are_without_bias():
    """vᵀCv of random signs has mean tr C and variance 2 Σ_{i≠j} C_ij², which falls with the number of probes."""
    matrix, values = symmetric(50)
    probes = 20_000
    found, error = spectral_density(aslinearoperator(matrix), probes=probes, steps=1).moment(1)
    sd = math.sqrt(2 * (np.square(matrix).sum() - np.square(np.diag(matrix)).sum())) / 50
    assert abs(found - values.mean()) < 4.9 * sd / math.sqrt(probes)  # ALPHA = 1e-6
    assert error == pytest.approx(sd / math.sqrt(probes), rel=0.05)


def test_a_full_run_has_the_spectrum_itself():
    """As many steps as eigenvalues, of which one is met twice: the nodes are they, and a probe's weights sum to one."""
    values = np.array([-2.0, 0.5, 0.5, 1.0, 7.0])
    found = spectral_density(aslinearoperator(np.diag(values)), probes=50, steps=9)
    for nodes, weights in zip(found.nodes, found.weights, strict=True):
        np.testing.assert_allclose(np.sort(nodes[weights > 1e-12]), [-2.0, 0.5, 1.0, 7.0], atol=1e-10)
    np.testing.assert_allclose(found.weights.sum(1), 1.0)
    grid = np.linspace(-5.0, 10.0, 3001)
    density = found.density(grid, width=0.1)
    assert np.trapezoid(density, grid) == pytest.approx(1.0, rel=1e-6)
    inside = (grid > 0.0) & (grid < 0.75)
    assert np.trapezoid(density[inside], grid[inside]) == pytest.approx(0.4, abs=0.01)
    assert np.isfinite(found.density(grid)).all()


# ---- what is invariant, and what is not


def rescaled(z, potential, units):
    """Weights into each ReLU unit times a, those out of it by 1/a: the same function."""
    a = torch.tensor([0.2, 5.0, 1.0, 3.0, 0.5, 10.0]) if units else torch.full((6,), 4.0)
    values = potential.constrain(z)
    first, second = potential.sites
    return {first: a[:, None] * values[first], second: values[second] / a}


@pytest.mark.parametrize("units", [True, False], ids=["units", "layers"])
@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical_fisher"])
def test_rescaling_a_relu_net(matrix, units):
    """The function stays; the sharpness does not; the one in units of the weights does, to rounding."""
    potential, net, x, y, z = classification(activation=nn.ReLU, bias=False, prior=bnn.priors.Flat())
    other = rescaled(z, potential, units)
    f = outputs(potential, net, x)
    torch.testing.assert_close(torch.func.functional_call(net, other, (x,)), f(z), rtol=1e-12, atol=1e-12)

    def top(at, scaling):
        operator = CurvatureOperator(potential, at, matrix=matrix, scaling=scaling)
        return float(top_eigenvalues(operator).values[0])

    assert max(top(z, "none") / top(other, "none"), top(other, "none") / top(z, "none")) > 1.5
    assert top(other, "elementwise") == pytest.approx(top(z, "elementwise"), rel=1e-9)
    if not units:
        assert top(other, "per_site") == pytest.approx(top(z, "per_site"), rel=1e-9)
    dense_ = CurvatureOperator(potential, z, matrix=matrix).to_dense()
    norms = np.concatenate([[float(potential.constrain(z)[n].norm())] * s.shape.numel() for n, s in
                            potential.sites.items()])  # fmt: skip
    for scaling, d in (("elementwise", np.abs(z.numpy())), ("per_site", norms)):
        found = CurvatureOperator(potential, z, matrix=matrix, scaling=scaling).to_dense()
        np.testing.assert_allclose(found, d[:, None] * dense_ * d, atol=1e-10)


def test_rescaling_and_the_box():
    """The box of Keskar et al. sees the scale; the relative one does not, for an equal search from equal corners."""
    potential, *_, z = classification(activation=nn.ReLU, bias=False, prior=bnn.priors.Flat())
    found = {}
    for relative in (False, True):
        for name, at in (("z", z), ("other", rescaled(z, potential, True))):
            pyro.set_rng_seed(0)
            found[relative, name] = box_sharpness(potential, at, num_data=ROWS, radius=1e-2, relative=relative)
    assert found[True, "z"] == pytest.approx(found[True, "other"], rel=1e-8)
    assert abs(math.log(found[False, "z"] / found[False, "other"])) > 0.2


def box_model(curvature, slope):
    z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1).mask(False))
    pyro.factor("energy", -(0.5 * curvature * (z - 1.0) ** 2 + slope * z).sum() - 6.0)


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("slope", [0.0, 0.5])
@pytest.mark.parametrize("radius", [1e-3, 0.2])
def test_the_box_of_a_quadratic(radius, slope, relative):
    """The maximum of a convex function stands in a corner, here a sum over coordinates: found to rounding."""
    curvature, z = torch.tensor([1.0, 10.0, 0.1]), torch.tensor([1.0, 1.0, 1.0])
    half = radius * (1.0 if relative else 2.0)
    value = 6.0 + 3 * slope
    rise = 0.5 * 11.1 * half**2 + 3 * slope * half
    found = box_sharpness(
        Potential(box_model, curvature, slope), {"z": z}, num_data=4, radius=radius, relative=relative
    )
    assert found == pytest.approx(100 * rise / 4 / (1 + value / 4), rel=1e-9)


def test_a_box_around_a_maximum_has_no_rise():
    potential = Potential(box_model, torch.tensor([-1.0, -10.0, -0.1]), 0.0)
    assert box_sharpness(potential, torch.ones(3), num_data=1, radius=0.1) == pytest.approx(0.0, abs=1e-9)


def looped(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    for i in pyro.plate("data", len(y), subsample_size=2):
        pyro.sample(f"y_{i}", dist.Normal(z, 1.0), obs=y[i])


def kink():
    pyro.factor("root", pyro.sample("z", dist.Normal(0.0, 1.0)).abs().sqrt())


def laplace(y):
    z = pyro.sample("z", dist.HalfNormal(1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Laplace(z, 1.0), obs=y)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        (lambda p, z: CurvatureOperator(p.model, z), ValueError, r"give bnn.Potential\(model, \*args\)"),
        (lambda p, z: CurvatureOperator(p, z, matrix="kfac"), ValueError, "matrix is 'kfac'; give one of 'hessian'"),
        (lambda p, z: CurvatureOperator(p, z, scaling="layer"), ValueError, "scaling is 'layer'; give one of 'none'"),
        (lambda p, z: CurvatureOperator(p, z[:3]), ValueError, r"shape \(3,\); give \(39,\), or a dict"),
        (lambda p, z: CurvatureOperator(p, {"w": z}), ValueError, "values are given for sites"),
        (lambda p, z: CurvatureOperator(p, z * math.nan), ValueError, "not finite"),
        (lambda p, z: CurvatureOperator(p, z, matrix="fisher", label_samples=0), ValueError, "label_samples is 0"),
        (lambda p, z: CurvatureOperator(Potential(kink), z[:1] * 0) @ [1.0], ValueError, "curvature is not finite"),
        (lambda p, z: top_eigenvalues(CurvatureOperator(p, z), 40), ValueError, "count is 40, but the operator has 39"),
        (lambda p, z: top_eigenvalues(CurvatureOperator(p, z), 0), ValueError, "count is 0"),
        (lambda p, z: top_eigenvalues(CurvatureOperator(p, z), by="size"), ValueError, "by is 'size'; give 'value'"),
        (lambda p, z: top_eigenvalues(CurvatureOperator(p, z), tolerance=0.0), ValueError, "tolerance is 0.0"),
        (lambda p, z: spectral_density(CurvatureOperator(p, z), probes=0), ValueError, "probes is 0"),
        (lambda p, z: spectral_density(CurvatureOperator(p, z), steps=1.5), ValueError, "steps is 1.5"),
        (lambda p, z: spectral_density(CurvatureOperator(p, z), steps=3).density([0.0], -1.0), ValueError, "width is"),
        (lambda p, z: box_sharpness(p, z, num_data=13, radius=-1.0), ValueError, "radius is -1.0; give a positive"),
        (lambda p, z: box_sharpness(p, z, num_data=0), ValueError, "num_data is 0"),
        (lambda p, z: box_sharpness(p, z, num_data=13, starts=0), ValueError, "starts is 0"),
        (lambda p, z: box_sharpness(p, z, num_data=13, iterations=0), ValueError, "iterations is 0"),
    ],
)
def test_what_is_refused(given, error, words):
    potential, *_, z = classification()
    with pytest.raises(error, match=words):
        given(potential, z)


def test_losses_that_fall_below_minus_one_are_refused():
    potential = Potential(box_model, torch.ones(3), -10.0)
    with pytest.raises(ValueError, match=r"the loss U/N is -24, and sharpness is its rise in parts of 1 \+ U/N"):
        box_sharpness(potential, torch.ones(3), num_data=1)


def test_likelihoods_and_data_of_which_only_the_hessian_is_known():
    with pytest.raises(NotImplementedError, match="site 'y' is not known: curvature='ggn' knows Bernoulli"):
        CurvatureOperator(Potential(laplace, torch.randn(5)), torch.zeros(1), matrix="ggn")
    with pytest.warns(RuntimeWarning, match="cannot be recorded"):
        potential = Potential(looped, torch.randn(6))
    assert CurvatureOperator(potential, torch.zeros(1)).to_dense() == pytest.approx(7.0)
    with pytest.raises(NotImplementedError, match="site 'y_[0-5]' lies in a subsampled plate that is looped over"):
        CurvatureOperator(potential, torch.zeros(1), matrix="ggn")

    def batched(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", 6, subsample_size=len(y)):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    potential = Potential(batched, batches=[(torch.randn(2),) for _ in range(3)])
    assert CurvatureOperator(potential, torch.zeros(1)).to_dense() == pytest.approx(7.0)
    with pytest.raises(NotImplementedError, match="of batches= only matrix='hessian' is known"):
        CurvatureOperator(potential, torch.zeros(1), matrix="fisher")


def test_alpha_is_that_of_the_bounds_in_this_file():
    from scipy import stats

    assert 2 * stats.norm.sf(4.9) < ALPHA and 2 * stats.norm.sf(5.0) < ALPHA
