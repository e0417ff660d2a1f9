import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.extend.random import threefry_2x32
from numpy.testing import assert_allclose, assert_array_equal
from runs import slow_but

from seqfair_jax.model.packing import BLOCK, Sequences, pack
from seqfair_jax.model.sasrec import (
    SASRec,
    dropout,
    log_popularity,
    position_bias,
    position_buckets,
    visible_keys,
)

NUM_ITEMS = 40


def make_model(**changes):
    settings = {
        "num_items": NUM_ITEMS,
        "dim": 8,
        "ff_dim": 12,
        "num_blocks": 2,
        "num_heads": 2,
        "dropout": 0.0,
        "max_len": 100,
        "tie_embeddings": False,
        "init_scale": 1.0,
        "dtype": "float32",
    }
    return SASRec(**(settings | changes))


def pack_users(sequences, num_tokens, max_len=100):
    stops = np.cumsum([len(items) for items in sequences])
    lengths = np.minimum([len(items) for items in sequences], max_len - 1)
    arrays = (jnp.asarray(x) for x in (np.concatenate(sequences), stops, lengths))
    users = jnp.arange(len(sequences))
    return pack(Sequences(*arrays), users, num_tokens=num_tokens, num_items=NUM_ITEMS)


def draw_users(lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(NUM_ITEMS, size=n) for n in lengths]


def init(model, packed, seed=1):
    """Parameters with random biases by position, which start at 0."""
    params = model.init(jax.random.key(0), packed, train=False)
    rng = np.random.default_rng(seed)

    def moved(path, leaf):
        if path[-1].key != "position_bias":
            return leaf
        assert not leaf.any()
        return jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(moved, params)


@pytest.mark.parametrize(
    ("num_heads", "max_len", "parts"),
    slow_but(
        [
            (1, 100, {}),
            (2, 100, {}),
            (2, 100, {"gated": True}),
            (1, 100, {"position_bias": True}),
            (2, 200, {"position_bias": True, "gated": True}),
        ],
        [(2, 100, {}), (2, 200, {"position_bias": True, "gated": True})],
    ),
)
def test_packed_users_equal_one_user_at_a_time(num_heads, max_len, parts):
    """Users that straddle blocks, fill more than one, and are cut to the window."""
    model = make_model(num_heads=num_heads, max_len=max_len, **parts)
    users = draw_users([3, 90, 1, 130, 17] if max_len == 100 else [70, 210])
    packed = pack_users(users, 4 * BLOCK, max_len)
    params = init(model, packed)
    hidden = model.apply(params, packed, train=False)
    tree = jax.tree.map(np.float64, params["params"])
    at = 0
    for items in users:
        inputs, _ = reference.window(items, max_len)
        expected = reference.sasrec(tree, inputs, num_blocks=2, num_heads=num_heads)
        assert_allclose(hidden[at : at + len(inputs)], expected, rtol=1e-4, atol=1e-5)
        at += len(inputs)


@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("parts", [{}, {"gated": True}, {"position_bias": True}])
def test_some_tokens_are_encoded_as_among_all(window, parts):
    model = make_model(**parts)
    packed = pack_users(draw_users([3, 20, 1, 17, 20]), 2 * BLOCK)
    params = init(model, packed)
    every = model.apply(params, packed, train=False, window=window)
    # Few tokens attend alone. Of more, all attend.
    for only in (jnp.array([2, 22, 23, 39, 60]), jnp.arange(1, 61, 3)):
        some = model.apply(params, packed, train=False, window=window, only=only)
        assert_allclose(some, every[only], rtol=1e-5, atol=1e-6)


