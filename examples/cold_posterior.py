"""The burst of the weight norm, and the cold posterior hidden in a small momentum scale.

A small net classifies digits. Its weights start ten times smaller than their prior N(0, η) has them, as nets are
initialised, and their squared norm bursts upwards, since that is where the posterior lies: with L the negative
log-likelihood of d weights, the virial theorem says

    E||θ||² / (ηd) = T + pull,   pull = −E[θᵀ∇L] / d

Norm adjustment is meant to hold the norm down: SGHMC with mass αM and friction γC, momenta drawn afresh from N(0, βM)
every n steps. It has the same law if and only if β = αT. Printed for each setting are the temperature asked for, that
of the momenta (kinetic), that of the positions (configurational) and the one that β implies; the norm over ηd, the
pull; accuracy and negative log-likelihood (NLL) of 1497 held-out images, from averaged probabilities. The picture shows
||θ||², θᵀr and ||r||² over time. Three minutes on one core.

What the runs show:

The burst is the right answer at T = 1. The norm settles at 1.085 ηd, 1.00 by equipartition and 0.08 by the pull, with
the positions at T = 1.00. It falls with T, to 0.166 ηd at T = 0, which is all pull.

With β = αT norm adjustment leaves the law alone: 1.06 to 1.08 ηd for α from 1 to 10 and γ from 0.1 to 10. A large α
is slow: at α = 10 the positions have come to 0.97 of their temperature.

With the published α = 3, β = 0.001 the norm stays at 0.24 ηd because the positions are at T = 0.076, not at 1: the
law of the steps under the prior alone says 0.075. β far below αT is a cold posterior, and plain SGHMC at T = 0.075
shows the same norm.
"""

import argparse
import warnings
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from bnn.kernels import MCMC, SGHMC, NormAdjustedSGHMC
from bnn.kernels.norm_adjusted import implied_temperature

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CHAINS = 4
STEPS_PER_DRAW = 7  # has no common factor with RESAMPLE_EVERY, so that draws fall everywhere between resamplings
STEP_SIZE, FRICTION, RESAMPLE_EVERY = 0.004, 2.0, 45
ALPHA, BETA = 3.0, 0.001  # the published setting of norm adjustment


# ---- the model: 64 pixels, two hidden layers of 20 ReLUs, ten digits; every weight and bias ~ N(0, η)

PRIOR_VARIANCE = 0.1  # η
LAYERS = list(pairwise((64, 20, 20, 10)))
SHAPES = {f"weight_{i}": shape for i, shape in enumerate(LAYERS)} | {f"bias_{i}": s[1:] for i, s in enumerate(LAYERS)}
DIM = sum(int(np.prod(shape)) for shape in SHAPES.values())  # d


def net(theta, x):
    """Logits; weights may lead with chains and draws."""
    for i in range(len(LAYERS)):
        x = (x.relu() if i else x) @ theta[f"weight_{i}"] + theta[f"bias_{i}"].unsqueeze(-2)
    return x


def model(x, y):
    theta = {
        name: pyro.sample(name, dist.Normal(0.0, PRIOR_VARIANCE**0.5).expand(shape).to_event(len(shape)))
        for name, shape in SHAPES.items()
    }
    with pyro.plate("data", len(x), subsample_size=100) as rows:
        pyro.sample("y", dist.Categorical(logits=net(theta, x[rows])), obs=y[rows])


def digits():
    """300 images to train on, 1497 held out."""
    x_train, x_test, y_train, y_test = train_test_split(*load_digits(return_X_y=True), train_size=300, random_state=0)
    mean, scale = x_train.mean(), x_train.std()
    x_train, x_test = (torch.tensor((x - mean) / scale, dtype=torch.float) for x in (x_train, x_test))
    return x_train, torch.tensor(y_train), x_test, torch.tensor(y_test)


# ---- the samplers


class Setting(NamedTuple):
    """Plain SGHMC where alpha is None. A momentum scale of "auto" is αT, which keeps the target."""

    temperature: float = 1.0
    alpha: float | None = None
    gamma: float = 1.0
    beta: float | str = "auto"

    @property
    def mass(self):
        return self.alpha or 1.0

    def __str__(self):
        if self.alpha is None:
            return "SGHMC"
        beta = "αT" if self.beta == "auto" else f"{self.beta:g}"
        return f"norm-adjusted α={self.alpha:g} β={beta}" + (f" γ={self.gamma:g}" if self.gamma != 1.0 else "")

    def kernel(self):
        common = {
            "step_size": STEP_SIZE, "friction": FRICTION, "temperature": self.temperature,
            "steps_per_sample": STEPS_PER_DRAW, "compile": "fx",  # the runs are too short to repay a compiler
        }  # fmt: skip
        if self.alpha is None:
            return SGHMC(model, **common)
        return NormAdjustedSGHMC(
            model, alpha=self.alpha, gamma=self.gamma, momentum_scale=self.beta, resample_every=RESAMPLE_EVERY, **common
        )


