"""`seqfair report DIR [DIR ...]`: tables, tests against a baseline, and the HTML report."""

from collections.abc import Sequence

from absl import flags

from seqfair_jax import workdir
from seqfair_jax.cli import Command
from seqfair_jax.errors import UserError
from seqfair_jax.report import runs, text


def main(argv: Sequence[str]) -> None:
    """Print the tables of the named runs, and write the HTML report."""
    command = Command(
        "report",
        "Print one table for each group family with all the named runs, and test them against\n"
        "a baseline.",
        arguments="DIR [DIR ...]",
    )
    command.string("family", "the group family to show (default: all that the runs share)")
    command.string("metric", "the metric to show", "NDCG@20")
    command.string("baseline", "the folder of a run to test the others against")
    command.string("out", "an HTML file to write the whole report to")
    command.run(argv, _report)


def _report(values: flags.FlagValues, names: Sequence[str]) -> None:
    if not names:
        raise UserError("name the folders of finished runs: seqfair report DIR [DIR ...]")
    folders = [workdir.user_path(name) for name in names]
    baseline = None if values.baseline is None else workdir.user_path(values.baseline)
    if baseline is not None:  # the table has its row too
        folders.append(baseline)
    out = None if values.out is None else workdir.user_path(values.out)
    if out is not None and out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out={out}: expected a name that ends in .html")
    found = runs.read_runs(folders)
    print(text.run_tables(found, values.metric, family=values.family))
    rows = None
    if baseline is not None:
        rows = runs.compare_runs(found, baseline, values.metric)
        print("\n" + text.comparison(rows, baseline, values.metric, values.family))
    if out is not None:
        from seqfair_jax.report import html  # matplotlib is slow to import

        html.write(found, out, values.metric, family=values.family, rows=rows)
        print(f"\nreport: {out.resolve()}")
