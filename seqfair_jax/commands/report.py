"""The tables of finished runs, the tests against a baseline, and the HTML report.

`python -m seqfair_jax.report DIR [DIR ...] --family=pop33 --baseline=DIR --out=report.html`
"""

import sys
from pathlib import Path

from absl import app, flags

from seqfair_jax import tables


def main() -> None:
    """Print one table for all the run folders that are named."""
    family = flags.DEFINE_string("family", None, "the groups to show; all families where unset")
    metric = flags.DEFINE_string("metric", "NDCG@20", "which figure")
    baseline = flags.DEFINE_string("baseline", None, "a run's folder to test the others against")
    out = flags.DEFINE_string("out", None, "an HTML file to write the whole report to")

    def print_tables(argv):
        if len(argv) < 2:
            sys.exit(
                "usage: python -m seqfair_jax.report DIR [DIR ...] "
                "[--family=] [--metric=] [--baseline=DIR] [--out=FILE.html]"
            )
        folders = [Path(name) for name in argv[1:]]
        before = None if baseline.value is None else Path(baseline.value)
        if before is not None:  # so that its row stands in the table
            folders.append(before)
        try:
            print(tables.tables(folders, metric.value, family=family.value))
            rows = None
            if before is not None:
                rows = tables.compare_folders(folders, before, metric.value)
                print("\n" + tables.comparison(rows, before, metric.value, family.value))
            if out.value is not None:
                from seqfair_jax import html_report  # matplotlib is slow to import

                html_report.write(
                    folders, Path(out.value), metric.value, family=family.value, rows=rows
                )
                print(f"\nreport: {Path(out.value).resolve()}")
        except ValueError as error:
            sys.exit(f"error: {error}")

    app.run(print_tables)


if __name__ == "__main__":
    main()
