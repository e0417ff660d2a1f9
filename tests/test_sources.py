"""The forms in which people keep a log: several files, formats, column names, tables in memory."""

import bz2
import gzip
import json
import logging

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from ml_collections import ConfigDict

from seqfair_jax.data import files, tables
from seqfair_jax.data.files import hash_files, locate, log_title
from seqfair_jax.data.readers import log_from_table, read_log
from seqfair_jax.errors import UserError

HEADER = "user_id,item_id,timestamp\n"
LOG = pd.DataFrame({"user_id": [1, 1, 2], "item_id": [10, 11, 10], "timestamp": [1, 2, 3]})


def read(path, content, **options):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_log("csv", [path], {}, **options).frame()


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def json_lines(frame):
    return frame.to_json(orient="records", lines=True)


# --- Several files ---


def test_a_folder_of_parts(tmp_path):
    folder = tmp_path / "log"
    (folder / "nested").mkdir(parents=True)
    for name, content in {
        "part-1.csv": LOG[1:2].to_csv(index=False),
        "part-0.csv.gz": gzip.compress(LOG[:1].to_csv(index=False).encode()),
        "part-2": LOG[2:].to_csv(index=False, sep=";"),
        "part-3": HEADER,  # empty, as some tools write
        "_SUCCESS": "",
        "_metadata": "x",
        ".part-0.csv.crc": "\0",
        "nested/part-9.csv": "x",
    }.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    paths = locate("csv", str(folder))
    assert [path.name for path in paths] == ["part-0.csv.gz", "part-1.csv", "part-2", "part-3"]
    log = read_log("csv", paths, {})
    pd.testing.assert_frame_equal(log.frame(), LOG)
    assert log.counts["rows_read"] == 3


