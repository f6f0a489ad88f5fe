"""The conversion to ArviZ without torch, for ArviZ 0.x and 1.x alike.

The module is loaded from its file, since ``import bnn`` needs torch, which the environment of ArviZ 1.x may lack.
"""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

# ArviZ 0.x announces 1.x once a day, when it is imported.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*ArviZ is undergoing a major refactor:FutureWarning")

FILE = Path(__file__).resolve().parents[2] / "bnn" / "arviz_data.py"
CHAINS, DRAWS, ROWS = 12, 40, 5


def load():
    spec = importlib.util.spec_from_file_location("arviz_data_without_torch", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def arviz_data():
    return load()


@pytest.fixture
def az():
    return pytest.importorskip("arviz")


def run_of(samples, *, stats=None, divergences=None, temperature=1.0):
    """What ``to_arviz`` reads of a finished run."""
    entries = [{"divergences": found} for found in divergences] if divergences is not None else []
    run = SimpleNamespace(
        get_samples=lambda group_by_chain: samples,
        kernel=SimpleNamespace(temperature=temperature, model=None),
        warmup_steps=7,
        _diagnostics=entries,
    )
    if stats is not None:
        run.sample_stats = stats
    return run


def draws(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(CHAINS, DRAWS, *shape)).astype("float32")


def group_names(data):
    return {name.strip("/") for name in data.groups()} if callable(data.groups) else set(data.children)


def test_loading_needs_neither_torch_nor_pyro():
    before = set(sys.modules)
    load()
    new = {name.split(".")[0] for name in set(sys.modules) - before}
    assert not new & {"torch", "pyro", "bnn", "arviz"}


def test_every_group_and_shape(arviz_data, az):
    log_likelihood = -(draws(ROWS) ** 2)
    data = arviz_data.to_arviz(
        run_of(
            {"net.weight": draws(3, 2), "sigma": draws()}, stats={"energy": draws(), "temperature": draws() * 0 + 1}
        ),
        log_likelihood={"obs": log_likelihood},
        posterior_predictive={"obs": draws(ROWS).reshape(CHAINS * DRAWS, ROWS)},
        observed_data={"obs": np.arange(5.0)},
        constant_data={"x": np.ones((ROWS, 2))},
        predictions={"obs": draws(3)},
        predictions_constant_data={"x": np.ones((3, 2))},
        prior={"sigma": np.ones(30), "obs": np.ones((30, ROWS))},
        dims={"obs": ["row"], "x": ["row", "feature"]},
        pred_dims={"obs": ["new_row"], "x": ["new_row", "feature"]},
        coords={"row": list("abcde")},
    )
    assert group_names(data) == {
        "posterior", "sample_stats", "log_likelihood", "posterior_predictive", "observed_data", "constant_data",
        "predictions", "predictions_constant_data", "prior", "prior_predictive",
    }  # fmt: skip
    posterior = data["posterior"]
    assert posterior["net.weight"].dims == ("chain", "draw", "net.weight_dim_0", "net.weight_dim_1")
    assert posterior["net.weight"].shape == (CHAINS, DRAWS, 3, 2)
    assert posterior["sigma"].shape == (CHAINS, DRAWS)
    np.testing.assert_array_equal(posterior["chain"], np.arange(CHAINS))
    np.testing.assert_array_equal(data["sample_stats"]["lp"], -data["sample_stats"]["energy"])
    for group in ("log_likelihood", "posterior_predictive"):
        assert data[group]["obs"].dims == ("chain", "draw", "row")
        assert list(data[group]["row"].values) == list("abcde")
    np.testing.assert_array_equal(data["log_likelihood"]["obs"], log_likelihood)
    np.testing.assert_array_equal(data["posterior_predictive"]["obs"], draws(ROWS))
    assert data["observed_data"]["obs"].dims == ("row",)
    assert data["constant_data"]["x"].dims == ("row", "feature")
    assert data["predictions"]["obs"].dims == ("chain", "draw", "new_row")
    assert data["predictions_constant_data"]["x"].dims == ("new_row", "feature")
    assert data["prior"]["sigma"].shape == (1, 30)
    assert data["prior_predictive"]["obs"].shape == (1, 30, ROWS)


def test_attributes(arviz_data, az):
    data = arviz_data.to_arviz(run_of({"z": draws()}, temperature=0.5), thin=3)
    attrs = data["posterior"].attrs
    assert attrs["temperature"] == 0.5
    assert attrs["tuning_steps"] == 7
    assert attrs["thin"] == 3
    assert attrs["kernel"] == "SimpleNamespace"
    assert attrs["inference_library"] == "pyro"
    schedule = arviz_data.to_arviz(run_of({"z": draws()}, temperature=[1, 2]))
    assert schedule["posterior"].attrs["temperature"] == "[1, 2]"


def test_statistics_per_site(arviz_data, az):
    run = run_of({"z": draws()}, stats={"energy": draws(), "site_kinetic_temperature": draws(2)})
    run.run_facts = {"site_name": ["a", "b"], "site_size": [3, 4], "sampling_time": 1.5}
    stats = arviz_data.to_arviz(run, thin=2)["sample_stats"]
    assert stats["site_kinetic_temperature"].dims == ("chain", "draw", "site")
    assert stats["site"].values.tolist() == ["a", "b"]
    np.testing.assert_array_equal(stats["site_kinetic_temperature"], draws(2)[:, ::2])
    assert stats.attrs["site_size"] == [3, 4] and stats.attrs["sampling_time"] == 1.5
    assert stats["energy"].dims == ("chain", "draw")


def test_divergences_stand_in_their_own_chain_beyond_ten_chains(arviz_data, az):
    divergences = [[] for _ in range(CHAINS)]
    divergences[2], divergences[10] = [3, 39, 40], [0]  # the 40th draw was cut off by an interrupt
    diverging = arviz_data.to_arviz(run_of({"z": draws()}, divergences=divergences))["sample_stats"]["diverging"]
    assert diverging.dtype == bool
    np.testing.assert_array_equal(np.argwhere(diverging.values), [[2, 3], [2, 39], [10, 0]])


def test_no_statistics_no_group(arviz_data, az):
    assert group_names(arviz_data.to_arviz(run_of({"z": draws()}))) == {"posterior"}


@pytest.mark.parametrize("given", [slice(None), slice(None, None, 7)], ids=["all draws", "thinned draws"])
def test_thinning_holds_for_every_group(arviz_data, az, given):
    data = arviz_data.to_arviz(
        run_of({"z": draws()}, stats={"energy": draws(seed=1)}),
        log_likelihood={"obs": draws(ROWS, seed=2)[:, given]},
        thin=7,
    )
    np.testing.assert_array_equal(data["posterior"]["z"], draws()[:, ::7])
    np.testing.assert_array_equal(data["sample_stats"]["energy"], draws(seed=1)[:, ::7])
    np.testing.assert_array_equal(data["log_likelihood"]["obs"], draws(ROWS, seed=2)[:, ::7])


def test_few_draws_of_many_chains_warn_of_nothing(arviz_data, az):
    samples = {"z": draws()[:, :2]}
    assert arviz_data.to_arviz(run_of(samples))["posterior"]["z"].shape == (CHAINS, 2)


def test_summary_and_loo_run(arviz_data, az):
    data = arviz_data.to_arviz(
        run_of({"z": draws()}, stats={"energy": draws()}), log_likelihood={"obs": 0.1 * draws(ROWS, seed=1)}
    )
    assert len(az.summary(data)) == 1
    loo = az.loo(data)
    assert np.isfinite(getattr(loo, "elpd", None) or loo["elpd_loo"])


@pytest.mark.parametrize("engine", ["h5netcdf", "netcdf4"])
def test_round_trip_through_a_file(arviz_data, az, tmp_path, engine):
    pytest.importorskip({"netcdf4": "netCDF4"}.get(engine, engine))
    pytest.importorskip("h5py" if engine == "h5netcdf" else "netCDF4")
    data = arviz_data.to_arviz(
        run_of({"net.weight": draws(2)}, divergences=[[1]] * CHAINS), observed_data={"obs": np.arange(ROWS)}
    )
    path = tmp_path / "run.nc"
    data.to_netcdf(path, engine=engine)
    back = az.from_netcdf(path)
    np.testing.assert_array_equal(back["posterior"]["net.weight"], data["posterior"]["net.weight"])
    np.testing.assert_array_equal(back["sample_stats"]["diverging"], data["sample_stats"]["diverging"])
    assert back["posterior"].attrs["tuning_steps"] == 7
    assert group_names(back) == {"posterior", "sample_stats", "observed_data"}


@pytest.mark.parametrize("thin", [0, -1, 1.5, True])
def test_thin_must_be_a_positive_whole_number(arviz_data, thin):
    with pytest.raises(ValueError, match="every thin-th draw"):
        arviz_data.to_arviz(run_of({"z": draws()}), thin=thin)


def test_given_variables_must_fit_the_draws(arviz_data):
    with pytest.raises(ValueError, match=r"'obs' of log_likelihood has shape \(3, 4\).*\(12, 40\)"):
        arviz_data.to_arviz(run_of({"z": draws()}), log_likelihood={"obs": np.zeros((3, 4))})


def test_what_is_no_finished_run_is_refused(arviz_data):
    with pytest.raises(ValueError, match="posterior is dict; give a finished run"):
        arviz_data.to_arviz({"z": draws()})
    run = run_of({"z": draws()})
    run._samples = None
    with pytest.raises(RuntimeError, match="no draws yet"):
        arviz_data.to_arviz(run)
    with pytest.raises(ValueError, match="kept no sites"):
        arviz_data.to_arviz(run_of({}))


def test_a_group_of_the_model_needs_a_model(arviz_data):
    with pytest.raises(ValueError, match="log_likelihood was asked for, but the kernel has no model"):
        arviz_data.to_arviz(run_of({"z": draws()}), log_likelihood=True)
