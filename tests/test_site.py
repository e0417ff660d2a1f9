"""The documentation site builds without a warning, and loads nothing from other servers."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", f"--site-dir={folder}"],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_every_page_is_built(site):
    pages = {path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")}
    for page in pages:
        name = "index" if page.stem == "README" else page.stem
        assert (site / page.with_name(f"{name}.html")).is_file(), page


def test_nothing_is_loaded_from_another_server(site):
    for path in site.rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe)\b[^>]*\bsrc=[\"']?([^\"'> ]+)", text)
        for tag in re.findall(r"<link\b[^>]*>", text):
            if 'rel="canonical"' not in tag:
                loaded += re.findall(r"\bhref=[\"']?([^\"'> ]+)", tag)
        assert loaded, path
        assert not [link for link in loaded if "//" in link], path
    for path in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(?:https?:)?//", path.read_text(encoding="utf-8")), path


def test_the_search_finds_pages_and_functions(site):
    # As a script, so that it also works in a browser that opens the site from a folder.
    text = (site / "search/search_index.js").read_text(encoding="utf-8")
    entries = json.loads(text.removeprefix("var __index = "))["docs"]
    found = {
        entry["location"].partition("#")[0] for entry in entries if "Group DRO" in entry["text"]
    }
    assert {"objectives.html", "tutorial.html"} <= found
    assert any(entry["location"].endswith("ranking.rank_targets") for entry in entries)


def test_the_docstrings_are_on_the_pages(site):
    text = (site / "api/objectives.html").read_text(encoding="utf-8")
    assert 'id="seqfair_jax.objectives.registry.register"' in text
    assert "Make an objective known under its name." in text
    assert 'id="seqfair_jax.objectives.registry._identity"' not in text


def test_figures_in_the_page_of_objectives_are_those_of_the_results():
    objectives, results = (
        (ROOT / "docs" / name).read_text(encoding="utf-8")
        for name in ("objectives.md", "results/README.md")
    )
    figures = re.findall(r"0\.\d{4}(?: ± 0\.\d{4})?", objectives)
    assert len(figures) > 10
    for figure in figures:
        assert figure in results
