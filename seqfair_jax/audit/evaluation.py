"""Judge systems: a finished run again, other runs, any recommender's lists, and the baselines."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pandas as pd
from jax.sharding import Mesh

from seqfair_jax import devices, workdir
from seqfair_jax.audit import gate, other_runs, source
from seqfair_jax.audit.gate import Gate
from seqfair_jax.audit.lists import FLAG, Ranked, describe, read_lists
from seqfair_jax.audit.source import Choice, Source
from seqfair_jax.config import default_config
from seqfair_jax.config.change import change
from seqfair_jax.data.files import hash_files
from seqfair_jax.data.tables import stored_tables
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance
from seqfair_jax.evaluation.metrics import metric_names, parse_metric
from seqfair_jax.evaluation.ranking import Ranking, make_ranker
from seqfair_jax.evaluation.slices import target_means
from seqfair_jax.report import contents, text
from seqfair_jax.report.contents import Contents
from seqfair_jax.report.names import baseline_name
from seqfair_jax.report.rows import BASELINE, LIST, RUN, PerUser, Row
from seqfair_jax.report.runs import row_name, unique_name
from seqfair_jax.results import Judge, warn_of_masked_targets
from seqfair_jax.serving import load
from seqfair_jax.serving.trained import run_folder
from seqfair_jax.training.selection import FINISHED, RULES


class System(NamedTuple):
    """A run, another run, or a recommender's lists, and how they did."""

    name: str  # of its row
    kind: str  # RUN; LIST for all others, which are compared as systems and not as methods
    summary: dict[str, Any]  # its `summary.json`
    per_user: pd.DataFrame  # its `per_user.parquet`
    inputs: Mapping[str, str]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation:
    """How systems did on the test of one log, by group. Printing it shows the tables."""

    source: Source
    systems: tuple[System, ...]  # the run first, if there is one
    baselines: pd.DataFrame  # the metrics of each user, as `baselines.parquet` has them
    found: Mapping[str, Mapping[str, int | str]]  # in each system's lists
    metric: str  # the first to show

    @property
    def metrics(self) -> list[str]:
        """Every metric: `NDCG@20`, `Recall@20`, ..."""
        return metric_names(self.source.config.evaluate.cutoffs)

    def contents(self, metric: str = "", baseline: str | None = None) -> Contents:
        """The rows, the tests and what else a report says.

        Args:
            metric: one of `metrics`; "" for the first to show.
            baseline: the name of the row that the others are tested against, such as "old" or
                "markov", or the run's method, such as "erm". Without one it is the only other
                run, else the run; or, without a run, the best baseline without training.

        Raises:
            UserError: if there is no such metric or row.
        """
        metric = metric or self.metric
        return contents.of_rows(
            self._rows(metric),
            metric,
            [family.name for family in self.source.families],
            dataset=self.source.description,
            min_users=self.source.config.select.min_users,
            named=self._reference(baseline),
        )

    def table(self, metric: str = "") -> pd.DataFrame:
        """A row for each system, baseline and slice: users, mean, and its 95 % interval.

        The columns are name, kind, slice, users, mean, low and high. The interval is over
        users (`significance.describe`).
        """
        parts = []
        for row in self._rows(metric or self.metric):
            assert row.per_user is not None
            means = significance.describe(row.per_user()[0], metric or self.metric)
            means = means.rename_axis("slice").reset_index()
            parts.append(means.assign(name=row.name, kind=row.kind))
        columns = ["name", "kind", "slice", "users", "mean", "low", "high"]
        return pd.concat(parts, ignore_index=True)[columns]

    def tests(self, metric: str = "", baseline: str | None = None) -> pd.DataFrame:
        """The paired tests of all other rows against one: see `contents`."""
        return self.contents(metric, baseline).tests

    def gate(self, margin: float, reference: str | None = None, metric: str = "") -> Gate:
        """Whether the first system is worse than another row, for all users or for a group.

        The first system is the run or, without one, the first of the lists. See `gate.judge` for
        the rule. Printing the result shows its table.

        Args:
            margin: the loss of the metric that is allowed, such as 0.01.
            reference: the row to compare with, as `baseline` of `contents`; None for the only
                other row that is no baseline.
            metric: as for `contents`.

        Raises:
            UserError: if the margin is not from 0 to below 1, there is no such metric or row, no
                reference is named and there are several, or it is the first system itself.
        """
        names = [system.name for system in self.systems]
        reference = gate.only_reference(names[1:]) if reference is None else reference
        return gate.judge(self.contents(metric, reference), names[0], margin)

    def recommended(self) -> pd.DataFrame:
        """What the lists show, by slice: name, figure (`coverage@20`, ...), slice and value."""
        records = [
            (system.name, figure, name, value)
            for system in self.systems
            for figure, means in system.summary["recommended"].items()
            for name, value in means.items()
        ]
        return pd.DataFrame(records, columns=["name", "figure", "slice", "value"])

    def text(self, metrics: Sequence[str] = (), baseline: str | None = None) -> str:
        """What was found in the lists, and what other runs know; for each metric the tables and the
        tests; the lists' width.

        Args:
            metrics: those to show; () for the first one.
            baseline: as for `contents`.
        """
        every = [self.contents(metric, baseline) for metric in metrics or [self.metric]]
        others = {s.name: s.summary["evaluation"].get("other_run") for s in self.systems}
        parts = [other_runs.describe(name, record) for name, record in others.items() if record]
        if self.found:
            rule = (
                "The figures of lists are right only if no row of the test was used to make them."
            )
            parts += [describe(self.found), rule]
        parts.append(text.verdict_text(every[0]))
        for shown in every:
            parts.append(text.contents_tables(shown))
            if len(shown.tests):
                parts.append(text.comparison(shown))
        return "\n\n".join([*parts, text.recommended(every[0])])

    def __repr__(self) -> str:
        return self.text()

    def write(
        self, out: str | Path, gate: Gate | None = None, *, baseline: str | None = None
    ) -> None:
        """Write a folder that `seqfair report` reads as it does a run's: all of it or nothing.

        Args:
            out: the folder, new or empty.
            gate: what `gate` returned, to write as `gate.json`; None for no such file.
            baseline: the row that a report of the folder tests the others against, as for
                `contents`. The run is stored only if it is named: in a report with other runs
                another row may be the better default.

        Raises:
            UserError: if the folder has files, or cannot be written, or if there is no such row.
        """
        named = self._reference(baseline)
        if baseline is None and any(s.kind == RUN and s.name == named for s in self.systems):
            named = None

        def write(folder: Path) -> None:
            self._write(folder, named)
            if gate is not None:
                workdir.write_json(folder / workdir.GATE, gate.record())

        workdir.write_folder(workdir.user_path(out), write)

    def _reference(self, baseline: str | None) -> str | None:
        """The name of the row that the others are tested against, as `contents` says."""
        if baseline is not None:
            return self._row_named(baseline)
        runs = [system.name for system in self.systems if system.kind == RUN]
        others = [s.name for s in self.systems if "other_run" in s.summary["evaluation"]]
        return next(iter(others if runs and len(others) == 1 else runs), None)

    def _row_named(self, baseline: str) -> str:
        """The name of the row that a user calls `baseline`."""
        also: dict[str, list[str]] = {}
        for system in self.systems:
            if system.kind == RUN:
                also.setdefault(system.summary["method"], []).append(system.name)
        untrained = map(baseline_name, self.systems[0].summary["baselines"])
        names = [*(system.name for system in self.systems), *untrained]
        return contents.row_named(baseline, names, also)

    def _rows(self, metric: str) -> list[Row]:
        parse_metric(metric)
        if metric not in self.metrics:
            raise UserError(f"{metric} was not evaluated; there are {', '.join(self.metrics)}")
        found = []
        for system in self.systems:
            val = system.summary.get("val")
            found.append(
                Row(
                    system.name,
                    system.kind,
                    (system.summary["test"][metric],),
                    _one_seed(system.per_user),
                    () if val is None else (val[metric],),
                    system.name if system.kind == RUN else "",
                    recommended=(system.summary["recommended"],),
                )
            )
        shared = self.systems[0]
        users = shared.per_user
        for name, means in shared.summary["baselines"].items():
            own = self.baselines[self.baselines["baseline"] == name].set_index("user_id")[metric]
            table = users.assign(**{metric: own.reindex(users["user_id"]).to_numpy()})
            row = Row(baseline_name(name), BASELINE, (means[metric],), _one_seed(table))
            found.append(row)
        return found

    def _write(self, folder: Path, baseline: str | None) -> None:
        names = [system.summary["run"] for system in self.systems]
        config = workdir.jsonable(self.source.config.to_dict())
        groups = {family.name: family.labels() for family in self.source.families}
        users = pd.DataFrame({"user_id": self.source.dataset.user_ids, **groups})
        parts = workdir.run_folders(folder, names)
        for part, system in zip(parts, self.systems, strict=True):
            workdir.write_json(part / workdir.CONFIG, config)
            evaluation = {**system.summary["evaluation"], "baseline": baseline}
            workdir.write_json(part / workdir.SUMMARY, system.summary | {"evaluation": evaluation})
            workdir.write_parquet(workdir.per_user(part, ""), system.per_user)
            workdir.write_parquet(part / workdir.BASELINES, self.baselines)
            workdir.write_parquet(part / workdir.GROUPS, users)
            if system.kind == RUN and self.source.folder is not None:
                for name in (workdir.METRICS, workdir.ENVIRONMENT):
                    shutil.copyfile(self.source.folder / name, part / name)
            workdir.finish(part, system.inputs)
        if len(names) > 1:
            keys = ("run", "hparams", "seed", "status")
            runs = [{key: system.summary[key] for key in keys} for system in self.systems]
            shared = {key: self.systems[0].summary[key] for key in _SHARED}
            workdir.write_json(folder / workdir.CONFIG, config)
            workdir.write_json(folder / workdir.SUMMARY, shared | {"runs": runs, "selected": None})
            workdir.finish(folder, self.source.inputs)


