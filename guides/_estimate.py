"""What one draw of the latent sites says about the objective: its value, gradients, and curvature."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.curvature import Capture
from bnn.guides._base import NaturalGuide
from bnn.guides._blocks import Block, Curvature, Params
from bnn.guides._perturbed import Layer, Perturbation, layers_of
from bnn.guides._site_roles import roles_of
from bnn.guides._thin import Thin, is_thin, thin_direction
from bnn.model_graph import Key, ModelGraph, Terms


@dataclass(frozen=True)
class Settings:
    """What a step depends on besides model, guide and shapes."""

    curvature: str
    label_samples: int
    kl_weight: float
    stick_the_landing: bool
    factored: bool
    extrinsic_damping: float
    trust_region: float | None
    noise: str
    num_particles: int
    vectorize_particles: bool
    compile: str


@dataclass
class Estimate:
    """What one draw gives.

    :ivar loss: minus the objective.
    :ivar whitened: per block, the whitened gradient of its location; for a thin block, its direction instead.
    :ivar targets: per block, what the scale parameters are drawn to; empty without statistics.
    :ivar parameters: gradients of the loss with respect to the model's parameters.
    """

    loss: Tensor
    whitened: list[Tensor | Thin]
    targets: list[dict[str, Tensor]]
    parameters: list[Tensor]


class Estimator:
    """Estimates for one model, guide and set of settings.

    :param graph: the model's graph.
    :param guide: the guide.
    :param settings: what is computed.
    :param inputs: example rows and data.
    :ivar perturbed: sites whose noise is put at the outputs of layers.
    :ivar thin: numbers of the blocks whose direction is computed from thin factors.
    :ivar covariances: numbers of the blocks whose covariances are needed besides their factors.
    :ivar reasons: site -> why its gradients per datum are not captured.
    """

    def __init__(self, graph: ModelGraph, guide: NaturalGuide, settings: Settings, inputs: Sequence[Tensor]) -> None:
        self.graph, self.guide, self.settings = graph, guide, settings
        self.capture: Capture | None = None
        self.reparametrized: set[str] = set()
        self.known_precision: set[str] = set()
        # Priors N(m, s²) of fixed numbers: their density and gradient need no graph.
        self.fixed: dict[str, tuple[float, float]] = {}
        self.perturbed: dict[str, list[Layer]] = {}
        self.thin: set[int] = set()
        self.covariances: set[int] = set()
        self.reasons: dict[str, str] = {}
        if graph.graph is not None:
            self._inspect(inputs)

    # ---- which site is treated how

    def _inspect(self, inputs: Sequence[Tensor]) -> None:
        roles, everything = roles_of(self.graph), self.settings.curvature == "reparametrization"
        self.reparametrized = set(self.graph.structure.sites) if everything else roles.behind_factors
        self.known_precision, self.fixed = roles.known_precision, roles.fixed
        if everything:
            return
        self.capture = Capture(self.graph, inputs, self.graph.parameters)
        self.reasons = {n: why for n, why in self.capture.unrecognised.items() if n not in self.reparametrized}
        if self.settings.noise != "weights":
            self._choose_perturbed()

    def _choose_perturbed(self) -> None:
        """Captured sites with a fixed Normal prior, whose divergence is known."""
        assert self.capture is not None
        captured = [name for name in self.captured() if name in self.fixed]
        uses = {name: self.capture.uses[name] for name in captured}
        for number, block in enumerate(self.guide.blocks):
            for names in _groups(block):
                layers = layers_of(block, names, {name: uses[name] for name in names if name in uses})
                if layers is not None and (self.settings.noise != "shared" or is_thin(block, layers)):
                    self.perturbed.update(dict.fromkeys(names, layers))
            if block.names[0] not in self.perturbed:
                continue
            if not self.settings.extrinsic_damping and is_thin(block, self.perturbed[block.names[0]]):
                self.thin.add(number)
            if number in self.thin or (block.family == "matrix" and self.settings.noise == "local"):
                self.covariances.add(number)

    def captured(self) -> list[str]:
        """Sites whose gradients per datum are captured; of a weight and its bias both or none."""
        if self.capture is None:
            return []
        known = {name for name in self.capture.uses if name not in self.reparametrized}
        groups = [group for block in self.guide.blocks for group in _groups(block)]
        return [name for group in groups if known.issuperset(group) for name in group]

    @property
    def all_captured(self) -> bool:
        """Whether no site needs whole-batch gradients."""
        known = {*self.captured(), *self.reparametrized}
        return all(name in known for block in self.guide.blocks for name in block.names)

    def forget(self, names: Container[str]) -> None:
        """Noise of these sites goes to their weights again."""
        for number, block in enumerate(self.guide.blocks):
            for group in _groups(block):
                if any(name in names for name in group):
                    self.thin.discard(number)
                    self.covariances.discard(number)
                    for name in group:
                        self.perturbed.pop(name, None)

    def draws_own_noise(self, block: Block) -> bool:
        """Whether a step with local noise needs no noise for the block's weights."""
        layers = [layer for name in block.names for layer in self.perturbed.get(name, ())]
        return all(name in self.perturbed for name in block.names) and all(layer.is_local for layer in layers)

    # ---- one draw

    def __call__(
        self,
        params: Sequence[Params],
        noises: Sequence[Tensor],
        inputs: Sequence[Tensor],
        parameters: list[Tensor],
        statistics: bool,
        prior_directions: Mapping[int, tuple[Tensor, Tensor]],
    ) -> Estimate:
        """The estimate at one draw.

        :param params: constrained parameters of each block.
        :param noises: standard normal numbers in the shape of each block.
        :param inputs: rows and data.
        :param parameters: values of the model's parameters.
        :param statistics: whether curvature is estimated.
        :param prior_directions: for thin blocks, the prior's part of the direction and its size if they are known.
        """
        blocks, weight = self.guide.blocks, self.settings.kl_weight
        draws = [self._spread(block, p, noise) for block, p, noise in zip(blocks, params, noises, strict=True)]
        perturbation = self._perturbation(params, noises, statistics) if self.perturbed else None
        with torch.enable_grad():
            leaves: dict[str, Tensor] = {}
            for block, p, (spread, _) in zip(blocks, params, draws, strict=True):
                for name, value in block.split(p["loc"] if spread is None else p["loc"] + spread).items():
                    leaves[name] = value.detach().requires_grad_()
            values, jacobian = self._constrain(leaves)
            own = [parameter.detach().requires_grad_() for parameter in parameters]
            terms, env = self._terms(values, inputs, own, statistics, perturbation)
            if self.graph.graph is None:
                own = self.graph.seen_parameters
            prior = torch.as_tensor(sum(terms.prior.values(), start=torch.as_tensor(jacobian)))
            likelihood = torch.as_tensor(sum(value.sum() for value in terms.likelihood.values()))
            thin_names = [name for number in sorted(self.thin) for name in blocks[number].names]
            nodes = [] if self.capture is None else self.capture.nodes(thin_names)
            fat = {name: leaf for name, leaf in leaves.items() if name not in thin_names}
            free = {name: leaf for name, leaf in leaves.items() if name not in self.fixed}
            of_prior = gradients(prior, [*free.values(), *own])
            of_likelihood = gradients(likelihood, [*fat.values(), *own, *(env[node] for node in nodes)])
            probes = self._probes(terms, env, leaves) if statistics else None
        g_prior = dict(zip(free, of_prior, strict=False))
        for name, (mean, deviation) in self.fixed.items():
            known = prior_directions.get(next(k for k, b in enumerate(blocks) if name in b.names))
            distance = leaves[name].detach() - mean if mean else leaves[name].detach()
            constant = math.log(deviation) + 0.5 * math.log(2 * math.pi)
            prior = prior - 0.5 / deviation**2 * _squared_norm(distance) - distance.numel() * constant
            if known is None:
                g_prior[name] = distance * (-1.0 / deviation**2)
        g_likelihood = dict(zip(fat, of_likelihood, strict=False))
        g_nodes = dict(zip(nodes, of_likelihood[len(fat) + len(own) :], strict=True))
        g_own = zip(of_likelihood[len(fat) : len(fat) + len(own)], of_prior[len(free) :], strict=True)
        result = Estimate(likelihood, [], [], [-(a + weight * b) for a, b in g_own])
        entropy = torch.zeros_like(likelihood)
        for number, (block, p, noise, (spread, landing)) in enumerate(zip(blocks, params, noises, draws, strict=True)):
            entropy = entropy + self._entropy(block, p, landing)
            if number in self.thin:
                layers, known = self.perturbed[block.names[0]], prior_directions.get(number)
                prior_gradient = block.join(g_prior) if known is None else None
                result.whitened.append(thin_direction(p, layers, env, g_nodes, weight, prior_gradient, known))
                plain = noise
                total = noise
            else:
                total = block.join({n: g_likelihood[n] / weight + g_prior[n] for n in block.names})
                plain = block.whiten(p, total)
                lands = self.settings.stick_the_landing and landing is not None
                result.whitened.append(plain + landing if lands and landing is not None else plain)
            sample = _Sample(noise, spread, plain, g_prior, total, terms)
            result.targets.append({} if probes is None else self._targets(block, p, sample, env, probes))
        result.loss = (-(likelihood + weight * (prior + entropy))).detach()
        return result

    def _spread(self, block: Block, params: Params, noise: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """What is added to the location, and the noise that sticks the landing: none where layers get the noise."""
        apart = [name in self.perturbed for name in block.names]
        if all(apart):
            return None, None
        if not any(apart):
            return block.spread(params, noise), noise
        ones = block.split(torch.ones_like(noise))
        mask = block.join({name: one * (name not in self.perturbed) for name, one in ones.items()})
        return block.spread(params, noise) * mask, noise * mask

    def _perturbation(self, params: Sequence[Params], noises: Sequence[Tensor], statistics: bool) -> Perturbation:
        # Fresh noise per output has no weights to differentiate through: squares of its gradients are too small.
        kind = "flipout" if self.settings.noise == "local" and statistics else self.settings.noise
        perturbation = Perturbation(kind)
        for block, p, noise in zip(self.guide.blocks, params, noises, strict=True):
            for names in _groups(block):
                if names[0] in self.perturbed:
                    perturbation.add(self.perturbed[names[0]], block.factors(p, noise, names))
        return perturbation

    def _entropy(self, block: Block, params: Params, landing: Tensor | None) -> Tensor:
        """−log q at the draw; where layers get the noise, the part of −KL that log p at the location leaves out."""
        result = block.log_det(params) + 0.5 * block.numel * math.log(2 * math.pi)
        if landing is not None:
            result = result + 0.5 * landing.square().sum()
        names = [name for name in block.names if name in self.perturbed]
        if names:
            variances = block.total_variances(params)
            for name in names:
                result = result + 0.5 * (block.numel_of(name) - variances[name] / self.fixed[name][1] ** 2)
        return result

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
        self,
        values: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        statistics: bool,
        perturbation: Perturbation | None,
    ) -> tuple[Terms, Mapping[Any, Any]]:
        if self.graph.graph is None:
            return self.graph.terms(values, inputs), {}

        def wanted(key: Key) -> bool:
            kind, name, _ = key
            if kind in ("prior", "precision") and name in self.fixed:
                return False
            if kind == "universal" and self.all_captured:
                return False
            return statistics or kind in ("prior", "likelihood")

        sites = list(self.capture.uses) if self.capture is not None and (statistics or self.thin) else []
        keep = self.capture.sources(sites) if self.capture is not None else set()
        return self.graph(values, inputs, parameters, wanted=wanted, keep=keep, after=perturbation)

    # ---- curvature

    def _probes(self, terms: Terms, env: Mapping[Any, Any], leaves: Mapping[str, Tensor]) -> list[tuple[Any, Any]]:
        """For each probe, gradients at the outputs of layers, and at the sites that are not captured."""
        captured = self.captured()
        nodes = [] if self.capture is None else self.capture.nodes(captured)
        others = [n for n in leaves if n not in captured and n not in self.reparametrized]
        found: list[tuple[Any, Any]] = []
        for probe in terms.probes if nodes else ():
            total = torch.as_tensor(sum(value.sum() for value in probe.values()))
            found.append((dict(zip(nodes, gradients(total, [env[node] for node in nodes]), strict=True)), {}))
        for probe in terms.universal if others else ():
            total = torch.as_tensor(sum(value.sum() for value in probe.values()))
            found.append(({}, dict(zip(others, gradients(total, [leaves[n] for n in others]), strict=True))))
        return found

    def _targets(
        self, block: Block, params: Params, sample: _Sample, env: Mapping[Any, Any], probes: list[tuple[Any, Any]]
    ) -> dict[str, Tensor]:
        if all(name in self.reparametrized for name in block.names):
            return block.reparametrized_targets(sample.noise, self._bounded(block, sample))
        precision: dict[str, Tensor] = {}
        numbers: dict[float, Tensor] = {}
        for name in block.names:
            if name in self.fixed and name not in self.reparametrized:
                deviation = self.fixed[name][1]
                numbers.setdefault(deviation, sample.noise.new_full((), deviation**-2))
                precision[name] = numbers[deviation]
                continue
            if name in self.known_precision and name not in self.reparametrized:
                precision[name] = sample.terms.precision[name]
                continue
            # Stein's identity: E[∂ log p(v) (v − μ)] / σ² is the mean second derivative
            assert sample.spread is not None
            slope = block.split(sample.total)[name] if name in self.reparametrized else sample.g_prior[name]
            precision[name] = -slope * block.split(sample.spread)[name] / block.split(block.variance(params))[name]
        curvature = Curvature(
            uses={} if self.capture is None else {n: self.capture.uses[n] for n in self.captured()},
            env=env,
            grads=[grads for grads, _ in probes],
            universal=[universal for _, universal in probes],
            precision=precision,
            weight=1.0 / self.settings.kl_weight,
        )
        factored = self.settings.factored and block.family == "matrix"
        return block.factored_targets(curvature) if factored else block.targets(params, curvature)

    def _bounded(self, block: Block, sample: _Sample) -> Tensor:
        """The whitened gradient inside the trust region: far from the optimum its square says nothing of curvature."""
        trust = self.settings.trust_region
        if trust is None:
            return sample.plain
        size = torch.linalg.vector_norm(sample.plain + sample.noise).clamp_min(1e-30)
        return sample.plain * (trust * math.sqrt(block.numel) / size).clamp_max(1.0)


@dataclass
class _Sample:
    """One draw of a block: its noise ε, the spread C(ε), whitened and plain gradients of the objective."""

    noise: Tensor
    spread: Tensor | None
    plain: Tensor
    g_prior: Mapping[str, Tensor]
    total: Tensor
    terms: Terms


def _groups(block: Block) -> list[list[str]]:
    """Sites that get their noise together."""
    return [[name] for name in block.names] if block.family == "factorized" else [block.names]


def gradients(total: Tensor, wrt: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of ``total``, zero where it does not depend."""
    if not wrt:
        return []
    if not total.requires_grad:
        return [torch.zeros_like(tensor) for tensor in wrt]
    return list(torch.autograd.grad(total, wrt, retain_graph=True, materialize_grads=True))


def _squared_norm(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x).square()
