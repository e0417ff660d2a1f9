"""The settings of a search: its defaults, its checks, and the points that it may try."""

import copy
import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from seqfair_jax.config import flatten, resolve
from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.settings import Setting, build, whole
from seqfair_jax.sweeps.space import (
    Choices,
    Space,
    as_settings,
    default_texts,
    own_value,
    parse_space,
)

Point = dict[str, Any]  # a value for each setting of the space, by its dotted name


def search_settings() -> tuple[Setting, ...]:
    """The settings of a search, but for its space (`space.default_texts`)."""
    return (
        Setting(
            "search.sampler",
            "tpe",
            "How values are chosen: by the results so far (`tpe`), at random, or every combination "
            "of the lists (`grid`).",
            choices=("tpe", "random", "grid"),
        ),
        Setting("search.seed", 0, "The seed of the sampler.", whole(0)),
        Setting(
            "search.prune",
            True,
            "Stop a trial whose validation score is below the median of the others at the same "
            "share of the training.",
        ),
    )


def default_search() -> ConfigDict:
    """The settings of a search with the default space (`space.default_texts`)."""
    search = build(search_settings()).search
    search.space = ConfigDict()
    add_space(search.space, default_texts())
    return search


def empty_search() -> ConfigDict:
    """The settings of a search with an empty space: assign texts to `search.space.model.dim`."""
    search = default_search()
    for part in search.space.values():
        for key in part:
            part[key] = ""
    return search


def add_space(space: ConfigDict, texts: Mapping[str, str]) -> None:
    """Put the texts of a space, by dotted name, into `search.space`."""
    with space.unlocked():
        for key, text in texts.items():
            part, name = key.split(".")
            if part not in space:
                space[part] = ConfigDict()
            space[part][name] = text


def add_defaults(config: ConfigDict) -> None:
    """Add what a config lacks of the settings of a search, so that it can be searched."""
    with config.unlocked():
        if "search" not in config:
            config.search = default_search()
            return
        default = default_search()
        for key, value in default.items():
            if key not in config.search:
                config.search[key] = value
        texts = dict(flatten(default.space.to_dict()))
        known = dict(flatten(config.search.space.to_dict()))
        add_space(config.search.space, {key: "" for key in texts if key not in known})


class Plan(NamedTuple):
    """A search as its config says."""

    base: ConfigDict  # of the runs, with its references
    space: Space
    own: Point  # the config's own values; of those that are not in the space, the nearest
    texts: dict[str, str]  # the space as it was written
    sampler: str
    seed: int
    prune: bool

    def config(self, point: Mapping[str, Any]) -> ConfigDict:
        """The runs' config at a point, with its references."""
        config = copy.deepcopy(self.base)
        config.update_from_flattened_dict(as_settings(point))
        return config

    def first(self) -> list[Point]:
        """The points that are tried first: the config's own values, or the whole grid."""
        if self.sampler == "grid":
            lists = [part.options for part in self.space.values() if isinstance(part, Choices)]
            return [dict(zip(self.space, v, strict=True)) for v in itertools.product(*lists)]
        return [self.own]

    def point(self, drawn: Mapping[str, Any]) -> Point:
        """What the sampler drew, with short numbers; the config's own values stay as they are."""
        return {
            key: drawn[key]
            if isinstance(part, Choices) or drawn[key] == self.own[key]
            else part.rounded(drawn[key])
            for key, part in self.space.items()
        }


def split_search(config: ConfigDict) -> Plan:
    """Check a search's config.

    Raises:
        UserError: on a bad setting, a bad space (`space.parse_space`), an empty one, or a range
            in the space of a grid.
    """
    # References stay unresolved: `train.decay_steps` must follow each trial's `train.epochs`.
    base = copy.deepcopy(config)
    base.unlock()
    add_defaults(base)
    given = base.search
    del base["search"]
    known = default_search()
    for key in given:
        if key not in known:
            raise UserError(
                f"search.{key} is not a setting{did_you_mean(key, known)}; known: "
                f"{', '.join(known)}"
            )
    for setting in search_settings():
        setting.require(given[setting.key.removeprefix("search.")])
    texts = {key: text for key, text in flatten(given.space.to_dict()) if text != ""}
    resolved = resolve(base)
    space = parse_space(texts, resolved)
    if not space:
        raise UserError(
            "search.space is empty: give some setting values, such as "
            "--config.search.space.model.dropout=0:0.5"
        )
    if given.sampler == "grid":
        for key, part in space.items():
            if not isinstance(part, Choices):
                raise UserError(
                    f"search.space.{key} is {texts[key]!r}, but search.sampler is grid: expected a "
                    "list of values, or another sampler"
                )
    own = {key: part.nearest(own_value(resolved, key)) for key, part in space.items()}
    return Plan(base, space, own, texts, given.sampler, given.seed, given.prune)
