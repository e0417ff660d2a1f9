"""The registered objectives, their settings, and how one is built for a log.

Shape letters: U users, B users in a batch, G groups, V catalogue.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from seqfair_jax.errors import UserError, did_you_mean
from seqfair_jax.objectives.method import (
    Batch,
    Formula,
    HParam,
    HParams,
    Logs,
    Method,
    Option,
    State,
    Users,
    group_means,
)

_methods: dict[str, Method] = {}
METHODS: Mapping[str, Method] = MappingProxyType(_methods)  # a view: it shows later registrations
SHARED = ("name", "group_family", "user_loss")  # settings of config.objective, of every objective
LOGGED = ("group_loss", "group_count", "group_mass")  # for every objective


def register(method: Method) -> Method:
    """Make an objective known under its name.

    From then on `objective.name` may be that name. Each declared hyperparameter and option is a
    setting of `config.objective`, with its default. Several objectives may share one: they pass
    the same declaration.

    The table of objectives is the one global state of the package. A config is text: it names
    its objective, and commands, config files and finished runs must all find the same one under
    that name. Registrations are only added, so the order in which modules are imported changes
    nothing. Register before `default_config` is called, best at the top of the config file or of a
    module that it imports.

    The same declaration again, as when a config file is read twice, replaces the first.

    Args:
        method: see `Method`.

    Returns:
        The argument.

    Raises:
        UserError: if the declaration is incomplete or contradicts itself, if another objective has
            the name, or if another objective declares one of its settings differently.
    """
    _check_method(method)
    known = _methods.get(method.name)
    if known is not None and _identity(known) != _identity(method):
        raise UserError(
            f"objective {method.name!r} is registered already, with another declaration: choose "
            "another name (after a change in a notebook, restart it)"
        )
    others = [other for other in _methods.values() if other.name != method.name]
    for setting in method.settings:
        for other in others:
            for declared in other.settings:
                if declared.name == setting.name and declared != setting:
                    raise UserError(
                        f"objective {method.name!r} declares {setting}, but {other.name!r} "
                        f"declares {declared}: pass the same declaration, or choose another name"
                    )
    _methods[method.name] = method
    return method


def _identity(method: Method) -> tuple:
    """Equal for a declaration that was run twice, which makes a new function of the same code."""
    make = method.make
    return (getattr(make, "__code__", make), method._replace(make=Formula))


def _check_method(method: Method) -> None:
    where = f"objective {method.name!r}"
    own = [setting.name for setting in method.settings]
    for name in (method.name, *own):
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(
                f"{where}: the name {name!r} is not allowed: use small letters, digits and _, with "
                "a letter first"
            )
    names = [*SHARED, *own]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{where}: objective.{name} exists already: choose another name")
    for hparam in method.hparams:
        for value in (hparam.default, *hparam.search):
            if not hparam.range.contains(value):
                raise UserError(
                    f"{where}: {hparam.name} has the value {value!r} in its declaration: expected "
                    f"a number {hparam.range}"
                )
    for option in method.options:
        _check_choice(f"{where}: the default of {option.name}", option.default, option.choices)
    for setting in method.settings:
        if not setting.help:
            raise UserError(f"{where}: {setting.name} has no help: say in a sentence what it does")
    keys = [log.key for log in method.logs]
    for log in method.logs:
        if keys.count(log.key) > 1 or not log.key or "/" in log.key:
            raise UserError(
                f"{where}: the log {log.key!r} is not allowed: use unequal keys without /, which "
                "metrics.jsonl has before the group"
            )
        _check_choice(f"{where}: the epoch of log {log.key!r}", log.epoch, ("mean", "last"))
        if log.key in LOGGED:
            raise UserError(f"{where}: {log.key!r} is logged for every objective: use another key")


def hparams() -> dict[str, HParam]:
    """The hyperparameters of all registered objectives, by name."""
    return {hparam.name: hparam for method in METHODS.values() for hparam in method.hparams}


def options() -> dict[str, Option]:
    """The options of all registered objectives, by name."""
    return {option.name: option for method in METHODS.values() for option in method.options}


def default_settings() -> dict[str, tuple[float, ...] | str]:
    """The settings of all registered objectives: a tuple for a hyperparameter, as grids have."""
    values = {name: (hparam.default,) for name, hparam in hparams().items()}
    return {**values, **{name: option.default for name, option in options().items()}}


def find(name: str) -> Method:
    """The objective of that name.

    Raises:
        UserError: if none is registered under it; the message lists those that are.
    """
    _check_choice("objective.name", name, tuple(METHODS))
    return METHODS[name]


def check_hparams(name: str, values: Mapping[str, float | Sequence[float]]) -> None:
    """Refuse an unknown objective, and a hyperparameter that is missing or outside its range.

    Args:
        name: the objective.
        values: for each hyperparameter its value, or those of a grid. Values that the objective
            does not read are optional, and are checked if given.

    Raises:
        UserError: as above, naming the configuration key, what was found and what to give.
    """
    for hparam in find(name).hparams:
        if np.size(values.get(hparam.name, ())) == 0:
            raise UserError(
                f"objective.{hparam.name} has no value, but objective.name = {name!r} reads it: "
                f"give a number {hparam.range}"
            )
    known = hparams()
    for key, given in values.items():
        _check_choice("objective hyperparameter", key, tuple(known))
        for value in given if isinstance(given, (tuple, list)) else (given,):
            if not known[key].range.contains(value):
                raise UserError(
                    f"objective.{key} is {value!r}: give a number {known[key].range} (a 32-bit "
                    "float)"
                )


class Objective(NamedTuple):
    """An objective as three pure functions.

    `apply(user_losses f[B], membership bool[B, G], state, hparams, mass, vectors)` returns the
    scalar loss, the next state and what is worth logging, each f[G] or i32[G]:

    - `group_loss`: mean over the batch's users of the group, weighted by their masses, 0 where it
      has none;
    - `group_count`: its users in the batch;
    - `group_mass`: the sum of their masses;
    - what the method's `logs` declare: omega after this step's move for GDRO and SDRO, the share
      of the users' weights that falls on the group for CVaR and chi2.

    `hparams` is a mapping of the method's hyperparameters, each a number or a traced scalar.
    `mass` f[B] says how much each user counts (`user_mass`); 1 if it is left out. `vectors` f[B, D]
    (`Batch.vectors`) may be left out unless the method declares `uses_vectors`.
    """

    name: str
    method: Method
    target_weights: Callable[[np.ndarray], np.ndarray]  # item counts i32[V] -> f32[V]
    init: Callable[[], State]  # the state before the first step
    apply: Callable[..., tuple[jax.Array, State, dict[str, jax.Array]]]


def make_objective(
    name: str,
    *,
    membership: np.ndarray,
    train_lengths: np.ndarray,
    dim: int = 0,
    **settings: str,
) -> Objective:
    """Build an objective for the users of a data set.

    Args:
        name: of a registered objective.
        membership: bool[U, G]; G may be 0 if the objective needs no groups. If it needs groups,
            every user is in exactly one.
        train_lengths: i32[U], training rows of each user.
        dim: the width of the users' vectors, for a method that declares `uses_vectors`.
        settings: values of options, such as `count_by="users"` for IPW; by default the options'
            defaults. Options of other objectives are checked and not used.

    Raises:
        UserError: if a name is unknown, or the objective needs groups or vectors and there are
            none.
    """
    method = find(name)
    known = options()
    for key, value in settings.items():
        _check_choice("objective option", key, tuple(known))
        _check_choice(f"objective.{key}", value, known[key].choices)
    if method.needs_groups and membership.shape[1] == 0:
        raise UserError(
            f"objective.name = {name!r} needs groups, but there are none: "
            "name a family in objective.group_family"
        )
    if method.uses_vectors and dim < 1:
        raise UserError(
            f"objective.name = {name!r} reads the users' vectors: pass dim, the width of the model"
        )
    chosen = {option.name: settings.get(option.name, option.default) for option in method.options}
    formula = method.make(Users(membership, train_lengths, dim), **chosen)
    weights_fn, apply_fn = _target_weights_fn(formula, method), _apply_fn(formula, method)
    return Objective(name, method, weights_fn, formula.init, apply_fn)


def _target_weights_fn(formula: Formula, method: Method):
    """The formula's weights, checked: JAX would read another weight for an item without one."""

    def target_weights(item_counts: np.ndarray) -> np.ndarray:
        weights = np.asarray(formula.target_weights(item_counts))
        is_real = weights.dtype.kind in "fiu" and weights.shape == item_counts.shape
        if not is_real or not np.isfinite(weights).all():
            raise UserError(
                f"objective {method.name!r}: target_weights has shape {weights.shape} and type "
                f"{weights.dtype}: expected a finite number for each of the "
                f"{len(item_counts):,} items"
            )
        return weights

    return target_weights


