"""Which rows of a log are read, and what is counted."""

import re

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from seqfair_jax.data.readers import Rows, log_from_table, read_log
from seqfair_jax.errors import UserError

TEXT = """user_id,item_id,timestamp,event,rating
1,10,2024-01-01,view,5
1,11,2024-01-02,cart,3
2,10,2024-01-03,view,
2,12,2024-01-04,buy,4.5
3,10,2024-01-05,view,1
"""


def read(path, text=TEXT, columns=None, **rows):
    path.write_text(text)
    return read_log("csv", [path], columns or {}, Rows(**rows))


def left_out(log):
    reasons = ("other_events", "missing_values", "below_min_rating", "outside_period")
    assert log.counts["rows_read"] == len(log) + sum(log.counts[key] for key in reasons)
    assert log.counts["raw_rows"] == len(log)
    return {key: log.counts[key] for key in reasons if log.counts[key]}


def items(log):
    return log.frame()["item_id"].tolist()


# --- Events and ratings ---


def test_events(tmp_path):
    log = read(tmp_path / "log.csv", events=("view", "cart"))
    assert items(log) == [10, 11, 10, 10]
    assert left_out(log) == {"other_events": 1}
    assert log.counts["raw_items"] == 2  # item 12 was bought alone
    renamed = TEXT.replace("event", "kind")
    log = read(tmp_path / "log.csv", renamed, {"event": "kind"}, events=("buy",))
    assert items(log) == [12]
    with pytest.raises(UserError, match=r"no interactions of event 'look' or 'see'; its events are "
                       "buy, cart, view: set data.events"):  # fmt: skip
        read(tmp_path / "log.csv", events=("look", "see"))
    with pytest.raises(UserError, match="no column 'event'.*name the column in data.columns.event"):
        read(tmp_path / "log.csv", renamed, events=("view",))
    assert items(read(tmp_path / "log.csv", renamed)) == [10, 11, 10, 12, 10]


def test_events_may_be_numbers_and_missing():
    table = pa.table({"user_id": [1, 1, 1], "item_id": [5, 6, 7], "timestamp": [1, 2, 3],
                      "event": [1, 2, None]})  # fmt: skip
    log = log_from_table(table, rows=Rows(events=("2",)))
    assert items(log) == [6]
    assert left_out(log) == {"other_events": 2}


@pytest.mark.parametrize("column", ["event", "rating"])
def test_columns_of_lists_are_refused(column):
    table = pa.table({"user_id": [1], "item_id": [5], "timestamp": [1], column: [[1]]})
    wanted = {"event": Rows(events=("1",)), "rating": Rows(min_rating=1.0)}
    with pytest.raises(UserError, match=f"the table: column {column} is of type list<.*expected"):
        log_from_table(table, rows=wanted[column])


def test_other_events_of_retailrocket(tmp_path):
    text = "timestamp,visitorid,event,itemid,transactionid\n1,7,view,3,\n2,7,addtocart,4,\n"
    path = tmp_path / "events.csv"
    path.write_text(text)
    assert items(read_log("retailrocket", [path], {})) == [3]
    assert items(read_log("retailrocket", [path], {}, Rows(events=("addtocart",)))) == [4]


def test_ratings(tmp_path):
    log = read(tmp_path / "log.csv", TEXT.replace("view,\n", "view,2\n"), min_rating=3.0)
    assert items(log) == [10, 11, 12]
    assert left_out(log) == {"below_min_rating": 2}
    with pytest.raises(UserError, match="data row 3 has no rating"):
        read(tmp_path / "log.csv", min_rating=3.0)
    text = TEXT.replace("view,1", "view,good")
    with pytest.raises(UserError, match="the rating of data row 5 is 'good'; expected a finite"):
        read(tmp_path / "log.csv", text, min_rating=3.0, missing="drop")
    path = tmp_path / "ratings.dat"
    path.write_text("1::7::5::100\n2::8::3::200\n")
    assert items(read_log("ml1m", [path], {}, Rows(min_rating=4))) == [7]


# --- Times ---


@pytest.mark.parametrize(
    ("since", "until", "kept"),
    [
        ("2024-01-02", None, [11, 10, 12, 10]),
        (None, "2024-01-02", [10]),
        ("2024-01-02", "2024-01-04", [11, 10]),
        ("2024-01-01T12:00", "2024-01-04T00:00:01+00:00", [11, 10, 12]),
        ("2024-01-02T02:00+02:00", "2024-01-03", [11]),
    ],
)
def test_the_period_is_half_open(tmp_path, since, until, kept):
    log = read(tmp_path / "log.csv", since=since, until=until)
    assert items(log) == kept
    assert left_out(log).get("outside_period", 0) == 5 - len(kept)


def test_the_period_in_numbers():
    frame = pd.DataFrame({"user_id": [1] * 4, "item_id": [1, 2, 3, 4], "timestamp": [1, 2, 3, 4]})
    assert items(log_from_table(frame, rows=Rows(since="2", until="4"))) == [2, 3]
    assert items(log_from_table(frame, rows=Rows(since="2.5", until="4e0"))) == [3]
    large = frame.assign(timestamp=2**60 + frame["timestamp"])  # no floats
    assert items(log_from_table(large, rows=Rows(since=str(2**60 + 3)))) == [3, 4]


