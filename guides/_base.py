"""The base of the guides: blocks of latent sites, their parameters, and all that Pyro asks of a guide."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.utils import deep_setattr
from pyro.nn.module import PyroModule, PyroParam, pyro_method
from torch import Tensor
from torch.distributions import biject_to

from bnn.curvature import Capture
from bnn.guides._auto import KeptGuide
from bnn.guides._blocks import Block, LatentSite
from bnn.model_graph import ModelGraph
from bnn.structure import base_of

FAMILIES = ("factorized", "matrix", "eigen")

# A weight with more rows or columns than this is factorized unless a family is asked for: factors grow as the square.
LARGEST_SIDE = 8192

Family = Callable[[str, torch.Size], str | None]


class NaturalGuide(KeptGuide):
    """Gaussians over the latent sites of a model, block by block. See its subclasses."""

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        family: Family | None = None,
        init_loc_fn: Any = "auto",
        init_scale: float = 0.1,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates)
        if not init_scale > 0:
            raise ValueError(f"init_scale is {init_scale}; give a positive number, such as 0.1.")
        self._family, self._init_scale = family, init_scale
        self._sites: dict[str, LatentSite] = {}
        self._blocks: list[Block] = []
        self._constraints: list[dict[str, Any]] = []

    # ---- setup

    def default_family(self, site: LatentSite) -> str:
        """The family of a site for which the user's function gives none."""
        raise NotImplementedError

    def is_matrix(self, site: LatentSite) -> bool:
        """Whether a site can have a family of matrices by default."""
        if len(site.shape) < 2 or site.frames or not site.is_real:
            return False
        return max(site.shape[0], site.shape[1:].numel()) <= LARGEST_SIDE

    @property
    def blocks(self) -> list[Block]:
        """The blocks of latent sites that share a Gaussian; empty before the guide was first called."""
        return list(self._blocks)

    @property
    def is_set_up(self) -> bool:
        """Whether the guide was called on data."""
        return bool(self._blocks)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        values = {}
        prototype: Any = self.prototype_trace
        for name, node in prototype.iter_stochastic_nodes():
            site = latent_site(name, node)
            self._sites[name] = site
            values[name] = biject_to(site.support).inv(node["value"].detach()).detach()
        if not values:
            raise ValueError("the model has no latent sites: give at least one weight a prior with pyro.sample.")
        self._blocks = self._make_blocks(args, kwargs)
        self._constraints = []
        for number, block in enumerate(self._blocks):
            self._constraints.append({})
            for name, (start, constraint) in block.init(values, self._init_scale).items():
                self._constraints[number][name] = constraint
                self._set(block, number, name, start, constraint)

    def _set(self, block: Block, number: int, name: str, start: Tensor, constraint: Any) -> None:
        if block.family == "factorized":
            setattr(self, name, PyroParam(start.clone(), constraint, 1))
            return
        if not hasattr(self, name + "s"):
            setattr(self, name + "s", PyroModule())
        value = start if name in block.buffers else PyroParam(start.clone(), constraint, 2)
        if name in block.buffers:
            self.register_buffer(f"{name}_{number}", start)
        else:
            deep_setattr(getattr(self, name + "s"), block.key, value)

    @property
    def constraints(self) -> list[dict[str, Any]]:
        """The constraint of each parameter of each block."""
        return self._constraints

    @pyro_method
    def params_of(self, block: Block) -> dict[str, Tensor]:
        """The constrained parameters of a block, through ``pyro.param``."""
        if block.family == "factorized":
            return {name: getattr(self, name) for name in block.parameters}
        params = {name: attrgetter(block.key)(getattr(self, name + "s")) for name in block.parameters}
        number = self._blocks.index(block)
        return {**params, **{name: getattr(self, f"{name}_{number}") for name in block.buffers}}

    def _make_blocks(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Block]:
        from bnn.guides.eigen_normal import EigenBlock
        from bnn.guides.factorized_normal import FactorizedBlock
        from bnn.guides.matrix_normal import MatrixBlock

        families = {name: self._family_of(site) for name, site in self._sites.items()}
        partners: dict[str, str] = {}
        transposed: set[str] = set()
        if any(family != "factorized" for family in families.values()):
            apart = {name for name in families if self._asked(name) == "factorized"}
            with torch.enable_grad():  # the guide's first call may be for a prediction
                graph = ModelGraph(self.model, args, kwargs, curvature="sampled")
                if graph.graph is not None:
                    rows = [torch.arange(plate.batch_size) for plate in graph.plates]
                    capture = Capture(graph, [*rows, *graph.data], graph.parameters)
                    partners, transposed = biases_of(capture, self._sites, families, apart)
        joined = set(partners.values())
        blocks: list[Block] = []
        rest = []
        for name, site in self._sites.items():
            if name in joined:
                continue
            if families[name] == "factorized" or len(site.shape) < 2:
                rest.append(site)
            else:
                made = MatrixBlock if families[name] == "matrix" else EigenBlock
                sites = [site, *(self._sites[p] for w, p in partners.items() if w == name)]
                flipped = name in transposed
                rows = site.shape[-1] if flipped else site.shape[0]
                blocks.append(made(sites, rows, flipped))
        return blocks + ([FactorizedBlock(rest)] if rest else [])

    def _asked(self, name: str) -> str | None:
        return self._family(name, self._sites[name].shape) if self._family is not None else None

    def _family_of(self, site: LatentSite) -> str:
        family = self._asked(site.name)
        if family is None:
            return self.default_family(site)
        if family not in FAMILIES:
            raise ValueError(
                f"family gives {family!r} for site {site.name!r}: choose one of {', '.join(map(repr, FAMILIES))}, or "
                "None for the guide's default."
            )
        if family != "factorized" and not site.is_real:
            raise ValueError(
                f"family gives {family!r} for site {site.name!r}, whose support is {site.support}: only a site on the "
                "whole real space can have it. Give 'factorized'."
            )
        if family != "factorized" and site.frames:
            raise ValueError(
                f"family gives {family!r} for site {site.name!r}, whose entries the plates "
                f"{[frame.name for frame in site.frames]} declare independent: give 'factorized', or draw the site "
                "outside of plates, with .expand(...).to_event(...)."
            )
        return family

    # ---- what Pyro asks for

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw all latent sites.

        :returns: site -> value.
        """
        if not self._blocks:
            self._setup_prototype(*args, **kwargs)
        plates = self._create_plates(*args, **kwargs)
        result: dict[str, Tensor] = {}
        for block in self._blocks:
            result.update(block.sample(self.params_of(block), plates))
        return {name: result[name] for name in self._sites}

    def _needs_setup(self, what: str) -> None:
        if not self._blocks:
            raise RuntimeError(f"{what} needs the guide's parameters: call the guide, or SVI.step, on the data first.")

    @torch.no_grad()
    def draws(self, num_samples: int) -> dict[str, Tensor]:
        """Many draws at once: site -> values ``(num_samples, *shape)``."""
        self._needs_setup("draws")
        result: dict[str, Tensor] = {}
        for block in self._blocks:
            params = {name: tensor.detach() for name, tensor in self.params_of(block).items()}
            loc = params["loc"]
            noise = torch.randn(num_samples, *loc.shape, dtype=loc.dtype, device=loc.device)
            for name, value in block.split(loc + block.spread(params, noise)).items():
                result[name] = biject_to(self._sites[name].support)(value)
        return {name: result[name] for name in self._sites}

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """The median of each site: site -> tensor."""
        self._needs_setup("median")
        medians = {}
        for block in self._blocks:
            for name, (loc, _) in block.moments(self.params_of(block)).items():
                medians[name] = biject_to(self._sites[name].support)(loc.clone())
        return {name: medians[name] for name in self._sites}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Quantiles of each entry of each site, with a leading dimension for the quantiles."""
        self._needs_setup("quantiles")
        results = {}
        for block in self._blocks:
            for name, (loc, sd) in block.moments(self.params_of(block)).items():
                levels = torch.as_tensor(quantiles, dtype=loc.dtype, device=loc.device)
                levels = levels.reshape((-1,) + (1,) * loc.dim())
                results[name] = biject_to(self._sites[name].support)(dist.Normal(loc, sd).icdf(levels))
        return {name: results[name] for name in self._sites}


