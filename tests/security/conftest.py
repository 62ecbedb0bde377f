"""Servers that can be broken on purpose."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "server"))

from breakable_server import FAULTS, Breakable
from live_server import LiveServer, long_model_options


@pytest.fixture(scope="module")
def breakable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Breakable]:
    folder = tmp_path_factory.mktemp("model")
    file = folder / "fault"
    options = (*long_model_options(folder), "--stall-timeout-s", "2")
    with LiveServer.serve(*options, PYTHONPATH=FAULTS, FAULT_FILE=str(file)) as live:
        yield Breakable(live, file)
