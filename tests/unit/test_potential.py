"""The potential against Pyro's own handlers: energy and gradient of every kind of model, in every tier.

The reference below shares no code with the potential: it conditions the model on constrained values and on the same
minibatch rows, sums the trace's log density, adds the Jacobians by hand, and lets autograd differentiate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import init_to_median, init_to_value
from scipy import stats
from torch import Tensor
from torch.distributions import biject_to

from bnn import Potential
from support import models
from support.models import MODELS, Row

SEED = 7
RTOL = {torch.float64: 1e-9, torch.float32: 1e-4}


def rows_of(condition: Callable[[Row], Any]) -> Any:
    return pytest.mark.parametrize("row", [row for row in MODELS if condition(row)], ids=lambda row: row.name)


def potential_of(row: Row, dtype: torch.dtype = torch.float64, compile: str = "fx", **options: Any) -> Potential:
    torch.set_default_dtype(dtype)
    model, args, kwargs = row.build()
    with warnings.catch_warnings():
        if row.fallback:
            warnings.simplefilter("ignore", RuntimeWarning)
        return Potential(model, *args, compile=compile, **options, **kwargs)


def positions(potential: Potential, chains: int) -> Tensor:
    generator = torch.Generator().manual_seed(chains)
    return 0.4 * torch.randn(chains, potential.dim, generator=generator, dtype=torch.float64).to(potential.dtype)


def reference(potential: Potential, position: Tensor, rows: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Energy and gradient at one position ``(dim,)``, by Pyro's handlers alone."""
    z = position.clone().requires_grad_()
    with pyro.validation_enabled(False), poutine.block():
        values: dict[str, Tensor] = {}
        log_det = torch.zeros((), dtype=z.dtype)
        for name, site in potential.sites.items():
            transform = biject_to(site.support)
            unconstrained = z[site.slice].reshape(transform.inverse_shape(site.value_shape)).to(site.dtype)
            values[name] = transform(unconstrained)
            log_det = log_det + transform.log_abs_det_jacobian(unconstrained, values[name]).sum()
        conditioned = poutine.condition(potential.model, {**values, **rows})
        trace = poutine.trace(conditioned).get_trace(*potential.args, **potential.kwargs)
        energy = -trace.log_prob_sum() - log_det
    (grad,) = torch.autograd.grad(energy, z)
    return energy.detach(), grad


def rows_by_plate(potential: Potential, inputs: list[Tensor], chain: int) -> dict[str, Tensor]:
    """The rows that a chain saw; plates whose rows reach nothing may have any."""
    rows = {plate.name: torch.arange(plate.batch_size) for plate in potential.plates.values()}
    rows.update({name: index[chain] for name, index in zip(potential._row_names, inputs, strict=True)})
    return rows


def assert_agrees(potential: Potential, chains: int) -> None:
    rtol = RTOL[torch.float32 if any(s.dtype == torch.float32 for s in potential.sites.values()) else torch.float64]
    position = positions(potential, chains)
    pyro.set_rng_seed(SEED)
    (inputs,) = potential.stream(chains).next(1)
    pyro.set_rng_seed(SEED)  # energy_and_grad starts the same stream
    energy, grad = potential.energy_and_grad(position)
    assert energy.shape == (chains,) and grad.shape == position.shape
    assert energy.dtype == grad.dtype == potential.dtype
    assert not energy.requires_grad and not grad.requires_grad
    for chain, z in enumerate(position):
        expected, expected_grad = reference(potential, z, rows_by_plate(potential, inputs, chain))
        torch.testing.assert_close(energy[chain], expected, rtol=rtol, atol=rtol, check_dtype=False)
        scale = float(expected_grad.abs().max())
        torch.testing.assert_close(grad[chain], expected_grad, rtol=rtol, atol=rtol * (1 + scale), check_dtype=False)


# ---- energy and gradient


@pytest.mark.parametrize(
    ("dtype", "chains"),
    [(torch.float64, 1), (torch.float64, 3), (torch.float32, 1)],
    ids=["float64-one chain", "float64-three chains", "float32-one chain"],
)
@rows_of(lambda row: not row.is_random)
def test_recorded_program_agrees_with_the_handlers(row: Row, dtype: torch.dtype, chains: int) -> None:
    potential = potential_of(row, dtype)
    assert potential.is_recorded == (not row.fallback)
    assert_agrees(potential, chains)


