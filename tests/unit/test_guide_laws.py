"""Natural-gradient guides obey the laws that theory gives them: exact posteriors, exact recursions, exact moments."""

import copy
import math

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI
from scipy import stats

from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
)
from support.checks import variance_p_value
from support.nets import numbers
from support.regression import Regression, divergence, flat, gaussian_of, kron, naturals, objective, train

ONE, THREE = Regression("one", outputs=1), Regression("three")
APART, CORRELATED = Regression("apart", noise="apart"), Regression("correlated", noise="correlated")
MATRICES = [
    ONE,
    THREE,
    Regression("without-bias", bias=False),
    Regression("transposed", spelling="transposed"),
    Regression("convolution", spelling="conv"),
    Regression("one-transposed", outputs=1, spelling="transposed", bias=False),
]
GUIDES = [AutoFactorizedNormal, AutoMatrixNormal, AutoEigenNormal]
STILL = 1e-12  # a rate at which the means do not move
NAMES = [guide.__name__ for guide in GUIDES]
ALPHA = 1e-6  # false-alarm rate of each statistical test; seeds are fixed


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def assert_standard_normal(noise, variance=1.0):
    noise = noise.flatten().double()
    assert variance_p_value(noise.numpy(), variance) > ALPHA, (float(noise.square().mean()), variance)
    z = float(noise.mean()) * math.sqrt(len(noise) / variance)
    assert abs(z) < stats.norm.isf(ALPHA / 2), z


def assert_mean(draws, mean):
    """Each entry of the mean of independent draws (n, ...) is within its standard error of ``mean``."""
    error = draws.std(0) / math.sqrt(len(draws)) + 1e-12 * mean.abs().max()
    z = float(((draws.mean(0) - mean) / error).abs().max())
    assert z < stats.norm.isf(ALPHA / 2 / mean.numel()), z


# ---- fixed points


@pytest.mark.parametrize("problem", [*MATRICES, Regression("wide-bias", bias_scale=2.0)], ids=lambda p: p.name)
def test_matrix_normal_is_the_posterior_in_four_steps(problem):
    guide, kl_weight = AutoMatrixNormal(problem), 0.4 if problem is THREE else 1.0
    losses = train(problem, guide, 4, kl_weight=kl_weight)
    assert divergence(*gaussian_of(guide, problem), problem.posterior(kl_weight)) < 1e-10
    assert losses[-1] == pytest.approx(-problem.log_evidence(kl_weight), abs=1e-8)


@pytest.mark.parametrize("problem", [*MATRICES, APART, CORRELATED], ids=lambda p: p.name)
def test_eigen_normal_is_the_posterior_for_any_noise(problem):
    guide, kl_weight = AutoEigenNormal(problem), 0.4 if problem is CORRELATED else 1.0
    losses = train(problem, guide, 4, kl_weight=kl_weight)
    assert divergence(*gaussian_of(guide, problem), problem.posterior(kl_weight)) < 1e-10
    assert losses[-1] == pytest.approx(-problem.log_evidence(kl_weight), abs=1e-8)


def test_eigen_normal_has_the_posteriors_diagonal_where_its_basis_is_not_the_posteriors():
    problem = Regression("wide-bias", noise="correlated", bias_scale=2.0)
    guide = AutoEigenNormal(problem)
    train(problem, guide, 4, lr=STILL)
    basis = kron(guide.row_basis_0, guide.col_basis_0)
    wanted = (basis.T @ problem.posterior()[1] @ basis).diagonal()
    torch.testing.assert_close(guide.eigen_scales.weight.detach().flatten() ** -2, wanted, rtol=1e-9, atol=0)


