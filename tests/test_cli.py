import importlib.metadata
import logging
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from seqfair_jax import __main__
from seqfair_jax.cli import Command, use_compilation_cache
from seqfair_jax.commands import report, reproduce, search, table1, train
from seqfair_jax.config import resolve
from seqfair_jax.config.files import load_config, shipped, summary
from seqfair_jax.config.keys import settings
from seqfair_jax.errors import Interrupted, UserError
from seqfair_jax.sweeps.grid import sweep_settings
from seqfair_jax.sweeps.search_plan import search_settings

ROOT = Path(__file__).parents[1]
CONFIG = f"""
import sys
sys.path.append({str(ROOT / "tests")!r})
from sweeps import tiny
from seqfair_jax.sweeps.search_plan import default_search

def get_config(arg=None):
    config = tiny()
    config.search = default_search()
    config.search.space.model.dim = "8,4"
    if arg != "all":
        del config.sweep, config.search
    return config
"""
WITH_CONFIG = {"train": (train, "run"), "search": (search, "search")}
WITH_CONFIG["reproduce"] = (reproduce, "reproduce")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture
def call(config_file, monkeypatch, tmp_path):
    """Calls a command whose work is replaced; returns what the work was given."""

    def call(name, *argv, config=f"{config_file}:all"):
        module, work = WITH_CONFIG[name]
        calls = []
        monkeypatch.setattr(module, work, lambda *args, **options: calls.append((*args, options)))
        module.main([f"--config={config}", f"--workdir={tmp_path / 'run'}", *argv])
        [given] = calls
        return given

    return call


def refused(capsys, function, *args, status=1):
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        function(*args)
    assert end.value.code == status
    [line] = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "given",
    ["age:-1..4.5,R%26D&pop33", "'age:-1..4.5,R%26D&pop33'", "('age:-1..4.5', 'R%26D&pop33')"],
)
def test_lists_of_text_are_taken_as_written(call, config_file, given):
    flags = (f"--config.groups={given}", "--config.data.events=1,add to cart")
    config, *_ = call("train", *flags, config=str(config_file))
    resolved = resolve(config)
    assert resolved.groups == ("age:-1..4.5", "R%26D&pop33")
    assert resolved.data.events == ("1", "add to cart")


# Flags.


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_a_list_is_read_whole(name, call, tmp_path):
    config, directory, *_ = call(name, "--config.seeds=3,1,2", "--config.train.epochs", "7")
    assert tuple(config.seeds) == (3, 1, 2)
    assert config.train.epochs == 7
    assert directory == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--config.seeds 0 1 2", "unexpected argument '1'"),
        ("--config.seeds=0 1", "unexpected argument '1'"),
        ("1 --config.seeds=0", "unexpected argument '1'"),
        ("--config.seeds=0, 1, 2", r"--config\.seeds=0,: the list ends in a comma"),
        ("--config.seeds 0, 1, 2", r"--config\.seeds=0,: the list ends in a comma"),
        ("--config.objective.alpha=0.3, 0.5", r"objective\.alpha=0\.3,: the list ends in a comma"),
        ("--config.seeds=0,1,", r"--config\.seeds=0,1,: the list ends in a comma"),
        ("--config.groups=pop33, seq33", r"--config\.groups=pop33,: the list ends in a comma"),
        ("--config.seeds=0 --config.seeds=1", r"--config\.seeds is given 2 times"),
        ("--config.seeds 0 --config.seeds=1", r"--config\.seeds is given 2 times"),
        ("--workdir=elsewhere", "--workdir is given 2 times"),
        ("--config=other.py", "--config is given twice"),
        ("--config.evaluate.mask_seen --noconfig.evaluate.mask_seen", "mask_seen is given 2 times"),
        ("--workdr=elsewhere", "Unknown command line flag 'workdr'. Did you mean: workdir"),
        ("--config.data.path", r"Missing value for flag --config\.data\.path"),
    ],
)
@pytest.mark.parametrize("name", WITH_CONFIG)
def test_words_that_no_flag_takes_are_refused(name, words, message, call, capsys):
    assert re.search(message, refused(capsys, call, name, *words.split()))


