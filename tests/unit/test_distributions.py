"""The matrix laws against the dense multivariate normal of their flattened entries, and as sites of Pyro programs."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats
from torch.distributions import MultivariateNormal, kl_divergence

from bnn.distributions import EigenNormal, MatrixNormal
from support.checks import ALPHA, assert_covariance, assert_mean

ROWS, COLS = 3, 2
DRAWS = 200_000
LAWS = [MatrixNormal, EigenNormal]
# Leading dimensions of every argument of the law; the last broadcasts unequal ones.
BATCHES = [[()] * 4, [(5,)] * 4, [(4, 1), (), (5,), (4, 1)]]


@pytest.fixture(params=LAWS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def factor(raw):
    return raw.tril(-1) + raw.diagonal(dim1=-2, dim2=-1).exp().diag_embed()


def basis(raw):
    return torch.linalg.matrix_exp(raw - raw.mT)


def unconstrained(kind, batches=BATCHES[0], rows=ROWS, cols=COLS):
    """Free parameters: any real numbers of these shapes are a law."""
    events = [(rows, cols), (rows, rows), (cols, cols), (rows, cols)][: 3 if kind is MatrixNormal else 4]
    return [0.5 * torch.randn(*batch, *event) for batch, event in zip(batches, events, strict=False)]


def build(kind, loc, row, column, scale=None):
    if kind is MatrixNormal:
        return MatrixNormal(loc, factor(row), factor(column))
    return EigenNormal(loc, basis(row), basis(column), scale.exp())


def random_law(kind, batches=BATCHES[0], rows=ROWS, cols=COLS):
    return build(kind, *unconstrained(kind, batches, rows, cols))


def kronecker(left, right):
    product = torch.einsum("...ik,...jl->...ijkl", left, right)
    return product.flatten(-4, -3).flatten(-2, -1)


def dense(law):
    """The law of the entries, row after row, with its covariance written out."""
    if isinstance(law, MatrixNormal):
        rows, columns = law.row_scale_tril @ law.row_scale_tril.mT, law.col_scale_tril @ law.col_scale_tril.mT
        covariance = kronecker(rows, columns)
    else:
        bases = kronecker(law.row_basis, law.col_basis)
        covariance = bases @ law.scale.flatten(-2).square().diag_embed() @ bases.mT
    return MultivariateNormal(law.loc.flatten(-2), covariance)


def dense_normal(normal):
    return MultivariateNormal(
        normal.base_dist.loc.flatten(-2), normal.base_dist.scale.flatten(-2).square().diag_embed()
    )


def random_normal(batch=()):
    return dist.Normal(torch.randn(*batch, ROWS, COLS), torch.randn(*batch, ROWS, COLS).exp()).to_event(2)


def assert_close(given, wanted, tolerance=1e-10):
    assert given.shape == wanted.shape
    torch.testing.assert_close(given, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batches", BATCHES)
def test_equals_the_dense_normal(kind, batches):
    law = random_law(kind, batches)
    exact = dense(law)
    batch = torch.broadcast_shapes(*batches)
    assert (law.batch_shape, law.event_shape) == (batch, (ROWS, COLS))
    value = torch.randn(7, *batch, ROWS, COLS)
    assert_close(law.log_prob(value), exact.log_prob(value.flatten(-2)))
    assert_close(law.log_prob(value[(0,) * (1 + len(batch))]), exact.log_prob(value[(0,) * (1 + len(batch))].flatten()))
    assert_close(law.entropy(), exact.entropy())
    for name in ("mean", "mode", "variance", "stddev"):
        assert_close(getattr(law, name).flatten(-2), getattr(exact, name))
    assert law.rsample((7, 2)).shape == law.sample((7, 2)).shape == (7, 2, *batch, ROWS, COLS)


@pytest.mark.parametrize("batches", BATCHES)
def test_divergence_equals_the_dense_one(kind, batches):
    law = random_law(kind, batches)
    others = [random_normal(batch) for batch in [(), law.batch_shape]]
    for other in others:
        assert_close(kl_divergence(law, other), kl_divergence(dense(law), dense_normal(other)))
    prior = dist.Normal(torch.tensor(0.3), 2.0).expand([ROWS, COLS]).to_event(2)
    flat = MultivariateNormal(torch.full((ROWS * COLS,), 0.3), 4.0 * torch.eye(ROWS * COLS))
    assert_close(kl_divergence(law, prior), kl_divergence(dense(law), flat))
    torch_law = torch.distributions.Independent(others[0].base_dist, 2)
    assert_close(kl_divergence(law, torch_law), kl_divergence(law, others[0]))
    if kind is MatrixNormal:
        for other in (random_law(kind), random_law(kind, batches), random_law(kind, [law.batch_shape] * 3)):
            assert_close(kl_divergence(law, other), kl_divergence(dense(law), dense(other)))
        assert_close(kl_divergence(law, law), torch.zeros(law.batch_shape))


def test_draws_have_the_mean_and_covariance(kind):
    """Of 200,000 draws each variance, and each sum and difference of two entries, by its exact χ² law; means by z.

    The false alarms of all of them together stay below 2e-6; a factor transposed would be hundreds of errors off.
    """
    law = random_law(kind)
    draws = (law.rsample((DRAWS,)) - law.loc).flatten(-2).numpy()
    covariance = dense(law).covariance_matrix.numpy()
    names = [f"W[{i}, {j}]" for i in range(ROWS) for j in range(COLS)]
    assert_covariance(names, draws, covariance)
    for i, name in enumerate(names):
        assert_mean(name, draws[:, i], 0.0, float(covariance[i, i]), ALPHA / len(names))


def test_gradients(kind):
    parameters = [parameter.requires_grad_() for parameter in unconstrained(kind, [(2,), (), (2,), ()])]
    value = torch.randn(2, ROWS, COLS, requires_grad=True)
    other = random_normal()

    def draw(*parameters):
        torch.manual_seed(1)
        return build(kind, *parameters).rsample((2,))

    assert torch.autograd.gradcheck(draw, parameters)
    assert torch.autograd.gradcheck(lambda value, *p: build(kind, *p).log_prob(value), [value, *parameters])
    assert torch.autograd.gradcheck(lambda *p: build(kind, *p).entropy(), parameters)
    assert torch.autograd.gradcheck(lambda *p: kl_divergence(build(kind, *p), other), parameters)
    if kind is MatrixNormal:
        second = [parameter.requires_grad_() for parameter in unconstrained(kind)]
        pair = [*parameters, *second]
        assert torch.autograd.gradcheck(lambda *p: kl_divergence(build(kind, *p[:3]), build(kind, *p[3:])), pair)


@pytest.mark.parametrize("batches", BATCHES)
def test_expand(kind, batches):
    """The location is broadcast, the factors stay one; every number is that of the law before."""
    law = random_law(kind, batches)
    wide = law.expand((6, *law.batch_shape))
    assert type(wide) is kind and wide.batch_shape == wide.loc.shape[:-2] == (6, *law.batch_shape)
    assert [getattr(wide, name).shape for name in list(law.arg_constraints)[1:]] == [
        getattr(law, name).shape for name in list(law.arg_constraints)[1:]
    ]
    value, other = wide.rsample((3,)), random_normal()
    assert len(torch.unique(value)) == value.numel()
    assert_close(wide.log_prob(value), law.log_prob(value))
    for given, wanted in [
        (wide.entropy(), law.entropy()),
        (wide.variance, law.variance),
        (kl_divergence(wide, other), kl_divergence(law, other)),
    ]:
        assert_close(given, wanted.expand((6, *wanted.shape)))
    event = wide.to_event(1)
    assert event.event_shape == (*wide.batch_shape[-1:], ROWS, COLS)
    assert_close(event.log_prob(value), wide.log_prob(value).sum(-1))
    assert_close(event.entropy(), wide.entropy().sum(-1))
    prior = dist.Normal(0.0, 1.0).expand(event.event_shape).to_event(3)
    unit = dist.Normal(0.0, 1.0).expand([ROWS, COLS]).to_event(2)
    assert_close(kl_divergence(event, prior), kl_divergence(wide, unit).sum(-1))
    mask = torch.arange(6).reshape(6, *[1] * len(law.batch_shape)) < 2
    assert_close(wide.mask(mask).log_prob(value), wide.log_prob(value) * mask)


def test_plates(kind):
    batched = random_law(kind, [(4,), (), (4,), ()])

    def model():
        with pyro.plate("four", 4, dim=-1):
            one = pyro.sample("one", random_law(kind))
            with pyro.plate("five", 5, dim=-2):
                two = pyro.sample("two", batched)
        return one, two

    trace = poutine.trace(model).get_trace()
    trace.compute_log_prob()
    one, two = trace.nodes["_RETURN"]["value"]
    assert one.shape == (4, ROWS, COLS) and two.shape == (5, 4, ROWS, COLS)
    assert_close(trace.nodes["two"]["log_prob"], dense(batched).log_prob(two.flatten(-2)))
    assert_close(trace.nodes["one"]["log_prob"], dense(trace.nodes["one"]["fn"]).log_prob(one.flatten(-2)))


def exact_posterior(kind, inputs, outputs, noise):
    """Of Y = XW + noise with standard normal W: rows correlate by (XᵀX/σ² + 1)⁻¹, columns are independent."""
    covariance = torch.linalg.inv(inputs.mT @ inputs / noise**2 + torch.eye(ROWS))
    loc = covariance @ inputs.mT @ outputs / noise**2
    if kind is MatrixNormal:
        return MatrixNormal(loc, torch.linalg.cholesky(covariance), torch.eye(COLS))
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    scale = eigenvalues.sqrt().unsqueeze(-1).expand(ROWS, COLS)
    return EigenNormal(loc, vectors, basis(torch.randn(COLS, COLS)), scale)


def test_exact_posterior_as_guide(kind):
    """Where the guide is the posterior, log p(y, W) - log q(W) is log p(y), whatever the draw of W."""
    inputs, outputs, noise = torch.randn(8, ROWS), torch.randn(8, COLS), 0.7
    posterior = exact_posterior(kind, inputs, outputs, noise)

    def model():
        weight = pyro.sample("weight", dist.Normal(0.0, 1.0).expand([ROWS, COLS]).to_event(2))
        pyro.sample("outputs", dist.Normal((inputs @ weight).unsqueeze(-3), noise).to_event(3), obs=outputs[None])

    covariance = inputs @ inputs.mT + noise**2 * torch.eye(8)
    evidence = float(MultivariateNormal(torch.zeros(8), covariance).log_prob(outputs.mT).sum())

    def guide():
        pyro.sample("weight", posterior)

    assert [Trace_ELBO().loss(model, guide) for _ in range(3)] == pytest.approx(3 * [-evidence], abs=1e-10)


@pytest.mark.parametrize("prior", [random_normal, lambda: random_law(MatrixNormal)])
def test_losses_without_data_are_the_divergence(kind, prior):
    """The mean-field loss is the exact divergence; the other's 20,000 particles agree (false alarm 1e-6)."""
    law, prior = random_law(kind), prior()
    exact = float(kl_divergence(dense(law), dense(prior) if isinstance(prior, MatrixNormal) else dense_normal(prior)))

    def model():
        pyro.sample("weight", prior)

    def guide():
        pyro.sample("weight", law)

    draws = law.sample((20_000,))
    error = float((law.log_prob(draws) - prior.log_prob(draws)).std()) / 20_000**0.5
    loss = Trace_ELBO(num_particles=20_000, vectorize_particles=True, max_plate_nesting=0).loss(model, guide)
    assert abs(loss - exact) < stats.norm.isf(ALPHA / 2) * error
    losses = [TraceMeanField_ELBO().loss(model, guide) for _ in range(3)]
    if kind is EigenNormal and isinstance(prior, MatrixNormal):  # no closed form: Pyro falls back on draws
        assert len(set(losses)) == 3
    else:
        assert losses == pytest.approx(3 * [exact], abs=1e-10)


