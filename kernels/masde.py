"""Any stochastic-gradient MCMC dynamics, from a diffusion matrix and a curl matrix.

    dx = [−(D(x) + Q(x)) ∇H(x) + T Γ(x)] dt + √(2 T D(x)) dW,      Γ_i = Σ_j ∂(D_ij + Q_ij)/∂x_j

with x = (z, y), y auxiliary variables of your own, H(x) = U(z) + G(y), D positive semidefinite and Q antisymmetric.
Its stationary law is exp(−H/T), so that of z is exp(−U/T), and every dynamics with this law has this form.

    x ← x + h [−(D + Q) ∇Ĥ + T Γ] + √(2hTD) ξ,   ξ ~ N(0, I)

Ma, Chen and Fox (2015), "A complete recipe for stochastic gradient MCMC", NeurIPS, equations 3, 4 and 9. Examples:

    SGLD     D = I                     no y
    SGHMC    D = diag(0, C)            y = r, G = ½ rᵀM⁻¹r,             Q = [[0, −I], [I, 0]]
    SGNHT    D = diag(0, A, 0)         y = (r, ξ), G = ½ rᵀr + ½ d (ξ − A)²,
                                       Q = [[0, −I, 0], [I, 0, r/d], [0, −rᵀ/d, 0]]

Bias: O(h), that of the Euler–Maruyama scheme; the kernels of this package that have a name discretise better.
Cost: one gradient a step; matrices and, where they depend on x, their derivatives: for small models.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnn.kernels._base import EnergyAndGrad, Evaluation, StochasticGradientKernel
from bnn.kernels._coordinates import Number
from bnn.kernels.schedules import Schedule, value_at

Field = Callable[[Tensor], Tensor]


class MaSDEState(NamedTuple):
    """Position z ``(chains, dim)`` and auxiliary variables y ``(chains, m)``."""

    position: Tensor
    auxiliary: Tensor


def drift(
    x: Tensor,
    grad: Tensor,
    diffusion: Field,
    curl: Field | None,
    temperature: Tensor | float,
    is_constant: bool = False,
) -> Tensor:
    """−(D + Q) ∇H + T Γ at one point.

    :param x: the point (z, y), ``(n,)``.
    :param grad: ∇H there.
    :param diffusion: x -> D, ``(n,)`` for a diagonal or ``(n, n)``.
    :param curl: x -> Q, ``(n, n)``; None for none.
    :param temperature: T.
    :param is_constant: whether D and Q are the same everywhere, so that Γ = 0.
    """

    def total(x: Tensor) -> Tensor:
        own = diffusion(x)
        own = own.diag() if own.dim() == 1 else own
        return own if curl is None else own + curl(x)

    if curl is None and diffusion(x).dim() == 1:  # diagonals need no matrices
        result = -diffusion(x) * grad
        return result if is_constant else result + temperature * torch.func.jacrev(diffusion)(x).diagonal()
    result = -total(x) @ grad
    if is_constant:
        return result
    return result + temperature * torch.func.jacrev(total)(x).diagonal(dim1=1, dim2=2).sum(-1)


def noise_of(matrix: Tensor, noise: Tensor) -> Tensor:
    """√D ξ for a diagonal or for a positive semidefinite matrix, which may be singular."""
    if matrix.dim() == 1:
        return matrix.clamp_min(0.0).sqrt() * noise
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ (values.clamp_min(0.0).sqrt() * (vectors.mT @ noise))


def varies(field: Field | None, x: Tensor) -> bool:
    """Whether a matrix field depends on its argument at all."""
    if field is None:
        return False
    with torch.enable_grad():
        return field(x.detach().clone().requires_grad_()).requires_grad


class MaSDE(StochasticGradientKernel):
    """A kernel from the recipe of Ma, Chen and Fox (2015): give D, Q and the auxiliary variables.

    The fields are functions of one point x = (z, y), a vector of n = dim + m numbers in unconstrained space, z first,
    in operations of PyTorch. They are checked where the chains start.

    :param model: a Pyro model; ``pyro.plate(..., subsample_size=B)`` in it makes the minibatches.
    :param step_size: time step h.
    :param diffusion: x -> D(x), a vector (a diagonal) or a positive semidefinite matrix.
    :param curl: x -> Q(x), an antisymmetric matrix; None for zero.
    :param auxiliary: number m of auxiliary variables: a number, or a function of dim.
    :param auxiliary_energy: y -> G(y), a scalar; the sum of squares halved by default. The chains start with y = 0.
    :param temperature: T; 1 samples the posterior.
    :param options: ``steps_per_sample``, ``batches``, ``compile``, ``replacement`` and ``init_strategy``; see
        :class:`~bnn.kernels._base.StochasticGradientKernel`.
    :raises ValueError: for fields of a wrong shape, a D that is not positive semidefinite, a Q that is not
        antisymmetric.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, MaSDE
    >>> def model():
    ...     pyro.sample("z", dist.StudentT(5., torch.zeros(3), 1.).to_event(1))
    >>> pyro.set_rng_seed(0)
    >>> kernel = MaSDE(model, step_size=0.05, diffusion=lambda z: 1 + z.square() / 5, steps_per_sample=10)
    >>> mcmc = MCMC(kernel, num_samples=500, num_chains=8, disable_progbar=True)
    >>> mcmc.run()
    >>> bool((mcmc.get_samples()["z"].var() - 5 / 3).abs() < 0.3)
    True
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        step_size: float | Schedule,
        diffusion: Field,
        curl: Field | None = None,
        auxiliary: int | Callable[[int], int] = 0,
        auxiliary_energy: Field | None = None,
        temperature: float | Schedule = 1.0,
        **options: Any,
    ) -> None:
        super().__init__(model, step_size=step_size, temperature=temperature, **options)
        for name, field in {"diffusion": diffusion, "curl": curl, "auxiliary_energy": auxiliary_energy}.items():
            if field is not None and not callable(field):
                raise ValueError(f"{name} is {type(field).__name__}; give a function of the point (z, y).")
        self.diffusion, self.curl = diffusion, curl
        self.auxiliary, self.auxiliary_energy = auxiliary, auxiliary_energy or _half_square
        self._fields_are_constant = False

    def init(self, position: Tensor, energy_and_grad: EnergyAndGrad) -> MaSDEState:
        """Y = 0, and a look at the fields there."""
        del energy_and_grad
        dim = position.shape[1]
        size = self.auxiliary(dim) if callable(self.auxiliary) else self.auxiliary
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise ValueError(f"auxiliary is {size!r}; give the number of auxiliary variables, 0 or more.")
        self.noises_per_step = 1 + math.ceil(size / dim)
        state = MaSDEState(position, position.new_zeros(len(position), size))
        x = torch.cat([position[0], state.auxiliary[0]])
        self._check(x)
        self._fields_are_constant = not (varies(self.diffusion, x) or varies(self.curl, x))
        return state

    def _check(self, x: Tensor) -> None:
        n, close = len(x), 1e-5
        own = self.diffusion(x)
        if own.shape not in ((n,), (n, n)):
            raise ValueError(f"diffusion gives shape {tuple(own.shape)}; give ({n},), a diagonal, or ({n}, {n}).")
        smallest = float(own.min() if own.dim() == 1 else torch.linalg.eigvalsh(0.5 * (own + own.mT)).min())
        if not smallest >= -close * float(own.abs().max()):
            raise ValueError(
                f"diffusion has the eigenvalue {smallest:.3g} where the chains start; D must be positive semidefinite."
            )
        if self.curl is not None:
            turn = self.curl(x)
            if turn.shape != (n, n):
                raise ValueError(f"curl gives shape {tuple(turn.shape)}; give ({n}, {n}).")
            if not torch.allclose(turn, -turn.mT, atol=close * max(float(turn.abs().max()), 1e-30)):
                raise ValueError("curl is not antisymmetric where the chains start: Q must be minus its transpose.")

    def coefficients(self, step: int) -> tuple[Number, ...]:
        """H and T."""
        return value_at(self.step_size, step), value_at(self.temperature, step)

    def update(
        self, state: Any, energy_and_grad: EnergyAndGrad, noise: Sequence[Tensor], coefficients: Sequence[Tensor]
    ) -> tuple[MaSDEState, Evaluation]:
        """One step of Euler and Maruyama."""
        h, temperature = coefficients
        dim = state.position.shape[1]
        energy, grad = energy_and_grad(state.position)
        x = torch.cat([state.position, state.auxiliary], 1)
        whole = torch.cat([grad, torch.func.vmap(torch.func.grad(self.auxiliary_energy))(state.auxiliary)], 1)

        def one(x: Tensor, grad: Tensor, noise: Tensor) -> Tensor:
            moved = drift(x, grad, self.diffusion, self.curl, temperature, self._fields_are_constant)
            return x + h * moved + (2.0 * h * temperature).sqrt() * noise_of(self.diffusion(x), noise)

        x = torch.func.vmap(one)(x, whole, torch.cat(list(noise), 1)[:, : x.shape[1]])
        return MaSDEState(x[:, :dim], x[:, dim:]), Evaluation(state.position, energy, grad)


def _half_square(y: Tensor) -> Tensor:
    return 0.5 * y.square().sum()
