"""The laws of a model's observed sites under every draw, chunk of rows by chunk of rows, within a bound of memory.

Rows go through in windows where the model's plates draw minibatches of its arguments; in slices of the arguments where
a trial shows that rows do not influence each other; else all at once.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from bnn.checks import leading_size
from bnn.devices import device_of_call
from bnn.observations import Chunk, Target, TargetReader, read_targets, windows
from bnn.over_draws import Meter, OverDraws, fresh_noise
from bnn.posterior_draws import PosteriorDraws
from bnn.predictive_law import closed_form

# Rows at a time, and numbers in the largest tensor over the draws that run at once: what fits a processor's cache was
# fastest for small nets and large ones.
ROWS_AT_ONCE, NUMBERS_AT_ONCE = 1024, 1 << 20

# Rows of the trial that shows whether rows influence each other.
TRIAL_ROWS = 256

# Of the bytes that may be held, a tensor inside the model takes at most this part, and all draws' laws this one.
INSIDE, LAWS = 8, 6


class LawsOverDraws:
    """Iterates over chunks: (chunk, site -> its target in the first draw, site -> values ``(draws, ...)``).

    The values are those of :func:`bnn.predictive_law.closed_form` and, if it is asked for, ``sample``.

    :param known: the draws.
    :param args: arguments of the model.
    :param kwargs: keyword arguments of the model.
    :param sites: what is predicted; by default what the run observed.
    :param memory: bytes.
    :param draw: whether a sample of every site is needed.
    """

    def __init__(
        self,
        known: PosteriorDraws,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        sites: Sequence[str] | None,
        memory: float,
        draw: bool,
    ) -> None:
        self.model, self.args, self.kwargs, self.memory = known.model, args, kwargs, memory
        self.over_draws = OverDraws(known.values, device_of_call(known.model, args, kwargs))
        self.rows = leading_size(args, kwargs)
        self.trial, self.trial_rows, self.meter = self._trial()
        self.names = _sites(self.trial, sites, known, self.trial_rows)
        self.chained = len(self.names) > 1  # one site may depend on the value of another
        self.draw = draw or self.chained or not all(closed_form(self.trial.targets[name].fn) for name in self.names)

    def __iter__(self) -> Iterator[tuple[Chunk, dict[str, Target], dict[str, dict[str, Tensor]]]]:
        element = next((v.element_size() for v in self.over_draws.draws.values() if v.is_floating_point()), 4)
        self.over_draws.largest_tensor = int(min(NUMBERS_AT_ONCE, max(1, self.memory / INSIDE / element)))
        for chunk in self._chunks(element):
            with self.over_draws.meter:
                reader = self._read(self.over_draws.first, chunk)
            values = self.over_draws(
                lambda draw, chunk=chunk: self._laws(self._read(draw, chunk)),  # type: ignore[misc]
                "laws",
                drawn=frozenset().union(*(reader.targets[n].laws for n in self.names)) if self.draw else frozenset(),
                alone=None if self.chained else self._laws(reader, samples=False),
            )
            found: dict[str, dict[str, Tensor]] = {name: {} for name in self.names}
            for key, value in values.items():
                name, _, kind = key.rpartition("/")
                found[name][kind] = value
            yield chunk, {name: reader.targets[name] for name in self.names}, found

    def _read(self, draw: Mapping[str, Tensor], chunk: Chunk) -> TargetReader:
        with fresh_noise(True):
            return read_targets(self.model, draw, chunk, self.draw)

    def _laws(self, reader: TargetReader, samples: bool = True) -> dict[str, Tensor]:
        result = {}
        for name in self.names:
            target = reader.targets[name]
            result.update({f"{name}/{kind}": value for kind, value in closed_form(target.fn).items()})
            if self.draw and samples:
                result[f"{name}/sample"] = target.value
        return result

    def _chunks(self, element: int) -> Iterator[Chunk]:
        whole = Chunk(self.args, self.kwargs)
        if any(plate.batch_size != self.trial_rows for plate in self.trial.plates.values()):
            full = read_targets(self.model, self.over_draws.first, whole, self.draw)
            yield from windows(whole, list(full.plates.values()))
            return
        laws = sum(v.numel() for v in self._laws(self.trial).values()) * self.over_draws.count
        per_row = max(laws * LAWS, self.meter.largest * INSIDE) * element / max(1, self.trial_rows)
        at_once = max(1, min(ROWS_AT_ONCE, int(self.memory / per_row)))
        if at_once < self.rows and self._independent():
            for start in range(0, self.rows, at_once):
                size = min(at_once, self.rows - start)
                yield Chunk(*self._slice(start, start + size), row=start, size=size)
            return
        if self.rows * per_row > self.memory:
            warnings.warn(
                "the model's rows influence each other, or are not the first dimension of its arguments: all "
                f"{self.rows} are predicted at once, which may take {per_row * self.rows / 2**20:.0f} MiB.",
                RuntimeWarning,
                stacklevel=4,
            )
        yield whole

    # ---- the trial

    def _trial(self) -> tuple[TargetReader, int, Meter]:
        """One draw, on the first rows alone if the model runs on them; and how many."""
        _check_call(self.model, self.args, self.kwargs)
        if self.rows > TRIAL_ROWS:
            with contextlib.suppress(Exception):
                return self._try(Chunk(*self._slice(0, TRIAL_ROWS)), TRIAL_ROWS)
        try:
            return self._try(Chunk(self.args, self.kwargs), self.rows)
        except Exception as error:
            raise ValueError(
                f"the model could not be run on the arguments given: {type(error).__name__}: {error}. To predict, it "
                "must run without its targets, as for pyro.infer.Predictive: def model(x, y=None), and "
                "obs=None if y is None else y[rows]."
            ) from error

    def _try(self, chunk: Chunk, rows: int) -> tuple[TargetReader, int, Meter]:
        meter = Meter()
        with meter:
            reader = read_targets(self.model, self.over_draws.first, chunk, drawn=True)
        return reader, rows, meter

    def _independent(self) -> bool:
        """Whether the laws of the trial's rows are the same without the others."""
        half = self.trial_rows // 2
        for start in (0, half) if half else ():
            with contextlib.suppress(Exception):
                chunk = Chunk(*self._slice(start, start + half))
                part = read_targets(self.model, self.over_draws.first, chunk, drawn=True).targets
                whole = self.trial.targets
                if all(_is_part(part[name], whole[name], start, half, self.trial_rows) for name in self.names):
                    continue
            return False
        return True

    def _slice(self, start: int, stop: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
        def part(leaf: Any) -> Any:
            rows = isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == self.rows
            return leaf[start:stop] if rows else leaf

        args, kwargs = pytree.tree_map(part, (self.args, self.kwargs))
        return args, kwargs


def _is_part(part: Target, whole: Target, start: int, size: int, rows: int) -> bool:
    """Whether the law of ``size`` rows by themselves is that of rows ``start`` on among all ``rows``."""
    dim, laws = whole.row_dim(rows), closed_form(part.fn)
    if not laws or dim is None or dim != part.row_dim(size):
        return False
    for kind, value in closed_form(whole.fn).items():
        place = dim - (value.dim() - len(whole.batch_shape))
        if value.shape[place] != rows or laws[kind].shape[place] != size:
            return False
        if not torch.allclose(value.narrow(place, start, size), laws[kind], rtol=1e-3, atol=1e-4, equal_nan=True):
            return False
    return True


def _sites(trial: TargetReader, sites: Sequence[str] | None, known: PosteriorDraws, rows: int) -> list[str]:
    """What is predicted.

    :raises ValueError: if a site is unknown, or a latent site is not among the draws.
    """
    unknown = [name for name in sites or () if name not in trial.targets]
    if unknown:
        raise ValueError(f"the model has no site {unknown} to predict; it has {sorted(trial.targets)}.")
    observed = known.observed()
    if observed:
        lacking = [name for name in trial.targets if name not in observed]
    else:  # a target has rows, a latent site of a net has none
        lacking = [name for name, target in trial.targets.items() if rows and target.row_dim(rows) is None]
    lacking = [name for name in lacking if name not in (sites or ())]
    if lacking:
        raise ValueError(
            f"the draws lack the latent sites {lacking}, which would be drawn from the prior. Run with all sites "
            "(save_params=None), or name what is to be predicted by sites=."
        )
    if not trial.targets:
        raise ValueError("the model has no site to predict: all of its sites are among the draws.")
    return list(sites) if sites is not None else list(trial.targets)


def _check_call(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    function = model.forward if isinstance(model, nn.Module) else model
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ValueError(
            f"the model cannot be called with the arguments given: {error}; its signature is {signature}. To predict, "
            "it must be callable without its targets, as for pyro.infer.Predictive: def model(x, y=None)."
        ) from error
