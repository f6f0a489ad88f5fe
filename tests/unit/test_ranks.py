"""Several processes: chains or rows shared out, with the results of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc import NUTS

from bnn.guides import TraceNaturalGradient_ELBO
from bnn.kernels import MCMC, SGLD
from bnn.ranks import Ranks
from support import rank_processes

SCRIPT = Path(__file__).resolve().parents[1] / "support" / "rank_checks.py"
TOLERANCE = 2e-5  # of sums in single precision, in another order, over a few dozen steps


def ranks_of(count, *groups, **environment):
    """What each check found on each rank: name -> found by rank."""
    dying = {1} if "death" in groups else ()
    return rank_processes.ranks_of(SCRIPT, count, *groups, dying=dying, **environment)


@pytest.fixture(scope="module")
def two():
    groups = ("data_of_kernels", "data_of_guides", "chains", "errors", "randomness", "inverses", "death")
    return ranks_of(2, *groups, QUICK="1")


def assert_equal_to_one_process(found, count):
    """Means over ranks of shares of the rows are what one process computes, step for step."""
    compared = {name: entries for name, entries in found.items() if "difference" in entries.get(0, {})}
    assert compared and all(len(entries) == count for entries in compared.values())
    for name, entries in compared.items():
        for entry in entries.values():
            assert max(entry["difference"], entry.get("losses", 0.0)) < TOLERANCE, (name, entry)


def test_rows_over_ranks_are_those_of_one_process(two):
    assert_equal_to_one_process(two, 2)


def test_chains_over_ranks_are_in_one_run(two):
    first, second = (two["chains"][rank] for rank in (0, 1))
    assert first == second  # the same draws everywhere, and the same random numbers afterwards
    assert first["shape"] == [5, 15, 4, 3] and first["stats"] == [5, 15]
    assert first["diagnostics"] == first["arviz"] == 5 and first["gradients"] == 5 * 15
    assert first["again"] == 0.0 and first["alike"] == 0  # reproducible, and no chain twice
    draws = two["sequential"][0]["draws"]  # groups of one chain each, which one seed would make the same
    assert draws == two["sequential"][1]["draws"] and len(set(draws)) == 4
    assert two["initial_params"][0]["places"] == pytest.approx([0.0, 1.0, 2.0, 3.0], abs=1e-6)


def test_random_numbers_shared_and_own(two):
    first, second = (two["randomness"][rank] for rank in (0, 1))
    assert first["after"] == second["after"]
    assert len({first["first"], second["first"], first["second"], second["second"]}) == 4
    assert first["owners"] == second["owners"] == [0, 0, 1, 1, 0]


def test_each_matrix_is_factorized_once(two):
    """A net of two layers: two factors each in three steps; K-FAC's pairs of inverses at steps 1, 2, 3."""
    assert sum(two["inverses"][rank]["cholesky"] for rank in (0, 1)) == 3 * 4
    assert sum(two["inverses"][rank]["inverse"] for rank in (0, 1)) == 3 * 2
    assert min(two["inverses"][rank][kind] for rank in (0, 1) for kind in ("cholesky", "inverse")) > 0


MESSAGES = {
    "size": "ValueError: a minibatch of 11 rows of plate 'data' cannot be cut into 2 equal parts",
    "few_chains": "ValueError: 1 chains cannot be shared out over 2 ranks: give num_chains >= 2.",
    "of_all_rows": "NotImplementedError: the mean over ranks of the log joint is",
    "local_latents": "NotImplementedError: sites ['z'] are latent inside the plate 'data', whose rows",
    "no_plate": "NotImplementedError: ranks='data' cuts the rows of a plate, and no plate",
    "same_batches": "RankError: every rank's batches= gives the same rows",
    "passes": "RankError: every rank's batches= gives the same rows",
    "states": "RankError: the states of the ranks differ, which must be the same on all",
    "other_data": "NotImplementedError: the mean over ranks of the log joint is",
}


@pytest.mark.parametrize("name", MESSAGES)
def test_what_cannot_be_shared_is_refused_on_every_rank(two, name):
    for rank in (0, 1):
        assert two[name][rank]["message"].startswith(MESSAGES[name]), two[name][rank]["message"]


