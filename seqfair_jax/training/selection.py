"""Which epoch, which values and which runs are best: one place for both rules.

Shape letters: R runs.
"""

from collections.abc import Hashable, Mapping, Sequence, Sized
from typing import Any, NamedTuple, TypeVar

import numpy as np

from seqfair_jax.evaluation.slices import OVERALL, Slices

# rule -> epoch, overall, worst_group, and all scores of the epoch under VAL; None before any. The
# scores are None if the groups or cut-offs have changed since.
Best = dict[str, dict[str, Any] | None]
Key = TypeVar("Key", bound=Hashable)
VAL = "val"
FINISHED = "finished"  # the status of a run that did not diverge


class Rule(NamedTuple):
    """How validation chooses an epoch of a run, and a value of a hyperparameter."""

    name: str
    suffix: str  # of the keys of summary.json and of file names: test_worst_group
    label: str  # behind the name of a row
    short: str  # in the progress bar
    keys: tuple[str, ...]  # scores that are compared in this order
    note: str = ""  # under the printed tables


RULES = {
    rule.name: rule
    for rule in (
        Rule("overall", "", "", "overall", ("overall",)),
        Rule(
            "worst_group",
            "_worst_group",
            ", best worst group",
            "worst",
            ("worst_group", "overall"),  # ties of the worst group go to the better mean
            "Epochs and values are chosen by the worst group of the loss's family; for methods "
            "without groups, of the sweep's first family.",
        ),
    )
}


class Choice(NamedTuple):
    """What the end of an epoch changes about a run."""

    best: Best
    improved: dict[str, bool]  # rule -> whether this epoch is the new best
    stops: bool  # early


def close_epoch(
    best: Best,
    epoch: int,
    scores: Mapping[str, Slices],
    *,
    metric: str,
    worst_group: float,
    patience: int,
) -> Choice:
    """Compare an epoch of one run with its best so far; of equal epochs the earlier stays.

    Args:
        best: before this epoch.
        epoch: from 1.
        scores: of the validation users, for each metric.
        metric: the one that selects.
        worst_group: its lowest mean among the groups of the objective's family.
        patience: stop after so many epochs without a better overall score; 0 never stops.
    """
    overall = scores[metric][OVERALL]
    assert overall is not None  # there is at least one validation user
    candidate = {"epoch": epoch, "overall": overall, "worst_group": worst_group, VAL: dict(scores)}
    record, improved = dict(best), dict.fromkeys(RULES, False)
    for name, rule in RULES.items():
        old = record[name]
        if old is None or [candidate[k] for k in rule.keys] > [old[k] for k in rule.keys]:
            record[name] = candidate
            improved[name] = True
    newest = record["overall"]
    assert newest is not None
    return Choice(record, improved, 0 < patience <= epoch - newest["epoch"])


def keep_newest(best: Best, epoch: int) -> Choice:
    """The end of an epoch of a refit, which has no scores: the newest epoch replaces the last.

    Args:
        best: before this epoch.
        epoch: from 1.
    """
    improved = {name: name == "overall" for name in RULES}
    return Choice(best | {"overall": {"epoch": epoch, VAL: None}}, improved, stops=False)


def without_scores(best: Best) -> Best:
    """A run's best epochs without their scores by group, which then have to be validated again."""
    return {rule: record and {**record, VAL: None} for rule, record in best.items()}


def status(failed_step: int) -> str:
    """The status of a run in `summary.json`, from its first step that was not finite, or -1."""
    return FINISHED if failed_step < 0 else f"failed at step {failed_step}"


def has_parameters(summary: Mapping[str, Any], rule: str = "overall") -> bool:
    """Whether a run has parameters of the epoch that a rule chose; of a refit, of its last."""
    return summary["status"] == FINISHED and "best" + RULES[rule].suffix in summary


def is_result(summary: Mapping[str, Any], rule: str = "overall") -> bool:
    """Whether a run counts: in means, in ranks, and as a candidate. A failed run does not."""
    return summary["status"] == FINISHED and "test" + RULES[rule].suffix in summary


def score(summary: Mapping[str, Any], rule: str) -> float:
    """The validation score by which a rule ranks a run: that of its own best epoch.

    Args:
        summary: of the run.
        rule: a key of `RULES`.
    """
    return summary["best" + RULES[rule].suffix][rule]


def candidates(found: Mapping[Key, Sized]) -> list[Key]:
    """The keys that may be chosen, by what was found for each seed of each key.

    A key that lacks a seed, since its run failed, is no candidate if another has more: means over
    other seeds do not compare.
    """
    most = max(map(len, found.values()), default=0)
    return [key for key, seeds in found.items() if len(seeds) == most > 0]


def best_values(scores: Mapping[Key, Sequence[float]]) -> Key | None:
    """The candidate whose scores have the best mean over seeds; None where nothing was scored."""
    means = {key: np.mean(scores[key]) for key in candidates(scores)}
    return max(means, key=means.__getitem__, default=None)
