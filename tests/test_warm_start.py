"""Runs that start from a finished run."""

import dataclasses
import shutil

import jax
import numpy as np
import pandas as pd
import pytest
from runs import DROPOUT, finish, rows_of, small, write_config

from seqfair_jax import serving
from seqfair_jax.commands import train
from seqfair_jax.config import resolve
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import leave_one_out
from seqfair_jax.errors import UserError
from seqfair_jax.run import run
from seqfair_jax.serving.trained import load_source
from seqfair_jax.training import resume, warm_start
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.resume import restore
from seqfair_jax.training.warm_start import Source

ITEMS, NEW_ITEMS = 36, 4


def make_log():
    """Users walk along a cycle of items. The last tenth of the time has new items and users.

    Ids are integers, rows are in the order of time, and times are distinct.
    """
    rng = np.random.default_rng(7)
    rows = []
    for user in range(260):
        time, item = rng.uniform(0, 1), int(rng.integers(ITEMS))
        for _ in range(int(rng.integers(6, 20))):
            rows.append((user, item, time))
            time += rng.exponential(0.04)
            available = ITEMS + (NEW_ITEMS if time > 0.92 else 0)
            item = (item + 1 if rng.random() < 0.85 else int(rng.integers(available))) % available
    log = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    return log[log["timestamp"] < 1].sort_values("timestamp", ignore_index=True)


