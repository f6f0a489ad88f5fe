"""The model zoo: one row for each kind of Pyro model that the potential must serve.

A builder makes the model and its data under the default dtype that the test has set, from a fixed seed of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import Tensor, nn

from support.nets import (
    BayesianMLP,
    ConvNet,
    Cube,
    GRUClassifier,
    PartlyBayesian,
    WordBag,
    data,
    labels,
    normal_prior,
    numbers,
)

Built = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One model.

    :ivar build: makes (model, args, kwargs).
    :ivar fallback: words of the warning if the model cannot be recorded and runs with the handlers; "" if it records.
    :ivar is_random: whether the model draws noise of its own.
    :ivar inductor: whether this row stands for its kind in the tests of the inductor tier.
    """

    name: str
    build: Callable[[], Built]
    fallback: str = ""
    is_random: bool = False
    inductor: bool = False


def pyro_module_mlp() -> Built:
    return BayesianMLP(12, 4), data(), {}


def pyro_module_mlp_full() -> Built:
    return BayesianMLP(12, None), data(), {}


def functional_mlp() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        hidden_weight = pyro.sample("hidden.weight", dist.Normal(torch.full((5, 3), 0.2), 1.5).to_event(2))
        hidden_bias = pyro.sample("hidden.bias", dist.Normal(torch.full((5,), 0.2), 1.5).to_event(1))
        out_weight = pyro.sample("out.weight", normal_prior(1, 5))
        out_bias = pyro.sample("out.bias", normal_prior(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            hidden = torch.tanh(F.linear(x[rows], hidden_weight, hidden_bias))
            mean = F.linear(hidden, out_weight, out_bias).squeeze(-1)
            pyro.sample("obs", dist.Normal(mean, sigma), obs=y[rows])

    return model, data(), {}


def conv_net() -> Built:
    return ConvNet(), (numbers(6, 1, 14, 14), labels(6)), {}


def gamma_precision() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        precision = pyro.sample("precision", dist.Gamma(2.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, precision.rsqrt()), obs=y)

    return model, data(), {}


def half_cauchy_scale() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        sigma = pyro.sample("sigma", dist.HalfCauchy(torch.tensor(2.0)))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ weight, sigma), obs=y[rows])

    return model, data(), {}


def horseshoe() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        tau = pyro.sample("tau", dist.HalfCauchy(1.0))
        with pyro.plate("features", 3):
            lam = pyro.sample("lam", dist.HalfCauchy(1.0))
            weight = pyro.sample("weight", dist.Normal(0.0, lam * tau))
        df = pyro.sample("df", dist.Uniform(2.0, 8.0))
        sigma = pyro.sample("sigma", dist.LogNormal(0.0, 0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.StudentT(df, x @ weight, sigma), obs=y)

    return model, data(), {}


def dirichlet_mixture() -> Built:
    def model(y: Tensor) -> None:
        shares = pyro.sample("shares", dist.Dirichlet(torch.ones(3)))
        with pyro.plate("components", 3):
            loc = pyro.sample("loc", dist.Normal(0.0, 3.0))
            scale = pyro.sample("scale", dist.InverseGamma(3.0, 1.0))
        with pyro.plate("data", len(y), subsample_size=4) as rows:
            mixture = dist.MixtureSameFamily(dist.Categorical(shares), dist.Normal(loc, scale))
            pyro.sample("obs", mixture, obs=y[rows])

    return model, (data()[1],), {}


def lkj_cholesky() -> Built:
    def model(y: Tensor) -> None:
        factor = pyro.sample("factor", dist.LKJCholesky(3, 2.0))
        scale = pyro.sample("scale", dist.LogNormal(torch.zeros(3), 0.5).to_event(1))
        with pyro.plate("data", len(y)):
            scale_tril = scale.unsqueeze(-1) * factor
            pyro.sample("obs", dist.MultivariateNormal(torch.zeros(3), scale_tril=scale_tril), obs=y)

    return model, (numbers(8, 3),), {}


def flat_priors() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        flat = dist.ImproperUniform(dist.constraints.real_vector, (), (3,))
        weight = pyro.sample("weight", flat)
        sigma = pyro.sample("sigma", dist.ImproperUniform(dist.constraints.positive, (), ()))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, sigma), obs=y)

    return model, data(), {}


