"""Posterior predictive of any Pyro model: averages over draws of the law of each observed site.

With p(y | x, z_s) the law under draw s of S (Bishop 2006, section 3.3.2; Depeweg et al. 2018):

    mean              (1/S) sum_s E[y | x, z_s]
    variance          aleatoric + epistemic = (1/S) sum_s Var[y | x, z_s] + Var_s E[y | x, z_s]
    probabilities     (1/S) sum_s p(y = k | x, z_s)
    entropy           of the mean probabilities = expected entropy of the draws + mutual information of y and z

The draws are vectorized and the rows go through in chunks, so that what is held at once stays below a bound; the means
and variances are those of the laws themselves, without any sampling of y.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bnn.log_joint import quiet_handlers
from bnn.observations import Target, place_of
from bnn.pointwise import Parts
from bnn.posterior_draws import draws_of
from bnn.predictive_chunks import LawsOverDraws
from bnn.structure import base_of

MEMORY = 1 << 29


@dataclass
class Prediction:
    """The posterior predictive of one site, on the CPU; the rows of the data lead.

    :ivar name: the site.
    :ivar num_draws: how many draws of the posterior were averaged.
    :ivar mean: predictive mean; None for more than two classes.
    :ivar sd: predictive standard deviation, noise included.
    :ivar epistemic: standard deviation of the draws' means: what the net does not know.
    :ivar aleatoric: root of the mean of the draws' variances: the noise. None, as ``epistemic``, if the law has no
        moments in closed form; then ``mean`` and ``sd`` are those of one sample per draw.
    :ivar probabilities: of the classes, last dimension; a Bernoulli site has the classes 0 and 1.
    :ivar entropy: of ``probabilities``, nats.
    :ivar expected_entropy: mean entropy of the draws' probabilities, nats: the aleatoric part.
    :ivar mutual_information: of y and the draw, nats: the epistemic part, the difference of these two (unless logits
        were averaged).
    :ivar quantiles: of one sample of y per draw, ``(levels, ...)``.
    :ivar levels: at which quantiles stand.
    :ivar samples: one sample of y per draw, ``(draws, ...)``.
    :ivar draws: each draw's mean or probabilities, ``(draws, ...)``.
    """

    name: str
    num_draws: int
    mean: Tensor | None = None
    sd: Tensor | None = None
    epistemic: Tensor | None = None
    aleatoric: Tensor | None = None
    probabilities: Tensor | None = None
    entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    quantiles: Tensor | None = None
    levels: tuple[float, ...] = ()
    samples: Tensor | None = None
    draws: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        """The most probable class of each row."""
        if self.probabilities is None:
            raise ValueError(f"site {self.name!r} has no classes: its prediction is in mean, sd and quantiles.")
        return self.probabilities.argmax(-1)

    def __repr__(self) -> str:
        shapes = {name: tuple(value.shape) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return f"Prediction({self.name!r}, {self.num_draws} draws, {shapes})"


def predict(
    posterior: Any,
    *args: Any,
    model: Callable[..., Any] | None = None,
    sites: Sequence[str] | None = None,
    num_samples: int | None = None,
    quantiles: Sequence[float] = (),
    samples: bool = False,
    draws: bool = False,
    average: str = "probabilities",
    memory: float = MEMORY,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The posterior predictive at ``args``, with which the model is called: ``predict(posterior, x)``.

    The model must be callable without its targets, as for ``pyro.infer.Predictive``: ``def model(x, y=None)``. Rows of
    the arguments that do not influence each other are computed in chunks. Class probabilities are averaged over the
    draws, never logits, unless ``average="logits"`` asks for it (then they are the normalised geometric mean of the
    draws' probabilities).

    :param posterior: a finished run of ours or Pyro's, a guide, ArviZ's data, a dict ``site -> (draws, *shape)``, a
        list of dicts ``site -> value`` (an ensemble), or the path of a store, of which a block is read at a time.
    :param args: arguments of the model: new inputs. Without any, those of the run.
    :param model: the model, where ``posterior`` does not know it.
    :param sites: the sites to be predicted; by default those that the run observed.
    :param num_samples: number of draws: of a run, evenly spaced (all by default); of a guide (1000 by default; of
        an ensemble each member once).
    :param quantiles: levels in (0, 1) at which quantiles of y are estimated from one sample per draw.
    :param samples: whether one sample of y per draw is kept.
    :param draws: whether each draw's mean or probabilities are kept.
    :param average: ``"probabilities"`` or ``"logits"``, for sites with classes.
    :param memory: bytes that may be held at once, besides the result; half a GiB by default.
    :param model_kwargs: keyword arguments of the model.
    :return: a :class:`Prediction`; with several observed sites a dict of them, by name.
    :raises ValueError: if the draws lack a latent site, the model cannot be called so, or a setting is wrong.
    :raises RuntimeError: before the run.

    >>> import pyro, torch, pyro.distributions as dist
    >>> import bnn
    >>> def model(x, y=None):
    ...     slope = pyro.sample("slope", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)
    >>> prediction = bnn.predict({"slope": torch.tensor([1., 3.])}, torch.tensor([0., 2.]), model=model)
    >>> prediction.mean, prediction.epistemic, prediction.aleatoric
    (tensor([0., 4.]), tensor([0., 2.]), tensor([0.5000, 0.5000]))
    """
    levels = _levels(quantiles)
    if average not in ("probabilities", "logits"):
        raise ValueError(f"average is {average!r}; give 'probabilities' (the posterior predictive) or 'logits'.")
    if not memory > 0:
        raise ValueError(f"memory is {memory!r}; give the bytes that may be held at once, say 2**29.")
    kwargs = dict(model_kwargs or {})
    known = draws_of(posterior, model=model, num_samples=num_samples, args=args, kwargs=kwargs)
    if not args and not kwargs:
        if not known.has_data:
            raise ValueError("give the model's arguments: predict(posterior, x); only a run knows its own data.")
        args, kwargs = known.args, dict(known.kwargs or {})
    count, per_draw = len(next(iter(known.values.values()))), {"samples": samples, "draws": draws}
    parts: dict[str, Parts] = {}
    with torch.no_grad(), quiet_handlers():
        laws = LawsOverDraws(known, args, kwargs, sites, memory, draw=bool(levels) or samples)
        for chunk, targets, values in laws:
            for name, target in targets.items():
                place = place_of(target, chunk)
                if place is not None:
                    fields = _fields(target, values[name], levels, average)
                    kept = {key: value for key, value in fields.items() if per_draw.get(key, True)}
                    for key, value in kept.items():
                        after = value.dim() - (key in LED_BY_DRAWS) - len(target.batch_shape)
                        shifted = {dim - after: start for dim, start in place.items()}
                        parts.setdefault(name, Parts()).add(key, value, shifted)
    found = {name: Prediction(name, count, levels=levels, **part.whole()) for name, part in parts.items()}
    for name, prediction in found.items():
        if prediction.mean is not None and torch.isnan(prediction.mean).any():
            warnings.warn(
                f"the law of site {name!r} has no mean in some rows, which are NaN: ask for quantiles=(0.05, 0.5).",
                RuntimeWarning,
                stacklevel=2,
            )
    return next(iter(found.values())) if len(found) == 1 else found