LOG = make_log()
YESTERDAY = LOG.iloc[: len(LOG) * 10 // 11]


def config_of(path, method="erm", **changes):
    """A config for one of the logs below."""
    shared = {
        "data.name": "csv",
        "data.path": str(path),
        "data.min_interactions": 1,
        "groups": ("seq33",),
    }
    return small(method, **(shared | changes))


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """The logs of yesterday and today, and a run of yesterday's."""
    folder = tmp_path_factory.mktemp("warm")
    YESTERDAY.to_csv(folder / "yesterday.csv", index=False)
    LOG.to_csv(folder / "today.csv", index=False)
    finish(config_of(folder / "yesterday.csv", **{"train.learning_rate": 0.01}), folder / "old")
    return folder


def warm_config(logs, method="erm", **changes):
    changes = {"train.init_from": str(logs / "old")} | changes
    return config_of(changes.pop("data.path", logs / "today.csv"), method, **changes)


def started(config, folder):
    """The state before the first step, and what the run started from."""
    experiment = build_experiment(resolve(config))
    return experiment, restore(experiment, folder, load_source(config.train.init_from))


def table(params):
    return params["params"]["item_embedding"]


def other_leaves(params):
    return {key: value for key, value in params["params"].items() if "item" not in key}


def assert_trees_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_known_items_keep_their_vectors_and_the_rest_is_copied(logs, tmp_path):
    config = warm_config(logs, seeds=(3, 4), **{"model.tie_embeddings": True})
    old = serving.load(logs / "old")
    experiment, snapshot = started(config, tmp_path)
    item_ids = experiment.dataset.item_ids.tolist()
    place = {item: v for v, item in enumerate(old.item_ids.tolist())}
    new = [item for item in item_ids if item not in place]
    assert new  # the last days have new items
    trained = table(old.params)
    for r in range(2):
        params = jax.tree.map(lambda leaf, r=r: leaf[r], snapshot.states.params)
        for v, item in enumerate(item_ids):
            if item in place:
                np.testing.assert_array_equal(table(params)[v], trained[place[item]])
        assert_trees_equal(other_leaves(params), other_leaves(old.params))
    both = np.asarray(table(snapshot.states.params))
    is_new = np.isin(item_ids, new)
    assert (both[0, is_new] != both[1, is_new]).all()  # each seed draws its own
    known_users = set(old.user_ids.tolist()) & set(experiment.dataset.user_ids.tolist())
    record = snapshot.progress.init_from
    assert record["new_items"] == len(new)
    assert record["known_items"] == len(item_ids) - len(new)
    assert record["left_items"] == len(set(old.item_ids.tolist()) - set(item_ids))
    assert record["known_users"] == len(known_users)
    assert record["new_users"] == len(experiment.dataset.user_ids) - len(known_users) > 0
    assert record["log_hash"] == load_source(str(logs / "old")).dataset.log_hash
    assert record["parameters"] == warm_start.parameters_hash(old.params)


def test_the_optimiser_and_the_objective_start_anew(logs, tmp_path):
    config = warm_config(logs, "gdro")
    _, warm = started(config, tmp_path)
    config.train.init_from = ""
    cold = restore(build_experiment(resolve(config)), tmp_path)
    for part in ("opt_state", "objective_state", "key", "step", "failed_step", "stopped"):
        assert_trees_equal(getattr(warm.states, part), getattr(cold.states, part))


def sources(dataset, params, **model):
    return Source("runs/old", "seed=0", "overall", 2, model, params, dataset)


def split(frame, **changes):
    return leave_one_out(
        log_from_table(frame), name="csv", num_valid_users=0, split_seed=0, **changes
    )


def tables(rng, num_items, *, runs=None, tied=False):
    shape = (num_items, 5) if runs is None else (runs, num_items, 5)
    names = ["item_embedding"] if tied else ["item_embedding", "output_embedding"]
    lead = () if runs is None else (runs,)
    # Each dimension has another mean and spread, except in random parameters.
    mean, spread = (np.arange(5), 0.3 + 0.1 * np.arange(5)) if runs is None else (0.0, 0.1)
    params = {name: rng.normal(mean, spread, shape).astype(np.float32) for name in names}
    length = 9 if runs is None else 6
    params["position_embedding"] = rng.normal(size=(*lead, length, 5)).astype(np.float32)
    return {"params": params}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_new_vectors_have_the_mean_and_the_spread_of_the_trained(text, tied):
    """Both tables, ids of both kinds, and a shorter window."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user_id": np.repeat(np.arange(300), 4)})
    frame["item_id"] = rng.integers(400, size=len(frame))
    frame["timestamp"] = range(len(frame))
    later = frame.assign(item_id=frame["item_id"] + 200)  # half of the items are new
    if text:
        frame["item_id"], later["item_id"] = (
            "i" + table["item_id"].astype(str) for table in (frame, later)
        )
    old, new = split(frame), split(later)
    trained, random = (
        tables(rng, len(old.item_ids), tied=tied),
        tables(rng, len(new.item_ids), runs=2, tied=tied),
    )
    before = jax.tree.map(np.copy, random)
    params, record = warm_start.warm_start(
        sources(old, trained), new, jax.tree.map(jax.numpy.asarray, random)
    )
    assert_trees_equal(random, before)
    assert record["known_items"] + record["new_items"] == len(new.item_ids)
    assert record["known_items"] + record["left_items"] == len(old.item_ids)
    places = {item: v for v, item in enumerate(old.item_ids.tolist())}
    for name in trained["params"].keys() - {"position_embedding"}:
        source, found = trained["params"][name], np.asarray(params["params"][name])
        drawn = []
        for v, item in enumerate(new.item_ids.tolist()):
            if item in places:
                np.testing.assert_array_equal(found[0, v], source[places[item]])
                np.testing.assert_array_equal(found[1, v], source[places[item]])
            else:
                drawn.append(found[:, v])
        assert len(drawn) == record["new_items"] > 100
        drawn = np.concatenate(drawn)  # [2 n, 5]
        np.testing.assert_allclose(drawn.mean(axis=0), source.mean(axis=0), atol=0.15)
        np.testing.assert_allclose(drawn.std(axis=0), source.std(axis=0), rtol=0.2)
        assert len(np.unique(drawn)) == drawn.size
    np.testing.assert_array_equal(
        params["params"]["position_embedding"][1], trained["params"]["position_embedding"][:6]
    )


@pytest.mark.parametrize("valid_users", [0, 20])
def test_targets_that_the_old_run_was_trained_on_are_counted(valid_users):
    """Where no user has an item twice, the count is exact: compared row by row, by time."""
    rng = np.random.default_rng(1)
    frame = pd.DataFrame(
        [(u, i) for u in range(60) for i in rng.permutation(12)[: rng.integers(4, 12)]],
        columns=["user_id", "item_id"],
    )
    frame["timestamp"] = rng.permutation(len(frame))
    frame = frame.sort_values("timestamp", ignore_index=True)
    # Today's log lacks some of the last rows of yesterday's, as where orders were cancelled.
    today = frame.drop(index=rng.choice(np.arange(150, 360), 100, replace=False))
    old, new = (
        leave_one_out(log_from_table(f), name="csv", num_valid_users=valid_users, split_seed=seed)
        for f, seed in ((frame.iloc[:360], 1), (today, 2))
    )

    def parts(dataset, frame):
        """(user, item) of each part's rows."""
        rows = {"train": set(), "valid": set(), "test": set()}
        for u, user in enumerate(dataset.user_ids.tolist()):
            own = frame[frame["user_id"] == user].sort_values("timestamp")["item_id"].tolist()
            rows["train"] |= {(user, item) for item in own[: dataset.train_lengths[u]]}
            rows["test"].add((user, own[-1]))
            if u in dataset.valid.users:
                rows["valid"].add((user, own[-2]))
        return rows

    trained, now = parts(old, frame.iloc[:360])["train"], parts(new, today)
    rng = np.random.default_rng(0)
    params = tables(rng, len(old.item_ids))
    random = jax.tree.map(jax.numpy.asarray, tables(rng, len(new.item_ids), runs=1))
    _, record = warm_start.warm_start(sources(old, params), new, random)
    assert record["trained_validation_targets"] == len(now["valid"] & trained) > 0
    assert record["trained_test_targets"] == len(now["test"] & trained) > 0


@pytest.mark.parametrize(
    ("kind", "targets"), [("leave_one_out", "first"), ("time", "first"), ("time", "every")]
)
def test_a_log_that_grew_holds_out_no_row_that_was_trained_on(logs, caplog, kind, targets):
    """If all users validate, or the point in time moves forward; otherwise a warning says so."""
    rng = np.random.default_rng(0)

    def record(test_share):
        old, new = (
            load_dataset(
                resolve(
                    config_of(
                        logs / name,
                        **{"data.split": kind, "data.targets": targets},
                        **{"data.test_share": share},
                    )
                ).data
            )
            for name, share in (("yesterday.csv", 0.1), ("today.csv", test_share))
        )
        params = tables(rng, len(old.item_ids))
        random = jax.tree.map(jax.numpy.asarray, tables(rng, len(new.item_ids), runs=1))
        found = warm_start.warm_start(sources(old, params), new, random)[1]
        warm_start.warn_of_trained_targets(found, new)
        return found

    found = record(0.1)
    assert found["trained_validation_targets"] == found["trained_test_targets"] == 0
    assert caplog.text == ""
    if kind == "time":
        found = record(0.6)
        assert found["trained_test_targets"] > 0
        assert f"on {found['trained_test_targets']} of the " in caplog.text
        assert "test targets, so the scores on them are too high" in caplog.text


@pytest.mark.slow
def test_a_resumed_run_needs_the_old_folder_no_more(logs, tmp_path, monkeypatch):
    """Runs side by side, stopped in the second epoch, equal the uninterrupted bit for bit."""
    shutil.copytree(logs / "old", tmp_path / "old")
    change = {"train.init_from": str(tmp_path / "old"), "seeds": (0, 1), "train.runs_axis": "vmap"}
    config = warm_config(logs, "gdro", **DROPOUT, **change, **{"train.segment_seconds": 0.0})
    whole = run(config, tmp_path / "whole")
    save = resume.Saver.save

    def save_and_stop(self, snapshot):
        save(self, snapshot)
        if snapshot.progress.step == 7:
            raise KeyboardInterrupt

    often = config.copy_and_resolve_references()
    often.train.checkpoint_minutes = 0.0
    monkeypatch.setattr(resume.Saver, "save", save_and_stop)
    with pytest.raises(SystemExit, match="step 7"):
        run(often, tmp_path / "cut")
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "old")
    resumed = run(config, tmp_path / "cut")
    for name in ("seed=0", "seed=1"):
        cut, full = (tmp_path / part / "runs" / name for part in ("cut", "whole"))
        assert rows_of(cut) == rows_of(full)
        assert_trees_equal(serving.load(cut).params, serving.load(full).params)
    assert resumed["init_from"] == whole["init_from"]
    assert resumed["init_from"]["folder"] == str(tmp_path / "old")
    run(config, tmp_path / "cut")  # prints its table again
    config.train.init_from = "runs/other"
    with pytest.raises(UserError, match=r"train\.init_from \('.*/old' there, 'runs/other' now\)"):
        run(config, tmp_path / "cut")


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(
    logs, tmp_path, monkeypatch, capsys
):
    shutil.copytree(logs / "old", tmp_path / "old")
    config = warm_config(logs, **{"train.init_from": f"{tmp_path / 'old'}/"})

    def killed(*_):
        raise RuntimeError("killed")

    monkeypatch.setattr("seqfair_jax.run.fit", killed)
    with pytest.raises(RuntimeError, match="killed"):
        run(config, tmp_path / "new")
    monkeypatch.undo()
    (tmp_path / "old").rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"train\.init_from is .*/old, which .*: .* does not exist"):
        run(config, tmp_path / "new")
    (tmp_path / "moved").rename(tmp_path / "old")
    found = run(config, tmp_path / "new")["init_from"]
    assert found["epoch"] in (1, 2)
    printed = capsys.readouterr().out
    assert f"Training starts from {tmp_path / 'old'} (seed=0, epoch {found['epoch']})." in printed
    assert f"It knows {found['known_items']} of the " in printed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.dim": 16}, "model.dim (8 there, 16 now)"),
        ({"model.ff_dim": 16}, "model.ff_dim (8 there, 16 now)"),
        ({"model.num_blocks": 2}, "model.num_blocks (1 there, 2 now)"),
        ({"model.neighbours": 3}, "model.neighbours (0 there, 3 now)"),
        ({"model.num_heads": 2}, "model.num_heads (1 there, 2 now)"),
        ({"model.tie_embeddings": False}, "model.tie_embeddings (True there, False now)"),
        ({"model.gated": True}, "model.gated (False there, True now)"),
        ({"model.position_bias": True}, "model.position_bias (False there, True now)"),
        (
            {"model.dim": 4, "model.max_len": 15},
            "model.dim (8 there, 4 now); model.max_len (14 there, 15 now)",
        ),
    ],
)
def test_a_model_of_another_shape_is_refused(logs, tmp_path, changes, message):
    config = warm_config(logs, **changes)
    with pytest.raises(UserError) as error:
        run(config, tmp_path / "new")
    assert message in str(error.value)
    assert not (tmp_path / "new" / "config.json").exists()


