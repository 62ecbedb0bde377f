"""Putting something in the place of a method, for a while: how clocks get into a running engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """``owner.name`` is ``value`` until the context ends; then it is what its class says again."""
    assert name not in vars(owner), f"{name} of {owner} has been replaced already"
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
