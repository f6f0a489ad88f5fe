"""Conversion of a run to ArviZ: an ``InferenceData`` with ArviZ 0.x, an ``xarray.DataTree`` with ArviZ 1.x.

This file needs neither torch nor Pyro: what runs the model again stands in :mod:`bnn.pointwise` and is imported only
when a group needs it.
"""

from __future__ import annotations

import importlib.metadata
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Variables = Mapping[str, Any]

WITH_DRAWS = ("posterior", "sample_stats", "log_likelihood", "posterior_predictive", "predictions")


def to_arviz(
    posterior: Any,
    *,
    log_likelihood: bool | Variables | None = None,
    posterior_predictive: bool | Variables | None = False,
    observed_data: bool | Variables | None = None,
    constant_data: bool | Variables | None = None,
    predictions: Variables | None = None,
    predictions_constant_data: Variables | None = None,
    prior: Variables | None = None,
    function_space: bool = False,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    pred_dims: Mapping[str, Sequence[str]] | None = None,
    batches: Iterable[Any] | None = None,
    thin: int = 1,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    num_samples: int = 1000,
) -> Any:
    """A finished run, or a guide, as ArviZ's data: draws, statistics per draw, data, log-likelihood, predictions.

    Works for ``bnn.kernels.MCMC`` and for ``pyro.infer.MCMC``, with the kernels here and with Pyro's own, and for the
    guides of ``bnn.guides`` and ``pyro.infer.autoguide``: one chain of ``num_samples`` independent draws. The model
    runs once more over *all* its data, also where it draws minibatches or gets them from a loader, so that data and
    pointwise log-likelihood are complete and their rows correspond (with a loader, in the order of one pass). The
    log-likelihood carries no scale of a minibatch or of ``poutine.scale``, and is zero where the model masks a row. At
    a temperature other than 1 the draws are not from the posterior, and ``arviz.loo`` does not estimate how well it
    predicts.

    ``sample_stats`` holds what the runner measured at each draw; ``energy`` and ``lp = -energy`` are minibatch
    estimates if the model draws minibatches.

    Each of the four groups that the model can give is made or not by ``True`` or ``False``; is made if it can be and
    holds at most 20 million numbers by ``None``, else left out with a warning; or is given as a dict of variables.
    Variables that follow the draws lead with (chain, draw), or with chain times draw as Pyro's ``Predictive`` returns
    them.

    :param posterior: a finished run, a guide, or the path of a store that a run writes: its draws and statistics are
        then read when they are looked at, those that are committed so far; only ``thin`` goes with a path.
    :param log_likelihood: the log density of each observation under each draw.
    :param posterior_predictive: a draw of each observed site for each draw of the posterior. Not made by default.
    :param observed_data: the values of the observed sites.
    :param constant_data: the tensors among the model's arguments that are not observed.
    :param predictions: predictions on other data.
    :param predictions_constant_data: these other data.
    :param prior: draws from the prior, as ``Predictive(model, num_samples=...)`` returns them; observed sites among
        them become the group ``prior_predictive``.
    :param function_space: whether the posterior also holds each draw's mean of every observed site ``y`` over the data
        as ``y_mean``, or its class probabilities as ``y_probability`` (see :func:`bnn.function_space`).
    :param coords: values of named dimensions.
    :param dims: names of each variable's dimensions after chain and draw; ``obs_dim_0``, ... by default.
    :param pred_dims: the same for ``predictions`` and ``predictions_constant_data``.
    :param batches: data to run over in place of those of the run.
    :param thin: keep every ``thin``-th draw.
    :param model_args: the data, for a guide: what ``SVI.step`` was called with.
    :param model_kwargs: keyword arguments of the model, for a guide.
    :param num_samples: number of draws from a guide.
    :raises RuntimeError: before the run.
    :raises ValueError: if ``posterior`` is not a run, ``thin`` is no positive whole number, a given variable does not
        fit the draws, or a group that was asked for cannot be made.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import to_arviz
    >>> from bnn.kernels import MCMC, SGLD
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y)
    >>> mcmc = MCMC(SGLD(model, step_size=0.1), num_samples=50, num_chains=4, disable_progbar=True)
    >>> mcmc.run(torch.tensor([1., 3.]))
    >>> data = to_arviz(mcmc, dims={"obs": ["row"]})
    >>> dict(data.log_likelihood.sizes)
    {'chain': 4, 'draw': 50, 'row': 2}
    """
    if isinstance(posterior, (str, os.PathLike)):
        from bnn.stored_draws import as_arviz

        asked = [log_likelihood, observed_data, constant_data, predictions, predictions_constant_data, prior, batches]
        made = [posterior_predictive, function_space, model_args, model_kwargs, coords, dims, pred_dims]
        if any(one not in (None, False) for one in asked) or any(made):
            raise ValueError(
                "a store holds draws and their statistics, and knows neither model nor data: give thin= alone. "
                "Predictions of its draws are in bnn.predict(path, x, model=model)."
            )
        return as_arviz(posterior, checked_thin(thin))
    if not hasattr(posterior, "get_samples") and hasattr(posterior, "model"):
        from bnn.guide_draws import GuideRun

        posterior = GuideRun(posterior, model_args, model_kwargs or {}, num_samples)
    elif model_args or model_kwargs:
        raise ValueError("model_args and model_kwargs are for guides: a run knows the arguments of its model.")
    samples, stats = _draws_and_stats(posterior)
    checked_thin(thin)
    chains, draws = next(iter(samples.values())).shape[:2]
    given = {
        "log_likelihood": log_likelihood,
        "posterior_predictive": posterior_predictive,
        "observed_data": observed_data,
        "constant_data": constant_data,
    }
    groups: dict[str, dict[str, np.ndarray]] = {
        "posterior": {name: _numpy(value[:, ::thin]) for name, value in samples.items()},
        "sample_stats": {name: _numpy(value)[:, ::thin] for name, value in stats.items()},
    }
    thinned = {name: value[:, ::thin] for name, value in samples.items()}
    groups.update(_from_model(posterior, thinned, given, batches))
    functions: dict[str, Any] = {}
    if function_space:
        from bnn.in_function_space import dims_of, functions_of_run

        loader = getattr(getattr(posterior, "kernel", None), "batches", None) if batches is None else batches
        functions = functions_of_run(posterior, thinned, loader)
        groups["posterior"].update({name: values for name, (_, _, values) in functions.items()})
        dims = {**dims_of(functions), **(dims or {})}
    for group, variables in {**given, "predictions": predictions}.items():
        if isinstance(variables, Mapping):
            shape = (chains, draws) if group in WITH_DRAWS else None
            groups[group] = {name: _fit(group, name, value, shape, thin) for name, value in variables.items()}
    if predictions_constant_data is not None:
        groups["predictions_constant_data"] = {n: _numpy(value) for n, value in predictions_constant_data.items()}
    if prior is not None:
        observed = set(groups.get("observed_data", {})) | set(groups.get("log_likelihood", {}))
        for name, value in prior.items():
            group = "prior_predictive" if name in observed else "prior"
            groups.setdefault(group, {})[name] = _numpy(value)[None]
    attrs = {"posterior": attributes_of(posterior, thin)}
    facts = getattr(posterior, "run_facts", None)
    if facts:
        attrs["sample_stats"] = dict(facts)
        dims, coords = _with_sites(stats, facts["site_name"], dims, coords)
    data = assemble(groups, coords=coords, dims=dims, pred_dims=pred_dims, attrs=attrs)
    mark_functions(data, functions)
    return data


