"""PAC-Bayes certificates: an upper bound on the risk of a randomised classifier that holds with stated confidence.

For losses in [0, 1], n independent rows that the prior P has not seen, and every Q at once, with probability 1 − δ,

    kl(R̂(Q) | R(Q)) ≤ c = (KL(Q|P) + log(2√n/δ)) / n            (Langford and Seeger 2001; Maurer 2004)

    inverted     R ≤ kl⁻¹(R̂, c) = sup {p : kl(R̂ | p) ≤ c}
    f_classic    R̂ + √(c/2)
    f_quad       (√(R̂ + c/2) + √(c/2))²
    f_lambda     min over λ in (0, 2) of R̂ / (1 − λ/2) + c / (λ (1 − λ/2))

(Pérez-Ortiz et al. 2021, JMLR 22; Thiemann et al. 2017, ALT). The last three are looser and can be trained on; f_lambda
and f_quad have the same minimum over λ. R̂(Q), an expectation over weights, is itself bounded from m draws of them: with
probability 1 − δ', R̂ ≤ kl⁻¹(R̂_m, log(2/δ')/m), so that the whole holds with 1 − δ − δ'.

What is certified is the risk of a net with fresh weights for each input, not that of the averaged predictive; of the
0-1 loss the majority vote is wrong at most twice as often.

The prior may be learnt, from rows that the bound does not count; the model of the guide then holds it as its prior.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import rel_entr

from bnn.code_length import kl_to_prior
from bnn.guide_draws import GuideRun
from bnn.prediction import predict
from bnn.predictive_arrays import class_labels, finite_array, whole_number

# Draws whose predictions are held at once.
BLOCK = 50


def kl_inverse(risk: float, budget: float) -> float:
    """The largest p with kl(risk | p) ≤ budget, for Bernoulli laws.

    :param risk: in [0, 1].
    :param budget: nats, zero or more.
    :raises ValueError: for numbers out of range.

    >>> from bnn import kl_inverse
    >>> round(kl_inverse(0.0, 0.1), 6)  # 1 − exp(−0.1)
    0.095163
    """
    if not 0.0 <= risk <= 1.0:
        raise ValueError(f"risk is {risk!r}; give the mean of losses in [0, 1].")
    if not budget >= 0.0:
        raise ValueError(f"budget is {budget!r}; give (KL + log(2√n/δ))/n, not below zero.")
    if budget == 0.0 or risk == 1.0:
        return float(risk)
    if math.isinf(budget):
        return 1.0

    def excess(p: float) -> float:
        return float(rel_entr(risk, p) + rel_entr(1.0 - risk, 1.0 - p)) - budget

    highest = math.nextafter(1.0, 0.0)
    return 1.0 if excess(highest) <= 0.0 else float(brentq(excess, risk, highest, xtol=1e-15, rtol=1e-14))


@dataclass(frozen=True)
class PACBayesBounds:
    """Upper bounds on one risk.

    :ivar inverted: by inversion of kl: the tightest.
    :ivar f_classic: by Pinsker's inequality.
    :ivar f_quad: by the refined inequality of Pinsker.
    :ivar f_lambda: the same, as a minimum over λ.
    :ivar lam: that λ.
    :ivar empirical: R̂, or its bound from draws.
    :ivar kl: KL(Q|P), nats.
    :ivar num_data: n.
    :ivar confidence: with which they hold.
    """

    inverted: float
    f_classic: float
    f_quad: float
    f_lambda: float
    lam: float
    empirical: float
    kl: float
    num_data: int
    confidence: float


def pac_bayes_bounds(
    risk: float | Sequence[float], kl: float, num_data: int, *, delta: float = 0.025, delta_draws: float = 0.01
) -> PACBayesBounds:
    """Bounds on the risk out of its empirical value and a KL.

    :param risk: R̂(Q) where it is known exactly; or a sequence of the empirical risks of independent draws from Q,
        from which it is bounded first.
    :param kl: KL(Q|P), nats; not an estimate of it.
    :param num_data: n: the rows that the risk is a mean over. The prior must not have seen them.
    :param delta: the probability that the bound fails by bad luck with the data.
    :param delta_draws: the same with the draws, where there are any.
    :raises ValueError: for losses outside [0, 1], a negative or infinite KL, and other numbers out of range.

    >>> from bnn import pac_bayes_bounds
    >>> bounds = pac_bayes_bounds(0.05, kl=20.0, num_data=1000)
    >>> round(bounds.inverted, 3), round(bounds.f_quad, 3), round(bounds.f_classic, 3)
    (0.118, 0.137, 0.168)
    """
    num_data = whole_number("num_data", num_data, 1)
    for name, value in (("delta", delta), ("delta_draws", delta_draws)):
        if not 0.0 < value < 1.0:
            raise ValueError(f"{name} is {value!r}; give a probability between 0 and 1.")
    if not 0.0 <= kl < math.inf:
        raise ValueError(f"kl is {kl!r}; give a finite KL(Q|P) in nats, not below zero.")
    risks = finite_array("risk", risk)
    if risks.ndim > 1:
        raise ValueError(f"risk has shape {risks.shape}; give one number, or one for each draw.")
    if risks.min() < 0.0 or risks.max() > 1.0:
        raise ValueError(
            f"risk holds {float(risks.min() if risks.min() < 0.0 else risks.max()):.4g}: the bounds hold for losses in "
            "[0, 1] only. Take the 0-1 loss, or one that is clamped and divided by its largest value."
        )
    empirical, confidence = float(risks.mean()), 1.0 - delta
    if risks.ndim:
        empirical = kl_inverse(empirical, math.log(2.0 / delta_draws) / len(risks))
        confidence -= delta_draws
    budget = (kl + math.log(2.0 * math.sqrt(num_data) / delta)) / num_data
    lam = 2.0 / (math.sqrt(2.0 * empirical / budget + 1.0) + 1.0)
    return PACBayesBounds(
        inverted=kl_inverse(empirical, budget),
        f_classic=empirical + math.sqrt(budget / 2.0),
        f_quad=(math.sqrt(empirical + budget / 2.0) + math.sqrt(budget / 2.0)) ** 2,
        f_lambda=empirical / (1.0 - lam / 2.0) + budget / (lam * (1.0 - lam / 2.0)),
        lam=lam,
        empirical=empirical,
        kl=float(kl),
        num_data=num_data,
        confidence=confidence,
    )


def risk_certificate(
    guide: Any,
    x: torch.Tensor,
    y: torch.Tensor,
    *,
    prior_rows: Any,
    bound_rows: Any = None,
    loss: str = "zero_one",
    least_probability: float = 1e-4,
    num_draws: int = 1000,
    delta: float = 0.025,
    delta_draws: float = 0.01,
    model_kwargs: Mapping[str, Any] | None = None,
) -> PACBayesBounds:
    """A certificate of the risk of a guide's classifier, Q the guide and P the prior of its model.

    Q may have been trained on all rows, P on ``prior_rows`` only: say so honestly, or the certificate is void.

    :param guide: a guide whose KL to the prior is known in closed form, as of Normals to Normals.
    :param x: inputs of all rows; the model is called as ``model(x)`` and ``model(x, y)``.
    :param y: labels of all rows.
    :param prior_rows: numbers of the rows that the prior was learnt or chosen from; ``[]`` for a prior that saw none.
    :param bound_rows: numbers of the rows that the bound counts; all others by default.
    :param loss: ``"zero_one"``, or ``"cross_entropy"``, clamped at ``least_probability`` and divided by its largest
        value.
    :param least_probability: of the cross-entropy.
    :param num_draws: m, draws from the guide.
    :param delta: as of :func:`pac_bayes_bounds`.
    :param delta_draws: as of :func:`pac_bayes_bounds`.
    :param model_kwargs: keyword arguments of the model.
    :raises ValueError: where the bound's rows include some of the prior's, or a setting is wrong.
    :raises NotImplementedError: where the KL is not known in closed form.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import AutoFactorizedNormal
    >>> pyro.set_rng_seed(0)
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2))
    >>> guide = AutoFactorizedNormal(bnn.bayesian(net, likelihood=bnn.likelihoods.Categorical()))
    >>> x = torch.randn(100, 2)
    >>> found = bnn.risk_certificate(guide, x, (x.sum(1) > 0).long(), prior_rows=range(20), num_draws=100)
    >>> found.num_data, bool(found.empirical < found.inverted <= 1.0)
    (80, True)
    """
    if loss not in ("zero_one", "cross_entropy"):
        raise ValueError(f"loss is {loss!r}; give 'zero_one' or 'cross_entropy'.")
    if not 0.0 < least_probability < 1.0:
        raise ValueError(f"least_probability is {least_probability!r}; give a number between 0 and 1, say 1e-4.")
    rows = _bound_rows(len(x), prior_rows, bound_rows)
    kwargs = dict(model_kwargs or {})
    kl = kl_to_prior(guide, x, y, **kwargs)
    if kl.error > 0.0:
        raise NotImplementedError(
            "the KL from the guide to its model's prior is not known in closed form, and an estimate certifies "
            "nothing: take AutoFactorizedNormal, and Normal priors with fixed numbers."
        )
    chosen, labels = x[rows], y[rows]
    draws = GuideRun(guide, (x, y), kwargs, whole_number("num_draws", num_draws, 1)).get_samples()
    risks = np.concatenate(
        [
            _risks({name: value[i : i + BLOCK] for name, value in draws.items()}, guide.model, chosen, labels, kwargs,
                   loss, least_probability)
            for i in range(0, num_draws, BLOCK)
        ]
    )  # fmt: skip
    return pac_bayes_bounds(risks, kl.value, len(rows), delta=delta, delta_draws=delta_draws)


def _risks(
    draws: Mapping[str, torch.Tensor],
    model: Callable[..., Any],
    x: torch.Tensor,
    y: torch.Tensor,
    kwargs: Mapping[str, Any],
    loss: str,
    least: float,
) -> np.ndarray:
    """The empirical risk of each draw."""
    found = predict(draws, x, model=model, draws=True, model_kwargs=kwargs)
    if isinstance(found, dict) or found.probabilities is None:
        raise ValueError("the model does not observe one site with classes: certificates are for classification.")
    p = found.draws.double().numpy()
    if p.ndim != 3:
        raise ValueError(f"the model predicts {p.shape[1:-1]} labels; a certificate is of one label for each row.")
    labels = class_labels(y.reshape(-1) if y.numel() == len(x) else y, *p.shape[1:])
    if loss == "zero_one":
        return np.asarray((p.argmax(-1) != labels).mean(1))
    taken = np.maximum(p[:, np.arange(len(labels)), labels], least)
    return np.asarray((np.log(taken) / math.log(least)).mean(1))


def _bound_rows(count: int, prior_rows: Any, bound_rows: Any) -> torch.Tensor:
    """The rows of the bound.

    :raises ValueError: if they overlap with the prior's, repeat, or do not exist.
    """
    prior = _row_numbers("prior_rows", prior_rows, count)
    rows = sorted(set(range(count)) - prior) if bound_rows is None else _row_numbers("bound_rows", bound_rows, count)
    shared = prior.intersection(rows)
    if shared:
        raise ValueError(
            f"{len(shared)} rows, {min(shared)} for instance, are both in prior_rows and in bound_rows: a prior that "
            "has seen rows of the bound makes it void. Learn the prior from rows that the bound leaves out."
        )
    if not rows:
        raise ValueError("no rows are left for the bound: the prior has seen all of them.")
    return torch.tensor(sorted(rows))


def _row_numbers(name: str, rows: Any, count: int) -> set[int]:
    array = np.asarray(rows.cpu() if isinstance(rows, torch.Tensor) else list(rows))
    if array.size == 0:
        return set()
    if array.dtype == bool or array.dtype.kind not in "iu" or array.ndim != 1:
        raise ValueError(f"{name} are not whole numbers; give the numbers of the rows, as in range(500).")
    if array.min() < 0 or array.max() >= count:
        raise ValueError(f"{name} run from {array.min()} to {array.max()}, but the rows from 0 to {count - 1}.")
    found = set(array.tolist())
    if len(found) != len(array):
        raise ValueError(f"{name} hold a row twice: each row counts once.")
    return found
