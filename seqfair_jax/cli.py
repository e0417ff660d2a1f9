"""What the commands share: flags, the config, one line for a user's error, logging, signals."""

import contextlib
import logging
import os
import re
import signal
import sys
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

import jax
from absl import flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from seqfair_jax import workdir
from seqfair_jax.config import flatten, help
from seqfair_jax.config.change import locate
from seqfair_jax.config.files import description, load_config
from seqfair_jax.config.keys import settings
from seqfair_jax.errors import HelpRequested, Interrupted, UserError, raise_all
from seqfair_jax.settings import Setting
from seqfair_jax.training.environment import processor

_CONFIG = ("--config", "-config")
_HELP = ("--help", "-h", "-help", "--helpfull")
_LISTS = "lists have no spaces, as in --config.seeds=0,1,2"
_TYPES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    tuple: "a list such as 0.1,0.2",
}


class Command:
    """The flags of one command, and how it runs.

    Each command has its own flags instead of absl's global ones, so importing its module has no
    effect and a process may run it several times.
    """

    def __init__(
        self,
        name: str,
        description: str,
        *,
        arguments: str = "",
        config: bool | str = False,
        lists_settings: bool = False,
        program: str | None = None,
        own_settings: Callable[[], Sequence[Setting]] = tuple,
        config_of: Callable[[flags.FlagValues, str | None], ConfigDict | None] | None = None,
        extend: Callable[[ConfigDict], None] | None = None,
    ):
        """Define the flags that every command has.

        Args:
            name: the word after `seqfair`.
            description: for `--help`.
            arguments: the positional arguments, such as "DIR [DIR ...]"; "" for none.
            config: the command takes `--config` and `--config.KEY=VALUE`; "optional" if it need
                not be given.
            lists_settings: its `--help` lists the shipped configs and every setting.
            program: how the command is started, if not by `seqfair NAME` (of benchmarks).
            own_settings: that a config may have for this command, beside those of a run. Its
                `--help` lists them.
            config_of: makes the config from the values of the other flags and of `--config`, None
                without it; returns None if the config is that of `--config`.
            extend: adds to a loaded config what it lacks of them.
        """
        self._name, self._description, self._arguments = name, description, arguments
        self._program = program or f"seqfair {name}"
        self._takes_config, self._lists_settings = config, lists_settings
        self._own_settings, self._extend = own_settings, extend
        self._config_of = config_of
        self.config_name: str | None = None  # what `--config` named
        self._repeatable: set[str] = set()
        self.flags = flags.FlagValues()
        flags.DEFINE_bool("help", False, "show this help", flag_values=self.flags)

    def string(self, name: str, help_text: str, default: str | None = None) -> None:
        """Define a flag with a text value."""
        flags.DEFINE_string(name, default, help_text, flag_values=self.flags)

    def strings(self, name: str, help_text: str) -> None:
        """Define a flag that may be given several times; its value is a list."""
        self._repeatable.add(name)
        flags.DEFINE_multi_string(name, [], help_text, flag_values=self.flags)
        self.flags[name].help = help_text  # absl adds a sentence

    def integer(self, name: str, help_text: str, default: int) -> None:
        """Define a flag with a whole number."""
        flags.DEFINE_integer(name, default, help_text, flag_values=self.flags)

    def number(self, name: str, help_text: str, default: float | None = None) -> None:
        """Define a flag with a number; without a default it is None where it is not given."""
        flags.DEFINE_float(name, default, help_text, flag_values=self.flags)

    def bool(self, name: str, help_text: str) -> None:
        """Define a flag that is off by default."""
        flags.DEFINE_bool(name, False, help_text, flag_values=self.flags)

    def mesh(self) -> None:
        """Define the axes of a mesh that scores: `--data` and `--catalogue`."""
        self.integer("data", "devices that share the users", 1)
        self.integer("catalogue", "devices that share the items", 1)

    def required(self, name: str) -> str:
        """The value of a flag, after parsing.

        Raises:
            UserError: if it was not given, or is empty.
        """
        value = self.flags[name].value
        if not value:
            raise UserError(f"--{name} is missing: {self.flags[name].help}")
        return value

    def run(self, argv: Sequence[str], work: Callable[..., Any]) -> None:
        """Parse the arguments and call `work`.

        `work` gets the flags' values as attributes of one object, then the config if the command
        takes one, else the positional arguments. A `UserError` ends the process with status 1
        and one line on standard error, SIGINT with status 130 and SIGTERM with 143, and a pipe
        whose reader has ended with 141. Any other exception is a bug and keeps its traceback.
        """
        with log_to_stderr(), _signals():
            try:
                values, rest = self._parse(list(argv))
                use_compilation_cache()
                work(values, rest)
                sys.stdout.flush()
            except UserError as error:
                _exit(f"error: {error}", 1)
            except KeyboardInterrupt as error:
                stopped = Interrupted("stopped", error)
                _exit(str(stopped), stopped.status)
            except Interrupted as stopped:
                _exit(str(stopped), stopped.status)
            except BrokenPipeError:
                # `seqfair report DIR | head`: nobody reads on. Python flushes again at its exit.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise SystemExit(128 + signal.SIGPIPE) from None

    def _parse(self, argv: list[str]) -> tuple[flags.FlagValues, Any]:
        if any(arg in _HELP for arg in argv):
            print(self._help([arg for arg in argv if arg not in _HELP]), flush=True)
            raise SystemExit(0)
        config = None
        optional = self._takes_config == "optional"
        if self._takes_config and not (optional and not _names_config(argv)):
            config = self._made_config(argv)
            if config is None or _names_file(argv):
                path, argv = take_config(argv)
                config = config or self._load(path)
                self.config_name = path
            argv = _check_overrides(config, argv)
        try:
            if config is not None:
                config_flags.DEFINE_config_dict(
                    "config", config, flag_values=self.flags, sys_argv=[self._program, *argv]
                )
            rest = self.flags([self._program, *argv])[1:]
        except (flags.Error, ValueError) as error:
            known = (*settings(), *self._own_settings())
            message = _expected_type(error, config, known)
            raise (UserError(message) if message else self._bad_flag(error)) from None
        self._check_repeated(argv)
        for name in self.flags:
            is_setting = name.startswith("config.")  # of which some may be empty
            if not is_setting and self.flags[name].present and self.flags[name].value == "":
                raise UserError(f"--{name} is empty: give a value, or leave the flag out")
        if rest and not self._arguments:
            raise UserError(
                f"unexpected argument {rest[0]!r}: flags are --NAME=VALUE, and {_LISTS}"
            )
        return self.flags, (config if self._takes_config else rest)

    def _made_config(self, argv: list[str]) -> ConfigDict | None:
        """The config of `config_of`; None if there is none."""
        if self._config_of is None:
            return None
        try:
            self.flags([self._program, *argv], known_only=True)
        except (flags.Error, ValueError) as error:
            raise self._bad_flag(error) from None
        return self._config_of(self.flags, take_config(argv)[0] if _names_file(argv) else None)

    def _bad_flag(self, error: Exception) -> UserError:
        return UserError(" ".join(str(error).split()) + f" (see: {self._program} --help)")

    def _load(self, path: str) -> ConfigDict:
        try:
            config = load_config(path)
        except HelpRequested as shown:
            print(shown, flush=True)
            raise SystemExit(0) from None
        if self._extend is not None:
            self._extend(config)
        return config

    def _check_repeated(self, argv: Sequence[str]) -> None:
        names = [word.lstrip("-").partition("=")[0] for word in argv if word.startswith("-")]
        names = [name if name in self.flags else name.removeprefix("no") for name in names]
        for name in self.flags:
            if names.count(name) > 1 and name not in self._repeatable:
                raise UserError(f"--{name} is given {names.count(name)} times, expected once")

    def _help(self, argv: list[str]) -> str:
        usage = f"usage: {self._program}"
        if self._takes_config:
            usage += (
                " [--config=NAME_OR_FILE ...]"
                if self._takes_config == "optional"
                else " --config=NAME_OR_FILE [--config.KEY=VALUE ...]"
            )
        usage += " [flags]" + (f" {self._arguments}" if self._arguments else "")
        lines = [usage, "", textwrap.fill(self._description, 79), "", "flags:"]
        if self._takes_config:
            where = "below" if self._lists_settings else "`seqfair train --help` lists them"
            where += ", and those of this command are below" * bool(self._own_settings())
            lines += [
                *_wrapped(
                    "--config: the name of a shipped config, such as own_log, or the path of "
                    "your own file, such as mine.py; its arguments follow a colon, as in "
                    "own_log:method=cvar, and own_log:help lists them"
                    + " (required)"
                    * (self._takes_config is True and self._config_of is None)
                ),
                *_wrapped(
                    "--config.KEY: the value of one setting, such as --config.seeds=0,1,2; "
                    f"the settings: {where}"
                ),
            ]
        for name in self.flags:
            flag = self.flags[name]
            default = (
                f" (default: {flag.default})" if flag.default not in (None, False, "", []) else ""
            )
            lines += _wrapped(f"--{name}: {flag.help}{default}")
        listed = settings() if self._lists_settings else self._own_settings()
        if self._lists_settings:
            lines += ["", "shipped configs:", help.shipped_configs()]
        if listed:
            lines += ["", *self._settings_help(listed, argv)]
        return "\n".join(lines)

    def _settings_help(self, listed: Sequence[Setting], argv: list[str]) -> Iterator[str]:
        if _names_file(argv):
            name, _ = take_config(argv)
            values = dict(flatten(self._load(name).to_dict()))
            if about := description(name):
                yield f"--config={name}:"
                yield f"\n{help.indented(about)}\n"
            if all(setting.key in values for setting in listed):
                yield f"settings, with the values of --config={name}:"
                yield f"\n{help.settings_text(listed, values)}"
                return
        yield "settings, with their defaults:"
        yield f"\n{help.settings_text(listed)}"


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


