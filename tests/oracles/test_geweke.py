"""Geweke's joint test (2004, "Getting it right"): draws of w given y and of y given w, in turn, have the law p(w, y).

Every chain starts in that law and alternates on its own, so that the chains' last pairs are independent and their means
differ from those of direct draws by no more than independent errors.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import stats

import bnn.kernels.amagold
import bnn.kernels.ggmc
from bnn import Potential
from bnn.kernels import AMAGOLD, GGMC, SGHMC
from support.joint import UNMOVABLE, Joint, Values, exchange_data, joints, start, values_of

# The probability that one test fails although the kernel is exact: divided among the test functions.
ALPHA = 1e-6
CHAINS, ALTERNATIONS = 4000, 20

KERNELS = {
    "ggmc": (GGMC, None, {"friction": 1.0, "num_steps": 1, "steps_per_sample": 6}),
    "hmc": (GGMC, None, {"friction": None, "num_steps": 4, "steps_per_sample": 2}),
    "amagold": (AMAGOLD, 4, {"friction": 2.0, "num_steps": 3, "steps_per_sample": 3}),
}
STEP_SIZES = {
    "linear": {"ggmc": 0.25, "hmc": 0.2, "amagold": 0.08},
    "logistic": {"ggmc": 1.0, "hmc": 0.9, "amagold": 0.3},
}


@pytest.fixture(autouse=True)
def double_precision():
    torch.set_default_dtype(torch.float64)


def build(name: str, joint: Joint):
    kernel, batch_size, settings = KERNELS[name]
    model = joint.with_data_as_site(batch_size)
    h = STEP_SIZES[joint.name][name]
    return kernel(model, step_size=h, mass={"data": UNMOVABLE}, compile="fx", **settings)


def test_functions(values: Values, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Moments of w and of y, and moments that join them."""
    w, y = values["weight"], values["data"]
    result = {f"w{i}": w[:, i] for i in range(w.shape[1])}
    result |= {f"w{i} w{j}": w[:, i] * w[:, j] for i in range(w.shape[1]) for j in range(i + 1)}
    result |= {"mean y": y.mean(-1), "mean y²": y.square().mean(-1), "y0 y1": y[:, 0] * y[:, 1]}
    result |= {f"w{i} xᵀy": w[:, i] * (y @ x[:, i]) for i in range(w.shape[1])}
    if "scale" in values:
        s = values["scale"].log()
        residual = (y - w @ x.T).square().mean(-1).log()
        result |= {"log s": s, "log² s": s.square(), "log s log residual": s * residual, "s w0": s * w[:, 0]}
    return result


test_functions.__test__ = False


def largest_z(kernel, joint: Joint) -> tuple[float, str, int]:
    """The largest z-score, its test function, and how many there are."""
    start(kernel, joint, joint.draw(CHAINS))
    for _ in range(ALTERNATIONS):
        exchange_data(kernel, joint.simulate(joint.x, values_of(kernel)))
    found = test_functions(values_of(kernel), joint.x)
    direct = test_functions(joint.draw(4 * CHAINS), joint.x)
    scores = {
        name: float((f - g.mean()) / np.sqrt(variance))
        for name in found
        for f, g in [(found[name].mean(), direct[name])]
        for variance in [float(found[name].var() / CHAINS + g.var() / len(g))]
    }
    worst = max(scores, key=lambda name: abs(scores[name]))
    return abs(scores[worst]), worst, len(scores)


def threshold(count: int) -> float:
    return float(stats.norm.isf(ALPHA / (2 * count)))


@pytest.mark.parametrize("model", ["linear", "logistic"])
@pytest.mark.parametrize("name", KERNELS)
def test_alternation_keeps_the_joint_law(name, model):
    joint = joints()[model]
    kernel = build(name, joint)
    score, worst, count = largest_z(kernel, joint)
    assert score < threshold(count), f"{worst}: {score:.1f} standard errors"
    accepted = float(kernel._running.state.acceptance.mean())
    assert 0.3 < accepted < 0.95  # the test has something to refuse


def without_prior(full_energy: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The energy without the weights' prior: what the code published with AMAGOLD tests."""

    def energy(self: Potential, position: torch.Tensor, calls: int = 0) -> torch.Tensor:
        weight = self.constrain(position)["weight"]
        return full_energy(self, position, calls) - 0.5 * (weight / 1.5).square().sum(-1)

    return energy


@pytest.mark.parametrize("name", KERNELS)
def test_all_accepted_is_noticed(name, monkeypatch):
    module = bnn.kernels.amagold if name == "amagold" else bnn.kernels.ggmc
    monkeypatch.setattr(module, "chances", lambda start, *rest: torch.ones_like(start))
    joint = joints()["logistic"]
    score, _, count = largest_z(build(name, joint), joint)
    assert score > 1.5 * threshold(count)


def test_no_metropolis_test_is_noticed():
    joint, settings = joints()["logistic"], {"step_size": 1.0, "friction": 1.0, "steps_per_sample": 6}
    mass = {"data": UNMOVABLE}
    kernel = SGHMC(joint.with_data_as_site(), integrator="obabo", mass=mass, compile="fx", **settings)
    score, _, count = largest_z(kernel, joint)
    assert score > 1.5 * threshold(count)


def test_a_prior_left_out_of_the_test_is_noticed(monkeypatch):
    monkeypatch.setattr(Potential, "full_energy", without_prior(Potential.full_energy))
    joint = joints()["logistic"]
    score, _, count = largest_z(build("amagold", joint), joint)
    assert score > 1.5 * threshold(count)
