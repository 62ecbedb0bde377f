"""From options to a running server's WSGI application."""

from __future__ import annotations

import os
import signal

from flask import Flask

from cupy_engine.config import EngineConfig
from cupy_engine.errors import EngineError
from cupy_engine.frontend import FrontEnd
from cupy_engine.overload import AdmissionRule

from .app import create_app
from .client_watcher import ClientWatcher
from .engine_client import EngineClient
from .engine_launcher import EngineProcess, ensure_engine
from .generation import Service
from .key_limits import KeyLimits
from .logs import configure_logging
from .server_config import ServerConfig, split_options
from .wire import EngineStatus


def build_app(**options: object) -> Flask:
    """What :func:`cupy_engine.server.create_api_server` returns.

    Raises:
        gunicorn.errors.AppImportError: a bad option or model; gunicorn prints it as one line and ends.
    """
    configure_logging()
    try:
        engine_config, config = split_options(options)
        owner_pid = server_pid()
        front_end = FrontEnd.from_config(engine_config)  # first: it tells a bad model from a good one
        engine = ensure_engine(engine_config, owner_pid, config.drain_timeout_s)
    except EngineError as error:
        from gunicorn.errors import AppImportError

        raise AppImportError(f"error: {error}") from None
    app = assemble(front_end, engine_config, config, engine)
    if owner_pid != os.getpid():  # this process is a worker and forks no more
        app.extensions["engine_client"].connect()
    return app


def assemble(front_end: FrontEnd, engine_config: EngineConfig, config: ServerConfig, engine: EngineProcess) -> Flask:
    """An application over an engine process. ``app.extensions["engine_client"]`` is its client."""

    def adopt_limits(status: EngineStatus) -> None:
        front_end.max_model_len = status.max_model_len

    rule = AdmissionRule(engine_config.max_queue_len, engine_config.slo_ttft_s)
    client = EngineClient(engine.folder, stall_timeout_s=config.stall_timeout_s, rule=rule)
    client.on_ready.append(adopt_limits)
    key_limits = KeyLimits(engine.folder, config) if config.limits_keys else None
    app = create_app(Service(front_end, client, ClientWatcher(), engine_config, config, key_limits))
    app.extensions["engine_client"] = client
    app.extensions["engine_process"] = engine
    return app


def server_pid() -> int:
    """The main process of the server that loads this application.

    In a gunicorn worker that is gunicorn's master; elsewhere (``--preload``, another server) this very process.
    """
    from gunicorn.workers.base import Worker

    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return worker.ppid if isinstance(worker, Worker) else os.getpid()
