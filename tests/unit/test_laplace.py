"""Laplace's approximation where it is exact, and against dense linear algebra written out."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer.autoguide import AutoLaplaceApproximation, init_to_value

from bnn.guides import Laplace
from support.nets import data, labels, numbers
from support.point_estimates import Net, flat_of, gauss_newton
from support.regression import Regression, kron

pytestmark = pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning")
STRUCTURES = ["diagonal", "kronecker", "eigenbasis", "full"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def in_matrix(problem, flat):
    """Entries of weight and bias end to end, as those of the matrix (outputs, [bias,] inputs)."""
    numel = math.prod(problem.shape)
    weight = torch.as_tensor(flat[:numel]).reshape(problem.shape)
    weight = weight.T if problem.spelling == "transposed" else weight.reshape(problem.outputs, -1)
    return (torch.cat([flat[numel:, None], weight], 1) if problem.bias else weight).flatten()


def at_mode(problem, structure, **settings):
    """The approximation at the exact posterior mean, and the order of its latents in the problem's matrix."""
    mean, precision = problem.posterior()
    numel = math.prod(problem.shape)
    order = in_matrix(problem, torch.arange(numel + problem.outputs * problem.bias))
    flat = torch.empty_like(mean)
    flat[order] = mean
    point = {"weight": flat[:numel].reshape(problem.shape)} | ({"bias": flat[numel:]} if problem.bias else {})
    return Laplace(problem, structure, point=point, **settings), order, precision


def dense(posterior):
    """Covariance of all latents end to end."""
    return torch.block_diag(*(block.covariance() for block in posterior.blocks))


REGRESSIONS = [
    Regression("plain"),
    Regression("one output", outputs=1, bias=False),
    Regression("transposed", spelling="transposed", noise="apart", bias_scale=0.3),
    Regression("convolution", spelling="conv"),
    Regression("correlated noise", noise="correlated"),
]
each_regression = pytest.mark.parametrize("problem", REGRESSIONS, ids=lambda problem: problem.name)


# ---- linear regression: the posterior itself


@each_regression
@pytest.mark.parametrize("curvature", ["ggn", "hessian"])
def test_full_is_the_exact_posterior_of_linear_regression(problem, curvature):
    posterior, order, precision = at_mode(problem, "full", curvature=curvature)
    posterior.fit(*problem.args)
    found = dense(posterior)[order[:, None], order]
    torch.testing.assert_close(found @ precision, torch.eye(len(precision)), rtol=0, atol=1e-9)
    evidence = posterior.log_marginal_likelihood()
    assert float(evidence) == pytest.approx(problem.log_evidence(), abs=1e-8)


@each_regression
@each_structure
def test_blocks_of_linear_regression(problem, structure):
    """The diagonal of the exact precision, or its blocks, as all data have the same curvature."""
    posterior, order, precision = at_mode(problem, structure)
    posterior.fit(*problem.args)
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order))
    expected = precision[back[:, None], back]
    numel = math.prod(problem.shape)
    if structure == "diagonal":
        expected = expected.diagonal().diag()
    elif structure != "full":
        expected = torch.block_diag(expected[:numel, :numel], expected[numel:, numel:])
    torch.testing.assert_close(torch.linalg.inv(dense(posterior)), expected, rtol=1e-8, atol=1e-8)


