"""Checks of what a user hands to the potential: each says what was given, what is wanted and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from bnn.minibatch import Arguments, arguments_of
from bnn.structure import Plate, describe_arguments


def is_model(model: Any) -> None:
    """:raises ValueError: unless ``model`` can be called."""
    if not callable(model):
        raise ValueError(f"model is {type(model).__name__}; give a Pyro model: a function or PyroModule to call.")


def first_of(batches: Iterable[Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The first item of ``batches``.

    :raises ValueError: if there are model arguments besides, or nothing to iterate over.
    """
    if args or kwargs:
        raise ValueError(
            f"both batches= and model arguments ({describe_arguments(args, dict(kwargs))}) were given: "
            "pass the data one way, all of it through batches= or all of it to run(...)."
        )
    walk = iter(batches)
    if walk is batches:
        raise ValueError(
            "batches= must be iterable again and again, like a list or a torch DataLoader; "
            f"{type(batches).__name__} is used up after one pass. Wrap it in list(...) if it fits in memory."
        )
    try:
        return arguments_of(next(walk))
    except StopIteration:
        raise ValueError("batches= is empty: it must yield at least one tuple of model arguments.") from None


def finite_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """:raises ValueError: if a tensor among the model's arguments holds NaN or infinity."""
    named = [(f"argument {i}", a) for i, a in enumerate(args)] + [(f"argument {k!r}", v) for k, v in kwargs.items()]
    for name, value in named:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and not torch.isfinite(leaf).all():
                bad = int((~torch.isfinite(leaf)).sum())
                raise ValueError(
                    f"{name} of the model holds {bad} values that are NaN or infinite (tensor of shape "
                    f"{tuple(leaf.shape)}): remove these rows, or fill them with finite numbers and exclude them with "
                    "pyro.poutine.mask."
                )


