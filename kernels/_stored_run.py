"""One run of the runner on a store: whether it may be resumed, from where, and what the store says of it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch

from bnn.arviz_data import attributes_of
from bnn.fingerprint import differences, of_model, of_settings, of_versions
from bnn.kernels._run_state import restore
from bnn.kernels._stored_draws import StoredDraws
from bnn.saved_state import DamagedState, loads, random_state, set_random_state
from bnn.store import BLOCK_BYTES, BLOCK_DRAWS, DrawStore, Store, read_root
from bnn.store_writer import BackgroundWriter

# Attributes of kernels that are no settings.
NO_SETTINGS = frozenset(
    ("model", "batches", "transforms", "num_chains", "num_samples", "gradients_per_step", "noises_per_step")
)


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
    :raises ValueError: if there is a store and ``resume`` is False.
    """

    def __init__(self, mcmc: Any, options: Store, resume: bool) -> None:
        self.mcmc, self.options = mcmc, options
        self.store: DrawStore | None = None
        self.writer: BackgroundWriter | None = None
        self.exists = options.exists()
        if self.exists and not resume:
            raise ValueError(
                f"{options.folder} exists: give resume=True to go on with it, or another path. Nothing is overwritten."
            )
        self.kept = math.ceil(mcmc.num_samples / options.thinning)  # draws of each chain
        self._start: dict[str, Any] = {}
        self._saved: dict[str, Any] | None = None
        self._group = 0
        if self.exists:
            self._check_run(read_root(options.path)["attributes"])

    # ---- one group of chains

    def before_setup(self, group: int, chains: range) -> bool:
        """Set random numbers and tiers as they were when the group was set up first; False if it is done already."""
        self._group = group
        if self.exists and self.store is None:
            self._open(chains)
        saved = self._saved
        if saved is not None and group < saved["group"]:
            return False
        if saved is not None and group == saved["group"]:
            set_random_state(saved["start"])
            self.mcmc.kernel._decided = dict(saved["decided"])
            self.mcmc._facts.update(saved["facts"])
            self.mcmc._diagnostics = saved["diagnostics"]
        self._start = random_state()
        return True

    def draws(self, chains: range) -> StoredDraws:
        """What takes in the draws of the group: from where it stood, if it is resumed."""
        mcmc, kernel = self.mcmc, self.mcmc.kernel
        attributes = {**self._attributes(), "model": of_model(kernel.potential)}
        if self.store is None:
            self._open(chains, attributes)
        assert self.store is not None and self.writer is not None
        changed = differences(self.store.attributes["model"], attributes["model"])
        if changed:
            raise ValueError(
                f"{self.options.folder} holds a run of another model or other data: {'; '.join(changed)}. Give the "
                "same ones, or another path."
            )
        draws = StoredDraws(kernel, chains, mcmc._save, self.store, self.writer, self._around, self._of_groups)
        saved, self._saved = self._saved, None
        if saved is None:
            draws.checkpoint()  # a start that can be repeated
            return draws
        try:
            restore(kernel, saved["state"])
        except DamagedState:
            raise
        except Exception as error:
            raise RuntimeError(
                f"the state in {self.options.folder} cannot be read by this version of the program "
                f"({type(error).__name__}: {error}). Its draws can; to draw more, give another path."
            ) from error
        draws.take_up(saved["done"], saved["count"])
        return draws

    def close(self) -> None:
        """End the writer and let others write."""
        if self.writer is not None:
            self.writer.close()
        if self.store is not None:
            self.store.close()
        self.mcmc.kernel._decided = {}

    # ---- opening

    def _open(self, chains: range, attributes: Mapping[str, Any] | None = None) -> None:
        mcmc = self.mcmc
        block = BLOCK_DRAWS
        if attributes is not None:
            potential = mcmc.kernel.potential
            size = len(chains) * potential.dim * torch.finfo(potential.dtype).bits // 8
            block = max(1, min(BLOCK_DRAWS, BLOCK_BYTES // size))
        self.store = DrawStore(self.options, mcmc.num_chains, self.kept, attributes or {}, block)
        self.writer = BackgroundWriter(self.options.folder)
        if self.exists:
            self._saved = self._checkpoint()

    def _checkpoint(self) -> dict[str, Any] | None:
        """The last checkpoint whose draws can all be read; None if there is none yet."""
        store = self.store
        assert store is not None
        contents, why = store.checkpoints(), ""
        for number, content in enumerate(contents):
            try:
                saved: dict[str, Any] = loads(content)
            except DamagedState as error:
                why = f"its last checkpoint cannot be read ({error})"
                continue
            group, count = saved["group"], saved["count"]
            size = 1 if self.mcmc.chain_method == "sequential" else self.mcmc.num_chains
            chains = range(group * size, (group + 1) * size)
            bad = store.first_damaged(range(chains.start), self.kept) or store.first_damaged(chains, count)
            if bad is not None:
                name, chain, draw = bad
                why = f"draws of chain {chain} from number {draw} on are damaged or missing in {name}"
                continue
            if number:
                warnings.warn(
                    f"{store.path}: {why}, so the run goes back to the checkpoint before, at {count} draws, and draws "
                    "again from there.",
                    RuntimeWarning,
                    stacklevel=5,
                )
            self._check_size(saved)
            if number:
                store.go_back()
            store.forget(chains, count)
            return saved
        if contents:
            raise RuntimeError(
                f"{store.path} cannot be resumed: {why}, and no checkpoint is left before that. What can be read is "
                "in bnn.to_arviz(path); bring the file back from a copy, or start anew under another path."
            )
        store.forget(range(0), 0)
        return None

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
                "save_params": str(mcmc._save),
                "thinning": str(self.options.thinning),
                "dtype": str(self.options.dtype),
            },
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
        if now != before and self.mcmc.chain_method == "sequential" and self.mcmc.num_chains > 1:
            raise ValueError(
                f"num_samples was {before} and is {now}: of chains that run one after another it cannot change. Use "
                "another path, or chain_method='vectorized' from the start."
            )

    # ---- what goes with a checkpoint

    def _around(self, draws: StoredDraws) -> dict[str, Any]:
        mcmc = self.mcmc
        return {
            "group": self._group,
            "start": self._start,
            "decided": dict(mcmc.kernel.potential.decided),
            "facts": dict(mcmc._facts),
            "diagnostics": mcmc._diagnostics,
            "done": draws.done,
            "count": draws.count,
            "num_samples": mcmc.num_samples,
        }

    def _of_groups(self) -> dict[str, dict[str, Any]]:
        """Attributes of the groups of the store."""
        facts = {
            name: [None if value != value else value for value in fact] if isinstance(fact, list) else fact
            for name, fact in self.mcmc._facts.items()
        }
        return {"posterior": attributes_of(self.mcmc, self.options.thinning), "sample_stats": facts}
