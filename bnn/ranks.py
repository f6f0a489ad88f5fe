"""Many processes, on PyTorch's own engine: what ``ranks=`` of the runner and of the ELBO stands on.

    torchrun --nproc-per-node=K script.py

starts K processes, the ranks, that all run the same script. ``MCMC(..., ranks="chains")`` shares the chains out;
``MCMC(..., ranks="data")`` and ``TraceNaturalGradient_ELBO(ranks="data")`` share the rows of every minibatch out. With
K ranks, each of B/K rows of a minibatch of B, the potential of rank r is

    U_r(z) = −(N K/B) Σ_{its rows} log p(y_i | x_i, z) − log p(z),         (1/K) Σ_r U_r = Û,   (1/K) Σ_r ∇U_r = ∇Û:

the mean over ranks is the minibatch potential of one process, so that one all-reduce a step makes all ranks move alike.
All ranks hold the same state and draw the same noise; a check says so every so often.

What it costs. A ring all-reduce of b bytes takes t = 2 (K−1) a + 2 (K−1)/K · b/w seconds, a the latency of a message, w
the bandwidth of a link. Bytes a step, in single precision: 4 (dim + 1) for each chain; for a guide 4 times the numbers
of its means, and where statistics are due those of its factors, Σ_layers (in² + out²), or as many as means for
diagonals. Sharing data pays while the gradient of B rows takes longer than t · K/(K−1): below that, share chains, which
talk once, at the end. A net that uses every weight once for each row takes 6 B dim/F seconds at F operations a second,
so that communication dominates below

    B ≈ 4 F/(3 w) rows, whatever K and dim,     and, by its latency,     B dim ≈ K a F/3;

convolutions, which use a weight many times, may have so many times fewer rows. With a store, sharing data sends one
more message of three numbers for each draw, and sharing chains none: each rank writes its own. Measured, with what
follows from it: tests/benchmarks/RESULTS.md.

The process group is the script's own, if it made one (its timeout says how long a rank waits for another); else it is
made here, gloo on CPUs and NCCL on CUDA devices. Choose the device by ``torch.cuda.set_device(int(os.environ[
"LOCAL_RANK"]))`` before the first tensor. A rank that dies ends the others with :class:`RankError`; ``torchrun
--max-restarts`` starts all of them again, and the script goes on bit for bit: ``MCMC(..., store=path, resume=True)``
from the one store that all ranks write, training by :func:`bnn.restore` from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyro
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class RankError(RuntimeError):
    """The ranks cannot go on together: one of them has ended, hangs, or holds another state."""


def _init_process_group() -> None:
    """As torch does by itself, but under keys of this attempt: a restart would find the addresses of the one before."""
    store, rank, size = next(rendezvous("env://"))
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(store=dist.PrefixStore(f"attempt {attempt}", store), rank=rank, world_size=size)


class Ranks:
    """The processes of this run, this one among them.

    :raises RuntimeError: if there is no process group, and the process was not started by torchrun.
    :ivar rank: the number of this process.
    :ivar size: K, how many there are.
    :ivar own_state: the generator of :meth:`own_randomness`, None before its first use.
    """

    def __init__(self) -> None:
        if not dist.is_available():
            raise RuntimeError("ranks= needs torch.distributed, which this build of PyTorch lacks.")
        if not dist.is_initialized():
            missing = [name for name in VARIABLES if name not in os.environ]
            if missing:
                raise RuntimeError(
                    f"ranks= is for several processes, but there is no process group and {', '.join(missing)} are not "
                    "set: start the script with torchrun --nproc-per-node=K script.py, call "
                    "torch.distributed.init_process_group first, or leave ranks= out."
                )
            _init_process_group()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._device = torch.device("cpu")
        if dist.get_backend() == "nccl":
            self._device = torch.device("cuda", torch.cuda.current_device())
        self.own_state: list[Tensor] | None = None

    def _call(self, what: str, operation: Callable[[], Any]) -> Any:
        try:
            return operation()
        except RuntimeError as error:
            words = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise RankError(
                f"rank {self.rank} of {self.size} could not {what}: {words}. Another rank has ended or hangs: look for "
                "its own error. Start the script again, or let torchrun --max-restarts do so, and go on from the last "
                "checkpoint."
            ) from error

    # ---- collectives

    def mean(self, tensors: Sequence[Tensor], what: str = "average gradients") -> list[Tensor]:
        """The mean over ranks of each tensor, in one message for each precision."""
        return [total / self.size for total in self.sum(tensors, what)]

    def sum(self, tensors: Sequence[Tensor], what: str = "add up gradients") -> list[Tensor]:
        """The sum over ranks of each tensor."""
        results: list[Tensor] = list(tensors)
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [k for k, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[k].detach().reshape(-1) for k in places])
            self._call(what, lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
            pieces = flat.split([tensors[k].numel() for k in places])
            for k, piece in zip(places, pieces, strict=True):
                results[k] = piece.reshape(tensors[k].shape)
        return results

    def broadcast(self, tensor: Tensor, source: int, what: str = "send a tensor") -> Tensor:
        """The tensor of rank ``source``, written into ``tensor``, which has the same shape on all."""
        self._call(what, lambda: dist.broadcast(tensor, source))
        return tensor

    def owners(self, costs: Sequence[float]) -> list[int]:
        """Which rank is to do each of some tasks, so that all are busy for about as long."""
        load, result = [0.0] * self.size, [0] * len(costs)
        for task in sorted(range(len(costs)), key=lambda k: -costs[k]):
            result[task] = load.index(min(load))
            load[result[task]] += costs[task]
        return result

    @torch.no_grad()
    def spread(self, tensors: Sequence[Tensor], owners: Sequence[int], what: str = "share inverses out") -> None:
        """Write each tensor of its owner into that of the other ranks."""
        for source in range(self.size):
            own = [tensor for tensor, owner in zip(tensors, owners, strict=True) if owner == source]
            if not own:
                continue
            flat = self.broadcast(torch.cat([tensor.detach().reshape(-1) for tensor in own]), source, what)
            if source != self.rank:
                for tensor, piece in zip(own, flat.split([tensor.numel() for tensor in own]), strict=True):
                    tensor.copy_(piece.reshape(tensor.shape))

    def gather(self, value: Any, what: str = "gather results") -> list[Any]:
        """A value of each rank, on every rank; for what is small, since it is pickled."""
        found: list[Any] = [None] * self.size
        self._call(what, lambda: dist.all_gather_object(found, value))
        return found

    def gather_tensors(self, tensors: Sequence[Tensor], what: str = "gather draws") -> list[list[Tensor]]:
        """Tensors of each rank, of shapes that may differ, on every rank."""
        shapes = self.gather([(tuple(t.shape), t.dtype) for t in tensors], what)
        results = []
        for source, own in enumerate(shapes):
            found = []
            for k, (shape, dtype) in enumerate(own):
                mine = source == self.rank
                device = tensors[k].device if k < len(tensors) else torch.device("cpu")
                buffer = tensors[k] if mine else torch.empty(shape, dtype=dtype, device=device)
                sent = buffer.contiguous().to(self._device)
                found.append(self.broadcast(sent, source, what).to(device))
            results.append(found)
        return results

    def largest(self, numbers: Sequence[int], what: str) -> list[int]:
        """The largest on any rank of each of some whole numbers."""
        found = torch.tensor(numbers, device=self._device)
        self._call(what, lambda: dist.all_reduce(found, dist.ReduceOp.MAX))
        return [int(number) for number in found.tolist()]

    # ---- random numbers

    def same_randomness(self) -> None:
        """Let all ranks draw what rank 0 draws from here on."""
        state = torch.get_rng_state().to(self._device)
        torch.set_rng_state(self.broadcast(state, 0, "share the random generator").cpu())
        if self._device.type == "cuda":
            own = torch.cuda.get_rng_state(self._device).to(self._device)
            torch.cuda.set_rng_state(self.broadcast(own, 0, "share the random generator").cpu(), self._device)

    def common_seed(self) -> int:
        """A number that rank 0 draws."""
        seed = torch.randint(2**62, (1,)).to(self._device)
        return int(self.broadcast(seed, 0, "share a seed"))

    @staticmethod
    def seed(*numbers: int) -> None:
        """Seed all generators by some numbers."""
        pyro.set_rng_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))

    @contextlib.contextmanager
    def own_randomness(self) -> Iterator[None]:
        """Random numbers of this rank's own: for labels, signs and dropout of its rows. Those shared are left alone."""
        shared = self._generators()
        if self.own_state is None:
            torch.manual_seed(
                int(np.random.SeedSequence((torch.initial_seed() % 2**63, self.rank)).generate_state(1)[0])
            )
        else:
            self._set_generators(self.own_state)
        try:
            yield
        finally:
            self.own_state = self._generators()
            self._set_generators(shared)

    def _generators(self) -> list[Tensor]:
        """States of the CPU's generator and of that of the rank's own device."""
        on_cuda = [torch.cuda.get_rng_state(self._device)] if self._device.type == "cuda" else []
        return [torch.get_rng_state(), *on_cuda]

    def _set_generators(self, states: Sequence[Tensor]) -> None:
        torch.set_rng_state(states[0])
        for state in states[1:]:
            torch.cuda.set_rng_state(state, self._device)

    # ---- checks

    def check_same(self, tensors: Sequence[Tensor], what: str) -> None:
        """:raises RankError: if the tensors differ between ranks in any bit."""
        sums = torch.stack([_checksum(tensor) for tensor in tensors]).to(self._device)
        sums = torch.cat([sums, -sums])  # the maximum of both says the minimum too
        self._call("compare its state", lambda: dist.all_reduce(sums, dist.ReduceOp.MAX))
        largest, smallest = sums[: len(tensors)], -sums[len(tensors) :]
        if not torch.equal(largest, smallest):
            raise RankError(
                f"{what} of the ranks differ, which must be the same on all: they got other data, other settings or "
                "another version of the script, or the model changes itself from run to run. Give every rank the same "
                "script, arguments and seeds."
            )


def _checksum(tensor: Tensor) -> Tensor:
    """A whole number that depends on every bit and on the order."""
    numbers = tensor.detach().contiguous().reshape(-1).view(torch.uint8).to(torch.int64)
    weights = torch.arange(1, len(numbers) + 1, device=numbers.device) * 2654435761 % 2147483647
    return (numbers * weights).sum() % 4611686018427387847
