"""The commands and the Python code of the documentation run, at a small size.

Each page runs in a folder of its own, from its first code block to its last. So `seqfair recommend`
finds the run that the page's train command made. Every command runs in this process. Paths in the
pages name small files, which `write_files` writes, and settings that decide the cost are replaced
(`SMALL`).
"""

import ast
import contextlib
import glob
import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from ml_collections import ConfigDict
from pages import PAGES, ROOT, Block, code_blocks, commands, page_id, write_stubs
from runs import small as small_config

from benchmarks import common
from seqfair_jax import __main__ as seqfair
from seqfair_jax.data.synthetic import default_settings, generate
from seqfair_jax.objectives import registry

# Pages whose commands `make test` runs. `make test-all` runs the others too.
QUICK = ("README.md", "docs/own_log.md")

# Commands that do not run here, by some of their words, and why. tests/test_docs.py checks them.
NOT_RUN = {
    "python examples/own_loop.py": "tests/test_examples.py runs it, with fewer steps",
    "python examples/own_objective.py": "tests/test_examples.py runs it",
    "python examples/serve.py": "it serves until it is stopped; tests/test_serve.py runs it",
    "python launch/ray_sweep.py": "it starts Ray; tests/test_ray_sweep.py runs it",
    "seqfair train --config.train.mesh.data=8": "it needs eight devices",
    "seqfair train --config.train.mesh.catalogue=4": "it needs eight devices",
    "seqfair train --distributed": "it is one of two processes; tests/test_processes.py runs both",
    "--workdir=runs/two": "two processes train that run",
    "seqfair recommend --catalogue=4": "it needs eight devices",
    "python -m benchmarks.mesh": "it needs eight devices",
    "python -m benchmarks.peers": "it needs RecTools and PyTorch, which are no dependencies",
    "python -m benchmarks.time_to_quality":
        "it needs RecTools and PyTorch; tests/test_time_to_quality.py runs it without them",
    "python -m benchmarks.train_step --first_step":
        "it starts six processes, three of them with an empty compilation cache",
    "python -m benchmarks.quick_start": "it starts three processes, each of which compiles anew",
    "python -m benchmarks.export --format=onnx": "it needs the extra `onnx`",
    "seqfair export --format=onnx":
        "it needs the extra `onnx`; tests/test_export.py runs it where that is installed",
    "--workdir=runs/field_rr": "tests/test_reproduce.py runs such a sweep",
    "--workdir=runs/field_ml1m": "tests/test_reproduce.py runs such a sweep",
    "python -m pytest": "it is this command",
    "--config.data.path=ml-100k.inter.gz": "it needs MovieLens-100K",
}  # fmt: skip

_TRAIN = {
    "config.data.cache_dir": "",
    "config.data.synthetic.num_users": "300",
    "config.data.synthetic.num_items": "80",
    "config.model.dim": "8",
    "config.model.ff_dim": "8",
    "config.model.num_blocks": "1",
    "config.model.max_len": "14",
    "config.model.dropout": "0",
    "config.select.min_users": "1",
    "config.train.batch_size": "8",
    "config.train.epochs": "1",
    "config.train.steps_per_epoch": "2",
    "config.train.negatives": "8",
}
_REPRODUCE = {
    "config.seeds": "0",
    "config.sweep.methods": "erm,gdro",
    "config.sweep.families": "pop33",
    "config.sweep.intersections": "",
    "config.sweep.step_size": "0.01",
}
# Flags that replace those of a command, or are added to it; None for one that it does not have.
SMALL = {
    "train": _TRAIN,
    "reproduce": _TRAIN | _REPRODUCE,
    "search": _TRAIN
    | {
        "trials": "1",
        "config.search.space.model.dim": "8",
        "config.search.space.model.num_blocks": "1",
    },
    "benchmarks": _TRAIN | {"repeats": "1"},
    "benchmarks.plan": {"repeats": None},
    "benchmarks.softmax_loss": {"items": "300", "tokens": "64"},
    "benchmarks.scaling": {"only": "items", "sizes": "100,200"},
}
# Values that replace those of a benchmark's flags, where it has them.
SMALLER = {"steps": "1", "rows": "2000", "users": "300", "items": "80"}

# Names that a page's Python code uses and does not define.
NAMES = {
    "docs/log.md": "import pandas as pd\ntable = pd.read_csv('log.csv')",
    "docs/own_objective.md":
        "import jax\nimport jax.numpy as jnp\nfrom seqfair_jax import objectives",
}  # fmt: skip


def is_python(block):
    """Whether a code block is Python: it says so, or it parses and calls or imports something."""
    if block.language:
        return block.language == "python"
    try:
        tree = ast.parse(_dedented(block.text))
    except SyntaxError:
        return False
    return any(isinstance(node, ast.Call | ast.Import | ast.ImportFrom) for node in ast.walk(tree))


def is_shell(block):
    """Whether a code block that is not Python calls the package or Python."""
    return block.language in ("", "sh") and re.search(r"\bseqfair\b|\bpython3?\b", block.text)


