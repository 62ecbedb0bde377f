"""How much each API key may ask of a server: requests at a time, requests and tokens per minute.

What counts is the sum over all workers, models and replicas: every worker keeps its accounts in the same file.

    FOLDER/keys     shared memory: float64 cells, changed under a lock of the file
      workers       pid, start time                                 one row per worker that has served a request
      keys          request budget, token budget, when (monotonic), live requests of each worker      one row per key

A worker that was killed leaves its counts behind; they are forgotten before anyone is refused because of them.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cupy_engine.errors import EngineError

from .api_errors import ApiError
from .runtime_folder import start_time
from .server_config import ServerConfig

FILE = "keys"
MAX_WORKERS = 256
_REQUESTS, _TOKENS, _UPDATED, _LIVE = range(4)  # cells of a key; _LIVE is the first of MAX_WORKERS
_WORKER_CELLS, _KEY_CELLS = 2, 3 + MAX_WORKERS


class KeyLimits:
    """The accounts of all keys. Any thread of any worker.

    Budgets are buckets: they hold a minute's worth, and fill up evenly. Tokens are charged when they are known, at the
    end, so that a budget may go below zero and has to recover.

    Raises:
        EngineError: there is no room for the accounts.
    """

    def __init__(self, folder: Path, config: ServerConfig) -> None:
        self._config = config
        self._rows = {
            key: MAX_WORKERS * _WORKER_CELLS + number * _KEY_CELLS for number, key in enumerate(config.api_keys)
        }
        num_bytes = 8 * (MAX_WORKERS * _WORKER_CELLS + len(self._rows) * _KEY_CELLS)
        self._file = os.open(folder / FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(self._file, 0, num_bytes)  # or a write without room would kill the worker
        except OSError as error:
            raise EngineError(f"no room for the accounts of keys in {folder} ({error.strerror})") from None
        self._cells = memoryview(mmap.mmap(self._file, num_bytes)).cast("d")
        self._threads = threading.Lock()
        self._pid: int | None = None
        self._worker = -1

    def __contains__(self, key: object) -> bool:
        """Whether a key has limits: an administrator's has none."""
        return key in self._rows

    def enter(self, key: str) -> Lease:
        """Begin a request. The lease must be closed when it ends.

        Raises:
            ApiError: 429, and when to try again.
        """
        config = self._config
        with self._locked():
            self._claim_worker()
            row = self._rows[key]
            self._refill(row)
            if config.key_max_requests is not None and self._num_live(row) >= config.key_max_requests:
                raise _refusal(f"{config.key_max_requests} requests at a time (key_max_requests)", 1.0)
            if (limit := config.key_tokens_per_minute) is not None and (debt := -self._cells[row + _TOKENS]) >= 0:
                raise _refusal(f"{limit} tokens per minute (key_tokens_per_minute)", (debt + 1) * 60 / limit)
            if (limit := config.key_requests_per_minute) is not None and (left := self._cells[row + _REQUESTS]) < 1:
                raise _refusal(f"{limit} requests per minute (key_requests_per_minute)", (1 - left) * 60 / limit)
            self._cells[row + _REQUESTS] -= 1
            self._cells[row + _LIVE + self._worker] += 1
        return Lease(self, key)

    def leave(self, key: str, num_tokens: int) -> None:
        """End a request that took ``num_tokens``, prompt and output."""
        with self._locked():
            row = self._rows[key]
            self._refill(row)
            self._cells[row + _TOKENS] -= num_tokens
            self._cells[row + _LIVE + self._worker] -= 1

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with self._threads:
            fcntl.lockf(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.lockf(self._file, fcntl.LOCK_UN)

    def _refill(self, row: int) -> None:
        """Budgets are full at first sight of a key."""
        cells, now_s = self._cells, time.monotonic()
        minutes = (now_s - cells[row + _UPDATED]) / 60 if cells[row + _UPDATED] else 1.0
        cells[row + _UPDATED] = now_s
        for cell, limit in (
            (row + _REQUESTS, self._config.key_requests_per_minute),
            (row + _TOKENS, self._config.key_tokens_per_minute),
        ):
            cells[cell] = min(limit, cells[cell] + limit * minutes) if limit is not None else 0.0

    def _num_live(self, row: int) -> float:
        """Live requests of a key; workers are looked after only where the number may matter."""
        num_live = sum(self._cells[row + _LIVE : row + _LIVE + MAX_WORKERS])
        limit = self._config.key_max_requests
        if limit is None or num_live < limit:
            return num_live
        for worker in range(MAX_WORKERS):
            if not self._is_alive(worker):
                self._forget(worker)
        return sum(self._cells[row + _LIVE : row + _LIVE + MAX_WORKERS])

    def _claim_worker(self) -> None:
        """Take a row that no living worker has, if this process has none yet."""
        if self._pid == os.getpid():
            return
        free = (worker for worker in range(MAX_WORKERS) if not self._is_alive(worker))
        if (worker := next(free, None)) is None:
            message = f"limits of keys can be counted over {MAX_WORKERS} HTTP workers, and there are more"
            raise ApiError(503, message, code="too_many_workers")
        self._worker = worker
        self._forget(self._worker)
        self._pid = os.getpid()
        self._cells[2 * self._worker] = self._pid
        self._cells[2 * self._worker + 1] = float(start_time(self._pid))

    def _is_alive(self, worker: int) -> bool:
        pid, started = self._cells[2 * worker], self._cells[2 * worker + 1]
        return bool(pid) and start_time(int(pid)) == str(int(started))

    def _forget(self, worker: int) -> None:
        if self._cells[2 * worker]:
            self._cells[2 * worker] = 0.0
            for row in self._rows.values():
                self._cells[row + _LIVE + worker] = 0.0


class Lease:
    """A request that counts against its key until it is closed."""

    def __init__(self, limits: KeyLimits, key: str) -> None:
        self._limits = limits
        self._key = key

    def close(self, num_tokens: int) -> None:
        self._limits.leave(self._key, num_tokens)


def _refusal(what: str, retry_after_s: float) -> ApiError:
    message = f"this key is allowed {what}; try again in {max(1, round(retry_after_s))} s"
    return ApiError(429, message, code="rate_limit_exceeded", retry_after_s=retry_after_s)