def test_a_pattern(tmp_path, monkeypatch):
    for name in ("a-2.csv", "a-1.csv", ".a-0.csv", "b-1.csv", "x/a-3.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    found = locate("csv", str(tmp_path / "a-*.csv"))
    assert found == [tmp_path / "a-1.csv", tmp_path / "a-2.csv"]
    assert len(locate("csv", str(tmp_path / "**" / "a*.csv"))) == 3
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("csv", "~/b-[0-9].csv") == [tmp_path / "b-1.csv"]
    (tmp_path / "c[1].csv").write_text("")  # a name, although it looks like a pattern
    assert locate("csv", str(tmp_path / "c[1].csv")) == [tmp_path / "c[1].csv"]
    with pytest.raises(UserError, match="z-.*csv: no file is in this pattern"):
        locate("csv", str(tmp_path / "z-*.csv"))
    (tmp_path / "empty" / "day=1").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no file is in this folder; .* give .*/empty/\*/\*"):
        locate("csv", str(tmp_path / "empty") + "/")


def test_parts_with_ids_and_times_of_several_types(tmp_path):
    one, two = tmp_path / "1.parquet", tmp_path / "2.parquet"
    LOG.assign(timestamp=LOG["timestamp"] / 2).to_parquet(one)
    LOG.astype({"user_id": str}).assign(item_id=["10", "07", "x"]).to_parquet(two)
    frame = read_log("csv", [one, two], {}).frame()
    assert frame["user_id"].tolist() == [1, 1, 2, 1, 1, 2]
    assert frame["item_id"].tolist() == ["10", "11", "10", "10", "07", "x"]
    assert frame["timestamp"].tolist() == [0.5, 1, 1.5, 1, 2, 3]


def test_errors_name_the_part_and_its_row(tmp_path):
    good, bad = tmp_path / "1.csv", tmp_path / "2.csv"
    good.write_text(LOG.to_csv(index=False))
    for row, message in [
        ("1,,3", "data row 2 has no item_id"),
        ("1,2,soon", "the timestamp of data row 2 is 'soon'"),
        ("1,2", "Row #3: Expected 3 columns, got 2"),
    ]:
        bad.write_text(HEADER + "1,2,3\n" + row + "\n")
        with pytest.raises(UserError, match=rf"2\.csv.*{message}"):
            read_log("csv", [good, bad], {})
    bad.write_text(HEADER + "1,2,2024-01-01\n")
    with pytest.raises(UserError, match=r"times of .*1\.csv are numbers, .*2\.csv are dates"):
        read_log("csv", [good, bad], {})
    LOG.to_parquet(tmp_path / "3.csv")
    with pytest.raises(UserError, match=r"1\.csv is CSV, but .*3\.csv is Parquet; .* one format"):
        read_log("csv", [good, tmp_path / "3.csv"], {})
    (tmp_path / "4.csv").write_text(HEADER)
    with pytest.raises(UserError, match=r"4\.csv to .*4\.csv \(2 files\) holds no interactions"):
        read_log("csv", [tmp_path / "4.csv"] * 2, {})


def test_dates_of_parts_that_do_not_fit(tmp_path):
    paths = []
    for name, date in [("1.csv", "9999-12-31"), ("2.csv", "2024-01-01T00:00:00.000000001")]:
        paths.append(tmp_path / name)
        paths[-1].write_text(f"{HEADER}1,2,{date}\n")
    with pytest.raises(UserError, match=r"1\.csv: its dates go beyond the years 1678 to 2262"):
        read_log("csv", paths, {})


def test_the_hash_of_parts_is_of_contents_in_order(tmp_path):
    paths = [tmp_path / name for name in "abcd"]
    for path, content in zip(paths, ["x", "y", "x", "xy"], strict=True):
        path.write_text(content)
    a, b, c, d = paths
    assert hash_files([a, b]) == hash_files([c, b])
    assert len({hash_files(p) for p in ([a, b], [b, a], [a], [d], [a, b, b])}) == 5


# --- Formats ---


@pytest.mark.parametrize("pack", [bytes, gzip.compress, bz2.compress])
@pytest.mark.parametrize("name", ["log.jsonl", "log.json", "log.csv"])
def test_json_lines(tmp_path, pack, name):
    text = json_lines(LOG.assign(other=[{"a": 1}, None, [2]]))
    pd.testing.assert_frame_equal(read(tmp_path / name, pack(text.encode())), LOG)
    text = json_lines(LOG.astype(str)).replace("\n", "\r\n\r\n")  # blank lines
    pd.testing.assert_frame_equal(read(tmp_path / name, pack(b"\xef\xbb\xbf" + text.encode())), LOG)


def test_json_values_are_as_written(tmp_path):
    records = [{"user_id": "07", "item_id": 1, "timestamp": 1.5},
               {"user_id": 7, "item_id": 12345678901234567890, "timestamp": 2}]  # fmt: skip
    found = read(tmp_path / "log.jsonl", lines(*records))
    assert found["user_id"].tolist() == ["07", "7"]
    assert found["item_id"].tolist() == ["1", "12345678901234567890"]
    assert found["timestamp"].tolist() == [1.5, 2]
    # A text after the first lines were numbers, and a key that comes late.
    many = [{"user_id": n, "item_id": 1, "timestamp": n, "x": n} for n in range(1500)]
    found = read(tmp_path / "log.jsonl", lines(*many, {**records[0], "timestamp": 9}))
    assert found["user_id"].tolist() == [*map(str, range(1500)), "07"]


def test_a_long_line_of_json(tmp_path):
    records = [{"user_id": "x" * 2**23, "item_id": 1, "timestamp": 1},
               {"user_id": "b", "item_id": 2, "timestamp": 2}]  # fmt: skip
    users = read(tmp_path / "log.jsonl", lines(*records[::-1]))["user_id"].tolist()
    assert users == ["b", records[0]["user_id"]]
    with pytest.raises(UserError, match="line 1 is longer than 1,048,576 bytes"):
        read(tmp_path / "log.jsonl", lines(*records))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"user_id": 1}\n', "no column 'item_id', it has user_id"),
        ('{"user_id": 1, "item_id": 2, "timestamp": 3}\n{"user_id": 1,\n', "line 2 is not JSON"),
        (
            '[{"user_id": 1, "item_id": 2, "timestamp": 3}]\n',
            "line 1 is not a JSON object; each line",
        ),
        ('{\n"user_id": 1,\n"item_id": 2, "timestamp": 3}', "line 1 is not JSON.*each line must"),
        (
            lines({"user_id": [1], "item_id": 2, "timestamp": 3}),
            "line 1: user_id is a list; expected text or a number",
        ),
        (
            lines(*[{"user_id": 1, "item_id": 2, "timestamp": 3}] * 2000) + "7\n",
            "line 2001 is not a JSON object; each line must be one",
        ),
        (
            lines({"user_id": 1, "item_id": None, "timestamp": 3}),
            "data row 1 has no item_id",
        ),
    ],
)
def test_bad_json_lines(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"log\.jsonl.*{message}"):
        read(tmp_path / "log.jsonl", content)


