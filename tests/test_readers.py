import bz2
import gzip
import io
import json
import logging
import lzma
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqfair_jax.data import files
from seqfair_jax.data.files import locate, open_file
from seqfair_jax.data.readers import Rows, log_from_table, read_log
from seqfair_jax.errors import UserError

COLUMNS = {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp"}
HEADER = "user_id,item_id,timestamp\n"
LOG = pd.DataFrame({"user_id": [1, 1, 2], "item_id": [10, 11, 10], "timestamp": [1, 2, 3]})
RATINGS = "1::7::5::100\n2::8::4::200\n"
U_DATA = "196\t242\t3\t881250949\n186\t302\t4\t891717742\n"  # of MovieLens-100K
# The layout of Retailrocket's publisher: a transaction number in rows of transactions alone.
EVENTS = """timestamp,visitorid,event,itemid,transactionid
1433221332117,257597,view,355908,
1433224214164,992329,view,248676,
1433222276276,599528,transaction,356475,4000
1433223236124,121688,addtocart,15335,
1433221332117,257597,view,15335,
"""


def read(path, content, name="csv", columns=COLUMNS, **options):
    """The log in a file of that content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_log(name, [path], columns, **options).frame()


def zipped(members, compression=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def parquet(**columns):
    file = io.BytesIO()
    pq.write_table(pa.table({"user_id": [1, 2], "item_id": [3, 4], "timestamp": [5, 6]} | columns),
                   file)  # fmt: skip
    return file.getvalue()


def zstd(content):
    return pa.compress(content, "zstd", asbytes=True)


PACKERS = {
    "plain": lambda content: content,
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
    "zip": lambda content: zipped({"folder/a.csv": content}),
    "macOS zip": lambda content: zipped(
        {"__MACOSX/._a.csv": b"x", ".DS_Store": b"x", "folder/": b"", "folder/a.csv": content}
    ),
}


# --- Kinds of files ---


@pytest.mark.parametrize("name", ["log.csv", "log.GZ", "log.zip", "log"])
@pytest.mark.parametrize("packer", PACKERS)
def test_the_content_says_what_a_file_is(tmp_path, name, packer):
    renamed = LOG.rename(columns={"user_id": "customer"})
    columns = COLUMNS | {"user_id": "customer"}
    text = PACKERS[packer](renamed.to_csv(index=False).encode())
    pd.testing.assert_frame_equal(read(tmp_path / name, text, columns=columns), LOG)
    table = PACKERS[packer](renamed.to_parquet())
    pd.testing.assert_frame_equal(read(tmp_path / name, table, columns=columns), LOG)


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_other_delimiters_are_found(tmp_path, caplog, delimiter):
    text = LOG.assign(text="a, b, c, d").to_csv(index=False, sep=delimiter)
    with caplog.at_level(logging.INFO, "seqfair_jax"):
        found = read(tmp_path / "log.csv", text)
    pd.testing.assert_frame_equal(found, LOG)
    assert f"separated by {delimiter!r}" in caplog.text


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path):
    text = b"\xef\xbb\xbf" + LOG.to_csv(index=False).encode()
    pd.testing.assert_frame_equal(read(tmp_path / "log.csv", text), LOG)


@pytest.mark.parametrize("packer", PACKERS)
@pytest.mark.parametrize(
    ("encoding", "setting"),
    [
        ("cp1252", "cp1252"),
        ("utf-16", ""),
        ("utf-16-be", "utf-16-be"),
        ("utf-16", "cp1252"),
        ("utf-32", "utf-32"),
        ("utf-8-sig", "cp1252"),
        ("utf-8", "UTF8"),
    ],
)
def test_a_text_in_another_encoding_is_read(tmp_path, packer, encoding, setting):
    log = LOG.assign(user_id=["Zoë", "Zoë", "€"])
    mixed = log.assign(item_id=[10, "11", 10])  # such JSON is read line by line
    lines = {"orient": "records", "lines": True, "force_ascii": False}
    for name, text in (
        ("log.csv", log.to_csv(index=False, sep=";")),
        ("log.jsonl", log.to_json(None, **lines)),
        ("mixed.jsonl", mixed.to_json(None, **lines)),
    ):
        packed = PACKERS[packer](text.encode(encoding))
        pd.testing.assert_frame_equal(read(tmp_path / name, packed, encoding=setting), log)
    table = PACKERS[packer](log.to_parquet())  # which has no encoding
    pd.testing.assert_frame_equal(read(tmp_path / "log", table, encoding="cp1252"), log)


def test_what_the_bytes_say_comes_before_the_setting(tmp_path, caplog):
    """An archive is known by its first bytes, and UTF-8 is improbable by chance."""
    once = gzip.compress(LOG.to_csv(index=False).encode()) + b"\x81"  # no byte of cp1252
    with pytest.raises(UserError, match="is compressed twice"):
        read(tmp_path / "log.csv", gzip.compress(once), encoding="cp1252")
    for user, warned in (("Zoe", False), ("Zoë", True)):
        caplog.clear()
        read(tmp_path / "log.csv", LOG.assign(user_id=user).to_csv(index=False), encoding="cp1252")
        assert ("reads as UTF-8 too, but data.encoding is cp1252" in caplog.text) == warned
    with pytest.raises(UserError, match=r"no text in cp1252 \(.*\): set data.encoding to its enc"):
        read(tmp_path / "log.csv", HEADER.encode() + b"\x81,1,2\n", encoding="cp1252")


def test_where_no_setting_can_help_only_utf_8_is_named(tmp_path):
    with pytest.raises(
        UserError, match=r"no text in UTF-8 \(.*\): save it as UTF-8; expected rows"
    ):
        read(tmp_path / "ratings.dat", b"\xe4::2::3::4\n", name="ml1m")


def test_characters_that_reads_cut_in_two_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("seqfair_jax.data.files.CHUNK", 5)
    path, text = tmp_path / "log.csv", "Zoë €5 😀 " * 4
    path.write_bytes(text.encode("utf-16"))
    with open_file(path) as stream:
        found = b"".join(iter(lambda: stream.read(3), b""))
    assert found.decode() == text


def json_lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


def test_nan_in_json_is_a_missing_value(tmp_path):
    """As Python writes it."""
    users = ("x", float("nan"))
    text = json_lines(*({"user_id": user, "item_id": "a", "timestamp": 1} for user in users))
    assert "NaN" in text
    with pytest.raises(UserError, match="data row 2 has no user_id"):
        read(tmp_path / "log.jsonl", text)
    found = read(tmp_path / "log.jsonl", text, rows=Rows(missing="drop"))
    assert found["user_id"].tolist() == ["x"]


def test_numbers_in_json_are_one_id_wherever_they_are(tmp_path):
    floats = [{"user_id": 5.0, "item_id": 1, "timestamp": 1.5}, {"user_id": 7, "item_id": 1.0}]
    for first in (0, 1_500):  # beyond the lines whose types are looked at first
        rows = [{"user_id": 5, "item_id": 1, "timestamp": 1}] * first
        for item in (1, "text"):
            last = [row | {"timestamp": 2} for row in floats]
            last.append({"user_id": 9, "item_id": item, "timestamp": 3})
            found = read(tmp_path / "log.jsonl", json_lines(*rows, *last))
            assert set(found["user_id"]) == {5, 7, 9}
            assert set(map(str, found["item_id"])) == {"1", str(item)}


def test_a_key_may_be_absent_in_the_first_lines(tmp_path):
    rows = [{"session": "s", "timestamp": 1, "item_id": 4}] * 1_200
    text = json_lines(*rows, {"user_id": "x", "item_id": 4, "timestamp": 2})
    found = read(tmp_path / "log.jsonl", text, rows=Rows(missing="drop"))
    assert found["user_id"].tolist() == ["x"]


@pytest.mark.parametrize("mark", ["sep=;", "SEP=;", "\ufeffsep=;"])
def test_the_first_line_may_name_the_separator(mark, tmp_path):
    text = f"{mark}\nuser_id;item_id;timestamp\n1;2;3\n"
    assert read(tmp_path / "log.csv", text).to_numpy().tolist() == [[1, 2, 3]]
    with pytest.raises(UserError, match="data row 2 is 'soon'"):
        read(tmp_path / "log.csv", text + "1;2;soon\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[\n{"user_id": 1}\n]', "line 1 is not JSON .*; each line must be a JSON object: `jq"),
        ('{\n"user_id": 1\n}', "line 1 is not JSON .*`jq -c . FILE` those that have several"),
        (
            '{"user_id": {"id": 1}, "item_id": 1, "timestamp": 1}',
            "line 1: user_id is a dict; .*flatten the file first",
        ),
    ],
)
def test_other_json_says_how_to_write_it(text, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(tmp_path / "log.json", text)


def test_decimal_commas_are_named(tmp_path):
    text = "user_id;item_id;timestamp;rating\n1;2;3;4,5\n1;3;17,0;4,0\n"
    with pytest.raises(UserError, match="'4,5', the first of 2 such rows; .* a point in place of"):
        read(tmp_path / "log.csv", text, rows=Rows(min_rating=1.0))
    with pytest.raises(UserError, match="timestamp of data row 2 is '17,0'; .* a point in"):
        read(tmp_path / "log.csv", text)


def test_json_may_have_line_separators_in_its_texts(tmp_path):
    lines = {"orient": "records", "lines": True, "force_ascii": False}
    text = LOG.assign(note=["a\u2028b", "\u2029", "\x85"]).to_json(None, **lines)
    pd.testing.assert_frame_equal(read(tmp_path / "log.jsonl", text), LOG)
    text = LOG.to_json(None, **lines).replace("\n", "\r\n")
    pd.testing.assert_frame_equal(read(tmp_path / "log.jsonl", text), LOG)


def test_only_the_wanted_columns_are_read(tmp_path):
    text = b"user_id,note,item_id,timestamp,count\n1,\xff,10,1,\n1,,11,2,7\n2,NA,10,3,x\n"
    pd.testing.assert_frame_equal(read(tmp_path / "log.csv", text), LOG)
    lists = LOG.assign(tags=[[1], [2], None]).to_parquet()
    pd.testing.assert_frame_equal(read(tmp_path / "log.parquet", lists), LOG)
    indexed = LOG.set_index("user_id").to_parquet()
    pd.testing.assert_frame_equal(read(tmp_path / "log.parquet", indexed), LOG)


def test_retailrocket_as_its_publisher_ships_it(tmp_path):
    found = read(tmp_path / "events.csv", EVENTS, "retailrocket")
    assert found.to_numpy().tolist() == [
        [257597, 355908, 1433221332117],
        [992329, 248676, 1433224214164],
        [257597, 15335, 1433221332117],
    ]
    kaggle = zipped({"category_tree.csv": "a,b\n", "events.csv": EVENTS})
    pd.testing.assert_frame_equal(read(tmp_path / "a.zip", kaggle, "retailrocket"), found)
    with pytest.raises(UserError, match="no interactions of event 'view'"):
        read(tmp_path / "events.csv", EVENTS.replace("view", "look"), "retailrocket")
    # Rows are counted as in the file, not among the views.
    blank = EVENTS.replace("15335,\n", ",\n")
    with pytest.raises(UserError, match=r"data row 5 has no itemid;"):
        read(tmp_path / "events.csv", blank, "retailrocket")
    late = EVENTS.replace("1433221332117,257597,view,15335", "late,257597,view,15335")
    with pytest.raises(UserError, match="timestamp of data row 5 is 'late'"):
        read(tmp_path / "events.csv", late, "retailrocket")


def test_movielens_reads_its_separator(tmp_path):
    found = read(tmp_path / "ratings.dat", RATINGS, "ml1m")
    assert found.to_numpy().tolist() == [[1, 7, 100], [2, 8, 200]]
    with pytest.raises(UserError, match=r"ratings\.dat.*Row #3.*UserID::MovieID::Rating::Time"):
        read(tmp_path / "ratings.dat", RATINGS + "3::9\n", "ml1m")


def test_movielens_100k_as_its_publisher_ships_it_and_of_recbole(tmp_path, caplog):
    found = read(tmp_path / "u.data", U_DATA, "ml100k")
    assert found.to_numpy().tolist() == [[196, 242, 881250949], [186, 302, 891717742]]
    publisher = zipped({"ml-100k/u1.base": "x", "ml-100k/u.data": U_DATA, "ml-100k/u.user": "y"})
    pd.testing.assert_frame_equal(read(tmp_path / "ml-100k.zip", publisher, "ml100k"), found)
    header = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"
    recbole = gzip.compress((header + U_DATA).encode())
    pd.testing.assert_frame_equal(read(tmp_path / "ml-100k.inter.gz", recbole, "ml100k"), found)
    assert not caplog.records
    with pytest.raises(UserError, match=r"u\.data.*Row #3: Expected 4 columns, got 3"):
        read(tmp_path / "u.data", U_DATA + "1\t2\t3\n", "ml100k")
    liked = read_log("ml100k", [tmp_path / "ml-100k.zip"], {}, Rows(min_rating=4))
    assert liked.frame()["item_id"].tolist() == [302]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty"),
        ("\n\n", "is empty"),
        (HEADER, "no interactions"),
        ("user_id,item_ids,timestamp\n1,2,3\n", "no column 'item_id'.*did you mean 'item_ids'"),
        ("user_id,item_id,user_id,timestamp\n1,2,3,4\n", "user_id appears more than once"),
        (HEADER + "1,2,3\n1,,4\n", "data row 2 has no item_id"),
        (HEADER + "1,2,3\n1,5,soon\n", "data row 2 is 'soon'"),
        (HEADER + "1,2,3\n1,5,\n", "data row 2 has no timestamp;.*drop"),
        (HEADER + "1,2,3\n1,5,inf\n", "data row 2 is 'inf'"),
        (HEADER + "1,2,3\n1,5,nan\n", "data row 2 is 'nan'"),
        (HEADER + "1,2,2020-01-01\n1,5,12020-01-01\n", "data row 2 is '12020-01-01'"),
        (HEADER + "1,2,3\n1,5\n", r"cannot be read.*Row #3: Expected 3 columns, got 2"),
        (HEADER + '1,2,3\n1,"5,4\n1,6,5\n', "row of line 3 has a quotation mark"),
        (HEADER + '1,2,3\n\n1,"5,4\n1,6",5\n', "row of line 4 has a quotation mark"),
        (HEADER.encode() + b"1,2,3\n\xe4,5,4\n", r"no text in UTF-8 .*Row #3.*: set data.encoding"),
        ("größe,item_id\n".encode("cp1252"), "no text in UTF-8 .*: set data.encoding to its"),
        (
            '{"user_id": "ö", "item_id": 1, "timestamp": 2}'.encode("cp1252"),
            "no text in UTF-8 .*: set data.encoding to its",
        ),
        (HEADER.encode("utf-16-le"), r"no text in UTF-8 \(its first line has NUL characters"),
        ('{"user_id": 1}\n'.encode("utf-16-le"), r"no text in UTF-8 \(its first line has NUL"),
        (("\ufeff" + HEADER).encode("utf-16-le") + b"\0", r"no text in utf-16 \(truncated data"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(9), "is a 7z archive: unpack it"),
        (gzip.compress(gzip.compress(b"a,b\n")), "compressed twice"),
        (parquet(user_id=["ab", "cd"]).replace(b"cd", b"c\xff"), "cannot be read: .*UTF8"),
        (b"PAR1" + bytes(40) + b"PAR1", "cannot be read: .*thrift"),
        (zipped({"a.csv": "", "b.csv": ""}), "expected one file in it, found 2.*a.csv, b.csv"),
        (zipped({}), "expected one file in it, found 0.*holds nothing"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path / "log.csv", content)
    assert str(tmp_path / "log.csv") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_swallowed_row_is_found_in_an_unneeded_column(tmp_path):
    rows = ['1,2,3,"one', "1,3,4,two", '1,4,5,"', "1,5,6,three"]
    text = "user_id,item_id,timestamp,note\n" + "\n".join(rows)
    with pytest.raises(UserError, match="row of line 2 has a quotation mark"):
        read(tmp_path / "log.csv", text)
    quoted = HEADER.strip() + ',note\n1,10,1,"a ""b"", c"\n1,11,2,5" pipe\n2,10,3,"d"\n'
    pd.testing.assert_frame_equal(read(tmp_path / "log.csv", quoted), LOG)


def test_one_column_cannot_be_two(tmp_path):
    with pytest.raises(UserError, match="names one column of .*log.csv twice: user_id, user_id"):
        read(tmp_path / "log.csv", HEADER + "1,2,3\n", columns=COLUMNS | {"item_id": "user_id"})


# --- Archives ---


def damage(content, place, *values):
    return content[:place] + bytes(values) + content[place + len(values) :]


TEXT = LOG.to_csv(index=False).encode() * 50
STORED = zipped({"a.csv": TEXT}, zipfile.ZIP_STORED)
CENTRAL = STORED.index(b"PK\x01\x02")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (damage(gzip.compress(TEXT), 12, *bytes(28)), ""),
        (gzip.compress(TEXT)[:-20], "end-of-stream"),
        (gzip.compress(TEXT) + b"trailing", "gzip"),
        (damage(bz2.compress(TEXT), 20, *bytes(28)), "Invalid data"),
        (damage(lzma.compress(TEXT), 40, *bytes(28)), "Corrupt"),
        (damage(zstd(TEXT), 10, *bytes(28)), "ZSTD"),
        (damage(STORED, 60, 0), "CRC"),
        (STORED[:-30], "not a zip file"),
        (damage(zipped({"a.csv": TEXT}), 40, *bytes(28)), ""),
        (damage(damage(STORED, 6, 1), CENTRAL + 8, 1), "encrypted"),
        (damage(damage(STORED, 8, 99), CENTRAL + 10, 99), "compression method"),
        (damage(zipped({"a.csv": TEXT}, zipfile.ZIP_BZIP2), 60, *bytes(28)), "Invalid data"),
        (damage(zipped({"a.csv": TEXT}, zipfile.ZIP_LZMA), 60, *bytes(28)), ""),
    ],
)
def test_damaged_archives(tmp_path, content, message):
    with pytest.raises(UserError, match=rf"log\.csv cannot be read: .*{message}"):
        read(tmp_path / "log.csv", content)


@pytest.mark.parametrize("packer", ["gzip", "bzip2", "xz", "zstd", "zip"])
def test_a_decompression_bomb_is_stopped_early(tmp_path, monkeypatch, packer):
    path = tmp_path / "bomb"
    path.write_bytes(PACKERS[packer](HEADER.encode() + bytes(2**26)))
    assert path.stat().st_size < 2**17
    monkeypatch.setattr(files, "MAX_UNPACKED", 2**21)
    tracemalloc.start()
    with pytest.raises(UserError, match="bomb holds more than 2,097,152 bytes once unpacked"):
        read_log("csv", [path], COLUMNS)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_small_file_needs_little_memory(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text(LOG.to_csv(index=False))
    tracemalloc.start()
    read_log("csv", [path], COLUMNS)
    assert tracemalloc.get_traced_memory()[1] < 2**24  # not the limit's size
    tracemalloc.stop()


def test_a_parquet_file_of_repeated_values_is_measured_before_it_is_read(tmp_path, monkeypatch):
    rows = 2**20
    table = pa.table(dict.fromkeys(COLUMNS, pa.repeat(1, rows)))
    pq.write_table(table, tmp_path / "log.parquet")
    assert (tmp_path / "log.parquet").stat().st_size < 2**14
    monkeypatch.setattr(files, "MAX_UNPACKED", 24 * rows - 1)
    with pytest.raises(UserError, match="holds more than"):
        read_log("csv", [tmp_path / "log.parquet"], COLUMNS)
    monkeypatch.setattr(files, "MAX_UNPACKED", 24 * rows)
    assert len(read_log("csv", [tmp_path / "log.parquet"], COLUMNS)) == rows


# --- Ids ---


def test_ids_stay_as_they_are_written(tmp_path):
    long = ["12345678901234567890", "12345678901234567891"]
    found = read(tmp_path / "a.csv", HEADER + f"{long[0]},07,1\n{long[1]},7,2\n")
    assert found["user_id"].tolist() == long
    assert found["item_id"].tolist() == ["07", "7"]


@pytest.mark.parametrize(
    "texts", [["NA", "null"], ["None", "nan"], ["N/A", " "], ["a\0", "a"], ["x" * 2**22, "true"]]
)
def test_every_text_is_an_id(tmp_path, texts):
    found = read(tmp_path / "a.csv", HEADER + f"{texts[0]},{texts[1]},1\n{texts[1]},5,2\n")
    assert found["user_id"].tolist() == texts
    assert found["item_id"].tolist() == [texts[1], "5"]
    assert found["user_id"].nunique() == 2
    found = read(tmp_path / "a.parquet", parquet(user_id=texts))
    assert found["user_id"].tolist() == texts


@pytest.mark.parametrize(
    ("users", "expected"),
    [
        (pa.array([1.0, 2.0]), [1, 2]),
        (pa.array([1, 2], pa.uint8()), [1, 2]),
        (pa.array(["b", "a"]).dictionary_encode(), ["b", "a"]),
        (pa.array(["2", "1"], pa.string_view()), [2, 1]),
        (pa.array([20, 10]).cast(pa.decimal128(20)), [20, 10]),
    ],
)  # fmt: skip
def test_types_of_ids_in_parquet(tmp_path, users, expected):
    assert read(tmp_path / "a.parquet", parquet(user_id=users))["user_id"].tolist() == expected


@pytest.mark.parametrize(
    ("users", "message"),
    [
        (pa.array([1.0, 1.5]), "user_id of data row 2 is the float 1.5"),
        (pa.array([1.0, 2.0**60]), "user_id of data row 2 is the float"),
        (pa.array([1.0, np.inf]), "user_id of data row 2 is the float inf"),
        (pa.array([1.0, np.nan]), "data row 2 has no user_id"),
        (pa.array([1, None]), "data row 2 has no user_id"),
        (pa.array(["a", ""]), "data row 2 has no user_id"),
        (pa.array([None, None]), "2 rows have no user_id, the first of them data row 1"),
        (pa.array([[1], [2]]), "column user_id is of type list<.*expected integers or text"),
        (pa.array([b"a", b"b"]), "column user_id is of type binary"),
        (pa.array([True, False]), "column user_id is of type bool"),
    ],
)
def test_bad_ids_in_parquet(tmp_path, users, message):
    with pytest.raises(UserError, match=rf"a\.parquet: .*{message}"):
        read(tmp_path / "a.parquet", parquet(user_id=users))


# --- Times ---


def times_of(path, *texts):
    rows = [f"1,{place},{text}" for place, text in enumerate(texts)]
    return read(path, HEADER + "\n".join(rows))["timestamp"]


@pytest.mark.parametrize("zone", ["", "Z", " UTC", " GMT", "+02:00"])
def test_dates(tmp_path, zone):
    texts = [f"2024-01-01T00:00:01{zone}", f"2024-01-01 00:00:00{zone}"]
    times = times_of(tmp_path / "log.csv", *texts)
    start = pd.Timestamp("2024-01-01") - pd.Timedelta(hours=2 if zone == "+02:00" else 0)
    assert times.tolist() == [start + pd.Timedelta(seconds=1), start]
    stamps = pd.to_datetime([text.replace(" UTC", "Z").replace(" GMT", "Z") for text in texts],
                            format="ISO8601")  # fmt: skip
    found = read(tmp_path / "log.parquet", parquet(timestamp=pa.array(stamps)))
    assert found["timestamp"].tolist() == times.tolist()


def test_times_keep_their_order(tmp_path):
    path = tmp_path / "log.csv"
    close = [2**60 + 1, 2**60]  # one float
    assert times_of(path, *close).tolist() == close
    assert times_of(path, "1.5", "2").tolist() == [1.5, 2]
    years = times_of(path, "2300-01-01", "1500-01-01", "9999-12-31")  # beyond nanoseconds
    assert years.argsort().tolist() == [1, 0, 2]
    nanoseconds = times_of(path, "2024-01-01T00:00:00.000000002", "2024-01-01T00:00:00.000000001")
    assert nanoseconds.argsort().tolist() == [1, 0]
    dates = pa.array(["2300-01-01", "1500-01-01"]).cast(pa.date32())
    found = read(tmp_path / "a.parquet", parquet(timestamp=dates))
    assert found["timestamp"].argsort().tolist() == [1, 0]


@pytest.mark.parametrize(
    "times",
    [
        pa.array([1, None]),
        pa.array([1.0, None]),
        pa.array([1.0, np.nan]),
        pa.array([1, None], pa.timestamp("us")),
        pa.array([1, None], pa.timestamp("ns", tz="Europe/Vienna")),
    ],
)
def test_a_missing_time_is_refused(tmp_path, times):
    with pytest.raises(UserError, match="data row 2 has no timestamp"):
        read(tmp_path / "log.parquet", parquet(timestamp=times))
    with pytest.raises(UserError, match="timestamp of data row 2 is inf"):
        read(tmp_path / "log.parquet", parquet(timestamp=pa.array([1.0, np.inf])))
    with pytest.raises(UserError, match="column timestamp is of type list"):
        read(tmp_path / "log.parquet", parquet(timestamp=pa.array([[1], [2]])))


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        # Several zones; without one it is UTC.
        (["2024-01-01T00:00:00Z", "2024-01-01T01:00:00+02:00"], [0, -3600]),
        (["2024-01-01 00:00:00", "2024-01-01T00:00:01-0100", "2024-01-01"], [0, 3601, 0]),
        (["2024-01-01 00:00:02 UTC", "2024-01-01 00:00:01"], [2, 1]),
        (["2024-01-01 00:00:00.25 UTC", "2024-01-01 00:00:01 GMT"], [0.25, 1]),
        # Fractions in some of the rows, and parts of a date.
        (["2024-01-01T00:00:00.5", "2024-01-01T00:00:00", "2024-01-01T00:00:01.123456789"],
         [0.5, 0, 1.123456789]),
        (["2024-01-01T00:01", "2024-01"], [60, 0]),
    ],
)  # fmt: skip
def test_dates_of_several_forms(tmp_path, texts, expected):
    times = times_of(tmp_path / "log.csv", *texts)
    found = (times - pd.Timestamp("2024-01-01")) / pd.Timedelta(seconds=1)
    assert found.tolist() == pytest.approx(expected, abs=0)


@pytest.mark.parametrize(
    ("texts", "without"),
    [
        (["2024-01-01 00:00:00", "2024-01-01T00:00:01-0100", "2024-01-01"], 2),
        (["2024-01-01 00:00:02 UTC", "2024-01-01 00:00:01"], 1),
        (["2024-01-01T00:00:00Z", "2024-01-01T01:00:00+02:00", "2024-01-01T01:00-05"], 0),
        (["2024-01-01T00:00:00.5", "2024-01-01", "2024-01"], 0),
    ],
)
def test_dates_without_a_zone_beside_others_are_counted(tmp_path, caplog, texts, without):
    times_of(tmp_path / "log.csv", *texts)
    told = f"{without} of the {len(texts)} dates of column timestamp have no time zone"
    assert (told in caplog.text) == (without > 0)
    assert ("time zone" in caplog.text) == (without > 0)


@pytest.mark.parametrize("text", ["03/04/2024", "3/14/24 10:00 PM", "31.12.2024", "1/2/2024 UTC"])
def test_dates_whose_month_is_unclear_are_refused(tmp_path, text):
    advice = (
        "its day and month cannot be told apart; write dates as 2024-12-31, or set data.time_format"
    )
    for texts in ([text], ["2024-01-01", text]):
        with pytest.raises(UserError, match=f"data row {len(texts)} is '{text}'; {advice}"):
            times_of(tmp_path / "log.csv", *texts)


def test_numbers_with_blanks_are_numbers(tmp_path):
    assert times_of(tmp_path / "log.csv", " 5", "6.5 ").tolist() == [5, 6.5]
    with pytest.raises(UserError, match="data row 1 is '2024-01-01'; expected a finite number"):
        times_of(tmp_path / "log.csv", "2024-01-01", "5")


DAYS_FIRST = "%d.%m.%Y %H:%M"


@pytest.mark.parametrize(
    ("time_format", "texts", "expected"),
    [
        (DAYS_FIRST, ["02.01.2024 00:01", " 1.1.2024 00:02"], [86460, 120]),
        ("%m/%d/%y %I:%M %p", ["01/02/24 12:00 PM"], [86400 + 12 * 3600]),
        ("%d.%m.%Y %H:%M %z", ["01.01.2024 02:00 +0200", "01.01.2024 02:00 Z"], [0, 7200]),
        ("%Y%m%d", ["20240102", "20240101"], [86400, 0]),
        ("%Y-%m-%d", ["2024-01-02"], [86400]),
        (DAYS_FIRST, ["01.01.1024 00:00"], [-31556995200]),
    ],
)
def test_times_of_a_format(tmp_path, time_format, texts, expected):
    rows = Rows(time_format=time_format)
    frame = pd.DataFrame({"user_id": 1, "item_id": range(len(texts)), "timestamp": texts})
    logs = [log_from_table(frame, rows=rows)]
    for name, write in [("log.csv", frame.to_csv), ("log.parquet", frame.to_parquet)]:
        write(tmp_path / name, index=False)
        logs.append(read_log("csv", [tmp_path / name], {}, rows))
    frame.to_json(tmp_path / "log.json", orient="records", lines=True)
    logs.append(read_log("csv", [tmp_path / "log.json"], {}, rows))
    for log in logs:
        seconds = (log.times - np.datetime64("2024-01-01")) / np.timedelta64(1, "s")
        assert seconds.tolist() == expected


def test_numbers_and_dates_of_a_format():
    rows = Rows(time_format="%Y%m%d", missing="drop")
    frame = pd.DataFrame({"user_id": [1, 1, 1], "item_id": [1, 2, 3]})
    first, second = np.array(["2024-01-02", "2024-01-01"], "M8[D]")
    for times in ([20240102, None, 20240101], ["20240102", "", "20240101"],
                  [first, None, second]):  # fmt: skip
        log = log_from_table(frame.assign(timestamp=times), rows=rows)
        assert (log.times == [first, second]).all()
        assert log.counts["missing_values"] == 1


@pytest.mark.parametrize("text", ["2024-01-31", "31.02.2024 10:00", "now", "today", "nan", "5"])
def test_a_time_that_does_not_fit_the_format_is_named(tmp_path, text):
    path = tmp_path / "log.csv"
    path.write_text(f"user_id,item_id,timestamp\n1,1,01.01.2024 10:00\n1,2,{text}\n")
    for missing in ("error", "drop"):
        with pytest.raises(UserError, match=f"log.csv: the timestamp of data row 2 is '{text}'; "
                           f"expected a time of data.time_format='{DAYS_FIRST}'"):  # fmt: skip
            read_log("csv", [path], {}, Rows(time_format=DAYS_FIRST, missing=missing))
    path.write_text("user_id,item_id,timestamp\n1,1,\n")
    with pytest.raises(UserError, match="data row 1 has no timestamp"):
        read_log("csv", [path], {}, Rows(time_format=DAYS_FIRST))


# --- Where the file is ---


def test_missing_files(tmp_path):
    with pytest.raises(UserError, match=r"data.path=none.csv: no such file; it would be /"):
        locate("csv", "none.csv")
    with pytest.raises(UserError, match="data.path is not set"):
        locate("csv", None)
    with pytest.raises(UserError, match="kaggle.*third_party_data/retailrocket"):
        locate("retailrocket", str(tmp_path))
    with pytest.raises(UserError, match="ratings.dat.*leave data.path unset"):
        locate("ml1m", str(tmp_path / "none"))
    with pytest.raises(UserError, match="none.csv cannot be read: No such file"):
        read_log("csv", [tmp_path / "none.csv"], COLUMNS)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_log("csv", [tmp_path], COLUMNS)


def test_files_are_found_in_a_folder(tmp_path, monkeypatch):
    for name in ("events.zip", "EVENTS.CSV.GZ", "events.csv"):  # the plain one first
        (tmp_path / name).write_text(EVENTS)
        assert locate("retailrocket", str(tmp_path)) == [tmp_path / name]
    (tmp_path / "ml-1m.zip").write_bytes(b"")
    assert locate("ml1m", str(tmp_path)) == [tmp_path / "ml-1m.zip"]
    for name in ("ml-100k.inter.gz", "ml-100k.zip", "u.data"):  # the last is its publisher's
        (tmp_path / name).write_text(U_DATA)
        assert locate("ml100k", str(tmp_path)) == [tmp_path / name]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate("csv", "~/events.csv") == [tmp_path / "events.csv"]


@pytest.mark.parametrize(("name", "file"), [("ml1m", "ml-1m"), ("ml100k", "ml-100k")])
def test_the_movielens_logs_are_downloaded_once(tmp_path, monkeypatch, name, file):
    import pooch

    def retrieve(url, *, known_hash, fname, path, progressbar):
        asked.append((url, known_hash.partition(":")[0]))
        path.mkdir(parents=True)
        (path / fname).write_bytes(b"")

    asked = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pooch, "retrieve", retrieve)
    for _ in range(2):
        assert locate(name, None) == [files.THIRD_PARTY / file / f"{file}.zip"]
    url = f"https://files.grouplens.org/datasets/movielens/{file}.zip"
    assert asked == [(url, {"ml1m": "md5", "ml100k": "sha256"}[name])]


def test_a_download_with_another_hash_is_refused(tmp_path, monkeypatch):
    import pooch

    def download(url, output_file, pooch):
        Path(output_file).write_bytes(b"another file")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pooch.core, "choose_downloader", lambda *args, **kwargs: download)
    with pytest.raises(UserError, match=r"ml-100k\.zip could not be downloaded.*hash"):
        locate("ml100k", None)
    assert not list(tmp_path.rglob("ml-100k.zip"))


@pytest.mark.parametrize("name", ["ml1m", "ml100k"])
def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch, name):
    import pooch

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(UserError, match=r"no network.*fetch it by hand"):
        locate(name, None)
