"""Plain nets, none of them Bayesian, with data: what ``bnn.bayesian`` must make models of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import bnn
from bnn.likelihoods import Categorical, Gaussian
from support.nets import numbers

ROWS, CLASSES = 12, 3


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.cells, self.out = nn.GRU(2, 3, batch_first=True), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.cells(x)[0][:, -1])
        return result


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.layer(x).mean(1))
        return result


class Residual(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, 2, 3, padding=1), norm, nn.Conv2d(2, 2, 3, padding=1)
        self.out = nn.Linear(2, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        result: Tensor = self.out((z + self.second(self.norm(z).relu())).mean((2, 3)))
        return result


class Words(nn.Module):
    """Embeddings that are the last layer's weights too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.hidden = nn.Embedding(CLASSES, 4), nn.Linear(4, 4)
        self.out = nn.Linear(4, CLASSES, bias=False)
        self.out.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        result: Tensor = self.out(self.hidden(self.words(tokens).mean(1)).tanh())
        return result


class Two(nn.Module):
    """Of two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(2, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return (self.first(x) * self.second(z).tanh()).sum(-1)


class Branches(nn.Linear):
    """Python that looks at a number: it cannot be recorded."""

    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z.tanh() if z.mean() > 0 else -z


@dataclass(frozen=True)
class Case:
    """A net, the shape of a row of its inputs, and the parameters that guides do not recognise as a layer's."""

    name: str
    net: Callable[[], nn.Module]
    shape: Any = (2,)
    tokens: bool = False
    unrecognised: frozenset[str] = field(default=frozenset())

    def data(self) -> tuple[Any, Tensor]:
        y = torch.arange(ROWS) % CLASSES if self.likelihood == "classes" else numbers(ROWS, seed=7)
        if self.tokens:
            return torch.arange(ROWS * 4).reshape(ROWS, 4) % CLASSES, y
        if isinstance(self.shape, list):
            return tuple(numbers(ROWS, *shape, seed=k) for k, shape in enumerate(self.shape)), y
        return numbers(ROWS, *self.shape, seed=8), y

    @property
    def likelihood(self) -> str:
        return "classes" if self.tokens or len(self.shape) == 3 else "real"

    def model(self, net: nn.Module | None = None, **settings: Any) -> Any:
        likelihood = Categorical() if self.likelihood == "classes" else Gaussian(0.3)
        return bnn.bayesian(net or self.net(), likelihood=likelihood, **settings)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1))


NORM = frozenset({"norm.weight", "norm.bias"})
NETS = [
    Case("mlp", mlp),
    Case("conv", lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES)), (1, 4, 4)),
    Case("group_norm", lambda: Residual(nn.GroupNorm(1, 2)), (1, 4, 4), unrecognised=NORM),
    Case("layer_norm", lambda: Residual(nn.LayerNorm([2, 4, 4])), (1, 4, 4), unrecognised=NORM),
    Case("batch_norm", lambda: Residual(nn.BatchNorm2d(2)).eval(), (1, 4, 4), unrecognised=NORM),
    Case("gru", Last, (3, 2)),
    Case(
        "transformer",
        lambda: Transformer().eval(),
        (3, 4),
        unrecognised=frozenset(f"layer.norm{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")),
    ),
    Case("tied_embedding", Words, tokens=True),
    Case("two_inputs", Two, [(2,), (4,)]),
]
MLP = NETS[0]
TRANSFORMER = next(case for case in NETS if case.name == "transformer")
TWO_INPUTS = NETS[-1]


class Outputs(nn.Module):
    """Returns x, shifted: its outputs are what the test says."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def model_of_outputs(likelihood: Any, **settings: Any) -> Any:
    return bnn.bayesian(Outputs(), prior=bnn.priors.Normal(1.0), likelihood=likelihood, **settings)


class Filters(nn.Module):
    """A convolution, a norm with gains, and a linear layer of one output."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.GroupNorm(2, 4)
        self.out = nn.Linear(16, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.norm(self.conv(x)).tanh().flatten(1))
        return result


def images(rows: int = 5) -> tuple[Tensor, Tensor]:
    """For :class:`Filters`."""
    return torch.randn(rows, 2, 4, 4), torch.randn(rows)
