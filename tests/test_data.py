import gzip
import zipfile
from fractions import Fraction

import numpy as np
import pandas as pd
import pytest
import reference

from seqfair_jax import data
from seqfair_jax.config import default_config
from seqfair_jax.data.groups import (
    FAMILIES,
    GroupFamily,
    build_family,
    cut_by_rows,
    require_partition,
)
from seqfair_jax.data.interactions import k_core, read_group_table, read_log
from seqfair_jax.data.split import id_order, leave_one_out

COLUMNS = {"user_id": "user_id", "item_id": "item_id", "timestamp": "timestamp"}
LOG = pd.DataFrame(
    {
        "user_id": [1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4],
        "item_id": [10, 11, 10, 12, 11, 12, 13, 10, 12, 99, 10, 11],
        "timestamp": [1, 2, 3, 4, 1, 2, 3, 9, 8, 10, 1, 2],
    }
)


def settings(**changes):
    config = default_config().data
    config.update({"name": "csv", "min_interactions": 1, "cache_dir": "", **changes})
    return config


def split(frame=LOG, valid_users=None):
    return leave_one_out(frame, name="csv", num_valid_users=valid_users, split_seed=42)


def test_leave_one_out_by_hand():
    dataset = split()
    assert dataset.user_ids.tolist() == [1, 2, 3]  # user 4 has two rows
    assert dataset.item_ids.tolist() == [10, 11, 12]  # items of training rows
    # Training rows: 10 11 | 11 | 12 (user 3's rows in the order of time: 12 10 99).
    assert dataset.train_lengths.tolist() == [2, 1, 1]
    assert dataset.items.tolist() == [0, 1, 0, 1, 2, 2, 0]
    assert dataset.offsets.tolist() == [0, 3, 5, 7]
    assert dataset.valid_targets.tolist() == [0, 2, 0]
    assert dataset.valid_repeat.tolist() == [True, False, False]
    assert dataset.test_targets.tolist() == [2, -1, -1]
    assert dataset.test_target_ids.tolist() == [12, 13, 99]
    assert dataset.item_counts.tolist() == [1, 2, 1]
    assert dataset.counts["unknown_test_targets"] == 2
    assert dataset.counts["short_users"] == 1


def test_only_validation_users_lose_a_second_row():
    dataset = split(valid_users=1)
    chosen = np.random.default_rng(42).choice([1, 2, 3], 1, replace=False)
    assert dataset.user_ids[dataset.valid_users].tolist() == chosen.tolist()
    assert dataset.counts["train_interactions"] == (4 + 3 + 3) - 3 - 1
    with pytest.raises(ValueError, match="valid_users is 7.*3 users"):
        split(valid_users=7)


def test_id_order():
    assert id_order(np.array(["10", "9"], object))[0].tolist() == [9, 10]
    assert id_order(np.array(["10", "9", "a"], object))[0].tolist() == ["10", "9", "a"]
    assert id_order(np.array(["7", "07"], object))[0].tolist() == ["07", "7"]


@pytest.mark.parametrize("seed", range(4))
def test_k_core_matches_the_reference(seed):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(
        {"user_id": rng.integers(20, size=90), "item_id": rng.integers(15, size=90)}
    )
    found = k_core(frame, 3)
    expected = reference.k_core(zip(frame.user_id, frame.item_id, strict=True), 3)
    assert list(zip(found.user_id, found.item_id, strict=True)) == expected
    assert k_core(frame, 99).empty


@pytest.mark.parametrize("seed", range(6))
def test_group_cuts_match_the_reference_with_ties(seed):
    rng = np.random.default_rng(seed)
    key, rows = rng.integers(4, size=30), rng.integers(1, 4, size=30)
    cuts = (Fraction(1, 3), Fraction(2, 3))
    assert cut_by_rows(key, rows, cuts).tolist() == reference.cut_by_rows(key, rows.tolist(), cuts)


def test_a_share_at_the_cut_belongs_to_the_upper_group():
    cuts = (Fraction(1, 3), Fraction(2, 3))
    assert cut_by_rows(np.array([1, 2, 3]), np.ones(3, int), cuts).tolist() == [1, 2, 2]


def test_products_and_unknown_families():
    dataset = split()
    product = build_family(dataset, "pop33*seq33")
    assert product.groups[:4] == ("niche*short", "niche*medium", "niche*long", "diverse*short")
    pop, seq = build_family(dataset, "pop33").membership, build_family(dataset, "seq33").membership
    both = [(p[:, None] & s[None, :]).ravel() for p, s in zip(pop, seq, strict=True)]
    np.testing.assert_array_equal(product.membership, both)
    with pytest.raises(ValueError, match="unknown group family 'pop3'.*did you mean 'pop33'"):
        build_family(dataset, "pop3")


