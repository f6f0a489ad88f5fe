"""Metrics that a kernel learns in warm-up and keeps after it.

A metric is a positive definite matrix G = L Lᵀ: the preconditioner P of SGLD, the inverse mass M⁻¹ of the others. It is
learnt in windows of warm-up that double in length, as in Stan, and frozen after the last: a metric that went on
changing with the position would need a drift of its own (the Γ of :class:`~bnn.kernels.MaSDE`) to keep the target.

    DrawVariances    G = diag(variances of the draws)                              ``"auto"``
    DrawCovariance   G = covariance of the draws                                   ``"dense"``
    RMSprop          G ∝ 1 / (δ + √E[g²]) per coordinate, g minibatch gradients
    LayerWise        G ∝ 1 / √(mean E[g²]) per site
    Kronecker        G = (A ⊗ S + prior's precision)⁻¹ per weight; see :mod:`bnn.kernels.kronecker`

In RMSprop and LayerWise only ratios come from the gradients: G is scaled to a largest entry of one, so that a step
size keeps its meaning in the flattest coordinates. These and Kronecker have a first estimate before the first draw.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.welford import WelfordCovariance
from torch import Tensor

from bnn.kernels._metric import Metric, Scaling, Triangular
from bnn.kernels.schedules import check_setting
from bnn.potential import Potential

# The largest dimension for which a dense metric is kept: 2,000² numbers of 8 bytes are 32 MB.
LARGEST_DENSE = 2_000


class Learner(ABC):
    """What learns a metric in one run.

    :param potential: the recorded model.
    :ivar like: a vector of ``dim`` zeros in the precision and on the device of the chains.
    """

    needs_gradient = False
    knows_at_once = False  # whether a start is enough for a first estimate

    def __init__(self, potential: Potential) -> None:
        self.potential = potential
        self.like = torch.zeros(potential.dim, dtype=potential.dtype, device=potential.device)

    def made_anew(self) -> dict[str, Any]:
        """What it holds that is no part of its state, but made out of the model, by name."""
        return {}

    @abstractmethod
    def start(self) -> Metric:
        """The metric before anything is known, in the form that it will keep."""

    @abstractmethod
    def observe(self, position: Tensor, grad: Tensor | None) -> None:
        """Take in positions ``(chains, dim)`` and, where needed, minibatch gradients ∇Û there."""

    @abstractmethod
    def estimate(self) -> Metric:
        """The metric by what was observed since the last estimate."""


class Preconditioner(ABC):
    """How a metric is learnt: the settings, which a kernel keeps. Give one as ``mass=`` or ``preconditioner=``."""

    @abstractmethod
    def learner(self, potential: Potential) -> Learner:
        """What learns it in one run."""


# ---- from the draws


class _DrawLearner(Learner):
    def __init__(self, potential: Potential, dense: bool) -> None:
        super().__init__(potential)
        self.dense = dense
        self._welford = WelfordCovariance(diagonal=not dense)

    def start(self) -> Metric:
        return Triangular(torch.diag(torch.ones_like(self.like))) if self.dense else Scaling(torch.ones_like(self.like))

    def observe(self, position: Tensor, grad: Tensor | None) -> None:
        del grad
        for one in position.double():
            self._welford.update(one)

    def estimate(self) -> Metric:
        covariance = self._welford.get_covariance()  # shrunk a little towards a small unit matrix, as Stan does
        self._welford.reset()
        if self.dense:
            return Triangular(torch.linalg.cholesky(covariance).to(self.like))
        return Scaling(covariance.sqrt().to(self.like))


@dataclass(frozen=True)
class DrawVariances(Preconditioner):
    """The variance of each coordinate over the draws of warm-up: Stan's diagonal metric, ``"auto"`` for short.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import GGMC, MCMC, DrawVariances
    >>> def model():
    ...     pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([0.01, 10.])).to_event(1))
    >>> pyro.set_rng_seed(0)
    >>> mcmc = MCMC(GGMC(model, friction=1., mass=DrawVariances()), num_samples=500, num_chains=8, disable_progbar=True)
    >>> mcmc.run()
    >>> (mcmc.get_samples()["z"].std(0) / torch.tensor([0.01, 10.]) - 1).abs().max() < 0.2
    tensor(True)
    """

    def learner(self, potential: Potential) -> Learner:
        """What learns it in one run."""
        return _DrawLearner(potential, dense=False)


@dataclass(frozen=True)
class DrawCovariance(Preconditioner):
    """The covariance of the draws of warm-up: Stan's dense metric, ``"dense"`` for short. For small models.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import GGMC, MCMC, DrawCovariance
    >>> covariance = torch.tensor([[1., 0.99], [0.99, 1.]])
    >>> def model():
    ...     pyro.sample("z", dist.MultivariateNormal(torch.zeros(2), covariance))
    >>> pyro.set_rng_seed(0)
    >>> kernel = GGMC(model, friction=1., mass=DrawCovariance())
    >>> mcmc = MCMC(kernel, num_samples=500, num_chains=8, disable_progbar=True)
    >>> mcmc.run()
    >>> (mcmc.get_samples()["z"].T.cov() - covariance).abs().max() < 0.2
    tensor(True)
    """

    def learner(self, potential: Potential) -> Learner:
        """What learns it in one run.

        :raises ValueError: for a model of too many coordinates.
        """
        if potential.dim > LARGEST_DENSE:
            raise ValueError(
                f"a dense metric for {potential.dim} coordinates would hold {potential.dim**2:.1e} numbers (at most "
                f"{LARGEST_DENSE} coordinates): use 'auto', RMSprop() or LayerWise()."
            )
        return _DrawLearner(potential, dense=True)


# ---- from the gradients


class _GradientLearner(Learner):
    """Second moments of minibatch gradients, averaged with exponential weights, none on the zeros they start with."""

    needs_gradient = knows_at_once = True

    def __init__(self, potential: Potential, decay: float, damping: float, layer_wise: bool) -> None:
        super().__init__(potential)
        self.decay, self.damping, self.layer_wise = decay, damping, layer_wise
        self._square = torch.zeros_like(self.like, dtype=torch.float64)
        self._weight = 0.0

    def start(self) -> Metric:
        return Scaling(torch.ones_like(self.like))

    def observe(self, position: Tensor, grad: Tensor | None) -> None:
        del position
        assert grad is not None
        self._square = self.decay * self._square + (1.0 - self.decay) * grad.double().square().mean(0)
        self._weight = self.decay * self._weight + 1.0 - self.decay

    def estimate(self) -> Metric:
        square = self._square / self._weight
        if self.layer_wise:
            square = square.clone()
            for site in self.potential.sites.values():
                square[site.slice] = square[site.slice].mean()
        root = square.sqrt()
        inverse = 1.0 / (self.damping * root.mean() + root).clamp_min(torch.finfo(self.like.dtype).tiny)
        return Scaling((inverse / inverse.max()).sqrt().to(self.like))


@dataclass(frozen=True)
class RMSprop(Preconditioner):
    """The diagonal metric of preconditioned SGLD: one over the root mean square of each coordinate's gradient.

    Li, Chen, Carlson and Carin (2016), "Preconditioned stochastic gradient Langevin dynamics for deep neural networks",
    AAAI. They let it change all along and leave out Γ, which samples another law; here it is frozen after warm-up.

    :param decay: weight of the past in the running mean of g², per draw of warm-up.
    :param damping: δ, in units of the mean of √E[g²] over coordinates.
    :raises ValueError: for a decay outside [0, 1) or a damping that is negative.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGLD, RMSprop
    >>> def model():
    ...     pyro.sample("z", dist.Normal(torch.zeros(2), torch.tensor([0.1, 1.])).to_event(1))
    >>> pyro.set_rng_seed(0)
    >>> kernel = SGLD(model, step_size=0.1, preconditioner=RMSprop(), steps_per_sample=10)
    >>> mcmc = MCMC(kernel, num_samples=500, num_chains=8, disable_progbar=True)
    >>> mcmc.run()
    >>> (mcmc.get_samples()["z"].std(0) / torch.tensor([0.1, 1.]) - 1).abs().max() < 0.4
    tensor(True)
    """

    decay: float = 0.99
    damping: float = 1e-2

    def __post_init__(self) -> None:
        """:raises ValueError: for a decay outside [0, 1) or a damping that is negative."""
        check_decay(self.decay)
        check_setting("damping", self.damping)

    def learner(self, potential: Potential) -> Learner:
        """What learns it in one run."""
        return _GradientLearner(potential, self.decay, self.damping, layer_wise=False)


@dataclass(frozen=True)
class LayerWise(Preconditioner):
    """One number per site: one over the root mean square of its gradients.

    Wenzel et al. (2020), "How good is the Bayes posterior in deep neural networks really?", ICML, Algorithm 2, whose
    masses are scaled to a smallest of one.

    :param decay: weight of the past in the running mean of g², per draw of warm-up.
    :raises ValueError: for a decay outside [0, 1).

    >>> LayerWise(decay=0.9)
    LayerWise(decay=0.9)
    """

    decay: float = 0.99

    def __post_init__(self) -> None:
        """:raises ValueError: for a decay outside [0, 1)."""
        check_decay(self.decay)

    def learner(self, potential: Potential) -> Learner:
        """What learns it in one run."""
        return _GradientLearner(potential, self.decay, 0.0, layer_wise=True)


def check_decay(decay: float) -> None:
    """:raises ValueError: for the weight of the past in a running mean that is not one."""
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay is {decay!r}; give a number from 0 to below 1.")


_NAMED = {"auto": DrawVariances, "dense": DrawCovariance}


def preconditioner_of(name: str, value: Any) -> Preconditioner | None:
    """The rule that a setting names, None for numbers.

    :raises ValueError: for a string that names none.
    """
    if isinstance(value, Preconditioner):
        return value
    if not isinstance(value, str):
        return None
    if value not in _NAMED:
        raise ValueError(
            f"{name} is {value!r}; give a number, a dict of numbers per site, a vector, 'auto', 'dense', RMSprop(), "
            "LayerWise() or Kronecker()."
        )
    return _NAMED[value]()
