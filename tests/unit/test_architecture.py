"""The arrows between the folders and the shape of the tree, read from the sources without importing them."""

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"bnn": "bnn", "kernels": "bnn.kernels", "guides": "bnn.guides"}  # folder -> installed name
FORBIDDEN = {
    "bnn": ("bnn.kernels", "bnn.guides"),
    "kernels": ("bnn.guides",),
    "guides": ("bnn.kernels",),
}
MAX_LINES = 400
KERNEL_BASE = "StochasticGradientKernel"

SOURCES = sorted(path for folder in PACKAGES for path in (ROOT / folder).rglob("*.py"))
ALL_FILES = SOURCES + sorted(path for folder in ("tests", "examples") for path in (ROOT / folder).rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Every dotted name that is imported, wherever the import stands; ``from a import b`` gives ``a`` and ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def exports(init: Path) -> set[tuple[str, str]]:
    """(module, name) for each ``from module import name as name``."""
    return {
        (node.module or "", alias.name)
        for node in parse(init).body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname == alias.name
    }


def kernel_classes() -> set[tuple[str, str]]:
    """(module, class) of the public classes in ``kernels/`` that descend from the kernel base."""
    bases: dict[str, set[str]] = {}
    homes: dict[str, str] = {}
    for path in sorted((ROOT / "kernels").glob("*.py")):
        for node in parse(path).body:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = {ast.unparse(base).split("[")[0].split(".")[-1] for base in node.bases}
                homes[node.name] = path.stem
    kernels = {KERNEL_BASE}
    while grown := {name for name, parents in bases.items() if parents & kernels} - kernels:
        kernels |= grown
    return {
        (f"bnn.kernels.{homes[name]}", name)
        for name in kernels & homes.keys()
        if not name.startswith("_") and not homes[name].startswith("_")
    }


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_arrows_point_one_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    for name in imported_names(parse(path)):
        wrong = [package for package in FORBIDDEN[folder] if within(name, package)]
        assert not wrong, f"{relative(path)} imports {name}"


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_imports_are_absolute_and_use_installed_names(path: Path) -> None:
    tree = parse(path)
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{relative(path)}:{node.lineno}: relative import"
    for name in imported_names(tree):
        assert name.split(".")[0] not in ("kernels", "guides"), f"{relative(path)} imports {name}, not bnn.{name}"


@pytest.mark.parametrize("path", ALL_FILES, ids=relative)
def test_files_are_short_and_named_after_their_subject(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{relative(path)} has {lines} lines, more than {MAX_LINES}"
    assert path.name != "utils.py", f"{relative(path)}: name helpers after what they are about"


def names_at_the_top(path: Path) -> set[str]:
    """What importing the file imports: not what stands in its functions."""
    top = ast.Module([node for node in parse(path).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)], [])
    return set(imported_names(top))


@pytest.mark.parametrize("module", ["report_page", "leave_one_out", "arviz_data"])
def test_reports_of_files_need_no_torch(module: str) -> None:
    """Where ArviZ 1.x lives there may be no torch; tests/arviz1 runs these modules without it."""
    reached, ahead = set(), [module]
    while ahead:
        path = ROOT / "bnn" / f"{ahead.pop()}.py"
        if path in reached or not path.is_file():
            continue
        reached.add(path)
        names = names_at_the_top(path)
        assert not any(within(name, package) for name in names for package in ("torch", "pyro")), relative(path)
        ahead += [name.split(".")[1] for name in names if name.startswith("bnn.")]
    assert reached


def test_packages_name_every_folder() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {relative(path.parent) for path in SOURCES}
    expected = {folder: ".".join([PACKAGES[folder.split("/")[0]], *folder.split("/")[1:]]) for folder in folders}
    assert sorted(setuptools["packages"]) == sorted(expected.values())
    assert setuptools["package-dir"] == {package: folder for folder, package in expected.items()}


def test_every_kernel_is_exported() -> None:
    missing = kernel_classes() - exports(ROOT / "kernels" / "__init__.py")
    lines = "\n".join(f"from {module} import {name} as {name}" for module, name in sorted(missing))
    assert not missing, f"add to kernels/__init__.py:\n{lines}"


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_module_has_the_name_of_an_export(folder: str) -> None:
    modules = {path.stem for path in (ROOT / folder).glob("*.py")}
    clashes = modules & {name for _, name in exports(ROOT / folder / "__init__.py")}
    assert not clashes, f"{folder}/: {sorted(clashes)} would name both a module and what it exports"