def test_a_user_does_not_depend_on_the_rest_of_the_batch():
    model = make_model()
    users = draw_users([5, 30, 8])
    packed = pack_users(users, BLOCK)
    params = model.init(jax.random.key(0), packed, train=False)
    first = model.apply(params, packed, train=False)[:5]
    others = pack_users([users[0], *draw_users([11, 60], seed=1)], 2 * BLOCK)
    again = model.apply(params, others, train=False)[:5]
    assert_allclose(first, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("longest", slow_but([1, 2, 3, 4, 20, 60], [1, 4, 60]))
def test_short_users_have_the_same_position_biases_in_small_blocks(longest):
    model = make_model(position_bias=True)
    packed = pack_users(draw_users([longest, 1, longest, 2][: 2 + 2 * (longest > 1)]), BLOCK)
    params = init(model, packed)
    real = int(packed.lengths.sum())
    whole = model.apply(params, packed, train=False)[:real]
    short = model.apply(params, packed, train=False, window=longest)[:real]
    assert_allclose(short, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("block", "num_keys"), [(1, 1), (1, 2), (4, 12), (128, 256)])
def test_a_position_bias_is_that_of_the_distance(block, num_keys):
    rng = np.random.default_rng(0)
    table = rng.normal(size=(2, 32)).astype(np.float32)
    weights = rng.normal(size=(2, block, num_keys)).astype(np.float32)
    expected, gradient = np.zeros((2, block, num_keys)), np.zeros((2, 32))
    for query in range(block):
        for key in range(num_keys):
            distance = max(num_keys - block + query - key, 0)
            bucket = reference.position_bucket(distance)
            expected[:, query, key] = table[:, bucket]
            gradient[:, bucket] += weights[:, query, key]

    def total(table):
        return (position_bias(table, block=block, num_keys=num_keys) * weights).sum()

    assert_array_equal(position_bias(table, block=block, num_keys=num_keys), expected)
    assert_allclose(jax.grad(total)(table), gradient, rtol=1e-4, atol=1e-4)


def test_buckets_of_distances():
    found = position_buckets(np.arange(-3, 1000))
    assert_array_equal(found[:20], [0, 0, 0, *range(17)])
    assert (np.diff(found) >= 0).all()
    # log(32 / 16) / log(128 / 16) is a third: bucket 16 + floor(16 / 3), and so on.
    assert found[[3 + 32, 3 + 64, 3 + 113, 3 + 127, 3 + 999]].tolist() == [21, 26, 31, 31, 31]
    assert found[3 + 112] == 30


def test_a_position_bias_starts_as_none():
    packed = pack_users(draw_users([5, 30]), BLOCK)
    plain, biased = make_model(), make_model(position_bias=True)
    without, params = (m.init(jax.random.key(0), packed, train=False) for m in (plain, biased))
    before, after = (
        plain.apply(without, packed, train=False),
        biased.apply(params, packed, train=False),
    )
    assert_allclose(before, after, rtol=1e-5, atol=1e-6)
    for block in ("block_0", "block_1"):
        assert params["params"][block].pop("position_bias").shape == (2, 32)
    jax.tree.map(assert_array_equal, params, without)


def test_initial_parameters_are_drawn_as_the_paper_does():
    model = make_model(dim=64, ff_dim=128, num_items=5000, num_heads=1, init_scale=0.5)
    packed = pack_users(draw_users([4]), BLOCK)
    params = model.init(jax.random.key(0), packed, train=False)["params"]
    assert_allclose(np.std(params["item_embedding"]), 0.5, rtol=0.02)
    assert_allclose(np.std(params["output_embedding"]), 0.5, rtol=0.02)
    assert params["position_embedding"].shape == (99, 64)
    block = params["block_0"]
    for name, bound in (
        ("attention_in", (6 / (64 + 3 * 64)) ** 0.5),  # Xavier over [D, 3D]
        ("attention_out", 64**-0.5),
        ("ff_in", 64**-0.5),
        ("ff_out", 128**-0.5),
    ):
        kernel = np.abs(block[name]["kernel"])
        assert bound * 0.99 < kernel.max() <= bound
        assert_allclose(kernel.mean(), bound / 2, rtol=0.05)
    assert not block["attention_in"]["bias"].any()
    assert not block["attention_out"]["bias"].any()
    assert 0.8 * 128**-0.5 < np.abs(block["ff_out"]["bias"]).max() <= 128**-0.5
    assert (
        "output_embedding"
        not in make_model(tie_embeddings=True).init(jax.random.key(0), packed, train=False)[
            "params"
        ]
    )


def test_visible_keys_by_hand():
    slots = jnp.array([0, 0, 1, 1, 1, 2, 3, 3])  # 3 is padding
    seen = visible_keys(slots, block=2, window=3)  # one block of 2 behind covers a window of 3
    assert seen.shape == (4, 2, 4)
    pairs = {
        (2 * n + q, 2 * n - 2 + k) for n, q, k in zip(*np.nonzero(np.asarray(seen)), strict=True)
    }
    assert pairs == {(q, k) for q in range(8) for k in range(q + 1) if slots[q] == slots[k]}


def test_dropout_keeps_the_share_and_the_mean():
    x = jnp.ones((999, 101))
    dropped = np.asarray(dropout(jax.random.key(0), x, 0.2))
    kept = dropped != 0
    assert_allclose(kept.mean(), 0.8, atol=0.005)
    assert_allclose(dropped.mean(), 1.0, atol=0.006)
    assert_allclose(dropped[kept], 1.25, rtol=1e-5)
    # Neighbours, which share a threefry block, are independent.
    flat = kept.ravel()
    assert_allclose((flat[1:] & flat[:-1]).mean(), 0.64, atol=0.006)
    assert_allclose((flat[2:] & flat[:-2]).mean(), 0.64, atol=0.006)


def test_dropout_draws_the_same_bits_under_vmap():
    keys = jax.random.split(jax.random.key(1), 3)
    x = jnp.ones((5, 7))
    together = jax.vmap(lambda key: dropout(key, x, 0.5))(keys)
    alone = jnp.stack([dropout(key, x, 0.5) for key in keys])
    np.testing.assert_array_equal(together, alone)
    assert (together[0] != together[1]).any()


def test_dropout_reads_the_blocks_of_threefry():
    key = jax.random.key(5, impl="threefry2x32")
    rows, columns = np.meshgrid(np.arange(6), np.arange(10), indexing="ij")
    counters = np.stack([columns // 4, rows]).astype(np.uint32)
    first, second = threefry_2x32(jax.random.key_data(key), jnp.asarray(counters)).reshape(2, 6, 10)
    word = np.where(columns % 4 < 2, first, second)
    bits = np.where(columns % 2 == 0, word & 0xFFFF, word >> 16)
    found = dropout(key, jnp.ones((6, 10)), 0.25)
    np.testing.assert_array_equal(np.asarray(found) > 0, bits < 0.75 * 2**16)


def test_dropout_of_the_first_rows_does_not_depend_on_the_others():
    key = jax.random.key(3)
    short, long = dropout(key, jnp.ones((5, 7)), 0.5), dropout(key, jnp.ones((90, 7)), 0.5)
    np.testing.assert_array_equal(short, long[:5])


def test_dropout_of_rows_that_broadcast_is_that_of_each_row():
    key, x = jax.random.key(4), jnp.ones((3, 2, 4, 9))
    n, h, q = jnp.meshgrid(*map(jnp.arange, x.shape[:3]), indexing="ij", sparse=True)
    rows, start, shift = (5 + n * 4 + q) * 2 + h, n * 8 + 4, jnp.int32(3)
    found = dropout(key, x, 0.5, rows=rows, start=start, shift=shift)
    # Column c of row r is that of a table with all rows and columns.
    table = np.asarray(dropout(key, jnp.ones((40, 40)), 0.5))
    first = np.broadcast_to(np.asarray(start + shift), x.shape[:3])
    expected = table[np.asarray(rows)[..., None], first[..., None] + np.arange(9)]
    np.testing.assert_array_equal(found, expected)
    assert (found[:, 0] != found[:, 1]).any()  # heads draw apart


def test_dropout_gradient_is_its_mask():
    x = jnp.ones((4, 6))
    key = jax.random.key(2)
    gradient = jax.grad(lambda x: dropout(key, x, 0.5).sum())(x)
    np.testing.assert_array_equal(gradient, dropout(key, x, 0.5))
    assert dropout(key, x, 0.0) is x


@pytest.mark.parametrize("rate", [1e-6, 1e-9, 0.999, 1 - 2**-16])
def test_dropout_near_the_ends_of_its_range(rate):
    x = jnp.ones((400, 500))
    dropped = np.asarray(dropout(jax.random.key(0), x, rate))
    kept = dropped[dropped != 0]
    assert np.isfinite(dropped).all()
    # The rate is a multiple of 2**-16; the scale follows it, so the mean stays 1.
    expected = round((1 - rate) * 2**16) / 2**16
    assert_allclose(len(kept) / x.size, expected, atol=5 * (expected / x.size) ** 0.5)
    assert_allclose(kept, 1 / expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "error"),
    # A CPU computes tensorfloat32 in float32; bfloat16 has 8 bits.
    [
        pytest.param(
            "tensorfloat32",
            (0, 1e-6 if jax.default_backend() == "cpu" else 5e-3),
            marks=pytest.mark.slow,
        ),
        ("bfloat16", (1e-3, 2e-2)),
    ],
)
def test_lower_precision_stays_near(dtype, error):
    packed = pack_users(draw_users([20, 30]), BLOCK)
    exact, rough = make_model(), make_model(dtype=dtype)
    params = exact.init(jax.random.key(0), packed, train=False)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))

    def loss_and_gradient(model):
        def loss(params):
            hidden = model.apply(params, packed, train=False)[:50].astype(jnp.float32)
            return (hidden**3).sum(), hidden

        gradient, hidden = jax.grad(loss, has_aux=True)(params)
        return [hidden, jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(gradient)])]

    for a, b in zip(loss_and_gradient(exact), loss_and_gradient(rough), strict=True):
        relative = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
        assert error[0] <= relative <= error[1]


