"""The space of a search: the settings that vary, each over a list or a range of values.

A space is written as text, so that it fits into a command line:

    32,64,128         these values
    0:0.5             every number from 0 to 0.5
    0.001:0.1:log     the same, drawn evenly over the logarithm
    0:0.5:0.1         from 0 to 0.5 in steps of 0.1
    0.5x,1x,2x        multiples of the config's own value; x works everywhere
                      nothing: the setting keeps the config's own value
"""

import math
from collections.abc import Mapping
from decimal import Decimal
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.config import format_value
from seqfair_jax.config.keys import settings
from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.settings import Setting

# Around the config's own values, so that the same space suits a small model and a large one.
_DEFAULTS = {
    "model.dim": "0.5x,1x,2x",
    "model.num_blocks": "1,2,3",
    "model.dropout": "0:0.6",
    "model.init_scale": "0.01:1:log",
    "train.epochs": "0.5x,1x,2x",
    "train.learning_rate": "0.1x:10x:log",
    "train.weight_decay": "0,0.001,0.01,0.1",
}
_PARTS = ("model", "objective", "train")  # of the settings that a search may vary
# Settings whose keys begin with these do not change what is trained.
_FIXED = ("train.segment_seconds", "train.checkpoint_minutes", "train.runs_axis", "train.mesh.")


class Choices(NamedTuple):
    """A list of values."""

    options: tuple[Any, ...]

    def nearest(self, value: Any) -> Any:
        """The value itself if it is in the list, else the nearest, or the first of texts."""
        if value in self.options or isinstance(value, str | bool):
            return value if value in self.options else self.options[0]
        return min(self.options, key=lambda known: abs(known - value))

    def __str__(self) -> str:
        return ", ".join(map(shown, self.options))


class Interval(NamedTuple):
    """A range of numbers, both ends included. Two whole ends: whole numbers."""

    low: float
    high: float
    log: bool = False
    step: float | None = None

    def nearest(self, value: float) -> float:
        """The value, or the nearest of the range."""
        value = min(max(value, self.low), self.high)
        return value if self.step is None else self._at(round((value - self.low) / self.step))

    def _at(self, steps: int) -> float:
        """The value after so many steps, without what sums of binary fractions add."""
        low, step = Decimal(repr(self.low)), Decimal(repr(self.step))
        return type(self.low)(low + steps * step)

    def rounded(self, value: float) -> float:
        """The value to three significant digits, or a thousandth of the range; inside the range.

        The finer of the two counts. In a range with steps, the nearest step.
        """
        if self.step is not None:
            return self.nearest(value)
        if isinstance(self.low, int):
            return value
        size = math.floor(math.log10(abs(value))) if value else 0
        digits = max(2 - size, 3 - math.ceil(math.log10(self.high - self.low)))
        return min(max(round(value, digits), self.low), self.high)

    def __str__(self) -> str:
        how = (
            ", log scale" if self.log else f", in steps of {shown(self.step)}" if self.step else ""
        )
        return f"{shown(self.low)} to {shown(self.high)}{how}"


Space = Mapping[str, Choices | Interval]  # by the setting's dotted name


def searchable() -> dict[str, Setting]:
    """The settings that a search may vary: single values of the model, objective and training."""
    numbers = {f"objective.{name}" for name in objectives.hparams()}
    return {
        setting.key: setting
        for setting in settings()
        if setting.key.partition(".")[0] in _PARTS
        and not setting.key.startswith(_FIXED)
        and (setting.key in numbers or setting.type in (int, float, bool) or setting.choices)
        and setting.key not in ("objective.name", "train.decay_steps")
    }


def default_texts() -> dict[str, str]:
    """The default space, as text. Of an objective's hyperparameters, the values that it declares.

    Those of objectives that a run does not use are ignored.
    """
    declared = {
        f"objective.{name}": ",".join(map(format_value, hparam.search))
        for name, hparam in objectives.hparams().items()
    }
    return {key: _DEFAULTS.get(key) or declared.get(key, "") for key in searchable()}


def parse_space(texts: Mapping[str, str], config: ConfigDict) -> dict[str, Choices | Interval]:
    """Read a space.

    A default space is widened so that it has the config's own value.

    Args:
        texts: by the setting's dotted name.
        config: of the runs, resolved; its values are the config's own.

    Raises:
        UserError: on a setting that a search cannot vary, a text that is no list or range, or a
            value that the setting does not take.
    """
    defaults, known = default_texts(), searchable()
    reads = {f"objective.{setting.name}" for setting in _method(config).settings}
    space = {}
    for key, text in texts.items():
        if key not in known:
            raise UserError(
                f"search.space.{key} is not a setting that a search can vary"
                f"{did_you_mean(key, known)}; it can vary {', '.join(known)}"
            )
        if not isinstance(text, str):
            raise UserError(
                f"search.space.{key} is {text!r}: expected text, such as '0.1,0.2' or '0.1:0.5'"
            )
        if not text.strip() or (text == defaults[key] and _unread(key, reads)):
            continue
        if _unread(key, reads):
            raise UserError(
                f"search.space.{key} is set, but {config.objective.name} does not read "
                f"{key}: leave it out"
            )
        own = own_value(config, key)
        found = _parse(known[key], text.strip(), own)
        space[key] = _widened(found, own) if text == defaults[key] else found
    return space


