"""What variance reduction refuses: settings, kernels, models and loaders, each with what to do."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from bnn.kernels import AMAGOLD, SGLD, SVRG, ControlVariate
from support import targets

DATA = targets.regression_data(torch.float64)
MODE = {"weight": torch.tensor([1.0, -1.0, 0.5]), "a_scale": torch.tensor(0.3)}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"variance_reduction is 'svrg'; give ControlVariate\(...\), SVRG\(...\) or"):
        SGLD(targets.regression, step_size=1e-4, variance_reduction="svrg")
    with pytest.raises(ValueError, match="every is 0; give a whole number of steps of at least 1, or None"):
        SVRG(0)
    with pytest.raises(ValueError, match="anchor is Tensor; give a dict with a value of each latent site"):
        ControlVariate(torch.zeros(3))
    with pytest.raises(ValueError, match="not for kernels with a Metropolis test.*or use SGHMC"):
        AMAGOLD(targets.regression, step_size=1e-3, friction=1.0, variance_reduction=SVRG())
    with pytest.raises(ValueError, match="the model draws no minibatches: leave it out, or write pyro.plate"):
        SGLD(targets.full_regression, step_size=1e-4, variance_reduction=SVRG()).setup(0, *DATA)


@pytest.mark.parametrize("compile", ["fx", "handlers"])
def test_models_with_randomness_of_their_own(compile):
    def dropout(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("rows", len(x), subsample_size=8) as index:
            mean = torch.nn.functional.dropout(x[index] * weight, 0.5).sum(-1)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    kernel = SGLD(dropout, step_size=1e-4, variance_reduction=SVRG(), compile=compile, init_strategy="prior")
    with pytest.raises(ValueError, match="the model draws random numbers of its own .*switch them off"):
        kernel.setup(0, *DATA)


@pytest.mark.parametrize(
    ("anchor", "message"),
    [
        ({"weight": torch.zeros(3)}, r"anchor of ControlVariate: values are given .* missing \['a_scale'\]"),
        ({**MODE, "weight": torch.zeros(2)}, r"anchor of ControlVariate: values of site 'weight' have shape \(1, 2\)"),
        ({**MODE, "a_scale": torch.tensor(-1.0)}, "anchor of ControlVariate: values of site 'a_scale' lie outside"),
        ({**MODE, "weight": torch.full((3,), 1e200, dtype=torch.float64)}, "not finite at the anchor: give another"),
    ],
)
def test_anchors_that_do_not_suit(anchor, message):
    kernel = SGLD(targets.regression, step_size=1e-4, compile="fx", variance_reduction=ControlVariate(anchor))
    with pytest.raises(ValueError, match=message):
        kernel.setup(0, *DATA)


def test_loaders_whose_share_of_the_data_is_not_known():
    def scaled(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("rows", len(x)), pyro.poutine.scale(scale=4.0):
            pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

    batches = [tuple(t[i : i + 8] for t in DATA) for i in range(0, 32, 8)]
    kernel = SGLD(scaled, step_size=1e-4, batches=batches, variance_reduction=SVRG(), compile="fx")
    with pytest.raises(NotImplementedError, match="needs one plate"):
        kernel.setup(0)


class Endless:
    """Batches without end, of a length that is not known."""

    def __iter__(self):
        while True:
            yield tuple(t[:8] for t in DATA)


def test_a_loader_without_end():
    def of_batch(x, y):
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=x.dtype), 1.0).to_event(1))
        with pyro.plate("rows", 32, subsample_size=len(x)):
            pyro.sample("y", dist.Normal(x @ weight, 1.0), obs=y)

    kernel = SGLD(of_batch, step_size=1e-4, batches=Endless(), variance_reduction=SVRG(), compile="fx")
    with pytest.raises(ValueError, match=r"gave 40 rows, but plate 'rows' has 32"):
        kernel.setup(0)
