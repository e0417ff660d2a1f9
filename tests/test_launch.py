"""The shell scripts of `launch/`, with small programs in place of the commands and of Slurm's."""

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
LOCAL = LAUNCH / "local.sh"
SCRIPTS = sorted(LAUNCH.glob("*.sh"))
pytestmark = pytest.mark.skipif(shutil.which("taskset") is None, reason="taskset is of Linux")

# Counts the signals, as `training.signals` does: the first is to save and the second to end.
_COUNTING = """
import os, signal, sys, time
count = [0]
def handle(number, frame): count[0] += 1
for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, handle)
print("cores", *sorted(os.sched_getaffinity(0)), flush=True)
while not count[0]: time.sleep(0.01)
time.sleep(0.3)  # saving
print("signals", count[0], flush=True)
sys.exit(int(sys.argv[1]))
"""


def test_ctrl_c_reaches_each_process_once(tmp_path):
    processes = min(2, len(os.sched_getaffinity(0)))
    environment = {"PATH": os.environ["PATH"], "LOGS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    # `setsid -c` gives the script a terminal of its own, whose Ctrl-C signals a process group.
    # A job in the background of a shell has SIGINT ignored, and so would the script.
    command = ["env", "--default-signal=INT", "setsid", "-c", "bash", str(LOCAL), str(processes)]
    terminal, its_end = pty.openpty()
    process = subprocess.Popen(
        [*command, sys.executable, "-IS", "-c", _COUNTING, "3"],
        env=environment, stdin=its_end, stdout=its_end, stderr=its_end,
    )  # fmt: skip
    log = tmp_path / "local-1.log"
    printed = b""
    while b"cores" not in printed:
        printed += os.read(terminal, 1000)
    deadline = time.monotonic() + 10
    while processes == 2 and "cores" not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.write(terminal, b"\x03")
    while b"signals" not in printed:
        printed += os.read(terminal, 1000)
    assert process.wait(timeout=10) == 3
    os.close(terminal)
    os.close(its_end)
    outputs = [printed.decode().replace("^C", ""), *([log.read_text()] if processes == 2 else [])]
    cores = set()
    for output in outputs:
        lines = output.split("\n")
        assert lines[1].strip() == "signals 1"
        own = set(lines[0].split()[1:])
        assert own
        assert not own & cores
        cores |= own


@pytest.mark.parametrize("words", [[], ["2"], ["0", "true"], ["two", "true"], ["100000", "true"]])
def test_a_wrong_call_shows_the_usage(words):
    environment = {"PATH": os.environ["PATH"], "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(["bash", LOCAL, *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    expected = "100000 processes, but" if words[:1] == ["100000"] else "launch/local.sh 2 seqfair"
    assert expected in done.stderr


def test_the_status_is_that_of_a_process_that_fails(tmp_path):
    environment = {"PATH": os.environ["PATH"], "LOGS": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    for code in (0, 4):
        command = ["bash", LOCAL, "1", "bash", "-c", f"exit {code}"]
        assert subprocess.run(command, env=environment).returncode == code


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_the_scripts_are_correct_bash(script):
    subprocess.run(["bash", "-n", script], check=True)
    with_ours = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    shellcheck = shutil.which("shellcheck", path=with_ours)
    assert shellcheck, 'pip install -e ".[dev]" installs shellcheck'
    done = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


# What each script starts, and how Slurm starts it again.
_SLURM = {
    "slurm_sweep.sh": (["seqfair", "reproduce"], "requeue 40_3"),
    "slurm_multihost.sh": (
        ["--gpu-bind=none", "--kill-on-bad-exit=0", "seqfair", "reproduce", "--distributed"],
        "requeue 41",
    ),
}


def in_slurm(script, status, folder, *words, **variables):
    """Run a script with a `srun` that ends with a status; returns what the stubs were given."""
    for name, then in (("srun", f"exit {status}"), ("scontrol", "")):
        stub = folder / name
        stub.write_text(
            f'#!/bin/sh\necho "{name} $SRUN_CPUS_PER_TASK: $@" >>{folder}/calls\n{then}\n'
        )
        stub.chmod(0o755)
    done = subprocess.run(
        ["bash", LAUNCH / script, *words],
        env={"PATH": f"{folder}:{os.environ['PATH']}", **variables},
        capture_output=True, text=True,
    )  # fmt: skip
    calls = folder / "calls"
    return done, calls.read_text().splitlines() if calls.exists() else []


@pytest.mark.parametrize("status", [0, 1, 130, 143])
@pytest.mark.parametrize("script", _SLURM)
def test_slurm_starts_again_what_its_time_limit_stopped(script, status, tmp_path):
    expected, requeue = _SLURM[script]
    variables = {"SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "40", "SLURM_ARRAY_TASK_ID": "3"}
    done, calls = in_slurm(
        script, status, tmp_path, "seqfair", "reproduce", SLURM_CPUS_PER_TASK="6", **variables
    )
    assert done.returncode == status
    assert calls[0] == f"srun 6: {' '.join(expected)}"
    assert calls[1:] == ([f"scontrol 6: {requeue}"] if status == 130 else [])


@pytest.mark.parametrize("script", _SLURM)
def test_outside_of_slurm_the_usage_is_shown(script, tmp_path):
    for words in ([], ["seqfair", "reproduce"]):
        done, calls = in_slurm(script, 0, tmp_path, *words)
        assert done.returncode == 2
        assert f"launch/{script}" in done.stderr
        assert "SBATCH" not in done.stderr
        assert calls == []


@pytest.mark.parametrize("script", _SLURM)
def test_slurm_reads_the_options(script):
    """It stops reading at the first command."""
    lines = (LAUNCH / script).read_text().splitlines()
    first = next(n for n, line in enumerate(lines) if line and not line.startswith("#"))
    options = [line for line in lines[:first] if line.startswith("#SBATCH --")]
    assert len(options) == sum(line.startswith("#SBATCH") for line in lines) >= 9
    assert "#SBATCH --signal=INT@120" in options
