import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest
from sweeps import Threads, tiny

from seqfair_jax import workdir
from seqfair_jax.commands.reproduce import main
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.paper.reproduce import reproduce
from seqfair_jax.report import contents
from seqfair_jax.report import runs as report_runs
from seqfair_jax.sweeps import cost, jobs

TESTS = Path(__file__).parent


def test_the_plan_is_printed_and_no_folder_is_made(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cost, "TIMED_STEPS", 1)
    config = tiny(**{"seeds": (0, 1), "sweep.choice_seeds": 1})
    reproduce(config, tmp_path / "none", dry_run=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:-1] == [
        "erm: seed=0",
        "gdro-pop33: step_size=0.01 seed=0",
        "gdro-seq33: step_size=0.01 seed=0",
        "cvar: alpha=0.3,0.6 seed=0",
        "erm-more_seeds: with the values that validate best, seed=1",
        "gdro-pop33-step_size=0.01-more_seeds: with the values that validate best, seed=1",
        "gdro-seq33-step_size=0.01-more_seeds: with the values that validate best, seed=1",
        "cvar-alpha=0.3-more_seeds: with the values that validate best, seed=1",
    ]
    assert lines[-1].startswith("8 jobs, 9 runs, 90 steps, ")
    assert " targets, 5.06e+03 users validated, " in lines[-1]
    assert lines[-1].endswith("(estimated from 1 steps, without compilation, validation and test)")
    assert not (tmp_path / "none").exists()


def test_the_plan_is_printed_with_the_cost_on_another_device(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(TESTS)!r})\nfrom sweeps import tiny as get_config\n"
    )
    command = [f"--config={file}", f"--workdir={tmp_path}/none", "--dry_run"]
    main([*command, "--targets_per_second=0.1"])
    main([*command, "--targets_per_second=0.1", "--users_per_second=0.5"])
    out = capsys.readouterr().out
    costs = re.findall(r"about ([\d.]+) hours (.*)", out)
    rate = "on one device that trains on 0 targets"
    assert [words.partition(" a second")[0] for _, words in costs] == [
        f"of training {rate}", f"{rate} and validates 0 users",
    ]  # fmt: skip
    [validated] = set(re.findall(r"([\d.e+]+) users validated", out))
    more = float(costs[1][0]) - float(costs[0][0])
    assert more == pytest.approx(float(validated) / 0.5 / 3600, rel=0.05)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--targets_per_second=9"], "needs --dry_run"),
        (["--dry_run", "--users_per_second=9"], "needs both"),
        (["--dry_run", "--targets_per_second=-1"], "--targets_per_second is -1.0"),
        (["--dry_run", "--targets_per_second=nan"], "--targets_per_second is nan"),
    ],
)
def test_rates_that_have_no_meaning(flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--config=paper_rr", f"--workdir={tmp_path}/none", *flags])
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    reproduce(tiny(), folder)
    return folder


def test_tables_and_figures_of_a_sweep(finished, capsys):
    tables = finished / "tables"
    names = {path.name for path in tables.iterdir()}
    for rule in ("overall", "worst_group"):
        for slug in (
            "popularity_groups",
            "sequence-length_groups",
            "intersecting_groups",
            "repeat_and_new_targets",
        ):
            assert f"{rule}-{slug}.csv" in names
        assert {f"{rule}.md", f"{rule}.tex", f"{rule}-change.png", f"{rule}-change.pdf"} <= names
    assert {"table_1.md", "table_1a.csv", "table_1b.csv"} <= names
    summary = workdir.read_json(finished / "jobs" / "erm" / "summary.json")
    assert pd.read_csv(tables / "table_1b.csv")["users"].tolist() == [summary["dataset"]["users"]]
    assert "| pop33 | niche/diverse/popular |" in (tables / "table_1.md").read_text()
    results = pd.read_csv(tables / "results.csv", keep_default_na=False, na_values=[""])
    chosen = results[(results["rule"] == "overall") & (results["slice"] == "overall")]
    assert list(chosen["method"])[:4] == ["erm", "gdro", "gdro", "cvar"]
    means = {}
    for alpha in (0.3, 0.6):
        folder = finished / "jobs" / "cvar" / "runs" / f"alpha={alpha:g},seed=0"
        rows = pd.read_json(folder / "metrics.jsonl", lines=True)
        means[alpha] = rows["val/NDCG@20/overall"].max()
    best = max(means, key=means.get)
    cvar = chosen[chosen["method"] == "cvar"].iloc[0]
    assert cvar["hparams"] == f"alpha={best:g}"
    per_user = pd.read_parquet(
        finished / "jobs" / "cvar" / "runs" / f"alpha={best:g},seed=0" / "per_user.parquet"
    )
    assert cvar["value"] == pytest.approx(per_user["NDCG@20"].mean())


def test_a_finished_sweep_trains_nothing_again(finished, monkeypatch, capsys):
    before = (finished / "tables" / "overall.md").read_text()
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("trained again"))
    read = []
    folders_of = workdir.finished_folders
    monkeypatch.setattr(
        workdir, "finished_folders", lambda folder: read.append(folder.name) or folders_of(folder)
    )
    reproduce(tiny(), finished)
    assert read == ["erm", "gdro-pop33", "gdro-seq33", "cvar"]  # each once: it hashes all files
    assert (finished / "tables" / "overall.md").read_text() == before
    with pytest.raises(UserError, match="was started with"):
        reproduce(tiny(**{"sweep.runs_per_job": 1}), finished)
    with pytest.raises(UserError, match=r"train\.learning_rate"):
        reproduce(tiny(**{"train.learning_rate": 0.5}), finished)