def latent_site(name: str, node: Any) -> LatentSite:
    fn = node["fn"]
    if fn.support.is_discrete:
        raise NotImplementedError(
            f"site {name!r} is discrete ({type(base_of(fn)).__name__}): a Gaussian guide cannot hold it. Sum it out in "
            "the model, or hide it with pyro.poutine.block."
        )
    for frame in node["cond_indep_stack"]:
        if frame.full_size not in (None, -1) and frame.full_size != frame.size:
            raise NotImplementedError(
                f"site {name!r} is a latent inside the subsampled plate {frame.name!r}: put weights before the plate."
            )
    value = biject_to(fn.support).inv(node["value"].detach())
    base = base_of(fn)
    scale = float(base.scale.detach().mean()) if type(base) is dist.Normal else 1.0
    frames = tuple(frame for frame in node["cond_indep_stack"] if frame.vectorized)
    return LatentSite(name, fn.support, value.shape, fn.event_dim, frames, scale)


def biases_of(
    capture: Capture, sites: Mapping[str, LatentSite], families: Mapping[str, str], apart: set[str]
) -> tuple[dict[str, str], set[str]]:
    """Weight -> the bias added to its products wherever it is used; and the weights whose rows are inputs.

    :param capture: of a recording of the model.
    :param sites: the latent sites.
    :param families: their families.
    :param apart: biases that stay on their own.
    """
    partners, transposed = {}, set()
    for name, uses in capture.uses.items():
        shape = sites[name].shape
        weights = [use.weight for use, _ in uses]
        if len(shape) < 2 or any(weight is None or weight.site != name for weight in weights):
            continue
        numbers = torch.arange(shape.numel())
        if len(shape) == 2 and all(torch.equal(w.index, numbers.reshape(shape).T) for w in weights if w):
            transposed.add(name)
        elif not all(torch.equal(w.index, numbers.reshape(shape[0], -1)) for w in weights if w):
            continue
        biases = {use.bias.site if use.bias is not None else None for use, _ in uses}
        (bias,) = biases if len(biases) == 1 else (None,)
        if bias is None or bias not in capture.uses or bias in apart or sites[bias].frames:
            continue
        own = capture.uses[bias]
        whole = all(
            u.bias is not None and torch.equal(u.bias.index, torch.arange(sites[bias].shape.numel())) for u, _ in own
        )
        if whole and {id(u) for u, _ in own} == {id(u) for u, _ in uses} and len(sites[bias].shape) == 1:
            if families[name] != "factorized":
                partners[name] = bias
    return partners, transposed
