import html
import json
import re
import shutil
import subprocess

import pandas as pd
import pytest
from test_run import small

from seqfair_jax.evaluation import slices
from seqfair_jax.report import html as html_report
from seqfair_jax.report import runs, text
from seqfair_jax.training import selection
from seqfair_jax.run import run


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    run(small(), folder / "erm")
    run(small("cvar", **{"objective.alpha": (0.2, 0.5)}), folder / "cvar")
    run(small("gdro"), folder / "gdro")
    return [folder / name for name in ("erm", "cvar", "gdro")]


def test_comparison_with_a_baseline(folders):
    rows = runs.compare_folders(folders, folders[0], "NDCG@20")
    text = text.comparison(rows, folders[0], "NDCG@20", "seq33")
    assert f"NDCG@20 against {folders[0]}" in text
    assert "seq33=short" in text
    assert "pop33=" not in text
    lines = [line.split() for line in text.splitlines() if "cvar alpha=0.5 " in line]
    means = [
        pd.read_parquet(folder / "per_user.parquet")["NDCG@20"].mean()
        for folder in (folders[0], folders[1] / "runs" / "alpha=0.5,seed=0")
    ]
    overall = next(line for line in lines if line[2] == "overall")
    assert float(overall[4]) == pytest.approx(means[1] - means[0], abs=5e-5)
    with pytest.raises(ValueError, match=r"holds several methods: cvar alpha=0.2, cvar alpha=0.5"):
        runs.compare_folders(folders, folders[1], "NDCG@20")
    with pytest.raises(ValueError, match="at least one other folder"):
        runs.compare_folders(folders[:1], folders[0], "NDCG@20")


def test_the_html_report_holds_the_table_and_needs_no_network(folders, tmp_path):
    path = tmp_path / "new" / "report.html"
    rows = runs.compare_folders(folders, folders[0], "NDCG@20")
    html_report.write(folders, path, "NDCG@20", rows=rows)
    page = path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]
    assert not re.findall(r"(?:src|href)=[\"'](?!data:)", page)
    summary = json.loads((folders[2] / "summary.json").read_text())
    for name in ("overall", "pop33=niche", "seq33=long", "target=repeat"):
        assert f"{summary['test']['NDCG@20'][name]:.4f}" in page
    for heading in ("Group weights", "in the tail", "Hyperparameters", "Differences", "Settings"):
        assert heading in page
    assert page.count("[interleaved]") == 2
    html_report.write(folders, tmp_path / "again.html", "NDCG@20", rows=rows)
    assert (tmp_path / "again.html").read_text() == page
    html_report.write(folders, path, "NDCG@20", family="pop33")
    assert "seq33=" not in path.read_text().split("<h2>Settings")[0]
    assert "Differences" not in path.read_text()


def test_best_second_and_stars_by_hand():
    numbers = pd.DataFrame(
        {
            "name": ["a", "b", "c", "[markov]"],
            "seeds": [2, 1, 1, 1],
            "pop33=niche": [0.1, 0.3, 0.3, 0.9],
            "pop33=niche ±": [0.05, float("nan"), float("nan"), float("nan")],
        }
    )
    rows = pd.DataFrame({"name": ["a"], "slice": ["pop33=niche"], "star": [True]})
    cells = re.findall(r"<td.*?>(.*?)</td>", html_report._results(numbers, rows, "pop33"))
    assert cells[1::2] == [
        '<span class="second">0.1000</span>* <span class="half">±0.0500</span>',
        '<span class="best">0.3000</span>',
        '<span class="best">0.3000</span>',
        '<span class="">0.9000</span>',
    ]


def copied(folder, target, *, seed=0, **changes):
    """A run's folder again, as if trained with another seed and other settings."""
    shutil.copytree(folder, target)
    for name in ("config", "summary"):
        path = target / f"{name}.json"
        found = json.loads(path.read_text())
        if name == "summary":
            found["seed"] = seed
        for key, value in changes.items():
            if name == "config":
                found["train"][key] = value
        path.write_text(json.dumps(found))
    return target


