"""Reads finished runs and lays them out: the table by group, and the tests against a baseline."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from seqfair_jax import workdir
from seqfair_jax.metrics import parse_metric

_SELECTIONS = (("test", ""), ("test_worst_group", ", best worst group"))


def read_summaries(folder: Path) -> list[dict[str, Any]]:
    """The summaries of a folder's runs, in the order of `run_folders`."""
    parts = [workdir.read_json(part / "summary.json") for part in run_folders(folder)]
    return [part for part in parts if part is not None]


def run_folders(folder: Path) -> list[Path]:
    """The folders of a finished work directory's runs.

    Raises:
        ValueError: if there is none: the folder is not a work directory, or not finished.
    """
    summary = workdir.read_json(folder / "summary.json")
    if summary is None:
        raise ValueError(
            f"{folder}: no summary.json; name the --workdir of a run that has finished"
        )
    if "runs" not in summary:
        return [folder]
    return [folder / "runs" / run["run"] for run in summary["runs"]]


def read_consistent(
    folders: Sequence[Path], metric: str, family: str | None
) -> list[dict[str, Any]]:
    """The summaries of all folders' runs, checked to belong into one table.

    Raises:
        ValueError: if a folder is not finished, the logs differ, or the metric or family is not in
            the results.
    """
    parse_metric(metric)
    by_folder = [(folder, summary) for folder in folders for summary in read_summaries(folder)]
    first = by_folder[0][1]
    for folder, summary in by_folder:
        if summary["dataset"] != first["dataset"]:
            raise ValueError(
                f"{folder} was trained on another log or split than {folders[0]} "
                f"({summary['dataset']} against {first['dataset']}): no table compares the two"
            )
    any_test = first["baselines"]["most_popular"]
    if metric not in any_test:
        raise ValueError(f"{metric} was not evaluated; there are {', '.join(any_test)}")
    summaries = [summary for _, summary in by_folder]
    families = families_of(summaries, metric)
    if family is not None and family not in families:
        raise ValueError(f"family {family!r} was not evaluated; there are {', '.join(families)}")
    return summaries


def families_of(summaries: Sequence[dict[str, Any]], metric: str) -> list[str]:
    """The group families that runs were evaluated by."""
    slices = summaries[0]["baselines"]["most_popular"][metric]
    return [
        name
        for name in dict.fromkeys(name.partition("=")[0] for name in slices if "=" in name)
        if name != "target"
    ]


def is_shown(slice_name: str, families: Sequence[str]) -> bool:
    """Whether a slice belongs into a table of these families: theirs, overall, repeat and new."""
    owner, equals, _ = slice_name.partition("=")
    return not equals or owner == "target" or owner in families


