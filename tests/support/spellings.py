"""Small Pyro models that spell their layers in every way we know, and what the curvature capture must see in each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from pyro.nn import PyroModule, PyroSample
from torch import Tensor, nn
from torch.distributions import constraints
from torch.utils.checkpoint import checkpoint

from support.nets import normal_prior, numbers

ROWS, D, H, LENGTH, WORDS = 6, 4, 5, 3, 9

DATA: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: numbers(ROWS, D, seed=3),
    "other rows": lambda: numbers(4, D, seed=4),
    "sequences": lambda: numbers(ROWS, LENGTH, D, seed=5),
    "pairs": lambda: numbers(4, 4, D, seed=7),
    "tokens": lambda: (torch.arange(ROWS * LENGTH).reshape(ROWS, LENGTH) * 5 + 2) % WORDS,
}


def third(*shape: int) -> Tensor:
    """A mask that leaves out every third."""
    return torch.arange(torch.Size(shape).numel()).reshape(shape) % 3 != 1


# Likelihoods of the outputs (..., rows, k).
LIKELIHOODS: dict[str, Callable[[Tensor], Any]] = {
    "Normal": lambda f: dist.Normal(f, 0.7).to_event(1),
    "StudentT": lambda f: dist.StudentT(4.0, f, 0.7).to_event(1),
    "MultivariateNormal": lambda f: dist.MultivariateNormal(f, torch.eye(f.shape[-1]) + 0.5),
    "Bernoulli": lambda f: dist.Bernoulli(logits=f).to_event(1),
    "Poisson": lambda f: dist.Poisson(f.exp()).to_event(1),
    "Categorical": lambda f: dist.Categorical(logits=f),
    "two Categoricals": lambda f: dist.Categorical(logits=torch.stack([f, -f], -2)).to_event(1),
    "OneHotCategorical": lambda f: dist.OneHotCategorical(logits=f),
    "masked data": lambda f: dist.Normal(f, 0.7).to_event(1).mask(third(*f.shape[-2:-1])),
    "masked entries": lambda f: dist.Normal(f, 0.7).mask(third(*f.shape[-2:])).to_event(1),
}


@dataclass(frozen=True)
class Spelling:
    """One way to write a model.

    :ivar name: what it is.
    :ivar model: the model.
    :ivar data: names of its arguments, or the size of images.
    :ivar refused: site -> words that the reason why it is not captured must hold; all other sites must be captured.
    :ivar datum: site -> the plate whose rows are its data, where that is not every entry of the log-likelihood.
    """

    name: str
    model: Callable[..., Any]
    data: tuple[str | tuple[int, ...], ...] = ("rows",)
    refused: Mapping[str, str] = field(default_factory=dict)
    datum: Mapping[str, str] = field(default_factory=dict)

    def arguments(self) -> tuple[Tensor, ...]:
        """The model's arguments, in the default precision."""
        return tuple(DATA[d]() if isinstance(d, str) else numbers(ROWS, 2, *d, seed=6) for d in self.data)


def flat_prior(*shape: int) -> Any:
    """Quick to record, and as good as any other here."""
    return dist.ImproperUniform(constraints.independent(constraints.real, len(shape)), (), shape)


def observe(name: str, fn: Any) -> None:
    """Observe zeros; of a one-hot vector, the first class."""
    shape = fn.batch_shape + fn.event_shape
    first = torch.eye(shape[-1])[0] if isinstance(fn, dist.OneHotCategorical) else torch.zeros(())
    pyro.sample(name, fn, obs=first.expand(shape))


def net(
    name: str,
    mean: Callable[..., Tensor],
    data: str | tuple[int, ...] = "rows",
    *,
    likelihood: str = "Normal",
    around: Callable[[], Any] = nullcontext,
    refused: Mapping[str, str] | None = None,
    **shapes: tuple[int, ...],
) -> Spelling:
    """A net ``mean(x, **weights)`` with weights of ``shapes`` in one subsampled plate."""

    def model(x: Tensor) -> None:
        weights = {site: pyro.sample(site, flat_prior(*shape)) for site, shape in shapes.items()}
        outputs = mean(x, **weights).reshape(len(x), -1)
        with pyro.plate("data", 5 * len(x), subsample_size=len(x)), around():
            observe("y", LIKELIHOODS[likelihood](outputs))

    return Spelling(name, model, (data,), refused or {})


