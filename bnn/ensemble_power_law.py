"""How the loss of an ensemble falls with its size, and how to share out a budget of parameters among its members.

    NLL_n ≈ c + b nᵃ,      a < 0 < b

for the calibrated NLL of n nets of one width, and of one net as its width grows (Lobacheva et al. 2020, NeurIPS), each
n calibrated by a temperature of its own (:mod:`bnn.temperature_scaling`). c is what no number of members would better.

Of a budget of parameters an ensemble takes a part for each member: one wide net, or many narrow ones. With a law fitted
for each width, the split with the lowest NLL is read off; the larger the budget, the more members it has.

A power law is an observation, not a theorem. For independent members the loss of an average goes like c + b/n in the
end; over the sizes that one has, members that disagree much give a slower law. Outside those sizes it is a guess.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.optimize import curve_fit

from bnn.predictive_arrays import class_labels, finite_array, whole_number
from bnn.scoring import Score, mean_score
from bnn.temperature_scaling import calibrated_nll

# Exponents that the search starts from.
EXPONENTS = -np.geomspace(0.02, 8.0, 40)


@dataclass(frozen=True)
class PowerLaw:
    """A fitted law c + b nᵃ.

    :ivar c: the value in the limit.
    :ivar b: what it lies above that at n = 1.
    :ivar a: the exponent, below zero.
    :ivar covariance: of (c, b, a), by the curvature of the least squares; infinite for three sizes without errors.
    """

    c: float
    b: float
    a: float
    covariance: np.ndarray

    def __call__(self, size: Any) -> Any:
        """The law at one size or an array of them."""
        return self.c + self.b * np.asarray(size, dtype=float) ** self.a

    def error(self, size: Any) -> np.ndarray:
        """Standard error of the law there, to first order in the parameters' errors."""
        n = np.asarray(size, dtype=float)
        slope = np.stack([np.ones_like(n), n**self.a, self.b * n**self.a * np.log(n)], -1)
        return np.asarray(np.sqrt(np.einsum("...i,ij,...j->...", slope, self.covariance, slope)))


def fit_power_law(sizes: Any, values: Any, errors: Any = None) -> PowerLaw:
    """Fit c + b nᵃ with a < 0 < b by least squares.

    :param sizes: n, three different ones or more: numbers of members, or widths.
    :param values: the loss at each, such as the calibrated NLL.
    :param errors: standard errors of the values, taken as they are; without, their scatter is found from the residuals.
    :raises ValueError: if the shapes do not fit, sizes are too few, or the values do not fall.
    :raises RuntimeError: if the fit does not converge.

    >>> import numpy as np
    >>> from bnn import fit_power_law
    >>> n = np.array([1, 2, 4, 8, 16])
    >>> law = fit_power_law(n, 0.5 + 0.3 / n)
    >>> round(law.c, 6), round(law.b, 6), round(law.a, 6), round(float(law(100)), 6)
    (0.5, 0.3, -1.0, 0.503)
    """
    n, y = finite_array("sizes", sizes), finite_array("values", values)
    if n.ndim != 1 or n.shape != y.shape:
        raise ValueError(f"sizes have shape {n.shape} and values {y.shape}; give two sequences of one length.")
    if n.min() <= 0.0 or len(np.unique(n)) < 3:
        raise ValueError(f"sizes are {n.tolist()}; give three different positive ones or more.")
    sigma = None if errors is None else finite_array("errors", errors)
    if sigma is not None and (sigma.shape != n.shape or not (sigma > 0.0).all()):
        raise ValueError(f"errors have shape {sigma.shape}; give one positive number for each of the {len(n)} values.")
    weight = np.ones_like(n) if sigma is None else 1.0 / sigma

    def given_exponent(a: float) -> tuple[float, np.ndarray]:
        design = np.stack([np.ones_like(n), n**a], -1) * weight[:, None]
        found = np.linalg.lstsq(design, y * weight, rcond=None)[0]
        return float(np.square(design @ found - y * weight).sum()), found

    a, (_, (c, b)) = min(((a, given_exponent(a)) for a in EXPONENTS), key=lambda pair: pair[1][0])
    if not b > 0.0:
        raise ValueError("the values do not fall with size, as c + b nᵃ with a < 0 < b does: check their order.")
    through_all = len(n) == 3 and sigma is None  # as many parameters as values
    with np.errstate(over="ignore"):
        found, covariance = curve_fit(
            lambda n, c, b, a: c + b * n**a,
            n,
            y,
            p0=(c, b, a),
            sigma=sigma,
            absolute_sigma=sigma is not None or through_all,
            bounds=([-np.inf, 0.0, -20.0], [np.inf, np.inf, 0.0]),
            ftol=1e-15,
            xtol=1e-15,
            gtol=1e-15,
            max_nfev=20_000,
        )
    if through_all:
        covariance = np.full((3, 3), np.inf)
    return PowerLaw(float(found[0]), float(found[1]), float(found[2]), covariance)


