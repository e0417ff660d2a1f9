import os
import time
from concurrent.futures import Future

import jax
import pytest
from sweeps import Threads, planned, tiny, write_results
from test_grid import STRANGE

from seqfair_jax import workdir
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.sweeps import jobs


@pytest.fixture
def plan():
    return planned(tiny())


@pytest.fixture
def trained(monkeypatch):
    """The folders that were trained, by a stand-in for `run.run` that only writes results."""
    folders = []

    def run(config, folder):
        folders.append(folder.name)
        write_results(folder, config)

    monkeypatch.setattr(jobs, "run", run)
    return folders


def test_every_job_runs_once_and_the_lines_count_them(plan, trained, tmp_path, capsys):
    assert jobs.work(plan, tmp_path) == {}
    assert trained == ["erm", "gdro-pop33", "gdro-seq33", "cvar"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == ["[1/4] erm", "[2/4] gdro-pop33", "[3/4] gdro-seq33", "[4/4] cvar"]
    assert jobs.work(plan, tmp_path) == {}
    assert len(trained) == 4
    assert capsys.readouterr().out == ""


def test_a_job_that_another_process_runs_is_waited_for(plan, tmp_path, monkeypatch, capsys):
    job = plan[0]
    naps = []

    def nap(_):
        naps.append(1)
        if len(naps) == 2:  # the other process finishes the job
            write_results(workdir.job_folder(tmp_path, job.name), job.config)

    monkeypatch.setattr(jobs.time, "sleep", nap)
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("trained a job of another process"))
    with workdir.lock(workdir.job_lock(tmp_path, job.name)) as is_locked:
        assert is_locked
        assert jobs.work([job], tmp_path) == {}
    assert len(naps) == 2
    assert capsys.readouterr().out.count("waiting for 1 jobs of other processes") == 1


def test_a_job_of_a_process_that_dies_is_run_here(plan, trained, tmp_path, monkeypatch):
    job = plan[0]
    lock = workdir.lock(workdir.job_lock(tmp_path, job.name))
    lock.__enter__()
    monkeypatch.setattr(jobs.time, "sleep", lambda _: lock.__exit__(None, None, None))
    assert jobs.work([job], tmp_path) == {}
    assert trained == ["erm"]


def test_an_unfinished_job_of_another_config_stops_the_work_before_it_begins(
    plan, trained, tmp_path
):
    last = planned(tiny(**{"train.learning_rate": 0.5}))[-1]
    folder = workdir.job_folder(tmp_path, last.name)
    workdir.write_json(folder / "config.json", workdir.jsonable(last.config.to_dict()))
    with pytest.raises(UserError, match=r"another config.*train\.learning_rate \(0\.5 there"):
        jobs.work(plan, tmp_path)
    assert trained == []


@pytest.mark.parametrize("error", [UserError("bad"), DivergedError("bad")])
def test_a_failing_job_does_not_stop_the_others(error, plan, tmp_path, monkeypatch, caplog):
    def run(config, folder):
        if config.objective.name == "gdro":
            raise error
        write_results(folder, config)

    monkeypatch.setattr(jobs, "run", run)
    errors = jobs.work(plan, tmp_path)
    assert errors == {"gdro-pop33": "bad", "gdro-seq33": "bad"}
    assert [job.name for job in jobs.done(plan, tmp_path)] == ["erm", "cvar"]
    assert "gdro-seq33 failed: bad" in caplog.text


@pytest.mark.parametrize("bug", [ZeroDivisionError, jax.errors.JaxRuntimeError])
def test_a_bug_stops_the_work(bug, plan, tmp_path, monkeypatch):
    def run(config, folder):
        raise bug("INTERNAL")

    monkeypatch.setattr(jobs, "run", run)
    with pytest.raises(bug):
        jobs.work(plan, tmp_path)


@pytest.fixture
def quick_poll(monkeypatch):
    monkeypatch.setattr(jobs, "_POLL_SECONDS", 0.01)


def test_workers_run_every_job_once(plan, trained, tmp_path, capsys, quick_poll):
    write_results(workdir.job_folder(tmp_path, "cvar"), plan[3].config)
    with Threads() as workers:
        assert jobs.work(plan, tmp_path, workers) == {}
    assert sorted(trained) == ["erm", "gdro-pop33", "gdro-seq33"]
    assert jobs.done(plan, tmp_path) == plan
    lines = [line for line in capsys.readouterr().out.splitlines() if line.endswith(": done")]
    assert lines[-1].startswith("[4 of 4 done, 0 running, 0 failed] ")
    assert len(lines) == 3
    with Threads() as workers:
        assert jobs.work(plan, tmp_path, workers) == {}
    assert len(trained) == 3


