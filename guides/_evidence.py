"""The evidence of a Laplace approximation, as a function of prior precisions and of the noise.

    log p(D) ≈ log p(D | z*) + log p(z*) + ½ dim log 2π − ½ log |Λ|,       Λ = κ H + D

z* is the mode in unconstrained space, log p(z*) has the Jacobian of the constraints (MacKay 1992; Tierney and Kadane
1986). A precision τ takes the place of a Normal prior's own. A noise σ takes the place of the σ₀ of a Normal
likelihood: then κ = σ₀²/σ². The mode stays where it was found. Exact for a linear model with Normal noise at its mode.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bnn.guides._laplace_blocks import LaplaceBlock

LOG_2PI = math.log(2 * math.pi)


@dataclass
class Noise:
    """The Normal likelihood's standard deviation, where it is one number.

    :ivar scale: σ₀.
    :ivar count: numbers observed.
    :ivar site: the site, held at its point, that is σ₀; None for a number of the model.
    """

    scale: float
    count: int
    site: str | None


@dataclass
class Evidence:
    """What the evidence is made of.

    :ivar log_likelihood: at the mode.
    :ivar precisions: site with a Normal prior whose precision may be another -> this precision, flat.
    :ivar squares: the same sites -> squared distances of the mode from the prior's mean, flat.
    :ivar other_prior: log prior of all other sites, and Jacobians.
    :ivar curvatures: other sites -> diagonal of the curvature of minus the log prior.
    :ivar noise: of the likelihood; or in words why there is none.
    """

    log_likelihood: float
    precisions: dict[str, Tensor]
    squares: dict[str, Tensor]
    other_prior: float
    curvatures: dict[str, Tensor]
    noise: Noise | str

    def prior(self, precision: float | Tensor | Mapping[str, float | Tensor] | None) -> dict[str, Tensor]:
        """D by site, with these precisions in place of the prior's own.

        :raises ValueError: for numbers that are not positive, and for sites without such a prior.
        """
        result = {**self.curvatures, **self.precisions}
        if precision is None:
            return result
        given = precision if isinstance(precision, Mapping) else dict.fromkeys(self.precisions, precision)
        if not given:
            raise ValueError(f"no site has a Normal prior whose precision can be set, among {sorted(result)}.")
        for name, value in given.items():
            if name not in self.precisions:
                raise ValueError(
                    f"the prior precision of {name!r} cannot be set: choose among {sorted(self.precisions)}, the sites "
                    "with a Normal prior that depends on no other site of the approximation."
                )
            like = self.precisions[name]
            number = torch.as_tensor(value, dtype=like.dtype, device=like.device)
            if not bool((number > 0).all()):
                raise ValueError(f"the prior precision of {name!r} is {value}; give positive numbers.")
            if number.dim() and number.numel() not in (1, like.numel()):
                raise ValueError(
                    f"the prior precision of {name!r} has shape {tuple(number.shape)}; give one number, or one for "
                    f"each of its {like.numel()} entries."
                )
            result[name] = number.reshape(-1).expand(like.numel())
        return result

    def weight(self, noise: float | Tensor | None) -> Tensor | float:
        """κ."""
        if noise is None:
            return 1.0
        if isinstance(self.noise, str):
            raise ValueError(f"noise= cannot be given: {self.noise}.")
        if not float(torch.as_tensor(noise).detach()) > 0:
            raise ValueError(f"noise is {noise}; give a positive standard deviation.")
        return (self.noise.scale / noise) ** 2

    def __call__(self, blocks: Sequence[LaplaceBlock], prior: Mapping[str, Tensor], weight: Tensor | float) -> Tensor:
        """The log evidence.

        :param blocks: H.
        :param prior: of :meth:`prior`.
        :param weight: of :meth:`weight`.
        """
        like = blocks[0].like
        total = like.new_tensor(self.log_likelihood, dtype=torch.float64)
        if not (isinstance(weight, float) and weight == 1.0):
            assert isinstance(self.noise, Noise)
            count, scale = self.noise.count, self.noise.scale
            # −n (½ log 2π + log σ₀) − SSE / 2σ₀²
            halves = -(total + count * (0.5 * LOG_2PI + math.log(scale)))
            weight = torch.as_tensor(weight)
            total = -count * (0.5 * LOG_2PI + math.log(scale) - 0.5 * weight.log()) - halves * weight
        total = total + self.other_prior
        for name, squares in self.squares.items():
            precision = prior[name].double()
            total = total + 0.5 * (precision.log() - precision * squares.double() - LOG_2PI).sum()
        for block in blocks:
            total = total + 0.5 * block.numel * LOG_2PI - 0.5 * block.log_det(prior, weight).double()
        return total


def maximize(
    evidence: Evidence,
    blocks: Sequence[LaplaceBlock],
    start: Mapping[str, Tensor],
    groups: Sequence[Sequence[str]],
    noise: float | None,
    steps: int,
) -> tuple[dict[str, Tensor], float | None, float]:
    """Multiply the prior precisions of each group, and the noise, so that the evidence is largest (L-BFGS).

    :param evidence: what is maximised.
    :param blocks: H.
    :param start: the prior precisions to start from.
    :param groups: sites whose precisions share a factor.
    :param noise: σ to start from, or None for a noise that stays.
    :param steps: at most so many iterations.
    :returns: prior precisions, noise and the log evidence.
    :raises RuntimeError: if it is not finite.
    """
    device = blocks[0].like.device
    logs = torch.zeros(len(groups) + (noise is not None), dtype=torch.float64, device=device, requires_grad=True)
    optimizer = torch.optim.LBFGS([logs], max_iter=steps, tolerance_grad=1e-9, line_search_fn="strong_wolfe")

    def current() -> tuple[dict[str, Tensor], Tensor | None]:
        prior = dict(start)
        for number, names in enumerate(groups):
            prior |= {name: (start[name] * logs[number].exp()).to(start[name].dtype) for name in names}
        return prior, None if noise is None else noise * logs[-1].exp()

    def loss() -> Tensor:
        optimizer.zero_grad()
        prior, sd = current()
        value = -evidence(blocks, prior, 1.0 if sd is None else evidence.weight(sd))
        if not bool(torch.isfinite(value)):
            raise RuntimeError(
                f"the log evidence is {-float(value)} at prior precisions multiplied by "
                f"{logs.exp().tolist()}: the curvature is not positive definite there; use curvature='ggn'."
            )
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
    with torch.no_grad():
        prior, sd = current()
        value = evidence(blocks, prior, 1.0 if sd is None else evidence.weight(sd))
        return {n: p.clone() for n, p in prior.items()}, None if sd is None else float(sd), float(value)
