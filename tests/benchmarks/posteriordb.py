"""Kernels on reference posteriors beside Pyro's NUTS: errors, effective draws, seconds and gradients.

    python tests/benchmarks/posteriordb.py --data FOLDER [--quick] [--chains 4] [--warmup 500] [--draws 500]
        [--rows GGMC HMC AMAGOLD NUTS] [--only arK eight_schools kidiq mesquite] [--markdown FILE]

All run on one thread, in float64, with as many chains, draws of warm-up and draws as each other; ours move all chains
at once, NUTS one after another. Errors are the worst over the posterior's quantities, in standard deviations of the
reference; ESS is the least bulk ESS. Seconds hold setup and warm-up. The exit status is 0 whatever the errors are.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
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
from torch.distributions import biject_to  # noqa: E402

from bnn.kernels import MCMC  # noqa: E402
from support import posteriordb  # noqa: E402
from support.posteriordb import POSTERIORS, ROWS, Posterior  # noqa: E402

NUTS = "NUTS"


@dataclass(frozen=True)
class Result:
    """Draws ``(chains, draws, quantities)``, and what they cost."""

    draws: np.ndarray
    seconds: float
    gradients: int  # of all chains


def ours(name: str, posterior: Posterior, options: argparse.Namespace) -> Result:
    kernel = ROWS[name].build(posterior.model)
    start = time.perf_counter()
    mcmc = MCMC(kernel, options.draws, options.warmup, num_chains=options.chains, disable_progbar=True)
    mcmc.run(*posterior.data)
    seconds = time.perf_counter() - start
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
        """A point of the support: NUTS starts by a draw from every prior, which a flat one has not."""
        transform = biject_to(flat.support)
        return transform(torch.rand(transform.inverse_shape(flat.batch_shape + flat.event_shape)) - 0.5)

    chains = []
    start = time.perf_counter()
    with (
        patch.object(pyro.ops.integrator, "potential_grad", counted),
        patch.object(ImproperUniform, "sample", anywhere),
    ):
        for _ in range(options.chains):
            mcmc = pyro.infer.MCMC(
                pyro.infer.NUTS(posterior.model), options.draws, options.warmup, disable_progbar=True
            )
            mcmc.run(*posterior.data)
            chains.append(posterior.quantities_of(mcmc.get_samples(group_by_chain=True)))
    return Result(torch.cat(chains).numpy(), time.perf_counter() - start, count)


def line(name: str, posterior: Posterior, result: Result) -> str:
    """A row of the table."""
    chains = result.draws
    means, deviations = posterior.errors(chains.reshape(-1, chains.shape[-1]))
    ess = min(float(az.ess(chains[..., i], method="bulk")) for i in range(chains.shape[-1]))
    cells = [
        name, f"{np.abs(means).max():.3f}", f"{np.abs(deviations).max():.3f}", f"{ess:.0f}", f"{result.seconds:.1f}",
        f"{ess / result.seconds:.1f}", f"{result.gradients:,}", f"{1000 * ess / result.gradients:.1f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def section(name: str, options: argparse.Namespace) -> str:
    """One posterior as a table in Markdown."""
    posterior = posteriordb.load(options.data, name)
    lines = [f"### {name}, {len(posterior.names)} quantities", ""]
    lines.append("| kernel | error of mean | of sd | ESS | seconds | ESS/s | gradients | ESS per 1000 gradients |")
    lines.append("|---|---:|---:|---:|---:|---:|---:|---:|")
    for row in options.rows:
        pyro.set_rng_seed(20)
        result = nuts(posterior, options) if row == NUTS else ours(row, posterior, options)
        lines.append(line(row, posterior, result))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder of reference posteriors")
    parser.add_argument("--quick", action="store_true", help="a minute: eight schools, few draws")
    parser.add_argument("--chains", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, NUTS], default=[*ROWS, NUTS])
    parser.add_argument("--only", nargs="+", default=[""], help="posteriors whose names begin so")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file, too")
    options = parser.parse_args()
    if options.quick:
        options.only, options.chains, options.warmup, options.draws = ["eight"], 2, 100, 100
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    sections = [
        f"PyTorch {torch.__version__}, Pyro {pyro.__version__}, one thread; {options.chains} chains of "
        f"{options.draws} draws after {options.warmup} of warm-up."
    ]
    print(sections[0] + "\n")
    for name in (n for n in POSTERIORS if n.startswith(tuple(options.only))):
        sections.append(section(name, options))
        print(sections[-1], flush=True)
    if options.markdown:
        options.markdown.write_text("\n".join(sections), encoding="utf-8")


if __name__ == "__main__":
    main()
