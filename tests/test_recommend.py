import json
import os
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from test_serving import ODD_USERS, lists_of, make_config, make_log, make_run

from seqfair_jax import __main__, api, audit, serving, workdir
from seqfair_jax.commands import recommend
from seqfair_jax.data.cache import load_dataset, log_hashes
from seqfair_jax.data.ids import find
from seqfair_jax.errors import UserError
from seqfair_jax.run import run
from seqfair_jax.serving import catalogue, tables
from seqfair_jax.serving.output import write_lists
from seqfair_jax.serving.recommender import Lists

COLUMNS = ["user_id", "item_id", "score", "rank"]


@pytest.fixture(scope="module")
def run_and_log(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("recommend"))


@pytest.fixture(scope="module")
def trained(run_and_log):
    return serving.load(run_and_log[0])


@pytest.fixture
def call(run_and_log, tmp_path):
    """Calls the command; returns what it wrote."""

    def call(*flags, out="recs.parquet"):
        path = tmp_path / out
        if not any(flag.startswith("--k=") for flag in flags):
            flags = ("--k=5", *flags)
        recommend.main([f"--workdir={run_and_log[0]}", f"--out={path}", *flags])
        return read(path)

    return call


@pytest.fixture
def refused(call, capsys, tmp_path):
    """The one line with which the command ends; nothing is written."""

    def refused(*flags, out="recs.parquet"):
        with pytest.raises(SystemExit) as end:
            call(*flags, out=out)
        assert end.value.code == 1
        assert not (tmp_path / out).is_file()
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def read(path):
    if path.suffix.lower() == ".parquet":
        return pd.read_parquet(path)
    types = {"user_id": str, "item_id": str, "score": np.float32, "rank": np.int32}
    if path.suffix == ".csv":
        return pd.read_csv(path, dtype=types, keep_default_na=False)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return pd.DataFrame(rows).astype({"score": np.float32, "rank": np.int32})


def items_of(table):
    """Each user's items, in the order of the file."""
    return {user: list(rows.item_id) for user, rows in table.groupby("user_id", sort=False)}


def named(trained, lists):
    return [[trained.item_ids[item] for item, _ in pairs] for pairs in lists]


def write(path, **columns):
    pd.DataFrame(columns).to_csv(path, index=False)
    return path


# The output.


def test_every_user_has_a_list_in_the_ids_of_the_log(call, trained, capsys):
    table = call()
    assert list(table.columns) == COLUMNS
    assert table.dtypes[["score", "rank"]].tolist() == [np.float32, np.int32]
    lists = lists_of(trained, k=5)
    assert list(items_of(table)) == list(trained.user_ids)
    assert list(items_of(table).values()) == named(trained, lists)
    assert table["rank"].tolist() == [1, 2, 3, 4, 5] * 40
    assert table.score.tolist() == [score for pairs in lists for _, score in pairs]
    captured = capsys.readouterr()
    assert "200 rows for 40 users" in captured.out
    assert "run seed=0, best epoch by overall: 40 users" in captured.err
    assert "get no list" not in captured.err  # every user has training rows


def test_users_without_training_rows_are_counted(call, monkeypatch, capsys):
    read_summary = recommend.workdir.read_summary

    def with_dropped(folder):
        summary = read_summary(folder)
        return summary | {"dataset": summary["dataset"] | {"dropped_users": 1234}}

    monkeypatch.setattr(recommend.workdir, "read_summary", with_dropped)
    call()
    assert (
        "1,234 other users of the log get no list, since the run has no training rows of them; "
        "--all_users reads the log again and gives them lists too"
    ) in capsys.readouterr().err


@pytest.mark.parametrize("out", ["recs.csv", "recs.jsonl", "deep/er/recs.PARQUET"])
def test_the_formats_have_the_same_content(out, call, tmp_path):
    expected = call()
    call(out=out)
    found = read(tmp_path / out)
    assert [column for column in found if (found[column] != expected[column]).any()] == []
    assert {'a "quote", a comma', "ünï", "07", "NA"} <= set(found.user_id)


@pytest.mark.parametrize("out", ["recs.parquet", "recs.csv", "recs.jsonl"])
def test_two_runs_of_the_command_give_the_same_bytes(out, call, tmp_path):
    flags = ("--seen=mask", "--batch_size=7")
    call(*flags, out=out)
    first = (tmp_path / out).read_bytes()
    call(*flags, out=out)
    assert (tmp_path / out).read_bytes() == first


