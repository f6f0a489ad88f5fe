"""Curvature of the log-likelihood in the structures of a Laplace approximation, summed over passes through the data.

With G_n the gradient of a probe at datum n (:mod:`bnn.fisher`) and G_n ≈ g_n a_nᵀ the same of a layer's weight:

    full         Σ_n vec(G_n) vec(G_n)ᵀ over all sites together
    diagonal     its diagonal
    kronecker    (Σ_n g_n g_nᵀ) ⊗ mean_n a_n a_nᵀ, site by site (Ritter, Botev and Barber 2018; places of a convolution
                 count as independent, Grosse and Martens 2016); of a vector, such as a bias, the full matrix
    eigenbasis   the Kronecker factors' eigenvectors, and Σ_n (Q_rᵀ G_n Q_c)² in that basis: the best diagonal there in
                 Frobenius norm (George et al. 2018). A second pass.

Sites that the probes do not see, such as the scale of a Normal, have the Hessian of minus the log-likelihood itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnn.guides._all_data import Reading, Recorded, hessian, hessian_diagonal
from bnn.guides._base import LARGEST_SIDE
from bnn.guides._blocks import LatentSite
from bnn.guides._kronecker import eigh
from bnn.guides._laplace_blocks import DenseBlock, DiagonalBlock, EigenBlock, LaplaceBlock
from bnn.layers import Use
from bnn.per_datum import Block as Data
from bnn.per_datum import PerDatum, Place, per_datum, squares_per_datum

STRUCTURES = ("diagonal", "kronecker", "eigenbasis", "full")

# A site without layers has a dense block of its own up to this size.
LARGEST_DENSE = 1024


class Curvature:
    """Sums over readings.

    :param structure: one of :data:`STRUCTURES`.
    :param sites: the sites of the approximation.
    :param missed: those that the probes do not see.
    :param recorded: the model, for the layers that use the sites.
    """

    def __init__(self, structure: str, sites: Mapping[str, LatentSite], missed: set[str], recorded: Recorded) -> None:
        self.structure, self.sites = structure, sites
        self.missed = [name for name in sites if name in missed]
        self.seen = [name for name in sites if name not in missed]
        captured = recorded.capture.uses if recorded.capture is not None else {}
        self.layers: dict[str, bool] = {}  # site -> whether its rows are inputs
        if structure in ("kronecker", "eigenbasis"):
            for name in self.seen:
                shape = sites[name].shape
                if name in captured and max(_matrix_shape(shape)) <= LARGEST_SIDE and not sites[name].frames:
                    tags = [tag for use, _ in captured[name] for tag in (use.weight,) if tag and tag.site == name]
                    flat = torch.arange(shape.numel())
                    turned = flat.reshape(shape).T if len(shape) == 2 else flat
                    self.layers[name] = (
                        bool(tags) and len(shape) == 2 and all(torch.equal(tag.index, turned) for tag in tags)
                    )
        self.dense = [
            name
            for name in sites
            if structure in ("kronecker", "eigenbasis")
            and name not in self.layers
            and sites[name].shape.numel() <= LARGEST_DENSE
        ]
        self.sums: dict[tuple[str, str], Tensor] = {}
        self.bases: dict[str, tuple[Tensor, Tensor]] = {}

    # ---- the first pass

    def add(self, reading: Reading) -> None:
        """One chunk of the first pass."""
        self.like = next(iter(reading.leaves.values())).detach()
        if self.structure == "full":
            self._add_full(reading)
            return
        for probe in reading.probes:
            self._add_layers(reading, probe, first=probe is reading.probes[0])
            self._add_rest(reading, probe)
        for name in self.missed:
            leaf = reading.leaves[name]
            if name in self.dense:
                self._sum("dense", name, hessian(-reading.log_likelihood, [leaf]))
            else:
                self._sum("diagonal", name, hessian_diagonal(-reading.log_likelihood, leaf))

    def _get(self, kind: str, name: str) -> Tensor:
        """A sum; zero for a site that the likelihood does not depend on."""
        numel = self.sites[name].shape.numel()
        zero = self.like.new_zeros((numel, numel) if kind == "dense" else numel)
        return self.sums.get((kind, name), zero)

    def _sum(self, kind: str, name: str, value: Tensor) -> None:
        value = value.detach()
        self.sums[kind, name] = self.sums[kind, name] + value if (kind, name) in self.sums else value

    def _add_full(self, reading: Reading) -> None:
        if self.seen:
            for probe in reading.probes:
                for rows in reading.jacobian_rows(probe, self.seen):
                    self._sum("full", "seen", rows.T @ rows)
        if self.missed:
            leaves = [reading.leaves[name] for name in self.missed]
            self._sum("full", "missed", hessian(-reading.log_likelihood, leaves))

    def _add_layers(self, reading: Reading, probe: Mapping[str, Tensor], first: bool) -> None:
        if not self.layers:
            return
        grads = reading.output_gradients(probe, list(self.layers))
        for name in self.layers:
            found, is_weight = self._per_datum(reading, name, grads)
            if self.structure == "eigenbasis" and name in self.bases:
                rows, cols = self.bases[name]
                self._sum("moment", name, found.transformed(cols, rows).squares())
                continue
            if not is_weight:  # a vector, or a weight met both ways round
                self._sum("outputs", name, found.row_gram())
                self._sum("inputs", name, found.column_gram())
                continue
            self._sum("outputs", name, _grams([g for _, g in found.pieces]))
            if first:  # inputs are the same for all probes
                counted = reading.counted(name)
                starts = list({block.start: block.count for _, block in self._uses(reading, name)}.items())
                for (a, _), (start, count) in zip(found.pieces, starts, strict=True):
                    weight = counted[start : start + count, None, None].to(a.dtype)
                    self._sum("inputs", name, (a * weight).flatten(0, 1).T @ a.flatten(0, 1))
                    self._sum("count", name, weight.sum() * a.shape[1])

    def _add_rest(self, reading: Reading, probe: Mapping[str, Tensor]) -> None:
        rest = [name for name in self.seen if name not in self.layers]
        by_layers = [name for name in rest if reading.capture is not None and reading.capture.by_entry([name])]
        grads = reading.output_gradients(probe, by_layers) if by_layers else {}
        for name in rest:
            if name in by_layers and name not in self.dense:  # without the gradients themselves
                uses, numel = self._uses(reading, name), self.sites[name].shape.numel()
                self._sum("diagonal", name, squares_per_datum(uses, name, numel, reading.env, grads).reshape(-1))
                continue
            for rows in reading.jacobian_rows(probe, [name]):
                self._sum("dense" if name in self.dense else "diagonal", name, _gram(rows, name in self.dense))

    def _uses(self, reading: Reading, name: str) -> list[tuple[Use, Data]]:
        assert reading.capture is not None
        return reading.capture.uses[name]

    def _per_datum(self, reading: Reading, name: str, grads: Mapping[Any, Tensor]) -> tuple[PerDatum, bool]:
        """The gradients per datum of a layer's site, and whether it is a weight always met the same way round."""
        uses, shape = self._uses(reading, name), self.sites[name].shape
        rows, cols = _matrix_shape(shape)
        numbers = torch.arange(rows * cols)
        place = Place(numbers // cols, numbers % cols)
        if self.layers[name]:
            place, rows, cols = Place(numbers % cols, numbers // cols), cols, rows
        straight = all(
            use.weight is not None
            and use.weight.site == name
            and (use.bias is None or use.bias.site != name)
            and torch.equal(_position(place, cols)[use.weight.index.reshape(-1)], torch.arange(rows * cols))
            for use, _ in uses
        )
        return per_datum(uses, {name: place}, (rows, cols), reading.env, grads), straight and len(shape) > 1

    # ---- the second pass

    @property
    def needs_second_pass(self) -> bool:
        """Whether the eigenbases are there and their moments are not."""
        return self.structure == "eigenbasis" and bool(self.layers)

    def set_bases(self) -> None:
        """Eigenvectors of the factors."""
        for name in self.layers:
            outputs, inputs = self._factors(name)
            self.bases[name] = eigh(outputs)[1], eigh(inputs)[1]

    def correct(self, reading: Reading) -> None:
        """One chunk of the second pass."""
        for probe in reading.probes:
            self._add_layers(reading, probe, first=False)

    def _factors(self, name: str) -> tuple[Tensor, Tensor]:
        """Kronecker factors (outputs, inputs)."""
        outputs, inputs = self.sums["outputs", name], self.sums["inputs", name]
        if ("count", name) in self.sums:
            return outputs, inputs / self.sums["count", name]
        return outputs, inputs / outputs.trace().clamp_min(torch.finfo(outputs.dtype).tiny)

    # ---- the result

    def blocks(self, prior_hessians: Mapping[str, Tensor]) -> list[LaplaceBlock]:
        """The blocks.

        :param prior_hessians: Hessians of minus the log prior, where they are not diagonal: by site, or ``""`` for all
            sites together.
        """
        sites = self.sites
        if self.structure == "full":
            sizes = {name: site.shape.numel() for name, site in sites.items()}
            starts, total = {}, 0
            for name, size in sizes.items():
                starts[name], total = total, total + size
            matrix = self.like.new_zeros(total, total)
            for kind, names in (("seen", self.seen), ("missed", self.missed)):
                if ("full", kind) in self.sums:
                    order = torch.cat([torch.arange(starts[n], starts[n] + sizes[n]) for n in names])
                    matrix[order[:, None], order] = self.sums["full", kind]
            return [DenseBlock(list(sites.values()), matrix, prior_hessians.get(""))]
        result: list[LaplaceBlock] = []
        rest = []
        for name, site in sites.items():
            if name in self.layers:
                outputs, inputs = self._factors(name)
                if name in self.bases:
                    rows, cols = self.bases[name]
                    values = self.sums["moment", name]
                else:
                    (of_rows, rows), (of_cols, cols) = eigh(outputs), eigh(inputs)
                    values = of_rows.clamp_min(0)[:, None] * of_cols.clamp_min(0)
                result.append(EigenBlock(site, rows, cols, values, self.layers[name]))
            elif name in self.dense:
                result.append(DenseBlock([site], self._get("dense", name), prior_hessians.get(name)))
            else:
                rest.append(site)
        if rest:
            flat = torch.cat([self._get("diagonal", site.name) for site in rest])
            result.append(DiagonalBlock(rest, flat))
        return result


def _matrix_shape(shape: torch.Size) -> tuple[int, int]:
    """A weight as (first dimension, all others); a vector as one column."""
    rows = shape[0] if shape else 1
    return rows, shape.numel() // max(rows, 1)


def _position(place: Place, cols: int) -> Tensor:
    return place.rows * cols + place.columns


def _grams(parts: Sequence[Tensor]) -> Tensor:
    """Σ gᵀ g over rows."""
    return torch.as_tensor(sum(g.flatten(0, 1).T @ g.flatten(0, 1) for g in parts))


def _gram(rows: Tensor, dense: bool) -> Tensor:
    return rows.T @ rows if dense else rows.square().sum(0)
