"""Reads finished runs and evaluated lists, and gives the rows of tables their names."""

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from seqfair_jax import workdir
from seqfair_jax.config import RESUMABLE, default_config, flatten
from seqfair_jax.data.groups import encode_name
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices
from seqfair_jax.evaluation.metrics import parse_metric
from seqfair_jax.report.names import baseline_name, of_summary, setting_text
from seqfair_jax.training.refit import require_test
from seqfair_jax.training.selection import RULES, is_result

_log = logging.getLogger(__name__)
_SHOWN, _LONG = 4, 40  # differences in a message, and characters of a value
_NAMED = 3  # settings in the name of a row; with more it has the name of its folder instead
# Settings that runs of one row may differ in; `row_name` shows the objective's values.
_FREE = {"seeds", *RESUMABLE} - {"train.epochs", "data.group_file"}


class FinishedRun(NamedTuple):
    """A finished run, one that failed (`selection.is_result`), or another system's lists."""

    folder: Path
    name: str  # of its row: runs of one name differ only in the seed
    summary: dict[str, Any]
    named: tuple[Path, ...] = ()  # the folders that the user named it by: its own, or its grid's
    settings: tuple[tuple[str, str], ...] = ()  # by key, without those that a row may differ in

    @property
    def is_list(self) -> bool:
        """Whether it is another system's lists instead (`seqfair evaluate`)."""
        return is_list(self.summary)


def is_list(summary: Mapping[str, Any]) -> bool:
    """Whether a summary is of another system's lists."""
    return summary.get("kind") == "list"


def metric_of(runs: Sequence[FinishedRun]) -> str:
    """The metric that chose in validation (`select.metric`), or NDCG@20 if runs differ in it."""
    found = {dict(run.settings).get("select.metric") for run in runs if not run.is_list}
    metric = found.pop() if len(found) == 1 else None
    return metric or "NDCG@20"


def row_name(summary: Mapping[str, Any], settings: Sequence[str] = ()) -> str:
    """What the row of a run is called; `settings` tell it from others of its method and values."""
    rule = summary.get("evaluation", {}).get("rule", "overall")  # that it was tested again by
    return of_summary(summary, settings) + RULES[rule].label


def short_names(runs: Sequence[FinishedRun]) -> dict[str, list[str]]:
    """The rows by their other names: of runs the method, and the row's name without settings."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if not run.is_list:
            for name in (run.summary["method"], slices.printable(row_name(run.summary))):
                found.setdefault(name, []).append(run.name)
    return found


def stored_baseline(runs: Sequence[FinishedRun]) -> str | None:
    """The row that `seqfair evaluate` tested the others against (`evaluation.baseline`).

    It is the row of its `--baseline`, or the only one of `--with`. Without these it is the run, but
    only if all rows are of `seqfair evaluate`: beside other runs, the usual rule chooses. None if
    folders name several.
    """
    judged = [run.summary.get("evaluation", {}) for run in runs]
    named = {of["baseline"] for of in judged if of.get("baseline") is not None}
    if not named and all(judged):
        named = {run.name for run in runs if not run.is_list}
    return named.pop() if len(named) == 1 else None


def unique_name(label: str, taken: Collection[str]) -> str:
    """The name of the row of a system's lists."""
    name = slices.printable(label)
    while name in taken:
        name += " (list)"
    return name


