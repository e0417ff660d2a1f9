"""The arguments of a config file, which follow a colon."""

from ml_collections import ConfigDict

from seqfair_jax.errors import UserError, did_you_mean


def parse_arguments(text: str | None, **defaults: str | float | int) -> ConfigDict:
    """Read a config file's arguments, `key=value,key=value`, as in `configs/NAME.py:init=0.05`.

    Values take the type of their default.

    Raises:
        UserError: on a key without a default (names the closest) or a value of another type.
    """
    arguments = ConfigDict(defaults)
    for part in filter(None, (text or "").split(",")):
        key, equals, value = part.partition("=")
        if key not in defaults:
            raise UserError(
                f"config argument {part!r}: unknown key {key!r}{did_you_mean(key, defaults)}; "
                f"known: {', '.join(defaults)}"
            )
        kind = type(defaults[key])
        try:
            if not equals:
                raise ValueError
            arguments[key] = kind(value)
        except ValueError:
            raise UserError(
                f"config argument {part!r}: expected {key}=VALUE with a {kind.__name__}"
            ) from None
    return arguments


def add_mixture(config: ConfigDict, model: str) -> None:
    """Change a config to the model that the argument `model` names.

    With `mixture` the softmax is mixed with a pointer and with 256 neighbours of each item
    (`model.mixture`); `plain` changes nothing.

    Raises:
        UserError: if it is neither.
    """
    if model not in ("plain", "mixture"):
        raise UserError(f"model={model}: expected plain or mixture")
    if model == "mixture":
        config.model.pointer = True
        config.model.neighbours = 256
