import json

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from seqfair_jax.audit import gate
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance
from seqfair_jax.evaluation.significance import FEWEST_VALUES
from seqfair_jax.report import contents, rows

GROUPS = ("a", "b", "c", "d", "e")


def make_contents(ours, theirs, *, label=None, min_users=20):
    """The contents of two rows of metrics f[n], whose users are in GROUPS in turn."""
    label = np.resize(GROUPS, len(ours)) if label is None else label
    users = pd.DataFrame(
        {
            "user_id": np.arange(len(ours)),
            "target_item_id": np.arange(len(ours)),
            "repeat": False,
            "plan": label,
        }
    )

    def row(name, values):
        means = {"overall": float(values.mean())}
        means |= {f"plan={g}": float(values[label == g].mean()) for g in dict.fromkeys(label)}
        table = users.assign(**{"NDCG@20": values})
        return rows.Row(name, rows.LIST, (means,), lambda: {0: table})

    return contents.of_rows(
        [row("new", ours), row("old", theirs)], "NDCG@20", ["plan"],
        dataset={}, min_users=min_users, named="old", tested=False,
    )  # fmt: skip


def share_bound(count, n, confidence):
    """The share p of which `count` or fewer of n have a probability of 1 - confidence."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        few = sum(stats.binom.pmf(k, n, middle) for k in range(count + 1))
        low, high = (middle, high) if few > 1 - confidence else (low, middle)
    return low


def t_bound(values, confidence):
    """The lower bound of a mean by the t distribution."""
    n = len(values)
    mean = sum(values) / n
    error = (sum((x - mean) ** 2 for x in values) / (n - 1) / n) ** 0.5
    return mean - stats.t.ppf(confidence, n - 1) * error


def bounds(own, other, lower, upper, margin):
    """The bounds of `significance.bounds`, by loops."""
    change = [a - b for a, b in zip(own, other, strict=True)]
    n = len(change)
    found = [sum(change) / n]
    for sign, confidence in ((1, lower), (-1, upper)):
        values = [sign * x for x in change]
        large = sum(x < -margin for x in values)
        if sum(x != 0 for x in values) < FEWEST_VALUES:
            bound = -share_bound(sum(x < 0 for x in values), n, confidence)
        elif large < FEWEST_VALUES:
            half = 1 - (1 - confidence) / 2
            bound = t_bound([max(x, -margin) for x in values], half) - share_bound(large, n, half)
        else:
            bound = t_bound(values, confidence)
        found.append(sign * bound)
    return found


@pytest.mark.parametrize(
    ("n", "differ"),
    [(1, 0), (1, 1), (9, 9), (10, 10), (40, 0), (40, 9), (40, 10), (40, 40), (300, 3)],
)
@pytest.mark.parametrize("margin", [0.0, 0.02, 0.4])
def test_bounds_agree_with_loops(n, differ, margin):
    rng = np.random.default_rng(n + differ)
    other = rng.random(n)
    own = other.copy()
    own[:differ] = rng.random(differ)
    found = significance.bounds(own - other, lower=0.95, upper=0.99, margin=margin)
    expected = bounds(own.tolist(), other.tolist(), 0.95, 0.99, margin)
    assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("users", [60, 200, 1000])
def test_error_rates_where_few_users_have_large_differences(users):
    """Many users differ a little, and so few by much that a sample may have none of them."""
    rng = np.random.default_rng(users)

    def sample(shares, values):
        return rng.choice(values, size=(400, users), p=shares)

    # The true loss is just above the margin: "not worse" is wrong.
    for shares, values in (
        ([0.15, 0.15, 0.0102, 0.6898], [0.005, -0.005, -1.0, 0.0]),
        ([0.4, 0.03, 0.57], [0.02, -0.6067, 0.0]),
    ):
        found = [significance.bounds(d, lower=0.95, upper=0.99, margin=0.01)
                 for d in sample(shares, values)]  # fmt: skip
        assert np.mean([gap.low >= -0.01 for gap in found]) < 0.12  # 5 %, or a little more
    # The true loss is just below the margin: "worse" is wrong.
    found = [significance.bounds(d, lower=0.95, upper=0.95, margin=0.01)
             for d in sample([0.6, 0.015, 0.385], [-0.03, 0.63, 0.0])]  # fmt: skip
    assert np.mean([gap.high < -0.01 for gap in found]) < 0.09
    # A model that everybody loses by is worse all the same.
    lost = significance.bounds(np.full(users, -0.3), lower=0.95, upper=0.995, margin=0.01)
    assert lost.high < -0.01


def test_each_group_has_its_outcome_by_loops():
    rng = np.random.default_rng(4)
    theirs = rng.random(1000) * 0.8 + 0.2
    label = np.resize(GROUPS, 1000)
    change = {"a": -0.2, "b": 0.0, "c": 0.1, "d": -0.02, "e": -0.01}
    ours = theirs + np.array([change[g] for g in label]) + rng.normal(0, 0.05, 1000)
    ours = np.clip(ours, 0, 1)
    label[:15] = "x"  # too small
    found = gate.judge(make_contents(ours, theirs, label=label), "new", 0.02)
    table = found.groups.set_index("slice")
    assert list(table.index) == ["overall", *(f"plan={g}" for g in GROUPS)]
    for name, row in table.iterrows():
        mine = [i for i in range(1000) if name in ("overall", f"plan={label[i]}")]
        mean, low, high = bounds(ours[mine], theirs[mine], 0.95, 1 - 0.05 / 6, 0.02)
        assert row["users"] == len(mine)
        assert_allclose([row["mean"], row["reference"]], [ours[mine].mean(), theirs[mine].mean()])
        assert_allclose([row["difference"], row["low"], row["high"]], [mean, low, high])
        worse, not_worse = high < -0.02, low >= -0.02
        assert row["outcome"] == ("worse" if worse else "not worse" if not_worse else "unknown")
    outcomes = table["outcome"].drop("overall").tolist()
    assert outcomes == ["worse", "not worse", "not worse", "unknown", "not worse"]
    assert found.not_judged == {"plan=x": 15}
    assert found.outcome == "worse"
    assert json.loads(json.dumps(found.record())) == {
        "metric": "NDCG@20",
        "margin": 0.02,
        "subject": "new",
        "reference": "old",
        "outcome": "worse",
        "confidence": {"low": 0.95, "high": pytest.approx(1 - 0.05 / 6)},
        "groups": found.groups.to_dict("records"),
        "min_users": 20,
        "not_judged": {"plan=x": 15},
    }
    printed = str(found)
    assert "a loss of at most 0.02 is allowed" in printed
    assert "95 % and 99.17 %" in printed
    assert "Not judged, because they have fewer than 20 test users: plan=x (15)." in printed
    below = "new is below old in NDCG@20 by more than 0.02 for"
    assert f"({below} plan=a; it is unknown whether {below} overall and plan=d)" in printed


@pytest.mark.parametrize(
    ("change", "outcome", "fails", "fails_if_unknown"),
    [
        (0.0, "not worse", False, False),
        (-0.3, "worse", True, True),
        (-0.011, "unknown", False, True),
    ],
)
def test_what_fails(change, outcome, fails, fails_if_unknown):
    rng = np.random.default_rng(0)
    theirs = rng.random(5000) / 2 + 0.4
    ours = theirs + rng.normal(change, 0.1, 5000)
    found = gate.judge(make_contents(ours, theirs), "new", 0.01)
    assert found.outcome == outcome
    assert bool(found.failure()) == fails
    assert bool(found.failure(fail_if_unknown=True)) == fails_if_unknown
    assert str(found).splitlines()[-1].startswith(f"Outcome: {outcome}")


def test_error_rates_are_the_nominal_ones():
    """The true loss of every group is the margin: an independent simulation of hits at ranks."""
    rng = np.random.default_rng(1)
    margin, users, draws = 0.02, 300, 300
    gains = np.array([1 / np.log2(1 + rank) for rank in range(1, 21)])
    share = 0.3  # of users with a hit; a hit has any rank from 1 to 20

    def metric(share):
        is_hit = rng.random(users * len(GROUPS)) < share
        return np.where(is_hit, gains[rng.integers(20, size=is_hit.size)], 0.0)

    not_worse, passes, alarms = [], 0, 0
    for _ in range(draws):
        theirs, ours = metric(share), metric(share - margin / gains.mean())
        found = gate.judge(make_contents(ours, theirs), "new", margin)
        outcomes = found.groups["outcome"]
        not_worse += (outcomes[1:] == "not worse").tolist()
        passes += not found.failure(fail_if_unknown=True)
        alarms += bool(found.failure())
    # Of a group 5 %, with a standard error of 0.6 %; all groups together pass far less often.
    assert 0.03 < np.mean(not_worse) < 0.07
    assert passes / draws < 0.01
    # A false alarm in any of the six slices: at most 5 %, with a standard error of 1.3 %.
    assert 0.005 < alarms / draws < 0.08


def test_one_group_at_the_margin_keeps_the_strict_gate_shut():
    """The other groups gain much, so they never fail; the error rate is that of the one group."""
    rng = np.random.default_rng(2)
    label = np.resize(GROUPS, 1500)
    passes = 0
    for _ in range(300):
        theirs = rng.uniform(0.3, 0.6, 1500)
        ours = theirs + rng.normal(np.where(label == "c", -0.05, 0.2), 0.15)
        found = gate.judge(make_contents(ours, theirs), "new", 0.05)
        passes += not found.failure(fail_if_unknown=True)
    assert 0.015 < passes / 300 < 0.095  # 5 %, with a standard error of 1.3 %


def test_few_users_and_no_groups():
    one = gate.judge(make_contents(np.ones(1), np.zeros(1), min_users=1), "new", 0.5)
    assert one.groups["outcome"].tolist() == ["unknown", "unknown"]
    same = np.full(600, 0.3)
    equal = gate.judge(make_contents(same, same), "new", 0.03)
    # Of 120 users none differs: the share that does is below 2.5 % (0.975^120 = 0.05).
    assert equal.outcome == "not worse"
    assert_allclose(equal.groups["low"][1], 0.05 ** (1 / 120) - 1)
    small = gate.judge(make_contents(same, same, min_users=121), "new", 0.03)
    assert small.groups["slice"].tolist() == ["overall"]
    assert len(small.not_judged) == 5
    # All users lose the same. A few of other samples may gain, so the loss must be clear.
    lost = gate.judge(make_contents(same - 0.15, same), "new", 0.04)
    assert set(lost.groups["outcome"]) == {"worse"}


@pytest.mark.parametrize("margin", [-0.01, 1, float("nan"), float("inf"), "0.1", None, True])
def test_bad_margins(margin):
    found = make_contents(np.zeros(30), np.ones(30))
    with pytest.raises(UserError, match="margin is .*: expected the loss of the metric that is"):
        gate.judge(found, "new", margin)


def test_the_reference():
    found = make_contents(np.zeros(30), np.ones(30))
    with pytest.raises(UserError, match="compares old with itself; name another row"):
        gate.judge(found, "old", 0.01)
    assert gate.only_reference(["old"]) == "old"
    with pytest.raises(UserError, match="there are 'a', 'b'; give --with=DIR"):
        gate.only_reference(["a", "b"])
    with pytest.raises(UserError, match="there is no other row; give"):
        gate.only_reference([])


def test_names_from_data_are_printable():
    label = np.array(["<b>\u202e/..", "x\ny"])[np.arange(60) % 2]
    found = gate.judge(make_contents(np.zeros(60), np.ones(60), label=label), "new", 0.01)
    for text in (str(found), found.failure()):
        assert "\u202e" not in text
        assert "x\ny" not in text
    assert "\n" not in found.failure()
    assert [row["slice"] for row in found.record()["groups"]][1:] == [
        f"plan={g}" for g in label[:2]
    ]
