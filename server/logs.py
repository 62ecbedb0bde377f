"""One-line structured logs: what happened, then ``key=value`` pairs. Prompts and outputs are never logged."""

from __future__ import annotations

import logging
import sys

ROOT = "cupy_engine"


def configure_logging(level: str = "info") -> None:
    """Send the engine's logs to standard error, unless the host program has chosen otherwise."""
    root = logging.getLogger(ROOT)
    if root.handlers or logging.getLogger().handlers:
        return
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    root.addHandler(handler)
    root.setLevel(level.upper())
    root.propagate = False


def line(event: str, **values: object) -> str:
    """``event key=value …``; values with spaces are quoted, control characters escaped.

    >>> line("request", id="cmpl-1", ttft_ms=12.3456, error="no such thing")
    'request id=cmpl-1 ttft_ms=12.3 error="no such thing"'
    """
    return " ".join((event, *(f"{name}={_format(value)}" for name, value in values.items())))


def _format(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.1f}"
    text = str(value)
    if text.isprintable() and not any(c in text for c in ' "='):
        return text
    return '"' + text.encode("unicode_escape").decode().replace('"', "'") + '"'
