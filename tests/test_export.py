import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from test_serving import (
    assert_same_lists,
    lists_of,
    make_run,
    reference_list,
    with_params,
    with_position_bias,
)

from seqfair_jax import serving, workdir
from seqfair_jax.commands import export as command
from seqfair_jax.commands import recommend
from seqfair_jax.errors import DivergedError, UserError
from seqfair_jax.serving import export, exported

FILES = {"README.md", "item_ids.json", "load.py", "model.json", "params.npz", "program.jax"}
# jax, numpy, flatbuffers, and the packages that jax itself requires.
ALLOWED = {"jax", "jaxlib", "numpy", "flatbuffers", "ml_dtypes", "opt_einsum", "scipy"}
ALONE = """
import json, sys

class Block:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in blocked:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

blocked, started = set(json.loads(sys.argv[2])), set(sys.modules)
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
from load import Model

model = Model(sys.argv[1])
for histories, k, mask_seen in json.load(sys.stdin):
    print(json.dumps(model.recommend(histories, k, mask_seen)))
assert not blocked & {name.partition(".")[0] for name in set(sys.modules) - started}
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("export"), **{"model.item_bias": True})[0]


@pytest.fixture(scope="module")
def trained(run_folder):
    return serving.load(run_folder)


@pytest.fixture(scope="module")
def folder(run_folder):
    """What the command writes, for the platforms that it has by default."""
    out = run_folder.parent / "exported"
    command.main([f"--workdir={run_folder}", f"--out={out}"])
    return out


@pytest.fixture(scope="module")
def model(folder):
    return exported.Model(folder)


def write(trained, folder, **options):
    """Export without a run's folder; returns the model that comes back."""
    folder.mkdir()
    export.write(folder, trained, **({"max_k": 100, "platforms": ["cpu"]} | options))
    return exported.Model(folder)


def histories_of(trained, users):
    bounds = trained.histories.offsets
    ids = trained.item_ids.tolist()
    return [[ids[i] for i in trained.histories.items[bounds[u] : bounds[u + 1]]] for u in users]


def placed(model, lists):
    return [[(model.places[item], score) for item, score in pairs] for pairs in lists]


# The exported lists.


