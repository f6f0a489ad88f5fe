"""The standard splits of UCI regression: the library's posteriors and the field's usual ones on one model, paired.

    python tests/benchmarks/uci.py --data FOLDER [--splits 20] [--csv FILE]     # goes on where results/uci.jsonl ends
    python tests/benchmarks/uci.py --data FOLDER --show [--csv FILE]            # only the table of what there is
    python tests/benchmarks/uci.py --quick                                      # diabetes, two splits of ten epochs

The model, splits, epochs and scores are those of ``examples/uci_regression.py``: one hidden layer of 50
ReLU units, N(0, 1) on every weight, Gamma(6, 6) on the noise's precision. Its file of scores gives the rows of the
variational guides; here are added

    map        the mode of the log joint, by Adam
    ensemble   five such modes from starts of their own (deep ensembles, Lakshminarayanan et al. 2017)
    dropout    dropout of inputs and hidden units at test time too (Gal and Ghahramani 2016)
    laplace    a Gaussian around the mode with the full Gauss-Newton matrix, in the linearised model
    sghmc      four chains of SGHMC, with gradients of all rows

Adam's rate is 0.01 on all sets, held for half of the epochs and then falling to a twentieth; dropout's is chosen for
each set by the log-likelihood of a tenth of the first split's training part. The modes of all splits are trained at
once, in one vectorized program, and so are the dropout nets; their seconds are shares of its own. "Passes" are
gradients over rows of data, of all members or chains, in units of the training part.
"""

from __future__ import annotations

import csv
import json
import math
import os
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples"))

import numpy as np  # noqa: E402
import pyro  # noqa: E402
import torch  # noqa: E402
import uci_regression as example  # noqa: E402
from pyro.nn.module import pyro_method  # noqa: E402
from tables import show, write  # noqa: E402

import bnn  # noqa: E402
from bnn.guides import AutoDropout, AutoEnsemble, Laplace, PerMember, TraceEnsemble_ELBO  # noqa: E402
from bnn.kernels import MCMC, SGHMC  # noqa: E402

RESULTS = Path(__file__).parent / "results"
THEIRS = ROOT / "examples" / "uci_regression.jsonl"
GUIDES = {"bbb": 1, "noisy-kfac": 2, "matrix": 2, "tempered": 2}  # and the backward passes of their steps
MEMBERS = 5
CHAINS, DRAWS, STEPS_PER_DRAW, FRICTION = 4, 200, 40, 1.0

LR, RATES = 0.01, (0.005, 0.05)
MODES, METHODS = ("map", "ensemble", "laplace"), ("map", "ensemble", "laplace", "dropout", "sghmc")
Scores = dict[str, float]


# ---- the methods


def adam(guide: Any) -> example.Method:
    return example.Method(guide, TraceEnsemble_ELBO, torch.optim.Adam, LR)


def scores(rmse: float, log_likelihood: float, seconds: float, passes: float) -> Scores:
    return {"RMSE": rmse, "log-likelihood": log_likelihood, "seconds": seconds, "passes": passes}


def modes(splits: Sequence[example.Split], options: Namespace) -> list[dict[str, Scores]]:
    """Of each split an ensemble, its first member, and Laplace around this; all splits train in one program."""
    start, count = time.process_time(), MEMBERS * len(splits)
    x, y = (torch.stack(part).repeat_interleave(MEMBERS, 0) for part in zip(*((s.x, s.y) for s in splits), strict=True))
    method, rows = adam(partial(AutoEnsemble, members=count)), x.shape[1]
    guide, _ = example.fit(method, LR, PerMember(x), PerMember(y), options, rows)
    share = (time.process_time() - start) / count
    found = []
    for split, positions in zip(splits, guide.positions.detach().split(MEMBERS), strict=True):
        members = guide.constrain(positions)
        first = {name: value[:1] for name, value in members.items()}
        found.append(
            {
                "map": scores(*example.predictive_scores(first, split), share, options.epochs),
                "ensemble": scores(
                    *example.predictive_scores(members, split), MEMBERS * share, MEMBERS * options.epochs
                ),
                "laplace": laplace({name: value[0] for name, value in members.items()}, share, split, options),
            }
        )
    return found


