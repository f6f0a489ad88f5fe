"""Reading a store of draws, whole or still being written: only what is committed, and only what is asked for."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.extras import library
from bnn.store import COORDINATES, read_root, variable_of


class StoredGroup(Mapping[str, Tensor]):
    """One group of a store: name -> ``(chains, draws, ...)``, read when it is looked up.

    :param path: of the store.
    :param group: ``"posterior"``, by the names of the sites, or ``"sample_stats"``.
    :raises ValueError: if there is no store.
    :raises RuntimeError: if no draws are committed yet, or a newer version wrote it.
    """

    def __init__(self, path: str | os.PathLike[str], group: str) -> None:
        self.path, self.group = path, group
        root = read_root(path)
        known = root.get("consolidated_metadata", {}).get("metadata", {})
        opened = library("zarr", "store").open_group(str(path), mode="r", use_consolidated=bool(known))
        names = [name.partition("/")[2] for name in known if name.startswith(f"{group}/")]
        labels = {
            variable_of(site): site for site in known.get("sample_stats", {}).get("attributes", {}).get("site_name", [])
        }
        self.arrays = {labels.get(n, n): opened[f"{group}/{n}"] for n in names if n not in COORDINATES}
        if not self.arrays or not all(min(array.shape[:2]) for array in self.arrays.values()):
            raise RuntimeError(f"there are no draws in {path} yet.")

    def __getitem__(self, name: str) -> Tensor:
        values = torch.from_numpy(self.read(name, slice(None)))
        return values.float() if values.dtype == torch.float16 else values

    def read(self, name: str, chains: Any, draws: Any = slice(None)) -> np.ndarray[Any, Any]:
        """Some of a variable.

        :raises RuntimeError: if a file is damaged.
        """
        array = self.arrays[name]
        try:
            return np.asarray(array[chains, draws])
        except Exception as error:  # whatever the codecs say of it
            raise RuntimeError(
                f"{self.path} cannot be read in {self.group}/{name}, chains {chains}, draws {draws}: a file is "
                f"truncated or damaged ({type(error).__name__}: {error})."
            ) from error

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    @property
    def shape(self) -> tuple[int, int]:
        """Chains and draws."""
        chains, draws = next(iter(self.arrays.values())).shape[:2]
        return chains, draws

    @property
    def sizes(self) -> dict[str, int]:
        """Name -> how many numbers one draw has."""
        return {name: int(np.prod(array.shape[2:])) for name, array in self.arrays.items()}


class Arrays(Mapping[str, np.ndarray[Any, Any]]):
    """Tensors as arrays of NumPy, when they are looked up."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = tensors

    def __getitem__(self, name: str) -> np.ndarray[Any, Any]:
        return self.tensors[name].cpu().numpy()

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


class StoredSite:
    """Draws of a site, chain by chain, that are read when they are looked up: like a tensor ``(draws, *shape)``.

    A block of draws is kept from one look to the next.

    :param draws: the group.
    :param name: the site.
    :param kept: numbers of the draws of each chain.
    """

    device = torch.device("cpu")

    def __init__(self, draws: StoredGroup, name: str, kept: Tensor) -> None:
        self.group, self.name, self.kept = draws, name, kept
        array = draws.arrays[name]
        self._block = array.chunks[1]
        self.shape = torch.Size([array.shape[0] * len(kept), *array.shape[2:]])
        self.dtype = torch.from_numpy(np.empty(0, array.dtype)).dtype
        self._held: tuple[int, int, Tensor] = -1, -1, torch.empty(0)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, place: int | slice) -> Tensor:
        if isinstance(place, slice):
            numbers = range(*place.indices(len(self)))
            return (
                torch.stack([self._draw(number) for number in numbers]) if numbers else torch.empty(0, *self.shape[1:])
            )
        return self._draw(range(len(self))[place])

    def _draw(self, number: int) -> Tensor:
        chain, place = divmod(number, len(self.kept))
        draw = int(self.kept[place])
        block = draw // self._block
        if self._held[:2] != (chain, block):
            values = self.group.read(self.name, chain, slice(block * self._block, (block + 1) * self._block))
            self._held = chain, block, torch.from_numpy(values)
        value = self._held[2][draw - block * self._block]
        if value.is_floating_point() and not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise ValueError(
                f"draw {draw} of chain {chain} of site {self.name!r} is not finite: leave out diverged chains."
            )
        return value.float() if value.dtype == torch.float16 else value

    def numel(self) -> int:
        """How many numbers."""
        return self.shape.numel()

    def element_size(self) -> int:
        """Bytes of a number."""
        return max(4, self.dtype.itemsize)

    def is_floating_point(self) -> bool:
        """Whether the numbers are floating."""
        return self.dtype.is_floating_point

    def cpu(self) -> Tensor:
        """All draws."""
        return self[:]

    def repeat_interleave(self, times: int, dim: int) -> Any:
        """As of a tensor; reads all draws."""
        return self if times == 1 else self[:].repeat_interleave(times, dim)


def is_path(posterior: Any) -> bool:
    """Whether a posterior is given as the path of a store."""
    return isinstance(posterior, (str, os.PathLike))


def open_groups(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The groups as Datasets of xarray, of which nothing is read before it is looked at, and nothing kept.

    :raises ValueError: if there is no store.
    :raises RuntimeError: if no draws are committed yet.
    """
    xarray = library("xarray", "store")
    StoredGroup(path, "posterior")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Consolidated metadata")
        groups = {
            group: xarray.open_dataset(
                str(path), engine="zarr", group=group, chunks=None, cache=False, consolidated=True
            )
            for group in ("posterior", "sample_stats")
        }
    # A commit may fall between the two.
    least = {dim: slice(min(group.sizes[dim] for group in groups.values())) for dim in COORDINATES}
    groups = {name: group.isel(least) for name, group in groups.items()}
    facts = groups["sample_stats"].attrs
    groups["sample_stats"].attrs = {name: _with_nan(fact) for name, fact in facts.items()}
    if "site" in groups["sample_stats"].dims:
        groups["sample_stats"] = groups["sample_stats"].assign_coords(site=list(facts["site_name"]))
    if "energy" in groups["sample_stats"]:
        groups["sample_stats"] = groups["sample_stats"].assign(lp=-groups["sample_stats"]["energy"])
    return groups


def as_arviz(path: str | os.PathLike[str], thin: int = 1) -> Any:
    """The :func:`open_groups` as the installed ArviZ holds them.

    :param thin: every so many draws one is shown.
    """
    import arviz

    groups = {name: group.isel(draw=slice(None, None, thin)) for name, group in open_groups(path).items()}
    if thin > 1:
        groups["posterior"].attrs["thin"] = thin * groups["posterior"].attrs.get("thin", 1)
    if int(arviz.__version__.split(".")[0]) >= 1:
        return library("xarray", "store").DataTree.from_dict({f"/{name}": group for name, group in groups.items()})
    return arviz.InferenceData(**groups)


def _with_nan(fact: Any) -> Any:
    return [float("nan") if value is None else value for value in fact] if isinstance(fact, list) else fact
