"""The training step: rate, share of the machine's matmul peak, padding, memory.

    python -m benchmarks.train_step --config=configs/rr_erm.py --config.data.path=DIR
    python -m benchmarks.train_step --config=... --parts       # where a step's time goes
    python -m benchmarks.train_step --config=... --first_step  # with cold and warm cache

With several seeds or values in the config, the runs train together: side by side or one after
another, as `--config.train.runs_axis` says (vmap or map).
"""

import os
import subprocess
import sys
import tempfile
import time

STARTED = time.time()

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks.common import (
    Steps,
    matmul_timer,
    peak_memory_gb,
    print_table,
    run,
    seconds,
    spread,
)
from seqfair_jax.model.packing import pack
from seqfair_jax.model.sasrec import PRECISIONS
from seqfair_jax.model.softmax_loss import softmax_loss
from seqfair_jax.sweeps.cost import flop_per_target
from seqfair_jax.training.step import make_segment, user_losses


def benchmark(config, *, steps, repeats, parts, first_step, one_step):
    if first_step:
        return fresh_processes()
    loop = Steps(config, steps)
    experiment = loop.experiment
    segment = make_segment(experiment.task, loop.sizes, vmap=experiment.vmap)
    states = loop.states()

    def go(states, stop):
        arguments = (experiment.hparams, experiment.data, loop.user_ids, loop.size_index)
        states = segment(states, *arguments, jnp.int32(0), jnp.int32(stop))
        return jax.block_until_ready(states)

    if one_step:
        go(states, 1)
        print(f"first step after {time.time() - STARTED:.1f} s")
        return None
    states = go(states, steps)
    memory = peak_memory_gb()  # before the matmul's own arrays
    matmul = matmul_timer(config.model.dtype)
    flop = flop_per_target(experiment.task.model, experiment.train_lengths, experiment.task.sampled)
    rates, shares, peaks = [], [], []
    for _ in range(repeats):
        before = matmul()
        began = time.perf_counter()
        states = go(states, steps)
        took = time.perf_counter() - began
        peak = (before + matmul()) / 2
        rates.append(loop.targets.sum() / took)
        peaks.append(peak)
        shares.append(rates[-1] * flop / peak)
    step_ms = [1000 * loop.targets.sum() / steps / rate for rate in rates]
    print_table(
        [
            {"figure": "real targets/s", "median (range)": spread(rates)},
            {"figure": "ms a step, all runs", "median (range)": spread(step_ms, "{:.2f}")},
            {
                "figure": "GFLOP/s",
                "median (range)": spread([r * flop / 1e9 for r in rates]),
            },
            {"figure": "matmul peak, GFLOP/s", "median (range)": spread([p / 1e9 for p in peaks])},
            {"figure": "share of the peak", "median (range)": spread(shares, "{:.3f}")},
            {
                "figure": "MFLOP a target",
                "median (range)": f"{flop / 1e6:.1f}",
            },
            {"figure": "padding, share of tokens", "median (range)": f"{loop.padding:.3f}"},
            {"figure": "packed sizes", "median (range)": ", ".join(map(str, loop.sizes))},
            {"figure": "peak memory, GB", "median (range)": f"{memory:.2f}"},
        ]
    )
    if parts:
        print_parts(loop, states, repeats, float(np.median(step_ms)) / len(experiment.runs))
    return None


def print_parts(loop, states, repeats, step_ms):
    """Time the parts of one run's step separately, at the most frequent packed size."""
    experiment = loop.experiment
    task, data = experiment.task, experiment.data
    model = task.model
    size = int(np.bincount(np.ravel(loop.tokens)).argmax())
    of_size = np.argwhere(np.broadcast_to(loop.tokens, loop.targets.shape) == size)[0]
    user_ids = loop.user_ids[tuple(of_size)]
    params = jax.tree.map(lambda leaf: leaf[0], states.params)
    opt_state = jax.tree.map(lambda leaf: leaf[0], states.opt_state)
    key = jax.random.key(0, impl="threefry2x32")
    packed = jax.jit(
        lambda ids: pack(data.sequences, ids, num_tokens=size, num_items=model.num_items)
    )(user_ids)
    precision = PRECISIONS[model.dtype][1]

    def encode(params, *, drop):
        return model.apply(
            params,
            packed,
            train=drop,
            method="encode_and_table",
            rngs={"dropout": key} if drop else None,
        )

    hidden, table = jax.jit(lambda p: encode(p, drop=False))(params)

    def encoder_loss(params, drop):
        hidden, table = encode(params, drop=drop)
        return hidden.astype(jnp.float32).sum() + 1e-6 * table[0].astype(jnp.float32).sum()

    def loss(hidden, table):
        losses = softmax_loss(hidden, table, packed.targets, precision, task.max_logits)
        return losses.mean()

    def whole(params, drop):
        losses = user_losses(task, params, data, user_ids, size, key if drop else None)[0]
        return losses.mean()

    def update(params, opt_state):
        updates, after = task.optimizer.update(params, opt_state, params)
        return optax.apply_updates(params, updates), after

    programs = {
        "packing": (
            lambda ids: pack(data.sequences, ids, num_tokens=size, num_items=model.num_items),
            (user_ids,),
        ),
        "encoder, forward": (lambda p: encoder_loss(p, False), (params,)),
        "encoder, forward and backward": (jax.grad(lambda p: encoder_loss(p, False)), (params,)),
        "softmax loss, forward": (loss, (hidden, table)),
        "softmax loss, forward and backward": (jax.grad(loss, (0, 1)), (hidden, table)),
        "loss and gradient, no dropout": (jax.grad(lambda p: whole(p, False)), (params,)),
        "loss and gradient, dropout": (jax.grad(lambda p: whole(p, True)), (params,)),
        "optimiser": (update, (params, opt_state)),
    }
    jitted = {name: (jax.jit(program), args) for name, (program, args) in programs.items()}
    times = {name: [] for name in jitted}
    for i in range(repeats + 1):
        for name, (program, args) in jitted.items():
            took = seconds(lambda program=program, args=args: program(*args))
            if i:  # the first compiles
                times[name].append(1000 * took)
    times["dropout (difference of two rows)"] = [
        with_dropout - without
        for with_dropout, without in zip(
            times["loss and gradient, dropout"],
            times["loss and gradient, no dropout"],
            strict=True,
        )
    ]
    print(f"parts of one run's step at {size} packed tokens, each compiled separately:")
    print_table(
        [
            {
                "part": name,
                "ms, median (range)": spread(values, "{:.2f}"),
                "share of a step": f"{float(np.median(values)) / step_ms:.2f}",
            }
            for name, values in times.items()
        ]
    )


def fresh_processes():
    """Run this command in two new processes, the first with an empty compilation cache."""
    with tempfile.TemporaryDirectory() as cache:
        for name in ("cold", "warm"):
            words = [word for word in sys.argv[1:] if not word.startswith("--first_step")]
            result = subprocess.run(
                [sys.executable, "-m", "benchmarks.train_step", *words, "--one_step"],
                env=os.environ | {"JAX_COMPILATION_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            )
            print(f"cache {name}: {result.stdout.splitlines()[-1]}")


if __name__ == "__main__":
    run(
        "train_step",
        benchmark,
        "Time the training step.",
        steps=(24, "steps in a measurement"),
        repeats=(5, "measurements"),
        parts=(False, "also time the parts of a step"),
        first_step=(False, "only time the first step of a new process, with cold and warm cache"),
        one_step=(False, "stop after the first step and print when it ended"),
    )
