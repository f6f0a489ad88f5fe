"""Checks of what a user hands to :func:`bnn.bayesian` and to the model that it makes."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bnn.net_parameters import Parameter
from bnn.prior_rules import Prior
from bnn.recording import has_values, untraced
from bnn.structure import ModelError

# Tensors whose values are known to be right.
MOST_SEEN = 16

_BATCH_NORM, _INSTANCE_NORM = nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm


class Seen:
    """Which tensors were checked, so that a model that runs many times reads its data once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, ...]] = {}

    def once(self, tensor: Any, other: Tensor | None, facts: Any, check: Callable[[], None]) -> None:
        """Run ``check`` unless it passed before for the same tensors, unchanged, and the same facts."""
        if not isinstance(tensor, Tensor):
            check()
            return
        key = (_version(tensor), _version(other), facts)
        known = self._known.get(id(tensor))
        if known is not None and known[0]() is tensor and known[1]() is other and known[2] == key:
            return
        check()
        if has_values(tensor):
            if len(self._known) >= MOST_SEEN:
                self._known.clear()
            self._known[id(tensor)] = weakref.ref(tensor), _reference(other), key


def _reference(tensor: Any) -> Callable[[], Any]:
    return weakref.ref(tensor) if isinstance(tensor, Tensor) else lambda: tensor


def _version(tensor: Any) -> int:
    """Counts the writes to a tensor; those of inference mode do not count them."""
    return -1 if not isinstance(tensor, Tensor) or tensor.is_inference() else int(tensor._version)


def copied(net: nn.Module) -> nn.Module:
    """A copy whose parameters require no gradients.

    :raises ValueError: if it cannot be copied.
    """
    try:
        net = copy.deepcopy(net)
    except Exception as error:
        raise ValueError(
            f"the net ({type(net).__name__}) cannot be copied by copy.deepcopy, and the model keeps a copy: {error}"
        ) from error
    net.zero_grad(set_to_none=True)
    return net.requires_grad_(False)


def check_net(net: Any) -> None:
    """:raises ValueError: unless the net is one whose outputs are a function of its parameters and inputs."""
    if not isinstance(net, nn.Module):
        raise ValueError(f"net is {type(net).__name__}; give a torch.nn.Module.")
    if isinstance(net, torch.jit.ScriptModule) or hasattr(net, "_orig_mod"):
        raise ValueError(
            f"the net is compiled ({type(net).__name__}): give the plain nn.Module; samplers record and compile it."
        )
    for name, module in net.named_modules():
        where = f"{name!r} ({type(module).__name__})" if name else f"the net ({type(module).__name__})"
        if isinstance(module, PyroModule):
            raise ValueError(
                f"{where} is a PyroModule, which draws its own parameters: give a plain nn.Module, or write the model "
                "by hand and use it as it is."
            )
        if isinstance(module, _BATCH_NORM) and (module.training or module.running_mean is None):
            raise ValueError(
                f"{where} normalises by the statistics of its batch, so that the rows of the data are not independent "
                "given the parameters, and a minibatch says nothing of the whole: train it first and call net.eval(), "
                "or use nn.GroupNorm, nn.LayerNorm or a filter response norm in its place."
            )
        if isinstance(module, _INSTANCE_NORM) and module.training and module.track_running_stats:
            raise ValueError(
                f"{where} changes its running statistics at every call: call net.eval(), or make it without "
                "track_running_stats."
            )
        if module.training and isinstance(module, nn.RReLU) and module.lower != module.upper:
            raise ValueError(
                f"{where} draws its slopes at random, and that is no part of a posterior over the parameters: call "
                "net.eval()."
            )
        if module.training and _dropout(module):
            raise ValueError(
                f"{where} drops values at random, p = {_dropout(module):g}, and that noise is no part of a posterior "
                "over the parameters: call net.eval(), or set p to 0."
            )


def _dropout(module: nn.Module) -> float:
    """How likely a module is to drop a value."""
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return float(module.p)
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0
    return 0.0


def check_sizes(batch_size: Any, num_data: Any) -> None:
    """:raises ValueError: unless they are positive whole numbers, one of them at most."""
    for name, value in (("batch_size", batch_size), ("num_data", num_data)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name} is {value!r}; give a whole number of at least 1.")
    if batch_size is not None and num_data is not None:
        raise ValueError(
            f"batch_size={batch_size} draws minibatches from the data that the model is called with, and "
            f"num_data={num_data} says that these are one batch of a loader: give one of the two."
        )


