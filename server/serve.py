"""``cupy-engine serve``: engine processes and gunicorn's workers, started together, ended together."""

from __future__ import annotations

import logging
import os
import signal
import socket
from argparse import Namespace
from collections.abc import Sequence
from types import FrameType

from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError, EngineError

from .deployment import Deployment, deployment_of
from .factory import plan_of
from .listen_config import ListenConfig
from .logs import configure_logging
from .models_file import read_models_file
from .options import chosen
from .server_config import ServerConfig
from .supervisor_launcher import ensure_supervisor

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEY_VARIABLES = {"api_keys": "CUPY_ENGINE_API_KEY", "admin_keys": "CUPY_ENGINE_ADMIN_KEY"}


def serve(deployments: Sequence[Deployment], config: ServerConfig, listen: ListenConfig, start_s: float) -> int:
    """Serve until told to end; the exit status. ``start_s``: when the command began, on the monotonic clock.

    Raises:
        EngineError: a model cannot be loaded or the port cannot be bound.
    """
    configure_logging(listen.log_level, listen.log_format)
    signal.signal(signal.SIGTERM, _exit)
    main_pid = os.getpid()
    listener = bind(listen.host, listen.port)
    if not config.api_keys and listen.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("no API key is set: whoever can reach %s:%d can use this server", listen.host, listen.port)
    plan = plan_of(deployments, config)
    supervisor = ensure_supervisor(plan, main_pid, is_quiet=True)
    load_error = None
    try:
        from .gunicorn_app import run_gunicorn  # here, so that engines load their models meanwhile

        run_gunicorn(plan, config, listen, listener, supervisor, start_s)
    except SystemExit:
        if os.getpid() != main_pid:  # a worker, forked in there, ends; the rest is the main process's
            raise
    finally:
        if os.getpid() == main_pid:
            load_error = supervisor.load_error
            listener.close()
            supervisor.close()
    if load_error is not None:
        raise EngineError(load_error)
    return 0


def bind(host: str, port: int) -> socket.socket:
    """A listening socket: clients may connect from now on, and wait.

    Raises:
        ConfigError: the address is taken or none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError("host", f"{host!r} is no address of this machine ({error.strerror})") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError("port", f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from None
    return listener


def _exit(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def run(arguments: Namespace) -> int:
    """The command; its exit status."""
    server, listen = chosen(arguments, ServerConfig), chosen(arguments, ListenConfig)
    for field, variable in KEY_VARIABLES.items():
        if field not in server and (key := os.environ.get(variable)):
            server[field] = [key]
    engine = chosen(arguments, EngineConfig)
    if arguments.config is None:
        deployments = [deployment_of(EngineConfig(**engine), replicas=arguments.replicas)]
    else:
        if misplaced := [name for name in engine if name != "model" or arguments.model != EngineConfig.model]:
            raise ConfigError(misplaced[0], "belongs into the file of --config, to the model it is for")
        file = read_models_file(arguments.config)
        deployments, server, listen = file.deployments, file.server | server, file.listen | listen
    return serve(deployments, ServerConfig(**server), ListenConfig(**listen), arguments.start_s)
