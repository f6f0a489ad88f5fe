"""Minibatches: which rows, in what order, and that their gradients average to the gradient of all data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from bnn import Potential
from bnn.minibatch import ArgumentStream, RowStream, Stream, TensorLeaves, arguments_of
from support.nets import data, normal_prior, numbers

# ---- rows


@pytest.mark.parametrize(("size", "batch_size"), [(12, 4), (12, 12), (10, 4), (7, 3), (5, 4), (9, 1)])
def test_rows_come_without_replacement(size: int, batch_size: int) -> None:
    """Each stretch of ``size`` rows is a permutation; over B/gcd epochs each row is used equally often."""
    chains, epochs = 3, batch_size // math.gcd(size, batch_size)
    stream = RowStream(size, batch_size, chains)
    for _ in range(3):
        rows = stream.next(epochs * size // batch_size)
        assert rows.shape == (epochs * size // batch_size, chains, batch_size)
        for chain in range(chains):
            stretches = rows[:, chain].reshape(epochs, size)
            assert torch.equal(stretches.sort(-1).values, torch.arange(size).expand(epochs, size))


def test_steps_at_once_are_the_steps_one_by_one() -> None:
    pyro.set_rng_seed(1)
    together = RowStream(10, 3, 2).next(50)
    pyro.set_rng_seed(1)
    stream = RowStream(10, 3, 2)
    assert torch.equal(together, torch.cat([stream.next(n) for n in (1, 9, 40)]))


def test_each_chain_has_its_own_order() -> None:
    rows = RowStream(50, 50, num_chains=4).next(2).reshape(8, 50)
    assert len({tuple(order) for order in rows.tolist()}) == 8


def test_orders_are_uniform() -> None:
    """The first batch of 2 rows out of 4 is each of the 12 ordered pairs equally often (chi-square, 1e-6)."""
    first = RowStream(4, 2, num_chains=6000).next(1)[0]
    counts = torch.bincount(4 * first[:, 0] + first[:, 1], minlength=16)
    pairs = counts[[4 * i + j for i in range(4) for j in range(4) if i != j]]
    assert pairs.sum() == 6000
    assert stats.chisquare(pairs.numpy()).pvalue > 1e-6


def test_replacement_draws_rows_independently() -> None:
    """Pairs inside a batch repeat a row one time in four (binomial test, 1e-6)."""
    rows = RowStream(4, 2, num_chains=2, replacement=True).next(3000).reshape(-1, 2)
    repeats = int((rows[:, 0] == rows[:, 1]).sum())
    assert stats.binomtest(repeats, len(rows), 0.25).pvalue > 1e-6
    assert stats.chisquare(torch.bincount(rows.flatten(), minlength=4).numpy()).pvalue > 1e-6


def test_seed_fixes_the_rows() -> None:
    pyro.set_rng_seed(4)
    first = RowStream(20, 6, 3).next(30)
    pyro.set_rng_seed(4)
    assert torch.equal(first, RowStream(20, 6, 3).next(30))
    assert not torch.equal(first, RowStream(20, 6, 3).next(30))


# ---- loaders


def test_items_become_arguments() -> None:
    x, y = torch.ones(2), torch.zeros(2)
    assert arguments_of((x, y)) == ((x, y), {})
    assert arguments_of([x, y]) == ((x, y), {})
    assert arguments_of({"x": x, "y": y}) == ((), {"x": x, "y": y})
    assert arguments_of(x) == ((x,), {})


def test_walks_go_round_and_chains_walk_apart() -> None:
    stream = ArgumentStream([(torch.tensor(float(i)),) for i in range(3)], num_chains=2)
    seen = [[args[0].item() for args, _ in stream.next()] for _ in range(7)]
    assert [chain[0] for chain in seen] == [0, 1, 2, 0, 1, 2, 0] == [chain[1] for chain in seen]


def test_shuffled_loader_gives_each_chain_its_own_order() -> None:
    loader = DataLoader(TensorDataset(torch.arange(40)), batch_size=40, shuffle=True)
    stream = ArgumentStream(loader, num_chains=3)
    orders = [tuple(args[0].tolist()) for _ in range(2) for args, _ in stream.next()]
    assert len(set(orders)) == 6
    assert all(sorted(order) == list(range(40)) for order in orders)


def test_arguments_survive_the_split_into_tensors() -> None:
    arguments = ((torch.ones(2), 3, [torch.zeros(1), None]), {"y": torch.arange(2), "link": "tanh"})
    leaves = TensorLeaves(arguments)
    doubled = leaves.arguments([2 * tensor for tensor in TensorLeaves.tensors(arguments)])
    assert torch.equal(doubled[0][0], torch.full((2,), 2.0)) and doubled[0][1] == 3 and doubled[0][2][1] is None
    assert torch.equal(doubled[1]["y"], torch.tensor([0, 2])) and doubled[1]["link"] == "tanh"


def test_one_shot_generator_is_refused() -> None:
    batches = ((torch.ones(2),) for _ in range(3))
    with pytest.raises(ValueError, match=r"generator is used up after one pass.*list\(\.\.\.\)"):
        ArgumentStream(batches)


def test_chains_with_batches_of_different_shapes_are_refused() -> None:
    class Uneven:
        walks = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.walks += 1
            return iter([torch.ones(self.walks)] * 3)

    with pytest.raises(ValueError, match=r"different shapes to different chains.*drop_last"):
        Stream([], Uneven(), 2).next()


# ---- the law: over one epoch, minibatch gradients average to the full gradient

N, CHAINS = 12, 2


def regression(x: Tensor, y: Tensor, batch_size: int | None = None, size: int | None = None) -> None:
    weight = pyro.sample("weight", normal_prior(3))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("data", size or len(x), subsample_size=batch_size) as rows:
        pyro.sample("obs", dist.Normal(x[rows].tanh() @ weight, sigma), obs=y[rows])


def on_batch(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", normal_prior(3))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("data", N, subsample_size=len(x)):
        pyro.sample("obs", dist.Normal(x.tanh() @ weight, sigma), obs=y)


def scaled_batch(x: Tensor, y: Tensor) -> None:
    weight = pyro.sample("weight", normal_prior(3))
    sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0)))
    with pyro.plate("data", len(x)), pyro.poutine.scale(scale=N / len(x)):
        pyro.sample("obs", dist.Normal(x.tanh() @ weight, sigma), obs=y)


def loader(batch_size: int, **options: Any) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*data(N)), batch_size=batch_size, **options)


def pieces(sizes: list[int], kind: Callable[[Tensor, Tensor], Any]) -> list[Any]:
    return [kind(x, y) for x, y in zip(*(t.split(sizes) for t in data(N)), strict=True)]


ROUTES: dict[str, tuple[Callable[[], Potential], int]] = {
    "plate": (lambda: Potential(regression, *data(N), batch_size=4, compile="fx"), 3),
    "plate, N not divisible": (lambda: Potential(regression, *data(N), batch_size=5, compile="fx"), 12),
    "plate, handlers": (lambda: Potential(regression, *data(N), batch_size=4, compile="handlers"), 3),
    "loader": (lambda: Potential(on_batch, batches=loader(4, shuffle=True), compile="fx"), 3),
    "loader, smaller last batch": (lambda: Potential(on_batch, batches=loader(5, shuffle=True), compile="fx"), 3),
    "loader, smaller last batch, handlers": (lambda: Potential(on_batch, batches=loader(5), compile="handlers"), 3),
    "loader, one batch": (lambda: Potential(on_batch, batches=loader(N), compile="fx"), 1),
    "list of tuples": (lambda: Potential(on_batch, batches=pieces([4, 4, 4], lambda x, y: (x, y)), compile="fx"), 3),
    "uneven list": (lambda: Potential(on_batch, batches=pieces([2, 6, 3, 1], lambda x, y: [x, y]), compile="fx"), 4),
    "list of dicts": (
        lambda: Potential(on_batch, batches=pieces([6, 6], lambda x, y: {"y": y, "x": x}), compile="fx"),
        2,
    ),
    "scaled batches": (lambda: Potential(scaled_batch, batches=loader(4), compile="fx"), 3),
}


@pytest.mark.parametrize("route", ROUTES)
def test_mean_gradient_over_one_epoch_is_the_full_gradient(route: str) -> None:
    torch.set_default_dtype(torch.float64)
    build, steps = ROUTES[route]
    potential, full = build(), Potential(regression, *data(N), compile="handlers")
    position = numbers(CHAINS, full.dim)
    energies, grads = zip(*(potential.energy_and_grad(position) for _ in range(steps)), strict=True)
    energy, grad = full.energy_and_grad(position)
    torch.testing.assert_close(torch.stack(grads).mean(0), grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(torch.stack(energies).mean(0), energy, rtol=1e-9, atol=1e-9)
    assert steps == 1 or not torch.allclose(grads[0], grad, rtol=1e-3)


def test_drop_last_has_the_scale_of_all_data() -> None:
    """5 of 12 rows a batch, 2 rows left out each time: over many shuffled epochs the mean is the full gradient."""
    torch.set_default_dtype(torch.float64)
    potential = Potential(on_batch, batches=loader(5, shuffle=True, drop_last=True), compile="fx")
    full = Potential(regression, *data(N), compile="handlers")
    position = numbers(1, full.dim)
    grads = torch.stack([potential.energy_and_grad(position)[1][0] for _ in range(2000)])
    error = grads.std(0) / len(grads) ** 0.5
    assert ((grads.mean(0) - full.energy_and_grad(position)[1][0]).abs() < 5.5 * error).all()  # 4 numbers at 1e-7
    torch.testing.assert_close(potential.full_energy(position), full.energy_and_grad(position)[0])


@pytest.mark.parametrize("batch_size", [4, 5])
def test_full_energy_of_a_loader(batch_size: int) -> None:
    torch.set_default_dtype(torch.float64)
    potential = Potential(on_batch, batches=loader(batch_size, shuffle=True), compile="fx")
    full = Potential(regression, *data(N), compile="handlers")
    position = numbers(3, full.dim)
    torch.testing.assert_close(potential.full_energy(position), full.energy_and_grad(position)[0])


def test_a_sampler_says_how_many_rows_there_are() -> None:
    torch.set_default_dtype(torch.float64)
    x, y = data(20)
    part = DataLoader(TensorDataset(x, y), batch_size=4, sampler=SubsetRandomSampler(range(N)))
    potential = Potential(on_batch, batches=part, compile="fx")
    full = Potential(regression, x[:N], y[:N], compile="handlers")
    position = numbers(1, full.dim)
    torch.testing.assert_close(potential.full_energy(position), full.energy_and_grad(position)[0])


def test_several_plates_average_to_the_full_gradient() -> None:
    """Crossed plates: their rows are independent, so the mean over all pairs of batches is exact."""
    torch.set_default_dtype(torch.float64)
    y = numbers(6, 4)

    def model(y: Tensor, row_batch: int | None, column_batch: int | None) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("columns", 4, subsample_size=column_batch, dim=-1) as columns:
            pyro.sample("top", dist.Normal(loc, 1.0), obs=y[0, columns])
            with pyro.plate("rows", 6, subsample_size=row_batch, dim=-2) as rows:
                pyro.sample("obs", dist.Normal(loc * scale, scale), obs=y[rows.unsqueeze(-1), columns].sin())

    potential, full = Potential(model, y, 3, 2, compile="fx"), Potential(model, y, None, None, compile="handlers")
    position = numbers(1, 2)
    grads = []
    for rows in torch.arange(6).split(3):
        for columns in torch.arange(4).split(2):
            by_name = {"rows": rows, "columns": columns}
            inputs = [by_name[name].unsqueeze(0) for name in potential._row_names]
            grads.append(potential.traced_energy_and_grad(position, inputs)[1])
    torch.testing.assert_close(torch.stack(grads).mean(0), full.energy_and_grad(position)[1], rtol=1e-9, atol=1e-9)


def test_stream_and_program_take_the_same_inputs() -> None:
    potential = Potential(regression, *data(N), batch_size=4, compile="fx")
    steps = potential.stream(CHAINS).next(5)
    assert [len(inputs) for inputs in steps] == [1] * 5
    assert all(inputs[0].shape == (CHAINS, 4) for inputs in steps)
    assert Potential(regression, *data(N), compile="fx").stream(CHAINS).next(2) == [[], []]
