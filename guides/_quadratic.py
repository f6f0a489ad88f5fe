"""Slopes and curvatures along a few directions, for the quadratic model of a minibatch.

With probes s of :mod:`bnn.fisher`, F = Σ ∇s ∇sᵀ is the exact Gauss-Newton matrix, or its estimate from drawn labels, so
that vᵀ F w = Σ (∇s · v)(∇s · w). All ∇s · v come from one derivative along v, whatever the number of probes: that of
uᵀ (ds/dw) v with respect to u.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from bnn.guides._estimate import gradients

Values = Mapping[str, Tensor]


def along(probes: Sequence[Tensor], leaves: Values, directions: Sequence[Values]) -> Tensor:
    """∇s · v, (directions, entries of all probes).

    :param probes: tensors that depend on the leaves.
    :param leaves: name -> leaf; directions may have more names.
    :param directions: name -> v, each.
    """
    flat = torch.cat([probe.reshape(-1) for probe in probes]) if probes else torch.zeros(())
    if not leaves or not flat.requires_grad:
        like = next(iter(directions[0].values()))
        return like.new_zeros(len(directions), 1)
    u = torch.zeros_like(flat).requires_grad_()
    back = torch.autograd.grad(flat, list(leaves.values()), u, create_graph=True, materialize_grads=True)
    totals = [inner(dict(zip(leaves, back, strict=True)), {n: v[n] for n in leaves}) for v in directions]
    return torch.stack([gradients(total, [u])[0] for total in totals])


def inner(first: Values, second: Values) -> Tensor:
    """Σ over sites and entries of the product, without a temporary of a site's size."""
    return torch.stack([torch.dot(v.reshape(-1), second[n].reshape(-1)) for n, v in first.items()]).sum()


def total_of(parts: Iterable[Tensor]) -> Tensor:
    """The sum of all entries of all tensors; zero if there are none."""
    return torch.as_tensor(sum(part.sum() for part in parts))


def minimizer(slopes: Tensor, curvature: Tensor) -> list[float]:
    """Coefficients c that minimise ½ cᵀ C c + bᵀ c for one or two directions; one, if the two are parallel."""
    (b, c) = slopes.double(), curvature.double()
    if len(b) == 2:
        determinant = float(c[0, 0] * c[1, 1] - c[0, 1] ** 2)
        if determinant > 1e-10 * float(c[0, 0] * c[1, 1]):
            found: list[float] = torch.linalg.solve(c, -b).tolist()
            return found
    return [float(-b[0] / c[0, 0]), *[0.0] * (len(b) - 1)] if float(c[0, 0]) > 0 else [1.0, *[0.0] * (len(b) - 1)]
