"""The statistics of a draw, in all and per site, as one row of numbers that the recorded step returns.

Nearly all of them are inner products of position, momentum and gradient. On small models, where an operation costs
more than its numbers, those of all sites are one product of matrices; on large ones they are one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bnn.structure import Site

# A model of more sites has no statistics per site: they would cost more than a step.
MOST_SITES = 64

# The largest matrix (coordinates times sites) with which inner products per site are one product.
LARGEST_MATRIX = 50_000

# The longest vectors whose inner product is taken at once on larger ones: rounding errors grow with the length.
LONGEST_PIECE = 1 << 18

# Means over coordinates, known per site too; the others are sums.
PER_SITE = ("configurational_temperature", "kinetic_temperature")

# Two vectors ``(chains, dim)`` and what their inner product is weighted with, of shape () or (dim,).
Pair = tuple[Tensor, Tensor, Tensor | None]


class Measured(Protocol):
    """What is asked of a kernel."""

    evaluates_at_draws: bool
    balances_norms: bool

    def momentum_of(self, state: Any, coefficients: Sequence[Tensor]) -> tuple[Tensor, Tensor] | None:
        """Momentum and inverse mass."""

    def extra_stats(self, state: Any) -> dict[str, Tensor]:
        """Statistics of its own."""


class DrawStatistics:
    """What is measured of each draw of one run.

    :param kernel: the algorithm.
    :param sites: the model's latent sites.
    :param state: a state of the chains.
    :param coefficients: of a step.
    :ivar names: of the numbers in a row; those of one site end in its name in brackets.
    """

    def __init__(self, kernel: Measured, sites: Mapping[str, Site], state: Any, coefficients: Sequence[Tensor]) -> None:
        position: Tensor = state[0]
        dim = position.shape[-1]
        self.kernel, self.site_names = kernel, list(sites) if len(sites) <= MOST_SITES else []
        self.places = [sites[name].slice for name in self.site_names] if len(self.site_names) > 1 else []
        moves = kernel.momentum_of(state, coefficients) is not None
        self.kinds = [n for n, is_known in zip(PER_SITE, (kernel.evaluates_at_draws, moves), strict=True) if is_known]
        self.at_once = dim * len(self.places) <= LARGEST_MATRIX
        count = len(self.kinds)
        self.kinds += ["gradient_squared_norm", "squared_norm"]
        self.kinds += ["momentum_squared_norm", "position_momentum"] * moves
        self.kinds += ["momentum_gradient"] * kernel.balances_norms
        places = [*self.places, slice(0, dim)]
        self.names = ["energy"]
        scale: list[float] = []
        self.places_of: list[list[slice]] = []
        for number, kind in enumerate(self.kinds):
            own = places if self.at_once or number < count else places[-1:]
            self.places_of.append(own)
            self.names += [*(f"{kind}[{site}]" for site in self.site_names[: len(own) - 1]), kind]
            scale += [1.0 / (place.stop - place.start) if kind in PER_SITE else 1.0 for place in own]
        self.scale = torch.tensor(scale, dtype=position.dtype, device=position.device)
        self.names += list(kernel.extra_stats(state))
        self.members = position.new_zeros(dim, len(places) if self.at_once else 0)
        for column in range(self.members.shape[1]):
            self.members[places[column], column] = 1.0

    def row(
        self,
        before: Any,
        state: Any,
        evaluation: tuple[Tensor, Tensor, Tensor],
        z: Tensor,
        coefficients: Sequence[Tensor],
    ) -> Tensor:
        """``(chains, names)`` of the step from ``before`` to ``state``, in operations that can be recorded.

        :param evaluation: where the gradient was evaluated last, the energy there, and the gradient.
        :param z: the position of ``state`` in the model's coordinates.
        """
        position, energy, grad = evaluation
        pairs = {**self._of_state(state, z, coefficients), "gradient_squared_norm": (grad, grad, None)}
        if self.kernel.evaluates_at_draws:
            pairs["configurational_temperature"] = position, grad, None
        if self.kernel.balances_norms:  # with the momentum of the place where the gradient was met
            pairs["momentum_gradient"] = (before if position is before[0] else state).momentum, grad, None
        means = self._sums(pairs) * self.scale
        return torch.cat([energy.unsqueeze(-1), means, *self._extra(state)], -1)

    def with_state(self, row: Tensor, state: Any, z: Tensor, coefficients: Sequence[Tensor]) -> Tensor:
        """``row`` with what is said of a state said anew, of another one."""
        pairs = self._of_state(state, z, coefficients)
        counts = [len(places) for places in self.places_of]
        old, scale = row[:, 1 : len(self.scale) + 1].split(counts, -1), self.scale.split(counts)
        known = [kind in pairs for kind in self.kinds]
        scales = torch.cat([part for part, flag in zip(scale, known, strict=True) if flag])
        new = iter((self._sums(pairs) * scales).split([n for n, flag in zip(counts, known, strict=True) if flag], -1))
        means = [next(new) if flag else part for part, flag in zip(old, known, strict=True)]
        energy = state.energy if hasattr(state, "energy") else row[:, :1]
        return torch.cat([energy, *means, *self._extra(state)], -1)

    def _extra(self, state: Any) -> list[Tensor]:
        return [value.unsqueeze(-1) for value in self.kernel.extra_stats(state).values()]

    def arrays(self, table: Tensor) -> dict[str, Tensor]:
        """Name -> ``(chains, draws)``, and of statistics per site ``(chains, draws, sites)``.

        :param table: ``(draws, chains, names)``.
        """
        table = table if len(table) else table.new_empty(*table.shape[:2], len(self.names))
        columns = dict(zip(self.names, table.movedim(0, 1).unbind(-1), strict=True))
        result = {name: column.contiguous() for name, column in columns.items() if not name.endswith("]")}
        result["gradient_norm"] = result.pop("gradient_squared_norm").sqrt()
        for kind in PER_SITE:
            if kind in columns and self.site_names:
                sites = self.site_names if self.places else []
                own = [columns[f"{kind}[{site}]"] for site in sites] or [columns[kind]]
                result[f"site_{kind}"] = torch.stack(own, -1)
        return result

    def _of_state(self, state: Any, z: Tensor, coefficients: Sequence[Tensor]) -> dict[str, Pair]:
        """The pairs of vectors ``(chains, dim)`` in the inner products that a state alone gives."""
        pairs: dict[str, Pair] = {"squared_norm": (z, z, None)}
        moving = self.kernel.momentum_of(state, coefficients)
        if moving is not None:
            momentum, inverse_mass = moving
            pairs["kinetic_temperature"] = momentum, momentum, inverse_mass
            pairs["momentum_squared_norm"] = momentum, momentum, None
            pairs["position_momentum"] = state[0], momentum, None
        return pairs

    def _sums(self, pairs: Mapping[str, Pair]) -> Tensor:
        """Inner products over the places of each kind in ``pairs``, ``(chains, all of them)``."""
        known = [
            (pairs[kind], places) for kind, places in zip(self.kinds, self.places_of, strict=True) if kind in pairs
        ]
        if self.at_once:
            weighted = [(left, right if weight is None else right * weight) for (left, right, weight), _ in known]
            lefts, rights = (torch.stack(list(side), 1) for side in zip(*weighted, strict=True))
            return ((lefts * rights) @ self.members).flatten(1)
        sums: list[Tensor] = []
        for pair, places in known:
            parts = [_inner(*pair, place) for place in places[:-1]]
            whole = torch.stack(parts, -1).sum(-1) if parts else _inner(*pair, places[-1])
            sums += [*parts, whole]
        return torch.stack(sums, -1)


def _inner(left: Tensor, right: Tensor, weight: Tensor | None, place: slice) -> Tensor:
    """The inner product over ``place``, ``(chains,)``.

    Of one chain on a CPU without the product of the vectors in memory; accelerators sum in trees, in one call.
    """
    left, right = left[:, place], right[:, place]
    if weight is not None and weight.dim():
        right, weight = right * weight[place], None
    if len(left) == 1 and left.device.type == "cpu":
        pieces = zip(left[0].split(LONGEST_PIECE), right[0].split(LONGEST_PIECE), strict=True)
        total = torch.stack([torch.dot(one, other) for one, other in pieces]).sum(0, keepdim=True)
    else:
        total = (left * right).sum(-1)
    return total if weight is None else total * weight
