"""Which curvature a latent site gets at a point estimate: a Kronecker product, a link in a chain, or a diagonal."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transform_to
from torch.fx import Node

from bnn.curvature import Capture
from bnn.guides._base import LARGEST_SIDE, biases_of
from bnn.guides._blocks import LatentSite
from bnn.guides._site_roles import roles_of
from bnn.guides.matrix_normal import MatrixBlock
from bnn.layers import Use
from bnn.model_graph import ModelGraph, reaching
from bnn.per_datum import Block as Data
from bnn.randomness import kept_randomness


@dataclass(frozen=True)
class PointSettings:
    """What a recording depends on besides model and shapes."""

    curvature: str = "sampled"
    label_samples: int = 1
    kl_weight: float = 1.0
    block_tridiagonal: bool = False
    compile: str = "fx"


class Blocks:
    """The recorded model of arguments of one kind, and how its sites are treated.

    :param model: a Pyro model.
    :param args: its arguments.
    :param kwargs: its keyword arguments.
    :param settings: what is computed.
    :ivar transforms: site -> from AutoDelta's unconstrained parameter to the value; None for the real space.
    :ivar blocks: weights, each with its bias, whose curvature is a Kronecker product.
    :ivar diagonal: all other sites.
    :ivar missed: those of them whose likelihood no probe, or not all of it, sees: factors, and scales under ``"ggn"``.
    :ivar known_precision: sites whose prior is Normal and that no other site's prior depends on.
    :ivar normal: those of them whose prior is the same Normal for all entries, always -> its location and scale.
    :ivar thin: numbers of the blocks whose gradient is kept as its thin factors, since these are smaller.
    :ivar chains: numbers of blocks that are successive layers.
    :raises ValueError: if the curvature of a likelihood cannot be had.
    """

    def __init__(
        self, model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], settings: PointSettings
    ) -> None:
        self.settings = settings
        with kept_randomness():
            self.graph = ModelGraph(
                model, args, kwargs, curvature=settings.curvature, label_samples=settings.label_samples
            )
            sites = self.graph.structure.sites
            rows = [torch.arange(plate.batch_size, device=self.graph.structure.device) for plate in self.graph.plates]
            inputs = [*rows, *self.graph.data]
            if self.graph.graph is None:
                self.graph.terms(self.graph.values_at_recording, inputs)
                warnings.warn(
                    "the model cannot be recorded and runs with Pyro's handlers, several times slower, with a diagonal "
                    f"curvature from whole-batch gradients: {self.graph.cause}.",
                    RuntimeWarning,
                    stacklevel=6,
                )
            for name, why in self.graph.cannot_label.items():
                raise ValueError(
                    f"the curvature of observed site {name!r} cannot be estimated: {why}. Choose another curvature: "
                    "'empirical' uses the observed labels (biased)."
                )
            self.transforms = {n: None if s.transform is None else transform_to(s.support) for n, s in sites.items()}
            self.capture: Capture | None = None
            self.blocks: list[MatrixBlock] = []
            self.missed = set(sites) if settings.curvature == "ggn" else set()
            self.known_precision: set[str] = set()
            self.normal: dict[str, tuple[float, float]] = {}
            self.chains: list[list[int]] = []
            if self.graph.graph is not None:
                self.capture = Capture(self.graph, inputs, self.graph.parameters)
                roles = roles_of(self.graph)
                self.missed, self.known_precision, self.normal = roles.missed, roles.known_precision, roles.fixed
                self._find_blocks()
                if settings.block_tridiagonal:
                    self._find_chains()
        in_blocks = {name for block in self.blocks for name in block.names}
        in_chains = {number for chain in self.chains for number in chain}
        self.diagonal = [name for name in sites if name not in in_blocks]
        self.missed &= set(self.diagonal)
        self.thin = {n for n in range(len(self.blocks)) if n not in in_chains and self._is_thin(n)}

    def _find_blocks(self) -> None:
        assert self.capture is not None
        sites = {n: LatentSite(n, s.support, s.shape, 0, (), 1.0) for n, s in self.graph.structure.sites.items()}
        matrices = {n for n, s in sites.items() if n in self.capture.uses and _is_matrix(s.shape)}
        families = {name: "matrix" if name in matrices else "factorized" for name in sites}
        partners, transposed = biases_of(self.capture, sites, families, set())
        for name, site in sites.items():
            if name in matrices:
                members = [site, *(sites[bias] for weight, bias in partners.items() if weight == name)]
                flipped = name in transposed
                self.blocks.append(MatrixBlock(members, site.shape[-1] if flipped else site.shape[0], flipped))

    def uses(self, number: int) -> list[tuple[Use, Data]]:
        """The uses of a block's sites, each once."""
        assert self.capture is not None
        names = self.blocks[number].names
        return list({id(use): (use, data) for name in names for use, data in self.capture.uses[name]}.values())

    def _is_thin(self, number: int) -> bool:
        block = self.blocks[number]
        places = sum(_rows_of(use) for use, _ in self.uses(number))
        return places * (block.rows**2 + block.cols**2) < block.rows * block.cols * (block.rows + block.cols)

    def _find_chains(self) -> None:
        """Blocks that every datum meets once, in the order of the forward pass, as long as one feeds the next."""
        assert self.graph.graph is not None
        order = {node: number for number, node in enumerate(self.graph.graph.graph.nodes)}
        found: list[tuple[Node, int, Data]] = []
        for number in range(len(self.blocks)):
            uses = self.uses(number)
            use, data = uses[0]
            if len(uses) == 1 and use.weight is not None and _rows_of(use) == data.count:
                found.append((use.node, number, data))
        chains: list[list[tuple[Node, int, Data]]] = []
        for one in sorted(found, key=lambda item: order[item[0]]):
            last = chains[-1][-1] if chains else None
            if last is None or last[0] not in reaching([one[0]]) or last[2] != one[2]:
                chains.append([])
            chains[-1].append(one)
        self.chains = [[number for _, number, _ in chain] for chain in chains if len(chain) > 1]


def _is_matrix(shape: torch.Size) -> bool:
    """As the guides have it: not so large that the factors, which grow as the square, do not fit."""
    return len(shape) > 1 and max(shape[0], shape[1:].numel()) <= LARGEST_SIDE


def _rows_of(use: Use) -> int:
    """Data times places."""
    tag = use.weight or use.bias
    assert tag is not None
    return int(use.node.meta["val"].numel()) // len(tag.index)


def tensors_of(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leaves to differentiate at."""
    return {name: value.detach().requires_grad_() for name, value in values.items()}
