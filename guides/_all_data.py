"""One pass over all data at one point: the log-likelihood and its probes, every datum counted once.

Where a model's plates draw minibatches, windows of so many rows follow each other; the last is moved back to end at the
last row, and what it repeats counts nothing. With batches of a loader, every batch counts by its own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.checks import first_of, leading_size
from bnn.curvature import Capture, labellings
from bnn.guides._estimate import gradients
from bnn.guides._quadratic import total_of
from bnn.guides._site_roles import Roles, roles_of
from bnn.minibatch import arguments_of
from bnn.model_graph import ModelGraph
from bnn.observations import Chunk as Window
from bnn.observations import windows
from bnn.per_datum import LARGEST_GRADIENTS, gradients_per_datum
from bnn.randomness import kept_randomness

Values = Mapping[str, Tensor]


class Recorded:
    """The model at arguments of one kind.

    :param model: a Pyro model.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param curvature: as for :func:`bnn.fisher.probes_of`, or None for no probes.
    :param label_samples: draws of the labels, for ``"sampled"``.
    :raises ValueError: if the likelihood has no such curvature.
    :raises NotImplementedError: if it has no such outputs.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        curvature: str | None,
        label_samples: int = 1,
    ) -> None:
        self.curvature = curvature
        with kept_randomness(), torch.enable_grad():
            self.graph = ModelGraph(model, args, kwargs, curvature=curvature, label_samples=label_samples)
            device = self.graph.structure.device
            inputs = [*(torch.arange(p.batch_size, device=device) for p in self.graph.plates), *self.graph.data]
            if self.graph.graph is None:
                self.graph.terms(self.graph.values_at_recording, inputs)
            for name, why in self.graph.cannot_label.items():
                if curvature == "outputs":
                    raise NotImplementedError(
                        f"site {name!r} has no linearised predictive: {why}. Use bnn.predict(posterior, x), which "
                        "draws weights."
                    )
                raise ValueError(f"the curvature of observed site {name!r} is not known: {why}.")
            recorded = self.graph.graph is not None and curvature is not None
            self.capture = Capture(self.graph, inputs, self.graph.parameters) if recorded else None
        self.roles: Roles | None = None if self.graph.graph is None else roles_of(self.graph)


