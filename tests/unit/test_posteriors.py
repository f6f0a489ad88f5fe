"""Every fitted posterior predicts, converts to ArviZ and makes a report; ours can also be kept."""

import copy
import pickle

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVGD, Predictive, RBFSteinKernel

import bnn
from bnn.guides import AutoFactorizedNormal
from support.posteriors import POSTERIORS, net_data, small_net

each = pytest.mark.parametrize("case", POSTERIORS, ids=[case.name for case in POSTERIORS])
ours = pytest.mark.parametrize("case", [c for c in POSTERIORS if c.ours], ids=[c.name for c in POSTERIORS if c.ours])
SITES = {"0.weight", "0.bias", "2.weight", "2.bias"}


@each
def test_predict_and_arviz(case):
    model, (x, y) = small_net(), net_data()
    guide = case.fitted(model)
    found = bnn.predict(guide, x, num_samples=6)
    assert found.mean.shape == (20,) and found.epistemic.shape == (20,)
    assert found.mean.isfinite().all() and (found.sd > 0).all()
    data = bnn.to_arviz(guide, model_args=(x, y), num_samples=50)
    assert SITES < set(data["posterior"].data_vars)
    assert dict(data["log_likelihood"].sizes)["draw"] == 50


@pytest.mark.parametrize("case", [c for c in POSTERIORS if c.reported], ids=[c.name for c in POSTERIORS if c.reported])
def test_report(case, tmp_path):
    guide = case.fitted(small_net(), 2)
    data = bnn.to_arviz(guide, model_args=net_data(), num_samples=50)
    page = bnn.report(data, tmp_path / "report.html").read_text(encoding="utf-8")
    assert type(guide).__name__ in page


@ours
def test_predictive_median_pickle_and_copy(case):
    """After steps on minibatches."""
    model, (x, y) = small_net(batch_size=6), net_data()
    guide = case.fitted(model, 3)
    for other in (copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
        drawn = []
        for one in (guide, other):
            pyro.set_rng_seed(3)
            drawn.append(one.draws(5))
        for name, value in drawn[0].items():
            assert torch.equal(value, drawn[1][name]) and value.isfinite().all(), name
        assert other.model is not None and guide.model is model
    trace = poutine.trace(model).get_trace(x, y)
    median = guide.median()
    assert SITES < set(median)
    for name, value in median.items():
        assert value.shape == trace.nodes[name]["value"].shape and not value.requires_grad
        assert trace.nodes[name]["fn"].support.check(value).all()
    draws = Predictive(model, guide=guide.eval(), num_samples=7)(x)
    assert draws["2.weight"].reshape(7, 4).shape == (7, 4) and draws["y"].shape[0] == 7


def test_particles_of_pyros_own_svgd_reach_prediction():
    """For a model that broadcasts over particles, which Pyro's SVGD needs."""
    x, y = net_data()

    def model(x, y=None):
        weight = pyro.sample("weight", pyro.distributions.Normal(0.0, 1.0).expand([3]).to_event(1))
        mean = (x * weight).sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", pyro.distributions.Normal(mean, 1.0), obs=y)

    svgd = SVGD(model, RBFSteinKernel(), pyro.optim.Adam({"lr": 0.1}), num_particles=10, max_plate_nesting=1)
    for _ in range(5):
        svgd.step(x, y.squeeze(-1))
    particles = {name: value.reshape(10, 3) for name, value in svgd.get_named_particles().items()}
    found = bnn.predict(particles, x, model=model)
    torch.testing.assert_close(found.mean, (particles["weight"] @ x.T).mean(0), rtol=1e-4, atol=1e-5)


def test_members_of_a_plain_list_reach_prediction():
    model, (x, y) = small_net(), net_data()
    members = []
    for seed in range(3):
        pyro.clear_param_store()
        pyro.set_rng_seed(seed)
        guide = AutoFactorizedNormal(model)
        guide(x, y)
        members.append(guide.median())
    assert bnn.predict(members, x, model=model).mean.shape == (20,)
