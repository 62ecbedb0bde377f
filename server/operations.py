"""Endpoints for those who run the server, and the tokenizer's two."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from cupy_engine import __version__
from cupy_engine.errors import InvalidRequestError
from cupy_engine.tokenizer import Tokenizer

from .answering import json_response
from .api_errors import refuse
from .body import read_body
from .chat_prompt import messages_of, render_chat
from .engine_client import HealthState, require_ready
from .generation import Service
from .model_directory import ModelDirectory
from .protocol import DetokenizeRequest, TokenizeRequest
from .tool_formats import form_of


def operations_blueprint(models: ModelDirectory) -> Blueprint:
    """``/health``, ``/ready``, ``/version``, ``/load``, ``/tokenize``, ``/detokenize``."""
    routes, api = Blueprint("operations", __name__), Operations(models)
    routes.get("/health")(api.health)
    routes.get("/ready")(api.ready)
    routes.get("/version")(api.version)
    routes.get("/load")(api.load)
    routes.post("/tokenize")(api.tokenize)
    routes.post("/detokenize")(api.detokenize)
    return routes


class Operations:
    """Handlers; each call runs on a request thread."""

    def __init__(self, models: ModelDirectory) -> None:
        self._models = models

    def health(self) -> Response:
        """200 while every model's engine makes progress, also when it is finishing its last requests; else 503."""
        return self._state_response(("ready", "stopping"))

    def ready(self) -> Response:
        """200 while new requests are taken, for every model; else 503."""
        return self._state_response(("ready",))

    def version(self) -> Response:
        """The server's version."""
        return json_response({"version": __version__})

    def load(self) -> Response:
        """How many requests run and wait, and how many KV blocks there are; of all engines that answer."""
        replicas = [replica for served in self._models.served() for replica in served.pool.replicas.values()]
        stats = [replica.client.stats().stats for replica in replicas if replica.client.is_ready]
        if not stats and replicas:
            require_ready(replicas[0].state)
        total = {name: sum(getattr(each, field) for each in stats) for name, field in _LOAD.items()}
        wait_s = min((replica.client.load.wait_s for replica in replicas if replica.client.is_ready), default=0.0)
        server_load = total["num_requests_running"] + total["num_requests_waiting"]
        return json_response({"server_load": server_load, **total, "expected_wait_s": round(wait_s, 3)})

    def tokenize(self) -> Response:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        body = read_body(request, TokenizeRequest, self._models.config)
        fields = body.fields
        service = self._models.find(fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            refuse("prompt", "give either prompt or messages")
        tokenizer = _tokenizer(service)
        if fields.messages is not None:
            messages = messages_of(fields.messages)
            form = form_of(service.config.tool_call_parser, service.front_end.chat_template)
            text = render_chat(service.front_end, messages, fields.tools or (), fields, form)
            token_ids = tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))
        else:
            token_ids = tokenizer.encode(fields.prompt or "", add_special_tokens=fields.add_special_tokens is not False)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": service.front_end.max_model_len,
            "tokens": token_ids,
        }
        if fields.return_token_strs:
            answer["token_strs"] = [tokenizer.token_bytes(each).decode("utf-8", "replace") for each in token_ids]
        return json_response(answer, body)

    def detokenize(self) -> Response:
        """The text of token ids."""
        body = read_body(request, DetokenizeRequest, self._models.config)
        service = self._models.find(body.fields.model)
        vocab_size = service.front_end.vocab_size
        for token_id in body.fields.tokens:
            if not 0 <= token_id < vocab_size:
                refuse("tokens", f"tokens has id {token_id}; ids are integers from 0 to {vocab_size - 1}")
        text = _tokenizer(service).decode(body.fields.tokens, skip_special_tokens=False)
        return json_response({"prompt": text}, body)

    def _state_response(self, good: tuple[HealthState, ...]) -> Response:
        """The first model that is not well decides; several models are listed."""
        states = {served.deployment.id: served.pool.state for served in self._models.served()}
        worst_first = sorted(states.values(), key=lambda each: (each in good, each == "ready"))
        state: HealthState = worst_first[0] if worst_first else "ready"
        content: dict[str, Any] = {"status": _shown(state)}
        if len(states) != 1:
            content["models"] = {name: _shown(each) for name, each in states.items()}
        response = json_response(content)
        if state not in good:
            response.status_code = 503
            response.headers["Retry-After"] = "1"
        return response


_LOAD = {
    "num_requests_running": "num_running",
    "num_requests_waiting": "num_waiting",
    "num_requests_swapped": "num_swapped",
    "num_kv_blocks": "num_kv_blocks",
    "num_free_kv_blocks": "num_free_kv_blocks",
}


def _shown(state: HealthState) -> str:
    return "ok" if state == "ready" else state


def _tokenizer(service: Service) -> Tokenizer:
    tokenizer = service.front_end.tokenizer
    if tokenizer is None:
        raise InvalidRequestError("model", "this model has no tokenizer: it takes and gives token ids")
    return tokenizer
