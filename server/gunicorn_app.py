"""gunicorn as ``cupy-engine serve`` runs it: a given socket, one application, an orderly end."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

from flask import Flask
from gunicorn.app.base import BaseApplication
from gunicorn.arbiter import Arbiter
from gunicorn.config import KNOWN_SETTINGS as SETTINGS
from gunicorn.util import load_class

from cupy_engine.errors import ConfigError

from . import gunicorn_conf
from .app import create_app
from .deployment import Roster, SupervisorPlan
from .draining import EXIT_MARGIN_S
from .factory import follow_supervisor
from .listen_config import ListenConfig
from .model_directory import ModelDirectory, ServedModel
from .server_config import ServerConfig
from .supervisor_launcher import SupervisorProcess

logger = logging.getLogger(__name__)

KNOWN_SETTINGS = {setting.name for setting in SETTINGS}
SPARE_CONNECTIONS = 1000  # kept alive, or waiting for a thread


def run_gunicorn(
    plan: SupervisorPlan,
    config: ServerConfig,
    listen: ListenConfig,
    listener: socket.socket,
    supervisor: SupervisorProcess,
    start_s: float,
) -> None:
    """Serve until a signal says otherwise; ends with SystemExit.

    Raises:
        ModelLoadError: a model's tokenizer or configuration cannot be loaded.
        ConfigError: there is no such worker class.
    """
    url = url_of(listener)
    models = ModelDirectory(plan.deployments, config)
    models.load_front_ends()
    roster = follow_supervisor(models, plan, supervisor, os.getpid())

    def on_worker_start(worker: Any) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all; the master decides
        if worker.age == 1:
            roster.on_change.append(Announcement(models, url, start_s))
        models.connect()
        gunicorn_conf.post_worker_init(worker)

    settings = {
        **gunicorn_settings(listen, listen.num_threads(each.engine_config() for each in plan.deployments)),
        "bind": [f"fd://{listener.detach()}"],  # gunicorn closes it when it stops accepting
        "graceful_timeout": math.ceil(config.drain_timeout_s + EXIT_MARGIN_S),
        "post_worker_init": on_worker_start,
    }
    ServerApplication(create_app(models), settings, config.drain_timeout_s, supervisor).run()


def gunicorn_settings(listen: ListenConfig, num_threads: int) -> dict[str, Any]:
    """:mod:`.gunicorn_conf`, and what the command line says."""
    try:
        load_class(listen.worker_class)
    except RuntimeError:  # with a traceback in its text
        raise ConfigError("worker_class", f"cannot be imported: {listen.worker_class!r}; leave it out") from None
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


class Announcement:
    """Says once that requests are answered, when the roster has every engine ready."""

    def __init__(self, models: ModelDirectory, url: str, start_s: float) -> None:
        self._models = models
        self._url = url
        self._start_s = start_s
        self._is_made = False

    def __call__(self, roster: Roster) -> None:
        states = {replica.state for model in roster.models for replica in model.replicas}
        if self._is_made or states != {"ready"}:
            return
        self._is_made = True
        shown = "; ".join(self._describe(served) for served in self._models.served())
        sys.stdout.write(f"ready on {self._url} ({shown}) in {time.monotonic() - self._start_s:.1f} s\n")
        sys.stdout.flush()

    def _describe(self, served: ServedModel) -> str:
        _ = served.pool.state  # waits for what the engines say about themselves
        known = [replica.client.status for replica in served.pool.replicas.values()]
        status = next((status for status in known if status is not None), None)
        about = f", {status.backend}, {status.num_kv_blocks} KV blocks" if status else ""
        times = f", {len(known)} replicas" if len(known) > 1 else ""
        return f"model {served.deployment.id}{about}{times}"


class ServerApplication(BaseApplication):  # type: ignore[misc]
    """gunicorn with settings from this program alone: no configuration file, no command line of its own."""

    def __init__(
        self, app: Flask, settings: dict[str, Any], drain_timeout_s: float, supervisor: SupervisorProcess
    ) -> None:
        self._app = app
        self._settings = settings
        self._drain_timeout_s = drain_timeout_s
        self._supervisor = supervisor
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._settings.items():
            self.cfg.set(name, value)

    def load(self) -> Flask:
        return self._app

    def run(self) -> None:
        DrainingArbiter(self, self._drain_timeout_s, self._supervisor).run()


class DrainingArbiter(Arbiter):  # type: ignore[misc]
    """Ends on SIGTERM or Ctrl-C: no new connections, and workers end when their requests have.

    A second Ctrl-C ends everything at once.
    """

    def __init__(self, application: ServerApplication, drain_timeout_s: float, supervisor: SupervisorProcess) -> None:
        self._drain_timeout_s = drain_timeout_s
        self._supervisor = supervisor
        self._is_stopping = False
        super().__init__(application)

    def handle_int(self) -> None:
        raise StopIteration

    def stop(self, graceful: bool = True) -> None:
        self._is_stopping = True
        if graceful and self._supervisor.load_error is None:  # else nothing runs, and serve tells the error
            logger.info("stopping: running requests may take %g s; Ctrl-C again ends them now", self._drain_timeout_s)
        super().stop(graceful)

    def signal(self, sig: int, frame: FrameType | None) -> None:
        if self._is_stopping and sig in (signal.SIGINT, signal.SIGQUIT):
            self.kill_workers(signal.SIGKILL)
        super().signal(sig, frame)
