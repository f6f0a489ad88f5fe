"""LOO in words without torch, for ArviZ 0.x and 1.x alike."""

import importlib
import sys
import types
from pathlib import Path

import numpy as np
import pytest

# ArviZ 0.x announces 1.x once a day, when it is imported.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*ArviZ is undergoing a major refactor:FutureWarning")

FOLDER = Path(__file__).resolve().parents[2] / "bnn"


@pytest.fixture
def leave_one_out(monkeypatch):
    """The module, from a package of the same name that imports nothing: that of the library needs torch."""
    pytest.importorskip("arviz")
    for name in [name for name in sys.modules if name.split(".")[0] == "bnn"]:
        monkeypatch.delitem(sys.modules, name)
    package = types.ModuleType("bnn")
    package.__path__ = [str(FOLDER)]
    monkeypatch.setitem(sys.modules, "bnn", package)
    yield importlib.import_module("bnn.leave_one_out")
    for name in [name for name in sys.modules if name.startswith("bnn.")]:
        del sys.modules[name]


def test_every_line(leave_one_out):
    import arviz

    generator = np.random.default_rng(0)
    exponential = -np.log1p(-(np.arange(1000) + 0.5) / 1000)
    rows = [-shape * generator.permutation(exponential) for shape in (0.2, 0.72, 0.85, 1.5)]
    densities = np.stack([*rows, np.zeros(1000)], -1).reshape(4, 250, 5)
    groups = {"log_likelihood": {"y": densities}, "posterior": {"z": densities[..., 0]}}
    report = leave_one_out.loo_report(
        leave_one_out.assemble(groups, attrs={"posterior": {"temperature": 0.5, "guide": "AutoNormal"}})
    )
    assert report.counts == {"good": 1, "good with more draws": 1, "bad": 1, "very bad": 1}
    words = [
        "LOO of 4 rows from 1000 draws: elpd =",
        "1 rows that no draw changes",
        "Pareto k of 4 rows: 1 good (k <= 0.667), 1 good with more draws",
        "1 of them need more draws",
        "elpd is not to be believed for 2 rows",
        *(["WAIC: elpd ="] if hasattr(arviz, "waic") else []),
        "The chains ran at temperature 0.5, not 1",
        "The draws are from a guide, AutoNormal",
    ]
    assert len(report.lines) == len(words)
    for line, start in zip(report.lines, words, strict=True):
        assert line.startswith(start), line
    smooth = leave_one_out.assemble(
        {"log_likelihood": {"y": generator.normal(-1.0, 0.2, (4, 500, 20))}, "posterior": {"z": np.ones((4, 500))}}
    )
    found = arviz.loo(smooth, reff=1.0)
    expected = found["elpd_loo"] if hasattr(arviz, "waic") else found.elpd
    assert leave_one_out.loo_report(smooth).elpd == pytest.approx(expected, rel=1e-3)
    assert not {"torch", "pyro"} & {name.split(".")[0] for name in vars(leave_one_out)}


def test_a_chain_that_stood_still(leave_one_out):
    """ArviZ 0.x says what it can of it; ArviZ 1.x refuses, and the message says why."""
    import arviz

    densities = np.random.default_rng(0).normal(-1.0, 0.2, (4, 100, 3))
    densities[0] = -9.0  # a hundred draws of the smallest density
    groups = {"log_likelihood": {"y": densities}, "posterior": {"z": densities[..., 0]}}
    data = leave_one_out.assemble(groups)
    if hasattr(arviz, "waic"):
        assert leave_one_out.loo_report(data).lines
    else:
        with pytest.raises(ValueError, match="repeat one density, as those of a chain that stood still or diverged"):
            leave_one_out.loo_report(data)
