"""A server in its own processes, with everything it could leave behind counted."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from golden_data import GOLDEN

TINY = GOLDEN / "tiny" / "llama"
START_TIMEOUT_S = 60.0
_MARK = "CUPY_ENGINE_TEST_MARK"


def wait_until(is_true: Callable[[], bool], timeout_s: float, what: str) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.02)


def long_model_options(folder: Path) -> tuple[str, ...]:
    """A tiny model of random weights that may talk for minutes, and one worker."""
    config = (TINY / "config.json").read_text()
    old = '"max_position_embeddings": 512'
    assert old in config
    (folder / "config.json").write_text(config.replace(old, '"max_position_embeddings": 262144'))
    return (str(folder), "--load-format", "dummy", "--kv-cache-memory-bytes", str(1 << 28), "--workers", "1")


class LiveServer:
    """Processes started by ``command``; they inherit a mark by which all of them are found, and a folder for files."""

    def __init__(self, command: list[str], **environment: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ce-", dir="/tmp"))
        self._mark = uuid.uuid4().hex
        self._log = open(self.folder / "log", "w+b")  # noqa: SIM115  closed in close()
        variables = {k: v for k, v in os.environ.items() if k != "XDG_RUNTIME_DIR"}
        self.tmp = self.folder / "t"
        self.tmp.mkdir()
        variables |= {_MARK: self._mark, "TMPDIR": str(self.tmp), **environment}
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,
        )
        self.url = ""
        self.key = ""

    @classmethod
    @contextlib.contextmanager
    def serve(cls, *options: str, wait: bool = True, **environment: str) -> Iterator[Self]:
        """``cupy-engine serve`` on a free port."""
        command = [sys.executable, "-m", "cupy_engine.server.cli", "serve", "--port", "0", *options]
        with cls(command, **environment).opened(r"ready on (http://\S+)" if wait else None) as live:
            yield live

    @classmethod
    @contextlib.contextmanager
    def gunicorn(cls, *options: str, app: str, wait: bool = True) -> Iterator[Self]:
        """Plain gunicorn."""
        factory = f"cupy_engine.server:create_api_server({app})"
        command = [sys.executable, "-m", "gunicorn", "-b", "127.0.0.1:0", *options, factory]
        with cls(command).opened(r"Listening at: (http://\S+)" if wait else None) as live:
            if wait:
                wait_until(lambda: live.status("/health") == 200, START_TIMEOUT_S, "healthy")
            yield live

    @contextlib.contextmanager
    def opened(self, address: str | None) -> Iterator[Self]:
        try:
            if address is not None:
                self.url = self.wait_for_log(address)[1]
            yield self
        except BaseException:
            print(self.log())
            raise
        finally:
            self.close()

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")

    def wait_for_log(self, pattern: str, timeout_s: float = START_TIMEOUT_S) -> re.Match[str]:
        wait_until(lambda: bool(re.search(pattern, self.log())) or self.process.poll() is not None, timeout_s, pattern)
        found = re.search(pattern, self.log())
        assert found, f"the server ended with {self.process.returncode}:\n{self.log()}"
        return found

    # HTTP

    def call(self, path: str, body: object = None, timeout_s: float = 60.0) -> tuple[int, Any]:
        """Status and JSON (or text) of a GET, or of a POST of ``body``."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url + path, data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, _parse(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, _parse(error.read())

    def status(self, path: str) -> int:
        """The status of a GET; 0 if nobody answers."""
        try:
            return self.call(path, timeout_s=5)[0]
        except OSError:
            return 0

    def metric(self, name: str) -> float:
        page = self.call("/metrics")[1]
        found = re.search(rf"^cupy_engine:{name}\{{[^}}]*\}} (\S+)$", page, re.MULTILINE)
        assert found, page
        return float(found[1])

    def is_idle(self) -> bool:
        """Whether no request runs or waits, and no block is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.metric(name) == 0 for name in names)

    def open_stream(self, body: dict[str, Any]) -> socket.socket:
        """A raw connection with a streaming completion on its way."""
        host, port = self.url.removeprefix("http://").split(":")
        connection = socket.create_connection((host, int(port)), timeout=60)
        self.send_stream(connection, body)
        return connection

    @staticmethod
    def send_stream(connection: socket.socket, body: dict[str, Any]) -> None:
        payload = json.dumps({"stream": True, **body}).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(payload)}\r\n\r\n"
        connection.sendall(head.encode() + payload)

    def open_running_stream(self, body: dict[str, Any]) -> socket.socket:
        """The same after its first event."""
        connection, answer = self.open_stream(body), b""
        while b"data: " not in answer:
            piece = connection.recv(65536)
            assert piece, answer
            answer += piece
        return connection

    # processes

    def pids(self) -> dict[int, str]:
        """Every live process of this server and its command line."""
        found = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdigit():
                with contextlib.suppress(OSError):
                    if self._mark.encode() in (folder / "environ").read_bytes():
                        found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def engine_pid(self) -> int:
        (engine,) = self.engine_pids()
        return engine

    def engine_pids(self) -> list[int]:
        return [pid for pid, command in self.pids().items() if "engine_process" in command]

    def supervisor_pid(self) -> int:
        (supervisor,) = [pid for pid, command in self.pids().items() if "server.supervisor" in command]
        return supervisor

    def worker_pids(self) -> list[int]:
        """gunicorn's."""
        own = (self.process.pid, self.supervisor_pid(), *self.engine_pids())
        return sorted(pid for pid in self.pids() if pid not in own)

    def end(self, number: int = signal.SIGTERM, timeout_s: float = 20.0) -> int:
        """Send a signal to the main process and wait for it; its exit status."""
        self.process.send_signal(number)
        return self.process.wait(timeout_s)

    def assert_no_trace(self, timeout_s: float = 10.0) -> None:
        """No process, socket, folder or lock is left."""
        wait_until(lambda: not self.pids(), timeout_s, f"processes end: {self.pids()}")
        wait_until(lambda: not list(self.tmp.iterdir()), 1, f"files go: {list(self.tmp.rglob('*'))}")

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def _parse(payload: bytes) -> Any:
    text = payload.decode()
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
