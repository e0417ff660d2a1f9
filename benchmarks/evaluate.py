"""The full test: rank every user's target in the whole catalogue, and compute the metrics.

python -m benchmarks.evaluate --config=configs/rr_erm.py --config.data.path=DIR
"""

import time

import jax

from benchmarks.common import Steps, peak_memory_gb, print_table, run, spread
from seqfair_jax.results import Judge


def benchmark(config, *, repeats):
    loop = Steps(config, 1)
    params = jax.tree.map(lambda leaf: leaf[0], loop.states().params)
    experiment = loop.experiment
    judge = Judge(experiment.dataset, experiment.families, config)
    rank = experiment.make_ranker("test", top_k=judge.top_k)
    times = []
    for _ in range(repeats + 1):  # the first compiles
        began = time.perf_counter()
        judge.ranks(rank(params, "benchmark").ranks)
        times.append(time.perf_counter() - began)
    users, model = len(experiment.dataset.test.users), experiment.task.model
    print_table(
        [
            {
                "users who are tested": users,
                "items": model.num_items,
                "dim": model.dim,
                "seconds": spread(times[1:], "{:.2f}"),
                "users/s": spread([users / t for t in times[1:]]),
                "with compilation, s": f"{times[0]:.1f}",
                "peak memory, GB": f"{peak_memory_gb():.2f}",
            }
        ]
    )


if __name__ == "__main__":
    run("evaluate", benchmark, "Time the full test.", repeats=(3, "measurements"))