PUBLISHED = Setting(alpha=ALPHA, beta=BETA)
AUTO = Setting(alpha=ALPHA)


def implied_setting():
    """Plain SGHMC at the temperature that the published setting implies for a direction which only the prior holds."""
    temperature = implied_temperature(
        1.0 / PRIOR_VARIANCE, step_size=STEP_SIZE, friction=FRICTION, momentum_scale=BETA, alpha=ALPHA,
        resample_every=RESAMPLE_EVERY,
    )  # fmt: skip
    return Setting(temperature)


def panels(quick):
    """Title -> line's label -> setting: what is drawn together. A setting that stands in two panels runs once."""
    temperatures, alphas, gammas, betas = (1.0, 0.1, 0.01, 0.0), (1.0, 3.0, 10.0), (0.1, 1.0, 10.0), (0.3, 0.03)
    if quick:
        temperatures, alphas, gammas, betas = (1.0,), (3.0, 10.0), (1.0,), ()
    same = implied_setting()
    return {
        "SGHMC": {f"T = {t:g}": Setting(t) for t in temperatures},
        "norm-adjusted, α = 3, β = αT": {f"T = {t:g}": AUTO._replace(temperature=t) for t in temperatures},
        "norm-adjusted, α = 3, β = 0.001": {f"T = {t:g}": PUBLISHED._replace(temperature=t) for t in temperatures},
        "α varied (T = 1, β = αT)": {f"α = {a:g}": AUTO._replace(alpha=a) for a in alphas},
        "γ varied (T = 1, α = 3)": {f"γ = {g:g}, β = αT": AUTO._replace(gamma=g) for g in gammas}
        | {f"γ = {g:g}, β = 0.001": PUBLISHED._replace(gamma=g) for g in gammas},
        "β varied (T = 1, α = 3)": {"β = αT": AUTO}
        | {f"β = {b:g}": PUBLISHED._replace(beta=b) for b in (*betas, BETA)}
        | {f"SGHMC, T = {same.temperature:.3f}": same},
    }


