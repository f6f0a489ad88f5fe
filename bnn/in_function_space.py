"""Convergence of a net where it counts: R-hat and effective sample size of its predictions, not of its weights.

A net's weights are identified only up to permutations and signs of its hidden units: chains may sit in different copies
of one function and disagree in every weight. Predictions are the same in all copies (Izmailov et al. 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnn.arviz_data import assemble, mark_functions
from bnn.minibatch import arguments_of
from bnn.posterior_draws import PosteriorDraws, draws_of
from bnn.prediction import MEMORY, Prediction, predict

WHY = (
    "Predictions come first: a net's weights are identified only up to permutations and signs of its hidden units, so "
    "their R-hat says little about whether the chains agree on the function."
)

# Predictions of so many rows are looked at for the worst of them: a rank-normalised R-hat takes a millisecond.
ROWS_LOOKED_AT = 500

# A site of at most so many numbers, such as a noise scale, is shown by itself.
SMALL_SITE = 8


def function_space(
    posterior: Any,
    *args: Any,
    model: Callable[..., Any] | None = None,
    num_samples: int | None = None,
    memory: float = MEMORY,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Each draw's predictions at ``args`` as ArviZ's data, so that ``arviz.summary`` and its plots read them.

    The group ``posterior`` holds, for each observed site ``y``, ``y_mean`` of dimensions (chain, draw, row, ...), the
    mean of y under each draw; or ``y_probability`` with a last dimension of classes (for a Bernoulli site, of class 1
    and without that dimension).

    :param posterior: as for :func:`bnn.predict`; its chains are kept apart.
    :param args: arguments of the model: inputs. Without any, those of the run.
    :param model: the model, where ``posterior`` does not know it.
    :param num_samples: number of draws, evenly spaced in each chain.
    :param memory: bytes that may be held at once, besides the result.
    :param model_kwargs: keyword arguments of the model.
    :return: an ``InferenceData``, or an ``xarray.DataTree`` with ArviZ 1.x.
    :raises ValueError: as :func:`bnn.predict`, and for a law without a mean.

    >>> import pyro, torch, pyro.distributions as dist
    >>> import bnn
    >>> def model(x, y=None):
    ...     slope = pyro.sample("slope", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)
    >>> data = bnn.function_space({"slope": torch.randn(100)}, torch.tensor([0., 2.]), model=model)
    >>> data["posterior"]["y_mean"].shape
    (1, 100, 2)
    """
    known = draws_of(posterior, model=model, num_samples=num_samples, args=args, kwargs=model_kwargs)
    return assembled(function_draws(known, args, model_kwargs, memory))


def function_draws(
    known: PosteriorDraws, args: tuple[Any, ...], kwargs: Mapping[str, Any] | None, memory: float = MEMORY
) -> dict[str, tuple[str, str, np.ndarray]]:
    """Variable -> (site, kind, values ``(chain, draw, row, ...)``)."""
    found = predict(known, *args, draws=True, memory=memory, model_kwargs=kwargs)
    result = {}
    for prediction in [found] if isinstance(found, Prediction) else found.values():
        draws, kind = prediction.draws, "mean"
        if draws is None:
            raise ValueError(f"the law of site {prediction.name!r} has no mean in closed form to follow over draws.")
        if prediction.probabilities is not None:
            draws, kind = (draws[..., 1] if prediction.mean is not None else draws), "probability"
        shape = (known.chains, known.draws, *draws.shape[1:])
        result[f"{prediction.name}_{kind}"] = (prediction.name, kind, draws.reshape(shape).numpy())
    return result


def functions_of_run(
    run: Any, samples: Mapping[str, Any], batches: Iterable[Any] | None
) -> dict[str, tuple[str, str, np.ndarray]]:
    """:func:`function_draws` over all data of a run, for draws ``(chain, draw, ...)``; with a loader, in its order."""
    model, args = run.kernel.model, getattr(run, "_args", None) or ()
    values = {name: value.detach().flatten(0, 1) for name, value in samples.items()}
    chains = next(iter(samples.values())).shape[0]
    kwargs = dict(getattr(run, "_kwargs", None) or {})
    known = PosteriorDraws(model, values, chains, args, kwargs, has_data=batches is None)
    if batches is None:
        return function_draws(known, args, kwargs)
    parts = [function_draws(known, *arguments_of(item)) for item in batches]
    return {
        name: (site, kind, np.concatenate([part[name][2] for part in parts], axis=2))
        for name, (site, kind, _) in parts[0].items()
    }


def assembled(functions: Mapping[str, tuple[str, str, np.ndarray]]) -> Any:
    """What :func:`function_draws` gives as ArviZ's data."""
    data = assemble(
        {"posterior": {name: values for name, (_, _, values) in functions.items()}}, dims=dims_of(functions)
    )
    mark_functions(data, functions)
    return data


