"""What every test starts from: the installed package, one thread, Pyro's seed and an empty parameter store."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The checkout's own bnn/ would shadow the installed package, in which bnn.kernels is found, so the checkout leaves
# sys.path before anything imports bnn.
ROOT = Path(__file__).resolve().parents[1]
sys.path[:] = [entry for entry in sys.path if Path(entry or os.curdir).resolve() != ROOT]

# Read once by the libraries and inherited by spawned processes, hence set before torch and matplotlib are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pyro  # noqa: E402
import torch  # noqa: E402

SEED = 20


def pytest_addoption(parser: pytest.Parser) -> None:
    """The folder of reference posteriors: ``--posteriordb FOLDER``, or the environment's ``POSTERIORDB``."""
    parser.addoption("--posteriordb", type=Path, default=os.environ.get("POSTERIORDB"), help="reference posteriors")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Spare the garbage collector what was imported: it would walk all of it again and again, 4 % of the time."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked ``cuda`` where there is no CUDA device."""
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Clear what tests share inside one process, and put back the defaults a test may change."""
    pyro.clear_param_store()
    pyro.set_rng_seed(SEED)
    torch.set_num_threads(1)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)
    pyro.clear_param_store()


@pytest.fixture
def double() -> None:
    """Double precision: ``pytestmark = pytest.mark.usefixtures("double")`` for a file."""
    torch.set_default_dtype(torch.float64)
