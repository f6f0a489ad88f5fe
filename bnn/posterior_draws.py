"""Draws of a posterior, whatever form it has: a run, a guide, ArviZ's data, a dict or an ensemble of dicts, a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.guide_draws import GuideRun
from bnn.observations import Chunk, read
from bnn.stored_draws import StoredGroup, StoredSite, is_path

GUIDE_DRAWS = 1000


@dataclass(frozen=True)
class PosteriorDraws:
    """What prediction needs of a posterior.

    :ivar model: the Pyro model.
    :ivar values: site -> draws ``(chains * draws, *shape)``, chain by chain.
    :ivar chains: the number of chains.
    :ivar args: arguments of the model in the run.
    :ivar kwargs: keyword arguments of the model in the run.
    :ivar has_data: whether ``args`` and ``kwargs`` are known.
    """

    model: Callable[..., Any]
    values: dict[str, Tensor]
    chains: int = 1
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] | None = None
    has_data: bool = False

    @property
    def draws(self) -> int:
        """Draws per chain."""
        return len(next(iter(self.values.values()))) // self.chains

    def observed(self) -> frozenset[str]:
        """The sites that the run observed; empty if that is not known."""
        if not self.has_data:
            return frozenset()
        with torch.no_grad():
            try:
                first = {name: value[0] for name, value in self.values.items()}
                return frozenset(read(self.model, first, Chunk(self.args, self.kwargs or {})).sites)
            except Exception:  # the run's arguments were batches of a loader, say
                return frozenset()


def draws_of(
    posterior: Any,
    *,
    model: Callable[..., Any] | None = None,
    num_samples: int | None = None,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> PosteriorDraws:
    """The draws of ``posterior`` and its model.

    :param posterior: a finished run (ours or Pyro's), a guide, ArviZ's data, a dict ``site -> (draws, *shape)``, a
        sequence of dicts ``site -> value``, one per member of an ensemble, or the path of a store, whose draws are
        read when they are looked up.
    :param model: the model; needed where ``posterior`` does not know it.
    :param num_samples: how many draws: of a run or a dict, evenly spaced in each chain; of a guide, 1000 by default.
    :param args: arguments of the model, with which a guide may need to be run.
    :param kwargs: its keyword arguments.
    :raises ValueError: for anything else, or if draws or the model are lacking.
    :raises RuntimeError: for a run that has not been run.
    """
    if num_samples is not None and (
        not isinstance(num_samples, int) or isinstance(num_samples, bool) or num_samples < 1
    ):
        raise ValueError(f"num_samples is {num_samples!r}; give the number of draws to predict with, at least 1.")
    if isinstance(posterior, PosteriorDraws):
        return posterior
    if is_path(posterior):
        stored = StoredGroup(posterior, "posterior")
        places = _evenly(*stored.shape, num_samples)
        sites: dict[str, Any] = {name: StoredSite(stored, name, places) for name in stored}
        return PosteriorDraws(_known(model), sites, stored.shape[0])
    if hasattr(posterior, "get_samples"):
        if getattr(posterior, "_samples", True) is None:
            raise RuntimeError("there are no draws yet: call run(...) first.")
        grouped = dict(posterior.get_samples(group_by_chain=True))
        own = getattr(getattr(posterior, "kernel", None), "model", None)
        run_args, run_kwargs = getattr(posterior, "_args", None), getattr(posterior, "_kwargs", None)
        loads = getattr(getattr(posterior, "kernel", None), "batches", None) is not None
        known = run_args is not None and not loads
        return _of(
            grouped, model or own, num_samples, args=run_args or (), kwargs=dict(run_kwargs or {}), has_data=known
        )
    if callable(posterior) and hasattr(posterior, "model"):
        default: int = getattr(posterior, "default_draws", GUIDE_DRAWS)
        run = GuideRun(posterior, args, kwargs or {}, num_samples or default)
        return _of(run.get_samples(group_by_chain=True), model or run.kernel.model, None)
    if _is_arviz(posterior):
        return _of(_from_arviz(posterior), model, num_samples)
    if isinstance(posterior, Mapping):
        return _of({name: torch.as_tensor(value)[None] for name, value in posterior.items()}, model, num_samples)
    if isinstance(posterior, Sequence) and posterior and all(isinstance(member, Mapping) for member in posterior):
        names = set(posterior[0])
        if any(set(member) != names for member in posterior):
            raise ValueError("the members of the ensemble have different sites; give dicts with the same names.")
        stacked = {name: torch.stack([torch.as_tensor(member[name]) for member in posterior])[None] for name in names}
        return _of(stacked, model, num_samples)
    raise ValueError(
        f"posterior is {type(posterior).__name__}; give a finished run, a guide, ArviZ data with a group 'posterior', "
        "a dict of draws, a list of dicts, one per member of an ensemble, or the path of a store."
    )


def _of(
    grouped: Mapping[str, Tensor], model: Callable[..., Any] | None, num_samples: int | None, **known: Any
) -> PosteriorDraws:
    """Draws ``(chains, draws, *shape)``, thinned evenly to ``num_samples`` in all and flattened."""
    grouped = dict(grouped)
    if not grouped:
        raise ValueError("the posterior holds no draws of any site.")
    model = _known(model)
    sizes = {name: tuple(value.shape[:2]) for name, value in grouped.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"the sites have different numbers of draws: {sizes}.")
    chains, draws = next(iter(sizes.values()))
    if not chains * draws:
        raise ValueError("the posterior holds no draws: its sites are empty.")
    places = _evenly(chains, draws, num_samples)
    kept = len(places)
    values = {}
    for name, value in grouped.items():
        part = value.detach() if kept == draws else value.detach()[:, places.to(value.device)]
        values[name] = part.flatten(0, 1)
        # A sum shows NaN and infinity without a copy of all draws.
        if values[name].is_floating_point() and not torch.isfinite(values[name].sum()):
            bad = int((~torch.isfinite(values[name].reshape(kept * chains, -1)).all(1)).sum())
            if bad:  # else the sum alone overflowed
                raise ValueError(
                    f"{bad} of {kept * chains} draws of site {name!r} are not finite: leave out diverged chains."
                )
    return PosteriorDraws(model, values, chains, **known)


def _known(model: Callable[..., Any] | None) -> Callable[..., Any]:
    if model is None:
        raise ValueError("this posterior does not know its model: give model=, the Pyro model whose sites it holds.")
    return model


def _evenly(chains: int, draws: int, num_samples: int | None) -> Tensor:
    """Evenly spaced draws of each chain, ``num_samples`` in all."""
    kept = draws if num_samples is None else max(1, min(draws, num_samples // chains))
    return torch.linspace(0, draws - 1, kept, dtype=torch.float64).round().long()


def _is_arviz(posterior: Any) -> bool:
    groups = getattr(posterior, "groups", None)
    names = groups() if callable(groups) else groups
    return names is not None and any(str(name).strip("/") == "posterior" for name in names)


def _from_arviz(data: Any) -> dict[str, Tensor]:
    """Latent sites of the group ``posterior``, without the functions that :func:`bnn.to_arviz` adds."""
    variables = data["posterior"].data_vars
    return {
        str(name): torch.as_tensor(array.values)
        for name, array in variables.items()
        if "function_of" not in array.attrs
    }