def dims_of(functions: Mapping[str, tuple[str, str, np.ndarray]]) -> dict[str, list[str]]:
    """Names of the variables' dimensions after chain and draw."""
    return {
        name: [f"{site}_{axis}" for axis in _axes(kind, values.ndim - 2)]
        for name, (site, kind, values) in functions.items()
    }


def _axes(kind: str, count: int) -> list[str]:
    names = ["row", *(f"dim_{i}" for i in range(1, count))]
    if kind == "probability" and count > 1:
        names[-1] = "class"
    return names[:count]


@dataclass(frozen=True)
class Summary:
    """A table of ArviZ's with what it shows, in words.

    :ivar table: a ``pandas.DataFrame`` as ``arviz.summary`` returns it.
    :ivar note: what stands in it, and why.
    """

    table: Any
    note: str

    def __str__(self) -> str:
        return f"{self.table.to_string()}\n{self.note}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{self.table._repr_html_()}<p>{self.note}</p>"


def summary(
    posterior: Any,
    *args: Any,
    rows: int = 5,
    weights: bool = False,
    model: Callable[..., Any] | None = None,
    num_samples: int | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Summary:
    """``arviz.summary`` of what is identified in a net: its worst predictions, and sites of a few numbers.

    :param posterior: as for :func:`bnn.predict`.
    :param args: arguments of the model: inputs. Without any, those of the run.
    :param rows: of how many rows the predictions are shown: those of the largest R-hat (with one chain, of the
        largest standard deviation) among 500 evenly spaced ones, and of each its worst output.
    :param weights: whether every number of every site is shown as well.
    :param model: the model, where ``posterior`` does not know it.
    :param num_samples: number of draws, evenly spaced in each chain.
    :param model_kwargs: keyword arguments of the model.
    :raises ValueError: as :func:`bnn.function_space`, or if ``rows`` is no positive whole number.

    >>> import pyro, torch, pyro.distributions as dist
    >>> import bnn
    >>> def model(x, y=None):
    ...     slope = pyro.sample("slope", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)
    >>> draws = {"slope": torch.linspace(-1., 1., 100)}
    >>> list(bnn.summary(draws, torch.tensor([0., 2.]), rows=1, model=model).table.index)
    ['y_mean[1]', 'slope']
    """
    import arviz
    import pandas

    if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
        raise ValueError(f"rows is {rows!r}; give the number of rows to show, at least 1.")
    known = draws_of(posterior, model=model, num_samples=num_samples, args=args, kwargs=model_kwargs)
    functions = function_draws(known, args, model_kwargs)
    shown = {
        name: v.cpu().numpy().reshape(known.chains, known.draws, *v.shape[1:])
        for name, v in known.values.items()
        if weights or v[0].numel() <= SMALL_SITE
    }
    kind: Any = "all" if known.chains > 1 else "stats"
    tables = []
    predicted = assembled(functions)["posterior"]
    looked_at = 0
    for name in functions:
        array = predicted[name]
        row = array.dims[2] if array.ndim > 2 else None
        if row is not None:
            spaced = np.unique(np.linspace(0, array.sizes[row] - 1, ROWS_LOOKED_AT).round().astype(int))
            array, looked_at = array.isel({row: spaced}), max(looked_at, len(spaced))
            badness = _badness(arviz, array, known.chains)
            worst = np.sort(np.argsort(-badness.reshape(len(spaced), -1).max(1))[:rows])
            array, badness = array.isel({row: worst}), badness[worst]
        table = arviz.summary(array.to_dataset(name=name), kind=kind)
        if array.ndim > 3:  # of a row with several outputs, the worst
            table = table.iloc[[i * badness[0].size + int(np.argmax(b)) for i, b in enumerate(badness)]]
        tables.append(table)
    if shown:
        tables.append(arviz.summary(assemble({"posterior": shown}), kind=kind))
    which = "largest R-hat" if known.chains > 1 else "largest standard deviation"
    note = f"{WHY} Shown are the {rows} of {looked_at} rows with the {which}"
    note += "" if weights or len(shown) == len(known.values) else "; weights=True shows every weight as well"
    return Summary(pandas.concat(tables), note + ".")


def _badness(arviz: Any, array: Any, chains: int) -> np.ndarray:
    """R-hat of each entry, or its standard deviation."""
    if chains < 2:
        return np.asarray(array.std(("chain", "draw")))
    rhat = arviz.rhat(array.to_dataset(name="value"))["value"]
    return np.nan_to_num(np.asarray(rhat), nan=np.inf)
