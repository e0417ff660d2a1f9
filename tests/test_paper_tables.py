import re
import shutil
import subprocess

import numpy as np
import pandas as pd
import pytest
from runs import means_of

from seqfair_jax.config import default_config
from seqfair_jax.data.cache import load_dataset
from seqfair_jax.data.groups import GroupFamily, build_family, encode_name
from seqfair_jax.errors import UserError
from seqfair_jax.evaluation.slices import printable
from seqfair_jax.paper import layouts, tables
from seqfair_jax.paper.choice import Entry
from seqfair_jax.paper.layouts import Column, Layout
from seqfair_jax.paper.table1 import table_1a, table_1b
from seqfair_jax.report import render
from seqfair_jax.training.selection import RULES

NDCG = "NDCG@20"
USERS = 60
# Names that LaTeX, Markdown, matplotlib and file systems each read in their own way.
AWKWARD = (
    "VIP", "vip", "10%", "a_b^c~d", "#1 {x} $5 & $6", "back\\slash", "<u>*[x]*</u>", "|", "_other",
    "--", "tab\tand\x07", "``x''", "naïve Þ 日本",
)  # fmt: skip


def long_by_hand():
    rows = []
    values = {
        ("erm", ""): [0.30, 0.20, 0.25], ("gdro", "pop33"): [0.32, 0.20, 0.26],
        ("cvar", ""): [0.31, 0.25, 0.28], ("[markov]", ""): [0.5, 0.5, 0.5],
    }  # fmt: skip
    starred = {("cvar", "pop33=popular"), ("cvar", "overall")}
    for (method, family), row in values.items():
        for name, value in zip(("pop33=niche", "pop33=popular", "overall"), row, strict=True):
            rows.append(
                {
                    "method": method,
                    "group_family": family,
                    "slice": name,
                    "value": value,
                    "star": (method, name) in starred,
                    "sd": 0.0125 if (method, name) == ("cvar", "overall") else np.nan,
                }
            )
    return pd.DataFrame(rows)


def test_markdown_and_latex_by_hand_to_the_last_star():
    long = long_by_hand()
    layout = layouts.layouts(long, "retailrocket")[0]
    table = layouts.cells(long, layout)
    assert render.markdown(table).splitlines() == [
        "| Method | pop33 Niche | pop33 Popular | pop33 Overall |",
        "|---|---|---|---|",
        "| ERM | 0.3000 | <u>0.2000</u> | 0.2500 |",
        "| GDRO | **0.3200** | <u>0.2000</u> | <u>0.2600</u> |",
        "| CVaR | <u>0.3100</u> | **0.2500*** | **0.2800*** ± 0.0125 |",
        "| [markov] | 0.5000 | 0.5000 | 0.5000 |",
    ]
    assert render.latex(table, "a_b & c").splitlines() == [
        r"\begin{table}",
        r"\centering",
        r"\caption{a\_b \& c}",
        r"\begin{tabular}{lrrr}",
        r"\toprule",
        r" & \multicolumn{3}{c}{pop33} \\",
        r"\cmidrule(lr){2-4}",
        r"Method & Niche & Popular & Overall \\",
        r"\midrule",
        r"ERM & 0.3000 & \underline{0.2000} & 0.2500 \\",
        r"GDRO & \textbf{0.3200} & \underline{0.2000} & \underline{0.2600} \\",
        r"CVaR & \underline{0.3100} & \textbf{0.2500*} & \textbf{0.2800*} $\pm$ 0.0125 \\",
        r"\midrule",
        r"{[}markov] & 0.5000 & 0.5000 & 0.5000 \\",
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
    ]


def test_intersections_have_rows_and_a_table_of_their_own():
    slices = ["pop33=niche", "seq33=short", "pop33*seq33=niche*short", "overall"]
    pairs = [("erm", ""), ("ipw", "pop2060"), ("gdro", "pop33*seq33"), ("gdro", "pop33&seq33")]
    rows = [
        {"method": m, "group_family": f, "slice": s, "value": 0.1, "star": False, "sd": np.nan}
        for m, f in pairs
        for s in slices
    ]
    long = pd.DataFrame(rows)
    by_title = {layout.title: layout for layout in layouts.layouts(long, "retailrocket")}
    intersecting = layouts.cells(long, by_title["intersecting groups"]).figures
    assert list(intersecting.index) == ["ERM", "GDRO_pop33×seq33", "GDRO_pop33&seq33"]
    assert (intersecting == 0.1).all(axis=None)
    table = layouts.cells(long, by_title["groups of pop33×seq33"])
    # Asterisks would be emphasis, and the sign is none of LaTeX's.
    assert render.markdown(table).splitlines()[0] == "| Method | niche×short |"
    assert r"GDRO\_pop33$\times$seq33 & " in render.latex(table, "")


