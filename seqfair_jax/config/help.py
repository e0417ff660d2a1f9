"""The settings as text: for a command's help, and for docs/settings.md."""

import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from seqfair_jax.config.files import shipped, summary
from seqfair_jax.config.keys import PARTS
from seqfair_jax.config.runs import format_value
from seqfair_jax.settings import Setting

_WIDTH = 79


def shipped_configs() -> str:
    """The shipped configs, a line each."""
    return "\n".join(f"  {name:<13}  {_plain(summary(path))}" for name, path in shipped().items())


def indented(text: str) -> str:
    """A config's description for a terminal: indented, its plain paragraphs filled.

    A paragraph with an indented line, such as a command, or with a list keeps its lines.
    """
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        if not re.search(r"^(?:\s|[-*>|#]|\d+[.)]\s)", paragraph, re.MULTILINE):
            paragraph = textwrap.fill(
                paragraph, _WIDTH - 2, break_long_words=False, break_on_hyphens=False
            )
        paragraphs.append(textwrap.indent(paragraph, "  "))
    return "\n\n".join(paragraphs)


def settings_text(settings: Iterable[Setting], values: Mapping[str, Any] | None = None) -> str:
    """Settings with their value, what it may be, and what it means, for a terminal.

    Args:
        settings: in the order of a part (`keys.PARTS`).
        values: a config's values by dotted key; by default the defaults.
    """
    lines = []
    for title, members in _by_part(settings):
        lines += ["", f"{title}:"]
        for setting in members:
            if values is None:
                value = "default: " + shown_default(setting)
            else:
                here = values[setting.key]
                is_default = here == setting.default
                value = "here: " + (shown_default(setting) if is_default else _shown(here))
            head = f"{setting.key} ({value}; {setting.expected})"
            lines += textwrap.wrap(
                head, _WIDTH, initial_indent="  ", subsequent_indent=" " * 8,
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
            meaning = _plain(setting.help)
            indent = " " * 6
            lines += textwrap.wrap(
                meaning, _WIDTH, initial_indent=indent, subsequent_indent=indent,
                break_long_words=False, break_on_hyphens=False,
            )  # fmt: skip
    return "\n".join(lines[1:])


def page(settings: Iterable[Setting]) -> str:
    """The text of docs/settings.md, for all settings."""
    lines = [
        "# Settings",
        "",
        "<!-- Written by `make settings` from the package. Do not edit. -->",
        "",
        "This page lists every setting of a run, and below them those of a search and of a sweep.",
        "`seqfair train --help`, `seqfair search --help` and `seqfair reproduce --help` print the",
        "same. With `--config=NAME` they print the values of that config instead of the defaults.",
        "",
        "Set a value with `--config.KEY=VALUE`. A list has commas and no spaces:",
        "`--config.seeds=0,1,2`. An unknown key is an error that names the closest known key.",
        "Paths may start with `~`. A setting marked with \\* may differ when a run is resumed.",
    ]
    for title, members in _by_part(settings):
        lines += ["", f"## {title}", ""]
        lines += ["| key | default | values | meaning |", "|---|---|---|---|"]
        for setting in members:
            mark = "\\*" if setting.resumable else ""
            cells = (
                f"`{setting.key}`{mark}",
                _cell(shown_default(setting)),
                _cell(setting.expected),
                _cell(setting.help),
            )
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def shown_default(setting: Setting) -> str:
    """A setting's default in words."""
    return _shown(setting.default) if setting.shown is None else setting.shown


def _by_part(settings: Iterable[Setting]) -> Iterator[tuple[str, list[Setting]]]:
    members: dict[str, list[Setting]] = {}
    for setting in settings:
        members.setdefault(setting.key.rpartition(".")[0], []).append(setting)
    for part, title in PARTS.items():
        if part in members:
            yield title, members[part]


def _shown(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        return ",".join(map(_shown, value)) or "empty"
    if isinstance(value, float):
        return format_value(value)
    return str(value) or "empty"


def _plain(text: str) -> str:
    return text.replace("`", "")


def _cell(text: str) -> str:
    """A text as a cell of a Markdown table. What is in backticks stays as it is."""
    parts = re.split(r"(`[^`]*`)", text)
    parts[::2] = [re.sub(r"([\\*_<>\[\]#~])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts).replace("|", "\\|")
