import json
import shutil
from collections import Counter

import jax
import numpy as np
import pandas as pd
import pytest
import reference
from runs import finish, slow_but
from test_audit import NASTY, SHOWN, SPLITS, spread
from test_serving import MAX_LEN, make_config, make_log

import seqfair_jax
from seqfair_jax import serving, workdir
from seqfair_jax.audit import evaluate_recommendations, lists, other_runs
from seqfair_jax.commands import evaluate as command
from seqfair_jax.commands import report as report_command
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import leave_one_out
from seqfair_jax.errors import UserError
from seqfair_jax.report.contents import build
from seqfair_jax.report.runs import read_runs
from seqfair_jax.serving import catalogue

TIME = {"data.split": "time", "data.test_share": 0.3}


def train(folder, log, **changes):
    """A finished run whose log is gone."""
    path = folder.parent / f"{folder.name}.csv"
    log.to_csv(path, index=False)
    finish(make_config(path, **changes), folder)
    path.unlink()
    return folder


def older(log):
    """The log as it was: without its last quarter, and with an item that has left it since."""
    before = log[log["timestamp"] < 300]
    gone = before.sort_values("timestamp").groupby("user_id").head(1).assign(timestamp=-1)
    return pd.concat([before, gone.assign(item_id="i500")], ignore_index=True)


def newer():
    """The log of this week. Of an item that only the old run knows one row is left, in the test."""
    log = spread(make_log())
    log.loc[log["timestamp"].idxmax(), "item_id"] = "i500"
    return log


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """Last week's run."""
    folder = tmp_path_factory.mktemp("weeks") / "old"
    return train(folder, older(newer()), **TIME, seeds=(3,), **{"model.max_len": MAX_LEN + 2})


@pytest.fixture(
    scope="module", params=slow_but(SPLITS, ["first_later_event", "every_later_event"]), ids=str
)
def new(request, old):
    """This week's run of each split."""
    return train(old.parent / request.param, newer(), **SPLITS[request.param])


@pytest.fixture(scope="module")
def late(old, tmp_path_factory):
    """This week's run of one split."""
    return train(tmp_path_factory.mktemp("late") / "new", newer(), **TIME)


@pytest.fixture(scope="module")
def perfect(late):
    """Lists that have every target of that run."""
    dataset = catalogue.read_dataset(late)
    ids = dataset.user_ids[dataset.test.users[dataset.test.owners]]
    path = late.parent / "perfect.csv"
    pd.DataFrame({"user_id": ids, "item_id": dataset.test.item_ids}).to_csv(path, index=False)
    return path


def given_to_old(old, new):
    """What the old run ranks: for each tested user the known history and the targets, by id."""
    old, new = serving.load(old), catalogue.read_dataset(new)
    place = {item: v for v, item in enumerate(old.item_ids.tolist())}
    for j, user in enumerate(new.test.users.tolist()):
        rows = new.items[new.offsets[user] : new.offsets[user + 1]]
        history = [place[item] for item in new.item_ids[rows].tolist() if item in place]
        wanted = new.test.item_ids[new.test.offsets[j] : new.test.offsets[j + 1]].tolist()
        yield new.user_ids[user], history, [place.get(item, -1) for item in wanted]