def is_call(words):
    """Whether a command line starts the package, a benchmark, an example or the tests."""
    return words[0] == "seqfair" or (
        words[0].startswith("python") and words[1:] and words[1:3] != ["-m", "venv"]
    )


def not_run(words):
    """The entry of `NOT_RUN` for a command line; None if it runs."""
    return next((entry for entry in NOT_RUN if set(entry.split()) <= set(words)), None)


def steps(page, stubs):
    """What a page runs, in order: command lines, and Python code."""
    for block in code_blocks(page.read_text(encoding="utf-8")):
        if is_python(block):
            yield _dedented(block.text)
        elif is_shell(block):
            yield from filter(is_call, commands(block.text, stubs))


def small(words):
    """A command line with the flags of `SMALL` and `SMALLER`.

    Returns:
        The command's name, or the module of a benchmark, and the flags.
    """
    smaller = {}
    match words:
        case ["seqfair", name, *flags] | [_, "-m", "seqfair_jax", name, *flags]:
            added = SMALL.get(name, {})
        case [_, "-m", "seqfair_jax.main", *flags]:
            name, added = "train", SMALL["train"]
        case [_, "-m", name, *flags] if name.startswith("benchmarks."):
            added = SMALL["benchmarks"] | SMALL.get(name, {})
            smaller = SMALLER
        case _:
            raise AssertionError(f"{words}: neither run here nor listed in NOT_RUN")
    if "--help" in flags or name == "--help":
        return name, flags
    given = [flag.removeprefix("--").partition("=") for flag in flags]
    kept = [
        f"--{key}={smaller[key]}" if key in smaller else flag
        for flag, (key, _, _) in zip(flags, given, strict=True)
        if key not in added
    ]
    return name, [*kept, *(f"--{k}={value}" for k, value in added.items() if value is not None)]


def write_files(folder):
    """The files that the pages name: a log in several layouts, its users, items and groups."""
    log = generate(ConfigDict(default_settings() | {"num_users": 300, "num_items": 80}))
    rng = np.random.default_rng(0)
    # Half a year from February 2024. Users start at different times.
    day = 86_400 * (31 + rng.integers(0, 170, len(log))) + 60 * log["timestamp"]
    seconds = 1_704_067_200 + day.groupby(log["user_id"]).transform(lambda t: np.sort(t))
    time = pd.to_datetime(seconds, unit="s").dt.strftime("%Y-%m-%dT%H:%M:%S")
    named = pd.DataFrame(
        {
            "user_id": "user-" + log["user_id"].astype(str),
            "item_id": "item-" + log["item_id"].astype(str),
            "timestamp": time,
        }
    )
    also = {"buyer": "user_id", "article": "item_id", "bought_at": "timestamp"}
    own = named.assign(**{name: named[of] for name, of in also.items()}, action="view")
    own.to_csv(folder / "log.csv", index=False)
    last = log.groupby("user_id").cumcount(ascending=False)
    parts = {"train.csv": last > 1, "valid.csv": last == 1, "test.csv": last == 0}
    for name, rows in parts.items():
        named[rows].to_csv(folder / name, index=False)
    named.to_csv(folder / "events.csv", index=False)
    named[last < 3].to_csv(folder / "today.csv", index=False)

    users, items = named[["user_id"]].drop_duplicates(), named[["item_id"]].drop_duplicates()
    users.head(20).to_csv(folder / "customers.csv", index=False)
    items.head(60).to_csv(folder / "in_stock.csv", index=False)
    items.head(5).to_csv(folder / "adult.csv", index=False)
    users.assign(
        country=rng.choice(["DK", "SE"], len(users)),
        age=rng.integers(18, 80, len(users)),
        plan=rng.choice(["free", "paid"], len(users)),
    ).to_csv(folder / "groups.csv", index=False)

    for name in ("DIR", "PATH", "third_party_data/retailrocket", "third_party_data/ml-1m"):
        (folder / name).mkdir(parents=True)  # the layouts of Retailrocket and MovieLens-1M
        pd.DataFrame(
            {
                "timestamp": 1000 * seconds,
                "visitorid": log["user_id"],
                "event": "view",
                "itemid": log["item_id"],
                "transactionid": "",
            }
        ).to_csv(folder / name / "events.csv", index=False)
        rows = zip(log["user_id"], log["item_id"], seconds, strict=True)
        text = "".join(f"{user}::{item}::5::{at}\n" for user, item, at in rows)
        (folder / name / "ratings.dat").write_text(text)
    ml100k = folder / "third_party_data" / "ml-100k"
    ml100k.mkdir()
    plain = {"sep": "|", "header": False, "index": False}  # of MovieLens-100K
    rated = log.assign(rating=5, at=seconds)[["user_id", "item_id", "rating", "at"]]
    rated.to_csv(ml100k / "u.data", **plain | {"sep": "\t"})
    users.assign(
        user_id=users["user_id"].str.removeprefix("user-"),
        age=rng.integers(18, 80, len(users)),
        gender=rng.choice(["F", "M"], len(users)),
        occupation=rng.choice(["artist", "writer"], len(users)),
        zip_code="00000",
    ).to_csv(ml100k / "u.user", **plain)
    for name in ("configs", "examples", "benchmarks", "launch"):
        (folder / name).symlink_to(ROOT / name)
    return folder


