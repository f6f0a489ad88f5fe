"""The energies of many points at once: one recorded program, vectorized over the points, for data of any value.

U(z) = −Σ_sites log p(site | z) − log |det ∂(constrained)/∂z|
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bnn.minibatch import Arguments, Stream
from bnn.model_graph import Key, ModelGraph
from bnn.potential import LARGEST_VECTORIZED_DIM
from bnn.randomness import kept_randomness
from bnn.recording import RecordingError, has_convolution, record
from bnn.tiers import Program, choose, one_chain, over_chains


@dataclass(frozen=True)
class PerMember:
    """Data of which every member of an ensemble has its own: an argument of ``SVI.step``.

    :ivar values: the data, with a leading dimension for the members.

    >>> import torch
    >>> y = torch.zeros(10)
    >>> targets = PerMember(y + 0.1 * torch.randn(5, 10))  # noised targets for five members
    """

    values: Tensor


def for_one(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    """The arguments that the first member sees."""

    def one(leaf: Any) -> Any:
        return leaf.values[0] if isinstance(leaf, PerMember) else leaf

    found: Arguments = pytree.tree_map(one, (tuple(args), dict(kwargs)))
    return found


class Energies:
    """Energies of points, and their gradients.

    :param model: a Pyro model.
    :param args: its arguments; tensors among them may have other values later, and some may be :class:`PerMember`.
    :param kwargs: its keyword arguments.
    :param count: the number of points.
    :param compile: see :mod:`bnn.tiers`.
    :raises ValueError: if data per member are for another number of members.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], count: int, compile: str
    ) -> None:
        self.count, self.compile = count, compile
        with kept_randomness():  # a training that goes on records anew, and must go on the same
            self.graph = ModelGraph(model, *for_one(args, kwargs))
        self.structure = self.graph.structure
        plates = [(plate.size, plate.batch_size) for plate in self.graph.plates]
        self._stream = Stream(plates, None, count, device=self.structure.device)
        leaves = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, (Tensor, PerMember))]
        self._own = [True] * len(plates) + [isinstance(leaf, PerMember) for leaf in leaves]
        self._program: Program | None = None

    def __call__(
        self, positions: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Energies ``(points,)``, gradients ``(points, dim)``, and those of the model's own parameters per point.

        Where the model subsamples, each point sees a minibatch of its own.
        """
        (rows,) = self._stream.next(1)
        data = []
        for leaf in pytree.tree_leaves((args, dict(kwargs))):
            if isinstance(leaf, PerMember):
                if len(leaf.values) != self.count:
                    raise ValueError(
                        f"PerMember holds data of shape {tuple(leaf.values.shape)} for {self.count} members: its first "
                        f"dimension counts the members, {self.count}."
                    )
                data.append(leaf.values.detach())
            elif isinstance(leaf, Tensor):
                data.append(leaf.detach())
        inputs = [*rows, *data]
        if self.graph.graph is None:
            return self._by_handlers(positions, inputs)
        parameters = [leaf.detach() for leaf in self.graph.parameters]
        tensors = [positions.detach().contiguous(), *inputs, *parameters]
        if self._program is None:
            self._program = self._recorded(tensors)
        energies, grads, *others = self._program(*tensors)
        return energies, grads, list(others)

    def state(self) -> list[dict[str, Tensor]]:
        """Where the minibatches stand, for a checkpoint."""
        return self._stream.rows_state()

    def load_state(self, state: Sequence[Mapping[str, Tensor]]) -> None:
        """Go on where those stood whose :meth:`state` this is."""
        self._stream.load_rows_state(state)

    @property
    def parameters(self) -> list[Tensor]:
        """The model's own parameters."""
        return self.graph.seen_parameters if self.graph.graph is None else list(self.graph.parameters)

    def _recorded(self, tensors: Sequence[Tensor]) -> Program:
        own = [True, *self._own, *[False] * len(self.graph.parameters)]
        places = [0, *range(1 + len(self._own), len(tensors))]  # of the position and the parameters

        def function(*tensors: Tensor) -> tuple[Tensor, ...]:
            dims = tuple(0 if flag else None for flag in own)
            grads, energies = torch.func.vmap(
                torch.func.grad_and_value(self._energy, argnums=tuple(places)), in_dims=dims, randomness="different"
            )(*tensors)
            return (energies, *grads)

        slow = self.structure.device.type == "cpu" and self.structure.dim > LARGEST_VECTORIZED_DIM
        if not slow:
            try:
                graph = record(function, tensors)
                if not (has_convolution(graph) and self.structure.device.type == "cpu"):
                    return choose(graph, tensors, self.compile, calls=1)
            except RecordingError:
                pass
        one = one_chain(tensors, own)
        return over_chains(choose(record(function, one), one, self.compile, calls=1), own)

    def _energy(self, position: Tensor, *tensors: Tensor) -> Tensor:
        inputs, parameters = tensors[: len(self._own)], tensors[len(self._own) :]
        values, log_det = self._values(position)
        terms, _ = self.graph(values, inputs, parameters, wanted=_is_density)
        return -sum((t.sum() for t in [*terms.likelihood.values(), *terms.prior.values()]), torch.as_tensor(log_det))

    def _by_handlers(self, positions: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        energies, grads, others = [], [], []
        for number, position in enumerate(positions.detach()):
            with torch.enable_grad():
                leaf = position.clone().requires_grad_()
                values, log_det = self._values(leaf)
                own = [t[number] if flag else t for t, flag in zip(inputs, self._own, strict=True)]
                terms = self.graph.terms(values, own)
                densities = [*terms.likelihood.values(), *terms.prior.values()]
                energy = -sum((t.sum() for t in densities), torch.as_tensor(log_det))
                grad, *rest = torch.autograd.grad(
                    energy, [leaf, *self.graph.seen_parameters], allow_unused=True, materialize_grads=True
                )
            energies.append(energy.detach())
            grads.append(grad)
            others.append(rest)
        return torch.stack(energies), torch.stack(grads), [torch.stack(g) for g in zip(*others, strict=True)]

    def _values(self, position: Tensor) -> tuple[dict[str, Tensor], Tensor | float]:
        values: dict[str, Tensor] = {}
        log_det: Tensor | float = 0.0
        for name, site in self.structure.sites.items():
            latent = site.unflatten(position).to(site.dtype)
            values[name] = site.constrain(latent)
            if site.transform is not None:
                log_det = log_det + site.transform.log_abs_det_jacobian(latent, values[name]).sum()
        return values, log_det


def _is_density(key: Key) -> bool:
    return key[0] in ("likelihood", "prior")