def test_without_the_package_the_lists_are_those_of_recommend(folder, run_folder, tmp_path):
    histories = pd.read_parquet(run_folder / "histories.parquet")
    items = pd.read_parquet(run_folder / "items.parquet").item_id
    rows = [["unheard", *items[places]] for places in histories["items"]]
    blocked = {"seqfair_jax", "pandas", *packages_distributions()} - ALLOWED
    assert len(blocked) > 40
    result = subprocess.run(
        [sys.executable, "-IBc", ALONE, str(folder), json.dumps(sorted(blocked))],
        input=json.dumps([[rows, 9, False], [rows, 9, True]]),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for seen, line in zip(("keep", "mask"), result.stdout.splitlines(), strict=True):
        out = tmp_path / f"{seen}.parquet"
        recommend.main([f"--workdir={run_folder}", f"--out={out}", "--k=9", f"--seen={seen}"])
        table = pd.read_parquet(out)
        found = dict(zip(histories.user_id, json.loads(line), strict=True))
        for user, expected in table.groupby("user_id"):
            assert [item for item, _ in found[user]] == list(expected.item_id)
            scores = [score for _, score in found[user]]
            np.testing.assert_allclose(scores, expected.score, rtol=1e-5, atol=1e-5)
        assert len(found) == table.user_id.nunique() == 40


@pytest.mark.parametrize("mask_seen", [False, True])
def test_lists_match_the_reference(mask_seen, model, trained):
    """Of batches of other sizes than powers of two, and of empty and long histories."""
    rows = [*histories_of(trained, range(4)), [], trained.item_ids.tolist() * 5]
    places = [[model.places[item] for item in row] for row in rows]
    expected = [reference_list(trained, row, 6, set(row) if mask_seen else ()) for row in places]
    for count in (6, 1):
        found = model.recommend(rows[-count:], 6, mask_seen=mask_seen)
        assert_same_lists(placed(model, found), expected[-count:])
    if mask_seen:
        assert found == [[]]  # every item was seen
    assert model.recommend([], 6) == []


def test_the_default_mask_is_that_of_the_run(model, trained, tmp_path):
    rows = histories_of(trained, range(3))
    assert model.recommend(rows, 5) == model.recommend(rows, 5, mask_seen=False)
    masked = write(dataclasses.replace(trained, mask_seen=True), tmp_path / "masked")
    assert masked.recommend(rows, 5) == model.recommend(rows, 5, mask_seen=True)


def test_many_histories_are_cut_into_batches(model, trained, monkeypatch):
    rows = histories_of(trained, range(40))
    whole = model.recommend(rows, 4)
    assert_same_lists(placed(model, whole), lists_of(trained, k=4))
    monkeypatch.setattr(exported, "_BATCH", 16)
    assert_same_lists(placed(model, model.recommend(rows, 4)), placed(model, whole))


def test_ties_are_in_the_order_of_the_ids(trained, tmp_path):
    constant = with_params(trained, lambda params: jax.tree.map(np.zeros_like, params))
    model = write(constant, tmp_path / "out")
    first = trained.item_ids[:3].tolist()
    assert model.recommend([[], [first[0]]], 3, mask_seen=False) == [[(i, 0) for i in first]] * 2
    assert [i for i, _ in model.recommend([[first[0]]], 2, mask_seen=True)[0]] == first[1:]


@pytest.mark.parametrize(
    "ids", [2**53 + np.arange(25), [f'"{i}",\n`ünï` \U0001f600' for i in range(25)]]
)
def test_ids_come_back_in_their_type(ids, trained, tmp_path):
    dtype = object if isinstance(ids, list) else None
    model = write(dataclasses.replace(trained, item_ids=np.array(ids, dtype)), tmp_path / "out")
    assert model.item_ids == list(ids)
    [found] = model.recommend([[ids[3]]], 25, mask_seen=False)
    assert {item for item, _ in found} == set(ids)
    assert {type(item) for item, _ in found} == {type(np.array(ids, dtype).tolist()[0])}


def test_a_history_for_a_list_of_histories_is_refused(model):
    with pytest.raises(TypeError, match="the history 'Schuhe 3' is one text: expected a list"):
        model.recommend(["Schuhe 3"])


@pytest.mark.parametrize("k", [0, 26])
def test_a_list_that_the_program_cannot_give_is_refused(k, model):
    with pytest.raises(ValueError, match=f"k is {k}: expected 1 to 25"):
        model.recommend([[]], k)


def test_the_program_returns_max_k_items(trained, tmp_path):
    model = write(trained, tmp_path / "out", max_k=3)
    assert model.max_k == 3
    [found] = model.recommend(histories_of(trained, [7]), 3)
    assert_same_lists([placed(model, [found])[0]], [lists_of(trained, k=3)[7]])


def test_other_sizes_of_the_model_are_exported(trained, tmp_path):
    """A window longer than a block of tokens, an output table of its own, and bfloat16."""
    changes = {"max_len": 150, "tie_embeddings": False, "num_heads": 2, "dtype": "bfloat16"}
    model = trained.model.clone(**changes)
    tokens = export.Packed(*[np.zeros(export.BLOCK, np.int32)] * 5)
    params = model.init(jax.random.key(1), tokens, train=False)
    other = dataclasses.replace(trained, model=model, params=params)
    write(other, tmp_path / "out")
    assert export.check(tmp_path / "out", other) == 16


@pytest.mark.parametrize(
    "kind",
    ["jax", pytest.param("onnx", marks=pytest.mark.slow)],  # jax2onnx is slow to import
)
def test_a_position_bias_is_exported(kind, trained, tmp_path):
    biased = with_position_bias(trained)
    if kind == "onnx":
        pytest.importorskip("jax2onnx")
        pytest.importorskip("onnxruntime")
        export.write_onnx(tmp_path, biased, max_k=100, batch_size=2)
    else:
        export.write(tmp_path, biased, max_k=100, platforms=["cpu"])
    assert export.check(tmp_path, biased) == 16
    model = exported.Model(tmp_path)
    rows = [*histories_of(trained, range(6)), []]
    places = [[model.places[item] for item in row] for row in rows]
    expected = [reference_list(biased, row, 6) for row in places]
    found = model.recommend(rows, 6, mask_seen=False)
    assert_same_lists(placed(model, found), expected)


@pytest.mark.slow  # jax2onnx imports for many seconds
@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_onnx_program_gives_the_same_lists(batch_size, trained, tmp_path):
    pytest.importorskip("jax2onnx")
    pytest.importorskip("onnxruntime")
    settings = export.write_onnx(tmp_path, trained, max_k=100, batch_size=batch_size)
    assert settings["shape"] == [batch_size, 1024]
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1  # all can be read alike
    assert export.check(tmp_path, trained) == 16
    model = exported.Model(tmp_path)
    rng = np.random.default_rng(0)
    lengths = [0, 1, 4, 5, 6, 40, 1023, 1024]
    rows = [rng.choice(model.item_ids[:20], size).tolist() for size in lengths]
    places = [[model.places[item] for item in row] for row in rows]
    for mask_seen in (False, True):
        expected = [
            reference_list(trained, row, 9, set(row) if mask_seen else ()) for row in places
        ]
        found = model.recommend(rows, 9, mask_seen=mask_seen)
        assert_same_lists(placed(model, found), expected)
    # Of a longer history the newest items are used.
    longer = [model.item_ids[24], *rows[-1]]
    assert model.recommend([longer], 9, mask_seen=True) == [found[-1]]


def test_without_its_extra_the_onnx_format_says_what_to_install(
    run_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "jax2onnx", None)
    with pytest.raises(SystemExit):
        command.main([f"--workdir={run_folder}", f"--out={tmp_path / 'out'}", "--format=onnx"])
    assert 'needs jax2onnx; pip install "seqfair_jax[onnx]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# The check of what was written.


def test_a_program_that_differs_is_found(trained, folder):
    class Other(exported.Model):
        def recommend(self, *args, **options):
            return [[(i, s + 1e-2) for i, s in row] for row in super().recommend(*args, **options)]

    assert export.check(folder, trained) == 16
    with pytest.raises(RuntimeError, match="differ from those of the model by 0.01"):
        export.check(folder, trained, load=Other)


def test_a_program_of_a_fixed_shape_is_checked_on_the_items_that_it_reads(trained, tmp_path):
    """An older item is not masked there."""

    class Fixed(exported.Model):
        def __init__(self, folder):
            super().__init__(folder)
            self.settings["shape"] = [3, 6]

    masked = dataclasses.replace(trained, mask_seen=True)
    write(masked, tmp_path / "out")
    assert np.diff(trained.histories.offsets).max() > 6
    assert export.check(tmp_path / "out", masked, load=Fixed) == 16


def test_scores_that_are_not_finite_are_refused(trained, tmp_path):
    broken = with_params(trained, lambda params: jax.tree.map(lambda x: x * np.nan, params))
    write(broken, tmp_path / "out")
    with pytest.raises(DivergedError, match="a score is not finite"):
        export.check(tmp_path / "out", broken)


def test_only_own_platforms_can_be_checked():
    assert export.can_check(["cuda", jax.default_backend()])
    assert not export.can_check(["tpu"])


# The command and its folder.


def test_the_example_of_the_card_runs(folder):
    card = (folder / "README.md").read_text(encoding="utf-8")
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code.splitlines()) <= 15
    result = subprocess.run(
        [sys.executable, "-IBc", code.replace('"DIR"', repr(str(folder)))],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    first, *lists = result.stdout.splitlines()
    assert first == "1 items are unknown; `recommend` leaves them out"
    assert len(lists) == 5


@pytest.mark.parametrize("name", sorted(FILES - {"README.md", "load.py"}))
def test_a_file_that_changed_is_named(name, folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    content = (copy / name).read_bytes()
    middle = content[:20] + bytes([content[20] ^ 0xFF]) + content[21:]
    for damaged in (content[:-5], b"", b"\xff" + content, middle):
        (copy / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name} is (damaged|not the file that was exported)"):
            exported.Model(copy)
    (copy / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        exported.Model(copy)


def test_the_files(folder, trained):
    assert {path.name for path in folder.iterdir()} == FILES
    assert (folder / "load.py").read_bytes() == Path(exported.__file__).read_bytes()
    settings = json.loads((folder / "model.json").read_text())
    assert settings["max_k"] == settings["items"] == 25
    assert (settings["mask_seen"], settings["window"], settings["run"]) == (False, 5, "seed=0")
    assert settings["platforms"] == ["cpu", "cuda"]
    assert settings["versions"]["jax"] == jax.__version__
    sizes = [leaf.size for leaf in jax.tree.leaves(trained.params)]
    assert settings["parameters"] == sum(sizes)
    # The parameters are in one file alone.
    assert (folder / "params.npz").stat().st_size > 4 * sum(sizes)
    with np.load(folder / "params.npz") as arrays:
        assert {arrays[name].dtype for name in arrays} == {np.dtype(np.float32)}


def test_the_command_says_what_it_wrote(run_folder, tmp_path, capsys):
    out = tmp_path / "new" / "out"
    command.main([f"--workdir={run_folder}", f"--out={out}", "--platforms=tpu", "--max_k=3"])
    captured = capsys.readouterr()
    assert "program.jax" in captured.out
    assert "run seed=0, best epoch by overall" in captured.err
    assert "was not checked, since this machine is none of tpu" in captured.err
    assert [path.name for path in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max_k=0"], "--max_k=0, --batch_size=1: expected 1 or more"),
        (["--batch_size=0"], "--batch_size=0: expected 1 or more"),
        (["--format=tflite"], "--format=tflite: expected jax or onnx"),
        (["--platforms=cpu,gpu"], "--platforms=cpu,gpu: expected some of cpu, cuda, rocm, tpu"),
        (["--platforms=cpu,cpu"], "each once, as in --platforms=cpu,cuda"),
        (["--run=seed=1"], "has no run 'seed=1'; there are seed=0"),
        (["--rule=best"], "rule is 'best': expected overall or worst_group"),
    ],
)
def test_a_bad_flag_is_one_line(flags, message, run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        command.main([f"--workdir={run_folder}", f"--out={out}", *flags])
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_nothing_is_replaced(kind, run_folder, tmp_path, capsys):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "mine").write_text("as before")
    else:
        out.write_text("as before")
    with pytest.raises(SystemExit):
        command.main([f"--workdir={run_folder}", f"--out={out}"])
    has = "has files; name a new folder, or remove this one" if kind == "folder" else "is a file"
    assert f"{out} {has}" in capsys.readouterr().err
    assert (out / "mine" if kind == "folder" else out).read_text() == "as before"


def test_ctrl_c_writes_nothing_and_says_so(run_folder, tmp_path, monkeypatch, capsys):
    def interrupted(*args):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(export, "check", interrupted)
    with pytest.raises(SystemExit) as end:
        command.main([f"--workdir={run_folder}", f"--out={tmp_path / 'out'}"])
    assert end.value.code == 130
    assert f"stopped: {tmp_path / 'out'} was not written" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_whole_or_absent(tmp_path):
    out = tmp_path / "a" / "out"

    def fail(folder):
        (folder / "half").write_text("")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        workdir.write_folder(out, fail)
    assert list(out.parent.iterdir()) == []
    out.mkdir()  # an empty one is used
    workdir.write_folder(out, lambda folder: (folder / "whole").write_text("x"))
    assert (out / "whole").read_text() == "x"
    assert list(out.parent.iterdir()) == [out]
    with pytest.raises(UserError, match="has files"):
        workdir.write_folder(out, fail)
