"""The examples run, at a small size."""

import html
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from numpy.testing import assert_allclose
from runs import small, train_command

from examples import own_loop
from seqfair_jax import __main__ as seqfair
from seqfair_jax import objectives, workdir
from seqfair_jax.config.files import load_config
from seqfair_jax.data.synthetic import default_settings, generate
from seqfair_jax.objectives import make_objective
from seqfair_jax.run import run

EXAMPLES = Path(__file__).parents[1] / "examples"
LOSSES = np.array([4.0, 1.0, 3.0, 0.5, 4.5])


def test_a_loop_of_ones_own_trains_and_judges_by_group():
    log = generate(ConfigDict(default_settings() | {"num_users": 300, "num_items": 80}))
    before, after = (own_loop.main(log, steps=steps, batch=8) for steps in (0, 60))
    assert list(after.columns) == ["NDCG@20", "Recall@20", "users"]
    assert set(after.index) <= {"niche", "diverse", "popular"}
    overall = [np.average(table["NDCG@20"], weights=table["users"]) for table in (before, after)]
    assert overall[1] > overall[0] + 0.05


@pytest.fixture
def qffl():
    """q-FFL, registered as the train command registers it."""
    load_config(str(EXAMPLES / "own_objective.py"))
    objective = make_objective(
        "qffl", membership=np.eye(5, 2, dtype=bool), train_lengths=np.ones(5, np.int32)
    )

    def loss_fn(losses, fairness):
        loss, state, logged = objective.apply(losses, objective_groups, (), {"fairness": fairness})
        return loss, (state, logged)

    objective_groups = jnp.eye(5, 2, dtype=bool)
    return jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


@pytest.mark.parametrize("fairness", [0.1, 1.0, 5.0])
def test_qffls_loss_and_gradient_follow_its_definition(qffl, fairness):
    (loss, (state, logged)), gradient = qffl(LOSSES.astype(np.float32), jnp.float32(fairness))

    def definition(losses):
        return np.mean(losses ** (fairness + 1)) / (fairness + 1)

    differences = np.array([
        (definition(LOSSES + 1e-6 * unit) - definition(LOSSES - 1e-6 * unit)) / 2e-6
        for unit in np.eye(5)
    ])  # fmt: skip
    assert_allclose(loss, definition(LOSSES), rtol=1e-5)
    assert_allclose(gradient, differences, rtol=1e-4, atol=1e-6)
    shares = differences[:2] / differences.sum()
    assert_allclose(logged["tail_share"], shares, rtol=1e-4, atol=1e-6)
    assert state == ()


def test_qffl_without_fairness_is_the_mean(qffl):
    losses = LOSSES.astype(np.float32)
    assert_allclose(qffl(losses, jnp.float32(0))[0][0], LOSSES.mean(), rtol=1e-6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the train command with the example as its config file."""
    config, folder = EXAMPLES / "own_objective.py", tmp_path_factory.mktemp("qffl") / "run"
    # Shapes as in the script, which then compiles nothing.
    changes = ["--config.objective.fairness=0.5", "--config.train.epochs=1"]
    command = [*train_command(config, folder), *changes]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_the_train_command_trains_it_by_its_config_file(trained):
    folder, printed = trained
    assert "q-FFL (fairness 0.5)" in printed
    assert workdir.read_summary(folder)["hparams"] == {"fairness": 0.5}


def test_a_finished_run_is_read_without_its_objective(trained, tmp_path, capsys):
    folder, _ = trained
    assert "qffl" not in objectives.METHODS
    seqfair.main(["report", str(folder), f"--out={tmp_path / 'report.html'}"])
    assert "q-FFL (fairness 0.5)" in capsys.readouterr().out
    page = html.unescape((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert objectives.TAIL_SHARE.title in page
    seqfair.main(["recommend", f"--workdir={folder}", f"--out={tmp_path / 'recs.csv'}"])
    assert (tmp_path / "recs.csv").is_file()


def test_a_finished_run_prints_its_table_after_another_objective_was_registered(finished, capsys):
    folder, summary, _ = finished()
    load_config(str(EXAMPLES / "own_objective.py"))
    config = small()
    assert config.objective.fairness == (1.0,)
    assert run(config, folder) == workdir.jsonable(summary)
    assert capsys.readouterr().out.startswith("synthetic, NDCG@20")


def test_a_config_file_imports_the_module_that_registers(tmp_path):
    source = (EXAMPLES / "own_objective.py").read_text()
    (tmp_path / "imported_qffl.py").write_text(source)
    (tmp_path / "mine.py").write_text("from imported_qffl import get_config\n")
    assert load_config(str(tmp_path / "mine.py")).objective.name == "qffl"
    assert str(tmp_path) not in sys.path


@pytest.mark.slow
def test_it_runs_as_a_script(tmp_path):
    done = subprocess.run(
        [sys.executable, EXAMPLES / "own_objective.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "q-FFL (fairness 1)" in done.stdout