def sample(setting, x, y, options):
    """All draws, from the start on, and what the library said of the setting."""
    pyro.set_rng_seed(options.seed)
    small = 0.1 * PRIOR_VARIANCE**0.5  # a tenth of the prior's scale, as nets are initialised
    start = {name: small * torch.randn(CHAINS, *shape) for name, shape in SHAPES.items()}
    mcmc = MCMC(
        setting.kernel(), options.draws, warmup_steps=0, num_chains=CHAINS, initial_params=start, disable_progbar=True
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", RuntimeWarning)
        mcmc.run(x, y)
    return mcmc, [str(warning.message) for warning in said]


# ---- what is measured


def measure(mcmc, x_test, y_test):
    """Means over the second half of the draws, and the scores of the averaged probabilities of 50 draws a chain."""
    stats, draws = mcmc.sample_stats, mcmc.get_samples(group_by_chain=True)
    half = stats["energy"].shape[1] // 2
    kept = {name: value[:, half :: max(half // 50, 1)] for name, value in draws.items()}
    probabilities = net(kept, x_test).softmax(-1).flatten(0, 1).mean(0)
    of_truth = probabilities[torch.arange(len(y_test)), y_test]

    def mean(name):
        return stats[name][:, half:].double().mean().item() if name in stats else float("nan")

    return {
        "kinetic": mean("kinetic_temperature"),
        "configurational": mean("configurational_temperature"),
        "implied": mean("implied_temperature"),
        "norm": mean("squared_norm") / (PRIOR_VARIANCE * DIM),
        "accuracy": (probabilities.argmax(-1) == y_test).double().mean().item(),
        "NLL": -of_truth.log().mean().item(),
    }


def row(setting, found):
    """A line of the table; the pull is what the likelihood adds to the norm, −E[θᵀ∇L]/d."""
    implied = f"{found['implied']:9.4f}" if np.isfinite(found["implied"]) else f"{'':9}"
    pull = found["norm"] - found["configurational"]
    return (
        f"{setting!s:<33}{setting.temperature:7.4g}{found['kinetic']:9.4f}{found['configurational']:9.4f}{implied}"
        f"{found['norm']:9.4f}{pull:8.4f}{found['accuracy']:10.4f}{found['NLL']:8.4f}"
    )


def compare(cold, plain):
    """The published setting beside plain SGHMC at the temperature that it implies."""
    print(f"\nAsked T = 1 with β = {BETA:g}, beside plain SGHMC that asks for T = {cold['implied']:.4f}:")
    for name in ("configurational", "norm", "accuracy", "NLL"):
        print(f"  {name:<16}{cold[name]:8.4f}  {plain[name]:8.4f}")


# ---- the picture

COLOURS = ("#D55E00", "#E69F00", "#009E73", "#0072B2", "#CC79A7", "#000000")  # Okabe and Ito: safe for the colour-blind


def traces(stats):
    """Means over the chains: ||θ||²/(ηd), θᵀr/d and ||r||²/d."""
    norm, product, momentum = (
        stats[name].mean(0) / DIM for name in ("squared_norm", "position_momentum", "momentum_squared_norm")
    )
    return norm / PRIOR_VARIANCE, product, momentum


def plot(path, shown, results):
    """Above, three panels of temperatures with the three quantities below each other; then three panels of norms."""
    figure, axes = plt.subplots(4, 3, figsize=(13, 15), layout="constrained", sharey="row")
    names = ("$\\|\\theta\\|^2\\,/\\,(\\eta d)$", "$\\theta^\\top r\\,/\\,d$", "$\\|r\\|^2\\,/\\,d$")
    for place, (title, lines) in enumerate(shown.items()):
        first_row, column, above = 3 * (place // 3), place % 3, place < 3
        for (label, setting), colour in zip(lines.items(), COLOURS, strict=False):
            plain = setting.alpha is None and not above
            style = {"color": "black", "linestyle": "--"} if plain else {"color": colour}
            for number, values in enumerate(traces(results[setting])[: 3 if above else 1]):
                axis = axes[first_row + number, column]
                steps = STEPS_PER_DRAW * np.arange(1, len(values) + 1)
                axis.plot(steps, values, label=label, linewidth=0.7 if number else 1.3, **style)
                level = setting.temperature * (setting.mass if number == 2 else 1.0)
                if number != 1 and level > 0.0 and (above or setting.temperature == 1.0):
                    axis.axhline(level, color=colour if above else "0.4", linestyle=":", linewidth=1)
        axes[first_row, column].set_title(title)
        axes[first_row, column].plot([], [], ":", color="0.4", label="equipartition")
        axes[first_row, column].legend(fontsize="small", loc="lower right" if above else "best")
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xlabel(f"steps of h = {STEP_SIZE:g}")
    for row, name in zip(axes, (*names, names[0]), strict=True):
        row[0].set_ylabel(f"{name}   (mean of {CHAINS} chains)")
    axes[0, 0].set_yscale("log")
    axes[2, 0].set_yscale("log")
    axes[2, 0].set_ylim(bottom=1e-4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    parser.add_argument("--quick", action="store_true", help="fewer settings, a quarter of the draws: to see it run")
    parser.add_argument("--plot", type=Path, default=Path("cold_posterior.png"), help="where the picture goes")
    parser.add_argument("--draws", type=int, default=1200, help="draws per chain, the burst included (default 1200)")
    options = parser.parse_args()
    options.draws = min(options.draws, 300) if options.quick else options.draws
    torch.set_num_threads(1)  # the operations are too short to share
    x, y, x_test, y_test = digits()
    shown = panels(options.quick)
    print(f"{DIM} weights ~ N(0, {PRIOR_VARIANCE:g}); {CHAINS} chains of {STEPS_PER_DRAW * options.draws} steps")
    print(f"{'sampler':<33}{'T':>7}{'kinetic':>9}{'config.':>9}{'implied':>9}{'|θ|²/ηd':>9}{'pull':>8}", end="")
    print(f"{'accuracy':>10}{'NLL':>8}")
    results, found, announced = {}, {}, ""
    for setting in dict.fromkeys(setting for lines in shown.values() for setting in lines.values()):
        mcmc, said = sample(setting, x, y, options)
        results[setting], found[setting] = mcmc.sample_stats, measure(mcmc, x_test, y_test)
        print(row(setting, found[setting]), flush=True)
        announced = said[0] if setting == PUBLISHED else announced
    compare(found[PUBLISHED], found[implied_setting()])
    print(f"\nWhat bnn says of β = {BETA:g}: {announced}")
    plot(options.plot, shown, results)
    print(f"\nwrote {options.plot}")


if __name__ == "__main__":
    main()
