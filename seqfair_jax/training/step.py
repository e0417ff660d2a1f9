"""The training step as a pure function of its state, and the loops over steps and runs.

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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqfair_jax import devices
from seqfair_jax.devices import CATALOGUE, DATA, RUN
from seqfair_jax.model.mixture import Neighbours
from seqfair_jax.model.packing import (
    BLOCK,
    Packed,
    Sequences,
    pack,
    pack_batch,
    random_windows,
    user_means,
)
from seqfair_jax.model.sampled_loss import Sampled, draw_negatives, sampled_loss
from seqfair_jax.model.sasrec import PRECISIONS, SASRec, is_table, log_popularity, param_specs
from seqfair_jax.model.softmax_loss import DEFAULT_MAX_LOGITS, softmax_loss
from seqfair_jax.objectives import LOGGED, HParams, Objective

KEY_IMPL = "threefry2x32"  # the one implementation that draws the same bits under vmap as alone
_NEGATIVES = 0x6E656773  # folded into the key of a step, for the key of its negatives
_WINDOWS = 0x77696E64  # and for that of its random windows


class Totals(NamedTuple):
    """Sums over the steps of the epoch so far; part of the state, so a resume loses no step."""

    steps: jax.Array  # i32[]
    loss: jax.Array  # f32[]
    grad_norm: jax.Array  # f32[]
    group_loss: jax.Array  # f32[G], summed over users by their masses
    group_mass: jax.Array  # f32[G]
    objective: dict[str, jax.Array]  # each f32[G]: what else the objective logs


class TrainState(NamedTuple):
    """All that training carries from one step to the next."""

    params: Any
    opt_state: Any
    objective_state: Any
    totals: Totals
    key: jax.Array  # u32[2], the data of a threefry key; step t uses fold_in(key, t)
    step: jax.Array  # i32[], steps done
    latest: dict[str, jax.Array]  # what the objective logged at the last step
    failed_step: jax.Array  # i32[], the first step that was not finite, -1 while all were
    stopped: jax.Array  # bool[]: early stopping ended the run, so no step changes it
    average: Any = ()  # of the parameters of all steps, where `Task.average_decay` is above 0


class TrainData(NamedTuple):
    """What every step reads and no step changes; shared by all runs."""

    sequences: Sequences
    membership: jax.Array  # bool[U, G]
    target_weights: jax.Array  # f32[V]
    user_mass: jax.Array  # f32[U], see `objectives.user_mass`
    neighbours: Neighbours | None = None  # of the model's mixture, for validation and the test
    # i32[U], training rows of each user before the window; None to train on the newest windows
    earlier: jax.Array | None = None


# How the mesh splits it: the rows of the log over the data axis, those of the catalogue as the
# item tables.
_BY_ROW: Any = P(DATA)
_BY_ITEM: Any = P(CATALOGUE)
_WHOLE: Any = P()


def data_specs(data: TrainData) -> Any:
    """How the mesh splits the data of a training."""
    is_near = data.neighbours is not None
    sequences: Any = Sequences(_BY_ROW, _WHOLE, _WHOLE)
    neighbours: Any = Neighbours(_BY_ITEM, _BY_ITEM, _BY_ITEM) if is_near else None
    earlier = None if data.earlier is None else _WHOLE
    return TrainData(sequences, _WHOLE, _BY_ITEM, _WHOLE, neighbours, earlier)


class Task(NamedTuple):
    """The static parts of a step."""

    model: SASRec  # its `shards` are the devices of the mesh's catalogue axis
    objective: Objective
    optimizer: optax.GradientTransformation  # elementwise, so that it may see a part of a table
    max_logits: int = DEFAULT_MAX_LOGITS  # see `softmax_loss`
    sampled: Sampled | None = None  # None: the softmax over the whole catalogue
    clip_norm: float = 0.0  # the largest norm of the gradient; 0 for any
    average_decay: float = 0.0  # see `average_params`; 0 for no average
    shards: int = 1  # devices of the mesh's data axis


def make_optimizer(
    *,
    learning_rate: float,
    decay_steps: int = 0,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam, with decoupled weight decay where it is above 0.

    With `decay_steps` n > 0 the rate at step t is learning_rate (1 + cos(pi min(t / n, 1))) / 2.
    """
    rate: float | optax.Schedule = learning_rate
    if decay_steps:
        rate = optax.cosine_decay_schedule(learning_rate, decay_steps)
    return optax.adamw(rate, weight_decay=weight_decay) if weight_decay else optax.adam(rate)