@rows_of(lambda row: not row.is_random)
def test_handlers_tier_agrees_with_the_handlers(row: Row) -> None:
    potential = potential_of(row, compile="handlers")
    assert not potential.is_recorded
    assert_agrees(potential, 2)


@pytest.mark.slow
@pytest.mark.parametrize("chains", [1, 3])
@rows_of(lambda row: row.inductor)
def test_inductor_tier_agrees_with_the_handlers(row: Row, chains: int) -> None:
    assert_agrees(potential_of(row, compile="inductor"), chains)


@rows_of(lambda row: row.name in ("functional_mlp", "several_subsampled_plates"))
def test_minibatch_energies_are_unbiased(row: Row) -> None:
    """The full energy is the mean over independent minibatches: 5 standard errors, false alarms below 1e-6."""
    potential = potential_of(row, replacement=True)
    position = positions(potential, 1)
    energies = potential.energy_and_grad(position.expand(4000, -1))[0]
    error = energies.std() / len(energies) ** 0.5
    assert error > 0
    assert abs(energies.mean() - potential.full_energy(position)[0]) < 5 * error


@rows_of(lambda row: row.name == "gru")
def test_chains_run_one_after_another_where_vmap_cannot(row: Row) -> None:
    potential = potential_of(row)
    assert potential.vectorizes()
    assert_agrees(potential, 3)
    assert potential.is_recorded and not potential.vectorizes()


# ---- all data


@pytest.mark.parametrize("compile", ["fx", "handlers"])
@rows_of(lambda row: not row.is_random and row.name not in ("sequential_plate", "control_flow"))
def test_full_energy_is_the_energy_with_full_plates(row: Row, compile: str) -> None:
    potential = potential_of(row, compile=compile)
    position = positions(potential, 2)
    every = all_rows(row)
    expected = torch.stack([reference(every, z, {})[0] for z in position])
    energy = potential.full_energy(position)
    rtol = 1e-6 if row.name == "mixed_precision" else 1e-9
    torch.testing.assert_close(energy, expected, rtol=rtol, atol=rtol)


def all_rows(row: Row) -> Potential:
    """The same model with every plate full: a random minibatch cannot hide in what it is compared with."""
    subsample = pyro.plate.__init__

    def full(self: Any, name: str, size: Any = None, subsample_size: Any = None, *args: Any, **kwargs: Any) -> None:
        subsample(self, name, size, None, *args, **kwargs)

    class Full:
        def __init__(self, model: Any) -> None:
            self.model = model

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(pyro.plate, "__init__", full)
                return self.model(*args, **kwargs)

    model, args, kwargs = row.build()
    potential = Potential(Full(model), *args, compile="handlers", **kwargs)
    assert not potential.plates
    return potential


def test_full_energy_of_a_plate_that_is_looped_over() -> None:
    (row,) = (row for row in MODELS if row.name == "sequential_plate")
    potential = potential_of(row)
    position = positions(potential, 2)
    (y,) = potential.args
    log_prob = dist.Normal(position, 1.0).log_prob(y).sum(-1) + dist.Normal(0.0, 1.0).log_prob(position[:, 0])
    torch.testing.assert_close(potential.full_energy(position), -log_prob)


# ---- recording and its fallback


@rows_of(lambda row: bool(row.fallback))
def test_fallback_warns_once_and_names_the_cause(row: Row) -> None:
    model, args, kwargs = row.build()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        potential = Potential(model, *args, compile="fx", **kwargs)
        potential.energy_and_grad(positions(potential, 3))
        potential.full_energy(positions(potential, 1))
        potential.initial(2)
    assert [w.category for w in caught] == [RuntimeWarning]
    message = str(caught[0].message)
    assert "cannot be recorded" in message and row.fallback in message
    assert caught[0].filename == __file__


