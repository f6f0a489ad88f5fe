"""SWAG and snapshots: the moments are those of the iterates, and draws have the law that the moments say."""

import copy
import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Predictive
from pyro.optim import SGD, CosineAnnealingWarmRestarts
from scipy import stats

from bnn.guides import AutoSnapshots, AutoSWAG, PerMember, TraceEnsemble_ELBO
from support.checks import ALPHA, assert_covariance, assert_mean
from support.nets import numbers

pytestmark = pytest.mark.usefixtures("double")


def linear(x, y, batch_size=None):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[-1]), 1.0).to_event(1))
    with pyro.plate("data", len(x), subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ weight, 1.0), obs=y[rows])


def args():
    return numbers(12, 3, seed=3), numbers(12, seed=4)


def collected(guide, steps=12, rate=0.02, points=None):
    """Iterates ``(steps, members, dim)`` of a run that collects after each step."""
    svi = SVI(linear, guide, SGD({"lr": rate}), TraceEnsemble_ELBO())
    seen = []
    for _ in range(steps):
        svi.step(*args())
        guide.collect()
        seen.append(guide.positions.detach().clone())
    return torch.stack(seen).numpy()


@pytest.mark.parametrize("members", [1, 3])
def test_moments_are_those_of_the_iterates(members):
    """z̄, D and the last K deviations from the running mean, by numpy."""
    guide = AutoSWAG(linear, rank=5, members=members)
    seen = collected(guide)
    np.testing.assert_allclose(guide.mean.numpy(), seen.mean(0), rtol=1e-12)
    np.testing.assert_allclose(guide.variance().numpy(), seen.var(0), rtol=1e-10)
    running = np.cumsum(seen, 0) / np.arange(1, 13)[:, None, None]
    np.testing.assert_allclose(guide.deviations.numpy(), (seen - running)[-5:].swapaxes(0, 1), rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize(("rank", "scale"), [(4, 0.5), (0, 0.5), (4, 1.3)])
def test_draws_have_the_mean_and_covariance_of_the_formula(rank, scale):
    """c (D + R Rᵀ / (K − 1)), with fewer collections than D alone could tell."""
    guide = AutoSWAG(linear, rank=rank, scale=scale)
    collected(guide, 7)
    covariance = guide.variance()[0].diag()
    if rank:
        deviations = guide.deviations[0]
        assert len(deviations) == 4
        covariance = covariance + deviations.T @ deviations / 3
    found = (guide.draws(100_000)["weight"] - guide.mean[0]).numpy()
    assert_covariance(["w0", "w1", "w2"], found, scale * covariance.numpy())
    for number in range(3):
        assert_mean(f"w{number}", found[:, number], 0.0, scale * float(covariance[number, number]))


def test_several_members_are_a_mixture_with_equal_weights():
    guide = AutoSWAG(linear, rank=4, members=4)
    collected(guide, 3)
    guide.mean += 100.0 * torch.arange(4.0)[:, None]  # far apart: a draw tells its Gaussian
    drawn = guide.flat_draws(4 * 50)
    nearest = torch.cdist(drawn, guide.mean).argmin(1)
    assert nearest.bincount(minlength=4).tolist() == [50] * 4
    few = torch.stack([torch.cdist(guide.flat_draws(1), guide.mean).argmin() for _ in range(1000)]).bincount(
        minlength=4
    )
    assert stats.chisquare(few.numpy()).pvalue > ALPHA


def test_the_law_of_sgd_on_a_quadratic():
    """Gradient noise of covariance V, Hessian H: from the mode the covariance follows S ← (I − hH) S (I − hH) + h²V.

    The noise comes from targets that are drawn anew at each step, independently for each of many members.
    """
    (x, y), members, rate, steps = args(), 100_000, 0.03, 10
    hessian = x.T @ x + torch.eye(3)
    mode = torch.linalg.solve(hessian, x.T @ y)
    guide = AutoSWAG(linear, members=members, rank=0, init_loc_fn={"weight": mode.expand(members, 3)})
    svi = SVI(linear, guide, SGD({"lr": rate}), TraceEnsemble_ELBO())
    contraction, covariance = torch.eye(3) - rate * hessian, torch.zeros(3, 3)
    for _ in range(steps):
        svi.step(x, PerMember(y + 0.5 * torch.randn(members, len(y))))
        covariance = contraction @ covariance @ contraction + rate**2 * 0.25 * x.T @ x
        guide.collect()
    found = (guide.positions.detach() - mode).numpy()
    assert_covariance(["w0", "w1", "w2"], found, covariance.numpy())
    stationary = covariance
    for _ in range(10_000):
        stationary = contraction @ stationary @ contraction + rate**2 * 0.25 * x.T @ x
    lyapunov = stationary @ hessian + hessian @ stationary - rate * hessian @ stationary @ hessian
    torch.testing.assert_close(lyapunov, rate * 0.25 * x.T @ x, rtol=1e-8, atol=1e-10)


def test_training_mode_gives_the_iterate_and_eval_mode_the_posterior():
    guide = AutoSWAG(linear, rank=2)
    collected(guide, 4)
    assert torch.equal(guide()["weight"], guide.positions[0])
    guide.eval()
    drawn = Predictive(linear, guide=guide, num_samples=20)(*args())["weight"]
    assert len(drawn.reshape(20, 3).unique(dim=0)) == 20


def test_state_dict_and_copies_go_on_as_the_original():
    for guide in (AutoSWAG(linear, rank=3, members=2), AutoSnapshots(linear, 2)):
        pyro.clear_param_store()
        collected(guide, 4)
        fresh = (
            type(guide)(linear, members=2) if isinstance(guide, AutoSnapshots) else AutoSWAG(linear, rank=3, members=2)
        )
        fresh(*args())
        fresh.load_state_dict(guide.state_dict())
        for other in (fresh, copy.deepcopy(guide)):
            pyro.set_rng_seed(1)
            wanted = guide.draws(6)["weight"]
            pyro.set_rng_seed(1)
            assert torch.equal(other.draws(6)["weight"], wanted)


# ---- snapshots


def test_the_rate_follows_the_cosine_and_snapshots_are_the_ends_of_cycles():
    """½ α (1 + cos(π (t mod C) / C)); on a quadratic each iterate is known."""
    cycle, rate = 5, 0.04
    schedule = CosineAnnealingWarmRestarts({"optimizer": torch.optim.SGD, "optim_args": {"lr": rate}, "T_0": cycle})
    guide, (x, y) = AutoSnapshots(linear), args()
    guide(x, y)
    hessian, z, ends = x.T @ x + torch.eye(3), guide.positions.detach()[0].clone(), []
    svi = SVI(linear, guide, schedule, TraceEnsemble_ELBO())
    for step in range(3 * cycle):
        svi.step(x, y)
        z = z - rate * 0.5 * (1 + math.cos(math.pi * (step % cycle) / cycle)) * (hessian @ z - x.T @ y)
        schedule.step()
        if (step + 1) % cycle == 0:
            guide.collect()
            ends.append(z)
    torch.testing.assert_close(guide.snapshots, torch.stack(ends), rtol=1e-10, atol=1e-12)
    assert torch.equal(guide.draws(3)["weight"], guide.snapshots)
    torch.testing.assert_close(guide.median()["weight"], guide.snapshots.quantile(0.5, 0))
    guide.eval()
    assert (guide()["weight"] == guide.snapshots).all(1).any()


# ---- bad input

BAD = {
    "rank": (lambda: AutoSWAG(linear, rank=1), ValueError, "rank is 1; give the number of deviations"),
    "scale": (lambda: AutoSWAG(linear, scale=0.0), ValueError, "scale is 0.0; give a positive"),
    "early": (lambda: AutoSWAG(linear).collect(), RuntimeError, "collect needs the guide's sites"),
    "snapshot early": (lambda: AutoSnapshots(linear).collect(), RuntimeError, "collect needs the guide's sites"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_in_words(name):
    make, error, words = BAD[name]
    with pytest.raises(error, match=words):
        make()


def test_draws_need_collections_of_finite_points():
    for guide, words in ((AutoSWAG(linear), "a covariance needs two"), (AutoSnapshots(linear), "no snapshot was")):
        guide(*args())
        for ask in (guide.median, lambda guide=guide: guide.draws(2)):
            with pytest.raises(RuntimeError, match=words):
                ask()
        guide.positions.data[0, 1] = math.nan
        with pytest.raises(RuntimeError, match="nothing was collected"):
            guide.collect()
        pyro.clear_param_store()
