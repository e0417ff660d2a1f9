import pandas as pd
import pytest
from numpy.testing import assert_array_equal
from runs import small

from seqfair_jax.config import default_config
from seqfair_jax.data import log
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import build_family
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import leave_one_out
from seqfair_jax.evaluation import baselines, metrics, slices
from seqfair_jax.evaluation.baselines import baseline_ranks


def baseline_dataset():
    """Training rows: user 0 has items 0 1 0 2, user 1 has 0 1; the second to last row validates."""
    rows = [(0, i) for i in (0, 1, 0, 2, 1, 2)] + [(1, i) for i in (0, 1, 0, 1)]
    frame = pd.DataFrame(
        [(u, i, t) for t, (u, i) in enumerate(rows)], columns=["user_id", "item_id", "timestamp"]
    )
    return leave_one_out(log_from_table(frame), name="csv", num_valid_users=0, split_seed=0)


def test_baselines_by_hand():
    # 0 was followed by 1 twice and by 2 once, 1 by 0; 0 appears 3 times, 1 twice, 2 once.
    ranks = baseline_ranks(baseline_dataset(), "test", mask_seen=False, k=3)
    # Test histories 0 1 0 2 1 -> 2 and 0 1 0 -> 1.
    assert ranks["most_popular"].tolist() == [3, 2]
    assert ranks["markov"].tolist() == [0, 1]  # after 1 came only 0
    assert ranks["last_viewed"].tolist() == [2, 2]  # newest first: 1 2 0, and 0 1
    assert ranks["interleaved"].tolist() == [3, 1]  # 0 1 2, and 1 0 2


def test_masked_baselines_by_hand():
    ranks = baseline_ranks(baseline_dataset(), "test", mask_seen=True, k=3)
    # Every item ahead of the target was seen, so it is masked.
    assert {name: rank.tolist() for name, rank in ranks.items()} == {
        "most_popular": [1, 1],
        "markov": [0, 1],
    }


@pytest.mark.parametrize("mask_seen", [False, True])
def test_blocks_of_users_do_not_change_the_ranks(mask_seen, monkeypatch):
    config = small(**{"data.split": "time", "data.targets": "every"}).data
    dataset = load_dataset(config)
    whole = baseline_ranks(dataset, "test", mask_seen=mask_seen)
    monkeypatch.setattr(baselines, "_USERS", 7)
    monkeypatch.setattr(log, "_BLOCK_ROWS", 11)
    parts = baseline_ranks(dataset, "test", mask_seen=mask_seen)
    assert list(parts) == list(whole)
    for name, ranks in whole.items():
        assert_array_equal(parts[name], ranks)
        assert (ranks > 0).any()


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split is 'tset'"):
        baseline_ranks(baseline_dataset(), "tset", mask_seen=False)


def test_real_baselines(real_data):
    config = default_config().data
    config.update({"name": "retailrocket", "path": str(real_data / "retailrocket")})
    config.update({"valid_users": 10_000, "cache_dir": ""})
    dataset = load_dataset(config)

    def figures(split, mask_seen=False, families=()):
        groups = [build_family(dataset, name) for name in families]
        return {
            name: {
                part: value and round(value, 3)
                for part, value in slices.slice_means(
                    metrics.rank_metrics(ranks, [20]), groups, min_users=1
                )["NDCG@20"].items()
            }
            for name, ranks in baseline_ranks(dataset, split, mask_seen=mask_seen).items()
        }

    valid, test = figures("valid"), figures("test", families=("pop33", "seq33"))
    names = ("most_popular", "markov", "last_viewed", "interleaved")
    assert [valid[name]["overall"] for name in names] == [0.006, 0.199, 0.217, 0.248]
    assert [test[name]["overall"] for name in names] == [0.006, 0.21, 0.25, 0.268]
    groups = ("pop33=niche", "pop33=diverse", "pop33=popular")
    assert [test["last_viewed"][group] for group in groups] == [0.245, 0.247, 0.255]
    assert [test["interleaved"][group] for group in groups] == [0.26, 0.258, 0.278]
    groups = ("seq33=short", "seq33=medium", "seq33=long")
    assert [test["interleaved"][group] for group in groups] == [0.234, 0.37, 0.328]
    assert [test["last_viewed"][group] for group in groups[1:]] == [0.392, 0.346]

    config.update({"name": "ml1m", "path": str(real_data / "ml-1m"), "valid_users": 0})
    dataset = load_dataset(config)
    test = figures("test", mask_seen=True)
    assert [test[name]["overall"] for name in ("most_popular", "markov")] == [0.026, 0.142]


def test_a_log_in_which_nothing_follows_anything():
    """One training row each: there is no pair to count."""
    rows = [(user, item, time) for user in range(4) for time, item in enumerate((1, 2, 1))]
    frame = pd.DataFrame(rows, columns=["user_id", "item_id", "timestamp"])
    dataset = leave_one_out(log_from_table(frame), name="csv", num_valid_users=0, split_seed=0)
    ranks = baseline_ranks(dataset, "test", mask_seen=False)
    assert ranks["markov"].tolist() == [0] * 4
    assert ranks["last_viewed"].tolist() == [1] * 4


def test_the_stored_metrics_of_each_user_have_the_means_of_the_summary(finished):
    done = finished()
    table = pd.read_parquet(done.folder / "baselines.parquet")
    runs = pd.read_parquet(done.folder / "per_user.parquet")
    baselines = done.summary["baselines"]
    assert list(table["baseline"].unique()) == list(baselines)
    for name, part in table.groupby("baseline"):
        assert part["user_id"].tolist() == runs["user_id"].tolist()
        niche = (runs["pop33"] == "niche").to_numpy()
        for metric, means in baselines[name].items():
            assert part[metric].mean() == pytest.approx(means["overall"])
            assert part[metric][niche].mean() == pytest.approx(means["pop33=niche"])
