"""Gradients per datum of the log-likelihood, captured where a model uses its weights.

One backward pass gives the gradients g at the outputs of all layers; with the layers' inputs a, datum n has
G_n = Σ_l g_nl a_nlᵀ over the places l at which it meets the weight (time steps, locations, repeated use).
Everything a natural gradient needs is a sum over n of products of these, and is computed from a and g
(Martens and Grosse 2015; for convolutions, Grosse and Martens 2016).

Which rows of a layer belong to which datum is found by weighting the data at random and seeing which weight each row's
gradient takes up. What was found is compared with autograd, again under random weights, so that a wrong match shows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from bnn.layers import Use, Uses, uses_of
from bnn.model_graph import ModelGraph, Terms, reaching
from bnn.per_datum import Block
from bnn.randomness import kept_randomness

TOLERANCE = {torch.float32: 2e-3, torch.float64: 1e-8}


class Capture:
    """Uses of the latent sites of a recorded model, and whose datum each of their rows is.

    :param graph: a recorded model with probes.
    :param inputs: rows and data to try it on.
    :param parameters: values of the model's parameters.
    :ivar uses: site -> its uses with the block of data that each serves.
    :ivar unrecognised: site -> why its gradients per datum cannot be captured.
    :ivar unused: sites that the likelihood does not depend on.
    """

    def __init__(self, graph: ModelGraph, inputs: Sequence[Tensor], parameters: Sequence[Tensor]) -> None:
        assert graph.graph is not None
        self.graph = graph
        self.uses: dict[str, list[tuple[Use, Block]]] = {}
        self.unrecognised: dict[str, str] = {}
        self.unused: set[str] = set()
        output = next(node for node in graph.graph.graph.nodes if node.op == "output")
        ends = [node for key, node in zip(graph.keys, output.args[0], strict=True) if key[0] == "probe"]
        reachable = reaching(ends)
        sites = graph.structure.sites
        found = uses_of(graph.graph, {name: site.value_shape for name, site in sites.items()}, reachable)
        placeholders = [node for node in graph.graph.graph.nodes if node.op == "placeholder"]
        self.unused = {name for name, node in zip(sites, placeholders, strict=False) if node not in reachable}
        self._match(found, graph.values_at_recording, inputs, parameters)

    def nodes(self, sites: Sequence[str]) -> list[Node]:
        """The nodes whose output gradients are needed for ``sites``."""
        found = {use.node: None for site in sites for use, _ in self.uses.get(site, ())}
        return list(found)

    def sources(self, sites: Sequence[str]) -> set[Node]:
        """The nodes whose values are needed for ``sites``."""
        uses = [use for site in sites for use, _ in self.uses.get(site, ())]
        return {source for use in uses for source in use.sources} | {use.node for use in uses}

    def by_entry(self, sites: Sequence[str]) -> bool:
        """Whether all of them are captured, a datum being one entry of all plates together."""
        return all(self._labelling.get(site) == 0 for site in sites)

    def of_data(self, site: str, entries: Mapping[str, Tensor]) -> Tensor:
        """A number of each datum of ``site``, from one of each entry of the observed sites' log densities."""
        labels = labellings(self.graph)[self._labelling[site]]
        result = next(iter(entries.values())).new_zeros(labels.count)
        for observed, values in entries.items():
            result[labels.of[observed].to(values.device)] = values
        return result

    def disagreement(
        self,
        values: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        sites: Sequence[str],
    ) -> dict[str, float]:
        """Relative difference of Σ_n c_n G_n, for random weights c of the data, from autograd's gradient."""
        trial = _Trial(self.graph, values, inputs, parameters, self.nodes(sites), self.sources(sites))
        result = {}
        for site in sites:
            labels = labellings(self.graph)[self._labelling[site]]
            weights = trial.random_weights(labels)
            expected = trial.gradient_of_value(site, labels, weights)
            grads = trial.output_gradients(labels, torch.ones_like(weights))
            captured = torch.zeros(expected.numel(), dtype=expected.dtype, device=expected.device)
            for use, block in self.uses[site]:
                rows = block.by_datum(use.rows(grads[use.node], trial.env))
                a = block.by_datum(use.inputs(trial.env)) if use.weight is not None else rows
                weighted = rows * weights[block.start : block.start + block.count, None, None]
                _scatter_total(captured, use, site, a.flatten(0, 1), weighted.flatten(0, 1))
            scale = expected.norm().clamp_min(1e-30)
            result[site] = float(((captured.reshape(expected.shape) - expected).norm() / scale).detach())
        return result

    def _match(
        self, found: Uses, values: Mapping[str, Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        self._labelling: dict[str, int] = {}
        by_site: dict[str, list[Use]] = {}
        for use in found.found:
            for tag in (use.weight, use.bias):
                if tag is not None and use not in by_site.setdefault(tag.site, []):
                    by_site[tag.site].append(use)
        for site in self.graph.structure.sites:
            if site in self.unused:
                continue
            if site in found.opaque:
                self.unrecognised[site] = f"it is used by {found.opaque[site]}"
            elif self.graph.structure.sites[site].transform is not None:
                self.unrecognised[site] = "its support is not the whole real space"
            elif site not in by_site:
                self.unrecognised[site] = "no layer uses it"
        sites = [site for site in by_site if site not in self.unrecognised and site not in self.unused]
        if not sites:
            return
        nodes = list({use.node: None for site in sites for use in by_site[site]})
        sources = {source for site in sites for use in by_site[site] for source in use.sources}
        trial = _Trial(self.graph, values, inputs, parameters, nodes, sources | set(nodes))
        for number, labels in enumerate(labellings(self.graph)):
            weights = trial.random_weights(labels)
            plain = trial.output_gradients(labels, torch.ones_like(weights))
            weighted = trial.output_gradients(labels, weights)
            for site in sites:
                if site in self.uses:
                    continue
                blocks = [_block_of(use, plain, weighted, weights, labels, trial.env) for use in by_site[site]]
                if all(block is not None for block in blocks):
                    self.uses[site] = list(zip(by_site[site], blocks, strict=True))  # type: ignore[arg-type]
                    self._labelling[site] = number
        for site in sites:
            if site not in self.uses:
                dead = any(not use.rows(plain[use.node], trial.env).norm() > 0 for use in by_site[site])
                why = "the gradient at its outputs is zero" if dead else "its outputs mix several data"
                self.unrecognised[site] = why
        self.recheck(values, inputs, parameters)

    def recheck(
        self, values: Mapping[str, Tensor], inputs: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> dict[str, str]:
        """Compare with autograd, and give up the sites that differ.

        :returns: these sites, and what differs.
        """
        wrong = {}
        for site, error in self.disagreement(values, inputs, parameters, list(self.uses)).items():
            if not error < TOLERANCE.get(values[site].dtype, 2e-3):
                del self.uses[site]
                wrong[site] = f"the captured gradient differs from autograd's by {error:.1g}"
        self.unrecognised.update(wrong)
        return wrong


@dataclass
class Labels:
    """Observed site -> number of the datum of each entry of its log density."""

    of: dict[str, Tensor]
    blocks: list[Block]
    count: int


def labellings(graph: ModelGraph) -> list[Labels]:
    """Ways to say what a datum is, finest first: an entry of all plates together, then a row of one plate."""
    plates = sorted({name for site in graph.observed.values() for name in site.plates})
    shared = [name for name in plates if any(len(site.plates) > 1 for site in graph.observed.values())]
    result = []
    for coarse in [None, *shared]:
        of: dict[str, Tensor] = {}
        blocks: dict[Any, Block] = {}
        start = 0
        for name, site in graph.observed.items():
            chosen = site.plates if coarse is None or coarse not in site.plates else {coarse: site.plates[coarse]}
            chosen = dict(sorted(chosen.items()))
            dims = [dim for dim, _ in chosen.values()] or [d - len(site.shape) for d in range(len(site.shape))]
            sizes = [site.shape[dim] for dim in dims]
            key = (tuple(chosen), tuple(sizes)) if chosen else name
            if key not in blocks:
                blocks[key] = Block(start, math.prod(sizes))
                start += math.prod(sizes)
            label = torch.full(site.shape, blocks[key].start)
            for position, dim in enumerate(dims):
                step = math.prod(sizes[position + 1 :])
                along = torch.arange(site.shape[dim]).reshape(-1, *(1,) * (-dim - 1))
                label = label + along * step
            of[name] = label
        result.append(Labels(of, list(blocks.values()), start))
    return result


class _Trial:
    """One differentiable run of the graph on which weighted backward passes are compared."""

    def __init__(
        self,
        graph: ModelGraph,
        values: Mapping[str, Tensor],
        inputs: Sequence[Tensor],
        parameters: Sequence[Tensor],
        nodes: Sequence[Node],
        keep: set[Node],
    ) -> None:
        self.nodes = list(nodes)
        with torch.enable_grad(), kept_randomness():
            self.values = {name: value.detach().clone().requires_grad_() for name, value in values.items()}
            self.generator = torch.Generator().manual_seed(21)
            torch.manual_seed(21)
            terms, env = graph(
                self.values, inputs, parameters, wanted=lambda key: key[0] == "probe", keep=set(nodes) | keep
            )
        self.env: Mapping[Node, Any] = env
        self.probe = self._combined(terms)

    def _combined(self, terms: Terms) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for probe in terms.probes:
            factor = 0.5 + float(torch.rand((), generator=self.generator))
            for site, value in probe.items():
                result[site] = result.get(site, 0.0) + factor * value
        return result

    def random_weights(self, labels: Labels) -> Tensor:
        like = next(iter(self.probe.values()))
        noise = torch.rand(labels.count, generator=self.generator, dtype=torch.float64)
        return (0.5 + 1.5 * noise).to(like.dtype).to(like.device)

    def _weighted(self, labels: Labels, weights: Tensor) -> Tensor:
        return torch.as_tensor(sum((weights[labels.of[site]] * value).sum() for site, value in self.probe.items()))

    def output_gradients(self, labels: Labels, weights: Tensor) -> dict[Node, Tensor]:
        return dict(zip(self.nodes, self._gradients([self.env[n] for n in self.nodes], labels, weights), strict=True))

    def gradient_of_value(self, site: str, labels: Labels, weights: Tensor) -> Tensor:
        return self._gradients([self.values[site]], labels, weights)[0]

    def _gradients(self, at: Sequence[Tensor], labels: Labels, weights: Tensor) -> Sequence[Tensor]:
        with torch.enable_grad():
            total = self._weighted(labels, weights)
            if not total.requires_grad:  # such as a location that depends on no site
                return [torch.zeros_like(tensor) for tensor in at]
            return torch.autograd.grad(total, at, retain_graph=True, materialize_grads=True)


def _block_of(
    use: Use,
    plain: Mapping[Node, Tensor],
    weighted: Mapping[Node, Tensor],
    weights: Tensor,
    labels: Labels,
    env: Mapping[Node, Any],
) -> Block | None:
    """The layout of data in the rows of a use that explains how random weights of the data changed its gradients."""
    before, after = use.rows(plain[use.node], env), use.rows(weighted[use.node], env)
    size = after.norm()
    if not size > 0:
        return None
    tolerance = TOLERANCE.get(after.dtype, 2e-3) * size
    for kind in labels.blocks:
        places, rest = divmod(len(before), kind.count)
        if rest:
            continue
        for inner in (d for d in range(1, places + 1) if places % d == 0):
            block = Block(kind.start, kind.count, inner)
            if (after - before * weights[block.units(len(before))].unsqueeze(-1)).norm() <= tolerance:
                return block
    return None


def _scatter_total(out: Tensor, use: Use, site: str, inputs: Tensor, rows: Tensor) -> None:
    """Add one use's Σ g aᵀ to a flat gradient of the site."""
    if use.weight is not None and use.weight.site == site:
        gradient = rows.T @ inputs.to(rows.dtype) * use.weight.factor
        out.index_add_(0, use.weight.index.reshape(-1).to(out.device), gradient.reshape(-1))
    if use.bias is not None and use.bias.site == site:
        out.index_add_(0, use.bias.index.to(out.device), rows.sum(0) * use.bias.factor)
