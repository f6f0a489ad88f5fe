"""What a model says about every row of its data under many draws: log-likelihood, predictions, observations.

The model runs over all its data in chunks (see :mod:`bnn.observations`). Within a chunk the draws are vectorized, as
many at once as memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bnn.checks import first_of
from bnn.devices import device_of_call
from bnn.log_joint import quiet_handlers
from bnn.observations import Chunk, Observation, Reader, copies_of, one_pass, place_of, read, tensor_arguments, windows
from bnn.over_draws import OverDraws, fresh_noise

# A group of more numbers than this is made only on request.
LARGEST_GROUP = 20_000_000

PER_DRAW = ("log_likelihood", "posterior_predictive")


@dataclass
class Groups:
    """The groups that :func:`evaluate` made.

    :ivar values: group -> variable -> tensor; those of log-likelihood and predictions lead with the draws.
    :ivar left_out: group -> why it was not made.
    """

    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)


def evaluate(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    draws: Mapping[str, Tensor],
    wanted: Mapping[str, bool | None],
    *,
    batches: Iterable[Any] | None = None,
) -> Groups:
    """Run ``model`` over all its data once and collect the groups that are wanted, so that their rows correspond.

    :param model: a Pyro model.
    :param args: its arguments, not used with ``batches``.
    :param kwargs: its keyword arguments, not used with ``batches``.
    :param draws: values of the latent sites in the model's own space, ``(draws, *shape)``.
    :param wanted: of ``observed_data``, ``constant_data``, ``log_likelihood`` and ``posterior_predictive``, whether it
        is made: False, True, or None for "unless it is too large or impossible".
    :param batches: an iterable of argument tuples that together are the data.
    :raises ValueError: if a group that must be made cannot be made.
    """
    if batches is not None:
        args, kwargs = first_of(batches, (), {})
    probe, over_draws = Chunk(args, dict(kwargs)), OverDraws(draws, device_of_call(model, args, kwargs))
    with torch.no_grad(), quiet_handlers():
        with over_draws.meter:
            reader = read(model, over_draws.first, probe)
        groups = Groups(left_out=_left_out(model, wanted, reader, probe, over_draws, batches))
        collector = _Collector(
            model, over_draws, {g for g, want in wanted.items() if want is not False} - set(groups.left_out)
        )
        if collector.parts:
            for chunk in windows(probe, list(reader.plates.values())) if batches is None else one_pass(batches):
                collector.add(chunk)
    groups.values = collector.groups()
    return groups


def _left_out(
    model: Callable[..., Any],
    wanted: Mapping[str, bool | None],
    reader: Reader,
    probe: Chunk,
    over_draws: OverDraws,
    batches: Iterable[Any] | None,
) -> dict[str, str]:
    """Which groups are too large or cannot be computed, and why; those that must be made are an error."""
    copies = {name: copies_of(site, reader, probe, batches) for name, site in reader.sites.items()}
    rows = sum(site.log_prob.numel() * copies[name] for name, site in reader.sites.items())
    numbers = sum(site.value.numel() * copies[name] for name, site in reader.sites.items())
    arguments = sum(value.numel() for value in tensor_arguments(model, probe).values())
    sizes = {
        "observed_data": numbers,
        "constant_data": arguments * (1 if batches is None else max(copies.values(), default=1)),
        "log_likelihood": over_draws.count * rows,
        "posterior_predictive": over_draws.count * numbers,
    }
    result = {}
    for group, want in wanted.items():
        if want is not False and group in PER_DRAW and reader.missing:
            why = f"the draws lack the latent sites {sorted(reader.missing)} (discrete ones, or not in save_params=)"
            if want:
                raise ValueError(f"{group} needs all latent sites of the model, but {why}.")
            result[group] = why
        elif want is None and sizes[group] > LARGEST_GROUP:
            result[group] = f"it would hold {sizes[group]:.1e} numbers"
    return result


class _Collector:
    """Puts the groups together, chunk by chunk."""

    def __init__(self, model: Callable[..., Any], over_draws: OverDraws, wanted: set[str]) -> None:
        self.model, self.over_draws, self.wanted = model, over_draws, wanted
        self.parts = {group: Parts() for group in wanted}
        if "constant_data" in wanted:  # is told apart from the observations
            self.parts.setdefault("observed_data", Parts())
        self.whole: dict[str, Tensor] = {}

    def add(self, chunk: Chunk) -> None:
        """Add one chunk to every group."""
        if "constant_data" in self.parts:
            self._add_arguments(chunk)
        sites = read(self.model, self.over_draws.first, chunk).sites
        places = {name: place for name, site in sites.items() if (place := place_of(site, chunk)) is not None}
        for name, site in sites.items():
            if chunk.row is not None and not places.get(name):
                self._check_same(name, site.value)
            if name in places and "observed_data" in self.parts:
                self.parts["observed_data"].add(name, site.value, site.shifted(places[name]))
        for group in PER_DRAW:
            if group in self.parts and places:
                resample = group == "posterior_predictive"
                for name, value in self._over_draws(chunk, sites, resample).items():
                    if name in places:
                        place = sites[name].shifted(places[name]) if resample else places[name]
                        self.parts[group].add(name, value, place)

    def _over_draws(self, chunk: Chunk, sites: Mapping[str, Observation], resample: bool) -> dict[str, Tensor]:
        """Log-likelihood of each site ``(draws, *batch shape)``, or a draw of its value ``(draws, *shape)``."""

        def one(values: dict[str, Tensor]) -> dict[str, Tensor]:
            with fresh_noise(resample):
                found = read(self.model, values, chunk, resample).sites
            return {name: site.value if resample else site.log_prob for name, site in found.items()}

        if resample:
            drawn = frozenset[str]().union(*(site.laws for site in sites.values()))
            return self.over_draws(one, "draw", drawn=drawn)
        return self.over_draws(one, "log_prob", alone={name: site.log_prob for name, site in sites.items()})

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The groups that are not empty."""
        values = {group: part.whole() for group, part in self.parts.items()}
        if "constant_data" in values:
            constant, observed = values["constant_data"], values["observed_data"].values()
            values["constant_data"] = {
                name: v for name, v in constant.items() if not any(_same(v, o) for o in observed)
            }
        return {group: variables for group, variables in values.items() if variables and group in self.wanted}

    def _add_arguments(self, chunk: Chunk) -> None:
        for name, value in tensor_arguments(self.model, chunk).items():
            if chunk.row is not None and value.dim() and len(value) == chunk.size:
                self.parts["constant_data"].add(name, value, {-value.dim(): chunk.row})
            elif name not in self.parts["constant_data"].parts:
                self.parts["constant_data"].add(name, value, {})

    def _check_same(self, name: str, value: Tensor) -> None:
        if not torch.equal(self.whole.setdefault(name, value), value):
            raise ValueError(
                f"observed site {name!r} changes from batch to batch, but is in no plate over a batch's rows: put it "
                "into pyro.plate('data', N, subsample_size=len(x))."
            )


class Parts:
    """Variables that are put together from chunks."""

    def __init__(self) -> None:
        self.parts: dict[str, list[tuple[Tensor, dict[int, int]]]] = {}

    def add(self, name: str, value: Tensor, place: Mapping[int, int]) -> None:
        """Add a part that begins at ``place[dim]`` in each dimension, counted from the right."""
        self.parts.setdefault(name, []).append((value.detach().cpu(), dict(place)))

    def whole(self) -> dict[str, Tensor]:
        """The variables, and forget the parts."""
        result = {}
        for name in list(self.parts):
            parts = self.parts.pop(name)
            value, shape = parts[0][0], list(parts[0][0].shape)
            if len(parts) > 1:
                for part, place in parts:
                    for dim, start in place.items():
                        shape[dim] = max(shape[dim], start + part.shape[dim])
                value = value.new_empty(shape)
                for part, place in parts:
                    window = [slice(None)] * value.dim()
                    for dim, start in place.items():
                        window[dim] = slice(start, start + part.shape[dim])
                    value[tuple(window)] = part
            result[name] = value
        return result


def _same(value: Tensor, other: Tensor) -> bool:
    return value.numel() == other.numel() and torch.equal(value.double().reshape(-1), other.double().reshape(-1))