def test_the_blocks_of_a_file_are_of_their_own_users(tmp_path):
    found = [
        Lists(first, np.full((2, 1), item, np.int32), np.ones((2, 1), np.float32))
        for first, item in ((0, 3), (2, 1))
    ]
    path = tmp_path / "recs.csv"
    users, items = np.arange(10, 14), np.arange(100, 105)
    written = write_lists(path, found, user_ids=users, item_ids=items, k=1)
    table = pd.read_csv(path)
    assert table["user_id"].tolist() == [10, 11, 12, 13]
    assert table["item_id"].tolist() == [103, 103, 101, 101]
    assert written == (4, 0, 0)


def test_integer_ids_stay_integers():
    known = np.array([3, 7, 2**60])
    assert find(pd.Series([7, 4, 2**60]), known).tolist() == [1, -1, 2]
    text = pd.Series(["7", "07", "x"], dtype="str")
    assert find(text, known).tolist() == [1, -1, -1]
    words = np.array(["7", "a\0", "a"], object)
    assert find(pd.Series([7, 8]), words).tolist() == [0, -1]
    assert find(pd.Series(["a", "a\0"], dtype=object), words).tolist() == [2, 1]


# Who gets a list.


def test_users_of_a_file(call, trained, tmp_path, capsys):
    users = ["u9", ODD_USERS[0], "u9", "stranger", "07"]
    table = call(f"--users={write(tmp_path / 'users.csv', other=1, user_id=users)}")
    found = items_of(table)
    assert list(found) == ["u9", ODD_USERS[0], "stranger", "07"]
    everyone = items_of(call())
    assert all(found[user] == everyone[user] for user in ("u9", ODD_USERS[0], "07"))
    [empty] = named(trained, lists_of(trained, trained.histories.select(np.array([-1])), k=5))
    assert found["stranger"] == empty
    assert "users.csv: 1 users are not in the run" in capsys.readouterr().err


def test_the_log_as_histories_gives_what_the_run_stored(call, run_and_log, tmp_path, capsys):
    _, log = run_and_log
    log.to_csv(tmp_path / "log.csv", index=False)
    table = call(f"--histories={tmp_path / 'log.csv'}", "--seen=mask")
    known = set(log.groupby("item_id").filter(lambda rows: len(rows) > 1).item_id)
    assert list(items_of(table)) == list(log.user_id.unique())
    assert items_of(table) == items_of(call("--seen=mask"))
    assert "rows have items that are not items of the run" in capsys.readouterr().err
    assert set(table.item_id) <= known
    # In order, without times:
    log.sort_values("timestamp")[["item_id", "user_id"]].to_parquet(tmp_path / "log.parquet")
    again = call(f"--histories={tmp_path / 'log.parquet'}", "--seen=mask")
    assert items_of(again) == items_of(table)
    assert "has no column timestamp" in capsys.readouterr().err


def test_histories_of_new_users(call, trained, tmp_path, capsys):
    item = list(trained.item_ids[[3, 8, 1]])
    rows = {
        "user_id": [70, 70, 71, 70, 72, 70],
        "item_id": [item[1], "unheard", "unheard", item[2], item[0], item[0]],
        "Time": [20, 30, 10, 40, 10, 10],
    }
    found = items_of(call(f"--histories={write(tmp_path / 'new.csv', **rows)}"))
    histories = serving.Histories(np.array([3, 8, 1, 3], np.int32), np.array([0, 3, 3, 4]))
    assert found == dict(
        zip(["70", "71", "72"], named(trained, lists_of(trained, histories, k=5)), strict=True)
    )
    err = capsys.readouterr().err
    assert "2 rows have items that are not items of the run" in err
    assert "1 users have no known item; they get the list of a user without items" in err


# All users of the log.

SPARSE = [
    ("once", "i1", 5.5),
    ("twice", "i2", 9),
    ("twice", "i1", 7),
    ("unheard of", "of nobody", 8_000),
    ("the newest", "i3", 10_001),
    ("the newest", "i4", 10_000),
]


