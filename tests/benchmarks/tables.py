"""How the benchmarks show their results: a table in Markdown, and the same as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def show(rows: Sequence[Mapping[str, Any]], path: str | Path | None = None, digits: int = 3) -> None:
    """Print rows of one set of columns; numbers stand to the right, to so many significant digits.

    :param path: where the same goes as CSV, in full precision.
    """
    if not rows:
        raise ValueError("there is no row to show: every contender was missing.")
    columns = list(rows[0])
    numeric = [all(isinstance(row[name], (int, float)) or row[name] is None for row in rows) for name in columns]
    print(f"| {' | '.join(columns)} |")
    print(f"|{'|'.join('---:' if is_number else '---' for is_number in numeric)}|")
    for row in rows:
        print(f"| {' | '.join(_cell(row[name], digits) for name in columns)} |", flush=True)
    if path is not None:
        write(rows, path)


def write(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """The rows as CSV, in full precision."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def _cell(value: Any, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}g}" if isinstance(value, float) else str(value)
