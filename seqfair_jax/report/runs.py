"""Reads finished runs, and tests them against a baseline run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from seqfair_jax import workdir
from seqfair_jax.config import RESUMABLE, flatten, format_value
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices
from seqfair_jax.evaluation.metrics import parse_metric
from seqfair_jax.training.selection import RULES, is_result

# Settings that runs of one row may differ in; `method_name` shows the objective's values.
_FREE = {"seeds", "objective.step_size", "objective.stream_rate", "objective.alpha"}
_FREE |= {"objective.radius", *RESUMABLE} - {"train.epochs", "data.group_file"}


class FinishedRun(NamedTuple):
    """A finished run. One that failed is read too; `selection.is_result` tells them apart."""

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
        run = FinishedRun(part, " ".join([name, *differing]), summary)
        first = runs.setdefault((run.name, summary["seed"]), run)
        if first is not run:
            raise UserError(
                f"{first.folder} and {part} are the same training ({run.name}, seed "
                f"{summary['seed']}): name one of them"
            )
    return list(runs.values())


def read_consistent(folders: Sequence[Path], metric: str, family: str | None) -> list[FinishedRun]:
    """All folders' runs, checked to belong into one table.

    Raises:
        UserError: if a folder is not finished, two runs are the same, the logs differ, or the
            metric or family is not in some run's results.
    """
    parse_metric(metric)
    runs = read_runs(folders)
    first = runs[0]
    for run in runs:
        summary = run.summary
        if summary["dataset"] != first.summary["dataset"]:
            raise UserError(
                f"{run.folder} was trained on another log or split than {first.folder} "
                f"({summary['dataset']} against {first.summary['dataset']}): they cannot be "
                "compared in one table"
            )
        if metric not in _baseline(summary):
            raise UserError(
                f"{run.folder}: {metric} was not evaluated; there are "
                f"{', '.join(_baseline(summary))}"
            )
        families = slices.families_in(_baseline(summary)[metric])
        if family is not None and family not in families:
            raise UserError(
                f"{run.folder}: family {family!r} was not evaluated; there are "
                f"{', '.join(families)}"
            )
    if not families_of(runs, metric):
        raise UserError("the runs have no family in common that all were evaluated by")
    return runs


def families_of(runs: Sequence[FinishedRun], metric: str) -> list[str]:
    """The group families that all runs were evaluated by."""
    found = [slices.families_in(_baseline(run.summary)[metric]) for run in runs]
    return [name for name in found[0] if all(name in families for families in found)]


def _baseline(summary: dict[str, Any]) -> dict[str, slices.Slices]:
    """The metrics of the baseline that is always there."""
    return summary["baselines"]["most_popular"]


def failed_runs(runs: Sequence[FinishedRun]) -> list[str]:
    """A line for each run that failed, and so is in no mean."""
    return [
        f"{run.name}, seed {run.summary['seed']}: {run.summary['status']}; it is left out"
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
        UserError: if the folders do not hold the same users, or `baseline` holds several methods.
    """
    from seqfair_jax.evaluation import significance  # scipy.stats imports in half a second

    runs = read_runs([baseline, *folders])
    held = set(workdir.finished_folders(baseline.resolve()))
    names = list(dict.fromkeys(run.name for run in runs if run.folder in held))
    if len(names) != 1:
        raise UserError(f"--baseline={baseline} holds several methods: {', '.join(names)}")
    before = _per_user([run for run in runs if run.name in names], "overall").get(names[0])
    if before is None:
        raise UserError(f"--baseline={baseline} has no run that succeeded")
    others = [run for run in runs if run.name not in names]
    methods: dict[str, dict[int, pd.DataFrame]] = {}
    for rule in RULES:
        methods |= _per_user(others, rule)
    if not methods:
        raise UserError(f"--baseline={baseline}: name at least one other folder to compare")
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
    family = f" ({summary['group_family']})" if summary["needs_groups"] else ""
    return f"{summary['method']}{family}{' ' + values if values else ''}"
