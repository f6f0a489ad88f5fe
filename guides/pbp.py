"""Probabilistic backpropagation for ReLU nets with one output (Hernández-Lobato and Adams 2015, ICML).

q(w) = Π N(w_j; m_j, v_j) and q(τ) = Gamma(a, b) for the noise's precision τ. Each datum multiplies q by its likelihood
and is projected back by its moments (assumed density filtering): with Z the normalizer of q(w) q(τ) p(y | x, w, τ),

    m ← m + v ∂log Z/∂m,        v ← v − v² [(∂log Z/∂m)² − 2 ∂log Z/∂v],                      (eqs. 2, 3)
    a ← [Z Z₂ Z₁⁻² (a + 1)/a − 1]⁻¹,    b ← [Z₂ Z₁⁻¹ (a + 1)/b − Z₁ Z⁻¹ a/b]⁻¹,    Z_k = Z(a + k, b).    (eqs. 12, 13)

Z comes from moments passed through the net, as if the units of a layer were independent Gaussians:

    linear:  E = M z + m₀,    Var = V (E z)² + V Var z + M² Var z + v₀
    ReLU:    E = μ Φ(r) + s φ(r),    E of the square = (μ² + s²) Φ(r) + μ s φ(r),    r = μ/s
    log Z = log N(y; E f, Var f + b/(a − 1)),    Var f + σ² for noise of a known size σ.

Departs from the paper: prior variances are the model's, fixed, where the paper learns one for all weights. Starts from
the prior, means moved by a tenth of its standard deviation. Mean and variance of the output are exact with one hidden
layer, the updates where a datum sees one weight; elsewhere an approximation without a bound, narrow after several
passes over the same data, each of which counts them again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pyro.distributions as dist
import torch
from scipy.special import gammaincinv
from torch import Tensor, nn

from bnn.checks import finite_arguments
from bnn.guides._flat import FlatGuide
from bnn.likelihoods import Gaussian
from bnn.models import BayesianNet

Moments = tuple[Tensor, Tensor]


def linear_moments(weight: Moments, bias: Moments | None, inputs: Moments) -> Moments:
    """Mean and variance of W z + c, all entries independent."""
    (m, v), (z, u) = weight, inputs
    mean, variance = m @ z, v @ z.square() + v @ u + m.square() @ u
    return (mean, variance) if bias is None else (mean + bias[0], variance + bias[1])


def relu_moments(mean: Tensor, variance: Tensor) -> Moments:
    """Mean and variance of max(0, N(mean, variance))."""
    sd = variance.sqrt()
    ratio = mean / sd
    above, density = torch.special.ndtr(ratio), torch.exp(-0.5 * ratio.square()) / math.sqrt(2 * math.pi)
    first = mean * above + sd * density
    second = (mean.square() + variance) * above + mean * sd * density
    return first.clamp_min(0.0), (second - first.square()).clamp_min(1e-30)


def moved_normal(mean: Tensor, variance: Tensor, by_mean: Tensor, by_variance: Tensor) -> Moments:
    """Mean and variance of a Normal times a factor, by its log normalizer's derivatives; as before if not positive."""
    moved = variance - variance.square() * (by_mean.square() - 2.0 * by_variance)
    fine = (moved > 0) & torch.isfinite(moved)
    return torch.where(fine, mean + variance * by_mean, mean), torch.where(fine, moved, variance)


def moved_gamma(shape: float, rate: float, log_z: Callable[[float], float]) -> tuple[float, float]:
    """Shape and rate of the Gamma with the mean and variance of Gamma(shape, rate) times a factor.

    As before if there is none, or if its shape would not exceed 1, where the noise has no mean: a datum that lies tens
    of standard deviations off.

    :param log_z: log normalizer as a function of the shape, at this rate.
    """
    first, second = log_z(shape + 1) - log_z(shape), log_z(shape + 2) - log_z(shape + 1)
    mean = math.exp(first) * shape / rate
    other = math.exp(second) * (shape + 1) / rate
    return (mean / (other - mean), 1 / (other - mean)) if 0 < other - mean < mean else (shape, rate)


