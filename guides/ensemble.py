"""Deep ensembles: several point estimates, trained at once, from starts of their own.

    z_k ← argmin U(z),    k = 1 ... K,        q(z) = 1/K Σ_k δ(z − z_k)

(Lakshminarayanan, Pritzel and Blundell 2017), with the potential energy U of the model as loss. The members are modes,
not draws: how far they are from the posterior depends on the starts, and there is no bound.

Anchored, the prior's centre m of each member is a draw a_k from the prior, and stays (Pearce, Leibfried and
Brintrup 2020, "Uncertainty in neural networks: approximately Bayesian ensembling"):

    z_k ← argmin U(z) + log N(z; m, s²) − log N(z; a_k, s²).

In linear regression with known noise σ² and members that also see targets with fresh noise of variance σ² each, the
members are independent draws from the posterior. Without that noise on the targets they are too narrow.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from pyro.nn.module import PyroParam, pyro_method
from torch import Tensor

from bnn.guides._flat import FlatGuide
from bnn.models import BayesianNet


class AutoEnsemble(FlatGuide):
    """An ensemble of point estimates of all latent sites: a draw is one of the members.

    With :class:`~bnn.guides.TraceEnsemble_ELBO` every step moves all members, in one vectorized program; Pyro's
    ``Trace_ELBO`` moves one, drawn at random. ``bnn.predict`` takes each member
    once; ``bnn.to_arviz`` and ``Predictive`` draw members uniformly. Parameter: ``positions`` ``(members, dim)``.

    :param model: a Pyro model.
    :param members: number of members K.
    :param init_loc_fn: where members start: a name of :func:`bnn.initialization.strategy_of`, one of Pyro's
        ``init_to_*`` functions; values per member, site -> ``(members, *shape)``; or ``"net"``: weights as the net's
        own ``reset_parameters`` draws them, for models of :func:`bnn.bayesian`. The default draws from the prior, wide
        ones shrunk.
    :param anchored: give each member a draw from the prior as the centre of its prior. Sites whose prior is not a
        Normal of fixed numbers, such as a learned noise, keep theirs.
    :param create_plates: as for Pyro's guides.
    :raises ValueError: if ``members`` is no positive whole number, or the model has no net to start as.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import AutoEnsemble, TraceEnsemble_ELBO
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model, x = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = AutoEnsemble(model, members=5)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), TraceEnsemble_ELBO())
    >>> losses = [svi.step(x, x.sin()) for _ in range(100)]
    >>> bnn.predict(guide, x).mean.shape
    torch.Size([50])
    """

    positions: Any  # a PyroParam, which reads as a tensor

    def __init__(
        self,
        model: Callable[..., Any],
        members: int = 5,
        *,
        init_loc_fn: Any = "auto",
        anchored: bool = False,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        as_net = isinstance(init_loc_fn, str) and init_loc_fn == "net"
        super().__init__(model, init_loc_fn="auto" if as_net else init_loc_fn, create_plates=create_plates)
        if not isinstance(members, int) or isinstance(members, bool) or members < 1:
            raise ValueError(f"members is {members!r}; give the number of members, at least 1.")
        if as_net and not isinstance(model, BayesianNet):
            raise ValueError(
                f"init_loc_fn='net' needs a model of bnn.bayesian, which knows its net; the model is "
                f"{type(model).__name__}: give 'prior', 'auto' or one of Pyro's init_to_* functions."
            )
        self.members, self.anchored, self._as_net = members, anchored, as_net

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        starts = self.starts(self.members, args, kwargs)
        if self._as_net:
            for start in starts:
                self._reset(start)
        self.positions = PyroParam(starts, event_dim=2)
        if self.anchored:
            self.register_buffer("anchors", self._drawn_anchors())

    def _point_to_collect(self) -> Tensor:
        """The members' present positions, for guides that collect them in training."""
        self._needs_setup("collect")
        point = self.positions.detach()
        if not torch.isfinite(point).all():
            raise RuntimeError("the members are not all finite: lower the learning rate; nothing was collected.")
        return point

    def _reset(self, start: Tensor) -> None:
        """Write fresh parameters of the net into a flat position."""
        net = copy.deepcopy(self.model.net)
        for module in net.modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
        for name, value in net.named_parameters():
            if name in self.structure.sites:
                start[self.structure.sites[name].slice] = value.detach().reshape(-1)

    def _drawn_anchors(self) -> Tensor:
        like = self.structure
        anchors = torch.zeros(self.members, like.dim, dtype=like.dtype, device=like.device)
        normal = {name: site for name, site in self.structure.sites.items() if site.normal is not None}
        if not normal:
            raise ValueError(
                "anchored=True needs a site with a Normal prior of fixed mean and scale, as bnn.priors.FanIn gives; "
                f"the sites {sorted(self.structure.sites)} have none. Leave it out, or give the weights such a prior."
            )
        for site in normal.values():
            loc, scale = site.normal  # type: ignore[misc]
            part = anchors[:, site.slice]
            part.copy_(loc + scale * torch.randn_like(part))
        return anchors

    @pyro_method
    def particles(self, count: int) -> Tensor:
        """All members, whatever ``count``."""
        del count
        return self.positions

    @pyro_method
    def position(self) -> Tensor:
        """One member, drawn at random."""
        self._member = int(torch.randint(self.members, ()))
        return self.positions[self._member]

    def log_density(self, position: Tensor) -> dict[str, Tensor]:
        """Anchored: log N(z; m, s²) − log N(z; a_k, s²) per site, of all members or of the one drawn last."""
        if not self.anchored:
            return {}
        anchors = self.anchors if position.dim() == 2 else self.anchors[self._member]
        result = {}
        for name, site in self.structure.sites.items():
            if site.normal is not None:
                (loc, scale), z, anchor = site.normal, position[..., site.slice], anchors[..., site.slice]
                result[name] = ((z - anchor).square() - (z - loc).square()).sum(-1) / (2 * scale**2)
        return result

    @property
    def default_draws(self) -> int:
        """How many draws ``bnn.predict`` takes unless told otherwise: each member once."""
        return self.members

    @torch.no_grad()
    def flat_draws(self, num_samples: int) -> Tensor:
        """Members: each equally often where their number divides ``num_samples``, else the rest at random."""
        return self.positions.detach()[self.chosen(num_samples).to(self.positions.device)]

    def chosen(self, num_samples: int, count: int | None = None) -> Tensor:
        """So many numbers below ``count`` (the members), each equally often, as far as that goes."""
        count = self.members if count is None else count
        whole, rest = divmod(num_samples, count)
        return torch.cat([torch.arange(count).repeat(whole), torch.randperm(count)[:rest]])

    @torch.no_grad()
    def flat_median(self) -> Tensor:
        """The median over the members."""
        return self.positions.detach().quantile(0.5, 0)

    def member(self, number: int) -> dict[str, Tensor]:
        """The values of one member: site -> tensor."""
        return self.constrain(self.positions[number].detach().clone())
