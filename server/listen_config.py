"""Where ``cupy-engine serve`` listens, and with how many processes and threads."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from cupy_engine.config import EngineConfig, check_types
from cupy_engine.errors import ConfigError

from .logs import LogFormat

SPARE_THREADS = 64  # for /health and others while every generating thread is busy
MAX_THREADS = 10_000


@dataclass(frozen=True, kw_only=True)
class ListenConfig:
    """Where and with how many processes to serve.

    Args:
        host: address to listen on; 0.0.0.0 is every interface.
        port: TCP port; 0 takes a free one.
        workers: HTTP processes; default: one per two CPU cores, at most 8.
        threads: threads of each worker, one per request that waits; default: enough to fill the engine's queue.
        worker_class: gunicorn worker class; ``gthread`` gives every stream a thread.
        log_level: debug, info, warning or error.
        log_format: text, or json for one object a line; default: what CUPY_ENGINE_LOG_FORMAT says, else text.

    Raises:
        ConfigError: a bad value; ``field`` names it.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int | None = None
    threads: int | None = None
    worker_class: str = "cupy_engine.server.stream_worker.StreamWorker"
    log_level: str = "info"
    log_format: LogFormat | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", f"must be between 0 and 65535, got {self.port}")
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= 10_000:
                raise ConfigError(name, f"must be between 1 and 10000, got {value}")
        if self.log_level not in ("debug", "info", "warning", "error"):
            raise ConfigError("log_level", f"must be debug, info, warning or error, got {self.log_level!r}")

    def num_workers(self) -> int:
        return self.workers or min(8, max(1, (os.cpu_count() or 1) // 2))

    def num_threads(self, engines: Iterable[EngineConfig]) -> int:
        """So many that the engines' own queues fill up, and answer 429, before requests wait for a thread."""
        num_requests = sum(engine.max_num_seqs + engine.max_queue_len for engine in engines)
        return self.threads or min(MAX_THREADS, num_requests // self.num_workers() + SPARE_THREADS)
