"""The Python interface: `fit` trains on a table, and a `Model` recommends, judges and is stored.

`seqfair_jax` exports these names and imports this module when one of them is first used.

Shape letters: U users, V vocabulary, D width.
"""

import contextlib
import copy
import dataclasses
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from seqfair_jax import devices, serving, workdir
from seqfair_jax.audit import evaluation, source
from seqfair_jax.cli import log_to_stderr
from seqfair_jax.config import default_config, flatten, resolve
from seqfair_jax.config.change import change
from seqfair_jax.config.files import load_config
from seqfair_jax.data.files import MEMBERS
from seqfair_jax.data.groups import read_group_table
from seqfair_jax.data.tables import stored_tables
from seqfair_jax.errors import Interrupted, UserError
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.report import contents, files, rows, runs, text
from seqfair_jax.run import run
from seqfair_jax.serving import catalogue, output, tables
from seqfair_jax.serving.recommender import encode_users, item_vectors, parse_seen, recommend
from seqfair_jax.training import selection
from seqfair_jax.training.refit import require_test

_INPUTS = workdir.INPUTS  # `workdir` is an argument of `fit`
_BLOCK = 2**14  # users encoded at once
_LOG = logging.getLogger("seqfair_jax")


def fit(
    log: Any,
    objective: str | None = None,
    *,
    groups: Any = None,
    seeds: int | Sequence[int] | None = None,
    epochs: int | None = None,
    settings: Mapping[str, Any] | None = None,
    config: str | ConfigDict | None = None,
    workdir: str | Path | None = None,
    verbose: bool = True,
) -> "Model":
    """Train on a log, test and return the model, as `seqfair train` does. No argument is changed.

    Args:
        log: a table of pandas, polars or pyarrow, or the path of a file, a folder or a pattern.
            Column names are found as in files (docs/log.md). None: the log of `config`.
        objective: such as "erm", "gdro" or "cvar"; None for that of `config`, by default "erm".
        groups: the group families to evaluate: names such as "pop33" or ["plan", "age:4"]; or a
            table of your own groups; or its path (a text with `/` or `.`); or a list of a table or
            path and of the names to use. If a table is given without names, all its families are
            used. A group objective uses the first family. None: "pop33" and "seq33".
        seeds: one run is trained for each.
        epochs: of training; `train.epochs`.
        settings: other settings by their names in docs/settings.md, such as {"model.dim": 128}.
        config: the settings to start from: the name of a shipped config, the path of a config
            file, or a ConfigDict. None: the defaults, those of the config `own_log`.
        workdir: where the run's files go. The same call with the same folder resumes there, and
            loads the model at once if the run has finished. None: a temporary folder, which is
            removed when the model is no longer used; `Model.save` copies it.
        verbose: print what the command prints, and show its progress bar. Else only warnings.

    Returns:
        The model. Of several seeds or values of the objective it is the run that validation
        selected; see `Model.runs`.

    Raises:
        UserError: on bad input; as `run.run`. Nothing is trained.
        KeyboardInterrupt: after an interrupt, with the state saved in `workdir`.
    """
    chosen = _settings(config, settings or {}, log, objective, groups, seeds, epochs)
    return _train(chosen, log, groups, workdir, verbose)


def _train(
    chosen: ConfigDict, log: Any, groups: Any, workdir: str | Path | None, verbose: bool
) -> "Model":
    """Train with settings that lack only the log and the groups; arguments as for `fit`."""
    folder = Path(tempfile.mkdtemp(prefix="seqfair_")) if workdir is None else workdir
    model = None
    try:
        with _shown(verbose):
            path = _make(folder)
            before = _input(path, "group_file")
            with stored_tables(path / _INPUTS):
                _set_inputs(chosen, path, log, groups)
                run(chosen, path)
            if before is not None and str(before) != chosen.data.group_file:
                before.unlink(missing_ok=True)  # the run has its new groups
            mesh = devices.make_mesh(**chosen.train.mesh)  # those that the model was trained on
            model = Model(serving.load(path, mesh=mesh), path, "overall")
    except Interrupted as stopped:
        if stopped.status != 130:  # SIGTERM asks the process to end
            raise
        kept = "" if workdir is not None else "; nothing is kept, since there is no workdir"
        raise KeyboardInterrupt(f"{stopped}{kept}") from None
    finally:
        if model is None and workdir is None:
            shutil.rmtree(folder, ignore_errors=True)
    if workdir is None:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model


