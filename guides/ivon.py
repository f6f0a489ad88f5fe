"""IVON, the improved variational online Newton method, by name (Shen et al. 2024, Algorithm 1; Lin et al. 2020).

    q = N(m, σ²),    σ² = λ / (N (h + δ)),    θ = m + σ ε
    ĝ = ∇ℓ(θ),       ĥ = ĝ (θ − m) / σ²
    g ← β₁ g + (1 − β₁) ĝ
    h ← h + ρ (ĥ − h) + ½ ρ² (h − ĥ)² / (h + δ),        ρ = 1 − β₂
    m ← m − lr (h₀ + δ) clip((g / (1 − β₁ᵗ) + δ (m − m₀)) / (h + δ), ±ξ)

with ℓ the mean negative log-likelihood over N data, λ the weight of KL(q ‖ prior), and δ = λ / (N s²) for the prior
N(m₀, s²) of each entry. Their effective sample size ``ess`` is N / λ; the factor h₀ + δ is their ``rescale_lr``. On a
quadratic with curvature a, h settles near a + (1 − β₂) a² / (a + δ), slightly too large.

``AutoFactorizedNormal`` with ``TraceNaturalGradient_ELBO("reparametrization")`` is the same estimator with two changes
that lessen its noise: the score ε is subtracted from the gradient, so that the noise of ĥ vanishes at a Gaussian
posterior, and the correction ½ ρ² (...)² is made only where the target is negative. VOGN is a setting of it too, see
:mod:`bnn.guides.factorized_normal`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.nn.module import PyroParam, pyro_method
from pyro.optim import PyroOptim
from torch import Tensor

from bnn.guides._flat import FlatGuide

# Attribute of the parameter: what the optimizer needs of the guide.
SETTINGS = "bnn_ivon"


@dataclass
class Settings:
    """What the guide leaves on its parameter for the optimizer.

    :ivar num_data: N.
    :ivar hess_init: h₀.
    :ivar prior_loc: m₀.
    :ivar decay: δ.
    :ivar start: the parameter before the first step, until the optimizer has taken it.
    """

    num_data: float
    hess_init: float
    prior_loc: Tensor
    decay: Tensor
    start: Tensor | None


class _Refusal(torch.autograd.Function):
    """A draw that the parameter cannot be trained through."""

    @staticmethod
    def forward(ctx: Any, draw: Tensor, parameter: Tensor) -> Tensor:
        """The draw."""
        del ctx, parameter
        return draw.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """:raises ValueError: always."""
        raise ValueError(
            "AutoIVON is trained by TraceEnsemble_ELBO(num_particles=k) and the optimizer IVON of bnn.guides; for "
            "other losses, such as Trace_ELBO, use AutoFactorizedNormal, which is the same family."
        )


class _Draws(torch.autograd.Function):
    """m + σ ε, whose gradient with respect to the second row of the state is N ĥ = Σ ε ∂U/∂z / σ."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, scale: Tensor, noise: Tensor) -> Tensor:
        """The draws, of the shape of the noise."""
        ctx.save_for_backward(scale, noise)
        return torch.addcmul(state[0], scale, noise)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """Both rows of the state's gradient."""
        (grad,), (scale, noise) = grads, ctx.saved_tensors
        rows = torch.empty(2, len(scale), dtype=grad.dtype, device=grad.device)
        torch.sum(grad, 0, out=rows[0])
        torch.sum(grad * noise, 0, out=rows[1]).div_(scale)
        return rows, None, None


