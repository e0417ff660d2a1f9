"""From a config to the files of its runs: load, train, test, write, print."""

import contextlib
import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax import __version__, devices, workdir
from seqfair_jax.config import RunSpec, changed_settings, check_resumable, resolve
from seqfair_jax.data.cache import source_hashes, source_path
from seqfair_jax.data.split import counted, describe_counts, describe_split
from seqfair_jax.data.times import with_date
from seqfair_jax.errors import Interrupted, UserError
from seqfair_jax.report import text
from seqfair_jax.results import dataset_summary, keep_refit, test, warn_of_masked_targets
from seqfair_jax.serving import catalogue
from seqfair_jax.serving.trained import load_judged, load_source
from seqfair_jax.training import checkpoint, refit, warm_start
from seqfair_jax.training.experiment import Experiment, build_experiment
from seqfair_jax.training.loop import fit
from seqfair_jax.training.progress import Snapshot
from seqfair_jax.training.refit import Judged
from seqfair_jax.training.resume import restore
from seqfair_jax.training.warm_start import Source

_log = logging.getLogger(__name__)


def run(config: ConfigDict, directory: str | Path) -> dict[str, Any]:
    """Train, select, test and report; the same call resumes an interrupted run.

    With `train.refit` the run trains on all rows, and there is no test (`training.refit`).

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
    _check_processes(config, folder)
    with _exclusive(folder):
        return _run(config, folder)


def train(
    config: ConfigDict,
    directory: str | Path,
    *,
    after_epoch: Callable[[Snapshot], bool] | None = None,
) -> tuple[Experiment, Snapshot]:
    """Train and validate, without the test; `run` on the same folder resumes there and tests.

    Args:
        config, directory: as for `run`.
        after_epoch: as for `loop.fit`.

    Raises:
        UserError, SystemExit: as for `run`; and if the config has `train.refit`, which has no
            validation.
    """
    config = resolve(config)
    if config.train.refit:
        raise UserError(
            f"train.refit is {config.train.refit}, but a refit has no validation to choose by: "
            "leave it out, and train the chosen run again by seqfair train --refit"
        )
    folder = workdir.create(directory)
    with _exclusive(folder):
        checkpoint.recover(folder / workdir.LATEST_CHECKPOINT)
        settings = _check_folder(config, folder)
        source = _load_source(config, folder)
        experiment = build_experiment(config)
        return experiment, _train(experiment, folder, settings, source, after_epoch=after_epoch)


def _check_processes(config: ConfigDict, folder: Path) -> None:
    """Refuse several processes with unequal settings, folders or versions.

    Raises:
        UserError: on every process.
    """
    settings = workdir.jsonable(config.to_dict())
    words = json.dumps([settings, str(folder.resolve()), __version__], sort_keys=True)
    digest = hashlib.sha256(words.encode()).digest()
    devices.require_equal(digest, "settings, --workdir or versions")


@contextlib.contextmanager
def _exclusive(folder: Path) -> Iterator[None]:
    """Lock a work directory, and turn a signal and a full memory into their messages."""
    with contextlib.ExitStack() as lock:
        with devices.first_process_first("start"):
            lock.enter_context(workdir.exclusive(folder))
        try:
            yield
        except KeyboardInterrupt as error:  # outside of the training steps, which handle signals
            raise Interrupted(_interrupted(folder), error) from None
        except jax.errors.JaxRuntimeError as error:
            lost = "gloo|nccl|connection|heartbeat|another task|UNAVAILABLE|DEADLINE_EXCEEDED"
            if jax.process_count() > 1 and re.search(lost, str(error), re.IGNORECASE):
                raise UserError(
                    f"lost another process of this training ({str(error).splitlines()[0]}); end "
                    "those that are left and start all again, to resume from the newest checkpoint"
                ) from error
            # A GPU reports RESOURCE_EXHAUSTED, a CPU an INTERNAL error with these words.
            if not re.search("RESOURCE_EXHAUSTED|out of memory", str(error), re.IGNORECASE):
                raise
            raise UserError(
                f"out of memory ({str(error).splitlines()[0]}); lower train.batch_size, "
                "train.max_logits or evaluate.batch_size, or train fewer runs at once"
            ) from error


def _run(config: ConfigDict, folder: Path) -> dict[str, Any]:
    checkpoint.recover(folder / workdir.LATEST_CHECKPOINT)
    saved = workdir.read_json(folder / workdir.CONFIG)
    settings = _check_folder(config, folder)
    unchanged = saved is not None and not changed_settings(saved, settings)
    # The first process decides: a shared file system may show others another state for a moment.
    if devices.of_first(int(unchanged and workdir.is_finished(folder))):
        its_table = "" if config.train.refit else "; this is its table"
        _log.info("%s has finished%s", folder, its_table)
        _warn_of_changed_inputs(config, workdir.finished_inputs(folder))
        _print_result(folder, config)
        return workdir.read_summary(folder)
    source, judged = _load_source(config, folder), _load_judged(config, folder)
    with devices.first_process_first("read the log"):
        inputs = source_hashes(config.data) if workdir.is_writer() else {}
    experiment = build_experiment(config)
    describe(experiment)
    snapshot = _train(experiment, folder, settings, source, judged)
    finish = test if experiment.holds_out else keep_refit
    summary = finish(experiment, folder, snapshot, inputs)
    if workdir.is_writer():
        _print_result(folder, config)
        print(f"\nfiles: {folder.resolve()}")
    return summary


def _print_result(folder: Path, config: ConfigDict) -> None:
    """Print the tables of a finished run; of a refit, which has none, what was judged."""
    if config.train.refit:
        print(refit.describe_judgement(workdir.read_summary(folder)["refit"]))
    else:
        print(text.tables([folder], config.select.metric))


def _check_folder(config: ConfigDict, folder: Path) -> dict[str, Any]:
    """The settings as JSON, after a check that the folder is empty or of the same settings."""
    settings = workdir.jsonable(config.to_dict())
    saved = workdir.read_json(folder / workdir.CONFIG)
    if saved is not None:
        check_resumable(saved, settings, str(folder / workdir.CONFIG))
    elif not workdir.is_empty(folder):
        raise UserError(
            f"--workdir={folder} has other files and no {workdir.CONFIG}; name an empty folder"
        )
    return settings


def _load_source(config: ConfigDict, folder: Path) -> Source | None:
    """The run to start from; None if there is none, or a checkpoint to resume from."""
    path = config.train.init_from
    if not path or checkpoint.exists(folder / workdir.LATEST_CHECKPOINT):
        return None
    source = load_source(path)
    warm_start.check_model(source, config.model)  # before the log is read
    return source


def _load_judged(config: ConfigDict, folder: Path) -> Judged | None:
    """The run to train again; None if there is none, or a checkpoint to resume from."""
    if not config.train.refit or checkpoint.exists(folder / workdir.LATEST_CHECKPOINT):
        return None
    return load_judged(config)


def _train(
    experiment: Experiment,
    folder: Path,
    settings: dict[str, Any],
    source: Source | None,
    judged: Judged | None = None,
    *,
    after_epoch: Callable[[Snapshot], bool] | None = None,
) -> Snapshot:
    """Train from the newest checkpoint, after the files that say what is trained."""
    snapshot = restore(experiment, folder, source, judged)
    if snapshot.progress.init_from:
        print("\n".join(warm_start.describe(snapshot.progress.init_from)))
    if snapshot.progress.refit:
        refit.check_same(snapshot.progress.refit, experiment.config.train.epochs)
        rows = experiment.dataset.counts["interactions"]
        print("\n".join(refit.describe(snapshot.progress.refit, rows)))
    folders = workdir.run_folders(folder, experiment.names)
    # Results of fewer epochs or other cut-offs must not stay beside the new config.
    for part in dict.fromkeys([folder, *folders]):
        workdir.remove_results(part)
        workdir.remove_unfinished(part)
    # The config comes first, so that the other files of a killed process can be traced to it.
    workdir.write_json(folder / workdir.CONFIG, settings)
    for part, spec in zip(folders, experiment.runs, strict=True):
        _write_data_files(part, experiment)
        if judged is not None:
            workdir.copy_results(judged.results, part)
        if part != folder:
            workdir.write_json(part / workdir.CONFIG, _settings_of(spec, settings))
    return fit(experiment, folder, snapshot, after_epoch)


def _settings_of(spec: RunSpec, settings: dict[str, Any]) -> dict[str, Any]:
    """The config of one run of a grid: its own seed and values."""
    values = {key: [value] for key, value in spec.hparams.items()}
    return settings | {"seeds": [spec.seed], "objective": settings["objective"] | values}


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
            path = source_path(config.data, name)
            _log.warning(
                "%s changed after this run finished; its table is of the file as it was. To train "
                "on the new file, use another --workdir",
                path,
            )


def describe(experiment: Experiment) -> None:
    """Print what the log has, how it is split, and the runs."""
    found = dataset_summary(experiment.dataset, experiment.config)
    print(
        f"{found['name']}: {counted(found['users'], 'user', 'users')}, "
        f"{counted(found['items'], 'item', 'items')}, "
        f"{counted(found['interactions'], 'interaction', 'interactions')} "
        f"({found['train_interactions']:,} to train on)\n"
        f"{describe_counts(experiment.dataset.counts)}"
    )
    print("\n".join(describe_split(experiment.dataset.split)))
    first, last = (with_date(found["split"][key]) for key in ("first_time", "last_time"))
    print(f"times: {first} to {last}")
    print(f"log {found['log_hash']}")
    print(f"{experiment.config.objective.name}: " + ", ".join(experiment.names))
    warn_of_masked_targets(experiment.dataset, experiment.config.evaluate.mask_seen)


def _write_data_files(folder: Path, experiment: Experiment) -> None:
    """Write the groups of a run's users, its log, and a model's neighbours (`catalogue`)."""
    neighbours = devices.to_host(experiment.data.neighbours)  # every process has a part
    if not workdir.is_writer():
        return
    dataset = experiment.dataset
    folder.mkdir(parents=True, exist_ok=True)
    groups = {family.name: family.labels() for family in experiment.families}
    workdir.write_parquet(
        folder / workdir.GROUPS, pd.DataFrame({"user_id": dataset.user_ids, **groups})
    )
    catalogue.write(folder, dataset)
    if neighbours is not None:
        catalogue.write_neighbours(folder, neighbours, dataset)
