"""Handwritten digits: from an nn.Module to a posterior, its predictions, their calibration and a report.

Makes a Pyro model of a small net by bnn.bayesian, samples it by SGHMC on minibatches, eight chains at once, and
compares the posterior predictive with the net at the posterior's mode: scores on held-out images, a reliability diagram
with the band that chance allows, accuracy when the least certain images are refused, and what either says about images
that are no digits (rotated by a quarter, pixels shuffled). Writes digits.png, digits.nc and digits.html, the report.
Runs in about a minute on two cores.
"""

import argparse
from pathlib import Path

import matplotlib
import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import bnn
from bnn.kernels import MCMC, SGHMC

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


def data():
    """Training and test images, standardised as a whole, and their labels."""
    images, labels = load_digits(return_X_y=True)
    parts = train_test_split(images, labels, test_size=0.3, random_state=0)
    mean, scale = parts[0].mean(), parts[0].std()
    x_train, x_test = (torch.tensor((x - mean) / scale, dtype=torch.float) for x in parts[:2])
    return x_train, x_test, torch.tensor(parts[2]), torch.tensor(parts[3])


def digits_model():
    net = torch.nn.Sequential(torch.nn.Linear(64, 50), torch.nn.Tanh(), torch.nn.Linear(50, 10))
    prior = {"2.weight": bnn.priors.FanIn(5.0), "*": bnn.priors.FanIn()}
    return bnn.bayesian(net, prior=prior, likelihood=bnn.likelihoods.Categorical(), batch_size=100)


def sample(model, x, y, draws):
    kernel = SGHMC(model, step_size=0.007, friction=40.0, steps_per_sample=20)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws, num_chains=8)
    mcmc.run(x, y)
    return mcmc


def posterior_mode(model, x, y, steps):
    """Weights at the mode: the ordinary net that the posterior is compared with, as an ensemble of one."""
    guide = AutoDelta(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y)
    return [{name: value.detach() for name, value in guide.median().items()}]


def no_digits(x):
    """Images that are no digits: a quarter turned, and with shuffled pixels."""
    turned = torch.rot90(x.reshape(-1, 8, 8), dims=(1, 2)).reshape(-1, 64)
    return {"digits": x, "turned by a quarter": turned, "shuffled pixels": x[:, torch.randperm(64)]}


# ---- what is shown


def print_scores(named):
    names = list(next(iter(named.values())))
    print(f"\n{'test set':<12}" + "".join(f"{name:>20}" for name in names))
    for name, scores in named.items():
        print(f"{name:<12}" + "".join(f"{scores[key]!s:>20}" for key in names))


def plot(path, predictions, labels, uncertainty):
    figure, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")
    for axis, (name, prediction) in zip(axes[0], predictions.items(), strict=True):
        members = prediction.draws if prediction.num_draws > 1 else prediction.probabilities
        bnn.reliability(members, labels).plot(
            axis
        )  # rows of one posterior err together: the band knows it by the draws
        axis.set_title(f"Calibration: {name}")
    for name, prediction in predictions.items():
        curve = bnn.accuracy_rejection(prediction.probabilities, labels)
        axes[1, 0].plot(curve.rejected, curve.accuracy, label=name)
    axes[1, 0].set(title="Accuracy where the least certain are refused", xlabel="part refused", ylabel="accuracy")
    axes[1, 0].legend()
    bins = np.linspace(0.0, np.log(10.0), 30)
    for name, values in uncertainty.items():
        axes[1, 1].hist(values, bins, histtype="step", density=True, label=name)
    axes[1, 1].set(title="Posterior: entropy of the prediction", xlabel="nats", ylabel="density")
    axes[1, 1].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where the files go")
    options = parser.parse_args()
    draws, steps = (40, 150) if options.quick else (400, 1500)
    torch.set_num_threads(1)  # the operations of nets this small are too short to share
    pyro.set_rng_seed(options.seed)
    x, x_test, y, y_test = data()
    model = digits_model()
    print(model)
    mode, mcmc = posterior_mode(model, x, y, steps), sample(model, x, y, draws)
    print(mcmc.temperature_report())
    print(bnn.summary(mcmc, x_test, num_samples=2000))

    predictions = {
        "mode": bnn.predict(mode, x_test, model=model),
        "posterior": bnn.predict(mcmc, x_test, num_samples=800, draws=True),
    }
    print_scores({"mode": bnn.score(mode, x_test, y_test, model=model), "posterior": bnn.score(mcmc, x_test, y_test)})
    uncertainty = {}
    print(f"\n{'images':<22}{'entropy':>10}{'of it epistemic':>18}{'(posterior)':>14}")
    for name, images in no_digits(x_test).items():
        found = bnn.predict(mcmc, images, num_samples=800)
        uncertainty[name] = found.entropy
        print(f"{name:<22}{found.entropy.mean():>10.2f}{found.mutual_information.mean():>18.2f}")

    options.folder.mkdir(parents=True, exist_ok=True)
    plot(options.folder / "digits.png", predictions, y_test, uncertainty)
    idata = bnn.to_arviz(mcmc, thin=8, function_space=True, posterior_predictive=True)
    idata.to_netcdf(options.folder / "digits.nc")
    bnn.report(idata, options.folder / "digits.html")
    print(f"\nwrote digits.png, digits.nc and digits.html to {options.folder.resolve()}")


if __name__ == "__main__":
    main()