def read_runs(folders: Sequence[Path]) -> list[FinishedRun]:
    """The runs of work directories; runs with different settings get different names.

    The name of a row has the settings that differ. If there are many, it has the name of the folder
    that the user gave, and `notes` lists them.

    The folders may have other systems' lists too, as `seqfair evaluate` writes them. A run that it
    tested again is left out if the run itself is there, or the same test.

    This checks all files of the runs, so the result is passed on.

    Raises:
        UserError: if a folder is not finished, is damaged or has a refit, which has no test; or if
            two runs differ in nothing.
    """
    named: dict[Path, list[Path]] = {}  # a grid and one of its runs may both be
    for folder in folders:
        for part in workdir.finished_folders(folder.resolve()):
            named.setdefault(part, []).append(folder)
    read = {part: workdir.read_summary(part) for part in named}
    for part, summary in read.items():
        require_test(named[part][0], summary)
    summaries = _without_copies(read)
    found = []
    # A run of an earlier version lacks settings. It trained as their defaults say.
    defaults = dict(flatten(workdir.jsonable(default_config().to_dict())))
    for part, summary in summaries.items():
        if is_list(summary):
            continue
        settings = dict(flatten(workdir.read_json(part / workdir.CONFIG) or {}))
        settings |= {key: value for key, value in defaults.items() if key not in settings}
        kept = tuple(
            (key, str(value)) for key, value in settings.items() if not _is_free(key, value)
        )
        found.append((part, row_name(summary), kept, summary))
    # Of each method: the settings of its rows, and the first folder that has them.
    variants: dict[str, dict[tuple[tuple[str, str], ...], Path]] = {}
    for part, name, kept, _ in found:
        variants.setdefault(name, {}).setdefault(kept, named[part][0])
    runs: dict[tuple, FinishedRun] = {}
    for part, name, kept, summary in found:
        others = variants[name]
        differing = [
            setting_text(key, value)
            for key, value in kept
            if any((key, value) not in other for other in others)
        ]
        if len(differing) > _NAMED:
            folder = others[kept]
            is_clear = [other.name for other in others.values()].count(folder.name) == 1
            differing = [folder.name if is_clear and folder.name else str(folder)]
        shown = slices.printable(row_name(summary, differing))
        run = FinishedRun(part, shown, summary, tuple(named[part]), kept)
        first = runs.setdefault((run.name, summary["seed"]), run)
        if first is not run:
            _check_dataset(run, first)  # the path of a log is no part of a name
            raise UserError(
                f"{first.folder} and {part} are the same training ({run.name}, seed "
                f"{summary['seed']}): name one of them"
            )
    taken = {run.name for run in runs.values()}
    lists: dict[str, FinishedRun] = {}
    for part, summary in summaries.items():
        if is_list(summary):
            label = summary["label"]
            baselines = map(baseline_name, summary["baselines"])
            run = FinishedRun(part, unique_name(label, {*taken, *baselines}), summary,
                              tuple(named[part]))  # fmt: skip
            first = lists.setdefault(run.name, run)
            if first is not run:
                raise UserError(
                    f"{first.folder} and {part} both have lists that are called {label!r}: name "
                    "one of them, or evaluate again with --recommendations=NAME=FILE"
                )
    return [*runs.values(), *lists.values()]


def _without_copies(summaries: Mapping[Path, dict[str, Any]]) -> dict[Path, dict[str, Any]]:
    """Without the runs that were tested again, where the run or the same test is there too."""
    tested = {part: summary.get("evaluation", {}).get("run") for part, summary in summaries.items()}
    hashes = {workdir.finished_hash(part) for part, source in tested.items() if source is None}
    seen: set[tuple[str, str, bool]] = set()
    kept = {}
    for part, summary in summaries.items():
        source = tested[part]
        key = None
        if source is not None:
            # A report shows the groups and metrics that its folders share.
            config = workdir.read_json(part / workdir.CONFIG) or {}
            key = (source, summary["evaluation"]["rule"], config["evaluate"]["mask_seen"])
        if source in hashes or key in seen:
            what = "the run itself" if source in hashes else "the same test"
            _log.info("%s: %s is there, so this test is left out", part, what)
            continue
        if key is not None:
            seen.add(key)
        kept[part] = summary
    return kept


def _is_free(key: str, value: object) -> bool:
    """Whether runs of one row may differ in a setting.

    They may in the objective's lists, which are hyperparameters: `row_name` shows those that the
    run reads. The others depend on which objectives were registered.
    """
    return key in _FREE or (key.startswith("objective.") and isinstance(value, list))


