"""Config files: those that the package ships, by name, and a user's own, by path."""

import ast
import contextlib
import inspect
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.errors import UserError, did_you_mean


def shipped() -> dict[str, Path]:
    """The files of the shipped configs, by name."""
    package = Path(__file__).parents[1]
    inside = package / "configs"  # of an installed package; in the repository it is beside it
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def summary(path: Path) -> str:
    """The first line of a config file's docstring."""
    return _docstring(path).partition("\n")[0]


def description(argument: str) -> str:
    """The docstring of the config file that `load_config` would run; "" if it has none.

    Raises:
        UserError: if there is no such file.
    """
    return _docstring(_find(argument.partition(":")[0]))


def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(workdir.read_text(path))) or ""


def load_config(argument: str) -> ConfigDict:
    """Run a config file's `get_config` on its arguments.

    A name without a folder and without `.py` is that of a shipped config, whatever files the
    current folder has. Everything else is the path of a file.

    The file may import modules of its own folder, as a script may.

    Args:
        argument: `NAME` or `FILE.py`, or either with `:ARGUMENTS`.

    Raises:
        UserError: if there is no such config, it has no `get_config`, or it refuses the arguments.
    """
    name = argument.partition(":")[0]
    path = _find(name)
    if path.suffix != ".py":
        raise UserError(f"--config={name}: expected a Python file with a get_config function")
    with _importable(path.parent):
        return _load(path, argument)


@contextlib.contextmanager
def _importable(folder: Path) -> Iterator[None]:
    added = str(folder.absolute())
    sys.path.insert(0, added)
    try:
        yield
    finally:
        sys.path.remove(added)


def _load(path: Path, argument: str) -> ConfigDict:
    name, colon, arguments = argument.partition(":")
    module = types.ModuleType("seqfair_config")
    module.__file__ = str(path)
    exec(compile(workdir.read_text(path), str(path), "exec"), module.__dict__)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={name}: the file has no get_config function")
    given = (arguments,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*given)
    except TypeError:
        problem = "takes no arguments" if colon else "needs arguments, as in FILE.py:KEY=VALUE"
        raise UserError(f"--config={argument}: its get_config {problem}") from None
    config = module.get_config(*given)
    if not isinstance(config, ConfigDict):
        raise UserError(
            f"--config={name}: its get_config returns a {type(config).__name__}, expected a "
            "ConfigDict"
        )
    return config


def _find(name: str) -> Path:
    """The file of a config."""
    known = shipped()
    if re.fullmatch(r"[\w-]+", name):
        if name not in known:
            raise UserError(
                f"--config={name}: no shipped config has this name{did_you_mean(name, known)}; "
                "seqfair train --help lists them. For a file of your own give its path with .py, "
                f"such as --config={name}.py"
            )
        return known[name]
    path = workdir.user_path(name)
    if not path.is_file():
        hint = did_you_mean(path.name, [near.name for near in path.parent.glob("*.py")])
        if path.stem in known:
            hint = f" (the package has a config of this name: --config={path.stem})"
        raise UserError(f"--config={name}: no such file{hint}; it would be {path.absolute()}")
    return path
