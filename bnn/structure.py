"""What a Pyro model consists of: its latent sites, their transforms, and the plates that draw minibatches.

The model is run with Pyro's handlers, checks on, and refused here if it cannot be sampled.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.distributions as torch_distributions
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.distributions import biject_to
from torch.distributions import transforms as torch_transforms

from bnn.devices import common_device, mismatch

# Prior draws at which a model is tried before it is refused.
PRIOR_DRAWS = 10


class ModelError(ValueError):
    """What a model of :func:`bnn.bayesian` finds wrong with its arguments: it says itself what to do."""


@dataclass(frozen=True)
class Site:
    """A latent site of the model and its place in the flat vector.

    :ivar name: the site's name in the model.
    :ivar shape: shape of its unconstrained value.
    :ivar value_shape: shape of its value in the model.
    :ivar transform: from unconstrained to constrained values; None if the support is the whole real space.
    :ivar support: the constraint on its value.
    :ivar slice: its place in the flat vector.
    :ivar dtype: precision of its value in the model.
    :ivar normal: ``(loc, scale)`` if its prior is an iid Normal of fixed numbers.
    """

    name: str
    shape: torch.Size
    value_shape: torch.Size
    transform: torch_transforms.Transform | None
    support: Any
    slice: slice
    dtype: torch.dtype
    normal: tuple[float, float] | None = None

    def unflatten(self, position: Tensor) -> Tensor:
        """The site's unconstrained value out of ``position`` of shape ``(..., dim)``."""
        return position[..., self.slice].reshape(position.shape[:-1] + self.shape)

    def constrain(self, unconstrained: Tensor) -> Tensor:
        """The site's value in the model."""
        unconstrained = unconstrained.to(self.dtype)
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
    trace, plates = _run(model, args, kwargs)
    second, _ = _run(model, args, kwargs)
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and is_observation(node):
            _check_observation(name, node)
    latents = {name: node for name, node in trace.iter_stochastic_nodes() if not is_plate(node)}
    others = {name: node for name, node in second.iter_stochastic_nodes() if not is_plate(node)}
    if not latents:
        raise ValueError(
            "the model has no latent sites to sample: every pyro.sample statement is observed. "
            "Give at least one weight a prior, with pyro.sample or PyroSample."
        )
    for name in [*latents, *others]:
        _check_latent(name, latents.get(name), others.get(name))
    structure = Structure(plates=plates)
    dtypes = []
    for name, node in latents.items():
        transform = _transform_of(node["fn"])
        value = node["value"].detach()
        unconstrained = value if transform is None else transform.inv(value)
        start, structure.dim = structure.dim, structure.dim + unconstrained.numel()
        structure.sites[name] = Site(
            name=name,
            shape=unconstrained.shape,
            value_shape=value.shape,
            transform=transform,
            support=node["fn"].support,
            slice=slice(start, structure.dim),
            dtype=unconstrained.dtype,
            normal=_fixed_normal(node, others[name]),
        )
        dtypes.append(unconstrained.dtype)
    structure.device = common_device({name: node["value"].device for name, node in latents.items()}, model)
    for name, node in latents.items():
        _check_device(name, node, structure.device)
    structure.dtype = functools.reduce(torch.promote_types, dtypes)
    return structure


def _run(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Plate]]:
    """A trace of the model at latents drawn from the prior, and its subsampling plates.

    A heavy-tailed prior may draw a number that is no scale (0 or infinity in this precision): only a model that fails
    at every draw is refused.
    """
    for attempt in range(PRIOR_DRAWS):
        reader = _Reader()
        try:
            with torch.no_grad(), pyro.validation_enabled(True), poutine.block(), reader:
                return poutine.trace(InitMessenger(draw_or_feasible)(model)).get_trace(*args, **kwargs), reader.plates
        except ModelError:
            raise
        except (ValueError, RuntimeError, IndexError) as error:
            if reader.refusal is not None:
                raise reader.refusal from None
            if attempt == PRIOR_DRAWS - 1:
                where = mismatch(model, args, kwargs)
                raise ValueError(_model_error(error, reader, args, kwargs, where)) from error
    raise AssertionError("the last attempt returns or raises")


