import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import unquote

import pandas as pd
import pytest

from seqfair_jax import workdir
from seqfair_jax.errors import UserError

NAMES = [
    "", ".", "..", "...", " ", "a", "A", "a.", ".a", "a ", " a", "a/b", "a\\b", "a%2Fb", "%", "%25",
    "ü", "u\u0308", "日本", "a\nb", "a\0b", "a:b", "a*b", "alpha=0.1,seed=0", "~", "-a", "a@b+c",
    "x" * 150, "x" * 151, "x" * 300, "x" * 299 + "y", "ü" * 100, "日" * 300,
]  # fmt: skip


def test_unequal_names_have_unequal_paths(tmp_path):
    paths = [workdir.path_name(name) for name in NAMES]
    assert len(set(paths)) == len(NAMES)
    for name, path in zip(NAMES, paths, strict=True):
        assert 0 < len(path.encode()) <= 150
        assert path not in (".", "..")
        assert "/" not in path
        assert path[0] not in ". "
        assert path[-1] not in ". "
        if name and len(path) < 150:
            assert unquote(path) == name
        (tmp_path / path).mkdir()  # not there yet
    assert len(list(tmp_path.iterdir())) == len(NAMES)


def test_usual_names_stay_as_they_are():
    for name in ("alpha=0.1,seed=0", "gdro-pop33", "step_size=1e-05", "a b.c"):
        assert workdir.path_name(name) == name
    assert workdir.path_name("pop33&seq33") == "pop33%26seq33"
    assert workdir.path_name("..") == "%2E%2E"


def test_a_single_run_has_no_folder_of_its_own(tmp_path):
    assert workdir.run_folders(tmp_path, ["seed=0"]) == [tmp_path]
    two = workdir.run_folders(tmp_path, ["seed=0", "a/b"])
    assert two == [tmp_path / "runs" / "seed=0", tmp_path / "runs" / "a%2Fb"]


def test_a_lock_is_free_again_when_its_block_ends(tmp_path):
    path = tmp_path / "locks" / "a.lock"
    for _ in range(2):
        with workdir.lock(path) as is_ours:
            assert is_ours
            with workdir.lock(path) as again:
                assert not again
    with pytest.raises(RuntimeError, match="in the block"), workdir.lock(path):
        raise RuntimeError("in the block")
    with workdir.lock(path, wait=True) as is_ours:
        assert is_ours


def test_a_killed_process_releases_its_lock(tmp_path):
    code = (
        "import pathlib, sys, time; from seqfair_jax import workdir\n"
        "with workdir.lock(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True); time.sleep(60)"
    )
    path = tmp_path / "a.lock"
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"locked\n"
        with workdir.lock(path) as is_ours:
            assert not is_ours
        process.kill()
        process.wait()
        began = time.monotonic()
        with workdir.lock(path, wait=True) as is_ours:
            assert is_ours
        assert time.monotonic() - began < 30


def test_a_write_that_fails_keeps_the_file_before(tmp_path):
    path = tmp_path / "new" / "a.json"
    workdir.write_json(path, {"a": 1})

    def fails(temporary):
        temporary.write_text("{")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workdir.write_file(path, fails)
    assert workdir.read_json(path) == {"a": 1}
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        workdir.write_json(path, {"a": float("nan")})
    assert workdir.read_json(path) == {"a": 1}
    workdir.write_parquet(tmp_path / "a.parquet", pd.DataFrame({"x": [1]}))
    assert pd.read_parquet(tmp_path / "a.parquet")["x"].tolist() == [1]


def test_a_path_may_be_bytes():
    """As those that a file system has in another encoding."""

    class OfBytes:
        def __fspath__(self):
            return b"a/b"

    assert workdir.user_path(OfBytes()) == Path("a/b")


