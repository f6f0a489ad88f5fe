"""What a Pyro model consists of, and its log joint density as a plain function of tensors.

This is the one border with Pyro's handlers: sites, plates, transforms and scales are read here and nowhere else.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions import transforms as torch_transforms

from bnn.recording import unvalidated_distributions


@dataclass(frozen=True)
class Site:
    """A latent site of the model and its place in the flat vector.

    :ivar name: the site's name in the model.
    :ivar shape: shape of its unconstrained value.
    :ivar value_shape: shape of its value in the model.
    :ivar transform: from unconstrained to constrained values; None if the support is the whole real space.
    :ivar support: the constraint on its value.
    :ivar slice: its place in the flat vector.
    """

    name: str
    shape: torch.Size
    value_shape: torch.Size
    transform: torch_transforms.Transform | None
    support: Any
    slice: slice

    def unflatten(self, position: Tensor) -> Tensor:
        """The site's unconstrained value out of ``position`` of shape ``(..., dim)``."""
        return position[..., self.slice].reshape(position.shape[:-1] + self.shape)

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """The site's value in the model."""
        return unconstrained if self.transform is None else self.transform(unconstrained)


@dataclass(frozen=True)
class Plate:
    """A plate that draws a minibatch: ``batch_size`` of ``size`` rows."""

    name: str
    size: int
    batch_size: int


@dataclass
class Structure:
    """Sites and subsampling plates of a model, found by running it once."""

    sites: dict[str, Site] = field(default_factory=dict)
    plates: dict[str, Plate] = field(default_factory=dict)
    dim: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))