def module(name: str, made: nn.Module, data: str = "sequences") -> Spelling:
    """A torch module through ``functional_call``, all its parameters sampled."""
    shapes: dict[str, Any] = {site: tuple(parameter.shape) for site, parameter in made.named_parameters()}
    return net(name, lambda x, **weights: torch.func.functional_call(made, weights, (x,)), data, **shapes)


# ---- nets


MLP = {"W": (H, D), "b": (H,), "V": (2, H)}
TWO = {"W": (H, D), "V": (2, H)}


def tail(hidden: Tensor, V: Tensor) -> Tensor:
    """The second layer, on (rows, H) or on the mean over (rows, places, H)."""
    hidden = hidden.tanh()
    return F.linear(hidden.mean(1) if hidden.dim() == 3 else hidden, V)


def mlp(x: Tensor, W: Tensor, b: Tensor, V: Tensor) -> Tensor:
    return tail(F.linear(x, W, b), V)


def in_place(x: Tensor, W: Tensor, b: Tensor, V: Tensor) -> Tensor:
    z = x @ W.T
    z += b
    return F.linear(z.tanh_(), V)


def recurrent(x: Tensor, W: Tensor, U: Tensor, V: Tensor) -> Tensor:
    z = torch.zeros(len(x), H)
    for t in range(LENGTH):
        z = torch.tanh(x[:, t] @ W.T + z @ U.T)
    return z @ V.T


def sliced(x: Tensor, theta: Tensor) -> Tensor:
    W, b, V = theta[: H * D].view(H, D), theta[H * D : H * D + H], theta[H * D + H :].reshape(2, H)
    return mlp(x, W, b, V)


def split(x: Tensor, theta: Tensor) -> Tensor:
    W, b, V = theta.split([H * D, H, 2 * H])
    return mlp(x, W.view(H, D) / 2, 3 * b, V.view(2, H))


def heads(x: Tensor, Q: Tensor, K: Tensor, V: Tensor) -> Tensor:
    """Attention with a stack of matrices for each kind."""
    q, k = torch.einsum("nld,hde->nhle", x, Q), torch.einsum("nld,hde->nhle", x, K)
    return torch.einsum("nhlm,nmd,hd->nh", (q @ k.mT / D**0.5).softmax(-1), x, V)


class Attention(nn.Module):
    def __init__(self, batch_first: bool, length: int = LENGTH) -> None:
        super().__init__()
        self.heads, self.length = nn.MultiheadAttention(D, 2, batch_first=batch_first), length

    def forward(self, x: Tensor) -> Tensor:
        first, query = self.heads.batch_first, x if self.length == LENGTH else x[:, : self.length]
        if not first:
            x = query = x.transpose(0, 1)
        result: Tensor = self.heads(query, x, x, need_weights=False)[0].mean(1 if first else 0)
        return result


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.Module]) -> None:
        super().__init__()
        self.cell, self.out = cell(D, H, batch_first=True), nn.Linear(H, 1)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.out(self.cell(x)[0][:, -1])
        return result


