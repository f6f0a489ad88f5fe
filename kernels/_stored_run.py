"""One run of the runner on a store: whether it may be resumed, from where, and what the store says of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from bnn.arviz_data import attributes_of
from bnn.draw_store import DrawStore
from bnn.fingerprint import differences, of_model, of_settings, of_versions
from bnn.kernels._ranks import RankDraws, Sharing
from bnn.kernels._run_state import restore, state_of
from bnn.kernels._stored_draws import StoredDraws
from bnn.randomness import random_state, set_random_state
from bnn.saved_state import DamagedState, dumps, loads
from bnn.store import BLOCK_BYTES, BLOCK_DRAWS, Store, make_store, read_root
from bnn.store_progress import GRADIENTS, SECONDS
from bnn.store_writer import BackgroundWriter

# Attributes of kernels that are no settings.
NO_SETTINGS = frozenset(
    ("model", "batches", "transforms", "num_chains", "num_samples", "gradients_per_step", "noises_per_step", "ranks")
)

# What adds up over the parts of a run.
COST = (*SECONDS, GRADIENTS)


def store_of(store: Any, resume: bool, is_served: bool) -> Store | None:
    """The setting ``store=`` of a runner.

    :param is_served: whether runs of this kind can go to a store.
    :raises ValueError: for what names no store, or ``resume`` without one.
    :raises NotImplementedError: for runs that cannot.
    """
    if store is None:
        if resume:
            raise ValueError("resume=True needs a store to resume: give store='run.zarr'.")
        return None
    if not is_served:
        raise NotImplementedError(
            "store= is for the kernels of bnn.kernels with chain_method='vectorized' or 'sequential': Pyro's own "
            "kernels and chains in processes of their own do not say what they go on from. Use one of these, or keep "
            "the draws by bnn.to_arviz(mcmc).to_netcdf(...) after the run."
        )
    return store if isinstance(store, Store) else Store(store)


class StoredRun:
    """A run that goes to a store.

    :param mcmc: the runner, with its settings.
    :param options: the store.
    :param resume: whether to go on with a store that exists.
    :param sharing: which processes write to it.
    :raises ValueError: if there is a store and ``resume`` is False.
    :ivar known: attributes of the store, if there was one before.
    """

    def __init__(self, mcmc: Any, options: Store, resume: bool, sharing: Sharing) -> None:
        self.mcmc, self.options, self.sharing = mcmc, options, sharing
        self.store: DrawStore | None = None
        self.thread: BackgroundWriter | None = None
        exists = sharing.first(options.exists)
        if exists and not resume:
            raise ValueError(
                f"{options.folder} exists: give resume=True to go on with it, or another path. Nothing is overwritten."
            )
        self.kept = math.ceil(mcmc.num_samples / options.thinning)  # draws of each chain
        self.known: dict[str, Any] = {}
        self._start: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        self._before: dict[str, Any] = {}  # what earlier parts have cost
        self._writers: list[int] = []
        self._writer = 0
        self._model: dict[str, str] = {}
        if exists:
            self.known = read_root(options.path)["attributes"]
            self._check_run(self.known)

    # ---- one part: chains that move together, and what this process writes of them

    def start(self, groups: Sequence[range]) -> list[tuple[int, range]]:
        """The parts of this process, each with its number."""
        own = self.sharing.start(groups, self.known)
        self._writers = [writer for writer, _ in own]
        if self.known:
            self._open()
        return own

    def before_setup(self, writer: int, chains: range) -> RankDraws | None:
        """Set random numbers and tiers as they were when a part was set up first; its draws if they are whole."""
        mcmc = self.mcmc
        self._writer = writer
        self._before = {name: mcmc._facts[name] for name in COST}
        saved = self._saved = self._checkpoint(writer, chains) if self.known else None
        if saved is None:
            self._start = random_state()
            return None
        mcmc._facts.update({name: self._before[name] + saved["facts"][name] for name in COST})
        is_whole = saved["diagnostics"] is not None and saved["num_samples"] == mcmc.num_samples
        if is_whole and writer != self._writers[-1]:  # which is set up all the same, to look at it
            set_random_state(saved["random"])
            return RankDraws(saved["count"], False, saved["diagnostics"])
        self._start = saved["start"]
        set_random_state(self._start)
        mcmc.kernel._decided = dict(saved["decided"])
        return None

    def draws(self, chains: range) -> StoredDraws:
        """What takes in the draws of the part: from where it stood, if it is resumed."""
        kernel, saved = self.mcmc.kernel, self._saved
        model = of_model(kernel.potential)
        if self.store is None:
            self._make(chains, model)
        assert self.store is not None and self.thread is not None
        # Rows of this rank's own are not those of rank 0, whose model the store knows.
        then = saved["model"] if saved else self.store.attributes["model"] if self.sharing.writes else model
        changed = differences(then, model)
        if changed:
            raise ValueError(
                f"{self.options.folder} holds a run of another model or other data: {'; '.join(changed)}. Give the "
                "same ones, or another path."
            )
        self._model, self._saved = model, None
        draws = StoredDraws(kernel, chains, self.mcmc._save, self.store, self.thread, self.sharing, self._made)
        if saved is None:
            draws.checkpoint()  # a start that can be repeated
            return draws
        try:
            restore(kernel, saved["state"])
            self.sharing.restore(saved["own"])
        except DamagedState:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the state in {self.options.folder} cannot be read by this version of the program "
                f"({type(error).__name__}: {error}). Its draws can; to draw more, give another path."
            ) from error
        set_random_state(saved["random"])
        draws.take_up(saved["done"], saved["count"])
        return draws

    def close(self) -> None:
        """End the writer and let others write."""
        if self.thread is not None:
            self.thread.close()
        if self.store is not None:
            self.store.close()
        self.mcmc.kernel._decided = {}

    # ---- opening

    def _make(self, chains: range, model: Mapping[str, str]) -> None:
        potential = self.mcmc.kernel.potential
        size = len(chains) * potential.dim * torch.finfo(potential.dtype).bits // 8
        block = max(1, min(BLOCK_DRAWS, BLOCK_BYTES // size))
        attributes = {**self._attributes(), **self.sharing.attributes, "model": model}
        self.sharing.first(lambda: make_store(self.options, attributes, block))
        self._open()

    def _open(self) -> None:
        self.store = DrawStore(self.options, self.kept, self._writers, self.sharing.name != "None")
        self.thread = BackgroundWriter(self.options.folder)

    def _checkpoint(self, writer: int, chains: range) -> dict[str, Any] | None:
        """The last checkpoint that all ranks of these chains have, of draws that can be read; None if none is yet."""
        store, sharing = self.store, self.sharing
        assert store is not None
        contents = store.checkpoints(writer)
        why: list[str] = []
        usable = self._usable(contents, chains, why)
        mine = list(usable if sharing.for_kernel else islice(usable, 1))
        everywhere = sharing.of_all((bool(contents), [saved["done"] for _, saved in mine]))
        if not all(begun for begun, _ in everywhere):
            store.start_anew(writer)
            self._forget(chains, 0)
            return None
        common = set.intersection(*(set(positions) for _, positions in everywhere))
        if not common:
            raise RuntimeError(
                f"{store.path} cannot be resumed: {'; '.join(why) or 'the states of other ranks cannot be read'}, and "
                "no checkpoint is left before that. What can be read is in bnn.to_arviz(path); bring the file back "
                "from a copy, or start anew under another path."
            )
        number, saved = next(one for one in mine if one[1]["done"] == max(common))
        if number and why:
            warnings.warn(
                f"{store.path}: {why[0]}, so the run goes back to the checkpoint before, at {saved['count']} draws, "
                "and draws again from there.",
                RuntimeWarning,
                stacklevel=5,
            )
        self._check_size(saved)
        if number:
            store.go_back(writer)
        self._forget(chains, saved["count"])
        return saved

    def _usable(self, contents: Sequence[bytes], chains: range, why: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Checkpoints that can be gone on from, the last first; ``why`` says what is wrong with others."""
        assert self.store is not None
        for number, content in enumerate(contents):
            try:
                saved: dict[str, Any] = loads(content)
            except DamagedState as error:
                why.append(f"its last checkpoint cannot be read ({error})")
                continue
            bad = self.store.first_damaged(chains, saved["count"]) if self.sharing.writes else None
            if bad is None:
                yield number, saved
            else:
                name, chain, draw = bad
                why.append(f"draws of chain {chain} from number {draw} on are damaged or missing in {name}")

    def _forget(self, chains: range, draws: int) -> None:
        if self.sharing.writes and self.store is not None:
            self.store.forget(chains, draws)

    # ---- what must be the same

    def _attributes(self) -> dict[str, Any]:
        mcmc = self.mcmc
        return {
            "kernel": type(mcmc.kernel).__name__,
            "settings": of_settings(mcmc.kernel, NO_SETTINGS),
            "run": {
                "num_chains": str(mcmc.num_chains),
                "warmup_steps": str(mcmc.warmup_steps),
                "chain_method": mcmc.chain_method,
                "ranks": self.sharing.name,
                "save_params": str(mcmc._save),
                "thinning": str(self.options.thinning),
                "dtype": str(self.options.dtype),
            },
            "in_turn": mcmc.chain_method == "sequential",
            "versions": of_versions(),
            "seed": torch.initial_seed(),
        }

    def _check_run(self, then: Mapping[str, Any]) -> None:
        if self.mcmc.has_default_warmup:
            self.mcmc.warmup_steps = int(then["run"]["warmup_steps"])
        now = self._attributes()
        changed = differences({"kernel": then["kernel"]}, {"kernel": now["kernel"]})
        changed += differences(then["run"], now["run"])
        changed += differences(then["settings"], now["settings"]) if not changed else []
        if changed:
            raise ValueError(
                f"{self.options.folder} holds a run of other settings: {'; '.join(changed)}. Give the same ones to go "
                "on with it, or another path."
            )
        changed = differences(then["versions"], now["versions"])
        if changed:
            warnings.warn(
                f"the run in {self.options.folder} is resumed with other versions: {'; '.join(changed)}. The chains go "
                "on from where they stand, perhaps not bit for bit as they would have.",
                RuntimeWarning,
                stacklevel=5,
            )

    def _check_size(self, saved: Mapping[str, Any]) -> None:
        before, now = saved["num_samples"], self.mcmc.num_samples
        if now < before and saved["count"] > self.kept:
            raise ValueError(
                f"{self.options.folder} holds {saved['count']} draws of each chain already, and num_samples is {now}: "
                "give at least as many."
            )
        in_turn = self.mcmc.chain_method == "sequential" and self.mcmc.num_chains > 1
        if now != before and in_turn and self.sharing.name != "chains":  # whose random numbers follow on
            raise ValueError(
                f"num_samples was {before} and is {now}: of chains that run one after another it cannot change. Use "
                "another path, or chain_method='vectorized' from the start."
            )

    # ---- what goes with a checkpoint

    def _made(self, draws: StoredDraws) -> Callable[[], None]:
        """A checkpoint, and how to write it."""
        mcmc, store, writer, count = self.mcmc, self.store, self._writer, draws.count
        assert store is not None
        cost = {name: mcmc._facts[name] - self._before[name] for name in COST}
        content = dumps({
            "start": self._start,
            "decided": dict(mcmc.kernel.potential.decided),
            "model": self._model,
            "facts": cost,
            "diagnostics": getattr(draws, "diagnostics", None),  # known when the draws are whole
            "done": draws.done,
            "count": count,
            "num_samples": mcmc.num_samples,
            "random": random_state(),
            "own": self.sharing.state(),
            "state": state_of(mcmc.kernel),
        })  # fmt: skip
        facts = {
            name: [None if value != value else value for value in fact] if isinstance(fact, list) else fact
            for name, fact in mcmc._facts.items()
        }
        attributes = {"posterior": attributes_of(mcmc, self.options.thinning), "sample_stats": facts}
        cost = {"process": self.sharing.rank, **cost} if self.sharing.writes else {}

        def write() -> None:
            store.write_checkpoint(writer, content)
            store.commit(writer, count, cost, attributes)

        return write
