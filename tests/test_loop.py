"""Training from the host's side: failures, early stopping, resuming and locks."""

import os
import shutil
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tqdm
from runs import rows_of, slow_but, small

from seqfair_jax import results, serving, workdir
from seqfair_jax.config import resolve
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.run import run
from seqfair_jax.training import loop, progress, resume
from seqfair_jax.training.experiment import build_experiment


def test_fewer_epochs_than_are_done_are_refused(finished):
    folder = finished().folder
    with pytest.raises(UserError, match=r"train.epochs is 1, but .* has trained 2 epochs"):
        run(small(**{"train.epochs": 1}), folder)
    workdir.check_finished(folder)  # nothing changed


@pytest.mark.parametrize(
    "options", slow_but([{}, {"train.average_decay": 0.9, "model.neighbours": 3}], [{}])
)
def test_the_scores_in_the_summary_are_those_of_the_parameters_that_are_kept(options, finished):
    changes = {"train.learning_rate": 0.1, "train.epochs": 5, **options}
    config, run = resolve(small(**changes)), finished(**changes)
    validate = loop.make_validation(build_experiment(config))
    for rule, suffix in (("overall", ""), ("worst_group", "_worst_group")):
        params = serving.load(run.folder, rule=rule).params
        assert validate(params, rule) == run.summary["val" + suffix]
        assert "val" not in run.summary["best" + suffix]


def test_a_finished_run_is_validated_again_by_other_groups_and_cut_offs(tmp_path, finished):
    shutil.copytree(finished().folder, tmp_path, dirs_exist_ok=True)
    changes = {"evaluate.cutoffs": (5, 20), "groups": ("pop33", "seq2060")}
    again, whole = run(small(**changes), tmp_path), finished(**changes).summary
    for suffix in ("", "_worst_group"):
        assert list(again["val" + suffix]) == list(again["test" + suffix])
        assert again["val" + suffix] == whole["val" + suffix]


def test_scores_are_those_of_their_groups_and_of_their_cut_offs():
    changes = ({}, {"evaluate.cutoffs": (5, 20)}, {"groups": ("pop33",)}, {})
    found = [resume._scored_by(build_experiment(resolve(small(**change)))) for change in changes]
    assert found[0] == found[3]
    assert len(set(found)) == 3


@pytest.mark.parametrize("axis", slow_but(["vmap", "map"], ["map"]))
def test_a_run_whose_scores_are_not_finite_fails_alone(axis, tmp_path, monkeypatch):
    """Finite parameters whose scores overflow, which only the validation sees."""
    make_validation = loop.make_validation

    def poisoned(experiment):
        validate = make_validation(experiment)

        def overflow(params, name):
            if name == "seed=1":
                params = jax.tree.map(lambda leaf: leaf * 1e30, params)
            return validate(params, name)

        return overflow

    monkeypatch.setattr(loop, "make_validation", poisoned)
    summary = run(small(seeds=(0, 1), **{"train.runs_axis": axis}), tmp_path)
    assert [r["status"] for r in summary["runs"]] == ["finished", "failed at step 5"]
    assert [row["epoch"] for row in rows_of(tmp_path / "runs" / "seed=0")] == [1, 2]
    assert rows_of(tmp_path / "runs" / "seed=1") == []
    failed = workdir.read_summary(tmp_path / "runs" / "seed=1")
    assert failed["train"]["steps"] == 5  # of 10
    assert "test" not in failed


@pytest.mark.parametrize(
    ("objective", "advice"),
    [
        ("erm", "train.learning_rate, or"),
        ("sdro", "train.learning_rate or other values of objective.step_size and "
         "objective.stream_rate, or"),
    ],
)  # fmt: skip
def test_a_single_run_whose_scores_are_not_finite_is_an_error(
    objective, advice, tmp_path, monkeypatch
):
    def diverged(experiment):
        def validate(params, name):
            raise DivergedError("a score is not finite")

        return validate

    monkeypatch.setattr(loop, "make_validation", diverged)
    with pytest.raises(
        DivergedError, match=r"every run diverged.*score.*seed=0 at step 5"
    ) as found:
        run(small(objective), tmp_path)
    assert f"Try a smaller {advice} set train.clip_norm" in str(found.value)


