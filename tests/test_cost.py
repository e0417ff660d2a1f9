import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sweeps import tiny

from seqfair_jax.config import plan_runs, resolve
from seqfair_jax.errors import UserError
from seqfair_jax.model.packing import BLOCK, Sequences, pack
from seqfair_jax.model.sampled_loss import Sampled
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.sweeps import cost, grid
from seqfair_jax.training.experiment import build_experiment
from seqfair_jax.training.step import Task, TrainData, user_losses


def make_model(**sizes):
    defaults = {
        "num_items": 500, "dim": 32, "ff_dim": 32, "num_blocks": 1, "num_heads": 1, "dropout": 0.0,
        "max_len": BLOCK + 1, "tie_embeddings": True, "init_scale": 0.1, "dtype": "float32",
    }  # fmt: skip
    return SASRec(**(defaults | sizes))


def test_flop_by_hand():
    model = make_model(num_items=5, dim=2, ff_dim=3, num_blocks=2)
    lengths = np.array([1, 3])
    # The tokens of the second user attend to 1, 2 and 3 tokens, that of the first to itself.
    seen = (1 + 1 + 2 + 3) / 4
    scores = 2 * 5 * 2
    query_key_value, attention_out = 2 * 2 * 6, 2 * 2 * 2
    feed_forward = 2 * 2 * 3 + 2 * 3 * 2
    attention = 2 * seen * 2 + 2 * seen * 2  # logits, and the mean of the values
    block = query_key_value + attention_out + feed_forward + attention
    expected = 3 * (scores + 2 * block)  # the backward pass computes two products for each
    assert cost.flop_per_target(model, lengths) == pytest.approx(expected)
    sampled = Sampled("softmax", negatives=2, gbce_t=0.0)  # three scores in place of five
    assert cost.flop_per_target(model, lengths, sampled) == pytest.approx(expected - 3 * 2 * 2 * 2)
    gates, wider = 2 * 2 * 2 * 2, 2 * 2 * 3  # SwiGLU has a third matrix
    gated = make_model(num_items=5, dim=2, ff_dim=3, num_blocks=2, gated=True)
    more = 3 * 2 * (gates + wider)
    assert cost.flop_per_target(gated, lengths) == pytest.approx(expected + more)
    biased = make_model(num_items=5, dim=2, ff_dim=3, num_blocks=2, item_bias=True)
    assert cost.flop_per_target(biased, lengths) == pytest.approx(expected + 3 * 2 * 5)
    # More users of the same lengths change nothing, nor does the integer type overflow.
    many = np.repeat(lengths, 1_000_000).astype(np.int32)
    assert cost.flop_per_target(model, many) == pytest.approx(expected)


def test_the_other_parts_of_a_mixture_cost_no_step_anything():
    sizes, lengths = {"num_items": 5, "dim": 2, "ff_dim": 3}, np.array([1, 100])
    mixed = cost.flop_per_target(make_model(**sizes, pointer=True, neighbours=7), lengths)
    assert mixed == cost.flop_per_target(make_model(**sizes), lengths)


def xla_flop(model, lengths):
    """XLA's count for the compiled loss and gradient, per real target; there is no padding."""
    num_users, num_tokens = len(lengths), int(lengths.sum())
    assert num_tokens % BLOCK == 0
    sequences = Sequences(
        jnp.zeros(num_tokens + num_users, jnp.int32),
        jnp.asarray(np.cumsum(lengths + 1), jnp.int32),
        jnp.asarray(lengths, jnp.int32),
    )
    data = TrainData(
        sequences, jnp.ones((num_users, 1), bool), jnp.ones(model.num_items), jnp.ones(num_users)
    )
    user_ids = jnp.arange(num_users, dtype=jnp.int32)

    def init(key):
        packed = pack(sequences, user_ids, num_tokens=num_tokens, num_items=model.num_items)
        return model.init(key, packed, train=False)

    def loss(params):
        return user_losses(Task(model, None, None), params, data, user_ids, num_tokens, None)[
            0
        ].mean()

    params = jax.eval_shape(init, jax.random.key(0))
    compiled = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return compiled.cost_analysis()["flops"] / num_tokens


def test_flop_agrees_with_the_compiled_program():
    """Within 7 %, since XLA also counts the softmax, the norms and the sums.

    The compiled attention computes all keys of two blocks and masks most of them, which
    `flop_per_target` leaves out.
    """
    lengths = np.array([BLOCK, BLOCK])
    seen = (BLOCK + 1) / 2
    counted, compiled = {}, {}
    for name, sizes in {
        "base": {},
        "items": {"num_items": 1500},
        "ff_dim": {"ff_dim": 96},
        "blocks": {"num_blocks": 2},
        "mixture": {"pointer": True, "neighbours": 7},
    }.items():
        model = make_model(**sizes)
        masked = 3 * model.num_blocks * 4 * (2 * BLOCK - seen) * model.dim
        counted[name] = cost.flop_per_target(model, lengths) + masked
        compiled[name] = xla_flop(model, lengths)
        assert 1 <= compiled[name] / counted[name] < 1.07, name

    def growth(figures, name):
        return figures[name] - figures["base"]

    # The terms one by one: of the scores, of the feed-forward, of a block.
    assert growth(compiled, "items") == pytest.approx(growth(counted, "items"), rel=0.02)
    assert growth(compiled, "ff_dim") == pytest.approx(growth(counted, "ff_dim"), rel=0.02)
    assert growth(compiled, "blocks") == pytest.approx(growth(counted, "blocks"), rel=0.1)
    assert growth(compiled, "mixture") == pytest.approx(0, abs=1)


