"""How sharp the potential is at a position: curvature, and the rise of the loss in a small box.

    100 · (max_{|δ_i| ≤ ε r_i} f(z + δ) − f(z)) / (1 + f(z)),   f = U / N,   r_i = |z_i| + 1

is the measure of Keskar et al. (2017, ICLR); the other is the largest λ of D C D (:mod:`bnn.eigenvalues`), with C a
curvature matrix and D = 1 (:mod:`bnn.curvature_operators`).

Neither is a property of the function that the net computes. Multiply the weights into a ReLU unit by a and those out
of it by 1/a: the function stays, and sharpness can be made as large as one likes (Dinh et al. 2017, ICML). Flat minima
as such therefore say nothing about generalisation. What stays the same, of the likelihood alone (a Normal prior does
see the scale: ``prior=False``, or flat priors):

    D = |z_i|           under any such scaling of units, and so of layers (the adaptive sharpness of Kwon et al. 2021,
                        ICML): ``scaling="elementwise"``
    D = norm of site    under scaling of whole sites: λ|w|², the effective sharpness of layers that a normalisation
                        follows (Hoffer et al. 2018, NeurIPS): ``scaling="per_site"``
    r_i = |z_i|         as the first, for the box: ``relative=True``

Invariance to these is not invariance to every reparametrisation: no measure of curvature in coordinates has that.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from scipy import optimize
from torch import Tensor

from bnn.curvature_operators import position_of
from bnn.potential import Potential
from bnn.predictive_arrays import whole_number


def box_sharpness(
    potential: Potential,
    at: Mapping[str, Tensor] | Tensor,
    *,
    num_data: int,
    radius: float = 1e-3,
    relative: bool = False,
    starts: int = 4,
    iterations: int = 20,
) -> float:
    """Keskar's sharpness in percent: how much the loss f = U/N can rise in a small box about a position.

    The maximum is searched by L-BFGS-B from the corner that the gradient points to and from random corners: what is
    found is a lower bound. Such small rises need a model in float64.

    :param potential: of the model and its data.
    :param at: where, as for :class:`bnn.CurvatureOperator`.
    :param num_data: N.
    :param radius: ε, of the order of 1e-3.
    :param relative: whether the box is ε |z_i| wide in place of ε (|z_i| + 1): no scaling of units changes that.
    :param starts: number of corners from which the search starts.
    :param iterations: of each search, at most.
    :raises ValueError: for settings out of range, or where f ≤ −1, so that the ratio means nothing.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import Potential, box_sharpness
    >>> def model():
    ...     pyro.sample("z", dist.Normal(torch.zeros(2), 1.).to_event(1))
    >>> zero = {"z": torch.zeros(2)}  # there U rises by 2 · 0.1² / 2, to 100 · 0.01 / (1 + log 2π) percent
    >>> round(box_sharpness(Potential(model), zero, num_data=1, radius=0.1), 4)
    0.3524
    """
    num_data, starts = whole_number("num_data", num_data, 1), whole_number("starts", starts, 1)
    iterations = whole_number("iterations", iterations, 1)
    if not 0.0 < radius < math.inf:
        raise ValueError(f"radius is {radius!r}; give a positive number, say 1e-3.")
    center = position_of(potential, at)

    middle = center.double().cpu().numpy()
    half = radius * (np.abs(middle) + (0.0 if relative else 1.0))

    def loss(place: np.ndarray) -> tuple[float, np.ndarray]:
        """Its value and gradient in the box's own coordinates, from -1 to 1."""
        where = torch.as_tensor(middle + half * place, dtype=center.dtype, device=center.device).unsqueeze(0)
        energy, grad = potential.full_energy_and_grad(where)
        return float(energy[0]) / num_data, half * grad[0].double().cpu().numpy() / num_data

    value, slope = loss(np.zeros_like(middle))
    if not 1.0 + value > 0.0:
        raise ValueError(
            f"the loss U/N is {value:.4g}, and sharpness is its rise in parts of 1 + U/N: it is meant for losses that "
            "are not negative, such as those of classes. Of densities use top_eigenvalues."
        )
    corners = [np.where(slope >= 0.0, 1.0, -1.0)]
    corners += list(torch.randint(2, (starts - 1, len(middle))).numpy() * 2.0 - 1.0)
    unit = max(*(abs(loss(corner)[0] - value) for corner in corners), float(np.abs(slope).sum()), 1e-300)

    def fall(place: np.ndarray) -> tuple[float, np.ndarray]:
        here, grad = loss(place)
        return (value - here) / unit, -grad / unit  # of the order of one, as the solver's tolerances want it

    bounds, options = [(-1.0, 1.0)] * len(middle), {"maxiter": iterations}
    found = [optimize.minimize(fall, c, jac=True, bounds=bounds, method="L-BFGS-B", options=options) for c in corners]
    rise = unit * max(0.0, *(-float(one.fun) for one in found))
    if not math.isfinite(rise):
        raise ValueError("the loss is not finite in the box: give a smaller radius.")
    return 100.0 * rise / (1.0 + value)
