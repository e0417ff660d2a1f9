import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import reference
from numpy.testing import assert_array_equal
from runs import slow_but
from test_serving import ODD_USERS, make_config, make_log, make_run

from seqfair_jax import audit, serving, workdir
from seqfair_jax.api import compare
from seqfair_jax.audit import lists, source
from seqfair_jax.audit.evaluation import evaluate, parse_metrics
from seqfair_jax.commands import evaluate as command
from seqfair_jax.commands import report as report_command
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.metrics import rank_metrics
from seqfair_jax.report.contents import build
from seqfair_jax.report.runs import read_runs
from seqfair_jax.serving import catalogue
from seqfair_jax.serving.recommender import recommend

SHOWN = "<b>a</b> 'b' \\u202e/../😀 [markov]"
SPLITS = {
    "leave_one_out": {},
    "first_later_event": {"data.split": "time", "data.test_share": 0.3},
    "every_later_event": {
        "data.split": "time",
        "data.test_share": 0.3,
        "data.targets": "every",
    },
}
NASTY = "<b>a</b> 'b' \u202e/../😀 [markov]"


def spread(log):
    """The log with times that do not follow the users, so that a split by time tests many."""
    return log.assign(timestamp=log["timestamp"] * 7919 % 400)


@pytest.fixture(
    scope="module", params=slow_but(SPLITS, ["leave_one_out", "every_later_event"]), ids=str
)
def any_run(request, tmp_path_factory):
    """A finished run of each split, whose log is gone, and the config."""
    folder = tmp_path_factory.mktemp("audit")
    path = folder / "log.csv"
    spread(make_log()).to_csv(path, index=False)
    config = make_config(path, **SPLITS[request.param])
    from seqfair_jax.run import run

    run(config, folder / "run")
    path.unlink()
    return folder / "run"


@pytest.fixture(scope="module")
def one_run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("audit"))[0]


@pytest.fixture
def dataset(tmp_path):
    path = tmp_path / "log.csv"
    spread(make_log()).to_csv(path, index=False)
    return load_dataset(make_config(path, **SPLITS["every_later_event"]).data)


@pytest.fixture
def refused(capsys):
    """The one line with which the command ends."""

    def refused(*argv):
        with pytest.raises(SystemExit) as end:
            command.main([str(word) for word in argv])
        assert end.value.code == 1
        return capsys.readouterr().err.splitlines()[-1]

    return refused


def own_lists(folder, k=20, mask_seen=None):
    """The run's lists of the users who are tested, from their histories before the test."""
    trained = serving.load(folder)
    dataset = catalogue.read_dataset(folder)
    histories = serving.Histories(dataset.items, dataset.offsets).select(dataset.test.users)
    rows = []
    for block in recommend(trained, histories, k=k, mask_seen=mask_seen):
        for place, (items, scores) in enumerate(zip(block.items, block.scores, strict=True)):
            user = dataset.user_ids[dataset.test.users[block.first + place]]
            rows += [
                (user, trained.item_ids[item], float(score), rank + 1)
                for rank, (item, score) in enumerate(zip(items, scores, strict=True))
                if np.isfinite(score)
            ]
    return pd.DataFrame(rows, columns=["user_id", "item_id", "score", "rank"])


# A run's test again.


def test_a_run_s_test_again_has_the_same_figures(any_run):
    for rule, suffix in (("overall", ""), ("worst_group", "_worst_group")):
        found = evaluate(source.from_run(any_run, None, source.Choice()), {}, rule=rule)
        summary = workdir.read_summary(any_run)
        [system] = found.systems
        assert system.summary["test"] == summary["test" + suffix]
        assert system.summary["val"] == summary["val" + suffix]
        assert system.summary["recommended"] == summary["recommended" + suffix]
        assert system.summary["baselines"] == summary["baselines"]
        stored = pd.read_parquet(workdir.per_user(any_run, suffix))
        # Through JSON, since Parquet gives lists back as arrays.
        assert json.loads(system.per_user.to_json()) == json.loads(stored.to_json())
    baselines = pd.read_parquet(any_run / workdir.BASELINES)
    pd.testing.assert_frame_equal(found.baselines, baselines)


def test_the_run_s_own_lists_get_the_run_s_figures(any_run):
    table = own_lists(any_run)
    shuffled = table.sample(frac=1, random_state=0)
    found = audit.evaluate_recommendations(
        {"by rank": shuffled.drop(columns="score"), "in order": table[["user_id", "item_id"]]},
        any_run,
    )
    run, *others = found.systems
    for other in others:
        assert other.summary["test"] == run.summary["test"]
        assert other.summary["recommended"] == run.summary["recommended"]
        columns = [c for c in run.per_user if c != "rank"]
        pd.testing.assert_frame_equal(other.per_user[columns], run.per_user[columns])


