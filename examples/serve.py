"""An HTTP service over a model that `seqfair export` wrote. Copy it and change it.

    pip install starlette uvicorn "jax>=0.10" numpy flatbuffers
    python examples/serve.py --model=DIR --port=8000
    curl -d '{"history": ["item-1", "item-2"], "k": 10}' http://127.0.0.1:8000/recommend

It answers {"items": [...], "scores": [...], "unknown": 0}: the best items that are not in the
history, and how many items of the history the model does not know. GET /health answers when the
model is ready.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

MAX_BYTES = 1_000_000  # of a request


def load_model(folder):
    """The model of an exported folder, by the folder's own load.py."""
    spec = importlib.util.spec_from_file_location("load", Path(folder, "load.py"))
    loader = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loader)
    return loader.Model(folder)


def check(request, max_k):
    """The history and k of a request; a bad request raises 400 with what was expected."""
    if not isinstance(request, dict) or not isinstance(request.get("history"), list):
        raise HTTPException(400, 'expected an object such as {"history": [...], "k": 10}')
    history, k = request["history"], request.get("k", min(10, max_k))
    if not all(type(item) in (int, str) for item in history):
        raise HTTPException(400, "history: expected a list of texts or whole numbers")
    if type(k) is not int or not 1 <= k <= max_k:
        raise HTTPException(400, f"k: expected a whole number from 1 to {max_k}")
    return history, k


def create_app(model):
    """The service of one model."""

    async def recommend(request: Request):
        too_long = HTTPException(413, f"expected at most {MAX_BYTES} bytes")
        if int(request.headers.get("content-length", 0)) > MAX_BYTES:
            raise too_long
        received = bytearray()
        async for part in request.stream():  # a chunked request does not say how long it is
            received += part
            if len(received) > MAX_BYTES:
                raise too_long
        try:
            body = json.loads(received)
        except (ValueError, RecursionError) as error:
            raise HTTPException(400, f"the body is not JSON: {error}") from None
        history, k = check(body, model.max_k)
        unknown = sum(item not in model.places for item in history)
        [found] = await run_in_threadpool(model.recommend, [history], k, mask_seen=True)
        items, scores = zip(*found, strict=True) if found else ((), ())
        return JSONResponse({"items": items, "scores": scores, "unknown": unknown})

    async def health(request: Request):
        return JSONResponse({"status": "ready", "items": len(model.item_ids)})

    async def failed(request: Request, error: HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)

    routes = [Route("/recommend", recommend, methods=["POST"]), Route("/health", health)]
    return Starlette(routes=routes, exception_handlers={HTTPException: failed})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="the folder of an exported model")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args()
    served = load_model(arguments.model)
    served.recommend([[]], k=1)  # compiles the program before the first request
    uvicorn.run(create_app(served), host=arguments.host, port=arguments.port)
