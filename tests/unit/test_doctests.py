"""The examples in the docstrings run. By module name: a file's path would import a second, uninstalled copy."""

import doctest
import importlib
import pkgutil

import pytest

PACKAGES = ("bnn", "bnn.kernels", "bnn.guides")


def module_names() -> list[str]:
    names = []
    for package in PACKAGES:
        path = importlib.import_module(package).__path__
        names += [package, *(f"{package}.{module.name}" for module in pkgutil.iter_modules(path) if not module.ispkg)]
    return names


@pytest.mark.parametrize("name", module_names())
def test_docstring_examples(name: str) -> None:
    module = importlib.import_module(name)
    results = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, report=False)
    assert results.failed == 0, f"{results.failed} of {results.attempted} examples of {name} failed, see above"