def test_a_run_that_diverges_late_keeps_its_best_epoch_and_is_not_in_the_table(
    tmp_path, finished, monkeypatch, capsys
):
    """It is not trained again by the same command, which would diverge again."""
    first_epoch = finished(**{"train.epochs": 1}).summary
    make_validation = loop.make_validation

    def diverges(experiment):
        validate, epochs = make_validation(experiment), iter(range(1, 9))

        def second_epoch(params, name):
            if next(epochs) == 2:
                raise DivergedError("a score is not finite")
            return validate(params, name)

        return second_epoch

    monkeypatch.setattr(loop, "make_validation", diverges)
    summary = run(small(**{"train.epochs": 4}), tmp_path)
    assert summary["status"] == "failed at step 10"
    assert summary["best"]["epoch"] == 1
    assert summary["test"] == first_epoch["test"]
    capsys.readouterr()
    assert run(small(**{"train.epochs": 4}), tmp_path)["status"] == "failed at step 10"
    printed = capsys.readouterr().out
    assert "ERM, seed 0: failed at step 10, not in the table" in printed
    assert not any(line.startswith("ERM ") and "0." in line for line in printed.splitlines())


def test_scores_that_are_not_finite_in_the_test_fail_the_run_alone(tmp_path, monkeypatch):
    make_ranker = results.Experiment.make_ranker

    def poisoned(self, split, *, top_k):
        rank = make_ranker(self, split, top_k=top_k)

        def overflow(params, what):
            if what == "test of seed=1":
                params = jax.tree.map(lambda leaf: leaf * 1e30, params)
            return rank(params, what)

        return overflow

    monkeypatch.setattr(results.Experiment, "make_ranker", poisoned)
    summary = run(small(seeds=(0, 1)), tmp_path)
    assert [r["status"] for r in summary["runs"]] == ["finished", "failed in the test"]
    assert not (tmp_path / "runs" / "seed=1" / "per_user.parquet").exists()
    assert "test" not in workdir.read_summary(tmp_path / "runs" / "seed=1")


def test_the_advice_on_a_damaged_result_works_for_one_run_of_a_grid(tmp_path):
    config = small(seeds=(0, 1), **{"train.epochs": 1})
    run(config, tmp_path)
    part = tmp_path / "runs" / "seed=1"
    before = workdir.read_summary(part)
    (part / "per_user.parquet").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"per_user\.parquet changed.*seed=1/finished\.json"):
        run(config, tmp_path)
    (part / "finished.json").unlink()
    run(config, tmp_path)
    assert workdir.read_summary(part)["test"] == before["test"]
    workdir.finished_folders(tmp_path)


@pytest.mark.parametrize("damage", ["removed", "damaged"])
def test_results_stay_where_no_checkpoint_can_be_restored(tmp_path, finished, damage):
    shutil.copytree(finished(**{"train.epochs": 1}).folder, tmp_path, dirs_exist_ok=True)
    latest = tmp_path / "checkpoints" / "latest"
    if damage == "removed":
        shutil.rmtree(latest)
    else:
        for file in latest.glob("*/manifest.json"):
            file.write_text("{}")
    message = "checkpoints were removed" if damage == "removed" else "none of the checkpoints"
    with pytest.raises(UserError, match=message):
        run(small(**{"train.epochs": 2}), tmp_path)
    workdir.check_finished(tmp_path)  # the results are as they were


def test_a_run_of_a_grid_has_the_config_of_its_own(tmp_path):
    config = small("cvar", seeds=(0, 1), **{"objective.alpha": (0.3, 0.6), "train.epochs": 1})
    run(config, tmp_path)
    part = tmp_path / "runs" / "alpha=0.6,seed=1"
    stored = workdir.read_json(part / "config.json")
    assert (stored["seeds"], stored["objective"]["alpha"]) == ([1], [0.6])
    with pytest.raises(UserError, match=r"seeds \(\[1\] there, \[0, 1\] now\)"):
        run(config, part)


