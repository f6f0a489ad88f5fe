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
    "multimodal.py": ["multimodal.png"],
    "quickstart.py": ["quickstart.nc", "quickstart.png"],
    "uci_regression.py": [],
}


def run(name, *options, **settings):
    command = [sys.executable, str(EXAMPLES / name), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **settings)


def test_no_example_is_forgotten():
    assert sorted(path.name for path in EXAMPLES.glob("*.py")) == sorted(WRITES)


@pytest.mark.parametrize("name", WRITES)
def test_help(name):
    done = run(name, "--help")
    assert done.returncode == 0 and "--seed" in done.stdout


@pytest.mark.parametrize("name", WRITES)
def test_quick(name, tmp_path):
    done = run(name, "--quick", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for file in WRITES[name]:
        assert (tmp_path / file).stat().st_size > 0


def test_quickstart_prints_the_comparison(tmp_path):
    done = run("quickstart.py", "--quick", "--seed", "3", "--folder", str(tmp_path))
    assert done.returncode == 0, done.stderr
    for words in ("MAP net:   test RMSE", "posterior: test RMSE", "accuracy", "R-hat", "ESS", "asked 1", "kinetic"):
        assert words in done.stdout
    idata = az.from_netcdf(tmp_path / "quickstart.nc")
    assert idata.posterior.sizes["chain"] == 8
    assert {"log_likelihood", "sample_stats", "observed_data"} <= set(idata.groups())


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
