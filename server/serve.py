"""``cupy-engine serve``: an engine process and gunicorn's workers, started together, ended together."""

from __future__ import annotations

import logging
import os
import signal
import socket
from argparse import Namespace
from types import FrameType

from cupy_engine.config import EngineConfig
from cupy_engine.errors import ConfigError, EngineError

from .engine_launcher import ensure_engine
from .listen_config import ListenConfig
from .logs import configure_logging
from .options import chosen
from .server_config import ServerConfig

logger = logging.getLogger(__name__)

BACKLOG = 2048
KEY_VARIABLE = "CUPY_ENGINE_API_KEY"


def serve(engine_config: EngineConfig, config: ServerConfig, listen: ListenConfig, start_s: float) -> int:
    """Serve until told to end; the exit status. ``start_s``: when the command began, on the monotonic clock.

    Raises:
        EngineError: the model cannot be loaded or the port cannot be bound.
    """
    configure_logging(listen.log_level, listen.log_format)
    signal.signal(signal.SIGTERM, _exit)
    if not config.api_keys and listen.host not in ("127.0.0.1", "::1", "localhost"):
        logger.warning("no API key is set: whoever can reach %s:%d can use this server", listen.host, listen.port)
    main_pid = os.getpid()
    listener = bind(listen.host, listen.port)
    engine = ensure_engine(engine_config, main_pid, config.drain_timeout_s, is_quiet=True)
    load_error = None
    try:
        from .gunicorn_app import run_gunicorn  # here, so that the engine loads the model meanwhile

        run_gunicorn(engine_config, config, listen, listener, engine, start_s)
    except SystemExit:
        if os.getpid() != main_pid:  # a worker, forked in there, ends; the rest is the main process's
            raise
    finally:
        if os.getpid() == main_pid:
            load_error = engine.load_error
            listener.close()
            engine.close()
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
    server = chosen(arguments, ServerConfig)
    if "api_keys" not in server and (key := os.environ.get(KEY_VARIABLE)):
        server["api_keys"] = [key]
    return serve(
        EngineConfig(**chosen(arguments, EngineConfig)),
        ServerConfig(**server),
        ListenConfig(**chosen(arguments, ListenConfig)),
        arguments.start_s,
    )
