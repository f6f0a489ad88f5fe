"""Checkpoints of variational training: all that the next step of an ``SVI`` depends on, in one file.

A file holds the parameters of guide and model, their buffers and extra states (the points that SWAG collects), the
optimizers' states and schedules, what the ELBO keeps between steps (running means of curvature, parts of directions,
the order of minibatch rows), and the random generators of PyTorch, NumPy and Python. Training that goes on from it is
the uninterrupted one bit for bit, on a CPU.
The file is written beside its place, flushed and renamed, so that a run killed at any moment leaves the old one or the
new one; it is read without running code from it.

Not in it: data, the model's code, and a position inside a ``DataLoader``'s pass. Write between passes, and give the
loader's ``generator``.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import tempfile
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer import SVI
from pyro.optim.optim import _get_state_dict, _load_state_dict
from torch import Tensor, nn

from bnn.devices import sent
from bnn.randomness import random_state, set_random_state

FORMAT = 1
PLAIN = (type(None), bool, int, float, bytes, torch.dtype, torch.device)


def checkpoint(
    svi: SVI,
    path: str | os.PathLike[str],
    *,
    generators: Iterable[torch.Generator] = (),
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Write all that the training of ``svi`` depends on to ``path``, at once or not at all.

    :param svi: Pyro's ``SVI``, with a guide and an ELBO of this package or of Pyro.
    :param path: the file; one that is there is replaced.
    :param generators: further random generators, such as that of a ``DataLoader``.
    :param notes: what else is to be kept: the epoch, losses so far. Numbers, strings, tensors, lists and dicts.
    :raises RuntimeError: if an optimizer moves a parameter that has no name, or a part of the state is no plain data.
    :raises OSError: if the file cannot be written; the one that was there is untouched.

    >>> import pyro, tempfile, torch, pyro.distributions as dist
    >>> from pyro.infer import SVI
    >>> import bnn
    >>> from bnn.guides import AutoFactorizedNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
    >>> def model(x, y):
    ...     weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 2), 1.).to_event(2))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("obs", dist.Normal((x @ weight.T).squeeze(-1), 1.), obs=y)
    >>> def training():
    ...     return SVI(model, AutoFactorizedNormal(model), NaturalGradientDescent(), TraceNaturalGradient_ELBO())
    >>> x, y, svi = torch.randn(10, 2), torch.ones(10), training()
    >>> losses = [svi.step(x, y) for _ in range(5)]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bnn.checkpoint(svi, folder + "/svi.pt", notes={"step": 5})
    ...     next_loss = svi.step(x, y)
    ...     pyro.clear_param_store()
    ...     svi = training()
    ...     print(bnn.restore(svi, folder + "/svi.pt", model_args=(x, y)))
    {'step': 5}
    >>> svi.step(x, y) == next_loss
    True
    """
    names = _names(svi)
    optimizers = {}
    for parameter, optimizer in svi.optim.optim_objs.items():
        if parameter not in names:
            raise RuntimeError(
                f"the optimizer moves a parameter of shape {tuple(parameter.shape)} that has no name: it is neither in "
                "Pyro's parameter store nor a parameter of a model or guide that is a module. Register the net in the "
                "model, with pyro.module('net', net)."
            )
        optimizers[names[parameter]] = _get_state_dict(optimizer)
    state = {
        "format": FORMAT,
        "versions": {"pyro": pyro.__version__, "torch": torch.__version__},
        "made of": _made_of(svi),
        "parameters": {name: parameter.detach() for parameter, name in names.items()},
        "buffers": {name: tensor.detach() for name, tensor in _buffers(svi).items()},
        "extra": {name: module.get_extra_state() for name, module in _with_extra_state(svi).items()},
        "optimizers": optimizers,
        "loss": _loss_state(svi),
        "random": random_state(),
        "generators": [generator.get_state() for generator in generators],
        "notes": dict(notes or {}),
    }
    write_at_once(Path(path), _plain(state, "checkpoint"))