def create_train_state(task: Task, *, seed: int | jax.Array, num_groups: int) -> TrainState:
    """The state before the first step, a pure function of the seed. Item biases are 0."""
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
    state = TrainState(
        params=params,
        opt_state=task.optimizer.init(params),
        objective_state=objective_state,
        totals=totals,
        key=jax.random.key_data(step_key),
        step=jnp.int32(0),
        latest=totals.objective,
        failed_step=jnp.int32(-1),
        stopped=jnp.array(False),
        average=_start_average(task, params),
    )
    # A step returns no weakly typed array, such as an `init` may make, so the next one would be
    # compiled again.
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), state)


def _start_average(task: Task, params: Any) -> Any:
    return jax.tree.map(jnp.copy, params) if task.average_decay else ()


def average_params(task: Task, average: Any, params: Any, step: jax.Array) -> Any:
    """The average of a run's parameters after step t = 0, 1, ...; () where none is kept.

        average <- d average + (1 - d) params,    d = min(decay, (1 + t) / (10 + t))

    The smaller d of the first steps lets the initial parameters fade sooner. (Polyak and Juditsky
    1992; the d of the first steps is that of TensorFlow's ExponentialMovingAverage.) The weights of
    a mixture stay, without the rounding of the sum.

    Args:
        task: its `average_decay` is the decay.
        average: before the step.
        params: after it.
        step: t.
    """
    if not task.average_decay:
        return ()
    decay = jnp.minimum(task.average_decay, (1 + step) / (10 + step))
    return _keep_mixture(optax.incremental_update(params, average, 1 - decay), average)


def judged_params(states: TrainState) -> Any:
    """The parameters that are validated, kept and tested: the average where there is one."""
    return states.average or states.params


def is_training(state: TrainState) -> jax.Array:
    """Whether steps still change a run: it has neither failed nor stopped early."""
    return (state.failed_step < 0) & ~state.stopped


def state_specs(states: Any) -> Any:
    """How the mesh splits states or parameters [R, ...]: by runs, and the item tables by rows."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: P(RUN, CATALOGUE) if is_table(path) else P(RUN), states
    )


def shardings(mesh: Mesh, specs: Any) -> Any:
    """The shardings of a tree of partition specs."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


def initial_states(
    task: Task,
    *,
    seeds: Sequence[int],
    num_groups: int,
    mesh: Mesh | None = None,
    item_counts: np.ndarray | None = None,
) -> TrainState:
    """`create_train_state` of every seed, stacked: each leaf [R, ...], on the mesh.

    Args:
        task: the model and its optimiser.
        seeds: of the R runs.
        num_groups: G.
        mesh: the devices; one if None.
        item_counts: i[V], the training rows of each item, for a model with item biases. These are
            `log_popularity` then, and 0 if None.
    """
    mesh = mesh or devices.make_mesh()

    def create(seed: jax.Array) -> TrainState:
        return create_train_state(task, seed=seed, num_groups=num_groups)

    # Compiling the initialisation as one program saves half a second of the first step.
    create_all = jax.vmap(create)
    array = np.asarray(seeds, np.uint32)
    specs = state_specs(jax.eval_shape(create_all, array))
    states = jax.jit(create_all, out_shardings=shardings(mesh, specs))(array)
    if item_counts is None or not task.model.item_bias:
        return states
    own = states.params["params"]
    start = log_popularity(item_counts, rows=own["item_bias"].shape[1])
    start = np.broadcast_to(start, own["item_bias"].shape)
    bias = devices.put(mesh, start, P(RUN, CATALOGUE))
    return with_params(task, states, {"params": own | {"item_bias": bias}}, mesh)


