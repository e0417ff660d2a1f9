"""The comparison with RecTools over wall time, without RecTools."""

import sys

import numpy as np
import pandas as pd
import pytest
from runs import rows_of, small

from benchmarks import common, time_to_quality
from seqfair_jax.config import resolve
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.errors import UserError

METRIC = "NDCG@20"
# In place of RecTools: it lists each user's last item and the items after it, at two times.
PEER = """
import json, pathlib, sys
import numpy as np
import pandas as pd
folder = pathlib.Path(sys.argv[1])
settings = json.loads((folder / "settings.json").read_text())
split = dict(np.load(folder / "split.npz"))
users = split.pop("users")
last = pd.DataFrame(split).sort_values("datetime").groupby("user_id")["item_id"].last()
assert (np.diff(users) > 0).all() and settings["model"] == {"loss": "softmax"}
lists = last.loc[users].to_numpy()[:, None] + np.arange(settings["k"]) % 30
np.savez(folder / "lists.npz", **{"CPU seconds": np.array([40.0, 80.0])},
         seconds=np.array([30.0, 90.0]), steps=np.array([3, 9]),
         targets=np.array([300, 900]), lists=np.stack([lists[:, ::-1], lists]))
"""


def by_hand(dataset, lists):
    """The mean of NDCG@20 over the validation users, whose lists are in the order of users."""
    order = sorted(dataset.valid.users)
    values = []
    for user, item in zip(dataset.valid.users, dataset.valid.items, strict=True):
        row = list(lists[order.index(user)])
        rank = row.index(item) + 1 if item >= 0 and item in row else 0
        values.append(1 / np.log2(1 + rank) if rank else 0.0)
    return np.mean(values)


@pytest.fixture(scope="module")
def config():
    return resolve(small(**{"train.epochs": 2}))


@pytest.fixture(scope="module")
def dataset(config):
    return load_dataset(config.data)


def test_lists_are_scored_on_the_validation_targets(dataset):
    rng = np.random.default_rng(0)
    num_items = len(dataset.item_ids)
    lists = np.stack([rng.permutation(num_items)[:20] for _ in dataset.valid.users])
    found = time_to_quality.score_lists(dataset, lists, METRIC)
    assert found == pytest.approx(by_hand(dataset, lists))
    assert 0 < found < 1
    lists[::2, 3:] = -1  # short lists
    assert time_to_quality.score_lists(dataset, lists, METRIC) == pytest.approx(
        by_hand(dataset, lists)
    )
    best = np.full((len(lists), 1), -1)
    place = np.argsort(dataset.valid.users)
    best[:, 0] = dataset.valid.items[place]
    known = np.mean(dataset.valid.items >= 0)
    assert time_to_quality.score_lists(dataset, best, METRIC) == pytest.approx(known)


def test_the_split_has_the_training_rows_alone(dataset, tmp_path):
    time_to_quality.write_split(dataset, tmp_path)
    split = dict(np.load(tmp_path / "split.npz"))
    assert split.pop("users").tolist() == sorted(dataset.valid.users)
    rows = pd.DataFrame(split)
    assert set(rows) == {"user_id", "item_id", "weight", "datetime"}
    assert len(rows) == dataset.train_lengths.sum()
    for user, of in rows.groupby("user_id"):
        start = dataset.offsets[user]
        expected = dataset.items[start : start + dataset.train_lengths[user]]
        assert of.sort_values("datetime")["item_id"].tolist() == expected.tolist()


def test_our_side_has_a_point_for_each_epoch(config):
    points = time_to_quality.train_ours(config, 600.0)
    steps = config.train.steps_per_epoch
    assert [point["steps"] for point in points] == [steps, 2 * steps]
    assert 0 < points[0]["seconds"] < points[1]["seconds"]
    assert points[1]["targets"] > points[0]["targets"] > 0
    assert all(0 <= point["score"] <= 1 for point in points)
    (point,) = time_to_quality.train_ours(config, 1e-9)
    assert point["steps"] == point["targets"] == 0


