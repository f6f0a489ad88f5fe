"""Record a function of tensors as a straight-line program, and run it fast.

``record`` traces a Python function once with ``make_fx`` into a graph of aten operations and tidies the graph.
The graph then runs in one of two tiers:

* ``fx``: the graph after a peephole pass, as generated Python that calls PyTorch's own bindings. Needs no compiler.
* ``inductor``: the graph compiled by TorchInductor into C++ (CPU) or Triton (CUDA).

Every private name of PyTorch that this project needs stands in this file, in :mod:`bnn.one_kernel` and in
:mod:`bnn.onednn`.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx

from bnn.graph_constants import Lifted, fold_constants, lift_constants, send_numbers
from bnn.in_place import reuse_memory
from bnn.loop_rewrites import expand_small_products, expand_tanh, turn_narrow_products
from bnn.one_kernel import one_kernel, written_modules
from bnn.onednn import use_onednn
from bnn.out_of_place import out_of_place
from bnn.peephole import hoist_views, is_random, peephole, replace
from bnn.randomness import kept_randomness

aten = torch.ops.aten

# Overloads that only rename a tensor once the graph is out of autograd's hands.
_ALIASES = {aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}

# Python bindings parse their arguments in C and cost a third of an OpOverload's call.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: torch.mm,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.add.Tensor: torch.add,
    aten.sub.Tensor: torch.sub,
    aten.mul.Tensor: torch.mul,
    aten.div.Tensor: torch.div,
    aten.addcmul.default: torch.addcmul,
    aten.neg.default: torch.neg,
    aten.relu.default: torch.relu,
    aten.tanh.default: torch.tanh,
    aten.sigmoid.default: torch.sigmoid,
    aten.t.default: torch.t,
    aten.transpose.int: torch.transpose,
    aten.log.default: torch.log,
    aten.exp.default: torch.exp,
    aten.sqrt.default: torch.sqrt,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.sum.default: torch.sum,
    aten.sum.dim_IntList: torch.sum,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.squeeze.dim: torch.squeeze,
    aten.gather.default: torch.gather,
    aten.logsumexp.default: torch.logsumexp,
    aten.view.default: torch.Tensor.view,
    aten._unsafe_view.default: torch.Tensor.view,
    aten.reshape.default: torch.reshape,
    aten.expand.default: torch.Tensor.expand,
    aten.cat.default: torch.cat,
    aten.select.int: torch.select,
    aten.stack.default: torch.stack,
    aten.permute.default: torch.permute,
    aten.linalg_vector_norm.default: torch.linalg.vector_norm,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.convolution.default: torch.convolution,
    aten.where.self: torch.where,
    aten.lt.Tensor: torch.lt,
    aten.ge.Tensor: torch.ge,
    aten.clamp_max.default: torch.clamp_max,
    aten.nan_to_num.default: torch.nan_to_num,
    aten.mv.default: torch.mv,
    aten.index_select.default: torch.index_select,
}


def untraced() -> contextlib.AbstractContextManager[None]:
    """Inside a recording, compute here and now: for tensors that do not depend on its inputs and steer Python."""
    context: Any = disable_proxy_modes_tracing()
    return context


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the numbers of a tensor can be read: not those of one that stands for many, or for none."""
    is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    return not (is_wrapped or tensor.is_meta or isinstance(tensor, torch._subclasses.FakeTensor))


class RecordingError(RuntimeError):
    """The function cannot be recorded: its control flow or side effects depend on the values of its inputs."""


@contextlib.contextmanager
def unvalidated_distributions() -> Iterator[None]:
    """Switch off value checks of distributions, those built earlier with checks on included.

    ``pyro.validation_enabled(False)`` does not reach a distribution that was expanded while checks were on: the
    flag is stored on the instance, and the check reads a tensor's truth value, which cannot be recorded.
    """
    cls = torch.distributions.Distribution
    original = cls._validate_sample
    validate_args = cls._validate_args
    cls._validate_sample = lambda self, value: None  # type: ignore[method-assign]
    torch.distributions.Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        cls._validate_sample = original  # type: ignore[method-assign]
        torch.distributions.Distribution.set_default_validate_args(validate_args)


