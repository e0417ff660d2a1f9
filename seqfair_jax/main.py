"""`python -m seqfair_jax.main --config=configs/rr_gdro.py --workdir=DIR --config.KEY=VALUE`."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from seqfair_jax import workdir
from seqfair_jax.run import run


def main() -> None:
    """Train, test and report the runs of one config."""
    command(run)


def command(work: Callable[[ConfigDict, str], Any]) -> None:
    """Define `--config` and `--workdir`, read the flags and call `work(config, workdir)`.

    What a user can mend ends in one line, not in a trace.
    """
    config = config_flags.DEFINE_config_file(
        "config", None, "a file of configs/, its arguments behind a colon"
    )
    directory = flags.DEFINE_string("workdir", None, "where the run's files go", required=True)
    flags.mark_flag_as_required("config")

    def parse(argv):
        try:
            return app.parse_flags_with_usage(argv)
        except (AttributeError, KeyError, ValueError, OSError) as error:
            # ml_collections raises Key- or AttributeError for an unknown key, its advice inside.
            message = str(error.args[0] if error.args else error)
            sys.exit(f"error in --config: {message.strip(chr(39))}")

    def run_flags(_):
        absl_logging.set_verbosity(absl_logging.WARNING)  # orbax tells of every file
        logging.getLogger("seqfair_jax").setLevel(logging.INFO)
        use_compilation_cache()
        try:
            work(config.value, directory.value)
        except (ValueError, OSError, FloatingPointError) as error:
            sys.exit(f"error: {error}")

    app.run(run_flags, flags_parser=parse)


def use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache folder, one for each processor model.

    XLA's programs for one processor can fail on another. `JAX_COMPILATION_CACHE_DIR` overrides.
    """
    # However fast to compile: there are many small programs before the first step.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    model = "".join(c if c.isalnum() else "-" for c in workdir.processor())
    jax.config.update("jax_compilation_cache_dir", str(cache / "seqfair_jax" / "xla" / model))


if __name__ == "__main__":
    main()
