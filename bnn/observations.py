"""One run of a model over a chunk of its data: what it observes there, and where that belongs in all the data.

Where a model's plates draw minibatches, a chunk is a window of B rows (the last window is moved back to end at the last
row, since the model accepts no other number of rows); with ``batches=`` it is one batch of a single pass.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from bnn.checks import leading_size
from bnn.minibatch import arguments_of
from bnn.structure import Plate, base_of, is_observation, is_plate


@dataclass
class Chunk:
    """Arguments of one run of the model.

    :ivar rows: plate -> row numbers given to it.
    :ivar starts: plate -> the first of them.
    :ivar row: with batches, how many rows came before this batch.
    :ivar size: with batches, its number of rows.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: dict[str, Tensor] = field(default_factory=dict)
    starts: dict[str, int] = field(default_factory=dict)
    row: int | None = None
    size: int = 0


def windows(probe: Chunk, plates: list[Plate]) -> Iterator[Chunk]:
    """Chunks that cover all rows of the plates that draw minibatches."""
    for corner in itertools.product(*(range(0, p.size, p.batch_size) for p in plates)):
        starts = {p.name: min(start, p.size - p.batch_size) for start, p in zip(corner, plates, strict=True)}
        rows = {p.name: torch.arange(starts[p.name], starts[p.name] + p.batch_size) for p in plates}
        yield Chunk(probe.args, probe.kwargs, rows, starts)


def one_pass(batches: Iterable[Any]) -> Iterator[Chunk]:
    """One chunk per batch."""
    row = 0
    for item in batches:
        args, kwargs = arguments_of(item)
        size = leading_size(args, kwargs)
        yield Chunk(args, kwargs, row=row, size=size)
        row += size


def place_of(site: Placed, chunk: Chunk) -> dict[int, int] | None:
    """Where the chunk's part of the site begins, per dimension of its batch shape; None if it is there already."""
    if chunk.row is not None:
        dim = site.row_dim(chunk.size)
        if dim is not None:
            return {dim: chunk.row}
        return {} if chunk.row == 0 else None
    if any(start and name not in site.plates for name, start in chunk.starts.items()):
        return None
    dims = {name: dim for name, dim in site.plates.items() if dim is not None}
    return {dims[name]: start for name, start in chunk.starts.items() if name in dims}


def copies_of(site: Observation, reader: Reader, probe: Chunk, batches: Iterable[Any] | None) -> float:
    """How many times as large as in the first chunk the site is over all data, as far as is known."""
    result = 1.0
    for name, (size, full_size) in site.sizes.items():
        if batches is not None or name in reader.plates:
            result *= full_size / size
    by_rows = site.row_dim(leading_size(probe.args, probe.kwargs)) is not None
    if result == 1.0 and by_rows and hasattr(batches, "__len__"):
        result = float(len(batches))  # type: ignore[arg-type]
    return result


# ---- one run of the model


@dataclass(frozen=True)
class Placed:
    """A site in one run, of which each row of the data has its part.

    :ivar plates: the plates around it -> their dimension; None for a sequential plate.
    :ivar sizes: the plates around it -> (size in this run, full size).
    :ivar batch_shape: shape of its log density.
    :ivar value: its value, of that shape and the event dimensions.
    """

    plates: dict[str, int | None]
    sizes: dict[str, tuple[int, int]]
    batch_shape: torch.Size
    value: Tensor

    def shifted(self, place: Mapping[int, int]) -> dict[int, int]:
        """A place in the log-likelihood as a place in the value, which has event dimensions besides."""
        return {dim - (self.value.dim() - len(self.batch_shape)): start for dim, start in place.items()}

    def row_dim(self, rows: int) -> int | None:
        """The dimension of the log-likelihood that counts the rows of a batch."""
        dims = {name: dim for name, dim in self.plates.items() if dim is not None}
        for name, dim in dims.items():
            if self.sizes[name][0] != self.sizes[name][1]:
                return dim
        for name, dim in dims.items():
            if self.sizes[name][0] == rows:
                return dim
        shape = self.batch_shape
        return -len(shape) if len(shape) and shape[0] == rows else None


@dataclass(frozen=True)
class Observation(Placed):
    """An observed site in one run.

    :ivar log_prob: log density of each observation, unscaled; zero where it is masked.
    :ivar laws: names of the distributions that a draw of the value needs.
    """

    log_prob: Tensor
    laws: frozenset[str]


@dataclass(frozen=True)
class Target(Placed):
    """A site that is predicted, in one run.

    :ivar fn: its distribution.
    """

    fn: Any

    @property
    def laws(self) -> frozenset[str]:
        """Names of the distributions that a draw of the value needs."""
        return _laws(self.fn)


