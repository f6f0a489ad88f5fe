"""A Pyro model's forward pass, recorded once as a graph that can be looked into and differentiated again.

Where :mod:`bnn.potential` records the gradient of the whole log joint, this keeps its terms apart: the log prior of
each latent site, the log-likelihood of each datum, and the probes whose gradients make up the curvature
(:mod:`bnn.fisher`). What reads the graph: the curvature capture (:mod:`bnn.layers`) and the guides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.fx import GraphModule, Node

from bnn.fisher import probes_of, whole_batch_probes
from bnn.handlers_check import cause_of, graph_disagreement
from bnn.log_joint import quiet_handlers
from bnn.minibatch import Arguments, TensorLeaves
from bnn.recording import RecordingError, record_forward
from bnn.structure import Structure, base_of, is_observation, is_plate, structure_of

# What an output of the graph is: (kind, site, number of the probe).
Key = tuple[str, str, int]


@dataclass
class Terms:
    """What the model says at given latent values.

    :ivar prior: latent site -> its log density, a number.
    :ivar precision: latent site with a Normal prior -> the prior's precision, in the site's shape.
    :ivar likelihood: observed site or factor -> log density of each datum, scaled as the plates scale it.
    :ivar probes: for each probe, observed site -> values per datum whose gradients' outer products add up to the
        curvature of minus the log-likelihood.
    :ivar universal: the same, whose gradients of the sum over all data do so in expectation.
    """

    prior: dict[str, Tensor] = field(default_factory=dict)
    precision: dict[str, Tensor] = field(default_factory=dict)
    likelihood: dict[str, Tensor] = field(default_factory=dict)
    probes: list[dict[str, Tensor]] = field(default_factory=list)
    universal: list[dict[str, Tensor]] = field(default_factory=list)

    def flat(self) -> tuple[list[Key], list[Tensor]]:
        """Names and values of all tensors."""
        named: list[tuple[Key, Tensor]] = [(("prior", n, 0), t) for n, t in self.prior.items()]
        named += [(("precision", n, 0), t) for n, t in self.precision.items()]
        named += [(("likelihood", n, 0), t) for n, t in self.likelihood.items()]
        for kind, probes in (("probe", self.probes), ("universal", self.universal)):
            named += [((kind, n, k), t) for k, probe in enumerate(probes) for n, t in probe.items()]
        return [key for key, _ in named], [tensor for _, tensor in named]

    @staticmethod
    def of(named: Mapping[Key, Tensor]) -> Terms:
        """The terms out of what :meth:`flat` gave, or of a part of it."""
        terms = Terms()
        for (kind, name, k), tensor in named.items():
            if kind in ("probe", "universal"):
                _add(terms.probes if kind == "probe" else terms.universal, k, name, tensor)
            else:
                getattr(terms, kind)[name] = tensor
        return terms


def _add(probes: list[dict[str, Tensor]], number: int, site: str, value: Tensor) -> None:
    while len(probes) <= number:
        probes.append({})
    probes[number][site] = value


@dataclass
class Observed:
    """An observed site: its plates by name (dimension of the log density, rows) and the shape of its log density."""

    plates: dict[str, tuple[int, int]]
    shape: torch.Size


class ModelGraph:
    """The terms of a model's log joint as a function of latent values, data and parameters.

    :param model: a Pyro model.
    :param args: its arguments: tensors among them become inputs of the graph, all else is fixed.
    :param kwargs: its keyword arguments.
    :param curvature: which probes to record; see :func:`bnn.fisher.probes_of`.
    :param label_samples: draws of the labels per datum.
    :ivar graph: the recording, or None for a model that cannot be recorded; then :meth:`__call__` runs the handlers.
    :ivar cause: why it cannot be recorded.
    :ivar parameters: tensors that require gradients and that the model uses besides its arguments.
    :ivar seen_parameters: those of its ``pyro.param`` statements at the last run by handlers.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        curvature: str | None = None,
        label_samples: int = 1,
    ) -> None:
        self.model, self.curvature, self.label_samples = model, curvature, label_samples
        self.structure: Structure = structure_of(model, args, kwargs)
        self._leaves = TensorLeaves((args, dict(kwargs)))
        self.data = TensorLeaves.tensors((args, dict(kwargs)))
        self.observed: dict[str, Observed] = {}
        self.cannot_label: dict[str, str] = {}
        self.keys: list[Key] = []
        self.parameters: list[Tensor] = []
        self.seen_parameters: list[Tensor] = []
        self.graph: GraphModule | None = None
        self.cause = ""
        values = {name: _example(site, self.structure.device) for name, site in self.structure.sites.items()}
        rows = {p.name: torch.arange(p.batch_size, device=self.structure.device) for p in self.plates}
        self.values_at_recording = values
        try:
            self.graph, self.parameters = record_forward(self._flat, [*values.values(), *rows.values(), *self.data])
            self.cause = graph_disagreement(self, [*rows.values(), *self.data]) or ""
        except RecordingError as error:
            self.cause = cause_of(error)
        if self.cause:
            self.graph, self.parameters = None, []

    @property
    def plates(self) -> list[Any]:
        """The plates that draw minibatches: their rows are the first inputs."""
        return list(self.structure.plates.values())

    def _flat(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        sites = len(self.structure.sites)
        values = dict(zip(self.structure.sites, tensors[:sites], strict=True))
        self.keys, outputs = self.terms(values, tensors[sites:]).flat()
        return tuple(outputs)

    def terms(self, values: Mapping[str, Tensor], inputs: Sequence[Tensor]) -> Terms:
        """The terms by running the model under Pyro's handlers.

        :param values: constrained values of the latent sites.
        :param inputs: rows of the plates, then the tensors among the arguments.
        """
        count = len(self.structure.plates)
        rows = dict(zip(self.structure.plates, inputs[:count], strict=True))
        args, kwargs = self.arguments(inputs[count:])
        collector = _Collector(values, rows, self.curvature, self.label_samples)
        with quiet_handlers(), poutine.block(), collector:
            self.model(*args, **kwargs)
        self.observed, self.cannot_label = collector.observed, collector.cannot_label
        self.seen_parameters = list(collector.parameters.values())
        return collector.terms

    def arguments(self, tensors: Sequence[Tensor]) -> Arguments:
        """The model's arguments with ``tensors`` in them."""
        return self._leaves.arguments(tensors)

    def inputs(self, arguments: Arguments, rows: Sequence[Tensor]) -> list[Tensor]:
        """Inputs of the graph besides the latent values: rows of the plates and tensors among the arguments."""
        return [*rows, *TensorLeaves.tensors(arguments)]

    def __call__(
        self,
        values: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        *,
        wanted: Callable[[Key], bool] = lambda key: True,
        keep: set[Node] | None = None,
        after: Callable[[Node, Any, Mapping[Node, Any]], Any] | None = None,
    ) -> tuple[Terms, dict[Node, Any]]:
        """Replay the graph, differentiably.

        :param values: constrained values of the latent sites.
        :param inputs: rows of the plates and tensors among the arguments.
        :param parameters: values of :attr:`parameters`.
        :param wanted: which outputs are needed; only what they need is computed.
        :param keep: nodes whose values are returned besides.
        :param after: may replace a node's value, given the node, its value and the values so far.
        """
        assert self.graph is not None
        output = next(node for node in self.graph.graph.nodes if node.op == "output")
        results = {key: node for key, node in zip(self.keys, output.args[0], strict=True) if wanted(key)}
        needed = reaching(list(results.values()) + list(keep or ()))
        env: dict[Node, Any] = {}
        feed: Iterator[Tensor] = iter([values[name] for name in self.structure.sites] + [*inputs, *parameters])
        for node in self.graph.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(feed)
            elif node in needed and node.op != "output":
                env[node] = _run(self.graph, node, env)
                if after is not None:
                    env[node] = after(node, env[node], env)
        return Terms.of({key: env[node] for key, node in results.items()}), env


def reaching(nodes: Sequence[Node], *, gradients: bool = False) -> set[Node]:
    """All nodes that ``nodes`` are computed from, themselves included; or only those that their gradients flow to."""
    found: set[Node] = set()
    todo = [node for node in nodes if isinstance(node, Node)]
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            stops = gradients and node.target is torch.ops.aten.detach.default
            todo.extend(() if stops else node.all_input_nodes)
    return found


def _run(graph: GraphModule, node: Node, env: Mapping[Node, Any]) -> Any:
    if node.op == "get_attr":
        return getattr(graph, str(node.target))
    arguments = torch.fx.map_arg(node.args, lambda n: env[n])
    keywords = torch.fx.map_arg(node.kwargs, lambda n: env[n])
    return node.target(*arguments, **keywords)  # type: ignore[operator]


def _example(site: Any, device: torch.device) -> Tensor:
    """A point at which layers neither die nor saturate; the user's random numbers are left alone."""
    generator = torch.Generator().manual_seed(20)
    noise = torch.randn(site.shape, generator=generator, dtype=torch.float64)
    fan = max(1, site.shape[1:].numel() if len(site.shape) > 1 else 1)
    value: Tensor = site.constrain((noise / fan**0.5).to(device, site.dtype))
    return value


class _Collector(Messenger):
    """Substitutes values and minibatch rows, and collects the terms."""

    def __init__(
        self, values: Mapping[str, Tensor], rows: Mapping[str, Tensor], curvature: str | None, label_samples: int
    ) -> None:
        super().__init__()
        self.values, self.rows, self.curvature, self.label_samples = values, rows, curvature, label_samples
        self.terms = Terms()
        self.observed: dict[str, Observed] = {}
        self.cannot_label: dict[str, str] = {}
        self.parameters: dict[int, Tensor] = {}

    def _pyro_post_param(self, msg: Any) -> None:
        leaf = msg["value"].unconstrained() if hasattr(msg["value"], "unconstrained") else msg["value"]
        if leaf.requires_grad:
            self.parameters[id(leaf)] = leaf

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and is_plate(msg):
            if msg["name"] in self.rows:
                msg["value"], msg["done"] = self.rows[msg["name"]], True
        elif not msg["is_observed"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg):
            return
        name, fn, value, scale, mask = msg["name"], msg["fn"], msg["value"], msg["scale"], msg["mask"]
        scaled = scale_and_mask(fn.log_prob(value, *msg["args"], **msg["kwargs"]), scale, mask)
        scaled = torch.as_tensor(scaled)
        if name in self.values:
            self.terms.prior[name] = scaled.sum()
            base = base_of(fn)
            if type(base) is dist.Normal and mask is None and not hasattr(fn, "_mask"):
                precision = torch.as_tensor(scale) * base.scale.detach() ** -2
                self.terms.precision[name] = precision.to(value.dtype).expand(value.shape)
            return
        self.terms.likelihood[name] = scaled
        if not is_observation(msg):
            return
        self._note(msg, scaled)
        if self.curvature is None:
            return
        found = probes_of(fn, value, self.curvature, self.label_samples)
        if isinstance(found, str):
            self.cannot_label[name] = found
            return
        root = torch.as_tensor(scale) ** 0.5 if isinstance(scale, Tensor) else scale**0.5
        for k, probe in enumerate(found.values):
            number = k if found.shared else len(self.terms.probes)
            _add(self.terms.probes, number, name, scale_and_mask(probe, root, mask))
        for k, probe in enumerate(whole_batch_probes(fn, value, self.curvature, found)):
            _add(self.terms.universal, k, name, scale_and_mask(probe, root, mask))

    def _note(self, msg: Any, log_prob: Tensor) -> None:
        plates = {}
        for frame in msg["cond_indep_stack"]:
            if frame.dim is not None and log_prob.dim() >= -frame.dim:
                plates[frame.name] = (frame.dim, log_prob.shape[frame.dim])
        self.observed[msg["name"]] = Observed(plates, log_prob.shape)