class AutoPBP(FlatGuide):
    """Probabilistic backpropagation, for a model of :func:`bnn.bayesian` of linear layers and ReLUs with one output.

    Trained by :meth:`assimilate`, not by SVI: there is no gradient to follow. Priors are Normals of fixed numbers; the
    likelihood is ``Gaussian`` with a number as scale, or with ``precision=dist.Gamma(a, b)``.

    :param model: such a model.
    :raises ValueError: for another model.

    >>> import bnn, torch, pyro.distributions as dist
    >>> from bnn.guides import AutoPBP
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.ReLU(), torch.nn.Linear(20, 1))
    >>> model = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(precision=dist.Gamma(6., 6.)))
    >>> x = torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = AutoPBP(model)
    >>> losses = [guide.assimilate(x, x.sin()) for _ in range(3)]  # minus log Z, summed over the data
    >>> bnn.predict(guide, x, num_samples=50).mean.shape
    torch.Size([50])
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, model: BayesianNet) -> None:
        super().__init__(model)
        layers = list(model.net) if isinstance(model, BayesianNet) and isinstance(model.net, nn.Sequential) else []
        known = all(type(layer) in (nn.Linear, nn.ReLU) for layer in layers)
        if not layers or not known or not isinstance(layers[0], nn.Linear):
            raise ValueError(
                "AutoPBP needs a model of bnn.bayesian whose net is torch.nn.Sequential of Linear and ReLU, Linear "
                "first."
            )
        self._inputs = layers[0].in_features
        if not isinstance(layers[-1], nn.Linear) or layers[-1].out_features != 1:
            raise ValueError(f"AutoPBP needs one output, of a Linear; the net ends in {layers[-1]}.")
        noise: Any = model.likelihood
        known = isinstance(noise, Gaussian) and isinstance(noise.scale, (int, float))
        learned = isinstance(noise, Gaussian) and isinstance(noise.precision, dist.Gamma)
        if not known and not (learned and float(noise.precision.concentration) > 1):
            raise ValueError(
                f"AutoPBP needs Gaussian noise of a given scale, or precision=dist.Gamma(a, b) with a > 1, not {noise}."
            )
        self._known_noise = known

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        del args, kwargs
        kind: dict[str, Any] = {"dtype": torch.float64, "device": self.structure.device}
        mean = torch.zeros(self.structure.dim, **kind)
        variance = torch.ones_like(mean)
        for name, site in self.structure.sites.items():
            if name in self.model.priors and site.normal is None:
                raise ValueError(f"AutoPBP needs Normal priors of fixed numbers; {name!r} has {self.model.law(name)}.")
            if site.normal is not None:
                mean[site.slice], variance[site.slice] = site.normal[0], site.normal[1] ** 2
        if len(self.model.net) > 1:  # units with one and the same law would stay alike
            mean += 0.1 * variance.sqrt() * torch.randn_like(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("variance", variance)
        gamma = None if self._known_noise else self.model.likelihood.precision
        start = [math.inf, math.inf] if gamma is None else [float(gamma.concentration), float(gamma.rate)]
        self.register_buffer("gamma", torch.tensor(start, **kind))

    def assimilate(self, x: Tensor, y: Tensor) -> float:
        """One pass over data, row by row in random order.

        :param x: inputs ``(N, features)``.
        :param y: targets ``(N,)`` or ``(N, 1)``.
        :returns: minus the sum of log Z.
        :raises ValueError: if shapes do not fit, or a number is not finite.
        :raises RuntimeError: if log Z is not finite.
        """
        if x.dim() != 2 or x.shape[1] != self._inputs or y.numel() != len(x):
            raise ValueError(
                f"x has shape {tuple(x.shape)} and y {tuple(y.shape)}; give (rows, {self._inputs}) and (rows,) or "
                "(rows, 1)."
            )
        finite_arguments((x, y), {})
        if not self.is_set_up:
            self(x, y)
        total, x, y = 0.0, x.double(), y.double().reshape(-1)
        for row in torch.randperm(len(x)).tolist():
            total -= self._assimilate_row(x[row], y[row])
        return total

    def _assimilate_row(self, x: Tensor, y: Tensor) -> float:
        mean, variance = self.mean.clone().requires_grad_(), self.variance.clone().requires_grad_()
        with torch.enable_grad():
            output, spread = self._output(mean, variance, x)
            log_z = dist.Normal(output, (spread + self._noise()).sqrt()).log_prob(y)
            by_mean, by_variance = torch.autograd.grad(log_z, [mean, variance], materialize_grads=True)
        if not torch.isfinite(log_z):
            raise RuntimeError(f"log Z is {float(log_z.detach())} at a row: standardize inputs and targets.")
        if not self._known_noise:
            shape, rate = self.gamma.tolist()
            residual, variance_of_output = float(y - output.detach()), float(spread.detach())

            def of_shape(shape: float) -> float:
                total = variance_of_output + rate / (shape - 1)
                return -0.5 * math.log(2 * math.pi * total) - 0.5 * residual**2 / total

            self.gamma.copy_(self.gamma.new_tensor(moved_gamma(shape, rate, of_shape)))
        self.mean, self.variance = moved_normal(self.mean, self.variance, by_mean, by_variance)
        return float(log_z.detach())

    def _noise(self) -> float:
        if self._known_noise:
            return float(self.model.likelihood.scale) ** 2
        shape, rate = self.gamma.tolist()
        return rate / (shape - 1)

    def _output(self, mean: Tensor, variance: Tensor, x: Tensor) -> Moments:
        means = {name: site.unflatten(mean) for name, site in self.structure.sites.items()}
        variances = {name: site.unflatten(variance) for name, site in self.structure.sites.items()}
        moments: Moments = (x, torch.zeros_like(x))
        for number, layer in enumerate(self.model.net):
            if isinstance(layer, nn.ReLU):
                moments = relu_moments(*moments)
                continue
            weight, bias = ((means.get(n), variances.get(n)) for n in (f"{number}.weight", f"{number}.bias"))
            moments = linear_moments(weight, bias if layer.bias is not None else None, moments)  # type: ignore[arg-type]
        return moments[0].squeeze(-1), moments[1].squeeze(-1)

    def particles(self, count: int) -> Tensor:
        """:raises ValueError: always; there is nothing for an optimizer to move."""
        raise ValueError("AutoPBP is trained by guide.assimilate(x, y), not by SVI.")

    @torch.no_grad()
    def flat_draws(self, num_samples: int) -> Tensor:
        """Draws from q, in unconstrained space."""
        z = self.mean + self.variance.sqrt() * torch.randn_like(self.mean.expand(num_samples, -1))
        return self._with_precision(z, None if self._known_noise else dist.Gamma(*self.gamma).sample((num_samples,)))

    @torch.no_grad()
    def flat_median(self) -> Tensor:
        """The means of the weights, and the median of the precision."""
        shape, rate = self.gamma.tolist()
        precision = None if self._known_noise else self.mean.new_tensor(gammaincinv(shape, 0.5) / rate)
        return self._with_precision(self.mean.clone(), precision)

    def _with_precision(self, z: Tensor, precision: Tensor | None) -> Tensor:
        if precision is not None:
            site = self.structure.sites["precision"]
            z[..., site.slice] = site.transform.inv(precision)[..., None]  # type: ignore[union-attr]
        return z.to(self.structure.device, self.structure.dtype)