def _one_seed(table: pd.DataFrame) -> PerUser:
    return lambda: {0: table}


_SHARED = (
    "schema_version", "dataset", "validation_sizes", "baselines", "baseline_choices", "evaluation",
)  # fmt: skip


def evaluate(
    judged: Source,
    lists: Mapping[str, Any],
    runs: Mapping[str, str] = MappingProxyType({}),
    *,
    rule: str = "overall",
    metrics: Sequence[str] = (),
    mesh: Mesh | None = None,
) -> Evaluation:
    """Judge a run's test again, recommenders' lists, and other runs on the same test.

    Args:
        judged: the log, from `source.from_run` or `source.from_config`; with a run, it is tested.
        lists: for each name a table or its path, see `lists.read_lists`.
        runs: for each name the folder of another finished run, see `other_runs.rank_test`.
        rule: which epoch of the runs: the one that was best "overall", or for the "worst_group".
        metrics: to show, as `parse_metrics` returns them.
        mesh: the devices that share the runs' users and their catalogues; one if None. They need
            not be those of the training.

    Raises:
        UserError: on bad lists or runs, if lists and a run have one name, or if there is nothing to
            judge.
    """
    for name in lists.keys() & runs.keys():
        raise UserError(
            f"lists and a run are both called {name!r}; give one another name, as in "
            f"--{other_runs.FLAG}=NAME=DIR"
        )
    for folder in runs.values():
        run_folder(workdir.user_path(folder), None)  # a wrong path fails before the test
    config = judged.config
    warn_of_masked_targets(judged.dataset, config.evaluate.mask_seen)
    judge = Judge(judged.dataset, judged.families, config)
    table, baselines = judge.baselines(config)
    shared = {
        "schema_version": workdir.SCHEMA_VERSION,
        "dataset": dict(judged.description),
        "validation_sizes": judge.validation_sizes,
        **baselines,
    }
    systems = []
    if judged.folder is not None:
        systems.append(_test_run(judged, judge, rule, shared, mesh))
    taken = [system.name for system in systems] + [
        baseline_name(name) for name in baselines["baselines"]
    ]
    found: dict[str, Mapping[str, int | str]] = {}
    for name, given in [*lists.items(), *runs.items()]:
        row = unique_name(name, taken)
        taken.append(row)
        if name in runs:
            systems.append(_judge_other_run(judged, judge, given, name, row, rule, shared, mesh))
        else:
            systems.append(_judge_lists(judged, judge, given, name, row, shared))
            found[row] = systems[-1].summary["evaluation"]["lists"]
    if not systems:
        raise UserError(f"nothing to judge: give --{FLAG}, or --workdir of a finished run")
    kind, k = parse_metric(config.select.metric)
    cutoffs = config.evaluate.cutoffs
    preferred = f"{kind}@{k if k in cutoffs else cutoffs[0]}"
    return Evaluation(judged, tuple(systems), table, found, next(iter(metrics), preferred))


