"""Whether a recorded potential is right, and if there is none, why: its comparison with Pyro's own handlers."""

from __future__ import annotations

import linecache
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro import poutine
from torch import Tensor

from bnn.log_joint import LogJoint, is_subsampled, quiet_handlers
from bnn.randomness import kept_randomness
from bnn.recording import RecordingError
from bnn.tiers import Program

if TYPE_CHECKING:
    from bnn.model_graph import ModelGraph
    from bnn.potential import Potential

# Points at which the energies must be finite, and how many are tried for them.
POINTS, TRIED_POINTS = 2, 10

# Largest relative difference, float32 and float64: of the energy to the sum of its terms' sizes, of a site's gradient
# to its largest entry and, since entries may cancel, to the largest of all entries.
ENERGY_TOLERANCE = {False: 1e-4, True: 1e-9}
SITE_TOLERANCE = {False: 1e-3, True: 1e-8}
GRAD_TOLERANCE = {False: 1e-5, True: 1e-10}

# What torch says, and what it means for a model.
_CAUSES = {
    "_local_scalar_dense": "Python reads the value of a tensor that depends on the latent sites or the minibatch "
    "(in an if, a loop, float() or .item()). Write such a choice with torch.where",
    "would mutate a captured": "the model writes to a tensor that outlives the call, as batch norm in training mode "
    "does. Call model.eval(), or build a new tensor",
    "setup_context": "it uses a torch.autograd.Function that torch.func cannot transform. Give it a setup_context "
    "method, or write it with PyTorch's own functions",
}