def test_families_of_ones_own_have_a_table():
    long = long_by_hand()
    long["slice"] = long["slice"].str.replace("pop33=", "tenure=")
    long["group_family"] = long["group_family"].replace("pop33", "tenure")
    layout = layouts.layouts(long, "csv")[0]
    assert layout.title == "groups from a file"
    lines = render.markdown(layouts.cells(long, layout)).splitlines()
    assert lines[0] == "| Method | tenure niche | tenure popular | tenure Overall |"
    assert lines[3] == "| GDRO | **0.3200** | <u>0.2000</u> | <u>0.2600</u> |"
    # A single family has no table of intersections, but its figure.
    changes = {"baseline": 0.5, "difference": 0.01, "low": 0.0, "high": 0.02}
    drawing = tables.figure(long.assign(**changes), "csv")
    assert [axes.get_title() for axes in drawing.axes] == ["tenure"]
    assert [text.get_text() for text in drawing.legends[0].get_texts()] == ["GDRO_tenure", "CVaR"]


def test_the_published_figures():
    columns = [Column("pop33", "Niche", "pop33=niche"), Column("pop33", "Overall", "overall")]
    rows = [("ERM", "erm", ""), ("GDRO", "gdro", "*"), ("CVaR", "cvar", "")]
    layout = Layout("popularity groups", rows, columns, 2, "")
    expected = [[0.214, 0.225], [0.215, 0.230], [0.225, 0.239]]
    np.testing.assert_array_equal(layouts.published(layout), expected)
    rows = [("SDRO_seq33", "sdro", "seq33"), ("chi2", "chi2", "")]
    columns = [Column("seq33", "Long", "seq33=long"), Column("", "Overall", "overall")]
    layout = Layout("intersecting groups", rows, columns, 7, "")
    table = layouts.published(layout)
    assert table.loc["chi2"].isna().all()
    assert table.notna().loc["SDRO_seq33"].all()
    assert layouts.published(layout._replace(number=None)) is None


def entry(method, families, *, loss_family="", shift=0.0, seeds=(0,), drop=()):
    """An entry whose users' NDCG@20 is 0.1 at seed 0, 0.2 at seed 1, ..., plus shift.

    Users take the groups of a family in turn. The summaries lack the slices in `drop`.
    """
    users = np.arange(USERS)
    repeat = users % 2 == 0
    built = [
        GroupFamily(name, groups, users[:, None] % len(groups) == np.arange(len(groups)))
        for name, groups in families.items()
    ]
    noise = np.random.default_rng(0).normal(0, 0.001, USERS) * (shift != 0)
    per_user, summaries = {}, []
    for seed in seeds:
        values = {NDCG: np.full(USERS, 0.1 + 0.1 * seed + shift) + noise}
        found = means_of(values, built, repeat)
        found = {NDCG: {name: x for name, x in found[NDCG].items() if name not in drop}}
        summaries.append({"test": found, "baselines": {"markov": found}, "seed": seed})
        per_user[seed] = pd.DataFrame(
            {"user_id": users, "target_item_id": users, "repeat": repeat, "rank": 1, **values}
            | {family.name: family.labels() for family in built}
        )
    hparams = {"step_size": 0.1} if method == "gdro" else {}
    return Entry(method, loss_family, hparams, summaries, per_user)


def test_the_long_table_by_hand():
    families = {"pop33": ("niche", "popular")}
    erm = entry("erm", families, seeds=(0, 1, 2))
    gdro = entry("gdro", families, loss_family="pop33", shift=0.05, seeds=(1,))
    long = tables.long_table([erm, gdro], NDCG, "overall")
    at = long.set_index(["method", "slice"])
    row = at.loc["gdro", "overall"]
    # ERM's mean is 0.2 over its seeds, and that of seed 1 as well; of seeds 0 and 1 it is 0.15.
    assert at.loc["erm", "overall"]["value"] == pytest.approx(0.2)
    assert at.loc["erm", "overall"]["sd"] == pytest.approx(0.1)
    assert row["baseline"] == pytest.approx(0.2)
    assert row["difference"] == pytest.approx(0.05, abs=1e-3)
    assert row[["group_family", "hparams", "seeds", "star"]].tolist() == [
        "pop33", "step_size=0.1", 1, True,
    ]  # fmt: skip
    assert at.loc["[markov]", "pop33=niche"]["value"] == pytest.approx(0.1)
    assert pd.isna(at.loc["erm", "overall"]["difference"])
    with pytest.raises(UserError, match="no finished ERM run"):
        tables.long_table([gdro], NDCG, "overall")


def heights(drawing):
    [axes] = drawing.axes
    return [bar.get_height() for container in axes.containers for bar in container]


