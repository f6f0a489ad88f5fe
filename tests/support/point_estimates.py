"""Nets under point estimates, and dense linear algebra to compare K-FAC with.

Vectors run over the matrices [bias, weight] of the layers, one after the other, row by row.
"""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
import torch.nn.functional as F
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, init_to_value
from torch.distributions import constraints

from bnn.guides._kfac_blocks import PointSettings
from bnn.guides.kfac import PointEstimate
from support.nets import data, labels, numbers

REAL = constraints.real


class Objective(Trace_ELBO):
    """The ELBO's delegation, for arguments of one kind."""

    def __init__(self, curvature="ggn", block_tridiagonal=False, kl_weight=1.0, **settings):
        super().__init__()
        self.first = PointSettings(curvature, kl_weight=kl_weight, block_tridiagonal=block_tridiagonal)
        self.settings, self.estimate = settings, None

    def loss_and_grads(self, model, guide, *args, **kwargs):
        if self.estimate is None:
            self.estimate = PointEstimate(model, guide, self.first, **self.settings)
        return self.estimate.loss_and_grads(str([a.shape for a in args]), args, kwargs)


class Net:
    """A net of linear layers with Normal priors, or flat ones where ``scale`` is None."""

    def __init__(self, sizes=(4, 3, 2), scale=1.0, activation=torch.tanh, noise=0.7, classes=False, bias=True):
        self.sizes, self.scale, self.activation, self.noise = sizes, scale, activation, noise
        self.classes, self.bias = classes, bias

    def prior(self, *shape):
        if self.scale is None:
            return dist.ImproperUniform(constraints.independent(REAL, len(shape)), (), shape)
        return dist.Normal(torch.zeros(shape), self.scale).to_event(len(shape))

    def net(self, weights, x):
        for number, (weight, bias) in enumerate(weights):
            x = F.linear(x, weight, bias)
            if number < len(weights) - 1:
                x = self.activation(x)
        return x

    def __call__(self, x, y):
        weights = []
        for number, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            weight = pyro.sample(f"w{number}", self.prior(outputs, inputs))
            bias = pyro.sample(f"b{number}", self.prior(outputs)) if self.bias else None
            weights.append((weight, bias))
        out = self.net(weights, x)
        with pyro.plate("data", len(x)):
            law = dist.Categorical(logits=out) if self.classes else dist.Normal(out, self.noise).to_event(1)
            pyro.sample("obs", law, obs=y)

    def start(self, seed=7):
        values = {}
        for number, (inputs, outputs) in enumerate(zip(self.sizes, self.sizes[1:], strict=False)):
            values[f"w{number}"] = numbers(outputs, inputs, seed=seed + number) / math.sqrt(inputs)
            if self.bias:
                values[f"b{number}"] = 0.3 * numbers(outputs, seed=seed + 50 + number)
        return values

    def flat_net(self, values, x):
        return self.net([(values[f"w{i}"], values.get(f"b{i}")) for i in range(len(self.sizes) - 1)], x)


class Turned(Net):
    """A net of one hidden layer that multiplies its activations with invertible matrices before and after tanh."""

    def __init__(self, *args, turns, **settings):
        super().__init__(*args, **settings)
        self.turns = turns

    def net(self, weights, x):
        hidden = torch.tanh(F.linear(x, *weights[0]) @ self.turns[0]) @ self.turns[1] + 1.0
        return F.linear(hidden, *weights[1])


NUMBERS = itertools.count()


def guide_at(model, values):
    """A guide that starts there; its name is its own, since the parameter store would hand it another's values."""
    guide = AutoDelta(model, init_loc_fn=init_to_value(values={name: value.clone() for name, value in values.items()}))
    guide._pyro_name = f"guide{next(NUMBERS)}"
    return guide


def step_of(model, values, args, **settings):
    """The update at rate 1 by site, and the objective."""
    guide, objective = guide_at(model, values), Objective(**settings)
    objective.loss_and_grads(model, guide, *args)
    return {n: -leaf.grad for n, leaf in objective.estimate._leaves.leaves.items()}, objective


def matrix(values, number):
    """[bias, weight] of a layer."""
    weight = values[f"w{number}"]
    return torch.cat([values[f"b{number}"][:, None], weight], 1) if f"b{number}" in values else weight


def gradient(model, values, args):
    leaves = {name: value.clone().requires_grad_() for name, value in values.items()}
    guide = guide_at(model, values)
    guide(*args)
    trace = pyro.poutine.trace(pyro.poutine.condition(model, leaves)).get_trace(*args)
    grads = torch.autograd.grad(-trace.log_prob_sum(), list(leaves.values()))
    return dict(zip(leaves, grads, strict=True))


def gauss_newton(net, values, x):
    """Jᵀ H J by layer, over [bias, weight] row by row: (all data, outputs, parameters of each layer)."""
    layers = range(len(net.sizes) - 1)
    matrices = [matrix(values, i) for i in layers]

    def out(*flat):
        taken = {}
        for i, m in enumerate(flat):
            taken[f"w{i}"] = m[:, 1:] if net.bias else m
            if net.bias:
                taken[f"b{i}"] = m[:, 0]
        return net.flat_net(taken, x)

    jacobians = torch.autograd.functional.jacobian(out, tuple(matrices))
    flat = [j.reshape(*j.shape[:2], -1) for j in jacobians]
    if net.classes:
        p = net.flat_net(values, x).softmax(-1)
        hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    else:
        hessian = torch.eye(net.sizes[-1]).expand(len(x), -1, -1) / net.noise**2
    whole = torch.cat(flat, -1)
    return torch.einsum("nop,noq,nqr->pr", whole, hessian, whole), [f.shape[-1] for f in flat]


def flat_of(values, net):
    return torch.cat([matrix(values, i).reshape(-1) for i in range(len(net.sizes) - 1)])


def net_problem(classes=False, rows=12, **settings):
    net = Net((3, 4, 2), classes=classes, scale=0.9, **settings)
    x, _ = data(rows)
    y = labels(rows, 2) if classes else numbers(rows, 2, seed=9)
    return net, net.start(), x, y


def hierarchy(x, y):
    """A linear regression with a learned noise and a learned prior scale."""
    scale = pyro.sample("scale", dist.Gamma(3.0, 2.0))
    with pyro.plate("inputs", 2):
        slope = pyro.sample("slope", dist.Normal(0.0, scale))
    noise = pyro.sample("noise", dist.HalfNormal(1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(x @ slope, noise), obs=y)
