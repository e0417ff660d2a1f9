"""`launch/ray_sweep.py` on a local Ray, in processes of its own."""

import contextlib
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
import pytest
from runs import small
from sweeps import tiny
from test_search import searchable

from seqfair_jax import workdir
from seqfair_jax.paper.reproduce import reproduce
from seqfair_jax.sweeps.search import search

ROOT = Path(__file__).parents[1]
LAUNCHER = ROOT / "launch" / "ray_sweep.py"
pytest.importorskip("ray", reason="Ray is an extra")

_SWEEP = {
    "sweep.methods": ("erm", "cvar"),
    "sweep.alpha": (0.3,),
    "train.epochs": 30,
    "train.checkpoint_minutes": 0.0,
}

# A config whose file notes, in each process that trains, where the training starts. The training of
# CVaR is slow until the file `fast` exists.
_CONFIG = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from sweeps import tiny
from seqfair_jax import run as runs

here = Path(__file__).parent

def get_config():
    if not hasattr(runs, "fit_itself"):
        runs.fit_itself, runs.fit = runs.fit, fit
    return tiny(**{changes!r})

def fit(experiment, folder, snapshot, after_epoch=None):
    with (here / folder.name).open("a") as notes:
        print(os.getpid(), snapshot.progress.step, file=notes)
    def wait(now):
        time.sleep(0 if folder.name == "erm" or (here / "fast").exists() else 0.3)
        return False
    return runs.fit_itself(experiment, folder, snapshot, wait)
"""


@pytest.fixture
def started():
    """Starts a Python program; at the end of the test all of its processes are killed."""
    mark = f"seqfair-test-{os.getpid()}-{time.monotonic_ns()}"
    with tempfile.TemporaryDirectory(prefix="ray-") as home:  # a short path: it names sockets
        # Ray writes its sessions and a token.
        environment = os.environ | {"SEQFAIR_MARK": mark, "RAY_TMPDIR": home, "HOME": home}

        def start(*words, cwd):
            return subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=cwd, env=environment, text=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip

        start.alive = lambda: _marked(mark)
        yield start
        for pid in _marked(mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _marked(mark):
    """The processes that have the mark in their environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def until(condition, process, seconds=300):
    """Wait until a condition holds; fails if the process ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def wait_for_the_end(started, seconds=30):
    """Wait until no process of Ray is left."""
    deadline = time.monotonic() + seconds
    while started.alive():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def notes(folder, name):
    """The process and the first step of each training of a job."""
    path = folder / name
    lines = path.read_text().splitlines() if path.exists() else []
    return [tuple(map(int, line.split())) for line in lines if len(line.split()) == 2]


def epochs(job):
    path = job / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
def test_a_killed_worker_and_a_stopped_sweep_change_no_table(tmp_path, started):
    text = _CONFIG.format(tests=str(ROOT / "tests"), changes=_SWEEP)
    (tmp_path / "mine.py").write_text(text)
    command = [
        LAUNCHER, "--local_cpus=2", "seqfair", "reproduce", "--config=mine.py", "--workdir=sweep"
    ]  # fmt: skip
    first = started(*command, cwd=tmp_path)
    job = tmp_path / "sweep" / "jobs" / "cvar"
    until(lambda: epochs(job) >= 3, first)
    [(killed, step)] = notes(tmp_path, "cvar")
    assert step == 0
    os.kill(killed, signal.SIGKILL)
    until(lambda: len(notes(tmp_path, "cvar")) == 2 and epochs(job) >= 6, first)
    first.send_signal(signal.SIGINT)
    printed, _ = first.communicate(timeout=300)
    assert first.returncode == 128 + signal.SIGINT, printed
    assert re.search(rf"cvar: process {killed} on", printed)
    assert "the jobs save their state" in printed
    wait_for_the_end(started)

    (tmp_path / "fast").touch()
    second = started(*command, cwd=tmp_path)
    printed, _ = second.communicate(timeout=300)
    assert second.returncode == 0, printed
    assert "[2 of 2 done, 0 running, 0 failed]" in printed
    pids, steps = zip(*notes(tmp_path, "cvar"), strict=True)
    assert len(set(pids)) == 3
    assert 0 == steps[0] < steps[1] < steps[2] < 150  # each resumed
    # Side by side with the process that was killed; Ray may reuse the other one.
    assert notes(tmp_path, "erm")[0][0] != killed

    reproduce(tiny(**_SWEEP), tmp_path / "without")
    for name in ("results.csv", "overall.md", "worst_group.tex", "overall-claims.csv"):
        with_ray, without = (tmp_path / part / "tables" / name for part in ("sweep", "without"))
        assert with_ray.read_text() == without.read_text()
    for name in ("plan.json", "jobs/cvar/config.json"):
        assert (tmp_path / "sweep" / name).read_text() == (tmp_path / "without" / name).read_text()


_SEARCH = """
import sys
sys.path.insert(0, {tests!r})
from runs import small
from test_search import searchable

