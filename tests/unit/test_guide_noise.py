"""Noise at the outputs of layers, and thin factors: the same laws and the same steps as with noisy weights."""

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import Tensor

import bnn.guides._estimate as estimate
from bnn.guides import (
    AutoEigenNormal,
    AutoFactorizedNormal,
    AutoMatrixNormal,
    NaturalGradientDescent,
    TraceNaturalGradient_ELBO,
)
from bnn.guides._perturbed import Layer, Perturbation
from bnn.guides._triangular import (
    covariance_of,
    divide_lower,
    lower_times_lower,
    squared_norms,
    times_lower,
    times_upper,
    weighted_gram,
)

GUIDES = [AutoFactorizedNormal, AutoMatrixNormal, AutoEigenNormal]
ROWS, INPUTS, OUTPUTS = 3, 4, 2


@pytest.fixture(autouse=True)
def _double() -> Any:
    torch.set_default_dtype(torch.float64)
    pyro.set_rng_seed(20)
    yield
    torch.set_default_dtype(torch.float32)


def linear(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(OUTPUTS, INPUTS), 1.0).to_event(2))
    bias = pyro.sample("bias", dist.Normal(torch.zeros(OUTPUTS), 1.0).to_event(1))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(x @ weight.T + bias, 0.5).to_event(1), obs=y)


def two_layers(x: Tensor, y: Tensor) -> None:
    first = pyro.sample("first", dist.Normal(torch.zeros(6, INPUTS), 1.0).to_event(2))
    second = pyro.sample("second", dist.Normal(torch.zeros(OUTPUTS, 6), 1.0).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(torch.tanh(x @ first.T) @ second.T, 0.5).to_event(1), obs=y)


def data() -> tuple[Tensor, Tensor]:
    return torch.randn(ROWS, INPUTS), torch.randn(ROWS, OUTPUTS)


def roughen(guide: Any) -> None:
    """Parameters that no symmetry hides a mistake in."""
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter).tril() if parameter.dim() == 2 else 0.4)
        for name, buffer in guide.named_buffers():
            if "basis" in name:
                buffer.copy_(torch.linalg.qr(torch.randn_like(buffer))[0])


def prepared(make: Any, model: Callable[..., Any], **settings: Any) -> tuple[Any, TraceNaturalGradient_ELBO, Any]:
    """A guide with rough parameters, an ELBO that has taken one step, and the arguments."""
    pyro.clear_param_store()
    x, y = data()
    guide = make(model, init_scale=0.5)
    poutine.block(guide)(x, y)
    roughen(guide)
    elbo = TraceNaturalGradient_ELBO("ggn", trust_region=None, inverses_every=10**6, **settings)
    elbo.loss_and_grads(model, guide, x, y)
    return guide, elbo, (x, y)


def outputs(guide: Any, elbo: TraceNaturalGradient_ELBO, x: Tensor, kind: str, draws: int) -> Tensor:
    """Draws of the noise that a perturbation adds to the layer's outputs, ``(draws, rows · outputs)``."""
    (step,) = elbo._steps.values()
    estimator, (block, *_) = step.estimator, guide.blocks
    layers: list[Layer] = estimator.perturbed["weight"]
    params = {name: tensor.detach() for name, tensor in guide.params_of(block).items()}
    names = ["weight"] if block.family == "factorized" else block.names
    a = torch.cat([torch.ones(len(x), 1), x], 1) if layers[0].bias is not None else x
    result = []
    for _ in range(draws):
        perturbation = Perturbation(kind)
        perturbation.add(layers, block.factors(params, torch.randn(params["loc"].shape), names))
        ((layer, noise),) = perturbation._layers[layers[0].use.node]
        result.append(noise(layer, a).reshape(-1))
    return torch.stack(result)


def covariance_of_outputs(guide: Any, x: Tensor) -> Tensor:
    """Of x (W − M)ᵀ for noisy weights, by the dense covariance of the weights."""
    block = guide.blocks[0]
    params = {name: tensor.detach() for name, tensor in guide.params_of(block).items()}
    numel = params["loc"].numel()
    units = torch.eye(numel).reshape(numel, *params["loc"].shape)
    spreads = torch.stack([block.split(block.spread(params, unit))["weight"] for unit in units])
    shifted = x @ spreads.mT  # (numel, rows, outputs)
    if block.family != "factorized":
        shifted = shifted + torch.stack([block.split(block.spread(params, u))["bias"] for u in units])[:, None]
    flat = shifted.reshape(numel, -1)
    return flat.T @ flat


@pytest.mark.parametrize("kind", ["shared", "flipout", "local"])
@pytest.mark.parametrize("make", GUIDES)
def test_each_datum_gets_the_law_of_noisy_weights(make: Any, kind: str) -> None:
    guide, elbo, (x, _) = prepared(make, linear, noise="flipout")
    draws = 15_000
    found = outputs(guide, elbo, x, kind, draws)
    sample = found.T @ found / draws
    exact = covariance_of_outputs(guide, x)
    same_datum = torch.block_diag(*[torch.ones(OUTPUTS, OUTPUTS)] * ROWS).bool()
    if kind != "shared":  # another datum's noise is independent given signs, or altogether
        assert (sample[~same_datum].abs() < 6 * (exact.diagonal().max() * 3 / draws**0.5)).all()
    # Products of the outputs have at most the variance of a Gaussian's, times 3 for flipout's mixture.
    error = 3.0 * ((exact.diagonal()[:, None] * exact.diagonal() + exact**2) / draws).sqrt()
    compared = same_datum if kind != "shared" else torch.ones_like(same_datum)
    assert (((sample - exact) / error).abs()[compared] < 5.0).all()


