"""Nets, priors and data of the model zoo."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn


def data(rows: int = 12, features: int = 3, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs (rows, features) and targets (rows,) from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, features, generator=generator, dtype=torch.float64)
    y = x.sum(-1).sin() + 0.3 * torch.randn(rows, generator=generator, dtype=torch.float64)
    return x.to(torch.get_default_dtype()), y.to(torch.get_default_dtype())


def numbers(*shape: int, seed: int = 2) -> Tensor:
    """Standard normal numbers from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())


def labels(rows: int = 12, classes: int = 3) -> Tensor:
    return torch.arange(rows) % classes


def normal_prior(*shape: int) -> Any:
    return dist.Normal(torch.zeros(shape), 1.0).to_event(len(shape))


class BayesianMLP(PyroModule):
    """A 3-5-1 tanh net with PyroSample weights and learned noise."""

    def __init__(self, size: int, batch_size: int | None) -> None:
        super().__init__()
        self.size, self.batch_size = size, batch_size
        self.hidden = PyroModule[nn.Linear](3, 5)
        self.hidden.weight = PyroSample(normal_prior(5, 3))
        self.hidden.bias = PyroSample(normal_prior(5))
        self.out = PyroModule[nn.Linear](5, 1)
        self.out.weight = PyroSample(normal_prior(1, 5))
        self.out.bias = PyroSample(normal_prior(1))
        self.sigma = PyroSample(dist.HalfNormal(torch.tensor(1.0)))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        plate = pyro.plate("data", self.size, subsample_size=self.batch_size)
        mean = self.out(torch.tanh(self.hidden(x[plate.indices]))).squeeze(-1)
        sigma = self.sigma
        with plate as rows:
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y[rows])
        return mean


class ConvNet(PyroModule):
    """A LeNet in small: two convolutions with pooling, two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = PyroModule[nn.Conv2d](1, 2, 3)
        self.conv2 = PyroModule[nn.Conv2d](2, 3, 3)
        self.fc1 = PyroModule[nn.Linear](12, 4)
        self.fc2 = PyroModule[nn.Linear](4, 3)
        for layer in (self.conv1, self.conv2, self.fc1, self.fc2):
            layer.weight = PyroSample(normal_prior(*layer.weight.shape))
            layer.bias = PyroSample(normal_prior(*layer.bias.shape))

    def forward(self, images: Tensor, classes: Tensor) -> None:
        plate = pyro.plate("data", len(images), subsample_size=3)
        hidden = F.max_pool2d(torch.relu(self.conv1(images[plate.indices])), 2)
        hidden = F.max_pool2d(torch.relu(self.conv2(hidden)), 2)
        logits = self.fc2(torch.relu(self.fc1(hidden.flatten(1))))
        with plate as rows:
            pyro.sample("obs", dist.Categorical(logits=logits), obs=classes[rows])


class PartlyBayesian(PyroModule):
    """Sampled last layer on deterministic features, with LayerNorm, and batch norm if asked for."""

    def __init__(self, norm: nn.Module, activation: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.features = nn.Linear(3, 4)
        self.norm = norm
        self.activation = activation or nn.Tanh()
        self.out = PyroModule[nn.Linear](4, 1)
        self.out.weight = PyroSample(normal_prior(1, 4))
        self.out.bias = PyroSample(normal_prior(1))

    def forward(self, x: Tensor, y: Tensor) -> None:
        mean = self.out(self.activation(self.norm(self.features(x)))).squeeze(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean, 0.5), obs=y)


class GRUClassifier(PyroModule):
    """A deterministic GRU under sampled output weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.gru = nn.GRU(3, 4, batch_first=True)
        self.out = PyroModule[nn.Linear](4, 3)
        self.out.weight = PyroSample(normal_prior(3, 4))
        self.out.bias = PyroSample(normal_prior(3))

    def forward(self, sequences: Tensor, classes: Tensor) -> None:
        plate = pyro.plate("data", len(sequences), subsample_size=4)
        logits = self.out(self.gru(sequences[plate.indices])[0][:, -1])
        with plate as rows:
            pyro.sample("obs", dist.Categorical(logits=logits), obs=classes[rows])


class WordBag(PyroModule):
    """Sampled word vectors, averaged and classified."""

    def __init__(self) -> None:
        super().__init__()
        self.words = PyroModule[nn.Embedding](7, 3)
        self.words.weight = PyroSample(normal_prior(7, 3))

    def forward(self, tokens: Tensor, classes: Tensor) -> None:
        plate = pyro.plate("data", len(tokens), subsample_size=4)
        logits = self.words(tokens[plate.indices]).mean(1)
        with plate as rows:
            pyro.sample("obs", dist.Categorical(logits=logits), obs=classes[rows])


class Cube(torch.autograd.Function):
    """A custom function of the old style, which torch.func cannot transform."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2
