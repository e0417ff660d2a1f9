"""The documentation names commands, flags, settings, configs and files that exist.

A code block that calls the package runs in bash with stub programs, which print their arguments.
So loops and variables are expanded by the shell itself, and nothing is trained.
"""

import re

import pytest
from pages import (
    CALL,
    PAGES,
    ROOT,
    DocsError,
    code_blocks,
    commands,
    page_id,
    settings_page,
    write_stubs,
)

from seqfair_jax import __main__ as seqfair
from seqfair_jax import cli
from seqfair_jax.commands import train
from seqfair_jax.config import default_config, flatten, resolve
from seqfair_jax.errors import UserError
from seqfair_jax.sweeps import grid, search_plan, space

PACKAGE = ROOT / "seqfair_jax"


def spans(text):
    """The inline code of a page."""
    prose = re.sub(r"^```.*?^```|^ {4}[^\n]*$", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


def check_block(shell, stubs):
    """Check every command of a piece of shell."""
    found = commands(shell, stubs)
    if not found:
        raise DocsError(f"{shell}: no command was called")
    for words in found:
        check_command(words)


def check_command(words):
    """Check a command line's program, flags, config and settings."""
    match words:
        case ["seqfair" | "python" | "python3", *_] if "..." in words:
            raise DocsError(f"{words}: incomplete")
        case ["seqfair", *rest] | ["python" | "python3", "-m", "seqfair_jax", *rest]:
            check_call(rest)
        case ["python" | "python3", "-m", "seqfair_jax.main", *rest]:
            check_call(["train", *rest])
        case ["python" | "python3", "-m", module, *rest] if module.startswith("seqfair_jax"):
            raise DocsError(f"{module} is no command")
        case ["python" | "python3", "-m", module, *rest] if module.startswith("benchmarks."):
            check_benchmark(module, rest)
        case ["python" | "python3", "launch/ray_sweep.py", *rest]:
            check_ray_sweep(rest)
        case ["make", target] if not re.search(rf"^{target}:", _read("Makefile"), re.MULTILINE):
            raise DocsError(f"make {target}: no such target")


def check_call(arguments):
    """Parse a command's arguments by its own parser, and check the config that comes out."""
    parsed = []

    def parse(command, argv, _work):
        parsed.append((command, *command._parse(list(argv))))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(cli.Command, "run", parse)
        # There is no run to take the settings of a refit from.
        patch.setattr(train, "judged_settings", lambda *_, **__: default_config())
        try:
            seqfair.main(arguments)
        except (UserError, SystemExit) as error:
            if error.args != (0,):  # --help
                raise DocsError(f"{arguments}: {error}") from None
        for command, flags, rest in parsed:
            try:
                # `evaluate` takes a run or a log.
                if "workdir" in flags and (arguments[0] != "evaluate" or rest is None):
                    command.required("workdir")
                if hasattr(rest, "to_dict"):
                    check_config(rest)
                elif arguments[0] == "report" and not rest:
                    raise DocsError("names no folder")
            except UserError as error:
                raise DocsError(f"{arguments}: {error}") from None


def check_config(config):
    """Check a config's values, with its sweep or search."""
    if "sweep" in config:
        resolve(grid.split_sweep(config)[0])
    elif "search" in config:
        resolve(search_plan.split_search(config).base)
    else:
        resolve(config)


def check_ray_sweep(words):
    """Check the launcher's own flags, and the command after them."""
    place = words.index("seqfair")
    source = _read("launch/ray_sweep.py")
    for word in words[:place]:
        if f'"{word.partition("=")[0]}"' not in source:
            raise DocsError(f"launch/ray_sweep.py has no flag {word}")
    check_call(words[place + 1 :])


def check_benchmark(module, arguments):
    """Check a benchmark's name, config and flags."""
    path = ROOT / f"{module.replace('.', '/')}.py"
    if not path.is_file():
        raise DocsError(f"{module} does not exist")
    source = path.read_text() + _read("benchmarks/common.py")
    for word in arguments:
        name = re.match(r"--(\w+)", word)[1]
        if not re.search(rf"\b{name}\b", source):
            raise DocsError(f"{module} has no flag --{name}")
    given = [word for word in arguments if word.startswith("--config")]
    if given:
        check_call(["train", "--workdir=DIR", *given])


def check_span(span, stubs):
    """Check a command, a flag or a path in inline code."""
    if CALL.search(span):
        for words in commands(span.removesuffix(" ..."), stubs):
            has_arguments = len(words) > (2 if words[0] == "seqfair" else 3)
            check_command(words if has_arguments else [*words, "--help"])
    elif match := re.fullmatch(r"(?:--config\.)?((?:\w+\.)*\w+)(?:=.*)?", span):
        key = match[1]
        is_setting = span.startswith("--config.") or key.split(".")[0] in _settings_parts()
        if is_setting and "." in key and not span.endswith(_FILE_ENDINGS) and not _is_key(key):
            raise DocsError(f"{span}: no such setting")
    elif match := re.match(r"(configs/\w+\.py\S*)", span):
        check_call(["train", "--workdir=DIR", f"--config={match[1]}"])
    if re.fullmatch(r"(?:configs|docs|tests|benchmarks|launch|seqfair_jax)/[\w/.-]*", span):
        check_path(span)


_FILE_ENDINGS = (".py", ".json", ".md", ".csv", ".parquet", ".jsonl", ".txt")


def check_path(path):
    """Check that a path of the repository or of the package exists."""
    if not (ROOT / path).exists() and not (PACKAGE / path).exists():
        raise DocsError(f"{path} does not exist")


def check_links(text, folder):
    """Check a page's relative links, and those to its own headings."""
    anchors = {
        re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        if "://" in link:
            continue
        if target and not (folder / target).exists():
            raise DocsError(f"link to {link}: no such file")
        if not target and anchor not in anchors:
            raise DocsError(f"link to {link}: no such heading")


def known_keys():
    """Every setting of a run, a sweep and a search."""
    keys = {key for key, _ in flatten(default_config().to_dict())}
    keys |= {f"sweep.{key}" for key in grid.default_sweep()}
    return keys | {f"search.{key}" for key in search_plan.default_search()}


def _is_key(key):
    key = re.sub(r"^search\.space\.(?=.)", "", key)
    return any(known == key or known.startswith(f"{key}.") for known in known_keys())


def _settings_parts():
    return {key.split(".")[0] for key in known_keys() if "." in key}


def _read(name):
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture
def stubs(tmp_path):
    """A folder to run shell in, whose programs print their arguments."""
    return write_stubs(tmp_path)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_in_code_blocks(page, stubs):
    for block in code_blocks(page.read_text(encoding="utf-8")):
        if CALL.search(block.text):
            check_block(block.text, stubs)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_inline_code(page, stubs):
    for span in spans(page.read_text(encoding="utf-8")):
        check_span(span, stubs)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links(page):
    check_links(page.read_text(encoding="utf-8"), page.parent)


def test_the_layout_names_files_that_exist():
    paths = re.findall(r"`([\w/.]+\.(?:py|csv|j2))`", _read("docs/layout.md"))
    assert len(paths) > 40
    for path in paths:
        check_path(path)


def test_the_default_space_of_a_search_is_in_its_page():
    listed = dict(
        re.findall(r"^\| `([\w.]+)` \| .* \| `(.*)` \|$", _read("docs/search.md"), re.MULTILINE)
    )
    default = {key: text for key, text in space.default_texts().items() if text}
    assert listed == {key: text for key, text in default.items() if "objective." not in key}
    declared = default["objective.alpha"].replace(",", ", ")
    assert f"such as {declared} for `objective.alpha`" in _read("docs/search.md")


def test_the_page_of_settings_is_current():
    assert _read("docs/settings.md") == settings_page(), "run `make settings`"


def test_every_setting_is_explained():
    text = _read("docs/settings.md")
    for key in known_keys() - {"search.space"}:  # its keys are those of a run
        assert re.search(rf"^\| `{re.escape(key)}`(\\\*)? \|", text, re.MULTILINE), key


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seqfair trian --config=configs/demo.py --workdir=DIR", "no command 'trian'"),
        ("python -m seqfair_jax.report DIR", "no command"),
        ("seqfair train --config=configs/demmo.py --workdir=DIR", "no such file"),
        ("seqfair train --config=configs/demo.py:size=3 --workdir=DIR", "unknown key 'size'"),
        ("seqfair train --config=configs/demo.py", "--workdir is missing"),
        ("seqfair train --config=configs/demo.py --workdir=DIR --config.train.epoch=3", "epoch"),
        ("seqfair train --config=configs/demo.py --workdir=DIR --config.train.epochs=0", "epochs"),
        ("seqfair train --config=configs/demo.py --workdir=DIR --dry_run", "dry_run"),
        ("for m in erm gdr; do seqfair train --config=configs/demo.py:method=$m "
         "--workdir=DIR; done", "'gdr'"),
        ("seqfair search --config=configs/backbone_rr.py --workdir=DIR "
         "--config.search.space.model.width=64", "width"),
        ("launch/local.sh 2 seqfair reproduce --config=configs/paper_rr.py --workdir=DIR "
         "--config.sweep.runs_per_call=1", "runs_per_call"),
        ("python launch/ray_sweep.py --gpu=1 seqfair reproduce --config=paper_rr --workdir=DIR",
         "no flag --gpu=1"),
        ("python launch/ray_sweep.py --gpus=1 seqfair reproduce --config=paper_rr", "missing"),
        ("sbatch launch/slurm_sweep.sh seqfair serach --config=paper_rr --workdir=DIR", "serach"),
        ("seqfair report --family=pop33", "names no folder"),
        ("seqfair report DIR --famly=pop33", "famly"),
        ("seqfair table1 --ml20m=DIR", "ml20m"),
        ("python -m benchmarks.speed --config=configs/demo.py", "does not exist"),
        ("python -m benchmarks.train_step --config=configs/demo.py --stepps=3", "stepps"),
        ("python -m benchmarks.train_step --config=configs/demmo.py", "no such file"),
        ("make dmeo", "no such target"),
        ("seqfair train --config=configs/demo.py --workdir=DIR \\\n\nfi", "syntax error"),
    ],
)  # fmt: skip
def test_a_bad_command_is_found(stubs, line, message):
    with pytest.raises(DocsError, match=re.escape(message)):
        check_block(line, stubs)


@pytest.mark.parametrize(
    "span",
    [
        "train.epoch",
        "--config.train.epoch=3",
        "--config.epochs.train",
        "sweep.runs_per_call",
        "search.space.model.width",
        "seqfair prepair",
        "python -m seqfair_jax.search",
        "configs/own_logs.py",
        "configs/own_log.py:methd=erm",
        "seqfair_jax/fit.py",
        "tests/references.py",
    ],
)
def test_bad_inline_code_is_found(stubs, span):
    with pytest.raises(DocsError):
        check_span(span, stubs)


@pytest.mark.parametrize("text", ["[a](docs/own_logs.md)", "![a](b.png)", "# A b\n[a](#ab)"])
def test_a_bad_link_is_found(text):
    with pytest.raises(DocsError, match="no such"):
        check_links(text, ROOT)


def test_code_is_found_in_a_page():
    text = "# A\n\n    seqfair a \\\n        b\n\n    c\n\ntext `d\ne`\n\n```sh\nf\n```\n"
    assert code_blocks(text) == [("", "    seqfair a \\\n        b\n\n    c\n"), ("sh", "f\n")]
    assert spans(text) == ["d e"]