def _kind(value: Any) -> str:
    """The type and the shape of an array, as messages show them: float32[3, 2]."""
    return f"{jnp.result_type(value)}[{', '.join(map(str, jnp.shape(value)))}]"


def _apply_fn(formula: Formula, method: Method):
    keys = {log.key for log in method.logs}

    def apply(
        user_losses: jax.Array,
        membership: jax.Array,
        state: State,
        hparams: HParams,
        mass: jax.Array | None = None,
        vectors: jax.Array | None = None,
    ):
        where = f"objective {method.name!r}"
        mass = jnp.ones_like(user_losses) if mass is None else mass
        means, counts, group_mass = group_means(user_losses, membership, mass)
        batch = Batch(user_losses, membership, means, counts, mass, group_mass)
        if method.uses_vectors:
            if vectors is None:
                raise UserError(f"{where} reads the users' vectors: pass them to `apply`")
            batch = batch._replace(vectors=jax.lax.stop_gradient(vectors))
        before = state
        loss, state, logs = formula.loss(batch, state, hparams)
        # What follows is found while tracing, so a step pays nothing for it.
        if set(logs) != keys:
            raise UserError(
                f"{where} logs {sorted(logs)}, but declares {sorted(keys)}: the two must be the "
                "same"
            )
        if jnp.shape(loss) or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
            raise UserError(f"{where}: the loss is {_kind(loss)}: expected one float")
        for key, value in logs.items():
            if jnp.shape(value) != counts.shape:
                raise UserError(
                    f"{where}: the log {key!r} is {_kind(value)}: expected a number for each of "
                    f"the {len(counts)} groups"
                )
        kinds = [jax.tree.map(_kind, of) for of in (before, state)]
        if kinds[0] != kinds[1]:
            raise UserError(
                f"{where}: the state was {kinds[0]}, and is {kinds[1]} after a step: the two must "
                "be the same"
            )
        always = {"group_loss": means, "group_count": counts, "group_mass": group_mass}
        return loss, state, {**always, **logs}

    return apply


