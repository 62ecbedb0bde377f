"""Numbers on a benchmark's command line, for ``add_argument(type=…)``: the error names the option as it is typed."""

from __future__ import annotations

from argparse import ArgumentTypeError


def count(text: str) -> int:
    """At least 1."""
    if (value := int(text)) < 1:
        raise ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def amount(text: str) -> float:
    """Finite and above 0."""
    if not 0 < (value := float(text)) < float("inf"):
        raise ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def percentile(text: str) -> float:
    """From 0 to 100."""
    if not 0 <= (value := float(text)) <= 100:
        raise ArgumentTypeError(f"must be between 0 and 100, got {text}")
    return value
