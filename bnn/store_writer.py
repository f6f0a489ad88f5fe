"""Writing in the background: the chains go on while draws and checkpoints go to the disk, in the order they came."""

from __future__ import annotations

import errno
import queue
import threading
from collections.abc import Callable

# Blocks of draws that may wait; the chains wait for the disk beyond that, so that memory stays bounded.
WAITING = 1


class StoreError(RuntimeError):
    """The disk did not take the draws."""


class BackgroundWriter:
    """A thread that does one piece of work after another. After the first that fails it does no more.

    :param path: where it writes, for messages.

    >>> done = []
    >>> writer = BackgroundWriter("run.zarr")
    >>> writer.put(lambda: done.append(1))
    >>> writer.close()
    >>> done
    [1]
    """

    def __init__(self, path: object) -> None:
        self.path = path
        self.error: BaseException | None = None
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue(maxsize=WAITING)
        self._thread = threading.Thread(target=self._run, name="bnn-store", daemon=True)
        self._thread.start()

    def put(self, work: Callable[[], None]) -> None:
        """Have ``work`` done after all that was put before.

        :raises StoreError: if something before failed.
        """
        self.check()
        self._work.put(work)

    def check(self) -> None:
        """:raises StoreError: if something failed."""
        if self.error is None:
            return
        why = f"{type(self.error).__name__}: {self.error}"
        if isinstance(self.error, ValueError):
            raise StoreError(str(self.error)) from self.error
        remedy = "make room on the disk" if getattr(self.error, "errno", 0) == errno.ENOSPC else "see to the disk"
        raise StoreError(
            f"the draws could not be written to {self.path} ({why}). What was committed before is kept: {remedy}, and "
            "run again with resume=True."
        ) from self.error

    def drain(self) -> None:
        """Wait until all is done.

        :raises StoreError: if something failed.
        """
        self._work.join()
        self.check()

    def close(self) -> None:
        """Finish, and end the thread. Safe to call again."""
        if self._thread.is_alive():
            self._work.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                if self.error is None:
                    work()
            except BaseException as error:  # noqa: BLE001 - told to the run by check()
                self.error = error
            finally:
                del work  # and the draws that it holds
                self._work.task_done()
        self._work.task_done()
