"""Hidden units of one net put in the order of another's, which they match best.

The units of a layer can be renumbered, with their incoming and outgoing weights, and the net computes the same. Two
modes are compared after removing this freedom: over the permutations π of all hidden layers

    maximise ⟨z₁, π z₂⟩,      that is, minimise |z₁ − π z₂|²

one layer at a time, each a linear assignment, until none gains any more (Ainsworth, Hayase and Srinivasa 2023, ICLR,
"weight matching"). The problem as a whole is hard for several hidden layers, and this a local optimum, found from two
starts: as the nets are, and layer by layer from the inputs. The second finds a renumbered copy exactly.

Cost: some sweeps of one assignment per layer, each cubic in its width at worst.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from bnn.curvature_operators import position_of
from bnn.models import BayesianNet
from bnn.potential import Potential

# The units of one layer: the sites that hold numbers of each, with the dimension along which they stand.
Units = Sequence[tuple[str, int]]

SWEEPS = 100
_ELEMENTWISE = (
    nn.Identity, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Mish,
    nn.Dropout,
)  # fmt: skip


def hidden_units(net: nn.Module) -> list[list[tuple[str, int]]]:
    """The hidden units of an ``nn.Sequential`` of linear layers, with elementwise functions between them.

    :raises ValueError: for another net: then write them by hand, as they stand in the example.

    >>> from torch import nn
    >>> from bnn.permutation_alignment import hidden_units
    >>> hidden_units(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 3)))
    [[('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]]
    """
    known = isinstance(net, nn.Sequential) and all(isinstance(part, (nn.Linear, *_ELEMENTWISE)) for part in net)
    if not known:
        raise ValueError(
            "the hidden units are known of an nn.Sequential of nn.Linear and elementwise functions only; give units=, "
            "for each hidden layer a list of (site, dimension), as in [[('0.weight', 0), ('0.bias', 0), ('2.weight', "
            "1)]]."
        )
    layers = [(name, part) for name, part in net.named_children() if isinstance(part, nn.Linear)]
    return [
        [(f"{name}.weight", 0), *([(f"{name}.bias", 0)] if part.bias is not None else []), (f"{after}.weight", 1)]
        for (name, part), (after, _) in zip(layers, layers[1:], strict=False)
    ]


def align_hidden_units(
    potential: Potential,
    first: Mapping[str, Tensor] | Tensor,
    second: Mapping[str, Tensor] | Tensor,
    *,
    units: Sequence[Units] | None = None,
    tolerance: float = 1e-4,
) -> dict[str, Tensor]:
    """The values of ``second`` with their hidden units renumbered to lie as near to ``first`` as possible.

    :param potential: of the model and its data; that the energy stays the same is checked.
    :param first: values of all sites in the model's space, or a flat position; as for :class:`bnn.CurvatureOperator`.
    :param second: the same of the net that is renumbered.
    :param units: for each hidden layer the sites, with their dimension, that its units run along; known by itself for
        ``bnn.bayesian`` of an ``nn.Sequential`` of linear layers.
    :param tolerance: by how much the energy may change, relative to its size and one.
    :raises ValueError: if the units are not known or do not fit, or renumbering them changes the energy.

    >>> import bnn, torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))
    >>> model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1))
    >>> potential = bnn.Potential(model, torch.ones(4, 1), torch.zeros(4, 1))
    >>> first = {name: value[0] for name, value in potential.constrain(potential.initial(1)).items()}
    >>> second = {**first, "0.weight": first["0.weight"][[2, 0, 1]], "0.bias": first["0.bias"][[2, 0, 1]],
    ...           "2.weight": first["2.weight"][:, [2, 0, 1]]}
    >>> bool((bnn.align_hidden_units(potential, first, second)["0.weight"] == first["0.weight"]).all())
    True
    """
    if units is None:
        if not isinstance(potential.model, BayesianNet):
            raise ValueError("the model is not made by bnn.bayesian: give units=, the sites of each hidden layer.")
        units = hidden_units(potential.model.net)
    places = [position_of(potential, at) for at in (first, second)]
    a, b = ({name: value[0] for name, value in potential.constrain(z[None]).items()} for z in places)
    sizes = [_size(group, b) for group in units]
    found = [_descend(a, b, units, start) for start in (_identities(sizes), _forward(a, b, units, sizes))]
    aligned = max((_permuted(b, units, orders) for orders in found), key=lambda values: _similarity(a, values))
    before, after = (float(potential.full_energy(z[None])[0]) for z in (places[1], position_of(potential, aligned)))
    if not abs(after - before) <= tolerance * max(1.0, abs(before)):
        raise ValueError(
            f"renumbering the units changes the energy from {before:.6g} to {after:.6g}: units= does not name all "
            "sites of a layer, or the prior or likelihood tells its units apart."
        )
    return aligned


Orders = list[np.ndarray]


def _identities(sizes: Sequence[int]) -> Orders:
    return [np.arange(size) for size in sizes]


def _size(group: Units, values: Mapping[str, Tensor]) -> int:
    found = set()
    for site, dim in group:
        if site not in values or not 0 <= dim < values[site].dim():
            raise ValueError(
                f"units= name dimension {dim} of site {site!r}; the sites have shapes "
                f"{ {name: tuple(value.shape) for name, value in values.items()} }."
            )
        found.add(values[site].shape[dim])
    if len(found) != 1:
        raise ValueError(f"the sites of one hidden layer, {list(group)}, have different numbers of units: {found}.")
    return found.pop()


def _permuted(values: Mapping[str, Tensor], units: Sequence[Units], orders: Orders) -> dict[str, Tensor]:
    result = dict(values)
    for group, order in zip(units, orders, strict=True):
        for site, dim in group:
            result[site] = result[site].index_select(dim, torch.as_tensor(order, device=result[site].device))
    return result


def _similarity(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return sum(float((a[name].double() * b[name].double()).sum()) for name in a)


def _best(a: Mapping[str, Tensor], b: Mapping[str, Tensor], group: Units) -> tuple[np.ndarray, float]:
    """The order of b's units of one layer that is most like a's, and what it gains over that in which they are."""
    gains: Any = 0.0
    for site, dim in group:
        rows, columns = (v[site].double().movedim(dim, 0).reshape(v[site].shape[dim], -1) for v in (a, b))
        gains = gains + rows @ columns.T
    table = gains.cpu().numpy()
    order = linear_sum_assignment(table, maximize=True)[1]
    return order, float(table[np.arange(len(order)), order].sum() - np.trace(table))


def _forward(a: Mapping[str, Tensor], b: Mapping[str, Tensor], units: Sequence[Units], sizes: Sequence[int]) -> Orders:
    """One layer after another, each by the sites that no later layer has a part in."""
    orders = _identities(sizes)
    for number, group in enumerate(units):
        later = {site for other in units[number + 1 :] for site, _ in other}
        known = [(site, dim) for site, dim in group if site not in later]
        order, _ = _best(a, _permuted(b, units, orders), known or group)
        orders[number] = orders[number][order]
    return orders


def _descend(a: Mapping[str, Tensor], b: Mapping[str, Tensor], units: Sequence[Units], orders: Orders) -> Orders:
    """Sweeps over the layers until no assignment gains anything."""
    for _ in range(SWEEPS):
        gained = False
        for number, group in enumerate(units):
            order, gain = _best(a, _permuted(b, units, orders), group)
            if gain > 1e-9 * _similarity(a, a):
                orders[number], gained = orders[number][order], True
        if not gained:
            break
    return orders
