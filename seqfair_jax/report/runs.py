"""Reads finished runs and lays them out: the table by group, and the tests against a baseline."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from seqfair_jax import workdir
from seqfair_jax.config import RESUMABLE, flatten
from seqfair_jax.evaluation.metrics import parse_metric

_SELECTIONS = (("test", ""), ("test_worst_group", ", best worst group"))
# Settings that runs of one row may differ in; `method_name` tells the objective's values.
_FREE = {"seeds", "objective.step_size", "objective.stream_rate", "objective.alpha"}
_FREE |= {"objective.radius", *RESUMABLE} - {"train.epochs", "data.group_file"}
SCHEMA_VERSION = 2  # of summary.json


class Run(NamedTuple):
    """A finished run."""

    folder: Path
    name: str  # of its row: runs of one name differ in the seed alone
    summary: dict[str, Any]


def read_summaries(folder: Path) -> list[dict[str, Any]]:
    """The summaries of a folder's runs, in the order of `run_folders`."""
    parts = [workdir.read_json(part / "summary.json") for part in run_folders(folder)]
    return [part for part in parts if part is not None]


def run_folders(folder: Path) -> list[Path]:
    """The folders of a finished work directory's runs.

    Raises:
        ValueError: if there is none: the folder is not a work directory, or not finished; or if
            another version wrote it.
    """
    summary = workdir.read_json(folder / "summary.json")
    if summary is None:
        raise ValueError(
            f"{folder}: no summary.json; name the --workdir of a run that has finished"
        )
    if summary["schema_version"] != SCHEMA_VERSION:
        raise ValueError(
            f"{folder}: summary.json has schema_version {summary['schema_version']}, this version "
            f"reads {SCHEMA_VERSION}; train in a new --workdir, or use the version it was made with"
        )
    if "runs" not in summary:
        return [folder]
    return [folder / "runs" / run["run"] for run in summary["runs"]]


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of work directories, named so that other settings make another name.

    Raises:
        ValueError: if a folder is not finished, or two runs differ in nothing.
    """
    found = []
    # A grid and one of its runs may both be named.
    for part in dict.fromkeys(part for folder in folders for part in run_folders(folder.resolve())):
        summary, config = (
            workdir.read_json(part / f"{name}.json") for name in ("summary", "config")
        )
        if summary is not None:
            settings = dict(flatten(config or {}))
            kept = {key: str(settings[key]) for key in settings if key not in _FREE}
            found.append((part, method_name(summary), kept, summary))
    variants: dict[str, list[dict[str, str]]] = {}
    for _, name, kept, _ in found:
        variants.setdefault(name, []).append(kept)
    runs: dict[tuple, Run] = {}
    for part, name, kept, summary in found:
        differing = [
            f"{key}={kept[key]}"
            for key in kept
            if any(other.get(key) != kept[key] for other in variants[name])
        ]
        run = Run(part, " ".join([name, *differing]), summary)
        first = runs.setdefault((run.name, summary["seed"]), run)
        if first is not run:
            raise ValueError(
                f"{first.folder} and {part} are the same training ({run.name}, seed "
                f"{summary['seed']}): name one of them"
            )
    return list(runs.values())


def read_consistent(folders: Sequence[Path], metric: str, family: str | None) -> list[Run]:
    """All folders' runs, checked to belong into one table.

    Raises:
        ValueError: if a folder is not finished, two runs are the same, the logs differ, or the
            metric or family is not in some run's results.
    """
    parse_metric(metric)
    runs = read_runs(folders)
    first = runs[0]
    for run in runs:
        summary = run.summary
        if summary["dataset"] != first.summary["dataset"]:
            raise ValueError(
                f"{run.folder} was trained on another log or split than {first.folder} "
                f"({summary['dataset']} against {first.summary['dataset']}): no table compares "
                "the two"
            )
        if metric not in summary["baselines"]["most_popular"]:
            known = ", ".join(summary["baselines"]["most_popular"])
            raise ValueError(f"{run.folder}: {metric} was not evaluated; there are {known}")
        families = _families(summary, metric)
        if family is not None and family not in families:
            raise ValueError(
                f"{run.folder}: family {family!r} was not evaluated; there are "
                f"{', '.join(families)}"
            )
    if not families_of(runs, metric):
        raise ValueError("the runs have no family in common that all were evaluated by")
    return runs


def families_of(runs: Sequence[Run], metric: str) -> list[str]:
    """The group families that all runs were evaluated by."""
    found = [_families(run.summary, metric) for run in runs]
    return [name for name in found[0] if all(name in families for families in found)]


def _families(summary: dict[str, Any], metric: str) -> list[str]:
    slices = summary["baselines"]["most_popular"][metric]
    names = dict.fromkeys(name.partition("=")[0] for name in slices if "=" in name)
    return [name for name in names if name != "target"]


def is_shown(slice_name: str, families: Sequence[str]) -> bool:
    """Whether a slice belongs into a table of these families: theirs, overall, repeat and new."""
    owner, equals, _ = slice_name.partition("=")
    return not equals or owner == "target" or owner in families


def tables(folders: Sequence[Path], metric: str, *, family: str | None = None) -> str:
    """One text table a group family: a row a method, then the baselines' rows.

    Runs that differ in the seed alone share a row: their mean and, from two seeds on, the
    half-width of its 95 % interval (t distribution). Where runs of one method differ in other
    settings, the rows' names say which.

    Args:
        folders: work directories of finished runs on one log.
        metric: such as NDCG@20.
        family: the one to show; None shows every family that was evaluated.

    Raises:
        ValueError: as `read_consistent`.
    """
    runs = read_consistent(folders, metric, family)
    shown = [family] if family is not None else families_of(runs, metric)
    titles = f"{runs[0].summary['dataset']['name']}, {metric} on the test targets"
    return "\n\n".join(
        f"{titles}, {name}\n{_text(table(runs, metric, name), name)}" for name in shown
    )


def comparison(rows: pd.DataFrame, baseline: Path, metric: str, family: str | None) -> str:
    """What `compare_folders` returned as text; `family` says whose groups to show, None all."""
    if family is not None:
        rows = rows[[is_shown(slice_name, [family]) for slice_name in rows["slice"]]]
    shown = rows.assign(star=np.where(rows["star"], "*", "")).drop(columns=["mean", "baseline"])
    text = shown.to_string(
        index=False,
        float_format="{:.2g}".format,
        formatters=dict.fromkeys(("difference", "low", "high"), "{:+.4f}".format),
    )
    return (
        f"{metric} against {baseline}: paired t-test over users (* p < 0.05), bootstrap 95 % "
        f"interval, q after Benjamini-Hochberg\n{text}"
    )


def compare_folders(folders: Sequence[Path], baseline: Path, metric: str) -> pd.DataFrame:
    """Paired tests of every method against the runs of one folder (`significance.compare`).

    Args:
        folders: work directories of finished runs; `baseline` may be among them, and other seeds
            of its method are taken to it.
        baseline: the work directory to compare with, of a single method.
        metric: such as NDCG@20.

    Raises:
        ValueError: if the folders do not hold the same users, or `baseline` holds several methods.
    """
    from seqfair_jax import significance  # scipy.stats takes half a second; training needs none

    runs = read_runs([baseline, *folders])
    held = set(run_folders(baseline.resolve()))
    names = list(dict.fromkeys(run.name for run in runs if run.folder in held))
    if len(names) != 1:
        raise ValueError(f"--baseline={baseline} holds several methods: {', '.join(names)}")
    before = _per_user([run for run in runs if run.name in names], "")
    others = [run for run in runs if run.name not in names]
    methods: dict[str, dict[int, pd.DataFrame]] = {}
    for _, suffix in _SELECTIONS:
        methods |= _per_user(others, suffix)
    if not methods:
        raise ValueError(f"--baseline={baseline}: name at least one other folder to compare")
    [tables_before] = before.values()
    return significance.compare(methods, tables_before, metric)


def _per_user(runs: Sequence[Run], suffix: str) -> dict[str, dict[int, pd.DataFrame]]:
    """Each method's per-user table of each seed, under the name that its row has."""
    found: dict[str, dict[int, pd.DataFrame]] = {}
    file = "per_user.parquet" if not suffix else "per_user_worst_group.parquet"
    for run in runs:
        if (run.folder / file).exists():
            table = pd.read_parquet(run.folder / file)
            found.setdefault(run.name + suffix, {})[run.summary["seed"]] = table
    return found


