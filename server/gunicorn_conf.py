"""Settings of gunicorn that suit this server; ``cupy-engine serve`` starts from them, and so can you:

gunicorn -c python:cupy_engine.server.gunicorn_conf -w 2 "cupy_engine.server:create_api_server()"
"""

from __future__ import annotations

import gc
from typing import Any

worker_class = "cupy_engine.server.stream_worker.StreamWorker"  # gthread, with all streams on one thread
threads = 256  # per worker: one per request that waits for its first token or its whole answer
worker_connections = 1256  # threads and kept-alive connections
keepalive = 75  # longer than the minute for which proxies keep idle connections
timeout = 120  # seconds in which a worker must boot: the first start may fetch the model
graceful_timeout = 33
forwarder_headers = ""  # what path is meant, no header may say: a proxy may let a client's SCRIPT_NAME through
control_socket_disable = True  # no second socket beside HTTP


def post_worker_init(worker: Any) -> None:
    """Let each worker see to it that its requests end in time, and that garbage collections are short."""
    from .draining import drain_on_sigterm

    drain_on_sigterm(worker)
    gc.collect()  # what is garbage now would stay
    gc.freeze()  # to look through all that has been built holds all requests up by tens of ms


def on_exit(server: Any) -> None:
    """Leave no files behind."""
    from .supervisor_launcher import remove_runtime_folders

    remove_runtime_folders()
