"""Monte-Carlo dropout as a variational family over the weights.

    W = M diag(ζ) / (1 − p),        ζ_j ~ Bernoulli(1 − p), one per input unit

(Gal and Ghahramani 2016, "Dropout as a Bayesian approximation"; here scaled, as torch.nn.Dropout is, so that E W = M).
One ζ holds for all rows of a minibatch, as for weights, not one per row as in a dropout layer: the objective is the
same, its gradient noisier. The loss is

    E_q[−log p(D | W)] + E_q[−log p(W)],        E_q[−log N(W; 0, s²)] = |M|² / (2 s² (1 − p)) + const,

Gal's L2 penalty, which stands for KL(q ‖ p) with the constant entropy of ζ left out. That divergence is not defined:
q has its mass on 2^units points, of prior probability zero, and the limit of mixtures of narrowing Gaussians that Gal
takes diverges (Hron, Matthews and Ghahramani 2018, "Variational Bayesian dropout: pitfalls and fixes"). So the loss is
no bound on the evidence, and its optimum over p is no approximation of the posterior: p is a setting.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor

from bnn.guides._flat import FlatGuide
from bnn.structure import Site

Units = Callable[[str, torch.Size], int | None]


class AutoDropout(FlatGuide):
    """Dropout of the input units of weights; all other sites are point estimates.

    With Pyro's ``Trace_ELBO``, one mask a step; with ``TraceEnsemble_ELBO(num_particles=k)``, the mean over k masks in
    one vectorized program. Parameter: ``loc``, a flat vector, M and the points.

    :param model: a Pyro model.
    :param rate: p, the probability that a unit is dropped.
    :param units: name and shape of a site -> the dimension of its input units, or None for no dropout. By default
        dimension 1 of every unconstrained site with two dimensions or more, as torch's layers have it.
    :param init_loc_fn: where the locations start: a name of :func:`bnn.initialization.strategy_of`, or one of Pyro's
        ``init_to_*`` functions.
    :param create_plates: as for Pyro's guides.
    :raises ValueError: for a rate outside (0, 1), a site without such a dimension, or a model without any units.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import AutoDropout, TraceEnsemble_ELBO
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model, x = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = AutoDropout(model, rate=0.1, units=lambda name, shape: 1 if name == "2.weight" else None)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnsemble_ELBO(num_particles=4))
    >>> losses = [svi.step(x, x.sin()) for _ in range(100)]
    >>> bnn.predict(guide, x, num_samples=50).mean.shape
    torch.Size([50])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        rate: float = 0.1,
        *,
        units: Units | None = None,
        init_loc_fn: Any = "auto",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates)
        if not 0 < rate < 1:
            raise ValueError(f"rate is {rate}; give the probability that a unit is dropped, between 0 and 1.")
        self.rate, self._units = rate, units
        self.unit_dims: dict[str, int] = {}

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.unit_dims = {
            name: dim for name, site in self.structure.sites.items() if (dim := self._dim(site)) is not None
        }
        if not self.unit_dims:
            raise ValueError(
                f"no site of {sorted(self.structure.sites)} has units to drop: give units=, a function of name and "
                "shape that says which dimension of a weight its inputs are."
            )
        self.loc = PyroParam(self.starts(1, args, kwargs)[0], event_dim=1)

    def _dim(self, site: Site) -> int | None:
        if self._units is None:
            return 1 if site.transform is None and len(site.shape) > 1 else None
        dim = self._units(site.name, site.shape)
        if dim is not None and (site.transform is not None or not -len(site.shape) <= dim < len(site.shape)):
            raise ValueError(
                f"units gives dimension {dim} for site {site.name!r} of shape {tuple(site.shape)} and support "
                f"{site.support}: give a dimension of a weight on the whole real space, or None."
            )
        return dim

    def masks(self, count: int) -> Tensor:
        """ζ / (1 − p), ``(count, dim)``; ones where nothing is dropped."""
        loc = self.loc.detach()
        masks = loc.new_ones(count, self.structure.dim)
        for name, dim in self.unit_dims.items():
            site = self.structure.sites[name]
            shape = [1] * len(site.shape)
            shape[dim] = site.shape[dim]
            kept = torch.bernoulli(loc.new_full((count, *shape), 1.0 - self.rate)) / (1.0 - self.rate)
            masks[:, site.slice] = kept.expand(count, *site.shape).reshape(count, -1)
        return masks

    @pyro_method
    def particles(self, count: int) -> Tensor:
        """Weights under ``count`` masks."""
        return self.loc * self.masks(count)

    @pyro_method
    def position(self) -> Tensor:
        """Weights under one mask."""
        return self.loc * self.masks(1)[0]

    @torch.no_grad()
    def flat_draws(self, num_samples: int) -> Tensor:
        """Weights under fresh masks."""
        return self.loc.detach() * self.masks(num_samples)

    @torch.no_grad()
    def flat_median(self) -> Tensor:
        """M / (1 − p) where something is dropped if p < ½, else 0: the median of each entry, not its mean."""
        dropped = torch.zeros_like(self.loc, dtype=torch.bool)
        for name in self.unit_dims:
            dropped[self.structure.sites[name].slice] = True
        kept = 1.0 / (1.0 - self.rate) if self.rate < 0.5 else 0.0
        return torch.where(dropped, kept * self.loc.detach(), self.loc.detach())

    @torch.no_grad()
    def mean(self) -> dict[str, Tensor]:
        """The points and M, the net without dropout: site -> tensor."""
        self._needs_setup("mean")
        return self.constrain(self.loc.detach().clone())