def test_variational_inference_finds_the_prior(kind):
    """With every argument learned, and no data, the mean-field loss ends at a divergence of zero."""
    shapes = unconstrained(kind)

    def model():
        with pyro.plate("layers", 2):
            pyro.sample("weight", dist.Normal(1.0, 0.5).expand([ROWS, COLS]).to_event(2))

    def guide():
        law = build(kind, *(pyro.param(f"{i}", shape) for i, shape in enumerate(shapes)))
        with pyro.plate("layers", 2):
            pyro.sample("weight", law)

    inference = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), TraceMeanField_ELBO())
    losses = [inference.step() for _ in range(400)]
    assert losses[0] > 1.0 and 0.0 <= losses[-1] < 1e-3


def test_copies(kind):
    law = random_law(kind, BATCHES[2]).expand((4, 5))
    value = law.sample()
    for same in (pickle.loads(pickle.dumps(law)), copy.deepcopy(law), copy.copy(law)):
        assert type(same) is kind and same.batch_shape == law.batch_shape
        assert torch.equal(same.log_prob(value), law.log_prob(value))


def test_vmap(kind):
    parameters = unconstrained(kind, [(6,)] * 4)
    law = build(kind, *parameters)
    value, other = law.sample(), random_normal()
    vmap = torch.func.vmap
    assert_close(vmap(lambda v, *p: build(kind, *p).log_prob(v))(value, *parameters), law.log_prob(value))
    assert_close(vmap(lambda *p: build(kind, *p).entropy())(*parameters), law.entropy())
    assert_close(vmap(lambda *p: kl_divergence(build(kind, *p), other))(*parameters), kl_divergence(law, other))
    gradient = vmap(torch.func.grad(lambda v: build(kind, *(p[0] for p in parameters)).log_prob(v)))(value)
    exact = dense(build(kind, *(p[0] for p in parameters)))
    assert_close(gradient, (-(value.flatten(-2) - exact.loc) @ exact.precision_matrix).unflatten(-1, (ROWS, COLS)))
    one = vmap(lambda loc: build(kind, loc, *(p[0] for p in parameters[1:])).rsample((3,)), randomness="different")
    draws = one(parameters[0])
    assert draws.shape == (6, 3, ROWS, COLS)
    assert len(torch.unique(draws)) == draws.numel()


