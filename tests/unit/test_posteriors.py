"""Every fitted posterior predicts, converts to ArviZ and makes a report; ours can also be kept."""

import copy
import math
import pickle

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import SVGD, Predictive, RBFSteinKernel

import bnn
from bnn.guides import AutoFactorizedNormal
from support.posteriors import POSTERIORS, net_data, small_net

pytestmark = [
    pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning"),  # after five steps
    # Torch says once per process that a gradient comes transposed.
    pytest.mark.filterwarnings("ignore:grad and param do not obey the gradient layout:UserWarning"),
]


def among(cases, quick=lambda case: not case.slow):
    """Each of the cases, some among the slow tests."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize(
        "case", [pytest.param(case, id=case.name, marks=() if quick(case) else slow) for case in cases]
    )


each, ours = among(POSTERIORS), among([case for case in POSTERIORS if case.ours])
SITES = {"0.weight", "0.bias", "2.weight", "2.bias"}


@each
def test_predict_score_and_arviz(case):
    guide, (x, y) = case.fitted(), net_data()
    found = bnn.predict(guide, x, num_samples=6)
    assert found.mean.shape == (20,) and found.epistemic.shape == (20,)
    assert found.mean.isfinite().all() and (found.sd > 0).all()
    scores = bnn.score(guide, x, y, num_samples=30)
    assert {"rmse", "nll", "crps"} < set(scores) and all(math.isfinite(score.value) for score in scores.values())
    data = bnn.to_arviz(guide, model_args=(x, y), num_samples=50)
    assert SITES < set(data["posterior"].data_vars)
    assert dict(data["log_likelihood"].sizes)["draw"] == 50


@among(POSTERIORS, quick=lambda case: case.reported)
def test_report(case, tmp_path):
    guide = case.fitted(2)
    data = bnn.to_arviz(guide, model_args=net_data(), num_samples=50)
    page = bnn.report(data, tmp_path / "report.html").read_text(encoding="utf-8")
    assert type(guide).__name__ in page


@ours
def test_predictive_median_state_pickle_and_copy(case):
    """After steps on minibatches."""
    guide, (x, y) = case.fitted(3, batch_size=6), net_data()
    model = guide.model
    pyro.clear_param_store()
    fresh = case.fitted(0, batch_size=6)
    fresh(x, y)
    fresh.load_state_dict(guide.state_dict())
    for other in (fresh, copy.deepcopy(guide), pickle.loads(pickle.dumps(guide))):
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


TRAINED = [case for case in POSTERIORS if case.by_svi and "laplace" not in case.name]


@among(TRAINED, quick=lambda case: case.name in ("swag", "rank_one"))
def test_a_checkpoint_goes_on_bit_for_bit(case, tmp_path):
    """Losses on minibatches, all that was collected, and predictions."""
    pyro.set_rng_seed(1)
    svi = case.training(batch_size=6)
    case.advance(svi, 3)
    bnn.checkpoint(svi, tmp_path / "svi.pt")
    losses, wanted = case.advance(svi, 3), bnn.predict(svi.guide, net_data()[0], num_samples=6).mean
    pyro.clear_param_store()
    pyro.set_rng_seed(99)
    svi = case.training(batch_size=6)
    bnn.restore(svi, tmp_path / "svi.pt", model_args=net_data())
    assert case.advance(svi, 3) == losses
    assert torch.equal(bnn.predict(svi.guide, net_data()[0], num_samples=6).mean, wanted)


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
