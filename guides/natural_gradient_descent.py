"""The optimizer of natural gradients: a step in the coordinates in which it stays a Gaussian.

A step of rate ρ on a precision Λ towards Λ̂ is Λ ← (1−ρ) Λ + ρ Λ̂, in whitened coordinates I + ρ (R − I), R = C^T Λ̂
C. A target that is not positive (a Hessian estimate may not be) takes the correction of Lin, Schmidt and Khan (2020),
X = ρ (R − I):  I + X + ½ X² = ½ [I + (I + X)²], which always is.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from bnn.guides._triangular import divide_lower
from bnn.ranks import Ranks

# Attribute of an unconstrained parameter: its geometry, and what its natural gradient was made of.
NATURAL = "bnn_natural"


class Natural:
    """What the ELBO leaves on a parameter for the optimizer.

    :ivar kind: ``"loc"``, ``"scale"`` (a logarithm) or ``"tril"`` (a Cholesky factor with logarithms on its diagonal).
    :ivar target: for a scale, the precision asked for relative to the present one; for a factor, the matrix R.
    :ivar count: how many estimates the target is the mean of.
    :ivar rate: the rate of the last step, which the optimizer leaves.
    :ivar ranks: processes that share the factorizations out, or None.
    :ivar place: where the parameter stands among them, the same on all.
    """

    __slots__ = ("kind", "target", "count", "rate", "ranks", "place")

    def __init__(self, kind: str, target: Tensor | None = None, count: int = 1) -> None:
        self.kind, self.target, self.count = kind, target, count
        self.rate: float | None = None
        self.ranks: Ranks | None = None
        self.place: tuple[int, str] = (0, "")


class NaturalGradientOptimizer(torch.optim.Optimizer):
    """As :class:`NaturalGradientDescent`, for one parameter or several: what Pyro's schedulers wrap."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        precision_lr: float | None = None,
        momentum: float = 0.0,
        other_lr: float = 1e-3,
    ) -> None:
        for name, value in {"lr": lr, "precision_lr": precision_lr, "other_lr": other_lr}.items():
            if value is not None and not 0 <= value <= 1:
                raise ValueError(
                    f"{name} is {value}; give a number from 0 to 1. A natural gradient's step is dimensionless: 1 is a "
                    "Newton step, 0.1 suits minibatches."
                )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum is {momentum}; give a number from 0 to below 1.")
        defaults = {"lr": lr, "precision_lr": precision_lr, "momentum": momentum, "other_lr": other_lr, "first_lr": lr}
        super().__init__(params, defaults)
        self._others: dict[Tensor, torch.optim.Optimizer] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on every parameter that has a gradient."""
        self.move()

    def move(self) -> None:
        """The same without the hooks that PyTorch puts around every optimizer's step, which cost more than it does."""
        for group in self.param_groups:
            lr, first = group["lr"], group["first_lr"]
            full = 0.5 * first if group["precision_lr"] is None else group["precision_lr"]
            rate = full * (lr / first if first else 1.0)
            for parameter in group["params"]:
                natural: Natural | None = getattr(parameter, NATURAL, None)
                if parameter.grad is None and (natural is None or natural.target is None):
                    continue
                if natural is None:
                    self._other(parameter, group["other_lr"] * (lr / first if first else 0.0))
                elif natural.kind == "loc":
                    self._loc(parameter, lr, group["momentum"])
                    natural.rate = lr
                elif natural.target is not None:
                    share = 1.0 - (1.0 - rate) ** natural.count
                    (_step_scale if natural.kind == "scale" else _step_tril)(parameter, natural.target, share)
                    natural.target = None

    def _loc(self, parameter: Tensor, lr: float, momentum: float) -> None:
        grad = parameter.grad
        assert grad is not None
        if momentum:
            state: dict[str, Any] = self.state[parameter]
            state["step"] = state.get("step", 0) + 1
            average = state.setdefault("average", torch.zeros_like(parameter))
            average.lerp_(grad, 1.0 - momentum)
            grad = average / (1.0 - momentum ** state["step"])
        parameter.sub_(grad, alpha=lr)

    def _other(self, parameter: Tensor, lr: float) -> None:
        if parameter not in self._others:
            self._others[parameter] = torch.optim.Adam([parameter], lr=lr)
            self._others[parameter].state = self.state  # so that state_dict() holds it
        self._others[parameter].param_groups[0]["lr"] = lr
        self._others[parameter].step()