def test_periods_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="since is 17, a number, but the times of .* are dates"):
        read(tmp_path / "log.csv", since="17")
    frame = pd.DataFrame({"user_id": [1], "item_id": [1], "timestamp": [1]})
    with pytest.raises(UserError, match="until is 2024-01-01, a date.*the table are numbers"):
        log_from_table(frame, rows=Rows(until="2024-01-01"))
    with pytest.raises(UserError, match="data.since is '1/2/2024': expected an ISO date"):
        read(tmp_path / "log.csv", since="1/2/2024")
    with pytest.raises(UserError, match="no row is left of 5: 3 have other events, 2 are outside"):
        read(tmp_path / "log.csv", since="2025-01-01", events=("cart", "buy"))


def test_times_of_no_unit_are_reported(caplog):
    times = [0, 1_700_000_000, -1, 1_700_000_001]
    log_from_table(pd.DataFrame({"user_id": 1, "item_id": 1, "timestamp": times}))
    words = "like seconds since 1970, but 2 others do not, such as -1; correct them or remove"
    assert words in caplog.text
    caplog.clear()
    log_from_table(pd.DataFrame({"user_id": 1, "item_id": 1, "timestamp": [3, 1, 2, 0]}))
    assert not caplog.records


def test_a_bound_of_numbers_may_be_a_date():
    seconds = pd.Timestamp("2024-03-01").timestamp()
    for unit in (1, 1_000):
        times = [int((seconds + day * 86_400) * unit) for day in range(4)]
        frame = pd.DataFrame({"user_id": 1, "item_id": range(4), "timestamp": times})
        log = log_from_table(frame, rows=Rows(since="2024-03-02", until="2024-03-04"))
        assert items(log) == [1, 2]
    frame = pd.DataFrame({"user_id": 1, "item_id": range(4), "timestamp": range(4)})
    with pytest.raises(UserError, match="a date, but the times of the table are numbers"):
        log_from_table(frame, rows=Rows(since="2024-03-02"))


# --- Ids ---


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (["a", r"\N", r"\N"], r"2 rows have the user_id '\\\\N', which often means a missing"),
        (["a", "b", "(not set)"], r"1 rows have the user_id '\(not set\)'"),
        (["a@x", "A@x", "b"], "2 values of user_id differ .* such as 'A@x' and 'a@x'; they are"),
        (["5", "5.0", "7 ", "7"], "4 values of user_id differ from another one only in case"),
        (["5", "7", "9"], None),
        (["x", "y", "z"], None),
    ],
)
def test_doubtful_ids_are_reported(ids, message, caplog):
    frame = pd.DataFrame({"user_id": ids, "item_id": 1, "timestamp": range(len(ids))})
    assert len(log_from_table(frame)) == len(ids)
    assert len(caplog.records) == (message is not None)
    if message:
        assert re.search(message, caplog.text)


@pytest.mark.parametrize(("rows", "warns"), [(20, False), (5, True)])
def test_a_user_with_most_rows_is_reported(rows, warns, caplog):
    users = [*np.repeat(range(50), rows), *[99] * 50]
    frame = pd.DataFrame({"user_id": users, "item_id": range(len(users)), "timestamp": 1})
    log_from_table(frame)
    found = "user 99 has 50 of the 300 rows; leave these out if it is no person"
    assert (found in caplog.text) == warns


@pytest.mark.parametrize(
    ("times", "units"),
    [
        ([1_700_000_000, 1_700_000_001_000], "seconds and milliseconds"),
        ([1.7e9, 1.7e18, 1.7e9], "seconds and nanoseconds"),
        ([1_700_000_000, 946_684_800, 4_000_000_000], ""),
        (["2024-01-01", "1973-01-01"], ""),
    ],
)
def test_times_of_two_units_are_reported(caplog, times, units):
    frame = pd.DataFrame({"user_id": 1, "item_id": 1, "timestamp": times})
    log_from_table(frame)
    assert bool(caplog.records) == bool(units)
    if units:
        assert f"the table: some times look like {units} since 1970" in caplog.text


# --- Missing values ---


BLANKS = "user_id,item_id,timestamp\n1,10,1\n,11,2\n1,,3\n2,12,\n,,\nNA,None,4\nnull,nan,5\n"


def test_missing_values_are_an_error_or_dropped(tmp_path):
    message = (
        "log.csv: 2 rows have no user_id, the first of them data row 2; 2 rows have no item_id, "
        "the first of them data row 3; 2 rows have no timestamp, the first of them data row 4; "
        "fill or remove them, or set data.missing=drop"
    )
    with pytest.raises(UserError, match=message):
        read(tmp_path / "log.csv", BLANKS)
    log = read(tmp_path / "log.csv", BLANKS, missing="drop")
    assert log.frame().to_numpy().tolist() == [
        ["1", "10", 1],
        ["NA", "None", 4],
        ["null", "nan", 5],
    ]
    assert left_out(log) == {"missing_values": 4}
    empty = "user_id,item_id,timestamp\n,1,2\n"
    with pytest.raises(UserError, match="no row is left of 1: 1 have no user, item, time or"):
        read(tmp_path / "log.csv", empty, missing="drop")