def mean_objective(parts: Sequence[Objective], num_groups: Sequence[int]) -> Objective:
    """The mean of one method's objectives over several group families at once.

    loss = 1/n sum_k loss_k(user_losses, the columns of family k)

    Each part weighs the users. The weights of the mean are the means of the parts' weights. Each
    part has its own state. The logged figures are concatenated like the columns. This goes beyond
    the paper, whose group methods use one family.

    Args:
        parts: n objectives; a single one is returned unchanged.
        num_groups: how many columns of the membership belong to each.
    """
    if len(parts) == 1:
        return parts[0]
    ends = np.cumsum(num_groups)

    def init() -> State:
        return tuple(part.init() for part in parts)

    def apply(
        user_losses: jax.Array,
        membership: jax.Array,
        state: State,
        hparams: HParams,
        mass: jax.Array | None = None,
        vectors: jax.Array | None = None,
    ):
        results = [
            part.apply(user_losses, membership[:, end - size : end], own, hparams, mass, vectors)
            for part, own, size, end in zip(parts, state, num_groups, ends, strict=True)
        ]
        losses, states, logs = zip(*results, strict=True)
        joined: Logs = {key: jnp.concatenate([log[key] for log in logs]) for key in logs[0]}
        return sum(losses) / len(losses), states, joined

    return Objective(parts[0].name, parts[0].method, parts[0].target_weights, init, apply)


def _check_choice(key: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(
            f"{key} is {value!r}{did_you_mean(value, known)}: expected one of {', '.join(known)}"
        )