@pytest.mark.parametrize(
    ("word", "line"),
    [
        ("model.dimm=3", "unknown config key model.dimm (did you mean 'model.dim'?)"),
        ("train.epoch=3", "unknown config key train.epoch (did you mean 'train.epochs'?)"),
        ("data.repeat=drop", "unknown config key data.repeat (did you mean 'data.repeats'?)"),
        ("epochs=3", "unknown config key epochs (did you mean 'train.epochs'?)"),
        ("sweep.alfa=0.3", "unknown config key sweep.alfa (did you mean 'sweep.alpha'?)"),
        ("model.dim.x=3", "unknown config key model.dim.x (did you mean 'model.dim'?)"),
        ("seeds[0]=3", "unknown config key seeds[0] (did you mean 'seeds'?)"),
        ("zzz=3", "unknown config key zzz"),
        (
            "select={}",
            "select is a group of settings: set one of metric, min_users",
        ),
        ("model.dim=x", "--config.model.dim=x: expected a whole number, 1 or more"),
        ("model.dim=2.5", "--config.model.dim=2.5: expected a whole number, 1 or more"),
        ("model.dim=true", "--config.model.dim=true: expected a whole number, 1 or more"),
        (
            "seeds=(0,1",
            "--config.seeds=(0,1: expected unequal integers from 0 to 2**32 - 1",
        ),
        (
            "train.learning_rate=a: b",
            "--config.train.learning_rate=a: b: expected a number above 0",
        ),
        ("sweep.runs_per_job=x", "--config.sweep.runs_per_job=x: expected a whole number"),
        ("evaluate.mask_seen=maybe", "--config.evaluate.mask_seen=maybe: expected true or false"),
    ],
)
def test_a_bad_setting_is_one_line_that_names_it(word, line, call, capsys):
    assert refused(capsys, call, "train", f"--config.{word}") == f"error: {line}"


@pytest.mark.parametrize("seeds", ["0,0", "0,1,0", "-1", "0.5", "4294967296"])
def test_duplicate_and_impossible_seeds_are_refused(seeds, config_file, tmp_path, capsys):
    argv = [f"--config={config_file}", f"--workdir={tmp_path}", f"--config.seeds={seeds}"]
    line = refused(capsys, train.main, argv)
    assert line.startswith("error: seeds is (")
    assert line.endswith("expected unequal integers from 0 to 2**32 - 1")


@pytest.mark.parametrize("name", WITH_CONFIG)
def test_missing_flags_are_named(name, config_file, capsys):
    main = WITH_CONFIG[name][0].main
    assert "--config is missing: name a config" in refused(capsys, main, [])
    assert "--config is missing" in refused(capsys, main, ["--config"])
    argv = [f"--config={config_file}:all"]
    assert "--workdir is missing: " in refused(capsys, main, argv)
    assert "--workdir is empty: give a value" in refused(capsys, main, [*argv, "--workdir="])


def test_report_takes_folders_and_refuses_the_rest(capsys, tmp_path):
    assert "name the folders of finished runs" in refused(capsys, report.main, [])
    line = refused(capsys, report.main, [str(tmp_path / "none"), str(tmp_path)])
    assert line.startswith(f"error: {tmp_path / 'none'} does not exist")
    argv = ["a", "--metric=NDCG@20", "--metric=Recall@20"]
    assert "--metric is given 2 times" in refused(capsys, report.main, argv)
    assert "Unknown command line flag 'famly'" in refused(capsys, report.main, ["--famly=x", "a"])
    assert "unexpected argument 'x'" in refused(capsys, table1.main, ["x"])
    assert "name a log" in refused(capsys, table1.main, [])


# Config files.


def config_with(tmp_path, body, name="config.py"):
    path = tmp_path / name
    path.write_text(body)
    return path


