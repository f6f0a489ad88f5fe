"""The parameters of an ``AutoDelta``, as optimizers move them, and where their gradients are written."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoDelta
from torch import Tensor

from bnn.guides._svi import OptimizerCheck, rate_of, set_rate, steps_per_unit, tell
from bnn.guides.natural_gradient_descent import NATURAL, Natural


class PointLeaves:
    """One unconstrained leaf per site, and for each a buffer that becomes its ``.grad``.

    :param guide: the guide.
    :ivar buffers: site -> minus the update at rate 1, in memory that stays.
    """

    def __init__(self, guide: AutoDelta) -> None:
        self._guide = guide
        self._check_optimizer = OptimizerCheck()
        self.names: dict[str, str] = {}
        self.leaves: dict[str, Tensor] = {}
        self.buffers: dict[str, Tensor] = {}

    def _read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        with poutine.block(), poutine.trace() as capture:
            self._guide(*args, **kwargs)
        nodes: Any = capture.trace.nodes
        prefix = f"{self._guide._pyro_name}." if self._guide._pyro_name else ""
        sites = [name for name, node in nodes.items() if node["type"] == "sample" and not node["is_observed"]]
        self.names = {name: prefix + name for name in sites if prefix + name in nodes}
        self._check_optimizer = OptimizerCheck()
        self.leaves = {name: nodes[full]["value"].unconstrained() for name, full in self.names.items()}
        self.buffers = {name: torch.zeros(leaf.shape).to(leaf) for name, leaf in self.leaves.items()}

    def current(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Site -> leaf. They are read by running the guide at first, and if the parameter store was loaded or cleared.

        :raises ValueError: if the optimizer does not follow the gradient.
        """
        store = dict(pyro.get_param_store().named_parameters())
        if not self.leaves or any(store.get(self.names[name], leaf) is not leaf for name, leaf in self.leaves.items()):
            self._read(args, kwargs)
        self._check_optimizer()
        return self.leaves

    def check(self, sites: Iterable[str]) -> None:
        """:raises ValueError: if the model has other sites."""
        missing, extra = sorted(set(self.leaves) - set(sites)), [name for name in sites if name not in self.leaves]
        if missing or extra:
            raise ValueError(
                f"guide and model differ in their latent sites: only the guide has {missing}, only the model {extra}. "
                "Make the guide from the model that SVI gets, and make a new one when the model's sites change."
            )

    def rates(self) -> dict[str, float | None]:
        """Site -> rate of the last step, for a checkpoint."""
        return {name: rate_of(leaf) for name, leaf in self.leaves.items()}

    def load_rates(self, rates: Mapping[str, float | None]) -> None:
        """As if the optimizer had taken a step of these rates."""
        for name, rate in rates.items():
            set_rate(self.leaves[name], rate)
        self._check_optimizer = OptimizerCheck(done=True)

    def steps_per_unit(self) -> int:
        """Steps that make up a rate of one."""
        return steps_per_unit(next(iter(self.leaves.values())))

    def write(self) -> None:
        """Buffers into ``.grad``, marked for :class:`bnn.guides.NaturalGradientDescent`."""
        for name, leaf in self.leaves.items():
            leaf.grad = self.buffers[name]
            if getattr(leaf, NATURAL, None) is None:
                setattr(leaf, NATURAL, Natural("loc"))
        self._check_optimizer.remember(self.leaves.values())

    def tell(self, others: Iterable[Tensor]) -> None:
        """Name to ``SVI`` the parameters of the guide, and ``others``."""
        tell([(self.names[name], leaf) for name, leaf in self.leaves.items()], others)
