"""The log joint density of a Pyro model as a plain function of tensors.

Pyro's handlers are asked here, while a model is recorded or run, for each site's log density, scale, mask and plates.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bnn.recording import outputs_depend_on_inputs, record, unvalidated_distributions
from bnn.structure import Site, Structure, base_of, is_plate


class LogJoint:
    """The log joint density of a model as a function of one flat unconstrained vector.

        log p(z) = Σ_sites scale · log p(site | ...) + log |det ∂(constrained)/∂z|

    Minibatch rows of each subsampled plate are an argument, so that a recording can take them as inputs.

    :param model: a Pyro model.
    :param structure: its structure.
    """

    def __init__(self, model: Callable[..., Any], structure: Structure) -> None:
        self.model, self.structure = model, structure
        self.sizes = [site.shape.numel() for site in structure.sites.values()]
        self.merged: frozenset[str] = frozenset()

    def normal_parameters(
        self, position: Tensor, rows: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Location and scale, stacked, of the sites that look as if their Normal prior were fixed."""
        terms = _Terms(self.values(position)[0], rows)
        self._run(terms, args, kwargs)
        result = {}
        for term in terms.terms:
            if term.name in self.structure.sites and self.structure.sites[term.name].normal is not None:
                base = base_of(term.fn)
                result[term.name] = torch.stack([base.loc.reshape(-1)[0], base.scale.reshape(-1)[0]])
        return result

    def merge_fixed_normals(
        self, position: Tensor, arguments: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]
    ) -> None:
        """Add up, from now on, Normal priors that depend on nothing as one sum over the flat vector.

        Two runs of the model saw the same numbers; a recording shows whether they depend on other sites or the rows.

        :param position: an example ``(1, dim)``.
        :param arguments: rows, positional and keyword arguments of the model out of minibatch inputs.
        :param inputs: example minibatch inputs.
        :raises RecordingError: if the model cannot be recorded.
        """
        names = [name for name, site in self.structure.sites.items() if site.normal is not None]
        if not names:
            return

        def parameters(position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad():
                found = self.normal_parameters(position[0], *arguments(inputs))
            return tuple(found[name] for name in names)

        depends = outputs_depend_on_inputs(record(parameters, [position, *inputs]))
        self.merged = frozenset(name for name, flag in zip(names, depends, strict=True) if not flag)

    def values(self, position: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        """Constrained values of one ``position`` of ``dim`` numbers, and the log determinant of the Jacobian."""
        values: dict[str, Tensor] = {}
        log_det: Tensor | float = 0.0
        pieces = position.split(self.sizes, -1)
        for piece, site in zip(pieces, self.structure.sites.values(), strict=True):
            unconstrained = piece.reshape(site.shape).to(site.dtype)
            if site.transform is None:
                values[site.name] = unconstrained
            else:
                value = site.transform(unconstrained)
                log_det = log_det + site.transform.log_abs_det_jacobian(unconstrained, value).sum()
                values[site.name] = value
        return values, log_det

    def __call__(
        self,
        position: Tensor,
        rows: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        *,
        batch_weight: float = 1.0,
    ) -> Tensor:
        """The minibatch estimate: sites in a subsampled plate count size / batch_size times, as Pyro scales them.

        :param batch_weight: extra weight of the sites that lie in a subsampled plate (uneven batches of a loader).
        """
        values, log_det = self.values(position)
        terms = _Terms(values, rows, skip=self.merged)
        self._run(terms, args, kwargs)
        total = log_det + self._merged_log_prob(position)
        for term in terms.terms:
            scaled = scale_and_mask(term.log_prob, term.scale, term.mask)
            weighted = scaled.sum() if isinstance(scaled, Tensor) and scaled.dim() else scaled
            if batch_weight != 1.0 and term.plates:
                weighted = weighted * batch_weight
            total = total + weighted
        return torch.as_tensor(total)

    def weighted(
        self,
        position: Tensor,
        rows: Mapping[str, Tensor],
        row_weights: Mapping[str, Tensor],
        first: Mapping[str, Tensor],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Tensor:
        """One chunk of the full-data log joint.

        Terms inside a subsampled plate count each row by ``row_weights`` and without the minibatch scale; terms
        outside a plate count where ``first`` of that plate is one. Summed over all chunks this is the log joint of
        all data.
        """
        values, log_det = self.values(position)
        terms = _Terms(values, rows, skip=self.merged)
        self._run(terms, args, kwargs)
        total = log_det + self._merged_log_prob(position)
        for flag in first.values():
            total = total * flag
        for term in terms.terms:
            log_prob = scale_and_mask(term.log_prob, term.unsubsampled_scale, term.mask)
            log_prob = log_prob if isinstance(log_prob, Tensor) else torch.as_tensor(log_prob, dtype=position.dtype)
            for name, flag in first.items():
                if name in term.plates:
                    log_prob = log_prob * _along(term.plates[name], row_weights[name], log_prob.dim())
                else:
                    log_prob = log_prob * flag
            total = total + log_prob.sum()
        return torch.as_tensor(total)

    def _merged_log_prob(self, position: Tensor) -> Tensor | float:
        """The sum of the merged priors."""
        total: Tensor | float = 0.0
        for place, loc, scale in _normal_runs(s for s in self.structure.sites.values() if s.name in self.merged):
            total = total + _normal_log_prob(position, self.structure.dim, place, loc, scale)
        return total

    def _run(self, terms: _Terms, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # With validation, poutine.scale reads its scale, which may depend on the rows.
        with pyro.validation_enabled(False), poutine.block(), terms:
            self.model(*args, **kwargs)


def _along(frame: Any, weights: Tensor, dims: int) -> Tensor:
    """``weights`` of a plate's rows, shaped to multiply a log density of ``dims`` dimensions inside the plate."""
    if frame.dim is None:  # a plate that is looped over: its counter says which row this is
        return weights[(frame.counter - 1) % len(weights)]
    return weights.reshape((-1,) + (1,) * (-frame.dim - 1)) if dims >= -frame.dim else weights


def _normal_runs(sites: Iterable[Site]) -> list[tuple[slice, float, float]]:
    """Neighbouring sites with the same fixed Normal prior, as places of the flat vector: a net's prior is one sum."""
    runs: list[tuple[slice, float, float]] = []
    for site in sites:
        if site.normal is None:
            continue
        if runs and runs[-1][0].stop == site.slice.start and runs[-1][1:] == site.normal:
            runs[-1] = slice(runs[-1][0].start, site.slice.stop), *site.normal
        else:
            runs.append((site.slice, *site.normal))
    return runs


def _normal_log_prob(position: Tensor, dim: int, place: slice, loc: float, scale: float) -> Tensor:
    count = place.stop - place.start
    z = position if count == dim else position[..., place]
    squares = (z if loc == 0.0 else z - loc).square().sum()
    return squares * (-0.5 / scale**2) - count * (math.log(scale) + 0.5 * math.log(2.0 * math.pi))


@dataclass(frozen=True)
class _Term:
    name: str
    fn: Any
    log_prob: Tensor
    scale: Any
    unsubsampled_scale: Any
    mask: Any
    plates: dict[str, Any]


class _Terms(Messenger):
    """Substitutes values and minibatch rows, and collects each site's log density."""

    def __init__(
        self, values: Mapping[str, Tensor], rows: Mapping[str, Tensor], *, skip: frozenset[str] = frozenset()
    ) -> None:
        super().__init__()
        self.values, self.rows, self.skip = values, rows, skip
        self.terms: list[_Term] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and is_plate(msg):
            if msg["name"] in self.rows:
                msg["value"], msg["done"] = self.rows[msg["name"]], True
        elif not msg["is_observed"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True

    def _pyro_post_sample(self, msg: Any) -> None:
        if is_plate(msg) or msg["name"] in self.skip:
            return
        scale, plates = msg["scale"], {}
        unsubsampled = scale
        for frame in msg["cond_indep_stack"]:
            if is_subsampled(frame):
                plates[frame.name] = frame
                unsubsampled = unsubsampled * frame.size / frame.full_size
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.terms.append(_Term(msg["name"], msg["fn"], log_prob, scale, unsubsampled, msg["mask"], plates))


def is_subsampled(frame: Any) -> bool:
    """Whether a plate's frame, as Pyro keeps it with a site, shows a part of its rows."""
    return frame.full_size is not None and frame.full_size > 0 and frame.full_size != frame.size


@contextlib.contextmanager
def quiet_handlers() -> Iterator[None]:
    """Run a model under Pyro's handlers without value checks and without touching an enclosing handler."""
    with pyro.validation_enabled(False), unvalidated_distributions():
        yield
