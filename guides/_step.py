"""One step of natural-gradient variational inference, recorded once and replayed.

A step draws the latent sites from the guide, runs the model's recorded graph, and differentiates it: once for the
log-likelihood, once for the log prior, and, where statistics are due, once for each probe of the curvature. What comes
out are the loss and the natural gradients. A model that cannot be recorded takes the same steps by Pyro's handlers.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnn.data_shares import Share
from bnn.guides._base import NaturalGuide
from bnn.guides._blocks import Params
from bnn.guides._estimate import Estimate, Estimator, Settings
from bnn.guides._thin import Thin
from bnn.minibatch import Stream
from bnn.model_graph import ModelGraph
from bnn.noise import Noise
from bnn.randomness import kept_randomness
from bnn.ranks import Ranks
from bnn.recording import record
from bnn.tiers import Program, choose

# Targets that are means over rows, not sums.
MEANS = ("col_moment",)


@dataclass
class Result:
    """What one step gives.

    :ivar loss: minus the objective.
    :ivar size: ∇ᵀ Σ ∇, the squared length of the step at rate 1 in standard deviations of q.
    :ivar directions: per block, minus the natural gradient of the location.
    :ivar priors: for blocks whose direction is computed from thin factors, the prior's part.
    :ivar targets: per block, what the scale parameters are drawn to; empty without statistics.
    :ivar parameters: gradients of the loss with respect to the model's parameters.
    """

    loss: Tensor
    size: Tensor
    directions: list[Tensor]
    priors: dict[int, tuple[Tensor, Tensor]]
    targets: list[dict[str, Tensor]]
    parameters: list[Tensor]


@dataclass
class _Recorded:
    """A program, and how its outputs are to be read."""

    program: Program
    layout: list[Any] = field(default_factory=list)


class Step:
    """Steps on arguments of one kind: the same shapes and the same values of all that is no tensor.

    :param model: a Pyro model.
    :param guide: a guide that has been set up.
    :param args: the model's arguments.
    :param kwargs: the model's keyword arguments.
    :param settings: what is computed.
    :param ranks: the processes that share the rows out.
    :raises ValueError: if curvature cannot be had for a likelihood, or guide and model differ in their sites.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: NaturalGuide,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        settings: Settings,
        ranks: Ranks | None = None,
    ) -> None:
        self.guide, self.settings, self.share = guide, settings, None
        if ranks is not None:
            self.share = Share(ranks, model, args, kwargs)
            model, args, kwargs = self.share.model, self.share.args, self.share.kwargs
        probes = None if settings.curvature == "reparametrization" else settings.curvature
        with kept_randomness():
            self.graph = ModelGraph(model, args, kwargs, curvature=probes, label_samples=settings.label_samples)
            device = self.graph.structure.device
            rows = [torch.arange(plate.batch_size, device=device) for plate in self.graph.plates]
            inputs = [*rows, *self.graph.data]
            if self.graph.graph is None:
                self.graph.terms(self.graph.values_at_recording, inputs)
            self._check(guide)
            self.estimator = Estimator(self.graph, guide, settings, inputs)
        plates = [(plate.size, plate.batch_size) for plate in self.graph.plates]
        self._stream = Stream(plates, None, 1, device=device)
        if self.share is not None:
            self._stream = self.share.stream(self.graph.plates, None, 1, device=device)
            self.estimator.thin.clear()  # thin factors of one rank's rows give no size of the whole step
        self._programs: dict[Any, _Recorded] = {}
        self._noises: list[Tensor] = []
        alike = len({site.dtype for site in self.graph.structure.sites.values()}) == 1 and self.share is None
        self._noise = Noise(self.graph.structure.dtype, device, settings.compile if alike else "fx")
        self.forgotten: list[str] = []

    @property
    def is_recorded(self) -> bool:
        """Whether the model's graph is replayed, not Pyro's handlers."""
        return self.graph.graph is not None

    def _check(self, guide: NaturalGuide) -> None:
        for name, why in self.graph.cannot_label.items():
            raise ValueError(
                f"the curvature of observed site {name!r} cannot be estimated: {why}. Choose another curvature: "
                "'empirical' uses the observed labels (biased), 'reparametrization' needs no labels."
            )
        shapes = {name: tuple(site.shape) for name, site in self.graph.structure.sites.items()}
        own, known = list(shapes), {site.name: tuple(site.shape) for block in guide.blocks for site in block.sites}
        missing, extra = sorted(set(known) - set(own)), [name for name in own if name not in known]
        if missing or extra:
            raise ValueError(
                f"guide and model differ in their latent sites: only the guide has {missing}, only the model {extra}. "
                "Make the guide from the model that SVI gets, and make a new one when the model's sites change."
            )
        for name, shape in shapes.items():
            if known[name] != shape:
                raise ValueError(
                    f"site {name!r} has shape {known[name]} in the guide, but {shape} in the model: this guide was set "
                    "up for another net. Make a new guide from this model."
                )
        if self.graph.graph is None:
            warnings.warn(
                "the model cannot be recorded and runs with Pyro's handlers, several times slower, with curvature from "
                f"whole-batch gradients: {self.graph.cause}.",
                RuntimeWarning,
                stacklevel=6,
            )

    def __call__(
        self,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        params: Sequence[Params],
        statistics: bool,
        priors: Mapping[int, tuple[Tensor, Tensor]],
    ) -> tuple[Result, list[Tensor]]:
        """One step, and the leaf tensors of the model's parameters.

        :param args: the model's arguments.
        :param kwargs: the model's keyword arguments.
        :param params: constrained parameters of each block.
        :param statistics: whether the curvature is estimated.
        :param priors: parts of the directions that are known from an earlier step.
        """
        (rows,) = self._stream.next(1)
        args, kwargs = (args, dict(kwargs)) if self.share is None else self.share.own(args, kwargs)
        inputs = self.graph.inputs((args, kwargs), [t[0] for t in rows])
        noises = self._draw(params, statistics)
        if not self.is_recorded:
            return self._by_handlers(params, noises, inputs, statistics)
        priors = {number: priors[number] for number in sorted(self.estimator.thin) if number in priors}
        leaves = self.graph.parameters
        flat = [tensor for p in params for tensor in p.values()]
        both = [tensor for pair in priors.values() for tensor in pair]
        tensors = [*flat, *noises, *inputs, *both, *(leaf.detach() for leaf in leaves)]
        key = (statistics, tuple(priors))
        if key not in self._programs:
            self._programs[key] = self._record(
                [list(p) for p in params], len(inputs), statistics, list(priors), tensors
            )
        recorded = self._programs[key]
        if self.share is None:
            return _unflatten(recorded.program(*tensors), recorded.layout), leaves
        with self.share.ranks.own_randomness():
            found = recorded.program(*tensors)
        return self._over_ranks(params, noises, _estimates(found, recorded.layout)), leaves

    def check(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], params: Sequence[Params]) -> dict[str, str]:
        """Compare captured gradients with autograd's at the present guide; sites that differ are not captured any more.

        :returns: site -> what differs.
        """
        capture = self.estimator.capture
        if capture is None or not capture.uses:
            return {}
        device = self.graph.structure.device
        rows = [torch.arange(plate.batch_size, device=device) for plate in self.graph.plates]
        if self.share is not None:
            args, kwargs = self.share.own(args, kwargs)
        inputs = self.graph.inputs((args, dict(kwargs)), rows)
        leaves = {n: v for b, p in zip(self.guide.blocks, params, strict=True) for n, v in b.split(p["loc"]).items()}
        values = {name: site.constrain(leaves[name]) for name, site in self.graph.structure.sites.items()}
        wrong = capture.recheck(values, inputs, self.graph.parameters)
        if wrong:
            self._forget(wrong)
        return wrong

    def _forget(self, names: Iterable[str]) -> None:
        self.forgotten += names
        self.estimator.forget(self.forgotten)
        self._programs.clear()

    def state(self) -> dict[str, Any]:
        """For a checkpoint: the position in the order of rows, sites that are not captured any more, the noise."""
        rows = self._stream.rows_state()
        return {"rows": rows, "forgotten": list(self.forgotten), "noise": self._noise.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from another step's :meth:`state`."""
        self._stream.load_rows_state(state["rows"])
        self._noise.load_state(state["noise"])
        if state["forgotten"] and self.estimator.capture is not None:
            for name in state["forgotten"]:
                self.estimator.capture.uses.pop(name, None)
            self._forget(state["forgotten"])

    def _draw(self, params: Sequence[Params], statistics: bool) -> list[Tensor]:
        """Standard normal numbers for each block, into memory that stays; none where layers draw their own."""
        count = self.settings.num_particles
        if self._noise.is_compiled:
            return list(self._noise.draw(tuple((count, *p["loc"].shape) for p in params)))
        if not self._noises:
            self._noises = [p["loc"].new_empty((count, *p["loc"].shape)) for p in params]
        local = self.settings.noise == "local" and not statistics
        for block, noise in zip(self.guide.blocks, self._noises, strict=True):
            if not (local and self.estimator.draws_own_noise(block)):
                noise.normal_()
        return self._noises

    def _record(
        self, keys: list[list[str]], count: int, statistics: bool, known: list[int], tensors: list[Tensor]
    ) -> _Recorded:
        layout: list[Any] = []

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            feed = iter(tensors)
            params = [{name: next(feed) for name in block} for block in keys]
            noises = [next(feed) for _ in keys]
            inputs = [next(feed) for _ in range(count)]
            priors = {number: (next(feed), next(feed)) for number in known}
            own = list(feed)
            particles = [
                self.estimator(params, [n[k] for n in noises], inputs, own, statistics, priors)
                for k in range(self.settings.num_particles)
            ]
            if self.share is not None:  # what follows is no linear function of the rows
                outputs, layout[:] = _flattened(particles)
                return tuple(outputs)
            outputs, layout[:] = _flatten(self._combine(params, particles))
            return tuple(outputs)

        with kept_randomness():  # a run that resumes here draws what the first one drew
            program = choose(record(function, tensors), tensors, self.settings.compile, calls=1)
        return _Recorded(program, layout)

    def _by_handlers(
        self, params: Sequence[Params], noises: Sequence[Tensor], inputs: Sequence[Tensor], statistics: bool
    ) -> tuple[Result, list[Tensor]]:
        particles = [
            self.estimator(params, [n[k] for n in noises], inputs, [], statistics, {})
            for k in range(self.settings.num_particles)
        ]
        leaves = self.graph.seen_parameters
        if self.share is not None:
            return self._over_ranks(params, noises, particles), leaves
        return self._combine(params, particles), leaves

    def _over_ranks(self, params: Sequence[Params], noises: Sequence[Tensor], particles: list[Estimate]) -> Result:
        """Estimates of all rows: the mean over ranks of those of each, which are linear in the rows."""
        assert self.share is not None
        outputs, layout = _flattened(particles)
        share, names = self.share, _names_of(layout)
        if share.weight != 1.0:  # means over the rows of a rank
            outputs = [t * share.weight if n in MEANS else t for t, n in zip(outputs, names, strict=True)]
        particles = _estimates(share.mean(outputs), layout)
        for k, particle in enumerate(particles):
            self.estimator.finish([noise[k] for noise in noises], particle)
        return self._combine(params, particles)

    def _combine(self, params: Sequence[Params], particles: Sequence[Estimate]) -> Result:
        """The mean over particles, its natural directions, and the trust region."""
        settings = self.settings
        directions: list[Tensor] = []
        sizes: list[Tensor] = []
        priors: dict[int, tuple[Tensor, Tensor]] = {}
        for number, (block, p) in enumerate(zip(self.guide.blocks, params, strict=True)):
            found = [particle.whitened[number] for particle in particles]
            thin = [one for one in found if isinstance(one, Thin)]
            if thin:
                directions.append(_mean([one.direction for one in thin]))
                sizes.append(_mean([one.decrement for one in thin]))
                priors[number] = thin[0].prior, thin[0].prior_decrement
                continue
            whitened = _mean([one for one in found if isinstance(one, Tensor)])
            if settings.extrinsic_damping:
                whitened = block.damped(p, whitened, settings.extrinsic_damping)
            directions.append(block.spread(p, whitened))
            sizes.append(whitened.square().sum())
        size = torch.stack(sizes).sum()
        if settings.trust_region is not None:
            root = math.sqrt(sum(block.numel for block in self.guide.blocks))
            scale = (settings.trust_region * root / size.sqrt().clamp_min(1e-30)).clamp_max(1.0)
            directions = [direction * -scale for direction in directions]
        else:
            directions = [-direction for direction in directions]
        targets = [
            {name: _mean([particle.targets[number][name] for particle in particles]) for name in block}
            for number, block in enumerate(particles[0].targets)
        ]
        own = [_mean([particle.parameters[k] for particle in particles]) for k in range(len(particles[0].parameters))]
        return Result(_mean([particle.loss for particle in particles]), size, directions, priors, targets, own)


def _flattened(particles: Sequence[Estimate]) -> tuple[list[Tensor], list[Any]]:
    outputs: list[Tensor] = []
    layout: list[Any] = []
    for one in particles:
        outputs += [one.loss, *(w for w in one.whitened if isinstance(w, Tensor))]
        outputs += [tensor for block in one.targets for tensor in block.values()]
        outputs += one.parameters
        layout.append((len(one.whitened), [list(block) for block in one.targets], len(one.parameters)))
    return outputs, layout


def _names_of(layout: Sequence[Any]) -> list[str]:
    """Names of the flattened tensors, those of targets; empty for the others."""
    names: list[str] = []
    for blocks, targets, own in layout:
        names += ["", *[""] * blocks, *(name for block in targets for name in block), *[""] * own]
    return names


def _estimates(outputs: Sequence[Tensor], layout: Sequence[Any]) -> list[Estimate]:
    feed = iter(outputs)
    found = []
    for blocks, targets, own in layout:
        loss, whitened = next(feed), [next(feed) for _ in range(blocks)]
        found.append(
            Estimate(
                loss,
                [*whitened],
                [{n: next(feed) for n in block} for block in targets],
                [next(feed) for _ in range(own)],
            )
        )
    return found


def _mean(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(0)


def _flatten(result: Result) -> tuple[list[Tensor], list[Any]]:
    layout = [len(result.directions), list(result.priors), [list(block) for block in result.targets]]
    targets = [tensor for block in result.targets for tensor in block.values()]
    both = torch.stack([result.loss, result.size])
    return [
        both,
        *result.directions,
        *(tensor for pair in result.priors.values() for tensor in pair),
        *targets,
        *result.parameters,
    ], layout


def _unflatten(outputs: Sequence[Tensor], layout: list[Any]) -> Result:
    feed = iter(outputs)
    loss, size = next(feed).unbind()
    directions = [next(feed) for _ in range(layout[0])]
    priors = {number: (next(feed), next(feed)) for number in layout[1]}
    targets = [{name: next(feed) for name in block} for block in layout[2]]
    return Result(loss, size, directions, priors, targets, list(feed))
