"""Rank-one factors: the law of the weights, and the loss, in closed form."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from scipy import stats

from bnn.guides import AutoRankOne, TraceEnsemble_ELBO
from support.checks import ALPHA
from support.conjugate import NOISE, PRIOR, two_output_constants, two_output_data, two_outputs
from support.nets import numbers

pytestmark = pytest.mark.usefixtures("double")

FACTOR = 0.4


def ready(members=1):
    guide = AutoRankOne(two_outputs, members=members, prior_scale=FACTOR)
    guide(*two_output_data())
    guide.loc.data[:] = numbers(8, seed=5)
    guide.factor_loc.data[:] = 1.0 + 0.3 * numbers(members, 5, seed=6)
    guide.factor_scale = 0.2 + 0.1 * numbers(members, 5, seed=7).abs()
    return guide


def moments(guide, member):
    """Mean of W' = W ∘ r sᵀ, and of the products of the entries of each row: E W'_ij W'_il."""
    weight = guide.loc.detach()[:6].reshape(2, 3)
    m, v = guide.factor_loc.detach()[member], guide.factor_scale.detach()[member].square()
    (r, s), (vr, vs) = m.split([2, 3]), v.split([2, 3])
    second = torch.outer(s, s) + vs.diag()
    products = weight[:, :, None] * weight[:, None, :] * (r.square() + vr)[:, None, None] * second
    return weight * torch.outer(r, s), products


def expected_loss(guide, member):
    """E[−log p(y | W')] − log p(W) − log p(bias) + KL, by the moments."""
    (x, y), bias = two_output_data(), guide.loc.detach()[6:]
    weight = guide.loc.detach()[:6]
    mean, products = moments(guide, member)
    target = y - bias
    squares = target.square().sum() - 2 * (target * (x @ mean.T)).sum() + torch.einsum("nj,nl,ijl->", x, x, products)
    m, v = guide.factor_loc.detach()[member], guide.factor_scale.detach()[member].square()
    divergence = 0.5 * ((v + (m - 1).square()) / FACTOR**2 - 1 - (v / FACTOR**2).log()).sum()
    penalty = 0.5 * (weight.square().sum() + bias.square().sum()) / PRIOR**2
    return float(0.5 * squares / NOISE**2 + penalty + divergence) + two_output_constants()


def test_draws_have_the_moments_of_the_product():
    guide, count = ready(2), 200_000
    drawn = guide.draws(count)["weight"]
    for member in range(2):
        own = drawn[member::2]  # components take turns
        mean, products = moments(guide, member)
        for found, wanted in ((own, mean), (own[:, :, :, None] * own[:, :, None, :], products)):
            z = (found.mean(0) - wanted) / (found.std(0) / math.sqrt(count / 2))
            assert z.abs().max() < stats.norm.isf(ALPHA / 50)
    assert torch.equal(guide.draws(3)["bias"], guide.loc.detach()[6:].expand(3, 2))


@pytest.mark.parametrize("members", [1, 2])
def test_the_loss_is_the_closed_form(members):
    """By our loss and by Pyro's, averaged over components."""
    guide = ready(members)
    wanted = sum(expected_loss(guide, member) for member in range(members)) / members
    with torch.no_grad():
        few = torch.tensor([Trace_ELBO().loss(two_outputs, guide, *two_output_data()) for _ in range(200)])
        loss = TraceEnsemble_ELBO(num_particles=1000)
        many = torch.tensor([loss.loss(two_outputs, guide, *two_output_data()) for _ in range(100)])
    for found in (few, many):
        z = (found.mean() - wanted) / (found.std() / math.sqrt(len(found)))
        assert abs(float(z)) < stats.t.isf(ALPHA / 2, len(found) - 1), (float(z), float(found.mean()), wanted)


def test_gradients_are_those_of_pyros_elbo():
    """With the same noise: of W, of the factors' means and of their scales."""
    guide, found = ready(2), []
    for loss in (Trace_ELBO(), TraceEnsemble_ELBO()):
        for leaf in guide.parameters():
            leaf.grad = None
        torch.manual_seed(4)
        value = loss.loss_and_grads(two_outputs, guide, *two_output_data())
        found.append([torch.tensor(value), *(leaf.grad.clone() for leaf in guide.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


def no_weight(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight, 1.0), obs=y[:, 0])


BAD = {
    "members": (lambda: AutoRankOne(two_outputs, members=0), "members is 0; give the number of components"),
    "prior": (lambda: AutoRankOne(two_outputs, prior_scale=0.0), "prior_scale is 0.0; give a positive"),
    "start": (lambda: AutoRankOne(two_outputs, init_scale=-1.0), "init_scale is -1.0; give a positive"),
    "no weight": (
        lambda: AutoRankOne(no_weight)(*two_output_data()),
        "there is no weight whose units could have factors",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_in_words(name):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()
