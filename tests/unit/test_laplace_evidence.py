"""The evidence of Laplace's approximation: where it is stationary, and what other priors and noises do to it."""

import pytest
import torch

from bnn.guides import Laplace
from support.nets import numbers
from support.point_estimates import Net, hierarchy, net_problem

pytestmark = pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning")
STRUCTURES = ["diagonal", "kronecker", "eigenbasis", "full"]
each_structure = pytest.mark.parametrize("structure", STRUCTURES)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


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
