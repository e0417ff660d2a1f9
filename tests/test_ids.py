import numpy as np
import pyarrow as pa
import pytest

from seqfair_jax.data.ids import compact, encode_ids, join_ids, whole_numbers


@pytest.mark.parametrize(
    ("ids", "order"),
    [
        (["10", "9"], [9, 10]),
        (["10", "9", "a"], ["10", "9", "a"]),
        (["7", "07"], ["07", "7"]),
        (["+7", "8"], ["+7", "8"]),
        (["9223372036854775808", "9"], ["9", "9223372036854775808"]),  # above int64
        (["NA", "nan", "None"], ["NA", "None", "nan"]),
        (["b", "ä", "z", "\U0001f600", "｡"], ["b", "z", "ä", "｡", "\U0001f600"]),
        (["a\0", "a", "a\0b"], ["a", "a\0", "a\0b"]),
    ],
)
def test_id_order(ids, order):
    for given in (np.array(ids, object), pa.array(ids, pa.large_string())):
        places, distinct = compact(np.arange(len(ids)), given)
        assert distinct.tolist() == order
        assert distinct.dtype == (object if isinstance(order[0], str) else np.int64)
        assert places.dtype == np.int32
        assert [str(distinct[place]) for place in places] == ids


def test_ids_without_rows_are_dropped():
    for ids in (np.array([10, 9, 8]), pa.array([10, 9, 8]), np.array(["10", "9", "x"], object)):
        places, distinct = compact(np.array([0, 1, 0]), ids)
        assert distinct.tolist() == [9, 10]
        assert places.tolist() == [1, 0, 1]


def test_whole_numbers():
    assert whole_numbers(np.array(["-3", "0"], object)).tolist() == [-3, 0]
    for text in ("7.0", "07", "-0", " 7", "0x7", "", "x"):
        assert whole_numbers(np.array([text], object)) is None


def test_a_long_id_does_not_widen_the_others():
    long = "x" * 2**20
    ids = np.array([long, *map(str, range(5000))], object)  # 20 GB as fixed-width text
    _, distinct = compact(np.arange(len(ids)), ids)
    assert distinct[-1] == long
    assert len(distinct) == 5001


# --- Columns of ids ---


def encoded(values):
    places, ids = encode_ids(pa.chunked_array([values]), np.arange(len(values)), "f", "c")
    return [None if place < 0 else ids[place].as_py() for place in places]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array(["b", "", "a", None, "b"], pa.large_string()), ["b", None, "a", None, "b"]),
        (pa.array(["b", "", None, "b"]).dictionary_encode(), ["b", None, None, "b"]),
        (pa.array([3, None, 1, 0]), [3, None, 1, 0]),
        (pa.array([3.0, None, float("nan"), 1.0]), [3, None, None, 1]),
        (pa.array([2**64 - 1, None], pa.uint64()), [str(2**64 - 1), None]),
        (pa.array([None, None]), [None, None]),
        (pa.array([], pa.large_string()), []),
    ],
)
def test_columns_of_ids(values, expected):
    assert encoded(values) == expected


def test_ids_of_several_files():
    parts = [
        (np.array([0, 1], np.int32), pa.array([7, 8])),
        (np.array([1, 0, 1], np.int32), pa.array(["8", "07"], pa.large_string())),
    ]
    places, ids = join_ids(parts)
    assert [ids[place].as_py() for place in places] == ["7", "8", "07", "8", "07"]
    places, ids = join_ids([parts[0], (np.array([0], np.int32), pa.array([8]))])
    assert [ids[place].as_py() for place in places] == [7, 8, 8]
    assert join_ids(parts[:1]) is parts[0]
