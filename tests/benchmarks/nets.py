"""The nets of the benchmark and generated data: S is small, M a perceptron of MNIST's size, C a LeNet, T a
transformer, R a ResNet-20.

Each exists as a Pyro model and as a plain function of its weights, which the hand-written competitors use. The prior
is N(0, 1) on every weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroSample
from resnet import ResNet20
from torch import Tensor, nn

import bnn

SIGMA = 0.1  # noise of the regression

# The transformer: tokens in a row and kinds of them, width, heads, width inside a block, blocks.
LENGTH, TOKENS, WIDTH, HEADS, INNER, BLOCKS = 32, 64, 64, 4, 256, 2


@dataclass(frozen=True)
class Case:
    """One net with its data.

    :ivar step_size: so small that no competitor leaves the region where it starts.
    :ivar shapes: of weight and bias, layer by layer.
    """

    name: str
    title: str
    rows: int
    batch: int
    step_size: float
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def layers(self) -> list[str]:
        return [f"layer{i}" for i in range(len(self.shapes) // 2)]

    @cached_property
    def transformer(self) -> Transformer:
        """The net of case T, whose own parameters stay as they are."""
        return Transformer().requires_grad_(False)

    @property
    def sites(self) -> list[str]:
        if self.name == "T":
            return [name for name, _ in self.transformer.named_parameters()]
        return [f"{layer}.{kind}" for layer in self.layers for kind in ("weight", "bias")]

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets."""
        random = np.random.default_rng(20)
        if self.name == "S":
            x = random.standard_normal((self.rows, 8), dtype=np.float32)
            y = np.sin(x[:, 0]) + 0.3 * x[:, 1] + SIGMA * random.standard_normal(self.rows, dtype=np.float32)
            return x, y.astype(np.float32)
        if self.name == "T":
            return random.integers(0, TOKENS, (self.rows, LENGTH)), random.integers(0, 10, self.rows)
        x = random.random((self.rows, *((784,) if self.name == "M" else (1, 28, 28))), dtype=np.float32)
        return x, random.integers(0, 10, self.rows)

    @cached_property
    def data(self) -> tuple[Tensor, Tensor]:
        x, y = self.arrays
        return torch.from_numpy(x), torch.from_numpy(y)

    @cached_property
    def start(self) -> np.ndarray:
        """Where all competitors start: one flat vector, weights at the scale of one over the root of their fan."""
        random = np.random.default_rng(21)
        fans = [math.prod(shape[1:]) if len(shape) > 1 else 10_000 for shape in self.shapes]
        pieces = [random.standard_normal(n) / math.sqrt(fan) for n, fan in zip(self.sizes, fans, strict=True)]
        return np.concatenate(pieces).astype(np.float32)

    def model(self) -> Callable[..., Any]:
        """The Pyro model, called with all the data; its plate draws the minibatch."""
        if self.name == "T":
            likelihood = bnn.likelihoods.Categorical()
            return bnn.bayesian(
                self.transformer, prior=bnn.priors.Normal(1.0), likelihood=likelihood, batch_size=self.batch
            )
        return _Model(self)

    def forward(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        """The net as a function of its weights and biases."""
        if self.name == "T":
            return torch.func.functional_call(self.transformer, dict(zip(self.sites, weights, strict=True)), (x,))
        if self.name == "C":
            x = F.max_pool2d(F.conv2d(x, weights[0], weights[1], padding=2).relu(), 2)
            x = F.max_pool2d(F.conv2d(x, weights[2], weights[3]).relu(), 2).flatten(1)
            weights = weights[4:]
        activation = torch.tanh if self.name == "S" else torch.relu
        for i in range(0, len(weights) - 2, 2):
            x = activation(F.linear(x, weights[i], weights[i + 1]))
        return F.linear(x, weights[-2], weights[-1])

    def misfit(self, weights: Sequence[Tensor], x: Tensor, y: Tensor) -> Tensor:
        """Minus the log-likelihood of a minibatch, up to a constant, scaled to all rows."""
        out = self.forward(weights, x)
        if self.name == "S":
            return (out.squeeze(-1) - y).square().sum() * (0.5 / SIGMA**2 * self.rows / self.batch)
        return F.cross_entropy(out, y, reduction="sum") * (self.rows / self.batch)


class Transformer(nn.Module):
    """Blocks of PyTorch's own on a row of tokens, their mean, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.zeros(LENGTH, WIDTH))
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        block = nn.TransformerEncoderLayer(
            WIDTH, HEADS, INNER, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(block, BLOCKS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embedding(x) + self.positions).mean(1))


class _Model(PyroModule):
    """A net of ordinary layers whose weights are sampled."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        for layer, shape in zip(case.layers, case.shapes[::2], strict=True):
            if len(shape) == 4:
                module = PyroModule[nn.Conv2d](shape[1], shape[0], shape[2], padding=2 if shape[1] == 1 else 0)
            else:
                module = PyroModule[nn.Linear](shape[1], shape[0])
            for name, value in list(module.named_parameters()):
                setattr(module, name, PyroSample(dist.Normal(torch.zeros(value.shape), 1.0).to_event(value.dim())))
            setattr(self, layer, module)

    def forward(self, x: Tensor, y: Tensor) -> None:
        case = self.case
        plate = pyro.plate("data", case.rows, subsample_size=case.batch)
        rows = plate.indices
        out = self.net(x[rows])
        with plate:
            if case.name == "S":
                pyro.sample("obs", dist.Normal(out.squeeze(-1), SIGMA), obs=y[rows])
            else:
                pyro.sample("obs", dist.Categorical(logits=out), obs=y[rows])

    def net(self, x: Tensor) -> Tensor:
        layers = [getattr(self, name) for name in self.case.layers]
        if self.case.name == "C":
            x = F.max_pool2d(layers[0](x).relu(), 2)
            x = F.max_pool2d(layers[1](x).relu(), 2).flatten(1)
            layers = layers[2:]
        activation = torch.tanh if self.case.name == "S" else torch.relu
        for layer in layers[:-1]:
            x = activation(layer(x))
        return layers[-1](x)


def _perceptron(*sizes: int) -> tuple[tuple[int, ...], ...]:
    pairs = zip(sizes[:-1], sizes[1:], strict=True)
    return tuple(shape for inputs, outputs in pairs for shape in ((outputs, inputs), (outputs,)))


def perceptron(parameters: int, batch: int = 32, rows: int = 2048) -> Case:
    """Two equal hidden layers, of about so many weights in all: on inputs as of S, from 20,000 on as of M."""
    name, inputs, outputs = ("M", 784, 10) if parameters > 20_000 else ("S", 8, 1)
    sides = inputs + outputs + 2
    width = max(1, round((math.sqrt(sides**2 + 4 * (parameters - outputs)) - sides) / 2))
    title = f"{inputs}-{width}-{width}-{outputs}, N={rows}, batch {batch}"
    return Case(name, title, rows, batch, 1e-10, _perceptron(inputs, width, width, outputs))


@dataclass(frozen=True)
class _ResidualCase(Case):
    """ResNet-20 with filter response norm, on images of CIFAR's shape."""

    @cached_property
    def plain(self) -> nn.Module:
        return ResNet20()

    @property
    def sites(self) -> list[str]:
        return [name for name, _ in self.plain.named_parameters()]

    @cached_property
    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(20)
        return random.random((self.rows, 3, 32, 32), dtype=np.float32), random.integers(0, 10, self.rows)

    def model(self) -> Any:
        prior, likelihood = bnn.priors.Normal(1.0), bnn.likelihoods.Categorical()
        return bnn.bayesian(self.plain, prior=prior, likelihood=likelihood, batch_size=self.batch)

    def forward(self, weights: Sequence[Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(self.plain, dict(zip(self.sites, weights, strict=True)), (x,))


CASES = {
    "S": Case("S", "8-50-1 tanh, N=1000, batch 32", 1000, 32, 1e-7, _perceptron(8, 50, 1)),
    "M": Case("M", "784-400-400-10 relu, N=60000, batch 128", 60_000, 128, 1e-8, _perceptron(784, 400, 400, 10)),
    "C": Case(
        "C",
        "LeNet on 1x28x28, N=60000, batch 128",
        60_000,
        128,
        1e-8,
        ((6, 1, 5, 5), (6,), (16, 6, 5, 5), (16,), *_perceptron(400, 120, 84, 10)),
    ),
    "R": _ResidualCase(
        "R",
        "ResNet-20 with filter response norm on 3x32x32, N=2000, batch 32",
        2000,
        32,
        1e-9,
        tuple(tuple(parameter.shape) for parameter in ResNet20().parameters()),
    ),
    "T": Case(
        "T",
        f"transformer, {BLOCKS} blocks of width {WIDTH}, {HEADS} heads, {LENGTH} tokens, N=2000, batch 16",
        2000,
        16,
        1e-8,
        tuple(tuple(parameter.shape) for parameter in Transformer().parameters()),
    ),
}
# What the benchmarks run unless told otherwise.
USUAL = ("S", "M", "C", "T")
