"""Runs that train again on all rows of the log: no row is held out."""

import dataclasses
import json
import logging
import os
import shutil
import signal
import sys
import types

import jax
import numpy as np
import pandas as pd
import pytest
from runs import DROPOUT, FILES, files_of, finish, rows_of, small

import seqfair_jax
from seqfair_jax import serving, workdir
from seqfair_jax.commands import evaluate, export, recommend, report, train
from seqfair_jax.config import resolve
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.errors import Interrupted, UserError
from seqfair_jax.report.card import model_card
from seqfair_jax.run import run
from seqfair_jax.run import train as train_only
from seqfair_jax.serving import catalogue, trained
from seqfair_jax.training import refit, resume, warm_start
from seqfair_jax.training.loop import Segments

ITEMS = 30
NEWEST = [f"{item}|new" for item in range(4)]
MIXTURE = {"model.pointer": True, "model.neighbours": 8}
EPOCHS, STEPS = 4, 5


def make_log():
    """Users walk along a cycle of items. In the last tenth of the time they also take new items.

    Ids are text with characters that mean something in paths and tables. Times are distinct.
    """
    rng = np.random.default_rng(7)
    rows = []
    for user in range(160):
        time, item = rng.uniform(0, 1), int(rng.integers(ITEMS))
        for _ in range(int(rng.integers(6, 20))):
            is_new = time > 0.9 and rng.random() < 0.3
            name = NEWEST[rng.integers(len(NEWEST))] if is_new else f"i,{item}"
            rows.append((f"u/{user}", name, time))
            time += rng.exponential(0.04)
            item = (item + 1 if rng.random() < 0.8 else int(rng.integers(ITEMS))) % ITEMS
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return log[log["timestamp"] < 1].sort_values("timestamp", ignore_index=True)


LOG = make_log()