def _names_config(argv: Sequence[str]) -> bool:
    return any(re.match(r"--?config(?:[.=]|$)", word) for word in argv)


def _names_file(argv: Sequence[str]) -> bool:
    return any(word.partition("=")[0] in _CONFIG for word in argv)


def take_config(argv: list[str]) -> tuple[str, list[str]]:
    """The value of `--config`, and the other arguments.

    Raises:
        UserError: if it is missing, or is given twice.
    """
    found, rest = [], []
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _CONFIG:
            rest.append(word)
        elif equals:
            found.append(value)
        else:
            found.append(next(words, ""))
    if len(found) > 1:
        raise UserError("--config is given twice: name one config")
    if not found or not found[0]:
        raise UserError(
            "--config is missing: name a config, such as --config=own_log, or your own file"
        )
    return found[0], rest


def _check_overrides(config: ConfigDict, argv: list[str]) -> list[str]:
    """Refuse `--config.KEY` where KEY is unknown, and a list that ends in a comma.

    A list with spaces, `--config.seeds=0, 1`, reaches the program as two words.

    Returns:
        The arguments, with lists of text in quotation marks: ml_collections would read
        `--config.groups=age:4,pop33` as Python.
    """
    quoted, faults = list(argv), []
    for i, word in enumerate(argv):
        match = re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", word, re.DOTALL)
        if match is None:
            continue
        key, value = match.groups()
        try:
            place, name = locate(config, key)
        except UserError as error:
            faults.append(str(error))
            continue
        setting = place[name]
        if value is None:
            value = argv[i + 1] if i + 1 < len(argv) else ""
        if isinstance(setting, tuple) and value.rstrip().endswith(","):
            raise UserError(f"--config.{key}={value}: the list ends in a comma; {_LISTS}")
        is_text = isinstance(setting, tuple) and all(isinstance(part, str) for part in setting)
        if is_text and value and "=" in word and value[0] not in "([\"'":
            quoted[i] = f"--config.{key}={value!r}"
    raise_all(faults)
    return quoted


