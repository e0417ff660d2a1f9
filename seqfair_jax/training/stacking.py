"""Fits the weights of a mixture (`model.mixture`) to targets that the network was not trained on.

Shape letters: n users and their targets, B users in a batch, V catalogue, D width, P newest items
of a history that the pointer sees, W newest items whose neighbours count, K neighbours of an item.

The network knows the targets that it was trained on better than those of the test, so weights that
are trained on the same targets trust the network too much. Therefore the network trains by itself,
as any SASRec. At each validation the weights w of the mixture are fitted to the first targets of n
validation users (stacked generalisation, Wolpert 1992):

    w = argmin  1 / n sum_u -log p_w(y_u) / (1 - m_w(u))  +  1 / (2 n) |w - w_0|^2

m_w(u) is 0. If items of the history are not ranked (`evaluate.mask_seen`), it is the sum of p_w
over them. Then what a part gives to these items does not matter. w_0 are the first weights. The
second term is that of a standard normal prior of w - w_0. The fit begins at w_0 and takes Newton
steps in a trust region. (On a log with long histories the first step of L-BFGS is so long that it
closes a gate, where the slope is 0.) The validation score is too good by this, as with any number
that validation chooses; no row of the test is read.
"""

import functools
import logging
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
from seqfair_jax.devices import CATALOGUE, USERS
from seqfair_jax.errors import DivergedError
from seqfair_jax.evaluation.ranking import fill_batches, packed_tokens
from seqfair_jax.model.mixture import (
    NEAR_ITEMS,
    History,
    Mixture,
    Neighbours,
    mixture_losses,
    newest_items,
    read_history,
    seen_mass,
)
from seqfair_jax.model.packing import BLOCK, Packed, Sequences, pack
from seqfair_jax.model.sasrec import PRECISIONS, SASRec, param_specs
from seqfair_jax.model.softmax_loss import softmax_loss

_MOST = 20_000  # users: more make no better weights
_SEED = 0x6D6978  # beside the seed, so that no other draw is the same
_STEPS = 100  # of the fit at most; about ten are enough
_SLOPE = 1e-5  # the norm of the gradient at which the fit ends
_RADIUS = 0.3  # the length of its first step
_MOST_SEEN = 1 - 1e-6  # of p on seen items; what is left is rounding

_log = logging.getLogger(__name__)


class FitTargets(NamedTuple):
    """What the loss of a mixture reads of each target."""

    history: History
    losses: jax.Array  # f32[n], -log of the softmax over the catalogue
    returns: jax.Array  # f32[n], what the softmax gives to the user's own items
    items: jax.Array  # i32[n]
    shares: jax.Array | None  # f32[n, W], S of the target for each newest item; or no neighbours
    log_totals: jax.Array | None  # f32[n, W], log t of these items
    seen: jax.Array | None = None  # f32[n], as `mixture.seen_mass` takes it; None: all are ranked
    near_seen: jax.Array | None = None  # f32[n, W], likewise; None also without neighbours


def choose_users(dataset: Dataset, seed: int) -> np.ndarray:
    """The validation users whose first target with a known item fits the mixture, in order: i64[n].

    They have such a target, and training rows.

    Args:
        dataset: the split log.
        seed: of the draw, if there are more than `_MOST`.
    """
    lengths = dataset.train_lengths
    known = (lengths > 0) & (np.diff(dataset.offsets) > lengths)
    users = dataset.valid.users[known[dataset.valid.users]]
    drawn = np.random.default_rng([seed, _SEED]).permutation(users)
    return np.sort(drawn[:_MOST])


def make_fit(model: SASRec, read: Callable[[Any], FitTargets] | None) -> Callable[[Any, str], Any]:
    """The function that fits the mixture of a run's parameters.

    Args:
        model: a mixture.
        read: from `make_reader`; None if there is no user to fit to.

    Returns:
        fit(params, what) -> the parameters of the mixture, on the host; those before if there are
        no users. All processes must call it. It raises DivergedError where a loss is not finite;
        the message says whose it was, which is `what`.
    """
    if read is None:
        return lambda params, what: devices.to_host(params["params"]["mixture"])

    def fit(params: Any, what: str) -> Any:
        targets = read(params)
        if not np.isfinite(targets.losses).all():
            raise DivergedError(f"{what}: a loss is not finite, so no mixture can be fitted")
        return devices.tree_of_first(fit_weights(model, targets))

    return fit


