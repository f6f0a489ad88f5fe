"""How far the writers of a store have come, and what readers may see of it.

Each writer writes a part of the chains, and says in the store how many of their draws are on disk together with the
state that continues them. Chains that are drawn together are seen as far as the slowest writer has come. Of chains that
are drawn one after another those are seen that are whole; the first also before, since arrays are rectangular.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

SECONDS, GRADIENTS = ("setup_time", "warmup_time", "sampling_time"), "gradient_evaluations"


def seen(attributes: Mapping[str, Any], whole: int) -> tuple[int, int]:
    """Chains and draws that are committed by all writers.

    :param attributes: of the store: ``parts``, ``progress`` and ``in_turn``.
    :param whole: draws of a chain that has all.

    >>> parts = {"parts": [[0, 2], [2, 4]], "progress": {"0": {"draws": 9}, "1": {"draws": 6}}}
    >>> seen({**parts, "in_turn": False}, 9), seen({**parts, "in_turn": True}, 9)
    ((4, 6), (2, 9))
    """
    draws: dict[int, int] = {}
    for writer, (start, stop) in enumerate(attributes["parts"]):
        own = int(attributes["progress"].get(str(writer), {"draws": 0})["draws"])
        for chain in range(start, stop):
            draws[chain] = min(draws.get(chain, own), own)
    if not attributes["in_turn"]:
        return len(draws), min(draws.values())
    finished = next((chain for chain in sorted(draws) if draws[chain] < whole), len(draws))
    return (finished, whole) if finished else (1, draws[0])


def costs_together(costs: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """What processes that ran side by side have cost: the seconds of the longest, the gradients of all."""
    costs = list(costs)
    found: dict[str, Any] = {name: max((cost[name] for cost in costs), default=0.0) for name in SECONDS}
    return {**found, GRADIENTS: sum(cost[GRADIENTS] for cost in costs)}


def cost_of_all(progress: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The same of the writers of a store, of which a process may have been several, one after another."""
    by_process: dict[int, dict[str, Any]] = {}
    for entry in progress:
        if "process" in entry:
            total = by_process.setdefault(entry["process"], dict.fromkeys((*SECONDS, GRADIENTS), 0))
            for name in total:
                total[name] += entry[name]
    return costs_together(by_process.values())
