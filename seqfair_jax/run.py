"""From a config to the files of its runs: load, train, test, write, print.

Shape letters: U users.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.config import check_resumable, resolve
from seqfair_jax.data.cache import source_hashes
from seqfair_jax.data.split import Dataset, describe_counts
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.evaluation.baselines import baseline_ranks
from seqfair_jax.evaluation.metrics import rank_metrics, recommendation_stats
from seqfair_jax.evaluation.slices import OVERALL, slice_means
from seqfair_jax.objectives import METHODS
from seqfair_jax.report import text
from seqfair_jax.serving import catalogue
from seqfair_jax.training import checkpoint, selection
from seqfair_jax.training.experiment import Experiment, build_experiment
from seqfair_jax.training.loop import fit, make_validation
from seqfair_jax.training.progress import Snapshot
from seqfair_jax.training.resume import check_input

_log = logging.getLogger(__name__)


def run(config: ConfigDict, directory: str | Path) -> dict[str, Any]:
    """Train, select, test and report; the same call resumes an interrupted run.

    Args:
        config: see `config.default_config`.
        directory: the work directory; made if it does not exist.

    Returns:
        The content of `summary.json`.

    Raises:
        UserError: on a bad setting, bad data, a work directory made by another config or in use
            by another process, or if every run diverged.
        SystemExit: after SIGINT or SIGTERM, with the state saved.
    """
    config = resolve(config)
    folder = workdir.create(directory)
    with workdir.exclusive(folder):
        try:
            return _run(config, folder)
        except KeyboardInterrupt:  # outside of the training steps, or at the second signal
            raise SystemExit(_interrupted(folder)) from None


def _run(config: ConfigDict, folder: Path) -> dict[str, Any]:
    settings = workdir.jsonable(config.to_dict())
    saved = workdir.read_json(folder / workdir.CONFIG)
    if saved is not None:
        check_resumable(saved, settings, str(folder / workdir.CONFIG))
        stored = workdir.finished_inputs(folder)
        if stored is not None and saved == settings:
            _log.info("%s has finished; this is its table", folder)
            _warn_of_changed_inputs(config, stored)
            print(text.tables([folder], config.select.metric))
            return workdir.read_summary(folder)
    elif not workdir.is_empty(folder):
        raise UserError(
            f"--workdir={folder} has other files and no {workdir.CONFIG}; name an empty folder"
        )
    inputs = source_hashes(config.data)
    experiment = build_experiment(config)
    _describe(experiment)
    check_input(experiment, folder)
    folders = workdir.run_folders(folder, experiment.names)
    # Results of fewer epochs or other cut-offs must not stay beside the new config.
    for part in dict.fromkeys([folder, *folders]):
        workdir.remove_results(part)
        workdir.remove_unfinished(part)
    # The config comes first, so that the other files of a killed process can be traced to it.
    workdir.write_json(folder / workdir.CONFIG, settings)
    for part in folders:
        _write_data_files(part, experiment)
        workdir.write_json(part / workdir.CONFIG, settings)
    snapshot = fit(experiment, folder)
    summary = test(experiment, folder, snapshot, inputs)
    print(text.tables([folder], config.select.metric))
    print(f"\nfiles: {folder.resolve()}")
    return summary


def test(
    experiment: Experiment, folder: Path, snapshot: Snapshot, inputs: Mapping[str, str]
) -> dict[str, Any]:
    """Test the best epochs of every run and write the results.

    Args:
        experiment, folder: as for `loop.fit`.
        snapshot: as `loop.fit` returned it.
        inputs: SHA-256 of the log and of the group file (`data.cache.source_hashes`).

    Returns:
        The content of `folder/summary.json`.

    Raises:
        DivergedError: if the scores of every run are not finite.
    """
    config = experiment.config
    method = METHODS[config.objective.name]
    shared = {
        "schema_version": workdir.SCHEMA_VERSION,
        "dataset": _dataset_summary(experiment.dataset),
        "method": config.objective.name,
        "group_family": experiment.loss_family.name,
        "needs_groups": method.needs_groups,
        "baselines": _test_baselines(experiment),
    }
    tester = _Tester(experiment)
    states, progress = snapshot.states, snapshot.progress
    summaries = []
    for r, part in enumerate(workdir.run_folders(folder, experiment.names)):
        spec, failed_step = experiment.runs[r], int(states.failed_step[r])
        seconds = progress.seconds
        summary = shared | {
            "run": spec.name,
            "hparams": {key: spec.hparams[key] for key in method.hparams},
            "seed": spec.seed,
            "status": "finished" if failed_step < 0 else f"failed at step {failed_step}",
            "train": {  # the time is that of all runs together, without compilation
                "steps": int(states.step[r]),
                "targets": progress.targets[r],
                "seconds": seconds,
                "targets_per_second": progress.timed_targets / seconds if seconds else None,
                "stopped_epoch": progress.stopped[r],
            },
        }
        try:
            summary |= tester.test_run(snapshot, r, part)
        except DivergedError as error:
            _log.warning("%s", error)
            summary["status"] = "failed in the test"
        workdir.write_json(part / workdir.SUMMARY, summary)
        summaries.append(summary)
    if not any(map(selection.is_result, summaries)):
        raise DivergedError("every run diverged; try a smaller train.learning_rate")
    for part in workdir.run_folders(folder, experiment.names):
        workdir.finish(part, inputs)
    if len(summaries) == 1:
        return summaries[0]
    whole = shared | {
        "runs": [
            {key: summary.get(key) for key in ("run", "hparams", "seed", "status", "best", "val")}
            for summary in summaries
        ],
        "selected": _select_hparams(config, summaries),
    }
    workdir.write_json(folder / workdir.SUMMARY, whole)
    workdir.finish(folder, inputs)
    return whole


class _Tester:
    """Tests the best epochs of runs; an epoch that both rules chose is tested once."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        cutoffs = experiment.config.evaluate.cutoffs
        top_k = min(max(cutoffs), len(experiment.dataset.item_ids))
        self._rank = experiment.make_ranker("test", top_k=top_k)
        self._validate = make_validation(experiment)

    def test_run(self, snapshot: Snapshot, r: int, folder: Path) -> dict[str, Any]:
        """Run r's part of `summary.json`; writes its per-user tables and best parameters."""
        experiment = self._experiment
        name = experiment.names[r]
        found: dict[str, Any] = {}
        tested: dict[float, tuple] = {}  # by epoch
        for rule in selection.RULES.values():
            chosen = snapshot.progress.best[r][rule.name]
            if chosen is None:  # the run failed before its first validation
                continue
            params = jax.tree.map(lambda leaf: leaf[r], snapshot.best[rule.name])
            if chosen["epoch"] not in tested:
                ranking = self._rank(params, f"test of {name}")
                tested[chosen["epoch"]] = (
                    self._validate(params, name),
                    *score_ranking(experiment, ranking.ranks),
                    recommendation_stats(ranking.top_items, experiment.dataset.item_counts),
                )
            val, table, means, recommended = tested[chosen["epoch"]]
            found["best" + rule.suffix] = {
                "step": chosen["epoch"] * experiment.config.train.steps_per_epoch,
                **chosen,  # epoch, and the validation scores that epochs are chosen by
            }
            found["val" + rule.suffix] = val
            found["test" + rule.suffix] = means
            found["recommended" + rule.suffix] = recommended
            workdir.write_parquet(workdir.per_user(folder, rule.suffix), table)
            checkpoint.save(workdir.best_checkpoint(folder, rule.name), params, chosen)
        return found


