"""What is known of a setting. Defaults, checks, help and documentation are made from it."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict, config_dict

from seqfair_jax.errors import UserError, did_you_mean

_KINDS: Mapping[type, tuple[type, str]] = {
    bool: (bool, "true or false"),
    int: (numbers.Integral, "a whole number"),
    float: (numbers.Real, "a number"),
    str: (str, "text"),
    tuple: (tuple, "a list"),
}


class Check(NamedTuple):
    """Which values a setting takes, beyond their type."""

    expected: str  # follows "expected" in a message
    good: Callable[[Any], bool]  # of a value that has the setting's type


class Setting(NamedTuple):
    """One setting of a config."""

    key: str  # dotted, such as "train.epochs"
    default: Any  # None: no value
    help: str  # what it means, in plain English; names are in backticks, and nothing else is marked
    check: Check | None = None
    choices: tuple[str, ...] = ()  # of a text; (): any
    kind: type | None = None  # the type of a value; None: that of the default
    resumable: bool = False  # may differ when a run is resumed
    shown: str | None = None  # what help shows as the default; None: the default itself
    is_path: bool = False  # of this machine

    @property
    def type(self) -> type:
        """The type of a value."""
        return self.kind or type(self.default)

    @property
    def expected(self) -> str:
        """Which values it takes, for help and messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return self.check.expected if self.check else _KINDS[self.type][1]

    def require(self, value: object) -> None:
        """Refuse a value of another type, an unknown choice, or a value out of range.

        Raises:
            UserError: naming the key, what was found and what was expected.
        """
        if value is None and self.default is None:
            return
        of_type = isinstance(value, _KINDS[self.type][0])
        if isinstance(value, bool) and self.type is not bool:  # Python's True is an integer
            of_type = False
        if self.choices and of_type and value not in self.choices:
            hint = did_you_mean(value, self.choices)
            raise UserError(f"{self.key} is {value!r}{hint}; known: {', '.join(self.choices)}")
        if not of_type or (self.check and not self.check.good(value)):
            raise UserError(f"{self.key} is {value!r}: expected {self.expected}")


def whole(least: int) -> Check:
    """Whole numbers from `least` on."""
    return Check(f"a whole number, {least} or more", lambda value: value >= least)


def number(least: float) -> Check:
    """Finite numbers from `least` on."""
    return Check(f"a number, {least} or more", lambda value: least <= value < math.inf)


def above(least: float) -> Check:
    """Finite numbers above `least`."""
    return Check(f"a number above {least}", lambda value: least < value < math.inf)


def between(least: float, most: float) -> Check:
    """Numbers from `least` to `most`, both included."""
    return Check(f"a number from {least} to {most}", lambda value: least <= value <= most)


def build(settings: Iterable[Setting]) -> ConfigDict:
    """A config of every setting's default."""
    config = ConfigDict()
    for setting in settings:
        *parts, name = setting.key.split(".")
        place = config
        for part in parts:
            if part not in place:
                place[part] = ConfigDict()
            place = place[part]
        no_value = config_dict.placeholder(setting.type)
        place[name] = no_value if setting.default is None else setting.default
    return config
