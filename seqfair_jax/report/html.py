"""One self-contained HTML file: the verdict, tables, figures, and details.

The functions here prepare plain rows and figures; `report.html.j2` is all of the markup.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import pandas as pd

from seqfair_jax import __version__, workdir
from seqfair_jax.config import format_value
from seqfair_jax.data.split import describe_split
from seqfair_jax.evaluation import slices
from seqfair_jax.evaluation.metrics import KINDS, LIST_FIGURES, describe_metric, parse_metric
from seqfair_jax.evaluation.significance import FEWEST_VALUES
from seqfair_jax.report import figures, names, rows, text, verdict
from seqfair_jax.report.contents import LEVEL, Contents, records
from seqfair_jax.report.rows import BASELINE, LIST, Row
from seqfair_jax.report.runs import FinishedRun, differences, failed_runs, gates
from seqfair_jax.training.selection import is_result

_METHODS = 8  # in a figure
_FOREST_LINES = 80
_PANELS = 12  # of curves
_TESTS = 600  # rows of the table of tests


class Cell(NamedTuple):
    """A cell of a table."""

    text: str
    mark: str = ""  # "best" or "second" of its column
    star: bool = False
    half: str = ""  # the half-width of an interval over seeds
    interval: str = ""  # over users
    small: bool = False  # of a group that is too small


class Line(NamedTuple):
    """A row of a table; the first cell is its name."""

    cells: list[Cell]
    is_baseline: bool = False


class Table(NamedTuple):
    """A table, with a caption for screen readers, and perhaps a row of group sizes."""

    caption: str
    header: list[str]
    lines: list[Line]
    sizes: list[Cell] | None = None


class Image(NamedTuple):
    """A figure, its title, and the entries of its own legend."""

    title: str
    alt: str
    uri: str
    legend: Sequence[tuple[str, figures.Style]] = ()


class Section(NamedTuple):
    """A part of the page: a heading, then notes, a table, a legend, and images."""

    heading: str
    notes: Sequence[str] = ()
    table: Table | None = None
    legend: Sequence[tuple[str, figures.Style]] = ()
    images: Sequence[Image] = ()
    is_forest: bool = False  # a single large figure


def write(runs: Sequence[FinishedRun], contents: Contents, path: Path) -> None:
    """Write the report of finished runs to one HTML file that needs no network.

    The page has the verdict in sentences; a table by group for each family with group sizes (best
    row bold, second underlined, a star where q < 0.05 against the reference); a forest plot of the
    differences; validation curves by group; what the objectives log by group; results over the
    values of a grid; and, folded, every test, times, definitions, settings and versions. Figures
    and the verdict show the first families, methods and groups; a sentence says what is left out.

    Args:
        runs: finished runs on one log, from `runs.read_runs`.
        contents: from `contents.build` of these runs; `published`, to hide the figures of groups
            of few users.
        path: the file to write; replaced if it exists.
    """
    trained = [run for run in runs if not run.is_list]
    results = [run for run in trained if is_result(run.summary)]
    shown = contents._replace(families=contents.families[: text.SHOWN_FAMILIES])
    methods = _shown_methods(contents)
    styles = {row.name: number for number, row in enumerate(methods)}
    more = contents.families[text.SHOWN_FAMILIES :]
    told = [
        (slices.family_label(part.family), part.sentences) for part in verdict.verdicts(contents)
    ]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("seqfair_jax.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    split = contents.dataset.get("split")
    page = environment.get_template("report.html.j2").render(
        title=f"{contents.dataset['name']}: {contents.metric} by user group",
        dataset=contents.dataset,
        split=describe_split(split) if split else [],
        failed=failed_runs(runs),
        notes=[*verdict.notes(contents), *map(_sentence, [*gates(runs), *differences(runs)])],
        verdicts=told[: text.SHOWN_FAMILIES],
        tables=[_results(contents, family) for family in shown.families],
        legend=text.legend(contents),
        more_verdicts=told[text.SHOWN_FAMILIES :],
        more_tables=[_results(contents, family) for family in more],
        sections=[
            *_means(shown, methods, styles),
            *_forest(shown, methods, styles),
            *_curves(results, shown, styles),
            *_grids(results, shown),
        ],
        details=[
            *_tests(contents),
            *_over_seeds(contents),
            *_recommended(contents),
            *_times(trained),
        ],
        definitions=_definitions(contents),
        settings=_settings(runs),
        version=__version__,
    )
    workdir.write_text(path, page)


def _shown_methods(contents: Contents) -> list[Row]:
    """The rows of the figures: the reference, the chosen rows, and others up to a limit.

    Of a run's two rows it is that of the best overall epoch, and of a method with many values the
    row that is best in validation.
    """
    wanted = {contents.reference, *contents.chosen.values()}
    methods = [row for row in contents.rows if row.kind != BASELINE]
    others = [row for row in methods if row.name not in wanted and row.name == row.run]
    others += [row for row in methods if row.kind == LIST and row.name not in wanted]
    first = [row for row in methods if row.name in wanted]
    if len(others) + len(first) > _METHODS:
        best: dict[str, Row] = {}
        for row in others:
            method = _method(row)
            better = method not in best or _validation(row) > _validation(best[method])
            if better and method not in map(_method, first):
                best[method] = row
        others = list(best.values())
    kept = {row.name for row in [*first, *others][:_METHODS]}
    return [row for row in methods if row.name in kept]


def _method(row: Row) -> str:
    """The name of a run's method, or of a list."""
    return row.run.partition(" (")[0] or row.name