@pytest.mark.parametrize("mask_seen", [False, True])
def test_an_old_run_ranks_by_ids_as_loops_do(old, new, mask_seen):
    trained, dataset = serving.load(old), catalogue.read_dataset(new)
    tested = other_runs.rank_test(str(old), dataset, mask_seen=mask_seen, batch_size=7, top_k=9)
    tree = jax.tree.map(np.float64, trained.params["params"])
    item_ids = dataset.item_ids.tolist()
    ranks, missed, repeats = [], 0, 0
    for j, (_, history, wanted) in enumerate(given_to_old(old, new)):
        inputs = [None, *history[-MAX_LEN:]]  # the old run's window is longer by two
        hidden = reference.sasrec(tree, inputs, num_blocks=1, num_heads=1)[-1]
        scores = reference.scores(tree, hidden)
        known = [item for item in wanted if item >= 0]
        masked = set(history) - set(known) if mask_seen else set()
        of_known = iter(reference.set_ranks(scores, known, masked))
        ranks += [next(of_known) if item >= 0 else 0 for item in wanted]
        missed += wanted.count(-1)
        repeats += len(set(history) & set(known))
        best = sorted(set(range(len(scores))) - masked, key=lambda item: (-scores[item], item))
        shown = [
            item_ids.index(item) if item in item_ids else len(item_ids)
            for item in trained.item_ids[best[:9]].tolist()
        ]
        assert tested.ranking.top_items[j].tolist() == shown
    np.testing.assert_array_equal(tested.ranking.ranks, ranks)
    assert missed > 0
    assert repeats > 0
    # The old run knows an item that the new run does not, and has it in its lists.
    assert (tested.ranking.top_items == len(item_ids)).any()
    assert "i500" not in item_ids
    assert tested.record["new_targets"] == missed
    assert tested.record["known_targets"] == len(ranks) - missed


def test_the_lists_of_the_old_run_have_the_same_figures(old, new):
    """Lists as long as the largest cut-off give every metric, as those of any recommender."""
    items = serving.load(old).item_ids
    histories = {user: items[history].tolist() for user, history, _ in given_to_old(old, new)}
    table = seqfair_jax.load(old).recommend(histories, k=20)
    found = evaluate_recommendations({"model": str(old), "lists": table}, new, cutoffs=[5, 20])
    assert [system.name for system in found.systems] == ["ERM", "lists", "model"]
    run, by_lists, by_model = (system.summary for system in found.systems)
    assert by_model["test"] == by_lists["test"]
    assert by_model["recommended"] == by_lists["recommended"]
    assert by_model["test"] != run["test"]
    tests = found.tests(baseline="erm")
    one, other = (
        tests[tests["name"] == name].drop(columns=["name", "q", "star"]).reset_index(drop=True)
        for name in ("model", "lists")
    )
    pd.testing.assert_frame_equal(one, other)
    assert (one["kind"] == "list").all()


def test_the_new_run_is_tested_against_the_only_old_one(old, late, perfect, tmp_path):
    runs = {"live": str(old)}

    def reference(given, name, *, baseline=None):
        found = evaluate_recommendations(given, late)
        found.write(tmp_path / name, baseline=baseline)
        read = build(read_runs([tmp_path / name]), "NDCG@20")
        assert read.reference == found.contents(baseline=baseline).reference
        return read.reference, read.subjects["pop33"]

    assert reference(runs, "one") == ("live", ["ERM"])
    assert reference(runs | {"shown": str(perfect)}, "list") == ("live", ["ERM", "shown"])
    assert reference(runs | {"older": str(old)}, "two") == ("ERM", ["live", "older"])
    assert reference(runs, "named", baseline="erm") == ("ERM", ["live"])


@pytest.mark.parametrize(("rule", "mask_seen"), [("overall", True), ("worst_group", False)])
def test_a_run_beside_itself_has_its_own_figures(new, rule, mask_seen):
    found = evaluate_recommendations({"same": new}, new, rule=rule, mask_seen=mask_seen)
    run, same = found.systems
    assert same.summary["test"] == run.summary["test"]
    assert same.summary["recommended"] == run.summary["recommended"]
    pd.testing.assert_frame_equal(same.per_user, run.per_user)
    record = same.summary["evaluation"]["other_run"]
    assert record["trained_test_targets"] == record["new_items"] == 0
    assert record["epoch"] == run.summary["best"]["epoch"]
    assert record["rule"] == rule


