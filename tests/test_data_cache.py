import dataclasses
import errno
import hashlib

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict
from test_split import LOG, log

from seqfair_jax.data import cache
from seqfair_jax.data.cache import load_dataset, source_hashes
from seqfair_jax.data.groups import FAMILIES, build_family
from seqfair_jax.data.split import describe_counts
from seqfair_jax.data.synthetic import default_settings
from seqfair_jax.errors import UserError


def settings(**changes):
    config = ConfigDict(
        {
            "name": "csv",
            "path": None,
            "columns": {},
            "delimiter": "",
            "encoding": "",
            "events": (),
            "min_rating": None,
            "since": None,
            "until": None,
            "missing": "error",
            "repeats": "keep",
            "time_format": "",
            "min_interactions": 1,
            "split": "leave_one_out",
            "targets": "first",
            "valid_from": None,
            "test_from": None,
            "valid_share": 0.1,
            "test_share": 0.1,
            "valid_path": None,
            "test_path": None,
            "valid_users": 0,
            "split_seed": 42,
            "group_file": None,
            "cache_dir": "",
            "synthetic": default_settings(),
        }
    )
    with config.ignore_type():
        config.update(changes)
    return config


@pytest.fixture
def config(tmp_path):
    """The settings of a small log with ids of text and a cache."""
    users = ["NA", "a\0", "a"]
    frame = log(["x" * 2**20, "b", "b"], ["b", "ü", "07"], ["b", "b", "7"], users=users)
    frame.to_csv(tmp_path / "log.csv", index=False)
    return settings(path=str(tmp_path / "log.csv"), cache_dir=str(tmp_path / "cache"))


def assert_equal(one, two):
    for field in dataclasses.fields(one):
        left, right = getattr(one, field.name), getattr(two, field.name)
        if dataclasses.is_dataclass(left):
            assert_equal(left, right)
        elif isinstance(left, np.ndarray):
            assert left.dtype == right.dtype, field.name
            assert left.tolist() == right.tolist(), field.name
        else:
            assert left == right, field.name


# --- The cache ---


def test_the_cache_gives_the_same(config, tmp_path, monkeypatch, caplog):
    fresh = load_dataset(config)
    assert fresh.user_ids.tolist() == ["NA", "a", "a\0"]
    caplog.clear()  # of what is said of the log
    monkeypatch.setattr(cache, "read_log", None)  # the cache alone is read
    assert_equal(load_dataset(config), fresh)
    assert not caplog.records
    # Another log is another entry.
    (tmp_path / "log.csv").write_text((tmp_path / "log.csv").read_text() + "NA,b,9\n")
    with pytest.raises(TypeError, match="not callable"):
        load_dataset(config)


def test_another_split_does_not_read_the_log_again(config, tmp_path, monkeypatch):
    LOG.assign(rating=range(12)).to_csv(tmp_path / "log.csv", index=False)
    reads = []
    real = cache.read_log
    monkeypatch.setattr(cache, "read_log", lambda *a, **k: reads.append(a) or real(*a, **k))
    load_dataset(config)
    base = config.to_dict()
    for change in [{"split_seed": 1}, {"valid_users": 2}, {"min_interactions": 2}]:
        cached = load_dataset(settings(**(base | change)))
        assert len(reads) == 1
        assert_equal(cached, load_dataset(settings(**(base | change | {"cache_dir": ""}))))
        del reads[1:]
    # How the log is read is part of its key.
    changes = [{"min_rating": 2.0}, {"since": "1"}, {"missing": "drop"}, {"repeats": "drop"}]
    changes += [{"columns": {"timestamp": "timestamp"}}, {"encoding": "cp1252"}]
    changes += [{"until": "9"}, {"delimiter": ","}]
    for number, change in enumerate(changes):
        load_dataset(settings(**(base | change)))
        assert len(reads) == 2 + number
    (tmp_path / "log.csv").rename(tmp_path / "other.csv")  # the same bytes
    load_dataset(settings(**(base | {"path": str(tmp_path / "other.csv")})))
    assert len(reads) == 1 + len(changes)


