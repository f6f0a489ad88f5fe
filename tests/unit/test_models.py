"""Pyro models out of nets: the same energy as by hand, under every way of inference, and clear words for what fails."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pyro.infer
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS, SVI, Predictive, Trace_ELBO
from pyro.infer.autoguide import AutoDiagonalNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import bnn
from bnn.guides import AutoMatrixNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
from bnn.kernels import MCMC, SGLD
from bnn.likelihoods import Gaussian
from bnn.priors import Normal
from support.plain_nets import MLP, NETS, ROWS, TRANSFORMER, Branches, Case, mlp
from support.regression import Regression, divergence, gaussian_of, train

each_net = pytest.mark.parametrize("case", NETS, ids=lambda case: case.name)


def some_quick(*quick: str) -> Any:
    """Every net, those that are not named among the slow tests."""
    marked = [pytest.param(c, id=c.name, marks=[] if c.name in quick else pytest.mark.slow) for c in NETS]
    return pytest.mark.parametrize("case", marked)


@pytest.fixture
def double() -> None:
    torch.set_default_dtype(torch.float64)


def by_hand(net: nn.Module, x: Any, y: Tensor, values: dict[str, Tensor]) -> float:
    """The log joint under Normal(1.0), centred at one for gains, of all data."""
    total = 0.0
    for name, value in values.items():
        total += dist.Normal(1.0 if "norm" in name and "weight" in name else 0.0, 1.0).log_prob(value).sum()
    with torch.no_grad():
        outputs = torch.func.functional_call(net, values, x if isinstance(x, tuple) else (x,))
    if y.dtype == torch.long:
        return float(total - nn.functional.cross_entropy(outputs, y, reduction="sum"))
    return float(total + dist.Normal(outputs.reshape(ROWS), 0.3).log_prob(y).sum())


# ---- every net


@some_quick("mlp", "conv", "group_norm", "tied_embedding", "two_inputs")
def test_each_net_is_recorded_and_right(case: Case, double: None) -> None:
    """The energy of all data is minus the log joint, and so is the mean over an epoch of minibatches."""
    net, (x, y) = case.net(), case.data()
    model = case.model(net, prior=Normal(1.0), batch_size=4)
    potential = bnn.Potential(model, x, y, compile="fx")  # warns, an error in tests, if it cannot be recorded
    assert potential.is_recorded
    assert list(potential.sites) == [name for name, _ in net.named_parameters()]
    position = 0.5 * torch.randn(1, potential.dim)
    values = {name: value[0] for name, value in potential.constrain(position).items()}
    expected = -by_hand(net, x, y, values)
    assert float(potential.full_energy(position)) == pytest.approx(expected, rel=1e-12)
    stream = potential.stream(1)
    epoch = [float(potential.traced_energy_and_grad(position, stream.next(1)[0])[0]) for _ in range(3)]
    assert np.mean(epoch) == pytest.approx(expected, rel=1e-12)


@some_quick("mlp", "group_norm", "tied_embedding")
def test_guides_recognise_the_layers(case: Case) -> None:
    x, y = case.data()
    model = case.model(batch_size=6)
    guide = AutoMatrixNormal(model)
    svi = SVI(model, guide, NaturalGradientDescent(lr=0.05), TraceNaturalGradient_ELBO())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [svi.step(x, y) for _ in range(2)]
    words = " ".join(str(w.message) for w in caught if "curvature" in str(w.message))
    named = {name for name in model.priors if f"'{name}'" in words}
    assert named == case.unrecognised and np.isfinite(losses).all()
    assert Predictive(model, guide=guide, num_samples=3)(x)["y"].shape == (3, ROWS)


@some_quick("mlp", "tied_embedding")
def test_every_inference_runs(case: Case) -> None:
    """A kernel's chains, their ArviZ data and predictions; Adam on one of Pyro's guides."""
    x, y = case.data()
    model = case.model(batch_size=6)
    mcmc = MCMC(SGLD(model, step_size=1e-7, compile="fx"), num_samples=2, num_chains=2, disable_progbar=True)
    mcmc.run(x, y)
    found = bnn.to_arviz(mcmc).log_likelihood["y"].values
    values = {name: value[1, 1] for name, value in mcmc.get_samples(group_by_chain=True).items()}
    trace = poutine.trace(poutine.condition(case.model(model.net), values)).get_trace(x, y)
    trace.compute_log_prob()
    assert np.allclose(found[1, 1], trace.nodes["y"]["log_prob"].numpy(), atol=1e-4)
    assert Predictive(model, mcmc.get_samples())(x)["y"].shape == (4, ROWS)
    svi = SVI(model, AutoDiagonalNormal(model), pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    assert math.isfinite(svi.step(x, y))


@each_net
def test_the_given_net_is_left_alone(case: Case) -> None:
    net, (x, y) = case.net(), case.data()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    model = case.model(net)
    model(x, y)
    svi = SVI(model, AutoDiagonalNormal(model), pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(x, y)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes == [m.training for m in model.net.modules()]
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert not [name for name in pyro.get_param_store() if not name.startswith("AutoDiagonalNormal")]
    net(*(x if isinstance(x, tuple) else (x,))).sum().backward()  # it can still be trained
    assert not any(p.requires_grad for p in model.net.parameters())


@each_net
def test_pickled_and_copied_models_are_the_same(case: Case) -> None:
    x, y = case.data()
    model = case.model()
    values = {n: s["value"] for n, s in poutine.trace(model).get_trace(x, y).nodes.items() if n in model.priors}
    expected = poutine.trace(poutine.condition(model, values)).get_trace(x, y).log_prob_sum()
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        found = poutine.trace(poutine.condition(other, values)).get_trace(x, y).log_prob_sum()
        assert torch.equal(found, expected)
        assert repr(other) == repr(model)


def test_attention_never_takes_the_fused_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of eval mode have no gradients and run draw by draw under vmap. The setting is put back."""
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", None)
    model, (x, _) = TRANSFORMER.model(), TRANSFORMER.data()
    values = {p.name: model.law(p.name).sample() for p in model.parameters}
    with torch.no_grad():
        plain = model.outputs(values, [x])
    tracked = model.outputs({name: value.requires_grad_() for name, value in values.items()}, [x])
    assert torch.equal(plain, tracked) and torch.backends.mha.get_fastpath_enabled()