def log_with_sparse_users(integers=False):
    """`make_log`, and users whom each filter or split leaves out."""
    log = make_log(integers).assign(timestamp=lambda rows: rows["timestamp"] * 7919 % 400)
    if integers:
        places = {"once": 70, "twice": 71, "unheard of": 72, "the newest": 73, "of nobody": 999}
        rows = [(places[user], places.get(item, 1), time) for user, item, time in SPARSE]
    else:
        rows = SPARSE
    return pd.concat([log, pd.DataFrame(rows, columns=log.columns)], ignore_index=True)


def finished(folder, config):
    """A folder with what a finished run says of its log."""
    workdir.create(folder)
    workdir.finish(folder, log_hashes(config.data))
    return folder


def by_hand(log, known):
    """Each user's known items, oldest first."""
    found = {user: [] for user in log["user_id"]}
    for row in log.sort_values("timestamp", kind="stable").itertuples():
        if row.item_id in known:
            found[row.user_id].append(row.item_id)
    return found


def as_lists(ids, histories, item_ids):
    parts = np.split(item_ids[histories.items], histories.offsets[1:-1])
    return dict(zip(ids.tolist(), map(list, parts), strict=True))


@pytest.mark.parametrize(
    "split",
    [
        {"data.min_interactions": 3},
        {"data.split": "time", "data.min_interactions": 2},
        {"data.split": "time", "data.targets": "every", "data.until": "9000"},
    ],
    ids=["leave_one_out", "first_later_event", "every_later_event"],
)
@pytest.mark.parametrize("integers", [True, False], ids=["integers", "text"])
def test_the_histories_of_all_users_match_loops(split, integers, tmp_path, caplog):
    log = log_with_sparse_users(integers)
    log.to_csv(tmp_path / "log.csv", index=False)
    config = make_config(tmp_path / "log.csv", **{"data.cache_dir": ""} | split)
    dataset = load_dataset(config.data)
    read = log[log["timestamp"] < float(split.get("data.until", "inf"))]
    folder = finished(tmp_path / "run", config)
    ids, histories = tables.histories_of_log(folder, config.data, dataset.item_ids)
    found = as_lists(ids, histories, dataset.item_ids)
    assert found == by_hand(read, set(dataset.item_ids.tolist()))
    assert set(found) == set(read["user_id"]) > set(dataset.user_ids.tolist())
    assert [*map(type, found)] == [int if integers else str] * len(found)
    stored = as_lists(dataset.user_ids, catalogue.whole_histories(dataset), dataset.item_ids)
    assert {user: found[user] for user in stored} == stored
    empty = sum(not items for items in found.values())
    assert empty
    assert f"all_users: {empty} users have no known item; they get the list of a user" in (
        caplog.text
    )


def test_the_histories_of_a_split_by_files_are_in_the_order_of_the_files(tmp_path):
    parts = {
        "train": [("a", "x", 9), ("a", "y", 8), ("b", "x", 1), ("c", "x", 1), ("c", "y", 2)],
        "valid": [("a", "x", 3), ("new", "y", 1), ("c", "x", 3)],
        "test": [("a", "y", 1), ("c", "y", 5), ("new", "x", 0), ("new", "z", 7)],
    }
    for name, rows in parts.items():
        frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
        frame.to_csv(tmp_path / f"{name}.csv", index=False)
    paths = {f"data.{name}_path": str(tmp_path / f"{name}.csv") for name in ("valid", "test")}
    settings = {"data.split": "files", "data.cache_dir": ""} | paths
    config = make_config(tmp_path / "train.csv", **settings)
    dataset = load_dataset(config.data)
    folder = finished(tmp_path / "run", config)
    ids, histories = tables.histories_of_log(folder, config.data, dataset.item_ids)
    expected = {"a": list("yxxy"), "b": ["x"], "c": list("xyxy"), "new": list("yx")}
    assert as_lists(ids, histories, dataset.item_ids) == expected
    with pytest.raises(UserError, match=r"--log=x.csv: .* has three logs .*config\.json says"):
        tables.histories_of_log(folder, config.data, dataset.item_ids, path="x.csv")
    (tmp_path / "valid.csv").write_text("user_id,item_id,timestamp\na,x,1\n")
    with pytest.raises(UserError, match=r"valid\.csv is not the file that .*bytes differ; to rec"):
        tables.histories_of_log(folder, config.data, dataset.item_ids)
    (tmp_path / "test.csv").unlink()
    with pytest.raises(UserError, match=r"data\.test_path=.*no such file; it would be [^;]*$"):
        tables.histories_of_log(folder, config.data, dataset.item_ids)


