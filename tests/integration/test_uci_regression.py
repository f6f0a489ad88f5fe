"""The regression example: its splits, its scores, and its comparison on files, by its command line."""

import importlib.util
import json
import math
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pyro
import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "examples" / "uci_regression.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("uci_regression", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def table():
    """40 rows that are linear in two inputs, with a third that is constant."""
    random = np.random.RandomState(0)
    x = np.column_stack([random.randn(40), 5 + 3 * random.randn(40), np.full(40, 2.0)])
    return x, 10 + 4 * x[:, 0] - x[:, 1] + 0.1 * random.randn(40)


def run(*options):
    command = [sys.executable, str(SCRIPT), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_a_split_is_standardised_on_its_training_part(example, table):
    (train, test), *_ = example.standard_splits(40, 1)
    split = example.standardised(*table, train, test)
    assert torch.allclose(split.x.mean(0), torch.zeros(3), atol=1e-6)
    assert torch.allclose(split.x.std(0, correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-6)
    assert abs(split.y.mean()) < 1e-6 and abs(split.y.std(correction=0) - 1) < 1e-6
    assert split.width == pytest.approx(table[1][train].std())
    assert len(split.y_test) == 4


def test_the_standard_splits_are_covers_by_one_stream_of_random_numbers(example):
    splits = list(example.standard_splits(308, 3))
    random = np.random.RandomState(1)
    for train, test in splits:
        order = random.choice(range(308), 308, replace=False)
        assert (train == order[:277]).all() and (test == order[277:]).all()
    assert not (splits[0][1] == splits[1][1]).all()


def test_what_is_held_out_is_part_of_the_training_part(example):
    train = np.arange(100, 200)
    rest, held_out = example.hold_out(train)
    assert len(held_out) == 10 and sorted([*rest, *held_out]) == list(train)


def test_scores_of_a_known_posterior(example, table):
    """A guide without spread: the scores are those of one net, the ELBO its log joint density."""
    (train, test), *_ = example.standard_splits(40, 1)
    split = example.standardised(*table, train, test)
    point = {
        "weight_1": torch.zeros(50, 3), "bias_1": torch.zeros(50), "weight_2": torch.zeros(1, 50),
        "bias_2": torch.zeros(1), "precision": torch.tensor(4.0),
    }  # fmt: skip

    def guide(*args):
        return {
            name: pyro.sample(name, pyro.distributions.Delta(value, event_dim=value.dim()))
            for name, value in point.items()
        }

    rmse, log_likelihood, elbo = example.score(guide, split, Namespace(draws=3, particles=2, noise="gamma"))
    error = split.y_test * split.width
    assert rmse == pytest.approx(error.square().mean().sqrt().item(), rel=1e-5)
    expected = torch.distributions.Normal(0.0, 0.5 * split.width).log_prob(error).mean().item()
    assert log_likelihood == pytest.approx(expected, rel=1e-5)
    joint = torch.distributions.Normal(0.0, 0.5).log_prob(split.y).sum()
    joint = joint + torch.distributions.Gamma(6.0, 6.0).log_prob(torch.tensor(4.0))
    weights = 50 * 3 + 50 + 50 + 1
    assert elbo == pytest.approx(joint.item() - 0.5 * weights * math.log(2 * math.pi), rel=1e-5)


@pytest.mark.parametrize("noise", ["gamma", "learned"])
def test_natural_gradients_learn_a_line(example, table, noise):
    """Every method at its own settings on 36 rows: far better than the mean of the targets."""
    (train, test), *_ = example.standard_splits(40, 1)
    split = example.standardised(*table, train, test)
    options = Namespace(epochs=60, batch_size=12, noise=noise, draws=100, particles=10)
    for kind in ("matrix", "noisy-kfac"):
        pyro.set_rng_seed(0)
        guide, seconds = example.fit(example.METHODS[kind], 0.1, split.x, split.y, options)
        rmse, log_likelihood, elbo = example.score(guide, split, options)
        assert rmse < 0.5 * split.width and math.isfinite(log_likelihood + elbo) and seconds > 0


@pytest.mark.slow
def test_a_folder_of_tables_by_the_command_line(table, tmp_path):
    """Indices in the file are used; the file of scores has a line for each split and method."""
    order = np.random.RandomState(3).permutation(40)
    splits = {"train_idx": [order[:30], order[10:]], "test_idx": [order[30:], order[:10]]}
    np.savez(tmp_path / "line.npz", X=table[0], y=table[1], **splits)
    saved = tmp_path / "scores.jsonl"
    done = run(
        "--data", tmp_path, "--epochs", 3, "--methods", "matrix", "tempered", "--draws", 20, "--particles", 5,
        "--validate", "--save", saved,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "line: 40 rows, 3 inputs, 2 splits" in done.stdout
    records = [json.loads(line) for line in saved.read_text().splitlines()]
    assert [(r["split"], r["method"]) for r in records] == [
        (0, "matrix"), (0, "tempered"), (1, "matrix"), (1, "tempered")
    ]  # fmt: skip
    assert all(math.isfinite(r[score]) for r in records for score in ("RMSE", "log-likelihood", "ELBO", "s/epoch"))


@pytest.mark.slow
def test_the_quick_run_prints_every_comparison():
    done = run("--quick")
    assert done.returncode == 0, done.stderr
    for words in ("diabetes: 442 rows", "held-out log-likelihood by lr", "less bbb", "RMSE", "ELBO", "s/epoch"):
        assert words in done.stdout
    for kind in ("noisy-adam", "noisy-kfac", "matrix", "eigen", "tempered"):
        assert done.stdout.count(f"  {kind} ") == 2  # scores, and differences
