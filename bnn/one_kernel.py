"""Call a compiled program's one loop nest directly, in memory that is kept between calls.

TorchInductor wraps what it compiles for a processor in Python that allocates every intermediate anew and passes it on.
A step of a small net has a dozen of them, which take longer than its arithmetic. Where the whole program is a single
compiled function, its arguments are noted once; from then on a call puts its own inputs in their places. This reads the
module that inductor writes: where it does not look as expected, the wrapper stays.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Numbers in the kept memory, at most: for larger programs the wrapper's cost does not count.
LARGEST_KEPT = 1 << 20


@contextlib.contextmanager
def written_modules() -> Iterator[list[ModuleType]]:
    """The modules that inductor writes and loads inside."""
    from torch._inductor.codecache import PyCodeCache

    found: list[ModuleType] = []
    original = PyCodeCache.__dict__["load_by_key_path"]
    load = PyCodeCache.load_by_key_path

    def noted(*args: Any, **kwargs: Any) -> ModuleType:
        found.append(load(*args, **kwargs))
        return found[-1]

    PyCodeCache.load_by_key_path = staticmethod(noted)  # type: ignore[method-assign]
    try:
        yield found
    finally:
        PyCodeCache.load_by_key_path = original  # type: ignore[method-assign]


class _Operations(TorchDispatchMode):
    """Counts the operations of PyTorch itself, which allocations of a compiled program are not among."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def one_kernel(
    modules: Sequence[ModuleType], inputs: Sequence[Tensor], results: Sequence[Tensor]
) -> Callable[..., tuple[Tensor, ...]] | None:
    """A program as a call of its one compiled function; None where it is more than that. Not for several threads.

    :param modules: what was written for it.
    :param inputs: example inputs, no tensor twice: places in memory are told by them.
    :param results: what the program makes of them.
    """
    names = [name for module in modules for name in vars(module) if name.startswith("cpp_fused")]
    numbers = {id(tensor): number for number, tensor in enumerate(inputs)}
    if len(modules) != 1 or len(names) != 1 or not hasattr(modules[0], "call") or len(numbers) < len(inputs):
        return None
    module, kernel = modules[0], getattr(modules[0], names[0])
    calls: list[tuple[Any, ...]] = []

    def noted(*args: Any) -> Any:
        calls.append(args)
        return kernel(*args)

    setattr(module, names[0], noted)
    try:
        with _Operations() as operations:
            outputs = list(module.call(list(inputs)))
    except Exception:  # another calling convention
        return None
    finally:
        setattr(module, names[0], kernel)
    if operations.count or len(calls) != 1:
        return None
    arguments = list(calls[0])
    if not all(isinstance(tensor, Tensor) for tensor in [*arguments, *outputs]):
        return None
    places = [(place, numbers[id(tensor)]) for place, tensor in enumerate(arguments) if id(tensor) in numbers]
    kept = [tensor for tensor in arguments if id(tensor) not in numbers]
    given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
    sources = [numbers.get(id(output)) for output in outputs]  # an input may be handed through
    made = [output for output, source in zip(outputs, sources, strict=True) if source is None]
    if any(tensor.untyped_storage().data_ptr() in given for tensor in [*kept, *made]):
        return None  # a view of an input, of another one next time
    if sum(tensor.numel() for tensor in kept) > LARGEST_KEPT:
        return None

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        for place, number in places:
            arguments[place] = inputs[number]
        kernel(*arguments)
        pairs = zip(outputs, sources, strict=True)
        return tuple([output.clone() if source is None else inputs[source] for output, source in pairs])

    found = call(*inputs)
    same = len(found) == len(results) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(found, results, strict=True)
    )
    return call if same else None
