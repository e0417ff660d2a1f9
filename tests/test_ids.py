import numpy as np
import pandas as pd
import pytest

from seqfair_jax.data.ids import id_order, whole_numbers


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
    for given in (np.array(ids, object), pd.Series(ids), pd.Series(ids, dtype="string[pyarrow]")):
        distinct, places = id_order(given)
        assert distinct.tolist() == order
        assert distinct.dtype == (object if isinstance(order[0], str) else np.int64)
        assert [str(distinct[place]) for place in places] == ids


def test_integers_are_ordered_as_numbers():
    distinct, places = id_order(np.array([10, 9, 10]))
    assert distinct.tolist() == [9, 10]
    assert places.tolist() == [1, 0, 1]


def test_whole_numbers():
    assert whole_numbers(np.array(["-3", "0"], object)).tolist() == [-3, 0]
    for text in ("7.0", "07", "-0", " 7", "0x7", "", "x"):
        assert whole_numbers(np.array([text], object)) is None


def test_a_long_id_does_not_widen_the_others():
    long = "x" * 2**20
    ids = np.array([long, *map(str, range(5000))], object)  # 20 GB as fixed-width text
    distinct, _ = id_order(ids)
    assert distinct[-1] == long
    assert len(distinct) == 5001
