"""The test of trained runs, and what `summary.json` says of them.

Shape letters: U users.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
import pyarrow as pa
from ml_collections import ConfigDict

from seqfair_jax import workdir
from seqfair_jax.data.files import log_title
from seqfair_jax.data.split import Targets
from seqfair_jax.errors import DivergedError
from seqfair_jax.evaluation.baselines import baseline_ranks
from seqfair_jax.evaluation.metrics import recommendation_stats
from seqfair_jax.evaluation.slices import OVERALL, target_means
from seqfair_jax.training import checkpoint, selection
from seqfair_jax.training.experiment import Experiment
from seqfair_jax.training.loop import make_validation
from seqfair_jax.training.progress import Snapshot

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
        The content of `folder/summary.json`.

    Raises:
        DivergedError: if no run can be tested.
    """
    config = experiment.config
    method = experiment.task.objective.method
    baseline_table, baselines = _test_baselines(experiment)
    shared = {
        "schema_version": workdir.SCHEMA_VERSION,
        "dataset": dataset_summary(experiment),
        "method": config.objective.name,
        "group_family": experiment.loss_family.name,
        "needs_groups": method.needs_groups,
        "label": method.label,
        "logs": [log._asdict() for log in method.logs],
        "baselines": baselines,
    }
    tester = _Tester(experiment)
    states, progress = snapshot.states, snapshot.progress
    summaries = []
    for r, part in enumerate(workdir.run_folders(folder, experiment.names)):
        spec, failed_step = experiment.runs[r], int(states.failed_step[r])
        seconds = progress.seconds
        summary = shared | {
            "run": spec.name,
            "hparams": spec.hparams,
            "seed": spec.seed,
            "status": selection.status(failed_step),
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
            if failed_step < 0:
                summary["status"] = "failed in the test"
        workdir.write_parquet(part / workdir.BASELINES, baseline_table)
        workdir.write_json(part / workdir.SUMMARY, summary)
        summaries.append(summary)
    if not any("test" in summary for summary in summaries):
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
        # A run that failed before its first validation has no best epoch.
        best = {rule: record for rule, record in snapshot.progress.best[r].items() if record}
        params = {rule: jax.tree.map(lambda leaf: leaf[r], snapshot.best[rule]) for rule in best}
        tested: dict[float, tuple] = {}  # by epoch
        for rule, chosen in best.items():  # all, before any is written: a score may not be finite
            if chosen["epoch"] not in tested:
                ranking = self._rank(params[rule], f"test of {name}")
                tested[chosen["epoch"]] = (
                    self._validate(params[rule], name),
                    *score_ranking(experiment, ranking.ranks),
                    recommendation_stats(ranking.top_items, experiment.dataset.item_counts),
                )
        found: dict[str, Any] = {}
        for rule, chosen in best.items():
            val, table, means, recommended = tested[chosen["epoch"]]
            suffix = selection.RULES[rule].suffix
            found["best" + suffix] = {
                "step": chosen["epoch"] * experiment.config.train.steps_per_epoch,
                **chosen,  # epoch, and the validation scores that epochs are chosen by
            }
            found["val" + suffix] = val
            found["test" + suffix] = means
            found["recommended" + suffix] = recommended
            workdir.write_parquet(workdir.per_user(folder, suffix), table)
            checkpoint.save(workdir.best_checkpoint(folder, rule), params[rule], chosen)
        return found


def score_ranking(experiment: Experiment, ranks: np.ndarray) -> tuple[pd.DataFrame, dict]:
    """The figures of the test: a row for each user who is tested, and the means by group.

    Args:
        experiment: whose users they are.
        ranks: i32[m] of the test targets, 1-based; 0 for a miss.
    """
    dataset, targets = experiment.dataset, experiment.dataset.test
    families = [family.select(targets.users) for family in experiment.families]
    values, means = target_means(ranks, targets, families, experiment.config.evaluate.cutoffs)
    # A target outside the vocabulary has no rank and counts as a miss.
    rank = pd.array(ranks, dtype="Int32")
    rank[targets.items < 0] = pd.NA
    table = pd.DataFrame(
        {
            "user_id": dataset.user_ids[targets.users],
            **target_columns(
                targets,
                {"target_item_id": targets.item_ids, "repeat": targets.repeat, "rank": rank},
            ),
            **values,
            **{family.name: family.labels() for family in families},
        }
    )
    return table, means


def target_columns(targets: Targets, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Values of the targets as columns with a row for each user: lists if some have several."""
    if targets.single:
        return dict(columns)
    offsets = pa.array(targets.offsets, pa.int32())
    return {
        name: pa.ListArray.from_arrays(offsets, pa.array(values)).to_pylist()
        for name, values in columns.items()
    }


def _test_baselines(experiment: Experiment) -> tuple[pd.DataFrame, dict[str, dict]]:
    """The baselines' metrics of each user, for paired tests, and their means by group."""
    settings = experiment.config.evaluate
    ranks = baseline_ranks(
        experiment.dataset,
        split="test",
        mask_seen=settings.mask_seen,
        k=min(max(settings.cutoffs), len(experiment.dataset.item_ids)),
    )
    scored = {name: score_ranking(experiment, rank) for name, rank in ranks.items()}
    parts = [
        table[["user_id", *(column for column in table if "@" in column)]].assign(baseline=name)
        for name, (table, _) in scored.items()
    ]
    return pd.concat(parts, ignore_index=True), {name: means for name, (_, means) in scored.items()}


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


def dataset_summary(experiment: Experiment) -> dict[str, Any]:
    """What `summary.json` says of the log."""
    dataset = experiment.dataset
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
        "name": log_title(experiment.config.data),
        "log_hash": dataset.log_hash,
        **{key: counts[key] for key in keys},
        "vocabulary": len(dataset.item_ids),
        "unknown_targets": counts["unknown_test_targets"],
        "unknown_validation_targets": counts["unknown_valid_targets"],
        "split": dataset.split,
    }
