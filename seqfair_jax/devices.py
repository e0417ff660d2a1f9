"""The mesh of devices, and what crosses between them.

The axes of the mesh, from the outermost:

- `run`: the runs of a grid, each on its own devices;
- `data`: the users of a batch, and the rows of the log;
- `catalogue`: the rows of the item tables, their optimiser state, and the logits.

A step runs as one program on every device (`jax.shard_map`). The functions below with a `shards`
argument are called inside it. They cost nothing where an axis has one device.
"""

import atexit
import contextlib
import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from seqfair_jax.errors import UserError

_LONGEST_WAIT = 10 * 24 * 3600 * 1000  # ms, of one process for the others: ten days

_log = logging.getLogger(__name__)

RUN, DATA, CATALOGUE = AXES = ("run", "data", "catalogue")
USERS = (RUN, DATA)  # in evaluation, one run's users are on all of these


def make_mesh(*, run: int = 1, data: int = 1, catalogue: int = 1) -> Mesh:
    """The mesh of the first `run * data * catalogue` devices.

    Raises:
        UserError: if an axis is no number of devices, if there are fewer devices, or if one of
            several processes has none in the mesh.
    """
    shape = f"a mesh of run={run}, data={data}, catalogue={catalogue}"
    sizes = (run, data, catalogue)
    if any(isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1 for n in sizes):
        raise UserError(f"{shape}: expected 1 or more devices on each axis")
    devices = jax.devices()
    wanted = run * data * catalogue
    if wanted > len(devices):
        raise UserError(
            f"{shape} needs {wanted} devices, but there are {len(devices)} "
            f"({devices[0].platform}): give axes whose product is at most {len(devices)}. For a "
            "trial on a CPU, set the environment variable "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={wanted}"
        )
    if jax.process_count() > 1 and wanted != len(devices):
        raise UserError(
            f"{shape} uses {wanted} of the {len(devices)} devices of {jax.process_count()} "
            f"processes, but several processes must use all: give axes whose product is "
            f"{len(devices)}"
        )
    return jax.make_mesh(sizes, AXES, devices=devices[:wanted], axis_types=(AxisType.Auto,) * 3)


def size(mesh: Mesh, axes: str | tuple[str, ...]) -> int:
    """How many parts an array has that is split over these axes."""
    names = (axes,) if isinstance(axes, str) else axes
    return int(np.prod([mesh.shape[axis] for axis in names]))