@pytest.mark.parametrize("part", ["gated", "position_bias", "item_bias"])
def test_a_run_of_a_version_without_a_part_has_none(part, logs):
    source, model = load_source(str(logs / "old")), resolve(small()).model.to_dict()
    source.model.pop(part)
    warm_start.check_model(source, model)
    with pytest.raises(UserError, match=rf"model\.{part} \(False there, True now\)"):
        warm_start.check_model(source, model | {part: True})


def test_a_position_bias_is_copied_and_not_dropped(logs, tmp_path):
    source = load_source(str(logs / "old"))
    source.model["position_bias"] = True
    bias = np.random.default_rng(0).normal(size=(1, 32)).astype(np.float32)
    block = source.params["params"]["block_0"] | {"position_bias": bias}
    params = {"params": source.params["params"] | {"block_0": block}}
    source = dataclasses.replace(source, params=params)
    # The buckets do not depend on the window.
    config = warm_config(logs, **{"model.position_bias": True, "model.max_len": 6})
    snapshot = restore(build_experiment(resolve(config)), tmp_path, source)
    found = snapshot.states.params["params"]["block_0"]["position_bias"]
    np.testing.assert_array_equal(found[0], bias)
    with pytest.raises(UserError, match=r"model\.position_bias \(True there, False now\)"):
        warm_start.check_model(source, resolve(warm_config(logs)).model)


