"""``cupy-engine serve`` under observation: what its processes use of the machine."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cupy_engine.errors import EngineError

_STOP_TIMEOUT_S = 60.0
_LOG_TAIL_CHARS = 2000
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """What a group of processes holds, and the CPU time they have used since they began."""

    cpu_s: float
    rss_bytes: int
    num_threads: int
    num_descriptors: int


class ServerProcess:
    """A running server. ``address``: host and port."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self._process = process
        self._log = log
        host, port = self._await_ready()
        self.address = (host, int(port))

    @classmethod
    @contextlib.contextmanager
    def serve(cls, model: str, *options: str) -> Iterator[ServerProcess]:
        """``cupy-engine serve MODEL OPTIONS`` on a free port, until the block ends. On the main thread.

        Raises:
            EngineError: it ended before it was ready; shows the end of its log.
        """
        with orderly_end(), tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "log"
            command = [sys.executable, "-m", "cupy_engine.server.cli", "serve", model, "--port", "0", *options]
            with log.open("wb") as out:
                process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)
            try:
                yield cls(process, log)
            finally:
                process.send_signal(signal.SIGTERM)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_STOP_TIMEOUT_S)
                process.kill()
                process.wait()

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        with urllib.request.urlopen("http://{}:{}/metrics".format(*self.address), timeout=30) as answer:
            page = answer.read().decode()
        found = re.findall(rf"^cupy_engine:{name}(?:\{{[^}}]*\}})? (\S+)$", page, re.MULTILINE)
        if not found:
            raise KeyError(name)
        return sum(map(float, found))

    def is_idle(self) -> bool:
        """Whether no request runs or waits, and no block is held."""
        names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
        return all(self.metric(name) == 0 for name in names)

    def worker_pids(self) -> list[int]:
        """The HTTP workers."""
        return [pid for pid in _children(self._process.pid) if "server.supervisor" not in _command(pid)]

    def engine_pids(self) -> list[int]:
        supervised = [pid for supervisor in _children(self._process.pid) for pid in _children(supervisor)]
        return [pid for pid in supervised if "engine_process" in _command(pid)]

    def _await_ready(self) -> tuple[str, str]:
        while True:
            has_ended = self._process.poll() is not None
            if found := re.search(r"ready on http://([^:\s]+):(\d+)", self.log()):
                return found[1], found[2]
            if has_ended:
                status, tail = self._process.returncode, self.log()[-_LOG_TAIL_CHARS:]
                raise EngineError(f"the server ended with status {status} before it was ready:\n{tail}")
            time.sleep(0.02)


def usage_of(pids: Sequence[int]) -> Usage:
    """What these processes use together."""
    cpu_s, num_rss_pages, num_threads, num_descriptors = 0.0, 0, 0, 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        cpu_s += (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
        num_threads += int(fields[17])
        num_rss_pages += int(fields[21])
        num_descriptors += len(os.listdir(f"/proc/{pid}/fd"))
    return Usage(cpu_s, num_rss_pages * _PAGE_BYTES, num_threads, num_descriptors)


@contextlib.contextmanager
def orderly_end() -> Iterator[None]:
    """SIGTERM (of ``timeout``, say) ends what this process has started, too. On the main thread."""

    def leave(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _children(pid: int) -> list[int]:
    listing = "".join(path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    return [int(child) for child in listing.split()]


def _command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
