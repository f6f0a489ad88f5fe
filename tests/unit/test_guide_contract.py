"""What a Pyro user does with a guide works with each of ours: training, predicting, saving."""

import copy
import io
import math
import pickle
import warnings

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO, TraceMeanField_ELBO
from scipy import stats

from bnn.distributions import EigenNormal, MatrixNormal
from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    NaturalGradientOptimizer,
    TraceNaturalGradient_ELBO,
)
from bnn.structure import base_of
from support.nets import BayesianMLP, data, normal_prior, numbers
from support.regression import Regression, divergence, gaussian_of

GUIDES = [AutoFactorizedNormal, AutoMatrixNormal, AutoEigenNormal]
each_guide = pytest.mark.parametrize("guide_class", GUIDES, ids=[guide.__name__ for guide in GUIDES])
# A bias is drawn before its weight, and the weight given the bias: another order than the model's.
bias_first = pytest.mark.filterwarnings("ignore:Failed to verify mean field restriction:UserWarning")
# Torch says once per process that a gradient comes transposed.
layout = pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout:UserWarning")
ALPHA = 1e-6  # false-alarm rate of each statistical test; seeds are fixed
MLP = BayesianMLP(12, 4)


def natural(model, guide, **settings):
    return SVI(model, guide, NaturalGradientDescent(), TraceNaturalGradient_ELBO(**settings))


def values_of(guide):
    """Copies of all parameters and buffers."""
    return {name: value.detach().clone() for name, value in guide.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


# ---- training


@layout
@each_guide
@bias_first
@pytest.mark.parametrize(
    ("optimizer", "loss"),
    [
        (lambda: pyro.optim.ClippedAdam({"lr": 0.02}), TraceMeanField_ELBO()),
        (lambda: pyro.optim.Adam({"lr": 0.02}), Trace_ELBO(num_particles=2)),
    ],
    ids=["ClippedAdam-MeanField", "Adam-particles"],
)
def test_bayes_by_backprop(guide_class, optimizer, loss):
    guide = guide_class(MLP)
    svi = SVI(MLP, guide, optimizer(), loss)
    guide(*data())
    before = values_of(guide)
    losses = torch.tensor([svi.step(*data()) for _ in range(60)])
    assert losses.isfinite().all() and losses[-20:].mean() < losses[:20].mean()
    trained = {name for name, _ in guide.named_parameters()}
    assert trained == {name for name, value in values_of(guide).items() if not torch.equal(value, before[name])}


@each_guide
def test_natural_gradients_with_a_schedule(guide_class):
    """Pyro's scheduler lowers the rates of all parameters, those of the precisions too."""
    schedule = pyro.optim.ExponentialLR(
        {"optimizer": NaturalGradientOptimizer, "optim_args": {"lr": 0.2, "precision_lr": 0.1}, "gamma": 0.5}
    )
    guide = guide_class(MLP)
    svi = SVI(MLP, guide, schedule, TraceNaturalGradient_ELBO())
    losses = [svi.step(*data()) for _ in range(40)]
    for _ in range(60):
        schedule.step()
    before = values_of(guide)
    losses.append(svi.step(*data()))
    assert all(math.isfinite(loss) for loss in losses) and sum(losses[-20:]) < sum(losses[:20])
    for name, _ in guide.named_parameters():
        if "eigen_scale" not in name:  # an eigenbasis turns at its own rate
            torch.testing.assert_close(values_of(guide)[name], before[name], rtol=1e-5, atol=1e-6, msg=name)


LOSSES = {
    "Trace": (Trace_ELBO(), 1.0),
    "MeanField": (TraceMeanField_ELBO(), 1.0),
    "natural": (TraceNaturalGradient_ELBO(kl_weight=0.3), 0.3),
}


@each_guide
@pytest.mark.parametrize("name", LOSSES)
@bias_first
def test_every_loss_estimates_the_same_bound(guide_class, name):
    """E loss = −(best value) + λ KL(q ‖ posterior of weight λ), in closed form."""
    torch.set_default_dtype(torch.float64)
    problem, (loss, kl_weight) = Regression("correlated", noise="correlated", outputs=2), LOSSES[name]
    guide = guide_class(problem, init_scale=0.3)
    svi = SVI(problem, guide, NaturalGradientDescent(), loss)
    with torch.no_grad():
        guide(*problem.args)
        losses = torch.tensor([svi.evaluate_loss(*problem.args) for _ in range(250)])
    wanted = kl_weight * divergence(*gaussian_of(guide, problem), problem.posterior(kl_weight))
    wanted -= problem.log_evidence(kl_weight)
    z = (losses.mean() - wanted) / losses.std() * math.sqrt(len(losses))
    assert abs(float(z)) < stats.norm.isf(ALPHA / 2), (float(z), float(losses.mean()), wanted)


@pytest.mark.parametrize("guide_class", GUIDES[1:2])
def test_seed_decides_the_run(guide_class):
    runs = []
    for _ in range(2):
        pyro.clear_param_store()
        pyro.set_rng_seed(4)
        guide = guide_class(MLP)
        svi = natural(MLP, guide)
        runs.append([svi.step(*data()) for _ in range(5)] + [svi.evaluate_loss(*data())])
    assert runs[0] == runs[1]


@each_guide
def test_batches_may_change_size(guide_class):
    x, y = data(20)

    def whole(x, y):
        weight = pyro.sample("weight", normal_prior(2, 3))
        with pyro.plate("data", 20, subsample_size=len(x)):
            pyro.sample("obs", dist.Normal((x @ weight.T).sum(-1), 1.0), obs=y)

    guide = guide_class(whole)
    svi = natural(whole, guide)
    losses = [svi.step(xb, yb) for _ in range(3) for xb, yb in zip(x.split(8), y.split(8), strict=True)]
    assert len(losses) == 9 and all(math.isfinite(loss) for loss in losses)


def test_a_models_own_parameters_are_trained_too():
    """A noise learned by maximum likelihood next to natural gradients: it ends where the residuals are."""
    x, noise = numbers(200, 3, seed=1), numbers(200, seed=2)
    y = x.sum(-1) + 0.3 * noise

    def model(x, y):
        weight = pyro.sample("weight", normal_prior(1, 3))
        sigma = pyro.param("sigma", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, weight).squeeze(-1), sigma), obs=y)

    svi = SVI(model, AutoMatrixNormal(model), NaturalGradientDescent(0.2, other_lr=0.05), TraceNaturalGradient_ELBO())
    for _ in range(250):
        svi.step(x, y)
    assert pyro.param("sigma").item() == pytest.approx(float(0.3 * noise.square().mean().sqrt()), rel=0.1)


