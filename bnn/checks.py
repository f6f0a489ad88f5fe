"""Checks of what a user hands to the potential: each says what was given, what is wanted and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from bnn.log_joint import Plate, describe_arguments
from bnn.minibatch import Arguments, arguments_of


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
    count = len(batches) if hasattr(batches, "__len__") else None
    if not plates:
        trace = poutine.trace(poutine.block(model, hide=[])).get_trace(*args, **kwargs)
        scaled = any(s["type"] == "sample" and s["is_observed"] and _is_scaled(s["scale"]) for s in trace.nodes.values())
        if count != 1 and not scaled:
            raise ValueError(
                "batches= yields several batches, but the model counts each as if it were all data. Write "
                "pyro.plate('data', N, subsample_size=len(x)) with N the number of rows in all batches."
            )
        return
    if len(plates) > 1:
        return
    (plate,) = plates.values()
    rows = None
    if isinstance(batches, Sequence):
        rows = sum(leading_size(*arguments_of(item)) for item in batches)
    elif hasattr(batches, "dataset") and hasattr(batches.dataset, "__len__"):
        rows = len(batches.dataset)
    if rows is not None and rows != plate.size:
        raise ValueError(
            f"batches= holds {rows} rows in all, but plate {plate.name!r} says that there are {plate.size}: "
            f"write pyro.plate({plate.name!r}, {rows}, subsample_size=len(x))."
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


def site_values(values: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]) -> None:
    """:raises ValueError: if sites are missing, unknown, or of another shape than ``(chains, *shape)``."""
    missing, unknown = sorted(set(shapes) - set(values)), sorted(set(values) - set(shapes))
    if missing or unknown:
        raise ValueError(
            f"values are given for sites {sorted(values)}, the model's latent sites are {sorted(shapes)}: "
            + (f"missing {missing}. " if missing else "")
            + (f"unknown {unknown}." if unknown else "")
        )
    chains = {len(values[name]) if values[name].dim() else None for name in shapes}
    for name, shape in shapes.items():
        if values[name].dim() != len(shape) + 1 or values[name].shape[1:] != shape or len(chains) > 1:
            raise ValueError(
                f"values of site {name!r} have shape {tuple(values[name].shape)}; wanted is "
                f"{('chains', *shape)}, the same number of chains for every site."
            )


def inside_support(name: str, value: Tensor, support: Any) -> None:
    """:raises ValueError: unless every entry of ``value`` lies in ``support``."""
    if not support.check(value).all():
        raise ValueError(f"values of site {name!r} lie outside its support, {support}: give values inside it.")