def with_params(
    task: Task, states: TrainState, params: Any, mesh: Mesh | None = None
) -> TrainState:
    """States before the first step with other parameters [R, ...], and a new optimiser.

    Args:
        task: the optimiser.
        states, params: on the mesh.
        mesh: the devices.
    """
    mesh = mesh or devices.make_mesh()
    init = jax.vmap(task.optimizer.init)
    specs = state_specs(jax.eval_shape(init, params))
    opt_state = jax.jit(init, out_shardings=shardings(mesh, specs))(params)
    average = _start_average(task, params)
    return states._replace(params=params, opt_state=opt_state, average=average)


def run_params(mesh: Mesh, params: Any, run: int) -> Any:
    """The parameters of one run of [R, ...], on all devices of the run axis."""
    return _run_params(mesh, params, np.int32(run))


@functools.partial(jax.jit, static_argnums=0)
def _run_params(mesh: Mesh, params: Any, run: jax.Array) -> Any:
    shards = mesh.shape[RUN]

    def pick(params: Any, run: jax.Array) -> Any:
        def of_leaf(leaf: jax.Array) -> jax.Array:
            place, here = devices.own_rows(run, len(leaf), RUN, shards)
            found = leaf.at[place].get(mode="clip")
            return devices.total(jnp.where(here, found, 0), RUN, shards)

        return jax.tree.map(of_leaf, params)

    return jax.shard_map(
        pick,
        mesh=mesh,
        in_specs=(state_specs(params), P()),
        out_specs=param_specs(params),
        check_vma=False,
    )(params, run)


def empty_totals(task: Task, num_groups: int) -> Totals:
    """Totals of no steps."""
    aux = jax.eval_shape(
        task.objective.apply,
        jnp.zeros(1),
        jnp.zeros((1, num_groups), bool),
        task.objective.init(),
        dict.fromkeys(task.objective.method.reads, jnp.ones(())),
        None,
        jnp.zeros((1, task.model.dim)),
    )[2]
    zero, zeros = jnp.float32(0), jnp.zeros(num_groups, jnp.float32)
    return Totals(jnp.int32(0), zero, zero, zeros, zeros, dict.fromkeys(_extra(aux), zeros))


def _extra(aux: dict[str, jax.Array]) -> dict[str, jax.Array]:
    return {key: value for key, value in aux.items() if key not in LOGGED}


def user_losses(
    task: Task, params, data: TrainData, user_ids: jax.Array, num_tokens: int, key: jax.Array | None
) -> tuple[jax.Array, jax.Array, Packed]:
    """Each user's mean loss over its real targets, each target's loss times its weight.

    l_u = -1 / n_u sum_j weight(y_j) * log p(y_j)

    p is softmax(W h_j), also for a model that is a mixture (`training.stacking`). (Paper, section
    2.1, whose text divides by L; the released code, and so its tables, by n_u.)

    Args:
        task: the model.
        params: its parameters.
        data: the training rows.
        user_ids: i32[B]. On a mesh, a device has the losses of its own B / shards users, in order.
        num_tokens: T, at least the tokens of a device's users together.
        key: of dropout, of random windows and of the negatives of a sampled loss. None turns
            dropout off, and takes the newest windows and the softmax over the whole catalogue.

    Returns:
        l f32[B], the hidden states of the targets, f[T, D], and the tokens.
    """
    model, sequences = task.model, data.sequences
    if data.earlier is not None and key is not None:
        of_windows = jax.random.fold_in(key, _WINDOWS)
        sequences = random_windows(sequences, data.earlier, user_ids, of_windows)
    packed = pack_batch(
        sequences,
        user_ids,
        num_tokens=num_tokens,
        num_items=model.num_items,
        shards=task.shards,
    )
    losses, hidden = _target_losses(task, params, packed, key)
    weights = devices.lookup(data.target_weights, packed.targets, model.shards)
    return user_means(losses * weights, packed), hidden, packed


def _user_vectors(hidden: jax.Array, packed: Packed, dim: int) -> jax.Array:
    """The mean of each user's hidden states, f32[B, D], a constant in the gradient."""
    hidden = lax.stop_gradient(hidden[:, :dim]).astype(jnp.float32)  # no column of an item bias
    return jax.vmap(user_means, (1, None), 1)(hidden, packed)