@each_structure
def test_minibatches_and_loaders_give_the_sums_of_all_data(structure):
    """12 rows in windows of 5, and in batches of 7 and 5."""
    problem = Regression("plain", outputs=2)
    posterior, *_ = at_mode(problem, structure)
    whole = dense(posterior.fit(*problem.args))
    evidence = posterior.log_marginal_likelihood()

    def windowed(x, y):
        return problem(x, y, 5)

    def loaded(x, y):
        with pyro.poutine.scale(scale=1.0):
            weight = pyro.sample("weight", dist.Normal(torch.zeros(problem.shape), 0.8).to_event(2))
            bias = pyro.sample("bias", dist.Normal(torch.zeros(2), 0.8).to_event(1))
        with pyro.plate("data", 12, subsample_size=len(x)):
            pyro.sample("obs", problem.likelihood(F.linear(x, weight, bias)), obs=y)

    x, y = problem.args
    point = posterior.median()
    by_windows = Laplace(windowed, structure, point=point).fit(x, y)
    batches = [(x[:7], y[:7]), (x[7:], y[7:])]
    by_batches = Laplace(loaded, structure, point=point).fit(batches=batches)
    for other in (by_windows, by_batches):
        torch.testing.assert_close(dense(other), whole, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(other.log_marginal_likelihood(), evidence, rtol=1e-10, atol=0)


@pytest.mark.parametrize("bias_scale", [0.8, 0.3])
def test_linearised_predictive_of_a_linear_model_is_exact(bias_scale):
    problem = Regression("predicted", outputs=2, bias_scale=bias_scale)
    posterior, *_ = at_mode(problem, "full")
    posterior.fit(*problem.args)
    x = numbers(5, 4, seed=8)
    mean, precision = problem.posterior()
    operator = kron(torch.eye(2), torch.cat([torch.ones(5, 1), x], 1))  # outputs, rows
    covariance = (operator @ torch.linalg.inv(precision) @ operator.T).reshape(2, 5, 2, 5)

    outputs = posterior.outputs(x, torch.zeros(5, 2))["obs"]
    torch.testing.assert_close(outputs.mean, (operator @ mean).reshape(2, 5).T)
    torch.testing.assert_close(outputs.covariance, torch.einsum("onpn->nop", covariance))
    prediction = posterior.linearised(x, torch.zeros(5, 2))
    variance = torch.einsum("onon->no", covariance)
    torch.testing.assert_close(prediction.epistemic, variance.sqrt())
    torch.testing.assert_close(prediction.sd, (variance + problem.covariance.diagonal()).sqrt())


# ---- nets, against dense linear algebra


def net_problem(classes=False, rows=12, **settings):
    net = Net((3, 4, 2), classes=classes, scale=0.9, **settings)
    x, _ = data(rows)
    y = labels(rows, 2) if classes else numbers(rows, 2, seed=9)
    return net, net.start(), x, y


def order_of(net, values):
    """Positions, in sites laid end to end, of the entries of :func:`flat_of`."""
    numbered, start = {}, 0
    for name, value in values.items():
        numbered[name] = torch.arange(start, start + value.numel()).reshape(value.shape)
        start += value.numel()
    return flat_of(numbered, net)


@pytest.mark.parametrize("classes", [False, True], ids=["Normal", "Categorical"])
def test_full_curvature_of_a_net_is_the_gauss_newton_matrix(classes):
    net, values, x, y = net_problem(classes)
    (block,) = Laplace(net, "full", point=values).fit(x, y).blocks
    order = order_of(net, values)
    expected, _ = gauss_newton(net, values, x)
    torch.testing.assert_close(block.curvature[order[:, None], order], expected)


def blocks_of(matrix, values):
    sizes = [value.numel() for value in values.values()]
    parts = zip(values, matrix.split(sizes), strict=True)
    return {name: rows.split(sizes, 1)[number] for number, (name, rows) in enumerate(parts)}


def curvature_of(block):
    """H of a block in a Kronecker basis, in the order of the site's entries."""
    basis = kron(block.row_basis, block.col_basis)
    return basis @ block.curvature.flatten().diag() @ basis.T


@pytest.mark.parametrize("classes", [False, True], ids=["Normal", "Categorical"])
def test_kronecker_is_exact_for_one_datum(classes):
    net, values, x, y = net_problem(classes, rows=1)
    (whole,) = Laplace(net, "full", point=values).fit(x, y).blocks
    for block in Laplace(net, "kronecker", point=values).fit(x, y).blocks:
        torch.testing.assert_close(curvature_of(block), blocks_of(whole.curvature, values)[block.names[0]])


@pytest.mark.parametrize("classes", [False, True], ids=["Normal", "Categorical"])
def test_eigenbasis_is_the_best_diagonal_in_the_kronecker_basis(classes):
    """In Frobenius norm (George et al. 2018): its diagonal is that of the exact matrix in the basis."""
    net, values, x, y = net_problem(classes)
    exact = blocks_of(Laplace(net, "full", point=values).fit(x, y).blocks[0].curvature, values)
    kronecker = Laplace(net, "kronecker", point=values).fit(x, y).blocks
    eigen = Laplace(net, "eigenbasis", point=values).fit(x, y).blocks
    for one, other in zip(eigen, kronecker, strict=True):
        name = one.names[0]
        basis = kron(one.row_basis, one.col_basis)
        torch.testing.assert_close(one.curvature.flatten(), (basis.T @ exact[name] @ basis).diagonal())
        distances = [float((curvature_of(block) - exact[name]).norm()) for block in (one, other)]
        assert distances[0] <= distances[1] + 1e-12
        assert name != "w0" or distances[0] < 0.99 * distances[1]


@each_structure
def test_rotated_inputs(structure):
    """With one prior for all weights, x → xQ, W → WQ changes nothing; a diagonal does not know that."""
    net, values, x, y = net_problem()
    turn = torch.linalg.qr(numbers(3, 3, seed=11))[0]
    turned = {**values, "w0": values["w0"] @ turn}
    found = []
    for point, inputs in ((values, x), (turned, x @ turn)):
        posterior = Laplace(net, structure, point=point).fit(inputs, y)
        covariance = posterior.outputs(inputs, y)["obs"].covariance
        found.append((float(posterior.log_marginal_likelihood()), covariance))
    (evidence, before), (turned_evidence, after) = found
    same = turned_evidence == pytest.approx(evidence, abs=1e-9) and torch.allclose(before, after, rtol=1e-9, atol=0)
    assert same == (structure != "diagonal")


@each_structure
def test_permuted_hidden_units(structure):
    net, values, x, y = net_problem(classes=True)
    p = torch.tensor([2, 0, 3, 1])
    permuted = {"w0": values["w0"][p], "b0": values["b0"][p], "w1": values["w1"][:, p], "b1": values["b1"]}
    first, second = (Laplace(net, structure, point=point).fit(x, y) for point in (values, permuted))
    torch.testing.assert_close(first.log_marginal_likelihood(), second.log_marginal_likelihood())
    torch.testing.assert_close(first.outputs(x, y)["obs"].covariance, second.outputs(x, y)["obs"].covariance)


@pytest.mark.parametrize("structure", ["full", "kronecker"])
def test_last_layer_is_a_bayesian_linear_model_on_the_features(structure):
    net, values, x, y = net_problem()
    posterior = Laplace(net, structure, point=values, sites="last layer").fit(x, y)
    features = torch.tanh(F.linear(x, values["w0"], values["b0"]))
    design = torch.cat([features, torch.ones(len(x), 1)], 1)
    whole = kron(torch.eye(2), design.T @ design) / net.noise**2 + torch.eye(10) / net.scale**2
    weights, biases = [0, 1, 2, 3, 5, 6, 7, 8], [4, 9]
    if structure == "full":
        expected = whole[[*weights, *biases]][:, [*weights, *biases]]
    else:
        expected = torch.block_diag(whole[weights][:, weights], whole[biases][:, biases])
    torch.testing.assert_close(torch.linalg.inv(dense(posterior)), expected)
    draws = posterior.draws(7)
    assert all(torch.equal(draws[name][3], values[name]) for name in ("w0", "b0"))
    assert draws["w1"].std(0).min() > 0


# ---- constrained sites, and Pyro's own


def hierarchy(x, y):
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("inputs", 2):
        slope = pyro.sample("slope", dist.Normal(0.0, scale))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ slope, noise), obs=y)


