"""`seqfair recommend --workdir=DIR --out=FILE`: a list of items for each user."""

import logging
import time
from collections.abc import Sequence

import numpy as np
from absl import flags

from seqfair_jax import devices, workdir
from seqfair_jax.cli import Command
from seqfair_jax.config import PATHS, flatten
from seqfair_jax.errors import Interrupted, UserError
from seqfair_jax.serving import TrainedModel, catalogue, load, output, tables
from seqfair_jax.serving.catalogue import Histories
from seqfair_jax.serving.recommender import parse_seen, recommend

_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Write a list of items for each user."""
    command = Command(
        "recommend",
        "Write the k best items of each user by a finished run. Needs the run's folder, and only\n"
        "for --all_users its log. Tables may have any format of a log (docs/log.md).",
    )
    command.string("workdir", "the folder of a finished run, or of a grid of runs (required)")
    command.string("out", "the file to write: .parquet, .csv or .jsonl (required)")
    command.integer("k", "items for each user", 20)
    command.string("users", "a table with a column user_id (default: all users of the run)")
    command.string("histories", "a table user_id, item_id[, timestamp] of new or known users")
    command.bool(
        "all_users",
        "lists for every user of the run's log, which is read again: also those whom the filter "
        "or the split left out",
    )
    command.string("log", "where the log is now, for --all_users (default: as in training)")
    command.bool(
        "before_test",
        "lists for the tested users, from their histories before the test: those that seqfair "
        "evaluate can judge",
    )
    command.string("seen", "keep, or mask: no item of the user's history (default: as evaluated)")
    command.string("exclude", "a table with a column item_id: never recommend these")
    command.string("only", "a table with a column item_id: recommend only these")
    command.string("run", "the name of a run of a grid (default: the one that was selected)")
    command.string("rule", "the epoch that was best overall, or for the worst_group", "overall")
    command.integer("batch_size", "users scored at once (default: as evaluated)", 0)
    command.mesh()
    command.run(argv, lambda values, _: _recommend(command, values))


def _recommend(command: Command, values: flags.FlagValues) -> None:
    directory = command.required("workdir")
    out = workdir.user_path(command.required("out"))
    output.check_suffix(out)
    if out.is_dir():
        raise UserError(f"--out={out} is a folder; name a file")
    if values.k < 1 or values.batch_size < 0:
        raise UserError(f"--k={values.k}, --batch_size={values.batch_size}: expected 1 or more")
    mesh = devices.make_mesh(data=values.data, catalogue=values.catalogue)
    mask_seen = parse_seen(values.seen, f"--seen={values.seen}")
    given = [
        name for name in ("users", "histories", "before_test", "all_users") if values[name].value
    ]
    if len(given) > 1:
        raise UserError(f"--{given[0]} and --{given[1]} are both given; give one of them")
    if values.log and not values.all_users:
        raise UserError(f"--log={values.log} is for --all_users, which reads it; add this flag")
    try:
        trained = load(directory, run=values.run, rule=values.rule, mesh=mesh)
        data = trained.config.data
        inputs = [values[name].value for name in ("users", "histories", "log", "exclude", "only")]
        inputs += [value for key, value in flatten(trained.config.to_dict()) if key in PATHS]
        workdir.refuse_overwrite(out, inputs)
        user_ids, histories = _users(trained, values)
        candidates = tables.read_candidates(
            values.only, values.exclude, trained.item_ids, data.columns
        )
        _LOG.info(
            "%s: %s users, %s items", trained.described(values.rule),
            f"{len(user_ids):,}", f"{len(candidates):,}",
        )  # fmt: skip
        began = time.perf_counter()
        found = recommend(
            trained,
            histories,
            k=values.k,
            mask_seen=mask_seen,
            candidates=candidates,
            batch_size=values.batch_size or None,
        )
        written = output.write_lists(
            out, found, user_ids=user_ids, item_ids=trained.item_ids, k=values.k
        )
    except KeyboardInterrupt as error:
        raise Interrupted(f"stopped: nothing was written to {out}", error) from None
    seconds = time.perf_counter() - began
    if written.short_lists:
        _LOG.warning(
            "%s users have fewer than %s items, and %s of them have no item, since no more items "
            "are left to recommend",
            f"{written.short_lists:,}", values.k, f"{written.empty_lists:,}",
        )  # fmt: skip
    print(
        f"{out}: {written.rows:,} rows for {len(user_ids):,} users in {seconds:.1f} s "
        f"({len(user_ids) / seconds:,.0f} users/s)"
    )


def _users(trained: TrainedModel, values: flags.FlagValues) -> tuple[np.ndarray, Histories]:
    """Who gets a list: the ids and the histories."""
    if values.before_test:
        return catalogue.histories_before_test(trained.folder)
    if values.all_users:
        data = trained.config.data
        return tables.histories_of_log(trained.folder, data, trained.item_ids, path=values.log)
    if values.histories:
        return tables.read_histories(
            values.histories,
            trained.user_ids,
            trained.item_ids,
            trained.config.data.columns,
            **tables.reading_rules(trained.config.data),
        )
    if values.users:
        columns = trained.config.data.columns
        ids, places = tables.read_users(values.users, trained.user_ids, columns)
        return ids, trained.histories.select(places)
    dropped = workdir.read_summary(trained.folder)["dataset"].get("dropped_users", 0)
    if dropped:
        _LOG.info(
            "%s other users of the log get no list, since the run has no training rows of them; "
            "--all_users reads the log again and gives them lists too", f"{dropped:,}",
        )  # fmt: skip
    return trained.user_ids, trained.histories
