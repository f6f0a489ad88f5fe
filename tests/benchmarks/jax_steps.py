"""SGLD of blackjax under ``jax.jit`` and ``lax.scan``, in a process of its own: a worker for ``steps.py``.

It reads numbers of units of work from its standard input, and answers each with the seconds they took.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"

import blackjax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from nets import CASES, SIGMA, Case  # noqa: E402
from timing import keep_heap  # noqa: E402

# Steps in one program, so many that the call itself costs nothing.
STEPS = {"S": 2000, "M": 20, "C": 4}


def forward(case: Case, weights: list[jax.Array], x: jax.Array) -> jax.Array:
    if case.name == "C":
        for i, padding in ((0, "SAME"), (2, "VALID")):
            x = lax.conv_general_dilated(x, weights[i], (1, 1), padding, dimension_numbers=("NCHW", "OIHW", "NCHW"))
            x = jax.nn.relu(x + weights[i + 1][:, None, None])
            x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 1, 2, 2), (1, 1, 2, 2), "VALID")
        x, weights = x.reshape(len(x), -1), weights[4:]
    activation = jnp.tanh if case.name == "S" else jax.nn.relu
    for i in range(0, len(weights) - 2, 2):
        x = activation(x @ weights[i].T + weights[i + 1])
    return x @ weights[-2].T + weights[-1]


def log_density(case: Case, z: jax.Array, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    x, y = batch
    offsets = [sum(case.sizes[: i + 1]) for i in range(len(case.sizes) - 1)]
    weights = [piece.reshape(shape) for piece, shape in zip(jnp.split(z, offsets), case.shapes, strict=True)]
    out = forward(case, weights, x)
    if case.name == "S":
        likelihood = -0.5 / SIGMA**2 * jnp.square(out[:, 0] - y).sum()
    else:
        likelihood = jnp.take_along_axis(jax.nn.log_softmax(out), y[:, None], 1).sum()
    return case.rows / case.batch * likelihood - 0.5 * z @ z


def sgld(case: Case, steps: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """``steps`` steps in one compiled program."""
    x, y = (jnp.asarray(array) for array in case.arrays)
    kernel = blackjax.sgld(jax.grad(lambda z, batch: log_density(case, z, batch)))

    def step(z: jax.Array, key: jax.Array) -> tuple[jax.Array, None]:
        row_key, noise_key = jax.random.split(key)
        rows = jax.random.randint(row_key, (case.batch,), 0, case.rows)
        return kernel.step(noise_key, z, (x[rows], y[rows]), case.step_size), None

    return jax.jit(lambda z, key: lax.scan(step, z, jax.random.split(key, steps))[0])


def main() -> None:
    case = CASES[sys.argv[1]]
    if "--keep-heap" in sys.argv[2:]:
        keep_heap()
    steps = STEPS[case.name]
    program = sgld(case, steps)
    z, key = jnp.asarray(case.start), jax.random.key(0)
    start = time.perf_counter()
    program(z, key).block_until_ready()
    print(steps, time.perf_counter() - start, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            key, now = jax.random.split(key)
            z = program(z, now)
        z.block_until_ready()
        print(time.perf_counter() - start, flush=True)


if __name__ == "__main__":
    main()
