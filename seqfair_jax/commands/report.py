"""`seqfair report DIR [DIR ...]`: the verdict, tables, tests, and the HTML report."""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from seqfair_jax import workdir
from seqfair_jax.cli import Command
from seqfair_jax.errors import UserError
from seqfair_jax.report import contents, files, rows, runs, text


def main(argv: Sequence[str]) -> None:
    """Print the tables of the named runs, and write the HTML report."""
    command = Command(
        "report",
        "Print which group is served worst, whether a method helps this group, and for which\n"
        "groups the method lowers the score. Then print one table for each group family with all\n"
        "the named runs. Folders without a finished run are left out with a warning.",
        arguments="DIR [DIR ...]",
    )
    command.string("family", "the group family to show (default: all that the runs share)")
    command.string("metric", "the metric to show (default: the one that chose in validation)")
    command.string(
        "baseline",
        "the row to test the others against: the folder of a run, or a row's name, such as old or "
        "markov (default: that of `seqfair evaluate`, or else ERM)",
    )
    command.strings(
        "out",
        f"a file to write, whose name ends in {files.ENDINGS}; HTML has the whole report, and the "
        "others have its tables. Several with commas between them, or the flag again",
    )
    command.bool("show_small_groups", f"do not hide figures in --out ({rows.HIDDEN})")
    command.run(argv, _report)


def _report(values: flags.FlagValues, names: Sequence[str]) -> None:
    if not names:
        raise UserError("name the folders of finished runs: seqfair report DIR [DIR ...]")
    folders = [workdir.user_path(name) for name in names]
    baseline = None if values.baseline is None else runs.take_baseline(values.baseline)
    outs = [workdir.user_path(name) for given in values.out for name in files.split_names(given)]
    for out in outs:
        files.check_name(out)
        if outs.count(out) > 1:
            raise UserError(f"--out={out} is given {outs.count(out)} times, expected once")
    folders = runs.finished_only(folders)
    if isinstance(baseline, Path):  # the table has its row too
        folders.append(baseline)
    found = runs.read_runs(folders)
    content = contents.build(found, values.metric, family=values.family, baseline=baseline)
    print(text.verdict_text(content))
    print("\n" + text.contents_tables(content, runs.notes(found)))
    if content.named_by and len(content.tests):
        print("\n" + text.comparison(content))
    for out in outs:
        files.write(found, content, out, show_small_groups=values.show_small_groups)
        print(f"\nreport: {out.resolve()}")
