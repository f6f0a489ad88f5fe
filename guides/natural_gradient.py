"""The ELBO whose gradients are natural: it runs inside Pyro's own ``SVI``."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.fisher import CURVATURES
from bnn.guides._base import NaturalGuide
from bnn.guides._step import Result, Settings, Step
from bnn.guides.natural_gradient_descent import NATURAL, Natural
from bnn.tiers import check_tier

DAMPINGS = ("exact", "factored")


class TraceNaturalGradient_ELBO(Trace_ELBO):
    """Evidence lower bound with natural gradients for the guides of this package.

        L = E_q[log p(D | w)] − λ KL(q ‖ p)

    Each step estimates the gradient of L and the curvature of the log-likelihood with per-datum gradients, and leaves
    minus the natural gradient in the ``.grad`` of the guide's parameters, for
    :class:`~bnn.guides.NaturalGradientDescent` (or plain ``pyro.optim.SGD``). Parameters of the model get their
    ordinary gradient. The model is recorded once for each shape of its arguments; where it draws minibatches by
    subsampling plates, rows come in shuffled epochs.

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
    :param num_particles: draws from the guide per step.
    :param vectorize_particles: accepted as in Pyro; the recorded step holds all particles in any case.
    :param check_every: steps between comparisons of the captured gradients with autograd's; 0 for none.
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
        num_particles: int = 1,
        vectorize_particles: bool = False,
        check_every: int = 1000,
        compile: str = "fx",
    ) -> None:
        super().__init__(num_particles=num_particles, vectorize_particles=False)
        _one_of("curvature", curvature, CURVATURES)
        _one_of("damping", damping, DAMPINGS)
        check_tier(compile)
        _positive("kl_weight", kl_weight, "1 is the posterior, smaller values temper the likelihood")
        _positive("curvature_rate", curvature_rate, "the weight of a new estimate in a running mean, such as 0.05")
        for name, value in {"label_samples": label_samples, "statistics_every": statistics_every}.items():
            _positive(name, value, "a whole number of at least 1")
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
            trust_region, num_particles, vectorize_particles, "fx" if compile == "auto" else compile,
        )  # fmt: skip
        self.statistics_every, self.inverses_every = statistics_every, inverses_every
        self.curvature_rate, self.check_every = curvature_rate, check_every
        self._steps: dict[Any, Step] = {}
        self._progress: weakref.WeakKeyDictionary[Any, _Progress] = weakref.WeakKeyDictionary()

    # ---- what Pyro asks for

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; natural gradients are left in ``.grad``."""
        natural = _natural_guide(guide)
        if not natural.blocks:
            poutine.block(natural)(*args, **kwargs)
        progress = self._progress.setdefault(natural, _Progress())
        progress.check_optimizer()
        with poutine.trace(param_only=True):
            params = [natural.params_of(block) for block in natural.blocks]
        if progress.count and progress.count % self.inverses_every == 0:
            params = self._refresh(natural, params, progress)
        statistics = progress.count % self.statistics_every == 0
        step = self._step(model, natural, args, kwargs)
        result, leaves = step(args, kwargs, params, statistics)
        loss = float(result.loss)
        self._check_finite(loss, result, natural, progress.count)
        progress.count += 1
        if statistics:
            progress.add(result)
        self._write(natural, params, result, progress)
        for leaf, grad in zip(leaves, result.parameters, strict=True):
            leaf.grad = grad.reshape(leaf.shape)
        _tell_svi(leaves)
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

    def _step(self, model: Any, guide: NaturalGuide, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Step:
        key = (id(model), id(guide), _kind_of(args, kwargs))
        if key not in self._steps:
            step = self._steps[key] = Step(model, guide, args, kwargs, self.settings)
            self._report(step)
        return self._steps[key]

    def _report(self, step: Step) -> None:
        if len(self._steps) == 1 and step.reasons:
            lines = "; ".join(
                f"{name!r}: {why}"
                for name, why in step.reasons.items()
                if step.graph.structure.sites[name].transform is None
            )
            if lines:
                warnings.warn(
                    f"the curvature of some sites is estimated from whole-batch gradients, with more noise: {lines}.",
                    RuntimeWarning,
                    stacklevel=5,
                )

    def _refresh(self, guide: NaturalGuide, params: list[dict[str, Tensor]], progress: _Progress) -> Any:
        """Second moments into bases and factors."""
        for number, block in enumerate(guide.blocks):
            targets = progress.mean(number, drop=False)
            with torch.no_grad():
                if block.family == "eigen" and "row_moment" in targets:
                    block.refresh(params[number], self.curvature_rate, targets)  # type: ignore[attr-defined]
                elif self.settings.factored and block.family == "matrix" and targets:
                    moments = progress.averaged(number, targets, self.curvature_rate)
                    block.set_factored(params[number], **moments)  # type: ignore[attr-defined]
        progress.forget_moments()
        with poutine.trace(param_only=True):
            return [guide.params_of(block) for block in guide.blocks]

    def _write(self, guide: NaturalGuide, params: Any, result: Result, progress: _Progress) -> None:
        due = progress.count % self.inverses_every == 0
        leaves = []
        for number, block in enumerate(guide.blocks):
            gradients = {"loc": -result.directions[number]}
            natural = {"loc": Natural("loc")}
            scales = [name for name in block.parameters if name != "loc"]
            if due if block.family == "matrix" else result.targets[number]:
                targets = progress.mean(number, drop=True) if block.family == "matrix" else result.targets[number]
                targets = {name: targets[name] for name in scales if name in targets}
                if targets:
                    gradients.update(block.scale_gradients(params[number], targets))
                    count = progress.taken if block.family == "matrix" else 1
                    for name in scales:
                        natural[name] = Natural(block.parameters[name], targets[name], count)
            for name in block.parameters:
                leaf: Any = params[number][name].unconstrained()  # type: ignore[operator]
                leaf.grad = gradients[name].reshape(leaf.shape) if name in gradients else None
                setattr(leaf, NATURAL, natural.get(name))
                leaves.append(leaf)
        progress.remember(leaves)
        _tell_svi(leaves)

    def _check_finite(self, loss: float, result: Result, guide: NaturalGuide, count: int) -> None:
        bad = [
            "+".join(block.names)
            for block, direction in zip(guide.blocks, result.directions, strict=True)
            if not torch.isfinite(direction).all()
        ]
        if bad or loss != loss or loss in (float("inf"), -float("inf")):
            where = f"the gradient is not finite at sites {bad}" if bad else f"the loss is {loss}"
            raise RuntimeError(
                f"at step {count} {where}; the parameters keep their last finite values. Check the data for NaN and "
                "their scale, lower lr, or start closer to the prior mean (init_scale=, init_loc_fn=)."
            )


class _Progress:
    """How far the training of one guide is."""

    def __init__(self) -> None:
        self.count = 0
        self.taken = 0
        self._targets: list[dict[str, Tensor]] = []
        self._moments: dict[int, dict[str, Tensor]] = {}
        self._events = 0
        self._first: list[tuple[Tensor, Tensor, Tensor]] | None = None
        self._checked = False

    def add(self, result: Result) -> None:
        if not self._targets:
            self._targets, self._events = [dict(block) for block in result.targets], 1
            return
        for block, fresh in zip(self._targets, result.targets, strict=True):
            for name, value in fresh.items():
                block[name] = block.get(name, 0.0) + value
        self._events += 1

    def mean(self, number: int, *, drop: bool) -> dict[str, Tensor]:
        if not self._targets:
            return {}
        self.taken = self._events
        found = {name: value / self._events for name, value in self._targets[number].items()}
        del drop
        return found

    def averaged(self, number: int, fresh: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """Bias-corrected running means."""
        state = self._moments.setdefault(number, {})
        weight = state.get("weight", torch.zeros(()))
        state["weight"] = torch.lerp(weight, torch.ones(()), rate)
        for name, value in fresh.items():
            state[name] = torch.lerp(state.get(name, torch.zeros_like(value)), value, rate)
        return {name: value / state["weight"].to(value) for name, value in state.items() if name != "weight"}

    def forget_moments(self) -> None:
        self._targets, self._events = [], 0

    def remember(self, leaves: list[Any]) -> None:
        """At the first step, where each location stood and where its gradient points."""
        if self._checked or self._first is not None:
            return
        moved = [leaf for leaf in leaves if getattr(leaf, NATURAL, None) and getattr(leaf, NATURAL).kind == "loc"]
        self._first = [(leaf, leaf.detach().clone(), leaf.grad.clone()) for leaf in moved]

    def check_optimizer(self) -> None:
        """:raises ValueError: if the first step was not along the natural gradient, as Adam's is not."""
        if self._first is None or self._checked:
            return
        for leaf, before, grad in self._first:
            step = before - leaf.detach()
            sizes = step.norm() * grad.norm()
            if sizes > 0 and (step * grad).sum() < 0.99 * sizes:
                raise ValueError(
                    "the optimizer does not step along the natural gradient that it is given: it rescales every entry, "
                    "as Adam does, which undoes it. Use bnn.guides.NaturalGradientDescent (or pyro.optim.SGD); for "
                    "Adam, use pyro.infer.Trace_ELBO in place of TraceNaturalGradient_ELBO."
                )
        self._first, self._checked = None, True


class _Handle:
    """What ``SVI`` asks a parameter for."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf

    def unconstrained(self) -> Tensor:
        return self.leaf


def _tell_svi(leaves: list[Any]) -> None:
    """A ``param`` statement for each leaf, without computing its constrained value."""
    statement = pyro.poutine.runtime.effectful(type="param")(lambda handle: handle)
    for leaf in leaves:
        statement(_Handle(leaf), name=f"bnn.{id(leaf)}")


def _natural_guide(guide: Any) -> NaturalGuide:
    found = poutine.unwrap(guide) if hasattr(poutine, "unwrap") else guide
    if not isinstance(found, NaturalGuide):
        raise ValueError(
            f"the guide is {type(found).__name__}, which has no natural gradient here: use AutoFactorizedNormal, "
            "AutoMatrixNormal or AutoEigenNormal of bnn.guides, or pyro.infer.Trace_ELBO with this guide."
        )
    return found


def _kind_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A key for all that a recording depends on: shapes of tensors, and everything else by value."""
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
