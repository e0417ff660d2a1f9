"""The settings of a refit: those of a run that was judged, on all rows, to the epoch it chose."""

from collections.abc import Mapping

from ml_collections import ConfigDict

from seqfair_jax import objectives
from seqfair_jax.config.change import change
from seqfair_jax.config.keys import default_config
from seqfair_jax.config.resume import RESUMABLE, changed_settings, flatten
from seqfair_jax.errors import UserError

# What a refit may change: where its log is, its seeds, its devices, and how often it is saved.
_FREE = {"seeds", "data.since", "data.until", "train.refit", *RESUMABLE} - {
    "groups",
    "train.epochs",
    "evaluate.cutoffs",
    "evaluate.neighbour_draws",
    "evaluate.ease_items",
}
_OF_SPLIT = ("valid_path", "test_path")  # of `data`: the other logs of a split by files


def refit_settings(saved: Mapping, *, folder: str, rule: str, epoch: int) -> ConfigDict:
    """The settings of the refit of a run.

    They are those of the run, with the epochs that it chose. `train.decay_steps` stays, so the
    learning rate of each step is the run's.

    Args:
        saved: the run's settings, as `config.json` has them.
        folder: of the run; the value of `train.refit`.
        rule: of `selection.RULES`; the value of `train.refit_rule`.
        epoch: that this rule chose.

    Raises:
        UserError: if the run's objective is not registered.
    """
    objectives.find(saved["objective"]["name"])
    config = default_config()  # its fields without a value have types, which a command's flags need
    known = dict(flatten(config.to_dict()))
    # Those of an objective that is not registered now are not read. A run of an earlier version
    # lacks settings; it trained as their defaults say.
    kept = {
        key: value
        for key, value in flatten(saved)
        if value is not None and (key in known or not key.startswith("objective."))
    }
    change(
        config,
        kept | {"train.refit": folder, "train.refit_rule": rule, "train.epochs": epoch},
    )
    return config


def check_refit(judged: ConfigDict, config: ConfigDict) -> None:
    """Refuse settings that the judged run did not have: it says nothing of such a model.

    Args:
        judged: from `refit_settings`.
        config: of the refit.

    Raises:
        UserError: naming each setting that differs, with both values.
    """
    old, new = (dict(flatten(each.to_dict())) for each in (judged, config))
    changed = changed_settings(judged.to_dict(), config.to_dict())
    keys = [key for key in changed if key not in _FREE]
    if keys:
        values = "; ".join(f"{key} ({old.get(key)!r} there, {new.get(key)!r} now)" for key in keys)
        raise UserError(
            f"train.refit is {judged.train.refit}, and a refit has the settings of that run, but "
            f"these differ: {values}. Leave them out, or train and judge a run with them first"
        )


def use_whole_log(judged: ConfigDict, config: ConfigDict) -> None:
    """Of a split by files: read a newer log alone, if only the path of the training rows changed.

    Args:
        judged: from `refit_settings`.
        config: of the refit; changed in place.
    """
    ours, theirs = config.data, judged.data
    others = [ours[key] == theirs[key] for key in _OF_SPLIT]
    if ours.path != theirs.path and all(others):
        change(config, dict.fromkeys((f"data.{key}" for key in _OF_SPLIT), None))