def _judge_lists(
    judged: Source, judge: Judge, given: Any, name: str, row: str, shared: dict[str, Any]
) -> System:
    """Judge one recommender's lists."""
    settings = judged.config.evaluate
    read = read_lists(
        given, judged.dataset, top_k=max(settings.cutoffs), named=judged.config.data.columns
    )
    of_file = {FLAG: hash_files([workdir.user_path(given)])} if isinstance(given, str) else {}
    evaluation = {"lists": read.found}
    return _system(judged, judge, name, row, shared, read.ranked, evaluation, of_file)


def _judge_other_run(
    judged: Source,
    judge: Judge,
    folder: str,
    name: str,
    row: str,
    rule: str,
    shared: dict[str, Any],
    mesh: Mesh | None,
) -> System:
    """Judge another run on the same test."""
    settings = judged.config.evaluate
    tested = other_runs.rank_test(
        folder,
        judged.dataset,
        rule=rule,
        mask_seen=settings.mask_seen,
        batch_size=settings.batch_size,
        top_k=max(settings.cutoffs),
        mesh=mesh,
    )
    other_runs.warn_of_trained_targets(tested.record)
    evaluation = {"other_run": tested.record}
    of_run = {other_runs.FLAG: tested.record["results"]}
    return _system(judged, judge, name, row, shared, tested.ranking, evaluation, of_run)


