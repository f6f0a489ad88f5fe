"""The report: sections follow the groups, figures are ArviZ's, bad runs are told from good ones, nothing is touched."""

import importlib.resources
import re
import subprocess
import sys

import arviz as az
import matplotlib
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from matplotlib import pyplot as plt

import bnn
from bnn import report
from bnn.guides import AutoFactorizedNormal
from bnn.kernels import MCMC, SGHMC
from bnn.report_data import read
from bnn.report_page import render
from bnn.report_predictive import predicted
from bnn.report_scores import of_calibration
from bnn.report_sections import number
from bnn.reports import main
from support.pages import cells, headings
from support.runs import GROUPS, classification_run, regression_run

SECTIONS = {
    "sample_stats": {"Temperature", "Energy"},
    "log_likelihood": {"Leave-one-out"},
    "predictions": set(),
    "posterior_predictive": set(),
    "observed_data": set(),
}
ALWAYS = {"The run", "Sites", "Chains", "Predictions"}
OF_DATA = {"Predictive check of y", "Calibration of y"}


@pytest.fixture(autouse=True)
def draws_nothing(request, monkeypatch):
    """Plots take most of the time; tests that look at them ask for them."""
    if "plots" not in request.fixturenames:
        monkeypatch.setattr("bnn.report_plots.drawing", lambda *args: "<svg></svg>")


@pytest.fixture
def plots():
    """The plots are drawn."""


# ---- what is on the page


@pytest.mark.parametrize("drop", [(), *((group,) for group in GROUPS), GROUPS], ids=lambda drop: "+".join(drop) or "-")
def test_sections_follow_the_groups(drop):
    page = render(regression_run(drop=drop))
    expected = ALWAYS.union(*(found for group, found in SECTIONS.items() if group not in drop))
    left = headings(page) - {"Left out"}
    if "predictions" not in drop or not {"posterior_predictive", "observed_data"} & set(drop):
        expected |= OF_DATA
    assert left == expected
    if drop:
        assert ("no group log_likelihood" in page) == ("log_likelihood" in drop)
        assert ("no group sample_stats" in page) == ("sample_stats" in drop)
        assert ("of the data of the fit" in page) == (drop == ("predictions",))
        assert ("no predictions with targets" in page) == (drop == GROUPS)
    assert ("rows of held-out data" in page) == ("predictions" not in drop)
    assert ("rows of training data" in page) == (drop == ("predictions",))


def test_a_posterior_alone_names_what_is_lacking():
    page = render(regression_run(drop=GROUPS, function=False))
    assert headings(page) == {"The run", "Sites", "Chains", "Left out"}
    for word in ("sample_stats", "log_likelihood", "function_space", "posterior_predictive"):
        assert word in page.split("Left out")[1]


def test_figures_are_those_of_arviz():
    data = regression_run(slow=0.5, shift=0.01)
    page, posterior = render(data), data["posterior"]
    given = az.convert_to_dataset({"v": posterior["y_mean"].values})
    rhat, bulk = az.rhat(given)["v"].values, az.ess(given, method="bulk")["v"].values
    tail = az.ess(given, method="tail")["v"].values
    error = 100 * az.mcse(given)["v"].values / posterior["y_mean"].values.std((0, 1))
    table = cells(page, "y_mean")
    assert table["R-hat"] == [f"{v:.3f}" for v in np.quantile(rhat, [0.5, 0.95, 1.0])]
    assert table["bulk ESS"] == [f"{v:,.0f}" for v in np.quantile(bulk, [0.5, 0.05, 0.0])]
    assert table["tail ESS"] == [f"{v:,.0f}" for v in np.quantile(tail, [0.5, 0.05, 0.0])]
    assert table["error of the mean, % of sd"] == [number(v) for v in np.quantile(error, [0.5, 0.95, 1.0])]
    worst = cells(page, "worst values")
    order = np.argsort(-rhat, kind="stable")[:5]
    assert list(worst) == [f"y_mean[{place}]" for place in order]
    assert [row[0] for row in worst.values()] == [f"{rhat[place]:.3f}" for place in order]
    assert f"<dt>worst R-hat of predictions</dt><dd>{rhat.max():.3f}</dd>" in page
    assert f"<dd>{min(bulk.min(), tail.min()):,.0f}</dd>" in page

    assert set(cells(page, "site")) == {"w", "sigma"}
    weights = az.convert_to_dataset({"v": posterior["w"].values})
    rhat, ess = az.rhat(weights)["v"].values, az.ess(weights, method="bulk")["v"].values
    shape, mean, sd, prior, share, largest, least, *_ = cells(page, "site")["w"]
    assert (shape, prior) == ("3", "0.1")
    assert (mean, sd) == (number(np.abs(posterior["w"]).mean()), number(posterior["w"].values.std((0, 1)).mean()))
    assert (share, largest, least) == (
        f"{100 * (rhat > 1.01).mean():.0f} %",
        f"{rhat.max():.3f}",
        f"{ess.min():,.0f}",
    )
    stats = data["sample_stats"]
    assert cells(page, "measured on")["momenta"][0] == number(stats["kinetic_temperature"].mean(), 4)
    loo = bnn.loo_report(data)
    assert f"elpd = {loo.elpd:.6g}".replace("-", "−") in page


