"""Imports inside the package point down only; the order of the rooms is the way of the data."""

import ast
from pathlib import Path

import pytest

import seqfair_jax

PACKAGE = Path(seqfair_jax.__file__).parent
ROOMS = (
    "__init__",  # the version
    "errors",
    "workdir",
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
    "sweeps",
    "paper",
    "cli",
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
    assert first in rooms, f"{first} has no place in the order of the rooms"
    return rooms.index(first)


def upward_imports(files: dict[str, str]) -> list[str]:
    """Imports that point up, from the sources by dotted module name."""
    return [
        f"{module} imports {target}"
        for module, source in files.items()
        for target in imported_modules(source)
        if room(target, ROOMS) > room(module, ROOMS)
    ]


def sources() -> dict[str, str]:
    paths = PACKAGE.rglob("*.py")
    names = {path: path.relative_to(PACKAGE).with_suffix("").as_posix() for path in paths}
    return {name.replace("/", "."): path.read_text() for path, name in names.items()}


def test_imports_point_down_only():
    assert upward_imports(sources()) == []


def test_an_upward_import_is_found():
    files = {"data.split": "def f():\n    from seqfair_jax.training import loop\n"}
    assert upward_imports(files) == ["data.split imports training.loop"]
    with pytest.raises(AssertionError, match="attic has no place"):
        upward_imports({"attic.old": "from seqfair_jax import run"})


def test_no_room_has_a_cycle_inside():
    """Within a room too: a module imports its neighbours, and none imports it back."""
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
