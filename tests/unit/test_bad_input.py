"""Bad models, data and starts are refused before any sampling, in words that say what to do.

One row per mistake: what the user does, the type of the error, and the words that its message must hold: what was
given, what is wanted, what to do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from bnn import Potential
from bnn.minibatch import ArgumentStream
from support.nets import data, normal_prior


@dataclass(frozen=True)
class Mistake:
    name: str
    act: Callable[[], Any]
    error: type[Exception]
    words: tuple[str, ...]


def regression(x: Tensor, y: Tensor, size: int = 12, batch_size: int | None = None) -> None:
    weight = pyro.sample("weight", normal_prior(3))
    sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
    with pyro.plate("data", size, subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Normal(x[rows] @ weight, sigma), obs=y[rows])


def without_rows(x: Tensor, y: Tensor, size: int = 12, batch_size: int | None = None) -> None:
    weight = pyro.sample("weight", normal_prior(3))
    with pyro.plate("data", size, subsample_size=batch_size):
        pyro.sample("obs", dist.Normal(x @ weight, 1.0), obs=y)


def observed_only(y: Tensor) -> None:
    pyro.sample("obs", dist.Normal(0.0, 1.0).expand(y.shape).to_event(1), obs=y)


def discrete() -> None:
    pyro.sample("kind", dist.Categorical(torch.ones(3)))
    pyro.sample("loc", dist.Normal(0.0, 1.0))


def enumerated(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("data", len(y)):
        kind = pyro.sample("kind", dist.Categorical(torch.ones(2)), infer={"enumerate": "parallel"})
        pyro.sample("obs", dist.Normal(loc[kind], 1.0), obs=y)


def local_latent(y: Tensor) -> None:
    loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=4) as rows:
        effect = pyro.sample("effect", dist.Normal(loc, 1.0))
        pyro.sample("obs", dist.Normal(effect, 1.0), obs=y[rows])


def net_inside_the_plate(x: Tensor, y: Tensor) -> None:
    with pyro.plate("data", len(x)):
        weight = pyro.sample("weight", normal_prior(2, 3))
        pyro.sample("obs", dist.Normal(torch.nn.functional.linear(x, weight).sum(-1), 1.0), obs=y)


def moving_support() -> None:
    top = pyro.sample("top", dist.HalfNormal(1.0))
    pyro.sample("part", dist.Uniform(0.0, top))


def sometimes_there() -> None:
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    if torch.is_grad_enabled() or sometimes_there.runs % 2:  # type: ignore[attr-defined]
        pyro.sample("extra", dist.Normal(z, 1.0))
    sometimes_there.runs += 1  # type: ignore[attr-defined]


sometimes_there.runs = 0  # type: ignore[attr-defined]


def coin(y: Tensor) -> None:
    share = pyro.sample("share", dist.Beta(1.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("obs", dist.Bernoulli(share), obs=y)


def impossible() -> None:
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("never", torch.tensor(-torch.inf))


def on_batch(x: Tensor, y: Tensor, size: int = 12) -> None:
    weight = pyro.sample("weight", normal_prior(3))
    with pyro.plate("data", size, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(x @ weight, 1.0), obs=y)


def count_batch_as_all(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", normal_prior(3))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ weight, 1.0), obs=y)


def with_one(t: Tensor, value: float) -> Tensor:
    t = t.clone()
    t.view(-1)[2] = value
    return t


def hidden_data(y: Tensor) -> Callable[[], None]:
    return lambda: regression(data()[0], y)


def loader(batch_size: int = 4, rows: int = 12) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(rows)), batch_size=batch_size)


def start(values: dict[str, Any], chains: int = 2) -> Tensor:
    return Potential(regression, *data(), compile="fx").initial(chains, values)


GOOD = {"weight": torch.zeros(2, 3), "sigma": torch.ones(2)}
X, Y = data()

MISTAKES = [
    # models
    Mistake("not a model", lambda: Potential(3), ValueError, ("int", "Pyro model")),
    Mistake(
        "unknown tier", lambda: Potential(regression, X, Y, compile="jit"), ValueError, ("'jit'", "'fx'", "'auto'")
    ),
    Mistake(
        "no latent site", lambda: Potential(observed_only, Y), ValueError, ("no latent sites", "prior", "PyroSample")
    ),
    Mistake(
        "discrete latent", lambda: Potential(discrete), NotImplementedError, ("'kind'", "Categorical", "MixtureSame")
    ),
    Mistake("enumerated latent", lambda: Potential(enumerated, Y), NotImplementedError, ("'kind'", "Sum it out")),
    Mistake(
        "local latent",
        lambda: Potential(local_latent, Y),
        NotImplementedError,
        ("'effect'", "subsampled plate 'data'", "12 rows", "full plate", "do not subsample"),
    ),
    Mistake(
        "net inside the plate",
        lambda: Potential(net_inside_the_plate, X, Y),
        ValueError,
        ("'weight' in 'data'", "weights belong before"),
    ),
    Mistake("moving support", lambda: Potential(moving_support), NotImplementedError, ("'part'", "times a")),
    Mistake("site comes and goes", lambda: Potential(sometimes_there), NotImplementedError, ("'extra'", "every run")),
    # data and plates
    Mistake(
        "batch too large",
        lambda: Potential(regression, X, Y, batch_size=13),
        ValueError,
        ("13", "12", "subsample_size"),
    ),
    Mistake(
        "empty batch", lambda: Potential(regression, X, Y, batch_size=0), ValueError, ("subsample_size=0", "at least 1")
    ),
    Mistake(
        "fewer rows than the plate",
        lambda: Potential(regression, X[:9], Y[:9]),
        ValueError,
        ("(9, 3)", "first dimension", "plate"),
    ),
    Mistake(
        "fewer rows than a plate without indices",
        lambda: Potential(without_rows, X[:9], Y[:9]),
        ValueError,
        ("(9, 3)", "12", "first dimension"),
    ),
    Mistake(
        "targets shorter than inputs",
        lambda: Potential(without_rows, X, Y[:9]),
        ValueError,
        ("'obs'", "(9,)", "(12,)", "first dimension"),
    ),
    Mistake(
        "more rows than the plate",
        lambda: Potential(regression, *data(20), batch_size=4),
        ValueError,
        ("(20, 3)", "'data'", "size 12", "first dimension"),
    ),
    Mistake(
        "plate subsamples, data do not",
        lambda: Potential(without_rows, X, Y, batch_size=4),
        ValueError,
        ("(12, 3)", "4 of 12", "x[rows]"),
    ),
    Mistake(
        "NaN input",
        lambda: Potential(regression, with_one(X, torch.nan), Y),
        ValueError,
        ("argument 0", "1 values", "remove"),
    ),
    Mistake(
        "infinite target", lambda: Potential(regression, X, with_one(Y, torch.inf)), ValueError, ("argument 1", "(12,)")
    ),
    Mistake("NaN keyword", lambda: Potential(regression, X, y=with_one(Y, torch.nan)), ValueError, ("argument 'y'",)),
    Mistake(
        "NaN in the closure",
        lambda: Potential(hidden_data(with_one(Y, torch.nan))),
        ValueError,
        ("'obs'", "NaN", "mask"),
    ),
    Mistake(
        "outside the likelihood",
        lambda: Potential(coin, 2 * (Y > 0).float()),
        ValueError,
        ("'obs'", "Bernoulli", "support"),
    ),
    # batches
    Mistake(
        "both routes",
        lambda: Potential(on_batch, X, Y, batches=loader()),
        ValueError,
        ("batches=", "(12, 3)", "one way"),
    ),
    Mistake(
        "one-shot batches",
        lambda: Potential(on_batch, batches=iter([(X, Y)])),
        ValueError,
        ("list_iterator", "list(...)"),
    ),
    Mistake("no batches", lambda: Potential(on_batch, batches=[]), ValueError, ("empty", "at least one")),
    Mistake("stream of no batches", lambda: ArgumentStream([]).next(), ValueError, ("empty", "at least one")),
    Mistake(
        "batch counted as all data",
        lambda: Potential(count_batch_as_all, batches=loader()),
        ValueError,
        ("several batches", "subsample_size=len(x)"),
    ),
    Mistake(
        "plate of another size than the loader's",
        lambda: Potential(on_batch, batches=loader(rows=20)),
        ValueError,
        ("20 rows", "12", "pyro.plate('data', 20"),
    ),
    Mistake(
        "NaN in the first batch", lambda: Potential(on_batch, batches=[(X, Y * torch.nan)]), ValueError, ("argument 1",)
    ),
    # starts
    Mistake("no chains", lambda: start(GOOD, 0), ValueError, ("num_chains is 0", "at least 1")),
    Mistake(
        "other number of chains", lambda: start(GOOD, 3), ValueError, ("2 chains", "there are 3", "first dimension")
    ),
    Mistake("site missing", lambda: start({"weight": GOOD["weight"]}), ValueError, ("missing ['sigma']",)),
    Mistake(
        "site unknown",
        lambda: start({**GOOD, "bias": torch.zeros(2)}),
        ValueError,
        ("unknown ['bias']", "['sigma', 'weight']"),
    ),
    Mistake(
        "wrong shape",
        lambda: start({**GOOD, "weight": torch.zeros(2, 4)}),
        ValueError,
        ("'weight'", "(2, 4)", "(chains, 3)"),
    ),
    Mistake(
        "different numbers of chains",
        lambda: start({**GOOD, "sigma": torch.ones(3)}),
        ValueError,
        ("'weight': 2", "'sigma': 3", "same number"),
    ),
    Mistake(
        "chain dimension missing",
        lambda: start({**GOOD, "sigma": torch.ones(())}),
        ValueError,
        ("'sigma'", "()", "(chains,)"),
    ),
    Mistake(
        "outside the support",
        lambda: start({**GOOD, "sigma": -torch.ones(2)}),
        ValueError,
        ("'sigma'", "support", "-1"),
    ),
    Mistake(
        "NaN start",
        lambda: start({**GOOD, "weight": torch.full((2, 3), torch.nan)}),
        ValueError,
        ("'weight'", "nan", "finite"),
    ),
    Mistake(
        "infinite energy",
        lambda: start({**GOOD, "weight": torch.full((2, 3), 1e30)}),
        ValueError,
        ("chains [0, 1]", "inf"),
    ),
    Mistake(
        "impossible model", lambda: Potential(impossible, compile="fx").initial(1), ValueError, ("0 of 1", "100 tries")
    ),
    Mistake(
        "unknown strategy", lambda: Potential(regression, X, Y).initial(1, "zeros"), ValueError, ("'zeros'", "'prior'")
    ),
    Mistake(
        "position of another shape",
        lambda: Potential(regression, X, Y, compile="handlers").energy_and_grad(torch.zeros(4)),
        ValueError,
        ("(4,)", "(chains, 4)"),
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_mistake_is_refused_in_words(mistake: Mistake) -> None:
    with pytest.raises(mistake.error) as caught:
        mistake.act()
    assert caught.type is mistake.error
    message = str(caught.value)
    for word in mistake.words:
        assert word in message, message
    assert "\n" not in message and len(message) < 700, message


def test_target_that_broadcasts_against_the_output_is_noticed() -> None:
    """The classic: outputs (N, 1) against targets (N,) make N * N terms."""

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3, 1))
        pyro.sample("obs", dist.Normal(x @ weight, 1.0).to_event(2), obs=y)

    with pytest.warns(RuntimeWarning, match=r"'obs'.*\(12,\).*\(12, 1\).*counts 12 times.*squeeze"):
        Potential(model, X, Y, compile="handlers")


def test_a_prior_draw_that_breaks_the_model_is_drawn_again() -> None:
    """Gamma(0.002) often underflows to zero, which is no scale; the model is sound all the same."""

    def model(y: Tensor) -> None:
        precision = pyro.sample("precision", dist.Gamma(0.002, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(0.0, precision.rsqrt()), obs=y)

    for seed in range(5):
        pyro.set_rng_seed(seed)
        assert torch.isfinite(Potential(model, Y, compile="fx").initial(2)).all()