def test_r_hat_of_one_chain_is_that_of_its_halves():
    data = regression_run(chains=1, slow=0.9)
    halves = data["posterior"]["y_mean"].values.reshape(2, 250, 25)
    worst = az.rhat(az.convert_to_dataset({"v": halves}))["v"].values.max()
    assert f"<dt>worst R-hat of predictions</dt><dd>{worst:.3f}</dd>" in render(data)


def test_numbers_have_three_digits():
    given = {0.123456: "0.123", -12.3456: "−12.3", 1234.6: "1,235", 150.0: "150", 3: "3", 1e9: "1e+09", np.nan: "–",
             np.inf: "∞", -np.inf: "−∞", 0.0: "0", 1.5e-7: "1.5e−07"}  # fmt: skip
    assert {value: number(value) for value in given} == given
    assert (number(1.00449, 4), number(0.00449, 1)) == ("1.004", "0.004")


def test_scores_are_those_of_the_functions():
    found = next(predicted(read(regression_run())))
    table = of_calibration(found).section.tables[0]
    scores = bnn.regression_scores(found.samples, found.truth)
    assert table.rows[0][1] == number(scores["rmse"].value)
    found = next(predicted(read(classification_run())))
    table = of_calibration(found).section.tables[0]
    scores = bnn.classification_scores(found.probabilities, found.truth)
    assert [row[1] for row in table.rows[:2]] == [number(scores["nll"].value), number(scores["brier"].value)]


def test_what_ran():
    page = render(regression_run(attrs={"warmup_chose": "step_size 0.02", "thin": 3}))
    for words in (
        "GGMC, 4 chains of 500 draws",
        "1 min 4 s (setup 1 s, warm-up 2 s, sampling 1 min 1 s)",
        "1,000 while sampling",
        "step_size 0.02",
        "one draw in 3",
        "2 sites, 4 numbers",
        "y (40)",
    ):
        assert words in page, words


def test_a_net_of_many_weights_is_no_longer_than_a_small_one(plots):
    random = np.random.default_rng(0)
    data = az.from_dict(posterior={f"w{i}": random.normal(size=(4, 50, 100, 40)).astype("f4") for i in range(3)})
    page = render(data)
    assert len(page) < 600_000
    assert page.count("<tr>") < 20 and page.count("<figure>") == 9
    assert "4,000 numbers" not in page and "12,000 numbers" in page


# ---- runs from elsewhere


def test_real_run_of_every_kind(tmp_path):
    def line(x, y):
        w = pyro.sample("w", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)

    x, y = torch.randn(30, 2), torch.randn(30)
    mcmc = MCMC(SGHMC(line, step_size=0.05, friction=2.0, compile="fx"), 60, 20, num_chains=4, disable_progbar=True)
    mcmc.run(x, y)
    page = render(bnn.to_arviz(mcmc, posterior_predictive=True))
    assert {"Temperature", "Norm balance", "Energy", "Leave-one-out", "Calibration of y"} <= headings(page)
    guide = AutoFactorizedNormal(line)
    page = render(bnn.to_arviz(guide, model_args=(x, y), num_samples=200))
    assert "Draws from a guide" in page and not {"Chains", "Temperature", "Energy"} & headings(page)
    assert "R-hat" not in page.split("<main>")[1]