class _Reader(Messenger):
    """Notes the plates that draw their rows at random, and the latents inside plates."""

    def __init__(self) -> None:
        super().__init__()
        self.plates: dict[str, Plate] = {}
        self.inside: dict[str, str] = {}
        self.refusal: Exception | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if is_plate(msg):
            if msg["value"] is None:
                self._read_plate(msg["name"], msg["fn"].size, msg["fn"].subsample_size)
        elif not msg["is_observed"]:
            for frame in msg["cond_indep_stack"]:
                self._read_frame(msg["name"], frame)

    def _read_plate(self, name: str, size: int, batch_size: int | None) -> None:
        if batch_size is None or batch_size == size:
            return
        if batch_size > size:
            self._refuse(
                ValueError(
                    f"plate {name!r} asks for a minibatch of {batch_size} rows but has only {size}: "
                    f"use subsample_size <= {size}, or leave it out to use all rows."
                )
            )
        if batch_size < 1:
            self._refuse(ValueError(f"plate {name!r} has subsample_size={batch_size}: give at least 1."))
        self.plates[name] = Plate(name, size, batch_size)

    def _read_frame(self, site: str, frame: Any) -> None:
        self.inside[site] = frame.name
        if frame.name in self.plates or (frame.full_size not in (None, -1) and frame.full_size != frame.size):
            self._refuse(
                NotImplementedError(
                    f"site {site!r} is a latent inside the subsampled plate {frame.name!r}: its value for the "
                    f"{frame.full_size} rows would have to be kept although a minibatch shows {frame.size}. A weight "
                    "belongs before the plate (a PyroModule draws its weights when it is called: call it outside the "
                    "plate, on x[plate.indices]); an effect per row belongs in a full plate of its own, indexed by "
                    f"the rows; or do not subsample {frame.name!r}."
                )
            )

    def _refuse(self, error: Exception) -> None:
        self.refusal = error
        raise error


def describe_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """Shapes of the model's arguments, for error messages."""

    def one(value: Any) -> str:
        return f"tensor{tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__

    return ", ".join([one(a) for a in args] + [f"{k}={one(v)}" for k, v in kwargs.items()]) or "no arguments"