def test_the_lines_say_which_process_runs_a_job(plan, tmp_path, monkeypatch, quick_poll):
    shown, lines = f"erm: process {os.getpid()} on ", []

    def run(config, folder):
        deadline = time.monotonic() + 10
        while not any(shown in line for line in lines):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        write_results(folder, config)

    monkeypatch.setattr(jobs, "run", run)
    monkeypatch.setattr(jobs, "print", lambda line, **_: lines.append(line), raising=False)
    # A killed process left its name.
    lock = workdir.job_lock(tmp_path, "erm")
    workdir.write_text(lock.with_name(f"{lock.name}.owner"), "process 1 on earth")
    with Threads() as workers:
        assert jobs.work(plan[:1], tmp_path, workers) == {}
    ours = [line for line in lines if " done, " in line]
    assert ours[0].startswith(f"[0 of 1 done, 1 running, 0 failed] {shown}")
    assert ours[1:] == ["[1 of 1 done, 0 running, 0 failed] erm: done"]


class Lossy(Threads):
    """Loses the calls of GDRO."""

    def submit(self, function, /, *args):
        if args[0][0].method != "gdro":
            return super().submit(function, *args)
        lost = Future()
        lost.set_exception(UserError("lost in 4 attempts"))
        return lost


def test_a_job_that_fails_or_is_lost_elsewhere_does_not_stop_the_others(
    plan, tmp_path, capsys, monkeypatch, quick_poll
):
    def run(config, folder):
        if config.objective.name == "cvar":
            raise DivergedError("diverged")
        write_results(folder, config)

    monkeypatch.setattr(jobs, "run", run)
    with Lossy() as workers:
        errors = jobs.work(plan, tmp_path, workers)
    lost = "lost in 4 attempts"
    assert errors == {"gdro-pop33": lost, "gdro-seq33": lost, "cvar": "diverged"}
    assert [job.name for job in jobs.done(plan, tmp_path)] == ["erm"]
    out = capsys.readouterr().out
    assert "1 of 4 done, 0 running, 3 failed] " in out.splitlines()[-1]
    assert "3 of 4 jobs failed:" in jobs.failures(errors, plan, tmp_path)


def test_a_bug_elsewhere_stops_the_work(plan, tmp_path, monkeypatch, quick_poll):
    def run(config, folder):
        raise ZeroDivisionError

    monkeypatch.setattr(jobs, "run", run)
    with Threads() as workers, pytest.raises(ZeroDivisionError):
        jobs.work(plan, tmp_path, workers)


def test_an_interrupted_job_is_run_again(plan, trained, tmp_path):
    folder = workdir.job_folder(tmp_path, plan[0].name)
    workdir.write_json(folder / "config.json", workdir.jsonable(plan[0].config.to_dict()))
    assert jobs.done(plan, tmp_path) == []
    jobs.work(plan[:1], tmp_path)
    assert trained == ["erm"]


def test_a_job_that_failed_here_and_finished_elsewhere_is_no_failure(plan, tmp_path):
    plan = plan[:2]
    errors = {job.name: "diverged" for job in plan}
    lines = jobs.failures(errors, plan, tmp_path).splitlines()
    assert lines == ["2 of 2 jobs failed:", "  erm: diverged", "  gdro-pop33: diverged"]
    assert jobs.done(plan, tmp_path) == []
    for job in plan:
        write_results(workdir.job_folder(tmp_path, job.name), job.config)
    assert jobs.failures(errors, plan, tmp_path) == ""
    assert jobs.done(plan, tmp_path) == plan


def test_a_setting_that_a_job_does_not_read_does_not_undo_it(plan, trained, tmp_path):
    jobs.work(plan, tmp_path)
    now = planned(tiny(**{"objective.absent_groups": "decay"}))
    assert now[0].config.objective.absent_groups != plan[0].config.objective.absent_groups
    assert jobs.work(now, tmp_path) == {}
    assert jobs.done(now, tmp_path) == now
    assert len(trained) == len(plan)


def test_a_job_without_a_result_is_no_success(plan, tmp_path):
    lines = jobs.failures({}, plan[:1], tmp_path).splitlines()
    assert lines == ["1 of 1 jobs failed:", "  erm: it has no result"]


def test_jobs_of_any_family_write_only_into_the_sweeps_folder(trained, tmp_path):
    folder = tmp_path / "deep" / "er" / "sweep"
    plan = planned(tiny(**{"sweep.families": tuple(STRANGE)}))
    assert jobs.work(plan, folder) == {}
    assert len(trained) == len(plan) == 2 + len(STRANGE)
    assert jobs.done(plan, folder) == plan
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.relative_to(folder).parts[0] for path in files} <= {"jobs", "locks"}
    assert len([path for path in files if path.name == "finished.json"]) == len(plan) + 2
    assert len(list((folder / "jobs").iterdir())) == len(plan)
