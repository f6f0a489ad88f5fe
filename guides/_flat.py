"""Guides over the flat vector z of all unconstrained latent numbers, whose draws are points of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from bnn import checks
from bnn.guides._auto import KeptGuide
from bnn.guides._base import latent_site
from bnn.guides._blocks import LatentSite
from bnn.guides.factorized_normal import delta_at
from bnn.structure import Structure, structure_of


class FlatGuide(KeptGuide):
    """Draws z, and states it at the sites as Deltas in the model's own space.

    The Deltas carry the density −log |det ∂(constrained)/∂z|, so that Pyro's ELBOs see minus the potential of
    :class:`bnn.Potential`: modes are those in unconstrained space.
    """

    def __init__(
        self, model: Callable[..., Any], *, init_loc_fn: Any = "auto", create_plates: Callable[..., Any] | None = None
    ) -> None:
        given = isinstance(init_loc_fn, Mapping)
        super().__init__(model, init_loc_fn="auto" if given else init_loc_fn, create_plates=create_plates)
        self._values: Mapping[str, Tensor] | None = init_loc_fn if given else None
        self._structure: Structure | None = None
        self._latents: dict[str, LatentSite] = {}

    # ---- for subclasses

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Make the parameters; :attr:`structure` is known."""
        raise NotImplementedError

    def particles(self, count: int) -> Tensor:
        """Positions ``(particles, dim)`` at which an ELBO evaluates the model, differentiable in the parameters."""
        raise NotImplementedError

    def position(self) -> Tensor:
        """One draw of z."""
        return self.flat_draws(1)[0]

    def flat_draws(self, num_samples: int) -> Tensor:
        """Draws of z, ``(num_samples, dim)``."""
        raise NotImplementedError

    def flat_median(self) -> Tensor:
        """The median of each entry of z."""
        raise NotImplementedError

    def log_density(self, position: Tensor) -> dict[str, Tensor]:
        """Site -> what it has of a log density besides the Jacobian's, ``(...)`` for positions ``(..., dim)``."""
        del position
        return {}

    def flat_log_density(self, positions: Tensor) -> Tensor:
        """The sum of :meth:`log_density` over the sites, ``(...)`` for positions ``(..., dim)``."""
        total: Tensor = sum(self.log_density(positions).values(), positions.new_zeros(positions.shape[:-1]))
        return total

    # ---- what they share

    @property
    def structure(self) -> Structure:
        """The model's sites and their places in z."""
        assert self._structure is not None
        return self._structure

    def _needs_setup(self, what: str) -> None:
        if self._structure is None:
            raise RuntimeError(f"{what} needs the guide's sites: call the guide, or SVI.step, on the data first.")

    @property
    def is_set_up(self) -> bool:
        """Whether the guide was called on data."""
        return self._structure is not None

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        structure = structure_of(self.model, args, kwargs)
        prototype: Any = self.prototype_trace
        self._latents = {name: latent_site(name, prototype.nodes[name]) for name in structure.sites}
        self._structure = structure
        try:
            self._make(args, kwargs)
        except Exception:
            self._structure = None
            raise

    def starts(self, count: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """So many starting positions ``(count, dim)`` by the init function.

        :raises ValueError: if given values are for another number of members, or for other sites.
        """
        if self._values is not None:
            return self._given(count)
        found = []
        for _ in range(count):
            with torch.no_grad(), poutine.block():
                model = pyro.infer.autoguide.initialization.InitMessenger(self._init)(self.model)
                nodes: Any = poutine.trace(model).get_trace(*args, **kwargs).nodes
            found.append({name: nodes[name]["value"] for name in self.structure.sites})
        return self.flatten({name: torch.stack([v[name] for v in found]) for name in self.structure.sites})

    def _given(self, count: int) -> Tensor:
        values = {name: torch.as_tensor(value) for name, value in (self._values or {}).items()}
        checks.site_values(values, {name: site.value_shape for name, site in self.structure.sites.items()})
        for name, site in self.structure.sites.items():
            checks.inside_support(name, values[name], site.support)
        found = self.flatten(values)
        if len(found) != count:
            raise ValueError(
                f"init_loc_fn holds values of {len(found)} points, but there are {count}: give each site a tensor "
                f"whose first dimension is {count}."
            )
        return found

    def flatten(self, values: Mapping[str, Tensor]) -> Tensor:
        """Points ``(points, dim)`` out of values of the sites in the model's own space, one leading dimension."""
        pieces = []
        for name, site in self.structure.sites.items():
            value = values[name].detach().to(self.structure.device)
            pieces.append((value if site.transform is None else site.transform.inv(value)).reshape(len(value), -1))
        return torch.cat(pieces, 1).to(self.structure.device, self.structure.dtype)

    def constrain(self, position: Tensor) -> dict[str, Tensor]:
        """Site -> values in the model's own space, with the leading dimensions of ``position``."""
        return {name: site.constrain(site.unflatten(position)) for name, site in self.structure.sites.items()}

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites.

        :returns: site -> value.
        """
        if self._structure is None:
            self._setup_prototype(*args, **kwargs)
        plates, position = self._create_plates(*args, **kwargs), self.position()
        density, result = self.log_density(position), dict[str, Tensor]()
        for name, site in self.structure.sites.items():
            latent, value = self._latents[name], site.unflatten(position).to(site.dtype)
            with ExitStack() as stack:
                for frame in latent.frames:
                    stack.enter_context(plates[frame.name])
                result[name] = delta_at(latent, value, density.get(name, 0.0))
        return result

    @torch.no_grad()
    def draws(self, num_samples: int) -> dict[str, Tensor]:
        """Many draws at once: site -> values ``(num_samples, *shape)``."""
        self._needs_setup("draws")
        return self.constrain(self.flat_draws(num_samples))

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each entry of z, in the model's own space: site -> tensor."""
        self._needs_setup("median")
        return self.constrain(self.flat_median())
