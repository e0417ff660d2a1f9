"""Lists for every user of a log, and the memory that they take, with random parameters.

    python -m benchmarks.recommend --config=configs/rr_erm.py --config.data.path=DIR
    python -m benchmarks.recommend --config=... --users=1000000 --items=100000  # of random items

The lengths of random histories are drawn from those of the config's log.
"""

import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.common import Steps, matmul_timer, peak_memory_gb, print_table, run, spread
from seqfair_jax.data.split import csr_offsets
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.serving import TrainedModel
from seqfair_jax.serving.catalogue import Histories, whole_histories
from seqfair_jax.serving.output import write_lists
from seqfair_jax.serving.recommender import recommend
from seqfair_jax.training.step import initial_states


def random_model(config, *, users=0, items=0):
    """A model of the config's log with random parameters.

    With `users` or `items` the log is so many users with random items, 0 for as many as the log.
    """
    experiment = Steps(config, 1).experiment
    dataset = experiment.dataset
    histories, item_ids = whole_histories(dataset), dataset.item_ids
    if users or items:
        item_ids = np.arange(items or len(item_ids))
        rng = np.random.default_rng(0)
        lengths = rng.choice(np.diff(histories.offsets), users or len(dataset.user_ids))
        rows = rng.integers(len(item_ids), size=lengths.sum(), dtype=np.int32)
        histories = Histories(rows, csr_offsets(lengths))
    model = SASRec(num_items=len(item_ids), **config.model)
    task = experiment.task._replace(model=model)
    states = initial_states(task, seeds=[0], num_groups=experiment.num_groups)
    return TrainedModel(
        run="random",
        folder=Path("nowhere"),
        config=config,
        model=model,
        params=jax.tree.map(lambda leaf: leaf[0], states.params),
        item_ids=item_ids,
        user_ids=np.arange(len(histories.offsets) - 1),
        histories=histories,
        mask_seen=config.evaluate.mask_seen,
    )


def benchmark(config, *, repeats, k, users, items):
    trained = random_model(config, users=users, items=items)
    model, user_ids = trained.model, trained.user_ids
    peak = matmul_timer(model.dtype)
    before, times, cpu, rates = peak_memory_gb(), [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):  # the first compiles
            began, cpu_began = time.perf_counter(), time.process_time()
            write_lists(
                Path(folder, "lists.parquet"),
                recommend(trained, trained.histories, k=k),
                user_ids=user_ids,
                item_ids=trained.item_ids,
                k=k,
            )
            times.append(time.perf_counter() - began)
            cpu.append(time.process_time() - cpu_began)
            rates.append(peak())
    print_table(
        [
            {
                "users": len(user_ids),
                "items": model.num_items,
                "dim": model.dim,
                "k": k,
                "with compilation, s": f"{times[0]:.1f}",
                "seconds": spread(times[1:] or times, "{:.2f}"),
                "users/s": spread([len(user_ids) / t for t in times[1:] or times]),
                "CPU seconds": spread(cpu[1:] or cpu, "{:.1f}"),
                "matmul peak, GFLOP/s": spread([rate / 1e9 for rate in rates]),
                "peak memory before, GB": f"{before:.2f}",
                "peak memory, GB": f"{peak_memory_gb():.2f}",
            }
        ]
    )


if __name__ == "__main__":
    run(
        "recommend",
        benchmark,
        "Time the lists of every user.",
        repeats=(3, "measurements; the first compiles"),
        k=(20, "items for each user"),
        users=(0, "users with random items (0: those of the log)"),
        items=(0, "random items (0: those of the log)"),
    )