def masked_factor_deterministic_scale() -> Built:
    seen = torch.arange(12) % 3 > 0

    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        norm = pyro.deterministic("norm", weight.square().sum())
        pyro.factor("ridge", -0.1 * norm)
        with pyro.plate("data", len(x)), poutine.mask(mask=seen):
            pyro.sample("obs", dist.Normal(x @ weight, 1.0), obs=y)
        with poutine.scale(scale=2.5):
            pyro.sample("total", dist.Normal(weight.sum(), 1.0), obs=torch.tensor(0.7))

    return model, data(), {}


def masked_minibatch() -> Built:
    def model(x: Tensor, y: Tensor, seen: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            with poutine.mask(mask=seen[rows]), poutine.scale(scale=0.5):
                pyro.sample("obs", dist.Normal(x[rows] @ weight, 1.0), obs=y[rows])
            pyro.factor("row factor", -0.1 * (x[rows] @ weight).square())

    return model, (*data(), torch.arange(12) % 3 > 0), {}


def nested_plates() -> Built:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        with pyro.plate("columns", 4, dim=-1):
            shift = pyro.sample("shift", dist.Normal(loc, 1.0))
            with pyro.plate("rows", 10, subsample_size=3, dim=-2) as rows:
                pyro.sample("obs", dist.Normal(shift, 0.5), obs=y[rows])

    return model, (numbers(10, 4),), {}


def several_subsampled_plates() -> Built:
    def model(y: Tensor, z: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        scale = pyro.sample("scale", dist.HalfNormal(1.0))
        with pyro.plate("columns", 4, subsample_size=2, dim=-1) as columns:
            with pyro.plate("rows", 10, subsample_size=5, dim=-2) as rows:
                pyro.sample("obs", dist.Normal(loc, scale), obs=y[rows.unsqueeze(-1), columns])
        with pyro.plate("others", 6, subsample_size=2) as others:
            pyro.sample("other", dist.Normal(-loc, 1.0), obs=z[others])

    return model, (numbers(10, 4), numbers(6, seed=3)), {}


def random_effects() -> Built:
    group = torch.tensor([0, 1, 2, 3] * 3)

    def model(x: Tensor, y: Tensor) -> None:
        spread = pyro.sample("spread", dist.HalfNormal(1.0))
        weight = pyro.sample("weight", normal_prior(3))
        with pyro.plate("groups", 4):
            effect = pyro.sample("effect", dist.Normal(0.0, spread))
        with pyro.plate("data", len(x), subsample_size=6) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ weight + effect[group[rows]], 0.5), obs=y[rows])

    return model, data(), {}


def layer_norm() -> Built:
    return PartlyBayesian(nn.LayerNorm(4)), data(), {}


def batch_norm_eval() -> Built:
    norm = nn.BatchNorm1d(4)
    norm.running_mean.copy_(torch.arange(4.0) / 5)
    norm.running_var.copy_(1 + torch.arange(4.0))
    return PartlyBayesian(norm).eval(), data(), {}


def batch_norm_training() -> Built:
    return PartlyBayesian(nn.BatchNorm1d(4)).train(), data(), {}


def dropout() -> Built:
    return PartlyBayesian(nn.LayerNorm(4), nn.Dropout(0.5)).train(), data(), {}


def augmentation_noise() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            noisy = x[rows] + 0.1 * torch.randn(4, 3)
            pyro.sample("obs", dist.Normal(noisy @ weight, 1.0), obs=y[rows])

    return model, data(), {}


def control_flow() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        power = 1.0 if weight[0] > 0 else 2.0
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("obs", dist.Normal(power * (x[rows] @ weight), 1.0), obs=y[rows])

    return model, data(), {}


def item_of_latent() -> Built:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        pyro.factor("penalty", torch.tensor(-abs(loc.item())))
        with pyro.plate("data", len(y)):
            pyro.sample("obs", dist.Normal(loc, 1.0), obs=y)

    return model, (data()[1],), {}


def gru() -> Built:
    return GRUClassifier(), (numbers(8, 5, 3), labels(8)), {}


def embedding() -> Built:
    return WordBag(), (torch.arange(40).reshape(8, 5) % 7, labels(8)), {}


def keyword_arguments() -> Built:
    def model(x: Tensor, *, y: Tensor, scale: float, link: str = "identity") -> None:
        weight = pyro.sample("weight", normal_prior(3))
        mean = x @ weight
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(mean.tanh() if link == "tanh" else mean, scale), obs=y)

    x, y = data()
    return model, (x,), {"y": y, "scale": 0.5, "link": "tanh"}