def plates_match_batches(
    plates: Mapping[str, Plate],
    batches: Iterable[Any],
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> None:
    """:raises ValueError: if the model does not scale a batch up to the data, or to another number of rows."""
    count = len(batches) if isinstance(batches, Sized) else None
    if not plates:
        trace = poutine.trace(poutine.block(model, hide=[])).get_trace(*args, **kwargs)
        scaled = any(
            s["type"] == "sample" and s["is_observed"] and _is_scaled(s["scale"]) for s in trace.nodes.values()
        )
        if count != 1 and not scaled:
            raise ValueError(
                "batches= yields several batches, but the model counts each as if it were all data. Write "
                "pyro.plate('data', N, subsample_size=len(x)) with N the number of rows in all batches."
            )
        return
    if len(plates) > 1:
        return
    (plate,) = plates.values()
    rows = rows_in(batches)
    if rows is not None and rows != plate.size:
        raise ValueError(
            f"batches= holds {rows} rows in all, but plate {plate.name!r} says that there are {plate.size}: "
            f"write pyro.plate({plate.name!r}, {rows}, subsample_size=len(x))."
        )


def rows_in(batches: Iterable[Any]) -> int | None:
    """Number of rows of all data behind ``batches``; None if that cannot be told without a pass."""
    if isinstance(batches, Sequence):
        return sum(leading_size(*arguments_of(item)) for item in batches)
    if isinstance(batches, DataLoader) and batches.batch_size is not None and isinstance(batches.sampler, Sized):
        return len(batches.sampler)
    return None


def batches_have_one_plate(plates: Mapping[str, Plate], batches: Iterable[Any] | None) -> None:
    """:raises NotImplementedError: if it is not known what share of the data one of several batches holds."""
    count = len(batches) if isinstance(batches, Sized) else None
    if batches is not None and count != 1 and len(plates) != 1:
        raise NotImplementedError(
            "the energy of all data needs one plate, pyro.plate('data', N, subsample_size=len(x)), around the observed "
            f"sites to know what share of the data a batch holds; the model has {len(plates)} subsampling plates. "
            "(poutine.scale alone does not say it.)"
        )


def _is_scaled(scale: Any) -> bool:
    return bool((scale != 1).any()) if isinstance(scale, Tensor) else scale != 1


def leading_size(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """First dimension of the first tensor among the arguments, 0 without one."""
    for leaf in pytree.tree_leaves((args, dict(kwargs))):
        if isinstance(leaf, Tensor) and leaf.dim():
            return len(leaf)
    return 0


def rows_index_whole_data(graph_module: GraphModule, names: Sequence[str], plates: Mapping[str, Plate]) -> None:
    """:raises ValueError: if a plate's rows index data of another length than the plate's size."""
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    rows = dict(zip(placeholders[1:], names, strict=False))
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.args and isinstance(node.args[0], Node) and node.args[0] in rows:
            if any(word in str(node.target) for word in ("view", "select", "squeeze", "alias", "reshape")):
                rows[node] = rows[node.args[0]]
        if node.target is not torch.ops.aten.index.Tensor:
            continue
        data, index = node.args[0], node.args[1]
        for dim, part in enumerate(index):
            if data.op == "get_attr" and part in rows:
                plate, given = plates[rows[part]], data.meta["val"].shape if "val" in data.meta else None
                value = getattr(graph_module, data.target)
                given = value.shape
                if given[dim] != plate.size:
                    raise ValueError(
                        f"data of shape {tuple(given)} are indexed by the rows of plate {plate.name!r}, which has size "
                        f"{plate.size}: the first dimension of each data argument must equal the plate's size."
                    )


def position(value: Tensor, dim: int) -> None:
    """:raises ValueError: unless ``value`` has shape ``(chains, dim)``."""
    if value.dim() != 2 or value.shape[1] != dim or not len(value):
        raise ValueError(f"position has shape {tuple(value.shape)}; give (chains, {dim}).")


def finite_start(energy: Tensor, grad: Tensor) -> None:
    """:raises ValueError: unless energy ``(chains,)`` and gradient ``(chains, dim)`` are finite."""
    bad = ~(torch.isfinite(energy) & torch.isfinite(grad).all(-1))
    if bad.any():
        raise ValueError(
            "the energy or its gradient is not finite at the initial values of chains "
            f"{bad.nonzero().flatten().tolist()} (energy {energy[bad].tolist()}): start inside the support, at a point "
            "where the data are possible."
        )


def site_values(values: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """:raises ValueError: if sites are missing, unknown, or of another shape than ``(chains, *shape)``."""
    missing, unknown = sorted(set(shapes) - set(values)), sorted(set(values) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"values are given for sites {sorted(values)}, the model's latent sites are {sorted(shapes)}: "
            + " ".join([f"missing {missing}."] * bool(missing) + [f"unknown {unknown}."] * bool(unknown))
        )
    counts = {}
    for name, shape in shapes.items():
        value = values[name]
        if value.dim() != len(shape) + 1 or value.shape[1:] != shape:
            raise ValueError(
                f"values of site {name!r} have shape {tuple(value.shape)}; wanted is {_with_chains(shape)}: the site's "
                "own shape after one leading dimension for the chains."
            )
        counts[name] = len(value)
    if len(set(counts.values())) > 1:
        raise ValueError(f"sites have values for different numbers of chains, {counts}: give each the same number.")


def _with_chains(shape: torch.Size) -> str:
    return "(" + ", ".join(["chains", *map(str, shape)]) + ("," if not shape else "") + ")"


def inside_support(name: str, value: Tensor, support: Any) -> None:
    """:raises ValueError: unless every entry of ``value`` ``(chains, ...)`` lies in ``support``."""
    inside = support.check(value)
    if not inside.all():
        chain = int((~inside.reshape(len(value), -1)).any(-1).nonzero()[0])
        example = value[~inside][0].flatten()[:4].tolist()
        raise ValueError(
            f"values of site {name!r} lie outside its support, {support}: in chain {chain}, for instance, "
            f"{', '.join(format(number, '.4g') for number in example)}. Give finite values inside it."
        )
