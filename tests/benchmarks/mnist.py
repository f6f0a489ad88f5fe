"""MNIST by a perceptron of 400-400 ReLU units: posteriors, ensembles and modes at one budget of gradients.

    python tests/benchmarks/mnist.py --data mnist.npz [--gradients 4690] [--methods ...] [--csv FILE] [--rotated FILE]
    python tests/benchmarks/mnist.py --quick        # scikit-learn's digits, a net of 50-50, few gradients

One model for all: weights ~ N(0, 2/fan_in), biases ~ N(0, 1), classes by softmax; T = 1 is its posterior with all N
rows counted once. Every method may take as many gradients of minibatches as the others, whatever for: warm-up and
exploration count, the members of an ensemble share them, and a step of a guide that estimates curvature by a second
backward pass counts two. Scores are of the test set, each with its standard error over rows. "Rotated" asks for the
entropy of the prediction on turned digits, and how well it tells those turned by 90 degrees from upright ones (AUROC).

``--held-out`` scores the last sixth of the training part in place of the test part, and does not train on it: choose
settings by it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402
from pyro.infer import SVI  # noqa: E402
from scipy.ndimage import rotate  # noqa: E402
from sklearn.datasets import load_digits  # noqa: E402
from sklearn.metrics import roc_auc_score  # noqa: E402
from tables import show  # noqa: E402

import bnn  # noqa: E402
from bnn.guides import (  # noqa: E402
    AutoEnsemble,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientOptimizer,
    TraceEnsemble_ELBO,
    TraceNaturalGradient_ELBO,
)
from bnn.kernels import MCMC, SGHMC, CyclicalSGHMC, step_size_and_friction  # noqa: E402

ANGLES = (0, 30, 60, 90, 120, 150, 180)
DRAWS = 50


@dataclass(frozen=True)
class Problem:
    """Images as rows of standardised pixels, and the net that is to tell them apart."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    turned: dict[int, torch.Tensor]
    units: int
    batch_size: int
    gradients: int

    def model(self) -> Any:
        units, inputs = self.units, self.x.shape[1]
        net = torch.nn.Sequential(
            torch.nn.Linear(inputs, units), torch.nn.ReLU(),
            torch.nn.Linear(units, units), torch.nn.ReLU(),
            torch.nn.Linear(units, 10),
        )  # fmt: skip
        prior = bnn.priors.FanIn(2**0.5)
        return bnn.bayesian(net, prior=prior, likelihood=bnn.likelihoods.Categorical(), batch_size=self.batch_size)


def problem_of(options: argparse.Namespace) -> Problem:
    if options.data:
        with np.load(options.data) as file:
            x, y, x_test, y_test = (file[name] for name in ("x_train", "y_train", "x_test", "y_test"))
    else:
        digits = load_digits()
        x, x_test, y, y_test = *np.split(digits.images, [1200]), *np.split(digits.target, [1200])
    if options.held_out:
        cut = len(x) * 5 // 6
        x, y, x_test, y_test = x[:cut], y[:cut], x[cut:], y[cut:]
    mean, scale = x.mean(), x.std()

    def rows(images: np.ndarray) -> torch.Tensor:
        return torch.tensor((images - mean) / scale, dtype=torch.float).flatten(1)

    few = x_test[: options.turned]
    turned = {angle: rows(rotate(few.astype(float), angle, axes=(2, 1), reshape=False, order=1)) for angle in ANGLES}
    targets = (torch.tensor(part, dtype=torch.long) for part in (y, y_test))
    y, y_test = targets
    return Problem(rows(x), y, rows(x_test), y_test, turned, options.units, options.batch_size, options.gradients)


# ---- the methods: each gives what bnn.predict takes, the gradients that it took, and what else there is to say


@dataclass(frozen=True)
class Fitted:
    """A posterior and its cost."""

    posterior: Any
    gradients: float
    temperature: float | None = None


