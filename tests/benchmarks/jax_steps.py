"""SGLD and SGHMC of JAX's libraries under ``jax.jit`` and ``lax.scan``: a worker process of ``steps.py``.

blackjax: its integrators on ``jax.grad`` of a log density by hand. NumPyro, which has neither sampler: the gradient of
its ``log_density`` of a model with a subsampled plate, and the update by hand. Every step and chain has a minibatch of
its own, drawn with replacement. (``blackjax.sghmc`` itself takes several steps on one minibatch.)

It reads lines from its standard input and answers each: ``build LIBRARY KERNEL CHAINS`` with the steps in one unit of
work and the seconds of the first, ``run LIBRARY KERNEL CHAINS UNITS`` with the processor's seconds.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from nets import CASES, HEADS, SIGMA, Case  # noqa: E402
from timing import keep_heap  # noqa: E402

# Steps in one program, so many that the call itself costs nothing.
STEPS = {"S": 2000, "M": 20, "C": 4, "T": 10}
DECAY = 0.1  # what the momentum loses in a step

Weights = Mapping[str, jax.Array]
Rows = jax.Array


def forward(case: Case, w: Weights, x: jax.Array) -> jax.Array:
    if case.name == "T":
        return transformer(w, x)
    layers = case.layers
    if case.name == "C":
        for layer, padding in zip(layers[:2], ("SAME", "VALID"), strict=True):
            x = lax.conv_general_dilated(
                x, w[f"{layer}.weight"], (1, 1), padding, dimension_numbers=("NCHW", "OIHW", "NCHW")
            )
            x = jax.nn.relu(x + w[f"{layer}.bias"][:, None, None])
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x, layers = x.reshape(len(x), -1), layers[2:]
    activation = jnp.tanh if case.name == "S" else jax.nn.relu
    for layer in layers[:-1]:
        x = activation(linear(w, layer, x))
    return linear(w, layers[-1], x)


def linear(w: Weights, layer: str, x: jax.Array) -> jax.Array:
    return x @ w[f"{layer}.weight"].T + w[f"{layer}.bias"]


def transformer(w: Weights, x: jax.Array) -> jax.Array:
    """What ``nets.Transformer`` computes."""
    x = w["embedding.weight"][x] + w["positions"]
    number = 0
    while f"blocks.layers.{number}.linear1.weight" in w:
        block = f"blocks.layers.{number}"
        out = norm(w, f"{block}.norm1", x)
        out = out @ w[f"{block}.self_attn.in_proj_weight"].T + w[f"{block}.self_attn.in_proj_bias"]
        query, key, value = jnp.moveaxis(out.reshape(*x.shape[:2], 3, HEADS, -1), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value).reshape(x.shape)
        x = x + linear(w, f"{block}.self_attn.out_proj", out)
        out = linear(w, f"{block}.linear1", norm(w, f"{block}.norm2", x))
        x = x + linear(w, f"{block}.linear2", jax.nn.gelu(out, approximate=False))
        number += 1
    return linear(w, "head", x.mean(1))


def norm(w: Weights, layer: str, x: jax.Array) -> jax.Array:
    x = x - x.mean(-1, keepdims=True)
    x = x * lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)
    return x * w[f"{layer}.weight"] + w[f"{layer}.bias"]


@cache
def data(case: Case) -> tuple[jax.Array, jax.Array]:
    x, y = case.arrays
    return jnp.asarray(x), jnp.asarray(y)


def by_hand(case: Case) -> tuple[jax.Array, Callable[[jax.Array, Rows], jax.Array]]:
    """A start and the gradient of a log density on a flat vector."""
    x, y = data(case)
    offsets = [sum(case.sizes[: i + 1]) for i in range(len(case.sizes) - 1)]

    def log_density(z: jax.Array, rows: Rows) -> jax.Array:
        pieces = zip(jnp.split(z, offsets), case.shapes, strict=True)
        w = dict(zip(case.sites, (piece.reshape(shape) for piece, shape in pieces), strict=True))
        out, target = forward(case, w, x[rows]), y[rows]
        if case.name == "S":
            likelihood = -0.5 / SIGMA**2 * jnp.square(out[:, 0] - target).sum()
        else:
            likelihood = jnp.take_along_axis(jax.nn.log_softmax(out), target[:, None], 1).sum()
        return case.rows / case.batch * likelihood - 0.5 * z @ z

    return jnp.asarray(case.start), jax.grad(log_density)


def by_numpyro(case: Case) -> tuple[Any, Callable[[Any, Rows], Any]]:
    """A start and the gradient of NumPyro's log density of a model on a dict of sites."""
    import numpyro
    import numpyro.distributions as dist
    from numpyro import handlers
    from numpyro.infer.util import log_density

    x, y = data(case)
    shapes = dict(zip(case.sites, case.shapes, strict=True))

    def model() -> None:
        w = {
            site: numpyro.sample(site, dist.Normal(0.0, 1.0).expand(shape).to_event()) for site, shape in shapes.items()
        }
        with numpyro.plate("data", case.rows, subsample_size=case.batch) as rows:
            out = forward(case, w, x[rows])
            if case.name == "S":
                numpyro.sample("obs", dist.Normal(out[:, 0], SIGMA), obs=y[rows])
            else:
                numpyro.sample("obs", dist.Categorical(logits=out), obs=y[rows])

    def of_rows(w: Any, rows: Rows) -> jax.Array:
        return log_density(handlers.substitute(model, data={"data": rows}), (), {}, w)[0]

    pieces = jnp.split(jnp.asarray(case.start), jnp.cumsum(jnp.asarray(case.sizes))[:-1])
    start = {site: piece.reshape(shapes[site]) for site, piece in zip(case.sites, pieces, strict=True)}
    return start, jax.grad(of_rows)


