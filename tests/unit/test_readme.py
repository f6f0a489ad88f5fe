"""README's commands are the ones that continuous integration runs."""

import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
CI = ROOT / ".ci" / "run"
FENCE = re.compile(r"^```(?:\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    """The lines in the code blocks of README's section "Run it"."""
    section = README.read_text(encoding="utf-8").split("\n## Run it\n")[1].split("\n## ")[0]
    return [line for block in FENCE.findall(section) for line in block.splitlines() if line.strip()]


def test_run_it_has_two_commands_of_one_line() -> None:
    quickstart, tests = commands()
    for command in (quickstart, tests):
        assert command.startswith("python3 -m venv .venv && "), "a command creates its own environment"
        assert "-c constraints.txt" in command, "a command installs the tested versions"
        assert not command.endswith("\\"), "a command is one line"
    assert quickstart.endswith(" examples/quickstart.py")
    assert tests.endswith(" -m pytest -n 2")


@pytest.mark.parametrize("which", [0, 1], ids=["quickstart", "tests"])
def test_ci_runs_the_command_of_the_readme(which: int) -> None:
    lines = [line.strip() for line in CI.read_text(encoding="utf-8").splitlines()]
    assert lines.count(commands()[which]) == 1, f".ci/run must have this line once:\n{commands()[which]}"


def test_what_the_commands_name_exists() -> None:
    assert (ROOT / "examples" / "quickstart.py").is_file()
    assert (ROOT / "constraints.txt").is_file()
    assert os.access(CI, os.X_OK), ".ci/run is executable"
