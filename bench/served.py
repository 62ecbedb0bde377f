"""A server to measure: started here with the real command, or any that runs already."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from cupy_engine.errors import EngineError

from .load import Target
from .server_process import ServerProcess

_CALL_TIMEOUT_S = 120.0


@contextmanager
def started_server(model: str, options: Sequence[str]) -> Iterator[tuple[Target, dict[str, float]]]:
    """``cupy-engine serve`` with these options, and how long it took: ``ready_s``, ``first_answer_s``.

    Raises:
        EngineError: it ended before it was ready.
    """
    start_s = time.monotonic()
    with ServerProcess.serve(model, *options) as server:
        ready_s = time.monotonic() - start_s
        target = running_server("http://{}:{}".format(*server.address), None)
        complete(target, "Hello")
        yield target, {"ready_s": ready_s, "first_answer_s": time.monotonic() - start_s}


def running_server(url: str, api_key: str | None) -> Target:
    """A server of any maker that speaks OpenAI's dialect, and the first of its models.

    Raises:
        EngineError: nobody answers there.
    """
    parts = urllib.parse.urlsplit(url)
    if parts.scheme != "http" or parts.hostname is None:
        raise EngineError(f"url: must be like http://127.0.0.1:8000, got {url!r}")
    target = Target(parts.hostname, parts.port or 80, "", api_key)
    models = _call(target, "/v1/models")["data"]
    return Target(target.host, target.port, models[0]["id"], api_key)


def complete(target: Target, prompt: str) -> None:
    """Have one token made."""
    _call(target, "/v1/completions", {"model": target.model, "prompt": prompt, "max_tokens": 1, "temperature": 0})


def _call(target: Target, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"Content-Type": "application/json"}
    if target.api_key:
        headers["Authorization"] = f"Bearer {target.api_key}"
    data = None if body is None else json.dumps(body).encode()
    url = f"http://{target.host}:{target.port}{path}"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=_CALL_TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            text = error.read().decode("utf-8", "replace")[:500]
        raise EngineError(f"{url} answers {error.code}: {text}") from None
    except OSError as error:
        raise EngineError(f"{url} does not answer: {error}") from None