def _target_losses(
    task: Task, params: Any, packed: Packed, key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The loss of each token's target, f32[T], and the hidden states, f[T, D]."""
    model = task.model
    rngs = None if key is None else {"dropout": key}
    encode: Any = functools.partial(model.apply, params, packed, train=key is not None, rngs=rngs)
    sampled = task.sampled
    precision = PRECISIONS[model.dtype][1]
    if sampled is None or key is None:
        hidden, table = encode(method="encode_and_table")
        losses = softmax_loss(
            hidden,
            table,
            packed.targets,
            precision,
            task.max_logits,
            model.num_items,
            model.shards,
        )
        return losses, hidden
    # From the step's key alone, so all devices draw the same negatives.
    negatives = draw_negatives(
        jax.random.fold_in(key, _NEGATIVES), model.num_items, sampled.negatives
    )
    # One lookup, so that the backward pass adds to the table's gradient once.
    items = jnp.concatenate([negatives, packed.targets])
    hidden, rows = encode(items=items, method="encode_and_rows")
    losses = sampled_loss(
        sampled,
        hidden,
        packed.targets,
        rows[len(negatives) :],
        negatives,
        rows[: len(negatives)],
        num_items=model.num_items,
        precision=precision,
        max_logits=task.max_logits,
    )
    return losses, hidden


def train_step(
    task: Task,
    sizes: Sequence[int],
    state: TrainState,
    batch: tuple[jax.Array, jax.Array],
    data: TrainData,
    hparams: HParams,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step of one run: the next state, and the step's loss, gradient norm and group figures.

    A loss, gradient or updated parameter that is not finite marks the run as failed. A run that
    failed or stopped early stays as it was before the step, and does not affect other runs.

    Args:
        task: the static parts.
        sizes: the packed sizes T to choose from.
        state: after the previous step.
        batch: user ids i32[B], and i32[], the index of the packed size.
        data: shared arrays.
        hparams: the objective's values.
    """
    user_ids, size_index = batch
    key = jax.random.wrap_key_data(state.key, impl=KEY_IMPL)
    key = jax.random.fold_in(key, state.step)
    membership, mass = data.membership[user_ids], data.user_mass[user_ids]

    def loss_and_grads(num_tokens: int, params):
        def losses_of(params):
            is_random = task.model.dropout or task.sampled or data.earlier is not None
            random = key if is_random else None
            losses, hidden, packed = user_losses(task, params, data, user_ids, num_tokens, random)
            uses_vectors, dim = task.objective.method.uses_vectors, task.model.dim
            return losses, _user_vectors(hidden, packed, dim) if uses_vectors else None

        def loss_of(losses):
            loss, objective_state, aux = task.objective.apply(
                losses, membership, state.objective_state, hparams, mass, vectors
            )
            return loss, (objective_state, aux)

        def gathered(of_device):
            found = devices.gather(of_device, DATA, task.shards)[: len(user_ids)]
            return devices.of_first_device(found, CATALOGUE, task.model.shards)

        # In two parts, since the objective sees the losses of all devices.
        own, pull_back, vectors = jax.vjp(losses_of, params, has_aux=True)
        losses, vectors = jax.tree.map(gathered, (own, vectors))
        (loss, found), weights = jax.value_and_grad(loss_of, has_aux=True)(losses)
        (grads,) = pull_back(_own_part(weights, len(own), task.shards))
        return (loss, found), _alike(devices.total(grads, DATA, task.shards), task.model.shards)

    branches = [lambda params, size=size: loss_and_grads(size, params) for size in sizes]
    (loss, (objective_state, aux)), grads = lax.switch(size_index, branches, state.params)
    grad_norm = _norm(grads, task.model.shards)
    if task.clip_norm:  # as `optax.clip_by_global_norm`, which would see a part of the tables
        scale = jnp.where(grad_norm < task.clip_norm, 1.0, task.clip_norm / grad_norm)
        grads = jax.tree.map(lambda grad: grad * scale, grads)
    updates, opt_state = task.optimizer.update(grads, state.opt_state, state.params)
    params = _keep_mixture(optax.apply_updates(state.params, updates), state.params)
    # A finite gradient can still lead to a parameter that overflows.
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    for leaf in jax.tree.leaves(params):
        finite &= jnp.isfinite(leaf).all()
    finite = devices.everywhere(finite, CATALOGUE, task.model.shards)
    training = is_training(state)
    totals = Totals(
        steps=state.totals.steps + 1,
        loss=state.totals.loss + loss,
        grad_norm=state.totals.grad_norm + grad_norm,
        group_loss=state.totals.group_loss + aux["group_loss"] * aux["group_mass"],
        group_mass=state.totals.group_mass + aux["group_mass"],
        objective=jax.tree.map(jnp.add, state.totals.objective, _extra(aux)),
    )
    after = TrainState(
        params=params,
        opt_state=opt_state,
        objective_state=objective_state,
        totals=totals,
        key=state.key,
        step=state.step + 1,
        latest=_extra(aux),
        failed_step=state.failed_step,
        stopped=state.stopped,
        average=average_params(task, state.average, params, state.step),
    )
    kept = training & finite
    failed_step = jnp.where(training & ~finite, state.step, state.failed_step)
    state = jax.tree.map(lambda new, old: jnp.where(kept, new, old), after, state)
    state = state._replace(failed_step=failed_step)
    return state, {"loss": loss, "grad_norm": grad_norm, **aux}


def _own_part(weights: jax.Array, part: int, shards: int) -> jax.Array:
    """The weights of the device's `part` users; 0 behind the end of the batch."""
    if shards == 1:
        return weights
    weights = jnp.pad(weights, (0, part * shards - len(weights)))
    return lax.dynamic_slice_in_dim(weights, devices.index(DATA, shards) * part, part)


def _alike(grads: Any, shards: int) -> Any:
    """A gradient that the devices of the catalogue axis agree on, but for their own rows."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            leaf if is_table(path) else devices.of_first_device(leaf, CATALOGUE, shards)
        ),
        grads,
    )


def _keep_mixture(params: Any, before: Any) -> Any:
    """The parameters with the weights of the mixture as before: `stacking` fits them.

    They have no gradient, but weight decay would shrink them.
    """
    own = params["params"]
    if "mixture" not in own:
        return params
    return {**params, "params": {**own, "mixture": before["params"]["mixture"]}}


def _norm(grads: Any, shards: int) -> jax.Array:
    """The global norm of a gradient whose tables are split over the catalogue axis."""
    if shards == 1:
        return optax.tree.norm(grads)
    squares = [jnp.float32(0), jnp.float32(0)]
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        squares[is_table(path)] += jnp.sum(leaf**2)
    return jnp.sqrt(squares[0] + devices.total(squares[1], CATALOGUE, shards))


def make_segment(
    task: Task, sizes: Sequence[int], *, vmap: bool, mesh: Mesh | None = None
) -> jax.stages.Wrapped:
    """The jitted loop over steps and runs, on the mesh of devices.

    Returns:
        segment(states [R, ...], hparams [R], data, user_ids i32[R, S, B], size_index, start, stop)
        -> states, which runs steps `start` to `stop` - 1 of the S; the states are donated.
        Both are traced, so segments of every length share one program.

        With `vmap` the runs go through each step side by side and `size_index` is i32[S]: it must
        be the same for all, since under `vmap` a switch on a batched index runs every branch.
        Without `vmap` one run after another goes through the whole segment, `size_index` is
        i32[R, S], and a run that has failed or stopped takes no time.
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
            end = jnp.where(is_training(state), stop, start)
            return one_run(state, hparams, data, user_ids, size_index, start, end)

        return lax.map(run, (states, hparams, user_ids, size_index))

    def on_mesh(states, hparams, data, user_ids, size_index, start, stop):
        specs = state_specs(states)
        each = P() if vmap else P(RUN)
        run = jax.shard_map(
            side_by_side if vmap else in_turn,
            mesh=mesh or devices.make_mesh(),
            in_specs=(specs, P(RUN), data_specs(data), P(RUN), each, P(), P()),
            out_specs=specs,
            check_vma=False,  # the functions of `seqfair_jax.devices` say what is summed
        )
        return run(states, hparams, data, user_ids, size_index, start, stop)

    return jax.jit(on_mesh, donate_argnums=0)