def _system(
    judged: Source,
    judge: Judge,
    name: str,
    row: str,
    shared: dict[str, Any],
    ranked: Ranked | Ranking,
    evaluation: dict[str, Any],
    inputs: Mapping[str, str],
) -> System:
    """A system that is not the run of the test, from its ranks and lists."""
    per_user, means = judge.ranks(ranked.ranks)
    summary = shared | {
        "kind": LIST,
        "method": LIST,
        "label": name,
        "group_family": "",
        "needs_groups": False,
        "logs": [],
        "run": f"{LIST}={name}",
        "hparams": {},
        "seed": 0,
        "status": FINISHED,
        "test": means,
        "recommended": judge.lists(ranked.top_items),
        "evaluation": evaluation,
    }
    return System(row, LIST, summary, per_user, {**judged.inputs, **inputs})


def _test_run(
    judged: Source, judge: Judge, rule: str, shared: dict[str, Any], mesh: Mesh | None
) -> System:
    """Test a run again."""
    assert judged.folder is not None
    settings, dataset = judged.config.evaluate, judged.dataset
    trained = load(judged.folder, rule=rule, mesh=mesh)
    suffix, folder = RULES[rule].suffix, judged.folder

    def ranking(split: str, top_k: int):
        rank = make_ranker(
            trained.model,
            dataset,
            split,
            mask_seen=settings.mask_seen,
            batch_size=settings.batch_size,
            top_k=top_k,
            neighbours=trained.neighbours,
            mesh=mesh,
        )
        part = "test" if split == "test" else "validation"
        return rank(trained.params, f"{part} of {trained.run}")

    tested = ranking("test", judge.top_k)
    per_user, means = judge.ranks(tested.ranks)
    valid = [family.select(dataset.valid.users) for family in judged.families]
    ranks = ranking("valid", 0).ranks
    val = target_means(
        ranks,
        dataset.valid,
        valid,
        settings.cutoffs,
        min_users=judged.config.select.min_users,
    )[1]
    of_run = workdir.read_summary(folder)
    kept = {
        key: value
        for key, value in of_run.items()
        if not any(r.suffix and key.endswith(r.suffix) for r in RULES.values())
    }
    summary = kept | shared | {
        "best": of_run["best" + suffix],
        "val": val,
        "test": means,
        "recommended": judge.lists(tested.top_items),
        "evaluation": {"run": workdir.finished_hash(folder), "rule": rule},
    }  # fmt: skip
    return System(row_name(summary), RUN, summary, per_user, judged.inputs)