def _validation(row: Row) -> float:
    return float(np.mean([seed[slices.OVERALL] or 0.0 for seed in row.validation] or [0.0]))


def _sentence(note: str) -> str:
    return f"{note[0].upper()}{note[1:]}."


def _results(contents: Contents, family: str) -> Section:
    notes = text.left_out(contents, family)
    return Section(
        f"{contents.metric} by {slices.family_label(family)}",
        list(map(_sentence, notes)),
        _result_table(contents, family),
    )


def _result_table(contents: Contents, family: str) -> Table:
    numbers = contents.table(family)
    columns = text.shown_columns(numbers)
    judged = contents.judged(family)
    small = {name for name in slices.groups_in(columns, family) if name not in judged}
    starred = contents.tests[contents.tests["star"].eq(True)]
    stars = set(zip(starred["name"], starred["slice"], strict=True))
    everyone = [True] * len(numbers)
    places = {column: text.best_places(numbers[column], everyone) for column in columns}
    ends = contents.ends()
    kinds = {row.name: row.kind for row in contents.rows}
    lines = []
    for place, record in enumerate(numbers.to_dict("records")):
        name = str(record["name"])
        cells = [Cell(rows.row_label(name, record["seeds"]))]
        for column in columns:
            value, half = record[column], record[f"{column} ±"]
            if contents.is_hidden(column):
                cells.append(Cell("hidden", small=True))
                continue
            if np.isnan(value):
                cells.append(Cell("-", small=column in small))
                continue
            cells.append(
                Cell(
                    f"{value:.4f}",
                    "" if column in small else ("", "best", "second")[places[column][place]],
                    (name, column) in stars,
                    "" if np.isnan(half) else f"±{half:.4f}",
                    _over_users(ends.get((name, column))) if record["seeds"] == 1 else "",
                    column in small,
                )
            )
        lines.append(Line(cells, kinds[name] == BASELINE))
    sizes = [
        Cell(text.users_cell(contents, column), half=_size_note(contents, column, small))
        for column in columns
    ]
    caption = f"{contents.metric} by {slices.family_label(family)}"
    header = ["", *text.column_labels(columns)]
    return Table(caption, header, lines, [Cell(text.USERS), *sizes])


def _size_note(contents: Contents, name: str, small: Collection[str]) -> str:
    if contents.is_hidden(name):
        return rows.HIDDEN
    return "too few" if name in small else ""


def _over_users(ends: tuple[float, float] | None) -> str:
    """The interval of a mean over users; "" if it is not known."""
    if ends is None:
        return ""
    low, high = ends
    return "too few hits" if np.isnan(low) else f"{low:.4f} to {high:.4f}"


def _means(contents: Contents, methods: Sequence[Row], styles: Mapping[str, int]) -> list[Section]:
    """One plot of the means with their intervals over users, by group and method."""
    ends = contents.ends()
    drawn = [row for row in methods if any(row.name == name for name, _ in ends)]
    if not drawn:
        return []
    groups, left_out = _forest_groups(contents, len(drawn))
    lines: list[dict[int, figures.Interval]] = []
    for group in groups:
        of_group = {}
        for row in drawn:
            means = [x for seed in row.means if (x := seed.get(group)) is not None]
            if means and (row.name, group) in ends:
                of_group[styles[row.name]] = figures.Interval(
                    float(np.mean(means)), *ends[row.name, group], filled=True
                )
        lines.append(of_group)
    notes = [
        f"Each point is a method's mean {contents.metric} for the users of a group, with its 95 % "
        "interval over users. A point without a line has too few hits for an interval. The number "
        "after a group's name says how many test users it has. Intervals of two methods may "
        "overlap although the methods differ: their difference is tested for the same users.",
        *left_out,
        *_hidden_methods(contents, methods),
    ]
    title = f"{contents.metric} with its interval over users"
    return [_forest_section(title, notes, contents, groups, lines, _legend(drawn, styles), False)]


