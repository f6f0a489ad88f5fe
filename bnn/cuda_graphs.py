"""A recorded program as one CUDA graph: its kernels are launched once, together, and replayed at every call.

The graph reads its inputs and writes its outputs at fixed places: inputs are copied there, and outputs are copied away,
so that the next call overwrites nothing. Random numbers that a program draws come from the device's default generator,
whose state PyTorch advances at each replay; a kernel's noise is drawn outside, into an input. Written by PyTorch's
documentation of ``torch.cuda.CUDAGraph``; **it has not been run on a CUDA device yet**, so that ``compile="auto"`` does
not choose it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# Runs before the capture: libraries choose their algorithms and take their workspaces in the first ones.
WARMUP_RUNS = 3

Call = Callable[..., tuple[Tensor, ...]]


def captured(program: Call, inputs: Sequence[Tensor]) -> Call:
    """``program`` as a CUDA graph, for inputs of these shapes, precisions and strides.

    :param program: reads no values, and makes tensors of the same shapes at every call.
    :param inputs: example inputs, on one CUDA device.
    :raises ValueError: if they are elsewhere.
    :raises RuntimeError: if the program cannot be captured.
    """
    elsewhere = sorted({str(tensor.device) for tensor in inputs if tensor.device.type != "cuda"})
    if elsewhere:
        raise ValueError(
            f"compile='cuda_graph' needs a model and data on a CUDA device, and there are tensors on "
            f"{', '.join(elsewhere)}: move them there, or use 'auto', 'inductor' or 'fx'."
        )
    places = [tensor.detach().clone() for tensor in inputs]
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.no_grad(), torch.cuda.device(inputs[0].device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARMUP_RUNS):
                    program(*places)
            torch.cuda.current_stream().wait_stream(stream)
            with torch.cuda.graph(graph):
                outputs = tuple(program(*places))
    except RuntimeError as error:
        raise RuntimeError(
            f"the recorded program cannot be captured as a CUDA graph, because it reads values or waits for the "
            f"device: {error}. Use compile='inductor' or 'fx'."
        ) from error

    @torch.no_grad()
    def call(*given: Tensor) -> tuple[Tensor, ...]:
        for place, tensor in zip(places, given, strict=True):
            place.copy_(tensor)
        graph.replay()
        return tuple(output.clone() for output in outputs)

    return call
