"""`seqfair evaluate`: test a run again, and judge other runs and any recommender's lists."""

import logging
import sys
from collections.abc import Sequence

from absl import flags
from ml_collections import ConfigDict

from seqfair_jax import devices, workdir
from seqfair_jax.audit import evaluation, lists, other_runs, source
from seqfair_jax.audit.gate import check_margin, only_reference
from seqfair_jax.cli import Command
from seqfair_jax.data.split import describe_split
from seqfair_jax.errors import Interrupted, UserError
from seqfair_jax.serving.recommender import parse_seen
from seqfair_jax.training.selection import RULES

GATE_FAILED = 3  # the exit status; an error is 1
_LOG = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> None:
    """Judge a run or lists on the test of a log."""
    command = Command(
        "evaluate",
        "Test a finished run again, without its log, by other groups, cut-offs or metrics; or\n"
        "judge other runs and the lists of any recommender on the same targets. With --config\n"
        "instead of --workdir, they are judged on the split of a log, and no model is trained.",
        config="optional",
    )
    command.string("workdir", "the folder of a finished run, or of a grid of runs")
    command.strings(
        "recommendations",
        "a table user_id, item_id and rank or score; NAME=FILE gives its row a name. Several with "
        "commas between them, or the flag again",
    )
    command.strings(
        other_runs.FLAG,
        "the folder of another run, such as the one before, to rank the same targets by; "
        "NAME=DIR gives its row a name. Several as for --recommendations",
    )
    command.string("out", "a new folder for the results, which `seqfair report` reads")
    command.string("groups", "the group families, such as pop33,country (default: as evaluated)")
    command.string("group_file", "a table of the users' groups; without --groups, all of it")
    command.string("cutoffs", "the cut-offs, such as 10,20 (default: as evaluated)")
    command.string("metrics", "those to print, such as NDCG,MAP@10 (default: as in validation)")
    command.string(
        "baseline",
        "the row to test the others against (default: the only run of --with, or else the run)",
    )
    command.string("seen", "keep, or mask: no item of the user's history (default: as evaluated)")
    command.number(
        "fail_if_worse",
        f"end with status {GATE_FAILED} if the run is shown to be below a row, for all users or "
        "for a group, by more than this number, such as 0.01. The row is that of --baseline, or "
        "the only one of --with and --recommendations",
    )
    command.bool(
        "fail_if_unknown",
        "with --fail_if_worse: also if such a loss is not ruled out for some group",
    )
    command.string("run", "the name of a run of a grid (default: the one that was selected)")
    command.string("rule", "the epoch that was best overall, or for the worst_group", "overall")
    command.mesh()
    command.run(argv, _evaluate)


def _evaluate(values: flags.FlagValues, config: ConfigDict | None) -> None:
    if (values.workdir is None) == (config is None):
        raise UserError(
            "give --workdir of a finished run, or --config and --config.data.path of a log"
        )
    mask_seen = parse_seen(values.seen, f"--seen={values.seen}")
    if values.rule not in RULES:
        raise UserError(f"--rule={values.rule}: expected {' or '.join(RULES)}")
    given = lists.name_paths(values.recommendations)
    runs = lists.name_paths(getattr(values, other_runs.FLAG), other_runs.FLAG, "DIR")
    if config is not None and not given and not runs:
        raise UserError("--recommendations is missing: there is no run and no list to judge")
    of_run = values.rule != "overall" or values.data > 1 or values.catalogue > 1
    if config is not None and (values.run or (of_run and not runs)):
        raise UserError(
            "--run, --rule, --data and --catalogue are of a run; give --workdir, or leave them out"
        )
    _check_gate(values, [*given, *runs])
    mesh = devices.make_mesh(data=values.data, catalogue=values.catalogue)
    out = None if values.out is None else workdir.user_path(values.out)
    if out is not None:
        workdir.refuse_filled(out)
    choice = source.Choice(
        None if values.groups is None else _listed("groups", values.groups),
        values.group_file,
        None if values.cutoffs is None else _cutoffs(values.cutoffs),
        mask_seen,
    )
    try:
        if config is not None:
            judged = source.from_config(config, choice)
        else:
            judged = source.from_run(values.workdir, values.run, choice)
        cutoffs = judged.config.evaluate.cutoffs
        names = [] if values.metrics is None else _listed("metrics", values.metrics)
        metrics = evaluation.parse_metrics(names, cutoffs)
        if judged.folder is not None:
            _LOG.info("%s, best epoch by %s", judged.folder, values.rule)
        print("\n".join(describe_split(judged.description["split"])))
        found = evaluation.evaluate(
            judged, given, runs, rule=values.rule, metrics=metrics, mesh=mesh
        )
        print("\n" + found.text(metrics, values.baseline))
        gate = None
        if values.fail_if_worse is not None:
            gate = found.gate(values.fail_if_worse, values.baseline)
            print(f"\n{gate}")
        if out is not None:
            found.write(out, gate, baseline=values.baseline)
            print(f"\nfiles: {out.resolve()}")
    except KeyboardInterrupt as error:
        where = "" if out is None else f": nothing was written to {out}"
        raise Interrupted(f"stopped{where}", error) from None
    if gate is None:
        return
    failure = gate.failure(fail_if_unknown=values.fail_if_unknown)
    sys.stdout.flush()
    if failure:
        print(f"gate: failed: {failure}", file=sys.stderr)
        raise SystemExit(GATE_FAILED)
    print(f"gate: {gate.passed()}")


def _check_gate(values: flags.FlagValues, others: Sequence[str]) -> None:
    """Refuse flags of the gate that cannot be used, before anything is computed.

    Args:
        values: all flags.
        others: the names of the lists and of the other runs.
    """
    if values.fail_if_worse is None:
        if values.fail_if_unknown:
            raise UserError("--fail_if_unknown needs --fail_if_worse, the loss that is allowed")
        return
    check_margin(values.fail_if_worse, "--fail_if_worse")
    if values.baseline is None:
        only_reference(others if values.workdir is not None else others[1:])


def _listed(name: str, value: str) -> list[str]:
    """The parts of a list with commas, each once."""
    parts = [part.strip() for part in value.split(",")]
    if not all(parts) or len(set(parts)) < len(parts):
        raise UserError(f"--{name}={value}: expected unequal names with commas between them")
    return parts


def _cutoffs(value: str) -> list[int]:
    parts = _listed("cutoffs", value)
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise UserError(f"--cutoffs={value}: expected whole numbers from 1 on, such as 10,20")
    return list(map(int, parts))
