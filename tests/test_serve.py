"""The HTTP service of examples/serve.py, over a socket."""

import contextlib
import http.client
import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from seqfair_jax import serving
from seqfair_jax.serving import export, exported

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
SERVICE = Path(__file__).parents[1] / "examples" / "serve.py"


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    export.write(folder, serving.load(finished().folder), max_k=12, platforms=["cpu"])
    return folder


@pytest.fixture(scope="module")
def address(folder):
    """Where the service listens: a port that was free."""
    process = subprocess.Popen(
        [sys.executable, str(SERVICE), f"--model={folder}", "--port=0"],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with process:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://127\.0\.0\.1:\d+)", line):
                yield found[1]
                break
        else:
            raise AssertionError("".join(lines))
        process.terminate()
        process.stderr.read()


@pytest.fixture(scope="module")
def model(folder):
    return exported.Model(folder)


def call(url, body=None):
    """The status of an answer and its JSON."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(url, data, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def test_a_posted_history_gets_the_lists_of_the_model(address, model):
    ids = model.item_ids
    known = [ids[3], "unheard", ids[7], ids[3], -5]
    for history, k in ((known, 4), ([], 12), (ids[2:], 3), (ids, 3)):
        [expected] = model.recommend([history], k, mask_seen=True)
        status, answer = call(f"{address}/recommend", {"history": history, "k": k})
        assert status == 200
        assert answer["items"] == [item for item, _ in expected]
        assert answer["scores"] == pytest.approx([score for _, score in expected], abs=1e-5)
        assert answer["unknown"] == sum(item not in ids for item in history)
    assert len(call(f"{address}/recommend", {"history": []})[1]["items"]) == 10


def test_health(address, model):
    assert call(f"{address}/health") == (200, {"status": "ready", "items": len(model.item_ids)})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is not JSON"),
        (b"\xff", "the body is not JSON"),
        (b"[" * 100_000 + b"]" * 100_000, "the body is not JSON"),
        (b"[1]", "expected an object such as"),
        ({"k": 3}, "expected an object such as"),
        ({"history": "i3"}, "expected an object such as"),
        ({"history": [["i3"]]}, "history: expected a list of texts or whole numbers"),
        ({"history": [True]}, "history: expected a list of texts or whole numbers"),
        ({"history": [], "k": 0}, "k: expected a whole number from 1 to 12"),
        ({"history": [], "k": 13}, "k: expected a whole number from 1 to 12"),
        ({"history": [], "k": "3"}, "k: expected a whole number from 1 to 12"),
    ],
)
def test_a_bad_request_is_refused_in_words(body, message, address):
    status, answer = call(f"{address}/recommend", body)
    assert status == 400
    assert message in answer["error"]


def test_other_requests_are_refused(address):
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):  # it is refused before its body arrives
        connection.putrequest("POST", "/recommend")
        connection.putheader("Content-Length", "1000001")
        connection.endheaders()
        assert connection.getresponse().status == 413
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):  # nor need its length be known
        connection.putrequest("POST", "/recommend")
        connection.putheader("Transfer-Encoding", "chunked")
        connection.endheaders()
        connection.send(b"f4241\r\n" + b" " * 1_000_001 + b"\r\n")
        assert connection.getresponse().status == 413
    assert call(f"{address}/recommend") == (405, {"error": "Method Not Allowed"})
    assert call(f"{address}/nothing") == (404, {"error": "Not Found"})
