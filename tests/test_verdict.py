"""The sentences of the report on tables made by hand."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from seqfair_jax.evaluation.significance import gap, slice_members
from seqfair_jax.report import contents, rows, verdict

METRIC = "NDCG@20"
SIZES = {"niche": 20, "middle": 18, "popular": 20, "tiny": 2}
ERM = {"niche": 0.2, "middle": 0.6, "popular": 0.6, "tiny": 0.0}
MARKOV = {"niche": 0.1, "middle": 0.6, "popular": 0.7, "tiny": 0.0}
POPULAR = {"niche": 0.05, "middle": 0.1, "popular": 0.1, "tiny": 0.0}


def users(means, noise=0.0, *, sizes=SIZES):
    """A per-user table: every user of a group has its mean, plus noise with mean 0."""
    groups = [group for group, size in sizes.items() for _ in range(size)]
    values = np.array([means[group] for group in groups])
    values += noise * np.where(np.arange(len(groups)) % 2, 1, -1)  # the sizes are even
    table = {"user_id": range(len(groups)), "target_item_id": 0, "repeat": False, "rank": 1}
    return pd.DataFrame(table | {METRIC: values, "tier": groups})


ONE_SEED = (
    "Trained with one seed: {}. The intervals and q are over users, and do not say what another "
    "training would give. Train with --config.seeds=0,1,2."
)


def row(name, kind, means, noise=0.0, *, validation=None, sizes=SIZES):
    table = users(means, noise, sizes=sizes)
    values = table[METRIC].to_numpy()
    found = {key: float(values[at].mean()) for key, at in slice_members(table).items()}
    made = rows.Row(name, kind, (found,), lambda: {0: table})
    if kind == rows.RUN:
        seen = validation or means
        slices = {f"tier={group}": mean for group, mean in seen.items()}
        made = made._replace(validation=({"overall": sum(seen.values())} | slices,), run=name)
    return made


def runs(**named):
    return [row(name, rows.RUN, means) for name, means in named.items()]


def baselines(sizes=SIZES):
    return [
        row("[markov]", rows.BASELINE, MARKOV, sizes=sizes),
        row("[most_popular]", rows.BASELINE, POPULAR, sizes=sizes),
    ]


def build(found, **options):
    options = {"erm": {"erm"}, "min_users": 10} | options
    return contents.of_rows(found, METRIC, ["tier"], dataset={}, **options)


def sentences(found, **options):
    made = build(found, **options)
    [told] = verdict.verdicts(made)
    return told.sentences, made


def signed(value):
    return "0.0000" if abs(value) < 5e-5 else f"{value:+.4f}"


def effect(made, name, where):
    """A test as the sentences show it."""
    tests = made.tests.set_index(["name", "slice"])
    found = tests.loc[(name, where)]
    q = "below 0.001" if found["q"] < 0.001 else f"{found['q']:.3f}"
    return (
        f"difference {signed(found['difference'])}, 95 % interval {signed(found['low'])} to "
        f"{signed(found['high'])}, q {q}"
    )


def worst(means, group, name):
    """The sentence on the group that is served worst."""
    table = users(means)
    values, tiers = table[METRIC].to_numpy(), table["tier"].to_numpy()
    others = values[(tiers != group) & (tiers != "tiny")]  # tiny is not judged
    found = gap(values[tiers == group], others, confidence=1 - 0.05 / 3)
    return (
        f"With {name}, group {group} is served worst: NDCG@20 is {means[group]:.4f} for its "
        f"{SIZES[group]} test users and {others.mean():.4f} for the users of the other judged "
        f"groups, "
        f"difference {found.difference:+.4f}, 95 % interval {found.low:+.4f} to {found.high:+.4f}."
    )


def test_groups_of_few_validation_users_choose_no_method():
    """The test has enough users of popular, but a few of them validate."""
    validation = {"gdro": ERM | {"popular": 0.1}, "cvar": ERM | {"niche": 0.15}}
    found = [*runs(erm=ERM), *(row(name, rows.RUN, ERM, validation=seen)
                               for name, seen in validation.items())]  # fmt: skip
    assert build(found).chosen == {"tier": "cvar"}
    few = {"tier=niche": 20, "tier=middle": 18, "tier=popular": 3, "tier=tiny": 0}
    assert build(found, validation_sizes=few).chosen == {"tier": "gdro"}


def test_one_group_far_above_does_not_make_the_lowest_the_worst():
    """The lowest is below the other users taken together, and equal to one of the groups."""
    close = {"niche": 0.2, "middle": 0.21, "popular": 0.6, "tiny": 0.0}
    told, _ = sentences([row("erm", rows.RUN, close, noise=0.05)])
    assert told[0].startswith(
        "With erm, group niche has the lowest NDCG@20, but no difference from middle was found: "
        "NDCG@20 is 0.2000 for its 20 test users and "
    )
    apart = close | {"middle": 0.4}
    told, _ = sentences([row("erm", rows.RUN, apart, noise=0.05)])
    assert told[0].startswith("With erm, group niche is served worst: ")


def test_the_worst_group_is_compared_with_the_users_of_judged_groups():
    """Groups that are too small would put the rest below the group with the lowest mean."""
    sizes = {"a": 24, "b": 30, "unknown": 22, "x": 9, "y": 9}
    means = {"a": 0.3, "b": 0.35, "unknown": 0.4, "x": 0.01, "y": 0.01}
    told, _ = sentences([row("erm", rows.RUN, means, 0.01, sizes=sizes)])
    table = users(means, 0.01, sizes=sizes)
    sides = [table[METRIC][table["tier"].isin(of)] for of in (["a"], ["b", "unknown"])]
    # Welch's interval. The lowest is the lowest of three: a confidence of 1 - 0.05 / 3.
    ends = stats.ttest_ind(*sides, equal_var=False).confidence_interval(1 - 0.05 / 3)
    assert told[0] == (
        "With erm, group a is served worst: NDCG@20 is 0.3000 for its 24 test users and "
        f"{sides[1].mean():.4f} for the users of the other judged groups, difference "
        f"{sides[0].mean() - sides[1].mean():+.4f}, 95 % interval {ends.low:+.4f} to "
        f"{ends.high:+.4f}."
    )
    # All users are in judged groups.
    known = {name: sizes[name] for name in ("a", "b", "unknown")}
    told, _ = sentences([row("erm", rows.RUN, means, 0.01, sizes=known)])
    assert f"test users and {sides[1].mean():.4f} for the other users, difference -0.0" in told[0]
    # Users who are in no group are no other users either.
    loose = row("erm", rows.RUN, means, 0.01, sizes=known)
    table = users(means, 0.01, sizes=known).replace({"tier": {"unknown": None}})
    found = {k: v for k, v in loose.means[0].items() if k != "tier=unknown"}
    told, _ = sentences([loose._replace(means=(found,), per_user=lambda: {0: table})])
    assert "0.3500 for the users of the other judged groups, difference -0.0500" in told[0]
    # A user may be in several groups: whoever is in the worst one is not among the others.
    both = users(means, 0.01, sizes=known)
    both["tier"] = [["a", "b"] if tier == "b" and i % 3 == 0 else [tier]
                    for i, tier in enumerate(both["tier"])]  # fmt: skip
    values = {
        tier: both[METRIC][[tier in groups for groups in both["tier"]]].mean() for tier in known
    }
    found = {"overall": 0.35} | {f"tier={tier}": mean for tier, mean in values.items()}
    told, _ = sentences([loose._replace(means=(found,), per_user=lambda: {0: both})])
    rest = both[METRIC][["a" not in groups for groups in both["tier"]]].mean()
    assert f"for its 34 test users and {rest:.4f} for the other users, difference " in told[0]


def test_a_method_that_helps_the_worst_and_costs_others():
    gdro = {"niche": 0.36, "middle": 0.6, "popular": 0.55, "tiny": 0.9}
    told, made = sentences([*runs(erm=ERM, gdro=gdro), *baselines()])
    assert told == [
        worst(ERM, "niche", "erm"),
        "Not judged, because they have fewer than 10 test users: tiny (2).",
        f"gdro raises NDCG@20 for all users from 0.4467 (erm) to 0.5133, "
        f"{effect(made, 'gdro', 'overall')}.",
        "gdro raises NDCG@20 for niche from 0.2000 (erm) to 0.3600, difference +0.1600, 95 % "
        "interval +0.1600 to +0.1600, q below 0.001.",
        "gdro lowers NDCG@20 for popular (-0.0500, 95 % interval -0.0500 to -0.0500).",
        "gdro is compared with the baseline without training that is best for each group. It is "
        f"better for all users ([markov], {overall(made)}) and niche ([markov], +0.2600, 95 % "
        "interval +0.2600 to +0.2600). It is worse for popular ([markov], -0.1500, 95 % interval "
        "-0.1500 to -0.1500). No difference was found for middle ([markov], 0.0000).",
    ]
    assert made.reference == "erm"
    assert made.subjects == {"tier": ["gdro"]}


def overall(made):
    found = made.baseline_tests["gdro"].set_index(["name", "slice"]).loc[("[markov]", "overall")]
    return f"{found['difference']:+.4f}, 95 % interval {found['low']:+.4f} to {found['high']:+.4f}"


def test_no_difference_is_said_with_its_figures():
    same = dict.fromkeys(SIZES, 0.4)
    found = [
        row("erm", rows.RUN, same, 0.1),
        row("cvar", rows.RUN, same | {"middle": 0.405}, -0.1),
    ]
    told, made = sentences(found)
    assert told[0].startswith(
        "With erm, group middle has the lowest NDCG@20, but no difference from the other judged "
        "groups was found: NDCG@20 is 0.4000 for its 18 test users and 0.4000 for the users of the "
        "other judged groups, difference "
    )
    assert told[2:] == [
        f"For all users, no difference between cvar and erm was found: "
        f"{effect(made, 'cvar', 'overall')}.",
        f"For middle, no difference between cvar and erm was found: "
        f"{effect(made, 'cvar', 'tier=middle')}.",
        "For the other groups of tier, no loss from cvar was found.",
    ]
    assert not any("equal" in sentence for sentence in told)


def test_without_erm_the_reference_is_the_best_baseline():
    gdro = {"niche": 0.3, "middle": 0.6, "popular": 0.7, "tiny": 0.0}
    told, made = sentences([*runs(gdro=gdro), *baselines()])
    assert made.reference == "[markov]"
    assert told[0] == worst(gdro, "niche", "gdro")
    assert told[3] == (
        "gdro raises NDCG@20 for niche from 0.1000 ([markov]) to 0.3000, difference +0.2000, 95 % "
        "interval +0.2000 to +0.2000, q below 0.001."
    )
    assert verdict.notes(made) == [
        "There is no ERM run. The methods are compared with [markov], the best baseline without "
        "training.",
        ONE_SEED.format("each method"),
    ]


def test_of_several_rows_of_erm_validation_chooses_the_reference():
    low, high = ERM | {"niche": 0.1}, ERM | {"niche": 0.3}
    found = [row("small", rows.RUN, high, validation=low), row("large", rows.RUN, low,
             validation=high), *baselines()]  # fmt: skip
    both = {"small", "large"}
    _, made = sentences(found, erm=both)
    assert made.reference == "large"
    assert verdict.notes(made) == [
        "There are 2 rows of ERM. All other rows are compared with large, which has the highest "
        "NDCG@20 over all users in validation. `seqfair report --baseline=DIR` names another.",
        ONE_SEED.format("each method"),
    ]
    second = row("small, best worst group", rows.RUN, low)._replace(run="small")
    assert "There are 3 rows of ERM." in verdict.notes(build([*found, second], erm=both))[0]
    assert verdict.notes(build(found, erm=both, named="small")) == [ONE_SEED.format("each method")]
    by_name = build(found, erm=both, named="[most_popular]")  # which is not the best baseline
    assert verdict.notes(by_name) == [ONE_SEED.format("each method")]
    twice = found[0]._replace(means=found[0].means * 2)
    assert verdict.notes(build([twice, *found[1:]], erm={"large"})) == [ONE_SEED.format("large")]
    assert verdict.notes(build([found[0], *baselines()], erm={"small"})) == []  # no other method


def test_one_run_is_compared_with_the_baselines():
    told, made = sentences([*runs(erm=ERM), *baselines()])
    assert told[2] == "There is no other run to compare erm with."
    assert told[3].startswith(
        "erm is compared with the baseline without training that is best for "
    )
    assert "better for niche ([markov], +0.1000, 95 % interval +0.1000 to +0.1000)" in told[3]
    assert len(told) == 4
    assert made.chosen == {}


def test_the_method_is_chosen_in_validation_and_not_in_the_test():
    better = ERM | {"niche": 0.5}
    found = [
        *runs(erm=ERM),
        row("a", rows.RUN, better, validation=ERM | {"niche": 0.1}),
        row("b", rows.RUN, ERM, validation=ERM | {"niche": 0.4}),
        # Of a group that is too small no figure counts.
        row("c", rows.RUN, better, validation=ERM | {"niche": 0.3, "tiny": 1.0}),
    ]
    told, made = sentences(found)
    assert made.chosen == {"tier": "b"}
    assert told[2] == (
        "The next sentences are about b. Of the 3 rows other than erm, it has the highest NDCG@20 "
        "for its worst group in validation."
    )


def test_groups_that_cannot_be_judged():
    told, made = sentences([*runs(erm=ERM, cvar=ERM), *baselines()], min_users=100)
    assert told[0] == "No group has at least 100 test users, so none is judged."
    table = made.table("tier")
    assert table["tier/min"].isna().all()
    sizes = {"niche": 20, "tiny": 2}
    found = [row(name, rows.RUN, ERM, sizes=sizes) for name in ("erm", "cvar")]
    told, made = sentences(found)
    assert (
        told[0] == "Only group niche has at least 10 test users, so no group can be called worst."
    )
    assert told[1] == "Not judged, because they have fewer than 10 test users: tiny (2)."


def test_the_worst_ignores_groups_that_are_too_small():
    made = build([*runs(erm=ERM), *baselines()])
    table = made.table("tier").set_index("name")
    assert table.loc["erm", "tier/min"] == pytest.approx(0.2)  # tiny has 0
    assert made.sizes == {"overall": 60, "tier=middle": 18, "tier=niche": 20,
                          "tier=popular": 20, "tier=tiny": 2, "target=new": 60}  # fmt: skip


def test_a_list_of_another_system_is_a_row_like_others():
    lists = row("old system", rows.LIST, ERM | {"niche": 0.25})
    told, made = sentences([*runs(erm=ERM), lists, *baselines()])
    assert (
        "old system is above erm for niche: NDCG@20 is 0.2500 against 0.2000, difference +0.0500, "
        "95 % interval +0.0500 to +0.0500, q below 0.001."
    ) in told
    assert "old system was not found to be below erm for the other groups of tier." in told
    assert made.tests["name"].unique().tolist() == ["old system", "[markov]", "[most_popular]"]


def test_a_list_has_no_effect_on_a_method():
    lists = row("old system", rows.LIST, {"niche": 0.1, "middle": 0.5, "popular": 0.7, "tiny": 0.0})
    told, _ = sentences([*runs(erm=ERM), lists])
    assert (
        "old system is below erm for niche: NDCG@20 is 0.1000 against 0.2000, difference -0.1000, "
        "95 % interval -0.1000 to -0.1000, q below 0.001."
    ) in told
    assert (
        "old system is above erm for popular (+0.1000, 95 % interval +0.1000 to +0.1000)." in told
    )
    assert "old system is below erm for middle (-0.1000, 95 % interval -0.1000 to -0.1000)." in told
    told, _ = sentences([*runs(erm=ERM), lists], named="old system")
    assert (
        "erm is below old system for popular (-0.1000, 95 % interval -0.1000 to -0.1000)." in told
    )
    assert not [sentence for sentence in told if "raises" in sentence or "lowers" in sentence]


def test_the_verdict_of_an_audit_is_about_each_list_that_is_not_the_baseline():
    flat = dict.fromkeys(SIZES, 0.4)
    lists = {"old": ERM, "new": flat | {"popular": 0.3}, "b": flat, "c": flat, "d": flat, "e": flat}
    found = [row(name, rows.LIST, means, 0.01) for name, means in lists.items()]
    two = [*found[:2], *baselines()]
    told, made = sentences(two, erm=set(), named="old")
    assert made.subjects == {"tier": ["new"]}
    assert told[0].startswith("With new, group popular is served worst: NDCG@20 is 0.3000 for its")
    assert told[1].startswith("Not judged, because")
    assert told[2].startswith("new is below old for all users: NDCG@20 is 0.3667 against 0.4467, ")
    assert told[3].startswith("new is below old for popular: NDCG@20 is 0.3000 against 0.6000, ")
    assert told[-1].startswith("new is compared with the baseline without training that is best")
    assert not any(sentence.startswith("With old") for sentence in told)
    # Without a named row all lists are audited.
    told, made = sentences(two, erm=set())
    assert made.subjects == {"tier": ["old", "new"]}
    starts = [" ".join(one.split()[:5]) for one in told if one.startswith("With")]
    assert starts == ["With old, group niche is", "With new, group popular is"]
    assert sum(sentence.startswith("Not judged") for sentence in told) == 1
    told, made = sentences(found, erm=set(), named="old")
    assert made.subjects == {"tier": ["new", "b", "c", "d", "e"]}
    assert sum(sentence.startswith("With ") for sentence in told) == 4
    assert told[-1] == "The figures and tests of e are only in the tables."
    # Beside an audited list, a run is audited too.
    told, made = sentences([*runs(erm=ERM), *found[:2]], named="old")
    assert made.subjects == {"tier": ["erm", "new"]}
    assert told[0].startswith("With erm, group niche is served worst")


def test_of_a_baseline_that_is_the_reference_there_is_one_conclusion():
    """Its q as the reference and as a baseline differ: each is over other tests."""
    conclusions = set()
    for shift in np.linspace(0, 0.15, 31):
        means = {group: mean + shift for group, mean in MARKOV.items()}
        lists = row("old system", rows.LIST, means, noise=0.2)
        told, made = sentences([lists, *baselines()], erm=set())
        assert made.reference == "[markov]"
        text = " ".join(told)
        is_found = "old system is above [markov] for all users" in text
        assert is_found != ("For all users, no difference between old system and" in text)
        better, _, rest = text.partition("No difference was found for")
        assert ("It is better for all users ([markov]," in better) == is_found
        assert ("all users ([markov]," in rest) != is_found
        tests = made.baseline_tests["old system"].set_index(["name", "slice"])
        conclusions.add((is_found, bool(tests.star["[markov]", "overall"])))
    assert {(True, True), (False, False)} < conclusions  # and one where the two q disagree


def test_q_is_over_the_methods_and_apart_over_the_baselines():
    rng = np.random.default_rng(0)
    found = runs(erm=ERM, a=ERM, b=ERM) + baselines()
    noisy = []
    for one in found:
        table = next(iter(one.per_user().values()))
        table = table.assign(**{METRIC: table[METRIC] + rng.normal(0, 0.1, len(table))})
        noisy.append(one._replace(per_user=lambda table=table: {0: table}))
    made = build(noisy)
    for kind in (rows.RUN, rows.BASELINE):
        tests = made.tests[made.tests["kind"] == kind]
        # Two rows, and overall and four groups: the only kind of targets is not another slice.
        assert len(tests) == 2 * 5
        # The group of two users is too small to be judged, and is no test of those that q is over.
        small = tests["slice"] == "tier=tiny"
        assert tests.loc[small, "q"].isna().all()
        tests = tests[~small]
        p = tests["p"].to_numpy()
        expected = [min(min(1, x * len(p) / (p <= x).sum()) for x in p[p >= own]) for own in p]
        assert tests["q"].to_numpy() == pytest.approx(expected)
        assert (tests["star"] == (tests["q"] < 0.05)).all()


def test_rows_that_cannot_be_compared():
    found = runs(erm=ERM, cvar=ERM)
    other = next(iter(found[1].per_user().values())).assign(target_item_id=1)
    found[1] = found[1]._replace(per_user=lambda: {0: other})
    told, made = sentences(found)
    assert told == [
        worst(ERM, "niche", "erm"),
        "Not judged, because they have fewer than 10 test users: tiny (2).",
    ]
    [note] = verdict.notes(made)
    assert note.startswith("No tests were made. cvar: target_item_id of user 0 is not the baseline")


@pytest.mark.parametrize(
    ("label", "shown"),
    [("18-24", "18-24"), ("niche*short", "niche*short"), ("a, b", "'a, b'"), ("*", "'*'"),
     ("=1", "'=1'")],
)  # fmt: skip
def test_a_group_s_name_that_is_no_word_is_quoted(label, shown):
    means = {label: 0.2, "other": 0.6}
    told, _ = sentences([row("erm", rows.RUN, means, 0.05, sizes=dict.fromkeys(means, 20))])
    assert told[0].startswith(f"With erm, group {shown} ")


def test_all_users_are_told_once_for_several_families():
    found = []
    for one in [*runs(erm=ERM, cvar=ERM), *baselines()]:
        table = next(iter(one.per_user().values()))
        table = table.assign(other=table["tier"])
        means = tuple(m | {f"other={g}": m[f"tier={g}"] for g in SIZES} for m in one.means)
        found.append(one._replace(per_user=lambda table=table: {0: table}, means=means))
    made = contents.of_rows(found, METRIC, ["tier", "other"], dataset={}, min_users=10, erm={"erm"})
    first, second = (told.sentences for told in verdict.verdicts(made))
    assert sum("For all users" in sentence for sentence in first) == 1
    assert not any("For all users" in sentence for sentence in second)


def seeds(name, shifts):
    """A row with the figures of several seeds, which differ by a constant."""
    one = row(name, rows.RUN, ERM)
    tables = {seed: next(iter(one.per_user().values())) for seed in shifts}
    shifted = {seed: t.assign(**{METRIC: t[METRIC] + shifts[seed]}) for seed, t in tables.items()}
    means = tuple({k: v + shift for k, v in one.means[0].items()} for shift in shifts.values())
    return one._replace(means=means, per_user=lambda: shifted, seeds=tuple(shifts))


def test_what_the_seeds_say_stands_behind_a_difference():
    erm, steady, shaky = (
        seeds("erm", {0: 0.0, 1: 0.1}),
        seeds("steady", {0: 0.1, 1: 0.201}),
        seeds("shaky", {1: 0.1, 0: 0.2}),
    )
    # Of two seeds, half of the interval is 12.706 times half of their distance.
    told, _ = sentences([erm, steady])
    assert told[2].endswith(", q below 0.001. Over 2 seeds: +0.1005 ± 0.0064.")
    told, _ = sentences([erm, shaky])
    assert told[2].endswith(
        ", q below 0.001. Over 2 seeds: +0.1000 ± 1.2706, so it may not be found with other seeds."
    )
    told, _ = sentences([erm, shaky._replace(seeds=(2, 3))])
    assert not any("seeds" in sentence for sentence in told)