def put(mesh: Mesh, array: Any, spec: P) -> jax.Array:
    """An array of the host on the devices, split by `spec`; a process reads its own part only.

    Args:
        mesh: the devices.
        array: the same on every process. One that is on the devices already stays as it is.
        spec: the mesh axis of each dimension.
    """
    if isinstance(array, jax.Array):
        return array
    array = np.asarray(array)
    sharding = NamedSharding(mesh, spec)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def put_rows(mesh: Mesh, read: Callable[[int, int], np.ndarray], rows: int) -> jax.Array:
    """Rows [n] on the devices, split over the data axis, with zeros behind them in equal parts.

    Args:
        mesh: the devices.
        read: returns the rows from one place to another, i32. A process reads its own part only.
        rows: n.
    """
    shape = (padded(rows, mesh.shape[DATA]),)

    def part(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(shape[0])
        found = read(min(start, rows), min(stop, rows))
        missing = stop - start - len(found)
        return np.pad(found, (0, missing)) if missing else found

    return jax.make_array_from_callback(shape, NamedSharding(mesh, P(DATA)), part)


def to_host(tree: Any) -> Any:
    """The arrays of a tree as numpy arrays; every process must call it, and each gets all."""

    def fetch(x: Any) -> np.ndarray:
        if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
            return multihost_utils.process_allgather(x, tiled=True)
        return np.asarray(x)

    return jax.tree.map(fetch, tree)


# Several processes, each with some of the devices: `jax.distributed`.


@contextlib.contextmanager
def several_processes() -> Iterator[None]:
    """Join the processes of one training, before JAX looks for devices.

    The processes are told of each other by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or else by what started them: JAX knows Slurm, Open MPI and others. Only the
    first process prints and logs, but for errors.

    Raises:
        UserError: if nothing says which process this is, if the others cannot be reached, or if
            the first process's port is taken.
    """
    # Else JAX swallows the SIGTERM that comes while the log is read.
    jax.config.update("jax_enable_preemption_service", False)
    names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    given = [os.environ.get(name) for name in names]
    _log.info("joining the other processes; this waits until all have started")
    try:
        with _default_signals():
            if any(given):
                address, count, number = given
                if address and number == "0":
                    _require_free_port(address)
                jax.distributed.initialize(address, int(count or ""), int(number or ""))
            else:
                jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        found = ", ".join(f"{name}={value or ''}" for name, value in zip(names, given, strict=True))
        raise UserError(
            f"--distributed: cannot join the other processes ({str(error).splitlines()[0]}). Start "
            "the processes by srun or mpirun, or give each one JAX_COORDINATOR_ADDRESS=HOST:PORT, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID (from 0); here: {found}"
        ) from None
    with contextlib.ExitStack() as quiet:
        if jax.process_index() > 0:
            logging.getLogger("seqfair_jax").setLevel(logging.ERROR)
            nowhere = quiet.enter_context(open(os.devnull, "w"))
            quiet.enter_context(contextlib.redirect_stdout(nowhere))
        try:
            yield
        except BaseException as error:
            # JAX waits at the exit for the other processes, which wait for this one. Handlers that
            # are registered last run first.
            atexit.register(_exit_at_once, getattr(error, "status", 1))
            raise
    jax.distributed.shutdown()


def _require_free_port(address: str) -> None:
    """Refuse a port that is taken, on which JAX crashes.

    Raises:
        ValueError: if it is.
    """
    port = int(address.rpartition(":")[2])
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise ValueError(f"port {port} cannot be used: {reason}; name another") from None


@contextlib.contextmanager
def _default_signals() -> Iterator[None]:
    """Let SIGINT and SIGTERM end the process: it waits in compiled code, where no handler runs."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def _exit_at_once(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def is_first_process() -> bool:
    """Whether this process is the only one, or the one that decides and writes for all."""
    return jax.process_index() == 0


def of_first(value: float) -> float:
    """The first process's value, on every process, an int or as a float32; all must call it."""
    if jax.process_count() == 1:
        return value
    kind = np.int32 if isinstance(value, int) else np.float32
    return multihost_utils.broadcast_one_to_all(kind(value)).item()


def tree_of_first(tree: Any) -> Any:
    """The first process's arrays of the host, on every process; all must call it."""
    if jax.process_count() == 1:
        return tree
    return jax.tree.map(np.asarray, multihost_utils.broadcast_one_to_all(tree))


def of_largest(value: int) -> int:
    """The largest of the processes' values, on every process; all must call it."""
    if jax.process_count() == 1:
        return value
    return int(multihost_utils.process_allgather(np.int32(value)).max())


def require_equal(digest: bytes, what: str) -> None:
    """Refuse processes that would train different things; all must call it.

    Args:
        digest: a hash of what must be equal.
        what: its name in the message.

    Raises:
        UserError: on every process, if the hashes differ.
    """
    if jax.process_count() == 1:
        return
    found = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
    if (found != found[0]).any():
        others = np.flatnonzero((found != found[0]).any(axis=1)).tolist()
        raise UserError(
            f"the processes of this training have unequal {what} (processes {others} differ from "
            "process 0): start all by the same command, in the same version"
        )


def wait_for_all(what: str) -> None:
    """Wait until every process has called this, however long it takes.

    A sum over the devices would wait too, but Gloo, which does that for CPUs, gives up after half
    an hour, and no signal ends it.
    """
    if jax.process_count() == 1:
        return
    failed: list[BaseException] = []

    def wait() -> None:
        import orbax.checkpoint as ocp  # slow to import

        try:
            ocp.multihost.get_barrier_sync_fn()(key=what, timeout_ms=_LONGEST_WAIT)
        except BaseException as error:
            failed.append(error)

    # No handler of a signal runs in a thread that waits in compiled code.
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join()
    if failed:
        raise failed[0]


@contextlib.contextmanager
def first_process_first(what: str) -> Iterator[None]:
    """Let the first process do something before the others do it; all must call it.

    Args:
        what: the verb and what it is done to, in the message.

    Raises:
        UserError: on the others, if the first one failed.
    """
    if jax.process_count() == 1:
        yield
        return
    if is_first_process():
        try:
            yield
        except BaseException:
            _tell(what, False)
            raise
        _tell(what, True)
        return
    if not _tell(what, True):
        raise UserError(f"the first process could not {what}; see its message")
    yield


def _tell(what: str, succeeded: bool) -> bool:
    """Whether the first process succeeded, on every process."""
    wait_for_all(what)
    return bool(of_first(int(succeeded)))


# Arrays.


def padded(count: int, shards: int) -> int:
    """The smallest multiple of `shards` that is at least `count`."""
    return -(-count // shards) * shards


def pad_rows(array: Any, shards: int) -> np.ndarray:
    """Zeros behind the rows of an array, so that it can be split into `shards` equal parts."""
    array = np.asarray(array)
    extra = padded(len(array), shards) - len(array)
    return np.pad(array, [(0, extra)] + [(0, 0)] * (array.ndim - 1)) if extra else array


# Inside the program of a device.


def index(axis: str | tuple[str, ...], shards: int) -> jax.Array | int:
    """The device's place on an axis of `shards` devices."""
    return lax.axis_index(axis) if shards > 1 else 0


def total(tree: Any, axis: str | tuple[str, ...], shards: int) -> Any:
    """The sum of a tree's arrays over the devices of an axis."""
    return lax.psum(tree, axis) if shards > 1 else tree


def of_first_device(tree: Any, axis: str, shards: int) -> Any:
    """The first device's values on all devices of an axis, bit for bit.

    For what every device computes alike: on a GPU, sums in another order may differ in the last
    bits, and copies of a parameter would drift apart.
    """
    if shards == 1:
        return tree
    is_first = index(axis, shards) == 0
    return jax.tree.map(lambda x: lax.psum(jnp.where(is_first, x, 0), axis), tree)


def largest(x: jax.Array, axis: str, shards: int) -> jax.Array:
    """The elementwise maximum over the devices of an axis."""
    return lax.pmax(x, axis) if shards > 1 else x


def everywhere(x: jax.Array, axis: str | tuple[str, ...], shards: int) -> jax.Array:
    """Whether a bool is true on all devices of the given axes."""
    return lax.pmin(x.astype(jnp.int32), axis) > 0 if shards > 1 else x


def gather(x: jax.Array, axis: str | tuple[str, ...], shards: int, *, dim: int = 0) -> jax.Array:
    """The arrays of all devices of an axis, one after another along a dimension."""
    return lax.all_gather(x, axis, axis=dim, tiled=True) if shards > 1 else x


def own_rows(
    ids: jax.Array, rows: int, axis: str | tuple[str, ...], shards: int
) -> tuple[jax.Array, jax.Array]:
    """Where ids of a table are in this device's `rows` rows: places, and whether they are there.

    A place outside of the device's rows is `rows`, which a scatter with mode "drop" ignores.
    """
    if shards == 1:
        return ids, jnp.ones(ids.shape, bool)
    place = ids - index(axis, shards) * rows
    here = (place >= 0) & (place < rows)
    return jnp.where(here, place, rows), here


def lookup(table: jax.Array, ids: jax.Array, shards: int = 1) -> jax.Array:
    """The rows `table[ids]` of a table whose rows are split over the catalogue axis.

    Each device reads the ids that it has, and the devices sum. A row's gradient stays on the
    device that has the row.

    Args:
        table: [V / shards, ...] on this device.
        ids: i32[...] in [0, V), the same on all devices of the axis.
        shards: devices of the axis.
    """
    return table[ids] if shards == 1 else _lookup(table, ids, shards)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _lookup(table, ids, shards):
    place, here = own_rows(ids, len(table), CATALOGUE, shards)
    found = table.at[place].get(mode="clip")
    found = jnp.where(here.reshape(here.shape + (1,) * (table.ndim - 1)), found, 0)
    return lax.psum(found, CATALOGUE)


def _lookup_forward(table, ids, shards):
    return _lookup(table, ids, shards), (table, ids)


def _lookup_backward(shards, residuals, cotangent):
    table, ids = residuals
    place, _ = own_rows(ids, len(table), CATALOGUE, shards)
    # No sum over the devices: each has the whole cotangent.
    return jnp.zeros_like(table).at[place].add(cotangent.astype(table.dtype), mode="drop"), None


_lookup.defvjp(_lookup_forward, _lookup_backward)
