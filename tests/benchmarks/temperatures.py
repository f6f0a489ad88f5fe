"""Which temperature does each library's SGLD and SGHMC sample at? The variance that each leaves on a standard Gaussian.

    python tests/benchmarks/temperatures.py [--quick] [--csv temperatures.csv]

U = ½ ‖z‖² in many dimensions, each of them a chain of its own, with exact gradients: the variance should be 1. Settings
are each library's defaults; where there is none (a step size, our friction) the table says what was given. The time
step is the same for all. Errors are one standard error of a variance from that many chains. Peers that are not
installed are left out and named.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from tables import show

from bnn.kernels import MCMC, SGHMC, SGLD

STEP_SIZE, FRICTION = 0.05, 1.0


def ours(kernel: Callable[..., Any]) -> Callable[[int, int], np.ndarray]:
    """A kernel of this library, under its runner."""

    def run(dim: int, steps: int) -> np.ndarray:
        def model() -> None:
            pyro.sample("z", dist.Normal(torch.zeros(dim), 1.0).to_event(1))

        mcmc = MCMC(kernel(model, steps), num_samples=1, warmup_steps=0, disable_progbar=True)
        mcmc.run()
        return mcmc.get_samples()["z"].numpy()

    return run


def posteriors(name: str) -> Callable[[int, int], np.ndarray]:
    """A transform of ``posteriors`` (Duffield et al. 2024)."""
    import posteriors

    def run(dim: int, steps: int) -> np.ndarray:
        def log_posterior(params: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
            return -0.5 * params.square().sum(), torch.tensor([])

        sampler = getattr(posteriors.sgmcmc, name).build(log_posterior, lr=STEP_SIZE)
        state = sampler.init(torch.randn(dim))
        for _ in range(steps):
            state, _ = sampler.update(state, None)
        return state.params.numpy()

    return run


def blackjax(name: str) -> Callable[[int, int], np.ndarray]:
    """A kernel of ``blackjax`` (Cabezas et al. 2024)."""
    import blackjax
    import jax

    def run(dim: int, steps: int) -> np.ndarray:
        sampler = getattr(blackjax, name)(lambda z, batch: -z)
        start, key = jax.random.split(jax.random.key(0))
        position, _ = jax.lax.scan(
            lambda z, key: (sampler.step(key, z, None, STEP_SIZE), None),
            jax.random.normal(start, (dim,)),
            jax.random.split(key, steps),
        )
        return np.asarray(position)

    return run


def torch_uncertainty(name: str) -> Callable[[int, int], np.ndarray]:
    """An optimizer of ``torch-uncertainty``, loaded by itself: the package as a whole needs torchvision."""
    found = importlib.util.find_spec("torch_uncertainty")
    if found is None or not found.submodule_search_locations:
        raise ImportError("torch_uncertainty")
    path = Path(found.submodule_search_locations[0]) / "optim" / f"{name.lower()}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(dim: int, steps: int) -> np.ndarray:
        z = torch.nn.Parameter(torch.randn(dim))
        # SGHMC moves by lr² of the gradient: its lr is the time step. SGLD moves by lr.
        optimizer = getattr(module, name)([z], lr=STEP_SIZE)
        for _ in range(steps):
            z.grad = z.detach().clone()  # of ½ z²
            optimizer.step()
        return z.detach().numpy()

    return run


CONTENDERS: list[tuple[str, str, str, Callable[[], Callable[[int, int], np.ndarray]]]] = [
    ("pyro-bnn", "SGLD", "", lambda: ours(lambda m, s: SGLD(m, step_size=STEP_SIZE, steps_per_sample=s))),
    (
        "pyro-bnn",
        "SGHMC",
        f"friction {FRICTION:g} given",
        lambda: ours(lambda m, s: SGHMC(m, step_size=STEP_SIZE, friction=FRICTION, steps_per_sample=s)),
    ),
    ("posteriors", "SGLD", "", lambda: posteriors("sgld")),
    ("posteriors", "SGHMC", "alpha 0.01", lambda: posteriors("sghmc")),
    ("blackjax", "SGLD", "", lambda: blackjax("sgld")),
    ("blackjax", "SGHMC", "alpha 0.01, 10 steps a momentum", lambda: blackjax("sghmc")),
    ("torch-uncertainty", "SGLD", "noise_factor 0.01", lambda: torch_uncertainty("SGLD")),
    ("torch-uncertainty", "SGHMC", "noise_factor 0.01, friction 0.05", lambda: torch_uncertainty("SGHMC")),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--csv", help="also write the table to this file")
    parser.add_argument("--dim", type=int, default=20_000, help="dimensions, each of them a chain")
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--quick", action="store_true", help="few chains and steps: to see that it runs")
    options = parser.parse_args()
    if options.quick:
        options.dim, options.steps = 500, 200
    rows, missing = [], []
    for library, kernel, defaults, build in CONTENDERS:
        try:
            run = build()
        except ImportError:
            missing.append(f"{library} {kernel}")
            continue
        pyro.set_rng_seed(0)
        z = run(options.dim, options.steps).astype(np.float64)
        variance, error = float(np.mean(z**2)), float((z**2).std() / options.dim**0.5)
        rows.append({"library": library, "kernel": kernel, "settings": defaults, "variance": variance, "error": error})
    show(rows, options.csv, digits=3)
    if missing:
        print(f"\nNot installed: {', '.join(missing)}.")


if __name__ == "__main__":
    main()
