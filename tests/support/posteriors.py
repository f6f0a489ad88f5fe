"""The table of fitted posteriors that common tests run over: a new guide is a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal
from torch import Tensor

import bnn
from bnn.guides import (
    IVON,
    AutoDropout,
    AutoEnsemble,
    AutoFactorizedNormal,
    AutoIVON,
    AutoSnapshots,
    AutoSWAG,
    GaussianKernel,
    SteinRepulsion,
    TraceDropout_ELBO,
    TraceEnsemble_ELBO,
    WeightRepulsion,
)
from support.nets import data


def small_net(batch_size: int | None = None) -> Any:
    """A net of 3-4-1 with a learned noise: a constrained site."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    noise = dist.HalfNormal(torch.tensor(1.0))
    return bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(noise), batch_size=batch_size)


def net_data() -> tuple[Tensor, Tensor]:
    x, y = data(20)
    return x, y.unsqueeze(-1)


@dataclass(frozen=True)
class PosteriorCase:
    """A guide, the loss that trains it, and what is true of it.

    :ivar ours: whether it is one of ``bnn.guides``: pickles, copies and draws at once.
    :ivar collects: whether points are collected in training.
    :ivar reported: whether a page is made of it: the slow part, which knows guides by their name alone.
    :ivar optimizer: what moves it.
    """

    name: str
    guide: Callable[[Any], Any]
    loss: Callable[[], Any] = Trace_ELBO
    ours: bool = True
    collects: bool = False
    reported: bool = False
    optimizer: Callable[[], Any] = lambda: pyro.optim.Adam({"lr": 0.01})

    def fitted(self, model: Any, steps: int = 5) -> Any:
        """The guide after a few steps."""
        guide = self.guide(model)
        svi = SVI(model, guide, self.optimizer(), self.loss())
        for _ in range(steps):
            svi.step(*net_data())
            if self.collects:
                guide.collect()
        return guide


POSTERIORS = [
    PosteriorCase("ensemble", lambda model: AutoEnsemble(model, 3), TraceEnsemble_ELBO, reported=True),
    PosteriorCase("ensemble_of_nets", lambda model: AutoEnsemble(model, 3, init_loc_fn="net"), TraceEnsemble_ELBO),
    PosteriorCase("anchored_trace_elbo", lambda model: AutoEnsemble(model, 3, anchored=True)),
    PosteriorCase(
        "repulsive",
        lambda model: AutoEnsemble(model, 3, anchored=True),
        lambda: TraceEnsemble_ELBO(repulsion=WeightRepulsion(GaussianKernel(1.0))),
    ),
    PosteriorCase(
        "stein", lambda model: AutoEnsemble(model, 3), lambda: TraceEnsemble_ELBO(repulsion=SteinRepulsion())
    ),
    PosteriorCase("swag", lambda model: AutoSWAG(model, rank=3), TraceEnsemble_ELBO, collects=True, reported=True),
    PosteriorCase("multi_swag", lambda model: AutoSWAG(model, rank=3, members=2), TraceEnsemble_ELBO, collects=True),
    PosteriorCase("snapshots", AutoSnapshots, TraceEnsemble_ELBO, collects=True),
    PosteriorCase("dropout", lambda model: AutoDropout(model, 0.2), reported=True),
    PosteriorCase("dropout_masks", lambda model: AutoDropout(model, 0.2), lambda: TraceEnsemble_ELBO(num_particles=3)),
    PosteriorCase("dropout_noise", AutoDropout, lambda: TraceDropout_ELBO(masks=3, noise=1.0)),
    PosteriorCase("ivon", lambda model: AutoIVON(model, num_data=20), TraceEnsemble_ELBO, optimizer=IVON),
    PosteriorCase("factorized", AutoFactorizedNormal),
    PosteriorCase("pyro_normal", AutoNormal, ours=False),
    PosteriorCase(
        "pyro_low_rank", lambda model: AutoLowRankMultivariateNormal(model, rank=2), ours=False, reported=True
    ),
    PosteriorCase("pyro_full", AutoMultivariateNormal, ours=False),
    PosteriorCase("pyro_delta", AutoDelta, ours=False),
]