def tables(folders: Sequence[Path], metric: str, *, family: str | None = None) -> str:
    """One text table a group family: a row a method, then the baselines' rows.

    Runs that differ in the seed alone share a row: their mean and, from two seeds on, the
    half-width of its 95 % interval (t distribution).

    Args:
        folders: work directories of finished runs on one log.
        metric: such as NDCG@20.
        family: the one to show; None shows every family that was evaluated.

    Raises:
        ValueError: if a folder is not finished, the logs differ, or the metric or family is not in
            the results.
    """
    summaries = read_consistent(folders, metric, family)
    shown = [family] if family is not None else families_of(summaries, metric)
    titles = f"{summaries[0]['dataset']['name']}, {metric} on the test targets"
    return "\n\n".join(
        f"{titles}, {name}\n{_text(table(summaries, metric, name))}" for name in shown
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
        folders: work directories of finished runs; `baseline` may be among them.
        baseline: the work directory to compare with, of a single method.
        metric: such as NDCG@20.

    Raises:
        ValueError: if the folders do not hold the same users, or `baseline` holds several methods.
    """
    from seqfair_jax import significance  # scipy.stats takes half a second; training needs none

    before = _per_user([baseline], "")
    if len(before) != 1:
        raise ValueError(f"--baseline={baseline} holds several methods: {', '.join(before)}")
    methods: dict[str, list[pd.DataFrame]] = {}
    others = [folder for folder in folders if folder.resolve() != baseline.resolve()]
    for _, suffix in _SELECTIONS:
        methods |= _per_user(others, suffix)
    if not methods:
        raise ValueError(f"--baseline={baseline}: name at least one other folder to compare")
    [tables_before] = before.values()
    return significance.compare(methods, tables_before, metric)


def _per_user(folders: Sequence[Path], suffix: str) -> dict[str, list[pd.DataFrame]]:
    """Each method's per-user tables, one a seed, under the name that its row has."""
    found: dict[str, list[pd.DataFrame]] = {}
    file = "per_user.parquet" if not suffix else "per_user_worst_group.parquet"
    for folder in folders:
        for part in run_folders(folder):
            summary = workdir.read_json(part / "summary.json")
            if summary is not None and (part / file).exists():
                table = pd.read_parquet(part / file)
                found.setdefault(method_name(summary) + suffix, []).append(table)
    return found


def table(summaries: Sequence[dict[str, Any]], metric: str, family: str) -> pd.DataFrame:
    """The same as a table of numbers: columns `name`, the slices, and each slice's `±`."""
    rows: dict[str, list[dict[str, float | None]]] = {}
    for summary in summaries:
        for key, suffix in _SELECTIONS:
            if key in summary:
                rows.setdefault(method_name(summary) + suffix, []).append(summary[key][metric])
    for name, slices in summaries[0]["baselines"].items():
        rows[f"[{name}]"] = [slices[metric]]
    records = []
    for name, seeds in rows.items():
        seeds_note = f" ({len(seeds)} seeds)" if seeds[1:] else ""
        record: dict[str, Any] = {"name": name + seeds_note}
        for slice_name in seeds[0]:
            if slice_name.startswith((f"{family}=", "overall", "target=")) or (
                slice_name == f"{family}/min"
            ):
                column = slice_name.removeprefix(f"{family}=").removeprefix("target=")
                column = "worst" if column == f"{family}/min" else column
                values = np.array([s[slice_name] for s in seeds if s[slice_name] is not None])
                record[column] = values.mean() if len(values) else np.nan
                record[f"{column} ±"] = _half_width(values)
        records.append(record)
    columns = pd.DataFrame(records)
    slices = [name for name in columns if name != "name" and not str(name).endswith("±")]
    ordered = [c for c in slices if c not in ("overall", "worst", "repeat", "new")]
    ordered += [c for c in ("overall", "worst", "repeat", "new") if c in slices]
    return columns[["name", *(x for c in ordered for x in (c, f"{c} ±"))]]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table of text cells."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def top_two(values: Iterable[float]) -> list[float]:
    """The best and the second best figure of a column as printed, to four digits; NaN is none."""
    return sorted({round(value, 4) for value in values if not np.isnan(value)}, reverse=True)[:2]


def without_seeds(name: str) -> str:
    """A row's name without what `table` adds on the number of seeds."""
    return re.sub(r" \(\d+ seeds\)$", "", name)


def _half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        return np.nan
    quantile = stdtrit(len(values) - 1, 0.975)  # of Student's t
    return float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def method_name(summary: dict[str, Any]) -> str:
    """What a run's row is called: all that sets it apart but the seed."""
    values = ", ".join(f"{key}={value:g}" for key, value in summary["hparams"].items())
    family = f" ({summary['group_family']})" if summary["needs_groups"] else ""
    return f"{summary['method']}{family}{' ' + values if values else ''}"


def _text(numbers: pd.DataFrame) -> str:
    width = max(len(name) for name in numbers["name"])
    shown = {"": [name.ljust(width) for name in numbers["name"]]}
    for column in numbers.columns[1::2]:
        shown[column] = [
            "-" if np.isnan(value) else f"{value:.4f}" + ("" if np.isnan(half) else f"±{half:.4f}")
            for value, half in zip(numbers[column], numbers[f"{column} ±"], strict=True)
        ]
    lines = pd.DataFrame(shown).to_string(index=False).splitlines()
    first_baseline = next(
        (i for i, name in enumerate(numbers["name"], start=1) if name.startswith("[")), len(lines)
    )
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:first_baseline], rule, *lines[first_baseline:]])