def checked_thin(thin: Any) -> int:
    """:raises ValueError: unless ``thin`` is a positive whole number."""
    if not isinstance(thin, int) or isinstance(thin, bool) or thin < 1:
        raise ValueError(f"thin is {thin!r}; give a whole number of at least 1: every thin-th draw is kept.")
    return thin


def assemble(
    groups: Mapping[str, Mapping[str, np.ndarray]],
    *,
    coords: Mapping[str, Sequence[Any]] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    pred_dims: Mapping[str, Sequence[str]] | None = None,
    attrs: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """Groups of arrays as the installed ArviZ holds them; empty groups are left out.

    :param groups: group -> variable -> array; arrays lead with (chain, draw) except in groups of data.
    :param coords: values of named dimensions.
    :param dims: names of each variable's dimensions after chain and draw.
    :param pred_dims: the same for the groups of predictions.
    :param attrs: group -> its attributes.
    """
    import arviz

    filled = {group: dict(variables) for group, variables in groups.items() if variables}
    attrs = {group: dict(values) for group, values in (attrs or {}).items() if group in filled}
    from_dict: Any = arviz.from_dict
    names, named, pred_named = _lists(coords), _lists(dims), _lists(pred_dims)
    if int(arviz.__version__.split(".")[0]) >= 1:
        return from_dict(
            filled,
            coords=names,
            dims=named,
            pred_coords=names,
            pred_dims=pred_named,
            attrs=attrs,
            check_conventions=False,
        )
    predictions = {group: filled.pop(group) for group in list(filled) if group.startswith("predictions")}
    group_attrs = {f"{group}_attrs": values for group, values in attrs.items()}
    with warnings.catch_warnings():
        # ArviZ guesses from the sizes whether chains and draws were mixed up; here they are known.
        warnings.filterwarnings("ignore", message="More chains", category=UserWarning)
        result = from_dict(**filled, coords=names, dims=named, **group_attrs)
        if predictions:  # ArviZ 0.x would give predictions_constant_data the dimensions of constant_data
            result.extend(from_dict(**predictions, coords=names, dims=pred_named))
    return result


def mark_functions(data: Any, functions: Mapping[str, tuple[str, str, Any]]) -> None:
    """Note in the attributes of variables of the posterior that they are functions of draws, not latent sites.

    :param functions: variable -> (site, ``"mean"`` or ``"probability"``, values).
    """
    for name, (site, kind, _) in functions.items():
        data["posterior"][name].attrs.update(function_of=site, kind=kind)


def _with_sites(
    stats: Mapping[str, Any],
    sites: Sequence[str],
    dims: Mapping[str, Sequence[str]] | None,
    coords: Mapping[str, Sequence[Any]] | None,
) -> tuple[dict[str, Sequence[str]], dict[str, Sequence[Any]]]:
    """Dimensions and coordinates, with those of statistics per site; named otherwise if ``site`` is taken."""
    dims, coords = dict(dims or {}), dict(coords or {})
    taken = {*coords, *(name for names in dims.values() for name in names)}
    label = "latent_site" if "site" in taken else "site"
    own = [name for name, value in stats.items() if value.ndim == 3 and name not in dims]
    return {**dims, **{name: [label] for name in own}}, {**coords, label: list(sites)} if own else coords


def _draws_and_stats(posterior: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draws and statistics of a run, ``(chains, draws, ...)``."""
    if not hasattr(posterior, "get_samples"):
        raise ValueError(
            f"posterior is {type(posterior).__name__}; give a finished run, bnn.kernels.MCMC or pyro.infer.MCMC, "
            "or an automatic guide with its model."
        )
    if getattr(posterior, "_samples", True) is None:
        raise RuntimeError("there are no draws yet: call run(...) first.")
    samples = dict(posterior.get_samples(group_by_chain=True))
    if not samples:
        raise ValueError("the run kept no sites (save_params=[]): there is nothing to convert.")
    stats = dict(getattr(posterior, "sample_stats", None) or {})
    if "energy" in stats:
        stats = {"lp": -stats["energy"], **stats}
    entries = list(getattr(posterior, "_diagnostics", None) or [])
    if "diverging" not in stats and entries and all("divergences" in (entry or {}) for entry in entries):
        diverging = np.zeros(next(iter(samples.values())).shape[:2], dtype=bool)
        for chain, entry in enumerate(entries[: len(diverging)]):
            diverging[chain, [i for i in entry["divergences"] if 0 <= i < diverging.shape[1]]] = True
        stats["diverging"] = diverging
    return samples, stats


def _from_model(
    posterior: Any, samples: Mapping[str, Any], given: Mapping[str, Any], batches: Iterable[Any] | None
) -> dict[str, dict[str, np.ndarray]]:
    """The groups that need another run of the model."""
    kernel = getattr(posterior, "kernel", None)
    model = getattr(kernel, "model", None)
    wanted = {group: False if isinstance(want, Mapping) else want for group, want in given.items()}
    asked = [group for group, want in wanted.items() if want]
    if model is None and asked:
        raise ValueError(f"{asked[0]} was asked for, but the kernel has no model; give a dict of variables instead.")
    if model is None or all(want is False for want in wanted.values()):
        return {}
    from bnn.pointwise import evaluate

    batches = getattr(kernel, "batches", None) if batches is None else batches
    args, kwargs = getattr(posterior, "_args", None) or (), getattr(posterior, "_kwargs", None) or {}
    draws = {name: value.detach().flatten(0, 1) for name, value in samples.items()}
    try:
        found = evaluate(model, args, kwargs, draws, wanted, batches=batches)
    except Exception as error:
        if asked:
            raise
        names = ", ".join(group for group, want in wanted.items() if want is not False)
        _warn(f"{names} left out, since the model could not be run again: {type(error).__name__}: {error}")
        return {}
    for group, why in found.left_out.items():
        remedy = "" if "lack" in why else f" Have it made by {group}=True, of fewer draws by thin=."
        _warn(f"{group} is left out: {why}.{remedy}")
    first = next(iter(samples.values()))
    result: dict[str, dict[str, np.ndarray]] = {}
    for group, variables in found.values.items():
        arrays = {name: _numpy(value) for name, value in variables.items()}
        if group in WITH_DRAWS:
            arrays = {name: value.reshape(*first.shape[:2], *value.shape[1:]) for name, value in arrays.items()}
        result[group] = arrays
    return result


def _fit(group: str, name: str, value: Any, shape: tuple[int, int] | None, thin: int) -> np.ndarray:
    """A given variable with its dimensions (chain, draw) apart, thinned as the posterior is."""
    array = _numpy(value)
    if shape is None:
        return array
    kept = (shape[0], math.ceil(shape[1] / thin))
    for chains, draws in (shape, kept):
        if array.shape[:2] != (chains, draws) and array.shape[:1] == (chains * draws,):
            array = array.reshape(chains, draws, *array.shape[1:])
    if array.shape[:2] == shape:
        return array[:, ::thin]
    if array.shape[:2] != kept:
        raise ValueError(
            f"variable {name!r} of {group} has shape {array.shape}; it must begin with (chain, draw) = {shape} "
            f"or with chain times draw = {shape[0] * shape[1]}."
        )
    return array


def attributes_of(posterior: Any, thin: int) -> dict[str, Any]:
    """What the run was: numbers and strings only, so that they can be written to a file."""
    kernel: Any = getattr(posterior, "kernel", None)
    guide = getattr(kernel, "guide", None)
    ours = type(guide or kernel).__module__.split(".")[0] == "bnn"
    attrs: dict[str, Any] = {"inference_library": "pyro-bnn" if ours else "pyro"}
    try:
        attrs["inference_library_version"] = importlib.metadata.version("pyro-bnn" if ours else "pyro-ppl")
    except importlib.metadata.PackageNotFoundError:
        pass
    attrs["guide" if guide is not None else "kernel"] = type(kernel if guide is None else guide).__name__
    if hasattr(kernel, "temperature"):
        number = isinstance(kernel.temperature, (int, float))
        attrs["temperature"] = float(kernel.temperature) if number else str(kernel.temperature)
    if getattr(kernel, "precision", "full") != "full":
        attrs["precision"] = kernel.precision
    if getattr(kernel, "warmup_report", None):
        attrs["warmup_chose"] = kernel.warmup_report
    if getattr(kernel, "caveat", ""):
        attrs["caveat"] = kernel.caveat
    if isinstance(getattr(posterior, "warmup_steps", None), int):
        attrs["tuning_steps"] = posterior.warmup_steps
    if thin > 1:
        attrs["thin"] = thin
    return attrs


def _numpy(value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if str(value.dtype) == "torch.bfloat16" else value
    return np.asarray(value)


def _lists(named: Mapping[str, Sequence[Any]] | None) -> dict[str, Any]:
    return {name: list(values) for name, values in (named or {}).items()}


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
