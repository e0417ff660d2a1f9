"""SASRec over flat-packed users: a causal transformer that predicts each user's next item.

Shape letters: T packed tokens, D width, H heads, V catalogue, L window, K keys a query block sees.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.model.mixture import (
    NEAR_ITEMS,
    History,
    Mixture,
    MixtureWeights,
    read_history,
)
from seqfair_jax.model.packing import BLOCK, Packed

PRECISIONS = {
    # config value: (activations' dtype, precision of matrix products)
    "float32": (jnp.float32, lax.Precision.HIGHEST),
    "tensorfloat32": (jnp.float32, lax.Precision.HIGH),
    "bfloat16": (jnp.bfloat16, lax.Precision.DEFAULT),
}
MAX_DROPOUT = 0.999  # rates are multiples of 2**-16, and 1 would leave nothing
_KEYS = 16  # the keys before a block are a multiple, for the vectors of the processor
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))  # of threefry's rounds
_FEW = 16  # where more than one token in 16 is asked for, all attend: that copies no keys
_LAYER_NORM_EPSILON = 1e-5
POSITION_BUCKETS, _EXACT, _LONGEST = 32, 16, 128  # see `position_buckets`
_TABLES = ("item_embedding", "output_embedding", "item_bias")  # parameters with a row for each item
_BIAS_COLUMNS = 8  # the bias, then zeros: matrix products are fast where widths are multiples of 8


def dropout(
    key: jax.Array,
    x: jax.Array,
    rate: float,
    *,
    rows: jax.Array | None = None,
    start: jax.Array | int = 0,
    shift: jax.Array | int = 0,
) -> jax.Array:
    """Zero each entry with probability `rate`, scale the others by 1 / (1 - rate).

    One threefry block gives four entries of a row 16 bits each (`jax.random.bernoulli` uses a
    whole block for one entry). So the rate is rounded to a multiple of 2**-16; the scale follows
    the rounded rate, and the mean is exact. Threefry, unlike `rbg`, draws the same bits under
    `vmap` as alone. Column c of the row with number r uses block (c // 4, r). So a token's
    dropout depends neither on the amount of padding nor on the device that has the token.

    Args:
        key: a threefry key.
        x: f[..., columns]; the dimensions before the last one make N rows.
        rate: 0 to `MAX_DROPOUT`; below 2**-17 nothing is dropped.
        rows: the rows' numbers, i32 of a shape that broadcasts to the dimensions before the last
            one; 0, 1, 2, ... if None. XLA computes numbers that are made of `jnp.arange` where it
            uses them, if they are not reshaped.
        start: the number of each row's first column, a multiple of 4: like `rows`, or one for all.
        shift: 0 to 3, added to `start`. The int 0 costs less than an array.
    """
    threshold = round((1.0 - rate) * 2**16)
    if threshold == 2**16:  # does not fit into the 16 bits that it is compared with
        return x
    *places, columns = x.shape
    aligned = isinstance(shift, int) and shift == 0
    num_blocks = -(-columns // 4) + (not aligned)
    shape = (*places, num_blocks)
    numbers = jnp.arange(x.size // columns).reshape(places) if rows is None else rows
    first = jnp.broadcast_to(jnp.asarray(start // 4, jnp.uint32)[..., None], shape)
    words = _threefry(
        jax.random.key_data(key),
        first + lax.broadcasted_iota(jnp.uint32, shape, len(places)),
        jnp.broadcast_to(numbers.astype(jnp.uint32)[..., None], shape),
    )
    bits = lax.bitcast_convert_type(jnp.stack(words, axis=-1), jnp.uint16)
    bits = bits.reshape(*places, 4 * num_blocks)
    bits = lax.dynamic_slice_in_dim(bits, 0 if aligned else shift, columns, axis=-1)
    return jnp.where(bits < threshold, x * (2**16 / threshold), jnp.zeros_like(x))


def _threefry(key: jax.Array, x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both words of the threefry blocks with counters u32[...] x and y (Salmon et al. 2011).

    The same bits as `jax.extend.random.threefry_2x32`, which on a CPU is a loop that writes all
    words to memory and reads them again five times. XLA computes this one where its words are used.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    x, y = x + keys[0], y + keys[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            x = x + y
            y = x ^ ((y << np.uint32(distance)) | (y >> np.uint32(32 - distance)))
        x, y = x + keys[(i + 1) % 3], y + keys[(i + 2) % 3] + np.uint32(i + 1)
    return x, y


def _bias_init(fan_in: int) -> nn.initializers.Initializer:
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(
        key, shape, dtype, -bound, bound
    )


# variance_scaling draws from +-sqrt(3 * scale / fan_in), so a third gives +-1/sqrt(fan_in).
_uniform_fan_in = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def position_buckets(distance: np.ndarray) -> np.ndarray:
    """The bucket of each distance of two tokens: i32[...], 0 to `POSITION_BUCKETS` - 1.

    As in T5 (Raffel et al. 2020): a distance below 16 has its own bucket. A longer distance d has
    bucket 16 + floor(16 log(d / 16) / log(128 / 16)), but at most the last one.

    Args:
        distance: i[...], how many tokens apart; below 0 counts as 0.
    """
    growth = np.log(np.maximum(distance, _EXACT) / _EXACT) / np.log(_LONGEST / _EXACT)
    # A logarithm may be rounded down just below a whole number.
    far = _EXACT + np.floor((POSITION_BUCKETS - _EXACT) * growth + 1e-6)
    near = np.maximum(distance, 0)
    return np.where(near < _EXACT, near, np.minimum(far, POSITION_BUCKETS - 1)).astype(np.int32)


def position_bias(table: jax.Array, *, block: int, num_keys: int) -> jax.Array:
    """The number of each query of a block and each key, by their distance: f32[H, block, K].

    All blocks share it. A key that is later than its query has a number too, which nothing reads.

    Args:
        table: f32[H, `POSITION_BUCKETS`].
        block: the queries.
        num_keys: K; the last `block` keys are the queries' own tokens.
    """
    size = block + num_keys
    by_distance = table[:, position_buckets(num_keys - 1 - np.arange(size))]
    # Query q and key k are K - block + q - k apart, so row q of the result begins at column
    # block - 1 - q: one column earlier than the row before. Copies of the row behind each other,
    # cut into rows that are one shorter, are such rows. The gradient of a gather of all pairs would
    # be added up in place, where many pairs wait for each other on a GPU.
    copies = jnp.tile(by_distance, block)[:, block - 1 : block * size - 1]
    return copies.reshape(-1, block, size - 1)[:, :, :num_keys]


class Block(nn.Module):
    """Pre-norm transformer block: attention among a user's own earlier tokens, then feed-forward.

        x <- x + A(norm(x)),    x <- x + W relu(U norm(x))

    with attention A and LayerNorm. A gated block has, with RMSNorm and the logistic function s,

        x <- x + s(G x) * A(norm(x)),    x <- x + s(H x) * W (silu(U norm(x)) * (V norm(x)))

    Sources: gates by the input, Borisyuk et al. 2024 (LiGR); SwiGLU, Shazeer 2020; RMSNorm, Zhang
    and Sennrich 2019. Every matrix has a bias.

    With a position bias, head h of A adds b[h, bucket of i - j] to the logit of token i and an
    earlier token j (`position_buckets`). b is learned and starts at 0.

    Attributes:
        dim: D, a multiple of `num_heads`.
        ff_dim: width of the feed-forward's hidden layer.
        num_heads: H.
        dropout: rate on attention weights, attention output, feed-forward hidden and output.
        gated, position_bias: as above.
        dtype, precision: see `PRECISIONS`.
    """

    dim: int
    ff_dim: int
    num_heads: int
    dropout: float
    gated: bool
    position_bias: bool
    dtype: Any
    precision: Any

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        visible: jax.Array,
        first: jax.Array | int,
        train: bool,
        only: jax.Array | None = None,
    ) -> jax.Array:
        """Map x f[T, D] to f[T, D], or to f[N, D] for some of the tokens.

        Args:
            x: the tokens.
            visible: bool[T/block, block, K], `visible_keys`.
            first: the number of the first token in the batch, for dropout.
            train: apply dropout.
            only: i32[N], the tokens to return; None for all. Not in training.
        """

        def drop(y, **place):
            return dropout(self.make_rng("dropout"), y, self.dropout, **place) if train else y

        tokens = {"rows": first + jnp.arange(x.shape[0])}

        def dense(features, name, **init):
            init = {"kernel_init": _uniform_fan_in, **init}
            return nn.Dense(features, dtype=self.dtype, precision=self.precision, name=name, **init)

        def norm(name):
            kind = nn.RMSNorm if self.gated else nn.LayerNorm
            return kind(epsilon=_LAYER_NORM_EPSILON, dtype=self.dtype, name=name)

        def gate(y, x, name):
            return y * nn.sigmoid(dense(self.dim, name)(x)) if self.gated else y

        num_blocks, block, num_keys = visible.shape
        head_dim = self.dim // self.num_heads
        qkv = dense(
            3 * self.dim,
            "attention_in",
            kernel_init=nn.initializers.xavier_uniform(),
            bias_init=nn.initializers.zeros,
        )(norm("attention_norm")(x))
        qkv = qkv.reshape(num_blocks, block, 3, self.num_heads, head_dim)
        query, key, value = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]
        key, value = _with_previous(key, visible), _with_previous(value, visible)
        alone = only if only is not None and _FEW * len(only) <= len(x) else None
        if alone is not None:  # a block for each token: a query, and the keys of its block
            query = query.reshape(-1, 1, *query.shape[2:])[alone]
            visible = visible.reshape(-1, 1, visible.shape[-1])[alone]
            key, value = key[alone // block], value[alone // block]
        query, key, value = map(_heads_first, (query, key, value))
        logits = jnp.einsum("nqd,nkd->nqk", query, key, precision=self.precision)
        logits = logits.reshape(-1, self.num_heads, *logits.shape[1:])
        logits = logits.astype(jnp.float32) * head_dim**-0.5
        if self.position_bias:
            shape = (self.num_heads, POSITION_BUCKETS)
            table = self.param("position_bias", nn.initializers.zeros, shape)
            bias = position_bias(table, block=block, num_keys=num_keys)[None]
            if alone is not None:  # [N, H, 1, K]
                bias = jnp.swapaxes(bias[:, :, alone % block], 0, 2)
            logits += bias
        logits = jnp.where(visible[:, None], logits, -jnp.inf)
        # A row for each query and head, a column for each key, both counted in the batch, the keys
        # from whole blocks before the first one.
        behind = -num_keys % block
        n, h, q = jnp.meshgrid(*map(jnp.arange, logits.shape[:3]), indexing="ij", sparse=True)
        pairs = {
            "rows": (first + n * block + q) * self.num_heads + h,
            "start": n * block + behind + first // 4 * 4,
            "shift": first % 4,
        }
        weights = drop(jax.nn.softmax(logits, axis=-1).astype(self.dtype), **pairs)
        weights = weights.reshape(-1, *weights.shape[2:])
        mixed = jnp.einsum("nqk,nkd->nqd", weights, value, precision=self.precision)
        mixed = jnp.swapaxes(mixed.reshape(*logits.shape[:3], head_dim), 1, 2)
        mixed = mixed.reshape(-1, self.dim)
        if only is not None:
            x = x[only]
            mixed = mixed[only] if alone is None else mixed
        mixed = dense(self.dim, "attention_out", bias_init=nn.initializers.zeros)(mixed)
        x = x + gate(drop(mixed, **tokens), x, "attention_gate")

        y = norm("ff_norm")(x)
        if self.gated:
            u, v = jnp.split(dense(2 * self.ff_dim, "ff_in")(y), 2, axis=-1)
            y = nn.silu(u) * v
        else:
            y = nn.relu(dense(self.ff_dim, "ff_in", bias_init=_bias_init(self.dim))(y))
        y = drop(y, **tokens)
        y = dense(self.dim, "ff_out", bias_init=_bias_init(self.ff_dim))(y)
        return x + gate(drop(y, **tokens), x, "ff_gate")


def _with_previous(blocks: jax.Array, visible: jax.Array) -> jax.Array:
    """Append to each block of tokens [n, block, ...] the blocks before it: [n, K, ...]."""
    num_blocks, block, num_keys = visible.shape
    lookback = -(-(num_keys - block) // block)
    zeros = jnp.zeros((lookback, *blocks.shape[1:]), blocks.dtype)
    padded = jnp.concatenate([zeros, blocks])
    parts = [padded[i : i + num_blocks] for i in range(lookback + 1)]
    parts[0] = parts[0][:, -num_keys % block :]
    return jnp.concatenate(parts, axis=1)


def _heads_first(x: jax.Array) -> jax.Array:
    """[n, tokens, H, D / H] as [n H, tokens, D / H].

    A matrix product with a single batch dimension needs no copy of its factors on a CPU. With one
    head this is not a copy either.
    """
    return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1], x.shape[3])


def visible_keys(slots: jax.Array, *, block: int, window: int) -> jax.Array:
    """Which keys each query may look at: the same user's, not later than itself.

    Tokens are cut into blocks. A block's queries see the keys of their own block and those before
    it that cover a window, a multiple of 16. This is exact, since no user has more than `window`
    tokens.

    Args:
        slots: i32[T], the batch slot of each token; T is a multiple of `block`.
        block: tokens in a block.
        window: the most tokens that a user can have.

    Returns:
        bool[T / block, block, K]; the last `block` keys are the block's own. A query always sees
        itself, so no row of the attention is empty. Padding tokens only see each other.
    """
    lookback = -(-(window - 1) // block)
    before = min(lookback * block, -(-(window - 1) // _KEYS) * _KEYS)
    own = slots.reshape(-1, block)
    own_index = jnp.arange(slots.size, dtype=jnp.int32).reshape(-1, block)
    padded = jnp.concatenate([jnp.full((lookback, block), -1, slots.dtype), own])
    keys = jnp.concatenate([padded[i : i + own.shape[0]] for i in range(lookback + 1)], axis=1)
    keys = keys[:, -(before + block) :]
    behind = jnp.arange(-before, block, dtype=jnp.int32)
    key_index = own_index[:, :1] + behind[None, :]
    same_user = own[:, :, None] == keys[:, None, :]
    return same_user & (key_index[:, None, :] <= own_index[:, :, None])


class SASRec(nn.Module):
    """SASRec with a softmax over the catalogue (Kang and McAuley 2018; paper, sections 2.1, 3.1).

    Attributes:
        num_items: V.
        dim, ff_dim, num_blocks, num_heads: sizes of the transformer.
        dropout: one rate for every place (see `Block`), the summed embeddings and, in training,
            the output embeddings.
        max_len: L, the begin token included; L - 1 positions.
        tie_embeddings: score with the input embeddings instead of separate output embeddings.
        init_scale: standard deviation of the initial embeddings and positions.
        dtype: a key of `PRECISIONS`. Parameters are always float32.
        pointer: mix the softmax with a pointer to the user's own items (`mixture`).
        neighbours: mix it with that many neighbours of each item (`mixture`); 0 for none.
        shards: devices of the mesh's catalogue axis. Above 1 the tables have zero to
            `shards - 1` more rows than items, `init` makes them whole, and every other method
            works inside the mesh on the device's own V / shards rows.
        gated, position_bias: whether the blocks are gated, and have a position bias (`Block`).
        item_bias: whether the score of item i after the hidden state h is e_i . h + b_i, with a
            learned b_i, which is `log_popularity` before a training. It has no dropout. Weight
            decay pulls it to 0 as every parameter: to a score without popularity, from which the
            loss holds it back. In bfloat16 it is rounded as the embeddings are.
    """

    num_items: int
    dim: int
    ff_dim: int
    num_blocks: int
    num_heads: int
    dropout: float
    max_len: int
    tie_embeddings: bool
    init_scale: float
    dtype: str
    pointer: bool = False
    neighbours: int = 0
    shards: int = 1
    gated: bool = False
    position_bias: bool = False
    item_bias: bool = False

    def setup(self) -> None:
        """Name the parameters."""
        self._dtype, self._precision = PRECISIONS[self.dtype]
        normal = nn.initializers.normal(self.init_scale)
        rows = devices.padded(self.num_items, self.shards)
        if not self.is_initializing():
            rows //= self.shards
        self.item_embedding = self.param("item_embedding", normal, (rows, self.dim))
        self.begin_embedding = self.param("begin_embedding", normal, (1, self.dim))
        self.position_embedding = self.param(
            "position_embedding", normal, (self.max_len - 1, self.dim)
        )
        if not self.tie_embeddings:
            self.output_embedding = self.param("output_embedding", normal, (rows, self.dim))
        self.blocks = [
            Block(
                self.dim,
                self.ff_dim,
                self.num_heads,
                self.dropout,
                self.gated,
                self.position_bias,
                self._dtype,
                self._precision,
                name=f"block_{i}",
            )
            for i in range(self.num_blocks)
        ]
        self.final_norm = nn.LayerNorm(epsilon=_LAYER_NORM_EPSILON, dtype=self._dtype)
        if self.item_bias:
            self.bias = self.param("item_bias", nn.initializers.zeros, (rows, 1))
        if self.is_mixture:
            self.mixture = Mixture(self.num_items, self.pointer, self.neighbours > 0)

    @property
    def is_mixture(self) -> bool:
        """Whether there are other parts beside the softmax over the catalogue."""
        return self.pointer or self.neighbours > 0

    @property
    def vector_dim(self) -> int:
        """The columns of the hidden states and of `output_table`: D, or D + 8 with `item_bias`."""
        return self.dim + _BIAS_COLUMNS * self.item_bias

    def __call__(
        self,
        packed: Packed,
        *,
        train: bool,
        window: int | None = None,
        only: jax.Array | None = None,
    ) -> jax.Array:
        """The hidden state after each token, f[N, D], after the final LayerNorm.

        With `item_bias` it is f[N, D + 8], with the columns (1, 0, ..., 0) behind D, and
        `output_table` has (b, 0, ..., 0) there, so that scores are still products of the two.

        The scores of what follows token t are `hidden[t] @ output_table().T`. A mixture mixes
        their softmax with other parts, by the weights of `mix`.

        Args:
            packed: T tokens (see `packing.pack`).
            train: apply dropout, with the rng "dropout".
            window: no user has more tokens than this; L - 1 if None. A short one costs less.
            only: i32[N], the tokens to encode, which costs less; None for all. Not in training.
        """
        is_begin = (packed.items == self.num_items)[:, None]
        embedded = self._rows(self.item_embedding, jnp.minimum(packed.items, self.num_items - 1))
        x = jnp.where(is_begin, self.begin_embedding, embedded)
        x = (x + self.position_embedding[packed.positions]).astype(self._dtype)
        x = self._drop(x, train, packed.first)
        size = BLOCK
        if window is None:
            window = self.max_len - 1
        else:  # the smallest block that needs a single one before it
            size = min(BLOCK, 1 << max(window - 2, 0).bit_length())
        visible = visible_keys(packed.slots, block=size, window=window)
        for block in self.blocks[:-1]:
            x = block(x, visible, packed.first, train)
        hidden = self.final_norm(self.blocks[-1](x, visible, packed.first, train, only))
        if self.item_bias:
            hidden = _with_column(hidden, jnp.ones_like(hidden[:, :1]))
        if self.is_mixture and self.is_initializing():
            nothing = jnp.full((1, NEAR_ITEMS), -jnp.inf)
            self.mixture(read_history(packed, self.num_items, jnp.zeros(1, jnp.int32)), nothing)
        return hidden

    def mix(self, history: History, log_totals: jax.Array | None) -> MixtureWeights:
        """The weights of the parts of a mixture; see `Mixture`."""
        return self.mixture(history, log_totals)

    def output_table(self, *, train: bool) -> jax.Array:
        """The embeddings that score the catalogue: f[V, D], with dropout on them in training."""
        table = self._output_embedding()
        first = devices.index(devices.CATALOGUE, self.shards) * len(table)
        table = self._drop(table.astype(self._dtype), train, first)
        return _with_column(table, self.bias) if self.item_bias else table

    def output_rows(self, items: jax.Array, *, train: bool) -> jax.Array:
        """The rows of `output_table` for items i32[N], without a pass over the table: f[N, D]."""
        rows = self._rows(self._output_embedding(), items).astype(self._dtype)
        if train:
            rows = dropout(self.make_rng("dropout"), rows, self.dropout, rows=items)
        return _with_column(rows, self._rows(self.bias, items)) if self.item_bias else rows

    def _output_embedding(self) -> jax.Array:
        return self.item_embedding if self.tie_embeddings else self.output_embedding

    def _rows(self, table: jax.Array, ids: jax.Array) -> jax.Array:
        # `init` has the whole table.
        return devices.lookup(table, ids, 1 if self.is_initializing() else self.shards)

    def _drop(self, x: jax.Array, train: bool, first: jax.Array | int) -> jax.Array:
        if not train:
            return x
        rows = first + jnp.arange(len(x))
        return dropout(self.make_rng("dropout"), x, self.dropout, rows=rows)

    def encode_and_table(self, packed: Packed, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """`__call__` and `output_table` under one `apply`, which share its rngs."""
        return self(packed, train=train), self.output_table(train=train)

    def encode_and_rows(
        self,
        packed: Packed,
        items: jax.Array,
        *,
        train: bool,
    ) -> tuple[jax.Array, jax.Array]:
        """`__call__` and `output_rows` under one `apply`, which share its rngs."""
        return self(packed, train=train), self.output_rows(items, train=train)


def _with_column(x: jax.Array, column: jax.Array) -> jax.Array:
    """A column f[..., 1] behind the columns of x f[..., D], and zeros."""
    widths = [(0, 0)] * (column.ndim - 1) + [(0, _BIAS_COLUMNS - 1)]
    return jnp.concatenate([x, jnp.pad(column.astype(x.dtype), widths)], axis=-1)


def log_popularity(item_counts: np.ndarray, *, rows: int) -> np.ndarray:
    """The item biases before the first step, f32[rows, 1]: the log-popularity, with mean 0.

        b_i = log(1 + n_i) - 1 / V sum_j log(1 + n_j)

    Args:
        item_counts: i[V], n, the training rows of each item.
        rows: V, or more, which belong to no item and are 0.
    """
    logs = np.log1p(np.asarray(item_counts, np.float64))
    return np.pad(logs - logs.mean(), (0, rows - len(logs))).astype(np.float32)[:, None]


def is_table(path: tuple) -> bool:
    """Whether a leaf of a state has a row for each item: a table, or its optimiser state."""
    return getattr(path[-1], "key", None) in _TABLES


def param_specs(params: Any) -> Any:
    """How the mesh splits a run's parameters: the item tables by rows."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P(devices.CATALOGUE) if is_table(path) else P(), params
    )
