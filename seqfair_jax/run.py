"""From a config to the files of its runs: prepare, fit, test, write, print.

Shape letters: R runs, U users, V catalogue, k length of a recommended list.
"""

import functools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax import checkpoint, tables, workdir
from seqfair_jax.evaluation.baselines import baseline_ranks
from seqfair_jax.config import check_resumable, resolve
from seqfair_jax.data.split import Dataset
from seqfair_jax.evaluation.ranking import Ranking, make_queries, rank_targets, to_ranking
from seqfair_jax.training.experiment import Experiment, prepare
from seqfair_jax.training.loop import (
    SELECTIONS,
    Progress,
    check_input,
    fit,
    make_validation,
    run_folders,
)
from seqfair_jax.evaluation.metrics import rank_metrics, recommendation_stats, slice_means
from seqfair_jax.objectives import METHODS
from seqfair_jax.training.step import TrainState

_log = logging.getLogger(__name__)


def run(config: ConfigDict, directory: str | Path) -> dict[str, Any]:
    """Train, select, test and report; the same call takes an interrupted run up again.

    Args:
        config: see `config.default_config`.
        directory: the work directory, made if need be.

    Returns:
        The content of `summary.json`.

    Raises:
        ValueError: on a bad setting, bad data, or a work directory made by another config.
        FloatingPointError: if every run diverged.
        SystemExit: after SIGINT or SIGTERM, with the state saved.
    """
    config = resolve(config)
    folder = workdir.create(directory)
    settings = workdir.jsonable(config.to_dict())
    saved = workdir.read_json(folder / "config.json")
    if saved is not None:
        check_resumable(saved, settings, str(folder / "config.json"))
        summary = workdir.read_json(folder / "summary.json")
        if summary is not None and saved == settings:
            _log.info("%s is finished: its table again", folder)
            print(tables.tables([folder], config.select.metric))
            return summary
    elif any(not workdir.is_unfinished(path) for path in folder.iterdir()):
        raise ValueError(
            f"--workdir={directory} holds other files and no config.json; name an empty folder"
        )
    experiment = prepare(config)
    _describe(experiment)
    check_input(experiment, folder)
    (folder / "summary.json").unlink(missing_ok=True)  # of fewer epochs, or other cut-offs
    # Before the other files, so that what a killed process leaves is known for this config's.
    workdir.write_json(folder / "config.json", settings)
    for run_folder in run_folders(folder, [run.name for run in experiment.runs]):
        _write_data_files(run_folder, experiment)
        workdir.write_json(run_folder / "config.json", settings)
    states, best, progress = fit(experiment, folder)
    summary = test(experiment, folder, states, best, progress)
    print(tables.tables([folder], config.select.metric))
    print(f"\nfiles: {folder.resolve()}")
    return summary


