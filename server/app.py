"""The Flask application: routes, keys, limits, and errors in one shape."""

from __future__ import annotations

import hmac
import logging
import uuid
from typing import Any

from flask import Flask, Response, g, request
from werkzeug.exceptions import HTTPException

from . import pages
from .admin_api import ADMIN, admin_blueprint
from .api_errors import ApiError, ClientGoneError, to_api_error
from .draining import EXTENSION
from .model_directory import ModelDirectory
from .openai_api import openai_blueprint
from .openapi import openapi_blueprint
from .operations import operations_blueprint
from .reports import Reporter
from .server_config import ServerConfig
from .watch import watch_blueprint

logger = logging.getLogger(__name__)

# Without a key; everything else needs one if keys are set.
OPEN_ENDPOINTS = pages.OPEN_ENDPOINTS | {"operations.health", "operations.ready"}
CLIENT_CLOSED_REQUEST = 499


def create_app(models: ModelDirectory) -> Flask:
    """The WSGI application of one worker."""
    app = Flask("cupy_engine", static_folder=None)
    app.extensions[EXTENSION] = models
    Reporter(models.config).install(app)
    app.before_request(lambda: _check_key(models.config))
    app.after_request(_name_request)
    app.register_error_handler(ClientGoneError, lambda _: Response(status=CLIENT_CLOSED_REQUEST))
    app.register_error_handler(HTTPException, _http_error)
    app.register_error_handler(Exception, lambda error: to_api_error(error).response())
    app.register_blueprint(openai_blueprint(models))
    app.register_blueprint(operations_blueprint(models))
    app.register_blueprint(admin_blueprint(models))
    app.register_blueprint(openapi_blueprint())
    app.register_blueprint(watch_blueprint(models))
    app.register_blueprint(pages.pages_blueprint())
    return app


def _check_key(config: ServerConfig) -> None:
    """Raises ApiError 401 without a valid key, 403 for a user's key where an administrator's is needed."""
    needs_admin = request.blueprint == ADMIN
    if request.endpoint in OPEN_ENDPOINTS or (not config.api_keys and not needs_admin):
        return
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    sent = sent.strip() if scheme.lower() == "bearer" else ""
    is_admin, is_user = _matches(sent, config.admin_keys), _matches(sent, config.api_keys)
    has_no_keys = not config.api_keys and not config.admin_keys
    if needs_admin and not is_admin and (is_user or has_no_keys):
        message = "loading and unloading models needs an administrator's key, which serve --admin-key sets"
        raise ApiError(403, message, code="admin_key_required")
    if not is_admin and not is_user:
        message = "a valid API key is required: Authorization: Bearer KEY"
        raise ApiError(401, message, code="invalid_api_key")
    g.api_key = sent


def _matches(sent: str, keys: tuple[str, ...]) -> bool:
    """Whether ``sent`` is one of ``keys``; every key is compared, in constant time."""
    matches = [hmac.compare_digest(key.encode(), sent.encode("utf-8", "surrogateescape")) for key in keys]
    return any(matches)


def _name_request(response: Response) -> Response:
    response.headers["X-Request-Id"] = g.get("answer_id") or uuid.uuid4().hex
    return response


def _http_error(error: Any) -> Response:
    """What Flask and Werkzeug refuse by themselves, in our shape."""
    status = error.code or 500
    if status == 404:
        api_error = ApiError(404, f"there is no {request.method} {_shown_path()}", code="not_found")
    elif status == 405:
        api_error = ApiError(405, f"{_shown_path()} does not take {request.method}", code="method_not_allowed")
    elif status >= 500:
        logger.error("unexpected HTTP error: %s", error)
        api_error = ApiError(500, "an unexpected error; the server's log has the details", code="internal_error")
    else:
        api_error = ApiError(status, error.name.lower(), code="bad_request")
    response = api_error.response()
    if error.code == 405 and getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(error.valid_methods)
    return response


def _shown_path() -> str:
    path = request.path
    return path if len(path) <= 100 else path[:97] + "..."
