"""A rank's share of the rows of a model: the model as the rank runs it, and the mean over ranks.

Rows of ``pyro.plate(..., subsample_size=B)``: all ranks draw the same B rows, and rank r keeps the r-th part of them.
A plate that takes all rows: the tensors among the arguments that have as many rows are cut, and the terms inside the
plate count K times. A loader (``batches=``), or a plate whose ``subsample_size`` is the number of rows of the
arguments: each rank is given its own rows, as by ``torch.utils.data.DistributedSampler``, and nothing is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.log_joint import LogJoint, quiet_handlers
from bnn.minibatch import Stream
from bnn.randomness import kept_randomness
from bnn.ranks import RankError, Ranks
from bnn.structure import Plate, Structure, structure_of

PATIENCE = "or share the chains out with ranks='chains'"


class Share:
    """What one rank has of a model and its data.

    :param ranks: the ranks.
    :param model: a Pyro model.
    :param args: its arguments, all data: the same on every rank.
    :param kwargs: its keyword arguments.
    :param given: whether each rank is given its own rows (``batches=``).
    :raises ValueError: if a minibatch cannot be cut into equal parts.
    :raises NotImplementedError: if the rows of the data cannot be told.
    :ivar model: the model as this rank runs it.
    :ivar args: its arguments, cut.
    :ivar kwargs: the same.
    :ivar weight: K n/N for n of N rows of its own: what it counts in a mean over all rows.
    """

    def __init__(
        self,
        ranks: Ranks,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        given: bool = False,
    ) -> None:
        self.ranks, self.args, self.kwargs, self.weight = ranks, args, dict(kwargs), 1.0
        self._whole = args, dict(kwargs)
        self._rows: tuple[int, slice] | None = None  # of how many rows of the arguments which are its own
        self.given: set[str] = set()  # plates whose rows are the arguments of each rank
        self.cut: dict[str, int] = {}  # plate -> rows of a whole minibatch
        self.model: Callable[..., Any] = model
        with kept_randomness():
            structure = structure_of(model, args, kwargs)
            plate = max(structure.plates.values(), key=lambda one: one.batch_size, default=None)
            if plate is None and not given:
                self._cut_arguments(model)
            elif plate is not None and not given:
                if plate.batch_size == self._rows_of_arguments():
                    self.given.add(plate.name)
                else:
                    self._cut_minibatch(model, plate)
            if self.model is not model:
                self._check(model, structure)

    def _rows_of_arguments(self) -> int:
        sizes = [len(leaf) for leaf in self._leaves() if isinstance(leaf, Tensor) and leaf.dim()]
        return sizes[0] if sizes else 0

    def _leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def _cut_minibatch(self, model: Callable[..., Any], plate: Plate) -> None:
        if plate.batch_size % self.ranks.size:
            raise ValueError(
                f"a minibatch of {plate.batch_size} rows of plate {plate.name!r} cannot be cut into "
                f"{self.ranks.size} equal parts: choose a subsample_size that is a multiple of the number of ranks."
            )
        self.cut[plate.name] = plate.batch_size
        self.model = _Part(model, {plate.name: plate.batch_size // self.ranks.size}, {})

    def _cut_arguments(self, model: Callable[..., Any]) -> None:
        with quiet_handlers(), torch.no_grad(), poutine.block():
            trace = poutine.trace(model).get_trace(*self.args, **self.kwargs)
        frames = {
            frame.name: frame
            for node in trace.observation_nodes
            for frame in trace.nodes[node]["cond_indep_stack"]
            if frame.vectorized
        }
        rows = {getattr(leaf, "shape", (0,))[0] for leaf in self._leaves() if isinstance(leaf, Tensor) and leaf.dim()}
        found = [frame for frame in frames.values() if frame.size in rows]
        if not found:
            raise NotImplementedError(
                "ranks='data' cuts the rows of a plate, and no plate around the observed sites has as many rows as a "
                "tensor among the arguments: write pyro.plate('data', N, subsample_size=B), pass the data as "
                f"arguments, {PATIENCE}."
            )
        plate = max(found, key=lambda frame: frame.size)
        local = [name for name in trace.stochastic_nodes if plate in trace.nodes[name]["cond_indep_stack"]]
        if local:
            raise NotImplementedError(
                f"sites {local} are latent inside the plate {plate.name!r}, whose rows the ranks share out: every rank "
                f"must hold all latent values. Leave ranks= out, {PATIENCE}."
            )
        size, count, rank = plate.size, self.ranks.size, self.ranks.rank
        if size < count:
            raise ValueError(f"{size} rows cannot be shared out over {count} ranks: use fewer ranks.")
        rows_of = slice(size * rank // count, size * (rank + 1) // count)
        self._rows = size, rows_of
        self.args, self.kwargs = self.own(self.args, self.kwargs)
        self.weight = count * (rows_of.stop - rows_of.start) / size
        self.model = _Part(model, {}, {plate.name: float(count)})

    def _check(self, model: Callable[..., Any], structure: Structure) -> None:
        """The mean over ranks must be the whole: where rows are coupled, as by batch normalisation, it is not."""
        generator = torch.Generator().manual_seed(20)
        position = 0.1 * torch.randn(structure.dim, generator=generator, dtype=torch.float64)
        position = position.to(structure.device, structure.dtype)
        whole = {p.name: torch.arange(p.batch_size, device=structure.device) for p in structure.plates.values()}
        parts = {name: self.part(rows) if name in self.cut else rows for name, rows in whole.items()}
        with quiet_handlers(), torch.no_grad():
            wanted = LogJoint(model, structure)(position, whole, *self._whole)
            own = LogJoint(self.model, structure)(position, parts, self.args, self.kwargs)
        (found,) = self.ranks.mean([own], "check the shares of the data")
        tolerance = torch.finfo(wanted.dtype).eps ** 0.5 * (1.0 + float(wanted.abs()))
        if torch.isfinite(wanted) and not abs(float(found - wanted)) <= tolerance:
            raise NotImplementedError(
                f"the mean over ranks of the log joint is {float(found):.6g}, but that of all rows is "
                f"{float(wanted):.6g}: the model couples rows (batch normalisation?), draws random numbers of its own, "
                f"or knows the number of rows from elsewhere. Leave ranks= out, {PATIENCE}."
            )

    def own(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """This rank's part of the model's arguments."""
        if self._rows is None:
            return args, dict(kwargs)
        size, own = self._rows
        result: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(
            Tensor, lambda t: t[own] if t.dim() and len(t) == size else t, (args, dict(kwargs))
        )
        return result

    def part(self, rows: Tensor) -> Tensor:
        """This rank's part of the last dimension of a minibatch's rows."""
        size = rows.shape[-1] // self.ranks.size
        return rows[..., self.ranks.rank * size : (self.ranks.rank + 1) * size].contiguous()

    def whole_plates(self, plates: Iterable[Plate]) -> list[Plate]:
        """Plates of :attr:`model` with the minibatches of all ranks together."""
        return [replace(plate, batch_size=self.cut.get(plate.name, plate.batch_size)) for plate in plates]

    def stream(self, plates: Iterable[Plate], batches: Iterable[Any] | None, chains: int, **options: Any) -> Stream:
        """Minibatches of this rank: its part of those that all ranks draw alike.

        :param plates: plates of :attr:`model`.
        :param options: of :class:`bnn.minibatch.Stream`.
        """
        whole = self.whole_plates(plates)
        drawn = [(p.size, p.batch_size) for p in whole if p.name not in self.given]
        return _Parts(drawn, batches, chains, whole, self, **options)

    def mean(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The mean over ranks."""
        return self.ranks.mean(tensors)


