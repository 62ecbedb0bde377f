"""A front end of the default model, an application over a fake engine, and live servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from api_client import Api, MakeApi
from cupy_engine.server.server_config import ServerConfig
from fake_engine import Script, says
from live_server import LiveServer

from cupy_engine.config import EngineConfig
from cupy_engine.frontend import FrontEnd
from cupy_engine.model_source import ModelFiles


@pytest.fixture(scope="session")
def front_end(default_model: ModelFiles) -> FrontEnd:
    return FrontEnd.from_config(EngineConfig(), default_model)


@pytest.fixture(scope="session")
def paris(front_end: FrontEnd) -> list[int]:
    """Token ids of what the fake engine says."""
    assert front_end.tokenizer is not None
    return front_end.tokenizer.encode(" Paris, café 🦥.", add_special_tokens=False)


@pytest.fixture
def make_api(front_end: FrontEnd, paris: list[int]) -> MakeApi:
    def make(script: Script | None = None, engine: EngineConfig | None = None, **options: object) -> Api:
        return Api(front_end, script or says(paris, eos=2), engine or EngineConfig(), ServerConfig(**options))

    return make


@pytest.fixture
def api(make_api: MakeApi) -> Api:
    return make_api()


@pytest.fixture(scope="session")
def server(default_model: ModelFiles) -> Iterator[LiveServer]:
    """``cupy-engine serve`` on the default model, shared by all tests that leave it well."""
    with LiveServer.serve("--max-model-len", "2048", "--max-num-seqs", "64", "--workers", "2") as live:
        yield live
