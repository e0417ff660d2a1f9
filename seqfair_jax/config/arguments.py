"""The arguments of a config file, which follow a colon."""

from ml_collections import ConfigDict

from seqfair_jax.errors import HelpRequested, UserError, did_you_mean
from seqfair_jax.settings import Setting


def parse_arguments(text: str | None, **defaults: str | float | int) -> ConfigDict:
    """Read a config file's arguments, `key=value,key=value`, as in `configs/NAME.py:init=0.05`.

    Values take the type of their default.

    Raises:
        HelpRequested: if the text is `help`, with the keys and their defaults.
        UserError: on a key without a default (names the closest), a key that is given twice, or a
            value of another type.
    """
    arguments, given = ConfigDict(defaults), set()
    known = ", ".join(f"{key}={value}" for key, value in defaults.items()) or "none"
    if text == "help":
        raise HelpRequested(f"the arguments of this config, with their defaults: {known}")
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if key not in defaults:
            raise UserError(
                f"config argument {part!r}: unknown key {key!r}{did_you_mean(key, defaults)}; "
                f"known, with their defaults: {known}"
            )
        if key in given:
            raise UserError(f"config argument {part!r}: {key} is given twice, expected once")
        given.add(key)
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            arguments[key] = kind(value)
        except ValueError:
            expected = Setting(key, defaults[key], "").expected
            raise UserError(
                f"config argument {part!r}: expected {key}=VALUE with {expected}"
            ) from None
    return arguments


def choose_model(config: ConfigDict, model: str) -> None:
    """Change a config to the model that the argument `model` names.

    - plain: as the config is.
    - mixture: the softmax mixed with a pointer and with 256 neighbours of each item
      (`model.mixture`).
    - best: a mixture with every other option that validated best on Retailrocket or MovieLens-1M
      and is not worse on the other (docs/results): gated blocks, biases of positions and items,
      averaged parameters, random windows.

    Raises:
        UserError: if it is none of them.
    """
    if model not in ("plain", "mixture", "best"):
        raise UserError(f"model={model}: expected plain, mixture or best")
    if model != "plain":
        config.model.pointer = True
        config.model.neighbours = 256
    if model == "best":
        config.model.gated = True
        config.model.position_bias = True
        config.model.item_bias = True
        config.train.average_decay = 0.995
        config.train.random_windows = True