class _Parts(Stream):
    """A stream of which this rank keeps its part; rows that are given are not drawn, but numbered."""

    def __init__(
        self,
        drawn: Iterable[tuple[int, int]],
        batches: Iterable[Any] | None,
        chains: int,
        plates: Sequence[Plate],
        share: Share,
        **options: Any,
    ) -> None:
        super().__init__(drawn, batches, chains, **options)
        self.share, self.compared = share, batches is None
        self.cut = [k for k, plate in enumerate(plates) if plate.name in share.cut]
        device = options.get("device", "cpu")
        self.numbered = {
            k: torch.arange(plate.batch_size, device=device).expand(chains, -1).contiguous()
            for k, plate in enumerate(plates)
            if plate.name in share.given
        }

    def next(self, steps: int = 1) -> list[list[Tensor]]:
        """As of a stream, this rank's rows alone."""
        result = super().next(steps)
        if not self.compared:
            self._compare(result[0])
        for inputs in result:
            for k, rows in self.numbered.items():
                inputs.insert(k, rows)
            for k in self.cut:
                inputs[k] = self.share.part(inputs[k])
        return result

    def _compare(self, inputs: Sequence[Tensor]) -> None:
        self.compared, ranks = True, self.share.ranks
        sums = ranks.gather([float(tensor.double().sum()) for tensor in inputs], "compare minibatches")
        if ranks.size > 1 and all(one == sums[0] for one in sums):
            raise RankError(
                "every rank's batches= gives the same rows, so that nothing is shared out: give the loader "
                "sampler=torch.utils.data.DistributedSampler(dataset), and batch_size rows per rank."
            )


class _Part(Messenger):
    """A model whose plates take fewer rows, or whose terms inside a plate count more.

    :param model: a Pyro model.
    :param sizes: plate -> rows that it draws in place of its ``subsample_size``.
    :param weights: plate -> factor of the log densities inside.
    """

    def __init__(self, model: Callable[..., Any], sizes: Mapping[str, int], weights: Mapping[str, float]) -> None:
        super().__init__()
        self.model, self.sizes, self.weights = model, sizes, weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        original = SubsampleMessenger._subsample

        def _subsample(name: str, size: Any = None, subsample_size: Any = None, *rest: Any) -> Any:
            return original(name, size, self.sizes.get(name, subsample_size), *rest)

        SubsampleMessenger._subsample = staticmethod(_subsample)  # type: ignore[assignment,method-assign]
        try:
            with self:
                return self.model(*args, **kwargs)
        finally:
            SubsampleMessenger._subsample = staticmethod(original)  # type: ignore[method-assign]

    def _pyro_sample(self, msg: Any) -> None:
        for frame in msg["cond_indep_stack"]:
            if frame.name in self.weights:
                msg["scale"] = msg["scale"] * self.weights[frame.name]
