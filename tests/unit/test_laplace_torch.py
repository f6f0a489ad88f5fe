"""Agreement with laplace-torch where both apply."""

import warnings

import pytest
import torch

import bnn
from bnn.guides import Laplace
from support.nets import data, labels

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # its import compiles with TorchScript
    peer = pytest.importorskip("laplace")
    from laplace.curvature import CurvlinopsGGN

pytestmark = [
    pytest.mark.filterwarnings("ignore:the point is not a mode:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),  # theirs
]
TAU, SIGMA = 1.7, 0.4
STRUCTURES = {"diagonal": "diag", "kronecker": "kron", "full": "full"}
CLOSE = {"rtol": 1e-5, "atol": 1e-12}


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)


def both(structure, classes, last_layer):
    """Our approximation and theirs, of one net with a Normal prior of precision TAU on every weight."""
    x, y = data(20)
    y = labels(20) if classes else torch.stack([y, y.cos()], 1)
    net = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3 if classes else 2))
    likelihood = bnn.likelihoods.Categorical() if classes else bnn.likelihoods.Gaussian(SIGMA)
    model = bnn.bayesian(net, prior=bnn.priors.Normal(TAU**-0.5), likelihood=likelihood)
    point = {name: value.detach() for name, value in net.named_parameters()}
    ours = Laplace(model, structure, point=point, sites="last layer" if last_layer else None).fit(x, y)
    settings = {} if classes else {"sigma_noise": SIGMA}
    theirs = peer.Laplace(
        net, "classification" if classes else "regression", subset_of_weights="last_layer" if last_layer else "all",
        hessian_structure=STRUCTURES[structure], prior_precision=TAU, backend=CurvlinopsGGN, **settings,
    )  # fmt: skip
    theirs.fit(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=20))
    return ours, theirs, x, y


def dense(posterior):
    return torch.block_diag(*(block.covariance() for block in posterior.blocks))


def covariance_of(theirs):
    if hasattr(theirs, "posterior_variance"):
        return theirs.posterior_variance.diag()
    found = theirs.posterior_covariance if hasattr(theirs, "posterior_covariance") else None
    return theirs.posterior_precision.to_matrix(exponent=-1) if found is None else found


@pytest.mark.parametrize("last_layer", [False, True], ids=["all", "last layer"])
@pytest.mark.parametrize("classes", [False, True], ids=["regression", "classification"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_agrees(structure, classes, last_layer):
    ours, theirs, x, _ = both(structure, classes, last_layer)
    torch.testing.assert_close(dense(ours), covariance_of(theirs), **CLOSE)
    for tau in (TAU, 0.3):
        expected = theirs.log_marginal_likelihood(prior_precision=torch.tensor(tau))
        found = ours.log_marginal_likelihood(prior_precision=tau)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
    if not classes:
        expected = theirs.log_marginal_likelihood(torch.tensor(TAU), torch.tensor(0.9))
        found = ours.log_marginal_likelihood(prior_precision=TAU, noise=0.9)
        assert float(found) == pytest.approx(float(expected), rel=1e-5)
    theirs.prior_precision, settings = TAU, {} if classes else {"sigma_noise": SIGMA}
    for name, value in settings.items():
        setattr(theirs, name, value)
    mean, variance = theirs._glm_predictive_distribution(x[:4])
    outputs = ours.outputs(x[:4])["y"]
    if classes:  # ours are log probabilities
        turn = torch.eye(3) - mean.softmax(-1).unsqueeze(-2)
        mean, variance = mean.log_softmax(-1), turn @ variance @ turn.mT
    torch.testing.assert_close(outputs.mean, mean, **CLOSE)
    torch.testing.assert_close(outputs.covariance, variance, **CLOSE)