def convolution(name: str, size: tuple[int, ...], **settings: Any) -> Spelling:
    """A convolution with bias, tanh and a mean over places."""
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(size)]
    shape = (4, 2 // settings.get("groups", 1), *(3, 2, 2)[: len(size)])

    def mean(x: Tensor, W: Tensor, b: Tensor, V: Tensor) -> Tensor:
        return F.linear(function(x, W, b, **settings).tanh().flatten(2).square().mean(2), V)

    return net(name, mean, size, W=shape, b=(4,), V=(2, 4))


# ---- models with a structure of their own


def weights() -> list[Tensor]:
    return [pyro.sample(site, normal_prior(*shape)) for site, shape in MLP.items()]


class Modules(PyroModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = PyroModule[nn.Sequential](PyroModule[nn.Linear](D, H), nn.Tanh(), PyroModule[nn.Linear](H, 2))
        for layer in (self.net[0], self.net[2]):
            for name, parameter in list(layer.named_parameters()):
                setattr(layer, name, PyroSample(lambda self, shape=parameter.shape: normal_prior(*shape)))

    def forward(self, x: Tensor) -> None:
        outputs = self.net(x)
        with pyro.plate("data", len(x)):
            observe("y", LIKELIHOODS["Normal"](outputs))


def hierarchical(x: Tensor) -> None:
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    W = pyro.sample("W", dist.Normal(0.0, tau).expand([H, D]).to_event(2))
    V = pyro.sample("V", normal_prior(2, H))
    log_sd = pyro.sample("log_sd", dist.Normal(0.0, 1.0))
    outputs = tail(F.linear(x, W), V)
    with pyro.plate("data", len(x)):
        observe("y", dist.Normal(outputs, log_sd.exp()).to_event(1))


def weights_in_plates(x: Tensor) -> None:
    with pyro.plate("outputs", H, dim=-2), pyro.plate("inputs", D, dim=-1):
        W = pyro.sample("W", dist.Normal(0.0, 1.0))
    outputs = tail(F.linear(x, W), pyro.sample("V", normal_prior(2, H)))
    with pyro.plate("data", len(x)):
        observe("y", LIKELIHOODS["Normal"](outputs))


def subsampled(x: Tensor) -> None:
    plate = pyro.plate("data", len(x), subsample_size=4)
    outputs = mlp(x[plate.indices], *weights())
    with plate:
        observe("y", LIKELIHOODS["Normal"](outputs))


def without_plates(x: Tensor) -> None:
    observe("y", LIKELIHOODS["Normal"](mlp(x, *weights())))


def two_data_sets(x: Tensor, other: Tensor) -> None:
    W, b, V = weights()
    with pyro.plate("first", 3 * len(x), subsample_size=len(x)):
        observe("y", LIKELIHOODS["Normal"](mlp(x, W, b, V)))
    with pyro.plate("second", len(other)):
        observe("c", LIKELIHOODS["Categorical"](mlp(other, W, b, V)))


def two_data_sets_at_once(x: Tensor, other: Tensor) -> None:
    first, second = mlp(torch.cat([x, other]), *weights()).split([len(x), len(other)])
    with pyro.plate("first", len(x)):
        observe("y", LIKELIHOODS["Normal"](first))
    with pyro.plate("second", len(other)):
        observe("c", LIKELIHOODS["Categorical"](second))


def two_outputs(x: Tensor) -> None:
    outputs = mlp(x, *weights())
    with pyro.plate("data", len(x)):
        observe("y", dist.Normal(outputs[:, 0], 0.5))
        observe("c", dist.Bernoulli(logits=outputs[:, 1]))


def factorisation(users: Tensor, items: Tensor, features: bool = False) -> None:
    """A datum is an entry, but a user's factors are multiplied with all items' at once."""
    U = pyro.sample("U", normal_prior(D if features else len(users), 2))
    V = pyro.sample("V", normal_prior(D if features else len(items), 2))
    level = pyro.sample("level", normal_prior(len(items)))
    rates = (users @ U) @ (items @ V).T if features else U @ V.T
    with pyro.plate("users", len(users), dim=-2), pyro.plate("items", len(items), dim=-1):
        observe("y", dist.Normal(rates + level, 1.0))


def factorisation_of_features(users: Tensor, items: Tensor) -> None:
    factorisation(users, items, features=True)


def plates_in_two_orders(x: Tensor) -> None:
    first, second = pyro.plate("first", 4, dim=-2), pyro.plate("second", 4, dim=-1)
    outputs = x @ pyro.sample("w", normal_prior(D))
    with first, second:
        observe("y", dist.Normal(outputs, 1.0))
    with second, first:
        observe("c", dist.Bernoulli(logits=outputs))


TABLE = {"E": (WORDS, H), "V": (2, H)}
MIXES = "mix several data"

# fmt: off
SPELLINGS = [
    net("F.linear", mlp, **MLP),
    net("x @ W.T + b", lambda x, W, b, V: (x @ W.T + b).tanh() @ V.T, **MLP),
    net("matmul, mm", lambda x, W, b, V: torch.mm((torch.matmul(x, W) + b).tanh(), V), W=(D, H), b=(H,), V=(H, 2)),
    net("addmm", lambda x, W, b, V: torch.addmm(b, x, W).tanh() @ V, W=(D, H), b=(H,), V=(H, 2)),
    net("W @ x.T, z @ v", lambda x, W, v: (W @ x.T).T.tanh() @ v, W=(H, D), v=(H,)),
    net("z @ v + c", lambda x, W, v, c: x.matmul(W).tanh() @ v + c, W=(D, H), v=(H,), c=()),
    net("bias on the left", lambda x, W, b, V: tail(b + x @ W.t(), V), **MLP),
    net("column of biases", lambda x, W, b, V: tail((W @ x.T + b[:, None]).T, V), **MLP),
    net("bias minus", lambda x, W, b, V: tail(b - x @ W.T, V), **MLP),
    net("minus bias", lambda x, W, b, V: tail(F.linear(x, -W) - b, V), **MLP),
    net("expanded bias", lambda x, W, b, V: tail(F.linear(x, W).exp() + b.expand(ROWS, H), V), **MLP),
    net("bias on a part", lambda x, W, b, V: tail((x @ W.T)[:, 1:4] + b, V), W=(H, D), b=(3,), V=(2, 3)),
    net("bias of a row", lambda x, W, b, V: tail(x @ W.T + b, V), refused={"b": MIXES}, **MLP | {"b": (ROWS, H)}),
    net("bias beside", lambda x, W, b, V: tail(torch.cat([z := x @ W.T, z + b], 1), V), **MLP | {"V": (2, 2 * H)}),
    net("added in place", in_place, **MLP),
    net("copied weights", lambda x, W, V: tail(x @ W.T.contiguous().view(-1).view(D, H), V), **TWO),
    net("reshaped transpose", lambda x, W, V: tail(x @ W.T.reshape(-1).view(D, H), V), **TWO),
    net("einsum", lambda x, W, V: tail(torch.einsum("ni,oi->no", x, W), V), **TWO),
    net("vmap", lambda x, W, b, V: torch.func.vmap(lambda row: V @ (W @ row + b).tanh())(x), **MLP),
    net("dot under vmap", lambda x, w: torch.func.vmap(lambda row: torch.dot(w, row))(x), w=(D,)),
    net("product and sum", lambda x, w: (x * w).sum(-1), w=(D,)),
    net("W / d ** 0.5", lambda x, W, b, V: mlp(x, W / D**0.5, b * 0.1, V), **MLP),
    net("scaled by a tensor", lambda x, W, V: tail(x @ (W * torch.full((1, 1, 1), 2.0))[0].T, V), **TWO),
    net("shared", lambda x, W, b, V: mlp(F.linear(x, W, b).tanh(), W, b, V), W=(D, D), b=(D,), V=(2, D)),
    net("shared bias", lambda x, W, U, b, V: mlp(F.linear(x, W, b).tanh(), U, b, V), **MLP, U=(H, H)),
    net("autoencoder", lambda x, W: x @ W.T @ W, W=(H, D)),
    net("product of weights", lambda x, W, U: F.linear(x, W @ U), W=(H, 3), U=(3, D), refused={"W": MIXES, "U": MIXES}),
    net("sliced vector", sliced, theta=(H * D + H + 2 * H,)),
    net("split vector", split, theta=(H * D + H + 2 * H,)),
    net("checkpoint", lambda x, W, b, V: checkpoint(lambda z: mlp(z, W, b, V), x, use_reentrant=False), **MLP),
    net("residual", lambda x, W, V: F.linear(x + F.linear(x, W).tanh(), V), W=(D, D), V=(2, D)),
    net("LayerNorm around", lambda x, W, V: tail(F.layer_norm(F.linear(x, W), (H,)), V), **TWO),
    net("BatchNorm that is fixed",
        lambda x, W, V: tail(F.batch_norm(F.linear(x, W), torch.ones(H), 2 * torch.ones(H)), V), **TWO),
    net("gain", lambda x, W, gamma, V: tail(F.linear(x, W) * gamma, V), **TWO, gamma=(H,)),
    net("dropout", lambda x, W, b, V: tail(F.dropout(F.linear(x, W, b)), V), **MLP),
    net("(N, L, d)", mlp, "sequences", **MLP),
    net("(L, N, d)", lambda x, W, b, V: tail((x.transpose(0, 1) @ W.T + b).transpose(0, 1), V), "sequences", **MLP),
    net("positions", lambda x, P, W, V: tail(F.linear(x + P, W), V), "sequences", P=(LENGTH, D), **TWO),
    net("recurrent", recurrent, "sequences", W=(H, D), U=(H, H), V=(1, H)),
    net("heads in einsum", heads, "sequences", Q=(2, D, D), K=(2, D, D), V=(2, D)),
    net("embedding", lambda t, E, V: tail(F.embedding(t, E), V), "tokens", **TABLE),
    net("padding_idx", lambda t, E, V: tail(F.embedding(t, E, padding_idx=2), V), "tokens", **TABLE),
    net("E[tokens]", lambda t, E, V: tail(E[t], V), "tokens", **TABLE),
    net("E[-tokens]", lambda t, E, V: tail(E[-t], V), "tokens", **TABLE),
    net("e[tokens]", lambda t, e, V: F.linear(e[t].tanh(), V), "tokens", e=(WORDS,), V=(2, LENGTH)),
    net("index_select", lambda t, E, V: tail(E.index_select(0, t[:, 0]), V), "tokens", **TABLE),
    net("tied embedding", lambda t, E: F.embedding(t, E).mean(1).tanh() @ E.T, "tokens", E=(WORDS, H)),
    convolution("conv1d", (7,)),
    convolution("conv2d", (5, 4)),
    convolution("conv3d", (4, 3, 3)),
    convolution("conv2d, strides and padding", (5, 4), stride=(2, 1), padding=(1, 0)),
    convolution("conv2d, dilation", (7, 4), dilation=(2, 1)),
    convolution("conv1d, padding='same'", (5,), padding="same"),
    convolution("conv1d, all of them", (9,), stride=2, padding=1, dilation=2),
    convolution("conv2d, groups", (5, 4), groups=2),
    net("conv, bias apart", lambda x, W, b, V: tail(F.conv1d(x, W).mT + b, V), (6,), W=(H, 2, 3), b=(H,), V=(2, H)),
    net("transposed convolution", lambda x, W, V: F.conv_transpose1d(x, W).tanh().flatten(1) @ V, (4,),
        refused={"W": "convolution"}, W=(2, 3, 2), V=(15, 2)),
    module("functional_call", nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, 2)), "rows"),
    module("attention, batch first", Attention(True)),
    module("attention, batch second", Attention(False)),
    module("attention, fewer queries", Attention(True, 2)),
    module("LSTM", Recurrent(nn.LSTM)),
    module("GRU", Recurrent(nn.GRU)),
    Spelling("PyroModule[nn.Linear]", Modules()),
    Spelling("hierarchical prior", hierarchical, refused={"tau": "unused", "log_sd": "exp"}),
    Spelling("weights in plates", weights_in_plates),
    Spelling("subsampled rows", subsampled),
    Spelling("no plates", without_plates),
    Spelling("two data sets", two_data_sets, ("rows", "other rows")),
    Spelling("two data sets of one size", two_data_sets, ("rows", "rows")),
    Spelling("two data sets at once", two_data_sets_at_once, ("rows", "other rows"), dict.fromkeys("WbV", MIXES)),
    Spelling("two outputs in a plate", two_outputs),
    Spelling("factorisation", factorisation, ("rows", "other rows"),
             datum={"U": "items", "V": "users", "level": "users"}),
    Spelling("factorisation of features", factorisation_of_features, ("rows", "other rows"),
             datum={"U": "users", "V": "items", "level": "users"}),
    Spelling("plates in two orders", plates_in_two_orders, ("pairs",)),
    *(net(name, mlp, likelihood=name, **MLP) for name in LIKELIHOODS if name not in ("Normal", "StudentT")),
    net("masked rows", mlp, around=lambda: poutine.mask(mask=torch.arange(ROWS) % 2 == 0), **MLP),
    net("scaled rows", mlp, around=lambda: poutine.scale(scale=torch.arange(1.0, ROWS + 1)), **MLP),
    net("penalty", lambda x, W, b, V: mlp(x, W, b, V) + W.pow(2).sum(), refused={"W": "pow"}, **MLP),
    net("non-centred", lambda x, tau, Z, V: tail(F.linear(x, tau.exp() * Z), V),
        refused={"tau": "exp", "Z": MIXES}, tau=(), Z=(H, D), V=(2, H)),
    net("triangle", lambda x, W, V: tail(F.linear(x, W.tril()), V), refused={"W": "tril"}, **TWO),
    net("dead layer", lambda x, W, b, V: tail((F.linear(x, W, b) - 99).relu(), V),
        refused=dict.fromkeys("Wb", "zero"), **MLP),
    net("BatchNorm over the data", lambda x, W, V: tail(F.batch_norm(F.linear(x, W), None, None, training=True), V),
        refused={"W": MIXES}, **TWO),
    net("LayerNorm's gain", lambda x, W, g, V: tail(F.layer_norm(F.linear(x, W), (H,), g), V),
        refused={"g": "layer_norm"}, **TWO, g=(H,)),
]
# fmt: on
