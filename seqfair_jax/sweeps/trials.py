"""The results of a search: its trials as a table, and as a page."""

import math
import shlex
from collections.abc import Sequence
from typing import Any, Protocol

import pandas as pd

from seqfair_jax.report import text
from seqfair_jax.sweeps.space import shown

FIGURES, ERROR = "figures", "error"  # attributes of a trial
FINISHED, PRUNED, FAILED, UNFINISHED = "finished", "pruned", "failed", "unfinished"
STATES = (FINISHED, PRUNED, FAILED, UNFINISHED)
_STATES = {"COMPLETE": FINISHED, "PRUNED": PRUNED, "FAIL": FAILED}
_FORMATS = {"epoch": "{:.0f}", "epochs": "{:.0f}", "seconds": "{:.0f}"}
_SHOWN = 20  # trials in the page; the table has all


class Trial(Protocol):
    """What is read of Optuna's `FrozenTrial`."""

    number: int
    state: Any
    params: dict[str, Any]
    user_attrs: dict[str, Any]


def state(trial: Trial) -> str:
    """A trial's state in words."""
    return _STATES.get(trial.state.name, UNFINISHED)


def table(found: Sequence[Trial], points: Sequence[dict[str, Any]], metric: str) -> pd.DataFrame:
    """A row for each trial, in their order: its state, figures, values and error.

    The figures are of the best epoch of a trial by the search's rule, each a mean over seeds.

    Args:
        found: the trials.
        points: their values.
        metric: that selects, such as NDCG@20.
    """
    rows = []
    for trial, point in zip(found, points, strict=True):
        figures = trial.user_attrs.get(FIGURES, {})
        rows.append(
            {
                "trial": trial.number,
                "state": state(trial),
                f"val {metric}": figures.get("overall", math.nan),
                "worst group": figures.get("worst_group", math.nan),
                "epoch": figures.get("epoch", math.nan),
                "epochs": figures.get("epochs", math.nan),
                "seconds": figures.get("seconds", math.nan),
                **point,
                "error": trial.user_attrs.get(ERROR, ""),
            }
        )
    columns = ["trial", "state", f"val {metric}", "worst group", "epoch", "epochs", "seconds"]
    return pd.DataFrame(rows, columns=[*columns, *(points[0] if points else ()), "error"])


def page(
    found: pd.DataFrame, keys: Sequence[str], *, title: str, by: str, command: str | None
) -> str:
    """The finished trials as Markdown, best first, the counts of the others, and the best command.

    Args:
        found: from `table`.
        keys: of the space.
        title: of the page.
        by: the column that ranks, "overall" or "worst_group".
        command: that trains the best.
    """
    score = found.columns[2 if by == "overall" else 3]
    done = found[found["state"] == FINISHED]
    ranked = done.sort_values([score, "trial"], ascending=[False, True])
    columns = [name for name in map(str, found) if name not in ("state", "error")]
    rows = [
        [_cell(str(name), value, is_setting=name in keys) for name, value in row.items()]
        for row in ranked[columns].head(_SHOWN).to_dict("records")
    ]
    counts = [f"{(found['state'] == name).sum()} {name}" for name in STATES]
    parts = [
        f"# {text.escape_markdown(title)} by validation, best first",
        text.markdown_table(columns, rows),
        f"{len(found)} trials, ranked by {score}: {', '.join(counts)}. All are in `trials.csv`.",
    ]
    failed = found[found["state"] == FAILED]
    parts += [
        text.escape_markdown(f"trial {number} failed: {error}")
        for number, error in zip(failed["trial"], failed["error"], strict=True)
    ]
    if command:
        words = [shlex.quote(word) for word in shlex.split(command)]
        lines = [" ".join(words[:3]), *words[3:]]  # seqfair train --config=NAME, then a line each
        parts.append("The best:\n\n    " + " \\\n        ".join(lines))
    return "\n\n".join(parts) + "\n"


def _cell(column: str, value: Any, *, is_setting: bool) -> str:
    if is_setting:
        return shown(value)
    if column == "trial":
        return str(value)
    return "-" if math.isnan(value) else _FORMATS.get(column, "{:.4f}").format(value)
