"""`seqfair search`: the paper's Retailrocket model, table 8.

The search of appendix B, by ERM's validation score.

    seqfair search --config=backbone_rr --workdir=runs/backbone_rr

It tries all 216 combinations; `--dry_run` prints the lists. The paper chose dim 256, ff_dim 256,
3 blocks, 1 head, dropout 0.2, batch size 128. With `:scale=small` it draws 50 trials around a
model that two cores train in minutes. To change a list:
--config.search.space.model.dropout=0.1,0.2
"""

from seqfair_jax.paper import plans, settings


def get_config(arg=None):
    return plans.backbone(settings.retailrocket, arg)