def parse_metrics(names: Sequence[str], cutoffs: Sequence[int]) -> list[str]:
    """Metrics with their cut-offs: NDCG is NDCG@k for every cut-off.

    Raises:
        UserError: on an unknown metric, or a cut-off that is not evaluated.
    """
    found: dict[str, None] = {}
    for name in names:
        wanted = [name] if "@" in name else [f"{name}@{k}" for k in cutoffs]
        for metric in wanted:
            k = parse_metric(metric)[1]
            if k not in cutoffs:
                raise UserError(
                    f"{metric}: the cut-offs are {', '.join(map(str, cutoffs))}; give {k} too"
                )
            found[metric] = None
    return list(found)


def evaluate_recommendations(
    recommendations: Any,
    log: Any,
    *,
    groups: Any = None,
    cutoffs: Sequence[int] | None = None,
    mask_seen: bool | None = None,
    run: str | None = None,
    rule: str = "overall",
    data: int = 1,
    catalogue: int = 1,
    settings: Mapping[str, Any] | None = None,
) -> Evaluation:
    """Judge any recommender's lists, or other runs, on a log's held-out targets, by user group.

    A user without a list misses all targets. See `lists.read_lists` for the columns.

    Args:
        recommendations: a table of pandas, polars or pyarrow, or the path of one; or the folder of
            a finished run on another log or split, which ranks the same targets
            (`other_runs.rank_test`); or several by name, as in {"old": "runs/old", "new": table}.
        log: the folder of a finished run, which is judged too; or a log, as a table or the path of
            one, of which no model is trained.
        groups: a family's name or several, such as ["pop33", "seq33"]; or a table of the users'
            groups or its path, as `data.group_file` takes it, of which all families are used; or a
            list of a table and families; None for those of the run or of the settings.
        cutoffs: of the metrics; None for those of the run or of the settings.
        mask_seen: never recommend items of the history, by the run and the baselines; None for
            what the run or the settings say.
        run: of a folder with a grid, the name of a run.
        rule: which epoch of the runs: the one that was best "overall", or for the "worst_group".
        data, catalogue: devices that share the users and the items of the runs, as for `load`.
        settings: of a log, by key: {"data.split": "time", "data.min_interactions": 1}. See
            docs/settings.md.

    Raises:
        UserError: on bad tables, settings or names.
    """
    is_named = isinstance(recommendations, Mapping)
    given = dict(recommendations) if is_named else {FLAG: recommendations}
    given = {
        str(name): os.fsdecode(of) if workdir.is_path(of) else of for name, of in given.items()
    }
    runs = {name: of for name, of in given.items() if source.is_run(of)}
    lists = {name: of for name, of in given.items() if name not in runs}
    mesh = devices.make_mesh(data=data, catalogue=catalogue)
    with tempfile.TemporaryDirectory() as temporary:
        choice = Choice(cutoffs=cutoffs, mask_seen=mask_seen)
        inputs = Path(temporary) / workdir.INPUTS
        table, names = source.split_groups(groups)
        choice = choice._replace(groups=names or None)
        if table is not None:
            choice = choice._replace(group_file=source.group_path(Path(temporary), table))
        if source.is_run(log):
            if settings:
                raise UserError(f"settings are of a log, and {log} is the folder of a run")
            with stored_tables(inputs):
                judged = _unstored(source.from_run(log, run, choice), inputs)
            return evaluate(judged, lists, runs, rule=rule, mesh=mesh)
        if run is not None or (not runs and (rule != "overall" or mesh.size > 1)):
            raise UserError(
                "run, rule, data and catalogue are of a run, and log is no folder of a run"
            )
        config = default_config()
        config.data.name = "csv"
        change(config, settings or {})
        if workdir.is_path(log):
            config.data.path = os.fsdecode(log)
        else:
            config.data.path = source.log_path(Path(temporary), log, config)
            config.data.title = config.data.title or source.LOG_TITLE
            config.data.cache_dir = ""
        with stored_tables(inputs):
            judged = _unstored(source.from_config(config, choice), inputs)
        return evaluate(judged, lists, runs, rule=rule, mesh=mesh)


def _unstored(judged: Source, inputs: Path) -> Source:
    """A source whose config does not name the tables of a temporary folder `inputs`."""
    config = judged.config.copy_and_resolve_references()
    for key in ("path", "group_file"):
        if config.data[key] and Path(config.data[key]).parent == inputs:
            config.data[key] = None
    return judged._replace(config=config)
