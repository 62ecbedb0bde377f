"""Replicas over a cluster: a Ray Serve application (extra ``ray``) of which each replica is a whole server.

    serve run cupy_engine.server.ray_app:build model=smollm2-135m max_replicas=4 num_gpus=1

    client ──HTTP──▶ Ray Serve's proxy ──▶ Replica (an actor, on any node) ──HTTP, loopback──▶ cupy-engine serve

A replica hands requests on and streams back what comes, so everything is as without Ray: endpoints, limits, aborts of
those who hang up. Ray places replicas where there are GPUs, scales them with the load and replaces those that fail.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from typing import Any

from cupy_engine.errors import ConfigError, EngineError

START_TIMEOUT_S = 1800.0  # a large model may have to be fetched
STOP_TIMEOUT_S = 40.0
_READY = re.compile(r"^ready on (http://\S+)")
_HOP_BY_HOP = frozenset({"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "host"})
_OWN_OPTIONS = {
    "min_replicas": "1",
    "max_replicas": "1",
    "target_ongoing_requests": "64",
    "upscale_delay_s": "10",
    "downscale_delay_s": "600",
    "health_check_period_s": "10",
    "max_ongoing_requests": "1024",
    "num_gpus": "0",
    "num_cpus": "1",
}


def build(options: dict[str, str]) -> Any:
    """The application, for ``serve run`` and ``serve deploy``.

    Args:
        options: ``model``; for scaling ``min_replicas``, ``max_replicas``, ``target_ongoing_requests`` (per replica),
            ``upscale_delay_s`` and ``downscale_delay_s`` (so long must a load last); ``health_check_period_s`` (a
            replica that fails three checks is replaced); ``num_gpus`` and ``num_cpus`` of a replica; the rest are
            options of ``cupy-engine serve`` (``max_num_seqs``).

    Raises:
        ConfigError: a number that is none.
    """
    own = {name: _number(name, str(options.get(name, default))) for name, default in _OWN_OPTIONS.items()}
    from ray import serve

    as_deployment = serve.deployment(
        name="cupy-engine",
        max_ongoing_requests=int(own["max_ongoing_requests"]),
        autoscaling_config={
            "min_replicas": int(own["min_replicas"]),
            "max_replicas": int(own["max_replicas"]),
            "target_ongoing_requests": own["target_ongoing_requests"],
            "upscale_delay_s": own["upscale_delay_s"],
            "downscale_delay_s": own["downscale_delay_s"],
        },
        ray_actor_options={"num_gpus": own["num_gpus"], "num_cpus": own["num_cpus"]},
        health_check_period_s=own["health_check_period_s"],
        graceful_shutdown_timeout_s=STOP_TIMEOUT_S,
    )
    return as_deployment(Replica).bind(serve_arguments({k: v for k, v in options.items() if k not in _OWN_OPTIONS}))


def serve_arguments(options: dict[str, str]) -> list[str]:
    """Options as the command line of ``cupy-engine serve`` wants them: ``strict=true`` is a flag.

    >>> serve_arguments({"model": "m", "max_num_seqs": "8", "strict": "true", "log_requests": "false"})
    ['m', '--max-num-seqs', '8', '--strict', '--no-log-requests']
    """
    arguments = [options["model"]] if "model" in options else []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if name == "model":
            continue
        if str(value).lower() in ("true", "false"):
            arguments.append(f"--{flag}" if str(value).lower() == "true" else f"--no-{flag}")
        else:
            arguments += [f"--{flag}", str(value)]
    return arguments


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(name, f"must be a number, got {text!r}") from None


class Replica:
    """A server of its own on this node, and the way to it.

    Args:
        arguments: of ``cupy-engine serve``, but host and port.

    Raises:
        EngineError: the server does not start; its last lines say why.
    """

    def __init__(self, arguments: list[str]) -> None:
        self._server = ServerThread(arguments)
        self._server.start()
        self._url = self._server.wait_until_ready()
        self._session: Any = None

    async def __call__(self, request: Any) -> Any:
        """Hand on a Starlette request; its answer streams back as it comes."""
        from starlette.responses import StreamingResponse

        answer = await self._client().request(
            request.method,
            self._url + request.url.path,
            params=request.query_params.multi_items(),
            data=await request.body(),
            headers=_without_hop_by_hop(request.headers.items()),
            allow_redirects=False,
        )
        headers = _without_hop_by_hop(answer.headers.items()) | {"X-Replica": str(os.getpid())}
        return StreamingResponse(_body(answer), answer.status, headers)

    async def check_health(self) -> None:
        """Raises EngineError if the server makes no progress: Ray then replaces this replica."""
        async with self._client().get(self._url + "/health") as answer:
            if answer.status != 200:
                raise EngineError(f"the server is unhealthy: {await answer.text()}")

    def _client(self) -> Any:
        if self._session is None:
            import aiohttp

            timeout = aiohttp.ClientTimeout(total=None)
            self._session = aiohttp.ClientSession(timeout=timeout, auto_decompress=False, connector=_many())
        return self._session

    def __del__(self) -> None:
        self._server.stop()


def _many() -> Any:
    """As many connections as there are requests: Ray limits those."""
    import aiohttp

    return aiohttp.TCPConnector(limit=0)


async def _body(answer: Any) -> AsyncIterator[bytes]:
    """Pieces as they come. Closing the connection early is how the server learns that the client has gone."""
    try:
        async for piece in answer.content.iter_any():
            yield piece
    finally:
        answer.close()


def _without_hop_by_hop(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers if name.lower() not in _HOP_BY_HOP}


class ServerThread(threading.Thread):
    """``cupy-engine serve`` on a free loopback port; passes its output on.

    The kernel ends the server when this thread goes, however the actor's process ends.
    """

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(name="cupy-engine-serve", daemon=True)
        watch = ["setpriv", "--pdeathsig", "TERM"] if shutil.which("setpriv") else []
        serve = [sys.executable, "-m", "cupy_engine.server.cli", "serve", *arguments]
        self._command = [*watch, *serve, "--host", "127.0.0.1", "--port", "0"]
        self._process: subprocess.Popen[str] | None = None
        self._has_news = threading.Event()
        self._url: str | None = None
        self._last_line = ""

    def run(self) -> None:
        try:
            with subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            ) as process:
                self._process = process
                for line in process.stdout or ():
                    self._hear(line)
        finally:
            self._has_news.set()

    def _hear(self, line: str) -> None:
        sys.stderr.write(line)
        self._last_line = line.strip() or self._last_line
        if found := _READY.match(line):
            self._url = found[1]
            self._has_news.set()

    def wait_until_ready(self, timeout_s: float = START_TIMEOUT_S) -> str:
        """The server's URL. Raises EngineError if it ends or takes longer."""
        if not self._has_news.wait(timeout_s) or self._url is None:
            self.stop()
            raise EngineError(f"the server did not start: {self._last_line or 'no output'}")
        return self._url

    def stop(self) -> None:
        """Let requests finish, then end."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
            return
        process.kill()