def sghmc(problem: Problem, temperature: float, learning_rate: float, momentum: float) -> Fitted:
    """One chain; the first half of the gradients is warm-up."""
    step_size, friction = step_size_and_friction(learning_rate, momentum, len(problem.x))
    steps = problem.gradients // (2 * DRAWS)
    kernel = SGHMC(
        problem.model(), step_size=step_size, friction=friction, temperature=temperature, steps_per_sample=steps
    )
    return sampled(problem, kernel, DRAWS, DRAWS, 2 * DRAWS * steps)


def cyclical(
    problem: Problem, learning_rate: float, momentum: float, exploration: float, before: float, cycles: int = 5
) -> Fitted:
    """Cycles that explore at the temperature ``before``, and then sample at T = 1."""
    step_size, friction = step_size_and_friction(learning_rate, momentum, len(problem.x))
    length = problem.gradients // cycles
    per_cycle = DRAWS // cycles
    kernel = CyclicalSGHMC(
        problem.model(), step_size=step_size, friction=friction, cycle_length=length, exploration=exploration,
        exploration_temperature=before, steps_per_sample=max(1, int((1 - exploration) * length) // per_cycle),
    )  # fmt: skip
    return sampled(problem, kernel, DRAWS, 0, cycles * length)


def sampled(problem: Problem, kernel: Any, draws: int, warmup: int, gradients: int) -> Fitted:
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, disable_progbar=True)
    mcmc.run(problem.x, problem.y)
    return Fitted(mcmc, gradients, float(mcmc.sample_stats["kinetic_temperature"].mean()))


