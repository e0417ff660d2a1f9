import numpy as np
import pandas as pd
import pytest

from seqfair_jax.paper import claims
from seqfair_jax.paper.choice import Entry

USERS = 60


def entry(method, family, shift, seeds=1):
    """Half of the users gain 0.1 + shift, the other half shift, with noise that all share."""
    rng = np.random.default_rng(0)
    base, noise = rng.random(USERS), rng.normal(0, 1e-3, USERS)
    per_user = pd.DataFrame(
        {
            "user_id": np.arange(USERS),
            "target_item_id": 7,
            "repeat": np.arange(USERS) % 3 == 0,
            "rank": 1,
            "NDCG@20": base + shift * (1 + noise) + 0.1 * (np.arange(USERS) % 2) * (shift > 0),
            "pop33": np.where(np.arange(USERS) % 2, "niche", "popular"),
            "pop33*seq33": "all",
        }
    )
    return Entry(method, family, {}, [], dict.fromkeys(range(seeds), per_user))


ENTRIES = [
    entry("erm", "", 0.0),
    entry("ipw", "pop33", 0.5),
    entry("gdro", "pop33", 0.02),
    entry("gdro", "seq33", 0.01),
    entry("sdro", "pop33", 0.02),
    entry("cvar", "", -0.03, seeds=2),
]


def test_who_is_compared_with_whom_and_by_how_much():
    table = claims.compare_methods(ENTRIES, "NDCG@20")
    pairs = table.drop_duplicates(["claim", "name", "against"])
    assert list(zip(pairs["claim"], pairs["name"], pairs["against"], strict=True)) == [
        ("DRO against ERM", "gdro(pop33)", "erm"),
        ("DRO against ERM", "gdro(seq33)", "erm"),
        ("DRO against ERM", "sdro(pop33)", "erm"),
        ("DRO against ERM", "cvar", "erm"),
        ("CVaR against group methods", "cvar", "gdro(pop33)"),
        ("CVaR against group methods", "cvar", "gdro(seq33)"),
        ("CVaR against group methods", "cvar", "sdro(pop33)"),
        ("Loss family", "gdro(seq33)", "gdro(pop33)"),
    ]
    at = table.set_index(["name", "against", "slice"])["difference"]
    assert at["gdro(pop33)", "erm", "pop33=niche"] == pytest.approx(0.12, abs=1e-4)
    assert at["gdro(pop33)", "erm", "pop33=popular"] == pytest.approx(0.02, abs=1e-4)
    assert at["cvar", "gdro(pop33)", "overall"] == pytest.approx(-0.03 - 0.07, abs=1e-4)
    assert at["gdro(seq33)", "gdro(pop33)", "overall"] == pytest.approx(-0.01, abs=1e-4)
    # q is over all claims at once, so never below p and in the order of p.
    assert (table["q"] >= table["p"]).all()
    assert table.sort_values("p")["q"].is_monotonic_increasing


def test_claims_as_markdown():
    text = claims.page(claims.compare_methods(ENTRIES, "NDCG@20"))
    assert text.count("## ") == 3
    assert "pop33*seq33" not in text
    line = next(line for line in text.splitlines() if line.startswith("| gdro(seq33) - gdro"))
    cells = [cell.strip() for cell in line.split("|")[2:-1]]
    assert cells[0] == "-0.0100* (-0.0100 to -0.0100)"
    header = next(line for line in text.splitlines() if line.startswith("|  |"))
    assert [cell.strip() for cell in header.split("|")[2:-1]] == [
        "overall", "target=repeat", "target=new", "pop33=niche", "pop33=popular",
    ]  # fmt: skip
    assert len(cells) == 5


def test_names_from_data_and_missing_slices_in_markdown():
    table = pd.DataFrame(
        {
            "claim": "DRO against ERM",
            "name": ["gdro(R%26D%2A)", "gdro(R%26D%2A)", "cvar"],
            "against": "erm",
            "slice": ["overall", "R%26D%2A=a*b|c", "overall"],
            "difference": [0.1, 0.2, 0.3],
            "low": 0.0,
            "high": 0.4,
            "star": [False, True, False],
        }
    )
    lines = claims.page(table).splitlines()
    start = lines.index(r"|  | overall | R&D\*=a\*b\|c |")
    assert lines[start + 2 : start + 4] == [
        r"| gdro(R&D\*) - erm | +0.1000 (+0.0000 to +0.4000) | +0.2000* (+0.0000 to +0.4000) |",
        "| cvar - erm | +0.3000 (+0.0000 to +0.4000) | - |",
    ]


def test_without_dro_methods_there_is_nothing_to_compare():
    table = claims.compare_methods(ENTRIES[:2], "NDCG@20")
    assert table.empty
    assert "##" not in claims.page(table)