def test_jobs_of_another_log_are_not_added(finished, tmp_path, monkeypatch):
    folder = shutil.copytree(finished, tmp_path / "sweep")
    plan = workdir.read_json(folder / "plan.json")
    assert set(plan["inputs"]) == {"log", "groups of pop33", "groups of seq33"}
    workdir.write_json(folder / "plan.json", plan | {"inputs": plan["inputs"] | {"log": "f" * 64}})
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("trained"))
    with pytest.raises(UserError, match="was begun with another log .hash ffffffffffff then"):
        reproduce(tiny(), folder)


def test_the_runs_of_a_job_are_measured_once(tmp_path, monkeypatch):
    def run(config, folder):
        raise DivergedError("diverged")

    monkeypatch.setattr(jobs, "run", run)
    config = tiny(**{"sweep.runs_per_job": 0})
    for measured, expected in ((1, 1), (2, 1)):  # another machine may have more memory
        monkeypatch.setattr(cost, "measure_runs_per_job", lambda _, number=measured: number)
        with pytest.raises(SystemExit, match="5 of 5 jobs failed"):
            reproduce(config, tmp_path)
        assert workdir.read_json(tmp_path / "plan.json")["runs_per_job"] == expected


def test_workers_measure_their_memory_and_run_the_jobs(finished, tmp_path, monkeypatch):
    measured = []
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)
    monkeypatch.setattr(cost, "measure_runs_per_job", lambda of: measured.append(of.names) or 8)
    monkeypatch.setattr(
        jobs, "run", lambda _, folder: shutil.copytree(finished / "jobs" / folder.name, folder)
    )
    with Threads() as workers:
        for _ in range(2):
            reproduce(tiny(**{"sweep.runs_per_job": 0}), tmp_path, workers=workers)
    assert len(measured) == 1
    assert workdir.read_json(tmp_path / "plan.json")["runs_per_job"] == 8
    for name in ("results.csv", "overall-claims.csv"):
        with_them, without = (folder / "tables" / name for folder in (tmp_path, finished))
        assert with_them.read_text() == without.read_text()


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_sweep_of_version_0_1_0_is_refused(dry_run, tmp_path):
    (tmp_path / "calls").mkdir()
    workdir.write_json(tmp_path / "plan.json", {"runs_per_call": 1})
    with pytest.raises(UserError, match=r"version 0\.1\.0 made this sweep"):
        reproduce(tiny(), tmp_path, dry_run=dry_run)
    assert {path.name for path in tmp_path.iterdir()} == {"calls", "plan.json"}


def test_without_erm_the_failures_are_shown_instead_of_tables(tmp_path, monkeypatch):
    def run(config, folder):
        raise UserError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(jobs, "run", run)
    with pytest.raises(SystemExit, match=r"no tables.*\n4 of 4 jobs failed:\n  erm: RESOURCE"):
        reproduce(tiny(), tmp_path)


def test_a_failing_job_is_reported_when_the_others_are_done(finished, tmp_path, monkeypatch):
    trained = []

    def run(config, folder):
        if config.objective.name == "gdro":
            raise DivergedError("diverged")
        trained.append(folder.name)
        shutil.copytree(finished / "jobs" / folder.name, folder)

    monkeypatch.setattr(jobs, "run", run)
    with pytest.raises(SystemExit, match=r"2 of 4 jobs failed:\n  gdro-pop33: diverged"):
        reproduce(tiny(), tmp_path)
    assert trained == ["erm", "cvar"]
    text = (tmp_path / "tables" / "overall.md").read_text()
    assert "| CVaR |" in text
    assert "GDRO" not in text


# Processes of their own. They are forked from one that has imported everything, before JAX starts
# its threads: an import takes seconds.
_PROCESSES = """
import os, signal, sys, traceback
sys.path.insert(0, {tests!r})
from sweeps import tiny
from seqfair_jax.paper.reproduce import reproduce

folder = sys.argv[1]

def process(work, *args, out=None):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        if out is not None:
            os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT), 1)
        work(*args)
        sys.stdout.flush()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)
"""