def test_data_of_another_library():
    random = np.random.default_rng(0)
    shape = (2, 100)
    stats = {"energy": random.normal(size=shape), "diverging": random.random(shape) < 0.1,
             "acceptance_rate": random.random(shape), "tree_depth": random.integers(1, 5, shape)}  # fmt: skip
    posterior = {"a": random.normal(size=shape), "b": random.normal(size=(*shape, 2))}
    attrs = {"inference_library": "pymc", "sampling_time": 12.3}
    data = bnn.arviz_data.assemble(
        {"posterior": posterior, "sample_stats": stats},
        coords={"side": ["left", "right"]}, dims={"b": ["side"]}, attrs={"posterior": attrs},
    )  # fmt: skip
    page = render(data)
    assert "pymc, 2 chains" in page and "target acceptance probability" in page and "sampling 12 s" in page
    assert "Energy and its changes" in page and "b[left]" in page


def test_an_ensemble():
    """Members as chains of one draw: no convergence, no plots of chains, no failure."""
    random = np.random.default_rng(0)
    data = bnn.arviz_data.assemble({"posterior": {"w": random.normal(size=(5, 1, 4))}})
    page = render(data)
    assert "not judged" in page and "Chains" not in headings(page)
    assert cells(page, "site")["w"] == ["4", *cells(page, "site")["w"][1:]]
    assert "nan" not in page.split("<main>")[1]


def test_constant_and_odd_variables():
    groups = {
        "posterior": {"c": np.ones((2, 30)), "b": np.arange(60).reshape(2, 30) % 2 == 0, "e": np.ones((2, 30, 0))}
    }
    page = render(bnn.arviz_data.assemble(groups))
    assert set(cells(page, "site")) == {"c", "b"}


def test_sections_survive_a_file(tmp_path):
    data = regression_run()
    data.to_netcdf(tmp_path / "run.nc")
    assert headings(render(az.from_netcdf(tmp_path / "run.nc"))) == headings(render(data))


# ---- the page


EVIL = "<script>alert(1)</script>"


def test_names_are_escaped(plots):
    random = np.random.default_rng(0)
    posterior = {EVIL: random.normal(size=(4, 50)), "f": random.normal(size=(4, 50, 3))}
    groups = {"posterior": posterior, "observed_data": {f"y{EVIL}": random.normal(size=9)},
              "posterior_predictive": {f"y{EVIL}": random.normal(size=(4, 50, 9))},
              "log_likelihood": {f"y{EVIL}": random.normal(size=(4, 50, 9))}}  # fmt: skip
    attrs = {"inference_library": EVIL, "kernel": EVIL, "caveat": EVIL, "warmup_chose": EVIL}
    data = bnn.arviz_data.assemble(groups, attrs={"posterior": attrs})
    data["posterior"]["f"].attrs["function_of"] = EVIL
    page = render(data, title=EVIL)
    assert "<script" not in page and "&lt;script&gt;" in page


@pytest.mark.parametrize("make", [regression_run, classification_run])
def test_the_page_needs_nothing_else(make, plots):
    page = render(make())
    assert "http" not in page and "url(" not in page.replace("url(#", "") and "<script" not in page
    assert not re.search(r"\b(src|xlink:href)=", page)
    assert set(re.findall(r'href="([^"]*)"', page)) <= {"data:,"} | {
        f"#{name}" for name in re.findall(r'id="([^"]+)"', page)
    }
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_nothing_is_touched(tmp_path, plots):
    data = regression_run()
    before = {name: data[name].copy(deep=True) for name in data.groups()}
    attrs = {name: dict(data[name].attrs) for name in data.groups()}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    settings, figures, backend = dict(matplotlib.rcParams), plt.get_fignums(), matplotlib.get_backend()
    first = report(data, tmp_path / "a.html")
    torch.manual_seed(5)
    second = report(data, tmp_path / "b.html")
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(5).get_state())
    torch.set_rng_state(torch_state)
    assert first == tmp_path / "a.html" and first.read_text() == second.read_text()
    assert list(before) == list(data.groups())
    for name, group in before.items():
        assert group.identical(data[name]) and dict(data[name].attrs) == attrs[name]
    assert torch.equal(torch_state, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_state, np.random.get_state()[1])
    assert dict(matplotlib.rcParams) == settings and plt.get_fignums() == figures
    assert matplotlib.get_backend() == backend


