"""Checks that one rank of several makes: ``python rank_checks.py GROUP`` prints what it found, one JSON line each.

Started by ``test_ranks.py`` with torchrun's environment variables.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from datetime import timedelta

import pyro
import pyro.distributions as dist
import torch
import torch.distributed
import torch.nn.functional as F
from pyro.infer import SVI
from pyro.infer.autoguide import AutoDelta
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import bnn
from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    TraceNaturalGradient_ELBO,
    kfac,
    natural_gradient_descent,
)
from bnn.kernels import AMAGOLD, GGMC, MCMC, SGHMC, SGLD, SVRG, Kronecker
from bnn.ranks import Ranks
from support.nets import data

ROWS = 13
X, Y = data(ROWS)


def net(x, y, size=None):
    """A net of two layers on all rows, or on ``size`` of them."""
    w0 = pyro.sample("w0", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
    b0 = pyro.sample("b0", dist.Normal(torch.zeros(4), 1.0).to_event(1))
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(1, 4), 1.0).to_event(2))
    with pyro.plate("data", len(x), subsample_size=size) as rows:
        mean = F.linear(torch.tanh(F.linear(x[rows], w0, b0)), w1).squeeze(-1)
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=y[rows])


def net_of_given_rows(x, y):
    """The same on rows that are given, out of twelve."""
    w0 = pyro.sample("w0", dist.Normal(torch.zeros(4, 3), 1.0).to_event(2))
    w1 = pyro.sample("w1", dist.Normal(torch.zeros(1, 4), 1.0).to_event(2))
    with pyro.plate("data", 12, subsample_size=len(x)):
        mean = F.linear(torch.tanh(F.linear(x, w0)), w1).squeeze(-1)
        pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


def report(name, **found):
    print(json.dumps({"name": name, "rank": ranks().rank, **found}), flush=True)


def ranks():
    return Ranks()


def run(kernel, given=None, size=None, args=(X, Y), chains=3, draws=15, warmup=3, **options):
    pyro.set_rng_seed(5)
    kernel = kernel()
    mcmc = MCMC(kernel, draws, warmup, num_chains=chains, disable_progbar=True, ranks=given, **options)
    if kernel.batches is None:
        mcmc.run(*args, size=size)
    else:
        mcmc.run()
    return mcmc


def sghmc(**options):
    settings = {"step_size": 0.02, "friction": 5.0, "compile": "fx", **options}
    return lambda: SGHMC(settings.pop("model", net), **settings)


def largest_difference(first, second):
    a, b = first.get_samples(group_by_chain=True), second.get_samples(group_by_chain=True)
    return max(float((a[name] - b[name]).abs().max()) for name in a)


KERNELS = {
    "sghmc_all_rows": (sghmc(), None),
    "sghmc_minibatches": (sghmc(), 12),
    "sghmc_with_replacement": (sghmc(replacement=True, integrator="baoab"), 12),
    "sgld_svrg": (lambda: SGLD(net, step_size=1e-3, variance_reduction=SVRG(), compile="fx"), 12),
    "sghmc_handlers": (sghmc(compile="handlers"), 12),
    "ggmc_all_rows": (lambda: GGMC(net, step_size=0.02, friction=5.0, num_steps=2, compile="fx"), None),
    "ggmc_chunks": (lambda: GGMC(net, step_size=0.02, friction=5.0, num_steps=2, compile="fx"), 12),
    "amagold": (lambda: AMAGOLD(net, step_size=0.02, friction=5.0, num_steps=2, compile="fx"), 12),
}
natural = TraceNaturalGradient_ELBO
GUIDES = {
    "factorized": (AutoFactorizedNormal, {}),
    "matrix": (AutoMatrixNormal, {"inverses_every": 2}),
    "matrix_factored": (AutoMatrixNormal, {"damping": "factored"}),
    "matrix_hessian": (AutoMatrixNormal, {"curvature": "reparametrization"}),
    "matrix_shared_noise": (AutoMatrixNormal, {"noise": "shared"}),
    "eigen": (AutoEigenNormal, {"num_particles": 2}),
    "kfac": (AutoDelta, {"inverses_every": 2, "extrinsic_damping": 0.1}),
    "kfac_adaptive": (
        AutoDelta,
        {
            "extrinsic_damping": 0.1, "adaptive_damping": True, "rescale": True, "rescale_momentum": True,
            "block_tridiagonal": True,
        },
    ),
}  # fmt: skip


def train(guide_class, settings, given=None, args=(X, Y), size=None, steps=7, model=net):
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    kwargs = {} if model is not net else {"size": size}
    settings = {"curvature": "ggn", **settings}
    guide = guide_class(model)
    guide(*args, **kwargs)  # a plate that subsamples draws rows here, one that does not draws none
    pyro.set_rng_seed(6)
    svi = SVI(model, guide, NaturalGradientDescent(0.3), natural(**settings, ranks=given))
    losses = [svi.step(*args, **kwargs) for _ in range(steps)]
    values = torch.cat([p.detach().flatten() for _, p in sorted(pyro.get_param_store().named_parameters())])
    return losses, values, svi


def some(table, names):
    """All rows of a table, or the few of the quick suite."""
    return {n: table[n] for n in (names if "QUICK" in os.environ else table)}.items()


def data_of_kernels():
    for name, (kernel, size) in some(KERNELS, ("sghmc_minibatches", "ggmc_all_rows", "ggmc_chunks")):
        report(name, difference=largest_difference(run(kernel, "data", size), run(kernel, None, size)))

    if "QUICK" in os.environ:
        return
    found = run(sghmc(mass=Kronecker(), step_size=0.05), "data", warmup=25)  # labels are drawn by each rank
    ranks().check_same([found.get_samples()["w0"]], "draws")
    report("kronecker", difference=0.0)


def data_of_guides():
    sizes = (None,) if "QUICK" in os.environ else (None, 12)
    for name, (guide, settings) in some(GUIDES, ("matrix_factored", "kfac")):
        for size in sizes:
            losses, values, _ = train(guide, settings, "data", size=size)
            wanted, there, _ = train(guide, settings, None, size=size)
            report(
                f"{name}_{size}",
                difference=float(((values - there).abs() / (1.0 + there.abs())).max()),
                losses=max(abs(a - b) / abs(b) for a, b in zip(losses, wanted, strict=True)),
            )
    if "QUICK" in os.environ:
        return
    # labels are random on each rank by itself: the ranks still agree
    _, values, _ = train(AutoMatrixNormal, {"curvature": "sampled", "noise": "flipout"}, "data", steps=101)
    ranks().check_same([values], "values")
    report("sampled_labels", finite=bool(values.isfinite().all()))


def given_rows():
    """Each rank gets its own rows: together they are the minibatch of one process."""
    own = ranks()
    x, y = X[:12], Y[:12]
    mine = slice(own.rank * 12 // own.size, (own.rank + 1) * 12 // own.size)
    _, values, _ = train(AutoMatrixNormal, {}, "data", args=(x[:12][mine], y[:12][mine]), model=net_of_given_rows)
    _, there, _ = train(AutoMatrixNormal, {}, None, args=(x, y), model=net_of_given_rows)
    report("guide", difference=float((values - there).abs().max()))
    sampler = DistributedSampler(TensorDataset(x, y), own.size, own.rank, shuffle=False)
    parts = DataLoader(TensorDataset(x, y), batch_size=6 // own.size, sampler=sampler)
    order = torch.arange(12).reshape(2, 6)  # a distributed sampler deals rows out in turn
    whole = [(x[rows], y[rows]) for rows in order]
    energies = []
    for batches, given in ((parts, own), (whole, None)):
        potential = bnn.Potential(net_of_given_rows, batches=batches, ranks=given)
        energies.append([potential.energy_and_grad(torch.full((2, potential.dim), 0.1))[0][1] for _ in range(3)])
    report("loader", difference=float((torch.stack(energies[0]) - torch.stack(energies[1])).abs().max()))


def chains():
    first, again = run(sghmc(), "chains", chains=5), run(sghmc(), "chains", chains=5)
    w = first.get_samples(group_by_chain=True)["w0"]
    stats = first.sample_stats["energy"]
    chain_draws = w[:, -1].flatten(1)
    alike = sum(bool(torch.equal(chain_draws[i], chain_draws[j])) for i in range(5) for j in range(i))
    idata = bnn.to_arviz(first)
    report(
        "chains",
        shape=list(w.shape),
        stats=list(stats.shape),
        again=largest_difference(first, again),
        alike=alike,
        diagnostics=len(first.diagnostics()["divergences"]),
        arviz=dict(idata["posterior"].sizes)["chain"],
        gradients=first.run_facts["gradient_evaluations"],
        sum=float(w.double().sum()),
        after=float(torch.rand(())),
    )
    alone = run(sghmc(), "chains", chains=4, chain_method="sequential")
    report("sequential", draws=alone.get_samples()["w0"].double().sum((0, 2)).tolist())
    start = {"w0": torch.arange(4.0).reshape(4, 1, 1).expand(4, 4, 3), "b0": torch.zeros(4, 4)}
    start["w1"] = torch.zeros(4, 1, 4)
    placed = run(
        lambda: SGHMC(net, step_size=1e-9, friction=0.0, mass=1e9), "chains", chains=4, draws=2, initial_params=start
    )
    report("initial_params", places=placed.get_samples(group_by_chain=True)["w0"][:, 0, 0, 0].tolist())


def message(function):
    try:
        function()
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def of_all_rows(x, y):
    """Rows coupled by their mean."""
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal((x - x.mean(0)) @ w, 0.5), obs=y)


def local_latents(x, y):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("obs", dist.Normal(z, 0.5), obs=y)


def no_plate(x, y):
    w = pyro.sample("w", dist.Normal(torch.zeros(3), 1.0).to_event(1))
    pyro.sample("obs", dist.Normal(x @ w, 0.5).to_event(1), obs=y)


def errors():
    report("size", message=message(lambda: run(sghmc(), "data", 11)))
    report("few_chains", message=message(lambda: run(sghmc(), "chains", chains=1)))
    for model in (of_all_rows, local_latents, no_plate):

        def go(model=model):
            MCMC(SGLD(model, step_size=1e-3), 3, 0, ranks="data", disable_progbar=True).run(X, Y)

        report(model.__name__, message=message(go))
    same = [(X[:4], Y[:4]), (X[4:8], Y[4:8])]
    report("same_batches", message=message(lambda: run(sghmc(model=net_of_given_rows, batches=same), "data")))
    passes = lambda: GGMC(net_of_given_rows, step_size=0.1, friction=1.0, batches=same)  # noqa: E731
    report("passes", message=message(lambda: run(passes, "data")))
    states = torch.tensor([1.0, 1.0 + 1e-7 * ranks().rank])
    report("states", message=message(lambda: ranks().check_same([states], "the states")))
    drifting = torch.full((ROWS,), float(ranks().rank))
    report("other_data", message=message(lambda: run(sghmc(), "data", args=(X, Y + drifting), draws=120)))


def randomness():
    """Labels of each rank are its own; what follows is the same on all."""
    own = ranks()
    own.same_randomness()
    with own.own_randomness():
        first = float(torch.rand(()))
    with own.own_randomness():
        second = float(torch.rand(()))
    report("randomness", first=first, second=second, after=float(torch.rand(())), owners=own.owners([8, 1, 7, 2, 1]))


def inverses():
    """Each matrix is factorized on one rank."""
    calls = {"cholesky": 0, "inverse": 0}

    def counted(kind, original):
        def call(*args):
            calls[kind] += 1
            return original(*args)

        return call

    natural_gradient_descent._step_tril = counted("cholesky", natural_gradient_descent._step_tril)
    kfac.inverses = counted("inverse", kfac.inverses)
    train(AutoMatrixNormal, {}, "data", steps=3)
    train(AutoDelta, {"extrinsic_damping": 0.1}, "data", steps=3)
    report("inverses", **calls)


def death():
    """Rank 1 ends in the middle of a run: the others keep their draws and say so."""
    mcmc = MCMC(
        sghmc()(), 200, 0, num_chains=2, ranks="data", disable_progbar=True,
        hook_fn=lambda kernel, params, stage, i: os._exit(3) if i == 30 and own == 1 else None,
    )  # fmt: skip
    own = ranks().rank
    found = message(lambda: mcmc.run(X, Y))
    report("death", message=found, draws=mcmc.num_samples, kept=len(mcmc.get_samples(group_by_chain=True)["w0"][0]))
    os._exit(0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    if "TIMEOUT" in os.environ:
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=float(os.environ["TIMEOUT"])))
    for group in sys.argv[1:]:
        globals()[group]()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