@pytest.mark.parametrize(
    "model",
    slow_but(
        [{"model.pointer": True, "model.neighbours": 3, "model.item_bias": True}, {}],
        [],
    ),
    ids=["mixture", "plain"],
)
@pytest.mark.parametrize("integers", [True, False])
def test_another_kind_of_ids_and_of_model(tmp_path, integers, model):
    """Ids that are integers in one log are found as text in the other."""
    log = spread(make_log(integers=True)).rename(columns={"user_id": "buyer"})
    train(tmp_path / "old", log[log["timestamp"] < 300].rename(columns={"buyer": "user_id"}),
          **TIME, **model)  # fmt: skip
    log["user_id"] = log.pop("buyer").astype(str)
    if not integers:
        log = pd.concat([log, log.tail(9).assign(user_id="text", item_id="a text")])
    train(tmp_path / "new", log, **TIME)
    found = evaluate_recommendations({"old": tmp_path / "old"}, tmp_path / "new")
    record = found.systems[1].summary["evaluation"]["other_run"]
    assert record["known_items"] >= 24
    assert found.systems[1].summary["test"]["Recall@20"]["overall"] > 0


def test_targets_that_the_old_run_was_trained_on_are_counted(old, caplog):
    """Of a user and an item the old run has more training rows: counted by loops."""
    log = older(newer()).sort_values("timestamp", kind="stable")
    once = log.index[log["item_id"] == "i500"][0]
    user = log["user_id"][once]
    log = log[(log["item_id"] != "i500") | (log.index == once)]
    log.loc[once, "timestamp"] = 1000  # the last row of its user, so that it is the target
    dataset = leave_one_out(log_from_table(log), name="csv", num_valid_users=0, split_seed=0)
    assert "i500" not in dataset.item_ids
    before, after = Counter(), Counter()
    for of, count in ((catalogue.read_dataset(old), before), (dataset, after)):
        for u, name in enumerate(of.user_ids.tolist()):
            first = of.offsets[u]
            mine = of.item_ids[of.items[first : first + of.train_lengths[u]]].tolist()
            count.update((name, item) for item in mine)
    targets = [
        (dataset.user_ids[u], item)
        for u, item in zip(dataset.test.users, dataset.test.item_ids.tolist(), strict=True)
    ]
    trained = [pair for pair in targets if before[pair] > after[pair]]
    assert (user, "i500") in trained  # this run does not know the item
    assert 1 < len(trained) < len(targets)
    tested = other_runs.rank_test(str(old), dataset, mask_seen=False, batch_size=64, top_k=5)
    assert tested.record["trained_test_targets"] == len(trained)
    other_runs.warn_of_trained_targets(tested.record)
    assert f"{old} was trained on {len(trained)} of the {len(targets)} test targets" in caplog.text
    caplog.clear()
    other_runs.warn_of_trained_targets(tested.record | {"trained_test_targets": 0})
    assert caplog.text == ""


# The command.


def ended(capsys, *argv):
    """The line with which the command ends; "" if it succeeds."""
    try:
        command.main([str(word) for word in argv])
    except SystemExit as end:
        if isinstance(end.code, str):
            return end.code
        printed, errors = capsys.readouterr()
        print(printed)  # for the next call of `readouterr`
        line = errors.splitlines()[-1]
        return f"{line} (status {end.code})" if line.startswith("gate:") else line
    return ""


