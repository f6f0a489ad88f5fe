"""The Kronecker-factored metric: for each weight the inverse of its curvature, from the inputs and output gradients.

    G = (A ⊗ S + τ)⁻¹ ≈ (A + π √τ)⁻¹ ⊗ (S + √τ/π)⁻¹,    A = E[a aᵀ],  S = Σ_n E[g gᵀ],  π² = mean diag A / mean diag S

a are the inputs of the layer, g the gradients at its outputs of log p(y | x, z) at labels y drawn from the model, τ the
precision of the weight's Normal prior: the curvature of K-FAC (Martens and Grosse 2015, "Optimizing neural networks
with Kronecker-factored approximate curvature", ICML), taken by the same capture. With G = L Lᵀ, L = L_S ⊗ L_A, a weight
W (outputs, inputs) is W = L_S U L_Aᵀ. All other sites get G = 1 / (E[g²] + τ) per coordinate.

Cost: besides the gradient, for each weight products of its size with both factors, twice a step: those take
2 (inputs + outputs) / 3B of what its gradient does on B rows. For minibatches of more rows than a layer has inputs and
outputs, and for corrected kernels. Estimates once a draw in warm-up, at the place of the first chains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.curvature import Capture
from bnn.kernels._metric import Metric
from bnn.kernels.preconditioners import Learner, Preconditioner, check_decay
from bnn.kernels.schedules import check_setting
from bnn.minibatch import Stream
from bnn.model_graph import ModelGraph
from bnn.per_datum import Place, per_datum
from bnn.potential import Potential
from bnn.randomness import kept_randomness
from bnn.structure import Site

# The largest side of a weight that gets factors, and how many chains a draw's estimate is the mean of.
LARGEST_SIDE, CHAINS = 2048, 4


# (matrix, factor of its rows, factor of its columns) -> matrix
_Product = Callable[[Tensor, Tensor, Tensor], Tensor]


class Blocks(Metric):
    """L block by block: L_S ⊗ L_A for a weight, a scale per coordinate for all other sites.

    :param sites: all sites.
    :param shapes: site -> (rows, columns) of a weight.
    :param tensors: per site in turn L_S and L_A, or the scales.
    """

    def __init__(self, sites: Mapping[str, Site], shapes: Mapping[str, tuple[int, int]], tensors: Sequence[Tensor]):
        self.sites, self.shapes, self.tensors = sites, shapes, tuple(tensors)

    def forward(self, u: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """L u."""
        return self._moved(u, tensors, lambda x, s, a: s @ x @ a.mT)

    def pull_back(self, grad: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Lᵀ ∇U."""
        return self._moved(grad, tensors, lambda x, s, a: s.mT @ x @ a)

    def inverse(self, z: Tensor) -> Tensor:
        """L⁻¹ z."""
        inverses = [torch.linalg.inv(t) if t.dim() == 2 else 1.0 / t for t in self.tensors]
        return self._moved(z, inverses, lambda x, s, a: s @ x @ a.mT)

    def scaled(self, factor: float) -> Metric:
        """The map ``factor`` · L."""
        tensors, result = list(self.tensors), []
        for name in self.sites:
            result.append(tensors.pop(0) * factor)
            if name in self.shapes:
                result.append(tensors.pop(0))
        return Blocks(self.sites, self.shapes, result)

    def _moved(self, x: Tensor, tensors: Sequence[Tensor], product: _Product) -> Tensor:
        rest, parts = list(tensors), []
        for name, site in self.sites.items():
            part = x[..., site.slice]
            if name in self.shapes:
                matrix = part.reshape(*part.shape[:-1], *self.shapes[name])
                parts.append(product(matrix, rest.pop(0), rest.pop(0)).flatten(-2))
            else:
                parts.append(part * rest.pop(0))
        return torch.cat(parts, -1)


