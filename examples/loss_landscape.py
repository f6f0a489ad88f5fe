"""Two modes of one net, what lies between them, and how sharp it is there.

A net with one hidden layer learns two spirals twice, from two starts. Printed for the straight line between the modes,
for the line after the second net's hidden units are put in the order of the first's, and for a Bezier curve trained to
stay low: how high the energy rises (in nats, for all data), and accuracy on new rows and sharpness in the middle. The
figure shows the energy along them, in the plane of the curve, and the largest Hessian eigenvalue. Writes
loss_landscape.png. Takes about half a minute on two cores.
"""

import argparse
from pathlib import Path

import matplotlib
import pyro
import torch

import bnn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {"line": "C3", "line, aligned": "C1", "Bezier curve": "C0"}


def spirals(rows):
    """Inputs in the plane, and which of two spirals they lie on."""
    labels = torch.arange(rows) % 2
    angle = 0.5 + 4.0 * torch.rand(rows).sqrt()
    turn = angle + torch.pi * labels
    return torch.stack([angle * turn.cos(), angle * turn.sin()], -1) / 3 + 0.08 * torch.randn(rows, 2), labels


def modes(potential, steps):
    """Two minima of the energy, found side by side from two starts by Adam on all data."""
    position = potential.initial(2)
    optimizer = torch.optim.Adam([position], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        _, position.grad = potential.full_energy_and_grad(position)
        optimizer.step()
        schedule.step()
    return position.detach()


def curves(potential, first, second, steps):
    """Name -> curve."""
    aligned = bnn.align_hidden_units(potential, first, second)
    return {
        "line": bnn.connect_modes(potential, first, second, kind="line"),
        "line, aligned": bnn.connect_modes(potential, first, aligned, kind="line"),
        "Bezier curve": bnn.connect_modes(potential, first, aligned, steps=steps, learning_rate=0.03),
    }


def sharpness(curve, times):
    """The largest Hessian eigenvalue at some times."""
    places = curve.position(times)
    return [bnn.top_eigenvalues(bnn.CurvatureOperator(curve.potential, z)).values[0] for z in places]


# ---- the figure


def plane(axes, curve, size):
    """The energy in the plane through both ends and the bend of a Bezier curve, and the curve in it."""
    origin, bend, end = curve.points
    basis = torch.linalg.qr(torch.stack([end - origin, bend - origin], -1))[0]
    inside = (torch.cat([curve.points, curve.position(torch.linspace(0, 1, 100))]) - origin) @ basis
    low, high = inside.min(0).values, inside.max(0).values
    margin = 0.25 * (high - low)
    axis = [torch.linspace(float(a), float(b), size) for a, b in zip(low - margin, high + margin, strict=True)]
    grid = torch.cartesian_prod(*axis)
    energy = torch.cat([curve.potential.full_energy(origin + part @ basis.T) for part in grid.split(500)])
    above = (energy - energy.min() + 1.0).reshape(size, size).T
    axes.contourf(*axis, above, levels=torch.logspace(0, float(above.max().log10()), 30), norm="log", cmap="viridis_r")
    axes.plot(*inside[3:].T, color=COLOURS["Bezier curve"], linewidth=2)
    axes.plot(*inside[[0, 2]].T, "o-", color=COLOURS["line, aligned"], markeredgecolor="black")
    axes.set(title="energy in the plane of the curve", xticks=[], yticks=[])


def draw(paths, profiles, eigenvalues, times, size):
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for name, profile in profiles.items():
        left.plot(profile.t, profile.energy - profile.energy[0] + 1.0, color=COLOURS[name], label=name)
        right.semilogy(times, eigenvalues[name], "o-", markersize=3, color=COLOURS[name])
    left.set(title="energy above the first mode, plus 1 nat", xlabel="t", yscale="log")
    left.legend(fontsize="small")
    right.set(title="largest Hessian eigenvalue", xlabel="t")
    plane(middle, paths["Bezier curve"], size)
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="fewer steps and points")
    parser.add_argument("--folder", type=Path, default=Path("."), help="where loss_landscape.png goes")
    options = parser.parse_args()
    pyro.set_rng_seed(options.seed)
    scale = 0.3 if options.quick else 1.0

    net = torch.nn.Sequential(torch.nn.Linear(2, 40), torch.nn.Tanh(), torch.nn.Linear(40, 2))
    model = bnn.bayesian(net, prior=bnn.priors.Normal(2.0), likelihood=bnn.likelihoods.Categorical())
    x, y = spirals(300)
    test_x, test_y = spirals(2000)
    potential = bnn.Potential(model, x, y)

    paths = curves(potential, *modes(potential, round(3000 * scale)), round(2000 * scale))
    times = torch.linspace(0, 1, 7 if options.quick else 21)
    profiles, eigenvalues = {}, {}
    print(f"{'':<14} barrier  accuracy  NLL    largest eigenvalue (middle of the curve)")
    for name, curve in paths.items():
        profiles[name] = found = bnn.curve_profile(curve, test_x, targets=test_y, num_points=61)
        eigenvalues[name] = sharpness(curve, times)
        middle = found.sel(t=0.5)
        print(
            f"{name:<14} {found.attrs['barrier']:7.1f}  {float(middle.accuracy):8.3f}  {float(middle.nll):5.3f}  "
            f"{eigenvalues[name][len(times) // 2]:8.0f}"
        )
    ends = profiles["line"].isel(t=[0, -1])
    print(f"{'the modes':<14}          {float(ends.accuracy.mean()):8.3f}  {float(ends.nll.mean()):5.3f}  ", end="")
    print(f"{sum(eigenvalues['line'][i] for i in (0, -1)) / 2:8.0f}")

    figure = draw(paths, profiles, eigenvalues, times, 15 if options.quick else 45)
    figure.savefig(options.folder / "loss_landscape.png", dpi=110)


if __name__ == "__main__":
    main()
