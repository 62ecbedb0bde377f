"""The application over a fake engine, called in process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cupy_engine.server.app import create_app
from cupy_engine.server.client_watcher import ClientWatcher
from cupy_engine.server.deployment import Deployment
from cupy_engine.server.generation import Service
from cupy_engine.server.key_limits import KeyLimits
from cupy_engine.server.model_directory import ModelDirectory
from cupy_engine.server.server_config import ServerConfig
from fake_engine import FakeEngineClient, Script
from flask.testing import FlaskClient

from cupy_engine.config import EngineConfig
from cupy_engine.frontend import FrontEnd


def one_model(service: Service) -> ModelDirectory:
    """A directory of one model, without a supervisor behind it."""
    models = ModelDirectory([Deployment(name=service.front_end.model_name)], service.config)
    (served,) = models.served()
    served.pool, served.engine_config, served._front_end = service.client, service.engine_config, service.front_end
    models.key_limits = service.key_limits
    return models


MakeApi = Callable[..., "Api"]


class Api:
    """A test client, and the fake engine behind it."""

    def __init__(self, front_end: FrontEnd, script: Script, engine: EngineConfig, server: ServerConfig) -> None:
        self.engine = FakeEngineClient(script)
        self.key_limits: KeyLimits | None = None
        if server.limits_keys:
            with tempfile.TemporaryDirectory() as folder:
                self.key_limits = KeyLimits(Path(folder), server)
        self.app = create_app(
            one_model(Service(front_end, self.engine, ClientWatcher(), engine, server, self.key_limits))
        )
        self.http: FlaskClient = self.app.test_client()

    def post(self, path: str, body: object, **more: Any):
        return self.http.post(path, json=body, **more)

    def complete(self, **fields: object):
        return self.post("/v1/completions", {"prompt": "Hello", **fields})

    def chat(self, **fields: object):
        return self.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], **fields})