def theirs_loss(guide, x, y):
    """Minus the log joint in unconstrained space."""
    guided = pyro.poutine.trace(guide).get_trace(x, y)
    replayed = pyro.poutine.trace(pyro.poutine.replay(hierarchy, guided)).get_trace(x, y)
    return guided.log_prob_sum() - replayed.log_prob_sum()


def pyros(x, y):
    """AutoLaplaceApproximation at its mode."""
    start = {"scale": torch.tensor(1.0), "slope": torch.tensor([0.5, -0.5]), "noise": torch.tensor(0.5)}
    guide = AutoLaplaceApproximation(hierarchy, init_loc_fn=init_to_value(values=start))
    guide(x, y)
    optimizer = torch.optim.LBFGS(guide.parameters(), max_iter=200, tolerance_grad=1e-11, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        value = theirs_loss(guide, x, y)
        value.backward()
        return value

    optimizer.step(loss)
    return guide


@pytest.mark.filterwarnings("error:the point is not a mode")
def test_the_hessian_is_that_of_pyros_approximation():
    """Hierarchical prior, constrained sites, a plate around a latent."""
    x, y = numbers(20, 2), numbers(20, seed=4)
    theirs = pyros(x, y)
    law = theirs.laplace_approximation(x, y)
    ours = Laplace(hierarchy, "full", curvature="hessian", point=law.median()).fit(x, y)
    expected = (law.scale[:, None] * law.scale_tril) @ (law.scale[:, None] * law.scale_tril).T
    torch.testing.assert_close(dense(ours), expected, rtol=1e-6, atol=1e-10)
    evidence = -theirs_loss(theirs, x, y) + 2 * math.log(2 * math.pi) + 0.5 * torch.logdet(expected)
    torch.testing.assert_close(ours.log_marginal_likelihood(), evidence)
    # The model is linear: a Gauss-Newton matrix lacks nothing but what the noise has in common with the slopes.
    (block,) = Laplace(hierarchy, "full", point=law.median()).fit(x, y).blocks
    torch.testing.assert_close(block.curvature.diagonal(), ours.blocks[0].curvature.diagonal())
    quantiles = law.quantiles([0.1, 0.9])
    for name, value in ours.quantiles([0.1, 0.9]).items():
        torch.testing.assert_close(value, torch.stack([torch.as_tensor(q) for q in quantiles[name]]))


def test_the_density_is_that_of_the_gaussian():
    """What Pyro's traces add up for a draw of all four kinds of site: constrained, in a plate, matrix, held."""
    x, y = numbers(20, 2), numbers(20, seed=4)
    point = {"scale": torch.tensor(1.0), "slope": torch.tensor([0.5, -0.5]), "noise": torch.tensor(0.5)}
    for structure in STRUCTURES:
        posterior = Laplace(hierarchy, structure, point=point).fit(x, y)
        trace = pyro.poutine.trace(posterior).get_trace(x, y)
        value = {name: trace.nodes[name]["value"] for name in point}
        unconstrained = torch.cat([value["scale"].log().reshape(1), value["slope"], value["noise"].log().reshape(1)])
        mode = torch.cat([point["scale"].log().reshape(1), point["slope"], point["noise"].log().reshape(1)])
        names = [name for block in posterior.blocks for name in block.names]
        places = {"scale": [0], "slope": [1, 2], "noise": [3]}
        order = [place for name in names for place in places[name]]
        law = dist.MultivariateNormal(mode[order], dense(posterior))
        expected = law.log_prob(unconstrained[order]) - value["scale"].log() - value["noise"].log()
        torch.testing.assert_close(trace.log_prob_sum(), expected)


@each_structure
def test_factors_of_the_covariance(structure):
    """Noise is spread, Jacobians are whitened and variances are read off with one and the same covariance."""
    net, values, x, y = net_problem()
    for block in Laplace(net, structure, point=values).fit(x, y).blocks:
        spread = block.spread(torch.eye(block.numel))
        torch.testing.assert_close(spread.T @ spread, block.covariance())
        torch.testing.assert_close(block.covariance().diagonal(), block.variance())


# ---- evidence


@each_structure
@pytest.mark.parametrize("prior", ["global", "site"])
def test_optimal_prior_precisions_are_stationary(structure, prior):
    """τ ‖z − m‖² = dim − τ tr Σ (MacKay 1992), in all or site by site."""
    net, values, x, y = net_problem()
    posterior = Laplace(net, structure, point=values).fit(x, y)
    before = float(posterior.log_marginal_likelihood())
    after = posterior.optimize_marginal_likelihood(prior)
    assert after > before and float(posterior.log_marginal_likelihood()) == pytest.approx(after)
    groups = [list(values)] if prior == "global" else [[name] for name in values]
    variances = {n: v for block in posterior.blocks for n, v in block.split(block.variance()).items()}
    for names in groups:
        tau = posterior.prior_precision
        sizes = sum(float((tau[name] * values[name].square()).sum()) for name in names)
        numel = sum(values[name].numel() for name in names)
        spread = sum(float((tau[name] * variances[name]).sum()) for name in names)
        assert sizes == pytest.approx(numel - spread, rel=1e-4)


def test_optimal_noise_is_stationary():
    """σ² = Σ residuals² / (n − γ), γ = dim − τ tr Σ; and predictions have it."""
    x, y = numbers(20, 2), numbers(20, seed=4)
    point = {"scale": torch.tensor(1.0), "slope": torch.tensor([0.5, -0.5]), "noise": torch.tensor(0.5)}
    posterior = Laplace(hierarchy, "full", sites=["slope"], point=point).fit(x, y)
    posterior.optimize_marginal_likelihood(None, noise=True)
    variance = posterior.blocks[0].variance().sum()
    expected = (y - x @ point["slope"]).square().sum() / (20 - (2 - variance))
    torch.testing.assert_close(posterior.median()["noise"].square(), expected, rtol=1e-5, atol=0)
    assert torch.equal(posterior.draws(3)["noise"], posterior.median()["noise"].expand(3))
    aleatoric = posterior.linearised(x, y).aleatoric
    torch.testing.assert_close(aleatoric.square(), expected.expand(20), rtol=1e-5, atol=0)


def test_evidence_of_other_priors_is_that_of_another_model():
    """prior_precision= and noise= give what a model with these numbers has at the same point."""
    net, values, x, y = net_problem()
    other = Net((3, 4, 2), scale=0.5, noise=0.4)
    for structure in STRUCTURES:
        ours = Laplace(net, structure, point=values).fit(x, y)
        theirs = Laplace(other, structure, point=values).fit(x, y).log_marginal_likelihood()
        tau = torch.tensor(4.0, requires_grad=True)
        noise = torch.tensor(0.4, requires_grad=True)
        found = ours.log_marginal_likelihood(prior_precision=tau, noise=noise)
        torch.testing.assert_close(found, theirs, rtol=1e-10, atol=0)
        slopes = torch.autograd.grad(found, [tau, noise])
        step = 1e-5
        up, down = (ours.log_marginal_likelihood(prior_precision=4 + s, noise=0.4) for s in (step, -step))
        assert float(slopes[0]) == pytest.approx(float(up - down) / (2 * step), rel=1e-5)


def test_sites_that_the_likelihood_does_not_know():
    """They have their prior's curvature, whatever the structure: here that of a Gamma's logarithm, 2 exp(z)."""
    x, y = numbers(20, 2), numbers(20, seed=4)
    point = {"rate": torch.tensor(1.5), "slope": torch.tensor([0.5, -0.5])}

    def model(x, y):
        pyro.sample("rate", dist.Gamma(3.0, 2.0))
        slope = pyro.sample("slope", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ slope, 1.0), obs=y)

    for structure, curvature in [*((s, "ggn") for s in STRUCTURES), ("diagonal", "hessian"), ("full", "hessian")]:
        posterior = Laplace(model, structure, curvature=curvature, point=point).fit(x, y)
        variances = {n: v for block in posterior.blocks for n, v in block.split(block.variance()).items()}
        torch.testing.assert_close(variances["rate"], torch.tensor(1 / 3.0))