def test_a_drawn_log_has_no_other_place(tmp_path):
    config = make_config(None, **{"data.name": "synthetic"})
    dataset = load_dataset(config.data)
    folder = finished(tmp_path / "run", config)
    ids, histories = tables.histories_of_log(folder, config.data, dataset.item_ids)
    stored = as_lists(dataset.user_ids, catalogue.whole_histories(dataset), dataset.item_ids)
    found = as_lists(ids, histories, dataset.item_ids)
    assert {user: found[user] for user in stored} == stored
    with pytest.raises(
        UserError, match=r"--log=x\.csv: the log of .* was drawn, and is in no file"
    ):
        tables.histories_of_log(folder, config.data, dataset.item_ids, path="x.csv")


def test_a_run_of_an_earlier_version_has_fewer_settings(tmp_path):
    log_with_sparse_users().to_csv(tmp_path / "log.csv", index=False)
    config = make_config(tmp_path / "log.csv", **{"data.cache_dir": ""})
    dataset = load_dataset(config.data)
    folder = finished(tmp_path / "run", config)
    ids, _ = tables.histories_of_log(folder, config.data, dataset.item_ids)
    old = config.data.copy_and_resolve_references()
    with old.unlocked():
        del old.encoding, old.time_format, old.columns.rating
        old.a_setting_of_then = 1
    again, _ = tables.histories_of_log(folder, old, dataset.item_ids)
    assert again.tolist() == ids.tolist()


@pytest.fixture(scope="module")
def sparse_run(tmp_path_factory):
    """A finished run of a log with users whom the filter left out, and the log's path."""
    folder = tmp_path_factory.mktemp("sparse")
    path = folder / "log.csv"
    log_with_sparse_users().to_csv(path, index=False)
    settings = {"data.min_interactions": 3, "data.cache_dir": str(folder / "cache")}
    run(make_config(path, **settings), folder / "run")
    return folder / "run", path


def test_all_users_of_the_log_have_a_list(sparse_run, tmp_path, capsys):
    folder, _ = sparse_run
    out, flags = tmp_path / "recs.parquet", ["--k=4", "--seen=mask"]
    recommend.main([f"--workdir={folder}", f"--out={out}", *flags])
    some = items_of(read(out))
    assert "4 other users of the log get no list" in capsys.readouterr().err
    recommend.main([f"--workdir={folder}", f"--out={out}", *flags, "--all_users"])
    lists = read(out)
    found = items_of(lists)
    told = capsys.readouterr().err
    assert "all_users: 1 users have no known item" in told
    assert "get no list" not in told
    assert list(found) == sorted([*some, "once", "twice", "unheard of", "the newest"])
    assert {user: found[user] for user in some} == some
    given = {"once": ["i1"], "twice": ["i1", "i2"], "unheard of": [], "the newest": ["i4", "i3"]}
    model = api.load(folder)
    expected = items_of(model.recommend(given, 4, seen="mask"))
    assert {user: found[user] for user in given} == expected
    pd.testing.assert_frame_equal(model.recommend(None, 4, seen="mask", all_users=True), lists)


def test_the_log_of_all_users_may_have_moved_but_not_changed(sparse_run, tmp_path, capsys):
    folder, path = sparse_run
    out, moved = tmp_path / "recs.csv", tmp_path / "moved.csv"
    flags = [f"--workdir={folder}", f"--out={out}", "--k=2", "--all_users"]
    path.rename(moved)

    def refused(*more):
        with pytest.raises(SystemExit):
            recommend.main([*flags, *more])
        assert not out.exists()
        return capsys.readouterr().err.splitlines()[-1]

    try:
        line = refused()
        assert f"--all_users reads the run's log again: data.path={path}: no such file" in line
        assert line.endswith("; if that log is in another place now, name it by --log")
        assert "data.path=none.csv: no such file" in refused("--log=none.csv")
        changed = tmp_path / "changed.csv"
        changed.write_text(moved.read_text() + "once,i2,77\n")
        line = refused(f"--log={changed}")
        assert f"{changed} is not the file that {folder} was trained on, since its bytes" in line
        assert "to recommend by the rows of another log, give them as --histories" in line
        recommend.main([*flags, f"--log={moved}"])
        assert {"once", "the newest"} <= set(read(out)["user_id"])
        before = moved.read_bytes()
        with pytest.raises(SystemExit):
            recommend.main([flags[0], "--all_users", f"--log={moved}", f"--out={moved}"])
        assert "is the input" in capsys.readouterr().err
        assert moved.read_bytes() == before
        model = api.load(folder)
        pd.testing.assert_frame_equal(
            model.recommend(all_users=True, log=moved, k=2).drop(columns="score"),
            read(out).drop(columns="score"),
        )
    finally:
        moved.rename(path)