def test_single_precision(kind):
    law = build(kind, *(0.1 * parameter for parameter in unconstrained(kind, rows=300, cols=40)))
    single = kind(*(getattr(law, name).float() for name in law.arg_constraints))
    value = single.rsample()
    assert value.dtype == single.log_prob(value).dtype == single.entropy().dtype == torch.float32
    torch.testing.assert_close(single.log_prob(value).double(), law.log_prob(value.double()), rtol=1e-5, atol=0.0)


def test_shapes_that_do_not_fit(kind):
    law = random_law(kind)
    arguments = {name: getattr(law, name) for name in law.arg_constraints}
    wrong = [("loc", torch.zeros(COLS, ROWS)), ("loc", torch.zeros(ROWS)), ("loc", torch.tensor(0.0))]
    wrong += [(name, torch.eye(ROWS + COLS)) for name in list(arguments)[1:]]
    wrong += [(name, torch.ones(ROWS)) for name in list(arguments)[1:]]
    for name, value in wrong:
        with pytest.raises(ValueError) as error:
            kind(**{**arguments, name: value})
        for said in (f"{kind.__name__} was given", f"{name} {tuple(value.shape)}", "wanted are loc (..., rows, cols)"):
            assert said in str(error.value)
    last = list(arguments)[-1]
    broadcast = {"loc": arguments["loc"].expand(3, ROWS, COLS), last: arguments[last].expand(2, -1, -1)}
    with pytest.raises(ValueError, match=rf"loc \(3, 3, 2\).*{last} \(2, .*leading dimensions broadcast"):
        kind(**{**arguments, **broadcast})
    with pytest.raises(ValueError, match="right-most size of value must match event_shape"):
        law.log_prob(torch.zeros(COLS, ROWS))