def shared_families(runs: Sequence[FinishedRun], metric: str, family: str | None) -> list[str]:
    """The canonical names of the families to show of runs that belong into one table.

    Args:
        runs: from `read_runs`.
        metric: such as NDCG@20.
        family: as its user wrote it, or its canonical name; None for all that the runs share.

    Raises:
        UserError: if the logs differ, or the metric or family is not in some run's results.
    """
    parse_metric(metric)
    first = runs[0]
    families: list[str] | None = None
    for run in runs:
        summary = run.summary
        _check_dataset(run, first)
        if metric not in _baseline(summary):
            raise UserError(
                f"{run.folder}: {metric} was not evaluated; there are "
                f"{', '.join(_baseline(summary))}; choose one of these, or leave this run out"
            )
        found = slices.families_in(_baseline(summary)[metric])
        if family is not None:
            known = [name for name in (family, encode_name(family)) if name in found]
            if not known:
                raise UserError(
                    f"{run.folder}: family {family!r} was not evaluated; there are "
                    f"{', '.join(map(slices.family_label, found))}; choose one of these, or leave "
                    "this run out"
                )
            found = known[:1]
        families = [name for name in found if families is None or name in families]
    if not families:
        raise UserError(
            "the runs share no group family: each was evaluated by other families; report them one "
            "by one, or train with the same `groups`"
        )
    return families


def _check_dataset(run: FinishedRun, first: FinishedRun) -> None:
    ours, others = (dict(flatten(of.summary["dataset"])) for of in (run, first))
    differing = {
        key: f"{key} {_short(ours.get(key))} and {_short(others.get(key))}"
        for key in (ours | others)
        if ours.get(key) != others.get(key)
    }
    if set(differing) - {"name"}:  # the same log may be in files of different names
        raise UserError(
            f"{run.folder} and {first.folder} are of different logs or splits "
            f"({_first(list(differing.values()))}): they cannot be compared in one table; report "
            "them one by one, or rank the targets of one run by the other too (seqfair evaluate "
            "--workdir=DIR --with=DIR)"
        )


