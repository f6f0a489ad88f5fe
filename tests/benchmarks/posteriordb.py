"""Kernels on reference posteriors beside Pyro's NUTS: errors, effective draws, seconds and gradients.

    python tests/benchmarks/posteriordb.py --data FOLDER [--csv FILE] [--chains 4] [--warmup 250] [--draws 250]
        [--rows GGMC HMC AMAGOLD SGHMC SGLD NUTS] [--only arK eight_schools kidiq mesquite]
    python tests/benchmarks/posteriordb.py --quick

All run on one thread, in float64, with as many chains, draws of warm-up and draws as each other; ours move all chains
at once, NUTS one after another. Errors are the worst over the posterior's quantities, in standard deviations of the
reference; ``z`` is the worst error of a mean in units of what chance leaves at its own effective size; ESS is the least
bulk ESS, R-hat the largest. Seconds are the processor's and hold setup and warm-up. The exit status is 0 whatever the
errors are. ``--quick`` needs no folder: it takes a regression of generated data, whose posterior is known.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import arviz as az  # noqa: E402
import numpy as np  # noqa: E402
import pyro  # noqa: E402
import pyro.infer  # noqa: E402
import pyro.ops.integrator  # noqa: E402
import torch  # noqa: E402
from pyro.distributions import ImproperUniform  # noqa: E402
from tables import show  # noqa: E402
from torch.distributions import biject_to  # noqa: E402

from bnn.kernels import MCMC  # noqa: E402
from support import posteriordb  # noqa: E402
from support.posteriordb import POSTERIORS, ROWS, Posterior  # noqa: E402

NUTS, GENERATED = "NUTS", "generated"


@dataclass(frozen=True)
class Result:
    """Draws ``(chains, draws, quantities)``, and what they cost."""

    draws: np.ndarray
    seconds: float
    gradients: int  # of all chains


def ours(name: str, posterior: Posterior, options: argparse.Namespace) -> Result:
    kernel = ROWS[name].build(posterior.model)
    start = time.process_time()
    mcmc = MCMC(kernel, options.draws, options.warmup, num_chains=options.chains, disable_progbar=True)
    mcmc.run(*posterior.data)
    seconds = time.process_time() - start
    steps = kernel.steps_to_draw(0) * (options.warmup + options.draws)
    draws = posterior.quantities_of(mcmc.get_samples(group_by_chain=True))
    return Result(draws.numpy(), seconds, options.chains * steps * kernel.gradients_per_step)


def nuts(posterior: Posterior, options: argparse.Namespace) -> Result:
    gradient, count = pyro.ops.integrator.potential_grad, 0

    def counted(*arguments):
        nonlocal count
        count += 1
        return gradient(*arguments)

    def anywhere(flat, sample_shape=()):
        """A point of the support: even init_to_uniform, Pyro's default, draws once from every prior for its shape."""
        transform = biject_to(flat.support)
        return transform(torch.rand(transform.inverse_shape(flat.batch_shape + flat.event_shape)) - 0.5)

    chains = []
    start = time.process_time()
    with (
        patch.object(pyro.ops.integrator, "potential_grad", counted),
        patch.object(ImproperUniform, "sample", anywhere),
    ):
        for _ in range(options.chains):
            kernel = pyro.infer.NUTS(posterior.model)
            mcmc = pyro.infer.MCMC(kernel, options.draws, options.warmup, disable_progbar=True)
            mcmc.run(*posterior.data)
            chains.append(posterior.quantities_of(mcmc.get_samples(group_by_chain=True)))
    return Result(torch.cat(chains).numpy(), time.process_time() - start, count)


def measured(name: str, posterior: Posterior, result: Result) -> dict[str, Any]:
    """A row of the table."""
    chains = result.draws
    means, deviations = posterior.errors(chains.reshape(-1, chains.shape[-1]))
    sizes = np.array([float(az.ess(chains[..., i], method="bulk")) for i in range(chains.shape[-1])])
    chance = np.sqrt(1.0 / sizes + 1.0 / len(posterior.reference))
    return {
        "posterior": f"{posterior.name}, {len(posterior.names)}",
        "kernel": name,
        "error of mean": float(np.abs(means).max()),
        "z": float((np.abs(means) / chance).max()),
        "error of sd": float(np.abs(deviations).max()),
        "ESS": float(sizes.min()),
        "R-hat": max(float(az.rhat(chains[..., i])) for i in range(chains.shape[-1])),
        "seconds": result.seconds,
        "ESS per second": float(sizes.min()) / result.seconds,
        "gradients": result.gradients,
        "ESS per 1000 gradients": 1000 * float(sizes.min()) / result.gradients,
    }


def generated() -> Posterior:
    """A regression with flat coefficients and a flat scale: S/σ² is χ² of n − p − 1, β given σ is Normal."""
    random = np.random.default_rng(20)
    x = np.column_stack([np.ones(60), random.standard_normal((60, 2))])
    y = x @ [1.0, -2.0, 0.5] + 0.7 * random.standard_normal(60)
    inverse = np.linalg.inv(x.T @ x)
    centre = inverse @ x.T @ y
    sigma = np.sqrt(np.square(y - x @ centre).sum() / random.chisquare(60 - 3 - 1, 10_000))
    beta = centre + sigma[:, None] * (random.standard_normal((10_000, 3)) @ np.linalg.cholesky(inverse).T)
    model, _, quantities_of = POSTERIORS["mesquite-logmesquite"]
    data = torch.tensor(y), torch.tensor(x)
    names = ["beta[1]", "beta[2]", "beta[3]", "sigma"]
    return Posterior(GENERATED, model, data, names, np.column_stack([beta, sigma]), quantities_of)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="the folder of reference posteriors")
    parser.add_argument("--quick", action="store_true", help="generated data and few draws: to see that it runs")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=250)
    parser.add_argument("--draws", type=int, default=250)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, NUTS], default=[*ROWS, NUTS])
    parser.add_argument("--only", nargs="+", default=[""], help="posteriors whose names begin so")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--csv", type=Path, help="write the table to this file, too")
    options = parser.parse_args()
    if not (options.data or options.quick):
        parser.error("give the folder of reference posteriors by --data, or --quick")
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    if options.quick:
        options.chains, options.warmup, options.draws = 2, 100, 100
        chosen = [generated()]
    else:
        names = [name for name in POSTERIORS if name.startswith(tuple(options.only))]
        chosen = [posteriordb.load(options.data, name) for name in names]
    rows = []
    for posterior in chosen:
        for row in options.rows:
            pyro.set_rng_seed(options.seed)
            result = nuts(posterior, options) if row == NUTS else ours(row, posterior, options)
            rows.append(measured(row, posterior, result))
            print(f"{posterior.name}: {row}, {result.seconds:.1f} s", file=sys.stderr, flush=True)
    print(
        f"PyTorch {torch.__version__}, Pyro {pyro.__version__}, one thread; {options.chains} chains of "
        f"{options.draws} draws after {options.warmup} of warm-up.\n"
    )
    show(rows, options.csv)


if __name__ == "__main__":
    main()
