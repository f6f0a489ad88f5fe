"""Ensembles: every member moves as it would alone, anchored ones are draws from the posterior, repulsive ones apart."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD, Adam

import bnn
from bnn.guides import (
    AutoEnsemble,
    AutoFactorizedNormal,
    FunctionRepulsion,
    GaussianKernel,
    PerMember,
    TraceEnsemble_ELBO,
)
from support.checks import assert_covariance, assert_mean
from support.conjugate import NOISE, PRIOR, exact, linear, regression_data, trained
from support.nets import BayesianMLP, data, normal_prior, numbers

pytestmark = pytest.mark.usefixtures("double")


def positive(x, y):
    """A constrained site, inside and outside a plate, and a prior that depends on another latent."""
    scale = pyro.sample("scale", dist.Gamma(2.0, 1.0))
    weight = pyro.sample("weight", normal_prior(3))
    with pyro.plate("groups", 2):
        level = pyro.sample("level", dist.LogNormal(0.0, scale))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight + level.sum(), scale), obs=y)


# ---- members as they would be alone


def test_each_member_descends_its_own_energy():
    """z_k ← z_k − h (Λ z_k − b), to rounding; the loss is the sum of the energies."""
    x, y = regression_data()
    precision, mean = exact(x, y)
    guide, rate = AutoEnsemble(linear, 4, init_loc_fn="prior"), 0.01
    guide(x, y)
    positions = guide.positions.detach().clone()
    assert len(positions.unique(dim=0)) == 4
    losses = trained(linear, guide, (x, y), 20, SGD({"lr": rate}))
    energy = bnn.Potential(linear, x, y).full_energy
    for loss in losses:
        assert loss == pytest.approx(float(energy(positions).sum()), rel=1e-12)
        positions = positions - rate * (positions - mean) @ precision
    torch.testing.assert_close(guide.positions.detach(), positions, rtol=1e-12, atol=1e-12)


def test_members_move_as_separate_runs_do():
    """Adam on all members at once is Adam on each: the same weights of a net, up to the order of sums."""
    model, args = BayesianMLP(12, None), data()
    together = AutoEnsemble(model, 3)
    together(*args)
    starts = [together.member(k) for k in range(3)]
    trained(model, together, args, 30, Adam({"lr": 0.02}))
    for number, start in enumerate(starts):
        pyro.clear_param_store()
        alone = AutoEnsemble(model, 1, init_loc_fn={name: value[None] for name, value in start.items()})
        trained(model, alone, args, 30, Adam({"lr": 0.02}))
        torch.testing.assert_close(alone.positions[0], together.positions[number], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("anchored", [False, True])
@pytest.mark.parametrize("name", ["constrained", "linear", "net"])
def test_the_loss_and_gradient_are_those_of_pyros_own_elbo(name, anchored):
    """With one member: value and gradient, Jacobians and anchors included, by other code."""
    model = {"constrained": positive, "linear": linear}.get(name) or BayesianMLP(12, None)
    args = data() if name == "net" else regression_data()
    guide = AutoEnsemble(model, 1, anchored=anchored)
    guide(*args)
    found = []
    for loss in (Trace_ELBO(), TraceEnsemble_ELBO()):
        guide.positions.grad = None
        value = loss.loss_and_grads(model, guide, *args)
        assert loss.loss(model, guide, *args) == pytest.approx(value, rel=1e-12)
        found.append((value, guide.positions.grad.clone()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-11)


def test_models_that_cannot_be_recorded_give_the_same_numbers():
    def awkward(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), PRIOR).to_event(1))
        noise = NOISE if weight.sum().item() > -1e9 else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, noise), obs=y)

    args, found = regression_data(), []
    for model in (linear, awkward):
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        guide = AutoEnsemble(model, 3)
        guide(*args)
        found.append((trained(model, guide, args, 3, SGD({"lr": 0.01})), guide.positions.detach()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_large_nets_run_member_by_member_with_the_same_numbers(monkeypatch):
    x, y = regression_data()
    targets, found = PerMember(y + torch.randn(3, 12)), []
    guide = AutoEnsemble(linear, 3)
    guide(x, y)
    for largest in (50_000, 0):
        monkeypatch.setattr("bnn.guides._energies.LARGEST_VECTORIZED_DIM", largest)
        guide.positions.grad = None
        found.append((TraceEnsemble_ELBO().loss_and_grads(linear, guide, x, targets), guide.positions.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1])


def test_each_member_has_its_own_minibatches_and_sees_every_row_once_an_epoch():
    """At fixed weights the losses of an epoch average to that of all data, per member; members differ in a step."""
    x, y = regression_data()

    def model(x, y):
        linear(x, y, batch_size=4)

    guide = AutoEnsemble(model, 5)
    guide(x, y)
    guide.positions.data[:] = guide.positions.data[0]
    loss, seen = TraceEnsemble_ELBO(), []
    for _ in range(3):
        guide.positions.grad = None
        loss.loss_and_grads(model, guide, x, y)
        seen.append(guide.positions.grad.clone())
    assert len(seen[0].round(decimals=9).unique(dim=0)) > 1
    precision, mean = exact(x, y)
    wanted = (guide.positions.detach() - mean) @ precision
    torch.testing.assert_close(torch.stack(seen).mean(0), wanted, rtol=1e-10, atol=1e-10)


def test_batches_of_a_loader_are_new_data_and_not_constants():
    x, y = regression_data()
    guide = AutoEnsemble(linear, 2)
    guide(x, y)
    loss = TraceEnsemble_ELBO()
    for args in ((x, y), (2 * x, y + 1), (x[:7], y[:7])):
        wanted = float(bnn.Potential(linear, *args).full_energy(guide.positions.detach()).sum())
        assert loss.loss(linear, guide, *args) == pytest.approx(wanted, rel=1e-12)


def test_a_models_own_parameters_are_shared_and_trained():
    """A noise by maximum likelihood: it ends at the root mean square residual of all members."""
    x, y = regression_data(40)

    def model(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3), PRIOR).to_event(1))
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, sigma), obs=y)

    guide = AutoEnsemble(model, 2)
    trained(model, guide, (x, y), 600, Adam({"lr": 0.02}))
    residuals = y - guide.positions.detach() @ x.T
    assert pyro.param("sigma").item() == pytest.approx(float(residuals.square().mean().sqrt()), rel=1e-3)


# ---- anchored members


@pytest.mark.parametrize("noised", [True, False])
def test_anchored_members_with_noised_targets_are_draws_from_the_posterior(noised):
    """In linear regression: mean Λ⁻¹b, covariance Λ⁻¹; without noise on the targets only Λ⁻¹ (I/s²) Λ⁻¹."""
    (_, y), members = regression_data(), 100_000
    basis = torch.linalg.qr(numbers(12, 3, seed=7))[0]
    x = 2.0 * basis @ torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, -0.2], [0.1, 0.0, 0.8]])  # well conditioned
    precision, mean = exact(x, y)
    guide = AutoEnsemble(linear, members, init_loc_fn={"weight": torch.zeros(members, 3)}, anchored=True)
    guide(x, y)
    targets = PerMember(y + NOISE * torch.randn(members, len(y))) if noised else y
    rate = 2 / float(torch.linalg.eigvalsh(precision)[[0, -1]].sum())
    trained(linear, guide, (x, targets), 30, SGD({"lr": rate}))
    covariance = torch.linalg.inv(precision)
    if not noised:
        covariance = covariance @ covariance / PRIOR**2
    found = (guide.positions.detach() - mean).numpy()
    assert_covariance(["w0", "w1", "w2"], found, covariance.numpy())
    for number in range(3):
        assert_mean(f"w{number}", found[:, number], 0.0, float(covariance[number, number]))


def test_anchors_are_draws_from_the_prior_and_leave_other_sites_alone():
    model, args = BayesianMLP(12, None), data()
    trace = pyro.poutine.trace(model).get_trace(*args)
    start = {n: s["value"].expand(20_000, *s["value"].shape) for n, s in trace.iter_stochastic_nodes() if n != "data"}
    guide = AutoEnsemble(model, 20_000, init_loc_fn=start, anchored=True)
    guide(*args)
    place = guide.structure.sites["sigma"].slice
    assert not guide.anchors[:, place].any()
    weights = guide.anchors[:, : guide.structure.dim - 1].numpy()
    assert_mean("anchors", weights, 0.0, 1.0)
    assert_mean("squares of anchors", weights**2, 1.0, 2.0)
    assert "sigma" not in guide.log_density(guide.positions)


# ---- starts and draws


def test_members_start_as_the_net_draws_its_weights():
    """``reset_parameters`` of each layer, a fresh one per member: uniform on ±1/√fan_in."""
    net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(dist.HalfNormal(1.0)))
    guide = AutoEnsemble(model, 500, init_loc_fn="net")
    guide(numbers(5, 4), numbers(5, 1))
    starts = guide.positions.detach()
    weights = starts[:, guide.structure.sites["0.weight"].slice]
    assert weights.abs().max() <= 0.5 and len(weights.unique(dim=0)) == 500
    z = (weights.square().mean() - 1 / 12) / (math.sqrt(1 / 180) / math.sqrt(weights.numel()))  # var of u² on ±½
    assert abs(float(z)) < 5
    assert len(starts[:, -1].unique()) == 500  # the noise, which the net does not have


def test_draws_are_the_members():
    guide = AutoEnsemble(linear, 3)
    guide(*regression_data())
    drawn, own = guide.draws(7)["weight"], guide.positions.detach()
    counts = torch.stack([(drawn == member).all(1).sum() for member in own])
    assert sorted(counts.tolist()) == [2, 2, 3]
    torch.testing.assert_close(guide.median()["weight"], own.quantile(0.5, 0))
    found = {int((own == guide()["weight"]).all(1).nonzero()) for _ in range(60)}
    assert found == {0, 1, 2}  # missed once in 10¹⁰ times


# ---- bad input


def step(guide, args=None, model=linear, **settings):
    return SVI(model, guide, SGD({"lr": 0.01}), TraceEnsemble_ELBO(**settings)).step(*(args or regression_data()))


def broken(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight, 1.0), obs=y)
    pyro.factor("cliff", torch.where(weight.sum() > 5.0, torch.nan, 0.0))


def uniform(x, y):
    weight = pyro.sample("weight", dist.Uniform(-1.0, 1.0).expand([3]).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(F.relu(x @ weight), 1.0), obs=y)


BAD = {
    "members": (lambda: AutoEnsemble(linear, 0), ValueError, "members is 0; give the number"),
    "model": (lambda: AutoEnsemble(3), ValueError, "give a Pyro model"),
    "net": (lambda: AutoEnsemble(linear, 2, init_loc_fn="net"), ValueError, "needs a model of bnn.bayesian"),
    "guide": (lambda: step(AutoFactorizedNormal(linear)), ValueError, "which has no points to move"),
    "particles": (lambda: TraceEnsemble_ELBO(num_particles=0), ValueError, "num_particles is 0"),
    "repulsion": (lambda: TraceEnsemble_ELBO(repulsion=1.0), ValueError, "give WeightRepulsion"),
    "tier": (lambda: TraceEnsemble_ELBO(compile="fast"), ValueError, "is not a tier"),
    "bandwidth": (lambda: GaussianKernel(0.0), ValueError, "bandwidth is 0.0; give a positive number"),
    "early": (lambda: AutoEnsemble(linear).draws(3), RuntimeError, "call the guide, or SVI.step"),
    "anchors": (
        lambda: step(AutoEnsemble(uniform, 2, anchored=True), model=uniform),
        ValueError,
        "needs a site with a Normal prior",
    ),
    "starts": (
        lambda: step(AutoEnsemble(linear, 3, init_loc_fn={"weight": torch.zeros(2, 3)})),
        ValueError,
        "init_loc_fn holds values of 2 points, but there are 3",
    ),
    "per member": (
        lambda: step(AutoEnsemble(linear, 3), (regression_data()[0], PerMember(torch.zeros(2, 12)))),
        ValueError,
        "for 3 members: its first dimension",
    ),
    "function space": (
        lambda: step(AutoEnsemble(linear, 3), repulsion=FunctionRepulsion(torch.zeros(2, 3))),
        ValueError,
        "needs the outputs of a net",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_in_words(name):
    make, error, words = BAD[name]
    with pytest.raises(error, match=words):
        make()


def test_a_loss_that_is_not_finite_stops_and_keeps_the_parameters():
    guide = AutoEnsemble(broken, 2)
    guide(*regression_data())
    guide.positions.data[1] = 9.0
    before = guide.positions.detach().clone()
    with pytest.raises(RuntimeError, match="the loss is nan.*keep their last values"):
        step(guide, model=broken)
    assert torch.equal(before, guide.positions.detach())
