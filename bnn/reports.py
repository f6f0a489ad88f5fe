"""Reports from the command line: ``python -m bnn.reports run.nc`` writes ``run.html``.

The function is :func:`bnn.report`, of :mod:`bnn.report_page`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bnn.report_page import report as report


def main(arguments: Sequence[str] | None = None) -> int:
    """Make a page of a file.

    :param arguments: those of the command line.
    :return: 0, or 1 if there is nothing to make a page of.
    """
    parser = argparse.ArgumentParser(prog="python -m bnn.reports", description="A report of a run kept by ArviZ.")
    parser.add_argument("run", type=Path, help="a file of ArviZ data, idata.to_netcdf('run.nc'), or a store of draws")
    parser.add_argument("-o", "--output", type=Path, help="the page; by default the file's name with .html")
    parser.add_argument("--title", default="Posterior report", help="the page's title")
    options = parser.parse_args(arguments)
    output = options.output or options.run.with_suffix(".html")
    try:
        if options.run.is_dir():
            print(report(options.run, output, title=options.title))
            return 0
        if not options.run.is_file():
            raise FileNotFoundError(f"there is no file {options.run}.")
        import arviz

        print(report(arviz.from_netcdf(options.run), output, title=options.title))
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
