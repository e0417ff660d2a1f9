import os
from pathlib import Path

# Compiled programs are shared by the tests of a session, its worker processes and the commands
# that tests start. JAX reads these when it is imported. By default it does not store programs
# that compile in less than a second.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "xla")
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
# The tests' programs are small: they compile for longer than they run.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

import jax
import pytest
from runs import finish, small

from seqfair_jax.objectives import registry


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes many seconds; only `make test-all` runs it")


def pytest_make_parametrize_id(config, val, argname):
    # Archives hold the time they were made, and xdist's workers must agree on the tests' names.
    return argname if isinstance(val, bytes) else None


@pytest.fixture(autouse=True)
def _no_implicit_rank_promotion():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture(autouse=True)
def _no_registration_outlives_its_test():
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder with the real logs."""
    folder = os.environ.get("SEQFAIR_DATA")
    if not folder:
        pytest.skip("SEQFAIR_DATA is unset: no real log to test on")
    return Path(folder)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """Finished runs: call it with the arguments of `small`. Copy a folder before you change it."""
    made = {}

    def get(method="erm", **changes):
        config = small(method, **changes)
        key = config.to_json()
        if key not in made:
            made[key] = finish(config, tmp_path_factory.mktemp("finished") / "run")
        return made[key]

    return get
