"""What millions of weights ask for: no vector that is not needed, and sums that do not lose their last digits."""

import weakref

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI

from bnn.guides import AutoSWAG, TraceEnsemble_ELBO
from bnn.kernels import SGHMC
from bnn.kernels._draw_statistics import LONGEST_PIECE, _inner
from bnn.tiers import Program, over_chains
from support.allocations import Allocations


@pytest.mark.parametrize("weight", [None, torch.tensor(2.0)])
def test_inner_products_of_long_vectors(weight):
    generator = torch.Generator().manual_seed(1)
    count = 12 * LONGEST_PIECE + 5
    left, right = (torch.randn(1, count, generator=generator) for _ in range(2))
    right += left
    place = slice(3, count)
    for one, other in ((left, right), (left, left)):
        exact = (one[0, place].double() @ other[0, place].double()) * (1.0 if weight is None else weight)
        # The norm of the whole, in single precision, is off by 1e-4.
        torch.testing.assert_close(_inner(one, other, weight, place)[0].double(), exact, rtol=2e-6, atol=0)


def test_inner_products_with_a_weight_per_coordinate_and_of_several_chains():
    x = torch.arange(12.0).reshape(2, 6)
    weight = torch.tensor([1.0, 2.0, 0.0, 1.0, 3.0, 1.0])
    for rows in (x, x[:1]):
        found = _inner(rows, rows, weight, slice(1, 5))
        torch.testing.assert_close(found, (rows.square() * weight)[:, 1:5].sum(-1))


def test_a_step_on_a_million_weights_makes_its_new_state_alone():
    width = 800
    x = torch.randn(4, width)

    def model():
        one = pyro.sample("one", dist.Normal(torch.zeros(width, width), 1.0).to_event(2))
        two = pyro.sample("two", dist.Normal(torch.zeros(width, width), 1.0).to_event(2))
        with pyro.plate("data", 4):
            pyro.sample("obs", dist.Normal((torch.tanh(x @ one) @ two).sum(-1), 1.0), obs=torch.zeros(4))

    pyro.set_rng_seed(0)
    kernel = SGHMC(model, step_size=1e-6, friction=1.0, compile="fx", steps_per_sample=2)
    kernel.num_samples = 5
    kernel.setup(0)
    kernel._running.call(1)  # makes the memory for noise
    with torch.no_grad(), Allocations(width**2) as step:
        kernel._running.call(1, observed=False)
    assert step.fresh == 2
    with torch.no_grad(), Allocations(width**2) as observed:
        kernel._running.call(1)
    assert observed.fresh <= 4  # the gradient is needed to the end; the squares of the prior's energy


def test_of_chains_one_by_one_no_results_lie_about():
    made = []

    def call(z, s):
        assert not any(result() is not None for result in made)
        product = z * s
        made.append(weakref.ref(product))
        return product, z.sum(-1)

    z, s = torch.randn(3, 10), torch.tensor(2.0)
    product, total = over_chains(Program(call, "fx"), [True, False])(z, s)
    torch.testing.assert_close(product, z * s)
    torch.testing.assert_close(total, z.sum(-1))
    assert len(made) == 3


def test_swag_keeps_its_deviations_in_one_place():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(6), 1.0).to_event(1))

    pyro.set_rng_seed(0)
    guide = AutoSWAG(model, rank=3)
    svi = SVI(model, guide, pyro.optim.SGD({"lr": 0.3}), TraceEnsemble_ELBO())
    points, means = [], []
    for number in range(8):
        svi.step()
        guide.collect()
        points.append(guide.positions.detach()[0].clone())
        means.append(torch.stack(points).mean(0))
        if number == 2:
            memory = guide.deviations.data_ptr()
    assert guide.deviations.data_ptr() == memory
    wanted = torch.stack([p - m for p, m in zip(points, means, strict=True)][-3:])
    torch.testing.assert_close(guide.deviations[0], wanted)
