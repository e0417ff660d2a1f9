import base64
import html
import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from runs import means_of, small
from scipy import stats

from seqfair_jax import workdir
from seqfair_jax.api import compare
from seqfair_jax.commands import report as command
from seqfair_jax.config import default_config
from seqfair_jax.data.groups import GroupFamily, encode_name
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation import slices
from seqfair_jax.evaluation.metrics import LIST_FIGURES
from seqfair_jax.objectives import METHODS
from seqfair_jax.report import contents, figures, files, names, rows, runs, text
from seqfair_jax.report import html as html_report
from seqfair_jax.run import run

USERS = 24
NDCG = "NDCG@20"
AWKWARD = (
    "<b>VIP</b>",
    "<script>",
    "vip",
    "$a_b$",
    "a^2",
    "😀",
    "_other",
    "$5",
    "a$b$c",
    "tab\there\x07",
    "10% | *x*",
    "日本",
)


def write_run(
    folder,
    method="erm",
    *,
    families=None,
    loss_family="pop33",
    hparams=None,
    seed=0,
    shift=0.0,
    status="finished",
    epochs=(2, 2),
    min_users=1,
):
    """A finished work directory without training: users' NDCG@20 rise from shift to 0.9 + shift.

    Users take the groups of a family in turn. `epochs` are the best by each rule of selection.
    """
    hparams = dict.fromkeys(METHODS[method].reads, 0.5) | (hparams or {})
    families = families or {"pop33": ("niche", "popular")}
    users = np.arange(USERS)
    repeat = users % 3 == 0
    values = {NDCG: np.linspace(0, 0.9, USERS) + shift}
    built = [
        GroupFamily(name, groups, users[:, None] % len(groups) == np.arange(len(groups)))
        for name, groups in families.items()
    ]
    means = means_of(values, built, repeat)
    baseline = means_of({NDCG: np.full(USERS, 0.125)}, built, repeat)
    table = pd.DataFrame(
        {
            "user_id": users,
            "target_item_id": users,
            "repeat": repeat,
            "rank": 1,
            **values,
            **{family.name: family.labels() for family in built},
        }
    )
    summary = {
        "schema_version": workdir.SCHEMA_VERSION,
        "dataset": {
            "name": "by hand", "log_hash": "abc", "users": USERS, "items": 30,
            "interactions": 1234, "train_interactions": 1000,
        },
        "method": method,
        "group_family": loss_family,
        "needs_groups": METHODS[method].needs_groups,
        "label": METHODS[method].label,
        "logs": [log._asdict() for log in METHODS[method].logs],
        "baselines": {"most_popular": baseline},
        "run": f"seed={seed}",
        "hparams": hparams,
        "seed": seed,
        "status": status,
        "train": {"steps": 10, "seconds": 2.0, "targets_per_second": None},
    }  # fmt: skip
    if status == "finished":
        for epoch, suffix in zip(epochs, ("", "_worst_group"), strict=True):
            best = {"epoch": epoch, "overall": 0.5, "worst_group": 0.4}
            summary |= {f"best{suffix}": best, f"val{suffix}": means, f"test{suffix}": means}
            workdir.write_parquet(workdir.per_user(folder, suffix), table)
        of_baseline = table[["user_id"]].assign(**{NDCG: 0.125}, baseline="most_popular")
        workdir.write_parquet(folder / workdir.BASELINES, of_baseline)
    first = next(iter(families.values()))
    folder.mkdir(exist_ok=True)
    for epoch in (1, 2):
        row = {f"val/{NDCG}/{name}": value for name, value in means[NDCG].items()}
        for log in METHODS[method].logs:
            row |= {f"train/{log.key}/{group}": epoch / 10 for group in first}
        workdir.append_line(folder / workdir.METRICS, json.dumps({"epoch": epoch, **row}))
    config = {
        "objective": {"name": method, "group_family": loss_family},
        "seeds": [seed],
        "select": {"min_users": min_users},
    }
    workdir.write_json(folder / workdir.CONFIG, config)
    workdir.write_json(folder / workdir.ENVIRONMENT, {"jax": "0"})
    workdir.write_json(folder / workdir.SUMMARY, summary)
    workdir.finish(folder, {})
    return folder


