import pandas as pd
import pytest
from test_run import small

from seqfair_jax import search as search_module
from seqfair_jax import worker
from seqfair_jax.sweeps.search import default_search, search


def tiny(one_by_one=(), **grid):
    config = small(**{"train.steps_per_epoch": 3, "train.epochs": 1})
    config.search = default_search()
    config.search.one_by_one = one_by_one
    config.search.grid.model = grid or {"dim": (8, 4), "dropout": (0.0, 0.5)}
    return config


def test_every_combination_is_ranked_by_validation(tmp_path, capsys, monkeypatch):
    ranking = search(tiny(), tmp_path)
    assert set(zip(ranking["model.dim"], ranking["model.dropout"], strict=True)) == {
        (8, 0.0), (8, 0.5), (4, 0.0), (4, 0.5)
    }  # fmt: skip
    assert ranking["val NDCG@20"].is_monotonic_decreasing
    for _, row in ranking.iterrows():
        name = f"model.dim={row['model.dim']:.0f},model.dropout={row['model.dropout']}"
        rows = pd.read_json(tmp_path / "calls" / name / "metrics.jsonl", lines=True)
        assert row["val NDCG@20"] == pytest.approx(rows["val/NDCG@20/overall"].max())
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "search.csv"), ranking, check_dtype=False)
    out = capsys.readouterr().out
    best = ranking.iloc[0]
    flags = (
        f"--config.model.dim={best['model.dim']:.0f} --config.model.dropout={best['model.dropout']}"
    )
    assert f"Best: `{flags}`" in out
    assert not any("test" in column for column in ranking)

    monkeypatch.setattr(worker, "run", lambda *_: pytest.fail("trained again"))
    pd.testing.assert_frame_equal(search(tiny(), tmp_path), ranking)


def test_one_setting_after_another(tmp_path, monkeypatch):
    scores = {(8, 0.0): 0.1, (8, 0.5): 0.3, (4, 0.5): 0.2, (16, 0.5): 0.4}
    trained = []

    def work(calls, directory):
        trained.append([call.name for call in calls])
        return {}

    def read_summaries(folder):
        pairs = dict(part.split("=") for part in folder.name.split(","))
        score = scores[int(pairs["model.dim"]), float(pairs["model.dropout"])]
        # No validation target of MovieLens repeats.
        slices = {"overall": score, "target=repeat": None, "target=new": 0}
        return [
            {
                "val": {"NDCG@20": slices},
                "best": {"epoch": 1, "step": 3, "overall": score, "worst_group": 0},
                "train": {"seconds": 1.0},
            }
        ]

    monkeypatch.setattr(worker, "work", work)
    monkeypatch.setattr(worker, "done", lambda calls, directory: calls)
    monkeypatch.setattr(search_module.tables, "read_summaries", read_summaries)
    order = ("model.dropout", "model.dim")
    ranking = search(tiny(order, dim=(8, 4, 16), dropout=(0.0, 0.5)), tmp_path)
    assert trained == [
        ["model.dim=8,model.dropout=0.0", "model.dim=8,model.dropout=0.5"],
        ["model.dim=8,model.dropout=0.5", "model.dim=4,model.dropout=0.5",
         "model.dim=16,model.dropout=0.5"],
    ]  # fmt: skip
    assert ranking["val NDCG@20"].tolist() == [0.4, 0.3, 0.2, 0.1]
    assert ranking["model.dim"].tolist() == [16, 8, 4, 8]
    assert (
        "| 16 | 0.5 | 0.4000 | 0.0000 | - | 0.0000 | 1 | 3 | 1 | 1 |"
        in (tmp_path / "search.md").read_text()
    )


def test_a_failing_point_is_reported_when_the_others_are_done(tmp_path, monkeypatch):
    real = worker.run

    def run(config, folder):
        if config.model.dim == 4:
            raise FloatingPointError("diverged")
        return real(config, folder)

    monkeypatch.setattr(worker, "run", run)
    with pytest.raises(SystemExit, match=r"1 of 2 calls failed:\n  model.dim=4: diverged"):
        search(tiny(dim=(8, 4)), tmp_path)
    assert pd.read_csv(tmp_path / "search.csv")["model.dim"].tolist() == [8]


def test_where_every_point_fails_the_reasons_are_told(tmp_path, monkeypatch):
    def run(config, folder):
        raise FloatingPointError("diverged")

    monkeypatch.setattr(worker, "run", run)
    with pytest.raises(SystemExit, match=r"no point .*\n1 of 1 calls failed:\n  model.dim=8: div"):
        search(tiny(dim=(8,)), tmp_path)


def test_what_follows_from_a_setting_of_the_grid_still_follows():
    config = small()
    config.train.decay_steps = config.train.get_ref("epochs") * 3
    config.search = default_search()
    config.search.grid.train = {"epochs": (2, 4)}
    base, grid, _ = search_module.split_config(config)
    points = search_module._combinations(grid)
    assert [search_module._call(base, p).config.train.decay_steps for p in points] == [6, 12]
    assert base.train.decay_steps == 6  # as it was


def test_the_plan_alone(tmp_path, capsys):
    assert search(tiny(), tmp_path / "none", dry_run=True).empty
    assert "4 points, 4 runs, at most 12 steps" in capsys.readouterr().out
    search(tiny(("model.dim", "model.dropout")), tmp_path / "none", dry_run=True)
    assert "3 points, 3 runs, at most 9 steps" in capsys.readouterr().out
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
    with pytest.raises(ValueError, match=message):
        search(config, tmp_path)


def test_unknown_settings_and_empty_grids_are_named(tmp_path):
    config = tiny()
    config.search.points = 3
    with pytest.raises(ValueError, match=r"search\.points is not a setting; known: grid"):
        search(config, tmp_path)
    config.search = default_search()
    config.search.grid.objective = {"step_size": (0.1, 0.2)}
    with pytest.raises(ValueError, match=r"search\.grid\.objective\.step_size: the setting is"):
        search(config, tmp_path)
    config = small()
    config.search = default_search()
    with pytest.raises(ValueError, match=r"search\.grid is empty"):
        search(config, tmp_path)
