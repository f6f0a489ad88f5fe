"""One Pyro model, every kind of posterior in the library: how far is each from the exact one, and what does it cost?

Twice: a regression (sklearn's diabetes table) and a classification (its digits), each with one net, one prior and one
likelihood for all. Hamiltonian Monte Carlo, run longer than the others, is the reference. Per posterior: seconds of
processor time, passes over the data that its gradients cost, scores on held-out rows, the temperature that was
measured, and how far its predictions are from the reference's: Wasserstein's distance of the predictive laws in
standard deviations, or the total variation of the probabilities and the part of labels that agree. Calibration is what
the 90 % interval's coverage is off by, or the expected calibration error. Writes compare_posteriors.png. Takes under
five minutes on one core.

Probabilistic backpropagation (AutoPBP) has no row: it is for nets of ReLUs with one output, and these are of tanh.
"""

import argparse
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal
from pyro.optim import ClippedAdam, CosineAnnealingWarmRestarts
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split

import bnn
from bnn.guides import (
    IVON,
    AutoDropout,
    AutoEigenNormal,
    AutoEnsemble,
    AutoFactorizedNormal,
    AutoIVON,
    AutoMatrixNormal,
    AutoRankOne,
    AutoSnapshots,
    AutoSWAG,
    Laplace,
    NaturalGradientDescent,
    SteinRepulsion,
    TraceEnsemble_ELBO,
    TraceNaturalGradient_ELBO,
)
from bnn.kernels import AMAGOLD, GGMC, MCMC, SGHMC, SGLD, SGNHT, ConstantSGD, CyclicalSGHMC, NormAdjustedSGHMC

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CHAINS, BATCHES = 4, 4


@dataclass
class Problem:
    """Training and test data, a net with its likelihood, and the step of its stochastic-gradient samplers."""

    name: str
    train: tuple
    test: tuple
    sizes: tuple
    likelihood: object
    step_size: float
    scale: float

    def model(self, batches=1):
        """The Pyro model, on minibatches if there are more than one of them."""
        inputs, units, outputs = self.sizes
        net = torch.nn.Sequential(torch.nn.Linear(inputs, units), torch.nn.Tanh(), torch.nn.Linear(units, outputs))
        batch_size = None if batches == 1 else len(self.train[0]) // batches
        prior = {"2.weight": bnn.priors.FanIn(2.0), "*": bnn.priors.FanIn()}
        return bnn.bayesian(net, prior=prior, likelihood=self.likelihood, batch_size=batch_size)

    def times(self, count):
        """So many draws or steps, or fewer of them in a quick run."""
        return max(10, round(self.scale * count))


def standardised(x, y, test_size=0.3):
    parts = train_test_split(x, y, test_size=test_size, random_state=0)
    mean, scale = parts[0].mean(0), parts[0].std(0) + 1e-2 * parts[0].std()
    return [torch.tensor((part - mean) / scale, dtype=torch.float) for part in parts[:2]] + list(parts[2:])


def regression(scale):
    x, x_test, y, y_test = standardised(*load_diabetes(return_X_y=True))
    y, y_test = (torch.tensor((part - y.mean()) / y.std(), dtype=torch.float) for part in (y, y_test))
    return Problem("diabetes", (x, y), (x_test, y_test), (10, 20, 1), bnn.likelihoods.Gaussian(0.7), 0.01, scale)


def classification(scale):
    x, x_test, y, y_test = standardised(*load_digits(return_X_y=True), test_size=0.6)
    train, test = (x, torch.tensor(y)), (x_test, torch.tensor(y_test))
    return Problem("digits", train, test, (64, 20, 10), bnn.likelihoods.Categorical(), 0.01, scale)


# ---- the posteriors: each gives what bnn.predict takes, and how many passes over the data its gradients cost


def sampled(problem, kernel, draws=300, steps=10, batches=1, **settings):
    draws = problem.times(draws)
    kernel = kernel(problem.model(batches), steps_per_sample=steps, **settings)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=max(40, draws), num_chains=CHAINS, disable_progbar=True)
    mcmc.run(*problem.train)
    return mcmc, mcmc.run_facts["gradient_evaluations"] * (1 + mcmc.warmup_steps / draws) / batches


def trained(problem, guide, loss, optimizer, steps, passes=1):
    guide, steps = guide(problem.model()), problem.times(steps)
    svi = SVI(guide.model, guide, optimizer(), loss())
    for _ in range(steps):
        svi.step(*problem.train)
    return guide, passes * steps


def adam(lr=0.02):
    return ClippedAdam({"lr": lr})


def natural(problem, guide, lr=0.1, **settings):
    optimizer = partial(NaturalGradientDescent, lr=lr, precision_lr=0.03)
    loss = partial(TraceNaturalGradient_ELBO, **settings)
    return trained(problem, partial(guide, init_scale=0.05), loss, optimizer, 1000, passes=2)