def test_the_command_and_its_folder(old, late, perfect, tmp_path, capsys):
    out = tmp_path / "out"
    assert not ended(
        capsys, f"--workdir={late}", f"--with={old}",
        f"--with={NASTY}={old}", f"--recommendations={perfect}",
        f"--out={out}", "--groups=pop33,seq33", "--cutoffs=5,20",
    )  # fmt: skip
    printed = capsys.readouterr().out
    assert f"old is {old} (seed=3, epoch 1). It knows " in printed
    assert f"{SHOWN} is {old}" in printed
    assert f"{NASTY} is" not in printed
    found = read_runs([out])
    assert [run.name for run in found] == ["ERM", "perfect", "old", SHOWN]
    assert found[2].summary["test"] == found[3].summary["test"]
    assert found[2].summary["evaluation"]["other_run"]["folder"] == str(old)
    assert not (out / workdir.GATE).exists()
    [part] = out.glob("runs/list=old")
    hashes = workdir.finished_inputs(part)
    assert hashes["with"] == workdir.finished_hash(old)
    report_command.main([str(late), str(out), f"--out={tmp_path / 'r.html'}"])
    assert "old was not found to be below ERM" in capsys.readouterr().out


def test_the_gate_of_the_command(old, late, perfect, tmp_path, capsys):
    run, lists_of = f"--workdir={late}", f"--recommendations={perfect}"
    out = tmp_path / "out"
    failed = ended(
        capsys, run, lists_of, "--fail_if_worse=0.1", f"--out={out}", "--metrics=Recall@5"
    )
    told = "gate: failed: ERM is below perfect in Recall@5 by more than 0.1 for overall"
    assert failed.startswith(told)
    assert failed.endswith(f"(status {command.GATE_FAILED})")
    assert "\n" not in failed
    printed = capsys.readouterr().out
    assert f"files: {out}" in printed
    assert "Recall@5 of ERM minus that of perfect; a loss of at most 0.1 is allowed" in printed
    stored = json.loads((out / workdir.GATE).read_text())
    assert (stored["outcome"], stored["subject"]) == ("worse", "ERM")
    assert (stored["reference"], stored["metric"]) == ("perfect", "Recall@5")
    assert stored["groups"][0]["slice"] == "overall"
    assert [row.name for row in read_runs([out])] == ["ERM", "perfect"]
    pages = [tmp_path / "r.html", tmp_path / "r.md"]
    report_command.main([str(out), *(f"--out={page}" for page in pages)])
    told = "with an allowed loss of 0.1: worse for overall"
    for shown in (capsys.readouterr().out, *(page.read_text() for page in pages)):
        assert told in shown
    # Few users show nothing.
    assert ended(capsys, run, f"--with={old}", "--fail_if_worse=0.1") == ""
    printed = capsys.readouterr().out
    assert "Outcome: unknown" in printed
    assert "gate: passed: no loss above the margin is shown. 6 of 7 outcomes are unknown" in printed
    failed = ended(capsys, run, f"--with={old}", "--fail_if_worse=0.1", "--fail_if_unknown")
    assert failed.startswith(
        "gate: failed: it is unknown whether ERM is below old in NDCG@20 by more"
    )


def test_the_row_that_the_gate_compares_with(old, late, perfect, tmp_path, capsys):
    both = (f"--workdir={late}", f"--with={old}", f"--recommendations={perfect}")
    several = ended(capsys, *both, "--fail_if_worse=0.1")
    assert "the gate needs one row to compare with, and there are 'perfect', 'old'" in several
    failed = ended(capsys, *both, "--fail_if_worse=0.1", "--baseline=perfect")
    assert failed.startswith("gate: failed: ERM is below perfect")
    assert "compares ERM with itself" in ended(
        capsys, *both, "--fail_if_worse=0.1", "--baseline=erm"
    )
    found = evaluate_recommendations({"old": old, "perfect": perfect}, late)
    assert found.gate(0.99, "most_popular").reference == "[most_popular]"
    assert found.gate(0.1, "perfect", metric="MAP@5").metric == "MAP@5"
    with pytest.raises(UserError, match="needs one row to compare with"):
        found.gate(0.1)
    with pytest.raises(UserError, match="baseline is 'prefect' .did you mean 'perfect'"):
        found.gate(0.1, "prefect")


