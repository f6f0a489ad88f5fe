"""The predictive of a model linearised at the mode of a Laplace approximation.

f* ~ N(f(x, z*), J Λ⁻¹ Jᵀ),        J = ∂f/∂z at z*      (Immer, Korzepa and Bauer 2021, AISTATS)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor

from bnn.curvature import labellings
from bnn.guides._all_data import Reading, Recorded, chunks_of
from bnn.guides._laplace_blocks import LaplaceBlock
from bnn.observations import Chunk as Window
from bnn.observations import Target, read_targets
from bnn.prediction import Prediction, of_classes, of_moments
from bnn.structure import base_of


@dataclass
class Outputs:
    """The Gaussian of a site's outputs in the linearised model; the rows of the data lead.

    :ivar mean: outputs at the mode ``(*batch_shape, outputs)``.
    :ivar covariance: ``(*batch_shape, outputs, outputs)``.
    :ivar target: the site's law at the mode.
    """

    mean: Tensor
    covariance: Tensor
    target: Target


@torch.no_grad()
def outputs_of(
    model: Callable[..., Any],
    point: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    blocks: Sequence[LaplaceBlock],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> dict[str, Outputs]:
    """The outputs' law by predicted site.

    :param model: a Pyro model.
    :param point: unconstrained values of all sites.
    :param values: the same as the model has them.
    :param blocks: the approximation.
    :param args: arguments of the model.
    :param kwargs: its keyword arguments.
    """
    whole = read_targets(model, values, Window(args, dict(kwargs)), drawn=True)
    if whole.plates:
        raise NotImplementedError(
            f"at these arguments the plates {sorted(whole.plates)} draw minibatches: write the model so that without "
            'targets it takes all rows, pyro.plate("data", len(x), subsample_size=None if y is None else B).'
        )
    for name, target in whole.targets.items():
        base = base_of(target.fn)
        if base.event_shape and base is not target.fn and len(target.fn.event_shape) > len(base.event_shape):
            raise NotImplementedError(
                f"the outputs of site {name!r}, {type(base).__name__} with further event dimensions: use a plate in "
                "place of to_event."
            )
    recorded = Recorded(
        poutine.condition(model, {name: target.value for name, target in whole.targets.items()}),
        args, kwargs, "outputs",
    )  # fmt: skip
    (chunk,) = chunks_of(lambda a, k: recorded, args, kwargs, None)
    reading, found = Reading(chunk, point), {}
    labels = labellings(recorded.graph)[0]
    for name, target in whole.targets.items():
        probes = [probe for probe in reading.probes if name in probe]
        mean = torch.stack([probe[name].detach() for probe in probes], -1)
        covariances = []
        steps = [zip(*(reading.jacobian_rows(p, b.names, len(probes)) for p in probes), strict=True) for b in blocks]
        for parts in zip(*steps, strict=True):
            pairs = zip(blocks, parts, strict=True)
            covariances.append(sum(_gram(block.whiten(torch.stack(rows, 1))) for block, rows in pairs))
        covariance = torch.cat(covariances) if covariances else mean.new_zeros(labels.count, *mean.shape[-1:] * 2)
        found[name] = Outputs(mean, covariance[labels.of[name]], target)
    return found


def _gram(jacobian: Tensor) -> Tensor:
    return jacobian @ jacobian.mT


def prediction_of(name: str, outputs: Outputs, link: str, num_samples: int) -> Prediction:
    """What the outputs say about the targets.

    :param name: the site.
    :param outputs: its outputs.
    :param link: ``"sampled"`` or ``"probit"``.
    :param num_samples: draws of the outputs.
    """
    fn, mean, covariance = outputs.target.fn, outputs.mean, outputs.covariance
    base = base_of(fn)
    if isinstance(base, dist.Bernoulli):
        variance = covariance.diagonal(dim1=-2, dim2=-1)
        shape = fn.shape()
        logits = _shifts(mean, variance, link, num_samples).reshape(-1, *shape)
        log_probability = torch.nn.functional.logsigmoid(torch.stack([-logits, logits], -1))
        fields = of_classes(log_probability, "probabilities")
        one = fields["draws"][..., 1]
        fields = {**fields, **of_moments(one, one * (1 - one))}
    elif isinstance(base, (dist.Categorical, dist.OneHotCategorical)):
        log_probability = (
            _class_draws(mean, covariance, num_samples) if link == "sampled" else _probit(mean, covariance)
        )
        fields = of_classes(log_probability, "probabilities")
    else:
        shape = fn.shape()
        epistemic = covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0).reshape(shape)
        variance = fn.variance.expand(shape)
        fields = {
            "mean": mean.reshape(shape),
            "sd": (epistemic + variance).sqrt(),
            "epistemic": epistemic.sqrt(),
            "aleatoric": variance.sqrt(),
        }
        return Prediction(name, 0, **{key: value.cpu() for key, value in fields.items()})
    fields.pop("draws")
    if link == "probit":  # one number for each probability: it has no parts
        kept = {"probabilities", "entropy"}
        fields = {key: value for key, value in fields.items() if key in kept}
    count = num_samples if link == "sampled" else 0
    return Prediction(name, count, **{key: value.cpu() for key, value in fields.items()})


def _shifts(mean: Tensor, variance: Tensor, link: str, num_samples: int) -> Tensor:
    """Draws of independent logits, or the one whose sigmoid is the probit approximation."""
    if link == "probit":
        return (mean / (1 + torch.pi / 8 * variance).sqrt()).unsqueeze(0)
    noise = torch.randn(num_samples, *mean.shape, dtype=mean.dtype, device=mean.device)
    return mean + variance.clamp_min(0).sqrt() * noise


def _class_draws(mean: Tensor, covariance: Tensor, num_samples: int) -> Tensor:
    """Log probabilities of drawn outputs; the covariance is singular, since probabilities add up to one."""
    values, vectors = torch.linalg.eigh(covariance)
    factor = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
    noise = torch.randn(num_samples, *mean.shape, dtype=mean.dtype, device=mean.device)
    return (mean + (factor @ noise.unsqueeze(-1)).squeeze(-1)).log_softmax(-1)


def _probit(mean: Tensor, covariance: Tensor) -> Tensor:
    """p_k ∝ 1 / Σ_i exp((m_i − m_k) / √(1 + π/8 Var(f_k − f_i)))."""
    variance = covariance.diagonal(dim1=-2, dim2=-1)
    pairs = variance.unsqueeze(-1) + variance.unsqueeze(-2) - 2 * covariance
    shifts = (mean.unsqueeze(-2) - mean.unsqueeze(-1)) / (1 + torch.pi / 8 * pairs.clamp_min(0)).sqrt()
    return (-shifts.logsumexp(-1)).log_softmax(-1).unsqueeze(0)