LED_BY_DRAWS = ("samples", "draws", "quantiles")


def _fields(target: Target, values: Mapping[str, Tensor], levels: tuple[float, ...], average: str) -> dict[str, Tensor]:
    """The fields of a :class:`Prediction` for one chunk of rows, from values that lead with the draws."""
    fields: dict[str, Tensor] = {}
    if "log_probability" in values:
        fields = of_classes(values["log_probability"], average)
        if type(base_of(target.fn)).__name__ == "Bernoulli":
            one = fields["draws"][..., 1]
            fields |= of_moments(one, one * (1 - one)) | {"draws": fields["draws"]}
    elif "mean" in values:
        fields = of_moments(values["mean"], values["variance"])
    else:
        sample = _floating(values["sample"])
        fields = {"mean": sample.mean(0), "sd": sample.std(0, correction=0)}
    if "sample" in values:
        fields["samples"] = values["sample"]
        if levels:
            sample = _floating(values["sample"])
            fields["quantiles"] = torch.stack([_quantile(sample, level) for level in levels])
    return fields


def of_moments(mean: Tensor, variance: Tensor) -> dict[str, Tensor]:
    """Fields of a :class:`Prediction` from the draws' means and variances, which lead with the draws."""
    epistemic, aleatoric = mean.var(0, correction=0), variance.mean(0)
    return {
        "mean": mean.mean(0),
        "sd": (epistemic + aleatoric).sqrt(),
        "epistemic": epistemic.sqrt(),
        "aleatoric": aleatoric.sqrt(),
        "draws": mean,
    }


def of_classes(log_probability: Tensor, average: str) -> dict[str, Tensor]:
    """Fields of a :class:`Prediction` from the draws' log probabilities, which lead with the draws."""
    probability = log_probability.exp()
    if average == "logits":
        averaged = log_probability.mean(0).softmax(-1)
    else:
        averaged = probability.mean(0)
    entropy = torch.special.entr(averaged).sum(-1)
    expected = torch.special.entr(probability).sum(-1).mean(0)
    return {
        "probabilities": averaged,
        "entropy": entropy,
        "expected_entropy": expected,
        "mutual_information": torch.special.entr(probability.mean(0)).sum(-1).sub(expected).clamp(min=0.0),
        "draws": probability,
    }


def _quantile(samples: Tensor, level: float) -> Tensor:
    """torch.quantile refuses more than 16 million numbers."""
    place = level * (len(samples) - 1)
    low, part = math.floor(place), place - math.floor(place)
    ordered = samples.sort(0).values
    return torch.lerp(ordered[low], ordered[min(low + 1, len(samples) - 1)], part)


def _floating(values: Tensor) -> Tensor:
    return values if values.is_floating_point() else values.to(torch.get_default_dtype())


def _levels(quantiles: Sequence[float]) -> tuple[float, ...]:
    levels = tuple(float(level) for level in ([quantiles] if isinstance(quantiles, (int, float)) else quantiles))
    if not all(0 < level < 1 for level in levels):
        raise ValueError(f"quantiles are {quantiles!r}; give levels between 0 and 1, such as (0.05, 0.5, 0.95).")
    return levels