@pytest.mark.parametrize(
    ("body", "arguments", "message"),
    [
        (
            "from seqfair_jax.errors import UserError\n"
            "def get_config(arg=None): raise UserError('scale=big: expected paper or small')",
            ":scale=big",
            "scale=big: expected paper or small",
        ),
        ("x = 1", "", "the file has no get_config function"),
        ("def get_config(): pass", ":a=1", "its get_config takes no arguments"),
        ("def get_config(arg): pass", "", "its get_config needs arguments, as in FILE.py:KEY"),
        ("def get_config(): return {}", "", "its get_config returns a dict, expected a ConfigDict"),
    ],
)
def test_a_config_file_that_cannot_be_used_is_one_line(body, arguments, message, tmp_path, capsys):
    path = config_with(tmp_path, body)
    argv = [f"--config={path}{arguments}", f"--workdir={tmp_path / 'run'}"]
    assert message in refused(capsys, train.main, argv)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ("def get_config(): return 1 / 0", ZeroDivisionError),
        ("def get_config(): raise TypeError('mine')", TypeError),
        ("def get_config(): raise ValueError('mine')", ValueError),
        ("import seqfair_jax.nothing", ModuleNotFoundError),
        ("def get_config(:", SyntaxError),
    ],
)
def test_a_bug_in_a_config_file_keeps_its_traceback(body, error, tmp_path):
    path = config_with(tmp_path, body)
    with pytest.raises(error) as caught:
        train.main([f"--config={path}", f"--workdir={tmp_path / 'run'}"])
    last = caught.traceback[-1]
    shown = caught.value.filename if error is SyntaxError else str(last.path)
    assert error is ModuleNotFoundError or shown == str(path)


def test_a_config_file_that_is_not_there(tmp_path, capsys):
    config_with(tmp_path, "", "mine.py")
    config_with(tmp_path, "", "mine.txt")
    for name, message in (
        ("rr_gdro.py", "no such file (the package has a config of this name: --config=rr_gdro)"),
        ("mime.py", "mime.py: no such file (did you mean 'mine.py'?)"),
        ("zzz", "zzz: no such file"),
        ("mine.txt", "mine.txt: expected a Python file with a get_config function"),
        ("", f"{tmp_path}: no such file"),
    ):
        argv = [f"--config={tmp_path / name}", "--workdir=run"]
        assert message in refused(capsys, train.main, argv)


def test_shipped_configs_have_names(call, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("rr_gdro", "rr_gdro.py"):  # a name means the shipped one, whatever files are here
        (tmp_path / name).write_text("def get_config(): return 1 / 0")
    config, *_ = call("train", config="rr_gdro:scale=small")
    assert (config.objective.name, config.model.dim) == ("gdro", 64)
    with pytest.raises(ZeroDivisionError):
        call("train", config="rr_gdro.py")
    line = refused(capsys, lambda: call("train", config="rr_gdr"))
    assert line == (
        "error: --config=rr_gdr: no shipped config has this name (did you mean 'rr_gdro'?); "
        "seqfair train --help lists them. For a file of your own give its path with .py, such as "
        "--config=rr_gdr.py"
    )
    assert {path.name for path in shipped().values()} == {
        path.name for path in (ROOT / "configs").glob("*.py")
    }


# Paths.


@pytest.fixture(scope="module")
def home(config_file, tmp_path_factory):
    """A home folder with a log, ~/log.csv, and a run, ~/run, that commands made with `~`."""
    home = tmp_path_factory.mktemp("home")
    rows = [f"{u},{(u * k) % 23},{100 * u + k}" for u in range(1, 60) for k in range(1, 8)]
    (home / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *rows]) + "\n")
    (home / "tiny.py").write_text(config_file.read_text())
    (home / "work").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.chdir(home / "work")
        train.main(
            [
                "--config=~/tiny.py", "--workdir=~/run", "--config.data.name=csv",
                "--config.data.path=~/log.csv", "--config.data.cache_dir=~/cache",
                "--config.data.min_interactions=1", "--config.train.batch_size=8",
            ]
        )  # fmt: skip
    return home


