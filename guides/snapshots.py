"""Snapshot ensembles: members out of one run whose rate falls and jumps up again.

    rate(t) = ½ α (1 + cos(π (t mod C) / C)),        a snapshot at the end of each cycle of C steps

(Huang et al. 2017, "Snapshot ensembles: train 1, get M for free", eq. 2.) The schedule is PyTorch's
``CosineAnnealingWarmRestarts`` in Pyro's wrapper; the snapshots are modes, as of a deep ensemble, but not independent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from bnn.guides.ensemble import AutoEnsemble


class AutoSnapshots(AutoEnsemble):
    """An ensemble of snapshots of one run, or of several runs at once.

    Call :meth:`collect` at the end of each cycle. A draw is one of the snapshots. Under Pyro's ``Predictive`` the guide
    gives the iterate, as in training, until ``guide.eval()``. Buffer: ``snapshots`` ``(snapshots, dim)``. Parameters as
    of :class:`~bnn.guides.AutoEnsemble`, where ``members`` is the number of runs, one by default.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import AutoSnapshots, TraceEnsemble_ELBO
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model, x = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide, cycle = AutoSnapshots(model), 50
    >>> cosine = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.02}, "T_0": cycle}
    >>> schedule = pyro.optim.CosineAnnealingWarmRestarts(cosine)
    >>> svi = pyro.infer.SVI(model, guide, schedule, TraceEnsemble_ELBO())
    >>> for step in range(1, 4 * cycle + 1):
    ...     loss = svi.step(x, x.sin())
    ...     if step % cycle == 0:
    ...         guide.collect()
    ...     schedule.step()
    >>> len(guide.snapshots), bnn.predict(guide, x).mean.shape
    (4, torch.Size([50]))
    """

    snapshots: Tensor

    def __init__(self, model: Any, members: int = 1, **settings: Any) -> None:
        super().__init__(model, members, **settings)

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super()._make(args, kwargs)
        self.register_buffer("snapshots", self.positions.detach().new_zeros(0, self.structure.dim), persistent=False)

    @torch.no_grad()
    def collect(self) -> None:
        """Keep the present point of each run.

        :raises RuntimeError: before the first step, or at points that are not finite.
        """
        point = self._point_to_collect()
        self.snapshots = torch.cat([self.snapshots, point])

    def position(self) -> Tensor:
        """In training a run's iterate, else one of the snapshots."""
        return super().position() if self.training else self.flat_draws(1)[0]

    @property
    def default_draws(self) -> int:
        """How many draws ``bnn.predict`` takes unless told otherwise: each snapshot once."""
        return max(1, len(self.snapshots)) if self.is_set_up else 1

    @torch.no_grad()
    def flat_draws(self, num_samples: int) -> Tensor:
        """Snapshots: each equally often, as far as that goes.

        :raises RuntimeError: before the first is collected.
        """
        self._needs_snapshots()
        return self.snapshots[self.chosen(num_samples, len(self.snapshots)).to(self.snapshots.device)]

    @torch.no_grad()
    def flat_median(self) -> Tensor:
        """The median over the snapshots.

        :raises RuntimeError: before the first is collected.
        """
        self._needs_snapshots()
        return self.snapshots.quantile(0.5, 0)

    def _needs_snapshots(self) -> None:
        if not len(self.snapshots):
            raise RuntimeError("no snapshot was collected: call guide.collect() at the end of each cycle.")

    def get_extra_state(self) -> Tensor | None:
        """The snapshots, whose number grows: for ``state_dict``."""
        return getattr(self, "snapshots", None)

    def set_extra_state(self, state: Tensor | None) -> None:
        """The inverse of :meth:`get_extra_state`."""
        if state is not None:
            self.snapshots = state.to(getattr(self, "snapshots", state).device)
