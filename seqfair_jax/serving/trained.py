"""Load a finished run: its model, its parameters, its items and its users' histories."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from seqfair_jax import devices, workdir
from seqfair_jax.config.refit import check_refit, refit_settings
from seqfair_jax.errors import UserError
from seqfair_jax.model.mixture import Neighbours, pad_neighbours
from seqfair_jax.model.packing import BLOCK, Packed
from seqfair_jax.model.sasrec import SASRec, is_table, param_specs
from seqfair_jax.serving import catalogue
from seqfair_jax.serving.catalogue import Histories
from seqfair_jax.training import checkpoint, selection
from seqfair_jax.training.refit import Judged, check_rule, require_test
from seqfair_jax.training.warm_start import Source, parameters_hash


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedModel:
    """A finished run. Shape letters: U users, V vocabulary."""

    run: str  # the run's name
    folder: Path  # of the run itself, also in a grid
    config: ConfigDict  # its settings
    model: SASRec
    params: Any
    item_ids: np.ndarray  # i64[V] or object[V] of text
    user_ids: np.ndarray  # i64[U] or object[U] of text
    histories: Histories  # of the U users, the newest item included
    mask_seen: bool  # whether the run was evaluated without the items of the history
    mesh: Mesh | None = None  # the devices that have the parameters; one if None
    neighbours: Neighbours | None = None  # of a model with neighbours, on the devices

    def described(self, rule: str) -> str:
        """The run and its epoch, for a message; `rule` is that of `load`."""
        if self.config.get("train", {}).get("refit"):
            return f"run {self.run}, trained on all rows"
        return f"run {self.run}, best epoch by {rule}"


def load(
    directory: str | Path,
    *,
    run: str | None = None,
    rule: str = "overall",
    mesh: Mesh | None = None,
    on_host: bool = False,
) -> TrainedModel:
    """Load a finished run from its folder. The log is not needed.

    Args:
        directory: the work directory of a run, or of a grid of runs.
        run: the name of a run of the grid; None for the one that validation selected: the first
            seed of the best hyperparameters.
        rule: which epoch to load: the one that was best "overall", or for the "worst_group". A
            refit has one epoch, which "overall" loads.
        mesh: the devices that share the users and the catalogue of `recommend`; one if None. They
            need not be those of the training.
        on_host: leave the parameters on the host, as numpy arrays, and not on a device. The model
            cannot score then.

    Raises:
        UserError: if the run has not finished or failed, if its files are missing or changed, or
            if there is no such run or rule.
    """
    folder = run_folder(workdir.user_path(directory), run)
    summary = workdir.read_summary(folder)
    check_rule(folder, summary, rule)
    if not selection.has_parameters(summary, rule):
        raise UserError(
            f"{folder}: run {summary['run']} {summary['status']}, so it has no parameters to load; "
            "name another run"
        )
    item_ids, user_ids, histories = catalogue.read(folder)
    config = ConfigDict(workdir.read_json(folder / workdir.CONFIG))
    shards = mesh.shape[devices.CATALOGUE] if mesh else 1
    model = SASRec(num_items=len(item_ids), shards=shards, **config.model)
    tokens: Any = jax.ShapeDtypeStruct((BLOCK,), jnp.int32)
    template = jax.eval_shape(
        functools.partial(model.init, train=False), jax.random.key(0), Packed(*[tokens] * 5)
    )
    if on_host:  # arrays of the right shape, which take no memory
        template = jax.tree.map(
            lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), template
        )
    elif mesh:
        template = jax.tree.map(
            lambda leaf, spec: leaf.update(sharding=NamedSharding(mesh, spec)),
            template,
            param_specs(template),
        )
    path = workdir.best_checkpoint(folder, rule)
    try:
        params, _ = checkpoint.load(path, template, resizes=is_table)
    except (FileNotFoundError, checkpoint.CorruptCheckpointError):
        raise UserError(
            f"{path} is damaged or missing. Restore it, or remove {workdir.FINISHED} from "
            f"{folder} and run the training command again: it repeats the test"
        ) from None
    neighbours: Any = None
    if model.neighbours and not on_host:  # they are needed to score
        neighbours = pad_neighbours(catalogue.read_neighbours(folder), shards)
        put = functools.partial(devices.put, mesh or devices.make_mesh())
        neighbours = jax.tree.map(lambda part: put(part, P(devices.CATALOGUE)), neighbours)
    return TrainedModel(
        run=summary["run"],
        folder=folder,
        config=config,
        model=model,
        params=params,
        item_ids=item_ids,
        user_ids=user_ids,
        histories=histories,
        mask_seen=config.evaluate.mask_seen,
        mesh=mesh,
        neighbours=neighbours,
    )


def load_source(directory: str) -> Source:
    """Load a finished run as one that a training starts from: its best epoch overall.

    Args:
        directory: the work directory of a run, or of a grid of runs, of which `load` selects one.

    Raises:
        UserError: naming `train.init_from`, for the same reasons as `load`.
    """
    try:
        trained = load(directory, on_host=True)
        summary = workdir.read_summary(trained.folder)
        dataset = catalogue.read_dataset(trained.folder)
    except UserError as error:
        raise UserError(f"train.init_from is {directory}, which cannot be used: {error}") from None
    return Source(
        folder=directory,
        run=trained.run,
        rule="overall",
        epoch=summary["best"]["epoch"],
        model=trained.config.model.to_dict(),
        params=trained.params,
        dataset=dataset,
    )


def judged_settings(directory: str | Path, *, run: str | None = None, rule: str) -> ConfigDict:
    """The settings of the refit of a finished run (`config.refit`).

    Args:
        directory: the work directory of a run, or of a grid of runs.
        run: as for `load`.
        rule: which of the run's epochs is trained again: the best "overall", or for the
            "worst_group".

    Raises:
        UserError: as `load`, or if the run is a refit itself.
    """
    folder = run_folder(workdir.user_path(directory), run)
    summary = workdir.read_summary(folder)
    require_test(folder, summary)
    check_rule(folder, summary, rule)
    if not selection.is_result(summary, rule):
        raise UserError(
            f"{folder}: run {summary['run']} {summary['status']}, so no epoch was chosen; name "
            "another run"
        )
    saved = workdir.read_json(folder / workdir.CONFIG) or {}
    epoch = summary["best" + selection.RULES[rule].suffix]["epoch"]
    return refit_settings(saved, folder=str(folder), rule=rule, epoch=epoch)


def load_judged(config: ConfigDict) -> Judged:
    """Load the run that a config trains again.

    Args:
        config: resolved, with `train.refit`.

    Raises:
        UserError: naming `train.refit`, as `judged_settings`; or if settings differ from the run's.
    """
    name, rule = config.train.refit, config.train.refit_rule
    try:
        settings = judged_settings(name, rule=rule)
        trained = load(name, rule=rule, on_host=True)
    except UserError as error:
        raise UserError(f"train.refit is {name}, which cannot be used: {error}") from None
    check_refit(settings, config)
    return Judged(
        folder=name,
        run=trained.run,
        results=trained.folder,
        rule=rule,
        epoch=config.train.epochs,
        parameters=parameters_hash(trained.params),
        mixture=trained.params["params"].get("mixture"),
        item_ids=trained.item_ids,
        dataset=workdir.read_summary(trained.folder)["dataset"],
    )


def run_folder(folder: Path, run: str | None) -> Path:
    """The folder of one run in a work directory, after a check of its files.

    Args:
        folder: the work directory of a run, or of a grid of runs.
        run: as for `load`.

    Raises:
        UserError: if the folder or the run has not finished, if its files are missing or changed,
            if there is no such run or, without a name, if each run diverged, or if the folder is
            that of a sweep or of an evaluation.
    """
    of_jobs = folder / workdir.JOBS
    if of_jobs.is_dir():
        jobs = ", ".join(sorted(path.name for path in of_jobs.iterdir())[:5])
        raise UserError(
            f"{folder} has the runs of several jobs; name the folder of one, {of_jobs}/JOB "
            f"(there are {jobs}, ...)"
        )
    summary = workdir.read_summary(folder)
    workdir.check_finished(folder)
    if "evaluation" in summary:
        raise UserError(
            f"{folder} is the --out of seqfair evaluate and has no model; name the --workdir of "
            "the run itself"
        )
    runs = summary.get("runs", [summary])
    names = [found["run"] for found in runs]
    if run is None and "runs" in summary:
        if summary["selected"] is None:
            found = ", ".join(f"{r['run']} {r['status']}" for r in runs)
            raise UserError(
                f"{folder}: each run diverged ({found}); train with a smaller train.learning_rate"
            )
        best = summary["selected"]["hparams"]
        run = next(
            found["run"]
            for found in runs
            if found["hparams"] == best and found["status"] == selection.FINISHED
        )
    if run is not None and run not in names:
        raise UserError(f"{folder} has no run {run!r}; there are {', '.join(names)}")
    if "runs" not in summary:
        return folder
    part = workdir.run_folders(folder, names)[names.index(run)]
    workdir.check_finished(part)
    return part
