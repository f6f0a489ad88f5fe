"""A function of one draw, for many draws: vectorized where the function allows it, else one after another."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from bnn.devices import sent

# So many draws run at once that the largest tensor inside the model stays below this many numbers.
LARGEST_TENSOR = 1 << 22

# Of a net with more weights than this, draws run one after another on a CPU: vectorizing would copy the weights.
LARGEST_NET = 1 << 17

# Laws that can be drawn from for many draws at once; others differ from their loop, warn, or are not implemented there.
DRAWN_AT_ONCE = {
    "Bernoulli", "Categorical", "Gamma", "HalfNormal", "Laplace", "LogNormal", "MultivariateNormal", "Normal",
    "OneHotCategorical", "Poisson", "StudentT", "Uniform",
}  # fmt: skip

# Relative and absolute difference by which a vectorized result may miss that of a run by itself, in single precision.
TOLERANCE = 2e-3


class OverDraws:
    """Runs a model for every draw.

    :param draws: values of the latent sites, ``(draws, *shape)``.
    :param device: where the model runs, to which a few draws at a time are sent; where the draws are by default.
    :ivar first: the first draw.
    :ivar count: the number of draws.
    :ivar largest_tensor: so many numbers may the largest tensor inside the model have, over the draws that run at once.
    :ivar meter: to be entered around one run of the model, before the first call.
    """

    def __init__(self, draws: Mapping[str, Tensor], device: torch.device | None = None) -> None:
        self.draws, self.device = dict(draws), device
        self.first = sent({name: value[0] for name, value in draws.items()}, device)
        self.count = len(next(iter(draws.values())))
        self.meter = Meter()
        self.largest_tensor = LARGEST_TENSOR
        self._vectorizes: dict[str, bool] = {}

    def __call__(
        self,
        one: Callable[[dict[str, Tensor]], dict[str, Tensor]],
        kind: str,
        *,
        drawn: frozenset[str] = frozenset(),
        alone: Mapping[str, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """What ``one`` gives for each draw, stacked.

        :param one: values of the latent sites of one draw -> tensors.
        :param kind: functions of one kind are vectorized or not alike.
        :param drawn: the laws that ``one`` draws from.
        :param alone: what ``one`` gives for the first draw, to which the vectorized result is compared.
        """
        at_once = max(1, self.largest_tensor // self.meter.largest)
        on_cpu = next(iter(self.first.values())).device.type == "cpu"
        numbers = sum(value.numel() for value in self.first.values())
        # On a CPU a convolution per draw gains nothing either.
        slow = at_once == 1 or (on_cpu and (self.meter.convolves or numbers > LARGEST_NET))
        if self._vectorizes.setdefault(kind, not slow and drawn <= DRAWN_AT_ONCE):
            try:
                result = self._vectorized(one, at_once)
                if alone is None or _agree(result, alone):
                    return result
            except Exception:  # whatever vmap cannot do, the loop can, or raises itself
                pass
            self._vectorizes[kind] = False
        draws = (sent({n: value[i] for n, value in self.draws.items()}, self.device) for i in range(self.count))
        pieces = [one(draw) for draw in draws]
        return {name: torch.stack([piece[name] for piece in pieces]) for name in pieces[0]}

    def _vectorized(self, one: Callable[..., Any], at_once: int) -> dict[str, Tensor]:
        result: dict[str, Tensor] = {}
        for start in range(0, self.count, at_once):
            stop = start + at_once
            part = sent({name: value[start:stop] for name, value in self.draws.items()}, self.device)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop", category=UserWarning)
                piece = torch.func.vmap(one, randomness="different")(part)
            for name, value in piece.items():
                if name not in result:
                    result[name] = value.new_empty((self.count, *value.shape[1:]))
                result[name][start:stop] = value
        return result


def _agree(values: Mapping[str, Tensor], alone: Mapping[str, Tensor]) -> bool:
    """Whether the vectorized result of the first draw is the one of a run by itself."""
    return all(
        torch.allclose(values[name][0], one.to(values[name]), rtol=TOLERANCE, atol=TOLERANCE, equal_nan=True)
        for name, one in alone.items()
    )


class Meter(TorchFunctionMode):
    """Notes the largest tensor that a model makes, and whether it convolves."""

    largest, convolves = 1, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        self.convolves |= getattr(func, "__name__", "").startswith("conv")
        return result


class _FreshNoise(TorchFunctionMode):
    """Replaces in-place noise on a new tensor, which vectorized draws would have to share, by a new tensor of noise."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_) and not kwargs:
            like: Tensor = args[0]
            first = args[1] if len(args) > 1 else 0.0
            second = args[2] if len(args) > 2 else 1.0
            draw = torch.randn if func is Tensor.normal_ else torch.rand
            noise = draw(like.shape, dtype=like.dtype, device=like.device)
            return first + noise * (second if func is Tensor.normal_ else second - first)
        return func(*args, **(kwargs or {}))


def fresh_noise(drawing: bool) -> contextlib.AbstractContextManager[Any]:
    """Around a run of the model in which ``drawing`` says whether sites are drawn."""
    return _FreshNoise() if drawing else contextlib.nullcontext()
