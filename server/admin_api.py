"""Loading and unloading models while the server runs, for those with an administrator's key."""

from __future__ import annotations

from typing import Any

import msgspec
from flask import Blueprint, Response, request

from cupy_engine.errors import ConfigError, ModelLoadError
from cupy_engine.frontend import FrontEnd

from .answering import json_response
from .api_errors import ApiError
from .model_directory import ModelDirectory
from .models_file import deployment_from
from .roster_client import RosterClient

ADMIN = "admin"  # the blueprint's name, by which its routes are known to need the key
TIMEOUT_S = 3600.0


def admin_blueprint(models: ModelDirectory) -> Blueprint:
    """``POST /v1/models/{id}/load`` and ``/unload``."""
    routes, api = Blueprint(ADMIN, __name__), AdminApi(models)
    routes.post("/v1/models/<path:model_id>/load")(api.load)
    routes.post("/v1/models/<path:model_id>/unload")(api.unload)
    return routes


class AdminApi:
    """Handlers; each call runs on a request thread, and answers when the thing is done."""

    def __init__(self, models: ModelDirectory) -> None:
        self._models = models

    def load(self, model_id: str) -> Response:
        """Serve a model, a version (``name@version``), or another number of replicas or weight of what is served.

        The body is a table as in the file of ``serve --config``. Fields that it leaves out stay as they are where the
        id is served already.
        """
        name, _, version = model_id.partition("@")
        table = self._known(model_id) | _read_table()
        if {table.get("name", name), table.get("version", version)} != {name, version}:
            raise ApiError(400, "name and version are those of the path", param="name", code="invalid_value")
        try:
            deployment = deployment_from({**table, "version": version}, name)
            FrontEnd.from_config(deployment.engine_config())  # it tells a bad model before an engine is started
        except ConfigError as error:
            raise ApiError(400, str(error), param=error.field, code="invalid_value") from None
        except ModelLoadError as error:
            raise ApiError(400, str(error), param="model", code="model_not_loadable") from None
        _require_done(self._roster.load(deployment, TIMEOUT_S), status=500)
        return json_response({"id": deployment.id, "status": "loaded"})

    def unload(self, model_id: str) -> Response:
        """Serve it no more: its requests may finish, then its memory is given back."""
        _require_done(self._roster.unload(model_id, TIMEOUT_S), status=404)
        return json_response({"id": model_id, "status": "unloaded"})

    @property
    def _roster(self) -> RosterClient:
        assert self._models.roster is not None
        return self._models.roster

    def _known(self, model_id: str) -> dict[str, Any]:
        """The table of what is served under this id."""
        roster = self._roster.refresh()
        for model in roster.models if roster else ():
            if model.deployment.id == model_id:
                table: dict[str, Any] = msgspec.to_builtins(model.deployment)
                return {**table.pop("engine"), **table}
        return {}


def _read_table() -> dict[str, Any]:
    body = request.get_data()
    try:
        table = msgspec.json.decode(body) if body else {}
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}", code="invalid_json") from None
    if not isinstance(table, dict):
        raise ApiError(400, "the body must be an object", code="invalid_type")
    return table


def _require_done(error: str | None, *, status: int) -> None:
    if error is not None:
        raise ApiError(status, error, param="model", code="model_not_found" if status == 404 else "load_failed")
