"""K-FAC on AutoDelta within SVI: its losses, sites of all kinds, training, and what goes wrong."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_sample
from torch.distributions import constraints

from bnn.guides import NaturalGradientDescent
from bnn.guides._kfac_blocks import PointSettings
from bnn.guides._kronecker import Damping, inverses
from bnn.guides._point import Point
from support.nets import BayesianMLP, ConvNet, GRUClassifier, WordBag, data, labels, normal_prior, numbers
from support.point_estimates import REAL, Net, Objective, flat_of, gradient, guide_at, step_of
from support.regression import Regression


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


# ---- the loss, and other sites


def several_kinds(x, y):
    """Constrained, hierarchical and plain sites."""
    tau = pyro.sample("tau", dist.Gamma(3.0, 2.0))
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), tau).to_event(1))
    mix = pyro.sample("mix", dist.Dirichlet(torch.ones(3) * 2))
    sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ (weight * mix), sigma), obs=y)


@pytest.mark.parametrize(
    ("kind", "curvature"), [("net", "ggn"), ("several kinds", "sampled"), slow("several kinds", "empirical")]
)
def test_the_loss_is_that_of_trace_elbo(kind, curvature):
    args, model = data(), BayesianMLP(12, None) if kind == "net" else several_kinds
    guide, objective = AutoDelta(model, init_loc_fn=init_to_sample), Objective(curvature, trust_region=1.0)
    svi = SVI(model, guide, NaturalGradientDescent(0.05), objective)
    guide(*args)
    for _ in range(5):
        wanted = Trace_ELBO().loss(model, guide, *args)
        assert svi.step(*args) == pytest.approx(wanted, rel=1e-9)


def test_the_loss_has_the_weight_of_the_prior():
    problem = Regression("one")
    guide = guide_at(problem, {"weight": numbers(3, 4), "bias": numbers(3)})
    trace = pyro.poutine.trace(pyro.poutine.condition(problem, guide(*problem.args))).get_trace(*problem.args)
    trace.compute_log_prob()
    prior = sum(trace.nodes[name]["log_prob_sum"] for name in ("weight", "bias"))
    wanted = -float((trace.nodes["obs"]["log_prob_sum"] + 0.3 * prior).detach())
    assert Objective(kl_weight=0.3).loss_and_grads(problem, guide, *problem.args) == pytest.approx(wanted)


def test_a_scale_divides_by_its_squares_per_datum_and_the_priors_curvature():
    x, y = data()

    def model(x, y):
        sigma = pyro.sample("sigma", dist.LogNormal(0.2, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(0.0, sigma), obs=y)

    guide = guide_at(model, {"sigma": torch.tensor(0.8)})
    objective = Objective(damping=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        objective.loss_and_grads(model, guide, x, y)
    squares = objective.estimate._means["squares", "sigma"]
    (point,) = objective.estimate._points.values()
    leaf = torch.tensor(0.8).log().requires_grad_()
    # one random sign per datum makes the square of the sum unbiased: average over many
    draws = [
        point.estimate({"sigma": leaf.detach()}, point.minibatch((x, y), {}), True, True)["squares", "sigma"]
        for _ in range(1500)
    ]
    exact = ((y / 0.8) ** 2 - 1).square().sum()  # (∂ log N(y; 0, e^l) / ∂l)²
    error = torch.stack(draws).std() / math.sqrt(len(draws))
    assert abs(torch.stack(draws).mean() - exact) < 5 * error
    # minus log of LogNormal(0.2, 0.5) at e^l is ½ ((l − 0.2) / 0.5)² + l + …: second derivative 4
    wanted = gradient_of_scale(leaf, y) / (squares + 4.0 + 0.3)
    torch.testing.assert_close(objective.estimate._leaves.leaves["sigma"].grad, wanted)


def gradient_of_scale(leaf, y):
    loss = -dist.Normal(0.0, leaf.exp()).log_prob(y).sum() - dist.LogNormal(0.2, 0.5).log_prob(leaf.exp())
    return torch.autograd.grad(loss, leaf)[0]


def test_biases_alone_divide_by_their_squares():
    x, y = numbers(10, 3), numbers(10, 3, seed=5)

    def model(x, y):
        shift = pyro.sample("shift", normal_prior(3))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(torch.tanh(x + shift), 0.5).to_event(1), obs=y)

    start = numbers(3)
    update, _ = step_of(model, {"shift": start}, (x, y))
    slope = 1 - torch.tanh(x + start) ** 2
    g = -((y - torch.tanh(x + start)) * slope).sum(0) / 0.25 + start
    torch.testing.assert_close(update["shift"], -g / ((slope**2).sum(0) / 0.25 + 1.0))


@pytest.mark.slow
def test_sampled_moments_average_to_the_gauss_newton_ones():
    net, rows = Net((4, 3, 2), scale=0.6, classes=True), 9
    x, y = numbers(rows, 4), labels(rows, 2)
    values, found = net.start(), {}
    for curvature, draws in (("ggn", 1), ("sampled", 1000)):
        point = Point(net, (x, y), {}, PointSettings(curvature))
        batch = point.minibatch((x, y), {})
        found[curvature] = torch.stack(
            [point.estimate(values, batch, True, True)["output_moment", 0] for _ in range(draws)]
        )
    error = found["sampled"].std(0) / math.sqrt(1000)
    assert ((found["sampled"].mean(0) - found["ggn"][0]).abs() / error).max() < 5.5


# ---- training


@pytest.mark.parametrize(
    ("optimizer", "settings"),
    [
        (lambda: pyro.optim.SGD({"lr": 0.1}), {"curvature": "sampled", "trust_region": 1.0}),
        (
            lambda: NaturalGradientDescent(1.0),
            {"rescale": True, "momentum": True, "damping": 1.0, "adaptive_damping": True},
        ),
        (lambda: NaturalGradientDescent(0.2), {"block_tridiagonal": True, "damping": 1.0}),
    ],
    ids=["sgd", "rescaled", "block tridiagonal"],
)
def test_trains_a_classifier(optimizer, settings):
    torch.set_default_dtype(torch.float32)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(300, 4, generator=generator)
    y = (x[:, 0] * x[:, 1] > 0).long()

    class Model:
        net = Net((4, 16, 2), classes=True)

        def __call__(self, x, y):
            weights = [
                (pyro.sample(f"w{i}", normal_prior(o, k)), pyro.sample(f"b{i}", normal_prior(o)))
                for i, (k, o) in enumerate(((4, 16), (16, 2)))
            ]
            with pyro.plate("data", len(x), subsample_size=100) as rows:
                pyro.sample("obs", dist.Categorical(logits=self.net.net(weights, x[rows])), obs=y[rows])

    model = Model()
    start = {name: value.float() for name, value in model.net.start().items()}
    guide = guide_at(model, start)
    svi = SVI(model, guide, optimizer(), Objective(statistics_every=2, inverses_every=4, **settings))
    losses = [svi.step(x, y) for _ in range(100)]
    values = {name: value.detach() for name, value in guide.median().items()}
    accuracy = (model.net.flat_net(values, x).argmax(-1) == y).double().mean()
    assert accuracy > 0.9 and sum(losses[-10:]) < 0.7 * sum(losses[:10]), (accuracy, losses[::20])


def test_the_prior_is_kept_for_some_steps_and_the_minimum_is_the_same():
    x, y = numbers(4, 20), labels(4, 2)
    net = Net((20, 15, 2), scale=0.6, classes=True)  # with four data its gradients are thin
    guide = guide_at(net, net.start())
    svi = SVI(net, guide, NaturalGradientDescent(0.5), Objective(statistics_every=10, inverses_every=10))
    for _ in range(200):
        svi.step(x, y)
    values = {name: value.detach() for name, value in guide.median().items()}
    grads = gradient(net, values, (x, y))
    assert max(float(g.abs().max()) for g in grads.values()) < 1e-3


OPTIONS = {"rescale": True, "momentum": True, "block_tridiagonal": True}


@pytest.mark.parametrize(
    ("case", "settings"), [("words", OPTIONS), slow("conv", {}), slow("conv", OPTIONS), slow("recurrent", {})]
)
def test_layers_of_other_kinds(case, settings):
    torch.set_default_dtype(torch.float32)
    models = {
        "conv": (ConvNet(), numbers(6, 1, 14, 14)),
        "words": (WordBag(), torch.arange(40).reshape(8, 5) % 7),
        "recurrent": (GRUClassifier(), numbers(8, 5, 3)),
    }
    model, x = models[case]
    guide = AutoDelta(model, init_loc_fn=init_to_sample)
    svi = SVI(
        model, guide, NaturalGradientDescent(0.1), Objective("sampled", damping=1.0, trust_region=1.0, **settings)
    )
    losses = [svi.step(x, labels(len(x), 3)) for _ in range(25)]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_batches_of_two_sizes():
    net, guide = Net((20, 15, 2), scale=0.6), AutoDelta(Net((20, 15, 2), scale=0.6), init_loc_fn=init_to_sample)
    objective = Objective(statistics_every=4, inverses_every=4, damping=1.0)
    svi, losses = SVI(net, guide, NaturalGradientDescent(0.1), objective), []
    for k in range(12):
        rows = 30 if k % 3 < 2 else 3  # gradients of the second kind are thin
        losses.append(svi.step(numbers(rows, 20), numbers(rows, 2)) / rows)
    assert [point.sites.thin for point in objective.estimate._points.values()] == [set(), {0}]
    assert losses[-2] < losses[0] and losses[-1] < losses[2]


def test_a_reloaded_store_is_followed():
    net, x, y = Net((4, 3, 2)), numbers(9, 4), numbers(9, 2)
    guide, objective = AutoDelta(net, init_loc_fn=init_to_sample), Objective()
    svi = SVI(net, guide, NaturalGradientDescent(0.3), objective)
    first = svi.step(x, y)
    state = pyro.get_param_store().get_state()
    second = [svi.step(x, y), svi.step(x, y)][0]
    assert second != first
    pyro.get_param_store().set_state(state)
    assert svi.step(x, y) == pytest.approx(Trace_ELBO().loss(net, guide, x, y), rel=0.5)


def test_models_that_cannot_be_recorded_take_diagonal_steps():
    x, y = data()

    def model(x, y):
        weight = pyro.sample("weight", normal_prior(3))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        factor = 1.0 if float(weight.detach().sum()) > -1e9 else 2.0
        shift = pyro.param("shift", torch.tensor(0.1))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight * factor + shift, sigma), obs=y)

    guide = AutoDelta(model)
    guide(x, y)
    wanted = Trace_ELBO().loss(model, guide, x, y)
    svi = SVI(model, guide, NaturalGradientDescent(0.1, other_lr=0.05), Objective("sampled", trust_region=1.0))
    with pytest.warns(RuntimeWarning, match="Pyro's handlers"):
        losses = [svi.step(x, y)]
    losses += [svi.step(x, y) for _ in range(60)]
    assert losses[0] == pytest.approx(wanted) and losses[-1] < losses[0]
    assert abs(float(pyro.param("shift").detach()) - 0.1) > 0.01


def test_parameters_of_the_model_get_their_gradient():
    x, y = numbers(9, 4), numbers(9, 2)

    def model(x, y):
        weight = pyro.sample("weight", normal_prior(2, 4))
        shift = pyro.param("shift", torch.tensor([0.1, 0.2]))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight.T + shift, 0.5).to_event(1), obs=y)

    start = numbers(2, 4)
    step_of(model, {"weight": start}, (x, y))
    wanted = -((y - x @ start.T - torch.tensor([0.1, 0.2])) / 0.25).sum(0)
    torch.testing.assert_close(dict(pyro.get_param_store().named_parameters())["shift"].grad, wanted)


# ---- what goes wrong


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"damping": -1.0}, "damping is -1"),
        ({"adaptive_damping": True}, "positive one to start from"),
        ({"momentum": True}, "rescale=True"),
        ({"curvature_rate": 0.0}, "curvature_rate is 0"),
        ({"inverses_every": 3, "statistics_every": 2}, "give a multiple"),
        ({"trust_region": 0.0}, "trust_region is 0"),
        ({"curvature": "reparametrization"}, "no draws to reparametrize"),
    ],
)
def test_bad_settings(settings, words):
    with pytest.raises(ValueError, match=words):
        step_of(Regression("one"), {}, Regression("one").args, **settings)


def test_guide_of_another_model():
    guide = AutoDelta(Regression("without", bias=False))
    guide(*Regression("one").args)
    with pytest.raises(ValueError, match=r"only the model \['bias'\]"):
        Objective().loss_and_grads(Regression("one"), guide, *Regression("one").args)


def test_adam_is_refused():
    problem = Regression("one")
    svi = SVI(problem, AutoDelta(problem), pyro.optim.Adam({"lr": 0.1}), Objective())
    with pytest.raises(ValueError, match="as Adam does"):
        for _ in range(3):
            svi.step(*problem.args)


def test_a_loss_that_is_not_finite():
    problem = Regression("one")
    x, y = problem.args
    guide, objective = AutoDelta(problem), Objective()
    objective.loss_and_grads(problem, guide, x, y)
    with pytest.raises(RuntimeError, match="at step 1 the loss is nan"):
        objective.loss_and_grads(problem, guide, x, y * math.nan)


def test_a_singular_factor_is_damped_with_one_warning():
    net = Net((6, 5, 2), scale=None)  # flat priors, and fewer data than inputs
    x, y = numbers(4, 6), numbers(4, 2)
    with pytest.warns(RuntimeWarning, match="is singular with a damping of 0") as caught:
        update, objective = step_of(net, net.start(), (x, y))
        objective.estimate._invert(next(iter(objective.estimate._points.values())))
    assert len(caught) == 1 and objective.estimate._damp.raised == {"w0", "b0", "w1", "b1"}
    assert all(torch.isfinite(value).all() for value in update.values())


def test_damping_is_raised_within_bounds():
    asked = []
    with pytest.raises(RuntimeError, match=r"singular, even with a damping of 2e\+06"):
        Damping()(["a"], 2.0, 1.0, lambda size: asked.append(size))
    assert asked == pytest.approx([2.0 * 10.0**k for k in range(7)])
    singular = torch.ones(3, 3)
    assert inverses(singular, torch.eye(2), 0.0) is None
    assert inverses(singular, torch.eye(2), 1e-6) is not None


def test_a_site_of_which_nothing_is_known():
    def model(x, y):
        pyro.sample("free", dist.ImproperUniform(constraints.independent(REAL, 1), (), (2,)))
        slope = pyro.sample("slope", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x * slope, 1.0), obs=y)

    with pytest.raises(RuntimeError, match=r"sites \['free'\] is singular.*extrinsic_damping"):
        step_of(model, {"free": torch.zeros(2), "slope": torch.tensor(0.5)}, (numbers(3), numbers(3)))


def test_trust_region_bounds_the_step():
    net, rows = Net((5, 3, 1), scale=2.0), 11
    x, y = numbers(rows, 5), 100 * numbers(rows, 1)
    values = net.start()
    update, _ = step_of(net, values, (x, y))
    bounded, _ = step_of(net, values, (x, y), trust_region=0.01)
    g, u, b = (flat_of(v, net) for v in (gradient(net, values, (x, y)), update, bounded))
    torch.testing.assert_close(b / u, (b / u)[0].expand(len(u)))
    assert math.sqrt(float(-g @ u) / len(u)) > 0.01
    assert float((b / u)[0]) * math.sqrt(float(-g @ u) / len(u)) == pytest.approx(0.01)
