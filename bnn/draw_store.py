"""Writing to a store of draws: one or several processes, each with its part of the chains."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnn.extras import library
from bnn.saved_state import write_whole
from bnn.store import COORDINATES, GROUPS, Store, read_root
from bnn.store_progress import cost_of_all, seen

try:
    import fcntl
except ImportError:  # not on Windows, where two runs on one store go unnoticed
    fcntl = None  # type: ignore[assignment]

# Draws in a chunk of statistics, which are many small arrays.
STATS_DRAWS = 1024


class DrawStore:
    """A store that this process writes to.

    :param options: where and how.
    :param capacity: draws of each chain that there is room for.
    :param writers: which of the run's parts this process writes, by number.
    :param shared: whether other processes write too.
    :raises RuntimeError: if another run is writing one of them.
    :raises NotImplementedError: for several processes on a system without locks.
    """

    def __init__(self, options: Store, capacity: int, writers: Sequence[int] = (0,), shared: bool = False) -> None:
        if shared and fcntl is None:
            raise NotImplementedError(
                "several ranks cannot write one store on this system, which has no locks of files: leave ranks= out, "
                "or give each rank a store and a run of its own."
            )
        self.options, self.path, self.capacity = options, options.folder, capacity
        self.attributes: dict[str, Any] = read_root(self.path)["attributes"]
        self.block, self.chains = int(self.attributes["block"]), int(self.attributes["parts"][-1][1])
        self._locks: list[Any] = []
        for writer in writers:
            self._lock(writer)
        self._root = library("zarr", "store").open_group(str(self.path), mode="r+", use_consolidated=False)
        self._arrays: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        with self._alone():
            for group in GROUPS:
                for file in (self.path / group).glob("*/zarr.json"):
                    name = file.parent.name
                    array = self._arrays[group][name] = self._opened(group, name)
                    self._make_room(name, array)

    def _lock(self, writer: int) -> None:
        """A lock that ends with this process, however it ends."""
        file = open(self.path / "checkpoints" / f"lock-{writer}", "w")  # noqa: SIM115
        self._locks.append(file)
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.close()
                raise RuntimeError(
                    f"another run is writing to {self.path}: wait for its end, stop it, or give another path."
                ) from None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """What all writers share is changed by one of them at a time."""
        with open(self.path / "checkpoints" / "lock", "w") as file:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def close(self) -> None:
        """Let others write."""
        for file in self._locks:
            file.close()

    # ---- draws

    def write(self, group: str, values: Mapping[str, np.ndarray[Any, Any]], chain: int, draw: int) -> None:
        """Write draws ``(chains, draws, ...)``, the first of chain ``chain`` and number ``draw``.

        :raises ValueError: for values that a narrower ``dtype`` on disk cannot hold.
        """
        for name, value in values.items():
            array = self._arrays[group].get(name)
            if array is None:
                with self._alone():
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

    def _opened(self, group: str, name: str) -> Any:
        with library("zarr", "store").config.set({"array.write_empty_chunks": True}):  # a missing chunk is a lost one
            return self._root[group][name]

    def _new(self, group: str, name: str, like: np.ndarray[Any, Any]) -> Any:
        if (self.path / group / name / "zarr.json").is_file():  # by another process
            return self._opened(group, name)
        tail = like.shape[2:]
        dtype = like.dtype
        if group == "posterior" and dtype.kind == "f" and self.options.dtype is not None:
            dtype = np.dtype("float32" if self.options.dtype == "bfloat16" else self.options.dtype)
        names = ["site"] if group == "sample_stats" else [f"{name}_dim_{place}" for place in range(len(tail))]
        for coordinate, size in zip(COORDINATES, (self.chains, self.capacity), strict=True):
            if not (self.path / group / coordinate / "zarr.json").is_file():
                whole = self._array(group, coordinate, (size,), (min(size, 8192),), np.dtype("int64"), [coordinate])
                whole[:] = np.arange(size)
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
        place = 0 if name == "draw" else 1
        if name != "chain" and array.shape[place] < self.capacity:
            array.resize((*array.shape[:place], self.capacity, *array.shape[place + 1 :]))
        if name in COORDINATES:
            array[:] = np.arange(array.shape[0])

    def commit(
        self,
        writer: int,
        draws: int,
        cost: Mapping[str, Any],
        attributes: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Let readers see so many draws of the chains of a writer, as soon as all writers of them have as many.

        :param cost: the process, and its seconds and gradients; nothing of one that writes no draws.
        :param attributes: of the groups.
        """
        with self._alone():
            root = json.loads((self.path / "zarr.json").read_text(encoding="utf-8"))
            progress = root["attributes"]["progress"]
            progress[str(writer)] = {"draws": draws, **cost}
            sizes = dict(zip(COORDINATES, seen(root["attributes"], self.capacity), strict=True))
            known = {}
            for group in GROUPS:
                facts = dict(attributes.get(group, {}))
                if group == "sample_stats":
                    facts |= cost_of_all(progress.values())
                known[group] = {"zarr_format": 3, "node_type": "group", "attributes": facts}
                for file in sorted((self.path / group).glob("*/zarr.json")):
                    document = json.loads(file.read_text(encoding="utf-8"))
                    shape = zip(document["shape"], document["dimension_names"], strict=True)
                    document["shape"] = [sizes.get(dim, size) for size, dim in shape]
                    known[f"{group}/{file.parent.name}"] = document
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
        """Remove what ``chains`` have from draw number ``draws`` on in chunks of its own."""
        for group, name, array in self._followed():
            for folder in Path(self.path, group, name, "c").glob("*"):
                if int(folder.name) not in chains:
                    continue
                for unfinished in list(folder.rglob("*.partial")):  # of a writer that was killed
                    unfinished.unlink()
                for chunk in folder.iterdir():
                    if int(chunk.name) * array.chunks[1] >= draws:
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

    def _checkpoint(self, writer: int) -> Path:
        return self.path / "checkpoints" / f"writer-{writer}"

    def write_checkpoint(self, writer: int, content: bytes) -> None:
        """Replace a writer's checkpoint, and keep the one before it."""
        file = self._checkpoint(writer)
        if file.exists():
            spare = file.with_suffix(".spare")
            spare.unlink(missing_ok=True)
            try:
                os.link(file, spare)
            except OSError:  # a file system without hard links
                shutil.copyfile(file, spare)
            os.replace(spare, file.with_suffix(".before"))
        write_whole(file, content)

    def go_back(self, writer: int) -> None:
        """Forget the last checkpoint: the one before it takes its place."""
        os.replace(self._checkpoint(writer).with_suffix(".before"), self._checkpoint(writer))

    def start_anew(self, writer: int) -> None:
        """Forget the checkpoints of a writer."""
        for file in (self._checkpoint(writer), self._checkpoint(writer).with_suffix(".before")):
            file.unlink(missing_ok=True)

    def checkpoints(self, writer: int) -> list[bytes]:
        """The contents of the last checkpoint and of the one before it, as far as they exist."""
        file = self._checkpoint(writer)
        return [one.read_bytes() for one in (file, file.with_suffix(".before")) if one.is_file()]


def _as_bfloat16(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Float32 rounded to the nearest that has 8 bits of significand, ties to even."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().float().numpy()
