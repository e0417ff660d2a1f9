import os
import shutil
import signal
import subprocess
import time

import jax
import numpy as np
import pandas as pd
import pytest
from runs import (
    DROPOUT,
    FILES,
    files_of,
    finish,
    rows_of,
    slow_but,
    small,
    train_command,
    write_config,
)

from seqfair_jax import workdir
from seqfair_jax.config import decay_over_training, resolve
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.evaluation.metrics import KINDS
from seqfair_jax.objectives import METHODS
from seqfair_jax.report import text
from seqfair_jax.run import run, train
from seqfair_jax.training import environment, loop, resume
from seqfair_jax.training.experiment import build_experiment


@pytest.mark.parametrize("method", slow_but(METHODS, ["gdro", "cvar", "gdro_clusters"]))
def test_every_objective_from_log_to_table(method, finished):
    folder, summary, printed = finished(method)
    assert files_of(folder) == FILES
    assert any(line.startswith(METHODS[method].label) for line in printed.splitlines())
    table = pd.read_parquet(folder / "per_user.parquet")
    assert list(table.columns[:4]) == ["user_id", "target_item_id", "repeat", "rank"]
    means = summary["test"]["NDCG@20"]
    assert means["overall"] == pytest.approx(table["NDCG@20"].mean())
    niche = table.loc[table["pop33"] == "niche", "NDCG@20"].mean()
    assert means["pop33=niche"] == pytest.approx(niche)
    assert means["target=new"] == pytest.approx(table.loc[~table["repeat"], "NDCG@20"].mean())
    split = pd.read_parquet(folder / "split.parquet")
    groups = pd.read_parquet(folder / "groups.parquet")
    validating = groups[split["validation_user"].to_numpy()]
    for name, size in summary["validation_sizes"].items():
        family, group = name.split("=")
        assert size == (validating[family] == group).sum()
    assert len(summary["validation_sizes"]) == 6
    assert [row["epoch"] for row in rows_of(folder)] == [1, 2]
    last = rows_of(folder)[-1]
    assert last["step"] == 10
    assert "train/group_loss/niche" in last
    if method in ("gdro", "sdro"):
        omegas = [last[f"train/group_weight/{group}"] for group in ("niche", "diverse", "popular")]
        assert sum(omegas) == pytest.approx(1, abs=1e-5)


def test_too_few_users_to_judge_a_group_is_refused_before_training(tmp_path):
    with pytest.raises(UserError, match=r"no group of pop33 has select.min_users=1000 valid"):
        run(small(**{"select.min_users": 1000}), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


def test_a_finished_run_prints_its_table_again(finished, capsys):
    folder, summary, printed = finished()
    again = run(small(), folder)
    assert again == workdir.jsonable(summary)
    table = capsys.readouterr().out
    assert table.startswith("synthetic, NDCG@20 on the test targets, pop33\n")
    lines = [line for line in table.splitlines() if line.startswith("ERM")]
    assert len(lines) == 2  # of two families; one epoch is the best by both rules
    assert printed.endswith(f"\n{table}\nfiles: {folder}\n")


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {
            "model.gated": True,
            "model.item_bias": True,
            "model.neighbours": 3,
            "model.position_bias": True,
            "train.random_windows": True,
            "train.average_decay": 0.7,
        },
    ],
    ids=["plain", "all_options"],
)
def test_resumed_equals_uninterrupted_bit_for_bit(options, tmp_path, monkeypatch):
    """Stopped in the middle of the second epoch, after the next segment's checkpoint."""
    config = small("sdro", **DROPOUT, **options, **{"train.segment_seconds": 0.0})
    whole = run(config, tmp_path / "whole")

    save = resume.Saver.save

    def save_and_stop(self, snapshot):
        save(self, snapshot)
        if snapshot.progress.step == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(resume.Saver, "save", save_and_stop)
    often = config.copy_and_resolve_references()
    often.train.checkpoint_minutes = 0.0
    with pytest.raises(SystemExit, match=r"the state of step 7 is saved in .*cut"):
        run(often, tmp_path / "cut")
    monkeypatch.undo()
    resumed = run(config, tmp_path / "cut")
    assert rows_of(tmp_path / "cut") == rows_of(tmp_path / "whole")
    assert resumed["test"] == whole["test"]
    assert resumed["train"]["targets"] == whole["train"]["targets"]
    for name in ("per_user.parquet", "per_user_worst_group.parquet"):
        cut, full = (pd.read_parquet(tmp_path / part / name) for part in ("cut", "whole"))
        pd.testing.assert_frame_equal(cut, full, check_exact=True)