def check_names(parameters: Sequence[str], noise: Sequence[str], priors: Mapping[str, Prior]) -> None:
    """:raises ValueError: if two sites would have one name, or nothing is random."""
    taken = {"data", "y", *noise}
    for name in parameters:
        if name in taken:
            raise ValueError(
                f"parameter {name!r} of the net has the name of another site of the model "
                f"({', '.join(map(repr, sorted(taken)))}): rename it, for instance by nn.Sequential(net)."
            )
    if not noise and not any(prior.latent for prior in priors.values()):
        raise ValueError(
            "prior= keeps every parameter at its value (Fixed), and the likelihood learns nothing: give a parameter a "
            "prior, such as {'*.weight': bnn.priors.FanIn(), '*': bnn.priors.Fixed()}."
        )


def check_inputs(inputs: Any, parameters: Sequence[Parameter], seen: Seen) -> int:
    """The number of rows of the inputs.

    :raises ValueError: unless they are tensors of as many rows, finite, in the precision and on the device of the
        parameters.
    """
    if not isinstance(inputs, (list, tuple)) or not inputs or not all(isinstance(part, Tensor) for part in inputs):
        shown = type(inputs).__name__
        if isinstance(inputs, (list, tuple)):
            shown += f" of {', '.join(sorted({type(part).__name__ for part in inputs})) or 'nothing'}"
        raise ModelError(f"x is {shown}; give a tensor, or a tuple of tensors that the net takes one after another.")
    shapes = [tuple(part.shape) for part in inputs]
    if not all(shapes) or len({shape[0] for shape in shapes}) > 1 or not shapes[0][0]:
        raise ModelError(
            f"x has shape {', '.join(map(str, shapes))}: the first dimension counts the rows, at least one, the same "
            "for all tensors of x."
        )
    dtypes = {p.value.dtype for p in parameters if p.value.is_floating_point()}
    devices = list(dict.fromkeys(p.value.device for p in parameters))
    for part in inputs:
        if part.is_floating_point() and len(dtypes) == 1 and part.dtype not in dtypes:
            (wanted,) = dtypes
            raise ModelError(
                f"x is {part.dtype}, the net's parameters {wanted}: convert one of them, x.to({wanted}) or "
                f"net.to({part.dtype})."
            )
        if part.device not in devices:
            raise ModelError(
                f"x is on {part.device}, the net's parameters on {' and '.join(map(str, devices))}: move one of them, "
                f"x.to({str(devices[0])!r}) or net.to({str(part.device)!r})."
            )
        seen.once(part, None, (), partial(_finite, part))
    return shapes[0][0]


def _finite(x: Tensor) -> None:
    if x.is_floating_point() and has_values(x):
        with untraced():
            bad = ~torch.isfinite(x)
            if bad.any():
                raise ModelError(
                    f"x holds {int(bad.sum())} values that are NaN or infinite: remove these rows, or fill them in."
                )


def check_rows(rows: int, device: torch.device, y: Any, mask: Any, num_data: int | None) -> None:
    """:raises ValueError: unless x, y and mask have as many rows, no more than all data have, and share a device."""
    for name, value in (("y", y), ("mask", mask)):
        if isinstance(value, Tensor) and value.device != device:
            raise ModelError(f"x is on {device}, {name} on {value.device}: move one of them, {name}.to(x.device).")
        if isinstance(value, Tensor) and (not value.dim() or len(value) != rows):
            raise ModelError(f"x has {rows} rows, {name} has shape {tuple(value.shape)}: give {name} the same rows.")
    if num_data is not None and rows > num_data:
        raise ModelError(
            f"the model was called with {rows} rows, but num_data={num_data}: give the number of rows of all data."
        )


def check_outputs(outputs: Any, rows: int) -> None:
    """:raises ValueError: unless the net returns one tensor of real numbers, whose first dimension counts the rows."""
    if not isinstance(outputs, Tensor):
        raise ModelError(
            f"the net returns {type(outputs).__name__}; wanted is one tensor. Wrap it in a module that returns what "
            "the likelihood is about, such as net(x)[0][:, -1] of a recurrent layer."
        )
    if not outputs.dim() or len(outputs) != rows:
        raise ModelError(
            f"the net returns {tuple(outputs.shape)} for {rows} rows of x: the first dimension must count the rows "
            "(recurrent and attention layers want batch_first=True)."
        )
    if not outputs.is_floating_point():
        raise ModelError(f"the net returns {outputs.dtype}; wanted are real numbers (logits, not classes).")