def test_two_writers_of_a_file_do_not_share_a_temporary_name(tmp_path):
    """Also those with the same process number, as in two containers with one cache."""
    path = tmp_path / "a.json"

    def slowly(temporary):
        temporary.write_text("first")
        workdir.write_text(path, "second")
        assert temporary.read_text() == "first"

    workdir.write_file(path, slowly)
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_unfinished_files_are_known_by_their_names(tmp_path):
    seen = []

    def note(temporary):
        seen.append(temporary)
        temporary.write_text("")

    workdir.write_file(tmp_path / "a.json", note)
    assert workdir.is_unfinished(seen[0])
    assert seen[0].parent == tmp_path
    assert not workdir.is_unfinished(tmp_path / "a.json")
    seen[0].write_text("of a killed process")
    assert not workdir.is_empty(tmp_path)
    (tmp_path / "a.json").unlink()
    (tmp_path / ".lock").touch()
    assert workdir.is_empty(tmp_path)
    workdir.remove_unfinished(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b'{"a": 1', "is not JSON"),
        (b"[1]", "contains a list, expected an object"),
        (b'"a"', "contains a str, expected an object"),
        (b"\xff\xfe", "is damaged"),
    ],
)
def test_damaged_json_is_named(tmp_path, content, message):
    path = tmp_path / "a.json"
    assert workdir.read_json(path) is None
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"a\.json {message}"):
        workdir.read_json(path)


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "a.json").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*a\.json"):
        workdir.read_json(tmp_path / "a.json")
    with pytest.raises(UserError, match=r"cannot write .*a\.json"):
        workdir.write_json(tmp_path / "a.json", {})


def make_finished(folder):
    summary = {"schema_version": workdir.SCHEMA_VERSION}
    workdir.write_json(folder / workdir.CONFIG, {})
    workdir.write_json(folder / workdir.SUMMARY, summary)
    workdir.write_parquet(workdir.per_user(folder, ""), pd.DataFrame({"x": [1]}))
    workdir.finish(folder, {"log": "abc"})
    return folder


def test_paths_of_any_bytes():
    """Where the locale is not UTF-8, Python's text of a path has surrogates."""
    path = os.fsdecode(b"\xff" * 255)
    assert workdir.user_path(path) == Path(path)
    with pytest.raises(UserError, match="longer than 255 bytes"):
        workdir.user_path(path + "a")


def test_the_first_of_several_files_errors_is_named():
    failed = [("a", "b/a", "disk is full"), ("c", "b/c", "disk is full")]
    with (
        pytest.raises(UserError, match="^cannot write b: a: disk is full$"),
        workdir.named_errors(Path("b"), "write"),
    ):
        raise shutil.Error(failed)


