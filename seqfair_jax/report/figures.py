"""What all figures share: plain text for names from data, legends, group axes, SVG."""

import base64
import io
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from seqfair_jax.evaluation.slices import printable

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
PANEL_WIDTH = 4.2  # inches
_CHARACTER = 0.075  # inches that a character of the small font takes
_TURNED = 0.22  # inches that a turned label takes beside the next one


def colour(number: int) -> str:
    """The colour of the n-th line or bar."""
    return _COLOURS[number % len(_COLOURS)]


def fold(text: str, width: int, max_lines: int = 2) -> str:
    """A name in lines of at most `width` characters; one that is too long ends in an ellipsis."""
    return "\n".join(textwrap.wrap(printable(text), width, max_lines=max_lines, placeholder=" …"))


def _shorten(text: str, width: int) -> str:
    """A name of at most `width` characters; a longer one loses its middle."""
    text = printable(text)
    if len(text) <= width:
        return text
    return text[: width - width // 2 - 1] + "…" + text[-(width // 2) :]


def panel(title: str, *, num_groups: int = 0) -> tuple[Figure, Axes]:
    """A small figure with one plot, wide enough for an axis of groups."""
    width = max(PANEL_WIDTH, 1 + _TURNED * num_groups)
    figure = Figure(figsize=(width, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.set_title(fold(title, 50), fontsize=9, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    return figure, axes


def group_axis(axes: Axes, labels: Sequence[str], *, width: float) -> None:
    """Ticks at 0, 1, ... with the groups' names, which are turned if they would overlap.

    Args:
        axes: the plot.
        labels: the names.
        width: of the axis, in inches.
    """
    room = int(width / _CHARACTER / max(len(labels), 1)) - 1
    folded = [textwrap.wrap(printable(label), max(room, 4)) for label in labels]
    whole = [printable(label).split() for label in labels]
    fits = all(
        len(lines) <= 3 and all(len(word) <= room for word in words)
        for lines, words in zip(folded, whole, strict=True)
    )
    if fits:
        axes.set_xticks(range(len(labels)), ["\n".join(f) for f in folded], parse_math=False)
        return
    axes.set_xticks(
        range(len(labels)), [_shorten(label, 24) for label in labels],
        parse_math=False, rotation=50, ha="right", rotation_mode="anchor",
    )  # fmt: skip


def change_bars(
    axes: Axes, places: np.ndarray, rows: pd.DataFrame, number: int, *, width: float = 0.8
) -> tuple[Artist, list[float]]:
    """Bars of the percentage change against a baseline, with its interval (paper, figures 1 and 2).

    Args:
        axes: the plot.
        places: where the bars are on the axis.
        rows: columns baseline, difference, low and high, a row for each bar. A bar against a
            baseline of 0 is left out.
        number: of the colour.
        width: of a bar.

    Returns:
        the bars, for a legend, and all ends of bars and intervals.
    """
    scale = 100 / rows["baseline"].where(rows["baseline"] > 0)
    change, low, high = (rows[name] * scale for name in ("difference", "low", "high"))
    bars: Any = axes.bar(places, change, width, color=colour(number), alpha=0.85)
    axes.vlines(places, low, high, color="black", linewidth=1)
    return bars, pd.concat([change, low, high]).dropna().tolist()


def legend_below(figure: Figure, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """A legend under the plot of a `panel`, which grows by the legend's height."""
    num_columns = 1 if any(len(label) > 20 for label in labels) else 3
    num_rows = -(-len(labels) // num_columns)
    figure.set_figheight(figure.get_figheight() + 0.15 * num_rows)
    legend(figure, handles, labels, loc="outside lower center", ncols=num_columns, fontsize=7)


def legend(figure: Figure, handles: Sequence[Any], labels: Sequence[str], **style: Any) -> None:
    """A legend with plain text: `$` is no formula, and a name may begin with `_`."""
    # matplotlib hides names that begin with `_`, so the texts are set afterwards.
    box = figure.legend(list(handles), [" "] * len(handles), frameon=False, **style)
    for text, label in zip(box.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(fold(label, 36))


def svg_uri(figure: Figure, alt: str) -> str:
    """The figure as the address of an image that is part of the page."""
    buffer = io.BytesIO()
    settings: dict[Any, Any] = {
        "svg.hashsalt": alt,  # otherwise the ids differ each time
        "svg.fonttype": "none",  # text, for which a browser has more fonts than matplotlib
    }
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        # Tight: the layout alone would cut a turned label that reaches beyond the left edge.
        figure.savefig(buffer, format="svg", metadata={"Date": None}, bbox_inches="tight")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