def table(runs: Sequence[Run], metric: str, family: str) -> pd.DataFrame:
    """The same as a table of numbers: columns `name`, `seeds`, and each slice and its `±`."""
    rows: dict[str, list[dict[str, float | None]]] = {}
    for run in runs:
        for key, suffix in _SELECTIONS:
            if key in run.summary:
                rows.setdefault(run.name + suffix, []).append(run.summary[key][metric])
    for name, slices in runs[0].summary["baselines"].items():
        rows[f"[{name}]"] = [slices[metric]]
    slices = next(iter(rows.values()))[0]
    shown = [name for name in slices if name.startswith(f"{family}=")]
    shown += ["overall", f"{family}/min", *(s for s in slices if s.startswith("target="))]
    records = []
    for name, seeds in rows.items():
        record: dict[str, Any] = {"name": name, "seeds": len(seeds)}
        for slice_name in shown:
            values = np.array([s[slice_name] for s in seeds if s[slice_name] is not None])
            record[slice_name] = values.mean() if len(values) else np.nan
            record[f"{slice_name} ±"] = _half_width(values)
        records.append(record)
    return pd.DataFrame(records)


def shown_slices(numbers: pd.DataFrame) -> list[str]:
    """The slices that a `table` has columns of."""
    return list(numbers.columns[2::2])