def test_one_file_as_two_logs_has_two_entries(config, tmp_path):
    """The name of a log says how its files are read."""
    events = pd.DataFrame(
        {"timestamp": range(1, 10), "visitorid": [1, 2, 3] * 3, "event": "view",
         "itemid": [4, 5, 6, 5, 6, 4, 4, 5, 6], "transactionid": ""}
    )  # fmt: skip
    (tmp_path / "log.csv").unlink()
    events.to_csv(tmp_path / "events.csv", index=False)
    shared = {"cache_dir": config.cache_dir, "path": str(tmp_path / "events.csv")}
    load_dataset(settings(**shared, name="retailrocket"))
    load_dataset(settings(**shared, name="csv"))
    assert len(list((tmp_path / "cache").glob("log-*"))) == 2


def test_times_of_all_kinds_are_kept(config, tmp_path):
    for number, times in enumerate([LOG["timestamp"], LOG["timestamp"] / 2,
                                    pd.to_datetime(LOG["timestamp"], unit="D")]):  # fmt: skip
        LOG.assign(timestamp=times).to_csv(tmp_path / "log.csv", index=False)
        config.split_seed = number
        fresh = load_dataset(config)
        config.split_seed = number + 10  # from the kept log
        assert load_dataset(config).log_hash == fresh.log_hash


def test_numbers_are_read_from_the_disk_when_they_are_used(config, tmp_path, monkeypatch, caplog):
    fresh = load_dataset(config, mapped=True)  # nothing is in the cache yet
    caplog.clear()  # of what is said of the log
    for _ in range(2):
        for numbers in (fresh.items, fresh.offsets, fresh.test.users, fresh.train_lengths):
            assert isinstance(numbers.base, np.memmap)
            assert not numbers.flags.writeable
        monkeypatch.setattr(cache, "read_log", None)
        assert_equal(fresh, load_dataset(config))
        fresh = load_dataset(config, mapped=True)
    monkeypatch.undo()
    assert not caplog.records
    (entry,) = (tmp_path / "cache").glob("split-*")
    whole = bytearray(entry.read_bytes())
    place = whole.index(fresh.items.tobytes())
    whole[place] ^= 1
    entry.unlink()  # the data set above is still read from it
    entry.write_bytes(whole)
    assert_equal(load_dataset(config, mapped=True), fresh)
    assert "is made again" in caplog.text


@pytest.mark.parametrize("kept", [0, 100, -1])
def test_a_damaged_entry_is_made_again(config, tmp_path, caplog, kept):
    fresh = load_dataset(config)
    (entry,) = (tmp_path / "cache").glob("split-*")
    whole = entry.read_bytes()
    entry.write_bytes(whole[:kept])
    assert_equal(load_dataset(config), fresh)
    assert f"{entry} cannot be used and is made again" in caplog.text
    assert entry.stat().st_size == len(whole)


def test_a_changed_byte_is_noticed(config, tmp_path, caplog):
    fresh = load_dataset(config)
    (entry,) = (tmp_path / "cache").glob("split-*")
    whole = entry.read_bytes()
    place = whole.index(b'["NA"') + 2
    entry.write_bytes(whole[:place] + b"M" + whole[place + 1 :])
    assert_equal(load_dataset(config), fresh)
    assert "is made again" in caplog.text


def test_the_entry_of_another_log_is_not_believed(config, tmp_path, caplog):
    LOG.to_csv(tmp_path / "other.csv", index=False)
    other = settings(path=str(tmp_path / "other.csv"), cache_dir=config.cache_dir)
    load_dataset(other)
    (wrong,) = (tmp_path / "cache").glob("split-*")
    fresh = load_dataset(config)
    (entry,) = set((tmp_path / "cache").glob("split-*")) - {wrong}
    entry.write_bytes(wrong.read_bytes())
    assert_equal(load_dataset(config), fresh)
    assert "it holds something else" in caplog.text