@pytest.mark.parametrize("mask_seen", [False, True])
def test_repeated_targets_under_a_mask_are_told(mask_seen, one_run, caplog):
    choice = source.Choice(mask_seen=mask_seen)
    evaluate(source.from_run(one_run, None, choice), {})
    repeated = catalogue.read_dataset(one_run).test.repeat
    told = (
        f"{repeated.sum():,} of the {len(repeated):,} test targets are items of the user's history"
    )
    assert repeated.any()
    assert (told in caplog.text) == mask_seen


def test_other_groups_cutoffs_and_masks(one_run, tmp_path):
    users = pd.read_parquet(one_run / "split.parquet")["user_id"]
    country = np.array(["a/b", "NA", "<c>"])[np.arange(len(users)) % 3]
    pd.DataFrame({"user_id": users, "country=x": country}).to_csv(tmp_path / "g.csv", index=False)
    choice = source.Choice(None, str(tmp_path / "g.csv"), [1, 7], True)
    found = evaluate(source.from_run(one_run, None, choice), {})
    [system] = found.systems
    table = system.per_user
    assert set(system.summary["test"]) >= {"NDCG@1", "NDCG@7", "MAP@7"}
    means = system.summary["test"]["NDCG@7"]
    for group in set(country):
        mine = table["country%3Dx"] == group
        assert means[f"country%3Dx={group}"] == pytest.approx(table["NDCG@7"][mine].mean())
    assert set(system.summary["baselines"]) == {
        "most_popular", "markov", "neighbours", "ease",  # as under a mask
    }  # fmt: skip
    masked = own_lists(one_run, k=7, mask_seen=True)
    dataset = catalogue.read_dataset(one_run)
    for row, (user, target, repeat) in enumerate(
        zip(dataset.test.users, dataset.test.item_ids, dataset.test.repeat, strict=True)
    ):
        if not repeat:  # a repeated target is masked in a list, and not in the test
            mine = masked[masked["user_id"] == dataset.user_ids[user]]["item_id"].tolist()
            hit = target in mine
            assert table["Recall@7"][row] == hit
    both = source.Choice(["country=x*pop33", "seq33"], str(tmp_path / "g.csv"))
    names = [family.name for family in source.from_run(one_run, None, both).families]
    assert names == ["country%3Dx*pop33", "seq33"]


def test_a_run_s_own_groups_can_be_combined_without_the_group_file(finished, tmp_path):
    users = pd.DataFrame({"user_id": range(300)})
    users["tier"] = np.where(users["user_id"] % 4 == 0, "gold", "01")
    users.loc[:9, "tier"] = None
    path = tmp_path / "tiers.csv"
    users.to_csv(path, index=False)
    folder = finished(**{"groups": ("tier", "pop33"), "data.group_file": str(path)}).folder
    path.unlink()
    stored = source.from_run(folder, None, source.Choice()).families
    assert [family.name for family in stored] == ["tier", "pop33"]
    assert stored[0].groups == ("01", "gold", "unknown")
    crossed = source.from_run(folder, None, source.Choice(["tier*pop33"])).families[0]
    labels = pd.read_parquet(folder / workdir.GROUPS)
    expected = labels["tier"] + "*" + labels["pop33"]
    assert crossed.labels().tolist() == expected.tolist()


def test_a_new_group_file_takes_the_place_of_the_run_s_own_groups(finished, tmp_path, caplog):
    ages = pd.DataFrame({"user_id": range(300), "age": np.arange(300) % 40, "tier": "old"})
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    ages.to_csv(old, index=False)
    ages.assign(age=ages.age + 1000, plan="x").drop(columns="tier").to_csv(new, index=False)
    names = ("age:2", "age:2*pop33", "age:2&pop33", "pop33*seq33", "tier")
    folder = finished(**{"groups": names, "data.group_file": str(old)}).folder
    with caplog.at_level("INFO", "seqfair_jax"):
        found = source.from_run(folder, None, source.Choice(names[:-1], str(new))).families
    assert "no result shows these families of the group file: plan" in caplog.text
    assert caplog.text.count("the group file has a row for ") == 1
    assert found[0].groups == ("1000-1019", "1020-1039")
    for family in found[1:3]:
        assert any("10" in group for group in family.groups)
    stored = source.from_run(folder, None, source.Choice(["pop33*seq33"])).families[0]
    np.testing.assert_array_equal(found[3].membership, stored.membership)
    with pytest.raises(UserError, match="unknown group family 'tier'; known: .*age, plan"):
        source.from_run(folder, None, source.Choice(["tier"], str(new)))