def test_more_epochs_resume_after_the_last(tmp_path):
    run(small("sdro", **DROPOUT), tmp_path)
    longer = run(small("sdro", **DROPOUT, **{"train.epochs": 3}), tmp_path)
    assert longer["train"]["steps"] == 15
    assert [row["epoch"] for row in rows_of(tmp_path)] == [1, 2, 3]
    straight = run(small("sdro", **DROPOUT, **{"train.epochs": 3}), tmp_path / "straight" / "deep")
    assert longer["test"] == straight["test"]


def test_a_grid_of_runs(tmp_path, capsys):
    config = small("sdro", seeds=(0, 1), **DROPOUT, **{"objective.step_size": (0.01, 0.1)})
    summary = run(config, tmp_path / "grid")
    names = [f"step_size={eta},seed={seed}" for eta in ("0.01", "0.1") for seed in (0, 1)]
    assert [r["run"] for r in summary["runs"]] == names
    folder = tmp_path / "grid" / "runs"
    for name in names:
        assert files_of(folder / name) == FILES
    by_value = {}
    for r in summary["runs"]:
        score = r["val"]["NDCG@20"]["overall"]
        by_value.setdefault(r["hparams"]["step_size"], []).append(score)
    best = max(by_value, key=lambda value: np.mean(by_value[value]))
    assert summary["selected"]["hparams"] == {"step_size": best, "stream_rate": 0.1}
    assert ", 2 seeds" in capsys.readouterr().out
    alone = run(small("sdro", **DROPOUT, **{"objective.step_size": (0.1,)}), tmp_path / "alone")
    inside = workdir.read_summary(folder / names[2])
    assert inside["test"] == alone["test"]  # one after another on a CPU, so to the last bit


def test_early_stopping_ends_the_run(tmp_path, capsys, caplog):
    """The rate is too low to change a rank, so the second epoch is no better than the first."""
    caplog.set_level("INFO")
    changes = {"train.epochs": 30, "train.early_stop_epochs": 1, "train.learning_rate": 1e-12}
    summary = run(small(**changes), tmp_path)
    assert [row["epoch"] for row in rows_of(tmp_path)] == [1, 2]
    assert (summary["best"]["epoch"], summary["train"]["stopped_epoch"]) == (1, 2)
    assert (summary["train"]["steps"], summary["status"]) == (10, "finished")
    logged = "seed=0 stopped after epoch 2: no better validation NDCG@20 in 1 epochs"
    assert [r.getMessage() for r in caplog.records if "stopped" in r.getMessage()] == [logged]
    last = capsys.readouterr().out.split("\n\n")[-2]
    assert last == "ERM, seed 0: stopped early, after epoch 2; its best epoch is 1"


def test_training_without_the_test_is_resumed_and_tested(tmp_path):
    config = small()
    snapshots = []

    def stop(snapshot):
        snapshots.append(snapshot)
        return True

    _, snapshot = train(config, tmp_path / "parts", after_epoch=stop)
    assert [snapshot.progress.epoch, *(s.progress.epoch for s in snapshots)] == [1, 1]
    assert not workdir.is_finished(tmp_path / "parts")
    _, snapshot = train(config, tmp_path / "parts")
    assert snapshot.progress.epoch == 2
    summary = run(config, tmp_path / "parts")
    whole = run(config, tmp_path / "whole")
    assert summary["test"] == whole["test"]
    assert [row["epoch"] for row in rows_of(tmp_path / "parts")] == [1, 2]


def test_a_diverged_run_is_an_error(tmp_path):
    with pytest.raises(DivergedError, match=r"every run diverged.*learning_rate"):
        run(small(**{"train.learning_rate": 1e30}), tmp_path)


@pytest.mark.parametrize("axis", slow_but(["vmap", "map"], ["vmap"]))
def test_one_diverged_run_does_not_affect_the_others(axis, tmp_path, monkeypatch, caplog):
    """Its parameters are finite, but no loss and no score that they give is."""
    initial = resume.initial_states

    def poisoned(*args, **kwargs):
        states = initial(*args, **kwargs)
        params = jax.tree.map(lambda leaf: leaf.at[1].multiply(1e25), states.params)
        return states._replace(params=params)

    monkeypatch.setattr(resume, "initial_states", poisoned)
    summary = run(small(seeds=(0, 1), **{"train.runs_axis": axis}), tmp_path / "two")
    assert [found["status"] for found in summary["runs"]] == ["finished", "failed at step 0"]
    assert summary["selected"]["seeds"] == 1
    assert "seed=1 diverged at step 0" in caplog.text
    folder = tmp_path / "two" / "runs"
    assert rows_of(folder / "seed=1") == []
    assert not (folder / "seed=1" / "per_user.parquet").exists()
    assert [row["epoch"] for row in rows_of(folder / "seed=0")] == [1, 2]
    table = text.tables([tmp_path / "two"], "NDCG@20")
    assert any(line.startswith("ERM ") for line in table.splitlines())
    assert "ERM, seed 1: failed at step 0, not in the table" in table


