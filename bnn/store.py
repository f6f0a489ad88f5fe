"""Draws of a long run on disk: a Zarr store that xarray and ArviZ open lazily, also while it is being written.

    run.zarr/zarr.json             attributes of the run, and the committed shape of every array
    run.zarr/posterior/SITE        (chain, draw, *shape): the draws, in the model's own space
    run.zarr/sample_stats/NAME     (chain, draw): what was measured of them
    run.zarr/checkpoints/          state of the run, one file (and its predecessor) for each process that writes

Every chunk holds draws of one chain, with a checksum, and is replaced as a whole. The arrays have room for all draws of
the run; how many are there, readers learn from the consolidated metadata in the one file ``zarr.json``. It is replaced
after each checkpoint, when the draws before it and the state that continues them are on disk: what a killed run wrote
after its last checkpoint is not visible, and is drawn again, bit for bit, by the run that resumes it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnn.extras import library
from bnn.saved_state import write_whole
from bnn.store_writer import StoreError

try:
    import fcntl
except ImportError:  # not on Windows, where two runs on one store go unnoticed
    fcntl = None  # type: ignore[assignment]

# What is written in the attributes of a store; a layout that older versions cannot read gets a higher number.
FORMAT = 1

# A block of draws of all chains is held in memory until it is full: so many bytes, or so many draws.
BLOCK_BYTES, BLOCK_DRAWS = 16 << 20, 1024

# Draws in a chunk of statistics, which are many small arrays.
STATS_DRAWS = 1024

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


class DrawStore:
    """A store that this process writes to.

    :param options: where and how.
    :param chains: all chains of the run.
    :param capacity: draws of each chain that there is room for.
    :param attributes: of the run, if the store is new: what must be the same for a run that resumes.
    :param block: draws in a chunk; those of the store if it exists.
    :param writer: number of the process, where several write chains of their own.
    :raises RuntimeError: if another run is writing.
    """

    def __init__(
        self,
        options: Store,
        chains: int,
        capacity: int,
        attributes: Mapping[str, Any],
        block: int,
        writer: int = 0,
    ) -> None:
        self.options, self.path, self.chains, self.capacity = options, options.folder, chains, capacity
        zarr = library("zarr", "store")
        if not options.exists():
            self._create(zarr, {"pyro_bnn_store": FORMAT, "block": block, **attributes})
        self.attributes: dict[str, Any] = read_root(self.path)["attributes"]
        self.block = int(self.attributes["block"])
        self._lock = self._locked(writer)
        self._checkpoint = self.path / "checkpoints" / f"writer-{writer}"
        self._root = zarr.open_group(str(self.path), mode="r+", use_consolidated=False)
        self._arrays: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        with zarr.config.set({"array.write_empty_chunks": True}):  # a missing chunk is a lost one
            for group in GROUPS:
                for name, array in self._root[group].arrays():
                    self._arrays[group][name] = array
                    self._make_room(name, array)

    def _create(self, zarr: Any, attributes: Mapping[str, Any]) -> None:
        draft = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            (draft / "checkpoints").mkdir(parents=True)
            root = zarr.open_group(str(draft), mode="a", zarr_format=3, attributes=dict(attributes))
            for group in GROUPS:
                root.create_group(group)
            with contextlib.suppress(OSError):
                self.path.rmdir()  # an empty folder
            draft.rename(self.path)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if (self.path / "zarr.json").exists():
                raise RuntimeError(
                    f"another run made {self.path} just now: wait for its end, or give another path."
                ) from None
            raise StoreError(f"no store can be made at {self.path} ({error}): give another path.") from error

    def _locked(self, writer: int) -> Any:
        """A lock that ends with this process, however it ends."""
        file = open(self.path / "checkpoints" / f"lock-{writer}", "w")  # noqa: SIM115
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.close()
                raise RuntimeError(
                    f"another run is writing to {self.path}: wait for its end, stop it, or give another path."
                ) from None
        return file

    def close(self) -> None:
        """Let others write."""
        self._lock.close()

    # ---- draws

    def write(self, group: str, values: Mapping[str, np.ndarray[Any, Any]], chain: int, draw: int) -> None:
        """Write draws ``(chains, draws, ...)``, the first of chain ``chain`` and number ``draw``.

        :raises ValueError: for values that a narrower ``dtype`` on disk cannot hold.
        """
        for name, value in values.items():
            array = self._arrays[group].get(name)
            if array is None:
                array = self._arrays[group][name] = self._new(group, name, value)
            with np.errstate(over="ignore"):  # said below
                narrow = value.astype(array.dtype, copy=False)
            if group == "posterior" and self.options.dtype == "bfloat16":
                narrow = _as_bfloat16(narrow)
            if narrow is not value and not np.array_equal(np.isfinite(narrow), np.isfinite(value)):
                raise ValueError(
                    f"values of {name!r}, up to {np.nanmax(np.abs(value)):.3g}, are too large for dtype="
                    f"{self.options.dtype!r} of the store: use 'float32'."
                )
            array[chain : chain + value.shape[0], draw : draw + value.shape[1]] = narrow

    def _new(self, group: str, name: str, like: np.ndarray[Any, Any]) -> Any:
        tail = like.shape[2:]
        dtype = like.dtype
        if group == "posterior" and dtype.kind == "f" and self.options.dtype is not None:
            dtype = np.dtype("float32" if self.options.dtype == "bfloat16" else self.options.dtype)
        names = ["site"] if group == "sample_stats" else [f"{name}_dim_{place}" for place in range(len(tail))]
        for coordinate, size in zip(COORDINATES, (self.chains, self.capacity), strict=True):
            if coordinate not in self._arrays[group]:
                self._arrays[group][coordinate] = self._array(
                    group, coordinate, (size,), (min(size, 8192),), np.dtype("int64"), [coordinate]
                )
                self._arrays[group][coordinate][:] = np.arange(size)
        block = self.block if group == "posterior" else STATS_DRAWS
        shape, chunk = (self.chains, self.capacity, *tail), (1, block, *tail)
        return self._array(group, name, shape, chunk, dtype, [*COORDINATES, *names[: len(tail)]])

    def _array(
        self,
        group: str,
        name: str,
        shape: tuple[int, ...],
        chunks: tuple[int, ...],
        dtype: np.dtype[Any],
        dims: Sequence[str],
    ) -> Any:
        codecs = library("zarr.codecs", "store")
        level = self.options.compression
        squeezes = group == "posterior" and (level is not None or self.options.dtype == "bfloat16")
        # Bytes of one significance side by side: zeros and exponents are what can be compressed.
        blosc = [codecs.BloscCodec(cname="zstd", clevel=level or 1, shuffle="shuffle")] if squeezes else []
        return self._root[group].create_array(
            name,
            shape=shape,
            chunks=tuple(max(1, size) for size in chunks),
            dtype=dtype,
            fill_value=np.nan if dtype.kind == "f" else 0,
            dimension_names=list(dims),
            compressors=[*blosc, codecs.Crc32cCodec()],
            config={"write_empty_chunks": True},
        )

    def _make_room(self, name: str, array: Any) -> None:
        """For more draws than the run before was to make."""
        if name == "chain":
            return
        place = 0 if name == "draw" else 1
        if array.shape[place] < self.capacity:
            array.resize((*array.shape[:place], self.capacity, *array.shape[place + 1 :]))
            if name == "draw":
                array[:] = np.arange(self.capacity)

    def commit(self, chains: int, draws: int, attributes: Mapping[str, Mapping[str, Any]]) -> None:
        """Let readers see so many chains and draws.

        :param attributes: of the groups.
        """
        root = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
        known = {}
        for group, arrays in self._arrays.items():
            known[group] = {"zarr_format": 3, "node_type": "group", "attributes": dict(attributes.get(group, {}))}
            for name in arrays:
                document = json.loads((self.path / group / name / "zarr.json").read_text(encoding="utf-8"))
                sizes = {"chain": chains, "draw": draws}
                shape = zip(document["shape"], document["dimension_names"], strict=True)
                document["shape"] = [sizes.get(dim, size) for size, dim in shape]
                known[f"{group}/{name}"] = document
        root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": known}
        write_whole(self.path / "zarr.json", json.dumps(root).encode())

    def first_damaged(self, chains: range, draws: int) -> tuple[str, int, int] | None:
        """The earliest draw that cannot be read: (array, chain, draw); None if all can.

        Reads every chunk, one at a time.
        """
        found = [
            (f"{group}/{name}", chain, start)
            for group, name, array in self._followed()
            for chain in chains
            for start in range(0, draws, array.chunks[1])
            if not self._reads(group, name, array, chain, slice(start, min(start + array.chunks[1], draws)))
        ]
        return min(found, key=lambda place: place[2], default=None)

    def _reads(self, group: str, name: str, array: Any, chain: int, draws: slice) -> bool:
        place = [str(chain), str(draws.start // array.chunks[1]), *["0"] * (array.ndim - 2)]
        if not Path(self.path, group, name, "c", *place).is_file():
            return False
        try:
            array[chain, draws]
        except Exception:  # whatever the codecs say of it
            return False
        return True

    def forget(self, chains: range, draws: int) -> None:
        """Remove what ``chains`` have from draw number ``draws`` on in chunks of its own, and all of later chains."""
        for group, name, array in self._followed():
            for folder in Path(self.path, group, name, "c").glob("*"):
                if int(folder.name) < chains.start:
                    continue
                for unfinished in list(folder.rglob("*.partial")):  # of a writer that was killed
                    unfinished.unlink()
                keep = 0 if int(folder.name) >= chains.stop else draws
                for chunk in folder.iterdir():
                    if int(chunk.name) * array.chunks[1] >= keep:
                        shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()

    def _followed(self) -> list[tuple[str, str, Any]]:
        """Group, name and array of all that leads with chain and draw."""
        return [
            (group, name, array)
            for group, arrays in self._arrays.items()
            for name, array in arrays.items()
            if name not in COORDINATES
        ]

    # ---- checkpoints

    def write_checkpoint(self, content: bytes) -> None:
        """Replace the checkpoint, and keep the one before it."""
        if self._checkpoint.exists():
            spare = self._checkpoint.with_suffix(".spare")
            spare.unlink(missing_ok=True)
            try:
                os.link(self._checkpoint, spare)
            except OSError:  # a file system without hard links
                shutil.copyfile(self._checkpoint, spare)
            os.replace(spare, self._checkpoint.with_suffix(".before"))
        write_whole(self._checkpoint, content)

    def go_back(self) -> None:
        """Forget the last checkpoint: the one before it takes its place."""
        os.replace(self._checkpoint.with_suffix(".before"), self._checkpoint)

    def checkpoints(self) -> list[bytes]:
        """The contents of the last checkpoint and of the one before it, as far as they exist."""
        files = [self._checkpoint, self._checkpoint.with_suffix(".before")]
        return [file.read_bytes() for file in files if file.is_file()]


def _as_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Float32 rounded to the nearest that has 8 bits of significand, ties to even."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().float().numpy()
