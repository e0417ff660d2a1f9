"""An objective from outside the package: tilted empirical risk minimisation (TERM).

    R(t) = 1/t log( 1/M sum_u m_u exp(t l_u) ),    t > 0

where l_u is the loss of user u, m_u the user's mass (1 with objective.user_loss=mean), and M the
sum of the batch's masses. Its gradient is sum_u q_u dl_u with q_u in proportion to m_u exp(t l_u),
so users with a larger loss count more. As the tilt t falls to 0, R becomes the mean (ERM). As t
grows, R becomes the largest loss.

Source: T. Li, A. Beirami, M. Sanjabi and V. Smith, "Tilted Empirical Risk Minimization", ICLR 2021,
equation (2). Here R is computed on each batch.

    seqfair train --config=examples/own_objective.py --workdir=runs/term
    python examples/own_objective.py
"""

import jax
import jax.numpy as jnp

from seqfair_jax import objectives
from seqfair_jax.config import default_config
from seqfair_jax.run import run

TILT = objectives.HParam(
    name="tilt",
    default=1.0,
    help="How much more users with a large loss count in `term` (t).",
    range=objectives.Range(above=0),
    search=(0.1, 1.0, 10.0),
)


def make_term(users):
    """TERM's formula. It needs nothing of the users before the first step."""

    def loss(batch, state, hparams):
        tilted = hparams["tilt"] * batch.losses
        total = jax.nn.logsumexp(tilted, b=batch.mass)
        value = (total - jnp.log(batch.mass.sum())) / hparams["tilt"]
        shares = objectives.group_shares(batch, batch.mass * jnp.exp(tilted - total))
        return value, state, {objectives.TAIL_SHARE.key: shares}

    return objectives.Formula(loss)


TERM = objectives.register(
    objectives.Method(
        name="term",
        label="TERM",
        make=make_term,
        hparams=(TILT,),
        uses_mass=True,
        is_robust=True,
        logs=(objectives.TAIL_SHARE,),
    )
)


def get_config():
    """A small run on the synthetic log."""
    config = default_config()
    config.objective.name = "term"
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
