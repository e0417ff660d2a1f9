import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose
from scipy import stats

from seqfair_jax.data.groups import RESERVED_NAMES, encode_name
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import significance
from seqfair_jax.evaluation.significance import FEWEST_VALUES, compare, describe, gap


def per_user(values, *, groups=None):
    n = len(values)
    return pd.DataFrame(
        {
            "user_id": [f"u{i}" for i in range(n)],
            "target_item_id": np.arange(n),
            "repeat": np.arange(n) % 2 == 0,
            "rank": 1,
            "NDCG@20": np.asarray(values, float),
            "pop33": groups or ["niche", "popular", "popular"] * (n // 3),
        }
    )


def draw(n=30, seed=0):
    rng = np.random.default_rng(seed)
    before = rng.random(n)
    return before, before + rng.normal(0.05, 0.2, n)


def test_p_values_and_effects_are_scipys_in_every_slice():
    before, after = draw()
    result = compare({"cvar": {0: per_user(after)}}, {0: per_user(before)}, "NDCG@20")
    result = result.set_index("slice")
    assert list(result.index) == [
        "overall",
        "target=repeat",
        "target=new",
        "pop33=niche",
        "pop33=popular",
    ]
    niche = np.arange(30) % 3 == 0
    for name, members in {"overall": niche | True, "pop33=niche": niche}.items():
        row = result.loc[name]
        assert row["users"] == members.sum()
        assert_allclose(row["difference"], (after - before)[members].mean())
        assert_allclose(row["p"], stats.ttest_rel(after[members], before[members]).pvalue)
        assert row["star"] == (row["p"] < 0.05)
        assert row["low"] < row["difference"] < row["high"]
        # By the normal approximation the interval is the mean and 1.96 standard errors.
        error = (after - before)[members].std(ddof=1) / members.sum() ** 0.5
        assert_allclose(row["high"] - row["low"], 2 * 1.96 * error, rtol=0.25)


def test_targets_of_one_kind_are_not_tested_twice():
    before, after = draw()
    for repeat in (True, False):
        tables = [per_user(values).assign(repeat=repeat) for values in (after, before)]
        result = compare({"cvar": {0: tables[0]}}, {0: tables[1]}, "NDCG@20")
        assert list(result["slice"]) == ["overall", "pop33=niche", "pop33=popular"]


def test_benjamini_hochberg_by_hand():
    before, after = draw()
    result = compare(
        {"a": {0: per_user(after)}, "b": {0: per_user(before)}}, {0: per_user(before)}, "NDCG@20"
    )
    p = result["p"].to_numpy()
    order = np.argsort(p)
    expected = np.empty(len(p))
    smallest = 1.0
    for rank in range(len(p), 0, -1):
        i = order[rank - 1]
        smallest = min(smallest, p[i] * len(p) / rank)
        expected[i] = smallest
    assert_allclose(result["q"], expected)
    same = result[result["name"] == "b"]
    assert (same["p"] == 1).all()
    assert not same["star"].any()


def test_users_are_aligned_by_id_and_averaged_over_seeds():
    before, after = draw()
    shuffled = per_user(after).sample(frac=1, random_state=0)
    plain = compare({"a": {0: per_user(after)}}, {0: per_user(before)}, "NDCG@20")
    pd.testing.assert_frame_equal(
        compare({"a": {0: shuffled}}, {0: per_user(before)}, "NDCG@20"), plain
    )
    back = compare({"a": {0: per_user(before)}}, {0: shuffled}, "NDCG@20")
    assert_allclose(back["difference"], -plain["difference"])
    seeds = {3: per_user(after), 4: per_user(after + 0.2)}
    two = compare({"a": seeds}, {0: per_user(before)}, "NDCG@20")
    assert_allclose(two["difference"], plain["difference"] + 0.1)


def test_a_single_seed_is_compared_with_its_own():
    before, after = draw()
    plain = compare({"a": {0: per_user(after)}}, {0: per_user(before)}, "NDCG@20")
    many = {0: per_user(before), 1: per_user(before + 1), 2: per_user(before - 3)}
    pd.testing.assert_frame_equal(compare({"a": {0: per_user(after)}}, many, "NDCG@20"), plain)
    both = compare({"a": {1: per_user(after), 2: per_user(after)}}, many, "NDCG@20")
    assert_allclose(both["difference"], plain["difference"] + 1)


def test_overlapping_groups_count_a_user_in_each():
    groups = [["a", "b"], ["b"], ["a"]]
    result = compare(
        {"x": {0: per_user([1, 0, 0], groups=groups)}},
        {0: per_user([0, 0, 0], groups=groups)},
        "NDCG@20",
    ).set_index("slice")
    assert result.loc["pop33=a", "users"] == result.loc["pop33=b", "users"] == 2
    assert result.loc["pop33=a", "difference"] == 0.5


def test_equal_differences_have_the_p_of_a_sign_test():
    before = np.zeros(9)
    after = {"up": before + 0.1, "same": before}
    table = compare(
        {name: {0: per_user(values)} for name, values in after.items()},
        {0: per_user(before)},
        "NDCG@20",
    ).set_index(["name", "slice"])
    assert table.loc[("up", "overall"), "p"] == 2 * 0.5**9  # all 9 up, or all down
    assert table.loc[("same", "overall"), "p"] == 1
    # Differences that are equal but for rounding, which a t-test would divide by.
    before = np.linspace(0, 1, 9)
    assert 0 < np.ptp(before + 0.1 - before) < 1e-15
    rounded = compare({"up": {0: per_user(before + 0.1)}}, {0: per_user(before)}, "NDCG@20")
    assert rounded["p"][0] == 2 * 0.5**9


def test_a_mean_of_few_hits_has_no_interval():
    """Where no user has a hit, an interval would be sure that the mean is 0."""
    values = np.zeros(30)
    for hits in (0, FEWEST_VALUES - 1, FEWEST_VALUES):
        values[:hits] = 0.5
        row = describe(per_user(values), "NDCG@20").loc["overall"]
        assert row["mean"] == hits / 60
        assert np.isnan([row["low"], row["high"]]).tolist() == [hits < FEWEST_VALUES] * 2


def test_a_group_of_one_user_has_no_test():
    groups = ["one", "many", "many", "many"]
    result = compare(
        {"x": {0: per_user([1, 0, 1, 0], groups=groups)}},
        {0: per_user([0, 1, 0, 0.5], groups=groups)},
        "NDCG@20",
    ).set_index("slice")
    assert np.isnan(result.loc["pop33=one", ["low", "high", "p", "q"]].astype(float)).all()
    assert not result.loc["pop33=one", "star"]


def test_users_in_no_group_are_in_no_slice(tmp_path):
    before, after = draw(3)
    for missing in (None, np.nan):
        groups = ["old", missing, "young"]
        tables = [per_user(values, groups=groups) for values in (after, before)]
        for table in tables:  # Parquet gives back another kind of missing
            table.to_parquet(tmp_path / "t.parquet")
        stored = pd.read_parquet(tmp_path / "t.parquet")
        result = compare({"a": {0: tables[0]}}, {0: stored}, "NDCG@20").set_index("slice")
        assert [name for name in result.index if "pop33" in name] == ["pop33=old", "pop33=young"]
        assert (result.loc[["pop33=old", "pop33=young"], "users"] == 1).all()
    others = per_user(after, groups=["old", "old", "young"])
    with pytest.raises(UserError, match="pop33 of user u1 is not the baseline's"):
        compare({"a": {0: others}}, {0: stored}, "NDCG@20")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.iloc[1:], "1 of the baseline's 30 users are not in its test and 0 others"),
        (lambda t: t.assign(target_item_id=7), "target_item_id of user u0 is not the baseline's"),
        (lambda t: t.assign(pop33="niche"), "pop33 of user u1 is not .* 20 users differ"),
        (lambda t: t.drop(columns="pop33"), "it was not evaluated by pop33"),
        (lambda t: t.drop(columns="NDCG@20"), "no column 'NDCG@20'"),
    ],
)
def test_tables_of_other_users_targets_or_groups_are_refused(change, message):
    before, after = draw()
    with pytest.raises(UserError, match=message):
        compare({"a": {0: change(per_user(after))}}, {0: per_user(before)}, "NDCG@20")