class Reader(Messenger):
    """Substitutes latent values and minibatch rows, and collects what is observed."""

    def __init__(self, values: Mapping[str, Tensor], rows: Mapping[str, Tensor], resample: bool) -> None:
        super().__init__()
        self.values, self.rows, self.resample = values, rows, resample
        self.plates: dict[str, Plate] = {}
        self.sites: dict[str, Observation] = {}
        self.missing: set[str] = set()

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg):
            size, batch_size = msg["fn"].size, msg["fn"].subsample_size
            if msg["value"] is None and batch_size is not None and batch_size < size:
                self.plates[msg["name"]] = Plate(msg["name"], size, batch_size)
                rows = self.rows.get(msg["name"], torch.arange(batch_size))
                device = next((value.device for value in self.values.values()), None)
                msg["value"], msg["done"] = rows.to(device), True
        elif msg["name"] in self.values and not msg["is_observed"]:
            msg["value"], msg["done"] = self.values[msg["name"]].to(_dtype(msg["fn"])), True
        elif not msg["is_observed"] and msg["value"] is None:
            self.missing.add(msg["name"])
        elif self.resample and is_observation(msg):
            msg["value"], msg["done"] = msg["fn"](), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg) or not is_observation(msg):
            return
        fn = msg["fn"]
        value = torch.as_tensor(msg["value"])
        log_prob = scale_and_mask(fn.log_prob(value), 1.0, msg["mask"])
        event = value.shape[value.dim() - fn.event_dim :]
        self.sites[msg["name"]] = Observation(
            **_plates_of(msg),
            batch_shape=log_prob.shape,
            value=value.expand(log_prob.shape + event),
            log_prob=log_prob,
            laws=_laws(fn),
        )


class TargetReader(Reader):
    """Collects the sites to be predicted: what is observed, and what is neither observed nor among the values.

    :param drawn: whether their values are drawn; else they are zeros, and no other site may depend on them.
    """

    def __init__(self, values: Mapping[str, Tensor], rows: Mapping[str, Tensor], drawn: bool) -> None:
        super().__init__(values, rows, resample=drawn)
        self.drawn = drawn
        self.targets: dict[str, Target] = {}

    def _pyro_sample(self, msg: Any) -> None:
        super()._pyro_sample(msg)
        if msg["value"] is None and not self.drawn and not is_plate(msg):
            fn = msg["fn"]
            kind = torch.long if getattr(fn.support, "is_discrete", False) else None
            device = next((value.device for value in self.values.values()), None)
            msg["value"], msg["done"] = torch.zeros(fn.shape(), dtype=kind, device=device), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg) or (msg["name"] in self.values and not msg["is_observed"]):
            return
        if msg["is_observed"] and not is_observation(msg):
            return
        fn, value = msg["fn"], torch.as_tensor(msg["value"])
        value = value.expand(fn.shape()) if value.dim() <= len(fn.shape()) else value
        self.targets[msg["name"]] = Target(**_plates_of(msg), batch_shape=fn.batch_shape, value=value, fn=fn)


def _plates_of(msg: Any) -> dict[str, Any]:
    frames = msg["cond_indep_stack"]
    return {
        "plates": {frame.name: frame.dim for frame in frames},
        "sizes": {frame.name: (int(frame.size), int(frame.full_size or frame.size)) for frame in frames},
    }


def _dtype(fn: Any) -> torch.dtype | None:
    """Precision of the law's draws: Pyro's runner stores all sites in the highest of theirs."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return next((v.dtype for v in vars(fn).values() if isinstance(v, Tensor) and v.is_floating_point()), None)


def _laws(fn: Any) -> frozenset[str]:
    fn = base_of(fn)
    if type(fn).__name__ == "MixtureSameFamily":
        return _laws(fn.mixture_distribution) | _laws(fn.component_distribution)
    return frozenset([type(fn).__name__])


def read(model: Callable[..., Any], values: Mapping[str, Tensor], chunk: Chunk, resample: bool = False) -> Reader:
    """Run ``model`` with its latent sites at ``values``; with ``resample``, observed sites are drawn anew."""
    reader = Reader(values, chunk.rows, resample)
    with poutine.block(), reader:
        model(*chunk.args, **chunk.kwargs)
    return reader


def read_targets(model: Callable[..., Any], values: Mapping[str, Tensor], chunk: Chunk, drawn: bool) -> TargetReader:
    """Run ``model`` with its latent sites at ``values`` and collect the distributions of all others."""
    reader = TargetReader(values, chunk.rows, drawn)
    with poutine.block(), reader:
        model(*chunk.args, **chunk.kwargs)
    return reader


# ---- the model's arguments


def tensor_arguments(model: Callable[..., Any], chunk: Chunk) -> dict[str, Tensor]:
    """The tensors among the model's arguments, by the names of its parameters."""
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function)
        bound = signature.bind(*chunk.args, **chunk.kwargs)
    except (TypeError, ValueError):
        named = {f"argument_{i}": value for i, value in enumerate(chunk.args)} | chunk.kwargs
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}
    result: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            result.update({f"{name}_{i}": item for i, item in enumerate(value)})
        elif kind is inspect.Parameter.VAR_KEYWORD:
            result.update(value)
        else:
            result[name] = value
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}
