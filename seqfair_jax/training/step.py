"""The training step as a pure function of its state, and its loops over steps and over runs.

Shape letters: R runs, S steps, B users in a batch, U users, G groups, V catalogue, T packed tokens.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from seqfair_jax.training.batches import BLOCK, Sequences, pack
from seqfair_jax.model.sasrec import PRECISIONS, SASRec
from seqfair_jax.objectives import Hyperparams, Objective
from seqfair_jax.model.softmax_loss import DEFAULT_MAX_LOGITS, softmax_loss

KEY_IMPL = "threefry2x32"  # the one implementation that draws the same bits under vmap as alone


class Totals(NamedTuple):
    """Sums over the steps of the epoch so far; part of the state, so a resume loses no step."""

    steps: jax.Array  # i32[]
    loss: jax.Array  # f32[]
    grad_norm: jax.Array  # f32[]
    group_loss: jax.Array  # f32[G], summed over users
    group_users: jax.Array  # f32[G]
    objective: dict[str, jax.Array]  # each f32[G]: what else the objective logs


class TrainState(NamedTuple):
    """All that training carries from one step to the next."""

    params: Any
    opt_state: Any
    objective_state: Any
    totals: Totals
    key: jax.Array  # u32[2], the data of a threefry key; step t uses fold_in(key, t)
    step: jax.Array  # i32[]
    latest: dict[str, jax.Array]  # what the objective logged at the last step
    failed_step: jax.Array  # i32[], the first step that was not finite, -1 while all were


class TrainData(NamedTuple):
    """What every step reads and none changes; shared by all runs."""

    sequences: Sequences
    membership: jax.Array  # bool[U, G]
    target_weights: jax.Array  # f32[V]


class Task(NamedTuple):
    """The static parts of a step."""

    model: SASRec
    objective: Objective
    optimizer: optax.GradientTransformation
    max_logits: int = DEFAULT_MAX_LOGITS  # see `softmax_loss`


def make_optimizer(
    *,
    learning_rate: float,
    decay_steps: int = 0,
    weight_decay: float = 0.0,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """Adam; decoupled weight decay and clipping by the global norm where they are above 0.

    With `decay_steps` n > 0 the rate at step t is learning_rate (1 + cos(pi min(t / n, 1))) / 2.
    """
    rate: float | optax.Schedule = learning_rate
    if decay_steps:
        rate = optax.cosine_decay_schedule(learning_rate, decay_steps)
    adam = optax.adamw(rate, weight_decay=weight_decay) if weight_decay else optax.adam(rate)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam) if clip_norm else adam


def create_train_state(task: Task, *, seed: int | jax.Array, num_groups: int) -> TrainState:
    """The state before the first step, a pure function of the seed."""
    init_key, step_key = jax.random.split(jax.random.key(seed, impl=KEY_IMPL))
    no_tokens = jnp.zeros(1, jnp.int32)
    packed = pack(
        Sequences(no_tokens, no_tokens, no_tokens),
        no_tokens,
        num_tokens=BLOCK,
        num_items=task.model.num_items,
    )
    params = jax.jit(functools.partial(task.model.init, train=False))(init_key, packed)
    objective_state = task.objective.init()
    totals = empty_totals(task, num_groups)
    return TrainState(
        params=params,
        opt_state=task.optimizer.init(params),
        objective_state=objective_state,
        totals=totals,
        key=jax.random.key_data(step_key),
        step=jnp.int32(0),
        latest=totals.objective,
        failed_step=jnp.int32(-1),
    )


def initial_states(task: Task, *, seeds: Sequence[int], num_groups: int) -> TrainState:
    """`create_train_state` of every seed, stacked: each leaf [R, ...]."""

    def create(seed: jax.Array) -> TrainState:
        return create_train_state(task, seed=seed, num_groups=num_groups)

    # One program instead of a small one for each kind of leaf: half a second of a first step.
    return jax.jit(functools.partial(lax.map, create))(jnp.asarray(seeds, jnp.uint32))


def empty_totals(task: Task, num_groups: int) -> Totals:
    """Totals of no steps."""
    aux = jax.eval_shape(
        task.objective.apply,
        jnp.zeros(1),
        jnp.zeros((1, num_groups), bool),
        task.objective.init(),
        Hyperparams(*jnp.ones(len(Hyperparams._fields))),
    )[2]
    zero, zeros = jnp.float32(0), jnp.zeros(num_groups, jnp.float32)
    return Totals(jnp.int32(0), zero, zero, zeros, zeros, dict.fromkeys(_extra(aux), zeros))


def _extra(aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {key: value for key, value in aux.items() if key not in ("group_loss", "group_count")}


def user_losses(
    task: Task, params, data: TrainData, user_ids: jax.Array, num_tokens: int, key: jax.Array | None
) -> jax.Array:
    """Each user's mean loss over its real targets, f32[B], each target's loss times its weight.

    l_u = 1 / n_u sum_j weight(y_j) * CE(softmax(W h_j), y_j)

    (Paper, section 2.1, whose text divides by L; the released code, and so its tables, by n_u.)

    Args:
        task: the model.
        params: its parameters.
        data: the training rows.
        user_ids: i32[B].
        num_tokens: T, at least the users' tokens together.
        key: dropout's key; None turns dropout off.
    """
    packed = pack(data.sequences, user_ids, num_tokens=num_tokens, num_items=task.model.num_items)
    hidden, table = task.model.apply(
        params,
        packed,
        train=key is not None,
        method="encode_and_table",
        rngs=None if key is None else {"dropout": key},
    )
    losses = softmax_loss(
        hidden, table, packed.targets, PRECISIONS[task.model.dtype][1], task.max_logits
    )
    losses = losses * data.target_weights[packed.targets]
    batch_size = len(user_ids)
    losses = jnp.where(packed.slots < batch_size, losses, 0.0)
    sums = jax.ops.segment_sum(losses, packed.slots, batch_size + 1, indices_are_sorted=True)
    return sums[:batch_size] / packed.lengths


def train_step(
    task: Task,
    sizes: Sequence[int],
    state: TrainState,
    batch: tuple[jax.Array, jax.Array],
    data: TrainData,
    hparams: Hyperparams,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of one run: the next state, and the step's loss, gradient norm and group figures.

    A loss or gradient that is not finite marks the run as failed; from then on its parameters,
    optimiser and objective state stay as they were, and no other run notices.

    Args:
        task: the static parts.
        sizes: the packed sizes T to choose from.
        state: as the step before left it.
        batch: user ids i32[B] and i32[], which of `sizes` holds them.
        data: shared arrays.
        hparams: the objective's values.
    """
    user_ids, size_index = batch
    key = jax.random.wrap_key_data(state.key, impl=KEY_IMPL)
    key = jax.random.fold_in(key, state.step)
    membership = data.membership[user_ids]

    def loss_and_grads(num_tokens: int, params):
        def loss_fn(params):
            dropout_key = key if task.model.dropout else None
            losses = user_losses(task, params, data, user_ids, num_tokens, dropout_key)
            loss, objective_state, aux = task.objective.apply(
                losses, membership, state.objective_state, hparams
            )
            return loss, (objective_state, aux)

        return jax.value_and_grad(loss_fn, has_aux=True)(params)

    branches = [lambda params, size=size: loss_and_grads(size, params) for size in sizes]
    (loss, (objective_state, aux)), grads = lax.switch(size_index, branches, state.params)
    grad_norm = optax.tree.norm(grads)
    good = (state.failed_step < 0) & jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    totals = Totals(
        steps=state.totals.steps + 1,
        loss=state.totals.loss + loss,
        grad_norm=state.totals.grad_norm + grad_norm,
        group_loss=state.totals.group_loss + aux["group_loss"] * aux["group_count"],
        group_users=state.totals.group_users + aux["group_count"],
        objective=jax.tree.map(jnp.add, state.totals.objective, _extra(aux)),
    )
    first_failure = (state.failed_step < 0) & ~good
    after = TrainState(
        params=params,
        opt_state=opt_state,
        objective_state=objective_state,
        totals=totals,
        key=state.key,
        step=state.step,
        latest=_extra(aux),
        failed_step=state.failed_step,
    )
    state = jax.tree.map(lambda new, old: jnp.where(good, new, old), after, state)
    state = state._replace(
        step=state.step + 1,
        failed_step=jnp.where(first_failure, state.step, state.failed_step),
    )
    return state, {"loss": loss, "grad_norm": grad_norm, **aux}


