import gzip
import itertools
import logging
import zipfile
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
from ml_collections import ConfigDict
from test_split import log, split

from seqfair_jax.data import groups
from seqfair_jax.data.groups import (
    RESERVED_NAMES,
    GroupFamily,
    build_family,
    cut_by_rows,
    decode_name,
    encode_name,
    own_groups,
    popular_rows,
    read_group_table,
    require_partition,
)
from seqfair_jax.data.readers import read_log
from seqfair_jax.data.split import leave_one_out
from seqfair_jax.errors import UserError

HEADER = "user_id,family,group\n"
STRANGE = [*RESERVED_NAMES, "", "a", "%72ank", "R&D", "a*b", "a%2Ab", "a:b", "x=1", "a/b", "a,b",
           "a@b", "é 日本\U0001f600", "a\nb", "a\0", "\x85", "2024", "..",
           "100%", "Rank"]  # fmt: skip


def table(*rows):
    return pd.DataFrame(rows, columns=["user_id", "family", "group"], dtype=object)


def read(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_group_table(str(path))


# --- Built-in families ---


@pytest.mark.parametrize("seed", range(6))
def test_group_cuts_match_the_reference_with_ties(seed):
    rng = np.random.default_rng(seed)
    key, rows = rng.integers(4, size=30), rng.integers(1, 4, size=30)
    for cuts in ((Fraction(1, 3), Fraction(2, 3)), (Fraction(1, 10), Fraction(9, 10))):
        expected = reference.cut_by_rows(key, rows.tolist(), cuts)
        assert cut_by_rows(key, rows, cuts).tolist() == expected


def test_a_share_at_the_cut_belongs_to_the_upper_group():
    cuts = (Fraction(1, 3), Fraction(2, 3))
    assert cut_by_rows(np.array([1, 2, 3]), np.ones(3, int), cuts).tolist() == [1, 2, 2]


def equal_users():
    """20 users of 5 training rows; users 0 to 3 have 5 rows of popular items, 4 to 7 have 4, ..."""
    sequences = []
    for user in range(20):
        popular = 5 - user // 4
        items = [user % 2] * popular + [2 + user % 8] * (5 - popular)
        sequences.append([*items, 2, 2])
    return split(log(*sequences))


@pytest.mark.parametrize(
    ("cuts", "sizes"), [("33", (6, 7, 7)), ("2060", (3, 12, 5)), ("1080", (1, 16, 3))]
)
def test_cuts_by_hand(cuts, sizes):
    # Each user has 1/20 of the rows: the n-th is in the upper group from n/20 >= the cut on.
    dataset = equal_users()
    expected = np.repeat([0, 1, 2], sizes)
    family = build_family(dataset, f"seq{cuts}")  # all lengths are equal: in the users' order
    assert family.groups == ("short", "medium", "long")
    assert family.membership.argmax(axis=1).tolist() == expected.tolist()

    # Users by their share of popular items: 16 to 19, 12 to 15, ...
    order = np.arange(20).reshape(5, 4)[::-1].ravel()
    family = build_family(dataset, f"pop{cuts}")
    assert family.groups == ("niche", "diverse", "popular")
    assert family.membership[order].argmax(axis=1).tolist() == expected.tolist()
    assert (family.membership.sum(axis=1) == 1).all()


def test_popular_rows_by_hand():
    dataset = equal_users()
    assert popular_rows(dataset).tolist() == np.repeat([5, 4, 3, 2, 1], 4).tolist()
    # Audiences 2, 1, 1, 1, 1: the 0.8 quantile is 1.2. Counted once, each row of item 0 counts.
    dataset = split(log([0, 0, 1, 2, 9, 9], [0, 3, 4, 4, 9, 9]))
    assert popular_rows(dataset).tolist() == [2, 1]
    # Audiences 3, 2, 1, 1, 1, 1: the 0.8 quantile is 2, and 2 is not above it.
    dataset = split(log([0, 1, 2, 9, 9], [0, 1, 3, 4, 9, 9], [0, 5, 9, 9]))
    assert popular_rows(dataset).tolist() == [1, 1, 1]


# --- Products and unions ---


def test_products_and_unknown_families():
    dataset = split()
    product = build_family(dataset, "pop33*seq33")
    assert product.name == "pop33*seq33"
    assert product.groups[:4] == ("niche*short", "niche*medium", "niche*long", "diverse*short")
    pop, seq = build_family(dataset, "pop33").membership, build_family(dataset, "seq33").membership
    both = [(p[:, None] & s[None, :]).ravel() for p, s in zip(pop, seq, strict=True)]
    np.testing.assert_array_equal(product.membership, both)
    with pytest.raises(UserError, match="unknown group family 'pop3'.*did you mean 'pop33'"):
        build_family(dataset, "pop3")


def test_a_union_has_the_groups_of_its_families():
    dataset = split()
    union = build_family(dataset, "pop33&pop33*seq33")
    pop, product = build_family(dataset, "pop33"), build_family(dataset, "pop33*seq33")
    assert union.name == "pop33&pop33*seq33"
    assert union.groups[:4] == ("pop33:niche", "pop33:diverse", "pop33:popular",
                                "pop33*seq33:niche*short")  # fmt: skip
    both = np.concatenate([pop.membership, product.membership], axis=1)
    np.testing.assert_array_equal(union.membership, both)
    assert union.overlapping
    assert [part.name for part in union.parts] == ["pop33", "pop33*seq33"]
    chosen = union.select(np.array([1]))
    assert [part.membership.shape for part in chosen.parts] == [(1, 3), (1, 9)]
    assert pop.parts == (pop,)
    require_partition(union, "gdro", dataset.user_ids, others=())  # each part is one
    with pytest.raises(UserError, match="'pop33&pop33' names one family twice"):
        build_family(dataset, "pop33&pop33")


# --- Families of a file ---


def test_groups_from_a_file(tmp_path):
    text = HEADER + "1,age,old\n1,age,young\n2,age,young\n9,age,old\n"
    own = read(tmp_path / "groups.csv", text)
    family = build_family(split(), "age", group_table=own, missing_group="leave_out")
    assert family.groups == ("old", "young")
    assert family.membership.tolist() == [[True, True], [False, True], [False, False]]
    assert family.overlapping
    assert family.labels().tolist() == [["old", "young"], ["young"], []]
    with pytest.raises(
        UserError, match="gdro needs every user in exactly one group.*1, 3.*: erm, own$"
    ):
        require_partition(family, "gdro", np.array([1, 2, 3]), others=["erm", "own"])
    union = build_family(split(), "pop33&age", group_table=own, missing_group="leave_out")
    with pytest.raises(UserError, match="in family 'age' 2 users are in none or several: 1, 3"):
        require_partition(union, "gdro", np.array([1, 2, 3]), others=())
    message = "none of the . users of family 'age' is in the log; its user_id column has"
    with pytest.raises(UserError, match=message):
        build_family(split(log([1, 2, 3], users=["x"])), "age", group_table=own)


def test_labels_of_a_csv_are_as_written(tmp_path):
    labels = ["01", "1", "1.0", "NA", "nan", "None", "True", "a\0", "a"]
    rows = "".join(f"{user},{family},{label}\n" for user in (1, 2, 3) for family in ("2024", "null")
                   for label in labels)  # fmt: skip
    own = read(tmp_path / "groups.csv", HEADER + rows)
    for family in ("2024", "null"):
        assert build_family(split(), family, group_table=own).groups == tuple(sorted(labels))


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        (pa.array([18, 2024, 7]), ["18", "2024", "7"]),
        (pa.array([18.0, 0.5, 7.0]), ["18", "0.5", "7"]),
        (pa.array([True, False, True]), ["True", "False", "True"]),
        (pa.array(["01", "1", "NA"]).dictionary_encode(), ["01", "1", "NA"]),
        (pa.array(["2020-01-02"] * 3).cast(pa.date32()), ["2020-01-02"] * 3),
    ],
)
def test_labels_of_parquet_become_text(tmp_path, values, labels):
    users = pa.array([1.0, 2.0, 3.0])
    file = tmp_path / "groups.parquet"
    pq.write_table(pa.table({"user_id": users, "family": values, "group": values}), file)
    own = read_group_table(str(file))
    assert own["user_id"].tolist() == ["1", "2", "3"]
    assert own["family"].tolist() == labels
    assert own["group"].tolist() == labels
    family = build_family(split(), labels[0], group_table=own, missing_group="leave_out")
    assert family.groups == (labels[0],)
    assert family.membership[0].all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (HEADER + "1,age,old\n2,,old\n", "data row 2 has no family"),
        (HEADER + "1,age,old\n,age,old\n", "data row 2 has no user_id"),
        (HEADER, "has no rows"),
        ("", "is empty"),
        ("family,group\na,b\n", "no column 'user_id', it has family, group; rename a column"),
        ("user_id,family,Group, group\n1,a,b,c\n", "column group appears more than once"),
        (HEADER + "1,seq1080,old\n", "'seq1080' has the name of a built-in family; rename it"),
    ],
)
def test_bad_group_files(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"groups\.csv.*{message}"):
        read(tmp_path / "groups.csv", content)


