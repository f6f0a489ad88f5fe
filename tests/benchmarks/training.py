"""What the guides are compared with: plain training, and natural gradients of other libraries, on the same nets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from nets import Case
from torch import Tensor, nn

Step = Callable[[], Any]


def weights_of(case: Case) -> list[nn.Parameter]:
    pieces = zip(torch.from_numpy(case.start).split(case.sizes), case.shapes, strict=True)
    return [nn.Parameter(piece.reshape(shape).clone()) for piece, shape in pieces]


def minibatches(case: Case) -> Callable[[], tuple[Tensor, Tensor]]:
    x, y = case.data

    def draw() -> tuple[Tensor, Tensor]:
        rows = torch.randint(case.rows, (case.batch,))
        return x[rows], y[rows]

    return draw


def plain(case: Case, optimizer: type[torch.optim.Optimizer]) -> Step:
    """Training with an optimizer of PyTorch."""
    weights, minibatch = weights_of(case), minibatches(case)
    optimize = optimizer(weights, lr=1e-9)

    def step() -> None:
        optimize.zero_grad()
        case.misfit(weights, *minibatch()).backward()
        optimize.step()

    return step


def ivon(case: Case) -> Step:
    """The optimizer of ``ivon-opt``, by the authors of the method."""
    from ivon import IVON

    weights, minibatch = weights_of(case), minibatches(case)
    optimize = IVON(weights, lr=1e-5, ess=case.rows, hess_init=1e3)

    def step() -> None:
        batch = minibatch()
        with optimize.sampled_params(train=True):
            optimize.zero_grad()
            (case.misfit(weights, *batch) / case.rows).backward()
        optimize.step()

    return step


def curvlinops(case: Case) -> Step:
    """K-FAC of ``curvlinops``: factors every 10 steps, from one minibatch alone, and inverses every 20.

    Factors of drawn labels and heuristic damping, as ours; without running means, prior and trust region.
    """
    import curvlinops

    net, minibatch = module(case), minibatches(case)
    weights = list(net.parameters())
    loss: Any = nn.MSELoss() if case.name == "S" else nn.CrossEntropyLoss()
    count, inverse = 0, None

    def step() -> None:
        nonlocal count, inverse
        x, y = minibatch()
        y = y[:, None] if case.name == "S" else y
        if count % 10 == 0:
            # At its defaults for training: one label drawn per datum, weight and bias as one matrix.
            factors = curvlinops.KFACLinearOperator(
                net, loss, weights, [(x, y)], check_deterministic=False, separate_weight_and_bias=False,
                num_data=case.batch,
            )  # fmt: skip
            factors.compute_kronecker_factors()
            if count % 20 == 0:
                inverse = curvlinops.KFACInverseLinearOperator(factors, damping=1e-3, use_heuristic_damping=True)
        grads = torch.autograd.grad(loss(net(x), y), weights)
        with torch.no_grad():
            for weight, change in zip(weights, inverse @ list(grads), strict=True):
                weight.sub_(change, alpha=1e-9)
        count += 1

    return step


def module(case: Case) -> nn.Module:
    """The net of a case out of modules."""
    layers: list[nn.Module] = []
    if case.name == "C":
        layers += [nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        layers += [nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()]
    dense = [shape for shape in case.shapes if len(shape) == 2]
    for outputs, inputs in dense:
        layers += [nn.Linear(inputs, outputs), nn.Tanh() if case.name == "S" else nn.ReLU()]
    net = nn.Sequential(*layers[:-1])
    with torch.no_grad():
        for parameter, weight in zip(net.parameters(), weights_of(case), strict=True):
            parameter.copy_(weight)
    return net