def config_of(path, method="erm", **changes):
    shared = {
        "data.name": "csv",
        "data.path": str(path),
        "data.min_interactions": 3,
        "data.split": "time",
        "groups": ("seq33", "pop33"),
        "train.epochs": EPOCHS,
        "evaluate.ease_items": 0,
    }
    return small(method, **(shared | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The log, and `judged`: a mixture whose parameters are averaged and whose rate falls."""
    folder = tmp_path_factory.mktemp("refit")
    LOG.to_csv(folder / "log.csv", index=False)
    changes = {"train.learning_rate": 0.1, "train.decay_steps": 30, "train.average_decay": 0.5}
    config = config_of(folder / "log.csv", **MIXTURE, **DROPOUT, **changes)
    finish(config, folder / "judged")
    return folder


@pytest.fixture(scope="module")
def grid(folder):
    """A grid of a group method with two values and two seeds."""
    changes = {"seeds": (0, 1), "objective.step_size": (0.5, 0.01)}
    config = config_of(folder / "log.csv", "gdro", **changes, **{"train.epochs": 2})
    return finish(config, folder / "grid").folder


@pytest.fixture(scope="module")
def shipped(folder):
    """The refit of `judged`; tests must not change it."""
    return finish(serving.judged_settings(folder / "judged", rule="overall"), folder / "shipped")


@pytest.fixture
def call(capsys):
    """Calls a command; returns what it prints to standard output and to standard error."""

    def call(command, *words):
        capsys.readouterr()
        command.main(list(map(str, words)))
        return capsys.readouterr()

    return call


def assert_trees_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def kept_by_core(frame, k):
    """The k-core by a plain loop over users and items."""
    while True:
        items_of = frame.groupby("user_id")["item_id"].nunique()
        frame_of_users = frame[frame["user_id"].map(items_of) >= k]
        users_of = frame_of_users.groupby("item_id")["user_id"].nunique()
        left = frame_of_users[frame_of_users["item_id"].map(users_of) >= k]
        if len(left) == len(frame):
            return left
        frame = left


def sequences(dataset):
    """The training rows of each user, as ids."""
    rows = {}
    for u, user in enumerate(dataset.user_ids.tolist()):
        start = dataset.offsets[u]
        places = dataset.items[start : start + dataset.train_lengths[u]]
        rows[user] = dataset.item_ids[places].tolist()
    return rows


# The rows.


@pytest.mark.parametrize("kind", ["leave_one_out", "time", "files"])
@pytest.mark.parametrize("core", [1, 4])
def test_every_row_of_the_filtered_log_trains(kind, core, tmp_path):
    """Also those of users with one or two rows, and of items that only held-out rows have."""
    log = pd.concat(
        [LOG, pd.DataFrame({"user_id": "short", "item_id": ["only", "i,3"], "timestamp": [0, 2]})],
        ignore_index=True,
    )
    changes = {"data.split": kind, "data.min_interactions": core}
    names = ["path"]
    frames = [log]
    if kind == "files":
        # The rows of a later file follow those of an earlier one, whatever their times are.
        names = ["path", "valid_path", "test_path"]
        frames = [log.iloc[part::3] for part in range(3)]
        log = pd.concat(frames).assign(part=np.repeat(range(3), [len(frame) for frame in frames]))
    else:
        log = log.assign(part=0)
    for name, frame in zip(names, frames, strict=True):
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
        changes[f"data.{name}"] = str(tmp_path / f"{name}.csv")
    data = resolve(config_of(changes["data.path"], **changes)).data
    held_out, found = load_dataset(data), load_dataset(data, hold_out=False)
    expected = kept_by_core(log, core).sort_values(["part", "timestamp"])
    by_user = expected.groupby("user_id")["item_id"].agg(list).to_dict()
    assert sequences(found) == by_user
    assert found.item_ids.tolist() == sorted(expected["item_id"].unique())
    counts = expected["item_id"].value_counts()
    assert found.item_counts.tolist() == [counts[item] for item in found.item_ids]
    assert found.counts["interactions"] == found.counts["train_interactions"] == len(expected)
    assert found.counts["raw_rows"] == len(log)
    assert found.num_rows.tolist() == found.train_lengths.tolist()
    for targets in (found.valid, found.test):
        assert len(targets.users) == len(targets.items) == len(targets.item_ids) == 0
    assert held_out.counts["train_interactions"] < len(expected)
    assert held_out.log_hash != found.log_hash
    assert ("short" in by_user) == (core == 1)


def test_the_two_splits_have_entries_of_their_own_in_the_cache(folder, tmp_path):
    data = resolve(config_of(folder / "log.csv", **{"data.cache_dir": str(tmp_path)})).data
    for _ in range(2):  # made, then read
        held_out, found = load_dataset(data), load_dataset(data, hold_out=False)
        assert len(held_out.test.users) > 0 == len(found.test.users)
        assert found.split["kind"] == "all"
    assert len(list(tmp_path.glob("split-*"))) == 2


def test_a_filter_that_leaves_nothing_is_an_error(folder):
    config = config_of(folder / "log.csv", **{"data.min_interactions": 99})
    with pytest.raises(UserError, match=r"nothing is left of [0-9,]+ rows after the 99-core"):
        load_dataset(resolve(config).data, hold_out=False)


def test_the_folder_has_all_rows_and_the_newest_items(folder, shipped):
    expected = kept_by_core(LOG, 3)
    histories = pd.read_parquet(shipped.folder / "histories.parquet")
    item_ids = pd.read_parquet(shipped.folder / "items.parquet")["item_id"].to_numpy()
    found = {
        user: item_ids[items].tolist()
        for user, items in zip(histories["user_id"], histories["items"], strict=True)
    }
    assert found == expected.groupby("user_id")["item_id"].agg(list).to_dict()
    dataset = catalogue.read_dataset(shipped.folder)
    assert sequences(dataset) == found
    assert len(dataset.test.users) == len(dataset.valid.users) == 0
    known = serving.load(folder / "judged").item_ids
    assert not set(NEWEST) & set(known)
    assert set(NEWEST) <= set(item_ids)


# The training.


@pytest.mark.parametrize("rule", ["overall", "worst_group"])
def test_on_the_training_rows_of_the_judged_run_it_has_its_parameters(folder, rule, tmp_path):
    """Bit for bit: the same batches, rates, averages, mixture and number of steps."""
    split = workdir.read_summary(folder / "judged")["dataset"]["split"]
    assert split["kind"] == "time"
    best = workdir.read_summary(folder / "judged")[
        "best" if rule == "overall" else "best_worst_group"
    ]
    assert best["epoch"] < EPOCHS  # else the rate of every epoch would be the last one's
    log = LOG[LOG["timestamp"] < float(split["valid_from"])]
    log.to_csv(tmp_path / "training.csv", index=False)
    config = serving.judged_settings(folder / "judged", rule=rule)
    config.data.path = str(tmp_path / "training.csv")
    finish(config, tmp_path / "refit")
    judged, refit = serving.load(folder / "judged", rule=rule), serving.load(tmp_path / "refit")
    assert_trees_equal(refit.params, judged.params)
    assert_trees_equal(refit.neighbours, judged.neighbours)
    record = workdir.read_summary(tmp_path / "refit")["refit"]
    assert record["parameters"] == warm_start.parameters_hash(refit.params)
    assert (record["rule"], record["epoch"]) == (rule, best["epoch"])
    assert record["new_items"] == record["left_items"] == 0


def test_the_mixture_is_the_judged_runs_and_the_rest_is_trained_on_all_rows(folder, shipped):
    judged, refit = (
        serving.load(part).params["params"] for part in (folder / "judged", shipped.folder)
    )
    assert_trees_equal(refit["mixture"], judged["mixture"])
    start = serving.load(shipped.folder).model  # its first weights differ from the fitted ones
    assert start.is_mixture
    assert not np.array_equal(refit["position_embedding"], judged["position_embedding"])


def test_the_learning_rate_follows_the_judged_runs_schedule(folder, shipped):
    config = json.loads((shipped.folder / "config.json").read_text())
    judged = json.loads((folder / "judged" / "config.json").read_text())
    epoch = shipped.summary["refit"]["epoch"]
    assert config["train"]["decay_steps"] == judged["train"]["decay_steps"] == 30
    assert config["train"]["epochs"] == epoch < judged["train"]["epochs"]
    differ = {key for key in config["train"] if config["train"][key] != judged["train"][key]}
    assert differ == {"epochs", "refit", "refit_rule"}
    assert {part: config[part] for part in ("data", "model", "objective", "seeds")} == {
        part: judged[part] for part in ("data", "model", "objective", "seeds")
    }


def test_what_the_summary_and_the_folder_have(folder, shipped):
    judged = workdir.read_summary(folder / "judged")
    absent = {"per_user.parquet", "per_user_worst_group.parquet", "baselines.parquet"}
    assert files_of(shipped.folder) == FILES - absent | {"neighbours.npz", "judged"}
    assert files_of(shipped.folder / "judged") == {
        "summary.json", "config.json", "items.parquet", "per_user.parquet",
        "per_user_worst_group.parquet",
    }  # fmt: skip
    assert workdir.read_summary(shipped.folder / "judged") == judged
    summary, epoch = shipped.summary, judged["best"]["epoch"]
    assert summary["status"] == "finished"
    assert summary["best"] == {"epoch": epoch, "step": epoch * STEPS}
    assert summary["train"]["steps"] == epoch * STEPS
    assert not {"test", "val", "baselines", "recommended", "validation_sizes"} & summary.keys()
    record = summary["refit"]
    assert record["folder"] == str(folder / "judged")
    assert (record["run"], record["rule"], record["epoch"]) == ("seed=0", "overall", epoch)
    assert record["log_hash"] == judged["dataset"]["log_hash"] != summary["dataset"]["log_hash"]
    assert record["train_interactions"] == judged["dataset"]["train_interactions"]
    vocabularies = [
        set(serving.load(part).item_ids) for part in (folder / "judged", shipped.folder)
    ]
    assert record["known_items"] == len(vocabularies[0] & vocabularies[1])
    assert record["new_items"] == len(vocabularies[1] - vocabularies[0]) > 0
    assert record["left_items"] == len(vocabularies[0] - vocabularies[1])
    rows = rows_of(shipped.folder)
    assert [row["epoch"] for row in rows] == list(range(1, epoch + 1))
    assert all(np.isfinite(row["train/loss"]) for row in rows)
    assert not [key for row in rows for key in row if key.startswith("val/")]
    trained_on = f"trained on {record['train_interactions']:,} of"
    of_judged = f"This is a refit of {folder / 'judged'} (seed=0)"
    for words in (of_judged, trained_on, "No row is held out", "itself is not judged"):
        assert words in shipped.printed


def test_a_changed_file_of_the_judged_run_is_refused(shipped, tmp_path):
    copy = shutil.copytree(shipped.folder, tmp_path / "copy")
    (copy / "judged" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"judged/summary\.json changed"):
        serving.load(copy)


def test_items_of_another_type_of_ids_are_found(folder):
    judged = trained.load_judged(serving.judged_settings(folder / "judged", rule="overall"))
    known = dataclasses.replace(judged, item_ids=np.array([3, 5]))
    newer = types.SimpleNamespace(item_ids=np.array(["3", "5", "gift-card"], object), log_hash="")
    found = refit.record(known, newer)
    assert (found["known_items"], found["new_items"], found["left_items"]) == (2, 1, 0)


def test_a_judged_run_that_chose_another_epoch_since_is_refused(folder, shipped, tmp_path):
    copy = shutil.copytree(shipped.folder, tmp_path / "copy")
    config = serving.judged_settings(folder / "judged", rule="overall")
    config.train.epochs += 1
    before = files_of(copy)
    with pytest.raises(UserError, match="chose epoch . when this refit began, and epoch ."):
        run(config, copy)
    assert files_of(copy) == before


@pytest.mark.slow
def test_an_interrupted_refit_resumes_bit_for_bit_without_the_judged_run(
    folder, tmp_path, monkeypatch
):
    """Two seeds, stopped in an epoch by a signal and once more by a kill."""
    shutil.copytree(folder / "judged", tmp_path / "judged")
    config = serving.judged_settings(tmp_path / "judged", rule="overall")
    config.seeds = (0, 5)
    config.train.segment_seconds = 0.0
    whole = run(config, tmp_path / "whole")
    called = Segments.__call__

    def interrupted(self, states, drawn, start, **options):
        if start == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return called(self, states, drawn, start, **options)

    monkeypatch.setattr(Segments, "__call__", interrupted)
    with pytest.raises(Interrupted, match="stopped at step"):
        run(config, tmp_path / "cut")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "judged")  # the checkpoint has all that is needed of it

    def killed(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr(resume.Saver, "save", killed)  # the end of training saves
    with pytest.raises(RuntimeError, match="killed"):
        run(config, tmp_path / "cut")
    monkeypatch.undo()
    resumed = run(config, tmp_path / "cut")
    assert resumed["refit"] == whole["refit"]
    assert resumed["selected"] == whole["selected"] == {"hparams": {}, "seeds": 2}
    for name in ("seed=0", "seed=5"):
        cut, full = (tmp_path / part / "runs" / name for part in ("cut", "whole"))
        assert rows_of(cut) == rows_of(full)
        assert_trees_equal(serving.load(cut).params, serving.load(full).params)
        assert files_of(cut / "judged") == files_of(full / "judged")
    seeds = [serving.load(tmp_path / "cut", run=f"seed={seed}").params for seed in (0, 5)]
    tables = [params["params"]["item_embedding"] for params in seeds]
    assert not np.array_equal(*tables)
    assert_trees_equal(*(params["params"]["mixture"] for params in seeds))


@pytest.mark.slow
def test_a_seed_that_diverged_is_not_kept(folder, tmp_path, monkeypatch):
    module = sys.modules["seqfair_jax.run"]
    fit = module.fit

    def diverging(*arguments):
        snapshot = fit(*arguments)
        failed = jax.numpy.array([3, -1], jax.numpy.int32)
        return snapshot._replace(states=snapshot.states._replace(failed_step=failed))

    monkeypatch.setattr(module, "fit", diverging)
    config = serving.judged_settings(folder / "judged", rule="overall")
    config.seeds = (0, 1)
    summary = run(config, tmp_path / "run")
    assert [part["status"] for part in summary["runs"]] == ["failed at step 3", "finished"]
    assert [part["best"] is None for part in summary["runs"]] == [True, False]
    assert summary["selected"] == {"hparams": {}, "seeds": 1}
    assert serving.load(tmp_path / "run").run == "seed=1"
    with pytest.raises(UserError, match="failed at step 3, so it has no parameters"):
        serving.load(tmp_path / "run", run="seed=0")
    assert not (tmp_path / "run" / "runs" / "seed=0" / "checkpoints").exists()


# The command.


def test_the_command_takes_all_settings_from_the_run(folder, shipped, call, tmp_path):
    words = [f"--refit={folder / 'judged'}", f"--workdir={tmp_path / 'run'}"]
    printed = call(train, *words).out
    assert "This is a refit of" in printed
    assert "itself is not judged" in printed
    assert_trees_equal(serving.load(tmp_path / "run").params, serving.load(shipped.folder).params)
    again = call(train, *words)
    assert "has finished" in again.err
    assert "itself is not judged" in again.out
    assert "step" not in again.err


def test_the_run_of_a_grid_and_the_rule_are_chosen(grid, call, tmp_path):
    names = [part["run"] for part in workdir.read_summary(grid)["runs"]]
    selected = serving.load(grid).run
    other = next(name for name in names if name != selected and name.endswith("seed=1"))
    for words, name, rule in (
        ([], selected, "overall"),
        ([f"--run={other}", "--rule=worst_group"], other, "worst_group"),
    ):
        out = tmp_path / rule
        call(train, f"--refit={grid}", f"--workdir={out}", *words)
        summary, of_run = workdir.read_summary(out), workdir.read_summary(grid / "runs" / name)
        assert (summary["hparams"], summary["seed"]) == (of_run["hparams"], of_run["seed"])
        chosen = of_run["best" if rule == "overall" else "best_worst_group"]
        assert summary["refit"]["epoch"] == summary["best"]["epoch"] == chosen["epoch"]
        assert (summary["refit"]["run"], summary["refit"]["rule"]) == (name, rule)
        # There is one epoch, so a rule is needed no more.
        assert serving.load(out).run == f"seed={of_run['seed']}"


@pytest.mark.slow
def test_a_newer_log_and_other_seeds(folder, call, tmp_path):
    newer = pd.concat(
        [LOG, LOG.tail(200).assign(timestamp=LOG["timestamp"].tail(200) + 1, item_id="newest")]
    )
    newer.to_csv(tmp_path / "newer.csv", index=False)
    words = [f"--refit={folder / 'judged'}", f"--workdir={tmp_path / 'run'}"]
    words += [f"--config.data.path={tmp_path / 'newer.csv'}", "--config.seeds=3,4"]
    call(train, *words, "--config.data.since=0.1")
    newer = newer[newer["timestamp"] >= 0.1]
    summary = workdir.read_summary(tmp_path / "run")
    assert [part["seed"] for part in summary["runs"]] == [3, 4]
    assert summary["dataset"]["interactions"] == len(kept_by_core(newer, 3))
    refit = serving.load(tmp_path / "run")
    assert refit.run == "seed=3"
    assert "newest" in refit.item_ids


@pytest.mark.slow
def test_a_newer_log_of_a_split_by_files_is_one_log(call, tmp_path):
    paths = {}
    for part, name in enumerate(("path", "valid_path", "test_path")):
        paths[f"data.{name}"] = str(tmp_path / f"{name}.csv")
        LOG.iloc[part::3].to_csv(paths[f"data.{name}"], index=False)
    LOG.to_csv(tmp_path / "newer.csv", index=False)
    config = config_of(paths["data.path"], **paths, **{"data.split": "files", "train.epochs": 1})
    finish(config, tmp_path / "judged")
    words = [f"--refit={tmp_path / 'judged'}"]
    rows = len(kept_by_core(LOG, 3))
    call(train, *words, f"--workdir={tmp_path / 'same'}")
    newer = [*words, f"--workdir={tmp_path / 'newer'}"]
    call(train, *newer, f"--config.data.path={tmp_path / 'newer.csv'}")
    for name, inputs in (("same", {"log", "valid_log", "test_log"}), ("newer", {"log"})):
        summary = workdir.read_summary(tmp_path / name)
        assert summary["dataset"]["interactions"] == rows  # each row once
        assert workdir.finished_inputs(tmp_path / name).keys() == inputs
    assert "has finished" in call(train, *newer, f"--config.data.path={tmp_path / 'newer.csv'}").err


OBJECTIVE = """
from seqfair_jax import objectives
from seqfair_jax.config import default_config

if "halved" not in objectives.METHODS:
    objectives.register(objectives.Method(
        name="halved", label="Halved", uses_mass=True,
        make=lambda users: objectives.Formula(
            lambda batch, state, hparams: ((batch.mass * batch.losses).mean() / 2, state, {})
        ),
    ))

def get_config():
    return default_config()
"""


@pytest.mark.slow
def test_the_file_of_the_runs_own_objective_may_be_given(folder, call, capsys, tmp_path):
    from seqfair_jax.objectives import registry

    (tmp_path / "mine.py").write_text(OBJECTIVE)
    exec(OBJECTIVE, {})
    config = config_of(folder / "log.csv", "halved", **{"train.epochs": 1})
    finish(config, tmp_path / "judged")
    del registry._methods["halved"]  # as in a new process
    words = [f"--refit={tmp_path / 'judged'}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        train.main(words)
    assert "'halved'" in capsys.readouterr().err
    call(train, *words, f"--config={tmp_path / 'mine.py'}")
    assert workdir.read_summary(tmp_path / "run")["method"] == "halved"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.model.dim=16"], r"these differ: model.dim \(8 there, 16 now\). Leave them out"),
        (["--config.train.epochs=9"], r"train.epochs \([0-9] there, 9 now\)"),
        (["--config.groups=pop33"], "groups "),
        (["--init_from=DIR/judged"], r"train.init_from \('' there, "),
        (["--config=own_log"], "are both given: the settings are those of the run"),
        (["--run=seed=7"], "has no run 'seed=7'; there are seed=0"),
        (["--rule=best"], "rule is 'best': expected overall or worst_group"),
        (["--config.data.path=DIR/other.csv"], "knows none of the 30 items of this log"),
        (["--config.data.path=DIR/none.csv"], "none.csv: no such file"),
        (["--refit=DIR/nothing"], "nothing does not exist; name the --workdir of a run"),
        (["--refit=DIR/shipped"], r"was trained on all rows .* was judged, .*judged \(seed=0\)"),
        (["--workdir=DIR/judged"], "was made by another config"),
    ],
)
def test_what_is_refused(folder, shipped, words, message, capsys, tmp_path):
    LOG.assign(item_id="x" + LOG["item_id"])[:1000].to_csv(folder / "other.csv", index=False)
    words = [word.replace("DIR", str(folder)) for word in words]
    given = {word.partition("=")[0] for word in words}
    defaults = {"--refit": folder / "judged", "--workdir": tmp_path / "run"}
    words += [f"{name}={value}" for name, value in defaults.items() if name not in given]
    before = files_of(folder / "judged")
    with pytest.raises(SystemExit) as stopped:
        train.main(words)
    assert stopped.value.code == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    pd.testing.assert_series_equal(
        pd.Series([error]).str.contains(message, regex=True), pd.Series([True])
    )
    assert files_of(folder / "judged") == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rule=worst_group"], "--run and --rule are of --refit"),
        (["--config.train.refit_rule=overall"], "train.refit_rule is overall, but train.refit is"),
        (["--config.train.refit=DIR/judged"], "train.refit is .*judged, and a refit has the "
                                              "settings of that run, but these differ: data.m"),
        (["--config.train.refit=DIR/none"], "train.refit is .*none, which cannot be used: "),
    ],
)  # fmt: skip
def test_what_is_refused_with_a_config(folder, words, message, capsys, tmp_path):
    words = [word.replace("DIR", str(folder)) for word in words]
    words += [f"--config.data.path={folder / 'log.csv'}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(SystemExit):
        train.main(["--config=own_log", *words])
    error = capsys.readouterr().err.splitlines()[-1]
    assert pd.Series([error]).str.contains(message, regex=True).all(), error


def test_a_search_cannot_train_a_refit(folder, tmp_path):
    config = serving.judged_settings(folder / "judged", rule="overall")
    with pytest.raises(UserError, match="a refit has no validation to choose by"):
        train_only(config, tmp_path / "run")


# What reads the folder.


def test_recommend_export_and_the_card(folder, shipped, call, tmp_path):
    out = tmp_path / "recs.csv"
    printed = call(recommend, f"--workdir={shipped.folder}", f"--out={out}", "--k=3")
    assert "run seed=0, trained on all rows" in printed.err
    lists = pd.read_csv(out)
    assert set(lists["user_id"]) == set(kept_by_core(LOG, 3)["user_id"])
    pd.DataFrame({"item_id": NEWEST}).to_csv(tmp_path / "newest.csv", index=False)
    words = [f"--out={out}", "--k=2", f"--only={tmp_path / 'newest.csv'}"]
    call(recommend, f"--workdir={shipped.folder}", *words)
    assert set(pd.read_csv(out)["item_id"]) == set(NEWEST)
    printed = call(export, f"--workdir={shipped.folder}", f"--out={tmp_path / 'model'}")
    assert "the lists of 16 users of the log are those of the run" in printed.err
    card = (tmp_path / "model" / "README.md").read_text()
    judged = pd.read_parquet(folder / "judged" / "per_user.parquet")
    summary = workdir.read_summary(folder / "judged")
    record = shipped.summary["refit"]
    for words in (
        "**This model itself was not judged.**",
        "the run in the folder judged (seed=0)",
        f"on {summary['dataset']['train_interactions']:,} of the",
        record["parameters"],
        record["log_hash"],
        shipped.summary["dataset"]["log_hash"],
        f"{shipped.summary['dataset']['interactions']:,} of these train the model",
        "No row is held out",
        "This model may be better or worse.",
        f"its epoch {record['epoch']} validated best overall",
        f"| overall | {len(judged)} | {judged['NDCG@20'].mean():.4f} |",
    ):
        assert words in card, words
    assert str(folder) not in card  # a card has no path


def test_the_card_has_the_figures_of_the_rule_that_chose(grid, call, tmp_path):
    out = tmp_path / "a|b"
    call(train, f"--refit={grid}", f"--workdir={out}", "--rule=worst_group")
    exported = {
        "format": "jax", "shape": None, "run": "seed=0", "max_k": 9, "mask_seen": False,
        "items": 30, "parameters": 1, "window": 12, "platforms": ["cpu"],
        "versions": {"seqfair_jax": "1", "jax": "4", "flatbuffers": "7"},
    }  # fmt: skip
    card = model_card(out, "overall", exported)
    name = serving.load(grid).run
    judged = pd.read_parquet(grid / "runs" / name / "per_user_worst_group.parquet")
    assert f"| overall | {len(judged)} | {judged['NDCG@20'].mean():.4f} |" in card
    assert "validated best for the worst group" in card
    summary = workdir.read_summary(out)
    summary["refit"]["folder"] = "runs/*odd|name*"
    workdir.write_json(out / "summary.json", summary)
    card = model_card(out, "overall", exported)
    assert r"in the folder \*odd\|name\* (" in card


def test_commands_that_need_a_test_name_the_judged_run(folder, shipped, capsys, tmp_path, caplog):
    judged, out = folder / "judged", tmp_path / "recs.csv"
    message = f"{shipped.folder} was trained on all rows (train.refit), so it has no test; name"
    for command, words in (
        (evaluate, [f"--workdir={shipped.folder}"]),
        (report, [shipped.folder]),
        (report, [judged, f"--baseline={shipped.folder}"]),
        (recommend, [f"--workdir={shipped.folder}", f"--out={out}", "--before_test"]),
    ):
        with pytest.raises(SystemExit):
            command.main(list(map(str, words)))
        error = capsys.readouterr().err.splitlines()[-1]
        assert message in error
        assert error.endswith(f"that was judged, {judged} (seed=0)")
    assert not out.exists()
    with pytest.raises(SystemExit):
        recommend.main([f"--workdir={shipped.folder}", f"--out={out}", "--rule=worst_group"])
    assert "has one epoch, its last: leave the rule out" in capsys.readouterr().err
    report.main([str(shipped.folder), str(judged)])  # a pattern may match both
    printed = capsys.readouterr()
    assert f"{shipped.folder} is left out: it was trained on all rows" in printed.err
    assert "ERM" in printed.out


def test_a_refit_ranks_the_test_of_another_run(folder, shipped, call, tmp_path):
    """Here it was trained on all targets of this test, which the warning says."""
    words = [f"--workdir={folder / 'judged'}", f"--with=live={shipped.folder}"]
    printed = call(evaluate, *words, f"--out={tmp_path / 'out'}")
    targets = workdir.read_summary(folder / "judged")["dataset"]["split"]["test_targets"]
    assert f"was trained on {targets:,} of the {targets:,} test targets" in printed.err
    assert f"live is {shipped.folder} (seed=0, epoch {shipped.summary['best']['epoch']})" in (
        printed.out
    )


@pytest.mark.slow
def test_a_refit_starts_a_new_run_on_a_newer_log(folder, shipped, tmp_path, caplog):
    """The targets that the refit was trained on are counted."""
    config = config_of(folder / "log.csv", **MIXTURE, **{"train.epochs": 1})
    config.train.init_from = str(shipped.folder)
    with caplog.at_level(logging.WARNING):
        found = finish(config, tmp_path / "next").summary["init_from"]
    assert found["epoch"] == shipped.summary["refit"]["epoch"]
    assert found["parameters"] == warm_start.parameters_hash(serving.load(shipped.folder).params)
    assert found["trained_test_targets"] > 0
    assert "was trained on" in caplog.text


@pytest.mark.slow
def test_the_refit_of_a_run_that_started_from_another(folder, shipped, tmp_path):
    config = config_of(folder / "log.csv", **MIXTURE, **{"train.epochs": 1})
    config.train.init_from = str(folder / "judged")
    finish(config, tmp_path / "judged")
    settings = serving.judged_settings(tmp_path / "judged", rule="overall")
    summary = finish(settings, tmp_path / "shipped").summary
    assert summary["init_from"]["folder"] == str(folder / "judged")
    assert summary["refit"]["folder"] == str(tmp_path / "judged")
    mixtures = [
        serving.load(part).params["params"]["mixture"]
        for part in (tmp_path / "judged", tmp_path / "shipped", folder / "judged")
    ]
    assert_trees_equal(mixtures[0], mixtures[1])
    assert not np.array_equal(*(np.concatenate([*map(np.ravel, jax.tree.leaves(tree))])
                                for tree in mixtures[1:]))  # fmt: skip


# Python.


@pytest.mark.slow
def test_a_model_is_trained_again_on_all_rows(tmp_path):
    users = pd.DataFrame({"user_id": LOG["user_id"].unique()})
    users["plan"] = np.where(np.arange(len(users)) % 2, "a|b", "c/d")
    changes = {f"model.{key}": value for key, value in small().model.items()}
    changes |= {"train.batch_size": 8, "train.steps_per_epoch": 3, "data.cache_dir": ""}
    changes |= {"evaluate.neighbour_draws": 1, "data.split": "time", "select.min_users": 1}
    model = seqfair_jax.fit(
        LOG, "gdro", groups=[users, "plan", "seq33"], epochs=1, settings=changes, verbose=False
    )
    refit = model.refit(workdir=tmp_path / "refit", verbose=False)
    assert "trained on all rows" in repr(refit)
    assert refit.summary["refit"]["folder"] == str(model.folder)
    assert refit.runs["validation NDCG@20"].isna().all()
    assert set(NEWEST) <= set(refit.recommend(k=60)["item_id"])
    # Its folder has the tables, so that it needs that of the model no more.
    inputs = {path.name for path in (refit.folder / "inputs").iterdir()}
    assert inputs == {path.name for path in (model.folder / "inputs").iterdir()}
    for name in (refit.config.data.path, refit.config.data.group_file):
        assert str(tmp_path / "refit" / "inputs") in name
    again = model.refit(workdir=tmp_path / "refit", verbose=False)
    assert_trees_equal(again._trained.params, refit._trained.params)
    newer = LOG.assign(item_id=LOG["item_id"].where(LOG["timestamp"] < 0.99, "newest"))
    several = model.refit(newer, groups=users, seeds=(1, 2), verbose=False)
    assert several.runs["seed"].tolist() == [1, 2]
    assert "newest" in set(several.embeddings()[0].index)
    refit.save(tmp_path / "saved")
    assert "trained on all rows" in repr(seqfair_jax.load(tmp_path / "saved"))
    for call in (
        refit.evaluate,
        refit.refit,
        lambda: refit.per_user,
        lambda: refit.recommend(before_test=True),
        lambda: refit.report(tmp_path / "report.html"),
        lambda: seqfair_jax.compare([model, refit]),
    ):
        with pytest.raises(UserError, match="has no test; name the run that was judged"):
            call()
    with pytest.raises(UserError, match="groups is 'pop33': expected a table"):
        model.refit(groups="pop33")
