"""The tables that common tests run over: a new kernel is a row here, and inherits them all."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bnn.kernels import (
    AMAGOLD,
    GGMC,
    SGHMC,
    SGLD,
    SGNHT,
    SVRG,
    Constant,
    ConstantSGD,
    CosineCycles,
    CyclicalSGHMC,
    CyclicalSGLD,
    NormAdjustedSGHMC,
)
from support import laws, targets
from support.laws import Setting


@dataclass(frozen=True)
class KernelCase:
    """One kernel with settings for `targets.regression`, and what is true of it."""

    name: str
    kernel: type
    settings: dict[str, Any]
    has_momentum: bool
    draws_noise_per_step: int = 1
    gradients_per_step: float = 1
    cycles: bool = False
    extra_stats: frozenset[str] = frozenset()
    model: Callable[..., Any] | None = None  # in place of a model that subsamples

    def build(self, model: Callable[..., Any], **options: Any) -> Any:
        return self.kernel(self.model or model, **{"compile": "fx", **self.settings, **options})


def _sghmc(name: str, draws_noise_per_step: int = 1, cycles: bool = False, **settings: Any) -> KernelCase:
    settings = {"step_size": 5e-3, "friction": 5.0, **settings}
    return KernelCase(name, SGHMC, settings, True, draws_noise_per_step, cycles=cycles)


def _sgnht(name: str, **settings: Any) -> KernelCase:
    settings = {"step_size": 5e-3, "friction": 5.0, **settings}
    return KernelCase(name, SGNHT, settings, True, extra_stats=frozenset({"thermostat"}))


KERNELS = [
    KernelCase("sgld", SGLD, {"step_size": 2e-4}, False),
    KernelCase(
        "sgld_cycles",
        SGLD,
        {"step_size": CosineCycles(4e-4, cycle_length=5), "preconditioner": {"weight": 0.5}},
        False,
        cycles=True,
    ),
    KernelCase(
        "constant_sgd",
        ConstantSGD,
        {"step_size": 2e-4, "preconditioner": {"weight": 0.5}, "average": True},
        False,
        draws_noise_per_step=0,
        extra_stats=frozenset({"noise_temperature"}),
    ),
    KernelCase("sgld_svrg", SGLD, {"step_size": 2e-4, "variance_reduction": SVRG(5)}, False, gradients_per_step=2.8),
    _sghmc("sghmc_bbaoa"),
    _sghmc("sghmc_symplectic_euler", integrator="symplectic_euler"),
    _sghmc("sghmc_baoab", integrator="baoab"),
    _sghmc("sghmc_obabo", draws_noise_per_step=2, integrator="obabo"),
    KernelCase(
        "norm_adjusted",
        NormAdjustedSGHMC,
        {"step_size": 5e-3, "friction": 5.0, "alpha": 2.0, "gamma": 0.5, "resample_every": 3},
        True,
    ),
    KernelCase("cyclical_sgld", CyclicalSGLD, {"step_size": 5e-5, "cycle_length": 5}, False, cycles=True),
    KernelCase(
        "cyclical_sghmc",
        CyclicalSGHMC,
        {"step_size": 4e-3, "friction": 5.0, "cycle_length": 5},
        True,
        cycles=True,
    ),
    _sgnht("sgnht"),
    _sgnht("sgnht_per_coordinate", thermostat="per_coordinate", mass={"a_scale": 2.0}),
    KernelCase(
        "ggmc",
        GGMC,
        {"step_size": 5e-3, "friction": 5.0},
        True,
        extra_stats=frozenset({"acceptance_rate"}),
        model=targets.full_regression,
    ),
    KernelCase(
        "hmc",
        GGMC,
        {"step_size": 5e-3, "friction": None, "num_steps": 3, "mass": {"a_scale": 2.0}},
        True,
        draws_noise_per_step=0,
        extra_stats=frozenset({"acceptance_rate"}),
        model=targets.full_regression,
    ),
    KernelCase(
        "ggmc_chunks",
        GGMC,
        {"step_size": 5e-3, "friction": 5.0, "num_steps": 2},
        True,
        draws_noise_per_step=0,
        gradients_per_step=4,
        extra_stats=frozenset({"acceptance_rate"}),
    ),
    KernelCase(
        "amagold",
        AMAGOLD,
        {"step_size": 5e-3, "friction": 5.0, "num_steps": 2},
        True,
        extra_stats=frozenset({"acceptance_rate"}),
    ),
    KernelCase(
        "amagold_fresh",
        AMAGOLD,
        {"step_size": 5e-3, "friction": None, "num_steps": 2, "mass": {"a_scale": 2.0}, "steps_per_sample": 2},
        True,
        extra_stats=frozenset({"acceptance_rate"}),
    ),
    _sghmc("sghmc_mass", mass={"a_scale": 2.0}, momentum_resampling=3, steps_per_sample=2, temperature=Constant(0.5)),
]

Formula = Callable[[Setting], float]


@dataclass(frozen=True)
class Law:
    """A kernel's exact law on a Gaussian: its linear recursion, and the closed forms of the stationary moments.

    With h, k, C, M, T, V of a :class:`Setting`; momentum moments are None for a kernel without momentum, a closed
    form is None where none is known with minibatch noise.
    """

    name: str
    kernel: type
    step: laws.Step
    position_variance: Formula
    momentum_variance: Formula | None = None
    covariance: Formula | None = None
    options: dict[str, Any] = field(default_factory=dict)
    holds_with_noise: bool = False  # whether the closed forms count the minibatch noise

    def settings(self, s: Setting) -> dict[str, Any]:
        """Keyword arguments of the kernel."""
        common = {"step_size": s.step_size, "temperature": s.temperature, **self.options}
        if self.momentum_variance is None:
            return {**common, "preconditioner": 1 / s.mass}
        removed = {"gradient_noise": s.removed} if s.removed else {}
        return {**common, "friction": s.friction, "mass": s.mass, **removed}


def _h2w2(s: Setting) -> float:
    return s.step_size**2 * s.curvature / s.mass


def _effective(s: Setting) -> float:
    return s.temperature + s.step_size * s.noise / (2 * s.friction)


def _euler_denominator(s: Setting) -> float:
    return 1 - s.step_size * s.friction / (2 * s.mass) - _h2w2(s) / 4


LAWS = [
    Law(
        "sgld",
        SGLD,
        laws.sgld,
        position_variance=lambda s: (
            (s.temperature + s.step_size * s.noise / (2 * s.mass))
            / (s.curvature * (1 - s.step_size * s.curvature / (2 * s.mass)))
        ),
        holds_with_noise=True,
    ),
    Law(
        "symplectic_euler",
        SGHMC,
        laws.symplectic_euler,
        position_variance=lambda s: (
            _effective(s) / s.curvature * (1 - s.step_size * s.friction / (2 * s.mass)) / _euler_denominator(s)
        ),
        momentum_variance=lambda s: s.mass * _effective(s) / _euler_denominator(s),
        covariance=lambda s: s.step_size / 2 * _effective(s) / _euler_denominator(s),
        options={"integrator": "symplectic_euler"},
        holds_with_noise=True,
    ),
    Law(
        "bbaoa",
        SGHMC,
        laws.bbaoa,
        position_variance=lambda s: s.temperature / s.curvature,
        momentum_variance=lambda s: s.mass * s.temperature,
        covariance=lambda s: s.step_size * s.temperature / 2,
    ),
    Law(
        "baoab",
        SGHMC,
        laws.baoab,
        position_variance=lambda s: s.temperature / s.curvature,
        momentum_variance=lambda s: s.mass * s.temperature * (1 - _h2w2(s) / 4),
        covariance=lambda s: 0.0,
        options={"integrator": "baoab"},
    ),
    Law(
        "obabo",
        SGHMC,
        laws.obabo,
        position_variance=lambda s: s.temperature / (s.curvature * (1 - _h2w2(s) / 4)),
        momentum_variance=lambda s: s.mass * s.temperature,
        covariance=lambda s: 0.0,
        options={"integrator": "obabo"},
    ),
]
MOMENTUM_LAWS = [law for law in LAWS if law.momentum_variance is not None]
