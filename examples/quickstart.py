"""Bayesian nets in Pyro: a regression and a classification, sampled by SGHMC on minibatches, read in ArviZ.

Samples the weights of a one-hidden-layer net on scikit-learn's diabetes data and on its digits, eight chains at once,
and compares the posterior predictive with a net trained to the posterior's mode. Prints test scores, convergence of
the predictions and the temperature that the chains really had; writes quickstart.nc (open it with arviz.from_netcdf),
quickstart.png and quickstart.html, a report on the regression. Runs in under a minute on two cores.
"""

import argparse
import time
from pathlib import Path

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from pyro.optim import Adam
from sklearn.datasets import load_diabetes, load_digits
from sklearn.model_selection import train_test_split

import bnn
from bnn.kernels import MCMC, SGHMC

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

CHAINS = 8
HIDDEN = 50


# ---- two Pyro models


def sample_weights(inputs, outputs, output_scale):
    """Weights of a net with one hidden layer, whose outputs have about ``output_scale`` as their prior scale."""

    def normal(name, scale, *shape):
        return pyro.sample(name, dist.Normal(0.0, scale).expand(shape).to_event(len(shape)))

    return {
        "weight_1": normal("weight_1", inputs**-0.5, inputs, HIDDEN),
        "bias_1": normal("bias_1", 1.0, HIDDEN),
        "weight_2": normal("weight_2", output_scale * HIDDEN**-0.5, HIDDEN, outputs),
        "bias_2": normal("bias_2", 1.0, outputs),
    }


def net(weights, x):
    hidden = torch.tanh(x @ weights["weight_1"] + weights["bias_1"])
    return hidden @ weights["weight_2"] + weights["bias_2"]


def regression(x, y=None):
    """Disease progression with noise of unknown precision."""
    weights = sample_weights(x.shape[-1], 1, output_scale=1.0)
    precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=min(100, len(x))) as rows:
        mean = net(weights, x[rows]).squeeze(-1)
        pyro.sample("y", dist.Normal(mean, precision.rsqrt()), obs=None if y is None else y[rows])


def classification(x, y=None):
    """Which digit an 8 x 8 image shows."""
    weights = sample_weights(x.shape[-1], 10, output_scale=5.0)
    with pyro.plate("data", len(x), subsample_size=min(100, len(x))) as rows:
        pyro.sample("y", dist.Categorical(logits=net(weights, x[rows])), obs=None if y is None else y[rows])


# ---- data


def split(loader, axis):
    """Training and test data, inputs standardised on the training part: by column, or as a whole (``axis=None``)."""
    x_train, x_test, y_train, y_test = train_test_split(*loader(return_X_y=True), test_size=0.2, random_state=0)
    mean, scale = x_train.mean(axis), x_train.std(axis)
    x_train, x_test = (torch.tensor((x - mean) / scale, dtype=torch.float) for x in (x_train, x_test))
    return x_train, torch.tensor(y_train), x_test, torch.tensor(y_test)


# ---- inference


def posterior_mode(model, x, y, steps):
    """Weights at the mode (MAP), by Pyro's own SVI: the ordinary net that the posterior is compared with.

    For prediction it is an ensemble of one.
    """
    pyro.clear_param_store()
    guide = AutoDelta(model)
    svi = SVI(model, guide, Adam({"lr": 0.01}), Trace_ELBO())
    for _ in range(steps):
        svi.step(x, y)
    return [{name: value.detach() for name, value in guide.median().items()}]


def posterior(model, kernel, x, y, draws):
    """Eight chains of the kernel at once; half as many draws again are warm-up."""
    start = time.perf_counter()
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws // 2, num_chains=CHAINS)
    mcmc.run(x, y)
    print(f"{CHAINS} chains of {draws} draws: {time.perf_counter() - start:.1f} s")
    return mcmc


def describe_convergence(mcmc, x_test):
    """Print R-hat and effective sample size of the predictions, and the temperatures."""
    predictions = bnn.function_space(mcmc, x_test)
    rhat, ess = (np.concatenate([np.ravel(v) for v in f(predictions).data_vars.values()]) for f in (az.rhat, az.ess))
    print(f"  predictions: R-hat median {np.median(rhat):.3f}, worst {rhat.max():.3f}; ", end="")
    print(f"ESS median {np.median(ess):.0f}, lowest {ess.min():.0f}")
    print("  " + mcmc.temperature_report())
    return predictions["posterior"]


# ---- pictures


