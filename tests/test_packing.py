import jax.numpy as jnp
import numpy as np
import reference

from seqfair_jax.model.packing import Packed, Sequences, pack, user_means


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


def test_means_by_user_ignore_padding():
    values = jnp.array([1.0, 2.0, 6.0, 5.0, jnp.nan, 7.0])
    slots, zeros = jnp.array([0, 0, 0, 1, 2, 2]), jnp.zeros(6, jnp.int32)
    packed = Packed(zeros, zeros, slots, zeros, lengths=jnp.array([3, 1]))
    np.testing.assert_array_equal(user_means(values, packed), [3.0, 5.0])


def test_an_empty_slot_has_no_token_and_the_mean_0():
    """An id below 0 and one that is too large."""
    sequences = Sequences(jnp.arange(9), jnp.array([4, 9]), jnp.array([3, 4]))
    packed = pack(sequences, jnp.array([-1, 0, 2]), num_tokens=8, num_items=9)
    np.testing.assert_array_equal(packed.lengths, [0, 3, 0])
    np.testing.assert_array_equal(packed.slots, [1] * 3 + [3] * 5)
    np.testing.assert_array_equal(packed.targets[:3], [1, 2, 3])
    np.testing.assert_array_equal(user_means(jnp.arange(8.0), packed), [0, 1, 0])