def test_an_interval_does_not_depend_on_what_else_is_compared():
    before, after = draw()
    tables = {"a": {0: per_user(after)}, "b": {0: per_user(after**2)}, "c": {0: per_user(before)}}
    baseline = {0: per_user(before)}

    def intervals(names):
        result = compare({name: tables[name] for name in names}, baseline, "NDCG@20")
        return result.set_index(["name", "slice"])[["low", "high"]].loc["b"]

    alone = intervals("b")
    assert (alone["low"] < alone["high"]).all()
    for names in ("ab", "ba", "cab"):
        pd.testing.assert_frame_equal(intervals(names), alone)
    # Nor on which slices there are.
    fewer = compare(
        {"b": {0: tables["b"][0].drop(columns="pop33")}},
        {0: baseline[0].drop(columns="pop33")},
        "NDCG@20",
    ).set_index("slice")
    pd.testing.assert_frame_equal(fewer[["low", "high"]], alone.loc[fewer.index])


def test_families_with_the_names_of_columns_are_families():
    before, after = draw()
    names = [encode_name(name) for name in (*RESERVED_NAMES, "R&D", "a*b", "x@20")]
    groups = ["niche", "popular", "popular"] * 10
    lists = [["niche"], ["popular", "niche"], []] * 10
    tables = [
        per_user(values)[["user_id", "target_item_id", "repeat", "rank", "NDCG@20"]]
        .assign(**dict.fromkeys(names, groups))
        .assign(many=lists)
        for values in (after, before)
    ]
    result = compare({"a": {0: tables[0]}}, {0: tables[1]}, "NDCG@20").set_index("slice")
    assert list(result.index) == [
        "overall", "target=repeat", "target=new",
        *(f"{name}={group}" for name in names for group in ("niche", "popular")),
        "many=niche", "many=popular",
    ]  # fmt: skip
    assert result.loc["%74arget=niche", "users"] == 10
    assert result.loc["many=niche", "users"] == 20
    others = tables[0].assign(**{"R%26D": "niche"})
    with pytest.raises(UserError, match="a: R&D of user u1 is not the baseline's"):
        compare({"a": {0: others}}, {0: tables[1]}, "NDCG@20")