class AutoIVON(FlatGuide):
    """The factorized Gaussian of IVON, for :class:`IVON` and ``TraceEnsemble_ELBO(num_particles=k)``.

    Parameter: ``state`` ``(2, dim)``, m and h. Entries whose prior is not a Normal of fixed numbers have δ = 0, and
    their prior counts as data. The loss that SVI reports is the energy without the Normal priors.

    :param model: a Pyro model.
    :param num_data: N, the number of all data.
    :param kl_weight: λ; below one the likelihood counts 1/λ times.
    :param hess_init: h₀, the start of h.
    :param init_loc_fn: where m starts: a name of :func:`bnn.initialization.strategy_of`, or one of Pyro's
        ``init_to_*`` functions.
    :param create_plates: as for Pyro's guides.
    :raises ValueError: if ``num_data``, ``kl_weight`` or ``hess_init`` is not positive; later, under another loss or
        another optimizer.

    >>> import bnn, pyro, torch
    >>> from bnn.guides import IVON, AutoIVON, TraceEnsemble_ELBO
    >>> net = torch.nn.Sequential(torch.nn.Linear(1, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))
    >>> model, x = bnn.bayesian(net, likelihood=bnn.likelihoods.Gaussian(0.1)), torch.linspace(-1, 1, 50).unsqueeze(-1)
    >>> guide = AutoIVON(model, num_data=len(x), hess_init=10.0)
    >>> svi = pyro.infer.SVI(model, guide, IVON(lr=0.1, beta2=0.999), TraceEnsemble_ELBO())
    >>> losses = [svi.step(x, x.sin()) for _ in range(100)]
    >>> bnn.predict(guide, x, num_samples=50).mean.shape
    torch.Size([50])
    """

    state: Any  # a PyroParam, which reads as a tensor

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        num_data: int,
        kl_weight: float = 1.0,
        hess_init: float = 1.0,
        init_loc_fn: Any = "auto",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__(model, init_loc_fn=init_loc_fn, create_plates=create_plates)
        if not num_data > 0:
            raise ValueError(f"num_data is {num_data}; give the number of all data, not of a minibatch.")
        if not kl_weight > 0:
            raise ValueError(f"kl_weight is {kl_weight}; give a positive number: 1 is the posterior.")
        if not hess_init > 0:
            raise ValueError(f"hess_init is {hess_init}; give a positive number, such as 1.")
        self.num_data, self.ess, self.hess_init = num_data, num_data / kl_weight, hess_init

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        start = self.starts(1, args, kwargs)[0]
        prior, decay = torch.zeros_like(start), torch.zeros_like(start)
        for site in self.structure.sites.values():
            if site.normal is not None:
                prior[site.slice], decay[site.slice] = site.normal[0], 1.0 / (self.ess * site.normal[1] ** 2)
        self.register_buffer("prior_loc", prior)
        self.register_buffer("decay", decay)
        self.state = PyroParam(torch.stack([start, torch.full_like(start, self.hess_init)]), event_dim=2)

    def _checked(self) -> Any:
        """The parameter.

        :raises ValueError: if the first step was another optimizer's, to which ĥ is a gradient of h.
        """
        state = self.state
        settings: Settings | None = getattr(state, SETTINGS, None)
        if settings is not None and settings.start is not None and not torch.equal(settings.start, state.detach()):
            raise ValueError(
                "AutoIVON was moved by another optimizer than IVON: h, the second row of its state, has an estimate in "
                "place of a gradient. Use bnn.guides.IVON, and make the guide anew; for other optimizers use "
                "AutoFactorizedNormal."
            )
        return state

    def scale(self) -> Tensor:
        """σ of each entry."""
        return (self.ess * (self._checked()[1].detach() + self.decay)).rsqrt()

    @pyro_method
    def particles(self, count: int) -> Tensor:
        """Draws whose gradient with respect to the second row of ``state`` is N ĥ."""
        state, scale = self.state, self.scale()
        if torch.is_grad_enabled():
            known: Settings | None = getattr(state, SETTINGS, None)
            start = state.detach().clone() if known is None else known.start
            setattr(state, SETTINGS, Settings(self.num_data, self.hess_init, self.prior_loc, self.decay, start))
        noise = torch.randn(count, len(scale), dtype=scale.dtype, device=scale.device)
        draws: Tensor = _Draws.apply(state, scale, noise)
        return draws

    @pyro_method
    def position(self) -> Tensor:
        """One draw, through which Pyro's own ELBOs cannot train."""
        draw: Tensor = _Refusal.apply(self.flat_draws(1)[0], self.state)
        return draw

    def log_density(self, position: Tensor) -> dict[str, Tensor]:
        """The log Normal priors, up to constants: taken out of the energy, since the optimizer has them exactly."""
        result = {}
        for name, site in self.structure.sites.items():
            if site.normal is not None:
                loc, scale = site.normal
                result[name] = -0.5 * ((position[..., site.slice] - loc) / scale).square().sum(-1)
        return result

    @pyro_method
    def flat_log_density(self, positions: Tensor) -> Tensor:
        """The same in all, of all entries at once."""
        total: Tensor = (positions - self.prior_loc).square() @ (-0.5 * self.ess * self.decay)
        return total

    @torch.no_grad()
    def flat_draws(self, num_samples: int) -> Tensor:
        """Draws from N(m, σ²)."""
        loc = self.state[0].detach()
        return loc + self.scale() * torch.randn(num_samples, len(loc), dtype=loc.dtype, device=loc.device)

    @torch.no_grad()
    def flat_median(self) -> Tensor:
        """The mean m."""
        mean: Tensor = self._checked()[0].detach().clone()
        return mean


