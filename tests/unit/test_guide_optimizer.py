"""The optimizer of natural gradients: its momentum, and precisions that stay positive whatever the target."""

import pytest
import torch

from bnn.guides import NaturalGradientOptimizer
from bnn.guides.natural_gradient_descent import NATURAL, Natural
from support.nets import numbers


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def test_momentum_is_a_bias_corrected_running_mean():
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = NaturalGradientOptimizer([parameter], lr=0.5, momentum=0.8)
    gradients, wanted = numbers(6, 3), torch.zeros(3)
    for t in range(6):
        parameter.grad = gradients[t].clone()
        setattr(parameter, NATURAL, Natural("loc"))
        optimizer.step()
        weights = 0.8 ** torch.arange(t, -1.0, -1)
        wanted = wanted - 0.5 * (weights[:, None] * gradients[: t + 1]).sum(0) / weights.sum()
        torch.testing.assert_close(parameter.detach(), wanted)


@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("size", [1, 4])
def test_precisions_stay_positive_for_any_target(rate, size):
    """S − ρG where that is what the target allows, else S − ρG + ½ρ² G S⁻¹ G, G = S − Λ̂ (Lin, Schmidt, Khan 2020)."""
    for seed in range(20):
        factor = torch.eye(size) + 0.3 * numbers(size, size, seed=seed).tril()
        whitened = numbers(size, size, seed=seed + 100)
        whitened = 3 * (whitened + whitened.T) + 2 * (seed % 3) * torch.eye(size)
        parameter = (factor.tril(-1) + factor.diagonal().abs().log().diag()).requires_grad_()
        factor = factor.tril(-1) + factor.diagonal().abs().diag()
        precision = torch.linalg.inv(factor @ factor.T)
        inverse = torch.linalg.inv(factor)
        gap = precision - inverse.T @ whitened @ inverse
        wanted = precision - rate * gap
        if not (torch.linalg.eigvalsh(torch.eye(size) + rate * (whitened - torch.eye(size))) > 0).all():
            wanted = wanted + 0.5 * rate**2 * gap @ torch.linalg.solve(precision, gap)
        assert (torch.linalg.eigvalsh(wanted) > 0).all()
        parameter.grad = torch.zeros_like(parameter)
        setattr(parameter, NATURAL, Natural("tril", whitened))
        NaturalGradientOptimizer([parameter], lr=0.5, precision_lr=rate).step()
        moved = parameter.detach().tril(-1) + parameter.detach().diagonal().exp().diag()
        torch.testing.assert_close(torch.linalg.inv(moved @ moved.T), wanted, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rate", [0.1, 0.7, 1.0])
def test_scales_stay_positive_for_any_target(rate):
    start, target = numbers(50, seed=1), 4 * numbers(50, seed=2)
    parameter = start.clone().requires_grad_()
    parameter.grad = torch.zeros_like(parameter)
    setattr(parameter, NATURAL, Natural("scale", target))
    NaturalGradientOptimizer([parameter], lr=0.5, precision_lr=rate).step()
    change = rate * (target - 1)
    growth = 1 + torch.where(target >= 0, change, change + 0.5 * change**2)
    torch.testing.assert_close(torch.exp(-2 * (parameter.detach() - start)), growth)
