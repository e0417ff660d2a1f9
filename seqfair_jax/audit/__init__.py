"""Judge any recommender's lists, or a finished run again, by groups, cut-offs and metrics."""

from seqfair_jax.audit.evaluation import Evaluation, evaluate_recommendations

__all__ = ["Evaluation", "evaluate_recommendations"]
