"""Every exception the engine raises on purpose.

EngineError
├── ConfigError            a bad value in the configuration           (also a ValueError)
├── ModelLoadError         a model file is missing, broken or unknown
├── InvalidRequestError    a request that can never be served         (also a ValueError)   HTTP 400
├── QueueFullError         too many requests wait                                           HTTP 429
├── DeadlineExceededError  the request's time ran out                                       HTTP 504
└── EngineDeadError        the engine's loop or process has ended                           HTTP 503
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

QueueReason = Literal["queue_full", "slo_ttft"]


class EngineError(Exception):
    """Base of all errors below."""


class ConfigError(EngineError, ValueError):
    """A configuration value is not allowed. ``field`` names it."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ModelLoadError(EngineError):
    """A model cannot be loaded. ``file`` and ``tensor`` say where, if known."""

    def __init__(self, message: str, *, file: Path | str | None = None, tensor: str | None = None) -> None:
        where = ", ".join(part for part in (file and str(file), tensor and f"tensor {tensor}") if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.file = file
        self.tensor = tensor


class InvalidRequestError(EngineError, ValueError):
    """A request is malformed or can never fit. ``param`` names the offending field."""

    def __init__(self, param: str | None, message: str) -> None:
        super().__init__(message)
        self.param = param


class QueueFullError(EngineError):
    """Too many requests wait (``reason`` "queue_full"), or this one would wait too long ("slo_ttft").

    It should be tried again after ``retry_after_s`` seconds.
    """

    def __init__(self, message: str, retry_after_s: float = 1.0, reason: QueueReason = "queue_full") -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.reason: QueueReason = reason


class DeadlineExceededError(EngineError):
    """The request did not finish within its time limit."""


class EngineDeadError(EngineError):
    """The engine has stopped and takes no more requests."""
