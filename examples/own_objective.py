"""An objective from outside the package: the fairness objective q-FFL.

    R(q) = 1/B sum_u m_u l_u^(q + 1) / (q + 1),    q >= 0

where l_u is the loss of user u, m_u the user's mass (1 with objective.user_loss=mean), and B the
number of users in the batch. Its gradient is sum_u q_u dl_u with q_u = m_u l_u^q / B, so users with
a larger loss count more. q = 0 is ERM.

Source: T. Li, M. Sanjabi, A. Beirami and V. Smith, "Fair Resource Allocation in Federated
Learning", ICLR 2020, equation (2), with users in place of devices. R is computed on each batch.

    seqfair train --config=examples/own_objective.py --workdir=runs/qffl
    python examples/own_objective.py
"""

import jax.numpy as jnp

from seqfair_jax import objectives
from seqfair_jax.config import default_config
from seqfair_jax.run import run

FAIRNESS = objectives.HParam(
    name="fairness",
    default=1.0,
    help="How much more users with a large loss count in `qffl` (q).",
    range=objectives.Range(at_least=0),
    search=(0.1, 1.0, 5.0),
)


def make_qffl(users):
    """The formula of q-FFL. It needs nothing of the users before the first step."""

    def loss(batch, state, hparams):
        power = hparams["fairness"] + 1
        value = jnp.mean(batch.mass * batch.losses**power) / power
        weights = batch.mass * batch.losses ** hparams["fairness"]
        shares = objectives.group_shares(batch, weights)
        return value, state, {objectives.TAIL_SHARE.key: shares}

    return objectives.Formula(loss)


QFFL = objectives.register(
    objectives.Method(
        name="qffl",
        label="q-FFL",
        make=make_qffl,
        hparams=(FAIRNESS,),
        uses_mass=True,
        is_robust=True,
        logs=(objectives.TAIL_SHARE,),
    )
)


def get_config():
    """A small run on the synthetic log."""
    config = default_config()
    config.objective.name = "qffl"
    config.data.synthetic.num_users = 1000
    config.model.dim = config.model.ff_dim = 16
    config.model.num_blocks = 1
    config.model.max_len = 20
    config.model.dropout = 0.0
    config.train.batch_size = 32
    config.train.epochs = 2
    config.train.steps_per_epoch = 100
    return config


if __name__ == "__main__":
    run(get_config(), "runs/own_objective")  # prints the table