def test_a_union_holds_its_families_side_by_side():
    dataset = split()
    union = build_family(dataset, "pop33&pop33*seq33")
    pop, product = build_family(dataset, "pop33"), build_family(dataset, "pop33*seq33")
    assert union.groups[:4] == ("pop33:niche", "pop33:diverse", "pop33:popular",
                                "pop33*seq33:niche*short")  # fmt: skip
    both = np.concatenate([pop.membership, product.membership], axis=1)
    np.testing.assert_array_equal(union.membership, both)
    assert union.overlapping
    assert [part.name for part in union.parts] == ["pop33", "pop33*seq33"]
    chosen = union.select(np.array([1]))
    assert [part.membership.shape for part in chosen.parts] == [(1, 3), (1, 9)]
    assert pop.parts == (pop,)
    require_partition(union, "gdro", dataset.user_ids)  # each part is one
    with pytest.raises(ValueError, match="'pop33&pop33' names one family twice"):
        build_family(dataset, "pop33&pop33")


def test_groups_from_a_file(tmp_path):
    rows = [(1, "age", "old"), (1, "age", "young"), (2, "age", "young"), (9, "age", "old")]
    path = tmp_path / "groups.csv"
    pd.DataFrame(rows, columns=["user_id", "family", "group"]).to_csv(path, index=False)
    table = read_group_table(str(path))
    family = build_family(split(), "age", group_table=table)
    assert family.groups == ("old", "young")
    assert family.membership.tolist() == [[True, True], [False, True], [False, False]]
    assert family.overlapping
    assert family.labels().tolist() == [["old", "young"], ["young"], []]
    with pytest.raises(ValueError, match="gdro needs every user in exactly one group.*1, 3"):
        require_partition(family, "gdro", np.array([1, 2, 3]))
    union = build_family(split(), "pop33&age", group_table=table)
    with pytest.raises(ValueError, match="in family 'age' 2 users are in none or several: 1, 3"):
        require_partition(union, "gdro", np.array([1, 2, 3]))


def test_labels_of_a_partition():
    membership = np.array([[True, False], [False, True], [False, False]])
    assert GroupFamily("f", ("a", "b"), membership).labels().tolist() == ["a", "b", None]


@pytest.mark.parametrize("kind", ["plain", "gz", "zip", "parquet"])
def test_readers_of_a_table(tmp_path, kind):
    renamed = LOG.rename(columns={"user_id": "customer"})
    text = renamed.to_csv(index=False)
    path = tmp_path / {"plain": "a.csv", "gz": "a.csv.gz", "zip": "a.zip"}.get(kind, "a.parquet")
    if kind == "plain":
        path.write_text(text)
    elif kind == "gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("folder/a.csv", text)
    else:
        renamed.to_parquet(path)
    found = read_log("csv", path, COLUMNS | {"user_id": "customer"})
    pd.testing.assert_frame_equal(found, LOG)