class Page(HTMLParser):
    """What a browser would see: the tags, the tables' rows of texts, images and headings."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.images, self.settings = [], [], {}, {}
        self.legend, self.items, self.summaries = [], [], []
        self.intervals = []  # the tables again: of each cell the interval over users, or ""
        self._text, self._interval, self._in_interval = "", "", False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "table":
            self.tables.append([])
            self.intervals.append([])
        elif tag == "tr":
            self.tables[-1].append([])
            self.intervals[-1].append([])
        elif tag == "span" and ("class", "interval") in attributes:
            self._in_interval = True
        elif tag == "img":
            found = dict(attributes)
            self.images[found["alt"]] = base64.b64decode(found["src"].partition("base64,")[2])
        if tag in ("td", "th", "summary", "pre", "li"):
            self._text = self._interval = ""

    def handle_endtag(self, tag):
        if tag in ("td", "th"):
            self.tables[-1][-1].append(self._text.rstrip())
            self.intervals[-1][-1].append(self._interval)
        elif tag == "span":
            self._in_interval = False
        elif tag == "summary":
            self._folder = self._text
            self.summaries.append(self._text)
        elif tag == "li" and "svg" in self.tags and self.tags[-1] == "line":
            self.legend.append(self._text.strip())
        elif tag == "li":
            self.items.append(self._text)
        elif tag == "pre":
            assert self._folder not in self.settings
            self.settings[self._folder] = json.loads(self._text)

    def handle_data(self, data):
        if self._in_interval:
            self._interval += data
        else:
            self._text += data

    def cell(self, table, row, column):
        return self._at(self.tables, table, row, column)

    def interval(self, table, row, column):
        return self._at(self.intervals, table, row, column)

    def _at(self, found, table, row, column):
        header, *rows = self.tables[table]
        [place] = [i for i, cells in enumerate(rows, start=1) if cells[0] == row]
        return found[table][place][header.index(column)]

    def svg_texts(self, alt):
        svg = self.images[alt].decode()
        return [html.unescape(found) for found in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


def compare_folders(folders, baseline, metric):
    """The tests of the runs; those of the baselines are left out."""
    tests = contents.build(runs.read_runs([baseline, *folders]), metric, baseline=baseline).tests
    return tests[tests["kind"] == rows.RUN]


def write_page(folders, path, **options):
    found = runs.read_runs(folders)
    html_report.write(found, contents.build(found, NDCG, **options), path)
    return Page(path)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(small(), folder / "erm")
    run(small("cvar", **{"objective.alpha": (0.2, 0.5)}), folder / "cvar")
    run(small("gdro"), folder / "gdro")
    return [folder / name for name in ("erm", "cvar", "gdro")]


def test_the_report_of_real_runs(folders, tmp_path):
    path = tmp_path / "new" / "report.html"
    page = write_page(folders, path, baseline=folders[0])
    source = path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", source)
    gdro = workdir.read_summary(folders[2])["test"][NDCG]
    row = "GDRO (pop33, step_size 0.01)"
    for table, column, name in (
        (0, "overall", "overall"),
        (0, "niche", "pop33=niche"),
        (0, "worst", "pop33/min"),
        (0, "repeat", "target=repeat"),
        (1, "long", "seq33=long"),
    ):
        assert page.cell(table, row, column).strip("*") == f"{gdro[name]:.4f}"
    headings = list(map(html.unescape, re.findall(r"<h2>(.*)</h2>", source)))
    logs = [log.title for name in ("cvar", "gdro") for log in METHODS[name].logs]
    assert headings == [
        "Verdict", f"{NDCG} by pop33", f"{NDCG} by seq33", f"{NDCG} with its interval over users",
        "Difference from ERM by group",
        "Training", *logs, "Hyperparameters", "Details",
    ]  # fmt: skip
    assert list(page.settings) == list(map(str, folders))
    assert page.settings[str(folders[2])]["config"]["objective"]["name"] == "gdro"
    again = tmp_path / "again.html"
    write_page(folders, again)  # ERM is the reference without a word
    assert again.read_text() == source
    write_page(folders, path, family="pop33")
    assert "seq33=" not in path.read_text()


def test_the_command_prints_the_tables_and_the_tests(folders, tmp_path, capsys):
    out = tmp_path / "report.html"
    arguments = [str(folder) for folder in folders]
    command.main([*arguments, "--family=seq33", f"--baseline={folders[0]}", f"--out={out}"])
    printed = capsys.readouterr().out
    assert "Verdict by seq33:\n- With ERM, group " in printed
    assert "\nsynthetic, NDCG@20 on the test targets, seq33\n" in printed
    sizes = next(line for line in printed.splitlines() if line.startswith("test users"))
    assert sum(map(int, sizes.split()[2:5])) == int(sizes.split()[5]) > 100
    tests = printed.split("NDCG@20 against ERM: paired t-test")[1]
    assert "seq33=short" in tests
    assert "[" not in tests  # the tests of the baselines are in the HTML report
    assert "\nThe tests of the baselines are in the HTML report (`seqfair report DIR" in tests
    assert "pop33=" not in printed
    assert printed.endswith(f"report: {out}\n")
    assert list(Page(out).settings) == arguments  # the baseline is also among the folders


def test_a_comparison_with_a_baseline(tmp_path):
    erm = write_run(tmp_path / "erm")
    cvar = write_run(tmp_path / "cvar", "cvar", shift=0.05)
    rows = compare_folders([cvar], erm, NDCG).set_index(["name", "slice"])
    row = rows.loc["CVaR (alpha 0.5)", "pop33=niche"]
    assert row[["users", "star"]].tolist() == [USERS / 2, True]
    assert row[["difference", "low", "high"]].tolist() == pytest.approx([0.05] * 3)
    same = tmp_path / "cvar" / ".." / "erm"
    page = write_page([erm, cvar, same], tmp_path / "report.html", baseline=erm)
    assert list(page.settings) == [str(same), str(cvar)]
    assert page.cell(0, "CVaR (alpha 0.5)", "niche") == f"{row['mean']:.4f}*"
    assert page.cell(0, "test users", "niche") == "12"
    assert page.cell(1, "CVaR (alpha 0.5), pop33=niche", "difference") == "+0.0500*"
    assert page.cell(1, "CVaR (alpha 0.5), target=new", "users") == "16"
    both = [write_run(tmp_path / f"alpha{x}", "cvar", hparams={"alpha": x}) for x in (0.2, 0.4)]
    grid = tmp_path / "grid"
    for folder, name in zip(both, ("a", "b"), strict=True):
        shutil.copytree(folder, grid / "runs" / name)
    workdir.write_json(
        grid / workdir.SUMMARY,
        {"schema_version": workdir.SCHEMA_VERSION, "runs": [{"run": "a"}, {"run": "b"}]},
    )
    workdir.finish(grid, {})
    with pytest.raises(UserError, match=r"several methods: CVaR \(alpha 0.2\), CVaR \(alpha 0.4\)"):
        compare_folders([erm], grid, NDCG)
    with pytest.raises(UserError, match="no other method that succeeded"):
        compare_folders([erm], erm, NDCG)
    # A grid and a run of it: the run is the baseline, the others are compared with it.
    rows = compare_folders([grid], grid / "runs" / "b", NDCG)
    assert set(rows["name"]) == {"CVaR (alpha 0.2)"}


def test_stars_are_by_q_and_baselines_may_be_best(tmp_path):
    erm = write_run(tmp_path / "erm", shift=-0.45)  # mean 0, below the baseline's 0.125
    cvar = write_run(tmp_path / "cvar", "cvar", shift=-0.35)
    page = write_page([erm, cvar], tmp_path / "report.html")
    table = (tmp_path / "report.html").read_text().partition("</table>")[0]
    marks = re.findall(r'<span class="(\w+)">(-?0\.\d{4})</span>(\*?)', table)
    assert ("best", "0.1250", "") in marks  # markov's, whose difference from ERM may be by chance
    assert ("second", "0.1000", "*") in marks
    assert page.cell(0, "CVaR (alpha 0.5)", "overall") == "0.1000*"
    found = contents.build(runs.read_runs([erm, cvar]), NDCG)
    tests = found.tests
    assert (tests["star"] == (tests["q"] < 0.05)).all()


def test_one_row_where_both_rules_chose_the_same_epoch(tmp_path):
    one = [write_run(tmp_path / f"erm{i}", seed=i, epochs=(i + 1, i + 1)) for i in (0, 1)]
    two = [write_run(tmp_path / f"cvar{i}", "cvar", seed=i, epochs=(1, 1 + i), shift=0.1)
           for i in (0, 1)]  # fmt: skip
    made = contents.build(runs.read_runs([*one, *two]), NDCG)
    assert [(row.name, row.is_both) for row in made.rows] == [
        ("ERM", True),
        ("CVaR (alpha 0.5)", False),
        ("CVaR (alpha 0.5), best worst group", False),  # the epochs of seed 1 differ
        ("[most_popular]", False),
    ]
    assert set(made.tests["name"][made.tests["kind"] == rows.RUN]) == {
        "CVaR (alpha 0.5)", "CVaR (alpha 0.5), best worst group",
    }  # fmt: skip
    printed = text.tables([*one, *two], NDCG)
    assert printed.endswith(
        "the epoch that is best overall is also the best for the worst group, so one row has both: "
        "ERM"
    )


def test_a_baseline_above_the_trained_rows_is_told(tmp_path):
    families = {"pop33": ("niche", "popular"), "seq33": ("short", "medium", "long")}
    erm = write_run(tmp_path / "erm", families=families)
    told = "[most_popular], which is not trained, is above"
    assert told not in text.tables([erm], NDCG)
    low = write_run(tmp_path / "low", families=families, shift=-0.32)  # 0.13 overall
    assert told not in text.tables([low], NDCG)
    # Means of 0.1104 niche, 0.1496 popular, and 0.0909, 0.13, 0.1691 from short to long.
    lower = write_run(tmp_path / "lower", families=families, shift=-0.33, epochs=(1, 1))
    assert (
        f"\n\n{told} ERM for all users and in 3 of 5 groups. Train longer, or start from "
        "--config=own_log:model=best, or look for settings with `seqfair search`.\n\n"
        "NDCG@20 with one target: 1 / log2(1 + rank) within the first 20, else 0.\n"
    ) in text.tables([lower], NDCG)
    cvar = write_run(tmp_path / "cvar", "cvar", families=families, shift=-0.4, epochs=(1, 1))
    assert f"{told} ERM, the best of the 2 trained rows, for all users and in 3 of 5 groups." in (
        text.tables([cvar, lower], NDCG)
    )
    assert told not in text.tables([cvar, erm], NDCG)


def test_group_sizes_and_groups_that_are_too_small(tmp_path):
    # 24 users in turn: five in each of the first four groups, four in the last.
    given = {"tier": tuple("abcde")}
    erm = write_run(tmp_path / "erm", families=given, min_users=5)
    page = write_page([erm], tmp_path / "report.html")
    assert page.tables[0][1] == ["test users", "5", "5", "5", "5", "4 too few", "24", "", "8", "16",
                                 ""]  # fmt: skip
    printed = text.tables([erm], NDCG)
    sizes = next(line for line in printed.splitlines() if line.startswith("test users"))
    assert sizes.split() == ["test", "users", "5", "5", "5", "5", "4", "24", "8", "16"]
    assert "worst ignores groups with fewer than 5 test users: e (4)" in printed
    values = np.linspace(0, 0.9, USERS)
    means = [values[i::5].mean() for i in range(5)]
    assert page.cell(0, "ERM", "worst") == f"{min(means[:4]):.4f}"


def of_countries(tmp_path, number):
    """Contents of ERM and CVaR by so many countries, whose sizes are drawn, and the countries."""
    names = tuple(f"c{i:02}" for i in range(number))
    folders = [
        write_run(tmp_path / "erm", families={"country": names}, loss_family="country"),
        write_run(tmp_path / "cvar", "cvar", families={"country": names}, shift=0.01),
    ]
    found = contents.build(runs.read_runs(folders), NDCG)
    drawn = np.random.default_rng(0).permutation(number).tolist()
    sizes = {f"country={name}": size for name, size in zip(names, drawn, strict=True)}
    return found._replace(sizes=found.sizes | sizes, min_users=10), list(sizes)


def line_of(printed, start):
    return next(line for line in printed.splitlines() if line.strip().startswith(start))


def words_of(printed, start):
    return line_of(printed, start).split()


def test_text_shows_some_of_many_groups(tmp_path):
    found, countries = of_countries(tmp_path, 23)
    means, sizes = found.rows[0].means[0], found.sizes
    lowest = sorted((c for c in countries if sizes[c] >= 10), key=means.get)[:6]
    others = sorted((c for c in countries if c not in lowest), key=sizes.get, reverse=True)[:6]
    wanted = [c for c in countries if c in lowest or c in others]
    assert text.shown_groups(found, "country") == wanted
    assert wanted not in (countries[:12], countries[-12:])

    labels = [name.removeprefix("country=") for name in wanted]
    printed = text.contents_tables(found)
    assert words_of(printed, labels[0])[:13] == [*labels, "overall"]
    assert words_of(printed, "test users")[2:14] == [str(sizes[name]) for name in wanted]
    assert words_of(printed, "ERM")[1:13] == [f"{means[name]:.4f}" for name in wanted]
    told = (
        "12 of the 23 groups are shown: at most 6 that are judged, those with the lowest NDCG@20 "
        "of ERM, and the largest of the others. All are in the file of "
    )
    assert line_of(printed, "12 of").startswith(told)
    assert line_of(printed, "worst ignores groups").endswith(" and 4 more")

    # A group with a star is in the tests, whether a table shows it or not.
    hidden = [name for name in countries if name not in wanted]
    tests = found.tests.assign(star=found.tests["slice"] == hidden[0])
    printed = text.comparison(found._replace(tests=tests))
    for name in countries:
        assert (f" {name} " in printed) == (name in [*wanted, hidden[0]])
    assert printed.count(hidden[0]) == 1
    assert "Groups that the tables do not show are here if q < 0.05." in printed
    shown = {f"{figure}@20": dict.fromkeys([*countries, "overall"], 0.5) for figure in LIST_FIGURES}
    with_lists = found._replace(rows=[found.rows[0]._replace(recommended=(shown,))])
    lines = text.recommended(with_lists).splitlines()[2 : 3 + len(wanted)]
    assert [line.split()[1] for line in lines] == ["overall", *wanted]
    assert set(countries) <= set(files.long_table(found)["family"] + "="
                                 + files.long_table(found)["group"])  # fmt: skip


def test_text_shows_the_largest_groups_if_none_is_judged(tmp_path):
    found, countries = of_countries(tmp_path, 21)
    found = found._replace(min_users=100)
    largest = sorted(countries, key=found.sizes.get, reverse=True)[:12]
    assert text.shown_groups(found, "country") == [c for c in countries if c in largest]
    assert "12 of the 21 groups are shown: the largest. All are" in text.contents_tables(found)


def test_text_shows_all_of_twenty_groups(tmp_path):
    found, countries = of_countries(tmp_path, 20)
    assert text.shown_groups(found, "country") == countries
    assert "are shown" not in text.contents_tables(found)
    assert "do not show" not in text.comparison(found)


def test_the_row_by_which_groups_are_in_order_is_no_baseline(tmp_path):
    names = tuple("abc")
    given = {"families": {"country": names}, "loss_family": "country"}
    folder = write_run(tmp_path / "cvar", "cvar", **given)
    found = contents.build(runs.read_runs([folder]), NDCG)
    assert found.reference == "[most_popular]"
    assert found.ordering_row.name == found.rows[0].name
    assert found.worst_first("country") == ["country=a", "country=b", "country=c"]


def test_the_groups_in_order_are_by_the_mean_over_seeds(tmp_path):
    given = {"families": {"country": tuple("abc")}, "loss_family": "country"}
    folders = [write_run(tmp_path / f"{s}", seed=s, **given) for s in (0, 1)]
    found = contents.build(runs.read_runs(folders), NDCG)
    seeds = [dict(zip(("country=a", "country=b", "country=c"), of, strict=True))
             for of in ((0.1, 0.3, 0.2), (0.4, 0.1, 0.1))]  # fmt: skip
    changed = [row._replace(means=tuple(seeds)) for row in found.rows]
    assert found._replace(rows=changed).worst_first("country") == [
        "country=c", "country=b", "country=a"
    ]  # fmt: skip


def test_figures_of_groups_of_few_users_are_hidden(tmp_path, capsys):
    given = {"tier": tuple("abcde")}  # e has four users
    rng = np.random.default_rng(0)
    folders = []
    for name in ("erm", "gdro"):
        folder = write_run(tmp_path / name, name, families=given, loss_family="tier", min_users=1)
        path = workdir.per_user(folder, "")
        table = pd.read_parquet(path)
        table[NDCG] += rng.normal(0, 0.2, USERS)
        table.to_parquet(path)
        summary = workdir.read_summary(folder)
        summary["test"][NDCG]["tier=e"] = summary["val"][NDCG]["tier=e"] = rng.uniform(0, 0.1)
        summary["validation_sizes"] = dict.fromkeys(["tier=a", "tier=b", "tier=c"], 5)
        summary["validation_sizes"] |= {"tier=d": 4, "tier=e": 9}
        summary["recommended"] = {
            f"{figure}@20": {f"tier={tier}": rng.random() for tier in "abcde"}
            for figure in rows.LIST_FIGURES
        }
        for of in summary["recommended"].values():
            of["overall"] = 0.5
        workdir.write_json(folder / workdir.SUMMARY, summary)
        workdir.finish(folder, {})
        folders.append(folder)

    def figures_of(made, names):
        """The figures of slices, as the page would show them."""
        found = []
        for row in made.rows:
            found += [seed.get(name) for seed in row.means for name in names]
            found += [of.get(name) for seed in row.recommended for of in seed.values()
                      for name in names]  # fmt: skip
        for table in (made.tests, *made.baseline_tests.values(), made.intervals):
            columns = [c for c in ("mean", "difference", "low", "high") if c in table]
            found += abs(table.loc[table["slice"].isin(names), columns]).to_numpy().ravel().tolist()
        return {f"{x:.4f}" for x in found if x is not None and x == x}

    made = contents.build(runs.read_runs(folders), NDCG)
    others = figures_of(made, [name for name in made.sizes if name != "tier=e"])
    secret = figures_of(made, ["tier=e"]) - others
    assert len(secret) > 12
    kept = made._replace(over_seeds=made.intervals).published()  # one seed has no such differences
    for table in (kept.tests, kept.over_seeds, kept.intervals, *kept.baseline_tests.values()):
        assert "tier=a" in set(table["slice"])
        assert "tier=e" not in set(table["slice"])
    out = tmp_path / "report.html"
    command.main([*map(str, folders), f"--out={out}"])
    printed = capsys.readouterr().out
    page = Page(out)
    seen = re.sub('base64,[^"]*', "", out.read_text())
    assert not [figure for figure in secret if figure in seen]
    assert page.cell(0, "ERM", "e") == "hidden"
    assert page.tables[0][1][5] == "4 hidden: fewer than 5 users"
    worst = min(made.rows[0].means[0][f"tier={tier}"] for tier in "abcd")
    assert page.cell(0, "ERM", "worst") == f"{worst:.4f}"
    assert "worst ignores groups with fewer than 5 test users: e (4)" in seen.lower()
    drawn = {alt.rpartition(", ")[2] for alt in page.images if alt.startswith("validation")}
    assert drawn == {"overall", "a", "b", "c"}  # d has four validation users
    assert "e" not in page.legend  # of the groups' weights
    assert not [name for alt in page.images for name in page.svg_texts(alt) if name == "e (4)"]
    # The terminal and the flag show them.
    assert f"{made.rows[0].means[0]['tier=e']:.4f}" in printed
    command.main([*map(str, folders), f"--out={out}", "--show_small_groups"])
    page = Page(out)
    assert "e" in page.legend
    assert page.cell(0, "ERM", "e") == f"{made.rows[0].means[0]['tier=e']:.4f}"
    shown = out.read_text()
    assert "hidden: fewer" not in shown
    assert sum(figure in shown for figure in secret) > len(secret) / 2
    compare(folders).report(out)
    assert Page(out).cell(0, "ERM", "e") == "hidden"
    compare(folders).report(out, show_small_groups=True)
    assert Page(out).cell(0, "ERM", "e") != "hidden"


def test_a_mean_has_its_interval_over_users(tmp_path):
    def few(folder, users):  # as many users of each group have a hit
        made = write_run(folder, families={"tier": ("a", "b")}, shift=0.1)
        path = workdir.per_user(made, "")
        table = pd.read_parquet(path)
        table.loc[table.index >= 2 * users, NDCG] = 0.0
        table.to_parquet(path)
        workdir.finish(made, {})
        return made, table

    one, table = few(tmp_path / "erm", 10)
    page = write_page([one], tmp_path / "report.html")
    for group in ("a", "b"):
        values = table[NDCG][table["tier"] == group].to_numpy()
        half = stats.t.ppf(0.975, 11) * values.std(ddof=1) / 12**0.5
        expected = f"{values.mean() - half:.4f} to {values.mean() + half:.4f}"
        assert page.interval(0, "ERM", group) == expected
    assert page.interval(0, "[most_popular]", "a") == "0.1250 to 0.1250"
    assert page.interval(0, "ERM", "worst") == ""  # the lowest of several is no mean of users
    page = write_page([few(tmp_path / "few", 9)[0]], tmp_path / "report.html")
    assert page.interval(0, "ERM", "a") == "too few hits"
    assert page.interval(0, "ERM", "overall") != "too few hits"
    # A mean over seeds has ± instead, and Python has both intervals.
    seeds = [write_run(tmp_path / f"seed{i}", seed=i, shift=i / 10) for i in (0, 1)]
    page = write_page(seeds, tmp_path / "report.html")
    assert page.interval(0, "ERM, 2 seeds", "niche") == ""
    assert "±" in page.cell(0, "ERM, 2 seeds", "niche")
    frame = compare(seeds).table().set_index(["name", "slice"])
    row = frame.loc[("ERM", "pop33=niche")]
    values = np.linspace(0, 0.9, USERS)[::2] + 0.05
    half = stats.t.ppf(0.975, 11) * values.std(ddof=1) / 12**0.5
    assert row[["mean", "low", "high"]].tolist() == pytest.approx(
        [values.mean(), values.mean() - half, values.mean() + half]
    )
    assert row["half"] == pytest.approx(stats.t.ppf(0.975, 1) * 0.05)


def test_the_tests_have_the_order_of_the_tables(tmp_path):
    given = {"tier": ("young", "old", "middle")}
    erm = write_run(tmp_path / "erm", families=given)
    cvar = write_run(tmp_path / "cvar", "cvar", families=given, shift=0.1)
    found = contents.build(runs.read_runs([erm, cvar]), NDCG)
    tested = list(found.tests["slice"][found.tests["name"] == "CVaR (alpha 0.5)"])
    groups = ["tier=young", "tier=old", "tier=middle"]
    assert tested == [name for name in found.sizes if name in tested]
    assert [name for name in tested if name in groups] == groups
    assert set(tested) == {*groups, slices.OVERALL, slices.REPEAT, slices.NEW}


def test_tables_have_the_validation_score(tmp_path):
    given = {"tier": ("test", "validation")}  # a group of that name is told by its family
    folders = [write_run(tmp_path / str(seed), families=given, seed=seed) for seed in (0, 1)]
    gdro = write_run(tmp_path / "gdro", "gdro", families=given, loss_family="tier", shift=0.1)
    for folder, score in zip([*folders, gdro], (0.25, 0.35, 0.45), strict=True):
        summary = workdir.read_json(folder / workdir.SUMMARY)
        for suffix in ("", "_worst_group"):
            summary[f"val{suffix}"] = {NDCG: summary[f"val{suffix}"][NDCG] | {"overall": score}}
        workdir.write_json(folder / workdir.SUMMARY, summary)
        workdir.finish(folder, {})
    numbers = contents.build(runs.read_runs([*folders, gdro]), NDCG).table("tier")
    assert numbers["validation"].tolist()[:2] == [pytest.approx(0.3), 0.45]
    assert numbers["validation"].isna().tolist() == [False, False, True]  # a baseline has none
    assert numbers["validation ±"][0] == pytest.approx(12.706 * 0.05, rel=1e-3)
    page = write_page([*folders, gdro], tmp_path / "report.html")
    header = ["", "test", "tier=validation", "overall", "worst", "repeat", "new", "validation"]
    assert page.tables[0][0] == header
    assert page.cell(0, "ERM, 2 seeds", "validation").startswith("0.3000")
    printed = text.tables([*folders, gdro], NDCG).splitlines()
    assert printed[1].split() == header[1:]
    assert next(line for line in printed if line.startswith("GDRO")).split()[-1] == "0.4500"


def test_a_folder_without_a_finished_run_is_left_out(tmp_path, capsys):
    erm, cvar = write_run(tmp_path / "erm"), write_run(tmp_path / "cvar", "cvar")
    (cvar / "finished.json").unlink()
    (tmp_path / "report.html").write_text("")
    command.main([str(path) for path in sorted(tmp_path.iterdir())])
    printed, warned = capsys.readouterr()
    assert warned.splitlines() == [
        f"WARNING: {path} is left out: it has no finished run"
        for path in (cvar, tmp_path / "report.html")
    ]
    assert "\nERM " in printed
    assert "cvar" not in printed
    with pytest.raises(SystemExit, match="1"):
        command.main([str(cvar)])
    assert capsys.readouterr().err.endswith(
        f"error: no run has finished in {cvar}; run the training command again\n"
    )
    with pytest.raises(SystemExit, match="1"):
        command.main([str(erm), str(tmp_path / "nowhere")])
    assert "nowhere does not exist" in capsys.readouterr().err


def test_the_forest_plot_has_the_figures_of_the_tests(tmp_path):
    given = {"tier": ("$a_b$", "b")}
    folders = [
        write_run(tmp_path / "erm", families=given),
        write_run(tmp_path / "cvar", "cvar", families=given, shift=0.1),
        write_run(tmp_path / "chi2", "chi2", families=given, shift=-0.2),
    ]
    found = runs.read_runs(folders)
    made = contents.build(found, NDCG)
    methods = html_report._shown_methods(made)
    assert [row.name for row in methods] == ["ERM", "CVaR (alpha 0.5)", "chi2 (radius 0.5)"]
    drawn = []

    def forest(groups, intervals, *, zero):
        drawn.append((groups, zero, real(groups, intervals, zero=zero)))
        return drawn[-1][-1]

    real = figures.forest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(figures, "forest", forest)
        html_report.write(found, made, tmp_path / "report.html")
    [(groups, _, of_means), (same, _, figure)] = drawn
    assert [zero for _, zero, _ in drawn] == [False, True]
    assert groups == same == ["overall (24)", "$a_b$ (12)", "b (12)"]
    [axes] = of_means.axes
    points = [line.get_xdata()[0] for line in axes.lines]  # there is no line at 0
    segments = [lines.get_segments()[0][:, 0].tolist() for lines in axes.collections]
    known = made.intervals.set_index(["slice", "name"])
    wanted = [(where, row.name) for where in ("overall", "tier=$a_b$", "tier=b") for row in methods]
    means = {row.name: row.means[0] for row in methods}
    assert points == [means[name][where] for where, name in wanted]
    assert segments == [known.loc[key, ["low", "high"]].tolist() for key in wanted]
    [axes] = figure.axes
    points = [line for line in axes.lines if line.get_marker() not in ("", "None", None)]
    segments = [lines.get_segments()[0] for lines in axes.collections]
    tests = made.tests.set_index(["slice", "name"])
    wanted = [
        tests.loc[(where, name)]
        for where in ("overall", "tier=$a_b$", "tier=b")
        for name in ("CVaR (alpha 0.5)", "chi2 (radius 0.5)")
    ]
    assert len(points) == len(segments) == len(wanted) == 6
    for point, segment, test in zip(points, segments, wanted, strict=True):
        assert point.get_xdata()[0] == test["difference"]
        assert segment[:, 0].tolist() == [test["low"], test["high"]]
        assert point.get_ydata()[0] == segment[0, 1] == segment[1, 1]
        assert (point.get_markerfacecolor() == "white") == (not test["star"])
    assert not any(label.get_parse_math() for label in axes.get_yticklabels())
    # From the top down, each inside of its group's block.
    heights = [point.get_ydata()[0] for point in points]
    assert heights == sorted(heights, reverse=True)
    centres = [label.get_position()[1] for label in axes.get_yticklabels()]
    assert np.argsort(np.abs(np.subtract.outer(heights, centres)))[:, 0].tolist() == [
        0, 0, 1, 1, 2, 2,
    ]  # fmt: skip


def test_many_families_and_methods_are_folded(tmp_path):
    given = {f"f{i}": tuple(f"{i}g{j}" for j in range(3)) for i in range(7)}
    folders = [write_run(tmp_path / "erm", families=given, loss_family="f0")]
    folders += [
        write_run(tmp_path / f"{x}", "cvar", families=given, hparams={"alpha": x}, shift=x / 10)
        for x in np.arange(1, 10) / 10
    ]
    page = write_page(folders, tmp_path / "report.html")
    assert "3 more group families: verdict and tables" in page.summaries
    source = (tmp_path / "report.html").read_text()
    # One row of each run is drawn, and of many values the one that is best in validation.
    assert "The figures show at most 8 rows. CVaR (alpha 0.1), " in source
    assert "CVaR (alpha 0.6) and 2 more are only in the tables." in source
    assert set(page.legend) == {"ERM", "CVaR (alpha 0.9)", "overall, validation", "overall, test",
                                *(f"f{i}/worst, {part}" for i in range(4)
                                  for part in ("validation", "test")),
                                *given["f0"]}  # fmt: skip
    assert not any("6g0" in alt for alt in page.images)
    assert page.cell(6, "ERM", "6g0") != "-"
    printed = text.verdict_text(contents.build(runs.read_runs(folders), NDCG))
    assert "Verdict by f3:" in printed
    assert "Verdict by f4:" not in printed
    assert printed.endswith("The verdict on 3 more families is in the HTML report (--out).")


def test_the_page_is_valid_and_can_be_used_with_a_keyboard(folders, tmp_path):
    page = write_page(folders, tmp_path / "report.html")
    source = (tmp_path / "report.html").read_text()
    assert source.startswith("<!doctype html>\n<html lang=")
    identifiers = re.findall(r'\sid="([^"]*)"', source)
    assert len(identifiers) == len(set(identifiers))
    void = {"meta", "img", "line"}
    open_tags = []

    class Nesting(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag not in void:
                open_tags.append(tag)
            if tag == "img":
                assert dict(attributes)["alt"]

        def handle_startendtag(self, tag, attributes):
            pass

        def handle_endtag(self, tag):
            assert open_tags.pop() == tag

    Nesting().feed(source)
    assert open_tags == []
    assert page.tags.count("table") == source.count('tabindex="0" role="region" aria-label=')
    assert "1 / log2(1 + rank)" in source
    assert "7.04 times smaller" in source


def change_config(folder, target, **changes):
    """A run again, as if trained with other settings."""
    shutil.copytree(folder, target)
    config = workdir.read_json(target / workdir.CONFIG)
    workdir.write_json(target / workdir.CONFIG, config | {"train": changes})
    workdir.finish(target, {})
    return target


def test_only_runs_that_differ_in_the_seed_share_a_row(tmp_path):
    parts = [
        change_config(write_run(tmp_path / f"{i}", seed=i, shift=i / 10), tmp_path / f"seed{i}",
                      learning_rate=0.001, segment_seconds=float(i))
        for i in (0, 1)
    ]  # fmt: skip
    fast = change_config(tmp_path / "0", tmp_path / "fast", learning_rate=0.5)
    printed = text.tables([*parts, fast], NDCG)
    lines = [line for line in printed.splitlines() if line.startswith("ERM")]
    assert [re.split(r" +0\.\d{4}", line, maxsplit=1)[0] for line in lines] == [
        "ERM (train.learning_rate 0.001), 2 seeds",
        "ERM (train.learning_rate 0.5)",
    ]
    # A run of an earlier version lacks a setting, which had the default.
    config = workdir.read_json(parts[0] / workdir.CONFIG)
    config["train"] |= {"weight_decay": default_config().train.weight_decay}
    config["data"] = {"encoding": "cp1252"}
    workdir.write_json(parts[0] / workdir.CONFIG, config)
    workdir.finish(parts[0], {})
    assert text.tables([*parts, fast], NDCG) == printed
    # Means 0.45 and 0.55: their mean, and t(0.975, 1) * 0.0707 / sqrt(2) = 12.706 * 0.05.
    assert "0.5000±0.6353" in lines[0]
    with pytest.raises(UserError, match=r"are the same training \(ERM, seed 0\)"):
        text.tables([tmp_path / "0", write_run(tmp_path / "again")], NDCG)
    summary = workdir.read_summary(tmp_path / "again")
    summary["dataset"]["log_hash"] = "def"
    workdir.write_json(tmp_path / "again" / workdir.SUMMARY, summary)
    workdir.finish(tmp_path / "again", {})
    with pytest.raises(UserError, match=r"different logs or splits \(log_hash def and abc\)"):
        text.tables([tmp_path / "0", tmp_path / "again"], NDCG)
    # Another seed of the baseline's method belongs to the baseline.
    with pytest.raises(UserError, match="no other method that succeeded"):
        compare_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "0", NDCG)


def test_rows_with_many_settings_are_named_by_their_folders(tmp_path):
    many = {"batch_size": 64, "learning_rate": 0.5, "weight_decay": 0.1, "clip_norm": 1.0}
    few = {"batch_size": 128, "learning_rate": 0.1, "weight_decay": 0.0, "clip_norm": 0.0}
    plain = change_config(write_run(tmp_path / "erm"), tmp_path / "plain", **few)
    best = change_config(plain, tmp_path / "best", **many)
    printed = text.tables([plain, best], NDCG)
    names = [line.split("  ")[0] for line in printed.splitlines() if line.startswith("ERM (")]
    assert names[:2] == ["ERM (plain)", "ERM (best)"]
    assert "ERM (best): train.batch_size 64, train.learning_rate 0.5" in printed
    assert "more than the objective" not in printed
    # Another seed with the same settings is in the same row, wherever it is.
    second = change_config(write_run(tmp_path / "erm1", seed=1), tmp_path / "second", **many)
    rows_of = [run.name for run in runs.read_runs([plain, best, second])]
    assert rows_of == ["ERM (plain)", "ERM (best)", "ERM (best)"]
    # Folders of one name are told apart by their paths.
    shutil.copytree(best, tmp_path / "other" / "plain")
    again = [run.name for run in runs.read_runs([plain, tmp_path / "other" / "plain"])]
    assert again == [f"ERM ({plain})", f"ERM ({tmp_path / 'other' / 'plain'})"]
    # Other methods with other settings: the note warns, in the page too.
    cvar = change_config(write_run(tmp_path / "a", "cvar"), tmp_path / "cvar", **many)
    said = "he rows differ in more than the objective (train.batch_size, "
    assert said in text.tables([plain, cvar], NDCG)
    write_page([plain, cvar], tmp_path / "report.html")
    assert f"T{said}" in (tmp_path / "report.html").read_text()


def test_differences_over_seeds_by_hand(tmp_path, capsys):
    # Every user rises by these amounts, so each group does: the differences by seed are
    # 0.1 - 0, 0.3 - 0.1 and 0.2 - 0.15. Seeds 5 and 7 have no partner.
    shifts = {"erm": {0: 0.0, 1: 0.1, 2: 0.15, 5: 0.9}, "cvar": {2: 0.2, 0: 0.1, 1: 0.3, 7: -0.4}}
    folders = {
        name: [write_run(tmp_path / f"{name}{seed}", name, seed=seed, shift=shift)
               for seed, shift in of.items()]
        for name, of in shifts.items()
    }  # fmt: skip
    single = write_run(tmp_path / "gdro", "gdro", seed=1)
    every = [*folders["erm"], *folders["cvar"], single]
    reference = folders["erm"][0]
    found = contents.build(runs.read_runs(every), NDCG, baseline=reference)
    table = found.seed_table("pop33")
    assert table["name"].unique().tolist() == ["CVaR (alpha 0.5)"]
    assert table["slice"].tolist() == ["pop33=niche", "pop33=popular", "overall"]
    assert (table["seeds"] == 3).all()
    change = np.array([0.1, 0.2, 0.05])
    half = 4.302653 * np.sqrt(((change - change.mean()) ** 2).sum() / 2) / np.sqrt(3)
    assert table["difference"].tolist() == pytest.approx([change.mean()] * 3)
    assert table["half"].tolist() == pytest.approx([half] * 3, rel=1e-6)
    command.main([*map(str, every), f"--baseline={reference}", f"--out={tmp_path / 'r.html'}"])
    printed = capsys.readouterr().out
    cells = ["+0.1167 ± 0.1897"] * 3
    assert f"\nCVaR (alpha 0.5), 3 seeds {' '.join(cells)}\n" in printed
    assert "NDCG@20 minus that of ERM with the same seed, pop33: mean over seeds ±" in printed
    assert all(sentence in printed for sentence in text.SEEDS_AND_USERS)
    # Every user rises, so the test over users is sure of it. The seeds are not.
    assert "q below 0.001. Over 3 seeds: +0.1167 ± 0.1897, so it may not be found" in printed
    page = Page(tmp_path / "r.html")
    assert "Difference from ERM over seeds, by pop33" in page.summaries
    [over] = [rows for rows in page.tables if "seeds" in rows[0]]
    assert over[1] == ["CVaR (alpha 0.5), pop33=niche", "3", cells[0]]
    # A baseline has no seed, so it is compared with the mean of all of ERM's.
    tests = found.tests.set_index(["name", "slice"])
    mean = 0.45 + np.mean(list(shifts["erm"].values()))
    assert tests.loc[("[most_popular]", "overall"), "difference"] == pytest.approx(0.125 - mean)


def test_no_table_over_seeds_without_two_of_both(tmp_path):
    erm = [write_run(tmp_path / f"erm{i}", seed=i) for i in (0, 1)]
    cvar = [write_run(tmp_path / f"cvar{i}", "cvar", seed=i, shift=0.1) for i in (1, 2)]
    found = contents.build(runs.read_runs([*erm, *cvar]), NDCG, baseline=erm[0])
    assert found.over_seeds.empty
    assert "seeds" not in text.comparison(found)


def test_every_run_must_have_what_is_shown(tmp_path):
    erm = write_run(tmp_path / "erm", families={"pop33": ("niche",), "seq33": ("short", "long")})
    cvar = write_run(tmp_path / "cvar", "cvar", families={"seq33": ("short", "long")})
    other = write_run(tmp_path / "other", "cvar", families={"tier": ("a",)})
    assert ", pop33" not in text.tables([erm, cvar], NDCG)
    with pytest.raises(UserError, match=r"cvar: family 'pop33' was not evaluated; there are seq"):
        text.tables([erm, cvar], NDCG, family="pop33")
    with pytest.raises(UserError, match=r"erm: NDCG@5 was not evaluated; there are NDCG@20"):
        text.tables([erm, cvar], "NDCG@5")
    with pytest.raises(UserError, match="share no group family"):
        text.tables([erm, other], NDCG)
    # Tests are made by the families that both were evaluated by.
    shared = compare_folders([cvar], erm, NDCG)["slice"]
    assert set(map(slices.parse, shared)) >= {("seq33", "short", ""), ("seq33", "long", "")}
    assert "pop33" not in {slices.parse(name).family for name in shared}
    summary = workdir.read_summary(cvar)
    summary["dataset"]["log_hash"] = "def"
    workdir.write_json(cvar / workdir.SUMMARY, summary)
    workdir.finish(cvar, {})
    with pytest.raises(UserError, match=r"different logs or splits \(log_hash def and abc\)"):
        text.tables([erm, cvar], NDCG)
    counts = {"users": 1, "items": 2, "interactions": 3, "train_interactions": 4}
    summary["dataset"] |= counts | {"log_hash": "0123456789abcdef" * 4, "split": {"kind": "time"}}
    workdir.write_json(cvar / workdir.SUMMARY, summary)
    workdir.finish(cvar, {})
    with pytest.raises(UserError) as error:
        text.tables([erm, cvar], NDCG)
    assert (
        "(log_hash 0123456789ab… and abc, users 1 and 24, items 2 and 30, interactions 3 and "
        in (str(error.value))
    )
    assert "1234 and 2 more): they cannot be compared" in str(error.value)


def test_groups_that_a_run_lacks_are_a_dash(tmp_path):
    grid = [
        write_run(tmp_path / "a", "cvar", families={"tier": ("x", "y")}, hparams={"alpha": 0.2}),
        write_run(tmp_path / "b", "cvar", families={"tier": ("y", "z")}, hparams={"alpha": 0.4}),
        write_run(tmp_path / "c", "gdro", families={"tier": ("x",)}, loss_family="tier"),
        write_run(tmp_path / "d", "gdro", families={"tier": ("w",)}, loss_family="tier", seed=1),
    ]
    page = write_page(grid, tmp_path / "report.html")
    found = {row[0]: row[1:5] for row in page.tables[0]}
    assert found[""] == ["x", "y", "z", "w"]
    assert [cell == "-" for cell in found["CVaR (alpha 0.2)"]] == [False, False, True, True]
    assert [cell == "-" for cell in found["CVaR (alpha 0.4)"]] == [True, False, False, True]
    assert [cell == "-" for cell in found["GDRO (tier, step_size 0.5), 2 seeds"]] == [
        False, True, True, False,
    ]  # fmt: skip
    line = next(
        line
        for line in text.tables(grid, NDCG).splitlines()
        if line.startswith("CVaR (alpha 0.4) ")
    )
    assert line.removeprefix("CVaR (alpha 0.4) ").split()[0] == "-"
    with pytest.raises(UserError, match="tier of user 0 is not the baseline's"):
        compare_folders(grid[:2], grid[0], NDCG)
    assert "No tests were made. " in (tmp_path / "report.html").read_text()


def test_failed_runs_are_listed_and_count_nowhere(tmp_path):
    good = [
        write_run(tmp_path / f"{x:g}", "cvar", hparams={"alpha": x}, shift=x / 10)
        for x in (0.2, 0.4)
    ]
    bad = [
        write_run(tmp_path / "bad", "cvar", hparams={"alpha": 0.6}, status="failed at step 7"),
        write_run(tmp_path / "seed", "cvar", hparams={"alpha": 0.2}, seed=1, status="failed in x"),
    ]
    erm = write_run(tmp_path / "erm")
    page = write_page([*good, *bad, erm], tmp_path / "report.html", baseline=erm)
    source = (tmp_path / "report.html").read_text()
    assert re.findall("<li>(.*)</li>", source)[:2] == [
        "CVaR (alpha 0.6), seed 0: failed at step 7, not in the table",
        "CVaR (alpha 0.2), seed 1: failed in x, not in the table",
    ]
    assert [row[0] for row in page.tables[0]] == [
        "", "test users", "CVaR (alpha 0.2)", "CVaR (alpha 0.4)", "ERM", "[most_popular]",
    ]  # fmt: skip
    assert page.cell(0, "CVaR (alpha 0.2)", "overall") == "0.4700*"
    assert not any("alpha 0.6" in row[0] for row in page.tables[1])
    assert page.cell(-1, "CVaR (alpha 0.6), seed=0", "status") == "failed at step 7"
    assert page.cell(-1, "CVaR (alpha 0.6), seed=0", "best epoch") == "-"
    assert not any("alpha 0.6" in alt for alt in page.images)
    assert [label for label in page.legend if "alpha" in label] == [
        "CVaR (alpha 0.2)", "CVaR (alpha 0.4)",  # of the plot of the means
        "CVaR (alpha 0.2)", "CVaR (alpha 0.4)",  # of the forest plot
        "CVaR (alpha 0.2)", "CVaR (alpha 0.4)",  # of the curves
    ]  # fmt: skip
    printed = text.tables([*good, *bad], NDCG)
    assert "CVaR (alpha 0.6), seed 0: failed at step 7" in printed
    with pytest.raises(UserError, match="no run that succeeded"):
        compare_folders(good, bad[0], NDCG)
    write_page(bad[:1], tmp_path / "only.html")  # a page of nothing but a failed run


def test_the_curve_of_a_method_ends_with_the_seed_that_stopped_first(tmp_path):
    folders = [write_run(tmp_path / f"seed{seed}", seed=seed) for seed in (0, 1)]
    key = f"val/{NDCG}/overall"
    for epoch in (3, 4):
        workdir.append_line(
            folders[1] / workdir.METRICS, json.dumps({"epoch": epoch, key: float(epoch)})
        )
    workdir.finish(folders[1], {})
    other = write_run(tmp_path / "cvar", "cvar")
    history = html_report._history(runs.read_runs([*folders, other]))
    epochs = history.groupby("name")["epoch"].apply(list).to_dict()
    assert epochs == {"ERM": [1, 2], "CVaR (alpha 0.5)": [1, 2]}
    means = history[history.name == "ERM"][key]
    assert means.tolist() == pytest.approx([0.45, 0.45])


def damage_digit(path):
    path.write_text(path.read_text().replace("0.45", "0.95", 1))


def damage_row(path):
    first, second = path.read_text().splitlines()
    path.write_text(first[:-9] + "\n" + second + "\n")


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("per_user.parquet", lambda path: path.unlink(), "per_user.parquet is missing"),
        ("per_user.parquet", lambda path: path.write_bytes(b"PAR1"), "per_user.parquet changed"),
        ("summary.json", damage_digit, "summary.json changed"),
        ("metrics.jsonl", damage_row, "metrics.jsonl changed"),
        ("metrics.jsonl", lambda path: path.unlink(), "metrics.jsonl is missing"),
    ],
)
def test_missing_and_changed_files_are_named(name, damage, message, tmp_path, capsys):
    erm, cvar = write_run(tmp_path / "erm"), write_run(tmp_path / "cvar", "cvar")
    damage(cvar / name)
    with pytest.raises(UserError, match=f"cvar: {message}"):
        compare_folders([cvar], erm, NDCG)
    with pytest.raises(UserError, match=f"cvar: {message}"):
        text.tables([erm, cvar], NDCG)
    with pytest.raises(SystemExit, match="1"):
        command.main([str(erm), str(cvar), f"--out={tmp_path / 'report.html'}"])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(f"error: .*cvar: {message}.*\n", printed.err)
    assert not (tmp_path / "report.html").exists()


def test_results_of_another_version_are_refused(tmp_path):
    folder = write_run(tmp_path / "old")
    summary = workdir.read_summary(folder)
    workdir.write_json(folder / workdir.SUMMARY, summary | {"schema_version": 1})
    with pytest.raises(UserError, match="schema_version 1, but this version reads 3"):
        text.tables([folder], NDCG)


def cells_of(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_tables_as_csv_markdown_and_latex(tmp_path, capsys):
    given = {"tier": tuple("abcde"), "pop33": ("niche", "popular")}  # e has four users
    options = {"families": given, "loss_family": "tier"}
    folders = [write_run(tmp_path / f"erm{i}", seed=i, shift=i / 10, **options) for i in (0, 1)]
    folders.append(write_run(tmp_path / "cvar", "cvar", shift=0.2, **options))
    outs = [tmp_path / f"r.{ending}" for ending in ("csv", "md", "tex", "html")]
    several = ",".join(map(str, outs[1:]))
    command.main([*map(str, folders), f"--out={outs[0]}", f"--out={several}"])
    printed = capsys.readouterr().out
    assert all(f"report: {out}\n" in printed for out in outs)
    made = contents.build(runs.read_runs(folders), NDCG)

    table = pd.read_csv(outs[0], keep_default_na=False, na_values=[""])
    assert list(table) == [
        "row", "kind", "family", "group", "metric", "users", "seeds", "mean", "half", "low", "high",
        "reference", "difference", "difference_low", "difference_high", "p", "q",
    ]  # fmt: skip
    at = table.fillna({"family": ""}).set_index(["row", "family", "group"])
    assert at.index.is_unique
    assert len(at) == len(made.rows) * (1 + 5 + 2 + 2)
    first = at.loc[("ERM", "tier", "a")]
    values = np.linspace(0, 0.9, USERS)[::5] + 0.05
    assert first["mean"] == pytest.approx(values.mean())
    assert first["half"] == pytest.approx(stats.t.ppf(0.975, 1) * 0.05)
    assert first[["kind", "metric", "users", "seeds"]].tolist() == ["run", NDCG, 5, 2]
    assert pd.isna(first["difference"])  # of the reference itself
    test = at.loc[("CVaR (alpha 0.5)", "", "overall")]
    [expected] = made.tests[(made.tests["name"] == "CVaR (alpha 0.5)")
                            & (made.tests["slice"] == "overall")].to_dict("records")  # fmt: skip
    known = made.ends()["CVaR (alpha 0.5)", "overall"]
    assert test["reference"] == "ERM"
    assert test[["low", "high"]].tolist() == pytest.approx(known)
    assert test[["difference", "difference_low", "difference_high", "p", "q"]].tolist() == (
        pytest.approx([expected[key] for key in ("difference", "low", "high", "p", "q")])
    )
    hidden = at.loc[("ERM", "tier", "e")]
    assert hidden["users"] == 4
    assert hidden[["mean", "half", "low", "high"]].isna().all()
    assert at.loc[("ERM", "target", "repeat"), "users"] == 8

    page = outs[1].read_text()
    assert page.startswith(
        "# by hand: NDCG@20 on the test targets\n\n## tier\n\n| Method | tier a |"
    )
    lines = [line for line in page.split("\n## pop33\n")[1].splitlines() if line.startswith("|")]
    header, _, sizes, erm, cvar, popular = map(cells_of, lines)
    assert header == ["Method", "pop33 niche", "pop33 popular", "overall", "worst", "repeat", "new",
                      "validation"]  # fmt: skip
    assert sizes == ["test users", "12", "12", "24", "", "8", "16", ""]
    tests = made.tests.set_index(["name", "slice"])
    numbers = made.table("pop33").set_index("name")
    for place, where in enumerate(("pop33=niche", "pop33=popular", "overall"), start=1):
        mean, half = numbers.loc["ERM", [where, f"{where} ±"]]
        assert erm[place] == f"<u>{mean:.4f}</u> ± {half:.4f}"
        star = "*" if tests.loc[("CVaR (alpha 0.5)", where), "star"] else ""
        assert cvar[place] == f"**{numbers.loc['CVaR (alpha 0.5)', where]:.4f}{star}**"
    assert (erm[0], popular[0]) == ("ERM, 2 seeds", "[most_popular]")
    tier = [line for line in page.split("\n## pop33\n")[0].splitlines() if line.startswith("|")]
    assert [cells_of(line)[5] for line in tier] == ["tier e", "---", "4", *["hidden"] * 3]
    assert "- Cells without figures are hidden: fewer than 5 users." in page
    assert "± is half of the 95 % interval of a mean over seeds." in page

    tex = outs[2].read_text()
    assert tex.count(r"\begin{table}") == tex.count(r"\end{table}") == 2
    assert r" & \multicolumn{2}{c}{pop33} & \multicolumn{5}{c}{} \\" in tex
    assert "\n\\cmidrule(lr){2-3}\n" in tex
    assert r"\caption{NDCG@20 by pop33, by hand. Bold: the best row" in tex
    mean = numbers.loc["CVaR (alpha 0.5)", "pop33=niche"]
    assert rf"CVaR (alpha 0.5) & \textbf{{{mean:.4f}" in tex
    assert "hidden & " in tex
    compare(folders).report(outs[1], show_small_groups=True)
    assert "hidden" not in outs[1].read_text()


def test_files_of_runs_that_all_failed(tmp_path):
    bad = write_run(tmp_path / "bad", status="failed at step 7")
    found = compare([bad])
    assert list(found.table())[-2:] == ["low", "high"]
    for ending in ("csv", "md", "tex", "html"):
        found.report(tmp_path / f"r.{ending}")
    table = pd.read_csv(tmp_path / "r.csv")
    assert (len(table), table.shape[1]) == (0, 17)
    assert "failed at step 7, not in the table" in (tmp_path / "r.md").read_text()


def test_commas_in_the_names_of_files():
    assert files.split_names("a.csv,b/c.MD,d.tex") == ["a.csv", "b/c.MD", "d.tex"]
    assert files.split_names("my,folder/a.csv") == ["my,folder/a.csv"]
    assert files.split_names("a.csv,b.pdf") == ["a.csv,b.pdf"]  # which is refused by its name


def test_names_in_the_files_are_no_markup(tmp_path):
    given = {encode_name("a|b,*"): tuple(AWKWARD)}
    erm = write_run(tmp_path / "erm", families=given, loss_family=next(iter(given)))
    outs = [tmp_path / f"r.{ending}" for ending in ("csv", "md", "tex")]
    for out in outs:
        compare([erm]).report(out, show_small_groups=True)
    table = pd.read_csv(outs[0], keep_default_na=False)
    shown = [slices.printable(name) for name in AWKWARD]
    assert table["group"][table["family"] == "a|b,*"].tolist() == shown * 2  # ERM and a baseline
    assert set(table["family"]) == {"", "a|b,*", "target"}
    lines = [line for line in outs[1].read_text().splitlines() if line.startswith("|")]
    assert len({len(cells_of(line)) for line in lines}) == 1
    assert "<script>" not in outs[1].read_text().replace(r"\<script>", "")
    tex = outs[2].read_text()
    [header] = [line for line in tex.splitlines() if line.startswith("Method")]
    columns = len(re.findall(r"(?<!\\)&", header))
    rows_of_table = [line for line in tex.splitlines() if line.startswith(("ERM", "{[}"))]
    assert {len(re.findall(r"(?<!\\)&", line)) for line in rows_of_table} == {columns}
    assert r"\$5" in header


def test_names_from_data_are_shown_as_they_are_and_never_are_markup(tmp_path):
    family = encode_name("R&D <i>*")
    given = {family: AWKWARD, encode_name("target"): ("new", "old")}
    erm = write_run(tmp_path / "<u>erm", families=given, loss_family=family)
    gdro = write_run(tmp_path / "gdro", "gdro", families=given, loss_family=family, shift=0.1)
    path = tmp_path / "report.html"
    page = write_page([erm, gdro], path, baseline=erm)
    assert not {"b", "i", "u", "script"} & set(page.tags)
    shown = [slices.printable(name) for name in AWKWARD]
    assert page.tables[0][0] == ["", *sorted(shown, key=shown.index), "overall", "worst",
                                 "repeat", "new", "validation"]  # fmt: skip
    assert page.tables[1][0][1:3] == ["target=new", "old"]
    row = "GDRO (R&D <i>*, step_size 0.5)"
    assert page.cell(0, row, r"tab\there\x07") != "-"
    assert page.cell(2, f"{row}, R&D <i>*=<b>VIP</b>", "users") == "2"
    assert str(erm) in page.settings
    # The same names in the figures, none hidden, none read as a formula.
    assert [label for label in page.legend if label in shown] == shown
    page = write_page([erm, gdro], path, baseline=erm, family=family)
    forest = " ".join(page.svg_texts(next(alt for alt in page.images if "Difference" in alt)))
    assert [name for name in shown if name not in forest.replace("  ", " ")] == []
    # The user's own name of the family selects it, and so does the canonical one.
    for name in ("R&D <i>*", family):
        assert "targets, R&D <i>*\n" in text.tables([erm], NDCG, family=name)
    assert "targets, target\n" in text.tables([erm], NDCG, family="target")
    found = contents.build(runs.read_runs([erm, gdro]), NDCG, baseline=erm, family="target")
    printed = text.comparison(found)
    assert "target=old" in printed
    assert "VIP" not in printed
    with pytest.raises(UserError, match=r"family 'R' was not evaluated; there are R&D <i>\*, targ"):
        text.tables([erm], NDCG, family="R")


def test_figures_without_any_difference(tmp_path):
    erm, cvar = write_run(tmp_path / "erm"), write_run(tmp_path / "cvar", "cvar")
    one = {"tier": tuple(f"g{i}" for i in range(USERS))}  # of one user each: no interval
    lone = [write_run(tmp_path / name, method, families=one) for name, method in
            (("a", "erm"), ("b", "cvar"))]  # fmt: skip
    for pair in ([erm, cvar], lone):  # warnings are errors
        page = write_page(pair, tmp_path / "report.html", baseline=pair[0])
        assert page.images


def boxes(figure, texts):
    figure.draw_without_rendering()
    return [t.get_window_extent() for t in texts if t.get_text()]


@pytest.mark.parametrize(
    "labels",
    [
        ["niche", "diverse", "popular", "overall"],
        [f"{a}×{b}" for a in ("niche", "diverse", "popular") for b in ("short", "medium", "long")],
        [f"a rather long name of group {i}" for i in range(12)],
        [f"group {i}" for i in range(40)],
    ],
)
def test_labels_of_groups_do_not_overlap(labels):
    figure = Figure(figsize=(max(4.2, 1 + 0.22 * len(labels)), 3.0), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=8)
    axes.bar(range(len(labels)), [1.0] * len(labels))
    figures.group_axis(axes, labels, width=figure.get_figwidth() - 0.8)
    found = axes.get_xticklabels()
    shown = boxes(figure, found)
    assert len(shown) == len(labels)
    if found[0].get_rotation() == 0:
        assert all(a.x1 < b.x0 for a, b in itertools.pairwise(shown))
    else:  # lines of text at 50 degrees, whose ends are at least a line's height apart
        apart = np.diff([box.x1 for box in shown]) * np.sin(np.radians(50))
        assert (apart > found[0].get_fontsize() * figure.dpi / 72).all()


def test_markdown_shows_names_as_they_are():
    names = ["VIP|a", "*x*", "_x_ a_b", "<u>", "`c`", "a\nb", "[a](b)", "&lt; R&D", "$a$", "~~x~~"]
    table = text.markdown_table(["", *names], [["x", *([text.Markdown("**1**")] * len(names))]])
    header, _, row = table.splitlines()
    assert header == (
        r"|  | VIP\|a | \*x\* | \_x\_ a_b | \<u> | \`c\` | a\\nb | [a\](b) | \&lt; R&D | \$a\$ "
        r"| \~\~x\~\~ |"
    )
    assert row == "| x " + "| **1** " * len(names) + "|"
    assert text.escape_markdown("GDRO (pop33&seq33) [most_popular]") == (
        "GDRO (pop33&seq33) [most_popular]"
    )


def test_no_sideways_scrolling(folders, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    given = {"tier": ("x" * 60, "y z " * 20, *(f"group {i}" for i in range(10)))}
    made = [write_run(tmp_path / name, name, families=given) for name in ("erm", "cvar")]
    pages = [tmp_path / "real.html", tmp_path / "made.html"]
    write_page(folders, pages[0], baseline=folders[0])
    write_page(made, pages[1], baseline=made[0])
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(path.read_text(), quote=True)}"></iframe>'
        for path in pages
        for width in (390, 1280)
    )
    (tmp_path / "frames.html").write_text(
        f"<!doctype html><body>{frames}<p id=widths></p><script>onload = () => {{"
        "widths.textContent = 'widths ' + [...document.querySelectorAll('iframe')].map("
        "f => f.contentDocument.documentElement).map(e => e.scrollWidth - e.clientWidth)"
        ".join(' ') + ' end';}</script>"
    )
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    dom = subprocess.run(
        [
            chromium,
            *flags,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            (tmp_path / "frames.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    found = re.search(r"widths ([\d ]+) end</p>", dom)
    assert found is not None
    assert found[1] == "0 0 0 0"


def test_the_command_reads_every_run_once(tmp_path, monkeypatch, capsys):
    folders = [write_run(tmp_path / "erm"), write_run(tmp_path / "cvar", "cvar", shift=0.1)]
    checked = []
    monkeypatch.setattr(workdir, "check_finished", lambda folder: checked.append(folder.name))
    command.main([str(folders[1]), f"--baseline={folders[0]}", f"--out={tmp_path / 'r.html'}"])
    assert checked == ["cvar", "erm"]
    assert "NDCG@20 against" in capsys.readouterr().out


def test_the_three_forms_of_a_method_s_name():
    family, values = encode_name("R&D") + "*pop33", {"step_size": 0.01, "stream_rate": 0.1}
    assert names.method_name("sdro", family, values) == (
        "SDRO (R&D*pop33, step_size 0.01, stream_rate 0.1)"
    )
    key = names.method_name("sdro", family, values, form="key")
    assert key == "sdro(R%26D*pop33)"
    assert names.decode_key(key) == "sdro(R&D*pop33)"
    assert names.method_name("sdro", family, form="paper") == "SDRO_R&D×pop33"
    assert [names.method_name("erm", form=form) for form in ("report", "key", "paper")] == [
        "ERM", "erm", "ERM",
    ]  # fmt: skip
    own = {"method": "own", "label": "Own DRO", "needs_groups": False, "group_family": "",
           "hparams": {"power": 2.0}}  # fmt: skip
    assert names.of_summary(own, ["model.dim 8"]) == "Own DRO (power 2, model.dim 8)"
    del own["label"]  # an earlier version stored none
    assert names.of_summary(own) == "own (power 2)"
    assert names.of_summary(own | {"method": "cvar", "hparams": {}}) == "CVaR"
    assert names.method_name("[markov]", form="paper") == names.baseline_name("markov")
    assert names.is_baseline("[markov]")
    assert not names.is_baseline("erm")


def test_a_change_against_nothing_has_no_bar():
    figure = Figure()
    axes = figure.subplots()
    rows = pd.DataFrame({"baseline": [0.5, 0.0], "difference": 0.1, "low": 0.05, "high": 0.2})
    _, ends = figures.change_bars(axes, np.arange(2), rows, 0)
    assert ends == pytest.approx([20, 10, 40])
    [first, second] = axes.patches
    assert first.get_height() == pytest.approx(20)
    assert np.isnan(second.get_height())
    figure.draw_without_rendering()


def test_the_metric_to_show_is_the_one_that_chose():
    def run(*settings):
        return runs.FinishedRun(Path(), "erm", {}, settings=settings)

    hits = run(("select.metric", "HitRate@5"))
    assert runs.metric_of([hits, hits]) == "HitRate@5"
    lists = runs.FinishedRun(Path(), "old", {"kind": "list"})
    assert runs.metric_of([hits, lists]) == "HitRate@5"
    assert runs.metric_of([hits, run(("select.metric", "MRR@5"))]) == "NDCG@20"
    assert runs.metric_of([lists]) == "NDCG@20"