def test_a_signal_during_the_last_validation_stops_before_the_test(tmp_path, monkeypatch):
    make_validation = loop.make_validation

    def signalled(experiment):
        validate = make_validation(experiment)
        epochs = iter([False, True])

        def then_stop(*args):
            if next(epochs):
                os.kill(os.getpid(), signal.SIGTERM)
            return validate(*args)

        return then_stop

    monkeypatch.setattr(loop, "make_validation", signalled)
    with pytest.raises(SystemExit, match="stopped at step 10"):
        run(small(), tmp_path)
    assert not (tmp_path / "summary.json").exists()
    monkeypatch.undo()
    assert run(small(), tmp_path)["train"]["steps"] == 10


def test_a_workdir_of_another_config_is_refused_by_name(finished):
    with pytest.raises(UserError, match=r"model\.dim \(8 there, 16 now\)"):
        run(small(**{"model.dim": 16}), finished().folder)


def test_more_epochs_of_a_falling_rate_are_refused(tmp_path):
    def falling(epochs):
        config = small(**{"train.epochs": epochs})
        decay_over_training(config)
        return config

    run(falling(2), tmp_path)
    with pytest.raises(UserError, match=r"decay_steps \(10 there, 15 now\).*follows train.epochs"):
        run(falling(3), tmp_path)


def test_a_batch_larger_than_the_log_does_not_block_the_workdir(tmp_path):
    with pytest.raises(UserError, match="train.batch_size is 3000, but there are"):
        run(small(**{"train.batch_size": 3000}), tmp_path)
    run(small(), tmp_path)


def test_the_table_has_what_epochs_are_chosen_by(tmp_path, capsys):
    config = small(**{"evaluate.cutoffs": (5, 40), "model.max_len": 10})
    summary = run(config, tmp_path)
    assert list(summary["test"]) == [f"{m}@{k}" for k in (5, 40, 20) for m in KINDS]
    assert "NDCG@20 on the test targets" in capsys.readouterr().out
    recall = summary["baselines"]["most_popular"]
    assert recall["Recall@40"]["overall"] > recall["Recall@20"]["overall"]


def test_changed_groups_are_refused_and_a_moved_file_is_not(tmp_path):
    users = pd.DataFrame({"user_id": range(300), "family": "age"})
    one, two = tmp_path / "one.csv", tmp_path / "two.csv"
    users.assign(group=["old", "young"] * 150).to_csv(one, index=False)
    users.assign(group=["young", "old"] * 150).to_csv(two, index=False)

    def config(file, epochs):
        changes = {"data.group_file": str(file), "groups": ("age",), "train.epochs": epochs}
        return small("gdro", **changes)

    run(config(one, 1), tmp_path / "run")
    with pytest.raises(UserError, match="was trained on other groups"):
        run(config(two, 2), tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").exists()  # refused, and nothing was removed
    two.write_bytes(one.read_bytes())
    assert run(config(two, 2), tmp_path / "run")["train"]["steps"] == 10


def test_machines_are_remembered_in_order(tmp_path, finished, monkeypatch, caplog):
    shutil.copytree(finished().folder, tmp_path, dirs_exist_ok=True)
    first = environment.environment(lanes=1)
    monkeypatch.setattr(environment, "environment", lambda *, lanes: first | {"cores": 77})
    for epochs in (3, 4):
        caplog.clear()
        run(small(**{"train.epochs": epochs}), tmp_path)
        assert (f"cores: {first['cores']} then, 77 now" in caplog.text) == (epochs == 3)
    found = workdir.read_json(tmp_path / "env.json")
    assert found == first | {"resumed_on": [first | {"cores": 77}]}


def test_a_workdir_that_is_a_file_or_has_other_files_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(small(), tmp_path / "file")
    with pytest.raises(UserError, match=r"no config\.json"):
        run(small(), tmp_path)


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path):
    (tmp_path / ".config.json.unfinished").write_text("{")
    run(small(), tmp_path)
    assert not (tmp_path / ".config.json.unfinished").exists()


def test_unused_families_of_the_group_file_are_named(tmp_path, caplog):
    caplog.set_level("INFO", "seqfair_jax")
    path = tmp_path / "groups.csv"
    users = pd.DataFrame({"user_id": range(300), "age": ["old", "young"] * 150, "plan": "a"})
    users.to_csv(path, index=False)
    build_experiment(resolve(small(**{"data.group_file": str(path), "groups": ("age",)})))
    message = "data.group_file has families that `groups` does not name, so no result shows them: "
    assert message + "plan" in caplog.text
    assert "the group file has a row for " in caplog.text