def load(
    folder: str | Path,
    *,
    run: str | None = None,
    rule: str = "overall",
    data: int = 1,
    catalogue: int = 1,
) -> "Model":
    """Load the model of a finished run, by `fit` or `seqfair train`. Its log is not needed.

    Args:
        folder: the work directory of a run, or of a grid of runs.
        run: the name of a run of the grid; None for the one that validation selected.
        rule: which epoch: the one that validated best "overall", or for the "worst_group".
        data: devices that share the users whom the model recommends to and is tested on.
        catalogue: devices that share the items: each has a part of the item tables. The model is
            on data * catalogue devices, which need not be those of the training.

    Raises:
        UserError: if the run has not finished or failed, if its files are missing or changed, or
            if there are fewer devices.
    """
    path = workdir.user_path(folder).absolute()
    mesh = devices.make_mesh(data=data, catalogue=catalogue)
    return Model(serving.load(path, run=run, rule=rule, mesh=mesh), path, rule)


class Model:
    """A finished run. `fit` and `load` make one."""

    def __init__(self, trained: serving.TrainedModel, folder: Path, rule: str) -> None:
        """Keep what `load` read.

        Args:
            trained: the run.
            folder: the work directory; of a grid, that of the whole grid.
            rule: that chose the epoch.
        """
        self._trained, self._rule = trained, rule
        self._summary = workdir.read_summary(trained.folder)
        self.folder = folder

    def __repr__(self) -> str:
        summary, trained = self._summary, self._trained
        metric = trained.config.select.metric
        is_refit = "refit" in summary
        judged = (
            "trained on all rows"
            if is_refit
            else f"test {metric} {self._test_figures()[metric]['overall']:.4f}"
        )
        return (
            f"<seqfair_jax.Model {summary['method']}, {trained.run}: {len(trained.user_ids):,} "
            f"users, {len(trained.item_ids):,} items, {judged}>"
        )

    @staticmethod
    def load(folder: str | Path, **arguments: Any) -> "Model":
        """The same as `seqfair_jax.load`."""
        return load(folder, **arguments)

    @property
    def config(self) -> ConfigDict:
        """The settings, as `fit` takes them; a copy."""
        config = copy.deepcopy(self._trained.config)
        change(config, dict(flatten(config.to_dict())))  # JSON has no tuples
        return config

    @property
    def summary(self) -> dict[str, Any]:
        """The content of the run's `summary.json`: the log's numbers, the test, the baselines."""
        return copy.deepcopy(self._summary)

    @property
    def runs(self) -> pd.DataFrame:
        """The runs of the work directory: name, seed, values, status and validation score.

        `load(model.folder, run=NAME)` loads another one.
        """
        found = workdir.read_summary(self.folder)
        metric = self._trained.config.select.metric
        return pd.DataFrame(
            {
                "run": part["run"],
                "seed": part["seed"],
                **part["hparams"],
                "status": part["status"],
                # A grid's summary has the epochs of its runs, but not their tests. A refit has
                # no score.
                f"validation {metric}": (part.get("best") or {}).get("overall"),
                "selected": part["run"] == self._trained.run,
            }
            for part in found.get("runs", [found])
        )

    @property
    def per_user(self) -> pd.DataFrame:
        """The test of each user: the target, its rank, the metrics and the user's groups.

        Raises:
            UserError: if the model is a refit, which has no test.
        """
        require_test(self.folder, self._summary)
        suffix = selection.RULES[self._rule].suffix
        return pd.read_parquet(workdir.per_user(self._trained.folder, suffix))

    def refit(
        self,
        log: Any = None,
        *,
        groups: Any = None,
        seeds: int | Sequence[int] | None = None,
        workdir: str | Path | None = None,
        verbose: bool = True,
    ) -> "Model":
        """Train again on all rows, with the settings of this model: the model to recommend with.

        No row is held out, so the new model is not judged; this one is. It trains to the epoch
        that this model has, as `seqfair train --refit` does.

        Args:
            log: a newer log, as for `fit`; None: the log of this model.
            groups: a newer table of the users' own groups, or its path; None: that of this model.
            seeds: one run is trained for each; None: the seed of this model.
            workdir, verbose: as for `fit`.

        Raises:
            UserError: on bad input; if this model is a refit itself; as `run.run`.
            KeyboardInterrupt: as for `fit`.
        """
        folder = self._trained.folder
        chosen = serving.judged_settings(folder, rule=self._rule)
        change(chosen, {} if seeds is None else {"seeds": seeds})
        if log is None:
            log = _input_table(self.folder, "path")
        else:  # it has all rows, also if this model had a split by files
            change(chosen, {"data.valid_path": None, "data.test_path": None})
        if groups is None:
            groups = _input_table(self.folder, "group_file")
        elif source.split_groups(groups)[1]:
            raise UserError(
                f"groups is {groups!r}: expected a table of the users' groups, or its path; a "
                f"refit has the families of the model, {', '.join(chosen.groups)}"
            )
        families = None if groups is None else [groups, *chosen.groups]
        return _train(chosen, log, families, workdir, verbose)

    def recommend(
        self,
        users: Any = None,
        k: int = 20,
        *,
        seen: str | None = None,
        exclude: Any = None,
        only: Any = None,
        before_test: bool = False,
        all_users: bool = False,
        log: str | Path | None = None,
        batch_size: int | None = None,
    ) -> pd.DataFrame:
        """The k best items of each user, as `seqfair recommend` gives them.

        Args:
            users: None for all users of the run, by their whole history. Or some of them: their
                ids, or a table with a column `user_id`. Or histories, of new users too:
                {user: [item, ...]} oldest item first, or a table `user_id, item_id[, timestamp]`.
            k: items for each user.
            seen: "mask" to recommend no item of the history, "keep" to allow them; None as
                evaluated (`evaluate.mask_seen`).
            exclude: ids of items never to recommend, or a table with a column `item_id`.
            only: the only items to recommend, likewise.
            before_test: recommend to the tested users, from their histories before the test: lists
                that `evaluate_recommendations` can judge. Without it a list knows the test.
            all_users: recommend to every user of the log that the model was trained on, also to
                those whom the filter or the split left out, by all their rows of known items. The
                log is read again.
            log: the path of that log for `all_users`, if it has moved.
            batch_size: users scored at once; None as evaluated.

        Returns:
            Columns `user_id`, `item_id`, `score` and `rank`, a user's rows together from rank 1.

        Raises:
            UserError: if `users` names a user who is not in the run; if two of `users`,
                `before_test` and `all_users` are given; on `before_test` of a refit, which has no
                test; if the log is not the one of the training.
                Unknown items of histories are left out with a warning.
        """
        trained = self._trained
        mask_seen = parse_seen(seen, f"seen is {seen!r}")
        for name, value in (("k", k), ("batch_size", batch_size)):
            is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if value is not None and not (is_number and value >= 1):
                raise UserError(f"{name} is {value!r}: expected a whole number, 1 or more")
        who = {"users": users is not None, "before_test": before_test, "all_users": all_users}
        given = [name for name, is_given in who.items() if is_given]
        if len(given) > 1:
            raise UserError(f"{given[0]} and {given[1]} are both given; give one of them")
        if log is not None and not all_users:
            raise UserError("log is given, but only all_users=True reads it; give both")
        if log is not None and not workdir.is_path(log):
            raise UserError(f"log is a {type(log).__name__}: expected the path of the run's log")
        if before_test:
            user_ids, histories = catalogue.histories_before_test(trained.folder)
        elif all_users:
            data, path = trained.config.data, None if log is None else os.fsdecode(log)
            user_ids, histories = tables.histories_of_log(
                trained.folder, data, trained.item_ids, path=path
            )
        else:
            user_ids, histories = self._histories(users)
        candidates = tables.read_candidates(
            _items(only, "only"),
            _items(exclude, "exclude"),
            trained.item_ids,
            trained.config.data.columns,
        )
        found = recommend(
            trained,
            histories,
            k=int(k),
            mask_seen=mask_seen,
            candidates=candidates,
            batch_size=batch_size,
        )
        blocks = output.as_tables(found, user_ids=user_ids, item_ids=trained.item_ids)
        return pa.concat_tables(table for _, table in blocks).to_pandas()

    def evaluate(
        self,
        groups: Any = None,
        cutoffs: int | Sequence[int] | None = None,
        metrics: str | Sequence[str] | None = None,
        *,
        baselines: bool = False,
    ) -> pd.DataFrame:
        """The test again, by other groups or cut-offs, as `seqfair evaluate` does.

        Args:
            groups: as for `fit`; None for those of the run.
            cutoffs: of the metrics; None for those of the run.
            metrics: such as "NDCG" or "NDCG@20"; None for all.
            baselines: add the rows of the baselines that need no training.

        Returns:
            A row for all users ("overall"), and a row for each group with users. If each user has
            one target, also a row for the targets that are in the history ("target=repeat") and a
            row for those that are not ("target=new"). Columns: `model`, `slice`, `family`,
            `group`, `users`, then each metric. By default they are the figures of `Model.summary`.

        Raises:
            UserError: on an unknown family or metric, or if the model is a refit, which has no
                test.
        """
        table, names = source.split_groups(groups)
        with tempfile.TemporaryDirectory(prefix="seqfair_") as temporary:
            path = None if table is None else source.group_path(Path(temporary), table)
            given = None if cutoffs is None else source.checked_cutoffs(cutoffs)
            choice = source.Choice(groups=names or None, group_file=path, cutoffs=given)
            with stored_tables(Path(temporary) / workdir.INPUTS):
                judged = source.from_run(self.folder, self._trained.run, choice)
            found = evaluation.evaluate(judged, {}, rule=self._rule, mesh=self._trained.mesh)
        wanted = [] if metrics is None else metrics if _is_several(metrics) else [str(metrics)]
        wanted = list(wanted) or found.metrics
        chosen = evaluation.parse_metrics(wanted, judged.config.evaluate.cutoffs)
        (system,) = found.systems
        users = {name: len(of) for name, of in significance.slice_members(system.per_user).items()}
        judged_models = {system.summary["method"]: system.summary["test"]}
        judged_models |= system.summary["baselines"] if baselines else {}
        return pd.DataFrame(
            {
                "model": model,
                "slice": name,
                "family": slices.parse(name).family,
                "group": slices.parse(name).group,
                "users": users[name],
                **{metric: means[metric][name] for metric in chosen},
            }
            for model, means in judged_models.items()
            for name in means[chosen[0]]  # the groups in the order of their family
            if name in users
        )

    def embeddings(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """The vectors of the items and of the users; a score of the catalogue is their product.

        A user's vector is the encoder's output after the whole history, and an item's is its row
        of the output table. Without a mixture `users @ items.T` has the scores of `recommend`. With
        `model.pointer` or `model.neighbours` it has the logits of the catalogue's part alone, and
        `recommend` also uses the other parts.

        Returns:
            items f32[V, D], whose index is `item_id`, and users f32[U, D], whose index is
            `user_id`; the columns are 0 to D - 1. With `model.item_bias` both have 8 more: those of
            the items are the bias and zeros, those of the users 1 and zeros.
        """
        trained = self._trained
        parts = [
            encode_users(
                trained.model,
                trained.params,
                trained.neighbours,
                trained.histories,
                slice(first, min(first + _BLOCK, len(trained.user_ids))),
                1,
                trained.mesh,
            ).hidden
            for first in range(0, len(trained.user_ids), _BLOCK)
        ]
        return (
            _vectors(item_vectors(trained), trained.item_ids, "item_id"),
            _vectors(np.concatenate(parts), trained.user_ids, "user_id"),
        )

    def report(self, path: str | Path, *, show_small_groups: bool = False) -> None:
        """Write the report of the run, or of its grid, to a file: see `Comparison.report`.

        Raises:
            UserError: also if the model is a refit, which has no test.
        """
        compare([self]).report(path, show_small_groups=show_small_groups)

    def save(self, folder: str | Path) -> None:
        """Copy the whole work directory to a new folder, whole or not at all.

        Raises:
            UserError: if the folder has files or cannot be written, or files of the run changed.
        """
        target = workdir.user_path(folder)
        if target.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"{target} is in the model's own folder, {self.folder}; name another")
        workdir.copy(self.folder, target)

    def _test_figures(self) -> dict[str, Any]:
        return self._summary["test" + selection.RULES[self._rule].suffix]

    def _histories(self, users: Any) -> tuple[np.ndarray, serving.Histories]:
        """Who gets a list: the ids and the histories."""
        trained = self._trained
        known_users, known_items = trained.user_ids, trained.item_ids
        columns = trained.config.data.columns
        if users is None:
            return known_users, trained.histories
        if isinstance(users, Mapping):
            if not users:
                raise UserError("histories are empty: expected {user: [item, ...]}")
            wrong = [items for items in users.values() if not _is_several(items)]
            if wrong:
                raise UserError(f"the history {wrong[0]!r} is one value: expected a list of items")
            given = {user: list(items) for user, items in users.items()}
            return tables.histories_of(given, known_users, known_items)
        if _is_table(users) and tables.has_items(users, columns):
            rules = tables.reading_rules(trained.config.data)
            return tables.read_histories(users, known_users, known_items, columns, **rules)
        table = users if _is_table(users) else _ids(users, "users", "user_id")
        ids, places = tables.read_users(table, known_users, columns, require_known=True)
        return ids, trained.histories.select(places)