@pytest.mark.slow
def test_our_side_scores_the_average_of_the_parameters(finished):
    changes = {"train.average_decay": 0.9, "train.learning_rate": 0.1}
    points = time_to_quality.train_ours(resolve(small(**changes)), 600.0)
    scores = [row["val/NDCG@20/overall"] for row in rows_of(finished(**changes).folder)]
    assert [point["score"] for point in points] == scores


def test_both_sides(config, dataset, tmp_path, monkeypatch, capsys):
    side = tmp_path / "side.py"
    side.write_text(PEER)
    monkeypatch.setattr(time_to_quality, "_SIDE", side)
    monkeypatch.setattr(common, "measure", common.measure_here)
    options = {"minutes": 2, "peer_steps": 0, "every": 60, "models": "defaults", "threads": 0}
    time_to_quality.benchmark(
        config, peer_python=sys.executable, out=str(tmp_path / "out"), **options
    )
    table = pd.read_csv(tmp_path / "out" / "time_to_quality.csv")
    peer = table[table["trainer"] == "RecTools, defaults"]
    last = dataset.items[dataset.offsets[:-1] + dataset.train_lengths - 1]
    lists = last[np.sort(dataset.valid.users)][:, None] + np.arange(20)
    assert peer["score"].iloc[1] == pytest.approx(by_hand(dataset, lists))
    assert peer["steps"].tolist() == [3, 9]
    assert (table["trainer"] == "seqfair_jax").sum() == 2
    assert (tmp_path / "out" / "time_to_quality.png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert f"The best score of RecTools, defaults is {max(peer['score']):.4f}: " in printed
    assert f"{len(dataset.valid.users)} validation users" in printed
    with pytest.raises(UserError, match=r"--peer_python is not set: .*rectools\[torch\]==0\.19"):
        time_to_quality.benchmark(config, peer_python="", out="", **options)
    with pytest.raises(UserError, match="--models=other: 'other' is none of defaults, ml1m"):
        time_to_quality.benchmark(
            config, peer_python=sys.executable, out="", **options | {"models": "other"}
        )


def test_the_tables():
    def points(*values):
        factors = {"seconds": 1, "CPU seconds": 2, "steps": 20, "targets": 10}
        return [{key: factor * seconds for key, factor in factors.items()} | {"score": score}
                for seconds, score in values]  # fmt: skip

    found = {
        "seqfair_jax": points((50, 0.1), (100, 0.3), (170, 0.2)),
        "RecTools, defaults": points((61, 0.05), (125, 0.15)),
        "RecTools, small": points((120, 0.5)),
    }
    assert time_to_quality.by_time(found, 3) == [
        {"after": "1 min", "seqfair_jax": "0.1000", "RecTools, defaults": "-",
         "RecTools, small": "-"},
        {"after": "2 min", "seqfair_jax": "0.3000", "RecTools, defaults": "0.0500",
         "RecTools, small": "0.5000"},
        {"after": "3 min", "seqfair_jax": "0.2000", "RecTools, defaults": "0.1500",
         "RecTools, small": "0.5000"},
    ]  # fmt: skip
    assert time_to_quality.summary(found, METRIC)[0] == {
        "trainer": "seqfair_jax", "trained": "2:50 min, 340 CPU s", "steps": "3,400",
        "targets": "1,700", "targets a CPU second": "5", f"best {METRIC}": "0.3000",
        "after": "1:40 min, 200 CPU s",
    }  # fmt: skip
    assert time_to_quality.passes(found) == [
        "The best score of RecTools, defaults is 0.1500: seqfair_jax reaches it after 1:40 min, "
        "200 CPU s.",
        "The best score of RecTools, small is 0.5000: seqfair_jax does not reach it.",
    ]


def test_the_clock_does_not_count_its_pauses(monkeypatch):
    now = np.zeros(2)
    monkeypatch.setattr(time_to_quality, "_times", now.copy)
    clock = time_to_quality.Clock()
    now += [3, 5]
    with clock.pause():
        now += [10, 20]
    now += [1, 1]
    assert clock.read() == {"seconds": 4, "CPU seconds": 6}