@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("model", [pytest.param(linear, marks=pytest.mark.slow), two_layers])
def test_shared_noise_is_that_of_the_weights(
    make: Any, model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(estimate, "is_thin", lambda block, layers: block.family == "matrix")
    found = []
    for noise in ("weights", "shared"):
        pyro.set_rng_seed(21)
        guide, elbo, args = prepared(make, model, noise=noise, stick_the_landing=False)
        pyro.set_rng_seed(22)
        elbo.loss_and_grads(model, guide, *args)
        found.append([elbo._progress[guide].mean(number) for number in range(len(guide.blocks))])
    for first, second in zip(*found, strict=True):  # locations differ by the prior's gradient, at draw or mean
        assert first
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("noise", ["flipout", pytest.param("local", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", GUIDES)
def test_expected_loss_and_gradients_are_those_of_noisy_weights(make: Any, noise: str) -> None:
    """False alarm per comparison 6e-7 by the normal law; a few hundred comparisons."""
    draws, means = 1_000, []
    for kind in ("weights", noise):
        pyro.set_rng_seed(21)
        guide, elbo, args = prepared(make, two_layers, noise=kind, stick_the_landing=False, statistics_every=10**6)
        values = []
        for _ in range(draws):
            loss = elbo.loss_and_grads(two_layers, guide, *args)
            locs = [p.grad.reshape(-1) for n, p in guide.named_parameters() if "loc" in n]
            values.append(torch.cat([torch.tensor([loss]), *locs]))
        means.append((torch.stack(values).mean(0), torch.stack(values).var(0) / draws))
    (first, first_variance), (second, second_variance) = means
    z = (first - second) / (first_variance + second_variance).sqrt()
    assert z.abs().max() < 5.5


@pytest.mark.parametrize("weight", [1.0, 0.7])
def test_thin_factors_take_the_same_steps(monkeypatch: pytest.MonkeyPatch, weight: float) -> None:
    monkeypatch.setattr(estimate, "is_thin", lambda block, layers: block.family == "matrix")
    choose, found = estimate.Estimator._choose_perturbed, []
    for thin in (False, True):

        def chosen(self: Any, thin: bool = thin) -> None:
            choose(self)
            self.thin &= self.thin if thin else set()

        monkeypatch.setattr(estimate.Estimator, "_choose_perturbed", chosen)
        pyro.set_rng_seed(21)
        pyro.clear_param_store()
        x, y = data()
        guide = AutoMatrixNormal(two_layers, init_scale=0.3)
        elbo = TraceNaturalGradient_ELBO("ggn", noise="shared", kl_weight=weight)
        svi = SVI(two_layers, guide, NaturalGradientDescent(lr=0.3), elbo)
        losses = [svi.step(x, y) for _ in range(6)]
        assert bool(next(iter(elbo._steps.values())).estimator.thin) == thin
        found.append(torch.cat([torch.tensor(losses), *(p.detach().reshape(-1) for p in guide.parameters())]))
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_the_priors_part_is_used_again_for_no_longer_than_the_rate_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "is_thin", lambda block, layers: block.family == "matrix")
    x, y = data()
    guide = AutoMatrixNormal(two_layers, init_scale=0.3)
    elbo = TraceNaturalGradient_ELBO("ggn", noise="shared", statistics_every=4, inverses_every=8)
    svi = SVI(two_layers, guide, NaturalGradientDescent(lr=0.3), elbo)
    fresh = []
    for _ in range(9):
        progress = elbo._progress.get(guide)
        before = dict(progress.priors) if progress else {}
        svi.step(x, y)
        after = elbo._progress[guide].priors
        fresh.append(not before or any(not torch.equal(before[n][0], after[n][0]) for n in after))
    assert fresh == [True, False, False, True, False, False, True, False, True]


@pytest.mark.parametrize("size", [7, 300])
def test_triangular_products(size: int) -> None:
    lower, other, x = torch.randn(size, size).tril(), torch.randn(size, size).tril(), torch.randn(5, size)
    weights = torch.rand(size)
    torch.testing.assert_close(times_lower(x, lower), x @ lower)
    torch.testing.assert_close(times_upper(x, lower), x @ lower.T)
    torch.testing.assert_close(lower_times_lower(lower, other), lower @ other)
    torch.testing.assert_close(weighted_gram(lower, weights), lower.T @ weights.diag() @ lower)
    torch.testing.assert_close(covariance_of(lower), lower @ lower.T)
    torch.testing.assert_close(squared_norms(x), x.square().sum(-1))
    divisor, quotient = torch.eye(size) + 0.1 * other / size**0.5, lower.clone()
    divide_lower(quotient, divisor)
    torch.testing.assert_close(quotient, lower @ torch.linalg.inv(divisor))
    assert not quotient.triu(1).any()


@pytest.mark.parametrize("noise", ["weights", "flipout"])
def test_a_learned_prior_scale_is_not_taken_for_a_fixed_one(noise: str) -> None:
    def model(x: Tensor, y: Tensor) -> None:
        scale = pyro.param("scale", torch.tensor(1.0), constraint=dist.constraints.positive)
        weight = pyro.sample("weight", dist.Normal(torch.zeros(OUTPUTS, INPUTS), scale).to_event(2))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ weight.T, 0.5).to_event(1), obs=y)

    guide, _, args = prepared(AutoMatrixNormal, model, noise=noise)
    assert pyro.param("scale").unconstrained().grad.abs() > 1e-3