def test_biases_of_new_items_follow_their_popularity(logs, tmp_path):
    source = load_source(str(logs / "old"))
    trained = np.random.default_rng(0).normal(1, 2, len(source.dataset.item_ids))
    params = source.params["params"] | {"item_bias": np.float32(trained)[:, None]}
    source = dataclasses.replace(source, params={"params": params})
    changes = {"model.item_bias": True, "train.average_decay": 0.9}
    experiment = build_experiment(resolve(warm_config(logs, seeds=(3, 4), **changes)))
    snapshot = restore(experiment, tmp_path, source)
    logs_of_counts = np.log(1 + experiment.dataset.item_counts)
    z = (logs_of_counts - logs_of_counts.mean()) / logs_of_counts.std()
    places = {item: v for v, item in enumerate(source.dataset.item_ids.tolist())}
    expected = [
        trained[places[item]] if item in places else trained.mean() + trained.std() * z[v]
        for v, item in enumerate(experiment.dataset.item_ids.tolist())
    ]
    assert set(experiment.dataset.item_ids.tolist()) - places.keys()
    for params in (snapshot.states.params, snapshot.states.average):
        for found in params["params"]["item_bias"]:
            np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-6)


def test_settings_that_fit_may_differ(logs, tmp_path):
    changes = {"model.max_len": 6, "model.dropout": 0.1, "model.dtype": "bfloat16"}
    _, snapshot = started(warm_config(logs, "cvar", **changes), tmp_path)
    old = serving.load(logs / "old").params["params"]["position_embedding"]
    found = snapshot.states.params["params"]["position_embedding"]
    np.testing.assert_array_equal(found[0], old[:5])
    assert found.dtype == np.float32


