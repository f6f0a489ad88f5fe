"""The potential energy of a Pyro model, recorded once and replayed for many chains.

    U(z) = −(N/B) Σ_{i in batch} log p(y_i | x_i, z) − log p(z) − log |det ∂(constrained)/∂z|

on the sum scale, over the flat vector z of all unconstrained latent sites.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn import checks
from bnn.initialization import Strategy, strategy_of
from bnn.log_joint import LogJoint, Plate, Site, quiet_handlers, structure_of
from bnn.minibatch import ArgumentStream, RowStream, TensorLeaves, arguments_of
from bnn.recording import RecordingError, draws_random_numbers, has_convolution, record, used_inputs
from bnn.tiers import Program, check_tier, choose

# Above this size a chain's matrix products fill the processor by themselves: chains run one after another on a CPU.
LARGEST_VECTORIZED_DIM = 50_000


class Potential:
    """The potential energy U(z) of a Pyro model over flat positions of shape ``(chains, dim)``.

    The model is run once with Pyro's handlers to find its sites and plates. Its energy and gradient are then recorded
    as a program of tensor operations, checked against the handlers, and replayed. Rows of ``pyro.plate(...,
    subsample_size=B)`` are inputs of the program: each call and each chain sees a fresh minibatch. A model that
    cannot be recorded (Python control flow on a latent value, for instance) runs with Pyro's handlers, slower, after
    one warning that says why.

    :param model: a Pyro model.
    :param args: the model's arguments.
    :param batches: an iterable of argument tuples, such as a ``DataLoader``, instead of ``args``; the model then
        holds ``pyro.plate("data", N, subsample_size=len(x))``.
    :param compile: ``"auto"``, ``"inductor"``, ``"fx"`` or ``"handlers"``; see :mod:`bnn.tiers`.
    :param replacement: draw minibatch rows independently instead of by shuffled epochs.
    :param kwargs: the model's keyword arguments.
    :raises ValueError: for a model without latent sites, data that are not finite or disagree with a plate.
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
        **kwargs: Any,
    ) -> None:
        check_tier(compile)
        self.model, self.batches, self.compile, self.replacement = model, batches, compile, replacement
        if batches is not None:
            args, kwargs = checks.first_of(batches, args, kwargs)
        self.args, self.kwargs = pytree.tree_map_only(Tensor, torch.Tensor.detach, (tuple(args), dict(kwargs)))
        checks.finite_arguments(self.args, self.kwargs)
        self.structure = structure_of(model, self.args, self.kwargs)
        self.log_joint = LogJoint(model, self.structure)
        self._leaves = TensorLeaves((self.args, self.kwargs))
        self._row_names = list(self.plates)
        if batches is not None:
            checks.plates_match_batches(self.plates, batches, model, self.args, self.kwargs)
        self._fixed_rows = {p.name: torch.arange(p.batch_size, device=self.device) for p in self.plates.values()}
        self._batch_rows = checks.leading_size(self.args, self.kwargs) if batches is not None else 0
        self._programs: dict[Any, Program] = {}
        self._streams: dict[int, Stream] = {}
        self._vectorizes: bool | None = None
        self.is_random = False
        self._has_convolution = False
        self.is_recorded = False
        if compile != "handlers":
            self._record_one_chain()

    # ---- what the model consists of

    @property
    def sites(self) -> dict[str, Site]:
        """The latent sites: name -> :class:`Site` with shape, transform and slice of the flat vector."""
        return self.structure.sites

    @property
    def plates(self) -> dict[str, Plate]:
        """The plates that draw minibatches."""
        return self.structure.plates

    @property
    def dim(self) -> int:
        """Length of the flat vector."""
        return self.structure.dim

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the flat vector."""
        return self.structure.dtype

    @property
    def device(self) -> torch.device:
        """Where the flat vector lives."""
        return self.structure.device

    # ---- energies

    def energy_and_grad(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """Energy ``(chains,)`` and gradient ``(chains, dim)``, each chain on a fresh minibatch of its own."""
        checks.position(position, self.dim)
        chains = len(position)
        if chains not in self._streams:
            self._streams[chains] = self.stream(chains)
        (inputs,) = self._streams[chains].next(1)
        tensors = [position.detach().to(self.dtype).contiguous(), *inputs]
        key = ("gradient", *(tuple(t.shape) for t in tensors))
        if key not in self._programs:

            def function(position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
                return self.traced_energy_and_grad(position, inputs)

            self._programs[key] = self.program(function, tensors, [True] * len(tensors))
        energy, grad = self._programs[key](*tensors)
        return energy, grad

    def full_energy(self, position: Tensor) -> Tensor:
        """Energy over all data, ``(chains,)``, minibatch by minibatch so that memory stays bounded.

        :raises NotImplementedError: with ``batches=`` if the model has no subsampled plate, so that one batch's
            share of the data is not known.
        """
        checks.position(position, self.dim)
        if self.batches is not None and not self.plates and not self._is_single_batch():
            raise NotImplementedError(
                "full_energy needs pyro.plate('data', N, subsample_size=len(x)) around the observed sites to know what "
                "share of the data a batch holds; poutine.scale alone does not say it."
            )
        position = position.detach().to(self.dtype).contiguous()
        total = torch.zeros(len(position), dtype=self.dtype, device=self.device)
        for inputs in self._chunks():
            tensors = [position, *inputs]
            key = ("full", *(tuple(t.shape) for t in tensors))
            if key not in self._programs:
                shared = [False] * len(inputs)
                self._programs[key] = self.program(self._traced_chunk, tensors, [True, *shared])
            total = total + self._programs[key](*tensors)[0]
        return total

    def stream(self, num_chains: int) -> Stream:
        """A fresh source of minibatches for ``num_chains`` chains."""
        return Stream(self, num_chains)

    def traced_energy_and_grad(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Energy and gradient on given minibatches, written for recording; kernels call it inside their own step."""
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

    def constrain(self, position: Tensor) -> dict[str, Tensor]:
        """Values of each site in the model, with the leading dimensions of ``position``."""
        return {name: site.constrain(site.unflatten(position)) for name, site in self.sites.items()}

    def unflatten(self, position: Tensor) -> dict[str, Tensor]:
        """Unconstrained values of each site, with the leading dimensions of ``position``."""
        return {name: site.unflatten(position) for name, site in self.sites.items()}

    def flatten(self, params: Mapping[str, Tensor]) -> Tensor:
        """The flat positions ``(chains, dim)`` of unconstrained values with a leading chain dimension."""
        checks.site_values(params, {name: site.shape for name, site in self.sites.items()})
        pieces = [params[name].reshape(len(params[name]), -1).to(self.dtype) for name in self.sites]
        return torch.cat(pieces, -1).to(self.device).contiguous()

    def unconstrain(self, values: Mapping[str, Tensor]) -> Tensor:
        """The flat positions ``(chains, dim)`` of values in the model's own space with a leading chain dimension.

        :raises ValueError: if a site is missing, has another shape, or lies outside its support.
        """
        checks.site_values(values, {name: site.value_shape for name, site in self.sites.items()})
        params = {}
        for name, site in self.sites.items():
            checks.inside_support(name, values[name], site.support)
            params[name] = values[name] if site.transform is None else site.transform.inv(values[name])
        return self.flatten(params)

    def initial(self, num_chains: int, strategy: str | Strategy | Mapping[str, Tensor] = "auto") -> Tensor:
        """Starting positions ``(num_chains, dim)`` with finite energy.

        :param strategy: ``"auto"`` (prior draws, weight arrays shrunk to one over the root of their fan),
            ``"prior"``, one of Pyro's ``init_to_*`` functions, or values per chain in the model's own space.
        :raises ValueError: if no start with finite energy and gradient is found in 100 tries.
        """
        if isinstance(strategy, Mapping):
            position = self.unconstrain(strategy)
            if len(position) != num_chains:
                raise ValueError(f"initial values are for {len(position)} chains, but there are {num_chains}.")
            return self.check_start(position)
        init = strategy_of(strategy)
        starts: list[Tensor] = []
        for _ in range(100 * num_chains):
            with torch.no_grad(), quiet_handlers(), poutine.block():
                trace = poutine.trace(InitMessenger(init)(self.model)).get_trace(*self.args, **self.kwargs)
            values = {name: trace.nodes[name]["value"].detach().unsqueeze(0) for name in self.sites}
            params = {n: v if self.sites[n].transform is None else self.sites[n].transform.inv(v) for n, v in values.items()}  # fmt: skip
            position = self.flatten(params)
            energy, grad = self.energy_and_grad(position)
            if torch.isfinite(energy).all() and torch.isfinite(grad).all():
                starts.append(position)
            if len(starts) == num_chains:
                return torch.cat(starts)
        raise ValueError(
            f"found {len(starts)} of {num_chains} starts with finite energy and gradient in {100 * num_chains} tries: "
            "check the data's scale and the likelihood, or give starting values (initial_params=, or "
            "init_strategy=init_to_value(...))."
        )

    def check_start(self, position: Tensor) -> Tensor:
        """``position`` if every chain's energy and gradient are finite there.

        :raises ValueError: naming the chains and sites that are not.
        """
        if not torch.isfinite(position).all():
            raise ValueError(f"initial values are NaN or infinite at site {self.site_at(position)!r}.")
        energy, grad = self.energy_and_grad(position)
        bad = ~(torch.isfinite(energy) & torch.isfinite(grad).all(-1))
        if bad.any():
            raise ValueError(
                f"the energy or its gradient is not finite at the initial values of chains {bad.nonzero().flatten().tolist()}"
                f" (energy {energy[bad].tolist()}): start inside the support, at a point where the data are possible."
            )
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
    ) -> Program:
        """``function`` recorded for chains at once where that pays, else for one chain and looped over them.

        :param function: maps tensors to tensors that lead with the chain dimension.
        :param inputs: example inputs.
        :param per_chain: which inputs lead with the chain dimension.
        :param calls: how often it will run, as far as is known: decides whether compiling pays.
        """
        if not self.is_recorded:
            return function
        chains = next(len(t) for t, flag in zip(inputs, per_chain, strict=True) if flag)
        if chains == 1 or self.vectorizes():
            try:
                return choose(record(function, inputs), inputs, self.compile, calls)[0]
            except RecordingError:
                if chains == 1:
                    raise
                self._vectorizes = False

        def chain_of(tensors: Sequence[Tensor], chain: int) -> list[Tensor]:
            return [t[chain : chain + 1] if f else t for t, f in zip(tensors, per_chain, strict=True)]

        one = chain_of(inputs, 0)
        single = choose(record(function, one), one, self.compile, calls * chains)[0]

        def loop(*tensors: Tensor) -> tuple[Tensor, ...]:
            outputs = [single(*chain_of(tensors, chain)) for chain in range(chains)]
            return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))

        return loop

    def vectorizes(self) -> bool:
        """Whether chains run in one program, rather than one after another."""
        if self._vectorizes is None:
            slow = self.device.type == "cpu" and (self._has_convolution or self.dim > LARGEST_VECTORIZED_DIM)
            self._vectorizes = self.is_recorded and not slow
        return self._vectorizes

    def _record_one_chain(self) -> None:
        """Record one chain, drop inputs that do not matter, and compare with Pyro's handlers."""
        self.is_recorded = True
        position = torch.zeros(1, self.dim, dtype=self.dtype, device=self.device)
        (inputs,) = self.stream(1).next(1)

        def function(position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
            return self.traced_energy_and_grad(position, inputs)

        try:
            graph = record(function, [position, *inputs])
            checks.rows_index_whole_data(graph, self._row_names, self.plates)
            used = used_inputs(graph)[1:]
            self._row_names = [name for name, u in zip(self._row_names, used, strict=False) if u]
            self.is_random = draws_random_numbers(graph)
            self._has_convolution = has_convolution(graph)
            cause = self._disagreement()
        except RecordingError as error:
            cause = str(error)
        self._programs.clear()
        self._streams.clear()
        if cause:
            self.is_recorded, self._row_names = False, list(self.plates)
            warnings.warn(
                f"the model cannot be recorded and runs with Pyro's handlers, several times slower: {cause}. "
                "Write choices that depend on latent values with torch.where, and avoid .item() inside the model.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _disagreement(self) -> str | None:
        """What differs between the recording and Pyro's handlers at two fresh points; None if nothing does."""
        tolerance = 1e-8 if self.dtype == torch.float64 else 2e-3
        position = self.initial(2, "prior") if not self.sites else self._probes()
        for z in position:
            (inputs,) = self.stream(1).next(1)
            state = torch.get_rng_state()
            energy, grad = self.program(
                lambda position, *inputs: self.traced_energy_and_grad(position, inputs),
                [z[None], *inputs],
                [True] * (1 + len(inputs)),
            )(z[None], *inputs)
            torch.set_rng_state(state)
            expected, expected_grad = self._handlers_energy_and_grad(z, [t[0] for t in inputs])
            if not torch.isfinite(expected) or not torch.isfinite(expected_grad).all():
                continue
            scale = 1 + expected.abs()
            grad_scale = 1 + expected_grad.abs().max()
            if (energy[0] - expected).abs() > tolerance * scale:
                return f"its recorded energy is {energy[0].item():.6g}, by the handlers {expected.item():.6g}"
            if (grad[0] - expected_grad).abs().max() > tolerance * grad_scale:
                return "its recorded gradient differs from the one by the handlers"
        return None

    def _probes(self) -> Tensor:
        generator = torch.Generator().manual_seed(20)  # leaves the user's random numbers alone
        noise = torch.randn(2, self.dim, generator=generator, dtype=torch.float64)
        return (0.3 * noise).to(self.dtype).to(self.device)

    # ---- one chain

    def _arguments(self, inputs: Sequence[Tensor]) -> tuple[dict[str, Tensor], tuple[Any, ...], Mapping[str, Any]]:
        count = len(self._row_names)
        rows = {**self._fixed_rows, **dict(zip(self._row_names, inputs[:count], strict=True))}
        if self.batches is None:
            return rows, self.args, self.kwargs
        args, kwargs = self._leaves.arguments(inputs[count:])
        size = checks.leading_size(args, kwargs)
        if size != self._batch_rows:  # a last, smaller batch: its plate draws that many rows
            rows = {n: torch.arange(size, device=self.device) if len(r) == self._batch_rows else r for n, r in rows.items()}  # fmt: skip
        return rows, args, kwargs

    def _batch_weight(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> float:
        """len(batches)·b/N: one for even batches, and over a pass through uneven ones the sum is the full gradient."""
        if self.batches is None or len(self.plates) != 1 or not hasattr(self.batches, "__len__"):
            return 1.0
        (plate,) = self.plates.values()
        return len(self.batches) * checks.leading_size(args, kwargs) / plate.size

    def _energy(self, position: Tensor, inputs: Sequence[Tensor]) -> Tensor:
        rows, args, kwargs = self._arguments(inputs)
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

    def _handlers_energy_and_grad(self, position: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The same by Pyro's own ``condition`` and ``trace``: what every recording is checked against."""
        rows, args, kwargs = self._arguments(inputs)
        with torch.enable_grad(), quiet_handlers(), poutine.block():
            z = position.detach().requires_grad_()
            values, log_det = self.log_joint.values(z)
            model = poutine.condition(self.model, {**values, **{n: rows[n] for n in self.plates}})
            energy = -(poutine.trace(model).get_trace(*args, **kwargs).log_prob_sum() + log_det)
            if self._batch_weight(args, kwargs) != 1.0:
                energy = self._energy(z, inputs)
            (grad,) = torch.autograd.grad(energy, z)
        return energy.detach(), grad

    # ---- all data, in chunks

    def _is_single_batch(self) -> bool:
        return hasattr(self.batches, "__len__") and len(self.batches) == 1  # type: ignore[arg-type]

    def _chunks(self) -> Iterator[list[Tensor]]:
        """Inputs of :meth:`_traced_chunk` that together cover all data once."""
        ones = {p.name: torch.ones((), dtype=self.dtype, device=self.device) for p in self.plates.values()}
        if self.batches is not None:
            for number, item in enumerate(self.batches):
                args, kwargs = arguments_of(item)
                size = checks.leading_size(args, kwargs)
                first = [ones[n] * (number == 0) for n in self.plates]
                weights = [torch.ones(size, dtype=self.dtype, device=self.device) for _ in self.plates]
                yield [*first, *weights, *TensorLeaves.tensors((args, kwargs))]
            return
        for corner in itertools.product(*(range(0, p.size, p.batch_size) for p in self.plates.values())):
            first, weights, rows = [], [], []
            for start, plate in zip(corner, self.plates.values(), strict=True):
                index = torch.arange(start, start + plate.batch_size, device=self.device)
                first.append(ones[plate.name] * (start == 0))
                weights.append((index < plate.size).to(self.dtype))
                rows.append(index.clamp(max=plate.size - 1))
            yield [*first, *weights, *rows]

    def _traced_chunk(self, position: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = list(self.plates)
        first = dict(zip(names, inputs, strict=False))
        weights = dict(zip(names, inputs[len(names) :], strict=False))
        rest = inputs[2 * len(names) :]
        if self.batches is None:
            rows, args, kwargs = dict(zip(names, rest, strict=True)), self.args, self.kwargs
        else:
            rows, args, kwargs = self._arguments([*(self._fixed_rows[n] for n in self._row_names), *rest])

        def one(z: Tensor) -> Tensor:
            return -self.log_joint.weighted(z, rows, weights, first, args, kwargs)

        if not self.is_recorded or len(position) == 1:
            with quiet_handlers():
                return (torch.stack([one(z).detach() for z in position]),)
        return (torch.func.vmap(one, randomness="different")(position),)


class Stream:
    """Minibatches for ``num_chains`` chains: what the potential's recorded programs take as inputs.

    :param potential: whose minibatches.
    :param num_chains: number of chains; each has its own order.
    """

    def __init__(self, potential: Potential, num_chains: int) -> None:
        self.potential = potential
        plates = [potential.plates[name] for name in potential._row_names]
        self._rows = [
            RowStream(p.size, p.batch_size, num_chains, replacement=potential.replacement, device=potential.device)
            for p in plates
        ]
        self._arguments = None if potential.batches is None else ArgumentStream(potential.batches, num_chains)

    def next(self, steps: int = 1) -> list[list[Tensor]]:
        """For each of ``steps`` steps the program's minibatch inputs, each leading with the chain dimension."""
        rows = [stream.next(steps).unbind(0) for stream in self._rows]
        result = [list(step) for step in zip(*rows, strict=True)] if rows else [[] for _ in range(steps)]
        if self._arguments is not None:
            for inputs in result:
                chains = [TensorLeaves.tensors(arguments) for arguments in self._arguments.next()]
                inputs.extend(torch.stack(leaf) for leaf in zip(*chains, strict=True))
        return result