def make_segment(task: Task, sizes: Sequence[int], *, vmap: bool) -> jax.stages.Wrapped:
    """The jitted loop over steps and runs.

    Returns:
        segment(states [R, ...], hparams [R], data, user_ids i32[R, S, B], size_index, start, stop)
        -> states, which runs steps `start` to `stop` - 1 of the S; the states are donated.
        Both are traced, so segments of every length share one program.

        With `vmap` the runs go through each step side by side and `size_index` is i32[S]: it must
        be the same for all, since under `vmap` a switch on a batched index runs every branch.
        Without, each run goes through the whole segment in its turn, and it is i32[R, S].
    """

    def one_run(state, hparams, data, user_ids, size_index, start, stop):
        def body(i, state):
            return train_step(task, sizes, state, (user_ids[i], size_index[i]), data, hparams)[0]

        return lax.fori_loop(start, stop, body, state)

    def side_by_side(*args):
        return jax.vmap(one_run, (0, 0, None, 0, None, None, None))(*args)

    def in_turn(states, hparams, data, user_ids, size_index, start, stop):
        def run(args):
            state, hparams, user_ids, size_index = args
            return one_run(state, hparams, data, user_ids, size_index, start, stop)

        return lax.map(run, (states, hparams, user_ids, size_index))

    return jax.jit(side_by_side if vmap else in_turn, donate_argnums=0)


