"""``GET /openapi.json``: the API, described by the types that check its requests and by the application's routes."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from flask import Blueprint, Flask, Response, current_app

from cupy_engine import __version__
from cupy_engine.sampling_params import SamplingParams, allowed_values

from .answering import json_response
from .options import field_help
from .protocol import ChatRequest, CompletionRequest, DetokenizeRequest, EmbeddingRequest, TokenizeRequest
from .response_protocol import ResponseRequest

Json = dict[str, Any]

_BODIES: dict[str, type[msgspec.Struct]] = {
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponseRequest,
    "/v1/embeddings": EmbeddingRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
_STREAMING = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/responses"})
_STATUSES = {
    "400": "Something is wrong with the request; param names the field.",
    "401": "No valid API key.",
    "404": "No such model.",
    "413": "The body is too large.",
    "429": "Too many requests wait; see Retry-After.",
    "503": "The engine is not there.",
    "504": "The deadline has passed.",
}
_PARAMETER = re.compile(r"<(?:\w+:)?(\w+)>")


class ErrorDetails(msgspec.Struct, kw_only=True):
    """``param`` names the field at fault, ``code`` is for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, kw_only=True):
    """The body of every answer that is an error."""

    error: ErrorDetails


def openapi_blueprint() -> Blueprint:
    """``/openapi.json``"""
    routes = Blueprint("openapi", __name__)
    routes.get("/openapi.json")(openapi_json)
    return routes


def openapi_json() -> Response:
    """This description, as OpenAPI 3.1."""
    return json_response(describe(current_app))


def describe(app: Flask) -> Json:
    """The OpenAPI document of an application."""
    references, components = msgspec.json.schema_components(
        [*_BODIES.values(), ErrorBody], ref_template="#/components/schemas/{name}"
    )
    for schema in components.values():
        _explain(schema.get("properties", {}))
    bodies = dict(zip(_BODIES, references, strict=False))
    paths: dict[str, Json] = {}
    rules = (rule for rule in app.url_map.iter_rules() if not rule.endpoint.startswith("pages."))
    for rule in sorted(rules, key=lambda rule: rule.rule):
        path = _PARAMETER.sub(r"{\1}", rule.rule)
        for method in sorted((rule.methods or set()) & {"GET", "POST", "DELETE", "PUT"}):
            handler = app.view_functions[rule.endpoint]
            operation = _operation(path, handler.__doc__, bodies.get(path) if method == "POST" else None)
            paths.setdefault(path, {})[method.lower()] = {"operationId": _operation_id(rule.endpoint)} | operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "cupy-engine", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _explain(properties: Json) -> None:
    """Say of sampling parameters what they do and what is allowed, in the words of the class that checks them."""
    texts = field_help(SamplingParams)
    for name, schema in properties.items():
        if name in texts and "description" not in schema:
            limits = allowed_values(name)
            schema["description"] = texts[name] + (f" Must be {limits}." if limits else "")


def _operation(path: str, text: str | None, body: Json | None) -> Json:
    summary = " ".join((text or path).split("\n\n")[0].split())
    success: Json = {"description": "As asked.", "content": {"application/json": {}}}
    if path in _STREAMING:
        success["content"]["text/event-stream"] = {}
    operation: Json = {"summary": summary, "responses": {"200": success, **_errors()}}
    if names := re.findall(r"{(\w+)}", path):
        schema = {"type": "string"}
        operation["parameters"] = [{"name": name, "in": "path", "required": True, "schema": schema} for name in names]
    if body is not None:
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": body}}}
    return operation


def _errors() -> Json:
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
    return {status: {"description": text, "content": content} for status, text in _STATUSES.items()}


def _operation_id(endpoint: str) -> str:
    return endpoint.replace(".", "_")
