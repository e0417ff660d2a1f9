"""Finished runs as text: a table for each group family, and the tests against a baseline."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from seqfair_jax.evaluation import slices
from seqfair_jax.report.runs import FinishedRun, failed_runs, families_of, read_consistent
from seqfair_jax.training.selection import RULES, is_result


def tables(folders: Sequence[Path], metric: str, *, family: str | None = None) -> str:
    """One text table for each group family: a row for each method, then the baselines' rows.

    Runs that differ only in the seed share a row: their mean and, from two seeds on, the
    half-width of its 95 % interval (t distribution). Where runs of one method differ in other
    settings, the rows' names show which. Runs that failed are listed below, and are in no mean.

    Args:
        folders: work directories of finished runs on one log.
        metric: such as NDCG@20.
        family: the one to show; None shows every family that was evaluated.

    Raises:
        UserError: as `runs.read_consistent`.
    """
    runs = read_consistent(folders, metric, family)
    shown = [family] if family is not None else families_of(runs, metric)
    title = f"{runs[0].summary['dataset']['name']}, {metric} on the test targets"
    parts = [
        f"{title}, {slices.family_label(name)}\n{_text(table(runs, metric, name))}"
        for name in shown
    ]
    return "\n\n".join([*parts, *failed_runs(runs)])


def comparison(rows: pd.DataFrame, baseline: Path, metric: str, family: str | None) -> str:
    """What `runs.compare_folders` returned, as text.

    Args:
        rows: from `runs.compare_folders`.
        baseline: the folder that was compared with.
        metric: such as NDCG@20.
        family: whose groups to show; None shows all.
    """
    if family is not None:
        rows = rows[[slices.is_shown(name, [family]) for name in rows["slice"]]]
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


def table(runs: Sequence[FinishedRun], metric: str, family: str) -> pd.DataFrame:
    """The numbers of a text table: columns `name`, `seeds`, and each slice and its `±`."""
    rows: dict[str, list[slices.Slices]] = {}
    for run in runs:
        for rule in RULES.values():
            if is_result(run.summary, rule.name):
                found = run.summary["test" + rule.suffix][metric]
                rows.setdefault(run.name + rule.label, []).append(found)
    for name, metrics in runs[0].summary["baselines"].items():
        rows[f"[{name}]"] = [metrics[metric]]
    known = list(dict.fromkeys(name for found in rows.values() for name in found[0]))
    shown = [
        *slices.groups_in(known, family),
        slices.OVERALL,
        slices.statistic_slice(family, "min"),
        slices.REPEAT,
        slices.NEW,
    ]
    records = []
    for name, seeds in rows.items():
        record: dict[str, Any] = {"name": name, "seeds": len(seeds)}
        for slice_name in shown:
            found = [s.get(slice_name) for s in seeds]  # other runs may have other groups
            values = np.array([value for value in found if value is not None])
            record[slice_name] = values.mean() if len(values) else np.nan
            record[f"{slice_name} ±"] = _half_width(values)
        records.append(record)
    return pd.DataFrame(records)


def shown_slices(numbers: pd.DataFrame) -> list[str]:
    """The slices that a `table` has columns of."""
    return list(numbers.columns[2::2])


def row_label(name: str, seeds: int) -> str:
    """A row's name and, from two on, how many seeds it is the mean of."""
    return f"{name} ({seeds} seeds)" if seeds > 1 else name


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table of text cells."""
    lines = [
        "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"
        for cells in (header, *rows)
    ]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def top_two(values: Iterable[float]) -> list[float]:
    """The best and the second best figure of a column as printed, to four digits; no NaN."""
    return sorted({round(value, 4) for value in values if not np.isnan(value)}, reverse=True)[:2]


def _half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        return np.nan
    quantile = stdtrit(len(values) - 1, 0.975)  # of Student's t
    return float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def _text(numbers: pd.DataFrame) -> str:
    names = [row_label(*row) for row in zip(numbers["name"], numbers["seeds"], strict=True)]
    width = max(map(len, names))
    shown = {"": [name.ljust(width) for name in names]}
    columns = shown_slices(numbers)
    for column, label in zip(columns, slices.labels(columns), strict=True):
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
