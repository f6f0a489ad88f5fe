"""The state of something that runs, in one file, so that it can go on bit for bit.

A state is pickled whole, except for what a fresh start makes again out of model and data (recorded programs, the data
themselves): these objects are left out by name, and put in again by name. Like every pickle, such a file can run code
when it is read: read only files that you trust.
"""

from __future__ import annotations

import hashlib
import io
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# First line of a file. A version that cannot be read by those before it gets a higher number.
HEADER, VERSION = b"pyro-bnn state ", 1


class DamagedState(RuntimeError):
    """A file that is not what was written."""


def dumps(state: Any, left_out: Mapping[str, Any] | None = None) -> bytes:
    """``state`` as the content of a file.

    :param left_out: objects inside of it that are not written, by name.
    """
    body = io.BytesIO()
    body.write(_first_line(b""))  # its place
    start = body.tell()
    _Pickler(body, left_out or {}).dump(state)
    with body.getbuffer() as view:
        view[:start] = _first_line(view[start:])
    return body.getvalue()


def _first_line(data: bytes | memoryview) -> bytes:
    return HEADER + f"{VERSION} {hashlib.blake2b(data, digest_size=16).hexdigest()}\n".encode()


def loads(content: bytes, put_in: Mapping[str, Any] | None = None, device: torch.device | str | None = None) -> Any:
    """What :func:`dumps` was given.

    :param put_in: objects in place of those that were left out, by name.
    :param device: where tensors go that were not on the CPU.
    :raises DamagedState: if the content is not whole.
    :raises RuntimeError: if a newer version wrote it.

    >>> start = torch.zeros(2)
    >>> loads(dumps({"position": start, "step": 3}))
    {'position': tensor([0., 0.]), 'step': 3}
    """
    first = content[:100].partition(b"\n")[0]
    data = memoryview(content)[len(first) + 1 :]
    words = first.removeprefix(HEADER).split()
    if not first.startswith(HEADER) or len(words) != 2:
        raise DamagedState("the file is not a state that was saved, or its beginning is damaged")
    if int(words[0]) > VERSION:
        raise RuntimeError(
            f"the state was saved by a newer version of pyro-bnn (format {int(words[0])}, known up to {VERSION}): "
            "update the library."
        )
    if hashlib.blake2b(data, digest_size=16).hexdigest().encode() != words[1]:
        raise DamagedState("the file is truncated or damaged")
    return _Unpickler(io.BytesIO(data), put_in or {}, device).load()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, whenever the process or the machine stops."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    with open(draft, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


# ---- pickles of tensors that hold their own numbers only, in plain bytes


# Where the tensors of the state that is read now go, unless they were on the CPU.
_DEVICE: list[torch.device | str] = ["cpu"]


def _tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...], stride: tuple[int, ...], on_cpu: bool) -> Tensor:
    values = torch.empty(shape, dtype=dtype)
    if values.numel():
        values.view(-1).view(torch.uint8).copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
    if stride != values.stride():  # products of matrices differ in the last bit with the order of their numbers
        values = torch.empty_strided(shape, stride, dtype=dtype).copy_(values)
    return values if on_cpu else values.to(_DEVICE[-1])


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO, left_out: Mapping[str, Any]) -> None:
        super().__init__(file, protocol=5)
        self.names = {id(value): name for name, value in left_out.items() if value is not None}

    def persistent_id(self, obj: Any) -> str | None:
        return self.names.get(id(obj))

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Tensor:
            return NotImplemented
        value = obj.detach().cpu().contiguous()
        data = value.view(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
        stride = torch.empty_like(obj, device="meta").stride()  # its own if its numbers stand without gaps
        return _tensor, (data, obj.dtype, tuple(obj.shape), stride, obj.device.type == "cpu")


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, put_in: Mapping[str, Any], device: torch.device | str | None) -> None:
        super().__init__(file)
        self.put_in, self.device = put_in, device

    def persistent_load(self, pid: Any) -> Any:
        if pid not in self.put_in:
            raise RuntimeError(f"the state refers to {pid!r}, which is not there now.")
        return self.put_in[pid]

    def load(self) -> Any:
        _DEVICE.append("cpu" if self.device is None else self.device)
        try:
            return super().load()
        finally:
            _DEVICE.pop()