def test_the_gap_between_two_groups_is_welchs():
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 30), rng.normal(1, 3, 40)
    found = gap(a, b, confidence=0.99)
    interval = stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.99)
    assert_allclose(found, [a.mean() - b.mean(), *interval])
    assert gap(np.full(10, 2.0), np.ones(10)) == (1, 1, 1)


def test_a_gap_between_groups_of_few_hits_has_no_interval():
    """Welch's interval of 20 users without a hit excludes 0, which is no evidence."""
    others = np.repeat([0.0, 1.0], [450, 50])
    for few in (np.zeros(20), np.repeat([0.0, 1.0], [31, 9]), np.ones(1)):
        for sides in ((few, others), (others, few)):
            found = gap(*sides)
            assert found.difference == pytest.approx(sides[0].mean() - sides[1].mean())
            assert np.isnan(found[1:]).all()
    assert np.isfinite(gap(np.repeat([0.0, 1.0], [30, 10]), others)).all()


def test_the_gap_of_equal_small_groups_seldom_excludes_zero():
    rng = np.random.default_rng(0)
    draws = (rng.random((2000, 540)) < 0.1).astype(float)
    wrong = [gap(one[:40], one[40:], confidence=0.975).high < 0 for one in draws]
    assert np.mean(wrong) <= 0.0125


def test_the_interval_is_that_of_the_test():
    before, after = draw(60)
    after[:25] = before[:25]
    found = compare({"a": {0: per_user(after)}}, {0: per_user(before)}, "NDCG@20")
    t = stats.ttest_1samp(after - before, 0)
    overall = found.set_index("slice").loc["overall"]
    assert_allclose(overall[["low", "high"]].astype(float), t.confidence_interval())
    assert_allclose(overall["p"], t.pvalue)
    own = describe(per_user(after), "NDCG@20").loc["overall"]
    assert_allclose(own[["low", "high"]], stats.ttest_1samp(after, 0).confidence_interval())


@pytest.mark.parametrize("changed", [0, FEWEST_VALUES - 1, FEWEST_VALUES])
def test_a_difference_of_few_users_has_no_interval(changed):
    """The mean of so few changes is far from normal, and most samples have none of them."""
    before, after = draw(201)
    after[changed:] = before[changed:]
    found = compare({"a": {0: per_user(after)}}, {0: per_user(before)}, "NDCG@20")
    row = found.set_index("slice").loc["overall"]
    assert np.isnan([row["low"], row["high"]]).tolist() == [changed < FEWEST_VALUES] * 2
    assert row["difference"] == pytest.approx((after - before).mean())


def test_groups_as_categories_are_those_of_their_names():
    before, after = draw()
    groups = ["niche", None, "popular"] * 10
    plain = [per_user(values, groups=groups) for values in (after, before)]
    expected = compare({"a": {0: plain[0]}}, {0: plain[1]}, "NDCG@20")
    assert expected["slice"].tolist()[-2:] == ["pop33=niche", "pop33=popular"]
    # Parquet numbers the names in the order of each file, and may know names that nobody has.
    orders = (["popular", "niche"], ["none", "niche", "popular"])
    made = [
        table.assign(pop33=pd.Categorical(table["pop33"], order))
        for table, order in zip(plain, orders, strict=True)
    ]
    pd.testing.assert_frame_equal(compare({"a": {0: made[0]}}, {0: made[1]}, "NDCG@20"), expected)
    shuffled = made[0].sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(compare({"a": {0: shuffled}}, {0: made[1]}, "NDCG@20"), expected)
    for user, other in ((1, "niche"), (2, None), (3, "none")):
        bad = plain[0]["pop33"].tolist()
        bad[user] = other
        wrong = plain[0].assign(pop33=pd.Categorical(bad))
        with pytest.raises(UserError, match=f"pop33 of user u{user} is not the baseline's"):
            compare({"a": {0: wrong}}, {0: made[1]}, "NDCG@20")


def test_where_columns_of_lists_differ():
    rows = [  # as Python makes them, and as Parquet gives them back
        (["a", "b"], np.array(["a", "b"], object), False),
        (["a", "b"], np.array(["b", "a"], object), True),
        (["a"], "a", False),
        (["a", "b"], "a", True),
        ([], None, False),
        (np.array([], object), np.nan, False),
        ([], ["a"], True),
        ([True, False], np.array([True, False]), False),
        ([7, 8], [7, 9], True),
    ]
    a, b, expected = zip(*rows, strict=True)
    found = significance._differ(pd.Series(a, dtype=object), pd.Series(b, dtype=object))
    assert found.tolist() == list(expected)