def laplace(mode: dict[str, torch.Tensor], before: float, split: example.Split, options: Namespace) -> Scores:
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # minibatches leave the mode a tenth of a posterior sd off
        posterior = Laplace(example.model, "full", point=mode).fit(split.x, split.y, options.noise)
    found = posterior.linearised(split.x_test, None, options.noise)
    named = bnn.gaussian_scores(found.mean, found.sd, split.y_test)
    log_likelihood = -named["nll"].value - math.log(split.width)
    seconds = before + time.process_time() - start
    return scores(split.width * named["rmse"].value, log_likelihood, seconds, options.epochs + 1)


class DropoutNets(AutoEnsemble):
    """Many nets under an AutoDropout of their own: the members are its locations, each step draws each a mask."""

    def __init__(self, model: Any, members: int, rate: float) -> None:
        super().__init__(model, members)
        self._one = (AutoDropout(model, rate),)  # in a tuple, so that its parameters are not this one's

    def _make(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        super()._make(args, kwargs)
        self._one[0](*args, **kwargs)

    @pyro_method
    def particles(self, count: int) -> torch.Tensor:
        del count
        return self.positions * self._one[0].masks(self.members)

    def draws_of(self, number: int, count: int) -> dict[str, torch.Tensor]:
        """Draws of one net, each under a mask."""
        return self.constrain(self.positions[number].detach() * self._one[0].masks(count))


def dropout(rate: float, splits: Sequence[example.Split], options: Namespace) -> list[Scores]:
    """Dropout nets of all splits in one program."""
    start = time.process_time()
    x, y = (torch.stack(part) for part in zip(*((s.x, s.y) for s in splits), strict=True))
    method, rows = adam(partial(DropoutNets, members=len(splits), rate=rate)), x.shape[1]
    guide, _ = example.fit(method, LR, PerMember(x), PerMember(y), options, rows)
    share = (time.process_time() - start) / len(splits)
    draws = [guide.draws_of(number, options.draws) for number in range(len(splits))]
    return [
        scores(*example.predictive_scores(one, split), share, options.epochs)
        for one, split in zip(draws, splits, strict=True)
    ]


def sghmc(split: example.Split, options: Namespace) -> Scores:
    start, draws = time.process_time(), max(20, DRAWS * options.epochs // 400)
    kernel = SGHMC(example.model, step_size="auto", friction=FRICTION, mass="auto", steps_per_sample=STEPS_PER_DRAW)
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=draws, num_chains=CHAINS, disable_progbar=True)
    mcmc.run(split.x, split.y, options.noise)
    seconds = time.process_time() - start
    passes = CHAINS * 2 * draws * STEPS_PER_DRAW
    return scores(*example.predictive_scores(mcmc.get_samples(), split), seconds, passes)


# ---- the run


def run(options: Namespace) -> None:
    """Fit what the file of scores has not: points of all splits at once, then chains, the first splits of all sets."""
    sets = {name: (x, y, splits) for name, x, y, splits in example.load(options)}
    known = {name: example.saved(name, options) for name in sets}

    def save(name: str, number: int, kind: str, found: Scores, **more: float) -> None:
        record = {"data": name, "split": number, "method": kind, **more, **found}
        with options.save.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**record, "settings": example.settings_of(options)}) + "\n")

    def missing(name: str, kinds: Sequence[str]) -> list[int]:
        asked = [kind for kind in kinds if kind in options.methods]
        return [n for n in range(len(sets[name][2])) if any((n, kind) not in known[name] for kind in asked)]

    def some(name: str, numbers: Sequence[int]) -> list[example.Split]:
        x, y, splits = sets[name]
        return [example.standardised(x, y, *splits[number]) for number in numbers]

    for name, (x, y, splits) in sets.items():
        if numbers := missing(name, MODES):
            pyro.set_rng_seed(options.seed)
            for number, found in zip(numbers, modes(some(name, numbers), options), strict=True):
                for kind in MODES:
                    save(name, number, kind, found[kind])
            print(f"{name}: modes of {len(numbers)} splits", file=sys.stderr, flush=True)
        if numbers := missing(name, ["dropout"]):
            held_out, tried = example.standardised(x, y, *example.hold_out(splits[0][0])), {}
            for rate in RATES:
                pyro.set_rng_seed(options.seed)
                tried[rate] = dropout(rate, [held_out], options)[0]["log-likelihood"]
            rate = max(tried, key=lambda rate: tried[rate])
            pyro.set_rng_seed(options.seed)
            for number, one in zip(numbers, dropout(rate, some(name, numbers), options), strict=True):
                save(name, number, "dropout", one, rate=rate)
            print(f"{name}: held-out log-likelihood by dropout's rate {tried}", file=sys.stderr, flush=True)
    for number in range(options.splits):
        for name in sets:
            if number in missing(name, ["sghmc"]):
                pyro.set_rng_seed(options.seed + number)
                save(name, number, "sghmc", sghmc(*some(name, [number]), options))
        print(f"split {number}", file=sys.stderr, flush=True)