# The settings of `fit`.


def _settings(
    config: str | ConfigDict | None,
    settings: Mapping[str, Any],
    log: Any,
    objective: str | None,
    groups: Any,
    seeds: Any,
    epochs: Any,
) -> ConfigDict:
    """The settings, but for those that name the log and the groups."""
    if config is None and log is None:
        raise UserError("log is None: give a table or a path, or a config that has a log")
    if not isinstance(settings, Mapping):
        raise UserError(f"settings is {settings!r}: expected a dict, as in {{'model.dim': 128}}")
    if not isinstance(config, str | ConfigDict | None):
        raise UserError(f"config is {config!r}: expected a name, a path or a ConfigDict")
    if isinstance(config, ConfigDict):
        chosen = copy.deepcopy(config)  # with its references, such as that of train.decay_steps
    else:
        chosen = default_config() if config is None else load_config(config)
    named = {"objective.name": objective, "seeds": seeds, "train.epochs": epochs}
    taken = named | {
        "data.path": log,
        "data.name": log,
        "groups": groups,
        "data.group_file": groups,
    }
    both = [key for key, value in taken.items() if value is not None and key in settings]
    if both:
        raise UserError(f"{both[0]} is given twice: by an argument of fit and in settings")
    if log is not None:
        is_public = workdir.is_path(log) and chosen.data.name in MEMBERS
        change(chosen, {} if is_public else {"data.name": "csv"})
    change(chosen, {key: value for key, value in named.items() if value is not None})
    change(chosen, settings)
    return chosen


