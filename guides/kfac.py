"""K-FAC: natural gradients for point estimates (Martens and Grosse 2015, "Optimizing neural networks with
Kronecker-factored approximate curvature", ICML, arXiv 1503.05671), for Pyro's ``AutoDelta``.

With the loss h = −log p(D, w), a layer's inputs ā (1 first, where it has a bias), gradients g of the log-likelihood at
its outputs, prior precision D and a damping d, all on the scale of the sum over the data,

    A ← running mean of E[ā āᵀ],      S ← running mean of Σ_n g gᵀ,      γ = mean D + d,
    Δ = −(S + √γ/π I)⁻¹ ∇h (A + π √γ I)⁻¹        (sections 4.2 and 6.3),       w ← w + lr Δ.

Other sites divide by their diagonal of the Fisher information, plus D + d. With B rows fewer than the layer's sides, Δ
is formed from gᵀ ā, factor by factor; the prior's part of Δ, which changes slowly, is used again for up to 1/lr steps.

Options, with the quadratic model M(δ) = ½ δᵀ (F + D + d) δ + ∇hᵀ δ of the same minibatch, F exact (``"ggn"``) or from
drawn labels (``"sampled"``):

    rescale     δ = α Δ,          α minimises M           (section 6.4)
    momentum    δ = α Δ + μ δ₀,   δ₀ the update before, α and μ minimise M          (section 7)
    adaptive    every 5 steps d ← ω d if ρ > ¾, d / ω if ρ < ¼, ω = (19/20)⁵,
                ρ = (h(w + δ) − h(w)) / M(δ)              (section 6.5, Levenberg and Marquardt)

and the block-tridiagonal inverse of :mod:`bnn.guides.block_tridiagonal`. Departs from the paper: γ is not searched for.
Constrained sites move in AutoDelta's unconstrained parameter, whose loss has no Jacobian, as in Pyro.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bnn.guides._kfac_blocks import PointSettings
from bnn.guides._kronecker import Damping, inverses, precision_of
from bnn.guides._point import Minibatch, Outputs, Point
from bnn.guides._point_leaves import PointLeaves
from bnn.guides._quadratic import inner, minimizer
from bnn.guides._ranks import agree, owners_of
from bnn.guides._running_means import RunningMeans
from bnn.guides.block_tridiagonal import BlockTridiagonal, Moments
from bnn.guides.matrix_normal import MatrixBlock
from bnn.onednn import matmul
from bnn.ranks import Ranks

ADAPT_EVERY, DECAY = 5, (19 / 20) ** 5


def adapted(damping: float, ratio: float) -> float:
    """The rule of Levenberg and Marquardt. A loss that is not finite, ratio NaN, counts as a bad step."""
    if ratio > 0.75:
        return damping * DECAY
    return damping if ratio >= 0.25 else damping / DECAY


class PointEstimate:
    """Losses and natural gradients of one model under one ``AutoDelta``.

    :param model: a Pyro model.
    :param guide: its guide.
    :param settings: curvature, weight of the prior, block-tridiagonal or not.
    :param damping: d ≥ 0, in the units of a precision; the start of it, if adaptive.
    :param adaptive_damping: whether d follows the rule of Levenberg and Marquardt.
    :param trust_region: bound on the root mean square of the update in standard deviations of the posterior that the
        factors stand for (from above, where factors are thin); None for no bound.
    :param rescale: whether the step is rescaled by the quadratic model; use ``lr=1``.
    :param momentum: whether the rescaled step also takes a multiple of the step before.
    :param statistics_every: steps between estimates of the moments.
    :param inverses_every: steps between inverses, a multiple of it. Before that both are also due at steps 1, 2, 4, ...
    :param curvature_rate: weight of a new estimate in the running means, which are bias-corrected.
    :param ranks: the processes that share rows and inverses out.
    :raises ValueError: for settings out of range.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: AutoDelta,
        settings: PointSettings | None = None,
        *,
        damping: float = 0.0,
        adaptive_damping: bool = False,
        trust_region: float | None = None,
        rescale: bool = False,
        momentum: bool = False,
        statistics_every: int = 1,
        inverses_every: int = 1,
        curvature_rate: float = 0.05,
        ranks: Ranks | None = None,
    ) -> None:
        self.model, self.guide, self.settings = model, guide, settings or PointSettings()
        if self.settings.curvature not in ("sampled", "ggn", "empirical"):
            raise ValueError(
                f"curvature is {self.settings.curvature!r}: a point estimate has no draws to reparametrize. Choose "
                "'sampled', 'ggn' or 'empirical'."
            )
        if not damping >= 0:
            raise ValueError(f"damping is {damping}; give 0 or a positive number.")
        if adaptive_damping and damping == 0:
            raise ValueError("adaptive_damping multiplies extrinsic_damping: give a positive one to start from.")
        if momentum and not rescale:
            raise ValueError("momentum=True is part of the rescaling: give rescale=True as well.")
        if trust_region is not None and not trust_region > 0:
            raise ValueError(f"trust_region is {trust_region}; give a positive number, or None for no bound.")
        if not 0 < curvature_rate <= 1:
            raise ValueError(f"curvature_rate is {curvature_rate}; give a number above 0, up to 1.")
        if statistics_every < 1 or inverses_every < 1 or inverses_every % statistics_every:
            raise ValueError(
                f"inverses_every is {inverses_every} and statistics_every {statistics_every}: give a multiple."
            )
        self.damping, self.adaptive_damping = float(damping), adaptive_damping
        self.trust_region, self.rescale, self.momentum = trust_region, rescale, momentum
        self.statistics_every, self.inverses_every = statistics_every, inverses_every
        self.curvature_rate = curvature_rate
        self.count, self.ranks = 0, ranks
        self._points: dict[Any, Point] = {}
        self._leaves = PointLeaves(guide)
        self._means = RunningMeans(curvature_rate)
        self._inverses: dict[Any, Any] = {}
        self._damp = Damping()
        self._prior: dict[str, Tensor] = {}
        self._prior_length: dict[int, Tensor] = {}
        self._prior_age = 0
        self._last: tuple[Point, Minibatch, dict[str, Tensor], float] | None = None
        self._update: dict[str, Tensor] = {}
        self._known: dict[str, Tensor] = {}
        self._layout: Any = None
        self._resumed: dict[str, Any] = {}

    def loss_and_grads(self, kind: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """The loss; minus the update at rate 1 is left in ``.grad`` of the guide's parameters.

        :param kind: a key for shapes and values of the arguments on which a recording depends.
        :param args: the model's arguments.
        :param kwargs: its keyword arguments.
        :raises ValueError: if guide and model differ in their sites, or an optimizer rescales the gradient.
        :raises RuntimeError: if the loss is not finite, or the curvature is singular.
        """
        leaves = self._leaves.current(args, kwargs)
        if self.ranks is not None:
            agree(self.ranks, self.count, list(leaves.values()))
        point, early = self._point(kind, args, kwargs, leaves)
        if self._last is not None:
            self._adapt(leaves)
        batch = point.minibatch(args, kwargs)
        early = early or (self.count < self.inverses_every and self.count & (self.count - 1) == 0)
        statistics = early or self.count % self.statistics_every == 0
        due = early or self.count % self.inverses_every == 0
        stale = due or self.rescale or self._prior_age >= self._leaves.steps_per_unit()
        prior = bool(point.sites.thin) and stale
        found = point.estimate(leaves, batch, statistics, prior)
        loss = self._checked_loss(found)
        if statistics:
            self._means.add(found)
        if due:
            self._invert(point)
        self._prior_age = 1 if prior else self._prior_age + 1
        self._precondition(point, found, prior)
        if self.rescale:
            self._rescale(point, batch, leaves)
        self.count += 1
        if self.adaptive_damping and self.count % ADAPT_EVERY == 0:
            self._last = point, batch.kept(), {n: leaf.detach().clone() for n, leaf in leaves.items()}, loss
        self._leaves.write()
        for k, leaf in enumerate(batch.leaves):
            leaf.grad = found["parameter", k].reshape(leaf.shape)
        self._leaves.tell(batch.leaves)
        return loss

    def state(self) -> dict[str, Any]:
        """All that the next step depends on besides parameters, for a checkpoint."""
        last = self._resumed.get("last")
        if self._last is not None:
            point, batch, before, loss = self._last
            kind = next(kind for kind, own in self._points.items() if own is point)
            last = {"kind": repr(kind), "inputs": batch.inputs, "parameters": batch.parameters, "before": before}
            last["loss"] = loss
        chained = {kind: found.state() for kind, found in self._inverses.items() if isinstance(found, BlockTridiagonal)}
        return {
            "count": self.count,
            "damping": self.damping,
            "means": self._means.state(),
            "inverses": {kind: found for kind, found in self._inverses.items() if kind not in chained},
            "chained": chained,
            "raised": sorted(self._damp.raised),
            "prior": dict(self._prior),
            "prior_length": dict(self._prior_length),
            "prior_age": self._prior_age,
            "update": dict(self._update),
            "last": last,
            "rates": self._leaves.rates(),
            "rows": self._resumed.get("rows", {}) | {repr(kind): p.state() for kind, p in self._points.items()},
        }

    def load_state(self, state: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Go on from another training's :meth:`state`."""
        self.count, self.damping = state["count"], state["damping"]
        self._means.load_state(state["means"])
        self._inverses = dict(state["inverses"])
        self._inverses |= {kind: BlockTridiagonal.from_state(one) for kind, one in state["chained"].items()}
        self._damp.raised = set(state["raised"])
        self._prior, self._prior_length = dict(state["prior"]), dict(state["prior_length"])
        self._prior_age, self._update = state["prior_age"], dict(state["update"])
        self._resumed = {"rows": dict(state["rows"]), "last": state["last"]}
        if self.count:
            self._known = self._leaves.current(args, kwargs)
            self._leaves.load_rates(state["rates"])

    def _resume(self, kind: Any, point: Point) -> bool:
        """Take over what a checkpoint knows of arguments of this kind; whether it knows them."""
        rows, last = self._resumed.get("rows", {}).pop(repr(kind), None), self._resumed.get("last")
        if rows is None:
            return False
        point.load_state(rows)
        if last is not None and last["kind"] == repr(kind):
            batch = Minibatch(last["inputs"], last["parameters"])
            self._last = point, batch, last["before"], last["loss"]
        self._resumed["last"] = None
        if self._layout is None:
            self._layout = [block.names for block in point.sites.blocks], point.sites.chains
        return True

    def _point(
        self, kind: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], leaves: dict[str, Tensor]
    ) -> tuple[Point, bool]:
        """The recording, and whether it or the leaves are new, so that nothing known from before is used."""
        new = kind not in self._points or leaves is not self._known
        if leaves is not self._known:  # at first, and after the parameter store was loaded
            self._known, self._last, self._update = leaves, None, {}
        if kind not in self._points:
            self._points[kind] = Point(self.model, args, kwargs, self.settings, self.ranks)
            if self.ranks is not None and self._points[kind].sites.missed and (self.rescale or self.adaptive_damping):
                raise NotImplementedError(
                    f"sites {sorted(self._points[kind].sites.missed)} have no curvature but squared gradients, of "
                    "which ranks='data' knows no quadratic model: leave rescale and adaptive_damping out."
                )
            new = not self._resume(kind, self._points[kind])
        point = self._points[kind]
        self._leaves.check(point.graph.structure.sites)
        layout = [block.names for block in point.sites.blocks], point.sites.chains
        if layout != self._layout:
            self._layout, self._means, new = layout, RunningMeans(self.curvature_rate), True
        return point, new

    def _checked_loss(self, found: Outputs) -> float:
        loss, size = torch.stack([found["loss", ""], found["size", ""]]).tolist()
        if math.isfinite(loss) and math.isfinite(size):
            return float(loss)
        what = "the gradient is not finite" if math.isfinite(loss) else f"the loss is {loss}"
        raise RuntimeError(
            f"at step {self.count} {what}; the parameters keep their last finite values. Check the data for NaN and "
            "their scale, lower lr, or give extrinsic_damping=."
        )

    # ---- inverses

    def _invert(self, point: Point) -> None:
        sites, means = point.sites, self._means
        dampings = [means.precision(block) + self.damping for block in sites.blocks]
        pairs = [(means["input_moment", n], means["output_moment", n]) for n in range(len(sites.blocks))]
        units = [float(a.diagonal().mean() * s.diagonal().mean()) for a, s in pairs]
        in_chains = {number for chain in sites.chains for number in chain}
        numbers = [number for number in range(len(sites.blocks)) if number not in in_chains]
        owners = owners_of(self.ranks, [sites.blocks[number] for number in numbers])
        for number, owner in zip(numbers, owners, strict=True):
            if self.ranks is not None and owner != self.ranks.rank:
                self._inverses[number] = torch.empty_like(pairs[number][0]), torch.empty_like(pairs[number][1])
                continue
            both = partial(inverses, *pairs[number])
            self._inverses[number] = self._damp(sites.blocks[number].names, dampings[number], units[number], both)
        if self.ranks is not None:
            both_of = [(tensor, o) for n, o in zip(numbers, owners, strict=True) for tensor in self._inverses[n]]
            self.ranks.spread([tensor for tensor, _ in both_of], [owner for _, owner in both_of])
        for chain in sites.chains:
            names = [name for number in chain for name in sites.blocks[number].names]
            own = [dampings[number] for number in chain]
            whole = partial(self._chain, chain, own)
            self._inverses[tuple(chain)] = self._damp(names, min(own), max(units[n] for n in chain), whole)
        for name in sites.diagonal:
            total = means["squares", name] + means["precision", name]
            diagonal = partial(precision_of, total)
            self._inverses[name] = self._damp([name], self.damping, float(total.mean()), diagonal)

    def _chain(self, chain: Sequence[int], dampings: Sequence[float], least: float) -> BlockTridiagonal | None:
        moments = [
            Moments(
                [self._means[f"{kind}_moment", n] for n in chain], [self._means[f"{kind}_cross", n] for n in chain[:-1]]
            )
            for kind in ("input", "output")
        ]
        return BlockTridiagonal.of(moments[0], moments[1], [max(damping, least) for damping in dampings])

    # ---- the step

    @torch.no_grad()
    def _precondition(self, point: Point, found: Outputs, prior: bool) -> None:
        """Minus the update into the buffers."""
        sites, buffers = point.sites, self._leaves.buffers
        joined = {
            number: block.join({name: found["gradient", name] for name in block.names})
            for number, block in enumerate(sites.blocks)
            if number not in sites.thin
        }
        in_chains = {number for chain in sites.chains for number in chain}
        results: dict[int, Tensor] = {}
        for chain in sites.chains:
            results.update(zip(chain, self._inverses[tuple(chain)]([joined[n] for n in chain]), strict=True))
        for number, matrix in joined.items():
            if number not in in_chains:
                inputs, outputs = self._inverses[number]
                results[number] = matmul(matmul(outputs, matrix), inputs)
        for number, result in results.items():
            for name, value in sites.blocks[number].split(result).items():
                buffers[name].copy_(value)
        for name in sites.diagonal:
            torch.div(found["gradient", name], self._inverses[name], out=buffers[name])
        lengths = [self._thin(sites.blocks[number], found, number, prior) for number in sorted(sites.thin)]
        if self.trust_region is not None and not self.rescale:
            whole = {name: gradient for (kind, name), gradient in found.items() if kind == "gradient"}
            squared = float(inner(whole, buffers)) if whole else 0.0
            length = math.sqrt(max(0.0, squared) + sum(float(one) for one in lengths))
            most = self.trust_region * math.sqrt(sum(buffer.numel() for buffer in buffers.values()))
            if length > most:
                for buffer in buffers.values():
                    buffer.mul_(most / length)

    def _thin(self, block: MatrixBlock, found: Outputs, number: int, prior: bool) -> Tensor:
        """(g S⁻¹)ᵀ (ā A⁻¹), straight into the buffers, and the prior's part; a bound on ∇hᵀ of it, if there is need."""
        inverse_a, inverse_s = self._inverses[number]
        thin = found["inputs", number], found["outputs", number]
        inputs, outputs = matmul(thin[0], inverse_a), matmul(thin[1], inverse_s)
        if prior:
            gradient = {name: found["prior", name] for name in block.names}
            direction = block.split(matmul(matmul(inverse_s, block.join(gradient)), inverse_a))
            self._prior.update(direction)
            self._prior_length[number] = inner(gradient, direction).clamp_min(0.0).sqrt()
        for position, site in enumerate(block.sites):
            columns = inputs[:, :1] if position else inputs[:, block.has_bias :]
            left, right = (columns, outputs) if block.transposed and not position else (outputs, columns)
            buffer = self._leaves.buffers[site.name].view(left.shape[1], right.shape[1])
            torch.sub(self._prior[site.name].view_as(buffer), matmul(left.mT, right), out=buffer)
        if self.trust_region is None or self.rescale:
            return inputs.new_zeros(())
        products = inner({"": matmul(inputs, thin[0].mT)}, {"": matmul(outputs, thin[1].mT)})
        return (products.clamp_min(0.0).sqrt() + self._prior_length[number]).square()

    def _rescale(self, point: Point, batch: Minibatch, leaves: Mapping[str, Tensor]) -> None:
        buffers = self._leaves.buffers
        directions = [{name: -buffer for name, buffer in buffers.items()}]
        if self._update:
            directions.append(self._update)
        slopes, curvature = point.quadratic(leaves, batch, directions)
        plain = torch.stack([torch.stack([inner(v, w) for w in directions]) for v in directions])
        factors = minimizer(slopes, curvature + self.damping * plain)
        update = {n: sum(c * v[n] for c, v in zip(factors, directions, strict=True)) for n in buffers}
        for name, buffer in buffers.items():
            buffer.copy_(-torch.as_tensor(update[name]))
        self._update = {n: torch.as_tensor(value) for n, value in update.items()} if self.momentum else {}

    def _adapt(self, leaves: Mapping[str, Tensor]) -> None:
        """One application of the rule to the last step, of whatever length the optimizer made it."""
        assert self._last is not None
        (point, batch, before, loss), self._last = self._last, None
        moved = {name: leaf.detach() - before[name] for name, leaf in leaves.items()}
        slopes, curvature = point.quadratic(before, batch, [moved])
        predicted = float(slopes[0] + 0.5 * (curvature[0, 0] + self.damping * inner(moved, moved)))
        if predicted != 0:
            ratio = (point.value(leaves, batch) - loss) / predicted if predicted < 0 else math.nan
            self.damping = adapted(self.damping, ratio)