def test_fallback_shows_the_line_of_the_model() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z if z > 0 else -z, 1.0), obs=torch.tensor(1.0))

    with pytest.warns(RuntimeWarning, match=r"test_potential.py, line \d+: .*z if z > 0 else -z"):
        Potential(model)


def test_a_recording_that_disagrees_is_not_used() -> None:
    """A model that changes from run to run records as it was once; the comparison with the handlers sees it."""
    calls = [0]

    def model() -> None:
        calls[0] += 1
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(z, 1.0), obs=torch.tensor(0.01 * calls[0]))

    with pytest.warns(RuntimeWarning, match="recorded energy is"):
        assert not Potential(model).is_recorded


@pytest.mark.parametrize("size", [1, 1000])
def test_a_wrong_small_site_is_seen_beside_large_ones(size: int) -> None:
    """The comparison looks at each site by itself: one wrong gradient of 1 among thousands is enough."""

    class WrongGradient(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return grad * (1.01 if torch._C._functorch.peek_interpreter_stack() is not None else 1.0)

    def model() -> None:
        small = pyro.sample("small", dist.Normal(0.0, 1.0))
        large = pyro.sample("large", dist.Normal(0.0, 1.0).expand([size]).to_event(1))
        pyro.factor("wrong", -((WrongGradient.apply(small) - 1.0) ** 2) - 50.0 * (large - 1.0).square().sum())

    with pytest.warns(RuntimeWarning, match="gradient differs at site 'small'"):
        Potential(model, compile="fx")


def test_prior_scale_that_depends_on_a_latent_stays_so() -> None:
    """Even where every run so far saw the same number, as with a threshold that is seldom crossed."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        scale = torch.where(z > 3.0, 10.0, 1.0)
        pyro.sample("w", dist.Normal(0.0, scale))

    potential = Potential(model, compile="fx")
    assert potential.is_recorded
    energy, _ = potential.energy_and_grad(torch.tensor([[0.0, 1.0], [4.0, 1.0]]))
    z, scale = torch.tensor([0.0, 4.0]), torch.tensor([1.0, 10.0])
    expected = -dist.Normal(0.0, 1.0).log_prob(z) - dist.Normal(0.0, scale).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(energy, expected)


def test_prior_scale_by_python_branch_stays_so_in_the_fallback() -> None:
    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("w", dist.Normal(0.0, 10.0 if z > 3.0 else 1.0))

    with pytest.warns(RuntimeWarning):
        potential = Potential(model, compile="fx")
    energy, _ = potential.energy_and_grad(torch.tensor([[4.0, 1.0]]))
    expected = -dist.Normal(0.0, 1.0).log_prob(torch.tensor(4.0)) - dist.Normal(0.0, 10.0).log_prob(torch.tensor(1.0))
    torch.testing.assert_close(energy[0], expected)


def test_recording_leaves_model_and_generator_alone() -> None:
    """Neither parameters nor the user's handlers see the runs of the potential."""
    model, args, kwargs = models.parameters()
    with poutine.trace() as trace:
        potential = Potential(model, *args, compile="fx", **kwargs)
        potential.energy_and_grad(positions(potential, 2))
    assert not [name for name, node in trace.trace.nodes.items() if node["type"] == "sample"]
    assert float(pyro.param("sigma").detach()) == pytest.approx(0.7)


# ---- noise in the model


@pytest.mark.parametrize("compile", ["fx", "handlers"])
@pytest.mark.parametrize("conv", [False, True], ids=["vectorized", "looped"])
def test_noise_is_fresh_per_chain_and_call(compile: str, conv: bool) -> None:
    """Energies are a known number plus a standard normal draw: Kolmogorov-Smirnov, false alarms at 1e-6."""

    def model() -> None:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if conv:  # convolutions run chain by chain
            torch.conv1d(z.reshape(1, 1, 1), torch.ones(1, 1, 1))
            pyro.factor("conv", 0.0 * torch.conv1d(z.reshape(1, 1, 1), torch.ones(1, 1, 1)).sum())
        pyro.factor("noise", torch.randn(()))

    potential = Potential(model, compile=compile)
    assert potential.is_random == (compile == "fx") and potential.is_recorded == (compile == "fx")
    if compile == "fx":
        assert potential.vectorizes() == (not conv)
    position = torch.zeros(8, 1)
    energies = torch.stack([potential.energy_and_grad(position)[0] for _ in range(25)])
    noise = (energies - dist.Normal(0.0, 1.0).log_prob(torch.zeros(())).neg()).flatten()
    assert len(noise.unique()) == noise.numel()
    assert stats.kstest(noise.double().numpy(), "norm").pvalue > 1e-6


@rows_of(lambda row: row.is_random)
def test_random_models_record_and_agree_on_the_same_noise(row: Row) -> None:
    potential = potential_of(row)
    assert potential.is_recorded and potential.is_random
    position = positions(potential, 1)
    (inputs,) = potential.stream(1).next(1)
    rows = rows_by_plate(potential, inputs, 0)
    program = potential.program(lambda z, *i: potential.traced_energy_and_grad(z, i), [position, *inputs], [True] * 2)
    state = torch.get_rng_state()
    energy, grad = program(position, *inputs)
    again, _ = program(position, *inputs)
    assert energy != again
    values = {name: value[0] for name, value in potential.constrain(position).items()}  # all sites are real
    torch.set_rng_state(state)
    conditioned = poutine.condition(potential.model, {**values, **rows})
    expected = -poutine.trace(conditioned).get_trace(*potential.args).log_prob_sum()
    torch.testing.assert_close(energy[0], expected.detach())
    three, grads = potential.energy_and_grad(position.expand(3, -1))
    assert len(three.unique()) == 3 and not torch.equal(grads[0], grads[1])


# ---- positions


@rows_of(lambda row: not row.fallback)
def test_constrain_and_unconstrain_are_inverse(row: Row) -> None:
    potential = potential_of(row, compile="handlers")
    position = positions(potential, 4)
    values = potential.constrain(position)
    for name, site in potential.sites.items():
        assert values[name].shape == (4, *site.value_shape)
        assert site.support.check(values[name]).all()
    rtol = 1e-5 if row.name == "mixed_precision" else 1e-9
    torch.testing.assert_close(potential.unconstrain(values), position, rtol=rtol, atol=rtol)
    torch.testing.assert_close(potential.flatten(potential.unflatten(position)), position, rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["auto", "prior", "uniform"])
@rows_of(
    lambda row: row.name in ("pyro_module_mlp", "horseshoe", "lkj_cholesky", "flat_priors", "conv_net", "control_flow")
)
def test_starts_are_finite_and_apart(row: Row, strategy: str) -> None:
    potential = potential_of(row)
    start = potential.initial(3, strategy)
    energy, grad = potential.energy_and_grad(start)
    assert torch.isfinite(energy).all() and torch.isfinite(grad).all()
    assert (start[0] != start[1]).all() and (start[1] != start[2]).all()


@pytest.mark.parametrize(
    "strategy", ["median", "mean", "feasible", init_to_median], ids=["median", "mean", "feasible", "function"]
)
def test_other_init_functions_work(strategy: Any) -> None:
    (row,) = (row for row in MODELS if row.name == "horseshoe")
    potential = potential_of(row)
    assert torch.isfinite(potential.energy_and_grad(potential.initial(2, strategy))[0]).all()


def test_given_values_start_each_chain() -> None:
    (row,) = (row for row in MODELS if row.name == "gamma_precision")
    potential = potential_of(row)
    values = {"weight": torch.arange(6.0).reshape(2, 3), "precision": torch.tensor([0.5, 2.0])}
    start = potential.initial(2, values)
    for name, value in potential.constrain(start).items():
        torch.testing.assert_close(value, values[name])
    by_function = potential.initial(1, init_to_value(values={name: value[0] for name, value in values.items()}))
    torch.testing.assert_close(by_function[0], start[0])


def test_the_same_seed_gives_the_same_energies() -> None:
    results = []
    for _ in range(2):
        pyro.set_rng_seed(3)
        potential = potential_of(MODELS[0])
        start = potential.initial(2)
        results.append(torch.stack([potential.energy_and_grad(start)[0] for _ in range(5)]))
    assert torch.equal(*results)
