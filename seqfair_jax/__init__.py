"""Train sequential recommenders and measure how well they serve each group of users."""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

# The Python interface. A name is imported when it is first used, so that `import seqfair_jax` is
# quick and does not start JAX.
_HOME = {
    "Model": "seqfair_jax.api",
    "UserError": "seqfair_jax.errors",
    "compare": "seqfair_jax.api",
    "evaluate_recommendations": "seqfair_jax.audit.evaluation",
    "fit": "seqfair_jax.api",
    "load": "seqfair_jax.api",
}

if TYPE_CHECKING:
    from seqfair_jax.api import Model as Model
    from seqfair_jax.api import compare as compare
    from seqfair_jax.api import fit as fit
    from seqfair_jax.api import load as load
    from seqfair_jax.audit.evaluation import evaluate_recommendations as evaluate_recommendations
    from seqfair_jax.errors import UserError as UserError
else:

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_HOME[name]), name)
        globals()[name] = value
        return value


__all__ = [
    "Model", "UserError", "__version__", "compare", "evaluate_recommendations", "fit", "load",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