def by_backprop(problem, guide, **settings):
    return trained(problem, partial(guide, init_scale=0.05, **settings), Trace_ELBO, adam, 2000)


def mode(problem):
    return trained(problem, AutoDelta, Trace_ELBO, adam, 500)


def laplace(problem, structure="kronecker", linearised=False):
    guide, passes = mode(problem)
    posterior = Laplace(guide, structure).fit(*problem.train)
    return (posterior.linearised if linearised else posterior), passes + 1


def ensemble(problem, members=10, **settings):
    return trained(problem, partial(AutoEnsemble, members=members, **settings), TraceEnsemble_ELBO, adam, 500, members)


def stein(problem, particles=10):
    loss = partial(TraceEnsemble_ELBO, repulsion=SteinRepulsion())
    return trained(problem, partial(AutoEnsemble, members=particles), loss, adam, 500, particles)


def swag(problem, members=1):
    """A mode by Adam, then its surroundings by SGD at a constant rate on minibatches."""
    guide, passes = trained(problem, partial(AutoSWAG, members=members), TraceEnsemble_ELBO, adam, 500, members)
    model, collections = problem.model(BATCHES), problem.times(100)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": problem.step_size**2}), TraceEnsemble_ELBO())
    for step in range(collections * BATCHES):
        svi.step(*problem.train)
        if step % BATCHES == BATCHES - 1:
            guide.collect()
    return guide, passes + members * collections


def snapshots(problem, cycles=5):
    guide, cycle = AutoSnapshots(problem.model()), problem.times(300)
    schedule = CosineAnnealingWarmRestarts(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.05}, "T_0": cycle}, {"clip_norm": 1e3}
    )
    svi = SVI(guide.model, guide, schedule, TraceEnsemble_ELBO())
    for step in range(1, cycles * cycle + 1):
        svi.step(*problem.train)
        if step % cycle == 0:
            guide.collect()
        schedule.step()
    return guide, cycles * cycle


def ivon(problem):
    guide = partial(AutoIVON, num_data=len(problem.train[0]), hess_init=1.0)
    return trained(problem, guide, TraceEnsemble_ELBO, partial(IVON, lr=0.1, beta2=0.999), 2000)


def vogn(problem):
    settings = {"curvature": "empirical", "stick_the_landing": False, "trust_region": None}
    return natural(problem, AutoFactorizedNormal, **settings)


def rank_one(problem, particles=4):
    loss = partial(TraceEnsemble_ELBO, num_particles=particles)
    return trained(problem, partial(AutoRankOne, members=4), loss, adam, 1000, particles)


def posteriors(problem):
    """Name -> function that fits it; the first is the reference."""
    minibatches, h = {"batches": BATCHES}, problem.step_size
    friction = {"step_size": h, "friction": 5.0, **minibatches}
    cycle = problem.times(600)
    return {
        "HMC, the reference": partial(
            sampled, kernel=GGMC, draws=450, steps=2, step_size="auto", friction=None, num_steps=10
        ),
        "GGMC": partial(sampled, kernel=GGMC, step_size="auto", friction=5.0, num_steps=1),
        "AMAGOLD": partial(
            sampled, kernel=AMAGOLD, step_size="auto", friction=5.0, num_steps=5, steps=2, **minibatches
        ),
        "SGLD": partial(sampled, kernel=SGLD, step_size="auto", **minibatches),
        "SGHMC": partial(sampled, kernel=SGHMC, step_size="auto", friction=5.0, **minibatches),
        "norm-adjusted SGHMC": partial(sampled, kernel=NormAdjustedSGHMC, **friction),
        "cyclical SGHMC": partial(
            sampled, kernel=CyclicalSGHMC, draws=120, cycle_length=cycle, exploration_temperature=1.0, **friction
        ),
        "SGNHT": partial(sampled, kernel=SGNHT, **friction),
        "constant SGD": partial(sampled, kernel=ConstantSGD, **minibatches),
        "matrix normal": partial(natural, guide=AutoMatrixNormal),
        "noisy K-FAC": partial(natural, guide=AutoMatrixNormal, damping="factored"),
        "eigenbasis normal": partial(natural, guide=AutoEigenNormal),
        "noisy Adam": partial(natural, guide=AutoFactorizedNormal),
        "Bayes by Backprop": partial(by_backprop, guide=AutoFactorizedNormal),
        "VOGN": vogn,
        "IVON": ivon,
        "low-rank normal (Pyro)": partial(by_backprop, guide=AutoLowRankMultivariateNormal, rank=10),
        "MAP": mode,
        "Laplace, Kronecker": laplace,
        "the same, linearised": partial(laplace, linearised=True),
        "Laplace, diagonal": partial(laplace, structure="diagonal"),
        "ensemble of 10": ensemble,
        "the same, anchored": partial(ensemble, anchored=True),
        "Stein, 10 particles": stein,
        "SWAG": swag,
        "multi-SWAG of 5": partial(swag, members=5),
        "snapshots, 5": snapshots,
        "dropout": partial(trained, guide=AutoDropout, loss=Trace_ELBO, optimizer=adam, steps=2000),
        "rank-one factors": rank_one,
    }


