"""Which settings may differ when a run is resumed."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from seqfair_jax import objectives
from seqfair_jax.config.keys import settings
from seqfair_jax.errors import UserError

RESUMABLE = tuple(setting.key for setting in settings() if setting.resumable)


def check_resumable(
    saved: Mapping, config: Mapping, where: str, *, fixed: Collection[str] = ()
) -> None:
    """Refuse to resume a work directory with another config.

    Settings of objectives that the run does not use may differ, and may be missing: they depend on
    which objectives are registered.

    Args:
        saved: the settings in `where`, as nested dicts.
        config: the settings of this call.
        where: the file, for the message.
        fixed: settings in `RESUMABLE` that may not differ here.

    Raises:
        UserError: naming each setting that differs; those in `RESUMABLE` may differ.
    """
    old, new = dict(flatten(saved)), dict(flatten(config))

    def shown(settings: Mapping, key: str) -> str:
        return repr(settings[key]) if key in settings else "missing"

    may_differ = set(RESUMABLE) - set(fixed)
    keys = [key for key in changed_settings(saved, config) if key not in may_differ]
    changed = [f"{key} ({shown(old, key)} there, {shown(new, key)} now)" for key in keys]
    if changed:
        hints = {
            "train.decay_steps": ". (The learning rate falls to 0 over train.decay_steps, which "
            "follows train.epochs in this config. To train longer, start a new run)",
            "objective.group_family": ". (objective.group_family is the first of groups unless it "
            "is set. Keep the first group, or set objective.group_family to the earlier one)",
        }
        raise UserError(
            f"{where} was made by another config; these differ: {'; '.join(changed)}. "
            "Use another --workdir, or the same settings as before"
            + "".join(hints.get(key, "") for key in keys)
            + ". (Another version wrote it, and only that one can resume it)"
            * any((key in old) != (key in new) for key in keys)
        )


def changed_settings(saved: Mapping, config: Mapping) -> list[str]:
    """The settings that differ and that the run of `config` depends on, by dotted name.

    Args:
        saved, config: as for `check_resumable`.
    """
    method = objectives.find(config["objective"]["name"])
    read = {*objectives.SHARED, *(setting.name for setting in method.settings)}
    old, new = dict(flatten(saved)), dict(flatten(config))
    return [
        key
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and (not key.startswith("objective.") or key.removeprefix("objective.") in read)
    ]


def flatten(tree: Mapping, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting's dotted name and value; tuples as lists."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, list(value) if isinstance(value, tuple) else value
