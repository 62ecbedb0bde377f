"""One engine for all commands that only need to talk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
from cupy_engine.server import chat, generate

from cupy_engine import Engine
from cupy_engine.model_source import ModelFiles


@pytest.fixture(scope="session")
def shared_engine(default_model: ModelFiles) -> Iterator[Engine]:
    with Engine(max_model_len=1024) as engine:
        yield engine


@pytest.fixture
def warm(shared_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the model loaded."""
    for module in (generate, chat):
        monkeypatch.setattr(module, "make_engine", lambda arguments: contextlib.nullcontext(shared_engine))