def make_reader(
    model: SASRec,
    dataset: Dataset,
    users: np.ndarray,
    neighbours: Neighbours | None,
    *,
    max_logits: int,
    mask_seen: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[Any], FitTargets]:
    """The function that reads what the loss of a mixture needs, from a run's parameters.

    Args:
        model: a mixture.
        dataset: the split log.
        users: from `choose_users`, at least one.
        neighbours: on the mesh; None for a model without neighbours.
        max_logits: as for `softmax_loss`.
        mask_seen: the items of a history are not ranked. Those of the window count, the newest
            `max_len` - 2.
        mesh: the devices, which share the users; one if None.

    Returns:
        read(params) -> the targets on the host, in the order of the users.
    """
    mesh = mesh or devices.make_mesh()
    num_tokens = packed_tokens(model.max_len)
    lengths = np.minimum(dataset.train_lengths[users] + 1, model.max_len - 1)
    shards = devices.size(mesh, USERS)
    batches = fill_batches(lengths, num_tokens, max_users=num_tokens // 8, shards=shards)
    real = batches.ravel() >= 0
    inputs = (
        jax.tree.map(lambda x: devices.put(mesh, x, P()), _sequences(dataset, users, lengths)),
        neighbours,
        devices.put(mesh, batches, P(USERS)),
    )

    def of_batch(
        params: Any, sequences: Sequences, neighbours: Neighbours | None, batch: jax.Array
    ) -> FitTargets:
        packed = pack(sequences, batch, num_tokens=num_tokens, num_items=model.num_items)
        newest = jnp.maximum(jnp.cumsum(packed.lengths) - 1, 0)
        targets = packed.targets[newest]
        precision = PRECISIONS[model.dtype][1]
        hidden = model.apply(params, packed, train=False, only=newest)
        table = model.apply(params, train=False, method="output_table")
        losses = softmax_loss(
            hidden, table, targets, precision, max_logits, model.num_items, model.shards
        )

        def logits(items: jax.Array) -> jax.Array:
            """E h of items i32[B, k] after each history."""
            rows = model.apply(params, items, train=False, method="output_rows")
            return jnp.einsum(
                "bd,bkd->bk", hidden, rows, precision=precision, preferred_element_type=jnp.float32
            )

        history = read_history(packed, model.num_items, newest)
        returns, shares, log_totals = jnp.zeros_like(losses), None, None
        seen_total, near_seen = None, None
        known = jnp.minimum(history.items, model.num_items - 1)
        log_sum = losses[:, None] + logits(targets[:, None])
        if mask_seen:
            seen = jnp.sort(newest_items(packed, model.max_len - 2, model.num_items, newest))
            counts = (seen < model.num_items) & (seen != targets[:, None])
            counts &= jnp.diff(seen, axis=1, prepend=-1) > 0  # each item once
            if model.pointer:
                counts &= ~(seen[:, :, None] == history.items[:, None, :]).any(axis=2)
            given = jnp.exp(logits(jnp.minimum(seen, model.num_items - 1)) - log_sum)
            seen_total = jnp.where(counts, given, 0).sum(axis=1)
        if model.pointer:
            own = jnp.exp(logits(known) - log_sum)
            returns = jnp.where(history.of_items[:, :, 0], own, 0).sum(axis=1)
        if neighbours is not None:
            known = known[:, :NEAR_ITEMS]
            near = devices.lookup(neighbours.items, known, model.shards)
            all_shares = devices.lookup(neighbours.shares, known, model.shards)
            is_target = near == targets[:, None, None]
            shares = jnp.where(is_target, all_shares, 0).sum(axis=2)
            if mask_seen:
                place = jax.vmap(jnp.searchsorted)(seen, near.reshape(len(near), -1))
                found = jnp.take_along_axis(seen, place, axis=1, mode="clip").reshape(near.shape)
                is_seen = (found == near) & (near < model.num_items) & ~is_target
                near_seen = jnp.where(is_seen, all_shares, 0).sum(axis=2)
            log_totals = devices.lookup(neighbours.log_totals, known, model.shards)
        return FitTargets(
            history, losses, returns, targets, shares, log_totals, seen_total, near_seen
        )

    @jax.jit
    def collect(
        params: Any, sequences: Sequences, neighbours: Neighbours | None, batches: jax.Array
    ) -> FitTargets:
        def on_device(
            params: Any, sequences: Sequences, neighbours: Neighbours | None, batches: jax.Array
        ) -> FitTargets:
            return lax.map(functools.partial(of_batch, params, sequences, neighbours), batches)

        return jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(param_specs(params), P(), P(CATALOGUE), P(USERS)),
            out_specs=P(USERS),
            check_vma=False,
        )(params, sequences, neighbours, batches)

    def read(params: Any) -> FitTargets:
        found = devices.to_host(collect(params, *inputs))
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[real], found)

    return read


