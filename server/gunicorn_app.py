"""gunicorn as ``cupy-engine serve`` runs it: a given socket, one application, an orderly end."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
import time
from types import FrameType
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.config import KNOWN_SETTINGS as SETTINGS

from cupy_engine.config import EngineConfig
from cupy_engine.frontend import FrontEnd

from . import gunicorn_conf
from .engine_launcher import EngineProcess
from .factory import assemble
from .listen_config import ListenConfig
from .server_config import ServerConfig
from .wire import EngineStatus

logger = logging.getLogger(__name__)

KNOWN_SETTINGS = {setting.name for setting in SETTINGS}
SPARE_CONNECTIONS = 1000  # kept alive, or waiting for a thread
EXIT_MARGIN_S = 3.0  # for workers to send what the engine failed at the drain limit


def run_gunicorn(
    engine_config: EngineConfig,
    config: ServerConfig,
    listen: ListenConfig,
    listener: socket.socket,
    engine: EngineProcess,
    start_s: float,
) -> None:
    """Serve until a signal says otherwise; ends with SystemExit.

    Raises:
        ModelLoadError: the model's tokenizer or configuration cannot be loaded.
    """
    url = url_of(listener)
    app = assemble(FrontEnd.from_config(engine_config), engine_config, config, engine)

    def on_worker_start(worker: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the master decides
        client = app.extensions["engine_client"]
        if worker.age == 1:
            client.on_ready.append(lambda status: announce(url, engine_config.model, status, start_s))
        client.connect()

    settings = {
        **gunicorn_settings(listen, listen.num_threads(engine_config)),
        "bind": [f"fd://{listener.detach()}"],  # gunicorn closes it when it stops accepting
        "graceful_timeout": int(config.drain_timeout_s + EXIT_MARGIN_S),
        "post_worker_init": on_worker_start,
    }
    ServerApplication(app, settings, engine, config.drain_timeout_s).run()


def gunicorn_settings(listen: ListenConfig, num_threads: int) -> dict[str, Any]:
    """:mod:`.gunicorn_conf`, and what the command line says."""
    common = {name: value for name, value in vars(gunicorn_conf).items() if name in KNOWN_SETTINGS}
    return common | {
        "workers": listen.num_workers(),
        "threads": num_threads,
        "worker_class": listen.worker_class,
        "worker_connections": num_threads + SPARE_CONNECTIONS,
        "loglevel": "debug" if listen.log_level == "debug" else "warning",
        "proc_name": "cupy-engine",
    }


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def announce(url: str, model: str, status: EngineStatus, start_s: float) -> None:
    """Say that requests are answered from now on."""
    sys.stdout.write(
        f"ready on {url} (model {model}, {status.backend}, {status.num_kv_blocks} KV blocks) "
        f"in {time.monotonic() - start_s:.1f} s\n"
    )
    sys.stdout.flush()


class ServerApplication(BaseApplication):  # type: ignore[misc]
    """gunicorn with settings from this program alone: no configuration file, no command line of its own."""

    def __init__(self, app: Flask, settings: dict[str, Any], engine: EngineProcess, drain_timeout_s: float) -> None:
        self._app = app
        self._settings = settings
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        return self._app

    def run(self) -> None:
        DrainingArbiter(self, self._engine, self._drain_timeout_s).run()


class DrainingArbiter(Arbiter):  # type: ignore[misc]
    """Ends on SIGTERM or Ctrl-C: no new connections, running requests finish within a limit, the rest get an error.

    A second Ctrl-C ends everything at once.
    """

    def __init__(self, application: ServerApplication, engine: EngineProcess, drain_timeout_s: float) -> None:
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._is_stopping = False
        super().__init__(application)

    def handle_int(self) -> None:
        raise StopIteration

    def stop(self, graceful: bool = True) -> None:
        self._is_stopping = True
        if graceful:
            logger.info("stopping: running requests may take %g s; Ctrl-C again ends them now", self._drain_timeout_s)
        limit = threading.Timer(self._drain_timeout_s, self._engine.stop_now)
        limit.daemon = True
        limit.start()
        super().stop(graceful)
        limit.cancel()

    def signal(self, sig: int, frame: FrameType | None) -> None:
        if self._is_stopping and sig in (signal.SIGINT, signal.SIGQUIT):
            self.kill_workers(signal.SIGKILL)
        super().signal(sig, frame)
