"""Scripts on several ranks, as torchrun starts them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any


def ranks_of(script: Path, count: int, *arguments: str, dying: Collection[int] = (), **environment: str) -> Any:
    """What ``script`` printed as lines of JSON on each rank: name -> rank -> entry.

    :param dying: ranks that may end with an error.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "TIMEOUT": "200"}
    common |= {"PYTHONPATH": str(script.parents[1]), **environment}
    children = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    found: dict[str, dict[int, Any]] = {}
    ended = [child.communicate(timeout=400) for child in children]
    errors = [err[-3000:] for k, (_, err) in enumerate(ended) if children[k].returncode and k not in dying]
    assert not errors, "\n\n".join(errors)
    for line in "".join(out for out, _ in ended).splitlines():
        if line.startswith("{"):
            entry = json.loads(line)
            found.setdefault(entry.pop("name"), {})[entry.pop("rank")] = entry
    return found