def test_all_users_are_not_some(refused, run_and_log):
    assert "--users and --all_users are both given" in refused("--all_users", "--users=u.csv")
    assert "--log=x.csv is for --all_users, which reads it" in refused("--log=x.csv")
    model = api.load(run_and_log[0])
    with pytest.raises(UserError, match="before_test and all_users are both given"):
        model.recommend(before_test=True, all_users=True)
    with pytest.raises(UserError, match="log is given, but only all_users=True reads it; give"):
        model.recommend(log="x.csv")
    with pytest.raises(UserError, match="log is a DataFrame: expected the path of the run's log"):
        model.recommend(log=run_and_log[1], all_users=True)


# What is recommended.


def test_seen_items_are_kept_or_masked(call, trained):
    kept, masked = call("--seen=keep"), call("--seen=mask")
    pd.testing.assert_frame_equal(call(), kept)
    assert list(items_of(masked).values()) == named(trained, lists_of(trained, k=5, mask_seen=True))
    assert items_of(masked) != items_of(kept)


def test_lists_before_the_test_are_those_that_were_tested(call, run_and_log, refused):
    lists = call("--before_test", "--k=20")
    found = audit.evaluate_recommendations({"own": lists}, run_and_log[0])
    run, own = found.systems
    assert own.summary["test"] == run.summary["test"]
    whole = audit.evaluate_recommendations({"own": call("--k=20")}, run_and_log[0])
    assert whole.systems[1].summary["test"] != run.summary["test"]
    assert "no row of the test was used to make them" in str(found)
    message = refused("--before_test", "--users=u.csv", out="none.csv")
    assert "--users and --before_test are both given; give one of them" in message
    model = api.load(run_and_log[0])
    pd.testing.assert_frame_equal(model.recommend(before_test=True), lists)
    with pytest.raises(UserError, match="users and before_test are both given"):
        model.recommend(["07"], before_test=True)


def test_only_and_exclude(call, trained, tmp_path, capsys):
    listed = [*trained.item_ids[[2, 20, 5, 9, 11]], "unheard"]
    only = f"--only={write(tmp_path / 'only.csv', item_id=listed)}"
    found = items_of(call(only))
    assert {frozenset(items) for items in found.values()} == {frozenset(listed[:-1])}
    ranked = items_of(call("--k=1000"))
    assert all(items == [i for i in ranked[user] if i in listed] for user, items in found.items())
    assert "only.csv: 1 items are not items of the run; left out" in capsys.readouterr().err
    exclude = f"--exclude={write(tmp_path / 'exclude.csv', item_id=listed[:2])}"
    found = items_of(call(only, exclude))
    assert {frozenset(items) for items in found.values()} == {frozenset(listed[2:-1])}
    assert "40 users have fewer than 5 items" in capsys.readouterr().err
    path = write(tmp_path / "stock.csv", item_id=listed[:3], in_stock=[0, 1, 1])
    call(f"--only={path}")
    told = "stock.csv: only the items are read, and not the other columns (in_stock)"
    assert told in capsys.readouterr().err
    found = items_of(call(exclude))
    assert all(
        items == [i for i in ranked[user] if i not in listed[:2]][:5]
        for user, items in found.items()
    )


# Refusals.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--k=0"], "error: --k=0"),
        (["--seen=hide"], "error: --seen=hide: expected keep or mask"),
        (["--users=a", "--histories=b"], "error: --users and --histories are both given"),
        (["--users=nothing.csv"], "error: --users=nothing.csv: no such file"),
        (["--run=seed=1"], "has no run 'seed=1'; there are seed=0"),
        (["--rule=best"], "error: rule is 'best': expected overall or worst_group"),
    ],
)
def test_a_bad_flag_is_one_line(flags, message, refused):
    assert message in refused(*flags)


def test_a_message_shows_an_integer_id_as_the_log_has_it():
    table = pd.DataFrame({"item_id": [99]})
    with pytest.raises(UserError, match=r"none of its 1 items .*, whose first is 3; give items"):
        tables.read_items(table, "only", np.array([3, 4]))


