import gc
import json
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from runs import files_of
from test_recommend import read
from test_serving import make_config, make_log, reference_list

import seqfair_jax
from seqfair_jax import UserError, api, workdir
from seqfair_jax.audit import source
from seqfair_jax.commands import recommend as recommend_command
from seqfair_jax.commands import report as report_command
from seqfair_jax.config import default_config
from seqfair_jax.errors import Interrupted
from seqfair_jax.evaluation.metrics import KINDS
from seqfair_jax.run import run

LOG = make_log()
USERS = pd.DataFrame(
    {
        "user_id": LOG.user_id.unique(),
        "country": ["NL", "FR", None, "FR"] * 10,
        "age": np.arange(40) % 37 + 18,
    }
)
GROUPS = [USERS, "country", "age:2", "pop33"]


def config(**changes):
    made = make_config("", **changes)
    made.data.path = None
    return made


def fit(log=LOG, objective=None, **arguments):
    return seqfair_jax.fit(log, objective, **{"config": config(), "verbose": False} | arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("api") / "run"
    fit(groups=GROUPS, workdir=path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return seqfair_jax.load(folder)


# Several runs.


def test_models_and_folders_are_compared_as_the_report_does(model, folder, tmp_path, capsys):
    other = fit(objective="cvar", groups=GROUPS, workdir=tmp_path / "cvar")
    found = seqfair_jax.compare([folder, other])
    report_command.main([str(folder), str(other.folder), f"--baseline={folder}"])
    assert str(found) in capsys.readouterr().out
    table = found.table().set_index(["name", "slice"])
    for name, of in (("ERM", model), ("CVaR (alpha 0.5)", other)):
        means = {k: v for k, v in of.summary["test"]["NDCG@20"].items() if v is not None}
        for where in ("overall", "target=new", "country=FR", "pop33=niche"):
            row = table.loc[(name, where)]
            assert row["mean"] == pytest.approx(means[where])
            assert (row["kind"], row["seeds"]) == ("run", 1)
            assert np.isnan(row["half"])
    assert ("[markov]", "overall") in table.index
    assert table.loc[("ERM", "overall"), "users"] == len(model.per_user)
    tests = found.tests()
    assert set(tests["name"][tests["kind"] == "run"]) == {"CVaR (alpha 0.5)"}
    assert set(tests["slice"]) >= {"overall", "country=FR"}
    assert found.over_seeds().empty
    with pytest.raises(UserError, match=r"expected a name that ends in \.html, \.csv"):
        found.report(tmp_path / "x.pdf")
    found.report(tmp_path / "x.html")
    assert "CVaR (alpha 0.5)" in (tmp_path / "x.html").read_text()


def test_what_cannot_be_compared(model):
    for single in (model, "runs/erm"):
        with pytest.raises(UserError, match="give a list"):
            seqfair_jax.compare(single)
    with pytest.raises(UserError, match="models is empty"):
        seqfair_jax.compare([])


# The package.


def test_the_import_is_light_and_the_names_are_found_when_used():
    code = (
        "import sys, seqfair_jax\n"
        "assert not {'jax', 'pandas', 'numpy'} & set(sys.modules)\n"
        "assert {'Model', 'fit', 'load', 'UserError'} <= set(dir(seqfair_jax))\n"
        "from seqfair_jax import UserError\n"
        "assert 'jax' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in seqfair_jax.__all__:
        assert getattr(seqfair_jax, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        _ = seqfair_jax.fitt


# Training.


@pytest.mark.slow
def test_a_table_trains_as_its_file_does(model, tmp_path):
    LOG.to_csv(tmp_path / "log.csv", index=False)
    USERS.to_csv(tmp_path / "users.csv", index=False)
    own = config()
    own.data.path, own.data.group_file = str(tmp_path / "log.csv"), str(tmp_path / "users.csv")
    own.groups = ("country", "age:2", "pop33")
    expected = workdir.jsonable(run(own, tmp_path / "run"))
    for key in ("test", "test_worst_group", "val", "baselines", "hparams", "dataset"):
        assert model.summary[key] == expected[key], key
    by_path = fit(
        tmp_path / "log.csv", groups=(tmp_path / "users.csv", "country", "age:2", "pop33")
    )
    assert by_path.summary["test"] == expected["test"]


def test_nothing_is_changed_and_all_of_a_table_is_used(model):
    log, users, chosen = LOG.copy(), USERS[["user_id", "country"]].copy(), config()
    before, settings = chosen.to_json(), {"evaluate.cutoffs": [5], "select.metric": "NDCG@5"}
    fitted = fit(log, "gdro", groups=users, config=chosen, settings=settings)
    pd.testing.assert_frame_equal(log, LOG)
    pd.testing.assert_frame_equal(users, USERS[["user_id", "country"]])
    assert chosen.to_json() == before
    assert settings == {"evaluate.cutoffs": [5], "select.metric": "NDCG@5"}
    assert fitted.config.groups == ("country",)
    assert fitted.summary["method"] == "gdro"
    assert fitted.summary["group_family"] == "country"
    assert "NDCG@5" in fitted.summary["test"]
    assert "NDCG@20" not in fitted.summary["test"]


class Frame:
    """As polars has it: a table that becomes one of Arrow."""

    def __init__(self, frame):
        self._frame = frame

    def to_arrow(self):
        return pa.Table.from_pandas(self._frame, preserve_index=False)


@pytest.mark.parametrize("kind", [Frame, lambda log: pa.Table.from_pandas(log)])
def test_tables_of_other_libraries_resume_the_run(folder, model, kind):
    written = (folder / "summary.json").stat().st_mtime_ns
    again = fit(kind(LOG), groups=GROUPS, workdir=folder)
    assert again.summary == model.summary
    assert (folder / "summary.json").stat().st_mtime_ns == written
    assert sorted(path.name[:4] for path in (folder / "inputs").iterdir()) == ["grou", "log-"]
    again = fit(config=model.config, groups=GROUPS, workdir=folder)
    assert again.summary == model.summary
    assert (folder / "summary.json").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (LOG[:-1], "it had 329 rows, and has 328"),
        (LOG[::-1], "the values of some rows differ"),
        (LOG.assign(timestamp=LOG.timestamp * 1.0), r"timestamp \(int64\).* timestamp \(double\)"),
    ],
)
def test_another_table_is_refused_by_name(folder, other, difference):
    [stored] = (folder / "inputs").glob("log-*.parquet")
    before = files_of(folder), stored.read_bytes()
    with pytest.raises(UserError, match=f"log is another table than .*{difference}"):
        fit(other, groups=GROUPS, workdir=folder)
    assert before == (files_of(folder), stored.read_bytes())
    assert sorted(path.name[:4] for path in (folder / "inputs").iterdir()) == ["grou", "log-"]


def test_two_logs_for_a_new_folder_do_not_replace_each_other(tmp_path):
    config = default_config()
    paths = [source.log_path(tmp_path, log, config) for log in (LOG, LOG[:-1], LOG)]
    assert paths[0] == paths[2] != paths[1]
    assert [len(pd.read_parquet(path)) for path in paths] == [len(LOG), len(LOG) - 1, len(LOG)]


def test_other_groups_are_tested_again(tmp_path):
    first = fit(groups=["pop33", USERS, "country"], workdir=tmp_path / "run")
    others = USERS.assign(country=USERS.country.replace("FR", "BE"))
    second = fit(groups=["pop33", others, "country"], workdir=tmp_path / "run")
    assert "country=FR" in first.summary["test"]["NDCG@20"]
    assert "country=FR" not in second.summary["test"]["NDCG@20"]
    old, new = first.summary["test"]["NDCG@20"], second.summary["test"]["NDCG@20"]
    assert new["country=BE"] == old["country=FR"]
    assert len(list((tmp_path / "run/inputs").glob("groups-*"))) == 1


def test_a_column_may_be_spelled_in_another_way_but_not_be_another_one(tmp_path):
    log = LOG.rename(columns={"item_id": "Item-ID"}).assign(other=LOG.item_id.iloc[::-1].to_numpy())
    log.to_csv(tmp_path / "log.csv", index=False)
    path, column = tmp_path / "log.csv", "data.columns.item_id"
    first = fit(path, settings={column: "Item-ID"}, workdir=tmp_path / "run")
    for name in ("item_id", ""):
        again = fit(path, settings={column: name}, workdir=tmp_path / "run")
        assert again.summary["test"] == first.summary["test"]
        assert again.config.data.columns.item_id == name
    with pytest.raises(UserError, match="was trained on another log"):
        fit(path, settings={column: "other"}, workdir=tmp_path / "run")


def test_seeds_make_a_grid_and_the_model_is_the_selected_run():
    model = fit(seeds=(3, 1), epochs=2)
    assert list(model.runs["run"]) == ["seed=3", "seed=1"]
    assert list(model.runs["status"]) == ["finished"] * 2
    assert list(model.runs["selected"]) == [True, False]
    scores = [
        workdir.read_summary(folder)["best"]["overall"]
        for folder in workdir.run_folders(model.folder, list(model.runs["run"]))
    ]
    assert list(model.runs["validation NDCG@20"]) == scores
    assert model.summary["seed"] == 3
    assert model.config.train.epochs == 2
    other = seqfair_jax.load(model.folder, run="seed=1")
    assert list(other.runs["selected"]) == [False, True]
    assert "seed=1" in repr(other)
    assert (model.folder / "runs/seed=3").is_dir()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"epochs": 3}}, "unknown config key epochs .did you mean 'train.epochs'"),
        ({"settings": {"model.width": 8}}, "unknown config key model.width"),
        ({"settings": {"model": 8}}, "model is a group of settings"),
        ({"settings": {"model.dim": "8"}}, "model.dim is '8': expected a whole number"),
        ({"epochs": 2, "settings": {"train.epochs": 3}}, "train.epochs is given twice"),
        ({"settings": {"data.path": "a.csv"}}, "data.path is given twice"),
        ({"groups": "seq33", "settings": {"groups": ("pop33",)}}, "groups is given twice"),
        ({"objective": "grdo"}, "objective.name is 'grdo' .did you mean 'gdro'"),
        ({"groups": "pop3"}, "unknown group family 'pop3' .did you mean 'pop33'"),
        ({"groups": USERS}, "family 'age' has 37 numbers; .* as in age:4"),
        ({"groups": [USERS, USERS]}, "groups has two tables"),
        ({"groups": "nowhere/users.csv"}, "no such file"),
        ({"groups": [7]}, "groups: expected a table of pandas, polars or pyarrow, found int"),
        ({"log": "nowhere.csv"}, "data.path=nowhere.csv: no such file"),
        ({"log": [1, 2]}, "log: expected a table of pandas, polars or pyarrow, found list"),
        ({"log": LOG[["user_id", "item_id"]]}, "log: no column 'timestamp'"),
        ({"log": None, "config": None}, "log is None"),
        ({"log": LOG.assign(item_id=1.5)}, "^log: the item_id of data row 1 is the float 1.5"),
        ({"log": LOG.item_id}, "log: expected a table .* found Series"),
        ({"groups": USERS[:0]}, "^groups has no rows"),
        ({"settings": [("model.dim", 8)]}, "settings is .*: expected a dict"),
        ({"config": {"model.dim": 8}}, "config is .*: expected a name"),
        ({"workdir": 7}, "7 is no path"),
        ({"workdir": "a\0b"}, "has a NUL character"),
        ({"config": "own_logs"}, "no shipped config has this name .did you mean 'own_log'"),
    ],
)
def test_bad_arguments_are_user_errors_and_leave_no_folder(
    arguments, message, tmp_path, monkeypatch
):
    monkeypatch.setattr(api.tempfile, "tempdir", str(tmp_path))
    with pytest.raises(UserError, match=message):
        fit(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_refused(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(UserError, match="has other files"):
        fit(workdir=tmp_path)


@pytest.mark.parametrize("kept", [True, False])
def test_an_interrupt_is_a_keyboard_interrupt(kept, tmp_path, monkeypatch):
    def stopped(*_):
        raise Interrupted("stopped at step 3", signal.SIGINT)

    monkeypatch.setattr(api, "run", stopped)
    with pytest.raises(KeyboardInterrupt, match="stopped at step 3") as error:
        fit(workdir=tmp_path / "run" if kept else None)
    assert ("nothing is kept" in str(error.value)) != kept
    if kept:  # and resumes, although only the log is there
        monkeypatch.undo()
        assert fit(workdir=tmp_path / "run").summary["status"] == "finished"


def test_what_is_printed(capfd):
    fit()
    assert capfd.readouterr() == ("", "")
    fit(verbose=True)
    printed = capfd.readouterr()
    assert "NDCG@20 on the test targets" in printed.out
    assert "2/2" in printed.err


# The model.


def test_recommend_gives_the_lists_of_the_command(model, folder, tmp_path):
    recommend_command.main([f"--workdir={folder}", f"--out={tmp_path / 'r.parquet'}", "--k=4"])
    expected = read(tmp_path / "r.parquet")
    found = model.recommend(k=4)
    pd.testing.assert_frame_equal(found, expected)
    chosen = ["u30", "07", "u9"]
    for users in (chosen, np.array(chosen), pd.Series(chosen), pa.array(chosen),
                  pd.DataFrame({"customer": chosen}), pa.table({"user_id": chosen})):  # fmt: skip
        part = model.recommend(users, k=4)
        assert list(part.user_id.unique()) == chosen
        for user in chosen:
            same = expected[expected.user_id == user]
            assert list(part.item_id[part.user_id == user]) == list(same.item_id)


def test_recommend_from_histories(model):
    known = LOG.sort_values("timestamp").groupby("user_id").item_id.agg(list)
    every = model.recommend(k=4)
    found = model.recommend(dict(known), k=4)
    table = model.recommend(LOG.rename(columns={"item_id": "sku"}), k=4)
    for user, rows in every.groupby("user_id"):
        assert list(found.item_id[found.user_id == user]) == list(rows.item_id)
        assert list(table.item_id[table.user_id == user]) == list(rows.item_id)
    new = model.recommend({"new": [], "newer": ["i3", "unheard"]}, k=4)
    assert list(new.user_id) == ["new"] * 4 + ["newer"] * 4
    assert list(model.recommend({"new": []}, k=4).item_id) == list(new.item_id[:4])
    assert list(model.recommend({"x": ["i3"]}, k=4).item_id) == list(new.item_id[4:])


def test_recommend_masks_and_chooses_items(model):
    items = list(model.recommend(["07"], k=100).item_id)
    seen = set(LOG.item_id[LOG.user_id == "07"])
    assert list(model.recommend(["07"], 100, seen="mask").item_id) == [
        item for item in items if item not in seen
    ]
    assert list(model.recommend(["07"], 2, exclude=items[:3]).item_id) == items[3:5]
    only = pd.DataFrame({"item_id": items[5:8]})
    assert list(model.recommend(["07"], only=only, exclude=[items[6]]).item_id) == [
        items[5],
        items[7],
    ]


@pytest.mark.parametrize(
    ("users", "arguments", "message"),
    [
        (["07", "x1", "x2", "x3", "x4"], {}, "4 of 5 are not in the run .*'x1', 'x2', 'x3', ...;"),
        ("07", {}, "'07' is one value; give a list, such as \\['07'\\]"),
        ([], {}, "users has no rows"),
        ({}, {}, "histories are empty"),
        ({"a": "i3"}, {}, "the history 'i3' is one value"),
        ({"a": None}, {}, "the history None is one value"),
        ({"a": 3}, {}, "the history 3 is one value"),
        (None, {"k": 0}, "k is 0: expected a whole number"),
        (None, {"k": 2.5}, "k is 2.5"),
        (None, {"seen": True}, "seen is True: expected keep or mask"),
        (None, {"only": "i3"}, "only: 'i3' is one value"),
        (None, {"only": ["nothing"]}, "only: none of its 1 items"),
        (None, {"only": ["i3"], "exclude": ["i3"]}, "exclude: no item is left"),
    ],
)  # fmt: skip
def test_what_recommend_refuses(model, users, arguments, message):
    with pytest.raises(UserError, match=message):
        model.recommend(users, **arguments)


def test_the_products_of_the_embeddings_are_the_scores(model):
    items, users = model.embeddings()
    assert items.shape == (25, 8)
    assert users.shape == (40, 8)
    assert (items.index.name, users.index.name) == ("item_id", "user_id")
    lists = model.recommend(k=25)
    assert len(lists) == 40 * 25
    found = lists.pivot_table(values="score", index="user_id", columns="item_id")
    scores = (users @ items.T).loc[found.index, found.columns]
    np.testing.assert_allclose(scores, found, rtol=1e-5, atol=1e-6)


def test_evaluate_gives_the_figures_of_the_run(model):
    table = model.evaluate()
    metrics = [f"{kind}@{k}" for k in (5, 20) for kind in KINDS]
    assert list(table.columns) == ["model", "slice", "family", "group", "users", *metrics]
    assert list(table.slice[:4]) == ["overall", "country=FR", "country=NL", "country=unknown"]
    assert list(table.users[:4]) == [40, 20, 10, 10]
    assert set(table.family) == {"", "country", "age:2", "pop33", "target"}
    assert list(table.group[-5:]) == ["niche", "diverse", "popular", "repeat", "new"]
    for metric in metrics:
        expected = model.summary["test"][metric]
        assert dict(zip(table.slice, table[metric], strict=True)) == {
            name: expected[name] for name in table.slice
        }


@pytest.mark.slow
def test_evaluate_by_other_groups_cutoffs_and_metrics(model, folder):
    per_user = model.per_user.set_index("user_id")
    plans = pd.DataFrame({"user_id": per_user.index, "plan": ["a", "b"] * 20})
    table = model.evaluate(plans, cutoffs=7, metrics="Recall", baselines=True)
    assert list(table.columns[5:]) == ["Recall@7"]
    assert list(table.model.unique()) == [
        "erm", "most_popular", "markov", "last_viewed", "interleaved", "neighbours", "ease",
    ]  # fmt: skip
    own = table[table.model == "erm"].set_index("slice")["Recall@7"]
    hits = (per_user["rank"] <= 7).fillna(False).to_numpy(bool)
    assert own["plan=a"] == hits[::2].mean()
    assert own["plan=b"] == hits[1::2].mean()
    assert set(model.evaluate([plans, "seq33"]).family) == {"", "seq33", "target"}
    assert set(model.evaluate("country").group) == {"", "FR", "NL", "unknown", "repeat", "new"}
    numpy_cutoffs = model.evaluate(cutoffs=np.array([5, 7]), metrics="Recall")
    assert list(numpy_cutoffs.columns[5:]) == ["Recall@5", "Recall@7"]
    assert len(model.evaluate(cutoffs=7, metrics=[]).columns) == 5 + len(KINDS)
    worst = seqfair_jax.load(folder, rule="worst_group").evaluate(metrics=["NDCG@5"])
    assert worst["NDCG@5"][0] == model.summary["test_worst_group"]["NDCG@5"]["overall"]
    for arguments, message in (
        ({"metrics": "NDGC@20"}, "unknown metric 'NDGC@20'"),
        ({"metrics": "NDCG@7"}, "NDCG@7: the cut-offs are 5, 20"),
        ({"cutoffs": 0}, "cutoffs is 0: expected whole numbers from 1 on"),
        ({"cutoffs": 5.0}, "cutoffs is 5.0"),
        ({"cutoffs": True}, "cutoffs is True"),
        ({"cutoffs": "5"}, "cutoffs is '5'"),
        ({"cutoffs": []}, "cutoffs is \\[\\]"),
        ({"metrics": 5}, "unknown metric '5@5'"),
        ({"groups": pd.DataFrame({"user_id": ["07"]})}, "^groups has no column beside user_id"),
        ({"groups": "countr"}, "unknown group family 'countr' .did you mean 'country'"),
    ):
        with pytest.raises(UserError, match=message):
            model.evaluate(**arguments)


@pytest.mark.slow
def test_a_trained_position_bias_is_tested_and_recommends():
    """Of two seeds that train side by side, with steps that move the bias far."""
    changes = {"model.position_bias": True, "train.learning_rate": 0.3, "train.runs_axis": "vmap"}
    model = fit(seeds=(0, 1), config=config(**changes))
    bias = model._trained.params["params"]["block_0"]["position_bias"]
    assert np.ptp(bias) > 0.3
    table = model.evaluate()
    expected = model.summary["test"]["NDCG@5"]
    assert list(table["NDCG@5"]) == [expected[name] for name in table.slice]
    rows = LOG.sort_values("timestamp").groupby("user_id").item_id.agg(list)[:5]
    ids = model._trained.item_ids.tolist()
    found = model.recommend(dict(rows), k=4, seen="keep")
    for user, row in rows.items():
        lists = reference_list(model._trained, [ids.index(item) for item in row], 4)
        part = found[found.user_id == user]
        assert list(part.item_id) == [ids[item] for item, _ in lists]
        np.testing.assert_allclose(part.score, [score for _, score in lists], rtol=1e-4)


def test_what_a_model_has(model, folder):
    assert model.summary == json.loads((folder / "summary.json").read_text())
    model.summary.clear()
    model.config.model.dim = 3
    assert model.summary
    assert model.config.model.dim == 8
    assert model.per_user["NDCG@20"].mean() == model.summary["test"]["NDCG@20"]["overall"]
    assert repr(model).startswith(
        "<seqfair_jax.Model erm, seed=0: 40 users, 25 items, test NDCG@20"
    )
    worst = seqfair_jax.Model.load(folder, rule="worst_group")
    mean = worst.per_user["NDCG@20"].mean()
    assert mean == worst.summary["test_worst_group"]["NDCG@20"]["overall"]


def test_the_report(model, tmp_path):
    model.report(tmp_path / "report.html")
    assert "country" in (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=r"ends in \.html, \.csv, \.md or \.tex"):
        model.report(tmp_path / "report.pdf")
    model.report(tmp_path / "report.csv", show_small_groups=True)
    table = pd.read_csv(tmp_path / "report.csv", keep_default_na=False)
    france = table[(table["family"] == "country") & (table["group"] == "FR")].iloc[0]
    assert float(france["mean"]) == model.summary["test"]["NDCG@20"]["country=FR"]


def test_a_model_without_a_workdir_lives_in_a_temporary_folder(tmp_path):
    model = fit(groups=GROUPS)
    temporary, lists = model.folder, model.recommend()
    model.save(tmp_path / "saved")
    with pytest.raises(UserError, match="saved has files"):
        model.save(tmp_path / "saved")
    with pytest.raises(UserError, match="is in the model's own folder"):
        model.save(model.folder / "saved")
    assert files_of(temporary) == files_of(tmp_path / "saved")
    del model
    gc.collect()
    assert not temporary.exists()

    saved = seqfair_jax.load(tmp_path / "saved")
    pd.testing.assert_frame_equal(saved.recommend(), lists)
    for key in ("path", "group_file"):
        assert saved.config.data[key].startswith(str(tmp_path / "saved/inputs"))
        assert pd.read_parquet(saved.config.data[key]).shape[0] > 0
    # It resumes where it is, and nothing is trained again.
    written = (tmp_path / "saved/summary.json").stat().st_mtime_ns
    assert fit(groups=GROUPS, workdir=tmp_path / "saved").summary == saved.summary
    assert (tmp_path / "saved/summary.json").stat().st_mtime_ns == written


def test_a_model_is_not_saved_if_its_files_changed(tmp_path):
    model = fit(workdir=tmp_path / "run")
    (tmp_path / "run/groups.parquet").write_bytes(b"")
    with pytest.raises(UserError, match=r"groups.parquet changed since the run finished"):
        model.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