class Runner:
    """Runs the steps of pages, and trains what several pages train only once."""

    def __init__(self, store):
        self._store, self._trained = store, {}

    def command(self, words):
        """Run a command line in this process, in the current folder."""
        name, flags = small(words)
        if name.startswith("benchmarks."):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", [name, *flags])
                patch.setitem(common._PEAK_SIZE, "cpu", 64)
                patch.setattr(common, "_SIZING_STEPS", 8)
                patch.setattr(common, "measure", common.measure_here)  # starts no process
                # Another benchmark may have imported it, which runpy warns of.
                patch.delitem(sys.modules, name, raising=False)
                runpy.run_module(name, run_name="__main__", alter_sys=True)
            return
        arguments = [path for flag in flags for path in _expanded(flag)]
        values = dict(flag.removeprefix("--").split("=", 1) for flag in arguments if "=" in flag)
        # The files are those of every page, so the flags alone decide what is trained.
        key = tuple(flag for flag in arguments if not flag.startswith("--workdir="))
        is_new = name == "train" and not Path(values.get("workdir", ".")).exists()
        if is_new and key in self._trained:
            shutil.copytree(self._trained[key], values["workdir"])
            return
        seqfair.main([name, *arguments])
        if is_new and "workdir" in values:
            self._trained[key] = self._store / str(len(self._trained))
            shutil.copytree(values["workdir"], self._trained[key])
        if "out" in values:
            assert Path(values["out"]).exists()


@contextlib.contextmanager
def as_in_a_new_process():
    """Forget the objectives that a command's config file registers."""
    before = dict(registry._methods)
    yield
    registry._methods.clear()
    registry._methods.update(before)


def _expanded(word):
    """The paths that match a pattern. Any other word is returned unchanged."""
    return sorted(glob.glob(word)) if "*" in word and not word.startswith("-") else [word]


def _dedented(text):
    return re.sub(r"^ {4}", "", text, flags=re.MULTILINE) if text.startswith("    ") else text


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    return write_stubs(tmp_path_factory.mktemp("stubs"))


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    return Runner(tmp_path_factory.mktemp("trained"))


def _pages():
    for page in PAGES:
        blocks = code_blocks(page.read_text(encoding="utf-8"))
        if any(is_python(block) or is_shell(block) for block in blocks):
            yield _page(page)


def _page(page):
    marks = () if page_id(page) in QUICK else pytest.mark.slow
    return pytest.param(page, id=page_id(page), marks=marks)


@pytest.mark.parametrize("page", list(_pages()))
def test_the_code_of_a_page_runs(page, files, stubs, runner, tmp_path, monkeypatch):
    folder = tmp_path / "page"
    shutil.copytree(files, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the code may add to it
    modules = set(sys.modules)
    names = {"__name__": "page"}
    exec(NAMES.get(page_id(page), ""), names)
    for step in steps(page, stubs):
        if isinstance(step, str):
            with monkeypatch.context() as patch:  # what `fit` and `run` train is small too
                for place in ("config", "api"):
                    patch.setattr(f"seqfair_jax.{place}.default_config", small_config)
                exec(compile(step, page_id(page), "exec"), names)
        elif not not_run(step):
            with as_in_a_new_process():
                runner.command(step)
    for name in set(sys.modules) - modules:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(folder)):
            del sys.modules[name]  # of a folder that another page may write differently


def test_every_command_that_does_not_run_is_in_a_page(stubs):
    found = {
        entry
        for page in PAGES
        for step in steps(page, stubs)
        if not isinstance(step, str) and (entry := not_run(step))
    }
    assert found == set(NOT_RUN)


def test_a_command_becomes_small():
    words = ["seqfair", "train", "--config=demo", "--config.train.epochs=9", "--config.seeds=0,1"]
    name, flags = small(words)
    assert name == "train"
    assert flags[:2] == ["--config=demo", "--config.seeds=0,1"]
    assert flags.count("--config.train.epochs=1") == 1
    assert "--config.train.epochs=9" not in flags
    assert small(["python", "-m", "seqfair_jax.main", *words[2:]]) == (name, flags)
    name, flags = small(["python", "-m", "benchmarks.prepare", "--config=demo", "--rows=99999"])
    assert name == "benchmarks.prepare"
    assert "--rows=2000" in flags
    with pytest.raises(AssertionError, match="neither run here"):
        small(["python", "examples/other.py"])


def test_python_is_found():
    assert is_python(Block("python", "a b"))
    assert is_python(Block("", "    import a\n\n    a.b(1)\n"))
    assert not is_python(Block("text", "f(1)"))
    assert not is_python(Block("", "    user_id,age\n    anna,23\n"))
    assert not is_python(Block("", "    seqfair train --config=demo\n"))