@pytest.mark.parametrize(
    ("flag", "columns", "message"),
    [
        ("users", {"size": ["u9"]}, "no column 'user_id'"),
        ("users", {"user_id": [1, 2]}, "none of its 2 users is a user of the run's log"),
        ("users", {"user_id": []}, "has no rows"),
        ("only", {"item_id": ["x"]}, "none of its 1 items is an item of the run"),
        ("exclude", {"item_id": ["i1", ""]}, "data row 2 has no item_id"),
        (
            "exclude",
            {"customer_id": ["u1"], "item_id": ["i1"]},
            "has a column 'customer_id', but its items would be excluded for all users",
        ),
        ("histories", {"user_id": ["a"]}, "no column 'item_id', it has user_id; rename a column"),
        ("histories", {"user_id": [], "item_id": []}, "has no rows"),
        (
            "histories",
            {"user_id": ["a"], "item_id": ["i1"], "timestamp": ["soon"]},
            "the timestamp of data row 1 is 'soon'",
        ),
        (
            "histories",
            {"user_id": ["a", "a"], "item_id": ["i1", "i2"], "timestamp": [1, None]},
            "data row 2 has no timestamp; fill or remove them",
        ),
        (
            "histories",
            {"user_id": ["a"], "item_id": ["i1"], "time": [1], "date": [2]},
            "time and date may each be the timestamp; rename a column",
        ),
    ],
)
def test_a_table_that_cannot_be_used_is_refused(flag, columns, message, refused, tmp_path):
    path = write(tmp_path / "table.csv", **columns)
    line = refused(f"--{flag}={path}")
    assert line.startswith("error: ")
    assert message in line
    assert str(path) in line


def test_excluding_everything_is_refused(refused, trained, tmp_path):
    path = write(tmp_path / "all.csv", item_id=trained.item_ids)
    assert "no item is left to recommend" in refused(f"--exclude={path}")


@pytest.mark.parametrize("out", ["recs.txt", "recs", "recs.csv.gz"])
def test_another_suffix_is_refused_before_anything_is_read(out, refused):
    assert "expected .parquet, .csv, .jsonl" in refused("--users=nothing.csv", out=out)


def test_a_folder_is_no_output(refused, tmp_path):
    (tmp_path / "recs.csv").mkdir()
    assert "recs.csv is a folder" in refused(out="recs.csv")


def test_flags_that_are_missing(capsys):
    with pytest.raises(SystemExit):
        __main__.main(["recommend", "--workdir=x"])
    assert "error: --out is missing: the file to write" in capsys.readouterr().err


# Interruptions.


@pytest.mark.parametrize("out", ["recs.parquet", "recs.csv", "recs.jsonl"])
def test_ctrl_c_writes_nothing_and_says_so(out, call, monkeypatch, tmp_path, capsys):
    def interrupted(*args, **options):
        yield from recommend_lists(*args, **options)
        os.kill(os.getpid(), signal.SIGINT)
        yield

    recommend_lists = recommend.recommend
    monkeypatch.setattr(recommend, "recommend", interrupted)
    (tmp_path / out).write_text("as before")
    with pytest.raises(SystemExit) as end:
        call(out=out)
    assert end.value.code == 130
    assert f"stopped: nothing was written to {tmp_path / out}" in capsys.readouterr().err
    assert (tmp_path / out).read_text() == "as before"
    assert [path.name for path in tmp_path.iterdir()] == [out]


def test_a_killed_process_leaves_no_output(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
import numpy as np
from seqfair_jax.serving.output import write_lists
from seqfair_jax.serving.recommender import Lists

def found():
    yield Lists(0, np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32))
    os.kill(os.getpid(), signal.SIGKILL)

