"""From options to a running server's WSGI application."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence

from flask import Flask

from cupy_engine.errors import EngineError

from .app import create_app
from .deployment import Deployment, SupervisorPlan
from .key_limits import KeyLimits
from .logs import configure_logging
from .model_directory import ModelDirectory
from .models_file import split_options
from .roster_client import RosterClient
from .server_config import ServerConfig
from .supervisor_launcher import SupervisorProcess, ensure_supervisor


def build_app(**options: object) -> Flask:
    """What :func:`cupy_engine.server.create_api_server` returns.

    Raises:
        gunicorn.errors.AppImportError: a bad option or model; gunicorn prints it as one line and ends.
    """
    configure_logging()
    owner_pid = server_pid()
    try:
        deployments, config = split_options(options)
        models = ModelDirectory(deployments, config)
        models.load_front_ends()  # before anything is started: it tells a bad model from a good one
        plan = plan_of(deployments, config)
        follow_supervisor(models, plan, ensure_supervisor(plan, owner_pid), owner_pid)
    except EngineError as error:
        from gunicorn.errors import AppImportError

        raise AppImportError(f"error: {error}") from None
    if owner_pid != os.getpid():  # this process is a worker and forks no more
        models.connect()
    return create_app(models)


def plan_of(deployments: Sequence[Deployment], config: ServerConfig) -> SupervisorPlan:
    """What the supervisor needs to know."""
    return SupervisorPlan(
        deployments=list(deployments),
        drain_timeout_s=config.drain_timeout_s,
        stall_timeout_s=config.stall_timeout_s,
        max_engine_restarts=config.max_engine_restarts,
    )


def follow_supervisor(
    models: ModelDirectory, plan: SupervisorPlan, supervisor: SupervisorProcess, owner_pid: int
) -> RosterClient:
    """Let ``models`` follow its roster. If it dies before the server does, it gets a successor."""
    roster = RosterClient(supervisor.folder, restart=lambda: ensure_supervisor(plan, owner_pid))
    models.follow(roster)
    if models.config.limits_keys:
        models.key_limits = KeyLimits(supervisor.folder, models.config)
    return roster


def server_pid() -> int:
    """The main process of the server that loads this application.

    In a gunicorn worker that is gunicorn's master; elsewhere (``--preload``, another server) this very process.
    """
    from gunicorn.workers.base import Worker

    worker = getattr(signal.getsignal(signal.SIGTERM), "__self__", None)
    return worker.ppid if isinstance(worker, Worker) else os.getpid()
