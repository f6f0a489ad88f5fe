"""Rank-one Bayesian nets (Dusenberry et al. 2020, "Efficient and scalable Bayesian neural nets with rank-1 factors").

    W' = W ∘ (r sᵀ),        r_i, s_j ~ 1/K Σ_k N(m_k, v_k), all entries of one component k,        prior N(1, σ₀²)

A weight W' (outputs, inputs, ...) is a shared point W times random factors of its outputs and inputs. The loss is

    E_q[−log p(D | W')] − log p(W) + KL(q(r, s | k) ‖ prior), averaged over k,

a bound for the model in which W is a parameter with penalty −log p(W) and r, s are latent: the divergence of a mixture
is at most the mean of its components'. It costs one net and 2 K numbers per unit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor
from torch.distributions import constraints, kl_divergence

from bnn.guides._flat import FlatGuide


class AutoRankOne(FlatGuide):
    """Random factors of the output and input units of weights; all other sites are point estimates.

    For Pyro's ``Trace_ELBO``, or ``TraceEnsemble_ELBO(num_particles=k)``. Parameters: ``loc``, a flat vector, W and the
    points; ``factor_loc`` and ``factor_scale`` ``(members, factors)``, those of r and s of each weight in turn.

    :param model: a Pyro model; weights are its sites with two dimensions or more and a Normal prior of fixed numbers.
    :param members: K, components of the mixture.
    :param prior_scale: σ₀.
    :param init_scale: start of the factors' standard deviations; their means start at ±1, signs at random where K > 1.
    :param init_loc_fn: where the locations start, as for Pyro's guides.
    :param create_plates: as for Pyro's guides.
    :raises ValueError: for settings out of range, or a model without such a weight.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import AutoRankOne, TraceEnsemble_ELBO
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model, x = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = AutoRankOne(model, members=2)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnsemble_ELBO(num_particles=4))
    >>> losses = [svi.step(x, x.sin()) for _ in range(100)]
    >>> bnn.predict(guide, x, num_samples=50).mean.shape
    torch.Size([50])
    """

    loc: Any  # PyroParams, which read as tensors
    factor_loc: Any
    factor_scale: Any

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        members: int = 1,
        prior_scale: float = 0.1,
        init_scale: float = 0.05,
        init_loc_fn: Any = "auto",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates)
        if not isinstance(members, int) or isinstance(members, bool) or members < 1:
            raise ValueError(f"members is {members!r}; give the number of components, at least 1.")
        for name, value in {"prior_scale": prior_scale, "init_scale": init_scale}.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; give a positive number, such as 0.1.")
        self.members, self.prior_scale, self._init_scale = members, prior_scale, init_scale
        self._component = torch.zeros(1, dtype=torch.long)

    @property
    def weights(self) -> list[str]:
        """The sites that have factors."""
        sites = self.structure.sites.items()
        return [name for name, site in sites if len(site.shape) > 1 and site.normal is not None]

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not self.weights:
            raise ValueError(
                f"no site of {sorted(self.structure.sites)} has two dimensions and a Normal prior of fixed numbers: "
                "there is no weight whose units could have factors."
            )
        start = self.starts(1, args, kwargs)[0]
        count = sum(sum(self.structure.sites[name].shape[:2]) for name in self.weights)
        loc = start.new_ones(self.members, count)
        if self.members > 1:
            loc = torch.where(torch.rand_like(loc) < 0.5, -loc, loc)
        self.loc = PyroParam(start, event_dim=1)
        self.factor_loc = PyroParam(loc, event_dim=2)
        self.factor_scale = PyroParam(torch.full_like(loc, self._init_scale), constraints.positive, event_dim=2)

    def _spread(self, component: Tensor) -> Tensor:
        """Z under fresh factors, one for each component number."""
        noise = torch.randn_like(self.factor_loc[component])
        factors = self.factor_loc[component] + self.factor_scale[component] * noise
        scales = torch.ones(len(component), self.structure.dim, dtype=self.loc.dtype, device=self.loc.device)
        pieces, first = list(scales.split([s.shape.numel() for s in self.structure.sites.values()], 1)), 0
        for number, (name, site) in enumerate(self.structure.sites.items()):
            if name in self.weights:
                rows, cols = site.shape[:2]
                r, s = factors[:, first : first + rows], factors[:, first + rows : first + rows + cols]
                product = (r[:, :, None] * s[:, None, :]).reshape(-1, rows, cols, *[1] * (len(site.shape) - 2))
                pieces[number] = product.expand(-1, *site.shape).reshape(len(component), -1)
                first += rows + cols
        return self.loc * torch.cat(pieces, 1)

    @pyro_method
    def particles(self, count: int) -> Tensor:
        """Draws from components at random."""
        self._component = torch.randint(self.members, (count,), device=self.loc.device)
        return self._spread(self._component)

    @pyro_method
    def position(self) -> Tensor:
        """One draw."""
        return self.particles(1)[0]

    @pyro_method
    def log_density(self, position: Tensor) -> dict[str, Tensor]:
        """The priors' densities of W' over those of W, and the divergence of the factors, of the draws just made."""
        one = position.dim() == 1
        result = {}
        for name in self.weights:
            site = self.structure.sites[name]
            assert site.normal is not None  # or it were none of the weights
            (loc, scale), product, weight = site.normal, position[..., site.slice], self.loc[site.slice]
            result[name] = ((weight - loc).square() - (product - loc).square()).sum(-1) / (2 * scale**2)
        law, prior = dist.Normal(self.factor_loc, self.factor_scale), dist.Normal(1.0, self.prior_scale)
        divergence = kl_divergence(law, prior).sum(-1)[self._component]
        result[self.weights[0]] = result[self.weights[0]] + (divergence[0] if one else divergence)
        return result

    @torch.no_grad()
    def flat_draws(self, num_samples: int) -> Tensor:
        """Draws from each component equally often, as far as that goes."""
        whole, rest = divmod(num_samples, self.members)
        numbers = torch.cat([torch.arange(self.members).repeat(whole), torch.randperm(self.members)[:rest]])
        return self._spread(numbers.to(self.loc.device))

    @torch.no_grad()
    def flat_median(self) -> Tensor:
        """The median of 1000 draws."""
        return self.flat_draws(1000).quantile(0.5, 0)