def test_a_tilde_is_the_home_folder_in_every_path(home, monkeypatch, capsys):
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(home / "work")
    assert (home / "run" / "finished.json").is_file()
    assert any((home / "cache").iterdir())
    report.main(["~/run", "--out=~/report.html"])
    assert f"report: {home / 'report.html'}" in capsys.readouterr().out
    assert (home / "report.html").stat().st_size > 1000
    line = refused(capsys, report.main, ["~/run", "--baseline=~/none"])
    assert line.startswith("error: baseline is '~/none'; there are ERM, [most_popular]")
    assert list((home / "work").iterdir()) == []  # no folder called ~


def test_paths_that_cannot_be_used_are_one_line(home, capsys, tmp_path, config_file):
    run, log = str(home / "run"), home / "log.csv"
    line = refused(capsys, report.main, [str(log)])
    assert line == f"error: {log} is a file; name the --workdir of a run that has finished"
    line = refused(capsys, report.main, [run, f"--out={log}/report.html"])
    assert line.startswith(f"error: cannot write {log}/report.html: ")
    folder = tmp_path / "folder.html"
    folder.mkdir()
    line = refused(capsys, report.main, [run, f"--out={folder}"])
    assert line.startswith(f"error: cannot write {folder}: ")
    line = refused(capsys, report.main, [run, f"--out={log}.gz"])
    assert line == f"error: {log}.gz: expected a name that ends in .html, .csv, .md or .tex"
    before = log.read_bytes()
    line = refused(capsys, report.main, [run, f"--out={log}"])
    assert line == f"error: {log} is the log of {run}; name another file"
    assert log.read_bytes() == before
    line = refused(capsys, report.main, [run, *["--out=r.md"] * 2])
    assert line == "error: --out=r.md is given 2 times, expected once"
    line = refused(capsys, train.main, [f"--config={config_file}", f"--workdir={log}/run"])
    assert line.startswith(f"error: {log}/run: {log} is a file; name a folder")


def test_without_a_home_folder(monkeypatch, capsys, tmp_path, config_file):
    """As in a container whose user is not in its list of users."""

    def no_user(_):
        raise KeyError("no such user")

    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr("pwd.getpwuid", no_user)
    monkeypatch.chdir(tmp_path)
    before = jax.config.jax_compilation_cache_dir
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == before
    line = refused(capsys, train.main, [f"--config={config_file}", "--workdir=~/run"])
    assert "give the path without ~" in line
    assert list(tmp_path.iterdir()) == []


def test_compiled_programs_have_a_folder_for_each_processor(monkeypatch, tmp_path):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("seqfair_jax.cli.processor", lambda: "Model 7 (TM) @ 2.0")
    before = jax.config.jax_compilation_cache_dir
    try:
        use_compilation_cache()
        expected = tmp_path / "seqfair_jax" / "xla" / "Model-7--TM----2-0"
        assert jax.config.jax_compilation_cache_dir == str(expected)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# Signals.


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_with_one_line(number, capsys):
    def work(*_):
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:  # a second signal would end the process at once
            during = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
            assert during == [signal.SIG_DFL, signal.SIG_DFL]

    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    status = 128 + number  # 130 and 143, as shells have it
    assert refused(capsys, Command("name", "").run, [], work, status=status) == "stopped"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_so_and_keeps_the_status(number, capsys):
    def work(*_):
        raise Interrupted("the state is saved", number)

    status = 128 + number
    line = refused(capsys, Command("name", "").run, [], work, status=status)
    assert line == "the state is saved"


def test_a_second_ctrl_c_ends_the_process_at_once():
    code = """
import time
from seqfair_jax.cli import Command

def work(*_):
    try:
        print("working", flush=True)
        time.sleep(60)
    finally:
        print("cleaning", flush=True)
        time.sleep(60)

Command("name", "").run([], work)
"""
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"working\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == b"cleaning\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=10)
    assert process.returncode == -signal.SIGINT
    assert error == b""