def restore(
    svi: SVI,
    path: str | os.PathLike[str],
    *,
    model_args: tuple[Any, ...] = (),
    model_kwargs: Mapping[str, Any] | None = None,
    generators: Iterable[torch.Generator] = (),
) -> dict[str, Any]:
    """Put a checkpoint back into an ``SVI`` that was made as the one it is of: training goes on bit for bit.

    :param svi: the same model, guide, optimizer and ELBO as then, made anew.
    :param path: the file that :func:`checkpoint` wrote.
    :param model_args: arguments of ``svi.step``, with which the guide is set up; data of the same shapes.
    :param model_kwargs: its keyword arguments.
    :param generators: as many generators as were given then, in the same order.
    :returns: the notes given then.
    :raises FileNotFoundError: if there is no such file.
    :raises ValueError: if the file is damaged or of a newer version, or guide, optimizer, ELBO or shapes are others.
    """
    state, kwargs, generators = read(Path(path)), dict(model_kwargs or {}), list(generators)
    given, kept = _made_of(svi), state["made of"]
    for what, name in kept.items():
        if given[what] != name:
            raise ValueError(
                f"{path} is of a training whose {what} is {name}, but this SVI's is {given[what]}: make the SVI as it "
                "was made then, or start anew."
            )
    if len(generators) != len(state["generators"]):
        raise ValueError(
            f"{path} holds {len(state['generators'])} generators, {len(generators)} are given: give the same ones to "
            "checkpoint and restore, in the same order."
        )
    _set_up(svi, state["parameters"], model_args, kwargs)
    named = {name: parameter for parameter, name in _names(svi).items()}
    buffers = _buffers(svi)
    for kind, ours in (("parameters", named), ("buffers", buffers)):
        _check_shapes(path, kind, ours, state[kind])
    with torch.no_grad():
        for kind, ours in (("parameters", named), ("buffers", buffers)):
            for name, value in state[kind].items():
                ours[name].copy_(value)
    for name, module in _with_extra_state(svi).items():
        module.set_extra_state(state["extra"][name])
    # Pyro hands such states out at the next step, by names in its store; a schedule that moves before needs them now.
    svi.optim.optim_objs.clear()
    for name, own in state["optimizers"].items():
        parameter = named[name]
        svi.optim.optim_objs[parameter] = optimizer = svi.optim._get_optim(parameter)
        svi.optim.grad_clip[parameter] = svi.optim._get_grad_clip(parameter)
        _load_state_dict(optimizer, own)
    _load_loss_state(svi, state["loss"], model_args, kwargs)
    for generator, own in zip(generators, state["generators"], strict=True):
        generator.set_state(own)
    set_random_state(state["random"])
    notes: dict[str, Any] = state["notes"]
    return notes


# ---- files