_SHARED = """
config = tiny(**{
    "seeds": (0, 1), "sweep.choice_seeds": 1, "sweep.intersections": ("pop33&seq33",),
})
pids = [process(reproduce, config, folder, out=f"{folder}-{n}.out") for n in range(2)]
sys.exit(max(os.waitpid(pid, 0)[1] for pid in pids))
"""

_KILLED = """
def life(left):
    def counting(real):
        def move(*args, **kwargs):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)
        return move

    os.replace, os.rename = counting(os.replace), counting(os.rename)
    reproduce(tiny(), folder)

for left in map(int, sys.argv[2:]):
    print(os.waitpid(process(life, left, out=os.devnull), 0)[1], flush=True)
"""


def start(script, *arguments):
    code = _PROCESSES.format(tests=str(TESTS)) + script
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_a_whole_sweep_beyond_the_paper_shared_by_two_processes(tmp_path):
    done = start(_SHARED, tmp_path / "sweep")
    assert done.returncode == 0, done.stderr
    printed = [(tmp_path / f"sweep-{n}.out").read_text() for n in range(2)]
    # Each job was trained by one of them, and both ended with the table.
    names = {unquote(path.name) for path in (tmp_path / "sweep" / "jobs").iterdir()}
    chosen_alphas = {name for name in names if name.startswith("cvar-alpha=")}
    assert names == chosen_alphas | {
        "erm", "erm-more_seeds", "gdro-pop33", "gdro-pop33-step_size=0.01-more_seeds",
        "gdro-seq33", "gdro-seq33-step_size=0.01-more_seeds",
        "gdro-pop33&seq33-step_size=0.01", "cvar",
    }  # fmt: skip
    assert 1 <= len(chosen_alphas) <= 2  # as the two rules agree or not
    trained = re.findall(r"^\[\d+/\d+\] (.+)$", "\n".join(printed), re.MULTILINE)
    assert sorted(trained) == sorted(names)
    assert all("| GDRO_pop33&seq33 |" in out for out in printed)

    tables = tmp_path / "sweep" / "tables"
    results = pd.read_csv(tables / "results.csv", keep_default_na=False, na_values=[""])
    overall = results[results["slice"] == "overall"]
    methods = overall[(overall["rule"] == "overall") & ~overall["method"].str.startswith("[")]
    families = methods["group_family"].fillna("").tolist()
    assert families == ["", "pop33", "seq33", "", "pop33&seq33"]
    assert methods["seeds"].tolist() == [2, 2, 2, 2, 1]
    assert methods["sd"].notna().tolist() == [True, True, True, True, False]
    # Chosen on the first seed alone, though both are reported.
    val = {}
    for alpha in (0.3, 0.6):
        run_folder = tmp_path / "sweep" / "jobs" / "cvar" / "runs" / f"alpha={alpha:g},seed=0"
        rows = pd.read_json(run_folder / "metrics.jsonl", lines=True)
        val[alpha] = rows["val/NDCG@20/overall"].max()
    [hparams] = methods.loc[methods["method"] == "cvar", "hparams"]
    assert hparams == f"alpha={max(val, key=val.get):g}"
    # The general report takes a sweep's folders too, and both seeds of ERM for the baseline.
    planned = sorted((tmp_path / "sweep" / "jobs").iterdir())
    found = report_runs.read_runs(planned)
    erm = tmp_path / "sweep" / "jobs" / "erm"
    rows = contents.build(found, "NDCG@20", baseline=erm).tests
    rows = rows[rows["kind"] == "run"]
    assert set(rows["name"][rows["name"].str.startswith("ERM")]) <= {"ERM, best worst group"}
    chosen = hparams.replace("=", " ")
    one = rows[(rows["slice"] == "overall") & (rows["name"] == f"CVaR ({chosen})")]
    [sweeps] = methods.loc[methods["method"] == "cvar", "difference"]
    assert one["difference"].item() == pytest.approx(sweeps)
    claims_text = (tables / "overall-claims.md").read_text()
    assert "| cvar - gdro(pop33&seq33) |" in claims_text
    assert "| gdro(pop33&seq33) - gdro(pop33) |" in claims_text
    assert "settings " in claims_text.splitlines()[2]


@pytest.mark.slow
def test_killed_at_ten_moments_it_ends_with_the_same_tables(finished, tmp_path):
    # Every durable write is a rename, so kills before the n-th of them are spread over planning,
    # training, checkpoints, tests and tables; the numbers grow, so that every life gets further.
    folder = tmp_path / "sweep"
    moves = (1, 5, 8, 11, 14, 17, 17, 17, 17, 12)
    done = start(_KILLED, folder, *moves, 0)
    statuses = [int(line) for line in done.stdout.split()]
    assert statuses == [signal.SIGKILL] * 10 + [0], done.stderr
    for name in ("results.csv", "overall.md", "worst_group.tex"):
        assert (folder / "tables" / name).read_text() == (finished / "tables" / name).read_text()
    assert not list(folder.rglob("*.unfinished*"))