def test_retailrocket_keeps_views_and_movielens_reads_its_separator(tmp_path):
    events = tmp_path / "events.csv"
    events.write_text(
        "timestamp,visitorid,event,itemid,transactionid\n5,1,view,7,\n6,1,addtocart,8,\n"
    )
    assert read_log("retailrocket", events, COLUMNS).to_numpy().tolist() == [[1, 7, 5]]
    ratings = tmp_path / "ratings.dat"
    ratings.write_text("1::7::5::100\n2::8::4::200\n")
    assert read_log("ml1m", ratings, COLUMNS).to_numpy().tolist() == [[1, 7, 100], [2, 8, 200]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("user_id,item_id,timestamp\n", "no interactions"),
        ("user_id,item_ids,timestamp\n1,2,3\n", "no column 'item_id'.*did you mean 'item_ids'"),
        ("user_id,item_id,user_id,timestamp\n1,2,3,4\n", "user_id stands more than once"),
        ("user_id,item_id,timestamp\n1,2,3\n1,,4\n", "have no item_id.*data row 2"),
        ("user_id,item_id,timestamp\n1,2,3\n1,5,soon\n", "data row 2 is 'soon'"),
        ("user_id,item_id,timestamp\n1,2,3\n1,5,inf\n", "data row 2 is .*inf"),
        ("user_id,item_id,timestamp\n1,2,3\n1,5\n", "cannot be read"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_log("csv", path, COLUMNS)


@pytest.mark.parametrize("zone", ["", "Z", "+02:00"])
def test_iso_dates(tmp_path, zone):
    path = tmp_path / "log.csv"
    rows = [f"1,2,2024-01-01T00:00:01{zone}", f"1,3,2024-01-01T00:00:00{zone}"]
    path.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    times = read_log("csv", path, COLUMNS)["timestamp"]
    hours = 2 if zone == "+02:00" else 0
    start = pd.Timestamp("2024-01-01").value - hours * 3600 * 10**9
    assert times.tolist() == [start + 10**9, start]
    frame = pd.read_csv(path, parse_dates=["timestamp"])
    frame.to_parquet(tmp_path / "log.parquet")
    pd.testing.assert_series_equal(
        read_log("csv", tmp_path / "log.parquet", COLUMNS)["timestamp"], times
    )


def test_ids_stay_as_they_are_written(tmp_path):
    path = tmp_path / "log.csv"
    long = ["12345678901234567890", "12345678901234567891"]
    path.write_text(f"user_id,item_id,timestamp\n{long[0]},07,1\n{long[1]},7,2\n")
    found = read_log("csv", path, COLUMNS)
    assert found["user_id"].tolist() == long
    assert found["item_id"].tolist() == ["07", "7"]
    groups = "user_id,family,group\n07,age,old\n7,age,young\n"
    (tmp_path / "groups.csv").write_text(groups)
    assert read_group_table(str(tmp_path / "groups.csv"))["user_id"].tolist() == ["07", "7"]

    floats = pd.DataFrame({"user_id": [1.0, 2.0], "item_id": [3, 4], "timestamp": [5, 6]})
    floats.to_parquet(tmp_path / "log.parquet")
    assert read_log("csv", tmp_path / "log.parquet", COLUMNS)["user_id"].tolist() == [1, 2]
    for bad in (1.5, 2.0**60):
        floats.assign(user_id=[1.0, bad]).to_parquet(tmp_path / "log.parquet")
        with pytest.raises(ValueError, match="user_id of data row 2 is the float"):
            read_log("csv", tmp_path / "log.parquet", COLUMNS)


@pytest.mark.parametrize("kind", ["Int64", "Float64", "float64"])
def test_a_missing_time_is_refused(tmp_path, kind):
    times = pd.Series([1, None], dtype=kind)
    frame = pd.DataFrame({"user_id": [1, 2], "item_id": [3, 4], "timestamp": times})
    frame.to_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match="timestamp of data row 2"):
        read_log("csv", tmp_path / "log.parquet", COLUMNS)


def test_a_damaged_archive(tmp_path):
    path = tmp_path / "log.csv.gz"
    packed = bytearray(gzip.compress(LOG.to_csv(index=False).encode()))
    packed[12:40] = bytes(28)
    path.write_bytes(packed)
    with pytest.raises(ValueError, match=r"log\.csv\.gz cannot be unpacked"):
        read_log("csv", path, COLUMNS)


def test_missing_files_and_empty_results(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.prepare(settings(path=str(tmp_path / "none.csv")))
    with pytest.raises(ValueError, match="data.path is not set"):
        data.prepare(settings())
    with pytest.raises(FileNotFoundError, match="kaggle.*third_party_data/retailrocket"):
        data.prepare(settings(name="retailrocket", path=str(tmp_path)))
    path = tmp_path / "log.csv"
    LOG.to_csv(path, index=False)
    with pytest.raises(ValueError, match="nothing is left of 12 rows after the 9-core"):
        data.prepare(settings(path=str(path), min_interactions=9))
    LOG[:2].to_csv(path, index=False)
    with pytest.raises(ValueError, match="no user has 3 rows"):
        data.prepare(settings(path=str(path)))


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    import pooch

    def fail(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pooch, "retrieve", fail)
    with pytest.raises(FileNotFoundError, match=r"no network.*fetch it by hand"):
        data.prepare(settings(name="ml1m"))


def test_the_cache_gives_the_same_and_survives_corruption(tmp_path, monkeypatch):
    path, cache = tmp_path / "log.csv", tmp_path / "cache"
    LOG.to_csv(path, index=False)
    config = settings(path=str(path), cache_dir=str(cache))
    fresh = data.prepare(config)
    (entry,) = cache.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_log", None)  # the cache alone is read
        cached = data.prepare(config)
    entry.write_bytes(entry.read_bytes()[:100])
    rebuilt = data.prepare(config)
    for other in (cached, rebuilt):
        assert other.log_hash == fresh.log_hash
        assert other.counts == fresh.counts
        np.testing.assert_array_equal(other.items, fresh.items)
        np.testing.assert_array_equal(other.user_ids, fresh.user_ids)


def test_the_synthetic_log_is_a_function_of_its_seed():
    one, two = data.prepare(settings(name="synthetic")), data.prepare(settings(name="synthetic"))
    assert one.log_hash == two.log_hash
    other = settings(name="synthetic")
    other.synthetic.seed = 1
    assert data.prepare(other).log_hash != one.log_hash
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
    ("name", "folder", "valid_users", "counts", "within"),
    [
        ("retailrocket", "retailrocket", 10_000, (22178, 17803, 364943, 332765), 0.1),
        ("ml1m", "ml-1m", None, (6040, 3416, 999611, 987531), 0.51),
    ],
)
def test_table_1(real_data, name, folder, valid_users, counts, within):
    dataset = data.prepare(
        settings(
            name=name,
            path=str(real_data / folder),
            valid_users=valid_users,
            min_interactions=5,
        )
    )
    keys = ("users", "items", "interactions", "train_interactions")
    assert tuple(dataset.counts[key] for key in keys) == counts
    for family in FAMILIES:
        shares = 100 * build_family(dataset, family).membership.mean(axis=0)
        np.testing.assert_allclose(shares, TABLE_1A[name][family], atol=within)
    if name == "retailrocket":
        assert dataset.test_repeat.sum() == 7919
        assert dataset.counts["validation_users"] == 10_000