@pytest.mark.parametrize("error", [None, UserError("bad"), ZeroDivisionError()])
def test_a_command_leaves_no_handler_behind(error):
    logger = logging.getLogger("seqfair_jax")

    def state():
        handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
        return handlers, logger.handlers[:], logger.level, logger.propagate

    def work(*_):
        assert state() != before
        if error is not None:
            raise error

    before = state()
    expected = {UserError: SystemExit}.get(type(error), type(error))
    if error is None:
        Command("name", "").run([], work)
    else:
        with pytest.raises(expected):
            Command("name", "").run([], work)
    assert state() == before


def test_messages_go_to_standard_error_of_each_run(capsys):
    def work(*_):
        logging.getLogger("seqfair_jax.part").info("a message")

    for _ in range(2):
        Command("name", "").run([], work)
        assert capsys.readouterr().err == "INFO: a message\n"


# The program.


def test_every_command_has_help(capsys):
    __main__.main(["--help"])
    overview = capsys.readouterr().out
    assert {*WITH_CONFIG, "report", "table1"} <= set(__main__.COMMANDS)
    for name in __main__.COMMANDS:
        assert name in overview
        for word in ("--help", "-h"):
            with pytest.raises(SystemExit) as end:
                __main__.main([name, word])
            assert end.value.code == 0
            out = capsys.readouterr().out
            assert out.startswith(f"usage: seqfair {name} ")
            takes_config = name in {*WITH_CONFIG, "evaluate"}
            assert ("--config.KEY: " in out) == takes_config
            assert "--workdir: " in out or name not in WITH_CONFIG
            assert max(map(len, out.splitlines())) < 80
            assert ("`seqfair train --help` lists them" in " ".join(out.split())) == (
                takes_config and name != "train"
            )
    __main__.main([])
    assert capsys.readouterr().out == overview


def help_of(capsys, *argv, command=train):
    with pytest.raises(SystemExit) as end:
        command.main([*argv, "--help"])
    assert end.value.code == 0
    return capsys.readouterr().out


def test_the_help_of_train_lists_every_setting_and_shipped_config(capsys):
    out = help_of(capsys)
    for setting in settings():
        assert f"\n  {setting.key} (default: " in out
        assert setting.help.replace("`", "") in " ".join(out.split())
    for name, path in shipped().items():
        [line] = re.findall(rf"^  {name} +(.*)$", out, re.MULTILINE)
        assert line == summary(path).replace("`", "")
        assert line.endswith(".")
    assert "  data.path (default: none; text)" in out
    assert "  train.decay_steps (default: all steps; a whole number, 0 or more)" in out


def test_help_with_a_config_shows_its_values(capsys, config_file):
    out = help_of(capsys, "--config=rr_gdro")
    assert "  objective.name (here: gdro; " in out
    assert "  train.epochs (here: 1000; " in out
    assert "  data.cache_dir (here: your cache folder; text)" in out
    assert "\n--config=rr_gdro:\n\n  GDRO on Retailrocket, a row of the paper's tables" in out
    assert "  train.epochs (here: 2; " in help_of(capsys, f"--config={config_file}")


def test_the_arguments_of_a_config_are_help_and_no_error(capsys):
    with pytest.raises(SystemExit) as end:
        train.main(["--config=own_log:help"])
    assert end.value.code == 0
    assert capsys.readouterr() == (
        "the arguments of this config, with their defaults: method=erm, init=0.1, model=plain\n",
        "",
    )


@pytest.mark.parametrize("command", [train, search, reproduce])
def test_help_prints_the_description_of_a_config(command, capsys, tmp_path):
    path = tmp_path / "mine.py"
    code = "from seqfair_jax.config import default_config as get_config\n"
    path.write_text(code)
    out = help_of(capsys, f"--config={path}", command=command)
    assert f"\n--config={path}:\n" not in out
    words, line = "100 % of {users} " * 10, "    seqfair train " + "x" * 90
    item = "- " + "y " * 60
    path.write_text(f'"""First.\n\n{words}\n{words}\n\n{line}\n\n{item}\n"""\n{code}')
    out = help_of(capsys, f"--config={path}", command=command)
    about = out[out.index(f"\n--config={path}:\n") : out.index("\nsettings, with the")]
    _, first, filled, kept, listed = about.strip().split("\n\n")
    assert first == "  First."
    assert filled.split() == [*words.split(), *words.split()]
    assert len(filled.splitlines()) > 1
    assert all(len(row) < 80 and row.startswith("  ") for row in filled.splitlines())
    assert (kept, listed) == (f"  {line}", f"  {item.rstrip()}")


