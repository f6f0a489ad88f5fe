"""The loss that moves all points of a guide at once.

    loss = Σ_k U(z_k) + log q(z_k)          (ensembles: k = 1 ... K)
    loss = 1/P Σ_p U(z_p) + log q(z_p)      (guides that draw points, such as dropout: p = 1 ... num_particles)

One step is one call of one recorded program, vectorized over the points.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.guides._energies import Energies, PerMember, for_one
from bnn.guides._flat import FlatGuide
from bnn.guides._svi import tell
from bnn.guides.ensemble import AutoEnsemble
from bnn.guides.natural_gradient import kind_of
from bnn.guides.repulsion import Repulsion
from bnn.tiers import check_tier


class TraceEnsemble_ELBO(Trace_ELBO):
    """The loss of all members of an :class:`~bnn.guides.AutoEnsemble`, for Pyro's ``SVI`` and any optimizer.

    The sum of the members' potential energies, minus log posteriors up to a constant, so that each member moves as it
    would alone under an optimizer that treats entries apart (``Adam``, ``SGD``; not one that clips by the norm of all).
    The model is recorded once for each shape of its arguments; where it draws minibatches by subsampling plates, each
    member has its own. Data of which each member has its own are given as :class:`~bnn.guides.PerMember`. Parameters
    of the model are shared.

    With guides that draw points, such as :class:`~bnn.guides.AutoDropout`, it is the mean over ``num_particles`` draws.

    :param num_particles: draws per step; for ensembles without effect.
    :param repulsion: of :mod:`bnn.guides.repulsion`: keeps the members of an ensemble apart.
    :param compile: ``"fx"`` or ``"inductor"``, see :mod:`bnn.tiers`.
    :raises ValueError: for another guide, or a repulsion without an ensemble.
    :raises RuntimeError: if a loss or gradient is not finite; parameters keep their values.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.guides import AutoEnsemble, TraceEnsemble_ELBO
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y)
    >>> guide = AutoEnsemble(model, members=3)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 0.1}), TraceEnsemble_ELBO())
    >>> losses = [svi.step(torch.tensor([1., 2., 3.])) for _ in range(100)]
    >>> guide.draws(3)["mean"]  # all at the mode
    tensor([1.5000, 1.5000, 1.5000])
    """

    def __init__(self, *, num_particles: int = 1, repulsion: Repulsion | None = None, compile: str = "fx") -> None:
        super().__init__(num_particles=num_particles)
        check_tier(compile)
        if not isinstance(num_particles, int) or isinstance(num_particles, bool) or num_particles < 1:
            raise ValueError(f"num_particles is {num_particles!r}; give the number of draws per step, at least 1.")
        if repulsion is not None and not isinstance(repulsion, Repulsion):
            raise ValueError(
                f"repulsion is {repulsion!r:.60}; give WeightRepulsion(), FunctionRepulsion(points) or SteinRepulsion()"
                " of bnn.guides, or None."
            )
        self.repulsion, self.compile = repulsion, compile
        self._energies: weakref.WeakKeyDictionary[Any, dict[Any, Energies]] = weakref.WeakKeyDictionary()
        self._resumed: dict[str, Any] = {}

    # ---- what Pyro asks for

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss; gradients are left in ``.grad``."""
        points, evaluate = self._prepared(model, guide, args, kwargs)
        in_loss, in_gradient = self.weights(points)
        energies, gradients, own = evaluate(points, args, kwargs)
        with torch.enable_grad():
            log_q = guide.flat_log_density(points).to(in_loss.dtype)
        loss = float(in_loss @ (energies + log_q.detach()))
        if self.repulsion is not None:  # forces act on the whole gradient
            if log_q.requires_grad:
                gradients = gradients + torch.autograd.grad(log_q.sum(), points, retain_graph=True)[0]
                log_q = log_q.detach()
            gradients = self.repulsion(guide, points.detach(), gradients)
        _check(loss, gradients, guide)
        outputs, weighted = [points], [in_gradient[:, None] * gradients]
        if log_q.requires_grad:
            outputs, weighted = [points, log_q], [*weighted, in_gradient]
        torch.autograd.backward(outputs, weighted)
        for leaf, grad in zip(evaluate.parameters, own, strict=True):
            leaf.grad = torch.tensordot(in_gradient.to(grad.dtype), grad, 1).reshape(leaf.shape)
        tell([], evaluate.parameters)
        return loss

    @torch.no_grad()
    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """The loss alone."""
        points, evaluate = self._prepared(model, guide, args, kwargs)
        energies, *_ = evaluate(points, args, kwargs)
        in_loss, _ = self.weights(points)
        return float(in_loss @ (energies + guide.flat_log_density(points)))

    # ---- checkpoints

    def training_state(self, guide: Any) -> dict[str, Any]:
        """The order of the minibatches, which :func:`bnn.checkpoint` asks for."""
        return {**self._resumed, **{_name(key): one.state() for key, one in self._energies.get(guide, {}).items()}}

    def load_training_state(
        self, model: Any, guide: Any, state: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> None:
        """Go on from another training's :meth:`training_state`."""
        del model, args, kwargs
        self._energies.pop(guide, None)
        self._resumed = dict(state)

    # ---- for subclasses

    def points(self, guide: FlatGuide) -> Tensor:
        """Where the model is evaluated, ``(points, dim)``, differentiable in the guide's parameters.

        :raises ValueError: for a repulsion without an ensemble.
        """
        if self.repulsion is not None and not isinstance(guide, AutoEnsemble):
            raise ValueError(f"repulsion= keeps members of an ensemble apart; {type(guide).__name__} has none.")
        self._whole = isinstance(guide, AutoEnsemble)
        return guide.particles(self.num_particles)

    def weights(self, points: Tensor) -> tuple[Tensor, Tensor]:
        """What each point counts in the loss and in its gradient."""
        weights = points.new_full((len(points),), 1.0 if self._whole else 1.0 / len(points))
        return weights, weights

    def _prepared(
        self, model: Any, guide: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Energies]:
        if not isinstance(guide, FlatGuide):
            raise ValueError(
                f"the guide is {type(guide).__name__}, which has no points to move: use AutoEnsemble, AutoSWAG, "
                "AutoSnapshots, AutoDropout or AutoIVON of bnn.guides, or pyro.infer.Trace_ELBO with this guide."
            )
        if not guide.is_set_up:
            first_args, first_kwargs = for_one(args, kwargs)
            poutine.block(guide)(*first_args, **first_kwargs)
        points = self.points(guide)
        known = self._energies.setdefault(guide, {})
        key = id(model), len(points), _kind(args, kwargs)
        if key not in known:
            known[key] = Energies(model, args, kwargs, len(points), self.compile)
            if (resumed := self._resumed.pop(_name(key), None)) is not None:
                known[key].load_state(resumed)
        return points, known[key]


def _name(key: tuple[Any, ...]) -> str:
    """The same in every process: without the model's number."""
    return repr(key[1:])


def _kind(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """A key for all that a recording depends on."""
    own = tuple(isinstance(leaf, PerMember) for leaf in pytree.tree_leaves((args, dict(kwargs))))
    return own, kind_of(*for_one(args, kwargs))


def _check(loss: float, gradients: Tensor, guide: FlatGuide) -> None:
    if torch.isfinite(gradients.sum()) and abs(loss) < float("inf"):
        return
    bad = (~torch.isfinite(gradients).all(1)).nonzero().flatten().tolist()
    if not bad and abs(loss) < float("inf"):  # the sum alone overflowed
        return
    sites = [n for n, site in guide.structure.sites.items() if not torch.isfinite(gradients[:, site.slice]).all()]
    raise RuntimeError(
        f"the loss is {loss}"
        + (f" and the gradient not finite at sites {sites} of members {bad}" if bad else "")
        + "; "
        "the parameters keep their last values. Check the data for NaN and their scale, lower the learning rate, or "
        "start elsewhere (init_loc_fn=)."
    )
