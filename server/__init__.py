"""The HTTP server in OpenAI's dialect, and the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flask import Flask

__all__ = ["create_api_server"]


def create_api_server(model: str | None = None, **options: Any) -> Flask:
    """The server as a WSGI application, for gunicorn:

        gunicorn -c python:cupy_engine.server.gunicorn_conf "cupy_engine.server:create_api_server(model='smollm2-135m')"

    All workers of one gunicorn share one engine process, or several. They load while the workers start (``/health``
    says how far they are) and end when gunicorn does.

    Args:
        model: built-in name, folder, ``.gguf`` file or hub id; default: smollm2-135m.
        options: fields of :class:`cupy_engine.EngineConfig` and :class:`cupy_engine.server.server_config.ServerConfig`;
            ``replicas``; or, for several models, ``config``: a file as in :mod:`cupy_engine.server.models_file`.
    """
    from .factory import build_app  # here, so that the command line starts fast

    return build_app(**options if model is None else {"model": model, **options})
