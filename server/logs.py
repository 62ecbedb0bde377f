"""Structured logs: one line for what happened, as ``event key=value …`` or as one JSON object."""

from __future__ import annotations

import logging
import os
import sys
from datetime import UTC, datetime
from typing import Literal

import msgspec

ROOT = "cupy_engine"
FORMAT_VARIABLE = "CUPY_ENGINE_LOG_FORMAT"  # the way to processes that are started, and to plain gunicorn's workers
LogFormat = Literal["text", "json"]


def configure_logging(level: str = "info", log_format: LogFormat | None = None) -> None:
    """Send the engine's logs to standard error, unless the host program has chosen otherwise.

    Args:
        log_format: default: what :data:`FORMAT_VARIABLE` says, else text. Processes started from here follow it.
    """
    root = logging.getLogger(ROOT)
    if log_format is not None:
        os.environ[FORMAT_VARIABLE] = log_format
    if root.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    is_json = os.environ.get(FORMAT_VARIABLE) == "json"
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    handler.setFormatter(JsonFormatter() if is_json else text)
    root.addHandler(handler)
    root.setLevel(level.upper())
    root.propagate = False


class Line:
    """An event and its values; as text, values with spaces are quoted and control characters escaped.

    >>> str(Line("request", {"id": "cmpl-1", "ttft_ms": 12.3456, "error": "no such thing"}))
    'request id=cmpl-1 ttft_ms=12.3 error="no such thing"'
    """

    def __init__(self, event: str, values: dict[str, object]) -> None:
        self.event = event
        self.values = values

    def __str__(self) -> str:
        return " ".join((self.event, *(f"{name}={_format(value)}" for name, value in self.values.items())))


def line(event: str, **values: object) -> Line:
    """Something to log: ``logger.info(line("request", id="cmpl-1"))``."""
    return Line(event, values)


class JsonFormatter(logging.Formatter):
    """One object a line: ``time`` (UTC), ``level``, ``logger``, ``event``, and a Line's values under their names."""

    def format(self, record: logging.LogRecord) -> str:
        found = record.msg if isinstance(record.msg, Line) else Line(record.getMessage(), {})
        told: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": found.event,
            **{name: round(value, 3) if isinstance(value, float) else value for name, value in found.values.items()},
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(told, enc_hook=str).decode("utf-8", "replace")


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = str(value)
    if text.isprintable() and not any(c in text for c in ' "='):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', "'") + '"'