def test_a_rank_that_dies_ends_the_others_with_their_draws(two):
    assert list(two["death"]) == [0]
    found = two["death"][0]
    assert found["message"].startswith("RankError: rank 0 of 2 could not average gradients: ")
    assert "Another rank has ended or hangs" in found["message"] and "--max-restarts" in found["message"]
    assert found["draws"] == found["kept"] == 31  # the hook of rank 1 ended it after its draw number 30


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_every_kernel_and_guide_over_ranks(count):
    found = ranks_of(count, "data_of_kernels", "data_of_guides", "given_rows")
    assert_equal_to_one_process(found, count)
    assert found["sampled_labels"][0]["finite"]


@pytest.mark.slow
def test_sequential_chains_do_not_depend_on_the_number_of_ranks():
    draws = [ranks_of(count, "chains")["sequential"][0]["draws"] for count in (1, 2, 4)]
    assert draws[0] == pytest.approx(draws[1], rel=1e-4) and draws[0] == pytest.approx(draws[2], rel=1e-4)


@pytest.mark.slow
def test_torchrun_restarts_from_the_checkpoint(tmp_path):
    """The second rank dies in the first attempt; the second one goes on to the end of the uninterrupted training."""
    script = tmp_path / "train.py"
    script.write_text(TRAINING)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    losses = {}
    for dies in ("never", "once"):
        folder = tmp_path / dies
        folder.mkdir()
        result = subprocess.run(
            [*command, "--max-restarts=1", str(script), str(folder), dies],
            env={**os.environ, "PYTHONPATH": str(SCRIPT.parents[1]), "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert result.returncode == 0, result.stderr[-3000:]
        losses[dies] = [float(line) for line in (folder / "losses.txt").read_text().split()]
    assert len(losses["once"]) == 10 and losses["once"] == pytest.approx(losses["never"], rel=1e-5)


TRAINING = """
import os, sys, torch, pyro, bnn
from pathlib import Path
from pyro.infer import SVI
from bnn.guides import AutoMatrixNormal, NaturalGradientDescent, TraceNaturalGradient_ELBO
from support.rank_checks import X, Y, net
torch.set_num_threads(1)
folder, dies, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
pyro.set_rng_seed(1)
svi = SVI(net, AutoMatrixNormal(net), NaturalGradientDescent(), TraceNaturalGradient_ELBO("ggn", ranks="data"))
path, losses = folder / f"rank{rank}.pt", []
if path.exists():
    losses = bnn.restore(svi, path, model_args=(X, Y))["losses"]
for step in range(len(losses), 10):
    losses.append(svi.step(X, Y))
    if step == 4:
        bnn.checkpoint(svi, path, notes={"losses": losses})
        torch.distributed.barrier()
    if step == 6 and rank == 1 and dies == "once" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os._exit(1)
if rank == 0:
    (folder / "losses.txt").write_text(" ".join(map(str, losses)))
torch.distributed.destroy_process_group()
"""


# ---- one process


def model():
    pyro.sample("z", dist.Normal(0.0, 1.0))


def test_without_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match=r"no process group and RANK, WORLD_SIZE, .* torchrun --nproc-per-node=K"):
        Ranks()
    with pytest.raises(RuntimeError, match="leave ranks= out"):
        MCMC(SGLD(model, step_size=0.1), 10, ranks="chains")
    with pytest.raises(RuntimeError, match="leave ranks= out"):
        TraceNaturalGradient_ELBO(ranks="data")


def test_settings():
    with pytest.raises(ValueError, match="ranks='weights' is unknown: give 'chains', 'data' or None"):
        MCMC(SGLD(model, step_size=0.1), 10, ranks="weights")
    with pytest.raises(ValueError, match="chain_method='parallel' starts processes of its own"):
        MCMC(SGLD(model, step_size=0.1), 10, num_chains=2, chain_method="parallel", ranks="chains")
    with pytest.raises(NotImplementedError, match="ranks= is for the kernels of bnn.kernels"):
        MCMC(NUTS(model), 10, ranks="chains")
    with pytest.raises(ValueError, match="ranks='chains' is unknown: give 'data' or None"):
        TraceNaturalGradient_ELBO(ranks="chains")
    assert torch.distributed.is_available()
