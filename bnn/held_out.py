"""The scores of a posterior on data that it has not seen, in one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from bnn.pointwise import evaluate
from bnn.posterior_draws import draws_of
from bnn.prediction import MEMORY, Prediction, predict
from bnn.scoring import Score, classification_scores, regression_scores

# A posterior of fewer draws, such as an ensemble, gives several samples of y for each.
FEWEST_SAMPLES = 200


def score(
    posterior: Any,
    *args: Any,
    model: Callable[..., Any] | None = None,
    num_samples: int | None = None,
    memory: float = MEMORY,
    model_kwargs: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Score the posterior predictive on ``args``, inputs and targets: ``score(posterior, x, y)``.

    :func:`bnn.classification_scores` for a site with classes, :func:`bnn.regression_scores` for others, with one sample
    of y for each draw, or as many as make 200 together. The NLL is that of the mean over draws of the density of the
    targets, on the scale of y.

    :param posterior: as for :func:`bnn.predict`.
    :param args: arguments of the model, targets included, on held-out data.
    :param model: the model, where ``posterior`` does not know it.
    :param num_samples: number of draws.
    :param memory: bytes that may be held at once, besides a sample of y for each draw.
    :param model_kwargs: keyword arguments of the model.
    :return: score -> (value, standard error over rows); with several observed sites a dict of these, by site.
    :raises ValueError: as :func:`bnn.predict`, or if the arguments hold no targets, or masked rows.
    :raises ImportError: without torchmetrics and scoringrules, ``pip install "pyro-bnn[report]"``.

    >>> import pyro, torch, pyro.distributions as dist
    >>> import bnn
    >>> def model(x, y=None):
    ...     slope = pyro.sample("slope", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(x)):
    ...         pyro.sample("y", dist.Normal(slope * x, 0.5), obs=y)
    >>> x = torch.tensor([1., 2.])
    >>> scores = bnn.score({"slope": torch.ones(100)}, x, x + 0.5, model=model)
    >>> round(scores["nll"].value, 4), list(scores)[:3]
    (0.7258, ['rmse', 'mae', 'crps'])
    """
    kwargs = dict(model_kwargs or {})
    known = draws_of(posterior, model=model, num_samples=num_samples, args=args, kwargs=kwargs)
    run = (known.model, args, kwargs, known.values)
    observed = evaluate(*run, {"observed_data": True}).values.get("observed_data", {})
    if not observed:
        raise ValueError("the arguments hold no targets to score: call score(posterior, x, y).")
    densities = evaluate(*run, {"log_likelihood": True}).values["log_likelihood"]
    for name, density in densities.items():
        masked = int((density == 0.0).all(0).sum()) if density.dim() > 1 else 0
        if masked:
            raise ValueError(f"site {name!r} is masked in {masked} rows: score the rows that are not.")
    times = math.ceil(FEWEST_SAMPLES / len(next(iter(known.values.values()))))
    values = {name: value.repeat_interleave(times, 0) for name, value in known.values.items()}
    repeated = replace(known, values=values)
    found = predict(repeated, *args, sites=sorted(observed), samples=True, memory=memory, model_kwargs=kwargs)
    predictions = {found.name: found} if isinstance(found, Prediction) else found
    scores = {name: _scores(predictions[name], observed[name], densities[name]) for name in sorted(observed)}
    return next(iter(scores.values())) if len(scores) == 1 else scores


def _scores(prediction: Prediction, target: Any, log_likelihood: Any) -> dict[str, Score]:
    if prediction.probabilities is None:
        return regression_scores(prediction.samples, target, mean=prediction.mean, log_likelihood=log_likelihood)
    p = prediction.probabilities
    classes = p.shape[-1]
    labels = target.argmax(-1) if target.shape == p.shape else target  # one-hot targets
    whole_rows = log_likelihood if log_likelihood.shape[1:] == labels.shape and labels.dim() == 1 else None
    return classification_scores(p.reshape(-1, classes), labels.reshape(-1).long(), log_likelihood=whole_rows)