def test_a_group_method_refuses_an_overlapping_family(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_text("user_id,family,group\n0,age,old\n0,age,young\n")
    changes = {"data.group_file": str(path), "groups": ("age",)}
    with pytest.raises(UserError, match="gdro needs every user in exactly one group"):
        run(small("gdro", **changes), tmp_path / "a")


@pytest.mark.parametrize("method", slow_but(["gdro", "ipw", "cvar"], ["gdro"]))
def test_a_loss_over_two_families_at_once(method, tmp_path):
    summary = run(small(method, **{"objective.group_family": "pop33&seq33"}), tmp_path / "run")
    assert summary["group_family"] == "pop33&seq33"
    assert "pop33&seq33/min" in summary["val"]["NDCG@20"]
    assert set(summary["test"]["NDCG@20"]) >= {"pop33=niche", "seq33=long"}
    last = rows_of(tmp_path / "run")[-1]
    assert "train/group_loss/seq33:long" in last
    if method == "gdro":
        for family, groups in (("pop33", "niche diverse popular"), ("seq33", "short medium long")):
            omegas = [last[f"train/group_weight/{family}:{group}"] for group in groups.split()]
            assert sum(omegas) == pytest.approx(1, abs=1e-5)


def test_report_refuses_folders_that_do_not_match(tmp_path, finished):
    one, other = finished().folder, finished(**{"data.synthetic.seed": 5}).folder
    with pytest.raises(UserError, match="different logs or splits"):
        text.tables([one, other], "NDCG@20")
    with pytest.raises(UserError, match=r"no summary\.json"):
        text.tables([tmp_path], "NDCG@20")
    with pytest.raises(UserError, match="'pop99' was not evaluated"):
        text.tables([one], "NDCG@20", family="pop99")


def read_until(process, text):
    """Read a process's standard error until it has printed some text."""
    found = b""
    while text not in found:
        part = process.stderr.read(4096)
        assert part, f"the process ended: {found.decode()}"
        found += part


@pytest.mark.slow
def test_sigterm_saves_and_the_same_command_resumes(tmp_path):
    config = small("sdro", **DROPOUT, **{"train.epochs": 40, "train.segment_seconds": 0.0})
    command = train_command(write_config(tmp_path / "config.py", config), tmp_path / "run")
    with subprocess.Popen(command, stderr=subprocess.PIPE, bufsize=0) as process:
        read_until(process, b"val NDCG")
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read().decode()
    assert process.returncode == 128 + signal.SIGTERM
    assert "the same command resumes" in rest
    (step,) = (tmp_path / "run" / "checkpoints" / "latest").iterdir()
    assert 5 <= int(step.name) < 200
    assert not (tmp_path / "run" / "summary.json").exists()
    subprocess.run(command, capture_output=True, check=True)
    whole = run(config, tmp_path / "whole")
    assert workdir.read_summary(tmp_path / "run")["test"] == workdir.jsonable(whole["test"])
    assert rows_of(tmp_path / "run") == rows_of(tmp_path / "whole")


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit(tmp_path):
    """Killed three times at random moments: during a step, a validation or a checkpoint."""
    rng = np.random.default_rng(0)
    config = small("sdro", **DROPOUT, **{"train.epochs": 4})
    config.train.segment_seconds = config.train.checkpoint_minutes = 0.0
    command = train_command(write_config(tmp_path / "config.py", config), tmp_path / "cut")
    latest = tmp_path / "cut" / "checkpoints" / "latest"

    def last_step():
        return max((int(p.name) for p in latest.glob("[0-9]*")), default=0)

    for step in np.sort(rng.choice(np.arange(1, 18), size=3, replace=False)):
        with subprocess.Popen(
            command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        ) as run_:
            while last_step() < step:
                assert run_.poll() is None
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.1))
            run_.kill()
        assert run_.returncode == -signal.SIGKILL
        assert not (tmp_path / "cut" / "summary.json").exists()
    subprocess.run(command, capture_output=True, check=True)
    whole = finish(config, tmp_path / "whole").folder
    assert (tmp_path / "cut" / "metrics.jsonl").read_bytes() == (
        whole / "metrics.jsonl"
    ).read_bytes()
    for name in ("per_user.parquet", "per_user_worst_group.parquet"):
        cut, full = (pd.read_parquet(folder / name) for folder in (tmp_path / "cut", whole))
        pd.testing.assert_frame_equal(cut, full, check_exact=True)
