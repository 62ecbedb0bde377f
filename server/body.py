"""From a request's bytes to a typed body, with errors that name the field, its value and what is allowed."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import msgspec
from flask import Request
from gunicorn.http.errors import ParseException

from .api_errors import ApiError
from .server_config import ServerConfig

T = TypeVar("T", bound=msgspec.Struct)

MAX_NAMED_FIELDS = 16
_PATH = re.compile(r"\.([^.\[\]]+)|\[(\d+|\.\.\.)\]")
_MISSING = re.compile(r"Object missing required field `([^`]+)`")
_resolved: set[type] = set()  # kinds whose fields' types msgspec knows
_resolving = threading.Lock()


@dataclass(frozen=True, slots=True)
class Body(Generic[T]):
    """``fields``: the typed body. ``ignored``: names of fields that this API does not know."""

    fields: T
    ignored: tuple[str, ...]


def read_body(request: Request, kind: type[T], config: ServerConfig) -> Body[T]:
    """Parse and check the body of ``request``.

    Raises:
        ApiError: 400, 413 or 415.
    """
    raw = _decode(_read(request, config.max_body_bytes))
    _refuse_unsupported(raw)
    ignored = tuple(name for name in raw if name not in kind.__struct_fields__ and name not in UNSUPPORTED)
    if ignored and config.strict:
        raise ApiError(400, f"unknown field {_shorten(ignored[0])}", param=ignored[0][:64], code="unknown_parameter")
    _resolve(kind)
    try:
        return Body(msgspec.convert(raw, kind, str_keys=True), ignored)
    except msgspec.ValidationError as error:
        raise _name_field(error, raw) from None


def ignored_fields_header(names: tuple[str, ...]) -> str:
    """A ``Warning`` header's text; names are shown only as far as they are harmless."""
    shown = [re.sub(r"[^\w.-]", "?", name, flags=re.ASCII)[:64] for name in names[:MAX_NAMED_FIELDS]]
    return f'299 cupy-engine "unknown fields ignored: {", ".join(shown)}"'


def _read(request: Request, max_bytes: int) -> bytes:
    mimetype = request.mimetype
    if mimetype and mimetype != "application/json" and not mimetype.endswith("+json"):
        message = f"Content-Type must be application/json, got {_shorten(mimetype)}"
        raise ApiError(415, message, code="unsupported_media_type")
    try:
        payload = _read_at_most(request, max_bytes + 1)
    except (ParseException, OSError, EOFError):
        raise ApiError(400, "the request body ends early or is badly chunked", code="invalid_body") from None
    if len(payload) > max_bytes:
        raise ApiError(413, f"the request body is larger than {max_bytes} bytes", code="request_too_large")
    return payload


def _read_at_most(request: Request, max_bytes: int) -> bytes:
    """The body, or its beginning if it is longer. Without Content-Length it is chunked, and ends by itself."""
    source, announced = request.environ["wsgi.input"], request.content_length
    if announced is None:
        return bytes(source.read(max_bytes)) if request.environ.get("wsgi.input_terminated") else b""
    if announced >= max_bytes:
        return bytes(max_bytes)  # too long, so what it says does not matter
    payload = bytes(source.read(announced))
    if len(payload) < announced:
        raise EOFError
    return payload


def _decode(payload: bytes) -> dict[str, Any]:
    try:
        return msgspec.json.decode(payload, type=dict[str, Any])
    except msgspec.ValidationError as error:
        raise ApiError(400, f"the request body must be a JSON object: {error}", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the request body is not valid JSON: {error}", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "the request body is nested too deeply", code="invalid_json") from None


def _resolve(kind: type) -> None:
    """Let msgspec look up the types of a kind's fields, which kills the process where two threads make it do so."""
    if kind not in _resolved:
        with _resolving:
            msgspec.json.Decoder(kind)
            _resolved.add(kind)


def _name_field(error: msgspec.ValidationError, raw: dict[str, Any]) -> ApiError:
    """Turn msgspec's sentence into one about the field that it points at."""
    problem, _, path = str(error).partition(" - at ")
    param = path.rpartition("`$")[2].rstrip("`").lstrip(".")
    if missing := _MISSING.match(problem):
        param = f"{param}.{missing[1]}" if param else missing[1]
        return ApiError(400, f"{param} is required", param=param, code="missing_required_parameter")
    problem = problem.replace(" | null", "").replace("`", "")
    problem = problem[:1].lower() + problem[1:].partition(", got ")[0]
    return ApiError(
        400, f"{param}: {problem}, got {_shorten(_value_at(raw, param))}", param=param or None, code="invalid_type"
    )


def _value_at(raw: Any, path: str) -> Any:
    """The value at a path such as ``messages[0].role``; as far as it goes."""
    value = raw
    for name, index in _PATH.findall("." + path):
        if name and isinstance(value, dict):
            value = value.get(name)
        elif index.isdigit() and isinstance(value, list) and int(index) < len(value):
            value = value[int(index)]
    return value


def _shorten(value: object) -> str:
    try:
        text = repr(value)
    except (RecursionError, ValueError):
        return "a huge value"
    return text if len(text) <= 80 else text[:77] + "..."


def _is_meaningful(value: Any) -> bool:
    return value not in (None, "", False, [], {})


def _is_tool_choice(value: Any) -> bool:
    return value not in (None, "none", "auto")


def _is_multimodal(value: Any) -> bool:
    return value not in (None, ["text"])


UNSUPPORTED = {
    **dict.fromkeys(
        (
            "suffix",
            "functions",
            "chat_template",
            "use_beam_search",
            "prompt_embeds",
            "previous_response_id",
            "conversation",
            "audio",
            "prediction",
            "web_search_options",
        ),
        _is_meaningful,
    ),
    "function_call": _is_tool_choice,
    "modalities": _is_multimodal,
}


def _refuse_unsupported(raw: dict[str, Any]) -> None:
    for name, is_set in UNSUPPORTED.items():
        if name in raw and is_set(raw[name]) and not (name == "functions" and raw.get("function_call") == "none"):
            raise ApiError(
                400,
                f"{name} is not supported by this server yet, got {_shorten(raw[name])}; leave it out",
                param=name,
                code="unsupported_parameter",
            )
