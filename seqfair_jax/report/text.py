"""Finished runs as text: a table for each group family, and the tests against a baseline."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from seqfair_jax.data.groups import encode_name
from seqfair_jax.evaluation import slices
from seqfair_jax.report.names import baseline_name, is_baseline
from seqfair_jax.report.runs import FinishedRun, failed_runs, read_runs, shared_families
from seqfair_jax.training.selection import RULES, is_result

# What Markdown would read as markup: an underscore between letters is none, a bracket only before
# the target of a link, an ampersand only in an entity, a colon only in an emoji's name.
_MARKUP = re.compile(r"[\\`*<|~$]|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[])|&(?=#?\w+;)|:(?=[\w+-]+:)")


class Markdown(str):
    """Text that is Markdown already, and so is not escaped."""


def tables(folders: Sequence[Path], metric: str, *, family: str | None = None) -> str:
    """The text tables of the finished runs in work directories (`run_tables`)."""
    return run_tables(read_runs(folders), metric, family=family)


def run_tables(runs: Sequence[FinishedRun], metric: str, *, family: str | None = None) -> str:
    """One text table for each group family: a row for each method, then the baselines' rows.

    Runs that differ only in the seed share a row: their mean and, from two seeds on, the
    half-width of its 95 % interval (t distribution). If runs of one method differ in other
    settings, the rows' names show which. Runs that failed are listed below, and are in no mean.

    Args:
        runs: finished runs on one log, from `runs.read_runs`.
        metric: such as NDCG@20.
        family: the one to show, as its user wrote it; None shows all that the runs share.

    Raises:
        UserError: as `runs.shared_families`.
    """
    families = shared_families(runs, metric, family)
    title = f"{runs[0].summary['dataset']['name']}, {metric} on the test targets"
    parts = [
        f"{title}, {slices.family_label(name)}\n{_text(table(runs, metric, name))}"
        for name in families
    ]
    return "\n\n".join([*parts, *failed_runs(runs)])


def comparison(rows: pd.DataFrame, baseline: Path, metric: str, family: str | None) -> str:
    """The tests against a baseline as text.

    Args:
        rows: from `runs.compare_runs`.
        baseline: the folder that was compared with.
        metric: such as NDCG@20.
        family: as for `tables`.
    """
    if family is not None:
        names = (family, encode_name(family))
        rows = rows[[slices.is_shown(name, names) for name in rows["slice"]]]
    shown = rows.assign(
        slice=rows["slice"].map(slices.full_label), star=np.where(rows["star"], "*", "")
    ).drop(columns=["mean", "baseline"])
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
        rows[baseline_name(name)] = [metrics[metric]]
    # Runs may differ in the groups of a family; a slice that a run lacks is NaN.
    known = dict.fromkeys(name for found in rows.values() for seed in found for name in seed)
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
            found = [seed.get(slice_name) for seed in seeds]
            values = np.array([value for value in found if value is not None])
            record[slice_name] = values.mean() if len(values) else np.nan
            record[f"{slice_name} ±"] = _half_width(values)
        records.append(record)
    return pd.DataFrame(records)


def shown_slices(numbers: pd.DataFrame) -> list[str]:
    """The slices in the columns of a `table`."""
    return list(numbers.columns[2::2])


def row_label(name: str, seeds: int) -> str:
    """A row's name and, for a mean over several seeds, their number."""
    return f"{name} ({seeds} seeds)" if seeds > 1 else name


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A GitHub table; cells are plain text, except `Markdown` ones."""
    lines = ["| " + " | ".join(map(escape_markdown, cells)) + " |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def escape_markdown(text: str) -> str:
    """Text that Markdown shows as it is; `Markdown` is returned unchanged."""
    if isinstance(text, Markdown):
        return text
    return _MARKUP.sub(r"\\\g<0>", slices.printable(text))


def best_places(values: Iterable[float], is_method: Iterable[bool]) -> list[int]:
    """For each figure of a column 1 if it is the best, 2 if it is the second best, otherwise 0.

    Figures are compared as printed, to four digits, and equal ones share a place. Baselines have
    none.
    """
    printed = [
        round(value, 4) if method else np.nan
        for value, method in zip(values, is_method, strict=True)
    ]
    top = sorted({value for value in printed if not np.isnan(value)}, reverse=True)[:2]
    return [top.index(value) + 1 if value in top else 0 for value in printed]


def _half_width(values: np.ndarray) -> float:
    if len(values) < 2:
        return np.nan
    quantile = stdtrit(len(values) - 1, 0.975)  # of Student's t
    return float(quantile * values.std(ddof=1) / len(values) ** 0.5)


def _text(numbers: pd.DataFrame) -> str:
    names = [row_label(*row) for row in zip(numbers["name"], numbers["seeds"], strict=True)]
    width = max(map(len, names))
    columns = shown_slices(numbers)
    cells = [[name.ljust(width) for name in names]]
    for column in columns:
        halves = numbers[f"{column} ±"]
        cells.append(
            [
                "-" if np.isnan(value) else f"{value:.4f}" + _spread(half)
                for value, half in zip(numbers[column], halves, strict=True)
            ]
        )
    shown = pd.DataFrame(list(zip(*cells, strict=True)), columns=["", *slices.labels(columns)])
    lines = shown.to_string(index=False).splitlines()
    first_baseline = next(
        (i for i, name in enumerate(names, start=1) if is_baseline(name)), len(lines)
    )
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:first_baseline], rule, *lines[first_baseline:]])


def _spread(half: float) -> str:
    return "" if np.isnan(half) else f"±{half:.4f}"