TABLE = pd.DataFrame({"user_id": [1], "plan": ["x"]})


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        (None, (None, [])),
        ("pop33", (None, ["pop33"])),
        ("address.country", (None, ["address.country"])),
        (["a/b", "c.d*pop33"], (None, ["a/b", "c.d*pop33"])),
        ("absent.CSV", ("absent.CSV", [])),
        (["here.data", "address.country"], ("here.data", ["address.country"])),
        ([Path("x"), "address.country", "y.csv"], (Path("x"), ["address.country", "y.csv"])),
        ([TABLE, "address.csv"], (TABLE, ["address.csv"])),
    ],
)
def test_names_of_families_and_paths_are_told_apart(tmp_path, monkeypatch, groups, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here.data").touch()
    table, names = source.split_groups(groups)
    assert (table is expected[0] or table == expected[0], names) == (True, expected[1])


# Lists.


def test_ranks_agree_with_loops():
    rng = np.random.default_rng(5)
    num_users, num_items = 30, 12
    rows = pd.DataFrame(
        {
            "user": rng.integers(num_users - 3, size=400),  # the last three have no list
            "item": rng.integers(num_items + 3, size=400),  # some are outside the vocabulary
            "order": rng.integers(4, size=400) * 1.0,  # ties
        }
    )
    sizes = rng.integers(1, 4, num_users)
    owners = np.repeat(np.arange(num_users), sizes)
    targets = np.concatenate([rng.choice(num_items + 3, n, replace=False) for n in sizes])
    targets[rng.random(len(targets)) < 0.1] = -1
    found = lists.rank_lists(
        lists.Rows(*(rows[c].to_numpy() for c in rows)),
        targets, owners, num_users=num_users, num_items=num_items, top_k=6,
    )  # fmt: skip
    for user in range(num_users):
        mine = rows[rows["user"] == user]
        wanted = targets[owners == user].tolist()
        pairs = list(zip(mine["item"], mine["order"], strict=True))
        expected = reference.list_ranks(pairs, [t if t >= 0 else None for t in wanted])
        assert sorted(found.ranks[owners == user]) == expected
        assert found.lengths[user] == mine["item"].nunique()
        shown = found.top_items[user]
        assert (shown >= 0).sum() == min(6, mine["item"].nunique())
        assert set(shown[shown >= 0]) <= set(np.minimum(mine["item"], num_items))


def test_ties_duplicates_unknown_items_and_missing_users_by_hand(tmp_path):
    log = pd.DataFrame({"user_id": np.repeat([1, 2, 3, 4], 4), "item_id": [10, 11, 12, 13] * 4})
    log["timestamp"] = range(16)
    rows = [
        (1, 13, 0.5), (1, 10, 0.5), (1, 11, 0.9),  # the target 13 is last of its equals: rank 3
        (2, 99, 1.0), (2, 11, 0.8), (2, 11, 0.7), (2, 13, 0.6),  # 99 keeps its place: rank 3
        (3, 10, 1.0),  # short, a miss
        (77, 13, 1.0),  # not tested
    ]  # fmt: skip
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "score"])
    found = audit.evaluate_recommendations(
        table, log, cutoffs=[3], settings={"data.min_interactions": 1}, groups=["pop33"]
    )
    [system] = found.systems
    assert system.per_user["rank"].fillna(0).tolist() == [3, 3, 0, 0]
    assert found.found == {
        "recommendations": {
            "rows": 9,
            "ordered by": "score",
            "users with a list": 3,
            "users without a list (all their targets are missed)": 1,
            "users with fewer than 3 items": 1,
            "users who are not tested (ignored)": 1,
            "rows with an item again (removed)": 1,
            "items without a training row (kept)": 2,  # 13 and 99
            "rows with such items": 3,
        }
    }
    assert system.summary["test"]["NDCG@3"]["overall"] == pytest.approx(2 * 0.5 / 4)
    shown = [[1, 0, None], [None, 1, None], [0], []]  # only 10 and 11 are in training
    expected = reference.list_stats(shown, 3, [4, 4], [4, 4], 4)
    assert {
        name: means["overall"] for name, means in system.summary["recommended"].items()
    } == pytest.approx(expected)


def test_a_target_outside_the_vocabulary_may_be_hit(dataset):
    outside = np.flatnonzero(dataset.test.items < 0)
    at = outside[0]
    user = dataset.user_ids[dataset.test.users[dataset.test.owners[at]]]
    table = pd.DataFrame({"user_id": [user], "item_id": [dataset.test.item_ids[at]]})
    ranks = lists.read_lists(table, dataset, top_k=5).ranked.ranks
    assert_array_equal(np.flatnonzero(ranks), [at])