def test_a_family_with_the_name_of_a_built_in_one_is_left_out(tmp_path, caplog):
    own = read(tmp_path / "groups.csv", "user_id,pop33,plan\n1,x,free\n2,y,paid\n")
    assert own.to_numpy().tolist() == [["1", "plan", "free"], ["2", "plan", "paid"]]
    assert "family 'pop33' has the name of a built-in family; rename it to use" in caplog.text


def test_a_column_without_a_name_is_no_family(tmp_path):
    """As `DataFrame.to_csv` writes its index."""
    frame = pd.DataFrame({"user_id": ["a", "b"], "plan": ["free", "paid"]})
    frame.to_csv(tmp_path / "groups.csv")
    pd.read_csv(tmp_path / "groups.csv").to_csv(tmp_path / "again.csv")  # Unnamed: 0
    frame[frame.index < 5].set_index(pd.Index([4, 7])).to_parquet(tmp_path / "groups.parquet")
    for name in ("groups.csv", "again.csv", "groups.parquet"):
        found = read_group_table(str(tmp_path / name))
        assert found["family"].tolist() == ["plan", "plan"], name
    (tmp_path / "blank.csv").write_text("user_id,plan\na, \nb,x\n")
    assert read_group_table(str(tmp_path / "blank.csv"))["group"].tolist() == [None, "x"]
    (tmp_path / "long.csv").write_text("user_id,family,group\na,plan,free\nb, ,paid\n")
    with pytest.raises(UserError, match="data row 2 has no family"):
        read_group_table(str(tmp_path / "long.csv"))


