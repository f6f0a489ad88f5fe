"""Joint laws p(w) p(y | w) that can be drawn from directly, and kernels run on data that differ from chain to chain.

Chains share the model's arguments. So here the data are a site of the model: flat, so that it adds nothing to the
energy, and of such a mass that it cannot move in double precision. The kernel is the one that users run, its energy is
−log p(w, y) as a function of w, and each chain has its own y, which may be exchanged between draws.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from torch import Tensor

from support import targets

# A velocity of 1e-30 in a coordinate of size one: nothing is added, to it or to the kinetic energy.
UNMOVABLE = 1e60

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Joint:
    """A model of ``y`` given rows ``x``, with direct draws of its latents and of its data given these.

    Values lead with a dimension of independent draws; names are those of the model's sites.
    """

    name: str
    x: Tensor
    model: Callable[[Tensor, Tensor, int | None], None]
    prior: Callable[[int], Values]
    simulate: Callable[[Tensor, Values], Tensor]
    log_likelihood: Callable[[Tensor, Values, Tensor], Tensor]

    def draw(self, count: int) -> Values:
        """Independent draws from p(w, y), the data under the name "data"."""
        values = self.prior(count)
        return {**values, "data": self.simulate(self.x, values)}

    def with_data_as_site(self, batch_size: int | None = None) -> Callable[[], None]:
        """The model with its data at the site "data"."""

        def model() -> None:
            y = pyro.sample("data", dist.ImproperUniform(constraints.real_vector, (), (len(self.x),)))
            self.model(self.x, y, batch_size)

        return model


def start(kernel: Any, joint: Joint, values: Values, warmup_steps: int = 0) -> None:
    """Set the kernel up with a chain at each of the values."""
    kernel.num_chains = len(values["data"])
    unconstrained = {n: v.log() if n == "scale" else v for n, v in values.items()}
    kernel.initial_params = unconstrained
    with targets.starts_unchecked():
        kernel.setup(warmup_steps)


def values_of(kernel: Any) -> Values:
    """Where the chains stand, in the model's own space."""
    return kernel.potential.constrain(kernel.position)


def exchange_data(kernel: Any, data: Tensor) -> None:
    """Go on from the same place given other data, and one draw further."""
    with targets.starts_unchecked():
        kernel.sample({**kernel.initial_params, "data": data})


# ---- linear regression with unknown scale


def _linear_model(x: Tensor, y: Tensor, batch_size: int | None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.0).to_event(1))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-0.5), 0.3))
    with pyro.plate("rows", len(x), subsample_size=batch_size) as rows:
        pyro.sample("y", dist.Normal(x[rows] @ weight, scale), obs=y[rows])


def _linear_prior(count: int) -> Values:
    return {"weight": torch.randn(count, 2), "scale": (-0.5 + 0.3 * torch.randn(count)).exp()}


def _linear_data(x: Tensor, values: Values) -> Tensor:
    return values["weight"] @ x.T + values["scale"].unsqueeze(-1) * torch.randn(len(values["scale"]), len(x))


def _linear_log_likelihood(x: Tensor, values: Values, y: Tensor) -> Tensor:
    return dist.Normal(values["weight"] @ x.T, values["scale"].unsqueeze(-1)).log_prob(y).sum(-1)


# ---- logistic regression


def _logistic_model(x: Tensor, y: Tensor, batch_size: int | None) -> None:
    weight = pyro.sample("weight", dist.Normal(torch.zeros(x.shape[1]), 1.5).to_event(1))
    with pyro.plate("rows", len(x), subsample_size=batch_size) as rows:
        logits = x[rows] @ weight
        pyro.factor("y", y[rows] * logits - torch.nn.functional.softplus(logits))  # of labels that may be any number


def _logistic_prior(count: int) -> Values:
    return {"weight": 1.5 * torch.randn(count, 3)}


def _logistic_data(x: Tensor, values: Values) -> Tensor:
    return torch.bernoulli(torch.sigmoid(values["weight"] @ x.T))


def _logistic_log_likelihood(x: Tensor, values: Values, y: Tensor) -> Tensor:
    return dist.Bernoulli(logits=values["weight"] @ x.T).log_prob(y).sum(-1)


def joints() -> dict[str, Joint]:
    """The two regressions, in the default precision."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(torch.get_default_dtype())
    linear = Joint("linear", x[:8, :2], _linear_model, _linear_prior, _linear_data, _linear_log_likelihood)
    logistic = Joint("logistic", x, _logistic_model, _logistic_prior, _logistic_data, _logistic_log_likelihood)
    return {one.name: one for one in (linear, logistic)}