write_lists(Path(sys.argv[1]), found(), user_ids=np.arange(2), item_ids=np.arange(1), k=1)
"""
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "recs.csv")],
        capture_output=True,
        check=False,
    )
    assert result.returncode == -signal.SIGKILL
    assert not (tmp_path / "recs.csv").exists()


def test_a_program_without_standard_error_writes_the_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    lists = Lists(0, np.zeros((2, 1), np.int32), np.zeros((2, 1), np.float32))
    path = tmp_path / "recs.csv"
    write_lists(path, [lists], user_ids=np.arange(2), item_ids=np.arange(1), k=1)
    assert pd.read_csv(path)["user_id"].tolist() == [0, 1]


def test_an_input_is_never_replaced(call, run_and_log, tmp_path, capsys):
    """Neither a file of the command nor the log or the groups of the run."""
    histories = tmp_path / "new.csv"
    histories.write_text("user_id,item_id\n1,1\n")
    log = run_and_log[0].parent / "log.csv"  # of the run; it was removed
    run_and_log[1].to_csv(log, index=False)
    before = log.read_bytes()
    for flags, out in (([f"--histories={histories}"], histories), ([], log)):
        link = tmp_path / f"link-{out.stem}.csv"
        link.symlink_to(out)
        for path in (out, link):
            with pytest.raises(SystemExit):
                recommend.main([f"--workdir={run_and_log[0]}", f"--out={path}", *flags])
            assert f"--out={path} is the input {out}" in capsys.readouterr().err
    assert histories.read_text() == "user_id,item_id\n1,1\n"
    assert log.read_bytes() == before
    log.unlink()


def test_tables_may_have_the_column_names_of_the_log(trained, tmp_path):
    """Rows are sorted by the log's own column of times, whatever its name."""
    named = {"user_id": "buyer", "item_id": "article", "timestamp": "bought at"}
    items = trained.item_ids[:3]
    rows = [("new", items[0], 3), ("new", items[1], 1), ("new", items[2], 2)]
    path = tmp_path / "new.csv"
    pd.DataFrame(rows, columns=[*named.values()]).to_csv(path, index=False)
    arguments = (str(path), trained.user_ids, trained.item_ids)
    ids, histories = tables.read_histories(*arguments, named)
    assert ids.tolist() == ["new"]
    assert histories.items.tolist() == [1, 2, 0]
    assert tables.read_items(str(path), "only", trained.item_ids, named).tolist() == [0, 1, 2]
    plain = tmp_path / "plain.csv"
    pd.DataFrame(rows, columns=["user_id", "item_id", "time"]).to_csv(plain, index=False)
    again = tables.read_histories(str(plain), *arguments[1:], named)
    assert again[1].items.tolist() == [1, 2, 0]


def test_histories_may_have_the_times_of_the_log(trained):
    items = trained.item_ids[:2]
    table = pd.DataFrame({"user_id": 1, "item_id": items, "timestamp": ["01.02.24", "02.01.24"]})
    known = (trained.user_ids, trained.item_ids)
    for time_format, order in [("%d.%m.%y", [1, 0]), ("%m.%d.%y", [0, 1])]:
        _, found = tables.read_histories(table, *known, time_format=time_format)
        assert found.items.tolist() == order
    with pytest.raises(UserError, match="expected a time of data.time_format='%Y'"):
        tables.read_histories(table, *known, time_format="%Y")


def test_histories_are_read_by_the_rules_of_the_log(trained, caplog):
    a, b = trained.item_ids[:2]
    rows = [("x", a, 1), ("x", b, 2), ("x", a, 1), (None, a, 3), ("x", b, 3), ("y", None, 4)]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    known = (trained.user_ids, trained.item_ids)
    with pytest.raises(UserError, match="data row 4 has no user_id"):
        tables.read_histories(table, *known)
    rules = tables.reading_rules({"missing": "drop", "repeats": "drop"})
    with caplog.at_level("INFO"):
        ids, found = tables.read_histories(table, *known, **rules)
    assert ids.tolist() == ["x"]
    assert found.items.tolist() == [0, 1, 1]
    assert "2 rows have no user, item or time" in caplog.text
    assert "1 rows have the user, item and time of an earlier row" in caplog.text
    dates = table.assign(timestamp=pd.to_datetime(table["timestamp"], unit="D"))
    assert tables.read_histories(dates, *known, **rules)[1].items.tolist() == [0, 1, 1]
    kept = tables.reading_rules({"missing": "drop", "repeats": "keep"})
    assert tables.read_histories(table, *known, **kept)[1].items.tolist() == [0, 0, 1, 1]
    # Without times an item twice is no repeated row.
    _, found = tables.read_histories(table.drop(columns="timestamp"), *known, **rules)
    assert found.items.tolist() == [0, 1, 0, 1]
    with pytest.raises(UserError, match="every row lacks a user, an item or a time"):
        tables.read_histories(table[3:4], *known, **rules)