@pytest.mark.parametrize(("problem", "kl_weight"), [(APART, 1.0), (CORRELATED, 1.0), (CORRELATED, 0.4)])
def test_matrix_normal_is_the_best_of_its_family(problem, kl_weight):
    guide = AutoMatrixNormal(problem)
    train(problem, guide, 60, lr=STILL, precision_lr=0.5, kl_weight=kl_weight)
    covariance = gaussian_of(guide, problem)[1]
    torch.testing.assert_close(covariance, problem.matrix_normal(kl_weight), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kl_weight", [1.0, 0.4])
def test_factored_damping_is_narrower_than_the_best_of_the_family(kl_weight):
    problem, guide = CORRELATED, AutoMatrixNormal(CORRELATED)
    train(problem, guide, 3, lr=STILL, damping="factored", kl_weight=kl_weight)
    covariance, posterior = gaussian_of(guide, problem)[1], problem.posterior(kl_weight)
    torch.testing.assert_close(covariance, problem.factored(kl_weight), rtol=0, atol=1e-12)
    assert torch.logdet(covariance) < torch.logdet(problem.matrix_normal(kl_weight))
    best = divergence(posterior[0], problem.matrix_normal(kl_weight), posterior)
    assert divergence(posterior[0], covariance, posterior) - best > 0.1


@pytest.mark.parametrize(
    ("guide_class", "particles", "vectorized"),
    [*((guide, 1, False) for guide in GUIDES), (AutoFactorizedNormal, 4, False), (AutoMatrixNormal, 4, True)],
)
def test_means_follow_their_linear_recursion(guide_class, particles, vectorized):
    """M ← M + α [ΣΛ*(M* − M) + (I − ΣΛ*) C ε], ε the mean of the particles' standard normals (stick the landing)."""
    problem, lr, steps = Regression("wide-bias", noise="correlated", bias_scale=2.0), 0.2, 150
    guide = guide_class(problem)
    loss = objective(num_particles=particles, vectorize_particles=vectorized)
    train(problem, guide, 80, 0.05, 0.5, loss=loss)
    optimizer = NaturalGradientDescent(lr, precision_lr=0.0)
    svi, path = SVI(problem, guide, optimizer, loss), []
    for _ in range(steps):
        path.append(gaussian_of(guide, problem)[0].clone())
        svi.step(*problem.args)
    covariance, (mean, precision) = gaussian_of(guide, problem)[1], problem.posterior()
    pull = covariance @ precision
    if guide_class is AutoFactorizedNormal:  # the fixed point of its precision
        torch.testing.assert_close(1 / covariance.diagonal(), precision.diagonal(), rtol=1e-9, atol=0)
    path = torch.stack(path)
    rest = (path[1:] - path[:-1]) / lr - (mean - path[:-1]) @ pull.T
    noise = torch.linalg.solve((torch.eye(len(mean)) - pull) @ torch.linalg.cholesky(covariance), rest.T)
    assert_standard_normal(noise, 1 / particles)


def test_normal_locations_in_several_plates():
    """Conjugate models: the precision is exact after one step of length 1, the mean after two."""
    a, b, ones = numbers(7, seed=11) + 1, numbers(5, 3, seed=12) - 1, torch.ones(7, 1)

    def model():
        location = pyro.sample("location", dist.Normal(torch.zeros(1), 2.0).to_event(1))
        others = pyro.sample("others", dist.Normal(torch.zeros(3), 1.5).to_event(1))
        with pyro.plate("a", 7):
            pyro.sample("of_a", dist.Normal(ones @ location, 0.5), obs=a)
        with pyro.plate("columns", 3, dim=-1), pyro.plate("b", 5, dim=-2):
            pyro.sample("of_b", dist.Normal(ones[:5] @ others[None], 2.0), obs=b)

    guide = AutoFactorizedNormal(model)
    losses = train(model, guide, 4, args=())
    precision = torch.tensor([1 / 4 + 7 / 0.25] + 3 * [1 / 2.25 + 5 / 4])
    totals = torch.cat([torch.atleast_1d(a.sum() / 0.25), b.sum(0) / 4])
    torch.testing.assert_close(guide.scale.detach() ** -2, precision, rtol=1e-10, atol=0)
    torch.testing.assert_close(guide.loc.detach(), totals / precision, rtol=1e-10, atol=0)
    evidence = dist.MultivariateNormal(torch.zeros(7), 0.25 * torch.eye(7) + 4.0).log_prob(a)
    evidence = evidence + dist.MultivariateNormal(torch.zeros(5), 4.0 * torch.eye(5) + 2.25).log_prob(b.T).sum()
    assert losses[-1] == pytest.approx(-float(evidence), abs=1e-8)


# ---- motion of the precisions


@pytest.mark.parametrize("guide_class", GUIDES, ids=NAMES)
def test_precisions_approach_their_targets_exponentially(guide_class):
    """Λ_t − Λ* = (1−ρ)^t (Λ_0 − Λ*); the eigenbasis is held at the unit matrices."""
    problem, rate = ONE if guide_class is AutoMatrixNormal else CORRELATED, 0.3
    guide = guide_class(problem)
    loss = objective(inverses_every=1000 if guide_class is AutoEigenNormal else 1)
    guide(*problem.args)
    target = problem.posterior()[1]
    target = target if guide_class is AutoMatrixNormal else target.diagonal().diag()
    start = torch.linalg.inv(gaussian_of(guide, problem)[1]) - target
    for step in range(1, 9):
        train(problem, guide, 1, STILL, rate, loss=loss)
        rest = torch.linalg.inv(gaussian_of(guide, problem)[1]) - target
        torch.testing.assert_close(rest, (1 - rate) ** step * start, rtol=1e-8, atol=1e-8 * float(start.norm()))


@pytest.mark.parametrize("guide_class", GUIDES, ids=NAMES)
def test_rarer_statistics_and_factors_leave_the_fixed_point(guide_class):
    problem = Regression("three-by-two", rows=16)
    target = problem.posterior()
    guide = guide_class(problem)
    train(
        problem,
        guide,
        13,
        1.0 if guide_class is not AutoFactorizedNormal else STILL,
        statistics_every=2,
        inverses_every=4,
    )
    mean, covariance = gaussian_of(guide, problem)
    if guide_class is AutoFactorizedNormal:
        target = (mean, target[1].diagonal().diag())
    assert divergence(mean, covariance, target) < 1e-10


def test_one_update_of_a_factor_counts_for_all_its_statistics():
    """With statistics every 2 steps and factors every 6, the precision has moved as often as there were statistics."""
    problem, rate = ONE, 0.1
    guide, loss = AutoMatrixNormal(problem), objective(statistics_every=2, inverses_every=6)
    guide(*problem.args)
    target = problem.posterior()[1]
    start = torch.linalg.inv(gaussian_of(guide, problem)[1]) - target
    counts = []
    for _ in range(18):
        train(problem, guide, 1, STILL, rate, loss=loss)
        rest = torch.linalg.inv(gaussian_of(guide, problem)[1]) - target
        counts.append(round(math.log(rest.norm() / start.norm()) / math.log(1 - rate), 4))
    assert counts[-1] in range(7, 10) and all(count == int(count) for count in counts), counts


def test_tempering_is_replication():
    """Every datum k times at kl_weight k: the same steps, and k times the loss."""
    once, paths = ONE, []
    for k in (1, 3):
        pyro.clear_param_store()  # Pyro looks parameters up by name, and the guides' are the same
        pyro.set_rng_seed(0)
        guide, args = AutoMatrixNormal(once), tuple(torch.cat(k * [t]) for t in once.args)
        guide(*args)
        pyro.set_rng_seed(1)
        losses = train(once, guide, 6, 0.3, 0.2, args=args, kl_weight=float(k), trust_region=1.0)
        paths.append((torch.tensor(losses) / k, *gaussian_of(guide, once)))
    torch.testing.assert_close(*paths, rtol=1e-9, atol=1e-9)


# ---- estimates


@pytest.mark.parametrize("guide_class", GUIDES[:2], ids=NAMES[:2])
def test_minibatches_of_an_epoch_average_to_the_whole(guide_class):
    """Exactly, at a guide so narrow that its draws do not matter."""
    problem = Regression("wide-bias", noise="correlated", bias_scale=2.0)
    guide = guide_class(problem, init_scale=1e-9)
    settings = {"stick_the_landing": False}
    gradient, target = naturals(guide, problem, **settings)
    loss, name = objective(**settings), "scale" if guide_class is AutoFactorizedNormal else "col_scale_trils.weight"
    found = [naturals(guide, problem, *problem.args, 3, loss=loss) for _ in range(problem.rows // 3)]
    location = "loc" if guide_class is AutoFactorizedNormal else "locs.weight"
    mean = torch.stack([g[location] for g, _ in found]).mean(0)
    torch.testing.assert_close(mean, gradient[location], rtol=1e-6, atol=1e-6 * float(gradient[location].norm()))
    mean = torch.stack([t[name] for _, t in found]).mean(0)
    torch.testing.assert_close(mean, target[name], rtol=1e-6, atol=1e-9 * float(target[name].norm()))


LIKELIHOODS = {
    "Normal": (lambda s: dist.Normal(s, 0.5).to_event(1), lambda s: 4.0 * torch.eye(3).expand(len(s), 3, 3)),
    "Categorical": (
        lambda s: dist.Categorical(logits=s),
        lambda s: torch.diag_embed(s.softmax(-1)) - s.softmax(-1)[:, :, None] * s.softmax(-1)[:, None],
    ),
    "Poisson": (lambda s: dist.Poisson(s.exp()).to_event(1), lambda s: torch.diag_embed(s.exp())),
    "Bernoulli": (
        lambda s: dist.Bernoulli(logits=s).to_event(1),
        lambda s: torch.diag_embed(s.sigmoid() * (-s).sigmoid()),
    ),
}


@pytest.mark.parametrize("label_samples", [1, 3])
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_sampled_labels_estimate_the_fisher_information(name, label_samples):
    likelihood, information = LIKELIHOODS[name]
    x = numbers(6, 2, seed=13)

    def model():
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, 2), 1.0).to_event(2))
        with pyro.plate("data", 6):
            fn = likelihood(x @ weight.T)
            pyro.sample("obs", fn, obs=torch.ones(fn.shape()))

    guide = AutoFactorizedNormal(model, init_scale=1e-7)
    loss = objective("sampled", label_samples=label_samples)
    draws = torch.stack([naturals(guide, model, loss=loss)[1]["scale"] for _ in range(1000 // label_samples)])
    scores = information(x @ guide.loc.detach().reshape(3, 2).T).diagonal(dim1=-2, dim2=-1)
    fisher = scores.T @ x.square() + 1.0
    assert_mean(draws * 1e14, fisher.flatten())


@pytest.mark.filterwarnings("ignore:the curvature of some sites:RuntimeWarning")
@pytest.mark.parametrize(
    ("curvature", "site"),
    [("sampled", "mean"), ("sampled", "sd"), ("ggn", "mean"), ("ggn", "sd"), ("empirical", "mean")],
)
def test_curvature_of_sites_that_no_layer_uses(curvature, site):
    """As for layers, though there are only gradients of the whole batch: N/σ² for a mean, 2N for the log of an sd."""
    y, width = numbers(7, seed=11) + 1, 0.5

    def model():
        prior = dist.Normal(0.0, 1.0) if site == "mean" else dist.LogNormal(0.0, 1.0)
        value = pyro.sample("value", prior)
        with pyro.plate("data", 7):
            fn = dist.Normal(value * value.new_ones(7), 0.5) if site == "mean" else dist.Normal(0.0, value)
            pyro.sample("obs", fn, obs=y)

    guide, loss = AutoFactorizedNormal(model, init_scale=width), objective(curvature)
    guide()
    information = 7 / 0.25 if site == "mean" else 2.0 * 7
    if curvature == "empirical":
        information = float((y - guide.loc.detach()).square().sum() + 7 * width**2) / 0.25**2
    draws = torch.stack([naturals(guide, model, loss=loss)[1]["scale"] for _ in range(1200)])
    assert_mean(draws, torch.tensor([(information + 1.0) * width**2]))


def test_empirical_curvature_is_biased_as_it_should_be():
    """Σ_n x_nj² (r_n² + x_nᵀ Σ x_n) / σ⁴ in place of Σ_n x_nj² / σ² (METHODS A5)."""
    problem = ONE
    guide = AutoFactorizedNormal(problem, init_scale=0.5)
    loss = objective("empirical")
    draws = torch.stack([naturals(guide, problem, loss=loss)[1]["scale"] for _ in range(1500)])
    mean, covariance = gaussian_of(guide, problem)
    x, y, variance = problem.design, problem.args[1][:, 0], 0.25
    square = (y - x @ mean).square() + (x @ covariance * x).sum(-1)
    precision = (square @ x.square()) / variance**2 + problem.prior.flatten()
    wanted = torch.cat([precision[1:], precision[:1]]) * guide.scale.detach().square()  # the bias stands last
    assert_mean(draws, wanted)


@pytest.mark.parametrize("guide_class", GUIDES, ids=NAMES)
def test_reparametrization_estimates_the_mean_hessian(guide_class):
    """E[I − (g̃ + ε) εᵀ] = CᵀΛ*C, its diagonal or its mean over rows and columns."""
    problem = Regression("without-bias", bias=False, noise="correlated")
    guide = guide_class(problem, init_scale=0.3)
    loss = objective("reparametrization")
    found = [naturals(guide, problem, loss=loss)[1] for _ in range(1500)]
    draws = {name: torch.stack([t[name] for t in found]) for name in found[0] if found[0][name] is not None}
    factor = torch.linalg.cholesky(gaussian_of(guide, problem)[1])
    hessian = factor.T @ problem.posterior()[1] @ factor
    blocks = hessian.reshape(problem.outputs, -1, problem.outputs, hessian.shape[0] // problem.outputs)
    if guide_class is AutoMatrixNormal:
        columns = torch.einsum("iaib->ab", blocks) / problem.outputs
        rows = torch.einsum("iaja->ij", blocks) / len(columns)
        assert_mean(draws["col_scale_trils.weight"], columns)
        common = columns.trace() / len(columns)
        assert_mean(draws["row_scale_trils.weight"], rows + (1 - common) * torch.eye(len(rows)))
    else:
        (scales,) = draws.values()
        assert_mean(scales.flatten(1), hessian.diagonal())


# ---- the step


@pytest.mark.parametrize("guide_class", GUIDES, ids=NAMES)
def test_trust_region_and_extrinsic_damping(guide_class):
    """Damping δ replaces Σ g by (Σ⁻¹ + δ)⁻¹ g; the trust region shortens the step to one of whitened mean square 1."""
    guide, steps = guide_class(CORRELATED, init_scale=0.7), {}
    train(CORRELATED, guide, 3, 0.01, 0.3)
    covariance = gaussian_of(guide, CORRELATED)[1]
    if guide_class is AutoFactorizedNormal:  # in the order of its own vector
        covariance = guide.scale.detach().square().diag()
    for key, settings in {"plain": {}, "damped": {"extrinsic_damping": 3.0}, "short": {"trust_region": 0.1}}.items():
        pyro.set_rng_seed(5)
        gradients, _ = naturals(guide, CORRELATED, **settings)
        steps[key] = -next(gradients[name] for name in ("loc", "locs.weight") if name in gradients).flatten()
    precision = torch.linalg.inv(covariance)
    damped = torch.linalg.solve(precision + 3.0 * torch.eye(len(precision)), precision @ steps["plain"])
    torch.testing.assert_close(steps["damped"], damped, rtol=1e-8, atol=1e-10)
    size = (steps["plain"] @ precision @ steps["plain"] / len(precision)).sqrt()
    assert size > 0.1
    torch.testing.assert_close(steps["short"], steps["plain"] * 0.1 / size, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("guide_class", GUIDES, ids=NAMES)
def test_plain_sgd_is_the_same_step_to_first_order(guide_class):
    guide, gaps = guide_class(CORRELATED, init_scale=0.7), []
    loss = objective(inverses_every=1000 if guide_class is AutoEigenNormal else 1)
    train(CORRELATED, guide, 2, 0.01, 0.3, loss=loss)
    start, before = copy.deepcopy(guide.state_dict()), flat(guide)
    for rate in (2e-3, 1e-3):
        ends = []
        for optimizer in (pyro.optim.SGD({"lr": rate}), NaturalGradientDescent(rate, precision_lr=rate)):
            pyro.set_rng_seed(3)
            guide.load_state_dict(start)
            SVI(CORRELATED, guide, optimizer, loss).step(*CORRELATED.args)
            ends.append(flat(guide))
        gaps.append(float((ends[0] - ends[1]).norm()))
        assert (ends[1] - before).norm() > 10 * gaps[-1]
    assert math.log2(gaps[0] / gaps[1]) == pytest.approx(2.0, abs=0.1)