def test_values_that_are_no_law(kind):
    loc, eye = torch.zeros(2, 2), torch.eye(2)
    nan = torch.full((2, 2), torch.nan)
    if kind is MatrixNormal:
        wrong = {"row_scale_tril": [-eye, torch.ones(2, 2), nan], "col_scale_tril": [0 * eye]}
        arguments = {"loc": loc, "row_scale_tril": eye, "col_scale_tril": eye}
    else:
        shear = torch.tensor([[1.0, 1e-6], [0.0, 1.0]])
        wrong = {"row_basis": [2 * eye, shear, shear.mT, nan], "col_basis": [shear], "scale": [loc, -torch.ones(2, 2)]}
        arguments = {"loc": loc, "row_basis": eye, "col_basis": eye.flip(0), "scale": torch.ones(2, 2)}
    for checked in (kind(**arguments), kind(**arguments).expand((2,))):
        with pytest.raises(ValueError, match="within the support"):
            checked.log_prob(nan)
    assert kind(**arguments, validate_args=False).expand((2,)).log_prob(nan).isnan().all()
    for name, values in {**wrong, "loc": [nan]}.items():
        for value in values:
            with pytest.raises(ValueError, match=f"Expected parameter {name}"):
                kind(**{**arguments, name: value})
            kind(**{**arguments, name: value}, validate_args=False)


def test_divergences_that_have_no_closed_form(kind):
    law = random_law(kind)
    for other in (
        dist.Laplace(torch.zeros(ROWS, COLS), 1.0).to_event(2),
        dist.Normal(torch.zeros(ROWS, COLS), 1.0).to_event(1),
        dist.Normal(torch.zeros(4, ROWS, COLS), 1.0).to_event(3),
    ):
        with pytest.raises(NotImplementedError, match=r"only Normal\(...\).to_event\(2\)"):
            kl_divergence(law, other)
    with pytest.raises(ValueError, match=r"of \(3, 2\) and Independent of \(2, 3\)"):
        kl_divergence(law, dist.Normal(torch.zeros(COLS, ROWS), 1.0).to_event(2))
    with pytest.raises(ValueError, match=r"of \(3, 2\) and Independent of \(3, 1\)"):
        kl_divergence(law, dist.Normal(torch.zeros(ROWS, 1), 1.0).to_event(2))


@pytest.mark.parametrize("batches", BATCHES)
def test_transpose_and_covariances(batches):
    law = random_law(MatrixNormal, batches)
    value = law.sample((3,))
    assert (law.mT.batch_shape, law.mT.event_shape) == (law.batch_shape, (COLS, ROWS))
    assert_close(law.mT.log_prob(value.mT), law.log_prob(value))
    assert_close(law.mT.mT.variance, law.variance)
    covariance = kronecker(law.row_covariance, law.column_covariance)
    assert_close(covariance, dense(law).covariance_matrix)
    with pytest.raises(ValueError, match=r"of \(3, 2\) and MatrixNormal of \(2, 3\)"):
        kl_divergence(law, law.mT)