@dataclass
class Chunk:
    """A part of the data.

    :ivar recorded: the model at arguments of this kind.
    :ivar inputs: rows of the plates, then the tensors among the arguments.
    :ivar counts: plate that draws minibatches -> 1 for each row that counts, 0 for one that was there before.
    :ivar first: those of these plates whose rows are their first.
    """

    recorded: Recorded
    inputs: list[Tensor]
    counts: dict[str, Tensor]
    first: set[str]

    def entries(self) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Observed site -> 1 or 0 for each entry of its log density; and what undoes the scale of its plates."""
        graph = self.recorded.graph
        counts, shares = {}, {}
        for name, site in graph.observed.items():
            count = torch.ones(site.shape, dtype=graph.structure.dtype, device=graph.structure.device)
            shares[name] = 1.0
            for plate in graph.plates:
                if plate.name in site.plates:
                    dim = site.plates[plate.name][0]
                    count = count * self.counts[plate.name].to(count).reshape((-1,) + (1,) * (-dim - 1))
                    shares[name] *= plate.batch_size / plate.size
                else:
                    count = count * float(plate.name in self.first)
            counts[name] = count
        return counts, shares


def chunks_of(
    record: Callable[[tuple[Any, ...], Mapping[str, Any]], Recorded],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    batches: Iterable[Any] | None,
) -> Iterator[Chunk]:
    """All data once.

    :param record: gives the model at arguments of one kind.
    :param args: arguments of the model, without batches.
    :param kwargs: its keyword arguments.
    :param batches: an iterable of the model's arguments, or None.
    :raises ValueError: if the batches hold another number of rows than the plate.
    """
    if batches is None:
        recorded = record(args, kwargs)
        for window in windows(Window(args, dict(kwargs)), recorded.graph.plates):
            yield _chunk(recorded, window)
        return
    first_of(batches, args, kwargs)
    seen = 0
    plates: dict[str, int] = {}
    for number, item in enumerate(batches):
        args, kwargs = arguments_of(item)
        recorded = record(args, kwargs)
        seen += leading_size(args, kwargs)
        plates |= {plate.name: plate.size for plate in recorded.graph.plates}
        rows = {p.name: torch.arange(p.batch_size) for p in recorded.graph.plates}
        inputs = recorded.graph.inputs((args, dict(kwargs)), list(rows.values()))
        counts = {name: torch.ones(len(index)) for name, index in rows.items()}
        yield Chunk(recorded, inputs, counts, set() if number else set(rows))
    if number and not plates:
        raise ValueError(
            f"batches= gave {number + 1} batches, but no plate of the model says of how many rows in all they are a "
            'part: write pyro.plate("data", N, subsample_size=len(x)), or give num_data= to bnn.bayesian.'
        )
    for name, size in plates.items():
        if size != seen:
            raise ValueError(
                f"a pass through batches= gave {seen} rows, but plate {name!r} has {size}: the curvature of all data "
                "needs each row once (drop_last=False)."
            )


def _chunk(recorded: Recorded, window: Window) -> Chunk:
    device = recorded.graph.structure.device
    counts, first, rows = {}, set(), []
    for plate in recorded.graph.plates:
        index, begin = window.rows[plate.name], window.starts[plate.name]
        # The last window is moved back; a window would begin at a multiple of its length.
        nominal = -(-begin // plate.batch_size) * plate.batch_size
        counts[plate.name] = (index >= nominal).to(torch.get_default_dtype())
        rows.append(index.to(device))
        if begin == 0:
            first.add(plate.name)
    return Chunk(recorded, recorded.graph.inputs((window.args, window.kwargs), rows), counts, first)


class Reading:
    """What a chunk of the data says at one point.

    :param chunk: the data.
    :param point: unconstrained values of all sites.
    :ivar leaves: the same, to differentiate at.
    :ivar log_likelihood: of the chunk's rows.
    :ivar probes: for each probe, observed site -> values, those of repeated rows zero.
    :ivar terms: the model's terms, as the plates scale them.
    """

    def __init__(self, chunk: Chunk, point: Values) -> None:
        self.chunk, self.recorded = chunk, chunk.recorded
        graph, self.capture = self.recorded.graph, self.recorded.capture
        self.env: Mapping[Any, Any] = {}
        sites = graph.structure.sites
        with torch.enable_grad():
            self.leaves = {name: point[name].detach().clone().requires_grad_() for name in sites}
            values = {name: sites[name].constrain(leaf) for name, leaf in self.leaves.items()}
            if graph.graph is None:
                self.terms = graph.terms(values, chunk.inputs)
            else:
                keep = set() if self.capture is None else self.capture.sources(list(self.capture.uses))
                own = [parameter.detach() for parameter in graph.parameters]
                self.terms, self.env = graph(values, chunk.inputs, own, keep=keep)
            self._weigh()
            jacobian = [
                site.transform.log_abs_det_jacobian(self.leaves[name], values[name]).sum()
                for name, site in sites.items()
                if site.transform is not None
            ]
        self.jacobian = total_of(jacobian)

    def _weigh(self) -> None:
        counts, shares = self.chunk.entries()
        self.counts = counts
        parts = []
        for name, value in self.terms.likelihood.items():
            if name in counts:
                parts.append((value * counts[name]).sum() * shares[name])
            elif self.chunk.counts:
                raise NotImplementedError(
                    f"pyro.factor({name!r}) in a model whose plates draw minibatches: it is not known which rows it "
                    "counts. Give all data at once, in a plate without subsample_size."
                )
            else:
                parts.append(value.sum())
        self.log_likelihood = total_of(parts)
        self.probes = [
            {name: value * (counts[name] * shares[name] ** 0.5) for name, value in probe.items()}
            for probe in self.terms.probes
        ]

    # ---- gradients per datum

    def output_gradients(self, probe: Mapping[str, Tensor], sites: Sequence[str]) -> dict[Any, Tensor]:
        """Gradients of a probe at the outputs of the layers that use ``sites``."""
        assert self.capture is not None
        nodes = self.capture.nodes(sites)
        with torch.enable_grad():
            found = gradients(total_of(probe.values()), [self.env[node] for node in nodes])
        return dict(zip(nodes, found, strict=True))

    def counted(self, site: str) -> Tensor:
        """1 for each datum of a captured site that counts, else 0."""
        assert self.capture is not None
        return self.capture.of_data(site, self.counts)

    def jacobian_rows(self, probe: Mapping[str, Tensor], sites: Sequence[str], copies: int = 1) -> Iterator[Tensor]:
        """Gradients per datum ``(data, entries of all sites)``, some data at a time.

        From the layers where all sites are captured; else by one backward pass per datum.

        :param probe: one of :attr:`probes`.
        :param sites: names.
        :param copies: how many such are held at once.
        """
        numel = sum(self.leaves[name].numel() for name in sites)
        step = max(1, LARGEST_GRADIENTS // max(1, numel * copies))
        capture = self.capture
        if capture is None or not capture.by_entry(sites):
            yield from self._one_by_one(probe, sites, step)
            return
        grads = self.output_gradients(probe, sites)
        for kind in labellings(self.recorded.graph)[0].blocks:
            for begin in range(0, kind.count, step):
                rows, parts = slice(begin, min(begin + step, kind.count)), []
                for name in sites:
                    uses = [(use, block) for use, block in capture.uses[name] if block.start == kind.start]
                    size = self.leaves[name].numel()
                    one = gradients_per_datum(uses, name, size, self.env, grads, rows).get(kind.start)
                    parts.append(self.leaves[name].new_zeros(rows.stop - begin, size) if one is None else one)
                yield torch.cat(parts, 1).detach()

    def _one_by_one(self, probe: Mapping[str, Tensor], sites: Sequence[str], step: int) -> Iterator[Tensor]:
        labels = labellings(self.recorded.graph)[0]
        values = {name: value for name, value in probe.items() if value.requires_grad}
        leaves = [self.leaves[name] for name in sites]
        for begin in range(0, labels.count if values else 0, step):
            numbers = torch.arange(begin, min(begin + step, labels.count))
            picks = [
                (labels.of[name] == numbers.reshape(-1, *(1,) * value.dim())).to(value)
                for name, value in values.items()
            ]
            yield _batched(list(values.values()), leaves, picks)


def hessian_rows(total: Tensor, leaves: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Rows of the Hessian of ``total``, some at a time: the number of the first, and ``(rows, entries)``.

    :param total: a number.
    :param leaves: what it is differentiated by, end to end.
    """
    numel = sum(leaf.numel() for leaf in leaves)
    if not total.requires_grad:
        yield 0, leaves[0].new_zeros(numel, numel)
        return
    first = torch.autograd.grad(total, leaves, create_graph=True, materialize_grads=True)
    flat = torch.cat([gradient.reshape(-1) for gradient in first])
    step = max(1, LARGEST_GRADIENTS // numel)
    for begin in range(0, numel, step):
        stop = min(begin + step, numel)
        if not flat.requires_grad:
            yield begin, flat.new_zeros(stop - begin, numel)
            continue
        picks = torch.zeros(stop - begin, numel, dtype=flat.dtype, device=flat.device)
        picks[torch.arange(stop - begin), torch.arange(begin, stop)] = 1.0
        yield begin, _batched([flat], leaves, [picks])


def _batched(outputs: Sequence[Tensor], leaves: Sequence[Tensor], picks: Sequence[Tensor]) -> Tensor:
    """Gradients for many cotangents at once ``(cotangents, entries of all leaves)``."""
    found = torch.autograd.grad(outputs, leaves, picks, is_grads_batched=True, retain_graph=True, allow_unused=True)
    count = len(picks[0])
    parts = [
        leaf.new_zeros(count, leaf.numel()) if part is None else part.reshape(count, -1)
        for leaf, part in zip(leaves, found, strict=True)
    ]
    return torch.cat(parts, 1)


def hessian(total: Tensor, leaves: Sequence[Tensor]) -> Tensor:
    """The whole Hessian."""
    return torch.cat([rows for _, rows in hessian_rows(total, leaves)]).detach()


def hessian_diagonal(total: Tensor, leaf: Tensor) -> Tensor:
    """Its diagonal, flat."""
    parts = [rows[:, begin:].diagonal() for begin, rows in hessian_rows(total, [leaf])]
    return torch.cat(parts).detach()
