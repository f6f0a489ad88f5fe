"""The curvature of a recorded potential as a linear operator: products with vectors, never the matrix.

With U(z) = −log p(D | z) − log p(z) over all data, in the unconstrained coordinates z of :class:`bnn.Potential`,

    hessian            ∇²U
    ggn                Σ_n Jₙᵀ Fₙ Jₙ − ∇² log p(z)        Fₙ the information of the likelihood's location or logits
    fisher             the same by drawn labels: Σ_n ∇ log p(yₙ | z) ∇ log p(yₙ | z)ᵀ, yₙ ~ p(y | xₙ, z)
    empirical_fisher   the same at the observed labels

The first is positive semidefinite at a minimum only; of the others the part of the data is so everywhere. For
categorical, Bernoulli and Poisson likelihoods, and a Normal of fixed scale, ``ggn`` is the Fisher information itself
(Martens 2020, JMLR 21); ``fisher`` also knows learned scales, at the price of label noise, which makes its largest
eigenvalues too large by the order of √(1/draws).

Cost: a product with the Hessian takes some two gradients of all data, one with the others three passes; memory is that
of one minibatch of the model's plate. scipy's solvers take these operators as they are. The library curvlinops
offers the same for plain nets with a loss; it knows neither priors nor plates, and needs torchvision, so that it serves
as a test here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from pyro import poutine
from scipy.sparse.linalg import LinearOperator
from torch import Tensor

from bnn.full_data import over_all_data, traced_chunk_hessian_product
from bnn.log_joint import quiet_handlers
from bnn.model_graph import ModelGraph
from bnn.potential import Potential
from bnn.predictive_arrays import whole_number
from bnn.randomness import kept_randomness

MATRICES = {"hessian": None, "ggn": "ggn", "fisher": "sampled", "empirical_fisher": "empirical"}
SCALINGS = ("none", "elementwise", "per_site")

# Recordings of the models of potentials that are in use, by the curvature whose probes they hold.
_GRAPHS: WeakKeyDictionary[Potential, dict[str | None, ModelGraph]] = WeakKeyDictionary()


class CurvatureOperator(LinearOperator):
    """A curvature matrix at one position, for scipy's solvers: ``operator @ vector`` in float64.

    :param potential: of the model and its data.
    :param at: where: values of all sites in the model's space (``guide.median()`` of an ``AutoDelta``, one draw of a
        run), or a flat unconstrained position ``(dim,)``.
    :param matrix: ``"hessian"``, ``"ggn"``, ``"fisher"`` or ``"empirical_fisher"``.
    :param prior: whether −∇² log p(z), the prior's part, is counted.
    :param scaling: D of D · matrix · D: ``"none"``; ``"elementwise"``, |z_i|; ``"per_site"``, the norm of the site.
        See :mod:`bnn.sharpness` for what they are invariant to.
    :param label_samples: draws of the labels, for ``"fisher"``; they stay the same in all products.
    :raises ValueError: for a setting that is none of these, or values that do not fit the model.
    :raises NotImplementedError: for a likelihood of which the matrix is not known.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn import CurvatureOperator, Potential
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)
    >>> operator = CurvatureOperator(Potential(model, torch.zeros(10)), {"mean": torch.tensor(0.3)})
    >>> operator @ [1.0]  # of the prior 1, and of each of ten data 1/0.5²
    array([41.])
    """

    def __init__(
        self,
        potential: Potential,
        at: Mapping[str, Tensor] | Tensor,
        *,
        matrix: str = "hessian",
        prior: bool = True,
        scaling: str = "none",
        label_samples: int = 1,
    ) -> None:
        if not isinstance(potential, Potential):
            raise ValueError(f"potential is {type(potential).__name__}; give bnn.Potential(model, *args).")
        if matrix not in MATRICES:
            raise ValueError(f"matrix is {matrix!r}; give one of {', '.join(map(repr, MATRICES))}.")
        if scaling not in SCALINGS:
            raise ValueError(f"scaling is {scaling!r}; give one of {', '.join(map(repr, SCALINGS))}.")
        super().__init__(np.dtype(np.float64), (potential.dim, potential.dim))
        self.potential, self.matrix, self.prior = potential, matrix, prior
        self.position = position_of(potential, at)
        self.scale = _scale(potential, self.position, scaling)
        self._probes: _Terms | None = None
        if matrix != "hessian" or not prior:
            label_samples = whole_number("label_samples", label_samples, 1) if matrix == "fisher" else 1
            self._probes = _Terms(self.potential, self.position, MATRICES[matrix], label_samples)

    def _matmat(self, vectors: np.ndarray) -> np.ndarray:
        like = self.position
        along = torch.as_tensor(np.ascontiguousarray(vectors.T), dtype=like.dtype, device=like.device) * self.scale
        if self.matrix == "hessian":
            where = like.expand(len(along), -1)
            (product,) = over_all_data(self.potential, where, traced_chunk_hessian_product, along=along)
            if not self.prior:
                assert self._probes is not None
                product = product - self._probes.prior_product(like, along)
        else:
            assert self._probes is not None
            product = self._probes.product(like, along)
            if self.prior:
                product = product + self._probes.prior_product(like, along)
        if not torch.isfinite(product).all():
            raise ValueError("the curvature is not finite here: the position has diverged, or lies at a kink.")
        return np.asarray((product * self.scale).double().cpu().numpy()).T

    def _matvec(self, vector: np.ndarray) -> np.ndarray:
        return self._matmat(np.reshape(vector, (-1, 1)))[:, 0]

    def _adjoint(self) -> CurvatureOperator:
        return self

    def to_dense(self) -> np.ndarray:
        """The matrix itself, symmetric; for models of some thousand coordinates at most."""
        matrix = self @ np.eye(self.shape[0])
        return np.asarray(0.5 * (matrix + matrix.T))


def position_of(potential: Potential, at: Mapping[str, Tensor] | Tensor) -> Tensor:
    """The flat unconstrained position ``(dim,)`` of values in the model's space, or a flat position itself.

    :raises ValueError: if they do not fit the model, or are not finite.
    """
    if isinstance(at, Mapping):
        values = {name: torch.as_tensor(value).detach().unsqueeze(0) for name, value in at.items()}
        position = potential.unconstrain(values)[0]
    else:
        position = torch.as_tensor(at).detach().to(potential.device, potential.dtype)
        if position.shape != (potential.dim,):
            raise ValueError(
                f"the position has shape {tuple(position.shape)}; give ({potential.dim},), or a dict of one value for "
                f"each of the sites {', '.join(map(repr, potential.sites))}."
            )
    if not torch.isfinite(position).all():
        raise ValueError("the position holds numbers that are not finite.")
    return position


def _scale(potential: Potential, position: Tensor, scaling: str) -> Tensor:
    if scaling == "none":
        return torch.ones_like(position)
    if scaling == "elementwise":
        return position.abs()
    result = torch.empty_like(position)
    for site in potential.sites.values():
        result[site.slice] = torch.linalg.vector_norm(position[site.slice])
    return result


class _Terms:
    """Products with Σ ∇s ∇sᵀ of a model's probes s over all data, and with the prior's Hessian."""

    def __init__(self, potential: Potential, position: Tensor, curvature: str | None, label_samples: int) -> None:
        self.seed = int(torch.randint(2**31, ()))  # before a recording may draw
        if curvature is not None:
            _check_layout(potential, position)
        self.potential, self.label_samples = potential, label_samples
        known = _GRAPHS.setdefault(potential, {})
        if curvature not in known:
            known[curvature] = ModelGraph(potential.model, potential.args, potential.kwargs, curvature=curvature)
        self.graph = known[curvature]
        for name, cause in self.graph.cannot_label.items():
            raise NotImplementedError(f"the curvature of site {name!r} is not known: {cause}.")

    def product(self, position: Tensor, along: Tensor) -> Tensor:
        """Σ_n ∇s_n (∇s_nᵀ v) for each direction v, ``(directions, dim)``."""
        total = torch.zeros_like(along)
        with kept_randomness(), torch.enable_grad(), quiet_handlers():
            for number, (_, inputs) in enumerate(product(range(self.label_samples), self.potential.chunks)):
                torch.manual_seed(self.seed + number)  # the same labels each time
                z = position.clone().requires_grad_()
                probes = torch.cat([t.reshape(-1) for t in self._probes(z, inputs)])
                if probes.requires_grad:
                    dummy = torch.zeros_like(probes, requires_grad=True)
                    (back,) = torch.autograd.grad(probes, z, dummy, create_graph=True)
                    (change,) = torch.autograd.grad(back, dummy, along, is_grads_batched=True, retain_graph=True)
                    total += torch.autograd.grad(probes, z, change, is_grads_batched=True)[0]
        return total / self.label_samples

    def _probes(self, z: Tensor, inputs: list[Tensor]) -> Iterator[Tensor]:
        """The probes of a chunk, each datum counted once and rows that only fill it up not at all."""
        plates = list(self.graph.structure.plates.values())
        first, weights, rows = (inputs[i * len(plates) : (i + 1) * len(plates)] for i in range(3))
        for probe in self._run(z, rows, "probe").probes:
            for name, value in probe.items():
                inside = self.graph.observed[name].plates
                for plate, flag, weight in zip(plates, first, weights, strict=True):
                    if plate.name in inside:
                        counted = (weight * (plate.batch_size / plate.size)).sqrt()
                        value = value * counted.reshape(-1, *(1,) * (-inside[plate.name][0] - 1))
                    else:
                        value = value * flag
                yield value

    def prior_product(self, position: Tensor, along: Tensor) -> Tensor:
        """−∇² log p(z) times each direction."""
        rows = [torch.arange(plate.batch_size, device=position.device) for plate in self.graph.plates]
        with torch.enable_grad(), quiet_handlers():
            z = position.clone().requires_grad_()
            terms = self._run(z, rows, "prior").prior.values()
            energy = -torch.as_tensor(sum(terms)) - self.potential.log_joint.values(z)[1]
            if not energy.requires_grad:
                return torch.zeros_like(along)
            (grad,) = torch.autograd.grad(energy, z, create_graph=True)
            if not grad.requires_grad:
                return torch.zeros_like(along)
            return torch.autograd.grad(grad, z, along, is_grads_batched=True)[0]

    def _run(self, z: Tensor, rows: list[Tensor], kind: str) -> Any:
        values = self.potential.log_joint.values(z)[0]
        inputs = self.graph.inputs((self.potential.args, dict(self.potential.kwargs)), rows)
        if self.graph.graph is None:
            return self.graph.terms(values, inputs)
        return self.graph(values, inputs, self.graph.parameters, wanted=lambda key: key[0] == kind)[0]


def _check_layout(potential: Potential, position: Tensor) -> None:
    """:raises NotImplementedError: where the rows of the data cannot be told apart chunk by chunk."""
    if potential.batches is not None:
        raise NotImplementedError(
            "of batches= only matrix='hessian' is known: for the others give the data as arguments of the model, with "
            "pyro.plate(..., subsample_size=B)."
        )
    model = poutine.condition(potential.model, potential.constrain(position))
    with quiet_handlers():
        trace = poutine.trace(poutine.block(model, hide=[])).get_trace(*potential.args, **potential.kwargs)
    for name, node in trace.nodes.items():
        for frame in node["cond_indep_stack"] if node["type"] == "sample" else ():
            if name not in potential.sites and frame.dim is None and frame.name in potential.plates:
                raise NotImplementedError(
                    f"site {name!r} lies in a subsampled plate that is looped over: write `with pyro.plate(...)`, or "
                    "use matrix='hessian'."
                )
