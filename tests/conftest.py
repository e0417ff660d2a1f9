import os
from pathlib import Path

import jax
import pytest


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
