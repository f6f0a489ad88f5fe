"""The table of fitted posteriors that common tests run over: a new guide is a row here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
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
    AutoEigenNormal,
    AutoEnsemble,
    AutoFactorizedNormal,
    AutoIVON,
    AutoMatrixNormal,
    AutoPBP,
    AutoRankOne,
    AutoSnapshots,
    AutoSWAG,
    GaussianKernel,
    Laplace,
    NaturalGradientDescent,
    SteinRepulsion,
    TraceDropout_ELBO,
    TraceEnsemble_ELBO,
    TraceNaturalGradient_ELBO,
    WeightRepulsion,
)
from support.nets import data


def small_net(batch_size: int | None = None) -> Any:
    """A net of 3-4-1 with a learned noise: a constrained site."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    noise = dist.HalfNormal(torch.tensor(1.0))
    return bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(noise), batch_size=batch_size)


def relu_net(batch_size: int | None = None) -> Any:
    """The same of ReLUs with a learned precision, as probabilistic backpropagation wants it."""
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU(), torch.nn.Linear(4, 1))
    noise = bnn.likelihoods.Gaussian(precision=dist.Gamma(6.0, 6.0))
    return bnn.bayesian(net, likelihood=noise, batch_size=batch_size)


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
    :ivar after: makes the posterior of the trained guide.
    :ivar model: of a size of minibatches, the model.
    :ivar by_svi: whether SVI trains it; else ``assimilate`` does.
    :ivar slow: whether it runs among the slow tests only, since another row has the same parts.
    """

    name: str
    guide: Callable[[Any], Any]
    loss: Callable[[], Any] = Trace_ELBO
    ours: bool = True
    collects: bool = False
    reported: bool = False
    optimizer: Callable[[], Any] = lambda: pyro.optim.Adam({"lr": 0.01})
    after: Callable[[Any], Any] = lambda guide: guide
    model: Callable[[int | None], Any] = small_net
    by_svi: bool = True
    slow: bool = False

    def training(self, batch_size: int | None = None) -> Any:
        """A new SVI."""
        model = self.model(batch_size)
        return SVI(model, self.guide(model), self.optimizer(), self.loss())

    def advance(self, svi: Any, steps: int) -> list[float]:
        """The losses of some steps."""
        losses = []
        for _ in range(steps):
            losses.append(svi.step(*net_data()) if self.by_svi else svi.guide.assimilate(*net_data()))
            if self.collects:
                svi.guide.collect()
        return losses

    def fitted(self, steps: int = 5, batch_size: int | None = None) -> Any:
        """The posterior after a few steps."""
        svi = self.training(batch_size)
        self.advance(svi, steps)
        return self.after(svi.guide)


def natural() -> Any:
    return NaturalGradientDescent(lr=0.1)


def around(guide: Any, structure: Any, sites: Any = None) -> Laplace:
    return Laplace(guide, structure, sites=sites).fit(*net_data())


POSTERIORS = [
    PosteriorCase("ensemble", lambda model: AutoEnsemble(model, 3), TraceEnsemble_ELBO, reported=True),
    PosteriorCase(
        "ensemble_of_nets", lambda model: AutoEnsemble(model, 3, init_loc_fn="net"), TraceEnsemble_ELBO, slow=True
    ),
    PosteriorCase("anchored_trace_elbo", lambda model: AutoEnsemble(model, 3, anchored=True)),
    PosteriorCase(
        "repulsive",
        lambda model: AutoEnsemble(model, 3, anchored=True),
        lambda: TraceEnsemble_ELBO(repulsion=WeightRepulsion(GaussianKernel(1.0))),
        slow=True,
    ),
    PosteriorCase(
        "stein", lambda model: AutoEnsemble(model, 3), lambda: TraceEnsemble_ELBO(repulsion=SteinRepulsion()), slow=True
    ),
    PosteriorCase("swag", lambda model: AutoSWAG(model, rank=3), TraceEnsemble_ELBO, collects=True, reported=True),
    PosteriorCase(
        "multi_swag", lambda model: AutoSWAG(model, rank=3, members=2), TraceEnsemble_ELBO, collects=True, slow=True
    ),
    PosteriorCase("snapshots", AutoSnapshots, TraceEnsemble_ELBO, collects=True),
    PosteriorCase("dropout", lambda model: AutoDropout(model, 0.2), reported=True),
    PosteriorCase(
        "dropout_masks", lambda model: AutoDropout(model, 0.2), lambda: TraceEnsemble_ELBO(num_particles=3), slow=True
    ),
    PosteriorCase("dropout_noise", AutoDropout, lambda: TraceDropout_ELBO(masks=3, noise=1.0), slow=True),
    PosteriorCase("rank_one", lambda model: AutoRankOne(model, members=2), lambda: TraceEnsemble_ELBO(num_particles=2)),
    PosteriorCase("ivon", lambda model: AutoIVON(model, num_data=20), TraceEnsemble_ELBO, optimizer=IVON),
    PosteriorCase("pbp", AutoPBP, model=relu_net, by_svi=False),
    PosteriorCase("factorized", AutoFactorizedNormal),
    PosteriorCase(
        "vogn",
        AutoFactorizedNormal,
        lambda: TraceNaturalGradient_ELBO("empirical", stick_the_landing=False, trust_region=None),
        optimizer=natural,
        slow=True,
    ),
    PosteriorCase("matrix", AutoMatrixNormal, TraceNaturalGradient_ELBO, optimizer=natural, slow=True),
    PosteriorCase("eigen", AutoEigenNormal, TraceNaturalGradient_ELBO, optimizer=natural, slow=True),
    *(
        PosteriorCase(
            f"laplace_{structure}",
            AutoDelta,
            after=partial(around, structure=structure),
            reported=first,
            slow=not first,
        )
        for structure, first in {"diagonal": False, "kronecker": True, "eigenbasis": False, "full": False}.items()
    ),
    PosteriorCase(
        "laplace_last_layer", AutoDelta, after=partial(around, structure="full", sites="last layer"), slow=True
    ),
    PosteriorCase("pyro_normal", AutoNormal, ours=False, slow=True),
    PosteriorCase(
        "pyro_low_rank", lambda model: AutoLowRankMultivariateNormal(model, rank=2), ours=False, reported=True
    ),
    PosteriorCase("pyro_full", AutoMultivariateNormal, ours=False, slow=True),
    PosteriorCase("pyro_delta", AutoDelta, ours=False, slow=True),
    PosteriorCase(
        "kfac", AutoDelta, lambda: TraceNaturalGradient_ELBO("ggn"), ours=False, optimizer=natural, slow=True
    ),
]