def test_the_bars_are_relative_to_erm_over_the_same_seeds():
    families = {"tier": ("a", "b")}
    erm = entry("erm", families, seeds=(0, 1, 2))  # 0.1, 0.2, 0.3
    gdro = entry("gdro", families, loss_family="tier", shift=0.05, seeds=(0,))
    cvar = entry("cvar", families, shift=0.05, seeds=(0, 1))
    long = tables.long_table([erm, gdro, cvar], NDCG, "overall")
    drawing = tables.figure(long, "csv")
    np.testing.assert_allclose(heights(drawing), [50, 50, 100 / 3, 100 / 3], atol=0.5)


def test_runs_with_other_groups_of_a_family():
    first = {"tier": ("a", "b")}
    erm = entry("erm", first, seeds=(0, 1))
    erm.summaries[1]["test"][NDCG].pop("tier=a")
    erm.summaries[1]["test"][NDCG]["tier=new"] = 0.7
    cvar = entry("cvar", first, shift=0.06, drop=("tier=b",))
    long = tables.long_table([erm, cvar], NDCG, "overall")
    [layout, _] = layouts.layouts(long, "csv")
    lines = render.markdown(layouts.cells(long, layout)).splitlines()
    assert lines[0] == "| Method | tier a | tier b | tier new | tier Overall |"
    assert lines[2].split(" | ")[1:] == [
        "<u>0.1000</u>", "**0.1500** ± 0.0707", "**0.7000**", "<u>0.1500</u> ± 0.0707 |",
    ]  # fmt: skip
    cells = lines[3].split(" | ")
    assert (cells[2], cells[3]) == ("-", "-")
    tables.figure(long, "csv")
    render.latex(layouts.cells(long, layout), "")


def awkward_long():
    own, target = encode_name("R&D 10% [x]*y*"), encode_name("target")
    product = f"pop33*{own}"
    groups = tuple(f"niche*{encode_name(name)}" for name in AWKWARD)
    families = {"pop33": ("niche", "popular"), own: AWKWARD, target: AWKWARD[:2], product: groups}
    entries = [
        entry("erm", families),
        entry("gdro", families, loss_family=own, shift=0.05),
        entry("gdro", families, loss_family=product, shift=0.01),
        entry("gdro", families, loss_family=f"pop33&{own}", shift=0.02),
        entry("cvar", families, shift=0.05),
    ]
    return tables.long_table(entries, NDCG, "overall")


def test_names_from_data_in_every_file(tmp_path):
    long = awkward_long()
    for layout in layouts.layouts(long, "csv"):
        table = layouts.cells(long, layout)
        shown = [label for _, label in table.figures.columns]
        if layout.title == "groups from a file":
            own = [printable(name) for name in AWKWARD]
            assert shown == [*own, "Overall", "VIP", "vip", "Overall"]
            assert set(table.figures.columns.get_level_values(0)) == {"R&D 10% [x]*y*", "target"}
            assert table.figures.loc["GDRO"].notna().sum() == len(own) + 1  # its loss's family
        if layout.title.startswith("groups of"):
            assert layout.title == "groups of pop33×R&D 10% [x]*y*"
            assert shown == [f"niche×{printable(name)}" for name in AWKWARD]
            assert "GDRO_pop33×R&D 10% [x]*y*" in table.figures.index
    files = tables.write([long], "csv | a_b %", NDCG, tmp_path, source="here")
    assert {path.parent for path in files} == {tmp_path}
    assert len(files) == len({path.name for path in files}) == len(list(tmp_path.iterdir()))
    page = (tmp_path / "overall.md").read_text()
    assert "chosen by the worst group" not in page
    tables.write([long.assign(rule="worst_group")], "csv", NDCG, tmp_path / "worst", source="here")
    assert (
        f"baselines without training. {RULES['worst_group'].note}\n"
        in (tmp_path / "worst" / "worst_group.md").read_text()
    )
    assert page.splitlines()[0] == rf"# csv \| a_b %: test {NDCG}, chosen by overall on validation"
    assert r"## Groups of pop33×R&D 10% [x]\*y\*" in page
    header = next(line for line in page.splitlines() if "10% [x]\\*y\\* VIP" in line)
    cells = re.split(r"(?<!\\) \| ", header)
    own = r"R&D 10% [x]\*y\*"
    assert cells[1:10] == [
        f"{own} VIP", f"{own} vip", f"{own} 10%", f"{own} a_b^c\\~d", f"{own} #1 {{x}} \\$5 & \\$6",
        f"{own} back\\\\slash", f"{own} \\<u>\\*[x]\\*\\</u>", f"{own} \\|", f"{own} \\_other",
    ]  # fmt: skip