def _set_inputs(config: ConfigDict, folder: Path, log: Any, groups: Any) -> None:
    """Store the tables in the work directory, and set the log, the group file and the families.

    Raises:
        UserError: if the folder has another log.
    """
    table, names = source.split_groups(groups)
    checked = resolve(config)  # before anything is written
    found: dict[str, Any] = {}
    if workdir.is_path(log):
        found["data.path"] = os.fsdecode(log)
    elif log is not None:
        found["data.path"] = _store_log(folder, log, checked)
        found["data.title"] = config.data.title or source.LOG_TITLE
    if table is not None:
        found["data.group_file"] = source.group_path(folder, table)
        frame = read_group_table(
            found["data.group_file"], config.data.columns.user_id, config.data.encoding
        )
        assert frame is not None
        names = names or source.all_families(frame)
    change(config, found | ({"groups": names} if names else {}))


# Several runs.


def compare(
    models: Sequence["Model | str | Path"],
    *,
    metric: str | None = None,
    family: str | None = None,
    baseline: "Model | str | Path | None" = None,
) -> "Comparison":
    """Compare finished runs on one log, as `seqfair report` does.

    Args:
        models: models, or the folders of runs or of grids, or of evaluated lists
            (`Evaluation.write`). Runs that differ only in the seed are one row.
        metric: to compare by; None for the one that chose in validation.
        family: the group family to show; None for all that the runs share.
        baseline: what the others are tested against: a model, the folder of a run of one method, or
            the name of a row, such as "old" or "markov". None: that of the evaluated lists, or else
            ERM, or else the best baseline without training.

    Raises:
        UserError: if a run has not finished, or if the runs differ in their log, split or groups.
    """
    if isinstance(models, str | Path | Model):
        raise UserError("models is a single one: give a list, such as [model, 'runs/erm']")
    folders = [_folder(model) for model in models]
    of_baseline: Path | str | None = None
    if isinstance(baseline, str):
        of_baseline = runs.take_baseline(baseline)
    elif baseline is not None:
        of_baseline = _folder(baseline)
    if isinstance(of_baseline, Path):
        folders.append(of_baseline)
    if not folders:
        raise UserError("models is empty: name at least one run")
    found = runs.read_runs(folders)
    made = contents.build(found, metric, family=family, baseline=of_baseline)
    return Comparison(tuple(found), made)


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison:
    """Runs, lists and baselines beside each other. Printing it shows what `seqfair report` does."""

    runs: tuple[runs.FinishedRun, ...]
    contents: contents.Contents

    def table(self) -> pd.DataFrame:
        """A row for each row of the report and each slice.

        The columns are name, kind, slice, users, seeds, mean, half, low and high. `mean` is over
        the seeds, and `half` is the half-width of its 95 % interval over seeds (t distribution),
        which is NaN for one seed. `low` and `high` are the ends of the 95 % interval of the mean
        over users, where a user's value is the mean over the seeds (`rows.intervals`).
        """
        records = []
        for row in self.contents.rows:
            for name, users in self.contents.sizes.items():
                values = np.array([x for seed in row.means if (x := seed.get(name)) is not None])
                if len(values):
                    half = rows.half_width(values)
                    records.append(
                        (row.name, row.kind, name, users, len(values), values.mean(), half)
                    )
        columns = ["name", "kind", "slice", "users", "seeds", "mean", "half"]
        table = pd.DataFrame(records, columns=columns)
        return table.merge(self.contents.intervals, "left", on=["name", "slice"])

    def tests(self) -> pd.DataFrame:
        """The paired tests over users of the other rows against the baseline.

        The columns are those of `significance.compare`, and `kind`.
        """
        return self.contents.tests

    def over_seeds(self) -> pd.DataFrame:
        """The differences to the baseline's run of the same seed.

        The columns are name, slice, seeds, difference (the mean over the seeds that both have) and
        half, the half-width of its 95 % interval. Rows have at least two seeds.
        """
        return self.contents.over_seeds

    def __str__(self) -> str:
        parts = [text.verdict_text(self.contents)]
        parts.append(text.contents_tables(self.contents, runs.notes(self.runs)))
        if len(self.contents.tests):
            parts.append(text.comparison(self.contents))
        return "\n\n".join(parts)

    def report(self, path: str | Path, *, show_small_groups: bool = False) -> None:
        """Write the report to a file, as `seqfair report --out` does.

        Args:
            path: the file. It ends in .html for the whole report, or in .csv, .md or .tex for its
                tables.
            show_small_groups: do not hide the figures of groups of fewer than 5 users.

        Raises:
            UserError: if the name ends in something else, or the file cannot be written.
        """
        out = workdir.user_path(path)
        files.write(self.runs, self.contents, out, show_small_groups=show_small_groups)


