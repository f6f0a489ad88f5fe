"""Curves between two modes along which the energy stays low, and how high it rises on the straight line.

    bezier      φ(t) = (1−t)² z₁ + 2t(1−t) θ + t² z₂
    polygon     straight from z₁ over the bends θ₁ ... θ_k to z₂, the same time for each piece
    line        φ(t) = (1−t) z₁ + t z₂

The ends stay; the bends minimise E_{t ~ U(0,1)} U(φ(t)) by Adam (Garipov et al. 2018, NeurIPS, equation 2). The
gradient

    ∇_θ = (1/m) Σ_i w(t_i) ∇Û(φ(t_i)),      w(t) = ∂φ/∂θ, a number,      t_i = (i + u_i)/m

has no bias, neither by the random times nor by the minibatches; one t in each of m equal parts makes it quieter than m
times anywhere. Time runs evenly, not the length of the curve: the loss weighs its slow pieces more.

Modes differ by the numbering of hidden units as much as by anything else: :func:`bnn.align_hidden_units` first. Nets
with batch normalisation would need new statistics at every t, which are not computed: keep them in ``eval()``, or use
another normalisation. Cost: m gradients a step, as m chains.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.curvature_operators import position_of
from bnn.potential import Potential
from bnn.prediction import predict
from bnn.predictive_arrays import whole_number

KINDS = ("bezier", "polygon", "line")


@dataclass(frozen=True, eq=False)
class Curve:
    """A curve through the unconstrained positions of a potential.

    :ivar kind: ``"bezier"``, ``"polygon"`` or ``"line"``.
    :ivar points: its ends and what lies between, ``(points, dim)``.
    :ivar potential: of the model and its data.
    """

    kind: str
    points: Tensor
    potential: Potential

    def weights(self, times: Tensor) -> Tensor:
        """What each point counts at each time, ``(times, points)``."""
        t = times.unsqueeze(-1)
        if self.kind == "bezier":
            return torch.cat([(1 - t) ** 2, 2 * t * (1 - t), t**2], -1)
        pieces = len(self.points) - 1
        return (1 - (t * pieces - torch.arange(pieces + 1, device=t.device)).abs()).clamp_min(0)

    def position(self, times: Any) -> Tensor:
        """Flat positions at some times in [0, 1], ``(times, dim)``.

        :raises ValueError: for other times.
        """
        t = torch.as_tensor(times, dtype=self.points.dtype, device=self.points.device).reshape(-1)
        if not ((t >= 0.0) & (t <= 1.0)).all():
            raise ValueError(f"the times of a curve run from 0 to 1; given is {t.tolist()!r:.80}.")
        return self.weights(t) @ self.points

    def values(self, times: Any) -> dict[str, Tensor]:
        """Values of all sites at some times, as :func:`bnn.predict` takes draws: site -> ``(times, ...)``."""
        return self.potential.constrain(self.position(times))


def connect_modes(
    potential: Potential,
    first: Mapping[str, Tensor] | Tensor,
    second: Mapping[str, Tensor] | Tensor,
    *,
    kind: str = "bezier",
    bends: int = 1,
    steps: int = 1000,
    learning_rate: float = 0.03,
    points_per_step: int = 4,
) -> Curve:
    """A curve of low energy between two modes.

    :param potential: of the model and its data; its minibatches are used.
    :param first: where it begins: values of all sites in the model's space, or a flat position.
    :param second: where it ends.
    :param kind: ``"bezier"``, ``"polygon"``, or ``"line"``, which needs no steps.
    :param bends: points between the ends, of a polygon.
    :param steps: of Adam; its rate falls to zero along a cosine.
    :param learning_rate: the highest rate, in units of the unconstrained coordinates.
    :param points_per_step: m, times at which the gradient is taken in each step.
    :raises ValueError: for settings out of range, positions that do not fit, or an energy that becomes NaN.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import Potential, connect_modes
    >>> def ring():
    ...     z = pyro.sample("z", dist.Normal(torch.zeros(2), 10.).to_event(1))
    ...     pyro.factor("energy", -10. * (z.norm() - 1.) ** 2)
    >>> pyro.set_rng_seed(0)
    >>> curve = connect_modes(Potential(ring), torch.tensor([-1., 0.]), torch.tensor([1., 0.1]), steps=300)
    >>> bool(curve.position(0.5).norm() > 0.8)  # around the hill
    True
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; give one of {', '.join(map(repr, KINDS))}.")
    bends = whole_number("bends", bends, 1)
    if kind == "bezier" and bends != 1:
        raise ValueError(f"bends is {bends}, but a quadratic Bezier curve has one: take kind='polygon'.")
    steps, count = whole_number("steps", steps, 1), whole_number("points_per_step", points_per_step, 1)
    if not 0.0 < learning_rate < math.inf:
        raise ValueError(f"learning_rate is {learning_rate!r}; give a positive number.")
    ends = torch.stack([position_of(potential, at) for at in (first, second)])
    along = torch.linspace(0, 1, 2 if kind == "line" else bends + 2, dtype=ends.dtype, device=ends.device)
    curve = Curve(kind, torch.lerp(ends[0], ends[1], along.unsqueeze(-1)), potential)
    if kind == "line":
        return curve
    inner = curve.points[1:-1]  # a view: what Adam changes is the curve
    optimizer = torch.optim.Adam([inner], lr=learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        inner.grad = curve_gradient(curve, random_times(count, like=ends))
        if not torch.isfinite(inner.grad).all():
            raise ValueError(f"the gradient is not finite at step {step} of the curve: lower learning_rate.")
        optimizer.step()
        schedule.step()
    inner.grad = None
    return Curve(kind, curve.points.detach(), potential)


def random_times(count: int, like: Tensor) -> Tensor:
    """One time in each of ``count`` equal parts of [0, 1].

    >>> import torch
    >>> (random_times(4, torch.zeros(1)) * 4).floor()
    tensor([0., 1., 2., 3.])
    """
    start = torch.arange(count, dtype=like.dtype, device=like.device)
    return (start + torch.rand(count, dtype=like.dtype, device=like.device)) / count


def curve_gradient(curve: Curve, times: Tensor) -> Tensor:
    """The mean over ``times`` of the gradient of Û(φ(t)) with respect to the points between the ends."""
    weights = curve.weights(times)
    with torch.no_grad():
        _, grad = curve.potential.energy_and_grad(weights @ curve.points)
    return weights[:, 1:-1].T @ grad / len(times)


def curve_profile(curve: Curve, *args: Any, targets: Any = None, num_points: int = 41) -> Any:
    """Energy, and scores on other rows, along a curve: a Dataset of xarray along ``t``.

    ``energy`` is U over all the data of the potential. ``rise`` is what it lies above the straight line between its
    values at the ends, and ``barrier``, an attribute, the largest rise. With ``args`` and ``targets`` there are
    ``accuracy`` and ``nll`` of classes, or ``rmse``, of the net at each point. To see it: ``profile.energy.plot()``.

    :param curve: of :func:`connect_modes`.
    :param args: arguments of the model for predictions, such as the inputs of test rows.
    :param targets: of these rows.
    :param num_points: times, evenly spaced, the ends included.
    :raises ValueError: for args without targets, or shapes that do not fit.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import Potential, connect_modes, curve_profile
    >>> def hill():
    ...     z = pyro.sample("z", dist.Normal(0., 10.))
    ...     pyro.factor("energy", z ** 2 - z ** 4 / 4)
    >>> ends = torch.tensor([[-1.41], [1.41]])
    >>> profile = curve_profile(connect_modes(Potential(hill), *ends, kind="line"), num_points=5)
    >>> round(profile.attrs["barrier"], 2), profile.t.values.tolist()
    (0.99, [0.0, 0.25, 0.5, 0.75, 1.0])
    """
    import xarray

    times = torch.linspace(0, 1, whole_number("num_points", num_points, 3), dtype=torch.float64)
    if bool(args) != (targets is not None):
        raise ValueError("give both arguments of the model and their targets, or neither.")
    with torch.no_grad():
        energy = curve.potential.full_energy(curve.position(times)).double().cpu()
    rise = energy - torch.lerp(energy[0], energy[-1], times)
    columns = {"energy": energy, "rise": rise}
    if args:
        columns.update(_scores(curve, times, args, torch.as_tensor(targets).cpu()))
    return xarray.Dataset(
        {name: ("t", value.numpy()) for name, value in columns.items()},
        {"t": times.numpy()},
        {"barrier": float(rise.max()), "kind": curve.kind},
    )


def _scores(curve: Curve, times: Tensor, args: tuple[Any, ...], targets: Tensor) -> dict[str, Tensor]:
    found = predict(curve.values(times), *args, model=curve.potential.model, draws=True)
    if isinstance(found, dict):
        raise ValueError(f"the model has several observed sites, {', '.join(found)}: score them by bnn.predict.")
    each = found.draws.double()
    rows = each.shape[1:] if found.probabilities is None else each.shape[1:-1]
    targets = targets.reshape(rows) if targets.numel() == rows.numel() else targets
    if targets.shape != rows:
        raise ValueError(f"targets have shape {tuple(targets.shape)}; wanted is {tuple(rows)}.")
    if found.probabilities is None:
        return {"rmse": (each - targets).square().flatten(1).mean(1).sqrt()}
    labels = targets.long().expand(len(each), *rows)
    taken = each.gather(-1, labels.unsqueeze(-1)).flatten(1)
    right = (each.argmax(-1) == labels).double().flatten(1)
    return {"accuracy": right.mean(1), "nll": -taken.log().mean(1)}
