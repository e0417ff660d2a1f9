"""The softmax loss alone, forward and backward, beside autodiff and beside chunks.

    python -m benchmarks.softmax_loss --config=configs/rr_erm.py --tokens=2304 --items=17803

Takes the width and the precision from the config. On a GPU, `--embedding_gradient` times the
gradient of the table's lookup too.
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
    # Three products; the chunked passes compute the logits twice but are judged by the same.
    flop = 3 * 2 * tokens * items * dim
    programs = {name: jax.jit(jax.grad(loss, (0, 1))) for name, loss in losses.items()}
    calls = {name: (lambda p=p: p(hidden, table)) for name, p in programs.items()}
    if embedding_gradient:
        lookup = jax.jit(jax.grad(lambda w: (w[targets] * hidden).astype(jnp.float32).sum()))
        calls["gradient of the table's lookup"] = lambda: lookup(table)
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
        benchmark,
        tokens=(2304, "T"),
        items=(17_803, "V"),
        repeats=(7, "measurements"),
        embedding_gradient=(False, "time the gradient of the embedding lookup too"),
    )
