"""A training loop of your own over the package's pieces, without a config.

python examples/own_loop.py             # on the synthetic log
python examples/own_loop.py log.csv     # columns user_id, item_id, timestamp
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
from ml_collections import ConfigDict

from seqfair_jax.data.groups import build_family
from seqfair_jax.data.readers import log_from_table
from seqfair_jax.data.split import k_core, leave_one_out
from seqfair_jax.data.synthetic import default_settings, generate
from seqfair_jax.evaluation.metrics import rank_metrics
from seqfair_jax.evaluation.ranking import make_ranker
from seqfair_jax.model.packing import BLOCK, Sequences, pack, user_means
from seqfair_jax.model.sasrec import SASRec
from seqfair_jax.model.softmax_loss import softmax_loss
from seqfair_jax.objectives import make_objective


def main(frame: pd.DataFrame, *, objective: str = "gdro", steps: int = 100, batch: int = 64):
    """Train on a log: each group's mean NDCG@20 and Recall@20 in the test, and its size."""
    log = k_core(log_from_table(frame), 5)
    dataset = leave_one_out(log, name="mine", num_valid_users=1, split_seed=0)
    family = build_family(dataset, "pop2060")  # or your own: family.membership is bool[U, G]
    model = SASRec(
        num_items=len(dataset.item_ids), dim=32, ff_dim=32, num_blocks=1, num_heads=1, dropout=0.0,
        max_len=32, tie_embeddings=True, init_scale=0.05, dtype="float32",
    )  # fmt: skip
    lengths = np.minimum(dataset.train_lengths, model.max_len - 1)
    ends = dataset.offsets[:-1] + dataset.train_lengths
    sequences = Sequences(*map(jnp.asarray, (dataset.items, ends.astype(np.int32), lengths)))
    membership = jnp.asarray(family.membership)
    tokens = -(-batch * (model.max_len - 1) // BLOCK) * BLOCK  # enough for any batch

    chosen = make_objective(
        objective, membership=family.membership, train_lengths=dataset.train_lengths
    )
    hparams = {hparam.name: jnp.float32(hparam.default) for hparam in chosen.method.hparams}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01))

    def loss_fn(params, users, state):
        packed = pack(sequences, users, num_tokens=tokens, num_items=model.num_items)
        hidden, table = model.apply(params, packed, train=False, method="encode_and_table")
        losses = user_means(softmax_loss(hidden, table, packed.targets), packed)
        return chosen.apply(losses, membership[users], state, hparams)[:2]

    @jax.jit
    def step(params, opt_state, users, state):
        grads, state = jax.grad(loss_fn, has_aux=True)(params, users, state)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state, state

    users = pd.Series(np.arange(len(dataset.user_ids), dtype=np.int32))
    packed = pack(sequences, jnp.asarray(users[:1]), num_tokens=BLOCK, num_items=model.num_items)
    params, state = model.init(jax.random.key(0), packed, train=False), chosen.init()
    opt_state = optimizer.init(params)
    for number in range(steps):
        drawn = jnp.asarray(users.sample(batch, random_state=number))
        params, opt_state, state = step(params, opt_state, drawn, state)

    rank = make_ranker(model, dataset, "test", mask_seen=False, batch_size=256, top_k=0)
    metrics = pd.DataFrame(rank_metrics(rank(params, "the test").ranks, [20]))
    groups = metrics.groupby(family.labels().to_numpy())
    return groups[["NDCG@20", "Recall@20"]].mean().assign(users=groups.size())


if __name__ == "__main__":
    settings = ConfigDict(default_settings() | {"num_users": 3000})
    print(main(pd.read_csv(sys.argv[1]) if sys.argv[1:] else generate(settings)).round(3))
