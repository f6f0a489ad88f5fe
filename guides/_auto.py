"""What our guides do alike under Pyro's ``AutoGuide``: they start where they are told to, and they can be kept."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

from pyro.infer.autoguide import AutoGuide
from pyro.infer.autoguide.initialization import InitMessenger

from bnn.initialization import strategy_of


class KeptGuide(AutoGuide):
    """An ``AutoGuide`` that keeps its model when it is pickled or copied, which Pyro's own loses.

    :param model: a Pyro model.
    :param init_loc_fn: where the sites start: a name of :func:`bnn.initialization.strategy_of` or one of Pyro's
        ``init_to_*`` functions.
    :param create_plates: as for Pyro's guides.
    :raises ValueError: if the model cannot be called.
    """

    def __init__(
        self, model: Callable[..., Any], *, init_loc_fn: Any = "auto", create_plates: Callable[..., Any] | None = None
    ) -> None:
        if not callable(model):
            raise ValueError(f"model is {type(model).__name__}; give a Pyro model: a function or PyroModule to call.")
        super().__init__(model, create_plates=create_plates)
        self._init = strategy_of(init_loc_fn)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        model, self._model = self._model, (InitMessenger(self._init)(self.model),)
        try:
            super()._setup_prototype(*args, **kwargs)
        finally:
            self._model = model

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's own version forgets the model, in the original too. The prototype holds the data: not kept. What Pyro
        # and the ELBO noted on the parameters, such as weak references, cannot be pickled and is noted anew when used.
        for leaf in self.parameters():
            leaf.__dict__.clear()
        return {**self.__dict__, "master": None, "prototype_trace": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.model)] = self.model
        new = self.__class__.__new__(self.__class__)
        memo[id(self)] = new
        new.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return new
