"""Which values of a method's hyperparameters validate best, from the jobs of a sweep."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from seqfair_jax import workdir
from seqfair_jax.report import names
from seqfair_jax.sweeps.jobs import Job
from seqfair_jax.training.selection import RULES, best_values, is_result, score

Values = tuple[tuple[str, float], ...]  # of the hyperparameters, by name


class Result(NamedTuple):
    """A finished run of a job."""

    method: str
    family: str  # of the loss, as the sweep names it; "" for a method that needs no groups
    summary: dict[str, Any]
    folder: Path

    @property
    def values(self) -> Values:
        """The values of the method's hyperparameters."""
        return tuple(sorted(self.summary["hparams"].items()))


class Entry(NamedTuple):
    """A method at the hyperparameters that validate best: one run a seed."""

    method: str
    family: str  # of the loss, canonical; "" for a method that needs no groups
    hparams: dict[str, float]
    summaries: list[dict[str, Any]]
    per_user: dict[int, pd.DataFrame]  # by seed

    @property
    def name(self) -> str:
        """The method, and its loss family if it has one: 'gdro(pop33)'."""
        return names.method_name(self.method, self.family, form="key")


def read_job(job: Job, directory: Path) -> list[Result]:
    """The runs of a finished job, also those that failed. This checks all their files.

    Args:
        job: of the sweep.
        directory: the sweep's folder.

    Raises:
        UserError: as `workdir.finished_folders`.
    """
    parts = workdir.finished_folders(workdir.job_folder(directory, job.name))
    return [Result(job.method, job.family or "", workdir.read_summary(p), p) for p in parts]


def choose_values(
    results: Iterable[Result], rule: str, *, seeds: Sequence[int], families: Sequence[str]
) -> dict[tuple[str, str], dict[str, float]]:
    """For every method and loss family, the hyperparameters that validate best.

    The score is the validation metric averaged over seeds, at each run's best epoch: overall
    (rule "overall", the paper's) or of the worst group of the loss's family that is large enough
    (rule "worst_group"). Runs that failed do not count, and neither does a value that lacks a
    seed of another value because a run failed (`selection.candidates`).

    Args:
        results: the runs of a sweep's finished jobs.
        rule: a key of `selection.RULES`.
        seeds: those that the score is averaged over (`grid.choice_seeds`).
        families: the sweep's own, which intersections are made of.

    Returns:
        The values by method and loss family ("" for none). Intersections are left out: they use
        the values of the first family.
    """
    scores: dict[tuple[str, str], dict[Values, list[float]]] = {}
    for result in results:
        if is_result(result.summary, rule) and result.family in ("", *families):
            points = scores.setdefault((result.method, result.family), {})
            found = points.setdefault(result.values, [])
            if result.summary["seed"] in seeds:
                found.append(score(result.summary, rule))
    best = {key: best_values(points) for key, points in scores.items()}
    return {key: dict(values) for key, values in best.items() if values is not None}


def choose(
    results: Sequence[Result], rule: str, *, seeds: Sequence[int], families: Sequence[str]
) -> list[Entry]:
    """Every method and loss family at the values that validate best, with all seeds of these.

    An intersection of families uses the values that the same rule chose for the first family.

    Args:
        results, rule, seeds, families: as for `choose_values`.
    """
    best = choose_values(results, rule, seeds=seeds, families=families)
    runs: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        if is_result(result.summary, rule):
            runs.setdefault((result.method, result.family), []).append(result)
    entries = []
    for (method, family), found in runs.items():
        values = best.get((method, family if family in ("", *families) else families[0]))
        chosen = [result for result in found if dict(result.values) == values]
        if values is None or not chosen:  # nothing was scored, or the runs of the values failed
            continue
        tables = {
            result.summary["seed"]: pd.read_parquet(
                workdir.per_user(result.folder, RULES[rule].suffix)
            )
            for result in chosen
        }
        summaries = [result.summary for result in chosen]
        canonical = summaries[0]["group_family"] if family else ""
        entries.append(Entry(method, canonical, values, summaries, tables))
    return entries