def test_out_of_memory_names_the_settings_and_other_device_errors_are_raised(tmp_path, monkeypatch):
    def fails(text):
        def fit(*_):
            raise jax.errors.JaxRuntimeError(text)

        return fit

    monkeypatch.setattr("seqfair_jax.run.fit", fails("INTERNAL: Out of memory allocating 9 bytes"))
    with pytest.raises(UserError, match="out of memory"):  # as a CPU reports it
        run(small(), tmp_path)
    monkeypatch.setattr("seqfair_jax.run.fit", fails("RESOURCE_EXHAUSTED: out of memory"))
    with pytest.raises(UserError, match=r"out of memory.*train.batch_size, train.max_logits"):
        run(small(), tmp_path)
    monkeypatch.setattr("seqfair_jax.run.fit", fails("INTERNAL: a bug"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        run(small(), tmp_path)


@pytest.mark.parametrize("axis", slow_but(["vmap", "map"], ["map"]))
def test_a_run_that_stopped_early_keeps_its_result(axis, tmp_path, monkeypatch):
    """Seed 1 stops after the second epoch, and the epochs of seed 0 behind it change nothing."""
    real = loop.close_epoch
    stops = iter([False, False, False, True] + [False] * 10)

    def stop_one(*args, **kwargs):
        return real(*args, **kwargs)._replace(stops=next(stops))

    monkeypatch.setattr(loop, "close_epoch", stop_one)
    changes = {"train.epochs": 4, "train.runs_axis": axis}
    summary = run(small(seeds=(0, 1), **changes), tmp_path / "two")
    assert [r["status"] for r in summary["runs"]] == ["finished"] * 2
    kept, stopped = (workdir.read_summary(tmp_path / "two" / "runs" / f"seed={s}") for s in (0, 1))
    assert (kept["train"]["steps"], stopped["train"]["steps"]) == (20, 10)
    assert stopped["train"]["stopped_epoch"] == 2
    assert stopped["train"]["targets"] < 0.6 * kept["train"]["targets"]
    assert [row["epoch"] for row in rows_of(tmp_path / "two" / "runs" / "seed=1")] == [1, 2]
    monkeypatch.undo()
    short = run(small(seeds=(0, 1), **changes | {"train.epochs": 2}), tmp_path / "short")
    other = workdir.read_summary(tmp_path / "short" / "runs" / "seed=1")
    assert stopped["test"] == other["test"]
    assert short["runs"][1]["best"] == summary["runs"][1]["best"]


def test_no_result_of_fewer_epochs_stays_beside_the_new_config(tmp_path, monkeypatch):
    """A grid is resumed with more epochs and killed after its first checkpoint."""
    run(small(seeds=(0, 1)), tmp_path)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(resume.Saver, "save_if_due", killed)
    longer = small(seeds=(0, 1), **{"train.epochs": 3})
    with pytest.raises(SystemExit):
        run(longer, tmp_path)
    for part in (tmp_path, *(tmp_path / "runs").iterdir()):
        left = {p.name for p in part.iterdir()}
        assert not left & {"summary.json", "finished.json", "per_user.parquet"}
    monkeypatch.undo()
    assert run(longer, tmp_path)["runs"][0]["status"] == "finished"


def test_the_last_validation_is_saved_even_if_the_step_was(tmp_path, monkeypatch):
    """Killed between the last step's checkpoint and the one after its validation."""

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_close_epoch", killed)
    once = small(**{"train.epochs": 1, "train.checkpoint_minutes": 0.0})
    with pytest.raises(SystemExit, match="the state of step 5 is saved"):
        run(once, tmp_path)
    monkeypatch.undo()
    left = tmp_path / "checkpoints" / "latest" / ".unfinished-9"
    left.mkdir()
    run(once, tmp_path)
    stored = workdir.read_json(tmp_path / "checkpoints" / "latest" / "5" / "progress.json")
    assert stored["epoch"] == 1
    assert not left.exists()


def test_a_second_process_is_refused_by_the_firsts_name(tmp_path):
    with workdir.exclusive(tmp_path), pytest.raises(UserError, match=rf"process {os.getpid()} on"):
        run(small(), tmp_path)
    with workdir.exclusive(tmp_path):  # free again
        pass
    code = (
        "import pathlib, sys, time; from seqfair_jax import workdir\n"
        f"with workdir.exclusive(pathlib.Path({str(tmp_path)!r})):\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with pytest.raises(UserError, match=rf"in use by process {process.pid} on .*--workdir"):
            run(small(), tmp_path)
        process.kill()
    assert run(small(**{"train.epochs": 1}), tmp_path)["status"] == "finished"


def test_a_log_that_changed_after_the_run_is_reported(tmp_path, caplog, capsys):
    log = tmp_path / "log.csv"
    rng = np.random.default_rng(0)
    rows = [f"{u},{i},{t}" for u in range(40) for t, i in enumerate(rng.integers(12, size=9))]
    log.write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    config = small(**{"data.name": "csv", "data.path": str(log), "train.epochs": 1})
    config.data.min_interactions = 1
    run(config, tmp_path / "run")
    table = capsys.readouterr().out
    run(config, tmp_path / "run")
    assert "changed" not in caplog.text
    capsys.readouterr()
    log.write_text(log.read_text().replace("0,", "77,", 1))
    run(config, tmp_path / "run")
    assert f"{log} changed after this run finished" in caplog.text
    again = capsys.readouterr().out
    # One row for each of 2 families: both rules chose the only epoch.
    assert sum(line.startswith("ERM ") for line in again.splitlines()) == 2
    assert table.endswith(f"\n{again}\nfiles: {tmp_path / 'run'}\n")
    log.unlink()
    run(config, tmp_path / "run")
    assert "cannot be checked" in caplog.text


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("build_experiment", "stopped before the first checkpoint; the same command starts again"),
        ("test", r"stopped; the state of step 10 is saved in .* the same command resumes"),
    ],
)
def test_an_interrupt_outside_of_training_says_what_is_saved(tmp_path, monkeypatch, where, message):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"seqfair_jax.run.{where}", interrupted)
    with pytest.raises(SystemExit, match=message):
        run(small(), tmp_path)
    monkeypatch.undo()
    assert run(small(), tmp_path)["train"]["steps"] == 10


