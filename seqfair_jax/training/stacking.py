"""Fits the weights of a mixture (`model.mixture`) on users that the network was not trained on.

Shape letters: R runs, n targets of these users, T packed tokens, V catalogue, P newest items of a
history that the pointer sees, W newest items whose neighbours count.

The network knows the targets that it was trained on better than those of the test. Weights that
are trained on the same targets trust the network too much, and a gate that reads its hidden state
learns which users these are. So the network trains by itself, as any SASRec, on all users but a
few. At each validation the weights w of the mixture are fitted to the targets of those few (stacked
generalisation, Wolpert 1992):

    w = argmin  1 / n sum_t -log p_w(y_t)  +  1 / (2 n) |w - w_0|^2

w_0 are the first weights; the second term is the logarithm of a standard normal density. L-BFGS
starts at the weights of the validation before.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.data.split import Dataset
from seqfair_jax.devices import USERS
from seqfair_jax.errors import DivergedError
from seqfair_jax.evaluation.ranking import fill_batches, packed_tokens
from seqfair_jax.model.mixture import NEAR_ITEMS, History, Mixture, mixture_losses, read_history
from seqfair_jax.model.packing import BLOCK, Packed, Sequences, pack
from seqfair_jax.model.sasrec import PRECISIONS, SASRec, param_specs
from seqfair_jax.model.softmax_loss import softmax_loss

_MOST_ROWS = 20_000  # training rows of the users: more make no better weights
_SEED = 0x6D6978  # beside the seed, so that no other draw is the same
_STEPS = 100  # of L-BFGS at most


class Targets(NamedTuple):
    """What the loss of a mixture reads of each target of the chosen users."""

    history: History
    losses: jax.Array  # f32[n], -log of the softmax over the catalogue
    returns: jax.Array  # f32[n], what the softmax gives to the user's own items
    items: jax.Array  # i32[n]
    near: jax.Array | None  # f32[n, 2 W], see `training.nearby`


def choose_users(dataset: Dataset, share: float, seed: int) -> np.ndarray:
    """The users that fit the mixture, in order: i64[m].

    They are drawn at random until there are enough of them, or of their rows.

    Args:
        dataset: the split log.
        share: of the users with a training row; at least one is chosen.
        seed: of the draw.
    """
    with_rows = np.flatnonzero(dataset.train_lengths)
    drawn = np.random.default_rng([seed, _SEED]).permutation(with_rows)
    most = max(1, int(share * len(drawn)))
    rows = np.cumsum(dataset.train_lengths[drawn], dtype=np.int64)
    enough = int(np.searchsorted(rows, _MOST_ROWS)) + 1
    return np.sort(drawn[: min(most, enough)])


def make_fit(
    model: SASRec,
    dataset: Dataset,
    users: np.ndarray,
    near: np.ndarray | None,
    *,
    max_logits: int,
    mesh: Mesh | None = None,
) -> Callable[[Any, str], Any]:
    """The function that fits the mixture of a run's parameters.

    Args:
        model, dataset, users, near, max_logits, mesh: as for `make_reader`.

    Returns:
        fit(params, what) -> the parameters of the mixture, on the host. All processes must call
        it. It raises DivergedError where a loss is not finite; the message says whose it was,
        which is `what`.
    """
    read = make_reader(model, dataset, users, near, max_logits=max_logits, mesh=mesh)

    def fit(params: Any, what: str) -> Any:
        targets = read(params)
        if not np.isfinite(targets.losses).all():
            raise DivergedError(f"{what}: a loss is not finite, so no mixture can be fitted")
        start = devices.to_host(params["params"]["mixture"])
        return devices.tree_of_first(fit_weights(model, start, targets))

    return fit


def make_reader(
    model: SASRec,
    dataset: Dataset,
    users: np.ndarray,
    near: np.ndarray | None,
    *,
    max_logits: int,
    mesh: Mesh | None = None,
) -> Callable[[Any], Targets]:
    """The function that reads what the loss of a mixture needs, from a run's parameters.

    Args:
        model: a mixture.
        dataset: the split log.
        users: from `choose_users`.
        near: f32[rows, 2 W], `nearby.Nearby.rows` of these users; None without neighbours.
        max_logits: as for `softmax_loss`.
        mesh: the devices, which share the users; one if None.

    Returns:
        read(params) -> Targets on the host, of the newest L - 1 rows of each user.
    """
    mesh = mesh or devices.make_mesh()
    sequences = _sequences(model, dataset, users)
    lengths = np.asarray(sequences.lengths)
    num_tokens = packed_tokens(model.max_len)
    filled = fill_batches(lengths, num_tokens, max_users=num_tokens // 8)
    extra = devices.padded(len(filled), devices.size(mesh, USERS)) - len(filled)
    padded = np.pad(filled, [(0, extra), (0, 0)], constant_values=-1)
    sequences = jax.tree.map(lambda x: devices.put(mesh, x, P()), sequences)
    batches = devices.put(mesh, padded, P(USERS))

    def of_batch(params: Any, sequences: Sequences, batch: jax.Array) -> tuple[Any, ...]:
        packed = pack(sequences, batch, num_tokens=num_tokens, num_items=model.num_items)
        hidden, table = model.apply(params, packed, train=False, method="encode_and_table")
        precision = PRECISIONS[model.dtype][1]
        losses = softmax_loss(
            hidden, table, packed.targets, precision, max_logits, model.num_items, model.shards
        )
        history = read_history(packed, model.num_items)
        returns = jnp.zeros_like(losses)
        if model.pointer:

            def logits(items: jax.Array) -> jax.Array:
                """E h of items i32[T, k] after each token."""
                rows = model.apply(params, items, train=False, method="output_rows")
                return jnp.einsum(
                    "td,tkd->tk",
                    hidden,
                    rows,
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )

            log_sum = losses + logits(packed.targets[:, None])[:, 0]
            own = logits(jnp.minimum(history.items, model.num_items - 1)) - log_sum[:, None]
            returns = jnp.where(history.of_items[:, :, 0], jnp.exp(own), 0).sum(axis=1)
        user = batch[jnp.minimum(packed.slots, len(batch) - 1)]
        row = sequences.ends[jnp.maximum(user, 0)] - 1 - packed.positions
        row = jnp.where(packed.slots < len(batch), row, -1)
        return row, history, losses, returns, packed.targets

    @jax.jit
    def collect(params: Any, sequences: Sequences, batches: jax.Array) -> tuple[Any, ...]:
        return jax.shard_map(
            lambda params, sequences, batches: lax.map(
                lambda batch: of_batch(params, sequences, batch), batches
            ),
            mesh=mesh,
            in_specs=(param_specs(params), P(), P(USERS)),
            out_specs=P(USERS),
            check_vma=False,
        )(params, sequences, batches)

    def read(params: Any) -> Targets:
        found = devices.to_host(collect(params, sequences, batches))
        row, *rest = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)
        history, losses, returns, items = jax.tree.map(lambda x: x[row >= 0], rest)
        own_near = None if near is None else near[row[row >= 0]]
        return Targets(history, losses, returns, items, own_near)

    return read


def _sequences(model: SASRec, dataset: Dataset, users: np.ndarray) -> Sequences:
    """The training rows of some users alone, and their windows."""
    lengths = dataset.train_lengths[users]
    rows = [
        dataset.items[start : start + length]
        for start, length in zip(dataset.offsets[users], lengths, strict=True)
    ]
    windows: Any = (
        np.concatenate(rows).astype(np.int32),
        np.cumsum(lengths, dtype=np.int32),
        np.minimum(lengths, model.max_len - 1).astype(np.int32),
    )
    return Sequences(*windows)


def fit_weights(model: SASRec, start: Any, targets: Targets) -> Any:
    """The weights of a mixture that are best for some targets, as numpy arrays.

    Args:
        model: the mixture.
        start: the weights to start from.
        targets: n of them.
    """
    targets = jax.tree.map(jnp.asarray, targets)
    first = _first_weights(model)

    def value_and_grad(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = _penalised_loss(model, flat.astype(np.float32), first, targets)
        return float(value), np.asarray(grad, np.float64)

    flat, unravel = ravel_pytree(start)
    found = scipy.optimize.minimize(
        value_and_grad,
        np.asarray(flat, np.float64),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": _STEPS},
    )
    return jax.tree.map(np.asarray, unravel(jnp.asarray(found.x, jnp.float32)))


@functools.partial(jax.jit, static_argnums=0)
@functools.partial(jax.value_and_grad, argnums=1)
def _penalised_loss(model: SASRec, flat: jax.Array, first: Any, targets: Targets) -> jax.Array:
    """What the fit makes small, and its gradient."""
    first_flat, unravel = ravel_pytree(first)
    losses = target_losses(model, unravel(flat), targets)
    return losses.mean() + jnp.sum((flat - first_flat) ** 2) / (2 * len(targets.items))


@functools.partial(jax.jit, static_argnums=0)
def _first_weights(model: SASRec) -> Any:
    """The weights of a mixture before its first fit."""
    nothing = jnp.zeros(BLOCK, jnp.int32)
    packed = Packed(nothing, nothing, nothing, nothing, nothing[:1])
    history = read_history(packed, model.num_items, nothing[:1])
    return _mixture(model).init(jax.random.key(0), history, jnp.zeros((1, NEAR_ITEMS)))["params"]


def target_losses(model: SASRec, weights: Any, targets: Targets) -> jax.Array:
    """-log p of each target by a mixture's weights, f32[n]."""
    shares, log_totals = _halves(targets)
    mixed: Any = _mixture(model).apply({"params": weights}, targets.history, log_totals)
    return mixture_losses(targets.losses, targets.returns, mixed, targets.items, shares)


def _mixture(model: SASRec) -> Mixture:
    return Mixture(model.num_items, model.pointer, model.neighbours > 0)


def _halves(targets: Targets) -> tuple[jax.Array | None, jax.Array | None]:
    """S of each target and log t, f32[n, W] each; None without neighbours."""
    if targets.near is None:
        return None, None
    return targets.near[:, :NEAR_ITEMS], targets.near[:, NEAR_ITEMS:]