def _forest(contents: Contents, methods: Sequence[Row], styles: Mapping[str, int]) -> list[Section]:
    """One plot of the differences from the reference, by group and method."""
    tests = contents.tests
    drawn = [row for row in methods if row.name in set(tests["name"])]
    if not drawn:
        return []
    groups, left_out = _forest_groups(contents, len(drawn))
    at = tests.set_index(["name", "slice"])
    lines: list[dict[int, figures.Interval]] = []
    for group in groups:
        found = {row.name: (row.name, group) for row in drawn if (row.name, group) in at.index}
        lines.append(
            {
                styles[name]: figures.Interval(*at.loc[key, ["difference", "low", "high", "star"]])
                for name, key in found.items()
            }
        )
    notes = [
        f"Each point is a method's mean {contents.metric} minus that of {contents.reference}, for "
        "the users of a group, with its 95 % interval. The number after a group's name says how "
        f"many test users it has. A filled point has q < {LEVEL:g}.",
        *left_out,
        *_hidden_methods(contents, methods),
    ]
    title = f"Difference from {contents.reference} by group"
    return [_forest_section(title, notes, contents, groups, lines, _legend(drawn, styles), True)]


def _forest_groups(contents: Contents, methods: int) -> tuple[list[str], list[str]]:
    """All users and the groups of a plot with so many methods, and a note on the others."""
    groups = [slices.OVERALL]
    most = max(4, _FOREST_LINES // methods)
    each = max(2, (most - 1) // len(contents.families))
    left_out = 0
    for family in contents.families:
        worst_first = contents.worst_first(family)
        groups += [name for name in contents.judged(family) if name in worst_first[:each]]
        left_out += len(worst_first[each:])
    if not left_out:
        return groups, []
    return groups, [
        f"The figure shows the {each} groups of each family that are served worst. The other "
        f"{left_out} are only in the tables."
    ]


def _forest_section(
    title: str,
    notes: Sequence[str],
    contents: Contents,
    groups: Sequence[str],
    lines: Sequence[Mapping[int, figures.Interval]],
    legend: Sequence[tuple[str, figures.Style]],
    zero: bool,
) -> Section:
    labels = [
        f"{label} ({contents.sizes[name]:,})"
        for name, label in zip(groups, _labels(contents, groups), strict=True)
    ]
    drawing = figures.forest(labels, lines, zero=zero)
    where = "the table of every test" if zero else "the tables"
    image = Image("", f"{title}: the numbers are in {where}", figures.svg_uri(drawing, title))
    return Section(title, notes, legend=legend, images=[image], is_forest=True)


def _labels(contents: Contents, groups: Sequence[str]) -> list[str]:
    if len(contents.families) == 1:
        return slices.labels(groups)
    return [slices.full_label(name).replace("=", ": ", 1) for name in groups]


def _hidden_methods(contents: Contents, methods: Sequence[Row]) -> list[str]:
    shown = {row.name for row in methods}
    hidden = [row for row in contents.rows if row.kind != BASELINE and row.name not in shown]
    if not hidden:
        return []
    runs = {row.run for row in methods}
    is_second = all(row.run and row.run in runs for row in hidden)  # the run's other row is shown
    return [
        ("The figures show one row for each run. " if is_second else
         f"The figures show at most {_METHODS} rows. ")
        + f"{verdict.listed([row.name for row in hidden])} {'is' if len(hidden) == 1 else 'are'} "
        "only in the tables."
    ]  # fmt: skip


def _legend(methods: Sequence[Row], styles: Mapping[str, int]) -> list[tuple[str, figures.Style]]:
    return [(row.name, figures.style(styles[row.name])) for row in methods]


def _history(runs: Sequence[FinishedRun]) -> pd.DataFrame:
    """Every run's `metrics.jsonl`: a row for each method and epoch, averaged over seeds.

    Epochs that not all seeds have, since some stopped early, are left out: a mean over fewer seeds
    would show the choice of seeds as a change.
    """
    none = pd.DataFrame(columns=["name", "epoch"], dtype=float)  # a run may have no rows
    tables = [workdir.read_metrics(run.folder).astype(float).assign(name=run.name) for run in runs]
    grouped = pd.concat([none, *tables]).groupby(["name", "epoch"], sort=False)
    seeds = grouped.size()
    means = grouped.mean()[seeds == seeds.groupby("name").transform("max")]
    # Its columns are apart in memory, and pandas warns of over 100 such; a copy joins them.
    return means.copy().reset_index()


def _columns(history: pd.DataFrame, prefix: str) -> dict[str, str]:
    """The columns with a prefix, by the rest of their name: a slice or a group."""
    return {
        column.removeprefix(prefix): column
        for column in map(str, history)
        if column.startswith(prefix) and history[column].notna().any()
    }


def _curves(
    runs: Sequence[FinishedRun], contents: Contents, styles: Mapping[str, int]
) -> list[Section]:
    """Figures over the epochs: validation by group, and what the objectives log by group."""
    if not runs:
        return []
    numbers: dict[str, int] = {}  # of the runs whose rows are in the figures
    for row in contents.rows:
        if row.name in styles and row.run:
            numbers.setdefault(row.run, styles[row.name])
    shown = [run for run in runs if run.name in numbers]
    history = _history(shown)
    by_name = {str(name): part for name, part in history.groupby("name", sort=False)}
    found = _columns(history, f"val/{contents.metric}/")
    each = max(1, (_PANELS - 1) // len(contents.families))
    wanted, left_out = [slices.OVERALL], 0
    for family in contents.families:
        worst_first = contents.worst_first(family)
        wanted += [name for name in contents.judged(family) if name in worst_first[:each]]
        left_out += len(worst_first[each:])
    wanted = [name for name in contents.validated(wanted) if name in found]
    images = [
        _line_image(
            label,
            f"validation {contents.metric} by epoch, {label}",
            [(numbers[run], part[["epoch", found[name]]]) for run, part in by_name.items()],
        )
        for name, label in zip(wanted, _labels(contents, wanted), strict=True)
    ]
    legend = [(run, figures.style(numbers[run])) for run in by_name]
    notes = [
        f"Mean {contents.metric} of the validation users after each epoch, over the seeds. "
        "It ends with the seed that stopped first."
    ]
    if left_out:
        notes.append(
            f"The figures show the {each} groups of each family that are served worst. The other "
            f"{left_out} have no figure."
        )
    sections = [Section("Training", notes, legend=legend, images=images)] if images else []
    families = {run.name: run.summary["group_family"] for run in shown}
    for log in dict.fromkeys(log for run in shown for log in names.logs(run.summary)):
        images = []
        for name, part in by_name.items():
            columns = {
                group: column
                for group, column in _columns(part, f"train/{log.key}/").items()
                # A group without a test user has size 0, and may have few training users.
                if contents.sizes.get(slices.group_slice(families[name], group), contents.fewest)
                >= contents.fewest
            }
            if columns:
                lines = [(i, part[["epoch", c]]) for i, c in enumerate(columns.values())]
                image = _line_image(name, f"{log.title} by epoch, {name}", lines)
                legend = [
                    (slices.printable(group), figures.style(i)) for i, group in enumerate(columns)
                ]
                images.append(image._replace(legend=legend))
        sections += [Section(log.title, images=images)] if images else []
    return sections


def _line_image(title: str, alt: str, lines: Sequence[tuple[int, pd.DataFrame]]) -> Image:
    """Lines over the epochs."""
    points = [(number, part.dropna().to_numpy().T) for number, part in lines]
    drawn = [(number, *values) for number, values in points if values.size]
    return Image(title, alt, figures.svg_uri(figures.curves(drawn, "epoch"), alt))


def _grids(runs: Sequence[FinishedRun], contents: Contents) -> list[Section]:
    """Test and validation over the values of a hyperparameter, if a method has several."""
    metric = contents.metric
    worst = {
        slices.statistic_slice(family, "min"): contents.judged(family)
        for family in contents.families
    }
    shown = [slices.OVERALL, *worst]
    found = []
    for run in runs:
        for key, value in run.summary["hparams"].items():
            # The row's name without this value.
            method = run.name.replace(names.setting_text(key, format_value(value)), key, 1)
            for part in ("val", "test"):
                means = run.summary[part][metric]
                for name in shown:
                    judged = worst.get(name, [])
                    judged = contents.validated(judged) if part == "val" else judged
                    mean = rows.worst_mean(means, judged) if name in worst else means[name]
                    found.append((method, key, value, part, name, mean))
    columns = ["method", "key", "value", "part", "slice", "figure"]
    table = pd.DataFrame(found, columns=columns)
    table["figure"] = table["figure"].astype(float)
    images = []
    for (row, hparam), of_key in table.groupby(["method", "key"], sort=False):
        if of_key["value"].nunique() < 2:
            continue
        means = of_key.groupby(["slice", "part", "value"])["figure"].mean()
        lines: list[tuple[int, np.ndarray, np.ndarray]] = []
        legend: list[tuple[str, figures.Style]] = []
        for name in shown:
            for split in ("val", "test"):
                line = means[name, split].sort_index()
                label = f"{slices.full_label(name)}, {'validation' if split == 'val' else 'test'}"
                legend.append((label, figures.style(len(legend))))
                lines.append((len(lines), line.index.to_numpy(float), line.to_numpy()))
        is_log = of_key["value"].max() > 20 * of_key["value"].min() > 0
        alt = f"{metric} over the values of {hparam}, {row}"
        figure = figures.curves(lines, str(hparam), is_log=is_log, marked=True)
        images.append(Image(str(row), alt, figures.svg_uri(figure, alt), legend))
    return [Section("Hyperparameters", images=images)] if images else []


def _tests(contents: Contents) -> list[Section]:
    """Every test: against the reference, and of each subject against the baselines."""
    found = []
    if len(contents.tests):
        found.append((f"Every test against {contents.reference}", contents.tests))
    for subject, tests in contents.baseline_tests.items():
        if len(tests):
            found.append((f"{subject} minus each baseline", tests))
    sections = []
    for heading, tests in found:
        tests = tests[[slices.is_shown(name, contents.families) for name in tests["slice"]]]
        lines = [
            Line(
                [
                    Cell(f"{row['name']}, {slices.full_label(row['slice'])}"),
                    Cell(f"{row['users']:,}"),
                    Cell(verdict.signed(row["difference"]), star=row["star"]),
                    Cell(verdict.interval(row)),
                    *(Cell("-" if np.isnan(row[key]) else f"{row[key]:.2g}") for key in ("p", "q")),
                ]
            )
            for row in records(tests.head(_TESTS))
        ]
        notes = []
        if len(tests) > _TESTS:
            notes.append(
                f"These are the first {_TESTS} of {len(tests):,} tests. Name a --family for the "
                "others."
            )
        header = ["", "users", "difference", "95 % interval", "p", "q"]
        sections.append(Section(heading, notes, Table(heading, header, lines)))
    return sections


def _over_seeds(contents: Contents) -> list[Section]:
    """The differences from the reference over seeds, by family."""
    sections = []
    for family in contents.families:
        table = contents.seed_table(family)
        if table.empty:
            continue
        lines = [
            Line(
                [
                    Cell(f"{row['name']}, {slices.full_label(row['slice'])}"),
                    Cell(f"{row['seeds']}"),
                    Cell(verdict.over_seeds(row["difference"], row["half"])),
                ]
            )
            for row in records(table.sort_values("name", kind="stable"))
        ]
        heading = (
            f"Difference from {contents.reference} over seeds, by {slices.family_label(family)}"
        )
        notes = [
            f"{contents.metric} minus that of {contents.reference} with the same seed: the mean "
            "over seeds, and the half-width of its 95 % interval (t distribution).",
            *text.SEEDS_AND_USERS,
        ]
        header = ["", "seeds", "difference ± half-width of the interval"]
        sections.append(Section(heading, notes, Table(heading, header, lines)))
    return sections


def _recommended(contents: Contents) -> list[Section]:
    """What the lists show, of all users and of each group."""
    k = parse_metric(contents.metric)[1]
    table = rows.recommended(contents.rows, k, contents.families)
    if table.empty:
        return []
    lines = [
        Line(
            [
                Cell(f"{record['name']}, {slices.full_label(record['slice'])}"),
                *(Cell(text.list_figure(record[figure])) for figure in LIST_FIGURES),
            ]
        )
        for record in records(table)
        if not contents.is_hidden(record["slice"])
    ]
    heading = f"What the first {k} items show"
    notes = [f"{name}: {meaning}." for name, meaning in LIST_FIGURES.items()]
    header = ["", *(name.replace("_", " ") for name in LIST_FIGURES)]
    return [Section(heading, notes, Table(heading, header, lines))]


def _times(runs: Sequence[FinishedRun]) -> list[Section]:
    if not runs:
        return []
    lines = []
    for run in runs:
        train = run.summary["train"]
        best = run.summary.get("best")
        rate = train["targets_per_second"]
        cells = [
            f"{run.name}, {run.summary['run']}",
            run.summary["status"],
            f"{train['steps']:,}",
            "-" if best is None else str(best["epoch"]),
            f"{train['seconds']:,.0f}",
            "-" if rate is None else f"{rate:,.0f}",
        ]
        lines.append(Line([Cell(cell) for cell in cells]))
    header = ["", "status", "steps", "best epoch", "seconds", "targets/s"]
    note = "Seconds of training steps, without compilation. Runs of one command are timed together."
    return [Section("Time", [note], Table("Time", header, lines))]


def _definitions(contents: Contents) -> list[tuple[str, str]]:
    """The words of the page and what they mean."""
    k = parse_metric(contents.metric)[1]
    reference = contents.reference or "the reference"
    hidden = (
        "hidden",
        f"The figures of groups with fewer than {contents.fewest} users are left out of this page, "
        "since they may show what a single user did. --show_small_groups shows them.",
    )
    return [
        *((f"{kind}@{k}", describe_metric(f"{kind}@{k}")) for kind in KINDS),
        *([hidden] if contents.fewest else []),
        (
            "repeat, new",
            "Targets that are in the user's history, and those that are not.",
        ),
        (
            "worst",
            f"The lowest mean of a family's groups with at least {contents.min_users} test users "
            "(select.min_users).",
        ),
        (rows.VALIDATION, _sentence(text.VALIDATION_MEANING)),
        (
            "±",
            "Half of the 95 % interval of a mean over seeds (t distribution). It covers other "
            "seeds, not other users. Of a difference it is over the seeds that both sides have.",
        ),
        (
            "range below a figure",
            "The 95 % interval of a row's mean over users (t distribution), for rows of one seed, "
            "lists and baselines. It says what to expect of the same model or lists for other "
            f"users. There is none (too few hits) if fewer than {FEWEST_VALUES} users of the group "
            "have a value above 0.",
        ),
        (
            "95 % interval",
            "Of a difference: that of the paired t-test over users. There is none if fewer than "
            f"{FEWEST_VALUES} users differ. It covers other users, not other seeds: with several "
            "seeds, a user's value is its mean over the seeds that both sides have. Of the worst "
            "group against the other judged groups: Welch's t, widened for the choice among the "
            "groups (Bonferroni).",
        ),
        (
            "p, q",
            "p is of a two-sided paired t-test over users. q is p after Benjamini and Hochberg, "
            "over all rows and groups that are tested, apart for methods and for baselines. If the "
            f"trained models are taken as they are, {LEVEL:.0%} or fewer of the tests with q < "
            f"{LEVEL:g} are expected to be false on average. Models of other seeds may differ.",
        ),
        ("*", f"The difference from {reference} has q < {LEVEL:g}."),
        (
            "bold, underlined",
            "The best and the second best row of a column, baselines included, as printed.",
        ),
        (
            "[brackets]",
            "Baselines without training: the most popular items; what most often followed the last "
            "item (Markov); the user's own last items; these two in turns; what was near the "
            "history's items (neighbours); a linear model (EASE). Validation chooses the numbers "
            "of the last two.",
        ),
        (
            "best worst group",
            "A row of the epoch whose worst group was best in validation. The other row is of the "
            "epoch that was best overall.",
        ),
    ]


def _settings(runs: Sequence[FinishedRun]) -> list[tuple[str, str]]:
    """Each work directory once, with its `config.json` and `env.json` as text."""
    folders = [folder for run in runs for folder in run.named]
    unique = {folder.resolve(): folder for folder in folders}.values()
    parts: dict[str, Any] = {"config": workdir.CONFIG, "env": workdir.ENVIRONMENT}
    return [
        (
            slices.printable(str(folder)),
            json.dumps({key: workdir.read_json(folder / name) for key, name in parts.items()},
                       indent=1, ensure_ascii=False),
        )
        for folder in unique
    ]  # fmt: skip
