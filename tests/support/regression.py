"""Bayesian linear regression in the spellings a guide may meet, and its exact answers.

Vectors run over the matrix (outputs, [bias,] inputs) row by row, as in ``bnn.guides.matrix_normal``. With the design
matrix X, noise covariance S, prior precisions D and weight λ of the divergence, the posterior is Gaussian with

    precision Λ = (S⁻¹ ⊗ XᵀX) / λ + D,        mean Λ⁻¹ vec(S⁻¹ Yᵀ X) / λ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import SVI
from torch import Tensor

from bnn.guides import AutoFactorizedNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
from bnn.guides.natural_gradient_descent import NATURAL
from support.nets import numbers

FEATURES = 4


@dataclass(frozen=True)
class Regression:
    """A linear regression, in double precision.

    :ivar name: what it is.
    :ivar outputs: number of outputs.
    :ivar bias: whether there is a bias.
    :ivar spelling: ``"linear"``, weight (outputs, inputs); ``"transposed"``, weight (inputs, outputs); ``"conv"``, a
        convolution that sees one location.
    :ivar noise: ``"equal"``, ``"apart"`` (a standard deviation per output) or ``"correlated"``.
    :ivar bias_scale: standard deviation of the bias's prior; that of the weights is 0.8.
    :ivar rows: number of data.
    """

    name: str
    outputs: int = 3
    bias: bool = True
    spelling: str = "linear"
    noise: str = "equal"
    bias_scale: float = 0.8
    rows: int = 12

    # ---- the model

    @property
    def args(self) -> tuple[Tensor, Tensor]:
        """Inputs and targets."""
        mixing = torch.eye(FEATURES) + 0.4 * numbers(FEATURES, FEATURES, seed=5)
        x = numbers(self.rows, FEATURES, seed=3) @ mixing
        y = x @ numbers(FEATURES, self.outputs, seed=4) + 0.5 * numbers(self.rows, self.outputs, seed=6) + 0.7
        return (x.reshape(-1, 1, 2, 2) if self.spelling == "conv" else x), y

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight."""
        shapes = {"linear": (self.outputs, FEATURES), "transposed": (FEATURES, self.outputs)}
        return shapes.get(self.spelling, (self.outputs, 1, 2, 2))

    @property
    def covariance(self) -> Tensor:
        """S."""
        if self.noise == "equal":
            return 0.25 * torch.eye(self.outputs)
        if self.noise == "apart":
            return torch.linspace(0.3, 1.2, self.outputs).square().diag()
        factor = torch.eye(self.outputs) + 0.6 * torch.arange(self.outputs**2.0).cos().reshape(self.outputs, -1)
        return 0.2 * factor @ factor.T

    def likelihood(self, mean: Tensor) -> Any:
        """The law of the targets."""
        if self.noise == "correlated":
            return dist.MultivariateNormal(mean, self.covariance)
        return dist.Normal(mean, self.covariance.diagonal().sqrt()).to_event(1)

    def __call__(self, x: Tensor, y: Tensor, batch_size: int | None = None) -> None:
        """The Pyro model."""
        weight = pyro.sample("weight", dist.Normal(torch.zeros(self.shape), 0.8).to_event(len(self.shape)))
        bias = None
        if self.bias:
            bias = pyro.sample("bias", dist.Normal(torch.zeros(self.outputs), self.bias_scale).to_event(1))
        with pyro.plate("data", len(y), subsample_size=batch_size) as rows:
            if self.spelling == "linear":
                mean = F.linear(x[rows], weight, bias)
            elif self.spelling == "conv":
                mean = F.conv2d(x[rows], weight, bias).flatten(1)
            else:
                mean = x[rows] @ weight if bias is None else x[rows] @ weight + bias
            pyro.sample("obs", self.likelihood(mean), obs=y[rows])

    # ---- its exact answers

    @property
    def design(self) -> Tensor:
        """X, a column of ones first where there is a bias."""
        x = self.args[0].flatten(1)
        return torch.cat([torch.ones(len(x), 1), x], 1) if self.bias else x

    @property
    def prior(self) -> Tensor:
        """Precisions D of the prior, (outputs, columns of X)."""
        precision = torch.full((self.outputs, self.design.shape[1]), 0.8**-2)
        if self.bias:
            precision[:, 0] = self.bias_scale**-2
        return precision

    def posterior(self, kl_weight: float = 1.0) -> tuple[Tensor, Tensor]:
        """Mean and precision."""
        x, y, inverse = self.design, self.args[1], torch.linalg.inv(self.covariance)
        precision = kron(inverse, x.T @ x) / kl_weight + self.prior.flatten().diag()
        return torch.linalg.solve(precision, (inverse @ y.T @ x).flatten() / kl_weight), precision

    def log_evidence(self, kl_weight: float = 1.0) -> float:
        """The best value of the objective, λ log ∫ p(y | w)^(1/λ) p(w) dw; for λ = 1 the log evidence."""
        x, y = self.design, self.args[1]
        operator = kron(x, torch.eye(self.outputs))  # acts on the weights column by column
        prior = operator @ (1 / self.prior).T.flatten().diag() @ operator.T
        noise = kl_weight * kron(torch.eye(self.rows), self.covariance)
        log_density = dist.MultivariateNormal(torch.zeros(y.numel()), prior + noise).log_prob(y.flatten())
        whitening = torch.logdet(2 * math.pi * noise) - torch.logdet(2 * math.pi * noise / kl_weight) / kl_weight
        return kl_weight * float(log_density + 0.5 * whitening)

    def matrix_normal(self, kl_weight: float = 1.0) -> Tensor:
        """Covariance of the best matrix normal, by alternating its two closed forms (METHODS C3) to convergence.

        The precision is Σ_k P_k ⊗ Q_k; the prior's part is Σ_j diag(D_·j) ⊗ e_j e_jᵀ.
        """
        x, columns = self.design, self.design.shape[1]
        terms = [(torch.linalg.inv(self.covariance) / kl_weight, x.T @ x)]
        terms += [(self.prior[:, j].diag(), torch.eye(columns)[:, j].diag()) for j in range(columns)]
        of_rows, of_columns = torch.eye(self.outputs), torch.eye(columns)
        for _ in range(2000):
            of_columns = torch.linalg.inv(sum((p * of_rows).sum() * q for p, q in terms) / self.outputs)
            of_rows = torch.linalg.inv(sum((q * of_columns).sum() * p for p, q in terms) / columns)
        return kron(of_rows, of_columns)

    def factored(self, kl_weight: float = 1.0) -> Tensor:
        """Covariance by the damped factors of noisy K-FAC (Zhang et al. 2018), all priors alike."""
        inputs = self.design.T @ self.design / self.rows
        outputs = self.rows * torch.linalg.inv(self.covariance) / kl_weight
        ratio = ((inputs.trace() / len(inputs)) / (outputs.trace() / len(outputs))).sqrt()
        root = self.prior[0, 0].sqrt()
        damped = [outputs + root / ratio * torch.eye(len(outputs)), inputs + root * ratio * torch.eye(len(inputs))]
        return kron(torch.linalg.inv(damped[0]), torch.linalg.inv(damped[1]))


