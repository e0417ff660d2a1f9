import jax.numpy as jnp
import numpy as np
import pytest
import reference

from seqfair_jax.batching import Sequences, epoch_batches, pack


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


def test_no_user_stands_twice_in_a_batch():
    for batch in epoch_batches(0, 0, num_users=9, batch_size=7, steps=30):
        assert len(set(batch.tolist())) == 7


@pytest.mark.parametrize("batch_size", [0, 11])
def test_a_batch_larger_than_the_users_is_refused(batch_size):
    with pytest.raises(ValueError, match=f"train.batch_size is {batch_size}.*1 to 10"):
        epoch_batches(0, 0, num_users=10, batch_size=batch_size, steps=1)


def test_pack_matches_the_windows_of_the_reference():
    rng = np.random.default_rng(0)
    num_items, max_len = 30, 6
    sequences = [rng.integers(num_items, size=n) for n in (1, 9, 5, 3, 6, 2)]
    stops = np.cumsum([len(items) for items in sequences])
    lengths = np.minimum([len(items) for items in sequences], max_len - 1)
    packed = pack(
        Sequences(jnp.asarray(np.concatenate(sequences)), jnp.asarray(stops), jnp.asarray(lengths)),
        jnp.array([4, 1, 0, 99, 5]),  # 99 is no user: an empty slot
        num_tokens=20,
        num_items=num_items,
    )
    at = 0
    for slot, user in enumerate([4, 1, 0, None, 5]):
        if user is None:
            assert packed.lengths[slot] == 0
            continue
        inputs, targets = reference.window(sequences[user], max_len)
        here = slice(at, at + len(targets))
        assert packed.lengths[slot] == len(targets)
        np.testing.assert_array_equal(packed.slots[here], slot)
        np.testing.assert_array_equal(packed.targets[here], targets)
        np.testing.assert_array_equal(packed.positions[here], range(len(targets))[::-1])
        begin_as_number = [num_items if item is None else item for item in inputs]
        np.testing.assert_array_equal(packed.items[here], begin_as_number)
        at += len(targets)
    np.testing.assert_array_equal(packed.slots[at:], 5)  # padding belongs to no slot
    assert at < 20