def test_the_groups_have_the_encoding_of_the_log(tmp_path):
    path = tmp_path / "groups.csv"
    path.write_bytes("user_id,plan\n7,größer\n".encode("cp1252"))
    own = own_groups(data_part(tmp_path, group_file=str(path), encoding="cp1252"))
    assert own["group"].tolist() == ["größer"]


def test_the_user_column_is_called_as_in_the_log_or_has_a_usual_name(tmp_path):
    (tmp_path / "groups.csv").write_text("Kunde,plan\n7,free\n")
    for name in ("Kunde", "kunde"):
        own = read_group_table(str(tmp_path / "groups.csv"), name)
        assert own.to_numpy().tolist() == [["7", "plan", "free"]]
    (tmp_path / "groups.csv").write_text("customer,plan\n7,free\n")
    own = read_group_table(str(tmp_path / "groups.csv"), "Kunde")
    assert own.to_numpy().tolist() == [["7", "plan", "free"]]
    (tmp_path / "groups.csv").write_text("Kunde,customer,plan\n7,x,free\n")
    own = read_group_table(str(tmp_path / "groups.csv"), "Kunde")
    assert own["user_id"].tolist() == ["7", "7"]
    assert own["family"].tolist() == ["customer", "plan"]


@pytest.mark.parametrize("column", ["user_id", "family", "group"])
@pytest.mark.parametrize("values", [[["a"]], [b"a"], [{"a": 1}]])
def test_bad_types_in_a_group_file(tmp_path, column, values):
    columns = {"user_id": [1], "family": ["age"], "group": ["old"], column: values}
    pq.write_table(pa.table(columns), tmp_path / "groups.parquet")
    with pytest.raises(UserError, match=rf"groups\.parquet.* {column} is of type"):
        read_group_table(str(tmp_path / "groups.parquet"))


def test_where_the_group_file_is(tmp_path, monkeypatch):
    assert read_group_table(None) is None
    with pytest.raises(UserError, match="data.group_file=none.csv: no such file"):
        read_group_table("none.csv")
    with pytest.raises(UserError, match="data.group_file=.* is a folder"):
        read_group_table(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "groups.csv").write_text(HEADER + "1,age,old\n")
    assert len(read_group_table("~/groups.csv")) == 1


def test_users_are_matched_by_the_text_of_their_ids():
    users = ["a", "a\0", "07", "7", "NA"]
    dataset = split(log(*[[1, 2, 3]] * 5, users=users))
    own = table(*((user, "f", f"group of {user}") for user in users))
    family = build_family(dataset, "f", group_table=own)
    assert family.labels().tolist() == [f"group of {user}" for user in dataset.user_ids]


def test_wide_files(tmp_path):
    """A row for each user, a column for each family; Parquet types as in long files."""
    text = "uid,age,home town\n1,30,Graz\n2,,01\n3,18,NA\n9,70,Linz\n"
    own = read(tmp_path / "groups.csv", text)
    assert own["family"].unique().tolist() == ["age", "home town"]
    family = build_family(split(), "age", group_table=own)
    assert family.groups == ("18", "30", "unknown")
    assert family.labels().tolist() == ["30", "unknown", "18"]
    town = build_family(split(), "home town", group_table=own)
    assert town.labels().tolist() == ["Graz", "01", "NA"]
    assert town.groups == ("01", "Graz", "NA")  # no user is unknown
    file = tmp_path / "groups.parquet"
    frame = pd.DataFrame({"user_id": [1, 2, 3], "age": [30, None, 18], "paid": [True, False, True]})
    frame.to_parquet(file)
    own = read_group_table(str(file))
    assert (
        build_family(split(), "age", group_table=own).labels().tolist() == family.labels().tolist()
    )
    assert build_family(split(), "paid", group_table=own).groups == ("False", "True")
    jsonl = '{"user_id": "1", "age": 30}\n{"user_id": "2"}\n{"user_id": "3", "age": 18}\n'
    own = read(tmp_path / "groups.jsonl", jsonl)
    assert (
        build_family(split(), "age", group_table=own).labels().tolist() == family.labels().tolist()
    )