def _step_scale(parameter: Tensor, target: Tensor, rate: float) -> None:
    """Log σ of a factor 1 + x of the precision, x = ρ (r − 1)."""
    x = (target - 1.0).mul_(rate)
    torch.where(target >= 0, x, torch.addcmul(x, x, x, value=0.5), out=x)
    parameter.sub_(x.clamp_min_(-1 + 1e-12).log1p_(), alpha=0.5)


def _step_tril(parameter: Tensor, target: Tensor, rate: float) -> None:
    """U ← U L⁻¹ with Lᵀ L = I + ρ (R − I) and L lower triangular: then (UUᵀ)⁻¹ has moved by the rate."""
    moved = (target * rate).flip(0, 1)
    moved.diagonal().add_(1.0 - rate)
    factor, failed = torch.linalg.cholesky_ex(moved)
    if failed:
        moved.diagonal().sub_(1.0)
        corrected = moved + 0.5 * moved @ moved
        corrected.diagonal().add_(1.0)
        factor = torch.linalg.cholesky(corrected)
    parameter.diagonal().exp_()
    divide_lower(parameter, factor.mT.flip(0, 1))
    parameter.diagonal().log_()


@contextlib.contextmanager
def _shared_out(params: Iterable[Any]) -> Iterator[None]:
    """Inside, each rank factorizes its share of the targets; at the end all get all."""
    found = [(getattr(parameter, NATURAL, None), parameter) for parameter in params]
    tril = [
        (n, p) for n, p in found if n is not None and n.ranks is not None and n.kind == "tril" and n.target is not None
    ]
    if not tril:
        yield
        return
    tril.sort(key=lambda pair: pair[0].place)
    ranks = tril[0][0].ranks
    owners = ranks.owners([float(len(parameter)) ** 3 for _, parameter in tril])
    for (natural, _), owner in zip(tril, owners, strict=True):
        if owner != ranks.rank:
            natural.target = None
    yield
    ranks.spread([parameter for _, parameter in tril], owners)


class NaturalGradientDescent(PyroOptim):
    """A ``PyroOptim`` for the natural gradients of :class:`~bnn.guides.TraceNaturalGradient_ELBO`.

        μ ← μ + lr · (natural gradient),        Λ ← (1 − ρ) Λ + ρ Λ̂,   ρ = precision_lr.

    Precisions stay positive definite at every rate. Rates are dimensionless: 1 is a Newton step. For minibatches 0.1
    and 0.05 suit; a constant rate leaves ½ lr/(2 − lr) (N/B − 1) nats per latent number of excess divergence in the
    mean, a quarter of a nat at lr = B/N, so anneal it to about that by the end, for instance with Pyro's schedulers:
    ``pyro.optim.ExponentialLR({"optimizer": NaturalGradientOptimizer, "optim_args": {"lr": 0.1}, "gamma": 0.99})``.
    The rate of the precisions follows that of the means.

    Parameters that are not natural, such as a model's own ``pyro.param``, are moved by Adam.

    :param lr: rate of the means.
    :param precision_lr: rate of the precisions: half of ``lr`` by default.
    :param momentum: decay of a running mean of the natural gradient of the means, bias-corrected.
    :param other_lr: Adam's rate for parameters that are not natural.
    :raises ValueError: for rates outside [0, 1].
    """

    def __init__(
        self, lr: float = 0.1, *, precision_lr: float | None = None, momentum: float = 0.0, other_lr: float = 1e-3
    ) -> None:
        args = {"lr": lr, "precision_lr": precision_lr, "momentum": momentum, "other_lr": other_lr}
        NaturalGradientOptimizer([torch.zeros(())], **args)  # type: ignore[arg-type]  # checks the numbers now
        super().__init__(NaturalGradientOptimizer, args)

    def __call__(self, params: Iterable[Any], *args: Any, **kwargs: Any) -> None:
        """A step on every parameter; ``SVI`` calls this."""
        with torch.no_grad(), _shared_out(params := list(params)):
            for parameter in params:
                optimizer = self.optim_objs.get(parameter)
                if optimizer is None or self.grad_clip[parameter] is not None:
                    super().__call__([parameter], *args, **kwargs)
                else:
                    optimizer.move()