def _expected_type(
    error: Exception, config: ConfigDict | None, known: Iterable[Setting]
) -> str | None:
    """The message for a setting whose value has another type; None for other errors."""
    match = re.match(r"flag --config\.([\w.]+)=", str(error))
    if match is None or config is None or not isinstance(error, flags.IllegalFlagValueError):
        return None
    given = str(error).removeprefix("flag ").removesuffix(f": {error.__context__}")
    setting: Any = config
    *parts, last = match[1].split(".")
    for part in parts:
        setting = setting[part]
    declared = {one.key: one.expected for one in known}
    kind = setting.get_type(last)  # of another command's own setting
    return f"{given}: expected {declared.get(match[1]) or _TYPES.get(kind, kind.__name__)}"


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(
        text, 79, initial_indent="  ", subsequent_indent=" " * 6,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


@contextlib.contextmanager
def log_to_stderr() -> Iterator[None]:
    """Show the package's messages on standard error, and hide those of orbax."""
    logger = logging.getLogger("seqfair_jax")
    before = logger.level, logger.propagate, absl_logging.get_verbosity()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    absl_logging.set_verbosity(absl_logging.WARNING)  # orbax logs every file
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        level, logger.propagate, verbosity = before
        logger.setLevel(level)
        absl_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM raise KeyboardInterrupt, so that locks are released.

    A second signal ends the process at once. `run.run` has its own handlers while it trains.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = (signal.SIGINT, signal.SIGTERM)

    def interrupt(number: int, _frame: object) -> None:
        for other in handled:
            signal.signal(other, signal.SIG_DFL)
        raise KeyboardInterrupt(number)

    before = [signal.signal(number, interrupt) for number in handled]
    try:
        yield
    finally:
        for number, handler in zip(handled, before, strict=True):
            signal.signal(number, handler)


def _exit(message: str, status: int) -> NoReturn:
    print(message, file=sys.stderr)
    raise SystemExit(status)
