"""Runs as ArviZ keeps them, made of random numbers: what a report has to tell apart."""

from typing import Any

import numpy as np

from bnn.arviz_data import assemble

CHAINS, DRAWS, ROWS = 4, 500, 40
GROUPS = ("sample_stats", "log_likelihood", "posterior_predictive", "observed_data", "predictions")


def regression_run(
    *,
    shift: float = 0.0,
    slow: float = 0.0,
    temperature: float = 1.0,
    kinetic: float = 1.0,
    noise: float = 1.0,
    drop: tuple[str, ...] = (),
    function: bool = True,
    stats: dict[str, Any] | None = None,
    attrs: dict[str, Any] | None = None,
    draws: int = DRAWS,
    chains: int = CHAINS,
    seed: int = 0,
) -> Any:
    """Independent draws of a linear model's weights and its predictions, of 40 rows, 25 of them held out.

    :param shift: what each chain's weights are away from those of the one before.
    :param slow: autocorrelation of the draws.
    :param temperature: asked for.
    :param kinetic: of the momenta, by that asked for.
    :param noise: of the predictions, by the data's.
    :param drop: groups to leave out.
    :param function: whether the posterior holds predictions.
    :param stats: statistics to add, or None to take one away.
    :param attrs: of the posterior.
    """
    random = np.random.default_rng(seed)
    shape = (chains, draws)
    w = random.normal(size=(*shape, 3))
    for draw in range(1, draws if slow else 0):
        w[:, draw] = slow * w[:, draw - 1] + np.sqrt(1 - slow**2) * w[:, draw]
    w = 0.1 * w + shift * np.arange(chains)[:, None, None]
    x, x_new = random.normal(size=(ROWS, 3)), random.normal(size=(25, 3))
    mean, new_mean = w @ x.T, w @ x_new.T
    y, y_new = random.normal(size=ROWS), random.normal(size=25)
    sigma = 1.0 + 0.05 * random.normal(size=shape)
    dim, sizes = 4, np.array([3, 1])
    found = {
        "energy": random.normal(size=shape),
        "temperature": np.full(shape, temperature),
        "kinetic_temperature": kinetic * temperature * random.chisquare(dim, shape) / dim,
        "configurational_temperature": temperature * random.chisquare(dim, shape) / dim,
        "diverging": np.zeros(shape, dtype=bool),
        **(stats or {}),
    }
    groups = {
        "posterior": {"w": w, "sigma": sigma, **({"y_mean": new_mean} if function else {})},
        "sample_stats": {name: value for name, value in found.items() if value is not None},
        "log_likelihood": {"y": -0.5 * (y - mean) ** 2 - 0.919},
        "posterior_predictive": {"y": mean + noise * random.normal(size=mean.shape)},
        "observed_data": {"y": y},
        "predictions": {"y": new_mean + noise * random.normal(size=new_mean.shape)},
        "predictions_constant_data": {"y": y_new},
    }
    known = {"inference_library": "pyro-bnn", "kernel": "GGMC", "temperature": temperature, "tuning_steps": 100}
    facts = {
        "site_name": ["w", "sigma"], "site_size": sizes, "site_loc": np.array([0.0, np.nan]),
        "site_scale": np.array([0.1, np.nan]), "setup_time": 1.0, "warmup_time": 2.0, "sampling_time": 61.0,
        "gradient_evaluations": 1000,
    }  # fmt: skip
    if "predictions" in drop:
        drop = (*drop, "predictions_constant_data")
    kept = {group: variables for group, variables in groups.items() if group not in drop}
    posterior_attrs = {name: value for name, value in {**known, **(attrs or {})}.items() if value is not None}
    data = assemble(kept, attrs={"posterior": posterior_attrs, "sample_stats": facts})
    if function:
        data["posterior"]["y_mean"].attrs.update(function_of="y", kind="mean")
    return data


def classification_run(*, sharp: float = 1.0, function: bool = True, shuffled: bool = False, seed: int = 0) -> Any:
    """Draws of class probabilities of 150 held-out rows, with labels that are drawn from their mean.

    :param sharp: power that probabilities are raised to after the labels were drawn.
    :param function: whether the posterior holds probabilities.
    :param shuffled: whether these are of other rows.
    """
    random = np.random.default_rng(seed)
    logits = 1.5 * random.normal(size=(150, 3)) + 0.3 * random.normal(size=(CHAINS, 200, 150, 3))

    def probabilities(scale: float) -> np.ndarray:
        weights = np.exp(scale * logits)
        return weights / weights.sum(-1, keepdims=True)

    def labels(p: np.ndarray) -> np.ndarray:
        return (p.cumsum(-1) < random.random((*p.shape[:-1], 1))).sum(-1)

    truth, p = labels(probabilities(1.0).mean((0, 1))), probabilities(sharp)
    posterior = {"bias": random.normal(size=(CHAINS, 200))}
    if function:
        posterior["y_probability"] = p[:, :, ::-1] if shuffled else p
    groups = {
        "posterior": posterior,
        "predictions": {"y": labels(p)},
        "predictions_constant_data": {"y": truth},
    }
    data = assemble(groups, attrs={"posterior": {"inference_library": "pyro-bnn", "kernel": "GGMC"}})
    if function:
        data["posterior"]["y_probability"].attrs.update(function_of="y", kind="probability")
    return data