def test_rank_wins_over_score_and_tables_of_any_kind(dataset, tmp_path):
    users = dataset.user_ids[dataset.test.users]
    rng = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "Customer_ID": np.repeat(users, 5),
            "sku": np.concatenate([rng.permutation(dataset.item_ids)[:5] for _ in users]),
            "score": rng.random(5 * len(users)),
            "Position": np.tile(rng.permutation(5) + 1, len(users)),
        }
    )
    expected = lists.read_lists(table, dataset, top_k=5)
    assert expected.found["ordered by"] == "Position"
    inverted = table.assign(Position=6 - table["Position"])
    inverted["score"] = -inverted.pop("Position")
    paths = [tmp_path / f"t.{suffix}" for suffix in ("csv", "parquet", "jsonl", "tsv.gz")]
    table.to_csv(paths[0], index=False)
    table.to_parquet(paths[1])
    table.to_json(paths[2], orient="records", lines=True)
    table.to_csv(paths[3], index=False, sep="\t")
    tables = [pa.Table.from_pandas(table), *map(str, paths)]
    for other in tables:
        found = lists.read_lists(other, dataset, top_k=5)
        assert_array_equal(found.ranked.ranks, expected.ranked.ranks)
        assert_array_equal(found.ranked.top_items, expected.ranked.top_items)
        assert found.found == expected.found
    by_score = lists.read_lists(table.drop(columns="Position"), dataset, top_k=5)
    assert by_score.found["ordered by"] == "score"
    in_order = lists.read_lists(table[["Customer_ID", "sku"]], dataset, top_k=5)
    assert in_order.found["ordered by"] == "the order of the rows"
    renamed = table.rename(columns={"Position": "rang", "score": "punkte"})
    renamed.to_csv(tmp_path / "renamed.csv", index=False)
    for given in (renamed, str(tmp_path / "renamed.csv")):
        in_order = lists.read_lists(given, dataset, top_k=5)
        assert in_order.found["ordered by"].startswith("the order of the rows; columns not used: ")
        assert {"rang", "punkte"} == set(in_order.found["ordered by"].split(": ")[1].split(", "))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"rank": [1, 0]}, "the rank of data row 2 is 0; ranks are whole numbers from 1 on"),
        ({"rank": [1.5, 1]}, "the rank of data row 1 is 1.5; ranks are whole numbers"),
        ({"score": [0.1, np.inf]}, "the score of data row 2 is inf; expected a finite number"),
        ({"score": [0.1, np.nan]}, "the score of data row 2 is .*; expected a finite number"),
        ({"score": ["0.1", "high"]}, "the score of data row 2 is 'high'; expected a finite"),
        ({"score": [0.1, "high"]}, "column score are not of one type"),
        ({"user_id": ["u9", None]}, "data row 2 has no user_id"),
        ({"user_id": ["x", "y"]}, "none of its 2 users is tested. Its first is 'x'"),
        ({"user_id": [7, 8]}, "none of its 2 users is tested. Its first is 7, and"),
        ({"position": [1, 2], "place": [1, 2]}, "position and place may each be the rank"),
    ],
)
def test_bad_lists_are_refused(dataset, columns, message):
    table = pd.DataFrame({"user_id": ["u9", "u9"], "item_id": ["i1", "i2"]} | columns)
    with pytest.raises(UserError, match=message):
        lists.read_lists(table, dataset, top_k=5)