def score_ranking(experiment: Experiment, ranks: np.ndarray) -> tuple[pd.DataFrame, dict]:
    """The figures of the test: a row for each user, and the means by group.

    Args:
        experiment: whose users they are.
        ranks: i32[U], 1-based; 0 for a miss.
    """
    dataset, families = experiment.dataset, experiment.families
    values = rank_metrics(ranks, experiment.config.evaluate.cutoffs)
    known = dataset.test_targets >= 0
    table = pd.DataFrame(
        {
            "user_id": dataset.user_ids,
            "target_item_id": dataset.test_target_ids,
            "repeat": dataset.test_repeat,
            # A target outside the vocabulary has no rank and counts as a miss.
            "rank": pd.Series(ranks, dtype="Int32").where(known),
            **values,
            **{family.name: family.labels() for family in families},
        }
    )
    return table, slice_means(values, families, dataset.test_repeat)


def _test_baselines(experiment: Experiment) -> dict[str, dict]:
    settings = experiment.config.evaluate
    ranks = baseline_ranks(
        experiment.dataset,
        split="test",
        mask_seen=settings.mask_seen,
        k=min(max(settings.cutoffs), len(experiment.dataset.item_ids)),
    )
    return {name: score_ranking(experiment, rank)[1] for name, rank in ranks.items()}