def test_a_wide_file_may_have_a_family_called_group(tmp_path):
    own = read(tmp_path / "groups.csv", "customer,group,age\n1,A,30\n2,B,31\n3,A,32\n")
    assert build_family(split(), "group", group_table=own).labels().tolist() == ["A", "B", "A"]
    long = read(tmp_path / "groups.csv", "customer,Family,Group\n1,x,A\n")
    assert long.to_numpy().tolist() == [["1", "x", "A"]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("name,age\n1,2\n", "no column 'user_id', it has name, age; rename a column"),
        ("customer,uid,age\n1,2,3\n", "customer and uid may each be the user_id; rename"),
        ("user_id\n1\n", "has no column beside user_id"),
        ("user_id,age,age\n1,2,3\n", "column age appears more than once"),
        ("user_id,seq33\n1,2\n", "'seq33' has the name of a built-in family; rename it"),
        ("user_id,age\n1,2\n,3\n", "data row 2 has no user_id"),
        ("user_id,age\n", "has no rows: expected rows of user_id, age"),
        ("user_id,age\n1,2\n2,3\n1,4\n", "user '1' has several rows, the second .* data row 3"),
    ],
)
def test_bad_wide_files(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"groups\.csv.*{message}"):
        read(tmp_path / "groups.csv", content)


def test_families_that_nothing_uses_are_found(tmp_path):
    text = "user_id,age,plan,R&D,a:b,country\n1,20,x,y,z,DK\n"
    own = read(tmp_path / "groups.csv", text)
    assert groups.unused_families(own, ["pop33"]) == ["R%26D", "a%3Ab", "age", "country", "plan"]
    used = ["age:4", "pop33*plan", "seq33&R%26D", "a:b"]
    assert groups.unused_families(own, used) == ["country"]


@pytest.mark.parametrize(
    ("users", "of_file", "level", "message"),
    [
        (
            ["a", "b"],
            ["b", "a", "a"],
            "INFO",
            "the group file has a row for 2 of the 2 users",
        ),
        (
            ["a", "b", "c"],
            ["b", "ghost"],
            "INFO",
            "the group file has a row for 1 of the 3 users; 2 users have none, such as 'a'; it has "
            "1 other user, such as 'ghost' (not in the log, or left out by the filter)",
        ),
        (
            ["00084", "00085", "007", "x"],
            ["84", "85", "007", "y", "0"],
            "WARNING",
            "the group file has a row for 1 of the 4 users; 3 users have none, such as '00084'; it "
            "has 4 other users, such as '84' (not in the log, or left out by the filter). Without "
            "leading zeros, spaces, capitals and a final .0, 2 of these would match, such as '84' "
            "and '00084' of the log: write the ids as the log does",
        ),
        (
            [84, 85],
            ["y", "0085", "085"],
            "WARNING",
            "the group file has a row for 0 of the 2 users; 2 users have none, such as '84'; it "
            "has 3 other users, such as 'y' (not in the log, or left out by the filter). Without "
            "leading zeros, spaces, capitals and a final .0, 2 of these would match, such as "
            "'0085' and '85' of the log: write the ids as the log does",
        ),
    ],
    ids=["all", "some", "text", "integers"],
)
def test_how_many_users_of_a_group_file_match(users, of_file, level, message, caplog):
    dataset = split(log(*[[1, 2, 3]] * len(users), users=users))
    own = table(*((user, "plan", None) for user in of_file))
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        groups.say_matches(dataset, own)
    [record] = caplog.records
    assert record.levelname == level
    assert record.getMessage() == message


# --- Users without a value ---


