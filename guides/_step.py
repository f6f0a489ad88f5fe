"""One step of natural-gradient variational inference, recorded once and replayed.

A step draws the latent sites from the guide, runs the model's recorded graph, and differentiates it: once for the
log-likelihood, once for the log prior, and, where statistics are due, once for each probe of the curvature. What comes
out are the loss and the natural gradients. A model that cannot be recorded takes the same steps by Pyro's handlers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pyro import poutine
from torch import Tensor

from bnn.agreement import cause_of
from bnn.curvature import Capture
from bnn.guides._base import NaturalGuide
from bnn.guides._blocks import Block, Curvature, Params
from bnn.minibatch import Stream
from bnn.model_graph import Key, ModelGraph, Terms, reaching
from bnn.recording import record
from bnn.tiers import Program, choose


@dataclass(frozen=True)
class Settings:
    """What a recorded step depends on besides model, guide and shapes."""

    curvature: str
    label_samples: int
    kl_weight: float
    stick_the_landing: bool
    factored: bool
    extrinsic_damping: float
    trust_region: float | None
    num_particles: int
    vectorize_particles: bool
    compile: str


@dataclass
class Result:
    """What one step gives.

    :ivar loss: minus the objective.
    :ivar directions: per block, natural gradient of the location.
    :ivar targets: per block, what the scale parameters are drawn to; empty without statistics.
    :ivar parameters: gradients of the loss with respect to the model's parameters.
    """

    loss: Tensor
    directions: list[Tensor]
    targets: list[dict[str, Tensor]]
    parameters: list[Tensor]


class Step:
    """Steps on arguments of one kind: the same shapes and the same values of all that is no tensor.

    :param model: a Pyro model.
    :param guide: a guide that has been set up.
    :param args: the model's arguments.
    :param kwargs: the model's keyword arguments.
    :param settings: what is computed.
    :raises ValueError: if curvature cannot be had for a likelihood.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: NaturalGuide,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        settings: Settings,
    ) -> None:
        self.guide, self.settings = guide, settings
        probes = None if settings.curvature == "reparametrization" else settings.curvature
        with torch.random.fork_rng(devices=[]):
            self.graph = ModelGraph(model, args, kwargs, curvature=probes, label_samples=settings.label_samples)
            if self.graph.graph is None:
                self.graph.terms(self.graph.values_at_recording, self._example_inputs())
        self._check_labels()
        plates = [(plate.size, plate.batch_size) for plate in self.graph.plates]
        self._stream = Stream(plates, None, 1, device=self.graph.structure.device)
        self.capture: Capture | None = None
        self.reparametrized: set[str] = set()
        self.known_precision: set[str] = set()
        self.reasons: dict[str, str] = {}
        self._programs: dict[Any, Program | Callable[..., Any]] = {}
        self._inspect()

    @property
    def is_recorded(self) -> bool:
        """Whether the model's graph is replayed, not Pyro's handlers."""
        return self.graph.graph is not None

    def _example_inputs(self) -> list[Tensor]:
        return [torch.arange(plate.batch_size) for plate in self.graph.plates] + self.graph.data

    def _check_labels(self) -> None:
        for name, why in self.graph.cannot_label.items():
            raise ValueError(
                f"the curvature of observed site {name!r} cannot be estimated: {why}. Choose another curvature: "
                "'empirical' uses the observed labels (biased), 'reparametrization' needs no labels."
            )

    def _inspect(self) -> None:
        """Learn which sites are captured, and how the curvature of each site's prior is had."""
        names = list(self.graph.structure.sites)
        missing = [name for block in self.guide.blocks for name in block.names if name not in names]
        extra = [name for name in names if name not in {n for b in self.guide.blocks for n in b.names}]
        if missing or extra:
            raise ValueError(
                f"guide and model differ in their latent sites: only the guide has {missing}, only the model {extra}. "
                "Make the guide from the model that SVI gets, and make a new one when the model's sites change."
            )
        if self.graph.graph is None:
            warnings.warn(
                "the model cannot be recorded and runs with Pyro's handlers, several times slower; curvature is "
                f"estimated from whole-batch gradients: {cause_of(self.graph.error)}.",
                RuntimeWarning,
                stacklevel=5,
            )
            self.known_precision = set()
            return
        output = next(node for node in self.graph.graph.graph.nodes if node.op == "output")
        ends = dict(zip(self.graph.keys, output.args[0], strict=True))
        placeholders = [node for node in self.graph.graph.graph.nodes if node.op == "placeholder"]
        factors = {
            key: node for key, node in ends.items() if key[0] == "likelihood" and key[1] not in self.graph.observed
        }
        for name, node in zip(names, placeholders, strict=False):
            if self.settings.curvature == "reparametrization" or any(node in reaching([f]) for f in factors.values()):
                self.reparametrized.add(name)
            others = [end for key, end in ends.items() if key[0] == "prior" and key[1] != name]
            if ("precision", name, 0) in ends and not any(node in reaching([end]) for end in others):
                self.known_precision.add(name)
        if self.settings.curvature != "reparametrization":
            self.capture = Capture(self.graph, self._example_inputs(), self.graph.parameters)
            self.reasons = {n: why for n, why in self.capture.unrecognised.items() if n not in self.reparametrized}

    # ---- one step

    def __call__(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], params: Sequence[Params], statistics: bool
    ) -> tuple[Result, list[Tensor]]:
        """One step, and the leaf tensors of the model's parameters.

        :param args: the model's arguments.
        :param kwargs: the model's keyword arguments.
        :param params: constrained parameters of each block.
        :param statistics: whether the curvature is estimated.
        """
        (rows,) = self._stream.next(1)
        inputs = self.graph.inputs((args, dict(kwargs)), [t[0] for t in rows])
        particles = self.settings.num_particles
        noises = [
            torch.randn((particles, *p["loc"].shape), dtype=p["loc"].dtype, device=p["loc"].device) for p in params
        ]
        flat = [tensor.detach() for p in params for tensor in p.values()]
        if not self.is_recorded:
            return self._by_handlers(params, noises, inputs, statistics)
        leaves = self.graph.parameters
        tensors = [*flat, *noises, *inputs, *(leaf.detach() for leaf in leaves)]
        keys = [list(p) for p in params]
        if statistics not in self._programs:
            self._record(statistics, keys, len(inputs), tensors)
        outputs = self._programs[statistics](*tensors)
        return self._unpack(outputs, self._target_names[statistics]), leaves

    def _record(self, statistics: bool, keys: Sequence[list[str]], count: int, tensors: Sequence[Tensor]) -> None:
        names: list[list[str]] = []

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            feed = iter(tensors)
            params = [{name: next(feed) for name in block} for block in keys]
            noises = [next(feed) for _ in keys]
            inputs = [next(feed) for _ in range(count)]
            result = self._particles(params, noises, inputs, list(feed), statistics)
            names[:] = [list(targets) for targets in result.targets]
            targets = [t for block in result.targets for t in block.values()]
            return (result.loss, *result.directions, *targets, *result.parameters)

        self._programs[statistics] = choose(record(function, tensors), tensors, self.settings.compile)
        self._target_names[statistics] = [list(block) for block in names]

    @property
    def _target_names(self) -> dict[bool, list[list[str]]]:
        return self.__dict__.setdefault("_names_of_targets", {})

    def _unpack(self, outputs: Sequence[Tensor], names: Sequence[Sequence[str]]) -> Result:
        feed = iter(outputs)
        loss = next(feed)
        directions = [next(feed) for _ in self.guide.blocks]
        targets = [{name: next(feed) for name in block} for block in names]
        return Result(loss, directions, targets, list(feed))

    def _by_handlers(
        self, params: Sequence[Params], noises: Sequence[Tensor], inputs: Sequence[Tensor], statistics: bool
    ) -> tuple[Result, list[Tensor]]:
        with poutine.trace(param_only=True) as capture:
            detached = [{name: tensor.detach() for name, tensor in p.items()} for p in params]
            leaves: list[Tensor] = []
            result = self._particles(detached, noises, inputs, leaves, statistics, capture)
        return result, leaves

    def _particles(
        self,
        params: Sequence[Params],
        noises: Sequence[Tensor],
        inputs: Sequence[Tensor],
        parameters: list[Tensor],
        statistics: bool,
        capture: Any = None,
    ) -> Result:
        """The mean over particles, and what the optimizer needs of it."""
        count = self.settings.num_particles
        results = []
        for particle in range(count):
            noise = [n[particle] for n in noises]
            results.append(self._particle(params, noise, inputs, parameters, statistics, capture))
        loss = torch.stack([r[0] for r in results]).mean()
        whitened = [torch.stack([r[1][b] for r in results]).mean(0) for b in range(len(params))]
        targets = [
            {name: torch.stack([r[2][b][name] for r in results]).mean(0) for name in results[0][2][b]}
            for b in range(len(params))
        ]
        gradients = [torch.stack([r[3][p] for r in results]).mean(0) for p in range(len(results[0][3]))]
        return Result(loss, self._directions(params, whitened), targets, gradients)

    def _directions(self, params: Sequence[Params], whitened: Sequence[Tensor]) -> list[Tensor]:
        """Natural gradients of the locations, inside the trust region."""
        damping, trust = self.settings.extrinsic_damping, self.settings.trust_region
        blocks = self.guide.blocks
        if damping:
            whitened = [b.damped(p, w, damping) for b, p, w in zip(blocks, params, whitened, strict=True)]
        directions = [b.spread(p, w) for b, p, w in zip(blocks, params, whitened, strict=True)]
        if trust is not None:
            size = torch.stack([w.square().sum() for w in whitened]).sum()
            numel = sum(block.numel for block in blocks)
            scale = (trust * math.sqrt(numel) / size.sqrt().clamp_min(1e-30)).clamp_max(1.0)
            directions = [direction * scale for direction in directions]
        return directions

    def _particle(
        self,
        params: Sequence[Params],
        noises: Sequence[Tensor],
        inputs: Sequence[Tensor],
        parameters: list[Tensor],
        statistics: bool,
        capture: Any,
    ) -> tuple[Tensor, list[Tensor], list[dict[str, Tensor]], list[Tensor]]:
        """Loss, whitened gradient and targets of each block, gradients of the model's parameters."""
        blocks, weight = self.guide.blocks, self.settings.kl_weight
        spreads = [block.spread(p, noise) for block, p, noise in zip(blocks, params, noises, strict=True)]
        with torch.enable_grad():
            leaves: dict[str, Tensor] = {}
            for block, p, spread in zip(blocks, params, spreads, strict=True):
                for name, value in block.split(p["loc"] + spread).items():
                    leaves[name] = value.detach().requires_grad_()
            values, jacobian = self._constrain(leaves)
            own = [parameter.detach().requires_grad_() for parameter in parameters]
            terms, env = self._terms(values, inputs, own, statistics)
            if not self.is_recorded:
                own = [site["value"].unconstrained() for site in capture.trace.nodes.values()]
                parameters[:] = own
            prior = torch.as_tensor(sum(terms.prior.values())) + jacobian
            likelihood = torch.as_tensor(sum(value.sum() for value in terms.likelihood.values()))
            names = list(leaves)
            wrt = [*leaves.values(), *own]
            of_prior = _gradients(prior, wrt)
            of_likelihood = _gradients(likelihood, wrt)
            probes = self._probes(terms, env, leaves) if statistics else None
        g_prior = dict(zip(names, of_prior, strict=False))
        g_likelihood = dict(zip(names, of_likelihood, strict=False))
        g_own = [-(a + weight * b) for a, b in zip(of_likelihood[len(names) :], of_prior[len(names) :], strict=True)]
        whitened, targets, entropy = [], [], torch.zeros_like(likelihood)
        for block, p, noise, spread in zip(blocks, params, noises, spreads, strict=True):
            total = block.join({n: g_likelihood[n] / weight + g_prior[n] for n in block.names})
            plain = block.whiten(p, total)
            whitened.append(plain + noise if self.settings.stick_the_landing else plain)
            constant = 0.5 * block.numel * math.log(2 * math.pi)
            entropy = entropy + 0.5 * noise.square().sum() + block.log_det(p) + constant
            if probes is not None:
                sample = _Sample(noise, spread, plain, g_prior, total, terms)
                targets.append(self._targets(block, p, sample, env, probes))
            else:
                targets.append({})
        loss = -(likelihood + weight * (prior + entropy))
        return loss.detach(), whitened, targets, g_own

    def _constrain(self, leaves: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | float]:
        values, jacobian = {}, 0.0
        for name, site in self.graph.structure.sites.items():
            value = leaves[name]
            if site.transform is None:
                values[name] = value
            else:
                values[name] = site.transform(value)
                jacobian = jacobian + site.transform.log_abs_det_jacobian(value, values[name]).sum()
        return values, jacobian

    def _terms(
        self, values: Mapping[str, Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor], statistics: bool
    ) -> tuple[Terms, Mapping[Any, Any]]:
        if not self.is_recorded:
            return self.graph.terms(values, inputs), {}

        def wanted(key: Key) -> bool:
            return statistics or key[0] in ("prior", "likelihood")

        keep = self.capture.sources(list(self.capture.uses)) if self.capture is not None and statistics else set()
        return self.graph(values, inputs, parameters, wanted=wanted, keep=keep)

    def _probes(self, terms: Terms, env: Mapping[Any, Any], leaves: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
        """For each probe, gradients at the outputs of layers, and at the sites that are not captured."""
        captured = self._captured()
        nodes = [] if self.capture is None else self.capture.nodes(captured)
        others = [n for n in leaves if n not in captured and n not in self.reparametrized]
        found = []
        for probe in terms.probes:
            total = torch.as_tensor(sum(value.sum() for value in probe.values()))
            gradients = _gradients(total, [*(env[node] for node in nodes), *(leaves[n] for n in others)])
            grads = dict(zip(nodes, gradients, strict=False))
            found.append((grads, dict(zip(others, gradients[len(nodes) :], strict=True))))
        return found

    def _targets(
        self, block: Block, params: Params, sample: _Sample, env: Mapping[Any, Any], probes: list[tuple[Any, Any]]
    ) -> dict[str, Tensor]:
        if all(name in self.reparametrized for name in block.names):
            return block.reparametrized_targets(sample.noise, sample.plain)
        spreads, variances = block.split(sample.spread), block.split(block.variance(params))
        totals = block.split(sample.total)
        precision = {}
        for name in block.names:
            if name in self.reparametrized:
                precision[name] = -totals[name] * spreads[name] / variances[name]
            elif name in self.known_precision:
                precision[name] = sample.terms.precision[name]
            else:  # Stein's identity: E[∂ log p(v) (v − μ)] / σ² is the mean second derivative
                precision[name] = -sample.g_prior[name] * spreads[name] / variances[name]
        curvature = Curvature(
            uses={} if self.capture is None else {n: self.capture.uses[n] for n in self._captured()},
            env=env,
            grads=[grads for grads, _ in probes],
            universal=[universal for _, universal in probes],
            precision=precision,
            weight=1.0 / self.settings.kl_weight,
        )
        return block.factored_targets(curvature) if self.settings.factored else block.targets(params, curvature)

    def _captured(self) -> list[str]:
        return [] if self.capture is None else [n for n in self.capture.uses if n not in self.reparametrized]


@dataclass
class _Sample:
    """What one draw of a block gave: its noise, the spread C(ε), whitened and plain gradients of the objective."""

    noise: Tensor
    spread: Tensor
    plain: Tensor
    g_prior: Mapping[str, Tensor]
    total: Tensor
    terms: Terms


def _gradients(total: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    if not wrt:
        return []
    if not total.requires_grad:
        return [torch.zeros_like(tensor) for tensor in wrt]
    return list(torch.autograd.grad(total, wrt, retain_graph=True, materialize_grads=True))
