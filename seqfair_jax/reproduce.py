"""The paper's tables 2 to 7 and figures from one command, resumable.

`python -m seqfair_jax.reproduce --config=configs/paper_rr.py --workdir=runs/paper_rr`

The same command in several processes (one a core or a device) shares the work.
"""

import functools
import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from seqfair_jax import __version__, claims, paper_tables, sweep, workdir, worker
from seqfair_jax.config import resolve
from seqfair_jax.experiment import Experiment, prepare
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
    folder = Path(directory) if dry_run else workdir.create(directory)
    runs_per_call = _runs_per_call(settings.runs_per_call, experiment, folder)
    calls = sweep.plan(base, settings, runs_per_call=runs_per_call)
    if dry_run:
        any_values = {
            (call.method, call.family): {
                key: settings[key][0] for key in METHODS[call.method].hyperparams
            }
            for call in calls
        }
        more = sweep.plan_chosen(base, settings, any_values, runs_per_call=runs_per_call)
        _print_plan(calls, more, sweep.estimate([*calls, *more], experiment, runs_per_call))
        return
    with worker.claim(folder, "plan", wait=True):
        # What another process measured in the meantime counts for this one too.
        runs_per_call = _runs_per_call(settings.runs_per_call or runs_per_call, experiment, folder)
        workdir.write_json(folder / _PLAN, {"runs_per_call": runs_per_call})
    metric = base.select.metric
    choose = functools.partial(
        paper_tables.choose,
        directory=folder,
        metric=metric,
        seeds=sweep.choice_seeds(base, settings),
    )
    outcomes = worker.work(calls, folder)
    best = choose(_done(outcomes), rule="overall")
    chosen = {(entry.method, entry.family or None): entry.hparams for entry in best}
    more = sweep.plan_chosen(base, settings, chosen, runs_per_call=runs_per_call)
    outcomes += worker.work(more, folder)
    with worker.claim(folder, "tables", wait=True):
        entries = {rule: choose(_done(outcomes), rule=rule) for rule in paper_tables.RULES}
        source = (
            f"seqfair_jax {__version__}, settings {sweep.config_hash(base, settings)}, log "
            f"{experiment.dataset.log_hash[:12]}."
        )
        files = _write_tables(entries, base.data.name, metric, folder / "tables", source)
    print("\n" + (folder / "tables" / "overall.md").read_text(encoding="utf-8"))
    print("files: " + ", ".join(str(path) for path in files))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        lines = "\n".join(f"  {outcome.call.name}: {outcome.error}" for outcome in failed)
        sys.exit(f"{len(failed)} of {len(outcomes)} calls failed:\n{lines}")


def _done(outcomes: list[worker.Outcome]) -> list[worker.Call]:
    return [outcome.call for outcome in outcomes if outcome.error is None]


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
