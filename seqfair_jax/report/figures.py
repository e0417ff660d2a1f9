"""The figures of reports: forest plots, curves, bars; names from data are plain text."""

import base64
import io
import textwrap
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from seqfair_jax.evaluation.slices import printable

# Okabe and Ito's colours, which colour-blind readers can distinguish.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_DASHES = ("", "6 2", "1.5 2")  # of lines, as SVG writes them: further lines of a colour
_HATCHES = ("", "////", "....")  # of bars: further bars of a colour
_MARKERS = "osD^v<>p"
_PANEL = (4.0, 2.3)  # inches
_FOREST_WIDTH = 5.0  # inches
_LINE, _BLOCK = 0.13, 0.2  # inches from method to method, and further to the next group
_CHARACTER = 0.075  # inches that a character of the small font takes


class Style(NamedTuple):
    """How a line is drawn."""

    colour: str
    dash: str  # `stroke-dasharray`
    marker: str


class Interval(NamedTuple):
    """A line of a forest plot."""

    value: float
    low: float
    high: float
    filled: bool


def style(number: int) -> Style:
    """The style of the n-th line; the first 24 differ."""
    dash = _DASHES[number // len(_COLOURS) % len(_DASHES)]
    return Style(colour(number), dash, _MARKERS[number % len(_MARKERS)])


def colour(number: int) -> str:
    """The colour of the n-th line or bar."""
    return _COLOURS[number % len(_COLOURS)]


def fold(text: str, width: int, max_lines: int = 2) -> str:
    """A name in lines of at most `width` characters; one that is too long ends in an ellipsis."""
    text = printable(text)
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)  # they take twice the place
    width = max(width * len(text) // (len(text) + wide), 4) if text else width
    return "\n".join(textwrap.wrap(text, width, max_lines=max_lines, placeholder=" …"))


def _shorten(text: str, width: int) -> str:
    """A name of at most `width` characters; a longer one loses its middle."""
    text = printable(text)
    if len(text) <= width:
        return text
    return text[: width - width // 2 - 1] + "…" + text[-(width // 2) :]


def curves(
    lines: Sequence[tuple[int, np.ndarray, np.ndarray]],
    xlabel: str,
    *,
    is_log: bool = False,
    marked: bool = False,
) -> Figure:
    """Lines over the same axis.

    Args:
        lines: of each the number of its style, and its points.
        xlabel: of the axis.
        is_log: whether the axis is logarithmic.
        marked: whether the points are few and have a marker; without it they are epochs, and a
            single one has a marker.
    """
    figure = Figure(figsize=_PANEL)
    axes = figure.add_axes((0.13, 0.2, 0.84, 0.75))  # a fixed place is much quicker than a layout
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.margins(0.03, 0.08)
    for number, x, y in lines:
        look = style(number)
        dashes = tuple(map(float, look.dash.split()))
        axes.plot(
            x, y, color=look.colour, lw=1.6, ms=4,
            ls=(0, dashes) if dashes else "-",
            marker=look.marker if marked or len(x) == 1 else "",
        )  # fmt: skip
    if is_log:
        axes.set_xscale("log")
    elif not marked:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.set_xlabel(printable(xlabel), fontsize=8, parse_math=False)
    axes.locator_params(axis="y", nbins=5)
    return figure


def forest(
    groups: Sequence[str], intervals: Sequence[Mapping[int, Interval]], *, zero: bool = True
) -> Figure:
    """Figures with their intervals: a block for each group, a line for each method.

    Args:
        groups: the names, from the top.
        intervals: for each group, by the number of a method's style. An interval may be NaN.
        zero: whether to draw a line at 0, as for differences.
    """
    heights = [_BLOCK + _LINE * len(block) for block in intervals]
    figure = Figure(figsize=(_FOREST_WIDTH, sum(heights) + 0.5))
    total = figure.get_figheight()
    axes = figure.add_axes((0.27, 0.42 / total, 0.7, 1 - 0.47 / total))
    top, centres = 0.0, []
    for number, (block, height) in enumerate(zip(intervals, heights, strict=True)):
        if number % 2:
            axes.axhspan(-top, -top - height, color="0.95", zorder=0, lw=0)
        for place, (method, line) in enumerate(block.items()):
            y = -top - _BLOCK / 2 - _LINE * (place + 0.5)
            look = style(method)
            axes.hlines(y, line.low, line.high, color=look.colour, lw=1.4)
            axes.plot(
                [line.value], [y], look.marker, ms=4.5, color=look.colour,
                mfc=look.colour if line.filled else "white",
            )  # fmt: skip
        centres.append(-top - height / 2)
        top += height
    if zero:
        axes.axvline(0, color="black", lw=0.8)
    axes.set_ylim(-top, 0)
    axes.set_yticks(centres, [fold(name, 17, 3) for name in groups], parse_math=False)
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.spines[["top", "right", "left"]].set_visible(False)
    return figure


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
        number: of the colour and pattern; the first 24 differ.
        width: of a bar.

    Returns:
        the bars, for a legend, and all ends of bars and intervals.
    """
    scale = 100 / rows["baseline"].where(rows["baseline"] > 0)
    change, low, high = (rows[name] * scale for name in ("difference", "low", "high"))
    hatch = _HATCHES[number // len(_COLOURS) % len(_HATCHES)]
    bars: Any = axes.bar(
        places,
        change,
        width,
        color=colour(number),
        alpha=0.85,
        hatch=hatch,
        edgecolor="white",
        lw=0,
    )
    axes.vlines(places, low, high, color="black", linewidth=1)
    return bars, pd.concat([change, low, high]).dropna().tolist()


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
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
