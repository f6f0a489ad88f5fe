"""Libraries that only some functions need, and that come with an extra of the package."""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str, extra: str = "report") -> Any:
    """The module ``name``, imported when it is needed.

    :param name: of the module, with dots.
    :param extra: the extra of this package that brings it.
    :raises ImportError: that says what to install, if it is missing.

    >>> library("math").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing = name.split(".")[0]
        if error.name is not None and error.name.split(".")[0] != missing:
            raise
        raise ImportError(f'this needs {missing}: pip install "pyro-bnn[{extra}]".', name=missing) from error
