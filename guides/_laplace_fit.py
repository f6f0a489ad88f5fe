"""From a model, a point and all data to the blocks of a Laplace approximation and its evidence."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.checks import first_of
from bnn.guides._all_data import Chunk, Reading, Recorded, chunks_of, hessian, hessian_diagonal
from bnn.guides._blocks import LatentSite
from bnn.guides._evidence import Evidence, Noise
from bnn.guides._laplace_blocks import LaplaceBlock
from bnn.guides._laplace_curvature import LARGEST_DENSE, Curvature
from bnn.guides._quadratic import total_of
from bnn.minibatch import Arguments
from bnn.model_graph import reaching
from bnn.observations import Chunk as Window
from bnn.observations import read_targets
from bnn.structure import base_of

CURVATURES = ("ggn", "sampled", "empirical", "hessian")

# Bytes that a full matrix, its factor and the factor's inverse may take.
MEMORY = 1 << 33

# Root mean square distance from the mode, in posterior standard deviations, above which a point is not called one.
FAR = 0.1


class Fit:
    """One fit.

    :param model: a Pyro model.
    :param structure: of the precision.
    :param curvature: of the likelihood.
    :param label_samples: draws of the labels.
    :param args: arguments of the model.
    :param kwargs: its keyword arguments.
    :param batches: an iterable of arguments in place of them, or None.
    :ivar example: the arguments, or the first batch.
    :ivar evidence: what :meth:`run` found besides the blocks.
    """

    evidence: Evidence

    def __init__(
        self,
        model: Callable[..., Any],
        structure: str,
        curvature: str,
        label_samples: int,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        batches: Iterable[Any] | None,
    ) -> None:
        self.model, self.structure, self.curvature, self.label_samples = model, structure, curvature, label_samples
        self.args, self.kwargs, self.batches = args, kwargs, batches
        self.example: Arguments = (args, dict(kwargs)) if batches is None else first_of(batches, args, kwargs)
        self._recorded: dict[Any, Recorded] = {}

    def _record(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Recorded:
        leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
        shapes = [tuple(leaf.shape) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        key = str((spec, shapes))
        if key not in self._recorded:
            kind = None if self.curvature == "hessian" else self.curvature
            self._recorded[key] = Recorded(self.model, args, kwargs, kind, self.label_samples)
        return self._recorded[key]

    @property
    def first(self) -> Recorded:
        """The model at the first chunk's arguments."""
        return self._record(*self.example)

    def unconstrained(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The point in unconstrained space.

        :param values: of the sites.
        :raises ValueError: if some are lacking, have another shape or are not finite.
        """
        sites, result = self.first.graph.structure.sites, {}
        missing = sorted(set(sites) - set(values))
        if missing:
            raise ValueError(f"the point has no values of the sites {missing}: give all of {sorted(sites)}.")
        for name, site in sites.items():
            value = torch.as_tensor(values[name]).detach().to(site.dtype)
            if value.shape != site.value_shape:
                raise ValueError(
                    f"the point of site {name!r} has shape {tuple(value.shape)}, in the model it has "
                    f"{tuple(site.value_shape)}."
                )
            result[name] = value if site.transform is None else site.transform.inv(value)
            if not bool(torch.isfinite(result[name]).all()):
                raise ValueError(f"the point of site {name!r} is not finite, or on the edge of its support.")
        return result

    # ---- which sites

    def choose(self, asked: Sequence[str] | str | None, sites: Sequence[str]) -> list[str]:
        """The sites of the approximation, in the order of the model.

        :param asked: what the user said.
        :param sites: all sites.
        """
        if asked is None:
            return list(sites)
        if asked == "last layer":
            chosen = self._last_layer()
        elif isinstance(asked, str):
            raise ValueError(f"sites is {asked!r}; give 'last layer', a list of names, or None for all.")
        else:
            chosen = set(asked)
        unknown = sorted(chosen - set(sites))
        if unknown or not chosen:
            raise ValueError(f"sites= names {unknown}, which the model has not: choose among {list(sites)}.")
        return [name for name in sites if name in chosen]

    def _last_layer(self) -> set[str]:
        """Sites of the layers whose outputs pass through no other layer."""
        recorded = self.first if self.curvature != "hessian" else Recorded(self.model, *self.example, "empirical")
        capture = recorded.capture
        uses = [] if capture is None else [use for found in capture.uses.values() for use, _ in found]
        layers = {use.node for use in uses if use.weight is not None}
        passed = {node for other in layers for node in reaching(other.all_input_nodes)}
        last = [use for use in uses if use.weight is not None and use.node not in passed]
        behind = {use.node for use in last}
        last += [use for use in uses if use.weight is None and not layers.isdisjoint(reaching([use.node]))]
        last = [use for use in last if use.node in behind or use.node not in passed]
        found = {tag.site for use in last for tag in (use.weight, use.bias) if tag is not None}
        if not found:
            raise ValueError("no layer was recognised in the model: give the names of the last layer's sites.")
        return found

    # ---- the pass

    def _chunks(self) -> Iterator[Chunk]:
        return chunks_of(self._record, self.args, self.kwargs, self.batches)

    @torch.enable_grad()
    def run(self, sites: Mapping[str, LatentSite], point: Mapping[str, Tensor]) -> list[LaplaceBlock]:
        """The blocks, and :attr:`evidence`.

        :param sites: those of the approximation.
        :param point: unconstrained values of all sites.
        """
        self.sites, self.point = sites, point
        if self.structure == "full":
            _fits(sum(site.shape.numel() for site in sites.values()), next(iter(point.values())).dtype)
        curvature, log_likelihood = None, 0.0
        gradient = {name: torch.zeros_like(point[name]) for name in sites}
        for chunk in self._chunks():
            reading = Reading(chunk, point)
            leaves = [reading.leaves[name] for name in sites]
            if curvature is None:
                missed = self._missed(reading)
                self._sees_all(missed)
                curvature = Curvature(self.structure, sites, missed, chunk.recorded)
                priors = self._priors(reading)
                for name, part in zip(sites, _gradients(self._log_prior(reading), leaves), strict=True):
                    gradient[name] += part
            for name, part in zip(sites, _gradients(reading.log_likelihood, leaves), strict=True):
                gradient[name] += part
            log_likelihood += float(reading.log_likelihood.detach().double())
            curvature.add(reading)
        assert curvature is not None
        if curvature.needs_second_pass:
            curvature.set_bases()
            for chunk in self._chunks():
                curvature.correct(Reading(chunk, point))
        self.gradient = gradient
        if not math.isfinite(log_likelihood) or not all(bool(torch.isfinite(g).all()) for g in gradient.values()):
            raise ValueError(
                f"the log-likelihood at the point is {log_likelihood}, or its gradient is not finite: check the point "
                "and the data for NaN."
            )
        noise = self._noise(log_likelihood)
        self.evidence = Evidence(log_likelihood, *priors[:4], noise)
        return curvature.blocks(priors[4])

    def _missed(self, reading: Reading) -> set[str]:
        """Sites that the probes do not see."""
        roles = reading.recorded.roles
        if roles is not None:
            return roles.missed
        names = list(reading.leaves)
        seen = _reached(reading.log_likelihood, reading.leaves)
        by_probes = _reached(total_of(v for probe in reading.probes for v in probe.values()), reading.leaves)
        return {name for name in names if name in seen and name not in by_probes}

    def _sees_all(self, missed: set[str]) -> None:
        """:raises ValueError: if a Gauss-Newton matrix would see a part of what a site does."""
        partly = [name for name in self._sites_of_scales() if name in self.sites and name not in missed]
        if self.curvature == "ggn" and partly:
            raise ValueError(
                f"curvature='ggn' sees the location of the likelihood, whose scale depends on sites {partly} too: give "
                "curvature='sampled' or 'hessian'."
            )

    # ---- the prior

    def _log_prior(self, reading: Reading) -> Tensor:
        return total_of(reading.terms.prior.values()) + reading.jacobian

    def _priors(
        self, reading: Reading
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], float, dict[str, Tensor], dict[str, Tensor]]:
        """Precisions and squared distances of Normal priors, log density and curvature of all others, and Hessians."""
        roles = reading.recorded.roles
        known = set() if roles is None else roles.known_precision
        normal = [
            name
            for name in self.sites
            if name in known and name in reading.terms.precision and roles.prior_of[name] & set(self.sites) == {name}  # type: ignore[union-attr]
        ]
        precisions = {name: reading.terms.precision[name].detach().reshape(-1) for name in normal}
        leaves, prior = reading.leaves, self._log_prior(reading)
        slopes = _gradients(prior, [leaves[name] for name in normal])
        squares = {
            name: (slope.reshape(-1) / precisions[name]).square() for name, slope in zip(normal, slopes, strict=True)
        }
        others = [name for name in self.sites if name not in normal]
        included = [reading.terms.prior[name] for name in others]
        density = float((total_of(included) + _jacobian(reading, others)).detach())
        curvatures: dict[str, Tensor] = {}
        hessians: dict[str, Tensor] = {}
        if others and self.structure == "full":
            whole = hessian(-prior, [leaves[name] for name in self.sites])
            hessians[""] = whole
            sizes = [leaves[name].numel() for name in self.sites]
            diagonals = dict(zip(self.sites, whole.diagonal().split(sizes), strict=True))
            curvatures = {name: diagonals[name] for name in others}
        else:
            for name in others:
                if leaves[name].numel() <= LARGEST_DENSE:
                    hessians[name] = hessian(-prior, [leaves[name]])
                    curvatures[name] = hessians[name].diagonal()
                else:
                    curvatures[name] = hessian_diagonal(-prior, leaves[name])
        return precisions, squares, density, curvatures, hessians

    # ---- the noise

    def _noise(self, log_likelihood: float) -> Noise | str:
        """The Normal likelihood's standard deviation, if the log-likelihood is that of independent equal Normals."""
        if self.curvature == "empirical":
            return "the empirical Fisher matrix does not scale with the noise; use curvature='ggn'"
        count, scales, total = 0, set(), 0.0
        for chunk in self._chunks():
            args, kwargs = chunk.recorded.graph.arguments(chunk.inputs[len(chunk.recorded.graph.plates) :])
            rows = dict(zip((p.name for p in chunk.recorded.graph.plates), chunk.inputs, strict=False))
            with torch.no_grad():
                structure = chunk.recorded.graph.structure
                values = {name: structure.sites[name].constrain(z) for name, z in self.point.items()}
                targets = read_targets(self.model, values, Window(args, kwargs, rows), drawn=False).targets
            counts, _ = chunk.entries()
            if set(targets) != set(counts):
                return "the likelihood has factors"
            for name, target in targets.items():
                base, counted = base_of(target.fn), counts[name] > 0
                if type(base) is not dist.Normal:
                    return f"the likelihood of {name!r} is {type(base).__name__}, not Normal"
                scales |= set(base.scale.unique().tolist())
                count += int(counted.sum()) * target.fn.event_shape.numel()
                total += float((target.fn.log_prob(target.value) * counted).sum())
            if len(scales) > 1:
                return "the Normal likelihood has several standard deviations"
        if not math.isclose(total, log_likelihood, rel_tol=1e-4, abs_tol=1e-3):
            return "the likelihood is masked or scaled"
        (scale,) = scales
        structure, depends = self.first.graph.structure, self._sites_of_scales()
        inside = [name for name in depends if name in self.sites]
        if inside:
            return f"the noise depends on sites {inside} of the approximation, which integrates over it"
        held = [
            name
            for name in depends
            if self.point[name].numel() == 1
            and math.isclose(float(structure.sites[name].constrain(self.point[name])), scale, rel_tol=1e-5)
        ]
        return Noise(scale, count, held[0] if len(depends) == 1 and held else None)

    def _sites_of_scales(self) -> list[str]:
        """Sites that the scales of the likelihoods with a location change with."""
        graph = self.first.graph
        args, kwargs = self.example
        rows = {plate.name: torch.arange(plate.batch_size) for plate in graph.plates}
        with torch.enable_grad():
            leaves = {name: z.detach().clone().requires_grad_() for name, z in self.point.items()}
            values = {name: graph.structure.sites[name].constrain(z) for name, z in leaves.items()}
            targets = read_targets(self.model, values, Window(args, kwargs, rows), drawn=False).targets
            laws = [base_of(target.fn) for target in targets.values()]
            scales = [
                getattr(law, name)
                for law in laws
                if isinstance(law, (dist.Normal, dist.StudentT, dist.MultivariateNormal))
                for name in ("scale", "df", "scale_tril")
                if hasattr(law, name)
            ]
            return sorted(_reached(total_of(torch.as_tensor(scale) for scale in scales), leaves))

    # ---- the mode

    def check_mode(self, blocks: Sequence[LaplaceBlock]) -> None:
        """Warn if a Newton step from the point would be long."""
        squares = [block.whiten(block.join(self.gradient)).square().sum() for block in blocks]
        numel = sum(block.numel for block in blocks)
        far = float((total_of(squares) / numel).sqrt())
        if not far <= FAR:
            norm = float(total_of(g.square().sum() for g in self.gradient.values()).sqrt())
            warnings.warn(
                f"the point is not a mode: the gradient of the log joint has norm {norm:.3g}, and a Newton step would "
                f"move the sites by {far:.2g} posterior standard deviations (root mean square). Train longer, with a "
                "rate that falls to zero and on all data, before Laplace(...).fit(...).",
                RuntimeWarning,
                stacklevel=3,
            )


def _gradients(total: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    if not leaves or not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    return list(torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True))


def _reached(total: Tensor, leaves: Mapping[str, Tensor]) -> set[str]:
    if not total.requires_grad:
        return set()
    found = torch.autograd.grad(total, list(leaves.values()), retain_graph=True, allow_unused=True)
    return {name for name, gradient in zip(leaves, found, strict=True) if gradient is not None}


def _jacobian(reading: Reading, names: Sequence[str]) -> Tensor:
    sites = reading.recorded.graph.structure.sites
    parts = []
    for name in names:
        transform = sites[name].transform
        if transform is not None:
            leaf = reading.leaves[name]
            parts.append(transform.log_abs_det_jacobian(leaf, transform(leaf)).sum())
    return total_of(parts)


def _fits(numel: int, dtype: torch.dtype) -> None:
    needed = 3 * numel**2 * torch.finfo(dtype).bits // 8
    if needed > MEMORY:
        raise ValueError(
            f"structure='full' for {numel} latent numbers needs about {needed / 2**30:.0f} GiB, more than "
            f"{MEMORY / 2**30:.0f}: give structure='kronecker' or 'diagonal', or sites='last layer'."
        )