def test_one_message_names_what_is_wrong_in_all_columns(tmp_path):
    text = "user,item,time,rating\n1,,1,5\n1,11,soon,good\n1,12,later,4\n2,12,2,3\n"
    message = (
        f"{tmp_path}/log.csv: data row 1 has no item; fill or remove them, or set "
        "data.missing=drop to leave such rows out; the rating of data row 2 is 'good'; expected "
        "a finite number in every row; the time of data row 2 is 'soon', the first of 2 such "
        "rows; expected a finite number in every row"
    )
    columns = {"timestamp": "time"}
    with pytest.raises(UserError) as raised:
        read(tmp_path / "log.csv", text, min_rating=0.0, columns=columns)
    assert str(raised.value).startswith(message)
    with pytest.raises(UserError) as raised:
        read(tmp_path / "log.csv", text, columns=columns)
    assert "rating" not in str(raised.value)


def test_missing_values_of_a_table():
    frame = pd.DataFrame(
        {
            "user_id": [1, 2, None, 4],
            "item_id": ["a", None, "b", "c"],
            "timestamp": pd.to_datetime(["2024-01-01", "2024-01-01", "2024-01-01", None]),
        }
    )
    log = log_from_table(frame, rows=Rows(missing="drop"))
    assert log.frame()["user_id"].tolist() == [1]
    assert left_out(log) == {"missing_values": 3}
    with pytest.raises(UserError, match="the table: data row 3 has no user_id"):
        log_from_table(frame)
    floats = frame.assign(timestamp=[1.0, 2.0, 3.0, np.nan])
    assert left_out(log_from_table(floats, rows=Rows(missing="drop"))) == {"missing_values": 3}


def test_rows_are_counted_once_and_errors_name_the_row_of_the_file(tmp_path):
    text = TEXT.replace("2,12,", ",12,").replace("3,10,2024-01-05,view,1", "3,10,2023-01-05,view,1")
    log = read(tmp_path / "log.csv", text, missing="drop", events=("view", "buy"),
               min_rating=2.0, since="2024-01-01")  # fmt: skip
    assert items(log) == [10]
    assert left_out(log) == {"other_events": 1, "missing_values": 2, "below_min_rating": 1}
    wrong = TEXT.replace("2024-01-05", "soon")
    with pytest.raises(UserError, match="the timestamp of data row 5 is 'soon'"):
        read(tmp_path / "log.csv", wrong, events=("view",), min_rating=0.0, missing="drop")


def test_repeats_are_counted_and_kept():
    frame = pd.DataFrame({"user_id": [1, 1, 1, 2], "item_id": [5, 5, 5, 5],
                          "timestamp": [1, 1, 2, 1]})  # fmt: skip
    log = log_from_table(frame)
    assert len(log) == 4
    assert log.counts["repeated_rows"] == 1


def test_repeats_are_dropped_after_the_other_rows(tmp_path):
    text = TEXT + "1,10,2024-01-01,buy,5\n3,10,2024-01-05,view,2\n3,10,2024-01-06,view,2\n"
    log = read(tmp_path / "log.csv", text, repeats="drop")
    # The first row stays. Row 6 repeats row 1, and row 7 repeats row 5.
    assert items(log) == [10, 11, 10, 12, 10, 10]
    assert log.frame()["timestamp"].dt.day.tolist() == [1, 2, 3, 4, 5, 6]
    assert (log.counts["rows_read"], log.counts["raw_rows"]) == (8, 6)
    assert (log.counts["dropped_repeats"], log.counts["repeated_rows"]) == (2, 0)
    # Row 1 is of another event, so row 6 is the first that is read.
    log = read(tmp_path / "log.csv", text, repeats="drop", events=("buy",))
    assert items(log) == [12, 10]
    assert log.counts["dropped_repeats"] == 0


def test_repeats_are_compared_across_the_files_of_a_log(tmp_path):
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("user_id,item_id,timestamp\nu,x,2\nu,y,1\n")
    log = read_log("csv", [tmp_path / "a.csv", tmp_path / "b.csv"], {}, Rows(repeats="drop"))
    assert items(log) == ["x", "y"]
    assert log.counts["dropped_repeats"] == 2


@pytest.mark.parametrize(
    "bound", ["0001-01-01T00:00:00+05:00", "9999-12-31T23:59:59-05:00", "soon"]
)
def test_a_bound_that_is_no_date_is_named(bound):
    frame = pd.DataFrame({"user_id": [1], "item_id": [1], "timestamp": pd.to_datetime(["2024"])})
    with pytest.raises(UserError, match="data.since is .*expected an ISO date"):
        log_from_table(frame, rows=Rows(since=bound))
