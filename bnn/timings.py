"""What was timed on this machine, kept beside inductor's own cache: so that the same run decides the same way again."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any


class Timings:
    """Seconds by name, in one file.

    :param key: of the file: what was timed.
    """

    def __init__(self, key: str) -> None:
        self.path = cache_folder() / f"bnn-{key}.json"
        try:
            self.seconds: dict[str, float] = {k: float(v) for k, v in json.loads(self.path.read_text()).items()}
        except (OSError, ValueError):
            self.seconds = {}

    def store(self, name: str, seconds: float) -> None:
        """Keep one time, on the disk too if it can be written."""
        self.seconds[name] = seconds
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as file:
                json.dump(self.seconds, file)
            os.replace(file.name, self.path)
        except OSError:  # a read-only cache only costs the next run its memory
            pass


def cache_folder() -> Path:
    """Where inductor keeps what it compiles."""
    from torch._inductor.runtime.runtime_utils import cache_dir

    folder: Any = cache_dir()
    return Path(folder)
