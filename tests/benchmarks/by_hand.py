"""What a user would write without the library: SGLD loops in plain PyTorch, and SGLD on Pyro's handlers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pyro
import torch
from nets import Case
from pyro import poutine
from torch import Tensor

Step = Callable[[], None]
DECAY = 0.1  # what SGHMC's momentum loses in a step


def loops(case: Case) -> tuple[dict[str, Step], dict[str, Step]]:
    """Hand-written steps on a flat vector: those that differentiate the prior, and those that add its gradient."""
    differentiated = {
        "loop, flat leaf": flat_leaf(case),
        "loop, leaves are views": view_leaves(case),
        "loop, .backward() into one buffer": flat_grad(case),
    }
    by_hand = {
        "loop, flat leaf, weight decay": flat_leaf(case, decay=True),
        "loop, leaves are views, weight decay": view_leaves(case, decay=True),
        "loop, .backward() into one buffer, weight decay": flat_grad(case, decay=True),
    }
    return differentiated, by_hand


def flat_leaf(case: Case, decay: bool = False) -> Step:
    """One flat leaf; the prior is ½ zᵀz inside the energy or, with ``decay``, its gradient is added by hand."""
    z, minibatch = _start(case).requires_grad_(), _minibatches(case)
    noise, scale, h = torch.empty_like(z), math.sqrt(2 * case.step_size), case.step_size

    def step() -> None:
        energy = case.misfit(_views(case, z), *minibatch())
        if not decay:
            energy = energy + 0.5 * (z @ z)
        (grad,) = torch.autograd.grad(energy, z)
        with torch.no_grad():
            noise.normal_()
            if decay:
                z.mul_(1 - h)
            z.add_(grad, alpha=-h).add_(noise, alpha=scale)

    return step


def view_leaves(case: Case, decay: bool = False) -> Step:
    """The leaves are views of a flat vector, so that autograd need not put their gradients together.

    The prior sees the flat vector, a leaf as well.
    """
    z, minibatch = _start(case), _minibatches(case)
    views = _views(case, z)
    leaves = [view.detach().requires_grad_() for view in views]
    flat = z.detach().requires_grad_()
    noise, scale, h = torch.empty_like(z), math.sqrt(2 * case.step_size), case.step_size

    def step() -> None:
        energy = case.misfit(leaves, *minibatch())
        if decay:
            grads = torch.autograd.grad(energy, leaves)
        else:
            *grads, prior_grad = torch.autograd.grad(energy + 0.5 * (flat @ flat), [*leaves, flat])
        with torch.no_grad():
            noise.normal_()
            if decay:
                z.mul_(1 - h)
            else:
                z.add_(prior_grad, alpha=-h)
            torch._foreach_add_(views, grads, alpha=-h)
            z.add_(noise, alpha=scale)

    return step


def flat_grad(case: Case, decay: bool = False, friction: float | None = None) -> Step:
    """The leaves are views of a flat vector, and so are their ``.grad``, which ``backward`` adds to.

    :param friction: share of the momentum lost in a step, which makes it SGHMC of the same step in z.
    """
    z, minibatch = _start(case), _minibatches(case)
    leaves = [view.detach().requires_grad_() for view in _views(case, z)]
    flat, grad = z.detach().requires_grad_(), torch.zeros_like(z)
    flat.grad = grad
    for leaf, view in zip(leaves, _views(case, grad), strict=True):
        leaf.grad = view
    noise, scale, h = torch.empty_like(z), math.sqrt(2 * case.step_size), case.step_size
    step_size = math.sqrt(h)  # of SGHMC
    momentum = torch.randn_like(z)

    def step() -> None:
        energy = case.misfit(leaves, *minibatch())
        with torch.no_grad():
            if decay:
                grad.copy_(z)  # the prior's gradient
            else:
                grad.zero_()
        if not decay:
            energy = energy + 0.5 * (flat @ flat)
        energy.backward()
        with torch.no_grad():
            noise.normal_()
            if friction is None:
                z.add_(grad, alpha=-h).add_(noise, alpha=scale)
                return
            momentum.mul_(1 - friction).add_(grad, alpha=-step_size).add_(noise, alpha=math.sqrt(2 * friction))
            z.add_(momentum, alpha=step_size)

    return step


def pyro_handlers(case: Case) -> Step:
    """SGLD by ``poutine.condition`` and ``poutine.trace`` at every step."""
    model, (x, y) = case.model(), case.data
    values = dict(zip(case.sites, (v.clone() for v in _views(case, _start(case))), strict=True))
    scale, h = math.sqrt(2 * case.step_size), case.step_size

    def step() -> None:
        leaves = {name: value.requires_grad_() for name, value in values.items()}
        with pyro.validation_enabled(False):
            trace = poutine.trace(poutine.condition(model, data=leaves)).get_trace(x, y)
            grads = torch.autograd.grad(trace.log_prob_sum(), list(leaves.values()))
        for (name, value), grad in zip(leaves.items(), grads, strict=True):
            values[name] = (value.detach() + h * grad).add_(torch.randn_like(grad), alpha=scale)

    return step


def _start(case: Case) -> Tensor:
    return torch.from_numpy(case.start.copy())


def _views(case: Case, z: Tensor) -> list[Tensor]:
    return [piece.view(shape) for piece, shape in zip(z.split(case.sizes), case.shapes, strict=True)]


def _minibatches(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    x, y = case.data

    def minibatch() -> tuple[Tensor, Tensor]:
        rows = torch.randint(case.rows, (case.batch,))
        return x.index_select(0, rows), y.index_select(0, rows)

    return minibatch
