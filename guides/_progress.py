"""How far the training of one guide is: its parameters as they stand, running means, and what to check."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor
from torch.distributions import constraints, transform_to

from bnn.guides._base import NaturalGuide
from bnn.guides._step import Result
from bnn.guides._svi import OptimizerCheck, rate_of, set_rate, steps_per_unit, tell
from bnn.guides._thin import Covariances


class Parameters:
    """The constrained parameters of a guide's blocks, computed anew only where an optimizer has moved them.

    :ivar leaves: per block, name -> the unconstrained tensor that optimizers move.
    """

    def __init__(self, guide: NaturalGuide) -> None:
        self.guide = guide
        self.names: dict[int, str] = {}
        self.leaves: list[dict[str, Any]] = []
        self._values: list[dict[str, Tensor]] = []
        self._versions: list[dict[str, int]] = []
        self._read()

    def _read(self) -> None:
        with poutine.trace(param_only=True) as capture:
            values = [self.guide.params_of(block) for block in self.guide.blocks]
        nodes: Any = capture.trace.nodes
        self.names = {id(site["value"].unconstrained()): name for name, site in nodes.items()}
        self.leaves, self._values, self._versions = [], [], []
        for block, value in zip(self.guide.blocks, values, strict=True):
            leaves: dict[str, Any] = {}
            for name in block.parameters:
                tensor: Any = value[name]
                leaves[name] = tensor.unconstrained()
            self.leaves.append(leaves)
            self._values.append({name: tensor.detach() for name, tensor in value.items()})
            self._versions.append({name: leaf._version for name, leaf in leaves.items()})

    def current(self) -> list[dict[str, Tensor]]:
        """Name -> constrained tensor, for each block."""
        store = dict(pyro.get_param_store().named_parameters())
        for leaves in self.leaves:
            for leaf in leaves.values():
                if store.get(self.names[id(leaf)], leaf) is not leaf:  # the store was loaded or cleared
                    self._read()
                    return self._values
        for number, leaves in enumerate(self.leaves):
            for name, leaf in leaves.items():
                if leaf._version != self._versions[number][name]:
                    constraint = self.guide.constraints[number][name]
                    self._values[number][name] = _constrained(leaf.detach(), constraint)
                    self._versions[number][name] = leaf._version
        return self._values

    def tell(self, others: list[Tensor]) -> None:
        """Name to ``SVI`` the parameters of the guide, and ``others``."""
        tell([(self.names[id(leaf)], leaf) for leaves in self.leaves for leaf in leaves.values()], others)


def _constrained(leaf: Tensor, constraint: Any) -> Tensor:
    if constraint is not constraints.lower_cholesky:
        result: Tensor = transform_to(constraint)(leaf)
        return result
    factor = leaf.clone()  # as the transform, without three more matrices: nothing moves what is above the diagonal
    factor.diagonal().exp_()
    return factor


class Progress:
    """Steps taken, statistics since the last update of factors, and running means.

    :ivar count: steps taken.
    :ivar priors: parts of directions that are used again.
    """

    def __init__(self, guide: NaturalGuide) -> None:
        self.parameters = Parameters(guide)
        self.count = 0
        self.priors: dict[int, tuple[Tensor, Tensor]] = {}
        self.events = 0
        self._sums: list[dict[str, Tensor]] = []
        self._moments: dict[int, dict[str, Tensor]] = {}
        self.check_optimizer = OptimizerCheck()
        self.covariances = Covariances()

    def add(self, result: Result) -> None:
        """Take statistics in."""
        if not self._sums:
            self._sums = [dict(block) for block in result.targets]
        else:
            for block, fresh in zip(self._sums, result.targets, strict=True):
                for name, value in fresh.items():
                    block[name] = block[name] + value
        self.events += 1

    def mean(self, number: int) -> dict[str, Tensor]:
        """Mean statistics of a block since :meth:`forget`."""
        return {name: value / self.events for name, value in self._sums[number].items()} if self._sums else {}

    def forget(self) -> None:
        """Begin anew."""
        self._sums, self.events = [], 0

    def averaged(self, number: int, fresh: Mapping[str, Tensor], rate: float) -> dict[str, Tensor]:
        """Bias-corrected running means."""
        state = self._moments.setdefault(number, {})
        for name, value in {**fresh, "weight": torch.ones(())}.items():
            state[name] = torch.lerp(state.get(name, torch.zeros_like(value)), value, rate)
        return {name: value / state["weight"].to(value) for name, value in state.items() if name != "weight"}

    def state(self) -> dict[str, Any]:
        """All that the next step depends on besides parameters, for a checkpoint."""
        locs = [leaves["loc"] for leaves in self.parameters.leaves]
        return {
            "count": self.count,
            "events": self.events,
            "sums": [dict(block) for block in self._sums],
            "moments": {number: dict(moments) for number, moments in self._moments.items()},
            "priors": dict(self.priors),
            "rates": [rate_of(leaf) for leaf in locs],
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from another training's :meth:`state`."""
        self.count, self.events = state["count"], state["events"]
        self._sums, self._moments = state["sums"], state["moments"]
        self.priors = {number: (pair[0], pair[1]) for number, pair in state["priors"].items()}
        for leaves, rate in zip(self.parameters.leaves, state["rates"], strict=True):
            set_rate(leaves["loc"], rate)
        self.check_optimizer = OptimizerCheck(done=self.count > 0)

    def prior_every(self, inverses_every: int) -> int:
        """Steps for which the prior's part of a direction may be used again: the rate times them is at most one."""
        return min(inverses_every, steps_per_unit(self.parameters.leaves[0]["loc"]))