def noise_like(key: jax.Array, tree: Any) -> Any:
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(leaves))
    noises = [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, noises)


def updates(library: str, kernel: str, h: float) -> Callable[..., tuple[Any, Any]]:
    """``(key, z, momentum, gradient) -> (z, momentum)``; SGLD's momentum is empty."""
    friction = DECAY / h
    if library == "blackjax":
        from blackjax.sgmcmc import diffusions

        if kernel == "SGHMC":
            integrator = diffusions.sghmc(friction)
            return lambda key, z, r, grad: integrator(key, z, r, grad, h)
        langevin = diffusions.overdamped_langevin()
        return lambda key, z, r, grad: (langevin(key, z, grad, h), r)

    def step(key: jax.Array, z: Any, r: Any, grad: Any) -> tuple[Any, Any]:
        noise = noise_like(key, z)
        if kernel == "SGHMC":
            scale = (2 * DECAY) ** 0.5
            r = jax.tree.map(lambda r, g, n: (1 - DECAY) * r + h * g + scale * n, r, grad, noise)
            return jax.tree.map(lambda z, r: z + h * r, z, r), r
        return jax.tree.map(lambda z, g, n: z + h * g + (2 * h) ** 0.5 * n, z, grad, noise), r

    return step


class Sampler:
    """Some steps of some chains in one compiled program."""

    def __init__(self, case: Case, library: str, kernel: str, chains: int) -> None:
        start, gradient = by_hand(case) if library == "blackjax" else by_numpyro(case)
        self.steps = max(1, STEPS[case.name] // chains)
        h = case.step_size if kernel == "SGLD" else case.step_size**0.5
        update = updates(library, kernel, h)

        def step(state: tuple[Any, Any], key: jax.Array) -> tuple[tuple[Any, Any], None]:
            row_key, noise_key = jax.random.split(key)
            rows = jax.random.randint(row_key, (case.batch,), 0, case.rows)
            z, momentum = state
            return update(noise_key, z, momentum, gradient(z, rows)), None

        def run(state: tuple[Any, Any], key: jax.Array) -> tuple[Any, Any]:
            return lax.scan(step, state, jax.random.split(key, self.steps))[0]

        momentum = noise_like(jax.random.key(1), start) if kernel == "SGHMC" else ()
        self.state, self.key = (start, momentum), jax.random.key(0)
        if chains > 1:
            self.state = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (chains, *leaf.shape)), self.state)
            self.program = jax.jit(lambda state, key: jax.vmap(run)(state, jax.random.split(key, chains)))
        else:
            self.program = jax.jit(run)

    def run(self, units: int) -> None:
        for _ in range(units):
            self.key, now = jax.random.split(self.key)
            self.state = self.program(self.state, now)
        jax.block_until_ready(self.state)


def main() -> None:
    case = CASES[sys.argv[1]]
    if "--keep-heap" in sys.argv[2:]:
        keep_heap()
    samplers: dict[tuple[str, ...], Sampler] = {}
    for line in sys.stdin:
        verb, *row = line.split()
        if verb == "build":
            library, kernel, chains = row
            start = time.perf_counter()
            sampler = samplers[tuple(row)] = Sampler(case, library, kernel, int(chains))
            sampler.run(1)
            print(sampler.steps, time.perf_counter() - start, flush=True)
        else:
            *row, units = row
            start = time.process_time()
            samplers[tuple(row)].run(int(units))
            print(time.process_time() - start, flush=True)


if __name__ == "__main__":
    main()