def test_search_and_reproduce_list_their_own_settings(capsys):
    for command, own in ((search, search_settings()), (reproduce, sweep_settings())):
        out = help_of(capsys, command=command)
        assert re.findall(r"^  (\S+) \(default", out, re.MULTILINE) == [one.key for one in own]
    assert "  search.prune (here: false; " in help_of(
        capsys, "--config=backbone_rr", command=search
    )
    assert "  search.prune (here: true; " in help_of(capsys, "--config=own_log", command=search)
    assert "  sweep.radius (here: 1; " in help_of(capsys, "--config=paper_rr", command=reproduce)
    # A config without a sweep gets the default one.
    out = help_of(capsys, "--config=own_log", command=reproduce)
    assert "  sweep.radius (here: 0.01,0.1,1; " in out
    assert "  sweep.families (here: pop33,seq33; " in out


def test_the_message_of_a_wrong_type_says_what_a_command_s_own_setting_takes(
    capsys, tmp_path, config_file
):
    flags = (f"--config={config_file}:all", "--config.search.seed=x", f"--workdir={tmp_path}")
    line = refused(capsys, search.main, flags)
    assert line.endswith("expected a whole number, 0 or more")


@pytest.mark.parametrize("flag", ["--help", "--config=own_log:help"])
def test_a_reader_of_the_output_may_end_early(flag):
    """As in `seqfair train --help | head -1`."""
    command = [sys.executable, "-m", "seqfair_jax", "train", flag]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_name_that_the_terminal_lacks_is_escaped():
    script = "import sys, seqfair_jax.__main__ as m\n"
    script += "m.importlib.import_module = lambda name: m\n"
    script += "m.main, main = lambda rest: print(rest[0]), m.main\n"
    script += "main(['report', '\\u00e9\\U0001f600'])"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\\xe9\\U0001f600\n", "")


def test_an_unknown_command_is_one_line():
    with pytest.raises(SystemExit, match=r"error: no command 'trian' \(did you mean 'train'\?\)"):
        __main__.main(["trian"])


def test_the_version(capsys):
    __main__.main(["--version"])
    installed = importlib.metadata.version("seqfair_jax")
    assert capsys.readouterr().out == f"seqfair_jax {installed}\n"


def test_the_names_of_the_program_are_the_same_commands(tmp_path):
    [script] = importlib.metadata.entry_points(group="console_scripts", name="seqfair")
    assert script.load() is __main__.main
    started = [
        subprocess.Popen(
            [sys.executable, "-m", *words, "--config=none.py"], cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for words in (["seqfair_jax", "train"], ["seqfair_jax.main"])
    ]  # fmt: skip
    for process in started:
        missing = f"error: --config=none.py: no such file; it would be {tmp_path / 'none.py'}\n"
        assert process.communicate() == ("", missing)
        assert process.returncode == 1


def test_importing_the_commands_has_no_effect(tmp_path):
    code = """
import importlib, logging, os, signal
from absl import flags
state = lambda: (
    [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
    logging.getLogger("seqfair_jax").handlers, logging.getLogger("seqfair_jax").level,
)
before = state()
import seqfair_jax.__main__, seqfair_jax.main
for name in seqfair_jax.__main__.COMMANDS:
    importlib.import_module(f"seqfair_jax.commands.{name}")
assert state() == before
assert not {"config", "workdir", "dry_run", "family", "metric", "out", "ml1m"} & set(flags.FLAGS)
assert os.listdir() == []
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


def test_load_config_gives_the_file_its_arguments(config_file):
    assert "sweep" in load_config(f"{config_file}:all")
    assert "sweep" not in load_config(str(config_file))
