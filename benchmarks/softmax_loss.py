"""The softmax loss alone, forward and backward, compared with autodiff and with chunks.

    python -m benchmarks.softmax_loss --config=configs/rr_erm.py --tokens=2304 --items=17803

The config gives the width and the precision. `--embedding_gradient` also times the gradient of the
embedding lookup.
"""

import jax
import jax.numpy as jnp

from benchmarks.common import matmul_timer, print_table, run, seconds, spread
from seqfair_jax.model.sasrec import PRECISIONS
from seqfair_jax.model.softmax_loss import softmax_loss


def benchmark(config, *, tokens, items, repeats, embedding_gradient):
    dim = config.model.dim
    dtype, precision = PRECISIONS[config.model.dtype]
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (tokens, dim), dtype)
    table = 0.05 * jax.random.normal(keys[1], (items, dim), dtype)
    targets = jax.random.randint(keys[2], (tokens,), 0, items)

    def autodiff(hidden, table):
        logits = jnp.matmul(
            hidden, table.T, precision=precision, preferred_element_type=jnp.float32
        )
        target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - target_logits).mean()

    def chunks(parts):
        limit = -(-tokens * items // parts)
        return lambda h, w: softmax_loss(h, w, targets, precision, limit).mean()

    losses = {
        "hand-written backward": lambda h, w: softmax_loss(
            h, w, targets, precision, tokens * items
        ).mean(),
        "the same in 4 chunks": chunks(4),
        "the same in 16 chunks": chunks(16),
        "autodiff": autodiff,
    }
    # Three products. The chunked passes compute a fourth, which does not count as useful work.
    flop = 3 * 2 * tokens * items * dim
    programs = {name: jax.jit(jax.grad(loss, (0, 1))) for name, loss in losses.items()}
    calls = {name: (lambda p=p: p(hidden, table)) for name, p in programs.items()}
    if embedding_gradient:
        lookup = jax.jit(jax.grad(lambda w: (w[targets] * hidden).astype(jnp.float32).sum()))
        calls["gradient of the embedding lookup"] = lambda: lookup(table)
    matmul = matmul_timer(config.model.dtype)
    times = {name: [] for name in calls}
    peaks = []
    for i in range(repeats + 1):
        peaks.append(matmul())
        for name, call in calls.items():
            took = seconds(call)
            if i:  # the first compiles
                times[name].append(took)
    peak = sorted(peaks)[len(peaks) // 2]
    rows = []
    for name, values in times.items():
        middle = sorted(values)[len(values) // 2]
        is_loss = name in losses
        rows.append(
            {
                "what": name,
                "ms": spread([1000 * v for v in values], "{:.2f}"),
                "GFLOP/s": f"{flop / middle / 1e9:,.0f}" if is_loss else "",
                "share of the peak": f"{flop / middle / peak:.2f}" if is_loss else "",
            }
        )
    print(f"{tokens} tokens, {items} items, dim {dim}, {config.model.dtype}")
    print_table(rows)


if __name__ == "__main__":
    run(
        "softmax_loss",
        benchmark,
        "Time the softmax loss and its gradient.",
        tokens=(2304, "packed tokens"),
        items=(17_803, "items of the catalogue"),
        repeats=(7, "measurements"),
        embedding_gradient=(False, "also time the gradient of the embedding lookup"),
    )
