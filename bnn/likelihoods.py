"""Likelihoods of a net's outputs, for :func:`bnn.bayesian`.

Each turns the outputs into an ordinary distribution of Pyro, whose batch shape is the rows: mean, variance, draws and
log density are the distribution's own. Outputs ``(N,)`` or ``(N, 1)`` mean one target per row, ``(N,)``; outputs
``(N, K)``, ``(N, H, W)``, ... mean targets of the same shape, independent given the outputs. Classes are the last
dimension of the outputs of ``Categorical``, two numbers per target that of ``HeteroscedasticGaussian``.

Noise that is learned is a site of its own, ``"scale"``, ``"precision"`` or ``"concentration"``, shared by all rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from bnn.devices import law_on
from bnn.structure import ModelError
from bnn.target_checks import (
    as_entries,
    check_outputs,
    check_setting,
    check_shape,
    check_values,
    class_targets,
    counts,
    real_targets,
    zero_or_one,
)

Setting = Any  # a number, a tensor with one per output, or a distribution: then it is learned
Noise = Mapping[str, Tensor]


class Likelihood:
    """Outputs of a net to the distribution of the targets."""

    outputs_per_target: int | None = 1  # None: one for each class

    def learned(self) -> dict[str, Any]:
        """Names of the sites of the noise and their priors."""
        return {
            name: value for name, value in vars(self).items() if isinstance(value, torch.distributions.Distribution)
        }

    def sample_noise(self, device: torch.device) -> dict[str, Tensor]:
        """Draws of what is learned, by ``pyro.sample``, on the device of the net."""
        return {name: pyro.sample(name, law_on(prior, device)) for name, prior in self.learned().items()}

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """The law of each number of the targets, its batch shape that of the targets."""
        raise NotImplementedError

    def law(self, outputs: Tensor, noise: Noise | None = None, mask: Tensor | None = None) -> Any:
        """The law of the targets, with batch shape ``(rows,)``.

        :param outputs: of the net.
        :param noise: values of what is learned.
        :param mask: of the rows, or of the targets' shape: False leaves a target out of the likelihood.
        """
        law = self.elementwise(_without_ones(outputs, self.outputs_per_target), noise or {})
        events = len(law.batch_shape) - 1
        if mask is not None and mask.dim() > 1:
            return law.mask(mask.reshape(law.batch_shape)).to_event(events)
        law = law.to_event(events)
        return law if mask is None else law.mask(mask)

    def targets(self, y: Tensor, outputs: Tensor, mask: Tensor | None = None) -> Tensor:
        """``y`` in the shape and precision of the law of these outputs, with zeros where the mask leaves out."""
        y = y.reshape(len(y), *_target_shape(outputs.shape, self.outputs_per_target))
        y = y.to(torch.long if self.outputs_per_target is None else outputs.dtype)
        if mask is not None:
            y = torch.where(as_entries(mask, y), y, torch.zeros((), dtype=y.dtype, device=y.device))
        return y

    def weights(self, y: Tensor, dtype: torch.dtype) -> Tensor | None:
        """How many times each row counts, None for once."""
        del y, dtype
        return None

    def range_of(self, outputs_shape: torch.Size) -> Any:
        """What the targets may be; see :mod:`bnn.target_checks`."""
        del outputs_shape
        return real_targets()

    def check(self, outputs_shape: Sequence[int], y: Tensor, mask: Tensor | None = None) -> None:
        """See that targets suit the likelihood and the net.

        :param outputs_shape: shape of the net's outputs for as many rows as it may be.
        :param y: targets, of other rows if need be.
        :param mask: where False, the target may be anything.
        :raises ValueError: if their shape, precision or values do not suit.
        """
        shape = torch.Size(outputs_shape)
        name = type(self).__name__
        check_outputs(name, shape, self.outputs_per_target)
        wanted = _target_shape(shape, self.outputs_per_target)
        check_shape(name, y, mask, wanted, shape)
        check_values(name, y, mask, self.range_of(shape))


def _without_ones(outputs: Tensor, per_target: int | None) -> Tensor:
    """``(N, 1)`` as ``(N,)``, where each output is a target's."""
    return outputs.squeeze(-1) if per_target == 1 and outputs.dim() == 2 and outputs.shape[-1] == 1 else outputs