def plot(path, regression_result, classification_result):
    """Predictions with uncertainty, traces and energies."""
    figure, axes = plt.subplots(2, 3, figsize=(15, 8.5), layout="constrained")
    mean, spread, noise, truth, traces, energy, asked, shift = regression_result
    axis = axes[0, 0]
    order = np.argsort(mean)
    place = np.arange(len(mean))
    mean, truth, total = mean + shift, truth + shift, np.sqrt(spread**2 + noise**2)
    axis.fill_between(place, (mean - 2 * total)[order], (mean + 2 * total)[order], alpha=0.2, label="± 2 sd with noise")
    axis.fill_between(
        place, (mean - 2 * spread)[order], (mean + 2 * spread)[order], alpha=0.5, label="± 2 sd of the net"
    )
    axis.plot(place, mean[order], label="posterior mean")
    axis.plot(place, truth[order], "k.", markersize=4, label="observed")
    axis.set(title="Diabetes: test predictions", xlabel="patient, by prediction", ylabel="disease progression")
    axis.legend()
    _traces(axes[0, 1], traces + shift, "Diabetes: prediction for the first test patient", "disease progression")
    _energies(axes[0, 2], energy, f"Diabetes: energy of a minibatch (T = {asked:g})")

    images, probabilities, labels, traces, energy, asked = classification_result
    entropy = -(probabilities * np.log(probabilities + 1e-12)).sum(-1)
    unsure = np.argsort(-entropy)[:8]
    axis = axes[1, 0]
    axis.set_axis_off()
    axis.set_title("Digits: the eight least certain test images")
    for number, index in enumerate(unsure):
        inset = axis.inset_axes([0.25 * (number % 4), 0.52 - 0.52 * (number // 4), 0.23, 0.38])
        inset.imshow(images[index].reshape(8, 8), cmap="gray_r")
        inset.set_xticks([])
        inset.set_yticks([])
        first, second = np.argsort(-probabilities[index])[:2]
        shown = f"{first}: {probabilities[index, first]:.2f}, {second}: {probabilities[index, second]:.2f}"
        inset.set_title(f"{shown}\nis {labels[index]}", fontsize=9)
    _traces(axes[1, 1], traces, "Digits: probability of the true class, least certain image", "probability")
    _energies(axes[1, 2], energy, f"Digits: energy of a minibatch (T = {asked:g})")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _traces(axis, values, title, label):
    for chain in values:
        axis.plot(chain, linewidth=0.6)
    axis.set(title=title, xlabel="draw", ylabel=label)


def _energies(axis, values, title):
    for chain in values:
        axis.hist(chain, bins=30, histtype="step", density=True)
    axis.set(title=title, xlabel="energy", ylabel="density")


# ---- the two runs


def run_regression(options):
    """Sample, compare and summarise the regression."""
    print("\nDiabetes: regression, one hidden layer of 50 units")
    x, y, x_test, y_test = split(load_diabetes, axis=0)
    shift, width = y.mean().item(), y.std().item()
    y, y_test = ((part - shift).float() / width for part in (y, y_test))
    mode = posterior_mode(regression, x, y, options.map_steps)
    kernel = SGHMC(regression, step_size=0.005, friction=20.0, steps_per_sample=20)
    mcmc = posterior(regression, kernel, x, y, options.draws)
    for name, fitted in (("MAP net:  ", mode), ("posterior:", mcmc)):
        scores = bnn.score(fitted, x_test, y_test, model=regression)
        log_likelihood = -scores["nll"].value - np.log(width)
        print(f"  {name} test RMSE {width * scores['rmse'].value:.2f}, log-likelihood {log_likelihood:.3f}")
    draws = describe_convergence(mcmc, x_test)["y_mean"].values
    found, stats = bnn.predict(mcmc, x_test), mcmc.sample_stats
    picture = (
        *(width * part.numpy() for part in (found.mean, found.epistemic, found.aleatoric, y_test)),
        draws[..., 0] * width, stats["energy"].numpy(), stats["temperature"].mean().item(), shift,
    )  # fmt: skip
    return bnn.to_arviz(mcmc, function_space=True, posterior_predictive=True), picture


def run_classification(options):
    """Sample, compare and summarise the classification."""
    print("\nDigits: classification, one hidden layer of 50 units")
    x, y, x_test, y_test = split(load_digits, axis=None)
    mode = posterior_mode(classification, x, y, options.map_steps)
    kernel = SGHMC(classification, step_size=0.007, friction=40.0, steps_per_sample=20)
    mcmc = posterior(classification, kernel, x, y, options.draws)
    for name, fitted in (("MAP net:  ", mode), ("posterior:", mcmc)):
        scores = bnn.score(fitted, x_test, y_test, model=classification)
        print(f"  {name} test accuracy {scores['accuracy'].value:.4f}, log-likelihood {-scores['nll'].value:.4f}")
    draws = describe_convergence(mcmc, x_test)["y_probability"].values
    found, stats = bnn.predict(mcmc, x_test), mcmc.sample_stats
    unsure = found.entropy.argmax()
    return (
        x_test.numpy(), found.probabilities.numpy(), y_test.numpy(), draws[:, :, unsure, y_test[unsure]],
        stats["energy"].numpy(), stats["temperature"].mean().item(),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of all random numbers (default 0)")
    parser.add_argument("--quick", action="store_true", help="a tenth of the draws: to see that it runs")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where quickstart.nc and quickstart.png go")
    options = parser.parse_args()
    options.draws, options.map_steps = (40, 100) if options.quick else (400, 1000)
    torch.set_num_threads(1)  # the operations of nets this small are too short to share
    pyro.set_rng_seed(options.seed)
    idata, regression_picture = run_regression(options)
    classification_picture = run_classification(options)
    options.folder.mkdir(parents=True, exist_ok=True)
    idata.to_netcdf(options.folder / "quickstart.nc")
    bnn.report(idata, options.folder / "quickstart.html", title="Diabetes: one hidden layer of 50 units")
    plot(options.folder / "quickstart.png", regression_picture, classification_picture)
    print(
        f"\nwrote quickstart.nc and quickstart.html (the regression) and quickstart.png to {options.folder.resolve()}"
    )


if __name__ == "__main__":
    main()
