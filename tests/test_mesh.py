"""Several devices give what one device gives."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import slow_but

from seqfair_jax import devices, objectives
from seqfair_jax.errors import UserError
from seqfair_jax.objectives.builtin import BUILT_IN

SHAPES = ("8,1,1", "1,8,1", "1,1,8", "2,2,2")  # run, data, catalogue
# Almost all of the time is compilation, and without optimisation it takes half.
FLAGS = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true"
)
FOLDER = Path(__file__).parent


def on_mesh(*words):
    """What a function of `on_mesh.py` returns in a process with eight devices."""
    process = subprocess.run(
        [sys.executable, FOLDER / "on_mesh.py", *words],
        env={**os.environ, "XLA_FLAGS": FLAGS},
        capture_output=True,
        text=True,
        cwd=FOLDER.parent,
    )
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout)


def assert_equal_steps(found):
    """Losses, gradients and states are equal but for rounding."""
    assert found
    assert all(worst < 2e-5 for worst in found.values()), found  # of float32


@pytest.mark.parametrize("objective", slow_but(["erm", "gdro_clusters"], ["gdro_clusters"]))
def test_a_mesh_takes_the_step_of_one_device(objective):
    assert_equal_steps(on_mesh("without_dropout", objective, "2,2,2"))


@pytest.mark.slow
@pytest.mark.parametrize("objective", list(objectives.METHODS))
def test_every_mesh_takes_the_step_of_one_device(objective):
    """For the objectives beyond the paper's, the mesh that splits all three axes says enough."""
    of_paper = objective in {method.name for method in BUILT_IN}
    shapes = SHAPES if of_paper else SHAPES[-1:]
    assert_equal_steps(on_mesh("without_dropout", objective, *shapes))


# Other bits would change the loss and the gradients by far more than rounding.


@pytest.mark.slow
def test_dropout_has_the_bits_of_one_device():
    assert_equal_steps(on_mesh("with_dropout", "2,2,2"))


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["with_dropout", "with_negatives"])
def test_dropout_and_negatives_have_the_bits_of_one_device_on_every_mesh(loss):
    assert_equal_steps(on_mesh(loss, *SHAPES))


# The last shape splits all three axes.
each_shape = pytest.mark.parametrize(
    "shapes", slow_but([[*SHAPES], [SHAPES[-1]]], [[SHAPES[-1]]]), ids=len
)


@each_shape
@pytest.mark.parametrize("model", slow_but(["rankings", "rankings_of_a_mixture"], ["rankings"]))
def test_a_mesh_ranks_as_one_device(model, shapes):
    assert on_mesh(model, *shapes) == dict.fromkeys(shapes, True)


@each_shape
def test_a_mesh_fits_a_mixture_to_what_one_device_does(shapes):
    assert all(value < 1e-5 for value in on_mesh("mixtures", *shapes).values())


def test_a_checkpoint_of_a_mesh_is_read_by_others_and_by_one_device(tmp_path):
    assert on_mesh("checkpoints", str(tmp_path)) == [True, True, True]


def test_a_finished_run_on_a_mesh_does_what_it_does_on_one_device(finished):
    found = on_mesh("served", str(finished().folder))
    assert found.pop("own rows") == [1 / 4, 1 / 7]
    assert found == dict.fromkeys(("lists", "some items", "test", "vectors", "start"), True)


def test_no_step_gathers_a_table_or_logits():
    found = on_mesh("gathers")
    assert found["count"] > 0  # of users' losses and of rows of the log
    assert found["largest"] < found["table"] / 50


@pytest.mark.slow
def test_a_sweep_is_planned_on_a_mesh():
    found = on_mesh("cost_of_a_sweep")
    assert set(found) == {"2,2", "1,1"}
    assert all(runs >= 1 and seconds > 0 for runs, seconds in found.values())


def test_too_few_devices_for_a_mesh():
    with pytest.raises(UserError, match="run=1, data=2, catalogue=4 needs 8 devices, but there"):
        devices.make_mesh(data=2, catalogue=4)
    for sizes in ({"data": 0}, {"catalogue": "2"}):
        with pytest.raises(UserError, match="expected 1 or more devices on each axis"):
            devices.make_mesh(**sizes)
