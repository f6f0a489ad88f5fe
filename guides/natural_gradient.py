"""The ELBO whose gradients are natural: it runs inside Pyro's own ``SVI``."""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.fisher import CURVATURES
from bnn.guides._base import NaturalGuide
from bnn.guides._estimate import Settings
from bnn.guides._kfac_blocks import PointSettings
from bnn.guides._perturbed import NOISES
from bnn.guides._progress import Progress
from bnn.guides._step import Result, Step
from bnn.guides._svi import is_followed
from bnn.guides._triangular import LARGE
from bnn.guides.eigen_normal import EigenBlock
from bnn.guides.kfac import PointEstimate
from bnn.guides.matrix_normal import MatrixBlock
from bnn.guides.natural_gradient_descent import NATURAL, Natural
from bnn.tiers import check_tier

DAMPINGS = ("exact", "factored")


class TraceNaturalGradient_ELBO(Trace_ELBO):
    """Evidence lower bound with natural gradients for the guides of this package.

        L = E_q[log p(D | w)] − λ KL(q ‖ p)

    Each step estimates the gradient of L and the curvature of the log-likelihood with per-datum gradients, and leaves
    minus the natural gradient in the ``.grad`` of the guide's parameters, for
    :class:`~bnn.guides.NaturalGradientDescent` (or plain ``pyro.optim.SGD``; the first, which reads more than that,
    finds none in large factors). Parameters of the model get their
    ordinary gradient. The model is recorded once for each shape of its arguments; where it draws minibatches by
    subsampling plates, rows come in shuffled epochs.

    On ``pyro.infer.autoguide.AutoDelta`` the same is K-FAC for point estimates (:mod:`bnn.guides.kfac`).

    :param curvature: ``"sampled"`` (default) draws labels from the model: unbiased. ``"ggn"`` is the exact Gauss-Newton
        matrix, at one backward pass per output. ``"empirical"`` squares gradients at the observed labels (the noisy
        Adam of Zhang et al. 2018), which is biased. ``"reparametrization"`` estimates the Hessian from the gradient at
        the draw alone, g̃ εᵀ, noisily, with the correction that keeps precisions positive (Lin, Schmidt and Khan 2020;
        as in IVON, Shen et al. 2024).
    :param kl_weight: λ > 0. Below one the posterior is narrower; this tempers the likelihood, not the prior.
    :param damping: ``"exact"``, the exact natural gradient of the family; ``"factored"``, the damped factors of noisy
        K-FAC (Zhang et al. 2018) for matrix normals, whose fixed point is narrower than the family's optimum.
    :param extrinsic_damping: added to the precision in the step of the means only, in units of the precision.
    :param label_samples: draws of the labels per datum and step, for ``"sampled"``.
    :param statistics_every: steps between estimates of the curvature.
    :param inverses_every: steps between updates of matrix factors and bases, a multiple of ``statistics_every``.
    :param curvature_rate: rate of the running means of second moments (``"factored"``, eigenbases).
    :param trust_region: bound on the root mean square of the whitened step of the means at rate 1; None for no bound.
    :param stick_the_landing: drop the score term, so that the gradient's noise vanishes where q is the posterior.
    :param noise: ``"weights"``: one draw of the weights for all data. ``"flipout"``: signs of it for every datum;
        ``"local"``: fresh noise for every output of a layer (local reparametrisation), less noisy gradients of the
        same mean. ``"shared"``: the draw of ``"weights"`` without forming the weights. With all but ``"weights"``
        layers with a fixed Normal prior take the divergence in closed form and do not stick the landing.
    :param num_particles: draws from the guide per step.
    :param vectorize_particles: accepted as in Pyro; the recorded step holds all particles in any case.
    :param check_every: steps between comparisons of the captured gradients with autograd's; 0 for none.
    :param adaptive_damping: for ``AutoDelta``: ``extrinsic_damping`` follows the rule of Levenberg and Marquardt, from
        a positive start. Deep nets on minibatches want a damping of about a thousandth of the number of data.
    :param rescale: for ``AutoDelta``: scale the step to the minimum of the quadratic model; use ``lr=1``.
    :param rescale_momentum: for ``AutoDelta``: and add the best multiple of the step before.
    :param block_tridiagonal: for ``AutoDelta``: curvature also between neighbouring layers.
    :param compile: ``"fx"`` or ``"inductor"``, see :mod:`bnn.tiers`.
    :raises ValueError: for settings out of range, a guide without a natural site, an optimizer that is not for natural
        gradients.
    :raises RuntimeError: if the loss is not finite. Parameters keep their values.
    """

    def __init__(
        self,
        curvature: str = "sampled",
        *,
        kl_weight: float = 1.0,
        damping: str = "exact",
        extrinsic_damping: float = 0.0,
        label_samples: int = 1,
        statistics_every: int = 1,
        inverses_every: int = 1,
        curvature_rate: float = 0.05,
        trust_region: float | None = 1.0,
        stick_the_landing: bool = True,
        noise: str = "weights",
        num_particles: int = 1,
        vectorize_particles: bool = False,
        check_every: int = 1000,
        adaptive_damping: bool = False,
        rescale: bool = False,
        rescale_momentum: bool = False,
        block_tridiagonal: bool = False,
        compile: str = "fx",
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=False)
        _one_of("curvature", curvature, CURVATURES)
        _one_of("damping", damping, DAMPINGS)
        _one_of("noise", noise, NOISES)
        check_tier(compile)
        _positive("kl_weight", kl_weight, "1 is the posterior, smaller values temper the likelihood")
        _positive("curvature_rate", curvature_rate, "the weight of a new estimate in a running mean, such as 0.05")
        for name, value in {"label_samples": label_samples, "statistics_every": statistics_every}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value}; give a whole number of at least 1.")
        if not extrinsic_damping >= 0:
            raise ValueError(f"extrinsic_damping is {extrinsic_damping}; give 0 or a positive number.")
        if trust_region is not None:
            _positive("trust_region", trust_region, "1 bounds the step by one posterior standard deviation, or None")
        if inverses_every % statistics_every or inverses_every < 1:
            raise ValueError(
                f"inverses_every is {inverses_every} and statistics_every {statistics_every}: factors are updated from "
                "statistics, so give a multiple."
            )
        if damping == "factored" and curvature == "reparametrization":
            raise ValueError("damping='factored' needs the factors of 'sampled', 'ggn' or 'empirical' curvature.")
        self.settings = Settings(
            curvature, label_samples, kl_weight, stick_the_landing, damping == "factored", extrinsic_damping,
            trust_region, noise, num_particles, vectorize_particles, "fx" if compile == "auto" else compile,
        )  # fmt: skip
        self.statistics_every, self.inverses_every = statistics_every, inverses_every
        self.curvature_rate, self.check_every = curvature_rate, check_every
        self._for_points = {
            "adaptive_damping": adaptive_damping, "rescale": rescale, "momentum": rescale_momentum,
            "block_tridiagonal": block_tridiagonal,
        }  # fmt: skip
        self._points: weakref.WeakKeyDictionary[Any, PointEstimate] = weakref.WeakKeyDictionary()
        self._steps: dict[Any, Step] = {}
        self._progress: weakref.WeakKeyDictionary[Any, Progress] = weakref.WeakKeyDictionary()

    # ---- what Pyro asks for

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; natural gradients are left in ``.grad``."""
        unwrapped = poutine.unwrap(guide) if hasattr(poutine, "unwrap") else guide
        if isinstance(unwrapped, AutoDelta):
            return self._point_estimate(model, unwrapped).loss_and_grads(kind_of(args, kwargs), args, kwargs)
        natural = self._natural_guide(unwrapped)
        if not natural.blocks:
            poutine.block(natural)(*args, **kwargs)
        if natural not in self._progress:
            self._progress[natural] = Progress(natural)
        progress = self._progress[natural]
        progress.check_optimizer()
        since = progress.count % self.inverses_every
        params = progress.parameters.current()
        saved: list[tuple[Tensor, Tensor]] = []
        if progress.count and not since and self._has_moments(natural):
            saved = [(tensor, tensor.detach().clone()) for tensor in [*natural.parameters(), *natural.buffers()]]
            params = self._refresh(natural, params, progress)
        if since % progress.prior_every(self.inverses_every) == 0:
            progress.priors = {}
        statistics = progress.count % self.statistics_every == 0
        step = self._step(model, natural, args, kwargs)
        if self.check_every and progress.count and progress.count % self.check_every == 0:
            self._warn_about(step.check(args, kwargs, params))
        known = progress.covariances(params, step.estimator.covariances)
        result, leaves = step(args, kwargs, known, statistics, progress.priors)
        loss = self._checked_loss(result, natural, progress, saved)
        progress.count += 1
        progress.priors = result.priors
        if statistics:
            progress.add(result)
        self._write(natural, params, result, progress)
        for leaf, grad in zip(leaves, result.parameters, strict=True):
            leaf.grad = grad.reshape(leaf.shape)
        progress.parameters.tell(leaves)
        return loss

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Minus the objective, with the weight of the divergence, by Pyro's handlers."""
        total = 0.0
        with torch.no_grad():
            for model_trace, guide_trace in self._get_traces(model, guide, args, kwargs):
                likelihood, divergence = 0.0, 0.0
                for site in model_trace.nodes.values():
                    if site["type"] == "sample":
                        if site["is_observed"]:
                            likelihood += float(site["log_prob_sum"])
                        else:
                            divergence -= float(site["log_prob_sum"])
                for site in guide_trace.nodes.values():
                    if site["type"] == "sample":
                        divergence += float(site["log_prob_sum"])
                total -= (likelihood - self.settings.kl_weight * divergence) / self.num_particles
        return total

    # ---- its parts

    def _point_estimate(self, model: Any, guide: AutoDelta) -> PointEstimate:
        if guide not in self._points:
            own, settings = dict(self._for_points), self.settings
            point = PointSettings(
                settings.curvature, settings.label_samples, settings.kl_weight, own.pop("block_tridiagonal"),
                settings.compile,
            )  # fmt: skip
            self._points[guide] = PointEstimate(
                model, guide, point, damping=settings.extrinsic_damping, trust_region=settings.trust_region,
                statistics_every=self.statistics_every, inverses_every=self.inverses_every,
                curvature_rate=self.curvature_rate, **own,
            )  # fmt: skip
        return self._points[guide]

    def _natural_guide(self, guide: Any) -> NaturalGuide:
        if not isinstance(guide, NaturalGuide):
            raise ValueError(
                f"the guide is {type(guide).__name__}, which has no natural gradient here: use AutoFactorizedNormal, "
                "AutoMatrixNormal or AutoEigenNormal of bnn.guides, pyro.infer.autoguide.AutoDelta for a point "
                "estimate by K-FAC, or pyro.infer.Trace_ELBO with this guide."
            )
        asked = [name for name, value in self._for_points.items() if value]
        if asked:
            raise ValueError(f"{', '.join(asked)} is for point estimates: use it with pyro.infer.autoguide.AutoDelta.")
        return guide

    def _step(self, model: Any, guide: NaturalGuide, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Step:
        key = (id(model), id(guide), kind_of(args, kwargs))
        if key not in self._steps:
            step = self._steps[key] = Step(model, guide, args, kwargs, self.settings)
            self._report(step)
        return self._steps[key]

    def _report(self, step: Step) -> None:
        """Say once which sites' curvature is noisier than it could be."""
        sites = step.graph.structure.sites
        if len(self._steps) == 1:
            self._warn_about({n: why for n, why in step.estimator.reasons.items() if sites[n].transform is None})

    def _warn_about(self, reasons: Mapping[str, str]) -> None:
        if reasons:
            lines = "; ".join(f"{name!r}: {why}" for name, why in reasons.items())
            warnings.warn(
                f"the curvature of some sites is estimated from whole-batch gradients, with more noise: {lines}.",
                RuntimeWarning,
                stacklevel=6,
            )

    def _has_moments(self, guide: NaturalGuide) -> bool:
        """Whether a block keeps second moments; the others' statistics end with the update of their factors."""
        return self.settings.factored or any(isinstance(block, EigenBlock) for block in guide.blocks)

    def _refresh(self, guide: NaturalGuide, params: list[dict[str, Tensor]], progress: Progress) -> Any:
        """Second moments into bases and factors."""
        for number, (block, leaves) in enumerate(zip(guide.blocks, progress.parameters.leaves, strict=True)):
            targets = progress.mean(number)
            with torch.no_grad():
                if isinstance(block, EigenBlock) and "row_moment" in targets:
                    block.refresh(params[number], leaves, self.curvature_rate, targets)
                elif self.settings.factored and isinstance(block, MatrixBlock) and "row_moment" in targets:
                    moments = progress.averaged(number, targets, self.curvature_rate)
                    block.set_factored(leaves, **moments)
        progress.forget()
        return progress.parameters.current()

    def _write(self, guide: NaturalGuide, params: Any, result: Result, progress: Progress) -> None:
        due = progress.count % self.inverses_every == 0
        for number, (block, leaves) in enumerate(zip(guide.blocks, progress.parameters.leaves, strict=True)):
            gradients = {"loc": result.directions[number]}
            natural = {"loc": Natural("loc")}
            in_factors = block.family == "matrix"  # updated with the inverses; scales at once
            found = (progress.mean(number) if due else {}) if in_factors else result.targets[number]
            targets = block.finished(params[number], found)
            if targets:
                large = in_factors and max(leaves["loc"].shape) >= LARGE
                if not (large and is_followed(leaves["loc"])):  # no large matrices that nobody reads
                    gradients.update(block.scale_gradients(params[number], targets))
                count = progress.events if in_factors else 1
                natural.update({n: Natural(block.parameters[n], t, count) for n, t in targets.items()})
            for name, leaf in leaves.items():
                leaf.grad = gradients[name].reshape(leaf.shape) if name in gradients else None
                setattr(leaf, NATURAL, natural.get(name))
        if due and not self._has_moments(guide):
            progress.forget()
        progress.check_optimizer.remember(leaves["loc"] for leaves in progress.parameters.leaves)

    def _checked_loss(
        self, result: Result, guide: NaturalGuide, progress: Progress, saved: list[tuple[Tensor, Tensor]]
    ) -> float:
        loss, size = float(result.loss), float(result.size)
        if math.isfinite(loss) and math.isfinite(size):
            return loss
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        pairs = zip(guide.blocks, result.directions, strict=True)
        bad = ["+".join(block.names) for block, direction in pairs if not torch.isfinite(direction).all()]
        what = f"the gradient is not finite at sites {bad}" if bad else f"the loss is {loss}"
        raise RuntimeError(
            f"at step {progress.count} {what}; the parameters keep their last finite values. Check the data for NaN "
            "and their scale, lower lr, or start closer to the prior mean (init_scale=, init_loc_fn=)."
        )


def kind_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A key for all that a recording depends on: shapes of tensors, and everything else by value."""
    if not kwargs and all(isinstance(argument, Tensor) for argument in args):
        return tuple(_key(argument) for argument in args)
    leaves, spec = pytree.tree_flatten((args, dict(kwargs)))
    return str(spec), tuple(_key(leaf) for leaf in leaves)


def _key(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    try:
        hash(leaf)
    except TypeError:
        return id(leaf)
    return type(leaf), leaf


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, known))}.")


def _positive(name: str, value: float, meaning: str) -> None:
    if not value > 0:
        raise ValueError(f"{name} is {value}; give a positive number: {meaning}.")