def labels(slices: Sequence[str], family: str) -> list[str]:
    """What the slices' columns are headed in a family's table: 'niche' for 'pop33=niche'."""
    short = [
        "worst" if name == f"{family}/min" else name.partition("=")[2] or name for name in slices
    ]
    return [
        label if short.count(label) == 1 else name
        for name, label in zip(slices, short, strict=True)
    ]


def row_label(name: str, seeds: int) -> str:
    """A row's name and, from two on, how many seeds it is the mean of."""
    return f"{name} ({seeds} seeds)" if seeds > 1 else name


def best_values(scores: Mapping[Any, Sequence[float]]) -> Any:
    """The key whose scores have the best mean over seeds; None where nothing was scored.

    A key that misses a seed, since its run failed, is no candidate while another has more.
    """
    most = max(map(len, scores.values()), default=0)
    means = {key: np.mean(found) for key, found in scores.items() if len(found) == most > 0}
    return max(means, key=means.__getitem__, default=None)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table of text cells."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def top_two(values: Iterable[float]) -> list[float]:
    """The best and the second best figure of a column as printed, to four digits; NaN is none."""
    return sorted({round(value, 4) for value in values if not np.isnan(value)}, reverse=True)[:2]


def _half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        return np.nan
    quantile = stdtrit(len(values) - 1, 0.975)  # of Student's t
    return float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def method_name(summary: dict[str, Any]) -> str:
    """A run's method, its loss family if it has one, and the objective's values."""
    values = ", ".join(f"{key}={value:g}" for key, value in summary["hparams"].items())
    family = f" ({summary['group_family']})" if summary["needs_groups"] else ""
    return f"{summary['method']}{family}{' ' + values if values else ''}"


def _text(numbers: pd.DataFrame, family: str) -> str:
    names = [row_label(*row) for row in zip(numbers["name"], numbers["seeds"], strict=True)]
    width = max(map(len, names))
    shown = {"": [name.ljust(width) for name in names]}
    slices = shown_slices(numbers)
    for column, label in zip(slices, labels(slices, family), strict=True):
        shown[label] = [
            "-" if np.isnan(value) else f"{value:.4f}" + ("" if np.isnan(half) else f"±{half:.4f}")
            for value, half in zip(numbers[column], numbers[f"{column} ±"], strict=True)
        ]
    lines = pd.DataFrame(shown).to_string(index=False).splitlines()
    first_baseline = next(
        (i for i, name in enumerate(names, start=1) if name.startswith("[")), len(lines)
    )
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:first_baseline], rule, *lines[first_baseline:]])