def _folder(model: "Model | str | Path") -> Path:
    return model.folder if isinstance(model, Model) else workdir.user_path(model)


# Tables in the work directory.


def _make(folder: str | Path) -> Path:
    """The absolute path of the work directory, which is made."""
    return workdir.create(folder).resolve()


def _store_log(folder: Path, log: Any, config: ConfigDict) -> str:
    """Write the log to `inputs/`, unless it is there; returns its path.

    Raises:
        UserError: if a run of the folder has another log there.
    """
    path = Path(source.log_path(folder, log, config))
    before = _input(folder, "path")
    if before in (None, path):
        return str(path)
    difference = _difference(pq.read_table(before), pq.read_table(path))
    path.unlink()
    if difference:
        raise UserError(
            f"log is another table than the one that {folder} was trained on ({difference}); give "
            "the same table, or another workdir"
        )
    return str(before)  # another version of pyarrow wrote it


def _difference(old: pa.Table, new: pa.Table) -> str:
    """In what two tables differ; "" if in nothing."""
    if old.equals(new):
        return ""
    if old.schema != new.schema:
        return f"its columns were {_columns(old)}, and are {_columns(new)}"
    if len(old) != len(new):
        return f"it had {len(old):,} rows, and has {len(new):,}"
    return "the values of some rows differ"