def write_at_once(path: Path, state: Any) -> None:
    """Write to a file beside ``path``, flush it to the disk and rename it.

    :raises OSError: if that fails; ``path`` is untouched.
    """
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        temporary = None
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter
        raise OSError(
            f"the checkpoint {path} could not be written: {error}. One that was there before is untouched. Check the "
            "folder, its permissions and the space on the disk."
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read(path: Path) -> dict[str, Any]:
    """The state in a file, every byte of it checked.

    :raises ValueError: if the file is damaged, is no checkpoint, or is of a newer version.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}: begin without restore(), or check the path.")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        if damaged is not None:
            raise ValueError(f"the sum of {damaged} is wrong")
        with torch.serialization.safe_globals([Counter, OrderedDict]):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the readers raise all kinds of errors
        raise ValueError(
            f"{path} is damaged or no checkpoint: {str(error).splitlines()[0] if str(error) else error!r}. Files are "
            "written whole, so it was cut or changed afterwards: take another copy, or start anew."
        ) from error
    if not isinstance(state, dict) or "format" not in state or "made of" not in state:
        raise ValueError(f"{path} is a file of PyTorch but no checkpoint of an SVI: give what bnn.checkpoint wrote.")
    if state["format"] > FORMAT:
        raise ValueError(
            f"{path} is of format {state['format']}, and this version of pyro-bnn reads up to {FORMAT}: install the "
            "version that wrote it, or a newer one."
        )
    return state


def _plain(value: Any, where: str) -> Any:
    """``value`` in types that are read back without running code."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, PLAIN):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, Mapping):
        items = {key: _plain(one, f"{where}[{key!r}]") for key, one in value.items()}
        return type(value)(items) if isinstance(value, (Counter, OrderedDict)) else items
    if isinstance(value, (list, tuple)):
        parts = [_plain(one, f"{where}[{number}]") for number, one in enumerate(value)]
        return parts if isinstance(value, list) else tuple(parts)
    raise RuntimeError(
        f"{where} is {type(value).__name__}, which cannot be kept: a checkpoint holds numbers, strings, tensors, lists "
        "and dicts. Put it into these, or leave it out of notes= or of the optimizer's settings."
    )


# ---- parts of an SVI


def _modules(svi: SVI) -> dict[str, nn.Module]:
    """Guide and model, where they are modules."""
    found = {"guide": poutine.unwrap(svi.guide), "model": poutine.unwrap(svi.model)}
    return {name: module for name, module in found.items() if isinstance(module, nn.Module)}


def _names(svi: SVI) -> dict[Tensor, str]:
    """Parameters, as optimizers move them, and names for them: those of Pyro's store, and those of modules."""
    moved: dict[Tensor, str] = {p: n for n, p in pyro.get_param_store().named_parameters()}
    for kind, module in _modules(svi).items():
        for name, parameter in module.named_parameters():
            moved.setdefault(parameter, f"{kind}: {name}")
    return moved


def _buffers(svi: SVI) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for kind, module in _modules(svi).items():
        kept = module.state_dict()  # of what is not persistent the module takes care in its extra state
        found |= {f"{kind}: {name}": buffer for name, buffer in module.named_buffers() if name in kept}
    return found


def _with_extra_state(svi: SVI) -> dict[str, nn.Module]:
    """Modules that keep more than tensors."""
    return {
        f"{kind}: {name}": one
        for kind, module in _modules(svi).items()
        for name, one in module.named_modules()
        if type(one).get_extra_state is not nn.Module.get_extra_state
    }


def _loss(svi: SVI) -> Any:
    return getattr(svi.loss_and_grads, "__self__", svi.loss_and_grads)


def _made_of(svi: SVI) -> dict[str, str]:
    def kind(part: Any) -> str:
        part = part if inspect.isfunction(part) or inspect.isclass(part) else type(part)
        return str(part.__qualname__)

    optimizer = f"{kind(svi.optim)} of {kind(getattr(svi.optim, 'pt_optim_constructor', svi.optim))}"
    return {"guide": kind(poutine.unwrap(svi.guide)), "loss": kind(_loss(svi)), "optimizer": optimizer}


def _loss_state(svi: SVI) -> dict[str, Any]:
    loss = _loss(svi)
    own = getattr(loss, "training_state", None)
    nesting = getattr(loss, "max_plate_nesting", None)  # Pyro finds it out by a run of the model, at random
    return {"own": None if own is None else own(poutine.unwrap(svi.guide)), "max_plate_nesting": nesting}


def _load_loss_state(svi: SVI, state: Mapping[str, Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    loss = _loss(svi)
    if state["max_plate_nesting"] is not None:
        loss.max_plate_nesting = state["max_plate_nesting"]
    if state["own"] is not None:
        devices = {parameter.device for parameter in _names(svi)}  # the file was read onto the CPU
        own = sent(state["own"], devices.pop() if len(devices) == 1 else None)
        loss.load_training_state(svi.model, poutine.unwrap(svi.guide), own, args, kwargs)


def _set_up(svi: SVI, wanted: Mapping[str, Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Run guide and model once, if the parameters are not there yet."""
    known = set(_names(svi).values())
    if known.issuperset(wanted):
        return
    try:
        with torch.no_grad(), poutine.block():
            trace = poutine.trace(svi.guide).get_trace(*args, **kwargs)
            poutine.replay(svi.model, trace=trace)(*args, **kwargs)
    except TypeError as error:
        if args or kwargs:
            raise
        raise ValueError(
            "the guide is not set up: give the arguments of svi.step as model_args=(x, y), from which it learns its "
            "shapes."
        ) from error


def _check_shapes(path: Any, kind: str, ours: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    missing, extra = sorted(set(kept) - set(ours)), sorted(set(ours) - set(kept))
    if missing or extra:
        raise ValueError(
            f"{path} and this SVI differ in their {kind}: only the file has {missing}, only the SVI {extra}. Make "
            "model and guide as they were made then; pyro.clear_param_store() forgets those of other guides."
        )
    for name, value in kept.items():
        own = ours[name]
        if own.shape != value.shape or own.dtype != value.dtype:
            raise ValueError(
                f"{kind[:-1]} {name!r} is {tuple(value.shape)}, {value.dtype} in {path}, but {tuple(own.shape)}, "
                f"{own.dtype} here: this is another model, or other data. Make them as then, or start anew."
            )
