"""Which tier runs a program: the asked one, or the faster where compiling pays, remembered from run to run."""

import json

import pytest
import torch

from bnn import tiers, timings
from bnn.recording import record

X = torch.linspace(0, 1, 50)


@pytest.fixture
def graph():
    return record(lambda x: ((x.exp() * x).cumsum(0),), [X])


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(timings, "cache_folder", lambda: tmp_path)
    return tmp_path


def seconds(monkeypatch, **by_tier):
    """Pretend that the tiers take these times."""
    monkeypatch.setattr(tiers, "_seconds", lambda program, inputs: by_tier[program.tier])


def test_unknown_tier():
    with pytest.raises(
        ValueError, match="'jit' is not a tier: choose one of 'auto', 'inductor', 'fx', 'cuda_graph', 'handlers'"
    ):
        tiers.check_tier("jit")


def test_asked_tiers(graph):
    for tier in ("fx", "inductor"):
        program = tiers.choose(graph, [X], tier, calls=3)
        assert program.tier == tier
        torch.testing.assert_close(program(X)[0], (X.exp() * X).cumsum(0))


def test_a_short_run_is_never_compiled(graph, monkeypatch):
    seconds(monkeypatch, fx=1e-3)
    monkeypatch.setattr(tiers, "run_inductor", lambda *_: pytest.fail("compiled"))
    assert tiers.choose(graph, [X], "auto", calls=int(tiers.SECONDS_TO_REPAY / 1e-3) - 1).tier == "fx"
    assert tiers.choose(graph, [X], "auto").tier == "fx"


def test_a_long_run_takes_the_faster(graph, monkeypatch):
    seconds(monkeypatch, fx=2e-3, inductor=1e-3)
    assert tiers.choose(graph, [X], "auto", calls=10**6).tier == "inductor"


def test_a_long_run_keeps_fx_where_compiling_loses(graph, monkeypatch):
    seconds(monkeypatch, fx=1e-3, inductor=2e-3)
    assert tiers.choose(graph, [X], "auto", calls=10**6).tier == "fx"


def test_the_choice_is_remembered(graph, monkeypatch, folder):
    seconds(monkeypatch, fx=2e-3, inductor=1e-3)
    assert tiers.choose(graph, [X], "auto", calls=10**6).tier == "inductor"
    seconds(monkeypatch, fx=1e-9, inductor=5.0)  # another measurement would decide otherwise
    assert tiers.choose(graph, [X], "auto", calls=10**6).tier == "inductor"
    (file,) = folder.glob("bnn-tier-*.json")
    assert json.loads(file.read_text()) == {"fx": 2e-3, "inductor": 1e-3}


def test_another_program_is_timed_anew(graph, monkeypatch):
    seconds(monkeypatch, fx=2e-3, inductor=1e-3)
    tiers.choose(graph, [X], "auto", calls=10**6)
    seconds(monkeypatch, fx=1e-3, inductor=2e-3)
    other = record(lambda x: (x.exp(),), [X])
    assert tiers.choose(other, [X], "auto", calls=10**6).tier == "fx"


def test_without_a_compiler(graph, monkeypatch):
    def no_compiler(*_):
        raise RuntimeError("inductor could not compile the recorded program: no C++ compiler")

    monkeypatch.setattr(tiers, "run_inductor", no_compiler)
    seconds(monkeypatch, fx=1e-3)
    assert tiers.choose(graph, [X], "auto", calls=10**6).tier == "fx"
    with pytest.raises(RuntimeError, match="could not compile"):
        tiers.choose(graph, [X], "inductor")


def test_a_broken_memory_is_ignored(graph, monkeypatch, folder):
    seconds(monkeypatch, fx=2e-3, inductor=1e-3)
    tiers.choose(graph, [X], "auto", calls=10**6)
    (file,) = folder.glob("bnn-tier-*.json")
    file.write_text("{")
    assert tiers.choose(graph, [X], "auto", calls=10**6).tier == "inductor"


def test_timing_leaves_the_random_numbers_alone():
    graph = record(lambda x: (x + torch.rand(50),), [X])
    torch.manual_seed(4)
    tiers.choose(graph, [X], "auto", calls=10**9)
    after = torch.rand(3)
    torch.manual_seed(4)
    torch.testing.assert_close(after, torch.rand(3), rtol=0, atol=0)


def test_what_was_decided_is_kept_to(graph, monkeypatch):
    """A run that is resumed takes the tier that it began with, however long it is to be now."""
    monkeypatch.setattr(tiers, "run_inductor", lambda *_: pytest.fail("compiled"))
    seconds(monkeypatch, fx=1e-3, inductor=1e-4)
    decided: dict[str, str] = {}
    assert tiers.choose(graph, [X], "auto", 3, decided).tier == "fx"
    assert list(decided.values()) == ["fx"]
    assert tiers.choose(graph, [X], "auto", 10**9, decided).tier == "fx"