def test_a_finished_folder(tmp_path):
    assert not workdir.is_finished(tmp_path)
    with pytest.raises(UserError, match=r"no finished\.json"):
        workdir.check_finished(tmp_path)
    with pytest.raises(UserError, match=r"no finished\.json"):
        workdir.finished_inputs(tmp_path)
    make_finished(tmp_path)
    assert workdir.is_finished(tmp_path)
    workdir.check_finished(tmp_path)
    assert workdir.finished_inputs(tmp_path) == {"log": "abc"}
    assert workdir.finished_folders(tmp_path) == [tmp_path]
    workdir.remove_results(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json"}


@pytest.mark.parametrize("name", ["summary.json", "config.json", "per_user.parquet"])
def test_a_changed_or_missing_file_of_a_finished_run_is_named(tmp_path, name):
    path = make_finished(tmp_path) / name
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    with pytest.raises(UserError, match=f"{name} changed since the run finished"):
        workdir.check_finished(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing since the run finished"):
        workdir.check_finished(tmp_path)
    path.write_bytes(content)
    workdir.check_finished(tmp_path)


def test_a_grid_has_finished_when_all_its_runs_have(tmp_path):
    make_finished(tmp_path)
    parts = workdir.run_folders(tmp_path, ["a", "b"])
    for part in parts:
        make_finished(part)
    assert workdir.is_finished(tmp_path)
    (parts[1] / "finished.json").unlink()
    assert not workdir.is_finished(tmp_path)


def test_the_folder_of_a_sweep_of_version_0_1_0_is_refused(tmp_path):
    workdir.refuse_old_sweep(tmp_path)
    (tmp_path / "calls").mkdir()
    for check in (workdir.refuse_old_sweep, workdir.read_summary):
        with pytest.raises(UserError, match=r"version 0\.1\.0 made this"):
            check(tmp_path)


def test_a_summary_of_another_schema_is_refused(tmp_path):
    for path, found in ((tmp_path / "none", "does not exist"), (Path(__file__), "is a file")):
        with pytest.raises(UserError, match=found):
            workdir.read_summary(path)
    with pytest.raises(UserError, match=r"no summary\.json"):
        workdir.read_summary(tmp_path)
    workdir.write_json(tmp_path / workdir.SUMMARY, {"schema_version": 1})
    with pytest.raises(UserError, match="schema_version 1, but this version reads 3"):
        workdir.read_summary(tmp_path)


def test_a_damaged_line_of_the_metrics_is_named(tmp_path):
    path = tmp_path / workdir.METRICS
    path.write_text('{"epoch": 1}\n{"epoch": 2}\n')
    assert workdir.read_metrics(tmp_path)["epoch"].tolist() == [1, 2]
    path.write_text('{"epoch": 1}\n{"epo\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: not JSON"):
        workdir.read_metrics(tmp_path)


def test_errors_of_the_system_name_the_file():
    path = Path("a.json")
    with (
        pytest.raises(UserError, match=r"cannot write a\.json: No space left.*free some space"),
        workdir.named_errors(path, "write"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(UserError, match=r"cannot read a\.json: x$"),
        workdir.named_errors(path, "read"),
    ):
        raise OSError("x")


def test_a_full_disk_names_the_file_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(self, *_args, **_kwargs):
        raise OSError(28, "No space left on device")

    path = tmp_path / "summary.json"
    workdir.write_json(path, {"old": 1})
    with monkeypatch.context() as patch:
        patch.setattr(type(path), "write_text", full)
        with pytest.raises(UserError, match=r"summary\.json: No space left.*free some space"):
            workdir.write_json(path, {"new": 1})
    assert workdir.read_json(path) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


@pytest.mark.parametrize("kind", ["device", "link to a device", "folder"])
def test_only_regular_files_are_replaced(tmp_path, kind):
    """As root, a rename over /dev/null would replace the device for every process."""
    path = tmp_path / "out"
    if kind == "folder":
        path.mkdir()
    elif kind == "device":
        os.mkfifo(path)
    else:
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to(tmp_path / "pipe")
    with pytest.raises(UserError, match="is not a regular file; name another"):
        workdir.write_text(path, "text")
    assert path.is_fifo() or path.is_dir()


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    workdir.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"


def test_paths_that_cannot_be_are_named():
    with pytest.raises(UserError, match="a path is empty"):
        workdir.user_path("")
    with pytest.raises(UserError, match=r"xxxx\.\.\.: the name is longer than 255 bytes"):
        workdir.user_path("a/" + "x" * 300)


@pytest.mark.parametrize("content", ["{}", '{"files": {}}', '{"files": [], "inputs": {}}'])
def test_a_damaged_mark_of_a_finished_run_is_named(tmp_path, content):
    make_finished(tmp_path)
    (tmp_path / "finished.json").write_text(content)
    for check in (workdir.check_finished, workdir.finished_inputs):
        with pytest.raises(UserError, match=r"finished\.json is damaged.*repeats the test"):
            check(tmp_path)


def test_a_run_without_its_summary_has_not_finished(tmp_path):
    make_finished(tmp_path)
    assert workdir.is_finished(tmp_path)
    (tmp_path / "summary.json").unlink()
    assert not workdir.is_finished(tmp_path)  # so the training command repeats the test