def gaussian_of(guide: Any, problem: Regression) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a guide's Gaussian, from its parameters by their documented layout."""
    if isinstance(guide, AutoFactorizedNormal):
        numel = math.prod(problem.shape)
        mean, variance = (_in_matrix(v, numel, problem) for v in (guide.loc.detach(), guide.scale.detach().square()))
        return mean, variance.diag()
    mean = guide.locs.weight.detach().flatten()
    if hasattr(guide, "eigen_scales"):
        basis = kron(guide.row_basis_0, guide.col_basis_0)
        return mean, basis @ guide.eigen_scales.weight.detach().flatten().square().diag() @ basis.T
    row, col = guide.row_scale_trils.weight.detach(), guide.col_scale_trils.weight.detach()
    return mean, kron(row @ row.T, col @ col.T)


def _in_matrix(flat: Tensor, numel: int, problem: Regression) -> Tensor:
    """A weight and a bias one after the other, as the flat matrix (outputs, [bias,] inputs)."""
    weight = flat[:numel].reshape(problem.shape)
    weight = weight.T if problem.spelling == "transposed" else weight.reshape(problem.outputs, -1)
    return (torch.cat([flat[numel:, None], weight], 1) if problem.bias else weight).flatten()


def kron(a: Tensor, b: Tensor) -> Tensor:
    """a ⊗ b, for matrices in any layout (``torch.kron`` refuses some)."""
    return torch.einsum("ij,kl->ikjl", a, b).reshape(a.shape[0] * b.shape[0], -1)


def divergence(mean: Tensor, covariance: Tensor, target: tuple[Tensor, Tensor]) -> float:
    """KL from N(mean, covariance) to the Gaussian of the given mean and precision."""
    difference, product = mean - target[0], target[1] @ covariance
    quadratic = product.trace() + difference @ target[1] @ difference
    return 0.5 * float(quadratic - len(mean) - torch.logdet(product))


# ---- steps and estimates


def objective(curvature: str = "ggn", **settings: Any) -> TraceNaturalGradient_ELBO:
    """The ELBO, exact and without a trust region unless asked for."""
    return TraceNaturalGradient_ELBO(curvature, **{"trust_region": None, **settings})


def train(
    problem: Any,
    guide: Any,
    steps: int,
    lr: float = 1.0,
    precision_lr: float = 1.0,
    *,
    args: Any = None,
    loss: Any = None,
    **settings: Any,
) -> list[float]:
    """The losses of so many steps."""
    optimizer = NaturalGradientDescent(lr, precision_lr=precision_lr)
    svi = SVI(problem, guide, optimizer, loss or objective(**settings))
    return [svi.step(*(problem.args if args is None else args)) for _ in range(steps)]


def flat(guide: Any) -> Tensor:
    """All parameters, unconstrained."""
    return torch.cat([leaf.detach().flatten() for leaf in guide.parameters()])


def naturals(guide: Any, problem: Any, *args: Any, loss: Any = None, **settings: Any) -> tuple[dict, dict]:
    """One estimate without a step: the gradient of each parameter, and what each scale is drawn to."""
    (loss or objective(**settings)).loss_and_grads(problem, guide, *(args or getattr(problem, "args", ())))
    found = {name.removesuffix("_unconstrained"): leaf for name, leaf in guide.named_parameters()}
    targets = {name: getattr(leaf, NATURAL).target for name, leaf in found.items() if getattr(leaf, NATURAL, None)}
    return {name: leaf.grad.clone() for name, leaf in found.items() if leaf.grad is not None}, targets