def test_a_cache_that_cannot_be_written_is_not_used(config, tmp_path, caplog, monkeypatch):
    (tmp_path / "file").write_text("")
    config.cache_dir = str(tmp_path / "file" / "cache")
    assert load_dataset(config).counts["users"] == 3
    assert "the cache is not used: cannot write" in caplog.text
    assert "made again" not in caplog.text
    caplog.clear()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    config.cache_dir = str(tmp_path / "cache")
    assert load_dataset(config).counts["users"] == 3
    assert "No space left on device" in caplog.text
    assert not list((tmp_path / "cache").iterdir())


def test_where_the_cache_is(config, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for cache_dir, folder, home in [
        (None, "home/data", tmp_path / "home"),
        ("~/mine", "mine", None),
        ("", None, tmp_path / "home"),
        (None, None, None),  # no home folder
    ]:
        monkeypatch.setattr(cache, "cache_folder", lambda home=home: home)
        with config.ignore_type():
            config.cache_dir = cache_dir
        before = set(tmp_path.rglob("*.npz"))
        load_dataset(config)
        new = set(tmp_path.rglob("*.npz")) - before
        assert {path.parent for path in new} == ({tmp_path / folder} if folder else set())


# --- Logs ---


def test_missing_files_and_empty_results(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        load_dataset(settings(path=str(tmp_path / "none.csv")))
    with pytest.raises(UserError, match="data.path is not set"):
        load_dataset(settings())
    path = tmp_path / "log.csv"
    LOG.to_csv(path, index=False)
    with pytest.raises(UserError, match="log.csv: nothing is left of 12 rows after the 9-core"):
        load_dataset(settings(path=str(path), min_interactions=9))
    LOG[:2].to_csv(path, index=False)
    with pytest.raises(UserError, match="no user has 3 rows"):
        load_dataset(settings(path=str(path)))


@pytest.mark.parametrize("where", ["", "cache"])
def test_a_log_joined_with_itself_is_reported(tmp_path, caplog, where):
    path = tmp_path / "log.csv"
    pd.concat([LOG, LOG]).to_csv(path, index=False)
    config = settings(path=str(path), cache_dir=where and str(tmp_path / where))
    for _ in range(2):  # from the cache too
        caplog.clear()
        assert load_dataset(config).counts["repeated_rows"] == 12
        assert "log.csv: 50.0 % of the rows have the user, item and time" in caplog.text


def test_a_few_repeated_rows_are_not_reported(tmp_path, caplog):
    frame = log(*[range(20)] * 5)
    path = tmp_path / "log.csv"
    for repeats, reported in [(1, False), (2, True)]:  # 1 of 101, 2 of 102
        pd.concat([frame, frame[:repeats]]).to_csv(path, index=False)
        caplog.clear()
        assert load_dataset(settings(path=str(path))).counts["repeated_rows"] == repeats
        assert bool(caplog.records) == reported


def test_a_log_joined_with_itself_without_its_repeats(tmp_path, caplog):
    path, once = tmp_path / "log.csv", tmp_path / "once.csv"
    pd.concat([LOG, LOG]).to_csv(path, index=False)
    LOG.to_csv(once, index=False)
    cached = {"path": str(path), "cache_dir": str(tmp_path / "cache"), "min_interactions": 2}
    load_dataset(settings(**cached))
    assert "if the log was joined with itself, set data.repeats=drop" in caplog.text
    caplog.clear()
    found = load_dataset(settings(**cached, repeats="drop"))
    assert not caplog.records
    assert found.log_hash == load_dataset(settings(path=str(once), min_interactions=2)).log_hash
    assert found.counts["dropped_repeats"] == 12
    assert "- repeats of an earlier row" in describe_counts(found.counts)


def test_repeats_are_dropped_within_each_file_of_a_split(tmp_path, caplog):
    paths = {key: str(tmp_path / f"{key}.csv") for key in ("path", "valid_path", "test_path")}
    for path in paths.values():
        pd.concat([LOG, LOG]).to_csv(path, index=False)
    found = load_dataset(settings(**paths, split="files", repeats="drop"))
    assert found.counts["dropped_repeats"] == 3 * 12
    assert (found.counts["raw_rows"], found.counts["repeated_rows"]) == (3 * 12, 2 * 12)
    assert "remove rows from data.valid_path and data.test_path that data.path has" in caplog.text


def test_the_format_of_times_is_part_of_the_key(tmp_path):
    frame = LOG.assign(timestamp=[f"0{1 + n % 9}.0{1 + n % 7}.2024" for n in range(12)])
    frame.to_csv(tmp_path / "log.csv", index=False)
    config = {"path": str(tmp_path / "log.csv"), "cache_dir": str(tmp_path / "cache")}
    by_day = load_dataset(settings(**config, time_format="%d.%m.%Y"))
    by_month = load_dataset(settings(**config, time_format="%m.%d.%Y"))
    assert by_day.log_hash != by_month.log_hash


def test_hashes_of_the_sources(tmp_path):
    log_file, group_file = tmp_path / "log.csv", tmp_path / "groups.csv"
    log_file.write_text("log")
    group_file.write_text("groups")
    config = settings(path=str(log_file), group_file=str(group_file))
    assert source_hashes(config) == {
        "log": hashlib.sha256(b"log").hexdigest(),
        "group_file": hashlib.sha256(b"groups").hexdigest(),
    }
    assert source_hashes(settings(name="synthetic")) == {}
    assert list(source_hashes(settings(path=str(log_file)))) == ["log"]
    group_file.unlink()
    with pytest.raises(UserError, match="groups.csv: no such file"):
        source_hashes(config)


def test_the_hash_of_the_users_of_movielens_100k(tmp_path):
    for name in ("u.data", "u.user"):
        (tmp_path / name).write_text(name)
    config = settings(name="ml100k", path=str(tmp_path))
    digests = {key: hashlib.sha256(name.encode()).hexdigest()
               for key, name in (("log", "u.data"), ("group_file", "u.user"))}  # fmt: skip
    assert source_hashes(config) == digests
    (tmp_path / "u.user").unlink()
    assert source_hashes(config) == {"log": digests["log"]}


def test_the_synthetic_log_is_a_function_of_its_seed():
    one, two = load_dataset(settings(name="synthetic")), load_dataset(settings(name="synthetic"))
    assert one.log_hash == two.log_hash
    other = settings(name="synthetic")
    other.synthetic.seed = 1
    assert load_dataset(other).log_hash != one.log_hash
    assert one.counts["users"] == 12_000


TABLE_1A = {
    "retailrocket": {
        "pop33": (40.18, 15.59, 44.23),
        "pop2060": (27.41, 44.91, 27.69),
        "pop1080": (14.57, 70.42, 15.02),
        "seq33": (74.54, 22.95, 2.53),
        "seq2060": (55.17, 44.41, 0.43),
        "seq1080": (33.77, 66.14, 0.09),
    },
    "ml1m": {
        "pop33": (18, 28, 54),
        "pop2060": (10, 52, 38),
        "pop1080": (5, 71, 23),
        "seq33": (73, 19, 8),
        "seq2060": (59, 37, 4),
        "seq1080": (42, 57, 2),
    },
}


@pytest.mark.parametrize(
    ("name", "valid_users", "counts", "log_hash", "within"),
    [
        ("retailrocket", 10_000, (22178, 17803, 364943, 332765), "f3dfe2327bbe", 0.1),
        ("ml1m", 0, (6040, 3416, 999611, 987531), "c506aba67e4d", 0.51),
    ],
)
def test_table_1(real_data, caplog, name, valid_users, counts, log_hash, within):
    dataset = load_dataset(
        settings(
            name=name,
            path=str(real_data / {"ml1m": "ml-1m"}.get(name, name)),
            valid_users=valid_users,
            min_interactions=5,
        )
    )
    keys = ("users", "items", "interactions", "train_interactions")
    assert tuple(dataset.counts[key] for key in keys) == counts
    assert dataset.log_hash.startswith(log_hash)
    assert dataset.counts["tied_rows"] == dataset.counts["repeated_rows"] == 0
    assert not caplog.records
    for family in FAMILIES:
        shares = 100 * build_family(dataset, family).membership.mean(axis=0)
        np.testing.assert_allclose(shares, TABLE_1A[name][family], atol=within)
    if name == "retailrocket":
        assert dataset.test.repeat.sum() == 7919
        assert dataset.counts["validation_users"] == 10_000
