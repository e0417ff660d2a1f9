import shutil

import pandas as pd
import pytest
from runs import small
from sweeps import write_results

from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.sweeps import jobs
from seqfair_jax.sweeps import search as search_module
from seqfair_jax.sweeps.search import default_search, search


def tiny(one_by_one=(), **grid):
    config = small(**{"train.epochs": 1, "model.dropout": 0.0})
    config.search = default_search()
    config.search.one_by_one = one_by_one
    config.search.grid.model = grid or {"dim": (8, 4), "dropout": (0.0, 0.5)}
    return config


def dims_and_epochs():
    """Four points of two shapes, since the number of epochs is not compiled."""
    config = tiny(dim=(8, 4))
    config.search.grid.train = {"epochs": (1, 2)}
    return config


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    return folder, search(dims_and_epochs(), folder)


def test_every_combination_is_ranked_by_validation(searched, capsys, monkeypatch):
    folder, ranking = searched
    assert set(zip(ranking["model.dim"], ranking["train.epochs"], strict=True)) == {
        (8, 1), (8, 2), (4, 1), (4, 2)
    }  # fmt: skip
    assert ranking["val NDCG@20"].is_monotonic_decreasing
    for _, row in ranking.iterrows():
        name = f"model.dim={row['model.dim']:.0f},train.epochs={row['train.epochs']:.0f}"
        rows = pd.read_json(folder / "jobs" / name / "metrics.jsonl", lines=True)
        assert row["val NDCG@20"] == pytest.approx(rows["val/NDCG@20/overall"].max())
    pd.testing.assert_frame_equal(pd.read_csv(folder / "search.csv"), ranking, check_dtype=False)
    assert not any("test" in column for column in ranking)

    # The same command trains nothing again and prints the same.
    monkeypatch.setattr(jobs, "run", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(search(dims_and_epochs(), folder), ranking)
    best = ranking.iloc[0]
    flags = (
        f"--config.model.dim={best['model.dim']:.0f} "
        f"--config.train.epochs={best['train.epochs']:.0f}"
    )
    assert f"Best: `{flags}`" in capsys.readouterr().out


def result(score, *, worst=0.0, status="finished"):
    """The part of a run's summary that the search reads."""
    # No validation target of MovieLens is a repeat.
    slices = {"overall": score, "target=repeat": None, "target=new": 0}
    return {
        "status": status,
        "val": {"NDCG@20": slices},
        "best": {"epoch": 1, "step": 3, "overall": score, "worst_group": worst},
        "test": {},
        "train": {"seconds": 1.0},
    }


def test_one_setting_after_another(tmp_path, monkeypatch):
    scores = {(8, 0.0): 0.1, (8, 0.5): 0.3, (4, 0.5): 0.2, (16, 0.5): 0.4}
    trained = []

    def run(config, folder):
        trained.append(folder.name)
        write_results(folder, config, [result(scores[config.model.dim, config.model.dropout])])

    monkeypatch.setattr(jobs, "run", run)
    order = ("model.dropout", "model.dim")
    ranking = search(tiny(order, dim=(8, 4, 16), dropout=(0.0, 0.5)), tmp_path)
    assert trained == [
        "model.dim=8,model.dropout=0.0", "model.dim=8,model.dropout=0.5",
        "model.dim=4,model.dropout=0.5", "model.dim=16,model.dropout=0.5",
    ]  # fmt: skip
    assert ranking["val NDCG@20"].tolist() == [0.4, 0.3, 0.2, 0.1]
    assert ranking["model.dim"].tolist() == [16, 8, 4, 8]
    assert (
        "| 16 | 0.5 | 0.4000 | 0.0000 | - | 0.0000 | 1 | 3 | 1 | 1 |"
        in (tmp_path / "search.md").read_text()
    )


def test_failed_runs_are_not_ranked(tmp_path, monkeypatch, capsys):
    """A failed run has the scores of its last epochs, which may be the highest."""
    failed = {"status": "failed at step 2"}
    runs = {
        16: [result(0.3), result(0.2)],
        8: [result(0.9), result(0.9, **failed)],  # lacks a seed that others have
        4: [result(0.9, **failed), result(0.9, **failed)],
        2: [result(0.4), result(0.3)],
    }

    def run(config, folder):
        write_results(folder, config, runs[config.model.dim])

    monkeypatch.setattr(jobs, "run", run)
    config = tiny(dim=tuple(runs))
    config.seeds = (0, 1)
    ranking = search(config, tmp_path)
    assert ranking["model.dim"].tolist() == [2, 16]
    assert ranking["val NDCG@20"].tolist() == pytest.approx([0.35, 0.25])
    assert ranking["seeds"].tolist() == [2, 2]
    lines = (tmp_path / "search.md").read_text().splitlines()
    left_out = [
        "not ranked: model.dim=8 has 1 of 2 seeds", "not ranked: model.dim=4 has 0 of 2 seeds"
    ]  # fmt: skip
    assert [line for line in lines if line.startswith("not ranked")] == left_out
    assert lines[-1].startswith("Best:")
    printed = capsys.readouterr().out
    assert all(line in printed for line in left_out)


def test_a_failing_point_is_reported_when_the_others_are_done(searched, tmp_path, monkeypatch):
    def run(config, folder):
        if config.model.dim == 4:
            raise DivergedError("diverged")
        shutil.copytree(searched[0] / "jobs" / "model.dim=8,train.epochs=1", folder)

    monkeypatch.setattr(jobs, "run", run)
    with pytest.raises(SystemExit, match=r"1 of 2 jobs failed:\n  model.dim=4: diverged"):
        search(tiny(dim=(4, 8)), tmp_path)
    assert pd.read_csv(tmp_path / "search.csv")["model.dim"].tolist() == [8]


def test_a_search_of_version_0_1_0_is_refused(tmp_path):
    (tmp_path / "calls").mkdir()
    with pytest.raises(UserError, match=r"version 0\.1\.0 made this sweep"):
        search(tiny(), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["calls"]


def test_the_reasons_are_shown_where_every_point_fails(tmp_path, monkeypatch):
    def run(config, folder):
        raise DivergedError("diverged")

    monkeypatch.setattr(jobs, "run", run)
    with pytest.raises(SystemExit, match=r"no point .*\n1 of 1 jobs failed:\n  model.dim=8: div"):
        search(tiny(dim=(8,)), tmp_path)


def test_a_reference_follows_the_settings_of_each_point():
    config = small()
    config.train.decay_steps = config.train.get_ref("epochs") * 3
    config.search = default_search()
    config.search.grid.train = {"epochs": (2, 4)}
    base, grid, _ = search_module.split_search(config)
    points = search_module._combinations(grid)
    assert [search_module._job(base, p).config.train.decay_steps for p in points] == [6, 12]
    assert base.train.decay_steps == 6  # as it was


def test_points_have_their_own_folders_whatever_their_values(tmp_path, monkeypatch):
    columns = ("../../x", "a/b", "a:b", "..", "A", "a", "x" * 300)
    config = tiny(dropout=(0.1234567, 0.1234568))
    config.search.grid.data = {"columns": {"user_id": columns}}
    monkeypatch.setattr(jobs, "run", lambda c, folder: write_results(folder, c, [result(0.5)]))
    ranking = search(config, tmp_path / "deep" / "search")
    assert len(ranking) == 2 * len(columns)
    assert len(list((tmp_path / "deep" / "search" / "jobs").iterdir())) == 2 * len(columns)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["search"]
    assert set(ranking["model.dropout"]) == {0.1234567, 0.1234568}


def test_only_the_plan(tmp_path, capsys):
    assert search(tiny(), tmp_path / "none", dry_run=True).empty
    assert capsys.readouterr().out.splitlines() == [
        "model.dim=8,model.dropout=0.0",
        "model.dim=8,model.dropout=0.5",
        "model.dim=4,model.dropout=0.0",
        "model.dim=4,model.dropout=0.5",
        "4 points, 4 runs, at most 20 steps",
    ]
    search(tiny(("model.dim", "model.dropout")), tmp_path / "none", dry_run=True)
    assert capsys.readouterr().out.splitlines() == [
        "start: model.dim=8, model.dropout=0.0",
        "then try model.dim: 8, 4",
        "then try model.dropout: 0.0, 0.5",
        "3 points, 3 runs, at most 15 steps",
    ]
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small(), "no `search`"),
        (tiny(dimension=(4,)), r"search\.grid\.model\.dimension is not a setting of a run"),
        (tiny(dim=(4, 4)), r"search\.grid\.model\.dim is \[4, 4\]: expected unequal values"),
        (tiny(dim=8), r"search\.grid\.model\.dim is 8: expected unequal values, each int"),
        (tiny(dim=(8, 4.5)), r"search\.grid\.model\.dim is \[8, 4.5\]"),
        (tiny(dropout=("a",)), r"expected unequal values, each int or float"),
        (tiny(("model.dim",)), r"search\.one_by_one is \('model.dim',\): expected each setting"),
    ],
)
def test_bad_searches_are_named(config, message, tmp_path):
    with pytest.raises(UserError, match=message):
        search(config, tmp_path)


def test_a_search_may_leave_settings_out():
    config = tiny()
    del config.search["one_by_one"]
    _, _, order = search_module.split_search(config)
    assert order == ()
    del config.search["grid"]
    with pytest.raises(UserError, match=r"search\.grid is empty"):
        search_module.split_search(config)


def test_unknown_settings_and_empty_grids_are_named(tmp_path):
    config = tiny()
    config.search.points = 3
    with pytest.raises(UserError, match=r"search\.points is not a setting; known: grid"):
        search(config, tmp_path)
    config.search = default_search()
    config.search.grid.objective = {"step_size": (0.1, 0.2)}
    with pytest.raises(UserError, match=r"search\.grid\.objective\.step_size: the setting is"):
        search(config, tmp_path)
    config = small()
    config.search = default_search()
    with pytest.raises(UserError, match=r"search\.grid is empty"):
        search(config, tmp_path)