def get_config():
    return searchable({space!r}, small(), sampler="grid")
"""
_SPACE = {"train.epochs": "1,2,3,4"}


@pytest.mark.slow
def test_a_search_on_ray_finds_what_one_process_finds(tmp_path, started):
    text = _SEARCH.format(tests=str(ROOT / "tests"), space=_SPACE)
    (tmp_path / "mine.py").write_text(text)
    process = started(
        LAUNCHER, "--local_cpus=2", "seqfair", "search", "--config=mine.py", "--workdir=search",
        "--train_best", cwd=tmp_path,
    )  # fmt: skip
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert "[4 of 4 trials: 4 finished, 0 pruned, 0 failed, 0 unfinished; best so far" in printed
    expected = search(searchable(_SPACE, small(), sampler="grid"), tmp_path / "without")
    found = pd.read_csv(tmp_path / "search" / "trials.csv", keep_default_na=False)
    unequal = ["seconds"]
    pd.testing.assert_frame_equal(
        found.drop(columns=unequal), expected.drop(columns=unequal), check_dtype=False
    )
    best = workdir.read_json(tmp_path / "search" / "best.json")["trial"]
    assert workdir.is_finished(tmp_path / "search" / "trials" / str(best))
    assert "on the test targets" in printed


@pytest.mark.slow
def test_a_plan_for_jobs_of_two_gpus_is_printed_without_ray_or_gpu(tmp_path, started):
    (tmp_path / "mine.py").write_text(_CONFIG.format(tests=str(ROOT / "tests"), changes=_SWEEP))
    process = started(
        LAUNCHER, "--gpus=2", "--address=nowhere:1", "seqfair", "reproduce", "--config=mine.py",
        "--config.train.mesh.data=2", "--workdir=none", "--dry_run", "--targets_per_second=1000",
        cwd=tmp_path,
    )  # fmt: skip
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    assert printed.splitlines()[-1].startswith("2 jobs, 2 runs, ")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cpus=0", "seqfair", "reproduce"], "0: expected 1 or more"),
        (["--gpus=nan", "seqfair", "reproduce"], "nan: expected 0 or more"),
        (["seqfair", "train"], "invalid choice: 'train'"),
        (["reproduce", "--config=demo"], "invalid choice: 'reproduce'"),
    ],
)
def test_a_wrong_call_is_named(words, message, capsys):
    launcher = runpy.run_path(str(LAUNCHER))
    with pytest.raises(SystemExit) as error:
        launcher["main"](words)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


_CALLS = """
import os, runpy, signal, sys
from pathlib import Path

def name(word):
    return f"{word} in {os.getcwd()}, {os.environ['NPROC']} threads"

def fail():
    from seqfair_jax.errors import UserError
    raise UserError("bad log")

def bug():
    return 1 / 0

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def stop_once(note):
    from seqfair_jax.errors import Interrupted
    if not Path(note).exists():
        Path(note).touch()
        raise Interrupted("stopped", signal.SIGTERM)
    return "resumed"

def main(argv, workers):
    assert argv == ["--config=demo", "--workdir=DIR"]
    print("count", workers.count())
    for call in ((name, "works"), (fail,), (bug,), (stop_once, "note"), (die,)):
        try:
            print(workers.submit(*call).result())
        except Exception as error:
            kinds = [kind.__name__ for kind in type(error).__mro__]
            print("UserError" in kinds, str(error).splitlines()[-1])

launcher = runpy.run_path(sys.argv[1])
from seqfair_jax.commands import reproduce
reproduce.main = main
launcher["main"](["--local_cpus=3", "--retries=1", "seqfair", "reproduce", *sys.argv[2:]])
"""


def test_calls_in_a_worker(tmp_path, started):
    process = started("-c", _CALLS, LAUNCHER, "--config=demo", "--workdir=DIR", cwd=tmp_path)
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    lines = [line for line in printed.splitlines() if re.match("count|works|True|False|res", line)]
    assert lines == [
        "count 3",
        f"works in {tmp_path}, 1 threads",
        "True bad log",
        "False ZeroDivisionError: division by zero",
        "resumed",
        lines[-1],
    ], printed
    assert lines[-1].startswith("True lost in 2 attempts; the last: The worker died")
    wait_for_the_end(started)
