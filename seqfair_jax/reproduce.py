"""The paper's tables 2 to 7 and figures from one command, resumable.

`python -m seqfair_jax.reproduce --config=configs/paper_rr.py --workdir=runs/paper_rr`
"""

import sys
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict

from seqfair_jax import paper_tables, sweep, workdir
from seqfair_jax.config import plan_runs, resolve
from seqfair_jax.experiment import Experiment, prepare
from seqfair_jax.main import command

_PLAN = "plan.json"


def main() -> None:
    """Plan, train what is missing, and write the tables; or print the plan alone."""
    dry_run = flags.DEFINE_bool("dry_run", False, "print the plan and what it costs, no more")
    command(lambda config, directory: reproduce(config, directory, dry_run=dry_run.value))


def reproduce(config: ConfigDict, directory: str | Path, *, dry_run: bool = False) -> None:
    """Work through a sweep and write its tables to `directory/tables`.

    A call that is done is not done again, one that was stopped goes on where it was; one that
    fails is reported at the end, when the others are done.

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
    runs_per_call = _runs_per_call(settings.runs_per_call, experiment, Path(directory))
    calls = sweep.plan(base, settings, runs_per_call=runs_per_call)
    if dry_run:
        _print_plan(calls, sweep.estimate(calls, experiment, runs_per_call))
        return
    folder = workdir.create(directory)
    workdir.write_json(folder / _PLAN, {"runs_per_call": runs_per_call})
    outcomes = sweep.work(calls, folder)
    done = [outcome.call for outcome in outcomes if outcome.error is None]
    metric = base.select.metric
    longs = []
    for rule in paper_tables.RULES:
        entries = paper_tables.choose(done, folder, metric, rule)
        longs.append(paper_tables.long_table(entries, metric, rule))
    files = paper_tables.write(longs, base.data.name, metric, folder / "tables")
    print("\n" + (folder / "tables" / "overall.md").read_text(encoding="utf-8"))
    print("files: " + ", ".join(str(path) for path in files))
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    if failed:
        lines = "\n".join(f"  {outcome.call.name}: {outcome.error}" for outcome in failed)
        sys.exit(f"{len(failed)} of {len(outcomes)} calls failed:\n{lines}")


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


def _print_plan(calls: list[sweep.Call], cost: sweep.Estimate) -> None:
    for call in calls:
        print(f"{call.name}: " + ", ".join(run.name for run in plan_runs(call.config)))
    print(
        f"{len(calls)} calls, {cost.runs} runs, {cost.steps:,} steps, {cost.flop:.2e} FLOP, "
        f"about {cost.seconds / 3600:.1f} hours of training here (from timed steps; without "
        "compilation, validation and test)"
    )


if __name__ == "__main__":
    main()
