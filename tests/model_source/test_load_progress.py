"""Who sees a progress bar while weights load, and what it counts."""

from __future__ import annotations

import io
import sys
from typing import Any

import numpy as np
import pytest

from cupy_engine import load_progress
from cupy_engine.load_progress import show_progress


class OneTensor:
    """A source of one tensor of 4 KiB that says it holds ``num_bytes``."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes

    def take(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        return np.zeros(shape, np.float32)

    def has(self, name: str) -> bool:
        return name == "w"

    def unused(self) -> list[str]:
        return ["v"]

    def close(self) -> None:
        self.num_bytes = 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def no_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_progress, "_DELAY_S", 0)


@pytest.mark.parametrize(
    ("stream", "num_bytes", "is_shown"),
    [
        (Terminal, 8192, True),
        (Terminal, 0, False),  # dummy weights
        (io.StringIO, 8192, False),
        (io.StringIO, 2 << 30, True),
    ],
)
def test_who_sees_it(monkeypatch: pytest.MonkeyPatch, stream: type[Any], num_bytes: int, is_shown: bool) -> None:
    err = stream()
    monkeypatch.setattr(sys, "stderr", err)
    with show_progress(OneTensor(num_bytes)) as source:
        assert source.take("w", (1024,)).nbytes == 4096
    assert ("weights" in err.getvalue()) == is_shown
    if num_bytes == 8192 and is_shown:
        assert "50%" in err.getvalue()


def test_the_source_shows_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    inner = OneTensor(4096)
    with show_progress(inner) as source:
        assert source.has("w")
        assert not source.has("v")
        assert source.unused() == ["v"]
        source.close()
    assert source.num_bytes == inner.num_bytes == 0


def test_a_quick_load_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    err = Terminal()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setattr(load_progress, "_DELAY_S", 60)
    with show_progress(OneTensor(4096)) as source:
        source.take("w", (1024,))
    assert err.getvalue() == ""
