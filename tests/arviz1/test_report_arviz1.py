"""The report without torch, for ArviZ 0.x and 1.x alike.

Where the package is not installed, its folder stands for it: ``import bnn`` needs torch, the report's modules do not.
"""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

# ArviZ 0.x announces 1.x once a day, when it is imported.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*ArviZ is undergoing a major refactor:FutureWarning")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def package():
    pytest.importorskip("arviz")
    if importlib.util.find_spec("torch") is not None and importlib.util.find_spec("bnn") is not None:
        yield importlib.import_module("bnn.report_page")
        return
    stand_in = ModuleType("bnn")
    stand_in.__path__ = [str(ROOT / "bnn")]
    sys.modules["bnn"] = stand_in
    before = "torch" in sys.modules
    module = importlib.import_module("bnn.report_page")
    assert ("torch" in sys.modules) == before
    yield module
    for name in [name for name in sys.modules if name.split(".")[0] == "bnn"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def runs(package):
    spec = importlib.util.spec_from_file_location("runs_of_random_numbers", ROOT / "tests" / "support" / "runs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def headings(page):
    return re.findall(r"<h2>(.*?)</h2>", page)


def test_every_section(package, runs, tmp_path):
    path = package.report(runs.regression_run(), tmp_path / "report.html")
    page = path.read_text(encoding="utf-8")
    without_calibration = [one for one in headings(page) if not one.startswith(("Calibration", "Left out"))]
    assert without_calibration == [
        "The run", "Temperature", "Predictions", "Sites", "Chains", "Energy", "Predictive check of y", "Leave-one-out",
    ]  # fmt: skip
    assert ("Calibration of y" in headings(page)) != ("is not installed" in page)
    assert page.count("<svg") == page.count("<figure>") >= 15
    assert "http" not in page


def test_figures_are_those_of_arviz(package, runs):
    import arviz as az

    data = runs.regression_run(slow=0.5, shift=0.01)
    given = az.convert_to_dataset({"v": data["posterior"]["y_mean"].values})
    rhat = float(np.max(az.rhat(given)["v"].values))
    assert f"<dt>worst R-hat of predictions</dt><dd>{rhat:.3f}</dd>" in package.render(data)


def test_bad_runs_and_lacking_groups(package, runs):
    page = package.render(runs.regression_run(shift=0.3, kinetic=1.5, drop=("log_likelihood",)))
    assert "Chains disagree in their predictions" in page and "Not the temperature asked for" in page
    assert "no group log_likelihood" in page and "Leave-one-out" not in headings(page)


def test_a_classification_from_a_file(package, runs, tmp_path):
    import arviz as az

    pytest.importorskip("h5py")
    runs.classification_run().to_netcdf(tmp_path / "run.nc", engine="h5netcdf")
    page = package.render(az.from_netcdf(tmp_path / "run.nc"))
    assert "Classes of y" in page and "Nothing found that speaks against these draws." in page


def test_nothing_is_changed(package, runs):
    data = runs.regression_run()
    names = ["posterior", "sample_stats", "predictions"]
    before = {name: {v: data[name][v].copy(deep=True) for v in data[name].data_vars} for name in names}
    package.render(data)
    for name, variables in before.items():
        assert all(variable.identical(data[name][v]) for v, variable in variables.items())


def test_what_is_no_data_of_arviz(package):
    with pytest.raises(ValueError, match="give ArviZ data"):
        package.render({"w": np.ones((4, 5))})
