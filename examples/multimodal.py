"""Modes far apart: plain SGHMC beside cyclic step sizes and cyclic momenta, on mixtures in one and two dimensions.

Chains start in one mode. Printed for each sampler are the share of modes that a chain visits, how far the visits are
from the modes' true weights (total variation, pooled over chains), and how well a mode is sampled from within: the
standard deviation about the nearest mode, over the true one. Writes multimodal.png. Takes under a minute on two cores.

What the runs show: plain SGHMC stays near where it starts. Cyclic steps and cyclic momenta reach all modes, but how
often says how they travelled, not what a mode weighs; and draws at steps that are still large are too wide.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch

from bnn.kernels import MCMC, SGHMC, CosineCycles, CyclicalSGHMC, CyclicalSGLD, NormAdjustedSGHMC

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CHAINS = 16
WIDTH = 0.5  # standard deviation of every mode


# ---- two targets


def mixture(centres, weights):
    """A model whose one site is a mixture of round Gaussians."""
    parts = dist.Independent(dist.Normal(centres, WIDTH), 1)
    law = dist.MixtureSameFamily(dist.Categorical(weights), parts)

    def model():
        z = pyro.sample("z", dist.ImproperUniform(dist.constraints.real_vector, (), centres.shape[1:]))
        pyro.factor("mixture", law.log_prob(z))

    return model


TARGETS = {
    "1-D": (torch.tensor([[-4.0], [0.0], [4.0]]), torch.tensor([0.25, 0.5, 0.25])),
    "2-D": (
        torch.stack(torch.meshgrid(torch.tensor([-4.0, 0.0, 4.0]), torch.tensor([-4.0, 0.0, 4.0]), indexing="ij"), -1)
        .reshape(-1, 2),
        torch.full((9,), 1 / 9),
    ),
}  # fmt: skip


# ---- the samplers


def samplers(model):
    """Name -> kernel; all take the same number of steps per draw on average."""
    cycle = 400
    # Without minibatches nothing but the kernel's own noise explores; at the verge of stability it is large.
    cyclical = {"cycle_length": cycle, "exploration": 0.5, "exploration_temperature": 1.0, "steps_per_sample": 5}
    return {
        "SGHMC": SGHMC(model, step_size=0.2, friction=0.5, steps_per_sample=10),
        "cyclical SGLD": CyclicalSGLD(model, step_size=0.49, **cyclical),
        "cyclical SGHMC": CyclicalSGHMC(model, step_size=0.99, friction=0.5, **cyclical),
        "cyclic momentum": NormAdjustedSGHMC(
            model, step_size=0.2, friction=0.5, resample_every=20, steps_per_sample=5,
            momentum_scale=CosineCycles(60.0, cycle_length=cycle, floor=1.0, hold=0.5),
        ),
    }  # fmt: skip


def sample(kernel, centres, options):
    """Draws ``(chains, draws, dim)``, all chains from the first mode."""
    pyro.set_rng_seed(options.seed)
    start = {"z": centres[:1].repeat(CHAINS, 1)}
    mcmc = MCMC(kernel, options.draws, warmup_steps=0, num_chains=CHAINS, initial_params=start, disable_progbar=True)
    mcmc.run()
    return mcmc.get_samples(group_by_chain=True)["z"]


def coverage(draws, centres, weights):
    """Share of modes that a chain visits, total variation of the visits, and width within modes over the true one."""
    distance, mode = torch.cdist(draws.flatten(0, 1), centres).min(-1)
    mode = mode.reshape(draws.shape[:2])
    visited = np.mean([len(chain.unique()) / len(centres) for chain in mode])
    shares = torch.bincount(mode.flatten(), minlength=len(centres)) / mode.numel()
    within = distance.square().mean().div(draws.shape[-1]).sqrt() / WIDTH
    return visited, 0.5 * (shares - weights).abs().sum().item(), within.item()


# ---- the picture


def plot(path, results):
    """A row per target, a column per sampler: draws of all chains, and one chain's path."""
    names = list(next(iter(results.values())))
    figure, axes = plt.subplots(len(results), len(names), figsize=(3.4 * len(names), 6.4), layout="constrained")
    for row, (target, found) in zip(axes, results.items(), strict=True):
        centres, weights = TARGETS[target]
        for axis, name in zip(row, names, strict=True):
            draws = found[name].numpy()
            axis.set_title(f"{name}, {target}")
            if draws.shape[-1] == 1:
                grid = np.linspace(-7, 7, 400)
                bumps = np.exp(-0.5 * ((grid[:, None] - centres.numpy().T) / WIDTH) ** 2) / (WIDTH * np.sqrt(2 * np.pi))
                axis.hist(draws.ravel(), bins=70, range=(-7, 7), density=True, color="0.75", label="draws")
                axis.plot(grid, bumps @ weights.numpy(), color="C3", label="target")
                axis.set_xlabel("z")
                axis.set_ylabel("density")
            else:
                axis.plot(*draws.reshape(-1, 2).T, ".", markersize=1.5, color="0.7", label="draws")
                axis.plot(*draws[0].T, linewidth=0.4, color="C0", label="one chain")
                axis.plot(*centres.numpy().T, "x", color="C3", label="modes")
                axis.set(xlim=(-6.5, 6.5), ylim=(-6.5, 6.5), xlabel="$z_1$", ylabel="$z_2$")
    for row in axes:
        row[0].legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where multimodal.png goes")
    options = parser.parse_args()
    options.draws = 200 if options.quick else 2000
    torch.set_num_threads(1)  # the operations are too short to share
    results = {}
    for target, (centres, weights) in TARGETS.items():
        print(f"\n{target}: {len(centres)} modes, {CHAINS} chains of {options.draws} draws, all from the first mode")
        print(f"  {'sampler':<18}{'modes visited':>15}{'off the weights':>17}{'width within':>14}")
        results[target] = {}
        for name, kernel in samplers(mixture(centres, weights)).items():
            draws = results[target][name] = sample(kernel, centres, options)
            visited, off, within = coverage(draws, centres, weights)
            print(f"  {name:<18}{visited:>14.0%} {off:>16.2f} {within:>13.2f}", flush=True)
    options.folder.mkdir(parents=True, exist_ok=True)
    plot(options.folder / "multimodal.png", results)
    print(f"\nwrote {options.folder / 'multimodal.png'}")


if __name__ == "__main__":
    main()