def test(
    experiment: Experiment,
    folder: Path,
    states: TrainState,
    best: dict[str, Any],
    progress: Progress,
) -> dict[str, Any]:
    """Test the best epochs of every run and write the results.

    Args:
        experiment, folder: as for `fit.fit`.
        states, best, progress: as `fit.fit` returned them.

    Returns:
        The content of `folder/summary.json`.
    """
    runs, config = experiment.runs, experiment.config
    shared = {
        "schema_version": tables.SCHEMA_VERSION,
        "dataset": _dataset_summary(experiment.dataset),
        "method": config.objective.name,
        "group_family": experiment.loss_family.name,
        "needs_groups": METHODS[config.objective.name].needs_groups,
        "baselines": _test_baselines(experiment),
    }
    rank_fn = make_test(experiment)
    validate = make_validation(experiment)
    scores = {
        name: validate(best[name], np.array([record[name] is None for record in progress.best]))
        for name in SELECTIONS
    }
    summaries = []
    for r, run_folder in enumerate(run_folders(folder, [run.name for run in runs])):
        seconds, failed_step = progress.seconds, int(states.failed_step[r])
        summary = shared | {
            "run": runs[r].name,
            "hparams": {
                key: runs[r].hparams[key] for key in METHODS[config.objective.name].hyperparams
            },
            "seed": runs[r].seed,
            "status": "finished" if failed_step < 0 else f"failed at step {failed_step}",
            "train": {  # the time is that of all runs together, without compilation
                "steps": int(states.step[r]),
                "targets": progress.targets[r],
                "seconds": seconds,
                "targets_per_second": progress.timed_targets / seconds if seconds else None,
            },
        }
        for name, suffix in zip(SELECTIONS, ("", "_worst_group"), strict=True):
            chosen = progress.best[r][name]
            if chosen is None:  # the run failed before its first validation
                continue
            params = jax.tree.map(lambda leaf, r=r: leaf[r], best[name])
            summary["best" + suffix] = {
                "step": chosen["epoch"] * config.train.steps_per_epoch,
                **chosen,  # epoch, and the validation scores that epochs are chosen by
            }
            summary["val" + suffix] = scores[name][r]
            ranking = rank_fn(params, f"test of {runs[r].name}, {name}")
            table, summary["test" + suffix] = score_ranking(experiment, ranking.ranks)
            summary["recommended" + suffix] = recommendation_stats(
                ranking.top_items, experiment.dataset.item_counts
            )
            workdir.write_parquet(run_folder / f"per_user{suffix}.parquet", table)
            checkpoint.save(run_folder / "checkpoints" / f"best_{name}", params, chosen)
        workdir.write_json(run_folder / "summary.json", summary)
        summaries.append(summary)
    if len(runs) == 1:
        return summaries[0]
    whole = shared | {
        "runs": [
            {key: summary.get(key) for key in ("run", "hparams", "seed", "status", "best", "val")}
            for summary in summaries
        ],
        "selected": _select_hparams(config, summaries),
    }
    workdir.write_json(folder / "summary.json", whole)
    return whole


def make_test(experiment: Experiment) -> Callable[[Any, str], Ranking]:
    """The function of one run's parameters, and of its name, that ranks every test target."""
    config, dataset = experiment.config, experiment.dataset
    queries = make_queries(
        dataset,
        "test",
        max_len=config.model.max_len,
        mask_seen=config.evaluate.mask_seen,
        batch_size=config.evaluate.batch_size,
    )
    top_k = min(max(config.evaluate.cutoffs), len(dataset.item_ids))
    rank_fn = jax.jit(functools.partial(rank_targets, experiment.task.model, top_k=top_k))

    def rank(params, what: str) -> Ranking:
        return to_ranking(*rank_fn(params, queries), num_users=len(dataset.user_ids), what=what)

    return rank


def score_ranking(experiment: Experiment, ranks: np.ndarray) -> tuple[pd.DataFrame, dict]:
    """The test's figures: a row a user, and the means by group.

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
            # A target outside the vocabulary has no rank, but counts as a miss.
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
    for summary in summaries:
        if summary["status"] == "finished":
            values = tuple(summary["hparams"].items())
            scores.setdefault(values, []).append(summary["val"][metric]["overall"])
    best = tables.best_values(scores)
    if best is None:
        return None
    found = scores[best]
    return {
        "hparams": dict(best),
        f"val/{metric}/overall": float(np.mean(found)),
        "seeds": len(found),
    }


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
        f"{found['interactions']:,} interactions, {found['train_interactions']:,} of them to train "
        f"on, {found['validation_users']:,} validation users, "
        f"{found['unknown_targets']} test targets unknown; left out: {found['dropped_users']:,} "
        f"users ({found['short_users']} of them too short to split after the filter) and "
        f"{found['dropped_items']:,} items\nlog {found['log_hash']}"
    )
    names = [run.name for run in experiment.runs]
    print(f"{experiment.config.objective.name}: " + ", ".join(names))


def _write_data_files(folder: Path, experiment: Experiment) -> None:
    """`groups.parquet` and `split.parquet`: who is in which group, and who was held out how."""
    dataset = experiment.dataset
    folder.mkdir(parents=True, exist_ok=True)
    groups = {family.name: family.labels() for family in experiment.families}
    workdir.write_parquet(
        folder / "groups.parquet", pd.DataFrame({"user_id": dataset.user_ids, **groups})
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
    workdir.write_parquet(folder / "split.parquet", split)
