"""What must be the same for a run to be resumed: the model's sites, its data, the kernel's settings, in plain words."""

from __future__ import annotations

import dataclasses
import functools
import platform
import zlib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.potential import Potential

# Of larger tensors so many evenly spaced numbers are compared.
NUMBERS = 1 << 24


def of_model(potential: Potential) -> dict[str, str]:
    """Sites, plates and data of a recorded model: what -> how it is."""
    result = {}
    for name, site in potential.sites.items():
        law = "" if site.normal is None else f", prior Normal{site.normal}"
        result[f"site {name!r}"] = f"{tuple(site.value_shape)} {site.dtype} on {site.support}{law}"
    for name, plate in potential.plates.items():
        result[f"plate {name!r}"] = f"{plate.batch_size} of {plate.size} rows"
    with_values = potential.batches is None  # the first batch of a loader may be another each time
    for place, leaf in pytree.tree_flatten_with_path((potential.args, potential.kwargs))[0]:
        label = f"argument {pytree.keystr(place)}"
        result[label] = describe(leaf, with_values) if isinstance(leaf, Tensor) else describe(leaf)
    return result


def of_settings(owner: object, without: frozenset[str]) -> dict[str, str]:
    """The public attributes of an object: name -> value in words.

    :param without: names that are no settings.
    """
    return {
        name: describe(value)
        for name, value in sorted(vars(owner).items())
        if not name.startswith("_") and name not in without
    }


def of_versions() -> dict[str, str]:
    """What the bits of a result depend on besides."""
    found = {"python": platform.python_version(), "threads": str(torch.get_num_threads())}
    for package in ("pyro-bnn", "torch", "pyro-ppl", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def differences(then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Each thing that differs, in words.

    >>> differences({"step_size": "0.1"}, {"step_size": "0.2", "mass": "1.0"})
    ['step_size was 0.1 and is 0.2', 'mass was absent and is 1.0']
    """
    names = [*then, *(name for name in now if name not in then)]
    return [
        f"{name} was {then.get(name, 'absent')} and is {now.get(name, 'absent')}"
        for name in names
        if then.get(name) != now.get(name)
    ]


def describe(value: Any, with_values: bool = True) -> str:
    """A value in words that are the same in every process, tensors by a checksum.

    :param with_values: whether the checksum is of a tensor's numbers, or it is described by its shape alone.

    >>> describe({"a": torch.zeros(2), "b": 1})
    "{'a': float32 (2,) 6522df69, 'b': 1}"
    """
    if isinstance(value, (Tensor, np.ndarray, np.generic)):
        tensor = torch.as_tensor(value).detach()
        words = f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
        return f"{words} {_checksum(tensor):08x}" if with_values else words
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {describe(one)}" for key, one in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(map(describe, value)) + ")"
    if isinstance(value, functools.partial):
        return f"{describe(value.func)}{describe([*value.args, value.keywords])}"
    if value is None or isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return repr(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__name__}{describe({f.name: getattr(value, f.name) for f in dataclasses.fields(value)})}"
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    if type(value).__module__.split(".")[0] == "bnn":
        return f"{type(value).__name__}{describe(vars(value))}"
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _checksum(tensor: Tensor) -> int:
    flat = tensor.reshape(-1)
    flat = flat[:: -(-flat.numel() // NUMBERS)] if flat.numel() > NUMBERS else flat
    if not flat.numel():
        return 0
    return zlib.crc32(flat.cpu().contiguous().view(torch.uint8).numpy().data)
