"""Reads finished runs, and tests them against a baseline run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from seqfair_jax import workdir
from seqfair_jax.config import RESUMABLE, flatten, format_value
from seqfair_jax.data.groups import encode_name
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices
from seqfair_jax.evaluation.metrics import parse_metric
from seqfair_jax.objectives import HParams
from seqfair_jax.training.selection import RULES, is_result

# Settings that runs of one row may differ in; `method_name` shows the objective's values.
_FREE = {"seeds", *(f"objective.{key}" for key in HParams._fields), *RESUMABLE}
_FREE -= {"train.epochs", "data.group_file"}


class FinishedRun(NamedTuple):
    """A finished run, or one that failed (`selection.is_result`)."""

    folder: Path
    name: str  # of its row: runs of one name differ only in the seed
    summary: dict[str, Any]


def read_summaries(folder: Path) -> list[dict[str, Any]]:
    """The summaries of a work directory's runs."""
    return [workdir.read_summary(part) for part in workdir.finished_folders(folder)]


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs of work directories; runs with different settings get different names.

    Raises:
        UserError: if a folder is not finished or is damaged, or two runs differ in nothing.
    """
    found = []
    parts = [part for folder in folders for part in workdir.finished_folders(folder.resolve())]
    for part in dict.fromkeys(parts):  # a grid and one of its runs may both be named
        summary = workdir.read_summary(part)
        settings = dict(flatten(workdir.read_json(part / workdir.CONFIG) or {}))
        kept = {key: str(settings[key]) for key in settings if key not in _FREE}
        found.append((part, method_name(summary), kept, summary))
    variants: dict[str, list[dict[str, str]]] = {}
    for _, name, kept, _ in found:
        variants.setdefault(name, []).append(kept)
    runs: dict[tuple, FinishedRun] = {}
    for part, name, kept, summary in found:
        differing = [
            f"{key}={kept[key]}"
            for key in kept
            if any(other.get(key) != kept[key] for other in variants[name])
        ]
        run = FinishedRun(part, slices.printable(" ".join([name, *differing])), summary)
        first = runs.setdefault((run.name, summary["seed"]), run)
        if first is not run:
            raise UserError(
                f"{first.folder} and {part} are the same training ({run.name}, seed "
                f"{summary['seed']}): name one of them"
            )
    return list(runs.values())


def read_consistent(
    folders: Sequence[Path], metric: str, family: str | None
) -> tuple[list[FinishedRun], list[str]]:
    """All folders' runs, checked to belong into one table, and the families to show.

    Args:
        folders: work directories of finished runs.
        metric: such as NDCG@20.
        family: as its user wrote it, or its canonical name; None for all that the runs share.

    Returns:
        the runs, and the canonical names of the families.

    Raises:
        UserError: if a folder is not finished, two runs are the same, the logs differ, or the
            metric or family is not in some run's results.
    """
    parse_metric(metric)
    runs = read_runs(folders)
    first = runs[0]
    families: list[str] | None = None
    for run in runs:
        summary = run.summary
        _check_dataset(run, first)
        if metric not in _baseline(summary):
            raise UserError(
                f"{run.folder}: {metric} was not evaluated; there are "
                f"{', '.join(_baseline(summary))}"
            )
        found = slices.families_in(_baseline(summary)[metric])
        if family is not None:
            known = [name for name in (family, encode_name(family)) if name in found]
            if not known:
                raise UserError(
                    f"{run.folder}: family {family!r} was not evaluated; there are "
                    f"{', '.join(map(slices.family_label, found))}"
                )
            found = known[:1]
        families = [name for name in found if families is None or name in families]
    if not families:
        raise UserError("the runs share no group family: each was evaluated by other families")
    return runs, families


def _check_dataset(run: FinishedRun, first: FinishedRun) -> None:
    ours, others = run.summary["dataset"], first.summary["dataset"]
    differing = [
        f"{key} {ours.get(key)} and {others.get(key)}"
        for key in (ours | others)
        if ours.get(key) != others.get(key)
    ]
    if differing:
        raise UserError(
            f"{run.folder} and {first.folder} were trained on different logs or splits "
            f"({', '.join(differing)}): they cannot be compared in one table"
        )


def _baseline(summary: dict[str, Any]) -> dict[str, slices.Slices]:
    """The metrics of most_popular, which every summary has."""
    return summary["baselines"]["most_popular"]


def failed_runs(runs: Sequence[FinishedRun]) -> list[str]:
    """A line for each run that failed; such a run is in no mean, rank, figure or test."""
    return [
        f"{run.name}, seed {run.summary['seed']}: {run.summary['status']}, not in the table"
        for run in runs
        if not is_result(run.summary)
    ]


def compare_folders(folders: Sequence[Path], baseline: Path, metric: str) -> pd.DataFrame:
    """Paired tests of every method against the runs of one folder (`significance.compare`).

    Args:
        folders: work directories of finished runs; `baseline` may be among them, and other seeds
            of its method count as the baseline too.
        baseline: the work directory to compare with, of a single method.
        metric: such as NDCG@20.

    Raises:
        UserError: if the runs differ in their users, targets or groups, or `baseline` has several
            methods.
    """
    from seqfair_jax.evaluation import significance  # scipy.stats imports in half a second

    runs = read_runs([baseline, *folders])
    own = set(workdir.finished_folders(baseline.resolve()))
    names = list(dict.fromkeys(run.name for run in runs if run.folder in own))
    if len(names) != 1:
        raise UserError(f"--baseline={baseline} has several methods: {', '.join(names)}")
    before = _per_user([run for run in runs if run.name in names], "overall").get(names[0])
    if before is None:
        raise UserError(f"--baseline={baseline} has no run that succeeded")
    others = [run for run in runs if run.name not in names]
    methods: dict[str, dict[int, pd.DataFrame]] = {}
    for rule in RULES:
        methods |= _per_user(others, rule)
    if not methods:
        raise UserError(
            f"--baseline={baseline}: there is no other method that succeeded; name the folder of "
            "at least one"
        )
    return significance.compare(methods, before, metric)


def _per_user(runs: Sequence[FinishedRun], rule: str) -> dict[str, dict[int, pd.DataFrame]]:
    """Each method's per-user table of each seed, under the name of its row."""
    found: dict[str, dict[int, pd.DataFrame]] = {}
    for run in runs:
        if is_result(run.summary, rule):
            table = pd.read_parquet(workdir.per_user(run.folder, RULES[rule].suffix))
            row = run.name + RULES[rule].label
            found.setdefault(row, {})[run.summary["seed"]] = table
    return found


def method_name(summary: dict[str, Any]) -> str:
    """A run's method, its loss family if it has one, and the objective's values."""
    values = ", ".join(f"{key}={format_value(v)}" for key, v in summary["hparams"].items())
    family = ""
    if summary["needs_groups"]:
        family = f" ({slices.family_label(summary['group_family'])})"
    return f"{summary['method']}{family}{' ' + values if values else ''}"
