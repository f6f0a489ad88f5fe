"""ResNet-20 with filter response norm: the norm is the paper's, and the recorded gradient is autograd's."""

import pytest
import torch
import torch.nn.functional as F

import bnn
from benchmarks.resnet import FilterResponseNorm, ResNet20
from bnn import Potential
from bnn.kernels import SGLD

ROWS, BATCH = 6, 2


def images(size=16):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(ROWS, 3, size, size, generator=generator), torch.arange(ROWS) % 10


def model_of(net):
    likelihood = bnn.likelihoods.Categorical()
    return bnn.bayesian(net, prior=bnn.priors.Normal(1.0), likelihood=likelihood, batch_size=BATCH)


def test_filter_response_norm():
    """Each channel of each row by itself has mean square one; scale of its input and other rows do not matter."""
    norm = FilterResponseNorm(5, epsilon=1e-12, thresholded=False)
    x = torch.randn(4, 5, 7, 6, generator=torch.Generator().manual_seed(1))
    y = norm(x)
    torch.testing.assert_close(y.square().mean((2, 3)), torch.ones(4, 5))
    torch.testing.assert_close(norm(30.0 * x), y)
    torch.testing.assert_close(norm(x[1:2]), y[1:2])
    norm = FilterResponseNorm(5, epsilon=0.3)
    with torch.no_grad():
        for parameter, start in zip(norm.parameters(), (0.5, -0.2, 0.1), strict=True):
            parameter.copy_(torch.linspace(start, start + 0.4, 5))
    found = norm(x)
    for row in range(4):
        for c in range(5):
            nu2 = (x[row, c] ** 2).sum() / 42
            wanted = (1.5 + 0.1 * c) * x[row, c] / (nu2 + 0.3) ** 0.5 + (-0.2 + 0.1 * c)
            torch.testing.assert_close(found[row, c], wanted.clamp(min=0.1 + 0.1 * c))


def test_the_net_is_resnet_20():
    net = ResNet20()
    convolutions = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(convolutions) + 1 == 20  # and the linear layer
    weights = sum(p.numel() for p in net.parameters() if p.dim() > 1)
    # 3·16 + 6·16² + 16·32 + 5·32² + 32·64 + 5·64² products of nine positions, two shortcuts, the head.
    assert weights == 9 * (48 + 6 * 256 + 512 + 5 * 1024 + 2048 + 5 * 4096) + 512 + 2048 + 640
    assert net(images(32)[0]).shape == (ROWS, 10)


def gradients(precision):
    """The recorded energy and gradient of a narrow net, those by hand, and those by hand under PyTorch's autocast."""
    torch.manual_seed(1)
    net, (x, y) = ResNet20(width=4), images()
    potential = Potential(model_of(net), x, y, compile="fx", precision=precision)
    assert potential.is_recorded
    position, rows = potential.initial(1), torch.tensor([[4, 1]])
    found = potential.evaluate(position, [rows])
    leaves = {n: v[0].detach().requires_grad_() for n, v in potential.unflatten(position).items()}
    by_hand = []
    for rounded in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
            logits = torch.func.functional_call(net, leaves, (x[rows[0]],)).float()
        energy = ROWS / BATCH * F.cross_entropy(logits, y[rows[0]], reduction="sum")
        energy = energy - sum(torch.distributions.Normal(0.0, 1.0).log_prob(v).sum() for v in leaves.values())
        grads = torch.autograd.grad(energy, list(leaves.values()))
        by_hand.append((energy.detach().reshape(1), torch.cat([g.flatten() for g in grads]).unsqueeze(0)))
    return found, *by_hand


@pytest.mark.slow
def test_the_recorded_gradient_is_autograds():
    (energy, grad), (wanted, wanted_grad), _ = gradients("full")
    torch.testing.assert_close(energy, wanted, rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(grad, wanted_grad, rtol=1e-3, atol=1e-4 * wanted_grad.abs().max().item())


@pytest.mark.slow
def test_rounded_products_lose_less_than_autocast():
    """Twenty layers add their roundings up, and units at their threshold switch: some per cent, as for anyone."""
    (_, grad), (_, wanted), (_, autocast) = gradients("bfloat16")
    error, others = ((g - wanted).norm() / wanted.norm() for g in (grad, autocast))
    assert 1e-3 < error < others


@pytest.mark.cuda
def test_a_step_on_cuda():
    torch.manual_seed(1)
    x, y = (part.cuda() for part in images(32))
    drawn = []
    for compile in ("fx", "inductor"):
        kernel = SGLD(model_of(ResNet20().cuda()), step_size=1e-6, compile=compile, init_strategy="auto")
        torch.manual_seed(2)
        kernel.num_chains = 2
        kernel.setup(0, x, y)
        for _ in range(3):
            kernel.advance()
        assert kernel.position.is_cuda
        drawn.append(kernel.position)
    torch.testing.assert_close(*drawn, rtol=1e-2, atol=1e-3)
