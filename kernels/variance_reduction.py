"""Minibatch gradients with less noise: control variates about an anchor, fixed or renewed.

    ∇Ũ(z) = ∇U(a) + [∇Û(z) − ∇Û(a)]                        the same minibatch in both, ∇U over all data

Baker, Fearnhead, Fox and Nemeth (2019), "Control variates for stochastic gradient MCMC", Statistics and Computing 29,
equation 3: a is fixed, near the mode. Dubey et al. (2016), "Variance reduction in stochastic gradient Langevin
dynamics", NIPS, algorithm 2 (SVRG-LD): a is set to where the chain stands every so many steps.

∇Ũ is unbiased at every z, and has no noise at z = a. Its noise has variance of order ‖z − a‖², that of the curvature of
the data's terms: none at all where their curvature does not depend on the data. The prior's part cancels.
Cost: two minibatch gradients a step, and a pass over all data for each new anchor.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from bnn.potential import Potential

if TYPE_CHECKING:
    from bnn.kernels._algorithm import EnergyAndGrad


class Anchor(NamedTuple):
    """Where the control variates are exact: position ``(chains, dim)``, energy of all data ``(chains,)``, gradient."""

    position: Tensor
    energy: Tensor
    grad: Tensor


def reduced(energy_and_grad: EnergyAndGrad, anchor: Anchor) -> EnergyAndGrad:
    """Û(z) − Û(a) + U(a) + (z − a)·(∇U(a) − ∇Û(a)) and its gradient, which is ∇Ũ(z)."""

    def evaluate(position: Tensor) -> tuple[Tensor, Tensor]:
        energy, grad = energy_and_grad(position)
        energy_there, grad_there = energy_and_grad(anchor.position)
        change = anchor.grad - grad_there
        linear = ((position - anchor.position) * change).sum(-1)
        return energy - energy_there + anchor.energy + linear, grad + change

    return evaluate


class VarianceReduction(ABC):
    """Where the anchor is, as the setting ``variance_reduction=`` of a kernel."""

    @abstractmethod
    def first_anchor(self, potential: Potential, position: Tensor) -> Tensor:
        """Anchors ``(chains, dim)`` at the start of a run from ``position``."""

    @abstractmethod
    def steps_between(self, potential: Potential) -> int | None:
        """Steps from one anchor to the next, None for ever."""


def check_reduction(given: Any, metropolised: bool) -> None:
    """:raises ValueError: unless ``given`` is a way of variance reduction, or None, that suits the kernel."""
    if given is not None and not isinstance(given, VarianceReduction):
        raise ValueError(f"variance_reduction is {given!r}; give ControlVariate(...), SVRG(...) or None.")
    if given is not None and metropolised:
        raise ValueError(
            "variance_reduction is not for kernels with a Metropolis test, whose proposals must be as likely as "
            "their reverse: leave it out, or use SGHMC."
        )


class ControlVariate(VarianceReduction):
    """Control variates about a fixed anchor (Baker et al. 2019).

    For chains that stay near the anchor: far from it, the noise is larger than that of plain minibatches. Start them
    there too, by ``init_strategy=init_to_value(values=...)``.

    :param anchor: a value of each latent site in the model's own space, such as the mode that ``AutoDelta`` finds.
    :raises ValueError: for an anchor that is not a dict; for one that does not suit the model, when that is known.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGLD, ControlVariate
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=10) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> kernel = SGLD(model, step_size=1e-3, variance_reduction=ControlVariate({"mean": torch.tensor(2.)}))
    >>> mcmc = MCMC(kernel, num_samples=200, num_chains=8, disable_progbar=True)
    >>> mcmc.run(torch.linspace(-8., 12., 100))
    >>> bool((mcmc.get_samples()["mean"].mean() - 200 / 101).abs() < 0.1)
    True
    """

    def __init__(self, anchor: Mapping[str, Tensor]) -> None:
        if not isinstance(anchor, Mapping):
            raise ValueError(
                f"anchor is {type(anchor).__name__}; give a dict with a value of each latent site, in the model's "
                "own space."
            )
        self.anchor = {name: torch.as_tensor(value).detach() for name, value in anchor.items()}

    def first_anchor(self, potential: Potential, position: Tensor) -> Tensor:
        """The given one, for every chain."""
        try:
            anchor = potential.unconstrain({name: value.unsqueeze(0) for name, value in self.anchor.items()})
        except ValueError as error:
            raise ValueError(f"anchor of ControlVariate: {error}") from None
        if not torch.isfinite(anchor).all():
            raise ValueError(
                f"anchor of ControlVariate is not finite at site {potential.site_at(anchor)!r}, or lies on the edge of "
                "its support: give finite values inside it."
            )
        return anchor.expand(len(position), -1).contiguous()

    def steps_between(self, potential: Potential) -> None:
        """Never."""
        del potential


class SVRG(VarianceReduction):
    """Stochastic variance-reduced gradients: the anchor is where the chain stood at most ``every`` steps ago.

    :param every: steps from one anchor to the next; None for as many as there are minibatches in the data, which makes
        three gradients a step.
    :raises ValueError: unless ``every`` is a whole number of at least 1.

    >>> import pyro, torch, pyro.distributions as dist
    >>> from bnn.kernels import MCMC, SGHMC, SVRG
    >>> def model(y):
    ...     mean = pyro.sample("mean", dist.Normal(0., 1.))
    ...     with pyro.plate("data", len(y), subsample_size=10) as rows:
    ...         pyro.sample("obs", dist.Normal(mean, 1.), obs=y[rows])
    >>> pyro.set_rng_seed(0)
    >>> kernel = SGHMC(model, step_size=0.05, friction=10., variance_reduction=SVRG())
    >>> mcmc = MCMC(kernel, num_samples=200, num_chains=8, disable_progbar=True)
    >>> mcmc.run(torch.linspace(-8., 12., 100))
    >>> bool((mcmc.get_samples()["mean"].mean() - 200 / 101).abs() < 0.1)
    True
    """

    def __init__(self, every: int | None = None) -> None:
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"every is {every!r}; give a whole number of steps of at least 1, or None.")
        self.every = every

    def first_anchor(self, potential: Potential, position: Tensor) -> Tensor:
        """Where the chains start."""
        del potential
        return position

    def steps_between(self, potential: Potential) -> int:
        """``every``, or the minibatches in the data."""
        return self.every or potential.minibatches_in_all


class Anchoring:
    """The anchor of one run, and when it is due to move.

    :param setting: where it is.
    :param potential: the recorded model.
    :raises ValueError: for a model without minibatches, or whose energy is random.
    :ivar anchor: the present anchor; None before :meth:`start`.
    """

    def __init__(self, setting: VarianceReduction, potential: Potential) -> None:
        if not potential.plates and potential.batches is None:
            raise ValueError(
                "variance_reduction is for minibatch gradients, and the model draws no minibatches: leave it out, or "
                "write pyro.plate(..., subsample_size=B)."
            )
        self.setting, self.potential = setting, potential
        self.every = setting.steps_between(potential)
        self.anchor: Anchor | None = None
        self._since = 0

    @property
    def gradients_per_step(self) -> float:
        """Minibatch gradients for each one of the kernel, passes over all data included."""
        return 2.0 + (self.potential.minibatches_in_all / self.every if self.every else 0.0)

    def start(self, position: Tensor, step: int, energy_and_grad: EnergyAndGrad) -> None:
        """Set the anchor for chains that start from ``position``.

        :param energy_and_grad: of a minibatch, to see whether it gives the same twice.
        """
        if self.anchor is not None and self.every is None:
            return
        anchor = self.setting.first_anchor(self.potential, position)
        self._move(anchor, step)
        if self.anchor is None or not all(torch.isfinite(part).all() for part in self.anchor):
            raise ValueError("the energy of all data or its gradient is not finite at the anchor: give another.")
        one, other = (energy_and_grad(anchor[:1])[1] for _ in range(2))
        if self.potential.is_random or not torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(one.abs().max())):
            raise ValueError(
                "the model draws random numbers of its own (dropout?), which differ between the two gradients that "
                "variance_reduction takes the difference of: switch them off, or leave variance_reduction out."
            )

    def before(self, step: int, position: Tensor) -> None:
        """Move the anchor if that is due before ``step``."""
        if self.every is not None and step % self.every == 0 and step != self._since:
            self._move(position, step)

    def steps_left(self, step: int, at_most: int) -> int:
        """Steps from ``step`` before the anchor moves, ``at_most`` or fewer."""
        return at_most if self.every is None else min(at_most, self.every - step % self.every)

    def _move(self, position: Tensor, step: int) -> None:
        # A fixed anchor is the same for every chain: one pass for all.
        place = position if self.every is not None else position[:1]
        energy, grad = self.potential.full_energy_and_grad(place)
        chains = len(position)
        # A copy: in a recording, two inputs that are one tensor would be one input.
        self.anchor = Anchor(position.clone(), energy.expand(chains).contiguous(), grad.expand(chains, -1).contiguous())
        self._since = step