def test_latex_shows_names_as_they_are():
    assert render.escape_latex("[most_popular]") == r"{[}most\_popular]"
    assert render.escape_latex("10% of A&B, #1 {x} $5") == r"10\% of A\&B, \#1 \{x\} \$5"
    assert render.escape_latex("a~b^c|d\\") == (
        r"a\textasciitilde{}b\textasciicircum{}c\textbar{}d\textbackslash{}"
    )
    assert render.escape_latex("*<`--->") == (
        r"{*}\textless{}\textasciigrave{}-{}-{}-\textgreater{}"
    )
    assert render.escape_latex("naïve Þ 日×\n") == (r"naïve U+00DE U+65E5$\times$\textbackslash{}n")
    long = awkward_long()
    text = "\n".join(
        render.latex(layouts.cells(long, layout), layout.title)
        for layout in layouts.layouts(long, "csv")
    )
    assert not re.search(r"(?<!\\)[%#]", text)
    assert not re.search(r"\\\\\n(\\midrule\n)?[\[*]", text)
    for row in re.findall(r"\\midrule\n(.*) \\\\\n", text):
        assert not row.startswith("[")


def test_every_table_compiles(tmp_path):
    pdflatex = shutil.which("pdflatex")
    if pdflatex is None:
        pytest.skip("no pdflatex on this machine")
    everything = "".join(map(chr, [*range(1, 0x250), 0x2019, 0x65E5]))
    families = {encode_name(everything[i : i + 40]): (everything[i : i + 40], "*[x]", "[x]*")
                for i in range(0, len(everything), 40)}  # fmt: skip
    entries = [entry("erm", families), entry("cvar", families, shift=0.1)]
    entries += [entry("gdro", families, loss_family=name, shift=0.1) for name in families]
    all_characters = tables.long_table(entries, NDCG, "overall")
    paper = {"pop33": ("niche", "popular"), "seq33": ("short", "long")}
    entries = [entry("erm", paper), entry("gdro", paper, loss_family="pop33", shift=0.1)]
    ordinary = tables.long_table(entries, NDCG, "overall")
    for name, long, dataset in (
        ("a", awkward_long(), "10% & [x]"), ("b", all_characters, "*"), ("c", ordinary, "ml1m"),
    ):  # fmt: skip
        folder = tmp_path / name
        tables.write([long.assign(rule="overall")], dataset, NDCG, folder, source="")
        document = folder / "document.tex"
        document.write_text(
            r"\documentclass{article}\usepackage{booktabs}\begin{document}"
            r"\input{overall.tex}\end{document}"
        )
        result = subprocess.run(
            [pdflatex, "-interaction=nonstopmode", "-halt-on-error", document.name],
            cwd=folder,
            capture_output=True,
            timeout=120,
        )
        assert result.returncode == 0, result.stdout.decode(errors="replace")[-3000:]
        assert (folder / "document.pdf").stat().st_size > 0


def test_the_figure_shows_names_as_they_are(tmp_path):
    own = encode_name("a*b $x$")
    names = [name for name in AWKWARD if name.isascii()]  # matplotlib's font has no others
    families = {own: tuple(names)}
    entries = [entry("erm", families), entry("gdro", families, loss_family=own, shift=0.05)]
    drawing = tables.figure(tables.long_table(entries, NDCG, "overall"), "csv")
    [axes] = drawing.axes
    texts = [axes.title, *axes.get_xticklabels(), *drawing.legends[0].get_texts()]
    assert [text.get_text() for text in texts] == [
        "a*b $x$", *map(printable, names), "GDRO_a*b $x$",
    ]  # fmt: skip
    assert not any(text.get_parse_math() for text in texts)
    for form in ("svg", "pdf", "png"):  # warnings are errors
        drawing.savefig(tmp_path / f"figure.{form}")


def test_table_1_of_a_log():
    config = default_config()
    config.data.cache_dir = ""
    config.data.synthetic.num_users, config.data.synthetic.num_items = 300, 80
    dataset = load_dataset(config.data)
    table = table_1a(dataset).set_index("family")
    assert list(table.index) == ["pop33", "pop2060", "pop1080", "seq33", "seq2060", "seq1080"]
    for name in table.index:
        family = build_family(dataset, name)
        users = 100 * family.membership.mean(axis=0)
        rows = 100 * dataset.train_lengths @ family.membership / dataset.train_lengths.sum()
        assert table.loc[name, "groups"] == "/".join(family.groups)
        assert table.loc[name, "usplit %"] == " / ".join(f"{share:.2f}" for share in users)
        assert table.loc[name, "dsplit %"] == " / ".join(f"{share:.2f}" for share in rows)
    counts = table_1b(dataset)
    assert counts.to_dict("records") == [
        {
            "1b": "synthetic",
            **{key: dataset.counts[key] for key in ("users", "items", "interactions")},
        }
    ]
