"""What a posterior knows where there are no data: a curve with a gap, and the posteriors of the library side by side.

One net, one prior, one noise, 60 points on both sides of a gap. Twelve posteriors are fitted to the same Pyro model
(compare_posteriors.py has more of them), and each panel shows its mean, two standard deviations of the net (dark) and
two with the noise (light). Hamiltonian Monte Carlo, exact at any step size, is the reference; the number in each panel
is the distance of a posterior's predictions from it: the largest difference of the means, in its standard deviations,
and the mean ratio of standard deviations in the gap. Writes gap_regression.png. Runs in about a minute on two cores.
"""

import argparse
import time
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam, ClippedAdam

import bnn
from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    TraceNaturalGradient_ELBO,
)
from bnn.kernels import GGMC, MCMC, SGHMC, SGLD, SGNHT, CyclicalSGHMC, NormAdjustedSGHMC

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

NOISE = 0.2


def curve(x):
    return torch.sin(4 * x).squeeze(-1) + 0.3 * x.squeeze(-1)


def data():
    """60 points, 30 on each side of a gap."""
    x = torch.cat([torch.linspace(-1.0, -0.35, 30), torch.linspace(0.35, 1.0, 30)]).unsqueeze(-1)
    return x, curve(x) + NOISE * torch.randn(60)


def net_model(batch_size=None):
    """A net with one hidden layer of 50 units, as a Pyro model."""
    net = torch.nn.Sequential(torch.nn.Linear(1, 50), torch.nn.Tanh(), torch.nn.Linear(50, 1))
    prior = {"0.*": bnn.priors.Normal(2.0), "2.*": bnn.priors.FanIn(1.5)}
    return bnn.bayesian(net, prior=prior, likelihood=bnn.likelihoods.Gaussian(NOISE), batch_size=batch_size)


# ---- the posteriors: each gives what bnn.predict takes


def sampled(kernel, x, y, draws):
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws, num_chains=8, disable_progbar=True)
    mcmc.run(x, y)
    return mcmc


def fitted(guide, x, y, steps, optimizer, loss):
    svi = SVI(guide.model, guide, optimizer, loss)
    for _ in range(steps):
        svi.step(x, y)
    return guide


def natural(guide_type, x, y, steps):
    optimizer = NaturalGradientDescent(lr=0.1, precision_lr=0.03)
    return fitted(guide_type(net_model(), init_scale=0.05), x, y, steps, optimizer, TraceNaturalGradient_ELBO())


def mode(x, y, steps):
    """Weights at a mode of the posterior, from a fresh start."""
    pyro.clear_param_store()
    guide = AutoDelta(net_model(), init_loc_fn=pyro.infer.autoguide.initialization.init_to_sample)
    fitted(guide, x, y, steps, Adam({"lr": 0.03}), Trace_ELBO())
    return {name: value.detach() for name, value in guide.median().items()}


def posteriors(x, y, scale):
    """Name -> function that fits it."""
    draws, steps = round(200 * scale), round(1500 * scale)
    model, batches = net_model(), net_model(batch_size=20)
    stochastic = {"friction": 30.0, "steps_per_sample": 20}

    cyclical = CyclicalSGHMC(
        batches, step_size=0.004, cycle_length=4 * draws, exploration_temperature=1.0, **stochastic
    )

    def factorized_by_adam():
        guide = AutoFactorizedNormal(net_model(), init_scale=0.05)
        return fitted(guide, x, y, steps, ClippedAdam({"lr": 0.02}), Trace_ELBO())

    return {
        "HMC (exact)": lambda: sampled(GGMC(model, step_size="auto", friction=None, num_steps=20), x, y, draws),
        "SGHMC": lambda: sampled(SGHMC(batches, step_size=0.002, **stochastic), x, y, draws),
        "SGLD": lambda: sampled(SGLD(batches, step_size=1e-5, steps_per_sample=100), x, y, draws),
        "SGNHT": lambda: sampled(SGNHT(batches, step_size=0.002, friction=30.0, steps_per_sample=20), x, y, draws),
        "norm-adjusted SGHMC": lambda: sampled(NormAdjustedSGHMC(batches, step_size=0.002, **stochastic), x, y, draws),
        "cyclical SGHMC": lambda: sampled(cyclical, x, y, draws),
        "noisy Adam (factorized)": lambda: natural(AutoFactorizedNormal, x, y, steps),
        "Bayes by Backprop": factorized_by_adam,
        "matrix normal": lambda: natural(AutoMatrixNormal, x, y, steps),
        "eigenbasis normal": lambda: natural(AutoEigenNormal, x, y, steps),
        "ensemble of 5 modes": lambda: [mode(x, y, steps // 4) for _ in range(5)],
        "one mode (MAP)": lambda: [mode(x, y, steps // 4)],
    }


# ---- the picture


def draw(axis, name, seconds, prediction, reference, grid, x, y):
    position, mean, sd, total = grid.squeeze(-1), prediction.mean, prediction.epistemic, prediction.sd
    axis.fill_between(position, mean - 2 * total, mean + 2 * total, color="C0", alpha=0.15, linewidth=0)
    axis.fill_between(position, mean - 2 * sd, mean + 2 * sd, color="C0", alpha=0.35, linewidth=0)
    axis.plot(position, curve(grid), color="0.4", linestyle="--", linewidth=1)
    axis.plot(position, mean, color="C0")
    axis.plot(x.squeeze(-1), y, "k.", markersize=3)
    axis.set(xlim=(-1.5, 1.5), ylim=(-3, 3), title=f"{name}, {seconds:.1f} s")
    words = "reference"
    if prediction is not reference:
        off, ratio = distance(prediction, reference, grid)
        words = f"mean off by {off:.1f} sd, sd in the gap × {ratio:.2f}"
    axis.text(0.03, 0.03, words, transform=axis.transAxes, fontsize=9)


def distance(prediction, reference, grid):
    """Largest difference of the means in the reference's sds, and the mean ratio of sds in the gap."""
    gap = grid.squeeze(-1).abs() < 0.35
    off = ((prediction.mean - reference.mean).abs() / reference.sd).max()
    return off.item(), (prediction.epistemic / reference.epistemic)[gap].mean().item()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the work: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where gap_regression.png goes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the operations of nets this small are too short to share
    pyro.set_rng_seed(options.seed)
    x, y = data()
    grid = torch.linspace(-1.5, 1.5, 151).unsqueeze(-1)
    figure, axes = plt.subplots(3, 4, figsize=(16, 10.5), sharex=True, sharey=True, layout="constrained")
    reference = None
    for axis, (name, fit) in zip(axes.flat, posteriors(x, y, 0.1 if options.quick else 1.0).items(), strict=True):
        pyro.clear_param_store()
        start = time.perf_counter()
        posterior = fit()
        seconds = time.perf_counter() - start
        prediction = bnn.predict(posterior, grid, model=net_model())
        reference = prediction if reference is None else reference
        draw(axis, name, seconds, prediction, reference, grid, x, y)
        off, ratio = distance(prediction, reference, grid)
        print(f"{name:<24} {seconds:5.1f} s   mean off by {off:4.1f} sd   sd in the gap x {ratio:.2f}")
    figure.suptitle("One Pyro model, 60 points with a gap: mean, ± 2 sd of the net (dark) and with noise (light)")
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "gap_regression.png", dpi=110)
    print(f"\nwrote {options.folder / 'gap_regression.png'}")


if __name__ == "__main__":
    main()