def ensemble_nll(
    log_probabilities: Any,
    labels: Any,
    sizes: Sequence[int],
    *,
    protocol: str = "after",
    repeats: int = 5,
    folds: int = 2,
) -> dict[int, Score]:
    """The calibrated NLL of ensembles of each size, out of the members that there are.

    Members are taken at random without replacement, as many disjoint groups as there are, and the NLL is the mean over
    groups. Its standard error is that over groups; where there is one group only, that over rows.

    :param log_probabilities: of test rows, ``(members, rows, classes)``: logarithms of probabilities, or logits.
    :param labels: ``(rows,)``.
    :param sizes: numbers of members.
    :param protocol: ``"after"`` or ``"before"`` averaging, as of :func:`bnn.calibrated_nll`.
    :param repeats: random splits of the rows.
    :param folds: parts into which they are split.
    :raises ValueError: for sizes out of range, or arrays that do not fit.

    >>> import torch
    >>> from bnn import ensemble_nll
    >>> _ = torch.manual_seed(0)
    >>> labels = torch.randint(3, (200,))
    >>> logits = torch.nn.functional.one_hot(labels, 3) + torch.randn(8, 200, 3)
    >>> found = ensemble_nll(logits, labels, [1, 2, 4, 8])
    >>> found[1].value > found[2].value > found[4].value > found[8].value
    True
    """
    given = finite_array("log_probabilities", log_probabilities)
    if given.ndim != 3:
        raise ValueError(f"log_probabilities have shape {given.shape}; wanted is (members, rows, classes).")
    y, members = class_labels(labels, *given.shape[1:]), len(given)
    result = {}
    for size in sizes:
        if whole_number("each of sizes", size, 1) > members:
            raise ValueError(f"sizes hold {size}, but there are {members} members.")
        order = torch.randperm(members).numpy()
        groups = [order[i : i + size] for i in range(0, members - size + 1, size)]
        scores = [calibrated_nll(given[g], y, protocol=protocol, folds=folds, repeats=repeats).score for g in groups]
        result[int(size)] = scores[0] if len(scores) == 1 else mean_score(np.array([score.value for score in scores]))
    return result


class MemorySplit(NamedTuple):
    """How to spend a budget of parameters.

    :ivar width: of the best split.
    :ivar members: its number of nets.
    :ivar nll: its predicted NLL, with the standard error of the law there.
    :ivar table: width -> (members, predicted NLL), of all widths of which a net fits.
    """

    width: float
    members: int
    nll: Score
    table: dict[float, tuple[int, Score]]


def memory_split(
    laws: Mapping[Any, Callable[[int], Any]], parameters: Callable[[Any], float] | Mapping[Any, float], budget: float
) -> MemorySplit:
    """The width and the number of members with the lowest predicted NLL among those that fit into a budget.

    :param laws: width -> the law of its ensembles: a :class:`PowerLaw` in the number of members.
    :param parameters: of one net of a width: a function or a mapping.
    :param budget: number of parameters of all members together.
    :raises ValueError: if no net fits.

    >>> import numpy as np
    >>> from bnn import fit_power_law, memory_split
    >>> n = np.array([1, 2, 4, 8])
    >>> laws = {10: fit_power_law(n, 0.5 + 0.3 / n), 30: fit_power_law(n, 0.45 + 0.2 / n)}
    >>> [memory_split(laws, lambda width: 100 * width, budget)[:2] for budget in (1000, 4000, 64000)]
    [(10, 1), (10, 4), (30, 21)]
    """
    if not laws:
        raise ValueError("laws are empty: give one for each width.")
    if not 0.0 < budget < math.inf:
        raise ValueError(f"budget is {budget!r}; give a positive number of parameters.")
    table: dict[float, tuple[int, Score]] = {}
    for width, law in laws.items():
        cost = float(parameters[width] if isinstance(parameters, Mapping) else parameters(width))
        if not 0.0 < cost < math.inf:
            raise ValueError(f"a net of width {width} has {cost!r} parameters; give a positive number.")
        members = int(budget / cost * (1.0 + 1e-12))
        if members:
            error = float(law.error(members)) if isinstance(law, PowerLaw) else math.nan
            table[width] = members, Score(float(law(members)), error)
    if not table:
        raise ValueError(f"no net fits into {budget:g} parameters: give a larger budget, or laws of narrower nets.")
    width = min(table, key=lambda key: table[key][1].value)
    return MemorySplit(width, *table[width], table)
