"""The paper's tables 1 to 7 and figures, from one resumable sweep.

Start the command several times, once for each core or device, to share the work.
"""

from pathlib import Path

from ml_collections import ConfigDict

from seqfair_jax import __version__, workdir
from seqfair_jax.config import format_value, resolve
from seqfair_jax.data.split import Dataset
from seqfair_jax.errors import UserError
from seqfair_jax.objectives import METHODS
from seqfair_jax.paper import choice, claims, tables
from seqfair_jax.paper.table1 import table_1a, table_1b
from seqfair_jax.report import text
from seqfair_jax.sweeps import cost, grid, jobs
from seqfair_jax.training.experiment import Experiment, build_experiment
from seqfair_jax.training.selection import RULES


def reproduce(
    config: ConfigDict,
    directory: str | Path,
    *,
    dry_run: bool = False,
    rates: cost.Rates | None = None,
    workers: jobs.Workers | None = None,
) -> None:
    """Run a sweep and write its tables to `directory/tables`.

    Finished jobs are skipped, interrupted ones are resumed, and failed ones are listed at the
    end. Several processes may run at once.

    Args:
        config: with a `sweep` (`sweeps.grid.default_sweep`).
        directory: the sweep's folder.
        dry_run: print the plan with its runs, steps, FLOPs and time, and train nothing.
        rates: of the device that the time is for; without them it is for this machine.
        workers: that run the jobs; without them this process does.

    Raises:
        UserError: on a bad setting, or results made by another config.
        SystemExit: if jobs failed, naming them; after SIGINT or SIGTERM.
    """
    workdir.refuse_old_sweep(workdir.user_path(directory))
    base, settings = grid.split_sweep(config)
    experiment = build_experiment(resolve(base))
    if dry_run:
        folder = workdir.user_path(directory)
        runs_per_job = _runs_per_job(settings.runs_per_job, experiment, folder)
        first = grid.plan(base, settings, runs_per_job=runs_per_job)
        any_values = [
            (method, family, {key: settings[key][0] for key in METHODS[method].reads})
            for method, family in dict.fromkeys((job.method, job.family) for job in first)
        ]
        more = grid.plan_chosen(base, settings, any_values, runs_per_job=runs_per_job)
        total = cost.estimate([*first, *more], experiment, runs_per_job, rates)
        _print_jobs(first, more, total, rates)
        return
    folder = workdir.create(directory)
    with workdir.lock(workdir.job_lock(folder, "plan"), wait=True):
        workdir.remove_unfinished(folder)
        saved = workdir.read_json(folder / workdir.PLAN) or {}
        inputs = jobs.check_inputs(saved.get("inputs", {}), experiment, folder)
        runs_per_job = _runs_per_job(settings.runs_per_job, experiment, folder, workers)
        workdir.write_json(folder / workdir.PLAN, {"runs_per_job": runs_per_job, "inputs": inputs})
    read: dict[str, list[choice.Result]] = {}  # by the job's name; each is read once

    def results(of_jobs: list[jobs.Job]) -> list[choice.Result]:
        done = jobs.done(of_jobs, folder)
        read.update({j.name: choice.read_job(j, folder) for j in done if j.name not in read})
        return [result for job in done for result in read[job.name]]

    common = {"seeds": grid.choice_seeds(base, settings), "families": settings.families}
    first = grid.plan(base, settings, runs_per_job=runs_per_job)
    errors = jobs.work(first, folder, workers)
    found = results(first)
    chosen = []
    for rule in RULES:
        for (method, family), hparams in choice.choose_values(found, rule, **common).items():
            value = (method, family or None, hparams)
            chosen += [value] if value not in chosen else []
    more = grid.plan_chosen(base, settings, chosen, runs_per_job=runs_per_job)
    errors |= jobs.work(more, folder, workers)
    failed = jobs.failures(errors, [*first, *more], folder)
    with workdir.lock(workdir.job_lock(folder, "tables"), wait=True):
        # All jobs that are finished now, also those that other processes trained.
        found = results([*first, *more])
        if failed and not any(result.method == "erm" for result in found):
            raise SystemExit(f"no tables without a finished ERM run\n{failed}")
        entries = {rule: choice.choose(found, rule, **common) for rule in RULES}
        source = (
            f"seqfair_jax {__version__}, settings {grid.config_hash(base, settings)}, log "
            f"{experiment.dataset.log_hash[:12]}."
        )
        target = folder / workdir.TABLES
        workdir.remove_unfinished(target)
        files = _write_tables(entries, base.data.name, base.select.metric, target, source)
        files += _write_table_1(experiment.dataset, target, source)
    print("\n" + workdir.read_text(folder / workdir.TABLES / "overall.md"))
    print("files: " + ", ".join(str(path) for path in files))
    if failed:
        raise SystemExit(failed)