def _model_error(
    error: Exception, reader: _Reader, args: tuple[Any, ...], kwargs: Mapping[str, Any], where: str
) -> str:
    cause = next(iter(str(error).strip().splitlines()), type(error).__name__)
    seen = ", ".join(f"{p.name!r} ({p.batch_size} of {p.size} rows)" for p in reader.plates.values())
    inside = ", ".join(f"{site!r} in {plate!r}" for site, plate in reader.inside.items())
    return (
        f"the model does not run on the arguments it was given ({describe_arguments(args, kwargs)}): {cause}. "
        + where
        + (f"Its subsampling plates are {seen}. " if seen else "")
        + (
            f"Latent sites inside plates: {inside}; a plate draws one value per row, so weights belong before it. "
            if inside
            else ""
        )
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


def is_plate(site: Any) -> bool:
    """Whether the site is a plate's draw of its rows."""
    return type(site["fn"]).__name__ == "_Subsample"


def is_observation(site: Any) -> bool:
    """Whether the site is observed data, rather than a latent, a factor or a deterministic value."""
    return (
        bool(site["is_observed"])
        and not (site["infer"] or {}).get("_deterministic")
        and type(base_of(site["fn"])).__name__ != "Unit"
    )


def base_of(fn: Any) -> Any:
    """The distribution inside ``to_event``, masks and expansions."""
    while hasattr(fn, "base_dist") and type(fn).__name__ in (
        "Independent",
        "MaskedDistribution",
        "ExpandedDistribution",
    ):
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


def _check_device(name: str, site: Any, device: torch.device) -> None:
    """That a prior drawn on the CPU gives the density of a value elsewhere: not if its own tensors have dimensions."""
    if site["value"].device == device:
        return
    try:
        with torch.no_grad():
            site["fn"].log_prob(site["value"].to(device))
    except RuntimeError as error:
        raise ValueError(
            f"the prior of site {name!r} is on {site['value'].device}, the model's other sites are on {device}: make "
            f"its tensors there, as by torch.zeros(..., device={str(device)!r})."
        ) from error


def _fixed_normal(site: Any, other: Any) -> tuple[float, float] | None:
    """Location and scale of an iid Normal prior that is the same in two runs with different latent values."""
    if site["mask"] is not None or not isinstance(site["scale"], (int, float)) or site["scale"] != 1.0:
        return None
    numbers = []
    for node in (site, other):
        fn = node["fn"]
        while isinstance(fn, torch_distributions.Independent):
            fn = fn.base_dist
        if type(fn) is not dist.Normal or fn.batch_shape != node["value"].shape:
            return None
        for parameter in (fn.loc, fn.scale):
            first = parameter.reshape(-1)[0]
            if not (parameter == first).all():
                return None
            numbers.append(float(first))
    return (numbers[0], numbers[1]) if numbers[:2] == numbers[2:] else None


def _check_latent(name: str, site: Any, other: Any) -> None:
    if site is None or other is None or other["value"].shape != site["value"].shape:
        raise NotImplementedError(
            f"site {name!r} does not appear with the same shape in every run of the model: "
            "a model whose structure depends on its random choices cannot be sampled."
        )
    fn = site["fn"]
    if fn.support.is_discrete:
        raise NotImplementedError(
            f"site {name!r} is discrete ({type(base_of(fn)).__name__}): these kernels move real-valued sites. Sum it "
            "out in the model (for a mixture, dist.MixtureSameFamily), observe it, or hide it with pyro.poutine.block."
        )
    first, second = biject_to(fn.support), biject_to(other["fn"].support)
    probe = torch.full(first.inverse_shape(site["value"].shape), 0.3).to(site["value"])
    if first(probe).shape != second(probe).shape or not torch.allclose(first(probe), second(probe)):
        raise NotImplementedError(
            f"the support of site {name!r} depends on another latent site: write it as a fixed-support site "
            "(for Uniform(0, a): a Uniform(0, 1) times a)."
        )


def _check_observation(name: str, site: Any) -> None:
    value, fn = site["value"], site["fn"]
    if not isinstance(value, Tensor):
        return
    if value.is_floating_point() and not torch.isfinite(value).all():
        bad = int((~torch.isfinite(value)).sum())
        raise ValueError(
            f"observed site {name!r} holds {bad} values that are NaN or infinite: remove these rows, or exclude "
            "them with pyro.poutine.mask after replacing them by finite numbers."
        )
    shape = fn.shape()
    try:
        joint = torch.broadcast_shapes(value.shape, shape)
    except RuntimeError:
        raise ValueError(
            f"observed site {name!r} holds data of shape {tuple(value.shape)}, but its distribution has shape "
            f"{tuple(shape)} inside its plates: the first dimension of each data argument must equal the plate's size, "
            "or the number of rows drawn where the plate subsamples."
        ) from None
    if 1 < value.numel() < joint.numel():
        warnings.warn(
            f"observed site {name!r} holds data of shape {tuple(value.shape)}, but its distribution has shape "
            f"{tuple(shape)}: every datum counts {joint.numel() // value.numel()} times. If the network's output has a "
            "last dimension of 1, drop it with .squeeze(-1); if a row has several outputs, write .to_event(1).",
            RuntimeWarning,
            stacklevel=5,
        )
    if site["mask"] is None and not _inside_support(fn, value):
        raise ValueError(
            f"observed site {name!r} holds data outside the support of its distribution {type(base_of(fn)).__name__} "
            f"({fn.support}), which have no probability: check the data, or choose a likelihood that allows them."
        )


def _inside_support(fn: Any, value: Tensor) -> bool:
    try:
        return bool(fn.support.check(value).all())
    except (NotImplementedError, AttributeError, ValueError, RuntimeError):  # a support that cannot be asked
        return True