def test_only_runs_that_differ_in_the_seed_share_a_row(folders, tmp_path):
    erm, cvar, gdro = folders
    second = copied(erm, tmp_path / "second", seed=1, segment_seconds=9.0)
    fast = copied(erm, tmp_path / "fast", learning_rate=0.5)
    text = text.tables([erm, second, fast, gdro], "NDCG@20", family="pop33")
    lines = [line for line in text.splitlines() if line.startswith("erm")]
    assert [re.split(r" +0\.\d{4}", line, maxsplit=1)[0] for line in lines] == [
        "erm train.learning_rate=0.001 (2 seeds)",
        "erm train.learning_rate=0.001, best worst group (2 seeds)",
        "erm train.learning_rate=0.5",
        "erm train.learning_rate=0.5, best worst group",
    ]
    rows = runs.compare_folders([gdro, fast], second, "NDCG@20")
    assert set(rows["name"].str.partition(",")[0]) == {
        "gdro (pop33) step_size=0.01", "erm train.learning_rate=0.5",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"are the same training \(erm, seed 0\)"):
        text.tables([erm, copied(erm, tmp_path / "again")], "NDCG@20")
    # A grid and a run of it: the run is the baseline, the others are told from it.
    rows = runs.compare_folders([cvar], cvar / "runs" / "alpha=0.5,seed=0", "NDCG@20")
    assert set(rows["name"]) == {"cvar alpha=0.2", "cvar alpha=0.2, best worst group"}
    # Another seed of the baseline's method is the baseline's, not a method to test.
    with pytest.raises(ValueError, match="at least one other folder"):
        runs.compare_folders([erm, second], erm, "NDCG@20")


def test_every_run_must_have_what_is_shown(folders, tmp_path):
    other = tmp_path / "other"
    run(small("chi2", groups=("seq33",), **{"evaluate.cutoffs": (5,), "train.epochs": 1}), other)
    assert ", pop33" not in text.tables([folders[0], other], "NDCG@20")
    with pytest.raises(ValueError, match=r"other: family 'pop33' was not evaluated; there are seq"):
        text.tables([folders[0], other], "NDCG@20", family="pop33")
    with pytest.raises(ValueError, match=r"erm: NDCG@5 was not evaluated; there are NDCG@20"):
        text.tables([other, folders[0]], "NDCG@5")
    html_report.write([folders[0], other], tmp_path / "report.html", "NDCG@20")


def test_results_of_another_version_are_refused(folders, tmp_path):
    old = copied(folders[0], tmp_path / "old")
    summary = json.loads((old / "summary.json").read_text())
    (old / "summary.json").write_text(json.dumps(summary | {"schema_version": 1}))
    with pytest.raises(ValueError, match="schema_version 1, this version reads 2"):
        text.tables([old], "NDCG@20")


def test_a_group_may_be_called_new():
    slices = ["tenure=new", "tenure=old", "overall", "tenure/min", "target=repeat", "target=new"]
    assert slices.labels(slices, "tenure") == [
        "tenure=new", "old", "overall", "worst", "repeat", "target=new",
    ]  # fmt: skip


def test_values_that_miss_a_seed_are_no_candidates():
    assert selection.best_values({"lucky": [0.9], "whole": [0.2, 0.4], "other": [0.1, 0.1]}) == "whole"
    assert selection.best_values({"only": [0.9], "none": []}) == "only"
    assert selection.best_values({"none": []}) is None


def test_no_sideways_scrolling(folders, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    rows = runs.compare_folders(folders, folders[0], "NDCG@20")
    html_report.write(folders, tmp_path / "report.html", "NDCG@20", rows=rows)
    page = html.escape((tmp_path / "report.html").read_text(), quote=True)
    frames = "".join(
        f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{page}"></iframe>'
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
    found = re.search(r"widths (\d+) (\d+) end</p>", dom)
    assert found is not None
    assert found.groups() == ("0", "0")
