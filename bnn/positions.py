"""Positions of chains: between the flat vector and the values of a model's sites."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bnn import checks
from bnn.structure import Site, Structure


class Positions:
    """Flat positions ``(chains, dim)`` over the unconstrained latent sites of a model.

    :ivar structure: the model's sites.
    """

    structure: Structure

    @property
    def sites(self) -> dict[str, Site]:
        """The latent sites: name -> :class:`Site` with shape, transform and slice of the flat vector."""
        return self.structure.sites

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return self.structure.dim

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the flat vector."""
        return self.structure.dtype

    @property
    def device(self) -> torch.device:
        """Where the flat vector lives."""
        return self.structure.device

    def constrain(self, position: Tensor) -> dict[str, Tensor]:
        """Values of each site in the model, with the leading dimensions of ``position``."""
        return {name: site.constrain(site.unflatten(position)) for name, site in self.sites.items()}

    def unflatten(self, position: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of each site, with the leading dimensions of ``position``."""
        return {name: site.unflatten(position) for name, site in self.sites.items()}

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """The flat positions ``(chains, dim)`` of unconstrained values with a leading chain dimension."""
        checks.site_values(params, {name: site.shape for name, site in self.sites.items()})
        pieces = [params[name].reshape(len(params[name]), -1).to(self.device, self.dtype) for name in self.sites]
        return torch.cat(pieces, -1).contiguous()

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The flat positions ``(chains, dim)`` of values in the model's own space with a leading chain dimension.

        :raises ValueError: if a site is missing, has another shape, or lies outside its support.
        """
        values = {name: torch.as_tensor(value) for name, value in values.items()}
        checks.site_values(values, {name: site.value_shape for name, site in self.sites.items()})
        for name, site in self.sites.items():
            checks.inside_support(name, values[name], site.support)
        return self.from_values(values)

    def from_values(self, values: Mapping[str, Tensor]) -> Tensor:
        """The same without checks."""
        params = {}
        for name, site in self.sites.items():
            value = values[name].to(site.dtype)
            params[name] = value if site.transform is None else site.transform.inv(value)
        return self.flatten(params)
