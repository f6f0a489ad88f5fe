"""The rates at which |z|², zᵀr and |r|² change in one step of each integrator of SGHMC, for a mass m and a friction C.

    SDE          d|z|² / dt = 2 zᵀr/m,   d(zᵀr) / dt = |r|²/m − zᵀ(g + C r/m),   d|r|² / dt = −2 rᵀ(g + C r/m) + 2TCd

g = ∇Û(z), the gradient that the step used, minibatch noise and all. Each step is made of kicks, drifts and a
fluctuation r ← c r + s ξ, and each of these changes the three norms by inner products of z, r, g: the kick
r ← r − τg changes |r|² by −2τ rᵀg + τ²|g|², and so on. Added up over a step and divided by h they are the rates here,
exact at any step size but for terms linear in the noise ξ, whose mean is zero; that of |z|² has not even these, except
for obabo. As h → 0 they become those of the equation, which are the identities of Fokker and Planck.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]
Rates = tuple[Array, Array, Array]


class Products(NamedTuple):
    """Inner products of position, momentum and gradient, ``(chains, draws)``."""

    zr: Array
    rr: Array
    zg: Array
    rg: Array
    gg: Array


class Numbers(NamedTuple):
    """What a step is made with, each ``(draws,)`` or a number."""

    h: Array
    mass: Array
    c: Array  # decay of the momentum in one fluctuation
    added: Array  # what one fluctuation adds to |r|² in mean: s² d


def symplectic_euler(before: Products, after: Products, k: Numbers) -> Rates:
    """Kick and fluctuation at once, then the drift; the gradient belongs to the start."""
    h, mass, c, g = k.h, k.mass, k.c, after
    grown = (c**2 - 1) * before.rr - 2 * c * h * g.rg + h**2 * g.gg + k.added
    return (
        2 * after.zr / mass - h * after.rr / mass**2,
        after.rr / mass - g.zg + (c - 1) * before.zr / h,
        grown / h,
    )


def bbaoa(before: Products, after: Products, k: Numbers) -> Rates:
    """Kick, half a drift, fluctuation, half a drift; the gradient belongs to the start."""
    h, g = k.h, after
    kicked = before.rr - 2 * h * g.rg + h**2 * g.gg
    return _drifts(before.zr - h * g.zg, kicked, after.zr, after.rr, -g.zg, h * g.gg - 2 * g.rg, k)


def baoab(before: Products, after: Products, k: Numbers) -> Rates:
    """Half a kick, half a drift, fluctuation, half a drift, half a kick; gradients of both ends."""
    h = k.h
    first = before.rr - h * before.rg + h**2 / 4 * before.gg
    second = after.rr + h * after.rg + h**2 / 4 * after.gg
    pulled = -(before.zg + after.zg) / 2
    kicked = h / 4 * (before.gg - after.gg) - before.rg - after.rg
    return _drifts(before.zr - h / 2 * before.zg, first, after.zr + h / 2 * after.zg, second, pulled, kicked, k)


def obabo(before: Products, after: Products, k: Numbers) -> Rates:
    """Fluctuation, half a kick, drift, half a kick, fluctuation; gradients of both ends."""
    h, mass, c = k.h, k.mass, k.c
    rr = c**2 * before.rr + k.added - h * c * before.rg + h**2 / 4 * before.gg  # after half a kick, in mean
    zr = c * before.zr - h / 2 * before.zg
    end = c**2 * (rr - h**2 / 4 * after.gg) - h * c * after.rg + k.added
    return (
        2 * zr / mass + h * rr / mass**2,
        (c * (zr + h * rr / mass - h / 2 * after.zg) - before.zr) / h,
        (end - before.rr) / h,
    )


def _drifts(zr1: Array, rr1: Array, zr2: Array, rr2: Array, pulled: Array, kicked: Array, k: Numbers) -> Rates:
    """Half a drift with momentum r₁, fluctuation to r₂, half a drift; zᵀr₁ before it all, zᵀr₂ after it all.

    :param pulled: what kicks do to zᵀr, per time.
    :param kicked: what they do to |r|².
    """
    h, mass, c = k.h, k.mass, k.c
    return (
        (zr1 + zr2) / mass + h * (rr1 - rr2) / (4 * mass**2),
        pulled + (rr1 + rr2) / (2 * mass) + (c - 1) * (zr1 + h * rr1 / (2 * mass)) / h,
        kicked + ((c**2 - 1) * rr1 + k.added) / h,
    )


RATES: dict[str, Callable[[Products, Products, Numbers], Rates]] = {
    "symplectic_euler": symplectic_euler, "bbaoa": bbaoa, "baoab": baoab, "obabo": obabo,
}  # fmt: skip
NORMS = ("squared_norm", "position_momentum", "momentum_squared_norm")


def norm_rates(
    kernel: Any, steps: Sequence[int], dim: int, stats: dict[str, Array], temperature: Array
) -> dict[str, Array]:
    """The rate of change of each norm in the step before each draw, and by the equation: name -> ``(chains, draws)``.

    Where the step before a draw's own was a draw too, what it started from is known; elsewhere the draw stands for it,
    which has the same law in a stationary chain. No rates for masses that differ between coordinates or
    are learnt.

    :param kernel: SGHMC or one of its kind.
    :param steps: the step of each draw.
    :param dim: number of coordinates d.
    :param stats: statistics of the draws, ``(chains, draws)``.
    :param temperature: T at each draw.
    """
    if not steps or getattr(kernel, "metric", None) is not None:
        return {}
    known = [kernel.coefficients(step) for step in (steps[:1] if kernel.is_constant() else steps)]
    if any(np.ndim(number) for number in known[0]):
        return {}
    h, _, c, scale, inverse_mass = np.array(known, dtype=float).T
    friction = np.array([kernel._friction(step) for step in steps], dtype=float)
    after = Products(
        stats["position_momentum"], stats["momentum_squared_norm"], dim * stats["configurational_temperature"],
        stats["momentum_gradient"], stats["gradient_norm"] ** 2,
    )  # fmt: skip
    follows = np.diff(steps, prepend=steps[0]) == 1
    before = Products(*(np.where(follows, np.roll(values, 1, axis=1), values) for values in after))
    exact = RATES[kernel.integrator](before, after, Numbers(h, 1.0 / inverse_mass, c, scale**2 * dim))
    rate = friction * inverse_mass
    of_sde = (
        2 * inverse_mass * after.zr,
        inverse_mass * after.rr - after.zg - rate * after.zr,
        -2 * after.rg - 2 * rate * after.rr + 2 * temperature * friction * dim,
    )
    result = {f"{name}_rate": values for name, values in zip(NORMS, exact, strict=True)}
    return result | {f"{name}_sde_rate": values for name, values in zip(NORMS, of_sde, strict=True)}
