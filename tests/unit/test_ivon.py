"""IVON: the update of the paper, and of its authors' package with the same noise; VOGN by its formula."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import SGD, Adam, ClippedAdam, ExponentialLR

from bnn.guides import (
    IVON,
    AutoFactorizedNormal,
    AutoIVON,
    NaturalGradientDescent,
    TraceEnsemble_ELBO,
    TraceNaturalGradient_ELBO,
)
from bnn.guides.ivon import IVONOptimizer
from support.nets import numbers

pytestmark = pytest.mark.usefixtures("double")

ROWS, PRIOR, HESS = 20, 0.6, 0.7


def linear(x, y):
    weight = pyro.sample("weight", dist.Normal(torch.zeros(1, 3), PRIOR).to_event(2))
    with pyro.plate("data", len(x)):
        pyro.sample("obs", dist.Normal(F.linear(x, weight).squeeze(-1), 1.0), obs=y)


def args():
    return numbers(ROWS, 3, seed=3), numbers(ROWS, seed=4)


def run(steps, optimizer, particles=1, seed=5, **settings):
    """m and h after each step, noise from a seed per step."""
    guide = AutoIVON(linear, num_data=ROWS, hess_init=HESS, **settings)
    guide(*args())
    guide.state.data[0] = torch.tensor([0.5, -0.3, 0.2])
    svi, seen = SVI(linear, guide, optimizer, TraceEnsemble_ELBO(num_particles=particles)), []
    for step in range(steps):
        torch.manual_seed(seed + step)
        svi.step(*args())
        seen.append(guide.state.detach().clone())
    return torch.stack(seen)


@pytest.mark.parametrize("clip", [float("inf"), 0.3])
def test_the_update_is_the_papers(clip):
    """Step by step by hand, on a quadratic, with the noise of the same seeds."""
    (x, y), lr, beta1, beta2 = args(), 0.2, 0.8, 0.9
    found = run(12, IVON(lr, beta1=beta1, beta2=beta2, clip_radius=clip))
    m, h, g, delta = torch.tensor([0.5, -0.3, 0.2]), torch.full((3,), HESS), torch.zeros(3), 1 / (ROWS * PRIOR**2)
    for step in range(12):
        torch.manual_seed(5 + step)
        sigma = (1 / (ROWS * (h + delta))).sqrt()
        theta = m + sigma * torch.randn(1, 3)[0]
        gradient = x.T @ (x @ theta - y) / ROWS
        curvature = gradient * (theta - m) / sigma**2
        g = beta1 * g + (1 - beta1) * gradient
        h = beta2 * h + (1 - beta2) * curvature + 0.5 * (1 - beta2) ** 2 * (h - curvature) ** 2 / (h + delta)
        step_size = lr * (HESS + delta)
        m = m - step_size * ((g / (1 - beta1 ** (step + 1)) + delta * m) / (h + delta)).clamp(-clip, clip)
        torch.testing.assert_close(found[step], torch.stack([m, h]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("particles", "kl_weight"), [(1, 1.0), (3, 1.0), (1, 0.2)])
def test_it_agrees_with_the_authors_package(particles, kl_weight):
    """The same weights after each of 30 steps with the same noise."""
    ivon = pytest.importorskip("ivon")
    (x, y), settings = args(), {"beta1": 0.8, "beta2": 0.95}
    found, ess = run(30, IVON(0.1, **settings), particles, kl_weight=kl_weight), ROWS / kl_weight
    weight = torch.nn.Parameter(torch.tensor([0.5, -0.3, 0.2]))
    theirs = ivon.IVON(
        [weight], lr=0.1, ess=ess, weight_decay=1 / (ess * PRIOR**2), hess_init=HESS, mc_samples=particles, **settings
    )
    for step in range(30):
        torch.manual_seed(5 + step)
        for _ in range(particles):
            with theirs.sampled_params(train=True):
                theirs.zero_grad()
                (0.5 * (x @ weight - y).square().mean()).backward()
        theirs.step()
        torch.testing.assert_close(found[step][0], weight.detach(), rtol=1e-9, atol=1e-10)


def test_the_scale_is_that_of_the_draws():
    guide = AutoIVON(linear, num_data=ROWS, hess_init=HESS)
    guide(*args())
    wanted = (ROWS * (HESS + 1 / (ROWS * PRIOR**2))) ** -0.5
    torch.testing.assert_close(guide.scale(), torch.full((3,), wanted))
    drawn = guide.draws(200_000)["weight"].reshape(-1, 3) - guide.median()["weight"]
    ratio = drawn.square().mean(0) / wanted**2
    assert ((ratio - 1).abs() < 6 * (2 / 200_000) ** 0.5).all()


def test_a_schedule_lowers_the_rate():
    settings = {"optimizer": IVONOptimizer, "optim_args": {"lr": 0.1, "beta1": 0.0, "beta2": 0.9}, "gamma": 0.5}
    schedule = ExponentialLR(settings)
    plain = run(1, IVON(0.1, beta1=0.0, beta2=0.9))
    pyro.clear_param_store()
    assert torch.equal(run(1, schedule), plain)


def test_vogn_is_a_setting_of_the_factorized_guide():
    """Λ ← (1 − β) Λ + β (Σ_n g_n² + 1/s²) with gradients per datum at the draw; the mean moves along Σ ∇."""
    (x, y), beta, lr = args(), 0.3, 0.2
    guide = AutoFactorizedNormal(linear, init_scale=0.5)
    guide(x, y)
    loc, scale = guide.loc.detach().clone(), guide.scale.detach().clone()
    loss = TraceNaturalGradient_ELBO("empirical", stick_the_landing=False, trust_region=None)
    svi = SVI(linear, guide, NaturalGradientDescent(lr, precision_lr=beta), loss)
    torch.manual_seed(3)
    svi.step(x, y)
    precision = guide.scale.detach() ** -2
    squares = (precision - (1 - beta) * scale**-2) / beta - PRIOR**-2
    # The mean's step tells the draw w, at which g_n = (y_n − x_n·w) x_n.
    total = (guide.loc.detach() - loc) / lr / scale**2
    draw = torch.linalg.solve(x.T @ x + torch.eye(3) / PRIOR**2, x.T @ y - total)
    wanted = ((y - x @ draw)[:, None] * x).square().sum(0)
    torch.testing.assert_close(squares, wanted, rtol=1e-6, atol=1e-6)


BAD = {
    "data": (lambda: AutoIVON(linear, num_data=0), "num_data is 0; give the number of all data"),
    "weight": (lambda: AutoIVON(linear, num_data=9, kl_weight=0.0), "kl_weight is 0.0; give a positive"),
    "hess": (lambda: AutoIVON(linear, num_data=1, hess_init=0.0), "hess_init is 0.0; give a positive"),
    "beta1": (lambda: IVON(beta1=1.0), "beta1 is 1.0; give a number from 0"),
    "beta2": (lambda: IVON(beta2=-0.1), "beta2 is -0.1; give a number from 0"),
    "lr": (lambda: IVON(0.0), "lr is 0.0; give a positive number"),
    "clip": (lambda: IVON(clip_radius=-1.0), "clip_radius is -1.0; give a positive"),
    "guide": (
        lambda: SVI(linear, AutoFactorizedNormal(linear), IVON(), Trace_ELBO()).step(*args()),
        "IVON moves the parameter of AutoIVON alone",
    ),
    "loss": (
        lambda: SVI(linear, AutoIVON(linear, num_data=9), IVON(), Trace_ELBO()).step(*args()),
        "AutoIVON is trained by TraceEnsemble_ELBO",
    ),
    "loss and optimizer": (
        lambda: SVI(linear, AutoIVON(linear, num_data=9), Adam({"lr": 0.1}), Trace_ELBO()).step(*args()),
        "AutoIVON is trained by TraceEnsemble_ELBO",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_refused_in_words(name):
    make, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("optimizer", [Adam({"lr": 0.01}), ClippedAdam({"lr": 0.01}), SGD({"lr": 1e-6})])
def test_another_optimizer_is_refused(optimizer):
    """At the second step, and by draws after the first: it would move h along its own estimate."""
    guide = AutoIVON(linear, num_data=ROWS)
    svi = SVI(linear, guide, optimizer, TraceEnsemble_ELBO())
    svi.step(*args())
    for use in (lambda: svi.step(*args()), lambda: guide.draws(2), guide.median, guide.scale):
        with pytest.raises(ValueError, match="was moved by another optimizer than IVON"):
            use()


def test_losses_without_steps_and_restored_parameters_are_no_other_optimizer():
    guide = AutoIVON(linear, num_data=ROWS)
    svi, loss = SVI(linear, guide, IVON(), TraceEnsemble_ELBO()), TraceEnsemble_ELBO()
    svi.evaluate_loss(*args())
    guide.state.data[0] = 1.0
    for _ in range(2):
        loss.loss_and_grads(linear, guide, *args())
    svi.step(*args())
    kept = {name: value.clone() for name, value in guide.state_dict().items()}
    svi.step(*args())
    guide.load_state_dict(kept)
    svi.step(*args())
    assert guide.draws(2)["weight"].isfinite().all()
