"""The potential energy of a Pyro model, recorded once and replayed for many chains.

    U(z) = −(N/B) Σ_{i in batch} log p(y_i | x_i, z) − log p(z) − log |det ∂(constrained)/∂z|

on the sum scale, over the flat vector z of all unconstrained latent sites.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn import checks
from bnn.data_shares import Share
from bnn.devices import device_of_model, sent
from bnn.full_data import Chunks, mean_rows, minibatches_in_all, over_all_data, traced_chunk, traced_chunk_and_grad
from bnn.handlers_check import cause_of, disagreement, handlers_energy_and_grad
from bnn.initialization import Strategy, find_starts, strategy_of
from bnn.log_joint import LogJoint, quiet_handlers
from bnn.minibatch import Stream, TensorLeaves
from bnn.positions import Positions
from bnn.precision import check_device, check_precision, choose_in, rounding, running
from bnn.ranks import Ranks
from bnn.recording import RecordingError, draws_random_numbers, has_convolution, record, used_inputs
from bnn.structure import Plate, structure_of
from bnn.tiers import Program, check_tier, choose, one_chain, over_chains

# Above this size a chain's matrix products fill the processor by themselves: chains run one after another on a CPU.
LARGEST_VECTORIZED_DIM = 50_000


class Potential(Positions):
    """The potential energy U(z) of a Pyro model over flat positions of shape ``(chains, dim)``.

    The model is run once with Pyro's handlers to find its sites and plates. Its energy and gradient are then recorded
    as a program of tensor operations, checked against the handlers, and replayed. Rows of ``pyro.plate(...,
    subsample_size=B)`` are inputs of the program: each call and each chain sees a fresh minibatch. A model that
    cannot be recorded (Python control flow on a latent value, for instance) runs with Pyro's handlers, slower, after
    one warning that says why.

    :param model: a Pyro model.
    :param args: the model's arguments.
    :param batches: an iterable of argument tuples, such as a ``DataLoader``, instead of ``args``; the model then
        holds ``pyro.plate("data", N, subsample_size=len(x))``. They are sent to the device of the model.
    :param compile: ``"auto"``, ``"inductor"``, ``"fx"``, ``"cuda_graph"`` or ``"handlers"``; see :mod:`bnn.tiers`.
    :param replacement: draw minibatch rows independently instead of by shuffled epochs.
    :param precision: of the products inside gradients: ``"full"`` (the model's own), ``"bfloat16"`` or ``"tf32"``; see
        :mod:`bnn.precision`. Energies of all data keep the model's own.
    :param ranks: the processes that share the rows out, see :mod:`bnn.ranks`; all must ask for the same energies.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: for an unknown precision, a model without latent sites, data that are not finite or disagree
        with a plate.
    :raises NotImplementedError: for discrete latents and latents inside a subsampled plate.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y)
    >>> potential = Potential(model, torch.tensor([1., 3.]))
    >>> energy, grad = potential.energy_and_grad(torch.zeros(1, 1))
    >>> grad                                # z − Σ (y − z)
    tensor([[-4.]])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *args: Any,
        batches: Iterable[Any] | None = None,
        compile: str = "auto",
        replacement: bool = False,
        precision: str = "full",
        ranks: Ranks | None = None,
        **kwargs: Any,
    ) -> None:
        check_tier(compile)
        check_precision(precision)
        checks.is_model(model)
        self.model, self.batches, self.compile, self.replacement = model, batches, compile, replacement
        if batches is not None:
            args, kwargs = sent(checks.first_of(batches, args, kwargs), device_of_model(model))
        self.args, self.kwargs = pytree.tree_map_only(Tensor, torch.Tensor.detach, (tuple(args), dict(kwargs)))
        checks.finite_arguments(self.args, self.kwargs)
        self.share = None
        if ranks is not None:
            self.share = Share(ranks, model, self.args, self.kwargs, given=batches is not None)
            self.model = model = self.share.model
            self.args, self.kwargs = self.share.args, self.share.kwargs
        self.structure = structure_of(model, self.args, self.kwargs)
        self.log_joint = LogJoint(model, self.structure)
        check_device(precision, self.device)
        self.precision = precision
        self._leaves = TensorLeaves((self.args, self.kwargs))
        self._row_names = list(self.plates)
        if batches is not None and self.share is None:  # else a pass through them is a part of the rows
            checks.plates_match_batches(self.plates, batches, model, self.args, self.kwargs)
        self._fixed_rows = {p.name: torch.arange(p.batch_size, device=self.device) for p in self.plates.values()}
        self._batch_rows = checks.leading_size(self.args, self.kwargs) if batches is not None else 0
        self._mean_rows = None if batches is None or len(self.plates) != 1 else mean_rows(batches)
        self.chunks = Chunks(self.plates.values(), self.dtype, self.device)
        self._programs: dict[Any, Program] = {}
        self.decided: dict[str, str] = {}  # tiers of compile="auto"
        self._streams: dict[int, Stream] = {}
        self._vectorizes: bool | None = None
        self.is_random = False
        self._has_convolution = False
        self.is_recorded = compile != "handlers"
        if self.is_recorded:
            self._record_one_chain()
        if ranks is not None:
            ranks.same_randomness()

    # ---- what the model consists of

    @property
    def plates(self) -> dict[str, Plate]:
        """The plates that draw minibatches."""
        return self.structure.plates

    @property
    def minibatches_in_all(self) -> int:
        """Minibatch gradients that a pass over all data costs."""
        plates = list(self.plates.values())
        return minibatches_in_all(plates if self.share is None else self.share.whole_plates(plates))

    # ---- energies

    def energy_and_grad(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Energy ``(chains,)`` and gradient ``(chains, dim)``, each chain on a fresh minibatch of its own."""
        checks.position(position, self.dim)
        chains = len(position)
        if chains not in self._streams:
            self._streams[chains] = self.stream(chains)
        return self.evaluate(position, self._streams[chains].next(1)[0])

    def evaluate(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Energy and gradient on given minibatches of a :meth:`stream`, with the shares of other ranks."""
        return self._gradient([position.detach().to(self.dtype).contiguous(), *inputs], self.compile)

    def gradient_on(self, position: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        """The gradient ``(chains, dim)`` on given minibatches of a :meth:`stream`; not compiled, for a few calls."""
        return self._gradient([position.detach().to(self.dtype).contiguous(), *inputs], "fx")[1]

    def _gradient(self, tensors: list[Tensor], compile: str) -> tuple[Tensor, Tensor]:
        def function(position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self.traced_energy_and_grad(position, inputs)

        key = ("gradient", compile in ("inductor", "cuda_graph"), *(tuple(t.shape) for t in tensors))
        program = self.kept_program(key, function, tensors, [True] * len(tensors), compile=compile)
        if self.share is None:
            energy, grad = program(*tensors)
            return energy, grad
        with self.share.ranks.own_randomness() if self.is_random else contextlib.nullcontext():
            found = program(*tensors)
        energy, grad = self.share.mean(found)
        return energy, grad

    def gradient_by_chain(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Energy and gradient of one chain after another, for starts: too few calls to compile or vectorize for."""
        position = position.detach().to(self.dtype).contiguous()
        if 1 not in self._streams:
            self._streams[1] = self.stream(1)
        results = [self._gradient([z.unsqueeze(0), *self._streams[1].next(1)[0]], "fx") for z in position]
        energies, grads = map(torch.cat, zip(*results, strict=True))
        return energies, grads

    def full_energy(self, position: Tensor, calls: int = 0) -> Tensor:
        """Energy over all data, ``(chains,)``, minibatch by minibatch so that memory stays bounded.

        :param calls: how often it will be asked for, as far as is known: decides whether compiling pays.
        :raises NotImplementedError: with ``batches=`` unless one subsampled plate says what share of the data each has.
        """
        return over_all_data(self, position, traced_chunk, calls)[0]

    def full_energy_and_grad(self, position: Tensor, calls: int = 0) -> tuple[Tensor, Tensor]:
        """Energy ``(chains,)`` and gradient ``(chains, dim)`` over all data, minibatch by minibatch.

        :param calls: as of :meth:`full_energy`.
        :raises NotImplementedError: as :meth:`full_energy`.
        """
        energy, grad = over_all_data(self, position, traced_chunk_and_grad, calls)
        return energy, grad

    def stream(self, num_chains: int) -> Stream:
        """A fresh source of minibatches for ``num_chains`` chains."""
        if self.share is not None:
            drawn = [self.plates[name] for name in self._row_names]
            options: dict[str, Any] = {"replacement": self.replacement, "device": self.device}
            return self.share.stream(drawn, self.batches, num_chains, **options)
        plates = [(self.plates[name].size, self.plates[name].batch_size) for name in self._row_names]
        return Stream(plates, self.batches, num_chains, replacement=self.replacement, device=self.device)

    def traced_energy_and_grad(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Energy and gradient on given minibatches, written for recording; kernels call it inside their own step."""
        with rounding(self.precision):
            return self._traced_energy_and_grad(position, inputs)

    def _traced_energy_and_grad(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        if not self.is_recorded:
            return self._eager_energy_and_grad(position, inputs)
        if len(position) == 1:
            rows = [t[0] for t in inputs]
            grad, energy = torch.func.grad_and_value(lambda z: self._energy(z, rows))(position)
            return energy.reshape(1), grad

        def one(z: Tensor, *inputs: Tensor) -> Tensor:
            return self._energy(z, inputs)

        differentiate = torch.func.vmap(torch.func.grad_and_value(one), randomness="different")
        grad, energy = differentiate(position, *inputs)
        return energy, grad

    # ---- positions

    def initial(self, num_chains: int, strategy: str | Strategy | Mapping[str, Tensor] = "auto") -> Tensor:
        """Starting positions ``(num_chains, dim)`` with finite energy.

        :param strategy: ``"auto"`` (prior draws, weight arrays shrunk to one over the root of their fan),
            ``"prior"``, one of Pyro's ``init_to_*`` functions, or values per chain in the model's own space.
        :raises ValueError: if no start with finite energy and gradient is found in 100 tries.
        """
        if num_chains < 1:
            raise ValueError(f"num_chains is {num_chains}; give at least 1.")
        if isinstance(strategy, Mapping):
            position = self.unconstrain(strategy)
            if len(position) != num_chains:
                raise ValueError(
                    f"initial values are for {len(position)} chains, but there are {num_chains}: give each site a "
                    f"tensor whose first dimension is {num_chains}."
                )
            return self.check_start(position)
        return find_starts(self, num_chains, strategy_of(strategy))

    def check_start(self, position: Tensor) -> Tensor:
        """``position`` if every chain's energy and gradient are finite there.

        :raises ValueError: naming the chains and sites that are not.
        """
        checks.position(position, self.dim)
        if not torch.isfinite(position).all():
            raise ValueError(
                f"initial values are NaN or infinite at site {self.site_at(position)!r}, or lie on the edge of its "
                "support: give finite values inside it."
            )
        checks.finite_start(*self.gradient_by_chain(position))
        return position

    def site_at(self, values: Tensor) -> str | None:
        """Name of the first site at which ``values`` ``(chains, dim)`` hold NaN or infinity."""
        for name, site in self.sites.items():
            if not torch.isfinite(values[..., site.slice]).all():
                return name
        return None

    # ---- recording

    def program(
        self,
        function: Callable[..., tuple[Tensor, ...]],
        inputs: Sequence[Tensor],
        per_chain: Sequence[bool],
        calls: int = 0,
        *,
        compile: str | None = None,
        precision: str | None = None,
    ) -> Program:
        """``function`` recorded for chains at once where that pays, else for one chain and looped over them.

        :param function: maps tensors to tensors that lead with the chain dimension.
        :param inputs: example inputs.
        :param per_chain: which inputs lead with the chain dimension.
        :param calls: how often it will run, as far as is known: decides whether compiling pays.
        :param compile: the tier, if not the potential's own.
        :param precision: of products, if not the potential's own.
        """
        precision = precision or self.precision
        if not self.is_recorded:
            return Program(running(function, precision), "handlers")
        compile = compile or self.compile
        chains = next(len(t) for t, flag in zip(inputs, per_chain, strict=True) if flag)
        if chains == 1 or self.vectorizes():
            try:
                return choose_in(precision, record(function, inputs), inputs, compile, calls, self.decided)
            except RecordingError:
                if chains == 1:
                    raise
                self._vectorizes = False

        one = one_chain(inputs, per_chain)
        program = choose_in(precision, record(function, one), one, compile, calls * chains, self.decided)
        return over_chains(program, per_chain)

    def kept_program(self, key: Any, *recording: Any, **options: Any) -> Program:
        """The :meth:`program` kept under ``key``, recorded the first time."""
        if key not in self._programs:
            self._programs[key] = self.program(*recording, **options)
        return self._programs[key]

    def vectorizes(self) -> bool:
        """Whether chains run in one program, rather than one after another."""
        if self._vectorizes is None:
            slow = self.device.type == "cpu" and (self._has_convolution or self.dim > LARGEST_VECTORIZED_DIM)
            self._vectorizes = self.is_recorded and not slow
        return self._vectorizes

    def _record_one_chain(self) -> None:
        """Record one chain, drop inputs that do not matter, and compare with Pyro's handlers, all in full precision."""
        position = torch.zeros(1, self.dim, dtype=self.dtype, device=self.device)

        def function(position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self._traced_energy_and_grad(position, inputs)

        try:
            (inputs,) = self.stream(1).next(1)
            self.log_joint.merge_fixed_normals(position, lambda given: self.arguments([t[0] for t in given]), inputs)
            graph = record(function, [position, *inputs])
            checks.rows_index_whole_data(graph, self._row_names, self.plates)
            used = used_inputs(graph)[1:]
            names = [name for name, flag in zip(self._row_names, used, strict=False) if flag]
            if names != self._row_names:
                self._row_names = names
                (inputs,) = self.stream(1).next(1)
                graph = record(function, [position, *inputs])
            self.is_random = draws_random_numbers(graph)
            self._has_convolution = has_convolution(graph)
            program = choose(graph, [position, *inputs], "fx")
            if self.precision == "full":
                self._programs["gradient", False, *(tuple(t.shape) for t in (position, *inputs))] = program
            cause = disagreement(self, program)
        except RecordingError as error:
            cause = cause_of(error)
        if cause:
            self.is_recorded, self._row_names = False, list(self.plates)
            self.log_joint.merged = frozenset()
            self._programs.clear()
            warnings.warn(
                f"the model cannot be recorded and runs with Pyro's handlers, several times slower: {cause}.",
                RuntimeWarning,
                stacklevel=3,
            )

    # ---- one chain

    def arguments(self, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], tuple[Any, ...], Mapping[str, Any]]:
        """Rows by plate, positional and keyword arguments of the model out of one chain's minibatch inputs."""
        count = len(self._row_names)
        rows = {**self._fixed_rows, **dict(zip(self._row_names, inputs[:count], strict=True))}
        if self.batches is None:
            return rows, self.args, self.kwargs
        args, kwargs = self._leaves.arguments(inputs[count:])
        size = checks.leading_size(args, kwargs)
        if size != self._batch_rows:  # a last, smaller batch: its plate draws that many rows
            for name, index in rows.items():
                if len(index) == self._batch_rows:
                    rows[name] = torch.arange(size, device=self.device)
        return rows, args, kwargs

    def arguments_of_chunk(self, inputs: Sequence[Tensor]) -> tuple[Any, tuple[Any, ...], Mapping[str, Any]]:
        """The same out of a chunk's inputs, which hold the rows of all plates or the tensors of a batch."""
        if self.batches is None:
            return dict(zip(self.plates, inputs, strict=True)), self.args, self.kwargs
        return self.arguments([*(self._fixed_rows[name] for name in self._row_names), *inputs])

    def _batch_weight(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """Rows over mean rows: one for even batches; over a pass through uneven ones the mean is the full gradient."""
        return 1.0 if self._mean_rows is None else checks.leading_size(args, kwargs) / self._mean_rows

    def _energy(self, position: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        rows, args, kwargs = self.arguments(inputs)
        weight = self._batch_weight(args, kwargs)
        return -self.log_joint(position, rows, args, kwargs, batch_weight=weight)

    def _eager_energy_and_grad(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        energies, grads = [], []
        for chain, z in enumerate(position):
            with torch.enable_grad(), quiet_handlers():
                z = z.detach().requires_grad_()
                energy = self._energy(z, [t[chain] for t in inputs])
                (grad,) = torch.autograd.grad(energy, z)
            energies.append(energy.detach())
            grads.append(grad)
        return torch.stack(energies), torch.stack(grads)

    def handlers_energy_and_grad(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """One chain's energy and gradient by Pyro's own handlers, and the sum of the sizes of the energy's terms."""
        rows, args, kwargs = self.arguments(inputs)
        weight = self._batch_weight(args, kwargs)
        return handlers_energy_and_grad(self.log_joint, position, rows, args, kwargs, batch_weight=weight)
