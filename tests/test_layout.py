"""Imports inside the package point down only, in the order of docs/layout.md."""

import ast
import re
from pathlib import Path

import pytest

import seqfair_jax

PACKAGE = Path(seqfair_jax.__file__).parent
PAGE = Path(__file__).parents[1] / "docs" / "layout.md"
ROOMS = (
    "__init__",  # the version, and the interface that it imports when it is used
    "errors",
    "workdir",
    "settings",
    "devices",
    "data",
    "model",
    "objectives",
    "evaluation",
    "config",
    "training",
    "serving",
    "report",
    "results",
    "run",
    "audit",
    "sweeps",
    "paper",
    "cli",
    "api",
    "commands",
    "__main__",
    "main",
)


def imported_modules(source: str) -> set[str]:
    """Every module of the package that a source text imports, below the package's name."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            # `from package import name` may import a module or a name that a module defines.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    prefix = "seqfair_jax."
    return {name.removeprefix(prefix) for name in found if name.startswith(prefix)}


def room(module: str, rooms: tuple[str, ...]) -> int:
    first = module.partition(".")[0]
    if first.startswith("__version__"):
        first = "__init__"
    assert first in rooms, f"{first} is not in ROOMS"
    return rooms.index(first)


def upward_imports(files: dict[str, str]) -> list[str]:
    """Imports that point up, from the sources by dotted module name."""
    return [
        f"{module} imports {target}"
        for module, source in files.items()
        for target in imported_modules(source)
        if module != "__init__" and room(target, ROOMS) > room(module, ROOMS)
    ]


def sources() -> dict[str, str]:
    paths = PACKAGE.rglob("*.py")
    names = {path: path.relative_to(PACKAGE).with_suffix("").as_posix() for path in paths}
    return {name.replace("/", "."): path.read_text() for path, name in names.items()}


def test_imports_point_down_only():
    assert upward_imports(sources()) == []


def test_the_page_names_every_module_in_the_order_of_the_rooms():
    paths = re.findall(r"`([\w/]+\.py)`", PAGE.read_text(encoding="utf-8"))
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py")}
    packages = {name for name in modules if name.endswith("/__init__.py")}
    assert set(paths) == modules - packages
    rooms = [path.partition("/")[0].removesuffix(".py") for path in paths]
    first_named = tuple(dict.fromkeys(rooms))
    assert first_named == ROOMS


def test_an_upward_import_is_found():
    files = {"data.split": "def f():\n    from seqfair_jax.training import loop\n"}
    assert upward_imports(files) == ["data.split imports training.loop"]
    with pytest.raises(AssertionError, match="attic is not in ROOMS"):
        upward_imports({"attic.old": "from seqfair_jax import run"})


def test_no_modules_import_each_other():
    """Inside a room too."""
    graph = {}
    for module, source in sources().items():
        targets = imported_modules(source)
        graph[module] = {
            known
            for known in sources()
            if known != module and any(t == known or t.startswith(known + ".") for t in targets)
        }
    while leaves := {module for module, targets in graph.items() if not targets}:
        graph = {m: targets - leaves for m, targets in graph.items() if m not in leaves}
    assert graph == {}
