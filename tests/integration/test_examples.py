"""Every example runs by its command line, and writes what it promises."""

import re
import subprocess
import sys
from pathlib import Path

import arviz as az
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

# Example -> files that it writes.
WRITES = {
    "cold_posterior.py": ["cold_posterior.png"],
    "compare_posteriors.py": ["compare_posteriors.png"],
    "digits.py": ["digits.html", "digits.nc", "digits.png"],
    "gap_regression.py": ["gap_regression.png"],
    "long_run.py": ["long_run.zarr/zarr.json"],
    "loss_landscape.py": ["loss_landscape.png"],
    "multimodal.py": ["multimodal.png"],
    "quickstart.py": ["quickstart.html", "quickstart.nc", "quickstart.png"],
    "uci_regression.py": [],
}


def run(name, *options, **settings):
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)


def test_no_example_is_forgotten():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(WRITES)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITES)
def test_help(name):
    done = run(name, "--help")
    assert done.returncode == 0 and "--seed" in done.stdout


@pytest.fixture
def quick(tmp_path):
    """Runs an example quickly, sees that it writes what it promises, and gives what it printed and the folder."""

    def finished(name):
        done = run(name, "--quick", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        for file in WRITES[name]:
            assert (tmp_path / file).stat().st_size > 0
        return done, tmp_path

    return finished


# Those not named here have a test of their own.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["compare_posteriors.py", "digits.py", "gap_regression.py", "multimodal.py", "uci_regression.py"]
)
def test_quick(name, quick):
    quick(name)


@pytest.mark.slow
def test_a_small_momentum_scale_is_a_cold_posterior(quick):
    """At T = 1 the norm bursts to its equipartition value; β = 0.001 holds it where T = 0.08 does, and says so."""
    done, _ = quick("cold_posterior.py")
    columns = r"^(.+?) {2,}([\d.]+) +([\d.]+) +(-?[\d.]+)( +[\d.]+)? +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$"
    table = {(r[0], float(r[1])): [float(v or "nan") for v in r[2:]] for r in re.findall(columns, done.stdout, re.M)}
    assert len(table) == 5
    asked, cold = ("SGHMC", 1.0), ("norm-adjusted α=3 β=0.001", 1.0)
    kinetic, positions, _, norm, *_ = table[asked]
    # 4 chains of 1930 coordinates over some ten relaxation times: a standard error of about 0.5 %.
    assert abs(kinetic - 1.0) < 0.03 and abs(positions - 1.0) < 0.03
    assert 1.0 < norm < 1.2  # more than ηd T, by the pull of the likelihood
    assert abs(table["norm-adjusted α=3 β=αT", 1.0][3] / norm - 1.0) < 0.05
    _, positions, implied, norm, *_ = table[cold]
    # The law of the steps at k = 1/η: 0.0750 in the last step before momenta are drawn, less in those before it.
    assert implied == pytest.approx(0.0744, abs=2e-4)
    # In so few steps the norm is still some 4 % low and its temperature 8 %, over seeds give or take 1 %.
    assert abs(positions / implied - 1.0) < 0.2 and norm < 0.3
    assert abs(norm / table["SGHMC", 0.07497][3] - 1.0) < 0.06
    assert "sampled at 0.0749 in place of 1" in done.stdout


@pytest.mark.slow
def test_modes_are_connected_by_a_curve(quick):
    """Of the straight line, the aligned one and the trained curve each has a far lower barrier than the one before."""
    done, _ = quick("loss_landscape.py")
    rows = re.findall(r"^(line|line, aligned|Bezier curve) +([\d.]+) +([\d.]+) +([\d.]+) +([\d.]+)$", done.stdout, re.M)
    table = {name: [float(value) for value in values] for name, *values in rows}
    barriers = [table[name][0] for name in ("line", "line, aligned", "Bezier curve")]
    assert barriers[0] > 10 * barriers[1] > 10 * barriers[2] and barriers[0] > 100
    assert table["line"][1] < 0.8 and table["Bezier curve"][1] > 0.95
    assert table["Bezier curve"][3] < 0.5 * table["line"][3]


@pytest.mark.slow
def test_quickstart_prints_the_comparison(quick):
    done, folder = quick("quickstart.py")
    for words in ("MAP net:   test RMSE", "posterior: test RMSE", "accuracy", "R-hat", "ESS", "asked 1", "kinetic"):
        assert words in done.stdout
    idata = az.from_netcdf(folder / "quickstart.nc")
    assert idata.posterior.sizes["chain"] == 8
    assert {"log_likelihood", "sample_stats", "observed_data"} <= set(idata.groups())


@pytest.mark.slow
def test_a_long_run_is_killed_and_goes_on(quick, tmp_path):
    """SIGKILL at some moment of the run; the next one says where it goes on."""
    for seconds in ("8", "16", "32", "64"):
        killed = run("long_run.py", "--quick", "--fresh", "--kill-after", seconds, cwd=tmp_path)
        if (tmp_path / "long_run.zarr").exists():
            break
    assert "Starts long_run.zarr, with seed 0." in killed.stdout
    done, _ = quick("long_run.py")
    assert re.search(r"^Resumes long_run\.zarr: \d+ of 300 draws", done.stdout, re.M)
    assert "1200 draws of the net" in done.stdout


@pytest.mark.slow
def test_a_seed_fixes_the_run(tmp_path):
    """Two runs with one seed print the same scores, but for the seconds."""

    def scores(folder):
        done = run("quickstart.py", "--quick", "--seed", "5", "--folder", str(tmp_path / folder))
        assert done.returncode == 0, done.stderr
        return [line for line in done.stdout.splitlines() if line.startswith("  ")]

    first = scores("a")
    assert first == scores("b") and len(first) >= 8


@pytest.mark.slow
def test_the_readme_example(tmp_path):
    """README's Python runs as it stands, near the temperature that it asks for."""
    readme = (EXAMPLES.parent / "README.md").read_text()
    code = "\n".join(re.findall(r"```python\n(.*?)```", readme, flags=re.DOTALL))
    script = tmp_path / "readme.py"
    script.write_text("import pyro\npyro.set_rng_seed(0)\n" + code)
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    kinetic = float(re.search(r"kinetic ([\d.]+)", done.stdout)[1])
    assert abs(kinetic - 1) < 0.1
    assert done.stdout.count("elpd_loo") == 2  # of the chains, and of the guide