def trained(problem: Problem, svi: SVI, scheduler: Any, steps: int) -> None:
    """Train, the rate constant for half of the steps and then falling to a twentieth."""
    every = max(1, steps // 100)
    for step in range(steps):
        svi.step(problem.x, problem.y)
        if step % every == every - 1:
            scheduler.step()


def annealed(optimizer: type, **settings: float) -> Any:
    def factor(hundredth: int) -> float:
        return 0.05 ** max(0.0, 2.0 * hundredth / 100 - 1.0)

    return pyro.optim.LambdaLR({"optimizer": optimizer, "optim_args": settings, "lr_lambda": factor})


def ensemble(problem: Problem, members: int, lr: float) -> Fitted:
    """Modes of the log joint from starts of their own, by Adam; one is the MAP."""
    guide, optimizer = AutoEnsemble(problem.model(), members=members), annealed(torch.optim.Adam, lr=lr)
    steps = problem.gradients // members
    trained(problem, SVI(guide.model, guide, optimizer, TraceEnsemble_ELBO()), optimizer, steps)
    return Fitted(guide, members * steps)


def natural(
    problem: Problem, guide: type, every: int, lr: float, precision_lr: float, init_scale: float = 0.05, **settings: Any
) -> Fitted:
    """Natural gradients; the curvature's backward pass comes every few steps, and counts."""
    made = guide(problem.model(), init_scale=init_scale)
    optimizer = annealed(NaturalGradientOptimizer, lr=lr, precision_lr=precision_lr)
    elbo = TraceNaturalGradient_ELBO(statistics_every=every, inverses_every=2 * every, **settings)
    steps = int(problem.gradients / (1 + 1 / every))
    trained(problem, SVI(made.model, made, optimizer, elbo), optimizer, steps)
    return Fitted(made, steps * (1 + 1 / every))


FACTORIZED = partial(natural, guide=AutoFactorizedNormal, every=10, lr=0.1, precision_lr=0.05)
MATRIX = partial(natural, guide=AutoMatrixNormal, every=10, lr=0.1, precision_lr=0.05, noise="local")
METHODS: dict[str, Callable[[Problem], Fitted]] = {
    "MAP": partial(ensemble, members=1, lr=0.003),
    "ensemble of 5": partial(ensemble, members=5, lr=0.003),
    "SGHMC, T = 1": partial(sghmc, temperature=1.0, learning_rate=0.01, momentum=0.98),
    "SGHMC, T = 0.1": partial(sghmc, temperature=0.1, learning_rate=0.01, momentum=0.98),
    "SGHMC, T = 0.01": partial(sghmc, temperature=0.01, learning_rate=0.01, momentum=0.98),
    "cyclical SGHMC, T = 1": partial(cyclical, learning_rate=0.015, momentum=0.98, exploration=0.5, before=1.0),
    "cyclical SGHMC, published stages": partial(
        cyclical, learning_rate=0.015, momentum=0.98, exploration=0.8, before=0.0
    ),
    "factorized normal": FACTORIZED,
    "factorized normal, kl_weight 0.1": partial(FACTORIZED, kl_weight=0.1),
    "matrix normal": MATRIX,
    "matrix normal, kl_weight 0.1": partial(MATRIX, kl_weight=0.1),
}


# ---- what they are worth


def measured(name: str, fitted: Fitted, seconds: float, problem: Problem) -> tuple[dict[str, Any], list[Any]]:
    """A row of scores, and a row for each angle."""
    posterior = fitted.posterior
    draws = None if hasattr(posterior, "default_draws") else DRAWS
    model = problem.model()
    start = time.process_time()
    scores = bnn.classification_scores(
        bnn.predict(posterior, problem.x_test, model=model, num_samples=draws).probabilities, problem.y_test
    )
    row: dict[str, Any] = {"method": name}
    for score in ("accuracy", "nll", "ece"):
        row[score], row[f"s.e. of {score}"] = scores[score]
    row["kinetic T"] = fitted.temperature
    turned, entropies = [], {}
    for angle, x in problem.turned.items():
        found = bnn.predict(posterior, x, model=model, num_samples=draws)
        entropies[angle] = found.entropy.numpy()
        right = (found.labels == problem.y_test[: len(x)]).double().mean()
        turned.append(
            {"method": name, "angle": angle, "entropy": float(entropies[angle].mean()), "accuracy": float(right)}
        )
    is_turned = np.repeat([0, 1], len(entropies[0]))
    row["AUROC at 90"] = float(roc_auc_score(is_turned, np.concatenate([entropies[0], entropies[90]])))
    row["gradients"], row["seconds"] = round(fitted.gradients), seconds
    row["seconds of predictions"] = time.process_time() - start
    return row, turned


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="mnist.npz: x_train, y_train, x_test, y_test")
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits: to see that it runs")
    parser.add_argument("--gradients", type=int, default=4690, help="of minibatches, for each method")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--units", type=int, default=400, help="in each of the two hidden layers")
    parser.add_argument("--turned", type=int, default=1000, help="test images that are turned")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--held-out", action="store_true", help="score a part of the training set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--csv", type=Path, help="also write the scores to this file")
    parser.add_argument("--rotated", type=Path, help="also write entropy by angle to this file")
    options = parser.parse_args()
    if not (options.data or options.quick):
        parser.error("give the file of MNIST by --data, or --quick")
    if options.quick:
        options.data, options.units, options.gradients, options.batch_size = None, 50, 500, 100
    torch.set_num_threads(1)
    pyro.settings.set(module_local_params=True)  # guides of one name
    problem = problem_of(options)
    scores, turned = [], []
    for name in options.methods:
        pyro.set_rng_seed(options.seed)
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # temperatures stand in the table
            fitted = METHODS[name](problem)
        row, angles = measured(name, fitted, time.process_time() - start, problem)
        scores.append(row)
        turned += angles
        print(row, file=sys.stderr, flush=True)
    print(f"{len(problem.x)} rows, {options.gradients} gradients of minibatches of {options.batch_size}\n")
    show(scores, options.csv)
    print()
    show(turned, options.rotated)


if __name__ == "__main__":
    main()
