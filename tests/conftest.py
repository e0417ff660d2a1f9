import os
from pathlib import Path

import jax
import pytest

# Compiled programs are shared by the tests of a session, its worker processes and the commands
# that tests start.
_CACHE = os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
jax.config.update("jax_compilation_cache_dir", _CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(autouse=True)
def _no_implicit_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real logs."""
    folder = os.environ.get("SEQFAIR_DATA")
    if not folder:
        pytest.skip("SEQFAIR_DATA is unset: no real log to test on")
    return Path(folder)
