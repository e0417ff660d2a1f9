"""The paper's tables 1 to 7 and figures from one command, resumable.

`python -m seqfair_jax.reproduce --config=configs/paper_rr.py --workdir=runs/paper_rr`

The same command in several processes (one a core or a device) shares the work.
"""

import functools
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from seqfair_jax import __version__, claims, paper_tables, sweep, tables, workdir, worker
from seqfair_jax.config import resolve
from seqfair_jax.data.split import Dataset
from seqfair_jax.paper.table1 import table_1a, table_1b
from seqfair_jax.training.experiment import Experiment, prepare
from seqfair_jax.main import command
from seqfair_jax.objectives import METHODS

_PLAN = "plan.json"


def main() -> None:
    """Plan, train what is missing, and write the tables; or print the plan alone."""
    dry_run = flags.DEFINE_bool("dry_run", False, "print the plan and what it costs, no more")
    command(lambda config, directory: reproduce(config, directory, dry_run=dry_run.value))


def reproduce(config: ConfigDict, directory: str | Path, *, dry_run: bool = False) -> None:
    """Work through a sweep and write its tables to `directory/tables`.

    A call that is done is not done again, one that was stopped goes on where it was; one that
    fails is reported at the end, when the others are done. Several processes may run at once.

    Args:
        config: with a `sweep` (`sweep.default_sweep`).
        directory: the sweep's folder.
        dry_run: print the plan with its runs, steps, FLOPs and time here, and train nothing.

    Raises:
        ValueError: on a bad setting, or results made by another config.
        SystemExit: where calls failed, naming them; after SIGINT or SIGTERM.
    """
    base, settings = sweep.split_config(config)
    experiment = prepare(resolve(base))
    if dry_run:
        runs_per_call = _runs_per_call(settings.runs_per_call, experiment, Path(directory))
        calls = sweep.plan(base, settings, runs_per_call=runs_per_call)
        any_values = [
            (method, family, {key: settings[key][0] for key in METHODS[method].hyperparams})
            for method, family in dict.fromkeys((call.method, call.family) for call in calls)
        ]
        more = sweep.plan_chosen(base, settings, any_values, runs_per_call=runs_per_call)
        _print_plan(calls, more, sweep.estimate([*calls, *more], experiment, runs_per_call))
        return
    folder = workdir.create(directory)
    with worker.claim(folder, "plan", wait=True):
        runs_per_call = _runs_per_call(settings.runs_per_call, experiment, folder)
        workdir.write_json(folder / _PLAN, {"runs_per_call": runs_per_call})
    metric = base.select.metric
    choose = functools.partial(
        paper_tables.choose,
        directory=folder,
        seeds=sweep.choice_seeds(base, settings),
    )
    calls = sweep.plan(base, settings, runs_per_call=runs_per_call)
    errors = worker.work(calls, folder)
    done = worker.done(calls, folder)
    chosen = []
    for rule in paper_tables.RULES:
        for entry in choose(done, rule=rule):
            value = (entry.method, entry.family or None, entry.hparams)
            chosen += [value] if value not in chosen else []
    more = sweep.plan_chosen(base, settings, chosen, runs_per_call=runs_per_call)
    errors |= worker.work(more, folder)
    failed = worker.failures(errors, [*calls, *more], folder)
    with worker.claim(folder, "tables", wait=True):
        # As they lie in the folder, whichever process trained them.
        done = worker.done([*calls, *more], folder)
        if failed and not any(call.method == "erm" for call in done):
            sys.exit(f"no tables without a finished ERM run\n{failed}")
        entries = {rule: choose(done, rule=rule) for rule in paper_tables.RULES}
        source = (
            f"seqfair_jax {__version__}, settings {sweep.config_hash(base, settings)}, log "
            f"{experiment.dataset.log_hash[:12]}."
        )
        files = _write_tables(entries, base.data.name, metric, folder / "tables", source)
        files += _write_table_1(experiment.dataset, folder / "tables", source)
    print("\n" + (folder / "tables" / "overall.md").read_text(encoding="utf-8"))
    print("files: " + ", ".join(str(path) for path in files))
    if failed:
        sys.exit(failed)


def _write_tables(
    entries: dict[str, list[paper_tables.Entry]],
    dataset: str,
    metric: str,
    directory: Path,
    source: str,
) -> list[Path]:
    longs = [paper_tables.long_table(found, metric, rule) for rule, found in entries.items()]
    files = paper_tables.write(longs, dataset, metric, directory, source=source)
    for rule, found in entries.items():
        table = claims.compare(found, metric)
        title = f"# {dataset}: the claims, test {metric}, chosen by {rule} on validation"
        text = "\n\n".join([title, source, claims.markdown(table)])
        for ending, content in (("md", text), ("csv", table.to_csv(index=False))):
            path = directory / f"{rule}-claims.{ending}"
            workdir.write_text(path, content)
            files.append(path)
    return files


def _write_table_1(dataset: Dataset, directory: Path, source: str) -> list[Path]:
    text = [f"# {dataset.name}: the paper's table 1\n", f"{source}\n"]
    files = []
    for part, table in (("1a", table_1a(dataset)), ("1b", table_1b(dataset))):
        rows = table.astype(str).to_numpy().tolist()
        text += [tables.markdown(list(map(str, table)), rows), ""]
        files.append(directory / f"table_{part}.csv")
        workdir.write_text(files[-1], table.to_csv(index=False))
    workdir.write_text(directory / "table_1.md", "\n".join(text))
    return [*files, directory / "table_1.md"]


def _runs_per_call(asked: int, experiment: Experiment, folder: Path) -> int:
    """As asked, else as measured; once a sweep has begun, as it began, since calls depend on it."""
    plan = workdir.read_json(folder / _PLAN)
    if plan is None:
        return asked or sweep.measure_runs_per_call(experiment)
    if asked and asked != plan["runs_per_call"]:
        raise ValueError(
            f"sweep.runs_per_call is {asked}, but the sweep in {folder} was begun with "
            f"{plan['runs_per_call']}: leave it so, or name another --workdir"
        )
    return int(plan["runs_per_call"])


def _print_plan(calls: list[worker.Call], more: list[worker.Call], cost: sweep.Estimate) -> None:
    # The rules of choice may differ, so there may be more calls of chosen values than here.
    for call in calls:
        values = [
            f"{key}={','.join(f'{value:g}' for value in call.config.objective[key])}"
            for key in METHODS[call.method].hyperparams
        ]
        print(" ".join([f"{call.name}:", *values, _seeds(call)]))
    for call in more:
        print(f"{call.name}: the values that validate best, {_seeds(call)}")
    print(
        f"{len(calls) + len(more)} calls, {cost.runs} runs, {cost.steps:,} steps, "
        f"{cost.flop:.2e} FLOP, "
        f"about {cost.seconds / 3600:.1f} hours of training here (from timed steps; without "
        "compilation, validation and test)"
    )


def _seeds(call: worker.Call) -> str:
    return "seed=" + ",".join(map(str, call.config.seeds))


if __name__ == "__main__":
    main()