def test_an_item_bias_is_added_to_the_scores():
    model, plain = (make_model(item_bias=bias, dropout=0.5) for bias in (True, False))
    packed = pack_users(draw_users([3, 20]), BLOCK)
    params = model.init(jax.random.key(0), packed, train=False)
    counts = np.random.default_rng(0).integers(50, size=NUM_ITEMS)
    bias = [math.log(1 + n) for n in counts]
    bias = np.array(bias) - sum(bias) / NUM_ITEMS
    start = log_popularity(counts, rows=NUM_ITEMS)
    assert_allclose(start[:, 0], bias, atol=1e-6)
    params = {"params": params["params"] | {"item_bias": start}}
    rngs, items = {"dropout": jax.random.key(1)}, jnp.array([5, 2])

    def scores(model, **arguments):  # with the same dropout
        hidden, table = model.apply(params, packed, rngs=rngs, train=True, **arguments)
        return np.float64(hidden @ table.T)

    found = scores(model, method="encode_and_table")
    expected = scores(plain, method="encode_and_table") + bias
    assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    found = scores(model, items=items, method="encode_and_rows")
    expected = scores(plain, items=items, method="encode_and_rows") + bias[items]
    assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_items_behind_the_last_have_no_bias():
    assert log_popularity(np.array([0, 0, 7]), rows=5)[3:].tolist() == [[0], [0]]
