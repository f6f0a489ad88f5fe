"""Guides train on any kind of site and net: constrained, hierarchical, in plates, convolutional, recurrent."""

import pyro
import pyro.distributions as dist
import pyro.optim
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, Trace_ELBO
from pyro.nn import PyroModule, PyroSample
from torch import nn

from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    TraceNaturalGradient_ELBO,
)
from support.nets import ConvNet, GRUClassifier, labels, normal_prior, numbers

GUIDES = [AutoFactorizedNormal, AutoMatrixNormal, AutoEigenNormal]


def natural(model, guide, **settings):
    return SVI(model, guide, NaturalGradientDescent(), TraceNaturalGradient_ELBO(**settings))


def constrained(y):
    concentration = pyro.sample("gamma", dist.Gamma(2.0, 1.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    share = pyro.sample("share", dist.Dirichlet(torch.ones(3)))
    factor = pyro.sample("factor", dist.LKJCholesky(3, 1.0))
    with pyro.plate("groups", 4):
        effect = pyro.sample("effect", dist.Normal(0.0, tau))
    with pyro.plate("outputs", 2, dim=-1), pyro.plate("inputs", 3, dim=-2):
        weight = pyro.sample("weight", dist.Normal(0.0, tau))
    loc = factor @ (share + weight.sum(-1)) + effect.sum()
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Normal(loc, concentration.rsqrt()).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("guide_class", "how"),
    [*((guide, how) for guide in GUIDES for how in ("natural", "Trace")), (AutoMatrixNormal, "reparametrization")],
)
@pytest.mark.filterwarnings("ignore:the curvature of some sites:RuntimeWarning")
def test_constrained_hierarchical_sites_in_plates(guide_class, how):
    y = numbers(6, 3) + 1
    guide = guide_class(constrained)
    svi = natural(constrained, guide, curvature="sampled" if how == "natural" else how) if how != "Trace" else None
    svi = svi or SVI(constrained, guide, pyro.optim.Adam({"lr": 0.02}), Trace_ELBO())
    losses = torch.tensor([svi.step(y) for _ in range(60)])
    assert losses.isfinite().all() and losses[-20:].mean() < losses[:20].mean()
    guide_trace = poutine.trace(guide).get_trace(y)
    model_trace = poutine.trace(poutine.replay(constrained, guide_trace)).get_trace(y)
    for trace in (guide_trace, model_trace):
        trace.compute_log_prob()
    for name in model_trace.stochastic_nodes:
        if name not in ("groups", "outputs", "inputs", "data"):
            ours, theirs = guide_trace.nodes[name], model_trace.nodes[name]
            assert ours["fn"].support.event_dim == theirs["fn"].support.event_dim
            assert theirs["fn"].support.check(ours["value"]).all()
    assert guide_trace.log_prob_sum().isfinite()


@pytest.mark.parametrize(
    ("guide_class", "net", "args"),
    [
        *((guide, ConvNet, (numbers(6, 1, 14, 14), labels(6))) for guide in GUIDES),
        (AutoMatrixNormal, GRUClassifier, (numbers(8, 5, 3), labels(8))),
    ],
)
def test_nets(guide_class, net, args):
    model = net()
    guide = guide_class(model)
    svi = natural(model, guide)
    losses = torch.tensor([svi.step(*args) for _ in range(30)])
    assert losses.isfinite().all() and losses[-10:].mean() < losses[:10].mean()
    draws = Predictive(model, guide=guide, num_samples=2)(*args)
    assert draws["obs"].shape[0] == 2


class SampledGRU(PyroModule):
    """All weights of a GRU sampled: no layer that the capture knows."""

    def __init__(self):
        super().__init__()
        self.gru = PyroModule[nn.GRU](3, 2, batch_first=True)
        for name, parameter in list(self.gru.named_parameters()):
            setattr(self.gru, name, PyroSample(normal_prior(*parameter.shape)))

    def forward(self, x, y):
        mean = self.gru(x)[0][:, -1].sum(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


@pytest.mark.filterwarnings("ignore:the curvature of some sites:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:RNN module weights:UserWarning")
def test_sampled_recurrent_net():
    model = SampledGRU()
    svi = natural(model, AutoMatrixNormal(model))
    losses = torch.tensor([svi.step(numbers(8, 4, 3), numbers(8)) for _ in range(25)])
    assert losses.isfinite().all() and losses[-10:].mean() < losses[:10].mean()