def test_users_without_a_value_are_unknown_or_left_out(tmp_path, caplog):
    """A blank group is like no row; a blank beside a group is nothing."""
    text = HEADER + "1,age,\n1,age,old\n2,age,\n3,name,x\n"
    own = read(tmp_path / "groups.csv", text)
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        family = build_family(split(), "age", group_table=own)
    assert family.labels().tolist() == ["old", "unknown", "unknown"]
    assert family.groups == ("old", "unknown")
    require_partition(family, "gdro", np.array([1, 2, 3]), others=["erm", "own"])
    assert "age: 2 of 3 users have no value in data.group_file; they are in group 'unknown'" in (
        caplog.text
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        family = build_family(split(), "age", group_table=own, missing_group="leave_out")
    assert family.labels().tolist() == ["old", None, None]
    assert "age: 2 of 3 users have no value in data.group_file; they are in no group" in caplog.text
    with pytest.raises(UserError, match="in none or several: 2, 3"):
        require_partition(family, "gdro", np.array([1, 2, 3]), others=["erm", "own"])


def test_the_file_s_own_unknown_group_takes_the_others_in(tmp_path):
    own = read(tmp_path / "groups.csv", HEADER + "1,age,unknown\n2,age,young\n")
    family = build_family(split(), "age", group_table=own)
    assert family.groups == ("unknown", "young")
    assert family.labels().tolist() == ["unknown", "young", "unknown"]


def test_all_blank_is_no_family(tmp_path):
    own = read(tmp_path / "groups.csv", HEADER + "1,age,\n")
    with pytest.raises(UserError, match="family 'age' has no value"):
        build_family(split(), "age", group_table=own)


# --- Families of numbers ---


def ages(*values, users=None, name="age"):
    """A group table and a log of as many users; None for a user that the table lacks."""
    users = range(len(values)) if users is None else users
    own = table(*((str(user), name, value) for user, value in zip(users, values, strict=True)
                  if value is not None))  # fmt: skip
    return split(log(*[[1, 2, 3]] * len(values), users=users)), own


def test_numbers_are_cut_into_quantiles_by_hand():
    dataset, own = ages("18", "50", "24", "30", "35", "61", "19", "49")
    family = build_family(dataset, "age:4", group_table=own)
    assert family.name == "age:4"
    assert family.groups == ("18-19", "24-30", "35-49", "50-61")
    assert family.labels().tolist() == ["18-19", "50-61", "24-30", "24-30", "35-49", "50-61",
                                        "18-19", "35-49"]  # fmt: skip
    assert build_family(dataset, "age:2", group_table=own).groups == ("18-30", "35-61")
    # 8 users in 3 groups: the cuts are the 3rd and the 6th of them.
    sizes = build_family(dataset, "age:3", group_table=own).membership.sum(axis=0)
    assert sizes.tolist() == [3, 3, 2]


def test_users_of_equal_numbers_stay_together(caplog):
    dataset, own = ages("1", "2", "2", "2", "2", "3", "9", "9")
    assert build_family(dataset, "age:2", group_table=own).groups == ("1-2", "3-9")
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        family = build_family(dataset, "age:4", group_table=own)
    # The quantiles are the 2nd, 4th, 6th and 8th user: 2, 2, 3, 9.
    assert family.groups == ("1-2", "3", "9")
    assert family.membership.sum(axis=0).tolist() == [5, 1, 2]
    assert "family age:4 has 3 groups" in caplog.text
    assert build_family(dataset, "age:9999", group_table=own).groups == ("1", "2", "3", "9")


def test_groups_that_are_numbers_are_in_their_order():
    dataset, own = ages("10", "9", "-1", "2.5", "09")
    family = build_family(dataset, "age", group_table=own)
    assert family.groups == ("-1", "2.5", "09", "9", "10")  # equal numbers by their text
    assert family.labels().tolist() == ["10", "9", "-1", "2.5", "09"]
    dataset, own = ages("10", "9", "old")
    assert build_family(dataset, "age", group_table=own).groups == ("10", "9", "old")


@pytest.mark.parametrize(
    ("values", "is_told"),
    [
        (range(21), True),
        (range(20), False),
        ([*range(21), "old"], False),
        ([*range(21), "inf"], False),
    ],
    ids=["many", "few", "no-number", "infinite"],
)
def test_many_numbers_that_are_not_cut_are_told(values, is_told, caplog):
    dataset, own = ages(*map(str, values))
    family = build_family(dataset, "age", group_table=own)
    assert len(family.groups) == len(values)
    assert ("has 21 groups, one for each number; write age:4 in" in caplog.text) == is_told


def test_many_numbers_of_users_with_several_are_not_to_be_cut(caplog):
    """A cut would be refused, since it takes one number of each user."""
    dataset, own = ages(*map(str, range(21)))
    own = pd.concat([own, table(("0", "age", "20"))])
    assert len(build_family(dataset, "age", group_table=own).groups) == 21
    assert not caplog.records


def test_only_the_log_s_users_say_where_to_cut():
    dataset, own = ages("1", "2", "3", "4")
    others = table(*((f"x{i}", "age", "100") for i in range(50)))
    family = build_family(dataset, "age:2", group_table=pd.concat([own, others]))
    assert family.groups == ("1-2", "3-4")


def test_users_without_a_number():
    dataset, own = ages("1", None, "3", "4", None)
    family = build_family(dataset, "age:2", group_table=own)
    assert family.groups == ("1-3", "4", "unknown")
    assert family.labels().tolist() == ["1-3", "unknown", "1-3", "4", "unknown"]
    family = build_family(dataset, "age:2", group_table=own, missing_group="leave_out")
    assert family.labels().tolist() == ["1-3", None, "1-3", "4", None]


FORMS = {"whole": "{:.0f}", "decimal": "{:.2f}", "exponent": "{:.3e}"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("borders", ["0..1..2", "-2.5..-0.50..0.25", "-1..", "1.005..7..7.01..90"])
def test_fixed_borders_match_loops(form, borders):
    rng = np.random.default_rng(5)
    points = [float(part) for part in borders.split("..") if part]
    values = [FORMS[form].format(x) for x in [*points, *rng.normal(scale=3, size=40)]]
    dataset, own = ages(*values)
    family = build_family(dataset, f"age:{borders}", group_table=own)
    assert family.name == f"age:{borders}"
    ends = [-np.inf, *points, np.inf]
    assert len(family.groups) == len(ends) - 1
    for user, value in enumerate(values):
        expected = [low <= float(value) < high for low, high in itertools.pairwise(ends)]
        assert family.membership[user].tolist() == expected


def test_the_groups_of_fixed_borders_do_not_depend_on_the_log(caplog):
    names = ("below 18", "18 to below 24.5", "24.5 to below 65", "65 and above")
    for values, expected in (
        (("18", "17.99", "24.5", "65", "24.49"), [1, 0, 2, 3, 1]),
        (("70", "3", "65.0"), [3, 0, 3]),
    ):
        dataset, own = ages(*values)
        with caplog.at_level(logging.INFO, "seqfair_jax"):
            family = build_family(dataset, "age:18..24.5..65", group_table=own)
        assert family.groups == names
        assert family.labels().tolist() == [names[group] for group in expected]
        assert family.membership.sum(axis=1).tolist() == [1] * len(values)
    (record,) = caplog.records
    assert record.getMessage() == (
        "family age:18..24.5..65: no user of the log is in 18 to below 24.5, 24.5 to below 65"
    )
    assert build_family(dataset, "age:-5..", group_table=own).groups == ("below -5", "-5 and above")


def test_fixed_borders_and_users_without_a_number():
    dataset, own = ages("1", None, "3")
    family = build_family(dataset, "age:2..", group_table=own)
    assert family.groups == ("below 2", "2 and above", "unknown")
    assert family.labels().tolist() == ["below 2", "unknown", "2 and above"]
    family = build_family(dataset, "age:2..", group_table=own, missing_group="leave_out")
    assert family.labels().tolist() == ["below 2", None, "2 and above"]


def test_fixed_borders_in_expressions():
    dataset, own = ages("1", "2", "3", "4", name="a:g")
    name = "a%3Ag:-1..2.5*seq33&a%3Ag:0.."
    union = build_family(dataset, name, group_table=own)
    assert union.name == name
    assert [part.name for part in union.parts] == name.split("&")
    assert union.groups[0] == "a%3Ag:-1..2.5*seq33:below -1*short"
    assert union.groups[-1] == "a%3Ag:0..:0 and above"
    assert groups.unused_families(own, [name]) == []


@pytest.mark.parametrize("name", ["age:2", "age:2..5"])
def test_a_user_whom_the_file_calls_unknown_has_no_number(name):
    dataset, own = ages("1", "unknown", "3", None)
    without, same = ages("1", None, "3", None)
    family = build_family(dataset, name, group_table=own)
    assert family.hash() == build_family(without, name, group_table=same).hash()
    assert family.groups[-1] == "unknown"
    dataset, own = ages("unknown", None)
    with pytest.raises(UserError, match=f"'{name}': no user of the log has a number of 'age'"):
        build_family(dataset, name, group_table=own)


@pytest.mark.parametrize(
    ("in_log", "in_file"), [("84", "84.0"), ("Anna", " anna"), ("000", "0"), ("0x", "X ")]
)
def test_ids_that_are_written_otherwise_are_told(in_log, in_file, caplog):
    dataset = split(log(*[[1, 2, 3]] * 2, users=[in_log, "x-1"]))
    own = table((in_file, "plan", "a"), ("x-1", "plan", "a"), ("ghost", "plan", "b"))
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        groups.say_matches(dataset, own)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert f"1 of these would match, such as {in_file!r} and {in_log!r}" in record.getMessage()


def test_labels_of_ranges():
    dataset, own = ages("-5", "-1", "0.25", "1e3")
    assert build_family(dataset, "age:2", group_table=own).groups == ("-5 to -1", "0.25-1000")
    assert build_family(dataset, "age:3", group_table=own).groups == ("-5 to -1", "0.25", "1000")


def test_the_place_of_numbers_in_the_grammar():
    dataset, own = ages("1", "2", "3", "4")
    own = pd.concat([own, own.assign(family="a:g")])
    product = build_family(dataset, "age:2*seq33", group_table=own)
    assert product.name == "age:2*seq33"
    assert product.groups[:2] == ("1-2*short", "1-2*medium")
    union = build_family(dataset, "pop33&a%3Ag:2&age:2*a%3Ag:2", group_table=own)
    assert union.name == "pop33&a%3Ag:2&age:2*a%3Ag:2"
    assert [part.name for part in union.parts] == ["pop33", "a%3Ag:2", "age:2*a%3Ag:2"]
    assert "a%3Ag:2:1-2" in union.groups
    # The file's own name comes first; in an expression it is encoded.
    named = pd.concat([own, table(*((str(u), "age:2", "x") for u in range(4)))])
    assert build_family(dataset, "age:2", group_table=named).name == "age%3A2"
    assert build_family(dataset, "age%3A2", group_table=named).groups == ("x",)
    assert build_family(dataset, "age:2*pop33", group_table=named).groups[0] == "1-2*niche"


@pytest.mark.parametrize(
    ("values", "name", "message"),
    [
        (["1", "M"], "age:2", "'age:2': 'age' of user 1 is 'M'; expected finite numbers .an empty"),
        (["1,5", "2,5"], "age:2", "is '1,5', the first of 2 such rows; .* a point in place of the"),
        (["1", "inf"], "age:2", "'age' of user 1 is 'inf'"),
        (["1", "2"], "age:1", "expected age:N with N groups, 2 to 9999"),
        (["1", "2"], "age:1-2", "or fixed borders: age:18..25..65, or a single one, age:18..$"),
        (["1", "M"], "age:0..2", "'age:0..2': 'age' of user 1 is 'M'; expected finite numbers"),
        (["a", "b"], "age:x..2", "'age:x..2': the border 'x' is no number; expected numbers such"),
        (["1", "2"], "age:1..2..", "the border '' is no number"),
        (["1", "2"], "age:..2", "the border '' is no number"),
        (["1", "2"], "age:..", "the border '' is no number"),
        (["1", "2"], "age:1..inf", "the border 'inf' is no number"),
        (["1", "2"], f"age:1..{'9' * 400}", "the border '9+' is no number"),
        (["1", "2"], "age:1...5", "the border '.5' is no number"),
        (["1", "2"], "age:1..3..2", "the border 2 is below the one before, 3; give each border on"),
        (["1", "2"], "age:1..1.0", "the border 1.0 equals the one before, 1;"),
        (["1", "2"], "seq33:2..3", "seq33 has groups; only a file's numbers are cut"),
        (["1", "2"], "age:x", "expected age:N with N groups"),
        (["1", "2"], "age:", "expected age:N with N groups"),
        (["1", "2"], "seq33:2", "seq33 has groups; only a file's numbers are cut"),
        (["1", "2"], "agee:2", "unknown group family 'agee:2' .did you mean 'age'"),
    ],
)
def test_families_that_cannot_be_cut(values, name, message):
    dataset, own = ages(*values)
    with pytest.raises(UserError, match=message):
        build_family(dataset, name, group_table=own)


def test_several_numbers_of_a_user():
    dataset, own = ages("1", "2")
    twice = pd.concat([own, own])  # the same value twice is one
    assert build_family(dataset, "age:2", group_table=twice).groups == ("1", "2")
    twice = pd.concat([own, table(("1", "age", "5"))])
    with pytest.raises(UserError, match="'age:2': user 1 has several values of 'age'; give each"):
        build_family(dataset, "age:2", group_table=twice)


U_USER = "1|24|M|technician|85711\n2|53|F|other|94043\n"  # of MovieLens-100K


def data_part(path, **changes):
    columns = {"user_id": ""}
    settings = {"name": "ml100k", "path": str(path), "columns": columns, "group_file": None}
    return ConfigDict(settings | {"encoding": ""} | changes)


@pytest.mark.parametrize("form", ["publisher", "zip", "recbole"])
def test_the_users_of_movielens_100k_are_beside_its_log(tmp_path, form):
    if form == "publisher":
        files = {"u.data": b"", "u.user": U_USER.encode()}
    elif form == "zip":
        with zipfile.ZipFile(tmp_path / "ml-100k.zip", "w") as archive:
            archive.writestr("ml-100k/u.data", "")
            archive.writestr("ml-100k/u.user", U_USER)
        files = {}
    else:
        header = "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
        text = header + U_USER.replace("|", "\t")
        files = {"ml-100k.inter.gz": b"", "ml-100k.user.gz": gzip.compress(text.encode())}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    found = own_groups(data_part(tmp_path))
    expected = [("1", "24", "M", "technician"), ("2", "53", "F", "other")]
    rows = [(user, family, group) for family, at in (("age", 1), ("gender", 2), ("occupation", 3))
            for user, group in ((row[0], row[at]) for row in expected)]  # fmt: skip
    pd.testing.assert_frame_equal(found, table(*rows))
    log_file = next(path for path in tmp_path.iterdir() if "user" not in path.name)
    pd.testing.assert_frame_equal(own_groups(data_part(log_file)), found)


def test_a_group_file_comes_before_the_users_of_movielens_100k(tmp_path):
    (tmp_path / "u.data").write_text("")
    assert own_groups(data_part(tmp_path)) is None  # without u.user
    (tmp_path / "u.user").write_text(U_USER)
    (tmp_path / "own.csv").write_text("user_id,tier\n1,a\n")
    found = own_groups(data_part(tmp_path, group_file=str(tmp_path / "own.csv")))
    pd.testing.assert_frame_equal(found, table(("1", "tier", "a")))
    assert own_groups(data_part(tmp_path, name="csv")) is None
    (tmp_path / "u.user").write_text("1|24|M\n")
    with pytest.raises(UserError, match=r"u\.user cannot be read.*Expected 5 columns, got 3"):
        own_groups(data_part(tmp_path))


def test_movielens_users_of_recbole(real_data):
    own = read_group_table(str(real_data / "ml-100k" / "ml-100k.user.gz"))
    log_of_all = read_log("csv", [real_data / "ml-100k" / "ml-100k.inter.gz"], {})
    counts = log_of_all.counts
    assert (counts["raw_rows"], counts["raw_users"], counts["raw_items"]) == (100_000, 943, 1_682)
    dataset = leave_one_out(log_of_all, name="csv", num_valid_users=0, split_seed=0)
    gender = build_family(dataset, "gender", group_table=own)
    assert dict(zip(gender.groups, gender.membership.sum(axis=0), strict=True)) == {
        "F": 273,
        "M": 670,
    }
    assert len(build_family(dataset, "occupation", group_table=own).groups) == 21
    age = build_family(dataset, "age:4", group_table=own)
    assert age.groups == ("7-25", "26-31", "32-43", "44-73")
    assert age.membership.sum(axis=1).tolist() == [1] * 943
    assert set(own["family"]) == {"age", "gender", "occupation", "zip_code"}
    named = own_groups(data_part(real_data / "ml-100k"))
    expected = own[own["family"] != "zip_code"].reset_index(drop=True)
    pd.testing.assert_frame_equal(named, expected)


# --- Names ---


def test_what_a_name_says():
    assert groups.family_parts("age:4*pop33&x%2Ay") == ["age:4", "pop33", "x%2Ay"]
    assert groups.family_parts("pop33") == ["pop33"]
    names = ("pop33", "x%2Ay", "a*b", "a&b", "a*b&c")
    assert [name for name in names if groups.is_product(name)] == ["a*b"]
    assert [name for name in names if groups.is_union(name)] == ["a&b", "a*b&c"]
    kinds = [groups.family_kind(name) for name in ("pop2060", "seq33", "population", "pop33*x")]
    assert kinds == ["pop", "seq", "", ""]


def test_names_are_encoded_without_loss():
    encoded = [encode_name(name) for name in STRANGE]
    assert [decode_name(name) for name in encoded] == STRANGE
    assert len(set(encoded)) == len(STRANGE)
    for name in encoded:
        assert not set(name) & set("=/*&:,@\n\0\x85")
        assert name not in RESERVED_NAMES
    assert encode_name("rank") == "%72ank"
    assert encode_name("R&D") == "R%26D"
    assert encode_name("é 日本") == "é 日本"


def test_any_family_name_can_be_used():
    names = [name for name in STRANGE if name]
    own = table(*((1, name, "g") for name in names))
    own["user_id"] = "1"
    canonical = set()
    for name in names:
        family = build_family(split(), name, group_table=own)  # as written in the file
        assert family.name == encode_name(name)
        assert family.membership[:, 0].tolist() == [True, False, False]
        canonical.add(family.name)
        union = build_family(split(), f"{family.name}&pop33", group_table=own)
        assert union.groups[0] == f"{family.name}:g"
        product = build_family(split(), f"{family.name}*pop33", group_table=own)
        assert product.name == f"{family.name}*pop33"
    assert len(canonical) == len(names)


def test_groups_of_products_and_unions_stay_apart():
    labels = ["a", "b", "a*b", "b*a", "a:b", "b:a", "a%2Ab"]
    rows = [(user, family, label) for user in ("1", "2", "3") for family in ("f", "f:a", "g")
            for label in labels]  # fmt: skip
    own = table(*rows)
    assert build_family(split(), "f", group_table=own).groups == tuple(sorted(labels))
    for name in ("f*g", "f&f%3Aa&g", "f&g&f*g"):
        family = build_family(split(), name, group_table=own)
        assert len(set(family.groups)) == len(family.groups) == family.membership.shape[1]
    product = build_family(split(), "f*g", group_table=own)
    assert "a*b%2Aa" in product.groups
    union = build_family(split(), "f&f*g", group_table=own)
    assert union.groups[: len(labels)] == tuple(
        f"f:{label}" for label in ["a", "a%252Ab", "a%2Ab", "a%3Ab", "b", "b%2Aa", "b%3Aa"]
    )
    assert "f*g:a*b%2Aa" in union.groups


def test_labels_of_a_partition():
    membership = np.array([[True, False], [False, True], [False, False]])
    assert GroupFamily("f", ("a", "b"), membership).labels().tolist() == ["a", "b", None]


def test_the_hash_is_of_names_and_members():
    one = np.eye(2, dtype=bool)
    families = [
        GroupFamily("f", ("a", "b"), one),
        GroupFamily("f", ("a", "c"), one),
        GroupFamily("f", ("a", "b"), ~one),
        GroupFamily("f", ("a\0b", "c"), one),
        GroupFamily("f", ("a", "b\0c"), one),
    ]
    for left, right in itertools.combinations(families, 2):
        assert left.hash() != right.hash()
    assert GroupFamily("g", ("a", "b"), one.copy()).hash() == families[0].hash()