def test_an_old_run_and_lists_on_a_log_without_a_new_run(old, late, perfect, tmp_path, capsys):
    newer().to_csv(tmp_path / "log.csv", index=False)
    settings = {**TIME, "data.min_interactions": 1, "select.min_users": 1}
    log = ["--config=own_log", f"--config.data.path={tmp_path / 'log.csv'}"]
    log += [f"--config.{key}={value}" for key, value in settings.items()]
    log += ["--config.data.cache_dir=", "--config.evaluate.neighbour_draws=1"]
    assert not ended(capsys, *log, f"--with=live={old}", "--rule=worst_group")
    assert "live is " in capsys.readouterr().out
    assert not ended(
        capsys, *log, f"--with=live={old}", f"--recommendations={perfect}",
        "--fail_if_worse=0.1",
    )  # fmt: skip
    # The first of the lists is judged.
    assert "NDCG@20 of perfect minus that of live" in capsys.readouterr().out
    new = evaluate_recommendations({"old": old}, late, cutoffs=[20])
    frame = evaluate_recommendations({"old": old}, newer(), cutoffs=[20], settings=settings)
    assert frame.systems[0].summary["test"]["NDCG@20"]["overall"] == pytest.approx(
        new.systems[1].summary["test"]["NDCG@20"]["overall"]
    )


def test_bad_flags(old, late, perfect, tmp_path, capsys):
    run, old = f"--workdir={late}", f"--with={old}"

    def refused(*argv):
        message = ended(capsys, *argv)
        assert message.startswith("error: ")
        return message

    assert "does not exist; name the --workdir" in refused(run, f"--with={tmp_path / 'no'}")
    assert "perfect.csv is a file; name the --workdir" in refused(run, f"--with={perfect}")
    assert "--with=a=: expected DIR or NAME=DIR" in refused(run, "--with=a=")
    assert "are both called 'old'; give one another name, as in NAME=DIR" in refused(run, old, old)
    both = refused(run, old, f"--recommendations=old={perfect}")
    assert "lists and a run are both called 'old'" in both
    assert "--fail_if_worse is -0.1: expected the loss" in refused(run, old, "--fail_if_worse=-0.1")
    assert "--fail_if_worse is nan: expected" in refused(run, old, "--fail_if_worse=nan")
    assert "--fail_if_worse" in refused(run, old, "--fail_if_worse=much")
    assert "--fail_if_unknown needs --fail_if_worse" in refused(run, old, "--fail_if_unknown")
    assert "there is no other row" in refused(run, "--fail_if_worse=0.1")
    assert "--run, --rule" in refused("--config=own_log", old, "--run=x")
    evaluate_recommendations({}, late).write(tmp_path / "out")
    assert "is the --out of seqfair evaluate and has no model" in refused(
        run, f"--with={tmp_path / 'out'}"
    )


def test_a_run_that_cannot_rank_this_log(old, late, tmp_path):
    log = newer().assign(item_id=lambda rows: "other-" + rows["item_id"])
    other = leave_one_out(log_from_table(log), name="csv", num_valid_users=0, split_seed=0)
    with pytest.raises(
        UserError, match=r"old knows none of the \d+ items of this log, whose first"
    ):
        other_runs.rank_test(str(old), other, mask_seen=False, batch_size=8, top_k=5)
    copy = shutil.copytree(old, tmp_path / "copy")
    split = pd.read_parquet(copy / workdir.SPLIT).drop(columns="test_history_items")
    workdir.write_parquet(copy / workdir.SPLIT, split)
    workdir.finish(copy, {})
    with pytest.raises(UserError, match="an earlier version made this run"):
        evaluate_recommendations({"old": copy}, late)


def test_the_names_of_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "2024.w05").mkdir()
    (tmp_path / "a,b=c").mkdir()
    found = lists.name_paths(["2024.w05/", "new=x/y", ".", "a,b=c"], "with", "DIR")
    assert found == {"2024.w05": "2024.w05/", "new": "x/y", tmp_path.name: ".", "a,b=c": "a,b=c"}