@pytest.fixture(scope="module")
def experiment():
    base, _ = grid.split_sweep(tiny())
    return build_experiment(resolve(base))


@pytest.mark.parametrize(
    ("one", "two", "memory", "runs"),
    [
        # 0.6 of 2000 bytes: 300 for the first run, and 200 for each of four more are 1100.
        (300, 500, 2000, 5),
        (300, 500, 1 / 0.6 * 900, 4),  # exactly full
        (300, 500, 1 / 0.6 * 899, 3),
        (300, 500, 100, 1),  # one run is tried even where it does not fit
        (300, 300, 1 / 0.6 * 302, 3),  # a run that needs nothing counts as one byte
    ],
)
def test_runs_per_job_fill_a_share_of_the_memory(one, two, memory, runs, experiment, monkeypatch):
    monkeypatch.setattr(cost, "_program_bytes", lambda _, number: {1: one, 2: two}[number])
    device = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": memory})
    monkeypatch.setattr(cost.jax, "devices", lambda: [device])
    assert cost.measure_runs_per_job(experiment) == runs


def test_where_the_device_has_no_limit_the_machines_memory_counts(experiment, monkeypatch):
    monkeypatch.setattr(cost, "_program_bytes", lambda _, number: 1000 * number)
    pages = {"SC_PAGE_SIZE": 100, "SC_PHYS_PAGES": 500}
    monkeypatch.setattr(cost.os, "sysconf", pages.__getitem__)
    device = types.SimpleNamespace(memory_stats=lambda: None)
    monkeypatch.setattr(cost.jax, "devices", lambda: [device])
    assert cost.measure_runs_per_job(experiment) == 30  # of 1000 bytes each in 30,000


@pytest.mark.slow
def test_the_bytes_of_a_program_grow_with_its_runs(experiment, monkeypatch):
    """At least by the state of a run: parameters, two moments and two best sets of parameters."""
    params = sum(
        np.prod(leaf.shape) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(cost._segment(experiment, 1, steps=1)[1].params)
    )
    one, two = (cost._program_bytes(experiment, runs) for runs in (1, 2))
    assert two - one >= 5 * params
    assert cost.measure_runs_per_job(experiment) > 100  # of a few kilobytes each

    segment = types.SimpleNamespace(
        lower=lambda *_: types.SimpleNamespace(
            compile=lambda: types.SimpleNamespace(memory_analysis=lambda: None)
        )
    )
    monkeypatch.setattr(cost, "make_segment", lambda *_, **__: segment)
    with pytest.raises(UserError, match="cpu does not report .* set sweep.runs_per_job"):
        cost.measure_runs_per_job(experiment)


def test_the_cost_of_a_plan(experiment, monkeypatch):
    monkeypatch.setattr(cost, "TIMED_STEPS", 1)
    jobs = grid.plan(*grid.split_sweep(tiny()), runs_per_job=2)
    found = cost.estimate(jobs, experiment, 2)
    runs = sum(len(plan_runs(job.config)) for job in jobs)
    config = experiment.config
    steps = runs * config.train.epochs * config.train.steps_per_epoch
    assert (found.runs, found.steps) == (runs, steps) == (5, 5 * 2 * 5)
    assert found.seconds > 0
    assert found.validated == runs * config.train.epochs * len(experiment.dataset.valid.users)
    targets = steps * config.train.batch_size * experiment.train_lengths.mean()
    per_target = cost.flop_per_target(experiment.task.model, experiment.train_lengths)
    assert found.targets == pytest.approx(targets)
    assert found.flop == pytest.approx(targets * per_target)


def test_the_cost_on_a_device_of_known_rates(experiment, monkeypatch):
    monkeypatch.setattr(cost, "make_segment", lambda *_, **__: pytest.fail("timed a step here"))
    jobs = grid.plan(*grid.split_sweep(tiny()), runs_per_job=2)
    training = cost.estimate(jobs, experiment, 2, cost.Rates(1000, 0))
    assert training.seconds == pytest.approx(training.targets / 1000)
    whole = cost.estimate(jobs, experiment, 2, cost.Rates(1000, 50))
    assert whole.seconds - training.seconds == pytest.approx(whole.validated / 50)