def test_the_template_is_installed():
    assert (importlib.resources.files("bnn") / "templates" / "report.html.jinja").is_file()


# ---- bad input


@pytest.mark.parametrize("given", [{"w": np.ones((4, 5))}, "run.nc", None, az.convert_to_dataset(np.ones((4, 5)))])
def test_what_is_not_data_of_arviz_is_refused(given):
    with pytest.raises(ValueError, match=r"arviz\.from_netcdf"):
        report(given)


def test_a_posterior_is_needed():
    data = bnn.arviz_data.assemble({"prior": {"w": np.ones((1, 5))}})
    with pytest.raises(ValueError, match=r"no group posterior, only \['prior'\].*bnn\.to_arviz\(run\)"):
        report(data)
    renamed = regression_run(drop=GROUPS)
    renamed["posterior"] = renamed["posterior"].rename(draw="sample")
    with pytest.raises(ValueError, match="a report needs chain and draw"):
        report(renamed)
    empty = regression_run(drop=GROUPS)
    empty["posterior"] = empty["posterior"].isel(draw=slice(0, 0))
    with pytest.raises(ValueError, match="has no draws"):
        report(empty)
    words = az.InferenceData(posterior=az.convert_to_dataset(np.ones((2, 5))).astype(str))
    with pytest.raises(ValueError, match="no variable of numbers"):
        report(words)


def test_paths_that_cannot_be_written(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"the folder .*nowhere does not exist; make it"):
        report(regression_run(), tmp_path / "nowhere" / "a.html")
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file"):
        report(regression_run(), tmp_path)


@pytest.mark.parametrize("name", ["jinja2", "matplotlib"])
def test_what_is_not_installed_is_named(monkeypatch, name, tmp_path):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'{name}: pip install "pyro-bnn\[report\]"'):
        report(regression_run(), tmp_path / "a.html")


def test_scores_that_are_not_installed_are_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "scoringrules", None)
    page = render(regression_run())
    assert "Calibration of y" not in headings(page) and "scoringrules is not installed" in page


# ---- the command


def test_the_command(tmp_path, capsys):
    regression_run(drop=("log_likelihood",)).to_netcdf(tmp_path / "run.nc")
    assert main([str(tmp_path / "run.nc"), "--title", "A & B"]) == 0
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    assert capsys.readouterr().out.strip() == str(tmp_path / "run.html")
    assert "<title>A &amp; B</title>" in page
    assert main([str(tmp_path / "run.nc"), "-o", str(tmp_path / "other.html")]) == 0
    assert (tmp_path / "other.html").is_file()
    assert main([str(tmp_path / "none.nc")]) == 1
    (tmp_path / "text.nc").write_text("no data")
    assert main([str(tmp_path / "text.nc")]) == 1
    assert main([str(tmp_path / "run.nc"), "-o", str(tmp_path / "no" / "x.html")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert "there is no file" in said[0] and all(
        line.startswith("python -m bnn.reports: ") for line in (said[0], said[-1])
    )


@pytest.mark.slow
def test_the_command_from_a_shell(tmp_path):
    regression_run(drop=("log_likelihood",)).to_netcdf(tmp_path / "run.nc")
    command = [sys.executable, "-W", "error::RuntimeWarning:runpy", "-m", "bnn.reports", "run.nc"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run.html").is_file() and done.stdout.strip() == "run.html"
    assert "Warning" not in done.stderr
