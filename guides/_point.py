"""A model at one point of its latent sites, as recorded programs: loss, gradients, moments and the quadratic model.

Sums over data are on the scale of all data: plates scale the log-likelihood and the squares of the probes alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnn.data_shares import Share
from bnn.guides._estimate import gradients
from bnn.guides._kfac_blocks import Blocks, PointSettings, tensors_of
from bnn.guides._quadratic import along, inner, total_of
from bnn.minibatch import Stream
from bnn.model_graph import Key as TermKey
from bnn.model_graph import Terms
from bnn.per_datum import PerDatum, joined, per_datum, squares_per_datum
from bnn.randomness import kept_randomness
from bnn.ranks import Ranks
from bnn.recording import record
from bnn.tiers import Program, choose

# What a program gives: its kind, and the number of a block or the name of a site.
Key = tuple[str, Any]
Outputs = dict[Key, Tensor]
Values = Mapping[str, Tensor]


@dataclass
class Minibatch:
    """Inputs of a recording: rows and data, and the values of the model's own parameters.

    :ivar leaves: these parameters themselves.
    """

    inputs: list[Tensor]
    parameters: list[Tensor]
    leaves: list[Tensor] = field(default_factory=list)

    def kept(self) -> Minibatch:
        """The same with parameters that stay as they are."""
        return Minibatch(self.inputs, [parameter.clone() for parameter in self.parameters])


class Point:
    """Programs for arguments of one kind: the same shapes, and the same values of all that is no tensor.

    :param model: a Pyro model.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param settings: what is computed.
    :param ranks: the processes that share the rows out.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        settings: PointSettings,
        ranks: Ranks | None = None,
    ) -> None:
        self.share = None
        if ranks is not None:
            self.share = Share(ranks, model, args, kwargs)
            model, args, kwargs = self.share.model, self.share.args, self.share.kwargs
        self.settings, self.sites = settings, Blocks(model, args, kwargs, settings)
        self.graph, self.capture = self.sites.graph, self.sites.capture
        plates = [(plate.size, plate.batch_size) for plate in self.graph.plates]
        self._stream = Stream(plates, None, 1, device=self.graph.structure.device)
        self._programs: dict[Any, tuple[Program, list[Key]]] = {}
        if self.share is not None:
            self._stream = self.share.stream(self.graph.plates, None, 1, device=self.graph.structure.device)
            self.sites.thin.clear()  # thin factors of one rank's rows are not those of all

    def minibatch(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Minibatch:
        """The next one: rows are drawn where the model subsamples."""
        (rows,) = self._stream.next(1)
        if self.share is not None:
            args, kwargs = self.share.own(args, kwargs)
        inputs = self.graph.inputs((args, dict(kwargs)), [t[0] for t in rows])
        leaves = list(self.graph.parameters)
        return Minibatch(inputs, [leaf.detach() for leaf in leaves], leaves)

    def state(self) -> list[dict[str, Tensor]]:
        """The position in the order of rows, for a checkpoint."""
        return self._stream.rows_state()

    def load_state(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on in the order of rows of another :meth:`state`."""
        self._stream.load_rows_state(state)

    # ---- programs

    def estimate(self, values: Values, batch: Minibatch, statistics: bool, prior: bool) -> Outputs:
        """What a step needs.

        * ``("loss", "")``, and ``("size", "")``, a number that is finite if the gradients are.
        * For thin blocks ``("inputs", b)`` and ``("outputs", b)``: the gradient of the log-likelihood is outputsᵀ
          inputs; with ``prior``, ``("prior", site)``, the gradient of minus the weighted log prior.
        * For all other sites ``("gradient", site)``, that of the loss.
        * ``("parameter", k)``, that of the loss with respect to the model's own parameters.
        * With ``statistics``, ``("input_moment", b)``, ``("output_moment", b)`` and, in chains, ``("input_cross", b)``
          and ``("output_cross", b)`` with the block's successor; ``("squares", site)`` of the diagonal sites;
          ``("precision", site)`` of the prior.

        :param values: unconstrained values of the sites.
        :param batch: rows and data.
        :param statistics: whether the curvature is estimated.
        :param prior: whether thin blocks need the gradient of the log prior.
        """
        return self._run(("estimate", statistics, prior), self._estimate, values, batch, [])

    def value(self, values: Values, batch: Minibatch) -> float:
        """The loss: minus the log joint."""
        return float(self._run(("value",), self._value, values, batch, [])["loss", ""])

    def quadratic(self, values: Values, batch: Minibatch, directions: Sequence[Values]) -> tuple[Tensor, Tensor]:
        """The loss's slopes along ``directions``, and vᵀ (F + λ D) v between any two of them, on this minibatch."""
        found = self._run(("quadratic", len(directions)), self._quadratic, values, batch, directions)
        return found["slopes", ""], found["curvature", ""]

    def _run(self, *call: Any) -> Outputs:
        """What a program gives, or its mean over ranks."""
        if self.share is None:
            return self._replay(*call)
        with self.share.ranks.own_randomness():
            found = self._replay(*call)
        for name, value in found.items():
            if name[0] in ("input_moment", "input_cross"):  # means over the rows of a rank
                found[name] = value * self.share.weight
            elif name[0] == "squares" and name[1] in self.sites.missed:  # squares of sums, which count K² times
                found[name] = value / self.share.ranks.size
        return dict(zip(found, self.share.mean(list(found.values())), strict=True))

    def _replay(
        self,
        key: tuple[Any, ...],
        function: Callable[..., Outputs],
        values: Values,
        batch: Minibatch,
        directions: Sequence[Values],
    ) -> Outputs:
        values = {name: values[name].detach() for name in self.graph.structure.sites}
        if self.graph.graph is None:
            return function(key, values, batch, directions)
        names, count = list(values), len(batch.inputs)
        flat = [direction[name] for direction in directions for name in names]
        tensors = [*values.values(), *flat, *batch.inputs, *batch.parameters]
        if key not in self._programs:
            layout: list[Key] = []

            def call(*tensors: Tensor) -> tuple[Tensor, ...]:
                sites = len(names) * (1 + len(directions))
                parts = [dict(zip(names, tensors[k:], strict=False)) for k in range(0, sites, len(names))]
                rest = list(tensors[sites:])
                found = function(key, parts[0], Minibatch(rest[:count], rest[count:]), parts[1:])
                layout[:] = found
                return tuple(found.values())

            with kept_randomness():
                self._programs[key] = choose(record(call, tensors), tensors, self.settings.compile, calls=1), layout
        program, layout = self._programs[key]
        return dict(zip(layout, program(*tensors), strict=True))

    # ---- what they compute

    def _terms(
        self, leaves: Values, batch: Minibatch, own: Sequence[Tensor], probes: bool, capture: bool
    ) -> tuple[Terms, Mapping[Any, Any]]:
        transforms = self.sites.transforms
        values = {n: leaf if (t := transforms[n]) is None else t(leaf) for n, leaf in leaves.items()}
        if self.graph.graph is None:
            return self.graph.terms(values, batch.inputs), {}
        assert self.capture is not None
        keep = self.capture.sources(list(self.capture.uses)) if capture else set()
        normal = self.sites.normal

        def wanted(key: TermKey) -> bool:
            kinds = ("likelihood", "prior", "precision", "probe") if probes else ("likelihood", "prior")
            return key[0] in kinds and not (key[0] == "prior" and key[1] in normal)

        terms, env = self.graph(values, batch.inputs, own, wanted=wanted, keep=keep)
        for name, (loc, scale) in normal.items():  # one pass over a large weight, not five
            flat = leaves[name].reshape(-1) if loc == 0.0 else leaves[name].reshape(-1) - loc
            constant = flat.numel() * (math.log(scale) + 0.5 * math.log(2 * math.pi))
            fixed = flat.detach()  # w·w = 2 w·w̄ − w̄·w̄, and its gradient is one product
            squares = 2.0 * torch.dot(flat, fixed) - torch.dot(fixed, fixed)
            terms.prior[name] = squares * (-0.5 / scale**2) - constant
        return terms, env

    def _value(self, key: Any, values: Values, batch: Minibatch, directions: Sequence[Values]) -> Outputs:
        del key, directions
        terms, _ = self._terms(values, batch, batch.parameters, False, False)
        return {
            ("loss", ""): -(
                total_of(terms.likelihood.values()) + self.settings.kl_weight * total_of(terms.prior.values())
            ).detach()
        }

    def _estimate(self, key: Any, values: Values, batch: Minibatch, directions: Sequence[Values]) -> Outputs:
        _, statistics, with_prior = key
        del directions
        sites, weight = self.sites, self.settings.kl_weight
        thin = {name for number in sites.thin for name in sites.blocks[number].names}
        with torch.enable_grad():
            leaves, own = tensors_of(values), [p.detach().requires_grad_() for p in batch.parameters]
            terms, env = self._terms(leaves, batch, own, statistics, True)
            if self.graph.graph is None:
                batch.leaves = own = self.graph.seen_parameters
            likelihood, prior = total_of(terms.likelihood.values()), total_of(terms.prior.values())
            fat = {name: leaf for name, leaf in leaves.items() if name not in thin}
            nodes = [] if self.capture is None else self.capture.nodes(sorted(thin))
            of_loss = gradients(-(likelihood + weight * prior), [*fat.values(), *own])
            of_likelihood = gradients(likelihood, [env[node] for node in nodes])
            of_prior = gradients(-weight * prior, [leaves[n] for n in leaves if n in thin]) if with_prior else []
            result: Outputs = {("loss", ""): -(likelihood + weight * prior)}
            if statistics:
                result |= self._statistics(terms, env, leaves)
        result |= {("gradient", name): grad for name, grad in zip(fat, of_loss, strict=False)}
        result |= {("parameter", k): grad for k, grad in enumerate(of_loss[len(fat) :])}
        result |= {("prior", n): g for n, g in zip([n for n in leaves if n in thin], of_prior, strict=False)}
        grads = dict(zip(nodes, of_likelihood, strict=True))
        sizes = [grad.square().sum() for grad in [*of_loss[: len(fat)], *of_likelihood]]
        for number in sorted(sites.thin):
            pieces = self._per_datum(number, env, grads).pieces
            result["inputs", number] = joined([a.flatten(0, 1) for a, _ in pieces])
            result["outputs", number] = joined([g.flatten(0, 1) for _, g in pieces])
        result["size", ""] = torch.stack(sizes).sum()
        return {name: tensor.detach() for name, tensor in result.items()}

    def _per_datum(self, number: int, env: Mapping[Any, Any], grads: Mapping[Any, Tensor]) -> PerDatum:
        block = self.sites.blocks[number]
        return per_datum(self.sites.uses(number), block.places(), (block.rows, block.cols), env, grads)

    def _statistics(self, terms: Terms, env: Mapping[Any, Any], leaves: Values) -> Outputs:
        sites, capture = self.sites, self.capture
        captured = [] if capture is None else [n for n in capture.uses if n not in sites.missed]
        nodes = [] if capture is None else capture.nodes(captured)
        universal = [n for n in leaves if n not in captured and n not in sites.missed]
        flip = bool(universal) and self.settings.curvature != "sampled"
        result: Outputs = {}
        squares = {name: torch.zeros_like(leaves[name]) for name in sites.diagonal}
        for k, probe in enumerate(terms.probes):
            total = total_of(_signed(value) if flip else value for value in probe.values())
            found = gradients(total, [*(env[node] for node in nodes), *(leaves[n] for n in universal)])
            grads = dict(zip(nodes, found, strict=False))
            for name, gradient in zip(universal, found[len(nodes) :], strict=True):
                squares[name] = squares[name] + gradient.square()
            for name in captured:
                if capture is not None and name in squares:
                    numel, like = leaves[name].numel(), leaves[name]
                    one = squares_per_datum(capture.uses[name], name, numel, env, grads)
                    squares[name] = squares[name] + one.reshape(like.shape)
            data = [self._per_datum(number, env, grads) for number in range(len(sites.blocks))]
            self._add_moments(result, data, first=k == 0)
        if sites.missed:  # observed labels, with a random sign for each: squares of the sum are sums of squares
            total = total_of(_signed(value) for value in terms.likelihood.values())
            names = sorted(sites.missed)
            for name, gradient in zip(names, gradients(total, [leaves[n] for n in names]), strict=True):
                squares[name] = gradient.square()
        result |= {("squares", name): value for name, value in squares.items()}
        precision = self._precision(terms, leaves)
        result |= {("precision", n): p if n in squares else p.mean() for n, p in precision.items()}
        return result

    def _add_moments(self, result: Outputs, data: Sequence[PerDatum], first: bool) -> None:
        """Inputs are the same for all probes; what the probes have at the outputs adds up."""
        new: Outputs = {}
        for number, found in enumerate(data):
            outputs = joined([g.flatten(0, 1) for _, g in found.pieces])
            new["output_moment", number] = outputs.mT @ outputs
            if first:
                inputs = joined([a.flatten(0, 1) for a, _ in found.pieces])
                result["input_moment", number] = (inputs / len(inputs)).mT @ inputs
        for chain in self.sites.chains:
            for number, successor in zip(chain, chain[1:], strict=False):
                (a, g), (b, h) = data[number].pieces[0], data[successor].pieces[0]
                new["output_cross", number] = g[:, 0].mT @ h[:, 0]
                if first:
                    result["input_cross", number] = (a[:, 0] / len(a)).mT @ b[:, 0]
        for name, value in new.items():
            result[name] = result[name] + value if name in result else value

    def _precision(self, terms: Terms, leaves: Values) -> dict[str, Tensor]:
        """λ D: a Normal prior's precision; else the size of the second derivatives, for elementwise priors."""
        weight, known = self.settings.kl_weight, self.sites.known_precision
        result = {name: weight * terms.precision[name] for name in leaves if name in known}
        others = {name: leaf for name, leaf in leaves.items() if name not in known}
        prior = total_of(terms.prior.values())
        if others and prior.requires_grad:
            first = torch.autograd.grad(prior, list(others.values()), create_graph=True, materialize_grads=True)
            for (name, leaf), gradient in zip(others.items(), first, strict=True):
                (second,) = gradients(gradient.sum(), [leaf])
                result[name] = weight * second.abs()
        return {name: result.get(name, torch.zeros_like(leaf)) for name, leaf in leaves.items()}

    def _quadratic(self, key: Any, values: Values, batch: Minibatch, directions: Sequence[Values]) -> Outputs:
        del key
        missed = self.sites.missed
        with torch.enable_grad():
            leaves = tensors_of(values)
            terms, _ = self._terms(leaves, batch, batch.parameters, True, False)
            loss = -(total_of(terms.likelihood.values()) + self.settings.kl_weight * total_of(terms.prior.values()))
            slopes = dict(zip(leaves, gradients(loss, list(leaves.values())), strict=True))
            precision = self._precision(terms, leaves)
            probes = [value for probe in terms.probes for value in probe.values()]
            moved = along(probes, {n: leaf for n, leaf in leaves.items() if n not in missed}, directions)
            others = along(list(terms.likelihood.values()), {n: leaves[n] for n in missed}, directions)
        weighted = [{n: v[n] * precision[n] for n in leaves} for v in directions]
        prior = torch.stack([torch.stack([inner(v, w) for w in directions]) for v in weighted])
        curvature = moved @ moved.mT + others @ others.mT + prior
        slope = torch.stack([inner(slopes, v) for v in directions])
        return {("slopes", ""): slope.detach(), ("curvature", ""): curvature.detach()}


def _signed(value: Tensor) -> Tensor:
    return value * (torch.randint(2, value.shape, dtype=value.dtype, device=value.device) * 2 - 1)
