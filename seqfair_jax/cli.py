"""What the commands share: flags, the config, one line for a user's error, logging, signals."""

import difflib
import importlib.util
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from seqfair_jax import workdir
from seqfair_jax.errors import UserError
from seqfair_jax.training.environment import processor


class Command:
    """The flags of one command, and how it runs.

    Each call has flags of its own (not absl's global ones), so a command may run twice in a
    process and importing its module has no effect.
    """

    def __init__(self, name: str, description: str, *, arguments: str = "", config: bool = False):
        """Define the flags that every command has.

        Args:
            name: what is typed behind `seqfair`.
            description: for `--help`.
            arguments: what positional arguments stand for, such as "DIR [DIR ...]"; "" for none.
            config: the command takes `--config` and `--config.KEY=VALUE`.
        """
        self._name, self._description, self._arguments = name, description, arguments
        self._takes_config = config
        self.flags = flags.FlagValues()
        flags.DEFINE_bool("help", False, "show this help", flag_values=self.flags)

    def string(self, name: str, help_text: str, default: str | None = None) -> None:
        """Define a flag with a text value."""
        flags.DEFINE_string(name, default, help_text, flag_values=self.flags)

    def bool(self, name: str, help_text: str) -> None:
        """Define a flag that is off by default."""
        flags.DEFINE_bool(name, False, help_text, flag_values=self.flags)

    def required(self, name: str) -> str:
        """The value of a flag, after parsing.

        Raises:
            UserError: if it was not given.
        """
        value = self.flags[name].value
        if value is None:
            raise UserError(f"--{name} is missing: {self.flags[name].help}")
        return value

    def run(self, argv: Sequence[str], work: Callable[..., Any]) -> None:
        """Parse the arguments and call `work`.

        `work` gets the flags' values as attributes of one object, then the config if the command
        takes one, else the positional arguments. A `UserError` ends the process with status 1
        and one line on standard error; any other exception is a bug and keeps its traceback.
        """
        _set_up_logging()
        # So that SIGTERM unwinds like Ctrl-C: locks and temporary files are cleaned up.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            values, rest = self._parse(list(argv))
            use_compilation_cache()
            work(values, rest)
        except UserError as error:
            _exit(f"error: {error}")
        except KeyboardInterrupt:
            _exit("stopped")

    def _parse(self, argv: list[str]) -> tuple[flags.FlagValues, Any]:
        if any(arg in ("--help", "-h", "-help", "--helpfull") for arg in argv):
            print(self._help())
            raise SystemExit(0)
        config = None
        if self._takes_config:
            path, argv = _take_config(argv)
            config = load_config(path)
        try:
            if self._takes_config:
                config_flags.DEFINE_config_dict(
                    "config", config, flag_values=self.flags, sys_argv=[self._name, *argv]
                )
            rest = self.flags([self._name, *argv])[1:]
        except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
            # ml_collections raises KeyError or AttributeError for an unknown key.
            message = " ".join(str(error.args[0] if error.args else error).split())
            raise UserError(f"{message} (see: seqfair {self._name} --help)") from None
        if rest and not self._arguments:
            raise UserError(
                f"unexpected argument {rest[0]!r}: flags are --NAME=VALUE, and lists have no "
                "spaces, as in --config.seeds=0,1,2"
            )
        return self.flags, (config if self._takes_config else rest)

    def _help(self) -> str:
        usage = f"usage: seqfair {self._name}"
        if self._takes_config:
            usage += " --config=FILE [--config.KEY=VALUE ...]"
        usage += " [flags]" + (f" {self._arguments}" if self._arguments else "")
        lines = [usage, "", self._description, "", "flags:"]
        if self._takes_config:
            lines += [
                "  --config: a config file, such as configs/own_log.py; its arguments follow a "
                "colon (required)",
                "  --config.KEY: the value of one setting, such as --config.seeds=0,1,2",
            ]
        for name in self.flags:
            flag = self.flags[name]
            default = f" (default: {flag.default})" if flag.default not in (None, False) else ""
            lines.append(f"  --{name}: {flag.help}{default}")
        return "\n".join(lines)


def load_config(argument: str) -> ConfigDict:
    """Run a config file's `get_config` on its arguments.

    Args:
        argument: `FILE` or `FILE:ARGUMENTS`.

    Raises:
        UserError: if there is no such file, or it refuses the arguments.
    """
    name, colon, arguments = argument.partition(":")
    path = workdir.user_path(name)
    if not path.is_file():
        near = difflib.get_close_matches(
            path.name, [p.name for p in path.parent.glob("*.py")], n=1, cutoff=0.5
        )
        hint = f" (did you mean {path.parent / near[0]}?)" if near else ""
        raise UserError(f"--config={name}: no such file{hint}")
    spec = importlib.util.spec_from_file_location("seqfair_config", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={name}: expected a Python file with a get_config function")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"--config={name}: the file has no get_config function")
    return module.get_config(arguments) if colon else module.get_config()


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, one folder for each processor model.

    XLA's programs for one processor can fail on another. `JAX_COMPILATION_CACHE_DIR` overrides.
    """
    # Keep every program, however fast it compiled: many small ones precede the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    cache = workdir.cache_folder()
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or cache is None:
        return
    model = "".join(c if c.isalnum() else "-" for c in processor())
    jax.config.update("jax_compilation_cache_dir", str(cache / "xla" / model))


def _take_config(argv: list[str]) -> tuple[str, list[str]]:
    """The value of `--config`, and the other arguments."""
    for i, arg in enumerate(argv):
        if arg in ("--config", "-config"):
            if i + 1 == len(argv):
                break
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        name, equals, value = arg.partition("=")
        if equals and name in ("--config", "-config"):
            return value, argv[:i] + argv[i + 1 :]
    raise UserError("--config is missing: name a config file, such as --config=configs/own_log.py")


def _set_up_logging() -> None:
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax logs every file
    logger = logging.getLogger("seqfair_jax")
    logger.setLevel(logging.INFO)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def _exit(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(1)