def _write_tables(
    entries: dict[str, list[choice.Entry]],
    dataset: str,
    metric: str,
    directory: Path,
    source: str,
) -> list[Path]:
    longs = [tables.long_table(found, metric, rule) for rule, found in entries.items()]
    files = tables.write(longs, dataset, metric, directory, source=source)
    for rule, found in entries.items():
        table = claims.compare_methods(found, metric)
        title = f"# {dataset}: the claims, test {metric}, chosen by {rule} on validation"
        page = "\n\n".join([title, source, claims.page(table)])
        for ending, content in (("md", page), ("csv", table.to_csv(index=False))):
            path = directory / f"{rule}-claims.{ending}"
            workdir.write_text(path, content)
            files.append(path)
    return files


def _write_table_1(dataset: Dataset, directory: Path, source: str) -> list[Path]:
    parts = [f"# {dataset.name}: the paper's table 1\n", f"{source}\n"]
    files = []
    for part, table in (("1a", table_1a(dataset)), ("1b", table_1b(dataset))):
        rows = table.astype(str).to_numpy().tolist()
        parts += [text.markdown_table(list(map(str, table)), rows), ""]
        files.append(directory / f"table_{part}.csv")
        workdir.write_text(files[-1], table.to_csv(index=False))
    workdir.write_text(directory / "table_1.md", "\n".join(parts))
    return [*files, directory / "table_1.md"]


def _runs_per_job(
    asked: int, experiment: Experiment, folder: Path, workers: jobs.Workers | None = None
) -> int:
    """The sweep's own figure; for a new sweep `asked`, or as many as fit into the memory.

    The plan depends on it, so it cannot change within a sweep.
    """
    plan = workdir.read_json(folder / workdir.PLAN)
    if plan is None:
        if asked or workers is None:
            return asked or cost.measure_runs_per_job(experiment)
        return workers.submit(_measure, experiment.config).result()  # of their memory
    if asked and asked != plan["runs_per_job"]:
        raise UserError(
            f"sweep.runs_per_job is {asked}, but the sweep in {folder} was started with "
            f"{plan['runs_per_job']}: use that, or another --workdir"
        )
    return int(plan["runs_per_job"])


def _measure(config: ConfigDict) -> int:
    return cost.measure_runs_per_job(build_experiment(config))


def _print_jobs(
    first: list[jobs.Job], more: list[jobs.Job], total: cost.Estimate, rates: cost.Rates | None
) -> None:
    # If the two rules choose different values, there are more jobs than this.
    for job in first:
        values = [
            f"{key}={','.join(map(format_value, job.config.objective[key]))}"
            for key in METHODS[job.method].reads
        ]
        print(" ".join([f"{job.name}:", *values, _seeds(job)]))
    for job in more:
        print(f"{job.name}: with the values that validate best, {_seeds(job)}")
    if rates is None:
        time = (
            f"of training on this machine (estimated from {cost.TIMED_STEPS} steps, without "
            "compilation, validation and test)"
        )
    elif rates.users:
        time = (
            f"on one device that trains on {rates.targets:,.0f} targets and validates "
            f"{rates.users:,.0f} users a second (without compilation and test)"
        )
    else:
        time = (
            f"of training on one device that trains on {rates.targets:,.0f} targets a second "
            "(without compilation, validation and test)"
        )
    print(
        f"{len(first) + len(more)} jobs, {total.runs} runs, {total.steps:,} steps, "
        f"{total.targets:.2e} targets, {total.validated:.2e} users validated, {total.flop:.2e} "
        f"FLOP, about {total.seconds / 3600:.1f} hours {time}"
    )


def _seeds(job: jobs.Job) -> str:
    return "seed=" + ",".join(map(str, job.config.seeds))