@pytest.mark.parametrize("column", ["user_id", "item_id"])
def test_ids_of_another_kind_are_refused(logs, tmp_path, column):
    log = LOG.copy()
    log[column] = "x" + log[column].astype(str)
    log.to_csv(tmp_path / "text.csv", index=False)
    config = warm_config(logs, **{"data.path": str(tmp_path / "text.csv")})
    what = {"user_id": "users", "item_id": "items"}[column]
    with pytest.raises(UserError, match=f"ids of {what} are whole numbers; in this log they are t"):
        run(config, tmp_path / "new")


def test_a_run_on_another_log_is_refused(logs, tmp_path):
    log = LOG.assign(item_id=LOG["item_id"] + 1000)
    log.to_csv(tmp_path / "other.csv", index=False)
    config = warm_config(logs, **{"data.path": str(tmp_path / "other.csv")})
    with pytest.raises(UserError, match=r"knows none of the \d+ items of this log"):
        run(config, tmp_path / "new")


def test_of_a_grid_the_selected_run_is_the_start(logs, tmp_path):
    config = config_of(logs / "yesterday.csv", "gdro", **{"objective.step_size": (0.01, 0.1)})
    run(config, tmp_path / "grid")
    expected = serving.load(tmp_path / "grid")
    assert load_source(str(tmp_path / "grid")).run == expected.run
    one = tmp_path / "grid" / "runs" / "step_size=0.1,seed=0"
    assert load_source(str(one)).run == "step_size=0.1,seed=0"


def test_the_training_does_not_change_the_source(logs, tmp_path):
    """The training donates its parameters' buffers, which must not be those of the source."""
    config = resolve(warm_config(logs))
    source = load_source(config.train.init_from)
    before = warm_start.parameters_hash(source.params)
    experiment = build_experiment(config)
    snapshot = restore(experiment, tmp_path, source)
    jax.tree.map(lambda leaf: leaf.delete(), snapshot.states)
    assert warm_start.parameters_hash(source.params) == before
    for best in snapshot.best.values():
        assert warm_start.parameters_hash(best)


@pytest.mark.slow
def test_it_reaches_the_score_from_scratch_in_less_than_half_the_steps(logs, tmp_path):
    recipe = {
        "train.learning_rate": 0.01,
        "train.epochs": 6,
        "train.steps_per_epoch": 10,
        "train.batch_size": 16,
        "model.dim": 16,
        "model.ff_dim": 16,
    }
    run(config_of(logs / "yesterday.csv", **recipe), tmp_path / "old")
    scratch = run(config_of(logs / "today.csv", **recipe), tmp_path / "scratch")
    recipe |= {"train.init_from": str(tmp_path / "old"), "train.epochs": 2}
    warm = run(warm_config(logs, **recipe), tmp_path / "warm")
    score = scratch["val"]["NDCG@20"]["overall"]
    assert warm["train"]["steps"] < scratch["train"]["steps"] / 2
    assert warm["val"]["NDCG@20"]["overall"] >= score
    # Random parameters do not reach it in these steps.
    assert all(row["val/NDCG@20/overall"] < score for row in rows_of(tmp_path / "scratch")[:2])


def test_the_flag_is_a_short_form_of_the_setting(logs, tmp_path, monkeypatch, capsys):
    found = []
    monkeypatch.setattr(train, "run", lambda config, folder: found.append((config, folder)))
    file = write_config(tmp_path / "mine.py", config_of(logs / "today.csv"))
    argv = [f"--config={file}", f"--workdir={tmp_path}", "--init_from=runs/old"]
    train.main(argv)
    train.main([*argv, "--config.train.init_from=runs/old"])
    assert [config.train.init_from for config, _ in found] == ["runs/old", "runs/old"]
    with pytest.raises(SystemExit):
        train.main([*argv, "--config.train.init_from=runs/other"])
    message = "--init_from is runs/old, but --config.train.init_from is runs/other: give one of"
    assert message in capsys.readouterr().err


def test_a_path_may_end_in_a_slash():
    assert resolve(small(**{"train.init_from": "runs/old/"})).train.init_from == "runs/old"