def _select_hparams(config: ConfigDict, summaries: list[dict]) -> dict[str, Any] | None:
    """The values with the best validation score averaged over seeds; None if all runs failed."""
    metric = config.select.metric
    scores: dict[tuple, list[float]] = {}
    for summary in filter(selection.is_result, summaries):
        values = tuple(summary["hparams"].items())
        scores.setdefault(values, []).append(summary["val"][metric][OVERALL])
    best = selection.best_values(scores)
    if best is None:
        return None
    return {
        "hparams": dict(best),
        f"val/{metric}/{OVERALL}": float(np.mean(scores[best])),
        "seeds": len(scores[best]),
    }


def _interrupted(folder: Path) -> str:
    stored = checkpoint.latest_progress(folder / workdir.LATEST_CHECKPOINT)
    if stored is None:
        return "stopped before the first checkpoint; the same command starts again"
    return (
        f"stopped; the state of step {stored['step']} is saved in {folder}, and the same command "
        "resumes from there"
    )


def _warn_of_changed_inputs(config: ConfigDict, inputs: dict[str, str]) -> None:
    """Warn if the log or the group file changed after the run finished."""
    try:
        now = source_hashes(config.data)
    except UserError as error:
        _log.warning("the input of this run cannot be checked: %s", error)
        return
    for name, digest in inputs.items():
        if now.get(name) != digest:
            path = config.data.group_file if name == "group_file" else config.data.path
            _log.warning(
                "%s changed after this run finished; its table is of the file as it was. To train "
                "on the new file, use another --workdir",
                path,
            )


def _dataset_summary(dataset: Dataset) -> dict[str, Any]:
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
        "name": dataset.name,
        "log_hash": dataset.log_hash,
        **{key: counts[key] for key in keys},
        "vocabulary": len(dataset.item_ids),
        "unknown_targets": counts["unknown_test_targets"],
        "unknown_validation_targets": counts["unknown_valid_targets"],
    }


def _describe(experiment: Experiment) -> None:
    found = _dataset_summary(experiment.dataset)
    print(
        f"{found['name']}: {found['users']:,} users, {found['items']:,} items, "
        f"{found['interactions']:,} interactions ({found['train_interactions']:,} to train on), "
        f"{found['validation_users']:,} validation users\n"
        f"{describe_counts(experiment.dataset.counts)}\n"
        f"test targets that no training row has: {found['unknown_targets']:,}"
    )
    if found["tied_rows"]:
        print(
            f"rows at the same time as the user's previous row: {found['tied_rows']:,} "
            f"({found['tied_held_out']:,} of them held out); they keep the order of the file"
        )
    print(f"log {found['log_hash']}")
    print(f"{experiment.config.objective.name}: " + ", ".join(experiment.names))


def _write_data_files(folder: Path, experiment: Experiment) -> None:
    """Write the groups, the split, the items and the histories of a run's log."""
    dataset = experiment.dataset
    folder.mkdir(parents=True, exist_ok=True)
    groups = {family.name: family.labels() for family in experiment.families}
    workdir.write_parquet(
        folder / workdir.GROUPS, pd.DataFrame({"user_id": dataset.user_ids, **groups})
    )
    is_validation = np.zeros(len(dataset.user_ids), bool)
    is_validation[dataset.valid_users] = True
    split = pd.DataFrame(
        {
            "user_id": dataset.user_ids,
            "train_interactions": dataset.train_lengths,
            "validation_user": is_validation,
            "test_target_item_id": dataset.test_target_ids,
        }
    )
    workdir.write_parquet(folder / workdir.SPLIT, split)
    catalogue.write(folder, dataset)