def test_a_changed_log_without_a_path_is_named(monkeypatch, tmp_path, caplog):
    """As of a log in third_party_data, where data.path is not set."""
    run(small(**{"train.epochs": 1}), tmp_path)
    monkeypatch.setattr("seqfair_jax.workdir.finished_inputs", lambda _: {"log": "another"})
    run(small(**{"train.epochs": 1}), tmp_path)
    assert "the log of synthetic changed after this run finished" in caplog.text


def steps_done(step, *, seconds, best=None):
    totals = types.SimpleNamespace(loss=jnp.ones(1), steps=jnp.ones(1))
    states = types.SimpleNamespace(totals=totals)
    done = progress.Progress("", "", "", [best], [None], [0], step=step, seconds=seconds)
    return progress.Snapshot(states, {}, done)


@pytest.fixture
def clock(monkeypatch):
    """The seconds that tqdm sees, to be moved by hand."""
    now = [0.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    monkeypatch.setattr(progress, "is_training", lambda states: True)
    return now


FOUR_EPOCHS = {"train.epochs": 4, "train.steps_per_epoch": 100}


def test_a_checkpoint_is_due_after_its_minutes(tmp_path, monkeypatch):
    now, saved = [0.0], []
    monkeypatch.setattr(resume, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(
        resume.checkpoint, "save_step", lambda folder, step, *_: saved.append((now[0], step))
    )
    saver = resume.Saver(tmp_path, steps_done(0, seconds=0), minutes=5.0)
    for step, now[0] in enumerate((299.0, 301.0, 600.0, 602.0, 902.5), start=1):
        saver.save_if_due(steps_done(step, seconds=0))
    assert saved == [(301.0, 2), (602.0, 4), (902.5, 5)]


def test_the_bar_does_not_count_the_compilation(clock, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    bar = progress.ProgressBar(small(**FOUR_EPOCHS), steps_done(0, seconds=0))
    for step, waited, seconds in ((1, 35, 0), (2, 0.5, 0.5), (22, 10, 10.5), (23, 60, 10.5)):
        clock[0] += waited
        bar.show_steps(steps_done(step, seconds=seconds))
    clock[0] += 10
    bar.show_steps(steps_done(43, seconds=20.5))
    bar.close()
    lines = capsys.readouterr().err.split("\r")
    assert "compiling" in lines[1]
    assert "compiling" not in lines[-1]
    found = [line.partition("[")[2].split(",")[0] for line in lines if "loss" in line]
    # 0.5 s for a step, so 357 steps in 178 s. 20.5 s of training have passed.
    assert "00:00<?" in found
    assert found[-1] == "00:20<02:58"


def test_without_standard_error_there_is_no_bar(monkeypatch, tmp_path):
    """As in a program without a console, or where it is an object that only writes."""
    monkeypatch.setattr(sys, "stderr", None)
    assert run(small(**{"train.epochs": 1}), tmp_path / "none")["train"]["steps"] == 5
    written = []
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(write=written.append, flush=int))
    assert run(small(**{"train.epochs": 1}), tmp_path / "writes")["train"]["steps"] == 5
    assert "5/5" in "".join(written)


def test_in_a_file_the_bar_is_a_line_a_minute_and_for_each_epoch(clock, capsys):
    bar = progress.ProgressBar(small(**FOUR_EPOCHS), steps_done(0, seconds=0))
    for step in range(1, 101):
        clock[0] += 1.0
        bar.show_steps(steps_done(step, seconds=float(step)))
    best = {name: dict.fromkeys(progress.RULES, 0.25) for name in progress.RULES}
    bar.show_best(steps_done(100, seconds=100.0, best=best))
    clock[0] += 7.0  # the test; the rate would differ
    bar.close()
    out = capsys.readouterr().err
    assert "\r" not in out
    start, minute, epoch, *rest = out.splitlines()
    assert rest == []
    assert "0/400" in start
    assert "compiling" in start
    assert 60 <= int(minute.partition("/400")[0].rpartition(" ")[2]) < 75
    assert "100/400" in epoch
    assert "overall=0.2500" in epoch