def structure_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Structure:
    """Run the model with Pyro's handlers and read off its latent sites and subsampling plates.

    :raises ValueError: for a model without latent sites, data that are not finite, or arguments whose shape
        disagrees with a plate.
    :raises NotImplementedError: for discrete latents, latents inside a subsampled plate, and latents whose support
        depends on another latent.
    """
    plates: dict[str, Plate] = {}
    traces = []
    for _ in range(2):
        reader = _PlateReader()
        try:
            with torch.no_grad(), pyro.validation_enabled(True), poutine.block(), reader:
                trace = poutine.trace(InitMessenger(draw_or_feasible)(model)).get_trace(*args, **kwargs)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(_model_error(error, reader.plates, args, kwargs)) from error
        plates = reader.plates
        traces.append(trace)
    _check_observations(traces[0])
    latents = {name: site for name, site in traces[0].iter_stochastic_nodes() if not _is_plate(site)}
    if not latents:
        raise ValueError(
            "the model has no latent sites to sample: every pyro.sample statement is observed. "
            "Give at least one weight a prior, with pyro.sample or PyroSample."
        )
    structure = Structure(plates=plates)
    offset = 0
    for name, node in latents.items():
        other = traces[1].nodes.get(name)
        _check_latent(name, node, other, plates)
        transform = _transform_of(node["fn"])
        value = node["value"].detach()
        unconstrained = value if transform is None else transform.inv(value)
        size = unconstrained.numel()
        structure.sites[name] = Site(
            name, unconstrained.shape, value.shape, transform, node["fn"].support, slice(offset, offset + size)
        )
        offset += size
        structure.dtype = (
            torch.promote_types(structure.dtype, unconstrained.dtype) if offset > size else unconstrained.dtype
        )
        structure.device = unconstrained.device
    structure.dim = offset
    return structure


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

    def values(self, position: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        """Constrained values of one ``position`` of ``dim`` numbers, and the log determinant of the Jacobian."""
        values: dict[str, Tensor] = {}
        log_det: Tensor | float = 0.0
        pieces = position.split(self.sizes, -1)
        for piece, site in zip(pieces, self.structure.sites.values(), strict=True):
            unconstrained = piece.reshape(site.shape)
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
        terms = _Terms(values, rows)
        self._run(terms, args, kwargs)
        total = log_det
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
        terms = _Terms(values, rows)
        self._run(terms, args, kwargs)
        outside = math.prod((first[name] for name in first), start=torch.ones((), dtype=position.dtype))
        total = log_det * outside
        for term in terms.terms:
            log_prob = scale_and_mask(term.log_prob, term.unsubsampled_scale, term.mask)
            log_prob = log_prob if isinstance(log_prob, Tensor) else torch.as_tensor(log_prob, dtype=position.dtype)
            for name, flag in first.items():
                if name in term.plates:
                    dim = term.plates[name]
                    weights = row_weights[name]
                    if log_prob.dim() >= -dim:
                        weights = weights.reshape((-1,) + (1,) * (-dim - 1))
                    log_prob = log_prob * weights
                else:
                    log_prob = log_prob * flag
            total = total + log_prob.sum()
        return torch.as_tensor(total)

    def pointwise(
        self, position: Tensor, rows: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """Unscaled log density of each observation: site name -> tensor of the site's batch shape."""
        terms = _Terms(self.values(position)[0], rows)
        self._run(terms, args, kwargs)
        return {
            term.name: scale_and_mask(term.log_prob, 1.0, term.mask) for term in terms.terms if term.is_observation
        }

    def predict(
        self, position: Tensor, rows: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """A draw of each observed site given one position."""
        terms = _Terms(self.values(position)[0], rows, resample=True)
        self._run(terms, args, kwargs)
        return {term.name: term.value for term in terms.terms if term.is_observation}

    def _run(self, terms: _Terms, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with poutine.block(), terms:
            self.model(*args, **kwargs)


@dataclass(frozen=True)
class _Term:
    name: str
    log_prob: Tensor
    scale: Any
    unsubsampled_scale: Any
    mask: Any
    plates: dict[str, int]
    is_observation: bool
    value: Any
    frames: tuple[Any, ...] = ()


class _Terms(Messenger):
    """Substitutes values and minibatch rows, and collects each site's log density."""

    def __init__(self, values: Mapping[str, Tensor], rows: Mapping[str, Tensor], resample: bool = False) -> None:
        super().__init__()
        self.values, self.rows, self.resample = values, rows, resample
        self.terms: list[_Term] = []

    def _pyro_sample(self, msg: Any) -> None:
        if msg["value"] is None and _is_plate(msg):
            if msg["name"] in self.rows:
                msg["value"], msg["done"] = self.rows[msg["name"]], True
        elif not msg["is_observed"] and msg["name"] in self.values:
            msg["value"], msg["done"] = self.values[msg["name"]], True
        elif self.resample and _is_observation(msg):
            msg["value"], msg["done"] = msg["fn"](), True

    def _pyro_post_sample(self, msg: Any) -> None:
        if _is_plate(msg):
            return
        scale, plates = msg["scale"], {}
        unsubsampled = scale
        for frame in msg["cond_indep_stack"]:
            if frame.full_size is not None and frame.full_size > 0 and frame.full_size != frame.size:
                plates[frame.name] = frame.dim
                unsubsampled = unsubsampled * frame.size / frame.full_size
        log_prob = msg["fn"].log_prob(msg["value"], *msg["args"], **msg["kwargs"])
        self.terms.append(
            _Term(
                msg["name"],
                log_prob,
                scale,
                unsubsampled,
                msg["mask"],
                plates,
                _is_observation(msg),
                msg["value"],
                msg["cond_indep_stack"],
            )
        )


class _PlateReader(Messenger):
    """Notes the plates that draw their rows at random."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: dict[str, Plate] = {}

    def _pyro_sample(self, msg: Any) -> None:
        if not _is_plate(msg) or msg["value"] is not None:
            return
        name, size, batch_size = msg["name"], msg["fn"].size, msg["fn"].subsample_size
        if batch_size is not None and batch_size > size:
            raise ValueError(
                f"plate {name!r} asks for a minibatch of {batch_size} rows but has only {size}: "
                f"use subsample_size <= {size}, or leave it out to use all rows."
            )
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"plate {name!r} has subsample_size={batch_size}: give at least 1.")
        if batch_size is not None and batch_size < size:
            self.plates[name] = Plate(name, size, batch_size)


@contextlib.contextmanager
def quiet_handlers() -> Iterator[None]:
    """Run a model under Pyro's handlers without value checks and without touching an enclosing handler."""
    with pyro.validation_enabled(False), unvalidated_distributions():
        yield


def describe_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Shapes of the model's arguments, for error messages."""

    def one(value: Any) -> str:
        return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()]) or "no arguments"


def _model_error(
    error: Exception, plates: Mapping[str, Plate], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> str:
    if "asks for a minibatch" in str(error) or "has subsample_size" in str(error):
        return str(error)
    given = describe_arguments(args, kwargs)
    seen = ", ".join(f"{p.name!r} ({p.batch_size} of {p.size} rows)" for p in plates.values())
    return (
        f"the model does not run on the arguments it was given ({given}): {error}. "
        + (f"Its subsampling plates are {seen}. " if seen else "")
        + "Check that the first dimension of each data argument equals the plate's size, and that inside the plate "
        "data are indexed by the plate's rows (with pyro.plate(...) as rows: x[rows])."
    )


def draw_or_feasible(site: Any) -> Tensor:
    """A draw from the site's prior; for a flat prior (``ImproperUniform``), which has none, a point of its support."""
    fn = site["fn"]
    try:
        value: Tensor = fn.sample().detach()
    except NotImplementedError:
        transform = biject_to(fn.support)
        value = transform(torch.zeros(transform.inverse_shape(fn.batch_shape + fn.event_shape)))
    return value


def _is_plate(site: Any) -> bool:
    return type(site["fn"]).__name__ == "_Subsample"


def _is_observation(site: Any) -> bool:
    return (
        bool(site["is_observed"])
        and not (site["infer"] or {}).get("_deterministic")
        and type(_base(site["fn"])).__name__ != "Unit"
    )


def _base(fn: Any) -> Any:
    while hasattr(fn, "base_dist") and type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        fn = fn.base_dist
    return fn


def _is_identity(transform: Any) -> bool:
    if isinstance(transform, torch_transforms.IndependentTransform):
        return _is_identity(transform.base_transform)
    if isinstance(transform, torch_transforms.ComposeTransform):
        return all(_is_identity(part) for part in transform.parts)
    return transform is torch_transforms.identity_transform


def _transform_of(fn: Any) -> torch_transforms.Transform | None:
    transform = biject_to(fn.support)
    return None if _is_identity(transform) else transform


def _check_latent(name: str, site: Any, other: Any, plates: Mapping[str, Plate]) -> None:
    fn = site["fn"]
    if fn.support.is_discrete:
        raise NotImplementedError(
            f"site {name!r} is discrete ({type(_base(fn)).__name__}): these kernels move real-valued sites. Sum it out "
            "in the model (for a mixture, dist.MixtureSameFamily), observe it, or hide it with pyro.poutine.block."
        )
    if other is None or other["value"].shape != site["value"].shape:
        raise NotImplementedError(
            f"site {name!r} does not appear with the same shape in every run of the model: "
            "a model whose structure depends on its random choices cannot be sampled."
        )
    for frame in site["cond_indep_stack"]:
        if frame.name in plates or (frame.full_size not in (None, -1) and frame.full_size != frame.size):
            raise NotImplementedError(
                f"site {name!r} is a latent inside the subsampled plate {frame.name!r}: its value for the "
                f"{frame.full_size} rows would have to be kept although a minibatch shows {frame.size}. Move it into a "
                f"full plate of its own and index it by the rows, or do not subsample {frame.name!r}."
            )
    first, second = biject_to(fn.support), biject_to(other["fn"].support)
    unconstrained = first.inv(site["value"])
    probe = torch.full_like(unconstrained, 0.3)
    if first(probe).shape != second(probe).shape or not torch.allclose(first(probe), second(probe)):
        raise NotImplementedError(
            f"the support of site {name!r} depends on another latent site: write it as a fixed-support site "
            "(for Uniform(0, a): a Uniform(0, 1) times a)."
        )


def _check_observations(trace: Any) -> None:
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or not _is_observation(site):
            continue
        value = site["value"]
        if isinstance(value, Tensor) and value.is_floating_point() and not torch.isfinite(value).all():
            bad = int((~torch.isfinite(value)).sum())
            raise ValueError(
                f"observed site {name!r} holds {bad} values that are NaN or infinite: remove these rows, or exclude "
                "them with pyro.poutine.mask after replacing them by finite numbers."
            )
