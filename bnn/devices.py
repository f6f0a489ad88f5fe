"""Where a model's tensors are. All that runs at every step runs there; data of a loader are sent there."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Transform
from torch.utils import _pytree as pytree

CPU = torch.device("cpu")


def device_of_model(model: Callable[..., Any]) -> torch.device | None:
    """The device of a model's own parameters and buffers; None if it has none, or they are on several."""
    found = {tensor.device for _, tensor in _own(model)}
    return found.pop() if len(found) == 1 else None


def device_of_call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device | None:
    """Where a call of the model runs: on its own device, or else on that of its arguments; None if neither is known."""
    known = device_of_model(model)
    if known is not None:
        return known
    found = {leaf.device for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, Tensor)}
    return found.pop() if len(found) == 1 else None


def sent(arguments: Any, device: torch.device | None) -> Any:
    """The tensors among arguments on ``device``; as they are without one."""
    if device is None:
        return arguments
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), arguments)


def law_on(law: Any, device: torch.device) -> Any:
    """A distribution whose numbers are on ``device``: itself, if they are there; else a copy."""
    tensors: dict[int, Tensor] = {}
    _numbers_of(law, tensors, set())
    if all(tensor.device == device for tensor in tensors.values()):
        return law
    return copy.deepcopy(law, {number: tensor.to(device) for number, tensor in tensors.items()})


def _numbers_of(value: Any, tensors: dict[int, Tensor], seen: set[int]) -> None:
    """Note the tensors of a distribution and of its parts, which may know each other."""
    if isinstance(value, Tensor):
        tensors[id(value)] = value
    elif isinstance(value, (Distribution, Transform, list)) and id(value) not in seen:
        seen.add(id(value))
        for part in value if isinstance(value, list) else vars(value).values():
            _numbers_of(part, tensors, seen)


def common_device(sites: Mapping[str, torch.device], model: Callable[..., Any] | None = None) -> torch.device:
    """The device of a model's latent sites: the one besides the CPU if there is one, else the model's own.

    A prior such as ``dist.HalfNormal(1.0)`` draws on the CPU whatever else the model does; its density is the same
    elsewhere.

    :raises ValueError: if there are several.
    """
    found = {device: name for name, device in sites.items() if device != CPU}
    if len(found) > 1:
        where = ", ".join(f"{name!r} on {device}" for device, name in found.items())
        raise ValueError(f"the model's sites are on several devices ({where}): put all of its tensors on one of them.")
    own = None if model is None else device_of_model(model)
    return next(iter(found), own or CPU)


def mismatch(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """What of a model and its arguments is where, if they are on several devices; empty if they are on one."""
    where: dict[torch.device, list[str]] = {}
    named: Iterable[tuple[str, Any]] = [(f"argument {i}", a) for i, a in enumerate(args)]
    for name, value in [*named, *((f"argument {k!r}", v) for k, v in kwargs.items()), *_own(model)]:
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and name not in where.setdefault(leaf.device, []):
                where[leaf.device].append(name)
    if len(where) < 2:
        return ""
    parts = (f"{', '.join(names[:3])}{' ...' * (len(names) > 3)} on {device}" for device, names in where.items())
    return (
        f"Its tensors are on several devices: {'; '.join(parts)}. Put them on one, by .to(device) of data and model. "
    )


def _own(model: Any) -> list[tuple[str, Tensor]]:
    """A model's own parameters and buffers, or those of the net that it is made of."""
    module = model if isinstance(model, nn.Module) else getattr(model, "net", None)
    if not isinstance(module, nn.Module):
        return []
    found = [(f"parameter {name!r}", value) for name, value in module.named_parameters()]
    return found + [(f"buffer {name!r}", value) for name, value in module.named_buffers()]