def record(function: Callable[..., tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor]) -> GraphModule:
    """Trace ``function(*inputs)`` into a graph of aten operations with its constants folded.

    :param function: maps tensors to a tuple of tensors; may use ``torch.func`` transforms.
    :param inputs: example inputs; their shapes, dtypes and devices become part of the recording.
    :raises RecordingError: if the function reads values (``.item()``, ``if tensor``) or writes to tensors that
        outlive the call.
    """
    inputs = _apart(inputs)
    try:
        with unvalidated_distributions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph_module = _traced(function, inputs)
            _drop_aliases(graph_module)
            out_of_place(graph_module)
            if _mutates(graph_module):
                graph_module = _traced(torch.func.functionalize(function), inputs)
    except Exception as error:
        message = str(error).strip().splitlines()
        raise RecordingError(f"{type(error).__name__}: {message[0] if message else 'no message'}") from error
    if _mutates(graph_module):
        raise RecordingError("the model would mutate a captured tensor, such as batch norm's running mean")
    _drop_aliases(graph_module)
    fold_constants(graph_module)
    send_numbers(graph_module, inputs[0].device)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def record_forward(
    function: Callable[..., tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor]
) -> tuple[GraphModule, list[torch.Tensor]]:
    """Trace a function that is to be differentiated later: ``detach`` stays where the function has it.

    :returns: the graph, and the leaf tensors that require gradients and that the function uses besides its inputs;
        they have become further inputs of the graph.
    :raises RecordingError: as :func:`record` does.
    """
    inputs = _apart(inputs)
    try:
        with unvalidated_distributions(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # mkldnn's recurrent layers in float32 are one operation; without it they are matrix products.
            with torch.backends.mkldnn.flags(enabled=False):
                graph_module = _traced(function, inputs)
                out_of_place(graph_module)
                if _mutates(graph_module):
                    graph_module = _traced(torch.func.functionalize(function), inputs)
    except Exception as error:
        message = str(error).strip().splitlines()
        raise RecordingError(f"{type(error).__name__}: {message[0] if message else 'no message'}") from error
    if _mutates(graph_module):
        raise RecordingError("the model would mutate a captured tensor, such as batch norm's running mean")
    parameters = _parameters_as_inputs(graph_module)
    fold_constants(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module, parameters


def _traced(function: Callable[..., tuple[torch.Tensor, ...]], inputs: Sequence[torch.Tensor]) -> GraphModule:
    """``make_fx``, with one mode for the shapes of all nodes: by itself each node makes one, a third of the time."""
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
        return make_fx(function)(*inputs)


def _apart(inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """``inputs``, none of them twice: one tensor in two places would be recorded as one input."""
    seen: set[int] = set()
    result = []
    for tensor in inputs:
        result.append(tensor.detach() if id(tensor) in seen else tensor)
        seen.add(id(tensor))
    return result


def _parameters_as_inputs(graph_module: GraphModule) -> list[torch.Tensor]:
    found: dict[int, tuple[torch.Tensor, Node]] = {}
    last = [node for node in graph_module.graph.nodes if node.op == "placeholder"][-1]
    for node in list(graph_module.graph.nodes):
        if node.op != "get_attr":
            continue
        value = getattr(graph_module, node.target)
        if not (isinstance(value, torch.Tensor) and value.requires_grad and value.is_leaf):
            continue
        if id(value) not in found:
            with graph_module.graph.inserting_after(last):
                last = graph_module.graph.placeholder(f"parameter_{len(found)}")
            last.meta["val"] = value.detach()
            found[id(value)] = value, last
        replace(graph_module, node, found[id(value)][1])
    return [value for value, _ in found.values()]


def used_inputs(graph_module: GraphModule) -> list[bool]:
    """Whether each input of the graph influences its outputs."""
    return [bool(node.users) for node in graph_module.graph.nodes if node.op == "placeholder"]


def outputs_depend_on_inputs(graph_module: GraphModule) -> list[bool]:
    """Whether each output of the graph depends on any input, or on random numbers drawn in the graph."""
    dependent: set[Node] = set()
    for node in graph_module.graph.nodes:
        if node.op == "placeholder" or is_random(node) or any(i in dependent for i in node.all_input_nodes):
            dependent.add(node)
        if node.op == "output":
            return [output in dependent for output in node.args[0]]
    return []


def draws_random_numbers(graph_module: GraphModule) -> bool:
    """Whether the program draws random numbers itself (dropout, augmentation noise in a model)."""
    return any(is_random(node) for node in graph_module.graph.nodes)


def has_convolution(graph_module: GraphModule) -> bool:
    """Whether the program contains a convolution."""
    return any("convolution" in str(node.target) for node in graph_module.graph.nodes)


def run_fx(graph_module: GraphModule) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The program as generated Python, after the peephole pass."""
    graph_module = _copy(graph_module)
    turn_narrow_products(graph_module)
    peephole(graph_module)
    hoisted = hoist_views(graph_module)
    reuse_memory(graph_module)
    use_onednn(graph_module, compiled=False)
    _use_bindings(graph_module)
    lifted = lift_constants(graph_module)
    # As defaults of the generated function, constants cost nothing per call.
    type(graph_module).forward.__defaults__ = tuple(lifted.constants)
    forward = graph_module.forward
    if not hoisted:
        return _without_grad(forward)

    def call(*inputs: torch.Tensor) -> Any:
        for number, buffer in hoisted:
            buffer.copy_(inputs[number])
        return forward(*inputs)

    return _without_grad(call)


def run_inductor(graph_module: GraphModule, inputs: Sequence[torch.Tensor]) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The program compiled by TorchInductor.

    :raises RuntimeError: if inductor cannot compile it, for instance without a C++ compiler.
    """
    from torch._inductor import compile as compile_graph

    graph_module = _copy(graph_module)
    if inputs[0].device.type == "cpu":
        turn_narrow_products(graph_module)
        expand_small_products(graph_module)
        expand_tanh(graph_module)
        use_onednn(graph_module, compiled=True)
    lifted = lift_constants(graph_module)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            every: list[Any] = [*(tensor.contiguous() for tensor in _apart(inputs)), *lifted.constants]
            with written_modules() as modules:
                compiled = compile_graph(lifted.graph_module, every, {"size_asserts": False})
            with kept_randomness():
                results = compiled(*every)
                direct = one_kernel(modules, every, results) if inputs[0].device.type == "cpu" else None
            program = _contiguous(Lifted(direct or compiled, lifted.constants, lifted.graph_module))
    except Exception as error:
        raise RuntimeError(f"inductor could not compile the recorded program: {error}") from error
    return _without_grad(program)


def _contiguous(program: Callable[..., Any]) -> Callable[..., Any]:
    """A compiled program for inputs of any strides: those of its example are written into it."""
    is_contiguous = torch.Tensor.is_contiguous

    def call(*inputs: torch.Tensor) -> Any:
        if all(map(is_contiguous, inputs)):
            return program(*inputs)
        return program(*[tensor.contiguous() for tensor in inputs])

    return call


def _copy(graph_module: GraphModule) -> GraphModule:
    """A graph to rewrite, on the same constants: the data set is one of them."""
    return GraphModule(graph_module, copy.deepcopy(graph_module.graph))


def _without_grad(program: Callable[..., Any]) -> Callable[..., Any]:
    no_grad, is_grad_enabled = torch.no_grad, torch.is_grad_enabled

    def call(*inputs: torch.Tensor) -> Any:
        if not is_grad_enabled():  # a runner's loop switches it off once: the context costs as much as an operation
            return program(*inputs)
        with no_grad():
            return program(*inputs)

    return call


def _mutates(graph_module: GraphModule) -> bool:
    return any(
        node.op == "call_function"
        and isinstance(node.target, torch._ops.OpOverload)
        and node.target._schema.is_mutable
        and not is_random(node)
        for node in graph_module.graph.nodes
    )


def _drop_aliases(graph_module: GraphModule) -> None:
    for node in list(graph_module.graph.nodes):
        if node.op == "call_function" and node.target in _ALIASES:
            replace(graph_module, node, node.args[0])
    graph_module.graph.eliminate_dead_code()


def _use_bindings(graph_module: GraphModule) -> None:
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in _BINDINGS:
            node.target = _BINDINGS[node.target]
    graph_module.recompile()