def test_recbole_files(tmp_path):
    text = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    text += "1\t10\t5\t1.0\n1\t11\t4\t2.0\n2\t10\t3\t3.0\n"
    found = read(tmp_path / "log.inter", text)
    pd.testing.assert_frame_equal(found, LOG.astype({"timestamp": float}))
    # Where not every name has a type, colons are part of the names.
    found = read(tmp_path / "log.csv", "user_id,item_id,timestamp,a:token\n1,2,3,4\n")
    assert found.to_numpy().tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="no column 'user_id', it has user_id:token, item_id"):
        read(tmp_path / "log.csv", "user_id:token,item_id,timestamp\n1,2,3\n")


def test_the_delimiter_can_be_given(tmp_path):
    text = "user_id;item_id;timestamp\n1,5;2;3\n".replace(";", "#")
    with pytest.raises(UserError, match="no column 'user_id'"):
        read(tmp_path / "log.csv", text)
    assert read(tmp_path / "log.csv", text, delimiter="#")["user_id"].tolist() == ["1,5"]
    with pytest.raises(UserError, match="no column 'user_id', it has user_id#item_id#timestamp"):
        read(tmp_path / "log.csv", text, delimiter=";")


def test_threads_and_one_thread_read_the_same(tmp_path, monkeypatch):
    """Blocks are parsed side by side; ids of several blocks keep their places."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"user_id": [f"u{n}" for n in rng.integers(500, size=5000)],
                          "item_id": [f"i{n}" for n in rng.integers(50, size=5000)],
                          "timestamp": range(5000)})  # fmt: skip
    monkeypatch.setattr(tables, "_BLOCK", 2**10)
    for text in (frame.to_csv(index=False), json_lines(frame)):
        pd.testing.assert_frame_equal(read(tmp_path / "log", text), frame)
    bad = frame.to_csv(index=False) + "u1,i1\n"
    with pytest.raises(UserError, match="Row #5002: Expected 3 columns, got 2"):
        read(tmp_path / "log", bad)
    quoted = frame.assign(item_id='"' + frame["item_id"] + '"').to_csv(index=False, quoting=3)
    pd.testing.assert_frame_equal(read(tmp_path / "log", quoted + "\n\n"), frame)
    with pytest.raises(UserError, match="row of line 5004 has a quotation mark"):
        read(tmp_path / "log", quoted + '\n\nu1,"i1,1\nu2,i"2,3\n')


def test_a_bar_shows_the_reading_of_a_large_file(tmp_path, monkeypatch):
    class Bar:
        """Remembers how far it came."""

        def __init__(self, *, total, desc, disable, **_):
            self.n, self.total, self.desc, self.disable = 0, total, desc, disable
            bars.append(self)

        def update(self, n=1):
            self.n += n

        def close(self):
            pass

        __enter__, __exit__ = lambda self: self, lambda self, *_: None

    monkeypatch.setattr(files, "tqdm", Bar)
    contents = {"a.csv": LOG.to_csv(index=False).encode()}
    contents["b.csv.gz"] = gzip.compress(contents["a.csv"])
    contents["c.parquet"] = LOG.to_parquet()
    for limit, disable in [(1, None), (2**40, True)]:
        monkeypatch.setattr(files, "SHOW_PROGRESS", limit)
        for name, content in contents.items():
            bars = []
            read(tmp_path / name, content)
            (bar,) = bars
            assert bar.desc == f"reading {name}"
            assert bar.n == bar.total == (1 if "parquet" in name else len(content))
            assert bar.disable is disable  # None: where it is a terminal


# --- Column names ---


@pytest.mark.parametrize(
    "names",
    [
        ("userId", "movieId", "timestamp"),  # MovieLens
        ("visitorid", "itemid", "timestamp"),  # Retailrocket
        ("user_id", "product_id", "event_time"),  # REES46
        ("customer_id", "article_id", "t_dat"),  # H&M
        ("reviewerID", "asin", "unixReviewTime"),  # Amazon
        ("session_id", "item_id", "date"),  # RecSys challenge 2022
        (" User-ID", "ISBN ", "When"),
        ("UID", "SKU", "created_at"),
    ],
)
@pytest.mark.parametrize("form", ["csv", "json", "parquet", "table"])
def test_the_usual_names(tmp_path, caplog, names, form):
    frame = LOG.set_axis(list(names), axis=1).assign(Other=1)
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        if form == "table":
            found = log_from_table(frame).frame()
        else:
            content = {"csv": frame.to_csv(index=False), "json": json_lines(frame),
                       "parquet": frame.to_parquet()}[form]  # fmt: skip
            found = read(tmp_path / "log", content)
    pd.testing.assert_frame_equal(found, LOG)
    for key, name in zip(LOG.columns, names, strict=True):
        assert (f"{key} is column {name!r}" in caplog.text) == (key != name)


def test_names_of_two_columns(tmp_path):
    text = "customer_id,member_id,item_id,time\n1,2,3,4\n"
    with pytest.raises(UserError, match=r"log\.csv: customer_id and member_id may each be the "
                       "user_id; name the column in data.columns.user_id"):  # fmt: skip
        read(tmp_path / "log.csv", text)
    columns = {"user_id": "member_id"}
    found = read_log("csv", [tmp_path / "log.csv"], columns).frame()
    assert found["user_id"].tolist() == [2]
    # The plain name comes before the others.
    text = "session_id,User_ID,item_id,time,date\n1,2,3,4,5\n"
    with pytest.raises(UserError, match="time and date may each be the timestamp"):
        read(tmp_path / "log.csv", text)
    found = read(tmp_path / "log.csv", text.replace(",date", ",timestamp"))
    assert found.to_numpy().tolist() == [[2, 3, 5]]
    with pytest.raises(UserError, match="column user_id appears more than once"):
        read(tmp_path / "log.csv", text.replace("session_id", " user_id").replace(",date", ",x"))


def test_one_message_names_all_columns_that_are_not_found(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("Kunde,Artikel,Zeit\n1,2,3\n")
    message = r"no column 'user_id', it has Kunde.*; item_id and timestamp are not found either$"
    with pytest.raises(UserError, match=message):
        read_log("csv", [path], {})
    with pytest.raises(UserError, match=r"no column 'item_id'.*; timestamp is not found either$"):
        read_log("csv", [path], {"user_id": "Kunde"})
    with pytest.raises(UserError, match=r"; name the column in data\.columns\.timestamp$"):
        read_log("csv", [path], {"user_id": "Kunde", "item_id": "Artikel"})


def test_a_named_column_is_never_replaced(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("visitorid,item_id,timestamp,Buyer \n1,2,3,4\n")
    with pytest.raises(UserError, match="no column 'user_id'.*name the column in data.columns"):
        read_log("csv", [path], {"user_id": "user_id"})
    assert read_log("csv", [path], {"user_id": "buyer"}).frame()["user_id"].tolist() == [4]
    with pytest.raises(UserError, match="names one column of .* twice: item_id, item_id"):
        read_log("csv", [path], {"user_id": "item_id"})


# --- Tables in memory ---


class Polars:
    """What polars has: `to_arrow`, with text as string views."""

    def __init__(self, frame):
        table = pa.Table.from_pandas(frame, preserve_index=False)
        views = [f.with_type(pa.string_view()) if f.type == pa.large_string() else f
                 for f in table.schema]  # fmt: skip
        self.to_arrow = lambda: table.cast(pa.schema(views))


@pytest.mark.parametrize(
    "make",
    [
        lambda frame: frame,
        lambda frame: frame.set_axis([5, 1, 9], axis=0),  # the index is no column
        pa.Table.from_pandas,
        lambda frame: pa.RecordBatch.from_pandas(frame, preserve_index=False),
        Polars,
    ],
)
def test_tables_in_memory(make):
    frame = LOG.assign(user_id=["b", "NA", "b"], timestamp=pd.to_datetime(LOG["timestamp"]))
    log = log_from_table(make(frame))
    assert log.frame().to_numpy().tolist() == frame.to_numpy().tolist()
    assert log.user_ids.tolist() == ["NA", "b"]
    assert log.users.tolist() == [1, 0, 1]
    assert log.users.dtype == np.int32


def test_the_c_stream_of_other_libraries():
    class Stream:
        def __arrow_c_stream__(self, requested_schema=None):
            return pa.Table.from_pandas(LOG).__arrow_c_stream__(requested_schema)

    pd.testing.assert_frame_equal(log_from_table(Stream()).frame(), LOG)


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (LOG.assign(item_id=[1, None, 3]), "the table: data row 2 has no item_id"),
        (LOG.assign(item_id=[1.5, 2, 3]), "the table: the item_id of data row 1 is the float 1.5"),
        (LOG.assign(timestamp=[1, 2, np.inf]), "the table: the timestamp of data row 3 is inf"),
        (LOG.assign(timestamp="soon"), "the table: the timestamp of data row 1 is 'soon'"),
        (LOG.drop(columns="item_id"), "the table: no column 'item_id'"),
        (LOG.assign(item_id=[1, "a", 3]), "the table: the values of column item_id are not of one"),
        (LOG.assign(item_id=[1, 2**70, 3]), "the values of column item_id are not of one type"),
        (
            LOG.assign(item_id=pd.Series(["a", "\ud800", "b"], dtype=object)),
            "the values of column item_id are not of one",
        ),
        (LOG.set_index("item_id"), r"index \(item_id\) is not read: give table.reset_index"),
        (LOG["item_id"], "expected a table of pandas, polars or pyarrow, found Series"),
        (LOG[:0], "the table holds no interactions"),
        (LOG.to_dict(), "expected a table of pandas, polars or pyarrow, found dict"),
    ],
)
def test_tables_that_cannot_be_used(frame, message):
    with pytest.raises(UserError, match=message):
        log_from_table(frame)


def test_movielens_100k_of_recbole(real_data, caplog):
    path = real_data / "ml-100k" / "ml-100k.inter.gz"
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        log = read_log("csv", [path], {})
    assert log.counts["raw_rows"] == 100_000
    assert (log.counts["raw_users"], log.counts["raw_items"]) == (943, 1_682)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: columns are separated by '\\t'"
    ]


@pytest.mark.parametrize(
    ("path", "title"),
    [
        ("a/events.2024.csv.gz", "events.2024"),
        ("logs/", "logs"),
        ("logs/2024-*.csv", "2024-*"),
        (".hidden", ".hidden"),
        (".", "csv"),
        ("one\ntwo.csv", "one two"),
    ],
)
def test_a_log_is_called_by_the_name_of_its_file(path, title):
    data = ConfigDict({"name": "csv", "title": "", "path": path})
    assert log_title(data) == title
    data.title = "Shop"
    assert log_title(data) == "Shop"
    assert log_title(ConfigDict({"name": "ml1m", "title": "", "path": path})) == "ml1m"