def _sequences(dataset: Dataset, users: np.ndarray, lengths: np.ndarray) -> Sequences:
    """The training rows of some users and the target behind them, and the users' windows."""
    counts = dataset.train_lengths[users] + 1
    rows = [
        dataset.items[start : start + count]
        for start, count in zip(dataset.offsets[users], counts, strict=True)
    ]
    windows: Any = (np.concatenate(rows), np.cumsum(counts), lengths)
    return Sequences(*(window.astype(np.int32) for window in windows))


def fit_weights(model: SASRec, targets: FitTargets) -> Any:
    """The weights of a mixture that are best for some targets, as numpy arrays.

    Args:
        model: the mixture.
        targets: n of them.
    """
    targets = jax.tree.map(jnp.asarray, targets)
    first = _first_weights(model)
    flat, unravel = ravel_pytree(first)

    def value_and_grad(flat: np.ndarray) -> tuple[float, np.ndarray]:
        value, grad = _value_and_grad(model, flat.astype(np.float32), first, targets)
        return float(value), np.asarray(grad, np.float64)

    def hessian_product(flat: np.ndarray, vector: np.ndarray) -> np.ndarray:
        found = _hessian_product(
            model, flat.astype(np.float32), vector.astype(np.float32), first, targets
        )
        return np.asarray(found, np.float64)

    found = scipy.optimize.minimize(
        value_and_grad,
        np.asarray(flat, np.float64),
        jac=True,
        hessp=hessian_product,
        method="trust-krylov",
        options={"maxiter": _STEPS, "gtol": _SLOPE, "initial_trust_radius": _RADIUS},
    )
    if found.status == 1:
        _log.info("the fit of the mixture ended after %d steps, before it converged", found.nit)
    return jax.tree.map(np.asarray, unravel(jnp.asarray(found.x, jnp.float32)))


def _penalised_loss(model: SASRec, flat: jax.Array, first: Any, targets: FitTargets) -> jax.Array:
    """What the fit makes small."""
    first_flat, unravel = ravel_pytree(first)
    losses = target_losses(model, unravel(flat), targets)
    return losses.mean() + jnp.sum((flat - first_flat) ** 2) / (2 * len(targets.items))


_value_and_grad = jax.jit(jax.value_and_grad(_penalised_loss, argnums=1), static_argnums=0)


@functools.partial(jax.jit, static_argnums=0)
def _hessian_product(
    model: SASRec, flat: jax.Array, vector: jax.Array, first: Any, targets: FitTargets
) -> jax.Array:
    """The second derivative of `_penalised_loss` along a vector."""

    def gradient(flat: jax.Array) -> jax.Array:
        return jax.grad(_penalised_loss, argnums=1)(model, flat, first, targets)

    return jax.jvp(gradient, (flat,), (vector,))[1]


@functools.partial(jax.jit, static_argnums=0)
def _first_weights(model: SASRec) -> Any:
    """The weights of a mixture before its first fit."""
    nothing = jnp.zeros(BLOCK, jnp.int32)
    packed = Packed(nothing, nothing, nothing, nothing, nothing[:1])
    history = read_history(packed, model.num_items, nothing[:1])
    return _mixture(model).init(jax.random.key(0), history, jnp.zeros((1, NEAR_ITEMS)))["params"]


def target_losses(model: SASRec, weights: Any, targets: FitTargets) -> jax.Array:
    """-log of each target's probability among the items that are ranked, f32[n].

    Args:
        model: the mixture.
        weights: its weights.
        targets: n of them.
    """
    mixed: Any = _mixture(model).apply({"params": weights}, targets.history, targets.log_totals)
    losses = mixture_losses(targets.losses, targets.returns, mixed, targets.items, targets.shares)
    if targets.seen is None:
        return losses
    mass = seen_mass(targets.returns, mixed, targets.items, targets.seen, targets.near_seen)
    return losses + jnp.log1p(-jnp.minimum(mass, _MOST_SEEN))


def _mixture(model: SASRec) -> Mixture:
    return Mixture(model.num_items, model.pointer, model.neighbours > 0)