# ---- what they are worth


@dataclass
class Row:
    """One posterior's line of the table."""

    name: str
    seconds: float
    passes: float
    score: float
    nll: float
    calibration: float
    distance: float
    agreement: float
    temperature: float


def predictive(problem, posterior):
    x = problem.test[0]
    if hasattr(posterior, "__self__"):  # the method of a linearised model
        return posterior(x)
    return bnn.predict(posterior, x, model=problem.model(), num_samples=draws_of(problem, posterior))


def draws_of(problem, posterior):
    """How many draws are averaged: of an ensemble each member once."""
    return None if getattr(posterior, "default_draws", 1000) < 1000 else max(100, problem.times(1000))


def scores_of(problem, posterior, prediction):
    x, y = problem.test
    if prediction.probabilities is not None:
        return bnn.classification_scores(prediction.probabilities, y)
    if hasattr(posterior, "__self__"):
        return bnn.gaussian_scores(prediction.mean, prediction.sd, y)
    return bnn.score(posterior, x, y, model=problem.model(), num_samples=draws_of(problem, posterior))


def distances(prediction, reference):
    """Of the predictive laws, and the part of labels on which they agree."""
    if prediction.probabilities is None:
        gap = (prediction.mean - reference.mean).square() + (prediction.sd - reference.sd).square()
        return (gap.sqrt() / reference.sd).mean().item(), float("nan")
    pair = prediction.probabilities, reference.probabilities
    return bnn.total_variation(*pair), bnn.agreement(*pair)


def compare(problem):
    rows, reference = [], None
    for name, fit in posteriors(problem).items():
        pyro.clear_param_store()
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # temperatures stand in the table
            posterior, passes = fit(problem)
        seconds = time.process_time() - start
        prediction = predictive(problem, posterior)
        reference = prediction if reference is None else reference
        found = scores_of(problem, posterior, prediction)
        kinetic = getattr(posterior, "sample_stats", {}).get("kinetic_temperature")
        temperature = float("nan") if kinetic is None else kinetic.mean().item()
        distance, agreement = distances(prediction, reference)
        if prediction.probabilities is None:
            score, calibration = found["rmse"].value, abs(found["coverage_0.9"].value - 0.9)
        else:
            score, calibration = found["accuracy"].value, found["ece"].value
        rows.append(
            Row(name, seconds, passes, score, found["nll"].value, calibration, distance, agreement, temperature)
        )
        show(rows[-1])
    return rows


HEADS = "posterior", "seconds", "passes", "{score}", "NLL", "calibration", "distance", "agreement", "kinetic T"


def show(row=None, score="RMSE"):
    if row is None:
        cells = [head.format(score=score) for head in HEADS]
    else:
        formats = "", ".1f", ".0f", ".3f", ".3f", ".3f", ".3f", ".3f", ".3f"
        cells = [
            "-" if value != value else f"{value:{how}}" for value, how in zip(vars(row).values(), formats, strict=True)
        ]
    print(f"{cells[0]:<24}" + "".join(f"{cell:>12}" for cell in cells[1:]), flush=True)


def draw(axes, problem, rows):
    for axis, key, title in zip(axes, ("nll", "distance"), ("test NLL", "distance from the reference"), strict=True):
        shown = rows if key == "nll" else rows[1:]
        places = [-rows.index(row) for row in shown]
        values = [getattr(row, key) for row in shown]
        axis.hlines(places, rows[0].nll if key == "nll" else 0.0, values, color="0.8", linewidth=1)
        axis.plot(values, places, "o", color="C0")
        axis.axvline(rows[0].nll, color="C1", linewidth=1) if key == "nll" else axis.set_xlim(left=0.0)
        axis.set_yticks([-number for number in range(len(rows))], [row.name for row in rows])
        axis.set(title=f"{problem.name}: {title}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    parser.add_argument("--quick", action="store_true", help="a twentieth of the work: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where compare_posteriors.png goes")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the operations of nets this small are too short to share
    figure, axes = plt.subplots(1, 4, figsize=(18, 7), layout="constrained", sharey=True)
    for number, make in enumerate((regression, classification)):
        pyro.set_rng_seed(options.seed)
        problem = make(0.05 if options.quick else 1.0)
        inputs, units, outputs = problem.sizes
        print(f"\n{problem.name}: {inputs}-{units}-{outputs} tanh units, {len(problem.train[0])} rows, "
              f"{len(problem.test[0])} held out")  # fmt: skip
        show(score="RMSE" if outputs == 1 else "accuracy")
        draw(axes[2 * number : 2 * number + 2], problem, compare(problem))
    options.folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.folder / "compare_posteriors.png", dpi=110)
    print(f"\nwrote {options.folder / 'compare_posteriors.png'}")


if __name__ == "__main__":
    main()
