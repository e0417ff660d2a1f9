"""The paper's three claims (section 1) as paired comparisons between a sweep's methods."""

from collections.abc import Sequence

import pandas as pd

from seqfair_jax.data.groups import is_product
from seqfair_jax.evaluation import significance, slices
from seqfair_jax.objectives import METHODS
from seqfair_jax.paper.choice import Entry
from seqfair_jax.report import names, text

CLAIMS = {
    "DRO against ERM": "DRO methods beat ERM in groups and over all",
    "CVaR against group methods": "CVaR, which sees no groups, beats GDRO and SDRO",
    "Loss family": "group methods are sensitive to the family in the loss",
}


def compare_methods(entries: Sequence[Entry], metric: str) -> pd.DataFrame:
    """Test the methods that each claim compares.

    The DRO methods against ERM; CVaR against every group DRO run; and a group DRO method with
    any other loss family against the same method with its first family.

    Args:
        entries: from `choice.choose`, ERM among them.
        metric: such as NDCG@20.

    Returns:
        columns claim, name (the method that the claim favours), against, and the other columns of
        `significance.compare`; q is over the whole table.
    """
    found = []
    for claim, pairs in zip(CLAIMS, _pairs(entries), strict=True):
        for favourites, against in pairs:
            if not favourites:
                continue
            per_user = {entry.name: entry.per_user for entry in favourites}
            rows = significance.compare(per_user, against.per_user, metric)
            found.append(rows.assign(claim=claim, against=against.name))
    table = pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["slice", "p"])
    table["q"] = significance.false_discovery_rates(table["p"])
    first = ["claim", "name", "against"]
    return table.reindex(columns=[*first, *(c for c in table if c not in first)])


def _pairs(entries: Sequence[Entry]) -> tuple[list[tuple[list[Entry], Entry]], ...]:
    """For each claim, the entries to be compared with another one."""
    dro = [entry for entry in entries if METHODS[entry.method].is_robust]
    grouped = [entry for entry in dro if METHODS[entry.method].needs_groups]
    erm = [(dro, entry) for entry in entries if entry.method == "erm"]
    cvar = [entry for entry in dro if entry.method == "cvar"]
    families: dict[str, list[Entry]] = {}
    for entry in grouped:
        families.setdefault(entry.method, []).append(entry)
    return erm, [(cvar, entry) for entry in grouped], [(f[1:], f[0]) for f in families.values()]


def page(table: pd.DataFrame) -> str:
    """The comparisons as Markdown: a section a claim, a row a pair, differences by slice."""
    shown = [
        name for name in dict.fromkeys(table["slice"]) if not is_product(slices.parse(name).family)
    ]
    parts = [
        "Differences (first minus second), with the 95 % interval over users; "
        "\\* two-sided paired t-test over users, p < 0.05. A user's value is its mean over the "
        "seeds that both have, so the interval covers other users, not other seeds.\n"
    ]
    header = ["", *map(slices.full_label, shown)]
    for claim, rows in table.groupby("claim", sort=False):
        body = []
        for (name, against), pair in rows.groupby(["name", "against"], sort=False):
            at = pair.set_index("slice").reindex(shown)
            label = " - ".join(names.decode_key(str(side)) for side in (name, against))
            body.append([label, *(_cell(row) for _, row in at.iterrows())])
        parts += [f"## {claim}\n", f"Claim: {CLAIMS[str(claim)]}.\n"]
        parts += [text.markdown_table(header, body), ""]
    return "\n".join(parts)


def _cell(row: pd.Series) -> text.Markdown:
    if pd.isna(row["difference"]):  # a slice that this pair lacks
        return text.Markdown("-")
    star = "*" if row["star"] else ""
    interval = "" if pd.isna(row["low"]) else f" ({row['low']:+.4f} to {row['high']:+.4f})"
    return text.Markdown(f"{row['difference']:+.4f}{star}{interval}")