def _first(differences: Sequence[str]) -> str:
    """The first differences, and how many more there are: a log's hash differs with all counts."""
    more = len(differences) - _SHOWN
    shown = ", ".join(differences[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def _short(value: object) -> str:
    """A value of `dataset` in a message: of a hash its first digits, as runs print it."""
    shown = "none" if value is None else str(value)
    return shown if len(shown) <= _LONG else f"{shown[:12]}…"


def _baseline(summary: dict[str, Any]) -> dict[str, slices.Slices]:
    """The metrics of most_popular, which every summary has."""
    return summary["baselines"]["most_popular"]


def failed_runs(runs: Sequence[FinishedRun]) -> list[str]:
    """A line for each run that failed; such a run is in no mean, rank, figure or test."""
    return [
        f"{run.name}, seed {run.summary['seed']}: {run.summary['status']}, not in the table"
        for run in runs
        if not is_result(run.summary)
    ]


def notes(runs: Sequence[FinishedRun]) -> list[str]:
    """The notes below the tables.

    They have the result of a gate, a line for each run that failed or stopped early, and the
    settings in which the rows differ beside their objectives.
    """
    stopped = [
        f"{run.name}, seed {run.summary['seed']}: stopped early, after epoch "
        f"{run.summary['train']['stopped_epoch']}; its best epoch is {run.summary['best']['epoch']}"
        for run in runs
        if is_result(run.summary) and run.summary.get("train", {}).get("stopped_epoch") is not None
    ]
    return [*gates(runs), *failed_runs(runs), *stopped, *differences(runs)]


def gates(runs: Sequence[FinishedRun]) -> list[str]:
    """The results of the gates of `seqfair evaluate --fail_if_worse`, one for each folder."""
    of_rows = (folder for run in runs for folder in (run.folder, run.folder.parent.parent))
    lines = []
    for folder in dict.fromkeys(of_rows):
        gate = workdir.read_json(folder / workdir.GATE)
        if gate is None:
            continue
        outcomes: dict[str, list[str]] = {}
        for group in gate["groups"]:
            outcomes.setdefault(group["outcome"], []).append(slices.full_label(group["slice"]))
        parts = [f"{outcome} for {', '.join(names)}" for outcome, names in outcomes.items()]
        lines.append(
            f"the gate of seqfair evaluate: {gate['metric']} of {gate['subject']} minus that of "
            f"{gate['reference']}, with an allowed loss of {gate['margin']:g}: {'; '.join(parts)}"
        )
    return lines


def differences(runs: Sequence[FinishedRun]) -> list[str]:
    """What rows differ in beside their objectives, where their names do not say it."""
    rows = {run.name: dict(run.settings) for run in runs if not run.is_list}
    keys = [
        key
        for key in dict.fromkeys(key for settings in rows.values() for key in settings)
        if not key.startswith("objective.") and len({row.get(key) for row in rows.values()}) > 1
    ]
    if not keys:
        return []
    lines = []
    methods = {run.summary["method"] for run in runs if not run.is_list}
    if len(methods) > 1:
        lines.append(
            f"the rows differ in more than the objective ({', '.join(keys)}), so their differences "
            "are not of the objective alone"
        )
    if len(methods) > 1 or len(keys) > _NAMED:
        for name, settings in rows.items():
            values = ", ".join(setting_text(key, settings.get(key, "none")) for key in keys)
            lines.append(f"{name}: {values}")
    return list(map(slices.printable, lines))


def finished_only(folders: Sequence[Path]) -> list[Path]:
    """The folders whose runs have finished with a test; a warning names each of the others.

    Files are left out too, so a pattern may match them.

    Raises:
        UserError: if a folder does not exist, none has finished, or there are only refits.
    """
    finished = [folder for folder in folders if workdir.is_finished(folder)]
    for folder in folders:
        if not finished or not folder.exists():
            workdir.require_folder(folder)
    if not finished:
        raise UserError(
            f"no run has finished in {', '.join(map(str, folders))}; run the training command again"
        )
    for folder in folders:
        if folder not in finished:
            _log.warning("%s is left out: it has no finished run", slices.printable(str(folder)))
    tested = [folder for folder in finished if "refit" not in workdir.read_summary(folder)]
    if not tested:
        require_test(finished[0], workdir.read_summary(finished[0]))
    for folder in finished:
        if folder not in tested:
            judged = workdir.read_summary(folder)["refit"]["folder"]
            _log.warning(
                "%s is left out: it was trained on all rows and has no test, unlike %s",
                *map(slices.printable, (str(folder), judged)),
            )
    return tested


def min_users(runs: Sequence[FinishedRun]) -> int:
    """The `select.min_users` of the runs; the largest if they differ.

    Raises:
        UserError: naming the config of a run, if it cannot be read.
    """
    configs = [workdir.read_json(run.folder / workdir.CONFIG) or {} for run in runs]
    return max(int(config.get("select", {}).get("min_users", 1)) for config in configs)


def take_baseline(given: str) -> Path | str:
    """What `--baseline` names: the folder of a finished run, or else a row by its name.

    Raises:
        UserError: if the text is empty or cannot be read as a path.
    """
    folder = workdir.user_path(given)
    return folder if workdir.is_finished(folder) else given


def name_of_folder(runs: Sequence[FinishedRun], folder: Path) -> str:
    """The name that the runs of a work directory share.

    Raises:
        UserError: if it has several.
    """
    path = folder.resolve()
    own = [run for run in runs if path in (named.resolve() for named in run.named)]
    names = list(dict.fromkeys(run.name for run in own))
    if len(names) != 1:
        raise UserError(
            f"--baseline={folder} has several methods: {', '.join(names)}; name the folder of "
            "one run"
        )
    return names[0]
