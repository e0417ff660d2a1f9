"""Shares the work of `seqfair reproduce` or `seqfair search` among the machines of a Ray cluster.

    python launch/ray_sweep.py --address=auto --gpus=1 \
        seqfair reproduce --config=paper_rr --workdir=DIR

Ray decides where a job runs, and runs it again if its process or machine is lost. The job then
resumes from its newest checkpoint. All machines need the same file system and the same Python
environment. This process only plans and writes the tables, on the CPU. Ctrl-C lets each job save
its state and stops; the same command resumes.
"""

import argparse
import contextlib
import importlib
import os
import re
import sys
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import jax

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError as error:
    sys.exit(f'error: this needs {error.name}; pip install "seqfair_jax[ray]"')

from seqfair_jax import cli
from seqfair_jax.config.files import load_config
from seqfair_jax.errors import Interrupted, UserError

_SAVING_SECONDS = 120  # a job ends the current steps, and saves its state
_STORE_BYTES = 100 * 2**20  # of Ray's shared memory on this machine; only plans pass through it


class Preempted(UserError):
    """A signal ended a job's process, with the state saved. Ray runs the job again."""


class Setup(NamedTuple):
    """What a worker process needs to know before it trains."""

    folder: str  # relative paths start there
    config: str  # its file may register objectives
    cpus: int
    gpus: float


class RayWorkers:
    """The processes of a Ray cluster (`sweeps.jobs.Workers`)."""

    def __init__(self, options: argparse.Namespace):
        """Connect to the cluster, or start Ray on this machine.

        Raises:
            UserError: if there is no such cluster, or this machine is too small for a job.
        """
        self._options = options
        self._calls: list[ray.ObjectRef] = []
        self._start()

    def submit(self, function: Callable[..., Any], /, *args: Any) -> Future:
        """Call a function where there are free cores and GPUs."""
        options = self._options
        config, _ = cli.take_config(options.arguments)
        task = ray.remote(
            num_cpus=options.cpus,
            num_gpus=options.gpus,
            max_retries=options.retries,
            retry_exceptions=[Preempted],
        )(_call)
        setup = Setup(os.getcwd(), config, options.cpus, options.gpus)
        call = task.remote(setup, function, args)
        self._calls.append(call)
        result: Future = Future()

        def settle(ended: Future) -> None:
            error = ended.exception()
            if error is None:
                result.set_result(ended.result())
            elif isinstance(error, RayTaskError):
                cause = error.cause  # without the traceback, which only a bug needs
                result.set_exception(cause if isinstance(cause, UserError) else error)
            elif isinstance(error, RayError):
                lost = textwrap.shorten(str(error).strip().splitlines()[0], 300)
                result.set_exception(
                    UserError(f"lost in {options.retries + 1} attempts; the last: {lost}")
                )
            else:
                result.set_exception(error)

        call.future().add_done_callback(settle)
        return result

    def count(self) -> int:
        """How many calls the cluster's cores and GPUs have room for."""
        found = ray.cluster_resources()
        most = [found.get("CPU", 0) // self._options.cpus]
        if self._options.gpus:
            most.append(found.get("GPU", 0) // self._options.gpus)
        return max(1, int(min(most)))

    def stop(self) -> None:
        """End the calls, after their state is saved, and leave the cluster."""
        running = self._calls
        if running:
            _, running = ray.wait(running, num_returns=len(running), timeout=0)
        for call in running:
            ray.cancel(call)
        if running:
            print("the jobs save their state; Ctrl-C ends them at once", file=sys.stderr)
            with contextlib.suppress(KeyboardInterrupt):
                ray.wait(running, num_returns=len(running), timeout=_SAVING_SECONDS)
        ray.shutdown()

    def _start(self) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray ends a job if a machine's memory runs out. By default it tries it again for ever.
        os.environ.setdefault("RAY_task_oom_retries", str(self._options.retries))
        address, cpus, gpus = self._options.address, self._options.cpus, self._options.gpus
        own = {} if address != "local" else {
            "num_cpus": self._options.local_cpus,
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
        }  # fmt: skip
        try:
            ray.init(address=address, log_to_driver=False, logging_level="error", **own)
        except ConnectionError as error:
            raise UserError(
                f"--address={address}: no Ray cluster answers there ({error}); start one by "
                "`ray start --head`, or leave the flag out to use this machine alone"
            ) from None
        found = ray.cluster_resources()
        has_cpus, has_gpus = found.get("CPU", 0), found.get("GPU", 0)
        if address == "local" and (has_cpus < cpus or has_gpus < gpus):  # a cluster may grow
            raise UserError(
                f"a job needs {cpus} cores and {gpus:g} GPUs, but Ray has {has_cpus:g} cores and "
                f"{has_gpus:g} GPUs here: lower --cpus or --gpus"
            )


def _call(setup: Setup, function: Callable[..., Any], args: Sequence[Any]) -> Any:
    """In a worker: call a function as a command of the package would."""
    os.chdir(setup.folder)
    os.environ["NPROC"] = str(setup.cpus)  # XLA's threads
    if 0 < setup.gpus < 1:  # by default JAX takes three quarters of a GPU's memory
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{0.75 * setup.gpus:.3f}"
    load_config(setup.config)
    cli.use_compilation_cache()
    with cli.log_to_stderr():
        try:
            return function(*args)
        except Interrupted as error:
            raise Preempted(str(error)) from None


def main(argv: Sequence[str]) -> None:
    """Start the command with the workers of a cluster."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--address", default="local",
        help="of the cluster, auto for the one that this machine belongs to, or local to start Ray "
        "on this machine alone (default)",
    )  # fmt: skip
    parser.add_argument("--cpus", type=_at_least(int, 1), default=1, help="cores of a job")
    parser.add_argument(
        "--gpus", type=_at_least(float, 0), default=0.0, help="of a job; 0.5: two jobs share a GPU"
    )
    parser.add_argument(
        "--retries", type=_at_least(int, 0), default=3,
        help="how often a job runs again after its process or machine was lost",
    )  # fmt: skip
    parser.add_argument(
        "--local_cpus", type=_at_least(int, 1),
        help="with --address=local: the cores that all jobs share (default: all)",
    )  # fmt: skip
    parser.add_argument("program", choices=["seqfair"], metavar="seqfair")
    parser.add_argument("command", choices=["reproduce", "search"], metavar="reproduce|search")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="as for seqfair COMMAND")
    options = parser.parse_args(argv)
    # Of this process; the GPUs are for the jobs. Their mesh must be possible here too.
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(1, int(options.gpus)))
    command = importlib.import_module(f"seqfair_jax.commands.{options.command}")
    if any(re.match(r"-h$|--?(help|dry_run)\b", word) for word in options.arguments):
        command.main(options.arguments)
        return
    try:
        # Before JAX has threads: Ray forks this process.
        workers = RayWorkers(options)
    except UserError as error:
        sys.exit(f"error: {error}")
    try:
        command.main(options.arguments, workers)
    finally:
        workers.stop()


def _at_least(kind: Callable[[str], Any], least: int) -> Callable[[str], Any]:
    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text}: expected {least} or more")
        return value

    return number


if __name__ == "__main__":
    main(sys.argv[1:])