# ---- the table


def scores_of(name: str, options: Namespace) -> dict[str, dict[int, dict[str, float]]]:
    """Method -> split -> scores, of both files."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    theirs = example.saved(name, Namespace(**{**vars(options), "save": THEIRS}))
    for (split, kind), one in theirs.items():
        if kind in GUIDES:
            more = {"seconds": one["s/epoch"] * options.epochs, "passes": GUIDES[kind] * options.epochs}
            found.setdefault(kind, {})[split] = {**one, **more}
    for (split, kind), one in example.saved(name, options).items():
        found.setdefault(kind, {})[split] = one
    return found


def mean_and_error(values: list[float]) -> tuple[float, float | None]:
    return float(np.mean(values)), float(np.std(values, ddof=1)) / len(values) ** 0.5 if len(values) > 1 else None


def table(names: list[str], options: Namespace) -> list[dict[str, Any]]:
    """A row for each set and method: means, standard errors, and what is left of them beside the baseline's."""
    rows = []
    for name in names:
        found = scores_of(name, options)
        base = found.get(options.baseline, {})
        for kind in (kind for kind in (*GUIDES, *METHODS) if kind in found):
            splits = found[kind]
            row: dict[str, Any] = {"data": name, "method": kind, "splits": len(splits)}
            for score in ("RMSE", "log-likelihood"):
                row[score], row[f"s.e. of {score}"] = mean_and_error([one[score] for one in splits.values()])
            for score in ("RMSE", "log-likelihood"):
                less = [one[score] - base[split][score] for split, one in splits.items() if split in base]
                value, error = mean_and_error(less) if less and kind != options.baseline else (None, None)
                row[f"{score} less {options.baseline}"], row[f"s.e. of {score} less"] = value, error
            row["pairs"] = 0 if kind == options.baseline else len(base.keys() & splits.keys())
            for cost in ("seconds", "passes"):
                row[cost] = float(np.median([one[cost] for one in splits.values()]))
            rows.append(row)
    return rows


def compact(row: dict[str, Any], baseline: str) -> dict[str, Any]:
    """The same, each mean with its error in one cell."""

    def cell(name: str, error: str) -> str:
        value, spread = row[name], row[error]
        sign = "+" if "less" in name else ""
        return "" if value is None else f"{value:{sign}.3f}" + ("" if spread is None else f" ± {spread:.3f}")

    cells = {name: row[name] for name in ("data", "method", "splits")}
    for name in ("RMSE", "log-likelihood"):
        cells[name] = cell(name, f"s.e. of {name}")
    for name in ("RMSE", "log-likelihood"):
        cells[f"{name} less {baseline}"] = cell(f"{name} less {baseline}", f"s.e. of {name} less")
    return {**cells, "seconds": row["seconds"], "passes": row["passes"]}


def published(names: list[str]) -> list[dict[str, str]]:
    """What papers report on the same splits, with source and protocol."""
    with (RESULTS / "uci_published.csv").open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["data"] in names]


def main() -> None:
    parser = example.parser_of(__doc__, METHODS)
    parser.add_argument("--baseline", choices=[*GUIDES, *METHODS], default="ensemble", help="of paired differences")
    parser.add_argument("--show", action="store_true", help="fit nothing: the table of what there is")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    parser.set_defaults(save=RESULTS / "uci.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.splits, options.epochs, options.save = 2, 10, Path(folder) / "uci.jsonl"
        if not options.show:
            run(options)
        names = [name for name, *_ in example.load(options)]
        rows = table(names, options)
    show([compact(row, options.baseline) for row in rows])
    if options.csv:
        write(rows, options.csv)
    if quoted := published(names):
        print("\nPublished, on these splits:\n")
        show(quoted)


if __name__ == "__main__":
    main()
