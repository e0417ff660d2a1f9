from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqfair_jax.errors import UserError
from seqfair_jax.training import checkpoint


class State(NamedTuple):
    params: Any
    step: Any


def make_tree(value=1.0):
    return {"state": State({"w": jnp.full((3, 4), value)}, jnp.int32(7)), "empty": ()}


def flip_a_byte(path, place=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(bytes(content))


def test_a_saved_tree_is_loaded(tmp_path):
    tree = make_tree()
    checkpoint.save(tmp_path / "a", tree, {"epoch": 3})
    found, progress = checkpoint.load(tmp_path / "a", make_tree(0.0))
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    jax.tree.map(np.testing.assert_array_equal, found, tree)
    assert progress == {"epoch": 3}
    assert [p.name for p in tmp_path.iterdir()] == ["a"]  # no temporary files


def test_saving_again_replaces(tmp_path):
    checkpoint.save(tmp_path / "a", make_tree(1.0), {})
    checkpoint.save(tmp_path / "a", make_tree(2.0), {})
    found, _ = checkpoint.load(tmp_path / "a", make_tree())
    assert found["state"].params["w"][0, 0] == 2.0


@pytest.mark.parametrize("renames", [1, 2])
def test_a_process_that_dies_while_it_replaces_loses_nothing(tmp_path, monkeypatch, renames):
    class Died(BaseException):
        pass

    checkpoint.save_step(tmp_path, 5, make_tree(1.0), {"epoch": 0})
    rename, calls = type(tmp_path).rename, iter(range(1, 5))

    def dies(path, target):
        if next(calls) == renames:
            raise Died
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(type(tmp_path), "rename", dies)
        with pytest.raises(Died):
            checkpoint.save_step(tmp_path, 5, make_tree(2.0), {"epoch": 1})
    found, progress = checkpoint.load_latest(tmp_path, make_tree())
    assert (found["state"].params["w"][0, 0], progress) == (1.0, {"epoch": 0})
    checkpoint.save_step(tmp_path, 5, make_tree(2.0), {"epoch": 1})
    assert checkpoint.load_latest(tmp_path, make_tree())[1] == {"epoch": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["5"]


def test_every_flipped_byte_is_found(tmp_path):
    checkpoint.save(tmp_path / "a", make_tree(), {"epoch": 3})
    files = [p for p in (tmp_path / "a").rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 3
    flips = [(path, path.stat().st_size // 2) for path in files]
    manifest = tmp_path / "a" / "manifest.json"
    flips += [(manifest, place) for place in range(0, manifest.stat().st_size, 7)]
    for path, place in flips:
        before = path.read_bytes()
        flip_a_byte(path, place)
        with pytest.raises(checkpoint.CorruptCheckpointError):
            checkpoint.load(tmp_path / "a", make_tree())
        path.write_bytes(before)
    checkpoint.load(tmp_path / "a", make_tree())


def test_a_missing_or_added_file_is_found(tmp_path):
    checkpoint.save(tmp_path / "a", make_tree(), {})
    (tmp_path / "a" / "extra").write_text("")
    with pytest.raises(checkpoint.CorruptCheckpointError, match="extra"):
        checkpoint.load(tmp_path / "a", make_tree())
    (tmp_path / "a" / "extra").unlink()
    (tmp_path / "a" / "progress.json").unlink()
    with pytest.raises(checkpoint.CorruptCheckpointError, match=r"progress\.json"):
        checkpoint.load(tmp_path / "a", make_tree())


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"state": State({"w": jnp.ones((3, 4), jnp.bfloat16)}, jnp.int32(0)), "empty": ()}, "w"),
        ({"state": State({"w": jnp.ones((3, 5))}, jnp.int32(0)), "empty": ()}, r"3, 5"),
        ({"state": State({"w": jnp.ones((5, 4))}, jnp.int32(0)), "empty": ()}, r"5, 4"),
        ({"state": State({"v": jnp.ones((3, 4))}, jnp.int32(0)), "empty": ()}, "absent"),
    ],
)
def test_another_dtype_shape_or_name_is_refused(tmp_path, template, message):
    checkpoint.save(tmp_path / "a", make_tree(), {})
    with pytest.raises(UserError, match=message):
        checkpoint.load(tmp_path / "a", template)


def test_only_the_rows_of_what_may_be_resized_may_differ(tmp_path):
    checkpoint.save(tmp_path / "a", {"table": jnp.ones((3, 4)), "other": jnp.ones((3, 4))}, {})

    def load(table, other):
        template = {"table": jnp.zeros(table), "other": jnp.zeros(other)}
        resizes = lambda path: path[-1].key == "table"  # noqa: E731
        return checkpoint.load(tmp_path / "a", template, resizes=resizes)[0]["table"]

    np.testing.assert_array_equal(load((5, 4), (3, 4)), [[1] * 4] * 3 + [[0] * 4] * 2)
    np.testing.assert_array_equal(load((2, 4), (3, 4)), [[1] * 4] * 2)
    for table, other, name in (((3, 5), (3, 4), "table"), ((3, 4), (5, 4), "other")):
        with pytest.raises(UserError, match=rf"\['{name}'\] is float32\[3, 4\] there"):
            load(table, other)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        checkpoint.load(tmp_path / "a", make_tree())
    assert checkpoint.load_latest(tmp_path / "none", make_tree()) is None


def test_only_the_newest_steps_are_kept(tmp_path):
    for step in (9, 10, 11):
        checkpoint.save_step(tmp_path, step, make_tree(float(step)), {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "11"]
    found, progress = checkpoint.load_latest(tmp_path, make_tree())
    assert found["state"].params["w"][0, 0] == 11.0
    assert progress == {"step": 11}


def test_a_broken_latest_falls_back_to_the_one_before(tmp_path, caplog):
    for step in (1, 2):
        checkpoint.save_step(tmp_path, step, make_tree(float(step)), {"step": step})
    (tmp_path / "3").mkdir()  # an empty folder
    flip_a_byte(tmp_path / "2" / "progress.json")
    _, progress = checkpoint.load_latest(tmp_path, make_tree())
    assert progress == {"step": 1}
    assert "progress.json" in caplog.text
    flip_a_byte(tmp_path / "1" / "progress.json")
    with pytest.raises(checkpoint.CorruptCheckpointError, match="none of the checkpoints"):
        checkpoint.load_latest(tmp_path, make_tree())


def test_a_damaged_newest_keeps_no_place(tmp_path):
    for step in (10, 20):
        checkpoint.save_step(tmp_path, step, make_tree(float(step)), {"step": step})
    flip_a_byte(tmp_path / "20" / "progress.json")
    assert checkpoint.latest_progress(tmp_path) is None
    for step in (12, 14, 16):
        checkpoint.save_step(tmp_path, step, make_tree(float(step)), {"step": step})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["14", "16"]
    assert checkpoint.latest_progress(tmp_path) == {"step": 16}


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    """tensorstore raises a ValueError with the number of the system's error in its text."""

    def full(self, *_):
        raise ValueError(
            "RESOURCE_EXHAUSTED: Failed to write [source locations] os_error_code='28'"
        )

    checkpoint.save_step(tmp_path, 1, make_tree(), {"step": 1})
    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", full)
    with pytest.raises(UserError, match=r"checkpoint .*/2: No space left on device; free some"):
        checkpoint.save_step(tmp_path, 2, make_tree(), {"step": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["1"]
    monkeypatch.undo()

    def bug(self, *_):
        raise ValueError("a bug")

    monkeypatch.setattr(checkpoint.ocp.StandardCheckpointer, "save", bug)
    with pytest.raises(ValueError, match="a bug") as caught:
        checkpoint.save_step(tmp_path, 2, make_tree(), {"step": 2})
    assert not isinstance(caught.value, UserError)


@pytest.mark.parametrize("content", ["[]", "{", ""])
def test_progress_that_is_no_object_is_not_believed(tmp_path, content):
    checkpoint.save_step(tmp_path, 1, make_tree(), {"step": 1})
    assert checkpoint.latest_progress(tmp_path) == {"step": 1}
    (tmp_path / "1" / "progress.json").write_text(content)
    assert checkpoint.latest_progress(tmp_path) is None
