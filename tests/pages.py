"""What the tests of the documentation share: its pages, their code, and the commands in it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from seqfair_jax.config import help
from seqfair_jax.config.keys import settings
from seqfair_jax.sweeps.grid import sweep_settings
from seqfair_jax.sweeps.search_plan import search_settings

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path
    for pattern in (
        "*.md", "docs/*.md", "docs/api/*.md", "docs/results/README.md", "third_party_data/*.md"
    )
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"  # it names what was removed
)  # fmt: skip
CALL = re.compile(r"\bseqfair [a-z]|python3? -m (?:seqfair_jax|benchmarks)")
_PROGRAMS = ("python", "python3", "seqfair", "pip", "make", "pre-commit", "curl")
_FENCED = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"(?:\A|\n\n)((?: {4}.*\n|\n(?= {4}))+)")
_STUB = """#!/bin/sh
exec {python} -ISc 'import json, sys; print(json.dumps(sys.argv[1:]))' {name} "$@"
"""


def settings_page():
    """The text of docs/settings.md."""
    return help.page([*settings(), *search_settings(), *sweep_settings()])


class DocsError(Exception):
    """What is wrong with a page."""


class Block(NamedTuple):
    """A code block."""

    language: str  # "" if the page does not say
    text: str


def page_id(page):
    """What a test calls a page."""
    return str(page.relative_to(ROOT))


def code_blocks(text):
    """The fenced and the indented code blocks of a page, in order."""
    found = {match.start(): Block(match[1], match[2]) for match in _FENCED.finditer(text)}
    # Of the same length, so that the places of the indented blocks stay.
    rest = _FENCED.sub(lambda match: re.sub(r"[^\n]", "-", match[0]), text)
    for match in _INDENTED.finditer(rest):
        found[match.start()] = Block("", match[1])
    return [found[place] for place in sorted(found)]


def write_stubs(folder):
    """Programs that print their arguments, in a folder to run shell in."""
    for part in ("", "launch", ".venv/bin"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for name in _PROGRAMS:
        for path in (folder / name, folder / ".venv/bin" / name):
            path.write_text(_STUB.format(python=sys.executable, name=name))
            path.chmod(0o755)
    (folder / ".venv/bin/activate").touch()
    (folder / "bash").symlink_to(shutil.which("bash"))
    # They start the command after their own arguments.
    launchers = {"launch/local.sh": "shift", "sbatch": 'while [ "$1" != seqfair ]; do shift; done'}
    for name, skip in launchers.items():
        (folder / name).write_text(f'#!/bin/sh\n{skip}\nexec "$@"\n')
        (folder / name).chmod(0o755)
    return folder


def commands(shell, stubs):
    """The argument lists of the programs that a piece of shell calls.

    The shell runs with stubs in place of the programs. So loops and variables are expanded by the
    shell itself, and nothing is trained.
    """
    result = subprocess.run(
        [shutil.which("bash"), "-c", shell],
        cwd=stubs, env={"PATH": str(stubs)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if result.returncode:
        raise DocsError(f"{shell}\n{result.stderr}")
    return [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
