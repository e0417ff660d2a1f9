import numpy as np
import pytest

from seqfair_jax.errors import UserError
from seqfair_jax.training.batches import (
    Batches,
    choose_sizes,
    draw_batches,
    epoch_batches,
    spread,
    token_sizes,
)


def test_epoch_batches_is_a_pure_function_of_seed_and_epoch():
    draw = {"num_users": 50, "batch_size": 8, "steps": 20}
    first = epoch_batches(3, 7, **draw)
    assert first.dtype == np.int32
    np.testing.assert_array_equal(first, epoch_batches(3, 7, **draw))
    assert (first != epoch_batches(3, 8, **draw)).any()
    assert (first != epoch_batches(4, 7, **draw)).any()


def test_epoch_batches_follow_the_permutations_and_drop_the_partial_batch():
    batches = epoch_batches(3, 7, num_users=10, batch_size=4, steps=5)
    rng = np.random.default_rng([3, 7])
    one, two, three = (rng.permutation(10) for _ in range(3))
    np.testing.assert_array_equal(batches, [one[:4], one[4:8], two[:4], two[4:8], three[:4]])


def test_no_user_appears_twice_in_a_batch():
    for batch in epoch_batches(0, 0, num_users=9, batch_size=7, steps=30):
        assert len(set(batch.tolist())) == 7


@pytest.mark.parametrize("side_by_side", [True, False])
def test_the_batches_of_several_runs_and_their_tokens(side_by_side):
    lengths = np.array([1, 20, 3, 4, 50, 6, 7, 8, 9, 2], np.int32)
    seeds = (5, 3, 5)
    drawn = draw_batches(seeds, 2, lengths=lengths, batch_size=4, steps=6, vmap=side_by_side)
    assert drawn.user_ids.shape == (3, 6, 4)
    for run, seed in enumerate(seeds):
        alone = spread(epoch_batches(seed, 2, num_users=10, batch_size=4, steps=6), lengths)
        np.testing.assert_array_equal(drawn.user_ids[run], alone)
        for step, users in enumerate(alone):
            assert drawn.targets[run, step] == sum(lengths[user] for user in users)
    expected = drawn.targets.max(axis=0) if side_by_side else drawn.targets
    np.testing.assert_array_equal(drawn.tokens, expected)


def test_a_batch_is_spread_so_that_its_equal_parts_have_similar_lengths():
    rng = np.random.default_rng(0)
    lengths = rng.geometric(0.08, size=500).clip(max=199)
    drawn = epoch_batches(0, 0, num_users=500, batch_size=64, steps=20)
    ordered = spread(drawn, lengths)
    np.testing.assert_array_equal(np.sort(ordered), np.sort(drawn))
    for parts in (2, 4, 8):
        sums = lengths[ordered].reshape(20, parts, -1).sum(axis=-1)
        assert (sums.max(axis=-1) - sums.min(axis=-1) <= lengths[drawn].max(axis=-1)).all()
    # The first half gets 50 and 8, the second one 20 and 9.
    assert spread(np.array([[0, 1, 2, 3]]), np.array([8, 50, 9, 20])).tolist() == [[1, 0, 3, 2]]


@pytest.mark.parametrize("shards", [2, 3, 4])
def test_the_tokens_of_a_step_fit_every_part_of_its_batch(shards):
    lengths = np.array([1, 20, 3, 4, 50, 6, 7, 8, 9, 2], np.int32)
    drawn = draw_batches((5,), 0, lengths=lengths, batch_size=7, steps=4, vmap=False, shards=shards)
    for users, tokens in zip(drawn.user_ids[0], drawn.tokens[0], strict=True):
        part = -(-7 // shards)
        sums = [lengths[users[i : i + part]].sum() for i in range(0, 7, part)]
        assert tokens == max(sums)


def test_the_smallest_size_that_fits_a_batch():
    index = choose_sizes((128, 256), np.array([[1, 128], [129, 256]]))
    assert index.tolist() == [[0, 0], [1, 1]]
    assert index.dtype == np.int32


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_larger_than_the_users_is_refused(batch_size):
    with pytest.raises(UserError, match=f"train.batch_size is {batch_size}.*1 to 10"):
        epoch_batches(0, 0, num_users=10, batch_size=batch_size, steps=1)


@pytest.mark.parametrize("vmap", [True, False])
def test_the_packed_sizes_do_not_depend_on_the_seeds(vmap):
    lengths = np.random.default_rng(0).integers(1, 190, 500)
    settings = {"lengths": lengths, "batch_size": 32, "steps": 10, "vmap": vmap}
    one, other = Batches([0, 1], **settings), Batches([7, 900], **settings)
    assert one.sizes == other.sizes
    if not vmap:
        assert one.sizes == Batches([5], **settings).sizes
    drawn = other(3)
    assert drawn.user_ids.shape == (2, 10, 32)
    needed = drawn.targets.max(axis=0) if vmap else drawn.targets
    assert (np.asarray(drawn.sizes)[np.asarray(drawn.size_index)] >= needed).all()


def test_a_batch_beyond_the_largest_size_gets_a_size_of_its_own(monkeypatch):
    batches = Batches([0], lengths=np.full(40, 50), batch_size=8, steps=5, vmap=False)
    batches.sizes = (128,)
    assert batches(0).sizes == (128, 1024)
    assert (np.asarray(batches(0).size_index) == 1).all()


def test_token_sizes_by_hand():
    # Padding with sizes (64, 192): 3 * 0 + 54; one size alone would waste far more.
    totals = np.array([64, 64, 64, 130, 192])
    assert token_sizes(totals, multiple=64, most=2) == [64, 192]
    assert token_sizes(totals, multiple=64, most=1) == [192]
    assert token_sizes(totals, multiple=64, most=4) == [64, 192]
    assert token_sizes(np.array([[1, 100], [300, 301]]), multiple=64, most=2) == [128, 320]


def test_token_sizes_are_the_best_choice():
    rng = np.random.default_rng(0)
    totals = rng.integers(1, 900, 60)
    sizes = token_sizes(totals, multiple=100, most=3)

    def cost(sizes):
        return sum(min(s for s in sizes if s >= n) for n in totals)

    top = -(-totals.max() // 100) * 100
    others = range(100, top, 100)
    best = min(cost([a, b, top]) for a in others for b in others)
    assert len(sizes) == 3
    assert cost(sizes) == best
