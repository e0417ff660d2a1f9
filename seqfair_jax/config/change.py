"""Changes single settings of a config, by their dotted keys."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from seqfair_jax.config.resume import flatten
from seqfair_jax.errors import UserError, collect, did_you_mean, raise_all


def change(config: ConfigDict, values: Mapping[str, Any]) -> None:
    """Change settings in place. Their values are checked by `resolve`, not here.

    Args:
        config: a run's.
        values: by key, such as {"model.dim": 128}. A list or a single value is taken as a tuple.

    Raises:
        UserError: on an unknown key (the closest is named), or the key of a group of settings.
    """
    faults: list[str] = []
    for key in values:
        with collect(faults):
            locate(config, key)
    raise_all(faults)
    for key, value in values.items():
        place, name = locate(config, key)
        if isinstance(value, list | np.ndarray):
            value = tuple(value)
        elif isinstance(place[name], list | tuple) and not isinstance(value, tuple):
            value = (value,)
        value = tuple(map(_plain, value)) if isinstance(value, tuple) else _plain(value)
        with place.ignore_type(), place.unlocked():
            if isinstance(place[name], list):  # from JSON; a list field would stay a list
                del place[name]
            place[name] = value


def locate(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The part of a config that has a setting, and the setting's name there.

    Raises:
        UserError: as `change`.
    """
    place, setting, name = config, config, ""
    for name in str(key).split("."):
        if not isinstance(setting, ConfigDict) or name not in setting:
            raise UserError(f"unknown config key {key}{_closest(str(key), config)}")
        place, setting = setting, setting[name]
    if isinstance(setting, ConfigDict):
        raise UserError(f"{key} is a group of settings: set one of {', '.join(setting)}")
    return place, name


def _plain(value: Any) -> Any:
    """The Python number of one of numpy, which JSON does not have."""
    return value.item() if isinstance(value, np.generic) else value


def _closest(key: str, config: ConfigDict) -> str:
    known = [name for name, _ in flatten(config.to_dict())]
    # Unless a key is almost the same, the same setting of another part is the best guess: `epochs`
    # for `train.epochs`.
    same = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
    return (
        did_you_mean(key, known, closeness=0.9)
        or did_you_mean(key, same, closeness=0)
        or did_you_mean(key, known)
    )
