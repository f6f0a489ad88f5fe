"""Noise is standard normal and independent, its generator is SFC32, and it follows the seed and goes on with a run."""

import math

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats

from bnn.checkpoints import _plain
from bnn.kernels import SGLD
from bnn.kernels._run_state import restore, state_of
from bnn.noise import BLOCK, FEWEST, LANES, LARGE, ROUNDS, Noise, _blocks, normal_numbers, sfc32, start
from bnn.tiers import Program

CPU = torch.device("cpu")
DIM = LARGE + 1001


def by_numpy(seed, count, dtype):
    """Words and normal numbers of ``count`` calls by NumPy's unsigned integers, in double precision."""
    a, b, c = np.random.SeedSequence(seed).generate_state(3 * LANES, np.uint32).reshape(3, LANES)
    k = np.ones(LANES, dtype=np.uint32)
    words = []
    with np.errstate(over="ignore"):
        for _ in range(12 + count * ROUNDS * (1 if dtype == torch.float32 else 2)):
            word = a + b + k
            a, b = b ^ (b >> np.uint32(9)), c + (c << np.uint32(3))
            c, k = ((c << np.uint32(21)) | (c >> np.uint32(11))) + word, k + np.uint32(1)
            words.append(word)
    feed, rows = iter(words[12:]), []
    for _ in range(count * ROUNDS // 2):
        u, v = (uniform(feed, dtype, top) for top in (0x7FFFFFFF, 0xFFFFFFFF))
        radius = np.sqrt(-2.0 * np.log(u / 2**31))
        angle = v / 2**31 * math.pi
        rows += [radius * np.cos(angle), radius * np.sin(angle)]
    return np.reshape(rows, (count, ROUNDS, LANES)), (a, b, c, k)


def uniform(feed, dtype, top):
    word = next(feed)
    high = (word & np.uint32(top)).view(np.int32).astype(float)
    return high + (0.5 if dtype == torch.float32 else next(feed).view(np.int32) / 2**32 + 0.5 + 2.0**-33)


def model():
    pyro.sample("z", dist.Normal(torch.zeros(DIM, dtype=torch.float64), 1.0).to_event(1))


def kernel(**settings):
    made = SGLD(model, **{"step_size": 0.1, "compile": "fx", **settings})
    made.num_chains, made.num_samples = 2, 9
    made.initial_params = {"z": torch.zeros(2, DIM, dtype=torch.float64)}
    made.setup(0)
    return made


def scores(x):
    """Standard normal each if the numbers are, and independent: of their moments, along rows and columns."""
    root, flat = math.sqrt(x.size), x.ravel()
    return {
        "mean": x.mean() * root,
        "variance": (np.mean(x**2) - 1.0) * root / math.sqrt(2.0),
        "skewness": np.mean(x**3) * root / math.sqrt(15.0),
        "kurtosis": (np.mean(x**4) - 3.0) * root / math.sqrt(96.0),
        "neighbours": np.mean(flat[1:] * flat[:-1]) * root,
        "neighbours' squares": np.mean((flat[1:] ** 2 - 1.0) * (flat[:-1] ** 2 - 1.0)) * root / 2.0,
        "of one generator": np.mean(x[1:] * x[:-1]) * root,
        "their squares": np.mean((x[1:] ** 2 - 1.0) * (x[:-1] ** 2 - 1.0)) * root / 2.0,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_recorded_numbers_are_those_of_sfc32(dtype):
    words = start(np.random.SeedSequence(5))
    made, state = [], words
    for _ in range(2):
        block, *state = normal_numbers(torch.empty(ROUNDS, LANES, dtype=dtype), *state)
        made.append(block)
    expected, after = by_numpy(5, 2, dtype)
    for word, other in zip(state, after, strict=True):
        assert np.array_equal(word.numpy().view(np.uint32), other)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(torch.stack(made).double().numpy(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiled_numbers_are_those_of_sfc32(dtype):
    torch.manual_seed(1)
    noise = Noise(dtype, CPU, "inductor")
    assert noise.program is not None
    (found,) = noise.draw(((2 * BLOCK,),))
    torch.manual_seed(1)
    expected, _ = by_numpy(int(torch.randint(2**63 - 1, ())), 2, dtype)
    tolerance = 1e-11 if dtype == torch.float64 else 2e-5
    np.testing.assert_allclose(found.double().numpy(), expected.ravel(), rtol=tolerance, atol=tolerance)


def test_extreme_words_give_finite_numbers():
    ends = torch.tensor([0, -1, -(2**31), 2**31 - 1, 1, -(2**31) + 1], dtype=torch.int32)
    grid = torch.cartesian_prod(ends, ends, ends, ends).unbind(-1)
    for dtype in (torch.float32, torch.float64):
        found = normal_numbers(torch.empty(0, dtype=dtype), *grid)[0]
        assert found.isfinite().all()
        # A generator whose first word is 0: the largest radius there is.
        zero = torch.zeros(1, dtype=torch.int32)
        radius = normal_numbers(torch.empty(0, dtype=dtype), zero, zero, zero, zero)[0][:2, 0].norm()
        smallest = 0.5 * 2.0**-31 if dtype == torch.float32 else (0.5 + 2.0**-33) * 2.0**-31
        assert float(radius) == pytest.approx(math.sqrt(-2.0 * math.log(smallest)), abs=1e-5)


def test_a_word_depends_on_all_bits_of_the_seed():
    """After twelve outputs each bit that is flipped flips half of the next word's; the score's bound has level 6e-7."""
    for part in range(3):
        words = np.random.SeedSequence(3).generate_state(3 * LANES, np.uint32).reshape(3, LANES).copy()
        flipped = words.copy()
        flipped[part] ^= np.uint32(1) << (np.arange(LANES) % 32).astype(np.uint32)
        outputs = []
        for bits in (words, flipped):
            state = [torch.from_numpy(row.view(np.int32).copy()) for row in bits]
            state.append(torch.ones(LANES, dtype=torch.int32))
            for _ in range(13):
                word, state = sfc32(*state)
            outputs.append(word.numpy().view(np.uint32))
        changed = np.unpackbits((outputs[0] ^ outputs[1]).view(np.uint8))
        assert abs(changed.mean() - 0.5) * 2.0 * math.sqrt(changed.size) < 5


def test_numbers_of_the_generator_are_standard_normal_and_independent():
    """Each of eight scores is beyond 5.5 with probability 4e-8; the bound of the p-value is 1e-6."""
    state = start(np.random.SeedSequence(7))
    blocks = []
    for _ in range(64):
        block, *state = normal_numbers(torch.empty(ROUNDS, LANES), *state)
        blocks.append(block.double().numpy())
    x = np.concatenate(blocks)
    found = scores(x)
    assert all(abs(score) < 5.5 for score in found.values()), found
    assert stats.kstest(x.ravel(), "norm").pvalue > 1e-6
    assert stats.kstest(x.ravel() ** 2 + np.roll(x, 1, axis=0).ravel() ** 2, "chi2", args=(2,)).pvalue > 1e-6
    tail = (np.abs(x) > 4.0).sum()  # Poisson, of mean 133
    assert stats.poisson(x.size * 2 * stats.norm.sf(4.0)).cdf(tail) * stats.poisson(133).sf(tail) > 1e-9


def test_numbers_of_numpy_are_standard_normal():
    torch.manual_seed(1)
    (x,) = Noise(torch.float64, CPU).draw(((2, 1 << 20),))
    found = scores(x.numpy())
    assert all(abs(score) < 5.5 for score in found.values()), found


@pytest.mark.parametrize(
    ("dim", "dtype", "own"), [(LARGE, torch.float32, 0), (LARGE - 1, torch.float64, 0), (LARGE, torch.float64, 1)]
)
def test_uncompiled_only_large_nets_in_double_precision_have_a_generator_of_their_own(dim, dtype, own):
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(dim, dtype=dtype), 1.0).to_event(1))

    made = SGLD(model, step_size=0.1, compile="fx")
    made.setup(0)
    made.advance()
    assert (made._running.noise._generator is not None) == bool(own)


def test_the_seed_fixes_the_numbers_and_sources_differ():
    def drawn(source=None):
        return (source or Noise(torch.float64, CPU)).draw(((1, DIM),))[0].clone()

    pyro.set_rng_seed(3)
    first, second = drawn(), drawn()
    pyro.set_rng_seed(3)
    assert torch.equal(drawn(), first)
    score = (first * second).mean() * math.sqrt(DIM)  # standard normal: beyond 5 with probability 6e-7
    assert abs(score) < 5
    pyro.set_rng_seed(4)
    assert not torch.equal(drawn(), first)


def test_a_short_run_records_nothing(monkeypatch):
    monkeypatch.setattr("bnn.noise.record", None)
    assert not Noise(torch.float32, CPU, "auto", FEWEST - 1).is_compiled
    with pytest.raises(TypeError):
        Noise(torch.float32, CPU, "auto", FEWEST)


@pytest.mark.parametrize(("tier", "compiled"), [("fx", False), ("inductor", True)])
def test_a_resumed_run_keeps_to_what_was_decided(tier, compiled, monkeypatch):
    decided = {}

    def choose(graph, inputs, compile, calls, found, **others):
        assert (compile, calls) == ("auto", FEWEST // BLOCK) and found is decided
        assert others["plain"](*inputs)[0] is inputs[0]
        return Program(None, tier)

    monkeypatch.setattr("bnn.noise.choose", choose)
    assert Noise(torch.float32, CPU, "auto", FEWEST, decided).is_compiled == compiled


def test_few_numbers_are_left_over():
    for numbers in [1, 16, 512, 5008, BLOCK // 2 + 16, BLOCK, BLOCK + 16, 2 * BLOCK + 16, 478_000, 10**7]:
        made = _blocks(numbers) * BLOCK
        assert made >= numbers
        assert made / (made // numbers * numbers) < (1.2 if numbers < 16 * BLOCK else 1.07)
    assert _blocks(512) == 1


class Marked:
    """Stands for the compiled loop: block i is filled with i, i + 1/2, ...; picklable, and no clock."""

    tier = "inductor"

    def __init__(self):
        self.blocks = 0

    def __call__(self, block, *words):
        block.copy_(torch.arange(block.numel()).view(block.shape) / BLOCK + self.blocks)
        self.blocks += 1


def marked(*shapes):
    noise = Noise(torch.float32, CPU)
    noise.program = Marked()
    return noise, tuple(shapes)


def test_every_number_is_handed_out_once_at_most():
    noise, shapes = marked((3, 7), (2, 2))
    seen = [torch.cat([part.flatten() for part in noise.draw(shapes)]).clone() for _ in range(1500)]
    other = noise.draw(((5000,),))[0]
    numbers = torch.cat([*seen, other])
    assert len(numbers.unique()) == len(numbers)
    assert noise.program.blocks == 3 + 2  # 682 draws of 48 places in each, 13 of 5008 places in two
    assert all(part.data_ptr() % 64 == noise._buffers[shapes].numbers.data_ptr() % 64 for part in noise.draw(shapes))


@pytest.mark.parametrize("draws", [0, 1, 681, 682, 683])
def test_a_source_goes_on_from_its_state(draws):
    noise, shapes = marked((3, 7), (2, 2))
    other = ((20_000,),)
    for _ in range(draws):
        noise.draw(shapes)
    noise.draw(other)
    again, _ = marked()
    again.program.blocks = noise.program.blocks
    again.draw(shapes)  # which must go
    again.program.blocks = noise.program.blocks
    again.load_state(_plain(noise.state(), "state"))
    for wanted in (shapes, other, shapes, other, other):
        for one, two in zip(noise.draw(wanted), again.draw(wanted), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("compile", ["fx", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_run_goes_on_bit_for_bit(compile):
    pyro.set_rng_seed(5)
    whole = kernel(compile=compile)
    for _ in range(2):
        whole.advance()
    saved = state_of(whole)
    for _ in range(2):
        whole.advance()
    pyro.set_rng_seed(6)
    resumed = kernel(compile=compile)
    resumed.advance()  # has a generator of its own, which must go
    restore(resumed, saved)
    assert (resumed._running.noise.program is not None) == (compile == "inductor")
    for _ in range(2):
        resumed.advance()
    assert torch.equal(resumed.position, whole.position)


@pytest.mark.slow
def test_a_small_run_goes_on_bit_for_bit_with_noise_that_was_made_ahead():
    def model():
        pyro.sample("z", dist.Normal(torch.zeros(300), 1.0).to_event(1))

    def kernel(seed):
        pyro.set_rng_seed(seed)
        made = SGLD(model, step_size=0.1, compile="inductor", steps_per_sample=13)
        made.num_chains, made.num_samples = 2, 9
        made.setup(0)
        made.advance()
        return made

    whole = kernel(1)
    saved = state_of(whole)
    resumed = kernel(2)
    restore(resumed, saved)
    for _ in range(20):
        whole.advance()
        resumed.advance()
        assert torch.equal(resumed.position, whole.position)


@pytest.mark.parametrize("compile", ["fx", pytest.param("inductor", marks=pytest.mark.slow)])
def test_the_law_of_the_chain(compile):
    """From 0, n steps of SGLD on N(0, 1) give 2h Σ (1 − h)^{2k}; the score is beyond 5 with probability 6e-7."""
    pyro.set_rng_seed(7)
    made = kernel(steps_per_sample=7, compile=compile)
    made.advance()
    exact = 0.2 * sum(0.9 ** (2 * k) for k in range(7))
    for chain in made.position:
        assert abs(chain.square().mean() / exact - 1.0) < 5 * math.sqrt(2 / DIM)
