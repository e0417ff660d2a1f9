"""The test of trained runs, or what is kept of a refit, and what `summary.json` says of them.

Shape letters: U users.
"""

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.data.files import log_title
from seqfair_jax.data.groups import GroupFamily
from seqfair_jax.data.split import Dataset
from seqfair_jax.devices import is_first_process, to_host, wait_for_all
from seqfair_jax.errors import DivergedError
from seqfair_jax.evaluation.baselines import Tuning, compute_baselines
from seqfair_jax.evaluation.metrics import item_popularity
from seqfair_jax.evaluation.slices import OVERALL, Slices, group_slice, list_means, target_means
from seqfair_jax.serving.catalogue import target_columns
from seqfair_jax.training import checkpoint, selection
from seqfair_jax.training.experiment import Experiment
from seqfair_jax.training.loop import make_validation
from seqfair_jax.training.progress import Snapshot
from seqfair_jax.training.step import run_params

_log = logging.getLogger(__name__)


def test(
    experiment: Experiment, folder: Path, snapshot: Snapshot, inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Test the best epochs of every run and write the results.

    Args:
        experiment, folder: as for `loop.fit`.
        snapshot: as `loop.fit` returned it.
        inputs: SHA-256 of the log's files and of the group file (`data.cache.source_hashes`).

    Returns:
        The content of `folder/summary.json`; without the baselines on all processes but the first,
        which writes it.

    Raises:
        DivergedError: if no run can be tested.
    """
    config = experiment.config
    judge = Judge(experiment.dataset, experiment.families, config)
    tester = _Tester(experiment, judge)
    folders = workdir.run_folders(folder, experiment.names)
    tested: list[dict[str, Any]] = []  # of each run; empty where a score is not finite
    with ThreadPool(1) as beside:  # the host computes the baselines while the device ranks
        baselines = beside.apply_async(judge.baselines, [config]) if is_first_process() else None
        for r, part in enumerate(folders):
            try:
                tested.append(tester.test_run(snapshot, r, part))
            except DivergedError as error:
                _log.warning("%s", error)
                tested.append({})
        baseline_table, found = baselines.get() if baselines else (pd.DataFrame(), {})
    wait_for_all("the baselines")
    shared = _shared(experiment, snapshot)
    shared |= {"validation_sizes": judge.validation_sizes, **found}
    summaries = _of_runs(experiment, snapshot, shared)
    for part, summary, of_test in zip(folders, summaries, tested, strict=True):
        summary |= of_test
        if not of_test and summary["status"] == selection.FINISHED:
            summary["status"] = "failed in the test"
        workdir.write_parquet(part / workdir.BASELINES, baseline_table)
    selected = _select_hparams(config, summaries)
    return _finish(folder, folders, shared, summaries, selected, inputs)


def keep_refit(
    experiment: Experiment, folder: Path, snapshot: Snapshot, inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Keep the last epoch of every run of a refit, which has no test, and write `summary.json`.

    Args, Returns, Raises: as for `test`.
    """
    shared = _shared(experiment, snapshot) | {"refit": snapshot.progress.refit}
    summaries = _of_runs(experiment, snapshot, shared)
    folders = workdir.run_folders(folder, experiment.names)
    epoch = {"epoch": snapshot.progress.epoch}
    for r, (part, summary) in enumerate(zip(folders, summaries, strict=True)):
        if summary["status"] == selection.FINISHED:
            summary["best"] = best = _with_step(epoch, experiment)
            params = run_params(experiment.mesh, snapshot.best["overall"], r)
            checkpoint.save(workdir.best_checkpoint(part, "overall"), params, best)
    finished = [summary for summary in summaries if selection.has_parameters(summary)]
    selected = {"hparams": summaries[0]["hparams"], "seeds": len(finished)} if finished else None
    return _finish(folder, folders, shared, summaries, selected, inputs)


def _shared(experiment: Experiment, snapshot: Snapshot) -> dict[str, Any]:
    """What the summaries of all runs say."""
    config, method = experiment.config, experiment.task.objective.method
    shared = {
        "schema_version": workdir.SCHEMA_VERSION,
        "dataset": dataset_summary(experiment.dataset, config),
        "method": config.objective.name,
        "group_family": experiment.loss_family.name,
        "needs_groups": method.needs_groups,
        "label": method.label,
        "logs": [log._asdict() for log in method.logs],
    }
    if snapshot.progress.init_from:
        shared["init_from"] = snapshot.progress.init_from
    return shared


def _of_runs(
    experiment: Experiment, snapshot: Snapshot, shared: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The summary of each run, without what its parameters give."""
    states, progress = snapshot.states, snapshot.progress
    failed_steps, steps = to_host((states.failed_step, states.step))
    seconds = progress.seconds
    return [
        {
            **shared,
            "run": spec.name,
            "hparams": spec.hparams,
            "seed": spec.seed,
            "status": selection.status(int(failed_steps[r])),
            "train": {  # the time is that of all runs together, without compilation
                "steps": int(steps[r]),
                "targets": progress.targets[r],
                "seconds": seconds,
                "targets_per_second": progress.timed_targets / seconds if seconds else None,
                "stopped_epoch": progress.stopped[r],
            },
        }
        for r, spec in enumerate(experiment.runs)
    ]


def _finish(
    folder: Path,
    folders: Sequence[Path],
    shared: Mapping[str, Any],
    summaries: Sequence[dict[str, Any]],
    selected: dict[str, Any] | None,
    inputs: Mapping[str, str],
) -> dict[str, Any]:
    """Write the summaries of the runs, and of a grid, and mark all as finished.

    Args:
        folder: the work directory.
        folders: of the runs.
        shared: what their summaries have in common.
        summaries: of the runs.
        selected: the values that validation selected; None if every run failed.
        inputs: as for `test`.

    Returns:
        The content of `folder/summary.json`.

    Raises:
        DivergedError: if every run failed.
    """
    for part, summary in zip(folders, summaries, strict=True):
        workdir.write_json(part / workdir.SUMMARY, summary)
    if not any("best" in summary for summary in summaries):
        raise DivergedError("every run diverged; try a smaller train.learning_rate")
    for part in folders:
        workdir.finish(part, inputs)
    whole = summaries[0]
    if len(summaries) > 1:
        kept = ("run", "hparams", "seed", "status", "best", "val")
        runs = [{key: summary.get(key) for key in kept} for summary in summaries]
        whole = {**shared, "runs": runs, "selected": selected}
        workdir.write_json(folder / workdir.SUMMARY, whole)
        workdir.finish(folder, inputs)
    wait_for_all("the results")
    return whole


def _with_step(chosen: Mapping[str, Any], experiment: Experiment) -> dict[str, Any]:
    """An epoch that is kept, with the step after which it was."""
    return {"step": chosen["epoch"] * experiment.config.train.steps_per_epoch, **chosen}


class _Tester:
    """Tests the best epochs of runs; an epoch that both rules chose is tested once."""

    def __init__(self, experiment: Experiment, judge: "Judge"):
        self._experiment, self._judge = experiment, judge
        self._rank = experiment.make_ranker("test", top_k=judge.top_k)

    @functools.cached_property
    def _validate(self) -> Callable[[Any, str], dict[str, Slices]]:
        return make_validation(self._experiment)

    def test_run(self, snapshot: Snapshot, r: int, folder: Path) -> dict[str, Any]:
        """Run r's part of `summary.json`; writes its per-user tables and best parameters."""
        experiment = self._experiment
        name = experiment.names[r]
        # A run that failed before its first validation has no best epoch.
        best = {rule: dict(found) for rule, found in snapshot.progress.best[r].items() if found}
        val = {rule: chosen.pop(selection.VAL) for rule, chosen in best.items()}
        params = {rule: run_params(experiment.mesh, snapshot.best[rule], r) for rule in best}
        tested: dict[float, tuple] = {}  # by epoch
        for rule, chosen in best.items():  # all, before any is written: a score may not be finite
            if chosen["epoch"] not in tested:
                ranking = self._rank(params[rule], f"test of {name}")
                tested[chosen["epoch"]] = (
                    val[rule] or self._validate(params[rule], name),
                    *self._judge.ranks(ranking.ranks),
                    self._judge.lists(ranking.top_items),
                )
        found: dict[str, Any] = {}
        for rule, chosen in best.items():
            scores, table, means, recommended = tested[chosen["epoch"]]
            suffix = selection.RULES[rule].suffix
            # The epoch, and the validation scores that epochs are chosen by.
            found["best" + suffix] = _with_step(chosen, experiment)
            found["val" + suffix] = scores
            found["test" + suffix] = means
            found["recommended" + suffix] = recommended
            workdir.write_parquet(workdir.per_user(folder, suffix), table)
            checkpoint.save(workdir.best_checkpoint(folder, rule), params[rule], chosen)
        return found


class Judge:
    """Turns the ranks and lists of any recommender into the figures of the test.

    Shape letters: n users who are tested, m targets of all of them, K length of a list.
    """

    def __init__(self, dataset: Dataset, families: Sequence[GroupFamily], config: ConfigDict):
        """Choose what is measured.

        Args:
            dataset: the split log.
            families: the groups, of all users.
            config: its `evaluate.cutoffs` and `select.min_users`.
        """
        self._dataset, self._cutoffs = dataset, tuple(config.evaluate.cutoffs)
        self._min_users = config.select.min_users
        self._families = [family.select(dataset.test.users) for family in families]
        self._popularity = item_popularity(
            dataset.item_counts, dataset.audience, len(dataset.user_ids)
        )
        self.top_k = min(max(self._cutoffs), len(dataset.item_ids))  # how long the lists must be
        # The validation users of each group, in which it is judged when validation chooses.
        self.validation_sizes = {
            group_slice(family.name, group): int(size)
            for family in families
            for group, size in zip(
                family.groups, family.membership[dataset.valid.users].sum(axis=0), strict=True
            )
        }

    def ranks(self, ranks: np.ndarray) -> tuple[pd.DataFrame, dict[str, Slices]]:
        """A row for each user who is tested, and the means by group.

        Args:
            ranks: i32[m] of the test targets, 1-based; 0 for a miss.
        """
        targets = self._dataset.test
        values, means = target_means(
            ranks, targets, self._families, self._cutoffs, min_users=self._min_users
        )
        # The model cannot rank a target outside the vocabulary. It counts as a miss.
        rank = pd.array(ranks, dtype="Int32")
        rank[(targets.items < 0) & (ranks == 0)] = pd.NA
        table = pd.DataFrame(
            {
                "user_id": self._dataset.user_ids[targets.users],
                **target_columns(
                    targets,
                    {"target_item_id": targets.item_ids, "repeat": targets.repeat, "rank": rank},
                ),
                **values,
                **{family.name: family.labels() for family in self._families},
            }
        )
        return table, means

    def lists(self, top_items: np.ndarray) -> dict[str, Slices]:
        """What is recommended, by group: `metrics.recommendation_stats`.

        Args:
            top_items: i[n, K], as there.
        """
        return list_means(top_items, self._families, self._cutoffs, self._popularity)

    def baselines(self, config: ConfigDict) -> tuple[pd.DataFrame, dict[str, Any]]:
        """The baselines' metrics of each user, for paired tests, and their part of `summary.json`.

        That part has their means by group, `baselines`, and what validation chose for those with
        numbers of their own, `baseline_choices`.

        Args:
            config: its parts `evaluate` and `select`, and its cache folder.
        """
        settings = config.evaluate
        kept = compute_baselines(
            self._dataset,
            mask_seen=settings.mask_seen,
            tuning=Tuning(config.select.metric, settings.neighbour_draws, settings.ease_items),
            k=self.top_k,
            cache_dir=config.data.cache_dir,
        )
        for name, choice in kept.choices.items():
            if "left_out" in choice:
                _log.info("The baseline %s is left out. %s", name, choice["left_out"])
        scored = {name: self.ranks(rank) for name, rank in zip(kept.names, kept.ranks, strict=True)}
        parts = [
            table[["user_id", *(c for c in map(str, table) if "@" in c)]].assign(baseline=name)
            for name, (table, _) in scored.items()
        ]
        means = {name: means for name, (_, means) in scored.items()}
        found = {"baselines": means, "baseline_choices": kept.choices}
        return pd.concat(parts, ignore_index=True), found


def _select_hparams(config: ConfigDict, summaries: list[dict]) -> dict[str, Any] | None:
    """The values with the best validation score averaged over seeds; None if all runs failed."""
    metric = config.select.metric
    scores: dict[tuple, list[float]] = {}
    for summary in filter(selection.is_result, summaries):
        values = tuple(summary["hparams"].items())
        scores.setdefault(values, []).append(selection.score(summary, "overall"))
    best = selection.best_values(scores)
    if best is None:
        return None
    return {
        "hparams": dict(best),
        f"val/{metric}/{OVERALL}": float(np.mean(scores[best])),
        "seeds": len(scores[best]),
    }


def warn_of_masked_targets(dataset: Dataset, mask_seen: bool) -> None:
    """Warn if `evaluate.mask_seen` tells the ranking which items of the history are targets."""
    repeated = int(dataset.test.repeat.sum())
    if mask_seen and repeated:
        _log.warning(
            "%s of the %s test targets are items of the user's history. evaluate.mask_seen hides "
            "the other items of the history, but not the targets, so their ranks are too good: set "
            "evaluate.mask_seen=False, or read only the figures of new targets",
            f"{repeated:,}",
            f"{len(dataset.test.repeat):,}",
        )


def dataset_summary(dataset: Dataset, config: ConfigDict) -> dict[str, Any]:
    """What `summary.json` says of the log."""
    counts = dataset.counts
    keys = (
        "users",
        "items",
        "interactions",
        "train_interactions",
        "validation_users",
        "dropped_users",
        "short_users",
        "dropped_items",
        "tied_rows",
        "tied_held_out",
        "repeated_rows",
    )
    return {
        "name": log_title(config.data),
        "log_hash": dataset.log_hash,
        **{key: counts[key] for key in keys},
        "vocabulary": len(dataset.item_ids),
        "unknown_targets": counts["unknown_test_targets"],
        "unknown_validation_targets": counts["unknown_valid_targets"],
        "split": dataset.split,
    }