def test_the_names_of_lists(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a,b=c.csv").write_text("")
    assert lists.name_paths(["x/old-1.5.csv.gz,new=y.parquet", ".csv"]) == {
        "old-1.5": "x/old-1.5.csv.gz", "new": "y.parquet", ".csv": ".csv",
    }  # fmt: skip
    assert lists.name_paths(["a,b=c.csv"]) == {"a,b=c": "a,b=c.csv"}
    assert lists.name_paths(["new=a,b=c.csv"]) == {"new": "a,b=c.csv"}
    with pytest.raises(UserError, match=r"old.csv and new/old.csv are both called 'old'"):
        lists.name_paths(["old.csv", "new/old.csv"])
    for bad in ("", "=a.csv", "a=", "a.csv,,b.csv"):
        with pytest.raises(UserError, match="expected FILE or NAME=FILE"):
            lists.name_paths([bad])


def test_a_cutoff_may_be_any_number(dataset):
    """A list is never longer than its rows, and a user has no more targets than there are."""
    table = pd.DataFrame({"user_id": ["u9", "u9"], "item_id": ["i1", "i2"]})
    few = lists.read_lists(table, dataset, top_k=5).ranked
    many = lists.read_lists(table, dataset, top_k=10**12).ranked
    assert_array_equal(few.ranks, many.ranks)
    assert_array_equal(few.top_items, many.top_items)
    for name, values in rank_metrics(few.ranks, [10**30]).items():
        kind = name.partition("@")[0]
        assert_array_equal(values, rank_metrics(few.ranks, [10**6])[f"{kind}@{10**6}"])


def test_metrics_by_name():
    assert parse_metrics(["NDCG", "MAP@5"], [5, 10]) == ["NDCG@5", "NDCG@10", "MAP@5"]
    with pytest.raises(UserError, match="the cut-offs are 5, 10; give 20 too"):
        parse_metrics(["MRR@20"], [5, 10])
    with pytest.raises(UserError, match="unknown metric"):
        parse_metrics(["accuracy"], [5])


# The command, its folder, and the report.


@pytest.fixture(scope="module")
def judged(one_run, tmp_path_factory):
    """The folder of an evaluation of a run with two lists, and a page of everything."""
    folder = tmp_path_factory.mktemp("judged")
    own_lists(one_run).to_csv(folder / "own.csv", index=False)
    popular = own_lists(one_run)
    popular["item_id"] = np.resize(catalogue.read(one_run)[0][:20], len(popular))
    popular.to_parquet(folder / "popular.parquet")
    named = f"{NASTY}={folder / 'popular.parquet'}"
    command.main(
        [
            f"--workdir={one_run}",
            f"--recommendations={folder / 'own.csv'}",
            f"--recommendations={named}",
            f"--out={folder / 'out'}",
            "--cutoffs=5,20",
        ]
    )
    return folder / "out"


def test_the_folder_is_read_as_runs_are(judged, one_run):
    run, own, popular = read_runs([judged])
    assert [x.is_list for x in (run, own, popular)] == [False, True, True]
    assert own.summary["test"] == run.summary["test"]
    assert popular.name == SHOWN
    assert popular.summary["label"] == NASTY
    assert {path.name for path in own.folder.iterdir()} == {
        "summary.json", "config.json", "per_user.parquet", "baselines.parquet", "groups.parquet",
        "finished.json",
    }  # fmt: skip
    assert [r.name for r in read_runs([one_run, judged])] == ["ERM", "own", SHOWN]
    assert [r.name for r in read_runs([judged, one_run])] == ["ERM", "own", SHOWN]
    assert read_runs([judged, one_run])[0].folder == one_run.resolve()
    with pytest.raises(UserError, match="is the --out of seqfair evaluate and has no model"):
        serving.load(judged)


def test_a_report_of_runs_and_lists(judged, one_run, tmp_path, capsys):
    page = tmp_path / "report.html"
    report_command.main([str(one_run), str(judged), f"--out={page}", "--metric=NDCG@5"])
    printed = capsys.readouterr().out
    assert "own" in printed
    assert "NDCG@5 with one target: 1 / log2(1 + rank) within the first 5, else 0." in printed
    written = page.read_text(encoding="utf-8")
    assert "<b>a</b>" not in written
    assert "&lt;b&gt;a&lt;/b&gt;" in written
    assert "What the first 5 items show" in written


def test_folders_of_other_groups_or_other_logs(judged, one_run, tmp_path, capsys, finished):
    table = own_lists(one_run)
    out = tmp_path / "fewer"
    found = audit.evaluate_recommendations({"third": table}, one_run, groups=["seq2060", "pop33"])
    found.write(out)
    report_command.main([str(judged), str(out)])
    printed = capsys.readouterr().out
    assert "third" in printed
    assert "pop33" in printed
    assert "seq33" not in printed  # not of both
    assert "No tests were made" not in printed
    with pytest.raises(SystemExit):
        report_command.main([str(judged), str(finished().folder)])
    assert "are of different logs or splits" in capsys.readouterr().err


def test_unequal_tests_of_one_run_are_not_taken_for_the_same(one_run, tmp_path, caplog):
    for name, masks in (("masked", True), ("kept", False), ("again", False)):
        audit.evaluate_recommendations({}, one_run, mask_seen=masks).write(tmp_path / name)
    both = read_runs([tmp_path / "masked", tmp_path / "kept"])
    assert [run.name for run in both] == [
        "ERM (evaluate.mask_seen True)", "ERM (evaluate.mask_seen False)"
    ]  # fmt: skip
    with caplog.at_level("INFO", "seqfair_jax"):
        assert len(read_runs([tmp_path / "kept", tmp_path / "again"])) == 1
        assert "again: the same test is there, so this test is left out" in caplog.text
        assert len(read_runs([tmp_path / "kept", one_run])) == 1
    assert "kept: the run itself is there, so this test is left out" in caplog.text


def test_two_lists_of_one_name(judged, one_run, tmp_path):
    found = audit.evaluate_recommendations({"own": own_lists(one_run)}, one_run)
    found.write(tmp_path / "again")
    with pytest.raises(UserError, match="both have lists that are called 'own'"):
        read_runs([judged, tmp_path / "again"])
    found = audit.evaluate_recommendations(
        {"ERM": own_lists(one_run), "[markov]": own_lists(one_run)}, one_run
    )
    assert [system.name for system in found.systems] == ["ERM", "ERM (list)", "[markov] (list)"]
    found.write(tmp_path / "like_others")
    assert [run.name for run in read_runs([tmp_path / "like_others"])] == [
        "ERM", "ERM (list)", "[markov] (list)",
    ]  # fmt: skip


def test_a_change_of_the_folder_is_found(judged, tmp_path):
    copy = shutil.copytree(judged, tmp_path / "copy")
    part = next(copy.glob("runs/list=own"))
    (part / "per_user.parquet").write_bytes(b"x")
    with pytest.raises(UserError, match=r"per_user.parquet changed"):
        read_runs([copy])


def test_lists_of_a_log_without_any_run(tmp_path, capsys):
    log = make_log()
    log.to_csv(tmp_path / "log.csv", index=False)
    users = log["user_id"].unique()
    items = log["item_id"].value_counts().index[:20]
    old = pd.DataFrame([(u, i) for u in users for i in items], columns=["user", "item"])
    old.to_csv(tmp_path / "old.csv", index=False)
    new = old.assign(score=np.resize([0.3, 0.1, 0.2], len(old)))
    new.to_parquet(tmp_path / "new.parquet")
    out = tmp_path / "audit"
    command.main(
        [
            "--config=own_log", f"--config.data.path={tmp_path / 'log.csv'}",
            "--config.data.min_interactions=1", "--config.data.cache_dir=",
            "--config.select.min_users=1",
            f"--recommendations={tmp_path / 'old.csv'}",
            f"--recommendations={tmp_path / 'new.parquet'}",
            f"--out={out}", "--metrics=NDCG,HitRate", "--baseline=old",
        ]
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert "the order of the rows" in printed
    assert "NDCG@20 against old" in printed
    assert "HitRate@20 against old" in printed
    assert "[markov]" in printed
    old_row, new_row = read_runs([out])
    assert (old_row.name, new_row.name) == ("old", "new")
    report_command.main([str(out), f"--out={tmp_path / 'r.html'}"])
    # The report has the verdict of the command: about what is audited, which is not the baseline.
    again = capsys.readouterr().out
    assert "new is compared with the baseline without training that is best for each" in again
    assert "- With new, group " in again
    assert "With old, group " not in again + printed
    told = [line for line in again.splitlines() if line.startswith("- ")]
    assert told[0] == (
        "- The other rows are compared with old, as in `seqfair evaluate`. "
        "`seqfair report --baseline=NAME` names another row."
    )
    assert set(told[1:]) <= set(printed.splitlines())
    assert again[again.index("NDCG@20 against old") :].partition("\n\n")[0] in printed
    frame = audit.evaluate_recommendations(
        {"old": old, "new": new}, log, settings={"data.min_interactions": 1, "select.min_users": 1}
    )
    assert [s.summary["test"] for s in frame.systems] == [
        r.summary["test"] for r in (old_row, new_row)
    ]


def test_a_report_takes_the_baseline_of_the_evaluation_or_a_row_by_its_name(
    judged, one_run, tmp_path, caplog, capsys
):
    made = audit.evaluate_recommendations({"old": own_lists(one_run), "e=x": own_lists(one_run)},
                                          one_run)  # fmt: skip
    made.write(tmp_path / "named", baseline="old")
    made.write(tmp_path / "markov", baseline="markov")
    made.write(tmp_path / "plain")

    def reference(*folders, baseline=None):
        found = build(read_runs(folders), "NDCG@20", baseline=baseline)
        return found.reference, found.named_by, found.subjects["pop33"]

    stored = workdir.read_summary(tmp_path / "named" / "runs" / "list=old")["evaluation"]
    assert stored["baseline"] == "old"
    assert reference(tmp_path / "named") == ("old", "seqfair evaluate", ["ERM", "e=x"])
    assert reference(tmp_path / "markov")[0] == "[markov]"
    assert reference(tmp_path / "plain") == ("ERM", "seqfair evaluate", ["old", "e=x"])
    # Beside a run the flag's row stays, and the default does not.
    assert reference(tmp_path / "named", one_run)[:2] == ("old", "seqfair evaluate")
    assert reference(tmp_path / "plain", one_run)[:2] == ("ERM", "")
    # One of the two lists is no longer there.
    part = tmp_path / "named" / "runs" / "list=e=x"
    assert reference(part)[1] == ""
    assert "the baseline of seqfair evaluate is not used: baseline is 'old'" in caplog.text
    for name, row in (("erm", "ERM"), ("ERM", "ERM"), ("e=x", "e=x"), ("ease", "[ease]"),
                      ("[markov]", "[markov]")):  # fmt: skip
        assert reference(tmp_path / "named", baseline=name)[:2] == (row, "--baseline")
        assert made.contents(baseline=name).reference == row
    for name in ("odl", str(tmp_path / "missing")):
        with pytest.raises(
            UserError, match=r"baseline is .*there are ERM.*no folder of a finished"
        ):
            reference(tmp_path / "named", baseline=name)
    with pytest.raises(UserError, match=r"did you mean 'old'.*there are ERM, old, e=x, \[most_po"):
        made.write(tmp_path / "refused", baseline="odl")
    assert not (tmp_path / "refused").exists()
    with pytest.raises(UserError, match="no other method that succeeded"):
        reference(part, baseline="e=x")
    compared = compare([tmp_path / "named"], baseline="e=x")
    assert compared.contents.reference == "e=x"
    report_command.main([str(tmp_path / "named"), "--baseline=e=x"])
    assert "NDCG@20 against e=x: paired t-test" in capsys.readouterr().out


def test_the_result_as_tables(one_run):
    users = pd.DataFrame({"user_id": ODD_USERS, "plan": ["a", "b", "a", "b"]})
    found = audit.evaluate_recommendations(own_lists(one_run), one_run, groups=users, cutoffs=[5])
    table = found.table()
    assert set(table["name"]) >= {"ERM", "recommendations", "[markov]"}
    sizes = table[table["name"] == "ERM"].set_index("slice")["users"]
    assert sizes["plan=a"] == sizes["plan=b"] == 2
    assert sizes["plan=unknown"] == sizes["overall"] - 4
    erm = table[(table["name"] == "ERM") & (table["slice"] == "overall")].iloc[0]
    assert erm["mean"] == pytest.approx(found.systems[0].summary["test"]["NDCG@5"]["overall"])
    assert erm["low"] < erm["mean"] < erm["high"]
    # A run may be named by its method, as everywhere else.
    assert found.contents(baseline="erm").reference == "ERM"
    tests = found.tests(baseline="markov")
    assert set(tests["name"]) >= {"ERM", "recommendations", "[most_popular]"}
    shown = found.recommended()
    assert set(shown["figure"]) == {
        f"{name}@5"
        for name in ("coverage", "gini", "mean_popularity", "popularity_percentile", "novelty")
    }
    assert "test users" in str(found)
    with pytest.raises(UserError, match=r"baseline is 'markof'.*markov"):
        found.tests(baseline="markof")
    with pytest.raises(UserError, match=r"NDCG@7 was not evaluated"):
        found.table("NDCG@7")


def test_the_lowest_mean_in_the_summary_is_that_of_the_table(one_run):
    log = make_log()
    users = log["user_id"].drop_duplicates()
    tiers = ["alone", *np.resize(["a", "b", "b"], len(users) - 1)]
    groups = pd.DataFrame({"user_id": users, "tier": tiers})
    lists = {"own": own_lists(one_run)}
    settings = {"data.min_interactions": 1, "select.min_users": 2}
    found = audit.evaluate_recommendations(lists, log, groups=groups, settings=settings)
    table = found.contents().table("tier").set_index("name")
    [system] = found.systems
    means = {"own": system.summary["test"]}
    means |= {f"[{name}]": of for name, of in system.summary["baselines"].items()}
    assert table.index.tolist() == list(means)
    for name, of in means.items():
        own = of[found.metric]
        judged = [own["tier=a"], own["tier=b"]]
        assert own["tier=alone"] is not None
        assert own["tier/min"] == table.loc[name, "tier/min"] == min(judged)
        assert (own["tier/max"], own["tier/gap"]) == (max(judged), max(judged) - min(judged))


@pytest.mark.parametrize("cutoffs", [5, np.array([5]), iter([5])], ids=["int", "array", "iterator"])
def test_cutoffs_of_any_kind(cutoffs, tmp_path):
    log, settings = make_log(), {"data.min_interactions": 1}
    table = pd.DataFrame({"user_id": log.user_id[:1], "item_id": log.item_id[:1], "rank": 1})
    found = audit.evaluate_recommendations(table, log, cutoffs=cutoffs, settings=settings)
    assert {metric.partition("@")[2] for metric in found.metrics} == {"5"}
    found.write(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["evaluate"]["cutoffs"] == [5]


def test_tables_in_memory_leave_no_path_behind(one_run, tmp_path):
    users = pd.DataFrame({"user_id": ODD_USERS, "plan": ["a", "b", "a", "b"]})
    log, settings = make_log(), {"data.min_interactions": 1}
    lists = own_lists(one_run)
    for name, of in (("run", one_run), ("log", log)):
        own = settings if name == "log" else None
        found = audit.evaluate_recommendations(lists, of, groups=users, settings=own)
        found.write(tmp_path / name)
        data = json.loads((tmp_path / name / "config.json").read_text())["data"]
        assert data["group_file"] is None
        assert (data["path"] is None) == (name == "log")
    assert found.source.description["name"] == "log"


@pytest.mark.slow
def test_a_run_of_a_grid_and_a_rule(finished, tmp_path, capsys):
    folder = finished("cvar", **{"objective.alpha": (0.2, 0.9)}).folder
    names = [run["run"] for run in workdir.read_summary(folder)["runs"]]
    out = tmp_path / "out"
    command.main(
        [f"--workdir={folder}", f"--run={names[-1]}", "--rule=worst_group", f"--out={out}"]
    )
    [part] = [p for p in workdir.finished_folders(folder) if p.name == workdir.path_name(names[-1])]
    summary = workdir.read_summary(out)
    assert summary["test"] == workdir.read_summary(part)["test_worst_group"]
    assert "test_worst_group" not in summary
    assert "CVaR (alpha 0.9), best worst group" in capsys.readouterr().out


def test_bad_flags(refused, one_run, tmp_path):
    own = f"--workdir={one_run}"
    assert "give --workdir of a finished run, or --config" in refused("--cutoffs=5")
    assert "give --workdir of a finished run, or --config" in refused(own, "--config=demo")
    assert "expected whole numbers from 1 on" in refused(own, "--cutoffs=5,0")
    assert "expected keep or mask" in refused(own, "--seen=all")
    assert "expected overall or worst_group" in refused(own, "--rule=best")
    assert "expected unequal names" in refused(own, "--groups=pop33,,seq33")
    assert "unknown group family 'pop34' (did you mean 'pop33'?)" in refused(own, "--groups=pop34")
    assert "no such file" in refused(own, "--recommendations=nothing.csv")
    assert "--recommendations is missing" in refused("--config=own_log")
    assert "has no run 'x'" in refused(own, "--run=x")
    assert "data=0, catalogue=1: expected 1 or more devices" in refused(own, "--data=0")
    lists = ("--config=own_log", "--recommendations=lists.csv")
    assert "--data and --catalogue are of a run" in refused(*lists, "--catalogue=2")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert "has files" in refused(own, f"--out={tmp_path / 'full'}")
    assert "baseline is 'erm2'" in refused(own, "--baseline=erm2")


def test_arguments_of_a_run_and_of_a_log_are_told_apart(one_run, tmp_path):
    table, log = own_lists(one_run), make_log()
    with pytest.raises(UserError, match="settings are of a log, and .* is the folder of a run"):
        audit.evaluate_recommendations(table, one_run, settings={"data.split": "time"})
    for changes in ({"run": "seed=0"}, {"rule": "worst_group"}):
        with pytest.raises(UserError, match="catalogue are of a run, and log is no folder"):
            audit.evaluate_recommendations(table, log, **changes)
    (tmp_path / workdir.CONFIG).write_text("{}")
    with pytest.raises(UserError, match="no summary.json; name the --workdir of a run that has"):
        audit.evaluate_recommendations(table, tmp_path)


def test_a_folder_of_an_earlier_version(one_run, tmp_path):
    copy = shutil.copytree(one_run, tmp_path / "copy")
    split = pd.read_parquet(copy / workdir.SPLIT).drop(columns="test_history_items")
    workdir.write_parquet(copy / workdir.SPLIT, split)
    workdir.finish(copy, {})
    with pytest.raises(UserError, match="an earlier version made this run"):
        source.from_run(copy, None, source.Choice())


def test_nothing_is_left_where_writing_fails(one_run, tmp_path, monkeypatch):
    found = evaluate(source.from_run(one_run, None, source.Choice()), {})

    def fail(folder, inputs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workdir, "finish", fail)
    with pytest.raises(UserError, match="free some space"):
        found.write(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