def flop_per_target(model: SASRec, lengths: np.ndarray) -> float:
    """Multiplications and additions of a step's matrix products per real target.

    3 (2 V D + blocks (2 (4 D^2 + 2 D ff) + 4 n D)), with n the mean number of tokens that a token
    looks at: one pass forward and two backward over the output table, the blocks' weights, and the
    pairs of tokens whose attention is needed.

    Args:
        model: the network.
        lengths: i[U], real targets of each user.
    """
    lengths = lengths.astype(np.int64)
    dim = model.dim
    seen = (lengths * (lengths + 1) // 2).sum() / lengths.sum()
    weights = 2 * (4 * dim**2 + 2 * dim * model.ff_dim)
    return float(3 * (2 * model.num_items * dim + model.num_blocks * (weights + 4 * seen * dim)))


def token_sizes(totals: np.ndarray, *, multiple: int = BLOCK, most: int = 4) -> list[int]:
    """At most four packed sizes that hold every batch with little padding.

    Args:
        totals: i64[...], the real tokens of a sample of batches.
        multiple: sizes are multiples of this.
        most: how many sizes; each is compiled.

    Returns:
        Ascending sizes; the last holds the largest batch, the others minimise the mean padding
        (exact dynamic programming over the distinct rounded totals).
    """
    rounded, counts = np.unique(-(-np.ravel(totals) // multiple) * multiple, return_counts=True)
    cumulative = np.concatenate([[0], np.cumsum(counts)])
    # cost[j] after k rounds: the least tokens spent on the batches up to j with k sizes, when the
    # k-th is rounded[j - 1].
    cost = np.concatenate([[0.0], np.full(len(rounded), np.inf)])
    choices = []
    for _ in range(min(most, len(rounded))):
        table = cost[:, None] + np.where(
            np.arange(len(rounded) + 1)[:, None] < np.arange(1, len(rounded) + 1)[None, :],
            (cumulative[None, 1:] - cumulative[:, None]) * rounded[None, :],
            np.inf,
        )
        choice = table.argmin(axis=0)
        cost = np.concatenate([[np.inf], table[choice, np.arange(len(rounded))]])
        choices.append(choice)
    sizes = []
    j = len(rounded)
    for choice in reversed(choices):
        sizes.append(int(rounded[j - 1]))
        j = int(choice[j - 1])
    return sizes[::-1]