def _columns(table: pa.Table) -> str:
    return ", ".join(f"{field.name} ({field.type})" for field in table.schema)


def _input(folder: Path, key: str) -> Path | None:
    """The table in `inputs/` that the config of the run in a folder names; None if there is none.

    Args:
        folder: a work directory.
        key: of the config's `data`.
    """
    config = workdir.read_json(folder / workdir.CONFIG)
    path = config and config["data"].get(key)
    if not path or not workdir.is_input(folder, path):
        return None
    return folder / workdir.INPUTS / Path(path).name


def _input_table(folder: Path, key: str) -> pa.Table | None:
    """The table of `_input`."""
    path = _input(folder, key)
    return None if path is None else pq.read_table(path)


# Arguments of `Model`.


def _is_table(value: Any) -> bool:
    return hasattr(value, "columns") or hasattr(value, "column_names")


def _items(given: Any, name: str) -> Any:
    """A table of items; None stays."""
    return given if given is None or _is_table(given) else _ids(given, name, "item_id")


def _is_several(values: Any) -> bool:
    return hasattr(values, "__iter__") and not isinstance(values, str | bytes)


def _ids(given: Any, what: str, column: str) -> pd.DataFrame:
    """A list, an array or a series of ids as a table."""
    values = given.to_pylist() if hasattr(given, "to_pylist") else given
    if not _is_several(values):
        raise UserError(f"{what}: {given!r} is one value; give a list, such as [{given!r}]")
    return pd.DataFrame({column: list(values)})


def _vectors(values: Any, ids: np.ndarray, name: str) -> pd.DataFrame:
    return pd.DataFrame(np.asarray(values, np.float32), index=pd.Index(ids, name=name))


# What is shown.


@contextlib.contextmanager
def _shown(verbose: bool) -> Iterator[None]:
    """Show what the commands show, or warnings alone."""
    with contextlib.ExitStack() as stack:
        if not _LOG.hasHandlers():  # else the program shows the messages as it likes
            stack.enter_context(log_to_stderr())
            if not verbose:
                _LOG.setLevel(logging.WARNING)
        if not verbose:
            sink = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(sink))
            stack.enter_context(contextlib.redirect_stderr(sink))
        yield
