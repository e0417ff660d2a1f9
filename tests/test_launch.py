"""`launch/local.sh`, in a terminal, with small programs in place of the commands."""

import os
import pty
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOCAL = Path(__file__).parents[1] / "launch" / "local.sh"
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
    command = ["setsid", "-c", "bash", str(LOCAL), str(processes)]
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