class _KroneckerLearner(Learner):
    """Running means of A, S and E[g²], with exponential weights, none on what they start with."""

    knows_at_once = True

    def __init__(self, potential: Potential, decay: float, damping: float) -> None:
        super().__init__(potential)
        self.decay, self.damping = decay, damping
        if potential.batches is not None:
            raise ValueError("Kronecker() needs all data as arguments of run(); with batches= use RMSprop().")
        with kept_randomness():
            graph = ModelGraph(potential.model, potential.args, potential.kwargs, curvature="sampled")
            if graph.graph is None:
                raise ValueError(f"Kronecker() needs a model that can be recorded: {graph.cause}. Use RMSprop().")
            for name, why in graph.cannot_label.items():
                raise ValueError(f"Kronecker() draws labels, but for observed site {name!r} {why}. Use RMSprop().")
            rows = [torch.arange(plate.batch_size, device=potential.device) for plate in graph.plates]
            self._capture = Capture(graph, [*rows, *graph.data], graph.parameters)
        self._graph = graph
        plates = [(plate.size, plate.batch_size) for plate in graph.plates]
        self._stream = Stream(plates, None, 1, device=potential.device)
        if potential.share is not None:
            self._stream = potential.share.stream(graph.plates, None, 1, device=potential.device)
        shapes = {n: (s.value_shape[0], s.value_shape[1:].numel()) for n, s in potential.sites.items() if s.value_shape}
        self.shapes = {
            n: shape
            for n, shape in shapes.items()
            if n in self._capture.uses and len(potential.sites[n].value_shape) > 1 and max(shape) <= LARGEST_SIDE
        }
        self._means: dict[str, Tensor] = {}
        self._weight = 0.0

    def made_anew(self) -> dict[str, Any]:
        """The recorded model."""
        return {"graph": self._graph, "capture": self._capture}

    def start(self) -> Metric:
        """The identity."""
        tensors = []
        for name, site in self.potential.sites.items():
            if name in self.shapes:
                tensors += [torch.eye(size).to(self.like) for size in self.shapes[name]]
            else:
                tensors.append(torch.ones_like(self.like[site.slice]))
        return Blocks(self.potential.sites, self.shapes, tensors)

    def observe(self, position: Tensor, grad: Tensor | None) -> None:
        """Estimate the curvature where the first chains are."""
        del grad
        share = self.potential.share
        with contextlib.nullcontext() if share is None else share.ranks.own_randomness():  # for labels of its rows
            found = [self._statistics(z) for z in position[:CHAINS]]
        if share is not None:
            means = [share.mean([t * share.weight if n[:6] == "inputs" else t for n, t in f.items()]) for f in found]
            found = [dict(zip(f, mean, strict=True)) for f, mean in zip(found, means, strict=True)]
        self._weight = self.decay * self._weight + 1.0 - self.decay
        for name in found[0]:
            new = torch.stack([one[name] for one in found]).mean(0)
            old = self._means.get(name)
            self._means[name] = (1.0 - self.decay) * new + (0.0 if old is None else self.decay * old)

    def _statistics(self, z: Tensor) -> dict[str, Tensor]:
        graph, sites = self._graph, self.potential.sites
        (rows,) = self._stream.next(1)
        inputs = graph.inputs((self.potential.args, dict(self.potential.kwargs)), [t[0] for t in rows])
        parameters = [p.detach() for p in graph.parameters]
        weights = list(self.shapes)
        with torch.enable_grad():
            leaves = {n: site.unflatten(z).detach().requires_grad_() for n, site in sites.items()}
            values = {n: site.constrain(leaves[n]) for n, site in sites.items()}
            keep = self._capture.sources(weights)
            terms, env = graph(values, inputs, parameters, wanted=lambda key: key[0] == "probe", keep=keep)
            nodes, others = self._capture.nodes(weights), [n for n in sites if n not in self.shapes]
            (probe,) = terms.probes
            total = torch.stack([value.sum() for value in probe.values()]).sum()
            at = [*(env[node] for node in nodes), *(leaves[n] for n in others)]
            found = torch.autograd.grad(total, at, allow_unused=True, materialize_grads=True)
        grads, result = dict(zip(nodes, found, strict=False)), {}
        for name, shape in self.shapes.items():
            numbers = torch.arange(shape[0] * shape[1])
            place = Place(numbers // shape[1], numbers % shape[1])
            data = per_datum(self._capture.uses[name], {name: place}, shape, env, grads)
            result[f"inputs of {name}"], result[f"outputs of {name}"] = (m.detach() for m in data.second_moments())
        for name, gradient in zip(others, found[len(nodes) :], strict=True):
            result[name] = gradient.reshape(-1).square()
        return result

    def estimate(self) -> Metric:
        """L of the running means."""
        tensors = []
        means = {name: value.double() / self._weight for name, value in self._means.items()}
        for name, site in self.potential.sites.items():
            prior = 0.0 if site.normal is None else site.normal[1] ** -2
            if name in self.shapes:
                a, s = means[f"inputs of {name}"], means[f"outputs of {name}"]
                size_a, size_s = (max(float(m.diagonal().mean()), 1e-30) for m in (a, s))
                tau = prior + self.damping * size_a * size_s
                pi = (size_a / size_s) ** 0.5
                tensors += [_factor(s, tau**0.5 / pi), _factor(a, tau**0.5 * pi)]
            else:
                precision = means[name] + prior + self.damping * means[name].mean()
                tensors.append(torch.where(precision > 0, precision, 1.0).rsqrt())
        return Blocks(self.potential.sites, self.shapes, [t.to(self.like) for t in tensors])


def _factor(moment: Tensor, damping: float) -> Tensor:
    """L with L Lᵀ = (moment + damping)⁻¹."""
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve_triangular(torch.linalg.cholesky(moment + damping * eye), eye, upper=False).mT


@dataclass(frozen=True)
class Kronecker(Preconditioner):
    """A Kronecker product per weight: the inverse of K-FAC's curvature, learnt in warm-up and frozen after it.

    Give it as ``SGLD(preconditioner=...)`` or as ``mass=`` of the other kernels.

    :param decay: weight of the past in the running means, per draw of warm-up.
    :param damping: added to the curvature, in units of its mean.
    :raises ValueError: for a decay outside [0, 1), a damping that is negative; in a run, for a model that cannot be
        recorded, or ``batches=``.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGHMC, Kronecker
    >>> def model(x, y):
    ...     weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 2), 10.).to_event(2))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal((x @ weight.T).squeeze(-1), 1.), obs=y)
    >>> pyro.set_rng_seed(0)
    >>> x = torch.randn(100, 2) @ torch.tensor([[1., 1.], [0., 0.1]])
    >>> kernel = SGHMC(model, step_size=0.3, friction=1., mass=Kronecker())
    >>> mcmc = MCMC(kernel, num_samples=1000, warmup_steps=200, num_chains=4, disable_progbar=True)
    >>> mcmc.run(x, x.sum(-1))
    >>> exact = torch.linalg.inv(x.T @ x + torch.eye(2) / 100)
    >>> (mcmc.get_samples()["weight"].flatten(1).T.cov() / exact - 1).abs().max() < 0.2
    tensor(True)
    """

    decay: float = 0.99
    damping: float = 1e-3

    def __post_init__(self) -> None:
        """:raises ValueError: for a decay outside [0, 1) or a damping that is negative."""
        check_decay(self.decay)
        check_setting("damping", self.damping)

    def learner(self, potential: Potential) -> Learner:
        """What learns it in one run."""
        return _KroneckerLearner(potential, self.decay, self.damping)