def own_value(config: ConfigDict, key: str) -> Any:
    """A config's own value of a setting.

    Raises:
        UserError: if the config has a list of several values, which is a grid.
    """
    part, name = key.split(".")
    value = config[part][name]
    if isinstance(value, tuple):
        if len(value) > 1:
            raise UserError(
                f"{key} has {len(value)} values, but each trial of a search has one: give one "
                f"value, and list the others in search.space.{key}"
            )
        return value[0]
    return value


def as_settings(point: Mapping[str, Any]) -> dict[str, Any]:
    """A point of a space as settings of a config, in which hyperparameters are lists."""
    lists = {f"objective.{name}" for name in objectives.hparams()}
    return {key: (value,) if key in lists else value for key, value in point.items()}


def shown(value: Any) -> str:
    """A value as short text that reads back as the same value."""
    if isinstance(value, bool):
        return str(value).lower()
    return format_value(value) if isinstance(value, float) else str(value)


def _method(config: ConfigDict) -> objectives.Method:
    return objectives.find(config.objective.name)


def _unread(key: str, reads: set[str]) -> bool:
    part, _, name = key.partition(".")
    return part == "objective" and key not in reads and name not in objectives.SHARED


def _parse(setting: Setting, text: str, own: Any) -> Choices | Interval:
    """A list, or a range where the text has colons."""
    key = setting.key
    if ":" not in text:
        values = tuple(_value(setting, part.strip(), own) for part in text.split(","))
        if _kind(setting) is not str and "x" in text:  # half of 1 is 1 again
            values = tuple(dict.fromkeys(values))
        if len(set(values)) < len(values):
            raise UserError(f"search.space.{key} is {text!r}: expected unequal values")
        return Choices(values)
    kind = _kind(setting)
    low, high, *how = (part.strip() for part in text.split(":"))
    if kind not in (int, float) or len(how) > 1:
        raise UserError(
            f"search.space.{key} is {text!r}: expected a list of values, or a range of numbers "
            "such as 1:3, 0.01:1:log or 0:0.5:0.1"
        )
    ends = _value(setting, low, own), _value(setting, high, own)
    log = how == ["log"]
    step = None if log or not how else _value(setting, how[0], own, is_step=True)
    found = Interval(*ends, log, step)
    if not found.low < found.high or (log and found.low <= 0):
        lowest = "a lower end above 0 and a higher end" if log else "a lower and a higher end"
        raise UserError(f"search.space.{key} is {text!r}: expected {lowest}")
    if step is not None:
        if not 0 < step <= found.high - found.low:
            raise UserError(f"search.space.{key} is {text!r}: expected a step inside the range")
        # The last step may be before the end.
        length = Decimal(repr(found.high)) - Decimal(repr(found.low))
        found = found._replace(high=found._at(int(length // Decimal(repr(step)))))
    return found


def _kind(setting: Setting) -> type:
    return float if setting.type is tuple else setting.type


def _value(setting: Setting, text: str, own: Any, *, is_step: bool = False) -> Any:
    """One value of a setting, checked."""
    key, kind = setting.key, _kind(setting)
    message = f"search.space.{key}: {text!r} is no value of the setting: expected "
    hparams = {f"objective.{name}": hparam for name, hparam in objectives.hparams().items()}
    value: Any
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(message + "true or false")
        return text.lower() == "true"
    if kind is str:
        value = text
    else:
        try:
            number = float(text.removesuffix("x")) * (own if text.endswith("x") else 1)
        except ValueError:
            raise UserError(message + "a number, or a multiple such as 2x") from None
        if kind is int and text.endswith("x"):
            value = max(1, round(number))
        elif kind is int:
            if not number.is_integer():
                raise UserError(message + "a whole number")
            value = int(number)
        else:
            value = float(number)
    if is_step:
        return value
    if key in hparams:
        if not hparams[key].range.contains(value):
            raise UserError(message + f"a number {hparams[key].range}")
        return value
    try:
        setting.require(value)
    except UserError as error:
        raise UserError(f"search.space.{error}") from None
    return value


def _widened(found: Choices | Interval, own: Any) -> Choices | Interval:
    """The space with the config's own value in it, where a range can have it."""
    if isinstance(found, Choices):
        values = found.options if own in found.options else (*found.options, own)
        return Choices(tuple(sorted(values)))
    if found.log and own <= 0:
        return found
    return found._replace(low=min(found.low, own), high=max(found.high, own))
