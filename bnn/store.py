"""Draws of a long run on disk: a Zarr store that xarray and ArviZ open lazily, also while it is being written.

    run.zarr/zarr.json             attributes of the run, and the committed shape of every array
    run.zarr/posterior/SITE        (chain, draw, *shape): the draws, in the model's own space
    run.zarr/sample_stats/NAME     (chain, draw): what was measured of them
    run.zarr/checkpoints/          states of the run, one file (and its predecessor) for each of its writers

Every chunk holds draws of one chain, with a checksum, and is replaced as a whole. The arrays have room for all draws of
the run; how many are there, readers learn from the consolidated metadata in the one file ``zarr.json``. It is replaced
after each checkpoint, when the draws before it and the state that continues them are on disk: what a killed run wrote
after its last checkpoint is not visible, and is drawn again, bit for bit, by the run that resumes it. A writer is a
group of chains that move together; under torchrun several processes write, or hold parts of the state, and readers
see what all of them have committed (:mod:`bnn.store_progress`). All processes must see the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnn.extras import library
from bnn.store_writer import StoreError

# What is written in the attributes of a store; a layout that older versions cannot read gets a higher number.
FORMAT = 1

# A block of draws of all chains is held in memory until it is full: so many bytes, or so many draws.
BLOCK_BYTES, BLOCK_DRAWS = 16 << 20, 1024

DTYPES = (None, "float64", "float32", "float16", "bfloat16")
GROUPS = ("posterior", "sample_stats")
COORDINATES = ("chain", "draw")


@dataclass(frozen=True)
class Store:
    """Where and how a run keeps its draws, as ``MCMC(..., store=Store("run.zarr", dtype="float16"))``.

    :param path: the folder of the store; what can be read again by ``bnn.to_arviz(path)`` and ``bnn.predict(path, x)``.
    :param thinning: every so many draws one is kept.
    :param dtype: precision of the draws on disk: the model's by default, ``"float32"``, ``"float16"`` or
        ``"bfloat16"``, which is kept as float32 with zeros at the end, for readers that do not know it, and compressed.
        The chains themselves go on in full precision.
    :param compression: level of Zstandard from 1 to 9; None for none, which for float32 hardly pays.
    :param checkpoint_every: seconds between checkpoints. A killed run repeats what it did since the last.
    :param checkpoint_draws: checkpoint also after so many draws, those of warm-up included.
    :raises ValueError: for settings out of range.

    >>> Store("run.zarr", thinning=10, dtype="float16").checkpoint_every
    30.0
    """

    path: str | os.PathLike[str]
    thinning: int = 1
    dtype: str | None = None
    compression: int | None = None
    checkpoint_every: float = 30.0
    checkpoint_draws: int | None = None

    def __post_init__(self) -> None:
        """:raises ValueError: for settings out of range."""
        if not isinstance(self.path, (str, os.PathLike)) or not str(self.path):
            raise ValueError(f"store is {self.path!r}; give the path of a folder, such as 'run.zarr'.")
        for name, least in (("thinning", 1), ("checkpoint_draws", 1), ("compression", 1)):
            value = getattr(self, name)
            if (value is not None or name == "thinning") and (type(value) is not int or value < least):
                raise ValueError(f"{name} is {value!r}; give a whole number of at least {least}.")
        if self.compression is not None and self.compression > 9:
            raise ValueError(f"compression is {self.compression}; give a level from 1 to 9, or None.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype is {self.dtype!r}; give one of {', '.join(map(repr, DTYPES))}.")
        if not self.checkpoint_every > 0:
            raise ValueError(f"checkpoint_every is {self.checkpoint_every!r}; give a number of seconds above 0.")

    @property
    def folder(self) -> Path:
        """The path."""
        return Path(self.path)

    def exists(self) -> bool:
        """Whether there is a store at the path.

        :raises ValueError: if there is something else.
        """
        if (self.folder / "zarr.json").is_file():
            return True
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ValueError(f"{self.folder} exists and is no store of draws: give another path.")
        return False


def variable_of(site: str) -> str:
    """The name of a site's array: a slash would make a group.

    >>> variable_of("layer/weight")
    'layer.weight'
    """
    return site.replace("/", ".")


def read_root(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The root's metadata: what one file says of the whole store.

    :raises ValueError: if there is no store.
    :raises RuntimeError: if a newer version wrote it.
    """
    file = Path(path) / "zarr.json"
    try:
        root: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        known = root["attributes"]["pyro_bnn_store"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} holds no draws that bnn.kernels.MCMC(..., store=...) wrote; read a "
            "file of ArviZ's with arviz.from_netcdf."
        ) from None
    if known > FORMAT:
        raise RuntimeError(
            f"{path} was written by a newer version of pyro-bnn (format {known}, known up to {FORMAT}): update the "
            "library."
        )
    return root


def make_store(options: Store, attributes: Mapping[str, Any], block: int) -> None:
    """A new store without draws.

    :param options: where.
    :param attributes: of the run: what must be the same for a run that resumes; among them ``parts``, the chains
        ``[start, stop]`` of each writer, and ``in_turn``, whether one chain is drawn after another.
    :param block: draws in a chunk.
    :raises RuntimeError: if another run makes it at this moment, or the disk does not take it.
    """
    path = options.folder
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"pyro_bnn_store": FORMAT, "block": block, "progress": {}, **attributes}
    try:
        shutil.rmtree(draft, ignore_errors=True)
        (draft / "checkpoints").mkdir(parents=True)
        root = library("zarr", "store").open_group(str(draft), mode="a", zarr_format=3, attributes=content)
        for group in GROUPS:
            root.create_group(group)
        with contextlib.suppress(OSError):
            path.rmdir()  # an empty folder
        draft.rename(path)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        if (path / "zarr.json").exists():
            raise RuntimeError(f"another run made {path} just now: wait for its end, or give another path.") from None
        raise StoreError(f"no store can be made at {path} ({error}): give another path.") from error
