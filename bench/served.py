"""A server to measure: started here with the real command, or any that runs already."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, Any

from cupy_engine.errors import EngineError

from .load import Target

_READY = re.compile(rb"ready on (http://\S+)")
_POLL_S = 0.02
_STOP_TIMEOUT_S = 60.0
_CALL_TIMEOUT_S = 120.0
_LOG_TAIL_CHARS = 2000


@contextmanager
def started_server(options: Sequence[str]) -> Iterator[tuple[Target, dict[str, float]]]:
    """``cupy-engine serve`` with these options on a free port, and how long it took: ``ready_s``, ``first_answer_s``.

    Raises:
        EngineError: it ended before it was ready; shows the end of its log.
    """
    command = [sys.executable, "-m", "cupy_engine.server.cli", "serve", *options, "--port=0"]
    with tempfile.TemporaryFile() as log:
        start_s = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        try:
            url = _wait_until_ready(process, log)
            ready_s = time.monotonic() - start_s
            target = running_server(url, None)
            complete(target, "Hello")
            yield target, {"ready_s": ready_s, "first_answer_s": time.monotonic() - start_s}
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_STOP_TIMEOUT_S)
            process.kill()
            process.wait()


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


def _wait_until_ready(process: subprocess.Popen[bytes], log: IO[bytes]) -> str:
    while True:
        has_ended = process.poll() is not None
        log.seek(0)
        text = log.read()
        if found := _READY.search(text):
            return found[1].decode()
        if has_ended:
            tail = text.decode("utf-8", "replace")[-_LOG_TAIL_CHARS:]
            raise EngineError(f"the server ended with status {process.returncode} before it was ready:\n{tail}")
        time.sleep(_POLL_S)


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