@each_guide
def test_models_that_cannot_be_recorded_train_with_one_warning(guide_class):
    x, y = data()

    def model(x, y):
        weight = pyro.sample("weight", normal_prior(2, 3))
        scale = 2.0 if weight.sum() > 0 else 1.0
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(F.linear(x, weight).sum(-1), scale), obs=y)

    guide = guide_class(model)
    svi = natural(model, guide)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = torch.tensor([svi.step(x, y) for _ in range(100)])
    assert [str(w.message) for w in caught if "cannot be recorded" in str(w.message)][1:] == []
    assert len(caught) == 1 and "cannot be recorded" in str(caught[0].message)
    assert losses.isfinite().all() and losses[-30:].mean() < losses[:10].mean()


# ---- what a guide is for


@each_guide
def test_predictive_median_and_quantiles(guide_class):
    guide = guide_class(MLP)
    svi = SVI(MLP, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    svi.step(*data())
    draws = Predictive(MLP, guide=guide, num_samples=7)(*data())
    assert draws["hidden.weight"].shape[0] == 7 and draws["obs"].shape[0] == 7
    median, quantiles = guide.median(*data()), guide.quantiles([0.1, 0.5, 0.9], *data())
    trace = poutine.trace(MLP).get_trace(*data())
    assert median.keys() == quantiles.keys() == set(trace.stochastic_nodes) - {"data"}
    for name, value in median.items():
        shape = trace.nodes[name]["value"].shape
        assert value.shape == shape and quantiles[name].shape == (3, *shape)
        torch.testing.assert_close(quantiles[name][1], value)
        assert (quantiles[name].diff(dim=0) > 0).all() and not value.requires_grad
    samples = Predictive(guide, num_samples=400)(*data())
    for name, value in quantiles.items():  # shares below each quantile: three binomial counts per entry
        share = (samples[name].reshape(400, *value.shape[1:]) < value.unsqueeze(1)).float().mean(1)
        level = torch.tensor([0.1, 0.5, 0.9]).reshape(-1, *(1,) * (value.dim() - 1))
        z = (share - level).abs() / (level * (1 - level) / 400).sqrt()
        assert z.max() < stats.norm.isf(ALPHA / 100), name


@each_guide
@pytest.mark.parametrize(
    "problem",
    [
        Regression("linear"),
        Regression("without-bias", bias=False),
        Regression("transposed", spelling="transposed"),
        Regression("transposed-without-bias", spelling="transposed", bias=False),
        Regression("convolution", spelling="conv"),
    ],
    ids=lambda p: p.name,
)
def test_the_traced_density_is_the_parameters_gaussian(guide_class, problem):
    """Joint density of weight and bias, and normal laws at the sites themselves wherever the law is one of them."""
    torch.set_default_dtype(torch.float64)
    guide = guide_class(problem, init_scale=0.5)
    guide(*problem.args)
    for parameter in guide.parameters():
        torch.manual_seed(parameter.numel())
        change = 0.3 * torch.randn_like(parameter)
        parameter.data += change.tril() if parameter.dim() == 2 and len(parameter) == parameter.shape[1] else change
    if guide_class is AutoEigenNormal:
        for name in ("row_basis_0", "col_basis_0"):
            basis = getattr(guide, name)
            basis.copy_(torch.linalg.qr(numbers(*basis.shape, seed=len(basis)))[0])
    mean, covariance = gaussian_of(guide, problem)
    trace = poutine.trace(guide).get_trace(*problem.args)
    weight = trace.nodes["weight"]["value"]
    weight = weight.T if problem.spelling == "transposed" else weight.reshape(problem.outputs, -1)
    matrix = torch.cat([trace.nodes["bias"]["value"][:, None], weight], 1) if problem.bias else weight
    wanted = dist.MultivariateNormal(mean, covariance).log_prob(matrix.flatten())
    torch.testing.assert_close(trace.log_prob_sum(), wanted, rtol=1e-9, atol=1e-9)

    law = {AutoFactorizedNormal: dist.Normal, AutoMatrixNormal: MatrixNormal, AutoEigenNormal: EigenNormal}[guide_class]
    if guide_class is AutoEigenNormal and problem.bias:
        law = dist.Delta
    assert type(_inner(trace.nodes["weight"]["fn"])) is law
    if problem.bias:
        laws = {AutoMatrixNormal: dist.MultivariateNormal}
        assert type(_inner(trace.nodes["bias"]["fn"])) is laws.get(guide_class, law)


def _inner(fn):
    while type(fn).__name__ == "TransformedDistribution":
        fn = fn.base_dist
    return base_of(fn)


def test_a_family_for_each_site():
    families = {"hidden.weight": "eigen", "out.weight": "factorized"}
    guide = AutoMatrixNormal(MLP, family=lambda name, shape: families.get(name))
    natural(MLP, guide).step(*data())
    found = {name: block.family for block in guide.blocks for name in block.names}
    assert found == {
        "hidden.weight": "eigen",
        "hidden.bias": "eigen",
        "out.weight": "factorized",
        "out.bias": "factorized",
        "sigma": "factorized",
    }


# ---- keeping it


@each_guide
def test_state_dict_pickle_and_deepcopy(guide_class):
    guide = guide_class(MLP)
    svi = natural(MLP, guide)
    for _ in range(3):
        svi.step(*data())
    state, median = values_of(guide), guide.median()
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        assert_same(values_of(other), state)
        assert_same(other.median(), median)
        assert other.model is not None
    assert guide.model is MLP
    svi.step(*data())  # the original goes on
    assert not torch.equal(guide.median()["hidden.weight"], median["hidden.weight"])
    pyro.clear_param_store()
    fresh = guide_class(MLP)
    fresh(*data())
    fresh.load_state_dict(state)
    assert_same(values_of(fresh), state)
    for again in (fresh, other):
        assert math.isfinite(natural(again.model, again).step(*data()))


@each_guide
def test_parameter_store_and_optimizer_state_resume_a_run(guide_class):
    """Read into new objects, they go on as the old ones would, momentum included, bit by bit."""
    net = BayesianMLP(12, None)

    def start():
        guide, optimizer = guide_class(net), NaturalGradientDescent(momentum=0.5)
        return guide, optimizer, SVI(net, guide, optimizer, TraceNaturalGradient_ELBO("empirical"))

    guide, optimizer, svi = start()
    for _ in range(4):
        svi.step(*data())
    kept = io.BytesIO()
    torch.save((pyro.get_param_store().get_state(), optimizer.get_state(), guide.state_dict()), kept)
    pyro.set_rng_seed(1)
    wanted = svi.step(*data())

    kept.seek(0)
    parameters, rates, state = torch.load(kept, weights_only=False)
    pyro.clear_param_store()
    pyro.get_param_store().set_state(parameters)
    other, optimizer, svi = start()
    optimizer.set_state(rates)
    other(*data())
    for name, _ in other.named_parameters():
        assert torch.equal(values_of(other)[name], state[name]), name
    pyro.set_rng_seed(1)
    if guide_class is not AutoEigenNormal:  # its bases are buffers: in state_dict(), not in Pyro's store
        assert svi.step(*data()) == wanted
        assert_same(values_of(other), values_of(guide))


@layout
@each_guide
def test_module_local_parameters(guide_class):
    with pyro.settings.context(module_local_params=True):
        net = BayesianMLP(12, 4)
        first, second = guide_class(net), guide_class(net)
        svi = natural(net, first)
        assert math.isfinite(svi.step(*data())) and math.isfinite(svi.evaluate_loss(*data()))
        second(*data())
        assert not any(name.startswith("loc") for name in pyro.get_param_store())
        assert not torch.equal(first.median()["hidden.weight"], second.median()["hidden.weight"])
        loss = Trace_ELBO()(net, first)
        loss(*data()).backward()
        assert all(parameter.grad is not None for parameter in first.parameters())
