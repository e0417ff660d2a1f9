import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict

from seqfair_jax.config import default_config
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import build_family
from seqfair_jax.data.split import training_rows
from seqfair_jax.data.synthetic import default_settings, generate
from seqfair_jax.errors import UserError

ROOT = Path(__file__).parents[1]
MAINSTREAM = {"kinds": (1.0,), "tail_shares": (0.0,)}
NICHE = {"kinds": (1.0,), "tail_shares": (1.0,)}
CERTAIN = {"follow": 1.0, "repeat": 0.0, "num_successors": 1}


def settings(**changes):
    """A log of few items and long sequences."""
    config = ConfigDict(default_settings())
    config.update({"num_users": 200, "num_items": 50, "mean_length": 30.0} | changes)
    return config


def pairs(frame, lag):
    """The users, the items, and the items that stand `lag` places before them."""
    earlier = frame.groupby("user_id")["item_id"].shift(lag)
    there = earlier.notna()
    return frame["user_id"][there], frame["item_id"][there], earlier[there].astype(int)


def successor_of(frame, lag):
    """The item that follows each item at a lag, where it is always the same."""
    _, item, earlier = pairs(frame, lag)
    following = item.groupby(earlier).unique()
    assert (following.str.len() == 1).all()
    return following.str[0]


def test_the_log_is_a_function_of_its_settings():
    pd.testing.assert_frame_equal(generate(settings()), generate(settings()))
    assert not generate(settings()).equals(generate(settings(seed=1)))


def test_rows_are_in_the_order_of_the_sequences():
    frame = generate(settings(max_length=40))
    lengths = frame.groupby("user_id").size()
    assert lengths.between(5, 40).all()
    assert lengths.nunique() > 20
    assert frame["timestamp"].tolist() == [t for length in lengths for t in range(length)]
    assert frame["item_id"].between(0, 49).all()


@pytest.mark.parametrize("lag", [2, 3])
def test_an_item_follows_the_one_at_its_lag(lag):
    lags = tuple(float(place == lag) for place in (1, 2, 3))
    frame = generate(settings(lags=lags, **CERTAIN, **MAINSTREAM))
    assert len(successor_of(frame, lag)) > 30
    with pytest.raises(AssertionError):
        successor_of(frame, 1)


def successors(**changes):
    """The rule of a log in which each item has one successor."""
    rule = successor_of(generate(settings(lags=(1.0,), num_users=2000, **CERTAIN, **changes)), 1)
    assert len(rule) == 50 - (10 if changes == NICHE else 0)
    return rule


def test_the_lags_have_their_shares():
    rule = successors(**MAINSTREAM)
    frame = generate(settings(lags=(0.25, 0.75), **CERTAIN, **MAINSTREAM))
    _, item, second = pairs(frame, 2)
    last = pairs(frame, 1)[2][item.index]
    by_last, by_second = (rule[earlier].to_numpy() == item for earlier in (last, second))
    assert (by_last | by_second).all()
    differs = by_last != by_second
    assert differs.sum() > 1000
    assert by_second[differs].mean() == pytest.approx(0.75, abs=0.03)


def test_the_same_item_leads_the_kinds_of_user_to_different_items():
    mainstream, niche = successors(**MAINSTREAM), successors(**NICHE)
    assert (niche >= 10).all()
    assert (mainstream[niche.index] != niche).mean() > 0.8
    frame = generate(settings(lags=(1.0,), kinds=(0.5, 0.5), tail_shares=(0.0, 1.0), **CERTAIN))
    user, item, last = pairs(frame, 1)
    is_mainstream = (mainstream[last].to_numpy() == item).groupby(user).all()
    is_niche = (niche.reindex(last).to_numpy() == item).groupby(user).all()
    assert (is_mainstream | is_niche).all()
    assert 0.4 < is_niche.mean() < 0.6


@pytest.mark.parametrize(("changes", "exponent", "head"), [(MAINSTREAM, 1.0, 0), (NICHE, 0.3, 10)])
def test_fresh_items_follow_zipfs_law(changes, exponent, head):
    frame = generate(settings(follow=0.0, repeat=0.0, head_share=0.2, **changes))
    law = np.zeros(50)
    law[head:] = np.arange(1, 51 - head) ** -exponent
    share = np.bincount(frame["item_id"], minlength=50) / len(frame)
    np.testing.assert_allclose(share, law / law.sum(), atol=0.02)
    assert (share[:head] == 0).all()


def test_repeats_are_items_of_the_same_user():
    frame = generate(settings(follow=0.0, repeat=1.0))
    first = frame.groupby("user_id")["item_id"].transform("first")
    assert (frame["item_id"] == first).all()


@pytest.mark.parametrize("num_items", [2, 5])
def test_the_smallest_logs(num_items):
    config = settings()
    config.update(num_users=1, num_items=num_items, max_length=5)
    assert len(generate(config)) == 5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_users": 0}, "num_users is 0: expected a whole number, 1 or more"),
        ({"kinds": (0.5, 0.1, 0.1)}, r"kinds is \(.*: expected shares that add up to 1"),
        ({"kinds": (0.5, 0.5)}, r"kinds is \(.* as many shares as tail_shares"),
        ({"lags": (0.5, 0.4)}, r"lags is \(.*: expected shares that add up to 1"),
        ({"lags": ()}, r"lags is \(\): expected shares that add up to 1"),
        ({"lags": ("a",)}, r"lags is \('a',\): expected shares that add up to 1"),
        ({"follow": 0.98}, r"follow is 0.98: expected follow \+ repeat at most 1"),
        ({"head_share": 1.0}, "head_share is 1.0: expected a share that leaves some items"),
        ({"tail_shares": (2.0, 0.0, 0.0)}, r"tail_shares is \(.*: expected shares between 0 and 1"),
        ({"tail_zipf": -1.0}, "tail_zipf is -1.0: expected a number, 0 or more"),
    ],
)
def test_bad_settings_are_named(changes, message):
    with pytest.raises(UserError, match=f"data.synthetic.{message}"):
        generate(settings(**changes))


def test_shares_may_be_rounded():
    thirds = (0.3333333, 0.3333333, 0.3333333)
    assert len(generate(settings(kinds=thirds, lags=thirds)))


def test_items_further_back_say_more_than_the_last_one():
    """In each group, the four commonest followers of the third last item hit more often."""
    config = default_config().data
    config.cache_dir = ""
    config.synthetic.num_users = 3000
    dataset = load_dataset(config)
    user, item = training_rows(dataset)
    family = build_family(dataset, "pop33")

    def hits(lag):
        same = user[lag:] == user[:-lag]
        before, after = item[:-lag][same], item[lag:][same]
        size = len(dataset.item_ids)
        counts = np.bincount(before * size + after, minlength=size**2).reshape(size, size)
        best = np.argsort(-counts, axis=1)[:, :4]
        hit = (best[before] == after[:, None]).any(axis=1)
        return np.array([hit[members[user[lag:][same]]].mean() for members in family.membership.T])

    assert family.groups == ("niche", "diverse", "popular")
    assert (hits(3) > hits(1) + 0.1).all()


def test_the_readme_shows_what_the_demo_runs():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (recipe,) = re.findall(r"^demo:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    lines = [" ".join(line.split()).lstrip("@") for line in recipe.splitlines()]
    readme = (ROOT / "README.md").read_text().replace("\\\n", " ")
    shown = [" ".join(line.split()) for line in readme.splitlines()]
    ran = [line.replace("$(BIN)", ".venv/bin") for line in lines if "$(BIN)/seqfair" in line]
    assert len(ran) == 5
    assert [line for line in shown if line in ran] == ran
