"""One training of several processes, on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest

from seqfair_jax import serving, workdir
from seqfair_jax.serving import catalogue
from seqfair_jax.training.nearby import find_neighbours

pytestmark = pytest.mark.slow
_TRAIN = [
    "--config=demo",
    "--config.data.synthetic.num_users=600",
    "--config.model.dim=8",
    "--config.model.ff_dim=8",
    "--config.train.epochs=3",
    "--config.train.steps_per_epoch=4",
    "--config.train.decay_steps=16",
    "--config.train.checkpoint_minutes=0",
    "--config.train.segment_seconds=0",
    "--config.train.mesh.data=2",
    "--config.train.mesh.catalogue=2",
]


def command(folder, own=()):
    """The training, with words that are added or replace those of the same key."""
    train = [sys.executable, "-m", "seqfair_jax", "train", "--distributed"]
    keys = {word.partition("=")[0] for word in own}
    return [
        *train,
        *(word for word in _TRAIN if word.partition("=")[0] not in keys),
        *own,
        f"--workdir={folder}",
        f"--config.data.cache_dir={folder.parent}/cache",
    ]


def start(folder, *, number, port, own=()):
    """One of two processes with two devices each; `own` are words of this one alone."""
    settings = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(number),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    return subprocess.Popen(
        command(folder, own),
        env=os.environ | settings,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def start_both(folder, own=(), *, both=False):
    """Two processes; the words `own` are those of the second one, or of both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = {0: own if both else (), 1: own}
    return [start(folder, number=n, port=port, own=words[n]) for n in (0, 1)]


def train_to_the_end(folder):
    outputs = []
    processes = start_both(folder)
    for process in processes:
        outputs.append(process.communicate(timeout=500)[0])
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return outputs


@pytest.mark.slow
def test_two_processes_of_which_one_is_killed_resume_to_the_same_bits(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first, second = train_to_the_end(whole)
    # The first process speaks for both.
    assert "test users" in first
    assert "test users" not in second

    processes = start_both(killed)
    steps = killed / workdir.LATEST_CHECKPOINT
    deadline = time.monotonic() + 400
    while not any(steps.glob("[0-9]*")):
        assert time.monotonic() < deadline
        assert processes[0].poll() is None, processes[0].communicate()[0]
        time.sleep(0.2)
    processes[1].send_signal(signal.SIGKILL)
    output = processes[0].communicate(timeout=400)[0]  # it cannot go on alone
    assert processes[0].returncode != 0, output
    processes[1].communicate()
    assert not workdir.is_finished(killed)

    train_to_the_end(killed)
    for name in (workdir.METRICS, "per_user.parquet"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    one, other = (serving.load(folder).params for folder in (whole, killed))
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_processes_with_unequal_settings_train_nothing(tmp_path):
    processes = start_both(tmp_path / "run", own=["--config.train.learning_rate=0.5"])
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert all(process.returncode for process in processes)
    assert any("have unequal settings, --workdir or versions" in text for text in outputs)
    assert not list((tmp_path / "run").glob("*.json"))


def test_a_log_that_the_first_process_cannot_prepare_ends_all(tmp_path):
    more = ("--config.data.min_interactions=1000",)
    processes = start_both(tmp_path / "run", own=more, both=True)
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "nothing is left of" in outputs[0]
    assert "the first process could not prepare the log; see its message" in outputs[1]
    assert "Traceback" not in "".join(outputs)


@pytest.mark.slow
def test_a_checkpoint_of_four_devices_resumes_on_one(tmp_path):
    folder = tmp_path / "run"
    train_to_the_end(folder)
    before = workdir.read_metrics(folder)
    more = [word for word in _TRAIN if "mesh" not in word and "epochs" not in word]
    subprocess.run(
        [sys.executable, "-m", "seqfair_jax", "train", *more, "--config.train.epochs=4",
         f"--workdir={folder}", f"--config.data.cache_dir={tmp_path}/cache"],
        check=True,
    )  # fmt: skip
    after = workdir.read_metrics(folder)
    assert list(after["epoch"]) == [1, 2, 3, 4]
    pd.testing.assert_frame_equal(after[:3], before)
    # A training that started again would have the loss of a first epoch.
    assert after["train/loss"][3] < after["train/loss"][0]


@pytest.mark.slow
def test_neighbours_that_two_processes_share_are_written_whole(tmp_path):
    more = (
        "--config.model.neighbours=4",
        "--config.train.mesh.data=1",
        "--config.train.mesh.catalogue=4",
        "--config.train.epochs=1",
        "--config.train.steps_per_epoch=1",
    )
    folder = tmp_path / "run"
    processes = start_both(folder, more, both=True)
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    expected = find_neighbours(catalogue.read_dataset(folder), 4)
    jax.tree.map(np.testing.assert_array_equal, catalogue.read_neighbours(folder), expected)


def test_a_port_that_is_taken(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        process = start(tmp_path / "run", number=0, port=port)
        output = process.communicate(timeout=100)[0]
    assert process.returncode == 1, output
    assert f"port {port} cannot be used: Address already in use; name another" in output


def test_a_process_that_is_told_nothing_of_the_others_says_so(tmp_path):
    process = subprocess.run(
        command(tmp_path / "run"),
        env=os.environ | {"JAX_NUM_PROCESSES": "2"},
        capture_output=True,
        text=True,
    )
    assert process.returncode == 1
    assert "--distributed: cannot join the other processes" in process.stderr
    assert "JAX_COORDINATOR_ADDRESS=HOST:PORT" in process.stderr
    assert not Path(tmp_path / "run").exists()