def handlers_energy_and_grad(
    log_joint: LogJoint,
    position: Tensor,
    rows: Mapping[str, Tensor],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    *,
    batch_weight: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Energy and gradient by Pyro's own ``condition`` and ``trace``, and the sum of the sizes of the energy's terms."""
    structure = log_joint.structure
    with torch.enable_grad(), quiet_handlers(), poutine.block():
        z = position.detach().requires_grad_()
        values, log_det = log_joint.values(z)
        model = poutine.condition(log_joint.model, {**values, **{name: rows[name] for name in structure.plates}})
        trace = poutine.trace(model).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        log_prob, size = torch.as_tensor(log_det), abs(torch.as_tensor(log_det).detach())
        for site in trace.nodes.values():
            if site["type"] == "sample":
                weight = batch_weight if any(map(is_subsampled, site["cond_indep_stack"])) else 1.0
                log_prob = log_prob + weight * site["log_prob_sum"]
                size = size + weight * torch.as_tensor(site["log_prob"]).detach().abs().sum()
        (grad,) = torch.autograd.grad(-log_prob, z)
    return -log_prob.detach(), grad, size


def disagreement(potential: Potential, program: Program) -> str | None:
    """What differs between ``program``, one chain's energy and gradient, and the handlers; None if nothing does.

    Both draw the same random numbers, if the model draws any.
    """
    double = all(site.dtype == torch.float64 for site in potential.sites.values())
    agreed = 0
    for z in _points(potential):
        (inputs,) = potential.stream(1).next(1)
        with kept_randomness():
            energy, grad = (output[0] for output in program(z.unsqueeze(0), *inputs))
        with kept_randomness():
            expected, expected_grad, size = potential.handlers_energy_and_grad(z, [t[0] for t in inputs])
        if not torch.isfinite(expected) or not torch.isfinite(expected_grad).all():
            continue
        if not abs(energy - expected) <= ENERGY_TOLERANCE[double] * (1 + size):
            return f"its recorded energy is {energy.item():.6g}, by the handlers {expected.item():.6g}"
        floor = GRAD_TOLERANCE[double] * (1 + expected_grad.abs().max())
        for site in potential.sites.values():
            difference = (grad[site.slice] - expected_grad[site.slice]).abs().max()
            if not difference <= floor + SITE_TOLERANCE[double] * expected_grad[site.slice].abs().max():
                return f"its recorded gradient differs at site {site.name!r} from the one by the handlers"
        agreed += 1
        if agreed == POINTS:
            break
    return None


def graph_disagreement(graph: ModelGraph, inputs: Sequence[Tensor]) -> str | None:
    """What differs between a recorded forward pass and the handlers, in value or gradient; None if nothing does.

    Both draw the same random numbers, if the model draws any.
    """
    double = all(site.dtype == torch.float64 for site in graph.structure.sites.values())
    values = {name: value.detach().clone().requires_grad_() for name, value in graph.values_at_recording.items()}
    parameters = [parameter.detach().clone().requires_grad_() for parameter in graph.parameters]
    rows = dict(zip(graph.structure.plates, inputs, strict=False))
    args, kwargs = graph.arguments(inputs[len(rows) :])
    with torch.enable_grad(), quiet_handlers(), poutine.block():
        with kept_randomness():
            terms, _ = graph(values, inputs, parameters, wanted=lambda key: key[0] in ("prior", "likelihood"))
        with kept_randomness():
            trace = poutine.trace(poutine.condition(graph.model, {**values, **rows})).get_trace(*args, **kwargs)
        trace.compute_log_prob()
        sites = [site for site in trace.nodes.values() if site["type"] == "sample"]
        expected = torch.as_tensor(sum(site["log_prob_sum"] for site in sites))
        size = sum(torch.as_tensor(site["log_prob"]).detach().abs().sum() for site in sites)
        found = torch.as_tensor(sum(term.sum() for term in [*terms.prior.values(), *terms.likelihood.values()]))
        if not torch.isfinite(expected):
            return None
        if not abs(found - expected) <= ENERGY_TOLERANCE[double] * (1 + size):
            return f"its recorded log density is {found.item():.6g}, by the handlers {expected.item():.6g}"
        leaves = [*values.values(), *parameters]
        if not (found.requires_grad and expected.requires_grad):
            return None if found.requires_grad == expected.requires_grad else "only one of its forms has a gradient"
        grads = torch.autograd.grad(found, leaves, materialize_grads=True)
        wanted = torch.autograd.grad(expected, [*values.values(), *graph.parameters], materialize_grads=True)
    names = [f"site {name!r}" for name in values] + ["a parameter of the model"] * len(parameters)
    floor = GRAD_TOLERANCE[double] * (1 + max(float(grad.abs().max()) for grad in wanted if grad.numel()))
    for name, one, other in zip(names, grads, wanted, strict=True):
        if not (one - other).abs().max() <= floor + SITE_TOLERANCE[double] * other.abs().max():
            return f"its recorded gradient differs at {name} from the one by the handlers"
    return None


def _points(potential: Potential) -> Iterator[Tensor]:
    """Points to compare at, made one by one: a net may be large."""
    generator = torch.Generator().manual_seed(20)  # leaves the user's random numbers alone
    for _ in range(TRIED_POINTS):
        numbers = torch.randn(potential.dim, generator=generator, dtype=torch.float64).mul_(0.3).to(potential.dtype)
        yield numbers.to(potential.device)


def cause_of(error: RecordingError) -> str:
    """Why a model could not be recorded, in words, with the line of the model at which it happened."""
    message = next((words for part, words in _CAUSES.items() if part in str(error)), str(error))
    place = _line_of_model(error.__cause__)
    return f"{message} ({place})" if place else message


def _line_of_model(error: BaseException | None) -> str:
    """File and line of the innermost frame that belongs neither to a library nor to this package."""
    libraries = {"torch", "pyro", "bnn", *sys.stdlib_module_names} - {"__main__"}
    place = ""
    for frame, line in traceback.walk_tb(error.__traceback__ if error else None):
        if str(frame.f_globals.get("__name__")).split(".")[0] not in libraries:
            path = frame.f_code.co_filename
            place = f"{Path(path).name}, line {line}: {linecache.getline(path, line).strip()}"
    return place
