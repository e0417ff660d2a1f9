import numpy as np
import pytest

from seqfair_jax.data.groups import GroupFamily, encode_name
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices


def family(name, groups, membership):
    return GroupFamily(name, groups, np.array(membership, bool))


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("overall", ("", "", "")),
        ("pop33=niche", ("pop33", "niche", "")),
        ("pop33=a=b/min", ("pop33", "a=b/min", "")),
        ("pop33/gap", ("pop33", "", "gap")),
        ("target=new", ("target", "new", "")),
        ("pop33*seq33=niche*short", ("pop33*seq33", "niche*short", "")),
    ],
)
def test_the_parts_of_a_name(name, parts):
    assert slices.parse(name) == parts


def test_families_and_their_groups():
    names = ["overall", "b=x", "b=y", "b/min", "%74arget=new", "a*b=x*y", "target=new"]
    assert slices.families_in(names) == ["b", "%74arget", "a*b"]
    assert slices.groups_in(names, "b") == ["b=x", "b=y"]
    assert slices.groups_in(names, "target") == ["target=new"]
    assert [name for name in names if slices.is_shown(name, ["b"])] == [
        "overall", "b=x", "b=y", "b/min", "target=new"
    ]  # fmt: skip


def test_labels_show_the_family_where_two_slices_share_a_group():
    names = ["tenure=new", "tenure=old", "overall", "tenure/min", "target=repeat", "target=new"]
    assert slices.labels(names) == [
        "tenure=new", "old", "overall", "worst", "repeat", "target=new",
    ]  # fmt: skip
    names = ["tier=overall", "tier=worst", "overall", "tier/min"]
    assert slices.labels(names) == ["tier=overall", "tier=worst", "overall", "tier/worst"]


def test_labels_are_as_the_user_wrote_them():
    assert slices.full_label(f"{encode_name('R&D')}=a%2Ab") == "R&D=a%2Ab"  # the group's own text
    assert slices.full_label(f"{encode_name('a*b')}/min") == "a*b/worst"
    assert slices.label("pop33*x=niche*a%2Ab") == "niche×a*b"  # encoded in a product
    assert slices.label("pop33&x=x:a%3Ab") == "x:a:b"
    assert slices.label("x=two\nlines\x07") == r"two\nlines\x07"
    assert slices.family_label(encode_name("two\nlines")) == r"two\nlines"


def test_means_by_hand():
    value = np.array([1.0, 0.5, 0.0, 0.25])
    groups = family("f", ("a", "b", "none"), [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]])
    means = slices.slice_means({"NDCG@20": value}, [groups], min_users=1)["NDCG@20"]
    assert means == {
        "overall": 0.4375, "f=a": 0.75, "f=b": 0.25, "f=none": None,
        "f/min": 0.25, "f/max": 0.75, "f/gap": 0.5,
    }  # fmt: skip
    assert slices.worst_group(means, groups, min_users=1) == 0.25
    assert slices.judged_groups(groups, min_users=2) == ["a", "b"]
    with pytest.raises(UserError, match="no group of f has select.min_users=3 .*: a 2, b 2, n"):
        slices.judged_groups(groups, min_users=3)


def test_the_extremes_are_over_groups_that_are_large_enough():
    rng = np.random.default_rng(4)
    sizes = {"a": 9, "b": 5, "c": 4, "one": 1, "none": 0}
    member = np.repeat(np.arange(5), list(sizes.values()))
    groups = family("f", tuple(sizes), member[:, None] == np.arange(5))
    value = rng.random(len(member))
    value[member == 3] = 1.0  # the group of one user
    for min_users, judged in ((1, "a b c one"), (4, "a b c"), (5, "a b"), (6, "a"), (10, "")):
        means = slices.slice_means({"m": value}, [groups], min_users=min_users)["m"]
        known = []
        for group in judged.split():  # loops, as a reader would compute them
            own = [x for x, at in zip(value, member, strict=True) if list(sizes)[at] == group]
            assert means[f"f={group}"] == pytest.approx(sum(own) / len(own))
            known.append(sum(own) / len(own))
        assert means["f=one"] == 1.0  # a group's own mean is kept
        extremes = [means[f"f/{name}"] for name in ("min", "max", "gap")]
        if not known:
            assert extremes == [None, None, None]
        elif len(known) == 1:
            assert extremes == [pytest.approx(known[0])] * 2 + [None]  # there is no other group
        else:
            low, high = min(known), max(known)
            assert extremes == pytest.approx([low, high, high - low])
        if known:
            assert means["f/min"] == slices.worst_group(means, groups, min_users=min_users)
