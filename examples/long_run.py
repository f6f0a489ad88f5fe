"""A run that may be killed at any moment and started again: its draws go to a store, and it resumes from there.

Stop it with Ctrl-C, kill it with `kill -9`, or let it kill itself:

    python examples/long_run.py --kill-after 20      # SIGKILL in the midst of the run
    python examples/long_run.py                      # goes on from the last checkpoint
    python examples/long_run.py --draws 4000         # later: more draws of the same chains

In several processes, each with its share of the chains, or of the rows of every minibatch, into one store. One that
dies ends all; torchrun starts them again, and they resume:

    torchrun --nproc-per-node=2 --max-restarts=3 examples/long_run.py --ranks chains --store ranks.zarr

The draws are those of a run that was never interrupted, bit for bit. While it runs, `bnn.to_arviz("long_run.zarr")` in
another process shows what is there so far. Takes under a minute on two cores.
"""

import argparse
import os
import shutil
import signal
import threading
from pathlib import Path

import numpy as np
import pyro
import pyro.distributions as dist
import torch

import bnn
from bnn.kernels import MCMC, SGHMC


def problem(rows=600):
    """A noisy sine with a gap, and a net of 50 units."""
    generator = torch.Generator().manual_seed(0)
    x = 3.0 * torch.rand(rows, 1, generator=generator) * torch.where(torch.arange(rows) % 2 == 0, 1.0, -1.0)[:, None]
    y = torch.sin(2.0 * x) + 0.2 * torch.randn(rows, 1, generator=generator)
    net = torch.nn.Sequential(torch.nn.Linear(1, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
    likelihood = bnn.likelihoods.Gaussian(dist.HalfNormal(1.0))
    return bnn.bayesian(net, likelihood=likelihood, batch_size=200), x, y


def there(path):
    """Draws of each chain in the store, None if there is none yet."""
    try:
        return bnn.to_arviz(path)["posterior"].sizes["draw"]
    except ValueError:
        return None
    except RuntimeError:  # killed in warm-up
        return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="300 draws: half a minute with what it takes to start")
    parser.add_argument("--draws", type=int, default=2000, help="of each chain, in all")
    parser.add_argument("--store", default="long_run.zarr", help="where the draws go")
    parser.add_argument("--fresh", action="store_true", help="remove the store and start anew")
    parser.add_argument("--ranks", choices=("chains", "data"), help="under torchrun: what the processes share out")
    parser.add_argument("--kill-after", type=float, metavar="SECONDS", help="end by SIGKILL so long after the start")
    options = parser.parse_args()
    draws = 300 if options.quick else options.draws
    first = int(os.environ.get("RANK", 0)) == 0  # of the processes: this one speaks
    if options.fresh and first:
        shutil.rmtree(options.store, ignore_errors=True)

    found = there(options.store)
    if not first:
        pass
    elif found is None:
        print(f"Starts {options.store}, with seed {options.seed}.", flush=True)
    else:
        print(f"Resumes {options.store}: {found} of {draws} draws of each chain are there.", flush=True)

    if options.kill_after:
        threading.Timer(options.kill_after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    pyro.set_rng_seed(options.seed)
    model, x, y = problem()
    mcmc = MCMC(
        SGHMC(model, step_size=0.0005, friction=50.0, steps_per_sample=20),
        num_samples=draws,
        warmup_steps=200,
        num_chains=4,
        store=bnn.Store(options.store, checkpoint_every=1.0),
        resume=True,
        ranks=options.ranks,
    )
    mcmc.run(x, y)
    if not first:
        return

    print(mcmc.temperature_report())
    grid = torch.linspace(-4.0, 4.0, 9).unsqueeze(-1)
    predicted = bnn.predict(options.store, grid, model=model)  # reads a block of draws at a time
    for place, mean, sd in zip(grid.flatten().tolist(), predicted.mean.flatten(), predicted.sd.flatten(), strict=True):
        print(f"  x = {place:4.1f}: {mean:6.3f} ± {sd:.3f}")
    size = sum(file.stat().st_size for file in Path(options.store).rglob("*") if file.is_file())
    weights = np.prod(bnn.to_arviz(options.store)["posterior"]["0.weight"].shape[:2])
    print(f"{options.store}: {weights} draws of the net, {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
