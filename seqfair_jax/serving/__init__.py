"""A finished run as a recommender: load it, and give each user a list of items."""

from seqfair_jax.serving.catalogue import Histories
from seqfair_jax.serving.trained import TrainedModel, judged_settings, load

__all__ = ["Histories", "TrainedModel", "judged_settings", "load"]