class IVONOptimizer(torch.optim.Optimizer):
    """As :class:`IVON`, for PyTorch and for Pyro's schedulers."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.1,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        clip_radius: float = float("inf"),
    ) -> None:
        for name, value in {"beta1": beta1, "beta2": beta2}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}; give a number from 0 to below 1.")
        for name, value in {"lr": lr, "clip_radius": clip_radius}.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; give a positive number.")
        super().__init__(params, {"lr": lr, "beta1": beta1, "beta2": beta2, "clip_radius": clip_radius})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step.

        :raises ValueError: for a parameter that is not of :class:`AutoIVON` under ``TraceEnsemble_ELBO``.
        """
        for group in self.param_groups:
            for leaf in group["params"]:
                if not hasattr(leaf, SETTINGS):
                    raise ValueError(
                        "IVON moves the parameter of AutoIVON alone, under TraceEnsemble_ELBO; for other guides and "
                        "losses, and models with parameters of their own, use NaturalGradientDescent."
                    )
                if leaf.grad is not None:
                    self._move(leaf, group)

    def _move(self, leaf: Tensor, group: dict[str, Any]) -> None:
        settings: Settings = getattr(leaf, SETTINGS)
        assert leaf.grad is not None
        settings.start, decay = None, settings.decay
        (grad, hess), (loc, curvature) = leaf.grad, leaf
        state, rate = self.state[leaf], 1.0 - group["beta2"]
        state["step"] = state.get("step", 0) + 1
        momentum = state.setdefault("momentum", torch.zeros_like(grad))
        momentum.mul_(group["beta1"]).add_(grad, alpha=(1.0 - group["beta1"]) / settings.num_data)
        # Two vectors of memory, whatever the formulas' length: of large nets all else is in place.
        work, damped = (hess / settings.num_data).sub_(curvature), curvature + decay
        curvature.add_(work, alpha=rate)
        curvature.addcdiv_(work.square_(), damped, value=0.5 * rate**2)
        torch.sub(loc, settings.prior_loc, out=work)
        work.mul_(decay).add_(momentum, alpha=1.0 / (1.0 - group["beta1"] ** state["step"]))
        work.div_(torch.add(curvature, decay, out=damped)).clamp_(-group["clip_radius"], group["clip_radius"])
        loc.addcmul_(work, torch.add(decay, settings.hess_init, out=damped), value=-group["lr"])


class IVON(PyroOptim):
    """The ``PyroOptim`` of IVON.

    :param lr: the learning rate; it is multiplied by h₀ + δ.
    :param beta1: decay of the gradient's running mean.
    :param beta2: decay of the curvature's.
    :param clip_radius: ξ, a bound on each entry of the step before the rate.
    :raises ValueError: for settings out of range.
    """

    def __init__(
        self, lr: float = 0.1, *, beta1: float = 0.9, beta2: float = 0.99999, clip_radius: float = float("inf")
    ) -> None:
        args = {"lr": lr, "beta1": beta1, "beta2": beta2, "clip_radius": clip_radius}
        IVONOptimizer([torch.zeros(())], **args)  # checks the numbers now
        super().__init__(IVONOptimizer, args)