def pyro_subsample() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        with pyro.plate("data", len(x), subsample_size=4):
            batch = pyro.subsample(x, event_dim=1)
            pyro.sample("obs", dist.Normal(batch @ weight, 1.0), obs=pyro.subsample(y, event_dim=0))

    return model, data(), {}


def vector_observations() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3, 2))
        scale = pyro.sample("scale", dist.Gamma(torch.full((2,), 2.0), 1.0).to_event(1))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ weight, scale).to_event(1), obs=y[rows])

    return model, (data()[0], numbers(12, 2)), {}


def parameters() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        sigma = pyro.param("sigma", torch.tensor(0.7), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal(x @ weight, sigma), obs=y)

    return model, data(), {}


def no_arguments() -> Built:
    x, y = data()

    def model() -> None:
        weight = pyro.sample("weight", normal_prior(3))
        with pyro.plate("data", len(x), subsample_size=5) as rows:
            pyro.sample("obs", dist.Normal(x[rows] @ weight, 1.0), obs=y[rows])

    return model, (), {}


def prior_only() -> Built:
    def model() -> None:
        scale = pyro.sample("scale", dist.HalfNormal(torch.ones(2)).to_event(1))
        pyro.sample("ordered", dist.Normal(torch.zeros(2, 2), scale).to_event(2))
        pyro.sample("share", dist.Beta(2.0, 3.0))

    return model, (), {}


def mixed_precision() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", dist.Normal(torch.zeros(3, dtype=torch.float32), 1.0).to_event(1))
        sigma = pyro.sample("sigma", dist.HalfNormal(torch.tensor(1.0, dtype=torch.float64)))
        with pyro.plate("data", len(x)):
            pyro.sample("obs", dist.Normal((x @ weight).double(), sigma), obs=y.double())

    x, y = data()
    return model, (x.float(), y), {}


def sequential_plate() -> Built:
    def model(y: Tensor) -> None:
        loc = pyro.sample("loc", dist.Normal(0.0, 1.0))
        for row in pyro.plate("data", len(y), subsample_size=3):
            pyro.sample(f"obs_{row}", dist.Normal(loc, 1.0), obs=y[row])

    return model, (data()[1],), {}


def custom_function() -> Built:
    def model(x: Tensor, y: Tensor) -> None:
        weight = pyro.sample("weight", normal_prior(3))
        with pyro.plate("data", len(x), subsample_size=4) as rows:
            pyro.sample("obs", dist.Normal(Cube.apply(x[rows] @ weight), 1.0), obs=y[rows])

    return model, data(), {}


MODELS = [
    Row("pyro_module_mlp", pyro_module_mlp, inductor=True),
    Row("pyro_module_mlp_full", pyro_module_mlp_full),
    Row("functional_mlp", functional_mlp),
    Row("conv_net", conv_net),
    Row("gamma_precision", gamma_precision),
    Row("half_cauchy_scale", half_cauchy_scale),
    Row("horseshoe", horseshoe, inductor=True),
    Row("dirichlet_mixture", dirichlet_mixture, inductor=True),
    Row("lkj_cholesky", lkj_cholesky),
    Row("flat_priors", flat_priors),
    Row("masked_factor_deterministic_scale", masked_factor_deterministic_scale),
    Row("masked_minibatch", masked_minibatch),
    Row("nested_plates", nested_plates),
    Row("several_subsampled_plates", several_subsampled_plates),
    Row("random_effects", random_effects),
    Row("layer_norm", layer_norm),
    Row("batch_norm_eval", batch_norm_eval),
    Row("batch_norm_training", batch_norm_training, fallback="batch norm"),
    Row("dropout", dropout, is_random=True),
    Row("augmentation_noise", augmentation_noise, is_random=True),
    Row("control_flow", control_flow, fallback="latent"),
    Row("item_of_latent", item_of_latent, fallback="latent"),
    Row("gru", gru),
    Row("embedding", embedding),
    Row("keyword_arguments", keyword_arguments),
    Row("pyro_subsample", pyro_subsample),
    Row("vector_observations", vector_observations),
    Row("parameters", parameters),
    Row("no_arguments", no_arguments),
    Row("prior_only", prior_only),
    Row("mixed_precision", mixed_precision),
    Row("sequential_plate", sequential_plate, fallback="plate"),
    Row("custom_function", custom_function, fallback="autograd.Function"),
]
