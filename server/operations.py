"""Endpoints for those who run the server, and the tokenizer's two."""

from __future__ import annotations

from typing import Any

from flask import Blueprint, Response, request

from cupy_engine import __version__
from cupy_engine.errors import InvalidRequestError
from cupy_engine.tokenizer import Tokenizer

from .answering import check_model, json_response
from .api_errors import refuse
from .body import read_body
from .chat_prompt import messages_of, render_chat
from .engine_client import HealthState
from .generation import Service
from .protocol import DetokenizeRequest, TokenizeRequest


def operations_blueprint(service: Service) -> Blueprint:
    """``/health``, ``/ready``, ``/version``, ``/load``, ``/tokenize``, ``/detokenize``."""
    routes, api = Blueprint("operations", __name__), Operations(service)
    routes.get("/health")(api.health)
    routes.get("/ready")(api.ready)
    routes.get("/version")(api.version)
    routes.get("/load")(api.load)
    routes.post("/tokenize")(api.tokenize)
    routes.post("/detokenize")(api.detokenize)
    return routes


class Operations:
    """Handlers; each call runs on a request thread."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def health(self) -> Response:
        """200 while the engine makes progress, also when it is finishing its last requests; else 503."""
        return self._state_response(("ready", "stopping"))

    def ready(self) -> Response:
        """200 while new requests are taken; else 503."""
        return self._state_response(("ready",))

    def version(self) -> Response:
        """The server's version."""
        return json_response({"version": __version__})

    def load(self) -> Response:
        """How many requests run and wait, and how many KV blocks there are."""
        stats = self._service.client.stats().stats
        return json_response(
            {
                "server_load": stats.num_running + stats.num_waiting,
                "num_requests_running": stats.num_running,
                "num_requests_waiting": stats.num_waiting,
                "num_requests_swapped": stats.num_swapped,
                "expected_wait_s": round(self._service.client.load.wait_s, 3),
                "num_kv_blocks": stats.num_kv_blocks,
                "num_free_kv_blocks": stats.num_free_kv_blocks,
            }
        )

    def tokenize(self) -> Response:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        body = read_body(request, TokenizeRequest, self._service.config)
        fields = body.fields
        check_model(self._service, fields.model)
        if (fields.prompt is None) == (fields.messages is None):
            refuse("prompt", "give either prompt or messages")
        tokenizer = self._tokenizer()
        if fields.messages is not None:
            messages = messages_of(fields.messages)
            text = render_chat(self._service.front_end, messages, fields.tools or (), fields)
            token_ids = tokenizer.encode(text, add_special_tokens=bool(fields.add_special_tokens))
        else:
            token_ids = tokenizer.encode(fields.prompt or "", add_special_tokens=fields.add_special_tokens is not False)
        answer: dict[str, Any] = {
            "count": len(token_ids),
            "max_model_len": self._service.front_end.max_model_len,
            "tokens": token_ids,
        }
        if fields.return_token_strs:
            answer["token_strs"] = [tokenizer.token_bytes(each).decode("utf-8", "replace") for each in token_ids]
        return json_response(answer, body)

    def detokenize(self) -> Response:
        """The text of token ids."""
        body = read_body(request, DetokenizeRequest, self._service.config)
        check_model(self._service, body.fields.model)
        vocab_size = self._service.front_end.vocab_size
        for token_id in body.fields.tokens:
            if not 0 <= token_id < vocab_size:
                refuse("tokens", f"tokens has id {token_id}; ids are integers from 0 to {vocab_size - 1}")
        text = self._tokenizer().decode(body.fields.tokens, skip_special_tokens=False)
        return json_response({"prompt": text}, body)

    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._service.front_end.tokenizer
        if tokenizer is None:
            raise InvalidRequestError("model", "this model has no tokenizer: it takes and gives token ids")
        return tokenizer

    def _state_response(self, good: tuple[HealthState, ...]) -> Response:
        state = self._service.client.state
        response = json_response({"status": "ok" if state == "ready" else state})
        if state not in good:
            response.status_code = 503
            response.headers["Retry-After"] = "1"
        return response