def test_a_net_that_cannot_be_recorded_runs_with_handlers(double: None) -> None:
    net, (x, y) = Branches(2, 1), MLP.data()
    model = MLP.model(net, prior=Normal(1.0), batch_size=4)
    with pytest.warns(RuntimeWarning, match="handlers, several times slower: Python reads the value") as caught:
        potential = bnn.Potential(model, x, y, compile="fx")
        position = torch.randn(1, potential.dim)
        values = {name: value[0] for name, value in potential.constrain(position).items()}
        potential.energy_and_grad(position)
    assert len(caught) == 1
    # A minibatch's mean is another number than the data's: minibatches are compared, not their sum.
    (inputs,) = potential.stream(1).next(1)
    energy, _ = potential.traced_energy_and_grad(position, inputs)
    rows = inputs[0][0]
    outputs = torch.func.functional_call(net, values, (x[rows],)).squeeze(-1)
    prior = sum(dist.Normal(0.0, 1.0).log_prob(value).sum() for value in values.values())
    expected = prior + ROWS / 4 * dist.Normal(outputs, 0.3).log_prob(y[rows]).sum()
    assert float(energy) == pytest.approx(-float(expected), rel=1e-12)


def test_nuts_runs() -> None:
    x, y = MLP.data()
    mcmc = pyro.infer.MCMC(NUTS(MLP.model(), max_tree_depth=3), num_samples=3, warmup_steps=3, disable_progbar=True)
    mcmc.run(x, y)
    assert mcmc.get_samples()["0.weight"].shape == (3, 5, 2)


@pytest.mark.slow
def test_chains_in_processes() -> None:
    x, y = MLP.data()
    kernel = SGLD(MLP.model(batch_size=4), step_size=1e-4, compile="fx")
    mcmc = MCMC(kernel, num_samples=3, num_chains=2, chain_method="parallel", mp_context="spawn", disable_progbar=True)
    mcmc.run(x, y)
    assert mcmc.get_samples(group_by_chain=True)["0.weight"].shape == (2, 3, 5, 2)


# ---- exact answers


@pytest.mark.parametrize(("outputs", "steps"), [(1, 2), (3, 4)])
def test_linear_regression_is_exact(outputs: int, steps: int, double: None) -> None:
    """A linear net under the matrix-normal guide: the posterior in two steps of rate one, four with several outputs."""
    problem = Regression("linear", outputs=outputs)
    (x, y), scale = problem.args, float(problem.covariance[0, 0].sqrt())
    model = bnn.bayesian(nn.Linear(4, outputs), prior=Normal(0.8), likelihood=Gaussian(scale))
    guide = AutoMatrixNormal(model)
    losses = train(model, guide, steps, curvature="ggn", args=(x, y))
    best = problem.matrix_normal()
    mean, covariance = gaussian_of(guide, problem)
    if outputs == 1:
        assert abs(divergence(mean, covariance, problem.posterior())) < 1e-10
        assert model.law("weight").batch_shape == ()
    assert torch.allclose(mean, problem.posterior()[0], atol=1e-8)
    assert torch.allclose(covariance, best, atol=1e-6)
    assert np.isfinite(losses).all()


def test_batches_of_a_loader_are_the_data(double: None) -> None:
    net, (x, y) = mlp(), MLP.data()
    whole = bnn.Potential(MLP.model(net), x, y, compile="fx")
    loader = DataLoader(TensorDataset(x, y), batch_size=5)  # the last batch is smaller
    potential = bnn.Potential(MLP.model(net, num_data=ROWS), batches=loader, compile="fx")
    assert potential.is_recorded
    position = torch.randn(2, potential.dim)
    assert torch.allclose(potential.full_energy(position), whole.full_energy(position), rtol=1e-12)


def test_a_batch_larger_than_the_data_is_the_data(double: None) -> None:
    net, (x, y) = mlp(), MLP.data()
    model, whole = MLP.model(net, batch_size=100), MLP.model(net)
    values = {p.name: torch.randn(p.shape) for p in model.parameters}
    one, other = (poutine.trace(poutine.condition(m, values)).get_trace(x, y).log_prob_sum() for m in (model, whole))
    assert torch.equal(one, other)
