"""SWAG: a Gaussian with the mean and covariance of the iterates of an optimizer, one per member.

    z̄ = mean of z_t,     D = diag(mean of (z_t − z̄)²),     R = the last K deviations z_t − z̄_t as columns

    z = z̄ + √c (D^½ ε₁ + R ε₂ / √(K − 1)),        ε₁, ε₂ ~ N(0, I),    c = ½
    mean z̄, covariance c (D + R Rᵀ / (K − 1))

(Maddox et al. 2019, "A simple baseline for Bayesian uncertainty in deep learning", Algorithm 1; their ``scale`` is c.)
Here z̄_t is the running mean after z_t. Several members make a mixture with equal weights, multi-SWAG (Wilson and
Izmailov 2020). What the covariance is of depends on the optimizer, its rate and its minibatches: for SGD with rate h on
a quadratic with Hessian H and gradient noise of covariance V it is the solution of ΣH + HΣ − hHΣH = hV (Mandt, Hoffman
and Blei 2017, in discrete time), the posterior only by chance. With SGD's sums here (not means) over the data a rate h
is a rate h N of the mean loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from bnn.guides.ensemble import AutoEnsemble


class AutoSWAG(AutoEnsemble):
    """Gaussians fitted to the iterates of each member of an ensemble; of one, unless more are asked for.

    Train to a mode first, then go on at a constant rate and call :meth:`collect` every epoch. ``bnn.predict`` and
    ``bnn.to_arviz`` draw from the Gaussians, after at least two collections. Under Pyro's ``Predictive`` the guide
    gives the iterate, as in training, until ``guide.eval()``.

    Buffers: ``mean`` and ``squares`` ``(members, dim)``, z̄ and the sum of (z_t − z̄)²; ``deviations`` ``(members, K,
    dim)``, Rᵀ; ``collected``, how often.

    :param model: a Pyro model.
    :param rank: most columns K of R; 0 for a diagonal covariance.
    :param scale: c; ½ is SWAG's, for which D and R Rᵀ / (K − 1) each count half.
    :param members: number of Gaussians.
    :param init_loc_fn: as of :class:`~bnn.guides.AutoEnsemble`.
    :param anchored: as of :class:`~bnn.guides.AutoEnsemble`.
    :param create_plates: as for Pyro's guides.
    :raises ValueError: if ``rank`` is 1 or negative, or ``scale`` not positive.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import AutoSWAG, TraceEnsemble_ELBO
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model, x = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = AutoSWAG(model, rank=10, members=3)
    >>> svi = pyro.infer.SVI(model, guide, pyro.optim.SGD({"lr": 1e-5}), TraceEnsemble_ELBO())
    >>> for _ in range(20):
    ...     loss = svi.step(x, x.sin())
    ...     guide.collect()
    >>> bnn.predict(guide, x, num_samples=50).mean.shape
    torch.Size([50])
    """

    deviations: Tensor

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rank: int = 20,
        scale: float = 0.5,
        members: int = 1,
        init_loc_fn: Any = "auto",
        anchored: bool = False,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, members, init_loc_fn=init_loc_fn, anchored=anchored, create_plates=create_plates)
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 0 or rank == 1:
            raise ValueError(f"rank is {rank!r}; give the number of deviations to keep, at least 2, or 0 for none.")
        if not 0 < scale < math.inf:
            raise ValueError(f"scale is {scale}; give a positive number, ½ for SWAG's own covariance.")
        self.rank, self.scale, self.collected = rank, scale, 0

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super()._make(args, kwargs)
        start = self.positions.detach()
        self.register_buffer("mean", torch.zeros_like(start))
        self.register_buffer("squares", torch.zeros_like(start))
        self.register_buffer("deviations", start.new_zeros(self.members, 0, start.shape[1]), persistent=False)

    @torch.no_grad()
    def collect(self) -> None:
        """Count the present point of each member in.

        :raises RuntimeError: before the first step, or at points that are not finite.
        """
        point = self._point_to_collect()
        self.collected += 1
        before = point - self.mean
        self.mean.add_(before, alpha=1.0 / self.collected)
        after = point - self.mean
        self.squares.addcmul_(before, after)
        if self.rank and self.deviations.shape[1] < self.rank:
            self.deviations = torch.cat([self.deviations, after[:, None]], 1)
        elif self.rank:
            for column in range(1, self.rank):  # in place: they are most of what a large net needs
                self.deviations[:, column - 1] = self.deviations[:, column]
            self.deviations[:, -1] = after

    def variance(self) -> Tensor:
        """D: the variance of each entry over the iterates, ``(members, dim)``."""
        return self.squares / max(self.collected, 1)

    def position(self) -> Tensor:
        """In training a member's iterate, else a draw from the Gaussians."""
        return super().position() if self.training else self.flat_draws(1)[0]

    @property
    def default_draws(self) -> int:
        """How many draws ``bnn.predict`` takes unless told otherwise."""
        return max(1000 // self.members, 1) * self.members

    @torch.no_grad()
    def flat_draws(self, num_samples: int) -> Tensor:
        """Draws from the mixture: from each Gaussian equally many, as far as that goes.

        :raises RuntimeError: before two collections.
        """
        self._needs_collections()
        chosen = self.chosen(num_samples).to(self.mean.device)
        spread = self.variance().sqrt()[chosen] * torch.randn_like(self.mean[chosen])
        columns = self.deviations.shape[1]
        if columns > 1:
            weights = torch.randn(num_samples, 1, columns, dtype=spread.dtype, device=spread.device)
            for number in range(self.members):  # no copy of the deviations per draw
                own = chosen == number
                spread[own] += (weights[own] @ self.deviations[number] / math.sqrt(columns - 1)).squeeze(1)
        return self.mean[chosen] + math.sqrt(self.scale) * spread

    @torch.no_grad()
    def flat_median(self) -> Tensor:
        """The median over the members of their means.

        :raises RuntimeError: before two collections.
        """
        self._needs_collections()
        return self.mean.quantile(0.5, 0)

    def _needs_collections(self) -> None:
        if self.collected < 2:
            raise RuntimeError(
                f"{self.collected} points were collected, a covariance needs two: call guide.collect() after steps of "
                "SVI, once an epoch, say."
            )

    def get_extra_state(self) -> dict[str, Any]:
        """How often was collected, and the deviations, whose number grows: for ``state_dict``."""
        return {"collected": self.collected, "deviations": getattr(self, "deviations", None)}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`get_extra_state`."""
        self.collected = state["collected"]
        if state["deviations"] is not None:
            self.deviations = state["deviations"].to(getattr(self, "deviations", state["deviations"]).device)