def _target_shape(outputs: torch.Size, per_target: int | None) -> torch.Size:
    """Shape of one row's targets."""
    row = outputs[1:]
    if per_target is None:
        return row[:-1]
    if per_target == 2:
        row = torch.Size([*row[:-1], row[-1] // 2])
    return torch.Size([]) if row == (1,) else row


@dataclass(frozen=True, eq=False)
class Gaussian(Likelihood):
    """Real targets with Normal noise of the same size everywhere.

    :param scale: standard deviation: a number (0.1 if no precision is given), a tensor with one per output, or the
        distribution that it is learned from, such as ``dist.HalfCauchy(1.)`` or ``dist.LogNormal(-1., 1.)``.
    :param precision: instead of the scale, 1 / scale², as ``dist.Gamma(6., 6.)``.
    :raises ValueError: if both are given, or one is not positive.

    >>> import torch
    >>> law = Gaussian(0.5).law(torch.zeros(10, 1))
    >>> law.batch_shape, law.event_shape, law.stddev[0]
    (torch.Size([10]), torch.Size([]), tensor(0.5000))
    >>> Gaussian(0.5).law(torch.zeros(10, 3)).event_shape
    torch.Size([3])
    """

    scale: Setting = None
    precision: Setting = None

    def __post_init__(self) -> None:
        if self.scale is not None and self.precision is not None:
            raise ValueError("Gaussian: both scale and precision were given, and one follows from the other: give one.")
        if self.precision is None:
            object.__setattr__(self, "scale", 0.1 if self.scale is None else self.scale)
        check_setting(self, "scale" if self.precision is None else "precision")

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """N(output, scale²)."""
        if self.precision is None:
            return dist.Normal(outputs, _value(self, "scale", noise, outputs))
        return dist.Normal(outputs, _value(self, "precision", noise, outputs).rsqrt())


@dataclass(frozen=True, eq=False)
class HeteroscedasticGaussian(Likelihood):
    """Real targets whose noise depends on the inputs: the net has two outputs for each target.

    The first half of the outputs' last dimension are the means; the second half, passed through
    ``min_scale + softplus``, the standard deviations.

    :param min_scale: least standard deviation: without it a row that is fitted exactly has infinite likelihood.
    :raises ValueError: unless it is positive.
    """

    min_scale: float = 1e-3
    outputs_per_target = 2

    def __post_init__(self) -> None:
        check_setting(self, "min_scale", learnable=False)

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """N(first half, (min_scale + softplus(second half))²)."""
        del noise
        loc, raw = (_without_ones(half, 1) for half in outputs.chunk(2, -1))
        return dist.Normal(loc, self.min_scale + softplus(raw))


@dataclass(frozen=True, eq=False)
class StudentT(Likelihood):
    """Real targets with outliers.

    :param df: degrees of freedom: the variance is scale² df / (df - 2) above 2.
    :param scale: width of the noise: a number, a tensor with one per output, or a distribution.
    :raises ValueError: unless both are positive.
    """

    df: float = 4.0
    scale: Setting = 0.1

    def __post_init__(self) -> None:
        check_setting(self, "df", learnable=False)
        check_setting(self, "scale")

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """Student's t about the output."""
        return dist.StudentT(outputs.new_full((), self.df), outputs, _value(self, "scale", noise, outputs))


@dataclass(frozen=True, eq=False)
class Categorical(Likelihood):
    """One of C classes, 0 to C - 1; the outputs are logits, the last dimension the classes.

    :param class_weights: how many times a row of each class counts in the likelihood, for instance the inverse of the
        class's share. Sums other than the plain one make the posterior that of no model; the predictive distribution
        is still that of the logits. Log-likelihoods for LOO do not carry them.
    :raises ValueError: unless all are positive.
    """

    class_weights: Sequence[float] | Tensor | None = None
    outputs_per_target = None

    def __post_init__(self) -> None:
        if self.class_weights is None:
            return
        weights = torch.as_tensor(self.class_weights, dtype=torch.float64)
        if weights.dim() != 1 or not (weights > 0).all() or not torch.isfinite(weights).all():
            raise ValueError(
                f"Categorical: class_weights is {self.class_weights!r}; give one finite number above 0 for each class."
            )
        object.__setattr__(self, "class_weights", tuple(weights.tolist()))

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """Categorical with these logits."""
        del noise
        return dist.Categorical(logits=outputs)

    def weights(self, y: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The weight of each row's class."""
        if self.class_weights is None:
            return None
        return torch.tensor(self.class_weights, dtype=dtype, device=y.device)[y]

    def range_of(self, outputs_shape: torch.Size) -> Any:
        """Whole numbers from 0 to C - 1."""
        weights = self.class_weights
        if weights is not None and len(weights) != outputs_shape[-1]:
            raise ModelError(
                f"Categorical: class_weights has {len(weights)} numbers, but the net returns "
                f"{outputs_shape[-1]} logits per target: give one weight for each class."
            )
        if weights is not None and len(outputs_shape) > 2:
            raise ModelError(
                f"Categorical: class_weights count rows, but the net returns {tuple(outputs_shape)}, several targets "
                "per row: leave them out, or make each target a row of its own."
            )
        return class_targets(outputs_shape[-1])


@dataclass(frozen=True, eq=False)
class Bernoulli(Likelihood):
    """Targets 0 or 1; the outputs are logits. Several outputs per row are as many independent labels."""

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """Bernoulli with these logits."""
        del noise
        return dist.Bernoulli(logits=outputs)

    def range_of(self, outputs_shape: torch.Size) -> Any:
        """Zero and one."""
        return zero_or_one()


@dataclass(frozen=True, eq=False)
class Poisson(Likelihood):
    """Counts; the outputs are logarithms of their means."""

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """Poisson of mean exp(output)."""
        del noise
        return dist.Poisson(outputs.exp())

    def range_of(self, outputs_shape: torch.Size) -> Any:
        """Whole numbers from 0."""
        return counts()


@dataclass(frozen=True, eq=False)
class NegativeBinomial(Likelihood):
    """Counts that scatter more than Poisson's: mean μ = exp(output), variance μ + μ² / concentration.

    :param concentration: a number, a tensor with one per output, or the distribution that it is learned from, such as
        ``dist.Gamma(2., 1.)``; Poisson is the limit of large ones.
    :raises ValueError: unless it is positive.
    """

    concentration: Setting = 1.0

    def __post_init__(self) -> None:
        check_setting(self, "concentration")

    def elementwise(self, outputs: Tensor, noise: Noise) -> Any:
        """Negative binomial with this mean."""
        concentration = _value(self, "concentration", noise, outputs)
        return dist.NegativeBinomial(concentration, logits=outputs - concentration.log())

    def range_of(self, outputs_shape: torch.Size) -> Any:
        """Whole numbers from 0."""
        return counts()


def _value(likelihood: Any, name: str, noise: Noise, outputs: Tensor) -> Tensor:
    """A setting as a tensor: what was drawn for it, or what it is."""
    value = noise.get(name, getattr(likelihood, name))
    if isinstance(value, torch.distributions.Distribution):
        raise ValueError(
            f"{type(likelihood).__name__} learns its {name}: give its value, law(outputs, {{{name!r}: ...}})."
        )
    value = torch.as_tensor(value, dtype=outputs.dtype, device=outputs.device)
    return value.squeeze(-1) if value.shape == (1,) else value
