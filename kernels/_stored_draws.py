"""Draws that go to a store block by block, with checkpoints from which the run is resumed."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnn.draw_store import DrawStore
from bnn.kernels._base import StochasticGradientKernel
from bnn.kernels._draws import Draws
from bnn.kernels._ranks import Sharing
from bnn.store import variable_of
from bnn.store_writer import BackgroundWriter

# Rows of statistics that are written at once, or fewer at a checkpoint: each array costs milliseconds.
ROWS = 512

# At most such a part of the time goes into making checkpoints.
LARGEST_PART = 0.02


class StoredDraws(Draws):
    """Draws of a group of chains on their way to a store: in memory there is a block of them.

    :param kernel: whose draws, set up.
    :param chains: the numbers of its chains.
    :param save: names of the sites that are kept.
    :param store: where they go.
    :param writer: what writes them.
    :param sharing: whether this process writes draws, and when it may make a checkpoint.
    :param made: makes a checkpoint of these draws, which is then to be written: what the writer is to do.
    """

    def __init__(
        self,
        kernel: StochasticGradientKernel,
        chains: range,
        save: list[str] | None,
        store: DrawStore,
        writer: BackgroundWriter,
        sharing: Sharing,
        made: Callable[[StoredDraws], Callable[[], None]],
    ) -> None:
        super().__init__(kernel, len(chains), save)
        self.first_chain, self.store, self.writer, self.sharing, self.made = chains.start, store, writer, sharing, made
        kernel._running.record.thinning = store.options.thinning
        self._seen = 0  # draws after warm-up
        self._put = 0  # draws that were handed to the writer
        self._blocks: dict[str, Tensor] = {}
        self._last_checkpoint, self._spent, self._since = time.monotonic(), 0.0, 0
        self._committed = 0
        self._pending = False  # whether a checkpoint is on its way to the disk
        self.signal: int | None = None  # that asked the run to stop

    def take_up(self, done: int, count: int) -> None:
        """Go on from a checkpoint with so many draws made and kept."""
        self.done, self.count, self._put, self._committed = done, count, count, count
        self._seen = max(0, done - self.kernel._running.warmup_steps)

    def add(self, position: Tensor) -> None:
        """Keep a draw, unless it is thinned out."""
        self._seen += 1
        if (self._seen - 1) % self.store.options.thinning:
            return
        place = self.count % self.store.block
        for site in self.sites if self.sharing.writes else ():
            # Draw by draw: where a value stands in an array may decide on its last bit.
            value = site.constrain(site.unflatten(position))
            block = self._blocks.get(site.name)
            if block is None:
                block = self._blocks[site.name] = value.new_empty(self.chains, self.store.block, *value.shape[1:])
            block[:, place] = value
        self.count += 1
        if self.count % self.store.block == 0:
            self._flush()

    def pause(self) -> None:
        """Make a checkpoint if one is due, or if a signal asked the run to stop."""
        self.writer.check()
        record = self.kernel._running.record
        if record.draws - record.taken >= ROWS:
            self._flush_statistics()
        self._since += 1
        options = self.store.options
        seconds = max(options.checkpoint_every, self._spent / LARGEST_PART)
        due = (
            self.signal is not None
            or self._since >= (options.checkpoint_draws or math.inf)
            or time.monotonic() - self._last_checkpoint >= seconds
        )
        due, number = self.sharing.agree(due, self._pending, self.signal or 0)
        if number and not due:
            self._wait_for_all()
        elif not due:
            return
        self.checkpoint()
        if number == signal.SIGINT:
            self.signal = None
            raise KeyboardInterrupt
        if number:
            self.writer.drain()
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def stop(self) -> None:
        """A last checkpoint, if the chains stand at a draw and the disk takes it; else they go back to the last."""
        alone = self.sharing.for_kernel is None  # other ranks may stand elsewhere
        if alone and not self.moving and self.writer.error is None:
            self.checkpoint()
        self.count = self._committed

    def finish(self) -> None:
        """A last checkpoint; wait until all is on disk."""
        super().finish()
        if not self.interrupted:
            self._wait_for_all()
            self.checkpoint()
        self.writer.drain()

    def _wait_for_all(self) -> None:
        """Until the last checkpoint is on disk everywhere, before there is another."""
        self.writer.drain()
        self.sharing.of_all(None)

    def checkpoint(self) -> None:
        """Write what continues the run from here, and let readers see the draws so far."""
        start = time.monotonic()
        self._flush()
        self._flush_statistics()
        write, self._pending = self.made(self), True

        def work() -> None:
            write()
            self._pending = False

        self.writer.put(work)
        self._last_checkpoint, self._since, self._committed = time.monotonic(), 0, self.count
        self._spent = self._last_checkpoint - start

    def _flush(self) -> None:
        """Hand what was not yet handed over to the writer."""
        start, stop, size = self._put, self.count, self.store.block
        if start == stop or not self.sharing.writes:
            return
        first, last = start % size, (stop - 1) % size + 1
        is_full = last == size
        blocks = {
            variable_of(name): block[:, first:last] if is_full else block[:, first:last].clone()
            for name, block in self._blocks.items()
        }
        if is_full:
            self._blocks = {}
        store, chain = self.store, self.first_chain

        def work() -> None:
            store.write("posterior", {name: _numpy(block) for name, block in blocks.items()}, chain, start)

        self.writer.put(work)
        self._put = stop

    def _flush_statistics(self) -> None:
        record, store, chain = self.kernel._running.record, self.store, self.first_chain
        start = record.taken
        stats = record.take()
        if record.taken == start or not self.sharing.writes:
            return

        def work() -> None:
            store.write("sample_stats", {name: value.numpy() for name, value in stats.items()}, chain, start)

        self.writer.put(work)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the next draw, so that nothing is lost; a second one does not wait."""
        before: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            if self.signal is not None:
                signal.signal(number, before[number])
                signal.raise_signal(number)
            self.signal = number

        if threading.current_thread() is threading.main_thread():
            for one, default in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
                if signal.getsignal(one) == default:  # not one of the user's own
                    before[one] = signal.signal(one, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        if self.signal is not None:  # it came after the last draw
            signal.raise_signal(self.signal)


def _numpy(block: Tensor) -> np.ndarray[Any, Any]:
    block = block.cpu()
    return (block.float() if block.dtype == torch.bfloat16 else block).numpy()
