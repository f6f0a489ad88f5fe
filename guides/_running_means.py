"""Running means of the statistics of K-FAC."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from bnn.guides._point import Outputs
from bnn.guides.matrix_normal import MatrixBlock

# Outputs of a program that are averaged over steps.
KINDS = ("input_moment", "output_moment", "input_cross", "output_cross", "squares")


class RunningMeans:
    """Bias-corrected running means of statistics; of the prior's precision, the newest.

    :param rate: weight of a new estimate.
    """

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._values: dict[tuple[str, Any], Tensor] = {}
        self._weights: dict[tuple[str, Any], float] = {}

    def add(self, found: Outputs) -> None:
        """Take statistics in; other outputs are passed over."""
        for key, value in found.items():
            if key[0] == "precision":
                self._values[key] = value
            elif key[0] in KINDS:
                weight = self._weights.get(key, 0.0)
                self._weights[key] = weight = weight + self._rate * (1.0 - weight)
                if key in self._values:
                    self._values[key].lerp_(value, self._rate / weight)
                else:
                    self._values[key] = value.clone()

    def state(self) -> dict[str, Any]:
        """Values and weights, for a checkpoint."""
        return {"values": dict(self._values), "weights": dict(self._weights)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from other means' :meth:`state`."""
        self._values, self._weights = dict(state["values"]), dict(state["weights"])

    def __getitem__(self, key: tuple[str, Any]) -> Tensor:
        return self._values[key]

    def precision(self, block: MatrixBlock) -> float:
        """Mean over a block of the prior's precision."""
        parts = [site.shape.numel() * float(self._values["precision", site.name]) for site in block.sites]
        return sum(parts) / block.numel
